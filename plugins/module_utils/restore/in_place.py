# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point into the disks of an existing virtual machine, whole disks or what changed of them.

Look (nothing is touched), check the point -> lock -> record the run -> ask what changed, where that is wanted -> look
again -> mark the disks in the virtual machine, look once more, stop change tracking (marking.py, proofs 12) -> mark
them in the repository too, as the second line -> write each disk, flush, read it back -> start change tracking anew,
take the marks away -> the run is over. A disk that was half written stays in the run's record; running the restore
again writes all of it anew, or finishes it from its journal.
"""

from __future__ import annotations

import contextlib
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from ..datapath import image
from ..datapath.copier import CopyResult, copy
from ..datapath.extents import Extents
from ..datapath.processes import RuntimeDir
from ..datapath.progress import Progress
from ..errors import DataPathError, InputError, LockedError, TransportError, VadpError, VsphereError
from ..libraries import vim
from ..repository import half_written, journal, trust
from ..repository.names import PART
from ..repository.store import VmStore
from ..repository.run_files import remove_files_of, remove_orphans
from ..repository.runs import Run, new_run_id
from ..transport.endpoints import Endpoint
from ..transport.facts import disk_facts, proxy_facts
from ..transport.hotadd_recovery import recover
from ..transport.opener import OpenContext, all_failed, open_disk, same_way_failed
from ..transport.planner import WRITE, Candidate, DiskFacts, Plan, ProxyFacts, plan
from ..vsphere import vm_keys
from ..vsphere.disks import Disk, disks_of, is_multi_writer
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from ..vsphere.snapshots import VmState, vm_state
from .changed_only import (
    Changes,
    ChangesOf,
    clear_leftovers,
    journal_of,
    known_beforehand,
    plan_changes,
    sample_of,
)
from .marking import Marking, check_marks
from .point import Point, PointDisk, checked_beside, open_connected, require_intact
from .readback import differing_areas, first_difference
from .request import FULL_VERIFY, RestoreRequest
from .safety import require_safety_point

# How much of a disk is read back and compared: all of it; the areas that were written, and a sample of the rest.
WHOLE, SAMPLED = "whole", "sampled"
# Of an entry until the result is made of it: whether the disk was, or would be, written to.
_CHANGED = "changed"
# A disk is a whole number of these, and NFC writes nothing smaller (VADP facts 23).
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class DiskTarget:
    """A disk of the point, the disk that it goes into, and how."""

    source: PointDisk
    disk: Disk
    transport: Plan
    facts: DiskFacts


@dataclass(frozen=True)
class _Written:
    """How a disk was written in the end.

    :param reasons: why by none of the transports before.
    :param how: a word on how what was written was chosen.
    :param instead: why the whole disk was written in the end, though what changed seemed to be known.
    :param verification: ``WHOLE``, ``SAMPLED``; None: nothing was read back.
    :param sampled_percent: how much of the areas believed unchanged was compared, where that is not all of them.
    """

    result: CopyResult
    bytes_written: int
    transport: str
    method: str
    reasons: List[str]
    notes: List[str]
    how: str = ""
    instead: str = ""
    verification: Optional[str] = None
    sampled_percent: Optional[float] = None


@dataclass(frozen=True)
class _Verified:
    """What reading back came to. :param differs: the sample shows that the disk is not the point; None: it does not."""

    verification: Optional[str] = None
    sampled_percent: Optional[float] = None
    differs: Optional[int] = None


@dataclass(frozen=True)
class _Job:
    """What the disks of one restore have in common.

    :param changes: with ``changed_only``, by device key of the disk that is written.
    :param proven: returns when the point is known to be sound.
    :param marking: the marks in the virtual machine; None where the disks were just made.
    :param fresh: the disks were just made, and read as zeros.
    """

    session: Session
    vm: VmRef
    point: Point
    store: VmStore
    run: Run
    intent: int
    context: OpenContext
    request: RestoreRequest
    run_dir: RuntimeDir
    progress: Progress
    changes: ChangesOf
    proven: Callable[[], None]
    marking: Optional[Marking] = None
    fresh: bool = False

    def protect(self, target: DiskTarget) -> DiskTarget:
        """Before a disk is opened for writing: the marks are there, and the disk is looked at as it is then."""
        if self.marking is None:
            return target
        self.marking.begin()
        targets, _proxy = self.marking.seen
        (now,) = [one for one in targets if one.source.key == target.source.key]
        return replace(target, disk=now.disk, facts=now.facts)


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
                clear_leftovers(session, vm, own)
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
    with store.lock(run_id, "vadp_disk_restore"), ExitStack() as stack:
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
                context = OpenContext(
                    session=session,
                    vm=vm,
                    snapshot_moid=None,
                    vddk=proxy.vddk,
                    proxy=proxy,
                    proxy_vm=proxy.vm.ref if proxy.vm else None,
                    nfc_port=request.nfc_port,
                    io_timeout=request.io_timeout,
                    run_dir=run_dir,
                    run=run,
                    device_dir=request.device_dir,
                    sysfs_dir=request.sysfs_dir,
                    wire_compression=request.wire_compression,
                    nfc_host_limit=request.nfc_host_limit,
                    stage_dir=store.work_path,
                    cancel=cancel,
                )
                restored = _restore(point, targets, store, context, request, progress, changes, proven, marking)
                return restored, marking.warnings
        finally:
            # As long as every disk is either what it was or wholly restored, and nothing is attached or marked, there
            # is nothing to remember.
            open_ended = run.intents("attachment") or run.intents("snapshot") or run.intents("task")
            if not (_half_written(run) or open_ended or (marking is not None and marking.remains)):
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


def plan_targets(
    session: Session,
    vm: VmRef,
    pairs: List[Tuple[PointDisk, Disk]],
    request: RestoreRequest,
    direction: str = WRITE,
) -> Tuple[List[DiskTarget], ProxyFacts]:
    """How each disk is written, or read back. :raises TransportError: a disk can't be."""
    facts = disk_facts(session, vm, [disk for _source, disk in pairs])
    proxy = proxy_facts(session, request, vm, facts, direction)
    required = request.require_transport and direction == WRITE
    targets = []
    for source, disk in pairs:
        chosen = plan(facts[disk.key], proxy, request.transports, direction, required)
        targets.append(DiskTarget(source, disk, chosen, facts[disk.key]))
    return targets, proxy


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
            f" is the one that shall be written, give disks with key {source.key} and target_key {disk.key}"
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
    job = _Job(
        context.session,
        vm,
        point,
        store,
        run,
        intent,
        context,
        request,
        context.run_dir,
        progress,
        changes,
        proven,
        marking,
    )
    try:
        restored = [_restore_disk(target, job) for target in targets]
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
    elif not _half_written(run):
        with contextlib.suppress(VadpError):
            marking.finish()


