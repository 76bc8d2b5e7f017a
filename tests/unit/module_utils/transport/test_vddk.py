# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import vddk
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import (
    Vddk,
    choose_thumbprint,
    find_library,
    look_for_library,
    temporary_folder,
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
    assert found is None and "does not exist" in str(problem)


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


def test_the_thumbprint_follows_the_version() -> None:
    assert choose_thumbprint(THUMBPRINTS, Vddk("/", "8", "1")) == THUMBPRINTS["sha1"]
    assert choose_thumbprint(THUMBPRINTS, Vddk("/", "9.0.1", "1")) == THUMBPRINTS["sha256"]


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
