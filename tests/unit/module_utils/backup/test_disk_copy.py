# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Copies from real NBD servers into a real repository; the transport's opening is replaced by nbdkit's file plugin."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence

import blake3
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup import disk_copy
from ansible_collections.openvadp.backup.plugins.module_utils.backup.disk_copy import CopyJob, Reading, copy_disks
from ansible_collections.openvadp.backup.plugins.module_utils.backup.disk_plan import DiskPlan, Pin
from ansible_collections.openvadp.backup.plugins.module_utils.backup.request import ExportRequest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import read_content_id, read_hashes
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import Child, RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.progress import Progress
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    DataPathError,
    TransportError,
    VadpError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore
from ansible_collections.openvadp.backup.plugins.module_utils.repository.stored import stored_problem
from ansible_collections.openvadp.backup.plugins.module_utils.transport.endpoints import Endpoint
from ansible_collections.openvadp.backup.plugins.module_utils.transport.opener import OpenContext
from ansible_collections.openvadp.backup.plugins.module_utils.transport.planner import (
    Candidate,
    DiskFacts,
    Plan,
    ProxyFacts,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection

UUID = "500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"
# No multiple of a cluster.
CAPACITY = (5 << 20) + 512 * 3


class World:
    """A repository whose VM is locked, and disks as files; nbdkit serves them with the filters that a test asks for."""

    def __init__(self, folder: Path) -> None:
        (folder / "repository").mkdir()
        self.folder = folder
        self.store: VmStore = Repository.open(str(folder / "repository"), create=True).vm(UUID)
        # By file, or by transport and file.
        self.filters: Dict[str, List[str]] = {}
        self.refused: Dict[str, VadpError] = {}
        self.opened: List[str] = []
        self.tried: List[str] = []
        self.last: List[bool] = []
        self.asking: List[bool] = []
        self.readings: Dict[int, Reading] = {}
        self.children: List[Child] = []

    def disk(self, key: int, data: bytes) -> Disk:
        path = self.folder / f"{key}.raw"
        path.write_bytes(data)
        return Disk(key, f"Hard disk {key - 1999}", str(path), "d", len(data), f"uuid-{key}", None, True, None)

    @contextmanager
    def open(
        self,
        context: OpenContext,
        disk: Disk,
        facts: DiskFacts,
        candidate: Candidate,
        *,
        writable: bool,
        stage: Path,
        last: bool,
        allocation: bool,
    ) -> Iterator[Endpoint]:
        assert not writable
        self.last.append(last)
        self.asking.append(allocation)
        self.opened.append(disk.file)
        self.tried.append(candidate.transport)
        if candidate.transport in self.refused:
            raise self.refused[candidate.transport]
        stem = f"{context.run_dir.path}/source-{len(self.opened)}"
        filters = self.filters.get(f"{candidate.transport} {disk.file}", self.filters.get(disk.file, []))
        argv = ["nbdkit", "-f", "-r", "-U", f"{stem}.sock", *filters]
        child = Child.start(
            [*argv[:5], *[word for word in argv[5:] if word.startswith("--")], "file", disk.file]
            + [word for word in argv[5:] if not word.startswith("--")],
            log_path=f"{stem}.log",
            name="source",
        )
        self.children.append(child)
        try:
            child.wait_for_socket(f"{stem}.sock", 20)
            size = Path(disk.file).stat().st_size
            uri = f"nbd+unix:///?socket={stem}.sock"
            yield Endpoint(uri, candidate.transport, Path(f"{stem}.log"), size, disk.file, child)
        finally:
            child.stop(5)

    def copy(self, run: Run, plans: List[DiskPlan], point: str, **options: Any) -> Dict[int, Dict[str, Any]]:
        request = ExportRequest(Connection("vc", "u", "p"), {}, "/r", snapshot_name="s", io_timeout=20, **options)
        with RuntimeDir(run.run_id) as run_dir, Progress(str(self.folder / "progress")) as progress:
            job = CopyJob(
                vm="VM 'app01' (vm-16)",  # type: ignore[arg-type]
                store=self.store,
                run=run,
                point=point,
                context=OpenContext(
                    session=SimpleNamespace(),  # type: ignore[arg-type]
                    vm=SimpleNamespace(),  # type: ignore[arg-type]
                    snapshot_moid="snapshot-1",
                    vddk=None,
                    proxy=ProxyFacts(),
                    proxy_vm=None,
                    nfc_port=902,
                    io_timeout=20,
                    run_dir=run_dir,
                    run=run,
                    device_dir="/dev/disk/by-id",
                    sysfs_dir="/sys",
                    wire_compression="none",
                    nfc_host_limit=None,
                    stage_dir=self.store.path,
                ),
                request=request,
                run_dir=run_dir,
                progress=progress,
                cancel=threading.Event(),
                rate_limit=None,
                readings=self.readings,
            )
            return copy_disks(plans, job)

    def files(self) -> List[str]:
        return sorted(path.name for path in self.store.path.rglob("*") if path.is_file() and path.parent.name != "runs")

    def raw(self, key: int, point: str) -> bytes:
        out = self.folder / "out.raw"
        layer = self.store.layer_path(key, point)
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(layer), str(out)], check=True)
        return out.read_bytes()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path)
    monkeypatch.setattr(disk_copy, "open_disk", world.open)
    with world.store.lock(new_run_id(), "test"):
        yield world


