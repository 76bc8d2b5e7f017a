# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""No record and no name authorises anything: what is removed was proved to be ours, and what is said was proved too."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from administrator import Administrator
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import start_time
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from harness import MIB, Ansible, Backups, Simulator, made_repository
from modules import Modules

KEYS = (2000, 2001)


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    running = Simulator(tmp_path_factory.mktemp("simulator") / "state")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def app01(minimal: Simulator, repository: Path) -> Modules:
    return Modules(minimal, repository)


def _held(modules: Modules) -> Dict[int, Any]:
    return {key: modules.simulator.disk("app01", key) for key in KEYS}


def _snapshot_names(modules: Modules) -> List[str]:
    return [item["name"] for item in modules.simulator.snapshots("app01")]


def test_a_snapshot_of_somebody_else_is_neither_read_nor_removed(app01: Modules) -> None:
    """Under the name of ours: a user's, and that of a run into another repository."""
    simulator = app01.simulator
    user = app01.snapshot("openvadp weekly", "before the upgrade, keep")
    other = Modules(simulator, app01.repository.parent / "other")
    made_repository(other.repository)
    run = other.done("vadp_recover", **other.named, repository=str(other.repository), begin=True, point="weekly")["run"]
    options = {**other.named, "repository": str(other.repository), "run_id": run["id"]}
    theirs = other.done("vm_snapshot", **options, quiesce="never")["snapshot"]
    assert theirs["name"] == "openvadp weekly (2)"
    # Once more: it is there, and known by its marker.
    again = other.done("vm_snapshot", **options, quiesce="never")
    assert not again["changed"] and again["snapshot"]["moid"] == theirs["moid"]
    simulator.write("app01", 2000, 20 * MIB, seed=2)
    now = _held(app01)
    app01.backups.run("app01", point="weekly").ok()
    assert {key: app01.backups.disk("app01", key, "weekly") for key in KEYS} == now
    assert _snapshot_names(app01) == ["openvadp weekly", "openvadp weekly (2)"]
    # The run goes on as if nothing had been; its own snapshot goes, and no other.
    removed = other.done("vm_snapshot", **options, state="absent")
    assert removed["changed"] and removed["snapshot"]["moid"] == theirs["moid"]
    ended = other.done("vadp_recover", **options)["run"]
    assert ended["snapshot_gone"] and not ended["complete"]
    assert [item["moid"] for item in simulator.snapshots("app01")] == [user]
    app01.remove_snapshot(user)
    app01.clean()


def test_a_marker_without_a_record_is_told_of_with_the_command(app01: Modules) -> None:
    run = app01.done("vadp_recover", **app01.named, repository=str(app01.repository), begin=True, point="p1")["run"]
    where = {**app01.named, "repository": str(app01.repository)}
    app01.done("vm_snapshot", **where, run_id=run["id"], quiesce="never")
    # Whoever asks meanwhile is told that the run is at work.
    busy = app01.run("vadp_recover", **where)
    assert busy["failed"] and "is at work" in busy["msg"] and run["id"] in busy["msg"]
    assert len(_snapshot_names(app01)) == 1
    for path in app01.repository.glob("vms/*/runs/*.json"):
        path.unlink()
    told = app01.done("vadp_recover", **where)
    assert told["recovered"] == [] and f"run_id={run['id']}" in str(told["warnings"])
    assert len(_snapshot_names(app01)) == 1
    recovered = app01.done("vadp_recover", **where, run_id=run["id"])["recovered"]
    assert [item["what"] for item in recovered] == ["snapshot"] and _snapshot_names(app01) == []
    app01.clean()


def _moid(modules: Modules, name: str) -> str:
    vms = modules.simulator.control.call("state")["vms"]
    return next(moid for moid, vm in vms.items() if vm["name"] == name)


def _plant(modules: Modules, intents: List[Dict[str, Any]], **changes: Any) -> Path:
    """A record that somebody has written into the repository: a true one of a run that is over, with other intents."""
    where = {**modules.named, "repository": str(modules.repository)}
    run = modules.done("vadp_recover", **where, begin=True, point="planted", run_id=new_run_id())["run"]
    (path,) = modules.repository.glob(f"vms/*/runs/{run['id']}.json")
    record = json.loads(path.read_text())
    numbered = [dict(intent, id=number + 1, recorded=record["started"]) for number, intent in enumerate(intents)]
    record.update(intents=numbered, deadline="2026-01-01T00:00:00Z", point=None, **changes)
    path.write_text(json.dumps(record))
    return path


