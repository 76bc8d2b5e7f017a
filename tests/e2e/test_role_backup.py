# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Role vm_backup and playbook backup.yml: what is stored is what the disks held, and nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from harness import MIB, Backups, Simulator

APP01 = (2000, 2001)
AREAS_OF_A_PAGE = 2000


def _disks(simulator: Simulator, vm: str, keys: Tuple[int, ...] = APP01) -> Dict[int, Tuple[int, str]]:
    return {key: simulator.disk(vm, key) for key in keys}


def test_every_point_holds_what_the_disks_held(simulator: Simulator, backups: Backups, tmp_path: Path) -> None:
    """Full, incremental, differential, and full again where the parent can't be built upon; bytes of all of them."""
    held = {}

    held["p1"] = _disks(simulator, "app01")
    outcome = backups.run("app01", point="p1").ok()
    assert {disk["mode"] for disk in backups.manifest("app01", "p1")["disks"].values()} == {"full"}
    assert simulator.snapshots("app01") == []
    assert "app01  p1" in outcome.stdout and "nbdssl" in outcome.stdout

    # The same point again: nothing is done.
    seen = simulator.last_call()
    outcome = backups.run("app01", point="p1").ok()
    assert outcome.changed == 0 and simulator.changing_calls(seen) == []
    assert "app01: the point was complete already" in outcome.stdout

    # More areas than a page of the answer holds, a discard, the first and the last bytes.
    areas = AREAS_OF_A_PAGE + 100
    capacity = held["p1"][2001][0]
    assert capacity % 65536, "the disk has a last cluster that is not whole"
    simulator.write("app01", 2001, *[number * 131072 for number in range(areas)], length=512)
    simulator.write("app01", 2001, capacity - 512, seed=2, length=512)
    simulator.write("app01", 2000, 0, 100 * MIB, seed=3)
    simulator.control.call("guest_discard", vm="app01", disk=2000, offset=2 * MIB, length=4 * MIB)
    held["p2"] = _disks(simulator, "app01")
    backups.run("app01", point="p2").ok()
    manifest = backups.manifest("app01", "p2")
    assert {disk["mode"] for disk in manifest["disks"].values()} == {"incremental"}
    assert {disk["parent"] for disk in manifest["disks"].values()} == {"p1"}
    assert manifest["disks"][2001]["areas"] > AREAS_OF_A_PAGE
    assert manifest["disks"][2000]["bytes_read"] < 8 * MIB

    simulator.write("app01", 2000, 50 * MIB, seed=4)
    held["p3"] = _disks(simulator, "app01")
    backups.run("app01", point="p3", mode="differential", verify="data").ok()
    manifest = backups.manifest("app01", "p3")
    assert [(disk["mode"], disk["parent"]) for disk in manifest["disks"].values()] == [("differential", "p1")] * 2

    simulator.control.call("reset_cbt", vm="app01", disk=2000)
    simulator.control.call("grow_disk", vm="app01", disk=2001, capacity_bytes=capacity + 3 * 512)
    simulator.write("app01", 2001, capacity, seed=5, length=3 * 512)
    held["p4"] = _disks(simulator, "app01")
    backups.run("app01", point="p4").ok()
    disks = backups.manifest("app01", "p4")["disks"]
    assert [disk["mode"] for disk in disks.values()] == ["full", "full"]
    assert "reset" in disks[2000]["reason"] and str(capacity) in disks[2001]["reason"]

    assert {point: {key: backups.disk("app01", key, point) for key in APP01} for point in held} == held
    assert simulator.vm("app01")["consolidation_needed"] is False

    # A copy of the folder, somewhere else: plain qemu-img needs nothing but the files.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(backups.store("app01") / "disk-2000", elsewhere)
    backups.repository.rename(tmp_path / "gone")
    top = str(elsewhere / "p3.qcow2")
    info = ["qemu-img", "info", "--backing-chain", "--output=json", top]
    chain = json.loads(subprocess.run(info, check=True, capture_output=True).stdout)
    assert [Path(image["filename"]).name for image in chain] == ["p3.qcow2", "p1.qcow2"]
    subprocess.run(["qemu-img", "check", top], check=True, capture_output=True)
    raw = tmp_path / "p3.raw"
    simulator.control.call("read_disk", vm="app01", disk=2000, to=str(raw))
    subprocess.run(["qemu-img", "compare", top, str(raw)], check=True, capture_output=True)


