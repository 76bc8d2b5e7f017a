# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The protection of LUNs is in force, or the next run brings it there; stand-ins of the programs note their calls."""

from __future__ import annotations

import contextlib
import os

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.transport.protection import Files, Machine, ensure

UDEV = ["udevadm control --reload", "udevadm trigger --subsystem-match=block --action=change"]
MULTIPATH = ["multipathd reconfigure"]
INITRAMFS = ["update-initramfs -u"]


class Proxy:
    def __init__(self, folder):
        self.folder = folder
        self.told, self.broken, self.image = folder / "told", folder / "broken", folder / "initrd.img-6.1"
        for name in ("udevadm", "multipathd", "update-initramfs"):
            self.program(name)
        for name in ("udev", "multipath", "lvm"):
            (folder / name).mkdir()
            (folder / name / "file").write_text("one")
        for name in ("control", "pid"):
            (folder / name).touch()
        places = [[str(folder / name / "file")] for name in ("udev", "multipath", "lvm")]
        self.files = Files(*places)
        self.machine = Machine(
            str(folder / "control"), str(folder / "pid"), [str(folder / "initrd.img-*")], str(folder / "run")
        )

    def program(self, name):
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        made = f"[ {name} != update-initramfs ] || touch {self.image}" if name == "update-initramfs" else ":"
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.told}\n[ ! -e {self.broken}-{name} ] || exit 1\n{made}\n')
        path.chmod(0o755)

    def run(self, unprotected=(), check=False):
        self.told.unlink(missing_ok=True)
        with contextlib.suppress(DataPathError):
            ensure(self.files, unprotected, check, self.machine)
        return self.told.read_text().splitlines() if self.told.exists() else []


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    made = Proxy(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return made


def test_all_is_brought_into_force_once(proxy):
    assert proxy.run(check=True) == []
    assert len(ensure(proxy.files, [], True, proxy.machine)) == 3
    assert proxy.run() == UDEV + MULTIPATH + INITRAMFS
    assert proxy.run() == [] and ensure(proxy.files, [], True, proxy.machine) == []


@pytest.mark.parametrize(
    "name, again",
    [
        ("udevadm", UDEV + MULTIPATH + INITRAMFS),
        ("multipathd", MULTIPATH + INITRAMFS),
        ("update-initramfs", INITRAMFS),
    ],
)
def test_what_failed_is_made_up_for(proxy, name, again):
    (proxy.folder / f"broken-{name}").touch()
    proxy.run()
    proxy.run()
    (proxy.folder / f"broken-{name}").unlink()
    assert proxy.run() == again
    assert proxy.run() == []


def test_a_file_that_changes_or_goes_is_taken_again(proxy):
    proxy.run()
    (proxy.folder / "udev" / "file").write_text("two")
    assert proxy.run() == UDEV
    (proxy.folder / "multipath" / "file").unlink()
    assert proxy.run() == MULTIPATH
    os.utime(proxy.image, (1, 1))
    (proxy.folder / "lvm" / "file").unlink()
    assert proxy.run() == INITRAMFS
    assert proxy.run() == []


def test_a_lun_that_can_be_written_to_is_reason_enough(proxy):
    proxy.run()
    assert proxy.run(unprotected=["/dev/sdb"]) == UDEV


def test_what_is_not_there_is_passed_over(proxy):
    for name in ("control", "pid", "bin/update-initramfs"):
        (proxy.folder / name).unlink()
    assert proxy.run() == []
