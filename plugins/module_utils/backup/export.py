# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The whole of ``vadp_disk_export``: from a snapshot of a VM, or from a template, to a restore point.

Look (nothing is touched) -> lock -> plan each disk -> copy -> configuration -> manifest -> name in the VM. What is
needed of vCenter comes before the copy, so that a session that ends meanwhile harms nothing; only a template is looked
at again after it, whether it is still the same. The manifest is written last: without it the point does not exist. That
the virtual machine then names the point is for the next one alone (proofs 16).
"""

from __future__ import annotations

import re
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from ..datapath.processes import RuntimeDir, run_tool
from ..datapath.progress import Progress
from ..errors import DamagedError, InputError, NotFoundError, RepositoryError, VadpError, VsphereError
from ..repository import manifest as manifests
from ..repository import trust
from ..repository.content import stored_id_problem
from ..repository.half_written import describe, half_written
from ..repository.layout import Repository
from ..repository.names import new_point_name
from ..repository.store import VmStore
from ..repository.stored import file_entry
from ..repository.run_files import files_of, remove_orphans
from ..repository.runs import Run, new_run_id
from ..repository.shapes import format_time
from ..transport.facts import disk_facts, proxy_facts
from ..transport.opener import OpenContext
from ..transport.planner import DiskFacts, ProxyFacts
from ..transport.vddk import Vddk
from ..vsphere import clock, configuration, tags, vm_keys
from ..vsphere.disks import Disk, disks_of, vm_obstacles
from ..vsphere.inventory import VmRef, find_vm, require_only_one
from ..vsphere.session import Session
from ..vsphere.snapshots import Snapshot, VmState, pick_snapshot, snapshot_config, vm_state
from . import marks
from . import naming as names
from .disk_copy import CopyJob, Reading, copy_disks
from .disk_plan import DiskPlan, not_to_be_trusted, plan_disks, skipped_result
from .naming import Naming
from .request import ExportRequest
from .run_steps import is_of_run, run_vm
from .selection import Selection, select_disks, select_of
from .template import (
    TemplateState,
    changes_since,
    check_can_be_read,
    check_request,
    look,
    without_tracking,
)


@dataclass
class Source:
    """What is to be read, as vCenter shows it before anything is touched.

    :param snapshot: None for a template, and where it does not exist yet (check mode).
    :param verdict: what restores in place have left in the VM, seen after the snapshot was made.
    :param template: what a template must stay like until it was read; None for all other VMs.
    :param disks: all that the VM has, not only those that are read.
    :param naming: what the VM says of itself.
    :param foreign: the VM's snapshots but the one that is read. One that a run of ours left is no better than others:
        to go back to it does the same harm (VADP facts 7, 11).
    """

    vm: VmRef
    snapshot: Optional[Snapshot]
    selection: Selection
    change_ids: Dict[int, Optional[str]]
    foreign: List[Snapshot]
    disks: List[Disk]
    naming: Naming
    warnings: List[str] = field(default_factory=list)
    template: Optional[TemplateState] = None
    verdict: marks.Verdict = field(default_factory=marks.Verdict)


@dataclass(frozen=True)
class Work:
    """What the steps under the VM's lock have in common.

    :param source: with its snapshot, unless it is a template.
    :param stack: what is ended when the lock is let go of.
    :param cancel: nothing more is written once it is set.
    """

    session: Session
    source: Source
    store: VmStore
    request: ExportRequest
    facts: Facts
    stack: ExitStack
    cancel: threading.Event


@dataclass(frozen=True)
class Facts:
    """What the plans are made of: this machine, and each disk by its device key."""

    proxy: ProxyFacts
    disks: Dict[int, DiskFacts]


def export_point(request: ExportRequest, check_mode: bool) -> Dict[str, Any]:
    """Make a restore point, unless it exists.

    :param check_mode: nothing is touched; the result tells the plan.
    :returns: {changed, point, disks, warnings, diff}; ``point`` is the manifest, in check mode {point: its name}.
    :raises VadpError: and no point appears.
    """
    request.check()
    with Session.connect(request.connection) as session:
        repository = Repository.open_to_write(request.repository, request.create, request.adopt, check_mode)
        vm, request = _of_the_run(session, repository, request, check_mode)
        store = repository.vm(vm.instance_uuid) if repository else None
        if store is not None and request.point is not None:
            manifest = store.point(request.point)
            if manifest is not None:
                return _unchanged(session, vm, store, manifest, request, check_mode)
        source = _look(session, vm, request, check_mode)
        if _own_marker(source, store) is None:
            # A run of vadp_recover has looked before it began.
            require_only_one(session, vm)
        if repository is not None:
            source.warnings.extend(repository.done + repository.warnings)
            source.warnings.extend(_half_written(repository, source))
        if store is not None:
            names.require_own_folder(store, store.points(), vm, source.naming, source.disks)
        facts = _facts(session, source, request)
        if check_mode:
            return _planned(session, source, store, request, facts)
        if store is None or not store.path.is_dir():
            # What can't be done shows before there is anything of this VM in the repository.
            _plans(session, source, store, request, facts)
        if store is None:
            store = Repository.open(request.repository, create=True).vm(vm.instance_uuid)
        store.repository.note_machine()
        own = _run_id_of(source, store, request)
        with store.lock(own or new_run_id(), "vadp_disk_export", request.lock_timeout), ExitStack() as stack:
            source.warnings.extend(store.refuse_busy(own, request.force))
            remove_orphans(store)
            return _export(Work(session, source, store, request, facts, stack, threading.Event()))


def _of_the_run(
    session: Session, repository: Optional[Repository], request: ExportRequest, check_mode: bool
) -> Tuple[VmRef, ExportRequest]:
    """The VM, and the request with what the record of its run says: which snapshot, which point."""
    if request.run_id is None:
        return find_vm(session, **request.vm), request
    if repository is None or (check_mode and not _has_run(repository, request.run_id)):
        # In check mode no run was begun, so that there is no snapshot of it.
        vm = find_vm(session, **request.vm)
        return vm, request if vm.template else replace(request, snapshot_name="openvadp (not made yet)")
    store, run = repository.find_run(request.run_id)
    vm = run_vm(session, store, run) or find_vm(session, **request.vm)
    if vm.instance_uuid.lower() != store.uuid:
        raise RepositoryError(
            "The run is another virtual machine's", subject=request.run_id, reason=f"it is of {store.shown}"
        )
    point = run.data["point"] if request.point is None else request.point
    if vm.template or run.data.get("complete_before"):
        return vm, replace(request, point=point)
    moids = [item.get("moid") for item in run.intents("snapshot") if item.get("vm_moid") == vm.moid]
    if (
        len(moids) != 1
        or moids[0] is None
        or any(item.get("server_uuid") != session.server_uuid for item in run.intents("snapshot"))
    ):
        raise RepositoryError(
            "The run has no snapshot to read",
            subject=f"{request.run_id} of {vm}",
            reason="its record names none of this server",
            remedy="Make it by vm_snapshot with the same repository and run_id",
        )
    return vm, replace(request, snapshot_moid=str(moids[0]), snapshot_name=None, point=point)


def _has_run(repository: Repository, run_id: str) -> bool:
    try:
        repository.find_run(run_id)
    except RepositoryError:
        return False
    return True


def _run_id_of(source: Source, store: VmStore, request: ExportRequest) -> Optional[str]:
    """The run that this export is a part of, whose record may well be busy."""
    marker = _own_marker(source, store) or {}
    found = request.run_id or marker.get("run_id")
    return None if found is None else str(found)


def _facts(session: Session, source: Source, request: ExportRequest) -> Facts:
    disks = disk_facts(session, source.vm, source.selection.disks)
    return Facts(proxy_facts(session, request, source.vm, disks), disks)


def _plans(
    session: Session, source: Source, store: Optional[VmStore], request: ExportRequest, facts: Facts
) -> List[DiskPlan]:
    disks = source.selection.disks
    return plan_disks(
        session,
        source.vm,
        source.snapshot,
        disks,
        store,
        request,
        facts.proxy,
        facts.disks,
        source.naming,
        source.disks,
        source.verdict.full,
    )


def _look(session: Session, vm: VmRef, request: ExportRequest, check_mode: bool) -> Source:
    """Find the snapshot and its disks. :raises VadpError: it is not there, or the VM can't be backed up."""
    if vm.template:
        return _look_at_template(session, vm, request)
    if request.snapshot_moid is None and request.snapshot_name is None:
        raise InputError(
            "The snapshot is not named",
            subject=str(vm),
            reason="only a template is read without one",
            remedy="Give either snapshot_moid or snapshot_name",
        )
    state = vm_state(session, vm)
    obstacles = vm_obstacles(_config_of(state))
    if obstacles:
        raise VsphereError("The virtual machine can't be backed up", subject=str(vm), reason="; ".join(obstacles))
    snapshot = pick_snapshot(state.snapshots, vm, request.snapshot_moid, request.snapshot_name)
    warnings = []
    settings: List[Any] = []
    if snapshot is not None:
        frozen, settings = snapshot_config(session, snapshot)
        disks = _with_those_outside(frozen, disks_of(state.devices))
    elif check_mode:
        disks = disks_of(state.devices)
        warnings.append("The snapshot does not exist yet; the plan is made from the VM's present configuration.")
    else:
        raise NotFoundError(
            "There is no such snapshot",
            subject=f"{request.snapshot_moid or request.snapshot_name!r} of {vm}",
            reason=", ".join(f"'{item.name}' ({item.moid})" for item in state.snapshots) or "the VM has none",
            remedy="Make it with vm_snapshot",
        )
    naming = names.look(session, vm, settings, request.vm_ids)
    verdict = marks.after_snapshot(vm, naming.keys, disks, state.power_state, request.force)
    return Source(
        vm=vm,
        snapshot=snapshot,
        selection=select_of(vm, disks, request.disks, request.exclude_disks),
        change_ids={disk.key: disk.change_id for disk in disks if disk.included},
        foreign=[item for item in state.snapshots if snapshot is None or item.moid != snapshot.moid],
        disks=disks,
        naming=naming,
        warnings=warnings
        + [text for text in (naming.problem, clock.warning(session)) if text is not None]
        + verdict.warnings,
        verdict=verdict,
    )


