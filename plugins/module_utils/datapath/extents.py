# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Areas of a disk: sorted, disjoint ranges of bytes, and the arithmetic a backup needs.

A disk can have a million changed areas, so they lie in two arrays of 64-bit numbers (16 bytes an area) and every
operation is one pass over them.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import operator
import random
from array import array
from typing import Iterable, Iterator, List, Optional, Tuple

# Areas that come out of order are sorted in chunks of this many, then merged: the memory for tuples stays small.
_SORT_CHUNK = 32768


class _Builder:
    """Collects ranges that come sorted by their start; what overlaps or touches becomes one."""

    def __init__(self) -> None:
        self.starts = array("Q")
        self.ends = array("Q")

    def extend(self, ranges: Iterable[Tuple[int, int]]) -> _Builder:
        """Take (start, end) ranges; empty ones vanish."""
        starts, ends = self.starts, self.ends
        last_end = ends[-1] if ends else -1
        for start, end in ranges:
            if start >= end:
                continue
            if start > last_end:
                starts.append(start)
                ends.append(end)
                last_end = end
            elif end > last_end:
                ends[-1] = last_end = end
        return self

    def done(self) -> Extents:
        return Extents(self.starts, self.ends)


class Extents:
    """Sorted, disjoint, not adjacent areas of a disk. Immutable.

    Iterating yields (offset, length) in bytes, ascending.
    """

    __slots__ = ("_starts", "_ends", "_total")

    def __init__(self, starts: array[int], ends: array[int]) -> None:
        """For this module: *starts* and *ends* must be sorted and disjoint already. Others use :meth:`of`."""
        self._starts = starts
        self._ends = ends
        self._total = sum(ends) - sum(starts)

    @classmethod
    def of(cls, areas: Iterable[Tuple[int, int]] = ()) -> Extents:
        """Areas from (offset, length) in bytes, in any order, overlapping or adjacent. Read as a stream.

        :raises ValueError: an offset or a length is negative.
        """
        runs: List[Tuple[array[int], array[int]]] = []
        builder = _Builder()
        chunk: List[Tuple[int, int]] = []
        for offset, length in areas:
            if offset < 0 or length < 0:
                raise ValueError(f"an area can't be at {offset} with {length} bytes")
            chunk.append((offset, offset + length))
            if len(chunk) == _SORT_CHUNK:
                builder = cls._take(chunk, builder, runs)
                chunk = []
        builder = cls._take(chunk, builder, runs)
        if not runs:
            return builder.done()
        runs.append((builder.starts, builder.ends))
        return _Builder().extend(heapq.merge(*[zip(starts, ends) for starts, ends in runs])).done()

    @staticmethod
    def _take(chunk: List[Tuple[int, int]], builder: _Builder, runs: List[Tuple[array[int], array[int]]]) -> _Builder:
        """Add a chunk to the sorted run being built; begin a new run if the chunk starts before the run's last area."""
        chunk.sort()
        if chunk and builder.starts and chunk[0][0] < builder.starts[-1]:
            runs.append((builder.starts, builder.ends))
            builder = _Builder()
        return builder.extend(chunk)

    @classmethod
    def whole(cls, capacity_bytes: int) -> Extents:
        """One area that covers a disk of *capacity_bytes*."""
        return cls.of([(0, capacity_bytes)])

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        for start, end in zip(self._starts, self._ends):
            yield start, end - start

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extents):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        first = ", ".join(f"{offset}+{length}" for offset, length in zip(self._starts[:3], self._lengths(3)))
        more = ", ..." if len(self) > 3 else ""
        return f"<Extents {len(self)} areas, {self._total} bytes: {first}{more}>"

    def _lengths(self, count: int) -> List[int]:
        return [end - start for start, end in zip(self._starts[:count], self._ends[:count])]

    @property
    def total_bytes(self) -> int:
        """The sum of all lengths."""
        return self._total

    @property
    def end(self) -> int:
        """The first byte after the last area; 0 if there is none."""
        return self._ends[-1] if self._ends else 0

    def next_from(self, offset: int) -> Optional[int]:
        """The first byte at or behind *offset* that an area holds; None if there is none."""
        index = bisect.bisect_right(self._ends, offset)
        return max(offset, self._starts[index]) if index < len(self._starts) else None

    def union(self, other: Extents) -> Extents:
        """What either holds."""
        if not other:
            return self
        if not self:
            return other
        ranges = heapq.merge(zip(self._starts, self._ends), zip(other._starts, other._ends))
        return _Builder().extend(ranges).done()

    def intersect(self, other: Extents) -> Extents:
        """What both hold."""
        return _Builder().extend(self._common(other)).done()

    def _common(self, other: Extents) -> Iterator[Tuple[int, int]]:
        mine, theirs = zip(self._starts, self._ends), zip(other._starts, other._ends)
        a, b = next(mine, None), next(theirs, None)
        while a is not None and b is not None:
            start, end = max(a[0], b[0]), min(a[1], b[1])
            if start < end:
                yield start, end
            if a[1] < b[1]:
                a = next(mine, None)
            else:
                b = next(theirs, None)

    def subtract(self, other: Extents) -> Extents:
        """What this holds and *other* doesn't."""
        if not self or not other:
            return self
        return _Builder().extend(self._without(other)).done()

    def _without(self, other: Extents) -> Iterator[Tuple[int, int]]:
        holes = zip(other._starts, other._ends)
        hole = next(holes, None)
        for start, end in zip(self._starts, self._ends):
            while hole is not None and hole[0] < end:
                if hole[1] > start:
                    if hole[0] > start:
                        yield start, hole[0]
                    start = hole[1]
                    if start >= end:
                        break
                hole = next(holes, None)
            if start < end:
                yield start, end

    def clip(self, capacity_bytes: int) -> Extents:
        """What lies below *capacity_bytes*."""
        if self.end <= capacity_bytes:
            return self
        ranges = ((start, min(end, capacity_bytes)) for start, end in zip(self._starts, self._ends))
        return _Builder().extend(ranges).done()

    def round_out(self, granularity_bytes: int, capacity_bytes: int) -> Extents:
        """Every area grown to multiples of *granularity_bytes*, and cut at *capacity_bytes*.

        The last area may end at a capacity that is not a multiple; no other border is odd.
        """
        size = granularity_bytes
        ranges = (
            (start - start % size, min(end + -end % size, capacity_bytes))
            for start, end in zip(self._starts, self._ends)
            if start < capacity_bytes
        )
        return _Builder().extend(ranges).done()

    def joined(self, share: int) -> Extents:
        """Fewer areas: a gap of at most one *share*-th of the area behind it is taken in, so the whole grows by
        no more than that."""
        starts, ends = array("Q"), array("Q")
        for start, end in zip(self._starts, self._ends):
            if ends and (start - ends[-1]) * share <= end - start:
                ends[-1] = end
            else:
                starts.append(start)
                ends.append(end)
        return Extents(starts, ends)

    def sample(self, count: int, piece_bytes: int, dice: random.Random) -> Extents:
        """*count* pieces, each of *piece_bytes* of what this holds, drawn by *dice*; all of it if there are no more."""
        pieces = -(-self._total // piece_bytes)
        if pieces <= count:
            return self
        numbers = sorted(dice.sample(range(pieces), count))
        return _Builder().extend(self._drawn(numbers, piece_bytes)).done()

    def _drawn(self, numbers: Iterable[int], piece_bytes: int) -> Iterator[Tuple[int, int]]:
        """The pieces of these numbers, ascending, as if all areas lay end to end."""
        before = array("Q", itertools.accumulate(map(operator.sub, self._ends, self._starts), initial=0))
        for number in numbers:
            position, last = number * piece_bytes, min((number + 1) * piece_bytes, self._total)
            index = bisect.bisect_right(before, position) - 1
            while position < last:
                start = self._starts[index] + position - before[index]
                end = min(self._ends[index], start + last - position)
                yield start, end
                position += end - start
                index += 1

    def pieces(self, max_bytes: int) -> Iterator[Tuple[int, int]]:
        """The areas as (offset, length), cut at the multiples of *max_bytes* of the disk."""
        for start, end in zip(self._starts, self._ends):
            while start < end:
                cut = min(end, start - start % max_bytes + max_bytes)
                yield start, cut - start
                start = cut
