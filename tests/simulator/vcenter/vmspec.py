# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Building blocks of a VM's configuration."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

device = vim.vm.device


GUESTS = {
    "debian12_64Guest": "Debian GNU/Linux 12 (64-bit)",
    "windows2019srvNext_64Guest": "Microsoft Windows Server 2022 (64-bit)",
}


def guest_name(guest_id: str) -> str:
    return GUESTS.get(guest_id, guest_id)


def assign_slots(devices: list[Any]) -> None:
    """PCI slots, by which a guest names its cards: a device gets one when its VM is first started, and keeps it."""
    kinds = (device.VirtualEthernetCard, device.VirtualSCSIController, device.VirtualSATAController)
    used = {one.slotInfo.pciSlotNumber for one in devices if one.slotInfo is not None}
    for one in devices:
        if isinstance(one, kinds) and one.slotInfo is None:
            number = next(slot for slot in range(160, 4096, 32) if slot not in used)
            one.slotInfo = device.VirtualDevice.PciBusSlotInfo(pciSlotNumber=number)
            used.add(number)


def info(label: str, summary: str) -> Any:
    return vim.Description(label=label, summary=summary)


def allocation(shares: int) -> Any:
    """Nothing reserved, no limit, the normal number of shares."""
    return vim.ResourceAllocationInfo(
        reservation=0, expandableReservation=False, limit=-1, shares=vim.SharesInfo(shares=shares, level="normal")
    )


def list_devices(devices: list[Any]) -> None:
    """Let each controller name what is attached to it."""
    for one in devices:
        if isinstance(one, device.VirtualController):
            one.device = [other.key for other in devices if other.controllerKey == one.key]


def new_config(
    *,
    name: str,
    vmx: str,
    instance_uuid: str,
    bios_uuid: str,
    guest_id: str,
    guest_name: str,
    firmware: str = "bios",
    version: str = "vmx-19",
    cpus: int = 1,
    memory_mb: int = 1024,
) -> Any:
    """A configuration with the devices that every VM has, and nothing else."""
    folder = vmx.rsplit("/", 1)[0] + "/"
    return vim.vm.ConfigInfo(
        name=name,
        version=version,
        uuid=bios_uuid,
        instanceUuid=instance_uuid,
        guestId=guest_id,
        guestFullName=guest_name,
        alternateGuestName="",
        firmware=firmware,
        template=False,
        changeTrackingEnabled=False,
        annotation="",
        files=vim.vm.FileInfo(vmPathName=vmx, snapshotDirectory=folder, suspendDirectory=folder, logDirectory=folder),
        tools=vim.vm.ToolsConfigInfo(toolsVersion=12352, toolsInstallType="guestToolsTypeOpenVMTools"),
        flags=vim.vm.FlagInfo(diskUuidEnabled=False, snapshotLocked=False),
        defaultPowerOps=vim.vm.DefaultPowerOpInfo(),
        hardware=vim.vm.VirtualHardware(
            numCPU=cpus, numCoresPerSocket=1, memoryMB=memory_mb, device=_default_devices()
        ),
        bootOptions=vim.vm.BootOptions(efiSecureBootEnabled=False),
        cpuAllocation=allocation(1000 * cpus),
        memoryAllocation=allocation(10 * memory_mb),
        memoryHotAddEnabled=False,
        cpuHotAddEnabled=False,
        cpuHotRemoveEnabled=False,
        maxMksConnections=40,
        guestAutoLockEnabled=False,
        messageBusTunnelEnabled=False,
        nestedHVEnabled=False,
        vPMCEnabled=False,
        vFlashCacheReservation=0,
        changeVersion="1",
        extraConfig=[
            vim.option.OptionValue(key="nvram", value=f"{vmx.rsplit('/', 1)[-1][: -len('.vmx')]}.nvram"),
            *(vim.option.OptionValue(key=key, value=value) for key, value in _SETTINGS.items()),
        ],
    )


# Advanced settings that every VM has from its making.
_SETTINGS = {"svga.present": "TRUE", "pciBridge0.present": "TRUE", "hpet0.present": "TRUE"}


