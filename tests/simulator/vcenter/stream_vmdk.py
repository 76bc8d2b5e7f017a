# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A disk as a stream-optimised VMDK, as ESXi sends it (tables and footer behind the data) and takes it (in order)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

SECTOR = 512
GRAIN = 128 * SECTOR
TABLE_ENTRIES = 512
AT_END = 0xFFFFFFFFFFFFFFFF
END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)
_DESCRIPTOR_SECTORS = 20
_OVERHEAD_SECTORS = 128


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)


def _header(capacity: int, directory: int) -> bytes:
    fields = (0x564D444B, 3, 0x30001, capacity // SECTOR, GRAIN // SECTOR, 1, _DESCRIPTOR_SECTORS, TABLE_ENTRIES)
    return _padded(struct.pack("<IIIQQQQIQQQB4sH", *fields, 0, directory, _OVERHEAD_SECTORS, 0, b"\n \r\n", 1))


def _marker(kind: int, sectors: int) -> bytes:
    return _padded(struct.pack("<QII", sectors, 0, kind))


def _descriptor(capacity: int, name: str) -> bytes:
    sectors = capacity // SECTOR
    return (
        '# Disk DescriptorFile\nversion=1\nCID=7e5b80a7\nparentCID=ffffffff\ncreateType="streamOptimized"\n\n'
        f'# Extent description\nRDONLY {sectors} SPARSE "{name}"\n\n# The Disk Data Base\n#DDB\n\n'
        f'ddb.adapterType = "lsilogic"\nddb.geometry.cylinders = "{sectors // 255 // 63}"\nddb.geometry.heads = "255"\n'
        'ddb.geometry.sectors = "63"\nddb.virtualHWVersion = "19"\n'
    ).encode()


def stream(
    name: str, capacity: int, data: Iterable[tuple[int, int]], read: Callable[[int, int], bytes]
) -> Iterator[bytes]:
    """The file, piece by piece.

    :param data: (offset, length) of what may hold anything but zeros, in order.
    :param read: gives (offset, length) of the disk.
    """
    grains = _grains(data, -(-capacity // GRAIN))
    yield _padded(_header(capacity, AT_END) + _padded(_descriptor(capacity, name))).ljust(
        _OVERHEAD_SECTORS * SECTOR, b"\0"
    )
    at = _OVERHEAD_SECTORS
    directory = [0] * -(-capacity // (GRAIN * TABLE_ENTRIES))
    table: dict[int, int] = {}
    current = -1
    for grain in [*grains, None]:
        number = -1 if grain is None else grain // TABLE_ENTRIES
        if number != current and table:
            entries = [table.get(entry, 0) for entry in range(TABLE_ENTRIES)]
            piece = _padded(struct.pack(f"<{TABLE_ENTRIES}I", *entries))
            yield _marker(GRAIN_TABLE, len(piece) // SECTOR) + piece
            directory[current] = at + 1
            at += 1 + len(piece) // SECTOR
            table = {}
        current = number
        if grain is None:
            break
        content = read(grain * GRAIN, min(GRAIN, capacity - grain * GRAIN)).ljust(GRAIN, b"\0")
        if content.count(0) == GRAIN:
            continue
        packed = zlib.compress(content, 1)
        piece = _padded(struct.pack("<QI", grain * GRAIN // SECTOR, len(packed)) + packed)
        table[grain % TABLE_ENTRIES] = at
        at += len(piece) // SECTOR
        yield piece
    piece = _padded(struct.pack(f"<{len(directory)}I", *directory))
    yield _marker(GRAIN_DIRECTORY, len(piece) // SECTOR) + piece
    yield _marker(FOOTER, 1) + _header(capacity, at + 1) + _marker(END_OF_STREAM, 0)


def _grains(data: Iterable[tuple[int, int]], count: int) -> Iterator[int]:
    done = 0
    for offset, length in data:
        for grain in range(max(done, offset // GRAIN), min(count, -(-(offset + length) // GRAIN))):
            yield grain
            done = grain + 1


class BadStream(Exception):
    """What was sent is no stream-optimised VMDK of the disk."""


class _Pieces:
    """Exact reads from a body that comes in pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = bytearray()

    def read(self, size: int, at_end: bool = False) -> bytes:
        """:param at_end: less, or nothing, will do."""
        while len(self._held) < size:
            piece = next(self._pieces, None)
            if piece is None:
                if at_end:
                    break
                raise BadStream("it ends early")
            self._held += piece
        data = bytes(self._held[:size])
        del self._held[:size]
        return data


def grains(pieces: Iterable[bytes], capacity: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all that a stream holds, read once from its beginning to its end, as ESXi does.

    :raises BadStream: it is something else, of another capacity, out of order, or not whole.
    """
    source = _Pieces(pieces)
    fields = struct.unpack_from("<IIIQQQQIQQQB4sH", source.read(SECTOR))
    magic, version, flags, sectors, grain, at, length, _entries, _spare, _directory, overhead = fields[:11]
    if magic != 0x564D444B or version not in (1, 2, 3):
        raise BadStream("no VMDK")
    if flags & 0x30000 != 0x30000 or grain * SECTOR != GRAIN or fields[13] != 1:
        raise BadStream("not stream-optimised")
    if sectors * SECTOR != capacity:
        raise BadStream(f"of {sectors * SECTOR} bytes, the disk has {capacity}")
    head = source.read((overhead - 1) * SECTOR)
    text = head[(at - 1) * SECTOR : (at - 1 + length) * SECTOR].split(b"\0")[0].decode("utf-8", "replace")
    if '"streamOptimized"' not in text or "parentCID=ffffffff" not in text or "parentFileNameHint" in text:
        raise BadStream("its descriptor is of another kind")
    if fields[9] != AT_END:
        raise BadStream("its tables are in front")
    last, parts = -1, []
    while True:
        marker = source.read(SECTOR)
        number, size, kind = struct.unpack_from("<QII", marker)
        if size == 0:
            if kind == END_OF_STREAM:
                break
            parts.append((kind, source.read(number * SECTOR)))
            continue
        if parts and parts[-1][0] != GRAIN_TABLE:
            raise BadStream("a grain behind the directory")
        packed = marker[12:] + source.read(len(_padded(bytes(12 + size))) - SECTOR)
        offset = number * SECTOR
        if number % grain or offset <= last or offset >= capacity:
            raise BadStream(f"a grain at byte {offset} behind {last}")
        last = offset
        try:
            data = zlib.decompress(packed[:size])
        except zlib.error as error:
            raise BadStream(f"the grain at byte {offset}: {error}") from error
        if len(data) != GRAIN:  # the last one is filled up
            raise BadStream(f"the grain at byte {offset} has {len(data)} bytes")
        yield offset, data[: capacity - offset]
    if [kind for kind, _data in parts[-2:]] != [GRAIN_DIRECTORY, FOOTER] or not parts[-1][1].startswith(b"KDMV"):
        raise BadStream("it has no footer behind a directory")
    while True:
        rest = source.read(1 << 16, at_end=True)
        if rest.count(0) != len(rest):
            raise BadStream("there is more behind its end")
        if not rest:
            return
