# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a snapshot's disk to a finished layer of the repository; several disks at a time, bounded."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..datapath import image
from ..datapath.copier import CopyResult, copy
from ..datapath.extents import Extents
from ..datapath.hashes import HashWriter
from ..datapath.processes import Child, RuntimeDir
from ..datapath.progress import DiskProgress, Progress
from ..errors import DataPathError, RepositoryError, TransportError, VadpError, VsphereError
from ..repository.content import new_content_id
from ..repository.names import PART
from ..repository.store import VmStore
from ..repository.stored import file_entry
from ..repository.manifest import FULL
from ..repository.runs import Run
from ..transport.endpoints import Endpoint
from ..transport.opener import OpenContext, all_failed, open_disk, same_way_failed
from ..transport.planner import Candidate
from ..vsphere.inventory import VmRef
from .disk_plan import DiskPlan
from .request import ExportRequest

NOTHING_READ = "none"


@dataclass(frozen=True)
class Reading:
    """How a disk was read in the end.

    :param reasons: why by none of the transports before, a line each.
    :param notes: what it cost.
    """

    transport: str
    method: str
    reasons: List[str]
    notes: List[str]


@dataclass(frozen=True)
class CopyJob:
    """What the disks of one run have in common.

    :param context: for opening the disks.
    :param cancel: set when a disk fails: the others stop.
    :param failed: device keys, the first that failed first.
    :param readings: how each disk was read, by device key.
    """

    vm: VmRef
    store: VmStore
    run: Run
    point: str
    context: OpenContext
    request: ExportRequest
    run_dir: RuntimeDir
    progress: Progress
    cancel: threading.Event
    rate_limit: Optional[int]
    failed: List[int] = field(default_factory=list)
    readings: Dict[int, Reading] = field(default_factory=dict)


def copy_disks(plans: Sequence[DiskPlan], job: CopyJob) -> Dict[int, Dict[str, Any]]:
    """Copy all disks, at most ``parallel_disks`` at a time; manifest entries by device key.

    The first disk that fails stops the others; those that were finished before stay finished in the run's record.

    :raises VadpError: of the first disk that failed; it names the disk.
    """
    pool = ThreadPoolExecutor(max_workers=job.request.parallel_disks, thread_name_prefix="disk")
    try:
        futures = {plan.disk.key: pool.submit(_copy_unless_cancelled, plan, job) for plan in plans}
        wait(futures.values())
        if job.failed:
            futures[job.failed[0]].result()
        return {key: future.result() for key, future in futures.items()}
    finally:
        # An interrupt of this thread must not leave the others copying.
        job.cancel.set()
        pool.shutdown(wait=True)


def _copy_unless_cancelled(plan: DiskPlan, job: CopyJob) -> Dict[str, Any]:
    """A disk whose turn comes after another one failed is not begun."""
    if job.cancel.is_set():
        raise DataPathError("The disk was not copied", f"disk '{plan.disk.label}'", "another disk failed")
    finished = False
    try:
        entry = copy_disk(plan, job)
        finished = True
        return entry
    finally:
        if not finished:
            # Here and not by who waits for us: this thread takes the next disk at once.
            job.failed.append(plan.disk.key)
            job.cancel.set()


def copy_disk(plan: DiskPlan, job: CopyJob) -> Dict[str, Any]:
    """Make one disk's layer and hashes, under their final names, and record the disk as finished.

    :returns: the disk's entry for the manifest.
    :raises VadpError: with the disk's label; nothing unfinished stays.
    """
    started = time.monotonic()
    job.store.make_disk_folder(plan.disk.key)
    layer = job.store.layer_path(plan.disk.key, job.point)
    hashes = job.store.hashes_path(plan.disk.key, job.point)
    stage = job.context.stage_dir / f"disk-{plan.disk.key}" / f"{job.point}.vmdk"
    parts = [Path(f"{path}{PART}{job.run.run_id}") for path in (layer, hashes, stage)]
    named = [str(path.relative_to(job.store.path)) for path in [layer, hashes] + parts]
    intent = job.run.record("temporary_file", key=plan.disk.key, files=named)
    total = plan.disk.capacity_bytes if plan.areas is None else plan.areas.total_bytes
    progress = job.progress.disk(plan.disk.key, plan.disk.label, total)
    finished = False
    try:
        _remove(parts)
        result, reading, content_id = _copy_to_parts(plan, job, parts, progress)
        _remove(parts[2:])
        job.readings[plan.disk.key] = reading
        entry = _manifest_entry(plan, result, reading.transport)
        entry.update(content_id=content_id)
        entry.update(layer=dict(file_entry(parts[0]), file=layer.name))
        entry.update(hashes=dict(file_entry(parts[1]), file=hashes.name))
        entry.update(bytes_stored=entry["layer"]["size_bytes"], seconds=round(time.monotonic() - started, 3))
        for part, final in zip(parts, (layer, hashes)):
            os.replace(str(part), str(final))
        image.fsync_dir(str(layer.parent))
        job.run.finish_disk(plan.disk.key, entry)
        finished = True
        return entry
    except VadpError as error:
        name = f"disk '{plan.disk.label}' of {job.vm}"
        error.subject = f"{name}: {error.subject}" if error.subject else name
        raise
    finally:
        progress.finish("done" if finished else "failed")
        if not finished:
            _clean(job.run, intent, [*parts, layer, hashes])


