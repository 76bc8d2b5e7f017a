# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""HotAdd without VDDK: module proxy_hotadd, the endpoint of the transport, and what a killed proxy leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from administrator import Administrator
from harness import ROOT, Ansible, Simulator, file_sha256
from modules import Modules, Process

RUN = "0123456789abcdef0123456789abcdef"


class Proxy:
    """proxy01, on which this machine plays: its disks, and module proxy_hotadd for one VM's."""

    def __init__(self, simulator: Simulator, modules: Modules, vm: str) -> None:
        self.simulator = simulator
        self.modules = modules
        self.vm = vm
        self.repository = modules.repository
        self.folders = {name: simulator.facts[name] for name in ("device_dir", "sysfs_dir")}

    def options(self, **options: Any) -> Dict[str, Any]:
        return {**self.simulator.connection, "name": self.vm, **self.folders, **options}

    def run(self, **options: Any) -> Dict[str, Any]:
        return self.modules.run("proxy_hotadd", **self.options(**options))

    def attach(self, **options: Any) -> Dict[int, Dict[str, Any]]:
        """What is attached, by device key; it was not before."""
        result = self.run(**options)
        assert not result["failed"] and result["changed"], result
        return {item["key"]: item for item in result["attachments"]}

    def detach(self) -> None:
        result = self.run(state="detached")
        assert not result["failed"] and result["changed"], result
        assert self.left() == []

    def attachments(self) -> List[Dict[str, Any]]:
        return list(self.simulator.control.call("attachments"))

    def left(self) -> List[str]:
        """Attachments, and links and nodes of devices."""
        links = [path.name for path in Path(self.folders["device_dir"]).iterdir() if path.name.startswith("wwn-")]
        return [item["path"] for item in self.attachments()] + links

    def recover(self, **options: Any) -> Dict[str, Any]:
        named = {**self.simulator.connection, "name": self.vm, "repository": str(self.repository)}
        # What was begun here goes on for all that anybody can know; the tests don't wait for its deadline.
        named["force"] = "begin" not in options
        return self.modules.run("vadp_recover", **named, **self.folders, **options)


@pytest.fixture
def app01(own_simulator: Simulator, modules: Modules) -> Proxy:
    """A machine that runs."""
    return Proxy(own_simulator, modules, "app01")


@pytest.fixture
def restore01(own_simulator: Simulator, modules: Modules) -> Proxy:
    """One that is off, without snapshots."""
    return Proxy(own_simulator, modules, "restore01")


def _sha256(item: Dict[str, Any]) -> Tuple[int, str]:
    """Of what the kernel of the proxy reads."""
    return file_sha256(Path(os.path.realpath(item["device"])))


# The module


