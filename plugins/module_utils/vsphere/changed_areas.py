# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The changed areas of a disk, all pages of them, or an error; never a part (VADP facts 1 and 9)."""

from __future__ import annotations

from typing import Any, Iterator, Optional, Tuple

from ..errors import AuthenticationError, PrivilegeError, VsphereError
from .faults import fault_name
from .inventory import VmRef
from .session import Session


# A page ends where it has its number of areas (2,000) or the disk ends. So many are not: then a full costs less.
_PAGE_AREAS = 16
_PAGE_BYTES = 1 << 30
_POOR_PAGES = 200
_MOST_AREAS = 8_000_000
_TOTAL_SECONDS = 4 * 3600


class ChangedAreasUnavailable(VsphereError):
    """The query failed or contradicts itself. The disk needs a full backup; "nothing changed" is never the answer."""


def query_changed_areas(
    session: Session, vm: VmRef, snapshot_obj: Any, device_key: int, capacity_bytes: int, change_id: str
) -> Iterator[Tuple[int, int]]:
    """What changed on a disk between *change_id* and a snapshot: (offset, length) in bytes, a page at a time.

    Areas lie on the borders of tracking blocks, hold false positives, and are clipped to the disk. Nothing may be done
    with them before the iterator has ended: only then it is certain that the pages cover the whole disk.

    :param snapshot_obj: the ``vim.vm.Snapshot``. :param device_key: the disk's key in that snapshot's configuration.
    :param capacity_bytes: the disk's size in that snapshot.
    :raises ChangedAreasUnavailable: at any point of the iteration.
    """
    subject = f"disk {device_key} of {vm}"
    offset = found = poor = 0
    deadline = session.clock() + _TOTAL_SECONDS
    while offset < capacity_bytes:
        page = _page(session, vm, snapshot_obj, device_key, offset, change_id, subject)
        following = page.startOffset + page.length
        problem: Optional[str] = None
        if page.startOffset != offset:
            problem = f"it answered for offset {page.startOffset}"
        elif following <= offset:
            problem = "it made no progress"
        elif following > capacity_bytes:
            problem = f"it answered up to {following}, past the disk's {capacity_bytes} bytes"
        elif session.clock() > deadline:
            problem = f"its pages took more than {_TOTAL_SECONDS} s"
        areas = len(page.changedArea)
        found += areas
        if following < capacity_bytes and areas < _PAGE_AREAS and page.length < _PAGE_BYTES:
            poor += 1
        if found > _MOST_AREAS or poor > _POOR_PAGES:
            problem = problem or f"its pages have no end ({found} areas, {poor} pages that say nearly nothing)"
        if problem:
            raise _contradiction(subject, offset, problem)
        for area in page.changedArea:
            if area.length <= 0 or not offset <= area.start < following:
                raise _contradiction(
                    subject, offset, f"it named the area {area.start}+{area.length} outside of {offset}..{following}"
                )
            end = min(area.start + area.length, capacity_bytes)
            yield area.start, end - area.start
        offset = following


def _page(
    session: Session, vm: VmRef, snapshot_obj: Any, device_key: int, offset: int, change_id: str, subject: str
) -> Any:
    what = "The changed areas are not known"
    try:
        return session.call(
            vm.obj.QueryChangedDiskAreas,
            snapshot_obj,
            device_key,
            offset,
            change_id,
            what=what,
            subject=subject,
            idempotent=True,
        )
    except (AuthenticationError, PrivilegeError):
        raise
    except VsphereError as error:
        if error.fault is None:
            raise  # no answer at all: a full backup would meet the same trouble
        unavailable = ChangedAreasUnavailable(
            what,
            subject=subject,
            reason=error.reason,
            remedy="Make a full backup of this disk",
            details={"fault": fault_name(error.fault), "offset": offset, "change_id": change_id},
        )
        unavailable.fault = error.fault
        raise unavailable from error


def _contradiction(subject: str, offset: int, problem: str) -> ChangedAreasUnavailable:
    return ChangedAreasUnavailable(
        "The changed areas are not known",
        subject=subject,
        reason=f"the server contradicted itself: asked for offset {offset}, {problem}",
        remedy="Make a full backup of this disk",
        details={"offset": offset},
    )
