# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A virtual machine's configuration as JSON that becomes the same vim object again, and its NVRAM.

A data object is ``{"_type": "vim.vm.ConfigInfo", ...}`` with the properties that are set, a reference
``{"_type": "vim.Datastore", "_moid": "datastore-1"}``. Properties have declared types, so plain JSON does for their
values: times are ISO 8601, binary is base64. Where anything is allowed, what JSON can't tell apart is tagged:
``{"_type": "long", "value": 5}``.
"""

from __future__ import annotations

import base64
import datetime
from typing import Any, Dict, List, Mapping, Optional, Sequence

from ..errors import InputError
from ..libraries import pyVmomi, vim, vmodl
from .datastore_files import http_get
from .disks import disks_of
from .inventory import VmRef, readable
from .session import Session, filter_spec
from .snapshots import Snapshot, utc_text
from .vm_keys import strip

FORMAT = 1


# vim objects and JSON


def to_json(value: Any, declared: Any = object) -> Any:
    """A vim value as plain data.

    :param declared: the type of the property that holds it; ``object`` is "anything".
    """
    support = pyVmomi.VmomiSupport
    if isinstance(value, support.DataObject):
        properties = value._GetPropertyList()
        data: Dict[str, Any] = {"_type": support.GetVmodlName(type(value))}
        for prop in properties:
            held = getattr(value, prop.name)
            # An unset array reads as an empty one.
            if held is not None and not (isinstance(held, list) and not held):
                data[prop.name] = to_json(held, prop.type)
        return data
    if isinstance(value, support.ManagedObject):
        reference = {"_type": support.GetVmodlName(type(value)), "_moid": value._moId}
        if value._serverGuid is not None:
            reference["_server_guid"] = value._serverGuid
        return reference
    if isinstance(value, list):
        item = getattr(declared, "Item", None) or getattr(value, "Item", object)
        plain: Any = [to_json(element, item) for element in value]
    elif isinstance(value, datetime.datetime):
        plain = value.isoformat()
    elif isinstance(value, bytes):
        plain = base64.b64encode(value).decode("ascii")
    elif isinstance(value, type):
        plain = support.GetVmodlName(value)
    elif isinstance(value, bool):
        plain = bool(value)
    elif isinstance(value, int):
        plain = int(value)
    elif isinstance(value, float):
        plain = float(value)
    elif isinstance(value, str):
        plain = str(value)
    else:
        raise TypeError(f"{type(value).__name__} can't be saved")
    if declared is object and type(value) not in (bool, int, str):
        kind = type if isinstance(value, type) else type(value)
        return {"_type": support.GetVmodlName(kind), "value": plain}
    return plain


def from_json(data: Any, declared: Any = object, stub: Any = None) -> Any:
    """The vim value that :func:`to_json` made *data* of.

    :param stub: what references are bound to; ``None`` gives references for reading only.
    """
    support = pyVmomi.VmomiSupport
    if isinstance(data, dict):
        kind = _vim_type(data["_type"])
        if "_moid" in data:
            return kind(data["_moid"], stub, data.get("_server_guid"))
        if not issubclass(kind, support.DataObject):
            return from_json(data["value"], kind, stub)
        restored = kind()
        for name, held in data.items():
            if name != "_type":
                setattr(restored, name, from_json(held, kind._GetPropertyInfo(name).type, stub))
        return restored
    if isinstance(data, list):
        return declared([from_json(element, declared.Item, stub) for element in data])
    if declared is type:
        return _vim_type(data)
    if issubclass(declared, datetime.datetime):
        return datetime.datetime.fromisoformat(data)
    if issubclass(declared, bytes):
        return declared(base64.b64decode(data))
    if declared is object or declared is bool or isinstance(data, bool):
        return data
    return declared(data)


def _vim_type(name: str) -> Any:
    try:
        return pyVmomi.VmomiSupport.GetVmodlType(name)
    except KeyError as error:
        raise InputError(
            "The saved configuration can't be read",
            subject=name,
            reason="this version of pyVmomi has no such type",
            remedy="Update pyVmomi to the version that the configuration was saved with",
        ) from error


# Saving


def save(session: Session, vm: VmRef, snapshot: Optional[Snapshot] = None) -> Dict[str, Any]:
    """All that a new virtual machine like this one needs, as JSON data.

    The configuration is the snapshot's where there is one: that is what the disks belong to. Managed object ids mean
    something in this vCenter only, so names stand beside them.
    """
    paths = ["runtime.host", "runtime.powerState", "resourcePool", "network", "datastore", "layoutEx.file"]
    if session.is_vcenter:
        paths += ["customValue", "availableField"]
    if snapshot is None:
        facts = session.read(vm.obj, "config", *paths)
        config = facts["config"]
    else:
        facts, frozen = session.read_each((vm.obj, paths), (snapshot.obj, ["config"]))
        config = frozen["config"]
    around = _surroundings(session, facts)
    return {
        "format": FORMAT,
        "saved": utc_text(datetime.datetime.now(datetime.timezone.utc)),
        "server": {"name": session.about.fullName, "instance_uuid": session.about.instanceUuid},
        "vm": {
            "moid": vm.moid,
            "name": vm.name,
            "path": vm.path,
            "folder": vm.path.rpartition("/")[0],
            "datacenter": vm.datacenter,
            "datacenter_path": vm.datacenter_path,
            "instance_uuid": vm.instance_uuid,
            "bios_uuid": vm.bios_uuid,
            "template": vm.template,
            "power_state": str(facts["runtime.powerState"]),
        },
        "guest_id": config.guestId,
        "guest_full_name": config.guestFullName,
        "hardware_version": config.version,
        "firmware": config.firmware,
        "annotation": config.annotation,
        "vm_path_name": config.files.vmPathName if config.files is not None else None,
        "disks": [disk.to_dict() for disk in disks_of(config.hardware.device)],
        "files": [
            {"name": item.name, "type": str(item.type), "size_bytes": int(item.size)}
            for item in facts["layoutEx.file"] or []
        ],
        "custom_attributes": _custom_attributes(facts),
        **around,
        "config": to_json(config),
    }


def _custom_attributes(facts: Dict[str, Any]) -> Dict[str, str]:
    """What was written into the machine's custom attributes, by their names: keys are of one vCenter."""
    names = {field.key: str(field.name) for field in facts.get("availableField") or []}
    return {
        names[item.key]: str(item.value)
        for item in facts.get("customValue") or []
        if item.key in names and getattr(item, "value", None)
    }


