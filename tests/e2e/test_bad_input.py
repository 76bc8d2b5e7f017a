# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Bad input: a clear error that names the remedy, nothing touched, nothing left behind.

The cases are listed in bad_input.yml. They share two simulators, one for what a backup can be told wrongly and one for
restores. The world is looked at before and after each case. Only the cases that are asked for (``-k``) are run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import yaml
from administrator import Administrator
from evidence import Evidence
from harness import MIB, ROOT, Simulator, adopted, made_repository
from modules import Modules, server

Options = Dict[str, Any]
Tasks = List[Dict[str, Any]]

TABLE: Dict[str, List[Options]] = yaml.safe_load(Path(__file__).with_name("bad_input.yml").read_text(encoding="utf-8"))
CASES = [case for cases in TABLE.values() for case in cases]

# All cases are run by the first test.
pytestmark = pytest.mark.timeout(900)

EXPORT = "vadp_disk_export"
RESTORE = "vadp_disk_restore"
MODULES = (EXPORT, RESTORE, "in_place", "vm_snapshot", "vm_change_tracking", "vadp_recover", "restore_point_verify")
PARTS = ("what", "subject", "reason", "remedy")
PROGRAMS = ("nbdkit", "qemu-img", "qemu-nbd", "setpriv", "sh", "sleep", "true")

# The distributions whose package of nbdkit's VDDK plugin is not nbdkit-plugin-vddk (VADP facts 39).
PLUGIN_PACKAGES = {"fedora": "nbdkit-vddk-plugin", "rhel": "nbdkit-vddk-plugin", "centos": "nbdkit-vddk-plugin"}

