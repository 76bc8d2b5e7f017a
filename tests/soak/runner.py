# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Runs of the product in processes of their own, which are counted and killed by ``crashpoint.c``.

A run must begin fast, so one process, preloaded with the library, imports everything and forks for each run::

    test -- server (preloaded) -- keeper, one a run -- module (what Ansible would start) -- nbdkit, qemu-nbd, qemu-img

The keeper is a subreaper: whatever a dead module leaves becomes its child, so it sees when the last process of the run
has ended, whatever that process did to its session, group or environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# struct shared of crashpoint.c
_SHARED = struct.Struct("=QQQQii32s32s")
_PR_SET_CHILD_SUBREAPER = 36


def build_library() -> Path:
    """The preload library, made if it is out of date."""
    library = ROOT / "build" / "soak" / "crashpoint.so"
    source = HERE / "crashpoint.c"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        subprocess.run(["gcc", *flags, "-o", str(part), str(source), "-ldl"], check=True)
        part.rename(library)
    return library


class CrashPoint:
    """The file that the processes of a run share: what was counted, and where one of them is to be killed."""

    def __init__(self, path: Path, kill_at: int = 0, kill_child_at: int = 0) -> None:
        self.path = path
        path.write_bytes(_SHARED.pack(0, 0, kill_at, kill_child_at, 0, 0, b"", b""))

    @property
    def _fields(self) -> Any:
        return _SHARED.unpack(self.path.read_bytes())

    @property
    def calls(self) -> int:
        """All calls that were counted."""
        return int(self._fields[0])

    @property
    def child_calls(self) -> int:
        """Those of them that the module did not make itself."""
        return int(self._fields[1])

    @property
    def killed(self) -> bool:
        return self._fields[5] != 0

    @property
    def program(self) -> str:
        """Which program made the call that did not come about."""
        return str(self._fields[7].rstrip(b"\0").decode())

    def __str__(self) -> str:
        calls, child_calls, kill_at, kill_child_at, unused_module, killed, before, program = self._fields
        names = [text.rstrip(b"\0").decode() for text in (before, program)]
        where = f"call {kill_at} of all" if kill_at else f"call {kill_child_at} of the children"
        if not killed:
            return f"not killed ({calls} calls, {child_calls} of children; {where} was meant)"
        return f"killed before {where}, {names[0]} of {names[1]}"


@dataclass
class Result:
    """How a run ended: ``status`` as of waitpid; the action's value, or its error (None if it was killed)."""

    status: int
    value: Any = None
    error: Optional[Dict[str, Any]] = None

    @property
    def was_killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


@dataclass
class Run:
    """One run on its way."""

    point: CrashPoint
    result_path: Path
    keeper: int = 0
    events: "queue.Queue[Dict[str, Any]]" = field(default_factory=queue.Queue)
    _alone: Optional[float] = None

    def result(self, timeout: float = 120) -> Result:
        """Wait for the end of the module. :raises RuntimeError: a defect, with its traceback."""
        event = self.events.get(timeout=timeout)
        result = Result(event["status"])
        if self.result_path.exists():
            kept = json.loads(self.result_path.read_text(encoding="utf-8"))
            if "defect" in kept:
                raise RuntimeError(kept["defect"])
            result.value, result.error = kept.get("value"), kept.get("error")
        elif not result.was_killed:
            raise RuntimeError(f"the module ended with status {event['status']}")
        return result

    def wait_until_alone(self, timeout: float = 10) -> float:
        """Wait until no process of the run lives; seconds since the module's end. Call it after :meth:`result`.

        :raises AssertionError: some live on; they are named, and killed.
        """
        if self._alone is None:
            try:
                self._alone = self.events.get(timeout=timeout)["seconds"]
            except queue.Empty:
                alive = descendants(self.keeper)
                for pid in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{timeout:g} s after the end these processes lived: {alive}") from None
        assert self._alone <= timeout, f"the last process ended {self._alone:.1f} s after the module"
        return self._alone


