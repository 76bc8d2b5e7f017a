# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The small interface through which files come out of an image, and the readers by dissect and by libguestfs.

The disks come from a guest that nobody vouches for. So a process of its own reads them (:mod:`.agent`,
:mod:`.appliance`), and what it says is checked here before anything is made of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, Dict, Generator, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from ... import errors
from ...datapath.processes import Child
from ...errors import DataPathError, VadpError
from ...transport.vddk import private_folder
from ..boot.accelerator import AUTO, TCG, Probe
from . import agent, appliance
from .filesystem import DIRECTORY, FILE, LINK, Piece
from .frames import DATA, HOLE, JSON, Ended, FrameReader, Silent, widen
from .names import bad_name, encoded

KINDS = (FILE, DIRECTORY, LINK)
_LARGEST = 1 << 63
_TARGET_BYTES = 4095

OnSkipped = Callable[[int, str, str], None]

# sys.path is that of the module, which runs out of an archive.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from {} import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
# An appliance that has to be built first, and boots without KVM, takes minutes.
_START_SECONDS = 600.0


@dataclass(frozen=True)
class Entry:
    """A file of a disk.

    :param volume: index into :attr:`FileReader.volumes`.
    :param path: from the volume's root, beginning with ``/``; see :mod:`.names`.
    :param handle: the reader's own.
    """

    volume: int
    path: str
    kind: str
    size: int
    mtime_ns: int
    mode: Optional[int] = None
    uid: Optional[int] = None
    gid: Optional[int] = None
    target: Optional[str] = None
    handle: Any = None


@dataclass(frozen=True)
class DiskSource:
    """A disk at a restore point.

    :param layers: as :class:`.disk.CheckedDisk` takes them.
    """

    key: int
    label: str
    capacity_bytes: int
    layers: List[Dict[str, str]]


class Unread(VadpError):
    """One file can't be read; the others can."""

    #: Whether libguestfs may read it.
    askable = False


class TooMany(DataPathError):
    """More files are selected than the limit allows."""


class FileReader(ABC):
    """What reads files. A context manager: entering finds the volumes.

    ``volumes`` are dictionaries: {name, disk, size, type, label, uuid, readable, problem, clean, warnings,
    only_by_name, reader, reader_reason}.

    :param reason: why this reader was chosen, for ``reader_reason``.
    """

    name = ""

    def __init__(
        self,
        disks: Sequence[DiskSource],
        run_dir: str,
        io_timeout: float,
        deadline: Optional[float],
        reason: Optional[str] = None,
    ) -> None:
        self.reason = reason
        self.disks = list(disks)
        self.run_dir = run_dir
        self.io_timeout = io_timeout
        self.deadline = deadline
        self.volumes: List[Dict[str, Any]] = []
        #: Volume and path of what was skipped, and libguestfs may read.
        self.askable: Set[Tuple[int, str]] = set()
        #: The numbers of those that are not known to be clean, and that libguestfs brings in order.
        self.replayable: List[int] = []
        #: Which patterns of the last walk selected something, by their numbers.
        self.matched: Set[int] = set()

    @staticmethod
    def missing() -> List[str]:
        """What must be installed for it; empty if it can be used."""
        return []

    @abstractmethod
    def __enter__(self) -> FileReader: ...

    @abstractmethod
    def __exit__(self, *exc_info: Any) -> None: ...

    @abstractmethod
    def walk(
        self, volumes: Sequence[int], patterns: Sequence[str], recurse: bool, limit: int, on_skipped: OnSkipped
    ) -> Iterator[Entry]:
        """The files that patterns select; a directory comes before what is in it.

        :param recurse: what is selected is selected with all that is below it.
        :param limit: more files than that are an error.
        :param on_skipped: gets volume, path and reason of what can't be had.
        :raises DataPathError: it takes too long. TooMany: it says so. DamagedError: the restore point is damaged.
        """

    @abstractmethod
    def read(self, entry: Entry) -> Generator[Piece, None, None]:
        """What a file of the last walk holds: bytes, or the length of a hole.

        :raises Unread: this file can't be read. Otherwise as :meth:`walk`.
        """


