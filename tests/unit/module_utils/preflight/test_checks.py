# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Checks that are pure functions of what was read."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.preflight import hosts, machine, server
from ansible_collections.openvadp.backup.plugins.module_utils.preflight.checks import Check, is_ready
from ansible_collections.openvadp.backup.plugins.module_utils.preflight.network import Reached
from ansible_collections.openvadp.backup.plugins.module_utils.preflight.plans import DiskOutcome
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import clock
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef
from pyVmomi import vim

UTC = datetime.timezone.utc
NOW = datetime.datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
Backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo


def disk(key: int = 2000, file: str = "[vmfs01] app01/app01.vmdk", **backing: Any) -> Any:
    return vim.vm.device.VirtualDisk(
        key=key,
        controllerKey=1000,
        unitNumber=key - 2000,
        capacityInBytes=10 << 30,
        deviceInfo=vim.Description(label=f"Hard disk {key - 1999}", summary=""),
        backing=Backing(**{"fileName": file, "diskMode": "persistent", **backing}),
    )


def values(*devices: Any, **changed: Any) -> Dict[str, Any]:
    known: Dict[str, Any] = {
        "snapshot": None,
        "recentTask": [],
        "runtime.powerState": "poweredOn",
        "runtime.consolidationNeeded": False,
        "guest.toolsRunningStatus": "guestToolsRunning",
        "config.template": False,
        "config.hardware.device": list(devices) or [disk()],
        "config.changeTrackingEnabled": True,
        "capability.changeTrackingSupported": True,
        "runtime.connectionState": "connected",
        "runtime.host": None,
        "disabledMethod": [],
        "datastore": [],
        "summary.storage.committed": 4 << 30,
    }
    known.update({path.replace("__", "."): value for path, value in changed.items()})
    return known


def machine_of(*devices: Any, free: Optional[int] = 100 << 30, **changed: Any) -> machine.Machine:
    vm = VmRef(vim.VirtualMachine("vm-1"), "vm-1", "app01", "/DC0/vm/app01", "DC0", "i-uuid", "b-uuid")
    made = machine.Machine.of(vm, values(*devices, **changed))
    made.stores = [machine.Store("datastore-1", "vmfs01", free, True, ["host-1"])]
    return made


def found(checks: Any, code: str) -> List[Tuple[str, str]]:
    return [(check.severity, check.evidence) for check in checks if check.code == code]


def tree(*snapshots: Tuple[str, str], depth: bool = False) -> Any:
    nodes: List[Any] = []
    for number, (name, description) in enumerate(snapshots):
        node = vim.vm.SnapshotTree(
            snapshot=vim.vm.Snapshot(f"snapshot-{number}"), name=name, description=description, createTime=NOW
        )
        if depth and nodes:
            nodes[-1].childSnapshotList = [node]
        nodes.append(node)
    return vim.vm.SnapshotInfo(
        rootSnapshotList=nodes[:1] if depth else nodes, currentSnapshot=nodes[-1].snapshot if nodes else None
    )


def test_a_machine_that_is_as_it_should_be() -> None:
    checks = list(machine.checks_of(machine_of(disk(changeId="52 de/1"))))
    assert {check.severity for check in checks} == {"ok"} and is_ready(checks)


TEMPLATE = {"config__template": True, "runtime__powerState": "poweredOff"}
OURS = '{"by": "openvadp.backup", "repository_id": "r", "run_id": "1", "point": "p"}'


