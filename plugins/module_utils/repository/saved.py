# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The configuration that was saved with a point, as it comes out of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Sequence

from ..datapath import files
from ..errors import DamagedError
from .shapes import integer, list_of, nullable, record, text

_WORDS = nullable(text(empty=True))
_ANYTHING = record({})
_VM = record({"name": text()}, dict.fromkeys(("folder", "datacenter", "datacenter_path", "instance_uuid"), _WORDS))
_SAVED = record(
    {},
    {
        "format": integer(1),
        "server": record({}, {"instance_uuid": _WORDS}),
        "vm": _VM,
        "disks": list_of(record({"key": integer(), "controller": _ANYTHING})),
        "config": _ANYTHING,
        "networks": nullable(list_of(_ANYTHING)),
        "host": _WORDS,
        "cluster": _WORDS,
        "resource_pool": _WORDS,
        "vm_path_name": _WORDS,
    },
)


def read_configuration(path: Path, needs: Sequence[str] = ()) -> Dict[str, Any]:
    """What ``vsphere.configuration.save`` returned.

    :param needs: parts without which the caller can do nothing.
    :raises DamagedError: it can't be read, is something else, or lacks one of those.
    """
    try:
        saved = files.parse(files.read(str(path)))
        record(dict.fromkeys(needs, _present))(saved, "")
        _SAVED(saved, "")
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    found: Dict[str, Any] = saved
    return found


def _present(_value: Any, _where: str) -> None:
    """Its type is looked at with the rest."""


def _damaged(path: Path, reason: str) -> DamagedError:
    return DamagedError(
        "The saved configuration of the restore point is damaged",
        subject=str(path),
        reason=reason,
        remedy="Restore another point, or the disks alone (target in_place, or file in another format than ova)",
    )
