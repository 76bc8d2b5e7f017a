# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a disk can be hot-added: the free units of a VM's SCSI controllers, and controllers that can be added.

Pure functions on vim objects. Keys of what does not exist yet are negative and mean something within one request only:
vCenter gives out the real ones, which are read back and never computed (VADP facts 28).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Collection, Dict, Iterable, List, NamedTuple, Optional, Set

from ..libraries import vim

MAX_CONTROLLERS = 4
# Unit numbers 0 to 15 without the controller's own, 7: fifteen disks. Every SCSI controller takes that many.
SAFE_UNITS = 16
_RESERVED_UNIT = 7


class Slot(NamedTuple):
    """A place for a disk. A negative key is that of a controller that is added in the same request."""

    controller_key: int
    unit: int


class NewController(NamedTuple):
    """A PVSCSI controller to add."""

    key: int
    bus: int


@dataclass(frozen=True)
class Placement:
    """Places for disks, and the controllers that must be added for them."""

    slots: List[Slot]
    controllers: List[NewController]


def place(
    devices: Iterable[Any], count: int, pvscsi_units: int = SAFE_UNITS, avoid: Collection[int] = ()
) -> Optional[Placement]:
    """Places for *count* disks, or None if there aren't so many.

    Free units of PVSCSI controllers come first, then those of other controllers, then those that only newer PVSCSI
    controllers have, then controllers to be added.

    :param devices: ``config.hardware.device``.
    :param pvscsi_units: unit numbers of a PVSCSI controller, as :func:`pvscsi_units` reads them.
    :param avoid: units that no controller's disk gets.
    """
    known = list(devices)
    slots = _free_slots(known, pvscsi_units, avoid)[:count]
    controllers: List[NewController] = []
    for bus in _free_buses(known):
        if len(slots) == count:
            break
        added = NewController(key=-1 - len(controllers), bus=bus)
        controllers.append(added)
        units = _usable(range(max(SAFE_UNITS, pvscsi_units)), {_RESERVED_UNIT, *avoid})
        slots += [Slot(added.key, unit) for unit in units[: count - len(slots)]]
    return Placement(slots, controllers) if len(slots) == count else None


def free_units(devices: Iterable[Any], pvscsi_units: int = SAFE_UNITS, avoid: Collection[int] = ()) -> int:
    """How many disks the controllers that are there still take."""
    return len(_free_slots(list(devices), pvscsi_units, avoid))


def can_add_controller(devices: Iterable[Any]) -> bool:
    """Whether the VM can have one more SCSI controller."""
    return bool(_free_buses(list(devices)))


def pvscsi_units(config_option: Any) -> int:
    """Unit numbers of a PVSCSI controller, out of a ``vim.vm.ConfigOption``; never less than every controller has.

    What is told there is how many disks it takes: the controller's own unit is one more.
    """
    hardware = getattr(config_option, "hardwareOptions", None)
    for option in getattr(hardware, "virtualDeviceOption", None) or []:
        if isinstance(option, vim.vm.device.ParaVirtualSCSIControllerOption):
            return max(SAFE_UNITS, 1 + int(getattr(option.numSCSIDisks, "max", None) or 0))
    return SAFE_UNITS


def _free_slots(devices: List[Any], wide_units: int, avoid: Collection[int] = ()) -> List[Slot]:
    taken: Dict[int, Set[int]] = {}
    for device in devices:
        if device.controllerKey is not None and device.unitNumber is not None:
            taken.setdefault(device.controllerKey, set()).add(device.unitNumber)
    first: List[Slot] = []
    others: List[Slot] = []
    wide: List[Slot] = []
    for controller in devices:
        if not _takes_disks(controller):
            continue
        own = getattr(controller, "scsiCtlrUnitNumber", None)
        used = taken.get(controller.key, set()) | {_RESERVED_UNIT if own is None else own, *avoid}
        narrow = [Slot(controller.key, unit) for unit in _usable(range(SAFE_UNITS), used)]
        if isinstance(controller, vim.vm.device.ParaVirtualSCSIController):
            first += narrow
            wide += [Slot(controller.key, unit) for unit in _usable(range(SAFE_UNITS, wide_units), used)]
        else:
            others += narrow
    return first + others + wide


def _takes_disks(device: Any) -> bool:
    """A SCSI controller that a disk can be added to while the VM runs, and that no other VM shares."""
    return (
        isinstance(device, vim.vm.device.VirtualSCSIController)
        and getattr(device, "hotAddRemove", None) is not False
        and (getattr(device, "sharedBus", None) or "noSharing") == "noSharing"
    )


def _usable(units: Iterable[int], used: Set[int]) -> List[int]:
    return [unit for unit in units if unit not in used]


def _free_buses(devices: List[Any]) -> List[int]:
    used = {device.busNumber for device in devices if isinstance(device, vim.vm.device.VirtualSCSIController)}
    return [bus for bus in range(MAX_CONTROLLERS) if bus not in used]
