# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A saved configuration as the specification of a new virtual machine. Pure: vim objects in, vim objects out.

The new machine is the old one again: hardware version, firmware, controllers, network cards, advanced settings, the PCI
slots that a guest names its cards by. What belongs to one host, one vCenter or one set of files stays behind; what a
user may miss of it is reported in a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, List, Mapping, Optional, Pattern, Set, Tuple

from ..errors import InputError
from ..libraries import vim
from ..vsphere.configuration import network_name

KEEP = "keep"
NEW = "new"
REFUSE = "refuse"

# Properties that ConfigInfo and ConfigSpec have in common and that describe the machine itself. Newer ones are not in
# every pyVmomi.
_COPIED = (
    "version",
    "guestId",
    "alternateGuestName",
    "annotation",
    "firmware",
    "consolePreferences",
    "memoryHotAddEnabled",
    "cpuHotAddEnabled",
    "cpuHotRemoveEnabled",
    "cpuAllocation",
    "memoryAllocation",
    "latencySensitivity",
    "swapPlacement",
    "maxMksConnections",
    "guestAutoLockEnabled",
    "memoryReservationLockedToMax",
    "nestedHVEnabled",
    "vPMCEnabled",
    "messageBusTunnelEnabled",
    "migrateEncryption",
    "sgxInfo",
    "sevEnabled",
    "sevSnpEnabled",
    "tdxEnabled",
    "pmemFailoverEnabled",
    "vmxStatsCollectionEnabled",
    "vmOpNotificationToAppEnabled",
    "vmOpNotificationTimeout",
    "fixedPassthruHotPlugEnabled",
)
_HARDWARE = (
    ("numCPU", "numCPUs"),
    ("numCoresPerSocket", "numCoresPerSocket"),
    ("virtualICH7MPresent", "virtualICH7MPresent"),
    ("virtualSMCPresent", "virtualSMCPresent"),
    ("motherboardLayout", "motherboardLayout"),
    ("simultaneousThreads", "simultaneousThreads"),
)
_STATE_OF_FLAGS = ("snapshotLocked", "snapshotDisabled", "faultToleranceType", "recordReplayEnabled")
_STATE_OF_TOOLS = ("toolsVersion", "toolsInstallType", "pendingCustomization", "customizationKeyId", "lastInstallInfo")

#: Advanced settings that the server or a guest's tools write for one machine on one host: pattern -> why.
LEFT_SETTINGS: Tuple[Tuple[str, str], ...] = (
    (r"nvram", "the file is named after the new machine"),
    (r"(scsi|sata|nvme|ide)\d+:\d+\..*|ctkEnabled", "it names disk files that stay behind, or their tracking"),
    (r"openvadp\..*", "what backups noted on the old machine is not true of the new one"),
    (r"uuid\..*|vc\.uuid|viv\.moid|vm\.genid|vm\.genidX", "it is the identity of the machine that was backed up"),
    (r"ethernet\d+\.(generatedAddress.*|address.*)", "the network card itself carries its address"),
    (r"sched\.swap\.(derivedName|dir)|migrate\..*|checkpoint\..*|vmotion\..*", "it names files of the old machine"),
    (r"encryption\..*|dataFileKey|.*\.dataFileKey|vtpm\..*", "it is of keys that the backup does not hold"),
    (r"cleanShutdown|softPowerOff|replay\..*|snapshot\..*|vmxstats\.filename", "it is of the old machine's last run"),
    (r"vmware\.tools\..*|guestinfo\.(vmtools|appInfo|guestos).*", "the guest's tools write it again"),
    (
        r"numa\.autosize\..*|monitor\.phys_bits_used|hostCPUID\..*|guestCPUID\..*|userCPUID\..*",
        "the host writes it again",
    ),
)
_LEFT: List[Pattern[str]] = [re.compile(pattern, re.IGNORECASE) for pattern, _why in LEFT_SETTINGS]

