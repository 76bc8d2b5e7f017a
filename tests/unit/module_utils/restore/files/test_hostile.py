# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Images that lie: nothing outside the destination, no hang, and a word about what was wrong."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path
from typing import Any, Dict

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError, VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import reader
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystems import open_file_system


def ext4(c: Any, disks: Any, tree: Path) -> Path:
    image: Path = disks.image(16 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-O", "^metadata_csum,^dir_index", "-d", tree, image)
    return image


def debugfs(c: Any, image: Path, *commands: str) -> None:
    for command in commands:
        c.tool("debugfs", "-w", "-R", command, image)


def replaced(image: Path, old: bytes, new: bytes) -> None:
    data = image.read_bytes()
    assert old in data and len(old) == len(new)
    image.write_bytes(data.replace(old, new))


@pytest.fixture
def outside(tmp_path: Path) -> Any:
    """What lies beside the destination; it must be the same afterwards."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "victim").write_text("mine")

    def look() -> Dict[str, bytes]:
        return {str(path): path.read_bytes() for path in place.rglob("*")}

    before = look()
    yield place
    assert look() == before
    assert sorted(os.listdir(tmp_path)) == sorted(
        name for name in ("dest", "image", "outside", "repository", "tree") if (tmp_path / name).exists()
    )


def test_names_that_climb_out(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    names = [b"../evil", b"/tmp/ev", b"..\0\0\0\0\0", b"..", b"ev\0l\0\0\0"]
    fillers = {bytes([letter]) * len(name): name for letter, name in zip(b"ABCDE", names)}
    for filler in fillers:
        (tree / "etc" / filler.decode()).write_text("evil")
    image = ext4(c, disks, tree)
    for filler, name in fillers.items():
        replaced(image, filler, name)
    disks.chain(image, 1)
    result = disks.restore("/etc")
    assert result["changed"] and (disks.dest / "etc" / "hosts").exists()
    assert sorted(os.listdir(disks.dest)) == ["etc"]
    # A plain ".." is what every directory has.
    assert ["name" in skipped["reason"] for skipped in result["skipped_files"]] == [True] * (len(names) - 1)


def test_a_link_and_a_directory_of_one_name(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    """The link comes first, and the file would be written through it."""
    os.symlink(outside, tree / "etc" / "waya")
    (tree / "etc" / "wayb").mkdir()
    (tree / "etc" / "wayb" / "victim").write_text("evil")
    image = ext4(c, disks, tree)
    replaced(image, b"wayb", b"waya")
    disks.chain(image, 1)
    with pytest.raises(VadpError):
        disks.restore("/etc")
    assert os.listdir(disks.dest) == []


def test_links_that_are_there_are_not_followed(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    disks.chain(ext4(c, disks, tree), 1)
    os.symlink(outside, disks.dest / "etc")
    with pytest.raises(VadpError, match="Something else is at the places"):
        disks.restore("/etc/hosts", overwrite=True)
    (disks.dest / "etc").unlink()
    (disks.dest / "etc").mkdir()
    os.symlink(outside / "victim", disks.dest / "etc" / "hosts")
    with pytest.raises(VadpError, match="Something else is at the places"):
        disks.restore("/etc/hosts", overwrite=True)


def test_links_in_a_circle_and_up(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    os.symlink("b", tree / "a")
    os.symlink("a", tree / "b")
    os.symlink("../../../../etc", tree / "up")
    disks.chain(ext4(c, disks, tree), 1)
    with pytest.raises(VadpError, match="There is no such file.*too many symbolic links"):
        disks.restore("/a/hosts")
    # Above the root is the root, of the volume.
    assert [file["path"] for file in disks.restore("/up/hosts")["files"]] == ["/etc/hosts"]
    assert disks.restore("/a", "/b", "/up")["changed"] and os.readlink(disks.dest / "a") == "b"


def test_devices_and_pipes(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    image = ext4(c, disks, tree)
    commands = b"cd /etc\nmknod null c 1 3\nmknod sda b 8 0\nmknod pipe p\n"
    c.tool("debugfs", "-w", "-f", "/dev/stdin", image, input=commands)
    disks.chain(image, 1)
    result = disks.restore("/etc")
    reasons = {skipped["path"]: skipped["reason"] for skipped in result["skipped_files"]}
    assert reasons == {
        "/etc/null": "it is a character device",
        "/etc/sda": "it is a block device",
        "/etc/pipe": "it is a named pipe",
    }
    assert "3 files were skipped" in result["warnings"][-1]
    with pytest.raises(VadpError, match="Not all of the files"):
        disks.restore("/etc", "/big", fail_on_skipped=True)
    assert sorted(os.listdir(disks.dest)) == ["etc"]


def test_directories_in_a_circle(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    image = ext4(c, disks, tree)
    debugfs(c, image, "link /etc /etc/deep/again")
    disks.chain(image, 1)
    result = disks.restore("/etc")
    assert [skipped["path"] for skipped in result["skipped_files"]] == ["/etc/deep/again"]


def test_sizes_that_no_disk_has(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    image = ext4(c, disks, tree)
    debugfs(c, image, f"sif /etc/hosts size {(1 << 62) + 5}", "sif /big size 2000000000")
    disks.chain(image, 1)
    result = disks.restore("/etc", "/sparse")
    assert [skipped["reason"] for skipped in result["skipped_files"]] == [f"it claims to have {(1 << 62) + 5} bytes"]


def test_a_file_that_is_nearly_all_holes(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    """A block map may claim terabytes: a hole is one piece, whatever its size."""
    image = disks.image(16 * c.MIB)
    c.tool("mkfs.ext2", "-q", "-F", "-b", "4096", "-d", tree, image)
    size = 1 << 40
    with image.open("rb") as volume:
        system = open_file_system(volume, image.stat().st_size)
        assert system is not None
        node = next(node for name, node in system.entries(system.root()) if name == "sparse")
        before = sum(len(piece) for piece in system.read(node) if isinstance(piece, bytes))
    debugfs(c, image, f"sif /sparse size {size}")
    begin = time.monotonic()
    with image.open("rb") as volume:
        system = open_file_system(volume, image.stat().st_size)
        assert system is not None
        node = next(node for name, node in system.entries(system.root()) if name == "sparse")
        lengths = [
            (isinstance(piece, int), piece if isinstance(piece, int) else len(piece)) for piece in system.read(node)
        ]
    assert sum(length for dummy, length in lengths) == size and time.monotonic() - begin < 5
    assert before <= sum(length for hole, length in lengths if not hole) <= before + 8192


def test_a_partition_table_that_lies(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    image = disks.image(16 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-E", f"offset={c.MIB}", "-d", tree, image, "14m")
    data = bytearray(image.read_bytes())
    entries = [
        (0x83, 2048, 0xFFFFFF00),  # goes on behind the end
        (0x83, 0xFFFFF000, 4096),  # begins there
        (0x83, 2048, 8),  # ends within the file system
        (0x05, 2048 + 512, 100),  # logical ones that name themselves
    ]
    for number, (kind, start, count) in enumerate(entries):
        data[446 + 16 * number : 462 + 16 * number] = struct.pack("<B3xB3xII", 0, kind, start, count)
    data[510:512] = b"\x55\xaa"
    image.write_bytes(data)
    disks.chain(image, 1)
    result = disks.restore("/etc/hosts", volumes=["2000p1"])
    assert result["changed"]
    volumes = {volume["name"]: volume["readable"] for volume in result["volumes"]}
    assert volumes == {"2000p1": True, "2000p2": False, "2000p3": False, "2000p5": False}


def test_a_fat_whose_chains_go_in_circles(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    image = disks.image(40 * c.MIB)
    c.tool("mkfs.fat", "-F", "32", "-s", "1", image)
    c.tool("mcopy", "-s", "-i", image, tree / "etc", tree / "big", "::")
    data = bytearray(image.read_bytes())
    (reserved,) = struct.unpack_from("<H", data, 14)
    # Every chain of more than one cluster comes back to its beginning.
    for cluster in range(3, 5000):
        (value,) = struct.unpack_from("<I", data, reserved * 512 + 4 * cluster)
        if value == cluster + 1:
            struct.pack_into("<I", data, reserved * 512 + 4 * cluster, cluster)
    image.write_bytes(data)
    disks.chain(image, 1)
    result = disks.restore("/**", io_timeout=60)
    assert [skipped["path"] for skipped in result["skipped_files"]] == ["/big"]
    assert "chain of clusters is damaged" in result["skipped_files"][0]["reason"]
    # So does the root directory's.
    before = bytes(data)
    struct.pack_into("<I", data, reserved * 512 + 8, 2)
    disks.follow("p2", "p1", before, bytes(data))
    with pytest.raises(VadpError, match="There is no such file.*chain of clusters is damaged"):
        disks.restore("/etc", io_timeout=60)


# `make soak` asks for more.
SEEDS = int(os.environ.get("SOAK_FILE_SYSTEMS", "1"))
KINDS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-d", "TREE", "IMAGE", "15m"],
    "btrfs": ["mkfs.btrfs", "-q", "--rootdir", "TREE", "IMAGE"],
    "ntfs": ["mkntfs", "-q", "-Q", "-F", "-s", "512", "-p", "0", "-H", "255", "-S", "63", "IMAGE"],
    "fat": ["mkfs.fat", "-F", "16", "IMAGE"],
}


@pytest.mark.parametrize("kind", sorted(KINDS) if "SOAK_FILES" in os.environ else ["ext4", "ntfs"])
def test_damage_anywhere(c: Any, disks: Any, tree: Path, outside: Path, kind: str) -> None:
    """Bits that a guest's own file system lost: the restore point is sound, so what can be read comes out."""
    image = disks.image((112 if kind == "btrfs" else 16) * c.MIB)
    c.tool(*[{"TREE": tree, "IMAGE": image}.get(word, word) for word in KINDS[kind]])
    if kind == "fat":
        c.tool("mcopy", "-s", "-i", image, tree / "etc", tree / "big", "::")
    if kind == "ntfs":
        c.tool("ntfscp", "-q", "-f", image, tree / "big", "big")
    sound = image.read_bytes()
    used = [start for start in range(0, len(sound), 512) if sound[start : start + 512].count(0) < 500]
    metadata = [start for start in used if sound[start : start + 512].count(0) > 50]
    parent, before = None, b""
    for seed in range(SEEDS):
        dice = random.Random(seed)
        data = bytearray(sound)
        for _number in range(60):
            data[dice.choice(metadata) + dice.randrange(512)] = dice.randrange(256)
        name = f"damage{seed}"
        if parent is None:
            image.write_bytes(data)
            disks.chain(image, 1, names=[name])
        else:
            disks.follow(name, parent, before, bytes(data))
        parent, before = name, bytes(data)
        dest = disks.dest / name
        dest.mkdir()
        try:
            result = disks.restore("/**", point=name, dest=str(dest), io_timeout=60, limit=2000, reader="dissect")
        except DamagedError as error:
            raise AssertionError("the restore point itself is sound") from error
        except VadpError as error:
            assert str(error)
        else:
            assert result["files"]


def test_damage_of_the_restore_point_itself(c: Any, disks: Any, tree: Path, outside: Path) -> None:
    """A bit of a layer that flipped: not one byte of it gets out."""
    image = ext4(c, disks, tree)
    disks.chain(image, 3)
    layer = disks.world.store.layer_path(2000, "p2")
    data = bytearray(layer.read_bytes())
    # qemu-io writes clusters as they are: this is a byte of a file's content.
    piece = (tree / "big").read_bytes()
    hits = [data.find(piece[start : start + 4096]) for start in range(0, len(piece) - 4096, 4096)]
    at = next(hit for hit in hits if hit > 0)
    data[at + 100] ^= 1
    layer.write_bytes(data)
    with pytest.raises(DamagedError, match="does not hold what was read from the disk"):
        disks.restore("/big")
    assert os.listdir(disks.dest) == []
    layer.unlink()
    with pytest.raises(DamagedError, match="damaged, and nothing was written"):
        disks.restore("/big")


def test_a_reader_that_says_nothing(c: Any, disks: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks.chain(ext4(c, disks, tree), 1)
    monkeypatch.setattr(reader, "_PROGRAM", "import time; time.sleep(1000)")
    with pytest.raises(DataPathError, match="it said nothing for 1 s"):
        disks.restore("/big", io_timeout=1)
    monkeypatch.setattr(reader, "_PROGRAM", "raise SystemExit('no memory')")
    with pytest.raises(DataPathError, match="it ended: no memory"):
        disks.restore("/big")
    monkeypatch.setattr(reader, "_PROGRAM", "import os, sys; os.write(int(sys.argv[3]), b'J' + bytes(100))")
    with pytest.raises(DataPathError, match="makes no sense"):
        disks.restore("/big")
    assert os.listdir(disks.dest) == []