def _look_at_template(session: Session, vm: VmRef, request: ExportRequest) -> Source:
    """As :func:`_look`, where there is no snapshot to find."""
    check_request(vm, request.mode, request.snapshot_moid or request.snapshot_name)
    template, state = look(session, vm)
    check_can_be_read(vm, state)
    disks = without_tracking(disks_of(state.devices))
    verdict = marks.after_snapshot(vm, vm_keys.read(session, vm)[0], disks, state.power_state, request.force)
    return Source(
        vm=vm,
        snapshot=None,
        selection=select_of(vm, disks, request.disks, request.exclude_disks),
        change_ids={disk.key: None for disk in disks if disk.included},
        foreign=[],
        disks=disks,
        naming=names.look(session, vm, [], False),
        warnings=[text for text in (clock.warning(session),) if text is not None] + verdict.warnings,
        template=template,
        verdict=verdict,
    )


def _half_written(repository: Repository, source: Source) -> List[str]:
    """What is wrong with disks that a restore left half written: they are read as they are, and the point says so."""
    keys = {disk.key for disk in source.selection.disks}
    return [
        f"{describe(entry)}. The restore point holds that mixture."
        for entry in half_written(repository, source.vm.instance_uuid)
        if entry["key"] in keys
    ]


def _with_those_outside(held: List[Disk], present: List[Disk]) -> List[Disk]:
    """The snapshot's disks, and those of the VM that it does not hold, with the reason (VADP facts 13)."""
    keys = {disk.key for disk in held}
    reason = "it was added to the virtual machine after the snapshot"
    outside = [disk for disk in present if disk.key not in keys]
    return held + [replace(disk, included=False, skip_reason=disk.skip_reason or reason) for disk in outside]


