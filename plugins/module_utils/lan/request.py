# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is asked of a host's backup NIC, checked before anything is touched."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from ..errors import InputError, VadpError, check_range
from ..vsphere.host_network import DEFAULT_STACK
from ..vsphere.session import Connection, check_timeout
from .subnets import parse_gateway, parse_ipv4, parse_ipv6

# Options that each entry of ``hosts`` may set for itself.
HOST_OPTIONS = (
    "vswitch",
    "dvswitch",
    "uplinks",
    "portgroup",
    "vlan_id",
    "ip_address",
    "netmask",
    "dhcp",
    "ipv6_addresses",
    "gateway",
    "mtu",
    "device",
)


# Option of an entry of ``hosts`` -> the common options that contradict it, and that it takes the place of.
_EXCLUDES = {
    "vswitch": ("dvswitch",),
    "dvswitch": ("vswitch", "uplinks"),
    "ip_address": ("dhcp",),
    "dhcp": ("ip_address", "netmask"),
}


@dataclass(frozen=True)
class HostRequest:
    """What is asked of one host. ``address`` and ``ipv6`` hold the subnets, too.

    :param any_netmask: the address was given without its subnet, to find a NIC that goes.
    :param no_gateway: the NIC is to have no gateway of its own.
    """

    host: str
    present: bool = True
    vswitch: Optional[str] = None
    dvswitch: Optional[str] = None
    uplinks: Optional[Tuple[str, ...]] = None
    portgroup: Optional[str] = None
    vlan_id: Optional[int] = None
    address: Optional[ipaddress.IPv4Interface] = None
    any_netmask: bool = False
    dhcp: bool = False
    ipv6: Optional[Tuple[ipaddress.IPv6Interface, ...]] = None
    gateway: Optional[ipaddress.IPv4Address] = None
    no_gateway: bool = False
    mtu: Optional[int] = None
    device: Optional[str] = None
    allow_shared_subnet: bool = False
    force: bool = False

    @classmethod
    def from_options(cls, host: str, options: Dict[str, Any], common: Dict[str, Any]) -> HostRequest:
        """:raises InputError: an option makes no sense."""
        present = common["state"] == "present"
        if options["dhcp"] and (options["ip_address"] or options["netmask"]):
            raise InputError(
                "The address is given twice",
                subject=f"ip_address or netmask beside dhcp: true, host '{host}'",
                remedy="Leave dhcp out, or leave ip_address and netmask out",
            )
        if options["netmask"] and not options["ip_address"]:
            raise InputError(
                "The option netmask stands alone", subject=options["netmask"], remedy="Give ip_address, too"
            )
        address, any_netmask = None, False
        if options["ip_address"]:
            text, netmask = options["ip_address"], options["netmask"]
            any_netmask = not present and "/" not in text and netmask is None
            if any_netmask:
                netmask = "255.255.255.254"  # the subnet of a NIC that goes does not matter
            address = parse_ipv4(text, netmask)
        ipv6 = options["ipv6_addresses"]
        request = cls(
            host=host,
            present=present,
            vswitch=options["vswitch"],
            dvswitch=options["dvswitch"],
            uplinks=None if options["uplinks"] is None else tuple(options["uplinks"]),
            portgroup=options["portgroup"],
            vlan_id=options["vlan_id"],
            address=address,
            any_netmask=any_netmask,
            dhcp=bool(options["dhcp"]),
            ipv6=None if ipv6 is None else tuple(parse_ipv6(text) for text in ipv6),
            gateway=parse_gateway(options["gateway"]) if options["gateway"] else None,
            no_gateway=options["gateway"] == "",
            mtu=options["mtu"],
            device=options["device"],
            allow_shared_subnet=common["allow_shared_subnet"],
            force=common["force"],
        )
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: options that contradict each other, or are out of range."""
        where = f"host '{self.host}'"
        check_range("vlan_id", self.vlan_id, 0, 4094)
        check_range("mtu", self.mtu, 1280, 9190)
        for name in ("vswitch", "dvswitch", "portgroup", "device"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise InputError(f"The option {name} is empty", subject=where, remedy="Give a name, or leave it out")
        if self.vswitch and self.dvswitch:
            raise InputError("Two switches are named", subject=where, remedy="Give either vswitch or dvswitch")
        if self.uplinks is not None and not self.vswitch:
            raise InputError(
                "The option uplinks stands alone",
                subject=where,
                remedy="It belongs to vswitch: a standard switch that is made when it is missing",
            )
        if self.uplinks is not None and (not self.uplinks or len(set(self.uplinks)) < len(self.uplinks)):
            raise InputError(
                "The option uplinks can't be used",
                subject=", ".join(self.uplinks) or "an empty list",
                reason="it names none, or one twice",
                remedy="Give physical NICs, such as vmnic2",
            )
        if self.gateway is not None and self.address is not None and self.gateway == self.address.ip:
            raise InputError(
                "The option gateway can't be used",
                subject=str(self.gateway),
                reason="it is the NIC's own address",
                remedy="Give the address of a router, or leave gateway out",
            )
        addresses = [str(one.ip) for one in self.ipv6 or ()]
        if len(set(addresses)) < len(addresses):
            raise InputError(
                "The option ipv6_addresses names an address twice",
                subject=", ".join(addresses),
                remedy="Give each address once",
            )
        if not (self.device or self.address or self.ipv6 or (self.dhcp if self.present else self.portgroup)):
            raise InputError(
                "The NIC is not named",
                subject=where,
                remedy="Give ip_address, dhcp: true or ipv6_addresses; or device for a NIC that is there"
                if self.present
                else "Give device, ip_address, ipv6_addresses or portgroup",
            )


@dataclass(frozen=True)
class NicRequest:
    """The options of ``vmkernel_backup_nic``.

    :param single: the host was given as ``esxi_hostname``: the result is that host's.
    :param by_datacenter: an address is unique in a datacenter only, as its networks are isolated from those of others.
    """

    connection: Connection
    hosts: List[HostRequest] = field(default_factory=list)
    single: bool = True
    timeout: int = 120
    parallel_hosts: int = 16
    by_datacenter: bool = False

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> NicRequest:
        """From ``module.params``. :raises InputError: an option makes no sense; nothing was touched."""
        connection = Connection.from_params(params)
        if params["tcpip_stack"] != DEFAULT_STACK:
            raise InputError(
                "Backup traffic can't use that TCP/IP stack",
                subject=params["tcpip_stack"],
                reason="only a NIC of the default stack can be tagged vSphereBackupNFC, and be handed to the proxy",
                remedy=f"Leave tcpip_stack out ({DEFAULT_STACK}); give the NIC a subnet of its own instead",
            )
        check_range("parallel_hosts", params["parallel_hosts"], 1, 64)
        common = {name: params[name] for name in HOST_OPTIONS}
        if params["hosts"] is not None:
            entries = [merged(common, entry) for entry in params["hosts"]]
        else:
            names = params["esxi_hostnames"]
            names = [params["esxi_hostname"]] if names is None else names
            entries = [dict(common, esxi_hostname=name) for name in names]
        if not entries:
            raise InputError("No host is named", remedy="Give at least one host")
        requests: List[HostRequest] = []
        for entry in entries:
            try:
                requests.append(HostRequest.from_options(entry["esxi_hostname"], entry, params))
            except VadpError as error:
                if len(entries) > 1 and f"'{entry['esxi_hostname']}'" not in str(error):
                    error.subject = f"{error.subject} (host '{entry['esxi_hostname']}')"
                raise
        by_datacenter = params["address_scope"] == "datacenter"
        _check_names(requests)
        if not by_datacenter:
            check_addresses(requests)
        return cls(
            connection=connection,
            hosts=requests,
            single=params["hosts"] is None and params["esxi_hostnames"] is None,
            timeout=check_timeout(params["timeout"]),
            parallel_hosts=params["parallel_hosts"],
            by_datacenter=by_datacenter,
        )


def merged(common: Mapping[str, Any], entry: Mapping[str, Any]) -> Dict[str, Any]:
    """The options of one host: its own, and those of all hosts that its own ones don't contradict."""
    own = {name: value for name, value in entry.items() if value is not None}
    base = dict(common)
    for name, others in _EXCLUDES.items():
        if own.get(name):
            base.update(dict.fromkeys(others))
    if "/" in (own.get("ip_address") or ""):
        base["netmask"] = None
    return {**base, **own}


def _check_names(requests: Sequence[HostRequest]) -> None:
    """:raises InputError: a host stands twice."""
    hosts: Set[str] = set()
    for request in requests:
        if request.host.lower() in hosts:
            raise InputError("A host is named twice", subject=f"'{request.host}'", remedy="Give each host once")
        hosts.add(request.host.lower())


def check_addresses(requests: Sequence[HostRequest]) -> None:
    """:raises InputError: two hosts are to have one address."""
    addresses: Dict[str, str] = {}
    for request in requests:
        own = [str(request.address.ip)] if request.address else []
        for address in own + [str(one.ip) for one in request.ipv6 or ()]:
            if address in addresses:
                raise InputError(
                    "Two hosts are to have one address",
                    subject=address,
                    reason=f"hosts '{addresses[address]}' and '{request.host}'",
                    remedy="Give each host an address of its own, in the list hosts",
                )
            addresses[address] = request.host
