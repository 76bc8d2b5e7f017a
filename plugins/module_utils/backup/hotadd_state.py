# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks of a VM are attached to the proxy, or they aren't: all of module ``proxy_hotadd`` but its options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, List, Optional, Sequence

from ..errors import InputError, NotFoundError
from ..libraries import vim
from ..transport import hotadd, hotadd_proxy, scsi_units
from ..transport.guest_device import find_device, guest_disks, uuid_digits
from ..transport.hotadd import Attachment
from ..vsphere.disks import Disk, disks_of
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import find_snapshot, snapshot_disks
from .selection import select_disks


@dataclass(frozen=True)
class Wanted:
    """Options of ``proxy_hotadd``, but for those that name the VM and the proxy.

    :param disks: device keys or labels; None for all.
    """

    attached: bool
    snapshot_moid: Optional[str]
    access: str
    disks: Optional[List[str]]
    device_dir: str
    sysfs_dir: str

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> Wanted:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        if params["access"] == hotadd.WRITE and params["snapshot_moid"] is not None:
            raise InputError(
                "A snapshot's disk is not attached for writing",
                subject=str(params["snapshot_moid"]),
                reason="what is written would be lost, or spoil the snapshot",
                remedy="Leave snapshot_moid out: the present disks of a machine that is off are written",
            )
        return cls(
            attached=params["state"] == "attached",
            snapshot_moid=params["snapshot_moid"],
            access=params["access"],
            disks=params["disks"],
            device_dir=params["device_dir"],
            sysfs_dir=params["sysfs_dir"],
        )


def ensure(
    session: Session, vm: VmRef, proxy: Optional[VmRef], how: str, wanted: Wanted, check_mode: bool
) -> Dict[str, Any]:
    """Reach the wanted state and return the module's result, ``diff`` included. Check mode makes no changing call.

    :param proxy: None where this machine is not a VM of that vCenter.
    :param how: how that was found out.
    """
    if proxy is None:
        raise InputError(
            "There is no proxy to attach disks to",
            reason=how,
            remedy="Run this on a virtual machine of that vCenter, and name it by proxy_moid if it can't know itself",
        )
    if proxy.moid == vm.moid:
        raise InputError(
            "The virtual machine is the proxy itself",
            subject=str(vm),
            remedy="Use another virtual machine as the proxy for this one",
        )
    if wanted.attached:
        return _attached(session, vm, proxy, wanted, check_mode)
    return _detached(session, vm, proxy, wanted, check_mode)


def _attached(session: Session, vm: VmRef, proxy: VmRef, wanted: Wanted, check_mode: bool) -> Dict[str, Any]:
    disks = select_disks(_disks_to_attach(session, vm, wanted), wanted.disks, []).disks
    before = hotadd.attached(session, proxy, [disk.file for disk in disks])
    there = {item.file for item in before}
    if check_mode:
        situation = hotadd.look(session, proxy, vm)
        guests = guest_disks(wanted.sysfs_dir)
        plan = hotadd.plan_attach(session, situation, disks, wanted.access, guests, wanted.device_dir)
        planned = {disk.file: slot for disk, slot in zip(plan.new, plan.placement.slots)}
        known = {item.file: _with_link(item, wanted) for item in plan.there}
        entries = [
            _entry(known[disk.file]) if disk.file in known else _planned(disk, planned[disk.file]) for disk in disks
        ]
    else:
        found = hotadd.attach(
            session,
            proxy,
            disks,
            vm=vm,
            access=wanted.access,
            device_dir=wanted.device_dir,
            sysfs_dir=wanted.sysfs_dir,
            record=_unrecorded,
            timeout=hotadd_proxy.DEVICE_TIMEOUT,
        )
        entries = [_entry(item) for item in found]
    mode = hotadd.MODES[wanted.access]
    return {
        "changed": len(there) < len(disks),
        "attachments": entries,
        "diff": _diff(
            proxy,
            {disk.label: f"attached, {mode}" if disk.file in there else "not attached" for disk in disks},
            {disk.label: f"attached, {mode}" for disk in disks},
        ),
    }


def _unrecorded(_fields: Dict[str, Any], _known: Optional[int] = None) -> int:
    """Who attaches disks by the module detaches them by the module: there is no run that could crash."""
    return 0


