# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    LockedError,
    RepositoryError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id

from .conftest import KEY, PREFIX, UUID, World, disk_entry

MIB = 1 << 20


HOLDER = """
import subprocess, sys
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
store = Repository.open(sys.argv[1]).vm(sys.argv[2])
with store.lock("the-run", "vadp_disk_export"):
    # A child that outlives us must not keep the lock.
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def test_a_lock_excludes_names_its_holder_and_dies_with_it(world: World) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(world.repository.path), UUID],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(LockedError) as raised, world.store.lock(new_run_id(), "test"):
            pass
        text = str(raised.value)
        assert "the-run (vadp_disk_export)" in text and f"process {process.pid} on " in text and "since 20" in text
        assert raised.value.retryable
        # Another VM is free.
        with world.repository.vm(UUID.replace("5", "6", 1)).lock(new_run_id(), "test"):
            pass
        process.kill()
        process.wait()
        with world.store.lock(new_run_id(), "test"), pytest.raises(LockedError, match="test"):
            # Also within one process.
            world.repository.vm(UUID).lock(new_run_id(), "again").__enter__()
    finally:
        os.kill(child, 9)
        process.kill()
        process.wait()
    with world.store.lock(new_run_id(), "test"):
        pass


def test_a_step_waits_for_who_holds_the_lock_for_a_moment(world: World) -> None:
    """Its own run is busy, which is in nobody's way; the file may be another one when the wait is over."""
    with world.store.lock(new_run_id(), "test"):
        own = world.store.create_run("p1", controller=True)
    holder = world.repository.vm(UUID).lock(new_run_id(), "a second run")
    holder.__enter__()
    path = world.store.path / "lock"
    path.rename(path.with_name("removed"))
    path.touch()
    other = world.repository.vm(UUID).lock(new_run_id(), "a third run")
    other.__enter__()
    ends = threading.Timer(0.5, lambda: [one.__exit__(None, None, None) for one in (holder, other)])
    ends.start()
    with world.store.lock(own.run_id, "test", timeout=30) as lock:
        assert not lock.lost
    ends.join()


def test_the_wait_for_a_lock_ends_in_time_and_where_another_run_is_busy(world: World) -> None:
    with world.repository.vm(UUID).lock(new_run_id(), "a second run"):
        began = time.monotonic()
        with pytest.raises(LockedError), world.store.lock(new_run_id(), "test", timeout=0.5):
            pass
        assert 0.5 <= time.monotonic() - began < 10
    with world.store.lock(new_run_id(), "test"):
        world.store.create_run("p1", controller=True)
        began = time.monotonic()
        with pytest.raises(LockedError), world.repository.vm(UUID).lock(new_run_id(), "test", timeout=30):
            pass
        assert time.monotonic() - began < 10


def test_writing_needs_the_lock(world: World) -> None:
    with pytest.raises(RuntimeError):
        world.store.create_run("p1")
    with world.store.lock(new_run_id(), "test"):
        world.store.create_run("p1")
    with pytest.raises(RuntimeError):
        world.store.write_facts({"name": "app01"})


def test_a_commit_needs_all_that_the_manifest_names(world: World) -> None:
    store = world.store
    with store.lock(new_run_id(), "test"):
        full = world.layer("p1", MIB, [(0, b"a" * 65536)])
        for broken, words in (
            (dict(full, capacity_bytes=2 * MIB), "the image has 1048576 bytes, the disk has 2097152"),
            (dict(full, layer=dict(full["layer"], size_bytes=1)), "the file has"),
            (dict(full, mode="incremental", parent="p0", parent_layer_blake3="0" * 64), "its parent p0 is missing"),
            (dict(full, content_id="0" * 32), "p1.hashes has the content ID"),
            (dict(full, key=KEY + 1), "the file is missing"),
        ):
            with pytest.raises(RepositoryError, match=words):
                world.commit("p1", broken)
        hashes = store.hashes_path(KEY, "p1")
        hashes.rename(hashes.parent / "away")
        with pytest.raises(RepositoryError, match="p1.hashes.*missing"):
            world.commit("p1", full)
        (hashes.parent / "away").rename(hashes)
        with pytest.raises(RepositoryError, match=r"disks\[0\]\.layer\.file"):
            world.commit("p1", dict(full, layer=dict(full["layer"], file="../p1.qcow2")))
        with pytest.raises(RepositoryError, match="belongs elsewhere"):
            world.commit("p1", full, vm_uuid=UUID.replace("5", "6", 1))
        assert store.points() == [] and store.point_names() == []
        assert [path.name for path in store.uncommitted_files()] == ["p1.hashes", "p1.qcow2", "p1.json", "p1.nvram"]
        world.commit("p1", full)
        assert store.uncommitted_files() == []
        with pytest.raises(RepositoryError, match="exists already"):
            world.commit("p1", full)
        # An overlay of another size than its parent, and one that names another file than its parent's layer.
        grown = world.layer("p2", 2 * MIB, [(0, b"b" * 65536)], parent="p1")
        with pytest.raises(RepositoryError, match="its parent p1 has 1048576 bytes"):
            world.commit("p2", grown)
        alone = world.layer("p3", MIB, [(0, b"c" * 65536)])
        pin = {"parent_content_id": full["content_id"], "parent_layer_blake3": full["layer"]["blake3"]}
        with pytest.raises(RepositoryError, match="its backing file is None, not 'p1.qcow2'"):
            world.commit("p3", dict(alone, mode="incremental", parent="p1", **pin))
        with pytest.raises(RepositoryError, match="the layer of point p1 is another one"):
            world.commit("p3", dict(alone, mode="incremental", parent="p1", **dict(pin, parent_layer_blake3="0" * 64)))
        with pytest.raises(RepositoryError, match="point p1 is not the one that it was made upon"):
            world.commit("p3", dict(alone, mode="incremental", parent="p1", **dict(pin, parent_content_id="0" * 32)))
    assert store.chain_facts().problems == {}
    layer = store.layer_path(KEY, "p1")
    os.truncate(str(layer), layer.stat().st_size - 1)
    assert "p1" in str(store.chain_facts().problems) and "bytes" in store.chain_facts().problems[("p1", KEY)]


