# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Records of runs that somebody has planted, copied or changed: a recovery destroys nothing that was not ours.

Around the machine whose repository it is there is all that a record can name: another machine that is off, snapshots of
others, processes of others, files outside of the repository, files of points, and a run that is at work. Each record is
a true one with other intents and fields, or a broken one; after the recovery all of that is as it was, whatever the
recovery said, and it said it without a traceback.

SOAK_RECORDS: how many (16). SOAK_SEED: which ones (1).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import start_time
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.proof import boot_id, machine_id, pid_namespace
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id
from world import Machine, World

RECORDS = int(os.environ.get("SOAK_RECORDS", "16"))
SEED = int(os.environ.get("SOAK_SEED", "1"))


class Surroundings:
    """What must be the same afterwards."""

    def __init__(self, machine: Machine, victim: Machine, process: "subprocess.Popen[bytes]") -> None:
        self.machine, self.victim, self.process = machine, victim, process
        self.outside = machine.folder / "outside.part-0123456789ab"
        self.outside.write_text("not ours")
        store = machine.job.store
        with store.lock(new_run_id(), "test"):
            self.busy = store.create_run("busy", vm_moid=machine.moid, controller=True)
            self.busy.record("temporary_file", files=["disk-2000/busy.qcow2"])
        self.theirs = machine.freeze().moid
        self.busy_file = machine.store_folder / "disk-2000" / f"busy.qcow2.part-{self.busy.run_id}"
        self.busy_file.write_text("of a run that is at work")
        self.instance_uuid = str(victim.job.uuid)
        self.before = self.seen()

    def seen(self) -> Dict[str, Any]:
        """Machines, snapshots, processes and files; records, locks and the counter of points apart."""
        state = self.machine.world.control.call("state")
        files = {}
        for folder in (self.machine.repository, self.victim.repository):
            for path in folder.rglob("*"):
                if path.is_file() and "runs" not in path.parts and path.name not in ("lock", "vm.json"):
                    files[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
        return {
            "machines": {
                moid: (vm["name"], vm["power_state"], [one["moid"] for one in vm["snapshots"]], len(vm["disks"]))
                for moid, vm in state["vms"].items()
            },
            "process": self.process.poll(),
            "outside": self.outside.read_text(),
            "files": files,
        }


@pytest.fixture
def surroundings(world: World) -> Iterator[Surroundings]:
    machine, victim = world.new_machine(), world.new_machine()
    for one in (machine, victim):
        one.scribble(1)
        one.job.back_up("p1")
    victim.power("poweredOff")
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield Surroundings(machine, victim, process)
        finally:
            process.kill()


def _intent(source: random.Random, around: Surroundings) -> Dict[str, Any]:
    """Something that a recovery acts upon, about something that is not ours."""
    pid = source.choice([around.process.pid, os.getpid(), 1, 2, 0, 4194304])
    paths = [
        "disk-2000/p1.qcow2",
        "disk-2000/p1.hashes",
        "configs/p1.json",
        "points/p1.json",
        "vm.json",
        "lock",
        "../../../outside.part-0123456789ab",
        str(around.outside),
        str(around.busy_file),
        f"disk-2000/{around.busy_file.name}",
        "",
        ".",
        "/etc/hostname",
    ]
    kind = source.choice(
        ["process", "snapshot", "attachment", "access", "temporary_file", "restore", "restore", "task"]
    )
    fields: Dict[str, Dict[str, Any]] = {
        "process": {"name": "qemu-nbd", "pid": pid, "start_time": source.choice([start_time(pid) or 0, 0, 1])},
        "snapshot": {
            "name": source.choice(["openvadp p1", "x"]),
            "vm_moid": source.choice([around.machine.moid, around.victim.moid]),
            "moid": source.choice([around.theirs, None, "snapshot-1"]),
            "server_uuid": source.choice([_server(around), None, "other"]),
        },
        "attachment": _attachment(source, around),
        "access": {"vm_moid": around.machine.moid, "identity": source.choice(["openvadp x", "somebody else"])},
        "temporary_file": {
            "key": 2000,
            "files": source.sample(paths, 4),
            "stage": source.choice(paths),
            "lease": source.choice([None, around.victim.moid, "lease-1"]),
        },
        "restore": {
            "target": source.choice(["new_vm", "new_vm", "in_place"]),
            "name": around.victim.name,
            "vm_uuid": source.choice([around.instance_uuid, around.machine.job.uuid]),
            "vm_moid": source.choice([around.victim.moid, around.machine.moid, None]),
            "instance_uuid": source.choice([around.instance_uuid, around.machine.job.uuid]),
            "folder_moid": "group-v1",
            "on_failure": source.choice(["remove", "keep"]),
            "complete": source.random() < 0.1,
            "leased": source.random() < 0.2,
            "point": "p1",
            "disks": [2000],
            "half_written": [],
            "made_disks": source.choice([None, [], _disks_of(around.victim)]),
        },
        "task": {"task": source.choice(["task-1", "task-99999"]), "failed": "x", "server_uuid": _server(around)},
    }
    return {"what": kind, **fields[kind]}


def _attachment(source: random.Random, around: Surroundings) -> Dict[str, Any]:
    """A disk that a machine has of its own, as vCenter shows it, said to be attached to it for a backup."""
    machines = [(around.victim, around.instance_uuid), (around.machine, str(around.machine.job.uuid))]
    proxy, proxy_uuid = source.choice(machines)
    machine, machine_uuid = source.choice(machines)
    disk = source.choice(_disks_of(proxy))
    return {
        "server_uuid": _server(around),
        "proxy_moid": source.choice([proxy.moid, proxy.moid, proxy.moid, "vm-9999"]),
        "proxy_uuid": proxy_uuid,
        "file": disk["file"],
        "disk_uuid": disk["uuid"],
        "vm_moid": machine.moid,
        "vm_uuid": machine_uuid,
        "access": source.choice(["read", "write", "write"]),
        "device_key": source.choice([disk["key"], disk["key"], None]),
        "bus": 0,
        "unit": 0,
    }


def _server(around: Surroundings) -> str:
    with around.machine.job.connect() as session:
        return str(session.server_uuid)


def _disks_of(machine: Machine) -> List[Dict[str, Any]]:
    with machine.job.connect() as session:
        from ansible_collections.openvadp.backup.plugins.module_utils.libraries import vim
        from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import new_machine

        obj = vim.VirtualMachine(machine.moid, session.stub)
        return new_machine.made_disks(session.read(obj, "config")["config"])


def _record(source: random.Random, around: Surroundings, number: int) -> Dict[str, Any]:
    run_id = new_run_id()
    intents = [_intent(source, around) for _unused in range(source.randrange(1, 5))]
    record: Dict[str, Any] = dict(around.busy.data, run_id=run_id, controller=source.random() < 0.5)
    record.update(
        intents=[dict(one, id=n + 1, recorded=record["started"]) for n, one in enumerate(intents)],
        deadline="2026-01-01T00:00:00Z",
        point=source.choice([None, "p1", "busy", "new"]),
        server_uuid=source.choice([_server(around), _server(around), None]),
        boot_id=source.choice([boot_id(), "00000000-0000-0000-0000-000000000000"]),
        pid_namespace=source.choice([pid_namespace(), "pid:[1]"]),
        machine=source.choice([machine_id(), "another"]),
        vm_moid=source.choice([around.machine.moid, around.victim.moid]),
    )
    if number % 5 == 3:
        record["repository_id"] = "00000000-0000-0000-0000-000000000001"
    if number % 5 == 4:
        record.update(format=1, run_id="20261122T084203.417123Z-3f9a2b1c")
    return record


def _written(source: random.Random, record: Dict[str, Any], folder: Path) -> Path:
    """As it is, or with one thing changed to something that no code of ours would write."""
    text = json.dumps(record)
    if source.random() < 0.3:
        where: Any = record
        if record["intents"] and source.random() < 0.7:
            where = source.choice(record["intents"])
        where[source.choice(sorted(where))] = source.choice(
            [None, True, -1, 1 << 80, "", "x" * 5000, [], {}, [[]], 1.5]
        )
        text = json.dumps(record)
    if source.random() < 0.1:
        text = text[: source.randrange(len(text))]
    path = folder / f"{record['run_id'] if isinstance(record['run_id'], str) else new_run_id()}.json"
    path.write_text(text)
    return path


def test_no_record_destroys_what_is_not_ours(surroundings: Surroundings, report: Callable[[str], None]) -> None:
    source = random.Random(SEED)
    folder = surroundings.machine.store_folder / "runs"
    refused = told = 0
    for number in range(RECORDS):
        record = _record(source, surroundings, number)
        path = _written(source, record, folder)
        options: Dict[str, Any] = source.choice(
            [{}, {"begin": True, "point": f"n{number}"}, {"run_id": path.stem}, {"run_id": path.stem, "force": True}]
        )
        # The busy run keeps everybody away; what is looked at here is what becomes of the others.
        surroundings.busy._change(controller=True)
        data, busy = surroundings.busy.path.read_bytes(), surroundings.busy.path
        if "run_id" not in options:
            busy.unlink()
        try:
            result = surroundings.machine.job.recover(**options)
            told += bool(result["warnings"])
        except VadpError:
            refused += 1
        finally:
            busy.write_bytes(data)
            for left in folder.glob("*.json"):
                if left != busy:
                    left.unlink()
        seen = surroundings.seen()
        if "run_id" not in options and str(surroundings.busy_file) not in seen["files"]:
            # Without its record it was an unfinished file of nobody.
            surroundings.busy_file.write_text("of a run that is at work")
            seen = surroundings.seen()
            surroundings.before["files"][str(surroundings.busy_file)] = seen["files"][str(surroundings.busy_file)]
        assert seen == surroundings.before, f"record {number} (seed {SEED}): {json.dumps(record)}; {options}"
    report(f"records: {RECORDS}, of which {refused} were refused and {told} told of; nothing destroyed (seed {SEED})")


def test_a_run_that_is_at_work_is_left_alone(surroundings: Surroundings) -> None:
    for options in ({}, {"begin": True, "point": "p2"}):
        with pytest.raises(VadpError, match=surroundings.busy.run_id):
            surroundings.machine.job.recover(**options)
        assert surroundings.seen() == surroundings.before
        assert Run.load(surroundings.busy.path).data == surroundings.busy.data
