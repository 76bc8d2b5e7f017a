# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Virtual machines: power, destroy, unregister, templates, relocation."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from .. import disks, storage
from ..inventory import Datastore, Host, ResourcePool, VirtualMachine, datastore_of, disks_in, folder_of
from ..model import Managed
from ..services import Task
from . import Context, find_object, leases, method


def _refuse_template(vm: VirtualMachine) -> None:
    if vm.is_template:
        raise vmodl.fault.NotSupported(msg="The operation is not supported on a template.")


def _power_task(context: Context, vm: VirtualMachine, target: str, allowed: tuple[str, ...]) -> Any:
    _refuse_template(vm)
    if vm.power_state not in allowed:
        raise vim.fault.InvalidPowerState(
            requestedState=target,
            existingState=vm.power_state,
            msg=f"The attempted operation cannot be performed in the current state ({vm.power_state}).",
        )

    if target == "poweredOn":
        leases.refuse_held(vm)

    def body(task: Task) -> None:
        with vm.lock:
            disks.power(vm, target)

    return context.simulator.tasks.start(context, context.method, vm, body, vm)


@method("VirtualMachine", "PowerOnVM_Task", changing=True)
def power_on(context: Context, vm: VirtualMachine, host: Any) -> Any:
    return _power_task(context, vm, "poweredOn", ("poweredOff", "suspended"))


@method("VirtualMachine", "PowerOffVM_Task", changing=True)
def power_off(context: Context, vm: VirtualMachine) -> Any:
    return _power_task(context, vm, "poweredOff", ("poweredOn",))


@method("VirtualMachine", "SuspendVM_Task", changing=True)
def suspend(context: Context, vm: VirtualMachine) -> Any:
    return _power_task(context, vm, "suspended", ("poweredOn",))


@method("VirtualMachine", "ResetVM_Task", changing=True)
def reset(context: Context, vm: VirtualMachine) -> Any:
    return _power_task(context, vm, "poweredOn", ("poweredOn",))


@method("VirtualMachine", "ShutdownGuest", changing=True)
def shutdown_guest(context: Context, vm: VirtualMachine) -> None:
    if not vm.powered_on:
        raise vim.fault.InvalidPowerState(requestedState="poweredOn", existingState=vm.power_state)
    if not vm.tools_running:
        raise vim.fault.ToolsUnavailable()
    with vm.lock:
        disks.power(vm, "poweredOff")


@method("VirtualMachine", "RefreshStorageInfo")
def refresh_storage_info(context: Context, vm: VirtualMachine) -> None:
    """Sizes are read from the files each time."""


@method("ManagedEntity", "Reload")
def reload(context: Context, entity: Managed) -> None:
    """Nothing is cached."""


# --- leaving --------------------------------------------------------------------------------------------------------


def _must_be_off(vm: VirtualMachine) -> None:
    leases.refuse_held(vm)
    if vm.power_state != "poweredOff":
        raise vim.fault.InvalidPowerState(requestedState="poweredOff", existingState=vm.power_state)


@method("VirtualMachine", "UnregisterVM", changing=True)
def unregister(context: Context, vm: VirtualMachine) -> None:
    _must_be_off(vm)
    with context.simulator.lock:
        if vm.task is not None:
            raise vim.fault.TaskInProgress(task=vm.task.ref)
        context.simulator.inventory.remove(vm)


def delete_files(vm: VirtualMachine) -> None:
    """A VM's disks and its other files; a folder that is empty then goes too."""
    store = vm.simulator.storage
    leaves = {disk.backing.fileName for disk in vm.disks}
    leaves |= {disk.backing.fileName for one in vm.snapshots for disk in disks_in(one.config.hardware.device)}
    chains = [vm.chain(leaf) for leaf in leaves]
    for path in {path for chain in chains for path in chain}:
        if store.info(path).openers:
            raise storage.Locked(path)
    for chain in sorted(chains, key=len, reverse=True):
        for path in chain:
            if store.exists(path) and not store.info(path).children:
                store.delete_disk(path)
    others = {store.local_path(path).parent for chain in chains for path in chain}
    folder = store.local_path(vm.config.files.vmPathName).parent
    stem = vm.config.files.vmPathName.rsplit("/", 1)[-1][: -len(".vmx")]
    for path in [*folder.glob(f"{stem}*"), folder / "vmware.log"]:
        if path.suffix in (".vmx", ".nvram", ".vmsd", ".vmsn", ".vmem", ".log"):
            path.unlink(missing_ok=True)
    for one in {folder, *others}:
        if one.is_dir() and not any(one.iterdir()):
            one.rmdir()


