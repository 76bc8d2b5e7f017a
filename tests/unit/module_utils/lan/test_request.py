# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.lan.request import HOST_OPTIONS, NicRequest, merged

CONNECTION = {
    "hostname": "vcenter.example.com",
    "username": "backup",
    "password": "secret",
    "port": 443,
    "validate_certs": True,
    "ca_path": None,
    "reconnect_timeout": 60,
    "thumbprint": None,
}
DEFAULTS = {
    **dict.fromkeys(HOST_OPTIONS),
    "esxi_hostname": None,
    "esxi_hostnames": None,
    "hosts": None,
    "state": "present",
    "dhcp": False,
    "tcpip_stack": "defaultTcpipStack",
    "allow_shared_subnet": False,
    "force": False,
    "address_scope": "vcenter",
    "timeout": 120,
    "parallel_hosts": 16,
}
GOOD = {"esxi_hostname": "esx01", "vswitch": "vSwitch1", "portgroup": "Backup", "ip_address": "10.0.0.5/24"}


def request(**options):
    return NicRequest.from_params({**CONNECTION, **DEFAULTS, **options})


def entry(name, **options):
    return {**dict.fromkeys(HOST_OPTIONS), "esxi_hostname": name, **options}


def test_one_host():
    made = request(**GOOD)
    assert made.single and [str(one.address) for one in made.hosts] == ["10.0.0.5/24"]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"ip_address": "10.0.0.0/24"}, "address of the subnet"),
        ({"ip_address": "10.0.0.255/24"}, "broadcast"),
        ({"ip_address": "10.0.0.5"}, "netmask is missing"),
        ({"dhcp": True}, "given twice"),
        ({"ip_address": None, "dhcp": True, "netmask": "255.255.255.0"}, "given twice"),
        ({"ip_address": None, "netmask": "255.255.255.0"}, "stands alone"),
        ({"ip_address": None}, "not named"),
        ({"vlan_id": -1}, "0 to 4094"),
        ({"vlan_id": 4095}, "0 to 4094"),
        ({"mtu": 1279}, "1280 to 9190"),
        ({"mtu": 9191}, "1280 to 9190"),
        ({"dvswitch": "DSwitch0"}, "Two switches"),
        ({"vswitch": None, "uplinks": ["vmnic1"]}, "uplinks stands alone"),
        ({"uplinks": []}, "names none"),
        ({"uplinks": ["vmnic1", "vmnic1"]}, "one twice"),
        ({"portgroup": " "}, "is empty"),
        ({"gateway": "10.0.0.5"}, "own address"),
        ({"gateway": "router"}, "gateway"),
        ({"ipv6_addresses": ["fd00::5"]}, "prefix is missing"),
        ({"ipv6_addresses": ["fd00::5/64", "fd00:0::5/64"]}, "twice"),
        ({"tcpip_stack": "vmotion"}, "default stack"),
        ({"timeout": 0}, "timeout"),
        ({"parallel_hosts": 0}, "1 to 64"),
        ({"state": "absent", "ip_address": None, "portgroup": None}, "not named"),
        ({"state": "absent", "ip_address": None, "portgroup": None, "dhcp": True}, "not named"),
    ],
)
def test_what_can_not_be(options, word):
    with pytest.raises(InputError, match=word):
        request(**{**GOOD, **options})


@pytest.mark.parametrize("number", [1280, 1500, 9000, 9190])
def test_every_mtu_in_the_range(number):
    assert request(**{**GOOD, "mtu": number}).hosts[0].mtu == number


@pytest.mark.parametrize("number", [0, 1, 4094])
def test_every_vlan_in_the_range(number):
    assert request(**{**GOOD, "vlan_id": number}).hosts[0].vlan_id == number


def test_an_absent_nic_needs_no_netmask():
    made = request(esxi_hostname="esx01", state="absent", ip_address="10.0.0.255")
    assert str(made.hosts[0].address.ip) == "10.0.0.255"


def test_an_entry_goes_before_the_common_options():
    made = request(
        vswitch="vSwitch1",
        portgroup="Backup",
        dhcp=True,
        mtu=9000,
        hosts=[entry("esx01", ip_address="10.0.0.1/24", mtu=1500), entry("esx02"), entry("esx03", vswitch="vSwitch2")],
    )
    told = [(one.host, one.dhcp, one.address and str(one.address), one.mtu, one.vswitch) for one in made.hosts]
    assert told == [
        ("esx01", False, "10.0.0.1/24", 1500, "vSwitch1"),
        ("esx02", True, None, 9000, "vSwitch1"),
        ("esx03", True, None, 9000, "vSwitch2"),
    ]
    assert not made.single


@pytest.mark.parametrize(
    "common, own, result",
    [
        ({"dvswitch": "D"}, {"vswitch": "S"}, {"vswitch": "S", "dvswitch": None}),
        (
            {"vswitch": "S", "uplinks": ["vmnic1"]},
            {"dvswitch": "D"},
            {"vswitch": None, "dvswitch": "D", "uplinks": None},
        ),
        ({"vswitch": "S", "uplinks": ["vmnic1"]}, {"vswitch": "T"}, {"vswitch": "T", "uplinks": ["vmnic1"]}),
        ({"dhcp": True}, {"ip_address": "10.0.0.1/24"}, {"dhcp": None, "ip_address": "10.0.0.1/24"}),
        ({"netmask": "255.255.0.0"}, {"ip_address": "10.0.0.1/24"}, {"netmask": None}),
        ({"netmask": "255.255.0.0"}, {"ip_address": "10.0.0.1"}, {"netmask": "255.255.0.0"}),
        ({"ip_address": "10.0.0.1/24"}, {"dhcp": True}, {"dhcp": True, "ip_address": None}),
        ({"ip_address": "10.0.0.1/24"}, {"dhcp": False}, {"dhcp": False, "ip_address": "10.0.0.1/24"}),
        ({"gateway": "10.0.0.1"}, {"gateway": ""}, {"gateway": ""}),
    ],
)
def test_an_option_of_a_host_takes_the_place_of_what_it_contradicts(common, own, result):
    made = merged({**dict.fromkeys(HOST_OPTIONS), **common}, entry("esx01", **own))
    assert {name: made[name] for name in result} == result


def test_an_empty_gateway_is_none():
    made = request(**{**GOOD, "gateway": ""}).hosts[0]
    assert made.no_gateway and made.gateway is None
    assert not request(**GOOD).hosts[0].no_gateway


def test_two_hosts_can_not_have_one_address():
    hosts = [entry("esx01", ip_address="10.0.0.1/24"), entry("esx02", ip_address="10.0.0.1/16")]
    with pytest.raises(InputError, match="'esx01' and 'esx02'"):
        request(portgroup="Backup", vswitch="vSwitch1", hosts=hosts)


def test_a_common_address_is_no_address_of_several():
    with pytest.raises(InputError, match="one address"):
        request(**{**GOOD, "esxi_hostname": None, "esxi_hostnames": ["esx01", "esx02"]})


def test_no_host_stands_twice():
    with pytest.raises(InputError, match="named twice"):
        request(esxi_hostnames=["esx01", "ESX01"], device="vmk1")


def test_an_error_of_many_names_the_host():
    hosts = [entry("esx01", ip_address="10.0.0.1/24"), entry("esx02", ip_address="10.0.0.0/24")]
    with pytest.raises(InputError, match="host 'esx02'"):
        request(portgroup="Backup", vswitch="vSwitch1", hosts=hosts)


def test_an_empty_list_names_no_host():
    with pytest.raises(InputError, match="No host"):
        request(hosts=[])
