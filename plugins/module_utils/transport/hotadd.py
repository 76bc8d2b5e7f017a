# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""HotAdd without VDDK: a disk of another VM is attached to the proxy VM, whose kernel then reads or writes it.

For reading it is attached nonpersistently, so that nothing that the proxy does can reach it. Writing needs a persistent
attachment of the leaf of a VM that is off: through the other kind it looks well and writes nothing (VADP facts 29). A
disk is only ever detached by removing the device, without a file operation: that would delete the file.

Two disks may have one UUID. Each change of the proxy names the version of its configuration that was looked at, so
that of two who attach such disks at once one is refused, wherever they run; it waits until the other has detached its
own (proofs 23). What is attached then is proved by the device itself, see :mod:`held_device`.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from ..datapath.processes import RuntimeDir
from ..errors import AuthenticationError, NotFoundError, TransportError, VadpError, VsphereError
from ..libraries import vim
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from ..vsphere.vm_keys import ConcurrentChange
from . import guard, scsi_units
from .endpoints import Endpoint, serve_nbdkit
from .guest_device import GuestDisk, delete_device, find_device, guest_disks, node_of, users_of, uuid_digits, wait_for
from .held_device import HeldDevice, hold
from .hotadd_plan import (
    MODES,
    READ,
    WRITE,
    Attachment,
    Plan,
    Situation,
    attachments_of,
    file_of,
    in_the_way,
    left_over,
    look,
    named,
    of_disk,
    plan_attach,
    same_uuid,
)
from .hotadd_proxy import (
    DEVICE_TIMEOUT,
    Patience,
    check_here,
    clear_device,
    in_turn,
    intent_of,
    is_intended,
    lock_of,
    read_proxy,
    reconfigure,
    settle,
)
from .planner import BY_ATTACHING

if TYPE_CHECKING:
    from ..repository.runs import Run

TRANSPORT = "hotadd"

_BY_HAND = "Detach it in the vSphere client, keeping its files, then run vadp_recover"
_LOOK_AGAIN_TRIES = 2
_LOOK_AGAIN_SECONDS = 1.0


# Called with what is about to be attached: returns a number; and again with that number and what has become known.
Record = Callable[..., int]


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
    patience: Optional[Patience] = None,
) -> List[Attachment]:
    """Attach disks to the proxy VM, which is this machine, find their devices, and prove that they are these.

    :param disks: as the snapshot's configuration has them, or for writing that of the VM.
    :param vm: whose disks they are.
    :param access: ``read`` or ``write``.
    :param record: called with what is about to be attached, for each disk that is not attached yet, and with what
        became known of it afterwards.
    :param timeout: seconds in which the devices must appear.
    :param fresh: refuse what is attached already, instead of using it.
    :param patience: how long another disk of the same UUID is waited for; without it not at all.
    :returns: in the order of *disks*.
    :raises TransportError: it can't be had, and why; what this call attached is detached again.
    """
    if len({uuid_digits(disk.uuid) for disk in disks}) < len(disks):
        raise TransportError(
            "The disks can't be attached to the proxy at the same time",
            subject=f"{named(disks)} of {vm}",
            reason="two of them have the same UUID",
            remedy="Attach one after the other",
        )
    job = _Job(session, proxy, vm, list(disks), access, device_dir, sysfs_dir, record, timeout, fresh)
    return (patience or Patience()).retry(lambda: _attach(job))


class _Job(NamedTuple):
    """What :func:`attach` was asked for."""

    session: Session
    proxy: VmRef
    vm: VmRef
    disks: List[Disk]
    access: str
    device_dir: str
    sysfs_dir: str
    record: Record
    timeout: float
    fresh: bool


