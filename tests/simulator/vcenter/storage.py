# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The simulator's datastores: disks with real bytes, delta disks, locks and change tracking.

On disk, below the state folder::

    datastores/<name>/app01/app01.vmdk              the descriptor
    datastores/<name>/app01/app01-flat.vmdk         a base disk's bytes: raw, sparse
    datastores/<name>/app01/app01-000001.vmdk       a delta disk's descriptor
    datastores/<name>/app01/app01-000001-delta.vmdk its bytes, each grain at its place in the disk; sparse
    datastores/<name>/app01/.app01-000001.map       its allocation map, a byte for each grain of 64 KiB
    datastores/<name>/app01/.app01.json             what is known of the disk; replaced atomically
    tracking/<id>/state.json, map, frozen-<moid>    change tracking: a u32 for each block of 64 KiB

Maps are mapped shared, so that what was marked outlives ``kill -9``; a tracked block is marked before its bytes change,
a grain is marked after its bytes are there: a crash can only report too much, never too little.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import threading
import uuid as uuid_module
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRAIN = 64 * 1024
CBT_BLOCK = 64 * 1024
SECTOR = 512

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Range = tuple[int, int]


class StorageError(Exception):
    """The family of this module's expected failures."""


class NotFound(StorageError):
    """No such disk, file or datastore."""


class Locked(StorageError):
    """The disk is in use by somebody else."""


class Exists(StorageError):
    """There is already something of that name."""


class NoSpace(StorageError):
    """The datastore is full."""


class UnknownChangeId(StorageError):
    """The change id is of another tracking, too old, or from the future of the snapshot."""


class NotALeaf(StorageError):
    """The disk has children (or a parent, where a base disk is needed): it can't be changed."""


class OutOfRange(StorageError):
    """The range is not inside the disk."""


@dataclass(frozen=True)
class DiskInfo:
    path: str
    capacity_bytes: int
    parent: str | None
    uuid: str
    thin: bool
    allocated_bytes: int
    children: tuple[str, ...]
    openers: tuple[str, ...]


@dataclass(frozen=True)
class ChangeTracking:
    change_id_prefix: str
    sequence: int


class Opener:
    """An entry of the lock table; :meth:`close` gives it back (twice does no harm)."""

    def __init__(self, storage: Storage, chain: list[_Disk], owner: str, write: bool) -> None:
        self._storage = storage
        self._chain = chain
        self.path = chain[0].path
        self.owner = owner
        self.write = write

    def close(self) -> None:
        self._storage._close_opener(self)

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _StructureLock:
    """Many may read and write bytes at once; who changes the structure is alone, and may enter again."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self._waiting = 0
        self._owner: int | None = None
        self._depth = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self._condition:
            while self._owner is not None or self._waiting:
                self._condition.wait()
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                if not self._users:
                    self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self._condition:
            self._waiting += 1
            while self._owner is not None or self._users:
                self._condition.wait()
            self._waiting -= 1
            self._owner = me
        try:
            yield
        finally:
            with self._condition:
                self._owner = None
                self._condition.notify_all()


@dataclass(eq=False)
class _Disk:
    path: str
    capacity: int
    uuid: str
    thin: bool
    tracking_id: str
    parent: _Disk | None
    extent: Path
    map_file: Path | None
    children: list[_Disk] = field(default_factory=list)
    openers: list[Opener] = field(default_factory=list)
    frozen: bool = False  # being consolidated: neither written nor opened
    merged: bool = False  # its bytes are in its parent: only its removal is left to do
    mutex: threading.Lock = field(default_factory=threading.Lock)
    opening: threading.Lock = field(default_factory=threading.Lock)
    _fd: int | None = None
    _map: mmap.mmap | None = None

    @property
    def fd(self) -> int:
        if self._fd is None:
            with self.opening:
                if self._fd is None:
                    self._fd = os.open(self.extent, os.O_RDWR | os.O_CLOEXEC)
        return self._fd

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            assert self.map_file is not None
            with self.opening:
                if self._map is None:
                    with open(self.map_file, "r+b") as file:
                        self._map = mmap.mmap(file.fileno(), 0)
        return self._map

    @property
    def grains(self) -> int:
        return -(-self.capacity // GRAIN)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._map is not None:
            self._map.close()
            self._map = None

    def chain(self) -> list[_Disk]:
        """This disk and its ancestors, the base last."""
        result = [self]
        while result[-1].parent is not None:
            result.append(result[-1].parent)
        return result

    def runs(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, held here) of the range; a base disk holds everything."""
        if self.parent is None:
            yield offset, end, True
            return
        at, last = offset // GRAIN, -(-end // GRAIN)
        allocation = self.map
        while at < last:
            here = allocation[at] == 1
            until = allocation.find(b"\0" if here else b"\1", at, last)
            if until < 0:
                until = last
            yield max(offset, at * GRAIN), min(end, until * GRAIN), here
            at = until


