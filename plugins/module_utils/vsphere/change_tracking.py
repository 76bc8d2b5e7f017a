# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Changed block tracking of a virtual machine: on, off, and started again (VADP facts 7 and 8).

A restore in place leaves a mark in the virtual machine (proofs 11). One that says ``writing`` belongs to a restore that
is at work, or was cut: tracking is not started then, unless that is forced. One that says ``done`` waits for a reset.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional

from ..errors import PrivilegeError, VsphereError
from ..libraries import vim
from . import vm_keys
from .disks import Disk, disks_of
from .inventory import VmRef
from .session import Session
from .snapshots import MARKER, VM_PATHS, Snapshot, VmState, create_snapshot, remove_snapshot, vm_state_of

TRACKING_PATHS = (*VM_PATHS, "config.changeTrackingEnabled", "capability.changeTrackingSupported")

_PURPOSE = "change tracking"


@dataclass
class Tracking:
    """Change tracking of a virtual machine as it is.

    ``effective``: it is switched on, and either each disk that a snapshot can hold carries a change ID in the virtual
    machine's configuration, or the virtual machine is off and so writes nothing before tracking begins.
    ``snapshots`` are those of others, ``leftovers`` temporary ones of this module that a crash left. ``vm_state`` is
    what both were read with.
    """

    enabled: bool
    supported: bool
    effective: bool
    disks: List[Disk]
    snapshots: List[Snapshot]
    leftovers: List[Snapshot]
    power_state: str
    template: bool
    vm_state: VmState

    def to_dict(self) -> Dict[str, Any]:
        return {
            "enabled": self.enabled,
            "supported": self.supported,
            "effective": self.effective,
            "disks": [{"key": disk.key, "label": disk.label, "change_id": disk.change_id} for disk in self.disks],
        }


def state(session: Session, vm: VmRef) -> Tracking:
    """Change tracking as it is; one call."""
    return state_of(session.read(vm.obj, *TRACKING_PATHS))


def is_temporary(snapshot: Snapshot) -> bool:
    """Whether it is one of a stun cycle. It lives for a moment; one that is seen was left by a crash."""
    return snapshot.marker is not None and snapshot.marker.get("purpose") == _PURPOSE


def state_of(values: Dict[str, Any]) -> Tracking:
    """:func:`state` of properties that were read already; they hold at least ``TRACKING_PATHS``."""
    known = vm_state_of(values)
    disks = disks_of(known.devices)
    tracked = [disk for disk in disks if disk.included]
    enabled = bool(values["config.changeTrackingEnabled"])
    # One that names its run is that run's: whether it is over, only its record tells.
    leftovers = [item for item in known.snapshots if is_temporary(item) and not (item.marker or {}).get("run_id")]
    return Tracking(
        enabled=enabled,
        supported=bool(values["capability.changeTrackingSupported"]),
        effective=enabled and (known.power_state == "poweredOff" or all(disk.change_id for disk in tracked)),
        disks=disks,
        snapshots=[item for item in known.snapshots if item not in leftovers],
        leftovers=leftovers,
        power_state=known.power_state,
        template=known.template,
        vm_state=known,
    )


def plan(vm: VmRef, tracking: Tracking, wanted: str, activate: bool = True) -> List[str]:
    """The steps to a wanted state, out of ``clean``, ``enable``, ``disable``, ``stun``; none if it is reached.

    :param wanted: ``enabled``, ``disabled`` or ``reset``.
    :param activate: make what is switched effective at once on a running virtual machine, by a stun cycle. A reset
        always does: without the cycles it is none (VADP facts 8).
    :raises VsphereError: the virtual machine can't have it, or has snapshots in the way.
    """
    clean = ["clean"] if tracking.leftovers else []
    stun = ["stun"] if activate and tracking.power_state != "poweredOff" else []
    if wanted == "disabled":
        return clean + (["disable"] + stun if tracking.enabled else [])
    _check_supported(vm, tracking)
    if wanted == "reset":
        _check_no_snapshots(vm, tracking, "be reset")
        return clean + (["disable", "stun"] if tracking.enabled else []) + ["enable", "stun"]
    if not tracking.enabled:
        _check_no_snapshots(vm, tracking, "be switched on")
        return clean + ["enable"] + stun
    if not tracking.effective and stun:
        _check_no_snapshots(vm, tracking, "take effect")
        return clean + stun
    return clean


def _check_supported(vm: VmRef, tracking: Tracking) -> None:
    what = "Change tracking is not possible"
    if tracking.template:
        raise VsphereError(
            what,
            subject=str(vm),
            reason="it is a template, which can't have a snapshot",
            remedy="Convert it to a virtual machine",
        )
    if not tracking.supported:
        raise VsphereError(
            what,
            subject=str(vm),
            reason="its virtual hardware does not support it",
            remedy="Upgrade the virtual hardware to version 7 or later",
        )


