# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Copy areas of a disk from one NBD server to another, hashing what is read.

One thread, one loop. Requests go out through libnbd's asynchronous calls, the loop waits in ``poll(2)`` for all
connections of both sides together, and completed requests arrive through callbacks that only take a note::

    areas -> plan (what is data, what is zeros) -> read -> zeros? -> write straight from the read buffer -> done
                 ^ block status, walked ahead                 -> hash

libnbd's binding gives the interpreter lock back in each of its calls, and so do poll and BLAKE3: several copies in
threads of one process run side by side. What stays under the lock is some 40 microseconds for each MiB.

A failure is noted, not raised from where it happens: an exception would hold the frames below it and with them the
connections, and an nbdkit with an open connection does not end (VADP facts 45). ``copy`` raises at its end, when all
is closed.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Sequence, Tuple

from ..errors import DataPathError, VadpError
from ..libraries import nbd
from . import buffers
from .extents import Extents
from .hashes import HashWriter
from .image import CLUSTER_BYTES

_CONTEXT = "base:allocation"
_STATE_ZERO = 2
#: The allocation of so much of the disk is asked for at a time, one question ahead of the reads. A source that is cut
#: into 4 KiB extents answers with 65,536 of them.
STATUS_BYTES = 256 << 20
# A request for zeros is no longer than this, so that progress moves and a server that writes them out answers in time.
_ZERO_BYTES = 32 << 20
# Zeros shorter than this are not worth a request of their own.
_ZERO_GRANULE = CLUSTER_BYTES
# What was copied is noted request by request; so many notes become areas at a time.
_NOTES = 65536
# How long the target may take to answer for what it was sent before the source failed.
_SETTLE_SECONDS = 30.0
_WAKE_SECONDS = 0.25
_PROGRESS_SECONDS = 0.5
_BURST_SECONDS = 0.25
# How long the servers may take to close: VDDK needs a while after a copy; after a failure the user waits.
_GOODBYE_SECONDS = 5.0
_LEAVE_SECONDS = 0.5
_READ, _WRITE = 1, 2  # of aio_get_direction

_LOST = (errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN)


