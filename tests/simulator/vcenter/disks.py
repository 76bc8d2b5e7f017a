# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What happens to a VM's disks: snapshots, consolidation, revert, change tracking, locks of running machines.

Every function is called with ``vm.lock`` held; ``simulator.lock`` is taken only where the inventory changes, so that
others can read it while bytes are moved. The order is ``vm.lock``, ``simulator.lock``, the storage's own locks. Before
files change, ``vm.intent`` says what is about to happen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pyVmomi import vim, vmodl

from . import storage, vmspec
from .inventory import SnapshotRecord, VirtualMachine, disks_in, folder_of, in_snapshots, is_rdm, stem_of
from .model import clone

MAX_SNAPSHOTS = 32


# --- files ----------------------------------------------------------------------------------------------------------


def is_disk(store: storage.Storage, path: str) -> bool:
    """Whether the storage has that disk; files that a killed simulator left of one are none."""
    try:
        store.info(path)
    except storage.NotFound:
        return False
    return True


def next_delta(vm: VirtualMachine, path: str, taken: set[str]) -> str:
    """The name of the next delta disk: the lowest number that is free."""
    for number in range(1, 1000000):
        candidate = f"{stem_of(path)}-{number:06d}.vmdk"
        if candidate not in taken and not vm.simulator.storage.exists(candidate):
            return candidate
    raise AssertionError("a million delta disks")


def _configs(vm: VirtualMachine) -> list[Any]:
    return [vm.config, *(snapshot.config for snapshot in vm.snapshots)]


def referenced(vm: VirtualMachine) -> set[str]:
    """The disk files that the VM's configuration or one of its snapshots names."""
    return {disk.backing.fileName for config in _configs(vm) for disk in disks_in(config.hardware.device)}


def _rename_references(vm: VirtualMachine, old: str, new: str) -> None:
    for config in _configs(vm):
        for disk in disks_in(config.hardware.device):
            if disk.backing.fileName == old:
                disk.backing.fileName = new


def _set_intent(vm: VirtualMachine, intent: dict[str, Any] | None) -> None:
    with vm.simulator.lock:
        vm.intent = intent
        vm.save()


def collapsible(vm: VirtualMachine) -> list[tuple[str, str]]:
    """(child, parent): files of the VM's chains that nothing needs any more, and the delta to be merged into them."""
    used = referenced(vm)
    found: list[tuple[str, str]] = []
    for leaf in sorted(used):
        chain = vm.chain(leaf)
        for child, parent in zip(chain, chain[1:]):
            if parent in used or (child, parent) in found:
                continue
            if len(vm.simulator.storage.info(parent).children) == 1:
                found.append((child, parent))
    return found


def consolidate(vm: VirtualMachine) -> None:
    """Merge what can be merged.

    :raises storage.Locked: a disk is open; ``consolidation_needed`` is set then.
    """
    with vm.simulator.lock:
        todo = collapsible(vm)
        if bool(todo) != vm.consolidation_needed:
            vm.consolidation_needed = bool(todo)
            vm.save()
    while todo:
        # From the base upwards: the lowest pair first.
        child, parent = min(todo, key=lambda pair: len(vm.chain(pair[0])))
        _set_intent(vm, {"merge": [child, parent]})
        try:
            vm.simulator.storage.consolidate(child)
        except storage.StorageError:
            _set_intent(vm, None)
            raise
        with vm.simulator.lock:
            _rename_references(vm, child, parent)
            vm.intent = None
            todo = collapsible(vm)
            vm.consolidation_needed = bool(todo)
            vm.touch()


def delete_branch(vm: VirtualMachine, path: str) -> None:
    """Delete a delta disk, and its parents as long as nothing names them and nothing hangs on them."""
    used = referenced(vm)
    store = vm.simulator.storage
    for one in vm.chain(path):
        info = store.info(one)
        if one in used or info.children or info.parent is None:
            return
        store.delete_disk(one)


def recover(vm: VirtualMachine) -> None:
    """After a start: finish or undo what ``intent`` says."""
    intent, store = vm.intent, vm.simulator.storage
    if not intent:
        return
    if "create" in intent:
        for path in intent["create"]:
            if path not in referenced(vm) and is_disk(store, path):
                store.delete_disk(path)
    if "merge" in intent:
        child, parent = intent["merge"]
        if not is_disk(store, child):
            _rename_references(vm, child, parent)
    if "delete" in intent:
        for path in intent["delete"]:
            if is_disk(store, path):
                delete_branch(vm, path)
    for path in [*intent.get("create", ()), *intent.get("merge", ())[:1], *intent.get("delete", ())]:
        if not is_disk(store, path):
            for leftover in (path, path.replace(".vmdk", "-delta.vmdk")):
                store.local_path(leftover).unlink(missing_ok=True)
    vm.consolidation_needed = bool(collapsible(vm))
    vm.intent = None
    vm.save()