def _check_no_snapshots(vm: VmRef, tracking: Tracking, verb: str) -> None:
    """Tracking that begins over a snapshot misses changes without an error (VADP facts 7)."""
    if tracking.snapshots:
        listed = ", ".join(f"'{item.name}' ({item.moid}, {item.created})" for item in tracking.snapshots)
        raise VsphereError(
            f"Change tracking can't {verb} while there are snapshots",
            subject=str(vm),
            reason=f"it would miss changes without an error; there are: {listed}",
            remedy="Remove these snapshots first",
            details={"snapshots": [item.to_dict() for item in tracking.snapshots]},
        )


def stun_description(**ids: str) -> str:
    """The description of a snapshot of a stun cycle. :param ids: repository_id and run_id of the run that makes it."""
    return json.dumps({"by": MARKER, "purpose": _PURPOSE, **ids}, sort_keys=True)


def apply(
    session: Session,
    vm: VmRef,
    tracking: Tracking,
    steps: List[str],
    timeout: float = 3600,
    description: Optional[str] = None,
) -> Tracking:
    """Carry out the steps of :func:`plan` and return what came of it.

    :param description: of the snapshots of stun cycles, of :func:`stun_description`.
    :raises VsphereError: a step failed, or a reset did not change the change IDs.
    """
    for step in steps:
        if step == "clean":
            for leftover in tracking.leftovers:
                remove_snapshot(session, vm, leftover, timeout=timeout)
        elif step == "stun":
            _stun(session, vm, tracking.vm_state, timeout, description or stun_description())
        else:
            _switch(session, vm, step == "enable", timeout)
    if not steps:
        return tracking
    after = state(session, vm)
    wanted = "disable" not in steps or "enable" in steps
    if ("enable" in steps or "disable" in steps) and after.enabled != wanted:
        raise VsphereError(
            "Change tracking was not switched",
            subject=str(vm),
            reason=f"the task succeeded, but vCenter still says {'on' if after.enabled else 'off'}",
            remedy="Look at the virtual machine's advanced setting ctkEnabled, then run again",
        )
    if "disable" in steps and "enable" in steps:
        _check_reset(vm, tracking, after)
    return after


def _switch(session: Session, vm: VmRef, on: bool, timeout: float) -> None:
    session.run_task(
        vm.obj.ReconfigVM_Task,
        vim.vm.ConfigSpec(changeTrackingEnabled=on),
        what=f"Change tracking was not switched {'on' if on else 'off'}",
        subject=str(vm),
        timeout=timeout,
        idempotent=True,
    )


def _stun(session: Session, vm: VmRef, known: VmState, timeout: float, description: str) -> None:
    """Make and remove a snapshot: the moment in which the platform begins or ends to track a running disk."""
    name = f"openvadp change tracking {uuid.uuid4().hex[:8]}"
    made = create_snapshot(session, vm, name, description, quiesce="never", timeout=timeout, state=known)
    remove_snapshot(session, vm, made.snapshot, timeout=timeout)


def _check_reset(vm: VmRef, before: Tracking, after: Tracking) -> None:
    """A reset gives every disk a change ID with another first part (VADP facts 4)."""
    old = {disk.key: disk.change_id.rpartition("/")[0] for disk in before.disks if disk.change_id}
    same = [
        disk.label for disk in after.disks if disk.change_id and disk.change_id.rpartition("/")[0] == old.get(disk.key)
    ]
    if same:
        raise VsphereError(
            "Change tracking was not reset",
            subject=str(vm),
            reason=f"the change IDs of {', '.join(same)} begin as before",
            remedy="Switch it off, power the virtual machine off and on, and switch it on",
        )


def ensure(
    session: Session,
    vm: VmRef,
    wanted: str,
    activate: bool,
    timeout: float,
    check_mode: bool,
    description: Optional[str] = None,
    force: bool = False,
) -> Dict[str, Any]:
    """All of module ``vm_change_tracking`` but its options. Check mode makes no changing call.

    :param description: as of :func:`apply`.
    :param force: with ``reset``: a restore that was cut has left its mark, and nothing writes to the disks any more.
    """
    values = session.read(vm.obj, *TRACKING_PATHS, *vm_keys.PATHS)
    before = state_of(values)
    keys, _version = vm_keys.of_values(values)
    marks = keys.marks_of(before.disks)
    steps = plan(vm, before, wanted, activate)
    if keys.readable and not force:
        _check_not_written(vm, before, marks, steps)
    if check_mode:
        after = _predict(before, steps)
    else:
        after = apply(session, vm, before, steps, timeout, description)
    result: Dict[str, Any] = {
        "changed": bool(steps),
        "change_tracking": after.to_dict(),
        "diff": {"before": _words(before), "after": _words(after)},
    }
    warnings = []
    if wanted == "reset":
        result["diff"]["after"] += "change IDs start again: the next backup of each disk is a full one\n"
        if not check_mode and (marks or not keys.readable):
            marks, warnings = _settle(session, vm, before, after, force)
    result["change_tracking"]["marks"] = _told(after.disks, marks)
    if wanted == "enabled" and after.snapshots:
        listed = ", ".join(f"'{item.name}' ({item.moid})" for item in after.snapshots)
        warnings.append(
            f"Change tracking of {vm} is on over snapshots of others ({listed}). Unless it was on before they were"
            " made, it can miss changes: remove them and use state=reset."
        )
    if wanted != "disabled" and after.enabled and not after.effective:
        warnings.append(
            f"Change tracking of {vm} is on but not effective yet: it needs a stun cycle (activate) or a power cycle."
        )
    if warnings:
        result["warnings"] = warnings
    return result


