# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point into image files: one file a disk, each whole or not there.

Look (nothing is touched) -> compare with what is there -> write beside, compare, rename. Every file of the point is
checked meanwhile; no file is compared and none gets its name before that has ended well. No vCenter is needed, and no
lock: points do not change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

from ..datapath import image
from ..datapath.processes import run_tool
from ..datapath.progress import Progress
from ..errors import DamagedError, DataPathError, InputError
from ..repository.chain import chain_of
from ..repository.layout import REPOSITORY_FILE
from ..repository.manifest import entry_of
from ..repository.runs import new_run_id
from ..repository.shapes import RUN_ID_PATTERN
from .point import Point, PointDisk, checked_beside, open_point
from .request import RestoreRequest

# A file's name may have 255 bytes: this leaves enough for the disk's part, twice ".part-<run id>" and the extension.
_VM_NAME_BYTES = 100
_LABEL_CHARACTERS = 30
# What an image file has besides data and tables, and more.
_IMAGE_BYTES = 4 << 20
_LOCK = re.compile(rf"\.openvadp-restore-({RUN_ID_PATTERN})\.lock")
_PART = re.compile(rf".+-[0-9]+\.(?:{'|'.join(image.FORMATS)})\.part-({RUN_ID_PATTERN})(?:\.part-{RUN_ID_PATTERN})?")


@dataclass(frozen=True)
class ImageFile:
    """Where a disk goes. ``exists`` and ``same`` say what is there before the restore."""

    disk: PointDisk
    path: str
    format: str
    exists: bool
    same: bool


def restore_point(request: RestoreRequest, check_mode: bool) -> Dict[str, Any]:
    """Write the disks of a point into image files, except those whose files hold the point's bytes already.

    :param check_mode: all checks, but nothing is written.
    :returns: {changed, point, restored, diff}.
    :raises VadpError: a file that was not finished is not there, and one that was there is what it was.
    """
    request.check()
    point = open_point(request)
    folder = _folder(request.dest)
    with Progress(None if check_mode else request.progress_file) as progress, checked_beside(point, progress) as proven:
        files = [_look(disk, folder, point, request, proven) for disk in point.disks]
        _require_consent(files, request)
        todo = [file for file in files if not file.same]
        _require_room(folder, todo, point)
        restored: Dict[int, Dict[str, Any]] = {file.disk.key: _unchanged(file) for file in files if file.same}
        if check_mode:
            proven()
            restored.update({file.disk.key: _planned(file) for file in todo})
        elif todo:
            _require_writable(folder)
            with _own_run(folder) as run_id:
                for file in todo:
                    restored[file.disk.key] = _write(file, run_id, request, progress, proven)
        elif os.access(str(folder), os.W_OK):
            # The last act of a restore that crashed may have been to finish the files.
            _remove_leftovers(folder)
    return {
        "changed": bool(todo),
        "point": point.name,
        "restored": [restored[file.disk.key] for file in files],
        "diff": {
            "before": {file.path: _content(file, point) for file in files},
            "after": {file.path: f"disk {file.disk.key} of {point}" for file in files},
        },
    }


def file_name(vm_name: str, label: str, key: int, image_format: str) -> str:
    """The name of a disk's image file: ``app01-hard-disk-1-2000.qcow2``."""
    cleaned = re.sub(r"[/\x00-\x1f\x7f]", "_", vm_name).lstrip(".-") or "vm"
    while len(cleaned.encode("utf-8")) > _VM_NAME_BYTES:
        cleaned = cleaned[:-1]
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower())[:_LABEL_CHARACTERS].strip("-") or "disk"
    return f"{cleaned}-{slug}-{key}.{image_format}"


# Before the first write


def _folder(dest: Optional[str]) -> Path:
    if dest is None:
        raise InputError("There is no folder for the image files", remedy="Give dest")
    folder = Path(dest)
    if not folder.is_dir():
        reason = "it is no folder" if os.path.lexists(dest) else "it does not exist"
        raise InputError(
            "The image files can't be written", subject=dest, reason=reason, remedy="Make the folder first"
        )
    real = Path(os.path.realpath(dest))
    for parent in (real, *real.parents):
        if (parent / REPOSITORY_FILE).exists():
            raise InputError(
                "The folder for the image files lies in a repository",
                subject=dest,
                reason=f"{parent} is one",
                remedy="Choose a folder outside it",
            )
    return folder


def _require_writable(folder: Path) -> None:
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise InputError(
            "The image files can't be written",
            subject=str(folder),
            reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
            remedy="Give that user the folder, or choose another",
        )


def _look(
    disk: PointDisk, folder: Path, point: Point, request: RestoreRequest, proven: Callable[[], None]
) -> ImageFile:
    """Where a disk goes, and whether its bytes are there already."""
    image_format = disk.choice.format or request.format
    path = folder / file_name(str(point.manifest["vm_name"]), disk.label, disk.key, image_format)
    if not os.path.lexists(str(path)):
        return ImageFile(disk, str(path), image_format, exists=False, same=False)
    if path.is_symlink() or not path.is_file():
        raise InputError(
            "There is something at an image file's place",
            subject=str(path),
            reason="it is no ordinary file",
            remedy="Move it away, or choose another folder",
        )
    proven()
    return ImageFile(disk, str(path), image_format, exists=True, same=_holds(str(path), image_format, disk))


def _holds(path: str, image_format: str, disk: PointDisk) -> bool:
    """Whether an image file holds exactly the disk's bytes."""
    if image_format == "qcow2":
        try:
            if image.read_header(path).backing is not None:
                return False
        except DamagedError:
            return False
    try:
        return image.compare(disk.layer, path, b_format=image_format)
    except DataPathError:
        # The point was found intact, so it is the file that is no image of this format.
        return False


