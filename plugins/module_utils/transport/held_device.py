# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The block device of an attached disk, held open and asked itself what it is.

A link, a name and what sysfs remembers tell what was there once: a disk that is attached where the kernel still knows
another one is behind the old name and the old identity. So the device is opened, and INQUIRY page 83 and the capacity
are read from it (proofs 23). As long as it is held open, the kernel gives its name to no other.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
from types import TracebackType
from typing import List, Optional, Type

from ..errors import TransportError
from .guest_device import GuestDisk, names_in_page83, named_disk, read_bytes, uuid_digits

_BLKGETSIZE64 = 0x80081272
_BLKFLSBUF = 0x1261
_SG_IO = 0x2285
_FROM_DEVICE = -3
_ANSWER_BYTES = 252
_SENSE_BYTES = 32
_TIMEOUT_MS = 20_000

_WHAT = "The device is not the disk that was attached"
_REMEDY = "See what else attaches disks to this proxy, and run again"


class _SgIo(ctypes.Structure):
    """``struct sg_io_hdr``."""

    _fields_ = [
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    ]


def inquire(descriptor: int) -> List[str]:
    """The names that the disk behind a block device tells now, by INQUIRY page 83: 32 lower-case digits each.

    :raises OSError: it does not answer.
    """
    command = (ctypes.c_ubyte * 6)(0x12, 1, 0x83, 0, _ANSWER_BYTES, 0)
    answer = (ctypes.c_ubyte * _ANSWER_BYTES)()
    sense = (ctypes.c_ubyte * _SENSE_BYTES)()
    request = _SgIo(
        interface_id=ord("S"),
        dxfer_direction=_FROM_DEVICE,
        cmd_len=len(command),
        mx_sb_len=_SENSE_BYTES,
        dxfer_len=_ANSWER_BYTES,
        dxferp=ctypes.addressof(answer),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=_TIMEOUT_MS,
    )
    fcntl.ioctl(descriptor, _SG_IO, request)
    if request.status or request.host_status or request.driver_status & 0x07:
        told = f"status {request.status}, host {request.host_status}, driver {request.driver_status}"
        raise OSError(f"INQUIRY failed ({told})")
    return names_in_page83(bytes(answer)[: _ANSWER_BYTES - max(0, request.resid)])


def _status(descriptor: int) -> os.stat_result:
    return os.fstat(descriptor)


def is_dead(path: str) -> bool:
    """Whether the device is left over from a disk that is not attached any more: it does not answer.

    A device that this user may not open counts as alive, and so does one that answers as another disk.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        return False
    except OSError:
        return True
    try:
        if stat.S_ISBLK(_status(descriptor).st_mode):
            return not inquire(descriptor)
        return len(os.read(descriptor, 512)) < 512
    except OSError:
        return True
    finally:
        os.close(descriptor)


class HeldDevice:
    """The device of one attached disk, open; what it is was proved when :func:`hold` returned it. Close it.

    :param path: of its node, by the kernel's name.
    """

    def __init__(self, descriptor: int, path: str, guest: GuestDisk, disk_uuid: str, capacity_bytes: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._guest = guest
        self._digits = uuid_digits(disk_uuid)
        self._capacity_bytes = capacity_bytes

    def __enter__(self) -> HeldDevice:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        os.close(self._descriptor)

    def check(self, sysfs_dir: str) -> None:
        """:raises TransportError: it is not, or no longer, the disk with that UUID and that capacity."""
        problem = self._problem(sysfs_dir)
        if problem is not None:
            raise TransportError(_WHAT, subject=self.path, reason=problem, remedy=_REMEDY, retryable=True)

    def _problem(self, sysfs_dir: str) -> Optional[str]:
        facts = _status(self._descriptor)
        try:
            if stat.S_ISBLK(facts.st_mode):
                capacity = struct.unpack("=Q", fcntl.ioctl(self._descriptor, _BLKGETSIZE64, bytes(8)))[0]
                if self._digits not in inquire(self._descriptor):
                    return f"INQUIRY does not name the UUID {self._digits}"
            elif stat.S_ISREG(facts.st_mode):
                # A file in the place of a device can't be asked; what sysfs tells is all there is.
                capacity = facts.st_size
            else:
                return "it is not a block device"
        except OSError as error:
            return f"it does not say what it is: {error.strerror or error}"
        if capacity != self._capacity_bytes:
            return f"it has {capacity} bytes, the disk has {self._capacity_bytes}"
        known = named_disk(sysfs_dir, self._guest.name)
        if known != self._guest:
            return f"what sysfs says of {self._guest.name} has changed: {known} instead of {self._guest}"
        if stat.S_ISBLK(facts.st_mode):
            number = read_bytes(os.path.join(sysfs_dir, "class", "block", self._guest.name, "dev")).strip().decode()
            if number != f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}":
                return f"the node is of device {facts.st_rdev:x}, {self._guest.name} is {number}"
        return None

    def forget_cache(self) -> None:
        """What the kernel may still hold of another disk of that name is not what is read."""
        if not stat.S_ISBLK(_status(self._descriptor).st_mode):
            return
        try:
            fcntl.ioctl(self._descriptor, _BLKFLSBUF)
        except OSError as error:
            raise TransportError(
                "The kernel's cache of the attached disk can't be emptied",
                subject=self.path,
                reason=error.strerror,
                remedy="Run as root",
            ) from error


def hold(path: str, guest: GuestDisk, *, disk_uuid: str, capacity_bytes: int, sysfs_dir: str) -> HeldDevice:
    """Open the device of an attached disk, and prove that it is that one.

    :param path: of its node.
    :param guest: as sysfs had it when it was found.
    :raises TransportError: it is another one, or does not answer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransportError(
            "The device of the attached disk can't be opened",
            subject=path,
            reason=error.strerror,
            remedy="Run as root" if isinstance(error, PermissionError) else _REMEDY,
            retryable=not isinstance(error, PermissionError),
        ) from error
    device = HeldDevice(descriptor, path, guest, disk_uuid, capacity_bytes)
    try:
        device.check(sysfs_dir)
        device.forget_cache()
    except BaseException:
        os.close(descriptor)
        raise
    return device
