# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the end-to-end tests stand on: a running simulator, ansible-playbook and its results, the bytes of disks."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = ROOT / "tests" / "simulator"
sys.path.insert(0, str(SIMULATOR))

import startup_cache  # noqa: E402
from client import Control  # noqa: E402

MIB = 1 << 20


class Simulator:
    """A simulator process of our own: started with a state folder, stopped by SIGTERM.

    ``facts`` is its JSON line, ``control`` the client of its control socket.
    """

    def __init__(self, state: Path, vms: str = "minimal", passwords: Optional[Dict[str, str]] = None) -> None:
        """:param passwords: by user name; others get random ones."""
        self.state = state
        self.vms = vms
        self.options: List[str] = []
        if passwords:
            secret = state.with_suffix(".passwords")
            secret.touch(mode=0o600)
            secret.write_text(json.dumps(passwords))
            self.options = ["--passwords", str(secret)]
        self.log_path = state.with_suffix(".log")
        self.start()

    def start(self, port: int = 0) -> None:
        """Start it, or start it again with the state that it left; *port* is vCenter's, 0 takes a free one."""
        self._log = self.log_path.open("ab")
        self._process = subprocess.Popen(
            [str(SIMULATOR / "run"), "--state", str(self.state), "--vms", self.vms, "--port", str(port), *self.options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=str(ROOT),
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(b"{"):
            self._process.wait(30)
            raise RuntimeError(f"the simulator did not start: {self.log_path.read_text(errors='replace')[-4000:]}")
        self.facts: Dict[str, Any] = json.loads(line)
        self.control = Control(self.facts["control_socket"])

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
            raise
        finally:
            self._log.close()

    @property
    def connection(self) -> Dict[str, Any]:
        """The connection as options of a module, as the user who has no more privileges than a backup needs."""
        return {
            "hostname": self.facts["host"],
            "port": self.facts["port"],
            "username": self.facts["backup_username"],
            "password": self.facts["backup_password"],
            "ca_path": self.facts["ca_path"],
        }

    def disk(self, vm: str, key: int, snapshot: Optional[str] = None) -> Tuple[int, str]:
        """(capacity in bytes, SHA-256) of what a disk holds, or of what a snapshot froze of it."""
        result = self.control.call("read_disk", vm=vm, disk=key, snapshot=snapshot)
        return result["capacity_bytes"], result["sha256"]

    def write(self, vm: str, key: int, *offsets: int, seed: int = 1, length: int = 65536) -> None:
        """The guest writes the same random bytes at each offset."""
        pattern = {"seed": seed, "length": length}
        self.control.call("guest_write", vm=vm, disk=key, offsets=list(offsets), pattern=pattern)

    def snapshots(self, vm: str) -> List[Any]:
        """The snapshots that a VM has now."""
        return list(self.vm(vm)["snapshots"])

    def vm(self, name: str) -> Dict[str, Any]:
        """A VM in the simulator's state."""
        vms = [vm for vm in self.control.call("state")["vms"].values() if vm["name"] == name]
        assert len(vms) == 1, f"{len(vms)} VMs named {name}"
        return dict(vms[0])

    def last_call(self) -> int:
        """Number of the newest call in the log, for :meth:`changing_calls`."""
        return max((call["seq"] for call in self.control.call("calls")), default=0)

    def changing_calls(self, since: int) -> List[str]:
        """The calls after *since* that changed anything."""
        return [call["method"] for call in self.control.call("calls", since=since) if call["changing"]]

    def role_variables(self, prefix: str) -> Dict[str, Any]:
        """The connection and VDDK as variables of a role."""
        options = dict(self.connection, vddk_libdir=self.facts["vddk_libdir"], nfc_port=self.facts["nfc_port"])
        return {prefix + name: value for name, value in options.items()}


@dataclass
class Outcome:
    """One run of ansible-playbook."""

    rc: int
    stdout: str
    stderr: str
    events: List[Dict[str, Any]]
    stats: Dict[str, Dict[str, int]] = field(default_factory=dict)

    def results(
        self, action: Optional[str] = None, host: Optional[str] = None, task: Optional[str] = None
    ) -> List[Any]:
        """Results of tasks in the order of their end; those that were skipped are left out."""
        return [
            event["result"]
            for event in self.events
            if event["status"] in ("ok", "failed", "unreachable")
            and (action is None or event["action"].endswith(action))
            and (host is None or event["host"] == host)
            and (task is None or event["task"].endswith(task))
        ]

    def result(self, action: str, host: Optional[str] = None, task: Optional[str] = None) -> Dict[str, Any]:
        """The last result of a module."""
        found = self.results(action, host, task)
        assert found, f"no result of {action}:\n{self}"
        last: Dict[str, Any] = found[-1]
        return last

    @property
    def changed(self) -> int:
        return sum(host["changed"] for host in self.stats.values())

    def ok(self) -> "Outcome":
        """Itself, if the run ended well."""
        assert self.rc == 0, str(self)
        return self

    def failed(self) -> "Outcome":
        assert self.rc != 0, str(self)
        return self

    def __str__(self) -> str:
        return f"rc={self.rc}\n{self.stdout[-12000:]}\n{self.stderr[-4000:]}"


class Ansible:
    """Runs ansible-playbook from the project's environment, in a folder of its own.

    :param folder: where playbooks, variables, logs and Ansible's own temporary files go.
    :param venv, tree: the Python environment and the collection tree; a test that runs as another user passes copies
        that user can read.
    :param controller: the environment whose ansible-playbook is started, if another; *venv* then is the proxy's alone.
    :param plugins: the tests' own callback plugins.
    :param uid: the user to run as, if another (root can).
    """

    def __init__(
        self,
        folder: Path,
        venv: Path = ROOT / ".venv",
        tree: Path = ROOT / "build" / "tree",
        controller: Optional[Path] = None,
        plugins: Path = Path(__file__).parent / "plugins",
        uid: Optional[int] = None,
    ) -> None:
        self.folder = folder
        self.venv = venv
        self.tree = tree
        self.controller = controller or venv
        self.plugins = plugins
        self.uid = uid
        self._count = 0

    def start(
        self,
        playbook: Any,
        *,
        hosts: Sequence[str] = (),
        host_variables: Optional[Dict[str, Dict[str, Any]]] = None,
        variables: Optional[Dict[str, Any]] = None,
        arguments: Sequence[str] = (),
        environment: Optional[Dict[str, str]] = None,
    ) -> "Running":
        """Start a playbook: plays as data, or the name of one of the collection's.

        :param hosts: virtual machines, as hosts of group ``vms``.
        :param variables: extra variables. They go through a file of mode 0600: a command line is everybody's to read.
        """
        self._count += 1
        run = self.folder / f"run-{self._count}"
        run.mkdir(parents=True)
        if not isinstance(playbook, str):
            path = run / "playbook.json"
            path.write_text(json.dumps(playbook), encoding="utf-8")
            playbook = str(path)
        inventory = {
            "all": {
                "hosts": {
                    "localhost": {
                        "ansible_connection": "local",
                        "ansible_python_interpreter": str(self.venv / "bin" / "python"),
                    }
                },
                "children": {"vms": {"hosts": {name: (host_variables or {}).get(name, {}) for name in hosts}}},
            }
        }
        (run / "inventory.json").write_text(json.dumps(inventory), encoding="utf-8")
        command = [str(self.controller / "bin" / "python"), str(self.controller / "bin" / "ansible-playbook")]
        command += ["-i", str(run / "inventory.json"), playbook, *arguments]
        if variables:
            secret = run / "variables.json"
            secret.touch(mode=0o600)
            secret.write_text(json.dumps(variables), encoding="utf-8")
            command += ["-e", f"@{secret}"]
        results = run / "results.jsonl"
        names = ("PATH", "LANG", "TERM", "TMPDIR")
        settings = {
            **{name: os.environ[name] for name in names if name in os.environ},
            "HOME": str(self.folder),
            "ANSIBLE_COLLECTIONS_PATH": str(self.tree),
            "ANSIBLE_CALLBACK_PLUGINS": str(self.plugins / "callback"),
            "ANSIBLE_CALLBACKS_ENABLED": "json_lines",
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_REMOTE_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_RETRY_FILES_ENABLED": "0",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_DEPRECATION_WARNINGS": "1",
            "E2E_RESULTS": str(results),
            "E2E_CACHE": str(startup_cache.folder()),
            "PYTHONPATH": str(Path(__file__).parent / "startup"),
            **(environment or {}),
        }
        if self.uid is not None:
            command = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--", *command]
            for path in (self.folder, run, *run.iterdir()):
                os.chown(path, self.uid, self.uid)
        return Running(command, settings, run, results)

    def run(self, playbook: Any, **options: Any) -> Outcome:
        """Run a playbook to its end; see :meth:`start`."""
        return self.start(playbook, **options).wait()

    def module(self, name: str, options: Dict[str, Any], check: bool = False, diff: bool = False) -> Dict[str, Any]:
        """One module on localhost: its result, with ``failed`` set or not."""
        task = {"name": name, f"openvadp.backup.{name}": options}
        play = [{"hosts": "localhost", "gather_facts": False, "tasks": [task]}]
        arguments = ["--check"] * check + ["--diff"] * diff
        outcome = self.run(play, arguments=arguments)
        return dict(outcome.result(name), failed=outcome.rc != 0)


class Backups:
    """Backups through playbook backup.yml into one repository, and what it then holds."""

    def __init__(self, simulator: Simulator, ansible: Ansible, repository: Path) -> None:
        self.simulator = simulator
        self.ansible = ansible
        self.repository = repository

    def variables(self, **options: Any) -> Dict[str, Any]:
        """Variables of role vm_backup: the connection, the repository, and *options* without their prefix."""
        variables = self.simulator.role_variables("vm_backup_")
        variables["vm_backup_repository"] = str(self.repository)
        variables.update({"vm_backup_" + name: value for name, value in options.items()})
        return variables

    def run(
        self,
        *hosts: str,
        host_variables: Optional[Dict[str, Dict[str, Any]]] = None,
        arguments: Sequence[str] = (),
        **options: Any,
    ) -> Outcome:
        """Back up; *options* are those of the role without their prefix."""
        return self.ansible.run(
            "openvadp.backup.backup",
            hosts=hosts,
            host_variables=host_variables,
            variables=self.variables(**options),
            arguments=arguments,
        )

    def store(self, vm: str) -> Path:
        """A VM's folder in the repository."""
        for path in self.repository.glob("vms/*/vm.json"):
            if json.loads(path.read_text(encoding="utf-8"))["name"] == vm:
                return path.parent
        raise AssertionError(f"{vm} is not in the repository")

    def points(self, vm: str) -> List[str]:
        return sorted(path.stem for path in self.store(vm).glob("points/*.json"))

    def manifest(self, vm: str, point: str) -> Dict[str, Any]:
        manifest = json.loads((self.store(vm) / "points" / f"{point}.json").read_text(encoding="utf-8"))
        return dict(manifest, disks={disk["key"]: disk for disk in manifest["disks"]})

    def layer(self, vm: str, key: int, point: str) -> Path:
        return self.store(vm) / f"disk-{key}" / f"{point}.qcow2"

    def disk(self, vm: str, key: int, point: str) -> Tuple[int, str]:
        """(size, SHA-256) of a disk at a point, read by plain qemu-img: nothing of ours takes part."""
        raw = self.repository.parent / "converted.raw"
        subprocess.run(
            ["qemu-img", "convert", "-O", "raw", str(self.layer(vm, key, point)), str(raw)],
            check=True,
            capture_output=True,
        )
        try:
            return file_sha256(raw)
        finally:
            raw.unlink()


def made_repository(folder: Path) -> Path:
    """A repository in a folder that is made for it: a backup makes none unless it is told to."""
    from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository

    folder.mkdir(parents=True, exist_ok=True)
    Repository.open(str(folder), create=True)
    return folder


def adopted(folder: Path, how: str = "moved") -> Path:
    """A repository that was copied or mounted elsewhere, taken into use where it is now."""
    from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository

    Repository.open(str(folder), adopt=how)
    return folder


def plant_orphans(repository: Path) -> List[Path]:
    """Files in the one VM's folder as a process that was killed beside its run's record leaves them."""
    folder = next(path.parent for path in repository.glob("vms/*/vm.json"))
    names = ("runs/clock.part-0123456789abcdef", f"runs/{'ab' * 16}.json.part-{'ab' * 16}-0123456789ab")
    for path in map(folder.joinpath, names):
        path.write_text("\n")
    return [folder / name for name in names]


def file_sha256(path: Path) -> Tuple[int, str]:
    """(size, SHA-256) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(MIB):
            digest.update(data)
    return path.stat().st_size, digest.hexdigest()


class Running:
    """A playbook on its way. Its output is kept in files, so that a pipe that fills can't stop it."""

    def __init__(self, command: List[str], environment: Dict[str, str], run: Path, results: Path) -> None:
        self.folder = run
        self._results = results
        self._out = (run / "stdout").open("wb")
        self._err = (run / "stderr").open("wb")
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, cwd=str(run)
        )

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until *text* stands in the output."""
        deadline = time.monotonic() + timeout
        while text not in (self.folder / "stdout").read_text(encoding="utf-8", errors="replace"):
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {text!r}:\n{self.wait()}"
            time.sleep(0.05)

    def wait(self, timeout: float = 600) -> Outcome:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(30)
            raise
        finally:
            self._out.close()
            self._err.close()
        events: List[Dict[str, Any]] = []
        if self._results.exists():
            events = [json.loads(line) for line in self._results.read_text(encoding="utf-8").splitlines()]
        stats = [event["stats"] for event in events if event["status"] == "stats"]
        return Outcome(
            self.process.returncode,
            (self.folder / "stdout").read_text(encoding="utf-8", errors="replace"),
            (self.folder / "stderr").read_text(encoding="utf-8", errors="replace"),
            [event for event in events if event["status"] != "stats"],
            stats[-1] if stats else {},
        )
