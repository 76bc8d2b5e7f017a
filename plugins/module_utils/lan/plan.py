# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From what a host has and what is asked to the steps between the two; nothing here touches anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple, TypeVar

from ..errors import InputError, VsphereError
from ..vsphere.dvswitch import DvPortGroup, DvSwitch
from ..vsphere.host_network import BACKUP_SERVICE, DEFAULT_STACK, HostNetwork, Nic, PortGroup, Switch, service_words
from ..vsphere.host_storage import HostStorage
from . import uses
from .request import HostRequest
from .select import Difference, find_nic, normal, place_differences, words
from .subnets import Network, conflicts, shared

T = TypeVar("T")


def sure(value: Optional[T]) -> T:
    """The value itself, which is there wherever a step is planned that needs it."""
    if value is None:
        raise AssertionError("a step lacks what it was planned with")
    return value


@dataclass(frozen=True)
class Target:
    """How the NIC should be: what is made, or what an existing one gets. None is left as it is."""

    dhcp: bool = False
    ip: Optional[str] = None
    netmask: Optional[str] = None
    ipv6: Optional[Tuple[str, ...]] = None
    mtu: Optional[int] = None
    gateway: Optional[str] = None


@dataclass(frozen=True)
class Step:
    """One call that changes a host.

    ``kind`` is add_switch, add_port_group, add_nic, update_nic, await_lease, select or remove_nic.
    """

    kind: str
    switch: Optional[Switch] = None
    port_group: Optional[PortGroup] = None
    target: Target = Target()
    nic: Optional[Nic] = None


@dataclass
class Plan:
    """What will be done on a host.

    ``nic`` is the NIC that is there already; ``made_port_group`` is a distributed port group that must be made
    first, for all hosts at once. ``before`` and ``after`` are lines in the words of the options; ``address_check`` says
    whether the address was looked for on the segment.
    """

    host: HostNetwork
    request: HostRequest
    steps: List[Step] = field(default_factory=list)
    nic: Optional[Nic] = None
    dv_switch: Optional[DvSwitch] = None
    dv_port_group: Optional[DvPortGroup] = None
    made_port_group: Optional[str] = None
    before: List[str] = field(default_factory=list)
    after: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    expected: Optional[Nic] = None
    address_check: Optional[str] = None

    @property
    def changes(self) -> bool:
        return bool(self.steps)


@dataclass
class World:
    """What the hosts of the whole inventory have, beside the host in question.

    :param addresses: address -> (moid of the host, its name, device).
    :param dv_switches: name -> the distributed switches of that name, in whichever datacenter.
    :param datacenters: moid of a host -> its datacenter, where addresses are unique in a datacenter only.
    :param beside: what is in a distributed switch's folder, by name; only asked for where a port group is to be made.
    :param storage: what of a host's storage goes over its NICs; only asked for where a NIC is changed or removed.
    """

    addresses: Dict[str, List[Tuple[str, str, str]]] = field(default_factory=dict)
    dv_switches: Dict[str, List[DvSwitch]] = field(default_factory=dict)
    dv_port_groups: Dict[str, DvPortGroup] = field(default_factory=dict)
    datacenters: Dict[str, str] = field(default_factory=dict)
    beside: Callable[[DvSwitch], Dict[str, str]] = field(default=lambda _switch: {})
    storage: Callable[[HostNetwork], HostStorage] = field(default=lambda _host: HostStorage())

    def add_host(self, host: HostNetwork) -> None:
        for nic in host.nics:
            for address in [nic.ip, *(text.split("/")[0] for text in nic.ipv6)]:
                if address:
                    self.addresses.setdefault(address, []).append((host.moid, host.name, nic.device))

    def elsewhere(self, host: HostNetwork, address: str) -> Optional[Tuple[str, str]]:
        """(host, device) that has an address, if it is another host's."""
        own = self.datacenters.get(host.moid)
        return next(
            (
                (name, device)
                for moid, name, device in self.addresses.get(address, ())
                if moid != host.moid and self.datacenters.get(moid) == own
            ),
            None,
        )


