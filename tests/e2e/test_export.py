# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Modules vadp_disk_export and vadp_recover by themselves: what goes wrong on the way, and what a crash leaves.

The modules run as processes of their own, as Ansible starts them, most of them without ansible-playbook around them.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from harness import ROOT, Ansible, Backups, Simulator, plant_orphans

NOOP_CALLS = 12


class Modules:
    """The modules on one VM and one repository."""

    def __init__(self, simulator: Simulator, repository: Path, vm: str) -> None:
        self.simulator = simulator
        self.repository = repository
        self.vm = vm
        self.named = dict(simulator.connection, name=vm)

    def start(self, name: str, options: Dict[str, Any], **internal: Any) -> "subprocess.Popen[str]":
        """A module as a process; its arguments go through a file that only we can read."""
        arguments = {f"_ansible_{key}": value for key, value in internal.items()}
        with tempfile.NamedTemporaryFile("w", suffix=".json", dir=self.repository.parent, delete=False) as file:
            json.dump({"ANSIBLE_MODULE_ARGS": {**options, **arguments}}, file)
        module = f"ansible_collections.openvadp.backup.plugins.modules.{name}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "build" / "tree")}
        command = [str(ROOT / ".venv" / "bin" / "python"), "-m", module, file.name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, name: str, options: Dict[str, Any], check: bool = False, diff: bool = False) -> Dict[str, Any]:
        """A module's result, with ``failed`` set or not."""
        process = self.start(name, options, check_mode=check, diff=diff)
        out, err = process.communicate(timeout=120)
        assert out.strip().startswith("{"), err
        return {"failed": False, **json.loads(out)}

    def snapshot(self, name: str, description: str = "") -> str:
        options = dict(self.named, snapshot_name=name, description=description, quiesce="never")
        result = self.run("vm_snapshot", options)
        assert not result["failed"], result
        return str(result["snapshot"]["moid"])

    def remove_snapshot(self, moid: str) -> None:
        result = self.run("vm_snapshot", dict(self.named, snapshot_moid=moid, state="absent"))
        assert not result["failed"], result

    def export_options(self, **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        defaults = dict(self.named, repository=str(self.repository), vddk_libdir=facts["vddk_libdir"])
        defaults.update(nfc_port=facts["nfc_port"], transports=["nbdssl", "nbd"])
        return dict(defaults, **options)

    def export(self, check: bool = False, diff: bool = False, **options: Any) -> Dict[str, Any]:
        return self.run("vadp_disk_export", self.export_options(**options), check, diff)

    def recover(self, check: bool = False, **options: Any) -> Dict[str, Any]:
        # What was begun here goes on for all that anybody can know; the tests don't wait for its deadline.
        options = dict(self.named, repository=str(self.repository), force="begin" not in options, **options)
        result = self.run("vadp_recover", options, check)
        assert not result["failed"], result
        return result

    def leave_nothing(self) -> None:
        """The simulator as the next test wants it, whatever became of this one."""
        self.simulator.control.call("nfc", clear_faults=True, delay=0, bytes_per_second=None)
        for snapshot in reversed(self.simulator.snapshots(self.vm)):
            self.remove_snapshot(snapshot["moid"])

    def files(self) -> List[str]:
        return sorted(str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file())

    def tracking(self) -> None:
        result = self.run("vm_change_tracking", dict(self.named, state="enabled"))
        assert not result["failed"], result


@pytest.fixture
def app01(simulator: Simulator, repository: Path) -> Iterator[Modules]:
    modules = Modules(simulator, repository, "app01")
    yield modules
    modules.leave_nothing()


@pytest.fixture
def db01(simulator: Simulator, repository: Path) -> Iterator[Modules]:
    modules = Modules(simulator, repository, "db01")
    yield modules
    modules.leave_nothing()


def _modes(result: Dict[str, Any]) -> List[str]:
    return [disk["mode"] for disk in result["disks"] if not disk["skipped"]]


def test_check_mode_plans_and_touches_nothing(
    db01: Modules, simulator: Simulator, backups: Backups, ansible: Ansible
) -> None:
    seen = simulator.last_call()
    everything = ["san", "hotadd", "nbdssl", "nbd", "https"]
    options = db01.export_options(snapshot_name="not made yet", point="one", transports=everything)
    planned = ansible.module("vadp_disk_export", options, check=True, diff=True)
    assert planned["changed"] and not planned["failed"]
    assert planned["point"] == {"point": "one"}
    assert planned["diff"] == {"before": {"points": []}, "after": {"points": ["one"]}}
    disk, *skipped = planned["disks"]
    assert (disk["mode"], disk["transport"]) == ("full", "nbdssl")
    assert [reason.split(":")[0] for reason in disk["transport_reasons"]] == ["san", "hotadd"]
    assert [other["key"] for other in skipped] == [2001, 2002] and all(other["skip_reason"] for other in skipped)
    assert db01.recover(check=True, begin=True, point="one")["run"]["complete"] is False
    assert db01.files() == ["repository.json"] and simulator.changing_calls(seen) == []

    moid = db01.snapshot("nightly")
    made = db01.export(snapshot_moid=moid, point="one", diff=True)
    assert made["changed"] and made["diff"]["after"] == {"points": ["one"]}
    assert [disk["key"] for disk in made["point"]["skipped_disks"]] == [2001, 2002]
    assert backups.disk("db01", 2000, "one") == simulator.disk("db01", 2000, moid)
    before = db01.files()
    db01.export(check=True, snapshot_moid=moid)
    assert db01.files() == before

    # The point is there: the snapshot need not be.
    db01.remove_snapshot(moid)
    seen = simulator.last_call()
    again = db01.export(snapshot_moid=moid, point="one", mode="incremental")
    assert not again["changed"] and not again["failed"]
    assert again["point"] == made["point"]
    calls = simulator.control.call("calls", since=seen)
    assert 0 < len(calls) <= NOOP_CALLS and not any(call["changing"] for call in calls)


def test_input_that_can_not_work_touches_nothing(db01: Modules, simulator: Simulator, tmp_path: Path) -> None:
    moid = db01.snapshot("nightly")
    for options, words in (
        (dict(snapshot_name="absent"), ["absent", "'nightly'", "vm_snapshot"]),
        (dict(snapshot_moid=moid, disks=["Hard disk 9"]), ["Hard disk 9", "'Hard disk 1' (2000)"]),
        (dict(snapshot_moid=moid, disks=["2001"]), ["Hard disk 2", "independent"]),
        (dict(snapshot_moid=moid, point="a/b"), ["a/b"]),
        (dict(snapshot_moid=moid, rate_limit="fast"), ["fast"]),
        (dict(snapshot_moid=moid, transports=["san", "nbdssl"], require_transport=True), ["NFS", "nbdssl first"]),
        (dict(snapshot_moid=moid, mode="incremental"), ["first restore point", "mode auto or full"]),
    ):
        result = db01.export(**options)
        assert result["failed"], options
        assert all(word in result["msg"] for word in words), result["msg"]
        assert "Traceback" not in result["msg"]
    options = dict(db01.export_options(snapshot_moid=moid), vddk_libdir=str(tmp_path))
    result = db01.run("vadp_disk_export", options)
    assert result["failed"] and f"{tmp_path}/lib64" in result["msg"]
    assert db01.files() == ["repository.json"]
    options = dict(db01.export_options(snapshot_moid=moid, io_timeout=2), nfc_port=9)
    result = db01.run("vadp_disk_export", options)
    assert result["failed"] and "Hard disk 1" in result["msg"] and "902" in result["msg"]
    assert [name.rpartition("/")[2] for name in db01.files()] == ["repository.json", "lock", "vm.json"]


@pytest.mark.soak
def test_faults_on_the_way_are_healed_or_told(app01: Modules, simulator: Simulator, backups: Backups) -> None:
    nfc = simulator.control.call
    moid = app01.snapshot("nightly")
    nfc("nfc", read_faults={"count": 1, "after": 1, "action": "fail"})
    assert not app01.export(snapshot_moid=moid, point="failed-once", mode="full")["failed"]
    nfc("nfc", read_faults={"count": 1, "after": 1, "action": "drop"})
    assert not app01.export(snapshot_moid=moid, point="dropped-once", mode="full")["failed"]
    nfc("nfc", delay=0.4)
    options = app01.export_options(snapshot_moid=moid, point="expired", mode="full")
    running = app01.start("vadp_disk_export", options)
    _wait_for(lambda: list(app01.repository.glob("vms/*/disk-*/expired.qcow2.part-*")))
    assert nfc("expire_sessions")
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, out + err
    nfc("nfc", delay=0)
    for point in ("failed-once", "dropped-once", "expired"):
        for key in (2000, 2001):
            assert backups.disk("app01", key, point) == simulator.disk("app01", key, moid)

    nfc("nfc", read_faults={"count": -1, "vix": 14014, "action": "fail"})
    result = app01.export(snapshot_moid=moid, point="never", io_timeout=4)
    assert result["failed"] and "14014" in result["msg"] and "maintenance" in result["msg"]
    assert result["error"]["retryable"] is True
    assert not [name for name in app01.files() if "never" in name or ".part-" in name]


def test_a_second_try_reads_what_is_missing_and_never_mixes_snapshots(
    app01: Modules, simulator: Simulator, backups: Backups
) -> None:
    moid = app01.snapshot("first")
    path = simulator.vm("app01")["disks"][1]["chain"][-1]
    simulator.control.call("nfc", read_faults={"count": -1, "vix": 13, "action": "fail", "path": path})
    options: Dict[str, Any] = dict(point="one", parallel_disks=1, io_timeout=4, mode="full")
    result = app01.export(snapshot_moid=moid, **options)
    assert result["failed"] and "Hard disk 2" in result["msg"] and "DiskRandomRead" in result["msg"]
    assert backups.repository.joinpath("repository.json").exists()
    assert not [name for name in app01.files() if "/points/" in name or ".part-" in name]
    simulator.control.call("nfc", clear_faults=True)

    finished = next(app01.repository.glob("vms/*/disk-2000/one.qcow2")).stat()
    assert not app01.export(snapshot_moid=moid, **options)["failed"]
    again = next(app01.repository.glob("vms/*/disk-2000/one.qcow2")).stat()
    assert (again.st_ino, again.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    for key in (2000, 2001):
        assert backups.disk("app01", key, "one") == simulator.disk("app01", key, moid)

    # The same again, but both disks are written and another snapshot is made before the second try.
    simulator.control.call("nfc", read_faults={"count": -1, "vix": 13, "action": "fail", "path": path})
    options["point"] = "two"
    assert app01.export(snapshot_moid=moid, **options)["failed"]
    simulator.control.call("nfc", clear_faults=True)
    app01.remove_snapshot(moid)
    planted = plant_orphans(app01.repository)
    for key in (2000, 2001):
        simulator.write("app01", key, 65536, seed=9)
    moid = app01.snapshot("second")
    assert not app01.export(snapshot_moid=moid, **options)["failed"]
    assert not any(path.exists() for path in planted)
    for key in (2000, 2001):
        assert backups.disk("app01", key, "two") == simulator.disk("app01", key, moid)
    app01.remove_snapshot(moid)
    assert [item["what"] for item in app01.recover()["recovered"]] == []
    assert not list(app01.repository.glob("vms/*/runs/*"))
    # A point that has lost a file is there, and no backup.
    assert app01.export(snapshot_moid=moid, **options)["changed"] is False
    next(app01.repository.glob("vms/*/disk-2001/two.qcow2")).unlink()
    damaged = app01.export(snapshot_moid=moid, **options)
    assert damaged["failed"] and "exists, and is damaged" in damaged["msg"] and "two.qcow2" in damaged["msg"], damaged


@pytest.mark.soak
def test_a_killed_export_leaves_nothing_that_recovery_does_not_find(
    app01: Modules, simulator: Simulator, backups: Backups
) -> None:
    run = app01.recover(begin=True, point="one")["run"]
    moid = app01.snapshot(run["snapshot_name"], run["snapshot_description"])
    simulator.control.call("nfc", bytes_per_second=300000)
    running = app01.start("vadp_disk_export", app01.export_options(snapshot_moid=moid, point="one", mode="full"))
    _wait_for(lambda: list(app01.repository.glob("vms/*/disk-2001/one.qcow2.part-*")))
    lock = next(app01.repository.glob("vms/*/lock"))

    # While it works, nobody recovers it.
    locked = app01.run("vadp_recover", dict(app01.named, repository=str(app01.repository)))
    assert locked["failed"] and "vadp_disk_export" in locked["msg"] and locked["error"]["kind"] == "LockedError"

    assert json.loads(lock.read_text(encoding="utf-8"))["pid"] == running.pid
    running.kill()
    running.communicate()
    simulator.control.call("nfc", bytes_per_second=None)
    _wait_for(lambda: not _processes_of(run["id"]), 10)
    assert not [name for name in app01.files() if "/points/" in name]

    listed = app01.recover(check=True)
    assert simulator.snapshots("app01")
    found = app01.recover()
    assert found["changed"]
    assert [(item["what"], item["id"]) for item in listed["recovered"]] == [
        (item["what"], item["id"]) for item in found["recovered"]
    ]
    assert ("snapshot", moid) in [(item["what"], item["id"]) for item in found["recovered"]]
    assert simulator.snapshots("app01") == []
    assert not [name for name in app01.files() if ".part-" in name or "/runs/" in name or ".qcow2" in name]
    assert not list(Path("/tmp").glob(f"openvadp-{_short(run['id'])}*"))
    again = app01.recover()
    assert not again["changed"] and again["recovered"] == []

    outcome = backups.run("app01", point="one").ok()
    assert outcome.result("vadp_disk_export")["point"]["point"] == "one"
    for key in (2000, 2001):
        assert backups.disk("app01", key, "one") == simulator.disk("app01", key)


@pytest.mark.soak
def test_snapshots_of_others_stay_and_make_the_next_point_full(
    app01: Modules, simulator: Simulator, backups: Backups
) -> None:
    app01.tracking()
    theirs = app01.snapshot("of somebody else", '{"by": "openvadp.backup", "repository_id": "another"}')
    simulator.write("app01", 2000, 0, seed=5)
    first = backups.run("app01", point="one").ok().result("vadp_disk_export")
    assert [item["moid"] for item in first["point"]["snapshot"]["foreign"]] == [theirs]
    assert "-00000" in first["point"]["disks"][0]["file"]
    simulator.write("app01", 2000, 65536, seed=6)
    second = backups.run("app01", point="two").ok().result("vadp_disk_export")
    assert _modes(second) == ["full", "full"]
    assert "of somebody else" in second["disks"][0]["reason"] or "not to be trusted" in second["disks"][0]["reason"]
    assert backups.disk("app01", 2000, "two") == simulator.disk("app01", 2000)
    assert [item["moid"] for item in simulator.snapshots("app01")] == [theirs]
    app01.remove_snapshot(theirs)


def _short(run_id: str) -> str:
    return "".join(character for character in run_id if character.isalnum())[:24]


def _processes_of(run_id: str) -> List[str]:
    """Command lines of the processes that use a run's sockets."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"openvadp-{_short(run_id)}" in line:
            found.append(line)
    return found


def _wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
