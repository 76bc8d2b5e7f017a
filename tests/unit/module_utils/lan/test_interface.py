# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is in force counts: a reload that failed, was put off or got lost is made up for, and nothing is done twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, InputError
from ansible_collections.openvadp.backup.plugins.module_utils.lan.interface import Wanted, differences, ensure

LO_MTU = int(Path("/sys/class/net/lo/mtu").read_text())


class Proxy:
    """A file, and managers that note what they are told; `broken` makes them fail."""

    def __init__(self, folder):
        self.file = folder / "10-lan.network"
        self.told = folder / "told"
        self.broken = folder / "broken"
        self.kept = folder / "run"
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name in ("networkctl", "nmcli"):
            program = self.programs / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.told}\n[ ! -e {self.broken} ]\n')
            program.chmod(0o755)
        self.file.write_text("one")

    def run(self, check=False, **options):
        """(result, what the managers were told)"""
        self.told.unlink(missing_ok=True)
        params = {
            "path": str(self.file),
            "manager": "systemd-networkd",
            "interface": "openvadp9",
            "address": "10.20.30.5/24",
            "mtu": 9000,
            "destination": None,
            "gateway": None,
            "apply": True,
            "timeout": 0,
            **options,
        }
        try:
            result = ensure(Wanted.from_params(params), check, str(self.kept))
        except DataPathError as error:
            result = error
        return result, self.told.read_text().splitlines() if self.told.exists() else []


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    made = Proxy(tmp_path)
    monkeypatch.setenv("PATH", f"{made.programs}:{os.environ['PATH']}")
    return made


COMMANDS = ["networkctl reload", "networkctl reconfigure openvadp9"]


def test_once_and_not_again(proxy):
    result, told = proxy.run(check=True)
    assert result["changed"] and told == []
    result, told = proxy.run()
    assert result["changed"] and told == COMMANDS and result["in_force"] is None  # there is no such interface
    for check in (True, False):
        result, told = proxy.run(check=check)
        assert not result["changed"] and told == [] and result["reasons"] == []


def test_a_reload_that_failed_is_made_up_for(proxy):
    proxy.broken.touch()
    for _time in range(2):
        result, told = proxy.run()
        assert isinstance(result, DataPathError) and told == COMMANDS[:1]
    proxy.broken.unlink()
    assert proxy.run()[1] == COMMANDS
    assert proxy.run()[1] == []


def test_a_reload_that_was_put_off_is_made_up_for(proxy):
    result, told = proxy.run(apply=False)
    assert not result["changed"] and told == [] and "not known to have read" in result["reasons"][0]
    assert proxy.run()[1] == COMMANDS


@pytest.mark.parametrize("again", ["one", "two"])
def test_a_file_that_was_put_in_its_place_meanwhile_was_not_read(proxy, again):
    proxy.run()
    proxy.file.unlink()
    proxy.file.with_suffix(".other").write_text("x")  # so that the inode is not used again
    proxy.file.write_text(again)
    assert proxy.run()[1] == COMMANDS


def test_a_file_from_before_the_start_of_the_machine_was_read(proxy, monkeypatch):
    started = int(proxy.file.stat().st_ctime) + 10
    stat = proxy.file.with_suffix(".stat")
    stat.write_text(f"cpu 1\nbtime {started}\n")
    own_open = open
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, **b: own_open(stat if path == "/proc/stat" else path, *a, **b)
    )
    assert proxy.run()[1] == []


def test_what_the_kernel_has_counts(proxy):
    """The loopback interface: it is as described, or the manager is told, and believed only if it becomes so."""
    right = {"interface": "lo", "address": "127.0.0.1/8", "mtu": LO_MTU}
    proxy.run()
    result, told = proxy.run(**right)
    assert result["in_force"] is True and told == []
    for change, word in (
        ({"mtu": 1280}, f"lo has an MTU of {LO_MTU}, not 1280"),
        ({"address": "127.0.0.1/24"}, "lo has the address 127.0.0.1/8, not 127.0.0.1/24"),
        ({"destination": "203.0.113.0/24", "gateway": "127.0.0.9"}, "packets to 203.0.113.0/24 don't go to 127.0.0.9"),
    ):
        result, told = proxy.run(**{**right, **change, "apply": False})
        assert result["reasons"] == [word] and result["in_force"] is False and told == []
        result, told = proxy.run(**{**right, **change})
        assert (
            isinstance(result, DataPathError)
            and word in str(result)
            and told == [COMMANDS[0], "networkctl reconfigure lo"]
        )


def test_network_manager(proxy):
    assert proxy.run(manager="NetworkManager")[1] == [
        "nmcli connection reload",
        "nmcli connection up openvadp-backup-lan",
    ]


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 16, "a b"])
def test_no_name_of_an_interface(proxy, name):
    with pytest.raises(InputError, match="interface"):
        proxy.run(interface=name)


def test_an_interface_that_is_not_there(proxy):
    wanted = Wanted.from_params(
        dict.fromkeys(("destination", "gateway"))
        | {"path": "/x", "manager": "NetworkManager", "interface": "openvadp9", "address": "10.0.0.1/24", "mtu": 1500}
        | {"apply": True, "timeout": 0}
    )
    assert differences(wanted) is None
