# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which paths are meant: absolute paths in which ``*``, ``?``, ``[...]`` and ``**`` stand for others.

A pattern is matched name by name while directories are read, so that nothing is read that can't match.
"""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache
from typing import FrozenSet, Iterable, List, NamedTuple, Pattern, Sequence, Tuple

from ...errors import InputError

ANY_DEPTH = "**"
_MAGIC = re.compile(r"[*?\[]")

#: (number of the pattern, how many of its parts are done)
State = Tuple[int, int]


class Step(NamedTuple):
    """What a name means: the numbers of the patterns that select it itself, and what may be selected below it."""

    selected: FrozenSet[int]
    below: FrozenSet[State]
    #: The states that got here by a part without wildcards, and so may follow a symbolic link.
    literal: FrozenSet[State]


def parts_of(pattern: str) -> List[str]:
    """The names of a pattern. :raises InputError: it is not an absolute path, or leaves the root."""
    if not pattern.startswith("/"):
        raise InputError(
            "A path is not absolute", subject=repr(pattern), remedy="Begin it with /, also for a Windows volume"
        )
    if "\0" in pattern:
        raise InputError("A path holds a NUL", subject=repr(pattern))
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InputError("A path holds '..'", subject=repr(pattern), remedy="Give the path without it")
    return parts


@lru_cache(maxsize=1024)
def _compiled(part: str, ignore_case: bool) -> Pattern[str]:
    return re.compile(fnmatch.translate(part), re.IGNORECASE if ignore_case else 0)


def is_literal(part: str) -> bool:
    """Whether a part of a pattern is a name and nothing else."""
    return _MAGIC.search(part) is None


class Patterns:
    """Several patterns at once.

    :param patterns: the parts of each.
    :param ignore_case: names that differ in nothing but case are the same.
    """

    def __init__(self, patterns: Iterable[Sequence[str]], ignore_case: bool = False) -> None:
        self._patterns = [list(parts) for parts in patterns]
        self._ignore_case = ignore_case

    def start(self) -> Step:
        """The root directory."""
        below = self._with_any_depth({(number, 0) for number in range(len(self._patterns))})
        return Step(frozenset(state[0] for state in below if self._done(state)), below, frozenset())

    def step(self, states: FrozenSet[State], name: str) -> Step:
        """A name in a directory that was reached with *states*."""
        after = set()
        literal = set()
        selected = set()
        for number, position in states:
            if position >= len(self._patterns[number]):
                continue
            part = self._patterns[number][position]
            if part == ANY_DEPTH:
                after.add((number, position))
                if position + 1 == len(self._patterns[number]):
                    selected.add(number)
            elif self._same(part, name):
                after.add((number, position + 1))
                if is_literal(part):
                    literal.add((number, position + 1))
        below = self._with_any_depth(after)
        selected.update(state[0] for state in after if self._done(state))
        return Step(frozenset(selected), below, frozenset(literal))

    def rest(self, state: State) -> List[str]:
        """The parts of a pattern that are still to come."""
        return self._patterns[state[0]][state[1] :]

    def _done(self, state: State) -> bool:
        return state[1] >= len(self._patterns[state[0]])

    def _same(self, part: str, name: str) -> bool:
        if is_literal(part):
            return part == name or (self._ignore_case and part.casefold() == name.casefold())
        return _compiled(part, self._ignore_case).match(name) is not None

    def _with_any_depth(self, states: Iterable[State]) -> FrozenSet[State]:
        """ "**" also stands for no directory at all."""
        found = set(states)
        todo = list(found)
        while todo:
            number, position = todo.pop()
            parts = self._patterns[number]
            if position < len(parts) and parts[position] == ANY_DEPTH and (number, position + 1) not in found:
                found.add((number, position + 1))
                todo.append((number, position + 1))
        return frozenset(found)