def make_plan(host: HostNetwork, request: HostRequest, world: World) -> Plan:
    """The steps for one host.

    :raises InputError: what is asked can't be, or must not be; :raises VsphereError: the host can't do it.
    """
    if not host.connected:
        raise VsphereError(
            "The host does not answer",
            subject=str(host),
            reason="it is not connected to vCenter",
            remedy="Look at it in the vSphere client, then run again",
            retryable=True,
        )
    plan = Plan(host, request)
    if not request.present:
        return _absent(plan, world)
    if BACKUP_SERVICE not in host.service_types:
        raise VsphereError(
            "The host has no service for backup traffic",
            subject=str(host),
            reason=f"it runs ESXi {host.version}; the service type {BACKUP_SERVICE} came with ESXi 7.0",
            remedy="Update the host; until then backup traffic uses the management NIC, whatever other NICs there are",
        )
    _check_addresses(plan, world)
    plan.nic = find_nic(host, request)
    _check_dv(plan, world)
    if plan.nic is not None:
        _adopt(plan, plan.nic, world)
    else:
        _create(plan, world)
    _warn(plan)
    _words(plan)
    return plan


# --- an existing NIC ------------------------------------------------------------------------------------------------


def _different(nic: Nic, request: HostRequest) -> List[Difference]:
    """Where what is there and what is asked differ."""
    differences = place_differences(nic, request)
    if request.dhcp and not nic.dhcp:
        differences.append(("dhcp", "no", "yes"))
    if request.address is not None and (
        nic.dhcp or (nic.ip, nic.netmask) != (str(request.address.ip), str(request.address.netmask))
    ):
        differences.append(("ip_address", f"{nic.address}{' by DHCP' if nic.dhcp else ''}", str(request.address)))
    if request.ipv6 is not None and normal(nic.ipv6) != normal(str(one) for one in request.ipv6):
        differences.append(
            ("ipv6_addresses", ", ".join(nic.ipv6) or "none", ", ".join(str(one) for one in request.ipv6) or "none")
        )
    if request.gateway is not None and nic.gateway != str(request.gateway):
        differences.append(("gateway", nic.gateway or "the stack's", str(request.gateway)))
    if request.no_gateway and nic.gateway is not None:
        differences.append(("gateway", nic.gateway, "the stack's"))
    if request.mtu is not None and nic.mtu != request.mtu:
        differences.append(("mtu", str(nic.mtu), str(request.mtu)))
    return differences


def _adopt(plan: Plan, nic: Nic, world: World) -> None:
    """Steps for a NIC that is there: what differs is changed, and the tag selected if it is not."""
    request, host = plan.request, plan.host
    if nic.stack != DEFAULT_STACK:
        raise InputError(
            "The VMkernel NIC can't carry backup traffic",
            subject=f"{nic} of {host}",
            reason=f"it is on the TCP/IP stack {nic.stack}; only the default stack can",
            remedy="Give another NIC, or let a new one be made",
        )
    differences = _different(nic, request)
    told = words(differences)
    if differences and request.device is not None:
        raise InputError(
            "The VMkernel NIC is another one than described",
            subject=f"{nic} of {host}",
            reason=f"{told}; with device a NIC is tagged, and nothing else of it is changed",
            remedy="Leave those options out, or leave device out",
        )
    moves = [one for one in differences if one[0] in ("vswitch", "dvswitch", "portgroup")]
    if moves:
        raise InputError(
            "The address belongs to a VMkernel NIC elsewhere",
            subject=f"{nic} of {host}",
            reason=told,
            remedy=f"Give its own port group, or only device: {nic.device}; or remove it first (state: absent)",
        )
    expected = _after(nic, request)
    if differences:
        _check_host_stays(plan, nic, expected)
        plan.warnings += uses.check(host, nic, world.storage(host), "changed", told, request.force)
        plan.steps.append(Step("update_nic", nic=nic, target=_target(request)))
        if request.dhcp and not nic.dhcp:
            plan.steps.append(Step("await_lease", nic=nic))
    if not nic.tagged:
        plan.steps.append(Step("select", nic=nic))
    plan.expected = expected
    _guard(plan, expected)


