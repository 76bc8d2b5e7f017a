# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Each file system, through a chain of seven layers: every file is what its own tools put there."""

from __future__ import annotations

import hashlib
import io
import os
import random
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystems import open_file_system


def restored(c: Any, disks: Any, *paths: str, **options: Any) -> Dict[bytes, str]:
    """Restore, and compare what is told with what lies there."""
    result = disks.restore(*paths, **options)
    found = c.sums(disks.dest)
    told = sorted(file["sha256"] for file in result["files"] if file["type"] == "file")
    assert told == sorted(found.values())
    return found


def partition(c: Any, image: Path, label: str, *lines: str) -> List[Tuple[int, int]]:
    c.tool("sfdisk", "-q", image, input=("label: " + label + "\n" + "\n".join(lines) + "\n").encode())
    import json

    table = json.loads(c.tool("sfdisk", "-J", image))["partitiontable"]
    return [(part["start"] * 512, part["size"] * 512) for part in table["partitions"]]


# `make soak` asks for all of them, through seven layers.
ALL = "SOAK_FILES" in os.environ


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"] if ALL else ["ext4"])
def test_ext_with_all_names_in_a_gpt_partition(c: Any, disks: Any, tree: Path, kind: str) -> None:
    c.put_odd_names(tree)
    os.symlink("/etc/hosts", tree / "etc" / "link")
    os.symlink("x" * 200, tree / "etc" / "long")
    image = disks.image(40 * c.MIB)
    ((start, size),) = partition(c, image, "gpt", "start=2048, type=linux")
    block = "4096" if kind == "ext4" else "1024"
    c.tool(
        f"mkfs.{kind}",
        "-q",
        "-F",
        "-b",
        block,
        "-L",
        "data",
        "-E",
        f"offset={start}",
        "-d",
        tree,
        image,
        f"{size // 1024}k",
    )
    disks.chain(image, 7 if ALL or kind == "ext4" else 1)
    found = restored(c, disks, "/etc", "/big", "/sparse")
    assert found == c.sums(tree)
    assert os.readlink(disks.dest / "etc" / "link") == "/etc/hosts"
    assert os.readlink(disks.dest / "etc" / "long") == "x" * 200
    # Holes stay holes.
    assert (disks.dest / "sparse").stat().st_blocks * 512 < c.MIB
    listed = disks.restore("/etc", list_only=True)
    (volume,) = listed["volumes"]
    assert (volume["name"], volume["type"], volume["label"], volume["size"]) == ("2000p1", kind, "data", size)
    assert {"/etc/two\\nlines", "/etc/日本語.txt", "/etc/bytes\\xff\\xfe"} <= {file["path"] for file in listed["files"]}


def test_btrfs_on_a_whole_disk(c: Any, disks: Any, tree: Path) -> None:
    c.put_odd_names(tree)
    image = disks.image(112 * c.MIB)
    c.tool("mkfs.btrfs", "-q", "-L", "data", "--rootdir", tree, image)
    disks.chain(image)
    assert restored(c, disks, "/") == c.sums(tree)


