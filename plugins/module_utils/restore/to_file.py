# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point into image files: one file a disk, each whole or not there.

Look (nothing is touched) -> compare with what is there -> write beside, compare, rename. Every file of the point is
checked meanwhile; no file is compared and none gets its name before that has ended well. No vCenter is needed, and no
lock: points do not change.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional

from ..datapath import image
from ..datapath.files import Folder, Stage
from ..datapath.progress import Progress
from ..errors import DataPathError, InputError
from . import ova
from .dest import (
    dest_folder,
    existing,
    file_name,
    is_writable,
    remove_leftovers,
    require_room,
    require_writable,
    staged,
)
from .point import Point, PointDisk, checked_beside, open_point
from .request import OVA, RestoreRequest


@dataclass(frozen=True)
class ImageFile:
    """Where a disk goes. ``exists`` and ``same`` say what is there before the restore."""

    disk: PointDisk
    name: str
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
    if request.format == OVA:
        return ova.restore_point(point, request, check_mode)
    with dest_folder(request.dest) as folder:
        return _restore(folder, point, request, check_mode)


def _restore(folder: Folder, point: Point, request: RestoreRequest, check_mode: bool) -> Dict[str, Any]:
    with Progress(None if check_mode else request.progress_file) as progress, checked_beside(point, progress) as proven:
        files = [_look(disk, folder, point, request, proven) for disk in point.disks]
        _require_consent(files, request)
        todo = [file for file in files if not file.same]
        require_room(folder.proc_path, [file.disk for file in todo], point, shown=folder.path)
        restored: Dict[int, Dict[str, Any]] = {file.disk.key: _unchanged(file) for file in files if file.same}
        if check_mode:
            proven()
            restored.update({file.disk.key: _planned(file) for file in todo})
        elif todo:
            require_writable(folder)
            with staged(folder) as stage:
                for file in todo:
                    restored[file.disk.key] = _write(file, stage, request, progress, proven)
        elif is_writable(folder):
            # The last act of a restore that crashed may have been to finish the files.
            remove_leftovers(folder)
    return {
        "changed": bool(todo),
        "point": point.name,
        "restored": [restored[file.disk.key] for file in files],
        "diff": {
            "before": {file.path: _content(file, point) for file in files},
            "after": {file.path: f"disk {file.disk.key} of {point}" for file in files},
        },
    }


# Before the first write


def _look(
    disk: PointDisk, folder: Folder, point: Point, request: RestoreRequest, proven: Callable[[], None]
) -> ImageFile:
    """Where a disk goes, and whether its bytes are there already."""
    image_format = disk.choice.format or request.format
    name = file_name(str(point.manifest["vm_name"]), disk.label, disk.key, image_format)
    path = os.path.join(folder.path, name)
    with existing(folder, name, "an image file's place") as found:
        if found is None:
            return ImageFile(disk, name, path, image_format, exists=False, same=False)
        proven()
        same = _holds(found, path, image_format, disk)
        return ImageFile(disk, name, path, image_format, exists=True, same=same)


def _holds(found: int, path: str, image_format: str, disk: PointDisk) -> bool:
    """Whether an image file holds exactly the disk's bytes."""
    try:
        if not image.is_of_format(found, image_format):
            return False
        return image.compare(disk.layer, path, b_format=image_format, b_descriptor=found)
    except DataPathError:
        # The point was found intact, so it is the file that is not an image of this format.
        return False


def _require_consent(files: List[ImageFile], request: RestoreRequest) -> None:
    others = [file.path for file in files if file.exists and not file.same]
    if others and not request.overwrite:
        raise InputError(
            "There are files with other content at the image files' places",
            subject=", ".join(others),
            remedy="Set overwrite: true to replace them, or choose another folder",
        )


# Writing


def _write(
    file: ImageFile, stage: Stage, request: RestoreRequest, progress: Progress, proven: Callable[[], None]
) -> Dict[str, Any]:
    """Write one image beside its place, compare it, put it there once the point is *proven* to be intact."""
    begun = time.monotonic()
    disk = file.disk
    report = progress.disk(disk.key, disk.label, disk.capacity_bytes)
    state = "failed"
    part: Optional[int] = None
    try:
        part = image.convert_into(stage, file.name, disk.layer, file.format, on_progress=report.update)
        report.update(disk.capacity_bytes)
        if request.verify and not _holds(part, file.path, file.format, disk):
            raise DataPathError(
                "The image file does not hold the bytes of the restore point",
                subject=file.path,
                reason="they differ when read back",
                remedy="Check the file system and the memory of this machine, and restore again",
            )
        proven()
        written = os.fstat(part).st_blocks * 512
        stage.publish(file.name, file.name)
        state = "done"
    except OSError as error:
        raise DataPathError("The image file can't be written", subject=file.path, reason=error.strerror) from None
    finally:
        report.finish(state)
        if part is not None:
            os.close(part)
        with contextlib.suppress(OSError):
            stage.unlink(file.name)
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
