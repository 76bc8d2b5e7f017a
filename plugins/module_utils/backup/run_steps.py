# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Steps of a run that a controller leads, each in a module of its own: what one needs of another stands in the record.

Nothing of it travels through results, where Ansible replaces what looks like a password by asterisks. The snapshot is
known by its moid and its marker, and never by its name (proofs 8).
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Mapping, Optional

from ..errors import InputError, NotFoundError, RepositoryError
from ..repository.layout import Repository
from ..repository.lock import LOCK_TIMEOUT
from ..repository.store import VmStore
from ..repository.runs import Run
from ..vsphere import change_tracking, snapshot_state
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from ..vsphere.snapshots import (
    Snapshot,
    consolidate_if_needed,
    consolidation_state,
    free_name,
    list_snapshots,
    marker_text,
    remove_snapshot,
)


@dataclass(frozen=True)
class Step:
    """A run as a step of it sees it. :param run: None in check mode where no run was begun."""

    session: Session
    store: VmStore
    run: Run
    vm: VmRef

    def ours(self, snapshots: List[Snapshot]) -> List[Snapshot]:
        """The snapshots of this run: they carry its marker, and what the record says of their moids (proofs 8)."""
        own = [snapshot for snapshot in snapshots if is_of_run(snapshot, self.store.repository.id, self.run.run_id)]
        return [snapshot for snapshot in own if not change_tracking.is_temporary(snapshot)]


def is_of_run(snapshot: Snapshot, repository_id: str, run_id: str) -> bool:
    """Whether a snapshot's marker names this run of this repository."""
    marker = snapshot.marker or {}
    return bool(marker.get("repository_id") == repository_id and marker.get("run_id") == run_id)


def check_options(repository: Optional[str], run_id: Optional[str]) -> None:
    """:raises InputError: one of both is given without the other."""
    if (repository is None) != (run_id is None):
        raise InputError(
            "A run is named by its repository and its id",
            reason=f"{'repository' if repository is None else 'run_id'} is missing",
            remedy="Give both, or none of them",
        )


def run_vm(session: Session, store: VmStore, run: Run) -> Optional[VmRef]:
    """The VM that a run is of, as its record names it; None where that is not certain.

    The moid is a shorter way to it than a name, which may have been changed meanwhile, and it comes from no result.
    """
    if run.data["vm_moid"] is None or run.data["server_uuid"] != session.server_uuid:
        return None
    try:
        vm = find_vm(session, moid=str(run.data["vm_moid"]))
    except NotFoundError:
        return None
    return vm if vm.instance_uuid.lower() == store.uuid else None


@contextmanager
def step(
    session: Session, repository: str, run_id: str, named: Mapping[str, Any], what: str, lock_timeout: float
) -> Iterator[Step]:
    """Work in a run, under its VM's lock; what is begun and left behind is remembered in its record.

    :param named: the options that name the VM, for a record of another server.
    :param lock_timeout: seconds to wait for the lock.
    :raises RepositoryError: there is no such run, or it is another VM's.
    """
    store, run = Repository.open(repository, writable=True).find_run(run_id)
    vm = run_vm(session, store, run) or find_vm(session, **named)
    if vm.instance_uuid.lower() != store.uuid:
        raise RepositoryError(
            "The run is another virtual machine's",
            subject=run_id,
            reason=f"it is of {store.shown}, and {vm} is named",
            remedy="Begin a run of that virtual machine with vadp_recover",
        )
    with store.lock(run_id, what, lock_timeout):
        # Under the lock it may say more than before.
        current = store.run(run_id)
        if current is None or current.old:
            raise RepositoryError("The run is over", subject=run_id, remedy="Begin another one with vadp_recover")
        with current.working(), session.remembering(current.remember_task):
            yield Step(session, store, current, vm)


