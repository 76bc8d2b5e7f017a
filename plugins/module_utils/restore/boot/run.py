# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The proof by boot: a restore point is started in qemu, without a network, and shows that it works.

The guest writes to overlays over the point's layers. They are files without a name, held open by us and by qemu: when
both have ended, however that was, they are gone. qemu dies with us, its sockets lie in a private folder that the next
boot of the machine clears up. The guest is taken for hostile: qemu runs under its seccomp filter, with limits for
memory and for what it writes, until the time is over.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple

from ...datapath import files
from ...datapath.image import create_overlay, overlay_opts
from ...datapath.processes import Child, RuntimeDir, require_program
from ...errors import BootError, DataPathError, InputError, RepositoryError, check_range
from ...named import FOLDER, path_problem
from ...repository.layout import Repository
from ...repository.store import VmStore
from ...repository.report import verify
from ...repository.runs import new_run_id
from ...repository.saved import read_configuration
from ...repository.verify import STRUCTURE
from .accelerator import ACCELERATORS, AUTO, KVM, Probe
from .channels import Agent, Console, Qmp
from .machine import EFI, BootDisk, Machine, design, firmware_of
from .screen import Screen, Steady, read_ppm

BOOT = "boot"
PROGRAM = "qemu-system-x86_64"

SERIAL = "serial"
AGENT = "agent"
SCREEN = "screen"

#: What firmware and kernels say when they give up. Looked for on the serial console and on the BIOS' own port.
FAILURES = (
    r"No bootable device|No bootable option or device was found|UEFI Interactive Shell|Kernel panic - not syncing"
    r"|Entering emergency mode|You are in emergency mode"
)
#: OVMF's code and its variables, as distributions install them.
FIRMWARES = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)

_SCREEN_SECONDS = 30
_LOOK_SECONDS = 0.5
_START_SECONDS = 60.0
_MIB = 1 << 20
# qemu itself, its translated code, the stacks of its threads.
_QEMU_BYTES = 6 << 30


