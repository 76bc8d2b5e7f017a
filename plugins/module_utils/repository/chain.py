# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which layer a disk's next point gets, and on which points a layer stands. Pure: manifests in, decisions out.

A wrong incremental looks well and is worth nothing. So whatever can't be proved makes a full, and the reason is
reported (VADP facts 3, 4, 9 to 12, 14). The virtual machine itself names the content that its disk had at its last
point (proofs 16 to 18): a name that is not that of the newest point makes a full, and equality replaces none of the
other checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import DamagedError, InputError, RepositoryError
from . import trust
from .manifest import DIFFERENTIAL, FULL, INCREMENTAL, disk_of, entry_of

AUTO = "auto"
MODES = (AUTO, FULL, INCREMENTAL, DIFFERENTIAL)
#: Layers of a chain, its full included, upon which mode auto builds no further: whoever reads a point opens them all.
MAX_CHAIN = 30


class ChainError(RepositoryError):
    """The mode that was asked for is not possible; the message says why, and what would make it so."""


@dataclass(frozen=True)
class DiskNow:
    """A disk as the snapshot that is about to be read shows it.

    Any object with these attributes will do.
    """

    key: int
    uuid: Optional[str]
    capacity_bytes: int
    change_id: Optional[str]


@dataclass(frozen=True)
class StoreFacts:
    """What the decision needs of the repository besides the manifests.

    :param problems: why a stored layer can't be built upon, by (point, device key); absent means it is sound.
    :param marks: of :func:`.trust.marks`.
    :param full: why a disk is read in full whatever the repository holds, by device key (backup/marks.py).
    """

    problems: Mapping[Tuple[str, int], str] = field(default_factory=dict)
    marks: Sequence[Dict[str, Any]] = ()
    full: Mapping[int, str] = field(default_factory=dict)


NAMED, ABSENT, UNKNOWN, TWICE = "named", "absent", "unknown", "twice"


@dataclass(frozen=True)
class Names:
    """What the virtual machine that is read says of itself.

    :param server_uuid: the server that it is on. Newer points of other servers are those of a replica or a test, and
        do not count.
    :param of_disks: device key -> (state, content ID) of the name that it carries for this repository: ``named``;
        ``absent``, also where it is inherited from another machine; ``unknown``, where it can't be read or understood;
        ``twice``, where two disks of the machine have this one's UUID. A disk that is not there carries none.
    """

    server_uuid: Optional[str] = None
    of_disks: Mapping[int, Tuple[str, Optional[str]]] = field(default_factory=dict)

    def of(self, key: int) -> Tuple[str, Optional[str]]:
        return self.of_disks.get(key, (ABSENT, None))


class Decision(NamedTuple):
    """How a disk is read: whole, or what changed since the parent point.

    ``since_change_id`` is what to ask the changed areas for; None for a full. ``reason`` is a phrase for the
    manifest and the result.
    """

    mode: str
    parent: Optional[str]
    since_change_id: Optional[str]
    reason: str


def decide(
    disk: Any,
    points: Sequence[Dict[str, Any]],
    requested: str = AUTO,
    facts: Optional[StoreFacts] = None,
    *,
    names: Optional[Names] = None,
    revert_excluded: bool = False,
    max_chain: int = MAX_CHAIN,
) -> Decision:
    """Choose the mode and the parent of a disk's next layer.

    :param disk: the disk now, see :class:`DiskNow`.
    :param points: the manifests of the VM's points, oldest first.
    :param requested: auto (incremental where valid, else full), full, incremental or differential.
    :param names: None: the virtual machine names nothing, and its server is not known.
    :param revert_excluded: it is proved that nobody reverted the VM since the parent point (VADP facts 11).
    :param max_chain: with auto, a chain of so many layers is followed by a full.
    :raises ChainError: incremental or differential was asked for and is not possible.
    """
    if requested not in MODES:
        raise InputError("Unknown mode", subject=repr(requested), remedy=f"Use one of {', '.join(MODES)}")
    if requested == FULL:
        return Decision(FULL, None, None, "a full was requested")
    facts = facts or StoreFacts()
    mode = DIFFERENTIAL if requested == DIFFERENTIAL else INCREMENTAL
    parent, obstacle = _find_parent(disk, points, mode, facts, names or Names())
    if disk.key in facts.full:
        parent, obstacle = None, facts.full[disk.key]
    if parent is not None:
        obstacle = _obstacle(disk, parent, points, facts, revert_excluded)
        if obstacle is None and requested == AUTO:
            obstacle = _too_long(points, parent["point"], disk.key, max_chain)
    if parent is None or obstacle is not None:
        if requested == AUTO:
            return Decision(FULL, None, None, str(obstacle))
        raise ChainError(
            f"The disk can't be read as {mode}",
            subject=f"disk {disk.key}",
            reason=obstacle,
            remedy="Use mode auto or full: it makes a full of this disk, upon which the next one can build",
        )
    what = "what changed since point" if mode == INCREMENTAL else "what changed since the last full, point"
    return Decision(mode, parent["point"], entry_of(parent, disk.key)["change_id"], f"{what} {parent['point']}")


