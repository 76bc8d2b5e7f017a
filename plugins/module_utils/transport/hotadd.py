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
import random
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set

from ..datapath.processes import RuntimeDir
from ..errors import (
    AmbiguousError,
    AuthenticationError,
    DataPathError,
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
from ..vsphere.vm_keys import ConcurrentChange, compare_and_set
from . import guard, scsi_units
from .endpoints import Endpoint, serve_nbdkit
from .guest_device import GuestDisk, delete_device, find_device, guest_disks, node_of, users_of, uuid_digits, wait_for
from .held_device import HeldDevice, hold, is_dead
from .hotadd_plan import (
    MODES,
    READ,
    RESERVATION_FORMAT,
    RESERVATION_KEY,
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
    reservations_of,
    same_uuid,
    same_uuid_obstacles,
)
from .planner import BY_ATTACHING, BY_VDDK
from .proxy import ProxyIdentity

if TYPE_CHECKING:
    from ..repository.runs import Run

TRANSPORT = "hotadd"

# Seconds that the kernel of the proxy may need to see a disk come or go.
DEVICE_TIMEOUT = 60
_TASK_TIMEOUT = 600
# Others attach and detach disks of the same proxy at the same time: each of them that succeeds makes one try in vain.
_TRIES = 40
_LOOK_AGAIN_TRIES = 2
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 10.0

_locks: Dict[str, threading.Lock] = {}
_locks_guard = threading.Lock()

# Called with what is about to be attached: returns a number; and again with that number and what has become known.
Record = Callable[..., int]


class Patience:
    """How long somebody waits for others who have a disk of the same UUID attached to this proxy.

    :param seconds: at most; 0 is not to wait.
    :param cancel: when it is set, waiting ends.
    :param on_wait: called with what is waited for.
    """

    def __init__(
        self,
        seconds: float = 0,
        cancel: Optional[threading.Event] = None,
        on_wait: Optional[Callable[[str], None]] = None,
    ) -> None:
        self._cancel = cancel or threading.Event()
        self._on_wait = on_wait
        self._deadline = time.monotonic() + seconds
        self._pause = _PAUSE_SECONDS

    def after(self, error: TransportError) -> None:
        """Wait for a while. :raises TransportError: *error*, where it does not pass, or has not passed in time."""
        left = self._deadline - time.monotonic()
        if not error.details.get("passing") or left <= 0:
            raise error
        if self._on_wait is not None:
            self._on_wait("a disk of the same UUID that is attached to the proxy")
        if self._cancel.wait(min(self._pause, left)):
            raise DataPathError(
                "The disk was not attached", subject=error.subject, reason="another disk failed meanwhile"
            ) from error
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)


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
    :param timeout: seconds in which the devices have to appear.
    :param fresh: refuse what is attached already, instead of using it.
    :param patience: how long another disk of the same UUID is waited for; without it not at all.
    :returns: in the order of *disks*.
    :raises TransportError: it can't be had, and why; what this call attached is detached again.
    """
    patience = patience or Patience()
    if len({uuid_digits(disk.uuid) for disk in disks}) < len(disks):
        raise TransportError(
            "The disks can't be attached to the proxy at the same time",
            subject=f"{named(disks)} of {vm}",
            reason="two of them have the same UUID",
            remedy="Attach one after the other",
        )
    while True:
        try:
            return _attach(session, proxy, disks, vm, access, device_dir, sysfs_dir, record, timeout, fresh)
        except TransportError as error:
            patience.after(error)


def _attach(
    session: Session,
    proxy: VmRef,
    disks: Sequence[Disk],
    vm: VmRef,
    access: str,
    device_dir: str,
    sysfs_dir: str,
    record: Record,
    timeout: float,
    fresh: bool,
) -> List[Attachment]:
    new: List[Attachment] = []
    try:
        with _lock_of(proxy):
            plan, new = _added(session, proxy, disks, vm, access, device_dir, sysfs_dir, record, timeout, fresh)
        found = [_with_device(item, proxy, device_dir, sysfs_dir, timeout) for item in plan.there + new]
        for item in found:
            with hold_device(item, device_dir=device_dir, sysfs_dir=sysfs_dir):
                pass
        for item in found[len(plan.there) :]:
            _check_guard(item, proxy, sysfs_dir)
    except BaseException as error:
        # This failure is the one to tell.
        try:
            detach(session, proxy, new, sysfs_dir=sysfs_dir, device_dir=device_dir, timeout=DEVICE_TIMEOUT)
        except VadpError as left:
            if isinstance(error, VadpError):
                error.remedy = f"{(error.remedy or '').rstrip('. ')}. The disk is still attached: {left}".lstrip(". ")
                error.details["passing"] = False
        raise
    by_file = {item.file: item for item in found}
    return [by_file[disk.file] for disk in disks]


def _added(
    session: Session,
    proxy: VmRef,
    disks: Sequence[Disk],
    vm: VmRef,
    access: str,
    device_dir: str,
    sysfs_dir: str,
    record: Record,
    timeout: float,
    fresh: bool,
) -> Any:
    """Look, decide, and change the proxy if it is still what was looked at; else look again. (Plan, [Attachment])."""
    recorded: Dict[str, int] = {}
    looked = 0
    for last in [False] * (_TRIES - 1) + [True]:
        situation = look(session, proxy, vm)
        try:
            plan = _plan(session, situation, disks, access, device_dir, sysfs_dir, fresh, timeout)
        except TransportError as error:
            # A disk that was attached or detached between the look at vCenter and that at this machine.
            looked += 1
            if not error.details.get("look_again") or looked > _LOOK_AGAIN_TRIES:
                raise
            time.sleep(_PAUSE_SECONDS)
            continue
        if not plan.new:
            return plan, []
        if not recorded:
            check_here(session, proxy, sysfs_dir)
        for disk, place in zip(plan.new, _places(situation, plan.placement)):
            fields = dict(_intent(session, proxy, vm, disk, access), **place)
            recorded[disk.file] = record(fields, recorded.get(disk.file))
        try:
            new = _add(session, situation, plan, access)
        except ConcurrentChange:
            if last:
                raise
            time.sleep(random.uniform(0, _PAUSE_SECONDS))
            continue
        try:
            for item in new:
                record({"device_key": item.device_key}, recorded[item.file])
        except BaseException:
            _remove(session, proxy, new)
            raise
        return plan, new
    raise AssertionError("the last try returns or raises")


def _plan(
    session: Session,
    situation: Situation,
    disks: Sequence[Disk],
    access: str,
    device_dir: str,
    sysfs_dir: str,
    fresh: bool,
    timeout: float,
) -> Plan:
    """Where the disks go. Devices that are left over there are deleted, or another unit is taken (proofs 23)."""
    avoid: Set[int] = set()
    while True:
        guests = guest_disks(sysfs_dir)
        plan = plan_attach(session, situation, disks, access, guests, device_dir, fresh, avoid)
        if not plan.new:
            return plan
        for disk in plan.new:
            for guest in left_over(situation, guests, disk):
                if not _clear(guest, device_dir, sysfs_dir, timeout):
                    raise TransportError(
                        "A device that was left over is in the way",
                        subject=f"{guest.name} of '{disk.label}' ({disk.file})",
                        reason=f"it can't be read, and does not go through {sysfs_dir}",
                        remedy="Delete the device, or restart the proxy",
                    )
        blocked = {
            guest.address[2]
            for guest in in_the_way(situation, plan.placement, guest_disks(sysfs_dir))
            if not _clear(guest, device_dir, sysfs_dir, timeout)
        }
        if not blocked:
            return plan
        avoid |= blocked


def _clear(guest: GuestDisk, device_dir: str, sysfs_dir: str, timeout: float) -> bool:
    """Delete a device that vCenter does not list, if it is a virtual disk that does not answer and nobody uses.

    :returns: whether it has gone.
    """
    node = node_of(guest.name, device_dir)
    if not guest.virtual or node is None or not is_dead(node, guest.digits) or users_of(guest.name, sysfs_dir):
        return False
    return delete_device(guest.name, sysfs_dir, timeout)


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
    :param timeout: seconds in which the devices have to go.
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
            # The disk has to be detached all the same, or its snapshot can't be removed.
            problem = error
    with _lock_of(proxy):
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
    return attachments_of(_read_proxy(session, proxy).devices, files)


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


def recover(session: Session, run: Run, *, sysfs_dir: str, device_dir: str, check_mode: bool) -> List[Dict[str, Any]]:
    """Detach what a crashed run left attached: only what its record names and vCenter shows just so (proofs 9).

    Any proxy does it for another. The devices of a proxy that is another machine can't be deleted from here.

    :returns: [{what, id, action}]; what is not proved to be ours is left, and the action says so.
    """
    found: List[Dict[str, Any]] = []
    for intent in run.intents("attachment"):
        proxy = _proxy_of(session, intent)
        if proxy is None:
            if _is_gone(session, intent):
                if not check_mode:
                    run.done(intent["id"])
            else:
                found.append(_left(f"{intent['file']} at {intent['proxy_moid']}", "that proxy is not in this vCenter"))
            continue
        if not check_mode:
            # vCenter goes on with what it was told before the crash.
            _settle(session, proxy)
        state = _read_proxy(session, proxy)
        there = attachments_of(state.devices, [str(intent["file"])])
        ours = [item for item in there if _is_intended(item, intent, proxy, state, run.run_id)]
        if not check_mode:
            devices = device_dir if ours and _is_here(session, proxy, sysfs_dir) else None
            detach(session, proxy, ours, sysfs_dir=sysfs_dir, device_dir=devices, timeout=DEVICE_TIMEOUT)
            release(session, proxy, intent.get("disk_uuid"), run.run_id)
            if ours == there:
                run.done(intent["id"])
        action = "would be detached" if check_mode else "detached"
        found += [{"what": "attachment", "id": f"{item.file} at {proxy}", "action": action} for item in ours]
        found += [
            _left(f"{item.file} at {proxy}", "the record does not prove that it is this run's")
            for item in there
            if item not in ours
        ]
    return found


def _left(identity: str, reason: str) -> Dict[str, Any]:
    action = f"left: {reason}; if no backup uses it, detach it with proxy_hotadd and state=detached"
    return {"what": "attachment", "id": identity, "action": action}


def _proxy_of(session: Session, intent: Dict[str, Any]) -> Optional[VmRef]:
    """The proxy that a record names, if vCenter has it; under another moid where it was registered anew."""
    uuid = intent.get("proxy_uuid")
    try:
        proxy = find_vm(session, moid=str(intent["proxy_moid"]))
        if not uuid or proxy.instance_uuid == uuid:
            return proxy
    except NotFoundError:
        pass
    try:
        return find_vm(session, uuid=str(uuid), use_instance_uuid=True) if uuid else None
    except NotFoundError:
        return None


def _is_gone(session: Session, intent: Dict[str, Any]) -> bool:
    """Whether a proxy that is not there was of this vCenter: then what was attached to it went with it."""
    return intent.get("server_uuid") in (None, session.about.instanceUuid)


def _is_intended(item: Attachment, intent: Dict[str, Any], proxy: VmRef, state: _ProxyState, run_id: str) -> bool:
    """Whether vCenter shows just what the record names (proofs 9).

    Where the crash came before the device key was known, the unit that was asked for stands for it. VDDK chooses the
    unit: that the UUID is reserved for this run stands for it.
    """
    digits = uuid_digits(item.disk_uuid)
    if (
        digits is None
        or digits != uuid_digits(intent.get("disk_uuid"))
        or item.mode != MODES.get(str(intent.get("access")))
        or (intent.get("proxy_moid"), intent.get("proxy_uuid")) != (proxy.moid, proxy.instance_uuid)
    ):
        return False
    if intent.get("method") == BY_VDDK:
        return state.reservations.get(digits) == run_id.lower()
    if intent.get("device_key") is not None:
        return item.device_key == intent["device_key"]
    return item.bus is not None and (item.bus, item.unit) == (intent.get("bus"), intent.get("unit"))


def _is_here(session: Session, proxy: VmRef, sysfs_dir: str) -> bool:
    """Whether this machine is that proxy: only then its devices may be deleted. Unknown is no."""
    here = _here(session, sysfs_dir)
    return here is not None and here.moid == proxy.moid


def check_here(session: Session, proxy: VmRef, sysfs_dir: str) -> None:
    """:raises TransportError: this machine is another virtual machine than the proxy that was named.

    A device here that has the UUID may be another disk, which this machine has attached.
    """
    here = _here(session, sysfs_dir)
    if here is not None and here.moid != proxy.moid:
        raise TransportError(
            "The devices of the proxy's disks are not on this machine",
            subject=f"proxy {proxy}",
            reason=f"this machine is {here}",
            remedy="Name the virtual machine that this runs on as the proxy, or none",
        )


def is_elsewhere(session: Session, proxy: VmRef, sysfs_dir: str) -> bool:
    """Whether the proxy is known to be another machine than this one."""
    here = _here(session, sysfs_dir)
    return here is not None and here.moid != proxy.moid


def _here(session: Session, sysfs_dir: str) -> Optional[VmRef]:
    """The virtual machine that this machine is; None where that can't be told."""
    try:
        return ProxyIdentity.find(session, sysfs_dir=sysfs_dir)[0]
    except AmbiguousError:
        return None


