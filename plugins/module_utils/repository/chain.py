# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which layer a disk's next point gets, and on which points a layer stands. Pure: manifests in, decisions out.

A wrong incremental looks well and is worth nothing, so whatever can't be proved makes a full, and the reason is told
(VADP facts 3, 4, 9 to 12, 14).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import DamagedError, InputError, RepositoryError
from . import trust
from .manifest import DIFFERENTIAL, FULL, INCREMENTAL, disk_of, entry_of
from .shapes import parse_time

AUTO = "auto"
MODES = (AUTO, FULL, INCREMENTAL, DIFFERENTIAL)


class ChainError(RepositoryError):
    """The mode that was asked for is not possible; the message says why, and what would make it so."""


@dataclass(frozen=True)
class DiskNow:
    """A disk as the snapshot that is about to be read shows it.

    Any object with these attributes will do; ``created`` is the snapshot's creation time.
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
    """

    problems: Mapping[Tuple[str, int], str] = field(default_factory=dict)
    marks: Sequence[Dict[str, Any]] = ()


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
    created: Optional[str] = None,
    revert_excluded: bool = False,
) -> Decision:
    """Choose the mode and the parent of a disk's next layer.

    :param disk: the disk now, see :class:`DiskNow`.
    :param points: the manifests of the VM's points, oldest first.
    :param requested: auto (incremental where valid, else full), full, incremental or differential.
    :param created: when the snapshot that is read was created, UTC ISO 8601.
    :param revert_excluded: it is proved that nobody reverted the VM since the parent point (VADP facts 11).
    :raises ChainError: incremental or differential was asked for and is not possible.
    """
    if requested not in MODES:
        raise InputError("Unknown mode", subject=repr(requested), remedy=f"Use one of {', '.join(MODES)}")
    if requested == FULL:
        return Decision(FULL, None, None, "a full was requested")
    facts = facts or StoreFacts()
    mode = DIFFERENTIAL if requested == DIFFERENTIAL else INCREMENTAL
    parent, obstacle = _find_parent(disk, points, mode)
    if parent is not None:
        obstacle = _obstacle(disk, parent, points, facts, created, revert_excluded)
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
    disk: Any, points: Sequence[Dict[str, Any]], mode: str
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
    if mode == DIFFERENTIAL:
        same = [point for point in same if entry_of(point, disk.key)["mode"] == FULL]
        if not same:
            return None, "no restore point holds the disk in full"
    return same[-1], None


def _obstacle(
    disk: Any,
    parent: Dict[str, Any],
    points: Sequence[Dict[str, Any]],
    facts: StoreFacts,
    created: Optional[str],
    revert_excluded: bool,
) -> Optional[str]:
    """Why nothing can be built upon *parent*; None if it can."""
    reason = tracking_obstacle(disk, parent, points, facts.marks, created, revert_excluded)
    return _chain_problem(points, parent["point"], disk.key, facts) if reason is None else reason


def tracking_obstacle(
    disk: Any,
    parent: Dict[str, Any],
    points: Sequence[Dict[str, Any]],
    marks: Sequence[Dict[str, Any]],
    created: Optional[str] = None,
    revert_excluded: bool = False,
) -> Optional[str]:
    """Why change tracking does not tell what changed on a disk since the point *parent*; None if it does.

    Parameters as of :func:`decide`; *marks* of :func:`.trust.marks`. Whether it is the same disk is not looked at.
    """
    name = parent["point"]
    entry = entry_of(parent, disk.key)
    mark = trust.in_force(marks, points, disk.key, disk.uuid)
    if mark is not None:
        return (
            f"its change tracking is not to be trusted since {mark['since']} ({mark['reason']}) "
            "until it is reset and a full is made"
        )
    if disk.capacity_bytes != entry["capacity_bytes"]:
        return f"its capacity changed from {entry['capacity_bytes']} to {disk.capacity_bytes} bytes since point {name}"
    if disk.change_id is None:
        return "the snapshot has no change id of it: change tracking is off, or not yet in effect"
    if entry["change_id"] is None:
        return f"point {name} has no change id of it"
    reason = _compare_change_ids(entry["change_id"], disk.change_id, name)
    if reason is not None:
        return reason
    if created is not None and parse_time(created) < parse_time(parent["snapshot"]["created"]):
        return f"the snapshot is older than that of point {name}"
    foreign = parent["snapshot"]["foreign"]
    if foreign and not revert_excluded:
        names = ", ".join(f"{snapshot['name']!r}" for snapshot in foreign[:3])
        return (
            f"the VM had other snapshots at point {name} ({names}): "
            "it may have been reverted since, and change tracking would not show that"
        )
    return None


def _compare_change_ids(then: str, now: str, point: str) -> Optional[str]:
    """VADP facts 4: opaque, split at the last slash; the same first part, and a number that does not go back."""
    prefix_then, prefix_now = trust.prefix_of(then), trust.prefix_of(now)
    if prefix_then is None or prefix_now is None:
        return f"a change id has an unknown form ({then!r} at point {point}, {now!r} now)"
    if prefix_then != prefix_now:
        return f"change tracking was reset since point {point}"
    number_then, number_now = then.rpartition("/")[2], now.rpartition("/")[2]
    # isdecimal alone would let through other scripts' digits.
    if not all(number.isascii() and number.isdecimal() for number in (number_then, number_now)):
        return f"a change id has an unknown form ({then!r} at point {point}, {now!r} now)"
    if int(number_now) < int(number_then):
        return f"its change id went back, from {number_then} at point {point} to {number_now}"
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