def make_snapshot(step: Step, wanted: snapshot_state.Wanted) -> Dict[str, Any]:
    """The run's snapshot, made unless it is there. :returns: as module ``vm_snapshot`` does."""
    run, vm, session = step.run, step.vm, step.session
    if vm.template:
        return {"changed": False, "snapshot": None, "quiesce": None, "disks": [], "consolidated": False}
    tree = list_snapshots(session, vm)
    recorded = run.intents("snapshot")
    there = step.ours(tree)
    if there:
        intent = recorded[0]["id"] if recorded else run.record("snapshot", name=there[0].name, vm_moid=vm.moid)
        run.update(intent, moid=there[0].moid, server_uuid=session.server_uuid, vm_moid=vm.moid)
        found = replace(wanted, name=None, moid=there[0].moid)
        return snapshot_state.ensure(session, vm, found, check_mode=False)
    point = str(run.data["point"] or "")
    name = free_name(str(recorded[0]["name"]) if recorded else f"openvadp {point}"[:72], tree)
    intent = recorded[0]["id"] if recorded else run.record("snapshot", name=name, vm_moid=vm.moid)
    run.update(intent, name=name, moid=None, vm_moid=vm.moid)

    def made(moid: str) -> None:
        run.update(intent, moid=moid, server_uuid=session.server_uuid)

    description = marker_text(step.store.repository.id, run.run_id, point)
    asked = replace(wanted, name=name, moid=None, description=description)
    return snapshot_state.make(session, vm, asked, made)


def remove_run_snapshot(step: Step, wanted: snapshot_state.Wanted) -> Dict[str, Any]:
    """Remove the run's snapshot, and what is left of it; no other one. :returns: as module ``vm_snapshot`` does."""
    session, vm = step.session, step.vm
    result: Dict[str, Any] = {"changed": False, "snapshot": None, "disks": [], "consolidated": False}
    before = []
    if not vm.template:
        for snapshot in step.ours(list_snapshots(session, vm)):
            before.append(f"{snapshot}, made {snapshot.created}")
            result.update(changed=True, snapshot=snapshot.to_dict())
            if remove_snapshot(session, vm, snapshot, consolidate=wanted.consolidate, timeout=wanted.timeout):
                result["consolidated"] = True
        if not before and wanted.consolidate and consolidate_if_needed(session, vm, wanted.timeout):
            result.update(changed=True, consolidated=True)
    none = f"no snapshot of run {step.run.run_id}"
    result["diff"] = {"before": ("\n".join(before) or none) + "\n", "after": none + "\n"}
    return result


def ensure_snapshot(
    session: Session,
    repository: str,
    run_id: str,
    named: Mapping[str, Any],
    wanted: snapshot_state.Wanted,
    check_mode: bool,
    lock_timeout: float = LOCK_TIMEOUT,
) -> Dict[str, Any]:
    """All of ``vm_snapshot`` for a run."""
    if check_mode:
        return _predicted(session, repository, run_id, named, wanted)
    with step(session, repository, run_id, named, "vm_snapshot", lock_timeout) as work:
        return make_snapshot(work, wanted) if wanted.present else remove_run_snapshot(work, wanted)


def _predicted(
    session: Session, repository: str, run_id: str, named: Mapping[str, Any], wanted: snapshot_state.Wanted
) -> Dict[str, Any]:
    """Check mode: in a play that is in it as a whole, no run was begun, and no snapshot was made."""
    vm = find_vm(session, **named)
    if vm.template:
        return {"changed": False, "snapshot": None, "quiesce": None, "disks": [], "consolidated": False}
    if wanted.present:
        name = free_name("openvadp", list_snapshots(session, vm))
        return snapshot_state.ensure(session, vm, replace(wanted, name=name, moid=None), check_mode=True)
    repository_id = ""
    with suppress(RepositoryError):  # it does not exist yet, so there is no snapshot of it
        repository_id = Repository.open(repository).id
    there = [item for item in list_snapshots(session, vm) if is_of_run(item, repository_id, run_id)]
    consolidated = bool(wanted.consolidate and any(consolidation_state(session, vm)))
    return {
        "changed": bool(there) or consolidated,
        "snapshot": there[0].to_dict() if there else None,
        "disks": [],
        "consolidated": consolidated,
    }


def ensure_tracking(
    session: Session,
    repository: str,
    run_id: str,
    named: Mapping[str, Any],
    wanted: str,
    activate: bool,
    timeout: float,
    check_mode: bool,
    lock_timeout: float = LOCK_TIMEOUT,
    force: bool = False,
) -> Dict[str, Any]:
    """All of ``vm_change_tracking`` for a run: the snapshot of its stun cycle carries the ids of the run."""
    if check_mode:
        return change_tracking.ensure(session, find_vm(session, **named), wanted, activate, timeout, True, force=force)
    with step(session, repository, run_id, named, "vm_change_tracking", lock_timeout) as work:
        description = change_tracking.stun_description(repository_id=work.store.repository.id, run_id=run_id)
        return change_tracking.ensure(
            session, work.vm, wanted, activate, timeout, False, description=description, force=force
        )
