# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a restore of files writes, refuses, keeps and undoes."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, InputError, VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import writer

# `make soak` asks for more.
FILES = int(os.environ.get("SOAK_FILES", "400"))


@pytest.fixture(scope="module")
def made(c: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A repository that no test changes: an ext4 file system at point p2, which stands on p1."""
    folder = tmp_path_factory.mktemp("made")
    disks, tree = c.Disks(folder), c.make_tree(folder / "tree")
    (tree / "etc" / "hosts").chmod(0o4711)
    os.utime(tree / "etc" / "hosts", (1, 1_600_000_000))
    os.utime(tree / "etc" / "deep", (1, 1_500_000_000))
    image = disks.image(24 * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-L", "data", "-d", tree, image)
    disks.chain(image, 2)
    return disks.world


@pytest.fixture
def disk(c: Any, made: Any, tmp_path: Path) -> Any:
    """The same, with a destination of the test's own."""
    return c.Disks(tmp_path, made)


def test_a_second_run_changes_nothing_and_a_changed_file_needs_consent(disk: Any) -> None:
    planned = disk.restore("/etc", check_mode=True)
    assert planned["changed"] and os.listdir(disk.dest) == []
    assert disk.restore("/etc")["changed"]
    again = disk.restore("/etc")
    assert not again["changed"] and {file["state"] for file in again["files"]} == {"unchanged"}
    hosts = disk.dest / "etc" / "hosts"
    same_size = hosts.read_bytes().upper()
    hosts.write_bytes(same_size)
    (disk.dest / "etc" / "deep" / "er" / "file").write_bytes(b"longer than before")
    with pytest.raises(InputError, match="/er/file holds something else; .*/etc/hosts holds something else"):
        disk.restore("/etc", "/big")
    assert hosts.read_bytes() == same_size and not (disk.dest / "big").exists()
    result = disk.restore("/etc", overwrite=True)
    restored = sorted(file["path"] for file in result["files"] if file["state"] == "restored")
    assert restored == ["/etc/deep/er/file", "/etc/hosts"]
    assert hosts.read_text() == "127.0.0.1 localhost\n"


def test_what_is_written_is_synced_and_nothing_else(disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file before it gets its name, each directory after; the whole file system is never waited for."""
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        events.append(("synced", os.fstat(descriptor).st_ino))

    def rename(source: Any, target: Any, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        events.append(("named", os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False).st_ino))
        real_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    assert not hasattr(writer, "ctypes")
    disk.restore("/etc", "/big")
    files = [path for path in disk.dest.rglob("*") if path.is_file() and not path.is_symlink()]
    folders = [disk.dest, *(path for path in disk.dest.rglob("*") if path.is_dir() and not path.is_symlink())]
    assert len(files) >= 3 and len(folders) >= 3
    for path in files:
        inode = path.stat().st_ino
        assert events.index(("synced", inode)) < events.index(("named", inode)), path
    last_name = max(number for number, (what, _inode) in enumerate(events) if what == "named")
    for path in folders:
        assert ("synced", path.stat().st_ino) in events[last_name:], path


def test_what_is_of_another_kind_is_never_replaced(disk: Any) -> None:
    (disk.dest / "etc" / "hosts").mkdir(parents=True)
    with pytest.raises(InputError, match="is not a file"):
        disk.restore("/etc", overwrite=True)
    assert os.listdir(disk.dest / "etc") == ["hosts"]


def test_what_is_kept(disk: Any) -> None:
    disk.restore("/etc")
    hosts, deep = disk.dest / "etc" / "hosts", disk.dest / "etc" / "deep"
    assert (stat.S_IMODE(hosts.stat().st_mode), hosts.stat().st_mtime) == (0o600, 1_600_000_000)
    assert (stat.S_IMODE(deep.stat().st_mode), deep.stat().st_mtime) == (0o700, 1_500_000_000)
    other = disk.dest / "other"
    other.mkdir()
    disk.restore("/etc", dest=str(other), preserve=("mode",))
    assert stat.S_IMODE((other / "etc" / "hosts").stat().st_mode) == 0o711
    assert stat.S_IMODE((other / "etc").stat().st_mode) == 0o755
    assert (other / "etc" / "hosts").stat().st_mtime > 1_700_000_000
    third = disk.dest / "third"
    third.mkdir()
    disk.restore("/etc/hosts", dest=str(third), preserve=("mode", "special_bits"))
    assert stat.S_IMODE((third / "etc" / "hosts").stat().st_mode) == 0o4711


def test_patterns_and_what_is_not_there(disk: Any) -> None:
    def listed(*paths: str, **options: Any) -> Any:
        return sorted(disk.list(*paths, **options))

    assert listed("/etc/*", recurse=False) == ["/etc/deep", "/etc/empty", "/etc/hosts"]
    assert listed("/etc/h[a-o]sts", "/b?g", "/**/file") == ["/big", "/etc/deep/er/file", "/etc/hosts"]
    assert listed("/etc/deep", "/nothing", "/etc/hosts/below") == [
        "/etc/deep",
        "/etc/deep/er",
        "/etc/deep/er/file",
    ]
    with pytest.raises(VadpError, match="There is no such file: /nothing in restore point p2"):
        disk.restore("/etc/hosts", "/nothing")
    assert os.listdir(disk.dest) == []
    for path in ("etc", "/etc/../root", "/x\0y"):
        with pytest.raises(InputError):
            disk.restore(path)
    with pytest.raises(InputError, match="no such volume.*2000 .ext4 'data'."):
        disk.restore("/etc", volumes=["other"])
    with pytest.raises(InputError, match="holds no such disk"):
        disk.restore("/etc", disks=[2001])
    with pytest.raises(DataPathError, match="more than 3 files"):
        disk.restore("/**", limit=3)


def test_folders_that_can_not_be_used(disk: Any, tmp_path: Path) -> None:
    for dest, words in (
        (str(tmp_path / "missing"), "No such file"),
        ("relative", "not an absolute path"),
        (str(disk.world.repository.path / "vms"), "lies in a repository"),
    ):
        with pytest.raises(InputError, match=words):
            disk.restore("/etc", dest=dest)


def test_too_little_room_is_seen_before(disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The data of /sparse fit, though its size does not.
    monkeypatch.setattr(writer.Destination, "free_bytes", lambda self: 300000)
    assert disk.restore("/sparse")["changed"]
    with pytest.raises(DataPathError, match="not enough free space"):
        disk.restore("/big")
    assert os.listdir(disk.dest) == ["sparse"]


def test_what_fails_in_the_middle_is_undone(disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk.dest / "etc").mkdir()
    (disk.dest / "etc" / "mine").write_text("mine")
    real = os.rename
    calls = []

    def full(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args, **options)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(DataPathError, match="No space left"):
        disk.restore("/etc", "/big")
    assert os.listdir(disk.dest) == ["etc"] and os.listdir(disk.dest / "etc") == ["mine"]


def test_what_a_crash_left_goes_with_the_next_restore(disk: Any) -> None:
    mine = ".openvadp-files-mine"
    (disk.dest / mine).mkdir()
    with writer.Destination(str(disk.dest)) as destination, destination.stage():
        (alive,) = [name for name in os.listdir(disk.dest) if name != mine]
        dead = disk.dest / (alive[:-4] + "0000")
        dead.mkdir(mode=0o700)
        (dead / "1").write_text("part")
        disk.restore("/etc/hosts")
        assert not dead.exists() and (disk.dest / alive).exists()
    assert sorted(os.listdir(disk.dest)) == [mine, "etc"]


def test_a_directory_of_many_files(c: Any, disks: Any, tmp_path: Path) -> None:
    tree = tmp_path / "many"
    (tree / "dir").mkdir(parents=True)
    for number in range(FILES):
        (tree / "dir" / f"f{number}").write_bytes(b"%d" % number)
    image = disks.image((16 + FILES // 200) * c.MIB)
    c.tool("mkfs.ext4", "-q", "-F", "-b", "1024", "-N", FILES + 1000, "-d", tree, image)
    disks.chain(image, 2)
    result = disks.restore("/dir")
    assert len(result["files"]) == FILES + 1 and not result["skipped_files"]
    assert c.sums(disks.dest) == c.sums(tree)
