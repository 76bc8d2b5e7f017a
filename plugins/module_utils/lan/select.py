# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which VMkernel NIC of a host is meant. The options that name one are conditions, and all of them must hold.

A device and an address belong to one NIC: what has one of them and not the rest is refused, never taken. A port group
and a switch are places: who is at another place is not the one that is meant.
"""

from __future__ import annotations

import ipaddress
from typing import Iterable, List, Optional, Sequence, Set, Tuple

from ..errors import InputError
from ..vsphere.host_network import DEFAULT_STACK, HostNetwork, Nic
from .request import HostRequest

# (option, what is there, what is asked)
Difference = Tuple[str, str, str]


def words(differences: Sequence[Difference]) -> str:
    return "; ".join(f"{name} is {old}, not {new}" for name, old, new in differences)


def find_nic(host: HostNetwork, request: HostRequest) -> Optional[Nic]:
    """The NIC that is there already: by device, by address, or the backup NIC of the port group.

    Of a NIC that is to go, all that names it holds; one that is to be made may still differ from what is asked.

    :raises InputError: it can't be the backup NIC; or what names it belongs to several NICs.
    """
    if not request.present:
        return _find_absent(host, request)
    if request.device is not None:
        nic = host.nic(request.device)
        if nic is None:
            raise InputError(
                "There is no such VMkernel NIC",
                subject=f"{request.device} of {host}",
                reason=f"it has {', '.join(one.device for one in host.nics)}",
                remedy="Give one of them, or leave device out and give ip_address to make a new one",
            )
        return nic
    found = _with_address(host, request)
    if len(found) > 1:
        raise InputError(
            "The addresses belong to several VMkernel NICs",
            subject=str(host),
            reason=" and ".join(str(nic) for nic in found),
            remedy="Give addresses of one NIC",
        )
    return found[0] if found else _on_port_group(host, request)


def _with_address(host: HostNetwork, request: HostRequest) -> List[Nic]:
    """The NICs that have one of the addresses."""
    asked: Set[str] = {str(one.ip) for one in request.ipv6 or ()}
    if request.address is not None:
        asked.add(str(request.address.ip))
    return [nic for nic in host.nics if asked & {nic.ip, *(text.split("/")[0] for text in normal(nic.ipv6))}]


def normal(texts: Iterable[str]) -> List[str]:
    return sorted(str(ipaddress.IPv6Interface(text)) for text in texts)


def at_place(nic: Nic, request: HostRequest) -> bool:
    """Whether a NIC is on the switch that is asked for, if one is."""
    place = request.dvswitch or request.vswitch
    return place is None or (nic.switch == place and (nic.port_key is not None) == (request.dvswitch is not None))


def _alone(nic: Nic) -> bool:
    return nic.tagged and not nic.other_services and nic.stack == DEFAULT_STACK


def _on_port_group(host: HostNetwork, request: HostRequest) -> Optional[Nic]:
    """The NIC of the port group that carries backup traffic alone; with DHCP also one without any service."""
    there = [
        nic
        for nic in host.nics
        if request.portgroup is not None and nic.portgroup == request.portgroup and at_place(nic, request)
    ]
    ours = [nic for nic in there if _alone(nic)]
    if not ours and request.dhcp:
        ours = [nic for nic in there if nic.dhcp and not nic.services and nic.stack == DEFAULT_STACK]
    if len(ours) > 1:
        raise _several(host, request, ours)
    if ours:
        return ours[0]
    if there and there[0].port_key is None:
        raise InputError(
            "The port group has a VMkernel NIC already",
            subject=f"'{request.portgroup}' of {host}",
            reason=f"{there[0]}, and a port group of a standard switch takes one",
            remedy=f"Give another portgroup, or tag that NIC with device: {there[0].device}",
        )
    return None


def _several(host: HostNetwork, request: HostRequest, nics: Sequence[Nic]) -> InputError:
    return InputError(
        "More than one VMkernel NIC fits",
        subject=f"port group '{request.portgroup}' of {host}" if request.portgroup else str(host),
        reason=" and ".join(str(nic) for nic in nics),
        remedy="Name the one that is meant by device",
    )


# --- a NIC that is to go --------------------------------------------------------------------------------------------


def _find_absent(host: HostNetwork, request: HostRequest) -> Optional[Nic]:
    """The NIC that is all that was said of it, whatever it carries."""
    named = _with_address(host, request)
    named += [nic for nic in host.nics if nic.device == request.device and nic not in named]
    by_name = request.device is not None or request.address is not None or bool(request.ipv6)
    if not by_name:
        named = [nic for nic in host.nics if nic.portgroup == request.portgroup]
    fitting = [nic for nic in named if not _contradictions(nic, request)]
    if len(fitting) > 1:
        fitting = [nic for nic in fitting if _alone(nic)] or fitting
    if len(fitting) > 1:
        raise _several(host, request, fitting)
    if fitting:
        return fitting[0]
    # The name of a standard switch's port group is used once on a host, that of a distributed one may be elsewhere too.
    if named and (by_name or (request.vswitch is not None and named[0].port_key is None)):
        raise InputError(
            "The VMkernel NIC is another one than described",
            subject=f"{' and '.join(str(nic) for nic in named)} of {host}",
            reason=" and ".join(words(_contradictions(nic, request)) for nic in named),
            remedy="Correct the options that name it, or leave the wrong ones out; all of them must hold",
        )
    return None


def _contradictions(nic: Nic, request: HostRequest) -> List[Difference]:
    """What was said of a NIC that is to go, and does not hold of this one."""
    wrong = place_differences(nic, request)
    if request.device is not None and nic.device != request.device:
        wrong.append(("device", nic.device, request.device))
    if request.address is not None:
        have = (nic.ip, nic.ip if request.any_netmask else nic.netmask)
        asked = str(request.address.ip)
        if have != (asked, asked if request.any_netmask else str(request.address.netmask)):
            wrong.append(("ip_address", nic.address, asked if request.any_netmask else str(request.address)))
    if request.dhcp and not nic.dhcp:
        wrong.append(("dhcp", "no", "yes"))
    missing = [str(one) for one in request.ipv6 or () if str(one) not in normal(nic.ipv6)]
    if missing:
        wrong.append(("ipv6_addresses", ", ".join(nic.ipv6) or "none", ", ".join(missing)))
    return wrong


def place_differences(nic: Nic, request: HostRequest) -> List[Difference]:
    """Where a NIC is elsewhere than asked."""
    differences = []
    if not at_place(nic, request):
        option = "dvswitch" if request.dvswitch else "vswitch"
        kind = "the distributed " if nic.port_key is not None and request.vswitch else ""
        differences.append((option, f"{kind}{nic.switch}", request.dvswitch or request.vswitch or ""))
    if request.portgroup is not None and nic.portgroup != request.portgroup:
        differences.append(("portgroup", nic.portgroup, request.portgroup))
    return differences
