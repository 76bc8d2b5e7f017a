# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Doing what was planned, many hosts at once; a host whose steps fail is brought back to what it was.

Nothing is begun before the plan of every host is made: bad input on one host leaves all as they are.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..errors import ConnectionLostError, InputError, VadpError, VsphereError
from ..libraries import vim, vmodl
from ..vsphere import datacenters, dvswitch, host_network, host_storage
from ..vsphere.dvswitch import DvPortGroup
from ..vsphere.host_network import BACKUP_SERVICE, HostNetwork, Nic
from ..vsphere.session import Session
from . import neighbours
from .plan import Plan, Step, Target, World, make_plan, subnet_refusal, sure
from .request import NicRequest, check_addresses
from .subnets import conflicts

_PAUSE = 0.5
_LOST_SECONDS = 3


def ensure(session: Session, request: NicRequest, check_mode: bool) -> Dict[str, Any]:
    """Reach the wanted state on all hosts. -> the module's result; ``failed`` is set when a host's failed.

    :raises VadpError: of a single host; of many where nothing was done because one of them can't be.
    """
    if hasattr(session.stub, "poolSize"):
        # Each thread keeps its connection; a new one for each call would be a TLS handshake for each.
        session.stub.poolSize = max(session.stub.poolSize, request.parallel_hosts)
    world, networks = _read(session, request)
    plans, failures = _plans(request, networks, world)
    _check_neighbours(plans, request.parallel_hosts)
    before = {name: plan.before for name, plan in plans.items()}
    after = {name: plan.after for name, plan in plans.items()}
    outcomes: Dict[str, Dict[str, Any]] = {}
    if check_mode:
        outcomes = {name: _result(plan, plan.expected, plan.changes) for name, plan in plans.items()}
    else:
        runner = _Runner(session, request, world)
        for name, outcome in runner.run(list(plans.values())).items():
            if isinstance(outcome, VadpError):
                failures[name] = outcome
                after[name] = before[name]
            else:
                outcomes[name] = outcome
                if plans[name].nic is None and outcome["device"]:
                    line = f"device: {outcome['device']}"
                    after[name] = [line if one.startswith("device:") else one for one in after[name]]
    return _report(request, plans, outcomes, failures, _text(before), _text(after))


def _text(lines: Dict[str, List[str]]) -> str:
    return "".join(
        f"{name}:\n" + "".join(f"  {line}\n" for line in lines[name]) for name in sorted(lines) if lines[name]
    )


# --- before the first change ----------------------------------------------------------------------------------------


def _read(session: Session, request: NicRequest) -> Tuple[World, Dict[str, HostNetwork]]:
    """What the inventory has, in a few calls however many hosts there are."""
    world = World(
        storage=lambda host: host_storage.read(session, host),
        beside=lambda switch: dvswitch.beside(session, switch),
    )
    everyone = host_network.all_hosts(session)
    for host in everyone:
        world.add_host(host)
    named = {one.host: host_network.pick(everyone, one.host) for one in request.hosts}
    _check_twice(named)
    if request.by_datacenter:
        everywhere = datacenters.all_datacenters(session)
        world.datacenters = {moid: one.moid for moid, one in datacenters.of_hosts(session, everywhere).items()}
        homes = {name: world.datacenters.get(host.moid) for name, host in named.items()}
        for home in set(homes.values()):
            check_addresses([one for one in request.hosts if homes[one.host] == home])
    for name in sorted({one.dvswitch for one in request.hosts if one.dvswitch}):
        world.dv_switches[name] = dvswitch.find_switches(session, name)
    distributed = any(nic.port_key for host in named.values() for nic in host.nics)
    if world.dv_switches or distributed:
        world.dv_port_groups = dvswitch.read_port_groups(session)
    read = host_network.read(session, list(named.values()), world.dv_port_groups)
    return world, dict(zip(named, read))


def _check_twice(named: Dict[str, HostNetwork]) -> None:
    seen: Dict[str, str] = {}
    for name, host in named.items():
        if host.moid in seen:
            raise InputError(
                "A host is named twice", subject=f"'{seen[host.moid]}' and '{name}'", remedy="Give each host once"
            )
        seen[host.moid] = name


