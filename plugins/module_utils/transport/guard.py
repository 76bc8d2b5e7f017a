# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether this machine's own operating system touches a disk that belongs to ESXi hosts or to a virtual machine.

A LUN with a VMFS datastore, or a disk hot-added to the proxy, may only be read by us (VADP facts 29, 34): who mounts,
assembles or formats it destroys what is being backed up. Nothing here writes, and nothing is opened for writing.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from ..datapath.processes import ToolResult, tool_result
from ..errors import DataPathError
from .disk_format import Partition, VolumeGroup, places_of, read_partitions, read_volume_group

Runner = Callable[..., ToolResult]

_PROBE_TIMEOUT = 60
_NOTHING_FOUND = 2
_AMBIVALENT = 8
_VMFS_SIGNATURES = ("VMFS", "VMFS_volume_member")
_FOLDERS_OF_TOOLS = "/usr/sbin:/sbin:/usr/bin:/bin"

# What an ESXi host that boots from a LUN puts beside the datastore there, and the file systems in it.
_ESXI_PARTITIONS: Dict[str, Tuple[str, ...]] = {
    "fc": (),
    "9d275380-40ad-11db-bf97-000c2911d1b8": (),  # core dumps
    "9198effc-31c0-11db-8f78-000c2911d1b8": (),  # reserved by VMware
    "4eb2ea39-7855-4790-a79e-fae495e21f8d": _VMFS_SIGNATURES,  # VMFS-L of the system
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": ("vfat",),  # EFI
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": ("vfat",),  # boot banks
}


@dataclass(frozen=True)
class _Node:
    """The disk, a partition of it, or another name for one of these (a path device's multipath map).

    :param words: how it is named in a reason.
    """

    name: str
    words: str
    path: str
    number: str


def problems(
    device: str,
    *,
    lun: bool = False,
    sysfs_dir: str = "/sys",
    proc_dir: str = "/proc",
    run: Runner = tool_result,
) -> List[str]:
    """Why nobody should go near *device*, a line each; empty if this machine leaves it alone.

    :param device: path of a block device or of a link to one (a plain file is looked at, too).
    :param lun: it is a LUN with a VMFS datastore: anything on it that ESXi did not put there is a reason. Without it,
        it is a virtual machine's disk, which holds that machine's file systems.
    :param run: runs a tool, as :func:`tool_result` does.
    """
    path = os.path.realpath(device)
    if not os.path.exists(path):
        return ["the device is not there"]
    sysfs = Path(sysfs_dir)
    nodes, found = _nodes(path, sysfs)
    found = _mounts(nodes, Path(proc_dir)) + _swaps(nodes, Path(proc_dir)) + found
    try:
        found += _groups_active_here(path, sysfs)
        if lun:
            found += _foreign_signatures(path, run)
    except OSError as error:
        found.append(f"it can't be read to look at it: {error.strerror}")
    return found


def vg_uuid(device: str) -> Optional[str]:
    """UUID of the LVM volume group that *device*, or a partition of it, belongs to; the first one if there are more.

    It is read from LVM's label and metadata, without LVM's tools. None as well if the device can't be read.
    """
    try:
        groups = _volume_groups(device)
    except OSError:
        return None
    return groups[0][1].uuid if groups else None


def is_vmfs(device: str) -> bool:
    """Whether *device* has a partition for VMFS; False as well if it can't be read."""
    try:
        with open(device, "rb") as stream:
            return any(entry.is_vmfs for entry in read_partitions(stream) or ())
    except OSError:
        return False


def is_read_only(device: str, sysfs_dir: str = "/sys") -> Optional[bool]:
    """Whether the kernel refuses writing to *device*, whoever asks; None if it doesn't know the device."""
    text = _text(_folder(Path(sysfs_dir), os.path.basename(os.path.realpath(device))) / "ro")
    return None if text is None else text == "1"


def _folder(sysfs: Path, name: str) -> Path:
    return sysfs / "class" / "block" / name


