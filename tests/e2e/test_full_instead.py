# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where an incremental can't be proved right: mode auto makes a full of that disk and says why, the others fail.

Each test compares the bytes of every point it makes: a rule that is missing shows as a point that holds the wrong ones.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Sequence

import pytest
from administrator import Administrator
from harness import MIB
from modules import Modules, modes

SECTOR = 512
CLUSTER = 65536
BOTH = (2000, 2001)


def _write(modules: Modules, keys: Sequence[int], *offsets: int, seed: int, length: int = CLUSTER) -> None:
    for key in keys:
        modules.simulator.write(modules.vm, key, *offsets, seed=seed, length=length)


def _reasons(disks: Dict[int, Dict[str, Any]], *words: str) -> None:
    """All of these disks were read in full, and the manifest says why."""
    for disk in disks.values():
        assert disk["mode"] == "full" and disk["parent"] is None, disk
        assert all(word in disk["reason"] for word in words), disk["reason"]


def test_disks_grown_added_removed_replaced_and_reset(modules: Modules, administrator: Administrator) -> None:
    """Each such disk becomes full, the others stay incremental; one that comes back goes on where it was left."""
    call = modules.simulator.control.call
    size = 2 * MIB + SECTOR
    for unit in (2, 3, 4, 5):
        assert administrator.add_disk(unit, size) == 2000 + unit
    modules.track_changes()
    keys = [2000, 2001, 2002, 2003, 2004, 2005]
    _write(modules, keys, 0, MIB, seed=1)
    assert modes(modules.point("one")) == dict.fromkeys(keys, ("full", None))

    _write(modules, keys, 2 * CLUSTER, MIB, seed=2)
    call("reset_cbt", vm="app01", disk=2002)
    call("grow_disk", vm="app01", disk=2003, capacity_bytes=size + 3 * CLUSTER)
    first = administrator.detach_disk(2004)
    assert administrator.add_disk(4, size) == 2004
    away = administrator.detach_disk(2005)
    assert administrator.add_disk(6, size) == 2006
    modules.track_changes()
    keys = [2000, 2001, 2002, 2003, 2004, 2006]
    _write(modules, keys, 0, size - SECTOR, seed=3, length=SECTOR)
    _write(modules, [2003], size + CLUSTER, seed=4)
    snapshot = modules.snapshot("two")
    why = {
        2002: "change tracking was reset since point one",
        2003: f"its capacity changed from {size} to {size + 3 * CLUSTER} bytes",
        2004: "the disk was replaced",
        2006: "the disk is new",
    }
    for key, words in why.items():
        modules.refused(snapshot, words, "mode auto", disks=[str(key)])
    modules.refused(snapshot, why[2002], "mode auto")
    modules.refused(snapshot, why[2002], mode="differential")
    disks = modules.make(snapshot, "two")
    modules.remove_snapshot(snapshot)
    assert sorted(disks) == keys
    assert modes(disks, BOTH) == dict.fromkeys(BOTH, ("incremental", "one"))
    for key, words in why.items():
        _reasons({key: disks[key]}, words)

    # The first of the two disks of one key comes back, and the one that was away: each stands on its own past.
    second = administrator.detach_disk(2004)
    assert administrator.attach_disk(4, first) == 2004
    assert administrator.attach_disk(5, away) == 2005
    _write(modules, [2000, 2004, 2005], 3 * CLUSTER, seed=5)
    expected = dict.fromkeys([2000, 2001, 2002, 2003, 2006], ("incremental", "two"))
    expected.update({2004: ("incremental", "one"), 2005: ("incremental", "one")})
    assert modes(modules.point("three")) == expected
    administrator.detach_disk(2004)
    assert administrator.attach_disk(4, second) == 2004
    _write(modules, [2004], 5 * CLUSTER, seed=6)
    assert modes(modules.point("four", disks=["2004", "2005"])) == {
        2004: ("incremental", "two"),
        2005: ("incremental", "three"),
    }
    modules.verify_bytes()
    modules.verify("two", "three", "four")
    modules.clean()


