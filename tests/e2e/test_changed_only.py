# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_disk_restore with changed_only: what changed is written and nothing else, or the whole disk and why.

Each test compares all bytes of the disks with what they held when the point was made, and counts what crossed the wire.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytest
from administrator import Administrator
from harness import MIB
from modules import Modules, Process

SECTOR = 512
CLUSTER = 65536
BOTH = (2000, 2001)
# Change tracking finds this whole, so it would be written if nobody compared.
SPREAD = [number * MIB + 3 * SECTOR for number in range(10)]


class Machine:
    """app01 with change tracking, and restores of it."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.simulator = modules.simulator
        self.call = modules.simulator.control.call
        modules.track_changes()
        for key in BOTH:
            self.write(key, 0, seed=key, length=4 * MIB)

    def write(self, key: int, *offsets: int, seed: int = 1, length: int = CLUSTER) -> None:
        self.simulator.write("app01", key, *offsets, seed=seed, length=length)

    def power(self, on: bool) -> None:
        self.call("power", vm="app01", state="poweredOn" if on else "poweredOff")

    def options(self, point: str, **options: Any) -> Dict[str, Any]:
        named = {"vm_name": "app01", "target": "in_place", "overwrite": True, "changed_only": True, "point": point}
        return {**self.modules.export_options(), **named, **options}

    def restore(self, point: str, **options: Any) -> Dict[str, Any]:
        """Restore and compare all bytes; ``restored`` by device key, and what crossed the wire as ``wire``."""
        before = self.wire()
        result = self.modules.done("vadp_disk_restore", **self.options(point, **options))
        disks = {entry["key"]: entry for entry in result["restored"]}
        self.holds(point, *disks)
        assert self.wire() - before == sum(entry["bytes_written"] for entry in disks.values())
        self.modules.clean()
        return dict(result, restored=disks)

    def wire(self) -> int:
        return int(sum(host["bytes_written"] for host in self.call("nfc")["hosts"].values()))

    def holds(self, point: str, *keys: int) -> None:
        for key in keys or BOTH:
            assert self.simulator.disk("app01", key) == self.modules.held[point][key], key

    def whole(self, result: Dict[str, Any], *words: str, keys: Any = BOTH) -> None:
        """These disks were written as a whole, and the result says why."""
        for key in keys:
            entry = result["restored"][key]
            assert entry["changed_only"] is False and entry["bytes_written"] == self.simulator.disk("app01", key)[0], (
                entry
            )
            assert all(word in entry["reason"] for word in words), entry["reason"]

    @property
    def marks(self) -> List[int]:
        path = self.modules.backups.store("app01") / "trust.json"
        return [entry["key"] for entry in json.loads(path.read_text())["not_trusted"]] if path.exists() else []

    def records(self) -> List[Dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.modules.repository.glob("vms/*/runs/*.json"))]

    def journals(self) -> List[Path]:
        return sorted(self.modules.repository.glob("vms/*/runs/*.journal"))

    def half_written(self) -> List[int]:
        return [key for record in self.records() for item in record["intents"] for key in item.get("half_written", [])]

    def until(self, process: Optional[Process], condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and (process is None or process.poll() is None), process and process.out
            time.sleep(0.01)

    def queries(self, since: int) -> int:
        return [call["method"] for call in self.call("calls", since=since)].count("QueryChangedDiskAreas")


def test_what_changed_is_written_and_nothing_else(modules: Modules) -> None:
    machine = Machine(modules)
    modules.point("full")
    machine.write(2000, *SPREAD, seed=2)
    modules.point("incremental")
    machine.write(2000, 3 * MIB, MIB, seed=3, length=300000)
    modules.point("differential", mode="differential")

    # Nothing changed since: nothing is written, and change tracking goes on.
    machine.power(False)
    seen = machine.simulator.last_call()
    result = machine.restore("differential")
    assert result["changed"] is False and not machine.marks
    for entry in result["restored"].values():
        assert entry["bytes_written"] == 0 and "already" in entry["reason"], entry
    calls = [name for name in machine.simulator.changing_calls(seen) if "Snapshot" in name]
    assert calls == ["CreateSnapshot_Task", "RemoveSnapshot_Task"]
    # Zeros over zeros are no difference, though change tracking has seen them.
    machine.call("guest_discard", vm="app01", disk=2001, offset=14 * MIB, length=CLUSTER)
    assert machine.restore("differential")["changed"] is False and not machine.marks

    # Writes, zeros and discards, by fewer bytes than a tracking block has, up to the odd end of a disk.
    size = machine.simulator.disk("app01", 2001)[0]
    machine.write(2000, *SPREAD, seed=4)
    machine.call("guest_discard", vm="app01", disk=2000, offset=2 * MIB, length=MIB)
    machine.write(2001, size - SECTOR, 5 * SECTOR, seed=5, length=SECTOR)
    check = modules.run("vadp_disk_restore", **machine.options("differential", _ansible_check_mode=True))
    assert check["changed"] and all("what changed since" in entry["reason"] for entry in check["restored"])
    assert modules.simulator.snapshots("app01") == [] and not machine.marks
    changed = {2000: len(SPREAD) * CLUSTER + MIB, 2001: 2 * SECTOR}
    result = machine.restore("differential")
    assert result["changed"] is True
    for key, entry in result["restored"].items():
        assert entry["changed_only"] and entry["verified"] is True and "what changed since" in entry["reason"], entry
        assert 0 < entry["bytes_written"] <= 1.2 * changed[key], entry
    assert machine.marks == list(BOTH)

    # It was written, so change tracking began anew: what was before is not believed by a backup, nor by a restore.
    machine.power(True)
    machine.write(2000, *SPREAD, seed=6)
    assert {disk["mode"] for disk in modules.point("after").values()} == {"full"}
    machine.power(False)
    assert machine.restore("after")["changed"] is False
    machine.whole(machine.restore("incremental"))
    machine.power(True)
    modules.track_changes("reset")
    modules.point("again")
    machine.write(2000, 5 * MIB, seed=7)
    machine.power(False)
    result = machine.restore("again")
    written = {key: entry["bytes_written"] for key, entry in result["restored"].items()}
    assert written[2001] == 0 and CLUSTER * 0.9 < written[2000] <= 1.2 * CLUSTER
    machine.power(True)
    # Change tracking is the whole machine's: it began anew for the disk that was not written too.
    assert {disk["mode"] for disk in modules.point("last").values()} == {"full"}
    modules.verify_bytes()
    modules.clean()


def test_what_differs_throughout_is_not_all_compared_first(modules: Modules) -> None:
    machine = Machine(modules)
    modules.point("one")
    # Of both disks change tracking tells more areas than a sample has. One differs all over, one in few places.
    machine.write(2000, 9 * MIB, seed=2, length=20 * MIB)
    machine.write(2001, *(number * CLUSTER for number in range(200)), seed=2, length=SECTOR)
    machine.power(False)
    read = sum(host["bytes_read"] for host in machine.call("nfc")["hosts"].values())
    result = machine.restore("one")["restored"]
    read = sum(host["bytes_read"] for host in machine.call("nfc")["hosts"].values()) - read
    assert "all of it, since 100 % of a sample differed" in result[2000]["reason"], result
    assert result[2000]["bytes_written"] == 20 * MIB and result[2000]["verified"]
    assert "sample" not in result[2001]["reason"] and result[2001]["bytes_written"] <= 1.2 * 200 * SECTOR, result
    # A sample, and all of it once more to read it back; of the other disk its 200 areas twice. Then a sample of what is
    # believed unchanged, which is all of that on disks so small.
    size = machine.simulator.disk("app01", 2001)[0]
    assert read == (8 + 20) * MIB + 2 * 200 * CLUSTER + (64 - 20) * MIB + size - 200 * CLUSTER, read
    assert {entry["verification"] for entry in result.values()} == {"whole"}


def test_a_disk_that_is_not_the_point_elsewhere_is_written_as_a_whole(modules: Modules) -> None:
    """Change tracking lost something, and nothing tells of it but the bytes."""
    machine = Machine(modules)
    modules.point("one")
    machine.call("spoil_tracking", vm="app01", disk=2000)
    # Every fourth block is lost then.
    machine.write(2000, 643 * CLUSTER + 5 * SECTOR, seed=2, length=SECTOR)
    # A hole of the point, where one of the disk is no more.
    machine.call("spoil_tracking", vm="app01", disk=2001)
    machine.write(2001, 147 * CLUSTER, seed=3, length=SECTOR)
    machine.power(False)
    unseen = modules.done("vadp_disk_restore", **machine.options("one", verify="False"))
    assert unseen["changed"] is False and {entry["verified"] for entry in unseen["restored"]} == {None}
    result = machine.restore("one", verify="full", disks=[{"key": 2000}])
    machine.whole(result, "it differed at byte", "where nothing was known to have changed", keys=[2000])
    result = machine.restore("one", disks=[{"key": 2001}])
    assert result["restored"][2001]["verification"] == "whole"
    refused = modules.run("vadp_disk_restore", **machine.options("one", verify="some"))
    assert refused["failed"] and "verify" in refused["msg"]


def test_the_whole_disk_is_written_where_tracking_does_not_tell(modules: Modules, administrator: Administrator) -> None:
    call = modules.simulator.control.call
    modules.point("untracked")
    machine = Machine(modules)
    modules.point("one")
    machine.power(False)
    machine.whole(machine.restore("untracked", disks=[{"key": key} for key in BOTH]), "untracked has no change ID")

    machine.power(True)
    modules.track_changes("reset")
    modules.point("two")
    machine.write(2000, 0, seed=2)
    theirs = modules.snapshot("theirs")
    modules.point("three")
    modules.remove_snapshot(theirs)
    machine.power(False)
    options = {"disks": [{"key": 2000}]}
    planned = modules.run("vadp_disk_restore", **machine.options("untracked", _ansible_check_mode=True, **options))
    assert "its whole content would be written: point untracked" in planned["restored"][0]["reason"], planned
    # The query fails for one disk; the other one's is fine.
    machine.write(2000, *SPREAD, seed=3)
    machine.write(2001, *SPREAD, seed=3)
    call("inject", target="call", name="QueryChangedDiskAreas", fault="FileFault", count=1)
    result = machine.restore("two")
    machine.whole(result, "the changed areas are not known", "FileFault", keys=[2000])
    assert result["restored"][2001]["bytes_written"] <= 1.2 * len(SPREAD) * CLUSTER
    machine.power(True)
    modules.track_changes("reset")
    modules.point("four")
    call("reset_cbt", vm="app01", disk=2000)
    machine.write(2001, 0, seed=4)
    machine.power(False)
    # A snapshot that can't be made is no reason to fail.
    call("inject", target="task", name="CreateSnapshot_Task", fault="GenericVmConfigFault", count=1)
    machine.whole(machine.restore("four", **options), "a snapshot to compare with can't be made", keys=[2000])
    modules.track_changes("reset")
    modules.point("five")
    call("reset_cbt", vm="app01", disk=2000)
    result = machine.restore("five")
    machine.whole(result, "change tracking was reset since point five", keys=[2000])
    assert result["restored"][2001]["bytes_written"] == 0
    # A restore took away what the machine said of the points that it stood on.
    machine.whole(machine.restore("five", disks=[{"key": 2001}]), "names no restore point", keys=[2001])

    # Another disk, another machine: whatever their tracking says is of something else.
    modules.track_changes("reset")
    theirs = modules.snapshot("theirs")
    modules.point("six")
    modules.remove_snapshot(theirs)
    machine.whole(machine.restore("six"), "other snapshots at point six", "'theirs'")
    call("power", vm="restore01", state="poweredOff")
    targets = [{"key": key, "target_key": key} for key in BOTH]
    other = {**modules.export_options(name="restore01"), "vm_name": "app01", "target": "in_place", "overwrite": True}
    result = modules.done("vadp_disk_restore", **other, point="six", changed_only=True, disks=targets)
    assert all("another virtual machine's" in entry["reason"] for entry in result["restored"]), result
    assert {key: modules.simulator.disk("restore01", key) for key in BOTH} == modules.held["six"]
    modules.clean()


def test_what_is_refused_touches_nothing(modules: Modules, administrator: Administrator) -> None:
    machine = Machine(modules)
    modules.point("one")
    machine.write(2000, 0, seed=2)
    held = {key: modules.simulator.disk("app01", key) for key in BOTH}
    at = modules.simulator.last_call()

    def refused(word: str, **options: Any) -> None:
        result = modules.run("vadp_disk_restore", **machine.options("one", **options))
        assert result["failed"] and word in result["msg"], result
        modules.clean()
        assert not machine.marks and {key: modules.simulator.disk("app01", key) for key in BOTH} == held

    refused("it is poweredOn: power it off")
    refused("overwrite", overwrite=False)
    refused("The option changed_only is for target=in_place", target="file", dest="/", overwrite=False, name=None)
    changing = [name for name in modules.simulator.changing_calls(at) if name not in ("Login", "Logout")]
    assert not changing, changing
    machine.power(False)
    machine.call("grow_disk", vm="app01", disk=2001, capacity_bytes=held[2001][0] + MIB)
    held[2001] = modules.simulator.disk("app01", 2001)
    refused("the sizes must be equal")


def test_a_kill_while_the_snapshot_is_there(modules: Modules) -> None:
    """The next restore removes the snapshot, and so does vadp_recover. Nothing was written: tracking is asked again."""
    machine = Machine(modules)
    modules.point("one")
    machine.write(2000, *SPREAD, seed=2)
    machine.power(False)

    def killed() -> None:
        machine.call("inject", target="call", name="QueryChangedDiskAreas", delay=30.0, count=1)
        process = modules.start("vadp_disk_restore", machine.options("one"))
        machine.until(process, lambda: modules.simulator.snapshots("app01"))
        process.kill()
        machine.call("clear_injections")
        assert len(modules.simulator.snapshots("app01")) == 1 and not machine.journals()

    killed()
    modules.done("vadp_recover", **{k: v for k, v in modules.export_options().items() if k in _RECOVER})
    assert modules.simulator.snapshots("app01") == []
    killed()
    result = machine.restore("one")
    assert result["restored"][2000]["changed_only"] and result["restored"][2001]["bytes_written"] == 0
    assert not machine.records()


@pytest.mark.soak
def test_a_kill_in_the_middle_is_finished_from_the_journal(modules: Modules) -> None:
    machine = Machine(modules)
    modules.point("zero")
    machine.write(2001, 0, seed=9)
    modules.point("one")

    def killed() -> None:
        """In the middle of the first disk."""
        for key in BOTH:
            machine.write(key, *SPREAD, seed=2 + key)
        machine.power(False)
        process = modules.start("vadp_disk_restore", machine.options("one", rate_limit="200K"))
        before = machine.wire()
        machine.until(process, lambda: machine.half_written() == [2000] and machine.wire() > before)
        process.kill()
        # The journal and the mark were there before the first byte.
        assert [path.name.split(".")[-2] for path in machine.journals()] == ["2000"] and machine.marks == [2000]

    killed()
    # A backup of the half-restored machine believes nothing, and the machine even runs for a while.
    machine.power(True)
    assert modules.point("between")[2000]["mode"] == "full"
    warnings = modules.backups.manifest("app01", "between")["warnings"]
    assert any(
        "disk 2000 holds neither what it held nor a restore point: a restore of point one" in one for one in warnings
    )
    machine.write(2000, 20 * MIB + 7 * SECTOR, seed=5)
    machine.power(False)
    at = modules.simulator.last_call()
    planned = modules.run("vadp_disk_restore", **machine.options("one", _ansible_check_mode=True))
    assert "finished from its journal" in planned["restored"][0]["reason"]
    assert [(disk["key"], disk["point"]) for disk in planned["half_written"]] == [(2000, "one")]
    before = machine.wire()
    process = modules.start("vadp_disk_restore", machine.options("one", rate_limit="200K", disks=[{"key": 2000}]))
    machine.until(process, lambda: machine.wire() > before)
    process.kill()
    assert machine.queries(at) == 0, "never a second query"
    result = modules.done("vadp_disk_restore", **machine.options("one"))
    machine.holds("one")
    first, second = result["restored"]
    assert "finished from its journal" in first["reason"] and first["changed_only"]
    assert first["bytes_written"] <= 1.2 * (len(SPREAD) + 1) * CLUSTER
    # The mark is on the other disk too: nothing proves that it was not written.
    assert "carries the mark of a restore" in second["reason"] and not second["changed_only"]
    assert not machine.records() and not machine.journals()

    # With another point in mind the journal is of no use.
    machine.power(True)
    modules.track_changes("reset")
    modules.point("again")
    modules.held["one"] = modules.held["again"]
    killed_again(machine, "again")
    machine.whole(machine.restore("zero"), "wrote a part of it and left no journal for point zero", keys=[2000])
    assert not machine.records() and not machine.journals()

    # A damaged journal is none.
    machine.power(True)
    modules.track_changes("reset")
    modules.point("more")
    killed_again(machine, "more")
    (journal,) = machine.journals()
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(bytes(content))
    machine.whole(machine.restore("more"), "left no journal for point more", keys=[2000])
    machine.power(True)
    assert modules.point("end")[2000]["mode"] == "full"
    modules.verify_bytes("zero", "between", "end")
    modules.clean()


def killed_again(machine: Machine, point: str) -> None:
    for key in BOTH:
        machine.write(key, *SPREAD, seed=20 + key)
    machine.power(False)
    before = machine.wire()
    process = machine.modules.start("vadp_disk_restore", machine.options(point, rate_limit="200K"))
    machine.until(process, lambda: machine.half_written() == [2000] and machine.wire() > before)
    process.kill()


_RECOVER = ("hostname", "port", "username", "password", "ca_path", "name", "repository", "vddk_libdir")
