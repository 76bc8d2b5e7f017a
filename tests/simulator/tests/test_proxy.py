# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The proxy machine: disks hot-added by unmodified pyVmomi and read by the real nbdkit, identity and LUNs."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim, vmodl

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_api import MIB, Disk, Started, areas, disks, done, remove, snapshot, tracking  # noqa: E402

DeviceSpec = vim.vm.device.VirtualDeviceSpec
READ, WRITE = "independent_nonpersistent", "persistent"


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(tmp_path_factory.mktemp("proxy") / "state")
    yield started
    started.stop()


@pytest.fixture
def proxy(sim: Started) -> Iterator[vim.VirtualMachine]:
    """proxy01, and everything as it was afterwards."""
    machine = sim.vm("proxy01")
    yield machine
    machine = sim.vm("proxy01")  # the simulator may have been started again
    sim.control.call("fill_units", vm="proxy01", leave=None)
    for disk in disks(machine.config).values():
        if "proxy01/" not in disk.backing.fileName:
            detach(machine, disk)
    sim.control.call("crash_proxy")
    sim.control.call("set_settings", device_delay=0.0)
    for name in ("app01", "restore01"):
        done(sim.vm(name).RemoveAllSnapshots_Task())
        if sim.vm(name).runtime.consolidationNeeded:
            done(sim.vm(name).ConsolidateVMDisks_Task())


def disk_of(file: str, controller: int = 1000, unit: int | None = None, mode: str = READ) -> Any:
    return Disk(
        key=-1,
        controllerKey=controller,
        unitNumber=unit,
        backing=Disk.FlatVer2BackingInfo(fileName=file, diskMode=mode),
    )


def attach(machine: Any, file: str, *more: Any, **options: Any) -> Any:
    """-> the device as the machine has it."""
    change = DeviceSpec(operation="add", device=disk_of(file, **options))
    done(machine.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[*more, change])))
    return next(disk for disk in disks(machine.config).values() if disk.backing.fileName == file)


def detach(machine: Any, disk: Any, operation: str | None = None) -> None:
    change = DeviceSpec(operation="remove", fileOperation=operation, device=disk)
    done(machine.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[change])))


def link_of(sim: Started, disk: Any) -> Path:
    return Path(sim.info["device_dir"]) / f"wwn-0x{disk.backing.uuid.replace('-', '').lower()}"


def sysfs_delete(sim: Started, link: Path) -> None:
    """As the guest does it; the link goes a little later."""
    name = link.resolve().name
    (Path(sim.info["sysfs_dir"]) / "class" / "block" / name / "device" / "delete").write_text("1\n")
    sim.until(lambda: not link.is_symlink())


