# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Random sequences of what happens to a virtual machine and its backups, against a model that knows every byte.

Every complete point must restore to what its snapshot froze. After each step there is no half point and no process, and
once a crash is recovered from, nothing of it is left.

SOAK_MINUTES: how long (0.3). SOAK_SEED: which sequences (1; the same seed, the same sequences). SOAK_SHRINK=1: a
sequence that fails is made as short as possible, which takes long.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, ClassVar, Dict, List, Optional, Set, Tuple

from ansible_collections.openvadp.backup.plugins.module_utils.errors import RepositoryError, VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.report import verify
from hypothesis import HealthCheck, Phase, assume, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException, StopTest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from runner import Server, descendants
from world import SECTOR, SIZES, Frozen, World, same_bytes

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.3"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
# They wait for others most of the time.
WORKERS = (os.cpu_count() or 1) + 1
STEPS = 10 if MINUTES < 2 else 25

KEYS = tuple(2000 + number for number in range(len(SIZES)))
AUTO, FULL, INCREMENTAL, DIFFERENTIAL = "auto", "full", "incremental", "differential"
# About what an undisturbed backup makes (see crashpoint.c for what counts).
CALLS_OF_A_BACKUP = 420
CALLS_OF_A_RESTORE = 170

keys = st.sampled_from(KEYS)
# Borders of tracked blocks and of clusters, the two ends of the disk, and anything between.
sectors = st.one_of(st.sampled_from([0, 1, 127, 128, 129, 2047, -1]), st.integers(0, 6300))
lengths = st.one_of(st.sampled_from([1, 127, 128, 129]), st.integers(1, 400))
# (disk, first sector, sectors, what: None is a discard, 0 are zeros, else the seed of random bytes)
guest_acts = st.lists(
    st.tuples(keys, sectors, lengths, st.one_of(st.none(), st.integers(0, 3), st.integers(1, 1 << 30))), max_size=4
)


class TimeIsOver(KeyboardInterrupt):
    """Ends a test of Hypothesis early and in peace, as Ctrl-C would."""


