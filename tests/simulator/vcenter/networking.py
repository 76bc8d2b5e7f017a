# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hosts' networks: what a new host has, what it looks like from outside; distributed switches and port groups.

A host's network is a ``vim.host.NetworkInfo`` that nobody changes in place: who changes it makes a copy and puts that
in its place, so that an answer that is being written is of one moment.
"""

from __future__ import annotations

import hashlib
import ipaddress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from . import soap
from .model import Entity, clone, now

if TYPE_CHECKING:
    from .inventory import Host
    from .simulator import Simulator

DEFAULT_STACK = "defaultTcpipStack"
STACKS = (DEFAULT_STACK, "vmotion", "vSphereProvisioning", "vxlan")
SERVICES = (
    "vmotion",
    "faultToleranceLogging",
    "vSphereReplication",
    "vSphereReplicationNFC",
    "management",
    "vsan",
    "vSphereProvisioning",
    "vsanWitness",
    "vSphereBackupNFC",
    "nvmeTcp",
)
BACKUP = "vSphereBackupNFC"
PNICS = 4

Dvs = vim.dvs.VmwareDistributedVirtualSwitch
Portgroup = vim.dvs.DistributedVirtualPortgroup


def services_of(version: str) -> tuple[str, ...]:
    """The service types that an ESXi of that version knows (VADP facts 25)."""
    old = int(version.split(".")[0]) < 7
    return tuple(name for name in SERVICES if not (old and name in (BACKUP, "nvmeTcp")))


def mac(*words: str) -> str:
    digits = hashlib.sha256(" ".join(words).encode()).hexdigest()
    return f"00:50:56:{int(digits[:2], 16) & 0x3F:02x}:{digits[2:4]}:{digits[4:6]}"


# --- a host ---------------------------------------------------------------------------------------------------------


def vswitch(name: str, spec: Any) -> Any:
    return vim.host.VirtualSwitch(
        name=name,
        key=f"key-vim.host.VirtualSwitch-{name}",
        numPorts=spec.numPorts,
        numPortsAvailable=spec.numPorts,
        mtu=spec.mtu or 1500,
        pnic=[pnic_key(device) for device in bridge_of(spec)],
        spec=spec,
    )


def pnic_key(device: str) -> str:
    return f"key-vim.host.PhysicalNic-{device}"


def bridge_of(spec: Any) -> list[str]:
    """The uplinks that a switch's specification names."""
    bridge = spec.bridge if spec is not None else None
    return list(bridge.nicDevice) if isinstance(bridge, vim.host.VirtualSwitch.BondBridge) else []


def port_group(name: str, vlan_id: int, switch: str, policy: Any = None) -> Any:
    return vim.host.PortGroup(
        key=f"key-vim.host.PortGroup-{name}",
        vswitch=f"key-vim.host.VirtualSwitch-{switch}",
        computedPolicy=vim.host.NetworkPolicy(),
        spec=vim.host.PortGroup.Specification(
            name=name, vlanId=vlan_id, vswitchName=switch, policy=policy or vim.host.NetworkPolicy()
        ),
    )


def virtual_nic(device: str, portgroup: str, spec: Any) -> Any:
    return vim.host.VirtualNic(
        device=device, key=f"key-vim.host.VirtualNic-{device}", portgroup=portgroup, spec=spec, port=None
    )


def new_network(host: "Host") -> Any:
    """vSwitch0 with the management NIC on vmnic0; the other uplinks are free."""
    pnics = [
        vim.host.PhysicalNic(
            key=pnic_key(f"vmnic{index}"),
            device=f"vmnic{index}",
            pci=f"0000:0b:00.{index}",
            driver="ixgben",
            linkSpeed=vim.host.PhysicalNic.LinkSpeedDuplex(speedMb=10000, duplex=True),
            spec=vim.host.PhysicalNic.Specification(),
            wakeOnLanSupported=False,
            mac=mac(host.uuid, f"vmnic{index}"),
        )
        for index in range(PNICS)
    ]
    spec = vim.host.VirtualSwitch.Specification(
        numPorts=128, mtu=1500, bridge=vim.host.VirtualSwitch.BondBridge(nicDevice=["vmnic0"])
    )
    management = vim.host.VirtualNic.Specification(
        ip=vim.host.IpConfig(dhcp=False, ipAddress=host.name, subnetMask="255.255.255.0"),
        mac=mac(host.uuid, "vmk0"),
        portgroup="Management Network",
        mtu=1500,
        tsoEnabled=True,
        netStackInstanceKey=DEFAULT_STACK,
    )
    return vim.host.NetworkInfo(
        vswitch=[vswitch("vSwitch0", spec)],
        portgroup=[port_group(name, 0, "vSwitch0") for name in ("Management Network", "VM Network", "Backup Network")],
        pnic=pnics,
        vnic=[virtual_nic("vmk0", "Management Network", management)],
        ipV6Enabled=True,
        atBootIpV6Enabled=True,
        netStackInstance=[vim.host.NetStackInstance(key=key, name=key) for key in STACKS],
    )


