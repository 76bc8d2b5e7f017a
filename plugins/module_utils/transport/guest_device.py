# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The block device that an attached disk is on this machine: found by the disk's UUID and its address on the bus.

With ``disk.EnableUUID`` the identification of a SCSI disk is the disk's UUID (VADP facts 31). Linux keeps the device of
a disk that was detached until it is deleted (facts 29), and what is attached at the same address then is behind it.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple

from ..errors import TransportError

# As udev names links: the page 0x83 identification with its type.
_PREFIXES = ("wwn-0x", "scsi-3")
_POLL_SECONDS = 0.1
_OTHER_KINDS = re.compile(r"(loop|ram|zram|dm-|md|sr|fd|nbd)\d")
_NAA = 3
_EXTENDED = 6  # of the NAA formats the one with 16 bytes


@dataclass(frozen=True)
class GuestDisk:
    """A SCSI disk as this machine's kernel knows it.

    :param name: the kernel's, ``sdb``.
    :param address: (host, channel, target, LUN).
    :param digits: the UUID that it told when it was found; None if it told none.
    :param virtual: VMware emulates it.
    :param sequence: no two devices of a boot have the same; None where the kernel is too old.
    """

    name: str
    address: Tuple[int, int, int, int]
    digits: Optional[str]
    virtual: bool
    sequence: Optional[str]

    @property
    def unit(self) -> Optional[int]:
        """Its unit, if it is on a parallel controller (PVSCSI, LSI Logic, BusLogic): that is the target."""
        return self.address[2] if self.address[1] == 0 and self.address[3] == 0 else None


def guest_disks(sysfs_dir: str) -> List[GuestDisk]:
    """The SCSI disks that the kernel knows, by name."""
    found = [named_disk(sysfs_dir, path.name) for path in _entries(Path(sysfs_dir) / "class" / "block")]
    return [disk for disk in found if disk is not None]


def named_disk(sysfs_dir: str, name: str) -> Optional[GuestDisk]:
    """One SCSI disk as sysfs has it now; None if there is none of that name."""
    folder = os.path.join(sysfs_dir, "class", "block", name)
    device = os.path.join(folder, "device")
    address = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", os.path.basename(os.path.realpath(device)))
    if address is None or _OTHER_KINDS.match(name) or os.path.exists(os.path.join(folder, "partition")):
        return None
    host, channel, target, lun = (int(part) for part in address.groups())
    names = names_in_page83(read_bytes(os.path.join(device, "vpd_pg83")))
    wwid = re.fullmatch(rb"naa\.([0-9a-f]{32})", read_bytes(os.path.join(device, "wwid")).strip().lower())
    if wwid is not None and wwid.group(1).decode() not in names:
        names.append(wwid.group(1).decode())
    return GuestDisk(
        name=name,
        address=(host, channel, target, lun),
        digits=names[0] if len(names) == 1 else None,
        virtual=read_bytes(os.path.join(device, "vendor")).startswith(b"VMware"),
        sequence=read_bytes(os.path.join(folder, "diskseq")).strip().decode("ascii", "replace") or None,
    )


def names_in_page83(page: bytes) -> List[str]:
    """The NAA names of 16 bytes that a device identification page gives to the logical unit; garbage has none."""
    names: List[str] = []
    if len(page) < 4 or page[1] != 0x83:
        return names
    rest = page[4 : 4 + int.from_bytes(page[2:4], "big")]
    while len(rest) >= 4 and len(rest) >= 4 + rest[3]:
        value = rest[4 : 4 + rest[3]]
        of_unit, kind = rest[1] >> 4 & 3 == 0, rest[1] & 15
        if of_unit and kind == _NAA and len(value) == 16 and value[0] >> 4 == _EXTENDED and value.hex() not in names:
            names.append(value.hex())
        rest = rest[4 + rest[3] :]
    return names


def node_of(name: str, device_dir: str) -> Optional[str]:
    """The node of a device that the kernel calls *name*: where links of *device_dir* lead to, else in /dev."""
    for link in _entries(Path(device_dir)):
        path = os.path.realpath(str(link))
        if os.path.basename(path) == name:
            return path
    path = os.path.join("/dev", name)
    return path if os.path.exists(path) else None


def read_bytes(path: str) -> bytes:
    """A file of sysfs, nothing where it is not there."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def uuid_digits(disk_uuid: Optional[str]) -> Optional[str]:
    """``6000C29e-8a1f-...`` as the 32 lower-case digits that links are named by; None if it is not a UUID."""
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


def delete_device(name: str, sysfs_dir: str, timeout: float) -> bool:
    """Make the kernel forget the device, and wait until it has.

    :param name: the kernel's.
    :returns: whether it is gone.
    :raises TransportError: this user may not do that.
    """
    before = named_disk(sysfs_dir, name)
    path = os.path.join(sysfs_dir, "class", "block", name, "device", "delete")
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return before is None or named_disk(sysfs_dir, name) != before
    except OSError as error:
        raise TransportError(
            "The device of an attached disk can't be deleted",
            subject=name,
            reason=f"{path}: {error.strerror}",
            remedy="Run as root",
        ) from error
    return wait_for(lambda: "gone" if named_disk(sysfs_dir, name) != before else None, timeout) is not None


def users_of(name: str, sysfs_dir: str, proc_dir: str = "/proc") -> List[str]:
    """Who on this machine uses the device or a partition of it, in words: a mount, swap space, another device."""
    block = Path(sysfs_dir) / "class" / "block"
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


def wait_for(look: Callable[[], Optional[str]], timeout: float) -> Optional[str]:
    """What *look* finds within *timeout* seconds, or None."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found is not None or time.monotonic() >= deadline:
            return found
        time.sleep(_POLL_SECONDS)
