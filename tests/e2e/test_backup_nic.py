# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The backup NIC of hosts: made, tagged, refused, rolled back; what is told of it; the pool of a distributed switch.

Each test takes a new host of the shared simulator. Stories go through ansible-playbook; where a module runs dozens of
times with a fault in another call each time, it is started as Ansible starts it.
"""

from __future__ import annotations

import contextlib
import copy
import ssl
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from harness import Ansible, Simulator
from modules import Modules
from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim

BACKUP = "vSphereBackupNFC"
NIC = "vmkernel_backup_nic"
INFO = "vmkernel_backup_nic_info"
NIOC = "dvswitch_backup_nioc"

Options = Dict[str, Any]


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    running = Simulator(tmp_path_factory.mktemp("lan") / "state")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def host(lan: Simulator) -> Iterator[str]:
    """A new host, with free uplinks vmnic1 and vmnic3, and vmnic2 on DSwitch0."""
    yield new_hosts(lan, 1)[0]
    lan.control.call("clear_injections")
    lan.control.call("set_settings", dhcp_delay=0.3, dhcp_subnet="10.66.0.0/24")


@pytest.fixture
def run(lan: Simulator, tmp_path: Path) -> Any:
    """A module as Ansible starts it: its result, without the half second of ansible-playbook."""
    (tmp_path / "unused").mkdir()
    modules = Modules(lan, tmp_path / "unused")

    def call(module: str = NIC, check: bool = False, **options: Any) -> Dict[str, Any]:
        return modules.run(module, **lan.connection, **options, _ansible_check_mode=check, _ansible_diff=True)

    def twice(**options: Any) -> List[Dict[str, Any]]:
        """The same at the same time."""
        options = {**lan.connection, **options}
        return [modules.result(process) for process in [modules.start(NIC, options) for _number in range(2)]]

    call.twice = twice  # type: ignore[attr-defined]
    return call


def new_hosts(lan: Simulator, count: int) -> List[str]:
    return list(lan.control.call("add_hosts", count=count, dvswitch="DSwitch0"))


@contextlib.contextmanager
def administrator(lan: Simulator, host: str) -> Iterator[Tuple[Any, Any]]:
    """(HostNetworkSystem, HostVirtualNicManager) of a host, as the administrator has them."""
    facts = lan.facts
    service = SmartConnect(
        host=facts["host"],
        port=facts["port"],
        user=facts["username"],
        pwd=facts["password"],
        sslContext=ssl.create_default_context(cafile=facts["ca_path"]),
    )
    try:
        found = service.content.searchIndex.FindByDnsName(None, host, False)
        yield found.configManager.networkSystem, found.configManager.virtualNicManager
    finally:
        Disconnect(service)


def add_nic(lan: Simulator, host: str, portgroup: str, address: str, *services: str, stack: str = "") -> str:
    """A VMkernel NIC that an administrator has made, /24."""
    with administrator(lan, host) as (network, manager):
        network.AddPortGroup(
            vim.host.PortGroup.Specification(
                name=portgroup, vlanId=0, vswitchName="vSwitch0", policy=vim.host.NetworkPolicy()
            )
        )
        ip = vim.host.IpConfig(dhcp=False, ipAddress=address, subnetMask="255.255.255.0")
        spec = vim.host.VirtualNic.Specification(ip=ip, netStackInstanceKey=stack or None)
        device = str(network.AddVirtualNic(portgroup, spec))
        for service in services:
            manager.SelectVnicForNicType(service, device)
    return device


def state(lan: Simulator, host: str) -> Dict[str, Any]:
    """The network of a host, and the names of the distributed port groups."""
    told = lan.control.call("networks", host=host)
    services = {name: devices for name, devices in told["hosts"][host]["services"].items() if devices}
    return {
        "network": told["hosts"][host]["network"],
        "services": services,
        "portgroups": told["switches"]["DSwitch0"]["portgroups"],
    }


def nics(lan: Simulator, host: str) -> Dict[str, Any]:
    return {nic["device"]: nic for nic in state(lan, host)["network"]["vnic"]}


def methods(lan: Simulator, since: int) -> List[str]:
    return [call["method"] for call in lan.control.call("calls", since=since)]


def standard(host: str, **options: Any) -> Options:
    base = {"vswitch": "vSwitch1", "uplinks": ["vmnic1"], "portgroup": "Backup", "vlan_id": 120, "mtu": 9000}
    return {"esxi_hostname": host, "ip_address": "10.20.30.11/24", **base, **options}


_count = iter(range(1, 250))


def address() -> str:
    """An address that no other test has: addresses are unique in a vCenter."""
    return f"10.20.{next(_count)}.11/24"


# --- the story ------------------------------------------------------------------------------------------------------


def test_the_life_of_a_backup_nic(lan: Simulator, ansible: Ansible, host: str) -> None:
    options = dict(lan.connection, **standard(host))
    action = f"openvadp.backup.{NIC}"
    again = {"name": "again", action: options}
    absent = dict(lan.connection, esxi_hostname=host, portgroup="Backup", state="absent")
    tasks = [
        {"name": "look", action: options, "check_mode": True},
        {"name": "make", action: options},
        again,
        {"name": "info", f"openvadp.backup.{INFO}": dict(lan.connection, esxi_hostname=host)},
        {"name": "netmask", action: {**options, "ip_address": "10.20.30.11", "netmask": "255.255.255.0"}},
        {"name": "remove", action: absent},
        {"name": "remove again", action: absent},
    ]
    since = lan.last_call()
    outcome = ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}], arguments=["--diff"]).ok()
    results = {task["name"]: outcome.result("", task=task["name"]) for task in tasks}
    changed = {name: result["changed"] for name, result in results.items()}
    assert changed == {
        "look": True,
        "make": True,
        "again": False,
        "info": False,
        "netmask": False,
        "remove": True,
        "remove again": False,
    }
    assert lan.changing_calls(since) == [
        "AddVirtualSwitch",
        "AddPortGroup",
        "AddVirtualNic",
        "SelectVnicForNicType",
        "RemoveVirtualNic",
    ]
    made = results["make"]["vmkernel_nic"]
    assert (made["device"], made["ip"], made["netmask"]) == ("vmk1", "10.20.30.11", "255.255.255.0")
    assert (made["mtu"], made["portgroup"], made["services"]) == (9000, "Backup", [BACKUP])
    assert results["look"]["vmkernel_nic"] == {**made, "device": None}
    diff = results["make"]["diff"]
    assert "VMkernel NIC: none" in diff["before"]
    for line in ("device: vmk1", "ip_address: 10.20.30.11", "portgroup: Backup (VLAN 120)", "services: backup"):
        assert f"  {line}\n" in diff["after"]
    assert results["again"]["diff"]["before"] == results["again"]["diff"]["after"]
    told = results["info"]["hosts"][0]
    assert told["tagged"] == ["vmk1"] and [nic["device"] for nic in told["nics"]] == ["vmk0", "vmk1"]
    assert results["info"]["untagged_hosts"] == []


def test_the_field_report_is_refused_and_can_be_allowed(lan: Simulator, ansible: Ansible, host: str) -> None:
    there = add_nic(lan, host, "Storage", "10.21.0.5")
    options = dict(
        lan.connection, esxi_hostname=host, vswitch="vSwitch0", portgroup="Backup2", ip_address="10.21.0.6/24"
    )
    before = state(lan, host)
    refused = ansible.module(NIC, options)
    assert refused["failed"] and state(lan, host) == before
    for word in ("10.21.0.6/24", f"{there} (10.21.0.5/24", "a subnet, and best a VLAN, of its own", "2338"):
        assert word in refused["msg"]
    allowed = ansible.module(NIC, {**options, "allow_shared_subnet": True})
    assert not allowed["failed"] and allowed["vmkernel_nic"]["device"] == "vmk2"
    told = ansible.module(INFO, dict(lan.connection, esxi_hostname=host))
    assert told["hosts"][0]["shared_subnets"] == [["vmk1", "vmk2"]]


def test_tagging_touches_nothing_else(lan: Simulator, run: Any, host: str) -> None:
    with administrator(lan, host) as (_network, manager):
        manager.SelectVnicForNicType("vmotion", "vmk0")
    before, since = state(lan, host), lan.last_call()
    result = run(esxi_hostname=host, device="vmk0")
    assert result["changed"] and result["vmkernel_nic"]["services"] == ["vmotion", "management", BACKUP]
    assert lan.changing_calls(since) == ["SelectVnicForNicType"]
    after = state(lan, host)
    assert after["services"].pop(BACKUP) == ["vmk0"] and after == before
    since = lan.last_call()
    assert not run(esxi_hostname=host, device="vmk0")["changed"] and lan.changing_calls(since) == []


def test_a_nic_is_adopted_by_its_address(lan: Simulator, run: Any, host: str) -> None:
    where = address()
    device = add_nic(lan, host, "Backup", where.split("/")[0])
    since = lan.last_call()
    result = run(esxi_hostname=host, vswitch="vSwitch0", portgroup="Backup", ip_address=where)
    assert result["changed"] and result["vmkernel_nic"]["device"] == device
    assert lan.changing_calls(since) == ["SelectVnicForNicType"] and len(nics(lan, host)) == 2


def test_a_backup_nic_gets_other_settings(lan: Simulator, run: Any, host: str) -> None:
    options = standard(host, ip_address=address(), ipv6_addresses=["fd00:20::11/64"])
    assert run(**options)["changed"]
    gateway = options["ip_address"].replace(".11/24", ".1")
    changes = [
        {"mtu": 1500, "ipv6_addresses": ["fd00:20::12/64", "fd00:21::12/64"], "gateway": gateway},
        {"ip_address": options["ip_address"].replace(".11/", ".12/")},
        {"gateway": ""},
        {"ip_address": None, "dhcp": True},
        {"ip_address": address(), "dhcp": False, "ipv6_addresses": []},
    ]
    for change in changes:
        since = lan.last_call()
        options.update(change)
        assert run(check=True, **options)["changed"] and lan.changing_calls(since) == []
        result = run(**options)
        assert not result["failed"] and lan.changing_calls(since) == ["UpdateVirtualNic"], result
        assert not run(**options)["changed"]
        told = result["vmkernel_nic"]
        assert told["device"] == "vmk1" and told["services"] == [BACKUP]
        assert run(INFO, esxi_hostname=host)["hosts"][0]["nics"][1] == {
            key: value
            for key, value in told.items()
            if key not in ("host", "changed", "failed", "msg", "address_check")
        }


def test_a_distributed_switch(lan: Simulator, ansible: Ansible) -> None:
    names = new_hosts(lan, 3)
    hosts = [{"esxi_hostname": name, "ip_address": f"10.22.0.{index}/24"} for index, name in enumerate(names, 1)]
    options = dict(lan.connection, dvswitch="DSwitch0", portgroup="dv-backup", vlan_id=77, hosts=hosts)
    since = lan.last_call()
    result = ansible.module(NIC, options)
    assert [(one["host"], one["device"], one["changed"]) for one in result["hosts"]] == [
        (name, "vmk1", True) for name in names
    ]
    assert {one["portgroup"] for one in result["hosts"]} == {"dv-backup"}
    calls = lan.changing_calls(since)
    assert sorted(calls) == ["AddVirtualNic"] * 3 + ["CreateDVPortgroup_Task"] + ["SelectVnicForNicType"] * 3
    again = ansible.module(NIC, options)
    assert not again["changed"] and {one["vlan_id"] for one in again["hosts"]} == {77}


def test_two_datacenters_with_switches_and_subnets_alike(lan: Simulator, run: Any, host: str) -> None:
    """The host's membership tells which switch; the networks may be isolated, with the same addresses."""
    other = "127.0.1.3"
    for datacenter, member in (("DC0", host), ("DC1", other)):
        lan.control.call("add_dvswitch", name="Twin", datacenter=datacenter, hosts=[member])
    where = address()
    hosts = [{"esxi_hostname": host, "ip_address": where}, {"esxi_hostname": other, "ip_address": where}]
    options = {"dvswitch": "Twin", "portgroup": "twin-backup", "vlan_id": 9, "hosts": hosts}
    since = lan.last_call()
    refused = run(**options)
    assert refused["failed"] and "Two hosts are to have one address" in refused["msg"]
    options["address_scope"] = "datacenter"
    assert run(check=True, **options)["changed"] and lan.changing_calls(since) == []
    made = run(**options)
    assert not made["failed"] and [one["switch"] for one in made["hosts"]] == ["Twin", "Twin"], made
    assert lan.changing_calls(since).count("CreateDVPortgroup_Task") == 2
    assert not run(**options)["changed"]
    refused = run(esxi_hostname=host, dvswitch="Twin", portgroup="twin-backup", ip_address=where)
    assert refused["failed"] and f"of host '{other}' has it" in refused["msg"]
    told = run(INFO, esxi_hostnames=[host, other])
    assert [one["datacenter"] for one in told["hosts"]] == ["DC1", "DC0"]

    assert "Give the datacenter" in run(NIOC, dvswitch="Twin", shares="low")["msg"]
    for datacenter in ("DC0", "/DC1"):
        assert run(NIOC, dvswitch="Twin", shares="low", datacenter=datacenter)["changed"]
        assert not run(NIOC, dvswitch="Twin", shares="low", datacenter=datacenter)["changed"]
    # Names are unique in a folder, whatever has them there.
    for name, holder in (("VM Network", "the network"), ("dv-vmotion", "the port group of a distributed switch")):
        for check in (True, False):
            refused = run(check=check, esxi_hostname=host, dvswitch="Twin", portgroup=name, ip_address="10.9.8.7/24")
            assert refused["failed"] and f"{holder} '{name}'" in refused["msg"], refused


