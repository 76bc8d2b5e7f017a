# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Checks of the server and of this machine: certificate, clock, privileges, programs, VDDK, the repository."""

from __future__ import annotations

import datetime
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from ..datapath.processes import run_tool
from ..errors import DataPathError, RepositoryError, VsphereError
from ..libraries import first_missing, vim, vmodl
from ..repository import places
from ..repository.layout import Repository, is_empty_folder
from ..restore.request import NEW_VM
from ..vsphere import clock
from ..vsphere import privileges as table
from ..vsphere.session import Session
from .checks import ERROR, NOT_CHECKED, OK, WARNING, Check
from .machine import Machine, size
from .network import certificate_validity
from .plans import DiskOutcome, Planned

_EXPIRES_SOON_DAYS = 30
# Beyond a minute log lines of both sides no longer tell what came first; beyond five logins by token fail.
_SKEW_SECONDS = 60

_MIB = 1 << 20
_REPOSITORY_LEAST = 64 * _MIB
# What an incremental reads of a machine, roughly, where nothing better is known.
_INCREMENTAL_SHARE = 0.10

_PROGRAMS = (("nbdkit", "nbdkit"), ("qemu-img", "qemu-utils or qemu-img"), ("qemu-nbd", "qemu-utils or qemu-img"))
_LIBRARIES = ("nbd", "blake3")
_VERSION_TIMEOUT = 30


def certificate_check(subject: str, der: bytes, now: datetime.datetime) -> Check:
    """How long the certificate of the connection is still valid."""
    code = "certificate"
    try:
        begins, ends = certificate_validity(der)
    except ValueError as error:
        return Check(code, NOT_CHECKED, subject, f"the certificate can't be read: {error}")
    day = ends.strftime("%Y-%m-%d")
    remedy = "Renew the server's certificate; where 'thumbprint' is set, set the new one"
    if now >= ends:
        return Check(code, ERROR, subject, f"expired on {day}", remedy)
    if now < begins:
        return Check(code, ERROR, subject, f"not valid before {begins:%Y-%m-%d}", "Set this machine's clock")
    if ends - now < datetime.timedelta(days=_EXPIRES_SOON_DAYS):
        return Check(code, WARNING, subject, f"expires on {day}, in {(ends - now).days} days", remedy)
    return Check(code, OK, subject, f"valid until {day}")


def clock_check(session: Session) -> Check:
    """This machine's clock against vCenter's."""
    subject = session.connection.address
    try:
        return skew_check(subject, clock.skew_seconds(session))
    except VsphereError as error:
        return Check("clock", NOT_CHECKED, subject, str(error))


def skew_check(subject: str, seconds: float) -> Check:
    """:param seconds: how far the server's clock is ahead."""
    if abs(seconds) <= _SKEW_SECONDS:
        return Check("clock", OK, subject, "the server's clock and this machine's agree")
    later = "ahead of" if seconds > 0 else "behind"
    words = f"the server's clock is {abs(seconds):.0f} s {later} this machine's"
    if abs(seconds) > clock.WARNING_SECONDS:
        words += ": a point that is named by a time may be another one than is meant"
    return Check("clock", WARNING, subject, words, "Let both be set by the same time servers (NTP)")


def program_checks() -> Iterator[Check]:
    """What the data path is made of, with versions."""
    for name, package in _PROGRAMS:
        if shutil.which(name) is None:
            yield Check("programs", ERROR, name, "is not in the search path", f"Install the package {package}")
            continue
        try:
            version = run_tool([name, "--version"], what=f"Asking {name}", timeout=_VERSION_TIMEOUT).splitlines()[0]
        except (DataPathError, IndexError) as error:
            yield Check(
                "programs", ERROR, name, f"does not say its version: {error}", f"Reinstall the package {package}"
            )
            continue
        yield Check("programs", OK, name, version)
    for name in _LIBRARIES:
        missing, what, _trace = first_missing(name)
        if missing:
            yield Check("programs", ERROR, f"Python library {name}", "is not installed", f"Install {what}")
        else:
            yield Check("programs", OK, f"Python library {name}", "is installed")


def vddk_check(planned: Planned, transports: Sequence[str], named: bool) -> Optional[Check]:
    """VDDK, where a transport that needs it is listed. :param named: the user names it, so a backup needs it."""
    if not {"san", "hotadd", "nbdssl", "nbd"}.intersection(transports):
        return None
    if planned.vddk is None:
        return Check(
            "vddk",
            ERROR if named else WARNING,
            "VDDK",
            (planned.vddk_problem or "it was not found").rstrip("."),
            "Unpack VDDK and name its folder in vddk_libdir; without it only https and the hotadd of a proxy VM work",
        )
    vddk = planned.vddk
    return Check("vddk", OK, "VDDK", f"{vddk.version} in {vddk.libdir}, nbdkit's plugin {vddk.plugin}")


