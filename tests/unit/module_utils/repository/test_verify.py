# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import HashWriter
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore
from ansible_collections.openvadp.backup.plugins.module_utils.repository.stored import file_entry
from ansible_collections.openvadp.backup.plugins.module_utils.repository.verify import (
    point_problems,
    stored_areas,
    verify_point,
)

from .conftest import KEY, World, flip

CAPACITY = (3 << 20) + 512  # no multiple of a cluster
RANDOM = random.Random(1)


def bytes_of(length: int) -> bytes:
    return RANDOM.randbytes(length)


@pytest.fixture
def chain(world: World) -> World:
    """Three points; the newest replaces half of a piece of each of the others."""
    world.point("p1", CAPACITY, [(0, bytes_of(1 << 20)), (2 << 20, bytes_of(512 << 10)), (3 << 20, bytes_of(512))])
    world.point("p2", CAPACITY, [(1 << 20, bytes_of(128 << 10))], parent="p1")
    world.point("p3", CAPACITY, [(64 << 10, bytes_of(64 << 10)), (1 << 20, bytes_of(64 << 10))], parent="p2")
    with world.store.lock(new_run_id(), "test"):
        world.store.write_facts({"name": "app01"})
    return world


def problems(store: VmStore, level: str, point: str = "p3") -> List[str]:
    (report,) = verify_point(store, store.resolve(point), level)
    assert report["ok"] == (not report["problems"])
    return list(report["problems"])


def test_a_sound_point(chain: World) -> None:
    manifest = chain.store.resolve("latest")
    seen: List[Any] = []
    (report,) = verify_point(chain.store, manifest, "data", lambda key, done, total: seen.append((key, done, total)))
    files = sum(
        entry["size_bytes"]
        for point in chain.store.points()
        for entry in (point["disks"][0]["layer"], point["disks"][0]["hashes"])
    )
    assert report["ok"] and report["problems"] == [] and report["layers"] == 3
    assert report["bytes_verified"] == files + (1 << 20) + (512 << 10) + 512 + (128 << 10) + 2 * (64 << 10)
    assert seen[-1][0] == KEY and all(done <= total for dummy, done, total in seen)
    assert point_problems(chain.store, manifest) == []


def test_a_flipped_bit_anywhere_is_found(chain: World) -> None:
    """In layers of the whole chain, in hashes, configuration, NVRAM and manifests."""
    store = chain.store
    files = [store.layer_path(KEY, point) for point in ("p1", "p2", "p3")]
    files += [store.hashes_path(KEY, point) for point in ("p1", "p3")]
    files += [store.config_path("p3"), store.nvram_path("p3"), store.manifest_path("p3"), store.manifest_path("p1")]
    for path in files:
        content = path.read_bytes()
        for offset in RANDOM.choices(range(len(content)), k=6):
            flip(path, offset, RANDOM.randrange(8))
            try:
                manifest = store.resolve("p3")
            except (DamagedError, RepositoryError):
                assert path == store.manifest_path("p3")
            else:
                assert problems(store, "structure") + point_problems(store, manifest), path
            path.write_bytes(content)
    assert problems(store, "structure") == []


def test_every_bit_of_a_manifest_counts(world: World) -> None:
    """Also those that change the spelling of a value only: the case of an exponent or of an escape."""
    world.point("p1", 1 << 20, [(0, b"x" * 512)])
    path = world.store.manifest_path("p1")
    document = json.loads(path.read_bytes())
    assert document == world.store.resolve("p1")
    path.write_text(json.dumps(document, sort_keys=True, indent=4))
    with pytest.raises(DamagedError, match="spelled"):
        world.store.resolve("p1")


def test_damage_of_one_kind_does_not_hide_another(chain: World) -> None:
    store = chain.store
    flip(store.layer_path(KEY, "p1"), store.layer_path(KEY, "p1").stat().st_size - 1)
    store.hashes_path(KEY, "p2").unlink()
    found = problems(store, "structure")
    assert any("p1.qcow2: its content changed" in text for text in found)
    assert any("p2.hashes: the file is missing" in text for text in found)
    assert verify_point(store, store.resolve("p1"))[0]["problems"]


def test_a_missing_parent(chain: World) -> None:
    chain.store.manifest_path("p1").unlink()
    assert any("point p1 is missing or damaged" in text for text in problems(chain.store, "structure"))
    chain.store.layer_path(KEY, "p1").unlink()
    assert any("A layer is missing" in text for text in problems(chain.store, "data"))