def restore_config(saved: Dict[str, Any]) -> Any:
    """The ``vim.vm.ConfigInfo`` of what :func:`save` returned, without the keys that are ours."""
    if saved.get("format") != FORMAT:
        raise InputError(
            "The saved configuration can't be read",
            reason=f"it has format {saved.get('format')}, and this version reads {FORMAT}",
            remedy="Use the version of openvadp.backup that wrote it, or a newer one",
        )
    config = from_json(saved["config"])
    # What was true of that machine is not true of one that is made after it (proofs 20).
    config.extraConfig = strip(config.extraConfig)
    return config


def _surroundings(session: Session, facts: Dict[str, Any]) -> Dict[str, Any]:
    """Host, cluster, resource pool, networks and datastores by name: a call, and another for distributed switches."""
    collector = vmodl.query.PropertyCollector
    host, pool = facts["runtime.host"], facts["resourcePool"]
    networks, datastores = list(facts["network"] or []), list(facts["datastore"] or [])
    up = collector.TraversalSpec(
        name="up",
        type=vim.ManagedEntity,
        path="parent",
        skip=False,
        selectSet=[collector.SelectionSpec(name="up")],
    )
    properties: Dict[Any, Sequence[str]] = {
        vim.HostSystem: ["name", "parent"],
        vim.ComputeResource: ["name"],
        vim.ResourcePool: ["name", "parent"],
        vim.Network: ["name"],
        vim.Datastore: ["name", "summary.type", "summary.url"],
    }
    if any(isinstance(network, vim.dvs.DistributedVirtualPortgroup) for network in networks):
        properties[vim.dvs.DistributedVirtualPortgroup] = ["name", "key", "config.distributedVirtualSwitch"]
    if any(isinstance(network, vim.OpaqueNetwork) for network in networks):
        properties[vim.OpaqueNetwork] = ["name", "summary"]
    spec = filter_spec([item for item in (host, pool) if item is not None], properties, [up])
    spec.objectSet.extend(collector.ObjectSpec(obj=item, skip=False) for item in networks + datastores)
    known: Dict[str, Dict[str, Any]] = {}
    kinds: Dict[str, Any] = {}
    for content in session.retrieve([spec]) if spec.objectSet else []:
        known.setdefault(content.obj._moId, {}).update({prop.name: prop.val for prop in content.propSet})
        kinds[content.obj._moId] = content.obj
    switches = _switches(session, known)
    cluster = known.get(host._moId, {}).get("parent") if host is not None else None
    return {
        "host": _name(known, host),
        # A host outside of a cluster has a compute resource of its own name.
        "cluster": _name(known, cluster) if isinstance(cluster, vim.ClusterComputeResource) else None,
        "resource_pool": _pool_path(known, pool),
        "networks": [
            {
                "moid": network._moId,
                "name": _name(known, network),
                "type": type(network).__name__.rsplit(".", 1)[-1],
                "portgroup_key": known.get(network._moId, {}).get("key"),
                "switch": switches.get(network._moId),
                "opaque_network_id": getattr(known.get(network._moId, {}).get("summary"), "opaqueNetworkId", None),
            }
            for network in networks
        ],
        "datastores": [
            {
                "moid": datastore._moId,
                "name": _name(known, datastore),
                "type": known.get(datastore._moId, {}).get("summary.type"),
                "url": known.get(datastore._moId, {}).get("summary.url"),
            }
            for datastore in datastores
        ],
    }