def write_new_disks(
    point: Point,
    targets: List[DiskTarget],
    store: VmStore,
    context: OpenContext,
    intent: int,
    request: RestoreRequest,
    progress: Progress,
) -> List[Dict[str, Any]]:
    """Write the disks of a machine that was just made; the caller has checked the point, and recorded *intent*."""
    job = _fresh_job(point, store, context, intent, request, progress)
    restored = [_restore_disk(target, job) for target in targets]
    for entry in restored:
        del entry[_CHANGED], entry["target_key"]
    return restored


def _fresh_job(
    point: Point, store: VmStore, context: OpenContext, intent: int, request: RestoreRequest, progress: Progress
) -> _Job:
    return _Job(
        context.session,
        context.vm,
        point,
        store,
        context.run,
        intent,
        context,
        request,
        context.run_dir,
        progress,
        changes={},
        proven=lambda: None,
        fresh=True,
    )


def read_back(
    point: Point,
    target: DiskTarget,
    store: VmStore,
    context: OpenContext,
    intent: int,
    request: RestoreRequest,
    progress: Progress,
) -> None:
    """Compare a disk that came by another way than those of its plan with the point.

    :param target: its plan is for reading.
    :raises TransportError: none of its transports can read it.
    :raises DataPathError: it holds other bytes.
    """
    job = _fresh_job(point, store, context, intent, request, progress)
    failed: Dict[str, VadpError] = {}
    with image.serve(target.source.layer, run_dir=job.run_dir) as reader, job.run.recorded(reader):
        for candidate in target.transport.usable():
            try:
                _verify(reader.uri, target, job, candidate, Extents.whole(target.source.capacity_bytes))
                return
            except VadpError as error:
                if not (_is_transport(error, False) or _is_transport(error, True)):
                    raise
                failed[candidate.transport] = error
    raise all_failed("read", failed)