def test_change_ids_missing_and_queries_failing(modules: Modules) -> None:
    call = modules.simulator.control.call
    _reasons(modules.point("one"), "first restore point")
    _write(modules, BOTH, 0, seed=1)
    snapshot = modules.snapshot("two")
    modules.refused(snapshot, "no change ID", "tracking is off")
    modules.refused(snapshot, "no change ID", mode="differential")
    _reasons(modules.make(snapshot, "two"), "no change ID", "tracking is off")
    modules.remove_snapshot(snapshot)

    modules.track_changes()
    _write(modules, BOTH, CLUSTER, seed=2)
    snapshot = modules.snapshot("three")
    modules.refused(snapshot, "point two has no change ID")
    _reasons(modules.make(snapshot, "three"), "point two has no change ID")
    modules.remove_snapshot(snapshot)

    # The query fails for one disk: never "nothing changed" (VADP facts 9).
    _write(modules, BOTH, 2 * CLUSTER, seed=3)
    fault = {"target": "call", "name": "QueryChangedDiskAreas", "fault": "FileFault"}
    snapshot = modules.snapshot("four")
    call("inject", **fault, count=0)
    modules.refused(snapshot, "changed areas are not known", "full backup")
    modules.refused(snapshot, "changed areas are not known", "full backup", mode="differential")
    call("clear_injections")
    call("inject", **fault, count=1)
    disks = modules.make(snapshot, "four")
    modules.remove_snapshot(snapshot)
    _reasons({2000: disks[2000]}, "the changed areas are not known", "FileFault")
    assert modes(disks, [2001]) == {2001: ("incremental", "three")}
    _write(modules, BOTH, 3 * CLUSTER, seed=4)
    assert modes(modules.point("five")) == dict.fromkeys(BOTH, ("incremental", "four"))

    modules.track_changes("disabled")
    _write(modules, BOTH, 4 * CLUSTER, seed=5)
    _reasons(modules.point("six"), "no change ID")
    modules.verify_bytes()
    modules.verify("five")
    modules.clean()


def test_snapshots_of_others_and_going_back_to_them(modules: Modules, administrator: Administrator) -> None:
    """VADP facts 11 and 14. After a revert the tracking is wrong without an error: only what we know helps."""
    modules.track_changes()
    _write(modules, BOTH, 0, MIB, seed=1)
    modules.point("one")

    # Tracking was on before the snapshot was made, as point one proves: this incremental is right.
    theirs = modules.snapshot("theirs")
    _write(modules, BOTH, 0, 2 * MIB, seed=2)
    disks = modules.point("two")
    assert modes(disks) == dict.fromkeys(BOTH, ("incremental", "one"))
    assert all("-00000" in disk["file"] for disk in disks.values())
    manifest = modules.backups.manifest("app01", "two")
    assert [one["moid"] for one in manifest["snapshot"]["foreign"]] == [theirs]

    _write(modules, BOTH, 3 * MIB, seed=3)
    snapshot = modules.snapshot("three")
    modules.refused(snapshot, "other snapshots", "'theirs'", "mode auto")
    _reasons(modules.make(snapshot, "three"), "other snapshots at point two", "'theirs'", "reverted")
    modules.remove_snapshot(snapshot)

    # Back to before points two and three: the VM names point one again.
    administrator.revert(theirs)
    _write(modules, BOTH, 4 * MIB, seed=4)
    snapshot = modules.snapshot("four")
    modules.refused(snapshot, "shows point one though three is newer", disks=["2000"])
    _reasons(modules.make(snapshot, "four"), "shows point one though three is newer", "reverted")
    modules.remove_snapshot(snapshot)

    # Back again, and enough snapshots to bring the change ID past that of point four.
    _write(modules, BOTH, 0, 5 * MIB, seed=5)
    modules.point("five")
    administrator.revert(theirs)
    _pass_by(modules, 3)
    _write(modules, BOTH, 6 * MIB, seed=6)
    snapshot = modules.snapshot("six")
    modules.refused(snapshot, "shows point one though five is newer")
    _reasons(modules.make(snapshot, "six"), "shows point one though five is newer")
    modules.remove_snapshot(snapshot)

    modules.remove_snapshot(theirs)
    _write(modules, BOTH, 7 * MIB, seed=7)
    _reasons(modules.point("seven"), "other snapshots at point six")

    # Going back to a snapshot that is younger than the parent does no harm.
    younger = modules.snapshot("younger")
    _write(modules, BOTH, 0, 8 * MIB, seed=8)
    administrator.revert(younger)
    modules.remove_snapshot(younger)
    _write(modules, BOTH, 9 * MIB, seed=9)
    assert modes(modules.point("eight")) == dict.fromkeys(BOTH, ("incremental", "seven"))
    modules.verify_bytes()
    modules.verify("two", "eight")
    modules.clean()


@pytest.mark.soak
def test_going_back_to_a_snapshot_that_a_run_of_ours_left(modules: Modules, administrator: Administrator) -> None:
    """To change tracking it is as good or bad as any other."""
    modules.track_changes()
    _write(modules, BOTH, 0, seed=1)
    modules.point("one")
    repository_id = json.loads((modules.repository / "repository.json").read_text(encoding="utf-8"))["id"]
    marker = {"by": "openvadp.backup", "repository_id": repository_id, "run_id": "gone", "point": "gone"}
    left = modules.snapshot("left", json.dumps(marker))
    _write(modules, BOTH, 0, MIB, seed=2)
    assert modes(modules.point("two")) == dict.fromkeys(BOTH, ("incremental", "one"))
    administrator.revert(left)
    _pass_by(modules, 2)
    _write(modules, BOTH, 2 * MIB, seed=3)
    snapshot = modules.snapshot("three")
    modules.refused(snapshot, "shows point one though two is newer", "reverted")
    _reasons(modules.make(snapshot, "three"), "shows point one though two is newer", "reverted")
    modules.remove_snapshot(snapshot)
    modules.remove_snapshot(left)
    modules.verify_bytes()
    modules.clean()


