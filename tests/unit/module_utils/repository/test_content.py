# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A layer knows what it was made upon, whatever the point below it is called (proofs 15)."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import read_content_id, read_hashes
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import manifest as manifests
from ansible_collections.openvadp.backup.plugins.module_utils.repository.content import new_content_id, pin_problem
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.shapes import to_json
from ansible_collections.openvadp.backup.plugins.module_utils.repository.stored import file_entry
from ansible_collections.openvadp.backup.plugins.module_utils.repository.verify import missing_problems, verify_point

from .conftest import KEY, PREFIX, World, content_id, disk_entry, old

CAPACITY = 1 << 20
PARENT = disk_entry("p1", change_id=f"{PREFIX}/1")
CHILD = disk_entry("p2", mode="incremental", parent="p1", change_id=f"{PREFIX}/2")
OTHER = {"file": "p1.qcow2", "size_bytes": 1, "blake3": "1" * 64}
MERGED = {"content_id": content_id("p1"), "layer_blake3s": ["2" * 64, "0" * 64]}


@pytest.mark.parametrize(
    "child, parent, words",
    [
        (CHILD, PARENT, None),
        (CHILD, dict(PARENT, content_id="0" * 32), "is not the one that it was made upon"),
        (CHILD, dict(PARENT, layer=OTHER), "the layer of point p1 is another one"),
        # A layer that took the place of others, and says so.
        (CHILD, dict(PARENT, layer=OTHER, merged=MERGED), None),
        (CHILD, dict(PARENT, layer=OTHER, merged=dict(MERGED, layer_blake3s=[])), "is another one"),
        (CHILD, dict(PARENT, layer=OTHER, merged=MERGED, content_id="0" * 32), "is not the one"),
        (dict(CHILD, content_id=content_id("p1")), PARENT, "have one content ID"),
        # A point of format 1, and another one in its place.
        (dict(CHILD, parent_content_id=None), old(PARENT), None),
        (dict(CHILD, parent_content_id=None), PARENT, "is not the one that it was made upon"),
        (CHILD, old(PARENT), "is not the one that it was made upon"),
        (old(CHILD), old(PARENT), None),
        # Change IDs go up: what has a later one was made later, and nothing can stand on it.
        (old(CHILD), old(dict(PARENT, change_id=f"{PREFIX}/3")), "was made after it"),
        (old(CHILD), old(dict(PARENT, change_id="52 00-11/1")), "was made after it"),
        (old(CHILD), old(dict(PARENT, change_id=None)), "was made after it"),
        (old(CHILD), old(dict(PARENT, uuid="another")), "holds another disk"),
    ],
)
def test_what_a_layer_stands_on(child: Dict[str, Any], parent: Dict[str, Any], words: Optional[str]) -> None:
    problem = pin_problem(child, parent)
    assert (problem is None) == (words is None) and (words is None or words in str(problem)), problem


def test_a_content_id_is_drawn_and_stands_in_the_first_line(world: World) -> None:
    assert len({new_content_id() for _number in range(100)}) == 100
    world.point("p1", CAPACITY, [(0, b"a" * 512)])
    path = str(world.store.hashes_path(KEY, "p1"))
    assert read_content_id(path) == content_id("p1") and len(list(read_hashes(path)[1])) == 1
    (world.store.hashes_path(KEY, "p1")).write_text('{"format": 1')
    with pytest.raises(DamagedError):
        read_content_id(path)


def two_points(world: World) -> None:
    world.point("sun", CAPACITY, [(0, b"a" * 65536)])
    world.point("mon", CAPACITY, [(65536, b"b" * 65536)], parent="sun")
    world.point("tue", CAPACITY, [(131072, b"c" * 512)], parent="mon")


