# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A proxy's disks, through a /sys, a /proc and a /dev of our own: files stand for the devices."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.transport.disks_here import (
    DiskHere,
    arrays_here,
    disks_here,
    own_volumes,
)

LUN = "600a098038314648593f517773636465"
GUEST = "6000c29a1b2c3d4e5f60718293a4b5c6"
GROUP = "spW6m0-IOKQ-rgOW-EUHy-1lvO-8U9M-hKOIkK"


class Machine:
    def __init__(self, folder: Path) -> None:
        self.dev, self.sysfs, self.proc, self.links = (folder / name for name in ("dev", "sys", "proc", "by-id"))
        for path in (self.dev, self.sysfs / "class/block", self.proc / "self", self.links):
            path.mkdir(parents=True)

    def device(self, name: str, table: Optional[str] = None, links: Sequence[str] = (), **files: str) -> Path:
        folder = self.sysfs / "class/block" / name
        (folder / "holders").mkdir(parents=True)
        for path, text in {"dev": f"8:{len(name)}", "ro": "0", **files}.items():
            file = folder / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        device = self.dev / name
        with device.open("wb") as stream:
            stream.truncate(16 << 20)
        if table:
            subprocess.run(["sfdisk", "-q", str(device)], input=table, text=True, check=True)
        for link in links:
            (self.links / link).symlink_to(f"../dev/{name}")
        return device

    def look(self, *luns: str) -> List[DiskHere]:
        roots: Any = {"sysfs_dir": self.sysfs, "proc_dir": self.proc, "dev_dir": self.dev, "device_dir": self.links}
        return disks_here(luns, **{name: str(path) for name, path in roots.items()})


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_disks_and_luns(machine: Machine) -> None:
    machine.device("sda", device__wwid="naa.6000c290", device__vendor="VMware  ", device__model="Virtual disk    ")
    (machine.proc / "self/mountinfo").write_text("22 1 8:3 / / rw - ext4 /dev/sda rw\n")
    links = [f"wwn-0x{LUN}", f"wwn-0x{LUN}-part1"]
    machine.device("sdbb", "label: dos\nstart=2048, type=fb\n", links, device__wwid=f"naa.{LUN}", ro="1")
    machine.device("nvme0n1", wwid="eui.0025", device__model="VMware Virtual NVMe Disk")
    for name in ("loop0", "dm-0", "md127", "zram0", "sr0", "nbd0"):
        machine.device(name)
    machine.device("sdbb1", partition="1")
    disks = {Path(disk.device).name: disk for disk in machine.look()}
    assert sorted(disks) == ["nvme0n1", "sda", "sdbb"]
    assert (disks["sda"].virtual, disks["sda"].lun, disks["sda"].read_only) == (True, False, False)
    assert disks["sda"].in_use == ["it is mounted at /"] and disks["sda"].problems == []
    assert (disks["sdbb"].virtual, disks["sdbb"].lun, disks["sdbb"].read_only) == (False, True, True)
    assert disks["sdbb"].names == [f"wwn-0x{LUN}"] and disks["sdbb"].problems == []
    assert disks["nvme0n1"].virtual and disks["nvme0n1"].wwid == "eui.0025"


@pytest.mark.parametrize("name", [f"naa.{LUN}", f"wwn-0x{LUN}", f"scsi-3{LUN}", f"NAA.{LUN.upper()}"])
def test_a_formatted_lun_is_known_by_its_name(machine: Machine, name: str) -> None:
    device = machine.device("sdb", links=[f"scsi-3{LUN}"])
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
    assert [disk.lun for disk in machine.look()] == [False]
    unseen = "naa.600a0000000000000000000000000000"
    assert [disk.problems for disk in machine.look(name, unseen)] == [["it carries a signature of ext4"]]
    assert machine.look(str(machine.links / f"scsi-3{LUN}"))[0].problems == ["it carries a signature of ext4"]


def test_a_path_that_leads_nowhere_is_a_problem(machine: Machine) -> None:
    assert [disk.problems for disk in machine.look("/dev/absent-lun")] == [["the device is not there"]]


def test_own_volumes_and_arrays(machine: Machine, label_of_lvm: Callable[..., bytes]) -> None:
    plain = machine.device("sda3", partition="3")
    machine.device("sdb").write_bytes(label_of_lvm("foreig-nnnn-nnnn-nnnn-nnnn-nnnn-nnnnnn", "other"))
    plain.write_bytes(label_of_lvm(GROUP, "debian-vg"))
    machine.device("md0", md__level="raid1")
    assert own_volumes(sysfs_dir=str(machine.sysfs), dev_dir=str(machine.dev)) == []
    machine.device("dm-0", dm__uuid="LVM-" + GROUP.replace("-", "") + "b" * 32, dm__name="debian--vg-root")
    assert own_volumes(sysfs_dir=str(machine.sysfs), dev_dir=str(machine.dev)) == [
        {"device": f"{machine.dev}/sda3", "uuid": "pppppp-pppp-pppp-pppp-pppp-pppp-pppppp", "group": "debian-vg"}
    ]
    assert arrays_here(str(machine.sysfs)) == ["md0"]