@pytest.mark.soak
def test_tracking_found_on_over_a_snapshot(modules: Modules, administrator: Administrator) -> None:
    """Such tracking loses changes without an error, also long after the snapshot is gone (VADP facts 7)."""
    theirs = modules.snapshot("theirs")
    administrator.track_changes(True)
    _pass_by(modules, 1)
    disks = modules.point("one")
    assert all(disk["change_id"] for disk in disks.values()), "it looks well"
    modules.remove_snapshot(theirs)
    for number, point in enumerate(("two", "three")):
        _write(modules, BOTH, number * MIB, seed=number, length=8 * CLUSTER)
        snapshot = modules.snapshot(point)
        modules.refused(snapshot, "not to be trusted", "'theirs'", "until it is reset")
        modules.refused(snapshot, "not to be trusted", mode="differential", disks=["2001"])
        _reasons(modules.make(snapshot, point), "not to be trusted", "'theirs'", "until it is reset")
        modules.remove_snapshot(snapshot)

    modules.track_changes("reset")
    _write(modules, BOTH, 3 * MIB, seed=4, length=8 * CLUSTER)
    _reasons(modules.point("four"), "not to be trusted")
    _write(modules, BOTH, 4 * MIB, seed=5, length=8 * CLUSTER)
    assert modes(modules.point("five")) == dict.fromkeys(BOTH, ("incremental", "four"))
    modules.verify_bytes()
    modules.verify("five")
    modules.clean()


def test_disks_that_a_restore_has_written(modules: Modules) -> None:
    """VADP facts 12: their tracking loses changes without an error, until it is reset and a full is made."""
    call = modules.simulator.control.call
    modules.track_changes()
    _write(modules, BOTH, 0, seed=1)
    modules.point("one")
    _write(modules, BOTH, MIB, seed=2)
    modules.point("two")
    call("power", vm="app01", state="poweredOff")
    _restore(modules, point="one", disks=[{"key": 2000}])
    call("power", vm="app01", state="poweredOn")
    _write(modules, BOTH, 0, seed=3, length=8 * CLUSTER)
    snapshot = modules.snapshot("three")
    modules.refused(snapshot, "Hard disk 1", "not to be trusted", "restored from point one", "until it is reset")
    modules.refused(snapshot, "not to be trusted", mode="differential", disks=["2000"])
    disks = modules.make(snapshot, "three")
    modules.remove_snapshot(snapshot)
    _reasons({2000: disks[2000]}, "not to be trusted", "restored from point one")
    # The restore has started the tracking of the whole machine anew, so one full is enough.
    assert modes(disks, [2001]) == {2001: ("full", None)}
    _write(modules, BOTH, MIB, seed=4, length=8 * CLUSTER)
    assert modes(modules.point("four")) == dict.fromkeys(BOTH, ("incremental", "three"))
    modules.track_changes("reset")
    _reasons(modules.point("five"), "reset")
    _write(modules, BOTH, 2 * MIB, seed=6, length=8 * CLUSTER)
    assert modes(modules.point("six")) == dict.fromkeys(BOTH, ("incremental", "five"))
    modules.verify_bytes()
    modules.verify("four", "six")
    modules.clean()

    # A machine that was never backed up, but whose tracking was on when it was written.
    other = Modules(modules.simulator, modules.repository, "restore01")
    other.track_changes()
    _restore(other, vm_name="app01", point="six", disks=[{"key": key, "target_key": key} for key in BOTH])
    call("power", vm="restore01", state="poweredOn")
    other.point("one")
    _write(other, BOTH, 0, seed=7, length=8 * CLUSTER)
    assert modes(other.point("two")) == dict.fromkeys(BOTH, ("incremental", "one"))
    other.verify_bytes()
    other.clean()


def _restore(modules: Modules, **options: Any) -> None:
    named = {"vm_name": modules.vm, "target": "in_place", "overwrite": True, "verify": False}
    modules.done("vadp_disk_restore", **{**modules.export_options(), **named, **options})


def _pass_by(modules: Modules, count: int) -> None:
    """Snapshots that come and go."""
    for number in range(count):
        modules.remove_snapshot(modules.snapshot(f"passing {number}"))
