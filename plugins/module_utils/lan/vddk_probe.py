# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The last proof of a backup LAN: a disk is opened through VDDK, whose log names the address that vCenter handed out.

An authd answers on every VMkernel NIC of its host, so that a port is reached says nothing of the tag (VADP facts 25).
Without a snapshot the virtual machine's own host serves the disk (VADP facts 19): which host is proved is known before.
"""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any, Dict, List, Optional, Sequence

from ..datapath.processes import RuntimeDir
from ..errors import TransportError, VsphereError
from ..transport import budget
from ..transport.endpoints import open_vddk
from ..transport.facts import disk_facts
from ..transport.opened import last_place
from ..transport.opener import serving_names
from ..transport.vddk import Vddk
from ..vsphere.disks import Disk, disks_of
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import VmState, vm_state
from .probe import Target

TRANSPORT = "nbdssl"
_RUN = "backup-lan-probe"


def prove(
    session: Session, vm: VmRef, targets: Sequence[Target], vddk: Vddk, *, nfc_port: int, io_timeout: int
) -> Dict[str, Any]:
    """Open a disk of *vm* for reading, and compare the address in VDDK's log with the backup NICs'.

    :param targets: the hosts, each with the address of its backup NIC.
    :param io_timeout: seconds for the open.
    :return: {proven, host (name of the serving host), label, file, address (as the log has it, or None), expected
        [addresses], reason, remedy}.
    :raises VsphereError: the virtual machine can't be opened without a snapshot; nothing was opened.
    """
    disk = _readable_disk(vm, vm_state(session, vm))
    facts = disk_facts(session, vm, [disk])[disk.key]
    names = serving_names(facts, None) or [session.connection.hostname]
    expected = [str(one.address) for one in targets if one.host.lower() in [name.lower() for name in names]]
    result: Dict[str, Any] = {
        "proven": False,
        "host": names[0],
        "label": disk.label,
        "file": disk.file,
        "address": None,
        "expected": expected,
        "reason": "",
        "remedy": "",
    }
    if not expected:
        result["reason"] = f"{vm} is on host {names[0]}, which is none of the targets"
        result["remedy"] = "Name a virtual machine on one of these hosts, or add the host to the targets"
        return result
    try:
        result["address"] = _address_of_open(session, vm, disk, vddk, names, nfc_port, io_timeout)
    except TransportError as error:
        result["reason"] = str(error)
        result["remedy"] = "Module vddk_log_diagnosis explains VDDK's log"
        return result
    result.update(_verdict(result["address"], expected, names[0]))
    return result


def _readable_disk(vm: VmRef, state: VmState) -> Disk:
    disks = [disk for disk in disks_of(state.devices) if disk.included]
    reasons: List[str] = []
    if state.power_state != "poweredOff":
        reasons.append(f"it is {state.power_state}, and then its host has its disks locked")
    if state.snapshots:
        reasons.append("it has snapshots, and then any host of the datastore may serve its disks")
    if not disks and not reasons:
        reasons.append("it has no disk that VDDK reads")
    if reasons:
        raise VsphereError(
            "The backup LAN can't be proved by this virtual machine",
            subject=str(vm),
            reason="; ".join(reasons),
            remedy="Name one that is off and has no snapshots, on the host in question; a template does as well",
        )
    return disks[0]


def _address_of_open(
    session: Session, vm: VmRef, disk: Disk, vddk: Vddk, names: Sequence[str], nfc_port: int, io_timeout: int
) -> Optional[str]:
    RuntimeDir.leftovers(_RUN, remove=True)
    with contextlib.ExitStack() as stack:
        run_dir = stack.enter_context(RuntimeDir(_RUN))
        stack.enter_context(budget.for_disk(session, names, vddk, subject=disk.file, wait_timeout=io_timeout))
        endpoint = stack.enter_context(
            open_vddk(
                session,
                vm,
                file=disk.file,
                snapshot_moid=None,
                transports=[TRANSPORT],
                writable=False,
                vddk=vddk,
                nfc_port=nfc_port,
                run_dir=run_dir,
                io_timeout=io_timeout,
            )
        )
        place = last_place(endpoint.log_path.read_text(encoding="utf-8", errors="replace"))
        return place.address if place is not None else None


def _verdict(address: Optional[str], expected: Sequence[str], host: str) -> Dict[str, Any]:
    if address is None:
        return {
            "reason": "VDDK's log does not name the address of the host",
            "remedy": "Look for the address after '@' in the log of a backup: this VDDK may word it in another way",
        }
    with contextlib.suppress(ValueError):
        if str(ipaddress.ip_address(address)) in expected:
            return {"proven": True}
    return {
        "reason": f"vCenter hands out {address} for host {host}, not its backup NIC's {' or '.join(expected)}",
        "remedy": (
            f"Look with vmkernel_backup_nic_info whether a NIC of {host} is tagged vSphereBackupNFC, and whether it is"
            " the one with that address. If it was tagged a moment ago, try again"
        ),
    }
