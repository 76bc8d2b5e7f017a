# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What crashed runs of this repository left: on this machine, on the VM, in the repository.

A record says where to look, and authorises nothing: copied, planted and old records say the same as true ones. What is
touched is proved to be ours by vCenter, by the kernel or by the place (proofs 6 to 10). Everything else is reported,
together with the command that removes it.

The order is that of VADP facts 30: processes, attachments, tasks, snapshots, access, machines, temporary files; a run's
record goes last, so that a recovery that fails half-way is done again.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..datapath.processes import RuntimeDir
from ..datapath.proof import NotProved, OurProcess
from ..errors import LockedError, VadpError, VsphereError
from ..libraries import vim
from ..repository.store import VmStore
from ..repository.run_files import files_of, orphans, remove_file
from ..repository.runs import Run, new_run_id
from ..transport import hotadd_recovery, https
from ..vsphere.change_tracking import is_temporary
from ..vsphere.inventory import VmRef
from ..vsphere.new_machine import is_new_vm, new_mark, remove_leftover
from ..vsphere.session import Session
from ..vsphere.snapshots import (
    Snapshot,
    consolidate_if_needed,
    remove_snapshot,
    what_is_left,
)
from . import access

DEVICE_DIR = "/dev/disk/by-id"
SYSFS_DIR = "/sys"

_TERMINATE_SECONDS = 10
_KILL_SECONDS = 10
# So long a task is waited for that an earlier run left; one that goes on is looked for again by the next recovery.
_TASK_SECONDS = 60

# What keeps a run's record. A restore that crashed goes on from its journal (VADP facts 12), prepared access can't be
# ended without VDDK, a task must end, and processes are looked at on their own machine only.
_KEPT_INTENTS = ("access", "restore", "task", "process")

Recovered = Dict[str, Any]


@dataclass
class Recovery:
    """What a recovery comes to.

    :param found: what was removed, or would be: [{what, id, action}], in that order.
    :param told: sentences about what is left, and how it is removed.
    :param ended: how many records went.
    """

    found: List[Recovered] = field(default_factory=list)
    told: List[str] = field(default_factory=list)
    ended: int = 0


@dataclass(frozen=True)
class Looked:
    """A recovery on its way.

    :param runs: whose leftovers are looked at: they are over, or are the caller's own.
    :param run_id: of a run that a user has named: its snapshot is removed although no record is there.
    """

    session: Session
    store: VmStore
    vm: Optional[VmRef]
    runs: List[Run]
    check_mode: bool
    device_dir: str
    sysfs_dir: str
    vddk_libdir: Optional[str]
    run_id: Optional[str]
    force: bool
    result: Recovery

    def item(self, what: str, name: str, action: str) -> None:
        shown = f"would be {action}" if self.check_mode else action
        self.result.found.append({"what": what, "id": name, "action": shown})

    def done(self, run: Run, intent: Dict[str, Any]) -> None:
        if not self.check_mode:
            run.settle(intent["id"])

    @property
    def known(self) -> Dict[str, Run]:
        return {run.run_id: run for run in self.runs}

    def of_this_server(self, run: Run) -> bool:
        """The managed object ids of that run mean something here."""
        return run.data["server_uuid"] is not None and run.data["server_uuid"] == self.session.server_uuid


