# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    DamagedError,
    InputError,
    RepositoryError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository import layout
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.places import place_of
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id

from .conftest import KEY, UUID, World


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


def test_a_folder_may_have_any_name_that_is_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / "-a b\n{}\u00fc"
    folder.mkdir()
    first = Repository.open(str(folder), create=True)
    again = Repository.open(str(folder))
    assert again.id == first.id and again.listed


def test_a_pipe_in_place_of_a_manifest_keeps_no_look_up_waiting(world: World) -> None:
    world.point("p1", 65536, [(0, b"x")])
    os.mkfifo(world.store.manifest_path("p2"))
    run_id = str(world.store.resolve("p1")["run_id"])
    store, manifest = world.repository.find_point_of(run_id)
    assert (store.uuid, manifest["point"]) == (world.store.uuid, "p1")
    with pytest.raises(RepositoryError, match="There is no restore point of this run"):
        world.repository.find_point_of(new_run_id())


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
        ("[]", DamagedError, "not an object"),
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