def is_transport_failure(error: VadpError) -> bool:
    """Whether it was the transport that failed when a disk was opened or written."""
    return isinstance(error, TransportError) or _is_transport(error, True)


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
        healed = healed and set(_half_written(other)) | set(written) <= set(keys)
        if ours and healed and not (other.intents("process") and not (other.here or other.of_an_ended_boot)):
            remove_files_of(store, [other])
            RuntimeDir.leftovers(other.run_id, remove=True)
            other.remove()


def _half_written(run: Run) -> List[int]:
    """Device keys of the disks of the target that hold neither their old content nor the point's."""
    return [key for intent in run.intents("restore") for key in intent.get("half_written", [])]


def _restore_disk(target: DiskTarget, job: _Job) -> Dict[str, Any]:
    begun = time.monotonic()
    source, request = target.source, job.request
    changes = _changes_of(target, job)
    total = source.capacity_bytes if isinstance(changes, str) else changes.areas.total_bytes
    report = job.progress.disk(source.key, source.label, total)
    job.context.on_wait = report.wait
    state = "failed"
    try:
        with image.serve(source.layer, run_dir=job.run_dir) as reader, job.run.recorded(reader):
            written = _write_disk(reader.uri, target, job, changes, report.update)
        touched = target.disk.key in _half_written(job.run)
        job.run.update(job.intent, half_written=[])
        state = "done"
    except VadpError as error:
        name = f"disk '{target.disk.label}' of {job.vm}"
        error.subject = f"{name}: {error.subject}" if error.subject else name
        if not error.remedy and _half_written(job.run) and not job.fresh:
            again = "it writes the whole disk anew" if isinstance(changes, str) else "it goes on from its journal"
            error.remedy = f"Run the restore again: {again}. Until then don't power the machine on"
        raise
    finally:
        report.finish(state)
    changed_only = not (isinstance(changes, str) or written.instead)
    return _entry(
        target,
        job.vm,
        _reason(written.instead or changes, touched, written.how),
        written=written,
        changed_only=changed_only,
        bytes_read=written.result.bytes_read,
        seconds=round(time.monotonic() - begun, 3),
        verified=True if request.verify else None,
        written_to=touched,
    )


def _changes_of(target: DiskTarget, job: _Job) -> Changes | str:
    """What changed on a disk, or why it is written as a whole; empty where nothing else was asked for."""
    changes = job.changes.get(target.disk.key, "")
    if isinstance(changes, Changes) and changes.disk_uuid != target.disk.uuid:
        return "another disk took its place meanwhile"
    return changes


def _reason(changes: Changes | str, touched: bool, how: str) -> str:
    if isinstance(changes, str):
        return "its whole content was written" + (f": {changes}" if changes else "")
    if touched:
        return changes.reason + (f": {how}" if how else "")
    return "it holds the bytes of the restore point already"


def _mark_untrusted(target: DiskTarget, job: _Job) -> None:
    if job.marking is not None and job.marking.mandatory:
        return
    if job.store.uuid == job.vm.instance_uuid.lower() and not job.fresh:
        trust.mark(
            job.store,
            target.disk.key,
            f"the disk was restored from point {job.point.name}",
            uuid=target.disk.uuid,
            change_id=target.disk.change_id,
        )