def _plans(
    request: NicRequest, networks: Dict[str, HostNetwork], world: World
) -> Tuple[Dict[str, Plan], Dict[str, VadpError]]:
    """The plans, and the hosts that can't have one because of themselves (not connected, too old).

    :raises VadpError: a single host's; or all refusals in one.
    """
    plans: Dict[str, Plan] = {}
    refused: Dict[str, VadpError] = {}
    unable: Dict[str, VadpError] = {}
    for one in request.hosts:
        try:
            plans[one.host] = make_plan(networks[one.host], one, world)
        except InputError as error:
            refused[one.host] = error
        except VadpError as error:
            unable[one.host] = error
    if refused:
        first = next(iter(refused.values()))
        if request.single or len(request.hosts) == 1:
            raise first
        raise InputError(
            "Nothing was changed, as not all hosts can be as described",
            subject=f"{len(refused)} of {len(request.hosts)} hosts",
            reason=" ".join(str(error) for error in list(refused.values())[:5]),
            remedy="Correct these hosts, or leave them out",
            details={"hosts": [{"host": name, "msg": str(error)} for name, error in refused.items()]},
        )
    if unable and request.single:
        raise next(iter(unable.values()))
    _check_vlans(plans)
    return plans, unable


def _check_vlans(plans: Dict[str, Plan]) -> None:
    """:raises InputError: one distributed port group is to be made with two VLANs."""
    vlans: Dict[Tuple[str, str], Tuple[str, int]] = {}
    for name, plan in plans.items():
        if plan.made_port_group is None or plan.dv_switch is None:
            continue
        vlan_id = plan.request.vlan_id or 0
        first = vlans.setdefault((plan.dv_switch.moid, plan.made_port_group), (name, vlan_id))
        if first[1] != vlan_id:
            raise InputError(
                "A port group can't have two VLANs",
                subject=f"'{plan.made_port_group}' of {plan.dv_switch}",
                reason=f"host '{first[0]}' wants {first[1]}, host '{name}' {vlan_id}",
                remedy="Give all hosts the same vlan_id, or port groups of their own",
            )


def _check_neighbours(plans: Dict[str, Plan], parallel: int) -> None:
    """Look whether the new addresses answer already, where this machine is on their segment."""
    asked = [
        plan
        for plan in plans.values()
        if plan.request.present
        and plan.request.address is not None
        and any(step.kind in ("add_nic", "update_nic") for step in plan.steps)
        and (plan.nic is None or plan.nic.ip != str(plan.request.address.ip))
    ]
    addresses = [sure(plan.request.address).ip for plan in asked]
    if not any(neighbours.on_segment(address) for address in addresses):
        for plan in asked:
            plan.address_check = neighbours.NOT_CHECKED
        return
    with ThreadPoolExecutor(parallel) as pool:
        for plan, address, (found, who) in zip(asked, addresses, pool.map(neighbours.check, addresses)):
            plan.address_check = found
            if found == neighbours.ANSWERS:
                plan.warnings.append(f"{plan.host}: the address {address} answers already, from {who}.")


# --- the changes ----------------------------------------------------------------------------------------------------


