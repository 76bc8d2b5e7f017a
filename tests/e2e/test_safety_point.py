# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A safety point before a restore in place: it holds what the disks held, and nothing is overwritten without it."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any, Dict, List, Tuple

import pytest
from harness import MIB, Outcome
from modules import Modules

KEYS = (2000, 2001)
TO_RESTORE01 = [{"key": key, "target_key": key} for key in KEYS]


def _held(modules: Modules, vm: str = "app01") -> Dict[int, Tuple[int, str]]:
    return {key: modules.simulator.disk(vm, key) for key in KEYS}


def _off(modules: Modules, vm: str = "app01") -> None:
    modules.simulator.control.call("power", vm=vm, state="poweredOff")


def _changes(modules: Modules, since: int) -> List[str]:
    return [name for name in modules.simulator.changing_calls(since) if name not in ("Login", "Logout")]


def _play(modules: Modules, variables: Dict[str, Any], *arguments: str) -> Outcome:
    connection = modules.simulator.role_variables("vm_restore_")
    return modules.backups.ansible.run(
        "openvadp.backup.restore", variables={**connection, **variables}, arguments=list(arguments)
    )


def _restore(modules: Modules, *arguments: str, **variables: Any) -> Outcome:
    """By playbook restore.yml, into app01 if nothing else is said."""
    options = {"repository": str(modules.repository), "vm": "app01", "target": "in_place", "vm_restore_overwrite": True}
    return _play(modules, {**options, **variables}, *arguments)


def _refused(modules: Modules, *words: str, **variables: Any) -> None:
    """The role fails with these words, and neither the machine nor a restore point was touched."""
    at, points = modules.simulator.last_call(), modules.backups.points("app01")
    message = _restore(modules, **variables).failed().result("fail")["msg"]
    assert all(word in message for word in words), message
    assert _changes(modules, at) == [] and modules.backups.points("app01") == points


def test_the_command_below_the_table_brings_back_what_was_there(modules: Modules) -> None:
    """Also: latest is what was the latest before the safety point, and only what changed is written."""
    simulator = modules.simulator
    modules.track_changes()
    modules.point("p1")
    simulator.write("app01", 2000, 0, 7 * MIB, seed=9)
    simulator.control.call("guest_discard", vm="app01", disk=2001, offset=2 * MIB, length=MIB)
    _off(modules)
    before = _held(modules)

    outcome = _restore(modules, safety_point="before", vm_restore_changed_only=True).ok()
    result = outcome.result("vadp_disk_restore")
    assert result["point"] == "p1" and _held(modules) == modules.held["p1"] != before
    # The safety point takes nothing from what change tracking tells the restore.
    assert [disk["changed_only"] for disk in result["restored"]] == [True, True]
    disks = modules.backups.manifest("app01", "before")["disks"]
    assert {key: disk["mode"] for key, disk in disks.items()} == dict.fromkeys(KEYS, "incremental")
    assert simulator.vm("app01")["power_state"] == "poweredOff"
    modules.clean()

    (command,) = [line for line in outcome.stdout.splitlines() if "ansible-playbook openvadp.backup.restore" in line]
    words = shlex.split(command)
    assert words[:2] == ["ansible-playbook", "openvadp.backup.restore"] and set(words[2::2]) == {"-e"}
    _play(modules, dict(word.split("=", 1) for word in words[3::2])).ok()
    assert _held(modules) == before
    modules.clean()