# The marks of restores (proofs 11)


def _told(disks: List[Disk], marks: Mapping[int, vm_keys.Mark]) -> List[Dict[str, Any]]:
    return [
        {"key": disk.key, "label": disk.label, "state": marks[disk.key].state, "run_id": marks[disk.key].run_id or None}
        for disk in disks
        if disk.key in marks
    ]


def _check_not_written(vm: VmRef, before: Tracking, marks: Mapping[int, vm_keys.Mark], steps: List[str]) -> None:
    """Tracking that starts in the middle of a restore takes what is written afterwards for the point's.

    While the machine runs, nothing but itself can write to its disks: a restore that left its mark was cut.
    """
    held = [disk for disk in before.disks if disk.key in marks and marks[disk.key].state != vm_keys.DONE]
    if held and "enable" in steps and before.power_state == "poweredOff":
        runs = sorted({marks[disk.key].run_id for disk in held} - {""})
        raise VsphereError(
            "Change tracking can't start while a restore may be at work",
            subject=str(vm),
            reason=f"a restore{' (run ' + ', '.join(runs) + ')' if runs else ''} is writing to"
            f" {', '.join(repr(disk.label) for disk in held)}, or was cut",
            remedy="Wait for it, or run that restore again. If nothing writes to the disks any more and their content"
            " is as you want it, use state=reset with force=true",
            details={"marks": _told(before.disks, marks)},
        )


def _settle(session: Session, vm: VmRef, before: Tracking, after: Tracking, force: bool) -> Any:
    """Take away the marks that a reset makes void. -> (marks that stay, warnings)"""
    ids = {disk.key: disk.change_id for disk in before.disks}
    named: Dict[str, List[Disk]] = {}
    for disk in after.disks:
        named.setdefault(vm_keys.mark_name(disk), []).append(disk)
    left: Dict[int, vm_keys.Mark] = {}

    def is_void(mark: vm_keys.Mark, disks: List[Disk]) -> bool:
        """Two disks of one UUID have one mark: it goes when both are reset."""
        for disk in disks:
            was, new = vm_keys.first_part(ids.get(disk.key)), vm_keys.first_part(disk.change_id)
            if new is None or new in (was, mark.first_part):
                return False
        foreign = not any(mark.in_force(ids.get(disk.key)) for disk in disks)
        return force or mark.state == vm_keys.DONE or foreign

    def decide(keys: vm_keys.VmKeys) -> Dict[str, str]:
        changes: Dict[str, str] = {}
        left.clear()
        for name, disks in named.items():
            mark = keys.mark(name)
            if mark is None:
                continue
            if keys.readable and is_void(mark, disks):
                changes[vm_keys.mark_key(name)] = ""
                continue
            if force and mark.state == vm_keys.WRITING:
                change_id = ids.get(disks[0].key)
                value = vm_keys.mark_value(keys.vm_instance_uuid, mark.run_id, vm_keys.DONE, change_id)
                changes[vm_keys.mark_key(name)] = value
                mark = replace(mark, state=vm_keys.DONE)
            left.update((disk.key, mark) for disk in disks)
        return changes

    what = "Change tracking was reset, but the marks of restores were not removed"
    try:
        vm_keys.update(session, vm, decide, what=what, sleep=session.sleep)
    except PrivilegeError as error:
        if force:
            raise
        return left, [str(error)]
    warnings = []
    if left:
        labels = ", ".join(f"'{disk.label}'" for disk in after.disks if disk.key in left)
        why = "no change ID proves that their tracking restarted, so the next backup reads them in full"
        if any(mark.state != vm_keys.DONE for mark in left.values()):
            why = "a restore into them was cut: run it again, or use force=true if their content is as you want it"
        warnings.append(f"The marks on disks {labels} of {vm} stay: {why}.")
    return left, warnings


def _predict(before: Tracking, steps: List[str]) -> Tracking:
    """What :func:`apply` would come to, as far as it can be known: new change IDs can't."""
    after = replace(before, leftovers=[] if "clean" in steps else before.leftovers)
    if "enable" in steps or "disable" in steps:
        after.enabled = "enable" in steps
        after.disks = [replace(disk, change_id=None) for disk in before.disks]
    after.effective = after.enabled and (
        before.power_state == "poweredOff" or steps[-1:] == ["stun"] or (before.effective and "enable" not in steps)
    )
    return after


def _words(tracking: Tracking) -> str:
    lines = [f"change tracking: {'on' if tracking.enabled else 'off'}"]
    if tracking.enabled:
        lines.append(f"effective: {'yes' if tracking.effective else 'no'}")
    lines.extend(f"temporary snapshot left by a crash: {item.moid}" for item in tracking.leftovers)
    return "\n".join(lines) + "\n"
