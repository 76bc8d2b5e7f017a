# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The address plan of a backup LAN: which host gets which address. Pure, and the same for the same facts.

Nothing is kept anywhere: what a host has already is read from the host, and stays. So a host that is added never moves
another one.
"""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..errors import InputError

Range = Tuple[int, int]

_OF_THE_PLAN = ("esxi_hostname", "ip_address", "netmask", "dhcp")


def parse_subnet(text: str) -> Any:
    """``10.20.30.0/24``. :raises InputError: it is not a subnet, or has no room for a proxy and a host."""
    remedy = "Give a subnet with its prefix, such as 10.20.30.0/24"
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        reason = str(error)
        with contextlib.suppress(ValueError):
            reason = f"it is an address in {ipaddress.IPv4Interface(text).network}, not a subnet"
        raise InputError("The subnet can't be used", subject=repr(text), reason=reason, remedy=remedy) from error
    if "/" not in text or network.prefixlen > 30:
        raise InputError(
            "The subnet can't be used",
            subject=repr(text),
            reason="it has no room for a proxy and a host",
            remedy=remedy,
        )
    return network


def parse_range(option: str, text: str, subnet: Any) -> Range:
    """First and last address of ``10.20.30.11-10.20.30.60``, ``10.20.30.64/26`` or a single address.

    :raises InputError: malformed, or not in *subnet*.
    """
    words = [word.strip() for word in text.split("-")]
    try:
        if len(words) == 2:
            first, last = (int(ipaddress.IPv4Address(word)) for word in words)
        else:
            network = ipaddress.IPv4Network(text.strip())
            first, last = int(network.network_address), int(network.broadcast_address)
    except ValueError as error:
        raise InputError(
            f"The option {option} can't be used",
            subject=repr(text),
            reason=str(error),
            remedy="Give addresses, ranges such as 10.20.30.11-10.20.30.60, or subnets such as 10.20.30.64/26",
        ) from error
    if first > last:
        raise InputError(
            f"The option {option} can't be used",
            subject=repr(text),
            reason="its last address is before its first",
            remedy="Give the lower address first",
        )
    if first < int(subnet.network_address) or last > int(subnet.broadcast_address):
        raise InputError(
            f"The option {option} can't be used",
            subject=repr(text),
            reason=f"it is not within the subnet {subnet}",
            remedy="Give addresses of the subnet",
        )
    return first, last


def parse_address(option: str, text: str, subnet: Any) -> Any:
    """An address that a host of *subnet* may have. :raises InputError: it is none."""
    first, last = parse_range(option, text, subnet)
    address = ipaddress.IPv4Address(first)
    reason = ""
    if first != last:
        reason = "it is more than one address"
    elif address == subnet.network_address:
        reason = f"it is the address of the subnet {subnet} itself"
    elif address == subnet.broadcast_address:
        reason = f"it is the broadcast address of the subnet {subnet}"
    if reason:
        raise InputError(
            f"The option {option} can't be used", subject=repr(text), reason=reason, remedy="Give an address of a host"
        )
    return address


class _Plan:
    """Who has which address so far; refuses the second holder of one."""

    def __init__(
        self, subnet: Any, reserved: Mapping[Any, str], excluded: Sequence[Range], existing: Mapping[str, Any]
    ) -> None:
        self.subnet = subnet
        self.reserved = reserved
        self.excluded = excluded
        self.now = {address: host for host, address in existing.items()}
        self.holders: Dict[Any, str] = {}
        self.addresses: Dict[str, Any] = {}

    def give(self, host: str, address: Any) -> None:
        self.addresses[host] = address
        self.holders[address] = host

    def objection(self, host: str, address: Any) -> Optional[str]:
        """Why *host* can't have *address*; None if it can."""
        if address in (self.subnet.network_address, self.subnet.broadcast_address):
            return f"it is the network or broadcast address of {self.subnet}"
        if address in self.reserved:
            return f"it is {self.reserved[address]}"
        if any(first <= int(address) <= last for first, last in self.excluded):
            return "it is excluded"
        holder = self.holders.get(address)
        if holder not in (None, host):
            return f"host '{holder}' has it"
        # A host that moves has its old address until it has moved, and hosts are configured side by side.
        now = self.now.get(address)
        return f"host '{now}' still has it" if now not in (None, host) else None


