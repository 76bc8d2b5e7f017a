# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""XFS, of versions 4 and 5."""

from __future__ import annotations

import stat
import struct
import uuid
from functools import lru_cache
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .filesystem import (
    MOST_RUNS,
    Beyond,
    FileSystem,
    Info,
    Piece,
    Run,
    Unreadable,
    bytes_at,
    kind_of,
    require_known,
)
from .xfs_log import pending

_MOREBITS = 0x8000
# Of version 4: attr, nlink, quota, align, dalign, logv2, sector, extflg, dirv2, ascii-ci and those of the second word.
_VERSION_4 = 0x000F | 0x0010 | 0x0020 | 0x0040 | 0x0080 | 0x0100 | 0x0400 | 0x0800 | 0x1000 | 0x2000 | 0x4000 | 0x8000
_DIRV2 = 0x2000
_VERSION_4_NAMES = {0x0200: "shared"}
# lazysbcount, attr2, parent, projid32bit, crc, ftype
_FEATURES2 = 0x2 | 0x8 | 0x80 | 0x100 | 0x200
_FTYPE2 = 0x200
# finobt, rmapbt, reflink, inobtcount
_READ_ONLY = 0xF
# ftype, spinodes, meta_uuid, bigtime, nrext64, exchrange, parent
_INCOMPATIBLE = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_INCOMPATIBLE_NAMES = {0x10: "needsrepair", 0x100: "metadir", 0x200: "zoned", 0x400: "zone_gaps"}
_FTYPE = 0x1
_META_UUID = 0x4

_REALTIME = 0x1
_FLAGS = 0x7FFF
# dax, reflink, cowextsize, bigtime, nrext64
_FLAGS2 = 0x1F
_FLAGS2_NAMES = {0x20: "metadata"}
_BIGTIME, _NREXT64 = 0x8, 0x10
_BIGTIME_EPOCH = 1 << 31
_LOCAL, _EXTENTS, _BTREE = 1, 2, 3
_MOST_DEPTH = 9
_MOST_TARGET = 1024
# Where what follows the entries of a directory begins, in bytes of the directory.
_LEAVES = 32 << 30
_FREE_TAG = 0xFFFF
_SYMLINK_HEADER = 56


class _Node(NamedTuple):
    """An inode, as its bytes."""

    number: int
    raw: bytes
    version: int
    format: int

    def number_at(self, form: str, offset: int) -> int:
        return int(struct.unpack_from(">" + form, self.raw, offset)[0])

    @property
    def mode(self) -> int:
        return self.number_at("H", 2)

    @property
    def size(self) -> int:
        return self.number_at("Q", 56)

    @property
    def flags2(self) -> int:
        return self.number_at("Q", 120) if self.version == 3 else 0

    @property
    def fork(self) -> bytes:
        """What describes its content."""
        begin = 176 if self.version == 3 else 100
        offset = self.raw[82] * 8
        return self.raw[begin : begin + offset] if offset else self.raw[begin:]

    @property
    def extents(self) -> int:
        return self.number_at("Q", 24) if self.flags2 & _NREXT64 else self.number_at("I", 76)