# What every machine has from its making.
_DEFAULT = (
    "VirtualPCIController",
    "VirtualPS2Controller",
    "VirtualSIOController",
    "VirtualIDEController",
    "VirtualKeyboard",
    "VirtualPointingDevice",
    "VirtualVideoCard",
    "VirtualVMCIDevice",
)
_CONTROLLERS = (
    "ParaVirtualSCSIController",
    "VirtualLsiLogicController",
    "VirtualLsiLogicSASController",
    "VirtualBusLogicController",
    "VirtualAHCIController",
    "VirtualNVMEController",
    "VirtualUSBController",
    "VirtualUSBXHCIController",
)
_PLAIN = ("VirtualWDT", "VirtualPrecisionClock")
_CARDS = ("VirtualE1000", "VirtualE1000e", "VirtualPCNet32", "VirtualVmxnet", "VirtualVmxnet2", "VirtualVmxnet3")
_VIDEO = (
    "videoRamSizeInKB",
    "numDisplays",
    "useAutoDetect",
    "enable3DSupport",
    "use3dRenderer",
    "graphicsMemorySizeInKB",
)


@dataclass(frozen=True)
class NewDisk:
    """A disk that is made. :param path: ``[datastore]`` or nothing at all, where the server chooses the name."""

    datastore: str
    capacity_bytes: int
    thin: bool
    eager: bool = False


@dataclass(frozen=True)
class Wishes:
    """What of the new machine is not as it was.

    :param home: datastore of its own files.
    :param disks: device key of the saved disk -> the new one; what is not listed is not made.
    :param networks: name of a network, as the saved machine was connected -> backing of a network card.
    :param missing_files: datastore paths of images that are not there.
    """

    name: str
    instance_uuid: str
    home: str
    disks: Mapping[int, NewDisk]
    networks: Mapping[str, Any]
    mac_addresses: str = KEEP
    bios_uuid: str = KEEP
    vtpm: str = REFUSE
    missing_files: Collection[str] = ()


@dataclass
class NewMachine:
    """What :func:`design` makes: the specification, and what the user must know."""

    spec: Any
    warnings: List[str] = field(default_factory=list)
    told: Set[int] = field(default_factory=set)  # keys of the saved devices that warnings tell of


def kind_of(obj: Any) -> str:
    """``VirtualVmxnet3``: the class of a device without its package."""
    return type(obj).__name__.rsplit(".", 1)[-1]


def label_of(device: Any) -> str:
    return getattr(device.deviceInfo, "label", None) or f"device {device.key}"


def network_of(card: Any, saved_networks: List[Dict[str, Any]]) -> Optional[str]:
    """The name of the network that a saved card was connected to; None where it was connected to nothing.

    :param saved_networks: ``networks`` of the saved configuration.
    """
    backing = card.backing
    port = getattr(backing, "port", None)
    return network_name(
        saved_networks,
        portgroup_key=None if port is None else port.portgroupKey,
        opaque_network_id=getattr(backing, "opaqueNetworkId", None),
        device_name=getattr(backing, "deviceName", None),
    )


def cards_of(config: Any) -> List[Any]:
    """The network cards of a saved configuration that a new machine gets."""
    return [device for device in config.hardware.device if kind_of(device) in _CARDS]


def image_files_of(config: Any) -> List[str]:
    """Datastore paths of the images in CD and floppy drives."""
    backings = [
        device.backing for device in config.hardware.device if kind_of(device) in ("VirtualCdrom", "VirtualFloppy")
    ]
    return sorted({backing.fileName for backing in backings if getattr(backing, "fileName", None)})


def obstacles(config: Any, wishes_vtpm: str) -> List[str]:
    """What of a saved machine can't come back, unless that is what is wanted."""
    found = []
    if wishes_vtpm == REFUSE and any(kind_of(device) == "VirtualTPM" for device in config.hardware.device):
        found.append(
            "it has a virtual TPM, whose content is worth nothing without its key provider and is in no backup: set"
            " vtpm to drop if the machine should come back without it (a guest that is sealed to it asks for its"
            " recovery key)"
        )
    return found


