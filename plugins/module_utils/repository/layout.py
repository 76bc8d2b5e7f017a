# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folders and files of a repository (format 1), and the only place that makes paths in it.

No path leaves the repository: UUIDs, device keys and point names are checked before they become part of a path, and
a symbolic link that leads out is refused. docs/repository-format.md describes the tree.
"""

from __future__ import annotations

import errno
import json
import os
import re
import uuid as uuid_module
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

from ..datapath.hashes import hash_file
from ..datapath.image import Qcow2Header, atomic_write, fsync_dir, read_header
from ..errors import DamagedError, InputError, RepositoryError
from . import manifest as manifests
from . import trust
from .chain import StoreFacts
from .lock import VmLock
from .runs import Run, new_run_id
from .shapes import (
    POINT_CHARACTERS,
    POINT_PATTERN,
    RUN_ID_PATTERN,
    UUID_PATTERN,
    Shape,
    ShapeError,
    format_time,
    nullable,
    one_of,
    parse_time,
    record,
    text,
    time,
    to_json,
)

FORMAT = 1
REPOSITORY_FILE = "repository.json"
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

_REPOSITORY = record({"format": one_of(FORMAT), "id": text(UUID_PATTERN)})
_FACTS = record(
    {
        "format": one_of(FORMAT),
        "vm_uuid": text(UUID_PATTERN),
        "name": text(),
        "path": nullable(text()),
        "moid": nullable(text()),
        "bios_uuid": nullable(text()),
        "updated": time,
    }
)


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


def newest_before(points: Sequence[Dict[str, Any]], moment: Optional[datetime]) -> Optional[Dict[str, Any]]:
    """Of manifests, oldest first, the last whose snapshot was taken before *moment*, or the last at all (None)."""
    for manifest in reversed(points):
        if moment is None or parse_time(manifest["snapshot"]["created"]) < moment:
            return manifest
    return None


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
            "This is no instance UUID",
            subject=repr(value)[:200],
            remedy="It looks like 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a",
        )
    return lowered


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
    # A file system's own lost+found is nobody's data, and an unfinished repository.json is what a crash of ours
    # leaves.
    return sorted(
        name for name in os.listdir(str(path)) if name != "lost+found" and not name.startswith(REPOSITORY_FILE + PART)
    )


def _listed(entries: List[str]) -> str:
    return f"it holds other data: {', '.join(entries[:5])}{', ...' if len(entries) > 5 else ''}"


class Repository:
    """A repository of restore points: a folder with ``repository.json`` in it."""

    def __init__(self, path: Path, repository_id: str) -> None:
        self.path = path
        self.id = repository_id

    @classmethod
    def open(cls, path: str, create: bool = False, writable: bool = False) -> Repository:
        """Open a repository.

        :param create: an empty folder becomes a repository (and the repository has to be writable).
        :param writable: fail now if it can't be written to.
        :raises InputError: the path is relative.
        :raises RepositoryError: no such folder, no repository in it, a newer format, not writable.
        """
        if not os.path.isabs(path):
            raise InputError(
                "The repository's path is not absolute",
                subject=path,
                reason="what it is relative to is not known where the module runs",
                remedy="Give the whole path, from / on",
            )
        root = Path(path)
        try:
            root = Path(os.path.realpath(path))
            names = os.listdir(str(root))
        except OSError as error:
            raise _unusable(path, error) from None
        if REPOSITORY_FILE not in names:
            if not create:
                others = _foreign_entries(root)
                raise RepositoryError(
                    "The folder holds no repository",
                    subject=path,
                    reason=f"{REPOSITORY_FILE} is missing, and {_listed(others) if others else 'it is empty'}",
                    remedy="See that the repository's file system is mounted there and that the path is right; "
                    "the first export makes a repository of an empty folder",
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
            _create_repository(root)
        data = _read_json(
            root / REPOSITORY_FILE,
            "The repository's description is damaged",
            _REPOSITORY,
            "Restore the file from a copy: its id stands in every manifest as repository_id",
        )
        repository = cls(root, str(data["id"]))
        if (writable or create) and not os.access(str(root), os.W_OK | os.X_OK):
            raise RepositoryError(
                "The repository is not writable",
                subject=path,
                reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
                remedy="Give that user the folder, or mount it for writing",
            )
        return repository

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
        return path

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
                if store.name == vm_name:
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
        self._lock: Optional[VmLock] = None

    # Paths. None of them creates anything.

    def _inside(self, *parts: str) -> Path:
        return self.repository.inside("vms", self.uuid, *parts)

    @property
    def path(self) -> Path:
        """The VM's folder."""
        return self._inside()

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
        return self._inside("boots", f"{check_point_name(point)}.png")

    def serial_log_path(self, point: str) -> Path:
        """What the guest said on its serial console when the point was booted last; there need not be any."""
        return self._inside("boots", f"{check_point_name(point)}.serial.log")

    @property
    def boot_name(self) -> str:
        """What the folder of sockets is called when a point of this VM is booted: always the same."""
        return f"boot-{self.uuid}"

    @property
    def trust_path(self) -> Path:
        """The marks of disks whose change tracking must not be believed; there need not be any."""
        return self._inside("trust.json")

    # The VM's facts.

    @property
    def facts(self) -> Dict[str, Any]:
        """vm.json: {format, vm_uuid, name, path, moid, bios_uuid, updated}; empty if nothing was written yet."""
        path = self._inside("vm.json")
        try:
            facts = _read_json(path, "The facts of a virtual machine are damaged", _FACTS, _NEW_FACTS)
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
        """Write vm.json: name, path, moid, bios_uuid; format, vm_uuid and updated are added. Under the lock."""
        self.require_lock("write the VM's facts")
        document: Dict[str, Any] = {"path": None, "moid": None, "bios_uuid": None}
        document.update(facts)
        document.update(format=FORMAT, vm_uuid=self.uuid, updated=format_time(datetime.now(timezone.utc)))
        _write_json(self._inside("vm.json"), document, _FACTS)

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

        Oldest first goes by the time of the snapshot, not by the name.
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
        readable.sort(key=_age)
        return readable, problems

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

    def resolve(self, point: str) -> Dict[str, Any]:
        """The manifest of a point that has to exist.

        :param point: its name, ``latest``, or a time (:func:`moment_of`): the newest point whose snapshot was taken
            before it.
        :raises RepositoryError: there is none. DamagedError: it is damaged, or (without a name) another that may be
            newer is.
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
        newest = newest_before(readable, moment)
        if problems:
            shown = None if newest is None else newest["point"]
            raise DamagedError(
                "The latest restore point can't be told" + ("" if moment is None else f" before {format_time(moment)}"),
                subject=self.shown,
                reason="; ".join(str(error).rstrip(".") for error in problems.values()),
                remedy="Name the point" + (f": the newest that can be read is {shown}" if shown else ""),
            )
        if newest is not None:
            return newest
        if not readable:
            raise RepositoryError(
                "There is no restore point", subject=self.shown, remedy="Make one with vadp_disk_export"
            )
        raise RepositoryError(
            "There is no restore point that old",
            subject=f"{point} of {self.shown}",
            reason=f"the oldest is {readable[0]['point']}, of {readable[0]['snapshot']['created']}",
            remedy="See restore_point_info",
        )

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
                problem = self._layer_problem(manifest["point"], disk, parent)
                if problem is not None:
                    problems[(manifest["point"], disk["key"])] = problem
        return StoreFacts(problems, trust.marks(self))

    def _layer_problem(self, point: str, disk: Dict[str, Any], parent: Optional[Dict[str, Any]]) -> Optional[str]:
        path = self.layer_path(disk["key"], point)
        problem = stored_problem(path, disk["layer"])
        if problem is not None:
            return problem
        expected = None
        if disk["parent"] is not None:
            entry = None if parent is None else manifests.disk_of(parent, disk["key"])
            if entry is None:
                return f"its parent {disk['parent']} is missing or does not hold disk {disk['key']}"
            if entry["capacity_bytes"] != disk["capacity_bytes"]:
                return (
                    f"its parent {disk['parent']} has {entry['capacity_bytes']} bytes, it has {disk['capacity_bytes']}"
                )
            expected = str(entry["layer"]["file"])
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
        self._make_folders(self._inside("boots"))
        return VmLock(self._inside("boots", "lock"), run_id, "restore_point_verify")

    def boot_part_files(self) -> List[Path]:
        """Unfinished evidence of boots. Under the lock of :meth:`boot_lock` each of them is a leftover."""
        folder = self._inside("boots")
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
        """Create the VM's folder with its fixed subfolders, durably; those that are there stay."""
        for parts in ((), ("points",), ("configs",), ("runs",)):
            self._make_folders(self._inside(*parts))

    def make_disk_folder(self, key: int) -> Path:
        """Create the folder of a disk's layers, durably, and return it. Under the lock."""
        self.require_lock("create a folder")
        folder = self.disk_folder(key)
        self._make_folders(folder)
        return folder

    def _make_folders(self, folder: Path) -> None:
        current = self.repository.path
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
        """The runs that are not over, oldest first. DamagedError: a record can't be understood."""
        folder = self._inside("runs")
        try:
            names = os.listdir(str(folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(str(folder), error) from None
        found = []
        for name in sorted(names):
            if _RUN_FILE.fullmatch(name):
                try:
                    found.append(Run.load(self._inside("runs", name)))
                except FileNotFoundError:
                    continue  # it ended meanwhile
        return found

    def run(self, run_id: str) -> Optional[Run]:
        """The run of that id, None if it is over (or never was)."""
        if _RUN_FILE.fullmatch(f"{run_id}.json") is None:
            return None
        try:
            return Run.load(self._inside("runs", f"{run_id}.json"))
        except FileNotFoundError:
            return None

    def create_run(
        self,
        point: Optional[str],
        vm_moid: Optional[str] = None,
        vm_name: Optional[str] = None,
        run_id: Optional[str] = None,
    ) -> Run:
        """Begin a run: its record is on the disk when this returns. Under the lock.

        :param point: the name of the point that it is to make; None if it makes none (a restore).
        :param run_id: where the lock was taken under a name already.
        """
        self.require_lock("begin a run")
        return Run.create(
            self._inside("runs"),
            run_id or new_run_id(),
            repository_id=self.repository.id,
            vm_uuid=self.uuid,
            vm_moid=vm_moid,
            vm_name=vm_name,
            point=None if point is None else check_point_name(point),
        )

    def commit_point(self, manifest: Dict[str, Any]) -> Dict[str, Any]:
        """Make a point visible: check that all it names is there, then write its manifest, durably and atomically.

        Under the lock. The files must have been fsynced by who wrote them.

        :returns: the sealed manifest.
        :raises RepositoryError: the point exists; a file is missing, has another size, or is the wrong image.
        """
        self.require_lock("commit a point")
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
        for disk in sealed["disks"]:
            # A layer of another size would be cut or padded without a word when it is read.
            parent = None if disk["parent"] is None else self.point(disk["parent"])
            problem = self._layer_problem(point, disk, parent)
            if problem is not None:
                raise _incomplete(self.layer_path(disk["key"], point), problem)
            self._check_stored(self.hashes_path(disk["key"], point), disk["hashes"])
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

    def _check_stored(self, path: Path, stored: Dict[str, Any]) -> None:
        problem = stored_problem(path, stored)
        if problem:
            raise _incomplete(path, problem)

    def remove_unused(self) -> None:
        """Remove the folder of a VM of which nothing was ever kept, as a restore to a new one leaves it.

        Only for an id that no backup can know yet: whoever waited for the lock would hold that of a removed file.
        """
        try:
            if set(os.listdir(str(self.path))) - {"points", "configs", "runs", "lock"}:
                return
            for name in ("runs", "points", "configs"):
                os.rmdir(str(self._inside(name)))
            os.unlink(str(self._inside("lock")))
            os.rmdir(str(self.path))
            fsync_dir(str(self.path.parent))
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
        """Unfinished files (``<final name>.part-<id>``) anywhere in the VM's folder.

        Under the lock each of them is a leftover: only the lock's holder writes.
        """
        folders = [self.path, self._inside("points"), self._inside("runs")]
        folders += [folder for folder, dummy in self._data_folders()]
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
    """The lock of a :class:`VmStore`, which then allows writing."""

    def __init__(self, store: VmStore, run_id: str, what: str) -> None:
        self._store = store
        super().__init__(store._inside("lock"), run_id, what)

    def __enter__(self) -> StoreLock:
        self._store.make_folder()
        super().__enter__()
        self._store._lock = self
        return self


def file_entry(path: Path) -> Dict[str, Any]:
    """The manifest's entry for a file: {file, size_bytes, blake3}. It reads the whole file."""
    return {"file": path.name, "size_bytes": path.stat().st_size, "blake3": hash_file(str(path))}


def stored_problem(path: Path, stored: Dict[str, Any]) -> Optional[str]:
    """Why a file is not the one that the manifest names, as far as its size tells; None if nothing is wrong."""
    try:
        size = os.stat(str(path)).st_size
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"the file can't be read: {error.strerror}"
    if not path.is_file():
        return "it is no ordinary file"
    if size != stored["size_bytes"]:
        return f"the file has {size} bytes, {stored['size_bytes']} were written"
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


def _age(manifest: Dict[str, Any]) -> Tuple[datetime, str, str]:
    # Two snapshots may fall into one second; run ids count microseconds.
    return parse_time(manifest["snapshot"]["created"]), str(manifest["run_id"]), str(manifest["point"])


def _create_repository(root: Path) -> None:
    """Write repository.json; of two who do so at the same time one wins, and both go on with its id."""
    try:
        # Each clears away what it takes for leftovers of a crash, so one may lose its unfinished file to the other:
        # again then.
        while not (root / REPOSITORY_FILE).exists():
            for path in _unfinished(root):
                _unlink(path)
            _write_description(root)
        fsync_dir(str(root))
    except OSError as error:
        raise _unusable(str(root), error) from None


def _unfinished(root: Path) -> List[Path]:
    return [root / name for name in sorted(os.listdir(str(root))) if name.startswith(REPOSITORY_FILE + PART)]


def _write_description(root: Path) -> None:
    document = {"format": FORMAT, "id": str(uuid_module.uuid4())}
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
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(str(part), str(final))  # a file system without hard links
    finally:
        _unlink(part)


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return


def _read_json(path: Path, what: str, shape: Shape, remedy: str) -> Dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unusable(str(path), error) from None
    try:
        document = json.loads(data.decode("utf-8"))
        version = document.get("format") if isinstance(document, dict) else None
        if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
            raise RepositoryError(
                "The repository was written by a newer version",
                subject=str(path),
                reason=f"it has format {version}, this version knows format {FORMAT}",
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
