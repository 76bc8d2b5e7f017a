# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Points know where they come from: names that are used again, replicas, rollbacks, clocks (proofs 15 to 22).

Each test compares the bytes of every point it makes with what the snapshot froze.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
from administrator import Administrator
from copies import replica, rollback  # beside the simulator
from harness import MIB, Simulator, made_repository
from modules import Modules, modes

BOTH = (2000, 2001)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[[Path], Modules]]:
    """Starts a simulator on a state folder, and gives the modules on it; all of them on one repository."""
    started: List[Simulator] = []
    repository = tmp_path / "repository"
    made_repository(repository)

    def start(state: Path) -> Modules:
        simulator = Simulator(state)
        started.append(simulator)
        return Modules(simulator, repository)

    yield start
    for simulator in started:
        if simulator._process.poll() is None:
            simulator.stop()


def first_points(modules: Modules) -> None:
    modules.track_changes()
    modules.simulator.write("app01", 2000, 0, seed=5, length=4 * MIB)
    modules.point("p1")
    modules.simulator.write("app01", 2000, 4 * MIB, seed=55, length=MIB)
    assert modes(modules.point("p2"))[2000] == ("incremental", "p1")


def named(modules: Modules) -> Dict[int, str]:
    """The content IDs that the VM names, by device key."""
    identity = json.loads((modules.repository / "repository.json").read_bytes())["id"]
    machine = modules.simulator.vm("app01")
    settings = machine["extra_config"]
    uuids = {disk["key"]: disk["uuid"].lower() for disk in machine["disks"]}
    keys = {key: settings.get(f"openvadp.id.{identity}.{uuid}") for key, uuid in uuids.items()}
    return {key: value.rpartition(":")[2] for key, value in keys.items() if value}


def ids(modules: Modules, point: str) -> Dict[int, str]:
    return {key: disk["content_id"] for key, disk in modules.backups.manifest("app01", point)["disks"].items()}


def test_a_replica_and_the_original_in_one_repository(world: Callable[[Path], Modules], tmp_path: Path) -> None:
    """Each goes on from the point that it names; ``latest`` is that of the server that is connected."""
    original = world(tmp_path / "state")
    first_points(original)
    original.simulator.stop()
    replica(tmp_path / "state", tmp_path / "dr", same_vcenter=False)
    replica(tmp_path / "state", tmp_path / "same", same_vcenter=True)
    original.simulator.start()
    original = Modules(original.simulator, original.repository)
    test = world(tmp_path / "dr")
    original.simulator.write("app01", 2000, 8 * MIB, seed=6, length=2 * MIB)
    test.simulator.write("app01", 2000, 16 * MIB, seed=7, length=2 * MIB)
    assert modes(test.point("dr1"))[2000] == ("incremental", "p2")
    # A name that the other one has used is not a backup of this one.
    where = {**original.named, "repository": str(original.repository)}
    begun = original.run("vadp_recover", **where, begin=True, point="dr1")
    snapshot = original.snapshot("taken")
    for taken in (begun, original.export(snapshot, "dr1")):
        assert taken["failed"] and "it was made from server" in taken["msg"], taken
    original.remove_snapshot(snapshot)
    original.simulator.write("app01", 2000, 24 * MIB, seed=8, length=65536)
    assert modes(original.point("p3"))[2000] == ("incremental", "p2")
    test.simulator.write("app01", 2000, 28 * MIB, seed=9, length=65536)
    assert modes(test.point("dr2"))[2000] == ("incremental", "dr1")
    original.verify_bytes()
    test.verify_bytes()
    original.verify("dr1", "p3", "dr2")

    dest = tmp_path / "dest"
    dest.mkdir()
    refused = original.run(
        "vadp_disk_restore", repository=str(original.repository), vm_name="app01", target="file", dest=str(dest)
    )
    assert refused["failed"] and "points of several servers" in refused["msg"], refused
    assert "p3 of server" in refused["msg"] and "dr2 of server" in refused["msg"] and list(dest.iterdir()) == []
    for modules, newest in ((original, "p3"), (test, "dr2")):
        modules.simulator.control.call("power", vm="app01", state="poweredOff")
        found = modules.done(
            "vadp_disk_restore",
            **modules.export_options(target="in_place"),
            vm_uuid=modules.simulator.vm("app01")["instance_uuid"],
            point="latest",
            overwrite=True,
            _ansible_check_mode=True,
        )
        assert found["point"] == newest, found

    # A vCenter that was restored has the same UUID: nobody can tell whose the newer points are.
    same = world(tmp_path / "same")
    same.simulator.write("app01", 2000, 12 * MIB, seed=10, length=65536)
    disks = same.point("s1")
    assert disks[2000]["mode"] == "full" and "shows point p2 though" in disks[2000]["reason"], disks[2000]
    same.verify_bytes()