def _require_consent(files: List[ImageFile], request: RestoreRequest) -> None:
    others = [file.path for file in files if file.exists and not file.same]
    if others and not request.overwrite:
        raise InputError(
            "There are files with other content at the image files' places",
            subject=", ".join(others),
            remedy="Set overwrite: true to replace them, or choose another folder",
        )


def _require_room(folder: Path, files: List[ImageFile], point: Point) -> None:
    """:raises DataPathError: the folder's file system has less free space than the disks' data take."""
    status = os.statvfs(str(folder))
    free = status.f_bavail * status.f_frsize
    points = point.store.points()
    if sum(_stored_bytes_at_most(file.disk, point, points) for file in files) <= free:
        return
    needed = sum(_stored_bytes(file.disk) for file in files)
    if needed > free:
        raise DataPathError(
            "There is not enough free space for the image files",
            subject=str(folder),
            reason=f"they take about {needed} bytes, {free} are free",
            remedy="Free some space, choose another folder, or restore fewer disks at a time",
            details={"needed_bytes": needed, "free_bytes": free},
        )


def _stored_bytes_at_most(disk: PointDisk, point: Point, points: List[Dict[str, Any]]) -> int:
    """All that was ever read into the disk's chain, and an image's tables: told by the manifests alone."""
    manifests = {manifest["point"]: manifest for manifest in points}
    names = chain_of(points, point.name, disk.key)
    data = sum(entry_of(manifests[name], disk.key)["bytes_read"] for name in names)
    return int(data + (disk.capacity_bytes >> 10) + _IMAGE_BYTES)


def _stored_bytes(disk: PointDisk) -> int:
    """What the disk takes without its zeros: every format that is written here leaves them out."""
    image.chain_files(disk.layer)
    text = run_tool(
        ["qemu-img", "measure", "--output=json", "-O", "qcow2", "-f", "qcow2", disk.layer],
        what="The size of an image file can't be told",
        subject=disk.layer,
    )
    return int(json.loads(text)["required"])


# Writing


@contextlib.contextmanager
def _own_run(folder: Path) -> Iterator[str]:
    """The id of this restore, which unfinished files carry. While its lock file is locked, they are in use.

    What crashed restores left in the folder goes first: unfinished files whose lock nobody holds any more.
    """
    run_id = new_run_id()
    lock = folder / f".openvadp-restore-{run_id}.lock"
    descriptor = _open_lock(lock)
    try:
        _remove_leftovers(folder)
        yield run_id
    finally:
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()
        os.close(descriptor)


def _open_lock(lock: Path) -> int:
    while True:
        try:
            descriptor = os.open(str(lock), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise DataPathError(
                "The image files can't be written", subject=str(lock.parent), reason=error.strerror
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if lock.exists() and os.fstat(descriptor).st_ino == lock.stat().st_ino:
                return descriptor
            # Another restore took it for a leftover before it was locked: again.
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise DataPathError(
                "The folder's file system does not support locks", subject=str(lock.parent), reason=error.strerror
            ) from None


def _remove_leftovers(folder: Path) -> None:
    names = sorted(os.listdir(str(folder)))
    alive = set()
    for name in names:
        found = _LOCK.fullmatch(name)
        if found and _is_locked(folder / name):
            alive.add(found.group(1))
    for name in names:
        found = _PART.fullmatch(name) or _LOCK.fullmatch(name)
        if found and found.group(1) not in alive:
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()


def _is_locked(lock: Path) -> bool:
    try:
        descriptor = os.open(str(lock), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        # Another user's: not ours to judge, nor to remove.
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def _write(
    file: ImageFile, run_id: str, request: RestoreRequest, progress: Progress, proven: Callable[[], None]
) -> Dict[str, Any]:
    """Write one image beside its place, compare it, put it there once the point is *proven* to be intact."""
    begun = time.monotonic()
    disk = file.disk
    part = f"{file.path}.part-{run_id}"
    report = progress.disk(disk.key, disk.label, disk.capacity_bytes)
    state = "failed"
    try:
        image.convert(disk.layer, part, file.format, part_id=run_id, on_progress=report.update)
        report.update(disk.capacity_bytes)
        if request.verify and not image.compare(disk.layer, part, b_format=file.format):
            raise DataPathError(
                "The image file does not hold the bytes of the restore point",
                subject=file.path,
                reason="they differ when read back",
                remedy="Check the file system and the memory of this machine, and restore again",
            )
        proven()
        written = os.stat(part).st_blocks * 512
        os.rename(part, file.path)
        image.fsync_dir(os.path.dirname(file.path))
        state = "done"
    except OSError as error:
        raise DataPathError("The image file can't be written", subject=file.path, reason=error.strerror) from None
    finally:
        report.finish(state)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
    reason = "it was not there" if not file.exists else "it held other bytes"
    return _entry(
        file,
        reason=reason,
        bytes_read=disk.capacity_bytes,
        bytes_written=written,
        seconds=round(time.monotonic() - begun, 3),
        verified=True if request.verify else None,
    )


# Results


def _entry(file: ImageFile, reason: str, **measured: Any) -> Dict[str, Any]:
    return {
        "key": file.disk.key,
        "label": file.disk.label,
        "target": file.path,
        "format": file.format,
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


def _unchanged(file: ImageFile) -> Dict[str, Any]:
    return _entry(file, "it holds the point's bytes already", verified=True)


def _planned(file: ImageFile) -> Dict[str, Any]:
    return _entry(file, "it holds other bytes" if file.exists else "it is not there")


def _content(file: ImageFile, point: Point) -> str:
    if file.same:
        return f"disk {file.disk.key} of {point}"
    return "other bytes" if file.exists else "absent"
