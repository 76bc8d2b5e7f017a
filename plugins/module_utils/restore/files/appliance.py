# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The process that reads file systems by libguestfs: Linux mounts them, in a small virtual machine without a network.

It serves as :mod:`.agent` says, and looks through directories in the same way. libguestfs is called by its C interface,
whose names are bytes: its Python binding takes and gives text, and some guests' names are none.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import os
import re
import resource
import shutil
import socket
import stat
import threading
from collections import Counter
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from ...datapath.image import chain_files
from ...errors import DataPathError
from . import fat, lvm
from .agent import MEMORY_BYTES, Agent, Part, Volume, problem_of
from .btrfs import Btrfs
from .disk import ReadOnly
from .ext import WAITS, Ext
from .filesystem import (
    DIRECTORY,
    FILE,
    NOT_KNOWN,
    FileSystem,
    Info,
    Piece,
    Unreadable,
    broken,
    bytes_at,
    kind_of,
    stream_pieces,
)
from .filesystems import Contained, open_file_system, type_of
from .places import member_of

_LIBRARY = "libguestfs.so.0"
_SOCKETS = re.compile(r"/tmp/libguestfs[A-Za-z0-9]+")
_NOTE = "sockets"
_LOOK_SECONDS = 0.02
_READONLY, _FORMAT = 1 << 0, 1 << 1
# A message to the appliance may have 4 MiB.
_NAMES = 1000
# As dissect's reader calls them.
_TYPES = {"vfat": "fat", "msdos": "fat", "crypto_LUKS": "luks", "BitLocker": "bitlocker", "": "unknown"}
_IGNORE_CASE = ("fat", "exfat", "ntfs", "hfsplus")
# Linux brings these in order when it mounts them, or nobody can write there.
_CLEAN_ONCE_MOUNTED = ("xfs", "btrfs", "squashfs", "iso9660", "cramfs", "romfs", "erofs")
_EXFAT_FLAGS, _EXFAT_IN_USE = 106, 0x2
_WITHOUT_OWNERS = ("fat", "exfat", "ntfs")
# btrfs' number for the subvolume at the top, and for directories in the place of subvolumes.
_BTRFS_TOP = 5
_BTRFS_EMPTY = 2
_MOST_BYTES = 1 << 20
_MAPPER = b"/dev/mapper/"
_ONE_DISK = "name one of the disks in 'disks'"
_NOT_MOUNTED = {
    "luks": "it is encrypted by LUKS",
    "bitlocker": "it is encrypted by BitLocker",
    "swap": "it is swap space",
    "unknown": "no known file system begins there",
}


