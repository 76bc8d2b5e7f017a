# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A disk as an endpoint, by the transport and the method that a plan names."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Iterator, List, Mapping, Optional

from ..datapath.processes import RuntimeDir
from ..errors import DataPathError, TransportError, VadpError
from . import budget
from .endpoints import LAN_MODES, Endpoint, open_vddk
from .hotadd import open_hotadd
from .hotadd_proxy import Patience
from .hotadd_reservation import intent_of_vddk, is_over, release, reserve
from .https import open_folder, open_lease
from .planner import BY_ATTACHING, BY_FOLDER, BY_LEASE, BY_VDDK, Candidate, DiskFacts, ProxyFacts
from .san import allow_list
from .vddk import Vddk

if TYPE_CHECKING:
    from ..repository.runs import Run
    from ..vsphere.disks import Disk
    from ..vsphere.inventory import VmRef
    from ..vsphere.session import Session

_HANDSHAKE = 14006

# Seconds that a disk waits for another one of its UUID to be detached from the proxy: where another transport may read
# it, and where none may.
TWIN_SECONDS = 60
LAST_TWIN_SECONDS = 3600


@dataclass
class OpenContext:
    """What the disks of a run have in common.

    :param snapshot_moid: the snapshot that is read; None for a VM without snapshots.
    :param proxy_vm: this machine, if it is a VM of the same vCenter.
    :param stage_dir: a folder for large temporary files, on the repository's file system.
    :param cancel: when it is set, waiting for a connection ends.
    :param on_wait: called with what is waited for before a disk can be opened.
    """

    session: Session
    vm: VmRef
    snapshot_moid: Optional[str]
    vddk: Optional[Vddk]
    proxy: ProxyFacts
    proxy_vm: Optional[VmRef]
    nfc_port: int
    io_timeout: int
    run_dir: RuntimeDir
    run: Run
    device_dir: str
    sysfs_dir: str
    wire_compression: str
    nfc_host_limit: Optional[int]
    stage_dir: Path
    cancel: Optional[threading.Event] = None
    on_wait: Optional[Callable[[str], None]] = None

    @classmethod
    def of(
        cls,
        request: Any,
        session: Session,
        vm: VmRef,
        proxy: ProxyFacts,
        run: Run,
        run_dir: RuntimeDir,
        stage_dir: Path,
        snapshot_moid: Optional[str] = None,
        cancel: Optional[threading.Event] = None,
    ) -> OpenContext:
        """With what a request says, see :mod:`.request`."""
        return cls(
            session=session,
            vm=vm,
            snapshot_moid=snapshot_moid,
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
            stage_dir=stage_dir,
            cancel=cancel,
        )


def open_disk(
    context: OpenContext,
    disk: Disk,
    facts: DiskFacts,
    candidate: Candidate,
    *,
    writable: bool,
    stage: Path,
    last: bool = True,
    allocation: bool = False,
) -> ContextManager[Endpoint]:
    """Serve one disk as *candidate* of its plan says; errors of opening surface when the context is entered.

    :param last: no other transport comes after this one, so what passes is waited for longer.
    :param stage: where a large temporary file of this disk may lie meanwhile.
    :param allocation: whoever reads asks for what is allocated; where change tracking has named what to read, nobody
        needs to, and VDDK's answers cost time.
    :raises TransportError: it can't be opened by this transport.
    """
    if candidate.method == BY_VDDK:
        return _by_vddk(context, disk, facts, candidate.transport, writable, last, allocation)
    if candidate.method == BY_ATTACHING:
        return _by_attaching(context, disk, writable, last)
    if candidate.method == BY_FOLDER and not writable:
        return _by_folder(context, disk)
    if candidate.method == BY_LEASE and not writable:
        return _by_lease(context, disk, stage)
    doing = "writes" if writable else "reads"
    raise TransportError(
        f"Nothing {doing} a disk by {candidate.transport} in this way",
        subject=disk.file,
        reason=candidate.method or "it has no method",
    )


@contextlib.contextmanager
def _by_vddk(
    context: OpenContext,
    disk: Disk,
    facts: DiskFacts,
    transport: str,
    writable: bool,
    last: bool,
    allocation: bool,
) -> Iterator[Endpoint]:
    if context.vddk is None:
        raise TransportError("VDDK is not there", subject=disk.file, reason=context.proxy.vddk_problem)
    extents = facts.datastore.extents if transport == "san" and facts.datastore is not None else ()
    with contextlib.ExitStack() as stack:
        slot, attached = None, None
        if transport == "hotadd" and context.proxy_vm is not None:
            attached = stack.enter_context(_VddkAttachment(context, context.proxy_vm, disk, writable, last))
        if transport in LAN_MODES:
            slot = stack.enter_context(_connection(context, context.vddk, facts))
        endpoint = stack.enter_context(
            open_vddk(
                context.session,
                context.vm,
                file=disk.file,
                snapshot_moid=context.snapshot_moid,
                transports=[transport],
                writable=writable,
                vddk=context.vddk,
                nfc_port=context.nfc_port,
                run_dir=context.run_dir,
                io_timeout=context.io_timeout,
                san_devices=allow_list(extents, context.proxy.luns),
                wire_compression=context.wire_compression,
                allocation=allocation,
            )
        )
        if slot is not None:
            slot.opened(endpoint)
        if attached is not None:
            attached.endpoint = endpoint
        yield endpoint


def _patience(context: OpenContext, last: bool) -> Patience:
    return Patience(LAST_TWIN_SECONDS if last else TWIN_SECONDS, context.cancel, context.on_wait)


