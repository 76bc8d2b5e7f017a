# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ipaddress

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.lan import neighbours

ROUTES = """\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth1\t001E140A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth1\t801E140A\t011E140A\t0003\t0\t0\t0\t80FFFFFF\t0\t0\t0
"""
TABLE = """\
IP address       HW type     Flags       HW address            Mask     Device
10.20.30.11      0x1         0x2         00:50:56:12:34:56     *        eth1
10.20.30.12      0x1         0x0         00:00:00:00:00:00     *        eth1
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "route").write_text(ROUTES)
    (tmp_path / "arp").write_text(TABLE)
    return {"routes": str(tmp_path / "route"), "neighbours": str(tmp_path / "arp")}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def check(address, files, ask=lambda address: None):
    clock = Clock()
    return neighbours.check(ipaddress.IPv4Address(address), ask, clock=clock, sleep=clock.sleep, **files)


@pytest.mark.parametrize(
    "address, here",
    [("10.0.0.9", True), ("10.20.30.11", True), ("10.20.30.200", False), ("192.168.1.1", False)],
)
def test_only_a_route_without_a_gateway_is_our_segment(files, address, here):
    assert neighbours.on_segment(ipaddress.IPv4Address(address), files["routes"]) is here


def test_an_address_that_answers(files):
    assert check("10.20.30.11", files) == ("answers", "00:50:56:12:34:56")


def test_an_address_that_does_not(files):
    assert check("10.20.30.12", files) == ("free", None)


def test_a_late_answer_counts(files, tmp_path):
    asked = []

    def ask(address):
        asked.append(address)
        (tmp_path / "arp").write_text(TABLE.replace("0x0", "0x2"))

    assert check("10.20.30.12", files, ask)[0] == "answers"
    assert len(asked) == 1


def test_elsewhere_nobody_is_asked(files):
    def ask(address):
        raise AssertionError(address)

    assert check("192.168.1.1", files, ask) == ("not checked", None)


def test_a_machine_without_these_files_checks_nothing(tmp_path):
    missing = str(tmp_path / "none")
    assert check("10.0.0.1", {"routes": missing, "neighbours": missing}) == ("not checked", None)


def test_a_network_that_is_down_checks_nothing(files):
    def ask(address):
        raise OSError("Network is unreachable")

    assert check("10.0.0.9", files, ask) == ("not checked", None)