@pytest.mark.parametrize("place", ["standard", "distributed"])
def test_two_runs_that_make_the_same_converge(lan: Simulator, run: Any, host: str, place: str) -> None:
    """Both have looked before either has changed anything."""
    options = standard(host, ip_address=address())
    if place == "distributed":
        options = {**options, "vswitch": None, "uplinks": None, "dvswitch": "DSwitch0", "portgroup": "dv-converge"}
    first = "CreateDVPortgroup_Task" if place == "distributed" else "AddVirtualSwitch"
    for name in (first, "AddPortGroup", "AddVirtualNic"):
        lan.control.call("inject", target="call", name=name, delay=1.0, count=2)
    results = run.twice(**options)
    assert [one["failed"] for one in results] == [False, False], results
    assert {one["vmkernel_nic"]["device"] for one in results} == {"vmk1"}
    assert nics(lan, host).keys() == {"vmk0", "vmk1"} and not run(**options)["changed"]
    lan.control.call("inject", target="call", name="RemoveVirtualNic", delay=1.0, count=2)
    gone = {"esxi_hostname": host, "portgroup": options["portgroup"], "state": "absent"}
    results = run.twice(**gone)
    assert [one["failed"] for one in results] == [False, False], results
    assert list(nics(lan, host)) == ["vmk0"]


