# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a partition or disk is before any file system is looked for: a volume of its own, or a part of something larger.

A member of an array, of a Windows dynamic disk or of a pool may begin as a file system does, and end within it.
"""

from __future__ import annotations

import struct
import uuid
from typing import BinaryIO, NamedTuple, Optional, Tuple

from ...transport.disk_format import Partition
from .filesystem import bytes_at

MD, LDM, RAID, DRBD = "linux_raid_member", "ldm", "raid_member", "drbd"

# Types of MBR partitions that hold a file system, swap space, nothing, or what its own label tells (LVM, md).
_MBR_VOLUMES = frozenset(
    (
        *("01", "04", "06", "07", "0b", "0c", "0e", "11", "14", "16", "17", "1b", "1c", "1e", "27", "39", "41", "4d"),
        *("4e", "4f", "80", "81", "82", "83", "84", "86", "87", "8e", "93", "af", "b7", "bc", "c0", "da", "de", "df"),
        *("ea", "eb", "ef", "fd"),
    )
)
_MBR_NAMES = {
    "42": "dynamic disk (LDM)",
    "a5": "FreeBSD slice",
    "a6": "OpenBSD slice",
    "a8": "Apple UFS",
    "a9": "NetBSD slice",
    "bf": "Solaris slice",
    "be": "Solaris boot",
    "e7": "Storage Spaces",
    "fb": "VMFS",
    "fc": "VMKCORE",
    "ee": "GPT",
}
# Of GPT partitions: the same. Those of the Discoverable Partitions Specification are what systemd mounts by itself.
_GPT_VOLUMES = frozenset(
    (
        "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7",
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
        "e3c9e316-0b5c-4db8-817d-f92df00215ae",
        "de94bba4-06d1-4d40-a16a-bfd50179d6ac",
        "0fc63daf-8483-4772-8e79-3d69d8477de4",
        "21686148-6449-6e6f-744e-656564454649",
        "bc13c2ff-59e6-4262-a352-b275fd6f7172",
        "e6d6d379-f507-44c2-a23c-238f2a3df928",
        "a19d880f-05fc-4d3b-a006-743f0f84911e",
        "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",
        "933ac7e1-2eb4-4f13-b844-0e14e2aef915",
        "3b8f8425-20e0-4f3b-907f-1a25a76f98e8",
        "4d21b016-b534-45c2-a9fb-5c16e091fd2d",
        "7ec6f557-3bc5-4aca-b293-16ef5df639d1",
        "773f91ef-66d4-49b5-bd83-d683bf40ad16",
        "44479540-f297-41b2-9af7-d131d5f0458a",
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
        "69dad710-2ce4-4e3c-b16c-21a1d49abed3",
        "b921b045-1df0-41c3-af44-4c6f280d3fae",
        "72ec70a6-cf74-40e6-bd49-4bda08e8f224",
        "c31c45e6-3f39-412e-80fb-4809c4980599",
        "912ade1d-a839-4913-8964-a10eee08fbd2",
        "75250d76-8cc6-458e-bd66-bd47cc81a812",
        "8484680c-9521-48c6-9c11-b0720656f69e",
        "b0e01050-ee5f-4390-949a-9101b17104e9",
        "5843d618-ec37-48d7-9f12-cea8e08768b2",
        "7d0359a3-02b3-4f0a-865c-654403e70625",
        "8da63339-0007-60c0-c436-083ac8230908",
        "ca7d7ccb-63ed-4c53-861c-1742536059cc",
        "7ffec5c9-2d00-49b7-8941-3ea10a5586b7",
        "9e1a2d38-c612-4316-aa26-8b49521e5a8b",
        "d3bfe2de-3daf-11df-ba40-e3a556d89593",
        "024dee41-33e7-11d3-9d69-0008c781f39f",
        "48465300-0000-11aa-aa11-00306543ecac",
        "83bd6b9d-7f41-11dc-be0b-001560b84f0f",
        "b3d5e3d0-0000-11aa-aa11-00306543ecac",
    )
)
_GPT_NAMES = {
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "metadata of a dynamic disk (LDM)",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "data of a dynamic disk (LDM)",
    "e75caf8f-f680-4cee-afa3-b001e56efc2d": "Storage Spaces",
    "37affc90-ef7d-4e96-91c3-2d7ae055b174": "GPFS",
    "6a898cc3-1dd2-11b2-99a6-080020736631": "ZFS",
    "516e7cba-6ecf-11d6-8ff8-00022d09712b": "FreeBSD ZFS",
    "516e7cb4-6ecf-11d6-8ff8-00022d09712b": "FreeBSD slice",
    "aa31e02a-400f-11db-9590-000c2911d1b8": "VMFS",
    "7c3457ef-0000-11aa-aa11-00306543ecac": "APFS",
    "53746f72-6167-11aa-aa11-00306543ecac": "Apple Core Storage",
    "4fbd7e29-9d25-41b8-afd0-062c0ceff05d": "Ceph",
}

_MD_MAGIC = 0xA92B4EFC
# Where Promise's controllers put what they say, in sectors before the end.
_PROMISE = (63, 255, 256, 16, 399, 591, 675, 735, 911, 974, 991, 951, 3087)
_SECTOR = 512


class Member(NamedTuple):
    """That something is a part of something larger.

    :param identity: what no other part has; None if it is not known.
    :param place: where what says so lies, from the begin of the part.
    """

    kind: str
    why: str
    identity: Optional[Tuple[str, int]]
    place: int


def not_a_volume(entry: Partition) -> Optional[Tuple[str, str]]:
    """(type, why) of a partition that is not a volume of its own, by its type; None if it may be one."""
    if entry.kind in _MBR_VOLUMES or entry.kind in _GPT_VOLUMES:
        return None
    name = _MBR_NAMES.get(entry.kind) or _GPT_NAMES.get(entry.kind)
    why = f"its partition is of type {entry.kind}" + (f", {name}" if name else "")
    if name and "LDM" in name:
        return LDM, f"{why}: volumes may go on elsewhere"
    return "other", f"{why}, which this reader does not know"


def member_of(stream: BinaryIO, size: int) -> Optional[Member]:
    """What a partition or disk is a part of, by what its members carry; None if it carries nothing of the kind.

    LVM has labels of its own, and file systems over several devices tell so themselves.
    """
    return _md(stream, size) or _others(stream, size)


def _md(stream: BinaryIO, size: int) -> Optional[Member]:
    sectors = size // _SECTOR
    for place in (4096, 0, ((sectors - 16) & ~7) * _SECTOR):
        if place < 0:
            continue
        block = bytes_at(stream, place, 256)
        if len(block) < 256 or struct.unpack_from("<II", block) != (_MD_MAGIC, 1):
            continue
        (own,) = struct.unpack_from("<Q", block, 144)
        if own * _SECTOR == place:
            (number,) = struct.unpack_from("<I", block, 160)
            return _md_member(str(uuid.UUID(bytes=block[16:32])), number, block[32:64], place)
    place = (size & ~0xFFFF) - 0x10000
    block = bytes_at(stream, place, 4096) if place >= 0 else b""
    for order in "<>":
        if len(block) == 4096 and struct.unpack_from(order + "II", block) == (_MD_MAGIC, 0):
            parts = (struct.unpack_from(order + "I", block, 20)[0], *struct.unpack_from(order + "3I", block, 52))
            (number,) = struct.unpack_from(order + "I", block, 3968)
            return _md_member("".join(f"{part:08x}" for part in parts), number, b"", place)
    return None


def _md_member(identity: str, number: int, name: bytes, place: int) -> Member:
    text = name.split(b"\0")[0].decode("utf-8", "replace")
    called = f" '{text}'" if text else ""
    return Member(MD, f"it is a part of the array{called} {identity} (md)", (identity, number), place)


def _others(stream: BinaryIO, size: int) -> Optional[Member]:
    end = (size & ~0xFFF) - 4096
    if end >= 0 and bytes_at(stream, end + 60, 3) == b"\x83\x74\x02":
        return Member(DRBD, "it is a part of a replicated device (DRBD)", None, end)
    last = (size & ~(_SECTOR - 1)) - _SECTOR
    for place, magic, name in (
        (last - _SECTOR, b"Intel Raid ISM Cfg Sig.", "Intel RST"),
        (last, b"\xde\x11\xde\x11", "DDF"),
        (last, b"\x11\xde\x11\xde", "DDF"),
        (last, b"$XIDE$", "LSI MegaRAID"),
        (last, b"\x37\xfc\x4d\x1e", "Adaptec HostRAID"),
        (last - _SECTOR, b"NVIDIA  ", "NVIDIA MediaShield"),
        (last - 10 * _SECTOR, b"\xf3\x16\x78\x5a", "HighPoint"),
        (last - 10 * _SECTOR, b"\xfd\x16\x78\x5a", "HighPoint"),
        *(
            (last + _SECTOR - sectors * _SECTOR, b"Promise Technology, Inc.", "Promise FastTrak")
            for sectors in _PROMISE
        ),
    ):
        if place >= 0 and bytes_at(stream, place, len(magic)) == magic:
            return Member(RAID, f"it is a part of an array of a RAID controller ({name})", None, place)
    return None