HOLDER = """
import sys
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
with Repository.open(sys.argv[1]).find_vm(vm_name="db01").lock("20261122T084203.000000Z-holder", "a long backup"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@dataclass
class Task:
    """A module that was run: what it said, and the evidence of a case."""

    site: Site
    result: Options
    evidence: Options


class Site:
    """A simulator, repositories and folders that many cases use.

    ``words`` are what stands in braces in the table.
    """

    def __init__(self, folder: Path, vms: str, stack: ExitStack) -> None:
        self.folder = folder
        folder.mkdir()
        self.stack = stack
        self.simulator = Simulator(folder / "state", vms=vms)
        stack.callback(self.simulator.stop)
        self.watched = folder / "watched"
        self.watched.mkdir()
        self.repository = made_repository(self.watched / "repository")
        (self.watched / "file").write_text("neither a folder nor a certificate", encoding="utf-8")
        # A folder for sockets has to have a short path, or it is made elsewhere.
        self.temporary = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
        stack.callback(shutil.rmtree, self.temporary)
        self.evidence = Evidence(self.simulator.control, self.watched, self.temporary)
        self.can_mount = True
        with socket.create_server(("127.0.0.1", 0)) as listener:
            closed = listener.getsockname()[1]
        facts = self.simulator.facts
        self.words = {"watched": self.watched, "folder": folder, "long": "x" * 300, "closed_port": closed}
        self.words.update(nfc_port=facts["nfc_port"])
        self.connection = self.simulator.connection
        # What fails there is not made good by a transport without VDDK.
        lan = ["nbdssl", "nbd"]
        self.vddk = {"vddk_libdir": facts["vddk_libdir"], "nfc_port": facts["nfc_port"], "transports": lan}

    def options(self, module: str) -> Options:
        """Options that work."""
        raise NotImplementedError

    def task(self, case: Options) -> Tasks:
        """A case with what has to be done around it."""
        name = case["name"]
        [module] = [module for module in MODULES if module in case]
        options = {**self.options(module), **self._filled(case[module])}
        options = {key: value for key, value in options.items() if value is not None}
        task: Options = {"name": f"case {name}", RESTORE if module == "in_place" else module: options}
        if "programs" in case:
            task["environment"] = {"PATH": str(self.folder / case["programs"])}
        before, after = ([case[side]] if side in case else [] for side in ("before", "after"))
        if "lacking" in case:
            change = {"op": "set_privileges", "username": self.connection["username"]}
            before, after = ([{**change, verb: [case["lacking"]]}] for verb in ("remove", "add"))
        scene, clearing = ([{"name": f"around {name}", "simulator": op} for op in side] for side in (before, after))
        return [*scene, task, *clearing]

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item) for item in value]
        return value.format(**self.words) if isinstance(value, str) else value

    def perform(self, tasks: Tasks) -> Dict[str, Task]:
        """Do one after the other: ops on the simulator, modules, cases. :returns: those that have a name."""
        found: Dict[str, Task] = {}
        for task in tasks:
            name = task.get("name", "")
            if "simulator" in task:
                self.simulator.control.call(**task["simulator"])
                continue
            [module] = [module for module in MODULES if module in task]
            done = Task(self, {}, {})

            def work(done: Task = done, module: str = module, task: Options = task) -> None:
                environment = {**self.evidence.environment, **task.get("environment", {})}
                process = server().start(module, task[module], self.folder, environment)
                done.result.update({"changed": False, **Modules.result(process)})

            if name.startswith("case "):
                done.evidence.update(self.evidence.around(work))
            else:
                work()
            assert name or not done.result["failed"], done.result
            found[name] = done
        return found

    # Setting the scene

    def make_folder(self, name: str) -> Path:
        folder = self.watched / name
        folder.mkdir()
        return folder

    def copy(self, name: str) -> Path:
        """A copy of the repository, times included; it may be written."""
        return adopted(Path(shutil.copytree(self.repository, self.watched / name)))

    def layer(self, repository: Path, point: str, key: int = 2000) -> Path:
        return next(repository.glob(f"vms/*/disk-{key}/{point}.qcow2"))

    def damage(self, point: str, key: int) -> None:
        """Copies of the repository without a layer, with a part of it, and with one bit changed."""
        self.layer(self.copy("missing"), point, key).unlink()
        cut = self.layer(self.copy("cut"), point, key)
        os.truncate(cut, cut.stat().st_size - 65536)
        flipped = self.layer(self.copy("flipped"), point, key)
        content = flipped.read_bytes()
        flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    def mount(self, source: str, name: str, *arguments: str) -> Path:
        """Mount something in a new folder until the end; where that is not allowed, ``can_mount`` says so."""
        folder = self.make_folder(name)
        done = subprocess.run(["mount", *arguments, source, str(folder)], check=False, capture_output=True)
        self.can_mount = self.can_mount and done.returncode == 0
        if done.returncode == 0:
            self.stack.callback(subprocess.run, ["umount", str(folder)], check=True)
        return folder


class BackupSite(Site):
    """db01 has a restore point "one", and a snapshot "nightly" that was made after it. Its disk changed in between."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, "standard", stack)
        administrator = Administrator(self.simulator.facts, "copy01")
        administrator.pass_through()
        administrator.close()
        self.words["bios_uuid"] = self.simulator.vm("copy01")["bios_uuid"]
        self.simulator.write("db01", 2000, 32 * MIB, length=4 * MIB)
        vm = {**self.connection, "name": "db01"}
        first = {**vm, "snapshot_name": "first"}
        self.setup: Tasks = [
            {"vm_change_tracking": vm},
            {"vm_snapshot": {**first, "quiesce": "never"}},
            {EXPORT: {**self.options(EXPORT), **first, "point": "one"}},
            {"vm_snapshot": {**first, "state": "absent"}},
            {"simulator": {"op": "guest_discard", "vm": "db01", "disk": 2000, "offset": 32 * MIB, "length": MIB}},
            {"vm_snapshot": {**vm, "snapshot_name": "nightly", "quiesce": "never"}},
        ]

    def options(self, module: str) -> Options:
        vm = {**self.connection, "name": "db01"}
        repository = {"repository": str(self.repository)}
        return {
            EXPORT: {**vm, **self.vddk, **repository, "snapshot_name": "nightly", "point": "two"},
            "vm_snapshot": {**vm, "snapshot_name": "new"},
            "vm_change_tracking": vm,
            "vadp_recover": {**vm, **repository, "begin": True},
            "restore_point_verify": {**repository, "vm_name": "db01", "point": "one"},
        }[module]

    def prepare(self) -> None:
        """The repositories, VDDKs and programs that the cases name."""
        self.make_folder("empty")
        self.mount("tmpfs", "tmpfs", "-t", "tmpfs", "-o", "size=1m")
        shutil.copytree(self.repository, self.watched / "copied")
        (self.make_folder("photos") / "holiday.jpg").write_bytes(b"JFIF")
        newer = self.copy("newer") / "repository.json"
        newer.write_text(json.dumps({**json.loads(newer.read_text()), "format": 3}), encoding="utf-8")
        self.damage("one", 2000)
        self._small_repositories()
        self._hold_lock(self.copy("locked"))
        # Nobody can write there, root neither.
        read_only = self.mount(str(self.repository), "read-only", "--bind")
        if self.can_mount:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(read_only)], check=True)
        for name in PROGRAMS[:2]:
            self._programs(f"no-{name}", *[program for program in PROGRAMS if program != name])
        # nbdkit's folder of plugins is built into it, so the plugin is looked for where there is none.
        wrapper = self._programs("no-plugin", *PROGRAMS[1:]) / "nbdkit"
        plugin = "/nonexistent/nbdkit-vddk-plugin.so"
        wrapper.write_text(f'#!/bin/sh\nshift\nexec {shutil.which("nbdkit")} {plugin} "$@"\n', encoding="utf-8")
        wrapper.chmod(0o755)
        # As much of a library for aarch64 as its ELF header.
        header = bytearray(b"\x7fELF\x02\x01\x01".ljust(64, b"\0"))
        header[16:20] = (3).to_bytes(2, "little") + (183).to_bytes(2, "little")
        for folder in (self.folder / "arm" / "lib64", self.folder / "flat"):
            folder.mkdir(parents=True)
            (folder / "libvixDiskLib.so.8").write_bytes(bytes(header))

    def _small_repositories(self) -> None:
        """One with room for a part of a full point, and one without any."""
        stored = sum(path.stat().st_size for path in self.repository.rglob("*") if path.is_file())
        for name, room in (("small", 3 * MIB), ("full", 0)):
            image = self.folder / f"{name}.img"
            with image.open("wb") as file:
                file.truncate(stored + 16 * MIB)
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "512", "-O", "^has_journal", str(image)], check=True)
            folder = self.mount(str(image), name, "-o", "loop")
            if self.can_mount:
                shutil.copytree(self.repository, folder, dirs_exist_ok=True)
                adopted(folder)
                _fill(folder / "lost+found" / "filler", room)

    def _programs(self, name: str, *programs: str) -> Path:
        """A search path with these programs alone."""
        folder = self.folder / name
        folder.mkdir()
        for program in programs:
            (folder / program).symlink_to(str(shutil.which(program)))
        return folder

    def _hold_lock(self, repository: Path) -> None:
        """Another process holds the VM's lock until the end."""
        command = [str(ROOT / ".venv" / "bin" / "python"), "-c", HOLDER, str(repository)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "build" / "tree")}
        pipe = subprocess.PIPE
        holder = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert holder.stdin is not None and holder.stdout is not None
        self.stack.callback(holder.wait, 30)
        self.stack.callback(holder.stdin.close)
        assert holder.stdout.readline() == "locked\n"

    def told(self) -> Tasks:
        """What goes on and says so. All of it changes something, so it comes last."""
        vm = {**self.connection, "name": "db01"}
        preferred = {**vm, "snapshot_name": "new", "quiesce": "preferred"}
        absent = {"vm_snapshot": {**vm, "snapshot_name": "new", "state": "absent"}}
        fault = {"op": "inject", "target": "task", "name": "CreateSnapshotEx_Task", "fault": "FilesystemQuiesceFault"}
        missing, flipped = ({"repository": str(self.watched / name)} for name in ("missing", "flipped"))
        export = self.options(EXPORT)
        told = {
            "told: no parent": {EXPORT: {**export, **missing}},
            "told: nothing": {EXPORT: {**export, **flipped}},
            "told: damage": {"restore_point_verify": {**flipped, "vm_name": "db01", "point": "two"}},
        }
        unquiesced = {"vm_snapshot": preferred}
        return [
            {"simulator": {"op": "set_tools", "vm": "db01", "running": False}},
            {"name": "told: Tools do not run", **unquiesced},
            {"simulator": {"op": "set_tools", "vm": "db01", "running": True}},
            absent,
            {"simulator": fault},
            {"name": "told: the guest fails", **unquiesced},
            absent,
            *[{"name": name, **task} for name, task in told.items()],
        ]