def _config_of(state: VmState) -> Any:
    return SimpleNamespace(template=state.template, hardware=SimpleNamespace(device=state.devices))


def _unchanged(
    session: Session, vm: VmRef, store: VmStore, manifest: Dict[str, Any], request: ExportRequest, check_mode: bool
) -> Dict[str, Any]:
    """The point exists: nothing to do, whatever the other options say. Only a name that was missed is written, as long
    as the snapshot is there.

    :raises RepositoryError: it is another server's, so that nothing of this one is in it. DamagedError: it is damaged.
    """
    names.require_own_point(store, manifest, session.server_uuid)
    problems = store.stored_problems(manifest)
    if problems:
        raise DamagedError(
            "The restore point exists, and is damaged",
            subject=f"{manifest['point']} of {store.shown}",
            reason="; ".join(problems),
            remedy="Bring back the files from a copy of the repository, or give the new point another name",
        )
    warnings = []
    named = False
    newest = store.points()[-1:]
    if not check_mode and request.vm_ids and "sequence" in manifest and newest == [manifest] and not vm.template:
        named, untold = names.write_names(session, vm, manifest)
        # What is missed for good was told when the point was made.
        del untold
    devices = session.read(vm.obj, "config.hardware.device")["config.hardware.device"] or []
    stored = {disk["key"]: disk["label"] for disk in manifest["disks"]}
    try:
        asked = {
            disk.key: disk.label for disk in select_disks(disks_of(devices), request.disks, request.exclude_disks).disks
        }
    except InputError as error:
        warnings.append(f"Restore point {manifest['point']} exists; of the disks now: {error}")
    else:
        if set(asked) != set(stored):
            warnings.append(
                f"Restore point {manifest['point']} exists and holds other disks ({_labels(stored)}) than those asked"
                f" for now ({_labels(asked)}). It was left as it is."
            )
    stored_names = store.point_names()
    return {
        "changed": named,
        "point": manifest,
        "disks": [_stored_result(disk) for disk in manifest["disks"]]
        + [skipped_result(disk) for disk in manifest["skipped_disks"]],
        "warnings": warnings,
        "diff": {"before": {"points": stored_names}, "after": {"points": stored_names}},
    }


