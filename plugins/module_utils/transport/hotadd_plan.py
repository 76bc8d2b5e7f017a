# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether disks of a VM can be attached to the proxy VM, where, and why not. Nothing here changes anything."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Collection, Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import TransportError, VsphereError
from ..libraries import vim
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import VM_PATHS, VmState, vm_state_of
from . import scsi_units
from .guest_device import GuestDisk, node_of, uuid_digits
from .held_device import is_dead

READ = "read"
WRITE = "write"
MODES = {READ: "independent_nonpersistent", WRITE: "persistent"}

# What of ours says on the proxy that VDDK is attaching the disk of this UUID: value "1:<proxy's instance UUID>:<run>".
RESERVATION_KEY = "openvadp.hotadd."
RESERVATION_FORMAT = "1"

_PROXY_PATHS = (
    "config.changeVersion",
    "config.hardware.device",
    "config.extraConfig",
    "config.flags",
    "config.keyId",
    "config.version",
    "datastore",
    "environmentBrowser",
    "runtime.host",
    "runtime.powerState",
)


@dataclass(frozen=True)
class Attachment:
    """A disk of another VM that is attached to the proxy.

    :param key: the disk's device key on the VM that it is of; 0 where only the file is known.
    :param label: its label there; where only the file is known, that on the proxy.
    :param controller: key of the proxy's controller.
    :param device: the link of the proxy's block device; None where nobody looked for it.
    :param device_key: the disk's device key on the proxy.
    :param capacity_bytes: 0 where only the file is known.
    :param bus: of the proxy's controller; None where nobody looked.
    :param parallel: whether that controller's units are the targets in the guest.
    :param guest: the device, as this machine's kernel knows it; None where nobody looked for it.
    """

    key: int
    label: str
    file: str
    disk_uuid: Optional[str]
    controller: int
    unit: int
    device: Optional[str]
    device_key: int
    mode: str
    capacity_bytes: int = 0
    bus: Optional[int] = None
    parallel: bool = True
    guest: Optional[GuestDisk] = None


class Obstacle(NamedTuple):
    """Why a disk can't be attached, and what would change that.

    :param passing: another disk of its UUID is attached, by somebody who will detach it.
    :param look_again: it may only seem so, because vCenter and this machine were not looked at in the same moment.
    """

    reason: str
    remedy: str
    passing: bool = False
    look_again: bool = False


