# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys

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


def check(address, files, ask=lambda address: False):
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
        return False

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


# --- a real segment: two network namespaces and a cable between them

SEGMENT = """
set -e
ip link set lo up
unshare -n sleep 60 & other=$!
trap "kill $other" EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do :; done
ip link add near type veth peer name far
ip link set far netns $other
nsenter -t $other -n ip address add 10.9.0.2/24 dev far
nsenter -t $other -n ip link set far up
ip address add 10.9.0.1/24 dev near
ip link set near up
"$@"
"""
ASK = """
import ipaddress, json, sys
from ansible_collections.openvadp.backup.plugins.module_utils.lan import neighbours
print(json.dumps({text: neighbours.check(ipaddress.IPv4Address(text)) for text in sys.argv[1:]}))
"""


def test_on_a_real_segment():
    if (
        shutil.which("ip") is None
        or subprocess.run(["unshare", "-Urn", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine has no iproute2, or forbids network namespaces")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "-Urn", "sh", "-c", SEGMENT, "sh", sys.executable, "-c", ASK]
    asked = ["10.9.0.2", "10.9.0.3", "10.9.0.1", "10.8.0.1"]
    run = subprocess.run([*command, *asked], check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [found[text][0] for text in asked] == ["answers", "free", "answers", "not checked"]
    assert found["10.9.0.1"][1] == "this machine" and found["10.9.0.2"][1].count(":") == 5
