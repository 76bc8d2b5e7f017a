# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The whole of ``vadp_preflight``: can these machines be backed up from here, how, and why not. Nothing is changed.

All that machines have in common is asked once: datastores, hosts, ports, privileges, the machines beside them.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from ..errors import AmbiguousError, NotFoundError, VadpError, VsphereError
from ..libraries import vim
from ..restore.request import NEW_VM
from ..vsphere.inventory import VmRef, find_vm, readable
from ..vsphere.session import Session, filter_spec
from . import hosts as host_side
from . import machine as machine_side
from . import server as server_side
from .checks import ERROR, NOT_CHECKED, OK, Check, is_ready
from .hosts import HOST_PATHS, Host
from .machine import OTHER_PATHS, VM_PATHS, Machine, Store
from .network import Reached, probe_hosts
from .plans import Planned, plan_disks
from .request import PreflightRequest

_API_PORT = 443
_STORE_PATHS = ("name", "summary.freeSpace", "summary.accessible", "host", "vm")


@dataclass
class Subject:
    """What is asked about: a machine and the plan of its disks, or why there is none."""

    name: str
    machine: Optional[Machine] = None
    planned: Optional[Planned] = None
    checks: List[Check] = field(default_factory=list)


@dataclass
class Surroundings:
    """What the machines have in common. ``others`` is None where it could not be read."""

    hosts: Dict[str, Host] = field(default_factory=dict)
    reached: Dict[str, Reached] = field(default_factory=dict)
    others: Optional[Dict[str, Mapping[str, Any]]] = None
    unread: int = 0
    granted: server_side.Granted | VsphereError | None = None


def preflight(request: PreflightRequest) -> Dict[str, Any]:
    """:returns: {changed, ready, vms, checks}. :raises VadpError: the server can't be asked at all."""
    request.check()
    with Session.connect(request.connection) as session:
        subjects = [_look(session, name, found, request) for name, found in _machines(session, request)]
        machines = [subject.machine for subject in subjects if subject.machine is not None]
        around = _surroundings(session, subjects, request)
        common = list(_common_checks(session, subjects, machines, request))
        for subject in subjects:
            if subject.machine is not None and subject.planned is not None:
                subject.checks += _checks(subject.machine, subject.planned, around, session, request)
    vms = [_vm_result(subject) for subject in subjects]
    results = [check.to_result() for check in common]
    everything = results + [check for vm in vms for check in vm["checks"]]
    return {
        "changed": False,
        "ready": is_ready(common) and all(vm["ready"] for vm in vms),
        "vms": vms,
        "checks": results,
        "counts": server_side.severity_counts(everything),
    }


def _vm_result(subject: Subject) -> Dict[str, Any]:
    machine, planned = subject.machine, subject.planned
    return {
        "vm": machine.vm.name if machine else subject.name,
        "moid": machine.vm.moid if machine else None,
        "uuid": machine.vm.instance_uuid if machine else None,
        "ready": is_ready(subject.checks),
        "disks": [outcome.to_result() for outcome in planned.disks] if planned else [],
        "checks": [check.to_result() for check in subject.checks],
    }


# Looking


def _machines(session: Session, request: PreflightRequest) -> Iterator[Tuple[str, VmRef | VadpError]]:
    """Each machine that is asked for, or why it is not found. The one that is named by its own options must be there.

    :raises VadpError: that one is not.
    """
    if request.vm is not None:
        vm = find_vm(session, **request.vm)
        yield vm.name, vm
        return
    moids: Dict[str, List[str]] = {}
    for obj, values in session.find(vim.VirtualMachine, ["name"]):
        moids.setdefault(readable(values["name"] or ""), []).append(obj._moId)
    for name in request.vms:
        try:
            found = moids.get(readable(name), [])
            # Two of a name, and a name that nobody has, are reported in the words of the look-up by name.
            yield name, find_vm(session, moid=found[0]) if len(found) == 1 else find_vm(session, name=name)
        except VadpError as error:
            yield name, error


def _look(session: Session, name: str, found: VmRef | VadpError, request: PreflightRequest) -> Subject:
    if isinstance(found, VadpError):
        return Subject(name, checks=[_from_error("vm", f"VM '{name}'", found)])
    subject = Subject(found.name)
    try:
        subject.machine = Machine.of(found, session.read(found.obj, *VM_PATHS))
    except VadpError as error:
        subject.checks.append(_from_error("vm", str(found), error))
        return subject
    try:
        subject.planned = plan_disks(session, found, subject.machine.disks, request)
    except (AmbiguousError, NotFoundError) as error:
        # Which virtual machine this machine is can't be determined, or the one that was named is not there.
        subject.planned = Planned([])
        subject.checks.append(_from_error("proxy", "this machine", error))
    except VadpError as error:
        subject.planned = Planned([])
        subject.checks.append(_from_error("transport", str(found), error))
    return subject


def _from_error(code: str, subject: str, error: VadpError) -> Check:
    named = error.subject if error.subject and error.subject not in subject else None
    words = ": ".join(part for part in (error.what, named, error.reason) if part)
    return Check(code, ERROR, subject, words, error.remedy)


