# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point into the disks of an existing virtual machine, whole disks or what changed of them.

Look (nothing is touched), check the point -> lock -> record the run -> ask what changed, where that is wanted -> look
again -> mark the disks in the virtual machine, look once more, stop change tracking (marking.py, proofs 12) -> mark
them in the repository too, as the second line -> write each disk, flush, read it back -> restart change tracking,
take the marks away -> the run is over. A disk that was half written stays in the run's record; running the restore
again writes all of it again, or finishes it from its journal.
"""

from __future__ import annotations

import contextlib
import threading
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..datapath.processes import RuntimeDir
from ..datapath.progress import Progress
from ..errors import InputError, LockedError, VadpError, VsphereError
from ..libraries import vim
from ..repository import half_written
from ..repository.store import VmStore
from ..repository.run_files import remove_files_of, remove_orphans
from ..repository.runs import Run, new_run_id
from ..transport.hotadd_recovery import recover
from ..transport.opener import OpenContext
from ..transport.planner import ProxyFacts
from ..vsphere import vm_keys
from ..vsphere.disks import Disk, disks_of, is_multi_writer
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from ..vsphere.snapshots import VmState, vm_state
from .changed_only import Changes, ChangesOf, clear_leftovers, known_beforehand, plan_changes
from .disk_write import CHANGED, DiskTarget, WriteJob, entry_of, half_written_disks, plan_targets, restore_disk
from .marking import Marking, check_marks
from .point import Point, PointDisk, checked_beside, open_connected, require_intact
from .request import RestoreRequest
from .safety import require_safety_point


def restore_point(request: RestoreRequest, check_mode: bool) -> Dict[str, Any]:
    """Write the disks of a point into a virtual machine that is off.

    :param check_mode: all checks, but nothing is written and no lock is taken.
    :returns: {changed, point, vm, half_written, restored, warnings, diff}.
    :raises VadpError: before the first write nothing was touched; after it the run's record says what was.
    """
    request.check()
    if request.connection is None:
        raise InputError("A restore in place needs vCenter", remedy="Give hostname, username and password")
    with ExitStack() as stack:
        point, session = open_connected(request, stack)
        progress = stack.enter_context(Progress(None if check_mode else request.progress_file))
        # Once is enough.
        proven: Callable[[], None] = lru_cache(maxsize=None)(partial(require_intact, point, progress))
        if request.changed_only:
            # What changed is found out while the point is checked.
            proven = stack.enter_context(checked_beside(point, progress))
        vm = _find_target(session, point, request)
        if not check_mode:
            own = point.repository.vm(vm.instance_uuid)
            if own.is_known:
                own.refuse_busy(force=request.force)
                clear_leftovers(session, vm, own, request.lock_timeout)
        targets, proxy = _look(session, vm, point, request)
        if check_mode or not request.changed_only:
            proven()
        if check_mode:
            return _result(point, vm, _predicted(session, point, vm, targets, request), [])
        restored, warnings = _restore_locked(session, vm, point, targets, request, progress, proven)
    return _result(point, vm, restored, warnings)


def _restore_locked(
    session: Session,
    vm: VmRef,
    point: Point,
    targets: List[DiskTarget],
    request: RestoreRequest,
    progress: Progress,
    proven: Callable[[], None],
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """All that happens under the VM's lock. -> the disks, and warnings

    :param proven: returns when the point is known to be sound; called before anything is written.
    """
    store = _journal_store(point, vm, targets)
    run_id = new_run_id()
    with store.lock(run_id, "vadp_disk_restore", request.lock_timeout), ExitStack() as stack:
        store.refuse_busy(force=request.force)
        remove_orphans(store)
        safety = point.repository.vm(vm.instance_uuid)
        same = point.name if safety.uuid == point.store.uuid else ""
        require_safety_point(safety, request.safety_run_id, [target.disk for target in targets], same)
        # What a restore that crashed left attached is in the way.
        for earlier in store.own_runs():
            recover(
                session,
                earlier,
                sysfs_dir=request.sysfs_dir,
                device_dir=request.device_dir,
                check_mode=False,
            )
        run = store.create_run(None, vm_moid=vm.moid, vm_name=vm.name, run_id=run_id, server_uuid=session.server_uuid)
        cancel = threading.Event()
        stack.enter_context(run.working(cancel))
        stack.enter_context(session.remembering(run.remember_task))
        marking: Optional[Marking] = None
        try:
            changes: ChangesOf = {}
            if request.changed_only:
                changes = plan_changes(session, vm, point, store, run, _pairs(targets))
            # The check of the point may have taken long, and a snapshot may rename files.
            targets, proxy = _look(session, vm, point, request)
            marking = _marking(session, vm, point, store, run, targets, request)
            with RuntimeDir(run_id) as run_dir:
                context = OpenContext.of(request, session, vm, proxy, run, run_dir, store.work_path, cancel=cancel)
                restored = _restore(point, targets, store, context, request, progress, changes, proven, marking)
                return restored, marking.warnings
        finally:
            # As long as every disk is either what it was or wholly restored, and nothing is attached or marked, there
            # is nothing to remember.
            open_ended = run.intents("attachment") or run.intents("snapshot") or run.intents("task")
            if not (half_written_disks(run) or open_ended or (marking is not None and marking.remains)):
                run.remove()


def _marking(
    session: Session,
    vm: VmRef,
    point: Point,
    store: VmStore,
    run: Run,
    targets: List[DiskTarget],
    request: RestoreRequest,
) -> Marking:
    """The marks of this restore, of which nothing is written yet."""
    uuids = {target.disk.key: target.disk.uuid for target in targets}

    def look_again() -> Tuple[List[DiskTarget], ProxyFacts]:
        now = _look(session, vm, point, request)
        other = [target.disk.label for target in now[0] if uuids.get(target.disk.key, "") != target.disk.uuid]
        if other:
            raise VsphereError(
                "Another disk took the place of one that was about to be written, and nothing was touched",
                subject=f"{', '.join(other)} of {vm}",
                remedy="See what changes the virtual machine, and run again",
            )
        return now

    marking = Marking.look(
        session,
        vm,
        run,
        [target.disk for target in targets],
        look_again=look_again,
        is_over=partial(_is_over, point, store),
        force=request.force,
        mandatory=_mark_is_mandatory(point),
    )
    # Before anything is read for long.
    check_marks(vm, marking.disks, marking.keys, run.run_id, marking.is_over, request.force)
    return marking


def _mark_is_mandatory(point: Point) -> bool:
    """Whether the repository can't keep what would tell later backups of this restore (proofs 4)."""
    return not point.repository.may_write


