# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Snapshots: made once, removed wholly, and told apart by their moid (VADP facts 13 to 17).

"No snapshot of ours" means three things, because a removal can fail half-way: it is not in the tree, no consolidation
is needed, and no delta file of it is left in the virtual machine's files.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..errors import (
    AmbiguousError,
    ConnectionLostError,
    NotFoundError,
    TaskError,
    VsphereError,
)
from ..libraries import vim, vmodl
from . import faults
from .disks import Disk, disks_of, vm_obstacles
from .inventory import VmRef
from .session import Session

MARKER = "openvadp.backup"
MAX_CHAIN = 32

# Consolidation fails while somebody reads the delta; whoever does is usually done within minutes.
_REMOVAL_PAUSES = (2, 5, 10, 20, 30, 60)

# What VM facts a snapshot is decided on, all in one read.
VM_PATHS = (
    "snapshot",
    "recentTask",
    "runtime.powerState",
    "runtime.consolidationNeeded",
    "guest.toolsRunningStatus",
    "config.template",
    "config.hardware.device",
)


@dataclass
class Snapshot:
    """A snapshot in the tree. ``created`` is UTC ISO 8601, ``quiesced`` "made with the option" (VADP facts 16)."""

    obj: Any
    moid: str
    name: str
    description: str
    created: str
    quiesced: bool
    parent_moid: Optional[str]
    marker: Optional[Dict[str, Any]]

    def to_dict(self) -> Dict[str, Any]:
        return {
            "moid": self.moid,
            "name": self.name,
            "description": self.description,
            "created": self.created,
            "quiesced": self.quiesced,
        }

    def __str__(self) -> str:
        return f"snapshot '{self.name}' ({self.moid})"


@dataclass
class Quiesce:
    """What was asked of the guest and what it did.

    ``achieved`` is ``quiesced``, ``powered-off`` (consistent by itself) or ``crash-consistent``; ``reason`` says why it
    is not what was asked for.
    """

    requested: str
    achieved: str
    reason: Optional[str] = None

    def to_dict(self) -> Dict[str, Any]:
        return {"requested": self.requested, "achieved": self.achieved, "reason": self.reason}


class Created(NamedTuple):
    """A snapshot that was made, what the guest did, and the disks as the snapshot holds them."""

    snapshot: Snapshot
    quiesce: Quiesce
    disks: List[Disk]


@dataclass
class VmState:
    """What decides on snapshots of a virtual machine, at one moment."""

    snapshots: List[Snapshot]
    current_depth: int
    power_state: str
    tools_running: bool
    consolidation_needed: bool
    template: bool
    devices: List[Any]
    recent_tasks: List[Any]


# Markers


def marker_text(repository_id: str, run_id: str, point: str) -> str:
    """The description of a snapshot of ours. It names what made it; nothing is found by a snapshot's name."""
    return json.dumps({"by": MARKER, "repository_id": repository_id, "run_id": run_id, "point": point}, sort_keys=True)


def free_name(name: str, snapshots: List[Snapshot]) -> str:
    """*name*, or where a snapshot of somebody else has it already, another one that nobody has."""
    taken = {snapshot.name for snapshot in snapshots}
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def parse_marker(description: Optional[str]) -> Optional[Dict[str, Any]]:
    """The JSON object in a description of ours, or ``None``.

    It has ``by`` for certain; ``repository_id``, ``run_id`` and ``point`` stand in those of a backup run only.
    """
    try:
        marker = json.loads(description or "")
    except ValueError:
        return None
    return marker if isinstance(marker, dict) and marker.get("by") == MARKER else None


# Reading


def utc_text(moment: datetime.datetime) -> str:
    """UTC ISO 8601 to the second; a time without a zone is UTC, as vSphere means it."""
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def snapshots_of(info: Any) -> List[Snapshot]:
    """The tree of ``vm.snapshot`` (``None``: there is none) as a list, parents first."""
    found: List[Snapshot] = []
    waiting = [(None, node) for node in (info.rootSnapshotList if info is not None else [])]
    while waiting:
        parent_moid, node = waiting.pop(0)
        moid = node.snapshot._moId
        found.append(
            Snapshot(
                obj=node.snapshot,
                moid=moid,
                name=node.name,
                description=node.description or "",
                created=utc_text(node.createTime),
                quiesced=bool(node.quiesced),
                parent_moid=parent_moid,
                marker=parse_marker(node.description),
            )
        )
        waiting.extend((moid, child) for child in node.childSnapshotList or [])
    return found


