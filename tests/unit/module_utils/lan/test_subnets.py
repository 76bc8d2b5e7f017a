# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ipaddress

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.lan import subnets
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.host_network import Nic
from hypothesis import given
from hypothesis import strategies as st

# Unicast addresses, by their number.
UNICAST = st.integers(1 << 24, (224 << 24) - 1).filter(lambda number: number >> 16 != 0xA9FE)


def interface(number, prefix):
    return ipaddress.IPv4Interface((number, prefix))


def nic(device, address, prefix=24, **more):
    one = ipaddress.IPv4Interface(f"{address}/{prefix}")
    return Nic(device, ip=str(one.ip), netmask=str(one.netmask), **more)


@given(st.integers(0, 0xFFFFFFFF))
def test_a_netmask_is_ones_and_then_zeros(bits):
    text = str(ipaddress.IPv4Address(bits))
    valid = "01" not in f"{bits:032b}"
    if valid:
        assert subnets.parse_netmask(text) == bin(bits).count("1")
    else:
        with pytest.raises(InputError):
            subnets.parse_netmask(text)


@given(st.integers(0, 32))
def test_every_netmask_is_taken(prefix):
    mask = str(ipaddress.IPv4Network((0, prefix)).netmask)
    assert subnets.parse_netmask(mask) == prefix


@given(UNICAST, st.integers(1, 31))
def test_an_address_of_a_host_and_no_other(number, prefix):
    one = interface(number, prefix)
    size = 1 << (32 - prefix)
    edge = size > 2 and number % size in (0, size - 1)
    for text, netmask in ((str(one), None), (str(one.ip), str(one.netmask)), (str(one), str(one.netmask))):
        if edge:
            with pytest.raises(InputError, match=r"address of the subnet|broadcast address"):
                subnets.parse_ipv4(text, netmask)
        else:
            assert subnets.parse_ipv4(text, netmask) == one


@given(UNICAST, st.integers(8, 30), UNICAST, st.integers(8, 30))
def test_two_subnets_share_addresses_or_they_do_not(first, first_prefix, second, second_prefix):
    one, other = interface(first, first_prefix).network, interface(second, second_prefix).network
    # By the definition: the higher of the starts is not beyond the lower of the ends.
    low = max(int(one.network_address), int(other.network_address))
    high = min(int(one.broadcast_address), int(other.broadcast_address))
    assert (subnets.shared([one], [other]) is not None) == (low <= high)
    assert (subnets.shared([other], [one]) is not None) == (low <= high)


@given(UNICAST, st.integers(8, 30), st.integers(8, 30), st.data())
def test_who_is_in_the_subnet_is_found_whatever_its_prefix(number, prefix, other_prefix, data):
    network = interface(number, prefix).network
    inside = data.draw(st.integers(int(network.network_address), int(network.broadcast_address)))
    there = nic("vmk1", ipaddress.IPv4Address(inside), other_prefix)
    assert subnets.conflicts([network], there.stack, [there]) == [there]
    assert subnets.conflicts([network], there.stack, [there], own_device="vmk1") == []
    assert subnets.conflicts([network], "vmotion", [there]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0",
        "10.0.0.256",
        "10.0.0.05",
        "10.0.0.5.1",
        "0x0a.0.0.5",
        " 10.0.0.5",
        "esx01",
        "10.0.0.5/0",
        "10.0.0.5/32",
        "10.0.0.5/-1",
        "10.0.0.5/24/24",
        "10.0.0.5/255.255.255.0",
        "0.0.0.0/8",
        "0.1.2.3/24",
        "169.254.1.2/16",
        "224.0.0.5/24",
        "240.0.0.5/24",
        "255.255.255.255/24",
        "fd00::5/64",
    ],
)
def test_what_no_host_may_have(text):
    with pytest.raises(InputError):
        subnets.parse_ipv4(text)


@pytest.mark.parametrize(
    "address, netmask, word",
    [
        ("10.0.0.5", None, "netmask is missing"),
        ("10.0.0.5/24", "255.255.0.0", "/24, netmask says /16"),
        ("10.0.0.5", "255.0.255.0", "mixed"),
        ("10.0.0.5", "0.0.0.255", "mixed"),
        ("10.0.0.5", "255.255.255.255", "not a prefix"),
        ("10.0.0.5", "24", "four numbers"),
    ],
)
def test_a_netmask_that_can_not_be(address, netmask, word):
    with pytest.raises(InputError, match=word):
        subnets.parse_ipv4(address, netmask)


@pytest.mark.parametrize("text", ["fd00::5", "fd00::/64", "fe80::1/64", "ff02::1/64", "::/64", "fd00::5/128", "x/64"])
def test_ipv6_that_no_host_may_have(text):
    with pytest.raises(InputError):
        subnets.parse_ipv6(text)


def test_ipv6_of_a_host():
    assert str(subnets.parse_ipv6("FD00:0::5/64")) == "fd00::5/64"


def test_link_local_addresses_are_no_subnet():
    first = Nic("vmk0", ip="10.0.0.1", netmask="255.255.255.0", ipv6=("fe80::1/64",))
    second = Nic("vmk1", ip="10.0.1.1", netmask="255.255.255.0", ipv6=("fe80::2/64",))
    assert subnets.shared_pairs([first, second]) == []


def test_ipv6_subnets_count():
    first = Nic("vmk0", ip="10.0.0.1", netmask="255.255.255.0", ipv6=("fd00::1/64",))
    second = Nic("vmk1", ip="10.0.1.1", netmask="255.255.255.0", ipv6=("fd00::2/48",))
    assert subnets.shared_pairs([first, second]) == [(first, second)]


@pytest.mark.parametrize(
    "services, other_services, iscsi, reason",
    [
        (("vmotion",), ("vmotion",), (), "multi-NIC vMotion"),
        ((), (), ("vmk1", "vmk2"), "iSCSI port binding"),
        ((), (), ("vmk1",), None),
        (("vmotion",), (), (), None),
        (("vmotion", "vSphereBackupNFC"), ("vmotion",), (), None),
        (("vSphereBackupNFC",), (), ("vmk1", "vmk2"), None),
        (("management",), ("vSphereBackupNFC",), (), None),
    ],
)
def test_who_may_share_a_subnet(services, other_services, iscsi, reason):
    first = nic("vmk1", "10.0.0.1", services=services)
    second = nic("vmk2", "10.0.0.2", services=other_services)
    assert subnets.may_share(first, second, iscsi) == reason


def test_nsx_tunnel_endpoints_may_share():
    first, second = nic("vmk10", "10.0.0.1", stack="vxlan"), nic("vmk11", "10.0.0.2", stack="vxlan")
    assert subnets.shared_pairs([first, second]) == [(first, second)]
    assert subnets.may_share(first, second) == "NSX tunnel endpoints"