def _write_disk(reader_uri: str, target: DiskTarget, job: _Job, changes: Changes | str, on_progress: Any) -> _Written:
    """Write the disk by the first transport of its plan that does it, and read it back by the same one.

    Where one fails, the next begins anew: what the first one has written is known to nobody.

    :raises VadpError: none could, or what failed was not the transport.
    """
    failed: Dict[str, VadpError] = {}
    told: Dict[str, str] = {}
    for candidate in target.transport.usable():
        alike = next(
            (name for name, error in failed.items() if same_way_failed(candidate.transport, name, error)), None
        )
        if alike is not None:
            told[candidate.transport] = f"not tried: it goes the way of {alike}, which failed"
            continue
        begun: List[str] = []
        try:
            if isinstance(changes, Changes):
                written = _write_changes(reader_uri, target, job, candidate, changes, begun, on_progress)
            else:
                written = _write_whole(reader_uri, target, job, candidate, begun, on_progress)
        except VadpError as error:
            if len(begun) > 1 or not _is_transport(error, bool(begun)):
                raise
            failed[candidate.transport] = error
            told[candidate.transport] = f"it failed: {error.what}" + (f": {error.reason}" if error.reason else "")
            continue
        return replace(written, reasons=target.transport.reasons(candidate.transport, told))
    raise all_failed("written", failed)


def _write_whole(
    reader_uri: str,
    target: DiskTarget,
    job: _Job,
    candidate: Candidate,
    begun: List[str],
    on_progress: Any,
    instead: str = "",
) -> _Written:
    """:param begun: gets an entry once the disk is open, and another one once it is written."""
    whole = Extents.whole(target.source.capacity_bytes)
    job.proven()
    target = job.protect(target)
    with _open(target, job, candidate, writable=True) as disk:
        # Before the first write (VADP facts 12), but not for a disk that can't be written at all.
        _about_to_write(target, job)
        begun.append(disk.transport)
        result = _write(reader_uri, disk, target, job, whole, on_progress)
    begun.append("written")
    verification = None
    if job.request.verify:
        verification = _verify(reader_uri, target, job, candidate, whole).verification
    return _Written(
        result,
        result.bytes_written if job.fresh else target.source.capacity_bytes,
        candidate.transport,
        candidate.method,
        [],
        list(candidate.notes),
        instead=instead,
        verification=verification,
    )


def _about_to_write(target: DiskTarget, job: _Job) -> None:
    """The repository's own mark and record, before the first byte."""
    _mark_untrusted(target, job)
    job.run.update(job.intent, half_written=[target.disk.key])
    if job.marking is not None:
        job.marking.written = True


def _write_changes(
    reader_uri: str,
    target: DiskTarget,
    job: _Job,
    candidate: Candidate,
    changes: Changes,
    begun: List[str],
    on_progress: Any,
) -> _Written:
    """Write what differs from the point in the areas that changed. A disk where nothing does is not touched.

    Where the disk is not the point after that, all of it is written.

    :param begun: as of :func:`_write_whole`.
    """
    with _open(target, job, candidate, writable=False) as disk:
        begun.append(disk.transport)
        wanted, how = _wanted(partial(_compare, reader_uri, disk, target, job, on_progress), changes)
    begun.clear()
    result, own = CopyResult(), wanted
    if wanted:
        job.proven()
        target = job.protect(target)
        # The whole list before the first write, and what tells of the journal before the mark: without either, change
        # tracking could be asked once more (VADP facts 12).
        kept = journal_of(job.vm, job.point, target.source, target.disk)
        journal.write(job.run, kept, changes.to_keep(wanted))
        with _open(target, job, candidate, writable=True) as disk:
            _about_to_write(target, job)
            begun.append(disk.transport)
            result = _write(reader_uri, disk, target, job, wanted, on_progress)
        begun.append("written")
        own = changes.to_verify(wanted)
    verified = _Verified()
    if job.request.verify:
        rest = changes.unseen(target.source.capacity_bytes)
        full = job.request.verify == FULL_VERIFY
        verified = _verify(
            reader_uri,
            target,
            job,
            candidate,
            Extents.whole(target.source.capacity_bytes).subtract(rest) if full else own,
            rest if full else sample_of(rest, target.source.capacity_bytes),
            rest,
        )
    if verified.differs is not None:
        begun.clear()
        instead = f"it differed at byte {verified.differs}, where nothing was known to have changed"
        return _write_whole(reader_uri, target, job, candidate, begun, on_progress, instead)
    return _Written(
        result,
        wanted.total_bytes,
        candidate.transport,
        candidate.method,
        [],
        list(candidate.notes),
        how=how,
        verification=verified.verification,
        sampled_percent=verified.sampled_percent,
    )


