# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The record of a run: what it is about to leave behind, written down before it does so.

A run that crashes leaves its record; who recovers reads there what may be left: snapshot, attachments, processes,
temporary files, tasks. Each change is on the disk before the call that makes it returns.

A record is a hint, and authorises nothing (proofs 6 to 10). It has a deadline, which whoever works renews: before that
the run is busy, and nobody else's to clear up. All of these times are those of the repository's file system.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time as clock
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from ..datapath import files
from ..datapath.image import atomic_write, fsync_dir
from ..datapath.processes import Child, children_of, start_time
from ..datapath.proof import boot_id, machine_id, owner_is_dead, pid_namespace
from ..errors import DamagedError, RepositoryError
from .intents import COMMON, INTENTS, check_intent
from .manifest import check_disk, check_finished_disk
from .shapes import (
    LARGEST_SEQUENCE,
    NEW_RUN_ID_PATTERN,
    POINT_PATTERN,
    RUN_ID_PATTERN,
    UUID_PATTERN,
    ShapeError,
    boolean,
    format_time,
    integer,
    list_of,
    mapping,
    nullable,
    one_of,
    parse_time,
    record,
    text,
    time,
    to_json,
)

FORMAT = 2

# Whoever works renews the deadline each minute. Between two modules of one run Ansible may take its time.
RENEW_SECONDS = 60
WORK_SECONDS = 180
PAUSE_SECONDS = 600

_COMMON = {
    "repository_id": text(UUID_PATTERN),
    "vm_uuid": text(UUID_PATTERN),
    "vm_moid": nullable(text()),
    "vm_name": nullable(text()),
    "point": nullable(text(POINT_PATTERN)),
    "started": time,
    "host": text(),
    "pid": integer(1),
    "boot_id": text(UUID_PATTERN),
    "snapshot": nullable(
        record(
            {"moid": nullable(text()), "created": time, "change_ids": mapping(r"[0-9]+", nullable(text()))},
            {"version": text()},
        )
    ),
}
_RUN = record(
    {
        **_COMMON,
        "format": one_of(FORMAT),
        "run_id": text(NEW_RUN_ID_PATTERN),
        "machine": text(),
        "pid_started": integer(0),
        "pid_namespace": text(),
        "server_uuid": nullable(text()),
        "deadline": time,
        "controller": boolean,
        "sequence": nullable(integer(1, LARGEST_SEQUENCE)),
        "finished_disks": mapping(r"[0-9]+", check_disk),
        "intents": list_of(check_intent),
    },
    {"complete_before": boolean},
)
_OLD_RUN = record(
    {
        **_COMMON,
        "format": one_of(1),
        "run_id": text(RUN_ID_PATTERN),
        "finished_disks": mapping(r"[0-9]+", check_finished_disk),
        # It is reported, and not acted upon.
        "intents": list_of(COMMON),
    }
)


def new_run_id() -> str:
    """A name for a run that nobody can guess, and no two are equal: 128 random bits, in hexadecimal."""
    return secrets.token_hex(16)


def file_system_time(folder: Path) -> datetime:
    """What time it is for the file system of *folder*, to the second: that of a file which was just written there.

    Machines that share a repository need not agree on the time; this one is the same for all of them.

    :raises OSError: nothing can be written there.
    """
    path = folder / f"clock.part-{secrets.token_hex(8)}"
    descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # a full disk has a time as well: the file was made now
            os.write(descriptor, b"\n")
            os.fsync(descriptor)
        seconds = os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        with suppress(FileNotFoundError):  # whoever recovers takes it for what a crash left
            os.unlink(str(path))
    return datetime.fromtimestamp(seconds, timezone.utc)


