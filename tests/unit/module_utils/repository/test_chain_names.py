# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which point a disk's next layer stands on, by what the virtual machine names (proofs 17 and 18)."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.repository.chain import (
    ChainError,
    Decision,
    DiskNow,
    Names,
    StoreFacts,
    decide,
)

from .conftest import DISK_UUID, KEY, PREFIX, SERVER, content_id, disk_entry, manifest_of, old

OTHER_SERVER = "5e0c0ffe-0000-4000-8000-000000000002"
NOW = DiskNow(KEY, DISK_UUID, 1 << 20, f"{PREFIX}/90")


def point(name: str, number: int, parent: Optional[str] = None, server: str = SERVER, **disk: Any) -> Dict[str, Any]:
    fields = {"change_id": f"{PREFIX}/{number}", "mode": "full" if parent is None else "incremental", **disk}
    return manifest_of(name, number, [disk_entry(name, parent=parent, **fields)], server_uuid=server)


def decided(
    points: List[Dict[str, Any]], named: Any = None, server: str = SERVER, mode: str = "auto", disk: DiskNow = NOW
) -> Decision:
    """:param named: the point that the VM names, or (state, content ID)."""
    state: Tuple[str, Optional[str]] = named if isinstance(named, tuple) else ("absent", None)
    if isinstance(named, str):
        state = ("named", content_id(named))
    return decide(disk, points, mode, names=Names(server, {KEY: state}))


P1, P2 = point("p1", 1), point("p2", 2, "p1")
#: The name could not be written.
SILENT = point("p2", 2, "p1", named_in_vm=False, vm_named=content_id("p1"))
#: Made on a replica, from the state that p1 left.
ELSEWHERE = point("test", 3, "p1", OTHER_SERVER)
#: Nothing had changed, so the VM goes on naming p1.
EMPTY = point("p2", 2, "p1", areas=0, bytes_read=0)
OLD = [old(point("o1", 1)), old(point("o2", 2, "o1"))]


@pytest.mark.parametrize(
    "points, named, server, parent",
    [
        ([P1, P2], "p2", SERVER, "p2"),
        # A replica, or the VM itself behind another vCenter.
        ([P1, P2], "p2", OTHER_SERVER, "p2"),
        # Newer points of another server are those of a replica or of a test.
        ([P1, P2, ELSEWHERE], "p2", SERVER, "p2"),
        ([P1, ELSEWHERE, point("p4", 4, "p1")], "test", OTHER_SERVER, "test"),
        ([P1, SILENT], "p1", SERVER, "p2"),
        ([P1, SILENT], None, SERVER, "p2"),
        # Named later, by a user with the privilege, on another server.
        ([SILENT, point("p3", 3, server=OTHER_SERVER)], "p3", SERVER, "p3"),
        # What it named when its name could not be written is not here any more: nothing happened since.
        ([point("p2", 2, named_in_vm=False, vm_named=content_id("p1"))], "p1", SERVER, "p2"),
        ([P1, EMPTY], "p1", SERVER, "p1"),
        ([P1, EMPTY, point("p3", 3, "p1", areas=0, bytes_read=0)], "p1", SERVER, "p1"),
        # Points of format 1: nobody becomes full every night.
        (OLD, None, SERVER, "o2"),
        ([*OLD, point("p3", 3, "o2", named_in_vm=False)], None, SERVER, "p3"),
        ([*OLD, point("p3", 3, "o2")], "p3", SERVER, "p3"),
        ([*OLD, point("p3", 3, "o2", OTHER_SERVER)], None, SERVER, "o2"),
    ],
)
def test_the_point_that_the_disk_had_last(points: List[Dict[str, Any]], named: Any, server: str, parent: str) -> None:
    found = decided(points, named, server)
    assert (found.mode, found.parent) == ("incremental", parent), found.reason


@pytest.mark.parametrize(
    "points, named, server, words",
    [
        ([P1, P2], "p1", SERVER, "shows point p1 though p2 is newer: it was reverted or rolled back"),
        ([P1, P2], None, SERVER, "names no point though p2 is the newest"),
        ([P1, P2], "p9", SERVER, "not here: the repository is a copy"),
        ([P1, P2], ("unknown", None), SERVER, "can't be read or understood"),
        (OLD, ("unknown", None), SERVER, "can't be read or understood"),
        ([P1, P2], ("twice", None), SERVER, "more than one disk with the UUID"),
        ([P1, P2], None, OTHER_SERVER, "point p2 is one of another server"),
        # Only what nobody could name may be built upon without a name, and only on its own server.
        ([P1, SILENT], None, OTHER_SERVER, "point p2 is one of another server"),
        ([P1, ELSEWHERE], "p1", OTHER_SERVER, "though test is newer"),
        # The same vCenter UUID on both sides of a replication: what is newer may be anybody's.
        ([P1, point("p2", 2, "p1"), point("p3", 3, "p1")], "p2", SERVER, "though p3 is newer"),
        # Folders put together by hand: of two points of one number none is known to be older.
        ([P1, P2, point("q2", 2)], "p2", SERVER, "though q2 is newer"),
        ([P1, EMPTY, point("p3", 3, "p2")], "p1", SERVER, "though p3 is newer"),
        # Moved to another unit, and named there.
        ([P1, manifest_of("moved", 2, [disk_entry("moved", key=2001)])], "p1", SERVER, "though moved is newer"),
        ([SILENT], "p7", SERVER, "not here"),
    ],
)
def test_what_is_not_proved_is_a_full(points: List[Dict[str, Any]], named: Any, server: str, words: str) -> None:
    found = decided(points, named, server)
    assert found[:3] == ("full", None, None) and words in found.reason, found.reason
    with pytest.raises(ChainError) as raised:
        decided(points, named, server, mode="incremental")
    assert raised.value.reason == found.reason


def test_a_name_replaces_no_other_check() -> None:
    """The name is right, and change tracking says no."""
    back = DiskNow(KEY, DISK_UUID, 1 << 20, f"{PREFIX}/1")
    assert "went back" in decided([P1, P2], "p2", disk=back).reason
    facts = StoreFacts({("p1", KEY): "the file is missing"})
    names = Names(SERVER, {KEY: ("named", content_id("p2"))})
    assert "the file is missing" in decide(NOW, [P1, P2], facts=facts, names=names).reason


def test_a_differential_stands_on_the_full_of_the_point_that_is_named() -> None:
    points = [P1, P2, point("other", 3, server=OTHER_SERVER), point("p4", 4, "p2")]
    assert decided(points, "p4", mode="differential").parent == "p1"
    assert decided(points, "other", OTHER_SERVER, "differential").parent == "other"
    with pytest.raises(ChainError, match="though p4 is newer"):
        decided(points, "p2", mode="differential")


def test_no_clock_has_a_say() -> None:
    """vCenter's clock was a year ahead for one backup."""
    ahead = {**P2, "snapshot": {**P2["snapshot"], "created": "2027-11-22T08:42:03Z"}}
    assert decided([P1, ahead], "p2").parent == "p2"
    oldest = [{**one, "snapshot": {**one["snapshot"], "created": "2027-11-22T08:42:03Z"}} for one in OLD]
    assert decided(oldest).parent == "o2"