@pytest.mark.parametrize(
    ("changed", "code", "severity", "words"),
    [
        ({"runtime__connectionState": "orphaned"}, "vm", "error", "orphaned"),
        ({**TEMPLATE}, "vm", "ok", "a template, 1 disks can be backed up"),
        ({**TEMPLATE, "snapshot": tree(("s", ""))}, "vm", "error", "it is a template, and it has snapshots: 's'"),
        ({**TEMPLATE}, "change_tracking", "warning", "each backup is a full one"),
        ({**TEMPLATE, "free": 1 << 20}, "datastore_space", "ok", "no room for a snapshot"),
        ({"capability__changeTrackingSupported": False}, "change_tracking", "warning", "hardware"),
        ({"config__changeTrackingEnabled": False}, "change_tracking", "ok", "first backup"),
        ({"config__changeTrackingEnabled": True}, "change_tracking", "warning", "not effective"),
        ({"snapshot": tree(("mine", ""))}, "change_tracking", "warning", "misses changes"),
        ({"snapshot": tree(("mine", ""))}, "snapshots", "warning", "'mine' (snapshot-0)"),
        ({"snapshot": tree(("ours", OURS))}, "snapshots", "warning", "of ours"),
        ({"snapshot": tree(*[("s", "")] * 32, depth=True)}, "snapshots", "error", "32 is the limit"),
        ({"guest__toolsRunningStatus": "guestToolsNotRunning"}, "quiescing", "warning", "crash-consistent"),
        ({"runtime__powerState": "suspended"}, "quiescing", "warning", "suspended"),
        ({"runtime__powerState": "poweredOff"}, "quiescing", "ok", "consistent"),
        ({"runtime__consolidationNeeded": True}, "consolidation", "warning", "still there"),
        ({"disabledMethod": ["RelocateVM_Task"]}, "storage_vmotion", "warning", "disabled"),
        ({"free": 1 << 30}, "datastore_space", "ok", "free"),
        ({"free": 500 << 20}, "datastore_space", "warning", "a tenth"),
        ({"free": 50 << 20}, "datastore_space", "error", "no room"),
        ({"free": None}, "datastore_space", "not_checked", "does not report"),
    ],
)
def test_each_finding(changed: Dict[str, Any], code: str, severity: str, words: str) -> None:
    if changed.get("config__changeTrackingEnabled") is None:
        changed = {**changed, "config__hardware__device": [disk(changeId="52 de/1")]}
    said = found(machine.checks_of(machine_of(**changed)), code)
    assert (severity, words) in [(found_severity, words if words in text else text) for found_severity, text in said]


def test_a_machine_without_a_disk_that_a_snapshot_holds() -> None:
    checks = list(machine.checks_of(machine_of(disk(diskMode="independent_persistent"))))
    assert found(checks, "vm") == [("error", "it has no disk that a snapshot holds")]
    assert found(checks, "disk")[0][0] == "warning"


# Leftovers


def other(*devices: Any, state: str = "poweredOn") -> Dict[str, Dict[str, Any]]:
    read = {"name": "proxy01", "runtime.powerState": state, "config.hardware.device": list(devices)}
    return {"vm-9": read, "vm-1": {"name": "app01", "config.hardware.device": [disk()]}}


def test_a_disk_that_is_attached_elsewhere() -> None:
    app = machine_of()
    assert found(machine.leftovers(app, other(disk())), "leftovers")[0][0] == "error"
    assert found(machine.leftovers(app, other(disk(), state="poweredOff")), "leftovers")[0][0] == "warning"
    assert found(machine.leftovers(app, other(disk(file="[vmfs01] other/other.vmdk"))), "leftovers")[0][0] == "ok"
    assert found(machine.leftovers(app, None), "leftovers")[0][0] == "not_checked"
    assert "3 machines" in found(machine.leftovers(app, other(), 3), "leftovers")[0][1]


def test_a_base_below_a_snapshot_that_is_attached_elsewhere() -> None:
    app = machine_of(
        disk(file="[vmfs01] app01/app01-000001.vmdk", parent=Backing(fileName="[vmfs01] app01/app01.vmdk"))
    )
    assert found(machine.leftovers(app, other(disk())), "leftovers")[0][0] == "error"
    redo = disk(
        file="[vmfs01] app01/app01-000002.vmdk",
        diskMode="independent_nonpersistent",
        parent=Backing(fileName="[vmfs01] app01/app01.vmdk"),
    )
    assert found(machine.leftovers(app, other(redo)), "leftovers")[0][0] == "error"


def test_a_linked_clone_stands_on_the_base_by_right() -> None:
    clone = disk(file="[vmfs01] clone/clone-000001.vmdk", parent=Backing(fileName="[vmfs01] app01/app01.vmdk"))
    assert found(machine.leftovers(machine_of(), other(clone)), "leftovers")[0][0] == "ok"


# Transports


def outcome(chosen: Optional[str], *usable: str, encrypted: bool = False) -> DiskOutcome:
    one = machine_of(disk()).disks[0]
    one.encrypted = encrypted
    candidates = [{"transport": name, "usable": True, "reasons": []} for name in usable or ([chosen] if chosen else [])]
    problem = None if chosen else TransportError("It can't be read", reason="nbdssl: no VDDK", remedy="Unpack VDDK")
    return DiskOutcome(one, chosen, "", candidates, problem)


def test_a_disk_that_nothing_reads() -> None:
    checks = list(machine.transport_checks(machine_of(), [outcome("nbdssl"), outcome(None)]))
    assert [(check.severity, check.remedy) for check in checks] == [("ok", None), ("error", "Unpack VDDK")]


