# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folder of a repository (format 2): it is opened, made and adopted here, and its VMs and runs are found.

No path leaves the repository: UUIDs, device keys and point names are checked before they become part of a path, and
a symbolic link that leads out is refused. docs/repository-format.md describes the tree.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid as uuid_module
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..datapath import files
from ..datapath.image import fsync_dir
from ..errors import DamagedError, InputError, RepositoryError
from ..shown import shown
from . import adoption, places, state
from .documents import (
    LOCK_FILE,
    REPOSITORY_FILE,
    REPOSITORY_FORMAT,
    check_description,
    names_in,
    read_description,
    unlink,
    unusable,
    write_json,
)
from .lock import RepositoryLock
from .names import PART, UUID, check_run_id, check_uuid
from .places import Place, UnknownPlace
from .runs import Run
from .shapes import to_json
from .store import VmStore


def is_empty_folder(path: str) -> bool:
    """Whether ``Repository.open(path, create=True)`` would make a new repository there. It changes nothing."""
    try:
        return not _foreign_entries(Path(path))
    except OSError:
        return False


def _foreign_entries(path: Path) -> List[str]:
    # A file system's own lost+found is nobody's data, and a lock and an unfinished repository.json are what a crash
    # of ours leaves.
    return sorted(
        name
        for name in os.listdir(str(path))
        if name not in ("lost+found", LOCK_FILE) and not name.startswith(REPOSITORY_FILE + PART)
    )


def _listed(entries: List[str]) -> str:
    return f"it holds other data: {', '.join(entries[:5])}{', ...' if len(entries) > 5 else ''}"


