# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether, or where, two NBD servers serve the same bytes: what they say of holes is not believed, all is read."""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from array import array
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple

from ..datapath import buffers
from ..datapath.extents import Extents
from ..errors import DataPathError
from ..libraries import nbd

_PROGRESS_SECONDS = 0.5
_WAKE_MILLISECONDS = 250
_READ, _WRITE = 1, 2  # of aio_get_direction
# Where a part of a piece differs, its sectors are compared.
_PART_BYTES = 65536
_SECTOR_BYTES = 512
_WRITTEN = "the disk that was written"


class _Side:
    """One server and our connection to it."""

    def __init__(self, name: str, uri: str) -> None:
        self.name = name
        self.handle = nbd.NBD()
        self.in_flight = 1  # the handshake waits for an answer too
        self.last_answer = time.monotonic()
        self.handle.aio_connect_uri(uri)


class _Pair:
    """One piece of both disks on its way."""

    def __init__(self, size: int) -> None:
        self.lent = (buffers.borrow(size), buffers.borrow(size))
        self.data = tuple(lent.data for lent in self.lent)
        self.offset = 0
        self.length = 0
        self.missing = 0

    def same(self) -> bool:
        if self.length == len(self.data[0]):
            return self.data[0] == self.data[1]
        return self.data[0][: self.length] == self.data[1][: self.length]

    def differences(self) -> Iterator[Tuple[int, int]]:
        """(start, end) of the sectors that differ, in bytes of the disk, ascending; neighbours are not joined."""
        one, other = (lent.memory for lent in self.lent)
        for start in range(0, self.length, _PART_BYTES):
            end = min(start + _PART_BYTES, self.length)
            if one[start:end] == other[start:end]:
                continue
            whole, rest = divmod(end - start, _SECTOR_BYTES)
            sectors = struct.Struct(f"{_SECTOR_BYTES}s" * whole + (f"{rest}s" if rest else ""))
            pairs = zip(sectors.unpack(one[start:end]), sectors.unpack(other[start:end]))
            for number, (expected, found) in enumerate(pairs):
                if expected != found:
                    at = self.offset + start + number * _SECTOR_BYTES
                    yield at, at + len(found)


def first_difference(
    expected_uri: str,
    found_uri: str,
    capacity_bytes: int,
    *,
    areas: Optional[Extents] = None,
    on_progress: Optional[Callable[[int, int], None]] = None,
    io_timeout: float = 180,
    request_bytes: int = 1 << 20,
    depth: int = 8,
) -> Optional[int]:
    """Compare two disks; None if all bytes are the same, else the offset of the first piece that differs.

    :param expected_uri: NBD URI of the disk as it should be.
    :param found_uri: NBD URI of the disk as it is.
    :param areas: what is compared; None: all.
    :param on_progress: called with (done, total) bytes at most every 0.5 s, and at the end.
    :param io_timeout: seconds without any answer from a side that owes one.
    :param request_bytes: the size of a piece; *depth* of them are on their way at once.
    :raises DataPathError: one of the servers can't be read.
    """
    comparison = _Comparison(capacity_bytes, areas, request_bytes, depth, io_timeout, on_progress)
    comparison.stop_early = True
    _compare(comparison, expected_uri, found_uri, _WRITTEN)
    return comparison.difference


def differing_areas(
    expected_uri: str,
    found_uri: str,
    capacity_bytes: int,
    *,
    areas: Optional[Extents] = None,
    following: Optional[Callable[[Extents], Extents]] = None,
    on_progress: Optional[Callable[[int, int], None]] = None,
    io_timeout: float = 180,
    request_bytes: int = 1 << 20,
    depth: int = 8,
) -> Extents:
    """Where two disks differ, to the sector. Parameters and errors as of :func:`first_difference`.

    :param following: called once, with where *areas* differ; returns what is compared after them, over the same
        connections.
    """
    comparison = _Comparison(capacity_bytes, areas, request_bytes, depth, io_timeout, on_progress)
    comparison.following = following
    _compare(comparison, expected_uri, found_uri, "the disk")
    return comparison.differing()


def _compare(comparison: _Comparison, expected_uri: str, found_uri: str, found_name: str) -> None:
    try:
        comparison.connect(expected_uri, found_uri, found_name)
        comparison.run()
    except nbd.Error as error:
        comparison.fail("a disk", error.string, error.errnum or 0)
    finally:
        comparison.close()
    # Raised only now: an exception would hold the connections open, and a server with one does not end.
    if comparison.failure is not None:
        raise comparison.failure
    if comparison.difference is None or not comparison.stop_early:
        comparison.tell_end()


