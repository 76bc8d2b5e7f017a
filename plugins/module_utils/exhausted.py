# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the operating system may refuse at any place: memory, threads, files, room.

Who can do something about it handles it there. What nobody has handled becomes an error of ours here. It is not a
defect: the user must know what is exhausted, and a traceback does not say.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Iterator, Optional

from .errors import VadpError

_REMEDIES = {
    errno.ENOSPC: "Make room in its file system",
    errno.EDQUOT: "Make room in its file system, or raise the quota",
    errno.EROFS: "Mount its file system for writing",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or work on fewer disks at a time",
    errno.ENFILE: "The whole machine has too many files open: raise fs.file-max",
    errno.EACCES: "Give the user who runs the module access to it",
    errno.EPERM: "Give the user who runs the module access to it",
    errno.EIO: "Look after the storage: the system's log says what it could not read or write",
    errno.ESTALE: "Mount its file system again",
    errno.ENOTCONN: "Mount its file system again",
    errno.ENAMETOOLONG: "Use shorter names",
    errno.ENODEV: "Look whether the device is still there",
    errno.ETXTBSY: "Try again when it is not in use",
}
_MEMORY = "Raise the limit of memory or address space (ulimit -v), or work on fewer disks at a time (parallel_disks)"


@contextlib.contextmanager
def told_as_errors() -> Iterator[None]:
    """What the system refuses within is raised as a :class:`VadpError`; defects stay what they are."""
    try:
        yield
    except VadpError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        told = as_error(error)
        if told is None:
            raise
        raise told from error


def as_error(error: BaseException) -> Optional[VadpError]:
    """What the system refused, for people; None if it is something else."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return VadpError("There is not enough memory", reason="the system gives this process no more", remedy=_MEMORY)
    if isinstance(error, RuntimeError):
        if "start new thread" not in str(error):
            return None
        reason = "the limit of memory, address space or processes is reached"
        return VadpError("No thread could be started", reason=reason, remedy=f"{_MEMORY}; see also ulimit -u")
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        subject = None if error.filename is None else str(error.filename)
        return VadpError(
            "The system refused something", subject=subject, reason=error.strerror, remedy=_REMEDIES[error.errno]
        )
    return None
