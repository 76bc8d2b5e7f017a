# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What crashed runs of this repository left: on this machine, on the VM, in the repository; and the beginning of a run.

All of it happens under the VM's lock, so whoever wrote the records is no longer at work. Ours is only what carries this
repository's id or stands in its records. The order is that of VADP facts 30: processes, attachments, snapshots, access,
temporary files; a run's record goes last, so that a recovery that fails half-way is done again.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..datapath.image import fsync_dir
from ..datapath.processes import RuntimeDir, start_time
from ..errors import InputError, LockedError, NotFoundError, RepositoryError, VadpError
from ..repository import trust
from ..repository.layout import Repository, VmStore, check_point_name, new_point_name
from ..repository.runs import Run, boot_id, new_run_id
from ..transport import hotadd, https
from ..transport.facts import VDDK_TRANSPORTS
from ..transport.vddk import look_for_library, named_library_error
from ..vsphere.change_tracking import is_temporary
from ..vsphere.disks import disks_of
from ..vsphere.inventory import VmRef, find_vm, vm_selection
from ..vsphere.new_machine import is_new_vm, remove_leftover
from ..vsphere.session import Connection, Session
from ..vsphere.snapshots import (
    Snapshot,
    consolidate_if_needed,
    consolidation_state,
    list_snapshots,
    marker_text,
    remove_snapshot,
    vm_state,
)
from . import access
from .request import ExportRequest, parse_rate

_TERMINATE_SECONDS = 10
_KILL_SECONDS = 10
_POLL_SECONDS = 0.05
_SNAPSHOT_NAME_LIMIT = 80

# What a run may still need: a restore that crashed goes on from its journal (VADP facts 12), and prepared access can't
# be ended without VDDK.
_KEPT_INTENTS = ("access", "restore")

DEVICE_DIR = "/dev/disk/by-id"
SYSFS_DIR = "/sys"

Recovered = Dict[str, Any]


