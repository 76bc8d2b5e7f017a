# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How a new machine's configuration differs from the one it was made of, and which of that must be so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

from ..vsphere.configuration import to_json
from ..vsphere.tags import Tag
from .new_vm_spec import LEFT_SETTINGS, new_keys

# What may have been asked for.
NETWORKS = "networks"
MAC_ADDRESSES = "mac_addresses"
MAC_TAKEN = "mac_taken"
BIOS_UUID = "bios_uuid"
PROVISIONING = "provisioning"
DISKS = "disks"
NAME = "name"
TAGS = "tags"

_TOLD = "a warning reports it"

_DEVICE = r"hardware\.device\[\d+\]\."


@dataclass(frozen=True)
class Rule:
    """A field that must differ. :param only: the request that it takes; None: always."""

    pattern: str
    why: str
    only: Optional[str] = None


#: The written list of docs/restore.md. Everything else is the same, or the module warns of it.
MUST_DIFFER: Tuple[Rule, ...] = (
    Rule(r"name", "the new machine's own name", NAME),
    Rule(r"instanceUuid", "vCenter and the repository tell machines apart by it"),
    Rule(r"uuid", "a new BIOS UUID was asked for", BIOS_UUID),
    Rule(r"(files|datastoreUrl)\b.*", "its files lie in a folder of their own"),
    Rule(r"(changeVersion|modified|createDate|locationId|vmxConfigChecksum)", "its own history"),
    Rule(r"(vmStorageObjectId|swapStorageObjectId|initialOverhead\b.*|contentLibItemInfo\b.*)", "its own history"),
    Rule(
        r"(vmxRuntimeConfig|forkConfigInfo|ftInfo|repConfig|guestIntegrityInfo|numaInfo|deviceGroups)\b.*",
        "its own state",
    ),
    Rule(r"(cpuAffinity|memoryAffinity)\b.*", "it names processors of one host"),
    Rule(r"changeTrackingEnabled", "change tracking restarts with the first backup"),
    Rule(r"template", "a template comes back as a virtual machine"),
    Rule(r"(keyId|managedBy)\b.*", "neither keys nor the rights of an extension are in a backup"),
    Rule(
        r"tools\.(toolsVersion|toolsInstallType|lastInstallInfo\b.*|pendingCustomization|customizationKeyId)",
        "the guest reports it again",
    ),
    Rule(r"flags\.(snapshotLocked|snapshotDisabled|faultToleranceType|recordReplayEnabled)", "the server sets it"),
    Rule(r"(npiv\w+|scheduledHardwareUpgradeInfo)\b.*", "names on the storage network and plans are of one machine"),
    Rule(_DEVICE + r"(key|id)", "the server numbers devices"),
    Rule(_DEVICE + r"deviceInfo\.\w+", "the server words it"),
    Rule(_DEVICE + r"connectable\.(connected|status)", "whether it is connected shows when the machine runs"),
    Rule(
        _DEVICE + r"backing\.(fileName|uuid|contentId|changeId|backingObjectId|datastore\b.*|parent\b.*|keyId\b.*)",
        "disks have new files and UUIDs of their own",
    ),
    Rule(_DEVICE + r"backing\.(deltaDiskFormat\w*|deltaGrainSize)", "it has no snapshot"),
    Rule(
        _DEVICE + r"(diskObjectId|vDiskId|vDiskVersion|externalId|nativeUnmanagedLinkedClone)", "the server's own name"
    ),
    Rule(_DEVICE + r"(iofilter|vFlashCacheConfigInfo)\b.*", "filters and caches are of one host"),
    Rule(_DEVICE + r"backing\.(thinProvisioned|eagerlyScrub)", "another provisioning was asked for", PROVISIONING),
    Rule(_DEVICE + r"backing\.port\.(portKey|connectionCookie)", "the switch assigns the port"),
    Rule(
        _DEVICE + r"backing\.(_type|deviceName|network\b.*|port\b.*|useAutoDetect|opaqueNetwork\w+)",
        "another network was asked for",
        NETWORKS,
    ),
    Rule(_DEVICE + r"(macAddress|addressType)", "new addresses were asked for", MAC_ADDRESSES),
    Rule(_DEVICE + r"macAddress", "another machine has it, so the server chose a new one", MAC_TAKEN),
    Rule(r"tags\[.*\]", "no tags were asked for", TAGS),
)


