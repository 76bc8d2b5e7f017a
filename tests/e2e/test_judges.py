# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Images as programs read them that have nothing to do with qemu: 7-Zip, libvmdk, Sleuth Kit, VirtualBox.

What they read is compared with what the simulator read from the snapshot. Debian has no VirtualBox; where ``vbox-img``
is found it is asked too.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from harness import MIB, Simulator, made_repository
from modules import Modules

pytestmark = pytest.mark.soak

Content = Tuple[int, str]


def read(*command: str) -> Content:
    """(size, SHA-256) of what a program that has to succeed prints."""
    digest, size = hashlib.sha256(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for piece in iter(lambda: process.stdout.read(MIB), b""):
            digest.update(piece)
            size += len(piece)
    assert process.returncode == 0, command
    return size, digest.hexdigest()


def said(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, universal_newlines=True).stdout


def by_7zip(path: Path, content: Content) -> None:
    # Told its type it does not go on into the file systems.
    assert "Everything is Ok" in said("7zz", "t", "-tvmdk", str(path))
    assert read("7zz", "e", "-tvmdk", "-so", str(path)) == content


def by_libvmdk(path: Path, content: Content) -> None:
    words = said("vmdkinfo", str(path))
    assert f"({content[0]} bytes)" in words and "unable" not in words.lower(), words
    # The extent that the descriptor names is this file.
    assert re.search(rf"Filename:\s+{re.escape(path.name)}\n", words), words


def by_sleuth_kit(path: Path, content: Content) -> None:
    said("img_stat", "-i", "vmdk", str(path))
    assert read("img_cat", "-i", "vmdk", str(path)) == content
    if "2000" in path.name:  # GPT with ext4
        assert "hostname" in said("fls", "-i", "vmdk", "-o", "2048", "-r", str(path))


def by_virtualbox(path: Path, content: Content) -> None:
    if shutil.which("vbox-img"):
        raw = path.with_suffix(".raw")
        command = ["vbox-img", "convert", "--srcfilename", str(path), "--dstfilename", str(raw), "--dstformat", "RAW"]
        subprocess.run(command, check=True)
        assert read("cat", str(raw)) == content
        raw.unlink()


JUDGES: List[Callable[[Path, Content], None]] = [by_7zip, by_libvmdk, by_sleuth_kit, by_virtualbox]


def test_other_programs_read_what_is_restored(simulator: Simulator, tmp_path: Path) -> None:
    """Two disks, one of which ends within a grain; points with data at the very end, and without."""
    repository = tmp_path / "repository"
    made_repository(repository)
    modules = Modules(simulator, repository)
    modules.track_changes()
    modules.point("empty")
    simulator.write("app01", 2000, 33 * MIB + 512, seed=5, length=MIB)
    simulator.write("app01", 2001, 16 * MIB + 60 * 512, seed=6, length=7 * 512)
    modules.point("full", mode="full")
    simulator.write("app01", 2001, 3 * MIB + 512, seed=7, length=100000)
    modules.point("incremental", mode="incremental")
    for point, held in modules.held.items():
        for form, count in (("vmdk", 2), ("vmdk_stream", 2), ("ova", 1)):
            dest = tmp_path / f"{point}-{form}"
            dest.mkdir()
            options: Dict[str, Any] = {"repository": str(repository), "vm_name": "app01", "point": point}
            modules.done("vadp_disk_restore", **options, dest=str(dest), format=form)
            images = sorted(dest.iterdir())
            assert len(images) == count
            if form == "ova":
                assert "Everything is Ok" in said("7zz", "t", str(images[0]))
                with tarfile.open(str(images[0])) as archive:
                    archive.extractall(str(dest))
                images = sorted(dest.glob("*.vmdk"))
            for key, path in zip((2000, 2001), images):
                for judge in JUDGES:
                    judge(path, held[key])
