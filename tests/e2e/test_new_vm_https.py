# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_disk_restore with target new_vm by transport https: an import lease, without VDDK and without HotAdd."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from administrator import Administrator
from harness import Simulator, made_repository
from modules import Modules

KEYS = (2000, 2001)
DEFAULTS: Dict[str, Any] = {
    "lease_timeout": 300.0,
    "lease_thumbprint": "sha1",
    "lease_host": "*",
    "lease_bytes_per_second": None,
    "lease_cuts": 0,
}


class Machines:
    """app01 with two disks, backed up fully and incrementally; the proxy is no virtual machine and has no VDDK."""

    def __init__(self, folder: Path) -> None:
        self.simulator = Simulator(folder / "state")
        repository = folder / "repository"
        made_repository(repository)
        self.modules = Modules(self.simulator, repository)
        self.control = self.simulator.control
        self.modules.track_changes()
        self.modules.point("full")
        self.simulator.write("app01", 2000, 3 << 20, seed=4, length=200000)
        self.modules.point("incremental", mode="incremental")
        self.control.call("proxy", identity="none")
        self.administrator = Administrator(self.simulator.facts, "app01")
        self.names = self.existing()

    def options(self, name: str, **options: Any) -> Dict[str, Any]:
        return {
            **self.simulator.connection,
            "repository": str(self.modules.repository),
            "vm_name": "app01",
            "vddk_libdir": None,
            "device_dir": self.simulator.facts["device_dir"],
            "sysfs_dir": self.simulator.facts["sysfs_dir"],
            "nfc_port": self.simulator.facts["nfc_port"],
            "target": "new_vm",
            "name": name,
            **options,
        }

    def run(self, name: str, **options: Any) -> Dict[str, Any]:
        return self.modules.run("vadp_disk_restore", **self.options(name, **options))

    def existing(self) -> List[str]:
        return sorted(vm["name"] for vm in self.control.call("state")["vms"].values())

    def held(self, vm: str) -> Dict[int, Any]:
        return {key: self.simulator.disk(vm, key) for key in KEYS}

    def nothing_is_left(self, name: str) -> None:
        """Neither of the machine, nor of the run, nor of a packed disk."""
        assert self.existing() == self.names
        datastores = self.simulator.state / "datastores"
        assert not list(datastores.glob(f"*/{name}*"))
        self.no_runs()

    def no_runs(self) -> None:
        store = self.modules.repository / "vms"
        assert not list(store.glob("*/runs/*.json")) and not list(store.glob("*/*.part-*"))
        assert len(list(store.iterdir())) == 1


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("new-vm-https"))
    try:
        yield machines
    finally:
        machines.administrator.close()
        machines.simulator.stop()


@pytest.fixture
def machines(started: Machines) -> Iterator[Machines]:
    try:
        yield started
    finally:
        started.control.call("set_settings", **DEFAULTS)
        started.control.call("clear_injections")
        for moid, vm in started.control.call("state")["vms"].items():
            if vm["name"] not in started.names:
                started.administrator.destroy_moid(moid)


def test_a_machine_comes_by_https_alone(machines: Machines) -> None:
    """No VDDK, no HotAdd, and a lease that lives on signs of life alone."""
    at = machines.simulator.last_call()
    planned = machines.run("planned", _ansible_check_mode=True)
    assert not machines.simulator.changing_calls(at)
    for entry in planned["restored"]:
        assert (entry["transport"], entry["method"]) == ("https", "import_lease")
        reasons = "\n".join(entry["transport_reasons"])
        assert "hotadd: this machine is not a virtual machine" in reasons and "nbdssl: VDDK is not there" in reasons, (
            reasons
        )
        assert "the whole disk crosses the network, compressed" in str(entry["transport_notes"])
    machines.control.call(
        "set_settings", lease_timeout=1.0, lease_bytes_per_second=1_500_000, lease_thumbprint="sha256"
    )
    result = machines.run("imported", point="incremental")
    assert not result["failed"], result["msg"]
    assert machines.held("imported") == machines.modules.held["incremental"]
    assert [entry["verified"] for entry in result["restored"]] == [True, True]
    assert all(0 < entry["bytes_written"] < entry["bytes_read"] for entry in result["restored"])
    assert [one for one in result["differences"] if one["reason"] is None] == [] and "differs" not in str(
        result["warnings"]
    )
    calls = machines.control.call("calls", since=at)
    names = [call["method"] for call in calls]
    assert names.count("ImportVApp") == 1 and "CreateVM_Task" not in names and names.count("POST /nfc") == 2
    assert "HttpNfcLeaseProgress" in names and names.index("PUT /folder") > names.index("HttpNfcLeaseComplete")
    assert machines.simulator.vm("imported")["instance_uuid"] == result["vm"]["instance_uuid"]
    machines.no_runs()


def test_a_cut_upload_starts_over(machines: Machines) -> None:
    """To another name of the server, whose certificate is one of a known authority: the lease names none."""
    machines.control.call("set_settings", lease_cuts=1, lease_thumbprint="empty", lease_host="localhost")
    at = machines.simulator.last_call()
    result = machines.run("imported", point="full")
    assert not result["failed"], result["msg"]
    assert machines.held("imported") == machines.modules.held["full"]
    assert [call["method"] for call in machines.control.call("calls", since=at)].count("ImportVApp") == 1