def nbdkit(command: str, device: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    argv = ["nbdkit", "-U", "-", *arguments, "file", str(device), "--run", command]
    return subprocess.run(argv, capture_output=True, timeout=60, check=False)


def sha256(device: Path) -> str:
    read = nbdkit('nbdcopy "$uri" -', device, "-r")
    assert read.returncode == 0, read.stderr
    return hashlib.sha256(read.stdout).hexdigest()


def write_at(device: Path, offset: int, text: str) -> None:
    code = f"h.pwrite(b'{text}', {offset}); h.flush()"
    done = nbdkit(f'{sys.executable} -m nbd -u "$uri" -c "{code}"', device)
    assert done.returncode == 0, done.stderr


# --- attaching ------------------------------------------------------------------------------------------------------


def test_a_snapshots_disks_are_read_through_their_devices(sim: Started, proxy: Any) -> None:
    app = sim.vm("app01")
    sim.control.call("guest_write", vm="app01", disk=2000, offset=7 * MIB + 5, pattern={"seed": 1, "length": 300_000})
    foreign = snapshot(app, "foreign")
    sim.control.call("guest_write", vm="app01", disk=2000, offset=3 * MIB, pattern={"seed": 2, "length": 5000})
    snap = snapshot(app)
    sim.control.call("guest_write", vm="app01", disk=2000, offset=0, pattern={"seed": 3, "length": 5 * MIB})
    frozen = disks(snap.config)
    attached = {key: attach(proxy, disk.backing.fileName) for key, disk in frozen.items()}
    for key, disk in attached.items():
        held = sim.control.call("read_disk", vm="app01", disk=key, snapshot=snap._moId)
        link = link_of(sim, disk)
        assert link.is_symlink() and str(link.readlink()).startswith("../dev/sd")
        assert (link.stat().st_size, sha256(link)) == (held["capacity_bytes"], held["sha256"])
        assert disk.backing.uuid == frozen[key].backing.uuid
    found = sim.control.call("attachments")
    assert [(one["path"], one["stale"]) for one in found] == [
        (disk.backing.fileName, False) for disk in attached.values()
    ]
    assert [(one["controller"], one["unit"]) for one in found] == [(1000, 1), (1000, 2)]

    with pytest.raises(vim.fault.FileLocked):
        remove(foreign)
    assert app.runtime.consolidationNeeded
    for disk in attached.values():
        detach(proxy, disk)
    done(app.ConsolidateVMDisks_Task())
    assert not app.runtime.consolidationNeeded


def test_a_device_stays_until_the_guest_deletes_it(sim: Started, proxy: Any) -> None:
    snap = snapshot(sim.vm("app01"))
    file = disks(snap.config)[2000].backing.fileName
    disk = attach(proxy, file)
    link, first = link_of(sim, disk), link_of(sim, disk).resolve()
    detach(proxy, disk)
    assert link.is_symlink() and link.resolve() == first
    with pytest.raises(OSError, match="No such device"):
        link.read_bytes()
    assert [one["stale"] for one in sim.control.call("attachments")] == [True]

    attach(proxy, file, unit=3)  # the older device has the link
    assert link.resolve() == first
    (Path(sim.info["sysfs_dir"]) / "class" / "block" / first.name / "device" / "delete").write_text("0\n")
    (Path(sim.info["sysfs_dir"]) / "class" / "block" / first.name / "device" / "delete").write_text("1\n")
    sim.until(lambda: link.resolve() != first)
    held = sim.control.call("read_disk", vm="app01", disk=2000, snapshot=snap._moId)
    assert sha256(link) == held["sha256"]

    sysfs_delete(sim, link)  # first the guest, then the API: as it ought to be
    assert [one["deleted"] for one in sim.control.call("attachments")] == [True]
    detach(proxy, next(one for one in disks(proxy.config).values() if one.backing.fileName == file))
    assert sim.control.call("attachments") == []
    assert not [one for one in (sim.state / "dev").iterdir() if one.name.startswith((".sd", "sdb", "sdc"))]


def test_a_device_that_stayed_hides_what_is_attached_at_its_address(sim: Started, proxy: Any) -> None:
    first = attach(proxy, disks(sim.vm("restore01").config)[2000].backing.fileName, unit=5)
    link = link_of(sim, first)
    block = Path(sim.info["sysfs_dir"]) / "class" / "block" / link.resolve().name
    told = {name: (block / "device" / name).read_bytes() for name in ("wwid", "vpd_pg83")}
    digits = first.backing.uuid.replace("-", "").lower()
    assert told["wwid"] == f"naa.{digits}\n".encode() and told["vpd_pg83"][8:].hex() == digits
    assert (block / "device").resolve().name == "2:0:5:0" and int((block / "diskseq").read_text()) > 0
    detach(proxy, first)

    snap = snapshot(sim.vm("app01"))
    second = attach(proxy, disks(snap.config)[2000].backing.fileName, unit=5)
    held = sim.control.call("read_disk", vm="app01", disk=2000, snapshot=snap._moId)
    # The name, the link and what the kernel remembers are the old disk's, the bytes are the new one's.
    assert not link_of(sim, second).is_symlink() and sha256(link) == held["sha256"]
    assert {name: (block / "device" / name).read_bytes() for name in told} == told
    sysfs_delete(sim, link)
    assert not block.exists()
    detach(proxy, second)


def test_a_reconfiguration_that_names_a_version_is_a_compare_and_set(sim: Started, proxy: Any) -> None:
    seen = proxy.config.changeVersion
    file = disks(sim.vm("restore01").config)[2000].backing.fileName
    disk = attach(proxy, file)
    assert proxy.config.changeVersion != seen
    spec = vim.vm.ConfigSpec(changeVersion=seen, deviceChange=[DeviceSpec(operation="remove", device=disk)])
    with pytest.raises(vim.fault.ConcurrentAccess):
        done(proxy.ReconfigVM_Task(spec))
    # Nor where somebody comes between the call and its task.
    sim.control.call("set_settings", task_delay=1.0)
    try:
        spec.changeVersion = proxy.config.changeVersion
        task = proxy.ReconfigVM_Task(spec)
        sim.control.call("fill_units", vm="proxy01", leave=3)
        with pytest.raises(vim.fault.ConcurrentAccess):
            done(task)
    finally:
        sim.control.call("set_settings", task_delay=0.02)
    assert disk.key in disks(proxy.config)


def test_nonpersistent_writes_are_lost(sim: Started, proxy: Any) -> None:
    off = sim.vm("restore01")
    file = disks(off.config)[2000].backing.fileName
    before = sim.control.call("read_disk", vm="restore01", disk=2000)["sha256"]
    link = link_of(sim, attach(proxy, file))
    write_at(link, 4096, "written")
    assert link.read_bytes()[4096:4103] == b"written"
    with pytest.raises(vim.fault.FileLocked):
        done(off.PowerOn())
    detach(proxy, next(disk for disk in disks(proxy.config).values() if disk.backing.fileName == file))
    assert sim.control.call("read_disk", vm="restore01", disk=2000)["sha256"] == before


@pytest.mark.parametrize("delete_first", [True, False])
def test_persistent_writes_reach_the_leaf_and_spoil_its_tracking(sim: Started, proxy: Any, delete_first: bool) -> None:
    off = sim.vm("restore01")
    tracking(off)
    snap = snapshot(off)
    change_id = disks(snap.config)[2000].backing.changeId
    remove(snap)
    file = disks(off.config)[2000].backing.fileName
    disk = attach(proxy, file, mode=WRITE)
    link = link_of(sim, disk)
    write_at(link, 0, f"written {delete_first}")
    with pytest.raises(vim.fault.FileLocked):
        snapshot(off)
    with pytest.raises(vim.fault.FileLocked):
        attach(proxy, file)
    if delete_first:
        sysfs_delete(sim, link)
    detach(proxy, disk)
    assert sim.control.read("restore01", 2000, 0, 12) == f"written {delete_first}"[:12].encode()
    # from now on changes get lost
    sim.control.call("guest_write", vm="restore01", disk=2000, offset=0, pattern={"seed": 1, "length": 16 * MIB})
    changed, _pages = areas(off, snapshot(off), change_id)
    assert 0 < sum(length for _offset, length in changed) < 16 * MIB
    tracking(off, False)


def test_writes_to_a_leaf_over_a_snapshot_are_taken_over(sim: Started, proxy: Any) -> None:
    off = sim.vm("restore01")
    sim.control.call("guest_write", vm="restore01", disk=2000, offset=5 * MIB, data=b"in the base")
    snap = snapshot(off)
    leaf = disks(off.config)[2000].backing.fileName
    for file, mode in ((disks(snap.config)[2000].backing.fileName, WRITE), ("[vmfs01] app01/app01.vmdk", WRITE)):
        with pytest.raises(vim.fault.FileLocked):  # no leaf; a running VM's
            attach(proxy, file, mode=mode)
    disk = attach(proxy, leaf, mode=WRITE)
    assert sha256(link_of(sim, disk)) == sim.control.call("read_disk", vm="restore01", disk=2000)["sha256"]
    write_at(link_of(sim, disk), 9 * MIB + 3, "over it")
    sim.stop(9)
    sim.__init__(sim.state)  # the simulator was killed: what was written is still on its way
    proxy = sim.vm("proxy01")
    detach(proxy, next(disk for disk in disks(proxy.config).values() if disk.backing.fileName == leaf))
    assert sim.control.read("restore01", 2000, 9 * MIB + 3, 7) == b"over it"
    assert sim.control.read("restore01", 2000, 5 * MIB, 11) == b"in the base"


def test_a_crash_of_the_proxy_leaves_its_disks_attached(sim: Started, proxy: Any) -> None:
    app = sim.vm("app01")
    snap = snapshot(app)
    held = {
        key: sim.control.call("read_disk", vm="app01", disk=key, snapshot=snap._moId)["sha256"] for key in (2000, 2001)
    }
    first, second = (attach(proxy, disks(snap.config)[key].backing.fileName) for key in (2000, 2001))
    write_at(link_of(sim, first), 0, "lost")
    detach(proxy, second)
    assert len(sim.control.call("attachments")) == 2
    left = sim.control.call("crash_proxy")
    assert [one["path"] for one in left] == [first.backing.fileName]
    assert sha256(link_of(sim, first)) == held[2000]
    with pytest.raises(vim.fault.FileLocked):
        remove(snap)
    detach(proxy, first)
    done(app.ConsolidateVMDisks_Task())
    assert sim.control.call("read_disk", vm="app01", disk=2001)["sha256"] == held[2001]


def test_destroy_really_deletes_and_detaching_does_not(sim: Started, proxy: Any) -> None:
    off = sim.vm("restore01")
    new = Disk(
        key=-7,
        controllerKey=1000,
        unitNumber=9,
        capacityInBytes=MIB,
        backing=Disk.FlatVer2BackingInfo(fileName="", diskMode="persistent", thinProvisioned=True),
    )
    add = DeviceSpec(operation="add", fileOperation="create", device=new)
    done(off.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[add])))
    mine = next(disk for disk in disks(off.config).values() if disk.unitNumber == 9)
    extent = sim.state / "datastores" / "vmfs01" / mine.backing.fileName.split("] ")[1].replace(".vmdk", "-flat.vmdk")
    detach(proxy, attach(proxy, mine.backing.fileName))
    assert extent.exists()
    detach(proxy, attach(proxy, mine.backing.fileName), "destroy")
    assert not extent.exists()
    detach(off, mine)


