# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The whole way of a layer, as an export goes it: create, serve with compression, copy, shrink, sync, rename."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import blake3
import nbd
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.copier import copy
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import HashWriter, read_hashes

MIB = 1 << 20
CLUSTER = image.CLUSTER_BYTES


def make_layer(folder, name, source, capacity, run_dir, *, areas=None, backing=None):
    final = os.path.join(folder, f"{name}.qcow2")
    part = f"{final}.part-r1"
    image.create_layer(part, capacity, backing=backing and f"{backing}.qcow2")
    with HashWriter(os.path.join(folder, f"{name}.hashes"), capacity) as hashes, image.serve(
        part, run_dir=run_dir, writable=True, compress=True
    ) as server:
        result = copy(
            source.uri,
            server.uri,
            capacity_bytes=capacity,
            areas=areas,
            hashes=hashes,
            zeros="write" if backing else "drop",
        )
    image.shrink_to(part, capacity)
    image.fsync_file(part)
    os.rename(part, final)
    image.fsync_dir(str(folder))
    return final, result


def change(disk, rng, count, capacity):
    """Write and zero random ranges as a guest would; returns the areas."""
    areas = []
    with open(disk, "r+b") as stream:
        for number in range(count):
            length = min(rng.randrange(1, 400) * 512, capacity)
            offset = rng.randrange(0, (capacity - length) // 512 + 1) * 512
            if number == 0:
                offset, length = 0, min(5 * CLUSTER, capacity)  # what the parent holds as data becomes zeros
            if number == 1:
                offset, length = capacity - 512, 512
            stream.seek(offset)
            stream.write(bytes(length) if number % 3 == 0 else rng.randbytes(length))
            areas.append((offset, length))
    return Extents.of(areas)


@pytest.mark.parametrize("capacity", [24 * MIB + 3 * 512, 24 * MIB + CLUSTER - 512, 16 * MIB, 512])
def test_a_full_and_its_overlays_hold_the_disk_byte_for_byte(tmp_path, nbdkit, run_dir, capacity):
    rng = random.Random(capacity)
    disk = str(tmp_path / "disk.raw")
    repository = tmp_path / "repository"
    repository.mkdir()
    with open(disk, "wb") as stream:
        stream.write(rng.randbytes(min(capacity, 6 * MIB)))
        stream.truncate(capacity)
    copies, areas = [], [None]
    for number, name in enumerate(("one", "two", "three")):
        if number:
            areas.append(change(disk, rng, 30 if capacity > 512 else 1, capacity))
        source = nbdkit("-r", "file", disk)
        parent = ("one", "two")[number - 1] if number else None
        path, result = make_layer(repository, name, source, capacity, run_dir, areas=areas[-1], backing=parent)
        snapshot = str(tmp_path / f"{name}.raw")
        subprocess.run(["cp", "--sparse=always", disk, snapshot], check=True)
        copies.append(snapshot)
        assert source.stop() == 0
        assert image.check(path)["check-errors"] == 0
        if number:
            rounded = areas[-1].round_out(CLUSTER, capacity)
            assert result.areas == len(rounded)
            assert result.bytes_read <= rounded.total_bytes

    assert sorted(os.listdir(repository)) == sorted(
        f"{n}.{e}" for n in ("one", "two", "three") for e in ("qcow2", "hashes")
    )
    # in a folder copied elsewhere, with nothing but qemu
    elsewhere = tmp_path / "elsewhere"
    os.rename(repository, elsewhere)
    for name, snapshot in zip(("one", "two", "three"), copies):
        path = str(elsewhere / f"{name}.qcow2")
        assert image.image_info(path)["virtual-size"] == capacity
        assert image.compare(path, snapshot, b_format="raw")
        image.convert(path, str(tmp_path / "restored.raw"), "raw")
        subprocess.run(["cmp", snapshot, str(tmp_path / "restored.raw")], check=True)
        with open(snapshot, "rb") as stream:
            for offset, length, digest in read_hashes(str(elsewhere / f"{name}.hashes"))[1]:
                stream.seek(offset)
                assert blake3.blake3(stream.read(length)).hexdigest() == digest


def test_a_chain_is_restored_into_an_existing_disk(tmp_path, nbdkit, run_dir):
    """All of the disk is written, zeros too, through a target of exactly its size."""
    capacity = 5 * MIB + 1536
    rng = random.Random(9)
    disk = str(tmp_path / "disk.raw")
    with open(disk, "wb") as stream:
        stream.write(rng.randbytes(2 * MIB))
        stream.truncate(capacity)
    make_layer(tmp_path, "one", nbdkit("-r", "file", disk), capacity, run_dir)
    areas = change(disk, rng, 10, capacity)
    top, unused = make_layer(tmp_path, "two", nbdkit("-r", "file", disk), capacity, run_dir, areas=areas, backing="one")
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xaa" * capacity)
    with image.serve(top, run_dir=run_dir) as server:
        copy(server.uri, nbdkit("file", target).uri, capacity_bytes=capacity, align_bytes=512, zeros="write")
    subprocess.run(["cmp", disk, target], check=True)


def test_several_disks_in_threads(tmp_path, nbdkit, run_dir):
    """Each disk of a VM is exported by a thread of its own, servers and all."""
    capacity = 20 * MIB
    rng = random.Random(4)
    sources, failures = [], []
    for number in range(3):
        disk = tmp_path / f"disk{number}.raw"
        disk.write_bytes(rng.randbytes(capacity))
        sources.append((disk, nbdkit("-r", "file", disk)))

    def work(number):
        try:
            path, unused = make_layer(tmp_path, f"layer{number}", sources[number][1], capacity, run_dir)
            assert image.compare(path, str(sources[number][0]), b_format="raw")
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Long chains

LONG = 20
_UNDER_LIMITS = """
import resource, sys
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
try:
    with RuntimeDir("limits") as run_dir, image.serve(sys.argv[1], run_dir=run_dir.path) as child:
        print("served", child.alive)
    image.convert(sys.argv[1], sys.argv[1] + ".raw", "raw")
except DataPathError as error:
    print(error.what, "|", error.reason, "|", error.remedy)
"""


@pytest.fixture(scope="module")
def long_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    for number in range(LONG):
        backing = f"{number - 1}.qcow2" if number else None
        image.create_layer(str(folder / f"{number}.qcow2"), 1 << 20, backing=backing)
    return folder / f"{LONG - 1}.qcow2"


@pytest.mark.parametrize(
    ("soft", "hard", "words"),
    [
        (24, 4096, "served True"),
        (24, 40, f"A chain of layers is too long to be opened | it has {LONG} layers, and a process may open 40 files"),
    ],
)
def test_a_chain_and_the_limit_of_open_files(long_chain: Path, soft: int, hard: int, words: str) -> None:
    command = [sys.executable, "-c", _UNDER_LIMITS, str(long_chain), str(soft), str(hard)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(words) and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_each_backing_layer_has_a_bound_of_its_own(long_chain: Path) -> None:
    for opts, prefix in (
        (image.layer_opts(str(long_chain)), "backing."),
        (image.overlay_opts(str(long_chain), "/overlay"), "backing.backing."),
        (image._image_opts(str(long_chain), "qcow2", True), "file.backing."),
    ):
        bounds = re.findall(r",((?:file\.)?(?:backing\.)+)l2-cache-size=(\d+)", opts)
        assert [name for name, _size in bounds] == [prefix + "backing." * number for number in range(LONG - 1)]
        assert sum(int(size) for _name, size in bounds) <= image._TABLES_BYTES
    assert "l2-cache-size" not in image.overlay_opts(str(long_chain), "/overlay", bounded=False)
    assert len(image._tables_opts("backing.", 1000)) <= image._OPTIONS_BYTES


def _peak_mib(layer: str, run_dir: str) -> float:
    """What qemu-nbd took at most when the whole disk was asked for."""
    with image.serve(layer, run_dir=run_dir) as child:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_uri(child.uri)
        size = handle.get_size()
        for at in range(0, size, 1 << 30):
            handle.block_status(min(1 << 30, size - at), at, lambda *_answer: 0)
        text = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
        handle.shutdown()
    return int(re.search(r"VmHWM:\s*(\d+)", text)[1]) / 1024  # type: ignore[index]


def test_the_tables_of_a_chain_are_bounded(tmp_path: Path, run_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers of 64 GiB, each with a cluster in each 512 MiB: 8 MiB of tables for each layer."""
    layers, size = 6, 64 << 30
    for number in range(layers):
        path = str(tmp_path / f"{number}.qcow2")
        image.create_layer(path, size, backing=f"{number - 1}.qcow2" if number else None)
        writes = "\n".join(f"write {at + number * 65536} 64k" for at in range(0, size, 512 << 20))
        subprocess.run(["qemu-io", "-f", "qcow2", path], input=writes, check=True, capture_output=True, text=True)
    monkeypatch.setattr(image, "_TABLES_BYTES", 4 << 20)
    bounded = _peak_mib(path, str(run_dir))
    monkeypatch.setattr(image, "_tables_opts", lambda *_arguments: "")
    assert bounded < _peak_mib(path, str(run_dir)) - (layers - 2) * 8
