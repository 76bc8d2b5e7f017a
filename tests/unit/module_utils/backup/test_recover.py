# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The repository's and this machine's side of a recovery; that of the VM has end-to-end tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup.recover import RecoverRequest, recover
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository, VmStore
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id
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


def test_files_of_a_crashed_run_go_and_nothing_else(store: VmStore) -> None:
    run = store.create_run("crashed")
    for name in ("crashed.qcow2", "crashed.hashes", f"crashed.qcow2.part-{run.run_id}", "other.qcow2", "notes.txt"):
        (store.disk_folder(2000) / name).write_text("x")
    store.config_path("crashed").write_text("{}")
    store.manifest_path("kept").write_text("a manifest, damaged as it is, keeps its files")
    store.layer_path(2000, "kept").write_text("x")
    expected = [f"crashed.qcow2.part-{run.run_id}", "crashed.hashes", "crashed.qcow2", "crashed.json"]
    listed = recover(SESSION, store, None, check_mode=True)
    assert sorted(_names(listed)) == sorted(expected)
    assert store.run(run.run_id) is not None and store.layer_path(2000, "crashed").exists()

    assert sorted(_names(recover(SESSION, store, None))) == sorted(expected)
    left = sorted(path.name for path in store.disk_folder(2000).iterdir())
    assert left == ["kept.qcow2", "notes.txt", "other.qcow2"]
    assert store.runs() == []
    assert recover(SESSION, store, None) == []


def test_without_its_manifests_a_repository_loses_nothing(store: VmStore) -> None:
    store.layer_path(2000, "one").write_text("all that is left")
    store.create_run("two")
    recover(SESSION, store, None)
    assert store.layer_path(2000, "one").exists()


def test_sockets_of_a_dead_run_go_and_those_of_a_living_one_stay(store: VmStore) -> None:
    run = store.create_run("crashed")
    with RuntimeDir(run.run_id) as living:
        script = (
            "import os, sys; from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import *;"
            " print(RuntimeDir(sys.argv[1]).path, flush=True); os._exit(0)"
        )
        command = [sys.executable, "-c", script, run.run_id]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        dead = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
        assert Path(dead).is_dir()
        assert [item["id"] for item in recover(SESSION, store, None)] == [dead]
        assert Path(living.path).is_dir() and not Path(dead).exists()


def _record(run: Run, process: "subprocess.Popen[bytes]", start_time: int) -> None:
    run.record("process", name="nbdkit", pid=process.pid, start_time=start_time)


def test_a_process_is_ended_only_if_it_is_the_very_same(store: VmStore) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    with subprocess.Popen(["sleep", "60"]) as ours, subprocess.Popen(stubborn) as other:
        run = store.create_run("crashed")
        _record(run, ours, _start_time(ours.pid))
        # The same pid, but of a process that started at another time.
        _record(run, other, _start_time(other.pid) - 1)
        try:
            found = recover(SESSION, store, None)
            assert [(item["what"], item["id"], item["action"]) for item in found] == [
                ("process", str(ours.pid), "ended")
            ]
            assert ours.wait(10) != 0
            assert other.poll() is None
        finally:
            ours.kill()
            other.kill()


def test_processes_of_another_machine_or_boot_are_none_of_ours(store: VmStore) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        for field in ("host", "boot_id"):
            run = store.create_run("crashed")
            _record(run, process, _start_time(process.pid))
            run._change(**{field: "00000000-0000-0000-0000-000000000000"})
        try:
            assert recover(SESSION, store, None) == []
            assert process.poll() is None
        finally:
            process.kill()


def test_a_restore_that_did_not_end_keeps_its_record(store: VmStore) -> None:
    run = store.create_run(None)
    run.record("restore", point="one")
    assert recover(SESSION, store, None) == []
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
    request = RecoverRequest(Connection("vc", "user", "secret"), {"name": "app01"}, "/backup", begin)
    with pytest.raises(InputError, match=word):
        request.check_export({"io_timeout": None, **options})


def test_an_export_that_would_be_taken() -> None:
    request = RecoverRequest(Connection("vc", "user", "secret"), {"name": "app01"}, "/backup", True)
    request.check_export({"transports": ["nbd"], "nfc_port": 902, "nfc_host_limit": None, "rate_limit": "50M"})