@dataclass(frozen=True)
class RecoverRequest:
    """The options of ``vadp_recover``."""

    connection: Connection
    vm: Mapping[str, Any]
    repository: str
    begin: bool = False
    point: Optional[str] = None
    access: bool = False
    vddk_libdir: Optional[str] = None
    device_dir: str = DEVICE_DIR
    sysfs_dir: str = SYSFS_DIR
    create: bool = False
    adopt: Optional[str] = None

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> RecoverRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        if params["point"] is not None:
            if not params["begin"]:
                raise InputError(
                    "A point is named, but no run is begun", remedy="Set begin to true, or leave point out"
                )
            check_point_name(params["point"])
        request = cls(
            connection=Connection.from_params(params),
            vm=vm_selection(params),
            repository=params["repository"],
            create=params["create"],
            adopt=params["adopt"],
            begin=params["begin"],
            point=params["point"],
            access=params["access"],
            vddk_libdir=params["vddk_libdir"],
            device_dir=params["device_dir"],
            sysfs_dir=params["sysfs_dir"],
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


def recover_vm(request: RecoverRequest, check_mode: bool) -> Dict[str, Any]:
    """The whole of ``vadp_recover``: {changed, recovered, report_only, run, warnings}.

    :raises VadpError: something of ours could not be removed; what stands before it in the order is gone.
    """
    with Session.connect(request.connection) as session:
        vm, uuid = _find(session, request)
        store = _store(request, uuid, check_mode)
        if check_mode or store is None or (store.report_only and not request.begin):
            return _look_only(session, store, vm, request, check_mode)
        told = store.repository.done + store.repository.warnings
        made = store.repository.created or bool(store.repository.done)
        store.repository.note_machine()
        if not request.begin and not store.path.is_dir():
            return {"changed": made, "recovered": [], "report_only": False, "run": None, "warnings": told}
        with store.lock(new_run_id(), "vadp_recover"):
            records = len(store.runs())
            recovered = recover(
                session,
                store,
                vm,
                store.report_only,
                device_dir=request.device_dir,
                sysfs_dir=request.sysfs_dir,
                vddk_libdir=request.vddk_libdir,
            )
            if request.begin and any(_is_removal(item) for item in recovered):
                raise NotFoundError(
                    "There is no virtual machine to back up any more",
                    subject=str(vm),
                    reason="it was half restored, by a restore that did not come to its end, and was removed",
                    remedy="Run the restore again",
                    details={"recovered": recovered},
                )
            ended = records - len(store.runs())
            warnings = told + store.doubts + _warnings(store)
            run = begin_run(session, store, vm, request.point) if request.begin and vm is not None else None
            begun = run is not None and not run["complete"]
            if request.access and begun and run is not None and vm is not None and not vm.template:
                begun_run = store.run(run["id"])
                if begun_run is not None:
                    run["access"] = access.prepare(session, begun_run, vm, request.vddk_libdir)
            return {
                "changed": made or (bool(recovered) and not store.report_only) or ended > 0 or begun,
                "recovered": recovered,
                "report_only": store.report_only,
                "run": run,
                "warnings": warnings,
            }


def _find(session: Session, request: RecoverRequest) -> Tuple[Optional[VmRef], str]:
    """The VM and its instance UUID. A VM that is gone still has a part in the repository, if its UUID is known."""
    try:
        vm = find_vm(session, **request.vm)
    except NotFoundError:
        if request.begin or not (request.vm.get("uuid") and request.vm.get("use_instance_uuid")):
            raise
        return None, str(request.vm["uuid"]).lower()
    return vm, vm.instance_uuid


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
    session: Session, store: Optional[VmStore], vm: Optional[VmRef], request: RecoverRequest, check_mode: bool
) -> Dict[str, Any]:
    """Check mode, and what is not acted upon: what would be recovered; nothing is touched, the lock neither."""
    recovered: List[Recovered] = []
    warnings: List[str] = []
    if store is not None:
        if store.repository.report_only:
            try:
                store.repository.require_writable()
            except RepositoryError as error:
                warnings.append(f"What is found is only reported, and nothing was removed. {error}")
        warnings += store.repository.done + store.repository.warnings + store.doubts + _warnings(store)
        recovered = recover(session, store, vm, True, device_dir=request.device_dir, sysfs_dir=request.sysfs_dir)
    run = _run_to_begin(session, store, vm, request.point) if request.begin and vm is not None else None
    ended = store is not None and not all(_is_kept(run) for run in store.runs())
    acts = store is None or not store.report_only
    changed = (acts and (bool(recovered) or ended)) or (run is not None and not run["complete"])
    if store is not None and store.repository.done:
        changed = True
    return {
        "changed": changed and check_mode,
        "recovered": recovered,
        "report_only": not acts,
        "run": run,
        "warnings": warnings,
    }


def begin_run(session: Session, store: VmStore, vm: VmRef, point: Optional[str]) -> Dict[str, Any]:
    """Begin a run of role vm_backup, unless the point exists. Under the VM's lock.

    :param point: its name; None for a new one, named by the time.
    :returns: {id, repository_id, vm_moid, template, point, complete, snapshot_name, snapshot_description, access,
        not_trusted}.
    """
    facts = _run_to_begin(session, store, vm, point)
    if not facts["complete"]:
        run = store.create_run(facts["point"], vm_moid=vm.moid, vm_name=vm.name, run_id=facts["id"])
        if not vm.template:
            run.record("snapshot", name=facts["snapshot_name"], vm_moid=vm.moid)
    return facts


def _run_to_begin(session: Session, store: Optional[VmStore], vm: VmRef, point: Optional[str]) -> Dict[str, Any]:
    run_id = new_run_id()
    repository_id = store.repository.id if store is not None else ""
    name = point or new_point_name(store.point_names() if store is not None else [], datetime.now(timezone.utc))
    complete = store is not None and store.point(name) is not None
    return {
        "id": run_id,
        "repository_id": repository_id,
        "vm_moid": vm.moid,
        "template": vm.template,
        "point": name,
        "complete": complete,
        "snapshot_name": f"openvadp {name}"[:_SNAPSHOT_NAME_LIMIT],
        "snapshot_description": marker_text(repository_id, run_id, name),
        "access": None,
        "not_trusted": [] if store is None or vm.template else _not_trusted(session, store, vm),
    }


