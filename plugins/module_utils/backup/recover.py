# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The whole of ``vadp_recover``: recovery, and the beginning and the end of a run of several modules.

All of it happens under the VM's lock. What is done about leftovers is in :mod:`.leftovers`.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..errors import InputError, LockedError, NotFoundError, RepositoryError, VadpError
from ..repository import trust
from ..repository.layout import Repository
from ..repository.lock import LOCK_TIMEOUT, check_lock_timeout
from ..repository.names import check_point_name, check_run_id, check_uuid, new_point_name
from ..repository.store import VmStore
from ..repository.runs import Run, new_run_id
from ..transport.facts import VDDK_TRANSPORTS
from ..transport.vddk import look_for_library, named_library_error
from ..vsphere import vm_keys
from ..vsphere.disks import disks_of
from ..vsphere.inventory import VmRef, find_vm, require_only_one, vm_selection
from ..vsphere.session import Connection, Session
from ..vsphere.snapshots import marker_text, vm_state, what_is_left
from . import access, naming
from .leftovers import DEVICE_DIR, SYSFS_DIR, Recovery, recover, would_end
from .marks import Seen, before_snapshot, look
from .request import ExportRequest, parse_rate
from .run_steps import run_vm
from .selection import refuse_unfit

_SNAPSHOT_NAME_LIMIT = 80


@dataclass(frozen=True)
class RecoverRequest:
    """The options of ``vadp_recover``.

    :param disks: and *exclude_disks*: those of the export that is to follow in the run that is begun.
    """

    connection: Connection
    vm: Mapping[str, Any]
    repository: str
    begin: bool = False
    point: Optional[str] = None
    run_id: Optional[str] = None
    force: bool = False
    access: bool = False
    disks: Optional[Sequence[str]] = None
    exclude_disks: Sequence[str] = ()
    vddk_libdir: Optional[str] = None
    device_dir: str = DEVICE_DIR
    sysfs_dir: str = SYSFS_DIR
    create: bool = False
    adopt: Optional[str] = None
    lock_timeout: int = LOCK_TIMEOUT

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> RecoverRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        if params["point"] is not None:
            if not params["begin"]:
                raise InputError(
                    "A point is named, but no run is begun", remedy="Set begin to true, or leave point out"
                )
            check_point_name(params["point"])
        if params["run_id"] is not None:
            check_run_id(params["run_id"])
        check_lock_timeout(params["lock_timeout"])
        names = {field.name for field in fields(cls)} - {"connection", "vm", "disks", "exclude_disks"}
        export = params["export"] or {}
        request = cls(
            connection=Connection.from_params(params),
            vm=vm_selection(params),
            disks=export.get("disks"),
            exclude_disks=export.get("exclude_disks") or (),
            **{name: params[name] for name in names},
        )
        if params["export"] is not None:
            request.check_export(params["export"])
        return request

    def check_export(self, options: Mapping[str, Any]) -> None:
        """:raises InputError: the export of the run would refuse these options; those that are None are not given.
        :raises TransportError: the VDDK that is named can't be used.
        """
        if not self.begin:
            raise InputError(
                "An export is described, but no run is begun", remedy="Set begin to true, or leave export out"
            )
        given = {name: value for name, value in options.items() if value is not None}
        if self.vddk_libdir and not set(VDDK_TRANSPORTS).isdisjoint(given.get("transports", VDDK_TRANSPORTS)):
            vddk, problem = look_for_library(self.vddk_libdir)
            if vddk is None:
                raise named_library_error(self.vddk_libdir, problem)
        if "rate_limit" in given:
            given["rate_limit"] = parse_rate(given["rate_limit"])
        ExportRequest(
            self.connection, self.vm, self.repository, device_dir=self.device_dir, sysfs_dir=self.sysfs_dir, **given
        ).check()


@dataclass(frozen=True)
class _About:
    """The virtual machine that a run is begun for."""

    vm: VmRef
    seen: Seen

    def refuse_unfit(self, request: RecoverRequest) -> None:
        """:raises VadpError: it can't be backed up, or none of its disks would be."""
        refuse_unfit(self.vm, self.seen.devices, request.disks, request.exclude_disks)


def recover_vm(request: RecoverRequest, check_mode: bool) -> Dict[str, Any]:
    """The whole of ``vadp_recover``: {changed, recovered, report_only, run, warnings}.

    :raises LockedError: another run is at work on this VM.
    :raises VadpError: something of ours could not be removed; what stands before it in the order is gone. A run that
        was to be ended is over all the same, so that the next recovery need not wait for its deadline.
    """
    try:
        return _recover_vm(request, check_mode)
    except VadpError:
        if request.run_id is not None and not request.begin and not check_mode:
            _end_without_recovery(request, request.run_id)
        raise


