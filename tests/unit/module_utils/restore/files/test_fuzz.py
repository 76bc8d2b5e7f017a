# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Images of every kind with anything in their metadata: each is read, or refused, in seconds and in bounded memory.

`make soak` asks for more of them: SOAK_FILE_SYSTEMS rounds of each kind, with SOAK_SEED.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import agent

MIB = 1 << 20
ROUNDS = 6 * int(os.environ.get("SOAK_FILE_SYSTEMS", "1"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
SECONDS = 10.0
# What a process that imported all of it has, and what these images need.
MEMORY = 768 * MIB
_EXTREMES = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 40]
_EXTREMES += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def attempt(path: Path, work: Callable[[int, List[Dict[str, Any]]], None]) -> str:
    """What is wrong with how a process of its own reads an image; empty if nothing is."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            limit = _data_bytes() + MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            entry = {"key": 2000, "layers": [{"layer": str(path)}], "capacity_bytes": path.stat().st_size}
            work(write_end, [entry])
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
            os.write(write_end, traceback.format_exc()[-2000:].encode())
        finally:
            os._exit(status)
    os.close(write_end)
    told = b""
    deadline = time.monotonic() + SECONDS
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([read_end], [], [], left)[0]:
                os.kill(child, signal.SIGKILL)
                return f"it did not end within {SECONDS:g} s {told.decode()}"
            data = os.read(read_end, 65536)
            if not data:
                break
            told += data
    finally:
        os.close(read_end)
        _pid, status = os.waitpid(child, 0)
    return "" if os.waitstatus_to_exitcode(status) == 0 else told.decode("utf-8", "replace") or f"it ended: {status}"


def _data_bytes() -> int:
    """What this process has already, of all the tests before."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024


def read_all(c: Any, _out: int, disks: List[Dict[str, Any]]) -> None:
    """Open, walk and read everything, as the module would. What is told is not looked at, only that it is told."""
    agent.CheckedDisk = c.PlainDisk  # type: ignore[misc]
    sink = os.open("/dev/null", os.O_WRONLY)
    reader = agent.Agent(sink)

    def asked() -> Iterator[bytes]:
        yield json.dumps({"op": "open", "disks": disks, "run_dir": "/run"}).encode()
        numbers = list(range(len(reader._volumes)))
        walk = {"op": "walk", "volumes": numbers, "patterns": ["/**"], "recurse": True, "limit": 3000}
        yield json.dumps(walk).encode()
        for number in range(reader.found_files):
            yield json.dumps({"op": "read", "id": number}).encode()

    reader.serve(asked())


def mutated(dice: random.Random, sound: bytes, metadata: List[int]) -> bytearray:
    """The image with a few faults in what is not a file's content."""
    data = bytearray(sound)
    for _number in range(dice.choice([1, 2, 5, 30])):
        at = dice.choice(metadata)
        what = dice.randrange(6)
        if what == 0:
            data[at + dice.randrange(512)] = dice.randrange(256)
        elif what in (1, 2):
            width = dice.choice([2, 4, 8])
            value = dice.choice(_EXTREMES) & ((1 << 8 * width) - 1)
            place = at + dice.randrange(0, 512, width)
            data[place : place + width] = value.to_bytes(width, dice.choice(["little", "big"]))
        elif what == 3:
            other = dice.choice(metadata)
            data[at : at + 512] = data[other : other + 512]
        elif what == 4:
            # A number that leads somewhere leads to where another does.
            other, width = dice.choice(metadata) + dice.randrange(0, 504, 4), dice.choice([4, 8])
            place = at + dice.randrange(0, 504, 4)
            data[place : place + width] = data[other : other + width]
        else:
            data[at : at + 512] = dice.choice([bytes(512), b"\xff" * 512, dice.randbytes(512)])
    if dice.random() < 0.05:
        del data[dice.randrange(len(data)) & ~511 :]
    return data


def metadata_of(sound: bytes) -> List[int]:
    """Sectors that are not empty, nor as random as the content of files."""
    found = []
    for start in range(0, len(sound) - 511, 512):
        sector = sound[start : start + 512]
        # Of XFS' log the begin: it is most of it otherwise.
        if sound[:4] == b"XFSB" and sector[:4] in (b"\0\0\0\1", b"\xfe\xed\xba\xbe") and len(found) % 20:
            continue
        if 60 < sector.count(0) < 506 or start < 2048:
            found.append(start)
    return found


EXT = ["mke2fs", "-q", "-F", "-d", "TREE"]
NTFS = ["mkntfs", "-q", "-Q", "-F", "-s", "512", "-c", "512", "-p", "0", "-H", "255", "-S", "63"]
KINDS: Dict[str, Any] = {
    "ext2": (8, [*EXT, "-t", "ext2", "-b", "1024", "-O", "^dir_index"]),
    "ext4": (8, [*EXT, "-t", "ext4", "-b", "1024"]),
    "ext4 inline": (8, [*EXT, "-t", "ext4", "-O", "inline_data,meta_bg,^resize_inode"]),
    "ext4 in use": (8, [*EXT, "-t", "ext4", "-b", "1024", "-J", "size=1"]),
    "xfs": (32, ["mkfs.xfs", "-q"]),
    "xfs in use": (32, ["mkfs.xfs", "-q"]),
    "xfs 4": (32, ["mkfs.xfs", "-q", "-m", "crc=0"]),
    "btrfs": (112, ["mkfs.btrfs", "-q", "--rootdir", "TREE"]),
    "ntfs": (8, [*NTFS]),
    "ntfs compressed": (8, [*NTFS, "-C"]),
    "fat 12": (2, ["mkfs.fat", "-F", "12", "-s", "1"]),
    "fat 16": (12, ["mkfs.fat", "-F", "16"]),
    "fat 32": (40, ["mkfs.fat", "-F", "32", "-s", "1"]),
}


def filled(c: Any, folder: Path, kind: str) -> bytes:
    """A small image of that kind, with files that lie there in many ways."""
    size, words = KINDS[kind]
    tree = folder / "tree"
    tree.mkdir()
    (tree / "dir").mkdir()
    for number in range(40):
        (tree / "dir" / f"a-name-that-is-long-{number}").write_bytes(b"x" * number * 20)
    (tree / "some").write_bytes(random.Random(1).randbytes(150_000))
    (tree / "packed").write_bytes(b"packed " * 20_000)
    with (tree / "holes").open("wb") as file:
        for number in range(12):
            file.seek(number * 50_000)
            file.write(b"hole")
    if not kind.startswith(("fat", "ntfs")):
        os.symlink("dir/" + "y" * 70, tree / "link")
    image = folder / "image"
    image.touch()
    os.truncate(image, size * MIB)
    c.tool(*[str(tree) if word == "TREE" else word for word in words], image)
    if kind.startswith("fat"):
        c.tool("mcopy", "-s", "-i", image, tree / "dir", tree / "some", "::")
        return image.read_bytes()
    driver = "ntfs" if kind.startswith("ntfs") else kind.split()[0]
    if not kind.endswith(("in use", "compressed")) and driver not in ("xfs", "ntfs"):
        return image.read_bytes()
    place = folder / "mounted"
    place.mkdir()
    try:
        if driver == "ntfs":
            c.tool("ntfs-3g", "-o", "compression", image, place)
        else:
            c.tool("mount", "-o", "loop", "-t", driver, image, place)
    except AssertionError:
        return image.read_bytes()
    try:
        if kind.endswith("compressed"):
            os.setxattr(place, "system.ntfs_attrib_be", (0x800).to_bytes(4, "big"))
        shutil.copytree(tree, place / "tree", symlinks=True)
        c.tool("sync", "-f", place)
        if kind.endswith("in use"):
            shutil.rmtree(place / "tree" / "dir")
            with (place / "new").open("wb") as file:
                file.write(b"new")
                file.flush()
                os.fsync(file.fileno())
            return image.read_bytes()
    finally:
        c.tool("umount", place)
    return image.read_bytes()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_file_system_with_anything_in_it(c: Any, tmp_path: Path, kind: str) -> None:
    sound = filled(c, tmp_path, kind)
    metadata = metadata_of(sound)
    image = tmp_path / "mutated"
    wrong = []
    for number in range(ROUNDS):
        data = mutated(random.Random(f"{SEED} {kind} {number}"), sound, metadata)
        image.write_bytes(data)
        problem = attempt(image, lambda out, disks: read_all(c, out, disks))
        wrong += [f"{kind}, seed {SEED}, round {number}: {problem}"] if problem else []
    assert wrong == []


@pytest.mark.parametrize("compression", ["zlib", "lzo", "zstd"])
def test_btrfs_whose_compressed_extents_are_damaged(c: Any, tmp_path: Path, compression: str) -> None:
    """Each library says it in its own way. One such file ended the whole restore."""
    image, place = tmp_path / "image", tmp_path / "mounted"
    image.touch()
    os.truncate(image, 112 * MIB)
    place.mkdir()
    c.tool("mkfs.btrfs", "-q", image)
    c.tool("mount", "-o", f"loop,compress-force={compression}", image, place)
    try:
        for number in range(12):
            (place / f"file{number}").write_bytes(b"".join(b"%d %d " % (number, line) for line in range(9000)))
        (place / "small").write_bytes(b"small " * 200)
    finally:
        c.tool("umount", place)
    sound = image.read_bytes()
    content = [at for at in range(13 * MIB, len(sound), 4096) if sound[at : at + 4096].count(0) < 2000]
    wrong = []
    for number in range(ROUNDS):
        dice = random.Random(f"{SEED} {compression} {number}")
        data = bytearray(sound)
        for at in content:
            place_in = at + dice.choice([0, 4, 8, dice.randrange(4096)])
            data[place_in : place_in + 4] = dice.choice([bytes(4), b"\xff" * 4, dice.randbytes(4)])
        image.write_bytes(data)
        problem = attempt(image, lambda out, disks: read_all(c, out, disks))
        wrong += [f"seed {SEED}, round {number}: {problem}"] if problem else []
    assert wrong == []


def resealed_lvm(data: bytearray) -> bytearray:
    """With the checksums of its metadata put right, so that what they say is read."""

    def checksum(part: bytes) -> int:
        return zlib.crc32(part, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    begin, length = struct.unpack_from("<QQ", data, 4096 + 40)
    if 512 <= begin < MIB and length < MIB:
        struct.pack_into("<I", data, 4096 + 56, checksum(bytes(data[4096 + begin : 4096 + begin + length])))
    struct.pack_into("<I", data, 4096, checksum(bytes(data[4100:4608])))
    struct.pack_into("<I", data, 512 + 16, checksum(bytes(data[512 + 20 : 1024])))
    return data


def test_lvm_with_anything_in_it(c: Any, tmp_path: Path, lvm_images: List[bytes]) -> None:
    sound = lvm_images[0]
    begin, length = struct.unpack_from("<QQ", sound, 4096 + 40)
    words = [
        b"0",
        b"-1",
        b"99999999999999999999",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b"=",
        b"striped",
        b"thin",
        b"\0",
        b"\xff",
    ]
    image = tmp_path / "mutated"
    wrong = []
    for number in range(3 * ROUNDS):
        dice = random.Random(f"{SEED} lvm {number}")
        data = bytearray(sound)
        for _number in range(dice.choice([1, 2, 10])):
            at = 4096 + begin + dice.randrange(length)
            if dice.random() < 0.1:
                at = dice.choice([512, 4096]) + dice.randrange(100)
            word = dice.choice(words)
            data[at : at + len(word)] = word
        image.write_bytes(resealed_lvm(data))
        problem = attempt(image, lambda out, disks: read_all(c, out, disks))
        wrong += [f"seed {SEED}, round {number}: {problem}"] if problem else []
    assert wrong == []


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_a_partition_table_with_anything_in_it(c: Any, tmp_path: Path, label: str) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 * MIB)
    lines = b"start=2048, size=2048\nstart=8192, size=2048\n"
    if label == "dos":
        lines += b"start=12288, size=12288, type=05\nstart=14336, size=2048\nstart=18432, size=2048\n"
    c.tool("sfdisk", "-q", image, input=f"label: {label}\n".encode() + lines)
    sound = image.read_bytes()
    metadata = [at for at in range(0, len(sound), 512) if sound[at : at + 512].count(0) < 512]
    wrong = []
    for number in range(3 * ROUNDS):
        dice = random.Random(f"{SEED} {label} {number}")
        data = mutated(dice, sound, metadata)
        if label == "gpt" and len(data) == len(sound):
            start, count, size = struct.unpack_from("<QII", data, 512 + 72)
            if start < 1000 and count * size < MIB:
                entries = bytes(data[start * 512 : start * 512 + count * size])
                struct.pack_into("<I", data, 512 + 88, zlib.crc32(entries))
            data[512 + 16 : 512 + 20] = bytes(4)
            struct.pack_into("<I", data, 512 + 16, zlib.crc32(bytes(data[512 : 512 + 92])))
        image.write_bytes(data)
        problem = attempt(image, lambda out, disks: read_all(c, out, disks))
        wrong += [f"seed {SEED}, round {number}: {problem}"] if problem else []
    assert wrong == []
