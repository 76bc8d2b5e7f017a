# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    DamagedError,
    DataPathError,
    InputError,
    VadpError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.restore import dest as dest_module
from ansible_collections.openvadp.backup.plugins.module_utils.restore import point as restored_point
from ansible_collections.openvadp.backup.plugins.module_utils.restore import to_file
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import DiskChoice, RestoreRequest
from hypothesis import given
from hypothesis import strategies as st

CLUSTER = 64 << 10
CAPACITY = (3 << 20) + 5 * 512  # no multiple of a cluster


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    folder = tmp_path / "dest"
    folder.mkdir()
    return folder


@pytest.fixture
def disk(world: Any) -> bytes:
    """Points p1 (full) and p2 (incremental, with zeros where p1 has data); the bytes of p2."""
    data = bytearray(CAPACITY)
    writes = [(0, random.Random(1).randbytes(2 * CLUSTER)), (20 * CLUSTER, b"a" * CLUSTER), (3 << 20, b"tail" * 640)]
    for offset, piece in writes:
        data[offset : offset + len(piece)] = piece
    world.point("p1", CAPACITY, writes)
    changes = [(CLUSTER, random.Random(2).randbytes(CLUSTER)), (20 * CLUSTER, bytes(CLUSTER))]
    for offset, piece in changes:
        data[offset : offset + len(piece)] = piece
    world.point("p2", CAPACITY, changes, parent="p1")
    return bytes(data)


def request(world: Any, dest: Path, **options: Any) -> RestoreRequest:
    fields: Dict[str, Any] = {"repository": str(world.repository.path), "vm_uuid": world.store.uuid, "dest": str(dest)}
    return RestoreRequest(**{**fields, **options})


def restore(world: Any, dest: Path, check_mode: bool = False, **options: Any) -> Dict[str, Any]:
    return to_file.restore_point(request(world, dest, **options), check_mode)


def bytes_of(path: str, image_format: str) -> bytes:
    if image_format == "raw":
        return Path(path).read_bytes()
    flat = path + ".flat"
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", path, flat], check=True)
    data = Path(flat).read_bytes()
    os.unlink(flat)
    return data


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vmdk_stream"])
def test_an_image_holds_the_points_bytes_and_a_second_run_changes_nothing(
    world: Any, dest: Path, disk: bytes, image_format: str
) -> None:
    driver = "vmdk" if image_format == "vmdk_stream" else image_format
    planned = restore(world, dest, check_mode=True, format=image_format)
    assert planned["changed"] and os.listdir(dest) == []
    result = restore(world, dest, format=image_format)
    entry = result["restored"][0]
    assert result["changed"] and result["point"] == "p2" and entry["verified"] is True
    assert entry["target"] == planned["restored"][0]["target"] == f"{dest}/app01-hard-disk-1-2000.{driver}"
    assert bytes_of(entry["target"], driver) == disk
    assert os.listdir(dest) == [os.path.basename(entry["target"])]
    assert result["diff"]["before"][entry["target"]] == "absent"
    before = os.stat(entry["target"])
    again = restore(world, dest, format=image_format)
    assert again["changed"] is False and again["restored"][0]["verified"] is True
    assert again["diff"]["before"] == again["diff"]["after"]
    assert os.stat(entry["target"]).st_mtime_ns == before.st_mtime_ns


def test_progress_goes_to_the_file(world: Any, dest: Path, disk: bytes, tmp_path: Path) -> None:
    restore(world, dest, progress_file=str(tmp_path / "progress"))
    records = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    assert [records[0]["state"], records[-1]["state"]] == ["running", "done"]
    assert records[-1]["done_bytes"] == records[-1]["total_bytes"] == CAPACITY
    with pytest.raises(InputError, match="progress file"):
        restore(world, dest, progress_file=str(tmp_path / "absent" / "progress"))


def test_a_disk_that_looks_like_an_image_stays_a_disk(world: Any, dest: Path, tmp_path: Path) -> None:
    """A guest can write a qcow2 header, with a backing file of the proxy, at the start of its disk."""
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    forged = tmp_path / "forged"
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(tmp_path / "secret"),
        "-F",
        "raw",
        str(forged),
        "1M",
    ]
    subprocess.run(command, check=True)
    content = forged.read_bytes()
    world.point("p1", CAPACITY, [(0, content)])
    for _run in range(2):
        result = restore(world, dest)
    assert result["changed"] is False
    found = Path(result["restored"][0]["target"]).read_bytes()
    assert found[: len(content)] == content and len(found) == CAPACITY and b"secretsecret" not in found


def test_other_content_is_replaced_with_consent_only(world: Any, dest: Path, disk: bytes) -> None:
    path = dest / "app01-hard-disk-1-2000.raw"
    path.write_bytes(disk + bytes(512))  # the same but for its size
    with pytest.raises(InputError, match="overwrite"):
        restore(world, dest)
    assert path.read_bytes() == disk + bytes(512) and len(os.listdir(dest)) == 1
    assert restore(world, dest, overwrite=True)["changed"] and path.read_bytes() == disk
    path.unlink()
    path.symlink_to(dest.parent / "elsewhere")
    with pytest.raises(InputError, match="not an ordinary file"):
        restore(world, dest, overwrite=True)


