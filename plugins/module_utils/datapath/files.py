# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files that somebody else may have put there, and folders that somebody else may write.

Reading: a pipe, a device, a link or an endless file in place of one of ours neither hangs a run nor fills its memory.
:func:`open_regular` opens ordinary files alone, :func:`read` has a limit. What everybody on this machine may write is
refused: its bytes are anybody's. Who *owns* a file proves nothing (root_squash and ID mappings change owners), and a
group that may write was let in by who set the repository up: nothing that is written here is for a group, and with
ACLs the group's bits are but their mask.

Writing: :class:`Stage` is a folder of this user alone inside a folder that may be another user's. All in it goes by
its descriptor, so it does not matter what happens to names outside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from typing import Any, BinaryIO, Iterator, Optional

from ..errors import DamagedError, DataPathError

#: The largest documents (manifest, record, configuration, NVRAM) and journals that are read.
DOCUMENT_BYTES = 32 << 20
JOURNAL_BYTES = 64 << 20
#: Images, and all else that is made of a guest's disks, are their owner's alone.
PRIVATE = 0o600

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_REMEDY = "Find out who put it there, and bring back the file from a copy"
#: What to do about what everybody may write.
CLOSE = "Look at what it holds, then take that right away: chmod o-w, or file_mode and dir_mode of the mount (CIFS)"
_NUMBER_DIGITS = 20


