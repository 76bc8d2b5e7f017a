# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The block device that an attached disk is on this machine: found by the disk's UUID, never by SCSI order.

Linux links a SCSI disk in ``/dev/disk/by-id`` by its identification, which is the disk's UUID if the VM has
``disk.EnableUUID`` (VADP facts 31). It keeps the device of a disk that was detached until it is deleted (facts 29).
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Callable, Iterator, List, Optional

from ..errors import TransportError

# As udev names links: the page 0x83 identification with its type.
_PREFIXES = ("wwn-0x", "scsi-3")
_POLL_SECONDS = 0.1
_SECTOR_BYTES = 512


def uuid_digits(disk_uuid: Optional[str]) -> Optional[str]:
    """``6000C29e-8a1f-...`` as the 32 lower-case digits that links are named by; None if it is no UUID."""
    digits = re.sub(r"[\s-]", "", disk_uuid or "").lower()
    return digits if re.fullmatch(r"[0-9a-f]{32}", digits) else None


def find_device(device_dir: str, disk_uuid: Optional[str]) -> Optional[str]:
    """The link of the disk with this UUID, or None."""
    digits = uuid_digits(disk_uuid)
    for prefix in _PREFIXES if digits else ():
        link = os.path.join(device_dir, f"{prefix}{digits}")
        if os.path.lexists(link):
            return link
    return None


def wait_for_device(device_dir: str, disk_uuid: Optional[str], timeout: float) -> Optional[str]:
    """The link of a disk that was just attached; None if it does not appear, with its device, in time."""

    def ready() -> Optional[str]:
        link = find_device(device_dir, disk_uuid)
        return link if link is not None and os.path.exists(link) else None

    return _poll(ready, timeout)


def is_dead(link: str) -> bool:
    """Whether the device is left over from a disk that is not attached any more: reading it fails.

    What may not be read by this user is taken for alive.
    """
    try:
        with open(link, "rb", buffering=0) as stream:
            return len(stream.read(_SECTOR_BYTES) or b"") < _SECTOR_BYTES
    except PermissionError:
        return False
    except OSError:
        return True


def delete_device(link: str, sysfs_dir: str, timeout: float) -> bool:
    """Make the kernel forget the device, and wait until its link has gone.

    :returns: whether the link has gone; it stays where the kernel does not know the device.
    :raises TransportError: this user may not do that.
    """
    name = os.path.basename(os.path.realpath(link))
    path = os.path.join(sysfs_dir, "class", "block", name, "device", "delete")
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return not os.path.lexists(link)
    except OSError as error:
        raise TransportError(
            "The device of an attached disk can't be deleted",
            subject=link,
            reason=f"{path}: {error.strerror}",
            remedy="Run as root",
        ) from error
    return _poll(lambda: None if os.path.lexists(link) else "gone", timeout) is not None


def users_of(link: str, sysfs_dir: str, proc_dir: str = "/proc") -> List[str]:
    """Who on this machine uses the device or a partition of it, in words: a mount, swap space, another device."""
    block = Path(sysfs_dir) / "class" / "block"
    name = os.path.basename(os.path.realpath(link))
    parts = sorted(path.parent.name for path in (block / name).glob("*/partition"))
    mounts = _lines(Path(proc_dir) / "self" / "mountinfo")
    swaps = [os.path.realpath(line.split()[0]) for line in _lines(Path(proc_dir) / "swaps")[1:] if line.strip()]
    found = []
    for node in [name, *parts]:
        number = "".join(_lines(block / node / "dev")).strip()
        found += [
            f"{node} is mounted at {line.split()[4]}" for line in mounts if number and line.split()[2:3] == [number]
        ]
        found += [f"{node} is used as swap space" for path in swaps if os.path.basename(path) == node]
        found += [f"{node} is a part of {holder.name}" for holder in _entries(block / node / "holders")]
    return found


def _lines(path: Path) -> List[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except OSError:
        return


def _poll(look: Callable[[], Optional[str]], timeout: float) -> Optional[str]:
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found is not None or time.monotonic() >= deadline:
            return found
        time.sleep(_POLL_SECONDS)
