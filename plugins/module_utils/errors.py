# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The one family of exceptions of this collection.

A message says what failed, on which object, why, and what to do next. Everything that can go wrong for a reason that
a user can act on is raised as a :class:`VadpError`; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

from typing import Any, Dict, Optional


class VadpError(Exception):
    """Something failed, and the user can be told what to do about it.

    :param what: what failed, as a short sentence without a full stop ("The snapshot was not removed").
    :param subject: the object it failed on ("VM 'app01' (vm-16)").
    :param reason: why, in the words of whoever refused.
    :param remedy: what to do next, as a sentence.
    :param retryable: the same call may succeed later without anybody changing anything.
    :param details: plain data for ``error.details`` of a module's failure; never a secret.
    """

    def __init__(
        self,
        what: str,
        subject: Optional[str] = None,
        reason: Optional[str] = None,
        remedy: Optional[str] = None,
        retryable: bool = False,
        details: Optional[Dict[str, Any]] = None,
    ) -> None:
        self.what = what
        self.subject = subject
        self.reason = reason
        self.remedy = remedy
        self.retryable = retryable
        self.details = details or {}
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what if self.subject is None else f"{self.what}: {self.subject}"
        if self.reason:
            text = f"{text}: {self.reason}"
        text = text.rstrip(". ") + "."
        if self.remedy:
            text = f"{text} {self.remedy.rstrip('. ')}."
        return text

    def to_result(self) -> Dict[str, Any]:
        """The ``error`` value of a failed module."""
        return {
            "kind": type(self).__name__,
            "what": self.what,
            "subject": self.subject,
            "reason": self.reason,
            "remedy": self.remedy,
            "retryable": self.retryable,
            "details": self.details,
        }


class InputError(VadpError):
    """An option makes no sense; nothing was touched."""


class VsphereError(VadpError):
    """vCenter or ESXi refused, or could not be reached.

    ``fault`` is the vSphere fault behind it where there is one (a ``vmodl.MethodFault``).
    """

    fault: Any = None


class ConnectionLostError(VsphereError):
    """The connection broke in the middle of a call: whether it was carried out is not known."""


class AuthenticationError(VsphereError):
    """Wrong user name or password, or a certificate that is not trusted."""


class PrivilegeError(VsphereError):
    """The user lacks a privilege; the message names it."""


class NotFoundError(VsphereError):
    """No such object in the inventory."""


class AmbiguousError(VsphereError):
    """More than one object fits; the message lists them."""


class TaskError(VsphereError):
    """A task failed or did not end in time."""


class TransportError(VadpError):
    """No transport can serve a disk, or the one in use broke."""


class DataPathError(VadpError):
    """Reading, writing or checking bytes failed.

    ``copied`` is what a copy that failed had done before (``datapath.extents.Extents``) where that can be relied on,
    and ``done`` its figures so far (``datapath.copier.CopyResult``).
    """

    copied: Any = None
    done: Any = None


class RepositoryError(VadpError):
    """The repository is not usable, or what it holds is not what was written."""


class LockedError(RepositoryError):
    """Another run holds the VM's lock; the message says who, and since when."""


class DamagedError(RepositoryError):
    """Stored data or metadata differ from what was written."""


class BootError(VadpError):
    """A restore point is as it was written, but did not boot."""


def check_range(option: str, number: Optional[int], low: int, high: int) -> None:
    """:raises InputError: *number* is neither from *low* to *high* nor None (not given)."""
    if number is not None and not low <= number <= high:
        raise InputError(f"The option {option} is out of range", subject=str(number), remedy=f"{low} to {high}")