def _not_trusted(session: Session, store: VmStore, vm: VmRef) -> List[Dict[str, Any]]:
    """Disks whose change tracking has to be reset. vCenter is asked only where something is marked."""
    marks = trust.marks(store)
    if not marks:
        return []
    return trust.waiting_for_reset(marks, store.points(), disks_of(vm_state(session, vm).devices))


def recover(
    session: Session,
    store: VmStore,
    vm: Optional[VmRef],
    check_mode: bool = False,
    *,
    device_dir: str = DEVICE_DIR,
    sysfs_dir: str = SYSFS_DIR,
    vddk_libdir: Optional[str] = None,
) -> List[Recovered]:
    """Remove what runs of this repository left of a VM; idempotent. Under the VM's lock, unless in check mode.

    :param vm: None if the VM is gone: then only this machine, the proxies and the repository are looked at.
    :param check_mode: list only, as it has to be where the store is report_only.
    :param device_dir: where attached disks have links by their ids, on this machine.
    :returns: what was found: [{what, id, action}], in the order in which it was removed.
    :raises VadpError: something could not be removed.
    """
    if store.report_only and not check_mode:
        raise RuntimeError("what is only reported is not removed")
    runs = store.runs() + store.foreign_runs()
    found = _processes(runs, check_mode)
    if not check_mode:
        access.clean_up(session, runs, vddk_libdir)
    found += _attachments(session, runs, check_mode, device_dir, sysfs_dir)
    for run in runs:
        found += https.recover_leases(session, run, check_mode=check_mode)
    if vm is not None:
        found += _snapshots(session, store, vm, runs, check_mode)
    for identity, action in access.end(session, vm, runs, vddk_libdir, check_mode):
        found.append(_item("access", identity, action, check_mode))
    found += _new_machines(session, runs, check_mode)
    found += _temporary_files(store, runs, check_mode)
    if not check_mode:
        for run in runs:
            if not _is_kept(run):
                run.remove()
    return found


def _new_machines(session: Session, runs: List[Run], check_mode: bool) -> List[Recovered]:
    """Machines that a restore was making: half restored they are of no use, unless the user wanted to keep them."""
    found: List[Recovered] = []
    for run in runs:
        for intent in filter(is_new_vm, run.intents("restore")):
            removal = remove_leftover(session, intent, check_mode)
            if removal is not None:
                found.append(_item("new_vm", removal.name, removal.action, check_mode))
            if not check_mode:
                run.done(intent["id"])
    return found


def _is_removal(item: Recovered) -> bool:
    return item["what"] == "new_vm" and item["action"] == "removed"


def _is_kept(run: Run) -> bool:
    return any(intent["what"] in _KEPT_INTENTS for intent in run.intents())


def _warnings(store: VmStore) -> List[str]:
    warnings = []
    for run in store.runs():
        kinds = sorted({intent["what"] for intent in run.intents() if intent["what"] in _KEPT_INTENTS})
        if kinds:
            warnings.append(
                f"Run {run.run_id} of {run.data['started']} was left as it is: it has not ended its {', '.join(kinds)}."
                + "".join(f" {intent['problem']}." for intent in run.intents() if intent.get("problem"))
            )
    return warnings


# Processes


def _processes(runs: List[Run], check_mode: bool) -> List[Recovered]:
    """Children that outlived their run on this machine: the same pid, start time and boot."""
    found = []
    for run in runs:
        if run.data["host"] != socket.gethostname() or run.data["boot_id"] != boot_id():
            continue
        for intent in run.intents("process"):
            pid, started = int(intent["pid"]), int(intent["start_time"])
            if start_time(pid) == started:
                if not check_mode:
                    _end(pid, started, str(intent.get("name")))
                found.append(_item("process", str(pid), "ended", check_mode))
            if not check_mode:
                run.done(intent["id"])
    return found


