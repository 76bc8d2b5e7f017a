# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host's switches, port groups, VMkernel NICs and their services."""

from __future__ import annotations

import contextlib
import copy
import ipaddress
from collections.abc import Iterator
from typing import Any

from pyVmomi import vim, vmodl

from .. import networking, soap
from ..inventory import Host, VirtualMachine
from ..model import Managed, clone
from ..simulator import Simulator
from . import Context, method, part


class HostPart(Managed):
    """An object that belongs to one host; the number of its moid is the host's."""

    def __init__(self, simulator: Simulator, moid: str) -> None:
        super().__init__(simulator, moid)
        found = simulator.inventory.entities.get(f"host-{moid.rsplit('-', 1)[-1]}")
        if not isinstance(found, Host):
            raise vmodl.fault.ManagedObjectNotFound(obj=self.ref)
        self.host = found


@part("networkSystem-")
class NetworkSystem(HostPart):
    type = vim.host.NetworkSystem

    def p_networkInfo(self) -> Any:
        return networking.seen(self.host)

    def p_capabilities(self) -> Any:
        return vim.host.NetCapabilities(canSetPhysicalNicLinkSpeed=True, supportsNicTeaming=True, supportsVlan=True)


@part("virtualNicManager-")
class VirtualNicManager(HostPart):
    type = vim.host.VirtualNicManager

    def p_info(self) -> Any:
        return vim.host.VirtualNicManagerInfo(netConfig=networking.net_configs(self.host))


@part("iscsiManager-")
class IscsiManager(HostPart):
    type = vim.host.IscsiManager


def _config_fault(text: str) -> Exception:
    return vim.fault.HostConfigFault(msg=text)


def _invalid(name: str, text: str) -> Exception:
    return vmodl.fault.InvalidArgument(invalidProperty=name, msg=f"A specified parameter was not correct: {text}")


def _not_found(kind: str, name: str) -> Exception:
    return vim.fault.NotFound(msg=f"The object or item referred to could not be found: {kind} {name}")


@contextlib.contextmanager
def _changing(context: Context, one: HostPart) -> Iterator[Any]:
    """The host's network to change, under the lock; kept when the change went well."""
    context.require("Host.Config.Network", one.host)
    if not one.host.connected:
        raise vmodl.fault.HostNotConnected(msg="Unable to communicate with the remote host, since it is disconnected.")
    with context.simulator.lock:
        network = clone(networking.ensure(one.host))
        yield network
        one.host.network = network
        one.host.save()
        if context.simulator.nfc is not None:
            context.simulator.nfc.follow(one.host)


def _named(items: Any, name: str, attribute: str = "name") -> Any:
    return next((item for item in items if getattr(item, attribute) == name), None)


def _port_group(network: Any, name: str) -> Any:
    return next((item for item in network.portgroup if item.spec.name == name), None)


# --- standard switches ----------------------------------------------------------------------------------------------


def _check_uplinks(host: Host, network: Any, spec: Any, own: str) -> None:
    devices = {nic.device for nic in network.pnic}
    used = {device: one.name for one in network.vswitch for device in networking.bridge_of(one.spec)}
    used.update(uplinks_of_proxies(host))
    for device in networking.bridge_of(spec):
        if device not in devices:
            raise _not_found("physical NIC", device)
        if used.get(device, own) != own:
            raise vim.fault.ResourceInUse(name=device, msg=f"The resource '{device}' is in use.")


def uplinks_of_proxies(host: Host) -> dict[str, str]:
    """The uplinks of a host that its distributed switches have: device -> switch."""
    switches = host.simulator.inventory.all(networking.DistributedSwitch)
    return {device: switch.name for switch in switches for device in switch.members.get(host.moid, [])}


def _check_switch(spec: Any) -> None:
    if spec.mtu is not None and not 1280 <= spec.mtu <= 9000:
        raise _invalid("spec.mtu", "spec.mtu")


@method("HostNetworkSystem", "AddVirtualSwitch", changing=True, privilege="System.View")
def add_switch(context: Context, system: NetworkSystem, vswitchName: str, spec: Any) -> None:
    with _changing(context, system) as network:
        if not 1 <= len(vswitchName) <= 32:
            raise _invalid("vswitchName", "vswitchName")
        taken = {one.name for one in network.vswitch} | set(uplinks_of_proxies(system.host).values())
        if vswitchName in taken:
            raise vim.fault.AlreadyExists(name=vswitchName)
        spec = spec or vim.host.VirtualSwitch.Specification(numPorts=128)
        _check_switch(spec)
        _check_uplinks(system.host, network, spec, vswitchName)
        network.vswitch.append(networking.vswitch(vswitchName, spec))


