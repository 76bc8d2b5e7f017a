# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The disks of a proxy: which are its own, which belong to ESXi hosts or to virtual machines, and who touches these."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from ..datapath.processes import tool_result
from . import guard
from .disk_format import read_volume_group

# Not disks, or only another view of one.
_OTHER = re.compile(r"(loop|ram|zram|dm-|md|sr|fd|nbd|mtdblock)\d")
_NO_VOLUME = re.compile(r"(loop|ram|zram|sr|fd)\d")


@dataclass
class DiskHere:
    """One disk of this machine.

    :param names: what it is called in *device_dir*, without partitions.
    :param wwid: its world-wide name as the kernel has it (``naa.6000c29...``).
    :param virtual: it is a disk that VMware emulates, so one of this virtual machine.
    :param lun: it carries VMFS, or was named as a LUN that should.
    :param in_use: what this machine uses it for.
    :param problems: why a LUN must not be touched; always empty for other disks.
    """

    device: str
    names: List[str]
    wwid: Optional[str]
    virtual: bool
    lun: bool
    read_only: Optional[bool]
    in_use: List[str] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)

    def to_result(self) -> Dict[str, Any]:
        return asdict(self)


def disks_here(
    luns: Sequence[str],
    *,
    device_dir: str = "/dev/disk/by-id",
    sysfs_dir: str = "/sys",
    proc_dir: str = "/proc",
    dev_dir: str = "/dev",
    run: guard.Runner = tool_result,
) -> List[DiskHere]:
    """All disks of this machine, and of LUNs what is wrong with them.

    :param luns: LUNs that hold a VMFS datastore, by the name of the datastore's extent (``naa.600...``) or by a path:
        one that lost its VMFS is known by this only. A path is looked at wherever it points to; a name that this
        machine does not see is passed over.
    """
    links = _links(device_dir)
    devices = {
        str(Path(dev_dir) / name)
        for name in _names(Path(sysfs_dir) / "class" / "block")
        if not _OTHER.match(name) and not (Path(sysfs_dir) / "class" / "block" / name / "partition").exists()
    }
    wanted = {_plain(lun) for lun in luns if not lun.startswith("/")}
    expected = {os.path.realpath(lun) for lun in luns if lun.startswith("/")}
    expected |= {path for path, names in links.items() if wanted & {_plain(name) for name in names}}
    found = []
    for device in sorted(devices | expected):
        names = links.get(os.path.realpath(device), [])
        wwid = _wwid(Path(sysfs_dir), os.path.basename(device))
        lun = os.path.realpath(device) in expected or _plain(wwid or "") in wanted or guard.is_vmfs(device)
        disk = DiskHere(
            device=device,
            names=names,
            wwid=wwid,
            virtual=_is_virtual(Path(sysfs_dir), os.path.basename(device)),
            lun=lun,
            read_only=guard.is_read_only(device, sysfs_dir),
            in_use=guard.uses(device, sysfs_dir=sysfs_dir, proc_dir=proc_dir),
        )
        if lun:
            disk.problems = guard.problems(device, lun=True, sysfs_dir=sysfs_dir, proc_dir=proc_dir, run=run)
        found.append(disk)
    return found


def own_volumes(*, sysfs_dir: str = "/sys", dev_dir: str = "/dev") -> List[Dict[str, str]]:
    """The LVM physical volumes of the groups that are active here: {device, uuid, group}."""
    active = guard.active_groups(sysfs_dir)
    found = []
    for name in _names(Path(sysfs_dir) / "class" / "block"):
        if not active or _NO_VOLUME.match(name):
            continue
        try:
            with (Path(dev_dir) / name).open("rb") as stream:
                group = read_volume_group(stream)
        except OSError:
            continue
        if group and group.uuid.replace("-", "") in active:
            found.append({"device": f"{dev_dir}/{name}", "uuid": group.physical_volume, "group": group.name})
    return found


def arrays_here(sysfs_dir: str = "/sys") -> List[str]:
    """The software RAID arrays that run on this machine (``md0``)."""
    block = Path(sysfs_dir) / "class" / "block"
    return [name for name in _names(block) if (block / name / "md").is_dir()]


def _names(folder: Path) -> List[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _plain(name: str) -> str:
    """The hexadecimal digits that ``naa.600...``, ``wwn-0x600...`` and ``scsi-3600...`` have in common."""
    match = re.match(r"(?:naa\.|wwn-0x|scsi-3|dm-uuid-mpath-3)([0-9a-f]{16}(?:[0-9a-f]{16})?)$", name.lower())
    return match.group(1) if match else name


def _links(device_dir: str) -> Dict[str, List[str]]:
    found: Dict[str, List[str]] = {}
    for name in _names(Path(device_dir)):
        if not re.search(r"-part\d+$", name):
            found.setdefault(os.path.realpath(os.path.join(device_dir, name)), []).append(name)
    return found


def _wwid(sysfs: Path, name: str) -> Optional[str]:
    folder = sysfs / "class" / "block" / name
    for path in (folder / "device" / "wwid", folder / "wwid"):
        try:
            return path.read_text(encoding="ascii", errors="replace").strip() or None
        except OSError:
            continue
    return None


def _is_virtual(sysfs: Path, name: str) -> bool:
    words = []
    for attribute in ("vendor", "model"):
        try:
            text = (sysfs / "class" / "block" / name / "device" / attribute).read_text(
                encoding="ascii", errors="replace"
            )
        except OSError:
            continue
        words.append(text.strip())
    return any(word.startswith("VMware") for word in words)