class _Runner:
    """Carries out the plans; :meth:`run` is called once."""

    def __init__(self, session: Session, request: NicRequest, world: World) -> None:
        self.session = session
        self.request = request
        self.world = world

    def run(self, plans: Sequence[Plan]) -> Dict[str, Any]:
        """-> by host: its result, or the VadpError that it failed with."""
        outcomes: Dict[str, Any] = {}
        made, plans = self._make_port_groups(plans, outcomes)
        futures: Dict[str, Future[Dict[str, Any]]] = {}
        with ThreadPoolExecutor(self.request.parallel_hosts) as pool:
            try:
                for plan in plans:
                    futures[plan.request.host] = pool.submit(_HostRun(self, plan).run)
                for name, future in futures.items():
                    try:
                        outcomes[name] = future.result()
                    except VadpError as error:
                        outcomes[name] = error
            finally:
                # When the module is ended, hosts that were not begun stay as they are.
                for future in futures.values():
                    future.cancel()
        self._remove_unused(made, plans, outcomes)
        return outcomes

    def _make_port_groups(
        self, plans: Sequence[Plan], outcomes: Dict[str, Any]
    ) -> Tuple[Dict[Tuple[str, str], DvPortGroup], List[Plan]]:
        """Make the distributed port groups that are missing, each once. Hosts whose port group fails, fail."""
        made: Dict[Tuple[str, str], DvPortGroup] = {}
        met: Dict[Tuple[str, str], DvPortGroup] = {}
        failed: Dict[Tuple[str, str], VadpError] = {}
        left = []
        for plan in plans:
            if plan.made_port_group is None or plan.dv_switch is None:
                left.append(plan)
                continue
            key = (plan.dv_switch.moid, plan.made_port_group)
            if key not in made and key not in met and key not in failed:
                try:
                    group, ours = self._make_port_group(plan)
                    (made if ours else met)[key] = group
                except VadpError as error:
                    failed[key] = error
            if key in failed:
                outcomes[plan.request.host] = failed[key]
            else:
                plan.dv_port_group = made.get(key) or met[key]
                left.append(plan)
        return made, left

    def _make_port_group(self, plan: Plan) -> Tuple[DvPortGroup, bool]:
        """-> (the port group, whether it was made here; if not, another run made the same meanwhile)"""
        try:
            return self._create_port_group(plan), True
        except VadpError as error:
            if _is_taken(error):
                return self._met_port_group(plan, error), False
            # What is not known to have failed is looked for: it may be there.
            there = self._find_made(plan)
            if there is not None:
                return there, True
            if not isinstance(error, ConnectionLostError):
                raise
        try:
            return self._create_port_group(plan), True
        except VadpError as error:
            # The first call was carried out after all, while nobody saw it yet.
            there = self._find_made(plan) if _is_taken(error) else None
            if there is None:
                raise
            return there, True

    def _met_port_group(self, plan: Plan, error: VadpError) -> DvPortGroup:
        """The port group that came between the look and the change. :raises VadpError: it is another one than asked."""
        there = self._find_made(plan)
        if there is not None and there.vlan_id == (plan.request.vlan_id or 0) and not there.uplink:
            return there
        switch, name = sure(plan.dv_switch), sure(plan.made_port_group)
        holder = dvswitch.beside(self.session, switch).get(name)
        if there is not None:
            vlan = "no single VLAN" if there.vlan_id is None else f"VLAN {there.vlan_id}"
            error.reason = f"it was made meanwhile, and has {vlan}, not {plan.request.vlan_id or 0}"
        elif holder is not None:
            error.reason = f"{holder} has the name, in the folder of the switch"
        raise error

    def _create_port_group(self, plan: Plan) -> DvPortGroup:
        return dvswitch.create_port_group(
            self.session,
            sure(plan.dv_switch),
            sure(plan.made_port_group),
            plan.request.vlan_id or 0,
            self.request.timeout,
        )

    def _find_made(self, plan: Plan) -> Optional[DvPortGroup]:
        for group in dvswitch.read_port_groups(self.session).values():
            if group.switch_moid == sure(plan.dv_switch).moid and group.name == plan.made_port_group:
                return group
        return None

    def _remove_unused(
        self, made: Dict[Tuple[str, str], DvPortGroup], plans: Sequence[Plan], outcomes: Dict[str, Any]
    ) -> None:
        """A port group that was made and that no host came to use goes again."""
        for group in made.values():
            users = [plan.request.host for plan in plans if plan.dv_port_group is group]
            if any(not isinstance(outcomes.get(name), VadpError) for name in users):
                continue
            try:
                self._destroy_port_group(group)
            except VadpError as error:
                for name in users:
                    _add_leftover(outcomes[name], [f"port group '{group.name}' of {group.switch_name}: {error}"])

    def _destroy_port_group(self, group: DvPortGroup) -> None:
        """Tried twice, as nobody does it later."""
        for last in (False, True):
            try:
                dvswitch.destroy_port_group(self.session, group, self.request.timeout)
                return
            except VsphereError as error:
                # Gone, or in use by somebody else's NIC by now.
                if isinstance(error.fault, (vmodl.fault.ManagedObjectNotFound, vim.fault.ResourceInUse)):
                    return
                if last:
                    raise


def _is_taken(error: VadpError) -> bool:
    """Whether something of that name is there, which somebody else may have made."""
    return isinstance(getattr(error, "fault", None), (vim.fault.AlreadyExists, vim.fault.DuplicateName))


def _add_leftover(error: VadpError, problems: Sequence[str]) -> None:
    error.details.setdefault("left", []).extend(problems)
    text = f"what was made could not be removed again: {'; '.join(problems)}"
    error.reason = f"{error.reason}; {text}" if error.reason else text


