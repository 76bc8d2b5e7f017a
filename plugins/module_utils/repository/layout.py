# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folders and files of a repository (format 2), and the only code that makes paths in it.

No path leaves the repository: UUIDs, device keys and point names are checked before they become part of a path, and
a symbolic link that leads out is refused. docs/repository-format.md describes the tree.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid as uuid_module
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple, Type

from ..datapath import files
from ..datapath.hashes import hash_file
from ..datapath.image import Qcow2Header, atomic_write, fsync_dir, read_header
from ..errors import DamagedError, InputError, LockedError, RepositoryError
from ..shown import shown
from . import adoption, content, places, sequence, state, trust
from . import manifest as manifests
from .chain import StoreFacts
from .lock import RepositoryLock, VmLock
from .places import Place, UnknownPlace
from .runs import Run, file_system_time, new_run_id
from .sequence import newest_before
from .shapes import (
    POINT_CHARACTERS,
    POINT_PATTERN,
    RUN_ID_PATTERN,
    UUID_PATTERN,
    Shape,
    ShapeError,
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

FORMAT = 1
#: Of vm.json: 2 counts the points.
FACTS_FORMAT = 2
#: Of repository.json. What knows format 1 alone neither writes nor recovers where it finds 2.
REPOSITORY_FORMAT = 2
REPOSITORY_FILE = "repository.json"
LOCK_FILE = "repository.lock"
LATEST = "latest"
PART = ".part-"

_UUID = re.compile(UUID_PATTERN)
_POINT = re.compile(POINT_PATTERN)
# A time and its zone; a colon can't be in a point's name. YAML and JSON have forms of their own for what a user writes.
_MOMENT = re.compile(
    r"(?:before\s+)?(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<minute>[0-9]{2}:[0-9]{2})(?::(?P<second>[0-9]{2})"
    r"(?:\.(?P<fraction>[0-9]{1,6})0*)?)?\s?(?P<zone>[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_NEW_FACTS = "Name the VM by vm_uuid; its next backup writes the file anew"
_DISK_FOLDER = re.compile(r"disk-(0|[1-9][0-9]*)")
_PART_FILE = re.compile(r".+\.part-[A-Za-z0-9._-]+")
_RUN_FILE = re.compile(RUN_ID_PATTERN + r"\.json")

_REPOSITORY_1 = record({"format": one_of(1), "id": text(UUID_PATTERN)})
_REPOSITORY_2 = record({"format": one_of(REPOSITORY_FORMAT), "id": text(UUID_PATTERN), "places": list_of(places.SHAPE)})


def _check_description(document: Any, where: str) -> None:
    old = isinstance(document, dict) and document.get("format") == 1
    (_REPOSITORY_1 if old else _REPOSITORY_2)(document, where)


_FACTS_FIELDS: Dict[str, Shape] = {
    "vm_uuid": text(UUID_PATTERN),
    "name": text(),
    "path": nullable(text()),
    "moid": nullable(text()),
    "bios_uuid": nullable(text()),
    "updated": time,
}
_OLD_FACTS = record({**_FACTS_FIELDS, "format": one_of(1)})
_FACTS = record(
    {
        **_FACTS_FIELDS,
        "format": one_of(FACTS_FORMAT),
        "sequence": integer(),
        "format1_sequences": mapping(POINT_PATTERN, integer(1)),
    }
)


def _check_facts(document: Any, where: str) -> None:
    old = isinstance(document, dict) and document.get("format") == 1
    (_OLD_FACTS if old else _FACTS)(document, where)


def check_point_name(name: str) -> str:
    """*name* itself, if a point may be called so. InputError otherwise."""
    if not isinstance(name, str) or _POINT.fullmatch(name) is None:
        raise InputError(
            "This can't be the name of a restore point",
            subject=repr(name)[:200],
            reason=_name_problem(name),
            remedy="A name has 1 to 128 characters: letters, digits and . _ + -, and begins with a letter or a digit",
        )
    if name == LATEST or PART in name:
        raise InputError(
            "This name is reserved",
            subject=repr(name),
            reason=f"{LATEST!r} means the newest point, and {PART!r} marks unfinished files",
            remedy="Choose another name",
        )
    return name


def _name_problem(name: object) -> str:
    if not isinstance(name, str) or not name:
        return "it is empty"
    if len(name) > POINT_CHARACTERS:
        return f"it has {len(name)} characters"
    strange = "".join(dict.fromkeys(re.sub(r"[A-Za-z0-9._+-]", "", name)))
    return f"it holds {strange!r}" if strange else f"it begins with {name[0]!r}"


def moment_of(point: str) -> Optional[datetime]:
    """The time that *point* states instead of a name: ``2026-11-20T03:00Z``, ``before 2026-11-20T03:00:00+01:00``.

    :returns: in UTC; None if it states none, and so is a name or ``latest``.
    :raises InputError: it is meant as a time, but is none, or has no zone.
    """
    if not isinstance(point, str) or not (":" in point or point.startswith("before ")):
        return None
    found = _MOMENT.fullmatch(point.strip())
    reason = "it has another form, or no zone"
    if found is not None:
        part = found.groupdict()
        zone = "+00:00" if part["zone"] in "Zz" else part["zone"]
        try:
            return datetime.strptime(
                f"{part['day']}T{part['minute']}:{part['second'] or '00'}.{part['fraction'] or '0'}{zone}",
                "%Y-%m-%dT%H:%M:%S.%f%z",
            ).astimezone(timezone.utc)
        except (ValueError, OverflowError) as error:
            reason = str(error)
    raise InputError(
        "This is no time that a restore point can be chosen by",
        subject=repr(point)[:200],
        reason=reason,
        remedy="Write it as 2026-11-20T03:00Z or 2026-11-20T03:00:00Z (UTC), or with an offset such as +01:00",
    )


def new_point_name(taken: Collection[str], now: datetime) -> str:
    """A name for a point that begins now: ``20261122T084203Z``, or with ``-2``, ``-3``... if that is taken."""
    base = now.astimezone(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def check_uuid(value: str) -> str:
    """*value* in lower case, if it is a UUID. InputError otherwise."""
    lowered = value.lower() if isinstance(value, str) else ""
    if _UUID.fullmatch(lowered) is None:
        raise InputError(
            "This is not a UUID",
            subject=repr(value)[:200],
            remedy="It looks like 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a",
        )
    return lowered


def check_run_id(value: str) -> str:
    """*value* itself, if it can be the id of a run. InputError otherwise."""
    if not isinstance(value, str) or re.fullmatch(RUN_ID_PATTERN, value) is None:
        raise InputError(
            "This is no id of a run", subject=repr(value)[:200], remedy="It has 32 random digits of 0-9 and a-f"
        )
    return value


def check_key(key: int) -> int:
    """*key* itself, if it is a device key. InputError otherwise."""
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise InputError(
            "This is no device key of a disk", subject=repr(key)[:200], remedy="It is a number, such as 2000"
        )
    return key


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
    where that can't be told. ``created``: opening it has made it. ``done`` says what adopting it has changed (in check
    mode, would change), in sentences; ``warnings`` what is odd.
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

        :param create: an empty folder becomes a repository (and the repository has to be writable).
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
        """Whether its records are told and not acted upon: they may be those of another copy."""
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
        _write_json(self.path / REPOSITORY_FILE, document, _check_description)

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
                return  # what is not there is told where it is used
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
        folder = self.inside("vms")
        try:
            names = os.listdir(str(folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(str(folder), error) from None
        return [self.vm(name) for name in sorted(names) if _UUID.fullmatch(name)]

    def stores(self) -> List[VmStore]:
        """As :meth:`vms`, with those of which there are only records on this machine (:attr:`work_path`)."""
        found = {store.uuid: store for store in self.vms()}
        here = state.existing(self.id)
        if here is not None and (here / "vms").is_dir():
            for name in os.listdir(str(here / "vms")):
                if _UUID.fullmatch(name):
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
        check_run_id(run_id)
        folders = [(_changed_at(store.path / "points"), store) for store in self.vms()]
        for _moment, store in sorted(folders, key=lambda item: item[0], reverse=True):
            paths = [store.manifest_path(name) for name in store.point_names()]
            for path in sorted(paths, key=_changed_at, reverse=True):
                try:
                    if run_id.encode() not in path.read_bytes():
                        continue
                except OSError:
                    continue  # removed since it was listed, or told by whoever needs it
                manifest = store.point(path.stem)
                if manifest is not None and manifest["run_id"] == run_id:
                    return store, manifest
        raise RepositoryError(
            "There is no restore point of this run",
            subject=run_id,
            reason="no manifest names it",
            remedy="See restore_point_info",
        )

    def _no_vm(self, named: str) -> RepositoryError:
        known = [store.shown for store in self.vms()]
        shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
        return RepositoryError(
            "The repository holds no such virtual machine",
            subject=named,
            reason=f"it holds {shown}" if known else "it holds none",
            remedy=f"See restore_point_info with the repository {self.path}",
        )


class VmStore:
    """What a repository holds of one VM. Reading needs no lock; see each method for writing."""

    def __init__(self, repository: Repository, uuid: str) -> None:
        self.repository = repository
        self.uuid = check_uuid(uuid)
        self.doubts: List[str] = []
        self._lock: Optional[VmLock] = None

    # Paths. None of them creates anything.

    def _inside(self, *parts: str) -> Path:
        return self.repository.inside("vms", self.uuid, *parts)

    def _work(self, *parts: str) -> Path:
        """Of lock, records, marks and evidence: here, or on this machine where the repository is not written."""
        if self.repository.may_write:
            return self._inside(*parts)
        return self.repository.work_path.joinpath("vms", self.uuid, *parts)

    def _kept_here(self) -> Optional[Path]:
        """What restores from this repository left on this machine while it could not be written, or was elsewhere."""
        folder = state.existing(self.repository.id)
        return None if folder is None else folder / "vms" / self.uuid

    @property
    def path(self) -> Path:
        """The VM's folder."""
        return self._inside()

    @property
    def work_path(self) -> Path:
        """The folder of lock, records and temporary files of a run; the lock's holder finds it made."""
        return self._work()

    @property
    def is_known(self) -> bool:
        """Whether there is anything of this VM, in the repository or of a restore from it on this machine."""
        return os.path.isdir(str(self.path)) or os.path.isdir(str(self.work_path))

    # Doubts (proofs 3)

    @property
    def report_only(self) -> bool:
        """Whether what runs left is told and not removed: the place is not listed, or see :meth:`doubt`."""
        return self.repository.report_only or bool(self.doubts)

    def doubt(self, reason: str) -> None:
        """Note why this may be a copy, or was rolled back: the VM names what is not here. Recovery only reports."""
        self.doubts.append(reason)

    def disk_folder(self, key: int) -> Path:
        """The folder of a disk's layers."""
        return self._inside(f"disk-{check_key(key)}")

    def layer_path(self, key: int, point: str) -> Path:
        """The qcow2 layer of a disk at a point."""
        return self._inside(f"disk-{check_key(key)}", f"{check_point_name(point)}.qcow2")

    def hashes_path(self, key: int, point: str) -> Path:
        """The hashes of what was read of a disk at a point."""
        return self._inside(f"disk-{check_key(key)}", f"{check_point_name(point)}.hashes")

    def config_path(self, point: str) -> Path:
        """The VM's configuration at a point."""
        return self._inside("configs", f"{check_point_name(point)}.json")

    def nvram_path(self, point: str) -> Path:
        """The VM's NVRAM at a point; there need not be one."""
        return self._inside("configs", f"{check_point_name(point)}.nvram")

    def manifest_path(self, point: str) -> Path:
        """The manifest of a point; it exists if the point does."""
        return self._inside("points", f"{check_point_name(point)}.json")

    def screenshot_path(self, point: str) -> Path:
        """The guest's screen when the point was booted last; there need not be any."""
        return self._work("boots", f"{check_point_name(point)}.png")

    def serial_log_path(self, point: str) -> Path:
        """What the guest said on its serial console when the point was booted last; there need not be any."""
        return self._work("boots", f"{check_point_name(point)}.serial.log")

    @property
    def boot_name(self) -> str:
        """What the folder of sockets is called when a point of this VM is booted: always the same."""
        return f"boot-{self.uuid}"

    @property
    def trust_path(self) -> Path:
        """The marks of disks whose change tracking must not be believed; there need not be any."""
        return self._work("trust.json")

    @property
    def trust_paths(self) -> List[Path]:
        """All files of such marks: the repository's, and what restores noted on this machine."""
        here = self._kept_here()
        return [self._inside("trust.json")] + ([] if here is None else [here / "trust.json"])

    # The VM's facts.

    @property
    def facts(self) -> Dict[str, Any]:
        """vm.json: {format, vm_uuid, name, path, moid, bios_uuid, updated, and since format 2 sequence and
        format1_sequences}; empty if nothing was written yet."""
        path = self._inside("vm.json")
        try:
            facts = _read_json(
                path, "The facts of a virtual machine are damaged", _check_facts, _NEW_FACTS, FACTS_FORMAT
            )
        except FileNotFoundError:
            return {}
        if facts["vm_uuid"] != self.uuid:
            raise DamagedError(
                "The facts of a virtual machine are damaged",
                subject=str(path),
                reason=f"they are of {facts['vm_uuid']}",
                remedy=_NEW_FACTS,
            )
        return facts

    @property
    def name(self) -> Optional[str]:
        """The VM's name when it was last backed up."""
        return self.facts.get("name")

    def write_facts(self, facts: Dict[str, Any]) -> None:
        """Write vm.json: name, path, moid, bios_uuid; format, vm_uuid, updated and the counter are added. Under the
        lock."""
        self.require_lock("write the VM's facts")
        self._write_facts(facts, *self._counter())

    def _write_facts(self, facts: Dict[str, Any], counter: int, old: Dict[str, int]) -> None:
        document: Dict[str, Any] = {"path": None, "moid": None, "bios_uuid": None}
        document.update({name: value for name, value in facts.items() if name in _FACTS_FIELDS})
        document.update(format=FACTS_FORMAT, vm_uuid=self.uuid, updated=format_time(datetime.now(timezone.utc)))
        document.update(sequence=counter, format1_sequences=old)
        _write_json(self._inside("vm.json"), document, _check_facts)

    # The order of the points (proofs 22).

    def _counter(self) -> Tuple[int, Dict[str, int]]:
        """The last number that was given, and those of points of format 1, as far as they were given."""
        try:
            facts = self.facts
        except DamagedError:
            # What was counted shows in manifests and runs too.
            return 0, {}
        return facts.get("sequence", 0), dict(facts.get("format1_sequences", {}))

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
                    raise _unusable(str(path), error) from None

    def pins_path(self, point: str) -> Path:
        """What a point of format 1 stands on, written down later; it need not be there."""
        return self._inside("points", f"{check_point_name(point)}.pins")

    def pin_problem(self, disk: Dict[str, Any], manifest: Dict[str, Any], parent: Dict[str, Any]) -> Optional[str]:
        """Why a disk of a point does not stand on what it was made upon; None if nothing shows that.

        :param disk: its entry; *parent*: the manifest of its parent, which holds the disk.
        """
        old_pin = None
        if manifest["format"] == manifests.FORMAT_WITHOUT_IDS:
            try:
                old_pin = content.read_pins(self.pins_path(manifest["point"]), manifest).get(str(disk["key"]))
            except DamagedError as error:
                return str(error).rstrip(".")
        return content.pin_problem(disk, manifests.entry_of(parent, disk["key"]), old_pin)

    def sequences(self, readable: Sequence[Dict[str, Any]]) -> Dict[str, int]:
        """{point: number}; of points of format 1 the one that they have, or would get now.

        :param readable: of :meth:`read_points`, all of them.
        """
        numbers = sequence.number_old(readable, self._counter()[1])
        return {**numbers, **{one["point"]: one["sequence"] for one in readable if "sequence" in one}}

    # Points.

    def point_names(self) -> List[str]:
        """The names of all points, sorted; damaged ones too."""
        folder = self._inside("points")
        try:
            names = os.listdir(str(folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(str(folder), error) from None
        stems = [name[: -len(".json")] for name in names if name.endswith(".json")]
        return sorted(stem for stem in stems if _POINT.fullmatch(stem) and stem != LATEST and PART not in stem)

    def read_points(self) -> Tuple[List[Dict[str, Any]], Dict[str, RepositoryError]]:
        """The manifests that can be read, oldest first, and why others can't, by point name.

        Oldest first goes by the numbers that the repository gave, neither by a clock nor by the name.
        """
        readable: List[Dict[str, Any]] = []
        problems: Dict[str, RepositoryError] = {}
        for name in self.point_names():
            try:
                readable.append(manifests.load(self.manifest_path(name), self.uuid))
            except FileNotFoundError:
                continue  # removed since it was listed
            except RepositoryError as error:
                problems[name] = error
        known = {} if all("sequence" in manifest for manifest in readable) else self._counter()[1]
        return sequence.in_order(readable, sequence.number_old(readable, known)), problems

    def points(self) -> List[Dict[str, Any]]:
        """The manifests of all points that can be read, oldest first.

        A damaged one is left out: the others can still be restored and built upon. :meth:`read_points` tells of it.
        """
        return self.read_points()[0]

    def point(self, name: str) -> Optional[Dict[str, Any]]:
        """The manifest of a point, None if there is no such point. DamagedError: it is there, but damaged."""
        try:
            return manifests.load(self.manifest_path(name), self.uuid)
        except FileNotFoundError:
            return None

    def resolve(self, point: str, server_uuid: Optional[str] = None) -> Dict[str, Any]:
        """The manifest of a point that has to exist.

        :param point: its name, ``latest``, or a time (:func:`moment_of`): the point whose snapshot was taken last
            before it, by the server's clock.
        :param server_uuid: the server that is connected (:attr:`..vsphere.session.Session.server_uuid`); None: none.
            The latest point is meant to be one of it.
        :raises RepositoryError: there is none, or which is the latest can't be told: points of several servers, or
            two of one number. DamagedError: it is damaged, or (without a name) another that may be newer is.
        :raises InputError: a time that is none.
        """
        moment = moment_of(point)
        if point != LATEST and moment is None:
            found = self.point(point)
            if found is None:
                names = [manifest["point"] for manifest in self.points()]
                raise RepositoryError(
                    "There is no such restore point",
                    subject=f"{point} of {self.shown}",
                    reason=f"the newest are {', '.join(reversed(names[-5:]))}" if names else "the VM has none",
                    remedy="See restore_point_info",
                )
            return found
        readable, problems = self.read_points()
        untold = "The latest restore point can't be told" + ("" if moment is None else f" before {format_time(moment)}")
        if problems:
            newest = newest_before(sequence.of_server(readable, server_uuid) or [], moment)
            shown = None if newest is None else newest["point"]
            raise DamagedError(
                untold,
                subject=self.shown,
                reason="; ".join(str(error).rstrip(".") for error in problems.values()),
                remedy="Name the point" + (f": the newest that can be read is {shown}" if shown else ""),
            )
        newest = newest_before(self.comparable(readable, untold, server_uuid), moment)
        if newest is not None:
            return newest
        if not readable:
            raise RepositoryError(
                "There is no restore point", subject=self.shown, remedy="Make one with vadp_disk_export"
            )
        oldest = newest_before(readable, None) if moment is None else min(readable, key=_snapshot_time)
        raise RepositoryError(
            "There is no restore point that old",
            subject=f"{point} of {self.shown}",
            reason=f"the oldest is {oldest['point']}, of {oldest['snapshot']['created']}" if oldest else None,
            remedy="See restore_point_info",
        )

    def comparable(
        self, readable: List[Dict[str, Any]], untold: str, server_uuid: Optional[str] = None
    ) -> List[Dict[str, Any]]:
        """Those of the points, oldest first, among which the newest is the one that is meant.

        :param untold: the message if it can't be told.
        :raises RepositoryError: two have one number; or several servers occur, and none is connected that has points.
        """
        for number, names in sequence.shared_numbers(readable).items():
            raise RepositoryError(
                untold,
                subject=self.shown,
                reason=f"points {' and '.join(names)} have the same number, {number}: folders of several repositories"
                " were put together here",
                remedy="Name the point; and take apart what was put together, so that the order can be told again",
            )
        found = sequence.of_server(readable, server_uuid)
        if found is None:
            newest = [f"{one['point']} of server {server}" for server, one in sequence.servers_of(readable).items()]
            raise RepositoryError(
                untold,
                subject=self.shown,
                reason=f"points of several servers are here, and none of them is connected; the newest are"
                f" {', '.join(newest)}",
                remedy="Name the point",
            )
        return found

    @property
    def shown(self) -> str:
        """The VM as messages name it; it never fails."""
        try:
            name = self.name
        except RepositoryError:
            name = None
        return f"VM '{name}' ({self.uuid})" if name else f"VM {self.uuid}"

    def chain_facts(self) -> StoreFacts:
        """What :func:`.chain.decide` has to know besides the manifests: which stored layers can't be built upon,
        and the marks.

        It looks at sizes and headers only; restore_point_verify reads all.
        """
        problems: Dict[Tuple[str, int], str] = {}
        points = self.points()
        by_name = {manifest["point"]: manifest for manifest in points}
        for manifest in points:
            for disk in manifest["disks"]:
                parent = by_name.get(disk["parent"])
                problem = self._layer_problem(manifest, disk, parent)
                if problem is not None:
                    problems[(manifest["point"], disk["key"])] = problem
        return StoreFacts(problems, trust.marks(self))

    def _layer_problem(
        self, manifest: Dict[str, Any], disk: Dict[str, Any], parent: Optional[Dict[str, Any]]
    ) -> Optional[str]:
        """Why a stored layer is not the one of the manifest, or does not stand on the one that it was made upon."""
        point = manifest["point"]
        path = self.layer_path(disk["key"], point)
        problem = stored_problem(path, disk["layer"])
        if problem is not None:
            return problem
        expected = None
        if disk["parent"] is not None:
            entry = None if parent is None else manifests.disk_of(parent, disk["key"])
            if parent is None or entry is None:
                return f"its parent {disk['parent']} is missing or does not hold disk {disk['key']}"
            if entry["capacity_bytes"] != disk["capacity_bytes"]:
                return (
                    f"its parent {disk['parent']} has {entry['capacity_bytes']} bytes, it has {disk['capacity_bytes']}"
                )
            problem = self.pin_problem(disk, manifest, parent)
            if problem is not None:
                return problem
            expected = str(entry["layer"]["file"])
        problem = content.stored_id_problem(self.hashes_path(disk["key"], point), disk)
        if problem is not None:
            return problem
        try:
            return header_problem(read_header(str(path)), disk["capacity_bytes"], expected)
        except DamagedError as error:
            return error.reason or error.what

    # Writing. All of it needs the lock.

    def lock(self, run_id: str, what: str) -> StoreLock:
        """The VM's lock, as a context manager that does not wait.

        :param what: what is being done, for those who find the VM locked ("vadp_disk_export").
        :raises LockedError: another run holds it (when entered).
        """
        return StoreLock(self, run_id, what)

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
        return [folder / name for name in sorted(os.listdir(str(folder))) if _PART_FILE.fullmatch(name)]

    def keep_evidence(self, point: str, screenshot: Optional[bytes], serial_log: bytes) -> None:
        """Keep what a boot of a point has shown, in place of the last one's. Under the lock of :meth:`boot_lock`.

        :param screenshot: a PNG file, if there is a picture.
        """
        path = self.screenshot_path(point)
        try:
            if screenshot is None:
                _unlink(path)
            else:
                atomic_write(str(path), screenshot, mode=0o600)
            path = self.serial_log_path(point)
            atomic_write(str(path), serial_log, mode=0o600)
        except OSError as error:
            raise _unusable(str(path), error) from None

    def require_lock(self, what: str) -> None:
        """RuntimeError (a defect of the caller) unless this object's lock is held."""
        if self._lock is None or not self._lock.held:
            raise RuntimeError(f"the VM's lock has to be held to {what}")

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
                    raise _unusable(str(current), OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))) from None
            except OSError as error:
                raise _unusable(str(current), error) from None

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
            raise _unusable(str(path), error) from None
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

    def foreign_runs(self) -> List[Run]:
        """The repository's records where they are told and not acted upon, oldest first; else none."""
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
        :param force: it is done all the same. :returns: a sentence for each run that was passed over so.
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
        return [f"force: {reason}, and it was taken for over." for _run, reason in busy]

    def run(self, run_id: str) -> Optional[Run]:
        """The run of that id among :meth:`runs`, None if it is over (or never was)."""
        if _RUN_FILE.fullmatch(f"{run_id}.json") is None:
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
                raise _incomplete(self.layer_path(disk["key"], point), problem)
            folders.add(self.disk_folder(disk["key"]))
        try:
            for folder in sorted(folders):
                fsync_dir(str(folder))
            atomic_write(str(path), to_json(sealed))
            fsync_dir(str(path.parent))
        except OSError as error:
            raise _unusable(str(path), error) from None
        trust.forget_settled(self)
        return sealed

    def stored_problems(self, manifest: Dict[str, Any]) -> List[str]:
        """What is wrong with a point's files, as far as sizes and headers tell; restore_point_verify reads all."""
        point, found = str(manifest["point"]), []
        stored = [(self.config_path(point), manifest["configuration"])]
        if manifest["nvram"] is not None:
            stored.append((self.nvram_path(point), manifest["nvram"]))
        for disk in manifest["disks"]:
            parent = None if disk["parent"] is None else self.point(disk["parent"])
            problem = self._layer_problem(manifest, disk, parent)
            if problem is not None:
                found.append(f"{self.layer_path(disk['key'], point)}: {problem}")
            stored.append((self.hashes_path(disk["key"], point), disk["hashes"]))
        for path, entry in stored:
            problem = stored_problem(path, entry)
            if problem is not None:
                found.append(f"{path}: {problem}")
        return found

    def point_of(self, run_id: str) -> Optional[Dict[str, Any]]:
        """The manifest of the point that a run has made; None if it made none."""
        return next((manifest for manifest in self.points() if manifest["run_id"] == run_id), None)

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
                "The restore point is none of its own", subject=f"{sealed['point']} of {self.shown}", reason=problem
            )

    def _check_stored(self, path: Path, stored: Dict[str, Any]) -> None:
        problem = stored_problem(path, stored)
        if problem:
            raise _incomplete(path, problem)

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
                if suffix in suffixes and stem not in committed and _POINT.fullmatch(stem) and PART not in stem:
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
                found += [folder / name for name in sorted(os.listdir(str(folder))) if _PART_FILE.fullmatch(name)]
        return found

    def _data_folders(self) -> List[Tuple[Path, Tuple[str, ...]]]:
        if not self.path.is_dir():
            return []
        folders: List[Tuple[Path, Tuple[str, ...]]] = [
            (self._inside(name), (".qcow2", ".hashes"))
            for name in sorted(os.listdir(str(self.path)))
            if _DISK_FOLDER.fullmatch(name)
        ]
        folders.append((self._inside("configs"), (".json", ".nvram")))
        return [(folder, suffixes) for folder, suffixes in folders if folder.is_dir()]


class StoreLock(VmLock):
    """The lock of a :class:`VmStore`, which then allows writing.

    Where restores left records on this machine, it is that folder's lock too: who holds it may act upon those.
    """

    def __init__(self, store: VmStore, run_id: str, what: str) -> None:
        self._store = store
        self._second: Optional[VmLock] = None
        super().__init__(store._work("lock"), run_id, what)

    def __enter__(self) -> StoreLock:
        self._store.make_folder()
        super().__enter__()
        here = self._store._kept_here()
        if here is not None and here.is_dir() and here / "lock" != self.path:
            second = VmLock(here / "lock", self.run_id, self.what)
            try:
                second.__enter__()
            except BaseException:
                super().__exit__(None, None, None)
                raise
            self._second = second
        self._store._lock = self
        return self

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
        try:
            names = os.listdir(str(folder))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _unusable(str(folder), error) from None
        for name in sorted(names):
            if _RUN_FILE.fullmatch(name):
                try:
                    found.append(Run.load(folder / name))
                except FileNotFoundError:
                    continue  # it ended meanwhile
    return sorted(found, key=lambda run: (parse_time(run.data["started"]), run.run_id))


def _changed_at(path: Path) -> float:
    try:
        return os.stat(str(path)).st_mtime
    except OSError:
        return 0.0


def file_entry(path: Path) -> Dict[str, Any]:
    """The manifest's entry for a file: {file, size_bytes, blake3}. It reads the whole file."""
    return {"file": path.name, "size_bytes": path.stat().st_size, "blake3": hash_file(str(path))}


def stored_problem(path: Path, stored: Dict[str, Any]) -> Optional[str]:
    """Why a file is not the one that the manifest names, as far as its size tells; None if nothing is wrong."""
    try:
        status = os.lstat(str(path))
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"the file can't be read: {error.strerror}"
    problem = files.kind_problem(status) or files.writers_problem(status)
    if problem is not None:
        return problem
    if status.st_size != stored["size_bytes"]:
        return f"the file has {status.st_size} bytes, {stored['size_bytes']} were written"
    return None


def header_problem(header: Qcow2Header, capacity_bytes: int, parent_file: Optional[str]) -> Optional[str]:
    """Why an image is not the layer it has to be, from what its header says; None if nothing is wrong.

    :param parent_file: the bare name of the parent's layer; None for a full layer.
    """
    if header.capacity_bytes != capacity_bytes:
        return f"the image has {header.capacity_bytes} bytes, the disk has {capacity_bytes}"
    if header.external_data:
        return "it keeps its data in another file"
    if header.backing != parent_file:
        return f"its backing file is {header.backing!r}, not {parent_file!r}"
    if parent_file is not None and header.backing_format != "qcow2":
        return f"it states its backing file as {header.backing_format!r}, not 'qcow2'"
    return None


def _incomplete(path: Path, problem: str) -> RepositoryError:
    return RepositoryError("The restore point is not complete", subject=str(path), reason=problem)


def _snapshot_time(manifest: Dict[str, Any]) -> datetime:
    return parse_time(manifest["snapshot"]["created"])


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
        raise _unusable(path, error) from None
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


def read_description(root: Path) -> Dict[str, Any]:
    """repository.json, of any format that is known. :raises RepositoryError: a newer one, or it is damaged."""
    return _read_json(
        root / REPOSITORY_FILE,
        "The repository's description is damaged",
        _check_description,
        "Restore the file from a copy: its id stands in every manifest as repository_id",
        REPOSITORY_FORMAT,
    )


def _create_repository(root: Path, place: Place) -> bool:
    """Write repository.json; of two who do so at the same time one wins, and both go on with its id.

    :returns: whether it was us.
    """
    made = False
    try:
        # What everybody may write is no repository (see inside); an empty folder becomes one that is not so.
        mode = os.stat(str(root)).st_mode
        if mode & stat.S_IWOTH:
            os.chmod(str(root), stat.S_IMODE(mode) & ~stat.S_IWOTH)
        # Each clears away what it takes for leftovers of a crash, so one may lose its unfinished file to the other:
        # again then.
        while not (root / REPOSITORY_FILE).exists():
            for path in _unfinished(root):
                _unlink(path)
            made = _write_description(root, place) or made
        fsync_dir(str(root))
        return made
    except OSError as error:
        raise _unusable(str(root), error) from None


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
        _unlink(part)
    return True


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return


def _read_json(path: Path, what: str, shape: Shape, remedy: str, newest: int = FORMAT) -> Dict[str, Any]:
    try:
        data = files.read(str(path), what=what)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unusable(str(path), error) from None
    try:
        document = files.parse(data)
        version = document.get("format") if isinstance(document, dict) else None
        if isinstance(version, int) and not isinstance(version, bool) and version > newest:
            raise RepositoryError(
                "The repository was written by a newer version",
                subject=str(path),
                reason=f"it has format {version}, this version knows format {newest}",
                remedy="Upgrade the collection openvadp.backup",
            )
        shape(document, "")
    except (ValueError, RecursionError) as error:
        raise DamagedError(what, subject=str(path), reason=str(error), remedy=remedy) from None
    result: Dict[str, Any] = document
    return result


def _write_json(path: Path, document: Dict[str, Any], shape: Shape) -> None:
    try:
        shape(document, "")
        atomic_write(str(path), to_json(document))
    except ShapeError as error:
        raise RepositoryError(
            "A file of the repository is not complete", subject=str(path), reason=str(error)
        ) from None
    except OSError as error:
        raise _unusable(str(path), error) from None


def _unusable(path: str, error: OSError) -> RepositoryError:
    if error.errno == errno.ENOENT:
        return RepositoryError(
            "The repository was not found",
            subject=path,
            reason="there is no such folder",
            remedy="See that its file system is mounted, or create the folder for a new repository",
        )
    remedies = {
        errno.EACCES: "Give the user who runs the module access to it",
        errno.EPERM: "Give the user who runs the module access to it",
        errno.EROFS: "Mount its file system for writing",
        errno.ENOSPC: "Make room in the repository",
        errno.EDQUOT: "Make room in the repository",
        errno.ENOTDIR: "Name a folder",
        errno.ESTALE: "Mount its file system again",
    }
    return RepositoryError(
        "The repository is not usable", subject=path, reason=error.strerror, remedy=remedies.get(error.errno or 0)
    )
