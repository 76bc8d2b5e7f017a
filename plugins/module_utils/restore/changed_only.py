# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What of a disk must be written so that it holds a point again, where change tracking can tell (VADP facts 12).

"Now" is a snapshot of ours, which is gone before anything is written. Whatever can't be proved makes a restore of the
whole disk, and the reason is reported. A disk that an earlier restore left half-written is never asked about again: it
is finished from that restore's journal, or written as a whole.
"""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from ..datapath.extents import Extents
from ..errors import AuthenticationError, ConnectionLostError, PrivilegeError, VadpError, VsphereError
from ..repository import journal, trust
from ..repository.chain import DiskNow, tracking_obstacle
from ..repository.store import VmStore
from ..repository.runs import Run, new_run_id
from ..vsphere import vm_keys
from ..vsphere.changed_areas import ChangedAreasUnavailable, query_changed_areas
from ..vsphere.disks import Disk, disks_of
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import (
    Snapshot,
    consolidate_if_needed,
    create_snapshot,
    list_snapshots,
    marker_text,
    remove_snapshot,
)
from .point import Point, PointDisk

_NAME_LIMIT = 80
# Of the areas that are joined for fewer requests at most this part did not differ.
_JOINED_SHARE = 8
# Of what changed, so many pieces of so many bytes tell whether a comparison of the rest is worth its while. It is not
# where this part of them at most is as it was: what could be left out takes longer to find than to write. Were it more
# than a sixth of all (1.2 times what differs would be written), the odds of such a sample are below two in a million:
# exp(-128 * 0.1057), the Chernoff bound for 39/40 in place of 5/6.
_SAMPLE_PIECES = 128
_SAMPLE_BYTES = 65536
_SAME_SHARE = 40
# So much of what is believed unchanged is compared with the point, holes included: the larger of the first two.
_CHECK_BYTES, _CHECK_SHARE, _CHECK_MOST = 64 << 20, 100, 4 << 30

Pairs = Sequence[Tuple[PointDisk, Disk]]


@dataclass(frozen=True)
class Changes:
    """What of a disk is compared with the point; only what differs is written.

    :param disk_uuid: of the disk that was looked at.
    :param areas: outside of these the disk holds the point's bytes.
    :param kept: what the journal of an interrupted restore holds. Then ``areas`` is the whole disk: nobody knows who
        has written to it since.
    """

    disk_uuid: Optional[str]
    areas: Extents
    kept: Optional[Extents] = None

    @property
    def reason(self) -> str:
        if self.kept is not None:
            return "an interrupted restore of it was finished from its journal"
        return "what changed since the point was written"

    def sample(self) -> Extents:
        """What is compared first. Nothing where the areas are the whole disk: most of that is as it was."""
        if self.kept is not None:
            return Extents.of()
        return self.areas.sample(_SAMPLE_PIECES, _SAMPLE_BYTES, random.SystemRandom())

    @staticmethod
    def differs_throughout(sample: Extents, differing: Extents) -> bool:
        """Whether so much of the sample differs that all the areas are written."""
        return (sample.total_bytes - differing.total_bytes) * _SAME_SHARE <= sample.total_bytes

    @staticmethod
    def to_write(differing: Extents) -> Extents:
        """What is written so that *differing* is: not much more, by fewer requests."""
        return differing.joined(_JOINED_SHARE)

    def to_keep(self, wanted: Extents) -> Extents:
        """What the journal must hold before *wanted* is written."""
        return (self.areas if self.kept is None else self.kept).union(wanted)

    def unseen(self, capacity_bytes: int) -> Extents:
        """What nobody has compared with the point: it holds the point's bytes if what is known of changes is right."""
        return Extents.whole(capacity_bytes).subtract(self.areas)

    def to_verify(self, wanted: Extents) -> Extents:
        """What is read back after *wanted* was written. The rest of a finished disk was compared before."""
        return self.areas.union(wanted) if self.kept is None else wanted


