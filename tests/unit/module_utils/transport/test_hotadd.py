# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What decides on attaching, and the races for a unit; all that a vCenter takes part in has end-to-end tests."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import NotFoundError, TransportError, VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import (
    hotadd,
    hotadd_proxy,
    hotadd_recovery,
    scsi_units,
)
from ansible_collections.openvadp.backup.plugins.module_utils.transport.guest_device import GuestDisk
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd import attach, detach
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd_plan import (
    READ,
    WRITE,
    Situation,
    attachments_of,
    in_the_way,
    is_listed,
    obstacles,
    plan_attach,
)
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd_proxy import Patience
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd_recovery import recover
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd_reservation import release, reserve
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
        plan_attach(session, situation(enable_uuid=False), [DISK, second], READ, [], str(tmp_path))
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


DIGITS = UUID.replace("-", "")
TWIN = "[vmfs01] clone01/clone01.vmdk"
RUN = "0123456789abcdef0123456789abcdef"
Event = Callable[["VCenter"], None]


class VCenter:
    """vCenter, and the proxy as its own system sees it; *meanwhile* is called before the first changes.

    A device that was detached stays in the guest until it is deleted, as a file that can't be read.
    """

    is_vcenter = True
    busy_timeout = 1.0
    about = SimpleNamespace(instanceUuid="here")

    def __init__(self, root: Path, meanwhile: Optional[List[Event]] = None) -> None:
        self.root = root
        self.by_id, self.dev, self.sysfs = root / "by-id", root / "dev", root / "sys"
        for folder in (self.by_id, self.dev, self.sysfs / "class" / "block"):
            folder.mkdir(parents=True, exist_ok=True)
        self.devices = list(situation().devices)
        self.options: Dict[str, str] = {"disk.enableUUID": "TRUE"}
        self.version = 1
        self.specs: List[Any] = []
        self.meanwhile = list(meanwhile or [])
        self.sequence = 0
        self.uuid = UUID  # that vCenter tells of what is attached

    clock = staticmethod(time.monotonic)

    def sleep(self, _seconds: float) -> None:
        pass

    def read(self, obj: Any, *paths: str) -> Dict[str, Any]:
        if paths == ("layoutEx.file",):
            files = [DISK.file, LEAF] if obj._moId == "vm-101" else []
            return {paths[0]: [vim.vm.FileLayoutEx.FileInfo(name=name) for name in files]}
        return {path: self.proxy.get(path) for path in paths}

    @property
    def proxy(self) -> Dict[str, Any]:
        return {
            "config.changeVersion": str(self.version),
            "config.extraConfig": [vim.option.OptionValue(key=key, value=text) for key, text in self.options.items()],
            "config.hardware.device": list(self.devices),
            "runtime.powerState": "poweredOn",
            "runtime.host": vim.HostSystem("host-10"),
        }

    def read_each(self, *wanted: Any) -> List[Dict[str, Any]]:
        store = vim.Datastore("datastore-12")
        source = {
            "config.hardware.device": running().devices,
            "runtime.powerState": "poweredOn",
            "datastore": [store],
        }
        values = {
            "vm-109": self.proxy,
            "vm-101": source,
            "datastore-12": {"name": "vmfs01", "summary.type": "VMFS"},
            "host-10": {"name": "esx01", "datastore": [store]},
        }
        return [{path: values[obj._moId].get(path) for path in paths} for obj, paths in wanted]

    def call(self, _function: Any, spec: Any, **_options: Any) -> Any:
        """ReconfigVM_Task, carried out at once."""
        self.specs.append(spec)
        if self.meanwhile:
            self.meanwhile.pop(0)(self)
        assert spec.changeVersion, "a change of the proxy that compares nothing"
        if spec.changeVersion != str(self.version):
            return vim.fault.ConcurrentAccess()
        self.version += 1
        for option in spec.extraConfig:
            self.options.pop(option.key, None)
            if option.value:
                self.options[option.key] = option.value
        for change in spec.deviceChange:
            assert change.fileOperation is None
            if change.operation == "remove":
                self.take_away(change.device.key)
            elif isinstance(change.device, device.VirtualDisk):
                backing = change.device.backing
                self.put(backing.fileName, change.device.unitNumber, mode=backing.diskMode)
        return None

    def wait(self, _task: Any, **_options: Any) -> None:
        return None

    def put(self, file: str, unit: int, mode: str = "independent_nonpersistent", **told: Any) -> int:
        """Attach a disk, and let the guest find it; its device key."""
        key = 9000 + unit
        assert key not in {one.key for one in self.devices}
        self.devices.append(virtual_disk(key, file, unit, told.get("uuid", self.uuid), mode))
        self.show(unit, told.get("guest_unit", unit), told.get("capacity", DISK.capacity_bytes))
        self.version += 1
        return key

    def show(self, unit: int, target: int, capacity: int = DISK.capacity_bytes) -> None:
        name = f"sd{'bcdefghijklmnopqrstuvw'[unit]}"
        folder, self.sequence = self.sysfs / "devices" / f"2:0:{target}:0", self.sequence + 1
        block = self.sysfs / "class" / "block" / name
        if (self.dev / name).exists():  # the old device hides it
            (self.dev / name).write_bytes(b"n" * 4096)
            return
        folder.mkdir(parents=True)
        block.mkdir()
        (block / "device").symlink_to(folder)
        (block / "diskseq").write_text(f"{self.sequence}\n")
        (folder / "vendor").write_text("VMware  \n")
        (folder / "wwid").write_text(f"naa.{DIGITS}\n")
        (folder / "delete").touch()
        with open(self.dev / name, "wb") as stream:
            stream.truncate(capacity)
        link = self.by_id / f"wwn-0x{DIGITS}"
        if not link.exists():
            link.symlink_to(self.dev / name)

    def take_away(self, key: int) -> None:
        self.devices = [one for one in self.devices if one.key != key]
        for node in self.dev.glob("sd*"):
            if node.name == f"sd{'bcdefghijklmnopqrstuvw'[key - 9000]}":
                node.write_bytes(b"")
        self.version += 1


