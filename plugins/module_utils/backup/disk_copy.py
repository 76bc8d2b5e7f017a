# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a snapshot's disk to a finished layer of the repository; several disks at a time, bounded."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..datapath import image
from ..datapath.copier import CopyResult, copy
from ..datapath.hashes import HashWriter
from ..datapath.processes import Child, RuntimeDir
from ..datapath.progress import DiskProgress, Progress
from ..errors import DataPathError, RepositoryError, TransportError, VadpError
from ..repository.layout import PART, VmStore, file_entry
from ..repository.manifest import FULL
from ..repository.runs import Run
from ..transport.endpoints import Endpoint, open_vddk
from ..transport.vddk import Vddk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from .disk_plan import DiskPlan
from .request import ExportRequest

NOTHING_READ = "none"


@dataclass(frozen=True)
class CopyJob:
    """What the disks of one run have in common.

    :param cancel: set when a disk fails: the others stop.
    :param failed: device keys, the first that failed first.
    """

    session: Session
    vm: VmRef
    snapshot_moid: str
    store: VmStore
    run: Run
    point: str
    vddk: Vddk
    request: ExportRequest
    run_dir: RuntimeDir
    progress: Progress
    cancel: threading.Event
    rate_limit: Optional[int]
    failed: List[int] = field(default_factory=list)


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
    parts = [Path(f"{path}{PART}{job.run.run_id}") for path in (layer, hashes)]
    named = [str(path.relative_to(job.store.path)) for path in [layer, hashes] + parts]
    intent = job.run.record("temporary_file", key=plan.disk.key, files=named)
    total = plan.disk.capacity_bytes if plan.areas is None else plan.areas.total_bytes
    progress = job.progress.disk(plan.disk.key, plan.disk.label, total)
    finished = False
    try:
        _remove(parts)
        result, transport = _copy_to_parts(plan, job, parts[0], parts[1], progress)
        entry = _manifest_entry(plan, result, transport)
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


def _copy_to_parts(
    plan: DiskPlan, job: CopyJob, layer: Path, hashes: Path, progress: DiskProgress
) -> Tuple[CopyResult, str]:
    """Fill the layer and the hashes; both are complete and on the disk when this returns."""
    backing = None
    if plan.parent is not None:
        backing = job.store.layer_path(plan.disk.key, plan.parent).name
    image.create_layer(str(layer), plan.disk.capacity_bytes, backing=backing)
    with HashWriter(str(hashes), plan.disk.capacity_bytes) as writer:
        if plan.areas is not None and not plan.areas:
            # Nothing changed: an empty overlay says so, and no connection is needed for it.
            result, transport = CopyResult(0, 0, 0, 0, 0.0), NOTHING_READ
        else:
            result, transport = _read_disk(plan, job, layer, writer, progress)
        image.shrink_to(str(layer), plan.disk.capacity_bytes)
        image.fsync_file(str(layer))
    return result, transport


def _read_disk(
    plan: DiskPlan, job: CopyJob, layer: Path, writer: HashWriter, progress: DiskProgress
) -> Tuple[CopyResult, str]:
    request = job.request
    with open_vddk(
        job.session,
        job.vm,
        file=plan.disk.file,
        snapshot_moid=job.snapshot_moid,
        transports=[plan.transport.chosen],
        writable=False,
        vddk=job.vddk,
        nfc_port=request.nfc_port,
        run_dir=job.run_dir,
        io_timeout=request.io_timeout,
    ) as source, job.run.recorded(source.child):
        _check_size(plan, source)
        with image.serve(
            str(layer), run_dir=job.run_dir, writable=True, compress=request.compression == "zstd"
        ) as target, job.run.recorded(target):
            try:
                result = copy(
                    source.uri,
                    target.uri,
                    capacity_bytes=plan.disk.capacity_bytes,
                    areas=plan.areas,
                    hashes=writer,
                    on_progress=progress.update,
                    rate_limit=job.rate_limit,
                    io_timeout=request.io_timeout,
                    # A full layer has no parent whose data could shine through; an overlay must say what is zero now.
                    zeros="drop" if plan.mode == FULL else "write",
                    cancel=job.cancel,
                )
            except DataPathError as error:
                raise _explained(error, source, target) from error
        return result, source.transport


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
        # The failure that brought us here is the one to tell.
        return


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
