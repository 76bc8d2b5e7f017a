# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The guard on real loop devices, file systems and partition tables; holders through roots of our own."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import uuid
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import ToolResult
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import guard
from ansible_collections.openvadp.backup.plugins.module_utils.transport.disk_format import (
    VMFS_GPT,
    read_partitions,
    read_volume_group,
)

MIB = 1024 * 1024
GROUP = "spW6m0-IOKQ-rgOW-EUHy-1lvO-8U9M-hKOIkK"
NOTHING_FOUND = ToolResult(2, "", "")


def run(*argv: Any, text: Optional[str] = None) -> str:
    return subprocess.run(
        [str(word) for word in argv], input=text, check=True, text=True, capture_output=True, timeout=60
    ).stdout.strip()


def image(path: Path, megabytes: int = 64, table: Optional[str] = None) -> Path:
    with path.open("wb") as stream:
        stream.truncate(megabytes * MIB)
    if table is not None:
        run("sfdisk", "-q", path, text=table)
    return path


def vmfs_lun(path: Path, table: str = "label: dos\nstart=2048, type=fb\n") -> Path:
    return image(path, table=table)


@pytest.fixture
def loop() -> Iterator[Callable[..., str]]:
    devices: List[str] = []

    def attach(path: Path, *options: str) -> str:
        devices.append(run("losetup", "-f", "--show", *options, path))
        return devices[-1]

    yield attach
    for device in devices:
        run("losetup", "-d", device)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    places: List[Path] = []

    def mounted(source: Any, name: str = "mnt", *options: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        run("mount", *options, source, place)
        places.append(place)
        return place

    yield mounted
    for place in places:
        run("umount", place)


class Roots:
    """A /sys and a /proc of our own."""

    def __init__(self, folder: Path) -> None:
        self.sysfs = folder / "sys"
        self.proc = folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.block = self.sysfs / "class" / "block"
        self.block.mkdir(parents=True)

    def device(self, name: str, number: str = "8:0", parent: Optional[str] = None, **files: str) -> Path:
        folder = self.block / (f"{parent}/{name}" if parent else name)
        (folder / "holders").mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        if parent:
            (folder / "partition").write_text("1\n")
            (self.block / name).symlink_to(f"{parent}/{name}")
        for path, text in files.items():
            file = folder / path.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{text}\n")
        return folder

    def hold(self, name: str, holder: str) -> None:
        (self.block / name / "holders" / holder).symlink_to("../..")

    def problems(self, device: Any, **options: Any) -> List[str]:
        options.setdefault("run", lambda *_args, **_options: NOTHING_FOUND)
        return guard.problems(str(device), sysfs_dir=str(self.sysfs), proc_dir=str(self.proc), **options)


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(tmp_path)


def label_of_lvm(group: str = GROUP, name: str = "guestvg", *, wrapped: bool = False, metadata: bool = True) -> bytes:
    """A physical volume as LVM documents it: label in sector 1, metadata area at 4 KiB, a ring of 64 KiB."""
    text = f'{name} {{\nid = "{group}"\nseqno = 1\nphysical_volumes {{\n}}\n}}\n'.encode()
    data = bytearray(MIB)
    areas = struct.pack("<QQQQ", MIB, 0, 0, 0) + (struct.pack("<QQ", 4096, 65536) if metadata else b"") + bytes(16)
    pv = b"p" * 32 + struct.pack("<Q", 64 * MIB) + areas
    data[512 : 512 + 32] = b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001"
    data[544 : 544 + len(pv)] = pv
    checksum = zlib.crc32(bytes(data[532:1024]), 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    data[528:532] = struct.pack("<I", checksum)
    begin = 65536 - 20 if wrapped else 512
    header = struct.pack("<I16sIQQ", 0, b" LVM2 x[5A%r0N*>", 1, 4096, 65536)
    header += struct.pack("<QQII", begin, len(text), 0, 0) + bytes(24)
    data[4096 : 4096 + len(header)] = header
    first = text[: 65536 - begin]
    data[4096 + begin : 4096 + begin + len(first)] = first
    data[4096 + 512 : 4096 + 512 + len(text) - len(first)] = text[len(first) :]
    return bytes(data)


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


# A LUN with VMFS, and what should not be on one


@pytest.mark.parametrize(
    "table",
    [
        "label: dos\nstart=2048, type=fb\n",
        f"label: gpt\nstart=2048, type={VMFS_GPT}\n",
        f"label: gpt\nstart=2048, size=4096, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\nstart=8192, type={VMFS_GPT}\n",
    ],
)
def test_a_lun_as_esxi_leaves_it_has_no_problem(tmp_path: Path, loop: Callable[..., str], table: str) -> None:
    file = vmfs_lun(tmp_path / "lun", table)
    assert guard.problems(str(file), lun=True) == []
    device = loop(file, "--read-only")
    assert guard.problems(device, lun=True) == []
    assert guard.is_vmfs(device)
    assert guard.is_read_only(device) is True


def test_a_volume_inside_is_recognised_as_vmfs(tmp_path: Path) -> None:
    lun = vmfs_lun(tmp_path / "lun")
    write_at(lun, 2048 * 512 + MIB, b"\x0d\xd0\x01\xc0" + struct.pack("<I", 5))
    offset = ["-O", str(2048 * 512), "-S", str(63 * MIB)]
    assert "VMFS_volume_member" in run("blkid", "-p", "-o", "export", *offset, lun)
    assert guard.problems(str(lun), lun=True) == []


@pytest.mark.parametrize(
    ("maker", "kind"),
    [
        (["mkfs.ext4", "-q", "-F"], "ext4"),
        (["mkfs.xfs", "-q", "-f"], "xfs"),
        (["mkfs.vfat"], "vfat"),
        (["mkswap"], "swap"),
    ],
)
def test_a_lun_that_was_formatted(tmp_path: Path, loop: Callable[..., str], maker: List[str], kind: str) -> None:
    lun = image(tmp_path / "lun", 320)
    device = loop(lun)
    run(*maker, device)
    found = guard.problems(device, lun=True)
    assert found[0] == f"it carries a signature of {kind}", found
    # The same on a virtual machine's disk is what one expects there.
    assert guard.problems(device) == []


def test_a_file_system_in_the_partition_of_vmfs(tmp_path: Path) -> None:
    lun = vmfs_lun(tmp_path / "lun")
    run("mkfs.ext4", "-q", "-L", "data", "-E", f"offset={MIB}", lun, "60M")
    assert guard.problems(str(lun), lun=True) == ["partition 1 carries a signature of ext4 labelled data"]


def test_a_partition_added_behind_the_datastore(tmp_path: Path) -> None:
    lun = vmfs_lun(tmp_path / "lun", "label: dos\nstart=2048, size=65536, type=fb\nstart=67584, type=83\n")
    assert guard.problems(str(lun), lun=True) == [
        "partition 2 is of type 83, which no ESXi host makes on a datastore's LUN"
    ]


def test_a_lun_that_was_initialised(tmp_path: Path) -> None:
    blank = image(tmp_path / "blank")
    assert "no partition table" in guard.problems(str(blank), lun=True)[0]
    windows = vmfs_lun(tmp_path / "windows", "label: gpt\nstart=2048, type=E3C9E316-0B5C-4DB8-817D-F92DF00215AE\n")
    found = guard.problems(str(windows), lun=True)
    assert "no partition of it is for VMFS (types of its partitions: e3c9e316-0b5c-4db8-817d-f92df00215ae)" in found
    empty = vmfs_lun(tmp_path / "empty", "label: gpt\n")
    assert "types of its partitions: none at all" in guard.problems(str(empty), lun=True)[0]


def test_two_signatures_at_once(tmp_path: Path) -> None:
    lun = image(tmp_path / "lun", 320)
    run("mkfs.xfs", "-q", "-f", lun)
    write_at(lun, 1024, struct.pack("<II", 1, 1000))
    write_at(lun, 4086, b"SWAPSPACE2")
    assert guard.problems(str(lun), lun=True) == ["it carries signatures of more than one kind"]


def test_signatures_that_cant_be_looked_for_are_a_reason(tmp_path: Path) -> None:
    def no_tool(*_args: Any, **_options: Any) -> ToolResult:
        raise DataPathError("Looking for signatures", reason="blkid is not installed")

    found = guard.problems(str(vmfs_lun(tmp_path / "lun")), lun=True, run=no_tool)
    assert found == ["its signatures can't be looked for: blkid is not installed"] * 2


# What this machine does with a disk


def test_a_mounted_disk(tmp_path: Path, loop: Callable[..., str], mount: Callable[..., Path]) -> None:
    file = image(tmp_path / "disk")
    device = loop(file)
    run("mkfs.ext4", "-q", device)
    assert guard.problems(device) == []
    place = mount(device, "a mount\tpoint", "-o", "ro")
    assert guard.problems(device) == [f"it is mounted at {place}"]
    link = tmp_path / "wwn-0x6000c29"
    link.symlink_to(device)
    assert guard.problems(str(link)) == [f"it is mounted at {place}"]
    # The file that the loop device shows is touched just as well.
    name = os.path.basename(device)
    assert guard.problems(str(file)) == [
        f"loop device {name} on it is mounted at {place}",
        f"it is held by loop device {name}",
    ]


def test_a_disk_that_only_another_namespace_has_mounted(tmp_path: Path, loop: Callable[..., str]) -> None:
    device = loop(image(tmp_path / "disk"))
    run("mkfs.ext4", "-q", device)
    place = tmp_path / "inside"
    place.mkdir()
    script = f"mount -o ro {device} {place} && echo mounted && read -r line; umount {place}"
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as container:
        assert container.stdout is not None and container.stdout.readline() == "mounted\n"
        assert not os.path.ismount(place)
        assert guard.problems(device) == [f"it is mounted at {place}"]
        container.communicate("\n", timeout=60)
    assert guard.problems(device) == []


def test_nothing_is_written(tmp_path: Path) -> None:
    lun = vmfs_lun(tmp_path / "lun")
    write_at(lun, MIB, label_of_lvm())
    before = hashlib.sha256(lun.read_bytes()).hexdigest(), lun.stat().st_mtime_ns
    assert guard.problems(str(lun), lun=True) == ["partition 1 carries a signature of LVM2_member"]
    assert guard.vg_uuid(str(lun)) == GROUP
    assert (hashlib.sha256(lun.read_bytes()).hexdigest(), lun.stat().st_mtime_ns) == before


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    assert guard.problems(str(tmp_path / "link")) == ["the device is not there"]
    assert guard.vg_uuid(str(tmp_path / "link")) is None
    assert not guard.is_vmfs(str(tmp_path / "link"))
    assert guard.is_read_only(str(tmp_path / "link"), str(tmp_path)) is None


def test_a_device_that_cant_be_read(tmp_path: Path, roots: Roots) -> None:
    (tmp_path / "folder").mkdir()
    assert roots.problems(tmp_path / "folder") == ["it can't be read to look at it: Is a directory"]


# Holders, through roots of our own


def test_a_partition_is_mounted_or_swap(tmp_path: Path, roots: Roots) -> None:
    disk = image(tmp_path / "sdb")
    roots.device("sdb", "8:16", ro="1")
    roots.device("sdb1", "8:17", parent="sdb")
    roots.device("sdb2", "8:18", parent="sdb")
    roots.device("sdb3", "8:19", parent="sdb")
    (roots.proc / "self" / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "90 22 8:17 / /media/my\\040disk rw,relatime shared:2 master:1 - xfs /dev/sdb1 rw\n"
        f"91 22 0:44 / /mnt/b rw - btrfs {tmp_path}/sdb3 rw\n"
    )
    (roots.proc / "swaps").write_text(f"Filename Type Size Used Priority\n{tmp_path}/sdb2 partition 1 0 -2\n")
    assert roots.problems(disk) == [
        "partition sdb1 is mounted at /media/my disk",
        "partition sdb3 is mounted at /mnt/b",
        "partition sdb2 is used as swap space",
    ]
    assert guard.is_read_only(str(disk), str(roots.sysfs)) is True


@pytest.mark.parametrize(
    ("holder", "files", "words"),
    [
        ("dm-0", {"dm__uuid": "LVM-" + "a" * 64, "dm__name": "guestvg-root"}, "LVM volume guestvg-root (dm-0)"),
        ("dm-1", {"dm__uuid": "CRYPT-LUKS2-0b", "dm__name": "secret"}, "encrypted volume secret (dm-1)"),
        ("dm-2", {"dm__uuid": "", "dm__name": "made"}, "device-mapper's volume made (dm-2)"),
        ("md127", {"md__level": "raid1"}, "software RAID md127"),
        ("bcache0", {}, "bcache0"),
    ],
)
def test_holders(tmp_path: Path, roots: Roots, holder: str, files: Dict[str, str], words: str) -> None:
    disk = image(tmp_path / "sdb")
    roots.device("sdb", "8:16")
    roots.device("sdb1", "8:17", parent="sdb")
    roots.device(holder, "253:0", **files)
    roots.hold("sdb1", holder)
    assert roots.problems(disk) == [f"partition sdb1 is held by {words}"]


def test_multipath_is_another_name_and_no_holder(tmp_path: Path, roots: Roots) -> None:
    disk = vmfs_lun(tmp_path / "sdb")
    roots.device("sdb", "8:16")
    roots.device("dm-0", "253:0", dm__uuid="mpath-3600a098038", dm__name="mpatha")
    roots.device("dm-1", "253:1", dm__uuid="part1-mpath-3600a098038", dm__name="mpatha1")
    roots.hold("sdb", "dm-0")
    roots.hold("dm-0", "dm-1")
    assert roots.problems(disk, lun=True) == []
    roots.device("dm-2", "253:2", dm__uuid="LVM-" + "a" * 64, dm__name="vg-lv")
    roots.hold("dm-1", "dm-2")
    (roots.proc / "self" / "mountinfo").write_text("90 22 253:0 / /mnt rw - ext4 /dev/mapper/mpatha rw\n")
    assert roots.problems(disk, lun=True) == [
        "multipath device dm-0 is mounted at /mnt",
        "multipath device dm-1 is held by LVM volume vg-lv (dm-2)",
    ]


def test_a_device_of_a_btrfs_of_several(tmp_path: Path, roots: Roots) -> None:
    disk = image(tmp_path / "sdc")
    roots.device("sdc")
    (roots.sysfs / "fs" / "btrfs" / "11-22" / "devices" / "sdc").mkdir(parents=True)
    (roots.sysfs / "fs" / "btrfs" / "features").mkdir()
    assert roots.problems(disk) == ["it is a device of the mounted btrfs 11-22"]


def test_a_group_of_the_same_uuid_is_active_here(tmp_path: Path, roots: Roots) -> None:
    table = (
        "label: dos\nstart=2048, size=4096, type=83\nstart=8192, size=40960, type=5\nstart=10240, size=8192, type=8e\n"
    )
    disk = image(tmp_path / "sdb", table=table)
    write_at(disk, 10240 * 512, label_of_lvm())
    roots.device("sdb", "8:16")
    assert roots.problems(disk) == []
    assert guard.vg_uuid(str(disk)) == GROUP
    roots.device("dm-7", "253:7", dm__uuid="LVM-" + GROUP.replace("-", "") + "b" * 32, dm__name="guestvg-root")
    assert roots.problems(disk) == [
        f"partition 5 belongs to LVM volume group guestvg ({GROUP}), and a group of that UUID is active here"
    ]


# Formats


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_group_is_read_from_the_ring(tmp_path: Path, wrapped: bool) -> None:
    disk = image(tmp_path / "disk")
    write_at(disk, 0, label_of_lvm(wrapped=wrapped))
    assert guard.vg_uuid(str(disk)) == GROUP
    with disk.open("rb") as stream:
        group = read_volume_group(stream)
    assert group is not None and (group.name, group.uuid) == ("guestvg", GROUP)


def test_a_volume_without_a_group_or_with_nonsense(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk")
    write_at(disk, 0, label_of_lvm(metadata=False))
    assert guard.vg_uuid(str(disk)) is None
    whole = label_of_lvm()
    for offset, data in [(532, b"\xff" * 4), (4096, bytes(64)), (4096 + 40, b"\xff" * 16), (4096 + 512, b"\0" * 64)]:
        write_at(disk, 0, whole)
        write_at(disk, offset, data)
        assert guard.vg_uuid(str(disk)) is None


def test_partition_tables_as_sfdisk_makes_them(tmp_path: Path) -> None:
    linux = str(uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4"))
    disk = image(
        tmp_path / "gpt", table=f"label: gpt\nstart=2048, size=2048, type={linux}\nstart=8192, type={VMFS_GPT}\n"
    )
    with disk.open("rb") as stream:
        found = read_partitions(stream)
    assert found is not None and [(entry.number, entry.offset, entry.kind) for entry in found] == [
        (1, MIB, linux),
        (2, 4 * MIB, VMFS_GPT),
    ]
    assert [entry.is_vmfs for entry in found] == [False, True]
    table = "label: dos\nstart=2048, size=2048, type=83\nstart=4096, type=5\n" + "size=2048, type=83\n" * 3
    disk = image(tmp_path / "dos", table=table)
    with disk.open("rb") as stream:
        found = read_partitions(stream)
    assert found is not None and [entry.number for entry in found] == [1, 2, 5, 6, 7]
    starts = [
        int(line.split("start=")[1].split(",")[0])
        for line in run("sfdisk", "-d", disk).splitlines()
        if "start=" in line
    ]
    assert [entry.offset // 512 for entry in found] == starts


def test_a_table_for_sectors_of_4096_bytes(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk")
    entry = uuid.UUID(VMFS_GPT).bytes_le + bytes(16) + struct.pack("<QQ", 256, 511)
    write_at(disk, 446, struct.pack("<B3xB3xII", 0, 0xEE, 1, 0xFFFFFFFF))
    write_at(disk, 510, b"\x55\xaa")
    write_at(disk, 4096, b"EFI PART" + bytes(64) + struct.pack("<QII", 2, 4, 128))
    write_at(disk, 8192, entry)
    with disk.open("rb") as stream:
        found = read_partitions(stream)
    assert found is not None and [(item.offset, item.length) for item in found] == [(MIB, MIB)]
    write_at(disk, 4096 + 84, b"\xff" * 4)
    with disk.open("rb") as stream:
        assert read_partitions(stream) is None
    write_at(disk, 4096, bytes(8))
    with disk.open("rb") as stream:
        assert read_partitions(stream) is None
