# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point as one OVA file: the OVF descriptor, its manifest of SHA-256 sums, and streamOptimized disks.

The descriptor stands first in the archive and tells the sizes of the files behind it, which are known last. So its
place is kept free, disk after disk is converted beside the archive, appended and removed, and the descriptor is written
at the end, filled up with line feeds. Never more than one disk lies there twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Optional, Tuple

from ..datapath import files, image
from ..datapath.files import Folder, Stage
from ..datapath.hashes import hash_file
from ..datapath.progress import Progress
from ..errors import DamagedError, DataPathError, InputError
from ..repository.saved import read_configuration
from ..repository.shapes import parse_time
from .dest import (
    dest_folder,
    existing,
    is_writable,
    remove_leftovers,
    require_room,
    require_writable,
    staged,
    vm_stem,
)
from .ovf import PackedDisk, descriptor
from .point import Point, PointDisk, checked_beside
from .request import OVA, RestoreRequest

_BLOCK = tarfile.BLOCKSIZE
_COPY_BYTES = 1 << 20
# The longest text that a size can have; what is not needed of it becomes line feeds.
_ANY_SIZE = 10**18
_USTAR_BYTES = 8 << 30
_DESCRIPTOR_BYTES = 16 << 20


class _Package:
    """What goes into the archive, and under which names."""

    def __init__(self, point: Point) -> None:
        self.vm_name = str(point.manifest["vm_name"])
        # Names in a package are read by other systems: plain ones travel best.
        self.stem = re.sub(r"[^A-Za-z0-9._-]", "_", vm_stem(self.vm_name))[:60]
        self.saved = _configuration(point)
        self.nvram = _nvram(point)
        self.disks = [
            PackedDisk(disk.key, disk.label, f"{self.stem}-disk-{disk.key}.vmdk", _ANY_SIZE, disk.capacity_bytes)
            for disk in point.disks
        ]

    def descriptor(self, disks: List[PackedDisk]) -> bytes:
        nvram = None if self.nvram is None else (self.nvram_name, len(self.nvram))
        return descriptor(self.saved, self.vm_name, disks, nvram).encode("utf-8")

    @property
    def descriptor_name(self) -> str:
        return f"{self.stem}.ovf"

    @property
    def sums_name(self) -> str:
        return f"{self.stem}.mf"

    @property
    def nvram_name(self) -> str:
        return f"{self.stem}.nvram"

    def names(self) -> List[str]:
        """The members, in their order."""
        return [
            self.descriptor_name,
            self.sums_name,
            *(disk.href for disk in self.disks),
            *([] if self.nvram is None else [self.nvram_name]),
        ]

    def sums(self, hashes: Dict[str, str]) -> bytes:
        """The package's manifest."""
        names = [name for name in self.names() if name != self.sums_name]
        return "".join(f"SHA256({name})= {hashes.get(name, '0' * 64)}\n" for name in names).encode("ascii")


def restore_point(point: Point, request: RestoreRequest, check_mode: bool) -> Dict[str, Any]:
    """Write the wanted disks of a point, with the machine's configuration, into ``<dest>/<name of the VM>.ova``.

    A file that holds the same already is left alone.

    :returns: {changed, point, restored, diff, warnings}.
    :raises VadpError: a file that was not finished is not there, and one that was there is what it was.
    """
    with dest_folder(request.dest) as folder:
        package = _Package(point)
        # What the descriptor can't be made of shows before the disks are read.
        package.descriptor(package.disks)
        return _restore(folder, package, point, request, check_mode)


def _restore(
    folder: Folder, package: _Package, point: Point, request: RestoreRequest, check_mode: bool
) -> Dict[str, Any]:
    name = f"{vm_stem(package.vm_name)}.ova"
    path = Path(folder.path) / name
    with Progress(None if check_mode else request.progress_file) as progress, checked_beside(point, progress) as proven:
        same = False
        with existing(folder, name, "the OVA's place") as found:
            exists = found is not None
            if found is not None:
                proven()
                same = _holds(found, path, package, point)
            if exists and not same and not request.overwrite:
                raise InputError(
                    "There is a file with other content at the OVA's place",
                    subject=str(path),
                    remedy="Set overwrite: true to replace it, or choose another folder",
                )
        if same:
            restored = [_entry(disk, path, "it holds the point's bytes already", verified=True) for disk in point.disks]
            if not check_mode and is_writable(folder):
                remove_leftovers(folder)
        else:
            require_room(folder.proc_path, point.disks, point, twice=True, shown=folder.path)
            if check_mode:
                proven()
                reason = "it holds other bytes" if exists else "it is not there"
                restored = [_entry(disk, path, reason) for disk in point.disks]
            else:
                require_writable(folder)
                with staged(folder) as stage:
                    restored = _write(path, stage, package, point, request, progress, proven)
                reason = "it held other bytes" if exists else "it was not there"
                for entry in restored:
                    entry["reason"] = reason
    shown = f"{len(point.disks)} disks of {point}"
    return {
        "changed": not same,
        "point": point.name,
        "restored": restored,
        "warnings": _warnings(point),
        "diff": {
            "before": {str(path): shown if same else "other bytes" if exists else "absent"},
            "after": {str(path): shown},
        },
    }