class _AgentReader(FileReader):
    """By a process of its own, which serves as :mod:`.agent` says."""

    _module = ""
    # It holds nothing that has to be put in order; its servers die with it.
    _end_seconds = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._child: Optional[Child] = None
        self._descriptors: List[int] = []
        self._silence = self.io_timeout

    def _environment(self) -> Mapping[str, str]:
        """Variables for the process."""
        return {}

    def _open(self, **request: Any) -> None:
        """Find the volumes."""
        self._ask(op="open", disks=[vars(disk) for disk in self.disks], run_dir=self.run_dir, **request)
        told = self._answer("volumes")["volumes"]
        self.volumes = [self._checked_volume(volume) for volume in told]
        self.replayable = [number for number, volume in enumerate(told) if volume.get("replayable") is True]

    def __enter__(self) -> FileReader:
        request_end, self._requests = os.pipe()
        self._frames, frame_end = os.pipe()
        self._descriptors = [self._requests, self._frames]
        try:
            widen(self._frames)
            program = _PROGRAM.format(self._module)
            self._child = Child.start(
                [sys.executable, "-I", "-c", program, json.dumps(sys.path), str(request_end), str(frame_end)],
                log_path=os.path.join(self.run_dir, f"{self.name}.log"),
                name="the reader of file systems",
                pass_fds=(request_end, frame_end),
                env=self._environment(),
            )
        except BaseException:
            self._close()
            raise
        finally:
            os.close(request_end)
            os.close(frame_end)
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        if self._child is not None:
            self._child.wait(self._end_seconds)
            self._child.stop(timeout=0)

    def walk(
        self, volumes: Sequence[int], patterns: Sequence[str], recurse: bool, limit: int, on_skipped: OnSkipped
    ) -> Iterator[Entry]:
        self._ask(op="walk", volumes=list(volumes), patterns=list(patterns), recurse=recurse, limit=limit)
        while True:
            document = self._document()
            if "file" in document:
                yield self._checked_entry(document["file"])
            elif "skipped" in document:
                skipped = document["skipped"]
                place = (self._volume(skipped), str(skipped.get("path")))
                if skipped.get("askable") is True:
                    self.askable.add(place)
                on_skipped(*place, str(skipped.get("reason"))[:500])
            elif "end" in document:
                if document.get("limit"):
                    raise TooMany(
                        "Too many files are selected",
                        subject=", ".join(patterns),
                        reason=str(document["limit"]),
                        remedy="Name fewer paths, or raise 'limit'",
                    )
                self.matched = {number for number in document.get("matched", []) if isinstance(number, int)}
                return

    def read(self, entry: Entry) -> Generator[Piece, None, None]:
        self._ask(op="read", id=entry.handle)
        left = entry.size
        over = False
        try:
            while True:
                kind, content = self._frame()
                if kind == JSON:
                    over = True
                    if "problem" in content:
                        raise unread(entry, str(content["problem"])[:500], content.get("askable") is True)
                    if "end" in content and not left:
                        return
                    raise self._nonsense()
                left -= content if kind == HOLE else len(content)
                if left < 0 or kind not in (HOLE, DATA):
                    raise self._nonsense()
                yield content
        except GeneratorExit:
            # Whoever wanted no more of it: the rest has to be heard before the next request.
            while not over:
                over = self._frame()[0] == JSON
            raise

    # The other side

    def _ask(self, **request: Any) -> None:
        data = json.dumps(request).encode("ascii") + b"\n"
        try:
            while data:
                data = data[os.write(self._requests, data) :]
        except BrokenPipeError:
            raise self._failure("it ended") from None

    def _answer(self, key: str) -> Dict[str, Any]:
        document = self._document()
        while "alive" in document:
            document = self._document()
        if key not in document:
            raise self._nonsense()
        return document

    def _document(self) -> Dict[str, Any]:
        kind, content = self._frame()
        if kind != JSON:
            raise self._nonsense()
        document: Dict[str, Any] = content
        return document

    def _frame(self) -> Tuple[bytes, Any]:
        try:
            kind, content = FrameReader(self._frames, self._silence, self.deadline).next()
        except Silent:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise DataPathError(
                    "The files were not read in time",
                    reason="the time that 'timeout' allows is over",
                    remedy="Name fewer paths, or raise 'timeout'",
                ) from None
            raise self._failure(
                f"it said nothing for {self._silence:g} s", "The file system may be damaged; see 'io_timeout'"
            ) from None
        except Ended as error:
            raise self._failure(str(error)) from None
        if kind == JSON and "error" in content:
            raise _as_error(content["error"])
        return kind, content

    def _failure(self, reason: str, remedy: Optional[str] = None) -> DataPathError:
        last = ""
        if self._child is not None:
            self._child.stop(timeout=0)
            last = self._child.log_tail(3)
        return DataPathError(
            "The file systems can't be read",
            subject=", ".join(f"disk {disk.key} ('{disk.label}')" for disk in self.disks),
            reason=f"{reason}: {last}" if last else reason,
            remedy=remedy,
        )

    def _nonsense(self) -> DataPathError:
        return self._failure("the reader said what makes no sense")

    def _volume(self, document: Dict[str, Any]) -> int:
        number = document.get("volume")
        if not isinstance(number, int) or not 0 <= number < len(self.volumes):
            raise self._nonsense()
        return number

    def _checked_volume(self, document: Dict[str, Any]) -> Dict[str, Any]:
        """A volume as results tell it; a label may be anything."""
        readable = document.get("readable") is True
        return {
            "name": str(document["name"]),
            "disk": int(document["disk"]),
            "size": int(document["size"]),
            "type": str(document["type"]),
            "label": _text(document.get("label")),
            "uuid": _text(document.get("uuid")),
            "readable": readable,
            "problem": _text(document.get("problem")),
            "clean": document.get("clean") is True if readable else None,
            "warnings": [str(_text(warning)) for warning in document.get("warnings", [])],
            "only_by_name": document.get("only_by_name") is True,
            "reader": self.name if readable else None,
            "reader_reason": self.reason if readable else None,
        }

    def _checked_entry(self, document: Dict[str, Any]) -> Entry:
        path, kind = document.get("path"), document.get("kind")
        numbers = [document.get(name) for name in ("size", "mtime_ns")]
        if not isinstance(path, str) or kind not in KINDS or not all(isinstance(number, int) for number in numbers):
            raise self._nonsense()
        if path != "/":
            steps = path.split("/")
            if steps[0] or any(bad_name(step, path) for step in steps[1:]):
                raise self._nonsense()
        size, mtime_ns = int(document["size"]), int(document["mtime_ns"])
        target = document.get("target")
        if kind == LINK and (not isinstance(target, str) or not 0 < len(encoded(target)) <= _TARGET_BYTES):
            target = None
        if not 0 <= size < _LARGEST or (kind == FILE and not isinstance(document.get("id"), int)):
            raise self._nonsense()
        return Entry(
            volume=self._volume(document),
            path=path,
            kind=str(kind),
            size=size if kind == FILE else 0,
            mtime_ns=mtime_ns,
            mode=_count(document.get("mode"), 0o7777),
            uid=_count(document.get("uid"), (1 << 32) - 2),
            gid=_count(document.get("gid"), (1 << 32) - 2),
            target=target,
            handle=document.get("id"),
        )


