# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What decides on attaching, and the races for a unit; all that a vCenter takes part in has end-to-end tests."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TaskError, TransportError, VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd import attach, detach
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd_plan import (
    READ,
    WRITE,
    Situation,
    attachments_of,
    obstacles,
    plan_attach,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.snapshots import Snapshot, VmState
from pyVmomi import vim

device = vim.vm.device
UUID = "6000c29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e"
OTHER_UUID = "6000c29e-8a1f-2c9b-6d0e-3f5a7b9c1d2f"
DISK = Disk(
    key=2000,
    label="Hard disk 1",
    file="[vmfs01] app01/app01.vmdk",
    datastore="vmfs01",
    capacity_bytes=1 << 20,
    uuid=UUID,
    change_id=None,
    included=True,
    skip_reason=None,
    controller={"type": "pvscsi", "key": 1000, "bus": 0},
)
LEAF = "[vmfs01] app01/app01-000001.vmdk"


def vm(number: int, name: str, datacenter: str = "DC0") -> VmRef:
    obj = vim.VirtualMachine(f"vm-{number}")
    return VmRef(obj, f"vm-{number}", name, f"/{datacenter}/vm/{name}", datacenter, "", "", datacenter)


def virtual_disk(key: int, file: str, unit: int, uuid: str = UUID, mode: str = "independent_nonpersistent") -> Any:
    return device.VirtualDisk(
        key=key,
        controllerKey=1000,
        unitNumber=unit,
        deviceInfo=vim.Description(label=f"Hard disk {unit + 1}"),
        backing=device.VirtualDisk.FlatVer2BackingInfo(fileName=file, uuid=uuid, diskMode=mode),
    )


def pvscsi(bus: int = 0) -> Any:
    return device.ParaVirtualSCSIController(key=1000 + bus, busNumber=bus, sharedBus="noSharing", hotAddRemove=True)


def running(**changes: Any) -> VmState:
    """app01 while it runs on a snapshot."""
    state = VmState(
        snapshots=[Snapshot(None, "snapshot-1", "nightly", "", "", False, None, None)],
        current_depth=1,
        power_state="poweredOn",
        tools_running=True,
        consolidation_needed=False,
        template=False,
        devices=[virtual_disk(2000, LEAF, 0)],
        recent_tasks=[],
    )
    return replace(state, **changes)


def off(**changes: Any) -> VmState:
    """app01 while it is off and has no snapshots."""
    state = running(snapshots=[], power_state="poweredOff", devices=[virtual_disk(2000, DISK.file, 0)])
    return replace(state, **changes)


def situation(**changes: Any) -> Situation:
    known = Situation(
        is_vcenter=True,
        proxy=vm(109, "proxy01"),
        vm=vm(101, "app01"),
        devices=[pvscsi(), virtual_disk(2000, "[vmfs01] proxy01/proxy01.vmdk", 0, OTHER_UUID, "persistent")],
        proxy_running=True,
        enable_uuid=True,
        encrypted=False,
        vsan=False,
        host="esx01",
        datastores=frozenset({"datastore-12"}),
        source_datastores={"vmfs01": ("datastore-12", "VMFS")},
        source=running(),
        version="vmx-19",
        browser=None,
    )
    return replace(known, **changes)


@pytest.mark.parametrize("access, source", [(READ, running()), (READ, off()), (WRITE, off())])
def test_what_can_be_attached(access: str, source: VmState) -> None:
    assert obstacles(situation(source=source), DISK, access) == []


CASES: List[Any] = [
    (READ, {"is_vcenter": False}, {}, "the server is an ESXi host", "Log in to vCenter"),
    (READ, {"proxy_running": False}, {}, "the proxy is not powered on", "this runs on"),
    (READ, {"proxy": vm(109, "proxy01", "DC1")}, {}, "datacenter 'DC1', the disk in 'DC0'", "same datacenter"),
    (READ, {"datastores": frozenset()}, {}, "host esx01 does not see datastore 'vmfs01'", "mount it there"),
    (READ, {"source_datastores": {}}, {}, "no datastore 'vmfs01' any more", "new snapshot"),
    (READ, {}, {"controller": {"type": "ide"}}, "it is an IDE disk", "nbdssl"),
    (READ, {}, {"encrypted": True}, "it is encrypted, and the proxy is not", "Encrypt the proxy"),
    (READ, {"enable_uuid": False}, {}, "does not show its disks' UUIDs", "disk.EnableUUID"),
    (READ, {}, {"uuid": None}, "vCenter knows no UUID of it", "nbdssl"),
    (READ, {"source_datastores": {"vmfs01": ("datastore-12", "vsan")}}, {}, "lies on vSAN", "vSAN datastore"),
    (READ, {"devices": [virtual_disk(2001, LEAF, 1)]}, {}, f"'Hard disk 2' ({LEAF}) of the proxy", "vadp_recover"),
    (READ, {"source": off(power_state="suspended")}, {}, "is suspended and writes to it", "Make a snapshot"),
    (WRITE, {"source": off(power_state="suspended")}, {}, "is suspended", "Power it off"),
    (WRITE, {"source": off(snapshots=running().snapshots)}, {}, "has 1 snapshots ('nightly')", "Remove them"),
    (WRITE, {"source": off(consolidation_needed=True)}, {}, "need consolidation", "vadp_recover"),
    (WRITE, {"source": off(template=True)}, {}, "a template's", "Convert"),
    (WRITE, {"source": off(devices=[])}, {}, "does not use this file now", "run again"),
]


@pytest.mark.parametrize("access, known, disk, reason, remedy", CASES)
def test_what_speaks_against_it(
    access: str, known: Dict[str, Any], disk: Dict[str, Any], reason: str, remedy: str
) -> None:
    known = {"source": off() if access == WRITE else running(), **known}
    found = obstacles(situation(**known), replace(DISK, **disk), access)
    assert len(found) == 1, found
    assert reason in found[0].reason and remedy in found[0].remedy


def test_an_encrypted_disk_goes_to_an_encrypted_proxy_and_a_vsan_one_to_one_on_vsan() -> None:
    known = situation(encrypted=True, vsan=True, source_datastores={"vmfs01": ("datastore-12", "vsan")})
    assert obstacles(known, replace(DISK, encrypted=True), READ) == []


def test_a_redo_log_stands_for_the_disk_that_it_is_over() -> None:
    redo = virtual_disk(2001, f"{DISK.file}-REDO_a03725", 1)
    assert [item.file for item in attachments_of([pvscsi(), redo], [DISK.file])] == [DISK.file]
    assert attachments_of([pvscsi(), redo], [LEAF]) == []


def test_the_error_names_disks_proxy_reasons_and_remedies(tmp_path: Path) -> None:
    session: Any = SimpleNamespace()
    second = replace(
        DISK, key=2001, label="Hard disk 2", file="[vmfs01] app01/app01_1.vmdk", uuid=OTHER_UUID[:-1] + "0"
    )
    with pytest.raises(TransportError) as caught:
        plan_attach(session, situation(enable_uuid=False), [DISK, second], READ, str(tmp_path))
    text = str(caught.value)
    for words in (
        "'Hard disk 1' ([vmfs01] app01/app01.vmdk)",
        "'Hard disk 2'",
        "'app01' (vm-101)",
        "'proxy01' (vm-109)",
    ):
        assert words in text
    assert text.count("Set disk.EnableUUID") == 1
    assert list(caught.value.details["obstacles"]) == ["Hard disk 1", "Hard disk 2"]


class VCenter:
    """A session whose proxy's hardware changes by ReconfigVM_Task; *meanwhile* is called before the first ones."""

    is_vcenter = True

    def __init__(self, by_id: Path, meanwhile: Optional[List[Callable[[VCenter], None]]] = None) -> None:
        self.by_id = by_id
        self.devices = list(situation().devices)
        self.specs: List[Any] = []
        self.meanwhile = list(meanwhile or [])

    def read(self, _obj: Any, *paths: str) -> Dict[str, Any]:
        return {path: self.devices if path == "config.hardware.device" else None for path in paths}

    def read_each(self, *wanted: Any) -> List[Dict[str, Any]]:
        store = vim.Datastore("datastore-12")
        proxy = {
            "config.extraConfig": [vim.option.OptionValue(key="disk.enableUUID", value="TRUE")],
            "runtime.powerState": "poweredOn",
            "runtime.host": vim.HostSystem("host-10"),
            "config.hardware.device": self.devices,
        }
        source = {
            "config.hardware.device": running().devices,
            "runtime.powerState": "poweredOn",
            "datastore": [store],
        }
        values = {
            "vm-109": proxy,
            "vm-101": source,
            "datastore-12": {"name": "vmfs01", "summary.type": "VMFS"},
            "host-10": {"name": "esx01", "datastore": [store]},
        }
        return [{path: values[obj._moId].get(path) for path in paths} for obj, paths in wanted]

    def run_task(self, _function: Any, spec: Any, **_options: Any) -> None:
        self.specs.append(spec)
        if self.meanwhile:
            self.meanwhile.pop(0)(self)
        for change in spec.deviceChange:
            if change.operation == "remove":
                assert change.fileOperation is None
                self.devices.remove(change.device)
                continue
            new = change.device
            if isinstance(new, device.VirtualDisk):
                assert new.key < 0 and change.fileOperation is None
                if any(
                    (new.controllerKey, new.unitNumber) == (one.controllerKey, one.unitNumber) for one in self.devices
                ):
                    raise TaskError("The disk was not attached", reason="the unit is taken")
                self.devices.append(virtual_disk(9000, new.backing.fileName, new.unitNumber, mode=new.backing.diskMode))
                (self.by_id / f"wwn-0x{UUID.replace('-', '')}").symlink_to(self.by_id / "device")


@pytest.fixture
def by_id(tmp_path: Path) -> Path:
    (tmp_path / "device").write_bytes(b"x" * 4096)
    return tmp_path


def _attach(session: Any, by_id: Path, record: Any, **options: Any) -> Any:
    return attach(
        session,
        vm(109, "proxy01"),
        [DISK],
        vm=vm(101, "app01"),
        access=READ,
        device_dir=str(by_id),
        sysfs_dir=str(by_id / "sys"),
        record=record,
        timeout=1,
        **options,
    )


def test_it_is_recorded_before_it_is_attached_and_the_keys_are_read_back(by_id: Path) -> None:
    session = VCenter(by_id)
    recorded = []

    def record(fields: Dict[str, Any]) -> int:
        assert session.specs == []
        recorded.append(fields)
        return 1

    found = _attach(session, by_id, record)
    assert recorded == [
        {"proxy_moid": "vm-109", "file": DISK.file, "disk_uuid": UUID, "vm_moid": "vm-101", "access": "read"}
    ]
    assert [(item.key, item.device_key, item.unit, item.mode) for item in found] == [
        (2000, 9000, 1, "independent_nonpersistent")
    ]
    # Attached already: nothing is recorded or changed.
    assert _attach(session, by_id, record) == found
    assert len(session.specs) == len(recorded) == 1
    with pytest.raises(TransportError, match="attached to the proxy already"):
        _attach(session, by_id, record, fresh=True)


def test_a_unit_that_somebody_else_takes_meanwhile(by_id: Path) -> None:
    def take(session: VCenter) -> None:
        taken = {one.unitNumber for one in session.devices}
        unit = next(unit for unit in range(16) if unit not in taken)
        session.devices.append(virtual_disk(8000 + unit, "[vmfs01] other/other.vmdk", unit, OTHER_UUID))

    session = VCenter(by_id, [take, take])
    found = _attach(session, by_id, lambda _fields: 1)
    assert [item.unit for item in found] == [3] and len(session.specs) == 3
    # Another reason is not tried again.
    session = VCenter(by_id, [_refuse])
    os.unlink(by_id / f"wwn-0x{UUID.replace('-', '')}")
    with pytest.raises(TransportError, match="file is locked"):
        _attach(session, by_id, lambda _fields: 1)
    assert len(session.specs) == 1


def _refuse(_session: VCenter) -> None:
    raise VsphereError("The disk was not attached", reason="the file is locked")


def test_another_disk_than_the_one_that_was_meant_is_detached_again(by_id: Path) -> None:
    """A datastore of the same name in the proxy's datacenter."""
    session = VCenter(by_id)
    original = session.run_task

    def run_task(function: Any, spec: Any, **options: Any) -> None:
        original(function, spec, **options)
        for one in session.devices:
            if getattr(one.backing, "fileName", None) == DISK.file:
                one.backing.uuid = OTHER_UUID[:-1] + "0"

    session.run_task = run_task  # type: ignore[method-assign]
    with pytest.raises(TransportError, match="not the disk that was meant"):
        _attach(session, by_id, lambda _fields: 1)
    assert len(session.specs) == 2 and len(session.devices) == 2


def test_who_may_not_delete_the_device_detaches_all_the_same(by_id: Path) -> None:
    session = VCenter(by_id)
    found = _attach(session, by_id, lambda _fields: 1)
    delete = by_id / "sys" / "class" / "block" / "device" / "device" / "delete"
    delete.mkdir(parents=True)  # root may write to any file
    proxy = vm(109, "proxy01")
    with pytest.raises(TransportError, match="Run as root"):
        detach(session, proxy, found, sysfs_dir=str(by_id / "sys"), device_dir=str(by_id), timeout=0)  # type: ignore
    assert len(session.devices) == 2


def test_detaching_touches_only_what_is_still_the_same(by_id: Path) -> None:
    session: Any = VCenter(by_id)
    found = _attach(session, by_id, lambda _fields: 1)
    changed = [replace(found[0], device_key=9001), replace(found[0], file="[vmfs01] app01/other.vmdk")]
    detach(session, vm(109, "proxy01"), changed, sysfs_dir="/nowhere", device_dir=None, timeout=0)
    assert len(session.specs) == 1
    detach(session, vm(109, "proxy01"), found, sysfs_dir="/nowhere", device_dir=None, timeout=0)
    assert len(session.specs) == 2 and len(session.devices) == 2
