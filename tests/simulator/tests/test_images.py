# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The seeded contents are what the file systems' own tools say they are."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vcenter import images  # noqa: E402

CAPACITY = 48 << 20


def run(*argv: str) -> bytes:
    return subprocess.run(
        argv, check=True, capture_output=True, timeout=60, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    ).stdout


def part_of(image: Path, scratch: Path, number: int = 0) -> Path:
    table = json.loads(run("sfdisk", "-J", str(image)))["partitiontable"]["partitions"][number]
    part = scratch / "part"
    with open(image, "rb") as source:
        source.seek(table["start"] * 512)
        part.write_bytes(source.read(table["size"] * 512))
    return part


def test_ext4_holds_the_known_files(tmp_path: Path) -> None:
    part = part_of(images.image("ext4", CAPACITY), tmp_path)
    run("e2fsck", "-f", "-n", str(part))
    for name, content in images.known_files("ext4").items():
        run("debugfs", "-R", f"dump /{name} {tmp_path}/out", str(part))
        assert (tmp_path / "out").read_bytes() == content


def test_ntfs_holds_the_known_files(tmp_path: Path) -> None:
    part = part_of(images.image("ntfs", CAPACITY), tmp_path)
    for name, content in images.known_files("ntfs").items():
        assert run("ntfscat", "-f", str(part), name) == content


def test_xfs_is_sound_and_holds_the_known_files(tmp_path: Path) -> None:
    image = images.image("xfs", CAPACITY)
    run("xfs_repair", "-n", "-f", str(image))
    data = image.read_bytes()
    content = images.known_files("xfs")["srv/data/big.bin"]
    assert content[:1_000_000] in data


def test_fat_is_sound_and_holds_the_known_files(tmp_path: Path) -> None:
    part = part_of(images.image("fat", CAPACITY), tmp_path)
    said = run("fsck.fat", "-n", "-v", str(part)).decode()
    assert "3 files" in said or ": 4 files" in said
    assert images.known_files("fat")["DATA.BIN"] in part.read_bytes()


def test_the_disk_that_boots_has_a_kernel_and_the_known_files(tmp_path: Path) -> None:
    image = images.image("bootable", CAPACITY)
    boot = part_of(image, tmp_path)
    run("fsck.fat", "-n", str(boot))
    assert (images.boot_image.PARTS / "vmlinuz").read_bytes() in boot.read_bytes()
    assert image.read_bytes().count(images.boot_image.GREETING) == 1
    part = part_of(image, tmp_path, 1)
    run("e2fsck", "-f", "-n", str(part))
    for name, content in images.known_files("bootable").items():
        run("debugfs", "-R", f"dump /{name} {tmp_path}/out", str(part))
        assert (tmp_path / "out").read_bytes() == content


def test_random_allocates_what_was_asked_and_half_of_it_compresses() -> None:
    image = images.image("random:25%", 32 << 20)
    allocated = image.stat().st_blocks * 512  # with the file system's own blocks
    assert 8 << 20 <= allocated < (8 << 20) + 65536
    assert len(zlib.compress(image.read_bytes()[: 1 << 20], 1)) < 0.6 * (1 << 20)
    assert image == images.image("random:25%", 32 << 20)


@pytest.mark.parametrize(("kind", "capacity"), [("zfs", CAPACITY), ("ext4", 1 << 20), ("random:9999M", CAPACITY)])
def test_what_cannot_be_made_is_said(kind: str, capacity: int) -> None:
    with pytest.raises(images.ImageError):
        images.image(kind, capacity)


def test_a_size_that_is_no_multiple_of_a_mebibyte() -> None:
    assert images.image("ext4", CAPACITY + 512 * 7).stat().st_size == CAPACITY + 512 * 7