@dataclass
class _Parts:
    """The files of one disk that are being filled. :param stage: for a transport that needs a file of its own."""

    layer: Path
    hashes: Path
    stage: Path
    writer: HashWriter


def _copy_to_parts(
    plan: DiskPlan, job: CopyJob, paths: Sequence[Path], progress: DiskProgress
) -> Tuple[CopyResult, Reading, str]:
    """Fill the layer and the hashes; both are complete and on the disk when this returns.

    :returns: the ID of their content too.
    """
    layer, hashes, stage = paths
    parts = _Parts(layer, hashes, stage, _begin(plan, job, layer, hashes))
    try:
        if plan.areas is not None and not plan.areas:
            # Nothing changed: an empty overlay says so, and no connection is needed for it.
            result, reading = CopyResult(), Reading(NOTHING_READ, "", plan.transport.reasons(), [])
        else:
            result, reading = _read_disk(plan, job, parts, progress)
        parts.writer.close()
        image.shrink_to(str(layer), plan.disk.capacity_bytes)
        image.fsync_file(str(layer))
    finally:
        parts.writer.discard()
    return result, reading, str(parts.writer.content_id)


def _begin(plan: DiskPlan, job: CopyJob, layer: Path, hashes: Path) -> HashWriter:
    """An empty layer, and what takes its hashes: with a content ID of its own, drawn now (proofs 15)."""
    backing = None
    if plan.parent is not None:
        backing = job.store.layer_path(plan.disk.key, plan.parent).name
    image.create_layer(str(layer), plan.disk.capacity_bytes, backing=backing)
    return HashWriter(str(hashes), plan.disk.capacity_bytes, content_id=new_content_id())


@dataclass
class _Attempt:
    """One try by one transport.

    :param areas: what it must read; None: all that holds data.
    :param begun: the disk is open, and its bytes may be on their way.
    :param last: no other transport can be tried after it.
    """

    candidate: Candidate
    areas: Optional[Extents]
    begun: bool = False
    last: bool = True


def _read_disk(plan: DiskPlan, job: CopyJob, parts: _Parts, progress: DiskProgress) -> Tuple[CopyResult, Reading]:
    """Read the disk by the first transport of its plan that does it.

    Where one fails in the middle, the next goes on behind what is safe: it reads the same snapshot.

    :raises VadpError: none could, or what failed was not the transport.
    """
    candidates = plan.transport.usable()
    failed: Dict[str, VadpError] = {}
    told: Dict[str, str] = {}
    areas, total = plan.areas, CopyResult()
    for number, candidate in enumerate(candidates):
        alike = next(
            (name for name, error in failed.items() if same_way_failed(candidate.transport, name, error)), None
        )
        if alike is not None:
            told[candidate.transport] = f"not tried: it goes the way of {alike}, which failed"
            continue
        attempt = _Attempt(candidate, areas, last=number + 1 == len(candidates))
        try:
            result = _read_by(attempt, plan, job, parts, progress)
        except VadpError as error:
            left = _left_to_read(error, attempt, plan, job)
            if left is None:
                raise
            failed[candidate.transport] = error
            if left.start_over:
                parts.writer.discard()
                parts.writer = _begin(plan, job, parts.layer, parts.hashes)
                areas, total = plan.areas, CopyResult()
            else:
                areas = left.areas
                _add(total, left.done)
            told[candidate.transport] = _failure_text(error, left)
            _remove([parts.stage])
            if number + 1 < len(candidates):
                continue
            break
        _add(total, result)
        if plan.areas is not None:
            total.areas = len(plan.areas)
        reasons = plan.transport.reasons(candidate.transport, told)
        return total, Reading(candidate.transport, candidate.method, reasons, list(candidate.notes))
    raise all_failed("read", failed)


