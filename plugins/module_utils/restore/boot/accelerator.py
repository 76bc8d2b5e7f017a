# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether KVM works here. That /dev/kvm can be opened proves nothing: on some machines a guest hangs after its BIOS.

So a guest of 94 bytes is booted, which goes to protected mode, returns from an interrupt and answers by ending qemu
with a status of its own. If it has not after some seconds, there is no KVM here. Software (TCG) does it then.
"""

from __future__ import annotations

import os
from typing import List, Optional, Tuple

from ...datapath.processes import Child
from ...errors import InputError

AUTO = "auto"
KVM = "kvm"
TCG = "tcg"
ACCELERATORS = (AUTO, KVM, TCG)

DEVICE = "/dev/kvm"
PROBE_SECONDS = 2.0

# cli; ax, ds = 0; lgdt; protected mode; flat segments; iret to the next instruction; out 0x10 to port 0xf4; hlt.
_GUEST = bytes.fromhex(
    "fa31c08ed8660f0116587c0f20c00c010f22c066ea1b7c0000080066b810008ed88ed0bc007000009c6a0868317c0000"
    "cf66baf400b010eef4ebfd8d742600900000000000000000ffff0000009acf00ffff00000092cf001700407c0000"
)
# What isa-debug-exit makes of 0x10: no status that qemu has of its own.
_ANSWER = 0x10 << 1 | 1


def guest() -> bytes:
    """The probe's disk: one boot sector."""
    return _GUEST.ljust(510, b"\0") + b"\x55\xaa"


def probe_arguments(accelerator: str, path: str) -> List[str]:
    """The arguments of qemu that boot the probe from *path*."""
    machine = ["-accel", accelerator, "-machine", "pc,usb=off", "-m", "16", "-nodefaults", "-no-user-config"]
    machine += ["-display", "none", "-nic", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
    quoted = path.replace(",", ",,")
    return machine + ["-drive", f"if=ide,format=raw,file={quoted}"]


def obstacle(device: str = DEVICE) -> Optional[str]:
    """Why KVM can't even be tried; None if it can."""
    if not os.path.exists(device):
        return f"there is no {device}"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"user id {os.geteuid()} may not open {device}"
    return None


def judge(status: Optional[int], seconds: float, words: str) -> Optional[str]:
    """Why the probe says that KVM does not work; None if it does.

    :param status: qemu's, None if it did not end.
    :param words: its log's last words.
    """
    if status == _ANSWER:
        return None
    if status is None:
        return f"a small guest did not answer within {seconds:g} s"
    return f"a small guest ended with status {status}" + (f": {words}" if words else "")


class Probe:
    """The probe of KVM, which runs beside other work: :meth:`start`, then :meth:`result`, in one thread."""

    def __init__(self, wanted: str, program: str, folder: str) -> None:
        self.wanted = wanted
        self._program = program
        self._folder = folder
        self._child: Optional[Child] = None
        self._problem: Optional[str] = None

    def start(self) -> None:
        """Begin, if it must be known at all."""
        if self.wanted == TCG:
            return
        self._problem = obstacle()
        if self._problem is None:
            path = os.path.join(self._folder, "probe.img")
            with open(path, "wb") as image:
                image.write(guest())
            command = [self._program, *probe_arguments(KVM, path)]
            self._child = Child.start(command, log_path=os.path.join(self._folder, "probe.log"), name="KVM's probe")

    def result(self) -> Tuple[str, str]:
        """The accelerator, and why.

        :raises InputError: KVM was asked for and does not work.
        """
        if self.wanted == TCG:
            return TCG, "boot_accelerator says so"
        problem = self._problem
        if self._child is not None:
            status = self._child.wait(PROBE_SECONDS)
            self.stop()
            problem = judge(status, PROBE_SECONDS, "" if status is None else self._words)
        if problem is None:
            return KVM, "a small guest has answered"
        if self.wanted == KVM:
            raise InputError(
                "KVM does not work here",
                subject=DEVICE,
                reason=problem,
                remedy="Set boot_accelerator to auto, or use a machine with hardware virtualisation",
            )
        return TCG, f"no KVM: {problem}"

    def stop(self) -> None:
        """End it, if it still runs."""
        if self._child is not None:
            self._words = self._child.log_tail(2)
            self._child.stop(0.2)
            self._child = None

    _words = ""
