# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The proxy VM to which HotAdd attaches disks: how vCenter shows it, how it is changed, and whether it is this machine.

Each change names the version of the configuration that was looked at (VADP facts 54). So of two who change the proxy at
once one is refused, wherever they run, and looks again.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, TypeVar

from ..errors import AmbiguousError, DataPathError, NotFoundError, TaskError, TransportError, VsphereError
from ..libraries import vim
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.vm_keys import ConcurrentChange, compare_and_set
from .guest_device import GuestDisk, delete_device, node_of, users_of, uuid_digits
from .held_device import is_dead
from .hotadd_plan import MODES, Attachment, reservations_of
from .planner import BY_VDDK
from .proxy import ProxyIdentity

# Seconds that the kernel of the proxy may need to see a disk come or go.
DEVICE_TIMEOUT = 60
_TASK_TIMEOUT = 600
# Others attach and detach disks of the same proxy at the same time: each of them that succeeds makes one try in vain.
_TRIES = 40
PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 10.0

T = TypeVar("T")

_locks: Dict[str, threading.Lock] = {}
_locks_guard = threading.Lock()


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
        self._pause = PAUSE_SECONDS

    def retry(self, attempt: Callable[[], T]) -> T:
        """What *attempt* returns, as soon as nothing that passes is in its way."""
        while True:
            try:
                return attempt()
            except TransportError as error:
                self._after(error)

    def _after(self, error: TransportError) -> None:
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


class ProxyState(NamedTuple):
    """The proxy as vCenter shows it at one moment."""

    devices: List[Any]
    reservations: Dict[str, str]
    change_version: str


def read_proxy(session: Session, proxy: VmRef) -> ProxyState:
    paths = ("config.hardware.device", "config.extraConfig", "config.changeVersion")
    values = session.read(proxy.obj, *paths)
    return ProxyState(
        list(values[paths[0]] or []), reservations_of(values[paths[1]], proxy), str(values[paths[2]] or "")
    )


def reconfigure(
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
        raise TransportError(what, subject=subject, reason="vCenter reports no version of the proxy's configuration")
    try:
        compare_and_set(session, proxy, spec, what=what, timeout=_TASK_TIMEOUT, done=done)
    except VsphereError as error:
        error.subject = subject
        raise


def set_option(session: Session, proxy: VmRef, key: str, value: str, change_version: str, subject: str) -> None:
    """Write one advanced parameter of the proxy; an empty value takes it away."""
    spec = vim.vm.ConfigSpec(changeVersion=change_version, extraConfig=[vim.option.OptionValue(key=key, value=value)])
    reconfigure(session, proxy, spec, what="The disk's UUID was not reserved on the proxy", subject=subject)


def settle(session: Session, proxy: VmRef) -> None:
    """Wait for changes of the proxy's hardware that vCenter is still at work on."""
    for task in session.read(proxy.obj, "recentTask")["recentTask"] or []:
        with contextlib.suppress(NotFoundError, TaskError):
            facts = session.read(task, "info.state", "info.descriptionId")
            if facts["info.descriptionId"] == "VirtualMachine.reconfigure" and facts["info.state"] in (
                "queued",
                "running",
            ):
                session.wait(task, what="A change of the proxy did not end", subject=str(proxy), timeout=_TASK_TIMEOUT)


def in_turn(change: Callable[[], T]) -> T:
    """Look at the proxy and change it; again where somebody else changed it in between.

    :raises ConcurrentChange: that happened each time.
    """
    for _attempt in range(_TRIES - 1):
        try:
            return change()
        except ConcurrentChange:
            time.sleep(random.uniform(0, PAUSE_SECONDS))
    return change()


def lock_of(proxy: VmRef) -> threading.Lock:
    """Threads of this process attach and detach one after the other: fewer refusals, no race for units."""
    with _locks_guard:
        return _locks.setdefault(proxy.moid, threading.Lock())


def is_here(session: Session, proxy: VmRef, sysfs_dir: str) -> bool:
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
    """The virtual machine that this machine is; None where that can't be determined."""
    try:
        return ProxyIdentity.find(session, sysfs_dir=sysfs_dir)[0]
    except AmbiguousError:
        return None


def is_intended(item: Attachment, intent: Dict[str, Any], proxy: VmRef, state: ProxyState, run_id: str) -> bool:
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


def clear_device(guest: GuestDisk, device_dir: str, sysfs_dir: str, timeout: float) -> bool:
    """Delete a device that vCenter does not list, if it is a virtual disk that does not answer and nobody uses.

    :returns: whether it has gone.
    """
    node = node_of(guest.name, device_dir)
    if not guest.virtual or node is None or not is_dead(node) or users_of(guest.name, sysfs_dir):
        return False
    return delete_device(guest.name, sysfs_dir, timeout)


def intent_of(session: Session, proxy: VmRef, vm: VmRef, disk: Disk, access: str) -> Dict[str, Any]:
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
