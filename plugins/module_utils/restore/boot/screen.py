# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A guest's screen: a picture in qemu's PPM, whether it is blank or as before, and the same as a PNG. Pure."""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple, Optional

from ...errors import DataPathError

#: A text cursor that blinks, or a clock, does not make another screen: so many pixels of 100,000 may differ.
SAME = 200
#: A cursor alone does not make a screen that is not blank.
BLANK = 50
_HEADER = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")
_MOST_BYTES = 64 << 20


class Screen(NamedTuple):
    """A picture: three bytes a pixel, rows from the top."""

    width: int
    height: int
    pixels: bytes

    @property
    def blank(self) -> bool:
        """All of it has one colour, but for what a cursor takes."""
        total = self.width * self.height
        if not total:
            return True
        # The colour in the middle of a few rows is the background, if there is one.
        for number in range(0, self.height, max(1, self.height // 4)):
            at = (number * self.width + self.width // 2) * 3
            if self._differ_at_most(self.pixels[at : at + 3] * total, BLANK):
                return True
        return False

    def _differ_at_most(self, pixels: bytes, share: int) -> bool:
        """Whether no more pixels than that share of 100,000 are others."""
        most = self.width * self.height * share // 100_000
        step = self.width * 3
        found = 0
        for start in range(0, len(self.pixels), step):
            mine, theirs = self.pixels[start : start + step], pixels[start : start + step]
            if mine != theirs:
                found += sum(mine[at : at + 3] != theirs[at : at + 3] for at in range(0, len(mine), 3))
                if found > most:
                    return False
        return True

    def same_as(self, other: Optional[Screen]) -> bool:
        """Whether nothing but a cursor or the like has changed."""
        if other is None or (self.width, self.height) != (other.width, other.height):
            return False
        return self._differ_at_most(other.pixels, SAME)

    def png(self) -> bytes:
        """The picture as a PNG file."""
        step = self.width * 3
        rows = b"".join(b"\0" + self.pixels[start : start + step] for start in range(0, len(self.pixels), step))
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )


def read_ppm(path: str) -> Screen:
    """The picture that qemu has written. DataPathError: it is none."""
    try:
        with open(path, "rb") as image:
            data = image.read(_MOST_BYTES)
    except OSError as error:
        raise DataPathError("The guest's screen can't be read", subject=path, reason=error.strerror) from None
    found = _HEADER.match(data)
    if found is not None:
        width, height = int(found.group(1)), int(found.group(2))
        pixels = data[found.end() :]
        if len(pixels) == width * height * 3:
            return Screen(width, height, pixels)
    raise DataPathError("The guest's screen can't be read", subject=path, reason="it is not a picture of qemu's")


class Steady:
    """Tells when a screen has stayed the same for long enough.

    :param seconds: how long.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._first: Optional[Screen] = None
        self._since = 0.0

    def look(self, screen: Screen, now: float) -> bool:
        """Take in what is on the screen now; whether that has been so for long enough, and is something."""
        # Always compared with the first of them: what creeps along is not a steady screen.
        if screen.blank or not screen.same_as(self._first):
            self._first, self._since = (None if screen.blank else screen), now
            return False
        return now - self._since >= self.seconds

    def reset(self) -> None:
        """The machine begins again."""
        self._first = None