class Guest:
    """Carries out what is written to `delete`, when it is looked at."""

    def __init__(self, session: VCenter) -> None:
        self.session = session

    def delete(self, name: str, sysfs_dir: str, _timeout: float) -> bool:
        block = Path(sysfs_dir) / "class" / "block" / name
        shutil.rmtree((block / "device").resolve())
        shutil.rmtree(block)
        (self.session.dev / name).unlink()
        for link in self.session.by_id.iterdir():
            if not link.exists():
                link.unlink()
        return True


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VCenter]:
    made = VCenter(tmp_path)
    monkeypatch.setattr(hotadd_proxy, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(hotadd, "_LOOK_AGAIN_SECONDS", 0.01)
    for module in (hotadd, hotadd_proxy):
        monkeypatch.setattr(module, "delete_device", Guest(made).delete)
    yield made


def _attach(session: Any, record: Any = lambda fields, known=None: 1, **options: Any) -> Any:
    return attach(
        session,
        vm(109, "proxy01"),
        [DISK],
        vm=vm(101, "app01"),
        access=READ,
        device_dir=str(session.by_id),
        sysfs_dir=str(session.sysfs),
        record=record,
        timeout=options.pop("timeout", 1),
        **options,
    )


def _detach(session: Any, found: Any, here: bool = True) -> None:
    folder = str(session.by_id) if here else None
    detach(session, vm(109, "proxy01"), found, sysfs_dir=str(session.sysfs), device_dir=folder, timeout=0)


def _files(session: VCenter) -> List[str]:
    return [one.backing.fileName for one in session.devices if isinstance(one, device.VirtualDisk)][1:]


def test_it_is_recorded_before_it_is_attached_and_what_is_read_back_after_it(session: VCenter) -> None:
    recorded: List[Any] = []

    def record(fields: Dict[str, Any], known: Optional[int] = None) -> int:
        recorded.append((known, fields, len(session.specs)))
        return 7

    found = _attach(session, record)
    place = {"bus": 0, "unit": 1, "device_key": None}
    names = {"proxy_moid": "vm-109", "proxy_uuid": "", "vm_moid": "vm-101", "vm_uuid": "", "server_uuid": "here"}
    about = {"file": DISK.file, "disk_uuid": UUID, "access": "read"}
    assert recorded == [(None, {**names, **about, **place}, 0), (7, {"device_key": 9001}, 1)]
    assert [(item.key, item.device_key, item.unit, item.mode) for item in found] == [
        (2000, 9001, 1, "independent_nonpersistent")
    ]
    # Attached already: nothing is recorded or changed.
    assert _attach(session, record) == found
    assert len(session.specs) == 1 and len(recorded) == 2
    with pytest.raises(TransportError, match="attached to the proxy already"):
        _attach(session, record, fresh=True)


def test_who_was_overtaken_looks_again(session: VCenter) -> None:
    def take(session: VCenter) -> None:
        taken = {one.unitNumber for one in session.devices}
        unit = next(unit for unit in range(16) if unit not in taken)
        session.devices.append(virtual_disk(8000 + unit, "[vmfs01] other/other.vmdk", unit, OTHER_UUID))
        session.version += 1

    session.meanwhile = [take, take]
    recorded: List[Any] = []
    found = _attach(session, lambda fields, known=None: recorded.append((known, dict(fields))) or 7)
    assert [item.unit for item in found] == [3] and len(session.specs) == 3
    # One record, in which the unit is the one that was asked for last.
    assert [known for known, _fields in recorded] == [None, 7, 7, 7]
    assert [fields["unit"] for _known, fields in recorded[:3]] == [1, 2, 3]
    # Another reason is not tried again.
    _detach(session, found)
    session.meanwhile, session.specs = [_refuse], []
    with pytest.raises(TransportError, match="file is locked"):
        _attach(session)
    assert len(session.specs) == 1


def _refuse(_session: VCenter) -> None:
    raise VsphereError("The disk was not attached", reason="the file is locked")


def _twin(session: VCenter) -> None:
    session.put(TWIN, 5)


def test_of_two_who_attach_disks_of_one_uuid_at_once_one_is_refused(session: VCenter) -> None:
    session.meanwhile = [_twin]
    with pytest.raises(TransportError, match="of the proxy has the same UUID") as caught:
        _attach(session)
    assert caught.value.retryable and _files(session) == [TWIN] and len(session.specs) == 1


def test_who_waits_attaches_when_the_other_disk_has_gone(session: VCenter) -> None:
    session.meanwhile = [_twin]
    said: List[str] = []

    def on_wait(words: str) -> None:
        said.append(words)
        if len(said) == 3:  # the other run ends in order: first the guest, then vCenter
            Guest(session).delete("sdg", str(session.sysfs), 0)
            session.take_away(9005)

    found = _attach(session, patience=Patience(30, on_wait=on_wait))
    assert _files(session) == [DISK.file] and len(said) == 3 and "same UUID" in said[0]
    assert found[0].guest is not None and found[0].guest.unit == found[0].unit == 1


def test_waiting_has_an_end(session: VCenter) -> None:
    _twin(session)
    with pytest.raises(TransportError, match="same UUID"):
        _attach(session, patience=Patience(0.05))
    assert session.specs == []


def test_a_second_disk_of_the_uuid_that_comes_by_another_way_ends_it(session: VCenter) -> None:
    """Some other product attaches it, between our change and the look at what came of it."""
    original = session.wait

    def wait(task: Any, **options: Any) -> None:
        if len(session.specs) == 1:
            session.devices.append(virtual_disk(9005, TWIN, 5))
        original(task, **options)

    session.wait = wait  # type: ignore[method-assign]
    with pytest.raises(TransportError, match="somebody attached another disk of the UUID"):
        _attach(session)
    assert _files(session) == [TWIN]


def test_two_disks_of_one_uuid_are_not_asked_for_together(session: VCenter) -> None:
    second = replace(DISK, key=2001, label="Hard disk 2", file="[vmfs01] app01/app01_1.vmdk")
    with pytest.raises(TransportError, match="two of them have the same UUID"):
        attach(
            session,  # type: ignore[arg-type]
            vm(109, "proxy01"),
            [DISK, second],
            vm=vm(101, "app01"),
            access=READ,
            device_dir=str(session.by_id),
            sysfs_dir=str(session.sysfs),
            record=lambda fields, known=None: 1,
            timeout=1,
        )
    assert session.specs == []


def test_nothing_is_attached_to_another_machine_than_this_one(
    session: VCenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own disk of the same UUID would be taken for the one that is attached over there."""
    monkeypatch.setattr(hotadd_proxy.ProxyIdentity, "find", lambda _session, sysfs_dir: (vm(108, "proxy02"), ""))
    with pytest.raises(TransportError, match="this machine is VM 'proxy02'"):
        _attach(session)
    assert session.specs == []


def test_another_disk_than_the_one_that_was_meant_is_detached_again(session: VCenter) -> None:
    """A datastore of the same name in the proxy's datacenter."""
    session.uuid = OTHER_UUID[:-1] + "0"
    with pytest.raises(TransportError, match="not the disk that was meant"):
        _attach(session)
    assert len(session.specs) == 2 and _files(session) == []


@pytest.mark.parametrize(
    "told, reason",
    [
        ({"guest_unit": 2}, "at unit 2, vCenter shows it at unit 1"),
        ({"capacity": 4096}, "it has 4096 bytes, the disk has 1048576"),
    ],
)
def test_a_device_that_is_not_what_was_attached_is_not_read(
    session: VCenter, told: Dict[str, Any], reason: str
) -> None:
    original = session.put
    session.put = lambda *args, **options: original(*args, **{**options, **told})  # type: ignore[method-assign]
    with pytest.raises(TransportError, match=reason):
        _attach(session)
    assert _files(session) == []


def test_what_is_left_over_at_the_unit_is_deleted_or_the_unit_is_not_used(session: VCenter) -> None:
    def stale(unit: int) -> None:
        session.show(unit, unit)
        (session.sysfs / "devices" / f"2:0:{unit}:0" / "wwid").write_text(f"naa.{DIGITS[:-2]}f{unit}\n")
        (session.by_id / f"wwn-0x{DIGITS}").unlink()
        (session.by_id / f"wwn-{unit}").symlink_to(session.dev / f"sd{'bcd'[unit]}")

    stale(1)
    stale(2)
    (session.dev / "sdc").write_bytes(b"")  # unit 1: dead; unit 2 answers: nobody knows whose it is
    found = _attach(session)
    assert found[0].unit == 1 and not (session.dev / "sdc").read_bytes().startswith(b"n")
    _detach(session, found)
    session.show(1, 1)
    (session.sysfs / "devices" / "2:0:1:0" / "wwid").write_text(f"naa.{DIGITS[:-2]}f1\n")
    (session.by_id / f"wwn-0x{DIGITS}").unlink()
    assert _attach(session)[0].unit == 3
    assert (session.dev / "sdc").exists() and (session.dev / "sdd").exists()


def test_luns_of_other_adapters_are_not_in_the_way() -> None:
    placement = scsi_units.Placement([scsi_units.Slot(1000, 1)], [])
    virtual = GuestDisk("sda", (2, 0, 0, 0), OTHER_UUID.replace("-", ""), True, "1")
    lun = GuestDisk("sdb", (5, 0, 1, 0), DIGITS, False, "2")
    assert in_the_way(situation(), placement, [virtual, lun]) == []
    mapped = replace(lun, address=(2, 0, 1, 0))
    assert in_the_way(situation(), placement, [virtual, mapped]) == [mapped]


def test_a_device_that_vcenter_lists_is_known_by_its_uuid_and_its_unit() -> None:
    known = situation(devices=[pvscsi(), virtual_disk(9001, DISK.file, 1)])
    guest = GuestDisk("sdb", (2, 0, 1, 0), DIGITS, True, "1")
    assert is_listed(known, guest) and is_listed(known, replace(guest, digits=None))
    for other in ({"digits": DIGITS[:-1] + "0"}, {"address": (2, 0, 2, 0)}, {"address": (2, 0, 1, 1)}):
        assert not is_listed(known, replace(guest, **other)), other
    # A SAS controller counts its targets as they come.
    sas = device.VirtualLsiLogicSASController(key=1000, busNumber=0)
    assert is_listed(replace(known, devices=[sas, known.devices[1]]), replace(guest, address=(2, 0, 9, 0)))


def test_who_may_not_delete_the_device_detaches_all_the_same(session: VCenter, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _attach(session)

    def refuse(*_arguments: Any) -> bool:
        raise TransportError("The device of an attached disk can't be deleted", subject="sdc", remedy="Run as root")

    monkeypatch.setattr(hotadd, "delete_device", refuse)
    with pytest.raises(TransportError, match="Run as root"):
        _detach(session, found)
    assert _files(session) == []


def test_detaching_touches_only_what_is_still_the_same(session: VCenter) -> None:
    found = _attach(session)
    for change in (
        {"device_key": 9002},
        {"file": "[vmfs01] app01/other.vmdk"},
        {"disk_uuid": OTHER_UUID[:-1] + "0"},
    ):
        _detach(session, [replace(found[0], **change)])
    assert len(session.specs) == 1 and (session.dev / "sdc").exists()
    _detach(session, found, here=False)
    assert len(session.specs) == 2 and _files(session) == []


def test_detaching_compares_what_it_changes(session: VCenter) -> None:
    """The key was given to another disk between the look and the change."""
    found = _attach(session)

    def swap(session: VCenter) -> None:
        session.devices = [one for one in session.devices if one.key != 9001]
        session.devices.append(virtual_disk(9001, "[vmfs01] other/other.vmdk", 1, OTHER_UUID))
        session.version += 1

    session.meanwhile = [swap]
    _detach(session, found, here=False)
    assert _files(session) == ["[vmfs01] other/other.vmdk"]


# VDDK's own HotAdd


def _reserve(session: Any, run_id: str = RUN, **options: Any) -> None:
    reserve(
        session,
        vm(109, "proxy01"),
        DISK,
        vm=vm(101, "app01"),
        run_id=run_id,
        device_dir=str(session.by_id),
        sysfs_dir=str(session.sysfs),
        **options,
    )


def test_what_is_reserved_for_vddk_nobody_attaches(session: VCenter) -> None:
    _reserve(session)
    assert session.options[f"openvadp.hotadd.{DIGITS}"] == f"1::{RUN}"
    for refused in (lambda: _attach(session), lambda: _reserve(session, "f" * 32)):
        with pytest.raises(TransportError, match=f"VDDK attaches a disk of the same UUID to the proxy for run {RUN}"):
            refused()
    # Only its own run takes it back.
    release(session, vm(109, "proxy01"), UUID, "f" * 32)  # type: ignore[arg-type]
    assert len(session.options) == 2
    release(session, vm(109, "proxy01"), UUID, RUN)  # type: ignore[arg-type]
    assert len(session.options) == 1
    assert _attach(session)


def test_nothing_is_reserved_while_a_disk_of_that_uuid_is_attached(session: VCenter) -> None:
    session.meanwhile = [_twin]
    with pytest.raises(TransportError, match="of the proxy has the same UUID"):
        _reserve(session)
    assert len(session.options) == 1
    # A reservation that a proxy has inherited as a clone is nobody's, one of a newer version is somebody's.
    Guest(session).delete("sdg", str(session.sysfs), 0)
    session.take_away(9005)
    session.options[f"openvadp.hotadd.{DIGITS}"] = f"1:{OTHER_UUID}:{RUN}"
    _reserve(session)
    session.options[f"openvadp.hotadd.{DIGITS}"] = "2:whatever"
    with pytest.raises(TransportError, match="VDDK attaches"):
        _reserve(session)


# Recovery


class Record:
    """A run's record with one attachment."""

    run_id = RUN

    def __init__(self, **fields: Any) -> None:
        self.intent = {
            "id": 1,
            "server_uuid": "here",
            "proxy_moid": "vm-109",
            "proxy_uuid": PROXY_UUID,
            "file": DISK.file,
            "disk_uuid": UUID,
            "vm_moid": "vm-101",
            "access": "read",
            "bus": 0,
            "unit": 1,
            "device_key": 9001,
            **fields,
        }
        self.open = [self.intent]

    def intents(self, _what: str) -> List[Dict[str, Any]]:
        return list(self.open)

    def settle(self, _number: int) -> None:
        self.open = []

    done = settle


RECORDS: List[Any] = [
    ({}, True),
    ({"device_key": None}, True),
    ({"device_key": 9002}, False),
    ({"device_key": None, "unit": 2}, False),
    ({"device_key": None, "bus": 1}, False),
    ({"device_key": None, "bus": None, "unit": None}, False),
    ({"proxy_uuid": None}, False),
    ({"proxy_moid": "vm-9"}, False),  # it was registered anew: nothing is lost, somebody looks at it
    ({"disk_uuid": OTHER_UUID}, False),
    ({"access": "write"}, False),
    ({"method": "vddk"}, False),
    # vCenter has to show it as a file of the machine that was backed up, which is another one than the proxy.
    ({"vm_moid": "vm-9"}, False),
    ({"vm_moid": "vm-109"}, False),
    ({"vm_moid": "vm-102"}, False),
    ({"vm_uuid": OTHER_UUID}, False),
]


PROXY_UUID = "503f1d2e-3c4b-5a69-7887-96a5b4c3d2e1"


def _find_vm(_session: Any, moid: Optional[str] = None, uuid: Optional[str] = None, **_options: Any) -> VmRef:
    if moid in ("vm-101", "vm-102"):
        return vm(int(moid[3:]), moid)
    if moid != "vm-109" and uuid != PROXY_UUID:
        raise NotFoundError("There is no such virtual machine")
    return replace(vm(109, "proxy01"), instance_uuid=PROXY_UUID)


@pytest.mark.parametrize("fields, ours", RECORDS)
def test_only_what_the_record_names_is_detached(
    session: VCenter, monkeypatch: pytest.MonkeyPatch, fields: Dict[str, Any], ours: bool
) -> None:
    monkeypatch.setattr(hotadd_recovery, "find_vm", _find_vm)
    monkeypatch.setattr(hotadd_proxy.ProxyIdentity, "find", lambda _session, sysfs_dir: (None, ""))
    session.put(DISK.file, 1)
    run: Any = Record(**fields)
    folders = {"sysfs_dir": str(session.sysfs), "device_dir": str(session.by_id)}
    found = recover(session, run, check_mode=False, **folders)  # type: ignore[arg-type]
    assert _files(session) == ([] if ours else [DISK.file])
    assert [item["action"].split(":")[0] for item in found] == ["detached" if ours else "left"]
    # What is left stays in the record.
    assert run.open == ([] if ours else [run.intent])
    # The devices of another machine are not touched from here.
    assert (session.dev / "sdc").exists()


@pytest.mark.parametrize("shared", ["disk", "bus"])
def test_a_disk_of_a_cluster_is_not_taken_from_one_of_its_machines(
    session: VCenter, monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    """It is a file of the other one too, so a record that somebody has written would name it rightly."""
    monkeypatch.setattr(hotadd_recovery, "find_vm", _find_vm)
    monkeypatch.setattr(hotadd_proxy.ProxyIdentity, "find", lambda _session, sysfs_dir: (None, ""))
    session.put(DISK.file, 1, "persistent")
    if shared == "disk":
        session.devices[-1].backing.sharing = "sharingMultiWriter"
    else:
        session.devices[0].sharedBus = "physicalSharing"
    run: Any = Record(access="write")
    folders = {"sysfs_dir": str(session.sysfs), "device_dir": str(session.by_id)}
    found = recover(session, run, check_mode=False, **folders)  # type: ignore[arg-type]
    assert _files(session) == [DISK.file] and [item["action"].split(":")[0] for item in found] == ["left"]


@pytest.mark.parametrize("server, done", [("here", True), (None, True), ("there", False)])
def test_what_was_attached_to_a_proxy_that_is_gone(
    session: VCenter, monkeypatch: pytest.MonkeyPatch, server: Optional[str], done: bool
) -> None:
    """It went with it; a proxy of another vCenter is not gone because this one does not know it."""
    monkeypatch.setattr(hotadd_recovery, "find_vm", _find_vm)
    run: Any = Record(proxy_moid="vm-9", proxy_uuid=OTHER_UUID, server_uuid=server)
    folders = {"sysfs_dir": str(session.sysfs), "device_dir": str(session.by_id)}
    found = recover(session, run, check_mode=False, **folders)  # type: ignore[arg-type]
    assert (run.open == [], len(found)) == (done, 0 if done else 1)
    assert done or "not in this vCenter" in found[0]["action"]


def test_what_vddk_attached_is_ours_if_its_uuid_is_reserved_for_the_run(
    session: VCenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotadd_recovery, "find_vm", _find_vm)
    monkeypatch.setattr(hotadd_proxy.ProxyIdentity, "find", lambda _session, sysfs_dir: (vm(109, "proxy01"), ""))
    session.options[f"openvadp.hotadd.{DIGITS}"] = f"1:{PROXY_UUID}:{RUN}"
    session.put(DISK.file, 4)
    run: Any = Record(method="vddk", device_key=None, bus=None, unit=None)
    folders = {"sysfs_dir": str(session.sysfs), "device_dir": str(session.by_id)}
    assert [item["action"] for item in recover(session, run, check_mode=True, **folders)] == [  # type: ignore[arg-type]
        "would be detached"
    ]
    assert _files(session) == [DISK.file]
    recover(session, run, check_mode=False, **folders)  # type: ignore[arg-type]
    assert _files(session) == [] and len(session.options) == 1 and run.open == []
    assert not (session.dev / "sdf").exists()
