# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import threading
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport.guest_device import (
    GuestDisk,
    delete_device,
    find_device,
    guest_disks,
    named_disk,
    names_in_page83,
    node_of,
    users_of,
    uuid_digits,
    wait_for,
)

UUID = "6000C29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e"
DIGITS = "6000c29e8a1f2c9b6d0e3f5a7b9c1d2e"
PAGE83 = bytes.fromhex(f"0083001401030010{DIGITS}")


class Machine:
    """Folders like /dev, /dev/disk/by-id and /sys, with one disk."""

    def __init__(self, root: Path) -> None:
        self.dev, self.by_id, self.sysfs = root / "dev", root / "by-id", root / "sys"
        self.block = self.sysfs / "class" / "block" / "sdb"
        self.device = self.sysfs / "devices" / "pci0" / "host2" / "target2:0:1" / "2:0:1:0"
        for folder in (self.dev, self.by_id, self.device, self.block / "holders"):
            folder.mkdir(parents=True)
        (self.block / "device").symlink_to(self.device)
        (self.device / "vendor").write_text("VMware  \n")
        (self.device / "vpd_pg83").write_bytes(PAGE83)
        (self.device / "wwid").write_text(f"naa.{DIGITS}\n")
        (self.block / "diskseq").write_text("17\n")
        (self.dev / "sdb").write_bytes(b"x" * 4096)
        (self.block / "device" / "delete").touch()
        (self.block / "dev").write_text("8:16\n")

    def link(self, name: str) -> str:
        (self.by_id / name).symlink_to("../dev/sdb")
        return str(self.by_id / name)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_uuids_are_what_links_are_named_by() -> None:
    assert uuid_digits(UUID) == DIGITS
    assert uuid_digits("60 00 C2 9e 8a 1f 2c 9b-6d 0e 3f 5a 7b 9c 1d 2e") == DIGITS
    assert uuid_digits(None) is uuid_digits("") is uuid_digits(f"{UUID}00") is uuid_digits("../" + DIGITS[3:]) is None


@pytest.mark.parametrize("name", [f"wwn-0x{DIGITS}", f"scsi-3{DIGITS}"])
def test_a_device_is_found_by_its_uuid_alone(machine: Machine, name: str) -> None:
    for other in (f"scsi-1{DIGITS}", f"wwn-0x{DIGITS}-part1", f"wwn-0x{DIGITS[:-1]}f", "sdb"):
        machine.link(other)
    assert find_device(str(machine.by_id), UUID) is None
    assert find_device(str(machine.by_id), None) is None
    link = machine.link(name)
    assert find_device(str(machine.by_id), UUID) == link


def test_a_device_that_comes_late_is_waited_for(machine: Machine) -> None:
    thread = threading.Timer(0.2, machine.link, [f"wwn-0x{DIGITS}"])
    thread.start()
    assert wait_for(lambda: find_device(str(machine.by_id), UUID), 30) is not None
    thread.join()
    assert wait_for(lambda: None, 0) is None


def test_what_the_kernel_knows_of_a_disk(machine: Machine) -> None:
    sysfs = str(machine.sysfs)
    assert guest_disks(sysfs) == [GuestDisk("sdb", (2, 0, 1, 0), DIGITS, True, "17")]
    assert guest_disks(sysfs)[0].unit == 1
    # Not SCSI disks: a partition, a mapper's volume, one without an address.
    for name in ("sdb1", "dm-0", "nvme0n1"):
        (machine.sysfs / "class" / "block" / name).mkdir()
    (machine.sysfs / "class" / "block" / "sdb1" / "device").symlink_to(machine.device)
    (machine.sysfs / "class" / "block" / "sdb1" / "partition").write_text("1\n")
    assert [disk.name for disk in guest_disks(sysfs)] == ["sdb"]
    assert named_disk(sysfs, "sdc") is None
    # Two sources that contradict each other tell nothing.
    (machine.device / "wwid").write_text(f"naa.{DIGITS[:-1]}f\n")
    assert guest_disks(sysfs)[0].digits is None
    (machine.device / "vpd_pg83").unlink()
    assert guest_disks(sysfs)[0].digits == f"{DIGITS[:-1]}f"
    (machine.block / "diskseq").unlink()
    (machine.device / "vendor").write_text("NETAPP  \n")
    assert guest_disks(sysfs)[0].sequence is None and not guest_disks(sysfs)[0].virtual