def test_what_a_killed_restore_left_is_no_state_to_go_back_to(modules: Modules) -> None:
    """Of a machine that the repository knows nothing of, then of one that it knows: a backup and the next restore."""
    simulator = modules.simulator
    simulator.write("app01", 2000, *[number * MIB for number in range(10)], seed=2)
    modules.point("p1")
    _off(modules, "restore01")
    into = {"vm_name": "app01", "target": "in_place", "overwrite": True, "point": "p1", "disks": TO_RESTORE01}
    options = {**modules.export_options(name="restore01"), **into}

    def half_written() -> List[int]:
        records = [json.loads(path.read_text()) for path in modules.repository.glob("vms/*/runs/*.json")]
        return [key for record in records for item in record["intents"] for key in item.get("half_written", [])]

    process = modules.start("vadp_disk_restore", {**options, "rate_limit": "200K"})
    deadline = time.monotonic() + 120
    while half_written() != [2000]:
        assert time.monotonic() < deadline and process.poll() is None, process.out
        time.sleep(0.01)
    process.kill()

    planned = modules.done("vadp_disk_restore", **options, _ansible_check_mode=True)
    assert planned["vm"]["name"] == "restore01"
    assert [(disk["key"], disk["point"]) for disk in planned["half_written"]] == [(2000, "p1")]
    at = simulator.last_call()
    named = {"vm_restore_name": "restore01", "vm_restore_disks": TO_RESTORE01, "point": "p1"}
    message = _restore(modules, safety_point=True, **named).failed().result("fail")["msg"]
    assert "a restore of point p1 into disk 2000 did not finish" in message
    assert "without vm_restore_safety_point" in message and _changes(modules, at) == []
    assert len(list(modules.repository.glob("vms/*"))) == 1

    other = Modules(simulator, modules.repository, vm="restore01")
    snapshot = other.snapshot("mixture")
    refused = other.export(snapshot, "mixture")
    assert refused["failed"] and "a restore into it is at work, or was cut" in refused["msg"], refused
    other.make(snapshot, "mixture", force=True)
    other.remove_snapshot(snapshot)
    warnings = other.backups.manifest("restore01", "mixture")["warnings"]
    assert any("disk 2000 holds neither what it held nor a restore point" in warning for warning in warnings)
    result = modules.done("vadp_disk_restore", **options)
    assert result["half_written"] == [] and half_written() == []
    assert {key: simulator.disk("restore01", key) for key in KEYS} == modules.held["p1"]
    modules.clean()
    other.clean()


@pytest.mark.soak
def test_nothing_is_touched_where_it_is_not_wanted_so(modules: Modules) -> None:
    """Check mode, and what is refused."""
    simulator = modules.simulator
    modules.track_changes()
    modules.point("p1")
    simulator.write("app01", 2000, 0, seed=9)
    _refused(modules, "in_place", safety_point=True, target="file", dest="/nowhere", vm_restore_overwrite=False)
    at = simulator.last_call()
    running = _restore(modules, safety_point=True).failed()
    assert "power it off" in running.result("vadp_disk_restore")["msg"] and _changes(modules, at) == []
    _off(modules)
    before = _held(modules)
    outcome = _restore(modules, "--check", safety_point=True).ok()
    assert "-before-restore of app01 would be made first" in outcome.stdout and _changes(modules, at) == []
    _refused(modules, "has a restore point p1 already", "leave vm_restore_safety_point out", safety_point="p1")

    # A safety point that does not become complete, or does not hold what would be overwritten.
    simulator.control.call("inject", target="task", name="CreateSnapshot_Task", fault="GenericVmConfigFault", count=0)
    failed = _restore(modules, safety_point=True).failed()
    assert "The safety point could not be made, and no disk was written" in failed.result("fail")["msg"]
    simulator.control.call("clear_injections")
    failed = _restore(modules, safety_point="part", vm_backup_exclude_disks=["Hard disk 1"]).failed()
    assert "part of app01 does not hold all disks that would be overwritten" in failed.result("fail")["msg"]
    assert _held(modules) == before
    modules.clean()

    # A restore that fails tells the way back, and what it left is no state to go back to unless that is said.
    simulator.control.call("nfc", write_faults={"count": -1, "vix": 1})
    failed = _restore(modules, safety_point=True, point="p1").failed()
    simulator.control.call("nfc", clear_faults=True)
    message = failed.result("fail")["msg"]
    (made,) = [name for name in modules.backups.points("app01") if name.endswith("-before-restore")]
    assert f"What app01 held before is restore point {made}" in message and "vm_restore_point p1" in message
    assert {key: modules.backups.disk("app01", key, made) for key in KEYS} == before
    _refused(modules, "a restore of point p1 into disk 2000", safety_point=True, point="p1")
    wanted = {"safety_point": "half", "vm_restore_safety_point_half_written": "true"}
    _restore(modules, point="p1", **wanted).ok()
    assert _held(modules) == modules.held["p1"]
    warnings = modules.backups.manifest("app01", "half")["warnings"]
    assert any("disk 2000 holds neither" in text for text in warnings), warnings
    _restore(modules, safety_point="yes", point="half").ok()
    # The safety point that was made just now is not what somebody means who asks for the latest.
    _refused(modules, "latest of app01 is", "the safety point of an earlier restore", safety_point=True)
    modules.clean()