def test_check_mode_touches_nothing_and_shows_the_plan(simulator: Simulator, backups: Backups) -> None:
    """Also: the connection from the action group, as a play would set it."""
    seen = simulator.last_call()
    # The first backup: what it would create is not created.
    (backups.repository / "repository.json").unlink()
    options = backups.variables(verify="data", create=True)
    for name in simulator.connection:
        del options["vm_backup_" + name]
    play = {
        "hosts": "vms",
        "gather_facts": False,
        "module_defaults": {"group/openvadp.backup.vadp": simulator.connection},
        "tasks": [
            {"name": "Back up", "ansible.builtin.include_role": {"name": "openvadp.backup.vm_backup"}},
            {
                "name": "Show",
                "openvadp.backup.show_lines": {
                    "lines": "{{ [vm_backup_result] | openvadp.backup.backup_table(width=100) }}"
                },
            },
        ],
    }
    outcome = backups.ansible.run([play], hosts=["db01"], variables=options, arguments=["--check", "--diff"]).ok()
    assert simulator.changing_calls(seen) == []
    assert list(backups.repository.iterdir()) == []
    table = outcome.stdout.split("PLAY RECAP")[0]
    lines = [line.split() for line in table.splitlines() if line.startswith("db01 ")]
    assert [line[6] for line in lines] == ["full", "skipped", "skipped"]
    assert "check mode, nothing was touched" in outcome.stdout
    assert "independent" in outcome.stdout and "raw device" in outcome.stdout


def test_what_makes_no_sense_is_refused_before_anything_is_touched(simulator: Simulator, backups: Backups) -> None:
    seen = simulator.last_call()
    for options, words in (
        ({"transports": []}, "'transports' is empty"),
        ({"device_dir": "/nonexistent"}, "device_dir"),
        ({"rate_limit": "fast"}, "fast"),
    ):
        outcome = backups.run("app01", **options)
        assert outcome.rc != 0 and words in outcome.stdout, options
    assert simulator.changing_calls(seen) == [] and os.listdir(backups.repository) == ["repository.json"]


def _restore_in_place(backups: Backups, point: str) -> None:
    """Write app01's first disk back, as playbook restore does it."""
    simulator = backups.simulator
    simulator.write("app01", 2000, 30 * MIB, seed=9)
    simulator.control.call("power", vm="app01", state="poweredOff")
    variables = simulator.role_variables("vm_restore_")
    variables.update(vm_restore_overwrite=True, vm_restore_disks=[{"key": 2000}])
    variables.update(repository=str(backups.repository), vm="app01", point=point, target="in_place")
    backups.ansible.run("openvadp.backup.restore", variables=variables).ok()
    simulator.control.call("power", vm="app01", state="poweredOn")


class Changing:
    """app01 backed up while it changes: what its disks held at each point."""

    def __init__(self, backups: Backups) -> None:
        self.backups = backups
        self.held: Dict[str, Dict[int, Tuple[int, str]]] = {}

    def point(self, name: str, **options: Any) -> Tuple[List[str], str]:
        """Write, and make a point. :returns: the modes of its disks, and the table's text."""
        simulator = self.backups.simulator
        for key in APP01:
            simulator.write("app01", key, 40 * MIB, seed=len(self.held) + 20)
        self.held[name] = _disks(simulator, "app01")
        table = self.backups.run("app01", point=name, **options).ok().stdout.partition("\nVM ")[2]
        disks = self.backups.manifest("app01", name)["disks"].values()
        return [disk["mode"] for disk in disks], " ".join(table.split())

    def check(self) -> None:
        """Every point holds what was held, and nothing is left."""
        found = {point: {key: self.backups.disk("app01", key, point) for key in APP01} for point in self.held}
        assert found == self.held
        assert self.backups.simulator.snapshots("app01") == []


def test_after_a_restore_one_backup_is_full(simulator: Simulator, backups: Backups) -> None:
    """VADP facts 12: tracking lies about a disk that a restore has written, until it is reset and a full is made."""
    app01 = Changing(backups)
    assert app01.point("p1")[0] == ["full", "full"]
    # The restore could not start tracking anew, so its mark waits for whoever does.
    simulator.control.call(
        "inject", target="task", name="CreateSnapshot_Task", fault="GenericVmConfigFault", count=1, after=1
    )
    _restore_in_place(backups, "p1")
    seen = simulator.last_call()
    planned = backups.run("app01", arguments=["--check"]).ok().stdout
    assert "would be reset" in planned and simulator.changing_calls(seen) == []
    modes, text = app01.point("p2")
    assert modes == ["full", "full"]
    assert "was reset, because it is not to be trusted for Hard disk 1: no reset was proved since a restore" in text
    modes, text = app01.point("p3")
    assert modes == ["incremental", "incremental"] and "reset" not in text
    app01.check()


