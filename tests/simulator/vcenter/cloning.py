# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Full and linked clones, and VMs deployed from a template: other files and identity, the same settings (facts 53)."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from . import disks
from .inventory import VirtualMachine, datastore_of, disks_in
from .model import SimulatorError, clone

if TYPE_CHECKING:
    from .simulator import Simulator

_PIECE = 1 << 20


def clone_vm(simulator: "Simulator", vm: str, name: str, disk_uuids: str = "new", running: bool = False) -> str:
    """A clone of what a VM or template holds now. -> its moid

    :param disk_uuids: ``new``, or ``keep`` as clones made in the vSphere client have it.
    """
    source = simulator.find_vm(vm)
    if disk_uuids not in ("new", "keep"):
        raise SimulatorError("disk_uuids is new or keep")
    with source.lock:
        made, home = _another(simulator, source, source.config, name)
        for path, disk in _paths(made, home):
            _copy_disk(simulator, disk, path, disk_uuids)
            disk.backing.datastore = simulator.inventory.datastore(datastore_of(path), source).ref
        return _finish(simulator, made, running)


def linked_clone(simulator: "Simulator", vm: str, snapshot: str, name: str, running: bool = False) -> str:
    """A clone whose disks are children of a snapshot's disks (``createNewChildDiskBacking``). -> its moid"""
    source = simulator.find_vm(vm)
    with source.lock:
        made, home = _another(simulator, source, source.snapshot(snapshot).config, name)
        for path, disk in _paths(made, home):
            info = simulator.storage.snapshot_disk(disk.backing.fileName, path, uuid=str(uuid.uuid4()))
            disk.backing.fileName, disk.backing.uuid, disk.backing.changeId = path, info.uuid, None
        return _finish(simulator, made, running)


def _another(simulator: "Simulator", source: VirtualMachine, settings: Any, name: str) -> tuple[VirtualMachine, str]:
    """A machine of those settings under another identity, and the folder of its files."""
    with simulator.lock:
        made = VirtualMachine(simulator, simulator.new_moid("vm"), name, source.parent)
        made.host, made.pool = source.host, source.pool or "resgroup-9"
        config = made.config = clone(settings)
    home = f"[{datastore_of(source.config.files.vmPathName)}] {name}"
    config.name, config.template, config.changeTrackingEnabled = name, False, False
    config.instanceUuid, config.uuid = str(uuid.uuid4()), str(uuid.uuid4())
    config.files.vmPathName = f"{home}/{name}.vmx"
    for card in config.hardware.device:
        if isinstance(card, vim.vm.device.VirtualEthernetCard):
            digits = uuid.uuid4().hex
            card.macAddress = f"00:50:56:{int(digits[:2], 16) % 64:02x}:{digits[2:4]}:{digits[4:6]}"
    return made, home


def _paths(made: VirtualMachine, home: str) -> list[tuple[str, Any]]:
    """(where its file comes, the disk) for each disk."""
    found = enumerate(disks_in(made.config.hardware.device))
    return [(f"{home}/{made.name}{f'_{index}' if index else ''}.vmdk", disk) for index, disk in found]


def _finish(simulator: "Simulator", made: VirtualMachine, running: bool) -> str:
    made.power_state = "poweredOn" if running else "poweredOff"
    made.tools_running = running
    made.boot_time = simulator.clock() if running else None
    simulator.inventory.add(made)
    with simulator.lock:
        made.touch()
    disks.write_vmx(made)
    disks.ensure_nvram(made)
    return made.moid


def _copy_disk(simulator: "Simulator", disk: Any, path: str, disk_uuids: str) -> None:
    store, old = simulator.storage, disk.backing.fileName
    known = store.info(old)
    new_uuid = known.uuid if disk_uuids == "keep" else str(uuid.uuid4())
    info = store.create_disk(path, known.capacity_bytes, thin=known.thin, uuid=new_uuid)
    for at in range(0, known.capacity_bytes, _PIECE):
        piece = store.read(old, at, min(_PIECE, known.capacity_bytes - at))
        if piece.count(0) != len(piece):
            store.write(path, at, piece)
    disk.backing.fileName, disk.backing.uuid, disk.backing.changeId = path, info.uuid, None