def missing() -> List[str]:
    """What has to be installed before libguestfs can be used here; empty if nothing is missing."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return ["libguestfs (package guestfish or libguestfs)"]
    return []


class _DriveOptions(ctypes.Structure):
    _fields_ = [
        ("bitmask", ctypes.c_uint64),
        ("readonly", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("iface", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("label", ctypes.c_char_p),
        ("protocol", ctypes.c_char_p),
        ("server", ctypes.c_void_p),
        ("username", ctypes.c_char_p),
        ("secret", ctypes.c_char_p),
        ("cachemode", ctypes.c_char_p),
        ("discard", ctypes.c_char_p),
        ("copyonread", ctypes.c_int),
        ("blocksize", ctypes.c_int),
    ]


_STATUS = ["dev", "ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks", "atime_sec", "atime_nsec"]
_STATUS += ["mtime_sec", "mtime_nsec", "ctime_sec", "ctime_nsec"] + [f"spare{number}" for number in range(1, 7)]
_WANTED = ("dev", "ino", "mode", "uid", "gid", "size", "mtime_sec", "mtime_nsec")


class _Status(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _STATUS]


class _StatusList(ctypes.Structure):
    _fields_ = [("len", ctypes.c_uint32), ("val", ctypes.POINTER(_Status))]


_TEXT = ctypes.c_void_p
_TEXTS = ctypes.POINTER(ctypes.c_void_p)
# Function -> what it returns. Text is a pointer to bytes that have to be freed.
_RETURNS: Dict[str, Any] = {
    "add_drive_opts_argv": ctypes.c_int,
    "set_autosync": ctypes.c_int,
    "set_recovery_proc": ctypes.c_int,
    "launch": ctypes.c_int,
    "is_ready": ctypes.c_int,
    "list_filesystems": _TEXTS,
    "lvs": _TEXTS,
    "list_partitions": _TEXTS,
    "list_devices": _TEXTS,
    "part_to_dev": _TEXT,
    "part_to_partnum": ctypes.c_int,
    "device_index": ctypes.c_int,
    "blockdev_getsize64": ctypes.c_int64,
    "vfs_label": _TEXT,
    "vfs_uuid": _TEXT,
    "mount_options": ctypes.c_int,
    "btrfs_subvolume_get_default": ctypes.c_int64,
    "umount_all": ctypes.c_int,
    "ls0": ctypes.c_int,
    "lstatns": ctypes.POINTER(_Status),
    "lstatnslist": ctypes.POINTER(_StatusList),
    "readlink": _TEXT,
    "pread": _TEXT,
    "pread_device": _TEXT,
}


class GuestfsError(OSError):
    """What libguestfs says of a call that failed."""


class Guestfs:
    """libguestfs, as far as it is needed. One appliance, in which at most one file system is mounted.

    :raises OSError: the library is not installed.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_LIBRARY)
        self._free = ctypes.CDLL(None).free
        self._free.argtypes, self._free.restype = [ctypes.c_void_p], None
        for name, returned in _RETURNS.items():
            getattr(self._library, f"guestfs_{name}").restype = returned
        self._library.guestfs_create.restype = ctypes.c_void_p
        self._library.guestfs_last_error.restype = ctypes.c_char_p
        self._library.guestfs_close.restype = None
        self._library.guestfs_free_statns.restype = self._library.guestfs_free_statns_list.restype = None
        self._handle = ctypes.c_void_p(self._library.guestfs_create())
        # Otherwise it prints them.
        self._library.guestfs_set_error_handler(self._handle, None, None)
        self._launched = False
        self._mounted: Optional[Tuple[bytes, bytes]] = None

    def launch(self, layers: Sequence[str]) -> None:
        """Start the appliance, with these layers as its disks.

        :raises DataPathError: it does not start.
        """
        try:
            # It ends the virtual machine when this process is killed.
            self._call("set_recovery_proc", 1)
            # Nothing is written, and the end need not wait for it.
            self._call("set_autosync", 0)
            for layer in layers:
                options = _DriveOptions(bitmask=_READONLY | _FORMAT, readonly=1, format=b"qcow2")
                self._call("add_drive_opts_argv", os.fsencode(layer), ctypes.byref(options))
            self._call("launch")
        except GuestfsError as error:
            raise DataPathError(
                "libguestfs does not start",
                reason=" ".join(str(error).split()),
                remedy="Run libguestfs-test-tool as this user: it tells what is missing",
            ) from None
        self._launched = True

    def close(self) -> None:
        """End the appliance."""
        self._library.guestfs_close(self._handle)
        self._launched = False

    def require_alive(self) -> None:
        """:raises DataPathError: the appliance is gone."""
        if self._launched and self._library.guestfs_is_ready(self._handle) != 1:
            raise DataPathError("The virtual machine of libguestfs has ended", reason=self._last_error())

    def _last_error(self) -> str:
        text = self._library.guestfs_last_error(self._handle)
        return (text or b"it does not say why").decode("utf-8", "replace")

    def _call(self, name: str, *arguments: Any) -> Any:
        result = getattr(self._library, f"guestfs_{name}")(self._handle, *arguments)
        if result == -1 or not (isinstance(result, int) or result):
            self.require_alive()
            raise GuestfsError(self._last_error())
        return result

    def _text(self, name: str, *arguments: Any) -> bytes:
        pointer = self._call(name, *arguments)
        try:
            return ctypes.string_at(pointer)
        finally:
            self._free(pointer)

    def _texts(self, name: str) -> List[bytes]:
        array = self._call(name)
        found: List[bytes] = []
        while array[len(found)]:
            found.append(ctypes.string_at(array[len(found)]))
        for number in range(len(found)):
            self._free(array[number])
        self._free(array)
        return found

    # What there is

    def filesystems(self) -> Dict[bytes, str]:
        """{what can be mounted: the type of its file system}"""
        texts = self._texts("list_filesystems")
        return {name: kind.decode("ascii", "replace") for name, kind in zip(texts[::2], texts[1::2])}

    def logical_volumes(self) -> List[bytes]:
        return self._texts("lvs")

    def partitions(self) -> List[bytes]:
        return self._texts("list_partitions")

    def devices(self) -> List[bytes]:
        return self._texts("list_devices")

    def partition(self, device: bytes) -> Tuple[bytes, int]:
        """The disk of a partition, and its number."""
        return self._text("part_to_dev", device), int(self._call("part_to_partnum", device))

    def read_device(self, device: bytes, count: int, offset: int) -> bytes:
        """Bytes of a device; fewer where it ends before."""
        size = ctypes.c_size_t()
        pointer = self._call("pread_device", device, count, ctypes.c_int64(offset), ctypes.byref(size))
        try:
            return ctypes.string_at(pointer, size.value)
        finally:
            self._free(pointer)

    def index(self, device: bytes) -> int:
        """Which of the disks that were added a device is."""
        return int(self._call("device_index", device))

    def size(self, device: bytes) -> int:
        return int(self._call("blockdev_getsize64", device))

    def label(self, device: bytes) -> Optional[str]:
        return self._text("vfs_label", device).decode("utf-8", "replace") or None

    def uuid(self, device: bytes) -> Optional[str]:
        return self._text("vfs_uuid", device).decode("utf-8", "replace") or None

    # What is mounted

    def mount(self, device: bytes, options: bytes = b"ro") -> None:
        """Mount a file system, in the place of the one that is."""
        if self._mounted != (device, options):
            self._mounted = None
            self._call("umount_all")
            self._call("mount_options", options, device, b"/")
            self._mounted = (device, options)

    def default_subvolume(self, device: bytes) -> int:
        """The number of btrfs' subvolume that is mounted where none is named."""
        return int(self._call("btrfs_subvolume_get_default", device))

    def names(self, path: bytes) -> List[bytes]:
        """What a directory holds."""
        with open(os.memfd_create("names"), "w+b") as file:
            self._call("ls0", path, b"/proc/self/fd/%d" % file.fileno())
            file.seek(0)
            return [name for name in file.read().split(b"\0") if name]

    def status(self, path: bytes) -> Dict[str, int]:
        pointer = self._call("lstatns", path)
        try:
            return _as_dict(pointer.contents)
        finally:
            self._library.guestfs_free_statns(pointer)

    def statuses(self, folder: bytes, names: Sequence[bytes]) -> List[Dict[str, int]]:
        """Of each of the names in a folder; ``ino`` is -1 where there is none."""
        array = (ctypes.c_char_p * (len(names) + 1))(*names, None)
        pointer = self._call("lstatnslist", folder, array)
        try:
            found = pointer.contents
            return [_as_dict(found.val[number]) for number in range(found.len)]
        finally:
            self._library.guestfs_free_statns_list(pointer)

    def link(self, path: bytes) -> bytes:
        return self._text("readlink", path)

    def read(self, path: bytes, count: int, offset: int) -> bytes:
        size = ctypes.c_size_t()
        pointer = self._call("pread", path, count, ctypes.c_int64(offset), ctypes.byref(size))
        try:
            return ctypes.string_at(pointer, size.value)
        finally:
            self._free(pointer)


