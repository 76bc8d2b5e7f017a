# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether XFS' log holds changes that are not in their places.

Nothing is replayed here. Known to be complete are a file system that was unmounted, whose log ends with a record that
says so, and one that was frozen for the snapshot: Linux empties the log then, and leaves the superblock alone in it.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Iterator, List, NamedTuple, Optional, Tuple

from .filesystem import bytes_at

_BLOCK = 512
_MAGIC = 0xFEEDBABE
_LITTLE_ENDIAN = 1
_HEADER_HOLDS = 32768
# Linux writes at most eight records of 256 KiB at a time, in any order.
_AT_ONCE = 8 * (256 << 10) // _BLOCK
# What a frozen file system leaves is far smaller.
_MOST_PENDING = 2048
_OPERATION = struct.Struct(">IIBBH")
_START, _COMMIT, _CONTINUED, _UNMOUNT = 0x1, 0x2, 0x4 | 0x8 | 0x10, 0x20
_TRANSACTION = 0x5452414E
_BUFFER = 0x123C
_IN_USE = "its log was not empty when the snapshot was made"


class _Record(NamedTuple):
    """A record of the log. *at* is its first block, *end* the one behind it."""

    at: int
    end: int
    tail: int
    operations: int
    data: bytes


class _Damaged(ValueError):
    """The log does not hold what it should."""


def pending(volume: BinaryIO, begin: int, blocks: int) -> Optional[str]:
    """Why the file system is not known to be complete without its log; None if it is.

    :param begin: where the log lies in the volume, in bytes.
    :param blocks: so many of 512 bytes it has.
    """
    log = _Log(volume, begin, blocks)
    try:
        head = log.head()
        if head is None:
            return None
        last = log.record_before(head)
        if last.end % blocks != head % blocks:
            return f"{_IN_USE}: its last record was not written to its end"
        if last.operations == 1 and _OPERATION.unpack_from(last.data)[3] & _UNMOUNT:
            return None
        return log.changes(last.tail, head)
    except (struct.error, ValueError) as error:
        return f"its log can't be understood ({error})"


class _Log:
    def __init__(self, volume: BinaryIO, begin: int, blocks: int) -> None:
        if blocks < 2:
            raise _Damaged("it is too small")
        self._volume = volume
        self._begin = begin
        self._blocks = blocks

    def _read(self, block: int, count: int = 1) -> bytes:
        """Blocks, which go on at the begin of the log where it ends."""
        block %= self._blocks
        first = min(count, self._blocks - block)
        data = bytes_at(self._volume, self._begin + block * _BLOCK, first * _BLOCK)
        if first < count:
            data += bytes_at(self._volume, self._begin, (count - first) * _BLOCK)
        if len(data) != count * _BLOCK:
            raise _Damaged("the volume ends before it")
        return data

    def _cycle(self, block: int) -> int:
        return _cycle_of(self._read(block))

    def head(self) -> Optional[int]:
        """The block behind the newest record; None if there is none. As Linux finds it, by the numbers of blocks."""
        first, last = self._cycle(0), self._cycle(self._blocks - 1)
        if first == 0:
            return None
        if first == last:
            head = self._blocks
        else:
            low, high = 0, self._blocks - 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._cycle(middle) == first else (low, middle)
            head = high
        # What was written at once may have gaps.
        scanned = min(head, _AT_ONCE)
        data = self._read(head - scanned, scanned)
        for number in range(scanned):
            if _cycle_of(data[number * _BLOCK : number * _BLOCK + 8]) != first:
                raise _Damaged("it has gaps")
        return head

    def record_before(self, head: int) -> _Record:
        for number in range(1, min(self._blocks, _AT_ONCE) + 1):
            block = (head - number) % self._blocks
            if struct.unpack_from(">I", self._read(block))[0] == _MAGIC:
                return self._record(block)
        raise _Damaged("it has no record")

    def _record(self, block: int) -> _Record:
        header = self._read(block)
        magic, cycle, version, length = struct.unpack_from(">4I", header)
        tail, _checksum, _previous, operations = struct.unpack_from(">QIII", header, 24)
        (form,) = struct.unpack_from(">I", header, 300)
        (most,) = struct.unpack_from(">I", header, 320)
        if magic != _MAGIC or version not in (1, 2) or form != _LITTLE_ENDIAN:
            raise _Damaged("a record makes no sense")
        headers = max(1, -(-most // _HEADER_HOLDS)) if version == 2 else 1
        count = -(-length // _BLOCK)
        if not 0 < count <= _AT_ONCE or headers > 8:
            raise _Damaged("a record makes no sense")
        data = bytearray(self._read(block + headers, count))
        # The first bytes of each block are its cycle; those that belong there lie in the headers.
        heads = self._read(block, headers)
        each = _HEADER_HOLDS // _BLOCK
        for number in range(count):
            if struct.unpack_from(">I", data, number * _BLOCK)[0] != cycle:
                raise _Damaged("a record was not written to its end")
            part, inside = divmod(number, each)
            place = 44 + 4 * inside if part == 0 else part * _BLOCK + 4 + 4 * inside
            data[number * _BLOCK : number * _BLOCK + 4] = heads[place : place + 4]
        return _Record(block, block + headers + count, tail & 0xFFFFFFFF, operations, bytes(data[:length]))

    def changes(self, tail: int, head: int) -> Optional[str]:
        """What lies between the two that is not the superblock alone; None if nothing does."""
        left = (head - tail) % self._blocks
        if not left or left > _MOST_PENDING:
            return f"{_IN_USE}: it holds {(left or self._blocks) * _BLOCK} bytes of changes"
        at = tail
        while left > 0:
            record = self._record(at % self._blocks)
            left -= record.end - record.at
            at = record.end
            if not all(_is_superblock(region) for region in _items(record)):
                return _IN_USE
        return None if left == 0 else _IN_USE


def _cycle_of(block: bytes) -> int:
    first, second = struct.unpack_from(">II", block)
    return int(second if first == _MAGIC else first)


def _items(record: _Record) -> Iterator[bytes]:
    """What says of each item in the transactions of a record what it is."""
    regions = list(_regions(record))
    position = 0
    while position < len(regions):
        flags, region = regions[position]
        position += 1
        if flags & (_START | _COMMIT | _UNMOUNT) and not region:
            continue
        if flags & _CONTINUED:
            raise _Damaged("a transaction goes over several records")
        if len(region) == 16 and struct.unpack_from("<I", region)[0] == _TRANSACTION:
            continue
        yield region
        (count,) = struct.unpack_from("<H", region, 2)
        position += max(0, count - 1)


def _regions(record: _Record) -> List[Tuple[int, bytes]]:
    found = []
    position = 0
    for _number in range(record.operations):
        _identity, length, _client, flags, _spare = _OPERATION.unpack_from(record.data, position)
        position += _OPERATION.size
        region = record.data[position : position + length]
        if len(region) != length:
            raise _Damaged("a record makes no sense")
        found.append((flags, region))
        position += length
    return found


def _is_superblock(region: bytes) -> bool:
    kind, _regions_of_it, _flags, length = struct.unpack_from("<4H", region)
    (block,) = struct.unpack_from("<q", region, 8)
    return bool(kind == _BUFFER and block == 0 and length <= 8)