def design(config: Any, saved_networks: List[Dict[str, Any]], wishes: Wishes) -> NewMachine:
    """The specification of the new machine.

    :param config: the saved ``vim.vm.ConfigInfo``; its objects go into the specification and are changed.
    :raises InputError: something can't come back, and it is not said that it may stay away.
    """
    against = obstacles(config, wishes.vtpm)
    if against:
        raise InputError("The virtual machine can't be made again", subject=config.name, reason="; ".join(against))
    made = NewMachine(vim.vm.ConfigSpec(name=wishes.name, instanceUuid=wishes.instance_uuid))
    spec = made.spec
    spec.files = vim.vm.FileInfo(vmPathName=f"[{wishes.home}]")
    if wishes.bios_uuid == KEEP:
        spec.uuid = config.uuid
    _copy_settings(config, spec)
    spec.extraConfig = [
        vim.option.OptionValue(key=option.key, value=option.value)
        for option in config.extraConfig
        if not is_left(option.key)
    ]
    _Devices(config, saved_networks, wishes, made).add()
    if config.keyId is not None:
        made.warnings.append("The machine was encrypted; the new one is not, and neither are its disks")
    if config.template:
        made.warnings.append("It was a template; what comes back is a virtual machine")
    if getattr(config, "managedBy", None) is not None:
        made.warnings.append(f"It was managed by extension {config.managedBy.extensionKey}; the new one is not")
    return made


def is_left(key: str) -> bool:
    """Whether an advanced setting stays behind (``LEFT_SETTINGS``)."""
    return any(pattern.fullmatch(key) for pattern in _LEFT)


def _copy_settings(config: Any, spec: Any) -> None:
    known = {prop.name for prop in spec._GetPropertyList()}
    for name in _COPIED:
        value = getattr(config, name, None)
        if value is not None and name in known:
            setattr(spec, name, value)
    for source, target in _HARDWARE:
        value = getattr(config.hardware, source, None)
        if value is not None and target in known:
            setattr(spec, target, value)
    spec.memoryMB = config.hardware.memoryMB
    spec.powerOpInfo = config.defaultPowerOps
    for name, states in (("flags", _STATE_OF_FLAGS), ("tools", _STATE_OF_TOOLS)):
        value = getattr(config, name)
        for state in states if value is not None else ():
            if getattr(value, state, None) is not None:
                setattr(value, state, None)
        setattr(spec, name, value)
    if config.bootOptions is not None:
        spec.bootOptions = config.bootOptions
        # Boot devices are named by keys, which the new machine gets when it is made: see finish_spec.
        if any(getattr(entry, "deviceKey", None) is not None for entry in config.bootOptions.bootOrder):
            spec.bootOptions = _without_order(config.bootOptions)
    spec.cpuFeatureMask = [
        vim.vm.ConfigSpec.CpuIdInfoSpec(operation="add", info=mask) for mask in config.cpuFeatureMask
    ]
    if config.vAppConfig is not None:
        spec.vAppConfig = _vapp(config.vAppConfig)


def _without_order(options: Any) -> Any:
    copied = vim.vm.BootOptions()
    for prop in options._GetPropertyList():
        if prop.name != "bootOrder":
            setattr(copied, prop.name, getattr(options, prop.name))
    return copied


def _vapp(saved: Any) -> Any:
    """What OVF put into the machine: its products and properties."""
    package = vim.vApp
    return package.VmConfigSpec(
        product=[package.ProductSpec(operation="add", info=item) for item in saved.product],
        property=[package.PropertySpec(operation="add", info=item) for item in saved.property],
        ovfSection=[package.OvfSectionSpec(operation="add", info=item) for item in saved.ovfSection],
        ipAssignment=saved.ipAssignment,
        eula=saved.eula,
        ovfEnvironmentTransport=saved.ovfEnvironmentTransport,
        installBootRequired=saved.installBootRequired,
        installBootStopDelay=saved.installBootStopDelay,
    )