def test_a_planted_record_destroys_nothing(app01: Modules) -> None:
    """It names a process, a VM that is off, files, and a snapshot of somebody else."""
    simulator, names = (
        app01.simulator,
        sorted(vm["name"] for vm in app01.simulator.control.call("state")["vms"].values()),
    )
    administrator = Administrator(simulator.facts, "restore01")
    victim = administrator.config(_moid(app01, "restore01"))
    administrator.close()
    user = app01.snapshot("keep")
    outside = app01.repository.parent / "outside"
    outside.write_text("x")
    restore = {
        "what": "restore",
        "target": "new_vm",
        "name": "restore01",
        "instance_uuid": victim.instanceUuid,
        "vm_moid": _moid(app01, "restore01"),
        "folder_moid": "group-v3",
        "on_failure": "remove",
        "complete": False,
        "leased": False,
        "made_disks": [],
    }
    with subprocess.Popen(["sleep", "300"]) as process:
        try:
            path = _plant(
                app01,
                [
                    {"what": "process", "name": "x", "pid": process.pid, "start_time": start_time(process.pid)},
                    {"what": "snapshot", "name": "keep", "vm_moid": _moid(app01, "app01"), "moid": user},
                    {"what": "temporary_file", "files": ["../../../outside", str(outside)], "stage": str(outside)},
                    restore,
                ],
            )
            result = app01.done("vadp_recover", **app01.named, repository=str(app01.repository), force=True)
            assert result["recovered"] == [] and process.poll() is None
            assert f"kill {process.pid}" in str(result["warnings"]) and "restore01" in str(result["warnings"])
        finally:
            process.kill()
    assert not path.exists() and outside.exists() and _snapshot_names(app01) == ["keep"]
    assert names == sorted(vm["name"] for vm in simulator.control.call("state")["vms"].values())
    app01.remove_snapshot(user)
    app01.clean()