class RestoreSite(Site):
    """app01 has the restore points "full" and "incremental" and is off; so is restore01, whose disks are as large."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, "minimal", stack)
        vm = {**self.connection, "name": "app01"}
        written = {"vm": "app01", "disk": 2001, "offset": 0, "pattern": {"seed": 3, "length": 2 * MIB}}
        self.setup: Tasks = [{"vm_change_tracking": vm}]
        for point in ("full", "incremental"):
            named = {**vm, "snapshot_name": point}
            export = {**named, **self.vddk, "repository": str(self.repository), "point": point}
            self.setup += [
                {"simulator": {"op": "guest_write", **written}},
                {"vm_snapshot": {**named, "quiesce": "never"}},
                {EXPORT: export},
                {"vm_snapshot": {**named, "state": "absent"}},
            ]
        self.setup.append({"simulator": {"op": "power", "vm": "app01", "state": "poweredOff"}})

    def options(self, module: str) -> Options:
        repository = {"repository": str(self.repository)}
        point = {**repository, "vm_name": "app01"}
        app01 = {**self.connection, "name": "app01"}
        disks = [{"key": key, "target_key": key} for key in (2000, 2001)]
        restore01 = {**self.connection, **self.vddk, "name": "restore01", "disks": disks, "overwrite": True}
        return {
            RESTORE: {**point, "dest": str(self.watched / "dest")},
            "in_place": {**point, **restore01, "target": "in_place"},
            EXPORT: {**app01, **repository, **self.vddk, "snapshot_name": "full", "point": "two"},
            "vm_snapshot": {**app01, "snapshot_name": "new"},
            "vadp_recover": {**app01, **repository, "begin": True},
        }[module]

    def prepare(self) -> None:
        """The repositories and folders that the cases name."""
        self.make_folder("dest")
        occupied = self.make_folder("occupied") / "app01-hard-disk-1-2000.raw"
        occupied.write_bytes(b"something else")
        (self.make_folder("linked") / occupied.name).symlink_to(occupied)
        self.damage("full", 2001)
        store = next(self.copy("twice").glob("vms/*"))
        other = store.with_name("500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a")
        shutil.copytree(store, other)
        facts = json.loads((store / "vm.json").read_text())
        facts.update(vm_uuid=other.name, path="/DC1/vm/app01")
        (other / "vm.json").write_text(json.dumps(facts), encoding="utf-8")
        self.mount("tmpfs", "small", "-t", "tmpfs", "-o", f"size={MIB}")
        self.mount("tmpfs", "read-only", "-t", "tmpfs", "-o", "size=64m,ro")

    def around_a_snapshot(self) -> Tasks:
        """The cases for which restore01 has a snapshot, then what a removal without consolidation leaves."""
        vm = {**self.connection, "name": "restore01", "snapshot_name": "mine"}
        there, removed = TABLE["snapshots"]
        return [
            {"vm_snapshot": vm},
            *self.task(there),
            {"vm_snapshot": {**vm, "state": "absent", "consolidate": False}},
            *self.task(removed),
        ]


@pytest.fixture(scope="module")
def tasks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, Task]]:
    """All that was done, by name. Cases that need a mount are missing where this machine does not let us."""
    folder = tmp_path_factory.mktemp("bad-input")
    items = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["case"]["name"] for item in items if hasattr(item, "callspec")}
    with ExitStack() as stack:
        backups, restores = BackupSite(folder / "backups", stack), RestoreSite(folder / "restores", stack)
        for site in (backups, restores):
            site.perform(site.setup)
            site.prepare()
        found: Dict[str, Task] = {}
        for site, cases in ((backups, TABLE["backups"]), (restores, TABLE["anywhere"] + TABLE["restores"])):
            possible = [case for case in cases if site.can_mount or not case.get("mount")]
            found.update(site.perform([task for case in possible if case["name"] in asked for task in site.task(case)]))
        if any(item.name.startswith("test_told") for item in items):
            found.update(backups.perform(backups.told()))
        if any(case["name"] in asked for case in TABLE["snapshots"]):
            found.update(restores.perform(restores.around_a_snapshot()))
        yield found


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_refused(case: Options, tasks: Dict[str, Task]) -> None:
    name = f"case {case['name']}"
    if name not in tasks:
        pytest.skip("this machine does not let us mount file systems")
    task = tasks[name]
    _check_message(case, task)
    assert [call for call in task.evidence["changing"] if call != case.get("changing")] == []
    before, after = task.evidence["before"], task.evidence["after"]
    assert after["processes"] == [] and after["temporary"] == before["temporary"]
    assert (after["vms"], after["sessions"]) == (before["vms"], before["sessions"])
    files = [_files(picture, begun=case.get("begun", False)) for picture in (before, after)]
    changed = [path for path in {**files[0], **files[1]} if files[0].get(path) != files[1].get(path)]
    assert changed == [], [(path, files[0].get(path), files[1].get(path)) for path in changed]


def _fill(path: Path, room: int) -> None:
    """Leave that many bytes of a file system, about; with 0, not a block."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            status = os.statvfs(path)
            free = status.f_bavail * status.f_frsize - room
            if room and free <= 0:
                return
            file.write(bytes(min(MIB, free) if free > 0 else 1))
            os.fsync(file.fileno())


