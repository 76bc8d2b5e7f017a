# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The repository's and this machine's side of a recovery; that of the VM has end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup.leftovers import Recovery
from ansible_collections.openvadp.backup.plugins.module_utils.backup.leftovers import recover as recover_
from ansible_collections.openvadp.backup.plugins.module_utils.backup.recover import RecoverRequest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import Child, RuntimeDir, children_of
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection

UUID = "500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"
SESSION: Any = SimpleNamespace()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VmStore]:
    (tmp_path / "repository").mkdir()
    store = Repository.open(str(tmp_path / "repository"), create=True).vm(UUID)
    with store.lock(new_run_id(), "test"):
        store.make_disk_folder(2000)
        yield store


def _names(found: List[Dict[str, Any]]) -> List[str]:
    return [Path(item["id"]).name for item in found]


def _start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def recover(store: VmStore, check_mode: bool = False, **options: Any) -> Recovery:
    return recover_(SESSION, store, None, check_mode, **options)


def _crashed(store: VmStore, point: Any = "crashed") -> Run:
    """A run that nobody works in any more."""
    run = store.create_run(point)
    run.over()
    return run


def test_files_of_a_crashed_run_go_and_nothing_else(store: VmStore) -> None:
    run = _crashed(store)
    part = f"crashed.qcow2.part-{run.run_id}"
    for name in ("crashed.qcow2", "crashed.hashes", part, "other.qcow2", "notes.txt", "notes.part-of-a-book"):
        (store.disk_folder(2000) / name).write_text("x")
    run.record("temporary_file", key=2000, files=["disk-2000/crashed.qcow2", "disk-2000/crashed.hashes"])
    run.record("temporary_file", files=["configs/crashed.json", "configs/crashed.nvram"])
    store.config_path("crashed").write_text("{}")
    store.manifest_path("kept").write_text("a manifest, damaged as it is, keeps its files")
    store.layer_path(2000, "kept").write_text("x")
    expected = [part, "crashed.hashes", "crashed.qcow2", "crashed.json"]
    listed = recover(store, True)
    assert sorted(_names(listed.found)) == sorted(expected)
    assert store.run(run.run_id) is not None and store.layer_path(2000, "crashed").exists()

    assert sorted(_names(recover(store).found)) == sorted(expected)
    left = sorted(path.name for path in store.disk_folder(2000).iterdir())
    assert left == ["kept.qcow2", "notes.part-of-a-book", "notes.txt", "other.qcow2"]
    assert store.runs() == []
    assert recover(store) == Recovery()


@pytest.mark.parametrize(
    "name", ["../../../outside", "/etc/hostname", "disk-2000/kept.qcow2", "points/kept.json", "lock"]
)
def test_a_record_names_no_file_that_is_not_a_leftover(store: VmStore, tmp_path: Path, name: str) -> None:
    """Also one that a record of ours names, and that belongs to a point meanwhile."""
    (tmp_path / "outside").write_text("x")
    store.manifest_path("kept").write_text("a manifest")
    store.layer_path(2000, "kept").write_text("x")
    _crashed(store, "kept").record("temporary_file", key=2000, files=[name], stage=name)
    assert recover(store).found == []
    assert (tmp_path / "outside").exists() and store.layer_path(2000, "kept").exists()
    assert store.manifest_path("kept").exists() and (store.path / "lock").exists() and Path("/etc/hostname").exists()


def test_without_its_manifests_a_repository_loses_nothing(store: VmStore) -> None:
    """Not what a run has named that was killed between its commit and its last word either."""
    for point in ("one", "two"):
        store.layer_path(2000, point).write_text("all that is left")
    _crashed(store, "two").record("temporary_file", key=2000, files=["disk-2000/two.qcow2"])
    (told,) = recover(store).told
    assert "manifests may be lost" in told
    assert store.layer_path(2000, "one").exists() and store.layer_path(2000, "two").exists()