# Privileges


class Granted:
    """What the user may do, by object. Filled by one call for all objects and all privileges."""

    def __init__(self, missing: Dict[str, Set[str]], unknown: Set[str]) -> None:
        self._missing = missing
        self.unknown = unknown

    def lacks(self, moid: str, privilege: str) -> bool:
        return privilege in self._missing.get(moid, set()) and privilege not in self.unknown

    @classmethod
    def read(cls, session: Session, entities: Sequence[Any]) -> Granted:
        """:raises VsphereError: the server does not say."""
        names = sorted({privilege.name for privilege in table.PRIVILEGES})
        try:
            return cls(_ask(session, entities, names), set())
        except VsphereError as error:
            if not isinstance(error.fault, vmodl.fault.InvalidArgument):
                raise
        # An older server, or an ESXi host, does not know all of them.
        known = session.read(session.content.authorizationManager, "privilegeList")["privilegeList"] or []
        offered = {one.privId for one in known}
        return cls(_ask(session, entities, [name for name in names if name in offered]), set(names) - offered)


def _ask(session: Session, entities: Sequence[Any], names: Sequence[str]) -> Dict[str, Set[str]]:
    manager = session.content.authorizationManager
    answer = session.call(
        manager.HasPrivilegeOnEntities,
        list(entities),
        session.key,
        list(names),
        what="The user's privileges were not read",
        idempotent=True,
    )
    return {
        item.entity._moId: {one.privId for one in item.privAvailability if not one.isGranted} for item in answer or ()
    }


def privilege_checks(
    machine: Machine,
    outcomes: Sequence[DiskOutcome],
    transports: Sequence[str],
    granted: Granted,
    root_moid: str,
    proxy_moid: Optional[str],
    restores: Sequence[str] = (),
) -> Iterator[Check]:
    """What the user lacks for this machine: for what will be done, and for what could be done instead.

    :param restores: targets of restores that should be possible too.
    """
    subject = str(machine.vm)
    chosen = {outcome.chosen for outcome in outcomes if outcome.chosen}
    must = {table.BACKUP}
    # Without the keys a backup works, and is told by them in nothing (proofs 18).
    may = {table.ACCESS, table.KEYS}
    if any(disk.encrypted for disk in machine.included):
        must.add(table.ENCRYPTED)
    for transport in transports:
        # Where no transport can work a missing privilege may be why.
        group = must if transport in chosen or not chosen else may
        group.update(table.OF_TRANSPORT[transport])
    lacking_must = _lacking(machine, must, granted, root_moid, proxy_moid)
    lacking_may = [item for item in _lacking(machine, may, granted, root_moid, proxy_moid) if item not in lacking_must]
    remedy = "Add them to the user's role; docs/ports-and-privileges.md has the whole list and a role to import"
    for severity, items, purpose in (
        (ERROR, lacking_must, "this backup"),
        (WARNING, lacking_may, "what it could do instead or besides"),
    ):
        if items:
            listed = ", ".join(f"{name} on {where}" for name, where in items)
            yield Check("privileges", severity, subject, f"missing for {purpose}: {listed}", remedy)
    lacking_restores = []
    for target in restores:
        absent = _lacking_for(target, machine, granted, root_moid, proxy_moid)
        if absent:
            lacking_restores.append(target)
            listed = ", ".join(f"{name} on {where}" for name, where in absent)
            yield Check("privileges", ERROR, subject, f"missing for a restore to {target}: {listed}", remedy)
    if NEW_VM in restores:
        # Of tags themselves the server tells nothing here.
        absent = _lacking_beside(machine, table.TAGS, granted)
        if absent:
            lacking_restores.append(table.TAGS)
            listed = ", ".join(f"{name} on {where}" for name, where in absent)
            yield Check("privileges", WARNING, subject, f"missing to give a new machine its tags: {listed}", remedy)
    if not lacking_must and not lacking_may and not lacking_restores:
        yield Check("privileges", OK, subject, "the user has all that were looked for")


def _lacking_for(
    target: str, machine: Machine, granted: Granted, root_moid: str, proxy_moid: Optional[str]
) -> List[Tuple[str, str]]:
    """For a restore into this machine, or as a new one beside it: in its folder, pool and networks."""
    found = _lacking(machine, {table.RESTORE}, granted, root_moid, proxy_moid)
    if target == NEW_VM:
        found += _lacking_beside(machine, table.NEW_VM, granted)
    return found


def _lacking_beside(machine: Machine, task: str, granted: Granted) -> List[Tuple[str, str]]:
    """For a task of a new machine beside this one."""
    places = _new_places(machine)
    return [
        (privilege.name, where)
        for privilege in table.needed({task})
        for moid, where in places.get(privilege.on, ())
        if granted.lacks(moid, privilege.name)
    ]


