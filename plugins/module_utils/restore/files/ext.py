# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""ext2, ext3 and ext4."""

from __future__ import annotations

import stat
import struct
import uuid
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Tuple

from .filesystem import (
    MOST_RUNS,
    Beyond,
    FileSystem,
    Info,
    Piece,
    Run,
    Unreadable,
    broken,
    bytes_at,
    kind_of,
    merged,
    require_known,
)
from .journal import replayed

_SUPERBLOCK = 1024
_MAGIC = 0xEF53
_ROOT = 2
_RECOVER, _META_BG, _64BIT, _LARGEDIR = 0x4, 0x10, 0x80, 0x4000
# filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data, encrypt,
# casefold
_INCOMPATIBLE = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
_INCOMPATIBLE_NAMES = {0x1: "compression", 0x8: "journal_dev", 0x1000: "dirdata"}
# sparse_super, large_file, btree_dir, huge_file, uninit_bg, dir_nlink, extra_isize, quota, bigalloc, metadata_csum,
# read-only, project, shared_blocks, verity, orphan_present
_READ_ONLY = 0x7F | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000
_READ_ONLY_NAMES = {0x80: "snapshot", 0x800: "replica"}
_HAS_JOURNAL, _SPARSE_SUPER2 = 0x4, 0x200
_VALID, _ERRORS = 0x1, 0x2
#: Without a journal that is how it is while it is mounted.
WAITS = "it was mounted without a journal when the snapshot was made, or waits for a check"

_ENCRYPTED, _JOURNALED, _EXTENTS, _INLINE = 0x800, 0x4000, 0x80000, 0x10000000
# All but those of compression, of snapshots, and of inodes that hold extended attributes of others.
_FLAGS = 0xFFFFFFFF & ~(0x100 | 0x200 | 0x200000 | 0x800000 | 0x1000000 | 0x4000000 | 0x8000000)
_FLAG_NAMES = {0x100: "compressed", 0x200: "compressed", 0x200000: "ea_inode", 0x1000000: "snapshot"}
_EXTENT_MAGIC = 0xF30A
_MOST_DEPTH = 5
_UNWRITTEN = 32768
_ATTRIBUTES_MAGIC = 0xEA020000
_SYSTEM, _DATA = 7, b"data"
_EXTRA_OF_MTIME = 12
_MOST_JOURNAL = 1 << 20


class _Node(NamedTuple):
    """An inode, as its bytes."""

    number: int
    raw: bytes

    def half(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.raw, offset)[0])

    def word(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.raw, offset)[0])

    @property
    def mode(self) -> int:
        return self.half(0)

    @property
    def flags(self) -> int:
        return self.word(32)

    @property
    def pointers(self) -> bytes:
        return self.raw[40:100]