def test_the_attached_devices_hold_the_bytes_of_the_snapshot(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    held = {key: app01.simulator.disk("app01", key, snapshot) for key in (2000, 2001)}
    app01.simulator.write("app01", 2000, 0, 1 << 20)
    app01.simulator.write("app01", 2001, 65536)
    now = {key: app01.simulator.disk("app01", key) for key in held}
    found = app01.attach(snapshot_moid=snapshot)
    assert {key: _sha256(item) for key, item in found.items()} == held != now
    assert sorted(found[2000]) == ["controller", "device", "disk_uuid", "key", "label", "unit"]
    for item in found.values():
        digits = item["disk_uuid"].replace("-", "").lower()
        assert item["device"] == f"{app01.folders['device_dir']}/wwn-0x{digits}" and item["controller"] == 1000
    assert [item["mode"] for item in app01.attachments()] == ["independent_nonpersistent"] * 2

    again = app01.run(snapshot_moid=snapshot)
    assert again["changed"] is False and {item["key"]: item for item in again["attachments"]} == found
    app01.detach()
    assert app01.run(state="detached")["changed"] is False
    # Nothing was destroyed, and nothing is in the way of the snapshot's removal.
    assert {key: app01.simulator.disk("app01", key) for key in held} == now
    modules.remove_snapshot(snapshot)
    assert app01.simulator.vm("app01")["consolidation_needed"] is False
    assert {key: app01.simulator.disk("app01", key) for key in held} == now


def test_some_disks_only_and_detached_by_the_snapshot_that_is_gone(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    assert list(app01.attach(snapshot_moid=snapshot, disks=["Hard disk 2"])) == [2001]
    assert list(app01.attach(snapshot_moid=snapshot, disks=["2000"])) == [2000]
    gone = app01.run(state="detached", disks=["2001"], snapshot_moid="snapshot-9999")
    assert gone["changed"] and [item["key"] for item in gone["attachments"]] == [2001]
    assert len(app01.attachments()) == 1
    app01.detach()


def test_check_mode_and_diff_mode(app01: Proxy, modules: Modules, ansible: Ansible) -> None:
    snapshot = modules.snapshot("one")
    before = app01.simulator.last_call()
    planned = ansible.module("proxy_hotadd", app01.options(snapshot_moid=snapshot), check=True, diff=True)
    assert planned["changed"] and app01.simulator.changing_calls(before) == [] and app01.left() == []
    assert planned["diff"]["before"] == "Hard disk 1: not attached\nHard disk 2: not attached\n"
    done = ansible.module("proxy_hotadd", app01.options(snapshot_moid=snapshot), diff=True)
    assert done["diff"] == planned["diff"]
    assert [dict(item, device=None) for item in done["attachments"]] == planned["attachments"]

    before = app01.simulator.last_call()
    same = ansible.module("proxy_hotadd", app01.options(snapshot_moid=snapshot), check=True, diff=True)
    assert same["changed"] is False and same["attachments"] == done["attachments"]
    assert same["diff"]["before"] == same["diff"]["after"]
    going = ansible.module("proxy_hotadd", app01.options(state="detached"), check=True, diff=True)
    assert going["changed"] and going["attachments"] == done["attachments"]
    assert app01.simulator.changing_calls(before) == [] and len(app01.attachments()) == 2
    gone = ansible.module("proxy_hotadd", app01.options(state="detached"), diff=True)
    assert gone["diff"] == going["diff"] and app01.left() == []


def test_a_controller_is_added_where_all_units_are_taken(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    app01.simulator.control.call("fill_units", vm="proxy01", leave=0, controllers=1)
    found = app01.attach(snapshot_moid=snapshot)
    assert {item["controller"] for item in found.values()} == {1001}
    assert [item["unit"] for item in found.values()] == [0, 1]
    assert _sha256(found[2000]) == app01.simulator.disk("app01", 2000, snapshot)
    app01.detach()
    # It is used the next time.
    assert {item["controller"] for item in app01.attach(snapshot_moid=snapshot).values()} == {1001}


def test_no_room_is_an_error_that_touches_nothing(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    app01.simulator.control.call("fill_units", vm="proxy01", leave=1, controllers=4)
    before = app01.simulator.last_call()
    refused = app01.run(snapshot_moid=snapshot)
    assert refused["failed"] and app01.simulator.changing_calls(before) == []
    for words in ("'Hard disk 1'", "'Hard disk 2'", "VM 'proxy01' (vm-109)", "SCSI", "vadp_recover"):
        assert words in refused["msg"], refused["msg"]
    # One of them has room, and another does not.
    app01.attach(snapshot_moid=snapshot, disks=["2000"])
    assert app01.run(snapshot_moid=snapshot, disks=["2001"])["failed"]


def test_what_is_written_nonpersistently_is_lost_and_else_it_arrives(restore01: Proxy) -> None:
    empty = restore01.simulator.disk("restore01", 2000)
    item = restore01.attach(disks=["2000"])[2000]
    _write(item, b"lost")
    restore01.detach()
    assert restore01.simulator.disk("restore01", 2000) == empty

    item = restore01.attach(disks=["2000"], access="write")[2000]
    assert restore01.attachments()[0]["mode"] == "persistent"
    # The other way of attaching is not what was asked for.
    other = restore01.run(disks=["2000"], access="read")
    assert other["failed"] and "persistent" in other["msg"] and "state=detached" in other["msg"]
    _write(item, b"kept")
    restore01.detach()
    assert restore01.simulator.control.read("restore01", 2000, 65536, 4) == b"kept"


def _write(item: Dict[str, Any], data: bytes) -> None:
    with open(os.path.realpath(item["device"]), "r+b") as device:
        device.seek(65536)
        device.write(data)


_REFUSED: List[Tuple[Dict[str, Any], List[str]]] = [
    ({}, ["is poweredOn and writes to it", "Make a snapshot"]),
    ({"access": "write"}, ["the virtual machine is poweredOn;", "snapshots ('one')", "Power it off", "Remove them"]),
    ({"access": "write", "snapshot_moid": "snapshot-1"}, ["snapshot_moid"]),
    ({"snapshot_moid": "snapshot-9999"}, ["no such snapshot"]),
    ({"disks": ["Hard disk 7"]}, ["'Hard disk 7'"]),
    ({"proxy_name": "app01"}, ["is the proxy itself"]),
    ({"proxy_name": "restore01"}, ["not powered on", "disk.EnableUUID"]),
    ({"proxy_moid": "vm-9999"}, ["vm-9999"]),
    ({"proxy_moid": "vm-109", "proxy_name": "proxy01"}, ["proxy_moid"]),
]


def test_what_makes_no_sense_is_refused_before_anything_is_touched(app01: Proxy, modules: Modules) -> None:
    modules.snapshot("one")
    before = app01.simulator.last_call()
    for options, words in _REFUSED:
        refused = app01.run(**options)
        assert refused["failed"], refused
        assert all(word in refused["msg"] for word in words), refused["msg"]
    assert app01.simulator.changing_calls(before) == []


def test_a_machine_that_is_no_vm_there_is_no_proxy(app01: Proxy) -> None:
    app01.simulator.control.call("proxy", identity="none")
    refused = app01.run(snapshot_moid="snapshot-1")
    assert refused["failed"] and "proxy_moid" in refused["msg"], refused["msg"]


@pytest.mark.parametrize(
    "options, reasons",
    [
        ({"moid": "vm-114", "proxy_name": "proxy01"}, ["the proxy is in datacenter 'DC0', the disk in 'DC1'"]),
        (
            {"name": "shared01", "proxy_name": "db01"},
            ["the proxy's host 127.0.1.2 does not see datastore 'local01'", "disk.EnableUUID"],
        ),
        ({"name": "ide01"}, ["it is an IDE disk"]),
        ({"name": "crypt01"}, ["it is encrypted, and the proxy is not"]),
    ],
)
def test_what_a_proxy_can_not_have(
    simulator: Simulator, ansible: Ansible, options: Dict[str, Any], reasons: List[str]
) -> None:
    folders = {name: simulator.facts[name] for name in ("device_dir", "sysfs_dir")}
    refused = ansible.module("proxy_hotadd", {**simulator.connection, **folders, **options}, check=True)
    assert refused["failed"]
    assert all(reason in refused["msg"] for reason in reasons), refused["msg"]


def test_two_disks_of_one_uuid_are_not_told_apart(app01: Proxy, modules: Modules) -> None:
    first = modules.snapshot("one")
    app01.attach(snapshot_moid=first)
    app01.simulator.write("app01", 2000, 0)
    refused = app01.run(snapshot_moid=modules.snapshot("two"))
    assert refused["failed"] and "has the same UUID" in refused["msg"], refused["msg"]
    assert len(app01.attachments()) == 2


def test_a_device_that_was_left_over_is_not_taken_for_the_disk(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    item = app01.attach(snapshot_moid=snapshot, disks=["2000"])[2000]
    somebody = Administrator(app01.simulator.facts, "proxy01")
    somebody.detach_disk(app01.attachments()[0]["key"])
    assert app01.attachments()[0]["stale"] and os.path.lexists(item["device"])
    assert app01.run(state="detached")["changed"] is False
    # The same UUID again, with other bytes.
    modules.remove_snapshot(snapshot)
    app01.simulator.write("app01", 2000, 0)
    snapshot = modules.snapshot("two")
    item = app01.attach(snapshot_moid=snapshot, disks=["2000"])[2000]
    assert _sha256(item) == app01.simulator.disk("app01", 2000, snapshot)
    # A device of its UUID that can be read is somebody else's.
    somebody.detach_disk(app01.attachments()[0]["key"])
    somebody.close()
    device = Path(os.path.realpath(item["device"]))
    device.unlink()
    device.write_bytes(b"x" * 4096)
    refused = app01.run(snapshot_moid=snapshot, disks=["2000"])
    assert refused["failed"] and "is here already" in refused["msg"], refused["msg"]


def test_the_proxys_own_system_must_leave_the_disk_alone(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    holder = Path(app01.folders["sysfs_dir"]) / "class" / "block" / "sdb" / "holders" / "md127"
    holder.mkdir(parents=True)
    refused = app01.run(snapshot_moid=snapshot, disks=["2000"])
    assert refused["failed"] and "md127" in refused["msg"] and "backup_proxy" in refused["msg"], refused["msg"]
    # What is in use is not torn away.
    assert "still attached" in refused["msg"] and len(app01.attachments()) == 1
    assert "in use" in app01.run(state="detached")["msg"]
    holder.rmdir()
    app01.detach()


def test_attaching_at_the_same_time(app01: Proxy, restore01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    app01.simulator.control.call("inject", target="task", name="ReconfigVM_Task", delay=0.5, count=2)
    processes = [
        modules.start("proxy_hotadd", app01.options(snapshot_moid=snapshot)),
        modules.start("proxy_hotadd", restore01.options()),
    ]
    results = [modules.result(process) for process in processes]
    assert not any(result["failed"] for result in results), results
    places = [(item["controller"], item["unit"]) for result in results for item in result["attachments"]]
    assert len(set(places)) == 4


def test_an_answer_that_is_lost(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    app01.simulator.control.call("inject", target="call", name="ReconfigVM_Task", fault="drop")
    found = app01.attach(snapshot_moid=snapshot)
    assert _sha256(found[2000]) == app01.simulator.disk("app01", 2000, snapshot)
    app01.simulator.control.call("inject", target="call", name="ReconfigVM_Task", fault="drop")
    app01.detach()


def test_vcenters_reason_is_told(app01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    fault = "vim.fault.FileLocked"
    app01.simulator.control.call("inject", target="task", name="ReconfigVM_Task", fault=fault)
    refused = app01.run(snapshot_moid=snapshot)
    assert refused["failed"] and "FileLocked" in refused["msg"] and "proxy01" in refused["msg"]
    assert app01.left() == []
    app01.simulator.control.call(
        "set_privileges",
        username=app01.simulator.connection["username"],
        remove=["VirtualMachine.Config.AddExistingDisk"],
    )
    refused = app01.run(snapshot_moid=snapshot)
    assert refused["failed"] and "VirtualMachine.Config.AddExistingDisk" in refused["msg"]


# The endpoint, and recovery


class Server:
    """A process of hotadd_server.py."""

    def __init__(self, proxy: Proxy, key: int, snapshot: Optional[str] = None, **options: Any) -> None:
        connection = dict(proxy.simulator.connection)
        wanted = {
            "connection": connection,
            "repository": str(proxy.repository),
            "vm": proxy.vm,
            "run_id": RUN,
            "snapshot": snapshot,
            "key": key,
            "writable": False,
            "proxy": "proxy01",
            "io_timeout": 60,
            **proxy.folders,
            **options,
        }
        self.process = subprocess.Popen(
            [str(ROOT / ".venv" / "bin" / "python"), str(Path(__file__).with_name("hotadd_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "build" / "tree")},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        self.said = self.listen()

    def listen(self) -> Dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.wait(60)
        said: Dict[str, Any] = json.loads(line)
        return said

    @property
    def uri(self) -> str:
        assert "uri" in self.said, self.said
        return str(self.said["uri"])

    def end(self) -> List[Any]:
        """End it in order; the intents that its run still has."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        said = self.listen()
        assert self.process.wait(60) == 0
        assert "ended" in said, said
        return list(said["ended"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def servers() -> Iterator[List[Server]]:
    started: List[Server] = []
    yield started
    for server in started:
        server.kill()


def _read(uri: str, folder: Path) -> Tuple[int, str]:
    """What an endpoint serves, by plain nbdcopy."""
    raw = folder / "read.raw"
    subprocess.run(["nbdcopy", uri, str(raw)], check=True, capture_output=True)
    return file_sha256(raw)


def test_an_endpoint_serves_the_snapshots_disk(
    app01: Proxy, modules: Modules, servers: List[Server], tmp_path: Path
) -> None:
    snapshot = modules.snapshot("one")
    app01.simulator.write("app01", 2000, 0)
    servers.append(Server(app01, 2000, snapshot))
    assert servers[0].said["transport"] == "hotadd" and servers[0].said["method"] == "proxy_hotadd"
    assert _read(servers[0].uri, tmp_path) == app01.simulator.disk("app01", 2000, snapshot)
    record = json.loads(next(app01.repository.glob("vms/*/runs/*.json")).read_text())
    intents = [intent for intent in record["intents"] if intent["what"] == "attachment"]
    assert [(intent["proxy_moid"], intent["vm_moid"], intent["access"]) for intent in intents] == [
        ("vm-109", "vm-101", "read")
    ]
    assert servers[0].end() == [] and app01.left() == []


def test_an_endpoint_for_writing_and_the_second_one_that_reads_back(
    restore01: Proxy, servers: List[Server], tmp_path: Path
) -> None:
    image = tmp_path / "new.raw"
    image.write_bytes(os.urandom(1 << 20) * 16 + b"x" * 67 * 512)
    servers.append(Server(restore01, 2001, writable=True))
    subprocess.run(["nbdcopy", "--flush", str(image), servers[0].uri], check=True, capture_output=True)
    assert servers[0].end() == []
    servers.append(Server(restore01, 2001))
    assert restore01.attachments()[0]["mode"] == "independent_nonpersistent"
    assert _read(servers[1].uri, tmp_path) == file_sha256(image)
    assert servers[1].end() == []
    assert restore01.simulator.disk("restore01", 2001) == file_sha256(image)


def test_a_device_that_does_not_appear_is_detached_again(
    app01: Proxy, modules: Modules, servers: List[Server], tmp_path: Path
) -> None:
    snapshot = modules.snapshot("one")
    servers.append(Server(app01, 2000, snapshot, device_dir=str(tmp_path), io_timeout=1))
    error = servers[0].said["error"]
    for words in ("'Hard disk 1'", "proxy01", "within 1 s", "disk.EnableUUID"):
        assert words in error, error
    assert app01.left() == []
    assert [item["what"] for item in app01.recover()["recovered"]] == []


def test_what_is_attached_already_is_not_read(app01: Proxy, modules: Modules, servers: List[Server]) -> None:
    """Somebody may have written to it, and will detach it at will."""
    snapshot = modules.snapshot("one")
    app01.attach(snapshot_moid=snapshot, disks=["2000"])
    servers.append(Server(app01, 2000, snapshot))
    assert "attached to the proxy already" in servers[0].said["error"]
    # It is not ours.
    assert app01.recover()["recovered"] == [] and len(app01.attachments()) == 1


def test_a_proxy_that_is_killed_with_a_disk_attached(
    app01: Proxy, restore01: Proxy, modules: Modules, servers: List[Server]
) -> None:
    begun = app01.recover(begin=True, point="one")["run"]
    snapshot = modules.snapshot(begun["snapshot_name"], begun["snapshot_description"])
    app01.simulator.write("app01", 2000, 0)
    now = app01.simulator.disk("app01", 2000)
    # Of others: another VM's disk, and one of the same VM that no record tells of would keep its snapshot.
    restore01.attach(disks=["2000"])
    servers.append(Server(app01, 2000, snapshot, run_id=begun["id"]))
    assert "uri" in servers[0].said, servers[0].said
    servers[0].kill()
    assert len(app01.attachments()) == 2
    before = app01.simulator.last_call()
    asked = {**app01.simulator.connection, "proxy_name": "proxy01", "repository": str(app01.repository)}
    told = modules.done("vadp_recover", **asked)
    assert [(disk["vm_name"], disk["run_id"], disk["mode"]) for disk in told["attached"]] == [
        ("restore01", None, "independent_nonpersistent"),
        ("app01", begun["id"], "independent_nonpersistent"),
    ]
    assert told["changed"] is False and told["announced"] == []
    listed = app01.recover(_ansible_check_mode=True)
    assert [(item["what"], item["action"]) for item in listed["recovered"] if item["what"] != "process"][:2] == [
        ("attachment", "would be detached"),
        ("snapshot", "would be removed"),
    ]
    assert app01.simulator.changing_calls(before) == []

    found = app01.recover()
    assert not found["failed"], found
    kinds = [(item["what"], item["action"]) for item in found["recovered"] if item["what"] != "process"]
    assert kinds[:2] == [("attachment", "detached"), ("snapshot", "removed")]
    named = next(item["id"] for item in found["recovered"] if item["what"] == "attachment")
    assert "[vmfs01] app01/app01.vmdk" in named and "proxy01" in named
    assert [item["path"] for item in app01.attachments()] == ["[vmfs01] restore01/restore01.vmdk"]
    assert app01.simulator.snapshots("app01") == []
    assert app01.simulator.vm("app01")["consolidation_needed"] is False
    assert app01.simulator.disk("app01", 2000) == now
    assert app01.recover()["changed"] is False
    restore01.detach()
    told = modules.done("vadp_recover", **asked)
    assert told["attached"] == told["announced"] == []


def test_a_proxy_that_is_reset_with_a_disk_attached_for_writing(
    restore01: Proxy, servers: List[Server], own_simulator: Simulator
) -> None:
    servers.append(Server(restore01, 2001, writable=True))
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", servers[0].uri], check=True, capture_output=True)
    servers[0].kill()
    own_simulator.control.call("crash_proxy")
    assert restore01.attachments()[0]["mode"] == "persistent"
    found = restore01.recover()["recovered"]
    assert ("attachment", "detached") in [(item["what"], item["action"]) for item in found]
    assert restore01.left() == []
    assert own_simulator.control.read("restore01", 2001, 0, 65536) == b"\7" * 65536
    own_simulator.control.call("power", vm="restore01", state="poweredOn")


def test_a_leftover_blocks_the_removal_of_the_snapshot_until_it_is_detached(
    app01: Proxy, modules: Modules, servers: List[Server]
) -> None:
    begun = app01.recover(begin=True, point="one")["run"]
    snapshot = modules.snapshot(begun["snapshot_name"], begun["snapshot_description"])
    app01.simulator.write("app01", 2000, 0)
    now = app01.simulator.disk("app01", 2000)
    servers.append(Server(app01, 2000, snapshot, run_id=begun["id"]))
    servers[0].kill()
    administrator = Administrator(app01.simulator.facts, "app01")
    administrator.remove_snapshot(snapshot)
    administrator.close()
    assert app01.simulator.vm("app01")["consolidation_needed"] is True
    found = app01.recover()
    assert not found["failed"], found
    kinds = [(item["what"], item["action"]) for item in found["recovered"] if item["what"] != "process"]
    assert kinds[:2] == [("attachment", "detached"), ("snapshot", "consolidated")]
    assert app01.simulator.vm("app01")["consolidation_needed"] is False
    assert app01.simulator.disk("app01", 2000) == now


# The modules that move data


def _export(modules: Modules, proxy: Proxy, **options: Any) -> Dict[str, Any]:
    """Options of an export by HotAdd, without VDDK."""
    return modules.export_options(transports=["hotadd"], vddk_libdir=None, **proxy.folders, **options)


def _when_attached(proxy: Proxy, process: Process, mode: str) -> None:
    deadline = time.monotonic() + 60
    while not any(item["mode"] == mode for item in proxy.attachments()):
        assert process.poll() is None and time.monotonic() < deadline, process.out
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_export_that_is_ended_with_its_disks_attached(
    app01: Proxy, modules: Modules, number: signal.Signals
) -> None:
    begun = app01.recover(begin=True, point="one")["run"]
    snapshot = modules.snapshot(begun["snapshot_name"], begun["snapshot_description"])
    app01.simulator.write("app01", 2000, 0)
    now = app01.simulator.disk("app01", 2000)
    process = modules.start("vadp_disk_export", _export(modules, app01, snapshot_moid=snapshot, rate_limit="1M"))
    _when_attached(app01, process, "independent_nonpersistent")
    os.kill(process.pid, number)
    process.wait()
    assert (app01.left() == []) == (number == signal.SIGTERM)
    found = app01.recover()
    assert not found["failed"], found
    assert [item["what"] for item in found["recovered"]].count("attachment") == (1 if number == signal.SIGKILL else 0)
    assert app01.left() == [] and app01.simulator.snapshots("app01") == []
    assert app01.simulator.vm("app01")["consolidation_needed"] is False
    assert app01.simulator.disk("app01", 2000) == now


def test_a_restore_that_was_killed_is_made_again(app01: Proxy, restore01: Proxy, modules: Modules) -> None:
    snapshot = modules.snapshot("one")
    assert not modules.run("vadp_disk_export", **_export(modules, app01, snapshot_moid=snapshot, point="one"))["failed"]
    options = {
        **restore01.options(),
        "repository": str(modules.repository),
        "vm_name": "app01",
        "point": "one",
        "target": "in_place",
        "overwrite": True,
        "disks": [{"key": 2000, "target_key": 2000}],
        "transports": ["hotadd"],
        "vddk_libdir": None,
    }
    process = modules.start("vadp_disk_restore", dict(options, rate_limit="1M"))
    _when_attached(restore01, process, "persistent")
    process.kill()
    assert len(restore01.attachments()) == 1
    done = modules.done("vadp_disk_restore", **options)
    assert [(disk["transport"], disk["method"], disk["verified"]) for disk in done["restored"]] == [
        ("hotadd", "proxy_hotadd", True)
    ]
    assert restore01.left() == []
    assert restore01.simulator.disk("restore01", 2000) == app01.simulator.disk("app01", 2000, snapshot)


# Two machines whose disks have one UUID, as clones made in the vSphere client have


class Twins:
    """app01 and restore01, both off; their disks 2000 have one UUID, and different bytes. vCenter answers slowly."""

    names = ("app01", "restore01")

    def __init__(self, simulator: Simulator, modules: Modules) -> None:
        self.simulator = simulator
        self.modules = {name: Modules(simulator, modules.repository, name) for name in self.names}
        uuid = simulator.vm("app01")["disks"][0]["uuid"]
        simulator.control.call("set_disk_uuid", vm="restore01", disk=2000, uuid=uuid)
        simulator.control.call("power", vm="app01", state="poweredOff")
        for seed, name in enumerate(self.names):
            simulator.write(name, 2000, 8 << 20, length=24 << 20, seed=500 + seed)

    def at_once(self, module: str, options: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
        """Both look before one of them is answered."""
        self.simulator.control.call("inject", target="call", name="ReconfigVM_Task", delay=2.0, count=2)
        started = {name: self.modules[name].start(module, options[name]) for name in self.names}
        results = {name: self.modules[name].result(process) for name, process in started.items()}
        self.simulator.control.call("clear_injections")
        return results


@pytest.fixture
def twins(own_simulator: Simulator, modules: Modules) -> Twins:
    return Twins(own_simulator, modules)


@pytest.mark.parametrize(
    "ways",
    [
        ("proxy_hotadd", "proxy_hotadd"),
        ("vddk", "vddk"),
        pytest.param(("vddk", "proxy_hotadd"), marks=pytest.mark.soak),
    ],
)
def test_two_disks_of_one_uuid_are_read_one_after_the_other(twins: Twins, app01: Proxy, ways: Tuple[str, str]) -> None:
    snapshots = {name: modules.snapshot("one") for name, modules in twins.modules.items()}
    options = {}
    for way, (name, modules) in zip(ways, twins.modules.items()):
        read = {"snapshot_moid": snapshots[name], "point": "one", "disks": ["2000"], "rate_limit": "16M"}
        options[name] = _export(modules, app01, **read)
        if way == "vddk":
            options[name]["vddk_libdir"] = twins.simulator.facts["vddk_libdir"]
    results = twins.at_once("vadp_disk_export", options)
    assert not any(result["failed"] for result in results.values()), results
    for name, modules in twins.modules.items():
        assert modules.backups.disk(name, 2000, "one") == twins.simulator.disk(name, 2000, snapshots[name]), name
    used = [result["disks"][0] for result in results.values()]
    assert [(disk["transport"], disk["method"]) for disk in used] == [("hotadd", way) for way in ways]
    assert app01.left() == []


def test_two_disks_of_one_uuid_are_written_one_after_the_other(twins: Twins, app01: Proxy) -> None:
    held = {name: twins.simulator.disk(name, 2000) for name in twins.names}
    for modules in twins.modules.values():
        snapshot = modules.snapshot("one")
        modules.done("vadp_disk_export", **_export(modules, app01, snapshot_moid=snapshot, point="one", disks=["2000"]))
        modules.remove_snapshot(snapshot)
    options = {}
    for seed, (name, modules) in enumerate(twins.modules.items()):
        twins.simulator.write(name, 2000, 8 << 20, length=24 << 20, seed=600 + seed)
        more = {"vm_name": name, "target": "in_place", "overwrite": True, "point": "one", "disks": [{"key": 2000}]}
        options[name] = _export(modules, app01, rate_limit="16M", **more)
    results = twins.at_once("vadp_disk_restore", options)
    assert {name: twins.simulator.disk(name, 2000) for name in twins.names} == held
    assert not any(result["failed"] for result in results.values()), results
    assert app01.left() == []


@pytest.mark.soak
def test_where_another_transport_can_do_it_the_second_disk_takes_that(
    twins: Twins, app01: Proxy, restore01: Proxy
) -> None:
    """After a minute: the disk of the same UUID stays attached."""
    restore01.attach(disks=["2000"])
    modules = twins.modules["app01"]
    snapshot = modules.snapshot("one")
    read: Dict[str, Any] = {"snapshot_moid": snapshot, "point": "one", "disks": ["2000"]}
    options = dict(_export(modules, app01, **read), transports=["hotadd", "nbdssl"])
    options["vddk_libdir"] = twins.simulator.facts["vddk_libdir"]
    disk = modules.done("vadp_disk_export", **options)["disks"][0]
    assert disk["transport"] == "nbdssl" and "has the same UUID" in str(disk["transport_reasons"]), disk
    assert modules.backups.disk("app01", 2000, "one") == twins.simulator.disk("app01", 2000, snapshot)
    assert len(app01.attachments()) == 1
