# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every restore point holds, byte by byte, what its snapshot held: chains, edges, pages, crashes, guests that go on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from administrator import Administrator
from guest import disks_of, scribble
from harness import MIB
from modules import Modules, Process, modes

SECTOR = 512
CLUSTER = 65536
PAGE = 2000  # areas in a page of the answer


def test_a_chain_of_ten_incrementals(modules: Modules) -> None:
    """Random writes, zeros and discards; then a differential, an incremental upon it, and one of nothing."""
    simulator = modules.simulator
    chain = [f"i{number:02}" for number in range(1, 11)]
    points = ["full", *chain, "differential", "after", "idle"]
    sizes = disks_of(simulator.control, "app01")
    modules.track_changes()
    simulator.write("app01", 2001, 0, seed=99, length=8 * MIB)
    disks = {}
    for seed, point in enumerate(points):
        # Now and then a disk is left alone.
        for key in [] if point == "idle" else [2000] if seed % 4 == 3 else [2000, 2001]:
            scribble(simulator.control, "app01", key, sizes[key], seed)
        disks[point] = modules.point(point, mode="differential" if point == "differential" else "auto")
    assert len({str(held) for held in modules.held.values()}) == len(points) - 1, "the guest wrote"

    parents = {"full": None, "differential": "full", "after": "differential", "idle": "after"}
    parents.update(zip(chain, ["full", *chain]))
    wanted = dict.fromkeys([*chain, "after", "idle"], "incremental")
    wanted.update(full="full", differential="differential")
    for point in points:
        assert modes(disks[point]) == dict.fromkeys((2000, 2001), (wanted[point], parents[point])), point
    for disk in disks["idle"].values():
        assert (disk["bytes_read"], disk["areas"], disk["transport"]) == (0, 0, "none")
    assert 0 < disks["i10"][2000]["bytes_read"] < 16 * MIB
    modules.verify_bytes()
    modules.verify("i10", "idle")
    modules.clean()


def test_edges_of_the_disk_and_data_that_must_not_shine_through(modules: Modules, administrator: Administrator) -> None:
    """Disks whose sizes are no multiple of 64 KiB or of 1 MiB, or less than a cluster; all of them full of data."""
    simulator, call = modules.simulator, modules.simulator.control.call
    sizes = {2001: simulator.disk("app01", 2001)[0], 2002: 3 * MIB + CLUSTER, 2003: 81 * SECTOR}
    for key in (2002, 2003):
        assert administrator.add_disk(key - 2000, sizes[key]) == key
    assert sizes[2001] % MIB and sizes[2001] % CLUSTER, "a last cluster that is not whole"

    def write(key: int, *offsets: int, length: int = SECTOR, seed: int = 1) -> None:
        simulator.write("app01", key, *offsets, length=length, seed=seed)

    def discard(key: int, offset: int, length: int) -> None:
        call("guest_discard", vm="app01", disk=key, offset=offset, length=length)

    modules.track_changes()
    for key, size in sizes.items():
        write(key, 0, length=size, seed=key)
    assert modes(modules.point("full", exclude_disks=["2000"])) == dict.fromkeys(sizes, ("full", None))

    # Zeros where the parent has data: written, discarded, in parts of clusters, and at the very end.
    call("guest_write", vm="app01", disk=2001, offset=0, data=bytes(CLUSTER))
    call("guest_write", vm="app01", disk=2001, offset=10 * MIB - SECTOR, data=bytes(2 * SECTOR))
    discard(2001, MIB, 5 * MIB)
    discard(2001, 8 * MIB + 3 * SECTOR, CLUSTER)
    discard(2001, sizes[2001] - sizes[2001] % CLUSTER, sizes[2001] % CLUSTER)
    discard(2002, 0, sizes[2002])
    discard(2003, SECTOR, sizes[2003] - SECTOR)
    incremental = dict.fromkeys(sizes, "incremental")
    zeros = modules.point("zeros", exclude_disks=["2000"])
    assert {key: disk["mode"] for key, disk in zeros.items()} == incremental

    # The first and the last sector, and nothing else.
    for key, size in sizes.items():
        write(key, 0, size - SECTOR, seed=2)
    assert {disk["areas"] for disk in modules.point("ends", exclude_disks=["2000"]).values()} == {1, 2}

    # Pages that end within a tracking block, half of them empty; areas across their borders.
    page = MIB + 3 * SECTOR
    call("set_settings", page_bytes=page)
    borders = range(page, sizes[2001] - SECTOR, 4 * page)
    write(2001, *[border - SECTOR for border in borders], length=2 * SECTOR, seed=3)
    write(2001, 7 * page - 3 * CLUSTER, length=6 * CLUSTER, seed=4)
    write(2001, sizes[2001] - sizes[2001] % CLUSTER - SECTOR, length=2 * SECTOR, seed=5)
    seen = simulator.last_call()
    disks = modules.point("borders", exclude_disks=["2000"])
    queries = [one for one in call("calls", since=seen) if one["method"] == "QueryChangedDiskAreas"]
    assert len(queries) > sizes[2001] // page
    assert {key: disk["mode"] for key, disk in disks.items()} == incremental
    call("set_settings", page_bytes=None)

    # A source that can't tell where it holds data (VADP facts 5), for a part and for all of a disk.
    call("nfc", query_faults={"count": -1})
    write(2001, 3 * MIB, length=SECTOR, seed=6)
    write(2002, 2 * MIB, length=MIB, seed=6)
    discard(2001, 12 * MIB, MIB)
    modules.point("unknown-zeros", exclude_disks=["2000"])
    modules.point("unknown-zeros-full", mode="full", exclude_disks=["2000"])
    call("nfc", clear_faults=True)

    # A disk that a point left out goes on from the last one that holds it; zeros in a layer without compression.
    write(2001, MIB, seed=7)
    modules.point("without", disks=["2001"])
    write(2001, MIB, seed=8)
    write(2002, MIB, seed=8)
    discard(2002, 2 * MIB, MIB + SECTOR)
    disks = modules.point("with", exclude_disks=["2000"], compression="none")
    assert {key: disk["parent"] for key, disk in disks.items()} == {
        2001: "without",
        2002: "unknown-zeros-full",
        2003: "unknown-zeros-full",
    }
    modules.verify_bytes()
    modules.verify("zeros", "with")
    modules.clean()


