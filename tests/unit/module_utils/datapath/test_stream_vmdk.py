# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Streams as VMware's specification of virtual disks has them, read here from the beginning to the end, and by qemu."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import files, image, stream_vmdk
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError

SECTOR = 512
GRAIN = 128 * SECTOR
MIB = 1 << 20
HEADER = struct.Struct("<IIIQQQQIQQQB4sH")
END, TABLE, DIRECTORY, FOOTER = range(4)
# Places among the header's fields.
SECOND_DIRECTORY_AT, DIRECTORY_AT, FRONT = 8, 9, 10


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def raw_disk(path: Path, capacity: int, writes: List[Tuple[int, bytes]]) -> Path:
    with open(path, "wb") as stream:
        stream.truncate(capacity)
        for offset, data in writes:
            stream.seek(offset)
            stream.write(data)
    return path


def stream_of(folder: Path, capacity: int, writes: List[Tuple[int, bytes]]) -> Tuple[Path, Path]:
    """A disk, raw, and as the product writes it as a stream."""
    raw = raw_disk(folder / "raw", capacity, writes)
    layer, dest = folder / "layer", folder / "disk.vmdk"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(layer)], check=True)
    image.convert(str(layer), str(dest), "vmdk_stream")
    return raw, dest


def read_once(path: Path) -> Dict[str, Any]:
    """The parts of a stream, found by its markers alone."""
    data = path.read_bytes()
    header = HEADER.unpack_from(data)
    grains: Dict[int, Tuple[int, bytes]] = {}
    parts: List[Tuple[int, int, bytes]] = []
    at = header[FRONT] * SECTOR
    while True:
        value, size = struct.unpack_from("<QI", data, at)
        if size:
            assert not parts, "a grain behind the tables"
            grains[value * SECTOR] = at, zlib.decompress(data[at + 12 : at + 12 + size])
            at += -(-(12 + size) // SECTOR) * SECTOR
            continue
        kind = struct.unpack_from("<I", data, at + 12)[0]
        parts.append((kind, at + SECTOR, data[at + SECTOR : at + SECTOR * (1 + value)]))
        at += SECTOR * (1 + value)
        if kind == END:
            break
    return {"header": header, "grains": grains, "parts": parts, "rest": data[at:], "data": data}


@pytest.mark.parametrize(
    "capacity, writes",
    [
        (MIB + 67 * SECTOR, [(0, noise(9000)), (MIB + 60 * SECTOR, noise(7 * SECTOR))]),
        (MIB + SECTOR, [(MIB, noise(SECTOR))]),
        (MIB + 67 * SECTOR, [(5 * GRAIN, noise(GRAIN))]),
        (MIB, [(0, noise(MIB))]),
        (70 * MIB + 3 * SECTOR, [(GRAIN, b"a" * GRAIN), (40 * MIB, noise(3 * GRAIN)), (70 * MIB, b"end" * 512)]),
        (40 * MIB, [(39 * MIB, noise(GRAIN))]),
        (MIB + 67 * SECTOR, []),
        (SECTOR, [(0, noise(SECTOR))]),
    ],
    ids=["short last grain", "one sector", "last is empty", "full", "three tables", "second table", "empty", "tiny"],
)
def test_a_stream_has_whole_grains_tables_behind_them_and_an_end(tmp_path, capacity, writes):
    raw, path = stream_of(tmp_path, capacity, writes)
    found = read_once(path)
    disk = bytearray(-(-capacity // GRAIN) * GRAIN)
    for offset, (_at, data) in found["grains"].items():
        assert len(data) == GRAIN and offset % GRAIN == 0
        disk[offset : offset + GRAIN] = data
    assert bytes(disk[:capacity]) == raw.read_bytes() and not any(disk[capacity:])
    assert list(found["grains"]) == sorted(found["grains"])
    parts = found["parts"]
    tables = [part for part in parts if part[0] == TABLE]
    assert [kind for kind, _at, _data in parts] == [TABLE] * len(tables) + [DIRECTORY, FOOTER, END]
    assert not found["rest"] and not any(found["data"][-SECTOR:])
    # The directory names the tables, and the tables the grains.
    count = -(-capacity // (512 * GRAIN))
    directory = struct.unpack_from(f"<{count}I", parts[-3][2])
    named = {}
    for number, place in enumerate(directory):
        if place:
            content = next(data for kind, at, data in parts if kind == TABLE and at == place * SECTOR)
            for entry, sector in enumerate(struct.unpack("<512I", content)):
                if sector:
                    named[(number * 512 + entry) * GRAIN] = sector * SECTOR
    assert named == {offset: at for offset, (at, _data) in found["grains"].items()}
    assert len(tables) == sum(map(bool, directory))
    # The footer is the header, with the place of the directory.
    header, footer = list(found["header"]), list(HEADER.unpack_from(parts[-2][2]))
    assert header[DIRECTORY_AT] == 0xFFFFFFFFFFFFFFFF and footer[DIRECTORY_AT] * SECTOR == parts[-3][1]
    assert header[2] == 0x30001 and header[SECOND_DIRECTORY_AT] == 0 and header[3] * SECTOR == capacity
    assert header[:DIRECTORY_AT] + header[FRONT:] == footer[:DIRECTORY_AT] + footer[FRONT:]
    assert not any(found["data"][(header[5] + header[6]) * SECTOR : header[FRONT] * SECTOR])
    assert image.compare(str(raw), str(path), a_format="raw", b_format="vmdk_stream")


@pytest.mark.parametrize("format", ["vmdk", "vmdk_stream"])
def test_a_vmdk_names_itself_and_no_file_that_is_gone(tmp_path, format):
    layer = tmp_path / "layer"
    image.create_layer(str(layer), MIB)
    with files.Folder(str(tmp_path)) as folder, files.Stage(folder, "x") as stage:
        descriptor = image.convert_into(stage, "app01-2000.vmdk", str(layer), format)
        data = os.pread(descriptor, 20 * SECTOR, SECTOR)
        os.close(descriptor)
    assert b'SPARSE "app01-2000.vmdk"\n' in data and b"part-" not in data


def test_what_has_no_end_is_not_of_the_format(tmp_path):
    raw, path = stream_of(tmp_path, MIB + SECTOR, [(MIB, noise(SECTOR))])
    bare = tmp_path / "bare.vmdk"
    options = ["-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run(["qemu-img", "convert", "-f", "raw", *options, str(raw), str(bare)], check=True)
    within = tmp_path / "within"
    within.write_bytes(bytes(1024) + path.read_bytes())
    for name, offset, good in ((path, 0, True), (bare, 0, False), (within, 1024, True), (within, 0, False)):
        with open(name, "rb") as stream:
            assert image.is_of_format(stream.fileno(), "vmdk_stream", offset) is good


@pytest.mark.parametrize(
    "place, data, words",
    [
        (0, b"QFI\xfb", "header"),
        (20, struct.pack("<Q", 64), "header"),  # grains of 32 KiB
        (56, struct.pack("<Q", 0xFFFFFFFFFFFFFFFF), "header"),  # finished already
        (77, struct.pack("<H", 0), "header"),  # not compressed
        ("second table", b"\xff\xff\xff\xff", "ends early"),
        ("second grain", struct.pack("<I", 128), "order"),
        ("last marker", struct.pack("<Q", 128), "last grain"),
        ("last data", b"\xff\xff\xff\xff", "last grain"),
    ],
)
def test_another_qemu_that_writes_otherwise_is_refused(tmp_path, place, data, words):
    raw = raw_disk(tmp_path / "raw", 33 * MIB + SECTOR, [(0, noise(2 * GRAIN)), (33 * MIB, noise(SECTOR))])
    path = tmp_path / "x.vmdk"
    options = ["-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run(["qemu-img", "convert", "-f", "raw", *options, str(raw), str(path)], check=True)
    whole = path.read_bytes()
    directory = HEADER.unpack_from(whole)[DIRECTORY_AT] * SECTOR
    first, second = (entry * SECTOR for entry in struct.unpack_from("<2I", whole, directory))
    last = struct.unpack_from("<I", whole, second + 16 * 4)[0] * SECTOR
    named = {"second table": directory + 4, "second grain": first + 4, "last marker": last, "last data": last + 12}
    at = named.get(place, place)
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(data)
        stream.flush()
        with pytest.raises(DataPathError, match=words):
            stream_vmdk.finish(stream.fileno(), "x.vmdk")