def _as_dict(status: _Status) -> Dict[str, int]:
    return {name: getattr(status, name) for name in _WANTED}


class _Node(NamedTuple):
    path: bytes
    status: Dict[str, int]


class _Content:
    """A file of the appliance, to be read from its begin to its end."""

    def __init__(self, guestfs: Guestfs, path: bytes) -> None:
        self._guestfs = guestfs
        self._path = path
        self._position = 0

    def read(self, count: int) -> bytes:
        data = self._guestfs.read(self._path, count, self._position)
        self._position += len(data)
        return data


class Mounted(FileSystem):
    """A file system that the appliance's Linux has mounted, or mounts again when it is needed."""

    def __init__(self, guestfs: Guestfs, device: bytes, kind: str, size: int) -> None:
        super().__init__(io.BytesIO(), size)
        self.name = kind
        self.ignores_case = kind in _IGNORE_CASE
        self.label = guestfs.label(device)
        self.uuid = guestfs.uuid(device)
        self._guestfs = guestfs
        self._device = device
        self._options = b"ro"
        # Before it is mounted, which may change it.
        self.unclean = _unclean_once_mounted(_Device(guestfs, device), kind)

    def others(self) -> Dict[str, FileSystem]:
        if self.name != "btrfs" or self._guestfs.default_subvolume(self._device) == _BTRFS_TOP:
            return {}
        top = copy.copy(self)
        top._options = b"ro,subvolid=%d" % _BTRFS_TOP
        return {"top": top}

    def _mount(self) -> None:
        self._guestfs.mount(self._device, self._options)

    def root(self) -> Any:
        self._mount()
        return _Node(b"/", self._guestfs.status(b"/"))

    def entries(self, node: Any) -> Iterator[Tuple[str, Any]]:
        self._mount()
        names = self._guestfs.names(node.path)
        for start in range(0, len(names), _NAMES):
            part = names[start : start + _NAMES]
            statuses = self._guestfs.statuses(node.path, part)
            if len(statuses) != len(part):
                raise ValueError("its entries can't be read")
            for name, status in zip(part, statuses):
                yield name.decode("utf-8", "surrogateescape"), _Node(os.path.join(node.path, name), status)

    def info(self, node: Any) -> Info:
        status = node.status
        if status["ino"] == -1:
            raise ValueError("its inode can't be read")
        kind, what = kind_of(status["mode"])
        owned = self.name not in _WITHOUT_OWNERS
        # Those of btrfs in the place of subvolumes share one number. They are empty.
        number = node.path if self.name == "btrfs" and status["ino"] == _BTRFS_EMPTY else status["ino"]
        return Info(
            kind=kind,
            size=status["size"] if kind == FILE else 0,
            mtime_ns=status["mtime_sec"] * 10**9 + status["mtime_nsec"],
            mode=stat.S_IMODE(status["mode"]) if owned else None,
            uid=status["uid"] if owned else None,
            gid=status["gid"] if owned else None,
            inode=(status["dev"], number) if kind == DIRECTORY else None,
            what=what,
        )

    def link(self, node: Any) -> str:
        self._mount()
        target = self._guestfs.link(node.path).decode("utf-8", "surrogateescape")
        # So ntfs-3g says it.
        if self.name == "ntfs" and target.startswith("unsupported reparse"):
            raise Unreadable(f"its data lie elsewhere: {target}")
        return target

    def read(self, node: Any) -> Iterator[Piece]:
        self._mount()
        content: Any = _Content(self._guestfs, node.path)
        return stream_pieces(content, node.status["size"])


