# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The files that keep a proxy's system away from disks of others: whether udev, multipathd and the initramfs have them.

Files alone protect nothing. A reload that failed or got lost is made up for by the next run.
"""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence

from ..datapath.in_force import DIRECTORY, Taken
from ..datapath.processes import run_tool

_TIMEOUT = 900


@dataclass(frozen=True)
class Files:
    """Paths of the files of each service, whether or not they are there."""

    udev: Sequence[str]
    multipath: Sequence[str]
    initramfs: Sequence[str]


@dataclass(frozen=True)
class Machine:
    """Where a machine has what is asked here."""

    udev_control: str = "/run/udev/control"
    multipathd: str = "/run/multipathd.pid"
    images: Sequence[str] = ("/boot/initrd.img-*", "/boot/initramfs-*.img")
    kept: str = DIRECTORY


def ensure(files: Files, unprotected: Sequence[str], check_mode: bool, machine: Optional[Machine] = None) -> List[str]:
    """Let each service that lacks the files take them. -> what was not in force, in words

    :param unprotected: disks that the rules should have made read-only, and did not.
    :raises DataPathError: a service refuses them.
    """
    place = machine or Machine()
    reasons = _udev(files, unprotected, check_mode, place)
    reasons += _multipath(files, check_mode, place)
    return reasons + _initramfs(files, check_mode, place)


def _udev(files: Files, unprotected: Sequence[str], check_mode: bool, machine: Machine) -> List[str]:
    if not os.path.exists(machine.udev_control):
        return []  # a container
    taken = Taken("udev", files.udev, machine.kept)
    reasons = [f"udev did not make {', '.join(unprotected)} read-only"] if unprotected else []
    if not taken.current():
        reasons.append("udev is not known to have applied its rules")
    if reasons and not check_mode:
        what = "The rules for disks of others are not in force"
        run_tool(["udevadm", "control", "--reload"], what=what, timeout=_TIMEOUT)
        run_tool(["udevadm", "trigger", "--subsystem-match=block", "--action=change"], what=what, timeout=_TIMEOUT)
        taken.keep()
    return reasons


def _multipath(files: Files, check_mode: bool, machine: Machine) -> List[str]:
    taken = Taken("multipath", files.multipath, machine.kept)
    if not os.path.exists(machine.multipathd) or taken.current():
        return []
    if not check_mode:
        what = "The configuration of multipathd is not in force"
        run_tool(["multipathd", "reconfigure"], what=what, timeout=_TIMEOUT)
        taken.keep()
    return ["multipathd is not known to have read its configuration"]


def _initramfs(files: Files, check_mode: bool, machine: Machine) -> List[str]:
    """An image has copies of the files: one that is older than they are has others."""
    commands = (["update-initramfs", "-u"], ["dracut", "--force"])
    command = next((one for one in commands if shutil.which(one[0])), None)
    if command is None:
        return []  # no image is made here
    # Also of a file that was taken away: its folder has changed then.
    changed = max((_changed(path) for path in files.initramfs), default=0.0)
    images = [path for pattern in machine.images for path in glob.glob(pattern)]
    newest = max((os.stat(path).st_mtime for path in images), default=None)
    taken = Taken("initramfs", files.initramfs, machine.kept)
    # Where there is no image to look at, it is only known from the command that went well.
    if newest >= changed if newest is not None else taken.current():
        return []
    if not check_mode:
        run_tool(command, what="The initramfs was not made again, which has copies of the files", timeout=_TIMEOUT)
        taken.keep()
    return ["the initramfs is older than the files that it has copies of"]


def _changed(path: str) -> float:
    """When a file became what it is, in seconds since 1970; of one that is not there, when its folder changed."""
    for place in (Path(path), Path(path).parent):
        if place.exists():
            return place.stat().st_ctime
    return 0.0