def _labels(disks: Dict[int, str]) -> str:
    return ", ".join(f"'{label}'" for _key, label in sorted(disks.items())) or "none"


def _stored_result(disk: Dict[str, Any]) -> Dict[str, Any]:
    names = ("key", "label", "mode", "parent", "reason", "transport", "capacity_bytes")
    result = {name: disk[name] for name in names + ("bytes_read", "bytes_stored", "areas", "seconds")}
    result.update(method=None, transport_reasons=[], transport_notes=[], skipped=False, skip_reason=None)
    return result


def _planned(
    session: Session, source: Source, store: Optional[VmStore], request: ExportRequest, facts: Facts
) -> Dict[str, Any]:
    stored_names = store.point_names() if store else []
    point = _point_name(source, store, request)
    plans = _plans(session, source, store, request, facts)
    return {
        "changed": True,
        "point": {"point": point},
        "disks": [plan.to_result() for plan in plans] + [skipped_result(item) for item in source.selection.skipped],
        "warnings": source.warnings,
        "diff": {"before": {"points": stored_names}, "after": {"points": sorted(stored_names + [point])}},
    }


def _point_name(source: Source, store: Optional[VmStore], request: ExportRequest) -> str:
    """The name that was asked for, or that of the run which made the snapshot, or a new one."""
    if request.point is not None:
        return request.point
    marker = _own_marker(source, store)
    taken = store.point_names() if store else []
    if marker is not None and store is not None:
        run = store.run(str(marker.get("run_id")))
        if run is not None and run.data["point"] is not None and run.data["point"] not in taken:
            return str(run.data["point"])
    return new_point_name(taken, datetime.now(timezone.utc))


def _own_marker(source: Source, store: Optional[VmStore]) -> Optional[Dict[str, Any]]:
    """The snapshot's marker, if it carries this repository's id."""
    marker = source.snapshot.marker if source.snapshot else None
    if marker is None or store is None or marker.get("repository_id") != store.repository.id:
        return None
    return marker


def _export(work: Work) -> Dict[str, Any]:
    """Under the VM's lock."""
    session, source, store, request = work.session, work.source, work.store, work.request
    started, clock = datetime.now(timezone.utc), time.monotonic()
    point = _point_name(source, store, request)
    if store.point(point) is not None:
        # Another run made it between our look and our lock.
        return _unchanged(session, source.vm, store, store.resolve(point), request, check_mode=False)
    before = store.point_names()
    plans = _plans(session, source, store, request, work.facts)
    config = configuration.save(session, source.vm, source.snapshot)
    nvram = configuration.nvram(session, source.vm, config["files"])
    config["tags"], untold = tags.save(session, source.vm)
    source.warnings.extend(untold)
    tools = _tools(work.facts.proxy.vddk)
    run, shared = _run_for(work, point)
    work.stack.enter_context(run.working(work.cancel))
    work.stack.enter_context(session.remembering(run.remember_task))
    _mark_untrusted(store, source)
    run.set_snapshot(*_identity(source))
    entries = _finished(store, run, plans)
    _remove_strangers(store, run, point, entries)
    readings: Dict[int, Reading] = {}
    with _abandoned_on_failure(run, shared):
        missing = [plan for plan in plans if plan.disk.key not in entries]
        entries.update(_copy(work, run, point, missing, readings))
        _require_same_vm(work, run, entries)
        manifest = _manifest(work, run, point, format_time(started), tools)
        manifest["disks"] = [_with_name(entries[plan.disk.key], plan) for plan in plans]
        run.require_held()
        sealed = _commit(store, run, manifest, config, nvram, clock)
    _close(work, run, shared, sealed)
    return {
        "changed": True,
        "point": sealed,
        "disks": [
            plan.to_result(entries[plan.disk.key], _reading_result(readings.get(plan.disk.key))) for plan in plans
        ]
        + [skipped_result(item) for item in source.selection.skipped],
        "warnings": source.warnings,
        "diff": {"before": {"points": before}, "after": {"points": store.point_names()}},
    }


