# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What waits in a log, or for a check, is reported: each reader proves that its file system is clean, or why not."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystem import NOT_KNOWN, FileSystem
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystems import open_file_system
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.ntfs import _state_of

MIB = 1 << 20


def image_of(folder: Path, size: int) -> Path:
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size)
    return image


def state(image: bytes) -> Tuple[Optional[str], bool, List[str]]:
    """Why it is not known to be clean, whether Linux replays it, and what the user is told."""
    system = open_file_system(io.BytesIO(image), len(image))
    assert system is not None
    return system.unclean, system.linux_replays, system.mind()


class Silent(FileSystem):
    """One that says nothing of its state."""

    def root(self) -> Any:
        return None

    def entries(self, node: Any) -> Any:
        return iter(())

    def info(self, node: Any) -> Any:
        return None

    def read(self, node: Any) -> Any:
        return iter(())


def test_a_reader_that_proves_nothing_is_not_clean() -> None:
    system = Silent(io.BytesIO(), 0)
    assert system.unclean == NOT_KNOWN and NOT_KNOWN in system.mind()[0]


MAKE: Dict[str, List[str]] = {
    "ext2": ["mkfs.ext2", "-q", "-F"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ext4 alone": ["mkfs.ext4", "-q", "-F", "-O", "^has_journal"],
    "xfs": ["mkfs.xfs", "-q"],
    "xfs 4": ["mkfs.xfs", "-q", "-m", "crc=0", "-l", "version=1,size=4m"],
    "xfs sunit": ["mkfs.xfs", "-q", "-l", "su=262144"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ntfs": ["mkntfs", "-q", "-Q", "-F", "-s", "512", "-p", "0", "-H", "255", "-S", "63"],
    "fat 12": ["mkfs.fat", "-F", "12", "-s", "64"],
    "fat 16": ["mkfs.fat", "-F", "16"],
    "fat 32": ["mkfs.fat", "-F", "32", "-s", "1"],
}


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_what_its_tool_made_is_clean(c: Any, tmp_path: Path, kind: str) -> None:
    image = image_of(tmp_path, 112 * MIB)
    c.tool(*MAKE[kind], image)
    unclean, _replays, warnings = state(image.read_bytes())
    assert unclean is None and warnings == []


def in_use(place: Path, rounds: int = 3) -> None:
    """Changes that Linux has not put in their places yet."""
    for number in range(rounds):
        folder = place / f"folder{number}"
        folder.mkdir()
        for name in range(40):
            (folder / f"file{name}").write_bytes(random.Random(name).randbytes(5000))
        descriptor = os.open(folder / "file3", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        if number:
            shutil.rmtree(place / f"folder{number - 1}")
    with (place / f"folder{rounds - 1}" / "file0").open("ab") as file:
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize(
    ("kind", "driver", "why", "replays"),
    [
        ("ext2", "ext2", "mounted without a journal", False),
        ("ext4 alone", "ext4", "mounted without a journal", False),
        ("xfs", "xfs", "its log was not empty", True),
        ("xfs 4", "xfs", "its log was not empty", True),
        ("xfs sunit", "xfs", "its log was not empty", True),
        ("btrfs", "btrfs", "its log was not empty", True),
    ],
)
def test_what_is_mounted_is_not_clean_before_it_is_unmounted(
    c: Any, tmp_path: Path, kind: str, driver: str, why: str, replays: bool
) -> None:
    image, copy, place = image_of(tmp_path, 112 * MIB), tmp_path / "copy", tmp_path / "mounted"
    place.mkdir()
    c.tool(*MAKE[kind], image)
    try:
        c.tool("mount", "-o", "loop", "-t", driver, image, place)
    except AssertionError:
        pytest.skip(f"this Linux does not mount {kind}")
    try:
        in_use(place)
        shutil.copy(image, copy)
        frozen = None
        if driver == "xfs":
            c.tool("fsfreeze", "-f", place)
            try:
                frozen = image.read_bytes()
            finally:
                c.tool("fsfreeze", "-u", place)
    finally:
        c.tool("umount", place)
    reason, told, warnings = state(copy.read_bytes())
    assert reason is not None and why in reason and told is replays
    assert len(warnings) == 1 and reason in warnings[0] and ("libguestfs brings" in warnings[0]) is replays
    assert state(image.read_bytes())[0] is None
    # A snapshot that was quiesced needs no virtual machine.
    assert frozen is None or state(frozen)[0] is None


@pytest.mark.parametrize("place", ["head", "record", "tail", "everywhere"])
def test_a_log_of_xfs_that_is_damaged_is_not_clean(c: Any, tmp_path: Path, place: str) -> None:
    image = image_of(tmp_path, 64 * MIB)
    c.tool("mkfs.xfs", "-q", image)
    data = bytearray(image.read_bytes())
    (start,) = struct.unpack_from(">Q", data, 48)
    blocks, group_log = struct.unpack_from(">I", data, 96)[0], data[124]
    (group_blocks,) = struct.unpack_from(">I", data, 84)
    begin = ((start >> group_log) * group_blocks + (start & (1 << group_log) - 1)) * 4096
    assert data[begin : begin + 4] == b"\xfe\xed\xba\xbe"
    if place == "head":
        data[begin + 512 : begin + 516] = b"\xff\0\0\0"
    elif place == "record":
        struct.pack_into(">I", data, begin + 12, 0xFFFFFFFF)
    elif place == "tail":
        # It does not end with the record of an unmount.
        data[begin + 512 + 9] = 0
        struct.pack_into(">Q", data, begin + 24, 1 << 32 | blocks * 8 - 1)
    else:
        data[begin : begin + blocks * 4096] = random.Random(1).randbytes(blocks * 4096)
    assert state(bytes(data))[0] is not None


def pages(first: Tuple[int, int, int], second: Tuple[int, int, int], major: int = 1) -> bytes:
    """The begin of a log of NTFS: (number, client in use, flags) of its two pages."""
    found = b""
    for number, client, flags in (first, second):
        page = bytearray(4096)
        struct.pack_into("<4sHHQIIHhh", page, 0, b"RSTR", 30, 9, 0, 4096, 4096, 48, 1, major)
        struct.pack_into("<QHHHH", page, 48, number, 1, 0xFFFF, client, flags)
        for sector in range(8):
            page[32 + 2 * sector : 34 + 2 * sector] = page[512 * sector + 510 : 512 * sector + 512]
            page[512 * sector + 510 : 512 * sector + 512] = page[30:32]
        found += bytes(page)
    return found.ljust(131072, b"\xff")


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (b"\xff" * 131072, None),
        (pages((5, 0xFFFF, 0), (4, 0, 0)), None),
        (pages((5, 0, 2), (4, 0, 0)), None),
        (pages((5, 0, 0), (4, 0xFFFF, 2)), "only Windows replays"),
        (pages((4, 0xFFFF, 2), (5, 0, 0)), "only Windows replays"),
        (pages((5, 0, 0), (5, 0, 0), 2), "only Windows replays"),
        (pages((5, 0xFFFF, 2), (5, 0xFFFF, 2), 3), "does not know"),
        (bytes(131072), "makes no sense"),
        (b"", "makes no sense"),
    ],
)
def test_a_log_of_ntfs(log: bytes, why: Optional[str]) -> None:
    told = _state_of(log)
    assert told == why if why is None else told is not None and why in told


def test_ntfs_whose_log_was_in_use(c: Any, tmp_path: Path) -> None:
    image = image_of(tmp_path, 24 * MIB)
    c.tool(*MAKE["ntfs"], image)
    data = image.read_bytes()
    at = data.index(b"\xff" * 131072)
    reason, replays, warnings = state(data[:at] + pages((5, 0, 0), (4, 0, 0)) + data[at + 131072 :])
    assert reason is not None and "only Windows" in reason and not replays
    assert "may hold other bytes" in warnings[0] and "libguestfs" not in warnings[0]


@pytest.mark.parametrize(
    ("bits", "offset", "value", "why"),
    [
        ("12", 37, 1, "it was mounted"),
        ("16", 37, 1, "it was mounted"),
        ("16", 37, 2, "waits for a check"),
        ("32", 65, 1, "it was mounted"),
        ("16", "table", 0x7FFF, "it was in use"),
        ("32", "table", 0x07FFFFFF, "it was in use"),
    ],
)
def test_fat_that_was_in_use(c: Any, tmp_path: Path, bits: str, offset: Any, value: int, why: str) -> None:
    image = image_of(tmp_path, 112 * MIB)
    c.tool(*MAKE[f"fat {bits}"], image)
    data = bytearray(image.read_bytes())
    if offset == "table":
        (reserved,) = struct.unpack_from("<H", data, 14)
        width = int(bits) // 8
        data[reserved * 512 + width : reserved * 512 + 2 * width] = value.to_bytes(width, "little")
    else:
        data[offset] |= value
    reason, replays, warnings = state(bytes(data))
    assert reason is not None and why in reason and not replays and len(warnings) == 1


def test_the_result_names_the_volume_and_why(c: Any, disks: Any, tree: Path) -> None:
    """As the module returns it, without libguestfs: in the volume, and as a warning."""
    image = disks.image(16 * MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", tree, image)
    c.tool("debugfs", "-w", "-R", "ssv state 0", image)
    disks.chain(image, 1)
    for options in ({"list_only": True}, {}):
        result = disks.restore("/etc", **options)
        (volume,) = result["volumes"]
        assert volume["readable"] and volume["clean"] is False
        (warning,) = result["warnings"]
        assert warning.startswith("Volume 2000 (ext4): it was mounted without a journal")