def plan_addresses(
    subnet: Any,
    hosts: Sequence[str],
    fixed: Mapping[str, Any],
    existing: Mapping[str, Any],
    pool: Sequence[Range] = (),
    excluded: Sequence[Range] = (),
    reserved: Optional[Mapping[Any, str]] = None,
) -> Dict[str, str]:
    """An address for each host, in the order of *hosts*.

    What is fixed counts first, then what a host has; the others get the lowest free addresses of the pool, in their
    order. Nobody gets what another host has now, though that one be about to move.

    :param existing: what hosts have in this subnet now, of NICs that are for backup traffic.
    :param pool: where new addresses come from; empty: the whole subnet.
    :param excluded: never given to a host.
    :param reserved: addresses of others, each with whose it is (the gateway, the proxy, another NIC).
    :raises InputError: two holders of one address, one that can't be, or too few addresses.
    """
    plan = _Plan(subnet, reserved or {}, excluded, existing)
    _check_hosts(hosts, fixed)
    for host in hosts:
        if host in fixed:
            objection = plan.objection(host, fixed[host])
            if objection:
                raise InputError(
                    "An address of the plan can't be used",
                    subject=f"{fixed[host]} of host '{host}'",
                    reason=objection,
                    remedy="Give the host another address, or leave it to the pool",
                )
            plan.give(host, fixed[host])
    for host in hosts:
        if host in existing and host not in plan.addresses:
            objection = plan.objection(host, existing[host])
            if objection:
                raise InputError(
                    "A host has an address that it can't keep",
                    subject=f"{existing[host]} of host '{host}'",
                    reason=objection,
                    remedy="Give that host a fixed address of its own to move it, or change the plan",
                )
            plan.give(host, existing[host])
    _fill(plan, hosts, pool or [(int(subnet.network_address), int(subnet.broadcast_address))])
    return {host: str(plan.addresses[host]) for host in hosts}


def _check_hosts(hosts: Sequence[str], fixed: Mapping[str, Any]) -> None:
    if not hosts:
        raise InputError("No host is named", remedy="Give hosts or clusters")
    seen: Dict[str, str] = {}
    for host in hosts:
        if host.lower() in seen:
            raise InputError("A host is named twice", subject=f"'{host}'", remedy="Give each host once")
        seen[host.lower()] = host
    strangers = [host for host in fixed if host not in hosts]
    if strangers:
        raise InputError(
            "An address is given to a host that is not among the hosts",
            subject=", ".join(f"'{host}'" for host in strangers),
            remedy="Check the spelling, or leave the address out",
        )


def _fill(plan: _Plan, hosts: Sequence[str], pool: Sequence[Range]) -> None:
    wanting = [host for host in hosts if host not in plan.addresses]
    free = iter(_free(plan, pool))
    for index, host in enumerate(wanting):
        address = next(free, None)
        if address is None:
            left = wanting[index:]
            raise InputError(
                "The pool is too small",
                subject=f"{len(wanting)} hosts need a new address, {index} are free",
                reason=f"{len(left)} missing, for {_some(left)}",
                remedy="Widen the pool or the subnet, or exclude less",
            )
        plan.give(host, address)


def _free(plan: _Plan, pool: Sequence[Range]) -> Any:
    """The addresses of the pool that nobody has, the lowest first."""
    end = -1
    for first, last in sorted(pool):
        for number in range(max(first, end + 1), last + 1):
            address = ipaddress.IPv4Address(number)
            if plan.objection("", address) is None:
                yield address
        end = max(end, last)


