# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The backup proxy as its own operating system sees it: block devices, their links by id, and what sysfs tells.

The machine that tests run on takes the part of the VM ``proxy01``. Below the state folder::

    devices/wwn-0x<uuid>, naa.<id>      links, as under /dev/disk/by-id; what ``device_dir`` of the start line names
    dev/sdb                             a hot-added disk; dev/sdaa: a LUN. ``../dev/...`` is where the links point
    sys/class/block/sdb/device          link to sys/devices/.../2:0:1:0: host, channel, target (the unit), LUN
    .../delete                          written "1": the guest forgets the disk; ``sysfs_dir`` is sys
    .../vpd_pg83, wwid, vendor, model   what the disk told when the guest found it; sys/class/block/sdb/diskseq
    sys/class/dmi/id, sys/class/net     who the machine is

A hot-added disk holds the bytes of its chain. Nonpersistent: a sparse copy of them, thrown away with the device; only
a base disk of more than 512 MiB of data is a hard link to its extent (nobody writes to that one while it is attached;
who does so through the device spoils the source, which is said on standard error). Persistent: a base disk is a hard
link to its extent, so that writes go to the source's disk; a delta is a copy, whose changes are taken over at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import stat
import struct
import sys
import threading
import uuid as uuid_module
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from . import storage, vmspec
from .inventory import Datastore, VirtualMachine, folder_of, is_rdm
from .model import SimulatorError, write_atomically
from .storage import GRAIN

if TYPE_CHECKING:
    from .simulator import Simulator

PROXY = "proxy01"
LINKED_FROM = 512 << 20  # bytes of data from which a nonpersistent base disk is not copied
PIECE = 4 << 20
LUN_BYTES = 64 << 20
UNTOUCHED_NS = 1_000_000_000_000_000_000  # a linked file's time, until somebody writes to it
IDENTITIES = ("normal", "swapped", "none", "serial_only", "mac_only", "ambiguous")
_IN_CLOSE_WRITE = 8
_ZEROS = bytes(GRAIN)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(eq=False)
class Node:
    """A block device of a hot-added disk. ``key`` is that of the VM's device."""

    name: str
    key: int
    path: str
    uuid: str
    mode: str
    method: str  # "copy" or "link"
    ready: bool = False
    stale: bool = False  # detached, and still known to the guest
    deleted: bool = False  # still attached, and no longer known to the guest
    bus: int = 0  # of the controller
    unit: int = 0
    shown: str | None = None  # the guest still takes it for a disk of this UUID, which was at its address before
    diskseq: int = 0
    tmp: str | None = None  # attached by the VDDK double with this tmpDirectory, for this VM:
    vm: str | None = None

    @property
    def persistent(self) -> bool:
        return "nonpersistent" not in self.mode

    @property
    def told_uuid(self) -> str:
        """What the guest knows it by."""
        return self.shown or self.uuid

    @property
    def address(self) -> str:
        """host:channel:target:lun, as Linux counts: a parallel controller's target is the unit."""
        return f"{2 + self.bus}:0:{self.unit}:0"

    @property
    def file_name(self) -> str:
        """Of its bytes; hidden when only the end of a persistent attachment still wants them."""
        return f".{self.name}" if self.deleted else self.name


def link_name(uuid: str) -> str:
    return f"wwn-0x{uuid.replace('-', '').lower()}"


FILLER = "A unit that a test has taken"