def _wanted(
    compare: Callable[[Extents, Callable[[Extents], Extents]], Extents], changes: Changes
) -> Tuple[Extents, str]:
    """What is written of the areas that changed, and a word on how it was chosen.

    :param compare: gets areas, and what tells the areas to compare after them; returns where they differ.
    """
    sample = changes.sample()
    rest = changes.areas.subtract(sample)
    how = ""

    def after_sample(differing: Extents) -> Extents:
        nonlocal how
        if not (sample and rest and changes.differs_throughout(sample, differing)):
            return rest
        how = f"all of it, since {differing.total_bytes * 100 // sample.total_bytes} % of a sample differed"
        return Extents.of()

    differing = compare(sample, after_sample)
    return (changes.areas if how else changes.to_write(differing)), how


def _compare(
    reader_uri: str,
    disk: Endpoint,
    target: DiskTarget,
    job: _Job,
    on_progress: Any,
    areas: Extents,
    following: Callable[[Extents], Extents],
) -> Extents:
    try:
        return differing_areas(
            reader_uri,
            disk.uri,
            target.source.capacity_bytes,
            areas=areas,
            following=following,
            on_progress=on_progress,
            io_timeout=job.request.io_timeout,
        )
    except DataPathError as error:
        raise disk.explain(error) from error


def _is_transport(error: VadpError, begun: bool) -> bool:
    """Whether it was the transport that failed, so that another one may do it."""
    if not begun:
        return isinstance(error, (TransportError, VsphereError))
    cause = error if isinstance(error, DataPathError) else error.__cause__
    return isinstance(cause, DataPathError) and cause.details.get("side") == "target"


@contextmanager
def _open(target: DiskTarget, job: _Job, candidate: Candidate, writable: bool) -> Iterator[Endpoint]:
    """The current leaf of a VM without snapshots (VADP facts 40)."""
    stage = job.context.stage_dir / f"restore-{target.disk.key}{PART}{job.run.run_id}"
    # What was written is read back by the same transport, however long another disk is in the way.
    last = not writable or candidate is target.transport.usable()[-1]
    with open_disk(
        job.context, target.disk, target.facts, candidate, writable=writable, stage=stage, last=last
    ) as endpoint, job.run.recorded(endpoint.child):
        if endpoint.size_bytes != target.source.capacity_bytes:
            raise TransportError(
                "The disk has another size than its configuration says",
                reason=f"{endpoint.size_bytes} bytes are served, not {target.source.capacity_bytes}",
                remedy="See what changed the virtual machine, and run again",
            )
        yield endpoint


def _write(
    reader_uri: str, disk: Endpoint, target: DiskTarget, job: _Job, areas: Extents, on_progress: Any
) -> CopyResult:
    """All of the areas, zeros too: what the disk holds must not shine through (VADP facts 35). A new one holds none."""
    try:
        return copy(
            reader_uri,
            disk.uri,
            capacity_bytes=target.source.capacity_bytes,
            areas=None if job.fresh else areas,
            on_progress=on_progress,
            rate_limit=job.request.rate_limit,
            io_timeout=job.request.io_timeout,
            align_bytes=_SECTOR_BYTES,
            zeros="drop" if job.fresh else "write",
            cancel=job.context.cancel,
        )
    except DataPathError as error:
        raise disk.explain(error) from error


