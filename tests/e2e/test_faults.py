# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What goes wrong in the middle of a backup, and what is left of it afterwards: nothing but verified points.

Most tests run the steps of role vm_backup as modules; those about the steps themselves run the role.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set

import pytest
import sshd
from harness import MIB, Running, Simulator, made_repository
from modules import Modules, Process, Server

# Every process that a backup starts inherits it.
MARK = "E2E_FAULTS"
VM = "app01"
DISKS = (2000, 2001)
HOSTS = ("127.0.1.1", "127.0.1.2")
GONE_SECONDS = 10
# For the start of a module, its last steps, and a machine that has other things to do.
# A busy machine takes its time to start a module; without the option it would be 180 s.
SLACK_SECONDS = 60
# So that a copy of some MiB lasts some seconds.
SLOW = "3M"
# Another task, and a vMotion.
BUSY = ("TaskInProgress", "InvalidState")
NOOP_CALLS = 12
FULL_CALLS = 68


class MarkedModules(Modules):
    """Modules from a server of their own, which has this test's environment."""

    def __init__(self, simulator: Simulator, repository: Path, vm: str) -> None:
        super().__init__(simulator, repository, vm)
        self.server = Server()

    def start(self, module: str, options: Dict[str, Any]) -> Process:
        return self.server.start(module, options, self.repository.parent)


