# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an administrator does to a virtual machine in the vSphere client, behind the backup's back."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any, Dict

from pyVim.connect import Disconnect, SmartConnect
from pyVim.task import WaitForTask
from pyVmomi import vim


class Administrator:
    """A session of the simulator's administrator, and one virtual machine.

    :param facts: the simulator's JSON line.
    """

    def __init__(self, facts: Dict[str, Any], vm: str) -> None:
        self._service = SmartConnect(
            host=facts["host"],
            port=facts["port"],
            user=facts["username"],
            pwd=facts["password"],
            sslContext=ssl.create_default_context(cafile=facts["ca_path"]),
        )
        content = self._service.content
        machines = content.viewManager.CreateContainerView(content.rootFolder, [vim.VirtualMachine], True).view
        self._vm = next(machine for machine in machines if machine.name == vm)

    def close(self) -> None:
        Disconnect(self._service)

    def revert(self, moid: str) -> None:
        """Go back to a snapshot. The machine is off afterwards."""
        WaitForTask(vim.vm.Snapshot(moid, self._vm._stub).RevertToSnapshot_Task())

    def make_snapshot(self, name: str) -> None:
        WaitForTask(self._vm.CreateSnapshot_Task(name=name, description="", memory=False, quiesce=False))

    def remove_snapshot(self, moid: str) -> None:
        """The task may fail half-way, as it does where somebody reads a disk."""
        with contextlib.suppress(vim.fault.FileLocked):
            WaitForTask(vim.vm.Snapshot(moid, self._vm._stub).RemoveSnapshot_Task(removeChildren=False))

    def track_changes(self, on: bool) -> None:
        """The advanced setting alone: in a running machine it has no effect before the next stun."""
        self._reconfigure(vim.vm.ConfigSpec(changeTrackingEnabled=on))

    def add_disk(self, unit: int, capacity_bytes: int) -> int:
        """A new, empty disk on the first controller; its device key."""
        return self._add(unit, capacity_bytes, self._folder(), "create")

    def attach_disk(self, unit: int, path: str) -> int:
        """A disk that exists; its device key."""
        return self._add(unit, None, path, None)

    def detach_disk(self, key: int) -> str:
        """The datastore path of a disk that is taken out of the configuration; its files stay."""
        disk = self._disk(key)
        self._change(vim.vm.device.VirtualDeviceSpec(operation="remove", device=disk))
        return str(disk.backing.fileName)

    def pass_through(self) -> None:
        """Hand a PCI device of the host to the machine."""
        backing = vim.vm.device.VirtualPCIPassthrough.DeviceBackingInfo(
            id="00000:001:00.0", deviceId="10de", systemId="host", vendorId=0x10DE, deviceName="GPU"
        )
        device = vim.vm.device.VirtualPCIPassthrough(key=13000, backing=backing)
        self._change(vim.vm.device.VirtualDeviceSpec(operation="add", device=device))

    def furnish(self, iso: str) -> None:
        """Give the machine what machines have: a second controller with a disk, cards, drives, ports, settings."""
        kinds = vim.vm.device
        ethernet = kinds.VirtualEthernetCard
        switch = self._find(vim.DistributedVirtualSwitch, "DSwitch0")
        group = self._find(vim.dvs.DistributedVirtualPortgroup, "dv-vmotion")
        port = vim.dvs.PortConnection(switchUuid=switch.uuid, portgroupKey=group.key)
        connected = kinds.VirtualDevice.ConnectInfo(startConnected=True, allowGuestControl=True, connected=True)
        devices = [
            kinds.VirtualLsiLogicSASController(key=-1, busNumber=2, sharedBus="noSharing"),
            kinds.VirtualAHCIController(key=-2, busNumber=0),
            kinds.VirtualUSBController(key=-3, busNumber=0, autoConnectDevices=False),
            kinds.VirtualE1000e(
                key=-4,
                addressType="manual",
                macAddress="00:50:56:11:22:33",
                wakeOnLanEnabled=True,
                connectable=connected,
                backing=ethernet.DistributedVirtualPortBackingInfo(port=port),
            ),
            kinds.VirtualCdrom(
                key=-5,
                controllerKey=-2,
                unitNumber=0,
                connectable=connected,
                backing=kinds.VirtualCdrom.IsoBackingInfo(fileName=iso),
            ),
            kinds.VirtualSerialPort(
                key=-6, yieldOnPoll=True, backing=kinds.VirtualSerialPort.DeviceBackingInfo(deviceName="/dev/ttyS0")
            ),
            kinds.VirtualUSB(key=-7, connected=True, backing=kinds.VirtualUSB.USBBackingInfo(deviceName="path:0/1")),
        ]
        changes = [kinds.VirtualDeviceSpec(operation="add", device=device) for device in devices]
        video = self._disk(500)
        video.videoRamSizeInKB = 16384
        changes.append(kinds.VirtualDeviceSpec(operation="edit", device=video))
        disk = kinds.VirtualDisk(
            key=-8,
            controllerKey=-1,
            unitNumber=3,
            capacityInBytes=8 << 20,
            capacityInKB=8 << 10,
            backing=kinds.VirtualDisk.FlatVer2BackingInfo(
                fileName="[nfs01]", diskMode="persistent", thinProvisioned=False
            ),
        )
        changes.append(kinds.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk))
        option = vim.option.OptionValue
        self._reconfigure(
            vim.vm.ConfigSpec(
                deviceChange=changes,
                annotation="An old server.\nDon't touch.",
                numCPUs=2,
                memoryMB=2048,
                cpuHotAddEnabled=True,
                bootOptions=vim.vm.BootOptions(efiSecureBootEnabled=True, bootDelay=1000),
                extraConfig=[
                    option(key="disk.EnableUUID", value="TRUE"),
                    option(key="ethernet0.pciSlotNumber", value="192"),
                    option(key="guestinfo.role", value="web"),
                    option(key="sched.swap.derivedName", value="/vmfs/volumes/x/app01.vswp"),
                    option(key="scsi0:0.ctkEnabled", value="TRUE"),
                ],
            )
        )
        boot = vim.vm.BootOptions
        order = [boot.BootableDiskDevice(deviceKey=2000), boot.BootableCdromDevice()]
        self._reconfigure(vim.vm.ConfigSpec(bootOptions=boot(bootOrder=order)))

    def describe(self, **values: str) -> None:
        """Custom attributes of virtual machines, with what is written into this one's."""
        manager = self._service.content.customFieldsManager
        for name, value in values.items():
            field = manager.AddFieldDefinition(name, vim.VirtualMachine, None, None)
            manager.SetField(self._vm, field.key, value)

    def forget_attribute(self, name: str) -> None:
        manager = self._service.content.customFieldsManager
        manager.RemoveCustomFieldDef(next(field.key for field in manager.field if field.name == name))

    def attributes(self, moid: str) -> Dict[str, str]:
        """The custom attributes of a machine, by their names."""
        machine = vim.VirtualMachine(moid, self._vm._stub)
        names = {field.key: field.name for field in machine.availableField}
        return {names[value.key]: value.value for value in machine.customValue}

    def config(self, moid: str = "") -> Any:
        """The configuration of this machine, or of another one."""
        return (vim.VirtualMachine(moid, self._vm._stub) if moid else self._vm).config

    def move_beside(self, *names: str) -> None:
        """Into a new folder of the first name below the datacenter's. The others become folders in each other."""
        above: Any = self._vm.parent.parent
        WaitForTask(above.CreateFolder(names[0]).MoveIntoFolder_Task([self._vm]))
        for name in names[1:]:
            above = above.CreateFolder(name)

    def destroy(self, name: str) -> None:
        """A machine and its files, off."""
        WaitForTask(self._find(vim.VirtualMachine, name).Destroy_Task())

    def destroy_moid(self, moid: str) -> None:
        WaitForTask(vim.VirtualMachine(moid, self._vm._stub).Destroy_Task())

    def _find(self, kind: Any, name: str) -> Any:
        content = self._service.content
        found = content.viewManager.CreateContainerView(content.rootFolder, [kind], True).view
        return next(one for one in found if one.name == name)

    def _folder(self) -> str:
        return str(self._vm.config.files.vmPathName).split(" ", maxsplit=1)[0]

    def _disk(self, key: int) -> Any:
        return next(device for device in self._vm.config.hardware.device if device.key == key)

    def _add(self, unit: int, capacity_bytes: Any, path: str, operation: Any) -> int:
        before = {device.key for device in self._vm.config.hardware.device}
        disk = vim.vm.device.VirtualDisk(
            key=-1,
            controllerKey=1000,
            unitNumber=unit,
            capacityInBytes=capacity_bytes,
            capacityInKB=(capacity_bytes or 0) // 1024,
            backing=vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
                fileName=path, diskMode="persistent", thinProvisioned=True
            ),
        )
        self._change(vim.vm.device.VirtualDeviceSpec(operation="add", fileOperation=operation, device=disk))
        added = {device.key for device in self._vm.config.hardware.device} - before
        return int(added.pop())

    def _change(self, change: Any) -> None:
        self._reconfigure(vim.vm.ConfigSpec(deviceChange=[change]))

    def _reconfigure(self, spec: Any) -> None:
        WaitForTask(self._vm.ReconfigVM_Task(spec))
