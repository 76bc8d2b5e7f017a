# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Partition tables as far as they are proved: a GPT by its checksums, logical partitions by a chain that ends.

What is lost with a damaged table is said. :mod:`...transport.disk_format` reads the same tables and believes them.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import BinaryIO, List, NamedTuple, Optional, Set, Tuple

from ...transport.disk_format import Partition
from .filesystem import bytes_at

_SECTOR = 512
_GPT_SECTORS = (512, 4096)
_GPT_MAGIC = b"EFI PART"
_HEADER_BYTES = 92
_MOST_ENTRIES, _MOST_ENTRY_BYTES = 1024, 4096
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_MOST_LOGICAL = 256
_FIRST_LOGICAL = 5


class Table(NamedTuple):
    """The partitions of a disk.

    :param problem: why nothing is known of them; None if they are.
    :param lost: number of a partition, and why neither it nor those behind it can be found.
    """

    entries: List[Partition]
    problem: Optional[str]
    lost: List[Tuple[int, str]]


def read_table(stream: BinaryIO, size: int) -> Optional[Table]:
    """The partitions of a disk of *size* bytes, without extended ones; None if it has no table."""
    first = bytes_at(stream, 0, _SECTOR)
    if len(first) < _SECTOR or first[510:] != b"\x55\xaa":
        return None
    entries = [struct.unpack_from("<B3xB3xII", first, 446 + 16 * index) for index in range(4)]
    # The boot code of a file system ends with the same two bytes.
    if any(flag not in (0x00, 0x80) for flag, _kind, _start, _count in entries):
        return None
    if any(kind == _PROTECTIVE for _flag, kind, _start, _count in entries):
        found = _gpt(stream, size)
        return Table([], "its partition table (GPT) is damaged", []) if found is None else Table(found, None, [])
    table = Table([], None, [])
    extended = None
    for number, (_flag, kind, start, count) in enumerate(entries, start=1):
        if not kind or not count:
            continue
        if kind not in _EXTENDED:
            table.entries.append(Partition(number, start * _SECTOR, count * _SECTOR, f"{kind:02x}"))
        elif extended is None:
            extended = start * _SECTOR
        else:
            table.lost.append((number, "it is a second extended partition, whose logical ones have no numbers"))
    if extended is not None:
        _logical(stream, extended, table)
    return table


def _gpt(stream: BinaryIO, size: int) -> Optional[List[Partition]]:
    """The entries of the first table, or of its copy at the end, whose checksums are right."""
    for sector in _GPT_SECTORS:
        found = _gpt_at(stream, size, sector, 1)
        if found is not None:
            return found
    for sector in _GPT_SECTORS:
        found = _gpt_at(stream, size, sector, size // sector - 1)
        if found is not None:
            return found
    return None


def _gpt_at(stream: BinaryIO, disk: int, sector: int, place: int) -> Optional[List[Partition]]:
    header = bytes_at(stream, place * sector, sector)
    if place < 1 or len(header) < sector or header[:8] != _GPT_MAGIC:
        return None
    length, checksum = struct.unpack_from("<II", header, 12)
    own, _other = struct.unpack_from("<QQ", header, 24)
    start, count, size, sum_of_entries = struct.unpack_from("<QIII", header, 72)
    if not _HEADER_BYTES <= length <= sector or own != place:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
        return None
    if not 128 <= size <= _MOST_ENTRY_BYTES or count > _MOST_ENTRIES:
        return None
    if start * sector + count * size > disk:
        return None
    table = bytes_at(stream, start * sector, count * size)
    if zlib.crc32(table) != sum_of_entries:
        return None
    entries = []
    for number in range(count):
        kind = uuid.UUID(bytes_le=table[number * size : number * size + 16])
        first, last = struct.unpack_from("<QQ", table, number * size + 32)
        if kind.int and last >= first:
            entries.append(Partition(number + 1, first * sector, (last - first + 1) * sector, str(kind)))
    return entries


def _logical(stream: BinaryIO, extended: int, table: Table) -> None:
    """Each table of the chain names one partition, and where in the extended one the next table lies."""
    at, number = extended, _FIRST_LOGICAL
    seen: Set[int] = set()
    while True:
        data = bytes_at(stream, at, _SECTOR)
        entries = [struct.unpack_from("<B3xB3xII", data.ljust(_SECTOR, b"\0"), 446 + 16 * index) for index in range(4)]
        why = None
        if len(data) < _SECTOR or data[510:] != b"\x55\xaa":
            why = "the chain of logical partitions is broken"
        elif at in seen:
            why = "the chain of logical partitions goes in a circle"
        elif len(seen) >= _MOST_LOGICAL:
            why = f"there are more than {_MOST_LOGICAL} logical partitions"
        elif any(kind and count for _flag, kind, _start, count in entries[2:]) or (
            entries[0][1] in _EXTENDED or (entries[1][1] and entries[1][1] not in _EXTENDED)
        ):
            why = "the chain of logical partitions is not as it should be"
        if why is not None:
            table.lost.append((number, why))
            return
        seen.add(at)
        _flag, kind, start, count = entries[0]
        if kind and count:
            table.entries.append(Partition(number, at + start * _SECTOR, count * _SECTOR, f"{kind:02x}"))
            number += 1
        _flag, kind, start, _count = entries[1]
        if not kind or not start:
            return
        at = extended + start * _SECTOR
