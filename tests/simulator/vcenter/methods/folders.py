# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Folders: new folders, new VMs, registering VMs' files."""

from __future__ import annotations

import uuid as uuid_module
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyVmomi import vim, vmodl

from .. import disks, vmspec
from ..inventory import Cluster, Folder, Host, VirtualMachine, datastore_of
from ..model import Entity
from ..services import Task
from . import Context, find_object, method, reconfigure


def _free_name(context: Context, folder: Entity, name: str) -> None:
    for child in folder.children():
        if child.name == name:
            raise vim.fault.DuplicateName(name=name, object=child.ref)


@method("Folder", "CreateFolder", changing=True)
def create_folder(context: Context, folder: Folder, name: str) -> Any:
    simulator = context.simulator
    if not name:
        raise vim.fault.InvalidName(name=name)
    with simulator.lock:
        _free_name(context, folder, name)
        prefix = folder.moid.rsplit("-", 1)[-1][0]
        moid = f"group-{prefix}{simulator.new_moid('group').split('-')[-1]}"
        new = Folder(simulator, moid, name, folder.moid)
        new.props["childType"] = list(folder.props["childType"])
        simulator.inventory.add(new)
    return new.ref


@method("Folder", "MoveIntoFolder_Task", changing=True, privilege="Folder.Move")
def move_into_folder(context: Context, folder: Folder, list: Any) -> Any:
    def body(task: Task) -> None:
        with context.simulator.lock:
            for ref in list:
                entity: Any = find_object(context, ref._moId, ref._wsdlName)
                _free_name(context, folder, entity.name)
                entity.parent = folder.moid
                entity.save()

    return context.simulator.tasks.start(context, context.method, folder, body)


def _host_for(context: Context, pool: Any, host: Any, datastore: str) -> Host:
    inventory = context.simulator.inventory
    owner: Any = find_object(context, pool._moId, "ResourcePool").property("owner")
    cluster: Cluster = inventory.get(owner._moId)
    if host is not None:
        chosen = inventory.get(host._moId)
        if chosen not in cluster.hosts():
            raise vmodl.fault.InvalidArgument(invalidProperty="host")
        if not chosen.connected:
            raise vmodl.fault.HostNotConnected()
        if chosen.in_maintenance:
            raise vim.fault.InvalidState()
        if datastore not in chosen.datastores:
            raise vim.fault.InvalidDatastore(name=datastore)
        return chosen
    for candidate in cluster.hosts():
        if datastore in candidate.datastores and candidate.connected and not candidate.in_maintenance:
            return candidate
    raise vim.fault.InvalidDatastore(name=datastore)


def outside_of_vapps(context: Context, pool: Any) -> None:
    """:raises vmodl.fault.InvalidArgument: a machine of a vApp lies in no folder."""
    if context.simulator.inventory.get(pool._moId).vapp is not None:
        raise vmodl.fault.InvalidArgument(invalidProperty="pool")


@method("Folder", "CreateVM_Task", changing=True)
def create_vm(context: Context, folder: Folder, config: Any, pool: Any, host: Any) -> Any:
    outside_of_vapps(context, pool)
    make = maker(context, folder, config, pool, host)
    return context.simulator.tasks.start(context, context.method, folder, lambda task: make().ref)


def maker(context: Context, folder: Folder, spec: Any, pool: Any, host: Any) -> Callable[[], VirtualMachine]:
    """What makes a machine that may be made here. :raises vmodl.MethodFault: it may not."""
    simulator = context.simulator
    if "VirtualMachine" not in folder.props["childType"]:
        raise vmodl.fault.NotSupported()
    path = spec.files.vmPathName if spec.files is not None else None
    if not path:
        raise vmodl.fault.InvalidArgument(invalidProperty="config.files")
    if not spec.name:
        raise vim.fault.InvalidName(name="")
    datastore = simulator.inventory.datastore(datastore_of(path), folder)
    context.require("Datastore.AllocateSpace", datastore)
    if spec.extraConfig:
        context.require("VirtualMachine.Config.AdvancedConfig", folder)
    used = {datastore.name}
    for change in spec.deviceChange:
        if isinstance(change.device, vim.vm.device.VirtualDisk):
            privilege = "AddNewDisk" if change.fileOperation else "AddExistingDisk"
            context.require(f"VirtualMachine.Config.{privilege}", folder)
            name = change.device.backing.fileName or ""
            if name:
                used.add(simulator.inventory.datastore(datastore_of(name), folder).name)
        if isinstance(change.device, vim.vm.device.VirtualEthernetCard):
            context.require("Network.Assign", folder)
    with simulator.lock:
        _free_name(context, folder, spec.name)
    where = _host_for(context, pool, host, datastore.name)
    unseen = sorted(used - set(where.datastores))
    if unseen:
        raise vim.fault.InvalidDatastore(name=unseen[0])
    return lambda: _new_vm(context, folder, spec, pool, where, path)


def _new_vmx(context: Context, name: str, path: str) -> str:
    """``[ds]`` or ``[ds] folder/`` becomes a full path in a folder that is new; a full path is taken as it is."""
    store = context.simulator.storage
    if path.endswith(".vmx"):
        if store.exists(path):
            raise vim.fault.FileAlreadyExists(file=path)
        return path
    datastore = datastore_of(path)
    stem = path.split("]", 1)[1].strip().strip("/")
    safe = name.replace("/", "_").replace("\\", "_")
    if stem:
        return f"[{datastore}] {stem}/{safe}.vmx"
    for number in range(1000):
        directory = f"{safe}_{number}" if number else safe
        if not store.local_path(f"[{datastore}] {directory}").exists():
            return f"[{datastore}] {directory}/{safe}.vmx"
    raise AssertionError("a thousand folders of one name")


def _new_vm(context: Context, folder: Folder, spec: Any, pool: Any, host: Host, path: str) -> VirtualMachine:
    simulator = context.simulator
    with simulator.lock:
        _free_name(context, folder, spec.name)
        vm = VirtualMachine(simulator, simulator.new_moid("vm"), spec.name, folder.moid)
    vm.host, vm.pool = host.moid, pool._moId
    instance = spec.instanceUuid or str(uuid_module.uuid4())
    if any(one.config.instanceUuid == instance for one in simulator.inventory.all(VirtualMachine)):
        instance = str(uuid_module.uuid4())  # vCenter keeps instance UUIDs unique, whatever the spec says
    vm.config = vmspec.new_config(
        name=spec.name,
        vmx=_new_vmx(context, spec.name, path),
        instance_uuid=instance,
        bios_uuid=spec.uuid or str(uuid_module.uuid4()),
        guest_id=spec.guestId or "otherGuest",
        guest_name=vmspec.guest_name(spec.guestId or "otherGuest"),
        firmware=spec.firmware or "bios",
        version=spec.version or "vmx-19",
    )
    spec.instanceUuid = spec.uuid = None
    disks.write_vmx(vm)
    try:
        reconfigure.apply(vm, spec)
    except Exception:
        vmx: Path = simulator.storage.local_path(vm.config.files.vmPathName)
        for left in (vmx, vmx.parent / "vmware.log"):
            left.unlink(missing_ok=True)
        with suppress(OSError):  # the folder was another's before
            vmx.parent.rmdir()
        raise
    simulator.inventory.add(vm)
    disks.write_vmx(vm)
    return vm