def test_a_disk_that_nothing_can_read_back(machines: Machines) -> None:
    """On vSAN a disk is no file: it is sent, and the result does not say that it was compared."""
    result = machines.run("on-vsan", point="full", datastore="vsan01", disks=[{"key": 2001}])
    assert not result["failed"], result["msg"]
    assert [(entry["transport"], entry["verified"]) for entry in result["restored"]] == [("https", None)]
    told = str(result["warnings"])
    assert "Disk 2001 was not read back: not by the datastore" in told and "where a disk is not a file" in told, told
    assert machines.simulator.disk("on-vsan", 2001) == machines.modules.held["full"][2001]


@pytest.mark.soak
def test_what_fails_leaves_nothing(machines: Machines) -> None:
    control = machines.control
    control.call("set_settings", lease_thumbprint="wrong")
    result = machines.run("broken", on_failure="keep")
    assert result["failed"] and "certificate is another one" in result["msg"], result["msg"]
    machines.nothing_is_left("broken")
    control.call("set_settings", lease_thumbprint="sha1", lease_cuts=99)
    result = machines.run("broken")
    assert result["failed"] and "The disk was not uploaded" in result["msg"] and "4 tries" in result["msg"], result
    machines.nothing_is_left("broken")
    control.call("set_settings", lease_cuts=0)
    for call, fault in (("HttpNfcLeaseComplete", "vim.fault.NoDiskSpace"), ("ImportVApp", "vim.fault.InvalidName")):
        control.call("inject", target="call", name=call, fault=fault)
        result = machines.run("broken")
        assert result["failed"] and fault.rsplit(".", maxsplit=1)[-1] in result["msg"], result["msg"]
        machines.nothing_is_left("broken")
    control.call("inject", target="task", name="ImportVApp", fault="vim.fault.NoDiskSpace")
    result = machines.run("broken")
    assert result["failed"] and "NoDiskSpace" in result["msg"], result["msg"]
    machines.nothing_is_left("broken")
    # An answer that is lost after the call was done: nobody has the lease, and the machine goes with it.
    control.call("set_settings", lease_timeout=1.0)
    control.call("inject", target="call", name="ImportVApp", fault="lost")
    result = machines.run("broken")
    assert result["failed"] and "the connection" in result["msg"], result["msg"]
    control.call("set_settings", lease_timeout=300.0)
    result = machines.run("broken", disks=[{"key": 2001}])
    assert not result["failed"], result["msg"]
    machines.administrator.destroy("broken")
    machines.nothing_is_left("broken")
    user = machines.simulator.facts["backup_username"]
    control.call("set_privileges", username=user, remove=["VApp.Import"])
    at = machines.simulator.last_call()
    result = machines.run("broken")
    control.call("set_privileges", username=user, add=["VApp.Import"])
    assert result["failed"] and "lacks the privilege VApp.Import" in result["msg"], result["msg"]
    assert not machines.simulator.changing_calls(at)


def test_a_restore_that_is_killed_in_the_middle_of_an_upload(machines: Machines) -> None:
    machines.control.call("set_settings", lease_bytes_per_second=100_000, lease_timeout=2.0)
    process = machines.modules.start("vadp_disk_restore", machines.options("killed"))
    deadline = time.monotonic() + 60
    at = machines.simulator.last_call()
    while not any(intent.get("half_written") for run in _runs(machines) for intent in run["intents"]):
        assert process.poll() is None and time.monotonic() < deadline, process.out
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert "killed" in machines.existing() and len(_runs(machines)) == 1
    machines.control.call("set_settings", lease_bytes_per_second=None)
    result = machines.run("killed")
    assert not result["failed"], result["msg"]
    assert machines.held("killed") == machines.modules.held["incremental"]
    assert machines.existing().count("killed") == 1
    machines.no_runs()
    assert [call["method"] for call in machines.control.call("calls", since=at)].count("HttpNfcLeaseComplete") == 1


def _runs(machines: Machines) -> List[Dict[str, Any]]:
    found = (machines.modules.repository / "vms").glob("*/runs/*.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


@pytest.mark.soak
def test_https_takes_over_where_the_others_fail_and_they_where_it_does(machines: Machines) -> None:
    control = machines.control
    with_vddk = {"vddk_libdir": machines.simulator.facts["vddk_libdir"], "io_timeout": 5}
    control.call("cut_network")
    try:
        result = machines.run("taken-over", transports=["nbdssl", "https"], **with_vddk)
    finally:
        control.call("restore_network")
    assert not result["failed"], result["msg"]
    for entry in result["restored"]:
        assert (entry["transport"], entry["verified"]) == ("https", True)
        assert "nbdssl: it failed" in entry["transport_reasons"][0], entry
    assert "All disks came by https" in str(result["warnings"])
    assert machines.held("taken-over") == machines.modules.held["incremental"]
    control.call("inject", target="call", name="POST /nfc", fault="vim.fault.InvalidState", count=0)
    result = machines.run("the-other-way", transports=["https", "nbdssl"], **with_vddk)
    assert not result["failed"], result["msg"]
    for entry in result["restored"]:
        assert entry["transport"] == "nbdssl" and "https: it failed" in entry["transport_reasons"][0], entry
    assert machines.held("the-other-way") == machines.modules.held["incremental"]
    result = machines.run("required", transports=["https", "nbdssl"], require_transport=True, **with_vddk)
    assert result["failed"] and "required" not in machines.existing()
