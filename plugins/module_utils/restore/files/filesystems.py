# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which file system a volume holds."""

from __future__ import annotations

from typing import BinaryIO, Callable, Dict, Optional, Tuple, Type

from .btrfs import Btrfs
from .ext import Ext
from .fat import Fat
from .filesystem import FileSystem, bytes_at
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
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"),
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
# What has nothing to read in it, or needs a key first.
_SWAP = (b"SWAPSPACE2", b"SWAP-SPACE")
_PAGES = (4096, 8192, 16384, 65536)


def type_of(volume: BinaryIO) -> Optional[str]:
    """The type of file system that a volume begins with; None if it is none of :data:`KINDS`."""
    found = _class_of(volume)
    return None if found is None else found[1]


def _class_of(volume: BinaryIO) -> Optional[Tuple[Type[FileSystem], str]]:
    for kind in KINDS:
        name = kind.begins(volume)
        if name is not None:
            return kind, name
    return None


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
    head = bytes_at(volume, 0, 4096)
    for begin, kind, why in (
        (b"-FVE-FS-", "bitlocker", "it is encrypted by BitLocker"),
        (b"LUKS\xba\xbe", "luks", "it is encrypted by LUKS"),
    ):
        if head[3:11] == begin or head[:6] == begin:
            return {"type": kind, "why": why}
    if any(bytes_at(volume, page - 10, 10) in _SWAP for page in _PAGES):
        return {"type": "swap", "why": "it is swap space"}
    for offset, magic, kind in _FOREIGN:
        if bytes_at(volume, offset, len(magic)) == magic:
            return {"type": kind, "why": f"only libguestfs reads {kind}"}
    begin = bytes_at(volume, 0, _BEGIN_BYTES)
    if begin.count(0) == len(begin):
        return {"type": "empty", "why": "it begins with zeros"}
    return {"type": "unknown", "why": "no known file system begins there"}