def ensure(host: "Host") -> Any:
    """A host's network; a host that has none yet gets its first."""
    if host.network is None:
        host.network = new_network(host)
        host.services = {"management": ["vmk0"]}
    return host.network


def seen(host: "Host") -> Any:
    """A host's network as it looks now: with proxy switches, and the addresses that DHCP has given by now."""
    network = ensure(host)
    switches = [switch for switch in host.simulator.inventory.all(DistributedSwitch) if host.moid in switch.members]
    dynamic = [nic for nic in network.vnic if nic.spec.ip is not None and nic.spec.ip.dhcp]
    if not switches and not dynamic:
        return network
    network = clone(network)
    for nic in network.vnic:
        if nic.spec.ip is not None and nic.spec.ip.dhcp:
            nic.spec.ip.ipAddress, nic.spec.ip.subnetMask = leased(host.leases.get(nic.device), nic.spec.mac)
    network.proxySwitch = [switch.proxy_of(host) for switch in switches]
    return network


def lease(host: "Host", device: str) -> dict[str, Any]:
    """What a DHCP server answers to a new NIC: an address of its own, from some time on."""
    settings = host.simulator.settings
    subnet = ipaddress.ip_network(settings.dhcp_subnet)
    taken = {
        one["address"] for other in host.simulator.inventory.all(type(host)) for one in (other.leases or {}).values()
    }
    address = next(str(one) for one in list(subnet.hosts())[9:] if str(one) not in taken)
    due = None if settings.dhcp_delay is None else now() + timedelta(seconds=settings.dhcp_delay)
    return {"due": due, "address": address, "netmask": str(subnet.netmask)}


def leased(kept: dict[str, Any] | None, hardware: str) -> tuple[str, str]:
    """Address and netmask of a NIC that uses DHCP; a link-local one while there is no lease, as ESXi does it."""
    due: datetime | None = kept["due"] if kept else None
    if kept is not None and due is not None and due <= now():
        return kept["address"], kept["netmask"]
    low = [int(part, 16) for part in hardware.split(":")[-2:]]
    return f"169.254.{low[0]}.{min(max(low[1], 1), 254)}", "255.255.0.0"


def net_configs(host: "Host") -> list[Any]:
    """What ``virtualNicManagerInfo`` has: for each service its candidates and who is selected."""
    network = seen(host)
    return [net_config(host, service, network) for service in services_of(host.version)]


def backup_addresses(host: "Host") -> list[str]:
    """The addresses of the NICs that are tagged for backup."""
    vnics = host.network.vnic if host.network is not None else ()
    tagged = host.services.get(BACKUP, [])
    return [vnic.spec.ip.ipAddress for vnic in vnics if vnic.device in tagged and vnic.spec.ip is not None]


def net_config(host: "Host", service: str, network: Any) -> Any:
    candidates = []
    for nic in network.vnic:
        if nic.spec.netStackInstanceKey not in (None, DEFAULT_STACK, service):
            continue
        candidate = vim.host.VirtualNic(device=nic.device, portgroup=nic.portgroup, spec=nic.spec)
        candidate.key = f"{service}.{nic.key}"
        candidates.append(candidate)
    chosen = host.services.get(service, [])
    return vim.host.VirtualNicManager.NetConfig(
        nicType=service,
        multiSelectAllowed=True,
        candidateVnic=candidates,
        selectedVnic=[f"{service}.key-vim.host.VirtualNic-{device}" for device in chosen],
    )


# --- distributed switches -------------------------------------------------------------------------------------------

TRAFFIC = (
    "management",
    "faultTolerance",
    "vmotion",
    "virtualMachine",
    "iSCSI",
    "nfs",
    "hbr",
    "vsan",
    "vdp",
    "backupNfc",
    "nvmetcp",
)
LEVELS = {"low": 25, "normal": 50, "high": 100}


def pool(key: str, level: str = "normal", shares: int = 50, limit: int = -1, reservation: int = 0) -> Any:
    Resource = vim.DistributedVirtualSwitch.HostInfrastructureTrafficResource
    return Resource(
        key=key,
        description=key,
        allocationInfo=Resource.ResourceAllocation(
            limit=limit, shares=vim.SharesInfo(shares=shares, level=level), reservation=reservation
        ),
    )


