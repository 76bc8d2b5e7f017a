# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VDDK's access calls: Storage vMotion is held off while a machine is backed up, and never afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from harness import MIB, Backups, Running, Simulator
from modules import Modules

METHOD = "RelocateVM_Task"
VM = "app01"
LONG = 120


@pytest.fixture
def backups(own_simulator: Simulator, modules: Modules) -> Backups:
    """Backups of app01, in full."""
    return modules.backups


def prepared(simulator: Simulator) -> List[str]:
    """The identities that hold Storage vMotion of app01 off."""
    return list(simulator.vm(VM)["prepared"])


def wait_for(condition: Callable[[], Any], running: Running) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert running.process.poll() is None, running.wait()
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def kill_all(pid: int) -> None:
    """SIGKILL for a process and all it has started; stopped first, or a server would end in order with its parent."""
    family = [pid]
    for one in family:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(one, signal.SIGSTOP)
            for task in Path(f"/proc/{one}/task").glob("*/children"):
                family += map(int, task.read_text().split())
    for one in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def role(backups: Backups, point: str, **options: Any) -> Running:
    variables = backups.variables(point=point, mode="full", disks=["2001"], **options)
    return backups.ansible.start("openvadp.backup.backup", hosts=[VM], variables=variables)


def access(modules: Modules, state: str, **options: Any) -> Dict[str, Any]:
    options.setdefault("vddk_libdir", modules.simulator.facts["vddk_libdir"])
    return modules.run("vadp_access", **{**modules.named, "state": state, **options})


def note(outcome: Any) -> str:
    """The notes in a backup's summary."""
    kept = outcome.result("set_fact", task="Keep the result for the summary")
    return " ".join(kept["ansible_facts"]["vm_backup_result"]["notes"])


def test_prepared_and_ended_and_again(modules: Modules) -> None:
    simulator = modules.simulator
    options = {"identity": "the tests' own"}
    looked = access(modules, "prepared", _ansible_check_mode=True, **options)
    assert (looked["changed"], looked["storage_vmotion_disabled"]) == (True, True) and prepared(simulator) == []
    first = access(modules, "prepared", **options)
    assert (first["changed"], first["storage_vmotion_disabled"]) == (True, True), first
    assert prepared(simulator) == ["the tests' own"]
    assert access(modules, "prepared", **options)["changed"] is False
    other = access(modules, "ended")
    assert other["storage_vmotion_disabled"] is True and "another identity" in str(other["warnings"])
    assert access(modules, "ended", _ansible_check_mode=True, **options)["changed"] is True
    last = access(modules, "ended", **options)
    assert (last["changed"], last["storage_vmotion_disabled"], prepared(simulator)) == (True, False, [])
    assert access(modules, "ended", **options)["changed"] is False
    cleaned = access(modules, "cleaned")
    assert (cleaned["changed"], cleaned["left_over"]) == (False, {"cleaned": 0, "remaining": 0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"identity": "x" * 51}, "1 to 50"),
        ({"identity": ""}, "1 to 50"),
        ({"identity": "two\nlines"}, "1 to 50"),
        ({"vddk_libdir": "/nonexistent"}, "VDDK is not there"),
        ({"password": "wrong"}, "password"),
    ],
)
def test_what_makes_no_sense_is_refused(modules: Modules, options: Dict[str, Any], words: str) -> None:
    result = access(modules, "prepared", **options)
    assert result["failed"] and words in result["msg"], result
    assert prepared(modules.simulator) == []


def test_a_missing_privilege_is_named(modules: Modules) -> None:
    simulator = modules.simulator
    user = simulator.facts["backup_username"]
    simulator.control.call("set_privileges", username=user, remove=["Global.DisableMethods"])
    result = access(modules, "prepared")
    assert result["failed"] and "Global.DisableMethods" in result["msg"], result
    assert simulator.facts["backup_password"] not in str(result)