@dataclass(frozen=True)
class Situation:
    """The proxy and the VM whose disks are attached, at one moment.

    :param datastores: moids of the datastores that the proxy's host sees.
    :param source_datastores: (moid, kind) of the datastores of the VM, by name.
    :param vsan: whether the proxy itself lies on vSAN.
    :param change_version: of the proxy's configuration: a change that names it is refused if there was another one.
    :param reservations: disk UUID, 32 digits -> run for which VDDK is attaching it.
    """

    is_vcenter: bool
    proxy: VmRef
    vm: VmRef
    devices: List[Any]
    proxy_running: bool
    enable_uuid: bool
    encrypted: bool
    vsan: bool
    host: str
    datastores: FrozenSet[str]
    source_datastores: Dict[str, Tuple[str, str]]
    source: VmState
    version: Optional[str]
    browser: Any
    change_version: str = ""
    reservations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What attaching comes to: what is there already, and where the others go."""

    there: List[Attachment]
    new: List[Disk]
    placement: scsi_units.Placement


def look(session: Session, proxy: VmRef, vm: VmRef) -> Situation:
    """What decides on attaching disks of *vm* to *proxy*, in two calls."""
    if proxy.moid == vm.moid:
        raise TransportError(
            "The disk can't be attached to the proxy",
            subject=f"{vm}",
            reason="the virtual machine is the proxy itself",
            remedy="Back it up by another proxy, or by nbdssl",
        )
    own, source = session.read_each((proxy.obj, _PROXY_PATHS), (vm.obj, (*VM_PATHS, "datastore")))
    host, stores = own["runtime.host"], {}
    for store in list(own["datastore"] or []) + list(source["datastore"] or []):
        stores[store._moId] = store
    wanted: List[Any] = [(store, ("name", "summary.type")) for store in stores.values()]
    if host is not None:
        wanted.append((host, ("name", "datastore")))
    values = dict(zip([obj._moId for obj, _paths in wanted], session.read_each(*wanted))) if wanted else {}
    host_values = values.get(host._moId, {}) if host is not None else {}
    kinds = {moid: values[moid]["summary.type"] or "" for moid in stores}
    return Situation(
        is_vcenter=session.is_vcenter,
        proxy=proxy,
        vm=vm,
        devices=list(own["config.hardware.device"] or []),
        proxy_running=str(own["runtime.powerState"]) == "poweredOn",
        enable_uuid=_shows_uuids(own["config.extraConfig"], own["config.flags"]),
        encrypted=own["config.keyId"] is not None,
        vsan=any(kinds[store._moId] == "vsan" for store in own["datastore"] or []),
        host=host_values.get("name") or "",
        datastores=frozenset(store._moId for store in host_values.get("datastore") or []),
        source_datastores={
            values[store._moId]["name"]: (store._moId, kinds[store._moId]) for store in source["datastore"] or []
        },
        source=vm_state_of(source),
        version=own["config.version"],
        browser=own["environmentBrowser"],
        change_version=own["config.changeVersion"] or "",
        reservations=reservations_of(own["config.extraConfig"], proxy),
    )


def reservations_of(extra_config: Any, proxy: VmRef) -> Dict[str, str]:
    """Disk UUID -> run, of what is reserved on this proxy. Values that it has inherited as a clone don't count."""
    found = {}
    for option in extra_config or []:
        if not option.key.lower().startswith(RESERVATION_KEY):
            continue
        version, _colon, rest = str(option.value).partition(":")
        owner, _colon, run = rest.partition(":")
        if version != RESERVATION_FORMAT or owner == proxy.instance_uuid.lower():
            # What a newer version means by its own format is not known: it counts.
            found[option.key[len(RESERVATION_KEY) :].lower()] = run
    return found


def _shows_uuids(extra_config: Any, flags: Any) -> bool:
    for option in extra_config or []:
        if option.key.lower() == "disk.enableuuid":
            return str(option.value).lower() in ("true", "1", "yes")
    return bool(getattr(flags, "diskUuidEnabled", None))


def obstacles(situation: Situation, disk: Disk, access: str) -> List[Obstacle]:
    """Why this disk can't be attached to this proxy, whether there is room or not. Pure."""
    proxy, vm = situation.proxy, situation.vm
    found = []
    if not situation.is_vcenter:
        found.append(Obstacle("the server is an ESXi host, which has no HotAdd", "Log in to vCenter"))
    if not situation.proxy_running:
        found.append(Obstacle("the proxy is not powered on", "Name the virtual machine that this runs on as the proxy"))
    if proxy.datacenter_path != vm.datacenter_path:
        found.append(
            Obstacle(
                f"the proxy is in datacenter '{proxy.datacenter}', the disk in '{vm.datacenter}'",
                "Use a proxy in the same datacenter",
            )
        )
    else:
        found += _datastore_obstacles(situation, disk)
    if disk.controller.get("type") == "ide":
        found.append(
            Obstacle("it is an IDE disk", "Use nbdssl, or move the disk to a SCSI controller while the machine is off")
        )
    if disk.encrypted and not situation.encrypted:
        found.append(Obstacle("it is encrypted, and the proxy is not", "Encrypt the proxy, or use nbdssl"))
    if not situation.enable_uuid:
        found.append(
            Obstacle(
                "the proxy does not show its disks' UUIDs to its guest",
                "Set disk.EnableUUID of the proxy to TRUE while it is off",
            )
        )
    if uuid_digits(disk.uuid) is None:
        found.append(Obstacle("vCenter knows no UUID of it, by which its device could be found", "Use nbdssl"))
    return found + same_uuid_obstacles(situation, disk) + _use_obstacles(situation, disk, access)