class BackupModel(RuleBasedStateMachine):
    """One sequence: a new machine, a new repository."""

    world: ClassVar[World]
    server: ClassVar[Server]
    until: ClassVar[float] = 0
    failed: ClassVar[bool] = False
    sequences: ClassVar[int] = 0
    compared: ClassVar[int] = 0
    steps: ClassVar[Dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        if time.monotonic() > self.until and not self.failed:
            raise TimeIsOver
        # Processes that are none of a run's.
        self.ours = set(descendants(os.getpid()))
        self.machine = self.world.new_machine()
        os.environ["TMPDIR"] = str(self.machine.tmpdir)
        self.number = 0
        # What makes the next point of a disk full, or may; since its last point.
        self.since: Dict[int, Set[str]] = {key: set() for key in KEYS}
        # Disks whose tracking lies until it is reset.
        self.lying: Set[int] = set()
        # A crash is not recovered from yet.
        self.crashed = False
        # How much may be changed before the next backup; and what came last: the time is for backups.
        self.changes = 1.0
        self.last = ""
        # Tracking was begun over a snapshot, and no point has seen that yet: once the snapshot is gone nobody can.
        self.unseen = False

    def count(self, step: str, changes: float = 0) -> None:
        """A step was made.

        :param changes: 1: of what decides how a disk is read; less than 0: a backup, which makes room for such changes.
        """
        self.steps[step] = self.steps.get(step, 0) + 1
        self.changes = min(1, self.changes - changes)
        self.last = step

    @initialize(number=st.integers(0, 1 << 30))
    def begin(self, number: int) -> None:
        # What Hypothesis tries first is the simplest of all: the same step over and over.
        assume(number != 0)

    # The guest and the administrator

    @precondition(lambda self: self.last != "guest")
    @rule(acts=guest_acts)
    def guest(self, acts: List[Tuple[int, int, int, Optional[int]]]) -> None:
        for key, sector, length, what in acts:
            size = len(self.machine.disks[key])
            offset = sector * SECTOR % size
            count = min(length * SECTOR, size - offset)
            if what is None:
                self.machine.discard(key, offset, count)
            else:
                self.machine.write(key, offset, bytes(count) if what == 0 else random.Random(what).randbytes(count))
        if acts:
            self.count("guest")

    def no_snapshots(self) -> bool:
        return not self.machine.state["snapshots"]

    @precondition(lambda self: self.changes >= 1)
    @rule(key=keys, more=st.integers(1, 300))
    def grow(self, key: int, more: int) -> None:
        if self.no_snapshots():
            self.machine.grow(key, len(self.machine.disks[key]) + more * SECTOR)
            self.since[key].add("grown")
            self.count("grow", 1)

    @precondition(lambda self: self.changes >= 1)
    @rule(key=keys)
    def replace(self, key: int) -> None:
        if self.no_snapshots():
            self.machine.replace_disk(key)
            self.since[key].add("replaced")
            self.lying.discard(key)
            self.count("replace", 1)

    @precondition(lambda self: self.changes >= 1 and not self.crashed)
    @rule(key=keys)
    def reset_behind_our_back(self, key: int) -> None:
        self.machine.control.call("reset_cbt", vm=self.machine.moid, disk=key)
        self.tracking_begins([key])
        self.count("reset", 1)

    def tracking_begins(self, of: List[int]) -> None:
        for key in of:
            self.since[key].add("reset")
            self.lying.discard(key)
        if self.machine.foreign:
            self.unseen = True

    @precondition(lambda self: self.changes >= 1 and not self.crashed and not self.machine.foreign)
    @rule()
    def reset(self) -> None:
        self.machine.job.reset_tracking()
        self.tracking_begins(list(KEYS))
        self.count("reset", 1)

    @precondition(lambda self: self.changes >= 1 and not self.crashed)
    @rule(over_a_snapshot=st.booleans())
    def tracking_off_and_on(self, over_a_snapshot: bool) -> None:
        if over_a_snapshot and not self.machine.foreign:
            self.machine.freeze()
        for enabled in (False, True):
            self.machine.set_tracking(enabled)
        self.tracking_begins(list(KEYS))
        self.count("off and on", 1)

    @precondition(lambda self: self.last != "foreign snapshot" and len(self.machine.foreign) < 3)
    @rule()
    def freeze(self) -> None:
        self.machine.freeze()
        self.count("foreign snapshot")

    @precondition(lambda self: self.machine.foreign and not self.unseen)
    @rule(data=st.data(), every_one=st.booleans())
    def thaw(self, data: st.DataObject, every_one: bool) -> None:
        for frozen in list(self.machine.foreign) if every_one else [self.a_foreign_one(data)]:
            self.machine.thaw(frozen)
        self.count("foreign snapshot removed")

    @precondition(lambda self: self.changes >= 1 and self.machine.foreign and not self.unseen)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        self.machine.revert(self.a_foreign_one(data))
        for key in KEYS:
            self.since[key].add("reverted")
        self.count("revert", 1)

    def a_foreign_one(self, data: st.DataObject) -> Frozen:
        return self.machine.foreign[data.draw(st.integers(0, len(self.machine.foreign) - 1), "snapshot")]

    # Backups

    def new_point(self) -> str:
        self.number += 1
        return f"p{self.number:03}"

    @rule(mode=st.sampled_from([AUTO] * 5 + [FULL, INCREMENTAL, DIFFERENTIAL]), while_frozen=guest_acts)
    def back_up(self, mode: str, while_frozen: List[Tuple[int, int, int, Optional[int]]]) -> None:
        """All of the role; the guest goes on writing while its snapshot is read."""
        machine, point = self.machine, self.new_point()
        frozen: Dict[int, bytes] = {}

        def write() -> None:
            frozen.update(machine.content())
            self.guest(while_frozen)

        must = {key: self.must_be(key) for key in KEYS}
        refusal: Optional[Exception] = None
        try:
            machine.job.back_up(point, mode, write, force=self.crashed)
        except (RepositoryError, VsphereError) as error:
            assert mode in (INCREMENTAL, DIFFERENTIAL), f"mode {mode} failed: {error}"
            refusal = error
        self.crashed = False
        if refusal is None:
            self.keep(point, frozen)
            self.check_modes(point, mode, must)
            self.forget()
        else:
            assert mode != INCREMENTAL or set(must.values()) != {INCREMENTAL}, f"refused needlessly: {refusal}"
        self.count(f"backup {mode}" + (", refused" if refusal else ""), -0.5)

    @rule(nights=st.lists(guest_acts, min_size=2, max_size=4))
    def back_up_every_night(self, nights: List[List[Tuple[int, int, int, Optional[int]]]]) -> None:
        """A chain grows."""
        for acts in nights:
            self.guest(acts)
            self.back_up(AUTO, [])

    def must_be(self, key: int) -> Optional[str]:
        """How a disk has to be read in mode auto; None if either way is right."""
        holding = [self.machine.manifest(point) for point in self.machine.visible_points()]
        since = self.since[key]
        if not holding or since & {"replaced", "grown", "reset"} or key in self.lying:
            return FULL
        last = max(holding, key=lambda manifest: (manifest["snapshot"]["created"], manifest["run_id"]))
        if last["snapshot"]["foreign"] or last["disks"][key]["change_id"] is None:
            return FULL
        return None if since else INCREMENTAL

    def check_modes(self, point: str, mode: str, must: Dict[int, Optional[str]]) -> None:
        for key, disk in self.machine.manifest(point)["disks"].items():
            self.steps[f"{disk['mode']} layers"] = self.steps.get(f"{disk['mode']} layers", 0) + 1
            if mode != AUTO:
                assert disk["mode"] == mode
            else:
                assert must[key] in (None, disk["mode"]), (
                    f"disk {key} of {point} was read as {disk['mode']} ({disk['reason']}), not as {must[key]}"
                )

    def forget(self) -> None:
        """A point has seen all there was."""
        for key in KEYS:
            self.since[key].clear()
            if self.unseen:
                self.count("disk with tracking begun over a snapshot")
                self.lying.add(key)
        self.unseen = False

    def keep(self, point: str, frozen: Dict[int, bytes]) -> None:
        self.machine.points[point] = frozen
        BackupModel.compared += self.machine.compare_point(point)

    @precondition(lambda self: self.machine.foreign)
    @rule(data=st.data(), mode=st.sampled_from([AUTO, AUTO, FULL, INCREMENTAL]))
    def export_a_foreign_snapshot(self, data: st.DataObject, mode: str) -> None:
        """A snapshot that the user made himself; the points that follow may be younger than newer ones."""
        point, frozen = self.new_point(), self.a_foreign_one(data)
        if not self.machine.visible_points() and not (self.machine.repository / "repository.json").exists():
            return
        refused = False
        try:
            self.machine.job.export(point, frozen.moid, mode, force=self.crashed)
        except (RepositoryError, VsphereError) as error:
            assert mode == INCREMENTAL, f"mode {mode} failed: {error}"
            refused = True
        if not refused:
            self.keep(point, frozen.disks)
            for key in KEYS:
                self.since[key].add("an older snapshot was read")
        self.count("export of a foreign snapshot" + (", refused" if refused else ""), -0.5)

    @rule(
        where=st.integers(1, CALLS_OF_A_BACKUP),
        of_child=st.booleans(),
        then=st.sampled_from(["recover", "same snapshot", "nothing"]),
        meanwhile=guest_acts,
    )
    def crash(
        self, where: int, of_child: bool, then: str, meanwhile: List[Tuple[int, int, int, Optional[int]]]
    ) -> None:
        """A backup in which the module, or one of its children, is killed; and what follows."""
        machine, point = self.machine, self.new_point()
        frozen, visible = machine.content(), set(machine.visible_points())
        kill = {"kill_child_at": where // 6 + 1} if of_child else {"kill_at": where}
        run = self.server.start(machine.job, "back_up", machine.tmpdir, point=point, force=self.crashed, **kill)
        result = run.result()
        run.wait_until_alone()
        self.ours.add(run.keeper)
        new = set(machine.visible_points()) - visible
        assert new <= {point}
        if new:
            self.keep(point, frozen)
            self.forget()
        elif result.was_killed:
            # It may have got so far as to change the tracking, or to see that it lies.
            for key in KEYS:
                self.since[key].add("a run crashed")
        self.crashed = result.was_killed
        assert bool(new) == (result.error is None) or result.was_killed, f"{new}, {result.error}"
        self.count(f"crash, then {then}" if run.point.killed else "crash that came too late", -0.5)
        self.guest(meanwhile)
        if then == "recover":
            machine.job.recover(force=True)
            self.crashed = False
        elif then == "same snapshot" and not new:
            ours = [item["moid"] for item in machine.state["snapshots"] if item["name"] == f"openvadp {point}"]
            if ours:
                machine.job.export(point, ours[0], force=self.crashed)
                self.keep(point, frozen)
                self.forget()

    # Restores

    @precondition(lambda self: self.machine.points and "restore" not in self.last)
    @rule(data=st.data(), image_format=st.sampled_from(["raw", "raw", "qcow2", "vmdk"]))
    def restore_to_files(self, data: st.DataObject, image_format: str) -> None:
        point = data.draw(st.sampled_from(sorted(self.machine.points)), "point")
        dest = self.machine.folder / "dest"
        dest.mkdir()
        result = self.machine.job.restore_to_files(point, str(dest), format=image_format)
        raw = self.machine.folder / "restored.raw"
        for entry in result["restored"]:
            convert = ["qemu-img", "convert", "-f", image_format, "-O", "raw", entry["target"], str(raw)]
            subprocess.run(convert, check=True)
            expected = self.machine.points[point][entry["key"]]
            same_bytes(raw, expected, f"disk {entry['key']} restored from point {point}")
            os.unlink(entry["target"])
            BackupModel.compared += 1
        raw.unlink()
        dest.rmdir()
        self.count("restore to files")

    @precondition(lambda self: self.changes >= 1 and self.machine.points and not self.crashed)
    @rule(data=st.data(), where=st.integers(1, 3 * CALLS_OF_A_RESTORE))
    def restore_in_place(self, data: st.DataObject, where: int) -> None:
        """Into the machine itself; one of three is killed and done again."""
        machine = self.machine
        point = data.draw(st.sampled_from(sorted(machine.points)), "point")
        present = {disk["key"]: (disk["uuid"], disk["capacity_bytes"]) for disk in machine.state["disks"]}
        stored = machine.manifest(point)["disks"]
        if present != {key: (disk["uuid"], disk["capacity_bytes"]) for key, disk in stored.items()}:
            return
        if machine.state["snapshots"]:
            return
        machine.power("poweredOff")
        if where <= CALLS_OF_A_RESTORE:
            run = self.server.start(
                machine.job, "restore_in_place", machine.tmpdir, kill_at=where, point=point, force=self.crashed
            )
            run.result()
            run.wait_until_alone()
            self.ours.add(run.keeper)
        machine.job.restore_in_place(point, force=self.crashed)
        machine.power("poweredOn")
        machine.disks = {key: bytearray(held) for key, held in machine.points[point].items()}
        machine.compare_with_simulator()
        # The restore has started the tracking of all disks anew.
        for key in KEYS:
            self.since[key].add("reset")
            self.lying.discard(key)
        self.count("restore in place", 1)

    # What holds after each step

    @invariant()
    def what_is_visible_is_whole(self) -> None:
        assert self.machine.visible_points() == sorted(self.machine.points)

    @invariant()
    def nothing_is_left(self) -> None:
        alive = {pid: line for pid, line in descendants(os.getpid()).items() if pid not in self.ours}
        assert not alive, f"processes: {alive}"
        if not self.crashed:
            left = self.machine.leftovers()
            assert not left, f"left behind: {left}"

    def teardown(self) -> None:
        error, machine = sys.exc_info()[1], self.machine
        if isinstance(error, (HypothesisException, StopTest)):
            machine.destroy()
            return
        if error is not None:
            BackupModel.failed = True
            return
        if self.crashed:
            machine.job.recover(force=True)
            self.crashed = False
        self.nothing_is_left()
        self.what_is_visible_is_whole()
        machine.compare_with_simulator()
        for point in sorted(machine.points):
            self.compared_again(point)
        machine.destroy()
        BackupModel.sequences += 1

    def compared_again(self, point: str) -> None:
        """Points do not change, whatever came after them."""
        BackupModel.compared += self.machine.compare_point(point)
        verified = verify(self.machine.job.store, point, "data")
        assert verified["ok"], f"point {point} does not verify: {verified}"


def work(number: int, seconds: float, report: Path) -> None:
    """What one worker does: sequences until the time is over."""
    BackupModel.world = world = World()
    BackupModel.until = time.monotonic() + seconds
    phases = [Phase.generate] + ([Phase.shrink] if os.environ.get("SOAK_SHRINK") else [])
    wanted = settings(
        # Of ten and more, the first ones are small.
        max_examples=9,
        stateful_step_count=STEPS,
        database=None,
        phases=phases,
        print_blob=False,
        report_multiple_bugs=False,
        # This process knows nothing of conftest.py.
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        folder = world.folder / "runs"
        folder.mkdir()
        BackupModel.server = Server(folder)
        try:
            for turn in itertools.count(number * 100_000):
                run_state_machine_as_test(seed(turn)(BackupModel), settings=wanted)
        except TimeIsOver:
            pass
        finally:
            BackupModel.server.stop()
    finally:
        world.stop()
        counts = {
            "sequences": BackupModel.sequences,
            "compared": BackupModel.compared,
            "steps": dict(sorted(BackupModel.steps.items())),
        }
        report.write_text(json.dumps(counts), encoding="utf-8")


def test_every_point_restores_to_what_its_snapshot_froze(tmp_path: Path, report: Callable[[str], None]) -> None:
    workers = []
    for number in range(WORKERS):
        log = (tmp_path / f"log-{number}").open("wb")
        arguments = [str(SEED * 1000 + number), str(MINUTES * 60), str(tmp_path / f"report-{number}")]
        command = [sys.executable, __file__, *arguments]
        workers.append((subprocess.Popen(command, stdout=log, stderr=log), log))
    for process, log in workers:
        process.wait()
        log.close()
    counts = [json.loads((tmp_path / f"report-{number}").read_text()) for number in range(WORKERS)]
    sequences, compared = (sum(one[name] for one in counts) for name in ("sequences", "compared"))
    steps: Dict[str, int] = {}
    for one in counts:
        for name, times in one["steps"].items():
            steps[name] = steps.get(name, 0) + times
    done = ", ".join(f"{times} {name}" for name, times in sorted(steps.items()))
    report(f"model: {sequences} sequences, {compared} disks of points compared (seed {SEED}; {done})")
    logs = [(tmp_path / f"log-{number}").read_text(errors="replace") for number in range(WORKERS)]
    assert all(process.returncode == 0 for process, unused in workers), "\n".join(log[-12000:] for log in logs)
    assert sequences and compared


if __name__ == "__main__":
    work(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