def _is_over(point: Point, held: VmStore, run_id: str) -> bool:
    """Whether a run that left its mark is one of this repository, and is over by what its record proves (proofs 6)."""
    stores = [held, *(store for store in point.repository.vms() if store.uuid != held.uuid)]
    for store in stores:
        for run in store.runs():
            if run.run_id.lower() == run_id and not run.old:
                return store.busy(run) is None
    return False


def _pairs(targets: List[DiskTarget]) -> List[Tuple[PointDisk, Disk]]:
    return [(target.source, target.disk) for target in targets]


# Before the first write


def _find_target(session: Session, point: Point, request: RestoreRequest) -> VmRef:
    named = dict(request.vm)
    if not any(named.get(name) for name in ("name", "uuid", "moid")):
        # The instance UUID is what the repository knows a machine by, and vCenter keeps it unique.
        named.update(uuid=point.store.uuid, use_instance_uuid=True)
    return find_vm(session, **named)


def _journal_store(point: Point, vm: VmRef, targets: List[DiskTarget]) -> VmStore:
    """Where lock, record and marks lie: with the VM that is written.

    With the point's VM if the repository knows nothing of the other and its changes are not tracked, so that there is
    nothing to mark.
    """
    own = point.repository.vm(vm.instance_uuid)
    if own.uuid == point.store.uuid:
        return point.store
    tracked = any(target.disk.change_id is not None for target in targets)
    return own if tracked or own.is_known else point.store