def test_storage_vmotion_is_held_off_during_a_backup_and_not_after(own_simulator: Simulator, backups: Backups) -> None:
    own_simulator.write(VM, 2001, 0, length=MIB)
    own_simulator.control.call("nfc", delay=0.5)
    running = role(backups, "one")
    wait_for(lambda: own_simulator.control.call("nfc")["disks"], running)
    assert len(prepared(own_simulator)) == 1
    own_simulator.control.call("nfc", delay=0)
    outcome = running.wait().ok()
    assert prepared(own_simulator) == [] and note(outcome) == ""
    assert not list(backups.repository.glob("vms/*/runs/*.json"))


@pytest.mark.soak
def test_a_backup_that_fails_ends_it(own_simulator: Simulator, backups: Backups) -> None:
    own_simulator.control.call("nfc", open_faults={"count": -1, "vix": 13})
    role(backups, "one", transports=["nbdssl"]).wait().failed()
    assert prepared(own_simulator) == [] and own_simulator.snapshots(VM) == []
    assert not list(backups.repository.glob("vms/*/runs/*.json"))


def test_the_next_run_makes_up_for_a_crash(own_simulator: Simulator, backups: Backups) -> None:
    own_simulator.write(VM, 2001, 0, length=4 * MIB)
    own_simulator.control.call("nfc", delay=2)
    running = role(backups, "one")
    wait_for(lambda: own_simulator.control.call("nfc")["disks"], running)
    kill_all(running.process.pid)
    running.wait()
    own_simulator.control.call("nfc", delay=0)
    left = prepared(own_simulator)
    assert len(left) == 1
    # Until its deadline nobody knows that the first one is dead.
    refused = backups.run(VM, point="one", mode="full", disks=["2001"]).failed()
    assert "is at work" in refused.result("fail")["msg"] and len(prepared(own_simulator)) == 1
    outcome = backups.run(VM, point="one", mode="full", disks=["2001"], force=True).ok()
    found = outcome.results("vadp_recover")[0]["recovered"]
    kinds = [item["what"] for item in found]
    assert {"what": "access", "id": left[0], "action": "ended"} in found, found
    assert kinds.index("snapshot") < kinds.index("access")
    assert prepared(own_simulator) == [] and own_simulator.snapshots(VM) == []


def test_without_the_privilege_the_backup_goes_on_and_says_so(own_simulator: Simulator, backups: Backups) -> None:
    user = own_simulator.facts["backup_username"]
    own_simulator.control.call("set_privileges", username=user, remove=["Global.DisableMethods"])
    outcome = role(backups, "one").wait().ok()
    assert "Storage vMotion is not held off" in note(outcome) and "Global.DisableMethods" in note(outcome)
    assert not list(backups.repository.glob("vms/*/runs/*.json"))


def unexpected(result: Dict[str, Any]) -> List[str]:
    """Warnings but that a run was taken for over, which is asked for."""
    return [str(text) for text in result.get("warnings") or [] if "force: run" not in str(text)]


def test_what_cannot_be_ended_now_is_ended_later(modules: Modules, own_simulator: Simulator, repository: Path) -> None:
    """VDDK is gone when the run ends, and comes back: backups are not stopped by it meanwhile."""
    libdir = own_simulator.facts["vddk_libdir"]
    options = dict(modules.named, repository=str(repository))
    begun = modules.done("vadp_recover", **options, begin=True, point="one", access=True, vddk_libdir=libdir)
    # Nobody waits for the run's deadline here.
    options["force"] = True
    assert begun["run"]["access"] == {"prepared": True, "reason": None} and not begun.get("warnings"), begun
    identity = prepared(own_simulator)
    assert len(identity) == 1 and begun["run"]["id"] in identity[0]
    missing = modules.done("vadp_recover", **options, vddk_libdir="/nonexistent")
    assert [item["what"] for item in missing["recovered"]] == [] and prepared(own_simulator) == identity
    assert "access" in str(missing["warnings"]) and "VDDK is not there" in str(missing["warnings"])
    listed = modules.done("vadp_recover", **options, vddk_libdir=libdir, _ansible_check_mode=True)
    assert [(item["what"], item["action"]) for item in listed["recovered"]] == [("access", "would be ended")]
    found = modules.done("vadp_recover", **options, vddk_libdir=libdir)
    assert [item["what"] for item in found["recovered"]] == ["access"] and found["changed"]
    assert prepared(own_simulator) == [] and not unexpected(found)
    again = modules.done("vadp_recover", **options, vddk_libdir=libdir)
    assert not again["changed"]
    without = modules.done("vadp_recover", **options, begin=True, point="two", vddk_libdir=libdir)
    assert without["run"]["access"] is None and prepared(own_simulator) == []


