# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a repository lives (proofs 1): which file system, and which folder in it.

A mount point is not a place: what is mounted there may be missing, or be another file system. A place is told by what
stays the same wherever and however often it is mounted, over restarts too: a network share by its server and export,
a local file system by its UUID (btrfs: and its subvolume's), and the path inside of it, so that bind mounts do not
matter. What can't be identified this way is refused by name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import re
import shutil
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, FrozenSet, Iterator, List, Optional, Sequence

from ..datapath.processes import run_tool
from ..errors import RepositoryError, VadpError
from .shapes import one_of, record, text

NETWORK, LOCAL = "network", "local"

#: File systems of other machines. What mountinfo calls their source names the export.
NETWORK_KINDS = ("nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "lustre", "fuse.sshfs")
#: Those that have a UUID. zfs has a number instead, of the dataset.
LOCAL_KINDS = (
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "zfs",
    "f2fs",
    "bcachefs",
    "jfs",
    "nilfs2",
    "reiserfs",
    "gfs2",
    "ocfs2",
    "vfat",
    "exfat",
    "ntfs3",
    "fuseblk",
)
_EXT = ("ext2", "ext3", "ext4")
# They keep nothing: what is in them is gone with the container, or with the machine.
_FLEETING = ("overlay", "tmpfs", "ramfs", "aufs")
# Mounts of these keep flock to the machine, whatever their options say.
_LOCAL_LOCKS_ALWAYS = ("fuse.sshfs",)
_LOCAL_LOCK_OPTIONS = ("nolock", "nobrl", "localflock", "localflocks", "lockproto=lock_nolock")

MOUNTINFO = "/proc/self/mountinfo"
PRODUCT_UUID = "/sys/class/dmi/id/product_uuid"
MACHINE_ID = "/etc/machine-id"
BY_UUID = "/dev/disk/by-uuid"

# Requests of linux/fs.h, ext4.h, xfs_fs.h and btrfs.h: none needs a privilege.
_FS_IOC_GETFSUUID = 0x80111500
_EXT4_IOC_GETFSUUID = 0x8008662C
_XFS_IOC_FSGEOMETRY_V1 = 0x80705864
_BTRFS_IOC_FS_INFO = 0x8400941F
_BTRFS_IOC_GET_SUBVOL_INFO = 0x81F8943C

_ESCAPE = re.compile(r"\\([0-7]{3})")
_HOST = re.compile(r"(?P<nfs>.+?:(?=/))|(?P<smb>//[^/]+)")
_NO_UUID = bytes(16)
_FSID = "fsid-"

SHAPE = record(
    {
        "filesystem": record({"kind": one_of(NETWORK, LOCAL), "identity": text()}),
        "path": text(r"/(?s:.*)"),
        "machine": text(empty=True),
    }
)


@dataclass(frozen=True)
class Place:
    """A folder of a file system.

    :param identity: ``server:/export``, or a UUID, or where no UUID can be had ``fsid-<16 hex digits>``.
    :param path: inside the file system, absolute.
    :param machine: by which it was written last; see :func:`this_machine`. Empty if that is not known.
    """

    kind: str
    identity: str
    path: str
    machine: str = ""

    def is_same(self, other: Place) -> bool:
        """Whether it is the same folder; which machine sees it does not matter."""
        if (self.kind, self.path) != (other.kind, other.path):
            return False
        if self.identity == other.identity:
            return True
        if not (self.identity.startswith(_FSID) or other.identity.startswith(_FSID)):
            return False
        number = _fsid_in(self.identity)
        return number is not None and number == _fsid_in(other.identity)

    def to_json(self) -> Dict[str, Any]:
        """As it stands in repository.json."""
        return {
            "filesystem": {"kind": self.kind, "identity": self.identity},
            "path": self.path,
            "machine": self.machine,
        }

    @classmethod
    def from_json(cls, data: Dict[str, Any]) -> Place:
        """From what :data:`SHAPE` has accepted."""
        return cls(data["filesystem"]["kind"], data["filesystem"]["identity"], data["path"], data["machine"])

    def __str__(self) -> str:
        what = "file system" if self.kind == LOCAL else "share"
        return f"{self.path} of the {what} {self.identity}"


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo. :param root: the path inside the file system that is seen at *point*."""

    number: int
    device: str
    root: str
    point: str
    kind: str
    source: str
    options: FrozenSet[str]

    @property
    def local_locks(self) -> Optional[str]:
        """What keeps its locks to this machine; None if they hold for all, as far as can be told (proofs 5)."""
        if self.kind in _LOCAL_LOCKS_ALWAYS:
            return f"{self.kind} knows no locks of other machines"
        for option in sorted(self.options):
            name, equals, value = option.partition("=")
            if option in _LOCAL_LOCK_OPTIONS or (name == "local_lock" and equals and value != "none"):
                return f"it is mounted with {option}"
        return None


class UnknownPlace(RepositoryError):
    """Where a folder lies can't be determined by anything that lasts."""


def mounts(mountinfo: Optional[str] = None) -> List[Mount]:
    """What is mounted, the uppermost last.

    :param mountinfo: the text of /proc/self/mountinfo.
    """
    if mountinfo is None:
        mountinfo = Path(MOUNTINFO).read_bytes().decode("utf-8", "surrogateescape")
    found = []
    for line in mountinfo.splitlines():
        front, dash, back = line.partition(" - ")
        before, after = front.split(" "), back.split(" ")
        if not dash or len(before) < 6 or len(after) < 3:
            continue
        options = [*before[5].split(","), *after[2].split(",")]
        root, point, source = (_unescaped(text_) for text_ in (before[3], before[4], after[1]))
        found.append(Mount(int(before[0]), before[2], root, point, after[0], source, frozenset(options)))
    return found


def _unescaped(escaped: str) -> str:
    # The kernel writes blanks, line ends and backslashes in octal, all else as it is.
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 8)), escaped)


