# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""HotAdd without VDDK: a disk of another VM is attached to the proxy VM, whose kernel then reads or writes it.

For reading it is attached nonpersistently, so that nothing that the proxy does can reach it. Writing needs a persistent
attachment of the leaf of a VM that is off: through the other kind it looks well and writes nothing (VADP facts 29). A
disk is only ever detached by removing the device, without a file operation: that would delete the file.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

from ..datapath.processes import RuntimeDir
from ..errors import (
    AuthenticationError,
    ConnectionLostError,
    NotFoundError,
    TaskError,
    TransportError,
    VadpError,
    VsphereError,
)
from ..libraries import vim
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from . import guard, scsi_units
from .endpoints import Endpoint, serve_nbdkit
from .guest_device import delete_device, find_device, users_of, uuid_digits, wait_for_device
from .hotadd_plan import (
    MODES,
    READ,
    WRITE,
    Attachment,
    Plan,
    Situation,
    attachments_of,
    file_of,
    look,
    named,
    of_disk,
    plan_attach,
)
from .planner import BY_ATTACHING

if TYPE_CHECKING:
    from ..repository.runs import Run

TRANSPORT = "hotadd"

# Seconds that the kernel of the proxy may need to see a disk come or go.
DEVICE_TIMEOUT = 60
_TASK_TIMEOUT = 600
# Others attach disks to the same proxy at the same time: a unit that was free may be taken.
_PLACE_TRIES = 10
_REMOVE_TRIES = 3

_locks: Dict[str, threading.Lock] = {}
_locks_guard = threading.Lock()

Record = Callable[[Dict[str, Any]], int]


def attach(
    session: Session,
    proxy: VmRef,
    disks: Sequence[Disk],
    *,
    vm: VmRef,
    access: str,
    device_dir: str,
    sysfs_dir: str,
    record: Record,
    timeout: float,
    fresh: bool = False,
) -> List[Attachment]:
    """Attach disks to the proxy VM, which is this machine, and find their devices.

    :param disks: as the snapshot's configuration has them, or for writing that of the VM.
    :param vm: whose disks they are.
    :param access: ``read`` or ``write``.
    :param record: called with what is about to be attached, for each disk that is not attached yet.
    :param timeout: seconds in which the devices have to appear.
    :param fresh: refuse what is attached already, instead of using it.
    :returns: in the order of *disks*.
    :raises TransportError: it can't be had, and why; what this call attached is detached again.
    """
    new: List[Attachment] = []
    try:
        with _lock_of(proxy):
            situation = look(session, proxy, vm)
            plan = plan_attach(session, situation, disks, access, device_dir, fresh)
            if plan.new:
                _clear_dead_devices(plan.new, device_dir, sysfs_dir, timeout)
                for disk in plan.new:
                    record(_intent(proxy, vm, disk, access))
                new = _add(session, situation, plan, access)
        found = [_with_device(item, proxy, device_dir, timeout) for item in plan.there + new]
        for item in found[len(plan.there) :]:
            _check_guard(item, proxy, sysfs_dir)
    except BaseException as error:
        # This failure is the one to tell.
        try:
            detach(session, proxy, new, sysfs_dir=sysfs_dir, device_dir=device_dir, timeout=DEVICE_TIMEOUT)
        except VadpError as left:
            if isinstance(error, VadpError):
                error.remedy = f"{(error.remedy or '').rstrip('. ')}. The disk is still attached: {left}".lstrip(". ")
        raise
    by_file = {item.file: item for item in found}
    return [by_file[disk.file] for disk in disks]


def detach(
    session: Session,
    proxy: VmRef,
    attachments: Sequence[Attachment],
    *,
    sysfs_dir: str,
    device_dir: Optional[str],
    timeout: float,
) -> None:
    """Detach disks from the proxy VM; never a file operation. What is detached already is passed over.

    First the kernel forgets the devices, then vCenter removes them (VADP facts 29).

    :param device_dir: None if the proxy is another machine.
    :param timeout: seconds in which the devices have to go.
    :raises VadpError: a disk is in use on this machine, or vCenter refused.
    """
    if not attachments:
        return
    problem: Optional[TransportError] = None
    if device_dir is not None:
        _check_unused(attachments, proxy, device_dir, sysfs_dir)
        try:
            _delete_devices(attachments, proxy, device_dir, sysfs_dir, timeout)
        except TransportError as error:
            # The disk has to be detached all the same, or its snapshot can't be removed.
            problem = error
    with _lock_of(proxy):
        _remove(session, proxy, attachments)
    if device_dir is not None:
        _delete_devices(attachments, proxy, device_dir, sysfs_dir, timeout)
        left = [item for item in attachments if find_device(device_dir, item.disk_uuid)]
        if left and problem is None:
            problem = TransportError(
                "The device of a detached disk does not go",
                subject=f"{named(left)}, proxy {proxy}",
                reason=f"its link in {device_dir} is still there after {timeout:g} s, and {sysfs_dir} does not know it",
                remedy="Delete the device through /sys/class/block/NAME/device/delete, or restart the proxy",
            )
    if problem is not None:
        raise problem


