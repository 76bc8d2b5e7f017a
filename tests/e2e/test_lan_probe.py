# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Module backup_lan_probe on real networks: network namespaces and veth pairs, with nothing but their own addresses."""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, Iterator

import pytest
from namespaces import Forbidden, Machine, Network


@pytest.fixture
def network(capfd: pytest.CaptureFixture[str]) -> Iterator[Network]:
    try:
        made = Network()
    except Forbidden as error:
        message = f"this machine forbids network namespaces, so backup_lan_probe is not tried on real networks: {error}"
        with capfd.disabled():
            print(message, file=sys.stderr)
        pytest.skip(message)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def proxy(network: Network) -> Machine:
    return network.machine("proxy")


@pytest.fixture
def host(network: Network) -> Machine:
    return network.machine("host")


def test_two_nics_in_one_subnet_and_the_same_with_a_subnet_of_their_own(
    network: Network, proxy: Machine, host: Machine
) -> None:
    """The field report: the host's answers leave by its other NIC. And it does not look like a closed port."""
    other = network.machine("other")
    network.wire(host, "vmk0", other, "eth0")
    network.wire(host, "vmk1", proxy, "eth1")
    host.ip("address add 10.20.30.10/24 dev vmk0")
    host.ip("address add 10.20.30.11/24 dev vmk1")
    other.ip("address add 10.20.30.200/24 dev eth0")
    proxy.ip("address add 10.20.30.5/24 dev eth1")
    host.authd("0.0.0.0:902")

    found = proxy.probe("10.20.30.11", source_address="10.20.30.5", timeout=4)["10.20.30.11"]
    assert (found["cause"], found["reached"], found["proven"]) == ("timeout", False, False)
    # The host is there, and says so on the segment; only its answers on TCP go elsewhere.
    assert "ARP" in found["reason"] and "within 4 s" in found["reason"]
    assert "two VMkernel NICs in this subnet" in found["remedy"] and "shared_subnets" in found["remedy"]
    assert found["interface"] == "eth1"

    # The other segment gets a subnet of its own, and nothing else changes.
    host.ip("address delete 10.20.30.10/24 dev vmk0")
    host.ip("address add 10.20.31.10/24 dev vmk0")
    found = proxy.probe("10.20.30.11", source_address="10.20.30.5", timeout=4)["10.20.30.11"]
    assert found["proven"] and found["cause"] == "ok" and found["source_address"] == "10.20.30.5"
    assert found["banner"].startswith("220 VMware Authentication Daemon")

    # A closed port is another thing.
    found = proxy.probe("10.20.30.11", source_address="10.20.30.5", nfc_port=903)["10.20.30.11"]
    assert found["cause"] == "closed" and "port 903 is closed" in found["reason"]


def joined(network: Network, proxy: Machine, host: Machine) -> None:
    """The proxy and a host in 10.20.30.0/24."""
    network.wire(proxy, "eth1", host, "vmk1")
    proxy.ip("address add 10.20.30.5/24 dev eth1")
    host.ip("address add 10.20.30.11/24 dev vmk1")
    host.authd("0.0.0.0:902")


def test_what_goes_wrong_is_told_apart(network: Network, proxy: Machine, host: Machine) -> None:
    joined(network, proxy, host)
    host.ip("address add 10.20.30.12/24 dev vmk1")
    host.authd("10.20.30.12:903", banner="SSH-2.0-OpenSSH_9.2")
    host.authd("10.20.30.12:904", banner="")
    host.authd("10.20.30.12:905", banner="220 VMware Authentication Daemonic")

    def cause(address: str, **options: Any) -> Dict[str, Any]:
        return dict(proxy.probe(address, **options)[address])

    assert cause("10.20.30.99", timeout=5)["cause"] == "unreachable"
    assert "nobody on this segment" in cause("10.20.30.99", timeout=5)["reason"]
    assert cause("10.99.0.1", timeout=2)["cause"] == "no_route"
    found = cause("10.20.30.11", source_address="10.20.30.77")
    assert found["cause"] == "wrong_source" and "not an address of this machine" in found["reason"]
    found = cause("10.20.30.12", nfc_port=903)
    assert found["cause"] == "not_authd" and "SSH-2.0" in found["reason"] and found["banner"] == "SSH-2.0-OpenSSH_9.2"
    found = cause("10.20.30.12", nfc_port=904, timeout=1)
    assert found["cause"] == "silent" and "said nothing within 1 s" in found["reason"] and found["banner"] is None

    # A firewall that drops: the address is there, TCP gets no answer.
    host.ip("route add blackhole 10.20.30.5")
    assert cause("10.20.30.11", timeout=2)["cause"] == "timeout"
    # One that says no.
    proxy.ip("route add prohibit 10.20.40.0/24")
    found = cause("10.20.40.1", timeout=2)
    assert found["cause"] == "unreachable" and "this machine itself" in found["reason"]


def test_a_source_address_does_not_choose_the_interface(network: Network, proxy: Machine, host: Machine) -> None:
    joined(network, proxy, host)
    other = network.machine("other")
    network.wire(proxy, "eth2", other, "eth0")
    proxy.ip("address add 10.20.31.5/24 dev eth2")
    host.ip("route add 10.20.31.0/24 via 10.20.30.5")
    found = proxy.probe("10.20.30.11", source_address="10.20.31.5")["10.20.30.11"]
    assert found["reached"] and not found["proven"] and found["cause"] == "wrong_interface"
    assert "leave by eth1" in found["reason"] and "belongs to eth2" in found["reason"]