class _HostRun:
    """The steps of one host, and the way back."""

    def __init__(self, runner: _Runner, plan: Plan) -> None:
        self.session = runner.session
        self.request = runner.request
        self.world = runner.world
        self.plan = plan
        self.host = plan.host
        self.device = plan.nic.device if plan.nic is not None else None
        self.lease: Optional[Nic] = None
        # Steps whose work somebody else did between the look and the change: not ours to undo.
        self.met: List[Step] = []

    def run(self) -> Dict[str, Any]:
        """:raises VadpError: a step failed; the host is as it was, or the message says what is left."""
        begun: List[Step] = []
        try:
            for step in self.plan.steps:
                begun.append(step)
                self._carry_out(step)
            return _result(self.plan, self._seen(), self.plan.changes)
        except VadpError as error:
            problems = self._undo(begun, error)
            if problems:
                _add_leftover(error, problems)
            elif len(begun) > 1:
                error.reason = f"{error.reason or 'it failed'}; what had been done before was undone"
            raise

    # forward

    def _carry_out(self, step: Step) -> None:
        """Do a step. When the connection breaks meanwhile, look whether it was done, else do it again."""
        action: Callable[[Step], None] = getattr(self, f"_{step.kind}")
        try:
            action(step)
            return
        except ConnectionLostError:
            if self._appears(step):
                return
        except VsphereError as error:
            if not self._is_met(step, error):
                raise
            self.met.append(step)
            return
        try:
            action(step)
        except VsphereError as error:
            if not (_is_taken(error) and self._happened(step, self._read())):
                raise

    def _is_met(self, step: Step, error: VsphereError) -> bool:
        """Whether a step was refused as another run has just done the same; what can't be read was not."""
        try:
            return self._found_done(step, error)
        except VsphereError:
            return False

    def _found_done(self, step: Step, error: VsphereError) -> bool:
        if step.kind == "remove_nic":
            gone = (vim.fault.NotFound, vmodl.fault.ManagedObjectNotFound)
            return isinstance(error.fault, gone) and self._read().nic(self.device) is None
        if step.kind == "add_nic":
            # A port group that is taken, or an address that is: a host has several faults for these.
            return self._meets_nic(self._read())
        if not _is_taken(error):
            return False
        network = self._read()
        if step.kind == "add_switch":
            wanted = sure(step.switch)
            switch = network.switch(wanted.name)
            return switch is not None and set(switch.uplinks) == set(wanted.uplinks) and switch.mtu >= wanted.mtu
        if step.kind == "add_port_group":
            return network.port_group(sure(step.port_group).name) == step.port_group
        return False

    def _meets_nic(self, network: HostNetwork) -> bool:
        """Whether the host has got just the NIC that was to be made."""
        expected = sure(self.plan.expected)
        made = [
            nic
            for nic in self._new_nics(network)
            if not _differs(nic, expected) and not nic.other_services and nic.stack == expected.stack
        ]
        if len(made) != 1:
            return False
        self.device = made[0].device
        return True

    def _appears(self, step: Step) -> bool:
        """Whether a step's work is there, or comes within seconds: the host may be at it while nobody listens."""
        deadline = self.session.clock() + _LOST_SECONDS
        while True:
            if self._happened(step, self._read()):
                return True
            if self.session.clock() >= deadline:
                return False
            self.session.sleep(_PAUSE)

    def _call(self, function: Any, *args: Any, what: str, subject: str = "", idempotent: bool = False) -> Any:
        subject = f"{subject} of {self.host}" if subject else str(self.host)
        return self.session.call(function, *args, what=what, subject=subject, idempotent=idempotent)

    def _add_switch(self, step: Step) -> None:
        switch = sure(step.switch)
        spec = vim.host.VirtualSwitch.Specification(
            numPorts=128,
            mtu=switch.mtu,
            bridge=vim.host.VirtualSwitch.BondBridge(nicDevice=list(switch.uplinks)),
        )
        self._call(
            self.host.network_system.AddVirtualSwitch,
            switch.name,
            spec,
            what="The switch was not made",
            subject=f"'{switch.name}'",
        )

    def _add_port_group(self, step: Step) -> None:
        group = sure(step.port_group)
        spec = vim.host.PortGroup.Specification(
            name=group.name, vlanId=group.vlan_id, vswitchName=group.switch, policy=vim.host.NetworkPolicy()
        )
        self._call(
            self.host.network_system.AddPortGroup, spec, what="The port group was not made", subject=f"'{group.name}'"
        )

    def _add_nic(self, step: Step) -> None:
        target, group = step.target, self.plan.dv_port_group
        spec = vim.host.VirtualNic.Specification(ip=_ip(target, ()), mtu=target.mtu or 1500)
        spec.netStackInstanceKey = host_network.DEFAULT_STACK
        if target.gateway:
            spec.ipRouteSpec = _route(target.gateway)
        portgroup = self.plan.request.portgroup
        if self.plan.dv_switch is not None:
            spec.distributedVirtualPort = vim.dvs.PortConnection(
                switchUuid=self.plan.dv_switch.uuid, portgroupKey=sure(group).key
            )
            portgroup = ""
        self.device = self._call(
            self.host.network_system.AddVirtualNic,
            portgroup,
            spec,
            what="The VMkernel NIC was not made",
            subject=f"on port group '{self.plan.request.portgroup}'",
        )

    def _update_nic(self, step: Step) -> None:
        nic = sure(step.nic)
        self._call(
            self.host.network_system.UpdateVirtualNic,
            nic.device,
            _update(nic, step.target),
            what="The VMkernel NIC was not changed",
            subject=nic.device,
        )

    def _await_lease(self, step: Step) -> None:
        """Wait for the address that DHCP gives, then guard as for a given one."""
        session = self.session
        deadline = session.clock() + self.request.timeout
        while True:
            network = self._read()
            nic = network.nic(self.device)
            if nic is None:
                raise VsphereError(
                    "The VMkernel NIC is gone", subject=f"{self.device} of {self.host}", remedy="Run again"
                )
            if nic.ip:
                break
            if session.clock() >= deadline:
                raise VsphereError(
                    "The VMkernel NIC got no address",
                    subject=f"{self.device} of {self.host}",
                    reason=f"no DHCP server answered within {self.request.timeout} s",
                    remedy="Check the VLAN and the DHCP server, set a longer timeout, or give ip_address",
                )
            session.sleep(_PAUSE)
        self.lease = nic
        others = conflicts(nic.subnets, nic.stack, network.nics, nic.device)
        if others and not self.plan.request.allow_shared_subnet:
            raise subnet_refusal(self.host, nic, others, new=False)
        owner = self.world.elsewhere(self.host, nic.ip)
        if owner is not None:
            raise VsphereError(
                "The address that DHCP gave is another host's",
                subject=f"{nic.ip} for {self.host}",
                reason=f"{owner[1]} of host '{owner[0]}' has it",
                remedy="Correct the DHCP server's range, or that host",
            )

    def _select(self, step: Step) -> None:
        self._call(
            self.host.nic_manager.SelectVnicForNicType,
            BACKUP_SERVICE,
            self.device,
            what="The VMkernel NIC was not tagged for backup",
            subject=str(self.device),
            idempotent=True,
        )

    def _remove_nic(self, step: Step) -> None:
        self._call(
            self.host.network_system.RemoveVirtualNic,
            self.device,
            what="The VMkernel NIC was not removed",
            subject=str(self.device),
        )

    # what there is

    def _read(self) -> HostNetwork:
        groups = dict(self.world.dv_port_groups)
        if self.plan.dv_port_group is not None:
            groups[self.plan.dv_port_group.key] = self.plan.dv_port_group
        return host_network.read(self.session, [self.host], groups)[0]

    def _seen(self) -> Optional[Nic]:
        """The NIC as the host shows it after the last step; the tag must be there."""
        if not self.plan.request.present:
            return None
        if not self.plan.changes:
            return self.plan.nic
        config = self._call(
            self.host.nic_manager.QueryNetConfig,
            BACKUP_SERVICE,
            what="The VMkernel NIC was not read back",
            subject=str(self.device),
            idempotent=True,
        )
        if config is None or self.device not in host_network.selected(config):
            raise VsphereError(
                "The VMkernel NIC is not tagged for backup",
                subject=f"{self.device} of {self.host}",
                reason="the host took the call and does not show the tag",
                remedy="Look at the NIC in the vSphere client",
            )
        expected = sure(self.plan.expected)
        if self.lease is not None:
            expected = replace(expected, ip=self.lease.ip, netmask=self.lease.netmask)
        return replace(expected, device=sure(self.device))

    def _new_nics(self, network: HostNetwork) -> List[Nic]:
        """NICs that are there now, were not before, and are the one that was to be made."""
        known = {nic.device for nic in self.host.nics}
        expected = sure(self.plan.expected)
        return [
            nic
            for nic in network.nics
            if nic.device not in known
            and (nic.device == self.device or (nic.portgroup == expected.portgroup and nic.dhcp == expected.dhcp))
            and (expected.dhcp or nic.ip == expected.ip)
        ]

    def _happened(self, step: Step, network: HostNetwork) -> bool:
        """Whether a step's work is there."""
        if step.kind == "add_switch":
            return step.switch is not None and network.switch(step.switch.name) is not None
        if step.kind == "add_port_group":
            return step.port_group is not None and network.port_group(step.port_group.name) is not None
        if step.kind == "add_nic":
            made = self._new_nics(network)
            if made:
                self.device = made[0].device
            return bool(made)
        if step.kind == "update_nic":
            now = network.nic(self.device)
            return now is not None and step.nic is not None and _differs(now, step.nic)
        if step.kind == "select":
            now = network.nic(self.device)
            return now is not None and now.tagged
        if step.kind == "remove_nic":
            return network.nic(self.device) is None
        return False

    # the way back

    def _undo(self, begun: Sequence[Step], error: VadpError) -> List[str]:
        """Take back what was done, the last first. -> what could not be."""
        if not begun or not self.plan.request.present:
            return []
        failed = begun[-1]
        # What somebody else has made meanwhile is not ours to remove.
        candidates = [
            step
            for step in begun
            if not (_is_taken(error) and step is failed) and not any(step is one for one in self.met)
        ]
        try:
            network = self._read()
            done = [step for step in candidates if self._happened(step, network)]
        except VsphereError:
            done = [step for step in candidates if step is not failed and step.kind != "await_lease"]
        problems = []
        for step in reversed(done):
            undo: Optional[Callable[[Step], None]] = getattr(self, f"_undo_{step.kind}", None)
            if undo is None:
                continue
            try:
                undo(step)
            except VsphereError:
                # Once more, as nobody does it later; unless it was done and only the answer was lost.
                try:
                    if self._happened(step, self._read()):
                        undo(step)
                except VsphereError as problem:
                    problems.append(str(problem).rstrip("."))
        return problems

    def _undo_add_switch(self, step: Step) -> None:
        switch = sure(step.switch)
        if any(group.switch == switch.name for group in self._read().port_groups):
            return  # somebody else has a port group on it by now
        self._call(
            self.host.network_system.RemoveVirtualSwitch,
            switch.name,
            what="The switch was not removed",
            subject=f"'{switch.name}'",
        )

    def _undo_add_port_group(self, step: Step) -> None:
        group = sure(step.port_group)
        if any(nic.portgroup == group.name and nic.port_key is None for nic in self._read().nics):
            return  # somebody else has a NIC on it by now
        self._call(
            self.host.network_system.RemovePortGroup,
            group.name,
            what="The port group was not removed",
            subject=f"'{group.name}'",
        )

    def _undo_add_nic(self, step: Step) -> None:
        self._remove_nic(step)

    def _undo_update_nic(self, step: Step) -> None:
        nic = sure(step.nic)
        now = self._read().nic(nic.device) or nic
        back = Target(nic.dhcp, nic.ip, nic.netmask, nic.ipv6, nic.mtu, nic.gateway or "")
        self._call(
            self.host.network_system.UpdateVirtualNic,
            nic.device,
            _update(now, back, whole=True),
            what="The VMkernel NIC did not get its old settings back",
            subject=nic.device,
        )

    def _undo_select(self, step: Step) -> None:
        if self.plan.nic is None:
            return  # the NIC goes as a whole
        self._call(
            self.host.nic_manager.DeselectVnicForNicType,
            BACKUP_SERVICE,
            self.device,
            what="The backup tag was not taken off again",
            subject=str(self.device),
        )


