# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the modules tell of a repository: its points, and whether one of them is sound."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Dict, List, Optional

from ..errors import DamagedError, InputError
from ..libraries import jmespath
from .layout import Repository
from .names import LATEST, check_point_name, moment_of
from .store import VmStore
from .sequence import newest_before, of_server, servers_of
from .verify import point_problems, verify_point

_DISK_FIELDS = (
    "key",
    "label",
    "uuid",
    "capacity_bytes",
    "mode",
    "parent",
    "reason",
    "transport",
    "bytes_read",
    "bytes_stored",
    "seconds",
)


def describe_points(
    repository: Repository,
    *,
    vm_uuid: Optional[str] = None,
    vm_name: Optional[str] = None,
    point: Optional[str] = None,
    manifests: bool = False,
) -> List[Dict[str, Any]]:
    """The points of one VM or of all, sorted by the VM's name and UUID, then oldest first.

    Damaged ones come at the end of a VM.

    :param point: only the one of that name; or of each VM the latest, or the latest before a time, with the damaged
        ones: one of them may be later. Where points of several servers are here, the latest of each.
    :param manifests: with the whole manifest of each.
    :returns: as restore_point_info documents them. A damaged one has ``damaged`` true and says why in ``problem``.
    :raises RepositoryError: a VM was named that the repository does not hold.
    """
    if point not in (None, LATEST) and moment_of(str(point)) is None:
        check_point_name(str(point))
    if vm_uuid is None and vm_name is None:
        stores = repository.vms()
    else:
        stores = [repository.find_vm(vm_uuid=vm_uuid, vm_name=vm_name)]
    groups = [_points_of(store, point, manifests) for store in stores]
    groups = [group for group in groups if group]
    groups.sort(key=lambda group: (group[0]["vm_name"] or "", group[0]["vm_uuid"]))
    return [described for group in groups for described in group]


def describe_outcome(repository: Repository, run_id: str, *, manifests: bool = False) -> Dict[str, Any]:
    """What has come of a run, from the repository alone.

    :returns: {points, complete}: the point that it has made, or that was there when it began, as
        :func:`describe_points` does; and whether there is one with all its files, as far as sizes and headers tell.
    :raises RepositoryError: it can't be read.
    """
    found = repository.outcome_of(run_id)
    if found is None:
        return {"points": [], "complete": False}
    store, manifest = found
    points = _points_of(store, str(manifest["point"]), manifests)
    return {"points": points, "complete": not store.stored_problems(manifest)}


def _points_of(store: VmStore, point: Optional[str], manifests: bool) -> List[Dict[str, Any]]:
    readable, problems = store.read_points()
    numbers = store.sequences(readable)
    # The facts may be damaged; the newest manifest knows the name as well.
    name = readable[-1]["vm_name"] if readable else None
    moment = None if point is None else moment_of(point)
    if point == LATEST or moment is not None:
        readable = _newest(store, readable, moment)
    elif point is not None:
        readable = [manifest for manifest in readable if manifest["point"] == point]
        problems = {damaged: error for damaged, error in problems.items() if damaged == point}
    described = [_describe(manifest, numbers[manifest["point"]], manifests) for manifest in readable]
    for damaged in sorted(problems):
        described.append(
            {
                "vm_uuid": store.uuid,
                "vm_name": name,
                "point": damaged,
                "damaged": True,
                "problem": str(problems[damaged]),
                "disks": [],
            }
        )
    return described


def _newest(store: VmStore, readable: List[Dict[str, Any]], moment: Optional[datetime]) -> List[Dict[str, Any]]:
    """The newest point; of each server, where several occur. :raises RepositoryError: two have one number."""
    groups = [readable]
    servers = servers_of(readable)
    if len(servers) > 1:
        groups = [of_server(readable, server) or [] for server in servers]
    else:
        store.comparable(readable, "The latest restore point can't be determined")
    found = [newest_before(group, moment) for group in groups]
    kept = [manifest for manifest in found if manifest is not None]
    return [manifest for number, manifest in enumerate(kept) if manifest not in kept[:number]]


def _describe(manifest: Dict[str, Any], sequence: int, whole: bool) -> Dict[str, Any]:
    disks = manifest["disks"]
    modes = sorted({disk["mode"] for disk in disks})
    described = {
        "vm_uuid": manifest["vm_uuid"],
        "vm_name": manifest["vm_name"],
        "point": manifest["point"],
        "damaged": False,
        "problem": None,
        "sequence": sequence,
        "server_uuid": manifest.get("server_uuid"),
        "created": manifest["snapshot"]["created"],
        "started": manifest["started"],
        "finished": manifest["finished"],
        "seconds": manifest["seconds"],
        "quiesced": manifest["snapshot"]["quiesced"],
        "mode": modes[0] if len(modes) == 1 else "mixed",
        "bytes_read": sum(disk["bytes_read"] for disk in disks),
        "bytes_stored": sum(disk["bytes_stored"] for disk in disks),
        "disks": [{name: disk[name] for name in _DISK_FIELDS} for disk in disks],
        "skipped_disks": manifest["skipped_disks"],
    }
    if whole:
        described["manifest"] = manifest
    return described


def search(query: Optional[str], points: List[Dict[str, Any]]) -> Any:
    """What a JMESPath expression makes of the list; the list itself without one. InputError: it can't be applied."""
    if query is None:
        return points
    try:
        return jmespath.search(query, points)
    except jmespath.exceptions.JMESPathError as error:
        raise InputError(
            "The query can't be applied", subject=repr(query), reason=str(error), remedy="See https://jmespath.org"
        ) from None


def verify(store: VmStore, point: str, level: str) -> Dict[str, Any]:
    """Verify a point: {ok, vm_uuid, vm_name, point, level, problems, disks}; damage is reported, not raised.

    :param point: its name, ``latest``, or a time.
    :raises RepositoryError: there is no such point, or it was written by a newer version.
    """
    result: Dict[str, Any] = {"vm_uuid": store.uuid, "vm_name": None, "point": point, "level": level, "disks": []}
    try:
        manifest = store.resolve(point)
    except DamagedError as error:
        result.update(ok=False, problems=[str(error)])
        return result
    disks = verify_point(store, manifest, level)
    problems = point_problems(store, manifest)
    result.update(
        vm_name=manifest["vm_name"],
        point=manifest["point"],
        disks=disks,
        problems=problems,
        ok=not problems and all(disk["ok"] for disk in disks),
    )
    return result


def damage(result: Dict[str, Any]) -> DamagedError:
    """The error that a result of :func:`verify` stands for."""
    problems = list(result["problems"])
    for disk in result["disks"]:
        problems += [f"{disk['label']}: {problem}" for problem in disk["problems"]]
    shown = "; ".join(problem.rstrip(".") for problem in problems[:3])
    if len(problems) > 3:
        shown += f"; and {len(problems) - 3} more"
    return DamagedError(
        "The restore point is damaged",
        subject=f"{result['point']} of VM {result['vm_name'] or ''} ({result['vm_uuid']})".replace("  ", " "),
        reason=shown,
        remedy="Restore from a sound point, make a full restore point now, and look after the repository's storage",
    )