class World:
    """A VM, a repository, and all that a backup could leave behind."""

    def __init__(self, simulator: Simulator, folder: Path, mark: str) -> None:
        self.simulator = simulator
        self.mark = mark
        repository = folder / "repository"
        made_repository(repository)
        self.modules = MarkedModules(simulator, repository, VM)
        self.backups = self.modules.backups
        self.repository = repository
        self.temporary = Path(os.environ["TMPDIR"])
        self.hosts: Dict[str, Any] = {}
        self.chains = {disk["key"]: len(disk["chain"]) for disk in simulator.vm(VM)["disks"]}
        self.runs: Set[str] = set()

    def control(self, op: str, **fields: Any) -> Any:
        """An op on the simulator's control socket, whichever process it is now."""
        return self.simulator.control.call(op, **fields)

    def nfc(self, **fields: Any) -> Dict[str, Any]:
        return dict(self.control("nfc", **fields))

    # A backup, as role vm_backup makes it

    def recover(self, **options: Any) -> Dict[str, Any]:
        where = {"repository": str(self.repository), "vddk_libdir": self.simulator.facts["vddk_libdir"]}
        # What was begun here goes on for all that anybody can know; the tests don't wait for its deadline.
        where["force"] = "begin" not in options
        return self.modules.done("vadp_recover", **{**self.modules.named, **where, **options})

    @contextlib.contextmanager
    def snapshot(self, point: str) -> Iterator[str]:
        """The run is begun and its snapshot is there; in every outcome it is removed again."""
        run = self.recover(begin=True, point=point)["run"]
        self.runs.add(run["id"])
        moid = self.modules.snapshot(run["snapshot_name"], run["snapshot_description"])
        try:
            yield moid
        finally:
            self.modules.remove_snapshot(moid)
            self.recover()

    def start(self, moid: str, point: str, **options: Any) -> Process:
        """A full export, up to the middle of its copy."""
        options = self.modules.export_options(snapshot_moid=moid, point=point, mode="full", **options)
        process = self.modules.start("vadp_disk_export", options)
        self.wait_in_copy(process)
        return process

    def wait_in_copy(self, process: Any) -> None:
        """Until an export is in the middle of the first disk; the second one is empty and over at once."""
        before = self.bytes_read()
        self.wait_for(lambda: self.bytes_read() > before + MIB and self.servers(), process)

    def recovers(self) -> None:
        """A backup after one that was cut off before its end: it removes what that left, and makes the point."""
        assert self.points() == [] and len(self.simulator.snapshots(VM)) == 1
        # What Ansible leaves of its own when it is killed.
        for path in [*self.backups.ansible.folder.glob("tmp/ansible-*"), *self.temporary.glob("ansible_*")]:
            shutil.rmtree(path)
        found = self.recover()["recovered"]
        assert "snapshot" in [item["what"] for item in found], found
        self.back_up("one")

    def back_up(self, point: str, *earlier: str) -> None:
        """A backup without faults, and the proof of its bytes, and of those of earlier points."""
        with self.snapshot(point) as moid:
            result = self.modules.export(moid, point, mode="full")
            assert not result["failed"], result
        self.check(point, *earlier)

    def role(self, point: str, **options: Any) -> Running:
        """The role on its way, through playbook backup.yml, in full."""
        # What breaks there is not made good by another transport.
        options = {"transports": ["nbdssl"], **options}
        variables = self.backups.variables(point=point, mode="full", **options)
        variables["vm_backup_hosts"] = VM
        return self.backups.ansible.start(
            "openvadp.backup.backup",
            hosts=[VM, *self.hosts],
            host_variables=self.hosts,
            variables=variables,
            environment={MARK: self.mark},
        )

    def maintenance(self, on: bool) -> None:
        for host in HOSTS:
            self.control("set_host", name=host, maintenance=on)

    # What can be seen from outside

    def bytes_read(self) -> int:
        return sum(host["bytes_read"] for host in self.nfc()["hosts"].values())

    def servers(self) -> Dict[str, int]:
        """{name: pid} of the servers of the one disk that is being copied, from the run's record."""
        found = []
        for path in self.repository.glob("vms/*/runs/*.json"):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            self.runs.add(record["run_id"])
            for intent in record["intents"]:
                if intent["what"] == "process":
                    found.append((str(intent["name"]).split(" ", maxsplit=1)[0], int(intent["pid"])))
        return dict(found) if len(found) == 2 else {}

    def processes(self) -> List[str]:
        """Command lines of what was started from here and still runs; SSH's own connections apart."""
        mark = f"{MARK}={self.mark}".encode()
        not_meant = (self.modules.server.pid, self.simulator.facts["pid"])
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile, or it is somebody else's
            ours = mark in environment and line and int(folder.name) not in not_meant
            if ours and not re.match(r"\S*ssh\b.*\[mux\]", line):
                found.append(f"{folder.name} {line}")
        return found

    def runs_now(self, module: str) -> bool:
        return any(f"AnsiballZ_{module}" in process for process in self.processes())

    def points(self) -> List[str]:
        return sorted(path.stem for path in self.repository.glob("vms/*/points/*.json"))

    @staticmethod
    def wait_for(condition: Callable[[], Any], process: Any = None, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert process is None or process.poll() is None, "it ended"
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def refused_opens(self, since: int) -> int:
        calls = self.control("calls", since=since)
        return len([call for call in calls if call["method"] == "VixDiskLib_Open" and call["fault"]])

    # What must be so

    def ends(self, process: Process, io_timeout: float, *words: str) -> None:
        """The export fails within its time-out of now, with these words; nothing of the point can be seen."""
        begun = time.monotonic()
        result = self.modules.result(process)
        assert result["failed"] and all(word in result["msg"] for word in words), result["msg"]
        assert time.monotonic() < begun + io_timeout + SLACK_SECONDS
        self.nothing_half()
        self.gone(time.monotonic())

    def nothing_half(self) -> None:
        """No point, and nothing unfinished: a module that fails waits for nobody to clean up behind it."""
        assert self.points() == [] and not list(self.repository.rglob("*.part-*"))

    def fails_within(self, io_timeout: int, *words: str) -> None:
        """A backup as :meth:`ends` says; what the role would remove is removed."""
        with self.snapshot("one") as moid:
            options = dict(snapshot_moid=moid, point="one", mode="full", io_timeout=io_timeout)
            process = self.modules.start("vadp_disk_export", self.modules.export_options(**options))
            self.ends(process, io_timeout, *words)
        assert self.left() == []

    def gone(self, since: float) -> None:
        """10 s after the fault nothing of ours runs."""
        while self.processes():
            assert time.monotonic() < since + GONE_SECONDS, self.processes()
            time.sleep(0.05)

    def check(self, *points: str) -> None:
        """These points are there, verified, with the right bytes; and there is nothing else of ours anywhere."""
        self.gone(time.monotonic())
        assert self.points() == sorted(points)
        self.modules.verify(*points)
        for point in points:
            for key in DISKS:
                assert self.backups.disk(VM, key, point) == self.simulator.disk(VM, key)
        assert self.left() == []

    def left(self) -> List[str]:
        """All of ours that is neither a point nor a process: on the VM, in the repository, on this machine."""
        vm = self.simulator.vm(VM)
        left = [f"snapshot {item['name']}" for item in vm["snapshots"]]
        left += ["consolidation is needed"] * vm["consolidation_needed"]
        left += [f"delta {disk['path']}" for disk in vm["disks"] if len(disk["chain"]) != self.chains[disk["key"]]]
        left += [f"open {disk['path']}" for disk in self.nfc()["disks"]]
        manifests = [json.loads(path.read_text("utf-8")) for path in self.repository.glob("vms/*/points/*.json")]
        known = {"vm.json", "lock", "repository.json"}
        for manifest in manifests:
            point = manifest["point"]
            known |= {f"points/{point}.json", f"configs/{point}.json", f"configs/{point}.nvram"}
            for disk in manifest["disks"]:
                known |= {f"disk-{disk['key']}/{disk[kind]['file']}" for kind in ("layer", "hashes")}
        for path in self.repository.rglob("*"):
            name = re.sub(r"^vms/[^/]+/", "", str(path.relative_to(self.repository)))
            if not path.is_dir() and name not in known:
                left.append(str(path))
        left += [f"lock {path}" for path in self.repository.glob("vms/*/lock") if _is_held(path)]
        left += [str(path) for path in self.temporary.iterdir()]
        bases = [Path(f"/run/user/{os.geteuid()}"), Path("/tmp")]
        folders = [path for base in bases if base.is_dir() for path in base.glob("openvadp-*")]
        left += [str(path) for path in folders if _owner(path) in self.runs]
        left += [str(path) for path in self.repository.parent.rglob("vadp-progress-*")]
        return left


def _is_held(lock: Path) -> bool:
    """Somebody holds it, or says so."""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return bool(file.read())


def _owner(folder: Path) -> str:
    try:
        return (folder / "owner").read_text(encoding="utf-8")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator whose VM has some MiB to copy; each test has a repository of its own."""
    running = Simulator(tmp_path_factory.mktemp("simulator") / "state")
    try:
        running.write(VM, 2000, 32 * MIB, length=8 * MIB)
        yield running
    finally:
        running.stop()


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # The path of a socket must be short, so it is not in tmp_path.
    with tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setenv(MARK, str(tmp_path))
        yield str(tmp_path)


@pytest.fixture
def world(small: Simulator, tmp_path: Path, mark: str) -> Iterator[World]:
    one = World(small, tmp_path, mark)
    try:
        yield one
    finally:
        one.control("restore_network")
        one.nfc(clear_faults=True)
        one.control("clear_injections")
        one.maintenance(False)
        # A test that failed must not fail the next ones.
        for snapshot in reversed(small.snapshots(VM)):
            one.modules.remove_snapshot(snapshot["moid"])
        one.modules.server.stop()


@pytest.fixture
def own_world(own_simulator: Simulator, tmp_path: Path, mark: str) -> Iterator[World]:
    """With a simulator that has not seen a backup, and may be stopped."""
    one = World(own_simulator, tmp_path, mark)
    try:
        yield one
    finally:
        one.modules.server.stop()


# The data path


@pytest.mark.parametrize("server", ["nbdkit", "qemu-nbd"])
def test_a_server_is_killed_in_the_middle(world: World, server: str) -> None:
    with world.snapshot("one") as moid:
        process = world.start(moid, "one", rate_limit=SLOW)
        os.kill(world.servers()[server], signal.SIGKILL)
        killed = time.monotonic()
        result = world.modules.result(process)
        assert result["failed"] and result["error"]["retryable"], result
        assert "Hard disk 1" in result["msg"]
        world.nothing_half()
        world.gone(killed)
    assert world.left() == []
    world.back_up("one")


def test_reads_that_fail_once_are_read_again(world: World) -> None:
    for action in ("fail", "drop"):
        world.nfc(read_faults={"count": 1, "after": 3, "action": action})
    with world.snapshot("one") as moid:
        result = world.modules.export(moid, "one", mode="full")
        assert not result["failed"], result
        assert world.nfc()["faults"] == [], "both were met"
    world.check("one")


@pytest.mark.soak
def test_reads_that_fail_for_ever_end_it_in_time_with_the_reason(world: World) -> None:
    world.nfc(read_faults={"count": -1, "after": 3, "vix": 14014})
    world.fails_within(6, "14014", "maintenance")
    world.nfc(clear_faults=True)
    world.back_up("one")


def test_the_connection_is_cut_for_five_seconds(world: World) -> None:
    with world.snapshot("one") as moid:
        process = world.start(moid, "one", rate_limit=SLOW)
        world.control("cut_network", seconds=5)
        time.sleep(1)
        read = world.bytes_read()
        time.sleep(3)
        assert world.bytes_read() == read and process.poll() is None, "nothing comes through, and it waits"
        result = world.modules.result(process)
        assert not result["failed"], result
        assert world.bytes_read() > read
    world.check("one")


@pytest.mark.parametrize("when", ["copy", pytest.param("open", marks=pytest.mark.soak)])
def test_a_host_falls_silent(world: World, when: str) -> None:
    if when == "open":
        world.control("cut_network", mode="blackhole")
        # Long enough for VDDK to say what it waits for, on a busy machine too.
        world.fails_within(20, "902")
    else:
        with world.snapshot("one") as moid:
            process = world.start(moid, "one", rate_limit=SLOW, io_timeout=6)
            # Longer than the time-out: at first the silent host keeps the disk open, so that it can't be consolidated.
            world.control("cut_network", mode="blackhole", seconds=9)
            world.ends(process, 6, "connection to the ESXi host was cut", "firewalls")
    world.control("restore_network")
    world.back_up("one")


def test_hosts_are_in_maintenance_when_the_disk_is_opened(world: World) -> None:
    world.maintenance(True)
    world.fails_within(4, "14015", "maintenance")
    with world.snapshot("one") as moid:
        options = world.modules.export_options(snapshot_moid=moid, point="one", mode="full")
        seen = world.simulator.last_call()
        process = world.modules.start("vadp_disk_export", options)
        world.wait_for(lambda: world.refused_opens(seen) >= 2, process)
        world.maintenance(False)
        result = world.modules.result(process)
        assert not result["failed"], result
    world.check("one")


# vCenter


def test_the_session_expires_in_the_middle(world: World) -> None:
    with world.snapshot("one") as moid:
        process = world.start(moid, "one", rate_limit=SLOW)
        assert world.control("expire_sessions") >= 1
        result = world.modules.result(process)
        assert not result["failed"], result
    world.check("one")


def test_the_snapshot_can_not_be_removed_while_somebody_reads_it(world: World) -> None:
    """Locked: tried again. Gone from the tree without its delta: consolidated, as soon as the reader lets go."""
    world.control("inject", target="task", name="RemoveSnapshot_Task", fault="FileLocked")
    for fault in BUSY:
        world.control("inject", target="call", name="ConsolidateVMDisks_Task", fault=fault)
    run = world.recover(begin=True, point="one")["run"]
    moid = world.modules.snapshot(run["snapshot_name"], run["snapshot_description"])
    assert not world.modules.export(moid, "one", mode="full")["failed"]
    seen = world.simulator.last_call()
    with _reader(world.simulator, moid):
        options = dict(world.modules.named, snapshot_moid=moid, state="absent")
        process = world.modules.start("vm_snapshot", options)
        world.wait_for(lambda: "ConsolidateVMDisks_Task" in world.simulator.changing_calls(seen), process)
        world.wait_for(lambda: world.simulator.vm(VM)["consolidation_needed"], process)
        assert world.simulator.snapshots(VM) == []
    result = world.modules.result(process)
    assert not result["failed"] and result["consolidated"], result
    calls = [name for name in world.simulator.changing_calls(seen) if name.endswith("_Task")]
    assert calls[:3] == ["RemoveSnapshot_Task"] * 2 + ["ConsolidateVMDisks_Task"]
    assert world.recover()["recovered"] == []
    world.check("one")


def test_what_one_run_can_not_consolidate_the_next_one_does(world: World) -> None:
    """The run is killed while it waits for the reader."""
    run = world.recover(begin=True, point="one")["run"]
    moid = world.modules.snapshot(run["snapshot_name"], run["snapshot_description"])
    with _reader(world.simulator, moid):
        process = world.modules.start("vm_snapshot", dict(world.modules.named, snapshot_moid=moid, state="absent"))
        world.wait_for(lambda: world.simulator.vm(VM)["consolidation_needed"], process)
        process.kill()
        # A task that it had begun fails before the reader is gone.
        world.wait_for(lambda: not world.control("state")["tasks"])
    assert any(item.startswith("delta ") for item in world.left())
    found = world.recover()["recovered"]
    assert [(item["what"], item["action"]) for item in found] == [("snapshot", "consolidated")]
    world.back_up("one")


@contextlib.contextmanager
def _reader(simulator: Simulator, snapshot: str) -> Iterator[None]:
    """Somebody else's backup, which has the snapshot's disk open, as the VDDK double's protocol opens it."""
    facts = simulator.facts
    (vm,) = (moid for moid, one in simulator.control.call("state")["vms"].items() if one["name"] == VM)
    path = simulator.control.call("read_disk", vm=VM, disk=2000, snapshot=snapshot, length=512)["path"]
    login = {"op": "login", "user": facts["backup_username"], "password": facts["backup_password"]}
    disk = {"vmx": f"moref={vm}", "snapshot": snapshot, "path": path, "read_only": True, "transports": "nbd"}
    with socket.create_connection((facts["host"], facts["port"])) as sock, sock.makefile("rwb") as lines:
        for request in (login, {"op": "open", **disk}):
            lines.write(json.dumps(request).encode() + b"\n")
            lines.flush()
            answer = json.loads(lines.readline())
            assert answer["ok"], answer
        yield


def test_the_snapshot_can_not_be_removed_at_all(world: World) -> None:
    """The point is complete, the role warns of what is left, and the next run removes it."""
    # A fault for which the module itself does not try again.
    world.control("inject", target="task", name="RemoveSnapshot_Task", fault="GenericVmConfigFault", count=0)
    options = {"change_tracking": False, "snapshot_removal_retries": 1, "snapshot_removal_delay": 1}
    outcome = world.role("one", **options).wait().ok()
    (warning,) = outcome.result("show_lines", task="Warn of what was not cleaned up")["warnings"]
    assert warning.startswith("app01: Left behind: ") and "was not removed" in warning and "vadp_recover" in warning
    assert "NOT CLEANED UP: Left behind" in outcome.stdout and "none failed" in outcome.stdout
    assert len(world.simulator.snapshots(VM)) == 1 and world.points() == ["one"]
    world.control("clear_injections")
    world.back_up("two", "one")


def test_vcenter_goes_away_for_good_once_the_point_is_stored(own_world: World) -> None:
    """The repository alone proves that it is complete; the next run need not wait for the deadline of this one."""
    options = {"change_tracking": False, "snapshot_removal_retries": 1, "snapshot_removal_delay": 1}
    running = own_world.role("one", **options, reconnect_timeout=1, verify="structure")
    own_world.wait_for(lambda: own_world.points() == ["one"], running.process)
    own_world.control("outage", seconds=600)
    outcome = running.wait().ok()
    (warning,) = outcome.result("show_lines", task="Warn of what was not cleaned up")["warnings"]
    assert "can't be reached" in warning and "none failed" in outcome.stdout
    assert own_world.control("end_outage") == "begun" and len(own_world.simulator.snapshots(VM)) == 1
    own_world.role("two").wait().ok()
    own_world.check("one", "two")


def test_every_task_meets_another_task_and_a_vmotion(own_world: World) -> None:
    """Refused at the call and at the task, once each, wherever role vm_backup starts a task."""
    names = ["ReconfigVM_Task", "CreateSnapshot_Task", "CreateSnapshotEx_Task", "RemoveSnapshot_Task"]
    for name in names:
        for target in ("call", "task"):
            for fault in BUSY:
                own_world.control("inject", target=target, name=name, fault=fault)
    seen = own_world.simulator.last_call()
    own_world.role("one").wait().ok()
    calls = own_world.control("calls", since=seen)
    started = {call["method"] for call in calls if call["method"].endswith("_Task")}
    assert started == set(names)
    for name in names:
        faulted = [call["fault"] for call in calls if call["method"] == name]
        assert faulted[:4] == [*BUSY, None, None] and len(faulted) > 4, name
    own_world.check("one")


@pytest.mark.soak
@pytest.mark.parametrize("when", ["before the removal", "during the removal"])
def test_vcenter_restarts_after_the_export(own_world: World, when: str) -> None:
    simulator = own_world.simulator
    if when == "during the removal":
        # The task is lost with vCenter, and the snapshot still stands in the tree.
        own_world.control("inject", target="task", name="RemoveSnapshot_Task", fault="Timedout", delay=600)
    options: Dict[str, Any] = {"change_tracking": False, "snapshot_removal_retries": 60, "snapshot_removal_delay": 1}
    if when == "before the removal":
        # A module would wait for vCenter, and this is about tries that fail.
        options["reconnect_timeout"] = 1
    running = own_world.role("one", **options)
    own_world.wait_for(lambda: own_world.points() == ["one"], running.process)
    if when == "during the removal":
        own_world.wait_for(lambda: "RemoveSnapshot_Task" in simulator.changing_calls(0), running.process)
    port = simulator.facts["port"]
    simulator.stop()
    if when == "before the removal":
        # One try at least finds no vCenter.
        own_world.wait_for(lambda: own_world.runs_now("vm_snapshot"), running.process)
        own_world.wait_for(lambda: not own_world.runs_now("vm_snapshot"), running.process)
    simulator.start(port)
    running.wait().ok()
    own_world.check("one")
    own_world.back_up("two", "one")


# The control node


@pytest.mark.parametrize("who", [pytest.param("ansible-playbook", marks=pytest.mark.soak), "all of Ansible"])
def test_the_control_node_is_gone(world: World, who: str) -> None:
    """The second time nbdkit waits for a host that is silent, and does not end by being told to."""
    running = world.role("one", change_tracking=False, rate_limit=SLOW)
    world.wait_in_copy(running.process)
    workers = _children(running.process.pid)
    assert workers
    if who == "ansible-playbook":
        workers = []
    else:
        world.control("cut_network", mode="blackhole")
    for pid in [running.process.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    world.gone(time.monotonic())
    world.control("restore_network")
    assert running.process.wait() == -signal.SIGKILL
    world.recovers()


@pytest.mark.skipif(not sshd.available(), reason="no SSH server: run tests/setup.sh tests")
def test_the_control_node_is_gone_and_the_proxy_is_another_machine(world: World, tmp_path: Path) -> None:
    inherited = " ".join(f"{name}={os.environ[name]}" for name in (MARK, "TMPDIR"))
    with sshd.Sshd(tmp_path / "sshd", [f"SetEnv {inherited}"]) as server:
        proxy = dict(server.inventory_variables(), ansible_async_dir=str(tmp_path / "async"))
        proxy["ansible_python_interpreter"] = str(world.backups.ansible.venv / "bin" / "python")
        world.hosts = {"proxy": proxy}
        running = world.role("one", change_tracking=False, rate_limit=SLOW, proxy="proxy")
        world.wait_in_copy(running.process)
        running.process.kill()
        world.gone(time.monotonic())
        running.process.wait()
        world.recovers()


def _children(pid: int) -> List[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Calls


def _calls(world: World, since: int) -> int:
    """How many there were. Looks at a task until it has ended are one, however long the machine takes for it."""
    calls = world.control("calls", since=since)
    looks = [tuple(call["reads"]) for call in calls if str((call.get("reads") or [""])[0]).startswith("task-")]
    return len(calls) - len(looks) + len(set(looks))


def test_a_backup_does_with_few_calls(own_world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Role vm_backup, one disk, change tracking to be turned on; and an export whose point is complete."""
    simulator = own_world.simulator
    figures = {}
    for name, bound in (("api_calls_full_backup", FULL_CALLS), ("api_calls_next_full_backup", FULL_CALLS)):
        seen = simulator.last_call()
        own_world.role(name, disks=["2000"], transports=["san", "hotadd", "nbdssl", "nbd", "https"]).wait().ok()
        figures[name] = (_calls(own_world, seen), bound)
    seen = simulator.last_call()
    options = own_world.modules.export_options(snapshot_name="gone", point="api_calls_full_backup")
    assert own_world.modules.done("vadp_disk_export", **options)["changed"] is False
    figures["api_calls_noop_export"] = (_calls(own_world, seen), NOOP_CALLS)
    with capsys.disabled():
        print("".join(f"\n{name} {count} (at most {bound})" for name, (count, bound) in figures.items()))
    assert all(0 < count <= bound for count, bound in figures.values()), figures
