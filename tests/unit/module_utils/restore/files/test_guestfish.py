# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files read by libguestfs, in its real virtual machine. Each test boots one, so they are for `make soak`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import reader as files_reader

pytestmark = pytest.mark.soak

#: A restore that waits with everything open.
KILLED = """
import sys
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import request, run
wanted = request.FilesRequest(sys.argv[1], ("/etc",), vm_uuid=sys.argv[2], list_only=True, reader="guestfish")
with run.opened(wanted, run.open_source(wanted, "latest")):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _kernel(c: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of tests/setup.sh, where this machine has none."""
    environment = c.ROOT / "build" / "appliance" / "environment.json"
    if environment.exists():
        for name, value in json.loads(environment.read_text()).items():
            monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _nothing_stays(c: Any) -> Any:
    before = set(left_behind())
    yield
    # Folders of the tests that run beside this one go when those end.
    new, deadline = set(left_behind()) - before, time.monotonic() + 120
    while new & set(left_behind()):
        assert time.monotonic() < deadline, new
        time.sleep(0.1)


def left_behind() -> List[str]:
    """libguestfs' folders, and the virtual machines that run from one of ours."""
    found = [name for name in os.listdir("/tmp") if name.startswith(("libguestfs", "openvadp-files"))]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", pid, "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"openvadp-files" in words and b"guestfs" in words:
            found.append(pid)
    return sorted(found)


def squashfs(c: Any, folder: Path, tree: Path, *more: str) -> bytes:
    c.tool("mksquashfs", tree, folder / "squashfs", "-quiet", "-no-progress", "-noappend", *more)
    data = (folder / "squashfs").read_bytes()
    (folder / "squashfs").unlink()
    return data


def test_btrfs_subvolumes_are_those_that_dissect_shows(c: Any, disks: Any) -> None:
    c.put_subvolumes(disks)
    for volumes in ([], ["2000/top"]):
        told = []
        for reader in ("dissect", "guestfish"):
            result = disks.restore("/**", list_only=True, volumes=volumes, reader=reader, checksums=True)
            assert not result["skipped_files"], result
            told.append([[file[name] for name in ("path", "type", "size", "sha256")] for file in result["files"]])
        assert sorted(told[0]) == sorted(told[1]) and len(told[0]) > 5


