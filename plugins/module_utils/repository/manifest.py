# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The manifest of a restore point: what it holds, where it came from, and the hashes that prove it.

``docs/schemas/restore-point-2.json` is its schema for other programs. The manifest is written last: without it the
point does not exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Optional

from ..datapath import files
from ..datapath.hashes import canonical_blake3
from ..errors import DamagedError, RepositoryError
from .shapes import (
    BLAKE3_PATTERN,
    CONTENT_ID_PATTERN,
    LARGEST_SEQUENCE,
    POINT_PATTERN,
    RUN_ID_PATTERN,
    SERVER_PATTERN,
    UUID_PATTERN,
    Shape,
    ShapeError,
    boolean,
    integer,
    list_of,
    mapping,
    nullable,
    number,
    one_of,
    record,
    text,
    time,
    to_json,
)

FORMAT = 2
#: Before content IDs, pins and sequence numbers. Such points are restored and built upon as ever.
FORMAT_WITHOUT_IDS = 1
FULL = "full"
INCREMENTAL = "incremental"
DIFFERENTIAL = "differential"

STORED_FILE: Shape = record({"file": text(), "size_bytes": integer(), "blake3": text(BLAKE3_PATTERN)})

_DISK_FIELDS: Dict[str, Shape] = {
    "key": integer(),
    "label": text(),
    "uuid": nullable(text()),
    "file": text(),
    "datastore": nullable(text()),
    "capacity_bytes": integer(512),
    "change_id": nullable(text()),
    "mode": one_of(FULL, INCREMENTAL, DIFFERENTIAL),
    "parent": nullable(text(POINT_PATTERN)),
    "reason": text(),
    "transport": text(),
    "bytes_read": integer(),
    "bytes_stored": integer(),
    "areas": integer(),
    "seconds": number(),
    "layer": STORED_FILE,
    "hashes": STORED_FILE,
}
_DISKS: Dict[int, Shape] = {
    FORMAT_WITHOUT_IDS: record(_DISK_FIELDS),
    FORMAT: record(
        {
            **_DISK_FIELDS,
            "content_id": text(CONTENT_ID_PATTERN),
            "parent_content_id": nullable(text(CONTENT_ID_PATTERN)),
            "parent_layer_blake3": nullable(text(BLAKE3_PATTERN)),
            "named_in_vm": boolean,
        },
        {
            # Where the name could not be written: the one that the virtual machine went on carrying.
            "vm_named": nullable(text(CONTENT_ID_PATTERN)),
            # A layer that took the place of others and shows what the newest of them showed (proofs 15).
            "merged": record({"content_id": text(CONTENT_ID_PATTERN), "layer_blake3s": list_of(text(BLAKE3_PATTERN))}),
        },
    ),
}


def check_disk(disk: Any, where: str, version: int = FORMAT) -> None:
    """The shape of a disk's entry in a manifest of that format: raises :class:`ShapeError`."""
    _DISKS[version](disk, where)
    if disk["capacity_bytes"] % 512:
        raise ShapeError(f"{where}.capacity_bytes", f"is not a multiple of 512: {disk['capacity_bytes']}")
    if (disk["mode"] == FULL) != (disk["parent"] is None):
        raise ShapeError(f"{where}.parent", f"is {disk['parent']!r}, and the layer {disk['mode']}")
    if version != FORMAT_WITHOUT_IDS:
        _check_ids(disk, where)


def check_finished_disk(disk: Any, where: str) -> None:
    """As :func:`check_disk`, of an entry in a run's record, which may be of a run that began before format 2."""
    check_disk(disk, where, FORMAT if isinstance(disk, dict) and "content_id" in disk else FORMAT_WITHOUT_IDS)


def _check_ids(disk: Dict[str, Any], where: str) -> None:
    # The parent's content ID is null where the parent is a point of format 1; its layer's hash never is.
    if (disk["parent"] is None) != (disk["parent_layer_blake3"] is None):
        raise ShapeError(f"{where}.parent_layer_blake3", f"is {disk['parent_layer_blake3']!r}, of {disk['parent']!r}")
    if disk["parent"] is None and disk["parent_content_id"] is not None:
        raise ShapeError(f"{where}.parent_content_id", "is there, and no parent is")
    if disk["content_id"] == disk["parent_content_id"]:
        raise ShapeError(f"{where}.content_id", "is that of the parent")
    if "merged" in disk and disk["merged"]["content_id"] != disk["content_id"]:
        raise ShapeError(f"{where}.merged.content_id", f"is {disk['merged']['content_id']}")


_FOREIGN_SNAPSHOT: Shape = record({"moid": text(), "name": text(empty=True), "created": time})

_FIELDS: Dict[str, Shape] = {
    "repository_id": text(UUID_PATTERN),
    "vm_uuid": text(UUID_PATTERN),
    "vm_name": text(),
    "vm_moid": text(),
    "point": text(POINT_PATTERN),
    "run_id": text(RUN_ID_PATTERN),
    "started": time,
    "finished": time,
    "seconds": number(),
    "snapshot": record(
        {
            "moid": nullable(text()),
            "name": nullable(text(empty=True)),
            "created": time,
            "quiesced": boolean,
            "foreign": list_of(_FOREIGN_SNAPSHOT),
        }
    ),
    "skipped_disks": list_of(record({"key": integer(), "label": text(), "reason": text()})),
    "configuration": STORED_FILE,
    "nvram": nullable(STORED_FILE),
    "tools": mapping(r".+", nullable(text())),
}
_OPTIONAL: Dict[str, Shape] = {"warnings": list_of(text()), "manifest_blake3": text(BLAKE3_PATTERN)}


def _check_old_disk(disk: Any, where: str) -> None:
    check_disk(disk, where, FORMAT_WITHOUT_IDS)


_MANIFESTS: Dict[int, Shape] = {
    FORMAT_WITHOUT_IDS: record(
        {**_FIELDS, "format": one_of(FORMAT_WITHOUT_IDS), "disks": list_of(_check_old_disk)}, _OPTIONAL
    ),
    FORMAT: record(
        {
            **_FIELDS,
            "format": one_of(FORMAT),
            "disks": list_of(check_disk),
            "sequence": integer(1, LARGEST_SEQUENCE),
            "server_uuid": text(SERVER_PATTERN),
        },
        _OPTIONAL,
    ),
}


def check_shape(manifest: Any) -> None:
    """Raise :class:`ShapeError` unless *manifest* is one, sealed or not."""
    version = manifest.get("format") if isinstance(manifest, dict) else None
    old = version == FORMAT_WITHOUT_IDS and not isinstance(version, bool)
    _MANIFESTS[FORMAT_WITHOUT_IDS if old else FORMAT](manifest, "")
    point = manifest["point"]
    if not manifest["disks"]:
        raise ShapeError("disks", "is empty")
    keys, ids = set(), set()
    for index, disk in enumerate(manifest["disks"]):
        where = f"disks[{index}]"
        if disk["key"] in keys:
            raise ShapeError(where + ".key", f"occurs twice: {disk['key']}")
        keys.add(disk["key"])
        if disk.get("content_id") is not None:
            if disk["content_id"] in ids:
                raise ShapeError(where + ".content_id", f"occurs twice: {disk['content_id']}")
            ids.add(disk["content_id"])
        if disk["parent"] == point:
            raise ShapeError(where + ".parent", f"is {point!r}, the point itself")
        # The names are fixed: a manifest can't point at a file of another point, nor out of the repository.
        _expect_file(disk["layer"], point + ".qcow2", where + ".layer")
        _expect_file(disk["hashes"], point + ".hashes", where + ".hashes")
    _expect_file(manifest["configuration"], point + ".json", "configuration")
    if manifest["nvram"] is not None:
        _expect_file(manifest["nvram"], point + ".nvram", "nvram")


def _expect_file(stored: Dict[str, Any], name: str, where: str) -> None:
    if stored["file"] != name:
        raise ShapeError(where + ".file", f"is {stored['file']!r}, not {name!r}")


def _hash(manifest: Dict[str, Any]) -> str:
    return canonical_blake3({name: value for name, value in manifest.items() if name != "manifest_blake3"})


def seal(manifest: Dict[str, Any]) -> Dict[str, Any]:
    """A copy of *manifest* with ``manifest_blake3``, the BLAKE3 of its canonical JSON without that key.

    :raises RepositoryError: the manifest is incomplete (a defect of the caller, told with the path of what is
        missing).
    """
    # Through JSON, so that what is hashed is what a reader will see.
    document: Dict[str, Any] = json.loads(to_json(manifest).decode("utf-8"))
    document.pop("manifest_blake3", None)
    try:
        check_shape(document)
    except ShapeError as error:
        raise RepositoryError(
            "The manifest is not complete", subject=str(manifest.get("point")), reason=str(error)
        ) from None
    document["manifest_blake3"] = _hash(document)
    return document


def validate(manifest: Any, path: str) -> Dict[str, Any]:
    """*manifest* itself, if it is a sealed and undamaged manifest.

    :param path: where it was read, for the message.
    :raises DamagedError: with the path of what is wrong inside the document.
    :raises RepositoryError: it has a newer format.
    """
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
        raise RepositoryError(
            "The restore point was written by a newer version",
            subject=path,
            reason=f"it has format {version}, this version knows format {FORMAT}",
            remedy="Upgrade the collection openvadp.backup",
        )
    try:
        check_shape(manifest)
    except ShapeError as error:
        raise _damaged(path, str(error)) from None
    if "manifest_blake3" not in manifest:
        raise _damaged(path, "manifest_blake3 is missing")
    if manifest["manifest_blake3"] != _hash(manifest):
        raise _damaged(path, "its content does not have the hash that was recorded in manifest_blake3")
    return dict(manifest)


def load(path: Path, vm_uuid: Optional[str] = None) -> Dict[str, Any]:
    """Read and check a manifest.

    The file must hold exactly the bytes that :func:`seal` and the commit wrote: JSON has more than one spelling
    of the same value (``\\u00e9``, ``1E3``), so a flipped bit may not change what the document means.

    :param vm_uuid: the VM under which it lies; the point's name must be that of the file.
    :raises FileNotFoundError: there is no such point.
    :raises DamagedError: the manifest is not what was written.
    """
    try:
        data = files.read(str(path), what="The manifest of a restore point can't be used")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RepositoryError("A manifest can't be read", subject=str(path), reason=error.strerror) from None
    try:
        document = files.parse(data)
        spelled = to_json(document)
    except (ValueError, RecursionError) as error:
        raise _damaged(str(path), f"it is not a JSON document of ours ({error})") from None
    manifest = validate(document, str(path))
    if spelled != data:
        raise _damaged(str(path), "it is not spelled as it was written")
    if manifest["point"] != path.name[: -len(".json")]:
        raise _damaged(str(path), f"it is the manifest of point {manifest['point']!r}")
    if vm_uuid is not None and manifest["vm_uuid"] != vm_uuid:
        raise _damaged(str(path), f"it belongs to the VM {manifest['vm_uuid']}")
    return manifest


def disk_of(manifest: Dict[str, Any], key: int) -> Optional[Dict[str, Any]]:
    """The entry of the disk with that device key, or None."""
    for disk in manifest["disks"]:
        if disk["key"] == key:
            found: Dict[str, Any] = disk
            return found
    return None


def entry_of(manifest: Dict[str, Any], key: int) -> Dict[str, Any]:
    """The entry of a disk that the point is known to hold. KeyError if it does not."""
    entry = disk_of(manifest, key)
    if entry is None:
        raise KeyError(f"point {manifest['point']} does not hold disk {key}")
    return entry


def _damaged(path: str, reason: str) -> DamagedError:
    return DamagedError(
        "The manifest of a restore point is damaged",
        subject=path,
        reason=reason,
        remedy="Use another restore point, and look for the cause with restore_point_verify",
    )