# --- DHCP -----------------------------------------------------------------------------------------------------------


def test_dhcp_is_waited_for(lan: Simulator, run: Any, host: str) -> None:
    options = {"esxi_hostname": host, "vswitch": "vSwitch0", "portgroup": "Backup", "dhcp": True}
    result = run(**options)
    assert result["vmkernel_nic"]["ip"].startswith("10.66.0.") and result["vmkernel_nic"]["dhcp"]
    assert not run(**options)["changed"] and len(nics(lan, host)) == 2


def test_a_lease_in_another_nics_subnet_is_rolled_back(lan: Simulator, run: Any, host: str) -> None:
    add_nic(lan, host, "Storage", "10.67.0.5")
    lan.control.call("set_settings", dhcp_subnet="10.67.0.0/24")
    before = state(lan, host)
    options = standard(host, ip_address=None, dhcp=True)
    result = run(**options)
    assert result["failed"] and "vmk1 (10.67.0.5/24" in result["msg"] and "vmk2 (10.67.0." in result["msg"]
    assert state(lan, host) == before
    assert run(**options, allow_shared_subnet=True)["changed"]


def test_a_lease_that_never_comes_is_rolled_back(lan: Simulator, run: Any, host: str) -> None:
    lan.control.call("set_settings", dhcp_delay=None)
    before = state(lan, host)
    result = run(**standard(host, ip_address=None, dhcp=True, timeout=1))
    assert result["failed"] and "no DHCP server answered within 1 s" in result["msg"]
    assert state(lan, host) == before


