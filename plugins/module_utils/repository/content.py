# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a layer stands on, told by content and not by a name (proofs 15).

A name can be used again: whoever deletes a point and makes another of that name puts other bytes under its children.
So each layer has a random content ID, drawn when its file is begun, and an overlay pins the ID and the hash of the
layer below it. Points of format 1 have neither; the hash that they stand on is written down once, in a file beside
the manifest (``points/<point>.pins``).
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from ..datapath import files
from ..datapath.hashes import read_content_id
from ..errors import DamagedError, DataPathError, RepositoryError
from .manifest import FORMAT_WITHOUT_IDS, FULL, disk_of
from .shapes import BLAKE3_PATTERN, POINT_PATTERN, UUID_PATTERN, mapping, one_of, record, text
from .trust import prefix_of

PINS_FORMAT = 1

_PINS = record(
    {
        "format": one_of(PINS_FORMAT),
        "vm_uuid": text(UUID_PATTERN),
        "point": text(POINT_PATTERN),
        "manifest_blake3": text(BLAKE3_PATTERN),
        "disks": mapping(
            r"[0-9]+", record({"parent": text(POINT_PATTERN), "parent_layer_blake3": text(BLAKE3_PATTERN)})
        ),
    }
)


def new_content_id() -> str:
    """An ID for a layer that is begun: 32 hexadecimal digits, of the system's randomness."""
    return secrets.token_hex(16)


def pins_of(manifest: Dict[str, Any], parents: Mapping[str, Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """The document that pins what the disks of a point of format 1 stand on. Pure.

    A parent that is not sound is not pinned: what is written down here is believed from then on.

    :param parents: manifests by the point's name.
    :returns: None where there is nothing to pin.
    """
    disks: Dict[str, Dict[str, str]] = {}
    for disk in manifest["disks"]:
        if disk["parent"] is None or manifest["format"] != FORMAT_WITHOUT_IDS:
            continue
        parent = parents.get(disk["parent"])
        below = None if parent is None else disk_of(parent, disk["key"])
        if below is not None and pin_problem(disk, below) is None:
            disks[str(disk["key"])] = {"parent": disk["parent"], "parent_layer_blake3": below["layer"]["blake3"]}
    if not disks:
        return None
    return {
        "format": PINS_FORMAT,
        "vm_uuid": manifest["vm_uuid"],
        "point": manifest["point"],
        "manifest_blake3": manifest["manifest_blake3"],
        "disks": disks,
    }


def read_pins(path: Path, manifest: Dict[str, Any]) -> Dict[str, str]:
    """{device key: hash of the layer below} of a point of format 1; empty where nobody has written them down yet.

    :raises DamagedError: the file can't be understood, or is of another point.
    """
    what, remedy = "The pins of a restore point are damaged", "Bring back the file from a copy of the repository"
    try:
        document = files.parse(files.read(str(path), what=what))
        _PINS(document, "")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RepositoryError("The pins of a restore point can't be read", str(path), error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(what, subject=str(path), reason=str(error), remedy=remedy) from None
    for name in ("vm_uuid", "point", "manifest_blake3"):
        if document[name] != manifest[name]:
            raise DamagedError(
                "The pins of a restore point are those of another one",
                subject=str(path),
                reason=f"they are of a manifest whose {name} is {document[name]}",
                remedy="See which of both was made by hand, and bring back the other from a copy of the repository",
            )
    return {key: pin["parent_layer_blake3"] for key, pin in document["disks"].items()}


def pin_problem(entry: Dict[str, Any], below: Dict[str, Any], old_pin: Optional[str] = None) -> Optional[str]:
    """Why the layer below a disk's is not the one that it was made upon; None if nothing shows that. Pure.

    :param entry: the disk in the manifest of the point above; *below*: in that of its parent.
    :param old_pin: the pinned hash of a point of format 1 (:func:`read_pins`).
    """
    parent = entry["parent"]
    wanted, found = entry.get("parent_content_id"), below.get("content_id")
    if "parent_content_id" in entry and wanted != found:
        return (
            f"point {parent} is not the one that it was made upon: that had the content ID {wanted or 'of no point'},"
            f" this one has {found or 'none'}"
        )
    if entry.get("content_id") is not None and entry["content_id"] == found:
        return f"its layer and that of point {parent} have one content ID, {found}"
    pinned = entry.get("parent_layer_blake3") or old_pin
    if pinned is not None and pinned != below["layer"]["blake3"] and not _merged(below, wanted, pinned):
        return f"the layer of point {parent} is another one than it was made upon (BLAKE3 differs)"
    return _order_problem(entry, below)


def _merged(below: Dict[str, Any], content_id: Optional[str], layer_blake3: str) -> bool:
    """Whether a layer took the place of one with that hash, and shows the same content."""
    merged = below.get("merged")
    if merged is None or content_id is None:
        return False
    return merged["content_id"] == content_id == below["content_id"] and layer_blake3 in merged["layer_blake3s"]


def _order_problem(entry: Dict[str, Any], below: Dict[str, Any]) -> Optional[str]:
    """Change IDs only go up (VADP facts 4), so a parent with a later one was made after its child."""
    parent = entry["parent"]
    if entry["mode"] == FULL:
        return None
    if below["uuid"] != entry["uuid"]:
        return f"point {parent} holds another disk ({below['uuid']})"
    now, then = entry["change_id"], below["change_id"]
    number_now, number_then = _number(now), _number(then)
    if prefix_of(now) != prefix_of(then) or number_now is None or number_then is None or number_then > number_now:
        return f"point {parent} was made after it: its change ID is {then!r}, that of the layer above is {now!r}"
    return None


def _number(change_id: Optional[str]) -> Optional[int]:
    number = (change_id or "").rpartition("/")[2]
    return int(number) if number.isascii() and number.isdecimal() else None


def stored_id_problem(path: Path, entry: Dict[str, Any]) -> Optional[str]:
    """Why the ``.hashes`` file of a layer is not of the content that the manifest names; None if nothing is wrong."""
    wanted = entry.get("content_id")
    if wanted is None:
        return None
    try:
        found = read_content_id(str(path))
    except (DamagedError, DataPathError) as error:
        return error.reason or error.what
    if found != wanted:
        return f"{path.name} has the content ID {found or 'of none'}, the manifest says {wanted}"
    return None
