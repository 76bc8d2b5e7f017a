# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The budget of connections to each ESXi host, over all modules that run on a proxy."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from administrator import Administrator
from harness import MIB, Simulator, made_repository
from modules import Modules, Process

HOST = "127.0.1.1"
MACHINES = ("app01", "restore01", "win01")
DISKS_EACH = 10
LIMIT = 8
CONNECTION_BYTES = 4 * MIB
LONG = 120
FOLDER = Path(f"/var/tmp/openvadp-budget-{os.getuid()}")


class Machine:
    """A virtual machine with small disks, its modules, and a snapshot of it."""

    def __init__(self, simulator: Simulator, repository: Path, name: str) -> None:
        self.modules = Modules(simulator, repository, name)
        administrator = Administrator(simulator.facts, name)
        try:
            units = [unit for unit in range(4, 15) if unit != 7][:DISKS_EACH]
            self.keys = [administrator.add_disk(unit, MIB) for unit in units]
        finally:
            administrator.close()
        for key in self.keys:
            simulator.write(name, key, 0, MIB // 2, seed=key)
        self.moid = self.modules.snapshot("budget")

    def start(self, point: str, **options: Any) -> Process:
        """Export the small disks, all at once."""
        options = {"parallel_disks": DISKS_EACH, "disks": [str(key) for key in self.keys], **options}
        options = self.modules.export_options(snapshot_moid=self.moid, point=point, mode="full", **options)
        return self.modules.start("vadp_disk_export", {"transports": ["nbdssl"], **options})

    def done(self, process: Process, point: str) -> None:
        """The export succeeds, and the point holds what the disks hold."""
        result = self.modules.result(process)
        assert not result["failed"], result
        assert sorted(disk["key"] for disk in result["disks"] if not disk["skipped"]) == self.keys
        simulator, vm = self.modules.simulator, self.modules.vm
        for key in self.keys:
            assert self.modules.backups.disk(vm, key, point) == simulator.disk(vm, key, self.moid), key


@pytest.fixture(scope="module")
def machines(simulator: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[List[Machine]]:
    """Three machines with ten small disks each; one host serves them all."""
    repository = tmp_path_factory.mktemp("budget") / "repository"
    made_repository(repository)
    found = [Machine(simulator, repository, name) for name in MACHINES]
    yield found
    assert not entries(found), "something is left behind"


@pytest.fixture(autouse=True)
def host(simulator: Simulator, machines: List[Machine]) -> Iterator[Callable[..., Dict[str, Any]]]:
    """What the simulated host that serves all disks is told, and what it has seen."""

    def nfc(**fields: Any) -> Dict[str, Any]:
        return dict(simulator.control.call("nfc", **fields)["hosts"][HOST])

    nfc(serve=HOST, reset_peaks=True)
    yield nfc
    nfc(serve=None, max_connections=None, memory_bytes=None, delay=0)


def entries(machines: List[Machine]) -> List[Dict[str, Any]]:
    """Who holds or awaits a connection to this vCenter's hosts now; other tests have others."""
    server = machines[0].modules.simulator.control.call("state")["instance_uuid"]
    try:
        found = json.loads((FOLDER / "budget.json").read_text(encoding="utf-8"))["entries"]
    except FileNotFoundError:
        return []
    return [entry for entry in found if entry["server"] == server]


def test_thirty_disks_at_once_never_exceed_a_host(machines: List[Machine], host: Callable[..., Dict[str, Any]]) -> None:
    """The host refuses the ninth, and whatever exceeds its memory: nobody is refused, and all finish."""
    before = host()
    host(max_connections=LIMIT, memory_bytes=LIMIT * CONNECTION_BYTES, when_full="refuse", delay=0.02)
    processes = [machine.start("all", nfc_host_limit=LIMIT) for machine in machines]
    for machine, process in zip(machines, processes):
        machine.done(process, "all")
    seen = host()
    assert seen["refused"] == before["refused"]
    assert LIMIT // 2 < seen["peak"] <= LIMIT
    # Each disk is opened once to see that it can be, and once to be read.
    assert seen["opened"] - before["opened"] == 2 * DISKS_EACH * len(MACHINES)


def test_without_a_limit_a_host_gets_what_it_bears(
    machines: List[Machine], host: Callable[..., Dict[str, Any]]
) -> None:
    """48 MiB by buffers of 4 MiB: twelve disks."""
    before = host()
    host(memory_bytes=48 * MIB, when_full="refuse", delay=0.05)
    processes = [machine.start("memory") for machine in machines]
    for machine, process in zip(machines, processes):
        machine.done(process, "memory")
    assert host()["refused"] == before["refused"] and host()["peak"] <= 12


def test_what_a_killed_module_held_goes_to_who_waits_and_waiting_is_seen(
    machines: List[Machine], host: Callable[..., Dict[str, Any]], tmp_path: Path
) -> None:
    first, second, _third = machines
    host(max_connections=2, when_full="refuse", delay=2)
    before = host()["refused"]
    doomed = first.start("killed", nfc_host_limit=2)
    wait_for(lambda: sum(entry["admitted"] for entry in entries(machines)) == 2, doomed)
    progress = tmp_path / "progress"
    waiter = second.start("waited", nfc_host_limit=2, progress_file=str(progress))
    wait_for(lambda: progress.exists() and f"waiting for a connection to {HOST}" in progress.read_text(), waiter)
    assert sum(entry["admitted"] for entry in entries(machines)) == 2
    doomed.kill()
    host(delay=0)
    second.done(waiter, "waited")
    assert host()["refused"] == before and host()["peak"] <= 2
    first.modules.done("vadp_recover", **first.modules.named, repository=str(first.modules.repository))


@pytest.mark.parametrize("compression", ["zlib", "fastlz", "skipz"])
def test_what_crosses_the_lan_may_be_compressed(machines: List[Machine], compression: str) -> None:
    machine = machines[0]
    first = machine.keys[0]
    process = machine.start(f"with-{compression}", disks=[str(first)], wire_compression=compression)
    result = machine.modules.result(process)
    assert not result["failed"], result
    simulator, vm = machine.modules.simulator, machine.modules.vm
    assert machine.modules.backups.disk(vm, first, f"with-{compression}") == simulator.disk(vm, first, machine.moid)


def wait_for(condition: Callable[[], Any], process: Process) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert process.poll() is None, process.out
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