def test_two_thousand_areas_and_more(modules: Modules, administrator: Administrator) -> None:
    """Exactly a page; exactly a page that ends with the disk; more than a page."""
    simulator = modules.simulator
    last = 2 * PAGE + 10
    size = last * CLUSTER + 67 * SECTOR
    assert administrator.add_disk(2, size) == 2002
    modules.track_changes()
    simulator.write("app01", 2002, 0, seed=1, length=MIB)
    modules.point("full", disks=["2002"])

    def changed(point: str, *blocks: int) -> int:
        """A point after the guest wrote to these tracking blocks; how many calls the changed areas took."""
        simulator.write("app01", 2002, *[block * CLUSTER for block in blocks], seed=len(blocks), length=SECTOR)
        seen = simulator.last_call()
        disk = modules.point(point, disks=["2002"])[2002]
        assert (disk["mode"], disk["areas"]) == ("incremental", len(blocks))
        calls = simulator.control.call("calls", since=seen)
        return sum(call["method"] == "QueryChangedDiskAreas" for call in calls)

    # The page is full, and what follows is empty: that has to be asked.
    assert changed("a-page", *range(0, 2 * PAGE, 2)) == 2
    # The page is full, and the disk is at its end: nothing is left to ask for.
    assert changed("to-the-end", *range(last - 2 * PAGE + 2, last + 1, 2)) == 1
    assert changed("more", *range(0, last + 1, 2)) == 2
    modules.verify_bytes()
    modules.verify("more")
    modules.clean()


def test_a_chain_that_is_long_enough_is_followed_by_a_full(modules: Modules) -> None:
    modules.track_changes()
    for number, expected in enumerate(["full", "incremental", "full", "incremental"]):
        modules.simulator.write("app01", 2000, number * MIB, seed=number + 1)
        disk = modules.point(f"p{number}", max_chain=2, disks=["2000"])[2000]
        assert disk["mode"] == expected, disk
        assert modules.backups.disk("app01", 2000, f"p{number}") == modules.held[f"p{number}"][2000]
    assert modules.backups.manifest("app01", "p2")["disks"][2000]["reason"] == (
        "the chain of point p1 has 2 layers, and max_chain is 2"
    )
    # Whoever insists gets an incremental.
    assert modules.point("p4", max_chain=2, mode="incremental", disks=["2000"])[2000]["parent"] == "p3"


