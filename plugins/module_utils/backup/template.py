# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Templates: they have no snapshots, so their base files are read, and nothing may change them meanwhile.

A template's disks are at rest by its nature, until somebody converts it to a virtual machine. What vCenter says of it
before the copy and after it must be the same; then all disks were read in one state, as from one snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

from ..errors import InputError, NotFoundError, VsphereError
from ..repository.chain import AUTO
from ..repository.manifest import FULL
from ..vsphere.disks import Disk, disks_of, vm_obstacles
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import VM_PATHS, VmState, utc_text, vm_state_of

ALWAYS_FULL = "a template has no snapshots, so no change tracking: it is always read in full"

AT_REST = (
    "Convert it to a virtual machine, remove its snapshots and consolidate its disks (of a linked clone make a full"
    " one), then convert it back"
)
NEVER = "1970-01-01T00:00:00Z"

_PATHS = (*VM_PATHS, "config.changeVersion", "config.modified")

# Field of TemplateState -> what it is called to people.
_WORDS = {
    "change_version": "its configuration",
    "modified": "the time of its configuration's last change",
    "power_state": "its power state",
    "snapshots": "its snapshots",
    "files": "its disks' files",
}


@dataclass(frozen=True)
class TemplateState:
    """What of a template must be the same before and after its disks were read.

    :param seen: when it was looked at by vCenter's clock, UTC ISO 8601: the moment whose state the point holds.
    :param change_version: opaque; each change of the configuration gives another one, a conversion too.
    :param modified: UTC ISO 8601; some servers always say 1970, so it proves nothing alone.
    """

    seen: str
    template: bool
    change_version: str
    modified: str
    power_state: str
    snapshots: Tuple[str, ...]
    files: Tuple[str, ...]

    def changes(self, later: TemplateState) -> List[str]:
        """What is not as it was, in words."""
        if not later.template:
            return ["it was converted to a virtual machine"]
        changed = []
        for one in fields(self):
            before, after = getattr(self, one.name), getattr(later, one.name)
            if one.name in _WORDS and before != after:
                changed.append(f"{_WORDS[one.name]} changed from {_text(before)} to {_text(after)}")
        return changed


def _text(value: Any) -> str:
    return (", ".join(value) if isinstance(value, tuple) else str(value)) or "none"


def look(session: Session, vm: VmRef) -> Tuple[TemplateState, VmState]:
    """A template as it is now; two calls."""
    now = session.call(session.service.CurrentTime, what="The server's time was not read", idempotent=True)
    values = session.read(vm.obj, *_PATHS)
    return state_of(values, utc_text(now)), vm_state_of(values)


def state_of(values: Dict[str, Any], seen: str) -> TemplateState:
    """:func:`look` of properties that were read already."""
    state = vm_state_of(values)
    modified = values.get("config.modified")
    return TemplateState(
        seen=seen,
        template=state.template,
        change_version=str(values.get("config.changeVersion") or ""),
        modified=NEVER if modified is None else utc_text(modified),
        power_state=state.power_state,
        snapshots=tuple(snapshot.moid for snapshot in state.snapshots),
        files=tuple(disk.file for disk in disks_of(state.devices)),
    )


def check_request(vm: VmRef, mode: str, snapshot: Optional[str]) -> None:
    """:raises InputError: what is asked for can't be had of a template."""
    if snapshot is not None:
        raise InputError(
            "A template has no snapshot",
            subject=str(vm),
            reason=f"the snapshot {snapshot!r} is asked for",
            remedy="Leave snapshot_moid and snapshot_name out: the template's disks themselves are read",
        )
    if mode not in (AUTO, FULL):
        raise InputError(
            f"A template can't be read as {mode}",
            subject=str(vm),
            reason=ALWAYS_FULL,
            remedy="Use mode auto or full",
        )


def not_at_rest(state: VmState) -> List[str]:
    """Why the base files of a template do not hold what its disks hold."""
    reasons = []
    if state.snapshots:
        reasons.append("it has snapshots: " + ", ".join(f"'{item.name}' ({item.moid})" for item in state.snapshots))
    if state.consolidation_needed:
        reasons.append("a snapshot was removed and its files are still there (consolidation needed)")
    reasons += [
        f"disk '{disk.label}' stands on another file, which holds the rest of its data ({disk.file})"
        for disk in disks_of(state.devices)
        if disk.chained and disk.included
    ]
    if state.power_state != "poweredOff":
        reasons.append(f"it is {state.power_state}")
    return reasons


def check_can_be_read(vm: VmRef, state: VmState) -> None:
    """:raises VsphereError: it can't be backed up, with all reasons."""
    config = SimpleNamespace(template=state.template, hardware=SimpleNamespace(device=state.devices))
    obstacles, chains = vm_obstacles(config, snapshot=False), not_at_rest(state)
    if not state.template:
        obstacles.append("it was converted to a virtual machine just now")
    if obstacles or chains:
        raise VsphereError(
            "The template can't be backed up",
            subject=str(vm),
            reason="; ".join(obstacles + chains),
            remedy=AT_REST if chains else None,
        )


def without_tracking(disks: List[Disk]) -> List[Disk]:
    """Its disks may have change IDs of a former life; no later point may build upon them."""
    return [replace(disk, change_id=None) for disk in disks]


def changes_since(session: Session, vm: VmRef, before: TemplateState) -> Optional[VsphereError]:
    """After the last byte was read: why what was read is of no use, or None if the template is as it was.

    :raises VsphereError: it can't be known.
    """
    try:
        after, _state = look(session, vm)
        reasons = before.changes(after)
    except NotFoundError:
        reasons = ["it is gone"]
    if not reasons:
        return None
    return VsphereError(
        "The template was changed while it was read",
        subject=str(vm),
        reason="; ".join(reasons),
        remedy="Run again when it is not being changed",
        retryable=True,
    )
