# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VDDK's advanced modes, as the proxy machine can have them: san and hotadd.

When a mode can't be had there is a reason, and the open goes on to the next mode (VADP facts 42).
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from . import proxy, soap
from .inventory import VirtualMachine, datastore_of, disks_in
from .methods import reconfigure
from .proxy import Node

if TYPE_CHECKING:
    from .simulator import Simulator

BUSY_SECONDS = 120.0  # for another task of the proxy VM


class CannotAttach(Exception):
    """The mode hotadd can't be had; the message says why."""


class AdvancedModes:
    """What :mod:`nfc` asks. All methods are thread-safe."""

    def __init__(self, simulator: "Simulator") -> None:
        self.simulator = simulator
        self._choosing = threading.Lock()  # a place is free until it is taken
        self._live: set[tuple[str, int]] = set()  # (path, device key) of what a living process has attached

    # san

    def san_problem(self, vm: VirtualMachine, path: str, write: bool, allow: str, deny: str) -> str | None:
        """Why a disk can't be had from its LUN, or None (VADP facts 34-36).

        :param allow: VDDK's list of the LUNs that may be used, empty for all. :param deny: of those that may not.
        """
        simulator = self.simulator
        datastore = simulator.inventory.datastore(datastore_of(path), vm)
        if datastore.kind != "VMFS":
            return f"{datastore.name} is {datastore.kind}, not VMFS"
        if datastore.local:
            return f"{datastore.name} is local to its host"
        device = simulator.proxy.lun_device(datastore)
        if device is None:
            return f"the LUN {datastore.lun} is not visible"
        if allow and not self._named(allow, datastore.lun, device):
            return f"the LUN {datastore.lun} is not in the allow list"
        if deny and self._named(deny, datastore.lun, device):
            return f"the LUN {datastore.lun} is in the deny list"
        if write:
            info = simulator.storage.info(path)
            if info.thin or info.parent is not None:
                return f"{path} is thin or a delta: it can't be written"
        return None

    def _named(self, words: str, lun: str, device: Path) -> bool:
        """Whether a list names a LUN: by its canonical name, or by a path that leads to its device."""
        for word in (one.strip() for one in words.replace(";", ",").split(",")):
            if word in (lun, "all") or (word.startswith("/") and Path(word).resolve() == device.resolve()):
                return True
        return False

    def lun_is_visible(self, vm: VirtualMachine, path: str) -> bool:
        datastore = self.simulator.inventory.datastore(datastore_of(path), vm)
        return self.simulator.proxy.lun_device(datastore) is not None

    # hotadd

    def hotadd_problem(self, vm: VirtualMachine, path: str, snapshot: str | None) -> str | None:
        """Why a disk can't be attached to this machine, as far as it can be known before (VADP facts 28)."""
        simulator = self.simulator
        machine = simulator.proxy.machine()
        if machine is None or simulator.proxy.identity == "none":
            return "this machine is not a virtual machine of that server"
        if not machine.powered_on:
            return f"{machine.name} is not running"
        if not proxy.enable_uuid(machine.config):
            return f"{machine.name} has no disk.EnableUUID"
        inventory = simulator.inventory
        if inventory.datacenter_of(machine) is not inventory.datacenter_of(vm):
            return f"{machine.name} is in another datacenter"
        if datastore_of(path) not in inventory.get(machine.host).datastores:
            return f"the host of {machine.name} does not see [{datastore_of(path)}]"
        config = vm.snapshot(snapshot).config if snapshot else vm.config
        source = next((one for one in disks_in(config.hardware.device) if path in vm.chain(one.backing.fileName)), None)
        controllers = {one.key: one for one in config.hardware.device}
        if source is None or not isinstance(controllers.get(source.controllerKey), vim.vm.device.VirtualSCSIController):
            return f"{path} is not on a SCSI controller"
        if self._free_place(machine) is None:
            return f"{machine.name} has no free SCSI unit"
        return None

    def _free_place(self, machine: VirtualMachine) -> tuple[int, int] | None:
        devices = machine.config.hardware.device
        for one in devices:
            if isinstance(one, vim.vm.device.VirtualSCSIController):
                for unit in proxy.free_units(machine, one, devices):
                    return one.key, unit
        return None

    def attach(self, user: Any, vm: VirtualMachine, path: str, write: bool, tmp: str) -> Node:
        """Attach a disk to this machine as *user*, and wait for its device.

        :param tmp: VDDK's tmpDirectory: what it attached is found again by that (VADP facts 44).
        :raises CannotAttach: it was refused; the message has the fault.
        """
        machine = self.simulator.proxy.machine()
        with self._choosing:
            place = None if machine is None else self._free_place(machine)
            if machine is None or place is None:
                raise CannotAttach("there is no free SCSI unit")
            device = vim.vm.device
            disk = device.VirtualDisk(
                key=-1,
                controllerKey=place[0],
                unitNumber=place[1],
                backing=device.VirtualDisk.FlatVer2BackingInfo(
                    fileName=path, diskMode="persistent" if write else "independent_nonpersistent"
                ),
            )
            self._reconfigure(user, machine, device.VirtualDeviceSpec(operation="add", device=disk))
        key = next(one.key for one in machine.disks if one.backing.fileName == path)
        self._live.add((path, key))
        node = self.simulator.proxy.wait_for(key, BUSY_SECONDS)
        if node is None:
            self._live.discard((path, key))
            raise CannotAttach(f"no device appeared for {path}")
        self.simulator.proxy.mark(node, tmp, vm.moid)
        return node

    def detach(self, user: Any, node: Node) -> None:
        """:raises CannotAttach: it was refused."""
        machine = self.simulator.proxy.machine()
        self.abandon(node)
        mine = None if machine is None else next((one for one in machine.disks if one.key == node.key), None)
        if machine is not None and mine is not None:
            self.simulator.proxy.delete(node)
            change = vim.vm.device.VirtualDeviceSpec(operation="remove", device=mine)
            self._reconfigure(user, machine, change)

    def abandon(self, node: Node) -> None:
        """The process that attached it is gone; the disk stays."""
        self._live.discard((node.path, node.key))

    def cleanup(self, user: Any, vm: VirtualMachine | None, tmp: str) -> tuple[int, int]:
        """Detach what processes with that tmpDirectory left. -> (VMs cleaned up, VMs of which something stays)."""
        cleaned, remaining = set(), set()
        for node in self.simulator.proxy.marked(tmp):
            if vm is not None and node.vm != vm.moid:
                continue
            if (node.path, node.key) in self._live:
                remaining.add(node.vm)
                continue
            try:
                self.detach(user, node)
                cleaned.add(node.vm)
            except CannotAttach:
                remaining.add(node.vm)
        return len(cleaned - remaining), len(remaining)

    def _reconfigure(self, user: Any, machine: VirtualMachine, change: Any) -> None:
        """A ReconfigVM_Task of the user's, which stands in the call log as any other."""
        simulator = self.simulator
        spec = vim.vm.ConfigSpec(deviceChange=[change])
        context = SimpleNamespace(simulator=simulator, user=user, method=_RECONFIGURE)
        error: Any = None
        try:
            for privilege in reconfigure.required_privileges(machine, spec):
                if not user.may(privilege):
                    raise vim.fault.NoPermission(privilegeId=privilege, msg=f"{privilege} is missing")
            deadline = time.monotonic() + BUSY_SECONDS
            while True:
                busy = machine.task
                try:
                    task = simulator.tasks.tasks[reconfigure.start(context, machine, spec)._moId]
                    break
                except vim.fault.TaskInProgress:
                    if time.monotonic() > deadline:
                        raise
                    if busy is not None:
                        busy.done.wait(1)
            task.done.wait()
            if task.info.state == "error":
                raise task.info.error
        except vmodl.MethodFault as fault:
            error = fault
            raise CannotAttach(f"{type(fault).__name__.rsplit('.', 1)[-1]}: {fault.msg}") from None
        finally:
            name = None if error is None else soap.VmomiSupport.GetWsdlName(type(error))
            simulator.record_call(user.name, "ReconfigVM_Task", machine.moid, changing=True, fault=name)


_RECONFIGURE = soap._method_info(soap.NAMESPACE, "ReconfigVM_Task")
