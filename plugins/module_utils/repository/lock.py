# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One writer for each VM of a repository: a lock that dies with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Optional, Type

from ..datapath import files
from ..errors import LockedError, RepositoryError, check_range
from .shapes import format_time


# Others hold it for moments while they look at the VM; whoever works longer has a run that is busy.
LOCK_TIMEOUT = 60
_POLL_SECONDS = 0.1


def check_lock_timeout(seconds: int) -> int:
    """*seconds* itself, if the lock can be waited for so long. InputError otherwise."""
    check_range("lock_timeout", seconds, 0, 86400)
    return seconds


class VmLock:
    """A context manager that holds a VM's lock. Taking it waits no longer than *timeout* seconds.

    It is a ``flock`` on a file that is never removed (removing it would let two processes hold "the" lock). The
    lock belongs to the open file, so the kernel drops it when the process ends, however it ends; the descriptor is
    close-on-exec, so no child holds it on. Inside the file stands who holds it, for the message of those who come
    too late.
    """

    def __init__(self, path: Path, run_id: str, what: str, timeout: float = 0) -> None:
        self.path = path
        self.run_id = run_id
        self.what = what
        self.timeout = timeout
        self._descriptor: Optional[int] = None

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(str(self.path), flags, 0o644)
        problem = files.kind_problem(os.fstat(descriptor))
        if problem is not None:
            os.close(descriptor)
            raise RepositoryError(
                "The VM's lock can't be used",
                subject=str(self.path),
                reason=problem,
                remedy="Find out who put it there, and remove it",
            )
        return descriptor

    @property
    def held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._descriptor is not None

    def __enter__(self) -> VmLock:
        if self._descriptor is not None:
            raise RuntimeError("this lock is already held by the same object")
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self._take()
            except LockedError:
                if time.monotonic() >= deadline or self._is_hopeless():
                    raise
                time.sleep(_POLL_SECONDS)
                continue
            # Who waited may hold a file that was removed meanwhile.
            if not (self.timeout and self.lost):
                return self
            self._release()

    def _is_hopeless(self) -> bool:
        """Whether it is known that the lock will not be free soon."""
        return False

    def _take(self) -> None:
        """:raises LockedError: somebody holds it now."""
        try:
            descriptor = self._open()
        except OSError as error:
            raise RepositoryError(
                "The VM's lock can't be opened",
                subject=str(self.path),
                reason=error.strerror,
                remedy="The repository must be writable for the user who runs the backup",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._locked(holder) from None
            raise RepositoryError(
                "The VM's lock can't be taken",
                subject=str(self.path),
                reason=error.strerror,
                remedy="The repository's file system must support locks; on NFS the lock service must run",
            ) from None
        try:
            self._write(descriptor, json.dumps(self._holder(), sort_keys=True) + "\n")
        except OSError as error:
            # A full repository must still be lockable: recovery needs the lock to remove what fills it.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                os.close(descriptor)
                raise RepositoryError(
                    "The VM's lock can't be written", subject=str(self.path), reason=error.strerror
                ) from None
        self._descriptor = descriptor

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._release()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Closing drops the lock, whatever the emptying of the file comes to (a full or a vanished file system).
            try:
                self._write(descriptor, "")
            finally:
                os.close(descriptor)

    @property
    def lost(self) -> bool:
        """Whether the file that is locked is no longer the one that others will lock: somebody removed it."""
        if self._descriptor is None:
            return True
        try:
            there, ours = os.stat(str(self.path), follow_symlinks=False), os.fstat(self._descriptor)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def _holder(self) -> Dict[str, Any]:
        return {
            "run_id": self.run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": format_time(datetime.now(timezone.utc)),
            "what": self.what,
        }

    @staticmethod
    def _write(descriptor: int, content: str) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content.encode("utf-8"), 0)

    def _locked(self, holder: Dict[str, Any]) -> LockedError:
        if holder:
            who = "run {run_id} ({what}), process {pid} on {host}, since {since}".format(**holder)
        else:
            who = "a run that has not written its name yet"
        return LockedError(
            "Another run works on this VM",
            subject=str(self.path.parent),
            reason=f"the lock is held by {who}",
            remedy="Wait until it has ended; the lock goes with its process",
            retryable=True,
            details={"holder": holder},
        )


class RepositoryLock(VmLock):
    """The lock of who changes repository.json. It is held for moments, so taking it waits for a while."""

    def __init__(self, path: Path, what: str, timeout: float = 30) -> None:
        super().__init__(path, "", what, timeout)

    def _locked(self, holder: Dict[str, Any]) -> LockedError:
        who = "{what}, process {pid} on {host}, since {since}".format(**holder) if holder else "another process"
        return LockedError(
            "The repository's description is being changed",
            subject=str(self.path.parent),
            reason=f"the lock is held by {who}",
            remedy="Run again; the lock goes with its process",
            retryable=True,
            details={"holder": holder},
        )


def _read_holder(descriptor: int) -> Dict[str, Any]:
    """Who the file says holds the lock; empty while the holder is still writing it."""
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0).decode("utf-8"))
    except (OSError, ValueError):
        return {}
    wanted = ("run_id", "host", "pid", "since", "what")
    return holder if isinstance(holder, dict) and all(name in holder for name in wanted) else {}