def _target(request: HostRequest) -> Target:
    return Target(
        dhcp=request.dhcp,
        ip=str(request.address.ip) if request.address else None,
        netmask=str(request.address.netmask) if request.address else None,
        ipv6=None if request.ipv6 is None else tuple(str(one) for one in request.ipv6),
        mtu=request.mtu,
        gateway="" if request.no_gateway else str(request.gateway) if request.gateway else None,
    )


def _check_host_stays(plan: Plan, nic: Nic, expected: Nic) -> None:
    """:raises InputError: the host would not be reached at its address any more."""
    if _last_management(plan.host, nic) and (nic.dhcp, nic.ip) != (expected.dhcp, expected.ip):
        raise InputError(
            "The last management NIC keeps its address",
            subject=f"{nic} of {plan.host}",
            reason="the host could no longer be reached",
            remedy="Change it at the host's console",
        )


def _last_management(host: HostNetwork, nic: Nic) -> bool:
    return [one.device for one in host.nics if "management" in one.services] == [nic.device]


def _after(nic: Nic, request: HostRequest) -> Nic:
    """How the NIC will be."""
    dhcp, ip, netmask = nic.dhcp, nic.ip, nic.netmask
    if request.address is not None:
        dhcp, ip, netmask = False, str(request.address.ip), str(request.address.netmask)
    elif request.dhcp and not nic.dhcp:
        dhcp, ip, netmask = True, None, None
    return Nic(
        device=nic.device,
        portgroup=nic.portgroup,
        switch=nic.switch,
        port_key=nic.port_key,
        vlan_id=nic.vlan_id,
        dhcp=dhcp,
        ip=ip,
        netmask=netmask,
        ipv6=nic.ipv6 if request.ipv6 is None else tuple(str(one) for one in request.ipv6),
        mtu=request.mtu or nic.mtu,
        stack=nic.stack,
        gateway=None if request.no_gateway else str(request.gateway) if request.gateway else nic.gateway,
        services=nic.services if nic.tagged else (*nic.services, BACKUP_SERVICE),
    )


# --- a new NIC ------------------------------------------------------------------------------------------------------


def _check_dv(plan: Plan, world: World) -> None:
    """:raises InputError: the host is not a member of the distributed switch, or the port group is one of uplinks."""
    request, host = plan.request, plan.host
    if request.dvswitch is None:
        return
    candidates = world.dv_switches[request.dvswitch]
    # A name is unique in a folder only; of several switches, the one that the host is a member of is meant.
    fitting = [switch for switch in candidates if any(one.uuid == switch.uuid for one in host.switches)]
    if not fitting:
        raise InputError(
            "The host is not a member of the distributed switch",
            subject=f"{host}, {' and '.join(str(switch) for switch in candidates)}",
            remedy="Add the host to the switch with its uplinks first, or use a standard switch (vswitch)",
        )
    if len(fitting) > 1:
        raise InputError(
            "The host is a member of two distributed switches of that name",
            subject=f"{host}, {' and '.join(str(switch) for switch in fitting)}",
            remedy="Rename one of them",
        )
    plan.dv_switch = fitting[0]
    for group in world.dv_port_groups.values():
        if group.switch_moid == plan.dv_switch.moid and group.name == request.portgroup:
            plan.dv_port_group = group
    if plan.dv_port_group is not None and plan.dv_port_group.uplink:
        raise InputError(
            "The port group is the one of the uplinks",
            subject=f"'{request.portgroup}' of {plan.dv_switch}",
            remedy="Give another name; a port group that is missing is made",
        )


