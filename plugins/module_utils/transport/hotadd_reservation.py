# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks that VDDK attaches to the proxy by itself: their UUIDs are reserved there until it is done (proofs 23)."""

from __future__ import annotations

from typing import Any, Dict, Optional

from ..errors import TransportError
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from .guest_device import guest_disks, uuid_digits
from .hotadd_plan import (
    READ,
    RESERVATION_FORMAT,
    RESERVATION_KEY,
    WRITE,
    left_over,
    look,
    named,
    same_uuid,
    same_uuid_obstacles,
)
from .hotadd_proxy import (
    DEVICE_TIMEOUT,
    Patience,
    clear_device,
    in_turn,
    intent_of,
    read_proxy,
    set_option,
    settle,
)
from .planner import BY_VDDK

_WHAT = "The disk can't be attached to the proxy by VDDK"


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
    (patience or Patience()).retry(
        lambda: in_turn(lambda: _reserve(session, proxy, disk, vm, run_id, device_dir, sysfs_dir))
    )


def _reserve(
    session: Session, proxy: VmRef, disk: Disk, vm: VmRef, run_id: str, device_dir: str, sysfs_dir: str
) -> None:
    """:raises ConcurrentChange: the proxy is not what it was when it was looked at; nothing was changed."""
    subject = f"{named([disk])} of {vm}, proxy {proxy}"
    digits = uuid_digits(disk.uuid)
    if digits is None:
        raise TransportError(_WHAT, subject=subject, reason="vCenter knows no UUID of it", remedy="Use nbdssl")
    situation = look(session, proxy, vm)
    found = same_uuid_obstacles(situation, disk)
    if found:
        raise TransportError(
            _WHAT,
            subject=subject,
            reason="; ".join(obstacle.reason for obstacle in found),
            remedy=found[0].remedy,
            retryable=True,
            details={"passing": True},
        )
    for guest in left_over(situation, guest_disks(sysfs_dir), disk):
        if not clear_device(guest, device_dir, sysfs_dir, DEVICE_TIMEOUT):
            raise TransportError(
                _WHAT,
                subject=subject,
                reason=f"a device with its UUID is here already, {guest.name}, though the proxy has no such disk",
                remedy="Delete the device if it was left over, or restart the proxy",
            )
    value = f"{RESERVATION_FORMAT}:{proxy.instance_uuid.lower()}:{run_id.lower()}"
    set_option(session, proxy, RESERVATION_KEY + digits, value, situation.change_version, subject)


def is_over(session: Session, proxy: VmRef, disk_uuid: Optional[str]) -> bool:
    """Whether the proxy has no disk of this UUID, and will have none by what vCenter was told already."""
    settle(session, proxy)
    return not same_uuid(read_proxy(session, proxy).devices, disk_uuid)


def release(session: Session, proxy: VmRef, disk_uuid: Optional[str], run_id: str) -> None:
    """Take back what is reserved for a run, if it is."""
    in_turn(lambda: _release(session, proxy, uuid_digits(disk_uuid), run_id))


def _release(session: Session, proxy: VmRef, digits: Optional[str], run_id: str) -> None:
    state = read_proxy(session, proxy)
    if digits is not None and state.reservations.get(digits) == run_id.lower():
        set_option(session, proxy, RESERVATION_KEY + digits, "", state.change_version, str(proxy))


def intent_of_vddk(session: Session, proxy: VmRef, vm: VmRef, disk: Disk, writable: bool) -> Dict[str, Any]:
    """What stands in the run's record while VDDK attaches a disk."""
    return dict(intent_of(session, proxy, vm, disk, WRITE if writable else READ), method=BY_VDDK)
