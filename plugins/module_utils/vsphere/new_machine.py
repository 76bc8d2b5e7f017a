# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A virtual machine that a restore makes: made, finished, started, and removed again where the restore came to nothing.

Its instance UUID is chosen before it is made, so that a run's record can name it before it is there.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import ConnectionLostError, NotFoundError, TaskError, VsphereError
from ..libraries import vim, vmodl
from . import faults, vm_keys
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
        made = session.run_task(*_way(placement, spec), what=what, subject=subject, timeout=_TIMEOUT)
    except ConnectionLostError:
        found = find(session, instance_uuid, placement.folder)
        if found is None:
            raise
        return found
    return find_vm(session, moid=made._moId)


def _way(placement: Placement, spec: Any) -> Sequence[Any]:
    """The call that makes it, and what is said with it."""
    if placement.in_vapp:
        return placement.folder.CreateChildVM_Task, spec, placement.host
    return placement.folder.CreateVM_Task, spec, placement.pool, placement.host


def find(session: Session, instance_uuid: str, folder: Any) -> Optional[VmRef]:
    """The machine of that instance UUID, None if there is none.

    :param folder: a folder or vApp whose tasks may still make it; they are waited for.
    """
    with suppress(NotFoundError):
        for task in session.read(folder, "recentTask")["recentTask"] or []:
            info = session.read(task, "info.descriptionId", "info.state")
            if str(info["info.descriptionId"]).endswith(".createVm") and info["info.state"] in ("running", "queued"):
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
    """What became of a machine that a restore was making.

    :param action: as in the results of ``vadp_recover``.
    :param settled: nothing of ours is left to do about it; else the record stays, and the next recovery looks again.
    :param gone: it is not there any more.
    """

    name: str
    action: str
    settled: bool
    gone: bool = False


class NotOurs(VsphereError):
    """It can't be proved that a machine is as the restore made it, so it is not removed (proofs 10)."""


#: What is needed to prove that a machine is still what the restore made, in one read.
_PROOF_PATHS = (
    "name",
    "config.instanceUuid",
    "config.extraConfig",
    "config.changeVersion",
    "config.template",
    "config.hardware.device",
    "runtime.powerState",
    "snapshot",
    "layoutEx.file",
)
# What a machine has that was never started. A log, a swap file and the like are of one that ran (proofs 10).
_FRESH_FILES = ("config", "extendedConfig", "nvram", "diskDescriptor", "diskExtent", "snapshotList")


def made_disks(config: Any) -> List[Dict[str, Any]]:
    """The disks of a machine that was just made, as the record of its restore names them."""
    return _disks(config.hardware.device)


def _disks(devices: Any) -> List[Dict[str, Any]]:
    found = []
    for device in devices or []:
        if isinstance(device, vim.vm.device.VirtualDisk):
            uuid_, file = getattr(device.backing, "uuid", None), getattr(device.backing, "fileName", None)
            capacity = device.capacityInBytes or device.capacityInKB * 1024
            found.append({"key": device.key, "uuid": uuid_, "file": file, "capacity_bytes": int(capacity)})
    return sorted(found, key=lambda disk: int(disk["key"]))


def _doubts(facts: Mapping[str, Any], intent: Mapping[str, Any], mark: Tuple[str, str]) -> Tuple[List[str], List[str]]:
    """What speaks against a machine being as the restore made it: (signs of use, proofs that are missing)."""
    used, missing = [], []
    if facts["runtime.powerState"] != "poweredOff":
        used.append(f"somebody has started it: it is {facts['runtime.powerState']}")
    if facts["config.template"]:
        used.append("it is a template now")
    if facts["snapshot"] is not None:
        used.append("it has snapshots")
    strange = sorted({str(file.type) for file in facts["layoutEx.file"] or [] if file.type not in _FRESH_FILES})
    if strange:
        used.append(f"it has files of a machine that was started: {', '.join(strange)}")
    key, value = mark
    held = {str(option.key).lower(): str(option.value) for option in facts["config.extraConfig"] or []}
    if held.get(key) != value:
        used.append(f"it does not carry the mark of that restore ({key})")
    if str(facts["config.instanceUuid"]).lower() != str(intent["instance_uuid"]).lower():
        missing.append("its instance UUID is another one")
    disks = intent.get("made_disks")
    if disks is None:
        missing.append("which disks it was made with was not recorded")
    elif _disks(facts["config.hardware.device"]) not in (disks, []):  # none: a removal was cut after its first half
        missing.append("its disks are not those that it was made with")
    return used, missing


