# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""ReconfigVM_Task, and how devices of a ConfigSpec become devices of a VM."""

from __future__ import annotations

import copy
import uuid as uuid_module
from typing import Any

from pyVmomi import vim, vmodl

from .. import disks, networking, proxy, storage, vmspec
from ..inventory import Network, VirtualMachine, datastore_of, folder_of, is_rdm
from ..services import Task
from . import Context, method

device = vim.vm.device
Spec = device.VirtualDeviceSpec

# What a configuration and its specification have in common and the simulator has no opinion on.
PLAIN = (
    "annotation",
    "guestId",
    "firmware",
    "uuid",
    "instanceUuid",
    "alternateGuestName",
    "cpuHotAddEnabled",
    "cpuHotRemoveEnabled",
    "memoryHotAddEnabled",
    "memoryReservationLockedToMax",
    "nestedHVEnabled",
    "vPMCEnabled",
    "maxMksConnections",
    "guestAutoLockEnabled",
    "messageBusTunnelEnabled",
    "latencySensitivity",
    "cpuAllocation",
    "memoryAllocation",
    "swapPlacement",
    "migrateEncryption",
    "consolePreferences",
)
# What every VM has once, from its making.
DEFAULT = (device.VirtualKeyboard, device.VirtualPointingDevice, device.VirtualVideoCard, device.VirtualVMCIDevice)

MODES = (
    "persistent",
    "nonpersistent",
    "undoable",
    "independent_persistent",
    "independent_nonpersistent",
    "append",
)


def required_privileges(vm: VirtualMachine, spec: Any) -> list[str]:
    """What a caller needs for what a ConfigSpec asks for."""
    prefix = "VirtualMachine.Config."
    needed: dict[str, None] = {}

    def need(name: str) -> None:
        needed[prefix + name] = None

    if spec.changeTrackingEnabled is not None:
        need("ChangeTracking")
    if spec.extraConfig:
        need("AdvancedConfig")
    if spec.name is not None:
        need("Rename")
    if spec.numCPUs is not None or spec.numCoresPerSocket is not None:
        need("CPUCount")
    if spec.memoryMB is not None:
        need("Memory")
    if spec.annotation is not None:
        need("Annotation")
    settings = ("guestId", "firmware", "bootOptions", "flags", "tools", "uuid", "instanceUuid", "version", "files")
    if any(getattr(spec, name) is not None for name in settings):
        need("Settings")
    for change in spec.deviceChange:
        if not isinstance(change.device, device.VirtualDisk):
            need("EditDevice" if change.operation == "edit" else "AddRemoveDevice")
        elif change.operation == "add":
            need("RawDevice" if is_rdm(change.device) else "AddNewDisk" if change.fileOperation else "AddExistingDisk")
            if not change.fileOperation and vm.simulator.inventory.is_encrypted(change.device.backing.fileName or ""):
                needed["Cryptographer.AddDisk"] = None
        elif change.operation == "remove":
            need("RemoveDisk")
        else:
            mine = next((one for one in vm.disks if one.key == change.device.key), None)
            same = mine is not None and _capacity(change.device, mine) == mine.capacityInBytes
            need("EditDevice" if same else "DiskExtend")
    return list(needed) or [prefix + "Settings"]


def _capacity(wanted: Any, mine: Any) -> int:
    """The capacity an edit asks for: whichever of the two fields differs from what the disk has."""
    if wanted.capacityInBytes and wanted.capacityInBytes != mine.capacityInBytes:
        return wanted.capacityInBytes
    if wanted.capacityInKB and wanted.capacityInKB != mine.capacityInKB:
        return wanted.capacityInKB * 1024
    return mine.capacityInBytes


@method("VirtualMachine", "ReconfigVM_Task", changing=True, privilege="System.View")
def reconfigure(context: Context, vm: VirtualMachine, spec: Any) -> Any:
    for privilege in required_privileges(vm, spec):
        context.require(privilege, vm)
    for change in spec.deviceChange:
        if change.fileOperation and change.operation == "add":
            context.require("Datastore.AllocateSpace", vm)
    _compare(vm, spec)
    if vm.is_template and (spec.deviceChange or spec.changeTrackingEnabled is not None):
        raise vmodl.fault.NotSupported(msg="The operation is not supported on a template.")

    return start(context, vm, spec)


