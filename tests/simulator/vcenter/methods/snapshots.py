# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Snapshots: create, remove, revert, consolidate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from .. import disks, soap
from ..inventory import SnapshotRecord, VirtualMachine
from ..model import Managed
from ..services import Task
from . import Context, method

if TYPE_CHECKING:
    from ..simulator import Simulator


class SnapshotObject(Managed):
    """A snapshot as a managed object."""

    type = vim.vm.Snapshot

    def __init__(self, simulator: "Simulator", vm: VirtualMachine, record: SnapshotRecord) -> None:
        super().__init__(simulator, record.moid)
        self.of_vm = vm
        self.record = record

    def p_config(self) -> Any:
        config = self.of_vm._with_backings(self.record.config, current=False)
        if not self.of_vm.simulator.settings.snapshot_settings:
            config.extraConfig = []
        return config

    def p_vm(self) -> Any:
        return self.of_vm.ref

    def p_childSnapshot(self) -> Any:
        children = [one for one in self.of_vm.snapshots if one.parent == self.moid]
        return soap.array(vim.vm.Snapshot, [vim.vm.Snapshot(one.moid) for one in children])


def _create(context: Context, vm: VirtualMachine, name: str, description: str, memory: bool, quiesce: bool) -> Any:
    if not name:
        raise vim.fault.InvalidName(name=name)
    with context.simulator.lock:
        disks.check_snapshot(vm, memory)

    def body(task: Task) -> Any:
        task.check_cancelled()
        with vm.lock:
            record = disks.create_snapshot(vm, name, description, memory, quiesce)
        return vim.vm.Snapshot(record.moid)

    return context.simulator.tasks.start(context, context.method, vm, body, vm, cancelable=True)


# The quiesce option is ignored where Tools don't run, and the tree shows what was asked for (VADP facts 16): so it is
# only kept.


@method("VirtualMachine", "CreateSnapshot_Task", changing=True)
def create_snapshot(
    context: Context, vm: VirtualMachine, name: str, description: str | None, memory: bool, quiesce: bool
) -> Any:
    return _create(context, vm, name, description or "", memory, quiesce)


@method("VirtualMachine", "CreateSnapshotEx_Task", changing=True)
def create_snapshot_ex(
    context: Context, vm: VirtualMachine, name: str, description: str | None, memory: bool, quiesceSpec: Any
) -> Any:
    return _create(context, vm, name, description or "", memory, quiesceSpec is not None)


def _remove(context: Context, vm: VirtualMachine, moids: list[str], merge: bool) -> Any:
    def body(task: Task) -> None:
        with vm.lock:
            disks.remove_snapshots(vm, [moid for moid in moids if any(one.moid == moid for one in vm.snapshots)], merge)

    return context.simulator.tasks.start(context, context.method, vm, body, vm)


@method("VirtualMachineSnapshot", "RemoveSnapshot_Task", changing=True)
def remove_snapshot(context: Context, snapshot: SnapshotObject, removeChildren: bool, consolidate: bool | None) -> Any:
    vm = snapshot.of_vm
    moids = disks.subtree(vm, snapshot.moid) if removeChildren else [snapshot.moid]
    return _remove(context, vm, moids, consolidate is not False)


@method("VirtualMachine", "RemoveAllSnapshots_Task", changing=True)
def remove_all(context: Context, vm: VirtualMachine, consolidate: bool | None, spec: Any) -> Any:
    roots = [one.moid for one in vm.snapshots if one.parent is None]
    moids = [moid for root in roots for moid in disks.subtree(vm, root)]
    return _remove(context, vm, moids, consolidate is not False)


@method("VirtualMachineSnapshot", "RenameSnapshot", changing=True)
def rename_snapshot(context: Context, snapshot: SnapshotObject, name: str | None, description: str | None) -> None:
    with context.simulator.lock:
        if snapshot.of_vm.task is not None:
            raise vim.fault.TaskInProgress(task=snapshot.of_vm.task.ref)
        if name is not None:
            snapshot.record.name = name
        if description is not None:
            snapshot.record.description = description
        snapshot.of_vm.touch()


def _revert(context: Context, vm: VirtualMachine, moid: str, suppress_power_on: bool | None) -> Any:
    if vm.is_template:
        raise vmodl.fault.NotSupported()

    def body(task: Task) -> None:
        with vm.lock:
            record = vm.snapshot(moid)
            disks.revert(vm, moid, bool(suppress_power_on))
        context.simulator.events.add(
            vim.event.EventEx,
            vm,
            context.user.name,
            f"The execution state of the virtual machine {vm.name} has been reverted to the state of snapshot "
            f"{record.name}, with ID {record.id}",
            eventTypeId="com.vmware.vc.vm.VmStateRevertedToSnapshot",
            severity="info",
            objectId=vm.moid,
            objectType=vim.VirtualMachine,
            objectName=vm.name,
        )

    return context.simulator.tasks.start(context, context.method, vm, body, vm)


@method("VirtualMachineSnapshot", "RevertToSnapshot_Task", changing=True)
def revert_to_snapshot(context: Context, snapshot: SnapshotObject, host: Any, suppressPowerOn: bool | None) -> Any:
    return _revert(context, snapshot.of_vm, snapshot.moid, suppressPowerOn)


@method("VirtualMachine", "RevertToCurrentSnapshot_Task", changing=True)
def revert_to_current(context: Context, vm: VirtualMachine, host: Any, suppressPowerOn: bool | None) -> Any:
    if vm.current_snapshot is None:
        raise vim.fault.NotFound()
    return _revert(context, vm, vm.current_snapshot, suppressPowerOn)


@method("VirtualMachine", "ConsolidateVMDisks_Task", changing=True)
def consolidate(context: Context, vm: VirtualMachine) -> Any:
    if vm.is_template:
        raise vmodl.fault.NotSupported()

    def body(task: Task) -> None:
        with vm.lock:
            disks.consolidate(vm)

    return context.simulator.tasks.start(context, context.method, vm, body, vm)
