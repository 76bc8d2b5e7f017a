# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The JSON files of a repository: their names, formats and shapes, and the only code that reads and writes them.

Manifests, runs, marks and pins have modules of their own.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Dict, List

from ..datapath import files
from ..datapath.image import atomic_write
from ..errors import DamagedError, RepositoryError
from . import places
from .shapes import (
    LARGEST_SEQUENCE,
    POINT_PATTERN,
    UUID_PATTERN,
    Shape,
    ShapeError,
    integer,
    list_of,
    mapping,
    nullable,
    one_of,
    record,
    text,
    time,
    to_json,
)

#: Of vm.json: 2 counts the points.
FACTS_FORMAT = 2
#: Of repository.json. What knows format 1 alone neither writes nor recovers where it finds 2.
REPOSITORY_FORMAT = 2
REPOSITORY_FILE = "repository.json"
LOCK_FILE = "repository.lock"


_REPOSITORY_1 = record({"format": one_of(1), "id": text(UUID_PATTERN)})
_REPOSITORY_2 = record({"format": one_of(REPOSITORY_FORMAT), "id": text(UUID_PATTERN), "places": list_of(places.SHAPE)})


def check_description(document: Any, where: str) -> None:
    old = isinstance(document, dict) and document.get("format") == 1
    (_REPOSITORY_1 if old else _REPOSITORY_2)(document, where)


FACTS_FIELDS: Dict[str, Shape] = {
    "vm_uuid": text(UUID_PATTERN),
    "name": text(),
    "path": nullable(text()),
    "moid": nullable(text()),
    "bios_uuid": nullable(text()),
    "updated": time,
}
_OLD_FACTS = record({**FACTS_FIELDS, "format": one_of(1)})
_FACTS = record(
    {
        **FACTS_FIELDS,
        "format": one_of(FACTS_FORMAT),
        "sequence": integer(0, LARGEST_SEQUENCE),
        "format1_sequences": mapping(POINT_PATTERN, integer(1, LARGEST_SEQUENCE)),
    }
)


def check_facts(document: Any, where: str) -> None:
    old = isinstance(document, dict) and document.get("format") == 1
    (_OLD_FACTS if old else _FACTS)(document, where)


def read_description(root: Path) -> Dict[str, Any]:
    """repository.json, of any format that is known. :raises RepositoryError: a newer one, or it is damaged."""
    return read_json(
        root / REPOSITORY_FILE,
        "The repository's description is damaged",
        check_description,
        "Restore the file from a copy: its ID is in every manifest as repository_id",
        REPOSITORY_FORMAT,
    )


def names_in(folder: Path) -> List[str]:
    """The sorted names in a folder; none where it is not there. :raises RepositoryError: it can't be read."""
    try:
        return sorted(os.listdir(str(folder)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unusable(str(folder), error) from None


def unlink(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return


def read_json(path: Path, what: str, shape: Shape, remedy: str, newest: int) -> Dict[str, Any]:
    try:
        data = files.read(str(path), what=what)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unusable(str(path), error) from None
    try:
        document = files.parse(data)
        version = document.get("format") if isinstance(document, dict) else None
        if isinstance(version, int) and not isinstance(version, bool) and version > newest:
            raise RepositoryError(
                "The repository was written by a newer version",
                subject=str(path),
                reason=f"it has format {version}, this version knows format {newest}",
                remedy="Upgrade the collection openvadp.backup",
            )
        shape(document, "")
    except (ValueError, RecursionError) as error:
        raise DamagedError(what, subject=str(path), reason=str(error), remedy=remedy) from None
    result: Dict[str, Any] = document
    return result


def write_json(path: Path, document: Dict[str, Any], shape: Shape) -> None:
    try:
        shape(document, "")
        atomic_write(str(path), to_json(document))
    except ShapeError as error:
        raise RepositoryError(
            "A file of the repository is not complete", subject=str(path), reason=str(error)
        ) from None
    except OSError as error:
        raise unusable(str(path), error) from None


def unusable(path: str, error: OSError) -> RepositoryError:
    if error.errno == errno.ENOENT:
        return RepositoryError(
            "The repository was not found",
            subject=path,
            reason="there is no such folder",
            remedy="See that its file system is mounted, or create the folder for a new repository",
        )
    remedies = {
        errno.EACCES: "Give the user who runs the module access to it",
        errno.EPERM: "Give the user who runs the module access to it",
        errno.EROFS: "Mount its file system for writing",
        errno.ENOSPC: "Make room in the repository",
        errno.EDQUOT: "Make room in the repository",
        errno.ENOTDIR: "Name a folder",
        errno.ESTALE: "Mount its file system again",
    }
    return RepositoryError(
        "The repository is not usable", subject=path, reason=error.strerror, remedy=remedies.get(error.errno or 0)
    )