def test_a_run_that_is_at_work_keeps_all(store: VmStore) -> None:
    """Its lock is free: it is between two modules, or its machine's locks do not reach this one."""
    run = store.create_run("p1", controller=True)
    part = store.disk_folder(2000) / f"p1.qcow2.part-{run.run_id}"
    part.write_text("x")
    assert recover(store) == Recovery() and part.exists()
    assert _names(recover(store, force=True).found) == [part.name] and store.runs() == []


def test_what_was_begun_before_its_record_goes_and_what_belongs_to_a_busy_run_stays(store: VmStore) -> None:
    """Under the VM's lock nobody else writes there, unless the locks of two machines do not know of each other."""
    busy = store.create_run("p1", controller=True)
    runs, disks = store.path / "runs", store.disk_folder(2000)
    dead = [runs / f"{new_run_id()}.json.part-0123456789ab", runs / "clock.part-0123456789abcdef"]
    dead += [disks / f"p2.qcow2.part-{new_run_id()}", store.path / "vm.json.part-0123456789ab"]
    alive = [runs / f"{busy.run_id}.json.part-0123456789ab", disks / f"p1.hashes.part-{busy.run_id}"]
    alive += [store.path / f"vm.json.part-{busy.run_id}-0123456789ab"]
    for path in dead + alive:
        path.write_text("x")
    assert sorted(_names(recover(store).found)) == sorted(path.name for path in dead)
    assert all(path.exists() for path in alive) and not any(path.exists() for path in dead)


def test_sockets_of_a_dead_run_go_and_those_of_a_living_one_stay(store: VmStore) -> None:
    run = _crashed(store)
    with RuntimeDir(run.run_id) as living:
        script = (
            "import os, sys; from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import *;"
            " print(RuntimeDir(sys.argv[1]).path, flush=True); os._exit(0)"
        )
        command = [sys.executable, "-c", script, run.run_id]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        dead = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
        assert Path(dead).is_dir()
        assert [item["id"] for item in recover(store).found] == [dead]
        assert Path(living.path).is_dir() and not Path(dead).exists()


def _record(run: Run, pid: int, started: int) -> None:
    run.record("process", name="nbdkit", pid=pid, start_time=started)


