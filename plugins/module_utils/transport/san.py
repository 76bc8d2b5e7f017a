# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The LUNs that this machine sees, by the names that vCenter knows them by (VADP facts 34, 36)."""

from __future__ import annotations

import os
import re
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

# Names of links in /dev/disk/by-id. The digit behind "scsi-" is the kind of the page-83 identifier: 3 is NAA, 2 EUI-64.
# A multipath device comes first: its paths are held by it, and nobody but it may open them.
_LINKS = (
    (re.compile(r"dm-uuid-mpath-3([0-9a-f]{16}(?:[0-9a-f]{16})?)"), "naa"),
    (re.compile(r"scsi-3([0-9a-f]{16}(?:[0-9a-f]{16})?)"), "naa"),
    (re.compile(r"wwn-0x([0-9a-f]{16}(?:[0-9a-f]{16})?)"), "naa"),
    (re.compile(r"naa\.([0-9a-f]{16}(?:[0-9a-f]{16})?)"), "naa"),
    (re.compile(r"(?:scsi-2|nvme-eui\.|eui\.)([0-9a-f]{16}(?:[0-9a-f]{16})?)"), "eui"),
)


def visible_luns(device_dir: str) -> Dict[str, str]:
    """Canonical name (``naa.600...``) -> path under *device_dir* of every disk there; partitions are left out.

    :param device_dir: a folder of links as ``/dev/disk/by-id``; one that does not exist shows no LUN.
    """
    try:
        names = sorted(os.listdir(device_dir))
    except OSError:
        return {}
    found: Dict[str, Tuple[int, str]] = {}
    for name in names:
        known = _canonical(name)
        path = os.path.join(device_dir, name)
        if known is None or not os.path.exists(path):
            continue
        rank, canonical = known
        if canonical not in found or rank < found[canonical][0]:
            found[canonical] = (rank, path)
    return {canonical: path for canonical, (_rank, path) in sorted(found.items())}


def _canonical(link: str) -> Optional[Tuple[int, str]]:
    """(rank of the kind of link, canonical name), or None if the link names no whole disk."""
    for rank, (pattern, prefix) in enumerate(_LINKS):
        match = pattern.fullmatch(link.lower())
        if match:
            return rank, f"{prefix}.{match.group(1)}"
    return None


def allow_list(extents: Iterable[str], luns: Mapping[str, str]) -> List[str]:
    """The devices that VDDK may open for a datastore with these extents, for its configuration file.

    :param luns: of :func:`visible_luns`.
    """
    return [os.path.realpath(luns[extent]) for extent in extents if extent in luns]