@dataclass(frozen=True)
class BootRequest:
    """The options of ``restore_point_verify`` at level boot."""

    repository: str
    vm_uuid: Optional[str] = None
    vm_name: Optional[str] = None
    point: str = "latest"
    boot_pattern: Optional[str] = None
    boot_agent: bool = False
    boot_screen_seconds: Optional[int] = None
    boot_timeout: int = 600
    boot_memory: int = 2048
    boot_cpus: int = 2
    boot_accelerator: str = AUTO
    boot_overlay_dir: str = "/var/tmp"
    boot_overlay_limit: int = 8192

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> BootRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        request = cls(**{name: params[name] for name in cls.__dataclass_fields__})
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: an option makes no sense; nothing was touched."""
        check_range("boot_timeout", self.boot_timeout, 1, 86400)
        check_range("boot_screen_seconds", self.boot_screen_seconds, 1, 86400)
        check_range("boot_memory", self.boot_memory, 128, 1 << 20)
        check_range("boot_cpus", self.boot_cpus, 1, 64)
        check_range("boot_overlay_limit", self.boot_overlay_limit, 16, 1 << 30)
        if self.boot_accelerator not in ACCELERATORS:
            raise InputError("There is no such accelerator", subject=self.boot_accelerator)
        if self.boot_pattern is not None:
            try:
                matches_nothing = re.compile(self.boot_pattern).match("") is not None
            except (re.error, RecursionError, OverflowError) as error:
                raise InputError(
                    "The option boot_pattern is not a regular expression", subject=self.boot_pattern, reason=str(error)
                ) from None
            if matches_nothing:
                raise InputError(
                    "The option boot_pattern proves nothing",
                    subject=repr(self.boot_pattern),
                    reason="it matches a console that says nothing",
                    remedy="Give words that only a guest that has booted prints, such as 'login:'",
                )
        if not os.path.isabs(self.boot_overlay_dir):
            raise InputError("The option boot_overlay_dir is not an absolute path", subject=self.boot_overlay_dir)

    @property
    def steady_seconds(self) -> Optional[int]:
        """How long the screen must stay as it is; None if that proves nothing."""
        if self.boot_screen_seconds is None and self.boot_pattern is None and not self.boot_agent:
            return _SCREEN_SECONDS
        return self.boot_screen_seconds


@dataclass
class Outcome:
    """What became of a guest. ``by`` is what proved it (serial, agent or screen), None if nothing did."""

    by: Optional[str]
    reason: str
    seconds: float
    resets: int
    screen: Optional[Screen] = None
    serial_log: bytes = b""


@dataclass
class _Plan:
    """A machine, and the overlays that it opens by their descriptors."""

    machine: Machine
    descriptors: List[int] = field(default_factory=list)


def verify_by_boot(request: BootRequest, check_mode: bool) -> Dict[str, Any]:
    """Check a point as level structure does, then boot it.

    :param check_mode: the point is checked, and what would be booted is reported.
    :returns: as :func:`..repository.report.verify`, with ``boot``; None there if the point was not fit to be booted.
    """
    repository = Repository.open(request.repository)
    store = repository.find_vm(vm_uuid=request.vm_uuid, vm_name=request.vm_name)
    program = require_program(PROGRAM)
    require_program("prlimit")
    problem = path_problem(request.boot_overlay_dir, FOLDER, write=True)
    if problem is not None:
        raise InputError(
            "No overlay can be made there",
            subject=request.boot_overlay_dir,
            reason=problem,
            remedy="Name another boot_overlay_dir",
        )
    with ExitStack() as stack:
        if not check_mode:
            stack.enter_context(store.boot_lock(new_run_id()))
            _clear_leftovers(store)
        run_dir = stack.enter_context(RuntimeDir(store.boot_name))
        probe = Probe(request.boot_accelerator, program, run_dir.path)
        stack.callback(probe.stop)
        # It may have to wait for an answer that never comes; reading the point takes a while as well.
        probe.start()
        result = verify(store, request.point, STRUCTURE)
        result.update(level=BOOT, boot=None)
        if not result["ok"]:
            return result
        plan = stack.enter_context(_planned(store, result["point"], request, run_dir.path))
        accelerator, why = probe.result()
        result["boot"] = _not_yet(plan.machine, accelerator, why)
        if not check_mode:
            _note(store, result, _boot(program, plan, accelerator, request, run_dir.path))
    return result


def _clear_leftovers(store: VmStore) -> None:
    """What a boot that was killed left."""
    RuntimeDir.leftovers(store.boot_name, remove=True)
    for path in store.boot_part_files():
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _not_yet(machine: Machine, accelerator: str, why: str) -> Dict[str, Any]:
    """``boot`` of the result before anything is started."""
    return {
        "booted": None,
        "by": None,
        "reason": "check mode: it would be booted",
        "accelerator": accelerator,
        "accelerator_reason": why,
        "firmware": machine.firmware,
        "memory_mb": machine.memory_mb,
        "cpus": machine.cpus,
        "disks": [{"key": key, "bus": bus} for key, bus in machine.buses.items()],
        "notes": machine.notes,
        "resets": 0,
        "seconds": 0.0,
        "screenshot": None,
        "serial_log": None,
    }


def _note(store: VmStore, result: Dict[str, Any], outcome: Outcome) -> None:
    """Keep the evidence, and complete the result."""
    screenshot = None if outcome.screen is None else outcome.screen.png()
    store.keep_evidence(result["point"], screenshot, outcome.serial_log)
    result["boot"].update(
        booted=outcome.by is not None,
        by=outcome.by,
        reason=outcome.reason,
        resets=outcome.resets,
        seconds=round(outcome.seconds, 3),
        screenshot=None if screenshot is None else str(store.screenshot_path(result["point"])),
        serial_log=str(store.serial_log_path(result["point"])),
    )
    if outcome.by is None:
        result["ok"] = False
        result["problems"] = [*result["problems"], f"it did not boot: {outcome.reason}"]


def not_booted(result: Dict[str, Any]) -> BootError:
    """The error that a result of :func:`verify_by_boot` stands for, if the point was sound and did not boot."""
    boot = result["boot"]
    shown = " and ".join(str(boot[name]) for name in ("screenshot", "serial_log") if boot[name])
    return BootError(
        "The restore point did not boot",
        subject=f"{result['point']} of VM {result['vm_name']} ({result['vm_uuid']})",
        reason=boot["reason"],
        remedy=f"Its files are as they were written. See {shown} for what the guest has shown",
        details={"accelerator": boot["accelerator"], "notes": boot["notes"]},
    )


# The machine


@contextlib.contextmanager
def _planned(store: VmStore, point: str, request: BootRequest, folder: str) -> Iterator[_Plan]:
    """The machine of a point, with overlays that are there until this is left."""
    manifest = store.point(point)
    saved = read_configuration(store.config_path(point))
    if manifest is None:
        raise RepositoryError("The restore point has gone meanwhile", subject=f"{point} of {store.shown}")
    descriptors: List[int] = []
    try:
        disks = []
        for disk in manifest["disks"]:
            descriptors.append(files.nameless(request.boot_overlay_dir, "openvadp-boot-"))
            create_overlay(f"/proc/{os.getpid()}/fd/{descriptors[-1]}", disk["capacity_bytes"])
            layer = str(store.layer_path(disk["key"], point))
            options = overlay_opts(layer, f"/proc/self/fd/{descriptors[-1]}", bounded=False)
            disks.append(BootDisk(disk["key"], disk["label"], f"{options},cache.no-flush=on,discard=unmap"))
        firmware = _efi_firmware(folder) if firmware_of(saved) == EFI else None
        machine = design(saved, disks, memory_mb=request.boot_memory, cpus=request.boot_cpus, firmware=firmware)
        yield _Plan(machine, descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _efi_firmware(folder: str) -> Tuple[str, str]:
    """OVMF's code, and a fresh copy of its variables: the saved NVRAM is VMware's own, and means nothing to it."""
    for code, variables in FIRMWARES:
        if os.access(code, os.R_OK) and os.access(variables, os.R_OK):
            copy = os.path.join(folder, "variables.fd")
            shutil.copyfile(variables, copy)
            return code, copy
    raise DataPathError(
        "A firmware is not installed",
        subject="OVMF",
        reason="the machine boots by EFI",
        remedy="Install the package ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL)",
    )


def command_line(program: str, machine: Machine, accelerator: str, request: BootRequest, folder: str) -> List[str]:
    """All of qemu's command line. The machine does not run before it is told to: nothing it says is lost."""
    command = ["prlimit", "--core=0", f"--fsize={request.boot_overlay_limit * _MIB}"]
    command += [f"--as={machine.memory_mb * _MIB + _QEMU_BYTES}", program]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", accelerator]
    command += ["-cpu", "host" if accelerator == KVM else "max"]
    command += machine.arguments
    command += ["-chardev", _socket("qmp", folder), "-mon", "chardev=qmp,mode=control"]
    command += ["-chardev", _socket("serial", folder), "-serial", "chardev:serial"]
    command += ["-chardev", _socket("firmware", folder), "-device", "isa-debugcon,iobase=0x402,chardev=firmware"]
    if request.boot_agent:
        command += ["-device", "virtio-serial-pci", "-chardev", _socket("agent", folder)]
        command += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    command += ["-device", "pvpanic", "-action", "panic=pause,shutdown=pause"]
    command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    return command


