# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.readback import first_difference

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