class _Comparison:
    """See :func:`first_difference`. Pieces come in any order: those below a difference are still waited for.

    ``different`` holds the start and the end of each part that differs, in any order.
    """

    def __init__(
        self,
        capacity_bytes: int,
        areas: Optional[Extents],
        request_bytes: int,
        depth: int,
        io_timeout: float,
        on_progress: Optional[Callable[[int, int], None]],
    ) -> None:
        wanted = Extents.whole(capacity_bytes) if areas is None else areas.clip(capacity_bytes)
        self.capacity = capacity_bytes
        self.total_bytes = wanted.total_bytes
        self.pieces = wanted.pieces(request_bytes)
        self.stop_early = False
        self.following: Optional[Callable[[Extents], Extents]] = None
        self.different = array("Q")
        self.request_bytes = request_bytes
        self.io_timeout = io_timeout
        self.on_progress = on_progress
        self.sides: List[_Side] = []
        self.free = [_Pair(request_bytes) for _number in range(depth)]
        self.completed: Deque[Tuple[_Side, _Pair, int]] = deque()
        self.poller = select.poll()
        self.done_bytes = 0
        self.last_progress = time.monotonic()
        self.difference: Optional[int] = None
        self.failure: Optional[DataPathError] = None

    def connect(self, expected_uri: str, found_uri: str, found_name: str) -> None:
        for name, uri in (("the restore point", expected_uri), (found_name, found_uri)):
            self.sides.append(_Side(name, uri))
        while self.failure is None and not all(side.handle.aio_is_ready() for side in self.sides):
            self.turn()
        for side in self.sides:
            side.in_flight = 0
            if self.failure is None and side.handle.get_size() < self.capacity:
                size = side.handle.get_size()
                self.fail(side.name, f"it has {size} bytes, the disk has {self.capacity}", 0)

    def run(self) -> None:
        while self.failure is None:
            # After a difference only what lies before it matters, and that is on its way already.
            while self.free and not (self.stop_early and self.difference is not None):
                area = next(self.pieces, None)
                if area is None:
                    break
                self.read(self.free.pop(), *area)
            if any(side.in_flight for side in self.sides):
                self.turn()
            elif self.following is not None:
                more, self.following = self.following(self.differing()).clip(self.capacity), None
                self.pieces = more.pieces(self.request_bytes)
                self.total_bytes += more.total_bytes
            else:
                return

    def differing(self) -> Extents:
        """Where the disks differ, as far as they were compared."""
        ends = self.different
        return Extents.of((ends[at], ends[at + 1] - ends[at]) for at in range(0, len(ends), 2))

    def read(self, pair: _Pair, offset: int, length: int) -> None:
        pair.offset = offset
        pair.length = length
        pair.missing = len(self.sides)
        for side, lent in zip(self.sides, pair.lent):
            buffer = lent.buffer
            if pair.length != self.request_bytes:
                buffer = nbd.Buffer.from_buffer(lent.memory[: pair.length])
            if not side.in_flight:
                side.last_answer = time.monotonic()
            side.in_flight += 1
            side.handle.aio_pread(buffer, pair.offset, self._on_completion(side, pair))

    def _on_completion(self, side: _Side, pair: _Pair) -> Callable[[Any], int]:
        completed = self.completed

        def note(error: Any) -> int:
            completed.append((side, pair, error.value))
            return 1

        return note

    def turn(self) -> None:
        by_fd: Dict[int, _Side] = {}
        for side in self.sides:
            direction = side.handle.aio_get_direction()
            events = (select.POLLIN if direction & _READ else 0) | (select.POLLOUT if direction & _WRITE else 0)
            descriptor = side.handle.aio_get_fd()
            by_fd[descriptor] = side
            self.poller.register(descriptor, events)
        ready = self.poller.poll(_WAKE_MILLISECONDS)
        now = time.monotonic()
        for descriptor, side in by_fd.items():
            events = dict(ready).get(descriptor, 0)
            if events:
                side.last_answer = now
                if events & ~select.POLLOUT and side.handle.aio_get_direction() & _READ:
                    side.handle.aio_notify_read()
                elif side.handle.aio_get_direction() & _WRITE:
                    side.handle.aio_notify_write()
            # While it connects, the descriptor may change.
            self.poller.unregister(descriptor)
            if side.handle.aio_is_dead() or side.handle.aio_is_closed():
                self.fail(side.name, "the server closed the connection or died", errno.ENOTCONN)
            elif side.in_flight and now - side.last_answer > self.io_timeout:
                self.fail(side.name, f"no answer for {self.io_timeout:g} s", errno.ETIMEDOUT)
        while self.completed and self.failure is None:
            self._complete(*self.completed.popleft())
        if self.on_progress is not None and now - self.last_progress >= _PROGRESS_SECONDS:
            self.last_progress = now
            self.on_progress(self.done_bytes, self.total_bytes)

    def tell_end(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.total_bytes, self.total_bytes)

    def _complete(self, side: _Side, pair: _Pair, number: int) -> None:
        side.in_flight -= 1
        if number:
            self.fail(side.name, f"{os.strerror(number)} at byte {pair.offset}", number)
            return
        pair.missing -= 1
        if pair.missing:
            return
        self.done_bytes += pair.length
        if not pair.same():
            if self.difference is None or pair.offset < self.difference:
                self.difference = pair.offset
            if not self.stop_early:
                for start, end in pair.differences():
                    if self.different and self.different[-1] == start:
                        self.different[-1] = end
                    else:
                        self.different.extend((start, end))
        self.free.append(pair)

    def fail(self, name: str, reason: str, number: int) -> None:
        """Note the first failure; it ends the loop."""
        if self.failure is None:
            self.failure = DataPathError(
                f"Reading {name} back failed",
                reason=reason,
                retryable=number in (errno.ENOTCONN, errno.ETIMEDOUT),
                details={
                    "errno": errno.errorcode.get(number, str(number)),
                    "side": "target" if self.sides and name == self.sides[-1].name else "source",
                },
            )

    def close(self) -> None:
        """Close both connections at once; requests in flight are forgotten."""
        for side in self.sides:
            side.handle = None
        self.sides.clear()
        self.completed.clear()
        # Not what was in flight: see _Copy.close.
        buffers.give_back(lent for pair in self.free for lent in pair.lent)
        self.free.clear()
