# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""qemu's command line from saved configurations; qemu itself says whether it takes it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.machine import (
    BootDisk,
    Machine,
    design,
    firmware_of,
)
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.run import BootRequest, command_line


def saved(*controllers: Tuple[str, int, List[Tuple[int, int]]], **config: Any) -> Dict[str, Any]:
    """A configuration. A controller is (class, bus, [(device key of a disk, unit)])."""
    devices: List[Dict[str, Any]] = []
    for number, (kind, bus, disks) in enumerate(controllers):
        key = 1000 + number
        devices.append({"_type": f"vim.vm.device.{kind}", "key": key, "busNumber": bus})
        for disk, unit in disks:
            place = {"controllerKey": key, "unitNumber": unit}
            devices.append({"_type": "vim.vm.device.VirtualDisk", "key": disk, **place})
    hardware = {"numCPU": 4, "memoryMB": 4096, "device": devices}
    return {"config": {"hardware": hardware, **config}}


def disks(*keys: int) -> List[BootDisk]:
    return [BootDisk(key, f"Hard disk {key}", "driver=null-co,size=1048576,read-zeroes=on") for key in keys]


def devices_of(machine: Machine) -> List[str]:
    pairs = zip(machine.arguments, machine.arguments[1:])
    return [value for option, value in pairs if option == "-device"]


ALL: List[Tuple[str, int, List[Tuple[int, int]]]] = [
    ("VirtualIDEController", 0, [(3000, 0), (3001, 1)]),
    ("VirtualIDEController", 1, [(3002, 0)]),
    ("VirtualAHCIController", 0, [(16000 + unit, unit) for unit in range(8)]),
    ("VirtualNVMEController", 0, [(31000, 0), (31001, 1)]),
    ("ParaVirtualSCSIController", 0, [(2000, 0), (2001, 8)]),
    ("VirtualLsiLogicSASController", 1, [(2016, 0)]),
    ("VirtualLsiLogicController", 2, [(2032 + unit, unit) for unit in range(7)] + [(2040, 8)]),
    ("VirtualBusLogicController", 3, [(2048, 0)]),
]
KEYS = [key for dummy, dummy, places in ALL for key, dummy in places]


def test_each_controller_has_an_equal_and_qemu_takes_them_all(tmp_path: Path) -> None:
    machine = design(saved(*ALL), disks(*KEYS), memory_mb=256, cpus=2)
    placed = devices_of(machine)
    assert "ide-hd,drive=disk3001,write-cache=on,bus=ide.0,unit=1,bootindex=" in " ".join(placed)
    assert len([device for device in placed if device.startswith("ich9-ahci")]) == 3  # 8 disks, and that of BusLogic
    assert len([device for device in placed if device.startswith("lsi53c895a")]) == 2
    assert len([device for device in placed if device.startswith("nvme,")]) == 2
    assert machine.buses[2000] == "paravirtual SCSI" and machine.buses[2048] == "SATA (AHCI)"
    assert (machine.cpus, machine.memory_mb) == (2, 256)
    assert "it has 256 MiB of memory, not 4096" in machine.notes
    assert any("no VirtualBusLogicController" in note for note in machine.notes)
    request = BootRequest(repository="/r", boot_agent=True)
    command = command_line("qemu-system-x86_64", machine, "tcg", request, str(tmp_path))
    for wanted in (["-nic", "none"], ["-smp", "2"], ["-m", "256"], ["-accel", "tcg"]):
        assert any(command[at : at + 2] == wanted for at in range(len(command)))
    assert command[command.index("-sandbox") + 1].startswith("on,") and "-S" in command
    assert not any("netdev" in word or "usb=on" in word for word in command)
    # It ends where it is told to, before it runs; what it does not know it says.
    told = '{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
    done = subprocess.run(
        [*command, "-qmp", "stdio"], input=told, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_boot_disk_is_the_one_that_the_machine_booted_from() -> None:
    two = ("ParaVirtualSCSIController", 1, [(2016, 0)]), ("ParaVirtualSCSIController", 0, [(2001, 3), (2000, 0)])

    def order(**config: Any) -> List[int]:
        machine = design(saved(*two, **config), disks(2001, 2016, 2000), memory_mb=256, cpus=1)
        drives = [device for device in devices_of(machine) if "drive=" in device]
        assert [device.rpartition("=")[2] for device in drives] == ["0", "1", "2"]
        return [int(device.partition("drive=disk")[2][:4]) for device in drives]

    assert order() == [2000, 2001, 2016]
    entry = {"_type": "vim.vm.BootOptions.BootableDiskDevice", "deviceKey": 2016}
    assert order(bootOptions={"bootOrder": [{"_type": "x.Cdrom"}, entry]}) == [2016, 2000, 2001]


def test_firmware_and_what_is_unknown() -> None:
    assert firmware_of({"firmware": "efi"}) == "efi" and firmware_of({}) == "bios"
    efi = saved(firmware="efi", bootOptions={"efiSecureBootEnabled": True})
    machine = design(efi, disks(2000), memory_mb=512, cpus=1, firmware=("/f/code,1.fd", "/f/vars.fd"))
    assert "if=pflash,unit=0,format=raw,readonly=on,file=/f/code,,1.fd" in machine.arguments
    assert "if=pflash,unit=1,format=raw,readonly=off,file=/f/vars.fd" in machine.arguments
    assert "Secure Boot is off" in machine.notes and machine.buses == {2000: "SATA (AHCI)"}
    # Its driver for SATA is the only one that guests on SCSI have too.
    efi = saved(*ALL[4:7], firmware="efi")
    machine = design(efi, disks(2000, 2016, 2032), memory_mb=512, cpus=1, firmware=("/f/code.fd", "/f/vars.fd"))
    assert machine.buses == dict.fromkeys((2000, 2016, 2032), "SATA (AHCI)")
    assert "disk 2016 is on SATA (AHCI): the firmware has no driver for LSI Logic SAS" in machine.notes
    assert not any(kind in " ".join(machine.arguments) for kind in ("pvscsi", "mptsas", "lsi53"))
    # A configuration that says nothing at all.
    machine = design({}, disks(2000), memory_mb=512, cpus=4)
    assert (machine.memory_mb, machine.cpus, machine.firmware) == (512, 1, "bios")
    with pytest.raises(InputError, match="more disks on IDE"):
        many = saved(("VirtualIDEController", 0, [(3000 + unit, unit) for unit in range(5)]))
        design(many, disks(*range(3000, 3005)), memory_mb=256, cpus=1)
