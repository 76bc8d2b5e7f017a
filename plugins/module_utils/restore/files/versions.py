# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which versions of files the restore points of a virtual machine hold: one look into each of them, oldest first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from ...errors import DamagedError, VadpError
from ...repository.layout import Repository
from ...repository.manifest import disk_of
from .choice import require_reader
from .reader import Entry, TooMany, Unread
from .request import FilesRequest
from .run import Source, checksum_of, describe, opened, result_of, source_of

#: Volume and path.
_Place = Tuple[str, str]


@dataclass
class _Look:
    """What was found in one point.

    :param searched: names of the volumes that were searched.
    :param skipped: places of which nothing is known, nor of what lies below them.
    """

    versions: Dict[_Place, Tuple[Any, Dict[str, Any]]] = field(default_factory=dict)
    searched: Set[str] = field(default_factory=set)
    skipped: Set[_Place] = field(default_factory=set)

    def knows(self, place: _Place) -> bool:
        """Whether a place that was not found is not there."""
        volume, path = place
        if volume not in self.searched or (volume, "/") in self.skipped:
            return False
        steps = path.split("/")
        return not any((volume, "/".join(steps[:number])) in self.skipped for number in range(2, len(steps) + 1))


def list_versions(request: FilesRequest) -> Dict[str, Any]:
    """``vadp_file_restore`` with ``versions``.

    :returns: as :func:`.run.restore_files`, of the newest point that was searched; ``files`` has an element for each
        version of each file, and ``points`` tells which points were searched.
    :raises VadpError: no point can be searched, or one has more files than ``limit``.
    """
    request.check()
    require_reader(request)
    store = Repository.open(request.repository).find_vm(vm_uuid=request.vm_uuid, vm_name=request.vm_name)
    manifests, damaged = store.read_points()
    if not manifests:
        # It says so.
        store.resolve(request.point)
    deadline = time.monotonic() + request.timeout
    points: List[Dict[str, Any]] = [
        {"point": name, "created": None, "problem": str(error)} for name, error in sorted(damaged.items())
    ]
    looks: Dict[str, Optional[_Look]] = dict.fromkeys(sorted(damaged))
    result: Optional[Dict[str, Any]] = None
    skipped: List[Dict[str, Any]] = []
    warnings: List[str] = []
    failure: VadpError = DamagedError("No restore point can be searched", subject=store.shown)
    for manifest in manifests:
        name = manifest["point"]
        problem = None
        looks[name] = None
        try:
            source = source_of(request, store, manifest, manifests)
            if _is_as_parent(source, manifests, looks):
                looks[name] = looks[manifest["disks"][0]["parent"]]
            else:
                looks[name], result = _look(request, source, deadline)
                skipped += [dict(one, point=name) for one in result["skipped_files"]]
                warnings += [f"Point {name}: {text}" for text in result["warnings"]]
        except TooMany:
            raise
        except VadpError as error:
            if time.monotonic() >= deadline:
                raise
            failure, problem = error, str(error)
        points.append({"point": name, "created": manifest["snapshot"]["created"], "problem": problem})
    if result is None:
        raise failure
    warnings += [f"Point {one['point']} was not searched: {one['problem']}" for one in points if one["problem"]]
    return dict(
        result,
        point=[one["point"] for one in points if not one["problem"]][-1],
        files=_versions(looks),
        skipped_files=skipped,
        points=points,
        warnings=warnings,
    )


def _is_as_parent(source: Source, manifests: Sequence[Dict[str, Any]], looks: Dict[str, Optional[_Look]]) -> bool:
    """Whether a point's disks are those of another that was searched: nothing was stored for any of them."""
    disks = source.manifest["disks"]
    parents = [one for one in manifests if one["point"] in {disk["parent"] for disk in disks}]
    if len(parents) != 1 or looks.get(parents[0]["point"]) is None or len(parents[0]["disks"]) != len(disks):
        return False
    for disk in disks:
        before = disk_of(parents[0], disk["key"])
        if before is None or disk["parent"] != parents[0]["point"]:
            return False
        if disk["areas"] or disk["bytes_read"] or disk["capacity_bytes"] != before["capacity_bytes"]:
            return False
    return True


def _look(request: FilesRequest, source: Source, deadline: float) -> Tuple[_Look, Dict[str, Any]]:
    look = _Look()
    with opened(request, source, deadline) as selection:
        volumes = selection.reader.volumes
        on_skipped = selection.skip

        def skip(volume: int, path: str, reason: str) -> None:
            look.skipped.add((volumes[volume]["name"], path))
            on_skipped(volume, path, reason)

        for volume, path in selection.skipped_places:
            look.skipped.add((volumes[volume]["name"], path))
        for entry in selection.entries:
            try:
                sha256 = checksum_of(request, selection.reader, entry)
            except Unread as error:
                skip(entry.volume, entry.path, str(error.reason))
                continue
            described = describe(entry, selection, sha256)
            look.versions[(volumes[entry.volume]["name"], entry.path)] = (_identity(entry, sha256), described)
        look.searched = {volumes[number]["name"] for number in selection.searched}
        return look, result_of(source, selection, [], changed=False)


def _identity(entry: Entry, sha256: Optional[str]) -> Any:
    """What makes a version: owners and modes do not."""
    return (entry.kind, entry.size, entry.mtime_ns, entry.target, sha256)


def _versions(looks: Dict[str, Optional[_Look]]) -> List[Dict[str, Any]]:
    """An element for each version of each file: by volume and path, then in the order of the points."""
    held: Dict[_Place, Dict[Any, List[str]]] = {}
    shown: Dict[Tuple[_Place, Any], Dict[str, Any]] = {}
    for point, look in looks.items():
        for place, (identity, described) in ({} if look is None else look.versions).items():
            held.setdefault(place, {}).setdefault(identity, []).append(point)
            shown.setdefault((place, identity), described)
    files = []
    for place in sorted(held):
        everywhere = {point for points in held[place].values() for point in points}
        rest = [(point, look) for point, look in looks.items() if point not in everywhere]
        for identity, points in held[place].items():
            files.append(
                dict(
                    shown[(place, identity)],
                    dest=None,
                    state="listed",
                    first_point=points[0],
                    last_point=points[-1],
                    points=points,
                    absent_from=[point for point, look in rest if look is not None and look.knows(place)],
                    unknown_in=[point for point, look in rest if look is None or not look.knows(place)],
                )
            )
    return files