def _warnings(point: Point) -> List[str]:
    names = [f"{disk['label']} ({disk['reason']})" for disk in point.manifest["skipped_disks"]]
    return [f"The OVA lacks disks that the restore point does not hold: {', '.join(names)}"] if names else []


# What was saved beside the disks


def _configuration(point: Point) -> Dict[str, Any]:
    path = point.store.config_path(point.name)
    _stored(path, point.manifest["configuration"], "The saved configuration of the restore point is damaged")
    return read_configuration(path)


def _nvram(point: Point) -> Optional[bytes]:
    stored = point.manifest["nvram"]
    if stored is None:
        return None
    return _stored(point.store.nvram_path(point.name), stored, "The NVRAM of the restore point is damaged")


def _stored(path: Path, stored: Dict[str, Any], what: str) -> bytes:
    remedy = "Restore another point, or the disks alone in another format"
    try:
        if hash_file(str(path)) == stored["blake3"]:
            return files.read(str(path))
        reason = "its content changed since it was written (BLAKE3 differs)"
    except (OSError, DataPathError) as error:
        reason = str(error)
    raise DamagedError(what, subject=str(path), reason=reason, remedy=remedy)


# Writing


def _write(
    path: Path,
    stage: Stage,
    package: _Package,
    point: Point,
    request: RestoreRequest,
    progress: Progress,
    proven: Callable[[], None],
) -> List[Dict[str, Any]]:
    try:
        with os.fdopen(stage.create(path.name), "w+b") as archive:
            entries = _fill(archive, path, stage, package, point, progress)
            archive.flush()
            os.fsync(archive.fileno())
            holds = not request.verify or _holds(archive.fileno(), path, package, point)
        if not holds:
            raise DataPathError(
                "The OVA does not hold what the restore point holds",
                subject=str(path),
                reason="they differ when read back",
                remedy="Check the file system and the memory of this machine, and restore again",
            )
        proven()
        stage.publish(path.name, path.name)
    except OSError as error:
        raise DataPathError("The OVA can't be written", subject=str(path), reason=error.strerror) from None
    for entry in entries:
        entry["verified"] = True if request.verify else None
    return entries


def _fill(
    archive: IO[bytes], path: Path, stage: Stage, package: _Package, point: Point, progress: Progress
) -> List[Dict[str, Any]]:
    created = _moment(point)
    longest = len(package.descriptor(package.disks))
    head = _Member(package.descriptor_name, longest).total + _Member(package.sums_name, len(package.sums({}))).total
    archive.seek(head)
    hashes: Dict[str, str] = {}
    packed: List[PackedDisk] = []
    entries: List[Dict[str, Any]] = []
    for disk, plan in zip(point.disks, package.disks):
        begun = time.monotonic()
        size, hashes[plan.href] = _append_disk(archive, stage, disk, plan, created, progress)
        packed.append(replace(plan, size_bytes=size))
        entries.append(
            _entry(
                disk,
                path,
                "",
                bytes_read=disk.capacity_bytes,
                bytes_written=size,
                seconds=round(time.monotonic() - begun, 3),
            )
        )
    if package.nvram is not None:
        hashes[package.nvram_name] = _append(archive, package.nvram_name, package.nvram, created)
    archive.write(bytes(2 * _BLOCK))
    archive.seek(0)
    text = package.descriptor(packed)
    text += b"\n" * (longest - len(text))
    hashes[package.descriptor_name] = _append(archive, package.descriptor_name, text, created)
    _append(archive, package.sums_name, package.sums(hashes), created)
    return entries


def _moment(point: Point) -> int:
    # The files are of the moment that they show, not of the restore.
    return int(parse_time(point.manifest["snapshot"]["created"]).timestamp())


