# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files of a guest in a folder here, and nothing outside it.

Every name is opened relative to the descriptor of the directory that it lies in, and no symbolic link is followed: not
one that came out of the image, and not one that somebody puts there meanwhile. Files are written into a hidden folder
in the destination first, and get their places when all of them are complete; what fails before leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from ...datapath.files import own_folder, remove_tree
from ...errors import DataPathError, InputError, VadpError
from ...repository.documents import REPOSITORY_FILE
from ...repository.runs import new_run_id
from ...repository.shapes import RUN_ID_PATTERN
from .filesystem import DIRECTORY, FILE, LINK, Piece
from .names import encoded, shown
from .reader import Entry
from .request import MODE, OWNER, SPECIAL, TIMES

_STAGE = ".openvadp-files-"
_STAGE_NAME = re.compile(rf"{re.escape(_STAGE)}({RUN_ID_PATTERN})")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SYNCS_AT_ONCE = 8
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID

FREE, SAME_KIND, OTHER_KIND = "free", "same_kind", "other_kind"


class Blocked(VadpError):
    """There is something in the way of a file."""


def steps_of(path: str) -> List[bytes]:
    """The names of a path as bytes."""
    return [encoded(step) for step in path.split("/") if step]


class Destination:
    """The folder that files go to. A context manager.

    :param path: it must exist, and may itself be a symbolic link: who named it knows.
    :raises InputError: it can't be used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                "The files can't be written", subject=path, reason=error.strerror, remedy="Make the folder first"
            ) from None
        real = os.path.realpath(path)
        while True:
            if os.path.exists(os.path.join(real, REPOSITORY_FILE)):
                os.close(self._root)
                raise InputError(
                    "The folder for the files lies in a repository",
                    subject=path,
                    reason=f"{real} is one",
                    remedy="Choose a folder outside it",
                )
            if real == os.path.dirname(real):
                break
            real = os.path.dirname(real)

    def __enter__(self) -> Destination:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        os.close(self._root)

    def require_writable(self) -> None:
        """:raises InputError: the user may not write there."""
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise InputError(
                "The files can't be written",
                subject=self.path,
                reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
                remedy="Give that user the folder, or choose another",
            )

    def free_bytes(self) -> int:
        """What its file system has room for."""
        status = os.fstatvfs(self._root)
        return status.f_bavail * status.f_frsize

    def shown(self, path: str) -> str:
        """Where a path of the guest comes to lie, for people."""
        return shown(self.path.rstrip("/") + path)

    # What is there

    def look(self, entry: Entry) -> str:
        """Whether the place of an entry is free, holds something of its kind, or something else.

        :raises Blocked: something on the way there is no directory.
        """
        status = self.status(entry.path)
        if status is None:
            return FREE
        kinds = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}
        return SAME_KIND if kinds.get(stat.S_IFMT(status.st_mode)) == entry.kind else OTHER_KIND

    def status(self, path: str) -> Optional[os.stat_result]:
        """What is at a path, not followed; None if nothing is. :raises Blocked: as :meth:`look`."""
        with self._parent(path) as (folder, name):
            if folder is None:
                return None
            if not name:
                return os.fstat(folder)
            try:
                return os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return None

    def link_target(self, path: str) -> Optional[bytes]:
        """Where the symbolic link at a path points to."""
        with self._parent(path) as (folder, name):
            if folder is None:
                return None
            return os.readlink(name, dir_fd=folder)

    def content(self, path: str) -> int:
        """A descriptor of the file at a path, to read what is there now; the caller closes it."""
        with self._parent(path) as (folder, name):
            if folder is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            descriptor = os.open(name, _READ, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not an ordinary file")
        return descriptor

    @contextlib.contextmanager
    def _parent(self, path: str, make: Optional[List[bytes]] = None) -> Iterator[Tuple[Optional[int], bytes]]:
        """The directory of a path and the last name; (None, ...) if that directory is not there.

        :param make: missing directories are made, for the owner alone, and their paths added here.
        """
        steps = steps_of(path)
        folder = os.dup(self._root)
        try:
            for number, step in enumerate(steps[:-1]):
                try:
                    inner = os.open(step, _FOLDER, dir_fd=folder)
                except FileNotFoundError:
                    if make is None:
                        yield None, steps[-1]
                        return
                    os.mkdir(step, 0o700, dir_fd=folder)
                    make.append(b"/".join(steps[: number + 1]))
                    inner = os.open(step, _FOLDER, dir_fd=folder)
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                        raise
                    raise Blocked(
                        "Something is in the way of a file",
                        subject=self.shown(path),
                        reason=f"{shown(os.fsdecode(step))} on the way there is no directory",
                    ) from None
                os.close(folder)
                folder = inner
            yield folder, steps[-1] if steps else b""
        finally:
            os.close(folder)

    # Writing

    @contextlib.contextmanager
    def stage(self) -> Iterator[Stage]:
        """A place for files that are not complete. What crashed restores left there goes first."""
        with _os_errors(self.path):
            name, descriptor = self._new_stage()
        try:
            self.remove_leftovers(except_for=name)
            yield Stage(self, self._root, descriptor)
        finally:
            remove_tree(self._root, os.fsdecode(name), descriptor)
            os.close(descriptor)

    def _new_stage(self) -> Tuple[bytes, int]:
        while True:
            name = _STAGE + new_run_id()
            os.mkdir(name, 0o700, dir_fd=self._root)
            descriptor = own_folder(self._root, name)
            if descriptor is not None:
                return name.encode("ascii"), descriptor
            # Somebody took it away, or put another in its place, within this moment: again.

    def remove_leftovers(self, except_for: bytes = b"") -> None:
        """Remove the stages of restores that died."""
        for name in os.listdir(self._root):
            raw = os.fsencode(name)
            if raw == except_for or _STAGE_NAME.fullmatch(name) is None:
                continue
            descriptor = own_folder(self._root, name)
            if descriptor is None:
                # Not one of ours, another user's, or in use.
                continue
            try:
                remove_tree(self._root, name, descriptor)
            finally:
                os.close(descriptor)


class Stage:
    """Files that are complete, and wait for all others to be so."""

    def __init__(self, destination: Destination, root: int, folder: int) -> None:
        self._destination = destination
        self._root = root
        self._folder = folder
        self._count = 0

    def add_file(self, pieces: Iterator[Piece], size: int, on_data: Any) -> bytes:
        """Write a file; holes stay holes. Returns what it is called here.

        :param on_data: called with each piece.
        """
        name = self._next()
        with _os_errors(self._destination.path):
            descriptor = os.open(name, _NEW, 0o600, dir_fd=self._folder)
        try:
            for piece in pieces:
                with _os_errors(self._destination.path):
                    if isinstance(piece, int):
                        os.lseek(descriptor, piece, os.SEEK_CUR)
                    else:
                        _write_all(descriptor, piece)
                on_data(piece)
            with _os_errors(self._destination.path):
                os.ftruncate(descriptor, size)
                # The kernel begins to write, so that there is less to wait for at the end.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._folder)
            raise
        finally:
            os.close(descriptor)
        return name

    def add_link(self, target: str) -> bytes:
        """Make a symbolic link; it is never followed here. Returns what it is called here."""
        name = self._next()
        with _os_errors(self._destination.path):
            os.symlink(encoded(target), name, dir_fd=self._folder)
        return name

    def _next(self) -> bytes:
        self._count += 1
        return str(self._count).encode("ascii")

    def publish(self, ready: Sequence[Tuple[Entry, Optional[bytes]]], preserve: Sequence[str]) -> None:
        """Give everything its place: directories (without a name here), then files and links.

        What was new is removed again if that fails; a file that replaced another one stays.

        :raises DataPathError: something can't be put in place.
        """
        made: List[bytes] = []
        placed: List[str] = []
        try:
            with _os_errors(self._destination.path):
                # Before the names: a crash must not leave a name without its bytes.
                self._sync_files(ready, preserve)
                for entry, name in ready:
                    if name is None:
                        self._make_directory(entry, made)
                for entry, name in ready:
                    if name is not None:
                        self._place(entry, name, made, placed, preserve)
                self._sync_directories(ready, made)
                for entry, name in reversed(ready):
                    if name is None:
                        self._finish_directory(entry, preserve)
        except BaseException:
            self._undo(made, placed)
            raise

    def _sync_files(self, ready: Sequence[Tuple[Entry, Optional[bytes]]], preserve: Sequence[str]) -> None:
        """What was written is on the disk, with owner, mode and times; others' files are not waited for."""
        names = [(entry, name) for entry, name in ready if name is not None and entry.kind == FILE]

        def keep_and_sync(item: Tuple[Entry, bytes]) -> None:
            entry, name = item
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
            try:
                _keep(descriptor, entry, preserve)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        # Side by side, so that many small files share the file system's commits.
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            for _done in pool.map(keep_and_sync, names):
                pass

    def _sync_directories(self, ready: Sequence[Tuple[Entry, Optional[bytes]]], made: Sequence[bytes]) -> None:
        """The names of all that was put in place are on the disk, those of new directories too."""
        changed = {os.path.dirname(entry.path) for entry, _name in ready}
        changed.update(entry.path for entry, name in ready if name is None)
        for steps in made:
            path = "/" + os.fsdecode(steps)
            changed.update((path, os.path.dirname(path)))
        for path in sorted(changed, reverse=True):
            with self._destination._parent(path.rstrip("/") + "/x") as (folder, _last):
                if folder is not None:
                    os.fsync(folder)

    def _make_directory(self, entry: Entry, made: List[bytes]) -> None:
        with self._destination._parent(entry.path + "/x", made):
            pass

    def _place(self, entry: Entry, name: bytes, made: List[bytes], placed: List[str], preserve: Sequence[str]) -> None:
        if entry.kind != FILE and OWNER in preserve and entry.uid is not None and entry.gid is not None:
            os.chown(name, entry.uid, entry.gid, dir_fd=self._folder, follow_symlinks=False)
        if entry.kind == LINK and TIMES in preserve:
            times = (entry.mtime_ns, entry.mtime_ns)
            os.utime(name, ns=times, dir_fd=self._folder, follow_symlinks=False)
        with self._destination._parent(entry.path, made) as (folder, last):
            new = True
            with contextlib.suppress(FileNotFoundError):
                os.stat(last, dir_fd=folder, follow_symlinks=False)
                new = False
            os.rename(name, last, src_dir_fd=self._folder, dst_dir_fd=folder)
            if new:
                placed.append(entry.path)

    def _finish_directory(self, entry: Entry, preserve: Sequence[str]) -> None:
        """Last of all: its files would change its time, and its mode may forbid them."""
        with self._destination._parent(entry.path) as (folder, last):
            if folder is None or not last:
                return
            descriptor = os.open(last, _FOLDER, dir_fd=folder)
            try:
                _keep(descriptor, entry, preserve)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _undo(self, made: List[bytes], placed: List[str]) -> None:
        for path in reversed(placed):
            with contextlib.suppress(OSError, Blocked), self._destination._parent(path) as (folder, last):
                if folder is not None:
                    os.unlink(last, dir_fd=folder)
        for steps in reversed(made):
            path = "/" + os.fsdecode(steps)
            with contextlib.suppress(OSError, Blocked), self._destination._parent(path) as (folder, last):
                if folder is not None:
                    os.rmdir(last, dir_fd=folder)


def _keep(descriptor: int, entry: Entry, preserve: Sequence[str]) -> None:
    """Give an open file or directory what is kept of the guest's. The owner first: changing it clears bits."""
    if OWNER in preserve and entry.uid is not None and entry.gid is not None:
        os.fchown(descriptor, entry.uid, entry.gid)
    if MODE in preserve and entry.mode is not None:
        mode = entry.mode if SPECIAL in preserve else entry.mode & ~_SPECIAL_BITS
        os.fchmod(descriptor, mode)
    if TIMES in preserve:
        os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy: Dict[int, str] = {
            errno.ENOSPC: "Free some space, or choose another folder",
            errno.EXDEV: "Name the file system below the folder as 'dest' itself: files are put in place by renaming",
            errno.EPERM: "Only root may give files away: leave 'owner' out of 'preserve'",
        }
        raise DataPathError(
            "The files could not be written, and those that were new are removed again",
            subject=path,
            reason=error.strerror,
            remedy=remedy.get(error.errno or 0),
        ) from None
