# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks that hold neither what they held nor a restore point: a restore in place of them did not finish.

The record of that restore says so. It lies with the virtual machine that was written, or, where the repository knew
nothing of that one, with the machine whose point it was. So all must be looked at.
"""

from __future__ import annotations

from typing import Any, Dict, List

from ..errors import RepositoryError
from .layout import Repository
from .store import VmStore
from .runs import Run
from .shapes import parse_time


def restores_of(run: Run, vm_uuid: str) -> List[Dict[str, Any]]:
    """The intents of a run that are restores into a virtual machine."""
    return [intent for intent in run.intents("restore") if str(intent.get("vm_uuid")).lower() == vm_uuid.lower()]


def stores_of(repository: Repository, vm_uuid: str) -> List[VmStore]:
    """Whose runs left disks of a virtual machine half written; its own part comes first."""
    stores = sorted(repository.stores(), key=lambda store: (store.uuid != vm_uuid.lower(), store.uuid))
    return [store for store in stores if _in(store, vm_uuid)]


def half_written(repository: Repository, vm_uuid: str) -> List[Dict[str, Any]]:
    """The half-written disks of a virtual machine, by device key.

    :param vm_uuid: its instance UUID.
    :returns: [{key, point, point_vm, run_id, started}]; ``point_vm`` is the UUID of the machine that the point is of.
    :raises RepositoryError: a record of that machine's own runs can't be understood.
    """
    found = [entry for store in stores_of(repository, vm_uuid) for entry in _in(store, vm_uuid)]
    newest = {entry["key"]: entry for entry in sorted(found, key=lambda entry: parse_time(str(entry["started"])))}
    return [newest[key] for key in sorted(newest)]


def describe(entry: Dict[str, Any]) -> str:
    """A disk of :func:`half_written` in words."""
    return (
        f"disk {entry['key']} holds neither what it held nor a restore point: a restore of point {entry['point']} into"
        " it did not finish"
    )


def _in(store: VmStore, vm_uuid: str) -> List[Dict[str, Any]]:
    try:
        runs = store.runs() + store.foreign_runs()
    except RepositoryError:
        # A damaged record of another machine is reported where that one is worked on.
        if store.uuid == vm_uuid.lower():
            raise
        return []
    return [
        {
            "key": key,
            "point": intent.get("point"),
            "point_vm": intent.get("point_vm"),
            "run_id": run.run_id,
            "started": run.data["started"],
        }
        for run in runs
        for intent in restores_of(run, vm_uuid)
        for key in intent.get("half_written", [])
    ]
