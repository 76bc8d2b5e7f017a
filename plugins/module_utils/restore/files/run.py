# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files of a restore point: listed, or copied into a folder.

Look (nothing is touched) -> compare with what is there -> write beside -> put in place. No vCenter is needed, and no
lock: points do not change.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from ...datapath.processes import RuntimeDir
from ...datapath.progress import DiskProgress, Progress
from ...errors import DamagedError, DataPathError, InputError, RepositoryError
from ...repository.chain import chain_of
from ...repository.layout import Repository
from ...repository.store import VmStore
from ...repository.verify import missing_problems
from ..point import Point, PointDisk, checked_beside, require_disks
from ..request import DiskChoice
from .appliance import remove_sockets
from .choice import make_reader
from .disk import layers_of
from .filesystem import DIRECTORY, FILE, LINK
from .names import encoded, path_fields, shown
from .reader import DiskSource, Entry, FileReader, Unread
from .request import FilesRequest
from .writer import FREE, OTHER_KIND, Blocked, Destination, Stage

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_SHOWN = 5
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class Source:
    """The disks of a point, for a reader."""

    store: VmStore
    manifest: Dict[str, Any]
    disks: List[DiskSource]

    def __str__(self) -> str:
        return f"restore point {self.manifest['point']} of {self.store.shown}"


class Selection:
    """What a walk found, and what it had to leave out."""

    def __init__(self, reader: FileReader, proven: Callable[[], None]) -> None:
        self.reader = reader
        #: Returns when what was read is known to be what was backed up, or raises DamagedError.
        self.proven = proven
        #: The numbers of the volumes that are searched.
        self.searched: List[int] = []
        self.entries: List[Entry] = []
        self.skipped: List[Dict[str, Any]] = []
        #: Volume and path of each that was skipped.
        self.skipped_places: List[Tuple[int, str]] = []

    def skip(self, volume: int, path: str, reason: str) -> None:
        """Note what can't be had."""
        self.skipped_places.append((volume, path))
        fields: Dict[str, Any] = dict(path_fields(path))
        fields.update(volume=self.reader.volumes[volume]["name"], reason=reason)
        self.skipped.append(fields)


def restore_files(request: FilesRequest, check_mode: bool, progress: Optional[Progress] = None) -> Dict[str, Any]:
    """The whole of ``vadp_file_restore``.

    :returns: {changed, point, vm_name, vm_uuid, reader, volumes, files, skipped_files, bytes_restored, warnings, diff}.
    :raises VadpError: the folder is what it was, but for files that were to be replaced and got their new content.
    """
    request.check()
    source = open_source(request, request.point)
    with contextlib.ExitStack() as stack:
        destination = None
        if not request.list_only:
            destination = stack.enter_context(Destination(str(request.dest)))
        progress = progress or Progress(None)
        selection = stack.enter_context(opened(request, source, progress=progress))
        if destination is None:
            files = [_listed(entry, selection, request) for entry in selection.entries]
            return result_of(source, selection, [file for file in files if file], changed=False)
        _require_found(request, source, selection)
        return _Restore(request, source, selection, destination, progress).run(check_mode)


def open_source(request: FilesRequest, point: str) -> Source:
    """Find the point and its disks; nothing is read but manifests.

    :raises InputError: a disk that is asked for is not in the point. RepositoryError, DamagedError: as it says.
    """
    store = Repository.open(request.repository).find_vm(vm_uuid=request.vm_uuid, vm_name=request.vm_name)
    manifest = store.resolve(point)
    return source_of(request, store, manifest, store.points())


