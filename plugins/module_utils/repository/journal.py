# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a restore of changed areas is about to write: the whole list, on the disk before the first write.

Once the disk is written its changed areas can't be asked for again (VADP facts 12). They lie beside the run's record,
``runs/<run id>.<device key>.journal``, JSON lines: a header, then [offset, length] in bytes, sorted, then a line with
the BLAKE3 of all before it. They go together with the record.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from ..datapath import files
from ..datapath.extents import Extents
from ..datapath.image import atomic_write
from ..errors import DamagedError, RepositoryError
from ..libraries import blake3
from .runs import Run
from .shapes import BLAKE3_PATTERN, UUID_PATTERN, ShapeError, integer, nullable, one_of, record, text

FORMAT = 1

_HEADER = record(
    {
        "format": one_of(FORMAT),
        "vm_uuid": text(UUID_PATTERN),
        "key": integer(),
        "disk_uuid": nullable(text()),
        "capacity_bytes": integer(1),
        "point": text(),
        "manifest_blake3": text(BLAKE3_PATTERN),
    }
)


@dataclass(frozen=True)
class JournalOf:
    """What a journal belongs to: a disk, and the very point that goes into it.

    :param vm_uuid: instance UUID of the virtual machine. :param key: the disk's device key there.
    :param manifest_blake3: of the point: another one may be made under its name.
    """

    vm_uuid: str
    key: int
    disk_uuid: Optional[str]
    capacity_bytes: int
    point: str
    manifest_blake3: str


def write(run: Run, of: JournalOf, areas: Extents) -> None:
    """Keep what is about to be written of a disk; it is on the disk when this returns.

    :raises RepositoryError: it can't be written.
    """
    path = _path(run, of.key)
    lines = [json.dumps(dict(asdict(of), format=FORMAT), sort_keys=True)]
    lines += [f"[{offset},{length}]" for offset, length in areas]
    body = "".join(f"{line}\n" for line in lines).encode("utf-8")
    try:
        atomic_write(str(path), body + (json.dumps({"blake3": blake3.blake3(body).hexdigest()}) + "\n").encode("ascii"))
    except OSError as error:
        raise RepositoryError(
            "The journal of what is to be restored can't be written",
            subject=str(path),
            reason=error.strerror,
            remedy="See that the repository is mounted, writable and has free space; nothing was written to the disk",
        ) from None


def read(run: Run, of: JournalOf) -> Optional[Extents]:
    """What a run was about to write of a disk; None if it left no journal of that, or one that is damaged."""
    try:
        content = files.read(str(_path(run, of.key)), files.JOURNAL_BYTES)
    except (FileNotFoundError, DamagedError):
        return None
    except OSError as error:
        raise RepositoryError(
            "The journal of a restore can't be read", subject=str(_path(run, of.key)), reason=error.strerror
        ) from None
    body, newline, seal = content.rstrip(b"\n").rpartition(b"\n")
    body += newline
    try:
        if json.loads(seal.decode("ascii")) != {"blake3": blake3.blake3(body).hexdigest()}:
            return None
        lines = body.decode("utf-8").splitlines()
        header: Dict[str, Any] = json.loads(lines[0])
        _HEADER(header, "")
        if header != dict(asdict(of), format=FORMAT):
            return None
        return Extents.of(_areas(lines[1:], of.capacity_bytes))
    except (ValueError, IndexError, RecursionError):
        return None


def _areas(lines: List[str], capacity_bytes: int) -> Iterator[Tuple[int, int]]:
    for line in lines:
        offset, length = json.loads(line)
        if not 0 <= offset < offset + length <= capacity_bytes:
            raise ShapeError("areas", f"has {line}, outside of the disk")
        yield offset, length


def _path(run: Run, key: int) -> Path:
    return run.path.with_name(f"{run.run_id}.{key}.journal")