def test_btrfs_subvolumes_outside_the_default_one_and_in_snapshots(c: Any, disks: Any) -> None:
    c.put_subvolumes(disks)

    def told(**options: Any) -> Dict[str, str]:
        result = disks.restore("/**", list_only=True, **options)
        assert not result["skipped_files"] and not result["warnings"], result
        return {file["path"]: file["type"] for file in result["files"] if file["path"] != "/"}

    system = {"/etc", "/etc/hosts", "/home", "/var", "/var/messages", "/zz"}
    assert set(told()) == system
    # What is no longer there, or lies in the original, is an empty directory in a snapshot.
    one, two = "/@/.snapshots/1", "/@/.snapshots/2"
    frozen = {"/etc", "/etc/hosts", "/gone", "/home", "/var", "/zz"}
    expected = {"/@", "/@/.snapshots", "/@/home", "/@/home/user", "/@/home/user/notes.txt"}
    for path, below in ((one, system), (two, frozen)):
        expected |= {path, f"{path}/snapshot"} | {f"{path}/snapshot{name}" for name in below}
    everything = told(volumes=["2000/top"])
    assert set(everything) == expected
    assert everything[f"{two}/snapshot/gone"] == everything[f"{two}/snapshot/var"] == "directory"
    volumes = disks.restore("/zz", list_only=True)["volumes"]
    assert [(one["name"], one["label"], one["only_by_name"]) for one in volumes] == [
        ("2000", "sles", False),
        ("2000/top", None, True),
    ]
    found = restored(c, disks, "/@/home", f"{two}/snapshot", volumes=["2000/top"])
    assert {path: found[path] for path in found if path.endswith((b"notes.txt", b"hosts"))} == {
        b"/@/home/user/notes.txt": hashlib.sha256(b"written at home\n").hexdigest(),
        b"/@/.snapshots/2/snapshot/etc/hosts": hashlib.sha256(b"127.0.0.1 before\n").hexdigest(),
    }
    assert os.listdir(disks.dest / "@/.snapshots/2/snapshot/gone") == []
    with pytest.raises(VadpError, match="2000/top .btrfs, all subvolumes; searched only where 'volumes' names it"):
        disks.restore("/home/user/notes.txt")

    # Without the tree of the top level, the default subvolume is still there.
    before = (disks.folder / "image").read_bytes()
    parsed: Any = open_file_system(io.BytesIO(before), len(before))
    at = before.index(parsed.fs._read_node(parsed.fs.fs_tree.tree.root_offset)[:64])
    disks.follow("p3", "p2", before, before[:at] + bytes(16384) + before[at + 16384 :])
    result = disks.restore("/**", list_only=True)
    assert {file["path"] for file in result["files"]} == system | {"/"}
    (skipped,) = disks.restore("/@", list_only=True, volumes=["2000/top"])["skipped_files"]
    assert (skipped["volume"], skipped["path"]) == ("2000/top", "/") and "another one's" in skipped["reason"]


def test_xfs_in_an_mbr_partition(c: Any, disks: Any, tree: Path, tmp_path: Path) -> None:
    many = tree / "many"
    many.mkdir()
    for number in range(600):
        (many / f"file-with-a-long-name-{number}").write_bytes(b"%d" % number)
    (tree / "sparse").unlink()
    prototype = c.xfs_prototype(tree, tmp_path / "prototype", "---640 7 70000")
    image = disks.image(48 * c.MIB)
    ((start, size),) = partition(c, image, "dos", "start=2048, type=83")
    part = tmp_path / "part"
    part.touch()
    os.truncate(part, size)
    c.tool("mkfs.xfs", "-q", "-L", "data", "-p", prototype, part)
    with image.open("r+b") as file:
        file.seek(start)
        file.write(part.read_bytes())
    disks.chain(image)
    assert restored(c, disks, "/") == c.sums(tree)
    hosts = disks.list("/etc/hosts")["/etc/hosts"]
    assert (hosts["mode"], hosts["uid"], hosts["gid"]) == ("0640", 7, 70000)


def test_ntfs(c: Any, disks: Any, tree: Path) -> None:
    image = disks.image(32 * c.MIB)
    c.tool("mkntfs", "-q", "-Q", "-F", "-s", "512", "-p", "0", "-H", "255", "-S", "63", "-L", "Daten", image)
    for name in ("big", "sparse", "日本語 Datei.txt", "etc/hosts"):
        source = tree / name
        if not source.exists():
            source.write_text(name * 100)
        c.tool("ntfscp", "-q", "-f", image, source, source.name)
    disks.chain(image)
    found = restored(c, disks, "/BIG", "/sparse", "/日本語*", "/hosts", volumes=["Daten"])
    expected = c.sums(tree)
    assert found == {
        b"/big": expected[b"/big"],
        b"/sparse": expected[b"/sparse"],
        b"/hosts": expected[b"/etc/hosts"],
        "/日本語 Datei.txt".encode(): expected["/日本語 Datei.txt".encode()],
    }


@pytest.mark.parametrize("bits", ["12", "16", "32"] if ALL else ["32"])
def test_fat_with_fragments(c: Any, disks: Any, tree: Path, tmp_path: Path, bits: str) -> None:
    image = disks.image({"12": 8, "16": 32, "32": 40}[bits] * c.MIB)
    c.tool("mkfs.fat", "-F", bits, "-s", "1" if bits == "32" else "4", "-n", "DATA", image)
    small = tmp_path / "small"
    for number in range(60):
        small.write_bytes(random.Random(number).randbytes(5000))
        c.tool("mcopy", "-i", image, small, f"::s{number}")
    for number in range(0, 60, 2):
        c.tool("mdel", "-i", image, f"::s{number}")
    (tree / "sparse").unlink()
    (tree / "Fragmented 日本.bin").write_bytes(random.Random(2).randbytes(400000))
    # It fills the gaps from the last one on backwards, too.
    for name in ("Fragmented 日本.bin", "big", "etc"):
        c.tool("mcopy", "-s", "-i", image, tree / name, "::")
    disks.chain(image, 7 if ALL or bits == "32" else 1)
    found = restored(c, disks, "/etc", "/big", "/fragmented*")
    assert found == c.sums(tree)


