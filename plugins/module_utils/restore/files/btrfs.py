# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""btrfs on one device: dissect reads its trees, and what they say is checked here."""

from __future__ import annotations

import bisect
import copy
import stat
import struct
import uuid
from typing import Any, BinaryIO, Dict, Iterator, NamedTuple, Optional, Tuple

from . import parsers
from .filesystem import CHUNK_BYTES, FileSystem, Info, Piece, Unreadable, bytes_at, holes_of, kind_of, require_known

_SUPERBLOCK = 65536
_MAGIC = b"_BHRfS_M"
# mixed_backref, default_subvol, mixed_groups, compress_lzo, compress_zstd, big_metadata, extended_iref,
# skinny_metadata, no_holes, metadata_uuid, simple_quota
_INCOMPATIBLE = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x10000
_INCOMPATIBLE_NAMES = {
    0x80: "raid56",
    0x800: "raid1c34",
    0x1000: "zoned",
    0x2000: "extent_tree_v2",
    0x4000: "raid_stripe_tree",
}
# free_space_tree, free_space_tree_valid, verity, block_group_tree
_READ_ONLY = 0xF
_METADATA_UUID = 0x400
# written, reloc, error, seeding
_FLAGS = 0x7 | 1 << 32
_FLAG_NAMES = {1 << 33: "metadump", 1 << 34: "metadump v2", 1 << 35: "changing fsid", 1 << 36: "changing fsid"}
# What of the types of chunks says how copies lie: single and DUP are read.
_PROFILES = {
    0x8: "raid0",
    0x10: "raid1",
    0x40: "raid10",
    0x80: "raid5",
    0x100: "raid6",
    0x200: "raid1c3",
    0x400: "raid1c4",
}
_CHUNK_TYPES = 0x7 | 0x20
_INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2
# None, zlib, LZO, zstd.
_COMPRESSIONS = (0, 1, 2, 3)
# The kernel compresses 128 KiB at a time.
_MOST_COMPRESSED = 1 << 20
_PANIC = "PanicException"
# Seconds of 64 bits, in nanoseconds: btrfs' are signed, its parser reads them as unsigned.
_SIGN = (1 << 63) * 10**9


class _Stub(NamedTuple):
    """A directory in the place of a subvolume that lies elsewhere, or is gone: in snapshots of what it lay in."""

    parent: Any
    name: str