class _Devices:
    """The ``deviceChange`` of the new machine. New devices have negative keys, as long as the server gave them none."""

    def __init__(self, config: Any, saved_networks: List[Dict[str, Any]], wishes: Wishes, made: NewMachine) -> None:
        self.devices = sorted(config.hardware.device, key=lambda device: device.key)
        self.saved_networks = saved_networks
        self.wishes = wishes
        self.made = made
        self.added: Dict[int, int] = {}
        self.changes: List[Any] = []

    def add(self) -> None:
        controllers = [device for device in self.devices if isinstance(device, vim.vm.device.VirtualController)]
        others = [device for device in self.devices if not isinstance(device, vim.vm.device.VirtualController)]
        for device in controllers + others:
            self._device(device, kind_of(device))
        self.made.spec.deviceChange = self.changes

    def _device(self, device: Any, kind: str) -> None:
        if kind in _DEFAULT:
            return
        if kind in _CONTROLLERS:
            device.device = []
            self._append(device)
        elif kind == "VirtualDisk":
            self._disk(device)
        elif kind in _CARDS:
            self._card(device)
        elif kind == "VirtualCdrom":
            self._drive(device, vim.vm.device.VirtualCdrom.RemotePassthroughBackingInfo(deviceName="", exclusive=False))
        elif kind == "VirtualFloppy":
            self._drive(device, vim.vm.device.VirtualFloppy.RemoteDeviceBackingInfo(deviceName=""))
        elif kind in _PLAIN:
            self._append(device)
        elif kind == "VirtualTPM":
            self._warn(device, "its content is in no backup, so it was left away; the guest may ask for a recovery key")
        else:
            self._warn(device, f"it is a {kind}, which belongs to one host, so it was left away")

    def _append(self, device: Any, operation: Optional[str] = None) -> None:
        self.added[device.key] = -device.key
        device.key = -device.key
        if device.controllerKey is not None:
            device.controllerKey = self.added.get(device.controllerKey, device.controllerKey)
        device.deviceInfo = None
        if device.connectable is not None:
            device.connectable.status = None
            device.connectable.connected = device.connectable.startConnected
        change = vim.vm.device.VirtualDeviceSpec(operation="add", device=device)
        if operation is not None:
            change.fileOperation = operation
        self.changes.append(change)

    def _warn(self, device: Any, text: str) -> None:
        self.made.warnings.append(f"{label_of(device)}: {text}")
        self.made.told.add(device.key)

    def _disk(self, device: Any) -> None:
        wanted = self.wishes.disks.get(device.key)
        if wanted is None:
            self._warn(device, "it is not restored, so the new machine does not have it")
            return
        old = device.backing
        device.backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
            fileName=f"[{wanted.datastore}]" if wanted.datastore != self.wishes.home else "",
            diskMode="persistent",
            thinProvisioned=wanted.thin,
            writeThrough=getattr(old, "writeThrough", None),
            split=getattr(old, "split", None),
            digestEnabled=getattr(old, "digestEnabled", None),
        )
        if not wanted.thin:
            device.backing.eagerlyScrub = wanted.eager
        device.capacityInBytes = wanted.capacity_bytes
        device.capacityInKB = wanted.capacity_bytes // 1024
        if device.storageIOAllocation is not None:
            # The same said twice, and the older way is not taken with the newer one.
            device.shares = None
        for name in ("diskObjectId", "vFlashCacheConfigInfo", "vDiskId", "vDiskVersion", "nativeUnmanagedLinkedClone"):
            if getattr(device, name, None) is not None:
                setattr(device, name, None)
        device.iofilter = []
        self._append(device, "create")

    def _card(self, device: Any) -> None:
        name = network_of(device, self.saved_networks)
        if name is not None:
            device.backing = self.wishes.networks[name]
        if self.wishes.mac_addresses == NEW:
            device.macAddress = None
            device.addressType = "generated" if device.addressType == "generated" else "assigned"
        device.externalId = None
        self._append(device)

    def _drive(self, device: Any, empty: Any) -> None:
        backing = device.backing
        path = getattr(backing, "fileName", None)
        problem = None
        if path is not None and path in self.wishes.missing_files:
            problem = f"its image {path} is not there, so the drive is empty"
        elif path is None and not isinstance(backing, vim.vm.device.VirtualDevice.RemoteDeviceBackingInfo):
            problem = "it was a drive of the host, and is an empty one now"
        if problem is not None:
            self._warn(device, problem)
            device.backing = empty
            if device.connectable is not None:
                device.connectable.startConnected = False
        elif path is not None:
            # An id of the old vCenter; the path tells the datastore.
            backing.datastore, backing.backingObjectId = None, None
        self._append(device)


