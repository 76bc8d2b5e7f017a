# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What each file system here has in common.

What a file holds is told as pieces: bytes, or the length of a hole. Everything comes from a disk that nobody vouches
for: any of :func:`broken` may be raised anywhere.

Each has a list of what it is known to read right: features, flags, kinds of extents, of entries and of attributes. What
is not on it is :class:`Unreadable`, with its name. A hole is one only where the file system says so.

Each also proves that it is clean: that all of it lies in its place, and nothing waits in a log or for a check. What is
not proved is said, see :attr:`FileSystem.unclean`.
"""

from __future__ import annotations

import stat
import struct
import zlib
from abc import ABC, abstractmethod
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type, Union

from . import parsers

_BROKEN: Tuple[Type[BaseException], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

Piece = Union[bytes, int]
#: (block of the volume or None for a hole, number of blocks)
Run = Tuple[Optional[int], int]

CHUNK_BYTES = 1 << 20
MOST_RUNS = 4 << 20
_ZERO_BYTES = 65536

FILE, DIRECTORY, LINK, OTHER = "file", "directory", "link", "other"
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}
_OTHERS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
#: Of what is not known to be clean.
NOT_KNOWN = "it is not known whether all of it lies in its place"


def broken() -> Tuple[Type[BaseException], ...]:
    """What parsers raise over bytes that make no sense: those that are in use by now."""
    return _BROKEN + parsers.errors()


class Info(NamedTuple):
    """What a file system says of a file. ``inode`` is the same for the same directory, and for no other."""

    kind: str
    size: int
    mtime_ns: int
    mode: Optional[int] = None
    uid: Optional[int] = None
    gid: Optional[int] = None
    inode: Any = None
    what: str = ""


class Unreadable(ValueError):
    """What this reader can't read as it is, and why."""


class Beyond(Unreadable):
    """What this reader can't read as it is, and libguestfs is known to read right."""


class FileSystem(ABC):
    """A file system; a *node* is whatever it takes for a file or directory."""

    name = ""
    ignores_case = False
    #: Whether Linux brings it in order when it mounts it, as libguestfs does on an overlay.
    linux_replays = False
    #: Whether Linux is what defines it: whatever Linux shows there is what the guest saw.
    of_linux = False

    def __init__(self, volume: BinaryIO, size: int) -> None:
        self.volume = volume
        self.size = size
        self.label: Optional[str] = None
        self.uuid: Optional[str] = None
        self.warnings: List[str] = []
        #: Why it is not known to be clean; None if it is.
        self.unclean: Optional[str] = NOT_KNOWN

    def mind(self) -> List[str]:
        """What to mind about its files."""
        if self.unclean is None:
            return list(self.warnings)
        return [unclean_warning(self.unclean, self.linux_replays), *self.warnings]

    @staticmethod
    def begins(volume: BinaryIO) -> Optional[str]:
        """The type, if a volume begins as this file system does; None also for one that is not recognised so."""
        return None

    @abstractmethod
    def root(self) -> Any:
        """The node of the root directory."""

    def others(self) -> Dict[str, FileSystem]:
        """What of it can't be reached from its root: by name, each with a root of its own."""
        return {}

    @abstractmethod
    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        """Names and nodes of a directory. A name may be anything; what is no Unicode stands in it as surrogates.

        :raises: any of broken(): not all of its entries were told.
        """

    @abstractmethod
    def info(self, node: Any) -> Info:
        """Facts of a node."""

    def link(self, node: Any) -> str:
        """Where a symbolic link points to."""
        raise Unreadable(f"{type(self).__name__} has no symbolic links")

    @abstractmethod
    def read(self, node: Any) -> Iterator[Piece]:
        """What a file holds."""

    # For those below

    def _require_room(self, size: int) -> None:
        """:raises Unreadable: the file system says that it is larger than what it lies on."""
        if size > self.size:
            raise Unreadable(
                f"it has {size} bytes, {self.size} are here: the rest lies on another partition, disk or volume"
            )

    def _bytes(self, offset: int, length: int) -> bytes:
        """So many bytes of the volume. :raises EOFError: they lie outside."""
        if offset < 0 or offset + length > self.size:
            raise EOFError("the volume ends before its file system does")
        data = bytes_at(self.volume, offset, length)
        if len(data) != length:
            raise EOFError("the volume ends before its file system does")
        return data

    def _by_runs(self, runs: List[Run], size: int, block_bytes: int, base: int = 0) -> Iterator[Piece]:
        """The pieces of a file of *size* bytes in *runs* of blocks, which begin at *base*; behind them is a hole."""
        left = size
        for block, count in runs:
            length = min(count * block_bytes, left)
            if length < 0:
                raise ValueError("the extents overlap")
            left -= length
            if block is None:
                if length:
                    yield length
                continue
            position = base + block * block_bytes
            if block < 0 or position + length > self.size:
                raise ValueError("an extent lies outside the volume")
            while length:
                step = min(length, CHUNK_BYTES - position % CHUNK_BYTES)
                yield self._bytes(position, step)
                position += step
                length -= step
            if not left:
                return
        if left:
            yield left


