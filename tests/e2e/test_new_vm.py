# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_disk_restore with target new_vm: bytes, configuration and NVRAM against those of the machine backed up."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from administrator import Administrator
from ansible_collections.openvadp.backup.plugins.module_utils.restore.new_vm_diff import differences
from harness import Simulator
from modules import Modules

KEYS = (2000, 2001)
ISO = "[nfs01] iso/setup.iso"


class NewMachines:
    """app01 with all that a machine may have, backed up fully and incrementally."""

    def __init__(self, folder: Path) -> None:
        self.simulator = Simulator(folder / "state")
        repository = folder / "repository"
        repository.mkdir()
        self.modules = Modules(self.simulator, repository)
        iso = self.file(ISO)
        iso.parent.mkdir()
        iso.write_bytes(b"an image")
        self.administrator = Administrator(self.simulator.facts, "app01")
        self.administrator.furnish(ISO)
        self.control = self.simulator.control
        self.modules.track_changes()
        self.third = next(key for key in self.keys("app01") if key not in KEYS)
        self.simulator.write("app01", self.third, 0, 1 << 20, seed=3)
        self.modules.point("full")
        self.simulator.write("app01", 2000, 3 << 20, seed=4, length=200000)
        self.control.call("guest_discard", vm="app01", disk=2000, offset=0, length=1 << 20)
        size = self.simulator.disk("app01", 2001)[0]
        self.simulator.write("app01", 2001, size - 512, seed=5, length=512)
        self.modules.point("incremental", mode="incremental")
        self.modules.point("differential", mode="differential")
        self.app01 = self.administrator.config()
        self.nvram = self.file("[vmfs01] app01/app01.nvram").read_bytes()

    def close(self) -> None:
        self.administrator.close()
        self.simulator.stop()

    def file(self, path: str) -> Path:
        datastore, inside = path[1:].split("] ")
        return self.simulator.state / "datastores" / datastore / inside

    def keys(self, vm: str) -> List[int]:
        return [disk["key"] for disk in self.simulator.vm(vm)["disks"]]

    def names(self) -> List[str]:
        return sorted(vm["name"] for vm in self.control.call("state")["vms"].values())

    def held(self, vm: str) -> Dict[int, Any]:
        return {key: self.simulator.disk(vm, key) for key in self.keys(vm)}

    def options(self, name: str, **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        return {
            **self.simulator.connection,
            "repository": str(self.modules.repository),
            "vm_name": "app01",
            "vddk_libdir": facts["vddk_libdir"],
            "nfc_port": facts["nfc_port"],
            "transports": ["nbdssl"],
            "target": "new_vm",
            "name": name,
            **options,
        }

    def make(self, name: str, **options: Any) -> Dict[str, Any]:
        return self.modules.done("vadp_disk_restore", **self.options(name, **options))

    def refused(self, word: str, **options: Any) -> Dict[str, Any]:
        """Refused with a word of why, and nothing was changed, in vCenter or in the repository."""
        at, before = self.simulator.last_call(), self.modules.tree()
        result = self.modules.run("vadp_disk_restore", **self.options(options.pop("name", "refused"), **options))
        assert result["failed"] and word in result["msg"], result
        assert not self.simulator.changing_calls(at) and self.modules.tree() == before
        return result

    def destroy(self, name: str) -> None:
        self.administrator.destroy(name)

    def runs(self) -> List[Dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.modules.repository.glob("vms/*/runs/*.json"))]

    def stores(self) -> List[str]:
        return sorted(path.name for path in (self.modules.repository / "vms").iterdir())


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewMachines]:
    made = NewMachines(tmp_path_factory.mktemp("new-vm"))
    try:
        yield made
    finally:
        made.close()


def test_a_new_machine_is_the_old_one_but_for_what_must_differ(machines: NewMachines) -> None:
    for point in ("full", "incremental", "differential"):
        result = machines.make(f"copy-{point}", point=point)
        assert result["changed"] and result["vm"]["path"] == f"/DC0/vm/production/copy-{point}"
        assert machines.held(f"copy-{point}") == machines.modules.held[point]
        assert [entry["verified"] for entry in result["restored"]] == [True, True, True]
    told = "\n".join(result["warnings"])
    for word in ("VirtualSerialPort", "VirtualUSB", "same MAC addresses"):
        assert word in told, told
    assert "configuration differs" not in told, told
    copy = machines.administrator.config(result["vm"]["moid"])
    told_of = {device.key for device in machines.app01.hardware.device if "Serial" in type(device).__name__}
    told_of |= {device.key for device in machines.app01.hardware.device if type(device).__name__.endswith("VirtualUSB")}
    found = differences(machines.app01, copy, {"name"}, told_of)
    print("\n" + "\n".join(str(difference) for difference in found))
    assert [str(difference) for difference in found if difference.reason is None] == []
    paths = {difference.path for difference in found}
    assert {"instanceUuid", "name", "hardware.device[2000].backing.uuid", "changeTrackingEnabled"} <= paths
    assert copy.uuid == machines.app01.uuid and copy.annotation == machines.app01.annotation
    assert [card.macAddress for card in copy.hardware.device if hasattr(card, "macAddress")][1] == "00:50:56:11:22:33"
    assert [entry.deviceKey for entry in copy.bootOptions.bootOrder if hasattr(entry, "deviceKey")] == [2000]
    folder = copy.files.vmPathName.rsplit("/", 1)[0]
    assert machines.file(f"{folder}/copy-differential.nvram").read_bytes() == machines.nvram
    assert machines.stores() == [machines.app01.instanceUuid]
    for point in ("full", "incremental", "differential"):
        machines.destroy(f"copy-{point}")