# --- change tracking ------------------------------------------------------------------------------------------------


def stun_cycle(vm: VirtualMachine) -> None:
    """What was asked for with ``changeTrackingEnabled`` becomes effective (VADP facts 7)."""
    store = vm.simulator.storage
    if vm.is_template:
        return
    for disk in vm.disks:
        if not in_snapshots(disk):
            continue
        path = disk.backing.fileName
        tracked = store.tracking(path) is not None
        if vm.config.changeTrackingEnabled and not tracked:
            store.enable_tracking(path)
        elif not vm.config.changeTrackingEnabled and tracked:
            store.disable_tracking(path)


# --- snapshots ------------------------------------------------------------------------------------------------------


def _depth(vm: VirtualMachine) -> int:
    depth, moid = 0, vm.current_snapshot
    while moid:
        depth += 1
        moid = vm.snapshot(moid).parent
    return depth


def check_snapshot(vm: VirtualMachine, memory: bool) -> None:
    """:raises vmodl.MethodFault: this VM can't have another snapshot."""
    if vm.is_template:
        raise vmodl.fault.NotSupported(msg="The operation is not supported on a template.")
    if _depth(vm) >= MAX_SNAPSHOTS:
        raise vim.fault.TooManySnapshotLevels(msg="Snapshot hierarchy is too deep.")
    for device in vm.config.hardware.device:
        if isinstance(device, vim.vm.device.VirtualSCSIController) and device.sharedBus != "noSharing":
            raise vim.fault.SnapshotIncompatibleDeviceInVm(
                fault=vim.fault.SharedBusControllerNotSupported(device="SCSI controller"),
                msg="Taking a snapshot of a virtual machine configured for bus-sharing is not supported.",
            )
        if isinstance(device, vim.vm.device.VirtualPCIPassthrough) and vm.powered_on:
            raise vim.fault.SnapshotIncompatibleDeviceInVm(
                fault=vim.fault.PCIPassthroughNotSupported(device="PCI device"),
                msg="Cannot take a snapshot of a running virtual machine with a passthrough device.",
            )
    if memory and vm.powered_on and any((disk.backing.diskMode or "").startswith("independent") for disk in vm.disks):
        raise vim.fault.MemorySnapshotOnIndependentDisk(
            msg="Cannot take a memory snapshot, since the virtual machine is configured with independent disks."
        )


def create_snapshot(vm: VirtualMachine, name: str, description: str, memory: bool, quiesce: bool) -> SnapshotRecord:
    """Freeze every disk that belongs into a snapshot; the VM goes on in new delta disks."""
    simulator, store = vm.simulator, vm.simulator.storage
    check_snapshot(vm, memory)
    frozen = [disk for disk in vm.disks if in_snapshots(disk)]
    for disk in frozen:
        if [owner for owner in store.writers(disk.backing.fileName) if owner != f"vm:{vm.moid}"]:
            raise storage.Locked(f"{disk.backing.fileName} is written by another VM")
    children: dict[int, str] = {}
    for disk in frozen:
        children[disk.key] = next_delta(vm, disk.backing.fileName, set(children.values()))
    moid = simulator.new_moid("snapshot")
    with simulator.lock:
        vm.intent = {"create": list(children.values())}
        vm.last_snapshot_id += 1
        vm.save()
    config = clone(vm.config)
    # Independent and physical RDM disks are not in the snapshot (VADP facts 13).
    for device in disks_in(config.hardware.device):
        if not in_snapshots(device):
            config.hardware.device.remove(device)
    record = SnapshotRecord(
        moid=moid,
        id=vm.last_snapshot_id,
        name=name,
        description=description,
        created=simulator.clock(),
        quiesced=quiesce,
        memory=memory and vm.powered_on,
        state=vm.power_state if memory and vm.powered_on else "poweredOff",
        parent=vm.current_snapshot,
        config=config,
    )
    # simulator.lock before the stun: whoever reads the inventory asks the storage too.
    with simulator.lock, _undone_on_failure(vm, list(children.values())), store.stun():
        for disk in disks_in(config.hardware.device):
            disk.backing.changeId = store.mark_snapshot(disk.backing.fileName, moid)
            store.snapshot_disk(disk.backing.fileName, children[disk.key])
        for disk in frozen:
            disk.backing.fileName = children[disk.key]
        vm.snapshots.append(record)
        vm.current_snapshot = moid
        vm.intent = None
        vm.touch()
    _snapshot_files(vm, record)
    return record


