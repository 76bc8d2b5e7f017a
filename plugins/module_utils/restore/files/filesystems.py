# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which file system a volume holds."""

from __future__ import annotations

from typing import BinaryIO, Callable, Dict, Optional, Tuple, Type

from .btrfs import Btrfs
from .ext import Ext
from .fat import Fat
from .filesystem import FileSystem, Unreadable, bytes_at
from .ntfs import Ntfs
from .xfs import Xfs

KINDS: Tuple[Type[FileSystem], ...] = (Ntfs, Ext, Xfs, Btrfs, Fat)
_BEGIN_BYTES = 1 << 20

# (offset, bytes there, what it is)
_FOREIGN: Tuple[Tuple[int, bytes, str], ...] = (
    (0, b"hsqs", "squashfs"),
    (0, b"\x45\x3d\xcd\x28", "cramfs"),
    (0, b"-rom1fs-", "romfs"),
    (3, b"EXFAT   ", "exfat"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (1024, b"H+\0\4", "hfsplus"),
    (1024, b"HX\0\5", "hfsplus"),
    (1024, b"BD\0", "hfs"),
    (1024 + 6, b"\x34\x34", "nilfs2"),
    (1024 + 16, b"\x7f\x13", "minix"),
    (1024 + 16, b"\x8f\x13", "minix"),
    (1024 + 16, b"\x68\x24", "minix"),
    (1024 + 16, b"\x78\x24", "minix"),
    (1024 + 24, b"\x5a\x4d", "minix"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "bcachefs"),
    (8192, b"OCFSV2", "ocfs2"),
    (1024, b"OCFSV2", "ocfs2"),
    (2048, b"OCFSV2", "ocfs2"),
    (4096, b"OCFSV2", "ocfs2"),
    (65536, b"\x01\x16\x19\x70", "gfs2"),
    (8192 + 1372, b"\x54\x19\x01\x00", "ufs"),
    (65536 + 1372, b"\x19\x01\x54\x19", "ufs"),
    (32768, b"JFS1", "jfs"),
    (32769, b"CD001", "iso9660"),
    (32769, b"BEA01", "udf"),
    (65588, b"ReIsEr", "reiserfs"),
    (65536, b"ReIsEr4", "reiser4"),
    (3, b"ReFS\0\0\0\0", "refs"),
    (32, b"NXSB", "apfs"),
)
# What has a volume in it and is none, or needs a key first. Whoever makes it may leave the file system that lay there
# before, some sectors behind. So these count first.
_CONTAINERS: Tuple[Tuple[int, bytes, str, str], ...] = (
    (3, b"-FVE-FS-", "bitlocker", "it is encrypted by BitLocker"),
    (
        424,
        b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01",
        "bitlocker",
        "it is encrypted by BitLocker",
    ),
    (0, b"LUKS\xba\xbe", "luks", "it is encrypted by LUKS"),
    (
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        "bcache",
        "it is a part of a bcache",
    ),
    (0, b"integrt\0", "dm-integrity", "it is held by dm-integrity"),
    (0, b"verity\0\0", "dm-verity", "it holds checksums of another device (dm-verity)"),
    (0, b"dmvdo001", "vdo", "it is the store of a VDO volume"),
    (0, b"SnAp", "snapshot", "it is the store of a snapshot"),
    (0, b"HM\1\0", "lvm1", "it is a part of LVM 1"),
    (0, b"HM\2\0", "lvm1", "it is a part of LVM 1"),
    (516, b"!Stra0tis\x86\xff\x02^\x41rh", "stratis", "it is a part of a Stratis pool"),
    (0, b"bluestore block device", "bluestore", "it is a store of Ceph"),
    (32, b"ORCLDISK", "oracleasm", "it is a part of an Oracle ASM disk group"),
    (1 << 20, b"\x0d\xd0\x01\xc0", "VMFS_volume_member", "it is a part of a VMFS datastore"),
    (0x200000, b"\x5e\xf1\xab\x2f", "VMFS", "it is a VMFS datastore"),
)
# A pool's label has a ring of uberblocks, each with this.
_ZFS, _ZFS_RING, _ZFS_STEP, _ZFS_MAGIC = "zfs_member", 128 << 10, 1024, 0x00BAB10C
# What has nothing to read in it.
_SWAP = (b"SWAPSPACE2", b"SWAP-SPACE")
_PAGES = (4096, 8192, 16384, 65536)
#: The types of containers: nobody here reads them.
CONTAINERS = tuple(dict.fromkeys([_ZFS, *(kind for dummy, magic, kind, why in _CONTAINERS)]))


def type_of(volume: BinaryIO) -> Optional[str]:
    """The type of file system that a volume begins with; None if it is none of :data:`KINDS`.

    :raises Contained: something else lies there. Unreadable: it begins as two of them do.
    """
    found = _class_of(volume)
    return None if found is None else found[1]


def _class_of(volume: BinaryIO) -> Optional[Tuple[Type[FileSystem], str]]:
    """:raises Unreadable: it is a container, or begins as two file systems do."""
    container = _container(volume)
    if container is not None:
        raise Contained(*container)
    found = [(kind, name) for kind, name in ((kind, kind.begins(volume)) for kind in KINDS) if name is not None]
    if len(found) > 1:
        told = " and ".join(name for dummy, name in found)
        raise Unreadable(f"it begins as {told} do: one of them is a remnant, and nobody can tell which")
    return found[0] if found else None


class Contained(Unreadable):
    """A volume is not a file system, whatever it looks like behind its begin.

    :param kind: the type of it.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def _container(volume: BinaryIO) -> Optional[Tuple[str, str]]:
    """(type, why) of what has a volume in it."""
    for offset, magic, kind, why in _CONTAINERS:
        if bytes_at(volume, offset, len(magic)) == magic:
            return kind, why
    ring = bytes_at(volume, _ZFS_RING, _ZFS_RING)
    magics = {_ZFS_MAGIC.to_bytes(8, "little"), _ZFS_MAGIC.to_bytes(8, "big")}
    blocks = sum(ring[at : at + 8] in magics for at in range(0, len(ring), _ZFS_STEP))
    # A file system's own blocks may lie there: one of them is a chance, several are a ring.
    return (_ZFS, "it is a part of a ZFS pool") if blocks > 3 else None


def open_file_system(volume: BinaryIO, size: int) -> Optional[FileSystem]:
    """The file system of a volume; None if it holds none that is known.

    :raises Unreadable: it holds one that can't be read. Any of broken(): it is damaged.
    """
    found = _class_of(volume)
    if found is None:
        return None
    made: Callable[[BinaryIO, int], FileSystem] = found[0]
    return made(volume, size)


def guess(volume: BinaryIO) -> Dict[str, str]:
    """What a volume without a file system that can be read holds: {"type", "why"}."""
    if any(bytes_at(volume, page - 10, 10) in _SWAP for page in _PAGES):
        return {"type": "swap", "why": "it is swap space"}
    for offset, magic, kind in _FOREIGN:
        if bytes_at(volume, offset, len(magic)) == magic:
            return {"type": kind, "why": f"only libguestfs reads {kind}"}
    begin = bytes_at(volume, 0, _BEGIN_BYTES)
    if begin.count(0) == len(begin):
        return {"type": "empty", "why": "it begins with zeros"}
    return {"type": "unknown", "why": "no known file system begins there"}
