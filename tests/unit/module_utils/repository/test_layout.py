# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    DamagedError,
    InputError,
    LockedError,
    RepositoryError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository import layout
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import (
    Repository,
    check_point_name,
    moment_of,
    new_point_name,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.places import place_of
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id

from .conftest import KEY, PREFIX, UUID, World, disk_entry

MIB = 1 << 20


def test_open_refuses_what_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no such folder.*mounted"):
        Repository.open(str(tmp_path / "absent"), create=True)
    with pytest.raises(RepositoryError, match="repository.json is missing"):
        Repository.open(str(tmp_path))
    assert os.listdir(str(tmp_path)) == []
    (tmp_path / "photos").mkdir()
    with pytest.raises(RepositoryError, match="holds other data: photos"):
        Repository.open(str(tmp_path), create=True)
    assert os.listdir(str(tmp_path)) == ["photos"]


def test_open_makes_a_repository_of_an_empty_folder_once(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    # What a crash between writing and naming the file leaves.
    (tmp_path / "repository.json.part-1234").write_text("{")
    assert layout.is_empty_folder(str(tmp_path))
    first = Repository.open(str(tmp_path), create=True)
    assert Repository.open(str(tmp_path)).id == first.id == Repository.open(str(tmp_path), create=True).id
    assert sorted(os.listdir(str(tmp_path))) == ["lost+found", "repository.json"]
    assert json.loads((tmp_path / "repository.json").read_text()) == {
        "format": 2,
        "id": first.id,
        "places": [place_of(str(tmp_path)).to_json()],
    }
    assert not layout.is_empty_folder(str(tmp_path))
    # And one after the naming: for vadp_recover to remove.
    assert first.part_files() == []
    (tmp_path / "repository.json.part-1234").write_text("{}")
    assert first.part_files() == [tmp_path / "repository.json.part-1234"]


def test_two_who_create_a_repository_agree_on_its_id(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        barrier = threading.Barrier(4)

        def create(folder: Path = folder, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            return Repository.open(str(folder), create=True).id

        with ThreadPoolExecutor(4) as pool:
            ids = [future.result() for future in [pool.submit(create) for dummy in range(4)]]
        assert len(set(ids)) == 1
        assert os.listdir(str(folder)) == ["repository.json"]


@pytest.mark.parametrize(
    "content, error, words",
    [
        ('{"format": 3, "id": "x"}', RepositoryError, "newer version.*format 3"),
        ('{"format": 2, "id": "00000000-0000-0000-0000-000000000001"}', DamagedError, "lacks 'places'"),
        ('{"format": 1}', DamagedError, "lacks 'id'"),
        ('{"format": true, "id": "00000000-0000-0000-0000-000000000001"}', DamagedError, "format"),
        ("[]", DamagedError, "no object"),
        ("", DamagedError, "damaged"),
    ],
)
def test_open_refuses_a_bad_description(tmp_path: Path, content: str, error: type, words: str) -> None:
    (tmp_path / "repository.json").write_text(content)
    with pytest.raises(error, match=words):
        Repository.open(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="drops from root to an ordinary user")
def test_open_for_writing_tells_that_it_may_not(world: World) -> None:
    path = str(world.repository.path)
    os.chmod(path, 0o755)
    program = (
        "import os, sys\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "Repository.open(sys.argv[1])\n"
        "try:\n    Repository.open(sys.argv[1], writable=True)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    for parent in Path(path).parents:
        if str(parent).startswith("/tmp/"):
            os.chmod(str(parent), 0o755)
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RepositoryError The repository is not writable")


@pytest.mark.parametrize("name", ["a", "20261122T084203Z-2", "A.b_c+d-e", "x" * 128, "a..b"])
def test_point_names_that_may_be(name: str) -> None:
    assert check_point_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\n", "a\0", "-a", "x" * 129, "x" * 300, "ä", "a b", "latest", "a.part-b"],
)
def test_point_names_that_may_not_be(name: str, world: World) -> None:
    for use in (check_point_name, world.store.point, world.store.config_path):
        with pytest.raises(InputError):
            use(name)


def test_no_path_leaves_the_repository(world: World, tmp_path: Path) -> None:
    for uuid in ("..", "../../etc", UUID + "\n", UUID[:-1], ""):
        with pytest.raises(InputError):
            world.repository.vm(uuid)
    assert world.repository.vm(UUID.upper()).uuid == UUID
    for key in (-1, True, "2000", "../x"):
        with pytest.raises(InputError):
            world.store.layer_path(key, "a")  # type: ignore[arg-type]
    outside = tmp_path / "outside"
    outside.mkdir()
    with world.store.lock(new_run_id(), "test"):
        (world.store.path / f"disk-{KEY}").symlink_to(outside)
        with pytest.raises(DamagedError, match="leads out of the repository"):
            world.store.make_disk_folder(KEY)
    (world.store.path / "vm.json").symlink_to("/etc/passwd")
    with pytest.raises(DamagedError, match="leads out of the repository"):
        world.store.facts  # noqa: B018


def test_new_point_names_do_not_collide() -> None:
    now = datetime(2026, 11, 22, 8, 42, 3, 999999, tzinfo=timezone.utc)
    assert new_point_name([], now) == "20261122T084203Z"
    assert new_point_name(["20261122T084203Z", "20261122T084203Z-2"], now) == "20261122T084203Z-3"


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


def test_writing_needs_the_lock(world: World) -> None:
    with pytest.raises(RuntimeError):
        world.store.create_run("p1")
    with world.store.lock(new_run_id(), "test"):
        world.store.create_run("p1")
    with pytest.raises(RuntimeError):
        world.store.write_facts({"name": "app01"})


def test_facts_and_look_ups(world: World) -> None:
    other = world.repository.vm(UUID.replace("5", "6", 1))
    for store, name in ((world.store, "app01"), (other, "app02")):
        with store.lock(new_run_id(), "test"):
            store.write_facts({"name": name, "path": f"/DC0/vm/{name}", "moid": "vm-1", "bios_uuid": UUID})
    assert world.repository.find_vm(vm_name="app02").uuid == other.uuid
    assert world.repository.find_vm(vm_uuid=UUID.upper()).name == "app01"
    with pytest.raises(RepositoryError, match="no such virtual machine.*app03.*app01.*app02"):
        world.repository.find_vm(vm_name="app03")
    with other.lock(new_run_id(), "test"):
        other.write_facts({"name": "app01"})
    with pytest.raises(RepositoryError, match=f"{UUID} .*/DC0/vm/app01.*{other.uuid}"):
        world.repository.find_vm(vm_name="app01")
    # A VM whose facts are damaged does not hide the others.
    (world.store.path / "vm.json").write_text("{")
    assert world.repository.find_vm(vm_name="app01").uuid == other.uuid
    with pytest.raises(DamagedError):
        world.repository.find_vm(vm_name="app02")


def test_points_are_ordered_by_their_snapshots(world: World) -> None:
    first = world.point("zulu", MIB, [(0, b"a" * 65536)])
    second = world.point("alpha", MIB, [(65536, b"b" * 65536)], parent="zulu")
    assert [manifest["point"] for manifest in world.store.points()] == ["zulu", "alpha"]
    assert world.store.resolve("latest") == second
    assert world.store.point("zulu") == first and world.store.point("mike") is None
    with pytest.raises(RepositoryError, match="no such restore point.*mike.*alpha, zulu"):
        world.store.resolve("mike")
    assert (os.stat(str(world.store.nvram_path("zulu"))).st_mode & 0o777) == 0o600
    # A damaged manifest might be the latest one: then nobody can tell which is.
    world.store.manifest_path("alpha").write_text("{}")
    assert [manifest["point"] for manifest in world.store.points()] == ["zulu"]
    assert list(world.store.read_points()[1]) == ["alpha"]
    with pytest.raises(DamagedError, match="newest that can be read is zulu"):
        world.store.resolve("latest")


@pytest.mark.parametrize(
    "point, hour, minute, second, micro",
    [
        ("2026-11-20T03:00Z", 3, 0, 0, 0),
        ("2026-11-20T03:00:00Z", 3, 0, 0, 0),
        ("before 2026-11-20T03:00Z", 3, 0, 0, 0),
        ("2026-11-20t03:04:05.25z", 3, 4, 5, 250000),
        ("2026-11-20T04:30+01:30", 3, 0, 0, 0),
        # What YAML makes of a time that is not quoted, as Python writes it and as JSON does.
        ("2026-11-20 03:00:00+00:00", 3, 0, 0, 0),
        ("2026-11-20T03:00:00.500000+00:00", 3, 0, 0, 500000),
    ],
)
def test_times_that_choose_a_point(point: str, hour: int, minute: int, second: int, micro: int) -> None:
    assert moment_of(point) == datetime(2026, 11, 20, hour, minute, second, micro, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "point, words",
    [
        ("2026-11-20T03:00", "no zone"),
        ("before 2026-11-20", "no zone"),
        ("before sunday", "another form"),
        ("2026-11-31T03:00Z", "day"),
        ("2026-11-20T25:00Z", "does not match|hour"),
        ("0001-01-01T00:00+12:00", "out of range"),
        ("03:00Z", "another form"),
        ("2026-11-20T03:00Z or so", "another form"),
    ],
)
def test_times_that_are_none(point: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        moment_of(point)


def test_what_is_no_time_is_a_name() -> None:
    assert [moment_of(name) for name in ("latest", "20261122T084203Z", "2026-11-20", "before")] == [None] * 4


def test_a_time_means_the_newest_point_before_it(world: World) -> None:
    zulu = world.point("zulu", MIB, [(0, b"a" * 65536)])
    alpha = world.point("alpha", MIB, [(65536, b"b" * 65536)], parent="zulu")
    assert (zulu["snapshot"]["created"], alpha["snapshot"]["created"]) == (
        "2026-11-22T08:43:03Z",
        "2026-11-22T08:44:03Z",
    )
    assert world.store.resolve("2030-01-01T00:00Z") == alpha
    assert world.store.resolve("2026-11-22T08:44:04Z") == alpha
    # Strictly before: at that very moment the point is not there yet.
    assert world.store.resolve("before 2026-11-22T08:44:03Z") == zulu
    assert world.store.resolve("2026-11-22T09:44:03+01:00") == zulu
    assert world.store.resolve("2026-11-22T08:43:03.5Z") == zulu
    with pytest.raises(RepositoryError, match="no restore point that old.*the oldest is zulu, of 2026-11-22T08:43:03Z"):
        world.store.resolve("2026-11-22T08:43:03Z")
    # What is damaged might be the one that is meant.
    world.store.manifest_path("alpha").write_text("{}")
    with pytest.raises(DamagedError, match="can't be told before 2026-11-22T08:44:03Z.*can be read is zulu"):
        world.store.resolve("2026-11-22T08:44:03Z")


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
        process = run.record("process", pid=1)
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


def test_what_everybody_may_write_is_no_repository(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    root.chmod(0o777)
    repository = Repository.open(str(root), create=True)
    assert root.stat().st_mode & 0o777 == 0o775
    store = repository.vm(UUID)
    with store.lock(new_run_id(), "test"):
        store.write_facts({"name": "app01"})
    for folder in (root, root / "vms", store.path, store.path / "points"):
        mode = folder.stat().st_mode
        folder.chmod(mode | 0o002)
        with pytest.raises(DamagedError, match="everybody"):
            Repository.open(str(root)).vm(UUID).points()
        folder.chmod(mode & ~0o002 | 0o020)
        assert Repository.open(str(root)).vm(UUID).points() == []