def test_no_link_without_disk_uuids_and_late_devices(sim: Started, proxy: Any) -> None:
    off = sim.vm("restore01")
    file = disks(off.config)[2000].backing.fileName
    option = vim.option.OptionValue(key="disk.EnableUUID", value="")
    done(proxy.ReconfigVM_Task(vim.vm.ConfigSpec(extraConfig=[option])))
    disk = attach(proxy, file)
    assert not link_of(sim, disk).is_symlink() and Path(sim.control.call("attachments")[0]["device"]).is_file()
    option.value = "TRUE"
    done(proxy.ReconfigVM_Task(vim.vm.ConfigSpec(extraConfig=[option])))
    assert link_of(sim, disk).exists()
    done(proxy.PowerOff())
    assert not link_of(sim, disk).is_symlink()
    done(proxy.PowerOn())
    assert link_of(sim, disk).exists()
    detach(proxy, disk)
    sysfs_delete(sim, link_of(sim, disk))
    sim.control.call("set_settings", device_delay=1.5)
    disk = attach(proxy, file)
    assert not link_of(sim, disk).is_symlink()
    sim.until(link_of(sim, disk).exists)


# --- units and places -----------------------------------------------------------------------------------------------


def test_units_and_controllers_run_out(sim: Started, proxy: Any) -> None:
    option = proxy.environmentBrowser.QueryConfigOption(None, None).hardwareOptions.virtualDeviceOption
    counts = {type(one): one.numSCSIDisks.max for one in option}
    assert counts[vim.vm.device.ParaVirtualSCSIControllerOption] == 63
    assert counts[vim.vm.device.VirtualLsiLogicControllerOption] == 15
    file = disks(sim.vm("restore01").config)[2000].backing.fileName
    assert sim.control.call("fill_units", vm="proxy01", leave=1, controllers=1) == {"free": 1, "controllers": 1}
    detach(proxy, attach(proxy, file))
    assert sim.control.call("fill_units", vm="proxy01", leave=0, controllers=1) == {"free": 0, "controllers": 1}
    with pytest.raises(vim.fault.TooManyDevices):
        attach(proxy, file)
    new = vim.vm.device.ParaVirtualSCSIController(key=-5, busNumber=1, sharedBus="noSharing")
    disk = attach(proxy, file, DeviceSpec(operation="add", device=new), controller=-5)
    assert (disk.controllerKey, disk.unitNumber, disk.key) == (1001, 0, 2016)
    detach(proxy, disk)
    sim.control.call("fill_units", vm="proxy01", leave=0)
    with pytest.raises(vim.fault.TooManyDevices):
        attach(proxy, file, DeviceSpec(operation="add", device=new), controller=-5)
    assert sim.control.call("fill_units", vm="proxy01", leave=None)["free"] > 62


