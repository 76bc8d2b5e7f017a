# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tables of plain text for people, with numbered reasons below them."""

from __future__ import annotations

import textwrap
from typing import Any, Collection, List, Mapping, Optional, Sequence

from ansible.errors import AnsibleFilterError

from ..module_utils.shown import shown

Row = List[str]
NONE = "-"
_LEAST_WIDTH = 40


def require_results(results: Any, name: str, what: str) -> None:
    """Refuse input of filter *name* that is not a list of dictionaries. :param what: who made them, for the message."""
    if isinstance(results, (str, bytes, Mapping)) or not all(isinstance(result, Mapping) for result in results):
        raise AnsibleFilterError(f"{name} takes a list of what {what}.")


def format_bytes(count: Optional[int]) -> str:
    """A size as people read it: ``21.3 MiB``. None is a dash."""
    if count is None:
        return NONE
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def format_speed(count: Optional[int], seconds: Optional[float]) -> str:
    """MiB a second, or a dash where nothing was read or no time passed."""
    if not count or not seconds:
        return NONE
    return f"{count / seconds / (1 << 20):.1f}"


def disk_name(disk: Mapping[str, Any]) -> str:
    """Device key and label."""
    return f"{disk.get('key', '')} {disk.get('label', '')}".strip() or NONE


def fold(text: str, width: int, first: str = "", others: str = "  ") -> List[str]:
    """A text as lines of at most *width* columns."""
    return textwrap.wrap(
        shown(" ".join(text.split())), max(width, _LEAST_WIDTH), initial_indent=first, subsequent_indent=others
    )


class Notes:
    """Reasons, each said once and numbered in the order of their first use."""

    def __init__(self) -> None:
        self.texts: List[str] = []

    def mark(self, text: Optional[str]) -> str:
        """`` [n]`` to stand behind a word; nothing where there is no reason."""
        text = (text or "").strip()
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self, width: int) -> List[str]:
        out: List[str] = []
        for number, text in enumerate(self.texts, start=1):
            prefix = f"[{number}] "
            out += fold(text, width, prefix, " " * len(prefix))
        return out


def render(headings: Sequence[str], right: Collection[str], rows: Sequence[Row]) -> List[str]:
    """The lines of a table. :param right: the headings whose columns are aligned to the right."""
    table = [list(headings)] + [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]

    def line(row: Row) -> str:
        cells = [
            cell.rjust(size) if heading in right else cell.ljust(size)
            for cell, size, heading in zip(row, widths, headings)
        ]
        return "  ".join(cells).rstrip()

    return [line(table[0]), "  ".join("-" * size for size in widths)] + [line(row) for row in table[1:]]
