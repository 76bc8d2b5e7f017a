# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The journal of ext3 and ext4: what of a file system lies in it and not yet in its place.

Nothing is written. A volume is shown as it is once Linux has replayed the journal: in each transaction that was
committed, blocks lie with the number of their place; later ones win, and revoked ones don't count.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Dict, Iterator, List, NamedTuple, Sequence, Tuple, cast

from .disk import ReadOnly
from .filesystem import Unreadable, bytes_at, require_known

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _REVOKE = 1, 2, 5
_SUPERBLOCKS = (3, 4)
_64BIT, _CHECKSUM_2, _CHECKSUM_3 = 0x2, 0x8, 0x10
# revoke, 64bit, csum_v2, csum_v3
_INCOMPATIBLE = 0x1 | 0x2 | 0x8 | 0x10
_INCOMPATIBLE_NAMES = {0x4: "async_commit", 0x20: "fast_commit"}
_ESCAPED, _SAME_UUID, _LAST = 0x1, 0x2, 0x8


class Replayed(ReadOnly):
    """A volume with what its journal holds.

    :param places: block of the volume -> the block of the journal that is to be there, and whether it was escaped.
    """

    def __init__(self, volume: BinaryIO, size: int, block_size: int, places: Dict[int, Tuple[int, bool]]) -> None:
        super().__init__(size)
        self._volume = volume
        self._block_size = block_size
        self._places = places

    def _at(self, offset: int, length: int) -> bytes:
        data = bytearray(bytes_at(self._volume, offset, length))
        size = self._block_size
        for block in range(offset // size, -(-(offset + length) // size)):
            if block in self._places:
                low, high = max(offset, block * size), min(offset + length, (block + 1) * size)
                part = self._block(block)[low - block * size : high - block * size]
                data[low - offset : high - offset] = part
        return bytes(data)

    def _block(self, block: int) -> bytes:
        place, escaped = self._places[block]
        data = bytes_at(self._volume, place * self._block_size, self._block_size)
        # What begins as the journal's own blocks do would be taken for one.
        return struct.pack(">I", _MAGIC) + data[4:] if escaped else data


class _Log(NamedTuple):
    volume: BinaryIO
    block_size: int
    blocks: Sequence[int]
    first: int
    last: int
    features: int

    def read(self, number: int) -> bytes:
        return bytes_at(self.volume, self.blocks[number] * self.block_size, self.block_size)

    def after(self, number: int, count: int = 1) -> int:
        number += count
        return number if number < self.last else number - self.last + self.first


def replayed(volume: BinaryIO, size: int, block_size: int, blocks: Sequence[int]) -> BinaryIO:
    """The volume as it is after its journal.

    :param blocks: where the blocks of the journal lie.
    :raises Unreadable: the journal is of a kind that is not known. Any of broken(): it is damaged.
    """
    head = bytes_at(volume, blocks[0] * block_size, 1024)
    magic, kind = struct.unpack_from(">II", head)
    own_size, length, first, sequence, start = struct.unpack_from(">5I", head, 12)
    (features,) = struct.unpack_from(">I", head, 40) if kind == _SUPERBLOCKS[1] else (0,)
    if magic != _MAGIC or kind not in _SUPERBLOCKS or own_size != block_size or not 0 < first < length <= len(blocks):
        raise Unreadable("its journal makes no sense")
    require_known(features, _INCOMPATIBLE, _INCOMPATIBLE_NAMES, "features of its journal")
    log = _Log(volume, block_size, blocks, first, length, features)
    places: Dict[int, Tuple[int, int, bool]] = {}
    revoked: Dict[int, int] = {}
    if start:
        for number, (tagged, gone) in _transactions(log, start, sequence):
            for block, place, escaped in tagged:
                places[block] = (number, place, escaped)
            for block in gone:
                revoked[block] = number
    # A block that is revoked in a transaction is not to be had of it, nor of earlier ones.
    kept = {
        block: (place, escaped) for block, (number, place, escaped) in places.items() if revoked.get(block, -1) < number
    }
    return cast(BinaryIO, Replayed(volume, size, block_size, kept))


_Content = Tuple[List[Tuple[int, int, bool]], List[int]]


def _transactions(log: _Log, at: int, sequence: int) -> Iterator[Tuple[int, _Content]]:
    """The transactions that were committed, in their order: number, blocks with their places, and what is revoked."""
    passed = 0
    number = 0
    content: _Content = ([], [])
    while passed < log.last:
        block = log.read(at)
        magic, kind, own = struct.unpack_from(">III", block)
        if magic != _MAGIC or own != (sequence + number) & 0xFFFFFFFF:
            return
        at, passed = log.after(at), passed + 1
        if kind == _DESCRIPTOR:
            for target, escaped in _tags(log, block):
                content[0].append((target, log.blocks[at], escaped))
                at, passed = log.after(at), passed + 1
        elif kind == _REVOKE:
            content[1].extend(_revoked(log, block))
        elif kind == _COMMIT:
            yield number, content
            number += 1
            content = ([], [])
        else:
            return


def _tags(log: _Log, block: bytes) -> Iterator[Tuple[int, bool]]:
    """The places that a descriptor names, and whether the block was escaped."""
    wide = bool(log.features & _64BIT)
    if log.features & _CHECKSUM_3:
        length = 16
    else:
        length = (12 if wide else 8) + (2 if log.features & _CHECKSUM_2 else 0)
    position = 12
    end = log.block_size - (4 if log.features & (_CHECKSUM_2 | _CHECKSUM_3) else 0)
    while position + length <= end:
        if log.features & _CHECKSUM_3:
            low, flags, high = struct.unpack_from(">III", block, position)
        else:
            low, flags = struct.unpack_from(">I2xH", block, position)
            high = struct.unpack_from(">I", block, position + 8)[0] if wide else 0
        yield (high << 32 if wide else 0) | low, bool(flags & _ESCAPED)
        position += length + (0 if flags & _SAME_UUID else 16)
        if flags & _LAST:
            return


def _revoked(log: _Log, block: bytes) -> List[int]:
    (used,) = struct.unpack_from(">I", block, 12)
    form, length = (">Q", 8) if log.features & _64BIT else (">I", 4)
    if not 16 <= used <= log.block_size:
        raise ValueError("its journal is damaged")
    return [struct.unpack_from(form, block, position)[0] for position in range(16, used - length + 1, length)]
