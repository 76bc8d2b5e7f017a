# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""NTFS. It has no owners and modes that mean anything here; alternate streams are left out."""

from __future__ import annotations

import contextlib
import struct
from functools import lru_cache
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Set, Tuple

from .filesystem import (
    DIRECTORY,
    FILE,
    LINK,
    MOST_RUNS,
    OTHER,
    Beyond,
    FileSystem,
    Info,
    Piece,
    Run,
    Unreadable,
    broken,
    bytes_at,
    holes_of,
    require_known,
)

_MFT, _LOG_FILE, _VOLUME, _ROOT, _FIRST_OF_USERS = 0, 2, 3, 5, 24
_STANDARD, _LIST, _VOLUME_NAME, _VOLUME_INFORMATION = 0x10, 0x20, 0x60, 0x70
_DATA, _INDEX_ROOT, _INDEX_ALLOCATION, _REPARSE, _END = 0x80, 0x90, 0xA0, 0xC0, 0xFFFFFFFF
_VERSIONS = ((1, 2), (3, 0), (3, 1))
_IN_USE, _IS_DIRECTORY = 0x1, 0x2
_INDEX_NAME = "$I30"
_FILE_NAMES = 0x30
_DOS_NAME = 2
_HAS_NODE, _IS_END = 0x1, 0x2
_MOST_DEPTH = 32
_MOST_ATTRIBUTES = 65536
_USERS_EPOCH = 116444736000000000

# The two pages of the log that say where it begins lie there. Tools that make file systems fill it with ones.
_LOG_BEGIN = 2 * 65536
_LOG_VERSIONS = (1, 2)
_LOG_IS_CLEAN, _NO_CLIENT = 0x2, 0xFFFF

# Flags of attributes.
_LZNT1, _ENCRYPTED, _SPARSE = 0x0001, 0x4000, 0x8000
_UNIT = 4
_LZNT1_BYTES = 4096

# Of a file: read-only, hidden, system, archive, device, normal, temporary, sparse, reparse, compressed, not indexed,
# encrypted, integrity, no scrub, pinned, unpinned, and two that the file system keeps for itself.
_FILE_FLAGS = 0x0007 | 0x0020 | 0x0040 | 0x0080 | 0x0100 | 0x0200 | 0x0400 | 0x0800 | 0x2000 | 0x4000 | 0x8000
_FILE_FLAGS |= 0x20000 | 0x80000 | 0x100000 | 0x30000000
_ELSEWHERE = "its data lie elsewhere"
_FILE_FLAG_NAMES = {
    0x1000: "offline",
    0x10000: "virtual",
    0x40000: "recall on open",
    0x400000: "recall on data access",
}

_SYMLINK, _MOUNT_POINT, _LX_SYMLINK = 0xA000000C, 0xA0000003, 0xA000001D
_SPECIAL = {
    0x80000023: "a socket",
    0x80000024: "a named pipe",
    0x80000025: "a character device",
    0x80000026: "a block device",
}
_TAGS = {
    0xC0000004: "hierarchical storage (HSM)",
    0x80000006: "hierarchical storage (HSM2)",
    0x80000007: "single instance storage (SIS)",
    0x80000008: "WIM image",
    0x80000009: "cluster shared volume",
    0x8000000A: "DFS",
    0x80000012: "DFS replication",
    0x80000013: "deduplication",
    0x80000014: "NFS",
    0x80000015: "file placeholder",
    0x80000017: "system compression (WOF)",
    0x80000018: "Windows container",
    0x90001018: "Windows container",
    0x8000001B: "application link",
    0x9000001C: "projected file system",
    0x8000001E: "Azure File Sync",
    0x80000021: "OneDrive",
    0xC0000016: "DFM",
    0xC0000014: "application exclusion",
}


class _Attribute(NamedTuple):
    """An attribute, or the part of one that lies in one record. ``value`` is that of a resident one."""

    kind: int
    name: str
    flags: int
    number: int
    value: Optional[bytes]
    lowest: int = 0
    highest: int = -1
    unit: int = 0
    allocated: int = 0
    size: int = 0
    valid: int = 0
    runs: Tuple[Run, ...] = ()


