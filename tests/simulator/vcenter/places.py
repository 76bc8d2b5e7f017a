# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Resource pools, vApps, and machines that an administrator moves and names."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from .inventory import Folder, ResourcePool, VirtualApp
from .model import SimulatorError

if TYPE_CHECKING:
    from .simulator import Simulator


class Places:
    """What the control socket offers of them."""

    def __init__(self, simulator: "Simulator") -> None:
        self._simulator = simulator

    def ops(self) -> dict[str, Any]:
        return {
            "make_pool": self.make_pool,
            "make_vapp": self.make_vapp,
            "remove_pool": self.remove_pool,
            "move_vm": self.move_vm,
            "set_identity": self.set_identity,
        }

    def _one(self, cls: Any, name: str) -> Any:
        found = [one for one in self._simulator.inventory.all(cls) if name in (one.name, one.moid)]
        if len(found) != 1:
            raise SimulatorError(f"{len(found)} of {cls.__name__} are called {name!r}")
        return found[0]

    def make_pool(self, name: str, parent: str = "resgroup-9") -> str:
        """A resource pool in another, or in a vApp. -> its moid"""
        pool = ResourcePool(
            self._simulator, self._simulator.new_moid("resgroup"), name, self._one(ResourcePool, parent).moid
        )
        return self._simulator.inventory.add(pool).moid

    def make_vapp(self, name: str, parent: str = "resgroup-9", folder: str = "group-v7") -> str:
        """A vApp in a resource pool and a folder of machines, or in another vApp and no folder. -> its moid"""
        above = self._one(ResourcePool, parent)
        vapp = VirtualApp(self._simulator, self._simulator.new_moid("resgroup"), name, above.moid)
        vapp.folder = "" if above.vapp is not None else self._one(Folder, folder).moid
        return self._simulator.inventory.add(vapp).moid

    def remove_pool(self, name: str) -> None:
        """Its machines go to the pool above, as the vSphere client does it; those of a vApp into its folder."""
        pool = self._one(ResourcePool, name)
        with self._simulator.lock:
            for child in pool.p_vm():
                machine = self._simulator.find_vm(child._moId)
                machine.pool = pool.parent
                machine.touch()
            self._simulator.inventory.remove(pool)

    def move_vm(self, vm: str, pool: str | None = None, folder: str | None = None) -> None:
        """Into a resource pool or vApp, or another folder."""
        machine = self._simulator.find_vm(vm)
        with machine.lock, self._simulator.lock:
            if pool is not None:
                into = self._one(ResourcePool, pool)
                machine.pool = into.moid
                if into.vapp is not None:
                    machine.parent = into.vapp.machines_folder.moid
            if folder is not None:
                machine.parent = self._one(Folder, folder).moid
            machine.touch()

    def set_identity(self, vm: str, instance_uuid: str | None = None, bios_uuid: str | None = None) -> None:
        """Other UUIDs: ``new`` makes one, ``unset`` takes it away, ``empty`` leaves an empty text."""
        machine = self._simulator.find_vm(vm)
        values = {"unset": None, "empty": "", "new": str(uuid.uuid4())}
        with machine.lock, self._simulator.lock:
            if instance_uuid is not None:
                machine.config.instanceUuid = values.get(instance_uuid, instance_uuid)
            if bios_uuid is not None:
                machine.config.uuid = values.get(bios_uuid, bios_uuid)
            machine.touch()