class DissectReader(_AgentReader):
    """In pure Python; without a mount, root or a virtual machine. For btrfs it needs dissect's library."""

    name = "dissect"
    _module = agent.__name__

    @staticmethod
    def missing() -> List[str]:
        return []


class GuestfishReader(_AgentReader):
    """By libguestfs, which is what guestfish stands on: a small virtual machine mounts the disks, without root.

    Nothing compares what it reads with the hashes of the backup.

    :param skip: names of volumes that are not wanted.
    :param on_unchecked: called before anything is read.
    """

    name = "guestfish"
    _module = appliance.__name__
    _end_seconds = 10.0

    def __init__(self, *args: Any, on_unchecked: Callable[[], None], skip: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_unchecked = on_unchecked
        self._skip = list(skip)

    @staticmethod
    def missing() -> List[str]:
        return appliance.missing()

    def __enter__(self) -> FileReader:
        self._on_unchecked()
        return super().__enter__()

    def _close(self) -> None:
        super()._close()
        appliance.remove_sockets(self.run_dir)

    def _environment(self) -> Mapping[str, str]:
        # The direct backend: the virtual machine is the process' own, and dies with it.
        variables = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_TMPDIR": self.run_dir, "XDG_RUNTIME_DIR": self.run_dir}
        cache = f"/var/tmp/.guestfs-{os.geteuid()}"
        if os.path.lexists(cache) and os.lstat(cache).st_uid != os.geteuid():
            # libguestfs refuses a folder that another user was first to make.
            variables["LIBGUESTFS_CACHEDIR"] = str(private_folder("openvadp-guestfs", "libguestfs' folder"))
        program = shutil.which("qemu-system-x86_64")
        if program is not None:
            probe = Probe(AUTO, program, self.run_dir)
            try:
                probe.start()
                if probe.result()[0] == TCG:
                    variables["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
            finally:
                probe.stop()
        return variables

    def _open(self, **request: Any) -> None:
        self._silence = max(self.io_timeout, _START_SECONDS)
        super()._open(skip=self._skip, **request)
        self._silence = self.io_timeout


def unread(entry: Entry, reason: str, askable: bool = False) -> Unread:
    """That a file can't be read."""
    error = Unread("A file can't be read", subject=entry.path, reason=reason)
    error.askable = askable
    return error


def _count(value: Any, most: int) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None


def _text(value: Any) -> Optional[str]:
    if value is None:
        return None
    return encoded(str(value)).decode("utf-8", "replace")[:500]


def _as_error(document: Dict[str, Any]) -> VadpError:
    kind = getattr(errors, str(document.get("kind")), DataPathError)
    if not (isinstance(kind, type) and issubclass(kind, VadpError)):
        kind = DataPathError
    fields: Dict[str, Any] = {
        name: document.get(name) for name in ("what", "subject", "reason", "remedy", "retryable", "details")
    }
    error: VadpError = kind(**fields)
    return error