@dataclass(frozen=True)
class Difference:
    """A field of two configurations. :param reason: why it must differ; None: it should not."""

    path: str
    before: Any
    after: Any
    reason: Optional[str] = None

    def to_dict(self) -> Dict[str, Any]:
        return {"path": self.path, "before": self.before, "after": self.after, "reason": self.reason}

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r} ({self.reason or 'unexpected'})"


def differences(saved: Any, made: Any, asked: Collection[str], told: Collection[int] = ()) -> List[Difference]:
    """All fields in which two ``vim.vm.ConfigInfo`` differ, sorted by path.

    :param asked: what was asked to be otherwise: networks, mac_addresses, ...
    :param told: keys of saved devices that a warning has told of: left away, or emptied.
    """
    old_keys = {new: old for old, new in new_keys(saved.hardware.device, made.hardware.device).items()}
    before, after = _flat(saved, {}), _flat(made, old_keys)
    found = []
    for path in sorted(set(before) | set(after)):
        old, new = before.get(path), after.get(path)
        if old != new:
            found.append(Difference(path, old, new, _reason(path, asked, told)))
    return found


def tag_differences(saved: Sequence[Tag], attached: Sequence[Tag], asked: Collection[str]) -> List[Difference]:
    """The tags that the new machine does not have; unless that was asked for, a warning reports each."""
    names = {tag[:2] for tag in attached}
    paths = [f"tags[{tag.path}]" for tag in saved if tag[:2] not in names]
    return [Difference(path, "attached", None, _reason(path, asked, ()) or _TOLD) for path in paths]


def _reason(path: str, asked: Collection[str], told: Collection[int]) -> Optional[str]:
    for rule in MUST_DIFFER:
        if (rule.only is None or rule.only in asked) and re.fullmatch(rule.pattern, path):
            return rule.why
    setting = re.fullmatch(r"extraConfig\[(.*)\]", path)
    if setting is not None:
        for pattern, why in LEFT_SETTINGS:
            if re.fullmatch(pattern, setting.group(1), re.IGNORECASE):
                return why
    device = re.match(r"hardware\.device\[(\d+)\]", path)
    if device is not None and int(device.group(1)) in told:
        return _TOLD
    return None


def _flat(config: Any, old_keys: Dict[int, int]) -> Dict[str, Any]:
    """Path -> value of every field that is set. Devices go by the saved machine's keys."""
    data = to_json(config)
    fields: Dict[str, Any] = {}
    for option in data.pop("extraConfig", []):
        fields[f"extraConfig[{option['key']}]"] = option.get("value")
    devices = data.get("hardware", {}).pop("device", [])
    for device in devices:
        device.pop("device", None)  # of a controller: the same as the devices' controllerKey
        key = old_keys.get(device["key"], device["key"])
        if "controllerKey" in device:
            device["controllerKey"] = old_keys.get(device["controllerKey"], device["controllerKey"])
        _walk(f"hardware.device[{key}]", device, fields)
    for entry in data.get("bootOptions", {}).get("bootOrder", []):
        if "deviceKey" in entry:
            entry["deviceKey"] = old_keys.get(entry["deviceKey"], entry["deviceKey"])
    for name, value in data.items():
        if name != "_type":
            _walk(name, value, fields)
    return fields


def _walk(path: str, value: Any, fields: Dict[str, Any]) -> None:
    if isinstance(value, dict) and set(value) == {"_type", "value"}:
        fields[path] = value["value"]
    elif isinstance(value, dict):
        for name, held in value.items():
            _walk(f"{path}.{name}", held, fields)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _walk(f"{path}[{number}]", item, fields)
    else:
        fields[path] = value
