# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which files of a repository are a run's own: nothing else may be removed because of what a record says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from ..datapath.image import fsync_dir
from ..errors import RepositoryError
from .store import VmStore
from .runs import Run
from .shapes import RUN_ID_PATTERN


def files_of(store: VmStore, runs: Sequence[Run]) -> Tuple[List[Path], Optional[str]]:
    """(the files of a VM's folder that are left of these runs and belong to no point, why others stay).

    An unfinished file is a run's if it carries the run's id; a finished one if it is of the run's point, the run's
    record names it, and that of no other run does. Only what is really there below the folder is looked at, so that a
    record can't name anything else.
    """
    parts, uncommitted = store.part_files(), store.uncommitted_files()
    ours = {run.run_id for run in runs}
    found = [path for path in parts if any(_carries(path, run_id) for run_id in ours)]
    others = {str(store.path / name) for run in store.runs() if run.run_id not in ours for name in _names(run)}
    named = {
        str(path)
        for run in runs
        for path in map(store.path.joinpath, _names(run))
        if path.stem == run.data["point"] and str(path) not in others
    }
    finished = [path for path in uncommitted if str(path) in named]
    if finished and not store.point_names() and len(uncommitted) > len(finished):
        # Without its manifests all that a repository holds looks like that.
        return found, (
            f"The folder {store.path} holds layers and no restore point at all: its manifests may be lost. The files of"
            f" points that crashed runs did not finish were left as well."
        )
    return found + finished, None


def _names(run: Run) -> List[str]:
    names = []
    for intent in run.intents("temporary_file"):
        files = intent.get("files")
        names += [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
        if isinstance(intent.get("stage"), str):
            names.append(intent["stage"])
    return names


def _carries(path: Path, run_id: str) -> bool:
    own = re.escape(run_id)
    return re.search(rf"\.part-{own}(?:-[0-9a-f]+)?$|^{own}\.", path.name) is not None


# As this collection names unfinished files: for a run, or for a moment.
_PART = re.compile(
    rf"(?P<name>.+)\.part-(?:(?P<run>{RUN_ID_PATTERN})(?:-[0-9a-f]{{12}})?|[0-9a-f]{{12}}|[0-9a-f]{{16}})"
)


def orphans(store: VmStore, runs: Sequence[Run]) -> List[Path]:
    """Unfinished files of ours in a VM's folder that belong to no run of which there is a record. Under the VM's lock,
    without which nobody writes there: whoever began them is dead.

    :param runs: all that have a record, whatever is thought of them.
    """
    known = {run.run_id for run in runs}
    found = []
    for path in store.part_files():
        part = _PART.fullmatch(path.name)
        if part is not None and not known & {part["run"], path.name.split(".", maxsplit=1)[0]}:
            found.append(path)
    return found


def remove_orphans(store: VmStore) -> None:
    """Remove the unfinished files of ours that belong to no run of which there is a record. Under the VM's lock.

    A process that is killed before its run has a record, or after it is removed, leaves nothing that names such a file.
    Hence everyone who writes does this first, and not vadp_recover alone.
    """
    if not store.report_only:
        for path in orphans(store, store.runs()):
            remove_file(path)


def remove_files_of(store: VmStore, runs: Sequence[Run]) -> None:
    """Remove what these runs, which are over, left in a VM's folder. Under the VM's lock."""
    for path in files_of(store, runs)[0]:
        remove_file(path)


def remove_file(path: Path) -> None:
    """Remove a file that a crash left, durably; one that is gone is fine."""
    try:
        path.unlink()
        fsync_dir(str(path.parent))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RepositoryError(
            "A file of a crashed run can't be removed", subject=str(path), reason=error.strerror
        ) from error
