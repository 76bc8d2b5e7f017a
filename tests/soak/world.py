# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Small virtual machines in the simulator, the bytes that their disks must hold, and what may be left of a run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from harness import Control, Simulator, made_repository  # noqa: E402
from role import Job  # noqa: E402

SECTOR = 512
KIB, MIB = 1 << 10, 1 << 20
device = vim.vm.device

# No multiple of 64 KiB, and one of 1 MiB.
SIZES = (3 * MIB + 67 * SECTOR, MIB)


class World:
    """A simulator, and an administrator's session to arrange things. Its folder has a short path, for sockets."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
        self.simulator = Simulator(self.folder / "state")
        facts = self.simulator.facts
        self.control = self.simulator.control
        # Small disks, and yet changed areas come in pages.
        self.control.call("set_settings", task_delay=0, page_areas=3)
        self.api = SmartConnect(
            host=facts["host"],
            port=facts["port"],
            user=facts["username"],
            pwd=facts["password"],
            sslContext=ssl.create_default_context(cafile=facts["ca_path"]),
        )
        self.tmpdirs: List[Path] = []
        self._count = 0
        self._lock = threading.Lock()

    def new_machine(self, sizes: Iterable[int] = SIZES) -> "Machine":
        """A running machine with empty disks, its own repository and its own TMPDIR."""
        with self._lock:
            self._count += 1
            number = self._count
        datacenter = next(item for item in self.api.content.rootFolder.childEntity if item.name == "DC0")
        pool = datacenter.hostFolder.childEntity[0].resourcePool
        changes = [
            device.VirtualDeviceSpec(
                operation="add", device=device.ParaVirtualSCSIController(key=-1, busNumber=0, sharedBus="noSharing")
            )
        ]
        changes += [_new_disk(-1, unit, size) for unit, size in enumerate(sizes)]
        spec = vim.vm.ConfigSpec(
            name=f"vm{number}",
            guestId="debian12_64Guest",
            firmware="efi",
            files=vim.vm.FileInfo(vmPathName="[vmfs01]"),
            memoryMB=512,
            numCPUs=1,
            deviceChange=changes,
        )
        made = wait(datacenter.vmFolder.CreateVM_Task(spec, pool))
        return Machine(self, made, self.folder / str(number))

    def stop(self) -> None:
        Disconnect(self.api)
        self.simulator.stop()
        for folder in [self.folder, *self.tmpdirs]:
            shutil.rmtree(folder, ignore_errors=True)


def wait(task: Any) -> Any:
    """The result of a task; several threads may wait, each for its own."""
    while task.info.state in ("queued", "running"):
        time.sleep(0.005)
    if task.info.state != "success":
        raise task.info.error
    return task.info.result


def _new_disk(controller: int, unit: int, size: int) -> Any:
    backing = device.VirtualDisk.FlatVer2BackingInfo(fileName="", diskMode="persistent", thinProvisioned=True)
    disk = device.VirtualDisk(
        key=-10 - unit, controllerKey=controller, unitNumber=unit, capacityInBytes=size, capacityInKB=0, backing=backing
    )
    return device.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk)


@dataclass
class Frozen:
    """A snapshot that somebody else made: what the disks held, and (of the model) when."""

    moid: str
    disks: Dict[int, bytes]


@dataclass
class Machine:
    """A virtual machine, what its disks hold (``disks``), and what each restore point must hold (``points``)."""

    world: World
    obj: Any
    folder: Path
    disks: Dict[int, bytearray] = field(default_factory=dict)
    foreign: List[Frozen] = field(default_factory=list)
    points: Dict[str, Dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.control = Control(self.world.simulator.facts["control_socket"])
        self.moid = self.obj._moId
        self.name = self.obj.name
        self.uuid = self.obj.config.instanceUuid
        self.repository = self.folder / "repository"
        made_repository(self.repository)
        # Its path must be short enough for sockets, or the product takes /tmp instead.
        self.tmpdir = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        self.world.tmpdirs.append(self.tmpdir)
        self.disks = {disk["key"]: bytearray(disk["capacity_bytes"]) for disk in self.state["disks"]}
        self.power("poweredOn")
        facts = self.world.simulator.facts
        self.job = Job(
            connection=dict(self.world.simulator.connection),
            vddk_libdir=facts["vddk_libdir"],
            nfc_port=facts["nfc_port"],
            moid=self.moid,
            uuid=self.uuid,
            repository=str(self.repository),
        )

    @property
    def state(self) -> Dict[str, Any]:
        """The machine in the simulator's state."""
        return dict(self.control.call("state")["vms"][self.moid])

    def destroy(self) -> None:
        """Machine, repository and all are gone."""
        if self.state["snapshots"] or self.state["consolidation_needed"]:
            wait(self.obj.RemoveAllSnapshots_Task())
        self.power("poweredOff")
        wait(self.obj.Destroy_Task())
        self.control.close()
        for folder in (self.folder, self.tmpdir):
            shutil.rmtree(folder)
        for held in (self.disks, self.points, self.foreign):
            held.clear()  # megabytes, and somebody may keep us

    # What the guest and the administrator do

    def write(self, key: int, offset: int, data: bytes) -> None:
        self.control.call("guest_write", vm=self.moid, disk=key, offset=offset, data=data)
        self.disks[key][offset : offset + len(data)] = data

    def scribble(self, seed: int, areas: int = 4) -> None:
        """Random bytes, and zeros, at random places of all disks."""
        source = random.Random(seed)
        for key, disk in self.disks.items():
            for number in range(areas):
                length = SECTOR * source.randrange(1, 256)
                offset = SECTOR * source.randrange((len(disk) - length) // SECTOR + 1)
                self.write(key, offset, bytes(length) if number % 4 == 3 else source.randbytes(length))

    def discard(self, key: int, offset: int, length: int) -> None:
        self.control.call("guest_discard", vm=self.moid, disk=key, offset=offset, length=length)
        self.disks[key][offset : offset + length] = bytes(length)

    def grow(self, key: int, size: int) -> None:
        self.control.call("grow_disk", vm=self.moid, disk=key, capacity_bytes=size)
        self.disks[key] += bytes(size - len(self.disks[key]))

    def replace_disk(self, key: int) -> None:
        """Another disk, empty, in the place of this one."""
        old = next(item for item in self.obj.config.hardware.device if item.key == key)
        remove = device.VirtualDeviceSpec(operation="remove", fileOperation="destroy", device=old)
        add = _new_disk(old.controllerKey, old.unitNumber, len(self.disks[key]))
        for change in (remove, add):
            wait(self.obj.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[change])))
        self.disks[key] = bytearray(len(self.disks[key]))

    def power(self, state: str) -> None:
        self.control.call("power", vm=self.moid, state=state)

    def set_tracking(self, enabled: bool) -> None:
        """As an administrator would, with the stun cycle that makes it effective."""
        wait(self.obj.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=enabled)))
        snapshot = wait(self.obj.CreateSnapshot_Task("stun", "", False, False))
        wait(snapshot.RemoveSnapshot_Task(False, True))

    def freeze(self) -> Frozen:
        """A snapshot that is not ours."""
        snapshot = wait(self.obj.CreateSnapshot_Task(f"foreign {len(self.foreign)}", "by hand", False, False))
        frozen = Frozen(snapshot._moId, self.content())
        self.foreign.append(frozen)
        return frozen

    def thaw(self, frozen: Frozen) -> None:
        wait(vim.vm.Snapshot(frozen.moid, self.obj._stub).RemoveSnapshot_Task(False, True))
        self.foreign.remove(frozen)

    def revert(self, frozen: Frozen) -> None:
        wait(vim.vm.Snapshot(frozen.moid, self.obj._stub).RevertToSnapshot_Task(None, True))
        self.power("poweredOn")
        self.disks = {key: bytearray(data) for key, data in frozen.disks.items()}

    def content(self) -> Dict[int, bytes]:
        """What the disks hold now."""
        return {key: bytes(data) for key, data in self.disks.items()}

    def compare_with_simulator(self) -> None:
        """The model and the simulator mean the same."""
        for key, data in self.disks.items():
            held = b"".join(
                self.control.read(self.moid, key, at, min(MIB, len(data) - at)) for at in range(0, len(data), MIB)
            )
            assert held == data, f"the simulator's disk {key} differs from the model at {first_difference(held, data)}"

    # What must be true of the repository

    @property
    def store_folder(self) -> Path:
        return self.repository / "vms" / self.uuid

    def visible_points(self) -> List[str]:
        """The points that are there for everybody to see."""
        return sorted(path.stem for path in self.store_folder.glob("points/*.json"))

    @property
    def newest_point(self) -> str:
        """By the time of its snapshot."""
        return max(self.points, key=lambda point: self.manifest(point)["started"])

    def manifest(self, point: str) -> Dict[str, Any]:
        """The manifest of a point, with its disks by key."""
        manifest = json.loads((self.store_folder / "points" / f"{point}.json").read_text(encoding="utf-8"))
        return dict(manifest, disks={disk["key"]: disk for disk in manifest["disks"]})

    def compare_point(self, point: str) -> int:
        """Each disk of a point, read by plain qemu-img, holds what the model says; how many were compared."""
        raw = self.folder / "converted.raw"
        for key, expected in self.points[point].items():
            layer = self.store_folder / f"disk-{key}" / f"{point}.qcow2"
            subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(layer), str(raw)], check=True)
            same_bytes(raw, expected, f"disk {key} of point {point}")
        raw.unlink()
        return len(self.points[point])

    def run_ids(self) -> List[str]:
        """Ids of all runs that the repository knows of."""
        return [path.stem for path in self.store_folder.glob("runs/*.json")]

    def leftovers(self) -> List[str]:
        """Whatever of a run of ours is still there, once all is recovered; nothing is expected."""
        found = []
        state = self.state
        found += [f"snapshot {item['name']}" for item in state["snapshots"] if item["name"].startswith("openvadp")]
        if state["consolidation_needed"]:
            found.append("consolidation is needed")
        if not state["snapshots"]:
            found += [f"delta {disk['path']}" for disk in state["disks"] if len(disk["chain"]) != 1]
            files = self.world.simulator.state / "datastores" / "vmfs01" / self.name
            found += [f"delta file {path.name}" for path in sorted(files.glob("*-delta.vmdk"))]
        expected = {"repository.json"}
        if self.store_folder.is_dir():
            inside = {"vm.json", "lock", "trust.json"}
            for point in self.visible_points():
                manifest = self.manifest(point)
                inside |= {f"points/{point}.json", f"configs/{point}.json"}
                inside |= {f"configs/{point}.nvram"} if manifest["nvram"] else set()
                for key in manifest["disks"]:
                    inside |= {f"disk-{key}/{point}.qcow2", f"disk-{key}/{point}.hashes"}
            expected |= {f"vms/{self.uuid}/{name}" for name in inside}
            if self.is_locked():
                found.append("the lock is held")
        files_now = (path.relative_to(self.repository) for path in self.repository.rglob("*") if not path.is_dir())
        found += [f"file {path}" for path in sorted(files_now) if str(path) not in expected]
        found += [f"temporary {path.name}" for path in sorted(self.tmpdir.iterdir())]
        return found

    def is_locked(self) -> bool:
        """Somebody holds the machine's lock."""
        try:
            descriptor = os.open(str(self.store_folder / "lock"), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def same_bytes(path: Path, expected: bytes, what: str) -> None:
    """:raises AssertionError: a file holds other bytes; the first one is named."""
    held = path.read_bytes()
    assert held == expected, (
        f"{what} has {len(held)} bytes, {len(expected)} expected; differs at {first_difference(held, expected)}"
    )


def first_difference(one: bytes, other: bytes) -> Optional[int]:
    """Offset of the first byte that differs; None if one is the other's beginning."""
    for at in range(0, min(len(one), len(other)), 4096):
        if one[at : at + 4096] != other[at : at + 4096]:
            return at + next(
                (n for n, (a, b) in enumerate(zip(one[at : at + 4096], other[at : at + 4096])) if a != b), 0
            )
    return None
