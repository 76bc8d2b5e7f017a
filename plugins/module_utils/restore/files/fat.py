# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""FAT12, FAT16 and FAT32."""

from __future__ import annotations

import calendar
import struct
from functools import lru_cache
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Tuple

from .filesystem import DIRECTORY, FILE, FileSystem, Info, Piece, Unreadable, bytes_at, merged

# Directories can't be larger.
_MOST_DIRECTORY = 2 << 20
_ENTRY = 32
_PAGE = 65536
_VOLUME_ID, _SUBDIRECTORY, _LONG = 0x08, 0x10, 0x0F
_KNOWN_ATTRIBUTES = 0x3F
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
_LAST_PIECE = 0x40
_NO_MIRROR = 0x80
IN_USE = "it was in use when the snapshot was made, or not unmounted before"
_DELETED, _KANJI = 0xE5, 0x05


class _Node(NamedTuple):
    """A file or directory; a root directory that has no cluster lies in front of the data."""

    cluster: int
    size: int
    directory: bool
    mtime_ns: int


class Fat(FileSystem):
    """FAT12, FAT16 and FAT32. Its times are local ones; they are taken for UTC."""

    name = "fat"
    ignores_case = True

    def __init__(self, volume: BinaryIO, size: int) -> None:
        super().__init__(volume, size)
        sector = self._bytes(0, 512)
        bytes_per_sector, per_cluster, reserved, fats, root_entries, sectors = struct.unpack_from("<HBHBHH", sector, 11)
        (fat_sectors,) = struct.unpack_from("<H", sector, 22)
        sectors = sectors or struct.unpack_from("<I", sector, 32)[0]
        # As Linux and Windows tell it, whatever the number of clusters.
        wide = not fat_sectors
        flags = version = root = 0
        if wide:
            fat_sectors, flags, version, root = struct.unpack_from("<IHHI", sector, 36)
        sane = (
            bytes_per_sector in (512, 1024, 2048, 4096)
            and per_cluster in (1, 2, 4, 8, 16, 32, 64, 128)
            and reserved
            and fats
            and fat_sectors
            and not (wide and root_entries)
        )
        if not sane:
            raise Unreadable("its first sector makes no sense")
        if version:
            raise Unreadable(f"it is FAT32 of version {version:#x}")
        self._root_begin = (reserved + fats * fat_sectors) * bytes_per_sector
        self._root_bytes = root_entries * _ENTRY
        if self._root_bytes % bytes_per_sector:
            # Programs do not agree on where its data begin: at the next sector, in this one, or at once.
            raise Unreadable("its root directory ends within a sector, and Linux does not mount it either")
        root_sectors = -(-self._root_bytes // bytes_per_sector)
        first = reserved + fats * fat_sectors + root_sectors
        if sectors <= first:
            raise Unreadable("its first sector makes no sense")
        self._require_room(sectors * bytes_per_sector)
        self._cluster = per_cluster * bytes_per_sector
        self._data = first * bytes_per_sector
        self._clusters = (sectors - first) // per_cluster
        self._bits = 32 if wide else (12 if self._clusters < 4085 else 16)
        if fat_sectors * bytes_per_sector * 8 < (self._clusters + 2) * self._bits:
            raise Unreadable("its table is too small for it")
        # Without mirroring one of the tables is the one that counts.
        active = flags & 0xF if flags & _NO_MIRROR else 0
        if active >= fats:
            raise Unreadable("its first sector makes no sense")
        self._table = (reserved + active * fat_sectors) * bytes_per_sector
        self._table_bytes = fat_sectors * bytes_per_sector
        self._cached_page = lru_cache(64)(self._page)
        self._root = _Node(root if wide else 0, 0, True, 0)
        at = 67 if wide else 39
        serial = sector[at : at + 4]
        self.unclean = self._state(sector[37 + (28 if wide else 0)])
        self.uuid = f"{serial[3]:02X}{serial[2]:02X}-{serial[1]:02X}{serial[0]:02X}"
        self.label = sector[at + 4 : at + 15].decode("cp437").strip(" \0") or None

    def _state(self, flags: int) -> Optional[str]:
        """Why it is not known to be clean. Windows marks its table, Linux its first sector; there is no log."""
        if flags & 1:
            return "it was mounted when the snapshot was made, or not unmounted before"
        if self._bits > 12:
            second = self._number(self._bits // 8, self._bits // 8)
            if not second >> self._bits - (5 if self._bits == 32 else 1) & 1:
                return IN_USE
        if flags & 2:
            return "it waits for a check of the disk"
        return None

    @staticmethod
    def begins(volume: BinaryIO) -> Optional[str]:
        sector = bytes_at(volume, 0, 512)
        jumps = sector[:1] == b"\xe9" or (sector[:1] == b"\xeb" and sector[2:3] == b"\x90")
        named = sector[54:57] == b"FAT" or sector[82:85] == b"FAT"
        return "fat" if sector[510:512] == b"\x55\xaa" and jumps and named else None

    def root(self) -> Any:
        return self._root

    # Directories

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        pieces: List[bytes] = []
        for entry in self._entries_of(node):
            if not entry[0]:
                return
            attributes = entry[11]
            if entry[0] == _DELETED:
                pieces = []
            elif attributes & _KNOWN_ATTRIBUTES == _LONG:
                if entry[0] & _LAST_PIECE:
                    pieces = []
                pieces.append(entry)
            else:
                name = _long_name(pieces, entry[:11]) or _short_name(entry)
                pieces = []
                if attributes & _VOLUME_ID or entry[:11] in (b".          ", b"..         "):
                    continue
                yield name, self._node_of(entry)

    def _entries_of(self, node: _Node) -> Iterator[bytes]:
        if node.directory and not node.cluster and node is self._root:
            data = self._bytes(self._root_begin, self._root_bytes)
        else:
            most = _MOST_DIRECTORY // self._cluster + 1
            clusters = self._chain(node.cluster, most)
            if len(clusters) * self._cluster > _MOST_DIRECTORY:
                raise ValueError("it is larger than a directory can be")
            data = b"".join(self._bytes(self._data + number * self._cluster, self._cluster) for number in clusters)
        for position in range(0, len(data) - _ENTRY + 1, _ENTRY):
            yield data[position : position + _ENTRY]

    def _node_of(self, entry: bytes) -> _Node:
        high, time, date, low, size = struct.unpack_from("<HHHHI", entry, 20)
        # On FAT12 and FAT16 that is something else.
        cluster = low | (high << 16 if self._bits == 32 else 0)
        directory = bool(entry[11] & _SUBDIRECTORY)
        return _Node(cluster, 0 if directory else size, directory, _time_ns(date, time))

    def info(self, node: Any) -> Info:
        if node.directory:
            return Info(DIRECTORY, 0, node.mtime_ns, inode=node.cluster)
        return Info(FILE, node.size, node.mtime_ns, inode=None)

    def read(self, node: Any) -> Iterator[Piece]:
        if not node.size:
            return
        needed = -(-node.size // self._cluster)
        clusters = self._chain(node.cluster, needed)
        if len(clusters) < needed:
            raise ValueError("its chain of clusters is too short")
        yield from self._by_runs(merged((cluster, 1) for cluster in clusters), node.size, self._cluster, self._data)

    # The table

    def _chain(self, number: int, most: int) -> List[int]:
        """The first *most* clusters of a chain, as blocks of the data area."""
        clusters: List[int] = []
        seen = set()
        end = {12: 0xFF8, 16: 0xFFF8, 32: 0xFFFFFF8}[self._bits]
        while True:
            if not 2 <= number < self._clusters + 2 or number in seen:
                raise ValueError("its chain of clusters is damaged")
            seen.add(number)
            clusters.append(number - 2)
            if len(clusters) >= most:
                return clusters
            number = self._next(number)
            if number >= end:
                return clusters

    def _next(self, cluster: int) -> int:
        if self._bits == 32:
            return self._number(cluster * 4, 4) & 0x0FFFFFFF
        if self._bits == 16:
            return self._number(cluster * 2, 2)
        value = self._number(cluster + cluster // 2, 2)
        return value >> 4 if cluster & 1 else value & 0xFFF

    def _number(self, offset: int, length: int) -> int:
        page, inside = divmod(offset, _PAGE)
        data = self._cached_page(page)[inside : inside + length]
        if len(data) < length:
            data += self._cached_page(page + 1)[: length - len(data)]
        if len(data) < length:
            raise ValueError("its chain of clusters is damaged")
        return int.from_bytes(data, "little")

    def _page(self, number: int) -> bytes:
        begin = number * _PAGE
        return self._bytes(self._table + begin, max(0, min(_PAGE, self._table_bytes - begin)))


def _long_name(pieces: List[bytes], short: bytes) -> Optional[str]:
    """The name in the entries before the one of the short name; None if they are not its own."""
    checksum = 0
    for letter in short:
        checksum = ((checksum >> 1) | (checksum << 7)) + letter & 0xFF
    numbers = [piece[0] & 0x3F for piece in pieces]
    if not pieces or not pieces[0][0] & _LAST_PIECE or numbers != list(range(len(pieces), 0, -1)):
        return None
    if any(piece[13] != checksum for piece in pieces):
        return None
    data = b"".join(piece[1:11] + piece[14:26] + piece[28:32] for piece in reversed(pieces))
    for position in range(0, len(data), 2):
        if data[position : position + 2] == b"\0\0":
            data = data[:position]
            break
    return data.decode("utf-16-le", "surrogatepass") or None


def _short_name(entry: bytes) -> str:
    """The short name, in lower case where its entry says so."""
    raw = bytearray(entry[:11])
    if raw[0] == _KANJI:
        raw[0] = _DELETED
    base, extension = (part.decode("cp437").rstrip(" ") for part in (raw[:8], raw[8:]))
    if entry[12] & _LOWER_BASE:
        base = base.lower()
    if entry[12] & _LOWER_EXTENSION:
        extension = extension.lower()
    return f"{base}.{extension}" if extension else base


def _time_ns(date: int, time: int) -> int:
    """A time as nanoseconds; 0 if there is none, as many tools leave it out."""
    year, month, day = 1980 + (date >> 9), date >> 5 & 0xF, date & 0x1F
    hour, minute, second = time >> 11, time >> 5 & 0x3F, (time & 0x1F) * 2
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second < 60):
        return 0
    return calendar.timegm((year, month, day, hour, minute, second)) * 10**9