def _look(session: Session, vm: VmRef, point: Point, request: RestoreRequest) -> Tuple[List[DiskTarget], ProxyFacts]:
    """Find the disks that are written. :raises VsphereError: with everything that speaks against it."""
    state = vm_state(session, vm)
    obstacles = _vm_obstacles(state)
    disks = {disk.key: disk for disk in disks_of(state.devices)}
    devices = {device.key: device for device in state.devices}
    pairs: List[Tuple[PointDisk, Disk]] = []
    for source in point.disks:
        key = source.key if source.choice.target_key is None else source.choice.target_key
        if key not in disks:
            known = ", ".join(f"{disk.key} ('{disk.label}')" for disk in disks.values()) or "none"
            obstacles.append(
                f"it has no disk {key} for disk {source.key} ('{source.label}') of the point, but {known}: give disks"
                " with key and target_key"
            )
            continue
        disk = disks[key]
        obstacles += [f"'{disk.label}': {text}" for text in _disk_obstacles(source, disk, devices)]
        pairs.append((source, disk))
    if obstacles:
        raise VsphereError(
            "The restore point can't be written to the virtual machine, and nothing was touched",
            subject=f"{point} to {vm}",
            reason="; ".join(obstacles),
            details={"obstacles": obstacles},
        )
    return plan_targets(session, vm, pairs, request)


def _vm_obstacles(state: VmState) -> List[str]:
    """VADP facts 29, 35: what is written is the leaf, so there must be nothing above or below it that is in use."""
    obstacles = []
    if state.template:
        obstacles.append("it is a template: convert it to a virtual machine")
    if state.power_state != "poweredOff":
        obstacles.append(f"it is {state.power_state}: power it off")
    if state.snapshots:
        names = ", ".join(f"'{snapshot.name}'" for snapshot in state.snapshots[:5])
        obstacles.append(f"it has {len(state.snapshots)} snapshots ({names}): remove them")
    if state.consolidation_needed:
        obstacles.append("its disks need consolidation: run vadp_recover, or consolidate them in the vSphere client")
    return obstacles


def _disk_obstacles(source: PointDisk, disk: Disk, devices: Dict[int, Any]) -> List[str]:
    obstacles = []
    device = devices[disk.key]
    controller = devices.get(device.controllerKey)
    if isinstance(device.backing, vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo):
        obstacles.append("it is a raw device mapping, which is not written")
    elif not disk.included:
        obstacles.append(disk.skip_reason or "it can't be in a snapshot, so it is not written")
    if is_multi_writer(device) or (getattr(controller, "sharedBus", None) or "noSharing") != "noSharing":
        obstacles.append("other virtual machines may use it at the same time")
    if disk.capacity_bytes != source.capacity_bytes:
        obstacles.append(
            f"it has {disk.capacity_bytes} bytes, disk {source.key} of the point has {source.capacity_bytes}: the sizes"
            " must be equal"
        )
    if source.choice.target_key is None and disk.uuid != source.entry["uuid"]:
        obstacles.append(
            f"it is another disk than the one that was backed up (UUID {disk.uuid}, not {source.entry['uuid']}): if it"
            f" is the one that should be written, give disks with key {source.key} and target_key {disk.key}"
        )
    if source.choice.datastore not in (None, disk.datastore):
        obstacles.append(f"it lies on datastore '{disk.datastore}', not on '{source.choice.datastore}'")
    return obstacles


# Writing


def _restore(
    point: Point,
    targets: List[DiskTarget],
    store: VmStore,
    context: OpenContext,
    request: RestoreRequest,
    progress: Progress,
    changes: ChangesOf,
    proven: Callable[[], None],
    marking: Marking,
) -> List[Dict[str, Any]]:
    """Under the VM's lock. The run's record is on the disk before anything is opened."""
    vm, run = context.vm, context.run
    keys = [target.disk.key for target in targets]
    intent = run.record(
        "restore",
        vm_uuid=vm.instance_uuid,
        vm_moid=vm.moid,
        point=point.name,
        point_vm=point.store.uuid,
        disks=keys,
        half_written=[],
    )
    job = WriteJob(point, store, context, intent, request, progress, changes, proven, marking)
    try:
        restored = [restore_disk(target, job) for target in targets]
    except VadpError as error:
        _let_go(marking, run, error)
        raise
    marking.finish()
    run.done(intent)
    _forget_earlier(store, vm, run, keys)
    return restored