class Xfs(FileSystem):
    """XFS."""

    name = "xfs"
    linux_replays = True
    of_linux = True

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        sb = self._bytes(0, 512)
        self.block_size, blocks = struct.unpack_from(">IQ", sb, 4)
        log_start, self._root = struct.unpack_from(">QQ", sb, 48)
        self._group_blocks, self._groups = struct.unpack_from(">II", sb, 84)
        version, _sector, self._inode_size = struct.unpack_from(">HHH", sb, 100)
        self._inode_log, self._per_block_log, self._group_log = sb[122], sb[123], sb[124]
        self.uuid = str(uuid.UUID(bytes=sb[32:48]))
        self.label = sb[108:120].split(b"\0")[0].decode("utf-8", "surrogateescape") or None
        self._five = version & 0xF == 5
        self._ftype = self._checked_features(sb, version)
        self._meta_uuid = sb[248:264] if self._five and self._incompatible & _META_UUID else sb[32:48]
        self._directory_block = self.block_size << sb[192]
        sane = (
            512 <= self.block_size <= 65536
            and self.block_size == 1 << sb[120]
            and self._inode_size == 1 << self._inode_log
            and 256 <= self._inode_size <= 2048
            and self.block_size == self._inode_size << self._per_block_log
            and self._directory_block <= 65536
            and 0 < self._group_blocks <= 1 << self._group_log
            and (self._groups - 1) * self._group_blocks < blocks <= self._groups * self._group_blocks
        )
        if not sane:
            raise Unreadable("its superblock makes no sense")
        if sb[126]:
            raise Unreadable("it was not made to the end (mkfs in progress)")
        self._blocks = blocks
        self._require_room(blocks * self.block_size)
        if log_start:
            (log_blocks,) = struct.unpack_from(">I", sb, 96)
            place = self._place(log_start) * self.block_size
            self.unclean = pending(volume, place, log_blocks * self.block_size // 512)
        else:
            self.unclean = "its log lies on another device"
            self.linux_replays = False
        self._cached_inode = lru_cache(4096)(self._inode)

    def _checked_features(self, sb: bytes, version: int) -> bool:
        """Whether entries of directories have a type. :raises Unreadable: it has a feature that is not known."""
        (features2,) = struct.unpack_from(">I", sb, 200)
        if not version & _MOREBITS:
            features2 = 0
        self._incompatible = 0
        if version & 0xF == 4:
            require_known(version, _VERSION_4, _VERSION_4_NAMES, "features")
            require_known(features2, _FEATURES2, {}, "features")
            if not version & _DIRV2:
                raise Unreadable("it has directories of version 1")
            return bool(features2 & _FTYPE2)
        if not self._five:
            raise Unreadable(f"it is of version {version & 0xF}")
        _compatible, read_only, incompatible = struct.unpack_from(">III", sb, 208)
        require_known(read_only, _READ_ONLY, {0x10: "rtgroups"}, "features")
        require_known(incompatible, _INCOMPATIBLE, _INCOMPATIBLE_NAMES, "features")
        self._incompatible = incompatible
        return bool(incompatible & _FTYPE)

    @staticmethod
    def begins(volume: BinaryIO) -> Optional[str]:
        return "xfs" if bytes_at(volume, 0, 4) == b"XFSB" else None

    # Inodes

    def _place(self, block: int) -> int:
        """Where a block lies, of the number that has its group in front."""
        group, number = block >> self._group_log, block & ((1 << self._group_log) - 1)
        if group >= self._groups or number >= self._group_blocks:
            raise ValueError("an extent lies outside the volume")
        return group * self._group_blocks + number

    def _inode(self, number: int) -> _Node:
        block = self._place(number >> self._per_block_log)
        index = number & ((1 << self._per_block_log) - 1)
        raw = self._bytes(block * self.block_size + index * self._inode_size, self._inode_size)
        version, form = raw[4], raw[5]
        if raw[:2] != b"IN" or version not in ((3,) if self._five else (1, 2)):
            raise ValueError("its inode makes no sense")
        node = _Node(number, raw, version, form)
        if self._five and (node.number_at("Q", 152) != number or raw[160:176] != self._meta_uuid):
            raise ValueError("its inode is another one's")
        return node

    def root(self) -> Any:
        return self._cached_inode(self._root)

    def info(self, node: Any) -> Info:
        node = self._loaded(node)
        links = node.number_at("H", 6) if node.version == 1 else node.number_at("I", 16)
        if not links or not node.mode:
            raise ValueError("its inode is not in use")
        kind, what = kind_of(node.mode)
        if node.flags2 & _BIGTIME:
            mtime = node.number_at("Q", 40) - _BIGTIME_EPOCH * 10**9
        else:
            mtime = node.number_at("i", 40) * 10**9 + node.number_at("I", 44)
        return Info(
            kind=kind,
            size=node.size,
            mtime_ns=mtime,
            mode=stat.S_IMODE(node.mode),
            uid=node.number_at("I", 8),
            gid=node.number_at("I", 12),
            inode=node.number,
            what=what,
        )

    def _loaded(self, node: Any) -> _Node:
        if not isinstance(node, _Node):
            node = self._cached_inode(node)
        require_known(node.number_at("H", 90), _FLAGS, {}, "flags")
        require_known(node.flags2, _FLAGS2, _FLAGS2_NAMES, "flags")
        return node

    # Directories

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        node = self._loaded(node)
        if node.format == _LOCAL:
            found = self._short(node)
        else:
            found = (entry for block in self._blocks_of(node) for entry in self._long(block))
        for name, number in found:
            if name not in (b".", b".."):
                yield name.decode("utf-8", "surrogateescape"), number

    def _short(self, node: _Node) -> Iterator[Tuple[bytes, int]]:
        """Of a directory in its inode."""
        data = node.fork[: node.size]
        count, wide = data[0], data[1]
        length = 8 if wide else 4
        position = 2 + length
        for _number in range(count):
            end = position + 3 + data[position]
            name = data[position + 3 : end]
            end += self._ftype
            number = data[end : end + length]
            if not name or len(number) != length:
                raise ValueError("its entries are damaged")
            yield name, int.from_bytes(number, "big")
            position = end + length
        if position != len(data):
            raise ValueError("its entries are damaged")

    def _blocks_of(self, node: _Node) -> Iterator[bytes]:
        """The blocks of a directory that hold entries. Each may consist of several of the file system's."""
        each = self._directory_block // self.block_size
        owned: Dict[int, Dict[int, int]] = {}
        for logical, block, count, written in self._extents_of(node):
            if logical * self.block_size >= _LEAVES:
                break
            if not written:
                raise ValueError("a part of it was never written")
            if (logical + count) * self.block_size > min(node.size, self.size):
                raise ValueError("its extents are damaged")
            for number in range(count):
                owned.setdefault((logical + number) // each, {})[(logical + number) % each] = block + number
        if node.size % self._directory_block or max(owned, default=-1) != node.size // self._directory_block - 1:
            raise ValueError("a part of it is missing")
        for index in sorted(owned):
            if len(owned[index]) != each:
                raise ValueError("a part of it is missing")
            data = b"".join(self._bytes(owned[index][part] * self.block_size, self.block_size) for part in range(each))
            if self._five and struct.unpack_from(">Q", data, 40)[0] != node.number:
                raise ValueError("a block of it is another one's")
            yield data

    def _long(self, block: bytes) -> Iterator[Tuple[bytes, int]]:
        """The entries in a block of a directory."""
        end = len(block)
        magic = block[:4]
        if magic == (b"XDB3" if self._five else b"XD2B"):
            # The only block: the index lies at its end.
            (count,) = struct.unpack_from(">I", block, end - 8)
            end -= 8 + 8 * count
        elif magic != (b"XDD3" if self._five else b"XD2D"):
            raise ValueError("a block of it makes no sense")
        position = 64 if self._five else 16
        while position < end:
            tag, length = struct.unpack_from(">HH", block, position)
            if tag == _FREE_TAG:
                if length < 8 or length % 8:
                    raise ValueError("its entries are damaged")
                position += length
                continue
            number, name_length = struct.unpack_from(">QB", block, position)
            name = block[position + 9 : position + 9 + name_length]
            length = -(-(11 + name_length + self._ftype) // 8) * 8
            if not name or position + length > end or self._tag_of(block, position + length) != position:
                raise ValueError("its entries are damaged")
            yield name, number
            position += length
        if position != end:
            raise ValueError("its entries are damaged")

    @staticmethod
    def _tag_of(block: bytes, end: int) -> int:
        """An entry ends with where it begins."""
        return int(struct.unpack_from(">H", block, end - 2)[0])

    # Content

    def link(self, node: Any) -> str:
        node = self._loaded(node)
        size = node.size
        if not 0 < size <= _MOST_TARGET:
            raise ValueError("its target makes no sense")
        if node.format == _LOCAL:
            target = node.fork[:size]
        else:
            target = b""
            for _logical, block, count, written in self._extents_of(node):
                data = self._bytes(block * self.block_size, count * self.block_size)
                if self._five:
                    magic, offset, length = struct.unpack_from(">4sII", data)
                    if (
                        magic != b"XSLM"
                        or offset != len(target)
                        or node.number != struct.unpack_from(">Q", data, 32)[0]
                    ):
                        raise ValueError("its target is damaged")
                    data = data[_SYMLINK_HEADER : _SYMLINK_HEADER + length]
                target += data if written else b""
        if len(target) < size:
            raise ValueError("its target is damaged")
        return target[:size].decode("utf-8", "surrogateescape")

    def read(self, node: Any) -> Iterator[Piece]:
        node = self._loaded(node)
        if node.number_at("H", 90) & _REALTIME:
            raise Unreadable("it lies on the real-time device")
        return self._by_runs(self._runs(node), node.size, self.block_size)

    def _runs(self, node: _Node) -> List[Run]:
        runs: List[Run] = []
        at = 0
        for logical, block, count, written in self._extents_of(node):
            if logical > at:
                runs.append((None, logical - at))
            runs.append((block if written else None, count))
            at = logical + count
            if len(runs) > MOST_RUNS:
                raise Beyond("it has too many extents")
        return runs

    def _extents_of(self, node: _Node) -> Iterator[Tuple[int, int, int, bool]]:
        """(first block of the file, first block of the volume, number, whether it was written), ascending."""
        if node.format == _EXTENTS:
            records = self._records(node.fork, 0, node.extents)
        elif node.format == _BTREE:
            level, count = struct.unpack_from(">HH", node.fork)
            room = (len(node.fork) - 4) // 16
            if not 0 < level < _MOST_DEPTH or count > room:
                raise ValueError("its extents are damaged")
            pointers = struct.unpack_from(f">{count}Q", node.fork, 4 + 8 * room)
            records = (record for one in pointers for record in self._tree(node, one, level - 1))
        else:
            raise Unreadable(f"its content is of format {node.format}")
        at = found = 0
        for first, second in records:
            logical = (first & ((1 << 63) - 1)) >> 9
            block = (first & 0x1FF) << 43 | second >> 21
            count = second & ((1 << 21) - 1)
            if logical < at or not count:
                raise ValueError("its extents overlap")
            at = logical + count
            found += 1
            place = self._place(block)
            if place + count > self._blocks:
                raise ValueError("an extent lies outside the volume")
            yield logical, place, count, not first >> 63
        if found != node.extents:
            raise ValueError("some of its extents are missing")

    @staticmethod
    def _records(data: bytes, begin: int, count: int) -> Iterator[Tuple[int, int]]:
        if begin + 16 * count > len(data):
            raise ValueError("its extents are damaged")
        for number in range(count):
            yield struct.unpack_from(">QQ", data, begin + 16 * number)

    def _tree(self, node: _Node, pointer: int, level: int) -> Iterator[Tuple[int, int]]:
        data = self._bytes(self._place(pointer) * self.block_size, self.block_size)
        magic, at, count = struct.unpack_from(">4sHH", data)
        header = 72 if self._five else 24
        if magic != (b"BMA3" if self._five else b"BMAP") or at != level:
            raise ValueError("its extents are damaged")
        if self._five and struct.unpack_from(">Q", data, 56)[0] != node.number:
            raise ValueError("its extents are another one's")
        if level == 0:
            yield from self._records(data, header, count)
            return
        room = (self.block_size - header) // 16
        if count > room:
            raise ValueError("its extents are damaged")
        for one in struct.unpack_from(f">{count}Q", data, header + 8 * room):
            yield from self._tree(node, one, level - 1)
