# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Distributed switches: port groups, members, the pools of Network I/O Control."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from .. import networking
from ..inventory import Host
from ..model import clone
from ..networking import DistributedPortgroup, DistributedSwitch
from ..services import Task
from . import Context, method
from .networks import uplinks_of_proxies

TYPES = ("earlyBinding", "lateBinding", "ephemeral")


def _dvs_fault(text: str) -> Exception:
    return vim.fault.DvsFault(msg=text)


def _vlan_of(setting: Any) -> None:
    vlan = getattr(setting, "vlan", None)
    if isinstance(vlan, networking.Dvs.VlanIdSpec) and not 0 <= vlan.vlanId <= 4094:
        raise vmodl.fault.InvalidArgument(invalidProperty="spec.defaultPortConfig.vlan.vlanId")


def _add_groups(context: Context, switch: DistributedSwitch, specs: list[Any]) -> list[DistributedPortgroup]:
    simulator = context.simulator
    made: list[DistributedPortgroup] = []
    with simulator.lock:
        for spec in specs:
            beside = [one for one in simulator.inventory.entities.values() if one.parent == switch.parent]
            if not spec.name or spec.type not in TYPES:
                raise vmodl.fault.InvalidArgument(invalidProperty="spec.name" if not spec.name else "spec.type")
            if any(one.name == spec.name for one in beside):
                raise vim.fault.DuplicateName(name=spec.name, object=switch.ref)
            _vlan_of(spec.defaultPortConfig)
        for spec in specs:
            moid = simulator.new_moid("dvportgroup")
            group = DistributedPortgroup(simulator, moid, spec.name, switch.parent)
            group.switch, group.key = switch.moid, moid
            group.kind, group.ports = spec.type, spec.numPorts or 8
            group.setting = clone(spec.defaultPortConfig) if spec.defaultPortConfig else networking.vlan_setting(0)
            simulator.inventory.add(group)
            made.append(group)
        switch.config_version += 1
        switch.save()
    return made


@method("DistributedVirtualSwitch", "CreateDVPortgroup_Task", changing=True)
def create_group(context: Context, switch: DistributedSwitch, spec: Any) -> Any:
    def body(task: Task) -> Any:
        return _add_groups(context, switch, [spec])[0].ref

    return context.simulator.tasks.start(context, context.method, switch, body)


@method("DistributedVirtualSwitch", "AddDVPortgroup_Task", changing=True)
def add_groups(context: Context, switch: DistributedSwitch, spec: Any) -> Any:
    def body(task: Task) -> None:
        _add_groups(context, switch, list(spec))

    return context.simulator.tasks.start(context, context.method, switch, body)


@method("DistributedVirtualPortgroup", "ReconfigureDVPortgroup_Task", changing=True, privilege="DVPortgroup.Modify")
def reconfigure_group(context: Context, group: DistributedPortgroup, spec: Any) -> Any:
    if spec.configVersion != str(group.config_version):
        raise vim.fault.ConcurrentAccess()
    _vlan_of(spec.defaultPortConfig)

    def body(task: Task) -> None:
        with context.simulator.lock:
            group.name = spec.name or group.name
            if spec.defaultPortConfig is not None:
                group.setting = clone(spec.defaultPortConfig)
            group.config_version += 1
            group.save()

    return context.simulator.tasks.start(context, context.method, group, body)


@method("DistributedVirtualPortgroup", "Destroy_Task", changing=True, privilege="DVPortgroup.Delete")
def destroy_group(context: Context, group: DistributedPortgroup) -> Any:
    simulator = context.simulator

    def body(task: Task) -> None:
        with simulator.lock:
            for host in simulator.inventory.all(Host):
                for nic in networking.ensure(host).vnic:
                    port = nic.spec.distributedVirtualPort
                    if port is not None and port.portgroupKey == group.key:
                        raise vim.fault.ResourceInUse(
                            name=group.name, msg=f"The resource '{group.key}' is in use by {nic.device} of {host.name}."
                        )
            if group.uplink:
                raise vmodl.fault.NotSupported()
            simulator.inventory.remove(group)

    return simulator.tasks.start(context, context.method, group, body)


# --- the switch itself ----------------------------------------------------------------------------------------------


