# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""File systems as dissect's parsers read them, each behind the same few methods.

What a file holds is told as pieces: bytes, or the length of a hole. Where a parser takes a hole, or an extent that was
reserved but never written, for data (it would hand out old bytes of the disk), the extents are worked out here.

Everything comes from a disk that nobody vouches for: any of :func:`broken` may be raised anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import stat
import struct
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type, Union

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
)

Piece = Union[bytes, int]
#: (block of the volume or None for a hole, number of blocks)
Run = Tuple[Optional[int], int]

CHUNK_BYTES = 1 << 20
_ZERO_BYTES = 65536
_MOST_RUNS = 4 << 20
# FAT's directories can't be larger.
_MOST_DIRECTORY = 2 << 20
# The kernel compresses 128 KiB at a time.
_MOST_COMPRESSED = 1 << 20
# Seconds of 64 bits, in nanoseconds: btrfs' are signed, its parser takes them for unsigned.
_SIGN = (1 << 63) * 10**9

FILE, DIRECTORY, LINK, OTHER = "file", "directory", "link", "other"
_KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}
_OTHERS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


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
    """A file that this reader can't read as it is, and why."""


class FileSystem:
    """A file system; a *node* is whatever it takes for a file or directory."""

    name = ""
    ignores_case = False

    def __init__(self, volume: BinaryIO, size: int) -> None:
        self.volume = volume
        self.size = size
        self.label: Optional[str] = None
        self.uuid: Optional[str] = None
        self.warnings: List[str] = []

    @staticmethod
    def found(volume: BinaryIO) -> bool:
        """Whether a volume begins as this file system does."""
        raise NotImplementedError

    def root(self) -> Any:
        """The node of the root directory."""
        raise NotImplementedError

    def others(self) -> Dict[str, FileSystem]:
        """What of it can't be reached from its root: by name, each with a root of its own."""
        return {}

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        """Names and nodes of a directory. A name may be anything; what is no Unicode stands in it as surrogates."""
        raise NotImplementedError

    def info(self, node: Any) -> Info:
        """Facts of a node."""
        raise NotImplementedError

    def link(self, node: Any) -> str:
        """Where a symbolic link points to."""
        raise NotImplementedError

    def read(self, node: Any) -> Iterator[Piece]:
        """What a file holds."""
        raise NotImplementedError

    # For those below

    def _by_runs(self, runs: List[Run], size: int, block_bytes: int, base: int = 0) -> Iterator[Piece]:
        """The pieces of a file of *size* bytes in *runs* of blocks, which begin at *base*."""
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
            if position + length > self.size:
                raise ValueError("an extent lies outside the volume")
            while length:
                step = min(length, CHUNK_BYTES - position % CHUNK_BYTES)
                self.volume.seek(position)
                data = self.volume.read(step)
                if len(data) != step:
                    raise EOFError("the volume ends before its file system does")
                yield data
                position += step
                length -= step
            if not left:
                return
        if left:
            yield left


def stream_pieces(stream: BinaryIO, size: int) -> Iterator[Piece]:
    """The pieces of what a parser hands out as a stream; zeros become holes."""
    left = size
    while left:
        data = stream.read(min(left, CHUNK_BYTES))
        if not data:
            raise EOFError(f"{left} bytes are missing at its end")
        left -= len(data)
        yield from _holes(data)


def _holes(data: bytes) -> Iterator[Piece]:
    if data.count(0) == len(data):
        yield len(data)
    elif data.find(bytes(_ZERO_BYTES)) < 0:
        yield data
    else:
        for start in range(0, len(data), _ZERO_BYTES):
            part = data[start : start + _ZERO_BYTES]
            yield len(part) if part.count(0) == len(part) else part


def _merged(blocks: Iterator[Optional[int]]) -> List[Run]:
    """Runs of single blocks; None is a hole."""
    runs: List[Run] = []
    start: Optional[int] = None
    count = 0
    for block in blocks:
        if count and (block == start if start is None or block is None else block == start + count):
            count += 1
            continue
        if count:
            runs.append((start, count))
            if len(runs) > _MOST_RUNS:
                raise ValueError("it has too many extents")
        start, count = block, 1
    if count:
        runs.append((start, count))
    return runs


def kind_of(mode: int) -> Tuple[str, str]:
    form = stat.S_IFMT(mode)
    return _KINDS.get(form, OTHER), _OTHERS.get(form, "of no known type")


