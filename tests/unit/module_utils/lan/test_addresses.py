# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ipaddress

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.backup_lan_hosts import FilterModule
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.lan.addresses import (
    backup_lan_hosts,
    parse_range,
    parse_subnet,
)
from hypothesis import given
from hypothesis import strategies as st

BACKUP = "vSphereBackupNFC"
FILTER = FilterModule().filters()["backup_lan_hosts"]


def nic(ip, device="vmk2", portgroup="Backup", services=(BACKUP,)):
    return {"device": device, "ip": ip, "netmask": "255.255.255.0", "portgroup": portgroup, "services": list(services)}


def fact(name, *nics, cluster=None):
    return {"name": name, "nics": list(nics), "cluster": cluster}


def plan(facts, **lan):
    return {
        entry["esxi_hostname"]: entry["ip_address"]
        for entry in backup_lan_hosts(facts, {"subnet": "10.20.30.0/24", "portgroup": "Backup", **lan})
    }


ABC = [fact("a"), fact("b"), fact("c")]


# --- whatever is asked for ------------------------------------------------------------------------------------------


@st.composite
def descriptions(draw):
    """Facts and a description; some can be met, some can't."""
    prefix = draw(st.integers(26, 30))
    subnet = ipaddress.IPv4Network(f"10.20.30.64/{prefix}")
    everyone = [str(address) for address in subnet]
    inside = st.sampled_from(everyone)
    names = [f"esx{number:02d}" for number in range(draw(st.integers(1, 20)))]
    taken = draw(st.lists(inside, unique=True, max_size=8))
    facts = {name: fact(name) for name in [*names, "stranger"]}
    for address in taken:
        services = draw(st.sampled_from([(BACKUP,), (), ("vmotion",)]))
        where = draw(st.sampled_from(["Backup", "vMotion"]))
        facts[draw(st.sampled_from(sorted(facts)))]["nics"].append(nic(address, portgroup=where, services=services))
    hosts = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    lan = {
        "subnet": str(subnet),
        "portgroup": "Backup",
        "hosts": hosts,
        "addresses": draw(st.dictionaries(st.sampled_from(hosts), inside, max_size=3)),
        "exclude": draw(st.lists(inside, max_size=3)),
        "gateway": draw(st.none() | inside),
        "proxies": draw(st.lists(inside, max_size=2)),
        "pool": draw(st.just([]) | st.just([f"{everyone[1]}-{everyone[len(everyone) // 2]}"])),
    }
    return list(facts.values()), lan


@given(descriptions())
def test_a_plan_holds_what_is_promised_or_is_refused(case):
    facts, lan = case
    try:
        entries = backup_lan_hosts(facts, lan)
    except InputError:
        return
    subnet = ipaddress.ip_network(lan["subnet"])
    assert [entry["esxi_hostname"] for entry in entries] == lan["hosts"]
    given_to = {entry["esxi_hostname"]: ipaddress.ip_interface(entry["ip_address"]) for entry in entries}
    assert {one.network for one in given_to.values()} == {subnet}
    addresses = [one.ip for one in given_to.values()]
    assert len(set(addresses)) == len(addresses)
    never = {subnet.network_address, subnet.broadcast_address}
    never |= {ipaddress.ip_address(text) for text in [lan["gateway"], *lan["exclude"], *lan["proxies"]] if text}
    assert never.isdisjoint(addresses)
    # nobody else's, of whatever NIC
    for other in facts:
        for one in other["nics"]:
            holder = [host for host, address in given_to.items() if str(address.ip) == one["ip"]]
            assert holder in ([], [other["name"]])
    assert all(str(given_to[host].ip) == text for host, text in lan["addresses"].items())
    # an address that was there stays, unless it was moved by hand; a new one is the pool's
    pool = [parse_range("pool", text, subnet) for text in lan["pool"]]
    for host, address in given_to.items():
        (own,) = [one for one in facts if one["name"] == host]
        held = {one["ip"] for one in own["nics"] if one["portgroup"] == "Backup" or BACKUP in one["services"]}
        if host in lan["addresses"]:
            continue
        if held:
            assert str(address.ip) in held
        elif pool:
            assert any(first <= int(address.ip) <= last for first, last in pool)


@given(descriptions(), st.integers(1, 5))
def test_hosts_that_are_added_move_nobody(case, more):
    facts, lan = case
    try:
        before = backup_lan_hosts(facts, lan)
    except InputError:
        return
    # Made as planned, and then there are more hosts, named before all others.
    made = [fact(entry["esxi_hostname"], nic(entry["ip_address"].split("/")[0])) for entry in before]
    rest = [one for one in facts if one["name"] not in lan["hosts"]]
    new = [f"new{number}" for number in range(more)]
    lan = dict(lan, hosts=new + lan["hosts"], pool=[])
    try:
        after = backup_lan_hosts([*made, *rest, *(fact(name) for name in new)], lan)
    except InputError as error:
        assert "too small" in str(error)
        return
    assert after[more:] == before