# VDDK's own HotAdd


def reserve(
    session: Session,
    proxy: VmRef,
    disk: Disk,
    *,
    vm: VmRef,
    run_id: str,
    device_dir: str,
    sysfs_dir: str,
    patience: Optional[Patience] = None,
) -> None:
    """Until :func:`release` nobody of ours attaches another disk of this UUID to the proxy.

    VDDK attaches the disk and finds its device by itself, perhaps more than once. So the UUID is reserved on the
    proxy, in an advanced parameter that is written only if the proxy still is what was looked at (proofs 23).

    :raises TransportError: another disk of that UUID is attached to the proxy or reserved, for longer than *patience*.
    :raises PrivilegeError: the user may not write that parameter.
    """
    patience = patience or Patience()
    while True:
        try:
            _reserve(session, proxy, disk, vm, run_id, device_dir, sysfs_dir)
            return
        except TransportError as error:
            patience.after(error)


def _reserve(
    session: Session, proxy: VmRef, disk: Disk, vm: VmRef, run_id: str, device_dir: str, sysfs_dir: str
) -> None:
    what, subject = "The disk can't be attached to the proxy by VDDK", f"{named([disk])} of {vm}, proxy {proxy}"
    digits = uuid_digits(disk.uuid)
    if digits is None:
        raise TransportError(what, subject=subject, reason="vCenter knows no UUID of it", remedy="Use nbdssl")
    for last in [False] * (_TRIES - 1) + [True]:
        situation = look(session, proxy, vm)
        found = same_uuid_obstacles(situation, disk)
        if found:
            raise TransportError(
                what,
                subject=subject,
                reason="; ".join(obstacle.reason for obstacle in found),
                remedy=found[0].remedy,
                retryable=True,
                details={"passing": True},
            )
        for guest in left_over(situation, guest_disks(sysfs_dir), disk):
            if not _clear(guest, device_dir, sysfs_dir, DEVICE_TIMEOUT):
                raise TransportError(
                    what,
                    subject=subject,
                    reason=f"a device with its UUID is here already, {guest.name}, though the proxy has no such disk",
                    remedy="Delete the device if it was left over, or restart the proxy",
                )
        value = f"{RESERVATION_FORMAT}:{proxy.instance_uuid.lower()}:{run_id.lower()}"
        try:
            _set_option(session, proxy, RESERVATION_KEY + digits, value, situation.change_version, subject)
            return
        except ConcurrentChange:
            if last:
                raise
            time.sleep(random.uniform(0, _PAUSE_SECONDS))