def _find_parent(
    disk: Any, points: Sequence[Dict[str, Any]], mode: str, facts: StoreFacts, names: Names
) -> Tuple[Optional[Dict[str, Any]], Optional[str]]:
    """The point to build upon, or why there is none."""
    if not points:
        return None, "it is the VM's first restore point"
    holding = [point for point in points if disk_of(point, disk.key) is not None]
    if not holding:
        return None, "the disk is new: no restore point holds it"
    if disk.uuid is None:
        return None, "the disk has no UUID by which it could be recognised"
    same = [point for point in holding if entry_of(point, disk.key)["uuid"] == disk.uuid]
    if not same:
        return None, f"the disk was replaced: point {holding[-1]['point']} holds another one under the same key"
    if mode == DIFFERENTIAL and all(entry_of(point, disk.key)["mode"] != FULL for point in same):
        return None, "no restore point holds the disk in full"
    marked = _mark_obstacle(disk, points, facts.marks)
    if marked is not None:
        # A restore takes the names away, too; what it has done is the better reason.
        return None, marked
    newest, obstacle = _last_of(disk, points, same, names)
    if newest is None or mode != DIFFERENTIAL:
        return newest, obstacle
    # The full that the newest point stands on, not the newest full: that may be one of another server.
    try:
        base = chain_of(points, newest["point"], disk.key)[0]
    except DamagedError as error:
        return None, f"point {newest['point']} can't be built upon: {error.reason}"
    return next(point for point in points if point["point"] == base), None


def _last_of(
    disk: Any, points: Sequence[Dict[str, Any]], same: Sequence[Dict[str, Any]], names: Names
) -> Tuple[Optional[Dict[str, Any]], Optional[str]]:
    """The point whose content the disk had last, or why that is not proved (proofs 17 and 18).

    :param same: the points that hold this very disk, oldest first.
    """
    state, content_id = names.of(disk.key)
    if state == TWICE:
        return None, f"the VM has more than one disk with the UUID {disk.uuid}"
    if state == UNKNOWN:
        return None, "which point the VM names can't be read or understood"
    named = [point for point in same if entry_of(point, disk.key).get("content_id", "") == content_id]
    known = named[-1] if named else None
    own = [point for point in same if point.get("server_uuid") in (None, names.server_uuid)]
    newest = own[-1] if own else None
    # Whoever made it could not write its name, so the name that is there is older and says nothing of it.
    unnamed = newest is not None and not entry_of(newest, disk.key).get("named_in_vm", False)
    if newest is not None and unnamed and (known is None or _number(known) < _number(newest)):
        stale = content_id is not None and content_id == entry_of(newest, disk.key).get("vm_named")
        if content_id is None or known is not None or stale:
            return newest, None
    if known is None and content_id is not None:
        return None, (
            f"the VM names content {content_id} of this repository, which is not here: the repository is a copy, or"
            " a point was removed or rolled back"
        )
    if known is None:
        if newest is None:
            return None, f"the VM names no point, and point {same[-1]['point']} is one of another server"
        return None, (
            f"the VM names no point though {newest['point']} is the newest: it was reverted or rolled back, a restore"
            " wrote to the disk, or the name could not be written"
        )
    for point in reversed(points):
        if point is known or _number(point) < _number(known) or point.get("server_uuid") != names.server_uuid:
            continue
        entries = [entry for entry in point["disks"] if entry["uuid"] == disk.uuid]
        if any(not _holds_the_same(entry, content_id) for entry in entries):
            return None, (
                f"the VM shows point {known['point']} though {point['point']} is newer: it was reverted or rolled"
                " back, or the name could not be written"
            )
    return known, None


def _number(point: Dict[str, Any]) -> int:
    """Where a point lies; those of format 1 lie below all others."""
    return int(point.get("sequence", 0))


def _holds_the_same(entry: Dict[str, Any], content_id: Optional[str]) -> bool:
    """Whether a layer stands on that content and holds no change of it. Such a one is not named (proofs 21)."""
    return entry.get("parent_content_id") == content_id and not entry["areas"] and not entry["bytes_read"]


def _obstacle(
    disk: Any, parent: Dict[str, Any], points: Sequence[Dict[str, Any]], facts: StoreFacts, revert_excluded: bool
) -> Optional[str]:
    """Why nothing can be built upon *parent*; None if it can."""
    reason = tracking_obstacle(disk, parent, points, facts.marks, revert_excluded)
    return _chain_problem(points, parent["point"], disk.key, facts) if reason is None else reason