def _child(run: Run, folder: Path) -> Child:
    with children_of(run.run_id):
        child = Child.start(["sleep", "60"], log_path=str(folder / "log"), name="nbdkit")
    deadline = time.monotonic() + 10
    while not Path(f"/proc/{child.pid}/cmdline").read_bytes().startswith((b"/usr/bin/sleep", b"/bin/sleep", b"sleep")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_a_process_is_ended_only_if_the_kernel_says_whose_it_is(store: VmStore, tmp_path: Path) -> None:
    """A record names a child of its run, a stranger, and a number that was used again."""
    run = _crashed(store)
    ours = _child(run, tmp_path)
    with subprocess.Popen(["sleep", "60"]) as stranger, subprocess.Popen(["sleep", "60"]) as later:
        try:
            _record(run, ours.pid, ours.start_time)
            _record(run, stranger.pid, _start_time(stranger.pid))
            _record(run, later.pid, _start_time(later.pid) - 1)
            recovery = recover(store)
            assert [(item["what"], item["id"], item["action"]) for item in recovery.found] == [
                ("process", str(ours.pid), "ended")
            ]
            (told,) = recovery.told
            assert f"kill {stranger.pid}" in told and "not started by that run" in told
            assert ours.wait(10) != 0
            assert stranger.poll() is None and later.poll() is None
            assert store.runs() == []
        finally:
            stranger.kill()
            later.kill()


def test_a_process_of_another_run_is_not_ended(store: VmStore, tmp_path: Path) -> None:
    """The record of a copy of the repository, or one that somebody has written."""
    other = _child(_crashed(store), tmp_path)
    try:
        run = _crashed(store)
        _record(run, other.pid, other.start_time)
        assert recover(store).found == [] and other.alive
    finally:
        other.stop()


def test_processes_of_another_machine_are_told_of_once(store: VmStore) -> None:
    """Those of an ended boot of this machine are closed without a word."""
    nowhere = {"boot_id": "00000000-0000-0000-0000-000000000000"}
    rebooted, elsewhere = _crashed(store), _crashed(store)
    for run in (rebooted, elsewhere):
        _record(run, os.getpid(), _start_time(os.getpid()))
    rebooted._change(**nowhere)
    elsewhere._change(**nowhere, machine="another", host="proxy07")
    in_a_container = _crashed(store)
    _record(in_a_container, os.getpid(), _start_time(os.getpid()))
    in_a_container._change(pid_namespace="pid:[1]")
    first, second = recover(store), recover(store)
    assert first.found == second.found == []
    assert len(first.told) == 2 and "proxy07" in str(first.told) and elsewhere.run_id in str(first.told)
    (line,) = second.told
    assert line.startswith("2 runs of other machines") and "proxy07" in line
    assert {run.run_id for run in store.runs()} == {elsewhere.run_id, in_a_container.run_id}
    # A user who knows that the machine is gone.
    recover(store, run_id=elsewhere.run_id, force=True)
    assert {run.run_id for run in store.runs()} == {in_a_container.run_id}


def test_what_is_no_record_of_ours_is_told_and_never_acted_upon(store: VmStore) -> None:
    """Of format 1, and of another repository or VM."""
    strange = [_crashed(store) for dummy in range(2)]
    strange[0]._change(repository_id="00000000-0000-0000-0000-000000000001")
    strange[1]._change(vm_uuid="00000000-0000-0000-0000-000000000001")
    old = dict(_crashed(store).data, format=1, run_id="20261122T084203.417123Z-3f9a2b1c")
    old["intents"] = [{"id": 1, "what": "process", "recorded": old["started"], "pid": os.getpid(), "start_time": 1}]
    path = store.path / "runs" / f"{old['run_id']}.json"
    path.write_text(json.dumps(old))
    part = store.disk_folder(2000) / f"p1.qcow2.part-{old['run_id']}"
    part.write_text("x")
    for run in strange:
        run.record("temporary_file", files=["disk-2000/" + part.name])
    recovery = recover(store, force=True)
    assert recovery.found == [] and part.exists() and len(store.runs()) == 3
    assert len(recovery.told) == 3 and all("rm '" in told for told in recovery.told)
    assert f"kill {os.getpid()}" in str(recovery.told)


def test_a_restore_that_did_not_end_keeps_its_record(store: VmStore) -> None:
    run = _crashed(store, None)
    run.record("restore", point="one")
    recovery = recover(store)
    assert recovery.found == [] and "restore" in str(recovery.told)
    assert store.run(run.run_id) is not None


@pytest.mark.parametrize(
    ("begin", "options", "word"),
    [
        (False, {"transports": ["nbd"]}, "no run is begun"),
        (True, {"transports": []}, "transports"),
        (True, {"nfc_port": 65536}, "nfc_port"),
        (True, {"rate_limit": "fast"}, "fast"),
        (True, {"proxy_physical": True, "proxy_name": "proxy01"}, "proxy"),
    ],
)
def test_an_export_that_would_be_refused(begin: bool, options: Dict[str, Any], word: str) -> None:
    request = RecoverRequest(Connection("vc", "user", "secret"), {"name": "app01"}, "/backup", begin=begin)
    with pytest.raises(InputError, match=word):
        request.check_export({"io_timeout": None, **options})


def test_an_export_that_would_be_taken() -> None:
    request = RecoverRequest(Connection("vc", "user", "secret"), {"name": "app01"}, "/backup", True)
    request.check_export({"transports": ["nbd"], "nfc_port": 902, "nfc_host_limit": None, "rate_limit": "50M"})