def mount_of(path: str) -> Mount:
    """The mount that a folder is on: the kernel's word, not the longest mount point.

    :raises UnknownPlace: /proc does not say.
    """
    descriptor = _open(path)
    try:
        return _mount_at(descriptor, path)
    finally:
        os.close(descriptor)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unknown(path, f"it can't be opened: {error.strerror}") from None


def _mount_at(descriptor: int, path: str) -> Mount:
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
        number = int(re.findall(r"^mnt_id:\s*([0-9]+)$", facts, re.MULTILINE)[0])
        return next(mount for mount in mounts() if mount.number == number)
    except (OSError, IndexError, StopIteration):
        raise _unknown(path, "/proc does not say what is mounted there") from None


def _unknown(path: str, reason: str) -> UnknownPlace:
    return UnknownPlace(
        "It can't be determined which file system the repository is on",
        subject=path,
        reason=reason,
        remedy="Keep the repository on a file system that has an identity of its own, such as ext4, XFS, btrfs or NFS,"
        " in a container as a volume of that",
    )


def place_of(path: str) -> Place:
    """The place of a folder, as this machine sees it.

    :raises UnknownPlace: it is on overlay or tmpfs, or on a file system that is not known to have an identity.
    """
    real = os.path.realpath(path)
    descriptor = _open(real)
    try:
        mount = _mount_at(descriptor, path)
        inside = _path_inside(mount, real, path)
        kind = NETWORK if mount.kind in NETWORK_KINDS else LOCAL
        return Place(kind, _identity(mount, descriptor, path), inside, this_machine())
    finally:
        os.close(descriptor)


def _path_inside(mount: Mount, real: str, path: str) -> str:
    if mount.root.endswith("//deleted"):
        raise _unknown(path, "the folder that is mounted there was removed")
    below = os.path.relpath(real, mount.point)
    if below == os.pardir or below.startswith(os.pardir + os.sep):
        raise _unknown(path, f"what is mounted at {mount.point} is not above it")
    inside = posixpath.normpath(posixpath.join(mount.root, below))
    try:
        inside.encode("utf-8")
    except UnicodeEncodeError:
        raise _unknown(repr(path), "the path is not UTF-8, so it can't be written down") from None
    # POSIX keeps two leading slashes apart.
    return "/" + inside.lstrip("/")


def _identity(mount: Mount, descriptor: int, path: str) -> str:
    if mount.kind in _FLEETING:
        raise _unknown(path, f"it is on {mount.kind}, which is gone with the container or the machine")
    if mount.kind in NETWORK_KINDS:
        return _share(mount.source)
    if mount.kind not in LOCAL_KINDS:
        raise _unknown(path, f"{mount.kind} is not known to have an identity")
    if mount.kind == "zfs":
        # The number of the dataset, made with it and kept by the pool.
        return f"{_FSID}{os.fstatvfs(descriptor).f_fsid:016x}"
    found = _uuid_by_ioctl(mount, descriptor) or _uuid_by_udev(mount) or _uuid_by_blkid(mount)
    if found is None and mount.kind in _EXT:
        found = f"{_FSID}{os.fstatvfs(descriptor).f_fsid:016x}"
    if found is None:
        raise _unknown(path, f"the UUID of the {mount.kind} at {mount.point} can't be read by user {os.geteuid()}")
    if mount.kind == "btrfs":
        # A snapshot that takes the place of its origin is another subvolume.
        found = f"{found}/{_subvolume(descriptor, path)}"
    return found


def _share(source: str) -> str:
    """Hosts are the same in upper and lower case, exports and shares are not."""
    host = _HOST.match(source)
    if host is not None:
        source = host.group().lower() + source[host.end() :]
    stripped = source.rstrip("/")
    return source if stripped.endswith(":") or not stripped else stripped