@pytest.mark.parametrize("configuration", [True, False])
def test_a_rollback_by_the_array(world: Callable[[Path], Modules], tmp_path: Path, configuration: bool) -> None:
    """The VM shows it where its configuration went back too. Else nothing does: docs/promises.md says so."""
    modules = world(tmp_path / "state")
    simulator = modules.simulator
    first_points(modules)
    simulator.stop()
    replica(tmp_path / "state", tmp_path / "array", same_vcenter=True)
    simulator.start()
    modules = Modules(simulator, modules.repository)
    simulator.write("app01", 2000, 8 * MIB, seed=6, length=2 * MIB)
    modules.point("p3")
    assert named(modules) == ids(modules, "p3")
    simulator.stop()
    rollback(tmp_path / "state", tmp_path / "array", configuration)
    simulator.start()
    held = modules.held
    modules = Modules(simulator, modules.repository)
    # What raises the number of the change IDs above that of the newest point.
    for number in range(3):
        modules.remove_snapshot(modules.snapshot(f"other {number}"))
    simulator.write("app01", 2000, 24 * MIB, seed=8, length=65536)
    disks = modules.point("p4")
    stored = modules.backups.disk("app01", 2000, "p4")
    if configuration:
        assert disks[2000]["mode"] == "full" and "shows point p2 though p3 is newer" in disks[2000]["reason"]
        modules.verify_bytes()
        modules.verify("p4")
    else:
        # The documented limit: the name says p3, change tracking says nothing, and the point is wrong.
        assert modes(disks)[2000] == ("incremental", "p3") and stored != modules.held["p4"][2000]
        assert modes(modules.point("p5", mode="full"))[2000] == ("full", None)
        modules.verify_bytes("p5")
    assert set(held) == {"p3"}


def test_a_point_that_is_made_again_under_its_name(modules: Modules) -> None:
    """What stood upon the old one is told to be broken, is not restored, and nothing is built upon it."""
    simulator = modules.simulator
    first_points(modules)
    simulator.write("app01", 2000, 12 * MIB, seed=7, length=65536)
    modules.point("tue")
    store = modules.backups.store("app01")
    for pattern in ("points/p2.json", "configs/p2.*", "disk-*/p2.*"):
        for path in store.glob(pattern):
            path.unlink()
    simulator.write("app01", 2000, 8 * MIB, seed=9, length=2 * MIB)
    again = modules.point("p2")
    assert again[2000]["mode"] == "full", again[2000]
    checked = modules.run(
        "restore_point_verify", repository=str(modules.repository), vm_name="app01", point="tue", level="structure"
    )
    words = "point p2 is not the one that it was made upon"
    assert checked["failed"] and words in checked["msg"], checked
    dest = modules.repository.parent / "dest"
    dest.mkdir()
    refused = modules.run(
        "vadp_disk_restore", repository=str(modules.repository), vm_name="app01", point="tue", target="file",
        dest=str(dest),
    )  # fmt: skip
    assert refused["failed"] and words in refused["msg"] and list(dest.iterdir()) == [], refused
    simulator.write("app01", 2000, 30 * MIB, seed=10, length=65536)
    assert modes(modules.point("wed"))[2000] == ("incremental", "p2")
    modules.verify_bytes("p1", "p2", "wed")


def test_a_clock_that_was_ahead(modules: Modules) -> None:
    """``latest`` is what was made last, the next backup is incremental, and who looks is told of the clock."""
    call = modules.simulator.control.call
    call("set_settings", clock_offset=30 * 86400)
    modules.track_changes()
    snapshot = modules.snapshot("p1")
    result = modules.export(snapshot, "p1")
    assert "s ahead of this machine's" in str(result["warnings"]), result["warnings"]
    modules.remove_snapshot(snapshot)
    call("set_settings", clock_offset=0)
    modules.simulator.write("app01", 2001, 0, seed=5, length=MIB)
    snapshot = modules.snapshot("p2")
    result = modules.export(snapshot, "p2")
    modules.remove_snapshot(snapshot)
    assert modes({disk["key"]: disk for disk in result["disks"]})[2001] == ("incremental", "p1"), result
    assert not result.get("warnings"), result
    where = {"repository": str(modules.repository), "vm_name": "app01"}
    found = modules.done("restore_point_info", **where, point="latest")["points"]
    assert [(one["point"], one["sequence"]) for one in found] == [("p2", 2)]
    dest = modules.repository.parent / "dest"
    dest.mkdir()
    assert modules.done("vadp_disk_restore", **where, target="file", dest=str(dest))["point"] == "p2"


