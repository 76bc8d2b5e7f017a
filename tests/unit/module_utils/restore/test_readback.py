# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Any, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.readback import differing_areas, first_difference

CAPACITY = (5 << 20) + 3 * 512


@pytest.fixture
def disks(tmp_path: Path, nbdkit: Any) -> Tuple[Path, Path, str, str]:
    data = random.Random(7).randbytes(CAPACITY)
    paths = (tmp_path / "a", tmp_path / "b")
    for path in paths:
        path.write_bytes(data)
    uris = [nbdkit("file", path).uri for path in paths]
    return (*paths, *uris)


def test_the_same_bytes_are_the_same_and_all_are_read(disks: Any) -> None:
    seen: List[Tuple[int, int]] = []
    assert first_difference(disks[2], disks[3], CAPACITY, on_progress=lambda *at: seen.append(at)) is None
    assert seen[-1] == (CAPACITY, CAPACITY)


@pytest.mark.parametrize("offset", [0, (1 << 20) - 1, 1 << 20, (3 << 20) + 77, CAPACITY - 1])
def test_one_bit_anywhere_is_found(disks: Any, offset: int) -> None:
    with open(disks[1], "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))
    assert first_difference(disks[2], disks[3], CAPACITY) == offset - offset % (1 << 20)


def test_of_two_differences_the_first_is_told(disks: Any) -> None:
    for offset in ((4 << 20) + 5, (2 << 20) + 5):
        with open(disks[1], "r+b") as stream:
            stream.seek(offset)
            stream.write(b"other")
    assert first_difference(disks[2], disks[3], CAPACITY) == 2 << 20


def test_what_a_server_says_of_holes_is_not_believed(nbdkit: Any) -> None:
    """A server that calls old data a hole would hide what a restore did not write."""
    answers = ["get_size=echo 1M", "can_extents=exit 0", "extents=echo 0 1M hole,zero"]
    liar = nbdkit("eval", *answers, "pread=head -c $3 /dev/zero | tr '\\0' x")
    zeros = nbdkit("null", "size=1M")
    assert first_difference(zeros.uri, liar.uri, 1 << 20) == 0


def test_a_disk_that_is_too_small_a_dead_server_and_a_silent_one(disks: Any, tmp_path: Path, nbdkit: Any) -> None:
    with pytest.raises(DataPathError, match="bytes, the disk has"):
        first_difference(disks[2], disks[3], CAPACITY + 512)
    broken = nbdkit("--filter=error", "file", disks[0], "error-pread-rate=100%")
    with pytest.raises(DataPathError, match="the disk that was written back failed"):
        first_difference(disks[2], broken.uri, CAPACITY)
    slow = nbdkit("--filter=delay", "file", disks[0], "rdelay=30")
    begun = time.monotonic()
    with pytest.raises(DataPathError, match="no answer for 1 s") as caught:
        first_difference(slow.uri, disks[3], CAPACITY, io_timeout=1)
    assert time.monotonic() - begun < 10 and caught.value.retryable
    gone = nbdkit("file", disks[0])
    gone.stop(1)
    with pytest.raises(DataPathError):
        first_difference(gone.uri, disks[3], CAPACITY)


def _scribble(path: Path, *places: Tuple[int, int]) -> None:
    """Every byte becomes another one."""
    content = bytearray(path.read_bytes())
    for offset, length in places:
        content[offset : offset + length] = bytes(byte ^ 1 for byte in content[offset : offset + length])
    path.write_bytes(content)


def test_all_that_differs_is_found_to_the_sector(disks: Any) -> None:
    seen: List[Tuple[int, int]] = []
    assert not differing_areas(disks[2], disks[3], CAPACITY)
    places = [(0, 512), (65536 - 512, 1024), (1 << 20, 3 << 20), (CAPACITY - 512, 512)]
    _scribble(disks[1], *places)
    found = differing_areas(disks[2], disks[3], CAPACITY, on_progress=lambda *at: seen.append(at))
    assert list(found) == places and seen[-1] == (CAPACITY, CAPACITY)
    _scribble(disks[1], (200_000, 1))
    assert (200_000 // 512 * 512, 512) in differing_areas(disks[2], disks[3], CAPACITY)


def test_what_is_compared_next_may_depend_on_what_differed(disks: Any) -> None:
    asked: List[Extents] = []
    seen: List[Tuple[int, int]] = []
    _scribble(disks[1], (512, 512), (1 << 20, 512), (3 << 20, 1024))
    first, second = Extents.of([(0, 4096), (3 << 20, 512)]), Extents.of([(1 << 20, 4096), ((3 << 20) + 512, 4096)])

    def following(differing: Extents, then: Extents) -> Extents:
        asked.append(differing)
        return then

    for then, wanted in (
        (second, [(512, 512), (1 << 20, 512), (3 << 20, 1024)]),
        (Extents.of(), [(512, 512), (3 << 20, 512)]),
    ):
        options: Any = {"on_progress": lambda *at: seen.append(at)}
        found = differing_areas(
            disks[2], disks[3], CAPACITY, areas=first, following=partial(following, then=then), **options
        )
        assert list(found) == wanted
        assert list(asked.pop()) == [(512, 512), (3 << 20, 512)] and not asked
        assert seen[-1] == (first.total_bytes + then.total_bytes,) * 2
    nothing = Extents.of()
    assert differing_areas(disks[2], disks[3], CAPACITY, areas=nothing, following=lambda _none: first) == found


def test_only_the_areas_that_are_given_are_compared(disks: Any) -> None:
    seen: List[Tuple[int, int]] = []
    _scribble(disks[1], (0, 4096), (3 << 20, 4096), (CAPACITY - 512, 512))
    areas = Extents.of([(2048, 1024), (5000, 100_000), ((3 << 20) - 512, 1024), (CAPACITY - 1024, 4096)])
    wanted = [(2048, 1024), (3 << 20, 512), (CAPACITY - 512, 512)]
    assert list(differing_areas(disks[2], disks[3], CAPACITY, areas=areas)) == wanted
    options: Any = {"on_progress": lambda *at: seen.append(at)}
    assert first_difference(disks[2], disks[3], CAPACITY, areas=areas, **options) == 2048
    same = Extents.of([(4096, 1 << 20)])
    assert first_difference(disks[2], disks[3], CAPACITY, areas=same, **options) is None
    assert seen[-1] == (1 << 20, 1 << 20)
    assert first_difference(disks[2], disks[3], CAPACITY, areas=Extents.of()) is None


def test_which_side_can_not_be_read_is_told(disks: Any, nbdkit: Any) -> None:
    broken = nbdkit("--filter=error", "file", disks[0], "error-pread-rate=100%")
    for uris, side in (((disks[2], broken.uri), "target"), ((broken.uri, disks[3]), "source")):
        with pytest.raises(DataPathError) as caught:
            differing_areas(*uris, CAPACITY)
        assert caught.value.details["side"] == side
