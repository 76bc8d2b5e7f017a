# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Text of others (names in an inventory, a repository or a guest, words of tools) as people get to see it.

Control characters move a terminal's cursor and more, bidirectional ones make a line read as another one, and halves of
characters can't be printed at all. All of them stand as escapes. This is the one function for that: module results
(:mod:`.runner`), tables, lines on the screen, names of files that are made after something.
"""

from __future__ import annotations

import unicodedata
from typing import Any, Collection

#: What a text of several lines keeps.
LINES = "\n\t"


def shown(text: str, keep: Collection[str] = "") -> str:
    """*text* with ``\\xNN``, ``\\n``, ``\\u202e`` in place of what would not stay where it is printed.

    :param keep: characters that stay as they are (:data:`LINES`).
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or _stays(letter) else _escaped(letter) for letter in text)


def _stays(letter: str) -> bool:
    # Spaces of other scripts are no danger, and stand in names.
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a name that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def shown_deep(value: Any) -> Any:
    """Plain data with every text in it, keys too, as :func:`shown` has it; line ends and tabs stay."""
    if isinstance(value, str):
        return shown(value, LINES)
    if isinstance(value, dict):
        return {shown(key, LINES) if isinstance(key, str) else key: shown_deep(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown_deep(item) for item in value]
    return value
