# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is not known to be read right is refused by its name: at each layer from the partition to the extent."""

from __future__ import annotations

import os
import random
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import parsers
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystem import Unreadable
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystems import open_file_system, type_of

EXTENT = 1 << 20
GROUP_ID = "Grp111-1111-1111-1111-1111-1111-111111"


def image_of(folder: Path, size: int) -> Path:
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size)
    return image


def ext4_of(c: Any, folder: Path, size: int, **files: str) -> bytes:
    """An ext4 with these files."""
    tree = folder / f"tree-{len(list(folder.iterdir()))}"
    tree.mkdir()
    for name, text in files.items():
        (tree / name).write_text(text)
    image = Path(f"{tree}.img")
    image.touch()
    os.truncate(image, size)
    c.tool("mkfs.ext4", "-q", "-F", "-d", tree, image)
    return image.read_bytes()


# Partitions and disks


def mbr(entries: Sequence[Tuple[int, int, int]]) -> bytes:
    table = b"".join(struct.pack("<B3xB3xII", 0, kind, start // 512, size // 512) for kind, start, size in entries)
    return (bytes(446) + table).ljust(510, b"\0") + b"\x55\xaa"


@pytest.mark.parametrize(
    ("kind", "type_told", "why"),
    [
        (0x42, "ldm", "dynamic disk"),
        (0xA5, "other", "FreeBSD slice"),
        (0xFC, "other", "VMKCORE"),
        (0x77, "other", "type 77"),
    ],
)
def test_a_partition_of_another_kind_is_no_volume(
    c: Any, look: Any, tmp_path: Path, kind: int, type_told: str, why: str
) -> None:
    system = ext4_of(c, tmp_path, 4 * c.MIB, inside="x")
    table = mbr([(kind, c.MIB, len(system)), (0x83, 5 * c.MIB, len(system))])
    volumes = look((table.ljust(c.MIB, b"\0") + system * 2).ljust(10 * c.MIB, b"\0")).volumes
    assert volumes["2000p2"][:2] == ("ext4", True)
    assert volumes["2000p1"][:2] == (type_told, False) and why in volumes["2000p1"][2]


@pytest.mark.parametrize(
    "kind",
    [
        "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3",
        "af9b60a0-1431-4f62-bc68-3311714a69ad",
        "e75caf8f-f680-4cee-afa3-b001e56efc2d",
        "12345678-1234-1234-1234-123456789abc",
    ],
)
def test_a_gpt_partition_of_another_kind_is_no_volume(c: Any, look: Any, tmp_path: Path, kind: str) -> None:
    system = ext4_of(c, tmp_path, 4 * c.MIB, inside="x")
    image = image_of(tmp_path, 8 * c.MIB)
    c.tool("sfdisk", "-q", image, input=f"label: gpt\nstart=2048, size=8192, type={kind}\n".encode())
    data = bytearray(image.read_bytes())
    data[c.MIB : 5 * c.MIB] = system
    image.write_bytes(data)
    looked = look(image.read_bytes())
    assert looked.volumes["2000p1"][1] is False and kind in looked.volumes["2000p1"][2]


def md_one(place: int, number: int = 0) -> bytes:
    """A superblock of version 1 that lies there."""
    block = bytearray(256)
    struct.pack_into("<III", block, 0, 0xA92B4EFC, 1, 0)
    block[16:32] = uuid.UUID(int=7).bytes
    block[32:39] = b"host:r1"
    struct.pack_into("<Q", block, 144, place // 512)
    struct.pack_into("<I", block, 160, number)
    return bytes(block)


@pytest.mark.parametrize("where", ["at the end of the disk", "of version 0.90", "in a partition"])
def test_a_member_of_an_array_is_no_volume(c: Any, look: Any, tmp_path: Path, where: str) -> None:
    """Superblocks at the end leave what looks like a whole file system, stale if the array was degraded."""
    size = 8 * c.MIB
    system = ext4_of(c, tmp_path, 4 * c.MIB, inside="stale")
    if where == "in a partition":
        data = bytearray(mbr([(0xFD, c.MIB, 6 * c.MIB)]).ljust(c.MIB, b"\0") + system).ljust(size, b"\0")
        place = 6 * c.MIB - 8192
        data[c.MIB + place : c.MIB + place + 256] = md_one(place)
        name = "2000p1"
    else:
        data = bytearray(system.ljust(size, b"\0"))
        name = "2000"
        if where == "of version 0.90":
            struct.pack_into("<II", data, size - 65536, 0xA92B4EFC, 0)
        else:
            data[size - 8192 : size - 8192 + 256] = md_one(size - 8192)
    image = image_of(tmp_path, size)
    image.write_bytes(data)
    looked = look(image.read_bytes())
    kind, readable, problem = looked.volumes[name]
    assert (kind, readable) == ("linux_raid_member", False) and "a part of the array" in problem


REMNANTS = [
    (0, b"LUKS\xba\xbe", "luks"),
    (3, b"-FVE-FS-", "bitlocker"),
    (424, bytes.fromhex("3bd66749292ed84a8399f6a339e3d001"), "bitlocker"),
    (4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "bcache"),
    (0, b"SnAp", "snapshot"),
    (516, b"!Stra0tis\x86\xff\x02^\x41rh", "stratis"),
    (0, b"dmvdo001", "vdo"),
    (0, b"bluestore block device", "bluestore"),
    (32, b"ORCLDISK", "oracleasm"),
    (1 << 20, b"\x0d\xd0\x01\xc0", "VMFS_volume_member"),
]


@pytest.mark.parametrize(("place", "magic", "kind"), REMNANTS)
def test_a_container_over_what_was_a_file_system(
    c: Any, look: Any, tmp_path: Path, place: int, magic: bytes, kind: str
) -> None:
    """luksFormat leaves the superblock of an ext4 as it was: ciphertext came out as files."""
    data = bytearray(ext4_of(c, tmp_path, 8 * c.MIB, inside="stale"))
    data[place : place + len(magic)] = magic
    looked = look(bytes(data))
    assert looked.volumes["2000"][:2] == (kind, False) and looked.files == {}


def test_a_pool_of_zfs_over_what_was_a_file_system(c: Any, look: Any, tmp_path: Path) -> None:
    data = bytearray(ext4_of(c, tmp_path, 8 * c.MIB, inside="stale"))
    for number in range(8):
        struct.pack_into("<Q", data, (128 << 10) + 1024 * number, 0x00BAB10C)
    assert look(bytes(data)).volumes["2000"] == ("zfs_member", False, "it is a part of a ZFS pool")


def test_what_begins_as_two_file_systems_do(c: Any, look: Any, tmp_path: Path) -> None:
    data = bytearray(ext4_of(c, tmp_path, 8 * c.MIB, inside="stale"))
    data[:4] = b"XFSB"
    kind, readable, problem = look(bytes(data)).volumes["2000"]
    assert not readable and "begins as ext4 and xfs do" in problem


@pytest.mark.parametrize(
    ("before_end", "magic"),
    [
        (1024, b"Intel Raid ISM Cfg Sig."),
        (512, b"\xde\x11\xde\x11"),
        (512, b"$XIDE$"),
        (512, b"\x37\xfc\x4d\x1e"),
        (1024, b"NVIDIA  "),
        (11 * 512, b"\xf3\x16\x78\x5a"),
        (63 * 512, b"Promise Technology, Inc."),
    ],
)
def test_what_a_raid_controller_left_at_the_end(
    c: Any, look: Any, tmp_path: Path, before_end: int, magic: bytes
) -> None:
    data = bytearray(ext4_of(c, tmp_path, 4 * c.MIB, inside="stale").ljust(8 * c.MIB, b"\0"))
    data[len(data) - before_end : len(data) - before_end + len(magic)] = magic
    assert look(bytes(data)).volumes["2000"][:2] == ("raid_member", False)


def test_the_partitions_of_a_disk_in_an_array_are_no_volumes(c: Any, look: Any, tmp_path: Path) -> None:
    size = 8 * c.MIB
    system = ext4_of(c, tmp_path, 4 * c.MIB, inside="stale")
    data = bytearray(mbr([(0x83, c.MIB, len(system))]).ljust(c.MIB, b"\0") + system).ljust(size, b"\0")
    data[size - 1024 : size - 1001] = b"Intel Raid ISM Cfg Sig."
    image = image_of(tmp_path, size)
    image.write_bytes(data)
    looked = look(image.read_bytes())
    assert looked.volumes["2000p1"][:2] == ("raid_member", False)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "ntfs", "fat", "btrfs"])
def test_a_file_system_larger_than_its_volume_goes_on_elsewhere(c: Any, look: Any, tmp_path: Path, kind: str) -> None:
    size = (112 if kind == "btrfs" else 48) * c.MIB
    image = image_of(tmp_path, size)
    words = {
        "ext4": ["mkfs.ext4", "-q", "-F"],
        "xfs": ["mkfs.xfs", "-q"],
        "ntfs": ["mkntfs", "-q", "-Q", "-F", "-s", "512", "-p", "0", "-H", "255", "-S", "63"],
        "fat": ["mkfs.fat", "-F", "16"],
        "btrfs": ["mkfs.btrfs", "-q"],
    }[kind]
    c.tool(*words, image)
    os.truncate(image, size - c.MIB)
    looked = look(image.read_bytes())
    type_told, readable, problem = looked.volumes["2000"]
    assert (type_told, readable) == (kind, False) and "the rest lies on another" in problem


# Features and flags


@pytest.mark.parametrize(
    ("kind", "offset", "order", "bits"),
    [
        ("ext4", 1024 + 96, "<I", [0x1, 0x8, 0x1000, 0x80000000]),
        ("ext4", 1024 + 100, "<I", [0x80, 0x800, 0x40000000]),
        ("xfs", 216, ">I", [0x10, 0x100, 0x80000000]),
        ("xfs", 212, ">I", [0x10, 0x80000000]),
        ("btrfs", 65536 + 188, "<Q", [0x80, 0x1000, 0x2000, 0x4000, 1 << 62]),
        ("btrfs", 65536 + 180, "<Q", [0x10, 1 << 62]),
        ("btrfs", 65536 + 56, "<Q", [1 << 33, 1 << 62]),
    ],
)
def test_a_feature_that_is_not_known(
    c: Any, tmp_path: Path, kind: str, offset: int, order: str, bits: List[int]
) -> None:
    image = image_of(tmp_path, (112 if kind == "btrfs" else 48) * c.MIB)
    c.tool(*{"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}[kind], image)
    with image.open("r+b", buffering=0) as file:
        assert open_file_system(file, image.stat().st_size) is not None
        file.seek(offset)
        (value,) = struct.unpack(order, file.read(struct.calcsize(order)))
        for bit in bits:
            file.seek(offset)
            file.write(struct.pack(order, value | bit))
            # The other reader is asked, for what it is known to be.
            assert type_of(file) == kind
            with pytest.raises(Unreadable, match="does not know"):
                open_file_system(file, image.stat().st_size)


def test_an_inode_with_flags_that_are_not_known(c: Any, look: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("compressed", "plain"):
        (tree / name).write_text(name)
    image = image_of(tmp_path, 8 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-d", tree, image)
    c.tool("debugfs", "-w", "-R", "sif /compressed flags 0x80200", image)
    looked = look(image.read_bytes())
    assert looked.files[("2000", "/plain")] == b"plain"
    assert set(looked.skipped) == {"/compressed"} and "compressed" in looked.skipped["/compressed"]


# NTFS


def ntfs_of(c: Any, tmp_path: Path, *options: str) -> Path:
    image = image_of(tmp_path, 24 * c.MIB)
    c.tool("mkntfs", "-q", "-Q", "-F", "-s", "512", "-p", "0", "-H", "255", "-S", "63", *options, image)
    return image


TAGS = {
    0x80000013: "deduplication",
    0x80000017: "system compression (WOF)",
    0x9000001A: "cloud file",
    0x9000601A: "cloud file",
    0xC0000004: "hierarchical storage (HSM)",
    0x8000001E: "Azure File Sync",
    0x80001234: "reparse tag 0x80001234",
}


def test_files_whose_data_lie_elsewhere(c: Any, look: Any, tmp_path: Path) -> None:
    """They are as long as before, and sparse: zeros came out of them."""
    image = ntfs_of(c, tmp_path)
    place = tmp_path / "mounted"
    place.mkdir()
    c.tool("ntfs-3g", image, place)
    try:
        (place / "folder").mkdir()
        for number, tag in enumerate(TAGS):
            path = place / f"file{number}"
            with path.open("wb") as file:
                file.truncate(100_000)
            os.setxattr(path, "system.ntfs_reparse_data", struct.pack("<IHH", tag, 16, 0) + bytes(16))
        for name, flags in (("offline", 0x1020), ("recalled", 0x400020), ("plain", 0x20)):
            (place / name).write_text(name)
            os.setxattr(place / name, "system.ntfs_attrib_be", flags.to_bytes(4, "big"))
        (place / "link").touch()
        names = "plain".encode("utf-16-le")
        link = struct.pack("<IHHHHHHI", 0xA000000C, 12 + 2 * len(names), 0, 0, len(names), len(names), len(names), 1)
        os.setxattr(place / "link", "system.ntfs_reparse_data", link + names * 2)
        (place / "onedrive").mkdir()
        (place / "onedrive" / "here.txt").write_text("here")
        (place / "folder" / "plain").write_text("more")
    finally:
        c.tool("umount", place)
    # A directory of the cloud: ntfs-3g would no longer show what lies in it.
    c.tool("ntfs-3g", image, place)
    try:
        os.setxattr(place / "onedrive", "system.ntfs_reparse_data", struct.pack("<IHH", 0x9000701A, 16, 0) + bytes(16))
    except OSError:
        pass
    finally:
        c.tool("umount", place)
    looked = look(image.read_bytes())
    reasons = dict(looked.skipped)
    for number, name in enumerate(TAGS.values()):
        assert f"its data lie elsewhere: {name}" in reasons.pop(f"/file{number}")
    assert "recall on data access" in reasons.pop("/recalled", "recall on data access")
    assert "offline" in reasons.pop("/offline")
    assert set(reasons) <= {"/onedrive"}
    held = {path: content for (dummy, path), content in looked.files.items()}
    assert held["/plain"] == b"plain" and held["/folder/plain"] == b"more" and held["/link"] == "plain"
    assert held["/onedrive/here.txt"] == b"here"


def test_names_with_a_dollar_are_files_as_others(c: Any, look: Any, tmp_path: Path) -> None:
    image = ntfs_of(c, tmp_path)
    source = tmp_path / "source"
    source.write_text("salaries")
    for name in ("$Payroll.xlsx", "$note", "$MFTx", "$"):
        c.tool("ntfscp", "-q", "-f", image, source, name)
    looked = look(image.read_bytes())
    assert {path for dummy, path in looked.files} == {"/", "/$Payroll.xlsx", "/$note", "/$MFTx", "/$"}
    assert looked.files[("2000", "/$Payroll.xlsx")] == b"salaries"


def record_of(data: bytes, name: str) -> int:
    """Where the record of a file with this name begins."""
    wanted = name.encode("utf-16-le")
    for at in range(0, len(data), 1024):
        if (
            data[at : at + 4] == b"FILE"
            and wanted in data[at : at + 1024]
            and struct.unpack_from("<I", data, at + 44)[0] >= 24
        ):
            return at
    raise AssertionError(name)


def attribute_of(data: bytes, record: int, kind: int) -> int:
    at = record + struct.unpack_from("<H", data, record + 20)[0]
    while struct.unpack_from("<I", data, at)[0] != kind:
        at += struct.unpack_from("<I", data, at + 4)[0]
    return at


@pytest.mark.parametrize("damage", ["a hole", "encrypted", "packed otherwise", "a missing part", "of another file"])
def test_extents_that_are_not_what_they_should_be(c: Any, look: Any, tmp_path: Path, damage: str) -> None:
    image = ntfs_of(c, tmp_path)
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(200_000))
    for name in ("first", "second"):
        c.tool("ntfscp", "-q", "-f", image, source, name)
    data = bytearray(image.read_bytes())
    record = record_of(data, "first")
    at = attribute_of(data, record, 0x80)
    pairs = at + struct.unpack_from("<H", data, at + 32)[0]
    expected = "its extents are damaged"
    if damage == "a hole":
        # No file that is not marked as sparse has one: never "probably sparse".
        size = data[pairs] & 0xF
        data[pairs] = size
        data[pairs + 1 + size] = 0
    elif damage == "encrypted":
        struct.pack_into("<H", data, at + 12, 0x4000)
        expected = "it is encrypted (EFS)"
    elif damage == "packed otherwise":
        struct.pack_into("<H", data, at + 12, 0x0002)
        expected = "does not know"
    elif damage == "a missing part":
        struct.pack_into("<Q", data, at + 16, 5)
    else:
        # An entry whose file was deleted, and its record used again.
        (sequence,) = struct.unpack_from("<H", data, record + 16)
        struct.pack_into("<H", data, record + 16, sequence + 1)
        expected = "another one's"
    image.write_bytes(data)
    looked = look(image.read_bytes())
    assert set(looked.skipped) == {"/first"} and expected in looked.skipped["/first"]
    assert looked.files[("2000", "/second")] == source.read_bytes()


# FAT


def test_a_short_name_does_not_take_the_long_one_of_a_file_that_is_gone(c: Any, look: Any, tmp_path: Path) -> None:
    """Programs that know no long names leave them behind."""
    image = image_of(tmp_path, 8 * c.MIB)
    c.tool("mkfs.fat", "-F", "12", "-s", "8", image)
    content = tmp_path / "content"
    content.write_text("content")
    c.tool("mcopy", "-i", image, content, "::A long name of one that is gone")
    data = bytearray(image.read_bytes())
    at = data.index(b"ALONGN~1")
    data[at : at + 8] = b"SHORT   "
    image.write_bytes(data)
    looked = look(image.read_bytes())
    assert looked.files == {("2000", "/"): "directory", ("2000", "/SHORT"): b"content"}


def test_fat32_with_few_clusters(c: Any, look: Any, tmp_path: Path) -> None:
    """Linux and Windows go by the size of its table; by its clusters it would be FAT16."""
    image = image_of(tmp_path, 24 * c.MIB)
    c.tool("mkfs.fat", "-F", "32", "-s", "4", image)
    data = bytearray(image.read_bytes())
    (reserved,) = struct.unpack_from("<H", data, 14)
    fats = data[16]
    (table,) = struct.unpack_from("<I", data, 36)
    begin = (reserved + fats * table) * 512
    data[begin : begin + 32] = b"FILE    TXT" + bytes(9) + struct.pack("<HHHHI", 0, 0, 0, 3, 3000)
    data[begin + 2048 : begin + 4096] = b"1" * 2048
    data[begin + 6 * 2048 - 4096 : begin + 6 * 2048 - 2048] = b"2" * 2048
    for copy in range(fats):
        struct.pack_into("<I", data, (reserved + copy * table) * 512 + 12, 6)
        struct.pack_into("<I", data, (reserved + copy * table) * 512 + 24, 0x0FFFFFFF)
    image.write_bytes(data)
    looked = look(image.read_bytes())
    assert looked.files[("2000", "/FILE.TXT")] == b"1" * 2048 + b"2" * 952


def test_fat_whose_root_directory_ends_within_a_sector(c: Any, look: Any, tmp_path: Path) -> None:
    """112 entries are three sectors and a half of 1024 bytes: mtools and fsck.fat do not agree on what comes next."""
    image = image_of(tmp_path, 3 * c.MIB)
    c.tool("mkfs.fat", "-F", "12", "-s", "1", "-S", "1024", "-r", "112", image)
    kind, readable, problem = look(image.read_bytes()).volumes["2000"]
    assert (kind, readable) == ("fat", False) and "ends within a sector" in problem


# LVM


def checksum(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def physical(text: str, number: int, extents: Dict[int, bytes], count: int = 40) -> bytes:
    """A physical volume with these metadata, as LVM writes them; its extents begin at 1 MiB."""
    identity = f"{number:032d}"
    size = EXTENT * (count + 1)
    body = text.encode() + b"\0"
    area = bytearray(512)
    struct.pack_into("<16sIQQ", area, 4, b" LVM2 x[5A%r0N*>", 1, 4096, EXTENT - 4096)
    struct.pack_into("<QQII", area, 40, 512, len(body), checksum(body), 0)
    struct.pack_into("<I", area, 0, checksum(bytes(area[4:])))
    label = bytearray(512)
    struct.pack_into("<8sQII8s", label, 0, b"LABELONE", 1, 0, 32, b"LVM2 001")
    struct.pack_into("<32sQQQQQQQQQ", label, 32, identity.encode(), size, EXTENT, 0, 0, 0, 4096, EXTENT - 4096, 0, 0)
    struct.pack_into("<I", label, 16, checksum(bytes(label[20:])))
    data = bytearray(size)
    data[512:1024] = label
    data[4096:4608] = area
    data[4608 : 4608 + len(body)] = body
    for extent, content in extents.items():
        data[(extent + 1) * EXTENT : (extent + 1) * EXTENT + len(content)] = content
    return bytes(data)


def dashed(number: int) -> str:
    text = f"{number:032d}"
    return "-".join(
        text[begin:end] for begin, end in ((0, 6), (6, 10), (10, 14), (14, 18), (18, 22), (22, 26), (26, 32))
    )


def group(
    volumes: str, physicals: Sequence[int] = (1,), seqno: int = 1, name: str = "vg0", identity: str = GROUP_ID
) -> str:
    parts = "".join(
        f'pv{index} {{\nid = "{dashed(number)}"\ndevice = "/dev/sda"\nstatus = ["ALLOCATABLE"]\nflags = []\n'
        f"dev_size = 83968\npe_start = 2048\npe_count = 40\n}}\n"
        for index, number in enumerate(physicals)
    )
    return (
        f'{name} {{\nid = "{identity}"\nseqno = {seqno}\nformat = "lvm2"\n'
        'status = ["RESIZEABLE", "READ", "WRITE"]\nflags = []\n'
        f"extent_size = 2048 # 1 Megabytes\nmax_lv = 0\nmax_pv = 0\nphysical_volumes {{\n{parts}}}\n"
        f"logical_volumes {{\n{volumes}}}\n}}\n# Generated by LVM2\n"
        'contents = "Text Format Volume Group"\nversion = 1\n'
    )


def volume(name: str, *segments: str, status: str = '"READ", "WRITE", "VISIBLE"', flags: str = "") -> str:
    body = "".join(f"segment{number} {{\n{segment}\n}}\n" for number, segment in enumerate(segments, 1))
    return f'{name} {{\nid = "x"\nstatus = [{status}]\nflags = [{flags}]\nsegment_count = {len(segments)}\n{body}}}\n'


def linear(first: int, count: int, start: int = 0, part: str = "pv0") -> str:
    begin = f"start_extent = {start}\nextent_count = {count}\n"
    return f'{begin}type = "striped"\nstripe_count = 1\nstripes = ["{part}", {first}]'


def spread(content: bytes, first: int) -> Dict[int, bytes]:
    return {
        first + number: content[number * EXTENT : (number + 1) * EXTENT] for number in range(-(-len(content) // EXTENT))
    }


def test_segments_that_are_striped(c: Any, look: Any, tmp_path: Path) -> None:
    """Stripes of 64 KiB take turns between two physical volumes; they were read one after the other."""
    content = bytearray(ext4_of(c, tmp_path, 8 * c.MIB, inside="striped"))
    text = group(
        volume(
            "root",
            'start_extent = 0\nextent_count = 8\ntype = "striped"\nstripe_count = 2\nstripe_size = 128\n'
            'stripes = ["pv0", 3, "pv1", 5]',
        ),
        physicals=(1, 2),
    )
    halves = [b"".join(content[at : at + 65536] for at in range(begin, len(content), 131072)) for begin in (0, 65536)]
    looked = look(physical(text, 1, spread(halves[0], 3)), physical(text, 2, spread(halves[1], 5)))
    assert looked.files[("vg0/root", "/inside")] == b"striped"


@pytest.mark.parametrize(
    "kind",
    [
        "raid1",
        "raid5_ls",
        "raid10",
        "mirror",
        "thin",
        "cache",
        "writecache",
        "vdo",
        "integrity",
        "error",
        "zero",
        "striped+NEW",
    ],
)
def test_a_volume_of_another_type_hides_no_other(c: Any, look: Any, tmp_path: Path, kind: str) -> None:
    home = ext4_of(c, tmp_path, 4 * c.MIB, home="linear")
    text = group(
        volume("root", f'start_extent = 0\nextent_count = 4\ntype = "{kind}"\ndevice_count = 2\nraids = ["a", "b"]')
        + volume("home", linear(8, 2), linear(12, 2, start=2))
        + volume("root_rimage_0", linear(20, 4), status='"READ", "WRITE"')
    )
    looked = look(physical(text, 1, {**spread(home[: 2 * EXTENT], 8), **spread(home[2 * EXTENT :], 12)}))
    volumes = looked.volumes
    assert set(volumes) == {"vg0/root", "vg0/home"} and volumes["vg0/home"][:2] == ("ext4", True)
    assert volumes["vg0/root"] == ("lvm", False, f"its segments are of type {kind}")
    assert looked.files[("vg0/home", "/home")] == b"linear"


def test_states_of_volumes_that_are_not_known(c: Any, look: Any, tmp_path: Path) -> None:
    system = ext4_of(c, tmp_path, 4 * c.MIB, inside="x")
    text = group(
        volume("sound", linear(0, 4))
        + volume("locked", linear(0, 4), status='"READ", "VISIBLE", "LOCKED"')
        + volume("new", linear(0, 4), flags='"SOMETHING_NEW"')
        + volume("beyond", linear(38, 4))
        + volume("gap", linear(0, 1), linear(2, 2, start=2))
        + volume("moved", linear(0, 4, part="pvmove0"))
        # As LVM writes it: the store has the snapshot's name, and is hidden.
        + volume("shot", linear(30, 2), status='"READ", "WRITE"')
        + volume(
            "snapshot0",
            'start_extent = 0\nextent_count = 4\ntype = "snapshot"\nchunk_size = 8\n'
            'origin = "sound"\ncow_store = "shot"',
        )
    )
    looked = look(physical(text, 1, spread(system, 0)))
    volumes = looked.volumes
    problems = {name[4:]: problem for name, (dummy, readable, problem) in volumes.items() if not readable}
    assert [name for name in volumes if volumes[name][1]] == ["vg0/sound"]
    expected = {
        "locked": "LOCKED",
        "new": "SOMETHING_NEW",
        "beyond": "outside its physical volume",
        "gap": "do not fit together",
        "moved": "pvmove0, which is no physical volume",
        "shot": "a snapshot, of sound",
    }
    assert set(problems) == set(expected) and all(part in problems[name] for name, part in expected.items())


def test_two_groups_of_one_name(c: Any, look: Any, tmp_path: Path) -> None:
    """Machines of one template have 'ubuntu-vg' each. A group is what its UUID says."""
    others = GROUP_ID.replace("1", "2")
    images = []
    for number, identity in ((1, GROUP_ID), (2, others)):
        system = ext4_of(c, tmp_path, 4 * c.MIB, hostname=f"host{number}", **{f"only{number}": "x"})
        text = group(volume("root", linear(0, 4)), physicals=(number,), name="ubuntu-vg", identity=identity)
        images.append(physical(text, number, spread(system, 0)))
    looked = look(*images)
    names = [f"ubuntu-vg:{identity}/root" for identity in (GROUP_ID, others)]
    assert {name: facts[:2] for name, facts in looked.volumes.items()} == dict.fromkeys(names, ("ext4", True))
    for number, name in enumerate(names, 1):
        assert looked.files[(name, "/hostname")] == b"host%d" % number and (name, f"/only{number}") in looked.files


def test_a_copy_of_a_physical_volume(c: Any, look: Any, tmp_path: Path) -> None:
    """Which of the two would be read is anybody's guess; with one disk named there is nothing to guess."""
    images = []
    for number in (1, 2):
        system = ext4_of(c, tmp_path, 4 * c.MIB, hostname=f"copy{number}")
        images.append(physical(group(volume("root", linear(0, 4))), 1, spread(system, 0)))
    looked = look(*images)
    kind, readable, problem = looked.volumes["vg0/root"]
    assert (kind, readable) == ("lvm", False) and "is there 2 times: 2000, 2001" in problem and "'disks'" in problem
    assert look(*images, keys=[2001]).files[("vg0/root", "/hostname")] == b"copy2"


def test_a_physical_volume_that_is_missing_or_left_the_group(c: Any, look: Any, tmp_path: Path) -> None:
    system = ext4_of(c, tmp_path, 4 * c.MIB, inside="whole")
    newer = group(volume("here", linear(0, 4)) + volume("part", linear(8, 2), linear(0, 2, 2, "pv1")), (1, 9), seqno=5)
    older = group(volume("here", linear(0, 4, part="pv1")), (1, 3), seqno=4)
    looked = look(physical(newer, 1, spread(system, 0)), physical(older, 3, spread(system, 0)))
    volumes = looked.volumes
    assert volumes["vg0/here"][:2] == ("ext4", True)
    assert f"physical volume {dashed(9)} is on none of the disks" in volumes["vg0/part"][2]
    assert volumes["2001"] == ("lvm", False, "its volume group no longer counts it")


def test_metadata_that_are_damaged(c: Any, look: Any, tmp_path: Path) -> None:
    data = bytearray(physical(group(volume("root", linear(0, 4))), 1, {}))
    at = data.index(b"extent_count")
    data[at + 15] ^= 1
    looked = look(data)
    assert looked.volumes["2000"] == ("lvm", False, "its metadata (LVM) are damaged")


def test_without_dissect_only_btrfs_is_not_read(
    c: Any, look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsers, "missing", lambda: ["dissect.btrfs"])
    image = image_of(tmp_path, 112 * c.MIB)
    c.tool("mkfs.btrfs", "-q", image)
    looked = look(image.read_bytes(), ext4_of(c, tmp_path, 4 * c.MIB, inside="read"))
    assert looked.volumes["2000"][:2] == ("btrfs", False) and "needs dissect.btrfs" in looked.volumes["2000"][2]
    assert looked.files[("2001", "/inside")] == b"read"


def test_data_that_may_lie_in_the_journal(c: Any, look: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("journaled", "plain"):
        (tree / name).write_text(name)
    image = image_of(tmp_path, 8 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-d", tree, image)
    c.tool("debugfs", "-w", "-R", "sif /journaled flags 0x84000", image)
    assert look(image.read_bytes()).files[("2000", "/journaled")] == b"journaled"
    c.tool("debugfs", "-w", "-R", "feature needs_recovery", image)
    data = bytearray(image.read_bytes())
    assert look(bytes(data)).files[("2000", "/journaled")] == b"journaled"
    # A journal that has what is not known: fast commits.
    at = data.index(struct.pack(">II", 0xC03B3998, 4)) + 40
    struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] | 0x20)
    looked = look(bytes(data))
    assert "lie in the journal" in looked.skipped["/journaled"] and looked.files[("2000", "/plain")] == b"plain"


def test_a_journal_that_claims_to_be_as_large_as_the_volume(c: Any, look: Any, tmp_path: Path) -> None:
    """It is not read into memory; what lies in place is read, with a word about it."""
    image = image_of(tmp_path, 8 * c.MIB)
    image.write_bytes(ext4_of(c, tmp_path, 8 * c.MIB, inside="x"))
    for command in ("sif <8> size 1099511627776", "feature needs_recovery"):
        c.tool("debugfs", "-w", "-R", command, image)
    with image.open("rb") as volume:
        system = open_file_system(volume, 8 * c.MIB)
        assert system is not None and "a part of the journal is missing" in str(system.unclean)
    assert look(image.read_bytes()).files[("2000", "/inside")] == b"x"