def test_a_fat_chain_that_goes_backwards(c: Any, tmp_path: Path) -> None:
    """A file whose next cluster is the one before: a parser took it for the one behind."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 4 * c.MIB)
    c.tool("mkfs.fat", "-F", "12", "-s", "4", image)
    content = tmp_path / "content"
    content.write_bytes(b"1" * 2048 + b"2" * 2048 + b"3" * 2048)
    c.tool("mcopy", "-i", image, content, "::f")
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[14:16], "little") * 512

    def put(cluster: int, value: int) -> None:
        at = table + cluster * 3 // 2
        word = int.from_bytes(data[at : at + 2], "little")
        word = (word & 0x000F) | value << 4 if cluster % 2 else (word & 0xF000) | value
        data[at : at + 2] = word.to_bytes(2, "little")

    # It begins at cluster 2; 2 -> 4 -> 3, which holds the second piece.
    put(2, 4)
    put(4, 3)
    put(3, 0xFFF)
    image.write_bytes(data)
    with image.open("rb") as volume:
        system = open_file_system(volume, len(data))
        assert system is not None
        ((name, node),) = list(system.entries(system.root()))
        assert b"".join(piece for piece in system.read(node) if isinstance(piece, bytes)) == (
            b"1" * 2048 + b"3" * 2048 + b"2" * 2048
        )


def test_logical_volumes_over_two_partitions(c: Any, disks: Any, tree: Path, tmp_path: Path) -> None:
    image = disks.image(64 * c.MIB)
    parts = partition(c, image, "gpt", "start=2048, size=30M, type=lvm", "size=30M, type=lvm")
    config = (
        "devices { use_devicesfile=0 obtain_device_list_from_udev=0 "
        'global_filter=["a|^/dev/loop|","r|.*|"] } activation { udev_sync=0 udev_rules=0 }'
    )
    os.environ["LVM_SYSTEM_DIR"] = str(tmp_path / "lvm")
    devices: List[str] = []

    def lvm(command: str, *arguments: Any) -> str:
        only = config.replace("^/dev/loop", "^(" + "|".join(devices) + ")$")
        return str(c.tool(c.ROOT / "build/lvm2/lvm", command, "--config", only, *arguments))

    try:
        for start, size in parts:
            devices.append(c.tool("losetup", "-f", "--show", "-o", start, "--sizelimit", size, image).strip())
        lvm("pvcreate", *devices)
        lvm("vgcreate", "vg0", *devices)
        for name, size in (("root", "24m"), ("home", "28m")):
            lvm("lvcreate", "-an", "-Zn", "-Wn", "--driverloaded", "n", "-y", "-L", size, "-n", name, "vg0")
        columns = "pv_name,lv_name,pvseg_start,pvseg_size,seg_start,pe_start,vg_extent_size"
        told = lvm("pvs", "--noheadings", "--units", "b", "--nosuffix", "--segments", "-o", columns)
        c.tool("sync", image)
    finally:
        del os.environ["LVM_SYSTEM_DIR"]
        for device in devices:
            c.tool("losetup", "-d", device)
    volumes = {}
    for name, size in (("root", 24), ("home", 28)):
        volume = tmp_path / name
        volume.touch()
        os.truncate(volume, size * c.MIB)
        c.tool("mkfs.ext4", "-q", "-F", "-L", name, "-d", tree if name == "root" else tree / "etc", volume)
        volumes[name] = volume.read_bytes()
    places = dict(zip(devices, (start for start, dummy in parts)))
    with image.open("r+b") as file:
        for line in told.splitlines():
            fields = line.split()
            if len(fields) == 7:
                start, count, at, first, extent = map(int, fields[2:])
                file.seek(places[fields[0]] + first + start * extent)
                file.write(volumes[fields[1]][at : at + count * extent])
    disks.chain(image)
    listed = disks.restore("/**", list_only=True)
    assert [(volume["name"], volume["label"]) for volume in listed["volumes"]] == [
        ("vg0/root", "root"),
        ("vg0/home", "home"),
    ]
    found = restored(c, disks, "/*", volumes=["vg0/root"])
    assert {path: digest for path, digest in found.items() if b"lost+found" not in path} == c.sums(tree)