def test_a_run_keeps_its_record_through_crashes(world: World) -> None:
    store = world.store
    with store.lock(new_run_id(), "test"):
        run = store.create_run("p1", vm_moid="vm-16", vm_name="app01")
        snapshot = run.record("snapshot", name="backup")
        process = run.record("process", pid=1, start_time=1)
        run.update(snapshot, moid="snapshot-7")
        run.done(process)
        run.set_snapshot("snapshot-7", "2026-11-22T08:42:03Z", {2000: f"{PREFIX}/1", 2001: None})
        run.finish_disk(2000, disk_entry("p1"))
    # What another process finds after a crash.
    (found,) = world.repository.vm(UUID).runs()
    assert found.data == run.data and found.run_id == run.run_id
    assert [dict(intent, recorded="") for intent in found.intents()] == [
        {"id": snapshot, "what": "snapshot", "name": "backup", "moid": "snapshot-7", "recorded": ""}
    ]
    ids = {2000: f"{PREFIX}/1", 2001: None}
    assert found.matches_snapshot("snapshot-7", "2026-11-22T08:42:03Z", ids)
    assert not found.matches_snapshot("snapshot-8", "2026-11-22T08:42:03Z", ids)
    assert not found.matches_snapshot("snapshot-7", "2026-11-22T08:42:04Z", ids)
    assert not found.matches_snapshot("snapshot-7", "2026-11-22T08:42:03Z", {**ids, 2001: "x/1"})
    assert not found.matches_snapshot("snapshot-7", "2026-11-22T08:42:03Z", {2000: f"{PREFIX}/1"})
    assert found.finished_disk(2000) == disk_entry("p1") and found.finished_disk(2001) is None
    # Another snapshot: what was read of the first one does not count any more.
    found.set_snapshot("snapshot-8", "2026-11-22T08:43:03Z", ids)
    assert found.finished_disk(2000) is None
    assert store.run(found.run_id) is not None and store.run("../../x") is None
    # Unfinished files do not count as records, and are found.
    part = store.path / "runs" / f"{found.run_id}.json.part-0123"
    part.write_text("{")
    assert len(store.runs()) == 1 and store.part_files() == [part]
    found.remove()
    assert store.runs() == []


def test_run_ids_are_128_random_bits() -> None:
    found = {new_run_id() for dummy in range(100)}
    assert len(found) == 100 and all(len(name) == 32 and int(name, 16) >= 0 for name in found)


def test_a_record_that_cannot_be_written_changes_nothing(world: World) -> None:
    with world.store.lock(new_run_id(), "test"):
        run = world.store.create_run("p1")
    folder = run.path.parent
    folder.rename(folder.parent / "away")
    with pytest.raises(RepositoryError, match="can't be written"):
        run.record("snapshot", name="x")
    (folder.parent / "away").rename(folder)
    assert run.intents() == [] and Run.load(run.path).intents() == []


def test_what_fails_while_the_record_can_not_be_written_is_what_is_told(world: World) -> None:
    """A full repository: the child's intent can't be crossed out at once, and is with the next write that works."""

    class Child:
        name, pid, start_time = "nbdkit", 4711, 12

    with world.store.lock(new_run_id(), "test"):
        run = world.store.create_run("p1")
    file = run.record("temporary_file", files=["a"])
    folder = run.path.parent
    with pytest.raises(ZeroDivisionError), run.recorded(Child()):  # type: ignore[arg-type]
        folder.rename(folder.parent / "away")
        raise ZeroDivisionError
    (folder.parent / "away").rename(folder)
    assert [intent["what"] for intent in Run.load(run.path).intents()] == ["temporary_file", "process"]
    run.done(file)
    assert run.intents() == [] and Run.load(run.path).intents() == []


def test_a_run_that_reads_a_template(world: World) -> None:
    """It has no snapshot, and is known by the version of its configuration instead."""
    state = (None, "1970-01-01T00:00:00Z", {2000: None})
    with world.store.lock(new_run_id(), "test"):
        run = world.store.create_run("p1")
        run.set_snapshot(*state, version="7")
        run.finish_disk(2000, disk_entry("p1"))
    (found,) = world.repository.vm(UUID).runs()
    assert found.matches_snapshot(*state, version="7") and found.finished_disk(2000) is not None
    assert not found.matches_snapshot(*state, version="8") and not found.matches_snapshot(*state)
    found.forget_disks()
    (found,) = world.repository.vm(UUID).runs()
    assert found.finished_disk(2000) is None


def test_the_folder_of_a_vm_that_was_never_backed_up_can_go(tmp_path: Path) -> None:
    """As a restore to a new machine leaves it; not with a run, a mark or a point in it."""
    repository = Repository.open(str(tmp_path), create=True)
    store = repository.vm("500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a")
    run_id = new_run_id()
    with store.lock(run_id, "test"):
        run = store.create_run(None, run_id=run_id)
    store.remove_unused()
    assert [found.run_id for found in store.runs()] == [run_id]
    with store.lock(new_run_id(), "test"):
        run.remove()
        store.write_facts({"name": "app01"})
    store.remove_unused()
    assert store.name == "app01"
    (store.path / "vm.json").unlink()
    store.remove_unused()
    assert not store.path.exists() and repository.vms() == []
    store.remove_unused()