@contextmanager
def _abandoned_on_failure(run: Run, shared: bool) -> Iterator[None]:
    """Until the point is stored: what fails leaves the record to those that come after."""
    stored = False
    try:
        yield
        stored = True
    except VadpError:
        # Whatever came of it: who lost the run says so.
        run.require_held()
        raise
    finally:
        if not stored:
            _abandon(run, shared)


def _require_same_vm(work: Work, run: Run, entries: Dict[int, Dict[str, Any]]) -> None:
    """:raises VsphereError: what was read is not of one moment, or may be another VM's."""
    session, source, store = work.session, work.source, work.store
    if source.template is not None:
        changed = changes_since(session, source.vm, source.template)
        if changed is not None:
            _forget(store, run, entries)
            raise changed
    names.require_same_keys(session, source.vm, source.naming, store.repository.id, source.selection.disks)


def _manifest(work: Work, run: Run, point: str, started: str, tools: Dict[str, Optional[str]]) -> Dict[str, Any]:
    """The manifest of the new point, without its disks."""
    source, store = work.source, work.store
    return {
        "format": manifests.FORMAT,
        "repository_id": store.repository.id,
        "vm_uuid": store.uuid,
        "vm_name": source.vm.name,
        "vm_moid": source.vm.moid,
        "point": point,
        "sequence": _sequence(store, run),
        "server_uuid": source.naming.server_uuid,
        "run_id": run.run_id,
        "started": started,
        "snapshot": _snapshot_entry(source),
        "skipped_disks": source.selection.skipped,
        "tools": tools,
        "warnings": source.warnings,
    }


def _close(work: Work, run: Run, shared: bool, sealed: Dict[str, Any]) -> None:
    """The point is stored: the VM gets its names, and the record goes."""
    for intent in run.intents("temporary_file"):
        run.done(intent["id"])
    unnamed = names.write_names(work.session, work.source.vm, sealed)[1]
    if unnamed is not None:
        work.source.warnings.append(unnamed)
    # What could not be detached stays in the record for vadp_recover.
    if not shared and not run.intents("attachment"):
        run.remove()


def _sequence(store: VmStore, run: Run) -> int:
    """The number that was drawn when the run began, or now for a run of an earlier version."""
    found = run.data.get("sequence")
    return found if isinstance(found, int) else store.next_sequence()


def _with_name(entry: Dict[str, Any], plan: DiskPlan) -> Dict[str, Any]:
    """A disk's entry with what is known now of its name in the VM; it may have been read by an earlier try."""
    found = dict(entry, named_in_vm=plan.named_in_vm)
    found.pop("vm_named", None)
    return found if plan.named_in_vm else dict(found, vm_named=plan.vm_named)


def _reading_result(reading: Optional[Reading]) -> Dict[str, Any]:
    """Nothing is known of a disk that an earlier try on the same snapshot has read."""
    if reading is None:
        return {"method": None, "transport_reasons": [], "transport_notes": []}
    return {
        "method": reading.method or None,
        "transport_reasons": reading.reasons,
        "transport_notes": reading.notes,
    }