def _check_pool(switch: DistributedSwitch, wanted: Any) -> None:
    have = next((one for one in switch.pools if one.key == wanted.key), None)
    if switch.nioc_version != "version3" or have is None:
        raise _dvs_fault(f"the switch has no infrastructure traffic '{wanted.key}'")
    info = wanted.allocationInfo
    if info.shares is not None and info.shares.level == "custom" and not 0 <= info.shares.shares <= 100:
        raise vmodl.fault.InvalidArgument(invalidProperty="allocationInfo.shares.shares")
    limit = info.limit if info.limit is not None else have.allocationInfo.limit
    reservation = info.reservation if info.reservation is not None else have.allocationInfo.reservation
    if limit < -1 or reservation < 0 or (limit != -1 and reservation > limit):
        raise vmodl.fault.InvalidArgument(invalidProperty="allocationInfo.reservation")


def _check_member(switch: DistributedSwitch, change: Any) -> None:
    inventory = switch.simulator.inventory
    host: Host = inventory.get(change.host._moId)
    if change.operation == "remove":
        keys = {group.key for group in switch.portgroups()}
        for nic in networking.ensure(host).vnic:
            port = nic.spec.distributedVirtualPort
            if port is not None and port.portgroupKey in keys:
                raise vim.fault.ResourceInUse(name=nic.device)
        return
    if change.operation == "add" and host.moid in switch.members:
        raise vim.fault.AlreadyExists(name=host.name)
    network = networking.ensure(host)
    used = {device: one.name for one in network.vswitch for device in networking.bridge_of(one.spec)}
    used.update({device: name for device, name in uplinks_of_proxies(host).items() if name != switch.name})
    for device in _uplinks(change):
        if device not in {nic.device for nic in network.pnic}:
            raise vim.fault.NotFound()
        if device in used:
            raise vim.fault.ResourceInUse(name=device, msg=f"The resource '{device}' is in use.")


def _uplinks(change: Any) -> list[str]:
    backing = change.backing
    return [spec.pnicDevice for spec in backing.pnicSpec] if backing is not None else []


@method("DistributedVirtualSwitch", "ReconfigureDvs_Task", changing=True, privilege="System.View")
def reconfigure_switch(context: Context, switch: DistributedSwitch, spec: Any) -> Any:
    context.require("DVSwitch.Modify", switch)
    if spec.configVersion != str(switch.config_version):
        raise vim.fault.ConcurrentAccess()
    simulator = context.simulator

    def body(task: Task) -> None:
        with simulator.lock:
            if spec.configVersion != str(switch.config_version):
                raise vim.fault.ConcurrentAccess()
            for wanted in spec.infrastructureTrafficResourceConfig:
                _check_pool(switch, wanted)
            for change in spec.host:
                _check_member(switch, change)
            for wanted in spec.infrastructureTrafficResourceConfig:
                _set_pool(switch, wanted)
            for change in spec.host:
                if change.operation == "remove":
                    switch.members.pop(change.host._moId, None)
                else:
                    switch.members[change.host._moId] = _uplinks(change)
            switch.name = spec.name or switch.name
            switch.mtu = getattr(spec, "maxMtu", None) or switch.mtu
            switch.config_version += 1
            switch.save()

    return simulator.tasks.start(context, context.method, switch, body)


def _set_pool(switch: DistributedSwitch, wanted: Any) -> None:
    pools = []
    for have in switch.pools:
        if have.key == wanted.key:
            have = clone(have)
            info, given = have.allocationInfo, wanted.allocationInfo
            if given.shares is not None:
                level = given.shares.level
                number = networking.LEVELS.get(level, given.shares.shares)
                info.shares = vim.SharesInfo(level=level, shares=number)
            info.limit = info.limit if given.limit is None else given.limit
            info.reservation = info.reservation if given.reservation is None else given.reservation
        pools.append(have)
    switch.pools = pools


@method("DistributedVirtualSwitch", "EnableNetworkResourceManagement", changing=True)
def enable_nioc(context: Context, switch: DistributedSwitch, enable: bool) -> None:
    with context.simulator.lock:
        switch.nioc = bool(enable)
        switch.config_version += 1
        switch.save()