# --- refused before the first change --------------------------------------------------------------------------------


def test_bad_input_changes_nothing(lan: Simulator, ansible: Ansible, host: str) -> None:
    good = standard(host, ip_address="10.23.0.11/24")
    cases: Dict[str, Tuple[Options, str]] = {
        "malformed": ({"ip_address": "10.23.0.300/24"}, "can't be used"),
        "no mask": ({"ip_address": "10.23.0.11"}, "netmask is missing"),
        "mixed mask": ({"ip_address": "10.23.0.11", "netmask": "255.0.255.0"}, "mixed"),
        "network": ({"ip_address": "10.23.0.0/24"}, "address of the subnet"),
        "broadcast": ({"ip_address": "10.23.0.255/24"}, "broadcast address"),
        "other host": ({"ip_address": "127.0.1.2/24"}, "vmk0 of host '127.0.1.2'"),
        "overlap": ({"ip_address": "127.0.99.1/16"}, "Two VMkernel NICs in one subnet"),
        "VLAN": ({"vlan_id": 4095}, "0 to 4094"),
        "MTU below": ({"mtu": 1279}, "1280 to 9190"),
        "MTU above": ({"mtu": 9191}, "1280 to 9190"),
        "unknown switch": ({"uplinks": None}, "There is no such switch"),
        "unknown dvswitch": ({"vswitch": None, "uplinks": None, "dvswitch": "DSwitch9"}, "no such distributed switch"),
        "uplink of a switch": ({"uplinks": ["vmnic0"]}, "in use elsewhere"),
        "uplink of a dvswitch": ({"uplinks": ["vmnic2"]}, "switch 'DSwitch0' has it"),
        "no such uplink": ({"uplinks": ["vmnic9"]}, "no such uplink"),
        "DHCP and address": ({"dhcp": True}, "given twice"),
        "stack": ({"tcpip_stack": "vmotion"}, "only a NIC of the default stack"),
        "unknown host": ({"esxi_hostname": "esx99"}, "There is no such host"),
        "device": ({"device": "vmk9"}, "no such VMkernel NIC"),
        "nothing": ({"ip_address": None}, "The NIC is not named"),
    }
    tasks = []
    for name, (change, _word) in cases.items():
        options = {key: value for key, value in {**lan.connection, **good, **change}.items() if value is not None}
        tasks.append({"name": f"case {name}", f"openvadp.backup.{NIC}": options, "ignore_errors": True})
    before, since = state(lan, host), lan.last_call()
    outcome = ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}])
    for name, (_change, word) in cases.items():
        result = outcome.result(NIC, task=f"case {name}")
        assert word in result["msg"], (name, result["msg"])
        assert "Traceback" not in str(result), name
        assert result["error"]["remedy"] or name in ("nothing",), name
    assert lan.changing_calls(since) == [] and state(lan, host) == before


def test_one_bad_host_leaves_all_as_they_are(lan: Simulator, run: Any) -> None:
    names = new_hosts(lan, 3)
    hosts = [{"esxi_hostname": name, "ip_address": f"10.24.0.{index}/24"} for index, name in enumerate(names, 1)]
    hosts[1]["uplinks"] = ["vmnic0"]  # type: ignore[assignment]
    since = lan.last_call()
    result = run(vswitch="vSwitch1", uplinks=["vmnic1"], portgroup="Backup", hosts=hosts)
    assert result["failed"] and names[1] in result["msg"] and "in use elsewhere" in result["msg"]
    assert result["error"]["details"]["hosts"][0]["host"] == names[1] and lan.changing_calls(since) == []