def start(context: Any, vm: VirtualMachine, spec: Any) -> Any:
    """The task of a reconfiguration that the caller may do."""

    def body(task: Task) -> None:
        with vm.lock:
            _compare(vm, spec)  # another one may have been carried out since the call
            apply(vm, spec)

    return context.simulator.tasks.start(context, context.method, vm, body, vm)


def _compare(vm: VirtualMachine, spec: Any) -> None:
    """A change version in the specification is a condition (VADP facts 54)."""
    if spec.changeVersion and spec.changeVersion != vm.config.changeVersion:
        raise vim.fault.ConcurrentAccess()


def apply(vm: VirtualMachine, spec: Any) -> None:
    """Do what a ConfigSpec says; devices first, as they are what can fail."""
    simulator = vm.simulator
    check_tracking(vm, spec)
    Devices(vm).change(spec.deviceChange)
    with simulator.lock:
        config = vm.config
        if spec.name is not None:
            vm.name = config.name = spec.name
        for name in PLAIN:
            value = getattr(spec, name)
            if value is not None:
                setattr(config, name, value)
        if spec.guestId is not None:
            config.guestFullName = vmspec.guest_name(spec.guestId)
        if spec.powerOpInfo is not None:
            config.defaultPowerOps = spec.powerOpInfo
        _check_boot_order(vm, spec)
        for name in ("bootOptions", "flags", "tools"):
            value = getattr(spec, name)
            if value is None:
                continue
            merged = copy.copy(getattr(config, name))
            for info in value._GetPropertyList():
                field = getattr(value, info.name)
                if field is not None and field != []:
                    setattr(merged, info.name, field)
            setattr(config, name, merged)
        if spec.version is not None:
            config.version = spec.version
        if spec.memoryMB is not None:
            config.hardware.memoryMB = int(spec.memoryMB)
        if spec.numCPUs is not None:
            config.hardware.numCPU = spec.numCPUs
        if spec.numCoresPerSocket is not None:
            config.hardware.numCoresPerSocket = spec.numCoresPerSocket
        set_extra_config(config, spec.extraConfig)
        if spec.changeTrackingEnabled is not None:
            config.changeTrackingEnabled = spec.changeTrackingEnabled
        vm.touch()
    if spec.changeTrackingEnabled is not None and not vm.powered_on:
        disks.stun_cycle(vm)
        with simulator.lock:
            vm.touch()
    simulator.proxy.sync(vm)


def _check_boot_order(vm: VirtualMachine, spec: Any) -> None:
    keys = {one.key for one in vm.config.hardware.device}
    for entry in spec.bootOptions.bootOrder if spec.bootOptions is not None else ():
        if getattr(entry, "deviceKey", None) is not None and entry.deviceKey not in keys:
            raise vmodl.fault.InvalidArgument(invalidProperty="configSpec.bootOptions.bootOrder.deviceKey")


def check_tracking(vm: VirtualMachine, spec: Any) -> None:
    if spec.changeTrackingEnabled and vm.hardware_version < 7:
        raise vmodl.fault.InvalidArgument(invalidProperty="configSpec.changeTrackingEnabled")


def set_extra_config(config: Any, options: Any) -> None:
    """An empty value takes an option away (VADP facts 53). Names are those of a .vmx: their case does not matter."""
    for option in options:
        for known in list(config.extraConfig):
            if known.key.lower() == option.key.lower():
                config.extraConfig.remove(known)
        if option.value not in (None, ""):
            config.extraConfig.append(vim.option.OptionValue(key=option.key, value=option.value))


def _invalid(index: int, prop: str = "virtualDeviceSpec") -> Exception:
    return vim.fault.InvalidDeviceSpec(
        deviceIndex=index, property=prop, msg=f"Invalid configuration for device '{index}'."
    )