def _plan(
    disk: Disk,
    mode: str = "full",
    parent: Optional[str] = None,
    areas: Optional[Extents] = None,
    transports: Sequence[str] = ("nbdssl",),
) -> DiskPlan:
    candidates = [Candidate(name, True, [], "vddk") for name in transports]
    transport = Plan([Candidate("san", False, ["no LUN"]), *candidates], transports[0], "vddk")
    pin = Pin() if parent is None else Pin("a" * 32, "0" * 64)
    return DiskPlan(disk, mode, parent, "because", areas, transport, DiskFacts(disk.label, disk.file), pin)


def _pattern(seed: int, length: int) -> bytes:
    return (bytes(range(seed, seed + 200)) * (length // 200 + 1))[:length]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_full_and_an_incremental_hold_the_disk(world: World, compression: str) -> None:
    before = bytearray(_pattern(1, CAPACITY))
    before[1 << 20 : 3 << 20] = bytes(2 << 20)
    disk = world.disk(2000, bytes(before))
    run = world.store.create_run("one")
    entry = world.copy(run, [_plan(disk)], "one", compression=compression)[2000]
    assert world.raw(2000, "one") == bytes(before)
    assert entry["bytes_stored"] == world.store.layer_path(2000, "one").stat().st_size < CAPACITY
    assert run.finished_disk(2000) == entry
    # What is read again is another content, also where the bytes are the same.
    assert read_content_id(str(world.store.hashes_path(2000, "one"))) == entry["content_id"]
    again = world.copy(run, [_plan(disk)], "one", compression=compression)[2000]
    assert read_content_id(str(world.store.hashes_path(2000, "one"))) == again["content_id"] != entry["content_id"]

    # The guest zeroes what the parent has, fills a hole, and writes the last sector.
    after = bytearray(before)
    after[65536 : 65536 * 3] = bytes(65536 * 2)
    after[2 << 20 : (2 << 20) + 4096] = _pattern(7, 4096)
    after[CAPACITY - 512 :] = b"z" * 512
    disk = world.disk(2000, bytes(after))
    changed = [(65536, 65536 * 2), (2 << 20, 65536), (CAPACITY - 512, 512)]
    areas = Extents.of(changed).round_out(65536, CAPACITY)
    second = world.store.create_run("two")
    parent_layer = world.store.layer_path(2000, "one").read_bytes()
    entry = world.copy(second, [_plan(disk, "incremental", "one", areas)], "two", compression=compression)[2000]
    # What change tracking has named is not asked for; a full asks (VADP facts 5).
    assert world.asking == [True, True, False]
    assert world.raw(2000, "two") == bytes(after)
    assert world.raw(2000, "one") == bytes(before)
    assert world.store.layer_path(2000, "one").read_bytes() == parent_layer
    assert entry["bytes_read"] == areas.total_bytes
    pieces = list(read_hashes(str(world.store.hashes_path(2000, "two")))[1])
    assert sum(length for _offset, length, _hash in pieces) == areas.total_bytes
    assert not world.store.part_files()
    lines = [json.loads(line) for line in (world.folder / "progress").read_text().splitlines()]
    assert [line["state"] for line in lines if line["state"] != "running"] == ["done", "done", "done"]


def test_nothing_changed_needs_no_connection(world: World) -> None:
    disk = world.disk(2000, _pattern(3, CAPACITY))
    world.copy(world.store.create_run("one"), [_plan(disk)], "one")
    opened = len(world.opened)
    entry = world.copy(world.store.create_run("two"), [_plan(disk, "incremental", "one", Extents.of([]))], "two")[2000]
    assert len(world.opened) == opened
    assert (entry["transport"], entry["bytes_read"], entry["areas"]) == ("none", 0, 0)
    assert world.raw(2000, "two") == _pattern(3, CAPACITY)


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_failing_disk_is_named_and_leaves_nothing_unfinished(world: World, parallel: int) -> None:
    good, bad = world.disk(2000, _pattern(1, 70000 // 512 * 512)), world.disk(2001, _pattern(2, CAPACITY))
    world.filters[bad.file] = ["--filter=error", "error-pread=EIO", "error-pread-rate=1"]
    run = world.store.create_run("one")
    with pytest.raises(VadpError) as caught:
        world.copy(run, [_plan(good), _plan(bad)], "one", parallel_disks=parallel)
    assert "Hard disk 2" in str(caught.value)
    assert not world.store.part_files()
    assert run.finished_disk(2001) is None
    assert not [name for name in world.files() if "part" in name]
    assert not world.store.layer_path(2001, "one").exists()
    assert not run.intents("process")
    if parallel == 1:
        entry = run.finished_disk(2000)
        assert entry is not None
        assert stored_problem(world.store.layer_path(2000, "one"), entry["layer"]) is None


def test_the_other_disks_stop_when_one_fails(world: World) -> None:
    slow, bad = world.disk(2000, _pattern(1, 64 << 20)), world.disk(2001, _pattern(2, CAPACITY))
    world.filters[slow.file] = ["--filter=delay", "delay-read=1"]
    world.filters[bad.file] = ["--filter=error", "error-pread=EIO", "error-pread-rate=1"]
    third = world.disk(2002, _pattern(3, CAPACITY))
    run = world.store.create_run("one")
    with pytest.raises(DataPathError) as caught:
        world.copy(run, [_plan(slow), _plan(bad), _plan(third)], "one")
    assert "Hard disk 2" in str(caught.value)
    assert not run.data["finished_disks"]
    assert third.file not in world.opened
    assert not world.store.part_files() and not world.store.uncommitted_files()


def test_a_disk_of_another_size_than_its_snapshot_is_refused(world: World) -> None:
    disk = world.disk(2000, _pattern(1, CAPACITY))
    disk.capacity_bytes += 512
    with pytest.raises(VadpError, match="another size"):
        world.copy(world.store.create_run("one"), [_plan(disk)], "one")


def test_a_dead_server_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = world.disk(2000, _pattern(1, 64 << 20))
    world.filters[disk.file] = ["--filter=delay", "delay-read=1"]
    original = disk_copy.copy

    def copy_and_kill(*args: Any, **options: Any) -> Any:
        threading.Timer(0.3, world.children[0]._process.kill).start()
        return original(*args, **options)

    monkeypatch.setattr(disk_copy, "copy", copy_and_kill)
    with pytest.raises(VadpError) as caught:
        world.copy(world.store.create_run("one"), [_plan(disk)], "one")
    assert caught.value.details["error"]["details"]["side"] == "source"
    assert not world.store.part_files()


@pytest.mark.parametrize("refusal", [TransportError("VDDK does not use it"), VsphereError("The disk was not attached")])
def test_a_transport_that_does_not_open_is_left_for_the_next(world: World, refusal: VadpError) -> None:
    disk = world.disk(2000, _pattern(1, CAPACITY))
    world.refused["hotadd"] = refusal
    entry = world.copy(world.store.create_run("one"), [_plan(disk, transports=["hotadd", "nbdssl"])], "one")[2000]
    assert world.raw(2000, "one") == _pattern(1, CAPACITY)
    assert entry["transport"] == "nbdssl"
    reading = world.readings[2000]
    assert (reading.transport, reading.method) == ("nbdssl", "vddk")
    assert reading.reasons == ["san: no LUN", f"hotadd: it failed: {refusal.what}"]


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("mode", ["full", "incremental"])
def test_a_transport_that_breaks_in_the_middle_is_left_for_the_next(world: World, mode: str, compression: str) -> None:
    """What it has read stays, and the next one reads the rest; the hashes cover all of it once."""
    before = _pattern(1, 32 << 20)
    disk = world.disk(2000, before)
    world.copy(world.store.create_run("one"), [_plan(disk)], "one", compression=compression)
    after = os.urandom(8 << 20) + bytes(8 << 20) + before[16 << 20 :]
    disk = world.disk(2000, after)
    failing = world.folder / "fails"
    world.filters[f"hotadd {disk.file}"] = [
        "--filter=error",
        "--filter=log",
        "error-pread=EIO",
        "error-pread-rate=50%",
        f"logfile={failing}",
    ]
    changed = Extents.of([(0, 16 << 20)])
    plan = _plan(disk, transports=["hotadd", "nbdssl"])
    if mode == "incremental":
        plan = _plan(disk, mode, "one", changed, ["hotadd", "nbdssl"])
    entry = world.copy(world.store.create_run("two"), [plan], "two", compression=compression)[2000]
    assert world.raw(2000, "two") == after
    assert entry["transport"] == "nbdssl" and world.tried[-2:] == ["hotadd", "nbdssl"]
    assert entry["bytes_read"] >= (changed.total_bytes if mode == "incremental" else len(after) - (8 << 20))
    assert world.readings[2000].reasons[1].startswith("hotadd: it ")
    pieces = list(read_hashes(str(world.store.hashes_path(2000, "two")))[1])
    covered = Extents.of((offset, length) for offset, length, _hash in pieces)
    for offset, length, digest in pieces:
        assert blake3.blake3(after[offset : offset + length]).hexdigest() == digest
    assert covered == (
        changed if mode == "incremental" else covered.union(Extents.of([(0, 8 << 20), (16 << 20, 16 << 20)]))
    )
    assert not world.store.part_files()


def test_when_all_transports_fail_each_says_why(world: World) -> None:
    disk = world.disk(2000, _pattern(1, CAPACITY))
    world.refused = {"hotadd": TransportError("No unit", reason="all taken"), "https": TransportError("No lease")}
    with pytest.raises(TransportError) as caught:
        world.copy(world.store.create_run("one"), [_plan(disk, transports=["hotadd", "https"])], "one")
    text = str(caught.value)
    assert "by any of the transports" in text and "hotadd: No unit: all taken" in text and "https: No lease" in text
    assert "Hard disk 1" in text and not world.store.part_files()
    assert world.last == [False, True]  # what passes is waited for longer where nothing else comes


def test_nbd_is_not_tried_where_nbdssl_could_not_reach_the_host(world: World) -> None:
    disk = world.disk(2000, _pattern(1, CAPACITY))
    finding = {"finding": {"code": 14009, "meaning": "refused", "evidence": ""}}
    world.refused["nbdssl"] = TransportError("The disk can't be opened", reason="refused", details=finding)
    plan = _plan(disk, transports=["nbdssl", "nbd", "https"])
    world.copy(world.store.create_run("one"), [plan], "one")
    assert world.tried == ["nbdssl", "https"]
    assert world.readings[2000].reasons[2] == "nbd: not tried: it goes the way of nbdssl, which failed"


def test_a_failing_target_is_no_reason_for_another_transport(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = world.disk(2000, _pattern(1, CAPACITY))

    def refuse(*args: Any, **options: Any) -> Any:
        raise DataPathError("Writing to the target failed", details={"side": "target", "errno": "ENOSPC"})

    monkeypatch.setattr(disk_copy, "copy", refuse)
    with pytest.raises(DataPathError, match="Make room"):
        world.copy(world.store.create_run("one"), [_plan(disk, transports=["hotadd", "nbdssl"])], "one")
    assert world.tried == ["hotadd"]