@contextlib.contextmanager
def _undone_on_failure(vm: VirtualMachine, created: list[str]) -> Iterator[None]:
    """New delta disks go again when not all of them could be made."""
    try:
        yield
    except storage.StorageError:
        for path in created:
            if is_disk(vm.simulator.storage, path):
                vm.simulator.storage.delete_disk(path)
        _set_intent(vm, None)
        raise


def _snapshot_file(vm: VirtualMachine, record: SnapshotRecord, suffix: str) -> Any:
    stem = vm.config.files.vmPathName[: -len(".vmx")]
    return vm.simulator.storage.local_path(f"{stem}-Snapshot{record.id}.{suffix}")


def _snapshot_files(vm: VirtualMachine, record: SnapshotRecord) -> None:
    _snapshot_file(vm, record, "vmsn").write_text(f"snapshot {record.moid}\n")
    if record.memory:
        _snapshot_file(vm, record, "vmem").write_bytes(bytes(4096))


def remove_snapshots(vm: VirtualMachine, moids: list[str], merge: bool) -> None:
    """Take snapshots out of the tree, then merge their files.

    :raises storage.Locked: a disk is open: the snapshots are gone from the tree, their deltas stay, and
        ``consolidation_needed`` is set (VADP facts 15).
    """
    simulator, store = vm.simulator, vm.simulator.storage
    records = [vm.snapshot(moid) for moid in moids]
    candidates = [disk.backing.fileName for record in records for disk in disks_in(record.config.hardware.device)]
    with simulator.lock:
        for record in records:
            for other in vm.snapshots:
                if other.parent == record.moid:
                    other.parent = record.parent
            if vm.current_snapshot == record.moid:
                vm.current_snapshot = record.parent
            vm.snapshots.remove(record)
            for suffix in ("vmsn", "vmem"):
                _snapshot_file(vm, record, suffix).unlink(missing_ok=True)
        vm.consolidation_needed = bool(collapsible(vm))
        vm.intent = {"delete": candidates}
        vm.touch()
    for record in records:
        for disk in disks_in(record.config.hardware.device):
            if is_disk(store, disk.backing.fileName):
                store.release_snapshot(disk.backing.fileName, record.moid)
    try:
        for path in candidates:
            if is_disk(store, path):
                delete_branch(vm, path)
    finally:
        _set_intent(vm, None)
    if merge:
        consolidate(vm)
        stun_cycle(vm)
        with simulator.lock:
            vm.touch()


def subtree(vm: VirtualMachine, moid: str) -> list[str]:
    """A snapshot and all below it, children first."""
    below = [one for child in vm.snapshots if child.parent == moid for one in subtree(vm, child.moid)]
    return [*below, moid]


def revert(vm: VirtualMachine, moid: str, suppress_power_on: bool) -> None:
    """Back to a snapshot: its configuration, and new empty deltas over the disks it froze.

    Disks that are not in the snapshot stay as they are. Change tracking keeps the first part of the change id and
    forgets what was written since (VADP facts 11).
    """
    simulator, store = vm.simulator, vm.simulator.storage
    record = vm.snapshot(moid)
    leaving = [disk.backing.fileName for disk in vm.disks if in_snapshots(disk)]
    for path in leaving:
        if store.info(path).openers:
            raise storage.Locked(path)
    config = clone(record.config)
    config.changeTrackingEnabled = vm.config.changeTrackingEnabled
    children = {}
    for disk in disks_in(config.hardware.device):
        children[disk.key] = next_delta(vm, disk.backing.fileName, set(children.values()))
    stay = [disk for disk in vm.disks if not in_snapshots(disk)]
    _set_intent(vm, {"create": list(children.values())})
    with simulator.lock, _undone_on_failure(vm, list(children.values())), store.stun():
        for disk in disks_in(config.hardware.device):
            store.snapshot_disk(disk.backing.fileName, children[disk.key])
        for disk in disks_in(config.hardware.device):
            store.revert_tracking(disk.backing.fileName, moid)
            disk.backing.fileName = children[disk.key]
            disk.backing.changeId = None
        config.hardware.device.extend(stay)
        vm.config = config
        vm.current_snapshot = moid
        on = record.state == "poweredOn" and not suppress_power_on
        vm.power_state = "poweredOn" if on else "poweredOff"
        vm.boot_time = simulator.clock() if on else None
        vm.intent = {"delete": leaving}
        vm.touch()
    try:
        for path in leaving:
            delete_branch(vm, path)
    finally:
        with simulator.lock:
            vm.intent = None
            vm.consolidation_needed = bool(collapsible(vm))
            vm.save()
    simulator.proxy.sync(vm)


