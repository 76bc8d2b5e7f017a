# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the world looks like before and after a module, for end-to-end tests of what must touch nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from client import Control

# What ends with the module may take a moment to be gone.
PATIENCE_SECONDS = 2


class Evidence:
    """Files, snapshots, calls and processes.

    :param watched: the folder whose every change is seen.
    :param temporary: TMPDIR of the modules, and of nobody else.
    """

    def __init__(self, control: Control, watched: Path, temporary: Path) -> None:
        self._control = control
        self._watched = watched
        self._temporary = temporary

    @property
    def environment(self) -> Dict[str, str]:
        """What the modules have to be started with; their processes inherit it."""
        return {"TMPDIR": str(self._temporary)}

    def around(self, work: Callable[[], Any]) -> Dict[str, Any]:
        """Do *work*: {before, after, changing}, the last being the calls to vCenter that changed something."""
        before = self._picture()
        since = max((call["seq"] for call in self._control.call("calls")), default=0)
        work()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        # A call that was refused changed nothing.
        calls = self._control.call("calls", since=since)
        changing = [call["method"] for call in calls if call["changing"] and not call["fault"]]
        return {"before": before, "after": self._picture(), "changing": changing}

    def _picture(self) -> Dict[str, Any]:
        state = self._control.call("state")
        return {
            "files": self._files(),
            "temporary": self._temporary_files(),
            "processes": self._processes(),
            "vms": state["vms"],
            "sessions": len(state["sessions"]),
        }

    def _files(self) -> Dict[str, List[Any]]:
        """{path: [mode, size, time of the last change]} of files and folders; of a link its target, not its size."""
        found: Dict[str, List[Any]] = {}
        for folder, folders, files in os.walk(self._watched):
            for path in [os.path.join(folder, name) for name in folders + files]:
                status = os.lstat(path)
                size = os.readlink(path) if os.path.islink(path) else status.st_size
                found[path] = [status.st_mode, size, status.st_mtime_ns]
        return found

    def _temporary_files(self) -> List[str]:
        """What lies where modules have their temporary files and their sockets."""
        sockets = f"/run/user/{os.geteuid()}"
        others = os.listdir(sockets) if os.path.isdir(sockets) else []
        return sorted(os.listdir(self._temporary) + [name for name in others if name.startswith("openvadp-")])

    def _processes(self) -> List[List[Any]]:
        """[pid, command line] of the processes that modules started."""
        mark = f"TMPDIR={self._temporary}".encode()
        found: List[List[Any]] = []
        for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue  # it ended meanwhile, or it is somebody else's
            if mark in environment.split(b"\0") and command:
                found.append([int(pid), command])
        return found
