# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The record of a run: what it is about to leave behind, written down before it does so.

A run that crashes leaves its record; who recovers reads there what may be left: snapshot, attachments, processes,
temporary files. Each change is on the disk before the call that makes it returns.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from ..datapath.image import atomic_write, fsync_dir
from ..datapath.processes import Child
from ..errors import DamagedError, RepositoryError
from .manifest import check_disk
from .shapes import (
    POINT_PATTERN,
    RUN_ID_PATTERN,
    UUID_PATTERN,
    ShapeError,
    format_time,
    integer,
    list_of,
    mapping,
    nullable,
    one_of,
    record,
    text,
    time,
    to_json,
)

FORMAT = 1
INTENTS = ("snapshot", "process", "attachment", "access", "temporary_file", "restore")

_RUN = record(
    {
        "format": one_of(FORMAT),
        "run_id": text(RUN_ID_PATTERN),
        "repository_id": text(UUID_PATTERN),
        "vm_uuid": text(UUID_PATTERN),
        "vm_moid": nullable(text()),
        "vm_name": nullable(text()),
        "point": nullable(text(POINT_PATTERN)),
        "started": time,
        "host": text(),
        "pid": integer(1),
        "boot_id": text(UUID_PATTERN),
        "intents": list_of(record({"id": integer(1), "what": one_of(*INTENTS), "recorded": time})),
        "snapshot": nullable(
            record(
                {"moid": nullable(text()), "created": time, "change_ids": mapping(r"[0-9]+", nullable(text()))},
                {"version": text()},
            )
        ),
        "finished_disks": mapping(r"[0-9]+", check_disk),
    }
)


def new_run_id(now: Optional[datetime] = None) -> str:
    """A name for a run: sorts by time, and no two are equal (``20261122T084203.417123Z-3f9a2b1c``)."""
    moment = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    return f"{moment:%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"


def boot_id() -> str:
    """The id of this machine's present boot: a process id of another boot means nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class Run:
    """One run and its record ``runs/<run id>.json``. Safe for the threads of one process.

    ``data`` is the record: {format, run_id, repository_id, vm_uuid, vm_moid, vm_name, point, started, host, pid,
    boot_id, intents [{id, what, recorded, ...}], snapshot {moid, created, change_ids {key: id}} (a template's has a
    version and no moid), finished_disks {key: manifest entry}}. Change it through the methods only.
    """

    def __init__(self, path: Path, data: Dict[str, Any]) -> None:
        self.path = path
        self.data = data
        self._mutex = threading.RLock()

    @classmethod
    def create(cls, folder: Path, run_id: str, **fields: Any) -> Run:
        """Begin a run: its record is on the disk when this returns.

        :param fields: repository_id, vm_uuid, vm_moid, vm_name, point.
        """
        data = {
            "format": FORMAT,
            "run_id": run_id,
            "started": format_time(datetime.now(timezone.utc)),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot_id": boot_id(),
            "intents": [],
            "snapshot": None,
            "finished_disks": {},
        }
        data.update(fields)
        run = cls(folder / f"{run_id}.json", data)
        run._save()
        return run

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run's record. FileNotFoundError: the run is over. DamagedError: it can't be understood."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.get("format") if isinstance(data, dict) else None
            if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
                raise RepositoryError(
                    "A run's record was written by a newer version",
                    subject=str(path),
                    reason=f"it has format {version}, this version knows format {FORMAT}",
                    remedy="Upgrade the collection openvadp.backup",
                )
            _RUN(data, "")
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

    @property
    def at_work(self) -> bool:
        """Whether a process of this machine's present boot has the number of the one that began it, and is not us.

        False proves nothing: the run may go on by other processes, or on another machine.
        """
        pid = int(self.data["pid"])
        return self.data["boot_id"] == boot_id() and pid != os.getpid() and os.path.exists(f"/proc/{pid}")

    def intents(self, what: Optional[str] = None) -> List[Dict[str, Any]]:
        """Copies of the intents that are open, oldest first."""
        with self._mutex:
            return [dict(intent) for intent in self.data["intents"] if what in (None, intent["what"])]

    def record(self, what: str, **fields: Any) -> int:
        """Write down that something is about to be left behind.

        :param what: snapshot, process, attachment, access, temporary_file or restore.
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

    @contextmanager
    def recorded(self, child: Child) -> Iterator[None]:
        """A child process stands in the record while it lives. It dies with us anyway; this is for when that fails."""
        intent = self.record("process", name=child.name, pid=child.pid, start_time=child.start_time)
        try:
            yield
        except BaseException:
            # The failure that brought us here is the one to tell, also where the record has no room either.
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
        :param change_ids: the change id of each disk in the snapshot, by device key; None where it has none.
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
        """What was read is of no use any more."""
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
        try:
            _RUN(self.data, "")
            atomic_write(str(self.path), to_json(self.data))
        except ShapeError as error:
            raise RepositoryError("A run's record is not complete", subject=str(self.path), reason=str(error)) from None
        except OSError as error:
            raise RepositoryError(
                "A run's record can't be written",
                subject=str(self.path),
                reason=error.strerror,
                remedy="See that the repository is mounted, writable and has free space",
            ) from None


def _by_text_key(change_ids: Mapping[int, Optional[str]]) -> Dict[str, Optional[str]]:
    return {str(key): value for key, value in change_ids.items()}


def _snapshot(
    moid: Optional[str], created: str, change_ids: Mapping[int, Optional[str]], version: Optional[str]
) -> Dict[str, Any]:
    found: Dict[str, Any] = {"moid": moid, "created": created, "change_ids": _by_text_key(change_ids)}
    return found if version is None else dict(found, version=version)
