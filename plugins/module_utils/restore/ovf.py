# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The OVF descriptor of a virtual machine, from the configuration that was saved with its restore point.

Pure: it is made of the saved JSON alone, always to the same text. What an OVF can't say (passthrough, USB, a floppy's
image) is left out; vSphere's own keys (``vmw:``) say what other platforms may ignore.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from xml.sax.saxutils import escape, quoteattr

from ..errors import InputError
from ..vsphere.configuration import network_name

DISK_FORMAT = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
_NAMESPACES = {
    "": "http://schemas.dmtf.org/ovf/envelope/1",
    "cim": "http://schemas.dmtf.org/wbem/wscim/1/common",
    "ovf": "http://schemas.dmtf.org/ovf/envelope/1",
    "rasd": "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData",
    "vmw": "http://www.vmware.com/schema/ovf",
    "vssd": "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData",
    "xsi": "http://www.w3.org/2001/XMLSchema-instance",
}
# A device's class -> (CIM's type of resource, its subtype).
_CONTROLLERS = {
    "VirtualIDEController": (5, None),
    "VirtualBusLogicController": (6, "buslogic"),
    "VirtualLsiLogicController": (6, "lsilogic"),
    "VirtualLsiLogicSASController": (6, "lsilogicsas"),
    "ParaVirtualSCSIController": (6, "VirtualSCSI"),
    "VirtualAHCIController": (20, "vmware.sata.ahci"),
    "VirtualNVMEController": (20, "vmware.nvme.controller"),
}
_CARDS = {
    "VirtualE1000": "E1000",
    "VirtualE1000e": "E1000e",
    "VirtualPCNet32": "PCNet32",
    "VirtualVmxnet2": "VmxNet2",
    "VirtualVmxnet3": "VmxNet3",
    "VirtualVmxnet3Vrdma": "VmxNet3",
}
_CPU, _MEMORY, _ETHERNET, _DISK = 3, 4, 10, 17
# CIM_OperatingSystem.OSType: "Other", "LINUX", "Linux 64-Bit". vSphere goes by vmw:osType.
_OTHER, _LINUX, _LINUX_64 = 1, 36, 101
_LINUX_NAMES = re.compile(
    r"linux|debian|ubuntu|rhel|centos|fedora|suse|sles|oracle|rocky|alma|amazon|photon|coreos", re.I
)
# The order of CIM's schema, which an Item's elements must keep.
_ITEM_ORDER = (
    "Address",
    "AddressOnParent",
    "AllocationUnits",
    "AutomaticAllocation",
    "Connection",
    "Description",
    "ElementName",
    "HostResource",
    "InstanceID",
    "Parent",
    "ResourceSubType",
    "ResourceType",
    "VirtualQuantity",
)


@dataclass(frozen=True)
class PackedDisk:
    """A disk of the package."""

    key: int
    label: str
    href: str
    size_bytes: int
    capacity_bytes: int


def descriptor(
    saved: Mapping[str, Any], name: str, disks: Sequence[PackedDisk], nvram: Optional[Tuple[str, int]] = None
) -> str:
    """The descriptor's text.

    :param saved: the configuration as ``vsphere.configuration.save`` made it.
    :param nvram: name and size of the NVRAM's file.
    :raises InputError: the saved configuration says too little.
    """
    config = saved.get("config")
    hardware = config.get("hardware") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(hardware, dict) or not hardware.get("device"):
        raise InputError(
            "The saved configuration is not enough for an OVF descriptor",
            subject=name,
            reason="it names no hardware",
            remedy="Use another format",
        )
    devices = [device for device in hardware["device"] if isinstance(device, dict)]
    networks = _networks(saved, devices)
    spaces = " ".join(f"xmlns{':' + prefix if prefix else ''}={quoteattr(uri)}" for prefix, uri in _NAMESPACES.items())
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<Envelope {spaces}>"]
    lines += _references(disks, nvram)
    lines += _disk_section(disks)
    if networks:
        lines += ["  <NetworkSection>", "    <Info>The networks</Info>"]
        for network in dict.fromkeys(networks.values()):
            lines.append(f"    <Network ovf:name={quoteattr(network)}>")
            lines.append(f"      <Description>{escape(network)}</Description>")
            lines.append("    </Network>")
        lines.append("  </NetworkSection>")
    lines += _system(saved, config, name)
    for item in _items(hardware, devices, networks, disks):
        lines.append("      <Item>")
        for element in _ITEM_ORDER:
            if item.get(element) is not None:
                lines.append(f"        <rasd:{element}>{escape(str(item[element]))}</rasd:{element}>")
        if item.get("cores"):
            lines.append(f'        <vmw:CoresPerSocket ovf:required="false">{item["cores"]}</vmw:CoresPerSocket>')
        lines.append("      </Item>")
    lines += [f"      {line}" for line in _extras(saved, config, nvram)]
    lines += ["    </VirtualHardwareSection>", "  </VirtualSystem>", "</Envelope>"]
    return "\n".join(_printable(line) for line in lines) + "\n"