def test_two_disks_of_which_one_fails(modules: Modules) -> None:
    """No point; on the same snapshot only what is missing is read; on another one, all."""
    simulator = modules.simulator
    modules.track_changes()
    modules.point("full")
    simulator.write("app01", 2000, 0, 5 * MIB, seed=1)
    simulator.write("app01", 2001, 0, seed=1, length=4 * MIB)
    snapshot = modules.snapshot("one")
    path = simulator.vm("app01")["disks"][1]["chain"][-1]
    simulator.control.call("nfc", read_faults={"count": -1, "vix": 13, "path": path})
    failed = modules.export(snapshot, "one", parallel_disks=1, io_timeout=4)
    assert failed["failed"] and "Hard disk 2" in failed["msg"]
    assert modules.backups.points("app01") == ["full"]
    finished = modules.layer_identity("one")
    assert list(finished) == [2000]
    simulator.control.call("nfc", clear_faults=True)
    assert modes(modules.make(snapshot, "one")) == dict.fromkeys((2000, 2001), ("incremental", "full"))
    assert modules.layer_identity("one")[2000] == finished[2000], "what was finished is kept"
    modules.remove_snapshot(snapshot)
    modules.clean()

    # A crash after the first disk; what both disks hold changes; then there is another snapshot.
    simulator.write("app01", 2000, 0, 7 * MIB, seed=2)
    simulator.write("app01", 2001, 0, seed=2, length=8 * MIB)
    snapshot = modules.snapshot("two")
    options = modules.export_options(snapshot_moid=snapshot, point="two", parallel_disks=1, rate_limit="1M")
    process = modules.start("vadp_disk_export", options)
    _wait_for(process, lambda: _finished(modules) == ["2000"])
    process.kill()
    crashed = modules.layer_identity("two")
    assert list(crashed) == [2000] and modules.backups.points("app01") == ["full", "one"]
    for key in (2000, 2001):
        simulator.write("app01", key, 0, 7 * MIB, 9 * MIB, seed=3)
    modules.remove_snapshot(snapshot)
    assert modes(modules.point("two")) == dict.fromkeys((2000, 2001), ("incremental", "one"))
    assert modules.layer_identity("two")[2000] != crashed[2000], "both disks are of the second snapshot"
    # The crashed run's record names files that are the second one's now.
    modules.done("vadp_recover", **modules.named, repository=str(modules.repository))
    modules.verify_bytes()
    modules.verify("two")
    modules.clean()


def test_a_guest_that_writes_during_the_backup(modules: Modules, tmp_path: Path) -> None:
    """The point holds the snapshot's bytes; the next one holds the rest."""
    simulator = modules.simulator
    modules.track_changes()
    modules.point("full")
    simulator.write("app01", 2000, 20 * MIB, seed=1, length=8 * MIB)
    snapshot = modules.snapshot("during")
    held = {key: simulator.disk("app01", key, snapshot) for key in (2000, 2001)}
    progress = tmp_path / "progress"
    options = modules.export_options(
        snapshot_moid=snapshot, point="during", rate_limit="2M", disks=["2000"], progress_file=str(progress)
    )
    process = modules.start("vadp_disk_export", options)
    _wait_for(process, lambda: any(0 < line["done_bytes"] < line["total_bytes"] for line in _lines(progress)))
    # Over what was read and what was not yet, and where nothing was to be read.
    simulator.write("app01", 2000, *range(0, 60 * MIB, MIB), seed=2)
    simulator.control.call("guest_discard", vm="app01", disk=2000, offset=26 * MIB, length=MIB)
    simulator.write("app01", 2001, 0, seed=2)
    assert process.poll() is None and _lines(progress)[-1]["state"] not in ("done", "failed"), "it took too long"
    assert not modules.result(process)["failed"]
    modules.held["during"] = {2000: held[2000]}
    assert modules.backups.manifest("app01", "during")["disks"][2000]["mode"] == "incremental"
    modules.remove_snapshot(snapshot)
    assert modes(modules.point("rest")) == {2000: ("incremental", "during"), 2001: ("incremental", "full")}
    modules.verify_bytes()
    modules.verify("rest")
    modules.clean()


def _finished(modules: Modules) -> List[str]:
    """Keys of the disks that the only run under way has finished."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in modules.repository.glob("vms/*/runs/*.json")]
    return [key for run in runs for key in run["finished_disks"]]


def _lines(path: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _wait_for(process: Process, condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until something is true while a module runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the module has ended: {process.out}"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
