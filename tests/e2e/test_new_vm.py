# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_disk_restore with target new_vm: bytes, configuration and NVRAM against those of the machine backed up."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from administrator import Administrator
from ansible_collections.openvadp.backup.plugins.module_utils.restore.new_vm_diff import differences
from harness import Simulator, made_repository
from modules import Modules

KEYS = (2000, 2001)
ISO = "[nfs01] iso/setup.iso"
# As the API shows a folder "a/b"; there is a folder b in a folder a, too.
FOLDER = "/DC0/vm/a%2fb"
# One disk of 16 MiB, where it does not matter which.
SMALL: Dict[str, Any] = {"disks": [{"key": 2001}]}
TAGS = [["Backup", "daily"], ["Owner", "web"]]


class NewMachines:
    """app01 with all that a machine may have, backed up fully and incrementally."""

    def __init__(self, folder: Path) -> None:
        self.simulator = Simulator(folder / "state")
        repository = folder / "repository"
        made_repository(repository)
        self.modules = Modules(self.simulator, repository)
        iso = self.file(ISO)
        iso.parent.mkdir()
        iso.write_bytes(b"an image")
        self.administrator = Administrator(self.simulator.facts, "app01")
        self.administrator.furnish(ISO)
        self.administrator.describe(owner="team web", room="B 12")
        self.administrator.move_beside("a/b", "a", "b")
        self.control = self.simulator.control
        for category, name in TAGS:
            self.control.call("make_tag", category=category, name=name)
            self.control.call("attach_tag", vm="app01", category=category, name=name)
        # What a backup notes on a machine is saved with its configuration, and is not true of another machine.
        self.control.call("set_extra_config", vm="app01", settings={"openvadp.mark.of-a-disk": "1", "mine": "2"})
        self.modules.track_changes()
        self.third = next(key for key in self.keys("app01") if key not in KEYS)
        self.simulator.write("app01", self.third, 0, 1 << 20, seed=3)
        self.modules.point("full")
        self.simulator.write("app01", 2000, 3 << 20, seed=4, length=200000)
        self.control.call("guest_discard", vm="app01", disk=2000, offset=0, length=1 << 20)
        size = self.simulator.disk("app01", 2001)[0]
        self.simulator.write("app01", 2001, size - 512, seed=5, length=512)
        self.modules.point("incremental", mode="incremental")
        self.modules.point("differential", mode="differential")
        self.app01 = self.administrator.config()
        self.nvram = self.file("[vmfs01] app01/app01.nvram").read_bytes()

    def close(self) -> None:
        self.administrator.close()
        self.simulator.stop()

    def file(self, path: str) -> Path:
        datastore, inside = path[1:].split("] ")
        return self.simulator.state / "datastores" / datastore / inside

    def keys(self, vm: str) -> List[int]:
        return [disk["key"] for disk in self.simulator.vm(vm)["disks"]]

    def names(self) -> List[str]:
        return sorted(vm["name"] for vm in self.control.call("state")["vms"].values())

    def settings(self, vm: str) -> Dict[str, str]:
        """The advanced settings that are ours."""
        found = self.simulator.vm(vm)["extra_config"]
        return {key: value for key, value in found.items() if key.startswith("openvadp.")}

    def held(self, vm: str) -> Dict[int, Any]:
        return {key: self.simulator.disk(vm, key) for key in self.keys(vm)}

    def options(self, name: Optional[str], **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        return {
            **self.simulator.connection,
            "repository": str(self.modules.repository),
            "vm_name": "app01",
            "vddk_libdir": facts["vddk_libdir"],
            "nfc_port": facts["nfc_port"],
            "transports": ["nbdssl"],
            "target": "new_vm",
            **({} if name is None else {"name": name}),
            **options,
        }

    def make(self, name: Optional[str], **options: Any) -> Dict[str, Any]:
        return self.modules.done("vadp_disk_restore", **self.options(name, **options))

    def refused(self, word: str, **options: Any) -> Dict[str, Any]:
        """Refused with a word of why, and nothing was changed, in vCenter or in the repository."""
        at, before = self.simulator.last_call(), self.modules.tree()
        result = self.modules.run("vadp_disk_restore", **self.options(options.pop("name", "refused"), **options))
        assert result["failed"] and word in result["msg"], result
        assert not self.simulator.changing_calls(at) and self.modules.tree() == before
        return result

    def destroy(self, name: str) -> None:
        self.administrator.destroy(name)

    def runs(self) -> List[Dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.modules.repository.glob("vms/*/runs/*.json"))]

    def stores(self) -> List[str]:
        return sorted(path.name for path in (self.modules.repository / "vms").iterdir())


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewMachines]:
    made = NewMachines(tmp_path_factory.mktemp("new-vm"))
    try:
        yield made
    finally:
        made.close()