def _socket(name: str, folder: str) -> str:
    return f"socket,id={name},path={_socket_path(name, folder)},server=on,wait=off"


def _socket_path(name: str, folder: str) -> str:
    return os.path.join(folder, f"{name}.sock")


# The guest


def _boot(program: str, plan: _Plan, accelerator: str, request: BootRequest, folder: str) -> Outcome:
    """Run the machine until it has shown that it works, or that it does not, or the time is over."""
    command = command_line(program, plan.machine, accelerator, request, folder)
    log_path = os.path.join(folder, "qemu.log")
    child = Child.start(command, log_path=log_path, name=PROGRAM, pass_fds=plan.descriptors)
    with ExitStack() as stack:
        stack.callback(child.stop, 2.0)
        child.wait_for_socket(_socket_path("qmp", folder), _START_SECONDS)
        qmp = stack.enter_context(contextlib.closing(Qmp(_socket_path("qmp", folder))))
        serial = stack.enter_context(
            contextlib.closing(Console(_socket_path("serial", folder), request.boot_pattern, FAILURES))
        )
        firmware = stack.enter_context(contextlib.closing(Console(_socket_path("firmware", folder), None, FAILURES)))
        agent = None
        if request.boot_agent:
            agent = stack.enter_context(contextlib.closing(Agent(_socket_path("agent", folder))))
        return _Guest(child, qmp, serial, firmware, agent, request, os.path.join(folder, "screen.ppm")).run()