def recover(
    session: Session,
    store: VmStore,
    vm: Optional[VmRef],
    check_mode: bool = False,
    *,
    device_dir: str = DEVICE_DIR,
    sysfs_dir: str = SYSFS_DIR,
    vddk_libdir: Optional[str] = None,
    run_id: Optional[str] = None,
    force: bool = False,
) -> Recovery:
    """Remove what runs of this repository left of a VM; idempotent. Under the VM's lock, unless in check mode.

    Runs that are at work are left alone, unless *force* is set.

    :param vm: None if the VM is gone: then only this machine, the proxies and the repository are looked at.
    :param check_mode: list only.
    :param device_dir: where attached disks have links by their ids, on this machine.
    :param run_id: what this run left, and no other.
    :param force: runs that are at work are treated as over.
    :raises VadpError: something of ours could not be removed.
    """
    result = Recovery()
    here, now = store.runs() + store.foreign_runs(), store.now(write=not check_mode)
    runs = []
    for run in here:
        problem = store.stranger(run)
        if problem is not None:
            result.told.append(_told(run, problem))
        elif run_id is not None:
            if run.run_id == run_id:
                runs.append(run)
        elif force or store.report_only or run.busy(now) is None:
            runs.append(run)
    if store.report_only:
        result.told += [_told(run, "this place of the repository is not proved to be its own") for run in runs]
        return result
    looked = Looked(session, store, vm, runs, check_mode, device_dir, sysfs_dir, vddk_libdir, run_id, force, result)
    _processes(looked)
    ours = [run for run in runs if looked.of_this_server(run)] if _need_server(runs) else []
    if not check_mode:
        access.clean_up(session, ours, vddk_libdir)
    for run in runs:
        result.found += hotadd_recovery.recover(
            session, run, sysfs_dir=sysfs_dir, device_dir=device_dir, check_mode=check_mode
        )
    for run in ours:
        result.found += https.recover_leases(
            session, run, check_mode=check_mode, vm_moid=None if vm is None else vm.moid
        )
    unsettled = _tasks(looked)
    if vm is not None:
        _snapshots(looked, vm, here)
    for identity, action in access.end(session, vm, ours, vddk_libdir, check_mode):
        looked.item("access", identity, action)
    _new_machines(looked)
    _temporary_files(looked, here)
    if not check_mode:
        _close(looked, unsettled)
    _tell_of_kept(looked, unsettled)
    return result


def _need_server(runs: Sequence[Run]) -> bool:
    return any(run.data["server_uuid"] is not None for run in runs)


def _told(run: Run, problem: str) -> str:
    """A record that is not acted upon: what it names, and what to do."""
    named = (_named(intent, run) for intent in run.intents())
    what = "; ".join(words for words in named if words is not None) or "nothing"
    return (
        f"Run {run.run_id} of {run.data['host']}, begun {run.data['started']}, was left as it is, for {problem}. It"
        f" names {what}. When nothing of that is left: rm '{run.path}'."
    )


def _named(intent: Dict[str, Any], run: Run) -> Optional[str]:
    """What an intent names, and how to remove it by hand; None if there is nothing to do."""
    kind = str(intent["what"])
    if kind == "restore" and is_new_vm(intent):
        kind = "new machine"
    words = {
        "snapshot": "snapshot {name!r} (vm_snapshot with state: absent and its snapshot_moid)",
        "attachment": "{file} attached to {proxy_moid} (proxy_hotadd with state: detached)",
        "process": "process {pid} on {host} (kill {pid})",
        "new machine": "the virtual machine {name!r} (delete it in the vSphere client if it is useless)",
        "restore": "a restore of point {point} (run that restore again)",
        "access": "prepared access {identity!r} (vadp_access with state: ended)",
        "temporary_file": "unfinished files of point {run_point}",
    }.get(kind)
    if words is None:
        return None
    facts: Dict[str, Any] = defaultdict(lambda: None, intent, host=run.data["host"], run_point=run.data["point"])
    return words.format_map(facts)


# Processes