@given(descriptions())
def test_a_pool_that_is_too_small_says_how_many_are_missing(case):
    facts, lan = case
    subnet = ipaddress.ip_network(lan["subnet"])
    bare = [fact(one["name"]) for one in facts]
    room = subnet.num_addresses - 2
    lan = {"subnet": str(subnet), "hosts": lan["hosts"]}
    if len(lan["hosts"]) <= room:
        assert len(backup_lan_hosts(bare, lan)) == len(lan["hosts"])
        return
    with pytest.raises(InputError) as caught:
        backup_lan_hosts(bare, lan)
    missing = len(lan["hosts"]) - room
    assert f"{room} are free" in str(caught.value) and f"{missing} missing" in str(caught.value)
    assert all(f"'{host}'" in str(caught.value) for host in lan["hosts"][room : room + 10])


# --- single things --------------------------------------------------------------------------------------------------


def test_the_lowest_free_ones_in_the_order_of_the_hosts():
    assert plan(ABC, hosts=["b", "a"]) == {"b": "10.20.30.1/24", "a": "10.20.30.2/24"}
    lan = {"pool": ["10.20.30.20-10.20.30.30", "10.20.30.10"], "exclude": ["10.20.30.20/31"], "hosts": ["a", "b"]}
    assert plan(ABC, **lan) == {"a": "10.20.30.10/24", "b": "10.20.30.22/24"}


def test_clusters_and_hosts_together_each_once_and_with_options_of_their_own():
    facts = [fact("z", cluster="One"), fact("a", cluster="One"), fact("q", cluster="Two")]
    lan = {
        "subnet": "10.20.30.0/24",
        "hosts": ["Z"],
        "clusters": ["One"],
        "host_options": {"A": {"uplinks": ["vmnic3"]}},
    }
    assert backup_lan_hosts(facts, lan) == [
        {"esxi_hostname": "z", "ip_address": "10.20.30.1/24"},
        {"esxi_hostname": "a", "ip_address": "10.20.30.2/24", "uplinks": ["vmnic3"]},
    ]


def test_a_fixed_address_that_another_nic_of_that_host_has_is_taken():
    facts = [fact("a", nic("10.20.30.7", portgroup="Old", services=())), fact("b")]
    assert plan(facts, hosts=["a", "b"], addresses={"a": "10.20.30.7"})["a"] == "10.20.30.7/24"
    with pytest.raises(InputError, match="vmk2's of host 'a'"):
        plan(facts, hosts=["a", "b"], addresses={"b": "10.20.30.7"})


@pytest.mark.parametrize(
    "lan, word",
    [
        ({"subnet": "10.20.30.0"}, "no room"),
        ({"subnet": "10.20.30.0/31"}, "no room"),
        ({"subnet": "10.20.30.7/24"}, "an address in 10.20.30.0/24"),
        ({"subnet": "backup"}, "such as 10.20.30.0/24"),
        ({"hosts": ["a", "A"]}, "named twice"),
        ({"hosts": []}, "No host is named"),
        ({"hosts": ["d"]}, "no such host"),
        ({"clusters": ["One"]}, "there are none"),
        ({"pool": ["10.20.30.9-10.20.30.1"]}, "before its first"),
        ({"pool": ["10.20.31.1"]}, "not within the subnet"),
        ({"pool": ["10.20.30.1-10.20.31.1"]}, "not within the subnet"),
        ({"pool": ["ten"]}, "option pool"),
        ({"exclude": ["10.20.30.300"]}, "option exclude"),
        ({"gateway": "10.20.30.255"}, "broadcast"),
        ({"addresses": {"a": "10.20.30.0"}}, "the subnet 10.20.30.0/24 itself"),
        ({"addresses": {"a": "10.20.30.4/30"}}, "more than one"),
        ({"addresses": {"x": "10.20.30.4"}}, "not among the hosts"),
        ({"addresses": {"a": "10.20.30.4", "b": "10.20.30.4"}}, "host 'a' has it"),
        ({"addresses": {"a": "10.20.30.4"}, "gateway": "10.20.30.4"}, "the gateway's"),
        ({"addresses": {"a": "10.20.30.4"}, "proxies": ["10.20.30.4/24"]}, "a proxy's"),
        ({"addresses": {"a": "10.20.30.4"}, "exclude": ["10.20.30.4"]}, "it is excluded"),
        ({"host_options": {"x": {}}}, "not among the hosts"),
        ({"pool": ["10.20.30.1-10.20.30.2"]}, "1 missing, for 'c'"),
    ],
)
def test_what_makes_no_sense_is_refused(lan, word):
    with pytest.raises(InputError, match=word):
        plan(ABC, **{"hosts": ["a", "b", "c"], **lan})