def _from(volume: BinaryIO, offset: int, length: int) -> bytes:
    volume.seek(offset)
    return volume.read(length)


class Ext(FileSystem):
    """ext2, ext3 and ext4."""

    name = "ext"

    _EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800
    _NEEDS_RECOVERY = 0x4
    _FIRST_EXTRA_FIELDS = 8

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        self.fs = parsers.extfs().ExtFS(volume)
        self.name = f"ext{self.fs.type}"
        self.label = self.fs.volume_name or None
        self.uuid = str(self.fs.uuid)
        if self.fs.sb.s_feature_incompat & self._NEEDS_RECOVERY:
            self.warnings.append(
                "its journal was not empty when the snapshot was made, and it is not replayed here: the newest changes"
                " may be missing"
            )

    @staticmethod
    def found(volume: BinaryIO) -> bool:
        return _from(volume, 1024 + 56, 2) == b"\x53\xef"

    def root(self) -> Any:
        return self.fs.root

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        flags = node.inode.i_flags
        if flags & self._ENCRYPTED:
            raise Unreadable("it is encrypted")
        if flags & self._INLINE:
            raise Unreadable("its entries lie in its inode")
        with_type = self.fs.sb.s_feature_incompat & 0x2
        for block in self._blocks_of(node):
            position = 0
            while position + 8 <= len(block):
                inode, length, name_length, form = struct.unpack_from("<IHBB", block, position)
                if not with_type:
                    name_length |= form << 8
                # A block of 64 KiB has no other way to say its length.
                if length in (0, 0xFFFF) and len(block) == 65536:
                    length = 65536
                if length < 8 or length % 4 or position + length > len(block) or 8 + name_length > length:
                    raise ValueError("its entries are damaged")
                name = block[position + 8 : position + 8 + name_length]
                # Checksums stand in an entry of type 0xDE without an inode.
                if inode and name not in (b".", b".."):
                    yield name.decode("utf-8", "surrogateescape"), self.fs.get_inode(inode)
                position += length

    def _blocks_of(self, node: Any) -> Iterator[bytes]:
        size = self.fs.block_size
        for start, count in self._runs(node):
            if start is None:
                continue
            for block in range(start, start + count):
                data = _from(self.volume, block * size, size)
                if len(data) != size:
                    raise EOFError("the volume ends before its file system does")
                yield data

    def info(self, node: Any) -> Info:
        inode = node.inode
        if not inode.i_links_count or not inode.i_mode:
            raise ValueError("its inode is not in use")
        kind, what = kind_of(inode.i_mode)
        # With an old, small inode the fields behind it belong to the next one.
        extra = 0
        if self.fs.sb.s_inode_size > 128 and inode.i_extra_isize >= self._FIRST_EXTRA_FIELDS + 4:
            extra = inode.i_mtime_extra
        seconds = struct.unpack("<i", struct.pack("<I", inode.i_mtime))[0] + ((extra & 3) << 32)
        return Info(
            kind=kind,
            size=node.size,
            mtime_ns=seconds * 10**9 + (extra >> 2),
            mode=stat.S_IMODE(inode.i_mode),
            uid=inode.i_uid | inode.i_uid_high << 16,
            gid=inode.i_gid | inode.i_gid_high << 16,
            inode=node.inum,
            what=what,
        )

    def link(self, node: Any) -> str:
        if node.inode.i_flags & self._ENCRYPTED:
            raise Unreadable("it is encrypted")
        return str(node.link)

    def read(self, node: Any) -> Iterator[Piece]:
        flags = node.inode.i_flags
        if flags & self._ENCRYPTED:
            raise Unreadable("it is encrypted")
        if flags & self._INLINE:
            if node.size > 60:
                raise Unreadable("its data lie in its extended attributes")
            yield bytes(node.inode.i_block)[: node.size]
            return
        yield from self._by_runs(self._runs(node), node.size, self.fs.block_size)

    def _runs(self, node: Any) -> List[Run]:
        if node.inode.i_flags & self._EXTENTS:
            runs = [run for run in node.dataruns() if run[1]]
            if any(count < 0 for dummy, count in runs):
                raise ValueError("its extents overlap")
            return runs
        count = -(-node.size // self.fs.block_size)
        return _merged(self._mapped(struct.unpack("<15I", bytes(node.inode.i_block)), count))

    def _mapped(self, pointers: Tuple[int, ...], count: int) -> Iterator[Optional[int]]:
        """The blocks of a file with a block map; a pointer of 0 is a hole, at each level."""
        per_block = self.fs.block_size // 4

        def below(pointer: int, level: int, wanted: int) -> Iterator[Optional[int]]:
            if level == 0:
                yield pointer or None
                return
            each = per_block ** (level - 1)
            if pointer == 0:
                for _number in range(min(wanted, each * per_block)):
                    yield None
                return
            table = _from(self.volume, pointer * self.fs.block_size, self.fs.block_size)
            for (next_pointer,) in struct.iter_unpack("<I", table):
                if wanted <= 0:
                    return
                yield from below(next_pointer, level - 1, wanted)
                wanted -= each

        for number in range(min(12, count)):
            yield pointers[number] or None
        left = count - 12
        for level in (1, 2, 3):
            if left <= 0:
                return
            yield from below(pointers[11 + level], level, left)
            left -= per_block**level
        if left > 0:
            raise ValueError("it is larger than its block map")


class Xfs(FileSystem):
    """XFS."""

    name = "xfs"

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        self.fs = parsers.xfs().XFS(volume)
        self.label = self.fs.name or None
        self.uuid = str(self.fs.uuid)

    @staticmethod
    def found(volume: BinaryIO) -> bool:
        return _from(volume, 0, 4) == b"XFSB"

    def root(self) -> Any:
        return self.fs.root

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        for child in node.iterdir():
            if child.filename not in (None, ".", ".."):
                yield child.filename, child

    def info(self, node: Any) -> Info:
        inode = node.inode
        if not inode.di_nlink or not inode.di_mode:
            raise ValueError("its inode is not in use")
        kind, what = kind_of(inode.di_mode)
        return Info(
            kind, node.size, node.mtime_ns, stat.S_IMODE(inode.di_mode), inode.di_uid, inode.di_gid, node.inum, what
        )

    def link(self, node: Any) -> str:
        return str(node.link)

    def read(self, node: Any) -> Iterator[Piece]:
        if node.inode.di_flags & 0x1:
            raise Unreadable("it lies on the real-time device")
        yield from self._by_runs(self._runs(node), node.size, self.fs.block_size)

    def _runs(self, node: Any) -> List[Run]:
        runs: List[Run] = []
        at = 0
        shift = node.ag.sb.sb_agblklog
        for offset, block, count, unwritten in node._iter_blocks():
            if offset < at:
                raise ValueError("its extents overlap")
            if offset > at:
                runs.append((None, offset - at))
            group, number = block >> shift, block & ((1 << shift) - 1)
            runs.append((None if unwritten else group * self.fs.sb.sb_agblocks + number, count))
            at = offset + count
            if len(runs) > _MOST_RUNS:
                raise ValueError("it has too many extents")
        return runs


class _Stub(NamedTuple):
    """A directory in the place of a subvolume that lies elsewhere, or is gone: in snapshots of what it lay in."""

    parent: Any
    name: str


class Btrfs(FileSystem):
    """btrfs on one device; its default subvolume, with those that lie in it.

    Where that is not the top level, the top level is one of the others: all subvolumes lie there.
    """

    name = "btrfs"

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        self.fs = parsers.btrfs().Btrfs(volume)
        self.label = self.fs.label or None
        self.uuid = str(self.fs.uuid)
        if self.fs.sb.num_devices != 1:
            raise Unreadable(f"it lies on {self.fs.sb.num_devices} devices")
        self._subvolume = self.fs.default_subvolume

    @staticmethod
    def found(volume: BinaryIO) -> bool:
        return _from(volume, 65536 + 64, 8) == b"_BHRfS_M"

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
        return str(node.link)

    def read(self, node: Any) -> Iterator[Piece]:
        size = node.size
        stream = node.open()
        if not hasattr(stream, "extents"):
            yield from stream_pieces(stream, size)
            return
        left = size
        for extent in stream.extents:
            length = min(extent.length, left)
            if length < 0:
                raise ValueError("its extents overlap")
            left -= length
            if not extent.disk_offset and not extent.disk_length:
                if length:
                    yield length
            elif extent.compression:
                yield self._decoded(extent, length)
            else:
                position = extent.disk_offset + extent.offset
                while length:
                    self.fs._logical_fh.seek(position)
                    data = self.fs._logical_fh.read(min(length, CHUNK_BYTES))
                    if not data:
                        raise EOFError("an extent lies outside the volume")
                    yield data
                    position += len(data)
                    length -= len(data)
            if not left:
                return
        if left:
            yield left

    def _decoded(self, extent: Any, length: int) -> bytes:
        """A part of a compressed extent. Zeros at its end are not stored."""
        if extent.disk_length > _MOST_COMPRESSED or extent.offset + length > _MOST_COMPRESSED:
            raise ValueError("a compressed extent is too large")
        self.fs._logical_fh.seek(extent.disk_offset)
        stored = self.fs._logical_fh.read(extent.disk_length)
        decoded = parsers.btrfs_stream().decode_extent(
            stored, extent.compression, extent.encryption, self.fs.sector_size
        )
        return bytes(decoded[extent.offset : extent.offset + length].ljust(length, b"\0"))


class Ntfs(FileSystem):
    """NTFS. It has no owners and modes that mean anything here; alternate streams are left out."""

    name = "ntfs"
    ignores_case = True

    _COMPRESSED, _ENCRYPTED = 0x00FF, 0x4000

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        self.fs = parsers.ntfs().NTFS(volume)
        with contextlib.suppress(*broken()):
            self.label = self.fs.volume_name or None
        self.uuid = f"{self.fs.serial:016x}" if self.fs.serial is not None else None

    @staticmethod
    def found(volume: BinaryIO) -> bool:
        return _from(volume, 3, 8) == b"NTFS    "

    def root(self) -> Any:
        return self.fs.mft.root

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        for entry in node.iterdir(ignore_dos=True):
            name = entry.attribute.file_name
            if name == "." or (node.segment == 5 and name.startswith("$")):
                continue
            yield name, entry.dereference()

    def info(self, node: Any) -> Info:
        if node.is_symlink() or node.is_mount_point():
            kind, size = LINK, 0
        elif node.is_dir():
            kind, size = DIRECTORY, 0
        else:
            kind, size = FILE, node.size()
        times = node.attributes.STANDARD_INFORMATION
        return Info(kind, size, times.last_modification_time_ns, inode=node.segment)

    def link(self, node: Any) -> str:
        point = node.attributes.REPARSE_POINT
        target = str(point.print_name or point.substitute_name)
        # A link to a path with a drive letter leads nowhere here; it stays readable.
        return target.replace("\\", "/")

    def read(self, node: Any) -> Iterator[Piece]:
        size = node.size()
        if not size:
            return
        attributes = node.attributes.DATA
        unnamed = [attribute for attribute in attributes if not attribute.name]
        header = unnamed[0].header
        if header.flags & self._ENCRYPTED:
            raise Unreadable("it is encrypted (EFS)")
        stream = node.open()
        if header.resident:
            yield from stream_pieces(stream, size)
            return
        # Behind the valid length a file reads as zeros, whatever its clusters hold.
        first = min(unnamed, key=lambda attribute: int(attribute.header.lowest_vcn or 0)).header
        valid = min(size, int(first.header.Form.Nonresident.ValidDataLength))
        if header.flags & self._COMPRESSED:
            yield from stream_pieces(stream, valid)
        else:
            yield from self._by_runs(list(stream.runlist), valid, self.fs.cluster_size)
        if valid < size:
            yield size - valid


class Fat(FileSystem):
    """FAT12, FAT16 and FAT32. Its times are local ones; they are taken for UTC."""

    name = "fat"
    ignores_case = True

    _LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        self.fs = parsers.fat().FATFS(volume)
        self.label = self.fs.volume_label.strip() or None
        with contextlib.suppress(*broken()):
            self.uuid = str(self.fs.volume_id)

    @staticmethod
    def found(volume: BinaryIO) -> bool:
        sector = _from(volume, 0, 512)
        return (
            sector[510:512] == b"\x55\xaa"
            and (sector[54:57] == b"FAT" or sector[82:85] == b"FAT")
            and sector[13] in (1, 2, 4, 8, 16, 32, 64, 128)
        )

    def root(self) -> Any:
        return self.fs.root

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        if node is not self.fs.root or self.fs.root.cluster:
            # In place of the parser's own, which does not end if the chain goes in a circle.
            node._runlist = _merged(iter(self._chain(node.cluster, _MOST_DIRECTORY // self.fs.cluster_size + 1)))
        for child in node.iterdir():
            if child.name not in (".", "..") and not child.is_volume_id():
                yield self._name_of(child), child

    def _name_of(self, node: Any) -> str:
        """The long name; the short one in lower case where its entry says so."""
        if node.ldirents:
            return str(node.name)
        base, dot, extension = str(node.short_name).partition(".")
        flags = node.dirent.DIR_NTRes
        if flags & self._LOWER_BASE:
            base = base.lower()
        if flags & self._LOWER_EXTENSION:
            extension = extension.lower()
        return base + dot + extension

    def info(self, node: Any) -> Info:
        directory = node is self.fs.root or node.is_directory()
        mtime = 0
        if node is not self.fs.root:
            # Many tools leave the date out.
            with contextlib.suppress(*broken()):
                mtime = parsers.utc_ns(node.mtime)
        if directory:
            return Info(DIRECTORY, 0, mtime, inode=node.cluster)
        return Info(FILE, node.size, mtime, inode=None)

    def read(self, node: Any) -> Iterator[Piece]:
        size = node.size
        if not size:
            return
        cluster = self.fs.cluster_size
        needed = -(-size // cluster)
        clusters = self._chain(node.cluster, needed)
        if len(clusters) < needed:
            raise ValueError("its chain of clusters is too short")
        yield from self._clusters(_merged(iter(clusters)), size, cluster)

    def _chain(self, first: int, most: int) -> List[Optional[int]]:
        """The first *most* clusters of a chain, as blocks of the data area."""
        clusters: List[Optional[int]] = []
        seen = set()
        for number in self.fs.fat.chain(first):
            if number < 2 or number in seen:
                raise ValueError("its chain of clusters is damaged")
            seen.add(number)
            clusters.append(number - 2)
            if len(clusters) >= most:
                break
        return clusters

    def _clusters(self, runs: List[Run], size: int, cluster: int) -> Iterator[Piece]:
        data_area = self.fs.data_stream
        left = size
        for start, count in runs:
            length = min(count * cluster, left)
            position = int(start or 0) * cluster
            left -= length
            while length:
                data_area.seek(position)
                data = data_area.read(min(length, CHUNK_BYTES))
                if not data:
                    raise EOFError("the volume ends before its file system does")
                yield data
                position += len(data)
                length -= len(data)


KINDS: Tuple[Type[FileSystem], ...] = (Ntfs, Ext, Xfs, Btrfs, Fat)


def open_file_system(volume: BinaryIO, size: int) -> Optional[FileSystem]:
    """The file system of a volume; None if it holds none that is known.

    :raises Unreadable: it holds one that can't be read. Any of broken(): it is damaged.
    """
    for kind in KINDS:
        if kind.found(volume):
            made: Callable[[BinaryIO, int], FileSystem] = kind
            return made(volume, size)
    return None


# (offset, bytes there, what it is)
_FOREIGN: Tuple[Tuple[int, bytes, str], ...] = (
    (0, b"hsqs", "squashfs"),
    (3, b"EXFAT   ", "exfat"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (1024, b"H+\0\4", "hfsplus"),
    (1024, b"HX\0\5", "hfsplus"),
    (32768, b"JFS1", "jfs"),
    (32769, b"CD001", "iso9660"),
    (32769, b"BEA01", "udf"),
    (65588, b"ReIsEr", "reiserfs"),
    (3, b"ReFS\0\0\0\0", "refs"),
    (32, b"NXSB", "apfs"),
)


def guess(volume: BinaryIO) -> Dict[str, str]:
    """What a volume without a file system that can be read holds: {"type", "why"}."""
    head = _from(volume, 0, 4096)
    for begin, kind, why in (
        (b"-FVE-FS-", "bitlocker", "it is encrypted by BitLocker"),
        (b"LUKS\xba\xbe", "luks", "it is encrypted by LUKS"),
    ):
        if head[3:11] == begin or head[:6] == begin:
            return {"type": kind, "why": why}
    if head[4086:4096] == b"SWAPSPACE2":
        return {"type": "swap", "why": "it is swap space"}
    for offset, magic, kind in _FOREIGN:
        if _from(volume, offset, len(magic)) == magic:
            return {"type": kind, "why": f"dissect's libraries don't read {kind}"}
    if _from(volume, 0, 1 << 20).count(0) == 1 << 20:
        return {"type": "empty", "why": "it begins with zeros"}
    return {"type": "unknown", "why": "no known file system begins there"}
