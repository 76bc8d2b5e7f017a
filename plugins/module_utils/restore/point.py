# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The restore point that is read: found, and proved to be what was written, before anybody gets to see a byte of it."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from ..datapath.progress import DiskProgress, Progress
from ..errors import DamagedError, DataPathError, InputError, LockedError, RepositoryError
from ..repository.layout import Repository
from ..repository.names import LATEST, moment_of
from ..repository.store import VmStore
from ..repository.manifest import disk_of
from ..repository.verify import STRUCTURE, missing_problems, verify_point
from ..vsphere.session import Session
from .request import DiskChoice, RestoreRequest

# Only a check that lasts is worth a line of progress.
_QUIET_SECONDS = 2.0
# How reading a damaged point fails.
_MAY_BE_DAMAGE = (DataPathError, RepositoryError)


@dataclass(frozen=True)
class PointDisk:
    """A disk of the point. ``layer`` opens with qemu and stands on the whole chain; ``entry`` is the manifest's."""

    choice: DiskChoice
    entry: Dict[str, Any]
    layer: str

    @property
    def key(self) -> int:
        return int(self.entry["key"])

    @property
    def label(self) -> str:
        return str(self.entry["label"])

    @property
    def capacity_bytes(self) -> int:
        return int(self.entry["capacity_bytes"])


@dataclass(frozen=True)
class Point:
    """A restore point and the disks of it that are wanted, in the manifest's order."""

    repository: Repository
    store: VmStore
    manifest: Dict[str, Any]
    disks: List[PointDisk]

    @property
    def name(self) -> str:
        return str(self.manifest["point"])

    def __str__(self) -> str:
        return f"restore point {self.name} of {self.store.shown}"


def open_connected(request: RestoreRequest, stack: contextlib.ExitStack) -> Tuple[Point, Session]:
    """:func:`open_point` for a restore into a virtual machine, and the session, which *stack* ends.

    A named point is looked for before the login. ``latest`` is meant to be the newest of the server (proofs 22), so
    that must be known first.
    """
    if request.connection is None:
        raise RuntimeError("a connection is needed")
    if request.point != LATEST and moment_of(request.point) is None:
        point = open_point(request)
        return point, stack.enter_context(Session.connect(request.connection))
    session = stack.enter_context(Session.connect(request.connection))
    return open_point(request, session.server_uuid), session


def require_disks(store: VmStore, manifest: Dict[str, Any], keys: Iterable[int]) -> None:
    """:raises InputError: a device key is not one of the point's disks."""
    unknown = [key for key in keys if disk_of(manifest, key) is None]
    if unknown:
        known = ", ".join(f"{disk['key']} ('{disk['label']}')" for disk in manifest["disks"])
        raise InputError(
            "The restore point holds no such disk",
            subject=f"{', '.join(map(str, unknown))} at point {manifest['point']} of {store.shown}",
            reason=f"it holds {known}",
            remedy="Name disks of the point by their device keys",
        )


def open_point(request: RestoreRequest, server_uuid: Optional[str] = None) -> Point:
    """Find the point and its disks; nothing is read but manifests.

    :param server_uuid: the server that is connected.
    :raises InputError: a disk that is asked for is not in the point.
    :raises RepositoryError: no repository, VM or point of that name. DamagedError: its manifest is damaged.
    """
    repository = Repository.open(request.repository)
    store = repository.find_vm(vm_uuid=request.vm_uuid, vm_name=request.vm_name)
    manifest = store.resolve(request.point, server_uuid)
    choices = {choice.key: choice for choice in request.disks}
    require_disks(store, manifest, choices)
    disks = [
        PointDisk(
            choice=choices.get(disk["key"], DiskChoice(disk["key"])),
            entry=disk,
            layer=str(store.layer_path(disk["key"], manifest["point"])),
        )
        for disk in manifest["disks"]
        if not choices or disk["key"] in choices
    ]
    return Point(repository, store, manifest, disks)


@contextlib.contextmanager
def checked_beside(point: Point, progress: Progress) -> Iterator[Callable[[], None]]:
    """:func:`require_intact` in a thread, beside work whose result nobody sees before the check has ended well.

    Files that are missing or cut show before it begins. Most of such work waits for the disk. What is yielded waits
    for the check and raises what it raises; call it before the result becomes visible. A failure of the work that may
    come of damage is told after the check: damage is the better reason. Any other one ends the check at once.

    :raises DamagedError: on entering or on leaving, if the point is damaged.
    """
    _refuse(point, missing_problems(point.store, _wanted(point)))
    waiting, stop = threading.Event(), threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="check") as pool:
        check = pool.submit(require_intact, point, progress, waiting, stop)

        def proven() -> None:
            waiting.set()
            check.result()

        try:
            yield proven
        except BaseException as error:
            if isinstance(error, _MAY_BE_DAMAGE) and not isinstance(error, LockedError):
                proven()
            stop.set()
            raise
        else:
            proven()


class _Stopped(Exception):
    """Nobody wants to know any more."""


def require_intact(
    point: Point,
    progress: Progress,
    shown: Optional[threading.Event] = None,
    stop: Optional[threading.Event] = None,
) -> None:
    """Check every file that the wanted disks stand on: present, of the size and with the hash that were recorded.

    :param shown: progress is reported once this is set; None: from the beginning.
    :param stop: when set, the check ends without a result.
    :raises DamagedError: with all that is wrong; a damaged point is not restored.
    """
    reports: Dict[int, DiskProgress] = {}
    begun = time.monotonic()

    def report(key: int, done: int, total: int) -> None:
        if stop is not None and stop.is_set():
            raise _Stopped
        if key not in reports:
            if time.monotonic() - begun < _QUIET_SECONDS or not (shown is None or shown.is_set()):
                return
            label = next(disk.label for disk in point.disks if disk.key == key)
            reports[key] = progress.disk(key, f"{label}, check of the point", total)
        reports[key].update(done)

    results = verify_point(point.store, _wanted(point), STRUCTURE, report)
    problems = []
    for result in results:
        if result["key"] in reports:
            reports[result["key"]].finish("done" if result["ok"] else "failed")
        problems += [f"disk {result['key']}: {problem}" for problem in result["problems"]]
    _refuse(point, problems)


def _wanted(point: Point) -> Dict[str, Any]:
    """The manifest with the disks that are wanted alone."""
    return dict(point.manifest, disks=[disk.entry for disk in point.disks])


def _refuse(point: Point, problems: List[str]) -> None:
    if problems:
        raise DamagedError(
            "The restore point is damaged, and nothing was written",
            subject=str(point),
            reason="; ".join(problem.rstrip(". ") for problem in problems),
            remedy="Restore another point, and bring back the damaged files from a copy of the repository",
            details={"problems": problems},
        )