def require_known(value: int, known: int, names: Dict[int, str], what: str) -> None:
    """:raises Unreadable: a bit is set that is not one of *known*."""
    strange = value & ~known
    if strange:
        bits = [1 << number for number in range(strange.bit_length()) if strange >> number & 1]
        told = ", ".join(names.get(bit, f"{bit:#x}") for bit in bits)
        raise Unreadable(f"it has {what} that this reader does not know: {told}")


def linux_reads(system: FileSystem, error: BaseException) -> bool:
    """Whether libguestfs is known to read right what this reader failed on, or to refuse it.

    Of what is refused by its name only that which is on the list: without a key, a device or a filter of Windows,
    libguestfs may show other bytes. What this reader does not understand of Linux' own file systems, Linux does.
    """
    return isinstance(error, Beyond) or (system.of_linux and not isinstance(error, Unreadable))


def unclean_warning(reason: str, linux_replays: bool) -> str:
    """Of a file system that is not known to be clean."""
    more = "; libguestfs brings it in order, where it is installed and one point is read" if linux_replays else ""
    return (
        f"{reason}. So the newest changes may be missing, and files that had just changed or gone may hold other"
        f" bytes{more}"
    )


def stream_pieces(stream: BinaryIO, size: int) -> Iterator[Piece]:
    """The pieces of what a parser hands out as a stream; zeros become holes."""
    left = size
    while left:
        data = stream.read(min(left, CHUNK_BYTES))
        if not data:
            raise EOFError(f"{left} bytes are missing at its end")
        left -= len(data)
        yield from holes_of(data)


def holes_of(data: bytes) -> Iterator[Piece]:
    """Data as pieces; large parts that are zeros become holes."""
    if data.count(0) == len(data):
        yield len(data)
    elif data.find(bytes(_ZERO_BYTES)) < 0:
        yield data
    else:
        for start in range(0, len(data), _ZERO_BYTES):
            part = data[start : start + _ZERO_BYTES]
            yield len(part) if part.count(0) == len(part) else part


def merged(parts: Iterator[Run]) -> List[Run]:
    """Runs of blocks, of which those that belong together are one."""
    runs: List[Run] = []
    start: Optional[int] = None
    count = 0
    for block, more in parts:
        if count and (block == start if start is None or block is None else block == start + count):
            count += more
            continue
        if count:
            runs.append((start, count))
            if len(runs) > MOST_RUNS:
                raise Beyond("it has too many extents")
        start, count = block, more
    if count:
        runs.append((start, count))
    return runs


def kind_of(mode: int) -> Tuple[str, str]:
    """Kind of a file by its mode, and in words what is none of those that can be had."""
    form = stat.S_IFMT(mode)
    return _KINDS.get(form, OTHER), _OTHERS.get(form, "of no known type")


def bytes_at(volume: BinaryIO, offset: int, length: int) -> bytes:
    """Bytes of a volume; fewer where it ends before."""
    volume.seek(offset)
    return volume.read(length)