def open_regular(path: str, *, what: str = "A file can't be used", dir_fd: Optional[int] = None) -> int:
    """A descriptor to read an ordinary file from, which nobody but its owner and group may write. It never waits.

    :param what: the message's beginning if it is refused.
    :param dir_fd: what a relative path is relative to.
    :raises FileNotFoundError: there is nothing. OSError: it can't be opened.
    :raises DamagedError: it is not an ordinary file, or everybody may write it.
    """
    # Opening a device may do something already, so the name is looked at first.
    _require_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=False), path, what)
    try:
        descriptor = os.open(path, _READ, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise DamagedError(what, subject=path, reason="it is not an ordinary file", remedy=_REMEDY) from None
        raise
    try:
        _require_regular(os.fstat(descriptor), path, what)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_stream(path: str, *, what: str = "A file can't be used", buffering: int = -1) -> BinaryIO:
    """As :func:`open_regular`, as a stream of bytes."""
    return os.fdopen(open_regular(path, what=what), "rb", buffering=buffering)


def read(path: str, limit_bytes: int = DOCUMENT_BYTES, *, what: str = "A file can't be used") -> bytes:
    """All of a file, see :func:`open_regular`. :raises DamagedError: it has more than *limit_bytes*."""
    with open_stream(path, what=what, buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        # It may grow while it is read.
        data = b"" if size > limit_bytes else _read_all(stream, limit_bytes + 1)
    if max(size, len(data)) > limit_bytes:
        raise DamagedError(
            what, subject=path, reason=f"it has {size} bytes, at most {limit_bytes} are expected", remedy=_REMEDY
        )
    return data


def _read_all(stream: BinaryIO, limit: int) -> bytes:
    pieces = []
    while limit:
        piece = stream.read(min(limit, 1 << 20))
        if not piece:
            break
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def _require_regular(status: os.stat_result, path: str, what: str) -> None:
    reason = kind_problem(status)
    if reason is not None:
        raise DamagedError(what, subject=path, reason=reason, remedy=_REMEDY)
    reason = writers_problem(status)
    if reason is not None:
        raise DamagedError(what, subject=path, reason=reason, remedy=CLOSE)


def kind_problem(status: os.stat_result) -> Optional[str]:
    """Why something is not an ordinary file, None if it is one."""
    if stat.S_ISREG(status.st_mode):
        return None
    return next(
        (f"it is {kind}, not an ordinary file" for fits, kind in _KINDS if fits(status.st_mode)), "it is not a file"
    )


def writers_problem(status: os.stat_result) -> Optional[str]:
    """That everybody may write a file or folder; None if not."""
    if not status.st_mode & stat.S_IWOTH:
        return None
    return f"everybody on this machine may write it (mode {stat.S_IMODE(status.st_mode):04o})"


def parse(data: bytes) -> Any:
    """JSON of somebody else's.

    :raises ValueError: it is none, or holds what no document of ours does: numbers beyond 64 bits, NaN, halves of
        characters. RecursionError: it is nested too deeply.
    """
    document = json.loads(data.decode("utf-8"), parse_int=_integer, parse_constant=_no_constant)
    if b"\\u" in data:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def _integer(digits: str) -> int:
    # Many digits take hours where Python has no limit of its own.
    if len(digits) > _NUMBER_DIGITS or not -(1 << 63) <= int(digits) < 1 << 63:
        raise ValueError(f"a number is too large: {digits[:_NUMBER_DIGITS]}...")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def nameless(folder: str, prefix: str) -> int:
    """The descriptor of a new file that has no name, so that nobody needs to remove it, nor can put another there.

    :raises DataPathError: it can't be made.
    """
    with contextlib.suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, PRIVATE)
    # Some file systems can't make it without one.
    try:
        descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
        os.unlink(path)
    except OSError as error:
        raise DataPathError("A temporary file can't be made", subject=folder, reason=error.strerror) from None
    return descriptor


class Folder:
    """A folder that may be another user's, by its descriptor. A context manager.

    :param path: may itself be a symbolic link: who named it knows. :raises OSError: it can't be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        os.close(self.descriptor)

    def status(self, name: str) -> Optional[os.stat_result]:
        """What lies at a name, not followed; None if nothing does."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    @property
    def proc_path(self) -> str:
        """A path of the folder for this process, whatever happens to its name."""
        return f"/proc/self/fd/{self.descriptor}"

    def open(self, name: str) -> Optional[int]:
        """A descriptor to read an ordinary file from, None if there is none.

        :raises DamagedError: it is something else. Anybody may write it: it is not a file of a repository.
        """
        path = os.path.join(self.path, name)
        status = self.status(name)
        problem = None if status is None else kind_problem(status)
        if status is None:
            return None
        if problem is None:
            descriptor = os.open(name, _READ, dir_fd=self.descriptor)
            problem = kind_problem(os.fstat(descriptor))
            if problem is None:
                return descriptor
            os.close(descriptor)
        raise DamagedError("A file can't be used", subject=path, reason=problem)

    def unlink(self, name: str) -> None:
        """Remove a file; one that is gone is not an error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def sync(self) -> None:
        """Return when the names are on the disk."""
        os.fsync(self.descriptor)


class Stage:
    """A folder of this user alone within a :class:`Folder`, for files that are not complete. A context manager.

    Its name is random, it is locked while it is in use, and removed with all that is left in it. ``descriptor`` has to
    be passed on to programs that are given :meth:`path`.

    :param stem: what its name begins with. :raises OSError: it can't be made.
    """

    def __init__(self, folder: Folder, stem: str) -> None:
        self.folder = folder
        self.name, self.descriptor = self._make(stem)

    def _make(self, stem: str) -> Any:
        while True:
            name = f"{stem}{secrets.token_hex(8)}"
            os.mkdir(name, 0o700, dir_fd=self.folder.descriptor)
            descriptor = own_folder(self.folder.descriptor, name)
            if descriptor is not None:
                return name, descriptor
            # Somebody took it away, or put another in its place, within this moment: again.

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        remove_tree(self.folder.descriptor, self.name, self.descriptor)
        os.close(self.descriptor)

    def path(self, name: str) -> str:
        """A path of a file in it for this process and for those that inherit ``descriptor``."""
        return f"/proc/self/fd/{self.descriptor}/{name}"

    def create(self, name: str) -> int:
        """A new file (mode 0600) for reading and writing: its descriptor."""
        return os.open(name, os.O_RDWR | _NEW, PRIVATE, dir_fd=self.descriptor)

    def unlink(self, name: str) -> None:
        """Remove a file; one that is gone is not an error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def publish(self, name: str, final: str) -> None:
        """Give a complete file its place in the folder, durably. What was there is replaced, and never followed."""
        descriptor = os.open(name, _READ, dir_fd=self.descriptor)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(name, final, src_dir_fd=self.descriptor, dst_dir_fd=self.folder.descriptor)
        self.folder.sync()


def own_folder(parent: int, name: str) -> Optional[int]:
    """The descriptor of a folder that is this user's alone, locked; None if it is not, or if it is locked already.

    An own file has the owner of an own folder, whatever root_squash makes of both.
    """
    try:
        descriptor = os.open(name, _FOLDER, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES):
            return None
        raise
    try:
        status = os.fstat(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if status.st_mode & 0o077 == 0 and _owner_of_new(descriptor) == status.st_uid:
            return descriptor
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS):
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _owner_of_new(folder: int) -> int:
    name = f"probe-{secrets.token_hex(8)}"
    descriptor = os.open(name, os.O_WRONLY | _NEW, PRIVATE, dir_fd=folder)
    try:
        os.unlink(name, dir_fd=folder)
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)


def remove_stages(folder: Folder, stem: str) -> None:
    """Remove the stages in a folder that nobody uses any more: their processes died."""
    pattern = re.compile(re.escape(stem) + r"[0-9a-f]{16}")
    for name in os.listdir(folder.descriptor):
        if pattern.fullmatch(name) is None:
            continue
        descriptor = own_folder(folder.descriptor, name)
        if descriptor is not None:
            try:
                remove_tree(folder.descriptor, name, descriptor)
            finally:
                os.close(descriptor)


def remove_tree(parent: int, name: str, descriptor: int) -> None:
    """Empty the folder of a descriptor, then remove it by its name, if that is still its name. No link is followed."""
    for entry in os.listdir(descriptor):
        try:
            os.unlink(entry, dir_fd=descriptor)
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(f"/proc/self/fd/{descriptor}/{entry}", ignore_errors=True)
        except FileNotFoundError:
            continue
    # Only an empty folder goes this way: one that was put in its place stays.
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=parent)


@contextlib.contextmanager
def as_data_path_error(what: str, subject: str) -> Iterator[None]:
    """An OSError within is told as a :class:`DataPathError`."""
    try:
        yield
    except OSError as error:
        raise DataPathError(what, subject=subject, reason=error.strerror) from None