def test_a_new_machine_is_the_old_one_but_for_what_must_differ(machines: NewMachines) -> None:
    for point in ("full", "incremental", "differential"):
        result = machines.make(f"copy-{point}", point=point)
        assert result["changed"] and result["vm"]["path"] == f"{FOLDER}/copy-{point}"
        assert machines.held(f"copy-{point}") == machines.modules.held[point]
        assert [entry["verified"] for entry in result["restored"]] == [True, True, True]
    told = "\n".join(str(one) for one in result["warnings"])
    for word in ("VirtualSerialPort", "VirtualUSB", "Set mac_addresses to new if both are to run"):
        assert word in told, told
    assert "configuration differs" not in told, told
    copy = machines.administrator.config(result["vm"]["moid"])
    told_of = {device.key for device in machines.app01.hardware.device if "Serial" in type(device).__name__}
    told_of |= {device.key for device in machines.app01.hardware.device if type(device).__name__.endswith("VirtualUSB")}
    found = differences(machines.app01, copy, {"name", "mac_taken"}, told_of)
    print("\n" + "\n".join(str(difference) for difference in found))
    assert [str(difference) for difference in found if difference.reason is None] == []
    paths = {difference.path for difference in found}
    assert {"instanceUuid", "name", "hardware.device[2000].backing.uuid", "changeTrackingEnabled"} <= paths
    assert machines.administrator.attributes(result["vm"]["moid"]) == {"owner": "team web", "room": "B 12"}
    assert machines.control.call("tags", vm="copy-differential") == TAGS
    assert not machines.settings("copy-full") and machines.settings("app01")
    assert machines.simulator.vm("copy-full")["extra_config"]["mine"] == "2"
    assert copy.uuid == machines.app01.uuid and copy.annotation == machines.app01.annotation
    assert [card.macAddress for card in copy.hardware.device if hasattr(card, "macAddress")][1] == "00:50:56:11:22:33"
    assert [entry.deviceKey for entry in copy.bootOptions.bootOrder if hasattr(entry, "deviceKey")] == [2000]
    folder = copy.files.vmPathName.rsplit("/", 1)[0]
    assert machines.file(f"{folder}/copy-differential.nvram").read_bytes() == machines.nvram
    assert machines.stores() == [machines.app01.instanceUuid]
    for point in ("full", "incremental", "differential"):
        machines.destroy(f"copy-{point}")


def test_to_another_place_with_other_networks_and_disks(machines: NewMachines) -> None:
    """Folder, host, datastores, thick and thin, some of the disks; the addresses are new on request."""
    result = machines.make(
        "moved",
        folder="/DC0/vm",
        esxi_hostname="127.0.1.2",
        datastore="nfs01",
        disks=[{"key": 2000, "datastore": "vmfs01", "provisioning": "thick"}, {"key": 2001}],
        networks={"VM Network": "Backup Network"},
        mac_addresses="new",
        bios_uuid="new",
        point="full",
    )
    assert result["vm"]["path"] == "/DC0/vm/moved" and result["vm"]["host"] == "127.0.1.2"
    state = machines.simulator.vm("moved")
    assert {disk["key"]: disk["path"].split("]")[0] for disk in state["disks"]} == {2000: "[vmfs01", 2001: "[nfs01"}
    config = machines.administrator.config(result["vm"]["moid"])
    assert config.files.vmPathName.startswith("[nfs01] moved/")
    thin = {device.key: device.backing.thinProvisioned for device in config.hardware.device if device.key in KEYS}
    assert thin == {2000: False, 2001: True}
    cards = [device for device in config.hardware.device if hasattr(device, "macAddress")]
    before = [device.macAddress for device in machines.app01.hardware.device if hasattr(device, "macAddress")]
    assert cards[0].backing.deviceName == "Backup Network" and cards[1].backing.port.portgroupKey
    assert not {card.macAddress for card in cards} & set(before)
    assert config.uuid != machines.app01.uuid
    assert machines.held("moved") == {key: machines.modules.held["full"][key] for key in KEYS}
    assert "it is not restored" in str(result["warnings"])
    assert [one for one in result["differences"] if one["reason"] is None] == []
    machines.destroy("moved")


