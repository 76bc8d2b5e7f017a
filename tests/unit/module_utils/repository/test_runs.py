# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether a run is over: by its deadline in the file system's time, by the kernel, and by nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Iterator

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, LockedError, RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import runs
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, file_system_time, new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore

UUID = "500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VmStore]:
    store = Repository.open(str(tmp_path), create=True).vm(UUID)
    with store.lock(new_run_id(), "test"):
        yield store


def _of_a_dead_process(run: Run) -> Run:
    with subprocess.Popen(["true"]) as gone:
        pass
    run._change(pid=gone.pid, pid_started=1)
    return run


def _elsewhere(run: Run) -> Run:
    run._change(boot_id="00000000-0000-0000-0000-000000000000", host="proxy07", machine="another")
    return run


def test_a_run_is_busy_until_its_deadline_or_its_process_is_dead(store: VmStore) -> None:
    own = store.create_run("p1")
    now = store.now()
    assert own.busy(now) is not None and own.busy(now + timedelta(seconds=runs.WORK_SECONDS + 60)) is None
    assert _of_a_dead_process(store.create_run("p2")).busy(now) is None
    # Nobody can look there, so its deadline counts, whatever number its process has.
    assert _of_a_dead_process(_elsewhere(store.create_run("p3"))).busy(now) is not None
    foreign = _of_a_dead_process(store.create_run("p4"))
    foreign._change(pid_namespace="pid:[1]")
    assert foreign.busy(now) is not None
    # A controller's run lives between its processes too.
    followed = _of_a_dead_process(store.create_run("p5", controller=True))
    assert followed.busy(now) is not None
    assert followed.busy(now + timedelta(seconds=runs.PAUSE_SECONDS + 60)) is None


def test_a_busy_run_is_refused_unless_it_is_ours_or_force_is_given(store: VmStore) -> None:
    run = _elsewhere(store.create_run("p1", controller=True))
    with pytest.raises(LockedError, match=f"proxy07.*{run.run_id}") as raised:
        store.refuse_busy()
    assert "force: true" in str(raised.value) and raised.value.retryable
    assert store.refuse_busy(own=run.run_id) == []
    (told,) = store.refuse_busy(force=True)
    assert run.run_id in told
    run.over()
    assert store.refuse_busy() == [] and store.busy(run) is None


def test_this_machines_clock_does_not_count(store: VmStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.create_run("p1")
    monkeypatch.setattr(runs.clock, "time", lambda: 4e9)
    assert abs(file_system_time(store.path) - datetime.now(timezone.utc)) < timedelta(seconds=5)
    assert store.busy(run) is not None
    assert [name for name in os.listdir(store.path) if "clock" in name] == []


def test_who_works_renews_the_deadline(store: VmStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RENEW_SECONDS", 0.1)
    run = store.create_run("p1", controller=True)
    run._change(pid=1, pid_started=1, deadline="2026-01-01T00:00:00Z")
    with run.working():
        assert run.data["pid"] == os.getpid()
        run._change(deadline="2026-01-01T00:00:00Z")
        deadline = time.monotonic() + 5
        while Run.load(run.path).data["deadline"] == "2026-01-01T00:00:00Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.require_held()
    left = Run.load(run.path).deadline - store.now()
    assert timedelta(seconds=runs.WORK_SECONDS) < left <= timedelta(seconds=runs.PAUSE_SECONDS + 1)


def test_a_run_of_one_module_is_over_with_it(store: VmStore) -> None:
    run = _elsewhere(store.create_run("p1"))
    with run.working():
        assert store.busy(run) is not None
    _elsewhere(run)
    assert store.busy(run) is None


@pytest.mark.parametrize("how", ["removed", "unwritable"])
def test_who_can_not_renew_stops_writing(store: VmStore, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(runs, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(runs, "WORK_SECONDS", 0.5)
    run = store.create_run("p1")
    cancel = threading.Event()
    folder = run.path.parent
    with run.working(cancel):
        if how == "removed":
            run.path.unlink()
        else:
            folder.rename(folder.parent / "away")
        # Without a word of the disk for a moment it goes on: there is time until the deadline.
        assert cancel.wait(10)
        with pytest.raises(RepositoryError, match="no longer ours"):
            run.require_held()
    assert how == "unwritable" or not run.path.exists(), "a record that was taken away does not come back"


def test_an_id_is_used_once(store: VmStore) -> None:
    run_id = new_run_id()
    store.create_run("p1", run_id=run_id)
    with pytest.raises(RepositoryError, match="begun before"):
        store.create_run("p2", run_id=run_id)


def test_a_run_is_found_by_its_id_alone(store: VmStore) -> None:
    run = store.create_run("p1")
    found, same = store.repository.find_run(run.run_id)
    assert (found.uuid, same.run_id) == (UUID, run.run_id)
    with pytest.raises(RepositoryError, match="no record of this run"):
        store.repository.find_run(new_run_id())
    with pytest.raises(InputError, match="not an id of a run"):
        store.repository.find_run("../../x")


def test_records_of_format_1_are_read_and_never_written(store: VmStore) -> None:
    data = dict(store.create_run("p1").data, format=1, run_id="20261122T084203.417123Z-3f9a2b1c")
    for name in ("deadline", "controller", "machine", "pid_started", "pid_namespace", "server_uuid", "sequence"):
        del data[name]
    (store.path / "runs" / f"{data['run_id']}.json").write_text(json.dumps(data))
    old = store.run(str(data["run_id"]))
    assert old is not None and old.old and not old.here and store.busy(old) is None
    with pytest.raises(RepositoryError, match="format 1"):
        old.record("snapshot", name="x")