# Hosts


def vnic(device: str, address: str, mask: str = "255.255.255.0", stack: str = "defaultTcpipStack") -> Any:
    return SimpleNamespace(
        device=device,
        key=f"key-vim.host.VirtualNic-{device}",
        portgroup="pg",
        spec=SimpleNamespace(ip=SimpleNamespace(ipAddress=address, subnetMask=mask), netStackInstanceKey=stack),
    )


def config(kind: str, *devices: str) -> Any:
    selected = [f"{kind}.key-vim.host.VirtualNic-{device}" for device in devices]
    return SimpleNamespace(nicType=kind, selectedVnic=selected)


def host(**changed: Any) -> hosts.Host:
    read = {"name": "esx01", "runtime.connectionState": "connected", "runtime.inMaintenanceMode": False, **changed}
    return hosts.Host.of("host-1", read)


def host_checks(one: hosts.Host, reached: Reached, *outcomes: DiskOutcome) -> List[Check]:
    return list(hosts.host_checks([one], {"esx01": reached}, outcomes, 902, 443))


GOOD = Reached("esx01", ["192.0.2.11"], greeting="220 VMware")


def test_nics_and_what_they_are_tagged_for() -> None:
    vnics = [vnic("vmk0", "192.0.2.11"), vnic("vmk1", "192.0.2.12"), vnic("vmk10", "198.51.100.1"), vnic("vmk2", "")]
    nics = hosts.nics_of("esx01", vnics, [config("management", "vmk0"), config("vSphereBackupNFC", "vmk1", "vmk10")])
    assert [(nic.device, sorted(nic.services)) for nic in nics] == [
        ("vmk0", ["management"]),
        ("vmk1", ["vSphereBackupNFC"]),
        ("vmk10", ["vSphereBackupNFC"]),
    ]


def test_two_nics_in_one_subnet() -> None:
    two = {"config.network.vnic": [vnic("vmk0", "192.0.2.11"), vnic("vmk1", "192.0.2.12")]}
    checks = host_checks(host(**two), GOOD, outcome("nbdssl"))
    severity, words = found(checks, "host_subnets")[0]
    assert severity == "warning" and "vmk0 192.0.2.11/24 and vmk1 192.0.2.12/24" in words
    vmotion = {**two, "config.virtualNicManagerInfo.netConfig": [config("vmotion", "vmk0", "vmk1")]}
    assert found(host_checks(host(**vmotion), GOOD), "host_subnets")[0][0] == "ok"
    assert found(host_checks(host(), GOOD), "host_subnets")[0][0] == "not_checked"


@pytest.mark.parametrize(
    ("outcomes", "severity"),
    [
        ([outcome("nbdssl", "nbdssl", "nbd")], "error"),
        ([outcome("san", "san"), outcome("nbd", "nbd")], "error"),
        ([outcome("san", "san", "nbdssl")], "warning"),
        ([outcome("hotadd", "hotadd")], "ok"),
        ([outcome(None)], "ok"),
    ],
)
def test_how_bad_a_closed_port_is(outcomes: List[DiskOutcome], severity: str) -> None:
    closed = Reached("esx01", ["192.0.2.11"], nfc_problem="Connection refused")
    assert found(host_checks(host(), closed, *outcomes), "host_port")[0][0] == severity
    unknown = Reached("esx01", name_problem="Name or service not known")
    assert found(host_checks(host(), unknown, *outcomes), "host_name")[0][0] == severity
    assert found(host_checks(host(), unknown, *outcomes), "host_port") == []


def test_the_port_that_only_https_needs() -> None:
    closed = Reached("esx01", ["192.0.2.11"], greeting="220 VMware", api_problem="refused")
    assert found(host_checks(host(), closed, outcome("nbdssl")), "host_api_port")[0][0] == "ok"
    assert found(host_checks(host(), closed, outcome("https")), "host_api_port")[0][0] == "warning"


# The server and this machine


def certificate_words(begins: int, ends: int, monkeypatch: pytest.MonkeyPatch) -> Tuple[str, str]:
    moments = (NOW + datetime.timedelta(days=begins), NOW + datetime.timedelta(days=ends))
    monkeypatch.setattr(server, "certificate_validity", lambda _der: moments)
    check = server.certificate_check("vc:443", b"", NOW)
    return check.severity, check.evidence