def _started_now() -> str:
    # Microseconds: runs are ordered by this, and several may begin within a second.
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _owner() -> Dict[str, Any]:
    """This process, as a record names it."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": machine_id(),
        "pid": pid,
        "pid_started": start_time(pid) or 0,
        "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
    }


class Run:
    """One run and its record ``runs/<run id>.json``. Safe for the threads of one process.

    ``data`` is the record: {format, run_id, repository_id, vm_uuid, vm_moid, vm_name, server_uuid, point, sequence,
    started, deadline, controller, host, machine, pid, pid_started, pid_namespace, boot_id, intents [{id, what,
    recorded, ...}], snapshot {moid, created, change_ids {key: id}} (a template's has a version and no moid),
    finished_disks {key: manifest entry}}. Change it through the methods only.
    """

    def __init__(self, path: Path, data: Dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self._mutex = threading.RLock()
        self._lost: Optional[str] = None

    @classmethod
    def create(cls, folder: Path, run_id: str, *, controller: bool = False, **fields: Any) -> Run:
        """Begin a run: its record is on the disk when this returns.

        :param controller: other modules follow in this run: it goes on when the process that begins it has ended.
        :param fields: repository_id, vm_uuid, vm_moid, vm_name, point; server_uuid and sequence where they are known.
        """
        data = {
            "format": FORMAT,
            "run_id": run_id,
            "started": _started_now(),
            "controller": controller,
            "server_uuid": None,
            "sequence": None,
            "intents": [],
            "snapshot": None,
            "finished_disks": {},
        }
        data.update(_owner())
        data.update(fields)
        run = cls(folder / f"{run_id}.json", data)
        if os.path.lexists(str(run.path)):
            raise RepositoryError(
                "The run was begun before",
                subject=run_id,
                remedy="Give each run an id of its own, 32 random hex digits",
            )
        run.data["deadline"] = run._deadline(PAUSE_SECONDS if controller else WORK_SECONDS)
        run._save()
        return run

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run's record. FileNotFoundError: the run is over. DamagedError: it can't be understood."""
        try:
            data = files.parse(files.read(str(path), what="A run's record can't be used"))
            version = data.get("format") if isinstance(data, dict) else None
            if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
                raise RepositoryError(
                    "A run's record was written by a newer version",
                    subject=str(path),
                    reason=f"it has format {version}, this version knows format {FORMAT}",
                    remedy="Upgrade the collection openvadp.backup",
                )
            (_OLD_RUN if version == 1 else _RUN)(data, "")
            if path.name != data["run_id"] + ".json":
                raise ShapeError("run_id", f"is {data['run_id']}, not that of the file")
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                "A run's record is damaged",
                subject=str(path),
                reason=str(error),
                remedy="See that nothing of that run is left on the VM (snapshots, disks), then remove the file",
            ) from None
        return cls(path, data)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.data["run_id"])

    # Whose it is, and whether it is over (proofs 6)

    @property
    def old(self) -> bool:
        """A record of format 1, which has no deadline and no proof: it is reported, and never acted upon."""
        return bool(self.data["format"] == 1)

    @property
    def here(self) -> bool:
        """Its process ids are those of this boot and this PID namespace: the kernel can be asked."""
        return bool(
            not self.old and self.data["boot_id"] == boot_id() and self.data["pid_namespace"] == pid_namespace()
        )

    @property
    def of_an_ended_boot(self) -> bool:
        """It ran on this machine, before it was restarted: nothing of it lives."""
        return bool(not self.old and self.data["machine"] == machine_id() and self.data["boot_id"] != boot_id())

    @property
    def deadline(self) -> datetime:
        """Until then it is busy, by the time of the repository's file system."""
        return parse_time(str(self.data["deadline"]))

    def busy(self, now: datetime) -> Optional[str]:
        """Why this run is not over; None if it is, and what it left may be looked at.

        :param now: :func:`file_system_time` of the repository.
        """
        data = self.data
        if self.old:
            return None
        # A run of several modules goes on between them, so that a dead process says nothing.
        if not data["controller"] and owner_is_dead(
            data["boot_id"], data["pid_namespace"], data["pid"], data["pid_started"]
        ):
            return None
        if now >= self.deadline:
            return None
        return (
            f"run {self.run_id} (process {data['pid']} on {data['host']}, begun {data['started']}) is at work until"
            f" {data['deadline']} at least"
        )

    def over(self) -> None:
        """Nobody works in this run any longer."""
        with self._mutex:
            self._change(deadline=self._deadline(0))

    @contextmanager
    def working(self, cancel: Optional[threading.Event] = None) -> Iterator[None]:
        """This process works in the run meanwhile, and says so each minute; its children carry the run's id.

        :param cancel: is set when the run can't be renewed in time, or was taken from us: nothing may be written then.
        """
        with self._mutex:
            self._lost = None
            self._change(deadline=self._deadline(WORK_SECONDS), **_owner())
        ended = threading.Event()
        known = clock.monotonic()
        renewer = threading.Thread(
            target=self._keep_renewing, args=(ended, cancel, known), name="run-deadline", daemon=True
        )
        renewer.start()
        try:
            with children_of(self.run_id):
                yield
        finally:
            ended.set()
            renewer.join()
            with self._mutex:
                if self.path.exists() and self._lost is None:
                    # The deadline that is there ends it as well, only later.
                    with suppress(RepositoryError):
                        seconds = PAUSE_SECONDS if self.data["controller"] else 0
                        self._change(deadline=self._deadline(seconds))

    def _keep_renewing(self, ended: threading.Event, cancel: Optional[threading.Event], known: float) -> None:
        while not ended.wait(RENEW_SECONDS):
            asked = clock.monotonic()
            try:
                with self._mutex:
                    if ended.is_set():
                        return
                    if not self.path.exists():
                        self._lost = "its record was removed, so somebody took it for over"
                    else:
                        self._change(deadline=self._deadline(WORK_SECONDS))
                        known = asked
            except RepositoryError as error:
                if clock.monotonic() - known >= WORK_SECONDS - RENEW_SECONDS:
                    self._lost = f"its record could not be renewed in time: {error.reason}"
            if self._lost is not None:
                if cancel is not None:
                    cancel.set()
                return

    def require_held(self) -> None:
        """:raises RepositoryError: the run was lost meanwhile, so that nothing more may be written."""
        if self._lost is not None or not self.path.exists():
            raise RepositoryError(
                "The run is no longer ours, and nothing more is written",
                subject=self.run_id,
                reason=self._lost or "its record was removed, so somebody took it for over",
                remedy="See that the repository's file system answers and has free space, then run again",
                retryable=True,
            )

    def _deadline(self, seconds: int) -> str:
        try:
            moment = file_system_time(self.path.parent) + timedelta(seconds=seconds)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return format_time(moment)

    # Intents

    def intents(self, what: Optional[str] = None) -> List[Dict[str, Any]]:
        """Copies of the intents that are open, oldest first."""
        with self._mutex:
            return [dict(intent) for intent in self.data["intents"] if what in (None, intent["what"])]

    def record(self, what: str, **fields: Any) -> int:
        """Write down that something is about to be left behind.

        :param what: snapshot, process, attachment, access, temporary_file, restore or task.
        :returns: the intent's id, for :meth:`update` and :meth:`done`.
        """
        if what not in INTENTS:
            raise ValueError(f"unknown intent: {what}")
        with self._mutex:
            taken = [intent["id"] for intent in self.data["intents"]]
            number = max(taken, default=0) + 1
            entry = dict(fields, id=number, what=what, recorded=format_time(datetime.now(timezone.utc)))
            self._change(intents=self.data["intents"] + [entry])
            return number

    def remember_task(self, task: Dict[str, Any]) -> None:
        """A task of vCenter goes on, or may do so, though nobody waits for it: the next recovery looks for its end.

        :param task: as ``Session.remembering`` tells it. What can't be written now can't be remembered.
        """
        with suppress(RepositoryError):
            self.record("task", **task)

    def update(self, intent: int, **fields: Any) -> None:
        """Add what has become known about an intent (a process id, a snapshot's moid)."""
        with self._mutex:
            self._find(intent)
            self._change(
                intents=[dict(known, **fields) if known["id"] == intent else known for known in self.data["intents"]]
            )

    def done(self, intent: int) -> None:
        """Nothing of this intent is left.

        That stays so where the record can't be written (a full disk): the next time that it can, it says so too.
        """
        with self._mutex:
            self._find(intent)
            self.data = dict(self.data, intents=[known for known in self.data["intents"] if known["id"] != intent])
            self._save()

    def settle(self, intent: int) -> None:
        """As :meth:`done`, in a recovery: a record that can't be written now may still be removed.

        Where it stays, the next recovery looks once more.
        """
        with suppress(RepositoryError):
            self.done(intent)

    @contextmanager
    def recorded(self, child: Child) -> Iterator[None]:
        """A child process stands in the record while it lives. It dies with us anyway; this is for when that fails."""
        intent = self.record("process", name=child.name, pid=child.pid, start_time=child.start_time)
        try:
            yield
        except BaseException:
            # The failure that brought us here is the one to report, also where the record has no room either.
            with suppress(RepositoryError):
                self.done(intent)
            raise
        self.done(intent)

    def set_snapshot(
        self, moid: Optional[str], created: str, change_ids: Mapping[int, Optional[str]], version: Optional[str] = None
    ) -> None:
        """Say which snapshot is read. Disks that were finished from another one are forgotten.

        :param moid: None for a template, which has none.
        :param created: the snapshot's creation time as vCenter tells it, UTC ISO 8601; when a template was changed.
        :param change_ids: the change ID of each disk in the snapshot, by device key; None where it has none.
        :param version: of a template's configuration.
        """
        with self._mutex:
            same = self.matches_snapshot(moid, created, change_ids, version)
            self._change(
                snapshot=_snapshot(moid, created, change_ids, version),
                finished_disks=self.data["finished_disks"] if same else {},
            )

    def matches_snapshot(
        self, moid: Optional[str], created: str, change_ids: Mapping[int, Optional[str]], version: Optional[str] = None
    ) -> bool:
        """Whether this is the very snapshot that the run was reading: only then do its finished disks count.

        All disks of a point come from one snapshot, and a moid alone does not prove that (it may be used again).
        """
        with self._mutex:
            return self.data["snapshot"] == _snapshot(moid, created, change_ids, version)

    def finish_disk(self, key: int, entry: Dict[str, Any]) -> None:
        """A disk's layer and hashes are complete and on the disk; *entry* is its part of the manifest."""
        try:
            check_disk(entry, f"finished_disks.{key}")
        except ShapeError as error:
            raise RepositoryError("The manifest is not complete", subject=self.run_id, reason=str(error)) from None
        with self._mutex:
            self._change(finished_disks=dict(self.data["finished_disks"], **{str(key): entry}))

    def finished_disk(self, key: int) -> Optional[Dict[str, Any]]:
        """The manifest entry of a disk that is complete, or None. Its meaning depends on :meth:`matches_snapshot`."""
        with self._mutex:
            entry = self.data["finished_disks"].get(str(key))
            return None if entry is None else dict(entry)

    def forget_disks(self) -> None:
        """What was read is no longer of use."""
        with self._mutex:
            self._change(finished_disks={})

    def remove(self) -> None:
        """The run is over and nothing of it is left. Its journals go, its record goes last."""
        with self._mutex:
            for journal in self.path.parent.glob(f"{self.run_id}.*.journal"):
                with suppress(FileNotFoundError):
                    journal.unlink()
            try:
                self.path.unlink()
            except FileNotFoundError:
                return
            except OSError as error:
                raise _unwritable(self.path, error) from None
            fsync_dir(str(self.path.parent))

    def _find(self, intent: int) -> None:
        if all(known["id"] != intent for known in self.data["intents"]):
            raise KeyError(f"run {self.run_id} has no intent {intent}")

    def _change(self, **fields: Any) -> None:
        before = self.data
        self.data = dict(before, **fields)
        try:
            self._save()
        except BaseException:
            self.data = before
            raise

    def _save(self) -> None:
        if self.old:
            raise RepositoryError(
                "A run's record of format 1 is not changed",
                subject=str(self.path),
                remedy="Remove what it names by hand, then the file",
            )
        try:
            _RUN(self.data, "")
            atomic_write(str(self.path), to_json(self.data))
        except ShapeError as error:
            raise RepositoryError("A run's record is not complete", subject=str(self.path), reason=str(error)) from None
        except OSError as error:
            raise _unwritable(self.path, error) from None


def _unwritable(path: Path, error: OSError) -> RepositoryError:
    return RepositoryError(
        "A run's record can't be written",
        subject=str(path),
        reason=error.strerror,
        remedy="See that the repository is mounted, writable and has free space",
    )


def _by_text_key(change_ids: Mapping[int, Optional[str]]) -> Dict[str, Optional[str]]:
    return {str(key): value for key, value in change_ids.items()}


def _snapshot(
    moid: Optional[str], created: str, change_ids: Mapping[int, Optional[str]], version: Optional[str]
) -> Dict[str, Any]:
    found: Dict[str, Any] = {"moid": moid, "created": created, "change_ids": _by_text_key(change_ids)}
    return found if version is None else dict(found, version=version)
