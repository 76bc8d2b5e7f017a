# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.screen import Screen, Steady, read_ppm

WIDTH, HEIGHT = 640, 400
BLACK = Screen(WIDTH, HEIGHT, bytes(WIDTH * HEIGHT * 3))


def with_spots(count: int, base: Screen = BLACK, start: int = 0) -> Screen:
    pixels = bytearray(base.pixels)
    for number in range(start, start + count):
        pixels[number * 30 : number * 30 + 3] = b"\xaa\xaa\xaa"
    return base._replace(pixels=bytes(pixels))


def test_a_cursor_alone_is_nothing() -> None:
    assert BLACK.blank and with_spots(18).blank and Screen(0, 0, b"").blank
    assert Screen(4, 2, b"\x11\x22\x33" * 8).blank
    assert not with_spots(600).blank
    noise = Screen(WIDTH, HEIGHT, random.Random(1).randbytes(WIDTH * HEIGHT * 3))
    assert not noise.blank and noise.same_as(noise) and not noise.same_as(BLACK)
    assert with_spots(600).same_as(with_spots(618)) and not with_spots(600).same_as(with_spots(600, start=2000))
    assert not BLACK.same_as(None) and not BLACK.same_as(Screen(1, 1, b"abc"))


def test_steady_is_what_stays() -> None:
    steady, login = Steady(10), with_spots(600)
    assert not steady.look(BLACK, 0) and not steady.look(BLACK, 20)
    assert not steady.look(login, 30) and not steady.look(login, 39)
    assert steady.look(with_spots(610), 40)
    assert not steady.look(with_spots(3000), 41) and not steady.look(login, 42) and not steady.look(login, 51)
    steady.reset()
    assert not steady.look(login, 53) and steady.look(login, 63)
    # What changes little by little is not the same as at the beginning.
    steady = Steady(10)
    assert not any(steady.look(with_spots(600 + 100 * step), step) for step in range(30))


def test_a_picture_of_qemus_becomes_a_png(tmp_path: Path) -> None:
    path = tmp_path / "screen.ppm"
    pixels = random.Random(2).randbytes(5 * 3 * 3)
    path.write_bytes(b"P6\n5 3\n255\n" + pixels)
    screen = read_ppm(str(path))
    assert screen == Screen(5, 3, pixels)
    png = screen.png()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", png[16:24]) == (5, 3)
    at = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    rows = zlib.decompress(png[at + 4 : at + 4 + length])
    assert rows == b"".join(b"\0" + pixels[row * 15 : row * 15 + 15] for row in range(3))
    for bad in (b"", b"P6\n5 3\n255\n" + pixels[:-1], b"P5\n1 1\n255\n\0", b"P6\n99999 99999\n255\n"):
        path.write_bytes(bad)
        with pytest.raises(DataPathError, match="not a picture"):
            read_ppm(str(path))
    with pytest.raises(DataPathError, match="can't be read"):
        read_ppm(str(tmp_path / "absent"))