def _run_for(work: Work, point: str) -> Tuple[Run, bool]:
    """The run that this export belongs to, and whether somebody else ends it.

    That of the snapshot's marker, which vadp_recover ends once the snapshot is gone; else one of ours that failed on
    the very same snapshot; else a new one. A template's is that which vadp_recover began for the point, too.
    """
    store, source = work.store, work.source
    if work.request.run_id is not None:
        begun = store.run(work.request.run_id)
        if begun is None or begun.old:
            raise RepositoryError("The run is over", subject=work.request.run_id, remedy="Begin another one")
        _require_marker(source, store, begun)
        return begun, True
    marker = _own_marker(source, store)
    if marker is not None:
        run = store.run(str(marker.get("run_id")))
        if run is not None and not run.old and run.data["point"] == point:
            return run, True
    for run in store.runs():
        if run.old:
            continue
        same = run.matches_snapshot(*_identity(source))
        if source.template is not None and run.data["snapshot"] is None and not run.intents():
            same = True
        if same and run.data["point"] == point and not run.intents("snapshot"):
            return run, False
    server_uuid = work.session.server_uuid
    return store.create_run(point, vm_moid=source.vm.moid, vm_name=source.vm.name, server_uuid=server_uuid), False


def _require_marker(source: Source, store: VmStore, run: Run) -> None:
    """:raises RepositoryError: the snapshot that the record names was not made by this run (proofs 8)."""
    if source.snapshot is not None and not is_of_run(source.snapshot, store.repository.id, run.run_id):
        raise RepositoryError(
            "The snapshot is not the one that this run has made",
            subject=f"{source.snapshot} of {source.vm}",
            reason=f"it does not carry the marker of run {run.run_id}",
            remedy="Begin another run",
        )


def _mark_untrusted(store: VmStore, source: Source) -> None:
    """Remember disks whose tracking was found on together with another snapshot (VADP facts 7)."""
    points, known = store.points(), trust.marks(store)
    for disk in not_to_be_trusted(source.selection.disks, points, source.foreign):
        if trust.in_force(known, points, disk.key, disk.uuid) is None:
            names = ", ".join(f"'{item.name}'" for item in source.foreign[:3])
            trust.mark(
                store,
                disk.key,
                f"it was found on while the VM had other snapshots: {names}",
                uuid=disk.uuid,
                change_id=disk.change_id,
            )


def _finished(store: VmStore, run: Run, plans: Sequence[DiskPlan]) -> Dict[int, Dict[str, Any]]:
    """Disks that an earlier attempt of this run finished from this very snapshot, as long as all of it still holds.

    The files are hashed: a file of the same name and size may come from another snapshot.
    """
    point = run.data["point"]
    entries = {}
    for plan in plans:
        entry = run.finished_disk(plan.disk.key)
        wanted = (plan.mode, plan.parent, plan.pin.content_id, plan.pin.layer_blake3)
        if entry is None or wanted != tuple(
            entry.get(name) for name in ("mode", "parent", "parent_content_id", "parent_layer_blake3")
        ):
            continue
        layer, hashes = store.layer_path(plan.disk.key, point), store.hashes_path(plan.disk.key, point)
        try:
            same = file_entry(layer) == entry["layer"] and file_entry(hashes) == entry["hashes"]
            if same and entry.get("content_id") and stored_id_problem(hashes, entry) is None:
                entries[plan.disk.key] = entry
        except FileNotFoundError:
            continue
    return entries


def _remove_strangers(store: VmStore, run: Run, point: str, entries: Dict[int, Dict[str, Any]]) -> None:
    """Remove what earlier attempts at this point left and this one does not use, as far as a record says whose it is.

    :raises RepositoryError: files of a point of this name are there that nobody has recorded. A point whose manifest
        was lost looks like that.
    """
    RuntimeDir.leftovers(run.run_id, remove=True)
    now = store.now()
    earlier = [
        other
        for other in store.runs()
        if other.run_id == run.run_id or (not other.old and other.data["point"] == point and other.busy(now) is None)
    ]
    used = {path for key in entries for path in (store.layer_path(key, point), store.hashes_path(key, point))}
    for path in files_of(store, earlier)[0]:
        if path not in used:
            path.unlink()
    strange = [path for path in store.uncommitted_files() if path.stem == point and path not in used]
    if strange:
        raise RepositoryError(
            "The restore point's name can't be used",
            subject=point,
            reason=f"there are files of that name which no run has recorded, such as {strange[0]}: the manifest of that"
            " point may be lost",
            remedy="Choose another name; if the files are of no use, remove them",
        )