def test_names_are_written_once_and_only_while_they_are_proved(modules: Modules, administrator: Administrator) -> None:
    simulator = modules.simulator
    call = simulator.control.call
    first_points(modules)
    assert named(modules) == ids(modules, "p2")
    # Nothing changed: nothing is written into the VM, and the next point stands upon the one that it names.
    seen = simulator.last_call()
    modules.point("idle")
    assert "ReconfigVM_Task" not in simulator.changing_calls(seen) and named(modules) == ids(modules, "p2")
    simulator.write("app01", 2000, 8 * MIB, seed=1, length=MIB)
    assert modes(modules.point("p3")) == dict.fromkeys(BOTH, ("incremental", "p2"))
    assert named(modules) == ids(modules, "p3")

    # By choice, or without the privilege, the VM is not told; what is built upon such a point goes by change tracking.
    simulator.write("app01", 2000, 10 * MIB, seed=2, length=MIB)
    modules.point("silent", vm_ids=False)
    assert named(modules) == ids(modules, "p3")
    call("set_privileges", username=simulator.facts["backup_username"], remove=["VirtualMachine.Config.AdvancedConfig"])
    simulator.write("app01", 2000, 12 * MIB, seed=3, length=MIB)
    snapshot = modules.snapshot("unable")
    result = modules.export(snapshot, "unable")
    modules.held["unable"] = {key: simulator.disk("app01", key, snapshot) for key in BOTH}
    assert modes({disk["key"]: disk for disk in result["disks"]})[2000] == ("incremental", "silent"), result
    assert "VirtualMachine.Config.AdvancedConfig" in str(result["warnings"]), result["warnings"]
    modules.remove_snapshot(snapshot)
    call("set_privileges", username=simulator.facts["backup_username"], add=["VirtualMachine.Config.AdvancedConfig"])
    simulator.write("app01", 2000, 14 * MIB, seed=4, length=MIB)
    assert modes(modules.point("able"))[2000] == ("incremental", "unable")
    assert named(modules) == ids(modules, "able")

    # The write is missed: it is made up for as long as the snapshot is there, and never later.
    simulator.write("app01", 2000, 16 * MIB, seed=6, length=MIB)
    snapshot = modules.snapshot("missed")
    call("inject", target="call", name="ReconfigVM_Task", fault="GenericVmConfigFault", count=1)
    result = modules.export(snapshot, "missed")
    assert not result["failed"] and "the VM does not name it" in str(result["warnings"]), result
    modules.held["missed"] = {key: simulator.disk("app01", key, snapshot) for key in BOTH}
    assert named(modules) == ids(modules, "able")
    assert modules.export(snapshot, "missed")["changed"] is True and named(modules) == ids(modules, "missed")
    assert modules.export(snapshot, "missed")["changed"] is False
    modules.remove_snapshot(snapshot)

    # Gone, and the VM reverted to a snapshot from before it: the name would be a lie.
    before = modules.snapshot("before")
    simulator.write("app01", 2000, 18 * MIB, seed=7, length=MIB)
    snapshot = modules.snapshot("lost")
    call("inject", target="call", name="ReconfigVM_Task", fault="GenericVmConfigFault", count=1)
    assert not modules.export(snapshot, "lost")["failed"]
    modules.held["lost"] = {key: simulator.disk("app01", key, snapshot) for key in BOTH}
    administrator.revert(before)
    call("power", vm="app01", state="poweredOn")
    assert modules.export(snapshot, "lost")["changed"] is False and named(modules) == ids(modules, "missed")
    modules.remove_snapshot(snapshot)
    modules.remove_snapshot(before)
    simulator.write("app01", 2000, 20 * MIB, seed=8, length=MIB)
    last = modules.point("last")
    assert last[2000]["mode"] == "full" and "though lost is newer" in last[2000]["reason"], last[2000]
    modules.verify_bytes()

    # Retired: what the VM says of this repository goes, and nothing else.
    identity = json.loads((modules.repository / "repository.json").read_bytes())["id"]
    call("set_extra_config", vm="app01", settings={"openvadp.mark.x": "kept", "guestinfo.x": "kept"})
    forget = {**modules.named, "forget_repository": identity}
    forgotten = modules.done("vadp_recover", **forget)
    assert forgotten["changed"] and len(forgotten["forgotten"]) == len(BOTH) and named(modules) == {}
    settings = simulator.vm("app01")["extra_config"]
    assert settings["openvadp.mark.x"] == "kept" and settings["guestinfo.x"] == "kept"
    assert modules.done("vadp_recover", **forget)["changed"] is False
    both = modules.run("vadp_recover", **forget, repository=str(modules.repository))
    assert both["failed"] and "forget_repository" in both["msg"]
    disks = modules.point("after")
    assert "names no point though last is the newest" in disks[2000]["reason"], disks[2000]