def test_a_datastore_out_of_reach_is_refused(sim: Started, proxy: Any) -> None:
    with pytest.raises(vim.fault.InvalidDatastorePath):
        attach(proxy, "[vmfs11] edge01/edge01.vmdk")
    with pytest.raises(vim.fault.FileNotFound):
        attach(proxy, "[vmfs01] app01/none.vmdk")
    sim.control.call("set_full", datastore="vmfs01", full=True)  # the redo log lies beside the disk
    try:
        with pytest.raises(vim.fault.NoDiskSpace):
            attach(proxy, disks(sim.vm("restore01").config)[2000].backing.fileName)
    finally:
        sim.control.call("set_full", datastore="vmfs01", full=False)


def test_what_a_user_needs(sim: Started, proxy: Any) -> None:
    machine = sim.vm("proxy01", sim.backup_user())
    file = disks(sim.vm("restore01").config)[2000].backing.fileName
    detach(machine, attach(machine, file))
    name = sim.info["backup_username"]
    lost = "VirtualMachine.Config.AddExistingDisk"
    sim.control.call("set_privileges", username=name, remove=[lost])
    try:
        with pytest.raises(vim.fault.NoPermission) as error:
            attach(machine, file)
        assert error.value.privilegeId == lost
    finally:
        sim.control.call("set_privileges", username=name, add=[lost])


