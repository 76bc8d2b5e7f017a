# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_disk_restore through ansible-playbook, against what the disks held when the restore point was made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from harness import Ansible, Control, Simulator, file_sha256, made_repository, plant_orphans

KEYS = (2000, 2001)
TO_RESTORE01 = [{"key": key, "target_key": key} for key in KEYS]


class Restores:
    """app01 was backed up fully and incrementally; ``expected`` holds its disks' SHA-256 by point and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.simulator = Simulator(folder / "state")
        self.ansible = Ansible(folder / "ansible")
        self.repository = folder / "repository"
        made_repository(self.repository)
        self.expected: Dict[str, Dict[int, str]] = {}
        control = self.simulator.control
        self.module("vm_change_tracking", name="app01", state="enabled")
        self.back_up("full")
        # Data over data, data where nothing was, zeros over data, the very last sector of a disk of odd size.
        control.call("guest_write", vm="app01", disk=2000, offset=3 << 20, pattern={"seed": 1, "length": 200000})
        control.call("guest_discard", vm="app01", disk=2000, offset=0, length=1 << 20)
        size = control.call("read_disk", vm="app01", disk=2001)["capacity_bytes"]
        control.call("guest_write", vm="app01", disk=2001, offset=size - 512, pattern={"seed": 2, "length": 512})
        self.back_up("incremental")

    def options(self, **options: Any) -> Dict[str, Any]:
        return {**self.simulator.connection, **options}

    def module(self, module: str, **options: Any) -> Dict[str, Any]:
        result = self.ansible.module(module, self.options(**options))
        assert not result["failed"], result
        return result

    def restore_options(self, **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        where = {"vddk_libdir": facts["vddk_libdir"], "nfc_port": facts["nfc_port"]}
        return self.options(repository=str(self.repository), vm_name="app01", **where, **options)

    def restore(self, check: bool = False, diff: bool = False, **options: Any) -> Dict[str, Any]:
        return self.ansible.module("vadp_disk_restore", self.restore_options(**options), check=check, diff=diff)

    def back_up(self, point: str) -> Dict[str, Any]:
        facts = self.simulator.facts
        snapshot = self.module("vm_snapshot", name="app01", snapshot_name=point)["snapshot"]["moid"]
        self.expected[point] = {key: self.sha256("app01", key, snapshot=snapshot) for key in KEYS}
        where = {"vddk_libdir": facts["vddk_libdir"], "nfc_port": facts["nfc_port"], "repository": str(self.repository)}
        result = self.module("vadp_disk_export", name="app01", snapshot_moid=snapshot, point=point, **where)
        self.module("vm_snapshot", name="app01", snapshot_moid=snapshot, state="absent")
        return result

    def sha256(self, vm: str, key: int, **fields: Any) -> str:
        return str(self.simulator.control.call("read_disk", vm=vm, disk=key, **fields)["sha256"])

    def held(self, vm: str) -> Dict[int, str]:
        return {key: self.sha256(vm, key) for key in KEYS}

    def fill(self, vm: str) -> None:
        """Old data all over the disks, which must not shine through."""
        for key in KEYS:
            size = self.simulator.control.call("read_disk", vm=vm, disk=key)["capacity_bytes"]
            offsets = list(range(0, size - 65536, 1 << 20)) + [size - 65536]
            pattern = {"seed": key, "length": 65536}
            self.simulator.control.call("guest_write", vm=vm, disk=key, offsets=offsets, pattern=pattern)

    def changing_calls(self, since: int) -> List[str]:
        calls = self.simulator.control.call("calls", since=since)
        return [call["method"] for call in calls if call["changing"] and call["method"] not in ("Login", "Logout")]

    @property
    def last_call(self) -> int:
        return max(call["seq"] for call in self.simulator.control.call("calls"))

    def runs(self) -> List[Dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.repository.glob("vms/*/runs/*.json"))]

    @property
    def uuid(self) -> str:
        return next(path.parent.name for path in self.repository.glob("vms/*/vm.json"))


@pytest.fixture(scope="module")
def restores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restores]:
    made = Restores(tmp_path_factory.mktemp("restores"))
    try:
        yield made
    finally:
        made.simulator.stop()


def test_image_files_hold_the_points_bytes(restores: Restores, tmp_path: Path) -> None:
    options = {"target": "file", "dest": str(tmp_path), "point": "incremental"}
    formats = [{"key": 2000}, {"key": 2001, "format": "qcow2"}]
    # No vCenter is needed: none of its options is given.
    offline = {"repository": str(restores.repository), "vm_name": "app01", **options, "disks": formats}
    planned = restores.ansible.module("vadp_disk_restore", offline, check=True)
    assert planned["changed"] and os.listdir(tmp_path) == []
    result = restores.ansible.module("vadp_disk_restore", offline)
    assert result["changed"] and [entry["verified"] for entry in result["restored"]] == [True, True]
    raw, qcow2 = (Path(entry["target"]) for entry in result["restored"])
    assert (raw.name, qcow2.name) == ("app01-hard-disk-1-2000.raw", "app01-hard-disk-2-2001.qcow2")
    assert file_sha256(raw)[1] == restores.expected["incremental"][2000]
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(flat)], check=True)
    assert file_sha256(flat)[1] == restores.expected["incremental"][2001]
    assert restores.ansible.module("vadp_disk_restore", offline)["changed"] is False
    vmdk = restores.restore(target="file", dest=str(tmp_path), point="full", format="vmdk", disks=[{"key": 2000}])
    target = vmdk["restored"][0]["target"]
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", target, str(flat)], check=True)
    assert file_sha256(flat)[1] == restores.expected["full"][2000] != restores.expected["incremental"][2000]


def test_another_machines_disks_become_those_of_the_point(restores: Restores) -> None:
    restores.fill("restore01")
    before = restores.held("restore01")
    options = {"target": "in_place", "name": "restore01", "disks": TO_RESTORE01, "overwrite": True}
    at = restores.last_call
    planned = restores.restore(check=True, diff=True, **options)
    assert planned["changed"] and restores.held("restore01") == before and not restores.changing_calls(at)
    assert planned["diff"]["after"]["restore01/Hard disk 1"].startswith("disk 2000 of restore point incremental")
    result = restores.restore(**options)
    assert not result["failed"], result
    assert restores.held("restore01") == restores.expected["incremental"]
    for entry, key in zip(result["restored"], KEYS):
        assert entry["verified"] is True and entry["transport"] == "nbdssl" and entry["key"] == key
        assert len(entry["transport_reasons"]) == 1 and entry["transport_reasons"][0].startswith("hotadd: ")
    assert not restores.runs() and "diff" not in result
    older = restores.restore(point="full", transports=["nbd"], **options)
    assert older["restored"][0]["transport"] == "nbd"
    assert restores.held("restore01") == restores.expected["full"]


def test_a_machines_own_disks_are_not_trusted_afterwards(restores: Restores) -> None:
    control = restores.simulator.control
    control.call("power", vm="app01", state="poweredOff")
    control.call("guest_write", vm="app01", disk=2000, offset=0, pattern={"seed": 9, "length": 1 << 20})
    untouched = restores.sha256("app01", 2001)
    planted = plant_orphans(restores.repository)
    # Without a name it is the machine that the point came from, and the disk of the same key, by its UUID.
    result = restores.restore(target="in_place", disks=[{"key": 2000}], overwrite=True)
    assert not any(path.exists() for path in planted)
    assert not result["failed"] and result["restored"][0]["target"] == "app01/Hard disk 1"
    assert restores.sha256("app01", 2000) == restores.expected["incremental"][2000]
    assert restores.sha256("app01", 2001) == untouched
    trust = json.loads((restores.repository / "vms" / restores.uuid / "trust.json").read_text())
    assert [entry["key"] for entry in trust["not_trusted"]] == [2000]
    modes = {disk["key"]: disk["mode"] for disk in restores.back_up("after-restore")["disks"]}
    # Change tracking is the whole machine's, and began anew.
    assert modes == {2000: "full", 2001: "full"}


def test_what_speaks_against_a_restore_is_said_and_nothing_is_touched(restores: Restores) -> None:
    control = restores.simulator.control
    control.call("power", vm="restore01", state="poweredOff")
    restores.fill("restore01")
    held = restores.held("restore01")
    good = {"target": "in_place", "name": "restore01", "disks": TO_RESTORE01, "overwrite": True}

    def refused(*cases: Tuple[str, Dict[str, Any]]) -> None:
        """Each option set is refused with a word of why; the first one in check mode too."""
        at = restores.last_call
        tasks = [
            {
                "name": "restore",
                "openvadp.backup.vadp_disk_restore": restores.restore_options(**{**good, **options}),
                "check_mode": check,
                "ignore_errors": True,
            }
            for check, options in [(True, cases[0][1])] + [(False, options) for _word, options in cases]
        ]
        outcome = restores.ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}])
        results = outcome.results("vadp_disk_restore")
        words = [cases[0][0]] + [word for word, _options in cases]
        assert len(results) == len(words), str(outcome)
        for word, result in zip(words, results):
            assert "error" in result and word in result["msg"], (word, result)
        assert not restores.changing_calls(at)
        assert not restores.runs() and restores.held("restore01") == held

    layer = restores.repository / "vms" / restores.uuid / "disk-2000" / "full.qcow2"
    content = layer.read_bytes()
    layer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        refused(("full.qcow2", {"point": "incremental"}))
    finally:
        layer.write_bytes(content)
    refused(
        ("overwrite", {"overwrite": False}),
        ("give disks with key 2000 and target_key 2000", {"disks": []}),
        ("the sizes must be equal", {"disks": [{"key": 2000, "target_key": 2001}]}),
        ("it has no disk 2005", {"disks": [{"key": 2000, "target_key": 2005}]}),
        ("holds no such disk", {"disks": [{"key": 2005}]}),
        ("not on 'nfs01'", {"disks": [{"key": 2000, "target_key": 2000, "datastore": "nfs01"}]}),
        ("Add nbdssl", {"transports": ["san"]}),
        ("required transport", {"require_transport": True}),
        ("no such virtual machine", {"name": "unknown"}),
        ("no such restore point", {"point": "unknown"}),
    )
    control.call("power", vm="restore01", state="poweredOn")
    refused(("it is poweredOn: power it off", {}))
    control.call("power", vm="restore01", state="poweredOff")
    restores.module("vm_snapshot", name="restore01", snapshot_name="mine")
    refused(("it has 1 snapshots ('mine')", {}))
    # The snapshot is out of the tree, but its deltas are still there.
    restores.module("vm_snapshot", name="restore01", snapshot_name="mine", state="absent", consolidate=False)
    refused(("need consolidation", {}))
    restores.module("vm_snapshot", name="restore01", snapshot_name="mine", state="absent")


def test_bytes_that_are_not_the_points_are_found_when_read_back(restores: Restores) -> None:
    """Somebody writes to the disk while it is restored."""
    restores.simulator.control.call("power", vm="restore01", state="poweredOff")
    options = {"target": "in_place", "name": "restore01", "disks": TO_RESTORE01, "overwrite": True, "point": "full"}
    over = threading.Event()

    def scribble() -> None:
        with Control(restores.simulator.facts["control_socket"]) as control:
            while not over.is_set():
                control.call("guest_write", vm="restore01", disk=2000, offset=(1 << 20) + 7, data=b"scribble")

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        result = restores.restore(**options)
    finally:
        over.set()
        scribbler.join()
    assert result["failed"] and "differ from byte 1048576 on when read back" in result["msg"], result
    assert result["error"]["details"] == {"offset": 1 << 20}
    assert [intent["half_written"] for run in restores.runs() for intent in run["intents"]] == [[2000]]
    assert not restores.restore(**options)["failed"] and not restores.runs()


def test_a_restore_that_is_killed_is_on_record_and_converges(restores: Restores) -> None:
    restores.simulator.control.call("power", vm="restore01", state="poweredOff")
    restores.fill("restore01")
    options = {"target": "in_place", "name": "restore01", "disks": TO_RESTORE01, "overwrite": True, "point": "full"}
    task = {
        "name": "restore",
        "openvadp.backup.vadp_disk_restore": restores.restore_options(rate_limit="4M", **options),
    }
    running = restores.ansible.start([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}])
    deadline = time.monotonic() + 60
    while not [run for run in restores.runs() for intent in run["intents"] if intent.get("half_written")]:
        assert running.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    record = restores.runs()[0]
    os.kill(record["pid"], signal.SIGKILL)
    assert running.wait().rc != 0
    assert [intent["half_written"] for intent in record["intents"] if intent["what"] == "restore"] == [[2000]]
    processes = [intent for intent in record["intents"] if intent["what"] == "process"]
    assert len(processes) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process['pid']}").exists() for process in processes):
        assert time.monotonic() < deadline, "a child outlived the module"
        time.sleep(0.1)
    assert restores.runs() == [record]
    result = restores.restore(**options)
    assert not result["failed"], result
    assert restores.held("restore01") == restores.expected["full"] and not restores.runs()
