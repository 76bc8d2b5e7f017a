# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, InputError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import trust
from ansible_collections.openvadp.backup.plugins.module_utils.repository.chain import (
    ChainError,
    DiskNow,
    Names,
    StoreFacts,
    chain_of,
    decide,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id

from .conftest import DISK_UUID, KEY, PREFIX, SERVER, World, content_id, disk_entry, manifest_of, old

OTHER_PREFIX = "52 aa bb cc dd ee ff 00-61 d5 4c 1b e9 7b 65 63"
CAPACITY = 1 << 20


def now(**changes: Any) -> DiskNow:
    facts: Dict[str, Any] = {"key": KEY, "uuid": DISK_UUID, "capacity_bytes": CAPACITY, "change_id": f"{PREFIX}/9"}
    facts.update(changes)
    return DiskNow(**facts)


def point(name: str, number: int, mode: str = "full", parent: Optional[str] = None, **disk: Any) -> Dict[str, Any]:
    """As format 1 had it: what the virtual machine names says nothing of it (test_names.py has the others)."""
    fields = {"change_id": f"{PREFIX}/{number}", **disk}
    return old(manifest_of(name, number, [disk_entry(name, mode=mode, parent=parent, **fields)]))


#: Oldest first; the names do not sort so.
POINTS = [
    point("full", 1),
    point("inc2", 2, "incremental", "full"),
    point("diff", 3, "differential", "full"),
    point("another", 4, "incremental", "diff"),
]


@pytest.mark.parametrize(
    "requested, parent, since, mode",
    [
        ("auto", "another", 4, "incremental"),
        ("incremental", "another", 4, "incremental"),
        ("differential", "full", 1, "differential"),
    ],
)
def test_a_valid_parent(requested: str, parent: str, since: int, mode: str) -> None:
    decision = decide(now(), POINTS, requested)
    assert (decision.mode, decision.parent, decision.since_change_id) == (mode, parent, f"{PREFIX}/{since}")
    assert parent in decision.reason


def test_nothing_changed_since_is_an_incremental_of_nothing() -> None:
    decision = decide(now(change_id=f"{PREFIX}/4"), POINTS)
    assert (decision.mode, decision.since_change_id) == ("incremental", f"{PREFIX}/4")


@pytest.mark.parametrize(
    ("requested", "max_chain", "mode"),
    [
        ("auto", 4, "incremental"),
        ("auto", 3, "full"),
        ("auto", 1, "full"),
        # Who insists gets it: the chain of a differential has two layers anyhow.
        ("incremental", 3, "incremental"),
        ("differential", 1, "differential"),
    ],
)
def test_a_chain_that_is_long_enough_is_followed_by_a_full(requested: str, max_chain: int, mode: str) -> None:
    """The newest point stands on three layers: full, diff, another."""
    decision = decide(now(), POINTS, requested, max_chain=max_chain)
    assert decision.mode == mode
    if mode == "full":
        assert (decision.parent, decision.since_change_id) == (None, None)
        assert decision.reason == f"the chain of point another has 3 layers, and max_chain is {max_chain}"


def test_thirty_layers_without_being_told() -> None:
    points = [point("p1", 1)]
    while len(points) < 40:
        number = len(points) + 1
        decision = decide(now(change_id=f"{PREFIX}/{number}"), points)
        points.append(point(f"p{number}", number, decision.mode, decision.parent))
    fulls = [number for number, one in enumerate(points, 1) if one["disks"][0]["mode"] == "full"]
    assert fulls == [1, 31]


def test_a_full_is_a_full() -> None:
    assert decide(now(), POINTS, "full") == ("full", None, None, "a full was requested")
    with pytest.raises(InputError):
        decide(now(), POINTS, "sometimes")


def foreign(points: List[Dict[str, Any]], name: str) -> List[Dict[str, Any]]:
    snapshot = {"moid": "snapshot-99", "name": "before the update", "created": "2026-11-22T08:00:00Z"}
    return [
        {**manifest, "snapshot": {**manifest["snapshot"], "foreign": [snapshot]}}
        if manifest["point"] == name
        else manifest
        for manifest in points
    ]


MARK = {
    "key": KEY,
    "uuid": DISK_UUID,
    "since": "2026-11-22T10:00:00Z",
    "reason": "restored from point full",
    "change_id_prefixes": [PREFIX],
}

OBSTACLES = {
    "first point": (now(), [], {}, "first restore point"),
    "new disk": (now(key=2005), POINTS, {}, "the disk is new"),
    "replaced": (now(uuid="6000C29b"), POINTS, {}, "replaced.*another"),
    "no uuid": (now(uuid=None), [point("full", 1, uuid=None)], {}, "no UUID"),
    "grown": (now(capacity_bytes=2 * CAPACITY), POINTS, {}, "capacity changed from 1048576 to 2097152"),
    "no id now": (now(change_id=None), POINTS, {}, "no change ID of it: change tracking is off"),
    "no id then": (now(), [*POINTS, point("last", 5, "full", change_id=None)], {}, "point last has no change ID"),
    "reset": (now(change_id=f"{OTHER_PREFIX}/9"), POINTS, {}, "reset since point another"),
    "back": (now(change_id=f"{PREFIX}/3"), POINTS, {}, "went back, from 4 at point another to 3"),
    "by number": (now(change_id=f"{PREFIX}/10"), [point("full", 1, change_id=f"{PREFIX}/11")], {}, "went back"),
    "no slash": (now(change_id="*"), POINTS, {}, "unknown form"),
    "no number": (now(change_id=f"{PREFIX}/x"), POINTS, {}, "unknown form"),
    "foreign": (now(), foreign(POINTS, "another"), {}, "other snapshots at point another .'before the update'"),
    "layer": (
        now(),
        POINTS,
        {"facts": StoreFacts({("another", KEY): "the file is missing"})},
        "point another can't be built upon: the file is missing",
    ),
    "layer below": (
        now(),
        POINTS,
        {"facts": StoreFacts({("full", KEY): "the file has 1 bytes"})},
        "layer of point full",
    ),
    "chain": (now(), POINTS[1:], {}, "point full is missing"),
    "mark": (now(), POINTS, {"facts": StoreFacts(marks=[MARK])}, "not to be trusted.*restored from point full"),
}


@pytest.mark.parametrize("case", OBSTACLES, ids=str)
def test_what_makes_a_full_and_fails_an_incremental(case: str) -> None:
    disk, points, more, words = OBSTACLES[case]
    decision = decide(disk, points, "auto", **more)
    assert decision[:3] == ("full", None, None)
    with pytest.raises(ChainError, match=words) as raised:
        decide(disk, points, "incremental", **more)
    assert raised.value.reason == decision.reason and raised.value.remedy


@pytest.mark.parametrize(
    "disk, points, more",
    [
        # Proved by the VM's events.
        (now(), foreign(POINTS, "another"), {"revert_excluded": True}),
        # Present at an older point only: what was reverted since then would have been seen at the next.
        (now(), foreign(POINTS, "full"), {}),
        # Another disk's layer, another disk's mark, a mark of the disk that had this key before.
        (now(), POINTS, {"facts": StoreFacts({("another", 2001): "x"}, [dict(MARK, key=2001)])}),
        (now(), POINTS, {"facts": StoreFacts(marks=[dict(MARK, uuid="6000C29b")])}),
        # 9 < 10, though "9" > "10".
        (now(change_id=f"{PREFIX}/10"), POINTS, {}),
    ],
)
def test_what_is_no_obstacle(disk: DiskNow, points: List[Dict[str, Any]], more: Dict[str, Any]) -> None:
    assert decide(disk, points, "auto", **more).parent == "another"


def test_a_differential_stands_on_its_own_full() -> None:
    """Foreign snapshots and a missing layer count where they are built upon."""
    broken = StoreFacts({("another", KEY): "the file is missing"})
    assert decide(now(), foreign(POINTS, "another"), "differential", broken).parent == "full"
    with pytest.raises(ChainError, match="other snapshots at point full"):
        decide(now(), foreign(POINTS, "full"), "differential")
    with pytest.raises(ChainError, match="no restore point holds the disk in full"):
        decide(now(), [point("inc2", 2, "incremental", "gone")], "differential")


def test_a_point_without_the_disk_is_passed_over() -> None:
    points = [*POINTS, old(manifest_of("later", 5, [disk_entry("later", key=2001)]))]
    assert decide(now(), points).parent == "another"


def test_a_disk_that_came_back_builds_on_its_own_point() -> None:
    points = [*POINTS, point("swapped", 5, uuid="6000C29b")]
    assert decide(now(), points).parent == "another"


def test_a_mark_holds_until_a_full_after_a_reset() -> None:
    facts = StoreFacts(marks=[MARK])
    same_tracking = [*POINTS, point("full2", 5)]
    assert decide(now(), same_tracking, facts=facts).mode == "full"
    after_reset = [*POINTS, point("full3", 6, change_id=f"{OTHER_PREFIX}/1")]
    assert decide(now(change_id=f"{OTHER_PREFIX}/2"), after_reset, facts=facts).parent == "full3"
    # Only a full settles it.
    incremental = [*POINTS, point("inc3", 6, "incremental", "another", change_id=f"{OTHER_PREFIX}/1")]
    assert decide(now(change_id=f"{OTHER_PREFIX}/2"), incremental, facts=facts).mode == "full"


def test_chain_of() -> None:
    assert chain_of(POINTS, "another", KEY) == ["full", "diff", "another"]
    assert chain_of(list(reversed(POINTS)), "full", KEY) == ["full"]
    circle = [point("a", 1, "incremental", "b"), point("b", 2, "incremental", "a")]
    for points, name, words in (
        (POINTS[1:], "another", "point full is missing"),
        (POINTS, "nothing", "point nothing is missing"),
        (circle, "a", "in a circle at point a"),
    ):
        with pytest.raises(DamagedError, match=words):
            chain_of(points, name, KEY)
    with pytest.raises(DamagedError, match="does not hold disk 2001"):
        chain_of(POINTS, "full", 2001)


def test_marks_are_kept_and_go_with_the_commit_of_a_full(world: World) -> None:
    store = world.store
    world.point("p1", CAPACITY, [(0, b"a" * 512)])
    names = Names(SERVER, {KEY: ("named", content_id("p1"))})
    sound = decide(now(), store.points(), facts=store.chain_facts(), names=names)
    assert trust.marks(store) == [] and sound.parent == "p1"
    with pytest.raises(RuntimeError):
        trust.mark(store, KEY, "restored from point p1")
    with store.lock(new_run_id(), "test"):
        trust.mark(store, KEY, "restored from point p1", uuid=DISK_UUID, change_id=f"{OTHER_PREFIX}/3")
        trust.mark(store, 2001, "restored from point p1")
        decision = decide(now(), store.points(), facts=store.chain_facts(), names=names)
        assert decision.mode == "full" and "not to be trusted" in decision.reason
        # Neither the tracking of p1 nor that of the time of the restore may settle it.
        for name, prefix in (("p2", PREFIX), ("p3", OTHER_PREFIX)):
            world.commit(name, dict(world.layer(name, CAPACITY, []), change_id=f"{prefix}/7"))
            assert [mark["key"] for mark in trust.marks(store)] == [KEY, 2001]
        world.commit("p4", dict(world.layer("p4", CAPACITY, []), change_id="52 00-11/1"))
    assert [mark["key"] for mark in trust.marks(store)] == [2001]
    store.trust_path.write_text("{}")
    with pytest.raises(DamagedError, match="vm_change_tracking"):
        store.chain_facts()


@pytest.mark.parametrize(
    ("disk", "points", "waits"),
    [
        ({}, [], True),
        ({}, [point("after", 9)], True),  # a full one, by the tracking that is not to be trusted
        ({}, [point("after", 1, change_id=f"{OTHER_PREFIX}/1")], False),  # settled
        ({"change_id": f"{OTHER_PREFIX}/1"}, [], False),  # reset already: the next full settles it
        ({"change_id": None}, [], False),  # off: turned on, it begins with new change IDs
        ({"uuid": "another disk"}, [], False),
        ({"key": 2001}, [], False),
    ],
)
def test_which_disks_wait_for_a_reset(disk: Dict[str, Any], points: List[Dict[str, Any]], waits: bool) -> None:
    mark = {"key": KEY, "uuid": DISK_UUID, "since": "2026-11-22T09:00:00Z", "reason": "why"}
    mark["change_id_prefixes"] = [PREFIX]
    facts: Dict[str, Any] = {"key": KEY, "uuid": DISK_UUID, "change_id": f"{PREFIX}/9", "label": "Hard disk 1", **disk}
    found: Any = trust.waiting_for_reset([mark], points, [SimpleNamespace(**facts)])
    expected = {"key": KEY, "label": "Hard disk 1", "since": mark["since"], "reason": "why"}
    assert found == [expected] * waits