def _processes(looked: Looked) -> None:
    """Children that outlived their run: of this boot and namespace, and ours by what the kernel says (proofs 7)."""
    elsewhere = []
    for run in looked.runs:
        for intent in run.intents("process"):
            if run.here:
                _process(looked, run, intent)
            elif run.of_an_ended_boot or looked.force:
                looked.done(run, intent)
            elif not intent.get("told"):
                looked.result.told.append(
                    f"Process {intent.get('pid')} ({intent.get('name')}) of run {run.run_id} may be left on"
                    f" {run.data['host']}: run vadp_recover there. If that machine is gone, end the run by vadp_recover"
                    f" with run_id={run.run_id} and force: true."
                )
                if not looked.check_mode:
                    run.update(intent["id"], told=True)
            else:
                elsewhere.append(run)
    if elsewhere:
        hosts = sorted({str(run.data["host"]) for run in elsewhere})
        count = len({run.run_id for run in elsewhere})
        looked.result.told.append(
            f"{count} runs of other machines ({', '.join(hosts[:5])}) wait for a recovery there, as reported before."
        )


def _process(looked: Looked, run: Run, intent: Dict[str, Any]) -> None:
    pid, name = int(intent["pid"]), str(intent.get("name"))
    try:
        with OurProcess(pid, int(intent["start_time"]), run.run_id) as process:
            if not looked.check_mode and not process.end(_TERMINATE_SECONDS, _KILL_SECONDS):
                raise VadpError(
                    "A process of a crashed run does not end",
                    subject=f"{name} ({pid})",
                    reason="it waits in the kernel, perhaps for a file system that does not answer",
                    remedy="See that the repository's file system answers, then run again",
                )
            looked.item("process", str(pid), "ended")
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise VadpError(
            "A process of a crashed run can't be ended",
            subject=f"{name} ({pid})",
            reason=error.strerror,
            remedy="Run as the user who ran that backup, or as root",
        ) from error
    except NotProved as doubt:
        looked.result.told.append(
            f"Process {pid} is named by run {run.run_id} as its {name} and was left alone: {doubt}. See what it is, and"
            f" end it by kill {pid} if it is of no use."
        )
        if not doubt.certain:
            return
    looked.done(run, intent)


# Tasks


def _tasks(looked: Looked) -> List[str]:
    """Tasks that went on when nobody waited for them any more: what they come to is there before it is looked for.

    :returns: ids of runs that have a task which goes on.
    """
    session, unsettled = looked.session, []
    for run in looked.runs:
        for intent in run.intents("task"):
            state = "of another server"
            if intent.get("server_uuid") is not None and intent["server_uuid"] == session.server_uuid:
                task = vim.Task(str(intent["task"]), session.stub)
                state = session.wait_for_end(task, 0 if looked.check_mode else _TASK_SECONDS)
            if state in ("success", "error", "gone"):
                looked.done(run, intent)
                continue
            unsettled.append(run.run_id)
            looked.result.told.append(
                f"Task {intent.get('task')} of run {run.run_id} ({intent.get('failed')}: {intent.get('subject')}) is"
                f" {state}: what comes of it is looked for by the next recovery."
            )
    return unsettled + _snapshot_tasks(looked)


def _snapshot_tasks(looked: Looked) -> List[str]:
    """A run that was killed while its snapshot was being made or removed has told nobody of the task."""
    waiting = [run for run in looked.runs if run.intents("snapshot") and looked.of_this_server(run)]
    if looked.run_id is not None:
        # Whoever ends a run in order has waited for what the record names; a removal under way is waited for below.
        waiting = [run for run in waiting if not all(intent.get("moid") for intent in run.intents("snapshot"))]
    if looked.vm is None or not waiting:
        return []
    session = looked.session
    for task, info in _recent_tasks(session, looked.vm):
        kind = str(info["info.descriptionId"])
        if kind not in ("VirtualMachine.createSnapshot", "VirtualMachine.removeSnapshot"):
            continue
        state = str(info["info.state"])
        if state in ("queued", "running") and not looked.check_mode:
            state = session.wait_for_end(task, _TASK_SECONDS)
        if state in ("queued", "running"):
            looked.result.told.append(
                f"{looked.vm} has a task under way ({task._moId}, {kind}) that may be of an earlier run: the next"
                " recovery looks again."
            )
            return [run.run_id for run in waiting]
    return []