def _default_devices() -> list[Any]:
    return [
        device.VirtualIDEController(key=200, busNumber=0, deviceInfo=info("IDE 0", "IDE 0")),
        device.VirtualIDEController(key=201, busNumber=1, deviceInfo=info("IDE 1", "IDE 1")),
        device.VirtualPS2Controller(key=300, busNumber=0, deviceInfo=info("PS2 controller 0", "PS2 controller 0")),
        device.VirtualPCIController(key=100, busNumber=0, deviceInfo=info("PCI controller 0", "PCI controller 0")),
        device.VirtualSIOController(key=400, busNumber=0, deviceInfo=info("SIO controller 0", "SIO controller 0")),
        device.VirtualKeyboard(key=600, controllerKey=300, unitNumber=0, deviceInfo=info("Keyboard", "Keyboard")),
        device.VirtualPointingDevice(
            key=700,
            controllerKey=300,
            unitNumber=1,
            deviceInfo=info("Pointing device", "Pointing device; Device"),
            backing=device.VirtualPointingDevice.DeviceBackingInfo(
                deviceName="", useAutoDetect=False, hostPointingDevice="autodetect"
            ),
        ),
        device.VirtualVideoCard(
            key=500,
            controllerKey=100,
            unitNumber=0,
            deviceInfo=info("Video card ", "Video card"),
            videoRamSizeInKB=8192,
            numDisplays=1,
            useAutoDetect=False,
            enable3DSupport=False,
            use3dRenderer="automatic",
            graphicsMemorySizeInKB=262144,
        ),
        device.VirtualVMCIDevice(
            key=12000,
            controllerKey=100,
            unitNumber=17,
            deviceInfo=info("VMCI device", "Device on the virtual machine PCI bus"),
            allowUnrestrictedCommunication=False,
            filterEnable=True,
        ),
    ]


def key_id(key: str) -> Any:
    """Names the key of an encrypted VM or disk; there is no key server behind it."""
    return vim.encryption.CryptoKeyId(keyId=key, providerId=vim.encryption.KeyProviderId(id="keys01"))


def scsi_controller(key: int, bus: int, shared_bus: str = "noSharing", kind: Any = None) -> Any:
    kind = kind or device.ParaVirtualSCSIController
    return kind(
        key=key,
        controllerKey=100,
        unitNumber=3 + bus,
        busNumber=bus,
        sharedBus=shared_bus,
        hotAddRemove=True,
        scsiCtlrUnitNumber=7,
        deviceInfo=info(f"SCSI controller {bus}", "VMware paravirtual SCSI"),
    )


def network_card(key: int, network: Any, mac_seed: str) -> Any:
    digits = mac_seed.replace("-", "")
    return device.VirtualVmxnet3(
        key=key,
        controllerKey=100,
        unitNumber=7,
        deviceInfo=info("Network adapter 1", network.name),
        addressType="assigned",
        macAddress=f"00:50:56:{digits[:2]}:{digits[2:4]}:{digits[4:6]}",
        connectable=device.VirtualDevice.ConnectInfo(startConnected=True, connected=True, allowGuestControl=True),
        resourceAllocation=device.VirtualEthernetCard.ResourceAllocation(
            reservation=0, share=vim.SharesInfo(shares=50, level="normal"), limit=-1
        ),
        backing=device.VirtualEthernetCard.NetworkBackingInfo(deviceName=network.name, network=network.ref),
    )


def disk(
    key: int,
    controller_key: int,
    unit: int,
    disk_info: Any,
    datastore: Any,
    *,
    mode: str = "persistent",
    rdm: str | None = None,
    label: str | None = None,
    sharing: str | None = None,
) -> Any:
    """A virtual disk over a file of the storage."""
    if rdm:
        backing = device.VirtualDisk.RawDiskMappingVer1BackingInfo(
            fileName=disk_info.path,
            datastore=datastore,
            compatibilityMode=rdm,
            diskMode=mode if rdm == "virtualMode" else "independent_persistent",
            uuid=disk_info.uuid,
            lunUuid="0200000000" + disk_info.uuid.replace("-", ""),
            deviceName="vml." + disk_info.uuid.replace("-", ""),
        )
    else:
        backing = device.VirtualDisk.FlatVer2BackingInfo(
            fileName=disk_info.path,
            datastore=datastore,
            diskMode=mode,
            split=False,
            writeThrough=False,
            thinProvisioned=disk_info.thin,
            eagerlyScrub=False,
            uuid=disk_info.uuid,
            contentId=disk_info.uuid.replace("-", "")[:32],
            digestEnabled=False,
            sharing=sharing or "sharingNone",
        )
    return device.VirtualDisk(
        key=key,
        controllerKey=controller_key,
        unitNumber=unit,
        backing=backing,
        capacityInBytes=disk_info.capacity_bytes,
        capacityInKB=disk_info.capacity_bytes // 1024,
        deviceInfo=info(label or f"Hard disk {key - 1999}", f"{disk_info.capacity_bytes // 1024:,} KB"),
        diskObjectId=f"1-{key}",
        nativeUnmanagedLinkedClone=False,
        shares=vim.SharesInfo(shares=1000, level="normal"),
        storageIOAllocation=vim.StorageResourceManager.IOAllocationInfo(
            limit=-1, shares=vim.SharesInfo(shares=1000, level="normal"), reservation=0
        ),
    )