def _create(plan: Plan, world: World) -> None:
    request, host = plan.request, plan.host
    if request.portgroup is None:
        raise InputError(
            "The port group is not named",
            subject=str(host),
            reason="there is no VMkernel NIC with that address yet, and a new one needs a port group",
            remedy="Give portgroup, and vswitch or dvswitch",
        )
    vlan_id: Optional[int]
    if plan.dv_switch is not None:
        switch = plan.dv_switch.name
        if plan.dv_port_group is None:
            _check_name(plan.dv_switch, request.portgroup, world)
            plan.made_port_group, vlan_id = request.portgroup, request.vlan_id or 0
        else:
            vlan_id = plan.dv_port_group.vlan_id
    else:
        switch, vlan_id = _standard_place(plan, request.portgroup)
    target = _target(request)
    plan.expected = Nic(
        device=_next_device(host),
        portgroup=request.portgroup,
        switch=switch,
        vlan_id=vlan_id,
        dhcp=target.dhcp,
        ip=target.ip,
        netmask=target.netmask,
        ipv6=target.ipv6 or (),
        mtu=target.mtu or 1500,
        gateway=target.gateway or None,
        services=(BACKUP_SERVICE,),
    )
    _guard(plan, plan.expected)
    plan.steps.append(Step("add_nic", target=target))
    if request.dhcp:
        plan.steps.append(Step("await_lease"))
    plan.steps.append(Step("select"))


def _check_name(switch: DvSwitch, name: str, world: World) -> None:
    """:raises InputError: vCenter would refuse the port group, as something else in its folder has the name."""
    holder = world.beside(switch).get(name)
    if holder is not None:
        raise InputError(
            "The name of the port group is taken",
            subject=f"'{name}' of {switch}",
            reason=f"{holder} has it, in the folder of the switch",
            remedy="Give another portgroup, or the switch that has that one",
        )


def _next_device(host: HostNetwork) -> str:
    """The name that ESXi gives to the next NIC: the first that is free."""
    taken = {nic.device for nic in host.nics}
    number = 0
    while f"vmk{number}" in taken:
        number += 1
    return f"vmk{number}"


def _standard_place(plan: Plan, name: str) -> Tuple[str, int]:
    """(switch, VLAN) of the port group on a standard switch; steps that make what is missing."""
    request, host = plan.request, plan.host
    group = host.port_group(name)
    wanted = request.vswitch or (group.switch if group is not None else None)
    if wanted is None:
        raise InputError(
            "There is no such port group",
            subject=f"'{name}' of {host}",
            remedy="Give vswitch or dvswitch, on which it is made",
        )
    if group is not None and group.switch != wanted:
        raise InputError(
            "The port group is on another switch",
            subject=f"'{name}' of {host}",
            reason=f"it is on '{group.switch}', not on '{wanted}'",
            remedy="Give that switch, or another name for the port group",
        )
    switch = host.switch(wanted)
    if switch is None:
        _new_switch(plan, wanted)
    elif request.uplinks is not None and set(request.uplinks) != set(switch.uplinks):
        plan.warnings.append(
            f"{host}: the uplinks of '{wanted}' are {', '.join(switch.uplinks) or 'none'}, not "
            f"{', '.join(request.uplinks)}; those of an existing switch are not changed."
        )
    if group is None:
        group = PortGroup(name, wanted, request.vlan_id or 0)
        plan.steps.append(Step("add_port_group", port_group=group))
    return wanted, group.vlan_id