def _end(pid: int, started: int, name: str) -> None:
    for number, seconds in ((signal.SIGTERM, _TERMINATE_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise VadpError(
                "A process of a crashed run can't be ended",
                subject=f"{name} ({pid})",
                reason=error.strerror,
                remedy="Run as the user who ran that backup, or as root",
            ) from error
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if start_time(pid) != started:
                return
            time.sleep(_POLL_SECONDS)
    raise VadpError(
        "A process of a crashed run does not end",
        subject=f"{name} ({pid})",
        reason="it waits in the kernel, perhaps for a file system that does not answer",
        remedy="See that the repository's file system answers, then run again",
    )


# Attachments


def _attachments(
    session: Session, runs: List[Run], check_mode: bool, device_dir: str, sysfs_dir: str
) -> List[Recovered]:
    """Disks that are still attached to a proxy: what a run recorded, the way that it recorded it."""
    found: List[Recovered] = []
    for run in runs:
        found += hotadd.recover(session, run, sysfs_dir=sysfs_dir, device_dir=device_dir, check_mode=check_mode)
    return found


# Snapshots


def _snapshots(session: Session, store: VmStore, vm: VmRef, runs: List[Run], check_mode: bool) -> List[Recovered]:
    """Snapshots whose marker carries this repository's id, and deltas that a removal of ours left (VADP facts 15).

    Also those of a stun cycle: a backup goes on where vm_change_tracking was killed, and a point that is complete then
    never gets to that module again.
    """
    found = []
    for snapshot in reversed(list_snapshots(session, vm)):  # children first
        if _is_ours(snapshot, store) or is_temporary(snapshot):
            if not check_mode:
                remove_snapshot(session, vm, snapshot)
            found.append(_item("snapshot", snapshot.moid, "removed", check_mode))
    # A snapshot that left the tree leaves no marker; that one of ours was there, the run's record knows.
    if found or any(run.intents("snapshot") for run in runs):
        if check_mode:
            needed, files = consolidation_state(session, vm)
            if needed or files:
                found.append(_item("snapshot", vm.moid, "consolidated", check_mode))
        elif consolidate_if_needed(session, vm):
            found.append(_item("snapshot", vm.moid, "consolidated", check_mode))
    return found


def _is_ours(snapshot: Snapshot, store: VmStore) -> bool:
    return snapshot.marker is not None and snapshot.marker.get("repository_id") == store.repository.id


# Temporary files


def _temporary_files(store: VmStore, runs: List[Run], check_mode: bool) -> List[Recovered]:
    """Unfinished files, files of points that a run did not commit, and folders of sockets and logs.

    A finished layer goes only if a run's record names its point: a lost folder of manifests must not make leftovers of
    all that the repository holds.
    """
    found = []
    points = {run.data["point"] for run in runs}
    uncommitted = [path for path in store.uncommitted_files() if path.stem in points]
    for path in store.repository.part_files() + store.part_files() + uncommitted:
        if not check_mode:
            _unlink(path)
        found.append(_item("temporary_file", str(path), "removed", check_mode))
    for run in runs:
        for folder in RuntimeDir.leftovers(run.run_id, remove=not check_mode):
            found.append(_item("temporary_file", folder, "removed", check_mode))
    return found + _boots(store, check_mode)


def _boots(store: VmStore, check_mode: bool) -> List[Recovered]:
    """What a restore_point_verify that was killed left, unless another boots the machine now."""
    names = RuntimeDir.leftovers(store.boot_name, remove=not check_mode)
    parts = store.boot_part_files()
    if parts and not check_mode:
        try:
            with store.boot_lock(new_run_id()):
                parts = store.boot_part_files()
                for path in parts:
                    _unlink(path)
        except LockedError:
            parts = []
    return [_item("temporary_file", name, "removed", check_mode) for name in [*names, *map(str, parts)]]


def _unlink(path: Path) -> None:
    try:
        path.unlink()
        fsync_dir(str(path.parent))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RepositoryError(
            "A file of a crashed run can't be removed", subject=str(path), reason=error.strerror
        ) from error


def _item(what: str, name: str, action: str, check_mode: bool) -> Recovered:
    return {"what": what, "id": name, "action": f"would be {action}" if check_mode else action}