@method("HostNetworkSystem", "UpdateVirtualSwitch", changing=True, privilege="System.View")
def update_switch(context: Context, system: NetworkSystem, vswitchName: str, spec: Any) -> None:
    with _changing(context, system) as network:
        found = _named(network.vswitch, vswitchName)
        if found is None:
            raise _not_found("virtual switch", vswitchName)
        _check_switch(spec)
        _check_uplinks(system.host, network, spec, vswitchName)
        network.vswitch[list(network.vswitch).index(found)] = networking.vswitch(vswitchName, spec)


@method("HostNetworkSystem", "RemoveVirtualSwitch", changing=True, privilege="System.View")
def remove_switch(context: Context, system: NetworkSystem, vswitchName: str) -> None:
    with _changing(context, system) as network:
        found = _named(network.vswitch, vswitchName)
        if found is None:
            raise _not_found("virtual switch", vswitchName)
        groups = [item for item in network.portgroup if item.spec.vswitchName == vswitchName]
        for group in groups:
            _check_unused(system.host, network, group.spec.name)
            network.portgroup.remove(group)
        network.vswitch.remove(found)


# --- port groups ----------------------------------------------------------------------------------------------------


def _check_group(network: Any, spec: Any) -> None:
    if not spec.name or len(spec.name) > 256:
        raise _invalid("portgrp.name", "portgrp.name")
    if not 0 <= spec.vlanId <= 4095:
        raise _invalid("portgrp.vlanId", "portgrp.vlanId")
    if _named(network.vswitch, spec.vswitchName) is None:
        raise _not_found("virtual switch", spec.vswitchName)


def _is_used(host: Host, network: Any, name: str) -> bool:
    """Whether a VMkernel NIC or a virtual machine of this host is on a port group, so that it can't go."""
    nics = [nic.device for nic in network.vnic if nic.spec.portgroup == name]
    networks = {one.moid for one in host.simulator.inventory.entities.values() if one.type is vim.Network}
    machines = [
        vm.name
        for vm in host.simulator.inventory.all(VirtualMachine)
        if vm.host == host.moid
        and any(host.simulator.inventory.get(moid).name == name for moid in vm.network_moids() & networks)
    ]
    return bool(nics or machines)


def _check_unused(host: Host, network: Any, name: str) -> None:
    if _is_used(host, network, name):
        raise vim.fault.ResourceInUse(name=name, msg=f"The resource '{name}' is in use.")


@method("HostNetworkSystem", "AddPortGroup", changing=True, privilege="System.View")
def add_group(context: Context, system: NetworkSystem, portgrp: Any) -> None:
    with _changing(context, system) as network:
        _check_group(network, portgrp)
        if _port_group(network, portgrp.name) is not None:
            raise vim.fault.AlreadyExists(name=portgrp.name)
        network.portgroup.append(
            networking.port_group(portgrp.name, portgrp.vlanId, portgrp.vswitchName, portgrp.policy)
        )


@method("HostNetworkSystem", "UpdatePortGroup", changing=True, privilege="System.View")
def update_group(context: Context, system: NetworkSystem, pgName: str, portgrp: Any) -> None:
    with _changing(context, system) as network:
        found = _port_group(network, pgName)
        if found is None:
            raise _not_found("port group", pgName)
        _check_group(network, portgrp)
        if portgrp.name != pgName:
            if _port_group(network, portgrp.name) is not None:
                raise vim.fault.AlreadyExists(name=portgrp.name)
            if _is_used(system.host, network, pgName):
                raise _config_fault(f"port group {pgName} is in use")
        network.portgroup[list(network.portgroup).index(found)] = networking.port_group(
            portgrp.name, portgrp.vlanId, portgrp.vswitchName, portgrp.policy
        )


@method("HostNetworkSystem", "RemovePortGroup", changing=True, privilege="System.View")
def remove_group(context: Context, system: NetworkSystem, pgName: str) -> None:
    with _changing(context, system) as network:
        found = _port_group(network, pgName)
        if found is None:
            raise _not_found("port group", pgName)
        _check_unused(system.host, network, pgName)
        network.portgroup.remove(found)


# --- VMkernel NICs --------------------------------------------------------------------------------------------------