class ApplianceAgent(Agent):
    """What the process keeps between requests."""

    def __init__(self, out: int) -> None:
        super().__init__(out)
        self._guestfs = Guestfs()

    def _raise_damage(self) -> None:
        self._guestfs.require_alive()

    def serve(self, requests: Iterator[bytes]) -> None:
        try:
            super().serve(requests)
        finally:
            self._guestfs.close()

    def open(self, disks: Sequence[Dict[str, Any]], run_dir: str, skip: Sequence[str] = ()) -> None:
        """As it says there.

        :param skip: names of volumes that are not wanted.
        """
        layers = [entry["layers"][-1]["layer"] for entry in disks]
        for layer in layers:
            # No chain leads qemu out of the repository.
            chain_files(layer)
        with _sockets_noted(run_dir):
            self._guestfs.launch(layers)
        # The virtual machine has its own by now, and takes more.
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        keys = [int(entry["key"]) for entry in disks]
        self.alive()
        copies = _Copies(self._guestfs)
        logical = self._guestfs.logical_volumes()
        for device, kind in sorted(self._guestfs.filesystems().items()):
            # Subvolumes lie in the file system that is there by its device.
            if device.startswith(b"btrfsvol:") or is_internal(device, logical):
                continue
            self.alive()
            try:
                part = self._part(device, keys)
            except broken() as error:
                # LVM lists volumes that it does not set up, such as those of copies.
                self._guestfs.require_alive()
                told = device.decode("utf-8", "replace").replace("/dev/", "", 1)
                part = Part(told, keys[0], io.BytesIO(), 0)
                if told not in skip:
                    self._unreadable(part, _TYPES.get(kind, kind), f"it can't be read: {problem_of(error)}")
                continue
            if part.name in skip:
                continue
            problem = copies.problem_of(device)
            if problem is not None:
                self._unreadable(part, _TYPES.get(kind, kind), problem)
                continue
            self._volumes += self._with_others(part, self._mounted(device, part, _TYPES.get(kind, kind)))
            self._raise_damage()
        self._say(volumes=[volume.facts for volume in self._volumes])

    def _part(self, device: bytes, keys: Sequence[int]) -> Part:
        size = self._guestfs.size(device)
        name, key = device.decode("utf-8", "replace").replace("/dev/", "", 1), keys[0]
        if device in self._guestfs.partitions():
            disk, number = self._guestfs.partition(device)
            key = keys[self._guestfs.index(disk)]
            name = f"{key}p{number}"
        elif device in self._guestfs.devices():
            key = keys[self._guestfs.index(device)]
            name = str(key)
        return Part(name, key, io.BytesIO(), size)

    def _mounted(self, device: bytes, part: Part, kind: str) -> Volume:
        if kind in _NOT_MOUNTED:
            return Volume(self._facts(part, kind, problem=_NOT_MOUNTED[kind]), None)
        try:
            stream: Any = _Device(self._guestfs, device)
            # Linux takes some of these for the file system that lay there before.
            type_of(stream)
            member = member_of(stream, stream.size)
            if member is not None:
                return Volume(self._facts(part, member.kind, problem=member.why), None)
        except Unreadable as error:
            kind = error.kind if isinstance(error, Contained) else kind
            return Volume(self._facts(part, kind, problem=str(error)), None)
        except broken() as error:
            return Volume(self._facts(part, kind, problem=f"it can't be read: {problem_of(error)}"), None)
        try:
            system = Mounted(self._guestfs, device, kind, part.size)
            system.info(system.root())
        except broken() as error:
            return Volume(self._facts(part, kind, problem=f"it can't be mounted: {problem_of(error)}"), None)
        more = {"label": system.label, "uuid": system.uuid, "readable": True, **self._state(system)}
        return Volume(self._facts(part, kind, **more), system)


