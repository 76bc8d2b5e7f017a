# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which disks of a VM go into a restore point, and why the others don't. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Set

from ..errors import InputError, VsphereError
from ..vsphere.disks import Disk, disks_of, vm_obstacles
from ..vsphere.inventory import VmRef


@dataclass(frozen=True)
class Selection:
    """The disks that are read, and the others as {key, label, reason}; both in the order of the configuration."""

    disks: List[Disk]
    skipped: List[Dict[str, Any]]


def select_disks(disks: Sequence[Disk], wanted: Optional[Sequence[str]], excluded: Sequence[str]) -> Selection:
    """Sort out the disks of a configuration.

    :param disks: of the snapshot's configuration, with their own skip reasons.
    :param wanted: device keys or labels; None for all.
    :param excluded: device keys or labels.
    :raises InputError: a name fits no disk, a wanted disk can't be in a snapshot, or no disk is left.
    """
    wanted_keys = None if wanted is None else _keys(disks, wanted, "disks")
    excluded_keys = _keys(disks, excluded, "exclude_disks")
    taken: List[Disk] = []
    skipped: List[Dict[str, Any]] = []
    for disk in disks:
        reason = None
        if disk.key in excluded_keys:
            reason = "named in exclude_disks"
        elif wanted_keys is not None and disk.key not in wanted_keys:
            reason = "not named in disks"
        elif not disk.included:
            reason = disk.skip_reason or "no snapshot holds it"
            if wanted_keys is not None:
                raise InputError(
                    "A disk that was asked for can't be backed up",
                    subject=f"disk '{disk.label}'",
                    reason=reason,
                    remedy="Leave it out of 'disks', or change what the reason says",
                )
        if reason is None:
            taken.append(disk)
        else:
            skipped.append({"key": disk.key, "label": disk.label, "reason": reason})
    if not taken:
        raise InputError(
            "No disk of the virtual machine can be backed up",
            reason="; ".join(f"'{item['label']}': {item['reason']}" for item in skipped) or "it has no disk",
            remedy="Choose at least one disk that a snapshot can hold",
        )
    return Selection(taken, skipped)


def select_of(vm: VmRef, disks: Sequence[Disk], wanted: Optional[Sequence[str]], excluded: Sequence[str]) -> Selection:
    """As :func:`select_disks`. The error names the virtual machine."""
    try:
        return select_disks(disks, wanted, excluded)
    except InputError as error:
        error.subject = f"{error.subject} of {vm}" if error.subject else str(vm)
        raise


def refuse_unfit(vm: VmRef, devices: Sequence[Any], wanted: Optional[Sequence[str]], excluded: Sequence[str]) -> None:
    """Before anything is done for a backup of it.

    :param devices: of its configuration.
    :raises VadpError: as the export would, if the snapshot held these devices.
    """
    config = SimpleNamespace(template=vm.template, hardware=SimpleNamespace(device=devices))
    obstacles = vm_obstacles(config, snapshot=not vm.template)
    if obstacles:
        raise VsphereError("The virtual machine can't be backed up", subject=str(vm), reason="; ".join(obstacles))
    select_of(vm, disks_of(devices), wanted, excluded)


def _keys(disks: Sequence[Disk], names: Sequence[str], option: str) -> Set[int]:
    keys = set()
    for name in names:
        fitting = [disk.key for disk in disks if name in (str(disk.key), disk.label)]
        if not fitting:
            known = ", ".join(f"'{disk.label}' ({disk.key})" for disk in disks)
            raise InputError(
                "There is no such disk",
                subject=f"'{name}' in {option}",
                reason=f"the virtual machine has {known or 'none'}",
                remedy="Name a disk by its device key or its label",
            )
        keys.update(fitting)
    return keys