# --- power and locks ------------------------------------------------------------------------------------------------


def _users_of(vm: VirtualMachine, path: str) -> list[VirtualMachine]:
    """Other VMs to whose chains a disk file belongs."""
    others = [one for one in vm.simulator.inventory.all(VirtualMachine) if one is not vm]
    return [one for one in others if any(path in one.chain(leaf) for leaf in referenced(one))]


def lock_foreign_disks(vm: VirtualMachine) -> None:
    """A running VM holds the disks open that belong to another VM too.

    :raises vim.fault.FileLocked: it would write to a disk that another running VM uses.
    """
    for disk in vm.disks:
        path = disk.backing.fileName
        if path in vm.openers or is_rdm(disk):
            continue
        others = _users_of(vm, path)
        if not others:
            continue
        multi_writer = disk.backing.sharing == "sharingMultiWriter"
        write = disk.backing.diskMode != "independent_nonpersistent" and not multi_writer
        for other in others:
            leaves = {one.backing.fileName for one in other.disks}
            if other.powered_on and not multi_writer and (write or path in leaves):
                raise vim.fault.FileLocked(file=path)
        try:
            vm.openers[path] = vm.simulator.storage.open(path, f"vm:{vm.moid}", write)
        except (storage.Locked, storage.NotALeaf):
            raise vim.fault.FileLocked(file=path) from None


def unlock(vm: VirtualMachine, keep: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Let go of the disks of others, except those of *keep*."""
    for path in [path for path in vm.openers if path not in keep]:
        vm.openers.pop(path).close()


def power(vm: VirtualMachine, state: str) -> None:
    simulator = vm.simulator
    if state == "poweredOn":
        try:
            lock_foreign_disks(vm)
        except vim.fault.FileLocked:
            unlock(vm)
            raise
        if vm.config.firmware == "efi" or vm.boot_time is None:
            ensure_nvram(vm)
        ensure_log(vm)
    else:
        unlock(vm)
    stun_cycle(vm)
    with simulator.lock:
        vm.power_state = state
        if state == "poweredOn":
            vm.boot_time = simulator.clock()
            vmspec.assign_slots(vm.config.hardware.device)
        vm.touch()
    simulator.proxy.sync(vm)


def nvram_path(vm: VirtualMachine) -> str:
    return vm.config.files.vmPathName[: -len(".vmx")] + ".nvram"


def ensure_nvram(vm: VirtualMachine) -> None:
    """A VM gets its NVRAM when it is first started (VADP facts 18)."""
    path = vm.simulator.storage.local_path(nvram_path(vm))
    if not path.exists():
        path.write_bytes(b"NVRAM" + vm.config.instanceUuid.encode() + bytes(range(256)) * 33)


def write_vmx(vm: VirtualMachine) -> None:
    """The configuration file, as far as a reader of the datastore would look at it."""
    lines = [
        '.encoding = "UTF-8"',
        f'displayName = "{vm.name}"',
        f'virtualHW.version = "{vm.hardware_version}"',
        f'guestOS = "{vm.config.guestId}"',
        f'firmware = "{vm.config.firmware or "bios"}"',
        f'uuid.bios = "{vm.config.uuid}"',
        f'vc.uuid = "{vm.config.instanceUuid}"',
    ]
    path = vm.simulator.storage.local_path(vm.config.files.vmPathName)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def ensure_log(vm: VirtualMachine) -> None:
    """A VM gets its log when it is first started: one that was only made has none."""
    log = vm.simulator.storage.local_path(folder_of(vm.config.files.vmPathName) + "/vmware.log")
    if not log.exists():
        log.write_text("vmx| Log for the simulator\n")


def grow(vm: VirtualMachine, key: int, capacity_bytes: int) -> None:
    """:raises storage.StorageError: it has snapshots, is open, or would shrink."""
    disk = next(disk for disk in vm.disks if disk.key == key)
    vm.simulator.storage.grow_disk(disk.backing.fileName, capacity_bytes)
    with vm.simulator.lock:
        set_capacity(disk, capacity_bytes)
        vm.touch()


def set_capacity(disk: Any, capacity_bytes: int) -> None:
    disk.capacityInBytes = capacity_bytes
    disk.capacityInKB = capacity_bytes // 1024
    disk.deviceInfo.summary = f"{capacity_bytes // 1024:,} KB"