def source_of(
    request: FilesRequest, store: VmStore, manifest: Dict[str, Any], points: Sequence[Dict[str, Any]]
) -> Source:
    """The disks of a point.

    :param points: all of the VM.
    :raises VadpError: as :func:`open_source`.
    """
    require_disks(store, manifest, request.disks)
    wanted = [disk for disk in manifest["disks"] if not request.disks or disk["key"] in request.disks]
    problems = missing_problems(store, dict(manifest, disks=wanted))
    if problems:
        raise DamagedError(
            "The restore point is damaged, and nothing was written",
            subject=f"{manifest['point']} of {store.shown}",
            reason="; ".join(problem.rstrip(". ") for problem in problems),
            remedy="Restore from another point, and bring back the damaged files from a copy of the repository",
        )
    disks = [
        DiskSource(
            key=disk["key"],
            label=disk["label"],
            capacity_bytes=disk["capacity_bytes"],
            layers=layers_of(store, points, chain_of(points, manifest["point"], disk["key"]), disk["key"]),
        )
        for disk in wanted
    ]
    return Source(store, manifest, disks)


@contextlib.contextmanager
def opened(
    request: FilesRequest, source: Source, deadline: Optional[float] = None, progress: Optional[Progress] = None
) -> Iterator[Selection]:
    """The files that the request selects, by a reader that stays open meanwhile.

    :param deadline: when reading ends; without it the request's ``timeout`` begins now.
    :raises DamagedError: on entering or on leaving, if the point is damaged.
    """
    deadline = time.monotonic() + request.timeout if deadline is None else deadline
    proofs: List[Callable[[], None]] = []

    def proven() -> None:
        for proof in proofs:
            proof()

    # The folder's name is the same for each restore of a VM's files, so the next one clears up after a crash.
    name = f"files-{source.store.uuid}"
    for left in RuntimeDir.leftovers(name):
        remove_sockets(left)
    RuntimeDir.leftovers(name, remove=True)
    with RuntimeDir(name) as run_dir, contextlib.ExitStack() as checks:

        def check() -> None:
            beside = checked_beside(_point_of(request, source), progress or Progress(None))
            proofs.append(checks.enter_context(beside))

        reader = checks.enter_context(make_reader(request, source.disks, run_dir.path, deadline, check))
        selection = Selection(reader, proven)
        selection.searched = _chosen(request, reader)
        walk = reader.walk(selection.searched, request.paths, request.recurse, request.limit, selection.skip)
        selection.entries = list(walk)
        yield selection


def _point_of(request: FilesRequest, source: Source) -> Point:
    """The disks that are read, for the check of all of their files."""
    keys = {disk.key for disk in source.disks}
    disks = [
        PointDisk(DiskChoice(disk["key"]), disk, str(source.store.layer_path(disk["key"], source.manifest["point"])))
        for disk in source.manifest["disks"]
        if disk["key"] in keys
    ]
    return Point(Repository.open(request.repository), source.store, source.manifest, disks)


def _chosen(request: FilesRequest, reader: FileReader) -> List[int]:
    """The numbers of the volumes to search."""
    readable = [number for number, volume in enumerate(reader.volumes) if volume["readable"]]
    if not request.volumes:
        return [number for number in readable if not reader.volumes[number]["only_by_name"]]
    chosen = []
    for wanted in request.volumes:
        found = [
            number
            for number, volume in enumerate(reader.volumes)
            if wanted in (volume["name"], volume["label"]) or wanted.lower() == (volume["uuid"] or "").lower()
        ]
        problems = [reader.volumes[number]["problem"] for number in found if number not in readable]
        if len(found) != 1 or problems:
            raise InputError(
                "There is no such volume" if len(found) < 1 else "The volume can't be used",
                subject=wanted,
                reason=problems[0] if problems else f"there are {_volume_list(reader)}",
                remedy="Name a volume by its name, its label or its UUID",
            )
        chosen += found
    return sorted(set(chosen))


def _volume_list(reader: FileReader) -> str:
    texts = []
    for volume in reader.volumes:
        label = f" '{volume['label']}'" if volume["label"] else ""
        more = "" if volume["readable"] else f", {volume['problem']}"
        if volume["only_by_name"]:
            more = ", all subvolumes; searched only where 'volumes' names it"
        texts.append(f"{volume['name']} ({volume['type']}{label}{more})")
    return ", ".join(texts) or "none"