@pytest.mark.soak
def test_change_tracking_that_is_not_reset(simulator: Simulator, backups: Backups) -> None:
    app01 = Changing(backups)
    app01.point("p1")
    simulator.control.call(
        "inject", target="task", name="CreateSnapshot_Task", fault="GenericVmConfigFault", count=1, after=1
    )
    _restore_in_place(backups, "p1")
    # What must be incremental fails, and costs no other tool its change IDs.
    seen = simulator.last_call()
    outcome = backups.run("app01", point="p2", mode="incremental")
    assert outcome.rc != 0 and "was not reset since a restore" in outcome.stdout
    assert "ReconfigVM_Task" not in simulator.changing_calls(seen)
    for point, expected in (("p2", ["full", "full"]), ("p3", ["full", "incremental"])):
        modes, text = app01.point(point, reset_tracking=False)
        assert modes == expected and "was reset" not in text
    # Where it can't be reset, that is said, and nothing is lost.
    simulator.control.call("inject", target="task", name="ReconfigVM_Task", fault="GenericVmConfigFault", count=1)
    modes, text = app01.point("p4")
    assert modes[0] == "full" and "could not be reset" in text
    assert app01.point("p5")[0] == ["full", "full"] and app01.point("p6")[0] == ["incremental", "incremental"]
    app01.check()


def test_a_vm_that_fails_does_not_stop_the_others(simulator: Simulator, backups: Backups) -> None:
    """Its snapshot is removed, no point of it appears, and the table and the exit code say so."""
    simulator.control.call("inject", target="task", name="RemoveSnapshot_Task", fault="GenericVmConfigFault", count=1)
    outcome = backups.run(
        "win01",
        "shared01",
        "new01",
        "nobody01",
        "copy02",
        host_variables={
            "win01": {"vm_backup_mode": "incremental"},
            "new01": {"vm_backup_mode": "yesterday"},
            "copy02": {"vm_backup_proxy": "proxy.invalid"},
        },
        snapshot_removal_delay=1,
    ).failed()
    table = [line for line in outcome.stdout.splitlines() if "FAILED [" in line]
    assert [line.split()[0] for line in table] == ["win01", "shared01", "new01", "nobody01", "copy02"]
    for reason in (
        "can't be read as incremental",
        "bus",
        "vm_backup_mode",
        "'nobody01'",
        "proxy.invalid can't be reached",
    ):
        assert reason in outcome.stdout.split("PLAY [Show what was backed up]")[1], reason
    assert [stats["failures"] for stats in outcome.stats.values() if stats["failures"] != 1] == []
    assert simulator.snapshots("win01") == [] and simulator.vm("win01")["consolidation_needed"] is False
    assert not list(backups.repository.glob("vms/*/points/*.json"))
    assert not list(backups.repository.glob("vms/*/runs/*"))

    # The others are backed up, whatever happens to one.
    outcome = backups.run(
        "win01", "db01", "copy01", host_variables={"db01": {"vm_backup_disks": ["Hard disk 9"]}}, point="p"
    ).failed()
    assert [line.split()[0] for line in outcome.stdout.splitlines() if "FAILED [" in line] == ["db01"]
    assert {host: stats["failures"] for host, stats in outcome.stats.items()} == {"win01": 0, "db01": 1, "copy01": 0}
    assert backups.disk("win01", 2000, "p") == simulator.disk("win01", 2000)
    assert backups.disk("copy01", 2000, "p") == simulator.disk("copy01", 2000)
    assert [simulator.snapshots(vm) for vm in ("win01", "db01", "copy01")] == [[], [], []]


@pytest.mark.soak
def test_a_snapshot_that_can_not_be_removed_is_said_beside_the_first_reason(
    own_simulator: Simulator, backups: Backups
) -> None:
    """And the next run removes it first, and makes the point."""
    backups.simulator = own_simulator
    # A fault for which the module itself does not try again.
    fault = "GenericVmConfigFault"
    own_simulator.control.call("inject", target="task", name="RemoveSnapshot_Task", fault=fault, count=0)
    options = {"change_tracking": False, "snapshot_removal_retries": 1, "snapshot_removal_delay": 1}
    outcome = backups.run("app01", mode="incremental", **options).failed()
    reasons = outcome.result("fail", task="Fail with the reason")["msg"]
    assert reasons.index("can't be read as incremental") < reasons.index("was not removed")
    assert len(own_simulator.snapshots("app01")) == 1

    own_simulator.control.call("clear_injections")
    backups.run("app01", point="p1", **options).ok()
    assert own_simulator.snapshots("app01") == []
    assert {key: backups.disk("app01", key, "p1") for key in APP01} == _disks(own_simulator, "app01")