def _datastore_obstacles(situation: Situation, disk: Disk) -> List[Obstacle]:
    moid, kind = situation.source_datastores.get(disk.datastore, ("", ""))
    found = []
    if not moid:
        found.append(
            Obstacle(f"the virtual machine has no datastore '{disk.datastore}' any more", "Make a new snapshot")
        )
    elif moid not in situation.datastores:
        found.append(
            Obstacle(
                f"the proxy's host {situation.host or '(not known)'} does not see datastore '{disk.datastore}'",
                "Move the proxy to a host that sees it, or mount it there",
            )
        )
    if kind == "vsan" and not situation.vsan:
        found.append(Obstacle("it lies on vSAN, and the proxy does not", "Move the proxy to that vSAN datastore"))
    return found


def same_uuid_obstacles(situation: Situation, disk: Disk) -> List[Obstacle]:
    """Two devices of one UUID can't be told apart (VADP facts 31)."""
    found = []
    for device in same_uuid(situation.devices, disk.uuid):
        if file_of(device) == disk.file:
            continue
        label = getattr(device.deviceInfo, "label", None) or str(device.key)
        found.append(
            Obstacle(
                f"disk '{label}' ({file_of(device)}) of the proxy has the same UUID",
                "Wait until it is detached; detach it if it was left over (vadp_recover, or proxy_hotadd with"
                " state=detached); a proxy must not be a clone of what it backs up",
                passing=True,
            )
        )
    run = situation.reservations.get(uuid_digits(disk.uuid) or "")
    if run is not None:
        found.append(
            Obstacle(
                f"VDDK attaches a disk of the same UUID to the proxy for run {run}",
                "Wait until that has ended; if it was cut, run vadp_recover for its virtual machine, or remove"
                f" {RESERVATION_KEY}{uuid_digits(disk.uuid)} from the proxy's advanced parameters",
                passing=True,
            )
        )
    return found


def same_uuid(devices: Iterable[Any], disk_uuid: Optional[str]) -> List[Any]:
    """The disks among a VM's devices that have this UUID."""
    digits = uuid_digits(disk_uuid)
    return [
        device
        for device in devices
        if digits is not None
        and isinstance(device, vim.vm.device.VirtualDisk)
        and uuid_digits(getattr(device.backing, "uuid", None)) == digits
    ]


def _use_obstacles(situation: Situation, disk: Disk, access: str) -> List[Obstacle]:
    """Who may write to the disk meanwhile, and whether a write would arrive (VADP facts 29)."""
    source = situation.source
    leaves = {file_of(device) for device in source.devices}
    found = []
    if access == READ:
        if disk.file in leaves and source.power_state != "poweredOff":
            found.append(
                Obstacle(
                    f"the virtual machine is {source.power_state} and writes to it",
                    "Make a snapshot, and attach the snapshot's disk",
                )
            )
        return found
    if source.template:
        found.append(Obstacle("it is a template's", "Convert the template to a virtual machine"))
    if source.power_state != "poweredOff":
        found.append(Obstacle(f"the virtual machine is {source.power_state}", "Power it off"))
    if source.snapshots:
        names = ", ".join(f"'{snapshot.name}'" for snapshot in source.snapshots[:5])
        found.append(Obstacle(f"the virtual machine has {len(source.snapshots)} snapshots ({names})", "Remove them"))
    if source.consolidation_needed:
        found.append(Obstacle("the virtual machine's disks need consolidation", "Run vadp_recover, or consolidate"))
    if disk.file not in leaves:
        found.append(Obstacle("the virtual machine does not use this file now", "Look at its disks, and run again"))
    return found


