# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The modules as processes of their own, as Ansible starts them, for tests that run many of them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from harness import ROOT, Ansible, Backups, Simulator


class Process:
    """A module that was started."""

    def __init__(self, server: Server, pid: int, files: str) -> None:
        self.pid = pid
        self._server = server
        self._files = files
        self._status: Optional[int] = None

    def poll(self) -> Optional[int]:
        """The exit code, negative for a signal; None as long as it runs."""
        if self._status is None:
            self._status = self._server.ask(pid=self.pid)["status"]
        return self._status

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"the module did not end: {self.err}"
            time.sleep(0.01)
        assert self._status is not None
        return self._status

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    @property
    def out(self) -> str:
        return Path(self._files + ".out").read_text(encoding="utf-8").strip()

    @property
    def err(self) -> str:
        return Path(self._files + ".err").read_text(encoding="utf-8")


class Server:
    """The process of module_server.py, for one run of the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(ROOT / ".venv" / "bin" / "python"), str(Path(__file__).with_name("module_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "build" / "tree")},
        )
        self.pid = self._process.pid
        atexit.register(self.stop)

    def ask(self, **request: Any) -> Dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: Dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self, module: str, options: Dict[str, Any], folder: Path, environment: Optional[Dict[str, str]] = None
    ) -> Process:
        with tempfile.NamedTemporaryFile("w", prefix=f"{module}-", dir=folder, delete=False) as file:
            json.dump({"ANSIBLE_MODULE_ARGS": options}, file)
        files = {"out": file.name + ".out", "err": file.name + ".err"}
        asked = self.ask(module=module, arguments=file.name, environment=environment or {}, **files)
        return Process(self, asked["pid"], file.name)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@functools.lru_cache(maxsize=None)
def server() -> Server:
    """The one that all tests of a process share."""
    return Server()


class Modules:
    """The modules on one VM and one repository, and what the VM's disks held at each restore point.

    ``held`` is {point: {device key: (capacity in bytes, SHA-256)}}, as the simulator read it from the snapshot.
    """

    def __init__(self, simulator: Simulator, repository: Path, vm: str = "app01") -> None:
        self.simulator = simulator
        self.repository = repository
        self.vm = vm
        self.named = dict(simulator.connection, name=vm)
        self.backups = Backups(simulator, Ansible(repository.parent / "ansible"), repository)
        self.held: Dict[str, Dict[int, Tuple[int, str]]] = {}

    # Running modules

    def start(self, module: str, options: Dict[str, Any]) -> Process:
        """A module as a process; its arguments go through a file that only we can read."""
        return server().start(module, options, self.repository.parent)

    @staticmethod
    def result(process: Process) -> Dict[str, Any]:
        """What a module said, with ``failed`` set or not."""
        process.wait()
        assert process.out.startswith("{"), process.err
        return {"failed": False, **json.loads(process.out)}

    def run(self, module: str, /, **options: Any) -> Dict[str, Any]:
        return self.result(self.start(module, options))

    def done(self, module: str, /, **options: Any) -> Dict[str, Any]:
        """As :meth:`run`, of a module that has to succeed."""
        result = self.run(module, **options)
        assert not result["failed"], result
        return result

    # The steps of a backup

    def track_changes(self, state: str = "enabled") -> None:
        self.done("vm_change_tracking", **self.named, state=state)

    def snapshot(self, name: str, description: str = "") -> str:
        """Make a snapshot; its moid."""
        made = self.done("vm_snapshot", **self.named, snapshot_name=name, description=description, quiesce="never")
        return str(made["snapshot"]["moid"])

    def remove_snapshot(self, moid: str) -> None:
        self.done("vm_snapshot", **self.named, snapshot_moid=moid, state="absent")

    def export_options(self, **options: Any) -> Dict[str, Any]:
        """By nbdssl alone, if nothing else is said: what breaks there is not made good by another transport."""
        facts = self.simulator.facts
        where = {"repository": str(self.repository), "vddk_libdir": facts["vddk_libdir"], "nfc_port": facts["nfc_port"]}
        return {**self.named, **where, "transports": ["nbdssl"], **options}

    def export(self, snapshot: str, point: str, **options: Any) -> Dict[str, Any]:
        return self.run("vadp_disk_export", **self.export_options(snapshot_moid=snapshot, point=point, **options))

    def make(self, snapshot: str, point: str, **options: Any) -> Dict[int, Dict[str, Any]]:
        """A point from a snapshot that is there: its disks by key, as the manifest tells them."""
        result = self.export(snapshot, point, **options)
        assert not result["failed"], result
        disks = self.backups.manifest(self.vm, point)["disks"]
        self.held[point] = {key: self.simulator.disk(self.vm, key, snapshot) for key in disks}
        return dict(disks)

    def point(self, point: str, **options: Any) -> Dict[int, Dict[str, Any]]:
        """As :meth:`make`, with a snapshot of its own."""
        snapshot = self.snapshot(point)
        disks = self.make(snapshot, point, **options)
        self.remove_snapshot(snapshot)
        return disks

    def refused(self, snapshot: str, *words: str, mode: str = "incremental", **options: Any) -> None:
        """The export fails with these words, and the repository is as it was."""
        before = self.tree()
        result = self.export(snapshot, "refused", mode=mode, **options)
        assert result["failed"], result
        assert all(word in result["msg"] for word in words), result["msg"]
        assert self.tree() == before

    # What came of it

    def tree(self) -> Dict[str, Tuple[int, int]]:
        """{path: (size, time of the last change)} of the repository's files; locks apart."""
        files = [path for path in self.repository.rglob("*") if path.is_file() and path.name != "lock"]
        stats = {str(path.relative_to(self.repository)): path.stat() for path in files}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def verify_bytes(self, *points: str) -> None:
        """Every disk of every point (or of these) holds what it held: by plain qemu-img, not by code of ours."""
        for point in points or self.held:
            stored = {key: self.backups.disk(self.vm, key, point) for key in self.held[point]}
            assert stored == self.held[point], point

    def verify(self, *points: str) -> None:
        """Module restore_point_verify finds nothing wrong with the data of these points."""
        for point in points:
            result = self.done(
                "restore_point_verify", repository=str(self.repository), vm_name=self.vm, point=point, level="data"
            )
            assert result["ok"] is True, result

    def clean(self) -> None:
        """Nothing but points is in the repository, and no snapshot on the VM."""
        names = [name for name in self.tree() if "/runs/" in name or ".part-" in name]
        assert names == [] and self.simulator.snapshots(self.vm) == []

    def layer_identity(self, point: str) -> Dict[int, Tuple[int, int]]:
        """{key: (inode, time of the last change)} of the layers that lie there under a point's name."""
        stats = {int(path.parent.name[5:]): path.stat() for path in self.repository.glob(f"vms/*/disk-*/{point}.qcow2")}
        return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


def modes(disks: Dict[int, Dict[str, Any]], keys: Optional[Sequence[int]] = None) -> Dict[int, Tuple[str, Any]]:
    """{key: (mode, parent)} of a point's disks."""
    return {key: (disks[key]["mode"], disks[key]["parent"]) for key in keys or disks}