class DistributedSwitch(Entity):
    """A distributed switch. ``members`` is {moid of a host: [its uplinks]}."""

    type = Dvs
    KEPT = ("uuid", "config_version", "members", "mtu", "pools", "nioc", "nioc_version", "version")
    uuid: str = ""
    config_version: int = 1
    members: dict[str, list[str]]
    mtu: int = 1500
    pools: list[Any]
    nioc: bool = True
    nioc_version: str = "version3"
    version: str = "8.0.3"

    def __init__(self, simulator: "Simulator", moid: str, name: str, parent: str | None) -> None:
        super().__init__(simulator, moid, name, parent)
        self.members = {}
        self.pools = [pool(key) for key in TRAFFIC]

    def portgroups(self) -> "list[DistributedPortgroup]":
        return [one for one in self.simulator.inventory.all(DistributedPortgroup) if one.switch == self.moid]

    def proxy_of(self, host: "Host") -> Any:
        return vim.host.HostProxySwitch(
            dvsUuid=self.uuid,
            dvsName=self.name,
            key=f"key-vim.host.HostProxySwitch-{self.name}",
            numPorts=512,
            numPortsAvailable=500,
            mtu=self.mtu,
            pnic=[pnic_key(device) for device in self.members[host.moid]],
            spec=vim.host.HostProxySwitch.Specification(
                backing=vim.dvs.HostMember.PnicBacking(
                    pnicSpec=[vim.dvs.HostMember.PnicSpec(pnicDevice=device) for device in self.members[host.moid]]
                )
            ),
        )

    def p_uuid(self) -> str:
        return self.uuid

    def p_portgroup(self) -> Any:
        return soap.array(Portgroup, [one.ref for one in self.portgroups()])

    def p_summary(self) -> Any:
        return vim.DistributedVirtualSwitch.Summary(
            name=self.name,
            uuid=self.uuid,
            numPorts=512,
            productInfo=self._product(),
            hostMember=[vim.HostSystem(moid) for moid in self.members],
            portgroupName=[one.name for one in self.portgroups()],
        )

    def _product(self) -> Any:
        return vim.dvs.ProductSpec(name="DVS", vendor="VMware, Inc.", version=self.version)

    def p_config(self) -> Any:
        members = [
            vim.dvs.HostMember(
                config=vim.dvs.HostMember.ConfigInfo(
                    host=vim.HostSystem(moid),
                    maxProxySwitchPorts=512,
                    backing=vim.dvs.HostMember.PnicBacking(
                        pnicSpec=[vim.dvs.HostMember.PnicSpec(pnicDevice=device) for device in devices]
                    ),
                ),
                status="up",
            )
            for moid, devices in self.members.items()
        ]
        return Dvs.ConfigInfo(
            uuid=self.uuid,
            name=self.name,
            numStandalonePorts=0,
            numPorts=512,
            maxPorts=60000,
            uplinkPortPolicy=vim.DistributedVirtualSwitch.NameArrayUplinkPortPolicy(uplinkPortName=["Uplink 1"]),
            uplinkPortgroup=[one.ref for one in self.portgroups() if one.uplink],
            defaultPortConfig=vlan_setting(0),
            host=members,
            productInfo=self._product(),
            configVersion=str(self.config_version),
            contact=vim.DistributedVirtualSwitch.ContactInfo(),
            createTime=self.simulator.start_time,
            networkResourceManagementEnabled=self.nioc,
            networkResourceControlVersion=self.nioc_version,
            infrastructureTrafficResourceConfig=self.pools,
            maxMtu=self.mtu,
        )


def vlan_setting(vlan_id: int) -> Any:
    return Dvs.VmwarePortConfigPolicy(vlan=Dvs.VlanIdSpec(inherited=False, vlanId=vlan_id))


class DistributedPortgroup(Entity):
    type = Portgroup
    KEPT = ("switch", "key", "setting", "kind", "ports", "uplink", "config_version")
    switch: str = ""
    key: str = ""
    setting: Any = None
    kind: str = "earlyBinding"
    ports: int = 8
    uplink: bool = False
    config_version: int = 1

    def p_key(self) -> str:
        return self.key

    def p_summary(self) -> Any:
        return vim.Network.Summary(network=self.ref, name=self.name, accessible=True)

    def p_host(self) -> Any:
        switch = self.simulator.inventory.get(self.switch)
        return soap.array(vim.HostSystem, [vim.HostSystem(moid) for moid in switch.members])

    def p_vm(self) -> Any:
        return soap.array(vim.VirtualMachine)

    def p_config(self) -> Any:
        return Portgroup.ConfigInfo(
            key=self.key,
            name=self.name,
            numPorts=self.ports,
            distributedVirtualSwitch=self.simulator.inventory.get(self.switch).ref,
            defaultPortConfig=self.setting,
            type=self.kind,
            policy=Portgroup.PortgroupPolicy(),
            configVersion=str(self.config_version),
            autoExpand=True,
            uplink=self.uplink,
        )