def test_what_vddk_attached_is_detached_before_the_snapshot_goes(
    modules: Modules, own_simulator: Simulator, repository: Path
) -> None:
    """The module and its server are killed at once, so nobody closes the disk."""
    facts = own_simulator.facts
    devices = {"device_dir": facts["device_dir"], "sysfs_dir": facts["sysfs_dir"]}
    libdir = facts["vddk_libdir"]
    named = dict(modules.named, repository=str(repository))
    run = modules.done("vadp_recover", **named, begin=True, point="one", access=True, vddk_libdir=libdir)["run"]
    # Nobody waits for the run's deadline here.
    named["force"] = True
    own_simulator.write(VM, 2001, 0, length=8 * MIB)
    moid = modules.snapshot(run["snapshot_name"], run["snapshot_description"])
    options = modules.export_options(snapshot_moid=moid, point="one", mode="full", disks=["2001"], **devices)
    own_simulator.control.call("nfc", bytes_per_second=1 << 19)
    process = modules.start("vadp_disk_export", {**options, "transports": ["hotadd"]})
    deadline = time.monotonic() + LONG
    # The disk is opened once to look, which closes it in order; what counts is the open that reads.
    while own_simulator.control.call("nfc")["local"]["hotadd"]["bytes_read"] < 1 << 20:
        assert process.poll() is None, process.out
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
    kill_all(process.pid)
    process.wait()
    assert len(own_simulator.control.call("attachments")) == 1
    found = modules.done("vadp_recover", **named, vddk_libdir=libdir, **devices)
    assert not unexpected(found), found
    assert own_simulator.control.call("attachments") == []
    assert own_simulator.snapshots(VM) == [] and prepared(own_simulator) == []
    assert not list(repository.glob("vms/*/runs/*.json"))
    assert not modules.done("vadp_recover", **named, vddk_libdir=libdir, **devices)["changed"]


def test_a_snapshot_of_change_tracking_that_a_crash_left_is_removed(
    modules: Modules, own_simulator: Simulator, repository: Path
) -> None:
    """The backup goes on over it, and its point is complete: vm_change_tracking never comes to it again."""
    foreign = modules.snapshot("before the upgrade", "made by hand")
    named = dict(modules.named, repository=str(repository))
    run = modules.done("vadp_recover", **named, begin=True, point="one")["run"]
    # Nobody waits for the run's deadline here.
    named["force"] = True
    marker = {"by": "openvadp.backup", "purpose": "change tracking"}
    # One without ids is nobody's whose run could be known: it is told of, and the next vm_change_tracking removes it.
    nobodys = modules.snapshot("openvadp change tracking 0a1b2c3e", json.dumps(marker))
    marker.update(repository_id=run["repository_id"], run_id=run["id"])
    left = modules.snapshot("openvadp change tracking 0a1b2c3d", json.dumps(marker))
    listed = modules.done("vadp_recover", **named, _ansible_check_mode=True)
    assert [item["action"] for item in listed["recovered"]] == ["would be removed"]
    found = modules.done("vadp_recover", **named)
    assert [(item["what"], item["id"]) for item in found["recovered"]] == [("snapshot", left)]
    assert nobodys in str(found["warnings"])
    assert [item["moid"] for item in own_simulator.snapshots(VM)] == [foreign, nobodys]
    assert not modules.done("vadp_recover", **named)["changed"]
