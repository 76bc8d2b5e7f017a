# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import vddk
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import (
    Vddk,
    connection_bytes,
    find_library,
    look_for_library,
    temporary_folder,
    thumbprints_to_try,
    version_problem,
    write_config,
)

THUMBPRINTS = {"sha1": "AA:" * 19 + "AA", "sha256": "BB:" * 31 + "BB"}


def _library(folder: Path, name: str, machine: int, bits: int = 2) -> Path:
    header = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + struct.pack("<HH", 3, machine)
    path = folder / "lib64" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + bytes(100))
    return folder


@pytest.mark.parametrize(
    ("machine", "bits", "word"),
    [(183, 2, "aarch64"), (3, 1, "32 bit"), (40, 1, "ARM"), (62, 2, "does not match current one")],
)
def test_a_library_that_does_not_load_is_told_apart(tmp_path: Path, machine: int, bits: int, word: str) -> None:
    with pytest.raises(TransportError) as caught:
        find_library(str(_library(tmp_path, "libvixDiskLib.so.8", machine, bits)))
    assert word in str(caught.value)


def test_version_9_alone_needs_a_link(tmp_path: Path) -> None:
    with pytest.raises(TransportError) as caught:
        find_library(str(_library(tmp_path, "libvixDiskLib.so.9", 62)))
    assert f"ln -s libvixDiskLib.so.9 {tmp_path}/lib64/libvixDiskLib.so.8" in str(caught.value)


def test_folders_without_a_library(tmp_path: Path) -> None:
    found, problem = look_for_library(str(tmp_path))
    assert found is None and f"{tmp_path}/lib64" in str(problem)
    found, problem = look_for_library(str(tmp_path / "absent"))
    assert found is None and "there is no such folder" in str(problem)


def test_nbdkit_or_its_plugin_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nbdkit is not installed" in str(look_for_library()[1])
    for name in ("setpriv", "sh"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    fake = tmp_path / "nbdkit"
    fake.write_text("#!/bin/sh\necho \"nbdkit: error: cannot open plugin 'vddk': no such file\" >&2; exit 1\n")
    fake.chmod(0o755)
    assert "plugin is not installed" in str(look_for_library()[1])


@pytest.mark.parametrize(
    ("release", "word"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "Debian 13 (contrib), which works"),
        ('ID=debian\nVERSION_ID="13"\n', "section contrib"),
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="25.04"\n', "Ubuntu 25.04"),
        ("ID=fedora\n", "nbdkit-vddk-plugin"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "nbdkit-vddk-plugin"),
        ("ID=arch\n", "Fedora and RHEL"),
    ],
)
def test_what_to_install(tmp_path: Path, release: str, word: str) -> None:
    path = tmp_path / "os-release"
    path.write_text(release)
    assert word in vddk._install_hint(path)


def test_every_version_gets_sha1_first() -> None:
    assert thumbprints_to_try(THUMBPRINTS) == [THUMBPRINTS["sha1"], THUMBPRINTS["sha256"]]


@pytest.mark.parametrize(("io_timeout", "read_ms"), [(180, 60000), (18, 6000), (1, 1000)])
def test_the_time_outs_scale(tmp_path: Path, io_timeout: int, read_ms: int) -> None:
    path = tmp_path / "vddk.conf"
    write_config(path, vddk=Vddk("/", "8.0.3", "1"), io_timeout=io_timeout, tmp_folder="/var/tmp/x")
    lines = path.read_text().splitlines()
    assert f"vixDiskLib.nfc.ReadTimeoutMs={read_ms}" in lines
    assert 'tmpDirectory="/var/tmp/x"' in lines
    assert "vixDiskLib.nfcAio.Session.BufCount=4" in lines
    write_config(path, vddk=Vddk("/", "6.7", "1"), io_timeout=io_timeout, tmp_folder="/var/tmp/x")
    assert "nfcAio" not in path.read_text()