def sample_of(areas: Extents, capacity_bytes: int) -> Extents:
    """Pieces all over *areas*, drawn by the system's randomness (proofs 14)."""
    wanted = min(max(_CHECK_BYTES, capacity_bytes // _CHECK_SHARE), _CHECK_MOST)
    return areas.sample(wanted // _SAMPLE_BYTES, _SAMPLE_BYTES, random.SystemRandom())


#: By device key of the disk that is written: its changes, or why it is written as a whole.
ChangesOf = Dict[int, Union[Changes, str]]


def journal_of(vm: VmRef, point: Point, source: PointDisk, disk: Disk) -> journal.JournalOf:
    """What the journal of a disk belongs to."""
    return journal.JournalOf(
        vm_uuid=vm.instance_uuid.lower(),
        key=disk.key,
        disk_uuid=disk.uuid,
        capacity_bytes=source.capacity_bytes,
        point=point.name,
        manifest_blake3=str(point.manifest["manifest_blake3"]),
    )


@dataclass(frozen=True)
class Base:
    """The point whose change ID is asked from: its disk holds the bytes of the point that is restored."""

    manifest: Dict[str, Any]
    entry: Dict[str, Any]


def plan_changes(session: Session, vm: VmRef, point: Point, store: VmStore, run: Run, pairs: Pairs) -> ChangesOf:
    """Find out what changed. A snapshot is made and removed; nothing else is touched. Under the VM's lock.

    :param run: gets the snapshot's intent.
    :raises VsphereError: no answer, or the snapshot can't be removed.
    """
    found, bases = _beforehand(session, vm, point, store, pairs)
    unknown = [(source, disk) for source, disk in pairs if disk.key not in found]
    if not unknown:
        return found
    name = f"openvadp restore {point.name}"[:_NAME_LIMIT]
    intent = run.record("snapshot", name=name, vm_moid=vm.moid)

    def made(moid: str) -> None:
        run.update(intent, moid=moid, server_uuid=session.server_uuid)

    try:
        found.update(_asked(session, vm, point, store, run, name, unknown, made, bases))
    except BaseException:
        # What brought us here is what must be told.
        with suppress(VadpError):
            _remove_snapshots(session, vm, store, run)
        raise
    _remove_snapshots(session, vm, store, run)
    return found


def known_beforehand(session: Session, vm: VmRef, point: Point, store: VmStore, pairs: Pairs) -> ChangesOf:
    """What needs no snapshot: disks that are finished from a journal, and those that must be written as a whole.

    A disk that is not in the answer is to be asked about.
    """
    return _beforehand(session, vm, point, store, pairs)[0]


def _beforehand(
    session: Session, vm: VmRef, point: Point, store: VmStore, pairs: Pairs
) -> Tuple[ChangesOf, Dict[int, Base]]:
    """As :func:`known_beforehand`, and for the disks that are to be asked about from which point."""
    values = session.read(vm.obj, *vm_keys.PATHS, "config.hardware.device")
    keys, _version = vm_keys.of_values(values)
    alone = vm_keys.identified(disks_of(values["config.hardware.device"] or []))
    points, marks = store.points(), trust.marks(store)
    found: ChangesOf = {}
    bases: Dict[int, Base] = {}
    for source, disk in pairs:
        known: Changes | str | None = _not_the_same(vm, point, source, disk)
        if known is None and disk.key not in alone:
            known = "another disk of the virtual machine has the same UUID, so nothing is known of either"
        if known is None:
            marked = trust.in_force(marks, points, disk.key, disk.uuid) is not None
            known = _interrupted(vm, point, store, source, disk, marked)
        if known is None:
            known = _marked(keys, disk)
        if known is None:
            known = _untracked(point, source, disk, points, marks)
        if known is None:
            base = base_of(keys, point.repository.id, point.manifest, source.entry, points)
            if isinstance(base, Base):
                bases[disk.key] = base
            else:
                known = base
        if known is not None:
            found[disk.key] = known
    return found, bases


def _marked(keys: vm_keys.VmKeys, disk: Disk) -> Optional[str]:
    mark = keys.marks_of([disk]).get(disk.key)
    if mark is None:
        return None
    if mark.state == vm_keys.UNKNOWN:
        return "what the virtual machine says of restores into it can't be read"
    if mark.state == vm_keys.WRITING:
        return f"the virtual machine carries the mark of a restore (run {mark.run_id}) that did not finish"
    return "its change tracking was not reset since a restore wrote to it"


def base_of(
    keys: vm_keys.VmKeys,
    repository_id: str,
    manifest: Dict[str, Any],
    entry: Dict[str, Any],
    points: Sequence[Dict[str, Any]],
) -> Base | str:
    """What the virtual machine says that it stands on, if that is the point or was built upon it (proofs 14).

    Without that the disk may have been written by a restore from another repository, reverted, or rolled back by its
    storage, and change tracking would not tell.

    :param entry: the disk in *manifest*.
    :param points: all manifests of the virtual machine.
    :returns: why it is not known to stand there, as a string.
    """
    name, key = manifest["point"], entry["key"]
    if entry.get("content_id") is None:
        return f"point {name} has no content ID of it"
    state, content_id = keys.naming(repository_id, str(entry["uuid"]))
    if state != "named" or content_id is None:
        return _UNNAMED[state]
    layers = {
        disk["content_id"]: Base(one, disk)
        for one in points
        for disk in one["disks"]
        if disk["key"] == key and disk.get("content_id")
    }
    # A point on which nothing changed is not named: its content is that of the point below it (proofs 21).
    same = {entry["content_id"]: Base(manifest, entry)}
    below = entry
    while not (below["areas"] or below["bytes_read"]) and below.get("parent_content_id") in layers:
        base = layers[below["parent_content_id"]]
        if base.entry["content_id"] in same:
            break
        below = base.entry
        same[below["content_id"]] = base
    seen = set()
    current: Optional[str] = content_id
    while current is not None and current not in seen:
        if current in same:
            return same[current]
        seen.add(current)
        current = layers[current].entry.get("parent_content_id") if current in layers else None
    if content_id not in layers:
        return "the virtual machine names a restore point that is not in this repository"
    return f"the restore point that the virtual machine names is not built upon point {name}"


_UNNAMED = {
    "absent": "the virtual machine names no restore point of this repository: since the last one it was restored or"
    " rolled back, or the name could not be written",
    "foreign": "the restore point that the virtual machine names is one of the machine that it was cloned from",
    vm_keys.UNKNOWN: "which restore point the virtual machine stands on can't be read",
}


def _not_the_same(vm: VmRef, point: Point, source: PointDisk, disk: Disk) -> Optional[str]:
    if vm.instance_uuid.lower() != point.store.uuid:
        return "the point is another virtual machine's"
    if disk.key != source.key or disk.uuid is None or disk.uuid != source.entry["uuid"]:
        return "it is not the disk that was backed up"
    return None


def _interrupted(
    vm: VmRef, point: Point, store: VmStore, source: PointDisk, disk: Disk, marked: bool
) -> Changes | str | None:
    """What earlier restores that did not come to their end mean for a disk; None if they did not write it."""
    of = journal_of(vm, point, source, disk)
    kept: Optional[Extents] = None
    half_written = False
    for earlier in store.runs():
        for intent in earlier.intents("restore"):
            if intent.get("vm_uuid") != vm.instance_uuid:
                continue
            areas = journal.read(earlier, of)
            if disk.key in intent.get("half_written", []):
                half_written = True
                if areas is None:
                    return (
                        f"a restore of point {intent.get('point')} wrote a part of it and left no journal for point"
                        f" {point.name}"
                    )
            if areas is not None:
                kept = areas if kept is None else kept.union(areas)
    # With a journal alone, nothing was written yet: change tracking can be asked again.
    if kept is not None and (half_written or marked):
        return Changes(disk.uuid, Extents.whole(source.capacity_bytes), kept)
    return None


def _untracked(
    point: Point, source: PointDisk, disk: Disk, points: List[Dict[str, Any]], marks: List[Dict[str, Any]]
) -> Optional[str]:
    """What speaks against change tracking before a snapshot shows the disk's change ID."""
    then = source.entry["change_id"]
    if then is None:
        return f"point {point.name} has no change ID of it"
    same = DiskNow(disk.key, disk.uuid, disk.capacity_bytes, then)
    return tracking_obstacle(same, point.manifest, points, marks)


def _asked(
    session: Session,
    vm: VmRef,
    point: Point,
    store: VmStore,
    run: Run,
    name: str,
    pairs: Pairs,
    on_made: Callable[[str], None],
    bases: Dict[int, Base],
) -> ChangesOf:
    description = marker_text(store.repository.id, run.run_id, point.name)
    try:
        made = create_snapshot(session, vm, name, description, quiesce="never", on_made=on_made)
    except (AuthenticationError, ConnectionLostError):
        raise
    except VsphereError as error:
        reason = f"a snapshot to compare with can't be made: {error.reason or error.what}"
        return {disk.key: reason for _source, disk in pairs}
    frozen = {disk.key: disk for disk in made.disks}
    points, marks = store.points(), trust.marks(store)
    found: ChangesOf = {}
    for _source, disk in pairs:
        now = frozen.get(disk.key)
        if now is None or now.uuid != disk.uuid:
            found[disk.key] = "the snapshot to compare with does not hold it"
            continue
        base = bases[disk.key]
        obstacle = tracking_obstacle(now, base.manifest, points, marks)
        if obstacle is not None:
            found[disk.key] = obstacle
        else:
            found[disk.key] = _areas(session, vm, made.snapshot, now, base.entry["change_id"])
    return found


def _areas(session: Session, vm: VmRef, snapshot: Snapshot, disk: Disk, then: str) -> Changes | str:
    try:
        # Extents.of reads to the end, so the pages are known to cover the disk.
        areas = Extents.of(query_changed_areas(session, vm, snapshot.obj, disk.key, disk.capacity_bytes, then))
    except (ChangedAreasUnavailable, PrivilegeError) as error:
        return f"the changed areas are not known: {error.reason}"
    return Changes(disk.uuid, areas)


# The snapshot's end


def clear_leftovers(session: Session, vm: VmRef, store: VmStore, lock_timeout: float) -> None:
    """Remove the snapshot that a killed restore of this virtual machine left: no disk is written below one."""
    if any(_may_have_left(run) for run in store.own_runs()):
        with store.lock(new_run_id(), "vadp_disk_restore", lock_timeout):
            now = store.now()
            for run in store.own_runs():
                if _may_have_left(run) and run.busy(now) is None:
                    _remove_snapshots(session, vm, store, run)


def _may_have_left(run: Run) -> bool:
    return run.data["point"] is None and bool(run.intents("snapshot"))


def _remove_snapshots(session: Session, vm: VmRef, store: VmStore, run: Run) -> None:
    """Neither in the tree nor as a delta (VADP facts 15)."""
    for snapshot in list_snapshots(session, vm):
        marker = snapshot.marker or {}
        if marker.get("repository_id") == store.repository.id and marker.get("run_id") == run.run_id:
            remove_snapshot(session, vm, snapshot)
    consolidate_if_needed(session, vm)
    for intent in run.intents("snapshot"):
        run.done(intent["id"])