def make_again(world: World, name: str, parent: str) -> None:
    """By hand: a point is deleted, and another is made under its name."""
    for path in (
        world.store.manifest_path(name),
        world.store.layer_path(KEY, name),
        world.store.hashes_path(KEY, name),
        world.store.config_path(name),
    ):
        path.unlink()
    with world.store.lock(new_run_id(), "test"):
        made = world.layer(name, CAPACITY, [(65536, b"x" * 65536)], parent=parent)
        # The hashes of the tests' layers are named after their points.
        hashes = world.store.hashes_path(KEY, name)
        hashes.write_text(hashes.read_text().replace(content_id(name), content_id(name + " again")))
        world.commit(name, dict(made, content_id=content_id(name + " again"), hashes=file_entry(hashes)))


def problems(world: World, point: str) -> List[str]:
    found: List[str] = verify_point(world.store, world.store.resolve(point))[0]["problems"]
    return found


def test_a_point_that_was_made_again_under_its_name_is_no_parent(world: World) -> None:
    two_points(world)
    assert problems(world, "tue") == [] and world.store.chain_facts().problems == {}
    make_again(world, "mon", "sun")
    expected = "point mon is not the one that it was made upon"
    assert any(expected in text for text in problems(world, "tue"))
    assert any(expected in text for text in missing_problems(world.store, world.store.resolve("tue")))
    assert expected in world.store.chain_facts().problems[("tue", KEY)]
    assert problems(world, "mon") == []


def test_hashes_of_another_layer_are_told(world: World) -> None:
    two_points(world)
    hashes = world.store.hashes_path(KEY, "mon")
    hashes.write_text(hashes.read_text().replace(content_id("mon"), content_id("zzz")))
    found = problems(world, "tue")
    assert any(f"mon.hashes has the content ID {content_id('zzz')}" in text for text in found), found
    assert "has the content ID" in world.store.chain_facts().problems[("mon", KEY)]


def as_format_1(world: World, *names: str) -> None:
    for name in names:
        path = world.store.manifest_path(name)
        path.write_bytes(to_json(manifests.seal(old(json.loads(path.read_bytes())))))


def test_what_points_of_format_1_stand_on_is_written_down_once(world: World) -> None:
    two_points(world)
    as_format_1(world, "sun", "mon", "tue")
    assert problems(world, "tue") == []
    with world.store.lock(new_run_id(), "test"):
        world.store.next_sequence("app01")
    pins = world.store.pins_path("tue")
    written = pins.read_bytes()
    assert json.loads(written)["disks"][str(KEY)]["parent"] == "mon" and not world.store.pins_path("sun").exists()
    assert world.store.point_names() == ["mon", "sun", "tue"] and world.store.part_files() == []
    # Change IDs show nothing here: the layer alone was replaced, and its manifest agrees.
    layer, path = world.store.layer_path(KEY, "mon"), world.store.manifest_path("mon")
    document = json.loads(path.read_bytes())
    document["disks"][0]["layer"]["blake3"] = "1" * 64
    path.write_bytes(to_json(manifests.seal(document)))
    expected = "the layer of point mon is another one than it was made upon"
    assert any(expected in text for text in problems(world, "tue")) and layer.exists()
    with world.store.lock(new_run_id(), "test"):
        world.store.next_sequence("app01")
    assert pins.read_bytes() == written, "what was written down is not written again"
    # Pins that are damaged, or another point's, prove nothing.
    for broken, words in ((b"{", "damaged"), (written.replace(b'"tue"', b'"wed"'), "those of another one")):
        pins.write_bytes(broken)
        assert any(words in text for text in problems(world, "tue"))
        assert words in world.store.chain_facts().problems[("tue", KEY)]


def test_a_parent_that_is_wrong_already_is_not_pinned(world: World) -> None:
    two_points(world)
    as_format_1(world, "sun", "mon", "tue")
    path = world.store.manifest_path("mon")
    document = json.loads(path.read_bytes())
    document["disks"][0]["change_id"] = f"{PREFIX}/9"
    path.write_bytes(to_json(manifests.seal(document)))
    with world.store.lock(new_run_id(), "test"):
        world.store.next_sequence("app01")
    assert not world.store.pins_path("tue").exists()
    assert any("point mon was made after it" in text for text in problems(world, "tue"))