class _VddkAttachment:
    """What VDDK attaches by itself: nobody of ours attaches another disk of that UUID meanwhile.

    It stands in the run's record, and its UUID is reserved on the proxy, until the server has ended in order and
    detached it.
    """

    def __init__(self, context: OpenContext, proxy: VmRef, disk: Disk, writable: bool, last: bool) -> None:
        self.endpoint: Optional[Endpoint] = None
        self._run = context.run
        fields = intent_of_vddk(context.session, proxy, context.vm, disk, writable)
        self._intent = context.run.record("attachment", **fields)
        self._proxy, self._disk, self._context, self._last = proxy, disk, context, last

    def __enter__(self) -> _VddkAttachment:
        context = self._context
        try:
            reserve(
                context.session,
                self._proxy,
                self._disk,
                vm=context.vm,
                run_id=self._run.run_id,
                device_dir=context.device_dir,
                sysfs_dir=context.sysfs_dir,
                patience=_patience(context, self._last),
            )
        except BaseException:
            # Nothing was attached; what may be reserved is taken back by whoever finds the record.
            with contextlib.suppress(VadpError):
                release(context.session, self._proxy, self._disk.uuid, self._run.run_id)
                self._run.done(self._intent)
            raise
        return self

    def __exit__(self, *_exc: Any) -> None:
        session = self._context.session
        with contextlib.suppress(VadpError):  # the record stays then, and the next recovery does it
            # A server that did not end in order may have left the disk attached.
            in_order = self.endpoint is not None and self.endpoint.child.returncode == 0
            if in_order or is_over(session, self._proxy, self._disk.uuid):
                release(session, self._proxy, self._disk.uuid, self._run.run_id)
                self._run.done(self._intent)


def serving_names(facts: DiskFacts, snapshot_moid: Optional[str]) -> List[str]:
    """The ESXi hosts that may serve a disk by nbd or nbdssl (VADP facts 19).

    Of a snapshot any host of the datastore may, without one it is the VM's own.
    """
    hosts = facts.datastore.hosts if facts.datastore is not None else ()
    own = facts.vm.host_moid if facts.vm is not None else None
    if snapshot_moid is None and any(host.moid == own for host in hosts):
        hosts = tuple(host for host in hosts if host.moid == own)
    return [host.name for host in hosts]


def _connection(context: OpenContext, vddk: Vddk, facts: DiskFacts) -> ContextManager[budget.Slot]:
    """The permission to open one more disk on the hosts that may serve this one (VADP facts 20)."""
    names = serving_names(facts, context.snapshot_moid) or [context.session.connection.hostname]
    return budget.for_disk(
        context.session,
        names,
        vddk,
        limit=context.nfc_host_limit,
        subject=facts.label,
        cancel=context.cancel,
        on_wait=context.on_wait,
    )


def _by_attaching(context: OpenContext, disk: Disk, writable: bool, last: bool) -> ContextManager[Endpoint]:
    if context.proxy_vm is None:
        raise TransportError(
            "The disk can't be hot-added",
            subject=disk.file,
            reason="this machine is not a virtual machine of this vCenter",
        )
    return open_hotadd(
        context.session,
        context.proxy_vm,
        disk,
        writable=writable,
        run=context.run,
        run_dir=context.run_dir,
        device_dir=context.device_dir,
        sysfs_dir=context.sysfs_dir,
        io_timeout=context.io_timeout,
        vm=context.vm,
        patience=_patience(context, last),
    )


def _by_folder(context: OpenContext, disk: Disk) -> ContextManager[Endpoint]:
    return open_folder(context.session, context.vm, disk, run_dir=context.run_dir, io_timeout=context.io_timeout)


def _by_lease(context: OpenContext, disk: Disk, stage: Path) -> ContextManager[Endpoint]:
    cancel = context.cancel

    def on_progress(done: int, total: int) -> None:
        if cancel is not None and cancel.is_set():
            raise DataPathError("The disk was not downloaded", subject=disk.file, reason="another disk failed")

    if context.snapshot_moid is None:
        raise TransportError("Only a snapshot is exported", subject=disk.file, reason="there is none")
    return open_lease(
        context.session,
        context.vm,
        context.snapshot_moid,
        disk,
        run=context.run,
        run_dir=context.run_dir,
        stage=stage,
        io_timeout=context.io_timeout,
        on_progress=on_progress,
    )


def same_way_failed(transport: str, failed: str, error: VadpError) -> bool:
    """Whether *transport* would meet what *failed* has met.

    nbdssl and nbd go to the same port of the same hosts with the same rights; what VDDK's log told of one is true for
    the other, but for what TLS is to blame for.
    """
    if transport not in LAN_MODES or failed not in LAN_MODES:
        return False
    finding = error.details.get("finding")
    return finding is not None and finding["code"] != _HANDSHAKE


def all_failed(doing: str, failed: Mapping[str, VadpError]) -> VadpError:
    """What to tell when the last transport failed too: of one, its own words.

    :param doing: read or written.
    :param failed: transport -> its error, in the order of the attempts; at least one.
    """
    errors = list(failed.values())
    if len(errors) == 1:
        return errors[0]
    return TransportError(
        f"The disk can't be {doing} by any of the transports",
        reason=" | ".join(f"{name}: {error.what}: {error.reason}" for name, error in failed.items()),
        remedy=next((error.remedy for error in errors if error.remedy), None),
        retryable=any(error.retryable for error in errors),
        details={**errors[0].details, "failures": {name: error.to_result() for name, error in failed.items()}},
    )
