# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A disk that boots by BIOS: Debian's cloud kernel with a few lines of busybox shell, and a data partition beside it.

The parts lie in build/boot, where tests/setup.sh unpacks them from Debian's packages: ``vmlinuz``, ``modules``,
``busybox``, ``syslinux`` and ``mbr.bin``. The guest says :data:`GREETING` on its serial console and its screen,
answers as qemu's guest agent does where there is such a port, and does nothing else. The initial file system is not
compressed, so the greeting stands as it is in the disk's bytes: a test can change it there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
SECTOR = 512
#: The boot partition lies before this; the rest of the disk is for data.
DATA_AT = 26 * MIB
GREETING = b"openvadp guest is up, generation 1"
PARTS = Path(__file__).resolve().parents[3] / "build" / "boot"

_BOOT_AT = MIB
_INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
for console in /dev/tty0 /dev/ttyS0; do echo "%s" >$console; done
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console; do
    /bin/busybox insmod /modules/$module.ko
done
while :; do
    for port in /dev/vport*p1; do
        while read -r line; do
            number=${line##*:}
            echo "{\\"return\\": ${number%%%%\\}*}}" >&0
        done 2>/dev/null <>$port
    done
    /bin/busybox sleep 0.5
done
"""
# What takes long without hardware virtualisation is left out.
_OPTIONS = "nokaslr mitigations=off tsc=reliable lpj=4000000 no_timer_check nowatchdog cryptomgr.notests nosmp"
_MENU = f"""DEFAULT linux
LABEL linux
 KERNEL vmlinuz
 INITRD initrd
 APPEND console=tty0 console=ttyS0 quiet {_OPTIONS}
"""


def make(image: Path, scratch: Path, run: Callable[..., str]) -> None:
    """Write boot partition and partition table into an empty image, whose rest becomes the second partition.

    :param run: carries out a command.
    """
    size = image.stat().st_size
    boot_sectors = (DATA_AT - _BOOT_AT) // SECTOR
    entries = [(0x80, 0x06, _BOOT_AT // SECTOR, boot_sectors)]
    entries.append((0, 0x83, DATA_AT // SECTOR, (size - DATA_AT) // SECTOR))
    with open(image, "r+b") as disk:
        disk.write((PARTS / "mbr.bin").read_bytes().ljust(440, b"\0"))
        disk.write(struct.pack("<IH", 0x5F0B7A3C, 0))
        for active, kind, start, sectors in entries:
            far = b"\xfe\xff\xff"
            disk.write(struct.pack("<B3sB3sII", active, far, kind, far, start, sectors))
        disk.seek(510)
        disk.write(b"\x55\xaa")
    initrd, menu = scratch / "initrd", scratch / "syslinux.cfg"
    initrd.write_bytes(initial_files(GREETING))
    menu.write_text(_MENU)
    at = f"{image}@@{_BOOT_AT}"
    geometry = ["-T", str(boot_sectors), "-h", "64", "-s", "32", "-c", "4", "-H", str(_BOOT_AT // SECTOR)]
    run(["mformat", "-i", at, *geometry, "-N", "5f0b7a3c", "::"])
    run(["mcopy", "-i", at, str(PARTS / "vmlinuz"), str(initrd), str(menu), "::"])
    run([str(PARTS / "syslinux"), "--offset", str(_BOOT_AT), "--install", str(image)])


def initial_files(greeting: bytes) -> bytes:
    """The initial file system, as a cpio archive."""
    folder, executable = 0o40755, 0o100755
    entries = [(name, folder, b"") for name in ("bin", "dev", "proc", "sys", "modules")]
    entries.append(("dev/console", 0o20600, b""))
    entries.append(("bin/busybox", executable, (PARTS / "busybox").read_bytes()))
    entries += [(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in sorted(PARTS.glob("modules/*.ko"))]
    entries.append(("init", executable, _INIT % greeting))
    archive = b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1))
    return archive + _entry(0, "TRAILER!!!", 0, b"")


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    path = os.fsencode(name) + b"\0"
    device = (5, 1) if name == "dev/console" else (0, 0)
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