class _Guest:
    """A guest that is watched."""

    def __init__(
        self,
        child: Child,
        qmp: Qmp,
        serial: Console,
        firmware: Console,
        agent: Optional[Agent],
        request: BootRequest,
        picture: str,
    ) -> None:
        self._child = child
        self._qmp = qmp
        self._serial = serial
        self._firmware = firmware
        self._agent = agent
        self._request = request
        self._picture = picture
        seconds = request.steady_seconds
        self._steady = None if seconds is None else Steady(seconds)
        self._was_steady = False
        self._resets = 0

    def run(self) -> Outcome:
        """Let it run."""
        begun = time.monotonic()
        self._qmp.beside = [self._serial, self._firmware, *([] if self._agent is None else [self._agent])]
        self._qmp.command("cont")
        next_look = begun
        while True:
            now = time.monotonic()
            by, reason = self._proof()
            if by is None:
                reason = self._failure() or reason
            if by is None and not reason and now - begun >= self._request.boot_timeout:
                reason = f"it has not shown that it works within {self._request.boot_timeout} s ({self._awaited()})"
            if reason:
                break
            if self._steady is not None and now >= next_look:
                next_look = now + _LOOK_SECONDS
                self._was_steady = self._steady.look(self._look(), now)
            if self._agent is not None:
                self._agent.ask(now)
            self._qmp.read(_LOOK_SECONDS / 2)
        seconds = time.monotonic() - begun
        with contextlib.suppress(DataPathError):
            return Outcome(by, reason, seconds, self._resets, self._look(), self._heard())
        return Outcome(by, reason, seconds, self._resets, None, self._heard())

    def _proof(self) -> Tuple[Optional[str], str]:
        if self._serial.watcher.found is not None:
            return SERIAL, f"its serial console says {self._serial.watcher.found!r}"
        if self._agent is not None and self._agent.answered:
            return AGENT, "its guest agent has answered"
        if self._was_steady:
            return SCREEN, f"its screen has shown the same for {self._request.steady_seconds} s"
        return None, ""

    def _failure(self) -> str:
        events, self._qmp.events = self._qmp.events, []
        for event in events:
            if event == "RESET":
                self._resets += 1
                if self._steady is not None:
                    self._steady.reset()
            elif event == "GUEST_PANICKED":
                return "its kernel panicked"
            elif event == "SHUTDOWN":
                return "it switched itself off"
            elif event == "BLOCK_IO_ERROR":
                limit, folder = self._request.boot_overlay_limit, self._request.boot_overlay_dir
                return f"a disk failed: it wrote more than boot_overlay_limit ({limit} MiB), or {folder} is full"
        for console in (self._firmware, self._serial):
            if console.failures.found is not None:
                return f"it says {console.failures.found!r}"
        if not self._qmp.open:
            self._child.wait(_LOOK_SECONDS)
            words = self._child.log_tail(2) or f"status {self._child.returncode}"
            return f"qemu ended: {words}"
        return ""

    def _awaited(self) -> str:
        wanted = []
        if self._request.boot_pattern is not None:
            said = self._serial.log.total
            wanted.append(f"{self._request.boot_pattern!r} on its serial console, which has said {said} bytes")
        if self._agent is not None:
            wanted.append("an answer of its guest agent")
        if self._steady is not None:
            wanted.append(f"a screen that stays the same for {self._request.steady_seconds} s and is not blank")
        return "awaited: " + ", or ".join(wanted)

    def _look(self) -> Screen:
        self._qmp.command("screendump", filename=self._picture)
        return read_ppm(self._picture)

    def _heard(self) -> bytes:
        self._serial.drain()
        return self._serial.log.content()