class _Content(NamedTuple):
    """What an attribute holds."""

    flags: int
    value: Optional[bytes]
    size: int
    valid: int
    unit: int
    runs: List[Run]


class _Record(NamedTuple):
    number: int
    sequence: int
    flags: int
    links: int
    attributes: List[_Attribute]


class _Node(NamedTuple):
    """What an entry of a directory refers to."""

    number: int
    sequence: Optional[int]


class Ntfs(FileSystem):
    """NTFS."""

    name = "ntfs"
    ignores_case = True

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        boot = self._bytes(0, 512)
        sector, per_cluster = struct.unpack_from("<HB", boot, 11)
        # Large ones are told by a power of two.
        per_cluster = per_cluster if per_cluster <= 0x80 else 1 << (256 - per_cluster)
        sectors, mft = struct.unpack_from("<QQ", boot, 40)
        (per_record,) = struct.unpack_from("<b", boot, 64)
        self.cluster_size = sector * per_cluster
        sane = (
            sector in (256, 512, 1024, 2048, 4096)
            and 256 <= self.cluster_size <= 2 << 20
            and self.cluster_size & (self.cluster_size - 1) == 0
            and per_record
            and per_record >= -16
        )
        if not sane:
            raise Unreadable("its first sector makes no sense")
        self._record_bytes = 1 << -per_record if per_record < 0 else per_record * self.cluster_size
        if self._record_bytes not in (512, 1024, 2048, 4096):
            raise Unreadable(f"its records have {self._record_bytes} bytes")
        self._require_room(sectors * sector)
        self._clusters = -(-self.size // self.cluster_size)
        self.uuid = f"{struct.unpack_from('<Q', boot, 72)[0]:016x}"
        # Its own record says where the others are.
        self._mft: List[Run] = [(mft, max(1, -(-self._record_bytes // self.cluster_size)))]
        self._cached_record_of = lru_cache(4096)(self._record_of)
        self._open_mft()
        self._check_volume()

    @staticmethod
    def begins(volume: BinaryIO) -> Optional[str]:
        return "ntfs" if bytes_at(volume, 3, 8) == b"NTFS    " else None

    def _open_mft(self) -> None:
        own = self._raw_record(_MFT)
        parts = [one for one in own.attributes if (one.kind, one.name) == (_DATA, "")]
        if not parts or parts[0].lowest:
            raise ValueError("its table of files is damaged")
        self._mft = list(parts[0].runs)
        listed = [one for one in own.attributes if one.kind == _LIST]
        if listed:
            # The parts of the table are told by records that lie in those that are known already.
            for kind, name, lowest, number, identity in self._listed(self._whole(listed)):
                if (kind, name) == (_DATA, "") and lowest:
                    record = self._raw_record(number)
                    part = self._find(record, kind, name, identity)
                    if part.lowest != sum(count for dummy, count in self._mft):
                        raise ValueError("its table of files is damaged")
                    self._mft += part.runs
        self._mft_records = parts[0].size // self._record_bytes

    def _check_volume(self) -> None:
        record = self._cached_record_of(_VOLUME)
        information = self._resident(record, _VOLUME_INFORMATION)
        version = (information[8], information[9])
        if version not in _VERSIONS:
            raise Unreadable(f"it is of version {version[0]}.{version[1]}")
        with contextlib.suppress(*broken()):
            self.label = self._resident(record, _VOLUME_NAME).decode("utf-16-le") or None
        self.unclean = self._state_of_log()
        if self.unclean is None and struct.unpack_from("<H", information, 10)[0] & 1:
            self.unclean = "it is marked as damaged: the guest would check it first"

    def _state_of_log(self) -> Optional[str]:
        """Why it is not known that nothing waits in its log; Windows alone replays that."""
        try:
            content = self._content(self._cached_record_of(_LOG_FILE), _DATA)
            if content is None or content.value is not None:
                return "its log makes no sense"
            length = min(content.valid, _LOG_BEGIN)
            pieces = self._by_runs(content.runs, length, self.cluster_size)
            return _state_of(b"".join(piece if isinstance(piece, bytes) else bytes(piece) for piece in pieces))
        except broken() as error:
            return f"its log can't be read ({error})"

    # Records

    def _raw_record(self, number: int) -> _Record:
        position, data = number * self._record_bytes, b""
        while len(data) < self._record_bytes:
            cluster, inside = divmod(position + len(data), self.cluster_size)
            step = min(self._record_bytes - len(data), self.cluster_size - inside)
            data += self._bytes(self._cluster_of(cluster) * self.cluster_size + inside, step)
        data = _mended(data, b"FILE")
        updates, _count = struct.unpack_from("<HH", data, 4)
        sequence, links, first, flags, used = struct.unpack_from("<HHHHI", data, 16)
        if updates >= 48 and struct.unpack_from("<I", data, 44)[0] != number & 0xFFFFFFFF:
            raise ValueError("its record is another one's")
        if not flags & _IN_USE:
            raise ValueError("its record is not in use")
        return _Record(number, sequence, flags, links, list(self._attributes(data[:used], first)))

    def _cluster_of(self, cluster: int) -> int:
        """Where a cluster of the table of files lies."""
        at = 0
        for start, count in self._mft:
            if at <= cluster < at + count and start is not None:
                return start + cluster - at
            at += count
        raise ValueError("there is no such record")

    def _attributes(self, data: bytes, position: int) -> Iterator[_Attribute]:
        while True:
            (kind,) = struct.unpack_from("<I", data, position)
            if kind == _END:
                return
            length, elsewhere, name_length, name_at, flags, number = struct.unpack_from("<IBBHHH", data, position + 4)
            part = data[position : position + length]
            if length < 24 or len(part) != length or elsewhere > 1:
                raise ValueError("its attributes are damaged")
            name = part[name_at : name_at + 2 * name_length].decode("utf-16-le", "surrogatepass")
            if elsewhere:
                lowest, highest, pairs, unit = struct.unpack_from("<QQHB", part, 16)
                allocated, size, valid = struct.unpack_from("<QQQ", part, 40)
                runs = tuple(self._decoded_runs(part, pairs))
                if sum(count for dummy, count in runs) != (highest + 1 & 0xFFFFFFFFFFFFFFFF) - lowest:
                    raise ValueError("its extents are damaged")
                yield _Attribute(kind, name, flags, number, None, lowest, highest, unit, allocated, size, valid, runs)
            else:
                size, begin = struct.unpack_from("<IH", part, 16)
                value = part[begin : begin + size]
                if len(value) != size:
                    raise ValueError("its attributes are damaged")
                yield _Attribute(kind, name, flags, number, value, size=size, valid=size)
            position += length

    def _decoded_runs(self, part: bytes, position: int) -> Iterator[Run]:
        start = 0
        while part[position]:
            count_bytes, start_bytes = part[position] & 0xF, part[position] >> 4
            position += 1
            end = position + count_bytes + start_bytes
            if not 1 <= count_bytes <= 8 or start_bytes > 8 or end >= len(part):
                raise ValueError("its extents are damaged")
            count = int.from_bytes(part[position : position + count_bytes], "little")
            if not 0 < count < 1 << 56:
                raise ValueError("its extents are damaged")
            if not start_bytes:
                yield None, count
            else:
                start += int.from_bytes(part[position + count_bytes : end], "little", signed=True)
                if start < 0 or start + count > self._clusters:
                    raise ValueError("an extent lies outside the volume")
                yield start, count
            position = end

    def _record_of(self, number: int) -> _Record:
        """A file's record, with those of its attributes that lie in others."""
        if not 0 <= number < self._mft_records:
            raise ValueError("there is no such record")
        own = self._raw_record(number)
        listed = [one for one in own.attributes if one.kind == _LIST]
        if not listed:
            return own
        attributes = []
        records = {number: own}
        for kind, name, lowest, other, identity in self._listed(self._whole(listed)):
            if other not in records:
                records[other] = self._raw_record(other)
            found = self._find(records[other], kind, name, identity)
            if found.lowest != lowest:
                raise ValueError("its attributes are damaged")
            attributes.append(found)
        return own._replace(attributes=attributes)

    @staticmethod
    def _listed(data: bytes) -> Iterator[Tuple[int, str, int, int, int]]:
        """(type, name, first cluster, number of the record, number of the attribute) of a list of attributes."""
        position = 0
        for _number in range(_MOST_ATTRIBUTES):
            if position >= len(data):
                return
            kind, length, name_length, name_at, lowest = struct.unpack_from("<IHBBQ", data, position)
            low, high = struct.unpack_from("<IH", data, position + 16)
            (identity,) = struct.unpack_from("<H", data, position + 24)
            if length < 26:
                raise ValueError("its attributes are damaged")
            name = data[position + name_at : position + name_at + 2 * name_length].decode("utf-16-le", "surrogatepass")
            yield kind, name, lowest, high << 32 | low, identity
            position += length
        raise ValueError("it has too many attributes")

    @staticmethod
    def _find(record: _Record, kind: int, name: str, identity: int) -> _Attribute:
        for one in record.attributes:
            if (one.kind, one.name, one.number) == (kind, name, identity):
                return one
        raise ValueError("a part of its attributes is missing")

    # Content of attributes

    def _content(self, record: _Record, kind: int, name: str = "") -> Optional[_Content]:
        parts = [one for one in record.attributes if (one.kind, one.name) == (kind, name)]
        return self._joined(parts) if parts else None

    def _joined(self, parts: List[_Attribute]) -> _Content:
        """An attribute of its parts, none of which may be missing."""
        parts = sorted(parts, key=lambda one: one.lowest)
        first = parts[0]
        if first.value is not None:
            if len(parts) > 1:
                raise ValueError("its attributes are damaged")
            return _Content(first.flags, first.value, first.size, first.size, 0, [])
        runs: List[Run] = []
        at = 0
        for part in parts:
            if part.value is not None or part.lowest != at:
                raise ValueError("a part of its extents is missing")
            runs += part.runs
            at += sum(count for dummy, count in part.runs)
            if len(runs) > MOST_RUNS:
                raise Beyond("it has too many extents")
        if at * self.cluster_size < first.size or first.valid > first.size:
            raise ValueError("a part of its extents is missing")
        if not first.flags & (_LZNT1 | _SPARSE) and any(start is None for start, dummy in runs):
            raise ValueError("its extents are damaged")
        return _Content(first.flags, None, first.size, first.valid, first.unit, runs)

    def _whole(self, parts: List[_Attribute]) -> bytes:
        """All of the bytes of a small attribute that is not compressed."""
        content = self._joined(parts)
        if content.value is not None:
            return content.value
        if content.flags or content.size > _MOST_ATTRIBUTES * 64:
            raise ValueError("its attributes are damaged")
        pieces = self._by_runs(content.runs, content.size, self.cluster_size)
        return b"".join(piece if isinstance(piece, bytes) else bytes(piece) for piece in pieces)

    @staticmethod
    def _resident(record: _Record, kind: int) -> bytes:
        for one in record.attributes:
            if one.kind == kind and one.value is not None:
                return one.value
        raise ValueError("an attribute is missing")

    # Files

    def _loaded(self, node: _Node) -> _Record:
        record = self._cached_record_of(node.number)
        if node.sequence not in (None, record.sequence):
            raise ValueError("its record is another one's")
        return record

    def root(self) -> Any:
        return _Node(_ROOT, None)

    def _tag(self, record: _Record) -> Tuple[int, bytes]:
        """Number and content of what says that a file is something else; 0 if nothing does."""
        parts = [one for one in record.attributes if one.kind == _REPARSE]
        if not parts:
            return 0, b""
        data = self._whole(parts)
        tag, length = struct.unpack_from("<IH", data)
        return tag, data[8 : 8 + length]

    def info(self, node: Any) -> Info:
        record = self._loaded(node)
        standard = self._resident(record, _STANDARD)
        (modified,) = struct.unpack_from("<q", standard, 8)
        mtime = (modified - _USERS_EPOCH) * 100
        tag, _data = self._tag(record)
        if tag in (_SYMLINK, _MOUNT_POINT, _LX_SYMLINK):
            return Info(LINK, 0, mtime, inode=record.number)
        if tag in _SPECIAL:
            return Info(OTHER, 0, mtime, inode=record.number, what=_SPECIAL[tag])
        if record.flags & _IS_DIRECTORY:
            return Info(DIRECTORY, 0, mtime, inode=record.number)
        if tag:
            raise Unreadable(f"{_ELSEWHERE}: {_told(tag)}")
        self._require_here(standard)
        content = self._content(record, _DATA)
        if content is None:
            raise ValueError("it has no data")
        return Info(FILE, content.size, mtime, inode=record.number)

    @staticmethod
    def _require_here(standard: bytes) -> None:
        (flags,) = struct.unpack_from("<I", standard, 32)
        try:
            require_known(flags, _FILE_FLAGS, _FILE_FLAG_NAMES, "attributes")
        except Unreadable as error:
            raise Unreadable(f"{error}; {_ELSEWHERE}, or may") from None

    def link(self, node: Any) -> str:
        tag, data = self._tag(self._loaded(node))
        if tag == _LX_SYMLINK:
            return data[4:].decode("utf-8", "surrogateescape")
        names = struct.unpack_from("<4H", data)
        begin = 12 if tag == _SYMLINK else 8
        for offset, length in (names[2:], names[:2]):
            target = data[begin + offset : begin + offset + length].decode("utf-16-le", "surrogatepass")
            if target:
                # A link to a path with a drive letter leads nowhere here; it stays readable.
                return target.replace("\\", "/")
        raise ValueError("its target makes no sense")

    def read(self, node: Any) -> Iterator[Piece]:
        record = self._loaded(node)
        # Whoever asks has its size, so it is a file.
        content = self._content(record, _DATA)
        if content is None:
            raise ValueError("it has no data")
        if content.flags & _ENCRYPTED:
            raise Unreadable("it is encrypted (EFS)")
        require_known(content.flags, _LZNT1 | _SPARSE, {}, "attributes of its data")
        if content.value is not None:
            yield content.value
            return
        # Behind the valid length a file reads as zeros, whatever its clusters hold.
        if content.flags & _LZNT1:
            yield from self._unpacked(content)
        else:
            yield from self._by_runs(content.runs, content.valid, self.cluster_size)
        if content.valid < content.size:
            yield content.size - content.valid

    def _unpacked(self, content: _Content) -> Iterator[Piece]:
        """A compressed file: so many clusters at a time, each compressed, as it is, or a hole."""
        if content.unit != _UNIT:
            raise Unreadable(f"it is compressed in units of 2^{content.unit} clusters")
        each = 1 << content.unit
        unit_bytes = each * self.cluster_size
        left = content.valid
        runs = list(reversed(content.runs))
        while left:
            wanted = each
            held: List[Run] = []
            hole = False
            while wanted and runs:
                start, count = runs.pop()
                step = min(count, wanted)
                if count > step:
                    runs.append((None if start is None else start + step, count - step))
                if start is None:
                    hole = True
                elif hole:
                    raise ValueError("its compressed extents are damaged")
                else:
                    held.append((start, step))
                wanted -= step
            length = min(unit_bytes, left)
            left -= length
            if not held:
                yield length
                continue
            clusters = sum(count for dummy, count in held)
            pieces = self._by_runs(held, clusters * self.cluster_size, self.cluster_size)
            data = b"".join(piece for piece in pieces if isinstance(piece, bytes))
            if hole:
                data = _unpacked_lznt1(data, unit_bytes)
            if len(data) < length:
                raise ValueError("its compressed extents are damaged")
            yield from holes_of(data[:length])

    # Directories

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        record = self._loaded(node)
        if not record.flags & _IS_DIRECTORY:
            raise ValueError("it is no directory")
        for key, number, sequence in self._index(record):
            if len(key) < 66 or len(key) < 66 + 2 * key[64]:
                raise ValueError("its entries are damaged")
            # Of a directory's own files only. The file system's are no user's, whatever their names.
            if key[65] == _DOS_NAME or (record.number == _ROOT and number < _FIRST_OF_USERS):
                continue
            yield key[66 : 66 + 2 * key[64]].decode("utf-16-le", "surrogatepass"), _Node(number, sequence)
        tag, _data = self._tag(record)
        if tag and tag not in (_SYMLINK, _MOUNT_POINT, _LX_SYMLINK):
            raise Unreadable(f"some of its entries may lie elsewhere: {_told(tag)}")

    def _index(self, record: _Record) -> Iterator[Tuple[bytes, int, int]]:
        """The entries of a directory: those of the tree that it is, and no block that the tree does not lead to."""
        root = self._content(record, _INDEX_ROOT, _INDEX_NAME)
        if root is None or root.value is None:
            raise ValueError("its index is missing")
        kind, _collation, block_bytes = struct.unpack_from("<III", root.value)
        if kind != _FILE_NAMES or not 512 <= block_bytes <= 1 << 20:
            raise ValueError("its index makes no sense")
        blocks = self._content(record, _INDEX_ALLOCATION, _INDEX_NAME)
        seen: Set[int] = set()
        stack = [_index_entries(root.value, 16)]
        while stack:
            try:
                key, number, sequence, below = next(stack[-1])
            except StopIteration:
                stack.pop()
                continue
            if key is not None:
                yield key, number, sequence
            if below is None:
                continue
            if blocks is None or below in seen or len(stack) > _MOST_DEPTH:
                raise ValueError("its index is damaged")
            seen.add(below)
            stack.append(self._index_block(blocks, below, block_bytes))

    def _index_block(self, blocks: _Content, number: int, block_bytes: int) -> Iterator[Any]:
        position = number * (self.cluster_size if self.cluster_size <= block_bytes else 512)
        if blocks.value is not None or blocks.flags & ~_SPARSE or position + block_bytes > blocks.valid:
            raise ValueError("its index is damaged")
        data = _mended(self._part(blocks.runs, position, block_bytes), b"INDX")
        if struct.unpack_from("<Q", data, 16)[0] != number:
            raise ValueError("a block of its index is another one's")
        return _index_entries(data, 24)

    def _part(self, runs: List[Run], position: int, length: int) -> bytes:
        data = b""
        at = 0
        for start, count in runs:
            begin, end = at * self.cluster_size, (at + count) * self.cluster_size
            if begin <= position < end and length:
                step = min(length, end - position)
                if start is None:
                    raise ValueError("its index is damaged")
                data += self._bytes(start * self.cluster_size + position - begin, step)
                position += step
                length -= step
            at += count
        if length:
            raise ValueError("its index is damaged")
        return data


def _state_of(log: bytes) -> Optional[str]:
    """Why a log, of which this is the begin, may hold what is not in its place."""
    if log and log.count(0xFF) == len(log):
        return None
    newest: Optional[Tuple[int, int, int]] = None
    page = 0
    for _number in range(2):
        if log[page : page + 4] != b"RSTR":
            break
        own, _log_page, area, _minor, major = struct.unpack_from("<IIHhh", log, page + 16)
        if own not in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) or major not in _LOG_VERSIONS:
            return "its log is of a version that this reader does not know"
        data = _mended(log[page : page + own], b"RSTR")
        lsn, _clients, _free, client, flags = struct.unpack_from("<QHHHH", data, area)
        newest = max(newest or (lsn, client, flags), (lsn, client, flags), key=lambda one: one[0])
        page += own
    if newest is None:
        return "its log makes no sense"
    _lsn, client, flags = newest
    if client == _NO_CLIENT or flags & _LOG_IS_CLEAN:
        return None
    return "its log was in use when the snapshot was made, and only Windows replays that"


def _told(tag: int) -> str:
    """A reparse tag in words."""
    if tag & 0xFFFF0FFF == 0x9000001A:
        return "cloud file"
    return _TAGS.get(tag, f"reparse tag {tag:#010x}")


def _mended(data: bytes, magic: bytes) -> bytes:
    """A record whose sectors each end with the same two bytes, with what belongs there."""
    if data[:4] != magic:
        raise ValueError(f"a record is damaged: it begins with {data[:4]!r}")
    begin, count = struct.unpack_from("<HH", data, 4)
    if count < 2 or begin % 2 or begin + 2 * count > len(data):
        raise ValueError("a record is damaged")
    stride = len(data) // (count - 1)
    if stride * (count - 1) != len(data) or stride < 512 and stride != 256:
        raise ValueError("a record is damaged")
    mended = bytearray(data)
    sample = data[begin : begin + 2]
    for number in range(1, count):
        end = number * stride
        if data[end - 2 : end] != sample:
            raise ValueError("a record was not written to its end")
        mended[end - 2 : end] = data[begin + 2 * number : begin + 2 * number + 2]
    return bytes(mended)


def _index_entries(data: bytes, header: int) -> Iterator[Tuple[Optional[bytes], int, int, Optional[int]]]:
    """(key or None at the end, number of the record, its sequence, block of entries that come before) of a node."""
    first, used = struct.unpack_from("<II", data, header)
    position, end = header + first, header + used
    while True:
        low, high, sequence, length, key_length, flags = struct.unpack_from("<IHHHHH", data, position)
        if length < 16 or length % 8 or position + length > min(end, len(data)) or key_length > length - 16:
            raise ValueError("its entries are damaged")
        below = None
        if flags & _HAS_NODE:
            (below,) = struct.unpack_from("<Q", data, position + length - 8)
        if flags & _IS_END:
            yield None, 0, 0, below
            return
        yield data[position + 16 : position + 16 + key_length], high << 32 | low, sequence, below
        position += length


def _unpacked_lznt1(data: bytes, most: int) -> bytes:
    """The bytes of a compressed unit, of which each 4096 are a piece of their own."""
    pieces: List[bytes] = []
    position = 0
    while position + 2 <= len(data) and len(pieces) * _LZNT1_BYTES < most:
        (header,) = struct.unpack_from("<H", data, position)
        if not header:
            break
        position += 2
        length = (header & 0xFFF) + 1
        piece = data[position : position + length]
        if len(piece) != length or header >> 12 & 7 != 3:
            raise ValueError("its compressed data are damaged")
        if header & 0x8000:
            piece = _unpacked_piece(piece)
        if len(piece) > _LZNT1_BYTES:
            raise ValueError("its compressed data are damaged")
        pieces.append(piece.ljust(_LZNT1_BYTES, b"\0"))
        position += length
    return b"".join(pieces).ljust(most, b"\0")


def _unpacked_piece(piece: bytes) -> bytes:
    found = bytearray()
    position = 0
    while position < len(piece):
        tags = piece[position]
        position += 1
        for bit in range(8):
            if position >= len(piece):
                break
            if not tags >> bit & 1:
                found.append(piece[position])
                position += 1
                continue
            (token,) = struct.unpack_from("<H", piece, position)
            position += 2
            # The further it is, the more bits say how far back.
            shift = 12 - max(0, (len(found) - 1).bit_length() - 4) if found else 12
            back, length = (token >> shift) + 1, (token & (1 << shift) - 1) + 3
            if back > len(found):
                raise ValueError("its compressed data are damaged")
            for _number in range(length):
                found.append(found[-back])
            if len(found) > _LZNT1_BYTES:
                raise ValueError("its compressed data are damaged")
    return bytes(found)