def is_internal(device: bytes, logical: Sequence[bytes]) -> bool:
    """Whether a device is what LVM makes a volume of: an image of a mirror looks like the whole of it.

    :param logical: the volumes that LVM shows, such as ``/dev/vg0/root``.
    """
    if not device.startswith(_MAPPER):
        return False
    groups = {name.split(b"/")[2].replace(b"-", b"--") for name in logical if name.count(b"/") == 3}
    return any(device[len(_MAPPER) :].startswith(group + b"-") for group in groups)


class _Device(ReadOnly):
    """A device of the appliance, to look at."""

    def __init__(self, guestfs: Guestfs, device: bytes) -> None:
        super().__init__(guestfs.size(device))
        self._guestfs = guestfs
        self._device = device

    def _at(self, offset: int, length: int) -> bytes:
        found = b""
        while len(found) < length:
            data = self._guestfs.read_device(self._device, min(length - len(found), _MOST_BYTES), offset + len(found))
            if not data:
                break
            found += data
        return found


def _unclean_once_mounted(device: Any, kind: str) -> Optional[str]:
    """Why a file system is not known to be clean once Linux has mounted it; None if it is."""
    if kind in _CLEAN_ONCE_MOUNTED:
        return None
    try:
        if kind in ("ext2", "ext3", "ext4"):
            return WAITS if Ext.waits(device) else None
        if kind in ("ntfs", "fat"):
            # What mounts them here replays nothing.
            system = open_file_system(device, device.size)
            return NOT_KNOWN if system is None else system.unclean
        if kind == "exfat":
            flags = int.from_bytes(bytes_at(device, _EXFAT_FLAGS, 2), "little")
            return fat.IN_USE if flags & _EXFAT_IN_USE else None
    except broken() as error:
        return f"{NOT_KNOWN} ({problem_of(error)})"
    return NOT_KNOWN


