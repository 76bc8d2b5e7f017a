# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The order of points is the repository's own, whatever any clock says (proofs 22)."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import manifest as manifests
from ansible_collections.openvadp.backup.plugins.module_utils.repository import sequence
from ansible_collections.openvadp.backup.plugins.module_utils.repository.report import describe_points
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.shapes import LARGEST_SEQUENCE, to_json

from .conftest import SERVER, UUID, World, disk_entry, manifest_of, old

OTHER_SERVER = "5e0c0ffe-0000-4000-8000-000000000002"


def put(world: World, name: str, number: int, created: str = "", **fields: Any) -> Dict[str, Any]:
    """A manifest as it lies in the repository; its layers don't matter here."""
    whole = manifest_of(name, number, [disk_entry(name)], repository_id=world.repository.id)
    as_old = fields.pop("as_old", False)
    whole.update(fields)
    if created:
        whole["snapshot"]["created"] = created
    sealed = manifests.seal(old(whole) if as_old else whole)
    world.store.make_folder()
    world.store.manifest_path(name).write_bytes(to_json(sealed))
    return sealed


def names(world: World) -> List[str]:
    return [manifest["point"] for manifest in world.store.points()]


def drawn(world: World) -> int:
    with world.store.lock(new_run_id(), "test"):
        return world.store.next_sequence("app01")


def test_points_are_ordered_by_their_numbers(world: World) -> None:
    put(world, "ahead", 1, "2027-11-22T08:42:03Z")
    put(world, "right", 2)
    assert names(world) == ["ahead", "right"] and world.store.resolve("latest")["point"] == "right"
    # A time is the user's word, and goes by what the server's clock said then.
    assert world.store.resolve("2028-01-01T00:00Z")["point"] == "ahead"
    assert world.store.resolve("2027-01-01T00:00Z")["point"] == "right"


def test_a_number_that_no_repository_gives_is_not_counted_on(world: World) -> None:
    """Somebody has written the largest there is: what comes after it could not be read any more."""
    put(world, "p1", 1, sequence=LARGEST_SEQUENCE)
    with pytest.raises(RepositoryError, match="No further point can be counted"):
        drawn(world)
    assert names(world) == ["p1"] and not (world.store.path / "vm.json").exists()
    put(world, "p1", 1)
    assert drawn(world) == 2
    # More than that is damage: what was counted shows elsewhere.
    facts = json.loads((world.store.path / "vm.json").read_text())
    (world.store.path / "vm.json").write_text(json.dumps({**facts, "sequence": LARGEST_SEQUENCE + 1}))
    put(world, "p2", 2)
    assert drawn(world) == 3
    assert json.loads((world.store.path / "vm.json").read_text())["sequence"] == 3


def test_a_number_is_never_given_twice(world: World) -> None:
    assert [drawn(world), drawn(world)] == [1, 2]
    put(world, "p7", 7)
    assert drawn(world) == 8
    world.store.manifest_path("p7").unlink()
    assert drawn(world) == 9
    # What a run that is not over has drawn counts, too; and who draws has it on the disk before anything else happens.
    with world.store.lock(new_run_id(), "test"):
        run = world.store.create_run("p10", vm_name="app01")
        assert run.data["sequence"] == 10 and world.store.facts["sequence"] == 10
        (world.store.path / "vm.json").unlink()
        assert world.store.create_run("p11", vm_name="app01").data["sequence"] == 11
        assert world.store.create_run(None).data["sequence"] is None
        (world.store.path / "vm.json").write_text("{")
        assert world.store.next_sequence("app01") == 12
        world.store.write_facts({"name": "app01", "path": "/DC0/vm/app01"})
    facts = json.loads((world.store.path / "vm.json").read_bytes())
    assert (facts["format"], facts["sequence"], facts["path"]) == (2, 12, "/DC0/vm/app01")
    with pytest.raises(RuntimeError):
        world.store.next_sequence()


def test_points_of_format_1_are_numbered_once_and_lie_below(world: World) -> None:
    put(world, "zulu", 0, "2026-01-01T00:00:00Z", as_old=True)
    put(world, "alpha", 0, "2026-01-02T00:00:00Z", as_old=True)
    assert names(world) == ["zulu", "alpha"] and drawn(world) == 3
    assert world.store.facts["format1_sequences"] == {"zulu": 1, "alpha": 2}
    put(world, "new", 3, "2020-01-01T00:00:00Z")
    assert names(world) == ["zulu", "alpha", "new"]
    # One that was brought back later, and a clock that says otherwise: what was numbered stays as it is.
    put(world, "late", 0, "2019-01-01T00:00:00Z", as_old=True)
    assert names(world) == ["zulu", "alpha", "late", "new"] and drawn(world) == 4
    described = describe_points(world.repository)
    assert [(one["point"], one["sequence"]) for one in described] == [
        ("zulu", 1), ("alpha", 2), ("late", 3), ("new", 3)
    ]  # fmt: skip
    assert world.store.resolve("latest")["point"] == "new"


@pytest.mark.parametrize("server", [None, SERVER])
def test_two_points_of_one_number_have_no_latest(world: World, server: Optional[str]) -> None:
    put(world, "one", 1)
    put(world, "two", 1)
    put(world, "three", 2)
    for point in ("latest", "2030-01-01T00:00Z"):
        with pytest.raises(RepositoryError, match="points one and two have the same number, 1.*Name the point"):
            world.store.resolve(point, server)
    assert world.store.resolve("three", server)["point"] == "three"
    with pytest.raises(RepositoryError, match="one and two"):
        describe_points(world.repository, point="latest")
    assert len(describe_points(world.repository)) == 3


def test_the_latest_is_that_of_the_server_that_is_connected(world: World) -> None:
    put(world, "first", 0, as_old=True)
    assert world.store.resolve("latest", OTHER_SERVER)["point"] == "first"
    put(world, "here", 1)
    assert world.store.resolve("latest")["point"] == "here"
    # One server alone has points: whoever asks, which is meant is clear.
    assert world.store.resolve("latest", OTHER_SERVER)["point"] == "here"
    put(world, "there", 2, server_uuid=OTHER_SERVER)
    assert world.store.resolve("latest", SERVER)["point"] == "here"
    assert world.store.resolve("latest", OTHER_SERVER)["point"] == "there"
    for server in (None, "another"):
        with pytest.raises(RepositoryError, match=f"here of server {SERVER}, there of server {OTHER_SERVER}.*Name"):
            world.store.resolve("latest", server)
    described = describe_points(world.repository, vm_uuid=UUID, point="latest")
    assert [(one["point"], one["server_uuid"]) for one in described] == [("here", SERVER), ("there", OTHER_SERVER)]


def test_of_one_second_the_larger_number_is_the_newer(world: World) -> None:
    moment = sequence.parse_time("2030-01-01T00:00:00Z")
    points = [put(world, "b", 1, "2026-01-01T00:00:00Z"), put(world, "a", 2, "2026-01-01T00:00:00Z")]
    found = sequence.newest_before(points, moment)
    assert found is not None and found["point"] == "a" and sequence.newest_before([], None) is None