def test_an_old_host_and_one_that_is_away_do_not_stop_the_others(lan: Simulator, run: Any) -> None:
    names = new_hosts(lan, 3)
    lan.control.call("set_host", name=names[0], version="6.7.0")
    lan.control.call("set_host", name=names[1], connected=False)
    hosts = [{"esxi_hostname": name, "ip_address": f"10.25.0.{index}/24"} for index, name in enumerate(names, 1)]
    result = run(vswitch="vSwitch0", portgroup="LAN", hosts=hosts)
    assert result["failed"] and result["changed"] and "2 of 3 hosts failed" in result["msg"]
    assert [one["failed"] for one in result["hosts"]] == [True, True, False]
    assert "ESXi 6.7.0" in result["hosts"][0]["msg"] and "7.0" in result["hosts"][0]["msg"]
    assert "not connected" in result["hosts"][1]["msg"]
    assert result["hosts"][2]["device"] == "vmk1"
    told = run(INFO, esxi_hostnames=names)
    # What is not known is not "nothing".
    assert [nic["services"] for one in told["hosts"] for nic in one["nics"]] == [
        ["management"],
        None,
        ["management"],
        [BACKUP],
    ]
    assert [one["backup_service"] for one in told["hosts"]] == [False, False, True]
    assert told["untagged_hosts"] == names[:2]


def test_what_is_never_removed(lan: Simulator, run: Any, host: str) -> None:
    shared = add_nic(lan, host, "Shared", address().split("/")[0], "vmotion", BACKUP)
    plain = add_nic(lan, host, "NFS", address().split("/")[0])
    assert run(esxi_hostname=host, device="vmk0")["changed"]
    before, since = state(lan, host), lan.last_call()
    for device, force, word in (
        ("vmk0", False, "last management NIC"),
        ("vmk0", True, "last management NIC"),
        (shared, False, "carries vMotion"),
        (plain, False, "not tagged for backup"),
    ):
        result = run(esxi_hostname=host, device=device, state="absent", force=force)
        assert result["failed"] and word in result["msg"], result
    assert lan.changing_calls(since) == [] and state(lan, host) == before
    assert run(esxi_hostname=host, device=shared, state="absent", force=True)["changed"]
    assert list(nics(lan, host)) == ["vmk0", plain]


def test_a_nic_that_is_not_ours_is_neither_absent_nor_taken(lan: Simulator, run: Any, host: str) -> None:
    """By port group as by device; and never one of which only a part of the description holds."""
    where = address()
    plain = add_nic(lan, host, "Backup", where.split("/")[0])
    ours = add_nic(lan, host, "Ours", address().split("/")[0], BACKUP)
    since = lan.last_call()
    refused = run(esxi_hostname=host, portgroup="Backup", state="absent")
    assert refused["failed"] and "not tagged for backup" in refused["msg"]
    for wrong in ({"device": ours, "portgroup": "Backup"}, {"device": plain, "ip_address": "10.9.9.9"}):
        refused = run(esxi_hostname=host, state="absent", force=True, **wrong)
        assert refused["failed"] and "another one than described" in refused["msg"]
    assert not run(esxi_hostname=host, portgroup="Ours", dvswitch="DSwitch0", state="absent", force=True)["changed"]
    assert lan.changing_calls(since) == []
    assert run(esxi_hostname=host, portgroup="Backup", ip_address=where, state="absent", force=True)["changed"]
    assert list(nics(lan, host)) == ["vmk0", ours]


def test_a_nic_that_carries_storage_is_not_changed(lan: Simulator, run: Any, host: str) -> None:
    user = lan.connection["username"]
    where = address()
    add_nic(lan, host, "Storage", where.split("/")[0])
    options = {"esxi_hostname": host, "ip_address": where}
    network = where.rsplit(".", 1)[0]
    cases: List[Tuple[Options, str]] = [
        ({"iscsi_nics": ["vmk1"]}, "the privilege Host.Config.Storage"),
        ({"iscsi_nics": ["vmk1"]}, "bound to the iSCSI adapter vmhba64"),
        ({"iscsi_nics": [], "iscsi_targets": [f"{network}.200"]}, f"vmhba64 reaches its server {network}.200"),
        ({"iscsi_targets": [], "datastores": ["nfs01"]}, f"'nfs01' reaches its server {network}.201 in its subnet"),
    ]
    lan.control.call("set_nfs_server", datastore="nfs01", server=f"{network}.201")
    since = lan.last_call()
    try:
        for number, (storage, word) in enumerate(cases):
            lan.control.call("set_host", name=host, **storage)
            for change in ({"mtu": 9000}, {"gateway": f"{network}.1"}, {"state": "absent"}):
                refused = run(**options, **change, check=number == 1)
                assert refused["failed"] and word in refused["msg"], (word, refused["msg"])
            lan.control.call("set_privileges", username=user, add=["Host.Config.Storage"])
    finally:
        lan.control.call("set_privileges", username=user, remove=["Host.Config.Storage"])
    assert lan.changing_calls(since) == []
    changed = run(**options, mtu=9000, force=True)
    assert changed["changed"] and nics(lan, host)["vmk1"]["spec"]["mtu"] == 9000
    assert "as force says" in str(changed["warnings"])


# --- faults ---------------------------------------------------------------------------------------------------------


