# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Build the libvixDiskLib test double."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PROJECT = _HERE.parents[2]


class BuildError(Exception):
    """The double can't be built; the message has make's words."""


def build() -> Path:
    """Make the double if it is out of date. -> the ``libdir`` for nbdkit: it holds ``lib64/libvixDiskLib.so.8``."""
    folder = _PROJECT / "build" / "vddk"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        if (folder / "lib64" / "libvixDiskLib.so.8").exists():
            return folder  # another user's project, where it has been built
        folder = Path(tempfile.gettempdir()) / f"openvadp-vddk-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise BuildError(f"{folder} belongs to somebody else")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = ["make", "-s", "-C", str(_HERE), f"OUT={folder}"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return folder