def plan_attach(
    session: Session,
    situation: Situation,
    disks: Sequence[Disk],
    access: str,
    guests: Sequence[GuestDisk],
    device_dir: str,
    fresh: bool = False,
    avoid: Collection[int] = (),
) -> Plan:
    """What must be attached, and where. Touches nothing.

    :param guests: the disks that this machine's kernel knows.
    :param avoid: units that are not taken.
    :raises TransportError: with everything that speaks against it.
    """
    there = {item.file: item for item in attachments_of(situation.devices, [disk.file for disk in disks])}
    found: Dict[str, List[Obstacle]] = {}
    for disk in disks:
        reasons = obstacles(situation, disk, access)
        item = there.get(disk.file)
        if item is not None and (fresh or item.mode != MODES[access]):
            reasons.append(
                Obstacle(
                    f"it is attached to the proxy already, {item.mode}, by somebody else or by a run that crashed",
                    "Detach it with vadp_recover, or with proxy_hotadd and state=detached",
                )
            )
        elif item is None:
            reasons += _device_obstacles(situation, disk, guests, device_dir)
        if reasons:
            found[disk.label] = reasons
    new = [disk for disk in disks if disk.file not in there]
    if found:
        raise _obstructed(situation, disks, found)
    placement = _place(session, situation, len(new), avoid)
    if placement is None:
        room = Obstacle(
            f"its SCSI controllers have room for {scsi_units.free_units(situation.devices)} more disks, not for"
            f" {len(new)}, and it can have no more than {scsi_units.MAX_CONTROLLERS} controllers",
            "Detach disks from the proxy (vadp_recover finds leftovers), or read fewer disks at a time",
        )
        raise _obstructed(situation, new, {disk.label: [room] for disk in new[:1]})
    return Plan([of_disk(there[disk.file], disk) for disk in disks if disk.file in there], new, placement)


def _obstructed(situation: Situation, disks: Sequence[Disk], found: Dict[str, List[Obstacle]]) -> TransportError:
    several = len(disks) > 1
    texts = [
        f"'{label}': {obstacle.reason}" if several else obstacle.reason
        for label, reasons in found.items()
        for obstacle in reasons
    ]
    passing = all(obstacle.passing for reasons in found.values() for obstacle in reasons)
    remedies = list(dict.fromkeys(obstacle.remedy for reasons in found.values() for obstacle in reasons))
    return TransportError(
        "The disk can't be attached to the proxy" if not several else "The disks can't be attached to the proxy",
        subject=f"{named(disks)} of {situation.vm}, proxy {situation.proxy}",
        reason="; ".join(texts),
        remedy=". ".join(remedies),
        details={
            "obstacles": {label: [obstacle.reason for obstacle in reasons] for label, reasons in found.items()},
            "proxy": situation.proxy.moid,
            "passing": passing,
            "look_again": any(obstacle.look_again for reasons in found.values() for obstacle in reasons),
        },
        retryable=passing,
    )


def is_listed(situation: Situation, guest: GuestDisk) -> bool:
    """Whether vCenter shows a disk that this device can be: the UUID, and the unit where that tells the address."""
    by_key = {device.key: device for device in situation.devices}
    for device in situation.devices:
        unit = device.unitNumber if isinstance(device, vim.vm.device.VirtualDisk) else None
        digits = uuid_digits(getattr(device.backing, "uuid", None)) if unit is not None else None
        if unit is None or (guest.digits is not None and digits not in (None, guest.digits)):
            continue
        if not tells_address(by_key.get(device.controllerKey)) or guest.unit == unit:
            return True
    return False


def tells_address(controller: Any) -> bool:
    """Whether the unit of a disk is its target in the guest; a SAS controller's targets are counted as they come."""
    return not isinstance(controller, vim.vm.device.VirtualLsiLogicSASController)


def in_the_way(situation: Situation, placement: scsi_units.Placement, guests: Sequence[GuestDisk]) -> List[GuestDisk]:
    """Devices at the addresses that are about to be used, which vCenter does not list (proofs 23).

    Which host in the guest is which controller is not known: one at that unit of any counts that has virtual disks.
    """
    units = {slot.unit for slot in placement.slots}
    hosts = {guest.address[0] for guest in guests if guest.virtual}
    return [
        guest
        for guest in guests
        if guest.unit in units and guest.address[0] in hosts and not is_listed(situation, guest)
    ]


