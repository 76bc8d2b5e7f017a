# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_preflight: each finding is provoked, and nothing is ever changed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from administrator import Administrator
from harness import Ansible, Outcome, Simulator, made_repository
from modules import Modules

Checks = List[Dict[str, Any]]


class World:
    """Preflights against one simulator; each checks that nothing was changed."""

    def __init__(self, simulator: Simulator, folder: Path) -> None:
        self.simulator = simulator
        self.repository = made_repository(folder / "repository")
        self.modules = Modules(simulator, self.repository)

    def options(self, **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        common = {"vddk_libdir": facts["vddk_libdir"], "nfc_port": facts["nfc_port"], "io_timeout": 3}
        return {**self.simulator.connection, **common, **options}

    def look(self, **options: Any) -> Dict[str, Any]:
        seen = self.simulator.last_call()
        result = self.modules.done("vadp_preflight", **self.options(**options))
        assert not result["changed"] and self.simulator.changing_calls(seen) == []
        return result

    def of(self, vm: str, **options: Any) -> Checks:
        """The checks of one machine that are not ok."""
        return [check for check in self.look(name=vm, **options)["vms"][0]["checks"] if check["severity"] != "ok"]


@pytest.fixture
def world(simulator: Simulator, tmp_path: Path) -> World:
    return World(simulator, tmp_path)


@pytest.fixture
def own(own_simulator: Simulator, tmp_path: Path) -> World:
    return World(own_simulator, tmp_path)


def found(checks: Checks, code: str, severity: str) -> Dict[str, Any]:
    """The one check of that code and severity."""
    fitting = [check for check in checks if (check["code"], check["severity"]) == (code, severity)]
    assert len(fitting) == 1, checks
    assert severity == "not_checked" or fitting[0]["remedy"]
    return fitting[0]


def test_a_machine_that_is_as_it_should_be(world: World) -> None:
    seen = world.simulator.last_call()
    result = world.look(name="app01", repository=str(world.repository))
    assert result["ready"] and result["vms"][0]["ready"]
    assert [check for check in result["checks"] if check["severity"] != "ok"] == []
    assert [check for check in result["vms"][0]["checks"] if check["severity"] != "ok"] == []
    codes = {check["code"] for check in result["checks"] + result["vms"][0]["checks"]}
    assert codes >= {"server", "certificate", "clock", "programs", "vddk", "repository", "vm", "change_tracking"}
    assert codes >= {"quiescing", "snapshots", "consolidation", "storage_vmotion", "datastore_space", "transport"}
    assert codes >= {"leftovers", "privileges", "host_state", "host_subnets", "host_name", "host_port"}
    greetings = [check for check in result["vms"][0]["checks"] if check["code"] == "host_port"]
    assert len(greetings) == 2 and all("220 VMware Authentication Daemon" in check["evidence"] for check in greetings)
    disks = result["vms"][0]["disks"]
    assert [(disk["key"], disk["included"]) for disk in disks] == [(2000, True), (2001, True)]
    for disk in disks:
        assert [candidate["transport"] for candidate in disk["candidates"]] == [
            "san",
            "hotadd",
            "nbdssl",
            "nbd",
            "https",
        ]
        for candidate in disk["candidates"]:
            assert candidate["usable"] or candidate["reasons"]
        assert disk["transport"] in [candidate["transport"] for candidate in disk["candidates"] if candidate["usable"]]
    calls = [call["method"] for call in world.simulator.control.call("calls", since=seen)]
    assert calls.count("Login") == 1 and len(calls) < 40, calls
    assert os.listdir(world.repository) == ["repository.json"]


def test_many_at_once_cost_few_calls(world: World) -> None:
    seen = world.simulator.last_call()
    result = world.look(vms=["app01", "win01", "db01", "twin", "nobody01", "shared01", "template01", "app01"])
    by_name = {vm["vm"]: vm for vm in result["vms"]}
    assert list(by_name) == ["app01", "win01", "db01", "twin", "nobody01", "shared01", "template01"]
    assert not result["ready"]
    assert {name for name, vm in by_name.items() if vm["ready"]} == {"app01", "win01", "db01", "template01"}
    assert "/DC0/vm/twin" in found(by_name["twin"]["checks"], "vm", "error")["evidence"]
    assert "no such virtual machine" in found(by_name["nobody01"]["checks"], "vm", "error")["evidence"]
    assert "bus" in found(by_name["shared01"]["checks"], "vm", "error")["evidence"]
    assert "a template" in next(check["evidence"] for check in by_name["template01"]["checks"] if check["code"] == "vm")
    assert by_name["template01"]["disks"][0]["transport"] == "https"
    skipped = [check for check in by_name["db01"]["checks"] if check["code"] == "disk"]
    assert [check["severity"] for check in skipped] == ["warning", "warning"]
    assert "independent" in skipped[0]["evidence"] and "raw device" in skipped[1]["evidence"]
    assert result["counts"]["error"] == 3
    probes = [call["method"] for call in world.simulator.control.call("calls", since=seen)]
    assert probes.count("HasPrivilegeOnEntities") < 10


def test_a_host_that_is_cut(own: World) -> None:
    own.simulator.control.call("cut_network", host="127.0.1.2")
    check = found(own.of("app01", transports=["nbdssl"]), "host_port", "error")
    assert check["subject"].startswith("127.0.1.2:") and "refused" in check["evidence"]
    own.simulator.control.call("restore_network")
    own.simulator.control.call("cut_network", host="127.0.1.2", mode="blackhole")
    assert "within 1 s" in found(own.of("app01", transports=["nbdssl"], io_timeout=1), "host_port", "error")["evidence"]


def test_a_port_where_something_else_answers(own: World) -> None:
    """vCenter's own port is none of a host's."""
    checks = own.of("app01", transports=["nbdssl"], nfc_port=own.simulator.facts["port"])
    ports = [check for check in checks if check["code"] == "host_port"]
    assert [check["severity"] for check in ports] == ["error", "error"]


def test_a_port_that_no_transport_needs_is_no_error(own: World) -> None:
    own.simulator.control.call("cut_network")
    result = own.look(name="app01", transports=["nbdssl"], vddk_libdir="/nowhere")
    ports = [check for check in result["vms"][0]["checks"] if check["code"] == "host_port"]
    assert {check["severity"] for check in ports} == {"ok"} and "no transport of the plan" in ports[0]["evidence"]
    assert "/nowhere" in found(result["checks"], "vddk", "error")["evidence"]
    reads = [check for check in result["vms"][0]["checks"] if check["code"] == "transport"]
    assert {check["severity"] for check in reads} == {"error"} and "VDDK is not there" in reads[0]["evidence"]
    assert not result["ready"] and result["vms"][0]["disks"][0]["transport"] is None


def test_hosts_that_serve_nothing(own: World) -> None:
    own.simulator.control.call("set_host", name="127.0.1.2", maintenance=True)
    checks = own.of("app01")
    assert "maintenance" in found(checks, "host_state", "warning")["evidence"]
    assert found(checks, "host_port", "not_checked")["subject"].startswith("127.0.1.2")
    own.simulator.control.call("set_host", name="127.0.1.1", connected=False)
    checks = own.of("app01")
    assert "no host" in found(checks, "host_state", "error")["evidence"]
    assert "disconnected" in found(checks, "vm", "error")["evidence"]


@pytest.mark.parametrize(
    ("privilege", "severity"),
    [
        ("VirtualMachine.State.CreateSnapshot", "error"),
        ("VirtualMachine.Provisioning.DiskRandomRead", "error"),
        ("Datastore.FileManagement", "error"),
        ("Global.DisableMethods", "warning"),
    ],
)
def test_a_privilege_that_is_missing(own: World, privilege: str, severity: str) -> None:
    user = own.simulator.facts["backup_username"]
    own.simulator.control.call("set_privileges", username=user, remove=[privilege])
    check = found(own.of("app01", transports=["nbdssl"]), "privileges", severity)
    assert privilege in check["evidence"] and "role" in check["remedy"]
    on = {"Global.DisableMethods": "on vCenter", "Datastore.FileManagement": "on datastore vmfs01"}
    assert on.get(privilege, "on VM 'app01'") in check["evidence"]


def test_privileges_of_restores(own: World) -> None:
    """By what the user of the simulator may do everything is there; then something is taken away."""
    user = own.simulator.facts["backup_username"]
    both = {"transports": ["nbdssl"], "restores": ["in_place", "new_vm"]}
    assert own.of("app01", **both) == []
    own.simulator.control.call("set_privileges", username=user, remove=["VApp.Import", "Network.Assign"])
    assert own.of("app01", transports=["nbdssl"], restores=["in_place"]) == []
    evidence = found(own.of("app01", **both), "privileges", "error")["evidence"]
    assert "missing for a restore to new_vm: VApp.Import on its resource pool, Network.Assign on network" in evidence
    own.simulator.control.call("set_privileges", username=user, add=["VApp.Import", "Network.Assign"])
    own.simulator.control.call("set_privileges", username=user, remove=["InventoryService.Tagging.ObjectAttachable"])
    evidence = found(own.of("app01", **both), "privileges", "warning")["evidence"]
    assert evidence == "missing to give a new machine its tags: InventoryService.Tagging.ObjectAttachable on its folder"


def test_a_server_that_does_not_know_a_privilege(own: World) -> None:
    own.simulator.control.call(
        "inject", target="call", name="HasPrivilegeOnEntities", fault="vmodl.fault.InvalidArgument", count=1
    )
    assert own.of("app01", transports=["nbdssl"]) == []


def test_a_server_that_does_not_tell_privileges(own: World) -> None:
    own.simulator.control.call(
        "inject", target="call", name="HasPrivilegeOnEntities", fault="vmodl.fault.SystemError", count=0
    )
    found(own.of("app01", transports=["nbdssl"]), "privileges", "not_checked")


def test_tools_that_do_not_run(own: World) -> None:
    own.simulator.control.call("set_tools", vm="app01", running=False)
    assert "crash-consistent" in found(own.of("app01"), "quiescing", "warning")["evidence"]
    own.simulator.control.call("power", vm="app01", state="poweredOff")
    assert [check for check in own.of("app01") if check["code"] == "quiescing"] == []


def test_snapshots_and_what_they_leave(own: World) -> None:
    moid = own.modules.snapshot("mine")
    checks = own.of("app01")
    assert "'mine'" in found(checks, "snapshots", "warning")["evidence"]
    assert "off, and can't be switched on" in found(checks, "change_tracking", "warning")["evidence"]
    own.modules.done("vm_snapshot", **own.modules.named, snapshot_moid=moid, state="absent", consolidate=False)
    checks = own.of("app01")
    found(checks, "consolidation", "warning")
    assert [check for check in checks if check["code"] == "snapshots"] == []
    own.modules.done("vm_snapshot", **own.modules.named, snapshot_moid=moid, state="absent")
    assert own.of("app01") == []


def test_a_snapshot_of_a_backup(own: World) -> None:
    own.modules.track_changes()
    begun = own.modules.done("vadp_recover", **own.modules.named, repository=str(own.repository), begin=True)["run"]
    own.modules.snapshot(begun["snapshot_name"], begun["snapshot_description"])
    assert "vadp_recover" in found(own.of("app01"), "snapshots", "warning")["remedy"]


def test_change_tracking_over_a_snapshot(own: World, administrator: Administrator) -> None:
    own.modules.snapshot("mine")
    administrator.track_changes(True)
    assert "misses changes" in found(own.of("app01"), "change_tracking", "warning")["evidence"]


def test_change_tracking_that_is_not_effective_yet(own: World, administrator: Administrator) -> None:
    administrator.track_changes(True)
    assert "not effective yet" in found(own.of("app01"), "change_tracking", "warning")["evidence"]
    own.modules.track_changes()
    assert own.of("app01") == []


def test_a_full_datastore(own: World) -> None:
    own.simulator.control.call("set_full", datastore="vmfs01")
    check = found(own.of("app01"), "datastore_space", "error")
    assert check["subject"] == "datastore vmfs01" and "no room" in check["evidence"]


def test_a_disk_that_is_attached_elsewhere(own: World) -> None:
    disk = own.simulator.vm("app01")["disks"][0]["path"]
    own.simulator.control.call("power", vm="app01", state="poweredOff")
    other = Administrator(own.simulator.facts, "restore01")
    try:
        key = other.attach_disk(5, disk)
        check = found(own.of("app01"), "leftovers", "warning")
        assert "restore01" in check["evidence"] and "detach" in check["remedy"]
        own.simulator.control.call("power", vm="restore01", state="poweredOn")
        found(own.of("app01"), "leftovers", "error")
        other.detach_disk(key)
    finally:
        other.close()
    assert [check for check in own.of("app01") if check["code"] == "leftovers"] == []


def test_storage_vmotion_that_was_left_disabled(own: World) -> None:
    """As after a crash between PrepareForAccess and EndAccess."""
    facts = own.simulator.facts
    requests = [
        {"op": "hello"},
        {"op": "login", "user": facts["username"], "password": facts["password"]},
        {"op": "prepare", "vmx": "moref=vm-101", "identity": "crashed"},
    ]
    with socket.create_connection((facts["host"], facts["port"])) as sock, sock.makefile("rw") as stream:
        for request in requests:
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            assert json.loads(stream.readline())["ok"]
    assert "vadp_access" in found(own.of("app01"), "storage_vmotion", "warning")["remedy"]


def test_a_repository_of_no_use(world: World, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("not ours", encoding="utf-8")
    result = world.look(name="app01", repository=str(foreign))
    assert "other data" in found(result["checks"], "repository", "error")["evidence"]
    assert not result["ready"]
    result = world.look(name="app01", repository=str(tmp_path / "none"))
    found(result["checks"], "repository", "error")
    assert "absolute" in world.modules.run("vadp_preflight", **world.options(name="app01", repository="backup"))["msg"]


def test_a_certificate_that_expires_soon(own: World) -> None:
    folder = own.simulator.state / "tls"
    own.simulator.stop()
    command = ["openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    command += ["-days", "10", "-extfile", "server.ext", "-out", "server.pem"]
    subprocess.run(command, cwd=str(folder), check=True, capture_output=True)
    own.simulator.start()
    check = found(own.look(name="app01")["checks"], "certificate", "warning")
    assert "in 9 days" in check["evidence"] or "in 10 days" in check["evidence"]


def by_transport(result: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The candidates of the first disk."""
    return {candidate["transport"]: candidate for candidate in result["vms"][0]["disks"][0]["candidates"]}


def test_each_transport_with_its_reasons(own: World) -> None:
    """On the proxy VM that also sees the LUN: the same plan as a backup's."""
    facts = own.simulator.facts
    here = {"device_dir": facts["device_dir"], "sysfs_dir": facts["sysfs_dir"]}
    result = own.look(name="app01", **here)
    assert (
        result["ready"]
        and "proxy01" in [check for check in result["checks"] if check["code"] == "proxy"][0]["evidence"]
    )
    candidates = by_transport(result)
    assert [name for name, one in candidates.items() if one["usable"]] == ["san", "hotadd", "nbdssl", "nbd", "https"]
    assert result["vms"][0]["disks"][0]["transport"] == "san"
    assert candidates["https"]["method"] == "export_lease" and candidates["https"]["notes"]

    own.simulator.control.call("set_lun", datastore="vmfs01", visible=False)
    user = facts["backup_username"]
    attach = "VirtualMachine.Config.AddExistingDisk"
    own.simulator.control.call("set_privileges", username=user, remove=[attach])
    result = own.look(name="app01", **here, vddk_libdir="/nowhere")
    candidates = by_transport(result)
    assert "does not see LUN" in " ".join(candidates["san"]["reasons"])
    assert "/nowhere" in " ".join(candidates["nbdssl"]["reasons"])
    check = found(result["vms"][0]["checks"], "privileges", "warning")
    assert f"{attach} on the proxy VM" in check["evidence"]
    assert result["vms"][0]["disks"][0]["transport"] == "https"
    ports = [check for check in result["vms"][0]["checks"] if check["code"] == "host_api_port"]
    assert {check["severity"] for check in ports} == {"warning"}  # it is the simulator's vCenter that serves leases


def test_a_proxy_that_two_machines_could_be(own: World) -> None:
    facts = own.simulator.facts
    own.simulator.control.call("proxy", identity="ambiguous")
    result = own.look(name="app01", device_dir=facts["device_dir"], sysfs_dir=facts["sysfs_dir"])
    check = found(result["vms"][0]["checks"], "proxy", "error")
    assert "proxy_moid" in check["remedy"] and not result["ready"]
    result = own.look(name="app01", proxy_physical=True, sysfs_dir=facts["sysfs_dir"])
    assert result["ready"]
    own.simulator.control.call("proxy", identity="normal")
    check = found(own.look(name="app01", proxy_name="nobody01")["vms"][0]["checks"], "proxy", "error")
    assert "nobody01" in check["evidence"]


def test_options_that_make_no_sense(world: World) -> None:
    def refused(**options: Any) -> str:
        result = world.modules.run("vadp_preflight", **world.options(**options))
        assert result["failed"]
        return str(result["msg"])

    assert "one of the following is required: name, uuid, moid, vms" in refused()
    assert "mutually exclusive" in refused(name="app01", vms=["win01"])
    assert "'vms' is empty" in refused(vms=[])
    assert "twice" in refused(name="app01", transports=["nbd", "nbd"])
    assert "nfc_port" in refused(name="app01", nfc_port=70000)
    assert "no such virtual machine" in refused(name="nobody01")


def test_the_playbook(simulator: Simulator, ansible: Ansible, tmp_path: Path) -> None:
    def run(*hosts: str, arguments: Optional[List[str]] = None, **more: Dict[str, Any]) -> Outcome:
        variables = simulator.role_variables("vm_backup_")
        variables["vm_backup_repository"] = str(tmp_path)
        return ansible.run(
            "openvadp.backup.preflight",
            hosts=hosts,
            variables=variables,
            host_variables=more,
            arguments=arguments or (),
        )

    (tmp_path / "ansible").mkdir(exist_ok=True)
    seen = simulator.last_call()
    outcome = run("app01", "db01", "nobody01", "copy02", copy02={"vm_backup_proxy": "proxy.invalid"}).failed()
    assert simulator.changing_calls(seen) == []
    table = outcome.stdout.split("PLAY [Show what was found]")[1]
    rows = [line.split() for line in table.splitlines()]
    assert ["app01", "yes", "2000", "Hard", "disk", "1", "192.0", "MiB", "nbdssl", "[1]"] in [row[:10] for row in rows]
    assert ["nobody01", "NO"] in [row[:2] for row in rows]
    assert "independent" in table and "no such virtual machine" in table
    assert "proxy.invalid" in table
    failures = {host: stats["failures"] for host, stats in outcome.stats.items()}
    assert failures["nobody01"] == failures["copy02"] == 1
