# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks of a restore point into disks of a virtual machine: written, flushed, and read back.

All of a disk, or what differs from the point in the areas that changed. Which disks, and whether they may be written,
was decided before: :mod:`.in_place` for a machine that exists, :mod:`.new_vm` for one that was just made.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from ..datapath import image
from ..datapath.copier import CopyResult, copy
from ..datapath.extents import Extents
from ..datapath.processes import RuntimeDir
from ..datapath.progress import Progress
from ..errors import DataPathError, TransportError, VadpError, VsphereError
from ..repository import journal, trust
from ..repository.names import PART
from ..repository.store import VmStore
from ..repository.runs import Run
from ..transport.endpoints import Endpoint
from ..transport.facts import disk_facts, proxy_facts
from ..transport.opener import OpenContext, all_failed, open_disk, same_way_failed
from ..transport.planner import WRITE, Candidate, DiskFacts, Plan, ProxyFacts, plan
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from .changed_only import (
    Changes,
    ChangesOf,
    journal_of,
    sample_of,
)
from .marking import Marking
from .point import Point, PointDisk
from .readback import differing_areas, first_difference
from .request import FULL_VERIFY, RestoreRequest

# How much of a disk is read back and compared: all of it; the areas that were written, and a sample of the rest.
WHOLE, SAMPLED = "whole", "sampled"
# Of an entry until the result is made of it: whether the disk was, or would be, written to.
CHANGED = "changed"
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
class WriteJob:
    """What the disks of one restore have in common.

    :param changes: with ``changed_only``, by device key of the disk that is written.
    :param proven: returns when the point is known to be sound.
    :param marking: the marks in the virtual machine; None where the disks were just made.
    :param fresh: the disks were just made, and read as zeros.
    """

    point: Point
    store: VmStore
    context: OpenContext
    intent: int
    request: RestoreRequest
    progress: Progress
    changes: ChangesOf
    proven: Callable[[], None]
    marking: Optional[Marking] = None
    fresh: bool = False

    @property
    def vm(self) -> VmRef:
        return self.context.vm

    @property
    def run(self) -> Run:
        return self.context.run

    @property
    def run_dir(self) -> RuntimeDir:
        return self.context.run_dir

    def protect(self, target: DiskTarget) -> DiskTarget:
        """Before a disk is opened for writing: the marks are there, and the disk is looked at as it is then."""
        if self.marking is None:
            return target
        self.marking.begin()
        targets, _proxy = self.marking.seen
        (now,) = [one for one in targets if one.source.key == target.source.key]
        return replace(target, disk=now.disk, facts=now.facts)


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
    restored = [restore_disk(target, job) for target in targets]
    for entry in restored:
        del entry[CHANGED], entry["target_key"]
    return restored


def _fresh_job(
    point: Point, store: VmStore, context: OpenContext, intent: int, request: RestoreRequest, progress: Progress
) -> WriteJob:
    return WriteJob(point, store, context, intent, request, progress, changes={}, proven=lambda: None, fresh=True)


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


def half_written_disks(run: Run) -> List[int]:
    """Device keys of the disks of the target that hold neither their old content nor the point's."""
    return [key for intent in run.intents("restore") for key in intent.get("half_written", [])]


def restore_disk(target: DiskTarget, job: WriteJob) -> Dict[str, Any]:
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
        touched = target.disk.key in half_written_disks(job.run)
        job.run.update(job.intent, half_written=[])
        state = "done"
    except VadpError as error:
        name = f"disk '{target.disk.label}' of {job.vm}"
        error.subject = f"{name}: {error.subject}" if error.subject else name
        if not error.remedy and half_written_disks(job.run) and not job.fresh:
            again = "it writes the whole disk again" if isinstance(changes, str) else "it goes on from its journal"
            error.remedy = f"Run the restore again: {again}. Until then don't power the machine on"
        raise
    finally:
        report.finish(state)
    changed_only = not (isinstance(changes, str) or written.instead)
    return entry_of(
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


def _changes_of(target: DiskTarget, job: WriteJob) -> Changes | str:
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


def _mark_untrusted(target: DiskTarget, job: WriteJob) -> None:
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


def _write_disk(
    reader_uri: str, target: DiskTarget, job: WriteJob, changes: Changes | str, on_progress: Any
) -> _Written:
    """Write the disk by the first transport of its plan that does it, and read it back by the same one.

    Where one fails, the next begins again: what the first one has written is known to nobody.

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
    job: WriteJob,
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


def _about_to_write(target: DiskTarget, job: WriteJob) -> None:
    """The repository's own mark and record, before the first byte."""
    _mark_untrusted(target, job)
    job.run.update(job.intent, half_written=[target.disk.key])
    if job.marking is not None:
        job.marking.written = True


def _write_changes(
    reader_uri: str,
    target: DiskTarget,
    job: WriteJob,
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
        # The whole list before the first write, and the note of the journal before the mark: without either, change
        # tracking could be asked once more (VADP facts 12).
        kept = journal_of(job.vm, job.point, target.source, target.disk)
        journal.write(job.run, kept, changes.to_keep(wanted))
        with _open(target, job, candidate, writable=True) as disk:
            _about_to_write(target, job)
            begun.append(disk.transport)
            result = _write(reader_uri, disk, target, job, wanted, on_progress)
        begun.append("written")
        own = changes.to_verify(wanted)
    verified = _verify_changes(reader_uri, target, job, candidate, changes, own) if job.request.verify else _Verified()
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


def _verify_changes(
    reader_uri: str, target: DiskTarget, job: WriteJob, candidate: Candidate, changes: Changes, own: Extents
) -> _Verified:
    """Read back *own*, and of the rest, which was believed to be the point's, a sample or all."""
    capacity = target.source.capacity_bytes
    rest = changes.unseen(capacity)
    if job.request.verify == FULL_VERIFY:
        return _verify(reader_uri, target, job, candidate, Extents.whole(capacity).subtract(rest), rest, rest)
    return _verify(reader_uri, target, job, candidate, own, sample_of(rest, capacity), rest)


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
    job: WriteJob,
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
def _open(target: DiskTarget, job: WriteJob, candidate: Candidate, writable: bool) -> Iterator[Endpoint]:
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
    reader_uri: str, disk: Endpoint, target: DiskTarget, job: WriteJob, areas: Extents, on_progress: Any
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
    job: WriteJob,
    candidate: Candidate,
    areas: Extents,
    sample: Optional[Extents] = None,
    rest: Optional[Extents] = None,
) -> _Verified:
    """Read back through a second, read-only endpoint (VADP facts 29), so that no cache answers.

    :param areas: what must hold the point's bytes by now.
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


def entry_of(
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
        CHANGED: measured.get("written_to", True),
    }