def _depth(info: Any, snapshots: List[Snapshot]) -> int:
    """How many snapshots the running state stands on."""
    parents = {snapshot.moid: snapshot.parent_moid for snapshot in snapshots}
    moid = faults.moid_of(info.currentSnapshot) if info is not None else None
    depth = 0
    while moid in parents:
        depth += 1
        moid = parents[moid]
    return depth


def vm_state(session: Session, vm: VmRef) -> VmState:
    """Everything that snapshots depend on, in one call."""
    return vm_state_of(session.read(vm.obj, *VM_PATHS))


def vm_state_of(values: Dict[str, Any]) -> VmState:
    """:func:`vm_state` of properties that were read already; they hold at least ``VM_PATHS``."""
    snapshots = snapshots_of(values["snapshot"])
    return VmState(
        snapshots=snapshots,
        current_depth=_depth(values["snapshot"], snapshots),
        power_state=str(values["runtime.powerState"]),
        tools_running=values["guest.toolsRunningStatus"] in ("guestToolsRunning", "guestToolsExecutingScripts"),
        consolidation_needed=bool(values["runtime.consolidationNeeded"]),
        template=bool(values["config.template"]),
        devices=list(values["config.hardware.device"] or []),
        recent_tasks=list(values["recentTask"] or []),
    )


def list_snapshots(session: Session, vm: VmRef) -> List[Snapshot]:
    """All snapshots of a virtual machine, parents first."""
    return snapshots_of(session.read(vm.obj, "snapshot")["snapshot"])


def find_snapshot(
    session: Session, vm: VmRef, moid: Optional[str] = None, name: Optional[str] = None
) -> Optional[Snapshot]:
    """The snapshot with a moid, or the only one of a name. :raises AmbiguousError: several have the name."""
    return pick_snapshot(list_snapshots(session, vm), vm, moid, name)


def pick_snapshot(
    snapshots: List[Snapshot], vm: VmRef, moid: Optional[str] = None, name: Optional[str] = None
) -> Optional[Snapshot]:
    """:func:`find_snapshot` among snapshots that were read already."""
    if moid is not None:
        return next((snapshot for snapshot in snapshots if snapshot.moid == moid), None)
    named = [snapshot for snapshot in snapshots if snapshot.name == name]
    if len(named) > 1:
        listed = ", ".join(f"{snapshot.moid} of {snapshot.created}" for snapshot in named)
        raise AmbiguousError(
            f"More than one snapshot is named '{name}'",
            subject=str(vm),
            reason=listed,
            remedy="Name the one that is meant by snapshot_moid",
            details={"matches": [snapshot.to_dict() for snapshot in named]},
        )
    return named[0] if named else None


def snapshot_disks(session: Session, snapshot: Snapshot) -> List[Disk]:
    """The disks as the snapshot holds them: its paths, change IDs and device keys (VADP facts 3, 14)."""
    return snapshot_config(session, snapshot)[0]


def snapshot_config(session: Session, snapshot: Snapshot) -> Tuple[List[Disk], List[Any]]:
    """:func:`snapshot_disks`, and the advanced settings of that time; empty where the server does not fill them in."""
    paths = ("config.hardware.device", "config.extraConfig")
    try:
        values = session.read(snapshot.obj, *paths)
    except VsphereError as error:
        if isinstance(error.fault, vmodl.fault.ManagedObjectNotFound):
            raise NotFoundError(
                "The snapshot no longer exists", subject=str(snapshot), remedy="Somebody removed it; make a new one"
            ) from error
        raise
    return disks_of(values[paths[0]] or []), list(values[paths[1]] or [])


# Quiescing


def plan_quiesce(vm: VmRef, requested: str, power_state: str, tools_running: bool) -> Quiesce:
    """What quiescing can be had from the guest's state: the platform ignores the flag where it can't (VADP facts 16).

    :param requested: ``required``, ``preferred`` or ``never``.
    :raises VsphereError: it is required and can't be had.
    """
    if power_state == "poweredOff":
        return Quiesce(requested, "powered-off", "the virtual machine is off: its disks are consistent by themselves")
    if requested == "never":
        return Quiesce(requested, "crash-consistent", "quiesce is never")
    if power_state != "poweredOn":
        reason = "the virtual machine is suspended: its guest can't be quiesced"
        remedy = "Resume the virtual machine, or use quiesce: preferred"
    elif not tools_running:
        reason = "VMware Tools don't run in the guest"
        remedy = "Install and start VMware Tools in the guest, or use quiesce: preferred"
    else:
        return Quiesce(requested, "quiesced")
    if requested == "required":
        raise VsphereError("The guest can't be quiesced", subject=str(vm), reason=reason, remedy=remedy)
    return Quiesce(requested, "crash-consistent", reason)