def rewrite(store: VmStore, point: str, change: Dict[str, Any]) -> None:
    """Make the manifests agree with files that were changed behind their back, as a faulty writer would have made
    them."""
    with store.lock(new_run_id(), "test"):
        for manifest in store.points():
            disk = manifest["disks"][0]
            if manifest["point"] == point:
                disk.update(change)
            elif disk["parent"] == point and "layer" in change:
                disk["parent_layer_blake3"] = change["layer"]["blake3"]
            store.manifest_path(manifest["point"]).unlink()
            store.commit_point(manifest)


def test_level_data_finds_what_was_written_wrongly(chain: World) -> None:
    """The files are as they were written; what was written is not what was read from the disk."""
    store = chain.store
    layer = store.layer_path(KEY, "p1")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 512", "-c", "write -q -P 7 2097152 65536", str(layer)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rewrite(store, "p1", {"layer": file_entry(layer)})
    assert problems(store, "structure") == []
    found = problems(store, "data")
    # Through p1's own image: in p3's, both pieces are covered in part by newer layers or not at all.
    assert [text.split(":")[0] for text in found] == ["point p1", "point p1"], found
    assert "1048576 bytes at 0 are not what was read" in found[0] and "at 2097152" in found[1]


@pytest.mark.parametrize(
    "point, offset, how, found",
    [
        ("p1", 2686976, "-P 7", True),
        ("p1", 2686976, "-P 0", False),
        ("p2", 2686976, "-P 7", True),
        ("p2", 2686976, "-P 0", False),
        # Zeros that hide the parent's data, as data and as a mark in the image's tables.
        ("p2", 2097152, "-P 0", True),
        ("p2", 2097152, "-z", True),
    ],
)
def test_what_no_hash_covers(chain: World, point: str, offset: int, how: str, found: bool) -> None:
    """A layer may store more than was read, but it must show what is below it: that is what a restore will get."""
    store = chain.store
    layer = store.layer_path(KEY, point)
    command = f"write -q {how} {offset} 65536"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(layer)], check=True, stdout=subprocess.DEVNULL)
    rewrite(store, point, {"layer": file_entry(layer)})
    expected = [f"point {point}: {point}.qcow2: 65536 bytes at {offset} are stored, but no hash covers them"]
    assert problems(store, "data") == (expected if found else [])


def test_hashes_of_another_disk_size(world: World) -> None:
    with world.store.lock(new_run_id(), "test"):
        disk = world.layer("p1", CAPACITY, [(0, bytes_of(512))])
        hashes = world.store.hashes_path(KEY, "p1")
        with HashWriter(str(hashes), CAPACITY + 512, content_id=disk["content_id"]) as writer:
            writer.add(0, bytes_of(512))
        world.commit("p1", dict(disk, hashes=file_entry(hashes)))
    found = problems(world.store, "data", "p1")
    assert any("of a disk of" in text for text in found) and any("are not what was read" in text for text in found)


def test_an_image_that_leads_out_of_its_folder_is_not_opened(chain: World, tmp_path: Path) -> None:
    store = chain.store
    secret = tmp_path / "secret.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(secret), str(CAPACITY)], check=True)
    layer = store.layer_path(KEY, "p3")
    command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(secret), str(layer)]
    subprocess.run(command, check=True)
    os.chmod(str(secret), 0)
    for level in ("structure", "data"):
        found = problems(store, level)
        assert any(f"its backing file is {str(secret)!r}, not 'p2.qcow2'" in text for text in found)
        assert any("not in its folder" in text for text in found)


def test_stored_areas_are_those_that_qemu_tells(chain: World) -> None:
    for point in ("p1", "p2", "p3"):
        path = str(chain.store.layer_path(KEY, point))
        command = ["qemu-img", "map", "--output=json", "-f", "qcow2", path]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        expected: List[List[int]] = []
        for area in told:
            # "present" with depth 0: in this image; a full's holes have depth 0 too, but are not present.
            if area["depth"] == 0 and area["present"]:
                if expected and sum(expected[-1]) == area["start"]:
                    expected[-1][1] += area["length"]
                else:
                    expected.append([area["start"], area["length"]])
        assert [list(area) for area in stored_areas(path)] == expected and expected
