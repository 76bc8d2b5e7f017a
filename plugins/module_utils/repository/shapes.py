# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Checks of the shape of a JSON document, with the path of what is wrong in the message.

A shape is a function of (value, where) that raises :class:`ShapeError`. The JSON schemas in docs/schemas say the
same for other programs; this is what the collection itself checks before it believes a file.
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any, Callable, Dict, Optional

Shape = Callable[[Any, str], None]

POINT_CHARACTERS = 128
POINT_PATTERN = rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{POINT_CHARACTERS - 1}}}"
UUID_PATTERN = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
# 128 random bits. Older manifests and records have ids that are made of the time.
NEW_RUN_ID_PATTERN = r"[0-9a-f]{32}"
RUN_ID_PATTERN = rf"(?:{NEW_RUN_ID_PATTERN}|[0-9]{{8}}T[0-9]{{6}}\.[0-9]{{6}}Z-[0-9a-f]{{8}})"
TIME_PATTERN = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z"
BLAKE3_PATTERN = r"[0-9a-f]{64}"
CONTENT_ID_PATTERN = r"[0-9a-f]{32}"
# Of a vCenter or, for a direct login, of a host's hardware; in lower case.
SERVER_PATTERN = r"[0-9a-z][0-9a-z-]{0,63}"


class ShapeError(ValueError):
    """A value is not what it must be; the message begins with its path in the document."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where or 'document'} {problem}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def text(pattern: Optional[str] = None, empty: bool = False) -> Shape:
    """A string, which matches *pattern* as a whole."""
    compiled = None if pattern is None else re.compile(pattern)

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str):
            raise ShapeError(where, f"is not a string: {_shown(value)}")
        if not value and not empty:
            raise ShapeError(where, "is empty")
        if compiled is not None and compiled.fullmatch(value) is None:
            raise ShapeError(where, f"has an unexpected form: {_shown(value)}")

    return check


#: The largest number that is read again once it is written.
LARGEST = (1 << 63) - 1
#: Of a point's sequence number: every reader of JSON tells it from the next one.
LARGEST_SEQUENCE = (1 << 53) - 1


def integer(minimum: int = 0, maximum: int = LARGEST) -> Shape:
    """A whole number; true and false are none."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ShapeError(where, f"is not an integer: {_shown(value)}")
        if value < minimum:
            raise ShapeError(where, f"is {value}, less than {minimum}")
        if value > maximum:
            raise ShapeError(where, f"is {value}, more than {maximum}")

    return check


def number(minimum: float = 0) -> Shape:
    """A number that is finite."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ShapeError(where, f"is not a number: {_shown(value)}")
        if not minimum <= value < float("inf"):
            raise ShapeError(where, f"is out of range: {_shown(value)}")

    return check


def boolean(value: Any, where: str) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise ShapeError(where, f"is neither true nor false: {_shown(value)}")


def one_of(*values: Any) -> Shape:
    """One of the values given."""

    def check(value: Any, where: str) -> None:
        # True == 1 in Python, but not in JSON.
        if not any(value == known and type(value) is type(known) for known in values):
            raise ShapeError(where, f"is {_shown(value)}, none of {', '.join(map(repr, values))}")

    return check


def nullable(shape: Shape) -> Shape:
    """null, or *shape*."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            shape(value, where)

    return check


def list_of(shape: Shape) -> Shape:
    """A list whose elements all have one shape."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise ShapeError(where, f"is not a list: {_shown(value)}")
        for index, element in enumerate(value):
            shape(element, f"{where}[{index}]")

    return check


def mapping(keys: str, shape: Shape) -> Shape:
    """An object whose keys match a pattern and whose values all have one shape."""
    compiled = re.compile(keys)

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ShapeError(where, f"is not an object: {_shown(value)}")
        for key, element in value.items():
            if not isinstance(key, str) or compiled.fullmatch(key) is None:
                raise ShapeError(where, f"has an unexpected key: {_shown(key)}")
            shape(element, f"{where}.{key}" if where else key)

    return check


def record(required: Dict[str, Shape], optional: Optional[Dict[str, Shape]] = None) -> Shape:
    """An object with these fields. Others may be there: a later version of the same format may add some."""
    extra = optional or {}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ShapeError(where, f"is not an object: {_shown(value)}")
        for name, shape in required.items():
            if name not in value:
                raise ShapeError(where, f"lacks {name!r}")
            shape(value[name], f"{where}.{name}" if where else name)
        for name, shape in extra.items():
            if name in value:
                shape(value[name], f"{where}.{name}" if where else name)

    return check


def time(value: Any, where: str) -> None:
    """A time in UTC, as ``2026-11-22T08:42:03Z``; fractions of a second are allowed."""
    text(TIME_PATTERN)(value, where)
    try:
        parse_time(value)
    except ValueError:
        raise ShapeError(where, f"is not a time: {_shown(value)}") from None


def parse_time(value: str) -> datetime:
    """The moment that a time of ours names. ValueError if it names none."""
    form = "%Y-%m-%dT%H:%M:%S.%fZ" if "." in value else "%Y-%m-%dT%H:%M:%SZ"
    return datetime.strptime(value, form).replace(tzinfo=timezone.utc)


def format_time(moment: datetime) -> str:
    """A moment as ``2026-11-22T08:42:03Z``."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_json(document: Any) -> bytes:
    """The bytes in which a document of ours lies on disk: sorted keys, two spaces, UTF-8, a line feed at the end."""
    text_ = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text_ + "\n").encode("utf-8")
