# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What may be called how in a repository: VMs, disks, points and runs; and the times that choose a point.

All that becomes part of a path is checked here first. Pure: nothing is read or written.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Collection, Optional

from ..errors import InputError
from .shapes import POINT_CHARACTERS, POINT_PATTERN, RUN_ID_PATTERN, UUID_PATTERN

LATEST = "latest"
PART = ".part-"

UUID = re.compile(UUID_PATTERN)
POINT = re.compile(POINT_PATTERN)
# A time and its zone; a colon can't be in a point's name. YAML and JSON have forms of their own for what a user writes.
_MOMENT = re.compile(
    r"(?:before\s+)?(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<minute>[0-9]{2}:[0-9]{2})(?::(?P<second>[0-9]{2})"
    r"(?:\.(?P<fraction>[0-9]{1,6})0*)?)?\s?(?P<zone>[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
DISK_FOLDER = re.compile(r"disk-(0|[1-9][0-9]*)")
PART_FILE = re.compile(r".+\.part-[A-Za-z0-9._-]+")
RUN_FILE = re.compile(RUN_ID_PATTERN + r"\.json")


def check_point_name(name: str) -> str:
    """*name* itself, if a point may be called so. InputError otherwise."""
    if not isinstance(name, str) or POINT.fullmatch(name) is None:
        raise InputError(
            "This can't be the name of a restore point",
            subject=repr(name)[:200],
            reason=_name_problem(name),
            remedy="A name has 1 to 128 characters: letters, digits and . _ + -, and begins with a letter or a digit",
        )
    if name == LATEST or PART in name:
        raise InputError(
            "This name is reserved",
            subject=repr(name),
            reason=f"{LATEST!r} means the newest point, and {PART!r} marks unfinished files",
            remedy="Choose another name",
        )
    return name


def _name_problem(name: object) -> str:
    if not isinstance(name, str) or not name:
        return "it is empty"
    if len(name) > POINT_CHARACTERS:
        return f"it has {len(name)} characters"
    strange = "".join(dict.fromkeys(re.sub(r"[A-Za-z0-9._+-]", "", name)))
    return f"it holds {strange!r}" if strange else f"it begins with {name[0]!r}"


def moment_of(point: str) -> Optional[datetime]:
    """The time that *point* states instead of a name: ``2026-11-20T03:00Z``, ``before 2026-11-20T03:00:00+01:00``.

    :returns: in UTC; None if it states none, and so is a name or ``latest``.
    :raises InputError: it is meant as a time and is not one, or has no zone.
    """
    if not isinstance(point, str) or not (":" in point or point.startswith("before ")):
        return None
    found = _MOMENT.fullmatch(point.strip())
    reason = "it has another form, or no zone"
    if found is not None:
        part = found.groupdict()
        zone = "+00:00" if part["zone"] in "Zz" else part["zone"]
        try:
            return datetime.strptime(
                f"{part['day']}T{part['minute']}:{part['second'] or '00'}.{part['fraction'] or '0'}{zone}",
                "%Y-%m-%dT%H:%M:%S.%f%z",
            ).astimezone(timezone.utc)
        except (ValueError, OverflowError) as error:
            reason = str(error)
    raise InputError(
        "This is not a time that a restore point can be chosen by",
        subject=repr(point)[:200],
        reason=reason,
        remedy="Write it as 2026-11-20T03:00Z or 2026-11-20T03:00:00Z (UTC), or with an offset such as +01:00",
    )


def new_point_name(taken: Collection[str], now: datetime) -> str:
    """A name for a point that begins now: ``20261122T084203Z``, or with ``-2``, ``-3``... if that is taken."""
    base = now.astimezone(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def check_uuid(value: str) -> str:
    """*value* in lower case, if it is a UUID. InputError otherwise."""
    lowered = value.lower() if isinstance(value, str) else ""
    if UUID.fullmatch(lowered) is None:
        raise InputError(
            "This is not a UUID",
            subject=repr(value)[:200],
            remedy="It looks like 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a",
        )
    return lowered


def check_run_id(value: str) -> str:
    """*value* itself, if it can be the id of a run. InputError otherwise."""
    if not isinstance(value, str) or re.fullmatch(RUN_ID_PATTERN, value) is None:
        raise InputError(
            "This is not an id of a run", subject=repr(value)[:200], remedy="It has 32 random digits of 0-9 and a-f"
        )
    return value


def check_key(key: int) -> int:
    """*key* itself, if it is a device key. InputError otherwise."""
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise InputError(
            "This is not a device key of a disk", subject=repr(key)[:200], remedy="It is a number, such as 2000"
        )
    return key