def attached(session: Session, proxy: VmRef, files: Iterable[str]) -> List[Attachment]:
    """Which of these files the proxy has attached now, by what vCenter says."""
    devices = session.read(proxy.obj, "config.hardware.device")["config.hardware.device"]
    return attachments_of(devices or [], files)


@contextlib.contextmanager
def open_hotadd(
    session: Session,
    proxy: VmRef,
    disk: Disk,
    *,
    writable: bool,
    run: Run,
    run_dir: RuntimeDir,
    device_dir: str,
    sysfs_dir: str,
    io_timeout: int,
    vm: Optional[VmRef] = None,
) -> Iterator[Endpoint]:
    """Serve one disk that is attached to this machine for as long as that takes.

    :param disk: as the snapshot's configuration has it; for writing, and for reading that back, as that of the VM.
    :param run: its record says what is attached, from before it is until it is not any more.
    :param vm: whose disk it is; that of the run if not given.
    :raises TransportError: it can't be attached or opened.
    """
    source = vm or find_vm(session, moid=run.data["vm_moid"])
    intents: List[int] = []

    def record(fields: Dict[str, Any]) -> int:
        intents.append(run.record("attachment", **fields))
        return intents[-1]

    attachments: List[Attachment] = []
    try:
        attachments = attach(
            session,
            proxy,
            [disk],
            vm=source,
            access=WRITE if writable else READ,
            device_dir=device_dir,
            sysfs_dir=sysfs_dir,
            record=record,
            timeout=min(DEVICE_TIMEOUT, io_timeout),
            fresh=True,
        )
        # A line for each request would fill the disk with log.
        arguments = ["-D", "nbdkit.backend.datapath=0"] + ([] if writable else ["--readonly"])
        arguments += ["file", f"file={attachments[0].device}"]
        with serve_nbdkit(
            arguments,
            subject=disk.file,
            run_dir=run_dir,
            io_timeout=io_timeout,
            transport=TRANSPORT,
            method=BY_ATTACHING,
        ) as endpoint:
            yield endpoint
    except BaseException:
        with contextlib.suppress(VadpError):
            _end(session, proxy, disk, attachments, run, intents, sysfs_dir, device_dir)
        raise
    _end(session, proxy, disk, attachments, run, intents, sysfs_dir, device_dir)


def recover(session: Session, run: Run, *, sysfs_dir: str, device_dir: str, check_mode: bool) -> List[Dict[str, Any]]:
    """Detach what a crashed run left attached, by its record: only what it was about to attach, the way it was.

    The devices of a proxy that is another machine can't be deleted from here.

    :returns: [{what, id, action}].
    """
    found: List[Dict[str, Any]] = []
    devices = device_dir if run.data["host"] == socket.gethostname() else None
    for intent in run.intents("attachment"):
        try:
            proxy = find_vm(session, moid=str(intent["proxy_moid"]))
        except NotFoundError:
            proxy = None  # it is gone, and what was attached to it with it
        left: List[Attachment] = []
        if proxy is not None:
            if not check_mode:
                # vCenter goes on with what it was told before the crash.
                _settle(session, proxy)
            left = [item for item in attached(session, proxy, [intent["file"]]) if _is_intended(item, intent)]
            if not check_mode:
                detach(session, proxy, left, sysfs_dir=sysfs_dir, device_dir=devices, timeout=DEVICE_TIMEOUT)
            action = "would be detached" if check_mode else "detached"
            found += [{"what": "attachment", "id": f"{item.file} at {proxy}", "action": action} for item in left]
        if not check_mode:
            run.done(intent["id"])
    return found


def _is_intended(item: Attachment, intent: Dict[str, Any]) -> bool:
    same = uuid_digits(item.disk_uuid) == uuid_digits(intent.get("disk_uuid"))
    return same and item.mode == MODES.get(str(intent.get("access")))


