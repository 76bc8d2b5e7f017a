# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vSphere faults as messages: what was refused, its class and words, the missing privilege, what to do next."""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional, Type

from ..errors import AuthenticationError, NotFoundError, PrivilegeError, VsphereError
from ..libraries import vim, vmodl

_REMEDIES = {
    "TaskInProgress": "Another task works on the object; run again when it has ended",
    "InvalidState": "The object is busy or in the wrong state (a vMotion, another task); run again when that is over",
    "InvalidPowerState": "Bring the virtual machine into the power state that the message asks for",
    "QuestionPending": "Answer the virtual machine's pending question in the vSphere client",
    "FileLocked": "A disk is open elsewhere, perhaps attached to a backup proxy: detach it there",
    "ApplicationQuiesceFault": "Look at VMware Tools and the VSS writers in the guest, or use quiesce: preferred",
    "FilesystemQuiesceFault": "Look at VMware Tools and the load in the guest, or use quiesce: preferred",
    "ToolsUnavailable": "Install and start VMware Tools in the guest",
    "NoDiskSpace": "Free space on the datastore",
    "RestrictedVersion": "The licence of this ESXi host does not permit it; a free licence is not enough",
    "RestrictedByAdministrator": "An administrator of vCenter has disabled the operation on this object",
    "MethodDisabled": "vCenter has disabled the operation on this object, perhaps for another backup product",
    "HostNotConnected": "The host is not connected to vCenter; look at it in the vSphere client",
    "HostNotReachable": "The host does not answer vCenter; look at it in the vSphere client",
    "MethodNotFound": "The server does not offer this operation; look at its version",
}


def fault_name(fault: Any) -> str:
    """The class of a fault, such as ``vim.fault.TaskInProgress``."""
    return type(fault).__name__.replace("pyVmomi.VmomiSupport.", "")


def fault_text(fault: Any) -> str:
    """The words and the class of a ``vmodl.MethodFault`` in one line."""
    words = [getattr(fault, "msg", None)]
    words.extend(getattr(message, "message", None) for message in getattr(fault, "faultMessage", None) or [])
    name = getattr(fault, "name", None)
    if isinstance(name, str):
        words.append(name)
    file_name = getattr(fault, "file", None)
    if isinstance(file_name, str):
        words.append(file_name)
    said: List[str] = []
    for word in words:
        text = " ".join(str(word).split()) if word else ""
        if text and not any(text in earlier for earlier in said):
            said.append(text)
    short = fault_name(fault).rsplit(".", 1)[-1]
    return f"{'; '.join(said).rstrip('. ')} ({short})" if said else short


def missing_privileges(fault: Any) -> Dict[str, str]:
    """The privileges that a ``NoPermission`` names: privilege -> moid of the object it lacks on."""
    missing: Dict[str, str] = {}
    if getattr(fault, "privilegeId", None):
        missing[fault.privilegeId] = moid_of(getattr(fault, "object", None))
    for entity in getattr(fault, "missingPrivileges", None) or []:
        for privilege in getattr(entity, "privilegeIds", None) or []:
            missing[privilege] = moid_of(getattr(entity, "entity", None))
    return missing


def moid_of(obj: Any) -> str:
    """The managed object id, or an empty string."""
    return obj._moId if obj is not None else ""


def is_not_authenticated(fault: Any) -> bool:
    return isinstance(fault, vim.fault.NotAuthenticated)


def is_busy(fault: Any) -> bool:
    """Whether the same call works once another task or a vMotion is over (VADP facts 17).

    A subclass of ``InvalidState`` says that something is wrong by itself (``InvalidPowerState``), so only the class
    itself counts.
    """
    waits = isinstance(fault, (vim.fault.TaskInProgress, vim.fault.ConcurrentAccess))
    return waits or (fault is not None and fault_name(fault) == "vim.fault.InvalidState")


def is_locked(fault: Any) -> bool:
    """Whether a file was in use, which passes when whoever reads it is done (VADP facts 15)."""
    return isinstance(fault, vim.fault.FileLocked) or bool(re.search(r"\block(ed)?\b", fault_text(fault).lower()))


def to_error(
    fault: Any, what: str, subject: Optional[str] = None, kind: Optional[Type[VsphereError]] = None
) -> VsphereError:
    """A fault as the exception to raise.

    :param kind: the class to use where the fault does not ask for one of its own (privilege, login, not found).
    """
    name = fault_name(fault)
    short = name.rsplit(".", 1)[-1]
    details: Dict[str, Any] = {"fault": name}
    remedy = _REMEDIES.get(short)
    reason = fault_text(fault)
    chosen: Type[VsphereError] = kind or VsphereError
    if is_not_authenticated(fault):
        chosen = AuthenticationError
        remedy = "The session ended and could not be renewed; look at the user's rights and vCenter's session limits"
    elif isinstance(fault, vim.fault.NoPermission):
        chosen = PrivilegeError
        missing = missing_privileges(fault)
        details["privileges"] = missing
        names = ", ".join(
            f"{privilege} on {moid}" if moid else privilege for privilege, moid in sorted(missing.items())
        )
        reason = f"the user lacks the privilege {names}" if names else reason
        remedy = "Give the user's role that privilege on the object, its folder or its datacenter"
    elif isinstance(fault, vim.fault.InvalidLogin):
        chosen = AuthenticationError
        remedy = "Check username and password"
    elif isinstance(fault, vmodl.fault.ManagedObjectNotFound):
        chosen = kind or NotFoundError
        details["moid"] = moid_of(getattr(fault, "obj", None))
        reason = f"{details['moid'] or 'the object'} no longer exists ({short})"
        remedy = "It was removed meanwhile; look the object up again"
    error = chosen(what, subject=subject, reason=reason, remedy=remedy, retryable=is_busy(fault), details=details)
    error.fault = fault
    return error
