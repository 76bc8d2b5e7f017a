# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VDDK's access calls around a backup: Storage vMotion leaves the disks where they are while they are read.

A run that prepares says so in its record before it does, and ends it when its snapshot is gone; what a crash left, the
next recovery ends (VADP facts 30, 43). That a machine can't be prepared is no reason not to back it up.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..errors import TransportError, VadpError
from ..repository.runs import Run
from ..transport.access import IDENTITY, AccessResult, check_identity, run_access
from ..transport.planner import BY_VDDK
from ..transport.vddk import Vddk, find_library, look_for_library
from ..vsphere.inventory import VmRef, find_vm, vm_selection
from ..vsphere.session import Connection, Session

PREPARED, ENDED, CLEANED = "prepared", "ended", "cleaned"
STATES = (PREPARED, ENDED, CLEANED)
_OPERATIONS = {PREPARED: "prepare", ENDED: "end", CLEANED: "cleanup"}

# What vCenter disables while a machine is prepared.
_METHOD = "RelocateVM_Task"

_VM_NOT_FOUND = 4000


@dataclass(frozen=True)
class AccessRequest:
    """The options of ``vadp_access``."""

    connection: Connection
    vm: Mapping[str, Any]
    state: str = PREPARED
    identity: str = IDENTITY
    vddk_libdir: Optional[str] = None

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> AccessRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        return cls(
            connection=Connection.from_params(params),
            vm=vm_selection(params),
            state=params["state"],
            identity=check_identity(params["identity"]),
            vddk_libdir=params["vddk_libdir"],
        )


def access_vm(request: AccessRequest, check_mode: bool) -> Dict[str, Any]:
    """The whole of ``vadp_access``: {changed, identity, storage_vmotion_disabled, left_over}.

    :raises VadpError: the call can't be made, or failed.
    """
    with Session.connect(request.connection) as session:
        vm = find_vm(session, **request.vm)
        before = _disabled(session, vm)
        result, after = AccessResult(), before
        if check_mode:
            after = {PREPARED: True, ENDED: False, CLEANED: before}[request.state]
        else:
            vddk = find_library(request.vddk_libdir)
            result = run_access(_OPERATIONS[request.state], session, vm, vddk, request.identity)
            after = _disabled(session, vm)
    warnings = []
    if request.state == ENDED and after:
        warnings.append(f"Storage vMotion of {vm} is still disabled: another identity holds it off.")
    if result.remaining:
        warnings.append(f"VDDK could not clean up {result.remaining} attachments of killed processes.")
    return {
        "changed": after != before or result.cleaned > 0,
        "identity": request.identity,
        "storage_vmotion_disabled": after,
        "left_over": {"cleaned": result.cleaned, "remaining": result.remaining},
        "warnings": warnings,
    }


def _disabled(session: Session, vm: VmRef) -> bool:
    return _METHOD in (session.read(vm.obj, "disabledMethod")["disabledMethod"] or [])


# Around a run


def prepare(session: Session, run: Run, vm: VmRef, libdir: Optional[str]) -> Dict[str, Any]:
    """Prepare a machine for a run that has begun. :returns: {prepared, reason}: why it is not."""
    vddk, reason = _usable(session, libdir)
    if vddk is None:
        return {"prepared": False, "reason": reason}
    identity = _identity(run)
    intent = run.record("access", vm_moid=vm.moid, identity=identity)
    try:
        run_access("prepare", session, vm, vddk, identity)
    except VadpError as error:
        if "code" in error.details and not error.retryable:
            # It was refused, so there is nothing to end. Else that is not known.
            run.done(intent)
        return {"prepared": False, "reason": str(error)}
    return {"prepared": True, "reason": None}


def _identity(run: Run) -> str:
    return f"openvadp {run.run_id}"


def _usable(session: Session, libdir: Optional[str]) -> Tuple[Optional[Vddk], Optional[str]]:
    if not session.is_vcenter:
        return None, "the server is an ESXi host, and only a vCenter moves disks"
    return look_for_library(libdir)


def clean_up(session: Session, runs: Sequence[Run], libdir: Optional[str]) -> None:
    """Let VDDK remove what its HotAdd of crashed runs left, if their records speak of that (VADP facts 30).

    What it can't is detached, and both is checked, by who detaches what is left of the same records afterwards.
    """
    if any(intent.get("method") == BY_VDDK for run in runs for intent in run.intents("attachment")):
        vddk, _problem = look_for_library(libdir)
        if vddk is not None:
            with contextlib.suppress(TransportError):
                run_access("cleanup", session, None, vddk)


def end(
    session: Session, vm: Optional[VmRef], runs: Sequence[Run], libdir: Optional[str], check_mode: bool
) -> List[Tuple[str, str]]:
    """End what runs have prepared, as their records say. After their snapshots are gone.

    What can't be ended stays in the record, with the reason, for the next time: backups go on.

    :param vm: None if the VM is gone, and what was prepared with it.
    :returns: (identity, action) of each.
    """
    found = []
    for run in runs:
        for intent in run.intents("access"):
            identity = str(intent["identity"])
            if identity != _identity(run):
                continue  # nothing that this run has prepared
            if not check_mode and not _ended(session, vm, run, intent, identity, libdir):
                continue
            found.append((identity, "ended"))
    return found


def _ended(
    session: Session, vm: Optional[VmRef], run: Run, intent: Mapping[str, Any], identity: str, libdir: Optional[str]
) -> bool:
    problem: Optional[str] = None
    if vm is not None and vm.moid == intent["vm_moid"]:
        vddk, problem = _usable(session, libdir)
        if vddk is not None:
            try:
                run_access("end", session, vm, vddk, identity)
            except VadpError as error:
                if error.details.get("code") != _VM_NOT_FOUND:
                    problem = str(error)
    if problem is not None:
        run.update(intent["id"], problem=problem)
        return False
    run.settle(intent["id"])
    return True