class Repository:
    """A repository of restore points: a folder with ``repository.json`` in it.

    It can be read from any place. It is written only from one that it lists (proofs 1, 2).

    ``format`` is that of repository.json, ``places`` what that lists (none in format 1), ``place`` where it is; None
    where that can't be determined. ``created``: opening it has made it. ``done`` says what adopting it has changed (in
    check mode, would change), in sentences; ``warnings`` what is odd.
    """

    def __init__(self, path: Path, document: Dict[str, Any]) -> None:
        self.path = path
        self.id = str(document["id"])
        self.format = int(document["format"])
        self.places = [Place.from_json(entry) for entry in document.get("places", ())]
        self.created = False
        self.done: List[str] = []
        self.warnings: List[str] = []
        self.place: Optional[Place] = None
        self._unknown: Optional[UnknownPlace] = None
        self._supposed = False
        self._problem: Optional[RepositoryError] = None
        self._judged = False
        try:
            self.place = places.place_of(str(path))
        except UnknownPlace as error:
            self._unknown = error
        self._root = _identity_of(path)

    @classmethod
    def open(
        cls,
        path: str,
        create: bool = False,
        writable: bool = False,
        adopt: Optional[str] = None,
        check_mode: bool = False,
    ) -> Repository:
        """Open a repository.

        :param create: an empty folder becomes a repository (and the repository must be writable).
        :param writable: fail now if it must not or can't be written to.
        :param adopt: ``moved``, ``copy`` or ``another_path``: the place is taken into its list (:mod:`.adoption`).
        :param check_mode: nothing is created or adopted; it is looked at as if it had been adopted.
        :raises InputError: the path is relative.
        :raises RepositoryError: no such folder, no repository in it, a newer format, not writable, another place.
        """
        root, names = _look(path)
        created = False
        if REPOSITORY_FILE not in names:
            if not create or check_mode:
                others = _foreign_entries(root)
                raise RepositoryError(
                    "The folder holds no repository",
                    subject=path,
                    reason=f"{REPOSITORY_FILE} is missing, and {_listed(others) if others else 'it is empty'}",
                    remedy="See that the repository's file system is mounted there and that the path is right; "
                    "for a new repository in an empty folder, set create (role vm_backup: vm_backup_create) to true, "
                    "once",
                )
            foreign = _foreign_entries(root)
            # Another may have made it, and begun to use it, since the first look.
            if foreign and not (root / REPOSITORY_FILE).exists():
                raise RepositoryError(
                    "The folder can't become a repository",
                    subject=path,
                    reason=_listed(foreign),
                    remedy="Name an empty folder, or the folder of a repository",
                )
            created = _create_repository(root, places.place_of(str(root)))
        repository = cls(root, read_description(root))
        repository.created = created
        repository.inside()
        if adopt is not None and adoption.wanted(repository, adopt):
            if check_mode:
                adoption.check(repository, adopt)
                repository._supposed = True
                repository.done.append(f"The repository would be adopted ({adopt}).")
            else:
                done = adoption.adopt(repository, adopt)
                repository = cls(root, read_description(root))
                repository.done += done
        if writable or create or adopt is not None:
            repository.require_writable()
        if repository.moved_machine:
            repository.warnings.append(
                f"The repository {path} was written by another machine before. If that one still uses it, or has a"
                " clone of this file system, they must not both go on."
            )
        return repository

    @classmethod
    def open_to_write(cls, path: str, create: bool, adopt: Optional[str], check_mode: bool) -> Optional[Repository]:
        """As :meth:`open`, of who will write; None where an empty folder would become a repository by *create*.

        :raises RepositoryError: it must not be written, or could not be made there.
        """
        if create and is_empty_folder(path):
            places.place_of(path)
            return None
        return cls.open(path, writable=True, adopt=adopt, check_mode=check_mode)

    # Places

    @property
    def listed(self) -> bool:
        """Whether it lies in a place that it lists: from there it is written and recovered."""
        return self._supposed or self._entry is not None

    @property
    def report_only(self) -> bool:
        """Whether its records are reported and not acted upon: they may be those of another copy."""
        return not self.listed

    @property
    def _entry(self) -> Optional[Place]:
        return None if self.place is None else places.find(self.place, self.places)

    @property
    def moved_machine(self) -> bool:
        """Whether this local file system was written by another machine the last time. Shares have several anyway."""
        entry = self._entry
        if entry is None or self.place is None or entry.kind == places.NETWORK:
            return False
        return places.is_other_machine(entry.machine, self.place.machine) is True

    def note_machine(self) -> None:
        """Write down that it is this machine now. Before anything else is written to a local place."""
        if self.moved_machine and self.may_write:
            adoption.note_machine(self)

    @property
    def may_write(self) -> bool:
        """Whether lock, records and all else go into the repository; else they go to :attr:`work_path`."""
        return self._why_not_written() is None

    def require_writable(self) -> None:
        """:raises RepositoryError: it must not be written from here, or can't be."""
        problem = self._why_not_written()
        if problem is not None:
            raise problem

    def _why_not_written(self) -> Optional[RepositoryError]:
        # Once: a run that has begun in one place does not go on in the other.
        if not self._judged:
            self._problem, self._judged = self._write_problem(), True
        return self._problem

    def _write_problem(self) -> Optional[RepositoryError]:
        if not self.listed:
            return self._place_problem()
        entry = self._entry
        if entry is not None and self.place is not None:
            keeps = places.mount_of(str(self.path)).local_locks
            if keeps is not None and places.is_other_machine(entry.machine, self.place.machine) is not False:
                return RepositoryError(
                    "The repository is used by two machines, and their locks do not reach each other",
                    subject=str(self.path),
                    reason=keeps,
                    remedy="Mount it with locks that all machines see; if the other machine will never use it again,"
                    " set adopt to moved",
                )
        if not os.access(str(self.path), os.W_OK | os.X_OK):
            return RepositoryError(
                "The repository is not writable",
                subject=str(self.path),
                reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
                remedy="Give that user the folder, or mount it for writing",
            )
        return None

    def _place_problem(self) -> RepositoryError:
        if self.place is None and self._unknown is not None:
            return self._unknown
        if self.format < REPOSITORY_FORMAT:
            what, reason = "The repository has an older format", f"it has format {self.format}, which lists no places"
            ways = "moved writes the present format, which older versions of this collection then refuse"
        else:
            what = "The repository is in another place than those that it lists"
            reason = f"this is {self.place}, and it lists {'; '.join(map(str, self.places)) or 'none'}"
            ways = "moved: it is used here and nowhere else"
        return RepositoryError(
            what,
            subject=str(self.path),
            reason=reason,
            remedy=f"It can be read and restored from as it is. To back up here, set adopt (role vm_backup:"
            f" vm_backup_adopt), once. {ways}; copy: the original is used on elsewhere; another_path: this is the same"
            f" storage by another path",
        )

    @property
    def work_path(self) -> Path:
        """Where lock, record and journal of a run go: into the repository, or to this machine's own folder."""
        return self.path if self.may_write else state.folder_of(self.id)

    def require_there(self) -> None:
        """:raises RepositoryError: the folder is no longer the one that was opened (unmounted, moved, removed)."""
        if _identity_of(self.path) != self._root or not (self.path / REPOSITORY_FILE).exists():
            raise RepositoryError(
                "The repository has gone",
                subject=str(self.path),
                reason="what is there now is not what was opened",
                remedy="See that its file system is mounted there, and run again",
            )

    def lock(self, what: str) -> RepositoryLock:
        """The lock of who changes repository.json."""
        return RepositoryLock(self.path / LOCK_FILE, what)

    def write_description(self, repository_id: str, listed: Sequence[Place]) -> None:
        """Replace repository.json. Under :meth:`lock`."""
        document = {
            "format": REPOSITORY_FORMAT,
            "id": repository_id,
            "places": [place.to_json() for place in listed],
        }
        write_json(self.path / REPOSITORY_FILE, document, check_description)

    def part_files(self) -> List[Path]:
        """Unfinished files of the repository itself. It is there, so they are leftovers; nobody needs a lock."""
        return _unfinished(self.path)

    def inside(self, *parts: str) -> Path:
        """The path of a file of the repository.

        :raises DamagedError: a symbolic link on the way leads out of the repository.
        """
        path = self.path.joinpath(*parts)
        real = os.path.realpath(str(path))
        if os.path.commonpath([str(self.path), real]) != str(self.path):
            raise DamagedError(
                "A symbolic link leads out of the repository",
                subject=str(path),
                reason=f"it points to {real}",
                remedy="Replace the link by what it stands for: a repository is one tree",
            )
        self._require_ours(Path(real))
        return path

    def _require_ours(self, real: Path) -> None:
        """:raises DamagedError: a folder on the way is one that everybody may write."""
        folder = self.path
        for part in ("", *real.relative_to(self.path).parts):
            folder = folder / part
            try:
                status = os.lstat(str(folder))
            except OSError:
                return  # what is not there is reported where it is used
            problem = files.writers_problem(status) if stat.S_ISDIR(status.st_mode) else None
            if problem is not None:
                raise DamagedError(
                    "A folder of the repository can't be trusted",
                    subject=str(folder),
                    reason=problem,
                    remedy=files.CLOSE,
                )

    def vm(self, uuid: str) -> VmStore:
        """The part of one VM, whether there is anything of it yet or not. InputError: no UUID."""
        return VmStore(self, check_uuid(uuid))

    def vms(self) -> List[VmStore]:
        """All VMs that have a folder, by UUID."""
        return [self.vm(name) for name in names_in(self.inside("vms")) if UUID.fullmatch(name)]

    def stores(self) -> List[VmStore]:
        """As :meth:`vms`, with those of which there are only records on this machine (:attr:`work_path`)."""
        found = {store.uuid: store for store in self.vms()}
        here = state.existing(self.id)
        if here is not None and (here / "vms").is_dir():
            for name in os.listdir(str(here / "vms")):
                if UUID.fullmatch(name):
                    found.setdefault(name, self.vm(name))
        return [found[uuid] for uuid in sorted(found)]

    def find_vm(self, vm_uuid: Optional[str] = None, vm_name: Optional[str] = None) -> VmStore:
        """The one VM with that instance UUID, or with that name when it was last backed up.

        :raises RepositoryError: there is none, or two have that name (both are listed).
        """
        if vm_uuid is not None:
            store = self.vm(vm_uuid)
            if not store.path.is_dir():
                raise self._no_vm(vm_uuid)
            return store
        if not vm_name:
            raise InputError("No virtual machine is named", remedy="Give vm_uuid or vm_name")
        found = []
        damaged: Optional[RepositoryError] = None
        for store in self.vms():
            try:
                if vm_name in (store.name, shown(store.name or "")):
                    found.append(store)
            except RepositoryError as error:
                damaged = error
        if not found:
            # The VM whose facts can't be read may be the one.
            raise damaged or self._no_vm(vm_name)
        if len(found) > 1:
            listed = "; ".join(f"{store.uuid} ({store.facts.get('path') or 'path unknown'})" for store in found)
            raise RepositoryError(
                "More than one virtual machine of the repository has this name",
                subject=vm_name,
                reason=listed,
                remedy="Name it by vm_uuid",
            )
        return found[0]

    def find_run(self, run_id: str) -> Tuple[VmStore, Run]:
        """The run of that id, and the VM that it is of.

        :raises InputError: it can't be the id of a run. :raises RepositoryError: it has no record here.
        """
        check_run_id(run_id)
        found = [
            (store, run)
            for store in self.vms()
            for run in [store.run(run_id)]
            if run is not None and (run.data["repository_id"], run.data["vm_uuid"]) == (self.id, store.uuid)
        ]
        if len(found) != 1:
            raise RepositoryError(
                "The repository holds no record of this run" if not found else "Two records have the id of one run",
                subject=run_id,
                reason="it is over, or was begun in another repository"
                if not found
                else ", ".join(store.shown for store, _run in found),
                remedy="Begin a run with vadp_recover and begin: true, and give its id to the modules that follow",
            )
        return found[0]

    def find_point_of(self, run_id: str) -> Tuple[VmStore, Dict[str, Any]]:
        """The point that a run has made, of whatever VM. What was written last is looked at first.

        :raises InputError: it can't be the id of a run. :raises RepositoryError: it has made none.
        """
        found = self._search_point_of(check_run_id(run_id))
        if found is None:
            raise RepositoryError(
                "There is no restore point of this run",
                subject=run_id,
                reason="no manifest names it",
                remedy="See restore_point_info",
            )
        return found

    def _search_point_of(self, run_id: str) -> Optional[Tuple[VmStore, Dict[str, Any]]]:
        folders = [(_changed_at(store.path / "points"), store) for store in self.vms()]
        for _moment, store in sorted(folders, key=lambda item: item[0], reverse=True):
            paths = [store.manifest_path(name) for name in store.point_names()]
            for path in sorted(paths, key=_changed_at, reverse=True):
                try:
                    if run_id.encode() not in files.read(str(path)):
                        continue
                except (OSError, DamagedError):
                    continue  # removed since it was listed, or told by whoever needs it
                manifest = store.point(path.stem)
                if manifest is not None and manifest["run_id"] == run_id:
                    return store, manifest
        return None

    def outcome_of(self, run_id: str) -> Optional[Tuple[VmStore, Dict[str, Any]]]:
        """The point that a run has made, or that was there when it began, and its VM; None where there is none.

        :raises InputError: it can't be the id of a run. :raises DamagedError: the point can't be read.
        """
        with suppress(RepositoryError):  # its record is gone
            store, run = self.find_run(run_id)
            if run.data.get("complete_before"):
                manifest = store.point(str(run.data["point"]))
                return None if manifest is None else (store, manifest)
        return self._search_point_of(check_run_id(run_id))

    def _no_vm(self, named: str) -> RepositoryError:
        known = [store.shown for store in self.vms()]
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        return RepositoryError(
            "The repository holds no such virtual machine",
            subject=named,
            reason=f"it holds {shown}" if known else "it holds none",
            remedy=f"See restore_point_info with the repository {self.path}",
        )