class Btrfs(FileSystem):
    """btrfs on one device; its default subvolume, with those that lie in it.

    Where that is not the top level, the top level is one of the others: all subvolumes lie there.
    """

    name = "btrfs"
    linux_replays = True
    of_linux = True

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        sb = self._bytes(_SUPERBLOCK, 4096)
        place, flags = struct.unpack_from("<QQ", sb, 48)
        (log_root,) = struct.unpack_from("<Q", sb, 96)
        (devices,) = struct.unpack_from("<Q", sb, 136)
        _compatible, read_only, incompatible = struct.unpack_from("<QQQ", sb, 172)
        (total,) = struct.unpack_from("<Q", sb, 209)
        self.uuid = str(uuid.UUID(bytes=sb[32:48]))
        if place != _SUPERBLOCK:
            raise Unreadable("its superblock makes no sense")
        if devices != 1:
            raise Unreadable(f"it lies on {devices} devices")
        require_known(flags, _FLAGS, _FLAG_NAMES, "flags")
        require_known(incompatible, _INCOMPATIBLE, _INCOMPATIBLE_NAMES, "features")
        require_known(read_only, _READ_ONLY, {}, "features")
        self._require_room(total)
        missing = parsers.missing()
        if missing:
            raise Unreadable(f"btrfs is read by dissect's library, which needs {', '.join(missing)}")
        # Its trees are always whole. What a program asked to be on the disk in between lies in the log.
        self.unclean = "its log was not empty when the snapshot was made" if log_root else None
        # Nodes of trees have the UUID of when it was made.
        self._tree_uuid = sb[571:587] if incompatible & _METADATA_UUID else sb[32:48]
        self.fs = self._opened(volume)
        self.label = self.fs.label or None
        self._subvolume = self.fs.default_subvolume

    def _opened(self, volume: BinaryIO) -> Any:
        parser: Any = parsers.btrfs().Btrfs
        reader = self

        class Checked(parser):
            """Each node of a tree is the one that was asked for."""

            def _read_node(self, address: int) -> bytes:
                node = reader._logical(self._logical_fh, address, self.node_size)
                if node[32:48] != reader._tree_uuid or struct.unpack_from("<Q", node, 48)[0] != address:
                    raise ValueError("a node of its trees is another one's")
                return node

        return Checked(volume)

    @staticmethod
    def begins(volume: BinaryIO) -> Optional[str]:
        return "btrfs" if bytes_at(volume, _SUPERBLOCK + 64, 8) == _MAGIC else None

    @staticmethod
    def identity(volume: BinaryIO) -> Tuple[str, str]:
        """UUIDs of the file system, and of this device of it."""
        sb = bytes_at(volume, _SUPERBLOCK, 4096)
        return str(uuid.UUID(bytes=sb[32:48])), str(uuid.UUID(bytes=sb[267:283]))

    def _logical(self, stream: Any, address: int, length: int) -> bytes:
        """Bytes at a place of the file system's own, which chunks map to the device."""
        parts = []
        while length:
            number = bisect.bisect_right(stream._chunk_offsets, address) - 1
            chunk = stream.chunks[number] if number >= 0 else None
            if chunk is None or address >= chunk.offset + chunk.length:
                raise ValueError("an extent lies outside the volume")
            require_known(int(chunk.type), _CHUNK_TYPES, _PROFILES, "chunks")
            inside = address - chunk.offset
            step = min(length, chunk.length - inside)
            parts.append(self._bytes(chunk.stripes[0].offset + inside, step))
            address += step
            length -= step
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def root(self) -> Any:
        return self._subvolume.root

    def others(self) -> Dict[str, FileSystem]:
        if self._subvolume.objectid == self.fs.fs_tree.objectid:
            return {}
        top = copy.copy(self)
        top._subvolume = self.fs.fs_tree
        return {"top": top}

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        if isinstance(node, _Stub):
            return
        c_btrfs = parsers.btrfs_structures()
        # "." and ".." come before 2. dissect's own iterdir() ends at a subvolume that is gone.
        cursor = node.subvolume.tree.cursor()
        for _item, data in cursor.iter(node.inum, c_btrfs.BTRFS_DIR_INDEX_KEY, 2, ignore_offset=True):
            item = c_btrfs.btrfs_dir_item(data)
            name = item.name.decode(errors="surrogateescape")
            number = item.location.objectid
            if item.location.type == c_btrfs.BTRFS_INODE_ITEM_KEY:
                yield name, node.subvolume.inode(number, item.type, node)
            elif item.location.type != c_btrfs.BTRFS_ROOT_ITEM_KEY:
                raise ValueError(f"an entry is of type {item.location.type}")
            elif self._lies_in(number, node, item.name):
                yield name, self.fs.open_subvolume(number, node).root
            else:
                yield name, _Stub(node, name)

    def _lies_in(self, subvolume: int, directory: Any, name: bytes) -> bool:
        """Whether a subvolume lies in this directory: what refers to it may be a copy that a snapshot made."""
        c_btrfs = parsers.btrfs_structures()
        try:
            _item, data = self.fs._root_tree.find(directory.subvolume.objectid, c_btrfs.BTRFS_ROOT_REF_KEY, subvolume)
        except KeyError:
            return False
        place = c_btrfs.btrfs_root_ref(data)
        return bool(place.dirid == directory.inum and place.name == name)

    def info(self, node: Any) -> Info:
        if isinstance(node, _Stub):
            above = self.info(node.parent)
            return above._replace(size=0, mode=0o755, uid=0, gid=0, inode=(above.inode, node.name))
        kind, what = kind_of(node.mode)
        return Info(
            kind=kind,
            size=node.size,
            mtime_ns=(node.mtime_ns + _SIGN) % (2 * _SIGN) - _SIGN,
            mode=stat.S_IMODE(node.mode),
            uid=node.uid,
            gid=node.gid,
            inode=(node.subvolume.objectid, node.inum),
            what=what,
        )

    def link(self, node: Any) -> str:
        pieces = list(self.read(node))
        if len(pieces) != 1 or not isinstance(pieces[0], bytes):
            raise ValueError("its target makes no sense")
        return pieces[0].decode("utf-8", "surrogateescape")

    def read(self, node: Any) -> Iterator[Piece]:
        left = int(node.size)
        at = 0
        for offset, data in self._extents_of(node):
            if offset < at:
                raise ValueError("its extents overlap")
            if offset > at:
                hole = min(offset - at, left)
                if hole:
                    yield hole
                left -= hole
                at = offset
            kind, compression, encryption, other = data[20], data[16], data[17], data[18:20]
            if kind not in (_INLINE, _REGULAR, _PREALLOCATED) or compression not in _COMPRESSIONS:
                raise Unreadable(f"an extent of it is of type {kind}, compression {compression}")
            if encryption or other != b"\0\0":
                raise Unreadable("an extent of it is encrypted or encoded")
            if kind == _INLINE:
                (length,) = struct.unpack_from("<Q", data, 8)
                piece = data[21:]
                if compression:
                    piece = self._unpacked(piece, compression, length)
                if len(piece) != length or offset:
                    raise ValueError("an extent in its tree is damaged")
                piece = piece[:left]
                if piece:
                    yield piece
                at += length
                left -= len(piece)
                if left:
                    # It ends within a sector, and the rest of that is zeros.
                    step = min(-at % self.fs.sector_size, left)
                    if step:
                        yield step
                    at += step
                    left -= step
                continue
            place, stored, inside, length = struct.unpack_from("<QQQQ", data, 21)
            at += length
            length = min(length, left)
            left -= length
            if length:
                yield from self._of_extent(data, kind, compression, (place, stored, inside, length))
        if left:
            yield left

    def _of_extent(self, data: bytes, kind: int, compression: int, where: Tuple[int, int, int, int]) -> Iterator[Piece]:
        place, stored, inside, length = where
        if kind == _PREALLOCATED or not place:
            yield length
            return
        (whole,) = struct.unpack_from("<Q", data, 8)
        logical = self.fs._logical_fh
        if not compression:
            if inside + length > stored:
                raise ValueError("its extents are damaged")
            position = place + inside
            while length:
                step = min(length, CHUNK_BYTES)
                yield self._logical(logical, position, step)
                position += step
                length -= step
            return
        if max(stored, whole) > _MOST_COMPRESSED or inside + length > whole:
            raise ValueError("a compressed extent makes no sense")
        unpacked = self._unpacked(self._logical(logical, place, stored), compression, whole)
        yield from holes_of(unpacked[inside : inside + length])

    def _unpacked(self, stored: bytes, compression: int, whole: int) -> bytes:
        """A compressed extent of *whole* bytes. What it lacks at its end are zeros."""
        try:
            unpacked = bytes(parsers.btrfs_stream().decode_extent(stored, compression, 0, self.fs.sector_size))
        except BaseException as error:
            # LZO is a library in Rust, whose panics are no Exception.
            if type(error).__name__ != _PANIC:
                raise
            raise ValueError("its compressed data are damaged") from None
        return unpacked[:whole].ljust(whole, b"\0")

    def _extents_of(self, node: Any) -> Iterator[Tuple[int, bytes]]:
        """Where an extent begins in the file, and what its tree says of it; ascending."""
        if not node.size:
            return
        cursor = node.subvolume.tree.cursor()
        kind = parsers.btrfs_structures().BTRFS_EXTENT_DATA_KEY
        for item, data in cursor.iter(node.inum, kind, 0, ignore_offset=True):
            yield int(item.key.offset), bytes(data)
