# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Memory for requests to NBD servers, which the next copy of this process uses again.

libnbd's Python binding (1.14) never lets go of what a request has used, so memory that is dropped stays with the
process: of each disk as much as was in flight.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, Dict, Iterable, List

from ..libraries import nbd


_CACHE_LINE = 64


def aligned(size_bytes: int) -> bytearray:
    """So many zero bytes that begin with a cache line.

    By itself a large bytearray begins 16 bytes behind one. There the kernel copies what is read from a file or a
    socket several times slower on some processors (measured on an AMD EPYC: 1.8 GB/s instead of 9).
    """
    data = bytearray(size_bytes + _CACHE_LINE)
    # Deleting from the front moves the start and copies nothing.
    del data[: -ctypes.addressof(ctypes.c_char.from_buffer(data)) % _CACHE_LINE]
    del data[size_bytes:]
    return data


class Memory:
    """So many bytes, a view of them, and the buffer by which libnbd knows them."""

    __slots__ = ("data", "memory", "buffer")

    def __init__(self, size_bytes: int) -> None:
        self.data = aligned(size_bytes)
        self.memory = memoryview(self.data)
        self.buffer: Any = nbd.Buffer.from_buffer(self.memory)


_lock = threading.Lock()
_free: Dict[int, List[Memory]] = {}


def borrow(size_bytes: int) -> Memory:
    """Memory that nobody else has; it holds anything."""
    with _lock:
        free = _free.get(size_bytes)
        if free:
            return free.pop()
    return Memory(size_bytes)


def give_back(memories: Iterable[Memory]) -> None:
    """No request may be in flight that uses it."""
    with _lock:
        for memory in memories:
            _free.setdefault(len(memory.memory), []).append(memory)