class _Copies:
    """What is there more than once: Linux takes parts for each other that have one UUID, and groups of one name."""

    def __init__(self, guestfs: Guestfs) -> None:
        self._btrfs: Dict[str, List[bytes]] = {}
        self._place: Dict[bytes, str] = {}
        self._copied: Set[str] = set()
        self._arrays: Counter[Tuple[str, int]] = Counter()
        self._groups: Set[str] = set()
        physical: List[lvm.PhysicalVolume] = []
        parts: Set[str] = set()
        for device in [*guestfs.devices(), *guestfs.partitions()]:
            with contextlib.suppress(*broken()):
                stream: Any = _Device(guestfs, device)
                member = member_of(stream, stream.size)
                if member is not None and member.identity is not None:
                    self._arrays[member.identity] += 1
                if lvm.is_physical_volume(stream):
                    physical.append(lvm.read_physical_volume(0, device.decode("utf-8", "replace"), stream, stream.size))
                elif Btrfs.begins(stream):
                    self._note_btrfs(device, stream, parts)
        self._note_groups(physical)

    def _note_btrfs(self, device: bytes, stream: Any, parts: Set[str]) -> None:
        whole, part = Btrfs.identity(stream)
        self._place[device] = whole
        self._btrfs.setdefault(whole, []).append(device)
        if part in parts:
            self._copied.add(whole)
        parts.add(part)

    def _note_groups(self, physical: Sequence[lvm.PhysicalVolume]) -> None:
        identities: Dict[str, Set[str]] = {}
        copied = lvm.doubled(physical)
        for one in physical:
            group = lvm.group_of(one)
            if group is not None:
                identities.setdefault(group[1], set()).add(group[0])
                if one.uuid in copied:
                    self._groups.add(group[1])
        self._groups |= {name for name, uuids in identities.items() if len(uuids) > 1}

    def problem_of(self, device: bytes) -> Optional[str]:
        """Why a device is not what it seems to be; None if it is."""
        words = device.decode("utf-8", "replace").split("/")
        if len(words) == 4 and words[2] in self._groups:
            return f"there are two volume groups '{words[2]}', of which one may be a copy: {_ONE_DISK}"
        if words[-1].startswith("md") and len(words) in (3, 4) and max(self._arrays.values(), default=0) > 1:
            return f"a part of an array is there twice: {_ONE_DISK}"
        whole = self._place.get(device)
        if whole is None:
            return None
        if whole in self._copied:
            return f"there is another with its UUID, of which one is a copy: {_ONE_DISK}"
        first = self._btrfs[whole][0]
        return None if device == first else f"it is a part of the file system on {first.decode('utf-8', 'replace')}"


@contextlib.contextmanager
def _sockets_noted(run_dir: str) -> Iterator[None]:
    """Note where root's libguestfs has its sockets, as soon as it has them: in /tmp, whatever folder it is given."""
    over = threading.Event()

    def look() -> None:
        while not _note_sockets(run_dir) and not over.wait(_LOOK_SECONDS):
            pass

    thread = threading.Thread(target=look, name="sockets")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _note_sockets(run_dir: str) -> bool:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # That of the listing is closed by now, and libguestfs closes others meanwhile.
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as one:
                name = one.getsockname()
            if isinstance(name, str) and _SOCKETS.fullmatch(os.path.dirname(name)):
                os.symlink(os.path.dirname(name), os.path.join(run_dir, _NOTE))
                return True
    return False


def remove_sockets(run_dir: str) -> None:
    """Remove what a process that was killed left in /tmp."""
    with contextlib.suppress(OSError):
        folder = os.readlink(os.path.join(run_dir, _NOTE))
        if _SOCKETS.fullmatch(folder) and os.lstat(folder).st_uid == os.geteuid():
            shutil.rmtree(folder, ignore_errors=True)


def main(request_fd: int, frame_fd: int) -> None:
    """Serve until the requests end. Who started this made sure that it dies with him."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(request_fd, "rb") as requests:
        ApplianceAgent(frame_fd).serve(requests)