def _attach(job: _Job) -> List[Attachment]:
    new: List[Attachment] = []
    try:
        with lock_of(job.proxy):
            there, new = _added(job)
        found = [_with_device(item, job) for item in there + new]
        for item in found:
            with hold_device(item, device_dir=job.device_dir, sysfs_dir=job.sysfs_dir):
                pass
        for item in found[len(there) :]:
            _check_guard(item, job.proxy, job.sysfs_dir)
    except BaseException as error:
        # This failure is the one to report.
        try:
            detach(
                job.session,
                job.proxy,
                new,
                sysfs_dir=job.sysfs_dir,
                device_dir=job.device_dir,
                timeout=DEVICE_TIMEOUT,
            )
        except VadpError as left:
            if isinstance(error, VadpError):
                error.remedy = f"{(error.remedy or '').rstrip('. ')}. The disk is still attached: {left}".lstrip(". ")
                error.details["passing"] = False
        raise
    by_file = {item.file: item for item in found}
    return [by_file[disk.file] for disk in job.disks]


def _added(job: _Job) -> Tuple[List[Attachment], List[Attachment]]:
    """Look, decide, and change the proxy if it is still what was looked at; else look again.

    :returns: what was attached already, and what is attached now.
    """
    recorded: Dict[str, int] = {}

    def once() -> Tuple[List[Attachment], List[Attachment]]:
        situation, plan = _look(job)
        if not plan.new:
            return plan.there, []
        if not recorded:
            check_here(job.session, job.proxy, job.sysfs_dir)
        for disk, place in zip(plan.new, _places(situation, plan.placement)):
            fields = dict(intent_of(job.session, job.proxy, job.vm, disk, job.access), **place)
            recorded[disk.file] = job.record(fields, recorded.get(disk.file))
        new = _add(job.session, situation, plan, job.access)
        try:
            for item in new:
                job.record({"device_key": item.device_key}, recorded[item.file])
        except BaseException:
            _remove(job.session, job.proxy, new)
            raise
        return plan.there, new

    return in_turn(once)


def _look(job: _Job) -> Tuple[Situation, Plan]:
    """What is there, and where the disks go."""
    looks = 0
    while True:
        situation = look(job.session, job.proxy, job.vm)
        try:
            return situation, _plan(job, situation)
        except TransportError as error:
            # A disk that was attached or detached between the look at vCenter and that at this machine.
            looks += 1
            if not error.details.get("look_again") or looks > _LOOK_AGAIN_TRIES:
                raise
        time.sleep(_LOOK_AGAIN_SECONDS)


def _plan(job: _Job, situation: Situation) -> Plan:
    """Where the disks go. Devices that are left over there are deleted, or another unit is taken (proofs 23)."""
    avoid: Set[int] = set()
    while True:
        guests = guest_disks(job.sysfs_dir)
        plan = plan_attach(job.session, situation, job.disks, job.access, guests, job.device_dir, job.fresh, avoid)
        if not plan.new:
            return plan
        for disk in plan.new:
            _clear_left_over(job, situation, guests, disk)
        blocked = {
            guest.address[2]
            for guest in in_the_way(situation, plan.placement, guest_disks(job.sysfs_dir))
            if not clear_device(guest, job.device_dir, job.sysfs_dir, job.timeout)
        }
        if not blocked:
            return plan
        avoid |= blocked