def _end_without_recovery(request: RecoverRequest, run_id: str) -> None:
    """Its leader has said that the run is over, though nothing of it could be looked for."""
    with suppress(VadpError):
        store, _run = Repository.open(request.repository, writable=True).find_run(run_id)
        with store.lock(run_id, "vadp_recover"):
            _end(store, run_id)


def _recover_vm(request: RecoverRequest, check_mode: bool) -> Dict[str, Any]:
    with Session.connect(request.connection) as session:
        vm, uuid = _find(session, request)
        begun = _About(vm, look(session, vm)) if request.begin and vm is not None else None
        if begun is not None:
            require_only_one(session, begun.vm)
            if request.point is None:
                begun.refuse_unfit(request)
        store = _store(request, uuid, check_mode)
        # Of a point that exists nothing is read, whatever the disks are now.
        if begun is not None and request.point is not None and (store is None or store.point(request.point) is None):
            begun.refuse_unfit(request)
        if check_mode or store is None or (store.report_only and not request.begin):
            return _look_only(session, store, vm, request, check_mode, begun)
        told = store.repository.done + store.repository.warnings
        made = store.repository.created or bool(store.repository.done)
        store.repository.note_machine()
        if not request.begin and not store.path.is_dir():
            return {"changed": made, "recovered": [], "report_only": False, "run": None, "warnings": told}
        with store.lock(request.run_id or new_run_id(), "vadp_recover", request.lock_timeout):
            ending = None if request.begin or request.run_id is None else request.run_id
            warnings = [] if ending else store.refuse_busy(force=request.force)
            if ending is None and vm is not None:
                _doubt_copies(session, store, vm)
            facts = None if ending is None else _facts_of(store, vm, ending)
            if ending is not None:
                _end(store, ending)
            recovery = _recover(session, store, vm, request, ending)
            warnings = told + store.doubts + warnings + recovery.told
            if request.begin:
                _require_still_there(vm, recovery)
            run: Optional[Dict[str, Any]] = None
            if begun is not None:
                run = _begin(session, store, begun, request, looked_before=not recovery.found)
            elif facts is not None:
                run = dict(facts, **_proof(session, store, vm, str(ending), facts))
            begins = begun is not None and run is not None and not run["complete"]
            acted = bool(recovery.found) and not store.report_only
            return {
                "changed": made or acted or (recovery.ended > 0 and ending is None) or begins,
                "recovered": recovery.found,
                "report_only": store.report_only,
                "run": run,
                "warnings": warnings,
            }


def forget_repository(params: Dict[str, Any], check_mode: bool) -> Dict[str, Any]:
    """``vadp_recover`` with ``forget_repository``: as :func:`recover_vm`, and ``forgotten``, the keys that went.

    :raises InputError: that is not a repository's ID. VadpError: the keys can't be read or written.
    """
    if params["begin"] or params["repository"] is not None:
        raise InputError(
            "A repository is to be forgotten, and something else to be done",
            subject=str(params["forget_repository"]),
            remedy="Give forget_repository with the virtual machine and the connection alone",
        )
    repository_id = check_uuid(params["forget_repository"])
    with Session.connect(Connection.from_params(params)) as session:
        vm = find_vm(session, **vm_selection(params))
        keys = naming.forget_repository(session, vm, repository_id, check_mode)
    return {"changed": bool(keys), "recovered": [], "run": None, "warnings": [], "forgotten": keys}


def _require_still_there(vm: Optional[VmRef], recovery: Recovery) -> None:
    """:raises NotFoundError: the recovery has removed the machine, which a restore had made by half."""
    if any(_is_removal(item) for item in recovery.found):
        raise NotFoundError(
            "The virtual machine to back up is no longer there",
            subject=str(vm),
            reason="it was half restored, by a restore that did not finish, and was removed",
            remedy="Run the restore again",
            details={"recovered": recovery.found},
        )


def _begin(
    session: Session, store: VmStore, about: _About, request: RecoverRequest, looked_before: bool
) -> Dict[str, Any]:
    """Begin the run. :param looked_before: nothing was changed since the machine was looked at."""
    if not looked_before:
        about = _About(about.vm, look(session, about.vm))
    run = begin_run(session, store, about, request.point, request.run_id)
    begun = store.run(run["id"]) if request.access and not run["complete"] and not about.vm.template else None
    if begun is not None:
        with _removed_if_it_fails(begun):  # what can't be recorded is not prepared
            run["access"] = access.prepare(session, begun, about.vm, request.vddk_libdir)
    return run