class Server:
    """The client's side: starts the preloaded process and runs in it. Safe for threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._runs: Dict[int, Run] = {}
        self._lock = threading.Lock()
        environment = dict(os.environ, LD_PRELOAD=str(build_library()), PYTHONUNBUFFERED="1")
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT / "build" / "tree")])
        self._log = (folder / "runner.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "runner.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=str(folder),
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self._process.wait(30)
            raise RuntimeError(f"the server of runs did not start:\n{self.log_tail()}")
        threading.Thread(target=self._dispatch, daemon=True).start()

    def log_tail(self) -> str:
        return (self.folder / "runner.log").read_text(errors="replace")[-4000:]

    def _dispatch(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            with self._lock:
                run = self._runs[event["run"]]
            if "keeper" in event:
                run.keeper = event["keeper"]
            else:
                run.events.put(event)

    def start(
        self, job: Any, action: str, tmpdir: Path, kill_at: int = 0, kill_child_at: int = 0, **arguments: Any
    ) -> Run:
        """Begin a run.

        :param job: a :class:`role.Job`; *action* is one of its methods, called with *arguments*.
        :param tmpdir: the run's TMPDIR.
        :param kill_at: kill the module before this call of all processes.
        :param kill_child_at: kill a child before this call of all children.
        """
        with self._lock:
            self._count += 1
            number = self._count
            name = self.folder / f"run-{number}"
            run = Run(CrashPoint(name.with_suffix(".shared"), kill_at, kill_child_at), name.with_suffix(".json"))
            self._runs[number] = run
            order = {
                "run": number,
                "job": job.to_json(),
                "action": action,
                "arguments": arguments,
                "tmpdir": str(tmpdir),
                "shared": str(run.point.path),
                "result": str(run.result_path),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        return run

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()


def descendants(pid: int) -> Dict[int, str]:
    """All processes below a process, with their command lines."""
    parents: Dict[int, int] = {}
    lines: Dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if stat[0] in "ZX":
                    continue
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                parents[int(folder.name)], lines[int(folder.name)] = int(stat[1]), line.strip()
    found: Dict[int, str] = {}
    waiting: List[int] = [pid]
    while waiting:
        parent = waiting.pop()
        for child, above in parents.items():
            if above == parent and child not in found:
                found[child] = lines[child]
                waiting.append(child)
    return found


# The server's side


def _say(**event: Any) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")  # short, so it is written at once


def _be_module(order: Dict[str, Any]) -> None:
    """What Ansible would start as a module. Never returns."""
    import traceback

    from ansible_collections.openvadp.backup.plugins.module_utils.errors import VadpError
    from role import Job

    os.environ.update(TMPDIR=order["tmpdir"], CRASHPOINT_FILE=order["shared"])
    tempfile.tempdir = None
    with open(order["shared"], "r+b") as shared:
        shared.seek(32)
        shared.write(struct.pack("=i", os.getpid()))
    if ctypes.CDLL(None).crashpoint_attach(order["shared"].encode()) != 0:
        os._exit(3)
    kept: Dict[str, Any] = {}
    try:
        kept["value"] = getattr(Job(**order["job"]), order["action"])(**order["arguments"])
    except VadpError as error:
        kept["error"] = dict(error.to_result(), msg=str(error))
    except BaseException:  # noqa: BLE001  a fork of the server must not go on as the server
        kept["defect"] = traceback.format_exc()
    part = order["result"] + ".part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(kept, file, default=str)
    os.rename(part, order["result"])
    os._exit(0)


def _be_keeper(order: Dict[str, Any]) -> None:
    """Wait for the module, then for all it left. Never returns."""
    os.close(0)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    module = os.fork()
    if module == 0:
        _be_module(order)
    _say(run=order["run"], keeper=os.getpid())
    ended = time.monotonic()
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == module:
                ended = time.monotonic()
                _say(run=order["run"], status=status)
    _say(run=order["run"], seconds=time.monotonic() - ended)
    os._exit(0)


def main() -> None:
    import role  # noqa: F401  everything is imported before the first fork

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _be_keeper(json.loads(line))


if __name__ == "__main__":
    main()