def _recent_tasks(session: Session, vm: VmRef) -> List[Tuple[Any, Dict[str, Any]]]:
    tasks = list(session.read(vm.obj, "recentTask")["recentTask"] or [])
    paths = ("info.descriptionId", "info.state")
    try:
        found = session.read_many(tasks, vim.Task, paths)
        return [(task, found[task._moId]) for task in tasks]
    except VsphereError:
        # One of them has just gone, so each is asked alone.
        alone = []
        for task in tasks:
            with suppress(VsphereError):
                alone.append((task, session.read(task, *paths)))
        return alone


# Snapshots


def _snapshots(looked: Looked, vm: VmRef, here: Sequence[Run]) -> None:
    """Snapshots of runs that are recorded here, and deltas that a removal of ours left (VADP facts 15)."""
    session, check_mode = looked.session, looked.check_mode
    removed = False
    tree, needed, files = what_is_left(session, vm)
    for snapshot in reversed(tree):  # children first
        if not _is_of_this_repository(snapshot, looked.store):
            if is_temporary(snapshot) and _run_id_of(snapshot) is None:
                looked.result.told.append(
                    f"{_called(snapshot)} of {vm} is a temporary one of vm_change_tracking, which was used"
                    f" without a repository. It is removed by vm_snapshot with state: absent and"
                    f" snapshot_moid={snapshot.moid}, or by the next vm_change_tracking."
                )
            continue
        doubt = _doubt(looked, vm, snapshot, here)
        if doubt is not None:
            if doubt:
                looked.result.told.append(doubt)
            continue
        if not check_mode:
            remove_snapshot(session, vm, snapshot)
        looked.item("snapshot", snapshot.moid, "removed")
        removed = True
    # A snapshot that left the tree leaves no marker; that one of ours was there, the run's record knows.
    if removed or looked.run_id is not None or any(run.intents("snapshot") for run in looked.runs):
        if check_mode:
            if needed or files:
                looked.item("snapshot", vm.moid, "consolidated")
        elif (removed or needed or files) and consolidate_if_needed(session, vm):
            looked.item("snapshot", vm.moid, "consolidated")


def _is_of_this_repository(snapshot: Snapshot, store: VmStore) -> bool:
    return snapshot.marker is not None and snapshot.marker.get("repository_id") == store.repository.id


def _called(snapshot: Snapshot) -> str:
    return f"Snapshot '{snapshot.name}' ({snapshot.moid})"


def _run_id_of(snapshot: Snapshot) -> Optional[str]:
    found = (snapshot.marker or {}).get("run_id")
    return found if isinstance(found, str) else None


def _doubt(looked: Looked, vm: VmRef, snapshot: Snapshot, here: Sequence[Run]) -> Optional[str]:
    """Why a snapshot with this repository's marker is not removed; "" where that is nothing to tell of (proofs 8)."""
    run_id = _run_id_of(snapshot)
    run = looked.known.get(run_id or "")
    if run is None:
        if looked.run_id is not None:
            return None if run_id == looked.run_id else ""
        if any(other.run_id == run_id for other in here):
            return ""  # its run is at work, or was reported
        return (
            f"{_called(snapshot)} of {vm} carries the marker of this repository, but run {run_id} has no"
            f" record here, so it was left. If that run is over: vadp_recover with run_id={run_id} removes it."
        )
    recorded = recorded_moids(looked.session, run, vm)
    if recorded is not None and snapshot.moid not in recorded:
        return (
            f"{_called(snapshot)} of {vm} carries the marker of run {run_id}, which made another one, so it"
            f" was left. It is removed by vm_snapshot with state: absent and snapshot_moid={snapshot.moid}."
        )
    return None