# --- identity and LUNs ----------------------------------------------------------------------------------------------


def test_who_the_machine_is(sim: Started, proxy: Any) -> None:
    folder = Path(sim.info["sysfs_dir"]) / "class"
    bios = uuid.UUID(proxy.config.uuid)
    mac = next(one.macAddress for one in proxy.config.hardware.device if hasattr(one, "macAddress"))

    def told() -> tuple[str | None, str | None, list[str]]:
        ids = []
        for name in ("product_uuid", "product_serial"):
            file = folder / "dmi" / "id" / name
            ids.append(file.read_text().strip() if file.exists() else None)
        macs = [file.read_text().strip() for file in folder.glob("net/ens*/address")]
        return ids[0], ids[1], sorted(macs)

    serial = "VMware-" + " ".join(f"{one:02x}" for one in bios.bytes[:8]) + "-"
    serial += " ".join(f"{one:02x}" for one in bios.bytes[8:])
    try:
        assert told() == (str(bios), serial, [mac])
        sim.control.call("proxy", identity="swapped")
        assert told() == (str(uuid.UUID(bytes=bios.bytes_le)), serial, [mac])
        sim.control.call("proxy", identity="serial_only")
        assert told() == (None, serial, [mac])
        sim.control.call("proxy", identity="mac_only")
        assert told() == (None, None, [mac])
        sim.control.call("proxy", identity="ambiguous")
        assert told()[:2] == (None, None) and len(told()[2]) == 2
        sim.control.call("proxy", identity="none")
        assert mac not in told()[2] and str(bios) not in str(told())
    finally:
        sim.control.call("proxy", identity="normal")


def test_luns_of_shared_vmfs_datastores_are_seen(sim: Started) -> None:
    folder = Path(sim.info["device_dir"])
    extents = {}
    view = sim.si.content.viewManager.CreateContainerView(sim.si.content.rootFolder, [vim.Datastore], True)
    for datastore in view.view:
        if isinstance(datastore.info, vim.host.VmfsDatastoreInfo):
            extents[datastore.name] = datastore.info.vmfs.extent[0].diskName
    shared = {extents["vmfs01"], extents["vmfs11"]}
    assert {link.name for link in folder.iterdir() if link.name.startswith("naa.")} == shared
    for name in shared:
        told = subprocess.run(["blkid", "-p", folder / name], capture_output=True, text=True, check=False)
        assert 'PTTYPE="dos"' in told.stdout and "TYPE=" not in told.stdout.replace("PTTYPE=", "")
        assert (folder / name).read_bytes()[450] == 0xFB
    sim.control.call("set_lun", datastore="vmfs01", visible=False)
    assert not (folder / extents["vmfs01"]).is_symlink() and (folder / extents["vmfs11"]).exists()
    sim.control.call("set_lun", datastore="vmfs01", visible=True)
    assert (folder / extents["vmfs01"]).exists()


def test_the_large_is_linked_and_not_copied(sim: Started, proxy: Any, tmp_path: Path) -> None:
    """A base disk of more than 512 MiB of data."""
    off = sim.vm("restore01")
    new = Disk(
        key=-7,
        controllerKey=1000,
        unitNumber=9,
        capacityInBytes=600 * MIB,
        backing=Disk.FlatVer2BackingInfo(fileName="", diskMode="persistent", thinProvisioned=False),
    )
    add = DeviceSpec(operation="add", fileOperation="create", device=new)
    done(off.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[add])))
    mine = next(disk for disk in disks(off.config).values() if disk.unitNumber == 9)
    link = link_of(sim, attach(proxy, mine.backing.fileName))
    (found,) = sim.control.call("attachments")
    assert found["bytes"] == "link" and link.stat().st_nlink == 2
    detach(proxy, next(disk for disk in disks(proxy.config).values() if disk.backing.uuid == mine.backing.uuid))
    with pytest.raises(OSError, match="No such device"):
        link.read_bytes()
    detach(off, mine, "destroy")
    with contextlib.suppress(vmodl.fault.ManagedObjectNotFound):
        assert len(disks(off.config)) == 2
