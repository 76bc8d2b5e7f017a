# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Networks of ESXi hosts: switches, port groups, uplinks, VMkernel NICs and their services; all hosts in one read."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..errors import AmbiguousError, NotFoundError
from ..libraries import vim
from .dvswitch import DvPortGroup
from .inventory import readable
from .session import Session

BACKUP_SERVICE = "vSphereBackupNFC"
DEFAULT_STACK = "defaultTcpipStack"

_NIC_PATH = "config.network.vnic"
_PATHS = (
    "name",
    "runtime.connectionState",
    "config.product.version",
    "config.network.vswitch",
    "config.network.proxySwitch",
    "config.network.portgroup",
    "config.network.pnic",
    _NIC_PATH,
    "config.virtualNicManagerInfo.netConfig",
    "configManager.networkSystem",
    "configManager.virtualNicManager",
)

# Services as people call them; the API's name for the rest.
_SERVICE_NAMES = {
    "management": "management",
    "vmotion": "vMotion",
    "faultToleranceLogging": "fault tolerance logging",
    "vSphereProvisioning": "provisioning",
    "vSphereReplication": "replication",
    "vSphereReplicationNFC": "replication NFC",
    "vsan": "vSAN",
    BACKUP_SERVICE: "backup",
}


def service_words(services: Sequence[str]) -> str:
    return ", ".join(_SERVICE_NAMES.get(name, name) for name in services) or "none"


@dataclass(frozen=True)
class Nic:
    """A VMkernel NIC.

    ``portgroup`` and ``switch`` are names, ``port_key`` is the key of a distributed port group. ``ip`` and ``netmask``
    are None while there is no address.
    """

    device: str
    portgroup: str = ""
    switch: str = ""
    port_key: Optional[str] = None
    vlan_id: Optional[int] = None
    dhcp: bool = False
    ip: Optional[str] = None
    netmask: Optional[str] = None
    ipv6: Tuple[str, ...] = ()
    mtu: int = 1500
    stack: str = DEFAULT_STACK
    gateway: Optional[str] = None
    services: Tuple[str, ...] = ()

    @property
    def tagged(self) -> bool:
        return BACKUP_SERVICE in self.services

    @property
    def other_services(self) -> Tuple[str, ...]:
        return tuple(name for name in self.services if name != BACKUP_SERVICE)

    @property
    def subnets(self) -> List[Any]:
        """The subnets of its addresses; link-local ones, which every NIC has, do not count."""
        texts = [f"{self.ip}/{self.netmask}"] if self.ip and self.netmask else []
        networks = [ipaddress.ip_interface(text).network for text in [*texts, *self.ipv6]]
        return [network for network in networks if not network.is_link_local]

    @property
    def address(self) -> str:
        """Its IPv4 address with the prefix, or its first IPv6 address."""
        if self.ip and self.netmask:
            return str(ipaddress.ip_interface(f"{self.ip}/{self.netmask}"))
        return self.ipv6[0] if self.ipv6 else "no address"

    def __str__(self) -> str:
        return (
            f"{self.device} ({self.address}, port group '{self.portgroup}', services: {service_words(self.services)})"
        )

    def to_dict(self) -> Dict[str, Any]:
        return {
            "device": self.device,
            "ip": self.ip,
            "netmask": self.netmask,
            "dhcp": self.dhcp,
            "ipv6": list(self.ipv6),
            "gateway": self.gateway,
            "mtu": self.mtu,
            "portgroup": self.portgroup,
            "switch": self.switch,
            "vlan_id": self.vlan_id,
            "tcpip_stack": self.stack,
            "services": list(self.services),
        }


@dataclass(frozen=True)
class Switch:
    """A switch as one host has it. ``uuid`` is a distributed one's."""

    name: str
    mtu: int = 1500
    uplinks: Tuple[str, ...] = ()
    uuid: Optional[str] = None


@dataclass(frozen=True)
class PortGroup:
    """A port group of a standard switch."""

    name: str
    switch: str
    vlan_id: int = 0


