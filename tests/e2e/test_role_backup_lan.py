# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Role backup_lan and playbook backup_lan.yml: described, made, proved, and nothing done twice.

The backup subnet lies in the loopback range, where the simulated hosts' NFC ports listen on all their VMkernel NICs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List

import pytest
from harness import ROOT, Ansible, Outcome, Simulator

HOSTS = ["127.0.1.1", "127.0.1.2", "127.0.1.3"]
SUBNET = "127.20.30.0/24"
BACKUP = "vSphereBackupNFC"


class Lan:
    """Playbook backup_lan.yml with localhost as the proxy."""

    def __init__(self, simulator: Simulator, ansible: Ansible, folder: Path) -> None:
        self.simulator = simulator
        self.ansible = ansible
        self.config = folder / "network"
        self.config.mkdir()

    def variables(self, **options: Any) -> Dict[str, Any]:
        described = {
            **self.simulator.connection,
            "nfc_port": self.simulator.facts["nfc_port"],
            "hosts": HOSTS,
            "subnet": SUBNET,
            "pool": ["127.20.30.11-127.20.30.60"],
            "vswitch": "vSwitch1",
            "uplinks": ["vmnic1"],
            "vlan_id": 120,
            "mtu": 9000,
            "interface": "ens224",
            "proxy_address": "127.20.30.5/24",
            "config_dir": str(self.config),
            "apply": False,
            "probe_retries": 0,
            **options,
        }
        named = {f"backup_lan_{name}": value for name, value in described.items() if value is not None}
        return {"backup_lan_proxies": "localhost", **named}

    def run(self, *arguments: str, environment: Any = None, **options: Any) -> Outcome:
        return self.ansible.run(
            "openvadp.backup.backup_lan",
            variables=self.variables(**options),
            arguments=arguments,
            environment=environment,
        )

    def backup_nics(self) -> Dict[str, List[str]]:
        """Host -> the addresses of its NICs that are tagged for backup."""
        told = self.simulator.control.call("networks")["hosts"]
        return {
            name: [
                nic["spec"]["ip"]["ipAddress"]
                for nic in host["network"]["vnic"]
                if nic["device"] in host["services"].get(BACKUP, [])
            ]
            for name, host in told.items()
        }


@pytest.fixture
def lan(own_simulator: Simulator, ansible: Ansible, tmp_path: Path) -> Lan:
    return Lan(own_simulator, ansible, tmp_path)


def test_a_backup_lan_is_made_proved_and_made_once(lan: Lan, own_simulator: Simulator) -> None:
    seen = own_simulator.last_call()
    outcome = lan.run("--check", "--diff").ok()
    assert own_simulator.changing_calls(seen) == [] and list(lan.config.iterdir()) == []
    assert "check mode, nothing was touched or proved" in outcome.stdout and "MTUBytes=9000" in outcome.stdout

    outcome = lan.run().ok()
    assert lan.backup_nics() == {host: [f"127.20.30.{11 + index}"] for index, host in enumerate(HOSTS)}
    table = [line.split() for line in outcome.stdout.splitlines() if line.startswith("127.0.1.")]
    assert table == [
        [host, "vmk1", f"127.20.30.{11 + index}", "9000", "Backup", "changed", "127.20.30.5", "9000"]
        for index, host in enumerate(HOSTS)
    ]
    written = (lan.config / "10-openvadp-backup-lan.network").read_text()
    assert "Name=ens224" in written and "Address=127.20.30.5/24" in written and "[Route]" not in written
    assert "backup_lan_apply is false" in outcome.stdout

    seen = own_simulator.last_call()
    outcome = lan.run().ok()
    assert outcome.changed == 0 and own_simulator.changing_calls(seen) == []
    assert outcome.stdout.count("unchanged") == 4
    # Check mode proves what is there.
    outcome = lan.run("--check").ok()
    assert outcome.result("backup_lan_probe")["proven"] is True

    # Another description of the same LAN: nobody moves, whoever comes first in it.
    lan.run(hosts=[], clusters=["Cluster1", "Cluster0"], pool=["127.20.30.1-127.20.30.60"]).ok()
    assert own_simulator.changing_calls(seen) == []