def fill_units(vm: VirtualMachine, leave: int | None, controllers: int = 4) -> dict[str, int]:
    """Take SCSI units of a VM, those with low numbers first, until only *leave* are free; None gives all back.

    :param controllers: so many SCSI controllers the VM has then, at least: with four there is no room for another.
    """
    if not 1 <= controllers <= 4:
        raise SimulatorError("a VM has 1 to 4 SCSI controllers")
    with vm.lock, vm.simulator.lock:
        kept = vm.config.hardware.device
        for one in [one for one in kept if one.deviceInfo is not None and one.deviceInfo.summary == FILLER]:
            if not any(other.controllerKey == one.key for other in kept) or not _is_scsi(one):
                kept.remove(one)
        for one in [one for one in kept if _is_scsi(one) and one.deviceInfo.summary == FILLER]:
            if not any(other.controllerKey == one.key for other in kept):
                kept.remove(one)
        buses = {one.busNumber for one in kept if _is_scsi(one)}
        for bus in range(4):
            if leave is not None and len(buses) < controllers and bus not in buses:
                new = vmspec.scsi_controller(1000 + bus, bus)
                new.deviceInfo.summary = FILLER
                kept.append(new)
                buses.add(bus)
        free = [(one, unit) for one in kept if _is_scsi(one) for unit in free_units(vm, one, kept)]
        free.sort(key=lambda place: place[1])
        for one, unit in [] if leave is None else free[: max(0, len(free) - leave)]:
            key = next(key for key in range(9000, 10000) if key not in {other.key for other in kept})
            device = vim.vm.device.VirtualSCSIPassthrough(key=key, controllerKey=one.key, unitNumber=unit)
            device.deviceInfo = vmspec.info(f"SCSI device {key}", FILLER)
            kept.append(device)
        vm.touch()
        return {"free": len(free) if leave is None else min(leave, len(free)), "controllers": len(buses)}


def _is_scsi(device: Any) -> bool:
    return isinstance(device, vim.vm.device.VirtualSCSIController)


def free_units(vm: VirtualMachine, controller: Any, devices: Any) -> list[int]:
    """The units of a SCSI controller that nothing has."""
    used = {one.unitNumber for one in devices if one.controllerKey == controller.key} | {7}
    return [unit for unit in range(scsi_units(vm, controller)) if unit not in used]


def scsi_units(vm: VirtualMachine, controller: Any) -> int:
    """An ordinary controller has 16; a PVSCSI one has 64 on newer hardware (VADP facts 28)."""
    pvscsi = isinstance(controller, vim.vm.device.ParaVirtualSCSIController)
    return 64 if pvscsi and vm.hardware_version >= 14 else 16


def _swapped(uuid: str) -> str:
    return str(uuid_module.UUID(bytes=uuid_module.UUID(uuid).bytes_le))


def _serial(uuid: str) -> str:
    digits = uuid_module.UUID(uuid).hex
    pairs = [digits[at : at + 2] for at in range(0, 32, 2)]
    return f"VMware-{' '.join(pairs[:8])}-{' '.join(pairs[8:])}"