def _new_switch(plan: Plan, name: str) -> None:
    """:raises InputError: the switch is unknown and may not be made, or its uplinks can't be had."""
    request, host = plan.request, plan.host
    if host.switch(name, distributed=True) is not None:
        raise InputError("The switch is a distributed one", subject=f"'{name}' of {host}", remedy="Give it as dvswitch")
    if request.uplinks is None:
        names = ", ".join(one.name for one in host.switches if not one.uuid)
        raise InputError(
            "There is no such switch",
            subject=f"'{name}' of {host}",
            reason=f"it has {names or 'none'}",
            remedy="Check the spelling, or give uplinks with which it is made",
        )
    if len(name) > 32:
        raise InputError("The switch's name is too long", subject=f"'{name}'", remedy="Give at most 32 characters")
    for uplink in request.uplinks:
        if uplink not in host.uplinks:
            raise InputError(
                "There is no such uplink",
                subject=f"{uplink} of {host}",
                reason=f"it has {', '.join(host.uplinks) or 'none'}",
                remedy="Give physical NICs of the host",
            )
        used = next((one.name for one in host.switches if uplink in one.uplinks), None)
        if used is not None:
            raise InputError(
                "The uplink is in use elsewhere",
                subject=f"{uplink} of {host}",
                reason=f"switch '{used}' has it",
                remedy="Give a free one, or use that switch",
            )
    mtu = max(1500, request.mtu or 1500)
    plan.steps.append(Step("add_switch", switch=Switch(name, min(mtu, 9000), request.uplinks)))


# --- the guards -----------------------------------------------------------------------------------------------------


def subnet_refusal(host: HostNetwork, own: Nic, others: Sequence[Nic], new: bool) -> InputError:
    """Two NICs of one stack in one subnet: the message that names both, why that breaks, and what to do."""
    both = shared(own.subnets, others[0].subnets)
    subnet = str(both[0]) if both else own.address
    name = f"the new backup NIC ({own.address}, port group '{own.portgroup}')" if new else str(own)
    remedy = "Give the backup NIC a subnet, and best a VLAN, of its own"
    if new and others[0].stack == DEFAULT_STACK:
        remedy += f"; or tag the NIC that is there (device: {others[0].device}) if it shares its subnet with no other"
    return InputError(
        "Two VMkernel NICs in one subnet",
        subject=f"{host}: {name} and {' and '.join(str(one) for one in others)}",
        reason=f"both are in {subnet}, where one routing table picks either of them for what is sent; "
        "backups then fail with NFC_NETWORK_ERROR or NBD_ERR_NETWORK_CONNECT (2338)",
        remedy=f"{remedy}. allow_shared_subnet: true makes it anyway",
    )


def _guard(plan: Plan, own: Nic) -> None:
    """:raises InputError: another NIC of the stack is in the subnet, and that is not allowed."""
    others = conflicts(own.subnets, own.stack, plan.host.nics, own.device)
    if not others:
        return
    refusal = subnet_refusal(plan.host, own, others, plan.nic is None)
    if not plan.request.allow_shared_subnet:
        raise refusal
    plan.warnings.append(f"{refusal.what}, as allowed: {refusal.subject}: {refusal.reason}.")


def _check_addresses(plan: Plan, world: World) -> None:
    """:raises InputError: an address is another host's."""
    addresses = [str(plan.request.address.ip)] if plan.request.address else []
    addresses += [str(one.ip) for one in plan.request.ipv6 or ()]
    for address in addresses:
        owner = world.elsewhere(plan.host, address)
        if owner is not None:
            raise InputError(
                "The address is another host's",
                subject=f"{address} for {plan.host}",
                reason=f"{owner[1]} of host '{owner[0]}' has it",
                remedy="Give an address that is free",
            )


