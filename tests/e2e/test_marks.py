# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mark that a restore in place leaves in the virtual machine: every repository sees it, and a kill leaves it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from administrator import Administrator
from harness import MIB, ROOT, Simulator, made_repository
from modules import Modules, Process

BOTH = (2000, 2001)
PREFIX = "openvadp."


class Site:
    """app01 with change tracking, and two repositories of it."""

    def __init__(self, simulator: Simulator, folder: Path) -> None:
        self.simulator = simulator
        self.call = simulator.control.call
        self.a, self.b = (self._repository(folder / name) for name in ("a", "b"))
        self.a.track_changes()
        for key in BOTH:
            self.write(key, 0, seed=key, length=4 * MIB)

    def _repository(self, path: Path) -> Modules:
        made_repository(path)
        return Modules(self.simulator, path)

    def write(self, key: int, *offsets: int, seed: int = 1, length: int = 65536) -> None:
        self.simulator.write("app01", key, *offsets, seed=seed, length=length)

    def power(self, on: bool) -> None:
        self.call("power", vm="app01", state="poweredOn" if on else "poweredOff")

    def tasks(self, since: int) -> List[str]:
        """What changed the virtual machine."""
        return [name for name in self.simulator.changing_calls(since) if name.endswith("_Task")]

    @property
    def settings(self) -> Dict[str, str]:
        return {
            key: value for key, value in self.simulator.vm("app01")["extra_config"].items() if key.startswith(PREFIX)
        }

    @property
    def marks(self) -> Dict[str, str]:
        """Disk UUID -> state."""
        return {
            key[len(PREFIX + "mark.") :]: value.split(":")[3]
            for key, value in self.settings.items()
            if key.startswith(PREFIX + "mark.")
        }

    def uuids(self) -> Dict[int, str]:
        return {disk["key"]: disk["uuid"].lower() for disk in self.simulator.vm("app01")["disks"]}

    def options(self, modules: Modules, point: str, **more: Any) -> Dict[str, Any]:
        return modules.export_options(vm_name="app01", target="in_place", overwrite=True, point=point, **more)

    def restore(self, modules: Modules, point: str, **more: Any) -> Dict[str, Any]:
        result = modules.done("vadp_disk_restore", **self.options(modules, point, **more))
        self.holds(modules, point)
        return result

    def holds(self, modules: Modules, point: str) -> None:
        for key in BOTH:
            assert self.simulator.disk("app01", key) == modules.held[point][key], key

    def wire(self) -> int:
        return int(sum(host["bytes_written"] for host in self.call("nfc")["hosts"].values()))

    def killed(self, modules: Modules, point: str, when: Optional[Callable[[], Any]] = None, **more: Any) -> None:
        """A restore that is killed in the middle of its first disk, or when something is so."""
        before = self.wire()
        more.setdefault("rate_limit", "500K")
        process = modules.start("vadp_disk_restore", self.options(modules, point, **more))
        self.until(process, when or (lambda: self.wire() > before))
        process.kill()

    @staticmethod
    def until(process: Process, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and process.poll() is None, process.out
            time.sleep(0.005)


@pytest.fixture
def site(own_simulator: Simulator, tmp_path: Path) -> Iterator[Site]:
    yield Site(own_simulator, tmp_path)


def warnings(result: Dict[str, Any]) -> str:
    return str(result.get("warnings", ""))


def modes(disks: Dict[int, Dict[str, Any]]) -> Dict[int, str]:
    return {key: disk["mode"] for key, disk in disks.items()}


def test_a_restore_from_one_repository_is_known_to_the_other(site: Site) -> None:
    site.a.point("a1")
    site.b.point("b1")
    site.write(2000, 8 * MIB, seed=6, length=2 * MIB)
    site.b.point("b2")
    site.power(False)
    seen = site.simulator.last_call()
    site.restore(site.a, "a1")
    # The mark; off, stun; on, stun; the mark's end: one reconfiguration each.
    assert site.tasks(seen) == [
        "ReconfigVM_Task",
        "ReconfigVM_Task",
        "CreateSnapshot_Task",
        "RemoveSnapshot_Task",
        "ReconfigVM_Task",
        "CreateSnapshot_Task",
        "RemoveSnapshot_Task",
        "ReconfigVM_Task",
    ]
    assert not site.marks
    # Back to what b2 held by a restore of what changed: from B's point of view nothing says that A was there.
    result = site.restore(site.b, "b2", changed_only=True)
    assert not any(entry["changed_only"] for entry in result["restored"]), result
    site.power(True)
    site.write(2000, 20 * MIB, seed=7)
    assert set(modes(site.b.point("b3")).values()) == {"full"}
    site.write(2000, 24 * MIB, seed=8)
    assert set(modes(site.b.point("b4")).values()) == {"incremental"}
    site.b.verify_bytes()
    site.b.verify("b3", "b4")
    site.a.clean()
    site.b.clean()


def test_tracking_that_was_off_stays_off(site: Site) -> None:
    site.a.track_changes("disabled")
    site.a.point("a1")
    site.power(False)
    seen = site.simulator.last_call()
    site.restore(site.a, "a1")
    assert site.tasks(seen) == ["ReconfigVM_Task", "ReconfigVM_Task"]
    assert not site.marks and not site.simulator.vm("app01")["change_tracking"]


def test_a_kill_leaves_the_mark_and_what_follows_sees_it(site: Site) -> None:
    site.a.point("a1")
    site.b.point("b1")
    for key in BOTH:
        site.write(key, 8 * MIB, seed=3, length=MIB)
    site.power(False)
    site.killed(site.a, "a1")
    uuids = site.uuids()
    assert site.marks == dict.fromkeys(uuids.values(), "writing")
    assert not site.simulator.vm("app01")["change_tracking"]

    # Off: no backup, no other repository's restore, no tracking.
    snapshot = site.b.snapshot("b2")
    site.b.refused(snapshot, "a restore into it is at work, or was cut", mode="auto")
    site.b.remove_snapshot(snapshot)
    refused = site.b.run("vadp_disk_restore", **site.options(site.b, "b1"))
    assert refused["failed"] and "force=true" in refused["msg"], refused
    for state in ("enabled", "reset"):
        refused = site.b.run("vm_change_tracking", **site.b.named, state=state)
        assert refused["failed"] and "a restore may be at work" in refused["msg"], refused
    assert site.marks == dict.fromkeys(uuids.values(), "writing")

    # On: everything is full, and the point says what it may hold.
    site.power(True)
    site.b.track_changes()
    assert set(modes(site.b.point("b3")).values()) == {"full"}
    site.write(2000, 20 * MIB, seed=7)
    disks = site.b.point("b4")
    assert all("did not finish" in disk["reason"] for disk in disks.values()), disks
    (warning,) = site.b.backups.manifest("app01", "b4")["warnings"]
    assert "may hold a mixture" in warning
    site.b.track_changes("reset")
    assert set(site.marks.values()) == {"writing"}, "only force takes it away"
    site.b.verify_bytes()

    # The same repository knows that its restore is over.
    site.power(False)
    site.restore(site.a, "a1")
    assert not site.marks
    site.a.clean()
    site.b.clean()


@pytest.mark.parametrize("step", ["marked", "stopped", "tracking"])
def test_a_kill_between_the_steps_leaves_the_mark(site: Site, step: str) -> None:
    """After the mark, while tracking is stopped, and while it is started anew."""
    site.a.point("a1")
    site.write(2000, 8 * MIB, seed=3, length=MIB)
    site.power(False)
    name, after, condition = {
        "marked": ("CreateSnapshot_Task", 0, lambda: site.marks),
        "stopped": ("RemoveSnapshot_Task", 0, lambda: site.simulator.snapshots("app01")),
        "tracking": ("CreateSnapshot_Task", 1, _on_again(site)),
    }[step]
    site.call("inject", target="call", name=name, delay=30.0, count=1, after=after)
    site.killed(site.a, "a1", condition, rate_limit=None)
    site.call("clear_injections")
    assert set(site.marks.values()) == {"writing"}
    result = site.restore(site.a, "a1")
    assert not site.marks and not warnings(result), result
    assert site.simulator.snapshots("app01") == []
    site.a.clean()


def _on_again(site: Site) -> Callable[[], Any]:
    def condition() -> bool:
        on = bool(site.simulator.vm("app01")["change_tracking"])
        seen.append(on)
        return on and False in seen

    seen: List[bool] = []
    return condition


def test_a_mark_is_taken_away_by_force_alone(site: Site) -> None:
    site.a.point("a1")
    site.power(False)
    site.killed(site.a, "a1")
    done = site.a.done("vm_change_tracking", **site.a.named, state="reset", force=True)
    assert done["change_tracking"]["marks"] == [] and not site.marks
    refused = site.a.run("vm_change_tracking", **site.a.named, state="enabled", force=True)
    assert refused["failed"] and "force" in refused["msg"]


def test_a_restore_whose_reset_fails_is_good_and_waits_for_it(site: Site) -> None:
    site.a.point("a1")
    site.b.point("b1")
    site.write(2000, 8 * MIB, seed=3, length=MIB)
    site.power(False)
    site.call("inject", target="task", name="CreateSnapshot_Task", fault="GenericVmConfigFault", count=1, after=1)
    result = site.restore(site.a, "a1")
    assert result["changed"] and "was not started again" in warnings(result), warnings(result)
    assert set(site.marks.values()) == {"done"}
    site.a.clean()
    # A backup with a foreign snapshot in the way reads all; the role would reset it first.
    site.power(True)
    disks = site.b.point("b2")
    assert all("was not reset since a restore" in disk["reason"] for disk in disks.values()), disks
    begun = site.b.done("vadp_recover", **_named(site.b), begin=True)
    assert [disk["key"] for disk in begun["run"]["not_trusted"]] == list(BOTH)
    site.b.done("vadp_recover", **_named(site.b), run_id=begun["run"]["id"])
    site.b.track_changes("reset")
    assert not site.marks
    assert set(modes(site.b.point("b3")).values()) == {"full"}
    assert set(modes(site.b.point("b4")).values()) == {"incremental"}
    site.b.verify_bytes()


def _named(modules: Modules) -> Dict[str, Any]:
    facts = modules.export_options()
    return {name: value for name, value in facts.items() if name not in ("transports", "nfc_port")}


def test_a_snapshot_that_appears_after_the_mark_stops_the_restore(site: Site) -> None:
    """What an export does at the same moment: it made its snapshot before it looked for marks."""
    site.a.point("a1")
    site.write(2000, 8 * MIB, seed=3)
    site.power(False)
    held = {key: site.simulator.disk("app01", key) for key in BOTH}
    session = Administrator(site.simulator.facts, "app01")
    site.call("set_settings", task_delay=1.0)
    process = site.a.start("vadp_disk_restore", site.options(site.a, "a1"))
    site.until(process, lambda: _reconfigured(site))
    site.call("set_settings", task_delay=0.02)
    # The mark's task is under way. Each look of the restore now waits a while before it is answered, so the snapshot is
    # there when it looks once more.
    site.call("inject", target="call", name="RetrievePropertiesEx", delay=1.5, count=0)
    site.until(process, lambda: site.marks)
    session.make_snapshot("b2")
    site.call("clear_injections")
    result = site.a.result(process)
    session.close()
    assert result["failed"], result
    assert "snapshots" in result["msg"] or "consolidation" in result["msg"], result
    assert {key: site.simulator.disk("app01", key) for key in BOTH} == held


def _reconfigured(site: Site) -> bool:
    return any(call["method"] == "ReconfigVM_Task" for call in site.call("calls", since=0)[-20:])


def test_another_restore_at_the_same_time_is_seen(site: Site) -> None:
    """From another repository, which has a lock of its own: the second one is refused."""
    site.a.point("a1")
    site.b.point("b1")
    site.power(False)
    first = site.a.start("vadp_disk_restore", site.options(site.a, "a1", rate_limit="8M"))
    before = site.wire()
    site.until(first, lambda: site.wire() > before)
    refused = site.b.run("vadp_disk_restore", **site.options(site.b, "b1"))
    assert refused["failed"] and "Another restore may be at work" in refused["msg"], refused
    site.call("set_extra_config", vm="app01", settings={f"openvadp.mark.{site.uuids()[2000]}": ""})
    result = site.a.result(first)
    assert result["failed"] and "taken away or replaced" in result["msg"], result


def test_without_the_privilege_unset_change_ids_are_the_proof(site: Site) -> None:
    user = site.simulator.facts["backup_username"]
    site.a.point("a1")
    site.b.point("b1")
    site.write(2000, 8 * MIB, seed=3)
    site.power(False)
    site.call("set_privileges", username=user, remove=["VirtualMachine.Config.AdvancedConfig"])
    result = site.restore(site.a, "a1")
    assert "AdvancedConfig" in warnings(result), warnings(result)
    site.power(True)
    site.write(2000, 20 * MIB, seed=4)
    assert set(modes(site.b.point("b2")).values()) == {"full"}
    site.b.verify_bytes()
    # With neither of both nothing is written.
    site.power(False)
    held = site.simulator.disk("app01", 2000)
    site.call("set_privileges", username=user, remove=["VirtualMachine.Config.ChangeTracking"])
    refused = site.a.run("vadp_disk_restore", **site.options(site.a, "a1"))
    assert refused["failed"] and "AdvancedConfig" in refused["msg"], refused
    assert site.simulator.disk("app01", 2000) == held


def allow(site: Site, role: str, *without: str) -> None:
    """The backup user has just what a role of docs/roles holds."""
    wanted = json.loads((ROOT / "docs" / "roles" / f"{role}.json").read_text(encoding="utf-8"))["privileges"]
    user = site.simulator.facts["backup_username"]
    held = site.call("set_privileges", username=user, add=wanted)
    unwanted = [name for name in held if name not in wanted or name in without]
    assert set(site.call("set_privileges", username=user, remove=unwanted)) == set(wanted) - set(without)


@pytest.mark.parametrize("without", [(), ("VirtualMachine.Config.AdvancedConfig",)])
def test_the_roles_of_the_docs_are_enough(site: Site, without: Tuple[str, ...]) -> None:
    """Backups with the one, restores with the other; without AdvancedConfig both go on, and say what is missing."""
    allow(site, "openvadp-backup", *without)
    site.a.point("a1")
    site.write(2000, 8 * MIB, seed=3)
    assert set(modes(site.a.point("a2")).values()) == {"incremental"}
    site.power(False)
    refused = site.a.run("vadp_disk_restore", **site.options(site.a, "a1"))
    assert refused["failed"], refused
    allow(site, "openvadp-restore", *without)
    result = site.restore(site.a, "a1")
    assert ("AdvancedConfig" in warnings(result)) == bool(without), result
    assert not site.marks and not site.settings
    site.a.clean()


def test_a_disk_that_moved_takes_its_mark_along(site: Site, administrator: Administrator) -> None:
    """The repository's own mark goes by the device key; the machine's by the disk."""
    site.a.point("a1")
    site.power(False)
    site.killed(site.a, "a1", disks=[{"key": 2001}])
    path = administrator.detach_disk(2001)
    moved = administrator.attach_disk(5, path)
    assert moved != 2001
    snapshot = site.a.snapshot("a2")
    site.a.refused(snapshot, "at work, or was cut", mode="auto")
    site.a.remove_snapshot(snapshot)
    site.power(True)
    disks = site.a.point("a3")
    assert "did not finish" in disks[moved]["reason"], disks


def test_disks_of_one_uuid_are_read_and_written_in_full(site: Site) -> None:
    uuids = site.uuids()
    site.a.point("a1")
    site.call("set_disk_uuid", vm="app01", disk=2001, uuid=uuids[2000])
    disks = site.a.point("a2")
    assert set(modes(disks).values()) == {"full"} and "UUID" in disks[2000]["reason"], disks
    site.write(2000, 8 * MIB, seed=3)
    site.power(False)
    result = site.restore(site.a, "a2", changed_only=True)
    assert all("the same UUID" in entry["reason"] for entry in result["restored"]), result
    assert not site.marks
