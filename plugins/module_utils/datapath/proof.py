# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the kernel itself says of a process: which boot and which PID namespace its number belongs to, and whose it is.

A number in a record proves nothing: it may be copied, planted, of another machine or used again (proofs 7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
from contextlib import suppress
from typing import Optional

from .processes import RUN_VARIABLE, start_time

# The same on every architecture that Linux runs VDDK on.
_PIDFD_SEND_SIGNAL = 424
_PIDFD_OPEN = 434


def boot_id() -> str:
    """The id of this machine's present boot: a process id of another boot means nothing."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def pid_namespace() -> str:
    """The PID namespace that this process's numbers belong to, as the kernel names it."""
    return os.readlink("/proc/self/ns/pid")


def machine_id() -> str:
    """What this machine is known by over its boots; only a hint, for images and containers may share it."""
    for path in ("/sys/class/dmi/id/product_uuid", "/etc/machine-id"):
        with suppress(OSError, UnicodeDecodeError), open(path, encoding="ascii") as file:
            text = file.read(200).strip().lower()
            if text:
                return text
    return socket.gethostname()


class NotProved(Exception):
    """The kernel does not say that a process is ours; the message says what it says instead.

    :param certain: it says that it is another's. Else nobody can tell, or not this user.
    """

    def __init__(self, reason: str, certain: bool = False) -> None:
        super().__init__(reason)
        self.certain = certain


class OurProcess:
    """A process that is certainly a child which the run *run_id* started, held by a descriptor that no other process
    can take over. A context manager.

    :raises ProcessLookupError: there is no such process any more.
    :raises NotProved: it is another's, or nobody can tell.
    """

    def __init__(self, pid: int, started: int, run_id: str) -> None:
        self.pid = pid
        try:
            self._descriptor = _syscall(_PIDFD_OPEN, ctypes.c_int(pid), ctypes.c_uint(0))
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL):
                raise ProcessLookupError(error.errno, os.strerror(error.errno)) from None
            raise NotProved(f"the kernel gives no handle of it: {error.strerror}") from None
        try:
            # From here on the number means this very process, or none.
            self._prove(started, run_id)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _prove(self, started: int, run_id: str) -> None:
        if start_time(self.pid) != started or self.ended(0):
            raise ProcessLookupError(errno.ESRCH, "the number belongs to another process")
        try:
            with open(f"/proc/{self.pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except FileNotFoundError:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        except OSError as error:
            raise NotProved(f"its environment can't be read: {error.strerror}") from None
        if f"{RUN_VARIABLE}={run_id}".encode() not in variables:
            raise NotProved("it was not started by that run", certain=True)

    def __enter__(self) -> OurProcess:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._descriptor)

    def send(self, number: int) -> None:
        """Send a signal. :raises OSError: it is refused; a process that has ended is fine."""
        try:
            _syscall(
                _PIDFD_SEND_SIGNAL,
                ctypes.c_int(self._descriptor),
                ctypes.c_int(number),
                ctypes.c_void_p(None),
                ctypes.c_uint(0),
            )
        except ProcessLookupError:
            return

    def ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLIN)
        return bool(waiting.poll(seconds * 1000))

    def end(self, terminate_seconds: float, kill_seconds: float) -> bool:
        """SIGTERM, and SIGKILL where that does not help. :returns: whether it has ended."""
        for number, seconds in ((signal.SIGTERM, terminate_seconds), (signal.SIGKILL, kill_seconds)):
            self.send(number)
            if self.ended(seconds):
                return True
        return False


def _syscall(number: int, *arguments: object) -> int:
    # Python offers these calls from 3.9 on only.
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    result = int(call(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def owner_is_dead(boot: str, namespace: str, pid: int, started: Optional[int]) -> bool:
    """Whether the process that such a record names has certainly ended: only its own boot and namespace can tell."""
    if started is None or boot != boot_id() or namespace != pid_namespace():
        return False
    return start_time(pid) != started
