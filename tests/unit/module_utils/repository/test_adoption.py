# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a place that a repository does not list it is read, and nothing else, until the user says what that means."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, LockedError, RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import half_written, places, state, trust
from ansible_collections.openvadp.backup.plugins.module_utils.repository.documents import LOCK_FILE
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.verify import verify_point

from .conftest import KEY, UUID, World

MIB = 1 << 20
OLD = Path(__file__).parents[3] / "data" / "repository-format-1.tar.xz"
OLD_VM = "4064b84d-3f5f-5e5c-9ef7-716ddba78eb4"
Tree = Dict[str, Any]


def tree(folder: Path) -> Tree:
    """All that is in a folder, content and times of the last change."""
    found: Tree = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return found


def description(folder: Path) -> Dict[str, Any]:
    return dict(json.loads((folder / "repository.json").read_text()))


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lies in /var/lib otherwise, and is another machine's where a test says so."""
    monkeypatch.setattr(state, "STATE_DIR", str(tmp_path / "var"))
    return tmp_path / "var"


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    """A copy of a repository with a point, made while a run was at work."""
    world.point("p1", MIB, [(0, b"a" * 65536)])
    with world.store.lock(new_run_id(), "test"):
        run = world.store.create_run("p2", vm_name="app01")
        run.record("snapshot", name="theirs")
        (world.store.path / "runs" / f"{run.run_id}.2000.journal").write_text("{}\n")
    return Path(shutil.copytree(world.repository.path, tmp_path / "copy"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A repository as the last release of format 1 has made it: two points, and the record of a run that was cut."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "format-1"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    with ExitStack() as stack:

        def mounted(source: Path, name: str, *options: str) -> Path:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            done = subprocess.run(["mount", *options, str(source), str(folder)], check=False, capture_output=True)
            if done.returncode != 0:
                pytest.skip(f"this machine does not let us mount: {done.stderr.decode()[:200]}")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
            return folder

        yield mounted


def file_system(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
    return path


# Elsewhere


def test_from_elsewhere_it_is_read_and_not_written(copied: Path) -> None:
    before = tree(copied)
    repository = Repository.open(str(copied))
    assert not repository.listed and repository.report_only and not repository.may_write
    store = repository.vm(UUID)
    manifest = store.resolve("latest")
    assert all(disk["ok"] for disk in verify_point(store, manifest, "data"))
    # The records are told, and are none that anybody acts upon.
    assert store.runs() == [] and [run.data["point"] for run in store.foreign_runs()] == ["p2"]
    assert store.run(store.foreign_runs()[0].run_id) is None
    for writing in (
        lambda: Repository.open(str(copied), writable=True),
        lambda: Repository.open(str(copied), create=True),
        lambda: Repository.open_to_write(str(copied), True, None, False),
    ):
        with pytest.raises(RepositoryError, match="in another place.*/copy of the file system.*adopt.*moved.*copy"):
            writing()
    assert tree(copied) == before


def test_what_a_restore_from_elsewhere_notes_lies_on_this_machine(copied: Path, state_dir: Path, world: World) -> None:
    before = tree(copied)
    repository = Repository.open(str(copied))
    store = repository.vm(UUID)
    with store.lock(new_run_id(), "restore"):
        run = store.create_run(None, vm_name="app01")
        run.record("restore", vm_uuid=UUID, half_written=[KEY], point="p1", point_vm=UUID)
        trust.mark(store, KEY, "restored")
        for writing in (lambda: store.make_disk_folder(KEY), lambda: store.commit_point({"point": "p3"})):
            with pytest.raises(RepositoryError, match="in another place"):
                writing()
        with pytest.raises(LockedError), Repository.open(str(copied)).vm(UUID).lock(new_run_id(), "another"):
            pass
    assert tree(copied) == before
    folder = state_dir / repository.id
    assert (folder.stat().st_mode & 0o777, run.path.parent) == (0o700, folder / "vms" / UUID / "runs")
    assert [found.run_id for found in store.runs()] == [run.run_id]
    assert [entry["key"] for entry in trust.marks(store)] == [KEY]
    assert half_written.half_written(repository, UUID)[0]["key"] == KEY
    # Who writes the original on this machine knows of it as well, and takes both locks.
    original = world.repository.vm(UUID)
    assert run.run_id in [found.run_id for found in original.runs()] and original.run(run.run_id) is not None
    assert half_written.half_written(world.repository, UUID) and trust.marks(original)
    with original.lock(new_run_id(), "backup"), pytest.raises(LockedError):
        Repository.open(str(copied)).vm(UUID).lock(new_run_id(), "restore").__enter__()
    # The half-written disk is written anew, from the original, and the mark goes with a full after a reset.
    with original.lock(new_run_id(), "backup"):
        for entry in original.runs():
            entry.remove()
    assert original.runs() == [] == store.runs()


@pytest.mark.parametrize("spoil", ["link", "open", "others"])
def test_a_folder_that_others_could_have_written_is_not_used(spoil: str, copied: Path, state_dir: Path) -> None:
    repository = Repository.open(str(copied))
    folder = state_dir / repository.id
    state_dir.mkdir()
    (state_dir.parent / "theirs" / "vms" / UUID / "runs").mkdir(parents=True)
    if spoil == "link":
        folder.symlink_to(state_dir.parent / "theirs")
    else:
        folder.mkdir(mode=0o700)
        os.chmod(str(folder), 0o777) if spoil == "open" else os.chown(str(folder), 65534, 65534)
    with pytest.raises(RepositoryError, match="no place for the lock"):
        repository.vm(UUID).lock(new_run_id(), "restore").__enter__()
    assert list((state_dir.parent / "theirs").rglob("lock")) == []


def test_a_repository_that_is_mounted_read_only_is_restored_from(
    copied: Path, world: World, state_dir: Path, mount: Callable[..., Path]
) -> None:
    """The very place, so what it lists is right; what can't be written goes to this machine all the same."""
    folder = mount(world.repository.path, "read-only", "--bind", "-o", "ro")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    repository = Repository.open(str(folder))
    assert repository.listed and not repository.may_write and repository.vm(UUID).runs() == []
    with repository.vm(UUID).lock(new_run_id(), "restore"):
        assert repository.vm(UUID).lock(new_run_id(), "x").path == state_dir / repository.id / "vms" / UUID / "lock"
    with pytest.raises(RepositoryError, match="not writable"):
        Repository.open(str(folder), writable=True)


# Adopting


def test_moved_keeps_the_id_and_replaces_the_list(copied: Path, world: World) -> None:
    repository = Repository.open(str(copied), adopt="moved")
    assert repository.id == world.repository.id and repository.done and repository.may_write
    assert description(copied)["places"] == [places.place_of(str(copied)).to_json()]
    assert len(repository.vm(UUID).runs()) == 1
    # Once is enough, and it does nothing any more.
    before = tree(copied)
    assert Repository.open(str(copied), adopt="moved").done == []
    assert Repository.open(str(copied), adopt="copy").done == [] and tree(copied) == before
    # Moved back: the folder has its list in it.
    shutil.rmtree(world.repository.path)
    copied.rename(world.repository.path)
    with pytest.raises(RepositoryError, match="in another place"):
        Repository.open(str(world.repository.path), writable=True)


def test_a_copy_gets_an_id_of_its_own_and_forgets_the_runs(copied: Path, world: World) -> None:
    original = tree(world.repository.path)
    repository = Repository.open(str(copied), adopt="copy")
    assert repository.id != world.repository.id and repository.listed
    store = repository.vm(UUID)
    assert os.listdir(str(copied / "vms" / UUID / "runs")) == [] == store.runs() == store.foreign_runs()
    assert "The records of 1 runs" in " ".join(repository.done)
    assert tree(world.repository.path).keys() == original.keys()
    # The points stay what they are, and new ones are made.
    assert all(disk["ok"] for disk in verify_point(store, store.resolve("p1"), "data"))
    identifier = repository.id
    assert Repository.open(str(copied), adopt="copy").id == identifier
    # Its copy in turn is one.
    third = shutil.copytree(copied, copied.with_name("third"))
    assert Repository.open(str(third), adopt="copy").id not in (identifier, world.repository.id)


def test_discarding_runs_removes_nothing_else(copied: Path) -> None:
    """Where a link is planted in place of the records, what it leads to stays."""
    runs = copied / "vms" / UUID / "runs"
    (runs / "notes.txt").write_text("the user's")
    Repository.open(str(copied), adopt="copy")
    assert os.listdir(str(runs)) == ["notes.txt"]
    shutil.rmtree(runs)
    runs.symlink_to("points")
    document = description(copied)
    document["places"][0]["path"] = "/elsewhere"
    (copied / "repository.json").write_text(json.dumps(document))
    with pytest.raises(RepositoryError, match="is a link"):
        Repository.open(str(copied), adopt="copy")
    assert os.listdir(str(copied / "vms" / UUID / "points")) == ["p1.json"]


def test_what_is_no_copy_is_not_made_one(
    world: World, copied: Path, tmp_path: Path, mount: Callable[..., Path]
) -> None:
    """The user takes the original, seen by another path, for a copy: its records and its id are not lost."""
    document = description(world.repository.path)
    here = document["places"][0]
    # As a share is listed by another name than that by which it is mounted now.
    other = mount(world.repository.path, "other", "--bind")
    (tmp_path / "elsewhere").mkdir()
    moved = dict(here, path="/another/name")
    world.repository.write_description(document["id"], [places.Place.from_json(moved)])
    real = places.seen_here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "seen_here", lambda place: [str(other)] if place.path == "/another/name" else real(place))
        before = tree(world.repository.path)
        with pytest.raises(RepositoryError, match="not a copy.*another_path"):
            Repository.open(str(world.repository.path), adopt="copy")
        assert len(list(world.store.path.glob("runs/*.json"))) == 1
        assert description(world.repository.path) == json.loads(before["repository.json"][1])
        assert Repository.open(str(world.repository.path), adopt="another_path").listed
        assert description(world.repository.path)["places"] == [moved, here]
        # And a real copy is none by another path.
        shutil.copy(copied / "repository.json", tmp_path / "kept.json")
        (copied / "repository.json").write_text(json.dumps({**document, "places": [moved]}))
        with pytest.raises(RepositoryError, match="not the same storage, but a copy"):
            Repository.open(str(copied), adopt="another_path")
        assert list(copied.glob("*part*")) == [] and list(other.glob("*part*")) == []


def test_another_path_that_can_not_be_proved_is_refused(copied: Path, world: World) -> None:
    document = description(copied)
    document["places"][0]["filesystem"]["identity"] = "00000000-0000-4000-8000-000000000001"
    (copied / "repository.json").write_text(json.dumps(document))
    before = tree(copied)
    for check_mode in (True, False):
        with pytest.raises(RepositoryError, match="can't be proved.*no place that it lists is mounted"):
            Repository.open(str(copied), adopt="another_path", check_mode=check_mode)
    assert {name: content for name, (_time, content) in tree(copied).items() if name not in (".", LOCK_FILE)} == {
        name: content for name, (_time, content) in before.items() if name != "."
    }


def test_a_run_at_work_keeps_a_copy_from_being_made_of_it(copied: Path) -> None:
    """The lock of the VM is held, so this is where backups are made."""
    store = Repository.open(str(copied), adopt="moved").vm(UUID)
    with store.lock(new_run_id(), "backup"):
        elsewhere = description(copied)
        elsewhere["places"][0]["path"] = "/elsewhere"
        (copied / "repository.json").write_text(json.dumps(elsewhere))
        with pytest.raises(LockedError):
            Repository.open(str(copied), adopt="copy")
    assert len(list(store.path.glob("runs/*.json"))) == 1 and description(copied)["id"] == elsewhere["id"]


def test_check_mode_adopts_nothing(copied: Path) -> None:
    before = tree(copied)
    repository = Repository.open(str(copied), writable=True, adopt="copy", check_mode=True)
    assert repository.listed and repository.done == ["The repository would be adopted (copy)."]
    assert tree(copied) == before
    with pytest.raises(InputError):
        Repository.open(str(copied), adopt="mine")


def test_many_who_adopt_at_once_agree(copied: Path) -> None:
    found: List[str] = []
    barrier = threading.Barrier(4)

    def adopt() -> None:
        barrier.wait()
        found.append(Repository.open(str(copied), adopt="copy").id)

    threads = [threading.Thread(target=adopt) for _number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and set(found) == {description(copied)["id"]}


# Format 1


def test_format_1_is_read_and_becomes_format_2_by_the_users_word_alone(old: Path) -> None:
    before = tree(old)
    repository = Repository.open(str(old))
    store = repository.find_vm(vm_name="app01")
    assert (repository.format, store.uuid, repository.listed) == (1, OLD_VM, False)
    assert [manifest["point"] for manifest in store.points()] == ["full", "incremental"]
    for manifest in store.points():
        assert all(disk["ok"] for disk in verify_point(store, manifest, "data"))
    with store.lock(new_run_id(), "restore"):
        store.create_run(None)
    for adopt, check_mode, words in (
        (None, False, "older format.*adopt.*moved"),
        ("another_path", False, "format 1 lists no place"),
        ("another_path", True, "format 1 lists no place"),
    ):
        with pytest.raises(RepositoryError, match=words):
            Repository.open(str(old), writable=True, adopt=adopt, check_mode=check_mode)
    Repository.open(str(old), writable=True, adopt="moved", check_mode=True)
    (old / LOCK_FILE).unlink()
    assert {name: entry[1] for name, entry in tree(old).items()} == {name: entry[1] for name, entry in before.items()}
    adopted = Repository.open(str(old), writable=True, adopt="moved")
    assert adopted.id == repository.id
    assert description(old) == {
        "format": 2,
        "id": repository.id,
        "places": [places.place_of(str(old)).to_json()],
    }
    # All else is as it was.
    kept = {name[4:]: entry for name, entry in before.items() if name.startswith("vms/")}
    assert tree(old / "vms") == {**kept, ".": before["vms"]}


# Machines and locks


def noted(folder: Path, **changes: Any) -> Repository:
    document = description(folder)
    document["places"][0].update(changes)
    (folder / "repository.json").write_text(json.dumps(document))
    return Repository.open(str(folder), writable=True)


def test_another_machine_is_a_warning_once(world: World) -> None:
    folder = world.repository.path
    if not places.this_machine():
        pytest.skip("this machine has no name of its own")
    assert world.repository.warnings == []
    other = " ".join(word.partition(":")[0] + ":0000" for word in places.this_machine().split())
    repository = noted(folder, machine=other)
    assert repository.listed and repository.may_write and "another machine" in repository.warnings[0]
    repository.note_machine()
    assert Repository.open(str(folder), writable=True).warnings == []
    assert description(folder)["places"] == [places.place_of(str(folder)).to_json()]
    # A container without any name of its own is no other machine.
    assert noted(folder, machine="").warnings == []


def test_a_second_machine_is_refused_where_locks_stay_local(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By nolock, local_lock and nobrl a lock holds for one machine; see test_places for how they are told."""
    folder = world.repository.path
    if not places.this_machine():
        pytest.skip("this machine has no name of its own")
    monkeypatch.setattr(places.Mount, "local_locks", "it is mounted with nolock")
    assert noted(folder).may_write
    other = " ".join(word.partition(":")[0] + ":0000" for word in places.this_machine().split())
    for machine in (other, ""):
        with pytest.raises(RepositoryError, match="two machines.*nolock"):
            noted(folder, machine=machine)
        repository = Repository.open(str(folder))
        assert repository.listed and not repository.may_write and repository.vm(UUID).runs() == []
    # The first one is gone for good.
    assert Repository.open(str(folder), adopt="moved").may_write
    assert Repository.open(str(folder), writable=True).vm(UUID).runs() is not None


# The folder goes away


def test_nothing_is_written_where_the_repository_was(world: World, tmp_path: Path, mount: Callable[..., Path]) -> None:
    """It is unmounted under a run: the folder below is not filled."""
    path = file_system(tmp_path, "fs.img")
    folder = mount(path, "mnt", "-o", "loop")
    repository = Repository.open(str(folder), create=True)
    store = repository.vm(UUID)
    with store.lock(new_run_id(), "backup"):
        subprocess.run(["umount", "-l", str(folder)], check=True)
        for writing in (
            lambda: store.make_disk_folder(KEY),
            lambda: store.commit_point({"point": "p"}),
            store.make_folder,
        ):
            with pytest.raises(RepositoryError, match="repository has gone"):
                writing()
    assert os.listdir(str(folder)) == []


def test_a_point_is_not_committed_once_the_lock_is_another_file(world: World) -> None:
    with world.store.lock(new_run_id(), "backup"):
        entry = world.layer("p1", MIB, [(0, b"a" * 512)])
        (world.store.path / "lock").unlink()
        with world.repository.vm(UUID).lock(new_run_id(), "another"), pytest.raises(RepositoryError, match="removed"):
            world.commit("p1", entry)
    assert world.store.point_names() == []


def test_no_repository_on_what_does_not_last(tmp_path: Path, mount: Callable[..., Path]) -> None:
    folder = mount(Path("tmpfs"), "tmpfs", "-t", "tmpfs")
    for check_mode in (True, False):
        with pytest.raises(RepositoryError, match="it is on tmpfs"):
            Repository.open_to_write(str(folder), True, None, check_mode)
    with pytest.raises(RepositoryError, match="it is on tmpfs"):
        Repository.open(str(folder), create=True)
    assert os.listdir(str(folder)) == []