# The machine that was made


def places(devices: List[Any]) -> Dict[Tuple[Any, ...], Any]:
    """Devices by their place: what tells which of two machines' devices are the same one; keys may differ."""
    by_key = {device.key: device for device in devices}
    found: Dict[Tuple[Any, ...], Any] = {}
    for device in devices:
        found.setdefault(_place(device, by_key, found), device)
    return found


def _place(device: Any, by_key: Dict[int, Any], found: Mapping[Tuple[Any, ...], Any]) -> Tuple[Any, ...]:
    kind = kind_of(device)
    if isinstance(device, vim.vm.device.VirtualController):
        return kind, device.busNumber
    above = by_key.get(device.controllerKey)
    if kind == "VirtualDisk" or kind in ("VirtualCdrom", "VirtualFloppy"):
        controller = (kind_of(above), above.busNumber) if above is not None else ()
        return ("drive", *controller, device.unitNumber)
    family = "VirtualEthernetCard" if isinstance(device, vim.vm.device.VirtualEthernetCard) else kind
    return family, sum(1 for place in found if place[0] == family)


def new_keys(before: List[Any], after: List[Any]) -> Dict[int, int]:
    """Device key of the saved machine -> of the new one, for the devices that both have."""
    here = places(after)
    return {device.key: here[place].key for place, device in places(before).items() if place in here}


def finish_spec(saved: Any, made: Any) -> Any:
    """What can be told to the machine only when its devices have keys: boot order, video card. None: nothing.

    :param saved: the saved ``vim.vm.ConfigInfo``, untouched.
    :param made: that of the new machine.
    """
    spec = vim.vm.ConfigSpec()
    something = False
    keys = new_keys(saved.hardware.device, made.hardware.device)
    order = list(saved.bootOptions.bootOrder) if saved.bootOptions is not None else []
    if any(getattr(entry, "deviceKey", None) is not None for entry in order):
        kept = []
        for entry in order:
            if getattr(entry, "deviceKey", None) is not None:
                if entry.deviceKey not in keys:
                    continue
                entry = type(entry)(deviceKey=keys[entry.deviceKey])
            kept.append(entry)
        if kept:
            spec.bootOptions = vim.vm.BootOptions(bootOrder=kept)
            something = True
    cards = [
        next((device for device in config.hardware.device if kind_of(device) == "VirtualVideoCard"), None)
        for config in (saved, made)
    ]
    if None not in cards:
        old, new = cards
        wanted = {name: getattr(old, name, None) for name in _VIDEO}
        differing = {name: value for name, value in wanted.items() if value not in (None, getattr(new, name, None))}
        if differing:
            for name, value in differing.items():
                setattr(new, name, value)
            spec.deviceChange = [vim.vm.device.VirtualDeviceSpec(operation="edit", device=new)]
            something = True
    return spec if something else None