def test_vcenter_hands_out_the_backup_nic(lan: Lan, own_simulator: Simulator) -> None:
    """What a greeting can't tell: the address in VDDK's log of an open, before and after the NIC is tagged."""
    vddk = {"vddk_libdir": own_simulator.facts["vddk_libdir"], "nfc_port": own_simulator.facts["nfc_port"]}
    target = {"host": "127.0.1.2", "address": "127.20.30.12"}
    options = {**own_simulator.connection, **vddk, "name": "restore01", "targets": [target]}
    found = lan.ansible.module("backup_lan_vddk_probe", options)
    assert (found["proven"], found["address"], found["host"]) == (False, "127.0.1.2", "127.0.1.2")
    assert "vCenter hands out 127.0.1.2 for host 127.0.1.2, not its backup NIC's 127.20.30.12" in found["reason"]
    assert "tagged vSphereBackupNFC" in found["remedy"]

    outcome = lan.run(vddk_vms=["restore01"], vddk_libdir=vddk["vddk_libdir"]).ok()
    assert outcome.result("backup_lan_vddk_probe")["results"][0]["address"] == "127.20.30.12"
    assert "127.0.1.2: vCenter hands out 127.20.30.12, as an open through VDDK shows" in outcome.stdout

    seen = own_simulator.last_call()
    elsewhere = lan.ansible.module("backup_lan_vddk_probe", {**options, "targets": [dict(target, host="127.0.1.3")]})
    assert not elsewhere["proven"] and "which is none of the targets" in elsewhere["reason"]
    running = lan.ansible.module("backup_lan_vddk_probe", {**options, "name": "app01"})
    assert running["failed"] and "it is poweredOn" in running["msg"] and "Name one that is off" in running["msg"]
    assert own_simulator.changing_calls(seen) == []
    outcome = lan.run(vddk_vms=["restore01", "app01"], vddk_libdir=vddk["vddk_libdir"]).failed()
    assert "it is poweredOn" in outcome.result("fail", task="Fail with the reason")["msg"]


def test_what_is_not_reached_fails_the_run_and_says_why(lan: Lan, own_simulator: Simulator) -> None:
    own_simulator.control.call("cut_network", host="127.0.1.2")
    outcome = lan.run(probe_retries=1, probe_delay=1).failed()
    assert "Not proven: 127.0.1.2." in outcome.result("fail", task="Fail with the reason")["msg"]
    (row,) = [line for line in outcome.stdout.splitlines() if line.startswith("127.0.1.2 ")]
    assert "NO [1]" in row
    assert f"127.20.30.12 answers, but its port {own_simulator.facts['nfc_port']} is closed" in outcome.stdout
    # Tried again once, and that was the last word.
    assert outcome.result("backup_lan_probe")["attempts"] == 1

    own_simulator.control.call("restore_network", host="127.0.1.2")
    lan.run().ok()


def test_errors_that_are_ignored_make_no_backup_lan(lan: Lan, own_simulator: Simulator) -> None:
    """The state is not what remains when nobody has noted a failure."""
    own_simulator.control.call("inject", target="call", name="AddVirtualNic", fault="HostConfigFault", count=0)
    role = {"ansible.builtin.include_role": {"name": "openvadp.backup.backup_lan"}}
    tell = {"name": "told", "ansible.builtin.debug": {"var": "backup_lan_result"}}
    play = {"hosts": "localhost", "gather_facts": False, "ignore_errors": True, "tasks": [role, tell]}
    for options in ({}, {"uplink": "vmnic1"}):
        variables = lan.variables(probe=False, interface=None, proxy_address=None, **options)
        variables.pop("backup_lan_proxies")
        told = lan.ansible.run([play], variables=variables).result("debug", task="told")["backup_lan_result"]
        assert told["state"] == "failed" and told["reason"], told
    assert "backup_lan_uplink (backup_lan_uplinks?)" in told["reason"]


def test_a_source_that_is_not_there_is_told(lan: Lan) -> None:
    outcome = lan.run(proxy_address="10.20.30.5/24", proxy_gateway="10.20.30.1").failed()
    assert "10.20.30.5 is not an address of this machine" in outcome.stdout
    written = (lan.config / "10-openvadp-backup-lan.network").read_text()
    assert "Destination=127.20.30.0/24" in written and "Gateway=10.20.30.1" in written