@dataclass
class CopyResult:
    """What a copy did. Sizes in bytes.

    :param bytes_read: read from the source.
    :param bytes_written: sent to the target as data, the padding of the last cluster included.
    :param bytes_zero: parts of the areas that are zeros: known from the source, or found when read.
    :param areas: areas after rounding; without given areas, the source's runs of data.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_zero: int = 0
    areas: int = 0
    seconds: float = 0.0


class _Connection:
    """One libnbd handle."""

    __slots__ = ("handle", "fd", "in_flight", "ready")

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.fd = -1
        self.in_flight = 0
        self.ready = False


class _Side:
    """The source or the target: a server and the connections to it."""

    def __init__(self, name: str, uri: str) -> None:
        self.name = name
        self.uri = uri
        self.connections: List[_Connection] = []
        self.last_answer = 0.0

    @property
    def in_flight(self) -> int:
        return sum(connection.in_flight for connection in self.connections)

    def least_busy(self) -> _Connection:
        return min(self.connections, key=_in_flight)

    @property
    def handle(self) -> Any:
        """A handle to ask for what is the same on all connections."""
        return self.connections[0].handle

    def block_size(self) -> int:
        """The smallest request that the server takes; 0 if it does not say."""
        return int(self.handle.get_block_size(nbd.SIZE_MINIMUM))


def _in_flight(connection: _Connection) -> int:
    return connection.in_flight


class _Slot:
    """A buffer on its way: read, then written in one or more pieces."""

    __slots__ = ("lent", "memory", "buffer", "offset", "length", "read_bytes", "pending")

    def __init__(self, size: int) -> None:
        self.lent = buffers.borrow(size)
        self.memory = self.lent.memory
        self.buffer = self.lent.buffer
        self.offset = 0
        self.length = 0
        self.read_bytes = 0
        self.pending = 0


class _Allocation:
    """What the source says of its zeros: a window of known ranges that moves along with the plan.

    ``[start, end, is_zero]``, gapless from ``known_from`` to ``known_to``, neighbours differ. Behind the capacity all
    is zeros, up to *limit* (the end of the target's last cluster).
    """

    def __init__(self, capacity_bytes: int, limit: int, needed: Extents, status_bytes: int) -> None:
        self.status_bytes = status_bytes
        self.capacity = capacity_bytes
        self.limit = limit
        self.needed = needed
        self.entries: Deque[List[Any]] = deque()
        self.known_to = 0
        self.latest_from = 0
        self.asked = False

    def give_up(self, offset: int) -> None:
        """The source can't tell: all from *offset* on is data."""
        self._add(offset, [(self.capacity - offset, 0)])

    def learn(self, offset: int, ranges: Sequence[Tuple[int, int]]) -> None:
        """Take an answer: (length, flags) from *offset* on."""
        self.asked = False
        if ranges:
            self._add(offset, ranges)
        else:
            self.give_up(offset)

    def _add(self, offset: int, ranges: Sequence[Tuple[int, int]]) -> None:
        if offset != self.known_to:
            self.entries.clear()
        self.latest_from = offset
        for length, flags in ranges:
            end = min(offset + length, self.capacity)
            self._append(offset, end, bool(flags & _STATE_ZERO))
            offset = end
        if offset >= self.capacity:
            self._append(offset, self.limit, True)
            offset = self.limit
        self.known_to = offset

    def _append(self, start: int, end: int, is_zero: bool) -> None:
        if start >= end:
            return
        if self.entries and self.entries[-1][2] == is_zero:
            self.entries[-1][1] = end
        else:
            self.entries.append([start, end, is_zero])

    def covers(self, start: int, end: int) -> bool:
        return bool(self.entries) and self.entries[0][0] <= start and end <= self.known_to

    def at(self, position: int) -> List[Any]:
        """The range at *position*, which is known; what lies before it is forgotten."""
        while self.entries[0][1] <= position:
            self.entries.popleft()
        return self.entries[0]

    def question(self, position: int) -> Optional[Tuple[int, int]]:
        """What to ask next, as (offset, length), while the plan is at *position*; None if nothing."""
        if self.asked:
            return None
        offset: Optional[int] = position
        if self.covers(position, position + 1):
            # One answer ahead is enough, and only where it joins: an answer from far off would end the window.
            following = self.needed.next_from(self.known_to) if position >= self.latest_from else None
            joins = following is not None and following < self.known_to + self.status_bytes
            offset = self.known_to if joins else None
        if offset is None or offset >= self.capacity:
            return None
        return offset, min(self.status_bytes, self.capacity - offset, max(self.needed.end - offset, 1))


class _Bucket:
    """A token bucket for bytes. It starts empty and may go into debt by one request."""

    def __init__(self, rate: Optional[int]) -> None:
        self.rate = rate
        self.tokens = 0.0
        self.filled = time.monotonic()

    def wait(self, now: float) -> float:
        """Seconds until the next request may go out; 0 if it may now."""
        if self.rate is None:
            return 0.0
        self.tokens = min(self.rate * _BURST_SECONDS, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        return max(0.0, -self.tokens / self.rate)

    def take(self, count: int) -> None:
        if self.rate is not None:
            self.tokens -= count


class _Copy:
    """One copy in progress; see :func:`copy`."""

    def __init__(
        self,
        source: _Side,
        target: _Side,
        *,
        hashes: Optional[HashWriter],
        on_progress: Optional[Callable[[int, int], None]],
        rate_limit: Optional[int],
        slots: int,
        io_timeout: float,
        cancel: Optional[threading.Event],
        drop_zeros: bool,
    ) -> None:
        self.source = source
        self.target = target
        self.hashes = hashes
        self.on_progress = on_progress
        self.bucket = _Bucket(rate_limit)
        self.slot_count = slots
        self.free: List[_Slot] = []
        self.io_timeout = io_timeout
        self.cancel = cancel
        self.drop_zeros = drop_zeros
        self.failure: Optional[VadpError] = None
        self.lost_side: Optional[_Side] = None
        self.copied = Extents.of([])
        self.notes: List[Tuple[int, int]] = []
        self.settling = False
        self.result = CopyResult()
        self.poller = select.poll()
        self.by_fd: Dict[int, Tuple[_Side, _Connection]] = {}
        # What callbacks leave for the loop: (function, its arguments).
        self.completed: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = deque()
        self.capacity = 0
        self.now = time.monotonic()
        self.last_progress = self.now
        self.done_bytes = 0
        self.total_bytes = 0

    # Failures

    def fail(self, error: VadpError) -> None:
        """Note the first failure; it ends the loop."""
        if self.failure is None:
            self.failure = error

    def fail_side(self, side: _Side, doing: str, reason: str, number: int = 0, **details: Any) -> None:
        if self.settling and side is self.source:
            return  # it has failed already
        lost = number in _LOST
        if self.failure is None and (lost or number == errno.ETIMEDOUT):
            self.lost_side = side
        where = f" at byte {details['offset']}" if "offset" in details else ""
        self.fail(
            DataPathError(
                f"{doing} the {side.name} failed{where}",
                reason="the server closed the connection or died" if lost else reason,
                remedy=f"The log of the {side.name}'s server says more",
                retryable=lost or number == errno.ETIMEDOUT,
                details={"side": side.name, "errno": errno.errorcode.get(number, str(number)), **details},
            )
        )

    # Connections

    def connect(self, side: _Side, connections: int, contexts: Sequence[str] = ()) -> None:
        """Connect once, and more often if the server says that several connections see the same disk."""
        while self.failure is None and len(side.connections) < connections:
            if side.connections and not side.handle.can_multi_conn():
                return
            handle = nbd.NBD()
            handle.set_pread_initialize(False)
            for context in contexts:
                handle.add_meta_context(context)
            connection = _Connection(handle)
            side.connections.append(connection)
            self._call(side, "Connecting to", handle.aio_connect_uri, side.uri)
            side.last_answer = time.monotonic()
            # The handshake counts as a request that waits for its answer.
            connection.in_flight += 1
            while self.failure is None and not handle.aio_is_ready():
                self.turn()
            connection.in_flight -= 1
            connection.ready = True

    def _call(self, side: _Side, doing: str, function: Callable[..., Any], *args: Any, **details: Any) -> bool:
        """Call libnbd; False, and the failure is noted, if it refuses."""
        try:
            function(*args)
            return True
        except nbd.Error as error:
            self.fail_side(side, doing, error.string, error.errnum or 0, **details)
            return False

    def close(self) -> None:
        """Close every connection at once; requests in flight are forgotten."""
        for side in (self.source, self.target):
            for connection in side.connections:
                # A request in flight refers to its connection: only this ends the circle.
                connection.handle = None
            side.connections.clear()
        self.by_fd.clear()
        self.completed.clear()
        # What was in flight may be written to as long as libnbd remembers the request: that stays away.
        buffers.give_back(slot.lent for slot in self.free)
        self.free.clear()

    def disconnect(self, seconds: float) -> None:
        """Let what is in flight end, and say goodbye: a server that is left in the middle of a request can crash.

        Not to a side that is lost; and no longer than *seconds*, for what fails here no longer matters.
        """
        waiting = [
            connection
            for side in (self.source, self.target)
            if side is not self.lost_side
            for connection in side.connections
            if connection.ready
        ]
        said = set()
        deadline = time.monotonic() + seconds
        while waiting and time.monotonic() < deadline:
            for connection in list(waiting):
                handle = connection.handle
                try:
                    if connection not in said and not handle.aio_in_flight():
                        handle.aio_disconnect()
                        said.add(connection)
                    gone = handle.aio_is_closed() or handle.aio_is_dead()
                    if not gone:
                        handle.poll(20)
                except nbd.Error:
                    gone = True  # the server ended before it read the goodbye
                if gone:
                    waiting.remove(connection)

    # The loop

    def turn(self, wait: float = _WAKE_SECONDS) -> None:
        """Wait for any connection, let libnbd move, and handle what completed."""
        for side in (self.source, self.target):
            for connection in side.connections:
                handle = connection.handle
                if not connection.ready or connection.fd < 0:
                    # While it connects, the descriptor may change from address to address.
                    if connection.fd >= 0 and connection.fd != handle.aio_get_fd():
                        self._forget(connection)
                    connection.fd = handle.aio_get_fd()
                    self.by_fd[connection.fd] = (side, connection)
                direction = handle.aio_get_direction()
                events = (select.POLLIN if direction & _READ else 0) | (select.POLLOUT if direction & _WRITE else 0)
                self.poller.register(connection.fd, events)
        ready = self.poller.poll(max(0, int(wait * 1000 + 0.999)))
        self.now = time.monotonic()
        for fd, events in ready:
            side, connection = self.by_fd[fd]
            side.last_answer = self.now
            handle = connection.handle
            lost = ("", 0)
            try:
                if events & ~select.POLLOUT:
                    if handle.aio_get_direction() & _READ:
                        handle.aio_notify_read()
                    else:
                        handle.aio_notify_write()
                if events & select.POLLOUT and handle.aio_get_direction() & _WRITE:
                    handle.aio_notify_write()
                if handle.aio_is_dead() or handle.aio_is_closed():
                    lost = ("", errno.ENOTCONN)
            except nbd.Error as error:
                lost = (error.string, error.errnum or errno.ENOTCONN)
            # A request that failed says more than the connection that ended with it.
            self._drain()
            if lost[1]:
                self.fail_side(side, "Talking to", *lost)
            if self.failure is not None:
                return
        self._watch()

    def _forget(self, connection: _Connection) -> None:
        self.poller.unregister(connection.fd)
        del self.by_fd[connection.fd]

    def _drain(self) -> None:
        while self.completed and self.failure is None:
            function, args = self.completed.popleft()
            function(*args)

    def _watch(self) -> None:
        """Time-outs, cancelling, progress."""
        for side in (self.source, self.target):
            if self.now - side.last_answer > self.io_timeout and side.in_flight:
                reason = f"no answer for {self.io_timeout:g} s"
                self.fail_side(side, "Waiting for", reason, errno.ETIMEDOUT)
        if self.cancel is not None and self.cancel.is_set():
            self.fail(DataPathError("The copy was cancelled"))
        if self.on_progress is not None and self.now - self.last_progress >= _PROGRESS_SECONDS:
            self.last_progress = self.now
            self.on_progress(self.done_bytes, self.total_bytes)

    # What was done

    def note(self, offset: int, length: int) -> None:
        """The target has a range for good, and the hashes have it too."""
        self.notes.append((offset, length))
        if len(self.notes) >= _NOTES:
            self._add_notes()

    def _add_notes(self) -> None:
        self.copied = self.copied.union(Extents.of(self.notes))
        self.notes = []

    def settle(self) -> Optional[Extents]:
        """After the source failed: what was copied, so that another source can go on from there.

        All that was sent to the target must be answered for first: what may or may not be there can't be written
        again (a compressed cluster is written once) and is in the hashes already. None if the target does not answer,
        or fails too.
        """
        failure, self.failure = self.failure, None
        self.settling = True
        sources, self.source.connections = self.source.connections, []
        for connection in sources:
            if connection.fd in self.by_fd:
                self._forget(connection)
        deadline = time.monotonic() + min(_SETTLE_SECONDS, self.io_timeout)
        self._drain()
        while self.failure is None and self.target.in_flight and time.monotonic() < deadline:
            self.turn()
        settled = self.failure is None and not self.target.in_flight
        self.source.connections = sources
        self.failure = failure
        if not settled:
            return None
        self._add_notes()
        return self.copied.clip(self.capacity)

    def submit(
        self,
        side: _Side,
        doing: str,
        method: str,
        args: Tuple[Any, ...],
        offset: int,
        then: Callable[..., None],
        what: Any,
    ) -> None:
        """Send a request; ``then(what)`` is called by the loop when it has succeeded."""
        connection = side.least_busy()
        completed = self.completed

        def on_completion(error: Any) -> int:
            completed.append((self._completed, (side, connection, doing, error.value, offset, then, what)))
            return 1

        if not side.in_flight:
            side.last_answer = time.monotonic()
        if self._call(side, doing, getattr(connection.handle, method), *args, on_completion, offset=offset):
            connection.in_flight += 1

    def _completed(
        self,
        side: _Side,
        connection: _Connection,
        doing: str,
        number: int,
        offset: int,
        then: Callable[..., None],
        what: Any,
    ) -> None:
        connection.in_flight -= 1
        if number:
            self.fail_side(side, doing, os.strerror(number), number, offset=offset)
        else:
            then(what)

    # The plan

    def prepare(
        self,
        capacity_bytes: int,
        areas: Optional[Extents],
        align_bytes: int,
        request_bytes: int,
        status_bytes: int,
    ) -> None:
        """Fit the areas and the requests to what both servers can do."""
        self.capacity = capacity_bytes
        self.align = max(align_bytes, self.source.block_size(), self.target.block_size())
        rounded = capacity_bytes + -capacity_bytes % self.align
        self.limit = rounded if self.target.handle.get_size() >= rounded else capacity_bytes
        self.whole_disk = areas is None
        if areas is None:
            self.areas = Extents.whole(self.limit)
            self.total_bytes = capacity_bytes
        else:
            self.areas = areas.clip(capacity_bytes).round_out(self.align, self.limit)
            self.total_bytes = self.areas.clip(capacity_bytes).total_bytes
            self.result.areas = len(self.areas)
        if self.bucket.rate is not None:
            # Small enough to flow: some ten requests a second.
            request_bytes = min(request_bytes, self.bucket.rate // 10)
        self.request_bytes = max(self.align, request_bytes - request_bytes % self.align)
        self.granule = max(self.align, _ZERO_GRANULE)
        self.target_zeroes = self.target.handle.can_zero()
        self.zero_bytes = max(self.align, _ZERO_BYTES - _ZERO_BYTES % self.align)
        self.zeros: Optional[_Slot] = None
        if not self.target_zeroes and not self.drop_zeros:
            self.zero_bytes = self.request_bytes
            self.zeros = _Slot(self.request_bytes)
            self.zeros.memory[:] = bytes(self.request_bytes)
        self.allocation = _Allocation(capacity_bytes, self.limit, self.areas, status_bytes)
        if not self.source.handle.can_meta_context(_CONTEXT):
            self.allocation.give_up(0)
        self.slots_made = 0
        self.position = 0

    def _down(self, offset: int) -> int:
        return offset if offset >= self.limit else offset - offset % self.align

    def plan(self) -> Iterator[Optional[Tuple[int, int, bool]]]:
        """What to do next: (offset, length, is_zero), or None while the answer about the allocation is awaited.

        All borders are those of the target's clusters. A cluster is zeros only if all of it is.
        """
        allocation = self.allocation
        for start, length in self.areas:
            end = start + length
            position = start
            while position < end:
                self.position = position
                if not allocation.covers(position, position + 1):
                    yield None
                    continue
                entry = allocation.at(position)
                if entry[2]:
                    stop = min(self._down(entry[1]), end, position + self.zero_bytes)
                    if stop > position:
                        yield position, stop - position, True
                        position = stop
                        continue
                stop = min(end, position - position % self.request_bytes + self.request_bytes)
                if not allocation.covers(position, stop):
                    # Ask behind what is known.
                    self.position = max(position, allocation.known_to)
                    yield None
                    continue
                for entry_start, entry_end, is_zero in allocation.entries:
                    if entry_start >= stop:
                        break
                    zeros_from = entry_start + -entry_start % self.align
                    if is_zero and position < zeros_from < min(self._down(entry_end), stop):
                        stop = zeros_from
                        break
                yield position, stop - position, False
                position = stop

    def run(self) -> None:
        """Copy everything, then flush the target."""
        plan = self.plan()
        planned = False
        busy_limit = 2 * self.slot_count
        last_data_end = -1
        while self.failure is None:
            wait = self.bucket.wait(time.monotonic())
            while not planned and not wait and self.failure is None and self.target.in_flight < busy_limit:
                if not self.free and self.slots_made == self.slot_count:
                    break
                step = next(plan, False)
                if step is False:
                    planned = True
                    break
                self._ask()
                if step is None:
                    break
                offset, length, is_zero = step  # type: ignore[misc]
                if is_zero:
                    self._zeros(offset, length)
                    continue
                if self.whole_disk and offset != last_data_end:
                    self.result.areas += 1
                last_data_end = offset + length
                self._read(offset, length)
                wait = self.bucket.wait(time.monotonic())
            if planned and not self.source.in_flight and not self.target.in_flight:
                break
            self.turn(min(wait, _WAKE_SECONDS) if wait else _WAKE_SECONDS)
        self._flush()

    def _ask(self) -> None:
        question = self.allocation.question(self.position)
        if question is None:
            return
        offset, length = question
        self.allocation.asked = True
        ranges: List[Tuple[int, int]] = []

        def on_extents(context: str, start: int, entries: Sequence[int], error: Any) -> int:
            if context == _CONTEXT and not error.value and start == offset:
                ranges.extend(zip(entries[0::2], entries[1::2]))
            return 0

        connection = self.source.least_busy()
        completed = self.completed

        def on_completion(error: Any) -> int:
            completed.append((self._answered, (connection, offset, [] if error.value else ranges, error.value)))
            return 1

        if not self.source.in_flight:
            self.source.last_answer = time.monotonic()
        function = connection.handle.aio_block_status
        if self._call(self.source, "Asking", function, length, offset, on_extents, on_completion, offset=offset):
            connection.in_flight += 1

    def _answered(self, connection: _Connection, offset: int, ranges: List[Tuple[int, int]], number: int) -> None:
        """An answer about the allocation. A refusal costs time, not data: all is read then. A lost server is one."""
        connection.in_flight -= 1
        if number in _LOST:
            self.fail_side(self.source, "Asking", "", number, offset=offset)
        self.allocation.learn(offset, ranges)

    def _read(self, offset: int, length: int) -> None:
        if self.free:
            slot = self.free.pop()
        else:
            slot = _Slot(self.request_bytes)
            self.slots_made += 1
        slot.offset = offset
        slot.length = length
        slot.read_bytes = min(length, self.capacity - offset)
        self.bucket.take(slot.read_bytes)
        buffer = slot.buffer
        if slot.read_bytes != len(slot.memory):
            buffer = nbd.Buffer.from_buffer(slot.memory[: slot.read_bytes])
        self.submit(self.source, "Reading from", "aio_pread", (buffer, offset), offset, self._have_read, slot)

    def _have_read(self, slot: _Slot) -> None:
        """Send a buffer on: its runs of data as writes, its runs of zeros dropped or as zeros."""
        self.result.bytes_read += slot.read_bytes
        if slot.read_bytes < slot.length:
            slot.memory[slot.read_bytes : slot.length] = bytes(slot.length - slot.read_bytes)
        slot.pending = 1  # ours, until all writes are out and the hash is made
        start = position = slot.offset
        end = start + slot.length
        run_is_zero: Optional[bool] = None
        while position < end:
            stop = min(end, position - position % self.granule + self.granule)
            is_zero = slot.buffer.is_zero(position - slot.offset, stop - position)
            if is_zero != run_is_zero:
                if run_is_zero is not None:
                    self._send(slot, start, position, run_is_zero)
                start, run_is_zero = position, is_zero
            position = stop
        if run_is_zero is not None:
            self._send(slot, start, end, run_is_zero)
        if self.hashes is not None:
            if run_is_zero and start == slot.offset:
                self.hashes.add_zeros(slot.offset, slot.read_bytes)
            else:
                self.hashes.add(slot.offset, slot.memory[: slot.read_bytes])
        self._written(slot)

    def _send(self, slot: _Slot, start: int, end: int, is_zero: bool) -> None:
        if is_zero:
            self.result.bytes_zero += min(end, self.capacity) - start
            if self.drop_zeros:
                return
            if self.target_zeroes:
                slot.pending += 1
                self._submit_zero(start, end - start, self._written, slot)
                return
        self.result.bytes_written += end - start
        slot.pending += 1
        buffer = slot.buffer
        if end - start != len(slot.memory):
            buffer = nbd.Buffer.from_buffer(slot.memory[start - slot.offset : end - slot.offset])
        self.submit(self.target, "Writing to", "aio_pwrite", (buffer, start), start, self._written, slot)

    def _submit_zero(self, offset: int, length: int, then: Callable[..., None], what: Any) -> None:
        self.submit(self.target, "Writing zeros to", "aio_zero", (length, offset), offset, then, what)

    def _written(self, slot: _Slot) -> None:
        slot.pending -= 1
        if not slot.pending:
            self.done_bytes += slot.read_bytes
            self.note(slot.offset, slot.length)
            self.free.append(slot)

    def _zeros(self, offset: int, length: int) -> None:
        """A range that the source knows to be zeros."""
        inside = min(length, self.capacity - offset)
        self.result.bytes_zero += inside
        if self.hashes is not None and not self.whole_disk:
            self.hashes.add_zeros(offset, inside)
        if self.drop_zeros:
            self._zeroed((offset, length))
        elif self.zeros is None:
            self._submit_zero(offset, length, self._zeroed, (offset, length))
        else:
            self.result.bytes_written += length
            buffer = nbd.Buffer.from_buffer(self.zeros.memory[:length])
            self.submit(
                self.target, "Writing to", "aio_pwrite", (buffer, offset), offset, self._zeroed, (offset, length)
            )

    def _zeroed(self, area: Tuple[int, int]) -> None:
        offset, length = area
        self.done_bytes += min(length, self.capacity - offset)
        self.note(offset, length)

    def _flush(self) -> None:
        if self.failure is None and self.target.handle.can_flush():
            self.submit(self.target, "Flushing", "aio_flush", (), 0, self._flushed, None)
            while self.failure is None and self.target.in_flight:
                self.turn()

    def _flushed(self, what: None) -> None:
        return


def copy(
    source_uri: str,
    target_uri: str,
    *,
    capacity_bytes: int,
    areas: Optional[Extents] = None,
    hashes: Optional[HashWriter] = None,
    on_progress: Optional[Callable[[int, int], None]] = None,
    rate_limit: Optional[int] = None,
    connections: int = 2,
    depth: int = 16,
    request_bytes: int = 1 << 20,
    io_timeout: float = 180,
    align_bytes: int = CLUSTER_BYTES,
    status_bytes: int = STATUS_BYTES,
    zeros: str = "drop",
    cancel: Optional[threading.Event] = None,
) -> CopyResult:
    """Copy a disk, or areas of it, between two NBD servers; returns when the target has flushed.

    Each cluster (*align_bytes*) of the target is written at most once and as a whole, as the compress filter demands.
    The last one is padded with zeros if the target is large enough, else it is written as short as the disk is.

    :param source_uri: NBD URI; at least *capacity_bytes* large.
    :param target_uri: NBD URI; at least *capacity_bytes* large. What it has behind the last cluster stays.
    :param capacity_bytes: the disk's size.
    :param areas: what to copy; rounded out to *align_bytes*. None: the whole disk.
    :param hashes: gets what the areas hold, in any order. Of a whole disk it does not get what the source knows to be
        zeros without reading; everything else, zeros included, it gets.
    :param on_progress: called with (done, total) bytes at most every 0.5 s, and at the end.
    :param rate_limit: bytes a second read from the source.
    :param connections: at most so many to each side; one where the server does not offer more.
    :param depth: buffers of *request_bytes* in use for each connection.
    :param io_timeout: seconds without any answer from a side that owes one.
    :param align_bytes: the target's cluster; raised to a server's smallest request.
    :param status_bytes: each question about the source's allocation is for so much of the disk, less than 4 GiB.
    :param zeros: "drop": what is zeros is not written (a fresh layer that stands alone); "write": it is written as
        explicit zeros (an overlay, an existing disk).
    :param cancel: set by another thread to end the copy within a second.
    :raises DataPathError: names the side that failed first, in ``details`` with ``side``, ``errno`` and ``offset``;
        retryable if a server died or fell silent. If it was the source, ``copied`` is what another one need not read
        again: in the target, and in the hashes. None where nothing can be said of that.
    """
    if zeros not in ("drop", "write"):
        raise ValueError(f"zeros is 'drop' or 'write', not {zeros!r}")
    started = time.monotonic()
    source, target = _Side("source", source_uri), _Side("target", target_uri)
    job = _Copy(
        source,
        target,
        hashes=hashes,
        on_progress=on_progress,
        rate_limit=rate_limit,
        slots=connections * depth,
        io_timeout=io_timeout,
        cancel=cancel,
        drop_zeros=zeros == "drop",
    )
    finished = False
    try:
        job.connect(source, connections, [_CONTEXT])
        job.connect(target, connections)
        if job.failure is None:
            _check_sides(job, capacity_bytes)
        if job.failure is None:
            job.prepare(capacity_bytes, areas, align_bytes, request_bytes, status_bytes)
            job.run()
            finished = job.failure is None
        if isinstance(job.failure, DataPathError) and job.failure.details.get("side") == source.name:
            job.failure.copied = job.settle()
            job.failure.done = job.result
    finally:
        job.disconnect(_GOODBYE_SECONDS if finished else _LEAVE_SECONDS)
        job.close()
    if job.failure is not None:
        raise job.failure
    if on_progress is not None:
        on_progress(job.total_bytes, job.total_bytes)
    job.result.seconds = time.monotonic() - started
    return job.result


def _check_sides(job: _Copy, capacity_bytes: int) -> None:
    for side in (job.source, job.target):
        size = side.handle.get_size()
        if size < capacity_bytes:
            reason = f"it has {size} bytes, the disk {capacity_bytes}"
            job.fail(DataPathError(f"The {side.name} is smaller than the disk", reason=reason))
    if job.target.handle.is_read_only():
        job.fail(DataPathError("The target is served read-only"))
