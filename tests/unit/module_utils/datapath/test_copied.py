# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a copy whose source failed reports as copied is in the target and in the hashes; the rest makes it whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

import blake3
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.copier import copy
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import HashWriter, read_hashes
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import Child, RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from hypothesis import given, settings
from hypothesis import strategies as st

CLUSTER = 65536
SECTOR = 512
OLD = 0xAA
MIB = 1 << 20

Farm = Tuple[Path, List[str], str]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A folder, sources that refuse so many of the reads (the last one none), and a target."""
    folder = tmp_path_factory.mktemp("disks")
    children = []
    with RuntimeDir("copied") as run_dir:

        def start(name: str, filters: List[str], *parameters: str) -> str:
            socket = os.path.join(run_dir, name)
            argv = ["nbdkit", "-f", "-U", socket, *filters, "file", f"dir={folder}", *parameters]
            child = Child.start(argv, log_path=socket + ".log", name=name)
            children.append(child)
            child.wait_for_socket(socket, 10)
            return f"nbd+unix:///{{}}?socket={socket}"

        failing = [
            start(f"failing{rate}", ["--filter=error"], "error-pread=EIO", f"error-pread-rate={rate}%")
            for rate in (80, 40, 10)
        ]
        yield folder, [*failing, start("sound", [])], start("target", [])
        for child in children:
            child.stop()


segments = st.lists(st.tuples(st.sampled_from(["data", "zeros", "hole"]), st.integers(1, 400)), min_size=1, max_size=12)
fractions = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 600)), max_size=6)


def _write_disk(path: Path, pieces: List[Tuple[str, int]]) -> bytes:
    rng = random.Random(len(pieces))
    content = bytearray()
    with path.open("wb") as stream:
        for kind, sectors in pieces:
            data = rng.randbytes(sectors * SECTOR) if kind == "data" else bytes(sectors * SECTOR)
            if kind != "hole":
                stream.seek(len(content))
                stream.write(data)
            content += data
        stream.truncate(len(content))
    return bytes(content)


def _check_hashes(path: str, content: bytes, covered: Extents) -> None:
    """Every piece is right, and together they are exactly *covered*."""
    pieces = list(read_hashes(path)[1])
    for offset, length, digest in pieces:
        assert blake3.blake3(content[offset : offset + length]).hexdigest() == digest
    assert Extents.of((offset, length) for offset, length, _digest in pieces) == covered


@settings(max_examples=60)
@given(
    segments=segments,
    fractions=st.none() | fractions,
    zeros=st.sampled_from(["drop", "write"]),
    connections=st.integers(1, 2),
)
def test_what_is_reported_is_there_and_the_rest_makes_it_whole(
    farm: Farm, segments: List[Tuple[str, int]], fractions: Optional[Any], zeros: str, connections: int
) -> None:
    folder, sources, target = farm
    content = _write_disk(folder / "source", segments)
    capacity = len(content)
    # Over zeros nothing has to be dropped; over anything else zeros have to be written.
    before = bytes(capacity) if zeros == "drop" else bytes([OLD]) * capacity
    (folder / "target").write_bytes(before)
    wanted = None
    if fractions is not None:
        wanted = Extents.of((int(at * capacity) // SECTOR * SECTOR, sectors * SECTOR) for at, sectors in fractions)
        wanted = wanted.round_out(CLUSTER, capacity)
    areas, copied = wanted, Extents.of([])
    hashes_path = str(folder / "hashes")
    with HashWriter(hashes_path, capacity) as hashes:
        for source in sources:
            try:
                copy(
                    source.format("source"),
                    target.format("target"),
                    capacity_bytes=capacity,
                    areas=areas,
                    hashes=hashes,
                    request_bytes=CLUSTER,
                    connections=connections,
                    depth=3,
                    zeros=zeros,
                )
                break
            except DataPathError as error:
                assert error.details["side"] == "source" and error.done is not None
                whole = Extents.whole(capacity) if areas is None else areas
                assert error.copied.subtract(whole) == Extents.of([])
                assert all(not offset % CLUSTER for offset, _length in error.copied)
                assert all(not end % CLUSTER or end == capacity for end in map(sum, error.copied))
                copied = copied.union(error.copied)
                now = (folder / "target").read_bytes()
                for offset, length in copied:
                    assert now[offset : offset + length] == content[offset : offset + length]
                areas = whole.subtract(error.copied)
    expected = bytearray(before)
    for offset, length in Extents.whole(capacity) if wanted is None else wanted:
        expected[offset : offset + length] = content[offset : offset + length]
    assert (folder / "target").read_bytes() == bytes(expected)
    found = Extents.of((offset, length) for offset, length, _digest in read_hashes(hashes_path)[1])
    if wanted is not None:
        assert found == wanted
    else:
        # What a source knows to be zeros without reading is in no hash of a whole disk.
        assert all(
            not any(content[offset : offset + length]) for offset, length in Extents.whole(capacity).subtract(found)
        )
    _check_hashes(hashes_path, content, found)


class _Kill(HashWriter):
    """Hashes that kill a process when so many pieces have come."""

    def __init__(self, path: str, capacity: int, after: int, act: Callable[[], None]) -> None:
        super().__init__(path, capacity)
        self.left, self.act = after, act

    def add(self, offset: int, data: Any) -> None:
        super().add(offset, data)
        self.left -= 1
        if not self.left:
            self.act()


@pytest.mark.parametrize("after", [1, 7, 40])
def test_another_source_goes_on_in_a_compressed_layer(nbdkit: Any, tmp_path: Path, run_dir: str, after: int) -> None:
    """The compress filter takes each cluster once; so what was sent when the source died must not be sent again."""
    capacity = 48 * MIB + 3 * SECTOR
    rng = random.Random(after)
    content = b"".join(rng.randbytes(CLUSTER) if n % 3 else b"text " * 13107 + b"!" for n in range(capacity // CLUSTER))
    content += rng.randbytes(capacity - len(content))
    (tmp_path / "disk").write_bytes(content)
    dying = nbdkit("-r", "--filter=delay", "file", tmp_path / "disk", "rdelay=5ms")
    layer = str(tmp_path / "layer.qcow2")
    image.create_layer(layer, capacity)
    hashes = _Kill(str(tmp_path / "hashes"), capacity, after, lambda: os.kill(dying.pid, signal.SIGKILL))
    with image.serve(layer, run_dir=run_dir, writable=True, compress=True) as target, pytest.raises(
        DataPathError
    ) as caught:
        copy(dying.uri, target.uri, capacity_bytes=capacity, hashes=hashes)
    copied = caught.value.copied
    assert 0 < copied.total_bytes < capacity and caught.value.done.bytes_read >= copied.total_bytes
    sound = nbdkit("-r", "file", tmp_path / "disk")
    with image.serve(layer, run_dir=run_dir, writable=True, compress=True) as target:
        copy(
            sound.uri,
            target.uri,
            capacity_bytes=capacity,
            areas=Extents.whole(capacity).subtract(copied),
            hashes=hashes,
        )
    hashes.close()
    image.shrink_to(layer, capacity)
    image.check(layer)
    subprocess.run(["qemu-img", "compare", "-F", "raw", layer, str(tmp_path / "disk")], check=True, capture_output=True)
    _check_hashes(str(tmp_path / "hashes"), content, Extents.whole(capacity))


def test_a_target_that_fails_reports_nothing(nbdkit: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(random.Random(1).randbytes(8 * MIB))
    source = nbdkit("-r", "file", tmp_path / "disk")
    target = nbdkit("--filter=error", "memory", 8 * MIB, "error-pwrite=EIO", "error-pwrite-rate=100%")
    with pytest.raises(DataPathError) as caught:
        copy(source.uri, target.uri, capacity_bytes=8 * MIB)
    assert caught.value.details["side"] == "target" and caught.value.copied is None


def test_a_source_that_is_not_there_leaves_all_to_read(nbdkit: Any, run_dir: str) -> None:
    target = nbdkit("memory", MIB)
    with pytest.raises(DataPathError) as caught:
        copy(f"nbd+unix:///?socket={run_dir}/absent", target.uri, capacity_bytes=MIB)
    assert caught.value.copied == Extents.of([])


def test_both_sides_fail_together(nbdkit: Any, tmp_path: Path) -> None:
    """Then nothing can be relied on."""
    size = 16 * MIB
    (tmp_path / "disk").write_bytes(random.Random(1).randbytes(size))
    source = nbdkit("-r", "file", tmp_path / "disk")
    target = nbdkit("--filter=delay", "memory", size, "wdelay=300ms")

    def act() -> None:
        os.kill(target.pid, signal.SIGSTOP)
        os.kill(source.pid, signal.SIGKILL)

    hashes = _Kill(str(tmp_path / "hashes"), size, 3, act)
    with pytest.raises(DataPathError) as caught:
        copy(source.uri, target.uri, capacity_bytes=size, hashes=hashes, io_timeout=1)
    os.kill(target.pid, signal.SIGKILL)
    hashes.discard()
    assert caught.value.copied is None
