# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which transport serves a disk, and why each of the others does not. Pure: facts in, a plan or an error out.

One small rule for each transport. A rule answers with the reasons against its transport; no reason means usable. A new
transport joins by its rule and by what the rule needs to know in :class:`DiskFacts` or :class:`ProxyFacts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence

from ..errors import InputError, TransportError
from .vddk import Vddk

READ = "read"
WRITE = "write"


@dataclass(frozen=True)
class DiskFacts:
    """What the rules know of a disk."""

    label: str
    file: str


@dataclass(frozen=True)
class ProxyFacts:
    """What the rules know of the machine that moves the data and of the server it talks to.

    :param vddk: the usable VDDK, or None.
    :param vddk_problem: why there is none, in a sentence that says what was looked for where.
    :param is_vcenter: the API is vCenter's; False for a direct login to an ESXi host.
    """

    vddk: Optional[Vddk] = None
    vddk_problem: Optional[str] = None
    is_vcenter: bool = True


@dataclass(frozen=True)
class Candidate:
    """One transport of the list: usable, or the reasons why it is not."""

    transport: str
    usable: bool
    reasons: List[str] = field(default_factory=list)

    def to_result(self) -> Dict[str, Any]:
        return {"transport": self.transport, "usable": self.usable, "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Plan:
    """All candidates in the order of preference, and the one that is taken."""

    candidates: List[Candidate]
    chosen: str

    def reasons(self) -> List[str]:
        """Why none of those before the chosen one was taken, a line each."""
        passed_over = []
        for candidate in self.candidates:
            if candidate.transport == self.chosen:
                break
            passed_over.append(f"{candidate.transport}: {'; '.join(candidate.reasons)}")
        return passed_over


Rule = Callable[[DiskFacts, ProxyFacts, str], List[str]]


def _nbd(disk: DiskFacts, proxy: ProxyFacts, direction: str) -> List[str]:
    # A direct login to an ESXi host is fine here, and so is every kind of datastore.
    if proxy.vddk is None:
        return [proxy.vddk_problem or "VDDK was not looked for on this machine"]
    return []


def _san(disk: DiskFacts, proxy: ProxyFacts, direction: str) -> List[str]:
    return ["this release does not read LUNs directly; it moves data by nbdssl and nbd"]


def _hotadd(disk: DiskFacts, proxy: ProxyFacts, direction: str) -> List[str]:
    reasons = ["this release does not attach disks to a proxy VM; it moves data by nbdssl and nbd"]
    if not proxy.is_vcenter:
        reasons.append("HotAdd needs vCenter; this is a direct login to an ESXi host")  # VADP facts 33
    return reasons


def _https(disk: DiskFacts, proxy: ProxyFacts, direction: str) -> List[str]:
    return ["this release does not move disks through the datastore's HTTPS access; it moves data by nbdssl and nbd"]


RULES: Dict[str, Rule] = {"san": _san, "hotadd": _hotadd, "nbdssl": _nbd, "nbd": _nbd, "https": _https}


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
    candidates = []
    for name in transports:
        reasons = RULES[name](disk, proxy, direction)
        candidates.append(Candidate(name, not reasons, reasons))
    eligible = candidates[:1] if require_transport else candidates
    for candidate in eligible:
        if candidate.usable:
            return Plan(candidates, candidate.transport)
    doing = "read" if direction == READ else "written"
    raise TransportError(
        f"The disk can't be {doing} by {'the required transport' if require_transport else 'any of the transports'}",
        subject=f"disk '{disk.label}' ({disk.file})",
        reason=_explain(eligible),
        remedy=_remedy(candidates, require_transport),
        details={"candidates": [candidate.to_result() for candidate in candidates]},
    )


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


def _remedy(candidates: Sequence[Candidate], require_transport: bool) -> str:
    others = [candidate.transport for candidate in candidates if candidate.usable]
    if require_transport and others:
        return f"Put {others[0]} first in 'transports', or set require_transport to false"
    if not any(name in ("nbdssl", "nbd") for name in (candidate.transport for candidate in candidates)):
        return "Add nbdssl to 'transports'"
    return "Make nbdssl work on this machine: see the reason given for it"