@method("ManagedEntity", "Destroy_Task", changing=True, privilege="System.View")
def destroy(context: Context, entity: Any) -> Any:
    if not isinstance(entity, VirtualMachine):
        raise vmodl.fault.NotSupported()
    vm = entity
    context.require("VirtualMachine.Inventory.Delete", vm)
    _must_be_off(vm)

    def body(task: Task) -> None:
        with vm.lock:
            delete_files(vm)
            context.simulator.inventory.remove(vm)

    return context.simulator.tasks.start(context, context.method, vm, body, vm)


@method("ManagedEntity", "Rename_Task", changing=True, privilege="System.View")
def rename(context: Context, entity: Any, newName: str) -> Any:
    context.require("VirtualMachine.Config.Rename" if isinstance(entity, VirtualMachine) else "Folder.Rename", entity)

    def body(task: Task) -> None:
        with context.simulator.lock:
            if any(one.name == newName for one in context.simulator.inventory.get(entity.parent).children()):
                raise vim.fault.DuplicateName(name=newName, object=entity.ref)
            entity.name = newName
            entity.save()

    return context.simulator.tasks.start(
        context, context.method, entity, body, entity if isinstance(entity, VirtualMachine) else None
    )


# --- templates ------------------------------------------------------------------------------------------------------


@method("VirtualMachine", "MarkAsTemplate", changing=True)
def mark_as_template(context: Context, vm: VirtualMachine) -> None:
    _must_be_off(vm)
    with context.simulator.lock:
        vm.config.template, vm.pool = True, None
        vm.touch()


@method("VirtualMachine", "MarkAsVirtualMachine", changing=True)
def mark_as_vm(context: Context, vm: VirtualMachine, pool: Any, host: Any) -> None:
    if not vm.is_template:
        raise vim.fault.InvalidState()
    with context.simulator.lock:
        vm.config.template, vm.pool = False, pool._moId
        vm.host = host._moId if host is not None else vm.host
        vm.touch()


# --- relocation -----------------------------------------------------------------------------------------------------


@method("VirtualMachine", "RelocateVM_Task", changing=True)
def relocate(context: Context, vm: VirtualMachine, spec: Any, priority: Any) -> Any:
    """A Storage vMotion: the VM's files get other paths; content, UUIDs and change ids stay."""
    simulator = context.simulator
    leases.refuse_held(vm)
    if vm.access:
        raise vim.fault.MethodDisabled(source=vm.access[0], msg=f"The method is disabled by '{vm.access[0]}'")
    target: Any = find_object(context, spec.datastore._moId, "Datastore") if spec.datastore is not None else None
    host: Any = find_object(context, spec.host._moId, "HostSystem") if spec.host is not None else None
    pool: Any = find_object(context, spec.pool._moId, "ResourcePool") if spec.pool is not None else None
    for found, cls in ((target, Datastore), (host, Host), (pool, ResourcePool)):
        if found is not None and not isinstance(found, cls):
            raise vmodl.fault.InvalidArgument(invalidProperty="spec")

    def body(task: Task) -> None:
        with vm.lock:
            if target is not None:
                _move_files(vm, target)
            with simulator.lock:
                vm.host = host.moid if host is not None else vm.host
                vm.pool = pool.moid if pool is not None else vm.pool
                vm.touch()

    return simulator.tasks.start(context, context.method, vm, body, vm)


def _move_files(vm: VirtualMachine, target: Datastore) -> None:
    simulator, store = vm.simulator, vm.simulator.storage
    if vm.snapshots or vm.consolidation_needed:
        raise vmodl.fault.NotSupported(msg="A VM with snapshots can't be moved here.")
    old_vmx = vm.config.files.vmPathName
    directory = folder_of(old_vmx).split("] ", 1)[-1]
    for disk in vm.disks:
        path = disk.backing.fileName
        if datastore_of(path) == target.name:
            continue
        new = f"[{target.name}] {directory}/{path.rsplit('/', 1)[-1]}"
        store.rename_disk(path, new)
        with simulator.lock:
            disk.backing.fileName = new
            disk.backing.datastore = target.ref
            vm.save()
    new_vmx = f"[{target.name}] {directory}/{old_vmx.rsplit('/', 1)[-1]}"
    if new_vmx == old_vmx:
        return
    stem, new_stem = old_vmx[: -len(".vmx")], new_vmx[: -len(".vmx")]
    with simulator.lock:
        for suffix in (".vmx", ".nvram", ".vmsd"):
            source, destination = store.local_path(stem + suffix), store.local_path(new_stem + suffix)
            if source.exists():
                destination.parent.mkdir(parents=True, exist_ok=True)
                source.rename(destination)
        vm.config.files.vmPathName = new_vmx
        vm.touch()