def _check_ip(network: Any, ip: Any, device: str | None) -> None:
    if ip is None:
        return
    if ip.dhcp and (ip.ipAddress or ip.subnetMask):
        raise _invalid("nic.ip", "Vim.Host.VirtualNic.Specification.Ip")
    if not ip.dhcp and bool(ip.ipAddress) != bool(ip.subnetMask):
        raise _invalid("nic.ip.subnetMask", "Vim.Host.VirtualNic.Specification.Ip")
    if not ip.dhcp and ip.ipAddress:
        try:
            interface = ipaddress.IPv4Interface(f"{ip.ipAddress}/{ip.subnetMask}")
        except ValueError:
            raise _invalid("nic.ip.ipAddress", "Vim.Host.VirtualNic.Specification.Ip") from None
        net = interface.network
        if net.prefixlen < 31 and interface.ip in (net.network_address, net.broadcast_address):
            raise _invalid("nic.ip.ipAddress", "Vim.Host.VirtualNic.Specification.Ip")
        for other in network.vnic:
            if other.device != device and other.spec.ip is not None and other.spec.ip.ipAddress == ip.ipAddress:
                raise _config_fault(f"IP address {ip.ipAddress} is already in use by {other.device}")
    for address in ip.ipV6Config.ipV6Address if ip.ipV6Config is not None else ():
        try:
            ipaddress.IPv6Interface(f"{address.ipAddress}/{address.prefixLength}")
        except ValueError:
            raise _invalid("nic.ip.ipV6Config", "Vim.Host.IpConfig.IpV6Address") from None


def _check_nic(network: Any, spec: Any, device: str | None) -> None:
    if spec.mtu is not None and not 1280 <= spec.mtu <= 9190:
        raise _invalid("nic.mtu", "Vim.Host.VirtualNic.Specification.Mtu")
    _check_ip(network, spec.ip, device)


def _distributed(host: Host, port: Any) -> str:
    """The key of the distributed port group that a NIC is to be put on."""
    for switch in host.simulator.inventory.all(networking.DistributedSwitch):
        if switch.uuid == port.switchUuid and host.moid in switch.members:
            for group in switch.portgroups():
                if group.key == port.portgroupKey and not group.uplink:
                    return group.key
    raise _not_found("distributed port", f"{port.switchUuid}/{port.portgroupKey}")


@method("HostNetworkSystem", "AddVirtualNic", changing=True, privilege="System.View")
def add_nic(context: Context, system: NetworkSystem, portgroup: str, nic: Any) -> str:
    host = system.host
    with _changing(context, system) as network:
        spec = clone(nic)
        stack = spec.netStackInstanceKey or networking.DEFAULT_STACK
        if stack not in {one.key for one in network.netStackInstance}:
            raise _not_found("TCP/IP stack", stack)
        if spec.distributedVirtualPort is not None:
            if portgroup:
                raise _invalid("portgroup", "portgroup")
            _distributed(host, spec.distributedVirtualPort)
            spec.distributedVirtualPort.portKey = str(len(network.vnic) + 10)
        else:
            if _port_group(network, portgroup) is None:
                raise _not_found("port group", portgroup)
            if any(other.spec.portgroup == portgroup for other in network.vnic):
                raise vim.fault.AlreadyExists(
                    name=portgroup, msg=f"The port group '{portgroup}' has a VMkernel NIC already."
                )
            spec.portgroup = portgroup
        if spec.ip is None:
            raise _invalid("nic.ip", "Vim.Host.VirtualNic.Specification.Ip")
        _check_nic(network, spec, None)
        taken = {other.device for other in network.vnic}
        device = next(f"vmk{index}" for index in range(1000) if f"vmk{index}" not in taken)
        spec.netStackInstanceKey = stack
        spec.mac = spec.mac or networking.mac(host.uuid, device)
        spec.mtu = spec.mtu or 1500
        spec.tsoEnabled = True
        spec.ip.ipV6Config = _merged_v6(None, spec.ip.ipV6Config, spec.mac)
        if spec.ip.dhcp:
            host.leases[device] = networking.lease(host, device)
        network.vnic.append(networking.virtual_nic(device, portgroup, spec))
    return device


@method("HostNetworkSystem", "UpdateVirtualNic", changing=True, privilege="System.View")
def update_nic(context: Context, system: NetworkSystem, device: str, nic: Any) -> None:
    """What the new specification does not set stays; the ``ip`` is replaced as a whole (VADP facts 26)."""
    host = system.host
    with _changing(context, system) as network:
        found = _named(network.vnic, device, "device")
        if found is None:
            raise _not_found("VMkernel NIC", device)
        _check_nic(network, nic, device)
        spec = found.spec
        if nic.ip is not None:
            v6 = _merged_v6(spec.ip.ipV6Config if spec.ip is not None else None, nic.ip.ipV6Config, spec.mac)
            was_dynamic = spec.ip is not None and spec.ip.dhcp
            spec.ip = clone(nic.ip)
            spec.ip.ipV6Config = v6
            if spec.ip.dhcp and not was_dynamic:
                host.leases[device] = networking.lease(host, device)
            elif not spec.ip.dhcp:
                host.leases.pop(device, None)
        for name in ("mtu", "ipRouteSpec"):
            if getattr(nic, name) is not None:
                setattr(spec, name, clone(getattr(nic, name)))
        routes = spec.ipRouteSpec.ipRouteConfig if spec.ipRouteSpec is not None else None
        if routes is None or not routes.defaultGateway:
            spec.ipRouteSpec = None


