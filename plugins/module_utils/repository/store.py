# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a repository holds of one VM, as it is written: lock, folders, runs, facts, and the commit of a point."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Type

from ..datapath.image import atomic_write, fsync_dir
from ..errors import DamagedError, LockedError, RepositoryError
from . import content, sequence, state, trust
from . import manifest as manifests
from .documents import FACTS_FIELDS, FACTS_FORMAT, check_facts, names_in, unlink, unusable, write_json
from .lock import VmLock
from .names import DISK_FOLDER, PART, PART_FILE, POINT, RUN_FILE, check_point_name
from .points import VmPoints
from .runs import Run, file_system_time, new_run_id
from .shapes import LARGEST_SEQUENCE, format_time, parse_time, to_json
from .stored import file_entry, incomplete, stored_problem

if TYPE_CHECKING:
    from .layout import Repository


# How often who waits for the lock looks for a run that is busy.
_LOOK_SECONDS = 1


class VmStore(VmPoints):
    """What a repository holds of one VM. Reading needs no lock; see each method for writing."""

    def __init__(self, repository: Repository, uuid: str) -> None:
        super().__init__(repository, uuid)
        self._lock: Optional[VmLock] = None

    # Writing. All of it needs the lock.

    def lock(self, run_id: str, what: str, timeout: float = 0) -> StoreLock:
        """The VM's lock, as a context manager.

        :param run_id: of the run that takes it, whose own record is in nobody's way.
        :param what: what is being done, for those who find the VM locked ("vadp_disk_export").
        :param timeout: seconds to wait for whoever holds it, as long as no other run is busy on this VM.
        :raises LockedError: another holds it (when entered).
        """
        return StoreLock(self, run_id, what, timeout)

    def boot_lock(self, run_id: str) -> VmLock:
        """The lock of those who boot points of this VM: one at a time, and beside backups, which need not wait.

        Who holds it writes to the folder ``boots``, and nowhere else.
        """
        self.make_folder()
        self._make_folders(self._work("boots"))
        return VmLock(self._work("boots", "lock"), run_id, "restore_point_verify")

    def boot_part_files(self) -> List[Path]:
        """Unfinished evidence of boots. Under the lock of :meth:`boot_lock` each of them is a leftover."""
        folder = self._work("boots")
        if not folder.is_dir():
            return []
        return [folder / name for name in sorted(os.listdir(str(folder))) if PART_FILE.fullmatch(name)]

    def keep_evidence(self, point: str, screenshot: Optional[bytes], serial_log: bytes) -> None:
        """Keep what a boot of a point has shown, in place of the last one's. Under the lock of :meth:`boot_lock`.

        :param screenshot: a PNG file, if there is a picture.
        """
        path = self.screenshot_path(point)
        try:
            if screenshot is None:
                unlink(path)
            else:
                atomic_write(str(path), screenshot, mode=0o600)
            path = self.serial_log_path(point)
            atomic_write(str(path), serial_log, mode=0o600)
        except OSError as error:
            raise unusable(str(path), error) from None

    def require_lock(self, what: str) -> None:
        """RuntimeError (a defect of the caller) unless this object's lock is held."""
        if self._lock is None or not self._lock.held:
            raise RuntimeError(f"the VM's lock must be held to {what}")

    def write_facts(self, facts: Dict[str, Any]) -> None:
        """Write vm.json: name, path, moid, bios_uuid; format, vm_uuid, updated and the counter are added. Under the
        lock."""
        self.require_lock("write the VM's facts")
        self._write_facts(facts, *self._counter())

    def _write_facts(self, facts: Dict[str, Any], counter: int, old: Dict[str, int]) -> None:
        document: Dict[str, Any] = {"path": None, "moid": None, "bios_uuid": None}
        document.update({name: value for name, value in facts.items() if name in FACTS_FIELDS})
        document.update(format=FACTS_FORMAT, vm_uuid=self.uuid, updated=format_time(datetime.now(timezone.utc)))
        document.update(sequence=counter, format1_sequences=old)
        write_json(self._inside("vm.json"), document, check_facts)

    def next_sequence(self, vm_name: Optional[str] = None) -> int:
        """A number for a point that no other point of this VM has or had; it is used up when this returns. Under the
        lock, and before the snapshot.

        Points of format 1 are numbered and pinned first, where that was not done yet.

        :param vm_name: for the facts, where there are none yet.
        """
        self.require_lock("count a point")
        readable = self.points()
        counter, known = self._counter()
        old = {**known, **sequence.number_old(readable, known)}
        used = [manifest["sequence"] for manifest in readable if "sequence" in manifest]
        used += [run.data["sequence"] for run in self.runs() if isinstance(run.data.get("sequence"), int)]
        number = max([counter, *old.values(), *used]) + 1
        if number > LARGEST_SEQUENCE:
            raise RepositoryError(
                "No further point can be counted",
                subject=self.shown,
                reason=f"vm.json, a point or a run has the number {number - 1}, which no repository gives",
                remedy="Find out who wrote it, and bring back that file from a copy",
            )
        try:
            facts = self.facts
        except DamagedError:
            facts = {}
        self._write_facts({"name": vm_name or f"VM {self.uuid}", **facts}, number, old)
        self._pin_old(readable)
        return number

    def _pin_old(self, readable: Sequence[Dict[str, Any]]) -> None:
        """Write down what points of format 1 stand on, once (proofs 15)."""
        by_name = {manifest["point"]: manifest for manifest in readable}
        for manifest in readable:
            path = self.pins_path(manifest["point"])
            if manifest["format"] != manifests.FORMAT_WITHOUT_IDS or os.path.lexists(str(path)):
                continue
            document = content.pins_of(manifest, by_name)
            if document is not None:
                try:
                    atomic_write(str(path), to_json(document))
                except OSError as error:
                    raise unusable(str(path), error) from None

    def make_folder(self) -> None:
        """Create the VM's folder with its fixed subfolders, durably; those that are there stay.

        :raises RepositoryError: the repository has gone, or can't be written.
        """
        for parts in ((), ("points",), ("configs",), ("runs",)) if self.repository.may_write else ((), ("runs",)):
            self._make_folders(self._work(*parts))

    def make_disk_folder(self, key: int) -> Path:
        """Create the folder of a disk's layers, durably, and return it. Under the lock."""
        self.require_lock("create a folder")
        self.repository.require_writable()
        folder = self.disk_folder(key)
        self._make_folders(folder)
        return folder

    def _make_folders(self, folder: Path) -> None:
        self.repository.require_there()
        current = self.repository.work_path
        if not self.repository.may_write:
            current = state.make(self.repository.id)
        for part in folder.relative_to(current).parts:
            current = current / part
            try:
                # What a VM's disks hold is nobody else's to read; whoever wants that opens the folder up.
                os.mkdir(str(current), 0o700)
                fsync_dir(str(current.parent))
            except FileExistsError:
                if not current.is_dir():
                    raise unusable(str(current), OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))) from None
            except OSError as error:
                raise unusable(str(current), error) from None

    def write_config(self, point: str, config: Dict[str, Any]) -> Dict[str, Any]:
        """Write the VM's configuration of a point (mode 0600); returns its entry for the manifest. Under the lock."""
        self.require_lock("write a configuration")
        return self._write_blob(self.config_path(point), to_json(config))

    def write_nvram(self, point: str, nvram: bytes) -> Dict[str, Any]:
        """Write the VM's NVRAM of a point (mode 0600); returns its entry for the manifest. Under the lock."""
        self.require_lock("write the NVRAM")
        return self._write_blob(self.nvram_path(point), nvram)

    @staticmethod
    def _write_blob(path: Path, data: bytes) -> Dict[str, Any]:
        # Mode 0600: a configuration's guestinfo.* and an NVRAM can hold secrets of the guest.
        try:
            atomic_write(str(path), data, mode=0o600)
        except OSError as error:
            raise unusable(str(path), error) from None
        return file_entry(path)

    def runs(self) -> List[Run]:
        """The runs that are not over and may be acted upon, oldest first: recorded where this store writes.

        From a place that the repository does not list, its own records are not among them (:meth:`foreign_runs`).
        DamagedError: a record can't be understood.
        """
        folders = [self._work("runs")]
        here = self._kept_here()
        if here is not None and self.repository.may_write:
            folders.append(here / "runs")
        return _runs_in(*folders)

    def stranger(self, run: Run) -> Optional[str]:
        """Why a record is not one that this collection has written for this VM and this repository; None if it is.

        Copied, planted and old records are reported, and never acted upon.
        """
        if run.old:
            return "its record has format 1, which has no proof of anything"
        if run.data["repository_id"] != self.repository.id or run.data["vm_uuid"] != self.uuid:
            return "its record is of another repository or virtual machine"
        return None

    def own_runs(self) -> List[Run]:
        """Those of :meth:`runs` that are this VM's and this repository's: only they may be acted upon."""
        return [run for run in self.runs() if self.stranger(run) is None]

    def foreign_runs(self) -> List[Run]:
        """The repository's records where they are reported and not acted upon, oldest first; else none."""
        return [] if self.repository.may_write else _runs_in(self._inside("runs"))

    def now(self, write: bool = True) -> datetime:
        """The time of the repository's file system, which is what deadlines are compared with.

        :param write: a file is written for that. Else, or where none can be written, it is this machine's.
        """
        with suppress(OSError):
            if write:
                return file_system_time(self._work("runs"))
        return datetime.now(timezone.utc)

    def busy(self, run: Run) -> Optional[str]:
        """Why a run is not over; None if it is. A free lock does not say that: between two modules it is free."""
        return run.busy(self.now())

    def refuse_busy(self, own: Optional[str] = None, force: bool = False, write: bool = True) -> List[str]:
        """Nothing is done beside a run that is at work on this VM.

        :param own: the id of the run that asks.
        :param write: as of :meth:`now`.
        :param force: it is done anyway. :returns: a sentence for each run that was passed over so.
        :raises LockedError: another run is busy.
        """
        now = self.now(write)
        found = [(run, run.busy(now)) for run in self.runs() if run.run_id != own]
        busy = [(run, reason) for run, reason in found if reason is not None]
        if busy and not force:
            run, reason = busy[0]
            raise LockedError(
                "Another run works on this VM",
                subject=self.shown,
                reason=reason,
                remedy=f"Wait until it has ended. If it is certain that nothing of it lives, end it by vadp_recover"
                f" with run_id={run.run_id}, or take no notice of it with force: true",
                retryable=True,
                details={"holder": {name: run.data[name] for name in ("run_id", "host", "pid", "deadline")}},
            )
        return [f"force: {reason}, and it was treated as over." for _run, reason in busy]

    def run(self, run_id: str) -> Optional[Run]:
        """The run of that id among :meth:`runs`, None if it is over (or never was)."""
        if RUN_FILE.fullmatch(f"{run_id}.json") is None:
            return None
        here = self._kept_here()
        for folder in (self._work("runs"), None if here is None else here / "runs"):
            if folder is not None and (folder / f"{run_id}.json").exists():
                try:
                    return Run.load(folder / f"{run_id}.json")
                except FileNotFoundError:
                    continue
        return None

    def create_run(
        self,
        point: Optional[str],
        vm_moid: Optional[str] = None,
        vm_name: Optional[str] = None,
        run_id: Optional[str] = None,
        *,
        controller: bool = False,
        server_uuid: Optional[str] = None,
        complete_before: bool = False,
    ) -> Run:
        """Begin a run: its record is on the disk when this returns. Under the lock.

        :param point: the name of the point that it is to make; None if it makes none (a
            restore). A point gets its number now.
        :param run_id: where the lock was taken under a name already, or the controller has chosen one.
        :param controller: other modules follow in this run.
        :param complete_before: the point exists already, so that nothing is left to do but to show it.
        """
        self.require_lock("begin a run")
        number = None if point is None or complete_before else self.next_sequence(vm_name)
        return Run.create(
            self._work("runs"),
            run_id or new_run_id(),
            repository_id=self.repository.id,
            vm_uuid=self.uuid,
            vm_moid=vm_moid,
            vm_name=vm_name,
            point=None if point is None else check_point_name(point),
            controller=controller,
            server_uuid=server_uuid,
            sequence=number,
            complete_before=complete_before,
        )

    def commit_point(self, manifest: Dict[str, Any]) -> Dict[str, Any]:
        """Make a point visible: check that all it names is there, then write its manifest, durably and atomically.

        Under the lock. The files must have been fsynced by who wrote them.

        :returns: the sealed manifest.
        :raises RepositoryError: the point exists; a file is missing, has another size, or is the wrong image.
        """
        self.require_lock("commit a point")
        self.repository.require_writable()
        self.repository.require_there()
        if self._lock is not None and self._lock.lost:
            raise RepositoryError(
                "The VM's lock was removed, and the restore point was not made",
                subject=str(self._lock.path),
                reason="another run may write at the same time",
                remedy="Never remove a lock: it goes with its process. Run again",
            )
        sealed = manifests.seal(manifest)
        point = check_point_name(sealed["point"])
        path = self.manifest_path(point)
        if sealed["vm_uuid"] != self.uuid or sealed["repository_id"] != self.repository.id:
            raise RepositoryError("The restore point belongs elsewhere", subject=point, reason=f"this is {self.shown}")
        if os.path.lexists(str(path)):
            raise RepositoryError(
                "The restore point exists already", subject=f"{point} of {self.shown}", remedy="Choose another name"
            )
        folders = {self._inside("configs")}
        self._check_stored(self.config_path(point), sealed["configuration"])
        if sealed["nvram"] is not None:
            self._check_stored(self.nvram_path(point), sealed["nvram"])
        self._require_own_number(sealed)
        for disk in sealed["disks"]:
            self._check_stored(self.hashes_path(disk["key"], point), disk["hashes"])
            # A layer of another size would be cut or padded without a word when it is read.
            parent = None if disk["parent"] is None else self.point(disk["parent"])
            problem = self._layer_problem(sealed, disk, parent)
            if problem is not None:
                raise incomplete(self.layer_path(disk["key"], point), problem)
            folders.add(self.disk_folder(disk["key"]))
        try:
            for folder in sorted(folders):
                fsync_dir(str(folder))
            atomic_write(str(path), to_json(sealed))
            fsync_dir(str(path.parent))
        except OSError as error:
            raise unusable(str(path), error) from None
        trust.forget_settled(self)
        return sealed

    def _require_own_number(self, sealed: Dict[str, Any]) -> None:
        """:raises RepositoryError: another point has this one's number, or one of its content IDs."""
        others = self.points()
        ids = {disk["content_id"] for disk in sealed["disks"] if "content_id" in disk}
        for other in others:
            if "sequence" in sealed and other.get("sequence") == sealed["sequence"]:
                problem = f"point {other['point']} has its number, {sealed['sequence']}"
            elif ids.intersection(disk.get("content_id") for disk in other["disks"]):
                problem = f"point {other['point']} has one of its content IDs"
            else:
                continue
            raise RepositoryError(
                "The restore point does not belong here", subject=f"{sealed['point']} of {self.shown}", reason=problem
            )

    def _check_stored(self, path: Path, stored: Dict[str, Any]) -> None:
        problem = stored_problem(path, stored)
        if problem:
            raise incomplete(path, problem)

    def remove_unused(self) -> None:
        """Remove the folder of a VM of which nothing was ever kept, as a restore to a new one leaves it.

        Only for an id that no backup can know yet: whoever waited for the lock would hold that of a removed file.
        """
        folder = self.work_path
        try:
            names = set(os.listdir(str(folder)))
            if names - {"points", "configs", "runs", "lock"}:
                return
            for name in sorted(names - {"lock"}):
                os.rmdir(str(folder / name))
            os.unlink(str(folder / "lock"))
            os.rmdir(str(folder))
            fsync_dir(str(folder.parent))
        except OSError:
            return  # something is kept there, or another has removed it

    def uncommitted_files(self) -> List[Path]:
        """Layers, hashes, configurations and NVRAM that belong to no point: what a run left that did not come to
        its end.

        A damaged manifest still counts as a point: its files may be all that is left of it. Unfinished files
        (``.part-``) are told by :meth:`part_files`.
        """
        committed = set(self.point_names())
        found = []
        for folder, suffixes in self._data_folders():
            for name in sorted(os.listdir(str(folder))):
                stem, suffix = os.path.splitext(name)
                if suffix in suffixes and stem not in committed and POINT.fullmatch(stem) and PART not in stem:
                    found.append(folder / name)
        return found

    def part_files(self) -> List[Path]:
        """Unfinished files (``<final name>.part-<id>``) anywhere in the VM's folder, whosoever they are."""
        folders = [self.work_path, self._work("runs")]
        if self.repository.may_write:
            folders += [self._inside("points"), *(folder for folder, dummy in self._data_folders())]
        found = []
        for folder in folders:
            if folder.is_dir():
                found += [folder / name for name in sorted(os.listdir(str(folder))) if PART_FILE.fullmatch(name)]
        return found

    def _data_folders(self) -> List[Tuple[Path, Tuple[str, ...]]]:
        if not self.path.is_dir():
            return []
        folders: List[Tuple[Path, Tuple[str, ...]]] = [
            (self._inside(name), (".qcow2", ".hashes"))
            for name in sorted(os.listdir(str(self.path)))
            if DISK_FOLDER.fullmatch(name)
        ]
        folders.append((self._inside("configs"), (".json", ".nvram")))
        return [(folder, suffixes) for folder, suffixes in folders if folder.is_dir()]


