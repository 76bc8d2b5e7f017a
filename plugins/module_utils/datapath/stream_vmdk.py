# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The end of a stream-optimised VMDK, as VMware's specification of virtual disks wants it.

``qemu-img`` puts the tables in front of the data, cuts the last grain short where the disk ends within it, and marks no
end. Readers of streams refuse that, or guess. So the file is finished here: the last grain is filled with zeros, and
behind it come the tables, the directory, the footer and the end-of-stream marker. All that is kept of the front is the
header, which now points to the footer, and the descriptor.
"""

from __future__ import annotations

import array
import os
import struct
import sys
import zlib
from typing import Iterator, Optional, Tuple

from ..errors import DataPathError

SECTOR_BYTES = 512
GRAIN_BYTES = 128 * SECTOR_BYTES
_HEADER = struct.Struct("<IIIQQQQIQQQB4sH")
_MAGIC = 0x564D444B
_NEW_LINES = b"\n \r\n"
_DEFLATE = 1
_COMPRESSED_WITH_MARKERS = 0x30000
_SECOND_DIRECTORY = 0x2
#: "The directory is at the end: look into the footer."
_AT_END = 0xFFFFFFFFFFFFFFFF
_TABLE_ENTRIES = 512
_TABLE_BYTES = 4 * _TABLE_ENTRIES
_GRAIN_MARKER = struct.Struct("<QI")
_MARKER = struct.Struct("<QII")
_END_OF_STREAM, _GRAIN_TABLE, _GRAIN_DIRECTORY, _FOOTER = range(4)
# A table tells a place by 32 bits.
_MOST_SECTORS = 1 << 32
_LEVEL = 6


def finish(descriptor: int, shown: str) -> None:
    """Give a stream that ``qemu-img`` wrote its end. It is not synced.

    :param descriptor: the open file, readable and writable.
    :raises DataPathError: it is not what ``qemu-img`` writes. OSError: it can't be read or written.
    """
    _Stream(descriptor, shown).finish()


def is_finished(descriptor: int, offset: int = 0) -> bool:
    """Whether the header of a stream says that its directory is at the end, where it is to be found.

    :param offset: where the stream begins in the file.
    """
    data = os.pread(descriptor, _HEADER.size, offset)
    if len(data) < _HEADER.size:
        return False
    fields = _HEADER.unpack(data)
    return fields[0] == _MAGIC and bool(fields[9] == _AT_END)


class _Stream:
    def __init__(self, descriptor: int, shown: str) -> None:
        self._descriptor = descriptor
        self._shown = shown
        fields = _HEADER.unpack(self._read(0, _HEADER.size))
        self._fields = list(fields)
        magic, version, flags, self._sectors, grain, at, length, entries, _second, directory, self._front = fields[:11]
        known = (
            magic == _MAGIC
            and version in (1, 2, 3)
            and flags & _COMPRESSED_WITH_MARKERS == _COMPRESSED_WITH_MARKERS
            and grain * SECTOR_BYTES == GRAIN_BYTES
            and entries == _TABLE_ENTRIES
            and fields[13] == _DEFLATE
        )
        if not known or directory == _AT_END or not 0 < at + length <= min(directory, self._front):
            raise self._unknown("its header is not one of a stream")
        self._directory_at = directory
        self._metadata_at = at + length
        self._grains = -(-self._sectors * SECTOR_BYTES // GRAIN_BYTES)
        self._count = -(-self._grains // _TABLE_ENTRIES)

    def _unknown(self, reason: str) -> DataPathError:
        return DataPathError(
            "A stream-optimised VMDK can't be finished",
            subject=self._shown,
            reason=f"qemu-img wrote it in an unknown way: {reason}",
            remedy="Report this, with the version of qemu-img, and restore to another format meanwhile",
        )

    def finish(self) -> None:
        size = self._end_of_grains()
        os.ftruncate(self._descriptor, size)
        self._write_end(size)
        self._write_front()

    # What is there

    def _read(self, offset: int, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not piece:
                raise self._unknown("it ends early")
            data += piece
        return data

    def _numbers(self, offset: int, count: int) -> array.array[int]:
        numbers = array.array("I", self._read(offset, 4 * count))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _tables(self) -> Iterator[Tuple[int, array.array[int]]]:
        """Tables that name a grain, with their places in the directory."""
        for number, place in enumerate(self._numbers(self._directory_at * SECTOR_BYTES, self._count)):
            if place:
                table = self._numbers(place * SECTOR_BYTES, _TABLE_ENTRIES)
                if any(table):
                    yield number, table

    def _last(self) -> Optional[Tuple[int, int]]:
        """The number of the last grain that is there, and its sector in the file.

        :raises DataPathError: grains are not in the order of the disk.
        """
        before = self._front - 1
        last = None
        for number, table in self._tables():
            used = [entry for entry in table if entry]
            if used[0] <= before or any(one >= other for one, other in zip(used, used[1:])):
                raise self._unknown("its grains are not in the order of the disk")
            before = used[-1]
            last = number * _TABLE_ENTRIES + table.index(before), before
        return last

    def _end_of_grains(self) -> int:
        """Where the last grain ends, once it is whole."""
        last = self._last()
        if last is None:
            return int(self._front * SECTOR_BYTES)
        grain, at = last[0], last[1] * SECTOR_BYTES
        sector, size = _GRAIN_MARKER.unpack(self._read(at, _GRAIN_MARKER.size))
        if sector * SECTOR_BYTES != grain * GRAIN_BYTES or not 0 < size <= 2 * GRAIN_BYTES:
            raise self._unknown("its last grain is another one")
        if grain == self._grains - 1:
            whole = self._whole(self._read(at + _GRAIN_MARKER.size, size))
            if whole is not None:
                packed = zlib.compress(whole, _LEVEL)
                self._write(at, _padded(_GRAIN_MARKER.pack(sector, len(packed)) + packed))
                size = len(packed)
        return at + len(_padded(bytes(_GRAIN_MARKER.size + size)))

    def _whole(self, packed: bytes) -> Optional[bytes]:
        """The last grain of the disk, filled up; None: it is whole."""
        try:
            data = zlib.decompress(packed)
        except zlib.error as error:
            raise self._unknown(f"its last grain: {error}") from None
        if len(data) == GRAIN_BYTES:
            return None
        if len(data) != self._sectors * SECTOR_BYTES % GRAIN_BYTES:
            raise self._unknown(f"its last grain has {len(data)} bytes")
        return data.ljust(GRAIN_BYTES, b"\0")

    # What is written

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done

    def _write_end(self, size: int) -> None:
        """Behind *size* bytes: tables, directory, footer, end-of-stream marker."""
        directory = [0] * self._count
        for number, table in self._tables():
            if size // SECTOR_BYTES >= _MOST_SECTORS - _TABLE_ENTRIES:
                raise DataPathError(
                    "The disk is too large for a stream-optimised VMDK",
                    subject=self._shown,
                    reason="its compressed data take 2 TiB, and the format can't tell places behind that",
                    remedy="Restore it to another format",
                )
            directory[number] = size // SECTOR_BYTES + 1
            packed = struct.pack(f"<{_TABLE_ENTRIES}I", *table)
            self._write(size, _marker(_GRAIN_TABLE, _TABLE_BYTES // SECTOR_BYTES) + packed)
            size += SECTOR_BYTES + _TABLE_BYTES
        packed = _padded(struct.pack(f"<{len(directory)}I", *directory))
        self._write(size, _marker(_GRAIN_DIRECTORY, len(packed) // SECTOR_BYTES) + packed)
        at = size // SECTOR_BYTES + 1
        end = _marker(_FOOTER, 1) + self._header(at) + _marker(_END_OF_STREAM, 0)
        self._write(size + SECTOR_BYTES + len(packed), end)

    def _write_front(self) -> None:
        """The header, and zeros for the tables."""
        self._write(0, self._header(_AT_END))
        for offset, length in _pieces(self._metadata_at * SECTOR_BYTES, self._front * SECTOR_BYTES):
            self._write(offset, bytes(length))

    def _header(self, directory: int) -> bytes:
        fields = list(self._fields)
        fields[2] &= ~_SECOND_DIRECTORY
        fields[8], fields[9], fields[12] = 0, directory, _NEW_LINES
        return _padded(_HEADER.pack(*fields))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR_BYTES)


def _marker(kind: int, sectors: int) -> bytes:
    return _padded(_MARKER.pack(sectors, 0, kind))


def _pieces(start: int, end: int) -> Iterator[Tuple[int, int]]:
    """(offset, length) of a MiB at most."""
    while start < end:
        length = min(1 << 20, end - start)
        yield start, length
        start += length