@pytest.mark.parametrize("method", ["vddk", "proxy_hotadd"])
def test_by_hotadd(machines: NewMachines, method: str) -> None:
    """A proxy that is a virtual machine attaches the new disks, with VDDK and without."""
    facts = machines.simulator.facts
    where = {"device_dir": facts["device_dir"], "sysfs_dir": facts["sysfs_dir"], "transports": ["hotadd"]}
    if method == "proxy_hotadd":
        where["vddk_libdir"] = None
    result = machines.make("attached", point="differential", **where, **SMALL)
    assert {(entry["transport"], entry["method"]) for entry in result["restored"]} == {("hotadd", method)}
    assert machines.held("attached") == {2001: machines.modules.held["differential"][2001]}
    assert not machines.runs() and machines.control.call("attachments") == []
    machines.destroy("attached")


def test_bad_input_is_refused_before_anything_is_made(machines: NewMachines) -> None:
    control = machines.control
    planned = machines.modules.run("vadp_disk_restore", **machines.options("planned"), _ansible_check_mode=True)
    assert planned["changed"] and planned["vm"]["moid"] is None and "planned" not in machines.names()
    machines.refused("a virtual machine of this name already", name="app01")
    machines.refused("there is no datastore 'vmfs99'", datastore="vmfs99")
    machines.refused("there is no datastore 'nfs99'", disks=[{"key": 2000, "datastore": "nfs99"}])
    machines.refused("there is no network 'lab'", networks={"VM Network": "lab"})
    machines.refused("connected to a network of networks", networks={"VM Netwrok": "Backup Network"})
    machines.refused("there is no folder 'nowhere'", folder="nowhere")
    machines.refused("there is no datacenter 'DC9'", datacenter="DC9")
    machines.refused("there is no cluster 'Cluster9'", cluster="Cluster9")
    machines.refused("there is no host '127.0.1.9'", esxi_hostname="127.0.1.9")
    machines.refused("there is no resource pool 'silver'", resource_pool="silver")
    machines.refused("does not see datastore 'local01'", datastore="local01", esxi_hostname="127.0.1.2")
    machines.refused("holds no such disk", disks=[{"key": 2005}])
    machines.refused("network addresses of one that runs", power_on=True)
    machines.refused("Add nbdssl", transports=["san"])
    machines.refused("name a virtual machine that exists", name=None, moid="vm-101")
    machines.refused("is for target=new_vm", target="in_place", overwrite=True, cluster="Cluster0")
    control.call("set_full", datastore="vmfs01", full=True)
    machines.refused("has 0 bytes free")
    control.call("set_full", datastore="vmfs01", full=False)
    for name in ("127.0.1.1", "127.0.1.2"):
        control.call("set_host", name=name, maintenance=True)
    machines.refused("is in maintenance mode")
    for name in ("127.0.1.1", "127.0.1.2"):
        control.call("set_host", name=name, maintenance=False)
    store = machines.modules.repository / "vms" / machines.app01.instanceUuid
    for path in (store / "disk-2000" / "full.qcow2", store / "configs" / "full.json", store / "configs" / "full.nvram"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        try:
            machines.refused("damaged", point="full")
        finally:
            path.write_bytes(content)
    control.call("set_privileges", username=machines.simulator.facts["backup_username"], remove=["Network.Assign"])
    failed = machines.modules.run("vadp_disk_restore", **machines.options("unprivileged"))
    assert failed["failed"] and "Network.Assign" in failed["msg"] and "unprivileged" not in machines.names()
    control.call("set_privileges", username=machines.simulator.facts["backup_username"], add=["Network.Assign"])
    assert not machines.runs() and machines.stores() == [machines.app01.instanceUuid]


def test_a_second_machine_of_a_name_only_if_told(machines: NewMachines) -> None:
    options = {"point": "full", "allow_duplicate_name": True}
    failed = machines.modules.run("vadp_disk_restore", **machines.options("app01", **options))
    assert failed["failed"] and "DuplicateName" in failed["msg"], failed["msg"]
    result = machines.make("restore01", folder=FOLDER, **options)
    assert "another virtual machine 'restore01'" in str(result["warnings"])
    assert machines.names().count("restore01") == 2
    machines.administrator.destroy_moid(result["vm"]["moid"])


def test_what_fails_on_the_way_is_removed_or_kept(machines: NewMachines) -> None:
    control, names = machines.control, machines.names()
    folders = [machines.file("[vmfs01] broken"), machines.file("[nfs01] broken")]
    # The last step, when all disks are written.
    control.call("inject", target="task", name="ReconfigVM_Task", fault="vim.fault.InvalidDeviceSpec")
    result = machines.modules.run("vadp_disk_restore", **machines.options("broken", **SMALL))
    assert result["failed"] and "The machine that was half restored was removed" in result["msg"], result["msg"]
    assert machines.names() == names and not machines.runs()
    # Of its files only those stay that the message names.
    left = [path.name for folder in folders for path in folder.glob("*")]
    assert all(name in result["msg"] and not name.endswith(".vmdk") for name in left), left
    control.call("inject", target="task", name="ReconfigVM_Task", fault="vim.fault.InvalidDeviceSpec")
    result = machines.modules.run("vadp_disk_restore", **machines.options("broken", **SMALL, on_failure="keep"))
    assert result["failed"] and "is kept, as on_failure says" in result["msg"], result["msg"]
    assert machines.names() == sorted([*names, "broken"]) and not machines.runs()
    # What is kept on purpose is nobody's of ours to remove any more.
    assert not machines.settings("broken")
    machines.destroy("broken")
    control.call("inject", target="task", name="CreateVM_Task", fault="vim.fault.NoDiskSpace")
    result = machines.modules.run("vadp_disk_restore", **machines.options("broken", **SMALL))
    assert result["failed"] and "NoDiskSpace" in result["msg"] and machines.names() == names
    # The datastore is full in the middle of a disk.
    control.call("nfc", write_faults={"count": -1, "vix": 8})
    result = machines.modules.run("vadp_disk_restore", **machines.options("broken", io_timeout=5, **SMALL))
    control.call("nfc", clear_faults=True)
    assert result["failed"] and "half restored was removed" in result["msg"] and machines.names() == names, result[
        "msg"
    ]
    # More than once: a server that refuses before it has read all may cut the connection, and that is tried again.
    control.call("inject", target="call", name="PUT /folder", fault="vim.fault.NoPermission", count=9)
    result = machines.modules.run("vadp_disk_restore", **machines.options("broken", **SMALL))
    control.call("clear_injections")
    assert result["failed"] and machines.names() == names, result
    # An answer that is lost after the call was done: the machine is found, and not made twice.
    control.call("inject", target="call", name="CreateVM_Task", fault="lost")
    machines.make("broken", **SMALL)
    assert machines.names() == sorted([*names, "broken"])
    machines.destroy("broken")
    # It is whole, and only its start failed: it stays.
    control.call("inject", target="task", name="PowerOnVM_Task", fault="vim.fault.InsufficientResourcesFault")
    result = machines.modules.run(
        "vadp_disk_restore", **machines.options("broken", **SMALL, mac_addresses="new", power_on=True)
    )
    assert result["failed"] and "is restored, but it was not started" in result["msg"], result["msg"]
    assert machines.held("broken") == {2001: machines.modules.held["differential"][2001]} and not machines.runs()
    assert not machines.settings("broken"), "the mark goes before the start"
    machines.destroy("broken")
    # Its removal fails too: the next run does that.
    control.call("inject", target="task", name="ReconfigVM_Task", fault="vim.fault.InvalidDeviceSpec", count=2)
    result = machines.modules.run("vadp_disk_restore", **machines.options("broken", **SMALL))
    assert result["failed"] and "could not be removed" in result["msg"] and len(machines.runs()) == 1, result["msg"]
    machines.make("broken", **SMALL)
    assert machines.names() == sorted([*names, "broken"]) and not machines.runs()
    machines.destroy("broken")
    assert machines.stores() == [machines.app01.instanceUuid]


def test_a_restore_that_is_killed_is_taken_away_by_the_next(machines: NewMachines) -> None:
    names = machines.names()
    options = machines.options("killed", point="full", **SMALL)

    def kill_when(condition: str) -> Dict[str, Any]:
        process = machines.modules.start("vadp_disk_restore", {**options, "rate_limit": "4M"})
        deadline = time.monotonic() + 60
        while True:
            found = [intent for run in machines.runs() for intent in run["intents"] if intent["what"] == "restore"]
            if found and (condition == "recorded" or found[0][condition]):
                break
            assert process.poll() is None and time.monotonic() < deadline, process.out
            time.sleep(0.01)
        record = machines.runs()[0]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return record

    for condition in ("recorded", "vm_moid", "half_written"):
        record = kill_when(condition)
        assert len(machines.runs()) == 1
        if record["intents"][0]["vm_moid"] is None:
            # Killed while it was being made: whose it is can't be proved, so it is named and left.
            deadline = time.monotonic() + 60
            while machines.control.call("state")["tasks"] and time.monotonic() < deadline:
                time.sleep(0.1)
            if "killed" in machines.names():
                result = machines.modules.run("vadp_disk_restore", **options)
                assert result["failed"] and "was not recorded" in result["msg"] and "killed" in machines.names(), result
                machines.destroy("killed")
        elif condition != "recorded":
            mark = f"openvadp.new.{record['repository_id']}"
            assert machines.settings("killed") == {mark: record["run_id"].lower()}
        result = machines.modules.done("vadp_disk_restore", **options)
        assert machines.held("killed") == {2001: machines.modules.held["full"][2001]}, record
        assert machines.names() == sorted([*names, "killed"]) and not machines.runs()
        assert machines.stores() == [machines.app01.instanceUuid]
        assert result["vm"]["instance_uuid"] != record["vm_uuid"]
        machines.destroy("killed")
    # vadp_recover, asked for that machine, does the same.
    kill_when("half_written")
    where = dict(machines.simulator.connection, name="killed", repository=str(machines.modules.repository))
    recovered = machines.modules.done("vadp_recover", **where)["recovered"]
    (action,) = [item["action"] for item in recovered if item["what"] == "new_vm"]
    assert action.startswith("removed") and machines.names() == names and not machines.runs(), recovered
    # One that somebody has started is nobody's of ours any more, on or off, now and with a copy of its record.
    record = kill_when("half_written")
    path = machines.modules.repository / "vms" / record["vm_uuid"] / "runs" / f"{record['run_id']}.json"
    copy = path.read_bytes()
    machines.control.call("power", vm="killed", state="poweredOn")
    told = machines.modules.done("vadp_recover", **where)
    assert "new_vm" not in str(told["recovered"]) and "somebody has started it" in str(told["warnings"])
    assert not machines.runs()
    machines.control.call("power", vm="killed", state="poweredOff")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(copy)
    told = machines.modules.done("vadp_recover", **where)
    assert "new_vm" not in str(told["recovered"]) and "files of a machine that was started" in str(told["warnings"])
    assert "killed" in machines.names() and not machines.runs()
    machines.destroy("killed")


def test_an_original_that_is_gone_comes_back_under_its_own_name(machines: NewMachines) -> None:
    """The last of this file: app01 is another machine afterwards."""
    machines.control.call("power", vm="app01", state="poweredOff")
    machines.destroy("app01")
    machines.administrator.forget_attribute("room")
    machines.control.call("remove_tag", category="Owner")
    result = machines.make(None, point="incremental", power_on=True)
    assert machines.administrator.attributes(result["vm"]["moid"]) == {"owner": "team web"}
    assert "Custom attribute 'room' with the value 'B 12' was not restored: vCenter has no such" in str(
        result["warnings"]
    )
    assert machines.control.call("tags", vm="app01") == TAGS[:1]
    assert "Tag 'web' of category 'Owner' was not restored: vCenter shows no such category" in str(result["warnings"])
    lost = {one["path"]: one["reason"] for one in result["differences"] if one["path"].startswith("tags")}
    assert lost == {"tags[Owner/web]": "a warning reports it"}
    assert result["vm"]["path"] == f"{FOLDER}/app01"
    assert machines.simulator.vm("app01")["power_state"] == "poweredOn"
    copy = machines.administrator.config(result["vm"]["moid"])
    told_of = {device.key for device in machines.app01.hardware.device if "Serial" in type(device).__name__}
    told_of |= {device.key for device in machines.app01.hardware.device if type(device).__name__.endswith("VirtualUSB")}
    found = differences(machines.app01, copy, set(), told_of)
    assert [str(difference) for difference in found if difference.reason is None] == []
    assert not [difference.path for difference in found if "macAddress" in difference.path or difference.path == "name"]
    assert machines.file(copy.files.vmPathName[: -len(".vmx")] + ".nvram").read_bytes() == machines.nvram