def _copy(
    work: Work, run: Run, point: str, plans: Sequence[DiskPlan], readings: Dict[int, Reading]
) -> Dict[int, Dict[str, Any]]:
    """:param readings: is filled with how each disk was read."""
    request, proxy = work.request, work.facts.proxy
    at_once = max(1, min(request.parallel_disks, len(plans)))
    with RuntimeDir(run.run_id) as run_dir, Progress(request.progress_file) as progress:
        cancel = work.cancel
        context = OpenContext.of(
            request,
            work.session,
            work.source.vm,
            proxy,
            run,
            run_dir,
            work.store.path,
            snapshot_moid=work.source.snapshot.moid if work.source.snapshot else None,
            cancel=cancel,
        )
        job = CopyJob(
            vm=work.source.vm,
            store=work.store,
            run=run,
            point=point,
            context=context,
            request=request,
            run_dir=run_dir,
            progress=progress,
            cancel=cancel,
            readings=readings,
            rate_limit=None if request.rate_limit is None else request.rate_limit // at_once,
        )
        return copy_disks(plans, job)


def _identity(source: Source) -> Tuple[Optional[str], str, Dict[int, Optional[str]], Optional[str]]:
    """What the run's record knows the snapshot by, or the state of a template."""
    if source.template is not None:
        return None, source.template.modified, source.change_ids, source.template.change_version
    snapshot = _snapshot(source)
    return snapshot.moid, snapshot.created, source.change_ids, None


def _snapshot(source: Source) -> Snapshot:
    """The snapshot, which is there unless it is a template or check mode."""
    if source.snapshot is None:
        raise NotFoundError("There is no snapshot", subject=str(source.vm))
    return source.snapshot


def _snapshot_entry(source: Source) -> Dict[str, Any]:
    if source.template is not None:
        return {"moid": None, "name": None, "created": source.template.seen, "quiesced": False, "foreign": []}
    snapshot = _snapshot(source)
    return {
        "moid": snapshot.moid,
        "name": snapshot.name,
        "created": snapshot.created,
        "quiesced": snapshot.quiesced,
        "foreign": [{"moid": item.moid, "name": item.name, "created": item.created} for item in source.foreign],
    }


def _commit(
    store: VmStore,
    run: Run,
    manifest: Dict[str, Any],
    config: Dict[str, Any],
    nvram: Optional[bytes],
    clock: float,
) -> Dict[str, Any]:
    """Configuration, NVRAM and the VM's facts, then the manifest."""
    point = manifest["point"]
    paths = [store.config_path(point), store.nvram_path(point)]
    run.record("temporary_file", files=[str(path.relative_to(store.path)) for path in paths])
    try:
        manifest["configuration"] = store.write_config(point, config)
        manifest["nvram"] = None if nvram is None else store.write_nvram(point, nvram)
        facts = config["vm"]
        store.write_facts({name: facts[name] for name in ("name", "path", "moid", "bios_uuid")})
        manifest["finished"] = format_time(datetime.now(timezone.utc))
        manifest["seconds"] = round(time.monotonic() - clock, 3)
        return store.commit_point(manifest)
    finally:
        # A commit may fail after the manifest is there: then the point exists, and so must its files.
        if not store.manifest_path(point).exists():
            for path in paths:
                if path.exists():
                    path.unlink()


def _forget(store: VmStore, run: Run, entries: Dict[int, Dict[str, Any]]) -> None:
    """Finished disks that no later try may use are removed, the record of them first."""
    run.forget_disks()
    point = str(run.data["point"])
    for key in entries:
        for path in (store.layer_path(key, point), store.hashes_path(key, point)):
            path.unlink()
    for intent in run.intents("temporary_file"):
        run.done(intent["id"])


def _abandon(run: Run, shared: bool) -> None:
    """The export failed. What was finished stays for another try on the same snapshot, and so does its record."""
    if not shared and not run.data["finished_disks"] and not run.intents():
        try:
            run.remove()
        except (OSError, RepositoryError):
            # The failure that brought us here is the one to report; vadp_recover removes the record.
            return


def _tools(vddk: Optional[Vddk]) -> Dict[str, Optional[str]]:
    """Versions of what the data goes through."""
    versions: Dict[str, Optional[str]] = {
        "nbdkit-vddk-plugin": vddk.plugin if vddk else None,
        "vddk": vddk.version if vddk else None,
    }
    for name in ("nbdkit", "qemu-img"):
        text = run_tool([name, "--version"], what=f"The version of {name} can't be read", timeout=60)
        match = re.search(r"\d+(\.\d+)+", text)
        versions[name] = match.group(0) if match else None
    return versions