class ProxyMachine:
    """Made with the simulator; :meth:`start` once the inventory is there. All methods are thread-safe."""

    def __init__(self, simulator: "Simulator") -> None:
        self.simulator = simulator
        root = simulator.state_dir
        self.device_dir, self.dev_dir, self.sysfs_dir = root / "devices", root / "dev", root / "sys"
        for folder in (self.device_dir, self.dev_dir, self.sysfs_dir):
            folder.mkdir(exist_ok=True)
        self._state_path = self.dev_dir / ".proxy.json"
        self._lock = threading.RLock()
        self._found = threading.Condition(self._lock)
        self.nodes: list[Node] = []
        self._diskseq = itertools.count(17)
        self._coming: list[Node] = []  # filled, and not yet found by the guest
        self.identity = "normal"
        self.hidden_luns: set[str] = set()
        self._inotify = -1
        self._watches: dict[int, str] = {}  # of a node's `delete` file

    # life

    def start(self) -> None:
        """Show what is there: identity, LUNs, and the disks that the VM has attached."""
        known: list[Node] = []
        with contextlib.suppress(FileNotFoundError):
            kept = json.loads(self._state_path.read_text())
            self.identity, self.hidden_luns = kept["identity"], set(kept["hidden_luns"])
            known = [Node(**fields) for fields in kept["nodes"]]
            self._diskseq = itertools.count(1 + max([16, *(node.diskseq for node in known)]))
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC)
        if self._inotify < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        threading.Thread(target=self._watch, name="sysfs", daemon=True).start()
        with self._lock:
            self._clear_devices({node.name for node in known})
            self._write_identity()
            for datastore in self._lun_datastores():
                self._show_lun(datastore)
            for node in known:
                self.nodes.append(node)
                if node.ready:
                    self._write_sysfs(node)
            self._refresh_links()
        machine = self.machine()
        if machine is not None:
            self.sync(machine)

    def _clear_devices(self, keep: set[str]) -> None:
        for entry in self.device_dir.iterdir():
            entry.unlink()
        for entry in self.dev_dir.iterdir():
            if not entry.name.startswith(".") and entry.name not in keep and not self._is_lun_file(entry.name):
                entry.unlink()

    def _is_lun_file(self, name: str) -> bool:
        return name.startswith("sda") and len(name) > 3

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "hidden_luns": sorted(self.hidden_luns),
            "nodes": [asdict(node) for node in self.nodes],
        }
        write_atomically(self._state_path, json.dumps(state))

    def machine(self) -> VirtualMachine | None:
        """The VM whose part this machine takes."""
        with self.simulator.lock:
            found = [vm for vm in self.simulator.inventory.all(VirtualMachine) if vm.name == PROXY]
        return found[0] if len(found) == 1 else None

    # who the machine is

    def set_identity(self, identity: str) -> None:
        """:raises SimulatorError: there is no such identity."""
        if identity not in IDENTITIES:
            raise SimulatorError(f"identity is one of {', '.join(IDENTITIES)}")
        with self._lock:
            self.identity = identity
            self._write_identity()
            self._save()

    def _write_identity(self) -> None:
        machine = self.machine()
        virtual = machine is not None and self.identity != "none"
        uuid = machine.config.uuid if machine is not None and virtual else str(uuid_module.UUID(int=7 << 120 | 11))
        dmi: dict[str, str] = {
            "sys_vendor": "VMware, Inc." if virtual else "Example Servers",
            "product_name": "VMware20,1" if virtual else "Rack 42",
            "product_uuid": uuid,
            "product_serial": _serial(uuid) if virtual else "EX0042",
        }
        addresses = [_mac_of(machine) if machine is not None and virtual else "02:00:5e:00:53:01"]
        if self.identity == "swapped":
            dmi["product_uuid"] = _swapped(uuid)
        if self.identity in ("serial_only", "mac_only", "ambiguous"):
            del dmi["product_uuid"]
        if self.identity in ("mac_only", "ambiguous"):
            del dmi["product_serial"]
        if self.identity == "ambiguous":
            duplicate = self._duplicate_uuid()
            if duplicate is not None:
                dmi["product_uuid"], dmi["product_serial"] = duplicate, _serial(duplicate)
                addresses = ["02:00:5e:00:53:01"]
            else:  # no two VMs have one UUID: the network cards are those of two
                others = [vm for vm in self.simulator.inventory.all(VirtualMachine) if vm is not machine]
                addresses += [_mac_of(vm) for vm in others[:1]]
        folder = self.sysfs_dir / "class" / "dmi" / "id"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sys_vendor", "product_name", "product_uuid", "product_serial"):
            (folder / name).unlink(missing_ok=True)
            if name in dmi:
                (folder / name).write_text(f"{dmi[name]}\n")
                (folder / name).chmod(0o400 if name in ("product_uuid", "product_serial") else 0o444)
        network = self.sysfs_dir / "class" / "net"
        for index in range(2):
            address = network / f"ens{192 + 32 * index}" / "address"
            if index < len(addresses):
                address.parent.mkdir(parents=True, exist_ok=True)
                address.write_text(f"{addresses[index]}\n")
            else:
                address.unlink(missing_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    address.parent.rmdir()
        (network / "lo").mkdir(parents=True, exist_ok=True)
        (network / "lo" / "address").write_text("00:00:00:00:00:00\n")

    def _duplicate_uuid(self) -> str | None:
        uuids = [vm.config.uuid for vm in self.simulator.inventory.all(VirtualMachine)]
        return next((uuid for uuid in uuids if uuids.count(uuid) > 1), None)

    # LUNs

    def _lun_datastores(self) -> list[Datastore]:
        """Whose extents a storage network shows to this machine: VMFS, and not local to one host."""
        return [one for one in self.simulator.inventory.all(Datastore) if one.kind == "VMFS" and not one.local]

    def _lun_file(self, datastore: Datastore) -> Path:
        names = [one.name for one in self._lun_datastores()]
        return self.dev_dir / f"sda{chr(ord('a') + names.index(datastore.name))}"

    def _show_lun(self, datastore: Datastore) -> None:
        file = self._lun_file(datastore)
        if not file.exists():
            with open(file, "wb") as stream:
                stream.truncate(LUN_BYTES)
                entry = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0xFB, b"\0" * 3, 2048, LUN_BYTES // 512 - 2048)
                stream.seek(446)
                stream.write(entry)
                stream.seek(510)
                stream.write(b"\x55\xaa")
        link = self.device_dir / datastore.lun
        visible = datastore.name not in self.hidden_luns
        link.unlink(missing_ok=True)
        if visible:
            link.symlink_to(f"../dev/{file.name}")
        self._write_block(file.name, LUN_BYTES, present=visible)

    def set_lun(self, datastore: str, visible: bool) -> None:
        """Show or hide the LUN of a datastore. :raises SimulatorError: no LUN of it can be seen from here."""
        found = [one for one in self._lun_datastores() if one.name == datastore]
        if not found:
            raise SimulatorError(f"{datastore} is not a VMFS datastore on a shared LUN")
        with self._lock:
            (self.hidden_luns.discard if visible else self.hidden_luns.add)(datastore)
            self._show_lun(found[0])
            self._save()

    def lun_device(self, datastore: Datastore) -> Path | None:
        """The device of a datastore's LUN, if this machine sees it (VADP facts 34)."""
        if datastore.kind != "VMFS" or datastore.local or datastore.name in self.hidden_luns:
            return None
        return self._lun_file(datastore)

    # hot-added disks

    def _wanted(self, vm: VirtualMachine) -> dict[int, Any]:
        """The disks of others among the VM's, by device key; none of a machine that is off."""
        mine = folder_of(vm.config.files.vmPathName)
        if not vm.powered_on:
            return {}
        return {disk.key: disk for disk in vm.disks if not is_rdm(disk) and folder_of(disk.backing.fileName) != mine}

    def sync(self, vm: VirtualMachine) -> None:
        """Bring the devices in line with the VM's configuration; with ``vm.lock`` held. Other VMs have none here."""
        if vm is not self.machine():
            return
        wanted = self._wanted(vm)
        with self._lock:
            for node in [one for one in self.nodes if not one.stale]:
                disk = wanted.get(node.key)
                if disk is None or (disk.backing.fileName, disk.backing.diskMode) != (node.path, node.mode):
                    self._detach(node)
            if not vm.powered_on:
                for node in list(self.nodes):
                    self._forget(node)
            known = {node.key for node in self.nodes if not node.stale}
            buses = {one.key: one.busNumber for one in vm.config.hardware.device if _is_scsi(one)}
            new = [self._reserve(disk, buses) for key, disk in wanted.items() if key not in known]
            unfinished = [one for one in self.nodes if not one.ready and one not in new and one not in self._coming]
            self._refresh_links()
            self._save()
        delay = self.simulator.settings.device_delay
        for node in [*new, *unfinished]:
            self._fill(node)  # takes its time, and holds up nobody but this VM
            if not delay:
                self._publish(node)
                continue
            self._coming.append(node)
            timer = threading.Timer(delay, self._publish, [node])
            timer.daemon = True
            timer.start()

    def _publish(self, node: Node) -> None:
        """The guest has found the device."""
        with self._lock:
            if node in self._coming:
                self._coming.remove(node)
            if node in self.nodes:  # else it was detached before that
                node.ready = True
                self._write_sysfs(node)
                self._refresh_links()
                self._save()
                self._found.notify_all()

    def _reserve(self, disk: Any, buses: dict[int, int]) -> Node:
        """A node whose bytes are still to come, under the lowest free name.

        At an address where the guest still knows a disk that was detached, it finds no new one: what is attached there
        now is behind the old device, under its name and by its UUID.
        """
        bus, unit = buses.get(disk.controllerKey, 0), disk.unitNumber
        old = next((one for one in self.nodes if one.stale and (one.bus, one.unit) == (bus, unit)), None)
        if old is not None:
            self.nodes.remove(old)
        taken = {node.name for node in self.nodes}
        name = old.name if old is not None else next(name for name in _names() if name not in taken)
        node = Node(name, disk.key, disk.backing.fileName, disk.backing.uuid, disk.backing.diskMode, "copy")
        node.bus, node.unit = bus, unit
        node.diskseq = old.diskseq if old is not None else next(self._diskseq)
        node.shown = old.told_uuid if old is not None else None
        info = self.simulator.storage.info(node.path)
        if info.parent is None and (node.persistent or info.allocated_bytes > LINKED_FROM):
            node.method = "link"
        self.nodes.append(node)
        return node

    def _fill(self, node: Node) -> None:
        store = self.simulator.storage
        file = self.dev_dir / node.name
        file.unlink(missing_ok=True)
        if node.method == "link":
            os.link(store.extent_path(node.path), file)
            os.utime(file, ns=(UNTOUCHED_NS, UNTOUCHED_NS))
            return
        capacity = store.info(node.path).capacity_bytes
        buffer = memoryview(bytearray(PIECE))
        with open(file, "wb") as stream:
            stream.truncate(capacity)
            for offset, length in store.allocated(node.path, 0, capacity, GRAIN):
                for at in range(offset, offset + length, PIECE):
                    piece = buffer[: min(PIECE, offset + length - at)]
                    store.read_into(node.path, at, piece)
                    _write_sparsely(stream.fileno(), piece, at)

    def _detach(self, node: Node) -> None:
        """The VM has it no more. Until the guest deletes it, its link stays and every open of it fails."""
        file = self.dev_dir / node.file_name
        if node.ready:
            self._take_over(node, file)
        if node.method == "copy":
            with contextlib.suppress(FileNotFoundError):
                os.truncate(file, 0)  # who still has it open reads no more
        file.unlink(missing_ok=True)
        node.stale = True
        if node.deleted or not node.ready:
            self._forget(node)
        else:
            # a socket's file: to open it is ENXIO, as for a disk that is gone
            os.mknod(file, stat.S_IFSOCK | 0o600)

    def _take_over(self, node: Node, file: Path) -> None:
        """What was written persistently reaches the source's disk, whose tracking saw nothing of it (VADP facts 12)."""
        store = self.simulator.storage
        if node.method == "link":
            written = file.stat().st_mtime_ns != UNTOUCHED_NS
            if written and not node.persistent:
                print(f"{node.path} was written through a nonpersistent attachment", file=sys.stderr, flush=True)
        else:
            written = node.persistent and self._copy_back(node, file)
        if written and node.persistent:
            with contextlib.suppress(storage.NotFound):
                store.spoil_tracking(node.path)

    def _copy_back(self, node: Node, file: Path) -> bool:
        store = self.simulator.storage
        written = False
        with open(file, "rb") as stream:
            capacity = os.fstat(stream.fileno()).st_size
            ranges = {*store.allocated(node.path, 0, capacity, PIECE), *_data(stream.fileno(), capacity)}
            pieces = {at // PIECE * PIECE for offset, length in ranges for at in range(offset, offset + length, PIECE)}
            pieces |= {(offset + length - 1) // PIECE * PIECE for offset, length in ranges}
            for at in sorted(pieces):
                new = os.pread(stream.fileno(), PIECE, at)
                if new != store.read(node.path, at, len(new)):
                    store.write(node.path, at, new)
                    written = True
        return written

    def _forget(self, node: Node) -> None:
        if node.ready and not node.stale:
            self._detach(node)
        (self.dev_dir / node.file_name).unlink(missing_ok=True)
        if node in self.nodes:
            self.nodes.remove(node)
        self._write_block(node.name, 0, present=False)
        self._refresh_links()

    def _refresh_links(self) -> None:
        """Of two devices with one id the older keeps the link, as long as the guest knows it."""
        for entry in self.device_dir.glob("wwn-0x*"):
            if not any(link_name(node.told_uuid) == entry.name for node in self._shown()):
                entry.unlink()
        for node in reversed(self._shown()):
            link = self.device_dir / link_name(node.told_uuid)
            temporary = link.with_name(f".{link.name}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(f"../dev/{node.name}")
            temporary.rename(link)

    def _shown(self) -> list[Node]:
        machine = self.machine()
        if machine is None or not enable_uuid(machine.config):
            return []
        return [node for node in self.nodes if node.ready and not node.deleted]

    # sysfs

    def _write_block(self, name: str, size: int, present: bool) -> None:
        folder = self.sysfs_dir / "class" / "block" / name
        if not present:
            device = folder / "device"
            if device.is_symlink():
                shutil.rmtree(device.resolve(), ignore_errors=True)
            for entry in (device, folder / "size", folder / "ro", folder / "diskseq"):
                entry.unlink(missing_ok=True)
            for child in (folder / "holders", folder):
                with contextlib.suppress(FileNotFoundError):
                    child.rmdir()
            return
        (folder / "holders").mkdir(parents=True, exist_ok=True)
        (folder / "size").write_text(f"{size // 512}\n")
        (folder / "ro").write_text("0\n")

    def _write_sysfs(self, node: Node) -> None:
        if node.deleted:
            return
        status = (self.dev_dir / node.name).stat()
        self._write_block(node.name, status.st_size, present=True)
        block = self.sysfs_dir / "class" / "block" / node.name
        (block / "diskseq").write_text(f"{node.diskseq}\n")
        host, _channel, target, _lun = node.address.split(":")
        real = self.sysfs_dir / "devices" / f"host{host}" / f"target{host}:0:{target}" / node.address
        real.mkdir(parents=True, exist_ok=True)
        if not (block / "device").is_symlink():
            (block / "device").symlink_to(os.path.relpath(real, block))
        self._write_identity_of(node, real)
        delete = block / "device" / "delete"
        delete.touch()
        delete.chmod(0o200)
        watch = _libc.inotify_add_watch(self._inotify, os.fsencode(delete), _IN_CLOSE_WRITE)
        if watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")
        self._watches[watch] = node.name

    def _write_identity_of(self, node: Node, folder: Path) -> None:
        """What INQUIRY told when the guest found the disk. Without disk.EnableUUID it tells no name."""
        (folder / "vendor").write_text("VMware  \n")
        (folder / "model").write_text("Virtual disk    \n")
        machine = self.machine()
        if machine is None or not enable_uuid(machine.config):
            return
        digits = node.told_uuid.replace("-", "").lower()
        (folder / "wwid").write_text(f"naa.{digits}\n")
        (folder / "vpd_pg83").write_bytes(bytes.fromhex(f"0083001401030010{digits}"))

    def _watch(self) -> None:
        """What is written to the `delete` files."""
        while True:
            events = os.read(self._inotify, 1 << 16)
            at = 0
            while at < len(events):
                watch, mask, _cookie, length = struct.unpack_from("iIII", events, at)
                at += 16 + length
                with self._lock:
                    name = self._watches.get(watch) if mask & _IN_CLOSE_WRITE else self._watches.pop(watch, None)
                    if name is not None and mask & _IN_CLOSE_WRITE:
                        self._written(name)

    def _written(self, name: str) -> None:
        """Somebody wrote to a `delete` file."""
        node = next((one for one in self.nodes if one.name == name and one.ready and not one.deleted), None)
        file = self.sysfs_dir / "class" / "block" / name / "device" / "delete"
        if node is None or not file.exists():
            return
        file.chmod(0o600)
        text = file.read_text().strip()
        file.chmod(0o200)
        if text == "1":
            self.delete(node)

    def delete(self, node: Node) -> None:
        """The guest forgets the device, whether it is still attached or not."""
        with self._lock:
            if node.stale:
                self._forget(node)
            elif node.ready and not node.deleted:
                node.deleted = True
                (self.dev_dir / node.name).rename(self.dev_dir / node.file_name)
                self._write_block(node.name, 0, present=False)
                self._refresh_links()
            self._save()

    # for the VDDK double

    def wait_for(self, key: int, timeout: float) -> Node | None:
        """The device of a disk that was just attached, once the guest has found it."""
        with self._lock:
            self._found.wait_for(lambda: self._ready_node(key) is not None, timeout)
            return self._ready_node(key)

    def _ready_node(self, key: int) -> Node | None:
        return next((one for one in self.nodes if one.key == key and one.ready and not one.stale), None)

    def mark(self, node: Node, tmp: str, vm: str) -> None:
        """VDDK has attached this one, for a VM; *tmp* is its tmpDirectory."""
        with self._lock:
            node.tmp, node.vm = tmp, vm
            self._save()

    def marked(self, tmp: str) -> list[Node]:
        with self._lock:
            return [node for node in self.nodes if node.tmp == tmp and not node.stale]

    def device(self, node: Node) -> Path:
        return self.dev_dir / node.file_name

    def found_by_uuid(self, node: Node) -> Path:
        """The device that a disk's UUID leads to: of two with one the older, whichever was meant (VADP facts 31)."""
        with self._lock:
            same = [one for one in self._shown() if link_name(one.told_uuid) == link_name(node.uuid)]
            return self.dev_dir / (same[0] if same else node).name

    # what a test does to it

    def attachments(self) -> list[dict[str, Any]]:
        """The hot-added disks, and the devices that the guest still knows of disks that were detached."""
        machine = self.machine()
        devices = {disk.key: disk for disk in machine.disks} if machine is not None else {}
        with self._lock:
            return [
                {
                    "vm": machine.moid if machine is not None else None,
                    "key": node.key,
                    "controller": devices[node.key].controllerKey if not node.stale else None,
                    "unit": devices[node.key].unitNumber if not node.stale else None,
                    "path": node.path,
                    "uuid": node.uuid,
                    "mode": node.mode,
                    "device": str(self.dev_dir / node.name),
                    "link": str(self.device_dir / link_name(node.told_uuid)),
                    "bytes": node.method,
                    "stale": node.stale,
                    "deleted": node.deleted,
                    "vddk_vm": node.vm,
                }
                for node in self.nodes
                if node.stale or node.key in devices
            ]

    def crash(self) -> list[dict[str, Any]]:
        """The machine is reset: what is attached stays attached and has the source's bytes again."""
        machine = self.machine()
        if machine is None:
            raise SimulatorError(f"there is no VM {PROXY}")
        self.simulator.nfc.reset_machine()
        with machine.lock:
            marks = {}
            with self._lock:
                for node in list(self.nodes):
                    if not node.stale:
                        marks[node.key] = (node.tmp, node.vm)
                    self._forget(node)
                self._save()
            self.sync(machine)
            with self._lock:
                for node in self.nodes:
                    node.tmp, node.vm = marks.get(node.key, (None, None))
                self._save()
        return self.attachments()


def _names() -> Iterator[str]:
    """sdb, sdc, ..., sdz, sdba, ...: sda is the machine's own disk, sdaa and the like are LUNs."""
    letters = "bcdefghijklmnopqrstuvwxyz"
    yield from (f"sd{one}" for one in letters)
    yield from (f"sd{one}{other}" for one in letters for other in f"a{letters}")


def _mac_of(vm: VirtualMachine) -> str:
    cards = [one for one in vm.config.hardware.device if isinstance(one, vim.vm.device.VirtualEthernetCard)]
    return str(cards[0].macAddress) if cards else "02:00:5e:00:53:02"


def enable_uuid(config: Any) -> bool:
    """Whether the guest sees its disks' UUIDs."""
    options = {option.key.lower(): str(option.value).lower() for option in config.extraConfig}
    return options.get("disk.enableuuid") == "true"


def _write_sparsely(fd: int, data: memoryview, offset: int) -> None:
    for at in range(0, len(data), GRAIN):
        piece = data[at : at + GRAIN]
        if bytes(piece) != _ZEROS[: len(piece)]:
            storage._pwrite_all(fd, piece, offset + at)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    for start, end in storage._data_runs(fd, 0, size):
        yield start, end - start