def _new_places(machine: Machine) -> Dict[str, List[Tuple[str, str]]]:
    folder, pool = machine.values.get("parent"), machine.values.get("resourcePool")
    beside = [(folder._moId, "its folder")] if folder is not None else []
    return {
        # What a hot-added disk needs on the proxy a new machine needs where it will be.
        table.PROXY: beside,
        table.FOLDER: beside,
        table.POOL: [(pool._moId, "its resource pool")] if pool is not None else [],
        table.NETWORK: [(one._moId, f"network {one._moId}") for one in machine.values.get("network") or ()],
        table.DATASTORE: _datastore_places(machine),
    }


def _datastore_places(machine: Machine) -> List[Tuple[str, str]]:
    used = {disk.datastore for disk in machine.included}
    return [(store.moid, f"datastore {store.name}") for store in machine.stores if store.name in used]


def _lacking(
    machine: Machine, tasks: Set[str], granted: Granted, root_moid: str, proxy_moid: Optional[str]
) -> List[Tuple[str, str]]:
    places: Dict[str, List[Tuple[str, str]]] = {
        table.VM: [(machine.vm.moid, str(machine.vm))],
        table.DATASTORE: _datastore_places(machine),
        table.VCENTER: [(root_moid, "vCenter")],
        table.PROXY: [(proxy_moid, "the proxy VM")] if proxy_moid else [],
    }
    return [
        (privilege.name, where)
        for privilege in table.needed(tasks)
        for moid, where in places.get(privilege.on, ())
        if granted.lacks(moid, privilege.name)
    ]


# The repository


def repository_checks(path: str, machines: Sequence[Machine]) -> Iterator[Check]:
    """Whether the repository can be used, and whether what these machines need fits."""
    code = "repository"
    try:
        empty = is_empty_folder(path)
        place = places.place_of(path) if empty else None
        repository = None if empty else Repository.open(path, writable=True)
    except RepositoryError as error:
        yield Check(code, ERROR, path, error.reason or error.what, error.remedy)
        return
    if empty and not os.access(path, os.W_OK | os.X_OK):
        yield Check(code, ERROR, path, "this user may not write there", "Give the folder to the user who runs backups")
        return
    wanted = sum(_estimate(machine, repository) for machine in machines)
    facts = os.statvfs(path)
    free = facts.f_bavail * facts.f_frsize
    words = f"{size(free)} are free; the next backup reads up to {size(wanted)}, before compression"
    remedy = "Free space, or use another repository"
    if free < _REPOSITORY_LEAST or free < wanted // 10:
        yield Check(code, ERROR, path, words, remedy)
    elif free < wanted:
        yield Check(code, WARNING, path, words, remedy)
    elif place is not None:
        words = f"it is empty; {words}"
        yield Check(code, WARNING, path, words, "See that its file system is mounted; for a new one, set create once")
    elif repository is not None and repository.warnings:
        yield Check(code, WARNING, path, f"{' '.join(repository.warnings)} {words}", "See which machine uses it")
    else:
        yield Check(code, OK, path, words)


def _estimate(machine: Machine, repository: Optional[Repository]) -> int:
    """Bytes that the next backup of a machine may have to store."""
    capacity = sum(disk.capacity_bytes for disk in machine.included)
    used = machine.values.get("summary.storage.committed")
    full = min(int(used), capacity) if used else capacity
    if repository is None or not Path(repository.vm(machine.vm.instance_uuid).path).is_dir():
        return full
    return int(full * _INCREMENTAL_SHARE) if repository.vm(machine.vm.instance_uuid).points() else full


def entities_of(
    machines: Sequence[Machine], root: Any, proxy_moids: Set[str], stub: Any, new_vm: bool = False
) -> List[Any]:
    """The objects that privileges are asked for on, each once.

    :param new_vm: those that a new machine beside each would need too.
    """
    found: Dict[str, Any] = {root._moId: root}
    for machine in machines:
        found[machine.vm.moid] = machine.vm.obj
        for store in machine.stores:
            found[store.moid] = vim.Datastore(store.moid, stub)
        values = machine.values
        around = [values.get("parent"), values.get("resourcePool"), *(values.get("network") or ())] if new_vm else []
        found.update({one._moId: one for one in around if one is not None})
    for moid in sorted(proxy_moids):
        found[moid] = vim.VirtualMachine(moid, stub)
    return list(found.values())


def severity_counts(checks: Sequence[Mapping[str, Any]]) -> Dict[str, int]:
    """How many checks came to what."""
    counts = dict.fromkeys((OK, WARNING, ERROR, NOT_CHECKED), 0)
    for check in checks:
        counts[check["severity"]] += 1
    return counts