def _require_found(request: FilesRequest, source: Source, selection: Selection) -> None:
    reader = selection.reader
    unmatched = [path for number, path in enumerate(request.paths) if number not in reader.matched]
    if unmatched or not selection.entries:
        reasons = [f"there are {_volume_list(reader)}"]
        reasons += [f"{skipped['path']}: {skipped['reason']}" for skipped in selection.skipped[:_SHOWN]]
        raise RepositoryError(
            "There is no such file",
            subject=f"{', '.join(map(shown, unmatched or request.paths))} in {source}",
            reason="; ".join(reasons),
            remedy="Look with 'list: true', or at another point",
        )
    places: Dict[bytes, Entry] = {}
    for entry in selection.entries:
        other = places.setdefault(encoded(entry.path), entry)
        if other.volume != entry.volume and not entry.kind == other.kind == DIRECTORY:
            names = [reader.volumes[number]["name"] for number in (other.volume, entry.volume)]
            raise InputError(
                "A path exists on more than one volume",
                subject=shown(entry.path),
                reason=f"on {' and '.join(names)}",
                remedy="Name the volume in 'volumes'",
            )


class _Restore:
    """One restore of files into a folder."""

    def __init__(
        self,
        request: FilesRequest,
        source: Source,
        selection: Selection,
        destination: Destination,
        progress: Progress,
    ) -> None:
        self._request = request
        self._source = source
        self._selection = selection
        self._reader = selection.reader
        self._destination = destination
        self._progress = progress
        self._bytes = 0
        self._sums: Dict[int, str] = {}

    def run(self, check_mode: bool) -> Dict[str, Any]:
        entries = self._unique()
        same, todo, blocked = self._compare(entries)
        if blocked:
            more = f"; and {len(blocked) - _SHOWN} more" if len(blocked) > _SHOWN else ""
            raise InputError(
                "Something else is at the places of files, and nothing was written",
                subject=self._destination.path,
                reason="; ".join(blocked[:_SHOWN]) + more,
                remedy="Set overwrite: true to replace files, or choose another folder",
                details={"blocked": blocked},
            )
        self._require_room(todo)
        if not check_mode and todo:
            self._destination.require_writable()
            todo = self._write(todo)
        elif not check_mode and os.access(self._destination.path, os.W_OK):
            self._destination.remove_leftovers()
        restored = {id(entry) for entry in todo}
        kept = restored | {id(entry) for entry in same}
        files = [
            self._described(entry, "restored" if id(entry) in restored else "unchanged")
            for entry in entries
            if id(entry) in kept
        ]
        if not files:
            raise DataPathError(
                "None of the files can be read",
                subject=str(self._source),
                reason="; ".join(f"{one['path']}: {one['reason']}" for one in self._selection.skipped[:_SHOWN]),
                remedy="Look at another point",
            )
        result = result_of(self._source, self._selection, files, changed=bool(todo))
        result["bytes_restored"] = self._bytes
        result["diff"] = {
            "before": {self._destination.shown(entry.path): "absent or other" for entry in todo},
            "after": {self._destination.shown(entry.path): f"as in {self._source}" for entry in todo},
        }
        return result

    def _unique(self) -> List[Entry]:
        """The root is the folder itself; a directory of two volumes is one."""
        seen = set()
        entries = []
        for entry in self._selection.entries:
            place = encoded(entry.path)
            if place in seen:
                if entry.kind != DIRECTORY:
                    self._selection.skip(entry.volume, entry.path, "the name is there twice")
                continue
            seen.add(place)
            entries.append(entry)
        return entries

    def _compare(self, entries: Sequence[Entry]) -> Tuple[List[Entry], List[Entry], List[str]]:
        """What is there already, what is to be written, and what stands in the way."""
        same: List[Entry] = []
        todo: List[Entry] = []
        blocked: List[str] = []
        for entry in entries:
            try:
                there = self._destination.look(entry)
            except Blocked as error:
                blocked.append(f"{self._destination.shown(entry.path)}: {error.reason}")
                continue
            if there == FREE:
                todo.append(entry)
            elif there == OTHER_KIND:
                blocked.append(f"{self._destination.shown(entry.path)} is not a {entry.kind}")
            else:
                try:
                    if self._is_same(entry):
                        same.append(entry)
                    elif self._request.overwrite:
                        todo.append(entry)
                    else:
                        blocked.append(f"{self._destination.shown(entry.path)} holds something else")
                except Unread as error:
                    self._selection.skip(entry.volume, entry.path, str(error.reason))
        return same, todo, blocked

    def _is_same(self, entry: Entry) -> bool:
        if entry.kind == DIRECTORY:
            return True
        if entry.kind == LINK:
            return self._destination.link_target(entry.path) == encoded(entry.target or "")
        try:
            descriptor = self._destination.content(entry.path)
            try:
                if os.fstat(descriptor).st_size != entry.size:
                    return False
                digest = hashlib.sha256()
                with contextlib.closing(self._reader.read(entry)) as pieces:
                    if not all(_same_bytes(descriptor, piece, digest) for piece in pieces):
                        return False
                self._sums[id(entry)] = digest.hexdigest()
                return True
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                "A file that is there can't be compared",
                subject=self._destination.shown(entry.path),
                reason=error.strerror,
                remedy="Choose another folder",
            ) from None

    def _require_room(self, todo: Sequence[Entry]) -> None:
        """:raises DataPathError: the folder's file system has less free space than the files' data take."""
        free = self._destination.free_bytes()
        files = [entry for entry in todo if entry.kind == FILE]
        needed = sum(entry.size for entry in files)
        if needed <= free:
            return
        needed = 0
        for entry in files:
            with contextlib.suppress(Unread):
                for piece in self._reader.read(entry):
                    needed += 0 if isinstance(piece, int) else len(piece)
        if needed > free:
            raise DataPathError(
                "There is not enough free space for the files",
                subject=self._destination.path,
                reason=f"they take {needed} bytes, {free} are free",
                remedy="Free some space, choose another folder, or restore fewer files at a time",
                details={"needed_bytes": needed, "free_bytes": free},
            )

    def _write(self, todo: Sequence[Entry]) -> List[Entry]:
        total = sum(entry.size for entry in todo)
        report = self._progress.disk(self._source.disks[0].key, f"{len(todo)} files", total)
        state = "failed"
        try:
            with self._destination.stage() as stage:
                ready: List[Tuple[Entry, Optional[bytes]]] = []
                for entry in todo:
                    try:
                        ready.append((entry, self._stage(stage, entry, report)))
                    except Unread as error:
                        self._selection.skip(entry.volume, entry.path, str(error.reason))
                if self._request.fail_on_skipped and self._selection.skipped:
                    raise DataPathError(
                        "Not all of the files can be read, and nothing was written",
                        subject=str(self._source),
                        reason="; ".join(f"{one['path']}: {one['reason']}" for one in self._selection.skipped[:_SHOWN]),
                        remedy="Set fail_on_skipped: false to have the others",
                    )
                self._selection.proven()
                stage.publish(ready, self._request.preserve)
            state = "done"
        finally:
            report.finish(state)
        return [entry for entry, dummy in ready]

    def _stage(self, stage: Stage, entry: Entry, report: DiskProgress) -> Optional[bytes]:
        if entry.kind == DIRECTORY:
            return None
        if entry.kind == LINK:
            if entry.target is None:
                raise Unread("A link can't be read", reason="what it points to makes no sense")
            return stage.add_link(entry.target)
        digest = hashlib.sha256()

        def on_data(piece: Any) -> None:
            length = _update(digest, piece)
            self._bytes += length
            report.update(self._bytes)

        name = stage.add_file(self._reader.read(entry), entry.size, on_data)
        self._sums[id(entry)] = digest.hexdigest()
        return name

    def _described(self, entry: Entry, state: str) -> Dict[str, Any]:
        fields = describe(entry, self._selection, self._sums.get(id(entry)))
        fields["dest"] = self._destination.shown(entry.path)
        fields["state"] = state
        return fields