def _some(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# --- from what the hosts have now -----------------------------------------------------------------------------------


def choose_hosts(facts: Sequence[Mapping[str, Any]], names: Sequence[str], clusters: Sequence[str]) -> List[str]:
    """The hosts of these names, as vCenter has them, then those of the clusters by name; each once.

    :param facts: ``hosts`` of module vmkernel_backup_nic_info.
    :raises InputError: a host or a cluster is not there.
    """
    chosen: List[str] = []
    by_name = {fact["name"].lower(): fact["name"] for fact in facts}
    for name in names:
        if name.lower() not in by_name:
            raise InputError(
                "There is no such host",
                subject=f"'{name}'",
                remedy="Give the name or address under which the host is in vCenter's inventory",
            )
        chosen.append(by_name[name.lower()])
    for cluster in clusters:
        members = sorted(fact["name"] for fact in facts if fact.get("cluster") == cluster)
        homes = sorted({str(fact.get("datacenter")) for fact in facts if fact.get("cluster") == cluster})
        if len(homes) > 1:
            raise InputError(
                "More than one cluster fits",
                subject=f"'{cluster}'",
                reason=f"there is one in each of {', '.join(homes)}",
                remedy="Give the datacenter, or name the hosts",
            )
        if not members:
            known = sorted({fact["cluster"] for fact in facts if fact.get("cluster")})
            raise InputError(
                "There is no such cluster, or no host is in it",
                subject=f"'{cluster}'",
                reason=f"there are {', '.join(known) or 'none'}",
                remedy="Check the spelling",
            )
        chosen += [member for member in members if member not in chosen]
    return chosen


def occupied(
    facts: Sequence[Mapping[str, Any]],
    hosts: Sequence[str],
    subnet: Any,
    portgroup: Optional[str],
    fixed: Mapping[str, Any],
) -> Tuple[Dict[str, Any], Dict[Any, str]]:
    """(what the hosts have in *subnet* for backup traffic, what other NICs there have, each with whose it is).

    A NIC is for backup traffic if it is tagged for it, on the backup port group, or has the address that is fixed for
    its host: such a NIC is taken, not doubled. Of a host that does not answer, services are not known (None): what it
    has in the subnet is its own, which it keeps.
    """
    existing: Dict[str, Any] = {}
    others: Dict[Any, str] = {}
    for fact in facts:
        # Of several, the tagged one is kept; of a host that is away, the one on the port group.
        for nic in sorted(fact["nics"], key=lambda one: (not _tagged(one), not _on(one, portgroup))):
            if not nic.get("ip"):
                continue
            address = ipaddress.IPv4Address(nic["ip"])
            if address not in subnet:
                continue
            name = fact["name"]
            ours = _tagged(nic) or _on(nic, portgroup) or nic.get("services", ()) is None
            if fixed.get(name) == address:
                continue
            if ours and name in hosts and name not in existing:
                existing[name] = address
            else:
                others[address] = f"{nic['device']}'s of host '{name}'"
    return existing, others


def _on(nic: Mapping[str, Any], portgroup: Optional[str]) -> bool:
    return portgroup is not None and nic.get("portgroup") == portgroup


def _tagged(nic: Mapping[str, Any]) -> bool:
    return "vSphereBackupNFC" in (nic.get("services") or ())


def backup_lan_hosts(facts: Sequence[Mapping[str, Any]], lan: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """The list ``hosts`` of module vmkernel_backup_nic, and nothing of it decided by chance.

    :param facts: ``hosts`` of module vmkernel_backup_nic_info, of the whole vCenter.
    :param lan: ``subnet``; ``hosts``, ``clusters``; ``addresses`` (by host), ``pool``, ``exclude``, ``gateway``,
        ``proxies`` (their addresses), ``portgroup``, ``host_options`` (options of single hosts); ``datacenter`` (the
        hosts are in it), ``address_scope`` (``datacenter``: what hosts of other datacenters have does not matter).
    :raises InputError: the description makes no sense.
    """
    subnet = parse_subnet(str(lan["subnet"]))
    inside = facts
    if lan.get("datacenter"):
        inside = [fact for fact in facts if fact.get("datacenter") == lan["datacenter"]]
    hosts = choose_hosts(inside, lan.get("hosts") or (), lan.get("clusters") or ())
    names = {host.lower(): host for host in hosts}

    def known(mapping: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
        return {names.get(host.lower(), host): value for host, value in (mapping or {}).items()}

    fixed = {
        host: parse_address(f"addresses of '{host}'", str(text), subnet)
        for host, text in known(lan.get("addresses")).items()
    }
    options = known(lan.get("host_options"))
    strangers = [host for host in options if host not in hosts]
    if strangers:
        raise InputError(
            "Options are given to a host that is not among the hosts",
            subject=", ".join(f"'{one}'" for one in strangers),
            remedy="Check the spelling, or leave the options out",
        )
    for host, own in options.items():
        wrong = [name for name in _OF_THE_PLAN if name in own]
        if wrong:
            raise InputError(
                "The plan's own options are given to a host",
                subject=f"{', '.join(wrong)} of '{host}'",
                reason="the address comes from the plan",
                remedy="Give the host's address in addresses, or leave these out",
            )
    if lan.get("address_scope") == "datacenter":
        homes = {fact.get("datacenter") for fact in facts if fact["name"] in hosts}
        # A host whose datacenter is not known may be in any.
        facts = [fact for fact in facts if None in homes or fact.get("datacenter") in {None, *homes}]
    existing, reserved = occupied(facts, hosts, subnet, lan.get("portgroup"), fixed)
    if lan.get("gateway"):
        reserved[parse_address("gateway", str(lan["gateway"]), subnet)] = "the gateway's"
    for text in lan.get("proxies") or ():
        address = ipaddress.IPv4Address(str(text).partition("/")[0])
        if address in subnet:
            reserved[parse_address("proxies", str(address), subnet)] = "a proxy's"
    planned = plan_addresses(
        subnet,
        hosts,
        fixed,
        existing,
        pool=[parse_range("pool", str(text), subnet) for text in lan.get("pool") or ()],
        excluded=[parse_range("exclude", str(text), subnet) for text in lan.get("exclude") or ()],
        reserved=reserved,
    )
    return [
        {**(options.get(host) or {}), "esxi_hostname": host, "ip_address": f"{planned[host]}/{subnet.prefixlen}"}
        for host in hosts
    ]