def _uuid_by_ioctl(mount: Mount, descriptor: int) -> Optional[str]:
    data = _ioctl(descriptor, _FS_IOC_GETFSUUID, bytes(17))
    if data is not None and data[0] == 16 and data[1:17] != _NO_UUID:
        return str(uuid.UUID(bytes=data[1:17]))
    found = None
    if mount.kind == "ext4":
        data = _ioctl(descriptor, _EXT4_IOC_GETFSUUID, struct.pack("=II16x", 16, 0))
        found = None if data is None else data[8:24]
    elif mount.kind == "xfs":
        data = _ioctl(descriptor, _XFS_IOC_FSGEOMETRY_V1, bytes(112))
        found = None if data is None else data[64:80]
    elif mount.kind == "btrfs":
        data = _ioctl(descriptor, _BTRFS_IOC_FS_INFO, bytes(1024))
        found = None if data is None else data[16:32]
    return None if not found or found == _NO_UUID else str(uuid.UUID(bytes=found))


def _subvolume(descriptor: int, path: str) -> str:
    data = _ioctl(descriptor, _BTRFS_IOC_GET_SUBVOL_INFO, bytes(504))
    if data is None:
        raise _unknown(path, "the kernel does not say which subvolume of btrfs it is in")
    return str(uuid.UUID(bytes=data[296:312]))


def _ioctl(descriptor: int, request: int, argument: bytes) -> Optional[bytes]:
    buffer = bytearray(argument)
    try:
        fcntl.ioctl(descriptor, request, buffer)
    except OSError:
        return None  # this kernel, or this file system, does not know the request
    return bytes(buffer)


def _uuid_by_udev(mount: Mount) -> Optional[str]:
    try:
        names = os.listdir(BY_UUID)
    except OSError:
        return None
    for name in sorted(names):
        try:
            device = os.stat(os.path.join(BY_UUID, name)).st_rdev
        except OSError:
            continue
        if f"{os.major(device)}:{os.minor(device)}" == mount.device:
            return name.lower()
    return None


def _uuid_by_blkid(mount: Mount) -> Optional[str]:
    """For who may read the device, where no udev runs."""
    program = shutil.which("blkid", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    try:
        device = os.stat(mount.source).st_rdev
    except OSError:
        return None
    if program is None or f"{os.major(device)}:{os.minor(device)}" != mount.device:
        return None
    command = [program, "-p", "-o", "value", "-s", "UUID", "--", mount.source]
    try:
        return run_tool(command, what="The UUID can't be read", timeout=60).strip().lower() or None
    except VadpError:
        return None


def _fsid_in(identity: str) -> Optional[int]:
    """The number that ext4 tells everybody: a UUID's two halves, one upon the other."""
    try:
        if identity.startswith(_FSID):
            return int(identity[len(_FSID) :], 16)
        first, second = struct.unpack("<QQ", uuid.UUID(identity).bytes)
    except ValueError:
        return None
    return int(first ^ second)


# The machine


def this_machine() -> str:
    """What this machine is known by, as hashes: ``dmi:<hex> id:<hex>``, or the one of them that can be read.

    The DMI's UUID is root's to read, and containers have no machine ID of their own. Both are nobody else's
    business, so neither stands in a repository as it is.
    """
    words = []
    for name, path in (("dmi", PRODUCT_UUID), ("id", MACHINE_ID)):
        try:
            found = Path(path).read_text(encoding="ascii").strip().lower()
        except (OSError, ValueError):
            continue
        if found and found != "uninitialized":
            words.append(f"{name}:{hashlib.sha256(b'openvadp.backup ' + found.encode()).hexdigest()[:32]}")
    return " ".join(words)


def is_other_machine(one: str, other: str) -> Optional[bool]:
    """Whether two notes of :func:`this_machine` are of different machines; None if that can't be determined."""
    known = dict(word.partition(":")[::2] for word in one.split())
    others = dict(word.partition(":")[::2] for word in other.split())
    for name in ("dmi", "id"):
        if name in known and name in others:
            return known[name] != others[name]
    return None


# Places that a repository lists


def find(place: Place, listed: Sequence[Place]) -> Optional[Place]:
    """The entry of a repository's list that is this very place."""
    return next((entry for entry in listed if entry.is_same(place)), None)


def seen_here(place: Place) -> Iterator[str]:
    """The paths by which this machine sees a place, if it is mounted; that there is anything is not looked at."""
    for mount in reversed(mounts()):
        wanted = NETWORK_KINDS if place.kind == NETWORK else LOCAL_KINDS
        below = posixpath.relpath(place.path, mount.root)
        if mount.kind not in wanted or below == os.pardir or below.startswith(os.pardir + "/"):
            continue
        path = os.path.normpath(os.path.join(mount.point, below))
        if place.kind == NETWORK and _share(mount.source) != place.identity:
            continue  # whoever asks a server that is not meant may wait for it
        try:
            if place_of(path).is_same(place):
                yield path
        except UnknownPlace:
            continue