def _warn(plan: Plan) -> None:
    """What is not an error and rarely meant: MTU above the switch's, another VLAN, a gateway outside."""
    request, host, nic = plan.request, plan.host, sure(plan.expected)
    made = [step.switch for step in plan.steps if step.switch is not None]
    switch = made[0] if made else host.switch(nic.switch) or host.switch(nic.switch, distributed=True)
    if switch is not None and nic.mtu > switch.mtu:
        plan.warnings.append(
            f"{host}: the NIC's MTU {nic.mtu} exceeds {switch.mtu}, that of switch '{nic.switch}'; "
            "larger packets will be lost. Raise the switch's MTU, and that of the physical network."
        )
    if request.vlan_id is not None and nic.vlan_id != request.vlan_id:
        have = "no single VLAN" if nic.vlan_id is None else f"VLAN {nic.vlan_id}"
        plan.warnings.append(
            f"{host}: port group '{nic.portgroup}' has {have}, not {request.vlan_id}; an existing one is not changed, "
            "as others may use it."
        )
    second = [one for one in host.tagged if one.device != nic.device]
    if second:
        plan.warnings.append(
            f"{host}: {' and '.join(str(one) for one in second)} carries backup traffic already; vCenter hands the "
            "proxy the address of either."
        )
    gateway = request.gateway
    subnets: List[Network] = [one for one in nic.subnets if one.version == 4]
    if gateway is not None and subnets and not any(gateway in one for one in subnets):
        plan.warnings.append(
            f"{host}: the gateway {gateway} is outside {subnets[0]}, the NIC's subnet; nothing can reach it from there."
        )


# --- absent ---------------------------------------------------------------------------------------------------------


def _absent(plan: Plan, world: World) -> Plan:
    """:raises InputError: the NIC must not go."""
    host, request = plan.host, plan.request
    nic = plan.nic = find_nic(host, request)
    if nic is None:
        plan.before, plan.after = ["VMkernel NIC: none"], ["VMkernel NIC: none"]
        return plan
    if _last_management(host, nic):
        raise InputError(
            "The last management NIC is not removed",
            subject=f"{nic} of {host}",
            reason="the host could no longer be reached",
            remedy="Take the backup tag off it in the vSphere client, if that is what is meant",
        )
    plan.warnings += uses.check(host, nic, world.storage(host), "removed", "", request.force)
    plan.steps.append(Step("remove_nic", nic=nic))
    plan.before, plan.after = nic_words(nic), ["VMkernel NIC: none"]
    return plan


# --- words ----------------------------------------------------------------------------------------------------------


def nic_words(nic: Nic, new: bool = False) -> List[str]:
    """A NIC in the words of the options."""
    lines = [
        f"device: {nic.device}{' (expected)' if new else ''}",
        f"switch: {nic.switch}",
        f"portgroup: {nic.portgroup}" + ("" if nic.vlan_id is None else f" (VLAN {nic.vlan_id})"),
    ]
    if nic.dhcp:
        lines.append("dhcp: true")
    if nic.ip and not nic.dhcp:
        lines += [f"ip_address: {nic.ip}", f"netmask: {nic.netmask}"]
    if nic.ipv6:
        lines.append(f"ipv6_addresses: {', '.join(nic.ipv6)}")
    if nic.gateway:
        lines.append(f"gateway: {nic.gateway}")
    return [*lines, f"mtu: {nic.mtu}", f"services: {service_words(nic.services)}"]


def _words(plan: Plan) -> None:
    plan.before = nic_words(plan.nic) if plan.nic is not None else ["VMkernel NIC: none"]
    plan.after = nic_words(sure(plan.expected), plan.nic is None)
    for step in plan.steps:
        if step.switch is not None:
            plan.before.insert(0, f"vswitch {step.switch.name}: none")
            plan.after.insert(
                0, f"vswitch {step.switch.name}: uplinks {', '.join(step.switch.uplinks)}, MTU {step.switch.mtu}"
            )
        if step.port_group is not None:
            plan.before.append(f"portgroup {step.port_group.name}: none")
            plan.after.append(f"portgroup {step.port_group.name}: VLAN {step.port_group.vlan_id}")
    if plan.made_port_group is not None:
        plan.before.append(f"portgroup {plan.made_port_group}: none")
        plan.after.append(f"portgroup {plan.made_port_group}: VLAN {plan.request.vlan_id or 0}, on all its members")
