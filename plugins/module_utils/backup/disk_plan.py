# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How each disk of a point will be read: full or what changed, upon which point, by which transport, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..datapath.extents import Extents
from ..datapath.image import CLUSTER_BYTES
from ..errors import VadpError
from ..repository import trust
from ..repository.chain import AUTO, Decision, StoreFacts, decide
from ..repository.store import VmStore
from ..repository.manifest import FULL, disk_of
from ..transport.planner import READ, DiskFacts, Plan, ProxyFacts, plan
from ..vsphere import vm_keys
from ..vsphere.changed_areas import ChangedAreasUnavailable, query_changed_areas
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import Snapshot
from .naming import Naming, pin
from .request import ExportRequest
from .template import ALWAYS_FULL


@dataclass(frozen=True)
class Pin:
    """The layer that a disk's next one stands on: its content ID (None of a point of format 1), and its hash."""

    content_id: Optional[str] = None
    layer_blake3: Optional[str] = None


@dataclass(frozen=True)
class DiskPlan:
    """How one disk is read.

    :param areas: what is read, rounded out to clusters; None: all that holds data, or not known yet (check mode
        without a snapshot).
    :param named_in_vm: whether the virtual machine will name the point, as far as that can be known now.
    :param vm_named: the content ID that it names now, in this repository.
    """

    disk: Disk
    mode: str
    parent: Optional[str]
    reason: str
    areas: Optional[Extents]
    transport: Plan
    facts: DiskFacts
    pin: Pin = Pin()
    named_in_vm: bool = False
    vm_named: Optional[str] = None

    def to_result(
        self, entry: Optional[Dict[str, Any]] = None, reading: Optional[Dict[str, Any]] = None
    ) -> Dict[str, Any]:
        """The disk's part of the module's result.

        :param entry: its part of the manifest, once it was read.
        :param reading: how it was read now: {method, transport_reasons, transport_notes}; without it, how it would be.
        """
        if reading is None:
            reading = {
                "method": self.transport.method if entry is None else None,
                "transport_reasons": self.transport.reasons(),
                "transport_notes": self.transport.notes(self.transport.chosen),
            }
        done = entry or {}
        return {
            "key": self.disk.key,
            "label": self.disk.label,
            "mode": done.get("mode", self.mode),
            "parent": done.get("parent", self.parent),
            "reason": done.get("reason", self.reason),
            "transport": done.get("transport", self.transport.chosen),
            **reading,
            "capacity_bytes": self.disk.capacity_bytes,
            "bytes_read": done.get("bytes_read"),
            "bytes_stored": done.get("bytes_stored"),
            "areas": done.get("areas", None if self.areas is None else len(self.areas)),
            "seconds": done.get("seconds"),
            "skipped": False,
            "skip_reason": None,
        }


def skipped_result(skipped: Dict[str, Any]) -> Dict[str, Any]:
    """As :meth:`DiskPlan.to_result`, for a disk that is not read ({key, label, reason})."""
    empty = (
        "mode",
        "parent",
        "reason",
        "transport",
        "method",
        "capacity_bytes",
        "bytes_read",
        "bytes_stored",
        "areas",
        "seconds",
    )
    result: Dict[str, Any] = dict.fromkeys(empty)
    result.update(key=skipped["key"], label=skipped["label"], skipped=True, skip_reason=skipped["reason"])
    result.update(transport_reasons=[], transport_notes=[])
    return result


def plan_disks(
    session: Session,
    vm: VmRef,
    snapshot: Optional[Snapshot],
    disks: Sequence[Disk],
    store: Optional[VmStore],
    request: ExportRequest,
    proxy: ProxyFacts,
    disk_facts: Mapping[int, DiskFacts],
    naming: Naming,
    present: Sequence[Disk],
    full: Mapping[int, str],
) -> List[DiskPlan]:
    """Decide for each disk. Nothing is changed; the changed areas are read from vCenter.

    :param snapshot: None where it does not exist yet (check mode): the changed areas are not known then. None for a
        template too, which is always read in full.
    :param store: None where the repository does not exist yet.
    :param disk_facts: of :func:`..transport.facts.disk_facts`.
    :param naming: what the virtual machine says of itself.
    :param present: all its disks, not only those that are read.
    :param full: of :class:`.marks.Verdict`.
    :raises TransportError: no transport can serve a disk.
    :raises RepositoryError: the mode that was asked for is not possible for a disk.
    :raises ChangedAreasUnavailable: the same, because the query failed.
    """
    points = store.points() if store else []
    stored = store.chain_facts({disk.key for disk in disks}) if store else StoreFacts()
    facts = replace(stored, full=full)
    names = naming.names(store.repository.id if store else None, present)
    identified = vm_keys.identified(present)
    plans = []
    for disk in disks:
        # First what needs no call and may refuse.
        known = disk_facts[disk.key]
        transport = plan(known, proxy, request.transports, READ, request.require_transport)
        try:
            if vm.template:
                decision = Decision(FULL, None, None, ALWAYS_FULL)
            else:
                decision = decide(disk, points, request.mode, facts, names=names, max_chain=request.max_chain)
            decision, areas = _areas(session, vm, snapshot, disk, decision, request.mode)
        except VadpError as error:
            error.subject = f"disk '{disk.label}' of {vm}"
            raise
        plans.append(
            DiskPlan(
                disk=disk,
                mode=decision.mode,
                parent=decision.parent,
                reason=decision.reason,
                areas=areas,
                transport=transport,
                facts=known,
                pin=Pin(*pin(points, decision.parent, disk.key)),
                named_in_vm=naming.writes and disk.key in identified,
                vm_named=names.of(disk.key)[1],
            )
        )
    return plans


def _areas(
    session: Session, vm: VmRef, snapshot: Optional[Snapshot], disk: Disk, decision: Decision, requested: str
) -> Tuple[Decision, Optional[Extents]]:
    """What changed since the parent; a full where that can't be known and was not insisted on (VADP facts 9)."""
    if decision.since_change_id is None or snapshot is None:
        return decision, None
    try:
        # Extents.of reads to the end, so the pages are known to cover the disk before anything is done with them.
        areas = Extents.of(
            query_changed_areas(session, vm, snapshot.obj, disk.key, disk.capacity_bytes, decision.since_change_id)
        )
    except ChangedAreasUnavailable as error:
        if requested != AUTO:
            raise
        return Decision(FULL, None, None, f"the changed areas are not known: {error.reason}"), None
    return decision, areas.round_out(CLUSTER_BYTES, disk.capacity_bytes)


def not_to_be_trusted(
    disks: Sequence[Disk], points: Sequence[Dict[str, Any]], foreign: Sequence[Snapshot]
) -> List[Disk]:
    """Disks whose tracking may have been switched on over another snapshot (VADP facts 7).

    With such a snapshot there, only an earlier point without one proves that the same tracking is older.
    """
    if not foreign:
        return []
    return [disk for disk in disks if disk.change_id is not None and not _proved(disk, points)]


def _proved(disk: Disk, points: Sequence[Dict[str, Any]]) -> bool:
    for manifest in points:
        entry = disk_of(manifest, disk.key)
        if entry is None or manifest["snapshot"]["foreign"] or entry["uuid"] != disk.uuid:
            continue
        prefix = trust.prefix_of(disk.change_id)
        if prefix is not None and trust.prefix_of(entry["change_id"]) == prefix:
            return True
    return False