def _add(session: Session, situation: Situation, plan: Plan, access: str) -> List[Attachment]:
    """Add the disks to the proxy's hardware, in one request, and read back where they are."""
    proxy, files = situation.proxy, [disk.file for disk in plan.new]
    what = "The disk was not attached to the proxy"
    subject = f"{named(plan.new)} of {situation.vm}, proxy {proxy}"
    placement: Optional[scsi_units.Placement] = plan.placement
    for last in [False] * (_PLACE_TRIES - 1) + [True]:
        if placement is None:
            raise TransportError(what, subject=subject, reason="others took its last free SCSI units meanwhile")
        try:
            session.run_task(
                proxy.obj.ReconfigVM_Task,
                _add_spec(plan.new, placement, MODES[access]),
                what=what,
                subject=subject,
                timeout=_TASK_TIMEOUT,
            )
            devices = _devices(session, proxy)
            break
        except (AuthenticationError, NotFoundError):
            raise
        except VsphereError as error:
            lost = isinstance(error, ConnectionLostError)
            if lost:
                _settle(session, proxy)
            devices = _devices(session, proxy)
            if lost and len(attachments_of(devices, files)) == len(files):
                break
            if last or not (lost or _was_taken(devices, placement)):
                raise TransportError(
                    what,
                    subject=subject,
                    reason=error.reason,
                    remedy=error.remedy,
                    retryable=error.retryable,
                    details=dict(error.details, kind=type(error).__name__),
                ) from error
            placement = scsi_units.place(devices, len(files))
    return _read_back(session, proxy, plan.new, devices, subject)


def _was_taken(devices: List[Any], placement: scsi_units.Placement) -> bool:
    """Whether somebody else has a unit or a bus that this request asked for."""
    units = {(device.controllerKey, device.unitNumber) for device in devices}
    buses = {device.busNumber for device in devices if isinstance(device, vim.vm.device.VirtualSCSIController)}
    return any(tuple(slot) in units for slot in placement.slots) or any(
        controller.bus in buses for controller in placement.controllers
    )


def _read_back(
    session: Session, proxy: VmRef, disks: Sequence[Disk], devices: List[Any], subject: str
) -> List[Attachment]:
    """The real keys and units. :raises TransportError: something else was attached; it is detached again."""
    there = {item.file: item for item in attachments_of(devices, [disk.file for disk in disks])}
    wrong = [
        disk
        for disk in disks
        if disk.file not in there or uuid_digits(there[disk.file].disk_uuid) not in (None, uuid_digits(disk.uuid))
    ]
    if wrong:
        with contextlib.suppress(VadpError):
            _remove(session, proxy, list(there.values()))
        raise TransportError(
            "What was attached to the proxy is not the disk that was meant",
            subject=subject,
            reason=f"{named(wrong)} is not among the proxy's disks, or has another UUID there",
            remedy="Look at the proxy's disks in the vSphere client; its datacenter may have a datastore of that name",
        )
    return [of_disk(there[disk.file], disk) for disk in disks]


def _add_spec(disks: Sequence[Disk], placement: scsi_units.Placement, mode: str) -> Any:
    Change = vim.vm.device.VirtualDeviceSpec
    changes = [
        Change(
            operation=Change.Operation.add,
            device=vim.vm.device.ParaVirtualSCSIController(
                key=controller.key,
                busNumber=controller.bus,
                sharedBus=vim.vm.device.VirtualSCSIController.Sharing.noSharing,
            ),
        )
        for controller in placement.controllers
    ]
    for number, (disk, slot) in enumerate(zip(disks, placement.slots)):
        changes.append(
            Change(
                operation=Change.Operation.add,
                device=vim.vm.device.VirtualDisk(
                    key=-101 - number,
                    controllerKey=slot.controller_key,
                    unitNumber=slot.unit,
                    capacityInKB=disk.capacity_bytes // 1024,
                    backing=vim.vm.device.VirtualDisk.FlatVer2BackingInfo(fileName=disk.file, diskMode=mode),
                ),
            )
        )
    return vim.vm.ConfigSpec(deviceChange=changes)


def _with_device(item: Attachment, proxy: VmRef, device_dir: str, timeout: float) -> Attachment:
    device = wait_for_device(device_dir, item.disk_uuid, timeout)
    if device is None:
        raise TransportError(
            "The disk that was attached does not appear on this machine",
            subject=f"{named([item])}, proxy {proxy}",
            reason=f"no link with its UUID {item.disk_uuid} came into {device_dir} within {timeout:g} s",
            remedy=f"See that this machine is the proxy '{proxy.name}', that disk.EnableUUID was set before it was"
            " started, and that udev runs",
        )
    return Attachment(**dict(vars(item), device=device))


def _check_guard(item: Attachment, proxy: VmRef, sysfs_dir: str) -> None:
    reasons = guard.problems(str(item.device), sysfs_dir=sysfs_dir)
    if reasons:
        raise TransportError(
            "This machine's own system touches the disk that was attached",
            subject=f"{named([item])}, {item.device}, proxy {proxy}",
            reason="; ".join(reasons),
            remedy="Run role backup_proxy on the proxy: it keeps LVM, RAID and automatic mounts away from such disks",
            details={"problems": reasons},
        )