def _merged_v6(before: Any, wanted: Any, hardware: str) -> Any:
    """IPv6 addresses after a change that adds and removes some; the link-local one is always there."""
    have = list(before.ipV6Address) if before is not None else []
    for address in wanted.ipV6Address if wanted is not None else ():
        if address.operation not in ("add", "remove"):
            raise _invalid("nic.ip.ipV6Config", "Vim.Host.IpConfig.IpV6Address.operation")
        same = [one for one in have if one.ipAddress == address.ipAddress]
        if address.operation == "remove":
            if not same:
                raise _not_found("IPv6 address", address.ipAddress)
            have = [one for one in have if one is not same[0]]
        elif not same:
            have.append(
                vim.host.IpConfig.IpV6Address(
                    ipAddress=address.ipAddress,
                    prefixLength=address.prefixLength,
                    origin="manual",
                    dadState="preferred",
                )
            )
    if not any(one.ipAddress.startswith("fe80") for one in have):
        digits = hardware.replace(":", "")
        local = f"fe80::250:56ff:fe{digits[6:8]}:{digits[8:12]}"
        have.insert(
            0,
            vim.host.IpConfig.IpV6Address(ipAddress=local, prefixLength=64, origin="other", dadState="preferred"),
        )
    return vim.host.IpConfig.IpV6AddressConfiguration(
        ipV6Address=have, autoConfigurationEnabled=False, dhcpV6Enabled=False
    )


def _check_last_management(host: Host, device: str) -> None:
    if host.services.get("management") == [device]:
        raise _config_fault(f"{device} is the host's last management NIC")


@method("HostNetworkSystem", "RemoveVirtualNic", changing=True, privilege="System.View")
def remove_nic(context: Context, system: NetworkSystem, device: str) -> None:
    host = system.host
    with _changing(context, system) as network:
        found = _named(network.vnic, device, "device")
        if found is None:
            raise _not_found("VMkernel NIC", device)
        _check_last_management(host, device)
        if device in host.iscsi_nics:
            raise _config_fault(f"{device} is in use: a software iSCSI adapter is bound to it")
        network.vnic.remove(found)
        host.services = _without(host.services, device)
        host.leases.pop(device, None)


def _without(services: dict[str, list[str]], device: str, only: str | None = None) -> dict[str, list[str]]:
    return {
        name: [one for one in devices if one != device or only not in (None, name)]
        for name, devices in services.items()
    }


# --- services -------------------------------------------------------------------------------------------------------


def _check_service(host: Host, service: str, property_name: str = "nicType") -> None:
    if service not in networking.services_of(host.version):
        raise _invalid(property_name, property_name)


@method("HostVirtualNicManager", "QueryNetConfig")
def query_net_config(context: Context, manager: VirtualNicManager, nicType: str) -> Any:
    with context.simulator.lock:
        _check_service(manager.host, nicType)
        return copy.copy(networking.net_config(manager.host, nicType, networking.seen(manager.host)))


@method("HostVirtualNicManager", "SelectVnicForNicType", changing=True, privilege="System.View")
def select_nic(context: Context, manager: VirtualNicManager, nicType: str, device: str) -> None:
    host = manager.host
    with _changing(context, manager) as network:
        _check_service(host, nicType)
        found = _named(network.vnic, device, "device")
        if found is None or found.spec.netStackInstanceKey not in (networking.DEFAULT_STACK, nicType):
            raise _invalid("device", "device")
        devices = host.services.get(nicType, [])
        if device not in devices:
            host.services = {**host.services, nicType: [*devices, device]}


@method("HostVirtualNicManager", "DeselectVnicForNicType", changing=True, privilege="System.View")
def deselect_nic(context: Context, manager: VirtualNicManager, nicType: str, device: str) -> None:
    host = manager.host
    with _changing(context, manager):
        _check_service(host, nicType)
        if device not in host.services.get(nicType, []):
            raise _invalid("device", "device")
        if nicType == "management":
            _check_last_management(host, device)
        host.services = _without(host.services, device, only=nicType)


@method("IscsiManager", "QueryBoundVnics")
def query_bound_nics(context: Context, manager: IscsiManager, iScsiHbaName: str) -> Any:
    Port = vim.host.IscsiManager.IscsiPortInfo
    host = manager.host
    if iScsiHbaName != "vmhba64" or not (host.iscsi_nics or host.iscsi_targets):
        raise vim.fault.NotFound(msg=f"no iSCSI adapter {iScsiHbaName}")
    return soap.array(Port, [Port(vnicDevice=device) for device in host.iscsi_nics])
