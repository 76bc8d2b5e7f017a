# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the world looks like before and after a task, for end-to-end tests of what must touch nothing.

Only tasks whose names begin with "case " are looked at. Ansible calls a callback before it starts a task and after the
task has ended, so nothing else of the play runs meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from ansible.plugins.callback import CallbackBase

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "simulator"))

from client import Control  # noqa: E402

DOCUMENTATION = r"""
name: evidence
type: notification
short_description: Files, snapshots, calls and processes around each case, as JSON lines
description:
  - Used by the end-to-end tests only. E2E_EVIDENCE is the file to write, E2E_WATCH the folders to look at (separated by
    colons), E2E_CONTROL the simulator's control socket.
requirements: [enabled in the configuration]
"""

# What ends with the module may take a moment to be gone.
PATIENCE_SECONDS = 2


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "evidence"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self):
        super().__init__()
        self._control = Control(os.environ["E2E_CONTROL"])
        self._before = {}

    def v2_playbook_on_task_start(self, task, is_conditional):
        if task.get_name().startswith("case "):
            self._before = self._picture()

    def v2_runner_on_ok(self, result):
        self._after(result)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._after(result)

    def _after(self, result):
        name = result._task.get_name()
        if not name.startswith("case "):
            return
        deadline = time.monotonic() + PATIENCE_SECONDS
        while _processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        after = self._picture()
        calls = self._control.call("calls", since=self._before.pop("seq"))
        after.pop("seq")
        # A call that was refused changed nothing.
        changing = [call["method"] for call in calls if call["changing"] and not call["fault"]]
        with open(os.environ["E2E_EVIDENCE"], "a", encoding="utf-8") as file:
            line = {"task": name, "before": self._before, "after": after, "changing": changing}
            file.write(json.dumps(line, default=str) + "\n")

    def _picture(self):
        state = self._control.call("state")
        return {
            "files": _files(),
            "temporary": _temporary(),
            "processes": _processes(),
            "vms": state["vms"],
            "sessions": len(state["sessions"]),
            "seq": max((call["seq"] for call in self._control.call("calls")), default=0),
        }


def _files():
    """{path: [mode, size, time of the last change]} of files and folders; of a link its target, not its size."""
    found = {}
    for root in os.environ["E2E_WATCH"].split(":"):
        for folder, folders, files in os.walk(root):
            for path in [os.path.join(folder, name) for name in folders + files]:
                status = os.lstat(path)
                size = os.readlink(path) if os.path.islink(path) else status.st_size
                found[path] = [status.st_mode, size, status.st_mtime_ns]
    return found


def _temporary():
    """What lies where modules have their temporary files and their sockets. TMPDIR is this play's own."""
    sockets = f"/run/user/{os.geteuid()}"
    others = [name for name in os.listdir(sockets) if name.startswith("openvadp-")] if os.path.isdir(sockets) else []
    return sorted(os.listdir(os.environ["TMPDIR"]) + others)


def _processes():
    """[pid, command line] of the processes that modules of this play started: they all inherit its environment."""
    mark = f"E2E_EVIDENCE={os.environ['E2E_EVIDENCE']}".encode()
    found = []
    for pid in [name for name in os.listdir("/proc") if name.isdigit()]:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue  # it ended meanwhile, or it is somebody else's
        if mark in environment.split(b"\0") and command and "ansible-playbook" not in command:
            found.append([int(pid), command])
    return found