def _verify(
    reader_uri: str,
    target: DiskTarget,
    job: _Job,
    candidate: Candidate,
    areas: Extents,
    sample: Optional[Extents] = None,
    rest: Optional[Extents] = None,
) -> _Verified:
    """Read back through a second, read-only endpoint (VADP facts 29), so that no cache answers.

    :param areas: what has to hold the point's bytes by now.
    :param sample: of *rest*, which was believed to hold them all the time.
    :raises DataPathError: one of *areas* does not.
    """
    sample, rest = sample or Extents.of(), rest or Extents.of()
    total = areas.total_bytes + sample.total_bytes
    report = job.progress.disk(target.source.key, f"{target.source.label}, read back", total)
    job.context.on_wait = report.wait
    state, differs = "failed", None
    try:
        with _open(target, job, candidate, writable=False) as disk:

            def compare(wanted: Extents, before: int) -> Optional[int]:
                return first_difference(
                    reader_uri,
                    disk.uri,
                    target.source.capacity_bytes,
                    areas=wanted,
                    on_progress=lambda done, _total: report.update(before + done),
                    io_timeout=job.request.io_timeout,
                )

            try:
                difference = compare(areas, 0) if areas else None
                if difference is None and sample:
                    differs = compare(sample, areas.total_bytes)
            except DataPathError as error:
                raise disk.explain(error) from error
        if difference is not None:
            raise DataPathError(
                "The disk does not hold the bytes of the restore point",
                reason=f"they differ from byte {difference} on when read back",
                remedy="Don't use the disk. See that nobody else writes to it, and run the restore again",
                details={"offset": difference},
            )
        state = "done"
    finally:
        report.finish(state)
    if sample.total_bytes == rest.total_bytes:
        return _Verified(WHOLE, None, differs)
    return _Verified(SAMPLED, round(100 * sample.total_bytes / rest.total_bytes, 3), differs)


# Results


def _entry(
    target: DiskTarget, vm: VmRef, reason: str, written: Optional[_Written] = None, **measured: Any
) -> Dict[str, Any]:
    """:param written: how; without it, as it is planned."""
    plan_ = target.transport
    if written is None:
        written = _Written(CopyResult(), 0, plan_.chosen, plan_.method, plan_.reasons(), plan_.notes(plan_.chosen))
    return {
        "key": target.source.key,
        "label": target.source.label,
        "target": f"{vm.name}/{target.disk.label}",
        "target_key": target.disk.key,
        "format": None,
        "transport": written.transport,
        "method": written.method,
        "transport_reasons": written.reasons,
        "transport_notes": written.notes,
        "bytes_read": measured.get("bytes_read", 0),
        "bytes_written": written.bytes_written,
        "seconds": measured.get("seconds", 0.0),
        "verified": measured.get("verified"),
        "verification": written.verification,
        "sampled_percent": written.sampled_percent,
        "changed_only": measured.get("changed_only", False),
        "reason": reason,
        _CHANGED: measured.get("written_to", True),
    }


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
        return [_entry(target, vm, "it would be written") for target in targets]
    known = known_beforehand(session, vm, point, _journal_store(point, vm, targets), _pairs(targets))
    entries = []
    for target in targets:
        changes = known.get(target.disk.key)
        reason = "what changed since the point would be written, unless change tracking turns out not to tell"
        if isinstance(changes, Changes):
            reason = "an interrupted restore of it would be finished from its journal"
        elif changes is not None:
            reason = f"its whole content would be written: {changes}"
        entries.append(_entry(target, vm, reason, changed_only=not isinstance(changes, str)))
    return entries


def _result(point: Point, vm: VmRef, restored: List[Dict[str, Any]], warnings: List[str]) -> Dict[str, Any]:
    written = [entry for entry in restored if entry.pop(_CHANGED)]
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