def recorded_moids(session: Session, run: Run, vm: VmRef) -> Optional[List[str]]:
    """The moids of the snapshots that a run has made of a VM; None where that is not known for all of them.

    They count only as long as the VM has the registration that they were recorded in.
    """
    intents = run.intents("snapshot")
    same = [item for item in intents if item.get("server_uuid") is not None and item.get("vm_moid") == vm.moid]
    if not intents or len(same) < len(intents) or any(not item.get("moid") for item in same):
        return None
    if any(item["server_uuid"] != session.server_uuid for item in same):
        return None
    return [str(item["moid"]) for item in same]


# Machines


def _new_machines(looked: Looked) -> None:
    """Machines that a restore was making: half restored they are of no use, unless the user wanted to keep them."""
    for run in looked.runs:
        for intent in filter(is_new_vm, run.intents("restore")):
            mark = new_mark(looked.store.repository.id, run.run_id)
            removal = remove_leftover(looked.session, intent, mark, run.data["server_uuid"], looked.check_mode)
            if removal is not None and removal.gone or removal is not None and removal.action.startswith("kept"):
                looked.item("new_vm", removal.name, removal.action)
            elif removal is not None:
                looked.result.told.append(
                    f"The virtual machine {removal.name}, which a restore made that did not finish, was"
                    f" {removal.action}."
                )
            if removal is None or removal.settled:
                looked.done(run, intent)


# Temporary files


def _temporary_files(looked: Looked, here: Sequence[Run]) -> None:
    """Unfinished files, files of points that a run did not commit, and folders of sockets and logs."""
    store = looked.store
    files, doubt = files_of(store, looked.runs)
    if looked.run_id is None:
        files += [path for path in store.repository.part_files() + orphans(store, here) if path not in files]
    if doubt:
        looked.result.told.append(doubt)
    for path in files:
        if not looked.check_mode:
            remove_file(path)
        looked.item("temporary_file", str(path), "removed")
    for run in looked.runs:
        if run.here or run.of_an_ended_boot:
            for folder in RuntimeDir.leftovers(run.run_id, remove=not looked.check_mode):
                looked.item("temporary_file", folder, "removed")
    _boots(looked)


def _boots(looked: Looked) -> None:
    """What a restore_point_verify that was killed left, unless another boots the machine now."""
    store, check_mode = looked.store, looked.check_mode
    if looked.run_id is not None:
        return
    names = RuntimeDir.leftovers(store.boot_name, remove=not check_mode)
    parts = store.boot_part_files()
    if parts and not check_mode:
        try:
            with store.boot_lock(new_run_id()):
                parts = store.boot_part_files()
                for path in parts:
                    remove_file(path)
        except LockedError:
            parts = []
    for name in [*names, *map(str, parts)]:
        looked.item("temporary_file", name, "removed")


# Records


def _close(looked: Looked, unsettled: Sequence[str]) -> None:
    for run in looked.runs:
        if run.run_id not in unsettled and not _kept(run):
            run.remove()
            looked.result.ended += 1


def _kept(run: Run) -> List[str]:
    return sorted({str(intent["what"]) for intent in run.intents() if intent["what"] in _KEPT_INTENTS})


def _tell_of_kept(looked: Looked, unsettled: Sequence[str]) -> None:
    for run in looked.runs:
        kinds = [kind for kind in _kept(run) if kind not in ("task", "process")]
        if kinds and not (looked.check_mode and run.run_id in unsettled):
            looked.result.told.append(
                f"Run {run.run_id} of {run.data['started']} was left as it is: it has not ended its {', '.join(kinds)}."
                + "".join(f" {intent['problem']}." for intent in run.intents() if intent.get("problem"))
            )


def would_end(store: VmStore, run_id: Optional[str] = None) -> bool:
    """Whether a recovery would end a record, as far as the records themselves say."""
    now = store.now(write=False)
    return any(
        store.stranger(run) is None
        and not _kept(run)
        and (run.run_id == run_id if run_id is not None else run.busy(now) is None)
        for run in store.runs()
    )
