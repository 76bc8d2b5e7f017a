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

from ..datapath import files, image
from ..datapath.processes import run_tool
from ..errors import DamagedError, DataPathError, InputError
from ..named import FOLDER, path_problem
from ..repository.chain import chain_of
from ..repository.documents import REPOSITORY_FILE
from ..repository.manifest import entry_of
from ..repository.shapes import RUN_ID_PATTERN
from ..shown import shown
from .point import Point, PointDisk

# A file's name may have 255 bytes: this leaves enough for the disk's part, twice ".part-<run id>" and the extension.
_VM_NAME_BYTES = 100
_LABEL_CHARACTERS = 30
# What an image file has besides data and tables, and more.
_IMAGE_BYTES = 4 << 20
_STAGE = ".openvadp-restore-"
_LOCK = re.compile(rf"\.openvadp-restore-({RUN_ID_PATTERN})\.lock")
_EXTENSIONS = "|".join(sorted({image.driver_of(image_format) for image_format in image.FORMATS}))
_BEHIND = rf"\.part-({RUN_ID_PATTERN})(?:\.part-{RUN_ID_PATTERN})?"
#: The name of a file that a restore of an older release has not finished.
UNFINISHED = re.compile(rf"(?:.+-[0-9]+\.(?:{_EXTENSIONS})|.+\.ova){_BEHIND}")


def vm_stem(vm_name: str) -> str:
    """The virtual machine's name as the beginning of a file's name."""
    printable = "".join(letter if shown(letter) == letter else "_" for letter in vm_name)
    cleaned = printable.replace("/", "_").lstrip(".-") or "vm"
    while len(cleaned.encode("utf-8")) > _VM_NAME_BYTES:
        cleaned = cleaned[:-1]
    return cleaned


def file_name(vm_name: str, label: str, key: int, image_format: str) -> str:
    """The name of a disk's image file: ``app01-hard-disk-1-2000.qcow2``."""
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower())[:_LABEL_CHARACTERS].strip("-") or "disk"
    return f"{vm_stem(vm_name)}-{slug}-{key}.{image.driver_of(image_format)}"


def dest_folder(dest: Optional[str]) -> files.Folder:
    """The folder, open. InputError: it does not exist, or lies in a repository."""
    if dest is None:
        raise InputError("There is no folder for the image files", remedy="Give dest")
    problem = path_problem(dest, FOLDER)
    if problem is not None:
        raise InputError(
            "The image files can't be written", subject=dest, reason=problem, remedy="Make the folder first"
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
    try:
        return files.Folder(dest)
    except OSError as error:
        raise InputError("The image files can't be written", subject=dest, reason=error.strerror) from None


def require_writable(folder: files.Folder) -> None:
    """:raises InputError: this user may not write there."""
    if not is_writable(folder):
        raise InputError(
            "The image files can't be written",
            subject=folder.path,
            reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
            remedy="Give that user the folder, or choose another",
        )


def is_writable(folder: files.Folder) -> bool:
    """Whether this user may write there."""
    return os.access(folder.proc_path, os.W_OK | os.X_OK)


def require_room(
    path: str, disks: Sequence[PointDisk], point: Point, twice: bool = False, shown: Optional[str] = None
) -> None:
    """:raises DataPathError: the folder's file system has less free space than the disks' data take.

    :param shown: what the folder is called for people, if *path* is another name of it.
    :param twice: the largest of the disks takes its space twice for a while.
    """
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    points = point.store.points()
    if _needed([_stored_bytes_at_most(disk, point, points) for disk in disks], twice) <= free:
        return
    needed = _needed([_stored_bytes(disk) for disk in disks], twice)
    if needed > free:
        raise DataPathError(
            "There is not enough free space for the image files",
            subject=shown or path,
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
    text = run_tool(
        ["qemu-img", "measure", "--output=json", "-O", "qcow2", "--image-opts", image.layer_opts(disk.layer)],
        what="The size of an image file can't be determined",
        subject=disk.layer,
    )
    return int(json.loads(text)["required"])


@contextlib.contextmanager
def staged(folder: files.Folder) -> Iterator[files.Stage]:
    """A place of this restore alone for files that are not complete. What crashed restores left goes first.

    :raises DataPathError: it can't be made.
    """
    with files.as_data_path_error("The image files can't be written", folder.path):
        remove_leftovers(folder)
        stage = files.Stage(folder, _STAGE)
    with stage:
        yield stage


def remove_leftovers(folder: files.Folder) -> None:
    """Remove unfinished files that nobody works on any more."""
    files.remove_stages(folder, _STAGE)
    # Older versions had their unfinished files in the folder itself, and a file as their lock.
    names = sorted(os.listdir(folder.descriptor))
    alive = set()
    for name in names:
        found = _LOCK.fullmatch(name)
        if found and _is_locked(folder, name):
            alive.add(found.group(1))
    for name in names:
        found = UNFINISHED.fullmatch(name) or _LOCK.fullmatch(name)
        if found and found.group(1) not in alive:
            folder.unlink(name)


def _is_locked(folder: files.Folder, name: str) -> bool:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(name, flags, dir_fd=folder.descriptor)
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


@contextlib.contextmanager
def existing(folder: files.Folder, name: str, what: str) -> Iterator[Optional[int]]:
    """A descriptor of the file of that name, None if there is none. InputError: something else is there.

    :param what: what the message calls its place ("an image file's place").
    """
    try:
        with files.as_data_path_error("A file can't be read", os.path.join(folder.path, name)):
            descriptor = folder.open(name)
    except DamagedError as error:
        raise InputError(
            f"There is something at {what}",
            subject=error.subject,
            reason=error.reason,
            remedy="Move it away, or choose another folder",
        ) from None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
