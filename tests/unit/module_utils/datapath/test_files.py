# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import files, hashes, image
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError


def plant(path: Path, kind: str) -> None:
    """Something that is not the file it should be."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            here = os.open(".", os.O_RDONLY)
            os.chdir(path.parent)  # socket paths are short
            sock.bind(path.name)
            os.fchdir(here)
            os.close(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a file":
        (path.parent / "other").write_bytes(b"{}")
        path.symlink_to("other")
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("may not make devices")
    elif kind == "for everybody":
        path.write_bytes(b"{}")
        path.chmod(0o646)
    else:
        os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), 6 << 30)


KINDS = ["pipe", "socket", "folder", "link to a device", "link to a file", "device", "for everybody"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [*KINDS, "huge"])
def test_only_an_ordinary_file_of_a_sensible_size_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    plant(path, kind)
    with pytest.raises(DamagedError, match="at most" if kind == "huge" else "not an ordinary file|everybody"):
        files.read(str(path))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [hashes.hash_file, hashes.read_hashes, image.read_header, image.chain_files])
def test_every_reader_of_a_repository_is_one(tmp_path: Path, kind: str, reader: Any) -> None:
    path = tmp_path / "file"
    plant(path, kind)
    with pytest.raises(DamagedError):
        reader(str(path))


def test_a_group_may_write_and_another_owner_is_no_reason(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    path.chmod(0o664)
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
    assert files.read(str(path)) == b"data"
    assert files.read(str(path), 4) == b"data"
    with pytest.raises(DamagedError, match="at most 3"):
        files.read(str(path), 3)
    with pytest.raises(FileNotFoundError):
        files.read(str(tmp_path / "absent"))


def test_a_file_that_grows_without_end_is_not_read_without_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    stop = threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as stream:
            while not stop.is_set():
                stream.write(bytes(4096))

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _again in range(50):
            try:
                assert len(files.read(str(path), 1 << 20)) <= 1 << 20
            except DamagedError:
                break
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize(
    "text", ["1" * 30, "-9223372036854775809", "NaN", "Infinity", '"\\ud800"', "[" * 100_000, "{", '{"a": 1} x', "\xff"]
)
def test_json_that_is_none_of_ours(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        files.parse(text.encode("latin-1"))


def test_json_of_ours() -> None:
    assert files.parse('{"a": [1, -9223372036854775808, 1.5, true, null, "\u00fc\\n\\u00fc"]}'.encode()) == {
        "a": [1, -(1 << 63), 1.5, True, None, "\u00fc\n\u00fc"]
    }


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away")
def test_a_folder_of_another_user_is_never_taken_for_ours(tmp_path: Path) -> None:
    for name, uid, mode in (("ours", 0, 0o700), ("theirs", 65534, 0o700), ("open", 0, 0o750)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        os.chown(tmp_path / name, uid, uid)
    with files.Folder(str(tmp_path)) as folder:
        for name in ("theirs", "open", "absent"):
            assert files.own_folder(folder.descriptor, name) is None
        descriptor = files.own_folder(folder.descriptor, "ours")
        assert descriptor is not None
        assert files.own_folder(folder.descriptor, "ours") is None  # it is locked
        os.close(descriptor)
    assert os.listdir(tmp_path / "ours") == os.listdir(tmp_path / "theirs") == []


def test_nothing_can_be_put_where_nobody_looks(tmp_path: Path) -> None:
    descriptor = files.nameless(str(tmp_path), "x-")
    os.write(descriptor, b"data")
    assert os.listdir(tmp_path) == [] and os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)
    with pytest.raises(DataPathError):
        files.nameless(str(tmp_path / "absent"), "x-")