def test_what_a_host_can_not_keep_is_said():
    facts = [fact("a", nic("10.20.30.5")), fact("b")]
    with pytest.raises(InputError, match="can't keep: 10.20.30.5 of host 'a': it is a proxy's"):
        plan(facts, hosts=["a", "b"], proxies=["10.20.30.5/24"])
    # Moved by hand, it goes.
    assert plan(facts, hosts=["a"], proxies=["10.20.30.5"], addresses={"a": "10.20.30.6"}) == {"a": "10.20.30.6/24"}


def test_a_subnet():
    assert parse_subnet("10.20.30.0/30").prefixlen == 30


def test_the_filter():
    assert FILTER(ABC, subnet="10.20.30.0/24", hosts=["a"]) == [{"esxi_hostname": "a", "ip_address": "10.20.30.1/24"}]
    with pytest.raises(AnsibleFilterError, match="no such host"):
        FILTER(ABC, subnet="10.20.30.0/24", hosts=["x"])
    with pytest.raises(AnsibleFilterError, match="got cluster"):
        FILTER(ABC, subnet="10.20.30.0/24", cluster="x")
    with pytest.raises(AnsibleFilterError, match="subnet is required"):
        FILTER(ABC, hosts=["a"])
    with pytest.raises(AnsibleFilterError, match="the list hosts"):
        FILTER({"hosts": []}, subnet="10.20.30.0/24")


def test_the_old_address_of_a_host_that_moves_is_nobodys_yet():
    moving = fact("a", nic("10.20.30.1"))
    assert plan([moving, fact("b")], hosts=["a", "b"], addresses={"a": "10.20.30.9"}) == {
        "a": "10.20.30.9/24",
        "b": "10.20.30.2/24",
    }
    with pytest.raises(InputError, match="host 'a' still has it"):
        plan([moving, fact("b")], hosts=["a", "b"], addresses={"a": "10.20.30.9", "b": "10.20.30.1"})


def test_an_address_is_not_an_option_of_a_host():
    for name in ("ip_address", "netmask", "dhcp"):
        with pytest.raises(InputError, match=f"{name} of 'a'"):
            plan(ABC, hosts=["a"], host_options={"a": {name: "10.20.30.4"}})


def test_a_host_that_is_away_keeps_its_address():
    """vCenter still shows its NICs, and not what they carry: in the backup subnet, that one is its own."""
    away = [dict(nic("10.20.30.12", portgroup="dvportgroup-7"), services=None), dict(nic("10.0.0.1"), services=None)]
    facts = [fact("a", nic("10.20.30.11")), fact("b", *away), fact("c")]
    lan = {"hosts": ["a", "b", "c"], "pool": ["10.20.30.11-10.20.30.13"]}
    assert plan(facts, **lan) == {"a": "10.20.30.11/24", "b": "10.20.30.12/24", "c": "10.20.30.13/24"}
    # Of several it is the one on the port group; a stranger's address stays a stranger's.
    several = [dict(nic("10.20.30.12", portgroup="X"), services=None), dict(nic("10.20.30.13"), services=None)]
    assert plan([fact("b", *several)], hosts=["b"])["b"] == "10.20.30.13/24"
    assert plan(facts, hosts=["c"], pool=["10.20.30.12-10.20.30.13"]) == {"c": "10.20.30.13/24"}


def test_datacenters_with_the_same_subnet_and_clusters_of_one_name():
    here = dict(fact("a", cluster="C"), datacenter="DC0")
    there = dict(fact("b", nic("10.20.30.1"), cluster="C"), datacenter="DC1")
    with pytest.raises(InputError, match="one in each of DC0, DC1"):
        plan([here, there], clusters=["C"])
    assert plan([here, there], clusters=["C"], datacenter="DC0") == {"a": "10.20.30.2/24"}
    scope = {"datacenter": "DC0", "address_scope": "datacenter"}
    assert plan([here, there], clusters=["C"], **scope) == {"a": "10.20.30.1/24"}
    # Of a host whose datacenter is not known, the address counts.
    assert plan([here, dict(there, datacenter=None)], hosts=["a"], **scope) == {"a": "10.20.30.2/24"}