def _check_message(case: Options, task: Task) -> None:
    result = task.result
    assert result["failed"] and not result["changed"], result
    message = str(result["msg"])
    assert "Traceback" not in message
    assert task.site.connection["password"] not in json.dumps(result)
    if "error" not in case:
        assert case["says"] in message
        return
    error = result["error"]
    assert error["kind"] == case["error"], error
    for part, words in zip(PARTS, case["says"]):
        for word in words if isinstance(words, list) else [words]:
            assert word in (error[part] or ""), (part, word, error)
        # Whoever sees the message alone misses nothing.
        assert (error[part] or "").rstrip(". ") in message, (part, error, message)


def _files(picture: Options, begun: bool) -> Dict[str, List[Any]]:
    """{path: [mode, size, time of the last change]}; without the times that a run changes which begins and fails."""
    found = dict(picture["files"])
    for path, (mode, size, _changed) in picture["files"].items() if begun else ():
        if mode & 0o170000 == 0o040000:
            found[path] = [mode]
        elif path.endswith("/lock"):
            found[path] = [mode, size]
        elif path.endswith("/vm.json"):  # the number that was drawn for the point stays drawn
            found[path] = [mode]
    return found


def test_told_that_the_guest_was_not_quiesced(tasks: Dict[str, Task]) -> None:
    """Requested and achieved are told apart, and why; the snapshot is made."""
    for name, reason in (
        ("told: Tools do not run", "VMware Tools don't run in the guest"),
        ("told: the guest fails", "FilesystemQuiesceFault"),
    ):
        result = tasks[name].result
        assert result["changed"] and result["snapshot"]["moid"], result
        quiesce = result["quiesce"]
        assert (quiesce["requested"], quiesce["achieved"]) == ("preferred", "crash-consistent")
        assert reason in quiesce["reason"]
        assert f"is crash-consistent only: {quiesce['reason']}" in str(result["warnings"])