def _text(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _entries(folder: Path) -> List[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _nodes(path: str, sysfs: Path) -> Tuple[List[_Node], List[str]]:
    """The names under which the disk can be used, and who holds one of them as a part of something else."""
    nodes: List[_Node] = []
    found: List[str] = []
    seen: Set[str] = set()
    waiting = [(os.path.basename(path), "it", path)]
    while waiting:
        name, words, where = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        folder = _folder(sysfs, name)
        nodes.append(_Node(name, words, where, _text(folder / "dev") or ""))
        for entry in _entries(folder):
            if (folder / entry / "partition").is_file():
                waiting.append((entry, f"partition {entry}", os.path.join(os.path.dirname(where), entry)))
        for holder in _entries(folder / "holders"):
            if _is_multipath(holder, sysfs):
                waiting.append((holder, f"multipath device {holder}", f"/dev/{holder}"))
            else:
                found.append(f"{words} is held by {_describe(holder, sysfs)}")
        for loop in _loops_over(where, sysfs):
            waiting.append((loop, f"loop device {loop} on {words}", f"/dev/{loop}"))
            found.append(f"{words} is held by loop device {loop}")
        for group in _entries(sysfs / "fs" / "btrfs"):
            if (sysfs / "fs" / "btrfs" / group / "devices" / name).exists():
                found.append(f"{words} is a device of the mounted btrfs {group}")
    return nodes, found


def _is_multipath(name: str, sysfs: Path) -> bool:
    """A multipath map, or a partition of one, is another name for the disk and no user of it."""
    identity = _text(_folder(sysfs, name) / "dm" / "uuid") or ""
    return re.match(r"(part\d+-)?mpath-", identity) is not None


def _describe(holder: str, sysfs: Path) -> str:
    folder = _folder(sysfs, holder)
    identity = _text(folder / "dm" / "uuid")
    if identity is None:
        return f"software RAID {holder}" if (folder / "md").is_dir() else holder
    kind = {"LVM": "LVM volume", "CRYPT": "encrypted volume"}.get(identity.split("-")[0], "device-mapper's volume")
    return f"{kind} {_text(folder / 'dm' / 'name') or holder} ({holder})"


def _loops_over(path: str, sysfs: Path) -> Iterator[str]:
    for name in _entries(sysfs / "class" / "block"):
        if name.startswith("loop") and _text(_folder(sysfs, name) / "loop" / "backing_file") == path:
            yield name


def _mounts(nodes: Sequence[_Node], proc: Path) -> List[str]:
    found: List[str] = []
    for line in _mount_lines(proc):
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        source = _unescape(fields[fields.index("-", 6) + 2])
        real = os.path.realpath(source) if source.startswith("/") else ""
        for node in nodes:
            if fields[2] == node.number or real == node.path:
                words = f"{node.words} is mounted at {_unescape(fields[4])}"
                if words not in found:
                    found.append(words)
    return found


def _mount_lines(proc: Path) -> Iterator[str]:
    """Mounts of all the mount namespaces that this user may look into: a container's count, too."""
    seen: Set[Optional[str]] = {""}
    for process in ["self", *(name for name in _entries(proc) if name.isdigit())]:
        namespace: Optional[str]
        try:
            namespace = os.readlink(proc / process / "ns" / "mnt")
        except OSError:
            namespace = None if process == "self" else ""
        if namespace in seen:
            continue
        seen.add(namespace)
        yield from (_text(proc / process / "mountinfo") or "").splitlines()


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def _swaps(nodes: Sequence[_Node], proc: Path) -> List[str]:
    lines = (_text(proc / "swaps") or "").splitlines()[1:]
    used = {os.path.realpath(_unescape(line.split()[0])) for line in lines if line.strip()}
    return [f"{node.words} is used as swap space" for node in nodes if node.path in used]


def _volume_groups(device: str) -> List[Tuple[str, VolumeGroup]]:
    found = []
    with open(device, "rb") as stream:
        for words, offset in places_of(stream):
            group = read_volume_group(stream, offset)
            if group:
                found.append((words, group))
    return found


def _groups_active_here(path: str, sysfs: Path) -> List[str]:
    """A proxy made from the same template as a guest, or cloned from it, has a group of the same UUID."""
    active = set()
    for name in _entries(sysfs / "class" / "block"):
        identity = _text(_folder(sysfs, name) / "dm" / "uuid") if name.startswith("dm-") else None
        if identity and identity.startswith("LVM-"):
            active.add(identity[4:36])
    return [
        f"{words} belongs to LVM volume group {group.name} ({group.uuid}), and a group of that UUID is active here"
        for words, group in _volume_groups(path)
        if group.uuid.replace("-", "") in active
    ]


def _foreign_signatures(path: str, run: Runner) -> List[str]:
    """What is on a LUN and was not put there by an ESXi host."""
    with open(path, "rb") as stream:
        entries = read_partitions(stream)
    found = _signature(path, None, "it", (), run)
    if entries is None:
        return found or ["it has no partition table, so no VMFS either: was it initialised by something else?"]
    if not any(entry.is_vmfs for entry in entries):
        kinds = ", ".join(entry.kind for entry in entries) or "none at all"
        found.append(f"no partition of it is for VMFS (types of its partitions: {kinds})")
    for entry in entries:
        words = f"partition {entry.number}"
        if entry.is_vmfs:
            found += _signature(path, entry, words, _VMFS_SIGNATURES, run)
        elif entry.kind in _ESXI_PARTITIONS:
            found += _signature(path, entry, words, _ESXI_PARTITIONS[entry.kind], run)
        else:
            found.append(f"{words} is of type {entry.kind}, which no ESXi host makes on a datastore's LUN")
    return found


def _signature(path: str, entry: Optional[Partition], words: str, allowed: Sequence[str], run: Runner) -> List[str]:
    """Ask ``blkid -p``, which reads the device itself and keeps nothing, what it takes a disk or partition for."""
    tool = shutil.which("blkid") or shutil.which("blkid", path=_FOLDERS_OF_TOOLS) or "blkid"
    argv = [tool, "-p", "-o", "export"]
    if entry is not None:
        argv += ["-O", str(entry.offset), "-S", str(entry.length)]
    try:
        result = run(
            [*argv, path],
            what="Looking for signatures",
            subject=path,
            timeout=_PROBE_TIMEOUT,
            accept=(0, _NOTHING_FOUND, _AMBIVALENT),
        )
    except DataPathError as error:
        return [f"its signatures can't be looked for: {error.reason}"]
    if result.returncode == _AMBIVALENT:
        return [f"{words} carries signatures of more than one kind"]
    facts = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    kind = facts.get("TYPE")
    if kind is None or kind in allowed:
        if entry is not None and "PTTYPE" in facts and kind is None and entry.is_vmfs:
            return [f"{words} carries a partition table ({facts['PTTYPE']}) of its own"]
        return []
    label = f" labelled {facts['LABEL']}" if facts.get("LABEL") else ""
    return [f"{words} carries a signature of {kind}{label}"]