def _same_bytes(descriptor: int, piece: Any, digest: Any) -> bool:
    left = piece if isinstance(piece, int) else len(piece)
    view = None if isinstance(piece, int) else memoryview(piece)
    while left:
        data = os.read(descriptor, min(left, len(_ZEROS)))
        if not data:
            return False
        expected = _ZEROS[: len(data)] if view is None else bytes(view[: len(data)])
        if data != expected:
            return False
        digest.update(data)
        left -= len(data)
        view = None if view is None else view[len(data) :]
    return True


def _update(digest: Any, piece: Any) -> int:
    """Add a piece to a hash; its length."""
    if not isinstance(piece, int):
        digest.update(piece)
        return len(piece)
    left = piece
    while left:
        step = min(left, len(_ZEROS))
        digest.update(_ZEROS if step == len(_ZEROS) else _ZEROS[:step])
        left -= step
    return piece


def iso_time(nanoseconds: int) -> Optional[str]:
    """A file's time as text; None if no calendar has it."""
    try:
        moment = _EPOCH + timedelta(microseconds=nanoseconds // 1000)
    except OverflowError:
        return None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment.year >= 1000 else None


def describe(entry: Entry, selection: Selection, sha256: Optional[str]) -> Dict[str, Any]:
    """A file as results tell it."""
    fields: Dict[str, Any] = dict(path_fields(entry.path))
    fields.update(
        volume=selection.reader.volumes[entry.volume]["name"],
        type=entry.kind,
        size=entry.size,
        mtime=iso_time(entry.mtime_ns),
        mode=None if entry.mode is None else f"{stat.S_IMODE(entry.mode):04o}",
        uid=entry.uid,
        gid=entry.gid,
        target=None if entry.target is None else shown(entry.target),
        sha256=sha256,
    )
    return fields


def checksum_of(request: FilesRequest, reader: FileReader, entry: Entry) -> Optional[str]:
    """SHA-256 of a listed file, if it is asked for. :raises Unread: it can't be read."""
    if not request.checksums or entry.kind != FILE:
        return None
    digest = hashlib.sha256()
    for piece in reader.read(entry):
        _update(digest, piece)
    return digest.hexdigest()


def _listed(entry: Entry, selection: Selection, request: FilesRequest) -> Optional[Dict[str, Any]]:
    try:
        sha256 = checksum_of(request, selection.reader, entry)
    except Unread as error:
        selection.skip(entry.volume, entry.path, str(error.reason))
        return None
    return dict(describe(entry, selection, sha256), dest=None, state="listed")


def result_of(source: Source, selection: Selection, files: List[Dict[str, Any]], changed: bool) -> Dict[str, Any]:
    """What the module returns."""
    reader = selection.reader
    warnings = []
    for number in selection.searched:
        volume = reader.volumes[number]
        warnings += [f"Volume {volume['name']} ({volume['type']}): {text}." for text in volume["warnings"]]
    skipped = selection.skipped
    if skipped:
        first = "; ".join(f"{one['path']}: {one['reason']}" for one in skipped[:_SHOWN])
        warnings.append(f"{len(skipped)} files were skipped: {first}{'; ...' if len(skipped) > _SHOWN else ''}")
    return {
        "changed": changed,
        "point": source.manifest["point"],
        "vm_name": source.manifest["vm_name"],
        "vm_uuid": source.store.uuid,
        "reader": reader.name,
        "volumes": reader.volumes,
        "files": files,
        "skipped_files": skipped,
        "bytes_restored": 0,
        "warnings": warnings,
    }