@dataclass
class HostNetwork:
    """What a host's network is; empty where the host does not answer (``connected``)."""

    obj: Any
    moid: str
    name: str
    connected: bool = True
    version: str = ""
    switches: List[Switch] = field(default_factory=list)
    port_groups: List[PortGroup] = field(default_factory=list)
    uplinks: List[str] = field(default_factory=list)
    nics: List[Nic] = field(default_factory=list)
    service_types: Tuple[str, ...] = ()
    network_system: Any = None
    nic_manager: Any = None

    def __str__(self) -> str:
        return f"host '{self.name}' ({self.moid})"

    def switch(self, name: Optional[str], distributed: bool = False) -> Optional[Switch]:
        return next((one for one in self.switches if one.name == name and bool(one.uuid) == distributed), None)

    def port_group(self, name: Optional[str]) -> Optional[PortGroup]:
        return next((one for one in self.port_groups if one.name == name), None)

    def nic(self, device: Optional[str]) -> Optional[Nic]:
        return next((one for one in self.nics if one.device == device), None)

    @property
    def tagged(self) -> List[Nic]:
        return [nic for nic in self.nics if nic.tagged]


def all_hosts(session: Session, root: Any = None) -> List[HostNetwork]:
    """Name and VMkernel NICs (without services) of every host that the user may see, in one read."""
    found = session.find(vim.HostSystem, ["name", "runtime.connectionState", _NIC_PATH], root)
    return [
        HostNetwork(
            obj,
            obj._moId,
            readable(values["name"] or obj._moId),
            connected=values["runtime.connectionState"] == "connected",
            nics=[_nic(one, {}, {}, {}) for one in values[_NIC_PATH] or ()],
        )
        for obj, values in found
    ]