def test_a_planted_record_takes_no_disk_from_its_own_machine(app01: Modules) -> None:
    """It names a disk as vCenter shows it, of a machine that it calls a proxy: nothing takes it away."""
    simulator = app01.simulator
    administrator = Administrator(simulator.facts, "restore01")
    victim, source = administrator.config(_moid(app01, "restore01")), administrator.config(_moid(app01, "app01"))
    administrator.close()
    app01.track_changes()
    app01.point("p1")
    disk = next(device for device in victim.hardware.device if device.key == 2000)
    attachment = {
        "what": "attachment",
        "proxy_moid": _moid(app01, "restore01"),
        "proxy_uuid": victim.instanceUuid,
        "file": disk.backing.fileName,
        "disk_uuid": disk.backing.uuid,
        "vm_moid": _moid(app01, "app01"),
        "vm_uuid": source.instanceUuid,
        "access": "write",
        "device_key": 2000,
    }
    before = simulator.vm("restore01")["disks"]
    itself = {"vm_moid": _moid(app01, "restore01"), "vm_uuid": victim.instanceUuid}
    path = _plant(app01, [attachment, {**attachment, **itself}])
    result = app01.done("vadp_recover", **app01.named, repository=str(app01.repository))
    assert simulator.vm("restore01")["disks"] == before
    assert [item["action"].split(";")[0] for item in result["recovered"]] == [
        "left: the record does not prove that it is this run's"
    ] * 2
    record = json.loads(path.read_text()) if path.exists() else None
    assert record is None or record["intents"]
    simulator.control.call("power", vm="app01", state="poweredOff")
    _plant(app01, [attachment], repository_id="0" * 8 + "-0000-4000-8000-" + "0" * 12)
    options = app01.export_options(target="in_place", vm_name="app01", point="p1", overwrite=True)
    app01.done("vadp_disk_restore", **options)
    assert simulator.vm("restore01")["disks"] == before
    simulator.control.call("power", vm="app01", state="poweredOn")
    shutil.rmtree(app01.repository)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_run_that_found_no_room_keeps_nobody_waiting(minimal: Simulator, tmp_path: Path) -> None:
    """Neither one that can't begin, nor one that can't write that it is over."""
    image, folder = tmp_path / "image", tmp_path / "small"
    folder.mkdir()
    image.touch()
    os.truncate(image, 8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        modules = Modules(minimal, made_repository(folder))
        where = {**modules.named, "repository": str(modules.repository)}
        vddk = {"vddk_libdir": minimal.facts["vddk_libdir"]}
        run = modules.done("vadp_recover", **where, **vddk, begin=True, access=True, point="p1")["run"]
        filler = _fill(folder, spare=0)
        modules.done("vadp_recover", **where, **vddk, run_id=run["id"])
        for spare in (1, 2, 3):
            filler.unlink()
            filler = _fill(folder, spare)
            modules.run("vadp_recover", **where, begin=True, point="p2", run_id=new_run_id())
            filler.unlink()
            # Whoever leads a run ends it only where it has begun.
            for path in modules.repository.glob("vms/*/runs/*.json"):
                if json.loads(path.read_text())["intents"]:
                    modules.done("vadp_recover", **where, run_id=path.stem)
            begun = modules.done("vadp_recover", **where, begin=True, point="p3")["run"]
            modules.done("vadp_recover", **where, run_id=begun["id"])
            filler = _fill(folder, spare=0)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _fill(folder: Path, spare: int) -> Path:
    """A file that leaves so many blocks of the file system free."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    os.truncate(filler, filler.stat().st_size - max(0, spare * 4096 - free))
    return filler


def test_a_task_that_is_given_up_is_cancelled_or_looked_for(app01: Modules) -> None:
    """A snapshot that appears after the module has failed does not stay for ever."""
    simulator, where = app01.simulator, {**app01.named, "repository": str(app01.repository)}
    run = app01.done("vadp_recover", **where, begin=True, point="late")["run"]
    simulator.control.call("inject", target="task", name="CreateSnapshot_Task", delay=4)
    failed = app01.run("vm_snapshot", **where, run_id=run["id"], quiesce="never", timeout=1)
    simulator.control.call("clear_injections")
    assert failed["failed"] and "did not end within" in failed["msg"], failed
    ended = app01.done("vadp_recover", **where, run_id=run["id"])
    assert ended["run"]["snapshot_gone"] and _snapshot_names(app01) == []
    app01.clean()


def test_nothing_of_the_control_flow_goes_through_results(tmp_path: Path) -> None:
    """'vm' is in every managed object id, '1' in UUIDs and times: Ansible replaces them by asterisks."""
    for password in ("vm", "1"):
        simulator = Simulator(tmp_path / f"state-{password}", passwords={"backup@vsphere.local": password})
        try:
            folder = tmp_path / password / "repository"
            modules = Modules(simulator, made_repository(folder))
            modules.backups.run("app01", verify="structure").ok()
            assert len(modules.backups.points("app01")) == 1
            modules.clean()
        finally:
            simulator.stop()


def test_errors_that_are_ignored_make_no_backup_complete(app01: Modules, ansible: Ansible) -> None:
    simulator, backups = app01.simulator, Backups(app01.simulator, ansible, app01.repository)
    for name in ("CreateSnapshot_Task", "CreateSnapshotEx_Task"):
        simulator.control.call("inject", target="task", name=name, fault="vim.fault.SnapshotFault", count=0)
    play = {
        "hosts": "vms",
        "gather_facts": False,
        "ignore_errors": True,
        "tasks": [
            {"ansible.builtin.include_role": {"name": "openvadp.backup.vm_backup"}},
            {"name": "told", "ansible.builtin.debug": {"var": "vm_backup_result"}},
        ],
    }
    variables = backups.variables(change_tracking=False)
    outcome = ansible.run([play], hosts=["app01"], variables=variables)
    simulator.control.call("clear_injections")
    told = outcome.result("debug", task="told")["vm_backup_result"]
    assert told["state"] == "failed" and "SnapshotFault" in told["reason"], told
    app01.clean()


def test_a_lock_that_is_held_for_a_moment_is_waited_for(app01: Modules, ansible: Ansible) -> None:
    """Another run that looks at the machine while this one cleans up: its point is complete, and nothing is left."""
    backups = Backups(app01.simulator, ansible, app01.repository)
    variables = backups.variables(snapshot_removal_retries=0)
    running = ansible.start("openvadp.backup.backup", hosts=["app01"], variables=variables)
    running.wait_for("[openvadp.backup.vm_backup : Remove the snapshot]", 120)
    (path,) = app01.repository.glob("vms/*/lock")
    with path.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(3)
    running.wait().ok()
    app01.clean()


def test_who_is_given_up_for_another_one_says_so(app01: Modules, ansible: Ansible) -> None:
    """With any_errors_fatal, Ansible runs the rescue of hosts on which nothing failed too."""
    simulator, backups = app01.simulator, Backups(app01.simulator, ansible, app01.repository)
    for name in ("CreateSnapshot_Task", "CreateSnapshotEx_Task"):
        fault = {"target": "task", "name": name, "fault": "vim.fault.SnapshotFault", "count": 0}
        simulator.control.call("inject", **fault, object=_moid(app01, "app01"))
    role = {"ansible.builtin.include_role": {"name": "openvadp.backup.vm_backup"}}
    play = {"hosts": "vms", "gather_facts": False, "any_errors_fatal": True, "tasks": [role]}
    variables = backups.variables(change_tracking=False)
    outcome = ansible.run([play], hosts=["app01", "restore01"], variables=variables).failed()
    simulator.control.call("clear_injections")
    failed = [event for event in outcome.events if event["status"] == "failed" and event["host"] == "restore01"]
    assert all("is undefined" not in event["result"].get("msg", "") for event in failed), failed
    assert not simulator.snapshots("restore01")
    app01.clean()


def test_errors_that_are_ignored_overwrite_nothing(app01: Modules, ansible: Ansible) -> None:
    """What the role refuses is refused, though tasks that fail are passed over."""
    simulator, backups = app01.simulator, Backups(app01.simulator, ansible, app01.repository)
    backups.run("app01", point="p1").ok()
    simulator.control.call("power", vm="app01", state="poweredOff")
    simulator.write("app01", 2000, 5 * MIB, seed=9)
    before = _held(app01)
    for name in ("CreateSnapshot_Task", "CreateSnapshotEx_Task"):
        simulator.control.call("inject", target="task", name=name, fault="vim.fault.SnapshotFault", count=0)
    outcome = ansible.run([_ignoring("vm_restore")], variables=_restore_variables(backups, safety_point=True))
    simulator.control.call("clear_injections")
    simulator.control.call("power", vm="app01", state="poweredOn")
    assert _held(app01) == before
    failed = [event["result"].get("msg", "") for event in outcome.events if event["status"] == "failed"]
    assert any("The safety point could not be made, and no disk was written" in text for text in failed), failed
    assert outcome.result("debug", task="told")["vm_restore_result"]["failed"] is True
    app01.clean()


def test_a_misspelt_safety_point_overwrites_nothing(app01: Modules, ansible: Ansible) -> None:
    """What a role refuses counts where errors are ignored: the default of the right name would overwrite the disk."""
    simulator, backups = app01.simulator, Backups(app01.simulator, ansible, app01.repository)
    backups.run("app01", point="p1").ok()
    simulator.control.call("power", vm="app01", state="poweredOff")
    simulator.write("app01", 2000, 5 * MIB, seed=10)
    before = _held(app01)
    outcome = ansible.run([_ignoring("vm_restore")], variables=_restore_variables(backups, safty_point=True))
    simulator.control.call("power", vm="app01", state="poweredOn")
    assert _held(app01) == before
    told = outcome.result("debug", task="told")["vm_restore_result"]
    assert told["failed"] is True and "vm_restore_safty_point (vm_restore_safety_point?)" in told["msg"], told
    app01.clean()
    shutil.rmtree(app01.repository)


def _ignoring(role: str) -> Dict[str, Any]:
    return {
        "hosts": "localhost",
        "gather_facts": False,
        "ignore_errors": True,
        "tasks": [
            {"ansible.builtin.include_role": {"name": f"openvadp.backup.{role}"}},
            {"name": "told", "ansible.builtin.debug": {"var": f"{role}_result"}},
        ],
    }


def _restore_variables(backups: Backups, **more: Any) -> Dict[str, Any]:
    variables = {name.replace("vm_backup_", "vm_restore_"): value for name, value in backups.variables().items()}
    variables.update(vm_restore_vm_name="app01", vm_restore_point="p1", vm_restore_target="in_place")
    variables.update(vm_restore_overwrite=True, **{f"vm_restore_{name}": value for name, value in more.items()})
    return variables