def _doubt_copies(session: Session, store: VmStore, vm: VmRef) -> None:
    """Where the VM names content that is not here, this is a copy or was rolled back: its records may be those of the
    original's runs, so they are reported and not acted upon (proofs 3)."""
    if not store.runs():
        return
    keys, _version = vm_keys.read(session, vm)
    elsewhere = naming.names_elsewhere(store.points(), keys, store.repository.id)
    if elsewhere:
        store.doubt(
            f"{vm} names content of this repository that is not here ({', '.join(elsewhere)}): this is a copy of the"
            " repository, or it was rolled back"
        )


def _end(store: VmStore, run_id: str) -> None:
    """Whoever led the run says that it is over. What can't be removed now, any later run may remove."""
    run = store.run(run_id)
    if run is not None and not run.old:
        # Where there is no room to write that, its record may still be removed.
        with suppress(RepositoryError):
            run.over()


def _recover(
    session: Session,
    store: VmStore,
    vm: Optional[VmRef],
    request: RecoverRequest,
    run_id: Optional[str],
    check_mode: bool = False,
) -> Recovery:
    return recover(
        session,
        store,
        vm,
        check_mode,
        device_dir=request.device_dir,
        sysfs_dir=request.sysfs_dir,
        vddk_libdir=request.vddk_libdir,
        run_id=run_id,
        force=request.force,
    )


def _find(session: Session, request: RecoverRequest) -> Tuple[Optional[VmRef], str]:
    """The VM and its instance UUID. A VM that is gone still has a part in the repository, if its UUID is known."""
    try:
        vm = _vm_of_the_run(session, request) or find_vm(session, **request.vm)
    except NotFoundError:
        if request.begin or not (request.vm.get("uuid") and request.vm.get("use_instance_uuid")):
            raise
        return None, str(request.vm["uuid"]).lower()
    return vm, vm.instance_uuid


def _vm_of_the_run(session: Session, request: RecoverRequest) -> Optional[VmRef]:
    """None where there is no such record, or the VM is another one."""
    if request.begin or request.run_id is None:
        return None
    try:
        return run_vm(session, *Repository.open(request.repository).find_run(request.run_id))
    except RepositoryError:
        return None


def _store(request: RecoverRequest, uuid: str, check_mode: bool) -> Optional[VmStore]:
    """The VM's part of the repository; None where check mode leaves it at an empty folder.

    Who begins a run will write. Who only recovers may look from any place (proofs 2).
    """
    if request.begin:
        repository = Repository.open_to_write(request.repository, request.create, request.adopt, check_mode)
        if repository is None and not check_mode:
            repository = Repository.open(request.repository, create=True)
        return None if repository is None else repository.vm(uuid)
    repository = Repository.open(request.repository, adopt=request.adopt, check_mode=check_mode)
    if not repository.report_only:
        repository.require_writable()
    return repository.vm(uuid)


def _look_only(
    session: Session,
    store: Optional[VmStore],
    vm: Optional[VmRef],
    request: RecoverRequest,
    check_mode: bool,
    begun: Optional[_About],
) -> Dict[str, Any]:
    """Check mode, and what is not acted upon: what would be recovered; nothing is touched, the lock neither."""
    recovery = Recovery()
    warnings: List[str] = []
    if store is not None:
        if store.repository.report_only:
            try:
                store.repository.require_writable()
            except RepositoryError as error:
                warnings.append(f"What is found is only reported, and nothing was removed. {error}")
        warnings += store.repository.done + store.repository.warnings + store.doubts
        ending = None if request.begin else request.run_id
        recovery = _recover(session, store, vm, request, ending, check_mode=True)
        warnings += recovery.told
        if ending is None and not request.force:
            try:
                store.refuse_busy(write=False)
            except LockedError as error:
                warnings.append(str(error))
    run = None if begun is None else _run_to_begin(session, store, begun, request.point, request.run_id)
    acts = store is None or not store.report_only
    ended = store is not None and would_end(store, None if request.begin else request.run_id)
    changed = (acts and (bool(recovery.found) or ended)) or (run is not None and not run["complete"])
    if store is not None and store.repository.done:
        changed = True
    return {
        "changed": changed and check_mode,
        "recovered": recovery.found,
        "report_only": not acts,
        "run": run,
        "warnings": warnings,
    }