class StoreLock(VmLock):
    """The lock of a :class:`VmStore`, which then allows writing.

    Where restores left records on this machine, it is that folder's lock too: who holds it may act upon those.
    """

    def __init__(self, store: VmStore, run_id: str, what: str, timeout: float = 0) -> None:
        self._store = store
        self._second: Optional[VmLock] = None
        self._look_at_runs = 0.0
        super().__init__(store._work("lock"), run_id, what, timeout)

    def __enter__(self) -> StoreLock:
        self._store.make_folder()
        super().__enter__()
        here = self._store._kept_here()
        if here is not None and here.is_dir() and here / "lock" != self.path:
            second = VmLock(here / "lock", self.run_id, self.what, self.timeout)
            try:
                second.__enter__()
            except BaseException:
                super().__exit__(None, None, None)
                raise
            self._second = second
        self._store._lock = self
        return self

    def _is_hopeless(self) -> bool:
        """Another run is busy, and holds the lock for as long as it works."""
        now = time.monotonic()
        if now < self._look_at_runs:
            return False
        self._look_at_runs = now + _LOOK_SECONDS
        try:
            # Nothing is written without the lock, not even to ask for the time.
            self._store.refuse_busy(own=self.run_id, write=False)
        except RepositoryError:
            return True
        return False

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        second, self._second = self._second, None
        try:
            super().__exit__(kind, value, trace)
        finally:
            if second is not None:
                second.__exit__(kind, value, trace)


def _runs_in(*folders: Path) -> List[Run]:
    found = []
    for folder in folders:
        for name in names_in(folder):
            if RUN_FILE.fullmatch(name):
                try:
                    found.append(Run.load(folder / name))
                except FileNotFoundError:
                    continue  # it ended meanwhile
    return sorted(found, key=lambda run: (parse_time(run.data["started"]), run.run_id))