def _is_quiesce_fault(fault: Any) -> bool:
    kinds = (vim.fault.ApplicationQuiesceFault, vim.fault.FilesystemQuiesceFault, vim.fault.ToolsUnavailable)
    return isinstance(fault, kinds)


# Creating


def check_can_snapshot(vm: VmRef, state: VmState) -> None:
    """:raises VsphereError: the virtual machine can't have another snapshot, with all reasons."""
    obstacles = vm_obstacles(_Hardware(state.template, state.devices))
    if obstacles:
        raise VsphereError(
            "The virtual machine can't be backed up through a snapshot",
            subject=str(vm),
            reason="; ".join(obstacles),
            details={"obstacles": obstacles},
        )
    if state.current_depth >= MAX_CHAIN:
        raise VsphereError(
            "No further snapshot is possible",
            subject=str(vm),
            reason=f"the virtual machine stands on {state.current_depth} snapshots, and {MAX_CHAIN} is the limit",
            remedy="Remove snapshots that are not needed",
        )


class _Hardware:
    """What :func:`vm_obstacles` looks at of a configuration, without reading all of it."""

    def __init__(self, template: bool, devices: List[Any]) -> None:
        self.template = template
        self.hardware = vim.vm.VirtualHardware(device=devices)


def create_snapshot(
    session: Session,
    vm: VmRef,
    name: str,
    description: str = "",
    quiesce: str = "preferred",
    memory: bool = False,
    timeout: float = 3600,
    state: Optional[VmState] = None,
    on_made: Optional[Callable[[str], None]] = None,
) -> Created:
    """Make a snapshot, once.

    A call whose connection broke is repeated only when the tree and the recent tasks prove that it did not happen.

    :param quiesce: ``required`` fails without it; ``preferred`` goes on without and says so; ``never``.
    :param state: :func:`vm_state` of just now, where the caller has it.
    :param on_made: gets the moid before anything else is done.
    :raises VsphereError: obstacles, privileges, faults of the task.
    """
    state = state or vm_state(session, vm)
    check_can_snapshot(vm, state)
    plan = plan_quiesce(vm, quiesce, state.power_state, state.tools_running)
    deadline = session.clock() + timeout
    try:
        moid = _create(session, vm, state, name, description, memory, plan.achieved == "quiesced", timeout)
    except VsphereError as error:
        if quiesce != "preferred" or plan.achieved != "quiesced" or not _is_quiesce_fault(error.fault):
            raise
        plan = Quiesce(quiesce, "crash-consistent", f"quiescing failed: {faults.fault_text(error.fault)}")
        state = vm_state(session, vm)
        moid = _create(session, vm, state, name, description, memory, False, max(deadline - session.clock(), 1))
    if on_made is not None:
        on_made(moid)
    made = vim.vm.Snapshot(moid, session.stub)
    after, config = session.read_each((vm.obj, ["snapshot"]), (made, ["config.hardware.device"]))
    snapshot = pick_snapshot(snapshots_of(after["snapshot"]), vm, moid=moid)
    if snapshot is None:
        raise TaskError(
            "The snapshot is not there",
            subject=str(vm),
            reason=f"its task succeeded, but {moid} is not in the tree",
            remedy="Somebody may have removed it at once; run again",
            retryable=True,
        )
    if plan.achieved == "quiesced" and not snapshot.quiesced:
        plan = Quiesce(
            quiesce, "crash-consistent", "the platform ignored the request; look at VMware Tools in the guest"
        )
        if quiesce == "required":
            remove_snapshot(session, vm, snapshot, timeout=max(deadline - session.clock(), 60))
            raise VsphereError(
                "The guest was not quiesced",
                subject=str(vm),
                reason="the platform made a snapshot without it",
                remedy="Look at VMware Tools in the guest, or use quiesce: preferred. The snapshot was removed again",
            )
    return Created(snapshot, plan, disks_of(config["config.hardware.device"] or []))


