# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a backup makes of the marks that restores in place leave in a virtual machine (proofs 11 and 13).

A restore sets its mark and then looks for snapshots; a backup makes its snapshot and then looks for marks: one of the
two sees the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Sequence

from ..errors import VsphereError
from ..vsphere import vm_keys
from ..vsphere.disks import Disk, disks_of
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.vm_keys import DONE, UNKNOWN, WRITING, VmKeys


@dataclass(frozen=True)
class Verdict:
    """What the marks mean for the disks that are read.

    :param full: device key -> why the disk is read in full, as a phrase for the manifest and the result.
    """

    full: Dict[int, str] = field(default_factory=dict)
    warnings: List[str] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What a virtual machine was just now: its keys, and the devices of its configuration."""

    keys: VmKeys
    devices: List[Any]


def look(session: Session, vm: VmRef) -> Seen:
    """One call."""
    values = session.read(vm.obj, *vm_keys.PATHS, "config.hardware.device")
    return Seen(vm_keys.of_values(values)[0], list(values["config.hardware.device"] or []))


def before_snapshot(seen: Seen) -> List[Dict[str, Any]]:
    """The disks whose tracking must be reset before the snapshot is made: [{key, label, since, reason}]. Pure.

    What a restore has left as ``done`` waits for just that. ``since`` is None: a mark tells no time.
    """
    disks = disks_of(seen.devices)
    marks = seen.keys.marks_of(disks)
    return [
        {
            "key": disk.key,
            "label": disk.label,
            "since": None,
            "reason": f"no reset was proved since a restore (run {marks[disk.key].run_id}) wrote to the disk",
        }
        for disk in disks
        if disk.key in marks and marks[disk.key].state == DONE
    ]


def after_snapshot(vm: VmRef, keys: VmKeys, disks: Sequence[Disk], power_state: str, force: bool = False) -> Verdict:
    """Look at the marks once the snapshot is there. Pure.

    :param keys: as they were when the snapshot was made; a template's own.
    :param disks: all of the virtual machine, with the change IDs of the snapshot: a restore into one that is not read
        stands in the way too.
    :param power_state: of the virtual machine; a template is ``poweredOff``.
    :param force: a restore that may be writing was cut: the disks are read as they are.
    :raises VsphereError: a restore may be writing now. The snapshot must go, and no point is made.
    """
    marks = keys.marks_of(disks)
    full: Dict[int, str] = {}
    writing = [disk for disk in disks if disk.key in marks and marks[disk.key].state == WRITING]
    if writing and power_state == "poweredOff" and not force:
        raise _at_work(vm, writing, sorted({marks[disk.key].run_id for disk in writing}))
    for disk in disks:
        mark = marks.get(disk.key)
        if mark is not None:
            full[disk.key] = _REASONS[mark.state].format(mark.run_id)
    warnings = []
    if writing:
        warnings.append(
            f"{_labels(writing)} of {vm} may hold a mixture: a restore into it (run"
            f" {', '.join(sorted({marks[disk.key].run_id for disk in writing}))}) did not finish. Run that"
            " restore again; if the content is as you want it, use vm_change_tracking with state=reset and force=true"
        )
    if any(mark.state == UNKNOWN for mark in marks.values()):
        warnings.append(
            f"What {vm} says of restores into its disks can't be read, so they are read in full: its advanced settings"
            " are not visible to this user, or a newer version of this collection wrote them"
        )
    return Verdict(full, warnings)


_REASONS = {
    DONE: "its change tracking was not reset since a restore (run {}) wrote to it",
    WRITING: "a restore into it (run {}) did not finish",
    UNKNOWN: "what the virtual machine says of restores into it can't be read",
}


def _labels(disks: Sequence[Disk]) -> str:
    return ", ".join(f"'{disk.label}'" for disk in disks)


def _at_work(vm: VmRef, disks: Sequence[Disk], runs: Sequence[str]) -> VsphereError:
    return VsphereError(
        "The virtual machine can't be backed up now: a restore into it is at work, or was cut",
        subject=str(vm),
        reason=f"{_labels(disks)} carry the mark of run {', '.join(runs)}, and the machine is off",
        remedy="Wait for the restore, or run it again. If nothing writes to the disks and their content is as you want"
        " it, use vm_change_tracking with state=reset and force=true",
        details={"disks": [disk.key for disk in disks], "runs": list(runs)},
    )
