# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The order of a VM's points (proofs 22). Pure: manifests in, order out.

The repository counts its points; no clock has a say. Points of format 1 were not counted: they get numbers once, by
the time of their snapshots, and lie below all others.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .shapes import parse_time

Manifest = Dict[str, Any]


def number_old(manifests: Sequence[Manifest], known: Mapping[str, int]) -> Dict[str, int]:
    """{point: number} of all points of format 1: those that are *known*; above them the others, by snapshot time."""
    old = [manifest for manifest in manifests if "sequence" not in manifest]
    numbers = {manifest["point"]: known[manifest["point"]] for manifest in old if manifest["point"] in known}
    last = max(known.values(), default=0)
    # Two snapshots may fall into one second; the run ids of that time count microseconds.
    for manifest in sorted((one for one in old if one["point"] not in known), key=_age):
        last += 1
        numbers[manifest["point"]] = last
    return numbers


def _age(manifest: Manifest) -> Tuple[datetime, str, str]:
    return parse_time(manifest["snapshot"]["created"]), str(manifest["run_id"]), str(manifest["point"])


def in_order(manifests: Sequence[Manifest], old: Mapping[str, int]) -> List[Manifest]:
    """Oldest first. :param old: of :func:`number_old`, for all of format 1 among *manifests*."""

    def place(manifest: Manifest) -> Tuple[bool, int, str]:
        counted = "sequence" in manifest
        return counted, manifest["sequence"] if counted else old[manifest["point"]], str(manifest["point"])

    return sorted(manifests, key=place)


def shared_numbers(manifests: Sequence[Manifest]) -> Dict[int, List[str]]:
    """{number: points} of the numbers that several points have: folders were put together by hand."""
    found: Dict[int, List[str]] = {}
    for manifest in manifests:
        if "sequence" in manifest:
            found.setdefault(manifest["sequence"], []).append(manifest["point"])
    return {number: points for number, points in sorted(found.items()) if len(points) > 1}


def servers_of(manifests: Sequence[Manifest]) -> Dict[str, Manifest]:
    """{server: its newest point} of the servers that are known to have points here; *manifests* oldest first."""
    return {manifest["server_uuid"]: manifest for manifest in manifests if "server_uuid" in manifest}


def newest_before(manifests: Sequence[Manifest], moment: Optional[datetime]) -> Optional[Manifest]:
    """Of manifests, oldest first, the last (*moment* None), or the one whose snapshot was taken last before *moment*.

    A time is the user's own word for a point, so it goes by what the server's clock said at the snapshot.
    """
    if moment is None:
        return manifests[-1] if manifests else None
    newest = None
    for manifest in manifests:
        created = parse_time(manifest["snapshot"]["created"])
        if created < moment and (newest is None or created >= parse_time(newest["snapshot"]["created"])):
            newest = manifest
    return newest


def of_server(manifests: Sequence[Manifest], server_uuid: Optional[str]) -> Optional[List[Manifest]]:
    """Those among which a newest one can be told, for who is connected to that server (None: to none).

    :returns: None if it can't: several servers occur, and none of them is the one that is connected.
    """
    servers = servers_of(manifests)
    if server_uuid in servers:
        # Where points of format 1 are from nobody knows; they lie below all others anyway.
        return [manifest for manifest in manifests if manifest.get("server_uuid") in (None, server_uuid)]
    return list(manifests) if len(servers) <= 1 else None