def test_a_qcow2_file_with_a_backing_file_is_not_taken_for_the_disk(world: Any, dest: Path, disk: bytes) -> None:
    """Its bytes are the point's now, and would no longer be when its backing file changes."""
    restore(world, dest)
    raw, path = dest / "app01-hard-disk-1-2000.raw", dest / "app01-hard-disk-1-2000.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(raw), "-F", "raw", str(path)], check=True)
    with pytest.raises(InputError, match="overwrite"):
        restore(world, dest, format="qcow2")


@pytest.mark.parametrize("victim", ["p1.qcow2", "p2.qcow2", "p1 missing", "p1 longer"])
@pytest.mark.parametrize("there", [True, False])
def test_no_image_of_a_damaged_chain_appears(
    world: Any, dest: Path, disk: bytes, flip: Any, victim: str, there: bool
) -> None:
    layer = world.store.layer_path(2000, victim[:2])
    if victim.endswith("missing"):
        layer.unlink()
    elif victim.endswith("longer"):
        with open(str(layer), "ab") as stream:
            stream.write(b"x")
    else:
        flip(layer, layer.stat().st_size // 2)
    path = dest / "app01-hard-disk-1-2000.raw"
    if there:
        path.write_bytes(b"what was there")
    with pytest.raises(DamagedError, match="nothing was written") as caught:
        restore(world, dest, overwrite=True)
    assert "p1" in str(caught.value) or "p2" in str(caught.value)
    assert os.listdir(dest) == [path.name] * there and (not there or path.read_bytes() == b"what was there")
    with pytest.raises(DamagedError):
        restore(world, dest, overwrite=True, check_mode=True)


def test_an_image_waits_for_the_check_of_its_point(
    world: Any, dest: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that finds its damage last of all, when the image has been written and compared."""
    converted = threading.Event()
    real_compare = to_file.image.compare

    def compare(*args: Any, **options: Any) -> bool:
        assert (dest / "app01-hard-disk-1-2000.raw").exists() is False
        result = real_compare(*args, **options)
        converted.set()
        return result

    def verify_point(*_args: Any) -> Any:
        assert converted.wait(60)
        return [{"key": 2000, "ok": False, "problems": ["a bit flipped"]}]

    monkeypatch.setattr(to_file.image, "compare", compare)
    monkeypatch.setattr(restored_point, "verify_point", verify_point)
    with pytest.raises(DamagedError, match="a bit flipped"):
        restore(world, dest)
    assert converted.is_set() and os.listdir(dest) == []


def test_a_damaged_manifest_is_refused(world: Any, dest: Path, disk: bytes, flip: Any) -> None:
    flip(world.store.manifest_path("p2"), 100)
    for point in ("latest", "p2"):
        with pytest.raises(DamagedError):
            restore(world, dest, point=point)
    assert restore(world, dest, point="p1")["changed"]


def test_leftovers_of_dead_restores_go_and_those_of_living_ones_stay(world: Any, dest: Path, disk: bytes) -> None:
    dead, alive = new_run_id(), new_run_id()
    for run_id in (dead, alive):
        (dest / f".openvadp-restore-{run_id}.lock").touch()
        (dest / f"app01-hard-disk-1-2000.raw.part-{run_id}").touch()
        (dest / f"app01-hard-disk-1-2000.raw.part-{run_id}.part-{run_id}").touch()
    kept = ["notes.part-1", f"notes.part-{dead}", "app01-hard-disk-1-2000.raw.part-7"]
    for name in kept:
        (dest / name).touch()
    with open(dest / f".openvadp-restore-{alive}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        restore(world, dest)
        names = set(os.listdir(dest))
    assert not any(dead in name and name not in kept for name in names)
    assert sum(alive in name for name in names) == 3
    assert names >= {"app01-hard-disk-1-2000.raw", *kept}


def test_a_stage_whose_process_died_goes_and_one_that_is_not_ours_stays(world: Any, dest: Path, disk: bytes) -> None:
    dead, alive, odd = (dest / f".openvadp-restore-{digit * 16}" for digit in "012")
    for folder in (dead, alive, odd):
        folder.mkdir(mode=0o700)
        (folder / "image").touch()
    (dead / "deep").mkdir()
    (dead / "deep" / "link").symlink_to(world.repository.path)
    odd.chmod(0o755)  # ours are never open to others
    (dest / f".openvadp-restore-{'3' * 16}").symlink_to(world.repository.path)
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    restore(world, dest)
    os.close(lock)
    assert not dead.exists() and (alive / "image").exists() and (odd / "image").exists()
    assert (dest / f".openvadp-restore-{'3' * 16}").is_symlink() and world.store.points()


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vmdk_stream"])
def test_images_are_for_their_owner_alone(world: Any, dest: Path, disk: bytes, image_format: str) -> None:
    before = os.umask(0)
    seen = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            for path in dest.rglob("*"):
                with contextlib.suppress(OSError):
                    seen.add(path.stat().st_mode & 0o077)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = restore(world, dest, format=image_format)
    finally:
        os.umask(before)
        stop.set()
        watcher.join()
    modes = {os.stat(entry["target"]).st_mode & 0o777 for entry in result["restored"]}
    modes |= {path.stat().st_mode & 0o777 for path in world.store.disk_folder(2000).glob("*") if "p2" in path.name}
    assert modes == {0o600} and seen == {0}


@pytest.mark.parametrize("image_format", ["raw", "vmdk"])
def test_names_that_another_user_swaps_meanwhile_lead_nowhere(
    world: Any, dest: Path, disk: bytes, tmp_path: Path, image_format: str
) -> None:
    """Whoever owns the folder can rename what is in it, and put links there."""
    victim = tmp_path / "victim"
    victim.mkdir()
    kept = victim / "app01-hard-disk-1-2000.vmdk"
    kept.write_bytes(b"kept")
    stop = threading.Event()
    swapped = []

    def swap() -> None:
        while not stop.is_set():
            for name in os.listdir(dest):
                if name.startswith("x") or (dest / name).is_symlink():
                    continue
                with contextlib.suppress(OSError):
                    if name.endswith(".lock"):
                        # What an unfinished image is called followed from the lock's name once.
                        part = f".part-{name[len('.openvadp-restore-') : -len('.lock')]}"
                        os.symlink(kept, dest / f"app01-hard-disk-1-2000.{image_format}{part * 2}")
                    os.rename(dest / name, dest / f"x{len(swapped)}")
                    os.symlink(victim, dest / name)
                    swapped.append(name)

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        for _again in range(4):
            with contextlib.suppress(VadpError):
                restore(world, dest, format=image_format, overwrite=True)
    finally:
        stop.set()
        attacker.join()
    assert any(name.startswith(".openvadp-restore-") for name in swapped)
    assert os.listdir(victim) == [kept.name] and kept.read_bytes() == b"kept"


def test_a_pipe_at_an_images_place_is_refused(world: Any, dest: Path, disk: bytes) -> None:
    os.mkfifo(dest / "app01-hard-disk-1-2000.raw")
    with pytest.raises(InputError, match="not an ordinary file"):
        restore(world, dest, overwrite=True)


def test_a_full_folder_is_noticed_before_it_is_full(
    world: Any, dest: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_file.os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(DataPathError, match="free space"):
        restore(world, dest)
    assert os.listdir(dest) == []


def test_a_write_that_fails_leaves_what_was_there(world: Any, dest: Path, disk: bytes) -> None:
    """The file size limit stands for a file system that fills up."""
    path = dest / "app01-hard-disk-1-2000.raw"
    path.write_bytes(b"what was there")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.restore import to_file\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError\n"
        "try:\n    to_file.restore_point(RestoreRequest(repository=sys.argv[1], vm_uuid=sys.argv[2], dest=sys.argv[3],"
        " overwrite=True), False)\n"
        "except DataPathError as error:\n    print(error)\n"
    )
    root = Path(to_file.__file__).parents[6]
    run = subprocess.run(
        [sys.executable, "-c", code, str(world.repository.path), world.store.uuid, str(dest)],
        check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert "could not be written" in run.stdout, run.stderr
    assert path.read_bytes() == b"what was there" and os.listdir(dest) == [path.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disks": [DiskChoice(2001)]}, "holds no such disk"),
        ({"disks": [DiskChoice(2000), DiskChoice(2000)]}, "listed twice"),
        ({"disks": [DiskChoice(2000, target_key=2001)]}, "target=in_place"),
        ({"vm": {"name": "restore01"}}, "vm_uuid or vm_name"),
        ({"dest": "relative"}, "absolute"),
        ({"dest": "/nonexistent/folder"}, "there is no such folder"),
        ({"rate_limit": 5000}, "rate_limit"),
        ({"format": "vhd"}, "format"),
    ],
)
def test_options_that_make_no_sense_touch_nothing(
    world: Any, dest: Path, disk: bytes, options: Dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        restore(world, **{"dest": dest, **options})
    assert os.listdir(dest) == []


def test_the_folder_is_not_in_a_repository(world: Any, disk: bytes) -> None:
    with pytest.raises(InputError, match="repository"):
        restore(world, world.store.disk_folder(2000))


@given(st.text(max_size=120), st.text(max_size=60), st.integers(0, 2**31), st.sampled_from(["raw", "qcow2", "vmdk"]))
def test_any_name_makes_a_file_name_and_a_leftover_of_it_is_recognised(
    vm_name: str, label: str, key: int, image_format: str
) -> None:
    name = to_file.file_name(vm_name.encode("utf-8", "replace").decode(), label, key, image_format)
    run_id = new_run_id()
    part = f"{name}.part-{run_id}.part-{run_id}"
    assert "/" not in name and "\0" not in name and "\n" not in name and not name.startswith((".", "-"))
    assert len(part.encode("utf-8")) <= 255
    assert dest_module.UNFINISHED.fullmatch(part) and not dest_module.UNFINISHED.fullmatch(name)