def _scenarios(lan: Simulator) -> Dict[str, Tuple[Options, Any]]:
    """name -> (options, what an administrator prepares)"""

    def tagged(host: str) -> None:
        add_nic(lan, host, "Backup", "10.30.0.5", BACKUP)

    dv = {"dvswitch": "DSwitch0", "vlan_id": 5, "dhcp": True}
    update = {"vswitch": "vSwitch0", "portgroup": "Backup", "mtu": 1400, "ipv6_addresses": ["fd00:30::5/64"]}
    return {
        "standard": (standard("", ip_address="10.31.0.11/24"), None),
        "distributed": (dict(dv, portgroup="dv-faults"), None),
        "tag": ({"device": "vmk0"}, None),
        "update": (dict(update, ip_address="10.30.0.6/24", gateway="10.30.0.1"), tagged),
        "absent": ({"portgroup": "Backup", "state": "absent"}, tagged),
    }


@pytest.mark.parametrize("scenario", ["standard", "distributed", "tag", "update", "absent"])
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_a_fault_in_each_call_leaves_the_host_as_it_was_or_complete(
    lan: Simulator, run: Any, scenario: str, every: int
) -> None:
    """A fault in each call, or in every fourth."""
    options, prepare = _scenarios(lan)[scenario]
    seen: Dict[str, int] = {}
    cases: List[Tuple[str, int, str]] = []
    number = iter(range(100))

    def begin() -> Tuple[str, Options, Dict[str, Any]]:
        host = new_hosts(lan, 1)[0]
        if prepare is not None:
            prepare(host)
        own = copy.deepcopy(dict(options, esxi_hostname=host))
        if scenario == "distributed":
            own["portgroup"] = f"dv-faults-{next(number)}"  # each case makes it anew
        return host, own, state(lan, host)

    def end(host: str) -> None:
        """Addresses are unique in a vCenter, so the NICs of a case go before the next."""
        with administrator(lan, host) as (network, _manager):
            for device in list(nics(lan, host))[1:]:
                network.RemoveVirtualNic(device)

    host, own, _before = begin()
    since = lan.last_call()
    result = run(**own)
    assert result["changed"] and not result["failed"], result
    for call in lan.control.call("calls", since=since):
        method = call["method"]
        if method in ("RetrieveServiceContent", "Login", "Logout"):
            continue  # before and after everything, and the same in all modules
        after = seen.get(method, 0)
        seen[method] = after + 1
        cases.append((method, after, "HostConfigFault"))
        if call["changing"]:
            cases += [(method, after, "drop"), (method, after, "lost")]
    assert any(fault == "lost" for _method, _after, fault in cases)
    end(host)

    outcomes = set()
    for method, after, fault in cases[::every]:
        host, own, before = begin()
        lan.control.call("inject", target="call", name=method, fault=fault, after=after)
        result = run(**own)
        lan.control.call("clear_injections")
        now = state(lan, host)
        case = f"{fault} in {method} number {after}: {result.get('msg')}"
        assert "Traceback" not in str(result), case
        outcomes.add(result["failed"])
        if result["failed"]:
            assert result["error"]["kind"] != "InputError", case
            assert now == before, case
        else:
            again = run(check=True, **own)
            assert not again["failed"] and not again["changed"], case
        end(host)
    assert outcomes == {True, False} or every > 1


@pytest.mark.parametrize("fault", ["HostConfigFault", "drop", "lost"])
@pytest.mark.parametrize("method", ["RemoveVirtualNic", "RemovePortGroup", "RemoveVirtualSwitch"])
def test_a_fault_on_the_way_back_is_overcome(lan: Simulator, run: Any, host: str, method: str, fault: str) -> None:
    lan.control.call("inject", target="call", name="SelectVnicForNicType", fault="HostConfigFault")
    lan.control.call("inject", target="call", name=method, fault=fault)
    before = state(lan, host)
    result = run(**standard(host, ip_address=address()))
    assert result["failed"] and "had been done before was undone" in result["msg"]
    assert state(lan, host) == before


@pytest.mark.parametrize("fault", ["HostConfigFault", "drop", "lost"])
def test_a_distributed_port_group_that_nobody_uses_goes(lan: Simulator, run: Any, host: str, fault: str) -> None:
    lan.control.call("inject", target="call", name="AddVirtualNic", fault="HostConfigFault")
    lan.control.call("inject", target="call", name="Destroy_Task", fault=fault)
    before = state(lan, host)
    result = run(esxi_hostname=host, dvswitch="DSwitch0", portgroup="dv-unused", ip_address=address())
    assert result["failed"] and "could not be removed" not in result["msg"]
    assert state(lan, host) == before


def test_one_port_group_has_one_vlan(lan: Simulator, run: Any) -> None:
    first, second = new_hosts(lan, 2)
    hosts = [
        {"esxi_hostname": first, "ip_address": address(), "vlan_id": 3},
        {"esxi_hostname": second, "ip_address": address(), "vlan_id": 4},
    ]
    since = lan.last_call()
    result = run(dvswitch="DSwitch0", portgroup="dv-two", hosts=hosts)
    assert result["failed"] and "two VLANs" in result["msg"] and lan.changing_calls(since) == []


