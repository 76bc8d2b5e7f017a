# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks whose change tracking must not be believed.

Once a disk was written by a restore, its changed areas are wrong without any error (VADP facts 12), as they are
where tracking was switched on over a snapshot (VADP facts 7). So the mark is on the disk before the first write, in
``vms/<uuid>/trust.json``, and holds until change tracking was reset and a full restore point was made after that:
until a full point whose change ID has another first part than any that was known when the mark was set.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Sequence

from ..datapath import files
from ..datapath.image import atomic_write
from ..errors import DamagedError, RepositoryError
from .manifest import FULL, disk_of
from .shapes import (
    UUID_PATTERN,
    ShapeError,
    format_time,
    integer,
    list_of,
    nullable,
    one_of,
    parse_time,
    record,
    text,
    time,
    to_json,
)

if TYPE_CHECKING:
    from ..vsphere.disks import Disk
    from .points import VmPoints
    from .store import VmStore

FORMAT = 1

_TRUST = record(
    {
        "format": one_of(FORMAT),
        "vm_uuid": text(UUID_PATTERN),
        "not_trusted": list_of(
            record(
                {
                    "key": integer(),
                    "uuid": nullable(text()),
                    "since": time,
                    "reason": text(),
                    "change_id_prefixes": list_of(text()),
                }
            )
        ),
    }
)


def prefix_of(change_id: Optional[str]) -> Optional[str]:
    """The part of a change ID before the last slash, which names the tracking (VADP facts 4); None without a slash."""
    if not change_id:
        return None
    prefix, slash, number = change_id.rpartition("/")
    return prefix if slash and prefix and number else None


def marks(store: VmPoints) -> List[Dict[str, Any]]:
    """The marks of a VM: [{key, uuid, since, reason, change_id_prefixes}], oldest first, settled ones too."""
    found = [entry for path in store.trust_paths for entry in _marks_in(store, path)]
    return sorted(found, key=lambda entry: parse_time(entry["since"]))


def _marks_in(store: VmPoints, path: Path) -> List[Dict[str, Any]]:
    try:
        document = files.parse(files.read(str(path), what="The marks of disks not to be trusted can't be used"))
        _TRUST(document, "")
        if document["vm_uuid"] != store.uuid:
            raise ShapeError("vm_uuid", f"is {document['vm_uuid']}")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RepositoryError("The marks of disks not to be trusted can't be read", str(path), error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            "The marks of disks not to be trusted are damaged",
            subject=str(path),
            reason=str(error),
            remedy="Reset the VM's change tracking (vm_change_tracking, state=reset), then remove the file",
        ) from None
    found: List[Dict[str, Any]] = document["not_trusted"]
    return found


def mark(
    store: VmStore, key: int, reason: str, *, uuid: Optional[str] = None, change_id: Optional[str] = None
) -> Dict[str, Any]:
    """Mark a disk; the mark is on the disk when this returns. Under the VM's lock.

    :param reason: why, as the end of a sentence ("restored from point 20261122T084203Z").
    :param uuid: the disk's own UUID (``backing.uuid``); without it the mark goes by the device key alone.
    :param change_id: the disk's present change ID, where there is one: a full point counts only once its id begins
        otherwise.
    """
    known = {prefix_of(change_id)}
    for manifest in store.points():
        disk = disk_of(manifest, key)
        if disk is not None and _same(uuid, disk["uuid"]):
            known.add(prefix_of(disk["change_id"]))
    entry = {
        "key": key,
        "uuid": uuid,
        "since": format_time(datetime.now(timezone.utc)),
        "reason": reason,
        "change_id_prefixes": sorted(prefix for prefix in known if prefix is not None),
    }
    noted = _marks_in(store, store.trust_path)
    others = [other for other in noted if not (other["key"] == key and other["uuid"] == uuid)]
    _write(store, others + [entry])
    return entry


def in_force(
    found: Sequence[Dict[str, Any]], points: Sequence[Dict[str, Any]], key: int, uuid: Optional[str]
) -> Optional[Dict[str, Any]]:
    """The newest mark that still holds for a disk, or None. Pure.

    :param found: of :func:`marks`.
    :param points: manifests of the VM's points.
    """
    for entry in reversed(found):
        if entry["key"] == key and _same(uuid, entry["uuid"]) and not settled(entry, points):
            return dict(entry)
    return None


def settled(entry: Dict[str, Any], points: Sequence[Dict[str, Any]]) -> bool:
    """Whether a full point made after a reset has settled a mark. Pure."""
    for manifest in points:
        disk = disk_of(manifest, entry["key"])
        if disk is None or disk["mode"] != FULL or not _same(entry["uuid"], disk["uuid"]):
            continue
        prefix = prefix_of(disk["change_id"])
        if prefix is not None and prefix not in entry["change_id_prefixes"]:
            return True
    return False


def waiting_for_reset(
    found: Sequence[Dict[str, Any]], points: Sequence[Dict[str, Any]], disks: Iterable[Disk]
) -> List[Dict[str, Any]]:
    """[{key, label, since, reason}] of the disks whose mark holds as long as change tracking is not reset. Pure.

    Not those of which a reset made other change IDs already, or whose tracking is off: a full point will do.

    :param disks: as they are.
    """
    waiting = []
    for disk in disks:
        entry = in_force(found, points, disk.key, disk.uuid)
        if entry is not None and prefix_of(disk.change_id) in entry["change_id_prefixes"]:
            waiting.append({"key": disk.key, "label": disk.label, "since": entry["since"], "reason": entry["reason"]})
    return waiting


def forget_settled(store: VmStore) -> None:
    """Remove the marks that a full point has settled: the points that prove it may go one day. Under the VM's lock."""
    points: Optional[List[Dict[str, Any]]] = None
    for path in store.trust_paths:
        found = _marks_in(store, path)
        if found:
            points = store.points() if points is None else points
            left = [entry for entry in found if not settled(entry, points)]
            if left != found:
                _write(store, left, path)


def _same(one: Optional[str], other: Optional[str]) -> bool:
    return one is None or other is None or one == other


def _write(store: VmStore, entries: List[Dict[str, Any]], path: Optional[Path] = None) -> None:
    store.require_lock("mark a disk")
    path = path or store.trust_path
    document = {"format": FORMAT, "vm_uuid": store.uuid, "not_trusted": entries}
    try:
        _TRUST(document, "")
        atomic_write(str(path), to_json(document))
    except ShapeError as error:
        raise RepositoryError("A mark is not complete", subject=str(path), reason=str(error)) from None
    except OSError as error:
        raise RepositoryError(
            "The mark of a disk not to be trusted can't be written",
            subject=str(path),
            reason=error.strerror,
            remedy="See that the repository is mounted, writable and has free space; nothing was restored",
        ) from None
