# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The folder that a restore writes files into: may it be used, their names, the room, what crashed restores left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from ..datapath import image
from ..datapath.processes import run_tool
from ..errors import DataPathError, InputError
from ..repository.chain import chain_of
from ..repository.layout import REPOSITORY_FILE
from ..repository.manifest import entry_of
from ..repository.runs import new_run_id
from ..repository.shapes import RUN_ID_PATTERN
from .point import Point, PointDisk

# A file's name may have 255 bytes: this leaves enough for the disk's part, twice ".part-<run id>" and the extension.
_VM_NAME_BYTES = 100
_LABEL_CHARACTERS = 30
# What an image file has besides data and tables, and more.
_IMAGE_BYTES = 4 << 20
_LOCK = re.compile(rf"\.openvadp-restore-({RUN_ID_PATTERN})\.lock")
_EXTENSIONS = "|".join(sorted({image.driver_of(image_format) for image_format in image.FORMATS}))
_BEHIND = rf"\.part-({RUN_ID_PATTERN})(?:\.part-{RUN_ID_PATTERN})?"
#: The name of a file that a restore has not finished.
UNFINISHED = re.compile(rf"(?:.+-[0-9]+\.(?:{_EXTENSIONS})|.+\.ova){_BEHIND}")


def vm_stem(vm_name: str) -> str:
    """The virtual machine's name as the beginning of a file's name."""
    cleaned = re.sub(r"[/\x00-\x1f\x7f]", "_", vm_name).lstrip(".-") or "vm"
    while len(cleaned.encode("utf-8")) > _VM_NAME_BYTES:
        cleaned = cleaned[:-1]
    return cleaned


def file_name(vm_name: str, label: str, key: int, image_format: str) -> str:
    """The name of a disk's image file: ``app01-hard-disk-1-2000.qcow2``."""
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower())[:_LABEL_CHARACTERS].strip("-") or "disk"
    return f"{vm_stem(vm_name)}-{slug}-{key}.{image.driver_of(image_format)}"


def dest_folder(dest: Optional[str]) -> Path:
    """The folder. InputError: it does not exist, or lies in a repository."""
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


def require_writable(folder: Path) -> None:
    """:raises InputError: this user may not write there."""
    if not os.access(str(folder), os.W_OK | os.X_OK):
        raise InputError(
            "The image files can't be written",
            subject=str(folder),
            reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
            remedy="Give that user the folder, or choose another",
        )


def require_room(folder: Path, disks: Sequence[PointDisk], point: Point, twice: bool = False) -> None:
    """:raises DataPathError: the folder's file system has less free space than the disks' data take.

    :param twice: the largest of the disks takes its space twice for a while.
    """
    status = os.statvfs(str(folder))
    free = status.f_bavail * status.f_frsize
    points = point.store.points()
    if _needed([_stored_bytes_at_most(disk, point, points) for disk in disks], twice) <= free:
        return
    needed = _needed([_stored_bytes(disk) for disk in disks], twice)
    if needed > free:
        raise DataPathError(
            "There is not enough free space for the image files",
            subject=str(folder),
            reason=f"they take about {needed} bytes, {free} are free",
            remedy="Free some space, choose another folder, or restore fewer disks at a time",
            details={"needed_bytes": needed, "free_bytes": free},
        )


def _needed(sizes: List[int], twice: bool) -> int:
    return sum(sizes) + (max(sizes, default=0) if twice else 0)


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


@contextlib.contextmanager
def own_run(folder: Path) -> Iterator[str]:
    """The id of this restore, which unfinished files carry. While its lock file is locked, they are in use.

    What crashed restores left in the folder goes first: unfinished files whose lock nobody holds any more.
    """
    run_id = new_run_id()
    lock = folder / f".openvadp-restore-{run_id}.lock"
    descriptor = _open_lock(lock)
    try:
        remove_leftovers(folder)
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


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files whose lock nobody holds."""
    names = sorted(os.listdir(str(folder)))
    alive = set()
    for name in names:
        found = _LOCK.fullmatch(name)
        if found and _is_locked(folder / name):
            alive.add(found.group(1))
    for name in names:
        found = UNFINISHED.fullmatch(name) or _LOCK.fullmatch(name)
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