def _clear_left_over(job: _Job, situation: Situation, guests: Sequence[GuestDisk], disk: Disk) -> None:
    for guest in left_over(situation, guests, disk):
        if not clear_device(guest, job.device_dir, job.sysfs_dir, job.timeout):
            raise TransportError(
                "A device that was left over is in the way",
                subject=f"{guest.name} of '{disk.label}' ({disk.file})",
                reason=f"it can't be read, and does not go through {job.sysfs_dir}",
                remedy="Delete the device, or restart the proxy",
            )


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

    First the kernel forgets the devices, then vCenter removes them (VADP facts 29). Both happens only to what vCenter
    shows as it was attached: the device key, the file and the UUID.

    :param device_dir: None if the proxy is another machine.
    :param timeout: seconds in which the devices must go.
    :raises VadpError: a disk is in use on this machine, or vCenter refused.
    """
    if not attachments:
        return
    problem: Optional[TransportError] = None
    devices: List[GuestDisk] = []
    if device_dir is not None:
        devices = _devices_of(_going(session, proxy, attachments), sysfs_dir)
        _check_unused(devices, attachments, proxy, sysfs_dir)
        try:
            _delete_devices(devices, attachments, proxy, sysfs_dir, timeout)
        except TransportError as error:
            # The disk must be detached anyway, or its snapshot can't be removed.
            problem = error
    with lock_of(proxy):
        _remove(session, proxy, attachments)
    if device_dir is not None:
        known = guest_disks(sysfs_dir)
        left = [guest for guest in devices if guest in known]
        if left and problem is None:
            _delete_devices(left, attachments, proxy, sysfs_dir, timeout)
            left = [guest for guest in left if guest in guest_disks(sysfs_dir)]
        if left and problem is None:
            problem = TransportError(
                "The device of a detached disk does not go",
                subject=f"{named(attachments)}, proxy {proxy}",
                reason=f"{', '.join(guest.name for guest in left)} is still there after {timeout:g} s",
                remedy="Delete the device through /sys/class/block/NAME/device/delete, or restart the proxy",
            )
    if problem is not None:
        raise problem


def attached(session: Session, proxy: VmRef, files: Iterable[str]) -> List[Attachment]:
    """Which of these files the proxy has attached now, by what vCenter says."""
    return attachments_of(read_proxy(session, proxy).devices, files)


def hold_device(item: Attachment, *, device_dir: str, sysfs_dir: str) -> HeldDevice:
    """Open the device of an attached disk by the kernel's name, and prove that it is that disk.

    :raises TransportError: it is not.
    """
    node = None if item.guest is None else node_of(item.guest.name, device_dir)
    if item.guest is None or node is None or item.disk_uuid is None:
        raise TransportError("An attached disk has no device here", subject=named([item]), reason="it was not found")
    return hold(node, item.guest, disk_uuid=item.disk_uuid, capacity_bytes=item.capacity_bytes, sysfs_dir=sysfs_dir)


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
    patience: Optional[Patience] = None,
) -> Iterator[Endpoint]:
    """Serve one disk that is attached to this machine for as long as that takes.

    :param disk: as the snapshot's configuration has it; for writing, and for reading that back, as that of the VM.
    :param run: its record says what is attached, from before it is until it is not any more.
    :param vm: whose disk it is; that of the run if not given.
    :param patience: how long another disk of the same UUID is waited for; without it not at all.
    :raises TransportError: it can't be attached or opened, or was not the same disk to the end.
    """
    source = vm or find_vm(session, moid=run.data["vm_moid"])
    intents: List[int] = []

    def record(fields: Dict[str, Any], known: Optional[int] = None) -> int:
        if known is None:
            known = run.record("attachment", **fields)
            intents.append(known)
        else:
            run.update(known, **fields)
        return known

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
            patience=patience,
        )
        with hold_device(attachments[0], device_dir=device_dir, sysfs_dir=sysfs_dir) as device:
            # A line for each request would fill the disk with log.
            arguments = ["-D", "nbdkit.backend.datapath=0"] + ([] if writable else ["--readonly"])
            arguments += ["file", f"file={device.path}"]
            with serve_nbdkit(
                arguments,
                subject=disk.file,
                run_dir=run_dir,
                io_timeout=io_timeout,
                transport=TRANSPORT,
                method=BY_ATTACHING,
            ) as endpoint:
                device.check(sysfs_dir)  # nbdkit has opened it by its name
                yield endpoint
            device.check(sysfs_dir)
            _check_attached(session, proxy, attachments)
    except BaseException:
        with contextlib.suppress(VadpError):
            _end(session, proxy, disk, attachments, run, intents, sysfs_dir, device_dir)
        raise
    _end(session, proxy, disk, attachments, run, intents, sysfs_dir, device_dir)


def _check_attached(session: Session, proxy: VmRef, attachments: Sequence[Attachment]) -> None:
    """:raises TransportError: it is not attached any more as it was: what went through the device is not known."""
    if len(_going(session, proxy, attachments)) < len(attachments):
        raise TransportError(
            "The disk did not stay attached to the proxy",
            subject=f"{named(attachments)}, proxy {proxy}",
            reason="somebody detached it while it was used",
            remedy="See who does that, and run again",
            retryable=True,
        )


# Attaching


def _add(session: Session, situation: Situation, plan: Plan, access: str) -> List[Attachment]:
    """Add the disks to the proxy's hardware, in one request, and read back where they are.

    :raises ConcurrentChange: the proxy is not what it was when it was looked at; nothing was changed.
    """
    proxy = situation.proxy
    what = "The disk was not attached to the proxy"
    subject = f"{named(plan.new)} of {situation.vm}, proxy {proxy}"
    places = _places(situation, plan.placement)
    spec = _add_spec(plan.new, plan.placement, MODES[access], situation.change_version)

    def done() -> bool:
        there = _at(read_proxy(session, proxy).devices, plan.new, places)
        return len([item for item in there if item.mode == MODES[access]]) == len(plan.new)

    try:
        reconfigure(session, proxy, spec, what=what, subject=subject, done=done)
    except (AuthenticationError, NotFoundError, ConcurrentChange):
        raise
    except VsphereError as error:
        raise TransportError(
            what,
            subject=subject,
            reason=error.reason,
            remedy=error.remedy,
            retryable=error.retryable,
            details=dict(error.details, kind=type(error).__name__),
        ) from error
    return _read_back(session, proxy, plan.new, places, read_proxy(session, proxy).devices, subject)


def _places(situation: Situation, placement: scsi_units.Placement) -> List[Dict[str, int]]:
    """Where the disks go, as the guest sees it: controllers that do not exist yet have no key."""
    buses = {
        device.key: device.busNumber
        for device in situation.devices
        if isinstance(device, vim.vm.device.VirtualSCSIController)
    }
    buses.update({controller.key: controller.bus for controller in placement.controllers})
    return [{"bus": buses[slot.controller_key], "unit": slot.unit} for slot in placement.slots]


def _at(devices: List[Any], disks: Sequence[Disk], places: Sequence[Dict[str, int]]) -> List[Attachment]:
    """What is attached of these disks just there."""
    wanted = {disk.file: (place["bus"], place["unit"]) for disk, place in zip(disks, places)}
    return [item for item in attachments_of(devices, wanted) if (item.bus, item.unit) == wanted[item.file]]


def _read_back(
    session: Session,
    proxy: VmRef,
    disks: Sequence[Disk],
    places: Sequence[Dict[str, int]],
    devices: List[Any],
    subject: str,
) -> List[Attachment]:
    """The real keys. :raises TransportError: something else was attached, or also; ours are detached again."""
    there = {item.file: item for item in _at(devices, disks, places)}
    wrong = [
        disk
        for disk in disks
        if disk.file not in there or uuid_digits(there[disk.file].disk_uuid) != uuid_digits(disk.uuid)
    ]
    twins = [disk for disk in disks if len(same_uuid(devices, disk.uuid)) > 1]
    if not wrong and not twins:
        return [of_disk(there[disk.file], disk) for disk in disks]
    _remove(session, proxy, list(there.values()))
    if wrong:
        raise TransportError(
            "What was attached to the proxy is not the disk that was meant",
            subject=subject,
            reason=f"{named(wrong)} is not among the proxy's disks where it was attached, or has another UUID there",
            remedy="Look at the proxy's disks in the vSphere client; its datacenter may have a datastore of that name",
        )
    raise TransportError(
        "The disk can't be attached to the proxy",
        subject=subject,
        reason=f"somebody attached another disk of the UUID of {named(twins)} at the same time",
        remedy="Run again",
        retryable=True,
        details={"passing": True},
    )


def _add_spec(disks: Sequence[Disk], placement: scsi_units.Placement, mode: str, change_version: str) -> Any:
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
    return vim.vm.ConfigSpec(changeVersion=change_version, deviceChange=changes)


def _with_device(item: Attachment, job: _Job) -> Attachment:
    """Wait for the device, and for its link."""
    device_dir, timeout = job.device_dir, job.timeout
    found: List[GuestDisk] = []

    def ready() -> Optional[str]:
        found[:] = [guest for guest in guest_disks(job.sysfs_dir) if guest.digits == uuid_digits(item.disk_uuid)]
        link = find_device(device_dir, item.disk_uuid)
        if len(found) != 1 or link is None or not os.path.exists(link):
            return None
        return link if os.path.basename(os.path.realpath(link)) == found[0].name else None

    link = wait_for(ready, timeout)
    if link is not None and item.parallel and found[0].unit != item.unit:
        problem = f"{found[0].name} with its UUID is at unit {found[0].unit}, vCenter shows it at unit {item.unit}"
    elif link is None and len(found) > 1:
        problem = f"{', '.join(guest.name for guest in found)} have its UUID {item.disk_uuid}"
    else:
        problem = f"no link with its UUID {item.disk_uuid} came into {device_dir} within {timeout:g} s"
        if link is not None:
            return replace(item, device=link, guest=found[0])
    raise TransportError(
        "The disk that was attached does not appear on this machine",
        subject=f"{named([item])}, proxy {job.proxy}",
        reason=problem,
        remedy=f"See that this machine is the proxy '{job.proxy.name}', that disk.EnableUUID was set before it was"
        " started, and that udev runs",
    )


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


# Detaching


def _going(session: Session, proxy: VmRef, attachments: Sequence[Attachment]) -> List[Attachment]:
    """Those that vCenter still shows as they were attached."""
    there = read_proxy(session, proxy).devices
    return [item for item in attachments if _still(there, item)]


def _still(devices: Iterable[Any], item: Attachment) -> List[Any]:
    """The device on the proxy that an attachment is, if it is there: its key, its file and its UUID are the same."""
    return [
        device
        for device in devices
        if (device.key, file_of(device)) == (item.device_key, item.file)
        and uuid_digits(getattr(device.backing, "uuid", None)) == uuid_digits(item.disk_uuid)
    ]


def _remove(session: Session, proxy: VmRef, attachments: Sequence[Attachment]) -> None:
    """Remove the devices, if they are still what they were, without a file operation."""
    what, subject = "The disk was not detached from the proxy", f"{named(attachments)}, proxy {proxy}"
    Change = vim.vm.device.VirtualDeviceSpec

    def once() -> None:
        state = read_proxy(session, proxy)
        going = [device for item in attachments for device in _still(state.devices, item)]
        if going:
            changes = [Change(operation=Change.Operation.remove, device=device) for device in going]
            spec = vim.vm.ConfigSpec(changeVersion=state.change_version, deviceChange=changes)
            try:
                reconfigure(session, proxy, spec, what=what, subject=subject)
            except ConcurrentChange:
                raise
            except VsphereError as error:
                error.remedy = error.remedy or _BY_HAND
                raise

    in_turn(once)


def _devices_of(attachments: Sequence[Attachment], sysfs_dir: str) -> List[GuestDisk]:
    """The devices of attached disks on this machine: by their UUID, and by the unit where that tells the address."""
    return [
        guest
        for guest in guest_disks(sysfs_dir)
        for item in attachments
        if guest.digits is not None
        and guest.digits == uuid_digits(item.disk_uuid)
        and (not item.parallel or guest.unit == item.unit)
    ]


def _check_unused(
    devices: Sequence[GuestDisk], attachments: Sequence[Attachment], proxy: VmRef, sysfs_dir: str
) -> None:
    for guest in devices:
        users = users_of(guest.name, sysfs_dir)
        if users:
            raise TransportError(
                "The disk is in use on this machine, so it is not detached",
                subject=f"{named(attachments)}, {guest.name}, proxy {proxy}",
                reason="; ".join(users),
                remedy="End that use (umount, swapoff, vgchange -an, multipath -f), then run again",
            )


def _delete_devices(
    devices: Sequence[GuestDisk], attachments: Sequence[Attachment], proxy: VmRef, sysfs_dir: str, timeout: float
) -> None:
    for guest in devices:
        try:
            delete_device(guest.name, sysfs_dir, timeout)
        except TransportError as error:
            error.subject = f"{error.subject} ({named(attachments)}, proxy {proxy})"
            raise


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
        # It failed at whatever moment.
        settle(session, proxy)
        state = read_proxy(session, proxy)
        known = [intent for intent in run.intents("attachment") if intent["id"] in intents]
        attachments = [
            item
            for item in attachments_of(state.devices, [disk.file])
            if any(is_intended(item, intent, proxy, state, run.run_id) for intent in known)
        ]
    detach(session, proxy, attachments, sysfs_dir=sysfs_dir, device_dir=device_dir, timeout=DEVICE_TIMEOUT)
    for intent in intents:
        run.done(intent)
