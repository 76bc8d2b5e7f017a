# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A disk as a stream-optimised VMDK, as ESXi sends it: tables and footer come behind the data that they speak of."""

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