class Ext(FileSystem):
    """ext2, ext3 and ext4."""

    linux_replays = True
    of_linux = True

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        sb = self._bytes(_SUPERBLOCK, 1024)
        self.name = _type_of(sb)
        (blocks_low,) = struct.unpack_from("<I", sb, 4)
        self._inodes, self._first_data_block = struct.unpack_from("<I16xI", sb, 0)
        log_block, blocks_per_group, self._inodes_per_group = struct.unpack_from("<I4xI4xI", sb, 24)
        revision, self._inode_size = struct.unpack_from("<I8xH", sb, 76)
        compatible, incompatible, read_only = struct.unpack_from("<III", sb, 92)
        if revision == 0:
            self._inode_size, incompatible, read_only, compatible = 128, 0, 0, 0
        self.uuid = str(uuid.UUID(bytes=sb[104:120]))
        self.label = sb[120:136].split(b"\0")[0].decode("utf-8", "surrogateescape") or None
        require_known(incompatible, _INCOMPATIBLE, _INCOMPATIBLE_NAMES, "features")
        require_known(read_only, _READ_ONLY, _READ_ONLY_NAMES, "features")
        self._incompatible = incompatible
        blocks_high, descriptor = 0, 32
        if incompatible & _64BIT:
            (blocks_high,) = struct.unpack_from("<I", sb, 336)
            (descriptor,) = struct.unpack_from("<H", sb, 254)
        self._blocks = blocks_high << 32 | blocks_low
        self._descriptor = descriptor
        if revision > 1 or log_block > 6 or not self._inodes_per_group or not blocks_per_group:
            raise Unreadable("its superblock makes no sense")
        self.block_size = 1024 << log_block
        if not 128 <= self._inode_size <= self.block_size or descriptor not in (32, 64):
            raise Unreadable("its superblock makes no sense")
        self._require_room(self._blocks * self.block_size)
        self._groups = -(-(self._blocks - self._first_data_block) // blocks_per_group)
        self._blocks_per_group = blocks_per_group
        (first_meta,) = struct.unpack_from("<I", sb, 260)
        # Descriptors of the first groups lie behind the superblock, others in the groups that they describe.
        self._first_meta = first_meta if incompatible & _META_BG else self._groups
        self._sparse = bool(read_only & 0x1)
        self._backups = struct.unpack_from("<II", sb, 588) if compatible & _SPARSE_SUPER2 else None
        self._journal = struct.unpack_from("<I", sb, 224)[0] if compatible & _HAS_JOURNAL else 0
        self._unreplayed = False
        (state,) = struct.unpack_from("<H", sb, 58)
        self.unclean = None
        if not state & _VALID:
            self.unclean = WAITS
            self.linux_replays = False
        if incompatible & _RECOVER:
            self._replay()
        if state & _ERRORS:
            self.warnings.append("the guest's own kernel found errors in it")

    @staticmethod
    def waits(volume: BinaryIO) -> bool:
        """Whether something is open that no journal brings in order."""
        return not struct.unpack_from("<H", bytes_at(volume, _SUPERBLOCK, 1024), 58)[0] & _VALID

    @staticmethod
    def begins(volume: BinaryIO) -> Optional[str]:
        sb = bytes_at(volume, _SUPERBLOCK, 1024)
        return _type_of(sb) if len(sb) == 1024 and struct.unpack_from("<H", sb, 56)[0] == _MAGIC else None

    def _replay(self) -> None:
        """Read what the journal holds from there. Where that is not known, it is told."""
        try:
            node = self._inode(self._journal)
            needed = self._size(node) // self.block_size
            blocks: List[int] = []
            for start, count in self._runs(node):
                # Holes have no place in it, and nobody has one that is larger.
                if start is None or needed > _MOST_JOURNAL:
                    break
                blocks.extend(range(start, start + min(count, needed - len(blocks))))
            if not needed or len(blocks) < needed:
                raise ValueError("a part of the journal is missing")
            self.volume = replayed(self.volume, self.size, self.block_size, blocks)
        except broken() as error:
            self._unreplayed = True
            self.unclean = f"its journal was not empty when the snapshot was made, and can't be replayed here ({error})"

    # Inodes

    def _inode(self, number: int) -> _Node:
        group, index = divmod(number - 1, self._inodes_per_group)
        if not 1 <= number <= self._inodes or group >= self._groups:
            raise ValueError(f"there is no inode {number}")
        descriptor = self._bytes(self._place_of_descriptor(group), self._descriptor)
        (table,) = struct.unpack_from("<I", descriptor, 8)
        if self._descriptor == 64:
            table |= struct.unpack_from("<I", descriptor, 40)[0] << 32
        raw = self._bytes(table * self.block_size + index * self._inode_size, self._inode_size)
        return _Node(number, raw)

    def _place_of_descriptor(self, group: int) -> int:
        each = self.block_size // self._descriptor
        block, index = divmod(group, each)
        # The superblock lies in block 1 if blocks have 1024 bytes, and in block 0 otherwise.
        place = _SUPERBLOCK // self.block_size + 1 + block
        if block >= self._first_meta:
            first = block * each
            place = self._first_data_block + first * self._blocks_per_group + self._has_superblock(first)
            if first == 0:
                place = _SUPERBLOCK // self.block_size + 1
        return place * self.block_size + index * self._descriptor

    def _has_superblock(self, group: int) -> bool:
        if self._backups is not None:
            return group == 0 or group in self._backups
        if group <= 1 or not self._sparse:
            return True
        for base in (3, 5, 7):
            power = base
            while power < group:
                power *= base
            if power == group:
                return True
        return False

    def root(self) -> Any:
        return self._inode(_ROOT)

    def info(self, node: Any) -> Info:
        if not isinstance(node, _Node):
            node = self._inode(node)
        links = node.half(26)
        if not links or not node.mode:
            raise ValueError("its inode is not in use")
        require_known(node.flags, _FLAGS, _FLAG_NAMES, "flags")
        kind, what = kind_of(node.mode)
        # With an old, small inode the fields behind it belong to the next one.
        extra = 0
        if self._inode_size > 128 and node.half(128) >= _EXTRA_OF_MTIME:
            extra = node.word(136)
        (seconds,) = struct.unpack_from("<i", node.raw, 16)
        return Info(
            kind=kind,
            size=self._size(node),
            mtime_ns=(seconds + ((extra & 3) << 32)) * 10**9 + (extra >> 2),
            mode=stat.S_IMODE(node.mode),
            uid=node.half(2) | node.half(120) << 16,
            gid=node.half(24) | node.half(122) << 16,
            inode=node.number,
            what=what,
        )

    def _size(self, node: _Node) -> int:
        high = node.word(108)
        # Once that was where a directory's access list lay.
        if stat.S_ISDIR(node.mode) and not self._incompatible & _LARGEDIR:
            high = 0
        return high << 32 | node.word(4)

    def _loaded(self, node: Any) -> _Node:
        if not isinstance(node, _Node):
            node = self._inode(node)
        require_known(node.flags, _FLAGS, _FLAG_NAMES, "flags")
        if node.flags & _ENCRYPTED:
            raise Unreadable("it is encrypted (fscrypt)")
        if node.flags & _JOURNALED and self._unreplayed and stat.S_ISREG(node.mode):
            raise Unreadable("its data may lie in the journal, which was not empty")
        return node

    # Directories

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        node = self._loaded(node)
        for begin, block in self._blocks_of(node):
            position = begin
            while position + 8 <= len(block):
                inode, length, name_length = struct.unpack_from("<IHB", block, position)
                # A block of 64 KiB has no other way to say its length.
                if length in (0, 0xFFFF) and len(block) == 65536:
                    length = 65536 - position
                if length < 8 or length % 4 or position + length > len(block) or 8 + name_length > length:
                    raise ValueError("its entries are damaged")
                name = block[position + 8 : position + 8 + name_length]
                # Checksums stand in an entry of type 0xDE without an inode.
                if inode and name not in (b".", b".."):
                    yield name.decode("utf-8", "surrogateescape"), inode
                position += length
            if position != len(block):
                raise ValueError("its entries are damaged")

    def _blocks_of(self, node: _Node) -> Iterator[Tuple[int, bytes]]:
        """Where entries begin in each block of a directory, and the block."""
        size = self._size(node)
        if node.flags & _INLINE:
            data = self._inline(node, size)
            # The first four bytes are the directory above.
            yield 4, data[:60]
            if data[60:]:
                yield 0, data[60:]
            return
        blocks = size // self.block_size
        if size % self.block_size:
            raise ValueError("its size makes no sense")
        for start, count in self._runs(node):
            for block in range(start or 0, (start or 0) + count):
                if not blocks:
                    return
                if start is None:
                    raise ValueError("a part of it is missing")
                blocks -= 1
                yield 0, self._bytes(block * self.block_size, self.block_size)
        if blocks:
            raise ValueError("a part of it is missing")

    # Content

    def link(self, node: Any) -> str:
        node = self._loaded(node)
        size = self._size(node)
        # A short target lies where pointers would be. One of 60 bytes has no room for its end there.
        if size < 60:
            target = node.pointers[:size]
        elif size > self.block_size:
            raise ValueError("its target is too long")
        else:
            target = b"".join(piece if isinstance(piece, bytes) else bytes(piece) for piece in self._pieces(node))
        return target.decode("utf-8", "surrogateescape")

    def read(self, node: Any) -> Iterator[Piece]:
        return self._pieces(self._loaded(node))

    def _pieces(self, node: _Node) -> Iterator[Piece]:
        size = self._size(node)
        if node.flags & _INLINE:
            yield self._inline(node, size)
            return
        yield from self._by_runs(self._runs(node), size, self.block_size)

    def _inline(self, node: _Node, size: int) -> bytes:
        """What lies in the inode itself: the begin in place of pointers, the rest as an extended attribute."""
        data = node.pointers
        at = 128 + (node.half(128) if self._inode_size > 128 else 0)
        if at + 4 <= len(node.raw) and node.word(at) == _ATTRIBUTES_MAGIC:
            first = position = at + 4
            while position + 16 <= len(node.raw) and node.word(position):
                length, index, offset, inode, value_size = struct.unpack_from("<BBHII", node.raw, position)
                if index == _SYSTEM and node.raw[position + 16 : position + 16 + length] == _DATA:
                    value = node.raw[first + offset : first + offset + value_size]
                    if inode or len(value) != value_size:
                        raise ValueError("its data in its inode are damaged")
                    data += value
                position += 16 + (length + 3) // 4 * 4
        if size > len(data):
            raise ValueError("a part of its data in its inode is missing")
        return data[:size]

    def _runs(self, node: _Node) -> List[Run]:
        if not node.flags & _EXTENTS:
            count = -(-self._size(node) // self.block_size)
            return merged(self._mapped(struct.unpack("<15I", node.pointers), count))
        runs: List[Run] = []
        at = 0
        for logical, start, count, written in self._extents(node.pointers, _MOST_DEPTH + 1):
            if logical < at:
                raise ValueError("its extents overlap")
            if logical > at:
                runs.append((None, logical - at))
            if start + count > self._blocks or not start:
                raise ValueError("an extent lies outside the volume")
            runs.append((start if written else None, count))
            at = logical + count
            if len(runs) > MOST_RUNS:
                raise Beyond("it has too many extents")
        return runs

    def _extents(self, node: bytes, above: int) -> Iterator[Tuple[int, int, int, bool]]:
        """(first block of the file, first block of the volume, number, whether it was written)"""
        magic, count, room, depth = struct.unpack_from("<HHHH", node)
        if magic != _EXTENT_MAGIC or depth >= above or count > room or 12 + 12 * count > len(node):
            raise ValueError("its extents are damaged")
        for number in range(count):
            if depth:
                _block, low, high = struct.unpack_from("<IIH", node, 12 + 12 * number)
                child = self._bytes((high << 32 | low) * self.block_size, self.block_size)
                if struct.unpack_from("<H", child, 6)[0] != depth - 1:
                    raise ValueError("its extents are damaged")
                yield from self._extents(child, depth)
            else:
                logical, length, high, low = struct.unpack_from("<IHHI", node, 12 + 12 * number)
                written = length <= _UNWRITTEN
                length -= 0 if written else _UNWRITTEN
                if not length:
                    raise ValueError("its extents are damaged")
                yield logical, high << 32 | low, length, written

    def _mapped(self, pointers: Tuple[int, ...], count: int) -> Iterator[Run]:
        """The blocks of a file with a block map; a pointer of 0 is a hole, at each level, however large."""
        per_block = self.block_size // 4

        def below(pointer: int, level: int, wanted: int) -> Iterator[Run]:
            if level == 0:
                yield pointer or None, 1
                return
            each = per_block ** (level - 1)
            if pointer == 0:
                yield None, min(wanted, each * per_block)
                return
            table = self._bytes(pointer * self.block_size, self.block_size)
            for (next_pointer,) in struct.iter_unpack("<I", table):
                if wanted <= 0:
                    return
                yield from below(next_pointer, level - 1, wanted)
                wanted -= each

        for number in range(min(12, count)):
            yield pointers[number] or None, 1
        left = count - 12
        for level in (1, 2, 3):
            if left <= 0:
                return
            yield from below(pointers[11 + level], level, left)
            left -= per_block**level
        if left > 0:
            raise ValueError("it is larger than its block map")


def _type_of(sb: bytes) -> str:
    compatible, incompatible, read_only = struct.unpack_from("<III", sb, 92)
    if struct.unpack_from("<I", sb, 76)[0] == 0:
        return "ext2"
    # As blkid tells them apart: what ext3 does not know is ext4.
    if incompatible & ~0x16 or read_only & ~0x7:
        return "ext4"
    return "ext3" if compatible & _HAS_JOURNAL else "ext2"