def network_name(
    saved_networks: Sequence[Mapping[str, Any]],
    *,
    portgroup_key: Optional[str] = None,
    opaque_network_id: Optional[str] = None,
    device_name: Optional[str] = None,
) -> Optional[str]:
    """The name of the network that a card was connected to, by what its backing says; None: to nothing.

    :param saved_networks: ``networks`` of the saved configuration.
    """
    if portgroup_key is not None:
        named = [network for network in saved_networks if network.get("portgroup_key") == portgroup_key]
        return (named[0].get("name") if named else None) or portgroup_key
    if opaque_network_id is not None:
        opaque = [network for network in saved_networks if network.get("type") == "OpaqueNetwork"]
        named = [network for network in opaque if network.get("opaque_network_id") == opaque_network_id]
        # Points of older versions don't tell the ids.
        unknown = [network for network in opaque if network.get("opaque_network_id") is None]
        if not named and len(opaque) == len(unknown) == 1:
            named = unknown
        return (named[0].get("name") if named else None) or opaque_network_id
    return device_name or None


def _name(known: Dict[str, Dict[str, Any]], obj: Any) -> Optional[str]:
    name = known.get(obj._moId, {}).get("name") if obj is not None else None
    return readable(name) if name is not None else None


def _pool_path(known: Dict[str, Dict[str, Any]], pool: Any) -> Optional[str]:
    """``Resources/production``: the pools from the root pool of the cluster or host downwards."""
    names: List[str] = []
    while isinstance(pool, vim.ResourcePool) and pool._moId in known:
        names.append(known[pool._moId].get("name") or pool._moId)
        pool = known[pool._moId].get("parent")
    return "/".join(reversed(names)) or None


def _switches(session: Session, known: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, str]]:
    """Moid of a distributed port group -> {name, uuid} of its switch."""
    used = {
        moid: props["config.distributedVirtualSwitch"]
        for moid, props in known.items()
        if props.get("config.distributedVirtualSwitch") is not None
    }
    read = session.read_many(
        list({switch._moId: switch for switch in used.values()}.values()),
        vim.DistributedVirtualSwitch,
        ["name", "uuid"],
    )
    return {
        moid: {"name": readable(read[switch._moId]["name"]), "uuid": read[switch._moId]["uuid"]}
        for moid, switch in used.items()
    }


def nvram(session: Session, vm: VmRef, files: Sequence[Dict[str, Any]]) -> Optional[bytes]:
    """The contents of the NVRAM file; ``None`` for a virtual machine that was never started (VADP facts 18).

    :param files: the machine's, as :func:`save` lists them.
    """
    for item in files:
        if item["type"] == "nvram":
            return http_get(session, item["name"], vm.datacenter_path)
    return None