def _disks_to_attach(session: Session, vm: VmRef, wanted: Wanted) -> List[Disk]:
    if wanted.snapshot_moid is not None:
        snapshot = find_snapshot(session, vm, moid=wanted.snapshot_moid)
        if snapshot is None:
            raise NotFoundError(
                "There is no such snapshot",
                subject=f"{wanted.snapshot_moid} of {vm}",
                remedy="Make it with vm_snapshot, which returns its moid",
            )
        return snapshot_disks(session, snapshot)
    return disks_of(session.read(vm.obj, "config.hardware.device")["config.hardware.device"] or [])


def _detached(session: Session, vm: VmRef, proxy: VmRef, wanted: Wanted, check_mode: bool) -> Dict[str, Any]:
    values = session.read(vm.obj, "config.hardware.device", "layoutEx.file")
    devices = values["config.hardware.device"] or []
    own = disks_of(devices)
    files = _files_of(devices, values["layoutEx.file"] or [])
    if wanted.snapshot_moid is not None:
        snapshot = find_snapshot(session, vm, moid=wanted.snapshot_moid)
        # One that is gone may have left its disks attached: then all files of the machine are looked for.
        if snapshot is not None:
            own = snapshot_disks(session, snapshot)
            files = [disk.file for disk in own]
    by_uuid = {uuid_digits(disk.uuid): disk for disk in own if uuid_digits(disk.uuid)}
    by_file = {disk.file: disk for disk in own}
    chosen = None if wanted.disks is None else {disk.key for disk in select_disks(own, wanted.disks, []).disks}
    going = []
    for item in hotadd.attached(session, proxy, files):
        disk = by_file.get(item.file) or by_uuid.get(uuid_digits(item.disk_uuid))
        if disk is not None:
            item = replace(item, key=disk.key, label=disk.label)
        if chosen is None or item.key in chosen:
            going.append(_with_link(item, wanted))
    if going and not check_mode:
        elsewhere = hotadd_proxy.is_elsewhere(session, proxy, wanted.sysfs_dir)
        hotadd.detach(
            session,
            proxy,
            going,
            sysfs_dir=wanted.sysfs_dir,
            device_dir=None if elsewhere else wanted.device_dir,
            timeout=hotadd_proxy.DEVICE_TIMEOUT,
        )
    return {
        "changed": bool(going),
        "attachments": [_entry(item) for item in going],
        "diff": _diff(
            proxy,
            {item.label: f"attached, {item.mode}" for item in going},
            {item.label: "not attached" for item in going},
        ),
    }


def _files_of(devices: Iterable[Any], layout: Sequence[Any]) -> List[str]:
    """All disk files of a VM: those of its disks and what they stand on, and what else its folder's layout lists."""
    files = [file.name for file in layout if getattr(file, "type", None) == "diskDescriptor"]
    for device in devices:
        backing = device.backing if isinstance(device, vim.vm.device.VirtualDisk) else None
        while backing is not None:
            files.append(getattr(backing, "fileName", None) or "")
            backing = getattr(backing, "parent", None)
    return [file for file in files if file]


def _with_link(item: Attachment, wanted: Wanted) -> Attachment:
    return replace(item, device=find_device(wanted.device_dir, item.disk_uuid))


def _entry(item: Attachment) -> Dict[str, Any]:
    return {
        "key": item.key,
        "label": item.label,
        "disk_uuid": item.disk_uuid,
        "controller": item.controller,
        "unit": item.unit,
        "device": item.device,
    }


def _planned(disk: Disk, slot: scsi_units.Slot) -> Dict[str, Any]:
    """A disk that would be attached: a controller that would be added has no key yet."""
    return {
        "key": disk.key,
        "label": disk.label,
        "disk_uuid": disk.uuid,
        "controller": slot.controller_key if slot.controller_key >= 0 else None,
        "unit": slot.unit,
        "device": None,
    }


def _diff(proxy: VmRef, before: Dict[str, str], after: Dict[str, str]) -> Dict[str, str]:
    diff = {f"{name}_header": f"disks at {proxy}" for name in ("before", "after")}
    for name, states in (("before", before), ("after", after)):
        diff[name] = "".join(f"{label}: {state}\n" for label, state in states.items())
    return diff
