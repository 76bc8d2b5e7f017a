# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Datacenters of a vCenter, and which host is in which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence

from ..errors import AmbiguousError, NotFoundError
from ..libraries import vim
from .inventory import readable
from .session import Session


@dataclass(frozen=True)
class Datacenter:
    """``path`` is its place in the inventory without the leading slash, ``folder/DC0``."""

    obj: Any
    moid: str
    name: str
    path: str


def all_datacenters(session: Session) -> List[Datacenter]:
    """Those that the user may see."""
    found = session.find(vim.Datacenter, ["name", "parent"])
    folders: Dict[str, Dict[str, Any]] = {}
    return [
        Datacenter(obj, obj._moId, readable(values["name"] or obj._moId), _path(session, obj, values, folders))
        for obj, values in found
    ]


def _path(session: Session, obj: Any, values: Dict[str, Any], folders: Dict[str, Dict[str, Any]]) -> str:
    parts = [values["name"] or obj._moId]
    above = values["parent"]
    # The root folder, which has no parent, is not part of a path.
    while above is not None:
        if above._moId not in folders:
            folders[above._moId] = session.read(above, "name", "parent")
        read = folders[above._moId]
        if read["parent"] is None:
            break
        parts.append(read["name"] or above._moId)
        above = read["parent"]
    return "/".join(readable(part) for part in reversed(parts))


def find_datacenter(session: Session, wanted: str) -> Datacenter:
    """The one of a name or a path. :raises NotFoundError: there is none; :raises AmbiguousError: there are several."""
    everyone = all_datacenters(session)
    fitting = [one for one in everyone if wanted in (one.name, one.path, f"/{one.path}")]
    if len(fitting) == 1:
        return fitting[0]
    kind = AmbiguousError if fitting else NotFoundError
    raise kind(
        "More than one datacenter fits" if fitting else "There is no such datacenter",
        subject=f"'{wanted}'",
        reason=", ".join(f"/{one.path} ({one.moid})" for one in fitting or everyone) or None,
        remedy="Give its path" if fitting else "Check the spelling, or leave datacenter out",
    )


def of_hosts(session: Session, datacenters: Sequence[Datacenter]) -> Dict[str, Datacenter]:
    """Moid of a host -> its datacenter."""
    return {host._moId: one for one in datacenters for host, _values in session.find(vim.HostSystem, ["name"], one.obj)}


def shown(one: Datacenter, everyone: Sequence[Datacenter]) -> str:
    """Its name, or its path where two have that name."""
    return one.name if [other.name for other in everyone].count(one.name) == 1 else one.path