class _Member:
    """A file of the archive, whose size is known."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    @property
    def padding(self) -> int:
        return -self.size % _BLOCK

    @property
    def total(self) -> int:
        return _BLOCK + self.size + self.padding

    def header(self, created: int) -> bytes:
        info = tarfile.TarInfo(self.name)
        info.size, info.mtime, info.mode = self.size, created, files.PRIVATE
        info.uname = info.gname = "root"
        # OVF asks for USTAR, which can't tell the size of a larger file; what reads OVAs understands GNU's way as well.
        form = tarfile.USTAR_FORMAT if self.size < _USTAR_BYTES else tarfile.GNU_FORMAT
        return info.tobuf(form)  # type: ignore[arg-type]


def _append(archive: IO[bytes], name: str, data: bytes, created: int) -> str:
    member = _Member(name, len(data))
    archive.write(member.header(created) + data + bytes(member.padding))
    return hashlib.sha256(data).hexdigest()


def _append_disk(
    archive: IO[bytes], stage: Stage, disk: PointDisk, plan: PackedDisk, created: int, progress: Progress
) -> Tuple[int, str]:
    """Convert a disk beside the archive, append it: its size there and its SHA-256."""
    report = progress.disk(disk.key, disk.label, disk.capacity_bytes)
    state = "failed"
    digest = hashlib.sha256()
    try:
        part = image.convert_into(stage, plan.href, disk.layer, "vmdk_stream", on_progress=report.update)
        with os.fdopen(part, "rb") as source:
            member = _Member(plan.href, os.fstat(source.fileno()).st_size)
            archive.write(member.header(created))
            while True:
                piece = source.read(_COPY_BYTES)
                if not piece:
                    break
                digest.update(piece)
                archive.write(piece)
            archive.write(bytes(member.padding))
        report.update(disk.capacity_bytes)
        state = "done"
    finally:
        report.finish(state)
        with contextlib.suppress(OSError):
            stage.unlink(plan.href)
    return member.size, digest.hexdigest()


# Reading back


def _holds(found: int, path: Path, package: _Package, point: Point) -> bool:
    """Whether an OVA is whole, and its disks, descriptor and NVRAM are those of the point."""
    try:
        os.lseek(found, 0, os.SEEK_SET)
        with os.fdopen(os.dup(found), "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            members = archive.getmembers()
            if [member.name for member in members] != package.names() or not all(map(tarfile.TarInfo.isreg, members)):
                return False
            hashes = {member.name: _sha256(archive, member) for member in members if member.name != package.sums_name}
            by_name = {member.name: member for member in members}
            texts = {
                name: _text(archive, by_name[name], _DESCRIPTOR_BYTES)
                for name in (package.descriptor_name, package.sums_name)
            }
    except (tarfile.TarError, EOFError):
        return False
    except OSError as error:
        raise DataPathError("The OVA can't be read", subject=str(path), reason=error.strerror) from None
    if texts[package.sums_name] != package.sums(hashes):
        return False
    if package.nvram is not None and hashes[package.nvram_name] != hashlib.sha256(package.nvram).hexdigest():
        return False
    packed = [replace(disk, size_bytes=by_name[disk.href].size) for disk in package.disks]
    if texts[package.descriptor_name].rstrip(b"\n") != package.descriptor(packed).rstrip(b"\n"):
        return False
    try:
        return all(
            image.is_of_format(found, "vmdk_stream", by_name[plan.href].offset_data)
            and image.compare(
                disk.layer,
                str(path),
                b_format="vmdk",
                b_descriptor=found,
                b_window=(by_name[plan.href].offset_data, by_name[plan.href].size),
            )
            for disk, plan in zip(point.disks, package.disks)
        )
    except DataPathError:
        # The point was found intact, so it is the archive's disk that is no image.
        return False


def _sha256(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    digest = hashlib.sha256()
    stream = archive.extractfile(member)
    while stream is not None:
        piece = stream.read(_COPY_BYTES)
        if not piece:
            break
        digest.update(piece)
    return digest.hexdigest()


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    stream = archive.extractfile(member)
    return b"" if stream is None or member.size > limit else stream.read()


def _entry(disk: PointDisk, path: Path, reason: str, **measured: Any) -> Dict[str, Any]:
    return {
        "key": disk.key,
        "label": disk.label,
        "target": str(path),
        "format": OVA,
        "transport": None,
        "method": None,
        "transport_reasons": [],
        "transport_notes": [],
        "bytes_read": measured.get("bytes_read", 0),
        "bytes_written": measured.get("bytes_written", 0),
        "seconds": measured.get("seconds", 0.0),
        "verified": measured.get("verified"),
        "reason": reason,
    }