def begin_run(
    session: Session, store: VmStore, begun: _About, point: Optional[str], run_id: Optional[str] = None
) -> Dict[str, Any]:
    """Begin a run in which other modules follow. Under the VM's lock.

    :param point: its name; None for a new one, named by the time.
    :param run_id: of the controller's choice; then there is a record also where the point exists already.
    :returns: {id, repository_id, vm_moid, template, point, complete, snapshot_gone, snapshot_name,
        snapshot_description, access, not_trusted}.
    """
    vm = begun.vm
    facts = _run_to_begin(session, store, begun, point, run_id)
    if not facts["complete"] or run_id is not None:
        run = store.create_run(
            facts["point"],
            vm_moid=vm.moid,
            vm_name=vm.name,
            run_id=facts["id"],
            controller=True,
            server_uuid=session.server_uuid,
            complete_before=facts["complete"],
        )
        if not vm.template and not facts["complete"]:
            with _removed_if_it_fails(run):
                run.record("snapshot", name=facts["snapshot_name"], vm_moid=vm.moid)
    return facts


@contextmanager
def _removed_if_it_fails(run: Run) -> Iterator[None]:
    """A run that can't begin keeps nobody waiting for its deadline."""
    try:
        yield
    except VadpError:
        with suppress(VadpError):
            run.remove()
        raise


def _run_to_begin(
    session: Session, store: Optional[VmStore], begun: _About, point: Optional[str], run_id: Optional[str]
) -> Dict[str, Any]:
    name = point or new_point_name(store.point_names() if store is not None else [], datetime.now(timezone.utc))
    made = None if store is None else store.point(name)
    if store is not None and made is not None:
        naming.require_own_point(store, made, session.server_uuid)
    complete = made is not None
    return {
        **_named(store, begun.vm, run_id or new_run_id(), name),
        "complete": complete,
        "snapshot_gone": None,
        "not_trusted": [] if begun.vm.template else _not_trusted(session, store, begun),
    }


def _named(store: Optional[VmStore], vm: Optional[VmRef], run_id: str, point: Optional[str]) -> Dict[str, Any]:
    repository_id = store.repository.id if store is not None else ""
    return {
        "id": run_id,
        "repository_id": repository_id,
        "vm_moid": None if vm is None else vm.moid,
        "template": vm is not None and vm.template,
        "point": point,
        "snapshot_name": snapshot_name(point or ""),
        "snapshot_description": marker_text(repository_id, run_id, point or ""),
        "access": None,
        "not_trusted": [],
    }


def snapshot_name(point: str) -> str:
    """What the snapshot of a run is called. Nothing is found by it."""
    return f"openvadp {point}"[:_SNAPSHOT_NAME_LIMIT]


# The end of a run


def _facts_of(store: VmStore, vm: Optional[VmRef], run_id: str) -> Dict[str, Any]:
    """A run as its record tells, before that goes."""
    run = store.run(run_id)
    point = None if run is None else run.data["point"]
    facts = _named(store, vm, run_id, point)
    facts["complete_before"] = bool(run is not None and run.data.get("complete_before"))
    return facts


def _proof(session: Session, store: VmStore, vm: Optional[VmRef], run_id: str, facts: Dict[str, Any]) -> Dict[str, Any]:
    """What a run has come to, as the repository and vCenter show it now: a complete point, and no snapshot of ours."""
    manifest: Optional[Dict[str, Any]] = None
    if facts.pop("complete_before"):
        manifest = store.point(str(facts["point"]))
    else:
        manifest = store.point_of(run_id)
    complete = manifest is not None and not store.stored_problems(manifest)
    gone = True
    if vm is not None and not vm.template:
        tree, needed, deltas = what_is_left(session, vm)
        gone = all((snapshot.marker or {}).get("run_id") != run_id for snapshot in tree)
        gone = gone and not needed and not deltas
    return {
        "complete": complete,
        "point": facts["point"] if manifest is None else manifest["point"],
        "snapshot_gone": gone,
    }


def _is_removal(item: Dict[str, Any]) -> bool:
    return bool(item["what"] == "new_vm" and item["action"].startswith("removed"))


def _not_trusted(session: Session, store: Optional[VmStore], begun: _About) -> List[Dict[str, Any]]:
    """Disks whose change tracking must be reset: the virtual machine says so, or this repository."""
    found = before_snapshot(begun.seen)
    marks = trust.marks(store) if store is not None else []
    if store is not None and marks:
        keys = {disk["key"] for disk in found}
        waiting = trust.waiting_for_reset(marks, store.points(), disks_of(vm_state(session, begun.vm).devices))
        found += [disk for disk in waiting if disk["key"] not in keys]
    return found
