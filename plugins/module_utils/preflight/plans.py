# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""By which transport each disk would be read: the planner's word, made of the same facts as a backup's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

from ..errors import TransportError
from ..transport.facts import disk_facts, proxy_facts
from ..transport.planner import READ, DiskFacts, ProxyFacts, plan
from ..transport.vddk import Vddk
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from .request import PreflightRequest


@dataclass
class DiskOutcome:
    """The plan of one disk.

    :param chosen: the transport; None where none can work, and ``problem`` says why.
    :param candidates: as :meth:`..transport.planner.Candidate.to_result` gives them.
    """

    disk: Disk
    chosen: Optional[str] = None
    method: str = ""
    candidates: List[Dict[str, Any]] = field(default_factory=list)
    problem: Optional[TransportError] = None

    def usable(self) -> List[str]:
        return [candidate["transport"] for candidate in self.candidates if candidate["usable"]]

    def to_result(self) -> Dict[str, Any]:
        return {
            "key": self.disk.key,
            "label": self.disk.label,
            "file": self.disk.file,
            "datastore": self.disk.datastore,
            "capacity_bytes": self.disk.capacity_bytes,
            "included": self.disk.included,
            "skip_reason": self.disk.skip_reason,
            "transport": self.chosen,
            "method": self.method or None,
            "candidates": self.candidates,
        }


@dataclass
class Planned:
    """The plans of a virtual machine's disks, and what was seen of this machine.

    :param proxy_moid: this machine as a VM of that vCenter, where it is one and that was asked for.
    :param identity: how that was found out, in words.
    """

    disks: List[DiskOutcome]
    vddk: Optional[Vddk] = None
    vddk_problem: Optional[str] = None
    proxy_moid: Optional[str] = None
    identity: str = ""


def plan_disks(session: Session, vm: VmRef, disks: Sequence[Disk], request: PreflightRequest) -> Planned:
    """Plan the reading of each disk that a snapshot holds; a disk that nothing can read carries its problem.

    :raises VadpError: the facts can't be had.
    """
    known = disk_facts(session, vm, disks)
    proxy = proxy_facts(session, request, vm, known, needs_named_library=False)
    outcomes = [_outcome(disk, known[disk.key], proxy, request) for disk in disks]
    return Planned(outcomes, proxy.vddk, proxy.vddk_problem, proxy.vm.moid if proxy.vm else None, _identity(proxy))


def _identity(proxy: ProxyFacts) -> str:
    """Empty where nobody asked."""
    if not proxy.identity:
        return ""
    if proxy.vm is None:
        return f"no virtual machine of this vCenter: {proxy.identity}"
    return f"VM '{proxy.vm.name}' ({proxy.vm.moid}): {proxy.identity}"


def _outcome(disk: Disk, facts: DiskFacts, proxy: ProxyFacts, request: PreflightRequest) -> DiskOutcome:
    if not disk.included:
        return DiskOutcome(disk)
    try:
        made = plan(facts, proxy, request.transports, READ, request.require_transport)
    except TransportError as error:
        return DiskOutcome(disk, candidates=error.details.get("candidates", []), problem=error)
    return DiskOutcome(disk, made.chosen, made.method, [one.to_result() for one in made.candidates])