@pytest.mark.soak
def test_several_proxies_each_prove_it_and_one_configures(lan: Lan, own_simulator: Simulator) -> None:
    python = {"ansible_connection": "local", "ansible_python_interpreter": str(ROOT / ".venv/bin/python")}
    proxies: Dict[str, Any] = {}
    for index, name in enumerate(("proxy01", "proxy02")):
        folder = lan.config / name
        folder.mkdir()
        own = {"proxy_address": f"127.20.30.{11 + index}/24", "config_dir": str(folder)}
        proxies[name] = {**python, **{f"backup_lan_{key}": value for key, value in own.items()}}
    variables = lan.variables(proxy_address=None, config_dir=None, hosts=HOSTS[:2])
    variables["backup_lan_proxies"] = "vms"

    def run() -> Outcome:
        return lan.ansible.run(
            "openvadp.backup.backup_lan", hosts=list(proxies), host_variables=proxies, variables=variables
        )

    seen = own_simulator.last_call()
    outcome = run().ok()
    # The addresses of both proxies are in the pool, and left to them.
    assert [lan.backup_nics()[host] for host in HOSTS[:2]] == [["127.20.30.13"], ["127.20.30.14"]]
    assert own_simulator.changing_calls(seen).count("AddVirtualNic") == 2
    sources = [line.split()[6] for line in outcome.stdout.splitlines() if line.startswith("127.0.1.")]
    assert sources == ["127.20.30.11"] * 2 + ["127.20.30.12"] * 2
    assert "127.20.30.12/24" in (lan.config / "proxy02" / "10-openvadp-backup-lan.network").read_text()

    variables["backup_lan_hosts"] = ["127.0.9.9"]
    outcome = run().failed()
    assert "proxy02: FAILED: The hosts were not configured by proxy01: " in outcome.stdout
    assert outcome.stdout.count("There is no such host") >= 2


@pytest.mark.soak
def test_the_interface_is_reloaded_by_its_manager_where_it_is_not_in_force(lan: Lan, tmp_path: Path) -> None:
    """The managers are not there: what they were told is kept. A reload that failed is made up for."""
    told = tmp_path / "told"
    broken = tmp_path / "broken"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("networkctl", "nmcli"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{told}\n[ ! -e {broken} ]\n')
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    broken.touch()
    outcome = lan.run(environment=path, apply=True).failed()
    assert "The interface was not configured" in outcome.result("fail", task="Fail with the reason")["msg"]
    broken.unlink()
    told.unlink()
    lan.run(environment=path, apply=True).ok()
    assert told.read_text().splitlines() == ["networkctl reload", "networkctl reconfigure ens224"]
    assert lan.run(environment=path, apply=True).ok().changed == 0
    assert len(told.read_text().splitlines()) == 2

    told.unlink()
    lan.run(environment=path, apply=True, network_manager="NetworkManager").ok()
    assert told.read_text().splitlines() == ["nmcli connection reload", "nmcli connection up openvadp-backup-lan"]
    written = lan.config / "openvadp-backup-lan.nmconnection"
    assert written.stat().st_mode & 0o777 == 0o600
    assert "address1=127.20.30.5/24" in written.read_text() and "never-default=true" in written.read_text()


def test_a_description_that_makes_no_sense_changes_nothing(lan: Lan, own_simulator: Simulator) -> None:
    seen = own_simulator.last_call()
    cases = [
        ({"hosts": []}, "hosts (backup_lan_hosts or backup_lan_clusters) and one switch"),
        ({"dvswitch": "DSwitch0"}, "one switch"),
        ({"nioc": {"limit": 100}}, "backup_lan_nioc belongs to a distributed switch"),
        ({"proxy_address": None}, "backup_lan_proxy_address is required"),
        ({"pool": ["127.20.30.5-127.20.30.6"]}, "2 missing, for '127.0.1.2', '127.0.1.3'"),
        ({"addresses": {"127.0.1.1": "127.20.30.5"}}, "it is a proxy's"),
        ({"clusters": ["Cluster9"]}, "there are Cluster0"),
        ({"mtu": 900}, "1280 to 9190"),
        ({"subnet": "127.20.30.9/24"}, "an address in 127.20.30.0/24, not a subnet"),
    ]
    # All of them in one play, for the time's sake; what is printed at each end is that case's reason.
    tasks: List[Dict[str, Any]] = [
        {
            "name": f"case {number}",
            "block": [
                {
                    "name": "try",
                    "ansible.builtin.include_role": {"name": "openvadp.backup.backup_lan"},
                    "vars": lan.variables(**options),  # type: ignore[arg-type]
                }
            ],
            "rescue": [{"name": f"told {number}", "ansible.builtin.debug": {"msg": "{{ ansible_failed_result.msg }}"}}],
        }
        for number, (options, _word) in enumerate(cases)
    ]
    outcome = lan.ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]).ok()
    for number, (_options, word) in enumerate(cases):
        assert word in outcome.result("debug", task=f"told {number}")["msg"], number
    assert own_simulator.changing_calls(seen) == [] and list(lan.config.iterdir()) == []