def _printable(line: str) -> str:
    """Without the characters that XML can't hold in any form."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "?", line)


def _references(disks: Sequence[PackedDisk], nvram: Optional[Tuple[str, int]]) -> List[str]:
    files = [(disk.href, f"disk-{disk.key}", disk.size_bytes) for disk in disks]
    if nvram is not None:
        files.append((nvram[0], "nvram", nvram[1]))
    lines = ["  <References>"]
    for href, file_id, size in files:
        lines.append(f'    <File ovf:href={quoteattr(href)} ovf:id="{file_id}" ovf:size="{size}"/>')
    return [*lines, "  </References>"]


def _disk_section(disks: Sequence[PackedDisk]) -> List[str]:
    lines = ["  <DiskSection>", "    <Info>The disks</Info>"]
    for disk in disks:
        lines.append(
            f'    <Disk ovf:capacity="{disk.capacity_bytes}" ovf:capacityAllocationUnits="byte"'
            f' ovf:diskId="vmdisk-{disk.key}" ovf:fileRef="disk-{disk.key}" ovf:format="{DISK_FORMAT}"/>'
        )
    return [*lines, "  </DiskSection>"]


def _networks(saved: Mapping[str, Any], devices: Sequence[Dict[str, Any]]) -> Dict[int, str]:
    """{device key of a network card: name of its network}."""
    found = {}
    for device in devices:
        if _class(device) in _CARDS:
            backing = device.get("backing") or {}
            name = network_name(
                saved.get("networks") or [],
                portgroup_key=(backing.get("port") or {}).get("portgroupKey"),
                opaque_network_id=backing.get("opaqueNetworkId"),
                device_name=backing.get("deviceName"),
            )
            found[int(device["key"])] = name or "Network"
    return found


def _class(device: Mapping[str, Any]) -> str:
    return str(device.get("_type", "")).rpartition(".")[2]


def _label(device: Mapping[str, Any]) -> str:
    return str((device.get("deviceInfo") or {}).get("label") or f"Device {device.get('key')}")


def _system(saved: Mapping[str, Any], config: Mapping[str, Any], name: str) -> List[str]:
    guest = str(saved.get("guest_id") or config.get("guestId") or "otherGuest")
    version = str(saved.get("hardware_version") or config.get("version") or "vmx-10")
    os_type = (_LINUX_64 if "64" in guest else _LINUX) if _LINUX_NAMES.search(guest) else _OTHER
    lines = [
        f"  <VirtualSystem ovf:id={quoteattr(name)}>",
        "    <Info>A virtual machine</Info>",
        f"    <Name>{escape(name)}</Name>",
    ]
    if config.get("annotation"):
        lines.append("    <AnnotationSection>")
        lines.append("      <Info>A human-readable annotation</Info>")
        lines.append(f"      <Annotation>{escape(str(config['annotation']))}</Annotation>")
        lines.append("    </AnnotationSection>")
    return lines + [
        f'    <OperatingSystemSection ovf:id="{os_type}" vmw:osType={quoteattr(guest)}>',
        "      <Info>The kind of installed guest operating system</Info>",
        f"      <Description>{escape(str(saved.get('guest_full_name') or guest))}</Description>",
        "    </OperatingSystemSection>",
        "    <VirtualHardwareSection>",
        "      <Info>Virtual hardware requirements</Info>",
        "      <System>",
        "        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>",
        "        <vssd:InstanceID>0</vssd:InstanceID>",
        f"        <vssd:VirtualSystemIdentifier>{escape(name)}</vssd:VirtualSystemIdentifier>",
        f"        <vssd:VirtualSystemType>{escape(version)}</vssd:VirtualSystemType>",
        "      </System>",
    ]


def _items(
    hardware: Mapping[str, Any],
    devices: Sequence[Dict[str, Any]],
    networks: Mapping[int, str],
    disks: Sequence[PackedDisk],
) -> List[Dict[str, Any]]:
    cpus, memory = int(hardware.get("numCPU") or 1), int(hardware.get("memoryMB") or 512)
    items: List[Dict[str, Any]] = [
        {
            "AllocationUnits": "hertz * 10^6",
            "Description": "Number of virtual CPUs",
            "ElementName": f"{cpus} virtual CPU(s)",
            "ResourceType": _CPU,
            "VirtualQuantity": cpus,
            "cores": int(hardware.get("numCoresPerSocket") or 0) or None,
        },
        {
            "AllocationUnits": "byte * 2^20",
            "Description": "Memory size",
            "ElementName": f"{memory} MB of memory",
            "ResourceType": _MEMORY,
            "VirtualQuantity": memory,
        },
    ]
    packed = {disk.key: disk for disk in disks}
    places = {int(device["key"]): device for device in devices if "key" in device}
    needed = {places[key].get("controllerKey") for key in packed if key in places}
    instances: Dict[Any, int] = {}
    for device in devices:
        kind = _CONTROLLERS.get(_class(device))
        if kind is not None and device["key"] in needed:
            instances[device["key"]] = len(items) + 1
            item = {"Address": device.get("busNumber", 0), "Description": "Controller of disks"}
            item.update(ElementName=_label(device), ResourceType=kind[0], ResourceSubType=kind[1])
            items.append(item)
    for disk in disks:
        place = places.get(disk.key, {})
        parent = instances.get(place.get("controllerKey"))
        if parent is None:
            raise InputError(
                "The saved configuration does not say which controller a disk is attached to",
                subject=f"disk {disk.key} ('{disk.label}')",
                remedy="Use another format",
            )
        items.append(
            {
                "AddressOnParent": place.get("unitNumber", 0),
                "ElementName": disk.label,
                "HostResource": f"ovf:/disk/vmdisk-{disk.key}",
                "Parent": parent,
                "ResourceType": _DISK,
            }
        )
    for number, (key, network) in enumerate(networks.items()):
        items.append(
            {
                "AddressOnParent": number + 7,
                "AutomaticAllocation": "true",
                "Connection": network,
                "ElementName": _label(places[key]),
                "ResourceSubType": _CARDS[_class(places[key])],
                "ResourceType": _ETHERNET,
            }
        )
    for number, item in enumerate(items, 1):
        item["InstanceID"] = number
    return items


def _extras(
    saved: Mapping[str, Any],
    config: Mapping[str, Any],
    nvram: Optional[Tuple[str, int]],
) -> List[str]:
    """What only vSphere understands."""
    settings: Dict[str, Any] = {"firmware": saved.get("firmware") or config.get("firmware")}
    secure = (config.get("bootOptions") or {}).get("efiSecureBootEnabled")
    if secure is not None:
        settings["bootOptions.efiSecureBootEnabled"] = "true" if secure else "false"
    lines = []
    for key, value in settings.items():
        if value is not None:
            lines.append(f'<vmw:Config ovf:required="false" vmw:key="{key}" vmw:value={quoteattr(str(value))}/>')
    if nvram is not None:
        lines.append('<vmw:ExtraConfig ovf:required="false" vmw:key="nvram" vmw:value="ovf:/file/nvram"/>')
    return lines
