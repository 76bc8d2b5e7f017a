# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A long-running module ends when nobody waits for it any more, and ends in order when it is told to.

Ansible does not end a module whose controller died: nobody would read its result, and it would hold the snapshot and
the VM's lock for hours. So the action plugin gives the module a *lease*: the processes that wait for it (where they run
on this machine), and a file that it removes, or touches again and again (where they don't).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

from .datapath.processes import start_time

LOOK_SECONDS = 0.5
#: So long may the ordinary clean-up take. Then the process is killed: its children die with it (nbdkit within the
#: seconds of its guard), and the next run recovers the rest. All of it together stays below 10 s.
ENDING_SECONDS = 3.0


class Ended(BaseException):
    """The module must end now. No ``VadpError``: whoever handles failures must not handle this."""


def identity(pid: int) -> str:
    """A process of this machine as ``<pid>:<start time>``, which names it for good; ``<pid>:0`` if it is gone."""
    return f"{pid}:{start_time(pid) or 0}"


class Lease:
    """What must be so for the module to go on.

    :param processes: identities (:func:`identity`) of processes that must live.
    :param file: a file that must be there.
    :param seconds: so often at least it must be touched; None: it only has to be there.
    """

    def __init__(
        self, processes: Sequence[str] = (), file: Optional[str] = None, seconds: Optional[float] = None
    ) -> None:
        self.processes = list(processes)
        self.file = file
        self.seconds = seconds
        self._touched: Optional[int] = None
        self._seen = time.monotonic()

    @classmethod
    def from_option(cls, option: Mapping[str, Any]) -> Lease:
        """From the option ``lease`` of a module."""
        return cls(option.get("processes") or (), option.get("file"), option.get("seconds"))

    def lost(self) -> Optional[str]:
        """Why it has ended, or None while it lasts. To be asked often: the file's age is what is seen of it here."""
        for process in self.processes:
            if identity(int(process.partition(":")[0])) != process:
                return f"process {process.partition(':')[0]}, which waited for this module, has ended"
        if self.file is None:
            return None
        try:
            touched: Optional[int] = os.stat(self.file).st_mtime_ns
        except FileNotFoundError:
            return "the task was given up"
        except OSError:
            # A file system that does not answer says nothing about who waits.
            touched = self._touched
        now = time.monotonic()
        if touched != self._touched:
            # The clocks of two machines differ, and a clock may be set: only the change counts.
            self._touched, self._seen = touched, now
        if self.seconds is not None and now - self._seen > self.seconds:
            return f"the controller has not asked for this module for {self.seconds:g} s"
        return None


@contextlib.contextmanager
def ends_in_order(option: Optional[Mapping[str, Any]] = None) -> Iterator[None]:
    """Within it, SIGTERM and the loss of the lease raise :class:`Ended` in the main thread; a second signal kills.

    :param option: the option ``lease``, if the module has it and it is set.
    """
    reasons: List[str] = []

    def on_signal(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Ended(reasons[0] if reasons else "it got the signal SIGTERM")

    before = signal.signal(signal.SIGTERM, on_signal)
    over = threading.Event()
    if option:
        arguments: Dict[str, Any] = dict(lease=Lease.from_option(option), over=over, reasons=reasons)
        threading.Thread(target=_watch, kwargs=arguments, name="lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)


def _watch(lease: Lease, over: threading.Event, reasons: List[str]) -> None:
    while not over.wait(LOOK_SECONDS):
        reason = lease.lost()
        if reason is not None:
            reasons.append(reason)
            os.kill(os.getpid(), signal.SIGTERM)
            if not over.wait(ENDING_SECONDS):
                os.kill(os.getpid(), signal.SIGKILL)
            return