def test_told_that_the_parent_is_missing(tasks: Dict[str, Task]) -> None:
    """Mode auto makes a full of the disk, and says why."""
    result = tasks["told: no parent"].result
    assert not result["failed"], result
    disk = result["disks"][0]
    assert (disk["mode"], disk["parent"]) == ("full", None)
    assert "layer of point one can't be built upon: the file is missing" in disk["reason"]


def test_told_by_verification_that_a_parents_content_changed(tasks: Dict[str, Task]) -> None:
    """An export looks at the sizes of the layers that it builds upon; what is in them only a verification reads."""
    result = tasks["told: nothing"].result
    assert not result["failed"], result
    disk = result["disks"][0]
    assert (disk["mode"], disk["parent"]) == ("incremental", "one")
    verified = tasks["told: damage"].result
    assert verified["failed"] and "point one: " in verified["msg"], verified["msg"]
    assert "content changed since it was written" in verified["msg"]


@pytest.mark.parametrize("case", [case for case in CASES if case["name"] in ("nbdkit missing", "plugin missing")])
def test_what_to_install_is_said_for_this_distribution(case: Options, tasks: Dict[str, Task]) -> None:
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split("=", 1) for line in lines if "=" in line)
    package = PLUGIN_PACKAGES.get(facts["ID"].strip('"'), "nbdkit-plugin-vddk")
    message = str(tasks[f"case {case['name']}"].result["msg"])
    assert package in message, message