def test_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert certificate_words(-10, 400, monkeypatch)[0] == "ok"
    assert certificate_words(-10, 29, monkeypatch) == ("warning", "expires on 2026-12-21, in 29 days")
    assert certificate_words(-10, -1, monkeypatch)[0] == "error"
    assert certificate_words(1, 10, monkeypatch)[0] == "error"
    monkeypatch.undo()
    assert server.certificate_check("vc:443", b"junk", NOW).severity == "not_checked"


@pytest.mark.parametrize(("offset", "words"), [(0, "agree"), (59, "agree"), (120, "120 s ahead"), (-3600, "behind")])
def test_the_clock(offset: int, words: str) -> None:
    theirs = NOW + datetime.timedelta(seconds=offset)
    seconds = clock.skew(theirs, NOW, NOW)
    check = server.skew_check("vc", seconds)
    assert words in check.evidence and check.severity == ("ok" if words == "agree" else "warning")
    assert clock.skew(theirs.replace(tzinfo=None), NOW, NOW) == seconds
    # From five minutes on a time that a user states may mean another point.
    assert ("named by a time" in check.evidence) == (abs(offset) > 300)
    # What the call took is no skew.
    assert clock.skew(NOW, NOW - datetime.timedelta(hours=1), NOW) == 0


def lacking(granted: server.Granted, *outcomes: DiskOutcome, proxy: Optional[str] = None) -> Dict[str, str]:
    app = machine_of()
    app.disks = [one.disk for one in outcomes]
    checks = server.privilege_checks(app, outcomes, ["hotadd", "nbdssl"], granted, "group-d1", proxy)
    return {check.severity: check.evidence for check in checks}


def granted(**missing: List[str]) -> server.Granted:
    return server.Granted({moid.replace("_", "-"): set(names) for moid, names in missing.items()}, {"Unknown.One"})


READ = "VirtualMachine.Provisioning.DiskRandomRead"


def test_privileges_of_restores_where_they_are_asked_for() -> None:
    def lacks(restores: List[str], **missing: List[str]) -> Dict[str, str]:
        app = machine_of()
        app.values.update(parent=vim.Folder("group-v3"), resourcePool=vim.ResourcePool("resgroup-8"))
        app.values["network"] = [vim.Network("network-7")]
        checks = server.privilege_checks(app, [], ["nbdssl"], granted(**missing), "group-d1", None, restores)
        return {check.severity: check.evidence for check in checks}

    write, make = "VirtualMachine.Provisioning.DiskRandomAccess", "VirtualMachine.Inventory.Create"
    assert list(lacks([], vm_1=[write], group_v3=[make])) == ["ok"]
    assert list(lacks(["in_place"], group_v3=[make])) == ["ok"]
    assert f"a restore to in_place: {write} on VM" in lacks(["in_place"], vm_1=[write])["error"]
    assert f"a restore to new_vm: {make} on its folder" in lacks(["in_place", "new_vm"], group_v3=[make])["error"]
    for place, name, where in (
        ("group_v3", "VirtualMachine.Config.AddNewDisk", "its folder"),
        ("resgroup_8", "VApp.Import", "its resource pool"),
        ("network_7", "Network.Assign", "network network-7"),
    ):
        assert f"{name} on {where}" in lacks(["new_vm"], **{place: [name]})["error"]


def test_privileges_of_what_will_be_done_and_of_what_could_be() -> None:
    assert list(lacking(granted(), outcome("nbdssl"))) == ["ok"]
    assert READ in lacking(granted(vm_1=[READ]), outcome("nbdssl"))["error"]
    assert READ in lacking(granted(vm_1=[READ]), outcome("hotadd"))["warning"]
    assert READ in lacking(granted(vm_1=[READ]), outcome(None))["error"]
    attach = "VirtualMachine.Config.AddExistingDisk"
    assert list(lacking(granted(vm_9=[attach]), outcome("nbdssl"))) == ["ok"]
    assert attach in lacking(granted(vm_9=[attach]), outcome("nbdssl"), proxy="vm-9")["warning"]
    assert "on vCenter" in lacking(granted(group_d1=["Global.EnableMethods"]), outcome("nbdssl"))["warning"]
    crypto = "Cryptographer.Access"
    assert list(lacking(granted(vm_1=[crypto]), outcome("nbdssl"))) == ["ok"]
    assert crypto in lacking(granted(vm_1=[crypto]), outcome("nbdssl", encrypted=True))["error"]
    assert list(lacking(granted(vm_1=["Unknown.One"]), outcome("nbdssl"))) == ["ok"]