def _changed_at(path: Path) -> float:
    try:
        return os.stat(str(path)).st_mtime
    except OSError:
        return 0.0


def _look(path: str) -> Tuple[Path, List[str]]:
    """The real path of a repository's folder, and what is in it."""
    if not os.path.isabs(path):
        raise InputError(
            "The repository's path is not absolute",
            subject=path,
            reason="what it is relative to is not known where the module runs",
            remedy="Give the whole path, from / on",
        )
    try:
        root = Path(os.path.realpath(path))
        names = os.listdir(str(root))
        str(root).encode("utf-8")
    except OSError as error:
        raise unusable(path, error) from None
    except UnicodeEncodeError:
        raise InputError(
            "The repository's path is not UTF-8",
            subject=shown(str(root)),
            reason="it holds bytes that are not characters",
            remedy="Rename the folder, or reach it by another path (a bind mount)",
        ) from None
    return root, names


def _identity_of(path: Path) -> Optional[Tuple[int, int]]:
    try:
        status = os.stat(str(path))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _create_repository(root: Path, place: Place) -> bool:
    """Write repository.json; of two who do so at the same time one wins, and both go on with its id.

    :returns: whether it was us.
    """
    made = False
    try:
        # What everybody may write is not a repository (see inside); an empty folder becomes one that is not so.
        mode = os.stat(str(root)).st_mode
        if mode & stat.S_IWOTH:
            os.chmod(str(root), stat.S_IMODE(mode) & ~stat.S_IWOTH)
        # Each clears away what it takes for leftovers of a crash, so one may lose its unfinished file to the other:
        # again then.
        while not (root / REPOSITORY_FILE).exists():
            for path in _unfinished(root):
                unlink(path)
            made = _write_description(root, place) or made
        fsync_dir(str(root))
        return made
    except OSError as error:
        raise unusable(str(root), error) from None


def _unfinished(root: Path) -> List[Path]:
    return [root / name for name in sorted(os.listdir(str(root))) if name.startswith(REPOSITORY_FILE + PART)]


def _write_description(root: Path, place: Place) -> bool:
    document = {"format": REPOSITORY_FORMAT, "id": str(uuid_module.uuid4()), "places": [place.to_json()]}
    final = root / REPOSITORY_FILE
    part = root / f"{REPOSITORY_FILE}{PART}{document['id']}"
    descriptor = os.open(str(part), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(to_json(document))
        stream.flush()
        os.fsync(stream.fileno())
    try:
        # Unlike rename, link does not replace what another has made meanwhile.
        os.link(str(part), str(final))
    except (FileExistsError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(str(part), str(final))  # a file system without hard links
    finally:
        unlink(part)
    return True