def is_over(session: Session, proxy: VmRef, disk_uuid: Optional[str]) -> bool:
    """Whether the proxy has no disk of this UUID, and will have none by what vCenter was told already."""
    _settle(session, proxy)
    return not same_uuid(_read_proxy(session, proxy).devices, disk_uuid)


def release(session: Session, proxy: VmRef, disk_uuid: Optional[str], run_id: str) -> None:
    """Take back what is reserved for a run, if it is."""
    digits = uuid_digits(disk_uuid)
    for last in [False] * (_TRIES - 1) + [True]:
        state = _read_proxy(session, proxy)
        if digits is None or state.reservations.get(digits) != run_id.lower():
            return
        try:
            _set_option(session, proxy, RESERVATION_KEY + digits, "", state.change_version, str(proxy))
            return
        except ConcurrentChange:
            if last:
                raise
            time.sleep(random.uniform(0, _PAUSE_SECONDS))


def _set_option(session: Session, proxy: VmRef, key: str, value: str, change_version: str, subject: str) -> None:
    """Write one advanced parameter of the proxy; an empty value takes it away."""
    spec = vim.vm.ConfigSpec(changeVersion=change_version, extraConfig=[vim.option.OptionValue(key=key, value=value)])
    _reconfigure(session, proxy, spec, what="The disk's UUID was not reserved on the proxy", subject=subject)


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
        there = _at(_read_proxy(session, proxy).devices, plan.new, places)
        return len([item for item in there if item.mode == MODES[access]]) == len(plan.new)

    try:
        _reconfigure(session, proxy, spec, what=what, subject=subject, done=done)
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
    return _read_back(session, proxy, plan.new, places, _read_proxy(session, proxy).devices, subject)


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


