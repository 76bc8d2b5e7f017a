# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A virtual machine that a restore makes: made, finished, started, and removed again where the restore came to nothing.

Its instance UUID is chosen before it is made, so that a run's record can name it before it is there.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

from ..errors import ConnectionLostError, NotFoundError, TaskError, VsphereError
from ..libraries import vim, vmodl
from .datastore_files import http_put
from .inventory import VmRef, find_vm
from .placement import Placement
from .session import Session

_TIMEOUT = 3600
# So long an import lease lives without a sign of life, and some more.
_LEASE_SECONDS = 330

# Of an intent ``restore``: what it writes.
NEW_VM = "new_vm"


def new_instance_uuid() -> str:
    return str(uuid.uuid4())


def create(session: Session, placement: Placement, spec: Any) -> VmRef:
    """Make the machine, off. A call whose answer was lost is looked for by the instance UUID.

    :raises VsphereError: it was not made, and nothing of it is there.
    """
    what, subject = "The new virtual machine was not made", f"'{spec.name}' in {placement.folder_path}"
    instance_uuid = spec.instanceUuid
    try:
        made = session.run_task(
            placement.folder.CreateVM_Task,
            spec,
            placement.pool,
            placement.host,
            what=what,
            subject=subject,
            timeout=_TIMEOUT,
        )
    except ConnectionLostError:
        found = find(session, instance_uuid, placement.folder)
        if found is None:
            raise
        return found
    return find_vm(session, moid=made._moId)


def find(session: Session, instance_uuid: str, folder: Any) -> Optional[VmRef]:
    """The machine of that instance UUID, None if there is none.

    :param folder: whose tasks may still make it; they are waited for.
    """
    with suppress(NotFoundError):
        for task in session.read(folder, "recentTask")["recentTask"] or []:
            info = session.read(task, "info.descriptionId", "info.state")
            if info["info.descriptionId"] == "Folder.createVm" and info["info.state"] in ("running", "queued"):
                # It may be somebody else's; what came of it, the look-up tells.
                with suppress(TaskError):
                    session.wait(task, what="The virtual machine was not looked for", timeout=_TIMEOUT)
    try:
        return find_vm(session, uuid=instance_uuid, use_instance_uuid=True)
    except NotFoundError:
        return None


def config_of(session: Session, vm: VmRef) -> Any:
    return session.read(vm.obj, "config")["config"]


def reconfigure(session: Session, vm: VmRef, spec: Any) -> None:
    session.run_task(
        vm.obj.ReconfigVM_Task, spec, what="The new virtual machine was not finished", subject=str(vm), timeout=_TIMEOUT
    )


def put_nvram(session: Session, vm: VmRef, vmx_path: str, nvram: bytes) -> str:
    """Its NVRAM, before it is started for the first time (VADP facts 18); the datastore path."""
    path = vmx_path[: -len(".vmx")] + ".nvram"
    http_put(session, path, vm.datacenter_path, nvram)
    return path


def set_custom_attributes(session: Session, vm: VmRef, values: Mapping[str, str]) -> List[str]:
    """Custom attributes by their names; a sentence for each that could not be set."""
    if not values:
        return []
    if not session.is_vcenter:
        return [f"Custom attributes are vCenter's, so these were not restored: {', '.join(sorted(values))}"]
    known = {str(field.name) for field in session.read(vm.obj, "availableField")["availableField"] or []}
    warnings = []
    for name, value in sorted(values.items()):
        reason = "vCenter has no such attribute of virtual machines"
        if name in known:
            try:
                session.call(
                    vm.obj.setCustomValue,
                    name,
                    value,
                    what="The custom attribute was not set",
                    subject=str(vm),
                    idempotent=True,
                )
                continue
            except VsphereError as error:
                reason = error.reason or error.what
        warnings.append(f"Custom attribute '{name}' with the value {value!r} was not restored: {reason}")
    return warnings


def power_on(session: Session, vm: VmRef) -> None:
    session.run_task(
        vm.obj.PowerOnVM_Task,
        None,
        what="The new virtual machine is restored, but it was not started",
        subject=str(vm),
        timeout=_TIMEOUT,
    )


class Removal(NamedTuple):
    """What became of a half-restored machine. :param action: as in the results of ``vadp_recover``."""

    name: str
    action: str


def destroy(session: Session, vm: VmRef, leased: bool = False) -> None:
    """The machine and its files. It has to be off.

    :param leased: an import lease may still hold it, with which vSphere takes it away; that is waited for.
    """
    what = "The new virtual machine was not removed"
    deadline = session.clock() + _LEASE_SECONDS
    pause = 0.2
    while True:
        try:
            session.run_task(vm.obj.Destroy_Task, what=what, subject=str(vm), timeout=_TIMEOUT)
            return
        except VsphereError as error:
            if leased and isinstance(error.fault, vmodl.fault.ManagedObjectNotFound):
                return
            held = leased and isinstance(error.fault, vim.fault.MethodDisabled)
            if not held or session.clock() > deadline:
                raise
        session.sleep(pause)
        pause = min(pause * 1.5, 5.0)


def remove_leftover(session: Session, intent: Mapping[str, Any], check_mode: bool) -> Optional[Removal]:
    """What a restore that did not come to its end left of a new machine, as its intent says.

    :param intent: an intent ``restore`` with ``target`` new_vm.
    :returns: None if there is no such machine.
    :raises VsphereError: it could not be removed.
    """
    folder = vim.Folder(str(intent["folder_moid"]), session.stub)
    vm = find(session, str(intent["instance_uuid"]), folder)
    if vm is None:
        return None
    name = f"{vm.name} ({vm.moid})"
    if intent.get("complete"):
        return Removal(name, "kept: it is whole")
    leased = bool(intent.get("leased"))
    if intent.get("on_failure") == "keep" and not leased:
        return Removal(name, "kept, as on_failure says: it is not whole")
    try:
        state = session.read(vm.obj, "runtime.powerState")["runtime.powerState"]
    except NotFoundError:
        # Its lease has just ended.
        return Removal(name, "removed")
    if state != "poweredOff":
        raise VsphereError(
            "A half-restored virtual machine was not removed",
            subject=str(vm),
            reason=f"somebody has started it: it is {state}",
            remedy="Power it off, or take it over and remove the run's record",
            details={"power_state": str(state)},
        )
    if not check_mode:
        destroy(session, vm, leased)
    return Removal(name, "removed")


def is_new_vm(intent: Mapping[str, Any]) -> bool:
    return intent.get("what") == "restore" and intent.get("target") == NEW_VM


def intent_fields(placement: Placement, name: str, instance_uuid: str, on_failure: str) -> Dict[str, Any]:
    """What an intent ``restore`` says of a machine that is about to be made."""
    return {
        "target": NEW_VM,
        "name": name,
        "instance_uuid": instance_uuid,
        "folder": placement.folder_path,
        "folder_moid": placement.folder._moId,
        "on_failure": on_failure,
        "complete": False,
    }
