# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a saved virtual machine is in qemu: its command line, from the configuration that lies beside the point. Pure.

The machine is an i440FX as VMware's is, with as much of the saved hardware as a guest needs to find its disks again:
firmware, controllers, the order of the disks. There is no network card and no USB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ...errors import InputError

BIOS = "bios"
EFI = "efi"

#: A controller's class -> (what the guest sees, disks that one of qemu's takes). 0: the chipset's own IDE.
_IDE = ("ide", 4)
_SATA = ("sata", 6)
_KINDS: Dict[str, Tuple[str, int]] = {
    "VirtualIDEController": _IDE,
    "VirtualAHCIController": _SATA,
    "VirtualNVMEController": ("nvme", 1),
    "ParaVirtualSCSIController": ("pvscsi", 16),
    "VirtualLsiLogicSASController": ("mptsas1068", 8),
    "VirtualLsiLogicController": ("lsi53c895a", 7),
}
_SHOWN = {
    "ide": "IDE",
    "sata": "SATA (AHCI)",
    "nvme": "NVMe",
    "pvscsi": "paravirtual SCSI",
    "mptsas1068": "LSI Logic SAS",
    "lsi53c895a": "LSI Logic 53C895A",
}
#: OVMF, as distributions build it, finds no disk on these. Guests made for EFI have SATA's driver, for their CD drive.
_NOT_BY_EFI = ("pvscsi", "mptsas1068", "lsi53c895a")
_LEAST_MEMORY_MB = 128


@dataclass(frozen=True)
class BootDisk:
    """A disk of the point. ``options`` are qemu's for the overlay over its layer, without a node's name."""

    key: int
    label: str
    options: str


@dataclass(frozen=True)
class Machine:
    """``arguments`` are qemu's for the machine itself: no accelerator, no sockets. ``notes``: what is different."""

    arguments: List[str]
    firmware: str
    memory_mb: int
    cpus: int
    buses: Dict[int, str]
    notes: List[str] = field(default_factory=list)


@dataclass
class _Buses:
    """Places of disks on qemu's controllers; a controller is made when the first disk needs it."""

    arguments: List[str] = field(default_factory=list)
    used: Dict[str, int] = field(default_factory=dict)

    def place(self, kind: str, most: int, saved: Any, disk: BootDisk) -> str:
        """The device of a disk on its saved controller, which is several of qemu's if that takes fewer disks.

        :param saved: what tells the saved controllers apart.
        """
        group = "ide" if kind == "ide" else f"{kind}-{saved}"
        number = self.used.get(group, 0)
        self.used[group] = number + 1
        chip, unit = divmod(number, most)
        node = f"node-name=disk{disk.key}"
        self.arguments += ["-blockdev", f"{node},{disk.options}"]
        drive = f"drive=disk{disk.key},write-cache=on"
        if kind == "ide":
            return f"ide-hd,{drive},bus=ide.{unit // 2},unit={unit % 2}"
        name = f"{kind}-{saved}-{chip}"
        if kind == "nvme":
            return f"nvme,drive=disk{disk.key},id={name},serial=openvadp-{disk.key}"
        if unit == 0:
            self.arguments += ["-device", f"{'ich9-ahci' if kind == 'sata' else kind},id={name}"]
        if kind == "sata":
            return f"ide-hd,{drive},bus={name}.{unit}"
        return f"scsi-hd,{drive},bus={name}.0,scsi-id={unit}"


def firmware_of(saved: Mapping[str, Any]) -> str:
    """``bios`` or ``efi``."""
    config = _config(saved)
    return EFI if str(saved.get("firmware") or config.get("firmware") or BIOS).lower() == EFI else BIOS


