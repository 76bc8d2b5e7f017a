# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Arithmetic of addresses and subnets: what may be an address of a VMkernel NIC, and which NICs share a subnet."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, List, Optional, Sequence, Tuple

from ..errors import InputError
from ..vsphere.host_network import Nic

# Of either version; what is asked of it both can answer.
Network = Any

_QUAD = re.compile(r"(?:0|[1-9]\d{0,2})(?:\.(?:0|[1-9]\d{0,2})){3}")


def _refuse(option: str, text: str, reason: str, remedy: str) -> InputError:
    return InputError(f"The option {option} can't be used", subject=repr(text), reason=reason, remedy=remedy)


def parse_netmask(text: str) -> int:
    """The prefix length of ``255.255.255.0``. :raises InputError: it is not a netmask."""
    remedy = "Give a netmask such as 255.255.255.0, or a prefix in ip_address: 10.20.30.11/24"
    if not _QUAD.fullmatch(text):
        raise _refuse("netmask", text, "it is not four numbers with dots", remedy)
    try:
        bits = int(ipaddress.IPv4Address(text))
    except ValueError as error:
        raise _refuse("netmask", text, str(error), remedy) from error
    # The ones stand on the left: the inverse is one less than a power of two.
    inverse = bits ^ 0xFFFFFFFF
    if inverse & (inverse + 1):
        raise _refuse("netmask", text, "its ones and zeros are mixed", remedy)
    return 32 - inverse.bit_length()


def _prefix(option: str, text: str, number: str, longest: int) -> int:
    remedy = f"Give a prefix from 1 to {longest} after the address"
    if not re.fullmatch(r"\d{1,3}", number) or not 1 <= int(number) <= longest:
        raise _refuse(option, text, f"'{number}' is not a prefix of a subnet that has other addresses", remedy)
    return int(number)


def parse_ipv4(text: str, netmask: Optional[str] = None) -> ipaddress.IPv4Interface:
    """An address with its subnet, from ``10.20.30.11/24`` or an address and a netmask.

    :raises InputError: malformed, without a mask or with two, or no address that a host may have.
    """
    address, slash, number = text.partition("/")
    remedy = "Give an address of a host, such as 10.20.30.11/24"
    if not _QUAD.fullmatch(address):
        raise _refuse("ip_address", text, "it is not four numbers with dots", remedy)
    prefix = _prefix("ip_address", text, number, 31) if slash else None
    if netmask is not None:
        mask_prefix = parse_netmask(netmask)
        if prefix is not None and prefix != mask_prefix:
            raise _refuse(
                "netmask", netmask, f"ip_address says /{prefix}, netmask says /{mask_prefix}", "Give one of the two"
            )
        prefix = _prefix("netmask", netmask, str(mask_prefix), 31)
    if prefix is None:
        raise _refuse(
            "ip_address", text, "its netmask is missing", "Give the prefix after the address, or the option netmask"
        )
    try:
        interface = ipaddress.IPv4Interface(f"{address}/{prefix}")
    except ValueError as error:
        raise _refuse("ip_address", text, str(error), remedy) from error
    check_host_address("ip_address", text, interface)
    return interface


def parse_ipv6(text: str) -> ipaddress.IPv6Interface:
    """``fd00:20::11/64``. :raises InputError: malformed, or no address that a host may have."""
    address, slash, number = text.partition("/")
    remedy = "Give an address of a host with its prefix, such as fd00:20::11/64"
    if not slash:
        raise _refuse("ipv6_addresses", text, "its prefix is missing", remedy)
    prefix = _prefix("ipv6_addresses", text, number, 127)
    try:
        interface = ipaddress.IPv6Interface(f"{address}/{prefix}")
    except ValueError as error:
        raise _refuse("ipv6_addresses", text, str(error), remedy) from error
    check_host_address("ipv6_addresses", text, interface)
    return interface


def check_host_address(option: str, text: str, interface: Any) -> None:
    """:raises InputError: it is the subnet's own address, its broadcast address, or one that no host may have."""
    network, address = interface.network, interface.ip
    reason = ""
    if (
        address.is_multicast
        or address.is_unspecified
        or address.is_link_local
        or (isinstance(address, ipaddress.IPv4Address) and (address.is_reserved or int(address) < 1 << 24))
    ):
        reason = "no host may have such an address"
    elif network.max_prefixlen - network.prefixlen > 1:
        if address == network.network_address:
            reason = f"it is the address of the subnet {network} itself"
        elif address.version == 4 and address == network.broadcast_address:
            reason = f"it is the broadcast address of the subnet {network}"
    if reason:
        raise _refuse(option, text, reason, "Give another address of the subnet, and check the netmask")


def parse_gateway(text: str) -> ipaddress.IPv4Address:
    """:raises InputError: it is not an IPv4 address of a host."""
    remedy = "Give an IPv4 address of a router"
    if not _QUAD.fullmatch(text):
        raise _refuse("gateway", text, "it is not four numbers with dots", remedy)
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError as error:
        raise _refuse("gateway", text, str(error), remedy) from error
    if address.is_multicast or address.is_unspecified or address.is_reserved or address.is_link_local:
        raise _refuse("gateway", text, "no router may have such an address", remedy)
    return address


# --- who is in one subnet -------------------------------------------------------------------------------------------


def shared(first: Sequence[Network], second: Sequence[Network]) -> Optional[Tuple[Network, Network]]:
    """The first two subnets, one of each side, that have addresses in common."""
    for one in first:
        for other in second:
            if one.version == other.version and one.overlaps(other):
                return one, other
    return None


def conflicts(
    subnets: Sequence[Network], stack: str, nics: Sequence[Nic], own_device: Optional[str] = None
) -> List[Nic]:
    """The NICs of the same TCP/IP stack that have an address in one of *subnets* (VADP facts 26).

    :param own_device: the NIC that *subnets* belong to, when it is there already.
    """
    return [
        nic
        for nic in nics
        if nic.device != own_device and nic.stack == stack and shared(subnets, nic.subnets) is not None
    ]


def shared_pairs(nics: Sequence[Nic]) -> List[Tuple[Nic, Nic]]:
    """Pairs of NICs of one stack in one subnet, whatever they are for."""
    return [
        (first, second)
        for index, first in enumerate(nics)
        for second in nics[index + 1 :]
        if first.stack == second.stack and shared(first.subnets, second.subnets) is not None
    ]


def may_share(first: Nic, second: Nic, iscsi: Sequence[str] = ()) -> Optional[str]:
    """Why two NICs may be in one subnet: iSCSI binding, multi-NIC vMotion, NSX; None if they may not.

    A NIC that carries backup traffic never may.

    :param iscsi: the NICs that are bound to an iSCSI adapter.
    """
    if first.tagged or second.tagged:
        return None
    if "vmotion" in first.services and "vmotion" in second.services:
        return "multi-NIC vMotion"
    if first.stack in NSX_STACKS:
        return "NSX tunnel endpoints"
    if first.device in iscsi and second.device in iscsi:
        return "iSCSI port binding"
    return None


NSX_STACKS = ("vxlan", "hyperbus")