# --- the API's objects ----------------------------------------------------------------------------------------------


def _ip(target: Target, have: Sequence[str]) -> Any:
    """An IP configuration. It replaces the whole of the IPv4 part; IPv6 addresses are added and removed one by one."""
    ip = vim.host.IpConfig(dhcp=target.dhcp)
    if not ip.dhcp and target.ip is not None:
        ip.ipAddress, ip.subnetMask = target.ip, target.netmask
    if target.ipv6 is not None and set(target.ipv6) != set(have):
        changes = [(text, "remove") for text in have if text not in target.ipv6]
        changes += [(text, "add") for text in target.ipv6 if text not in have]
        addresses = []
        for text, operation in changes:
            address, _slash, prefix = text.partition("/")
            addresses.append(
                vim.host.IpConfig.IpV6Address(ipAddress=address, prefixLength=int(prefix), operation=operation)
            )
        ip.ipV6Config = vim.host.IpConfig.IpV6AddressConfiguration(ipV6Address=addresses)
    return ip


def _route(gateway: str) -> Any:
    """The gateway of one NIC; an empty one takes it away."""
    return vim.host.VirtualNic.IpRouteSpec(ipRouteConfig=vim.host.IpRouteConfig(defaultGateway=gateway or None))


def _update(nic: Nic, target: Target, whole: bool = False) -> Any:
    """What brings *nic* to *target*; what is the same is not sent.

    :param whole: *target* is all of the NIC: without an address it must have none.
    """
    spec = vim.host.VirtualNic.Specification()
    v4 = False
    if target.dhcp or nic.dhcp:
        v4 = target.dhcp != nic.dhcp and (whole or target.dhcp or target.ip is not None)
    elif target.ip is not None or whole:
        v4 = (target.ip, target.netmask) != (nic.ip, nic.netmask)
    v6 = target.ipv6 is not None and set(target.ipv6) != set(nic.ipv6)
    if v4:
        spec.ip = _ip(target, nic.ipv6)
    elif v6:
        # The IPv4 part is replaced as a whole, so it is sent as it is.
        spec.ip = _ip(Target(nic.dhcp, nic.ip, nic.netmask, target.ipv6), nic.ipv6)
    if target.mtu is not None and target.mtu != nic.mtu:
        spec.mtu = target.mtu
    if target.gateway is not None and target.gateway != (nic.gateway or ""):
        spec.ipRouteSpec = _route(target.gateway)
    return spec


