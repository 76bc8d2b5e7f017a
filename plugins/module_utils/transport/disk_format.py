# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a disk says of itself in its first sectors: partition tables and LVM labels. Reads only, and needs no tool."""

from __future__ import annotations

import re
import struct
import uuid
from dataclasses import dataclass
from typing import BinaryIO, Iterator, List, Optional, Tuple

VMFS_MBR = "fb"
VMFS_GPT = "aa31e02a-400f-11db-9590-000c2911d1b8"

_SECTOR = 512
_GPT_SECTORS = (512, 4096)
_MOST_ENTRIES = 1024
_MOST_ENTRY_BYTES = 4096
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_MOST_LOGICAL = 128

# LVM's label is in one of the first four sectors; its metadata is text in a ring behind a header of 512 bytes.
_LABEL_SECTORS = 4
_LABEL = b"LABELONE"
_LABEL_TYPE = b"LVM2 001"
_METADATA_MAGIC = b" LVM2 x[5A%r0N*>"
_METADATA_HEADER = 512
_MOST_METADATA = 64 * 1024 * 1024
_MOST_AREAS = 32


@dataclass(frozen=True)
class Partition:
    """One entry of a partition table.

    :param kind: two hexadecimal digits of a DOS table (``fb``), or the type's GUID in lower case.
    """

    number: int
    offset: int
    length: int
    kind: str

    @property
    def is_vmfs(self) -> bool:
        return self.kind in (VMFS_MBR, VMFS_GPT)


@dataclass(frozen=True)
class VolumeGroup:
    """An LVM volume group that a physical volume belongs to.

    :param uuid: as LVM prints it, with dashes.
    :param physical_volume: UUID of the physical volume, as LVM prints it.
    """

    uuid: str
    name: str
    physical_volume: str = ""


def read_partitions(stream: BinaryIO) -> Optional[List[Partition]]:
    """The partitions of a disk in the order of their numbers, logical ones too; None if it has no partition table."""
    first = _read(stream, 0, _SECTOR)
    if len(first) < _SECTOR or first[510:] != b"\x55\xaa":
        return None
    entries = [struct.unpack_from("<B3xB3xII", first, 446 + 16 * index) for index in range(4)]
    # The boot code of a file system ends with the same two bytes.
    if any(flag not in (0x00, 0x80) for flag, _kind, _start, _count in entries):
        return None
    if any(kind == _PROTECTIVE for _flag, kind, _start, _count in entries):
        return _read_gpt(stream)
    found = [
        Partition(number, start * _SECTOR, count * _SECTOR, f"{kind:02x}")
        for number, (_flag, kind, start, count) in enumerate(entries, start=1)
        if kind and count
    ]
    for entry in list(found):
        if int(entry.kind, 16) in _EXTENDED:
            found += _read_logical(stream, entry.offset)
            break
    return found


def read_volume_group(stream: BinaryIO, offset: int = 0) -> Optional[VolumeGroup]:
    """The volume group of the physical volume that begins at *offset*.

    None if there is no physical volume, if it is in no group, or if its group's metadata is on other disks only.
    """
    head = _read(stream, offset, _LABEL_SECTORS * _SECTOR)
    for sector in range(0, len(head), _SECTOR):
        label = head[sector : sector + _SECTOR]
        if label[:8] == _LABEL and label[24:32] == _LABEL_TYPE:
            for area in _metadata_areas(label):
                found = _group_of(_metadata_text(stream, offset + area))
                if found:
                    return VolumeGroup(*found, _physical_volume(label))
    return None


def _read(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)


def _read_gpt(stream: BinaryIO) -> Optional[List[Partition]]:
    for sector in _GPT_SECTORS:
        header = _read(stream, sector, 92)
        if len(header) == 92 and header[:8] == b"EFI PART":
            start, count, size = struct.unpack_from("<QII", header, 72)
            if not 128 <= size <= _MOST_ENTRY_BYTES or count > _MOST_ENTRIES:
                return None
            table = _read(stream, start * sector, count * size)
            return list(_gpt_entries(table, size, sector))
    return None


def _gpt_entries(table: bytes, size: int, sector: int) -> Iterator[Partition]:
    for number, at in enumerate(range(0, len(table) - 127, size), start=1):
        kind = uuid.UUID(bytes_le=table[at : at + 16])
        first, last = struct.unpack_from("<QQ", table, at + 32)
        if kind.int and last >= first:
            yield Partition(number, first * sector, (last - first + 1) * sector, str(kind))


def _read_logical(stream: BinaryIO, extended: int) -> Iterator[Partition]:
    """Each table in the chain names one partition, and where in the extended one the next table is."""
    at = extended
    for number in range(5, 5 + _MOST_LOGICAL):
        table = _read(stream, at, _SECTOR)
        if len(table) < _SECTOR or table[510:] != b"\x55\xaa":
            return
        kind, start, count = struct.unpack_from("<4xB3xII", table, 446)
        if kind and count:
            yield Partition(number, at + start * _SECTOR, count * _SECTOR, f"{kind:02x}")
        kind, start, _count = struct.unpack_from("<4xB3xII", table, 446 + 16)
        if not kind or not start:
            return
        at = extended + start * _SECTOR


def _metadata_areas(label: bytes) -> Iterator[int]:
    """Where the metadata areas begin: the second of two lists, each ended by a pair of zeros."""
    at = struct.unpack_from("<I", label, 20)[0] + 40
    lists = 0
    for _number in range(_MOST_AREAS):
        if at + 16 > len(label):
            return
        begin, length = struct.unpack_from("<QQ", label, at)
        at += 16
        if not begin and not length:
            lists += 1
            if lists == 2:
                return
        elif lists == 1:
            yield begin


def _metadata_text(stream: BinaryIO, area: int) -> bytes:
    header = _read(stream, area, 64)
    if len(header) < 64 or header[4:20] != _METADATA_MAGIC:
        return b""
    size = struct.unpack_from("<Q", header, 32)[0]
    begin, length = struct.unpack_from("<QQ", header, 40)
    if not _METADATA_HEADER <= begin < size or not 0 < length <= min(size, _MOST_METADATA):
        return b""
    text = _read(stream, area + begin, min(length, size - begin))
    rest = length - (size - begin)
    return text + _read(stream, area + _METADATA_HEADER, rest) if rest > 0 else text


def _group_of(text: bytes) -> Optional[Tuple[str, str]]:
    """(UUID, name): the group's section is the first one of the text, and its id the first one in there."""
    match = re.search(
        r'^\s*([A-Za-z0-9+_.][A-Za-z0-9+_.-]*)\s*\{\s*id\s*=\s*"([A-Za-z0-9-]+)"', text.decode("utf-8", "replace"), re.M
    )
    return (match.group(2), match.group(1)) if match else None


def _physical_volume(label: bytes) -> str:
    at = struct.unpack_from("<I", label, 20)[0]
    text = label[at : at + 32].decode("ascii", "replace")
    ends = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(text[begin:end] for begin, end in zip(ends, ends[1:]))


def places_of(stream: BinaryIO) -> List[Tuple[str, int]]:
    """The whole disk and its partitions, as (words, offset)."""
    places = [("the disk", 0)]
    places += [(f"partition {entry.number}", entry.offset) for entry in read_partitions(stream) or ()]
    return places