def left_over(situation: Situation, guests: Sequence[GuestDisk], disk: Disk) -> List[GuestDisk]:
    """Devices with this disk's UUID that vCenter does not list."""
    digits = uuid_digits(disk.uuid)
    return [guest for guest in guests if guest.digits == digits and not is_listed(situation, guest)]


def _device_obstacles(situation: Situation, disk: Disk, guests: Sequence[GuestDisk], device_dir: str) -> List[Obstacle]:
    found = []
    for guest in left_over(situation, guests, disk):
        node = node_of(guest.name, device_dir)
        if node is not None and not is_dead(node):
            found.append(
                Obstacle(
                    f"a device with its UUID is here already, {node}, though the proxy has no such disk",
                    "Name the virtual machine that this runs on as the proxy, and delete the device if it was left"
                    " over",
                    look_again=True,
                )
            )
    return found


def _place(
    session: Session, situation: Situation, count: int, avoid: Collection[int] = ()
) -> Optional[scsi_units.Placement]:
    """Places for new disks. vCenter is asked for what it takes at most only where fifteen a controller don't do."""
    existing = scsi_units.free_units(situation.devices, avoid=avoid)
    units = scsi_units.SAFE_UNITS
    if existing < count and situation.browser is not None:
        units = read_pvscsi_units(session, situation.proxy, situation.browser, situation.version)
    return scsi_units.place(situation.devices, count, units, avoid)


def read_pvscsi_units(session: Session, proxy: VmRef, browser: Any, version: Optional[str]) -> int:
    """Unit numbers of a PVSCSI controller of a VM: one call.

    :param browser: its ``environmentBrowser``.
    :param version: of its hardware, "vmx-19".
    """
    try:
        option = session.call(
            browser.QueryConfigOption,
            version,
            None,
            what="The limits of the proxy's virtual hardware were not read",
            subject=str(proxy),
            idempotent=True,
        )
    except VsphereError as error:
        if error.fault is None:
            raise
        return scsi_units.SAFE_UNITS
    return scsi_units.pvscsi_units(option)


def attachments_of(devices: Iterable[Any], files: Iterable[str]) -> List[Attachment]:
    """The disks among the proxy's devices whose file is one of *files*."""
    wanted, known = set(files), list(devices)
    by_key = {device.key: device for device in known}
    return [
        Attachment(
            key=0,
            label=getattr(device.deviceInfo, "label", None) or f"disk {device.key}",
            file=str(file_of(device)),
            disk_uuid=getattr(device.backing, "uuid", None),
            controller=device.controllerKey,
            unit=device.unitNumber,
            device=None,
            device_key=device.key,
            mode=getattr(device.backing, "diskMode", None) or "",
            bus=getattr(by_key.get(device.controllerKey), "busNumber", None),
            parallel=tells_address(by_key.get(device.controllerKey)),
        )
        for device in known
        if file_of(device) in wanted
    ]


def file_of(device: Any) -> Optional[str]:
    """The file of a virtual disk, None for any other device.

    A running machine writes what goes to a nonpersistent disk into a redo log, which some servers name in its place.
    """
    if not isinstance(device, vim.vm.device.VirtualDisk):
        return None
    name = getattr(device.backing, "fileName", None)
    return re.sub(r"-REDO_\w+$", "", name) if name else None


def of_disk(item: Attachment, disk: Disk) -> Attachment:
    """What is attached, as the disk of the VM that it is."""
    return replace(item, key=disk.key, label=disk.label, disk_uuid=disk.uuid, capacity_bytes=disk.capacity_bytes)


def named(items: Sequence[Any]) -> str:
    return ", ".join(f"'{item.label}' ({item.file})" for item in items)
