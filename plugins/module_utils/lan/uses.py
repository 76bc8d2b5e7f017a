# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a VMkernel NIC carries beside backup traffic: the one guard of all that changes or removes a NIC."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, List, Tuple

from ..errors import InputError
from ..vsphere.host_network import DEFAULT_STACK, HostNetwork, Nic, service_words
from ..vsphere.host_storage import HostStorage


def check(host: HostNetwork, nic: Nic, storage: HostStorage, change: str, why: str, force: bool) -> List[str]:
    """Refuse to change or remove a NIC that others use. -> what there is to warn of.

    What can't be known of a NIC that is tagged for backup alone is a warning; of any other NIC it counts as a use.

    :param change: ``changed`` or ``removed``.
    :param why: what is to be changed, in words; may be empty.
    :raises InputError: it carries more than backup traffic, and *force* was not given.
    """
    known, unknown = _uses(host, nic, storage)
    alone = nic.tagged and not known
    if not nic.tagged and change == "removed" and not known:
        known = ["it is not tagged for backup"]
    if not nic.tagged:
        known += unknown
    if not known:
        return [f"{host}: {nic.device} is {change}, and {text}." for text in unknown] if alone else []
    if force:
        return [f"{host}: {nic.device} is {change}, as force says, although {'; '.join(known)}."]
    raise InputError(
        f"The VMkernel NIC is not for backup traffic alone and is not {change}",
        subject=f"{nic} of {host}",
        reason="; ".join(known + ([why] if why else [])),
        remedy=f"Check what uses it; with force: true it is {change} all the same"
        + ("" if change == "removed" else f". To tag it only, give device: {nic.device} and no other setting"),
    )


def _uses(host: HostNetwork, nic: Nic, storage: HostStorage) -> Tuple[List[str], List[str]]:
    """(what else a NIC carries, what is not known of it), in words."""
    known = [f"it carries {service_words(nic.other_services)}"] if nic.other_services else []
    if nic.stack != DEFAULT_STACK:
        known.append(f"it is on the TCP/IP stack {nic.stack}")
    if nic.device in storage.bound:
        known.append(f"it is bound to the iSCSI adapter {storage.bound[nic.device]}")
    unknown = list(storage.unknown)
    if nic.stack != DEFAULT_STACK or not nic.subnets:
        return known, unknown
    for what, server in storage.servers:
        try:
            addresses = _resolve(server)
        except OSError:
            unknown.append(f"the server '{server}' of {what} can't be resolved here")
            continue
        way = next((text for text in (_way(host, nic, storage, address) for address in addresses) if text), "")
        if way:
            known.append(f"{what} reaches its server {server} {way}")
    return list(dict.fromkeys(known)), list(dict.fromkeys(unknown))


def _way(host: HostNetwork, nic: Nic, storage: HostStorage, address: Any) -> str:
    """How an address is reached over this NIC; empty if it is not."""

    def within(one: Nic, wanted: Any) -> bool:
        return one.stack == DEFAULT_STACK and any(wanted in subnet for subnet in one.subnets)

    if within(nic, address):
        return "in its subnet"
    if storage.gateway is None or any(within(one, address) for one in host.nics):
        return ""
    gateway = ipaddress.ip_address(storage.gateway)
    if gateway.version == address.version and within(nic, gateway):
        return f"through the gateway {gateway} in its subnet"
    return ""


def _resolve(server: str) -> List[Any]:
    """:raises OSError: the name is not known here."""
    text = server.strip("[]").partition("%")[0]
    try:
        return [ipaddress.ip_address(text)]
    except ValueError:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