def remove_made(
    session: Session,
    intent: Mapping[str, Any],
    mark: Tuple[str, str],
    server_uuid: Optional[str],
    check_mode: bool = False,
) -> List[str]:
    """Remove a machine that a restore made, if it is proved to be just that and to be unused (proofs 10).

    Its disks go in one reconfiguration, which fails if anything about it was changed since the look. It is then taken
    out of the inventory. ``Destroy_Task`` would take whatever it has by then.

    :param intent: as of :func:`intent_fields`, with ``vm_moid`` and ``made_disks`` of when it was made.
    :param mark: (key, value) of the advanced setting that the restore put there when it made it.
    :param server_uuid: the server that the intent's ids are of.
    :returns: datastore paths of files that stay.
    :raises NotFoundError: it is gone. :raises NotOurs: it is not proved; nothing was touched.
    """
    what, subject = "The virtual machine was not removed", f"'{intent.get('name')}' ({intent.get('vm_moid')})"
    if not intent.get("vm_moid") or server_uuid is None or server_uuid != session.server_uuid:
        raise NotOurs(
            what,
            subject=subject,
            reason="which machine of this server it is was not recorded",
            remedy="If it is of no use, delete it in the vSphere client",
            details={"used": False},
        )
    vm = vim.VirtualMachine(str(intent["vm_moid"]), session.stub)
    facts = session.read(vm, *_PROOF_PATHS)
    used, missing = _doubts(facts, intent, mark)
    if used or missing:
        raise NotOurs(
            what,
            subject=subject,
            reason="; ".join(used + missing),
            remedy="If it is of no use, power it off and delete it in the vSphere client",
            details={"used": bool(used)},
        )
    others = [file for file in facts["layoutEx.file"] or [] if file.type not in ("diskDescriptor", "diskExtent")]
    rest = sorted(str(file.name) for file in others)
    if check_mode:
        return rest
    Change = vim.vm.device.VirtualDeviceSpec
    changes = [
        Change(operation=Change.Operation.remove, fileOperation=Change.FileOperation.destroy, device=device)
        for device in facts["config.hardware.device"] or []
        if isinstance(device, vim.vm.device.VirtualDisk)
    ]
    if changes:
        spec = vim.vm.ConfigSpec(changeVersion=facts["config.changeVersion"], deviceChange=changes)
        session.run_task(vm.ReconfigVM_Task, spec, what=what, subject=subject, timeout=_TIMEOUT)
    after = session.read(vm, "config.hardware.device", "runtime.powerState")
    if _disks(after["config.hardware.device"]) or after["runtime.powerState"] != "poweredOff":
        raise NotOurs(
            what,
            subject=subject,
            reason="somebody has given it a disk or started it meanwhile",
            remedy="If it is of no use, power it off and delete it in the vSphere client",
            details={"used": True},
        )
    session.call(vm.UnregisterVM, what=what, subject=subject)
    return rest


def remove_failed(
    session: Session,
    intent: Mapping[str, Any],
    mark: Tuple[str, str],
    server_uuid: Optional[str],
    leased: bool = False,
    check_mode: bool = False,
) -> List[str]:
    """As :func:`remove_made`; a machine that is gone is fine.

    :param leased: an import lease may still hold it, with which vSphere takes it away; that is waited for.
    """
    deadline = session.clock() + _LEASE_SECONDS
    pause = 0.2
    while True:
        try:
            return remove_made(session, intent, mark, server_uuid, check_mode)
        except NotFoundError:
            return []
        except VsphereError as error:
            if isinstance(error.fault, vmodl.fault.ManagedObjectNotFound):
                return []
            # As long as the lease lives, it keeps methods disabled, and the disk that is being uploaded locked.
            disabled = isinstance(error.fault, vim.fault.MethodDisabled)
            held = leased and (disabled or faults.is_locked(error.fault))
            if not held or session.clock() > deadline:
                raise
        session.sleep(pause)
        pause = min(pause * 1.5, 5.0)


def remove_leftover(
    session: Session, intent: Mapping[str, Any], mark: Tuple[str, str], server_uuid: Optional[str], check_mode: bool
) -> Optional[Removal]:
    """What a restore that did not finish left of a new machine, as its intent says and vCenter proves.

    :param intent: an intent ``restore`` with ``target`` new_vm; see :func:`remove_made` for the rest.
    :returns: None if there is no such machine.
    :raises VsphereError: it is ours, and could not be removed.
    """
    vm = _known(session, intent, server_uuid)
    if vm is None:
        return None
    name = f"{vm.name} ({vm.moid})"
    leased = bool(intent.get("leased"))
    if intent.get("complete"):
        return Removal(name, "kept: it is whole", settled=True)
    if intent.get("on_failure") == "keep" and not leased:
        return Removal(name, "kept, as on_failure says: it is not whole", settled=True)
    try:
        rest = remove_failed(session, intent, mark, server_uuid, leased, check_mode)
    except NotOurs as error:
        # Whatever is in use, or has lost its mark, is nobody's of ours any more: it is reported once.
        used = bool(error.details["used"])
        return Removal(name, f"left: {error.reason}. {error.remedy}", settled=used)
    action = "removed" + (f"; these files stay: {', '.join(rest)}" if rest else "")
    return Removal(name, action, settled=True, gone=True)


def _known(session: Session, intent: Mapping[str, Any], server_uuid: Optional[str]) -> Optional[VmRef]:
    """The machine that an intent is about, if it is there."""
    if intent.get("vm_moid") and server_uuid == session.server_uuid:
        try:
            return find_vm(session, moid=str(intent["vm_moid"]))
        except NotFoundError:
            return None
    # It may have been made without our being told: then it can be named, and no more.
    kind = vim.VirtualApp if intent.get("in_vapp") else vim.Folder
    return find(session, str(intent["instance_uuid"]), kind(str(intent["folder_moid"]), session.stub))


def new_mark(repository_id: str, run_id: str) -> Tuple[str, str]:
    """(key, value) of the advanced setting that a machine carries while a restore makes it (proofs 10)."""
    return vm_keys.new_key(repository_id), vm_keys.new_value(run_id)


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
        "in_vapp": placement.in_vapp,
        "on_failure": on_failure,
        "complete": False,
    }