def _let_go(marking: Marking, run: Run, error: VadpError) -> None:
    """A restore failed. Where no disk is half written, its marks need not stay."""
    if not marking.written:
        marking.undo(error)
    elif not half_written_disks(run):
        with contextlib.suppress(VadpError):
            marking.finish()


def _forget_earlier(store: VmStore, vm: VmRef, run: Run, keys: List[int]) -> None:
    """What crashed restores left whose disks are all whole again."""
    _forget_healed(store, vm, run, keys)
    # As long as the repository knew nothing of this machine, what was left stands with the machine of the point.
    for other in half_written.stores_of(store.repository, vm.instance_uuid):
        if other.uuid != store.uuid:
            # Who holds that lock may be the restore itself.
            with contextlib.suppress(LockedError), other.lock(run.run_id, "vadp_disk_restore"):
                _forget_healed(other, vm, run, keys)


def _forget_healed(store: VmStore, vm: VmRef, run: Run, keys: List[int]) -> None:
    now = store.now()
    for other in store.own_runs():
        if other.run_id == run.run_id or other.data["point"] is not None or other.busy(now) is not None:
            continue
        intents = other.intents()
        ours = all(intent["what"] in ("restore", "process") for intent in intents)
        restores = [intent for intent in intents if intent["what"] == "restore"]
        healed = all(intent.get("vm_uuid") == vm.instance_uuid for intent in restores)
        written = [key for intent in restores for key in intent.get("disks", [])]
        healed = healed and set(half_written_disks(other)) | set(written) <= set(keys)
        if ours and healed and not (other.intents("process") and not (other.here or other.of_an_ended_boot)):
            remove_files_of(store, [other])
            RuntimeDir.leftovers(other.run_id, remove=True)
            other.remove()


# Results


def _predicted(
    session: Session, point: Point, vm: VmRef, targets: List[DiskTarget], request: RestoreRequest
) -> List[Dict[str, Any]]:
    """The disks as they would be written. What changed on them is not known without a snapshot.

    :raises VsphereError: another restore may be at work on them.
    """
    keys, _version = vm_keys.read(session, vm)
    recorded = {run.run_id.lower() for store in point.repository.vms() for run in store.runs()}
    check_marks(vm, [target.disk for target in targets], keys, "", recorded.__contains__, request.force)
    if not request.changed_only:
        return [entry_of(target, vm, "it would be written") for target in targets]
    known = known_beforehand(session, vm, point, _journal_store(point, vm, targets), _pairs(targets))
    entries = []
    for target in targets:
        changes = known.get(target.disk.key)
        reason = "what changed since the point would be written, unless change tracking turns out not to know it"
        if isinstance(changes, Changes):
            reason = "an interrupted restore of it would be finished from its journal"
        elif changes is not None:
            reason = f"its whole content would be written: {changes}"
        entries.append(entry_of(target, vm, reason, changed_only=not isinstance(changes, str)))
    return entries


def _result(point: Point, vm: VmRef, restored: List[Dict[str, Any]], warnings: List[str]) -> Dict[str, Any]:
    written = [entry for entry in restored if entry.pop(CHANGED)]
    return {
        "changed": bool(written),
        "point": point.name,
        "vm": {"moid": vm.moid, "name": vm.name, "path": vm.path, "instance_uuid": vm.instance_uuid},
        "half_written": half_written.half_written(point.repository, vm.instance_uuid),
        "restored": restored,
        "warnings": warnings,
        "diff": {
            "before": {entry["target"]: "its present content" for entry in written},
            "after": {entry["target"]: f"disk {entry['key']} of {point}" for entry in written},
        },
    }