def _read_by(attempt: _Attempt, plan: DiskPlan, job: CopyJob, parts: _Parts, progress: DiskProgress) -> CopyResult:
    request = job.request
    context = replace(job.context, on_wait=progress.wait)
    opening = open_disk(
        context,
        plan.disk,
        plan.facts,
        attempt.candidate,
        writable=False,
        stage=parts.stage,
        last=attempt.last,
        allocation=plan.areas is None,
    )

    whole = plan.disk.capacity_bytes if plan.areas is None else plan.areas.total_bytes
    before = 0 if attempt.areas is None else whole - attempt.areas.total_bytes

    def on_progress(done: int, total: int) -> None:
        progress.update(before + done, before + total)

    with opening as source, job.run.recorded(source.child):
        _check_size(plan, source)
        with image.serve(
            str(parts.layer), run_dir=job.run_dir, writable=True, compress=request.compression == "zstd"
        ) as target, job.run.recorded(target):
            attempt.begun = True
            try:
                return copy(
                    source.uri,
                    target.uri,
                    capacity_bytes=plan.disk.capacity_bytes,
                    areas=attempt.areas,
                    hashes=parts.writer,
                    on_progress=on_progress,
                    rate_limit=job.rate_limit,
                    io_timeout=request.io_timeout,
                    # A full layer has no parent whose data could shine through; an overlay must say what is zero now.
                    zeros="drop" if plan.mode == FULL else "write",
                    cancel=job.cancel,
                    **source.copy_options,
                )
            except DataPathError as error:
                raise _explained(error, source, target) from error


class _Left(NamedTuple):
    """What another transport must read after one failed."""

    areas: Optional[Extents]
    done: CopyResult
    start_over: bool


def _left_to_read(error: VadpError, attempt: _Attempt, plan: DiskPlan, job: CopyJob) -> Optional[_Left]:
    """What the next transport must read; None if it was not the transport that failed, and no other would help."""
    if job.cancel.is_set():
        return None
    if not attempt.begun:
        # Nothing was copied. A disk that can't be attached is vCenter's to refuse.
        refused = isinstance(error, (TransportError, VsphereError))
        return _Left(attempt.areas, CopyResult(), False) if refused else None
    cause = error if isinstance(error, DataPathError) else error.__cause__
    if not isinstance(cause, DataPathError) or cause.details.get("side") != "source":
        return None
    if cause.copied is None:
        return _Left(None, CopyResult(), True)
    whole = Extents.whole(plan.disk.capacity_bytes) if attempt.areas is None else attempt.areas
    return _Left(whole.subtract(cause.copied), cause.done or CopyResult(), False)


def _add(total: CopyResult, part: CopyResult) -> None:
    total.bytes_read += part.bytes_read
    total.bytes_written += part.bytes_written
    total.bytes_zero += part.bytes_zero
    total.areas += part.areas
    total.seconds += part.seconds


def _failure_text(error: VadpError, left: _Left) -> str:
    """Why a transport was left, for people."""
    reason = f"{error.what}: {error.reason}" if error.reason else error.what
    if left.start_over:
        return f"it broke, and all was read again: {reason}"
    if left.done.bytes_read:
        return f"it broke after {left.done.bytes_read} bytes, which were kept: {reason}"
    return f"it failed: {reason}"


def _check_size(plan: DiskPlan, source: Endpoint) -> None:
    if source.size_bytes != plan.disk.capacity_bytes:
        raise TransportError(
            "The disk has another size than its snapshot",
            subject=plan.disk.file,
            reason=f"{source.size_bytes} bytes are served, the snapshot says {plan.disk.capacity_bytes}",
            remedy="Make a new snapshot, and export from that",
        )


def _explained(error: DataPathError, source: Endpoint, target: Child) -> VadpError:
    """The reason that the log of the side that failed knows: NBD tells little more than EIO."""
    if error.details.get("side") == "source":
        return source.explain(error)
    if error.details.get("errno") in ("ENOSPC", "EDQUOT"):
        error.remedy = "Make room in the repository, and run again"
    if error.details.get("side") == "target" and not target.alive:
        error.reason = target.log_tail(5) or f"qemu-nbd ended with status {target.returncode}"
        error.remedy = "Run again; if it happens again, look at the system's log for what ended qemu-nbd"
    return error


def _manifest_entry(plan: DiskPlan, result: CopyResult, transport: str) -> Dict[str, Any]:
    disk = plan.disk
    return {
        "key": disk.key,
        "label": disk.label,
        "uuid": disk.uuid,
        "file": disk.file,
        "datastore": disk.datastore or None,
        "capacity_bytes": disk.capacity_bytes,
        "change_id": disk.change_id,
        "mode": plan.mode,
        "parent": plan.parent,
        "parent_content_id": plan.pin.content_id,
        "parent_layer_blake3": plan.pin.layer_blake3,
        "named_in_vm": plan.named_in_vm,
        "reason": plan.reason,
        "transport": transport,
        "bytes_read": result.bytes_read,
        "areas": result.areas,
    }


def _clean(run: Run, intent: int, paths: Sequence[Path]) -> None:
    """Leave nothing unfinished. What can't be removed now stays in the run's record for vadp_recover."""
    try:
        _remove(paths)
        run.done(intent)
    except (OSError, RepositoryError):
        # The failure that brought us here is the one to report.
        return


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