def design(
    saved: Mapping[str, Any],
    disks: Sequence[BootDisk],
    *,
    memory_mb: int,
    cpus: int,
    firmware: Optional[Tuple[str, str]] = None,
) -> Machine:
    """The machine.

    :param saved: the configuration as ``vsphere.configuration.save`` made it.
    :param disks: all disks of the point.
    :param memory_mb: as much memory as it gets at most.
    :param cpus: as many processors as it gets at most.
    :param firmware: for EFI, the files of OVMF's code and of a copy of its variables.
    :raises InputError: the point has more disks on IDE than qemu's machine takes.
    """
    hardware = _config(saved).get("hardware") or {}
    devices = {device["key"]: device for device in hardware.get("device") or [] if "key" in device}
    memory = max(_LEAST_MEMORY_MB, min(int(hardware.get("memoryMB") or memory_mb), memory_mb))
    count = max(1, min(int(hardware.get("numCPU") or 1), cpus))
    kind_of_firmware = firmware_of(saved)
    notes = []
    if int(hardware.get("memoryMB") or memory) > memory:
        notes.append(f"it has {memory} MiB of memory, not {hardware['memoryMB']}")
    buses = _Buses()
    attached: Dict[int, str] = {}
    arguments: List[str] = []
    for index, disk in enumerate(_in_boot_order(saved, disks, devices)):
        place = devices.get(disk.key) or {}
        controller = devices.get(place.get("controllerKey")) or {}
        kind, most = _KINDS.get(_class(controller), _SATA)
        if kind_of_firmware == EFI and kind in _NOT_BY_EFI:
            notes.append(f"disk {disk.key} is on {_SHOWN['sata']}: the firmware has no driver for {_SHOWN[kind]}")
            kind, most = _SATA
        elif _class(controller) not in _KINDS:
            why = f"qemu has no {_class(controller)}" if controller else "its controller is not known"
            notes.append(f"disk {disk.key} is on {_SHOWN[kind]}: {why}")
        elif kind == "lsi53c895a":
            notes.append(
                f"disk {disk.key} is on {_SHOWN[kind]}, which the guest needs a driver for: qemu has no 53C1030"
            )
        if kind == "ide" and buses.used.get("ide", 0) >= most:
            raise InputError("The machine has more disks on IDE than qemu takes", subject=f"disk {disk.key}")
        device = buses.place(kind, most, controller.get("key", "other"), disk)
        arguments += ["-device", f"{device},bootindex={index}"]
        attached[disk.key] = _SHOWN[kind]
    machine = ["-machine", "pc,usb=off,vmport=off"]
    if kind_of_firmware == EFI:
        if firmware is None:
            raise ValueError("EFI needs the files of a firmware")
        for number, (path, read_only) in enumerate(((firmware[0], "on"), (firmware[1], "off"))):
            quoted = path.replace(",", ",,")
            machine += ["-drive", f"if=pflash,unit={number},format=raw,readonly={read_only},file={quoted}"]
        if (_config(saved).get("bootOptions") or {}).get("efiSecureBootEnabled"):
            notes.append("Secure Boot is off")
    machine += ["-smp", str(count), "-m", str(memory), "-vga", "std", "-nic", "none"]
    return Machine(machine + buses.arguments + arguments, kind_of_firmware, memory, count, attached, notes)


def _config(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    config = saved.get("config")
    return config if isinstance(config, dict) else {}


def _class(device: Mapping[str, Any]) -> str:
    return str(device.get("_type", "")).rpartition(".")[2]


def _in_boot_order(
    saved: Mapping[str, Any], disks: Sequence[BootDisk], devices: Mapping[Any, Dict[str, Any]]
) -> List[BootDisk]:
    """Those that the saved boot order names first, then by controllers and units, as VMware's firmware looks."""
    order = (_config(saved).get("bootOptions") or {}).get("bootOrder") or []
    named = [entry.get("deviceKey") for entry in order if isinstance(entry, dict) and entry.get("deviceKey")]

    def rank(disk: BootDisk) -> Tuple[int, int, int, int]:
        place = devices.get(disk.key) or {}
        controller = devices.get(place.get("controllerKey")) or {}
        first = named.index(disk.key) if disk.key in named else len(named)
        return first, int(controller.get("busNumber") or 0), int(place.get("unitNumber") or 0), disk.key

    return sorted(disks, key=rank)