@pytest.mark.parametrize(
    ("version", "has_keys"), [("7", False), ("7.0.2", False), ("7.0.3", True), ("8", True), ("9.0.0", True)]
)
def test_the_buffers_are_set_where_they_are_known(tmp_path: Path, version: str, has_keys: bool) -> None:
    path, library = tmp_path / "vddk.conf", Vddk("/", version, "1")
    write_config(path, vddk=library, io_timeout=180, tmp_folder="/var/tmp/x")
    assert ("nfcAio.Session.BufSizeIn64KB=16" in path.read_text()) is has_keys
    assert connection_bytes(library) == (4 << 20 if has_keys else 256 << 10)


@pytest.mark.parametrize(
    ("library", "server", "fits"),
    [
        ("8.0.3", "8.0.3", True),
        ("8.0.3", "7.0.2", True),
        ("8.0.0", "6.7.0", True),
        ("8.0.3", "6.5.0", False),
        ("8.0.3", "9.0.0", True),
        ("8.0.3", "10.0.0", False),
        ("8", "8.0.1", True),
        ("9.0.0", "7.0.3", True),
        ("9.0.0", "6.7.0", False),
        ("9", "10.0.0", True),
        ("7.0.3", "8.0.0", True),
        ("7.0.3", "9.0.0", False),
        ("6.7.3", "8.0.0", False),
        ("6.7.3", "7.0.0", True),
        ("6.5.0", "6.0.0", True),
        ("6", "7.0.0", True),
        ("6", "8.0.0", False),
        ("", "8.0.0", True),
        ("8.0.3", "unknown", True),
    ],
)
def test_the_library_is_for_two_releases_back_and_one_ahead(library: str, server: str, fits: bool) -> None:
    problem = version_problem(library, server)
    assert (problem is None) is fits, problem
    if problem is not None:
        assert library in problem and server in problem


def test_the_problem_names_the_releases() -> None:
    assert version_problem("8.0.3", "6.5.0") == ("VDDK 8.0.3 is for vSphere 6.7 to 9.0, and the server is 6.5.0")
    assert "to 10.0" in str(version_problem("9.0.0", "6.5.0"))


@pytest.mark.parametrize(
    ("library", "major", "fits"), [("6.0.3", 6, False), ("6.5.0", 6, True), ("6", 6, True), ("6.0.3", 5, True)]
)
def test_vmfs_6_needs_a_library_of_its_time(library: str, major: int, fits: bool) -> None:
    problem = version_problem(library, "6.5.0", vmfs_major=major)
    assert (problem is None) is fits, problem


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away")
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_name_that_another_user_took_first_stops_nobody(tmp_path: Path, kind: str) -> None:
    usual = tmp_path / f"openvadp-vddk-{os.getuid()}"
    planted = tmp_path / f"{usual.name}-aaaaaaaa"
    for path in (usual, planted):
        if kind == "folder":
            path.mkdir(mode=0o700)
        elif kind == "file":
            path.touch(mode=0o600)
        else:
            path.symlink_to(tmp_path)
        os.chown(path, 65534, 65534, follow_symlinks=False)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(temporary_folder, [tmp_path] * 8))
    assert len(found) == 1
    path = found.pop()
    assert path not in (usual, planted) and path.stat().st_mode & 0o777 == 0o700 and path.stat().st_uid == 0
    assert not [name for name in os.listdir(tmp_path) if name not in (usual.name, planted.name, path.name)]
    # Who uses it goes on with it when the other user goes away.
    if kind == "folder":
        usual.rmdir()
    else:
        usual.unlink()
    assert temporary_folder(tmp_path) == path


def test_the_temporary_folder_is_always_the_same_and_ours_alone(tmp_path: Path) -> None:
    path = temporary_folder(tmp_path)
    assert temporary_folder(tmp_path) == path
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(TransportError):
        temporary_folder(tmp_path)
    path.rmdir()
    path.symlink_to(os.getcwd())
    with pytest.raises(TransportError):
        temporary_folder(tmp_path)