def _differs(first: Nic, second: Nic) -> bool:
    def words(nic: Nic) -> Tuple[Any, ...]:
        address = None if nic.dhcp else (nic.ip, nic.netmask)
        return nic.dhcp, address, set(nic.ipv6), nic.mtu, nic.gateway

    return words(first) != words(second)


# --- results --------------------------------------------------------------------------------------------------------


def _result(plan: Plan, nic: Optional[Nic], changed: bool) -> Dict[str, Any]:
    """What the module reports of a host."""
    result: Dict[str, Any] = {
        "host": plan.host.name,
        "changed": changed,
        "failed": False,
        "msg": "",
        "address_check": plan.address_check,
    }
    facts = nic.to_dict() if nic is not None else dict.fromkeys(Nic("").to_dict())
    if nic is not None and plan.nic is None and nic is plan.expected:
        facts["device"] = None  # check mode: only the host gives the name
    return {**facts, "services": facts["services"] or [], **result}


def _failure(name: str, error: VadpError) -> Dict[str, Any]:
    left = bool(error.details.get("left"))
    return {"host": name, "changed": left, "failed": True, "msg": str(error), "error": error.to_result()}


def _report(
    request: NicRequest,
    plans: Dict[str, Plan],
    outcomes: Dict[str, Dict[str, Any]],
    failures: Dict[str, VadpError],
    before: str,
    after: str,
) -> Dict[str, Any]:
    """:raises VadpError: of a single host that failed."""
    if request.single and failures:
        raise next(iter(failures.values()))
    hosts = [
        outcomes[one.host] if one.host in outcomes else _failure(one.host, failures[one.host]) for one in request.hosts
    ]
    result: Dict[str, Any] = {
        "changed": any(one["changed"] for one in hosts),
        "diff": {"before": before, "after": after},
        "warnings": [text for plan in plans.values() for text in plan.warnings],
    }
    if request.single:
        result["vmkernel_nic"] = hosts[0]
        return result
    result["hosts"] = hosts
    if failures:
        first = next(iter(failures.values()))
        result["failed"] = True
        result["msg"] = (
            f"{len(failures)} of {len(hosts)} hosts failed; the first: {first}"
            if len(failures) < len(hosts)
            else f"All {len(hosts)} hosts failed; the first: {first}"
        )
        result["error"] = first.to_result()
    return result