def test_the_field_report_is_refused_with_both_nics_named(lan: Lan, own_simulator: Simulator) -> None:
    """A backup NIC in the management NIC's subnet; it is made only when asked for."""
    seen = own_simulator.last_call()
    described = {"hosts": HOSTS[:2], "subnet": "127.0.1.0/24", "pool": ["127.0.1.11-127.0.1.20"]}
    described.update(proxy_address="127.0.1.5/24")
    outcome = lan.run(**described).failed()
    said = " ".join(outcome.stdout.split())
    assert "Two VMkernel NICs in one subnet" in said
    assert "vmk0" in said and "127.0.1.11" in said
    assert own_simulator.changing_calls(seen) == []

    lan.run(**described, allow_shared_subnet=True).ok()
    assert lan.backup_nics()["127.0.1.1"] == ["127.0.1.11"]


@pytest.mark.soak
def test_network_io_control_of_a_distributed_switch(lan: Lan, own_simulator: Simulator) -> None:
    options = {"vswitch": None, "uplinks": None, "dvswitch": "DSwitch0", "nioc": {"shares": "low", "limit": 4000}}
    options.update(hosts=HOSTS[:2], mtu=1500)
    outcome = lan.run(**options).ok()
    assert "DSwitch0: backup traffic has 25 shares (low), a limit of 4000 Mbit/s, 0 Mbit/s reserved" in outcome.stdout
    assert lan.run(**options).ok().changed == 0


def test_the_story_of_the_field_report(lan: Lan, own_simulator: Simulator, tmp_path: Path) -> None:
    """Its log alone makes the cause likely; with the host's NICs, as the info module reads them, it is certain."""
    described = {"hosts": HOSTS[:1], "subnet": "127.0.1.0/24", "pool": ["127.0.1.11-127.0.1.20"]}
    described.update(proxy_address="127.0.1.5/24", allow_shared_subnet=True)
    lan.run(**described).ok()
    log = tmp_path / "vddk.log"
    text = (ROOT / "tests/data/field-report-nfc.log").read_text(encoding="utf-8")
    log.write_text(text.replace("esx01.domain.local", HOSTS[0]), encoding="utf-8")
    names = {name: "{{ item.1." + name + " }}" for name in ("device", "ip", "netmask", "portgroup", "services")}
    nic = {"host": "{{ item.0.name }}", **names, "netstack": "{{ item.1.tcpip_stack }}"}
    tasks: List[Dict[str, Any]] = [
        {
            "name": "read",
            "openvadp.backup.vmkernel_backup_nic_info": dict(own_simulator.connection, esxi_hostname=HOSTS[0]),
            "register": "lan",
        },
        {
            "name": "keep",
            "ansible.builtin.set_fact": {"nics": "{{ nics | default([]) + [nic] }}"},
            "loop": "{{ lan.hosts | subelements('nics') }}",
            "when": "item.1.ip is not none",
            "vars": {"nic": nic},
        },
        {"name": "alone", "openvadp.backup.vddk_log_diagnosis": {"path": str(log)}},
        {
            "name": "with NICs",
            "openvadp.backup.vddk_log_diagnosis": {"path": str(log), "esxi_nics": "{{ nics }}"},
        },
    ]
    outcome = lan.ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]).ok()
    assert outcome.result("vmkernel_backup_nic_info")["hosts"][0]["shared_subnets"] == [["vmk0", "vmk1"]]
    first = outcome.result("vddk_log_diagnosis", task="alone")["findings"][0]
    assert (first["code"], first["certainty"]) == ("shared_subnet", "likely")
    first = outcome.result("vddk_log_diagnosis", task="with NICs")["findings"][0]
    assert (first["code"], first["certainty"]) == ("shared_subnet", "certain")