def pick(hosts: Sequence[HostNetwork], name: str) -> HostNetwork:
    """The host of a name. :raises NotFoundError: there is none; :raises AmbiguousError: there are several."""
    fitting = [host for host in hosts if host.name == name] or [
        host for host in hosts if host.name.lower() == name.lower()
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise AmbiguousError(
            "More than one host fits",
            subject=f"'{name}'",
            reason=", ".join(host.moid for host in fitting),
            remedy="Connect to the host itself, or rename one of them",
        )
    alike = [host.name for host in hosts if host.name.split(".")[0].lower() == name.split(".")[0].lower()]
    reason = f"vCenter has {', '.join(alike)}" if alike and not name[:1].isdigit() else None
    raise NotFoundError(
        "There is no such host",
        subject=f"'{name}'",
        reason=reason or "no host that this user may see has that name",
        remedy="Give the name or address under which the host is in vCenter's inventory",
    )


def read(
    session: Session, hosts: Sequence[HostNetwork], port_groups: Optional[Dict[str, DvPortGroup]] = None
) -> List[HostNetwork]:
    """The whole network of each of *hosts*, in one ``RetrievePropertiesEx``.

    Of one that does not answer, only what its NICs are on is added to what vCenter still knows.

    :param port_groups: the distributed ones by key, for the names of what a NIC is on.
    """
    groups = port_groups or {}
    values = session.read_many([host.obj for host in hosts if host.connected], vim.HostSystem, _PATHS)
    return [_network(host.obj, values[host.moid], groups) if host.connected else _away(host, groups) for host in hosts]


def _away(host: HostNetwork, groups: Dict[str, DvPortGroup]) -> HostNetwork:
    """A host that does not answer, its NICs with the names of their distributed port groups."""
    nics = [
        replace(nic, **_distributed_place(nic.port_key, nic.switch, groups)) if nic.port_key else nic
        for nic in host.nics
    ]
    return replace(host, nics=nics)


def _distributed_place(key: str, switch_uuid: str, groups: Dict[str, DvPortGroup]) -> Dict[str, Any]:
    """What a NIC of a distributed port group is on, by names where they are known."""
    group = groups.get(key)
    if group is None:
        return {"portgroup": key, "switch": switch_uuid, "vlan_id": None}
    return {"portgroup": group.name, "switch": group.switch_name, "vlan_id": group.vlan_id}


def _network(obj: Any, values: Dict[str, Any], port_groups: Dict[str, DvPortGroup]) -> HostNetwork:
    uplinks = {one.key: one.device for one in values["config.network.pnic"] or ()}
    switches = [
        Switch(one.name, one.mtu or 1500, tuple(uplinks.get(key, str(key)) for key in one.pnic))
        for one in values["config.network.vswitch"] or ()
    ]
    switches += [
        Switch(one.dvsName, one.mtu or 1500, tuple(uplinks.get(key, str(key)) for key in one.pnic), one.dvsUuid)
        for one in values["config.network.proxySwitch"] or ()
    ]
    groups = [
        PortGroup(one.spec.name, one.spec.vswitchName, one.spec.vlanId)
        for one in values["config.network.portgroup"] or ()
    ]
    configs = values["config.virtualNicManagerInfo.netConfig"] or ()
    services = _services(configs)
    by_name = {one.name: one for one in groups}
    return HostNetwork(
        obj=obj,
        moid=obj._moId,
        name=readable(values["name"] or obj._moId),
        connected=values["runtime.connectionState"] == "connected",
        version=values["config.product.version"] or "",
        switches=switches,
        port_groups=groups,
        uplinks=list(uplinks.values()),
        nics=[_nic(one, services, by_name, port_groups) for one in values[_NIC_PATH] or ()],
        service_types=tuple(one.nicType for one in configs),
        network_system=values["configManager.networkSystem"],
        nic_manager=values["configManager.virtualNicManager"],
    )


def selected(config: Any) -> List[str]:
    """The devices that a ``NetConfig`` has selected, whatever form its keys have."""
    devices = {one.key: one.device for one in config.candidateVnic}
    return [devices.get(key) or str(key).rsplit("-", 1)[-1] for key in config.selectedVnic]


def _services(configs: Sequence[Any]) -> Dict[str, List[str]]:
    """Device -> the services that it carries."""
    services: Dict[str, List[str]] = {}
    for config in configs:
        for device in selected(config):
            services.setdefault(device, []).append(config.nicType)
    return services


def _nic(
    one: Any, services: Dict[str, List[str]], groups: Dict[str, PortGroup], distributed: Dict[str, DvPortGroup]
) -> Nic:
    spec = one.spec
    port = spec.distributedVirtualPort
    key = port.portgroupKey if port is not None else None
    portgroup = one.portgroup or spec.portgroup or ""
    place: Dict[str, Any] = {"portgroup": portgroup, "switch": "", "vlan_id": None}
    if key is not None:
        place = _distributed_place(key, port.switchUuid, distributed)
    elif portgroup in groups:
        place.update(switch=groups[portgroup].switch, vlan_id=groups[portgroup].vlan_id)
    ip = spec.ip
    address = ip.ipAddress if ip is not None else None
    # Without a lease ESXi shows a link-local address, or none.
    if address and (address.startswith("169.254.") or address == "0.0.0.0"):
        address = None
    v6 = ip.ipV6Config.ipV6Address if ip is not None and ip.ipV6Config is not None else ()
    routes = spec.ipRouteSpec.ipRouteConfig if spec.ipRouteSpec is not None else None
    return Nic(
        device=one.device,
        port_key=key,
        **place,
        dhcp=bool(ip is not None and ip.dhcp),
        ip=address,
        netmask=ip.subnetMask if address else None,
        ipv6=tuple(
            f"{v.ipAddress}/{v.prefixLength}" for v in v6 if not ipaddress.IPv6Address(v.ipAddress).is_link_local
        ),
        mtu=spec.mtu or 1500,
        stack=spec.netStackInstanceKey or DEFAULT_STACK,
        gateway=(routes.defaultGateway or None) if routes is not None else None,
        services=tuple(services.get(one.device, ())),
    )