def test_what_is_behind_another_channel_or_lun_is_at_no_unit() -> None:
    assert GuestDisk("sdb", (2, 0, 1, 1), None, True, None).unit is None
    assert GuestDisk("sdb", (2, 1, 1, 0), None, True, None).unit is None


def test_the_name_is_read_from_the_identification_page() -> None:
    vendor = bytes.fromhex("0201000456").ljust(8, b"M")
    port = bytes.fromhex(f"01130010{DIGITS}")
    short = bytes.fromhex("0103000850000000000000aa")
    ours = PAGE83[4:]

    def page(*descriptors: bytes) -> bytes:
        body = b"".join(descriptors)
        return bytes([0, 0x83, len(body) >> 8, len(body) & 255]) + body

    assert names_in_page83(PAGE83) == names_in_page83(page(vendor, port, short, ours, ours)) == [DIGITS]
    # Of the port, of another format, cut, of another page, of nothing.
    for other in (page(port), page(short), page(ours[:-1]), PAGE83[:12], b"\0\x80" + PAGE83[2:], b"", b"\0" * 252):
        assert names_in_page83(other) == [], other


def test_a_node_is_found_by_the_kernels_name(machine: Machine) -> None:
    assert node_of("sdb", str(machine.by_id)) is None
    machine.link(f"wwn-0x{DIGITS}")
    assert node_of("sdb", str(machine.by_id)) == str(machine.dev / "sdb")
    assert node_of("null", str(machine.by_id)) == "/dev/null"


def test_a_device_is_deleted_through_sysfs(machine: Machine) -> None:
    sysfs = str(machine.sysfs)
    assert delete_device("sdb", sysfs, 0) is False
    assert (machine.block / "device" / "delete").read_text() == "1"
    # Another disk of that name is another device.
    timer = threading.Timer(0.2, (machine.block / "diskseq").write_text, ["18\n"])
    timer.start()
    assert delete_device("sdb", sysfs, 30) is True
    timer.join()
    # One that can't be deleted stays, one that the kernel does not know is gone.
    (machine.block / "device" / "delete").unlink()
    assert delete_device("sdb", sysfs, 60) is False
    assert delete_device("sdc", sysfs, 60) is True


def test_who_may_not_delete_a_device_is_told_so(machine: Machine) -> None:
    (machine.block / "device" / "delete").unlink()
    (machine.block / "device" / "delete").mkdir()  # root may write to any file
    with pytest.raises(TransportError) as caught:
        delete_device("sdb", str(machine.sysfs), 0)
    assert "root" in str(caught.value) and "sdb" in str(caught.value)


def test_who_uses_a_device_is_told(machine: Machine, tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "swaps").write_text("Filename Type Size Used Priority\n")
    (proc / "self" / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    assert users_of("sdb", str(machine.sysfs), str(proc)) == []
    part = machine.block / "sdb2"
    part.mkdir()
    (part / "partition").write_text("2\n")
    node = machine.sysfs / "class" / "block" / "sdb2"
    (node / "holders" / "dm-0").mkdir(parents=True)
    (node / "dev").write_text("8:18\n")
    (proc / "self" / "mountinfo").write_text("22 1 8:18 / /mnt/a rw - ext4 /dev/sdb2 rw\n")
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{tmp_path}/dev/sdb partition 9 0 -2\n")
    assert users_of("sdb", str(machine.sysfs), str(proc)) == [
        "sdb is used as swap space",
        "sdb2 is mounted at /mnt/a",
        "sdb2 is a part of dm-0",
    ]
