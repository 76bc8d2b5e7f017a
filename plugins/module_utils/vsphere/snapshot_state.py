# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A snapshot exists, or it does not: all of module ``vm_snapshot`` but its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional

from ..errors import NotFoundError, VsphereError
from . import snapshots
from .disks import disks_of
from .inventory import VmRef
from .session import Session, check_timeout
from .snapshots import Snapshot


@dataclass
class Wanted:
    """Options of ``vm_snapshot``; one of *name* and *moid* is set, unless it is the snapshot of a run."""

    present: bool
    name: Optional[str]
    moid: Optional[str]
    description: str
    quiesce: str
    memory: bool
    remove_children: bool
    consolidate: bool
    timeout: float

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> Wanted:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        return cls(
            present=params["state"] == "present",
            name=params["snapshot_name"],
            moid=params["snapshot_moid"],
            description=params["description"] or "",
            quiesce=params["quiesce"],
            memory=params["memory"],
            remove_children=params["remove_children"],
            consolidate=params["consolidate"],
            timeout=check_timeout(params["timeout"]),
        )


def ensure(session: Session, vm: VmRef, wanted: Wanted, check_mode: bool) -> Dict[str, Any]:
    """Reach the wanted state and return the module's result, ``diff`` included. Check mode makes no changing call."""
    if wanted.present:
        return _present(session, vm, wanted, check_mode)
    return _absent(session, vm, wanted, check_mode)


def _present(session: Session, vm: VmRef, wanted: Wanted, check_mode: bool) -> Dict[str, Any]:
    state = snapshots.vm_state(session, vm)
    existing = snapshots.pick_snapshot(state.snapshots, vm, wanted.moid, wanted.name)
    result: Dict[str, Any] = {"changed": False, "consolidated": False}
    if existing is not None:
        _require_quiesced(existing, vm, wanted)
        quiesce = snapshots.Quiesce(
            wanted.quiesce,
            "quiesced" if existing.quiesced else "crash-consistent",
            "the snapshot was there already; what was achieved is judged by the option it was made with",
        )
        held = snapshots.snapshot_disks(session, existing)
        result.update(snapshot=existing.to_dict(), disks=[disk.to_dict() for disk in held], quiesce=quiesce.to_dict())
        result["diff"] = _diff(_words(existing), _words(existing))
        return result
    if wanted.name is None:
        raise NotFoundError(
            "There is no such snapshot",
            subject=f"{wanted.moid} of {vm}",
            reason="a snapshot can't be made under a given moid",
            remedy="Use snapshot_name",
        )
    if check_mode:
        snapshots.check_can_snapshot(vm, state)
        quiesce = snapshots.plan_quiesce(vm, wanted.quiesce, state.power_state, state.tools_running)
        disks = [disk.to_dict() for disk in disks_of(state.devices)]
        for disk in disks:
            # Only the snapshot's change ID counts, and there is none yet (VADP facts 3).
            disk["change_id"] = None
        predicted = {
            "moid": None,
            "name": wanted.name,
            "description": wanted.description,
            "created": None,
            "quiesced": quiesce.achieved == "quiesced",
        }
        result.update(snapshot=predicted, disks=disks)
    else:
        return make(session, vm, wanted, None, state)
    return _made(vm, wanted, quiesce, result)


def _require_quiesced(existing: Snapshot, vm: VmRef, wanted: Wanted) -> None:
    """:raises VsphereError: a quiesced one is demanded, and this is not. That the machine was off then is nowhere."""
    if wanted.quiesce == "required" and not existing.quiesced:
        raise VsphereError(
            "The existing snapshot was not quiesced",
            subject=f"{existing} of {vm}",
            reason="quiesce is required, and the snapshot was made without it",
            remedy="Choose another name, remove the snapshot, or use quiesce: preferred",
        )


def make(
    session: Session,
    vm: VmRef,
    wanted: Wanted,
    on_made: Optional[Callable[[str], None]],
    state: Optional[snapshots.VmState] = None,
) -> Dict[str, Any]:
    """Make the snapshot that is wanted, whatever there is of its name. :returns: the module's result.

    :param on_made: gets the moid before anything else is done.
    """
    made = snapshots.create_snapshot(
        session,
        vm,
        wanted.name or "",
        wanted.description,
        wanted.quiesce,
        wanted.memory,
        wanted.timeout,
        state,
        on_made=on_made,
    )
    held = [disk.to_dict() for disk in made.disks]
    result = {"changed": False, "consolidated": False, "snapshot": made.snapshot.to_dict(), "disks": held}
    return _made(vm, wanted, made.quiesce, result)


def _made(vm: VmRef, wanted: Wanted, quiesce: snapshots.Quiesce, result: Dict[str, Any]) -> Dict[str, Any]:
    result.update(changed=True, quiesce=quiesce.to_dict())
    if wanted.quiesce == "preferred" and quiesce.achieved == "crash-consistent":
        result["warnings"] = [f"The snapshot of {vm} is crash-consistent only: {quiesce.reason}."]
    result["diff"] = _diff(
        f"no snapshot '{wanted.name}'", f"snapshot '{wanted.name}', {quiesce.achieved}, memory: {wanted.memory}"
    )
    return result


def _absent(session: Session, vm: VmRef, wanted: Wanted, check_mode: bool) -> Dict[str, Any]:
    tree = snapshots.list_snapshots(session, vm)
    existing = snapshots.pick_snapshot(tree, vm, wanted.moid, wanted.name)
    label = f"snapshot '{wanted.name}'" if wanted.moid is None else f"snapshot {wanted.moid}"
    result: Dict[str, Any] = {"changed": False, "snapshot": None, "disks": [], "consolidated": False}
    if existing is not None:
        going = [existing] + (_descendants(tree, existing) if wanted.remove_children else [])
        result.update(changed=True, snapshot=existing.to_dict())
        if not check_mode:
            result["consolidated"] = snapshots.remove_snapshot(
                session, vm, existing, wanted.remove_children, wanted.consolidate, wanted.timeout
            )
        result["diff"] = _diff("\n".join(_words(item) for item in going), f"no {label}")
        return result
    result["diff"] = _diff(f"no {label}", f"no {label}")
    if wanted.consolidate:
        if check_mode:
            needed, leftover = snapshots.consolidation_state(session, vm, renew=False)
            consolidated = bool(needed or leftover)
        else:
            consolidated = snapshots.consolidate_if_needed(session, vm, wanted.timeout)
        if consolidated:
            result.update(changed=True, consolidated=True)
            result["diff"] = _diff(f"no {label}, delta files to consolidate", f"no {label}, disks consolidated")
    return result


def _descendants(tree: List[Snapshot], top: Snapshot) -> List[Snapshot]:
    """The snapshots below *top*; the tree lists parents first."""
    below = {top.moid}
    found = []
    for item in tree:
        if item.parent_moid in below:
            below.add(item.moid)
            found.append(item)
    return found


def _words(snapshot: Snapshot) -> str:
    return f"{snapshot}, made {snapshot.created}"


def _diff(before: str, after: str) -> Dict[str, str]:
    return {"before": before + "\n", "after": after + "\n"}
