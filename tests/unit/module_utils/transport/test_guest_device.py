# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport.guest_device import (
    delete_device,
    find_device,
    is_dead,
    users_of,
    uuid_digits,
    wait_for_device,
)

UUID = "6000C29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e"
DIGITS = "6000c29e8a1f2c9b6d0e3f5a7b9c1d2e"


class Machine:
    """Folders like /dev, /dev/disk/by-id and /sys, with one disk."""

    def __init__(self, root: Path) -> None:
        self.dev, self.by_id, self.sysfs = root / "dev", root / "by-id", root / "sys"
        self.block = self.sysfs / "class" / "block" / "sdb"
        for folder in (self.dev, self.by_id, self.block / "device", self.block / "holders"):
            folder.mkdir(parents=True)
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
    assert wait_for_device(str(machine.by_id), UUID, 0) is None
    assert find_device(str(machine.by_id), None) is None
    link = machine.link(name)
    assert find_device(str(machine.by_id), UUID) == wait_for_device(str(machine.by_id), UUID, 0) == link


def test_a_device_that_comes_late_is_waited_for(machine: Machine) -> None:
    thread = threading.Timer(0.2, machine.link, [f"wwn-0x{DIGITS}"])
    thread.start()
    assert wait_for_device(str(machine.by_id), UUID, 30) is not None
    thread.join()


def test_what_can_not_be_read_is_dead(machine: Machine) -> None:
    link = machine.link(f"wwn-0x{DIGITS}")
    assert not is_dead(link)
    (machine.dev / "sdb").write_bytes(b"")
    assert is_dead(link)
    (machine.dev / "sdb").unlink()
    assert is_dead(link)
    # To open a socket's file is ENXIO, as for a disk that is gone.
    os.mknod(machine.dev / "sdb", stat.S_IFSOCK | 0o600)
    assert is_dead(link)


def test_a_device_is_deleted_through_sysfs(machine: Machine) -> None:
    link = machine.link(f"wwn-0x{DIGITS}")
    assert delete_device(link, str(machine.sysfs), 0) is False
    assert (machine.block / "device" / "delete").read_text() == "1"
    os.unlink(link)
    assert delete_device(link, str(machine.sysfs), 0) is True
    # One that the kernel does not know can't be deleted.
    (machine.block / "device" / "delete").unlink()
    assert delete_device(machine.link(f"wwn-0x{DIGITS}"), str(machine.sysfs), 60) is False


def test_who_may_not_delete_a_device_is_told_so(machine: Machine) -> None:
    (machine.block / "device" / "delete").unlink()
    (machine.block / "device" / "delete").mkdir()  # root may write to any file
    with pytest.raises(TransportError) as caught:
        delete_device(machine.link(f"wwn-0x{DIGITS}"), str(machine.sysfs), 0)
    assert "root" in str(caught.value) and "sdb" in str(caught.value)


def test_who_uses_a_device_is_told(machine: Machine, tmp_path: Path) -> None:
    link, proc = machine.link(f"wwn-0x{DIGITS}"), tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "swaps").write_text("Filename Type Size Used Priority\n")
    (proc / "self" / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    assert users_of(link, str(machine.sysfs), str(proc)) == []
    part = machine.block / "sdb2"
    part.mkdir()
    (part / "partition").write_text("2\n")
    node = machine.sysfs / "class" / "block" / "sdb2"
    (node / "holders" / "dm-0").mkdir(parents=True)
    (node / "dev").write_text("8:18\n")
    (proc / "self" / "mountinfo").write_text("22 1 8:18 / /mnt/a rw - ext4 /dev/sdb2 rw\n")
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{tmp_path}/dev/sdb partition 9 0 -2\n")
    assert users_of(link, str(machine.sysfs), str(proc)) == [
        "sdb is used as swap space",
        "sdb2 is mounted at /mnt/a",
        "sdb2 is a part of dm-0",
    ]
