# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The disks in a virtual hardware, and what keeps a disk or a whole virtual machine out of a backup.

Pure functions on vim objects: they take a configuration, from a snapshot or from the virtual machine, and ask nobody.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterable, List, Optional

from ..libraries import vim

# Class of a controller -> its type in ``Disk.controller``. Classes derive from each other, so the exact class counts.
_CONTROLLERS = {
    "ParaVirtualSCSIController": "pvscsi",
    "VirtualLsiLogicController": "lsilogic",
    "VirtualLsiLogicSASController": "lsilogic-sas",
    "VirtualBusLogicController": "buslogic",
    "VirtualIDEController": "ide",
    "VirtualAHCIController": "sata",
    "VirtualNVMEController": "nvme",
}

#: Its type -> class of a controller.
CONTROLLER_CLASSES = {kind: name for name, kind in _CONTROLLERS.items()}


@dataclass
class Disk:
    """One virtual disk.

    ``file`` is ``backing.fileName`` verbatim (VADP facts 14), ``change_id`` opaque (facts 3, 4; ``None``: the next
    backup of this disk is a full one), ``controller`` {type, key, bus} with a type out of pvscsi, lsilogic,
    lsilogic-sas, buslogic, ide, sata, nvme. ``included`` says whether a snapshot holds the disk, ``skip_reason`` why
    it doesn't. ``chained`` says that the file stands upon another one, its parent; ``linked`` that this one is another
    machine's, in another folder, as the parent of a linked clone is.
    """

    key: int
    label: str
    file: str
    datastore: str
    capacity_bytes: int
    uuid: Optional[str]
    change_id: Optional[str]
    included: bool
    skip_reason: Optional[str]
    controller: Dict[str, Any] = field(default_factory=dict)
    unit: Optional[int] = None
    thin: Optional[bool] = None
    mode: Optional[str] = None
    encrypted: bool = False
    chained: bool = False
    linked: bool = False

    def to_dict(self) -> Dict[str, Any]:
        values = asdict(self)
        for name in ("chained", "linked"):
            del values[name]  # of this moment only
        return values


def split_datastore_path(path: str) -> List[str]:
    """``[vmfs01] app01/app01.vmdk`` -> ``["vmfs01", "app01/app01.vmdk"]``; no datastore gives an empty name.

    One space stands between the two; another is the beginning of a folder's name.
    """
    if path.startswith("[") and "]" in path:
        datastore, rest = path[1:].split("]", 1)
        return [datastore, rest[1:] if rest.startswith(" ") else rest]
    return ["", path]


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def disks_of(hardware_devices: Iterable[Any]) -> List[Disk]:
    """The virtual disks of ``config.hardware.device``, in the order of the configuration.

    Independent disks and physical RDMs are listed with the reason why no snapshot holds them (VADP facts 13).
    """
    devices = list(hardware_devices)
    controllers = {device.key: device for device in devices if isinstance(device, vim.vm.device.VirtualController)}
    return [
        _disk(device, controllers.get(device.controllerKey))
        for device in devices
        if isinstance(device, vim.vm.device.VirtualDisk)
    ]


def _disk(device: Any, controller: Any) -> Disk:
    backing = device.backing
    file_name = getattr(backing, "fileName", None) or ""
    skip_reason = _skip_reason(backing)
    parent = getattr(backing, "parent", None)
    return Disk(
        key=device.key,
        label=getattr(device.deviceInfo, "label", None) or f"disk {device.key}",
        file=file_name,
        datastore=split_datastore_path(file_name)[0],
        # Servers older than 5.5, and some for RDMs, fill in the KB only.
        capacity_bytes=int(device.capacityInBytes or (device.capacityInKB or 0) * 1024),
        uuid=getattr(backing, "uuid", None) or None,
        change_id=getattr(backing, "changeId", None) or None,
        included=skip_reason is None,
        skip_reason=skip_reason,
        controller=_controller(controller),
        unit=device.unitNumber,
        thin=getattr(backing, "thinProvisioned", None),
        mode=getattr(backing, "diskMode", None),
        encrypted=getattr(backing, "keyId", None) is not None,
        chained=parent is not None,
        # A delta lies with the file that it was made of, unless that is another machine's.
        linked=parent is not None and _folder_of(parent.fileName or file_name) != _folder_of(file_name),
    )


def _controller(controller: Any) -> Dict[str, Any]:
    if controller is None:
        return {}
    name = type(controller).__name__.rsplit(".", 1)[-1]
    return {"type": _CONTROLLERS.get(name, name), "key": controller.key, "bus": controller.busNumber}


def _skip_reason(backing: Any) -> Optional[str]:
    """Why no snapshot holds a disk with this backing, or ``None``."""
    physical = vim.vm.device.VirtualDiskOption.CompatibilityMode.physicalMode
    mode = getattr(backing, "diskMode", None) or ""
    if getattr(backing, "compatibilityMode", None) == physical:
        return (
            "a raw device mapping in physical compatibility mode can't be in a snapshot; use virtual compatibility mode"
        )
    if isinstance(
        backing,
        (vim.vm.device.VirtualDisk.RawDiskVer2BackingInfo, vim.vm.device.VirtualDisk.PartitionedRawDiskVer2BackingInfo),
    ):
        return "a raw host device can't be in a snapshot"
    if mode.startswith("independent"):
        return f"an independent disk ({mode}) is in no snapshot; make it dependent while the virtual machine is off"
    return None


def is_multi_writer(device: Any) -> bool:
    return getattr(device.backing, "sharing", None) == "sharingMultiWriter"


def vm_obstacles(config: Any, *, snapshot: bool = True) -> List[str]:
    """Why this virtual machine can't be backed up at all (VADP facts 13), each with what would change that.

    :param config: ``vim.vm.ConfigInfo``, or anything with its ``template`` and ``hardware.device``.
    :param snapshot: whether the backup goes through one; that of a template does not.
    """
    obstacles = []
    if config.template and snapshot:
        obstacles.append(
            "it is a template, which can't have a snapshot; convert it to a virtual machine or back up its source"
        )
    for device in config.hardware.device:
        label = getattr(device.deviceInfo, "label", None) or f"device {device.key}"
        # SCSI and NVMe controllers have it.
        sharing = getattr(device, "sharedBus", None) or "noSharing"
        if sharing != "noSharing":
            obstacles.append(
                f"{label} shares its bus with other virtual machines ({sharing}), which excludes snapshots;"
                " use a backup agent in the guests"
            )
        elif (
            snapshot
            and isinstance(device, vim.vm.device.VirtualPCIPassthrough)
            and not isinstance(device.backing, vim.vm.device.VirtualPCIPassthrough.VmiopBackingInfo)
        ):
            obstacles.append(
                f"{label} is a passthrough device, which excludes snapshots; remove it or use a backup agent"
            )
        elif (
            isinstance(device, vim.vm.device.VirtualDisk)
            and is_multi_writer(device)
            and not _skip_reason(device.backing)
        ):
            obstacles.append(
                f"{label} may be written by several virtual machines (multi-writer), which excludes snapshots;"
                " make it independent or use a backup agent"
            )
    return obstacles