def _intent(proxy: VmRef, vm: VmRef, disk: Disk, access: str) -> Dict[str, Any]:
    return {
        "proxy_moid": proxy.moid,
        "file": disk.file,
        "disk_uuid": disk.uuid,
        "vm_moid": vm.moid,
        "access": access,
    }


# Detaching


def _remove(session: Session, proxy: VmRef, attachments: Sequence[Attachment]) -> None:
    """Remove the devices, if they are still what they were, without a file operation."""
    what, subject = "The disk was not detached from the proxy", f"{named(attachments)}, proxy {proxy}"
    wanted = {(item.device_key, item.file) for item in attachments}
    Change = vim.vm.device.VirtualDeviceSpec
    for last in [False] * (_REMOVE_TRIES - 1) + [True]:
        going = [device for device in _devices(session, proxy) if (device.key, file_of(device)) in wanted]
        if not going:
            return
        changes = [Change(operation=Change.Operation.remove, device=device) for device in going]
        spec = vim.vm.ConfigSpec(deviceChange=changes)
        try:
            session.run_task(proxy.obj.ReconfigVM_Task, spec, what=what, subject=subject, timeout=_TASK_TIMEOUT)
            return
        except ConnectionLostError:
            if last:
                raise
            _settle(session, proxy)
        except VsphereError as error:
            error.remedy = error.remedy or "Detach it in the vSphere client, keeping its files, then run vadp_recover"
            raise


def _check_unused(attachments: Sequence[Attachment], proxy: VmRef, device_dir: str, sysfs_dir: str) -> None:
    for item in attachments:
        link = find_device(device_dir, item.disk_uuid)
        users = users_of(link, sysfs_dir) if link is not None else []
        if users:
            raise TransportError(
                "The disk is in use on this machine, so it is not detached",
                subject=f"{named([item])}, {link}, proxy {proxy}",
                reason="; ".join(users),
                remedy="End that use (umount, swapoff, vgchange -an, multipath -f), then run again",
            )


def _delete_devices(
    attachments: Sequence[Attachment], proxy: VmRef, device_dir: str, sysfs_dir: str, timeout: float
) -> None:
    for item in attachments:
        link = find_device(device_dir, item.disk_uuid)
        if link is not None:
            try:
                delete_device(link, sysfs_dir, timeout)
            except TransportError as error:
                error.subject = f"{error.subject} ({named([item])}, proxy {proxy})"
                raise


def _clear_dead_devices(disks: Sequence[Disk], device_dir: str, sysfs_dir: str, timeout: float) -> None:
    """A device that stayed when its disk was detached would be taken for the one that is attached now."""
    for disk in disks:
        link = find_device(device_dir, disk.uuid)
        if link is not None and not delete_device(link, sysfs_dir, timeout):
            raise TransportError(
                "A device that was left over is in the way",
                subject=f"{link} of '{disk.label}' ({disk.file})",
                reason=f"it can't be read, and does not go through {sysfs_dir}",
                remedy="Delete the device, or restart the proxy",
            )


def _end(
    session: Session,
    proxy: VmRef,
    disk: Disk,
    attachments: Sequence[Attachment],
    run: Run,
    intents: Sequence[int],
    sysfs_dir: str,
    device_dir: str,
) -> None:
    """Detach, and take it out of the run's record. A record of what may still be attached stays for a recovery."""
    if not intents:
        return
    if not attachments:
        # It failed at whatever moment; nobody had attached this file before.
        _settle(session, proxy)
        attachments = attached(session, proxy, [disk.file])
    detach(session, proxy, attachments, sysfs_dir=sysfs_dir, device_dir=device_dir, timeout=DEVICE_TIMEOUT)
    for intent in intents:
        run.done(intent)


# vCenter


def _devices(session: Session, proxy: VmRef) -> List[Any]:
    return list(session.read(proxy.obj, "config.hardware.device")["config.hardware.device"] or [])


def _settle(session: Session, proxy: VmRef) -> None:
    """Wait for changes of the proxy's hardware that vCenter is still at work on."""
    for task in session.read(proxy.obj, "recentTask")["recentTask"] or []:
        with contextlib.suppress(NotFoundError, TaskError):
            facts = session.read(task, "info.state", "info.descriptionId")
            if facts["info.descriptionId"] == "VirtualMachine.reconfigure" and facts["info.state"] in (
                "queued",
                "running",
            ):
                session.wait(task, what="A change of the proxy did not end", subject=str(proxy), timeout=_TASK_TIMEOUT)


def _lock_of(proxy: VmRef) -> threading.Lock:
    """Threads of this process attach and detach one after the other: fewer refusals, no race for units."""
    with _locks_guard:
        return _locks.setdefault(proxy.moid, threading.Lock())