def tracking_obstacle(
    disk: Any,
    parent: Dict[str, Any],
    points: Sequence[Dict[str, Any]],
    marks: Sequence[Dict[str, Any]],
    revert_excluded: bool = False,
) -> Optional[str]:
    """Why change tracking does not say what changed on a disk since the point *parent*; None if it does.

    That the snapshot is not older than the parent's shows in the change IDs, not in a clock: their number only goes
    up, and a snapshot that is still there when a newer one is read is a foreign one to that point.

    Parameters as of :func:`decide`; *marks* of :func:`.trust.marks`. Whether it is the same disk is not looked at.
    """
    name = parent["point"]
    entry = entry_of(parent, disk.key)
    marked = _mark_obstacle(disk, points, marks)
    if marked is not None:
        return marked
    if disk.capacity_bytes != entry["capacity_bytes"]:
        return f"its capacity changed from {entry['capacity_bytes']} to {disk.capacity_bytes} bytes since point {name}"
    if disk.change_id is None:
        return "the snapshot has no change ID of it: change tracking is off, or not yet in effect"
    if entry["change_id"] is None:
        return f"point {name} has no change ID of it"
    reason = _compare_change_ids(entry["change_id"], disk.change_id, name)
    if reason is not None:
        return reason
    foreign = parent["snapshot"]["foreign"]
    if foreign and not revert_excluded:
        names = ", ".join(f"{snapshot['name']!r}" for snapshot in foreign[:3])
        return (
            f"the VM had other snapshots at point {name} ({names}): "
            "it may have been reverted since, and change tracking would not show that"
        )
    return None


def _mark_obstacle(disk: Any, points: Sequence[Dict[str, Any]], marks: Sequence[Dict[str, Any]]) -> Optional[str]:
    mark = trust.in_force(marks, points, disk.key, disk.uuid)
    if mark is None:
        return None
    return (
        f"its change tracking is not to be trusted since {mark['since']} ({mark['reason']}) "
        "until it is reset and a full is made"
    )


def _compare_change_ids(then: str, now: str, point: str) -> Optional[str]:
    """VADP facts 4: opaque, split at the last slash; the same first part, and a number that does not go back."""
    prefix_then, prefix_now = trust.prefix_of(then), trust.prefix_of(now)
    if prefix_then is None or prefix_now is None:
        return f"a change ID has an unknown form ({then!r} at point {point}, {now!r} now)"
    if prefix_then != prefix_now:
        return f"change tracking was reset since point {point}"
    number_then, number_now = then.rpartition("/")[2], now.rpartition("/")[2]
    # isdecimal alone would let through other scripts' digits.
    if not all(number.isascii() and number.isdecimal() for number in (number_then, number_now)):
        return f"a change ID has an unknown form ({then!r} at point {point}, {now!r} now)"
    if int(number_now) < int(number_then):
        return f"its change ID went back, from {number_then} at point {point} to {number_now}"
    return None


def _chain_problem(points: Sequence[Dict[str, Any]], point: str, key: int, facts: StoreFacts) -> Optional[str]:
    try:
        chain = chain_of(points, point, key)
    except DamagedError as error:
        return f"point {point} can't be built upon: {error.reason}"
    for name in chain:
        problem = facts.problems.get((name, key))
        if problem is not None:
            return f"the layer of point {name} can't be built upon: {problem}"
    return None


def _too_long(points: Sequence[Dict[str, Any]], point: str, key: int, max_chain: int) -> Optional[str]:
    layers = len(chain_of(points, point, key))
    if layers < max_chain:
        return None
    return f"the chain of point {point} has {layers} layers, and max_chain is {max_chain}"


def chain_of(points: Sequence[Dict[str, Any]], point: str, key: int) -> List[str]:
    """The names of the points whose layers make up a disk at a point, base first.

    :param points: manifests of the VM, in any order.
    :raises DamagedError: a parent is missing or does not hold the disk, or the chain goes in a circle.
    """
    by_name = {manifest["point"]: manifest for manifest in points}
    chain: List[str] = []
    name: Optional[str] = point
    while name is not None:
        manifest = by_name.get(name)
        entry = None if manifest is None else disk_of(manifest, key)
        reason = None
        if name in chain:
            reason = f"the chain goes in a circle at point {name}"
        elif manifest is None:
            reason = f"point {name} is missing or damaged"
        elif entry is None:
            reason = f"point {name} does not hold disk {key}"
        if reason is not None or entry is None:
            raise DamagedError(
                "The chain of a disk is broken",
                subject=f"disk {key} at point {point}",
                reason=reason,
                remedy="Restore from a point whose chain is whole, and make a full restore point",
            )
        chain.append(name)
        name = entry["parent"]
    chain.reverse()
    return chain