def test_what_could_not_be_removed_is_told(lan: Simulator, run: Any, host: str) -> None:
    lan.control.call("inject", target="call", name="SelectVnicForNicType", fault="HostConfigFault")
    lan.control.call("inject", target="call", name="RemoveVirtualNic", fault="HostConfigFault", count=0)
    result = run(**standard(host, ip_address=address()))
    assert result["failed"] and "could not be removed again" in result["msg"] and "vmk1" in result["msg"]
    lan.control.call("clear_injections")
    # the next run finds the NIC by its address and goes on
    assert list(nics(lan, host)) == ["vmk0", "vmk1"]


def test_a_port_group_of_somebody_else_is_not_removed(lan: Simulator, run: Any, host: str) -> None:
    """It came between the look and the change."""
    lan.control.call("inject", target="call", name="AddPortGroup", fault="AlreadyExists")
    before = state(lan, host)
    since = lan.last_call()
    result = run(**standard(host, ip_address=address()))
    assert result["failed"] and "RemovePortGroup" not in methods(lan, since)
    assert state(lan, host) == before


def test_a_missing_privilege_is_named(lan: Simulator, run: Any, host: str) -> None:
    user = lan.connection["username"]
    before = state(lan, host)
    lan.control.call("set_privileges", username=user, remove=["Host.Config.Network"])
    try:
        result = run(**standard(host, ip_address=address()))
    finally:
        lan.control.call("set_privileges", username=user, add=["Host.Config.Network"])
    assert result["failed"] and "Host.Config.Network" in result["msg"] and state(lan, host) == before


# --- many hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [30, pytest.param(200, marks=pytest.mark.soak)])
def test_many_hosts(own_simulator: Simulator, ansible: Ansible, many: int) -> None:
    """One run, with as many calls for each host whatever their number."""
    counts = {}
    for first, count in ((0, 20), (20, many)):
        names = own_simulator.control.call("add_hosts", count=count)
        hosts = [
            {"esxi_hostname": name, "ip_address": f"10.40.{number // 250}.{number % 250 + 1}/16"}
            for number, name in enumerate(names, first)
        ]
        options = dict(own_simulator.connection, vswitch="vSwitch0", portgroup="Backup", hosts=hosts)
        since, start = own_simulator.last_call(), time.monotonic()
        result = ansible.module(NIC, options)
        seconds = time.monotonic() - start
        assert not result["failed"] and all(one["changed"] for one in result["hosts"]), result.get("msg")
        assert [one["host"] for one in result["hosts"]] == names
        counts[count] = len(own_simulator.control.call("calls", since=since))
    # A quiet machine with 2 cores takes less than 10 s for 200; a busy one must not fail.
    assert seconds < 60 * 4
    assert (counts[many] - counts[20]) / (many - 20) == pytest.approx(4, abs=0.1)


def test_a_host_that_fails_is_one_of_many(lan: Simulator, run: Any) -> None:
    names = new_hosts(lan, 4)
    before = state(lan, names[2])
    moid = run(INFO, esxi_hostname=names[2])["hosts"][0]["moid"]
    lan.control.call(
        "inject",
        target="call",
        name="SelectVnicForNicType",
        fault="HostConfigFault",
        object=moid.replace("host-", "virtualNicManager-"),
    )
    hosts = [{"esxi_hostname": name, "ip_address": f"10.26.0.{index}/24"} for index, name in enumerate(names, 1)]
    result = run(vswitch="vSwitch0", portgroup="LAN", hosts=hosts)
    assert result["failed"] and [one["failed"] for one in result["hosts"]] == [False, False, True, False]
    assert "1 of 4 hosts failed" in result["msg"] and names[2] in result["msg"]
    assert state(lan, names[2]) == before
    again = run(vswitch="vSwitch0", portgroup="LAN", hosts=hosts)
    assert not again["failed"] and [one["changed"] for one in again["hosts"]] == [False, False, True, False]


# --- reading back ---------------------------------------------------------------------------------------------------


def test_which_hosts_of_a_datastore_lack_a_tag(own_simulator: Simulator, ansible: Ansible) -> None:
    connection = own_simulator.connection
    info, tag = f"openvadp.backup.{INFO}", f"openvadp.backup.{NIC}"
    tasks = [
        {"name": "before", info: dict(connection, datastore="vmfs01")},
        {"name": "tag", tag: dict(connection, esxi_hostname="127.0.1.2", device="vmk0")},
        {"name": "after", info: dict(connection, datastore="vmfs01", datacenter="DC0")},
        {"name": "all", info: connection},
        {"name": "unknown", info: dict(connection, datastore="vmfs99"), "ignore_errors": True},
    ]
    outcome = ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]).ok()
    assert outcome.result(INFO, task="before")["untagged_hosts"] == ["127.0.1.1", "127.0.1.2"]
    assert outcome.result(INFO, task="after")["untagged_hosts"] == ["127.0.1.1"]
    assert [one["name"] for one in outcome.result(INFO, task="all")["hosts"]] == ["127.0.1.1", "127.0.1.2", "127.0.1.3"]
    assert "There is no such datastore" in outcome.result(INFO, task="unknown")["msg"]


