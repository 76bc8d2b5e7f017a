# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The files of a point, as its manifest names them: why one is not what was written, as far as size and header tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Optional

from ..datapath import files
from ..datapath.hashes import hash_file
from ..datapath.image import Qcow2Header
from ..errors import RepositoryError


def file_entry(path: Path) -> Dict[str, Any]:
    """The manifest's entry for a file: {file, size_bytes, blake3}. It reads the whole file."""
    return {"file": path.name, "size_bytes": path.stat().st_size, "blake3": hash_file(str(path))}


def stored_problem(path: Path, stored: Dict[str, Any]) -> Optional[str]:
    """Why a file is not the one that the manifest names, as far as its size tells; None if nothing is wrong."""
    try:
        status = os.lstat(str(path))
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return f"the file can't be read: {error.strerror}"
    problem = files.kind_problem(status) or files.writers_problem(status)
    if problem is not None:
        return problem
    if status.st_size != stored["size_bytes"]:
        return f"the file has {status.st_size} bytes, {stored['size_bytes']} were written"
    return None


def header_problem(header: Qcow2Header, capacity_bytes: int, parent_file: Optional[str]) -> Optional[str]:
    """Why an image is not the layer it must be, from what its header says; None if nothing is wrong.

    :param parent_file: the bare name of the parent's layer; None for a full layer.
    """
    if header.capacity_bytes != capacity_bytes:
        return f"the image has {header.capacity_bytes} bytes, the disk has {capacity_bytes}"
    if header.external_data:
        return "it keeps its data in another file"
    if header.backing != parent_file:
        return f"its backing file is {header.backing!r}, not {parent_file!r}"
    if parent_file is not None and header.backing_format != "qcow2":
        return f"it states its backing file as {header.backing_format!r}, not 'qcow2'"
    return None


def incomplete(path: Path, problem: str) -> RepositoryError:
    return RepositoryError("The restore point is not complete", subject=str(path), reason=problem)