def test_what_dissect_can_not_read(c: Any, disks: Any, tree: Path, tmp_path: Path) -> None:
    """A disk with an ext4, which dissect reads, and a squashfs with all that is hard, through seven layers."""
    c.put_odd_names(tree)
    os.symlink("/etc/passwd", tree / "etc" / "out")
    os.symlink("../../../../tmp", tree / "etc" / "up")
    os.symlink("circle", tree / "etc" / "circle")
    (tree / "etc" / "hosts").chmod(0o640)
    os.utime(tree / "etc" / "hosts", (1, 1_600_000_000))
    second = squashfs(
        c, tmp_path, tree, "-p", "dev d 755 0 0", "-p", "dev/console c 600 0 0 5 1", "-p", "dev/disk b 600 0 0 8 0"
    )
    other = tmp_path / "tree2"
    (other / "ext").mkdir(parents=True)
    (other / "ext" / "file").write_text("by dissect")
    image = disks.image(8 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-d", other, image)
    first = image.read_bytes()
    sectors = [2048, 2048 + len(first) // 512]
    image.write_bytes(bytes(c.MIB) + first + second + bytes(c.MIB - len(second) % c.MIB))
    c.tool(
        "sfdisk",
        "-q",
        image,
        input=f"label: dos\nstart={sectors[0]}, size={len(first) // 512}\nstart={sectors[1]}\n".encode(),
    )
    disks.chain(image, 7)
    result = disks.restore("/etc", "/big", "/sparse", "/dev", "/ext", preserve=("times", "mode"))
    volumes = [(one["name"], one["type"], one["reader"], one["reader_reason"]) for one in result["volumes"]]
    assert volumes == [
        ("2000p1", "ext4", "dissect", "dissect reads it"),
        ("2000p2", "squashfs", "guestfish", "dissect: only libguestfs reads squashfs"),
    ]
    assert result["reader"] == "dissect, guestfish"
    wanted = dict(c.sums(tree))
    wanted.update(c.sums(other))
    assert c.sums(disks.dest) == wanted
    assert os.readlink(disks.dest / "etc" / "out") == "/etc/passwd"
    assert os.readlink(disks.dest / "etc" / "up") == "../../../../tmp"
    assert {(one["path"], one["reason"]) for one in result["skipped_files"]} == {
        ("/dev/console", "it is a character device"),
        ("/dev/disk", "it is a block device"),
    }
    hosts = (disks.dest / "etc" / "hosts").stat()
    assert (hosts.st_mode & 0o777, hosts.st_mtime) == (0o640, 1_600_000_000)
    assert (disks.dest / "sparse").stat().st_blocks * 512 < 2 * c.MIB


def test_ext4_by_guestfish_alone(c: Any, disks: Any, tree: Path) -> None:
    c.put_odd_names(tree)
    os.symlink("/", tree / "etc" / "out")
    image = disks.image(24 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-L", "data", "-d", tree, image)
    disks.chain(image, 7)
    options = {"reader": "guestfish", "volumes": ["data"]}
    listed = disks.restore("/**", list_only=True, checksums=True, **options)
    assert listed["reader"] == "guestfish" and not listed["changed"]
    by_dissect = disks.restore("/**", list_only=True, checksums=True, reader="dissect")
    assert sorted(map(str, listed["files"])) == sorted(map(str, by_dissect["files"]))
    assert disks.restore("/etc", "/big", "/sparse", check_mode=True, **options)["changed"]
    assert os.listdir(disks.dest) == []
    assert disks.restore("/etc", "/big", "/sparse", **options)["changed"]
    assert c.sums(disks.dest) == c.sums(tree)
    assert not disks.restore("/etc", "/big", "/sparse", **options)["changed"]


def test_nothing_of_a_damaged_point_is_restored(c: Any, disks: Any, tree: Path) -> None:
    image = disks.image(16 * c.MIB)
    data = squashfs(c, disks.folder, tree)
    image.write_bytes(data + bytes(16 * c.MIB - len(data)))
    disks.chain(image, 2)
    layer = Path(disks.world.store.layer_path(2000, "p1"))
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.chmod(0o600)
    layer.write_bytes(bytes(content))
    with pytest.raises(DamagedError):
        disks.restore("/etc")
    assert os.listdir(disks.dest) == []


def test_a_broken_file_system_is_told(c: Any, disks: Any, tree: Path) -> None:
    image = disks.image(16 * c.MIB)
    data = bytearray(squashfs(c, disks.folder, tree))
    data[100 : len(data) - 100] = bytes(len(data) - 200)
    image.write_bytes(bytes(data) + bytes(16 * c.MIB - len(data)))
    disks.chain(image, 1)
    (volume,) = disks.restore("/etc", list_only=True)["volumes"]
    assert not volume["readable"] and "guestfish: it can't be mounted" in volume["problem"]


def test_time_limits_and_a_kill_leave_nothing(c: Any, disks: Any, tree: Path, tmp_path: Path) -> None:
    image = disks.image(24 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-d", tree, image)
    disks.chain(image, 1)
    with pytest.raises(DataPathError, match="not read in time"):
        disks.restore("/etc", reader="guestfish", timeout=8)
    before = left_behind()
    command = [sys.executable, "-c", KILLED, str(disks.world.repository.path), disks.world.store.uuid]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        running = [name for name in left_behind() if name.isdigit()]
        assert running
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while [name for name in left_behind() if name.isdigit()]:
        assert time.monotonic() < deadline
    # Its folders go with the next restore.
    name = f"files-{disks.world.store.uuid}"
    assert RuntimeDir.leftovers(name)
    with pytest.raises(DataPathError):
        disks.restore("/etc", reader="guestfish", timeout=1)
    assert left_behind() == before


def fsynced(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def test_logs_that_linux_replays(c: Any, disks: Any, tmp_path: Path) -> None:
    """Copies made while they were mounted: what comes out is what Linux shows, and nothing is left to warn of."""
    images: List[bytes] = []
    expected = []
    kinds = [("xfs", "mkfs.xfs -q"), ("btrfs", "mkfs.btrfs -q"), ("ext4", "mkfs.ext4 -q -F -O fast_commit")]
    for driver, make in kinds:
        image, copy, place = tmp_path / "one", tmp_path / "copy", tmp_path / "mounted"
        image.unlink(missing_ok=True)
        image.touch()
        os.truncate(image, 128 * c.MIB)
        place.mkdir(exist_ok=True)
        c.tool(*make.split(), image)
        c.tool("mount", "-o", "loop", "-t", driver, image, place)
        try:
            for number in range(30):
                (place / f"gone{number}").write_bytes(b"gone" * 3000)
            c.tool("sync", "-f", place)
            for number in range(30):
                (place / f"gone{number}").unlink()
            for number in range(30):
                fsynced(place / f"{driver}{number}", b"new" * 3000)
            shutil.copy(image, copy)
        finally:
            c.tool("umount", place)
        images.append(copy.read_bytes())
        c.tool("mount", "-o", "loop", "-t", driver, copy, place)
        try:
            expected.append(c.sums(place))
        finally:
            c.tool("umount", place)
        assert any(name.startswith(f"/{driver}".encode()) for name in expected[-1])
    disks.several(images)
    ours = disks.restore("/**", list_only=True, checksums=True, reader="dissect")
    assert [one["clean"] for one in ours["volumes"]] == [False] * 3 and len(ours["warnings"]) >= 3
    result = disks.restore("/**", list_only=True, checksums=True, io_timeout=600)
    states = [(one["reader"], one["clean"], len(one["warnings"])) for one in result["volumes"]]
    assert states[:2] == [("guestfish", True, 0)] * 2 and result["skipped_files"] == []
    # Not every kernel replays each other's fast commits. Then it stays where it was, and says so.
    assert states[2] in (("guestfish", True, 0), ("dissect", False, 2)) and len(result["warnings"]) == states[2][2]
    for number, there in enumerate(expected):
        if result["volumes"][number]["reader"] == "dissect":
            continue
        found = {
            os.fsencode(one["path"]): one["sha256"]
            for one in result["files"]
            if one["volume"] == str(2000 + number) and one["type"] == "file"
        }
        assert found == there


def test_single_files_that_dissect_refuses(
    c: Any, disks: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of extents is a low one here. What is encrypted stays refused, whatever Linux would show."""
    for name in ("one", "two"):
        with (tree / name).open("wb") as file:
            for number in range(40):
                file.seek(number * 20000)
                file.write(b"%d %s" % (number, name.encode()) * 500)
    (tree / "key").write_bytes(b"key" * 3000)
    image = disks.image(24 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-O", "encrypt", "-d", tree, image)
    c.tool("debugfs", "-w", "-R", "sif /key flags 0x80800", image)
    disks.chain(image, 2)
    limit = "import {0}; from {1} import ext; ext.MOST_RUNS = 9; from {{}} import main; ".format(
        files_reader.__name__, files_reader.__package__
    )
    program = files_reader._PROGRAM.replace("from {} import main; ", limit)
    monkeypatch.setattr(files_reader, "_PROGRAM", program)
    for how in ("list", "restore"):
        options = {"list_only": True, "checksums": True} if how == "list" else {}
        result = disks.restore("/**", io_timeout=600, **options)
        wanted = {path: one for path, one in c.sums(tree).items() if path != b"/key"}
        found = {os.fsencode(one["path"]): one["sha256"] for one in result["files"] if one["type"] == "file"}
        assert found == wanted
        assert {one["path"]: one["reason"] for one in result["skipped_files"]} == {
            "/key": "it can't be read: it is encrypted (fscrypt)"
        }
    assert c.sums(disks.dest) == wanted
    alone = disks.restore("/**", reader="dissect", list_only=True, checksums=True)
    assert {"/one", "/two"} <= {one["path"] for one in alone["skipped_files"]}
