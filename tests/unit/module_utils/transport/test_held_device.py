# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is proved of a device before it is read. No SCSI disk is at hand: INQUIRY is answered in the kernel's place."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path
from typing import Any, Callable, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import held_device
from ansible_collections.openvadp.backup.plugins.module_utils.transport.guest_device import named_disk
from ansible_collections.openvadp.backup.plugins.module_utils.transport.held_device import hold, inquire, is_dead

from .test_guest_device import DIGITS, PAGE83, UUID, Machine

CAPACITY = 4096
OTHER = "6000c29e-8a1f-2c9b-6d0e-3f5a7b9c1d2f"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def take(machine: Machine, uuid: str = UUID, capacity: int = CAPACITY) -> Any:
    guest = named_disk(str(machine.sysfs), "sdb")
    assert guest is not None
    return hold(str(machine.dev / "sdb"), guest, disk_uuid=uuid, capacity_bytes=capacity, sysfs_dir=str(machine.sysfs))


def test_the_device_is_held_as_long_as_it_is_the_same(machine: Machine) -> None:
    sysfs = str(machine.sysfs)
    with take(machine) as device:
        assert device.path == str(machine.dev / "sdb")
        device.check(sysfs)
        for path, text in (
            (machine.block / "diskseq", "18\n"),
            (machine.device / "wwid", f"naa.{DIGITS[:-1]}f\n"),
        ):
            before = path.read_text()
            path.write_text(text)
            with pytest.raises(TransportError, match="what sysfs says of sdb has changed"):
                device.check(sysfs)
            path.write_text(before)
        device.check(sysfs)
    with pytest.raises(OSError):
        os.fstat(device._descriptor)


def test_another_size_is_another_disk(machine: Machine) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match="it has 4096 bytes, the disk has 8192"):
        take(machine, capacity=8192)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_device_or_is_gone_is_not_taken(machine: Machine) -> None:
    (machine.dev / "sdb").unlink()
    with pytest.raises(TransportError, match="No such file"):
        take(machine)
    os.mkfifo(machine.dev / "sdb")
    with pytest.raises(TransportError, match="not a block device"):
        take(machine)


def test_what_can_not_be_read_is_dead(machine: Machine) -> None:
    path = str(machine.dev / "sdb")
    assert not is_dead(path)
    (machine.dev / "sdb").write_bytes(b"")
    assert is_dead(path)
    (machine.dev / "sdb").unlink()
    assert is_dead(path)
    # To open a socket's file is ENXIO, as for a disk that is gone.
    os.mknod(machine.dev / "sdb", stat.S_IFSOCK | 0o600)
    assert is_dead(path)


def answering(answer: bytes, status: int = 0, host: int = 0) -> Callable[..., Any]:
    """An ioctl like the kernel's SG_IO."""
    asked: List[bytes] = []

    def ioctl(_descriptor: int, request: int, argument: Any = None) -> Any:
        if request != held_device._SG_IO:
            return (CAPACITY).to_bytes(8, "little") if request == held_device._BLKGETSIZE64 else 0
        asked.append(ctypes.string_at(argument.cmdp, argument.cmd_len))
        assert asked[-1] == bytes([0x12, 1, 0x83, 0, 252, 0]) and argument.interface_id == ord("S")
        ctypes.memmove(argument.dxferp, answer, min(len(answer), argument.dxfer_len))
        argument.resid = argument.dxfer_len - len(answer)
        argument.status, argument.host_status = status, host
        return 0

    return ioctl


def test_inquiry_tells_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctypes.sizeof(held_device._SgIo) == (88 if ctypes.sizeof(ctypes.c_void_p) == 8 else 64)
    monkeypatch.setattr(held_device.fcntl, "ioctl", answering(PAGE83))
    assert inquire(0) == [DIGITS]
    # DID_NO_CONNECT of a disk that was detached; CHECK CONDITION of one without that page.
    for failed in (answering(PAGE83, host=1), answering(PAGE83, status=2)):
        monkeypatch.setattr(held_device.fcntl, "ioctl", failed)
        with pytest.raises(OSError, match="INQUIRY failed"):
            inquire(0)


class _Block:
    """What os.fstat tells of a block device, for a file."""

    st_mode = stat.S_IFBLK | 0o660
    st_rdev = os.makedev(8, 16)


def test_a_block_device_is_asked_itself(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_device, "_status", lambda _descriptor: _Block)
    monkeypatch.setattr(held_device.fcntl, "ioctl", answering(PAGE83))
    take(machine).__exit__(None, None, None)
    assert not is_dead(str(machine.dev / "sdb"))
    # Behind the old name and the old identity is another disk now.
    other = bytes.fromhex(f"0083001401030010{OTHER.replace('-', '')}")
    monkeypatch.setattr(held_device.fcntl, "ioctl", answering(other))
    with pytest.raises(TransportError, match="INQUIRY does not name the UUID"):
        take(machine)
    assert not is_dead(str(machine.dev / "sdb"))
    monkeypatch.setattr(held_device.fcntl, "ioctl", answering(b"", host=1))
    with pytest.raises(TransportError, match="does not say what it is"):
        take(machine)
    assert is_dead(str(machine.dev / "sdb"))
    # A node of another device than the kernel's.
    monkeypatch.setattr(held_device.fcntl, "ioctl", answering(PAGE83))
    (machine.block / "dev").write_text("8:32\n")
    with pytest.raises(TransportError, match="the node is of device"):
        take(machine)


def test_a_block_device_that_is_no_scsi_disk_is_not_taken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own answer: a plain file knows no SG_IO."""
    monkeypatch.setattr(held_device, "_status", lambda _descriptor: _Block)
    with pytest.raises(TransportError, match="does not say what it is"):
        take(machine)
