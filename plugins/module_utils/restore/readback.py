# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether two NBD servers serve the same bytes: both are read as a whole, what they say of holes is not believed."""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

from ..errors import DataPathError
from ..libraries import nbd

_PROGRESS_SECONDS = 0.5
_WAKE_MILLISECONDS = 250
_READ, _WRITE = 1, 2  # of aio_get_direction


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
        self.data = (bytearray(size), bytearray(size))
        self.buffers = tuple(nbd.Buffer.from_buffer(data) for data in self.data)
        self.offset = 0
        self.length = 0
        self.missing = 0

    def same(self) -> bool:
        if self.length == len(self.data[0]):
            return self.data[0] == self.data[1]
        return self.data[0][: self.length] == self.data[1][: self.length]


def first_difference(
    expected_uri: str,
    found_uri: str,
    capacity_bytes: int,
    *,
    on_progress: Optional[Callable[[int, int], None]] = None,
    io_timeout: float = 180,
    request_bytes: int = 1 << 20,
    depth: int = 8,
) -> Optional[int]:
    """Compare two disks; None if all bytes are the same, else the offset of the first piece that differs.

    :param expected_uri: NBD URI of the disk as it should be.
    :param found_uri: NBD URI of the disk as it is.
    :param on_progress: called with (done, total) bytes at most every 0.5 s, and at the end.
    :param io_timeout: seconds without any answer from a side that owes one.
    :param request_bytes: the size of a piece; *depth* of them are on their way at once.
    :raises DataPathError: one of the servers can't be read.
    """
    comparison = _Comparison(capacity_bytes, request_bytes, depth, io_timeout, on_progress)
    try:
        comparison.connect(expected_uri, found_uri)
        comparison.run()
    except nbd.Error as error:
        comparison.fail("a disk", error.string, error.errnum or 0)
    finally:
        comparison.close()
    # Raised only now: an exception would hold the connections open, and a server with one does not end.
    if comparison.failure is not None:
        raise comparison.failure
    if comparison.difference is None and on_progress is not None:
        on_progress(capacity_bytes, capacity_bytes)
    return comparison.difference


class _Comparison:
    """See :func:`first_difference`. Pieces come in any order: those below a difference are still waited for."""

    def __init__(
        self,
        capacity_bytes: int,
        request_bytes: int,
        depth: int,
        io_timeout: float,
        on_progress: Optional[Callable[[int, int], None]],
    ) -> None:
        self.capacity = capacity_bytes
        self.request_bytes = request_bytes
        self.io_timeout = io_timeout
        self.on_progress = on_progress
        self.sides: List[_Side] = []
        self.free = [_Pair(request_bytes) for _number in range(depth)]
        self.completed: Deque[Tuple[_Side, _Pair, int]] = deque()
        self.poller = select.poll()
        self.position = 0
        self.done_bytes = 0
        self.last_progress = time.monotonic()
        self.difference: Optional[int] = None
        self.failure: Optional[DataPathError] = None

    def connect(self, expected_uri: str, found_uri: str) -> None:
        for name, uri in (("the restore point", expected_uri), ("the disk that was written", found_uri)):
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
            while self.free and self.position < self.capacity and self.difference is None:
                self.read(self.free.pop())
            if not any(side.in_flight for side in self.sides):
                return
            self.turn()

    def read(self, pair: _Pair) -> None:
        pair.offset = self.position
        pair.length = min(self.request_bytes, self.capacity - self.position)
        pair.missing = len(self.sides)
        self.position += pair.length
        for side, data, buffer in zip(self.sides, pair.data, pair.buffers):
            if pair.length != self.request_bytes:
                buffer = nbd.Buffer.from_buffer(memoryview(data)[: pair.length])
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
            self.on_progress(self.done_bytes, self.capacity)

    def _complete(self, side: _Side, pair: _Pair, number: int) -> None:
        side.in_flight -= 1
        if number:
            self.fail(side.name, f"{os.strerror(number)} at byte {pair.offset}", number)
            return
        pair.missing -= 1
        if pair.missing:
            return
        self.done_bytes += pair.length
        if not pair.same() and (self.difference is None or pair.offset < self.difference):
            self.difference = pair.offset
        self.free.append(pair)

    def fail(self, name: str, reason: str, number: int) -> None:
        """Note the first failure; it ends the loop."""
        if self.failure is None:
            self.failure = DataPathError(
                f"Reading {name} back failed",
                reason=reason,
                retryable=number in (errno.ENOTCONN, errno.ETIMEDOUT),
                details={"errno": errno.errorcode.get(number, str(number))},
            )

    def close(self) -> None:
        """Close both connections at once; requests in flight are forgotten."""
        for side in self.sides:
            side.handle = None
        self.sides.clear()
        self.completed.clear()
        self.free.clear()