def _create(
    session: Session,
    vm: VmRef,
    before: VmState,
    name: str,
    description: str,
    memory: bool,
    quiesce: bool,
    timeout: float,
) -> str:
    """One snapshot's moid. :raises TaskError:"""
    what = "The snapshot was not created"
    if quiesce:
        # The guest's time-out is in minutes, and the platform takes 5 to 240.
        spec = vim.vm.GuestQuiesceSpec(timeout=min(max(math.ceil(timeout / 60), 5), 240))
        function, last = vm.obj.CreateSnapshotEx_Task, spec
    else:
        function, last = vm.obj.CreateSnapshot_Task, False
    deadline = session.clock() + timeout
    while True:
        remaining = max(deadline - session.clock(), 1)
        try:
            result = session.run_task(
                function, name, description, memory, last, what=what, subject=str(vm), timeout=remaining
            )
            return faults.moid_of(result)
        except ConnectionLostError:
            found = _created_meanwhile(session, vm, before, name, description, what, remaining)
            if found is not None:
                return found
            if session.clock() >= deadline:
                raise


def _created_meanwhile(
    session: Session, vm: VmRef, before: VmState, name: str, description: str, what: str, timeout: float
) -> Optional[str]:
    """The moid of a snapshot that a lost call made after all; ``None`` if it certainly made none.

    A name proves nothing, for others may use it at the same moment. With our marker the description names the run;
    without one there must have been one task alone that makes a snapshot, and it must have made this one.

    :raises AmbiguousError: somebody made a snapshot, and it can't be determined who.
    """
    known_tasks = {task._moId for task in before.recent_tasks}
    known_snapshots = {snapshot.moid for snapshot in before.snapshots}
    after = vm_state(session, vm)
    results = []
    for task in after.recent_tasks:
        if task._moId in known_tasks:
            continue
        if session.read(task, "info.descriptionId")["info.descriptionId"] == "VirtualMachine.createSnapshot":
            results.append(faults.moid_of(session.wait(task, what=what, subject=str(vm), timeout=timeout)))
    if results:
        after = vm_state(session, vm)
    new = [item for item in after.snapshots if item.moid not in known_snapshots]
    same = [item for item in new if (item.name, item.description) == (name, description)]
    if (parse_marker(description) or {}).get("run_id") is None and same and results != [same[0].moid]:
        raise AmbiguousError(
            "It is not known whose snapshot there is",
            subject=f"{', '.join(map(str, same))} of {vm}",
            reason="the connection was lost while ours was being made, and another was made at the same time",
            remedy="Look at the virtual machine in the vSphere client; remove what is not needed, then run again",
        )
    return same[0].moid if same else None


# Removing


def remove_snapshot(
    session: Session,
    vm: VmRef,
    snapshot: Snapshot,
    remove_children: bool = False,
    consolidate: bool = True,
    timeout: float = 3600,
) -> bool:
    """Remove a snapshot and all that is left of it (VADP facts 15). One that is gone already is fine.

    :param consolidate: merge the delta files; without it they stay, and that is not an error.
    :returns: whether the disks had to be consolidated in a step of their own.
    :raises TaskError: the snapshot is still in the tree, or its delta files can't be merged.
    """
    what = "The snapshot was not removed"
    subject = f"{snapshot} of {vm}"
    deadline = session.clock() + timeout
    pauses = list(_REMOVAL_PAUSES)
    while True:
        try:
            session.run_task(
                snapshot.obj.RemoveSnapshot_Task,
                remove_children,
                consolidate,
                what=what,
                subject=subject,
                timeout=max(deadline - session.clock(), 1),
                # Removing twice does no harm: the second call finds nothing.
                idempotent=True,
            )
        except VsphereError as error:
            if error.details.get("timed_out"):
                raise  # the task goes on: the tree may have lost the snapshot while its deltas are being merged
            if not isinstance(error.fault, vmodl.fault.ManagedObjectNotFound) and (
                find_snapshot(session, vm, moid=snapshot.moid) is not None
            ):
                if not (faults.is_locked(error.fault) and pauses and session.clock() + pauses[0] < deadline):
                    raise
                session.sleep(pauses.pop(0))
                continue
            # It left the tree although its task failed; what stayed behind is dealt with below.
        break
    tree, needed, leftover = what_is_left(session, vm, renew=consolidate)
    if pick_snapshot(tree, vm, moid=snapshot.moid) is not None:
        raise TaskError(
            what,
            subject=subject,
            reason="its task succeeded, but it is still in the tree",
            remedy="Look at the virtual machine in the vSphere client, then run again",
            retryable=True,
        )
    if not consolidate or not (needed or leftover):
        return False
    return _consolidate(session, vm, max(deadline - session.clock(), 60))