def _with_device(item: Attachment, proxy: VmRef, device_dir: str, sysfs_dir: str, timeout: float) -> Attachment:
    """Wait for the device, and for its link."""
    found: List[GuestDisk] = []

    def ready() -> Optional[str]:
        found[:] = [guest for guest in guest_disks(sysfs_dir) if guest.digits == uuid_digits(item.disk_uuid)]
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
        subject=f"{named([item])}, proxy {proxy}",
        reason=problem,
        remedy=f"See that this machine is the proxy '{proxy.name}', that disk.EnableUUID was set before it was"
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


def _intent(session: Session, proxy: VmRef, vm: VmRef, disk: Disk, access: str) -> Dict[str, Any]:
    return {
        "server_uuid": session.about.instanceUuid,
        "proxy_moid": proxy.moid,
        "proxy_uuid": proxy.instance_uuid,
        "file": disk.file,
        "disk_uuid": disk.uuid,
        "vm_moid": vm.moid,
        "vm_uuid": vm.instance_uuid,
        "access": access,
        "device_key": None,
    }


def intent_of_vddk(session: Session, proxy: VmRef, vm: VmRef, disk: Disk, writable: bool) -> Dict[str, Any]:
    """What stands in the run's record while VDDK attaches a disk."""
    return dict(_intent(session, proxy, vm, disk, WRITE if writable else READ), method=BY_VDDK)