class Devices:
    """Applies a deviceChange list to a VM. Keys of the caller's for new devices are replaced by real ones."""

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm
        self.store = vm.simulator.storage
        self.devices = list(vm.config.hardware.device)
        self.keys: dict[int, int] = {}

    def change(self, changes: Any) -> None:
        """All or nothing, as far as the inventory goes.

        :raises vmodl.MethodFault: a change can't be; new files are removed again.
        """
        created: list[str] = []
        removed: list[str] = []
        grown: list[tuple[Any, int]] = []
        try:
            for index, change in enumerate(changes):
                if change.operation == "add":
                    self._add(index, change, created)
                elif change.operation == "remove":
                    self._remove(index, change, removed)
                else:
                    self._edit(index, change, grown)
            before = list(self.vm.config.hardware.device)
            self._commit()
            try:
                if self.vm.powered_on:
                    disks.lock_foreign_disks(self.vm)
            except vim.fault.FileLocked:
                self.devices = before
                self._commit()
                raise
        except (vmodl.MethodFault, storage.StorageError):
            for path in created:
                self.store.delete_disk(path)
            raise
        disks.unlock(self.vm, keep={disk.backing.fileName for disk in self.vm.disks})
        for disk, capacity in grown:
            disks.grow(self.vm, disk.key, capacity)
        for path in removed:
            for one in self.vm.chain(path):
                if self.store.info(one).children or one in disks.referenced(self.vm):
                    break
                self.store.delete_disk(one)

    def _commit(self) -> None:
        simulator = self.vm.simulator
        with simulator.lock:
            del self.vm.config.hardware.device[:]
            self.vm.config.hardware.device.extend(self.devices)
            if self.vm.powered_on:
                vmspec.assign_slots(self.vm.config.hardware.device)
            self.vm.touch()

    # add

    def _add(self, index: int, change: Any, created: list[str]) -> None:
        new = copy.copy(change.device)
        if isinstance(new, device.VirtualDisk):
            self._add_disk(index, change, new, created)
            return
        if change.fileOperation:
            raise _invalid(index, "fileOperation")
        if isinstance(new, device.VirtualSCSIController):
            bus = self._free_bus(new, device.VirtualSCSIController)
            self._place(new, 1000 + bus, f"SCSI controller {bus}")
            new.busNumber, new.controllerKey, new.unitNumber, new.scsiCtlrUnitNumber = bus, 100, 3 + bus, 7
            new.sharedBus = new.sharedBus or "noSharing"
        elif isinstance(new, device.VirtualAHCIController):
            bus = self._free_bus(new, device.VirtualAHCIController)
            self._place(new, 15000 + bus, f"SATA controller {bus}")
            new.busNumber, new.controllerKey, new.unitNumber = bus, 100, 24 + bus
        elif isinstance(new, device.VirtualNVMEController):
            bus = self._free_bus(new, device.VirtualNVMEController)
            self._place(new, 31000 + bus, f"NVME controller {bus}")
            new.busNumber, new.controllerKey, new.unitNumber = bus, 100, 30 + bus
        elif isinstance(new, (device.VirtualUSBController, device.VirtualUSBXHCIController)):
            if any(type(one) is type(new) for one in self.devices):
                raise vim.fault.TooManyDevices()
            xhci = isinstance(new, device.VirtualUSBXHCIController)
            self._place(new, 14000 if xhci else 7000, "USB xHCI controller" if xhci else "USB controller")
            new.busNumber, new.controllerKey, new.unitNumber = 0, 100, 23 if xhci else 22
        elif isinstance(new, device.VirtualController):
            # The controllers that every VM has: the caller's key stands for ours.
            mine = next((one for one in self.devices if type(one) is type(new)), None)
            if mine is None:
                raise _invalid(index)
            self.keys[new.key] = mine.key
            return
        elif isinstance(new, device.VirtualEthernetCard):
            key = self._free_key(4000)
            self._check_network(index, new)
            self._place(new, key, f"Network adapter {key - 3999}")
            new.controllerKey, new.unitNumber = 100, 7 + key - 4000
            new.addressType = new.addressType or "assigned"
            # The server keeps addresses unique that it may choose itself.
            if not new.macAddress or (new.addressType != "manual" and self._is_taken(new.macAddress)):
                digits = uuid_module.uuid4().hex
                new.macAddress = f"00:50:56:{int(digits[:2], 16) & 0x3F:02x}:{digits[2:4]}:{digits[4:6]}"
        elif isinstance(new, DEFAULT):
            raise _invalid(index)
        elif isinstance(new, device.VirtualTPM) and self.vm.config.keyId is None:
            raise vim.fault.InvalidDeviceSpec(
                deviceIndex=index, property="virtualDeviceSpec.device", msg="A virtual TPM needs an encrypted VM."
            )
        elif isinstance(new, (device.VirtualCdrom, device.VirtualFloppy)):
            self._add_drive(index, new)
        else:
            self._place(new, self._free_key(max(new.key, 3000)), type(new)._wsdlName)
        self.devices.append(new)

    def _add_drive(self, index: int, new: Any) -> None:
        """A CD or floppy drive; the image has to be there if it is connected."""
        path = getattr(new.backing, "fileName", None)
        if path and not self.store.local_path(path).is_file():
            raise vim.fault.FileNotFound(file=path)
        if isinstance(new, device.VirtualFloppy):
            self._place(new, self._free_key(8000), "Floppy drive 1")
            return
        controller = self._controller(index, new.controllerKey)
        unit = self._unit(index, new, controller)
        key = self._disk_key(controller, unit)
        number = sum(1 for one in self.devices if isinstance(one, device.VirtualCdrom)) + 1
        self._place(new, key, f"CD/DVD drive {number}")
        new.controllerKey, new.unitNumber = controller.key, unit

    def _is_taken(self, mac: str) -> bool:
        machines = [one for one in self.vm.simulator.inventory.all(VirtualMachine) if one is not self.vm]
        found = [one for vm in machines for one in vm.config.hardware.device] + self.devices
        return any(getattr(one, "macAddress", None) == mac for one in found)

    def _check_network(self, index: int, new: Any) -> None:
        """A card is connected to a network of the VM's datacenter, if to any."""
        inventory, backing = self.vm.simulator.inventory, new.backing
        datacenter = inventory.datacenter_of(self.vm)
        port = getattr(backing, "port", None)
        if port is not None:
            groups = inventory.all(networking.DistributedPortgroup, datacenter)
            switches = {one.moid: one.uuid for one in inventory.all(networking.DistributedSwitch, datacenter)}
            if not any(one.key == port.portgroupKey and switches[one.switch] == port.switchUuid for one in groups):
                raise vim.fault.InvalidDeviceBacking(deviceIndex=index, property="backing.port")
            return
        if isinstance(backing, device.VirtualEthernetCard.NetworkBackingInfo):
            names = {one.name: one for one in inventory.all(Network, datacenter)}
            if backing.deviceName not in names:
                raise vim.fault.InvalidDeviceBacking(deviceIndex=index, property="backing.deviceName")
            backing.network = names[backing.deviceName].ref

    def _place(self, new: Any, key: int, label: str) -> None:
        self.keys[new.key] = key
        new.key = key
        new.deviceInfo = vmspec.info(label, label)

    def _free_bus(self, new: Any, family: Any) -> int:
        used = {one.busNumber for one in self.devices if isinstance(one, family)}
        if new.busNumber is not None and new.busNumber not in used and 0 <= new.busNumber < 4:
            return new.busNumber
        free = [bus for bus in range(4) if bus not in used]
        if not free:
            raise vim.fault.TooManyDevices()
        return free[0]

    def _free_key(self, first: int) -> int:
        used = {one.key for one in self.devices}
        return next(key for key in range(first, first + 1000) if key not in used)

    def _controller(self, index: int, key: int | None) -> Any:
        wanted = self.keys.get(key, key) if key is not None else None
        for one in self.devices:
            if one.key == wanted and isinstance(one, device.VirtualController):
                return one
        raise vim.fault.InvalidController(deviceIndex=index, property="controllerKey", controllerKey=key or 0)

    def _unit(self, index: int, new: Any, controller: Any) -> int:
        used = {one.unitNumber for one in self.devices if one.controllerKey == controller.key}
        if isinstance(controller, device.VirtualSCSIController):
            used.add(7)
            count = proxy.scsi_units(self.vm, controller)
        elif isinstance(controller, device.VirtualIDEController):
            count = 2
        else:
            count = 30 if isinstance(controller, device.VirtualAHCIController) else 15
        if new.unitNumber is not None and new.unitNumber >= 0:
            if new.unitNumber in used or new.unitNumber >= count:
                raise _invalid(index, "unitNumber")
            return new.unitNumber
        free = [unit for unit in range(count) if unit not in used]
        if not free:
            raise vim.fault.TooManyDevices()
        return free[0]

    def _disk_key(self, controller: Any, unit: int) -> int:
        if isinstance(controller, device.VirtualSCSIController):
            key = 2000 + 16 * controller.busNumber + unit if unit < 16 else 0
        elif isinstance(controller, device.VirtualIDEController):
            key = 3000 + 2 * controller.busNumber + unit
        elif isinstance(controller, device.VirtualAHCIController):
            key = 16000 + 30 * controller.busNumber + unit
        else:
            key = 32000 + 15 * controller.busNumber + unit
        return key if key and key not in {one.key for one in self.devices} else self._free_key(2064)

    def _add_disk(self, index: int, change: Any, new: Any, created: list[str]) -> None:
        backing = new.backing
        if not isinstance(backing, device.VirtualDisk.FlatVer2BackingInfo):
            raise vim.fault.InvalidDeviceBacking(deviceIndex=index, property="backing")
        mode = backing.diskMode or "persistent"
        if mode not in MODES:
            raise vim.fault.InvalidDeviceBacking(deviceIndex=index, property="backing.diskMode")
        controller = self._controller(index, new.controllerKey)
        if self.vm.powered_on and isinstance(controller, device.VirtualIDEController):
            raise vim.fault.InvalidPowerState(requestedState="poweredOff", existingState="poweredOn")
        unit = self._unit(index, new, controller)
        path = self._disk_path(backing)
        if change.fileOperation == "create":
            info = self._create(index, new, path)
            created.append(info.path)
        elif change.fileOperation:
            raise _invalid(index, "fileOperation")
        else:
            self._check_attachable(index, path)
            info = self._existing(path)
            if "nonpersistent" in mode:
                self.store.check_space(path)  # the redo log lies beside the disk
        datastore = self.vm.simulator.inventory.datastore(datastore_of(info.path), self.vm).ref
        labels = {one.deviceInfo.label for one in self.devices if isinstance(one, device.VirtualDisk)}
        number = next(number for number in range(1, 1000) if f"Hard disk {number}" not in labels)
        key = self._disk_key(controller, unit)
        self.keys[new.key] = key
        self.devices.append(
            vmspec.disk(
                key,
                controller.key,
                unit,
                info,
                datastore,
                mode=mode,
                label=f"Hard disk {number}",
                sharing=backing.sharing,
            )
        )

    def _disk_path(self, backing: Any) -> str:
        """The file a backing names; with a datastore only, or nothing at all, a new name in the VM's folder."""
        name = backing.fileName or ""
        if name.endswith(".vmdk"):
            datastore_of(name)
            return name
        vmx = self.vm.config.files.vmPathName
        where = datastore_of(name) if name else None
        if where is None and backing.datastore is not None:
            where = self.vm.simulator.inventory.get(backing.datastore._moId).name
        folder = (
            folder_of(vmx) if where in (None, datastore_of(vmx)) else f"[{where}] " + folder_of(vmx).split("] ")[-1]
        )
        stem = vmx.rsplit("/", 1)[-1][: -len(".vmx")]
        taken = {one.backing.fileName for one in self.devices if isinstance(one, device.VirtualDisk)}
        for number in range(1000):
            path = f"{folder}/{stem}{f'_{number}' if number else ''}.vmdk"
            if path not in taken and not self.store.exists(path):
                return path
        raise AssertionError("a thousand disks")

    def _create(self, index: int, new: Any, path: str) -> storage.DiskInfo:
        capacity = new.capacityInBytes or (new.capacityInKB or 0) * 1024
        if capacity <= 0 or capacity % 512:
            raise _invalid(index, "capacityInKB")
        thin = bool(new.backing.thinProvisioned)
        try:
            return self.store.create_disk(path, capacity, thin=thin, uuid=new.backing.uuid or None)
        except storage.Exists:
            raise vim.fault.FileAlreadyExists(file=path) from None
        except storage.NoSpace:
            raise vim.fault.NoDiskSpace(file=path, datastore=datastore_of(path)) from None

    def _existing(self, path: str) -> storage.DiskInfo:
        try:
            return self.store.info(path)
        except storage.NotFound:
            raise vim.fault.FileNotFound(file=path) from None

    def _check_attachable(self, index: int, path: str) -> None:
        """Whether this VM can have an existing disk at all (VADP facts 28); locks are taken when all is known."""
        inventory = self.vm.simulator.inventory
        where = inventory.datastore(datastore_of(path), self.vm)
        host = inventory.get(self.vm.host)
        if where.name not in host.datastores:
            raise vim.fault.InaccessibleDatastore(
                datastore=where.ref, name=where.name, msg=f"The datastore {where.name} is not mounted on {host.name}."
            )
        if any(isinstance(one, device.VirtualDisk) and one.backing.fileName == path for one in self.devices):
            raise vim.fault.FileLocked(file=path, msg=f"The VM has the disk {path} already.")
        if inventory.is_encrypted(path) and self.vm.config.keyId is None:
            raise vim.fault.InvalidDeviceBacking(
                deviceIndex=index, property="backing.keyId", msg=f"{path} is encrypted, the virtual machine is not."
            )
        home = inventory.datastore(datastore_of(self.vm.config.files.vmPathName), self.vm)
        if where.kind == "vsan" and home.kind != "vsan":
            raise vim.fault.InvalidDeviceBacking(
                deviceIndex=index, property="backing.datastore", msg=f"{path} is on vSAN, the virtual machine is not."
            )

    # remove, edit

    def _mine(self, index: int, key: int) -> Any:
        for one in self.devices:
            if one.key == key:
                return one
        raise _invalid(index, "key")

    def _remove(self, index: int, change: Any, removed: list[str]) -> None:
        mine = self._mine(index, change.device.key)
        if any(one.controllerKey == mine.key for one in self.devices) and isinstance(mine, device.VirtualController):
            raise _invalid(index)
        if change.fileOperation == "destroy":
            if not isinstance(mine, device.VirtualDisk):
                raise _invalid(index, "fileOperation")
            info = self._existing(mine.backing.fileName)
            if info.children or [owner for owner in info.openers if owner != f"vm:{self.vm.moid}"]:
                raise vim.fault.FileLocked(file=mine.backing.fileName)
            removed.append(mine.backing.fileName)
        elif change.fileOperation:
            raise _invalid(index, "fileOperation")
        self.devices.remove(mine)

    def _edit(self, index: int, change: Any, grown: list[tuple[Any, int]]) -> None:
        mine, wanted = self._mine(index, change.device.key), change.device
        if not isinstance(mine, device.VirtualDisk):
            position = self.devices.index(mine)
            new = copy.copy(wanted)
            new.deviceInfo = mine.deviceInfo
            self.devices[position] = new
            return
        capacity = _capacity(wanted, mine)
        if capacity != mine.capacityInBytes:
            if capacity < mine.capacityInBytes:
                raise vmodl.fault.InvalidArgument(invalidProperty="configSpec.deviceChange.device.capacityInKB")
            if self.store.info(mine.backing.fileName).parent is not None:
                raise vim.fault.InvalidDeviceOperation(
                    deviceIndex=index, badOp="edit", msg="A disk with snapshots can't be extended."
                )
            grown.append((mine, capacity))
        mode = getattr(wanted.backing, "diskMode", None)
        if mode and mode != mine.backing.diskMode:
            if mode not in MODES or self.vm.powered_on:
                raise _invalid(index, "backing.diskMode")
            position = self.devices.index(mine)
            new = copy.copy(mine)
            new.backing = copy.copy(mine.backing)
            new.backing.diskMode = mode
            self.devices[position] = new