def consolidate_if_needed(session: Session, vm: VmRef, timeout: float = 3600) -> bool:
    """Merge delta files that belong to no snapshot. :returns: whether there were any.

    :raises TaskError: they can't be merged, with the files.
    """
    needed, leftover = consolidation_state(session, vm, renew=True)
    return _consolidate(session, vm, timeout) if needed or leftover else False


def _consolidate(session: Session, vm: VmRef, timeout: float) -> bool:
    what = "The virtual machine's disks were not consolidated"
    deadline = session.clock() + timeout
    pauses = list(_REMOVAL_PAUSES)
    while True:
        reason: Optional[str] = None
        fault: Any = None
        try:
            session.run_task(
                vm.obj.ConsolidateVMDisks_Task,
                what=what,
                subject=str(vm),
                timeout=max(deadline - session.clock(), 1),
                idempotent=True,
            )
        except TaskError as error:
            reason, fault = error.reason, error.fault
            if error.details.get("timed_out"):
                raise
        needed, leftover = consolidation_state(session, vm, renew=True)
        if not (needed or leftover):
            return True
        if not pauses or session.clock() + pauses[0] >= deadline:
            error_out = TaskError(
                what,
                subject=str(vm),
                reason=reason or "delta files without a snapshot are still there",
                remedy="Look for whoever has the disks open (a backup proxy with an attached disk, a running copy),"
                " then consolidate in the vSphere client or run again",
                retryable=True,
                details={"consolidation_needed": needed, "files": leftover},
            )
            error_out.fault = fault
            raise error_out
        session.sleep(pauses.pop(0))


def consolidation_state(session: Session, vm: VmRef, renew: bool = False) -> Tuple[bool, List[str]]:
    """(``runtime.consolidationNeeded``, delta files that belong to no snapshot).

    :param renew: vCenter may show the file list of a moment ago, so a delta is believed only after the list was
        renewed. Check mode does without, since that is a call that writes.
    """
    _snapshots, needed, leftover = what_is_left(session, vm, renew)
    return needed, leftover


def what_is_left(session: Session, vm: VmRef, renew: bool = False) -> Tuple[List[Snapshot], bool, List[str]]:
    """The tree, and :func:`consolidation_state`; one call unless the list of files must be renewed."""
    tree, needed, leftover = _consolidation_facts(session, vm)
    if renew and leftover and not needed:
        session.call(
            vm.obj.RefreshStorageInfo,
            what="The list of the VM's files was not renewed",
            subject=str(vm),
            idempotent=True,
        )
        tree, needed, leftover = _consolidation_facts(session, vm)
    return tree, needed, leftover


def _consolidation_facts(session: Session, vm: VmRef) -> Tuple[List[Snapshot], bool, List[str]]:
    values = session.read(vm.obj, "snapshot", "runtime.consolidationNeeded", "layoutEx.file", "layoutEx.disk")
    tree = snapshots_of(values["snapshot"])
    depth = _depth(values["snapshot"], tree)
    leftover = orphaned_deltas(values["layoutEx.file"] or [], values["layoutEx.disk"] or [], depth)
    return tree, bool(values["runtime.consolidationNeeded"]), leftover


def orphaned_deltas(files: List[Any], disks: List[Any], depth: int) -> List[str]:
    """Delta files that no snapshot accounts for: a disk's chain may be as long as its snapshots plus one.

    Only the part of a chain in the leaf's own folder counts: below it lies the base of a linked clone.

    :param files: ``layoutEx.file``. :param disks: ``layoutEx.disk``.
    :param depth: how many snapshots the running state stands on.
    """
    names = {item.key: item.name for item in files}
    orphans: List[str] = []
    for disk in disks:
        # Base first; the first file of a link is its descriptor.
        links = [names[link.fileKey[0]] for link in disk.chain if link.fileKey and link.fileKey[0] in names]
        own = [link for link in links if _folder_of(link) == _folder_of(links[-1])]
        if len(own) > depth + 1:
            surplus = len(own) - depth - 1
            orphans.extend([link for link in own if re.search(r"-\d{6}\.vmdk$", link)][-surplus:])
    return orphans


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]
