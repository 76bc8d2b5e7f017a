# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The content of a disk as a server has it: programs and texts, some of it compressed already, some zeros, holes.

What is compressible comes from this machine's /usr/lib, for made-up patterns compress far too fast. Order, places and
noise are seeded. It is written as fast as a copy would be, so nothing is kept between two runs.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 64 * KIB

_POOL_BYTES = 384 * MIB
_LARGEST_FILE = 4 * MIB
_SMALLEST_FILE = 4 * KIB
# Shares of the disk's data: already compressed (media, archives), and zeros that the guest has written.
_NOISE_SHARE = 0.12
_ZERO_SHARE = 0.03
_PIECE = MIB


class Content:
    """Seeded bytes for a disk."""

    def __init__(self, seed: int = 1, pool_bytes: int = _POOL_BYTES) -> None:
        self._random = random.Random(seed)
        self._pool = b"".join(_files(Path("/usr/lib"), pool_bytes))[:pool_bytes]
        if len(self._pool) < 64 * MIB:
            raise RuntimeError("there is too little in /usr/lib to make a disk of it")

    def piece(self, length: int) -> bytes:
        """Some bytes of the mixture."""
        kind = self._random.random()
        if kind < _NOISE_SHARE:
            return self._random.randbytes(length)
        if kind < _NOISE_SHARE + _ZERO_SHARE:
            return bytes(length)
        start = self._random.randrange((len(self._pool) - length) // 4096) * 4096
        return self._pool[start : start + length]

    def fill(self, path: Path, capacity_bytes: int, data_bytes: int) -> List[int]:
        """Fill a raw image that is one hole with runs of data, spread over it. :returns: its 64 KiB blocks' offsets."""
        runs: List[int] = []
        left = data_bytes
        while left:
            runs.append(min(left, self._random.randrange(1, 33) * MIB))
            left -= runs[-1]
        gap = (capacity_bytes - data_bytes) // (len(runs) + 1) // BLOCK * BLOCK
        blocks: List[int] = []
        offset = gap
        with path.open("r+b") as image:
            for run in runs:
                for at in range(offset, offset + run, _PIECE):
                    os.pwrite(image.fileno(), self.piece(_PIECE), at)
                    blocks.extend(range(at, at + _PIECE, BLOCK))
                offset += run + gap
        return blocks

    def changes(self, blocks: List[int], share: float, payloads: int = 64) -> Dict[bytes, List[int]]:
        """New content for a share of the blocks, drawn at random: {64 KiB of bytes: the offsets they go to}."""
        chosen = self._random.sample(blocks, max(1, round(len(blocks) * share)))
        count = min(payloads, len(chosen))
        return {self._piece_of_data(): sorted(chosen[number::count]) for number in range(count)}

    def _piece_of_data(self) -> bytes:
        while True:
            data = self.piece(BLOCK)
            if data.strip(b"\0"):
                return data


def _files(folder: Path, total: int) -> Iterator[bytes]:
    """Contents of ordinary files, in an order that depends on their names only."""
    found: List[Tuple[str, str]] = []
    for parent, _folders, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            found.append((hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest(), path))
    for _order, path in sorted(found):
        if total <= 0:
            return
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size < _SMALLEST_FILE:
            continue
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE)
        total -= len(data)
        yield data
