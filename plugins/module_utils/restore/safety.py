# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The way back: before a restore overwrites a disk, the repository must hold what the disk held.

It is proved here, by the module that writes. A task of a role that fails is passed over where errors are ignored.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, Optional

from ..errors import RepositoryError
from ..repository.store import VmStore
from ..vsphere.disks import Disk

_WHAT = "The safety point is not there, and no disk was written"


def require_safety_point(store: VmStore, run_id: Optional[str], disks: Iterable[Disk], restored: str) -> None:
    """Nothing may be overwritten unless the run *run_id* has made a whole point of these very disks.

    :param store: of the VM that is written.
    :param run_id: None: no safety point was asked for.
    :param restored: name of the point that is restored, if it is of the same VM.
    :raises RepositoryError: there is no such point, or it can't be gone back to.
    """
    if run_id is None:
        return
    remedy = "See why the backup did not make it, then run the restore again"
    manifest = store.point_of(run_id)
    if manifest is None:
        raise RepositoryError(_WHAT, subject=store.shown, reason=f"run {run_id} has made no point of it", remedy=remedy)
    name = str(manifest["point"])
    if name == restored:
        raise RepositoryError(
            _WHAT, subject=name, reason="it is the point that is restored", remedy="Name the point that is meant"
        )
    problems = store.stored_problems(manifest)
    held: Dict[int, Dict[str, Any]] = {int(disk["key"]): disk for disk in manifest["disks"]}
    for disk in disks:
        entry = held.get(disk.key)
        if entry is None or entry["uuid"] != disk.uuid or entry["capacity_bytes"] != disk.capacity_bytes:
            problems.append(f"it does not hold '{disk.label}' as it is now")
    if problems:
        raise RepositoryError(_WHAT, subject=f"{name} of {store.shown}", reason="; ".join(problems), remedy=remedy)
