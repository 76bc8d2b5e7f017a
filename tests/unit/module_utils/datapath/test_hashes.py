# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
import os
import random

import blake3
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import hashes
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import (
    HashWriter,
    canonical_blake3,
    hash_file,
    read_hashes,
)
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 4096


def pieces_of(path):
    header, pieces = read_hashes(str(path))
    return header, list(pieces)


@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=20), st.randoms())
def test_pieces_are_sorted_cut_and_hashed(tmp_path_factory, lengths, rng):
    path = str(tmp_path_factory.mktemp("h") / "x.hashes")
    disk = bytearray()
    ranges = []
    for length in lengths:
        kind = rng.choice(["data", "zeros", "hole"])
        if kind != "hole":
            ranges.append((kind, len(disk), length))
        disk += rng.randbytes(length) if kind == "data" else bytes(length)
    rng.shuffle(ranges)
    with HashWriter(path, len(disk), BLOCK) as writer:
        for kind, offset, length in ranges:
            if kind == "zeros":
                writer.add_zeros(offset, length)
            else:
                writer.add(offset, memoryview(disk)[offset : offset + length])
    header, pieces = pieces_of(path)
    assert header == {"format": 1, "algorithm": "blake3", "block_bytes": BLOCK, "capacity_bytes": len(disk)}
    covered = set()
    for offset, length, digest in pieces:
        assert digest == blake3.blake3(bytes(disk[offset : offset + length])).hexdigest()
        covered.update(range(offset, offset + length))
    assert covered == {byte for _unused, offset, length in ranges for byte in range(offset, offset + length)}


def test_many_pieces_spill_to_disk_and_come_back_sorted(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_SPILL_RECORDS", 100)
    monkeypatch.setattr(hashes, "_READ_RECORDS", 7)
    order = list(range(1037))
    random.Random(7).shuffle(order)
    writer = HashWriter(str(tmp_path / "x"), 1037 * BLOCK, BLOCK)
    for number in order:
        writer.add(number * BLOCK, number.to_bytes(BLOCK, "big"))
        assert len(writer._records) < 100
    assert os.listdir(tmp_path) == []  # the temporary file has no name
    writer.close()
    assert os.listdir(tmp_path) == ["x"]
    _unused, pieces = pieces_of(tmp_path / "x")
    expected = [(n * BLOCK, BLOCK, blake3.blake3(n.to_bytes(BLOCK, "big")).hexdigest()) for n in range(1037)]
    assert pieces == expected


def test_what_can_not_be_right_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="overlap"), HashWriter(str(path), 10 * BLOCK, BLOCK) as writer:
        writer.add(0, bytes(100))
        writer.add_zeros(99, 1)
    with pytest.raises(ValueError, match="not inside"), HashWriter(str(path), 100, BLOCK) as writer:
        writer.add(99, b"ab")
    with pytest.raises(DataPathError, match="No such file"):
        HashWriter(str(tmp_path / "absent" / "x"), 100).close()
    assert os.listdir(tmp_path) == []


GOOD = [[0, BLOCK, "a" * 64], [BLOCK, 10, "b" * 64], [3 * BLOCK, 100, "0" * 64]]
HEADER = {"format": 1, "algorithm": "blake3", "block_bytes": BLOCK, "capacity_bytes": 3 * BLOCK + 100}


@pytest.mark.parametrize(
    "number,line",
    [
        (1, "{}"),
        (1, json.dumps({**HEADER, "format": 2})),
        (1, json.dumps({**HEADER, "block_bytes": 0})),
        (1, json.dumps({**HEADER, "capacity_bytes": True})),
        (2, "nonsense"),
        (2, "[0, 1]"),
        (2, json.dumps([0, BLOCK, "A" * 64])),
        (2, json.dumps([0, BLOCK, "a" * 63])),
        (2, json.dumps([0, BLOCK + 1, "a" * 64])),
        (3, json.dumps([BLOCK - 1, 1, "a" * 64])),
        (3, json.dumps([BLOCK, 0, "a" * 64])),
        (3, json.dumps([-1, 5, "a" * 64])),
        (3, json.dumps([1.5, 5, "a" * 64])),
        (4, json.dumps([3 * BLOCK, 101, "a" * 64])),
    ],
)
def test_damage_is_found_and_located(tmp_path, number, line):
    path = tmp_path / "x"
    lines = [json.dumps(HEADER)] + [json.dumps(piece) for piece in GOOD]
    path.write_text("\n".join(lines) + "\n")
    assert pieces_of(path)[1] == [tuple(piece) for piece in GOOD]
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DamagedError, match=f"line {number}"):
        pieces_of(path)


def test_a_cut_off_or_missing_file_is_damage(tmp_path):
    path = tmp_path / "x"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(GOOD[0]))
    with pytest.raises(DamagedError, match="line 2: it is cut off"):
        pieces_of(path)
    with pytest.raises(DamagedError, match="No such file"):
        read_hashes(str(tmp_path / "absent"))
    with pytest.raises(DamagedError):
        hash_file(str(tmp_path / "absent"))


def test_hash_file_and_canonical_json(tmp_path):
    data = random.Random(3).randbytes(2_500_000)
    (tmp_path / "x").write_bytes(data)
    assert hash_file(str(tmp_path / "x")) == blake3.blake3(data).hexdigest()
    expected = blake3.blake3('{"a":[1,"ü"],"b":null}'.encode()).hexdigest()
    assert canonical_blake3({"b": None, "a": [1, "ü"]}) == expected
    with pytest.raises(ValueError):
        canonical_blake3({"a": float("nan")})