# Detaching


def _going(session: Session, proxy: VmRef, attachments: Sequence[Attachment]) -> List[Attachment]:
    """Those that vCenter still shows as they were attached."""
    there = _read_proxy(session, proxy).devices
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
    for last in [False] * (_TRIES - 1) + [True]:
        state = _read_proxy(session, proxy)
        going = [device for item in attachments for device in _still(state.devices, item)]
        if not going:
            return
        changes = [Change(operation=Change.Operation.remove, device=device) for device in going]
        spec = vim.vm.ConfigSpec(changeVersion=state.change_version, deviceChange=changes)
        try:
            _reconfigure(session, proxy, spec, what=what, subject=subject)
            return
        except ConcurrentChange:
            if last:
                raise
            time.sleep(random.uniform(0, _PAUSE_SECONDS))
        except VsphereError as error:
            error.remedy = error.remedy or "Detach it in the vSphere client, keeping its files, then run vadp_recover"
            raise


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
        _settle(session, proxy)
        state = _read_proxy(session, proxy)
        known = [intent for intent in run.intents("attachment") if intent["id"] in intents]
        attachments = [
            item
            for item in attachments_of(state.devices, [disk.file])
            if any(_is_intended(item, intent, proxy, state, run.run_id) for intent in known)
        ]
    detach(session, proxy, attachments, sysfs_dir=sysfs_dir, device_dir=device_dir, timeout=DEVICE_TIMEOUT)
    for intent in intents:
        run.done(intent)


# vCenter


class _ProxyState(NamedTuple):
    """The proxy as vCenter shows it at one moment."""

    devices: List[Any]
    reservations: Dict[str, str]
    change_version: str


def _read_proxy(session: Session, proxy: VmRef) -> _ProxyState:
    paths = ("config.hardware.device", "config.extraConfig", "config.changeVersion")
    values = session.read(proxy.obj, *paths)
    return _ProxyState(
        list(values[paths[0]] or []), reservations_of(values[paths[1]], proxy), str(values[paths[2]] or "")
    )


def _reconfigure(
    session: Session,
    proxy: VmRef,
    spec: Any,
    *,
    what: str,
    subject: str,
    done: Optional[Callable[[], bool]] = None,
) -> None:
    """A change of the proxy that names the version it was looked at (VADP facts 54).

    :raises ConcurrentChange: it has another one; nothing was done.
    """
    if not spec.changeVersion:
        raise TransportError(what, subject=subject, reason="vCenter tells no version of the proxy's configuration")
    try:
        compare_and_set(session, proxy, spec, what=what, timeout=_TASK_TIMEOUT, done=done)
    except VsphereError as error:
        error.subject = subject
        raise


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