class _Tracking:
    """A disk's change tracking: for each block the sequence that changed it last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.state: dict[str, Any] = {}
        self._mmap: mmap.mmap | None = None
        self.blocks: memoryview | None = None

    @staticmethod
    def new_prefix() -> str:
        text = " ".join(f"{byte:02x}" for byte in uuid_module.uuid4().bytes)
        return f"{text[:23]}-{text[24:]}"

    @classmethod
    def start(cls, folder: Path, capacity: int, unreliable: bool) -> _Tracking:
        self = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "map", "wb") as file:
            file.truncate(-(-capacity // CBT_BLOCK) * 4)
        self.state = {
            "prefix": cls.new_prefix(),
            "first": 1,
            "sequence": 1,
            "unreliable": unreliable,
            "snapshots": {},
        }
        self.save()
        self._open_map()
        return self

    @classmethod
    def load(cls, folder: Path) -> _Tracking:
        self = cls(folder)
        self.state = json.loads((folder / "state.json").read_text())
        self._open_map()
        return self

    def _open_map(self) -> None:
        with open(self.folder / "map", "r+b") as file:
            self._mmap = mmap.mmap(file.fileno(), 0)
        self.blocks = memoryview(self._mmap).cast("I")

    def save(self) -> None:
        _write_atomically(self.folder / "state.json", json.dumps(self.state, indent=1))

    def close(self) -> None:
        if self.blocks is not None:
            self.blocks.release()
            self.blocks = None
        if self._mmap is not None:
            self._mmap.close()
            self._mmap = None

    def remove(self) -> None:
        self.close()
        # the state goes first: without it there is no tracking
        (self.folder / "state.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def mark(self, offset: int, length: int) -> None:
        if not length:
            return
        first, last = offset // CBT_BLOCK, -(-(offset + length) // CBT_BLOCK)
        with self.lock:
            assert self.blocks is not None
            if self.state["unreliable"]:
                # started over a snapshot, or saw a restore: loses changes without a word (VADP facts 7, 12)
                for block in range(first, last):
                    if block % 4 != 3:
                        self.blocks[block] = self.state["sequence"]
            else:
                self.blocks[first:last] = array("I", [self.state["sequence"]]) * (last - first)

    def freeze(self, moid: str, capacity: int) -> str:
        with self.lock:
            assert self.blocks is not None
            sequence = self.state["sequence"]
            _write_atomically(self.folder / f"frozen-{moid}", self.blocks.tobytes())
            self.state["snapshots"][moid] = {"prefix": self.state["prefix"], "sequence": sequence, "capacity": capacity}
            self.state["sequence"] = sequence + 1
            self.save()
            return f"{self.state['prefix']}/{sequence}"

    def thaw(self, moid: str) -> None:
        with self.lock:
            assert self.blocks is not None
            known = self.state["snapshots"].get(moid)
            if known is None or known["prefix"] != self.state["prefix"]:
                return
            old = (self.folder / f"frozen-{moid}").read_bytes()
            self.blocks[: len(old) // 4] = memoryview(old).cast("I")
            self.state["sequence"] = known["sequence"] + 1
            self.save()

    def grow(self, old_capacity: int, capacity: int) -> None:
        self.close()
        os.truncate(self.folder / "map", -(-capacity // CBT_BLOCK) * 4)
        self._open_map()
        self.mark(old_capacity, capacity - old_capacity)


def _write_atomically(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.new-{threading.get_ident()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _punch(fd: int, offset: int, length: int) -> None:
    if length and _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length):
        while length:  # a file system without holes
            piece = min(length, 1 << 20)
            os.pwrite(fd, bytes(piece), offset)
            offset, length = offset + piece, length - piece


def _data_runs(fd: int, offset: int, end: int) -> Iterator[Range]:
    """(start, end) of what the file holds as data, not as a hole."""
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            return
        if start >= end:
            return
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(end, offset)


def _pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


_PATH = re.compile(r"\[([^\[\]/]+)\](?: (.*))?")


class Storage:
    """All datastores of the simulated vCenter. Every method is thread-safe."""

    def __init__(self, root: Path, datastores: dict[str, dict[str, Any]]) -> None:
        """:param root: the state folder. :param datastores: name -> {"type": "VMFS" | "NFS" | "vsan", ...}."""
        self.root = Path(root)
        self.datastores = datastores
        self._structure = _StructureLock()
        self._locks = threading.Lock()  # guards the openers' lists
        self._full: set[str] = set()
        self._disks: dict[str, _Disk] = {}
        self._trackings: dict[str, _Tracking] = {}
        self._areas: OrderedDict[tuple[str, str, str], list[Range]] = OrderedDict()
        for name in datastores:
            (self.root / "datastores" / name).mkdir(parents=True, exist_ok=True)
        (self.root / "tracking").mkdir(exist_ok=True)
        self._load()

    # paths

    @staticmethod
    def split_path(path: str) -> tuple[str, str]:
        """``[vmfs01] a/b.vmdk`` -> (``vmfs01``, ``a/b.vmdk``)."""
        match = _PATH.fullmatch(path)
        if match is None:
            raise NotFound(f"{path!r} is not a datastore path")
        return match.group(1), match.group(2) or ""

    def local_path(self, path: str) -> Path:
        """The file behind a datastore path; it need not exist. Hidden files are the simulator's own: not to be had."""
        name, relative = self.split_path(path)
        if name not in self.datastores:
            raise NotFound(f"{path}: there is no datastore {name!r}")
        parts = [part for part in relative.split("/") if part]
        if any(part.startswith(".") or "\0" in part for part in parts):
            raise NotFound(f"{path}: no such file")
        return self.root.joinpath("datastores", name, *parts)

    def list_files(self, folder_path: str) -> list[tuple[str, int]]:
        """(path, size in bytes) of the files directly in a folder, sorted."""
        folder = self.local_path(folder_path)
        name, relative = self.split_path(folder_path)
        try:
            entries = sorted(os.scandir(folder), key=lambda item: item.name)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{folder_path}: no such folder") from None
        prefix = f"{relative.strip('/')}/" if relative.strip("/") else ""
        found = []
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # merged or renamed meanwhile
                if entry.is_file() and not entry.name.startswith("."):
                    found.append((f"[{name}] {prefix}{entry.name}", entry.stat().st_size))
        return found

    def list_folders(self, folder_path: str) -> list[str]:
        """The paths of the folders directly in a folder, sorted."""
        folder = self.local_path(folder_path)
        prefix = f"{folder_path.rstrip('/')}/" if "] " in folder_path else f"{folder_path} "
        if not folder.is_dir():
            raise NotFound(f"{folder_path}: no such folder")
        return sorted(prefix + one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))

    def extent_path(self, path: str) -> Path:
        """The file that holds a disk's own bytes (``-flat.vmdk`` or ``-delta.vmdk``)."""
        return self._disk(path).extent

    def exists(self, path: str) -> bool:
        """Is there a disk or another file of that path?"""
        if path in self._disks:
            return True
        try:
            return self.local_path(path).is_file()
        except NotFound:
            return False

    def disks(self) -> list[str]:
        """The paths of all disks."""
        with self._structure.shared():
            return sorted(self._disks)

    # life of a disk

    def create_disk(self, path: str, capacity_bytes: int, *, thin: bool = True, uuid: str | None = None) -> DiskInfo:
        """A new, empty base disk. A thick one reports all of itself as allocated, as on a VMFS."""
        if capacity_bytes <= 0 or capacity_bytes % SECTOR:
            raise OutOfRange(f"{path}: a disk of {capacity_bytes} bytes can't be")
        with self._structure.alone():
            self._check_new(path)
            disk = self._new(path, capacity_bytes, uuid or _new_disk_uuid(), thin, uuid_module.uuid4().hex, None)
            disk.extent.parent.mkdir(parents=True, exist_ok=True)
            with open(disk.extent, "wb") as file:
                file.truncate(capacity_bytes)
            self._save(disk)
            self._disks[path] = disk
            return self._describe(disk)

    def snapshot_disk(self, path: str, child_path: str, *, uuid: str | None = None) -> DiskInfo:
        """An empty delta disk over a disk. With ``uuid`` it is a linked clone: another disk, with its own tracking."""
        with self._structure.alone():
            parent = self._disk(path)
            if parent.frozen:
                raise Locked(f"{path} is being consolidated")
            self._check_new(child_path)
            tracking_id = parent.tracking_id if uuid is None else uuid_module.uuid4().hex
            disk = self._new(child_path, parent.capacity, uuid or parent.uuid, True, tracking_id, parent)
            disk.extent.parent.mkdir(parents=True, exist_ok=True)
            with open(disk.extent, "wb") as file:
                file.truncate(disk.capacity)
            assert disk.map_file is not None
            with open(disk.map_file, "wb") as file:
                file.truncate(disk.grains)
            self._save(disk)
            self._disks[child_path] = disk
            parent.children.append(disk)
            return self._describe(disk)

    def consolidate(self, child_path: str) -> None:
        """Put a delta disk's bytes into its parent; the delta goes, and its children hang on the parent.

        :raises Locked: the disk, its parent, or a disk above them is open. :raises NotALeaf: it is a base disk, or the
            parent has other children, whose bytes this would change.
        """
        with self._structure.alone():
            child = self._disk(child_path)
            parent = child.parent
            if parent is None:
                raise NotALeaf(f"{child_path} is a base disk")
            if len(parent.children) > 1:
                raise NotALeaf(f"{parent.path} has other children than {child_path}")
            for disk in (child, parent):
                self._refuse_if_used(disk)
            child.frozen = parent.frozen = True
        try:
            self._merge(child, parent)
            with self._structure.alone():
                child.merged = True
                self._save(child)
                self._finish_consolidation(child)
        finally:
            child.frozen = parent.frozen = False

    def _finish_consolidation(self, child: _Disk) -> None:
        parent = child.parent
        assert parent is not None
        for grandchild in child.children:
            grandchild.parent = parent
            self._save(grandchild)
            parent.children.append(grandchild)
        parent.children.remove(child)
        self._forget(child)

    def _merge(self, child: _Disk, parent: _Disk) -> None:
        for start, end, here in child.runs(0, child.capacity):
            if not here:
                continue
            at = start
            for data_start, data_end in [*_data_runs(child.fd, start, end), (end, end)]:
                _punch(parent.fd, at, data_start - at)
                offset = data_start
                while offset < data_end:
                    data = os.pread(child.fd, min(4 << 20, data_end - offset), offset)
                    _pwrite_all(parent.fd, data, offset)
                    offset += len(data)
                at = data_end
            if parent.parent is not None:
                first, last = start // GRAIN, -(-end // GRAIN)
                parent.map[first:last] = b"\1" * (last - first)

    def delete_disk(self, path: str) -> None:
        """Remove a disk that nobody uses and that has no children."""
        with self._structure.alone():
            disk = self._disk(path)
            self._refuse_if_used(disk)
            if disk.children:
                raise Locked(f"{path} is the parent of {disk.children[0].path}")
            if disk.parent is not None:
                disk.parent.children.remove(disk)
            self._forget(disk)
            if not any(other.tracking_id == disk.tracking_id for other in self._disks.values()):
                self._stop_tracking(disk.tracking_id)

    def grow_disk(self, path: str, capacity_bytes: int) -> None:
        """Make a base disk without children larger. (vSphere refuses on a VM with snapshots.)"""
        with self._structure.alone():
            disk = self._disk(path)
            if disk.parent is not None or disk.children:
                raise NotALeaf(f"{path} is part of a chain of snapshots")
            self._refuse_if_used(disk)
            if capacity_bytes < disk.capacity or capacity_bytes % SECTOR:
                raise OutOfRange(f"{path}: {capacity_bytes} bytes are less than now, or no whole sectors")
            if capacity_bytes == disk.capacity:
                return
            self._check_space(path)
            old, disk.capacity = disk.capacity, capacity_bytes
            os.truncate(disk.extent, capacity_bytes)
            tracking = self._trackings.get(disk.tracking_id)
            if tracking is not None:
                tracking.grow(old, capacity_bytes)
            self._save(disk)

    def rename_disk(self, path: str, new_path: str) -> None:
        """Move a disk, also to another datastore; its children follow it."""
        with self._structure.alone():
            disk = self._disk(path)
            self._refuse_if_used(disk)
            self._check_new(new_path)
            moved = self._new(new_path, disk.capacity, disk.uuid, disk.thin, disk.tracking_id, disk.parent)
            moved.extent.parent.mkdir(parents=True, exist_ok=True)
            disk.release()
            if disk.map_file is not None and moved.map_file is not None:
                moved.map_file.unlink(missing_ok=True)
                os.link(disk.map_file, moved.map_file)
            self._save(moved)
            os.rename(disk.extent, moved.extent)  # of the two descriptions the one with an extent counts
            moved.children = disk.children
            for child in moved.children:
                child.parent = moved
                self._save(child)
            if moved.parent is not None:
                moved.parent.children[moved.parent.children.index(disk)] = moved
            self._disks[new_path] = moved
            self._forget(disk)

    def adopt(self, path: str, image: Path) -> None:
        """Fill a base disk with a raw image's bytes (sparse stays sparse). For seeding."""
        with self._structure.alone():
            disk = self._disk(path)
            self._refuse_if_used(disk)
            if disk.parent is not None or disk.children:
                raise NotALeaf(f"{path} is part of a chain of snapshots")
            if image.stat().st_size > disk.capacity:
                raise OutOfRange(f"{image} is larger than {path}")
            disk.release()
            subprocess.run(
                ["cp", "--sparse=always", "--reflink=auto", "--", str(image), str(disk.extent)], check=True, timeout=600
            )
            os.truncate(disk.extent, disk.capacity)
            tracking = self._trackings.get(disk.tracking_id)
            if tracking is not None:
                tracking.mark(0, disk.capacity)

    def set_full(self, datastore: str, full: bool) -> None:
        """A full datastore refuses new disks, new snapshots and writes to thin or delta disks."""
        if full:
            self._full.add(datastore)
        else:
            self._full.discard(datastore)

    def is_full(self, datastore: str) -> bool:
        return datastore in self._full

    @contextlib.contextmanager
    def stun(self) -> Iterator[None]:
        """Nobody else reads or writes anything meanwhile: a snapshot of several disks is of one moment.

        The thread that holds it may call every method.
        """
        with self._structure.alone():
            yield

    def close(self) -> None:
        """Close all files. The state is on disk anyway."""
        with self._structure.alone():
            for disk in self._disks.values():
                disk.release()
            for tracking in self._trackings.values():
                tracking.close()
            self._trackings.clear()
            self._disks.clear()

    def info(self, path: str) -> DiskInfo:
        with self._structure.shared():
            return self._describe(self._disk(path))

    def chain(self, path: str) -> list[str]:
        """The paths of a disk and its ancestors, the base last."""
        with self._structure.shared():
            return [disk.path for disk in self._disk(path).chain()]

    # bytes

    def read(self, path: str, offset: int, length: int) -> bytes:
        """The bytes of a range, through the chain."""
        with self._structure.shared():
            disk = self._disk(path)
            self._check_range(disk, offset, length)
            if disk.parent is None:
                return _pread_all(disk.fd, length, offset)
            buffer = bytearray(length)
            self._read_into(disk, offset, memoryview(buffer))
            return bytes(buffer)

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        """As :meth:`read`, without the copy."""
        with self._structure.shared():
            disk = self._disk(path)
            self._check_range(disk, offset, len(buffer))
            self._read_into(disk, offset, memoryview(buffer))

    def _read_into(self, disk: _Disk, offset: int, view: memoryview) -> None:
        for start, end, here in disk.runs(offset, offset + len(view)):
            piece = view[start - offset : end - offset]
            if here:
                at = start
                while len(piece):
                    done = os.preadv(disk.fd, [piece], at)
                    if not done:
                        raise OSError(f"{disk.extent} is shorter than its disk")
                    piece, at = piece[done:], at + done
            else:
                assert disk.parent is not None
                self._read_into(disk.parent, start, piece)

    def write(self, path: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to a leaf. Its change tracking sees it, whoever writes."""
        data = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        with self._structure.shared():
            disk = self._leaf(path)
            self._check_range(disk, offset, len(data))
            if not len(data):
                return
            if disk.thin:
                self._check_space(path)
            with disk.mutex:
                self._mark(disk, offset, len(data))
                if disk.parent is None:
                    _pwrite_all(disk.fd, data, offset)
                else:
                    self._complete_grains(disk, offset, len(data))
                    _pwrite_all(disk.fd, data, offset)
                    first, last = offset // GRAIN, -(-(offset + len(data)) // GRAIN)
                    disk.map[first:last] = b"\1" * (last - first)

    def discard(self, path: str, offset: int, length: int) -> None:
        """Make a range of a leaf read as zeros, whatever its parents hold there."""
        with self._structure.shared():
            disk = self._leaf(path)
            self._check_range(disk, offset, length)
            if not length:
                return
            with disk.mutex:
                self._mark(disk, offset, length)
                if disk.parent is not None:
                    self._complete_grains(disk, offset, length)
                _punch(disk.fd, offset, length)
                if disk.parent is not None:
                    first, last = offset // GRAIN, -(-(offset + length) // GRAIN)
                    disk.map[first:last] = b"\1" * (last - first)

    def _complete_grains(self, disk: _Disk, offset: int, length: int) -> None:
        """Copy from the parent what a write leaves untouched in its first and last grain, if they are not held yet."""
        end = offset + length
        assert disk.parent is not None
        head, tail = offset // GRAIN, (end - 1) // GRAIN
        gaps = []
        if offset > head * GRAIN and not disk.map[head]:
            gaps.append((head * GRAIN, offset))
        tail_end = min((tail + 1) * GRAIN, disk.capacity)
        if end < tail_end and not disk.map[tail]:
            gaps.append((end, tail_end))
        for start, stop in gaps:
            buffer = bytearray(stop - start)
            self._read_into(disk.parent, start, memoryview(buffer))
            _pwrite_all(disk.fd, buffer, start)

    def allocated(self, path: str, offset: int, length: int, chunk_bytes: int) -> list[Range]:
        """(offset, length) of what holds data through the chain: rounded out to chunks, clipped, merged."""
        with self._structure.shared():
            disk = self._disk(path)
            self._check_range(disk, offset, length)
            end = offset + length
            result: list[Range] = []
            for start, stop in self._data(disk, offset, end):
                start = max(offset, start // chunk_bytes * chunk_bytes)
                stop = min(end, -(-stop // chunk_bytes) * chunk_bytes)
                if result and start <= result[-1][1]:
                    result[-1] = (result[-1][0], max(stop, result[-1][1]))
                else:
                    result.append((start, stop))
            return [(start, stop - start) for start, stop in result]

    def _data(self, disk: _Disk, offset: int, end: int) -> Iterator[Range]:
        for start, stop, here in disk.runs(offset, end):
            if not here:
                assert disk.parent is not None
                yield from self._data(disk.parent, start, stop)
            elif disk.thin:
                yield from _data_runs(disk.fd, start, stop)
            else:
                yield start, stop

    # locks

    def open(self, path: str, owner: str, write: bool) -> Opener:
        """Enter the lock table. Openers block consolidation and deletion of the disk and of its whole chain.

        :raises Locked: another writer has it. :raises NotALeaf: to be written, and has children.
        """
        with self._structure.shared():
            disk = self._leaf(path) if write else self._disk(path)
            if disk.frozen:
                raise Locked(f"{path} is being consolidated")
            with self._locks:
                if write and any(opener.write for opener in disk.openers):
                    raise Locked(f"{path} is locked by {disk.openers[0].owner}")
                opener = Opener(self, disk.chain(), owner, write)
                for member in opener._chain:
                    member.openers.append(opener)
            return opener

    def writers(self, path: str) -> list[str]:
        """Who of the VMs has this disk open for writing."""
        disk = self._disk(path)
        with self._locks:
            return [opener.owner for opener in disk.openers if opener.write and opener.owner.startswith("vm:")]

    def _close_opener(self, opener: Opener) -> None:
        with self._locks:
            for disk in opener._chain:
                if opener in disk.openers:
                    disk.openers.remove(opener)

    # change tracking

    def tracking(self, path: str) -> ChangeTracking | None:
        with self._structure.shared():
            tracking = self._trackings.get(self._disk(path).tracking_id)
            if tracking is None:
                return None
            return ChangeTracking(tracking.state["prefix"], tracking.state["sequence"])

    def enable_tracking(self, path: str) -> None:
        """Start tracking where it is not on. Over an existing snapshot it works, but loses changes (VADP facts 7)."""
        with self._structure.alone():
            disk = self._disk(path)
            if disk.tracking_id not in self._trackings:
                self._start_tracking(disk)

    def disable_tracking(self, path: str) -> None:
        with self._structure.alone():
            self._stop_tracking(self._disk(path).tracking_id)

    def reset_tracking(self, path: str) -> None:
        """A new prefix: every older id becomes unknown."""
        with self._structure.alone():
            disk = self._disk(path)
            if disk.tracking_id in self._trackings:
                self._stop_tracking(disk.tracking_id)
                self._start_tracking(disk)

    def set_uuid(self, path: str, uuid: str) -> None:
        """Give a disk the UUID of another one."""
        with self._structure.alone():
            disk = self._disk(path)
            disk.uuid = uuid
            self._save(disk)

    def spoil_tracking(self, path: str) -> None:
        """From now on changes get lost without a word, until a reset: what a restore does (VADP facts 12)."""
        with self._structure.alone():
            tracking = self._trackings.get(self._disk(path).tracking_id)
            if tracking is not None:
                tracking.state["unreliable"] = True
                tracking.save()

    def mark_snapshot(self, path: str, snapshot_moid: str) -> str | None:
        """Freeze the map for a snapshot. -> the snapshot's change id, or None where nothing is tracked.

        Called together with :meth:`snapshot_disk` inside :meth:`stun`, so that no write lies between them.
        """
        with self._structure.alone():
            disk = self._disk(path)
            tracking = self._trackings.get(disk.tracking_id)
            return None if tracking is None else tracking.freeze(snapshot_moid, disk.capacity)

    def release_snapshot(self, path: str, snapshot_moid: str) -> None:
        """The snapshot is gone: what was changed up to it can't be had any more."""
        with self._structure.alone():
            tracking = self._trackings.get(self._disk(path).tracking_id)
            if tracking is not None and tracking.state["snapshots"].pop(snapshot_moid, None) is not None:
                tracking.save()
                (tracking.folder / f"frozen-{snapshot_moid}").unlink(missing_ok=True)

    def revert_tracking(self, path: str, snapshot_moid: str) -> None:
        """What a revert to a snapshot does: map and sequence go back, the prefix stays (VADP facts 11)."""
        with self._structure.alone():
            tracking = self._trackings.get(self._disk(path).tracking_id)
            if tracking is not None:
                tracking.thaw(snapshot_moid)
                self._areas.clear()

    def current_change_id(self, path: str) -> str | None:
        """The id that vm.config shows; using it for a backup loses data (VADP facts 3)."""
        tracking = self.tracking(path)
        return None if tracking is None else f"{tracking.change_id_prefix}/{tracking.sequence}"

    def changed_areas(self, path: str, snapshot_moid: str, change_id: str) -> list[Range]:
        """(offset, length) of the blocks that changed after ``change_id`` and up to the snapshot. Not to be modified.

        :raises UnknownChangeId: another prefix, a sequence beyond the snapshot's or from before the tracking began,
            or an unknown snapshot.
        """
        with self._structure.shared():
            tracking = self._trackings.get(self._disk(path).tracking_id)
            if tracking is None:
                raise UnknownChangeId(f"{path} has no change tracking")
            with tracking.lock:
                frozen = tracking.state["snapshots"].get(snapshot_moid)
                first = tracking.state["first"]
            if frozen is None:
                raise UnknownChangeId(f"{path}: nothing is known of the snapshot {snapshot_moid}")
            prefix, _unused, number = change_id.rpartition("/")
            if prefix != frozen["prefix"] or not number.isdecimal() or not first <= int(number) <= frozen["sequence"]:
                raise UnknownChangeId(f"{path}: the change id {change_id!r} is not known")
            key = (tracking.folder.name, snapshot_moid, f"{change_id} {frozen['sequence']}")
            with self._locks:
                known = self._areas.get(key)
            if known is None:
                blocks = memoryview((tracking.folder / f"frozen-{snapshot_moid}").read_bytes()).cast("I")
                known = _areas_after(blocks, int(number), frozen["capacity"])
                with self._locks:  # a paged query asks again and again
                    self._areas[key] = known
                    while len(self._areas) > 4:
                        self._areas.popitem(last=False)
            return known

    # inside

    def _disk(self, path: str) -> _Disk:
        try:
            return self._disks[path]
        except KeyError:
            raise NotFound(f"{path}: no such disk") from None

    def _leaf(self, path: str) -> _Disk:
        disk = self._disk(path)
        if disk.children:
            raise NotALeaf(f"{path} has a child, {disk.children[0].path}")
        if disk.frozen:
            raise NotALeaf(f"{path} is being consolidated")
        return disk

    @staticmethod
    def _check_range(disk: _Disk, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > disk.capacity:
            raise OutOfRange(f"{disk.path}: [{offset}, +{length}) is outside of {disk.capacity} bytes")

    def check_space(self, path: str) -> None:
        """:raises NoSpace: the datastore of a path is full."""
        self._check_space(path)

    def _check_space(self, path: str) -> None:
        if self._full and self.split_path(path)[0] in self._full:
            raise NoSpace(f"{path}: the datastore is full")

    def _check_new(self, path: str) -> None:
        if not path.endswith(".vmdk"):
            raise NotFound(f"{path} is not the name of a disk")
        if path in self._disks or self.local_path(path).exists():
            raise Exists(f"{path} exists")
        self._check_space(path)

    def _refuse_if_used(self, disk: _Disk) -> None:
        with self._locks:
            if disk.openers:
                raise Locked(f"{disk.path} is in use by {disk.openers[0].owner}")
        if disk.frozen:
            raise Locked(f"{disk.path} is being consolidated")

    def _new(self, path: str, capacity: int, uuid: str, thin: bool, tracking_id: str, parent: _Disk | None) -> _Disk:
        local = self.local_path(path)
        base = local.name[: -len(".vmdk")]
        return _Disk(
            path=path,
            capacity=capacity,
            uuid=uuid,
            thin=thin,
            tracking_id=tracking_id,
            parent=parent,
            extent=local.with_name(f"{base}-{'flat' if parent is None else 'delta'}.vmdk"),
            map_file=None if parent is None else local.with_name(f".{base}.map"),
        )

    def _meta_file(self, path: str) -> Path:
        local = self.local_path(path)
        return local.with_name(f".{local.name[: -len('.vmdk')]}.json")

    def _save(self, disk: _Disk) -> None:
        meta = {
            "path": disk.path,
            "capacity_bytes": disk.capacity,
            "uuid": disk.uuid,
            "thin": disk.thin,
            "tracking_id": disk.tracking_id,
            "parent": disk.parent.path if disk.parent else None,
            "merged": disk.merged,
        }
        _write_atomically(self.local_path(disk.path), _descriptor(disk))
        _write_atomically(self._meta_file(disk.path), json.dumps(meta, indent=1))

    def _forget(self, disk: _Disk) -> None:
        self._meta_file(disk.path).unlink(missing_ok=True)
        self.local_path(disk.path).unlink(missing_ok=True)
        disk.release()
        disk.extent.unlink(missing_ok=True)
        if disk.map_file is not None:
            disk.map_file.unlink(missing_ok=True)
        del self._disks[disk.path]

    def _describe(self, disk: _Disk) -> DiskInfo:
        with self._locks:
            openers = tuple(opener.owner for opener in disk.openers)
        return DiskInfo(
            path=disk.path,
            capacity_bytes=disk.capacity,
            parent=disk.parent.path if disk.parent else None,
            uuid=disk.uuid,
            thin=disk.thin,
            allocated_bytes=disk.extent.stat().st_blocks * 512 if disk.thin else disk.capacity,
            children=tuple(child.path for child in disk.children),
            openers=openers,
        )

    def _mark(self, disk: _Disk, offset: int, length: int) -> None:
        tracking = self._trackings.get(disk.tracking_id)
        if tracking is not None:
            tracking.mark(offset, length)

    def _start_tracking(self, disk: _Disk) -> None:
        folder = self.root / "tracking" / disk.tracking_id
        over_snapshot = disk.parent is not None and disk.parent.tracking_id == disk.tracking_id
        self._trackings[disk.tracking_id] = _Tracking.start(folder, disk.capacity, over_snapshot)

    def _stop_tracking(self, tracking_id: str) -> None:
        tracking = self._trackings.pop(tracking_id, None)
        if tracking is not None:
            tracking.remove()
            self._areas.clear()

    def _load(self) -> None:
        metas = {}
        for name in self.datastores:
            for file in (self.root / "datastores" / name).rglob(".*.json"):
                meta = json.loads(file.read_text())
                metas[meta["path"]] = meta
        # a kill inside rename_disk can leave the old name without its extent
        metas = {path: meta for path, meta in metas.items() if self._has_extent(meta)}
        for path in metas:
            self._load_disk(path, metas)
        for disk in [disk for disk in self._disks.values() if disk.merged]:
            self._finish_consolidation(disk)
        used = {disk.tracking_id: disk for disk in self._disks.values()}
        for folder in (self.root / "tracking").iterdir():
            if folder.name in used and (folder / "state.json").exists():
                self._trackings[folder.name] = _Tracking.load(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def _has_extent(self, meta: dict[str, Any]) -> bool:
        local = self.local_path(meta["path"])
        kind = "flat" if meta["parent"] is None else "delta"
        return local.with_name(f"{local.name[: -len('.vmdk')]}-{kind}.vmdk").exists()

    def _load_disk(self, path: str, metas: dict[str, dict[str, Any]]) -> _Disk:
        if path in self._disks:
            return self._disks[path]
        if path not in metas:
            raise NotFound(f"{path} is missing, and another disk needs it")
        meta = metas[path]
        parent = None if meta["parent"] is None else self._load_disk(meta["parent"], metas)
        disk = self._new(path, meta["capacity_bytes"], meta["uuid"], meta["thin"], meta["tracking_id"], parent)
        disk.merged = meta["merged"]
        if parent is not None:
            parent.children.append(disk)
        else:
            os.truncate(disk.extent, disk.capacity)  # a kill inside grow_disk
        self._disks[path] = disk
        return disk


def _pread_all(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError("a disk's file is shorter than the disk")
        data += more
    return data


def _areas_after(blocks: memoryview, sequence: int, capacity: int) -> list[Range]:
    result: list[Range] = []
    start = -1
    for number, changed in enumerate(blocks[: -(-capacity // CBT_BLOCK)]):
        if changed > sequence:
            if start < 0:
                start = number
        elif start >= 0:
            result.append((start * CBT_BLOCK, (number - start) * CBT_BLOCK))
            start = -1
    if start >= 0:
        result.append((start * CBT_BLOCK, capacity - start * CBT_BLOCK))
    return result


def _new_disk_uuid() -> str:
    """As vSphere makes them: each starts with 6000C29."""
    digits = uuid_module.uuid4().hex
    return f"6000C29{digits[7]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _descriptor(disk: _Disk) -> str:
    sectors = disk.capacity // SECTOR
    if disk.parent is None:
        kind, extent, parent_cid, hint = "vmfs", f'RW {sectors} VMFS "{disk.extent.name}"', "ffffffff", ""
    else:
        kind, extent, parent_cid = "vmfsSparse", f'RW {sectors} VMFSSPARSE "{disk.extent.name}"', "fffffffe"
        hint = f'parentFileNameHint="{disk.parent.path}"\n'
    identity = disk.uuid.replace("-", "").lower()
    identity = " ".join(identity[at : at + 2] for at in range(0, 32, 2))
    return (
        '# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\nCID=fffffffe\n'
        f'parentCID={parent_cid}\n{hint}createType="{kind}"\n\n# Extent description\n{extent}\n\n'
        "# The Disk Data Base\n#DDB\n\n"
        f'ddb.adapterType = "lsilogic"\nddb.uuid = "{identity[:23]}-{identity[24:]}"\n'
        f'ddb.thinProvisioned = "{int(disk.thin)}"\nddb.virtualHWVersion = "19"\n'
    )
