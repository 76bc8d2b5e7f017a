# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which transport serves a disk, and why each of the others does not. Pure: facts in, a plan or an error out.

One small rule for each transport. A rule answers with the ways in which its transport could do it: the first without a
reason against it is taken. A new transport joins by its rule and by what the rule needs to know in
:class:`DiskFacts` or :class:`ProxyFacts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import InputError, TransportError
from .vddk import Vddk, version_problem

if TYPE_CHECKING:
    from ..vsphere.inventory import VmRef

READ = "read"
WRITE = "write"

# How a transport does it: through VMware's library, or without it.
BY_VDDK = "vddk"
# Not a way, but what HotAdd by VDDK needs besides: a key of ``missing_privileges``.
RESERVING = "reserving"
BY_ATTACHING = "proxy_hotadd"
BY_FOLDER = "folder"
BY_LEASE = "export_lease"
BY_IMPORT = "import_lease"

_NFS = ("NFS", "NFS41")
_FILES_ARE_WHOLE = ("VMFS", *_NFS)


@dataclass(frozen=True)
class HostFacts:
    """An ESXi host. :param usable: it is connected and not in maintenance mode."""

    moid: str
    name: str
    usable: bool = True


@dataclass(frozen=True)
class DatastoreFacts:
    """A datastore.

    :param kind: ``summary.type``: VMFS, NFS, NFS41, vsan, VVOL, ...
    :param extents: canonical names of the LUNs of a VMFS datastore, ``naa.600...``.
    :param local: on a disk inside one host.
    :param hosts: that have it mounted and accessible.
    """

    moid: str
    name: str
    kind: str
    extents: Tuple[str, ...] = ()
    local: bool = False
    vmfs_major: Optional[int] = None
    hosts: Tuple[HostFacts, ...] = ()


@dataclass(frozen=True)
class VmFacts:
    """The virtual machine that a disk belongs to.

    :param snapshots: how many it has.
    :param new: it is about to be made.
    """

    moid: str
    name: str
    power_state: str = "poweredOff"
    template: bool = False
    encrypted: bool = False
    snapshots: int = 0
    datacenter_moid: str = ""
    host_moid: Optional[str] = None
    new: bool = False


@dataclass(frozen=True)
class DiskFacts:
    """What the rules know of a disk.

    :param controller: scsi, ide, sata, nvme.
    :param chained: what is read is not the base file alone: its backing has a parent.
    :param linked: that parent is another machine's: the disk is a linked clone.
    """

    label: str
    file: str
    capacity_bytes: int = 0
    controller: str = "scsi"
    thin: Optional[bool] = None
    encrypted: bool = False
    chained: bool = False
    linked: bool = False
    datastore: Optional[DatastoreFacts] = None
    vm: Optional[VmFacts] = None


@dataclass(frozen=True)
class ProxyVm:
    """This machine as a virtual machine of the same vCenter.

    :param datastores: moids of those that its host sees.
    :param enable_uuid: ``disk.EnableUUID`` is set, so that a disk can be told by its UUID (VADP facts 31).
    :param free_units: free places on its SCSI controllers.
    :param ref: what calls about it are made on; no rule looks at it.
    """

    moid: str
    name: str
    datacenter_moid: str
    host_moid: Optional[str] = None
    datastores: FrozenSet[str] = frozenset()
    encrypted: bool = False
    enable_uuid: bool = True
    free_units: int = 0
    can_add_controller: bool = False
    ref: Optional[VmRef] = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ProxyFacts:
    """What the rules know of the machine that moves the data and of the server it talks to.

    :param vddk: the usable VDDK, or None.
    :param vddk_problem: why there is none, in a sentence that says what was looked for where.
    :param is_vcenter: the API is vCenter's; False for a direct login to an ESXi host.
    :param server_version: "8.0.3"; None if it is not known.
    :param vm: this machine, if it is a virtual machine of that vCenter.
    :param identity: how that was found out, in words; where it is none, why.
    :param luns: canonical name -> path of the device, of all that this machine sees.
    :param lun_problems: canonical name -> why nobody should go near it.
    :param plugins: of nbdkit, as far as they are here: vddk, file, curl.
    :param missing_privileges: transport or method -> privileges that the user lacks for it.
    """

    vddk: Optional[Vddk] = None
    vddk_problem: Optional[str] = None
    is_vcenter: bool = True
    server_version: Optional[str] = None
    vm: Optional[ProxyVm] = None
    identity: str = ""
    luns: Mapping[str, str] = field(default_factory=dict)
    lun_problems: Mapping[str, str] = field(default_factory=dict)
    plugins: FrozenSet[str] = frozenset()
    missing_privileges: Mapping[str, Tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One transport of the list: usable, or the reasons why it is not.

    :param method: how it does it; empty for one that is not usable.
    :param notes: what it costs.
    """

    transport: str
    usable: bool
    reasons: List[str] = field(default_factory=list)
    method: str = ""
    notes: List[str] = field(default_factory=list)

    def to_result(self) -> Dict[str, Any]:
        return {
            "transport": self.transport,
            "usable": self.usable,
            "reasons": list(self.reasons),
            "method": self.method,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Plan:
    """All candidates in the order of preference, and the one that is taken.

    :param eligible: how many of them may be taken: with ``require_transport`` the first alone.
    """

    candidates: List[Candidate]
    chosen: str
    method: str = ""
    eligible: Optional[int] = None

    def usable(self) -> List[Candidate]:
        """What may be tried, one after the other."""
        return [candidate for candidate in self.candidates[: self.eligible] if candidate.usable]

    def reasons(self, used: Optional[str] = None, failed: Optional[Mapping[str, str]] = None) -> List[str]:
        """Why none of those before the one that was used was, a line each.

        :param used: the transport that did it in the end; the chosen one if None.
        :param failed: transport -> why it did not do it, although it was usable.
        """
        lines = []
        for candidate in self.candidates:
            if candidate.transport == (used or self.chosen):
                break
            reasons = candidate.reasons
            if failed and candidate.transport in failed:
                reasons = [failed[candidate.transport]]
            lines.append(f"{candidate.transport}: {'; '.join(reasons)}")
        return lines

    def notes(self, transport: str) -> List[str]:
        """What a transport of the plan costs."""
        return [note for item in self.candidates if item.transport == transport for note in item.notes]


class Way(NamedTuple):
    """How a transport could do it, what speaks against it, and what it costs."""

    method: str
    reasons: List[str]
    notes: List[str] = []  # noqa: RUF012 - a default that nobody changes


Rule = Callable[[DiskFacts, ProxyFacts, str, bool], List[Way]]


# What several rules ask


def _vddk(disk: DiskFacts, proxy: ProxyFacts) -> List[str]:
    """What speaks against everything that goes through VDDK."""
    if proxy.vddk is None:
        return [proxy.vddk_problem or "VDDK was not looked for on this machine"]
    problem = version_problem(proxy.vddk.version, proxy.server_version or "")
    reasons = [problem] if problem else []
    if disk.vm is not None and disk.vm.template:
        reasons.append(f"'{disk.vm.name}' is a template, and VDDK opens no template")
    return reasons + _privileges(proxy, BY_VDDK)


def _privileges(proxy: ProxyFacts, name: str) -> List[str]:
    """:param name: of a transport or of a method."""
    missing = sorted(proxy.missing_privileges.get(name, ()))
    return [f"the user lacks the privilege{'s' * (len(missing) > 1)} {', '.join(missing)}"] if missing else []


def _hosts(disk: DiskFacts) -> List[str]:
    """At least one host must be able to serve the disk."""
    datastore = disk.datastore
    if datastore is None or not datastore.hosts or any(host.usable for host in datastore.hosts):
        return []
    names = ", ".join(host.name for host in datastore.hosts)
    return [f"no ESXi host with datastore '{datastore.name}' can serve now ({names}: disconnected or in maintenance)"]


def _is_encrypted(disk: DiskFacts) -> bool:
    return disk.encrypted or (disk.vm is not None and disk.vm.encrypted)


def _not_at_rest(disk: DiskFacts) -> List[str]:
    """What speaks against writing: it goes to the leaf of a powered-off VM without snapshots (VADP facts 29, 40)."""
    vm = disk.vm
    reasons = []
    if vm is not None and vm.power_state != "poweredOff":
        reasons.append(f"'{vm.name}' is {vm.power_state}, and only a powered-off virtual machine is written")
    # The leaf of a linked clone is the clone's own; nobody writes to what it stands on.
    if (vm is not None and vm.snapshots) or (disk.chained and not disk.linked):
        reasons.append("the disk has a snapshot chain, and only a disk without one is written")
    return reasons


# The rules


def _nbd(disk: DiskFacts, proxy: ProxyFacts, direction: str, first: bool) -> List[Way]:
    """Any datastore, also by a direct login to an ESXi host: the host reads it and sends it.

    A host that can't serve now may do so while the open is tried again, so that is no reason against it.
    """
    reasons = _vddk(disk, proxy)
    if direction == WRITE:
        reasons += _not_at_rest(disk)
    return [Way(BY_VDDK, reasons, _hosts(disk))]


def _plain_nbd(disk: DiskFacts, proxy: ProxyFacts, direction: str, first: bool) -> List[Way]:
    plain = "the data crosses the network in plain text"
    return [way._replace(notes=[plain, *way.notes]) for way in _nbd(disk, proxy, direction, first)]


def _san(disk: DiskFacts, proxy: ProxyFacts, direction: str, first: bool) -> List[Way]:
    """VADP facts 34 to 36."""
    reasons = _vddk(disk, proxy) + _lun(disk, proxy)
    if _is_encrypted(disk):
        reasons.append("the disk is encrypted, and its LUN holds ciphertext")
    if proxy.vddk is not None and disk.datastore is not None:
        version = proxy.vddk.version
        problem = version_problem(version, proxy.server_version or version, disk.datastore.vmfs_major)
        if problem and problem not in reasons:
            reasons.append(problem)
    if direction == WRITE:
        if not first:
            reasons.append("a LUN is written only where san stands first in 'transports': restores go over the LAN")
        if disk.thin is not False:
            state = "the disk is thin" if disk.thin else "whether the disk is thin is not known"
            reasons.append(f"only thick disks are written over SAN, and {state}")
        if disk.linked:
            reasons.append("the disk is a linked clone, which VMware does not let SAN write")
        reasons += _not_at_rest(disk)
    return [Way(BY_VDDK, reasons)]


def _lun(disk: DiskFacts, proxy: ProxyFacts) -> List[str]:
    """Whether this machine sees what the disk lies on, and may go near it."""
    datastore = disk.datastore
    if datastore is None:
        return ["what its datastore lies on is not known"]
    name = f"datastore '{datastore.name}'"
    if datastore.kind.lower() == "vsan":
        return [f"{name} is vSAN, which has no LUN"]
    if datastore.kind.upper() == "VVOL":
        return [f"{name} is a vVol datastore, whose volumes no proxy can see"]
    if datastore.kind in _NFS:
        return [f"{name} is {datastore.kind}, which has no LUN"]
    if datastore.kind != "VMFS":
        return [f"{name} is {datastore.kind}, and only VMFS lies on LUNs"]
    if datastore.local:
        return [f"{name} is local to one ESXi host"]
    if not datastore.extents:
        return [f"vCenter does not say on which LUN {name} lies"]
    unseen = [extent for extent in datastore.extents if extent not in proxy.luns]
    if unseen:
        reason = f"this machine does not see LUN {', '.join(unseen)} of {name}"
        if proxy.vm is not None:
            reason += f" (it is the virtual machine '{proxy.vm.name}')"
        return [reason]
    return [
        f"LUN {extent} of {name} must not be touched: {proxy.lun_problems[extent]}"
        for extent in datastore.extents
        if extent in proxy.lun_problems
    ]


def _hotadd(disk: DiskFacts, proxy: ProxyFacts, direction: str, first: bool) -> List[Way]:
    """VADP facts 28, 29, 33. VDDK's own where it can, else nbdkit's file plugin on a disk that we attach."""
    reasons = _attachable(disk, proxy)
    if direction == WRITE:
        reasons += _not_at_rest(disk)
    notes = _hotadd_notes(disk, proxy)
    by_vddk, by_us = _vddk(disk, proxy) + _privileges(proxy, RESERVING), []
    if proxy.vm is not None and proxy.vm.free_units < 1:
        taken = f"all SCSI units of '{proxy.vm.name}' are taken"
        by_vddk.append(taken)
        if not proxy.vm.can_add_controller:
            by_us.append(f"{taken}, and it can have no more controllers")
    if "file" not in proxy.plugins:
        by_us.append("nbdkit's file plugin is not installed")
    if disk.vm is not None and disk.vm.template:
        by_us.append(f"'{disk.vm.name}' is a template, whose disks are not attached")
    return [
        Way(BY_VDDK, reasons + by_vddk, notes),
        Way(BY_ATTACHING, reasons + by_us + _privileges(proxy, BY_ATTACHING), notes),
    ]


def _attachable(disk: DiskFacts, proxy: ProxyFacts) -> List[str]:
    """What speaks against attaching the disk to this machine, whoever does it."""
    if not proxy.is_vcenter:
        return ["HotAdd needs vCenter, and this is a direct login to an ESXi host"]
    machine = proxy.vm
    if machine is None:
        return [f"this machine is not a virtual machine of this vCenter{': ' * bool(proxy.identity)}{proxy.identity}"]
    if disk.vm is None or disk.datastore is None:
        return ["where the disk lies is not known"]
    reasons = []
    if disk.vm.moid == machine.moid:
        reasons.append("it is a disk of the proxy itself")
    if disk.vm.datacenter_moid != machine.datacenter_moid:
        reasons.append(f"the proxy '{machine.name}' is in another datacenter than '{disk.vm.name}'")
    elif disk.datastore.moid not in machine.datastores:
        kind = " (vSAN)" if disk.datastore.kind.lower() == "vsan" else ""
        reasons.append(f"the host of the proxy '{machine.name}' does not see datastore '{disk.datastore.name}'{kind}")
    if disk.controller == "ide":
        reasons.append("the disk is on an IDE controller")
    if _is_encrypted(disk) and not machine.encrypted:
        reasons.append(f"the disk is encrypted, and the proxy '{machine.name}' is not")
    if not machine.enable_uuid:
        reasons.append(f"disk.EnableUUID is not set on the proxy '{machine.name}'")
    return reasons


def _hotadd_notes(disk: DiskFacts, proxy: ProxyFacts) -> List[str]:
    notes = []
    if disk.controller in ("sata", "nvme"):
        notes.append(f"it is not documented whether a disk of a {disk.controller.upper()} controller can be hot-added")
    machine, vm, datastore = proxy.vm, disk.vm, disk.datastore
    if machine is None or vm is None or datastore is None:
        return notes
    if datastore.kind == "NFS" and vm.power_state == "poweredOn" and vm.host_moid != machine.host_moid:
        # VADP facts 32
        notes.append(
            f"on NFS a proxy on another host than '{vm.name}' makes that machine stand still for long when the"
            " snapshot is removed (before ESXi 8.0 U2b)"
        )
    return notes


def _https(disk: DiskFacts, proxy: ProxyFacts, direction: str, first: bool) -> List[Way]:
    """VADP facts 50, 51: the base file of a disk at rest, else the snapshot's export lease; a new machine whole."""
    if direction == WRITE:
        return [_import(disk, proxy)]
    if disk.vm is None or disk.datastore is None:
        return [Way(BY_FOLDER, ["where the disk lies and whether its virtual machine runs is not known"])]
    if _is_encrypted(disk):
        return [Way(BY_FOLDER, ["the disk is encrypted, and its files are ciphertext"])]
    return [
        Way(BY_FOLDER, _folder(disk, proxy) + _hosts(disk) + _privileges(proxy, BY_FOLDER)),
        Way(
            BY_LEASE,
            _lease(disk) + _hosts(disk) + _privileges(proxy, BY_LEASE),
            [
                "the whole disk crosses the network, whatever changed, and waits in a file beside the repository's",
                f"'{disk.vm.name}' can't be migrated or powered on meanwhile",
            ],
        ),
    ]


def _import(disk: DiskFacts, proxy: ProxyFacts) -> Way:
    """The lease that a new machine comes by, with all its disks."""
    if disk.vm is None or not disk.vm.new:
        return Way(
            BY_IMPORT,
            [
                "existing disks are not written by HTTPS, which only brings a new machine with its disks: use hotadd,"
                " nbdssl or nbd"
            ],
        )
    return Way(
        BY_IMPORT,
        _hosts(disk) + _privileges(proxy, BY_IMPORT),
        [
            "the whole disk crosses the network, compressed, and waits in a file beside the repository's",
            f"'{disk.vm.name}' can't be powered on, moved or removed until all its disks are there",
            "where that is broken off vSphere removes the machine, whatever on_failure says",
        ],
    )


def _folder(disk: DiskFacts, proxy: ProxyFacts) -> List[str]:
    reasons = []
    vm, datastore = disk.vm, disk.datastore
    if vm is not None and not vm.template and vm.power_state != "poweredOff":
        reasons.append(f"'{vm.name}' is {vm.power_state}, and ESXi gives no file of a running machine's disks")
    if disk.chained:
        reasons.append("the disk has a snapshot chain, and its base file is old")
    if datastore is not None and datastore.kind not in _FILES_ARE_WHOLE:
        reasons.append(f"datastore '{datastore.name}' is {datastore.kind}, where a disk is not a file")
    if "curl" not in proxy.plugins:
        reasons.append("nbdkit's curl plugin is not installed")
    return reasons


def _lease(disk: DiskFacts) -> List[str]:
    if disk.vm is not None and disk.vm.template:
        return [f"'{disk.vm.name}' is a template, which has no snapshot to export"]
    return []


RULES: Dict[str, Rule] = {"san": _san, "hotadd": _hotadd, "nbdssl": _nbd, "nbd": _plain_nbd, "https": _https}


def consider(disk: DiskFacts, proxy: ProxyFacts, transports: Sequence[str], direction: str) -> List[Candidate]:
    """Every transport of the list, usable or not; see :func:`plan`."""
    candidates = []
    for number, name in enumerate(transports):
        lacking = _privileges(proxy, name)
        ways = RULES[name](disk, proxy, direction, number == 0)
        ways = [way._replace(reasons=way.reasons + lacking) for way in ways]
        possible = next((way for way in ways if not way.reasons), None)
        if possible is None:
            candidates.append(Candidate(name, False, _joined(ways)))
            continue
        preferred = ways[0]
        notes = list(possible.notes)
        if possible is not preferred:
            notes.insert(0, f"not by {_METHODS[preferred.method]}: {'; '.join(preferred.reasons)}")
        candidates.append(Candidate(name, True, [], possible.method, notes))
    return candidates


_METHODS = {
    BY_VDDK: "VDDK",
    BY_ATTACHING: "attaching the disk",
    BY_FOLDER: "the datastore's files",
    BY_LEASE: "an export lease",
    BY_IMPORT: "an import lease",
}


def _joined(ways: Sequence[Way]) -> List[str]:
    """The reasons against all ways: what they share once, the rest by the way it stands against."""
    shared = [reason for reason in ways[0].reasons if all(reason in way.reasons for way in ways)]
    if shared or len(ways) == 1:
        return shared or ways[0].reasons
    return [f"{_METHODS[way.method]}: {', '.join(way.reasons)}" for way in ways]


def plan(
    disk: DiskFacts, proxy: ProxyFacts, transports: Sequence[str], direction: str, require_transport: bool
) -> Plan:
    """The first of *transports* that can serve *disk*.

    :param transports: names in the order of preference; each once.
    :param direction: ``read`` or ``write``.
    :param require_transport: only the first of *transports* will do.
    :raises InputError: *transports* is empty, names one twice or an unknown one.
    :raises TransportError: none can work, or the required one can't; the message has every reason, ``details`` too.
    """
    check_transports(transports)
    candidates = consider(disk, proxy, transports, direction)
    eligible = candidates[:1] if require_transport else candidates
    for candidate in eligible:
        if candidate.usable:
            return Plan(candidates, candidate.transport, candidate.method, len(eligible))
    doing = "read" if direction == READ else "written"
    raise TransportError(
        f"The disk can't be {doing} by {'the required transport' if require_transport else 'any of the transports'}",
        subject=f"disk '{disk.label}' ({disk.file})",
        reason=_explain(eligible),
        remedy=_remedy(disk, candidates, direction, require_transport),
        details={"candidates": [candidate.to_result() for candidate in candidates]},
    )


def plan_new_machine(plans: Mapping[int, Plan], labels: Mapping[int, str]) -> Dict[int, Plan]:
    """The plans of a new machine's disks, made one: an import lease brings all of them or none.

    :param plans: of :func:`plan`, by device key.
    :param labels: device key -> what the disk is called.
    """
    leased = [key for key, one in plans.items() if one.method == BY_IMPORT]
    if not leased or len(leased) == len(plans):
        return dict(plans)
    why = (
        f"disk '{labels[leased[0]]}' can only be written by https, and an import lease brings all disks of the machine"
    )
    return {key: one if one.method == BY_IMPORT else _leased(one, why) for key, one in plans.items()}


def _leased(one: Plan, why: str) -> Plan:
    """A plan in which nothing before the import lease can be used."""
    candidates = list(one.candidates)
    for number, candidate in enumerate(candidates[: one.eligible]):
        if candidate.method == BY_IMPORT:
            return Plan(candidates, candidate.transport, candidate.method, one.eligible)
        if candidate.usable:
            candidates[number] = Candidate(candidate.transport, False, [why])
    raise TransportError(
        "The disks of the new machine can't be written by one transport",
        reason=f"{why}; this one can't be written by it",
        remedy="Make one of the transports work for all disks: the reasons are in the plan of check mode",
    )


def by_import(plans: Mapping[int, Plan], why: str) -> Optional[Dict[int, Plan]]:
    """The same plans by import lease, where what stands before it has failed; None where they don't allow that."""
    try:
        return {key: _leased(one, why) for key, one in plans.items()}
    except TransportError:
        return None


def check_transports(transports: Sequence[str]) -> None:
    """:raises InputError: the list is empty, names a transport twice or an unknown one."""
    if not transports:
        raise InputError("No transport is allowed", reason="the list 'transports' is empty", remedy="Name at least one")
    unknown = [name for name in transports if name not in RULES]
    if unknown:
        raise InputError(
            "A transport is not known", subject=", ".join(unknown), remedy=f"Choose from {', '.join(RULES)}"
        )
    twice = sorted({name for name in transports if list(transports).count(name) > 1})
    if twice:
        raise InputError("A transport is listed twice", subject=", ".join(twice), remedy="Name each once")


def _explain(candidates: Sequence[Candidate]) -> str:
    """Reasons in one line; transports with the same reasons are named together."""
    groups: Dict[str, List[str]] = {}
    for candidate in candidates:
        groups.setdefault("; ".join(candidate.reasons), []).append(candidate.transport)
    return " | ".join(f"{', '.join(names)}: {reasons}" for reasons, names in groups.items())


def _remedy(disk: DiskFacts, candidates: Sequence[Candidate], direction: str, require_transport: bool) -> str:
    others = [candidate.transport for candidate in candidates if candidate.usable]
    if require_transport and others:
        return f"Put {others[0]} first in 'transports', or set require_transport to false"
    if direction == READ and disk.vm is not None and disk.vm.template:
        if any(candidate.transport == "https" for candidate in candidates):
            return "Make https work, which alone reads a template: see the reason given for it"
        return "Add https to 'transports': only that reads a template"
    if not any(name in ("nbdssl", "nbd") for name in (candidate.transport for candidate in candidates)):
        if disk.vm is not None and disk.vm.new and all(candidate.transport != "https" for candidate in candidates):
            return "Add nbdssl to 'transports'; or https, which brings a new machine without VDDK"
        return "Add nbdssl to 'transports'"
    return "Make nbdssl work on this machine: see the reason given for it"