@pytest.mark.parametrize("way", ["datagram", "raw", "ping"])
def test_the_mtu_is_proved_and_its_two_failures_are_told_apart(
    network: Network, proxy: Machine, host: Machine, way: str
) -> None:
    joined(network, proxy, host)
    prefix = []
    if way == "datagram":
        proxy.sysctl("ipv4/ping_group_range", "0 0")
    if way == "ping":
        # No right for a socket of its own; the program has it by its file.
        if os.geteuid() != 0:
            pytest.skip("the program ping has no rights of its own in an ordinary user's namespaces")
        prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"]

    def mtu(asked: int) -> Dict[str, Any]:
        options = {"source_address": "10.20.30.5", "mtu": asked, "timeout": 3}
        return dict(proxy.probe("10.20.30.11", prefix=prefix, **options)["10.20.30.11"])

    def set_mtu(at_proxy: int, at_host: int) -> None:
        proxy.ip(f"link set eth1 mtu {at_proxy}")
        host.ip(f"link set vmk1 mtu {at_host}")

    found = mtu(1500)
    assert found["proven"] and found["mtu"] == {"asked": 1500, "ok": True, "reason": ""}

    found = mtu(9000)
    assert found["reached"] and not found["proven"] and found["cause"] == "mtu_local"
    assert "local MTU too small: eth1 has 1500" in found["mtu"]["reason"]

    set_mtu(9000, 1500)
    found = mtu(9000)
    assert found["reached"] and not found["proven"] and found["cause"] == "mtu_path"
    assert "lost on the way, small packets come back" in found["mtu"]["reason"]
    assert "MTU of 1500" in found["mtu"]["reason"]
    assert mtu(1500)["proven"]

    set_mtu(9000, 9000)
    assert mtu(9000)["proven"]


def test_a_router_that_says_how_much_it_lets_through(network: Network, proxy: Machine, host: Machine) -> None:
    router = network.machine("router")
    network.wire(proxy, "eth1", router, "eth0")
    network.wire(router, "eth1", host, "vmk1")
    proxy.ip("address add 10.20.40.5/24 dev eth1")
    router.ip("address add 10.20.40.1/24 dev eth0")
    router.ip("address add 10.20.30.1/24 dev eth1")
    host.ip("address add 10.20.30.11/24 dev vmk1")
    proxy.ip("route add 10.20.30.0/24 via 10.20.40.1")
    host.ip("route add 10.20.40.0/24 via 10.20.30.1")
    router.sysctl("ipv4/ip_forward", "1")
    host.authd("0.0.0.0:902")
    proxy.ip("link set eth1 mtu 9000")
    router.ip("link set eth0 mtu 9000")
    found = proxy.probe("10.20.30.11", "10.20.50.1", "10.20.30.98", mtu=9000, timeout=5)
    assert found["10.20.30.11"]["cause"] == "mtu_path"
    assert "10.20.40.1 lets only 1500 bytes through" in found["10.20.30.11"]["reason"]
    assert found["10.20.50.1"]["cause"] == "no_route"
    assert found["10.20.30.98"]["cause"] == "unreachable" and "a router says" in found["10.20.30.98"]["reason"]


def test_a_host_that_answers_no_echo_leaves_the_mtu_open(network: Network, proxy: Machine, host: Machine) -> None:
    joined(network, proxy, host)
    host.sysctl("ipv4/icmp_echo_ignore_all", "1")
    found = proxy.probe("10.20.30.11", mtu=1500, timeout=3)["10.20.30.11"]
    assert found["reached"] and found["proven"] and found["mtu"]["ok"] is None
    assert "answers no echo requests" in found["mtu"]["reason"]


def test_version_6(network: Network, proxy: Machine, host: Machine) -> None:
    network.wire(proxy, "eth1", host, "vmk1")
    proxy.ip("address add fd00:20::5/64 dev eth1 nodad")
    host.ip("address add fd00:20::11/64 dev vmk1 nodad")
    host.authd(":::902")
    found = proxy.probe("fd00:20::11", source_address="fd00:20::5", mtu=1500)["fd00:20::11"]
    assert found["proven"] and found["mtu"]["ok"] is True
    found = proxy.probe("fd00:20::11", source_address="fd00:20::5", mtu=9000)["fd00:20::11"]
    assert found["cause"] == "mtu_local"


def test_forty_hosts_at_once(network: Network, proxy: Machine, host: Machine) -> None:
    joined(network, proxy, host)
    addresses = [f"10.20.30.{number}" for number in range(20, 60)]
    for address in addresses[::2]:
        host.ip(f"address add {address}/24 dev vmk1")
    found = proxy.probe(*addresses, source_address="10.20.30.5", mtu=1500, timeout=5)
    assert list(found) == addresses
    assert [found[address]["proven"] for address in addresses] == [True, False] * 20
    assert {found[address]["cause"] for address in addresses[1::2]} == {"unreachable"}
