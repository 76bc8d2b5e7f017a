# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Partition tables that are damaged, odd or hostile: what they no longer tell is said, and nothing is guessed."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.tables import Table, read_table

MIB = 1 << 20
SIZE = 32 * MIB


def table_of(data: bytes) -> Table:
    found = read_table(io.BytesIO(data), len(data))
    assert found is not None
    return found


def places(table: Table) -> List[Tuple[int, int]]:
    return [(entry.number, entry.offset // 512) for entry in table.entries]


@pytest.fixture
def gpt(c: Any, tmp_path: Path) -> bytes:
    image = tmp_path / "gpt"
    image.touch()
    os.truncate(image, SIZE)
    c.tool("sfdisk", "-q", image, input=b"label: gpt\nstart=2048, size=8192\nstart=20480, size=8192\n")
    return image.read_bytes()


def resealed(data: bytearray, at: int, sector: int = 512) -> None:
    """Put the checksums right again."""
    start, count, size = struct.unpack_from("<QII", data, at + 72)
    entries = bytes(data[start * sector : start * sector + count * size])
    struct.pack_into("<I", data, at + 88, zlib.crc32(entries))
    data[at + 16 : at + 20] = bytes(4)
    struct.pack_into("<I", data, at + 16, zlib.crc32(bytes(data[at : at + 92])))


def test_a_gpt_is_read_where_its_checksums_are_right(gpt: bytes) -> None:
    assert places(table_of(gpt)) == [(1, 2048), (2, 20480)]
    # A flipped bit of the first: the copy at the end is read.
    for at in (512 + 24, 512 + 72, 1024 + 32, 1024 + 40):
        data = bytearray(gpt)
        data[at] ^= 4
        assert places(table_of(bytes(data))) == [(1, 2048), (2, 20480)]
        data[-512 + 40] ^= 1
        assert table_of(bytes(data)) == Table([], "its partition table (GPT) is damaged", [])
    # Gone, but the table of the first sector says that there is one.
    data = bytearray(gpt)
    data[512:1024], data[-512:] = bytes(512), bytes(512)
    assert table_of(bytes(data)).problem == "its partition table (GPT) is damaged"


def test_a_gpt_that_makes_no_sense(gpt: bytes) -> None:
    for offset, form, value in ((80, "<I", 0xFFFFFFFF), (84, "<I", 1), (84, "<I", 1 << 30), (72, "<Q", 1 << 62)):
        data = bytearray(gpt)
        data[-512:] = bytes(512)
        struct.pack_into(form, data, 512 + offset, value)
        data[512 + 16 : 512 + 20] = bytes(4)
        struct.pack_into("<I", data, 512 + 16, zlib.crc32(bytes(data[512 : 512 + 92])))
        assert table_of(bytes(data)).problem is not None


def test_a_gpt_with_sectors_of_4096_bytes_and_a_hybrid_one(gpt: bytes) -> None:
    data = bytearray(SIZE)
    data[:512] = gpt[:512]
    data[4096 : 4096 + 512] = gpt[512:1024]
    data[8192 : 8192 + 16384] = gpt[1024 : 1024 + 16384]
    resealed(data, 4096, 4096)
    assert places(table_of(bytes(data))) == [(1, 2048 * 8), (2, 20480 * 8)]
    hybrid = bytearray(gpt)
    # A table of the first sector that says something else beside.
    struct.pack_into("<B3xB3xII", hybrid, 446 + 16, 0, 0x83, 4096, 100)
    assert places(table_of(bytes(hybrid))) == [(1, 2048), (2, 20480)]


def record(*entries: Tuple[int, int, int]) -> bytes:
    table = b"".join(struct.pack("<B3xB3xII", 0, *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def chained(*records: Tuple[int, bytes]) -> bytes:
    data = bytearray(SIZE)
    for sector, content in records:
        data[sector * 512 : sector * 512 + 512] = content
    return bytes(data)


FIRST = record((0x83, 2048, 2048), (0x05, 8192, 40000))


def test_logical_partitions() -> None:
    sound = chained((0, FIRST), (8192, record((0x83, 64, 500), (5, 1000, 600))), (9192, record((0x83, 64, 500))))
    assert places(table_of(sound)) == [(1, 2048), (5, 8256), (6, 9256)] and table_of(sound).lost == []
    # As Linux counts them: one without a partition has no number.
    empty = chained((0, FIRST), (8192, record((0, 0, 0), (5, 1000, 600))), (9192, record((0x83, 64, 500))))
    assert places(table_of(empty)) == [(1, 2048), (5, 9256)]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (record((0x83, 64, 500), (5, 0, 0)), None),
        (bytes(512), "is broken"),
        (record((0x83, 64, 500), (5, 1000, 600)), "in a circle"),
        (record((0x83, 64, 500), (0x83, 1000, 600)), "not as it should be"),
        (record((0x05, 64, 500), (0x83, 1000, 600)), "not as it should be"),
        (record((0x83, 64, 500), (0, 0, 0), (0x83, 99, 9)), "not as it should be"),
    ],
)
def test_a_chain_of_logical_partitions_that_does_not_end_as_it_should(second: bytes, why: Any) -> None:
    data = chained((0, FIRST), (8192, record((0x83, 64, 500), (5, 1000, 600))), (9192, second))
    table = table_of(data)
    assert places(table)[:2] == [(1, 2048), (5, 8256)]
    if why is None:
        assert table.lost == []
    else:
        assert len(table.lost) == 1 and why in table.lost[0][1]


def test_two_extended_partitions_and_a_long_chain() -> None:
    two = chained((0, record((0x05, 8192, 4000), (0x0F, 20480, 4000))), (8192, record((0x83, 64, 500))))
    assert places(table_of(two)) == [(5, 8256)] and table_of(two).lost[0][0] == 2
    links = [(8192 + 2 * at, record((0x83, 1, 1), (5, 2 * at + 2, 2))) for at in range(400)]
    long = table_of(chained((0, FIRST), *links))
    assert len(long.entries) == 257 and "more than 256" in long.lost[0][1]


def test_what_is_lost_is_told_as_a_volume(c: Any, look: Any, tmp_path: Path, gpt: bytes) -> None:
    """A file system that lies there is not looked for at places that a damaged table names."""
    system = tmp_path / "system"
    system.touch()
    os.truncate(system, 4 * MIB)
    c.tool("mkfs.ext4", "-q", "-F", system)
    data = bytearray(gpt)
    data[2048 * 512 : 2048 * 512 + 4 * MIB] = system.read_bytes()
    assert look(bytes(data)).volumes["2000p1"][:2] == ("ext4", True)
    data[1024 + 32], data[-512 + 40] = data[1024 + 32] ^ 4, data[-512 + 40] ^ 1
    assert look(bytes(data)).volumes == {"2000": ("unknown", False, "its partition table (GPT) is damaged")}
    lost = bytearray(chained((0, FIRST), (8192, bytes(512))))
    lost[2048 * 512 : 2048 * 512 + 1024] = bytes(1024)
    assert look(bytes(lost)).volumes["2000p5"] == ("unknown", False, "the chain of logical partitions is broken")