def test_nics_that_may_share_a_subnet_are_not_told(lan: Simulator, run: Any, host: str) -> None:
    for portgroup, where, services, stack in (
        ("vmotion1", "10.50.1.1", ["vmotion"], ""),
        ("vmotion2", "10.50.1.2", ["vmotion"], ""),
        ("iscsi1", "10.50.2.1", [], ""),
        ("iscsi2", "10.50.2.2", [], ""),
        ("tep1", "10.50.3.1", [], "vxlan"),
        ("tep2", "10.50.3.2", [], "vxlan"),
        ("nfs1", "10.50.4.1", [], ""),
        ("nfs2", "10.50.4.2", [], ""),
    ):
        add_nic(lan, host, portgroup, where, *services, stack=stack)
    lan.control.call("set_host", name=host, iscsi_nics=["vmk3", "vmk4"])
    unknown = run(INFO, esxi_hostname=host)
    assert unknown["hosts"][0]["shared_subnets"] == [["vmk3", "vmk4"], ["vmk7", "vmk8"]]
    assert "Host.Config.Storage" in str(unknown["warnings"])
    user = lan.connection["username"]
    lan.control.call("set_privileges", username=user, add=["Host.Config.Storage"])
    try:
        assert run(INFO, esxi_hostname=host)["hosts"][0]["shared_subnets"] == [["vmk7", "vmk8"]]
    finally:
        lan.control.call("set_privileges", username=user, remove=["Host.Config.Storage"])
    # ours is refused beside each of them, and is made where none is
    for where in ("10.50.1.9/24", "10.50.2.9/24", "10.50.4.9/24"):
        result = run(esxi_hostname=host, vswitch="vSwitch0", portgroup="Backup", ip_address=where)
        assert result["failed"] and "Two VMkernel NICs in one subnet" in result["msg"]
    assert run(esxi_hostname=host, vswitch="vSwitch0", portgroup="Backup", ip_address=address())["changed"]


# --- Network I/O Control --------------------------------------------------------------------------------------------


def test_the_pool_of_backup_traffic(own_simulator: Simulator, ansible: Ansible) -> None:
    action = f"openvadp.backup.{NIOC}"
    options = dict(own_simulator.connection, dvswitch="DSwitch0", shares="low", limit=4000, reservation=100)
    bad = dict(options, reservation=5000)
    tasks = [
        {"name": "look", action: options, "check_mode": True},
        {"name": "set", action: options},
        {"name": "again", action: options},
        {"name": "shares alone", action: dict(own_simulator.connection, dvswitch="DSwitch0", shares="33")},
        {"name": "too much", action: bad, "ignore_errors": True},
        {"name": "shares of nothing", action: dict(options, shares="much"), "ignore_errors": True},
        {"name": "no such switch", action: dict(options, dvswitch="vSwitch0"), "ignore_errors": True},
    ]
    since = own_simulator.last_call()
    outcome = ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}], arguments=["--diff"]).ok()
    results = {task["name"]: outcome.result(NIOC, task=task["name"]) for task in tasks}
    assert [results[name]["changed"] for name in ("look", "set", "again", "shares alone")] == [True, True, False, True]
    assert own_simulator.changing_calls(since) == ["ReconfigureDvs_Task"] * 2
    pool = {"key": "backupNfc", "level": "low", "shares": 25, "limit": 4000, "reservation": 100}
    assert results["set"]["pool"] == results["look"]["pool"] == pool
    assert results["shares alone"]["pool"] == {**pool, "level": "custom", "shares": 33}
    assert "limit: none" in results["set"]["diff"]["before"] and "4000 Mbit/s" in results["set"]["diff"]["after"]
    for name, word in (
        ("too much", "larger than the limit"),
        ("shares of nothing", "1 to 100"),
        ("no such switch", "there are DSwitch0"),
    ):
        assert word in results[name]["msg"]


def test_a_switch_that_somebody_else_changes_meanwhile(own_simulator: Simulator, tmp_path: Path) -> None:
    modules = Modules(own_simulator, tmp_path)
    own_simulator.control.call("inject", target="call", name="ReconfigureDvs_Task", fault="ConcurrentAccess")
    result = modules.done(NIOC, **own_simulator.connection, dvswitch="DSwitch0", limit=1000)
    assert result["changed"] and result["pool"]["limit"] == 1000


@pytest.mark.parametrize(
    "values, word",
    [
        ({"nioc_version": "version2"}, "version3"),
        ({"pools": ["management", "vmotion"], "version": "7.0.0"}, "7.0.1"),
    ],
)
def test_a_switch_without_the_pool(own_simulator: Simulator, tmp_path: Path, values: Options, word: str) -> None:
    own_simulator.control.call("set_dvswitch", name="DSwitch0", **values)
    result = Modules(own_simulator, tmp_path).run(NIOC, **own_simulator.connection, dvswitch="DSwitch0", limit=1000)
    assert result["failed"] and word in result["msg"]


def test_a_pool_without_effect_is_warned_of(own_simulator: Simulator, tmp_path: Path) -> None:
    own_simulator.control.call("set_dvswitch", name="DSwitch0", nioc=False)
    result = Modules(own_simulator, tmp_path).done(NIOC, **own_simulator.connection, dvswitch="DSwitch0", limit=1000)
    assert "switched off" in str(result["warnings"])