def _surroundings(session: Session, subjects: Sequence[Subject], request: PreflightRequest) -> Surroundings:
    machines = [subject.machine for subject in subjects if subject.machine is not None]
    around = Surroundings()
    if not machines:
        return around
    stores = _stores(session, machines)
    for machine in machines:
        machine.stores = [stores[one._moId] for one in machine.values["datastore"] or () if one._moId in stores]
    used = [store for machine in machines for store in _stores_of(machine)]
    around.hosts = _hosts(session, {moid for store in used for moid in store.hosts})
    around.others, around.unread = _others(session, machines)
    proxies = {
        subject.planned.proxy_moid for subject in subjects if subject.planned and subject.planned.proxy_moid is not None
    }
    entities = server_side.entities_of(
        machines, session.content.rootFolder, proxies, session.stub, new_vm=NEW_VM in request.restores
    )
    try:
        around.granted = server_side.Granted.read(session, entities)
    except VsphereError as error:
        around.granted = error
    names = [host.name for host in around.hosts.values() if host.usable]
    around.reached = probe_hosts(names, request.nfc_port, _API_PORT, request.io_timeout)
    return around


def _stores_of(machine: Machine) -> List[Store]:
    """The datastores that its disks lie on; an ISO image or a swap file may lie elsewhere."""
    names = {readable(disk.datastore) for disk in machine.included}
    return [store for store in machine.stores if store.name in names]


def _stores(session: Session, machines: Sequence[Machine]) -> Dict[str, Store]:
    wanted = {one._moId: one for machine in machines for one in machine.values["datastore"] or ()}
    found = {}
    for obj, values in _read_tolerantly(session, list(wanted.values()), vim.Datastore, _STORE_PATHS):
        mounts = [
            mount.key._moId
            for mount in values.get("host") or ()
            if mount.mountInfo.accessible is not False and mount.mountInfo.mounted is not False
        ]
        found[obj._moId] = Store(
            moid=obj._moId,
            name=readable(str(values.get("name") or obj._moId)),
            free_bytes=values.get("summary.freeSpace"),
            accessible=values.get("summary.accessible") is not False,
            hosts=mounts,
            vms=list(values.get("vm") or ()),
        )
    return found


def _hosts(session: Session, moids: Set[str]) -> Dict[str, Host]:
    objs = [vim.HostSystem(moid, session.stub) for moid in sorted(moids)]
    return {
        obj._moId: Host.of(obj._moId, values)
        for obj, values in _read_tolerantly(session, objs, vim.HostSystem, HOST_PATHS)
    }


def _others(session: Session, machines: Sequence[Machine]) -> Tuple[Optional[Dict[str, Mapping[str, Any]]], int]:
    """The disks of all machines on the same datastores, and how many of them could not be read."""
    objs = {one._moId: one for machine in machines for store in _stores_of(machine) for one in store.vms}
    try:
        found = _read_tolerantly(session, list(objs.values()), vim.VirtualMachine, OTHER_PATHS)
    except VsphereError:
        return None, len(objs)
    known: Dict[str, Mapping[str, Any]] = {
        obj._moId: values for obj, values in found if values.get("config.hardware.device") is not None
    }
    return known, len(objs) - len(known)


def _read_tolerantly(
    session: Session, objs: Sequence[Any], kind: Any, paths: Sequence[str]
) -> List[Tuple[Any, Dict[str, Any]]]:
    """Properties of many objects in one call; what this user may not read is absent."""
    if not objs:
        return []
    contents = session.retrieve([filter_spec(objs, {kind: paths})])
    return [(content.obj, {prop.name: prop.val for prop in content.propSet}) for content in contents]


# Judging


def _common_checks(
    session: Session, subjects: Sequence[Subject], machines: Sequence[Machine], request: PreflightRequest
) -> Iterator[Check]:
    address = session.connection.address
    yield Check("server", OK, address, session.about.fullName or session.about.name)
    if session.tls is not None:
        now = datetime.datetime.now(datetime.timezone.utc)
        yield server_side.certificate_check(address, session.tls.certificate, now)
    yield server_side.clock_check(session)
    yield from server_side.program_checks()
    planned = next((subject.planned for subject in subjects if subject.planned is not None), None)
    if planned is not None:
        vddk = server_side.vddk_check(planned, request.transports, bool(request.vddk_libdir))
        if vddk is not None:
            yield vddk
        if planned.identity:
            words = planned.identity
            if planned.proxy_moid is not None:
                # Destroying a machine deletes the disks of others that are attached to it (proofs 9).
                words += (
                    f". Before it is destroyed, vadp_recover with proxy_moid={planned.proxy_moid} must report that"
                    " nothing is attached"
                )
            yield Check("proxy", OK, "this machine", words)
    if request.repository is not None:
        yield from server_side.repository_checks(request.repository, machines)


def _checks(
    machine: Machine, planned: Planned, around: Surroundings, session: Session, request: PreflightRequest
) -> Iterator[Check]:
    yield from machine_side.checks_of(machine)
    yield from machine_side.transport_checks(machine, planned.disks)
    yield from machine_side.leftovers(machine, around.others, around.unread)
    if isinstance(around.granted, server_side.Granted):
        root = session.content.rootFolder._moId
        yield from server_side.privilege_checks(
            machine, planned.disks, request.transports, around.granted, root, planned.proxy_moid, request.restores
        )
    else:
        yield Check("privileges", NOT_CHECKED, str(machine.vm), f"the server does not report them: {around.granted}")
    moids = dict.fromkeys(moid for store in _stores_of(machine) for moid in store.hosts)
    serving = [around.hosts[moid] for moid in moids if moid in around.hosts]
    yield from host_side.host_checks(serving, around.reached, planned.disks, request.nfc_port, _API_PORT)
