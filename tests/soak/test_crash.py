# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Kill -9, spread over the calls of a run that leave a trace; see crashpoint.c for what is counted.

After each kill: no half point is visible, no process of the run lives 10 s later, and a rerun makes a point that
verifies and holds the right bytes, and leaves nothing: no snapshot, delta, process, socket, lock or temporary file.

SOAK_KILLS: how often a module is killed (12). SOAK_CHILD_KILLS: how often one of its children (4).
SOAK_PLAYBOOK_KILLS: how often a module that a playbook started (1). SOAK_SEED: where exactly (1).
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

from ansible_collections.openvadp.backup.plugins.module_utils.repository.report import verify
from harness import Ansible, Backups, Outcome
from runner import CrashPoint, Result, Run, Server, build_library
from world import Machine, World, same_bytes

KILLS = int(os.environ.get("SOAK_KILLS", "12"))
CHILD_KILLS = int(os.environ.get("SOAK_CHILD_KILLS", "4"))
PLAYBOOK_KILLS = int(os.environ.get("SOAK_PLAYBOOK_KILLS", "1"))
SEED = int(os.environ.get("SOAK_SEED", "1"))

# A lane that waits for the end of processes costs nothing.
LANES = 6
# How often a lane looks whether a run that may go on is left alone.
REFUSALS = 2
# Longer chains only take longer to verify.
MOST_POINTS = 6

# About what the modules of one backup make.
CALLS_OF_A_PLAYBOOK = 400

FIRST, FULL, INCREMENTAL, BY_HAND, FILES, IN_PLACE = "first", "full", "incremental", "by_hand", "files", "in_place"
CHANGED_ONLY = "changed_only"
# Of twenty-three kills.
SHARES = {FIRST: 3, FULL: 2, INCREMENTAL: 6, BY_HAND: 3, FILES: 3, IN_PLACE: 3, CHANGED_ONLY: 3}


@dataclass
class Attempt:
    """One kill. ``number`` tells attempts apart and chooses what follows the kill."""

    number: int
    kind: str
    of_child: bool
    at: int = 0

    def __str__(self) -> str:
        return f"attempt {self.number} ({self.kind}, {'child' if self.of_child else 'module'} at {self.at})"


class Lane:
    """One machine after the other, and the kills that happen to their runs."""

    def __init__(self, world: World, server: Server) -> None:
        self.world = world
        self.server = server
        self.machine: Optional[Machine] = None
        self.refusals = 0

    def machine_for(self, kind: str) -> Machine:
        """A machine without points for a first backup, else one with at least one point."""
        if self.machine is None or kind == FIRST or len(self.machine.points) >= MOST_POINTS:
            self.close()
            self.machine = self.world.new_machine()
            self.machine.scribble(self.machine.world.simulator.facts["pid"])
        if kind != FIRST and not self.machine.points:
            self.back_up("base")
        return self.machine

    def close(self) -> None:
        if self.machine is not None:
            self.machine.destroy()
            self.machine = None

    def back_up(self, point: str) -> None:
        """A backup that is not disturbed.

        Until its deadline nobody can know of a run of several modules that it is dead: without force it is left alone.
        """
        assert self.machine is not None
        busy = (
            [run.run_id for run in self.machine.job.store.runs() if run.data["controller"]]
            if (self.machine.store_folder.is_dir())
            else []
        )
        if busy and self.refusals < REFUSALS:
            self.refusals += 1
            before = self.machine.state["snapshots"]
            refused = self.server.start(self.machine.job, "back_up", self.machine.tmpdir, point=point)
            error = refused.result().error
            assert error is not None and busy[0] in str(error), f"it was not refused: {error}"
            refused.wait_until_alone()
            assert self.machine.state["snapshots"] == before
        run = self.server.start(self.machine.job, "back_up", self.machine.tmpdir, point=point, force=bool(busy))
        result = run.result()
        assert result.error is None, f"the rerun failed: {result.error}"
        run.wait_until_alone()
        if result.value is not None:
            self.machine.points[point] = self.machine.content()

    def begin(self, attempt: Attempt) -> Run:
        """Begin what is to be killed."""
        machine = self.machine_for(attempt.kind)
        machine.scribble(attempt.number)
        where = {"kill_child_at" if attempt.of_child else "kill_at": attempt.at}
        if attempt.kind == FILES:
            dest = machine.folder / f"dest-{attempt.number}"
            dest.mkdir()
            arguments: Dict[str, Any] = {"point": sorted(machine.points)[-1], "dest": str(dest)}
            return self.server.start(machine.job, "restore_to_files", machine.tmpdir, **where, **arguments)
        if attempt.kind == IN_PLACE:
            machine.power("poweredOff")
            arguments = {"point": sorted(machine.points)[0]}
            return self.server.start(machine.job, "restore_in_place", machine.tmpdir, **where, **arguments)
        if attempt.kind == CHANGED_ONLY:
            # Tracking was reset after the last restore: only a point of after that can be told from now.
            self.back_up(f"r{attempt.number}")
            machine.scribble(3000000 + attempt.number)
            machine.power("poweredOff")
            arguments = {"point": machine.newest_point, "changed_only": True}
            return self.server.start(machine.job, "restore_in_place", machine.tmpdir, **where, **arguments)
        arguments = {"point": f"p{attempt.number}", "mode": FULL if attempt.kind == FULL else "auto"}
        if attempt.kind == BY_HAND:
            arguments.update(snapshot_moid=machine.freeze().moid, parallel_disks=1)
            return self.server.start(machine.job, "export", machine.tmpdir, **where, **arguments)
        return self.server.start(machine.job, "back_up", machine.tmpdir, **where, **arguments)

    def survive(self, attempt: Attempt) -> Optional[str]:
        """One attempt: which program was killed, if any. :raises AssertionError: something is wrong afterwards."""
        run = self.begin(attempt)
        machine = self.machine
        assert machine is not None
        try:
            result = run.result()
            assert attempt.of_child or result.was_killed == run.point.killed
            if attempt.kind == FILES:
                self.after_files(attempt, run, result)
            elif attempt.kind == IN_PLACE:
                self.after_in_place(run, sorted(machine.points)[0])
            elif attempt.kind == CHANGED_ONLY:
                self.after_changed_only(attempt, run)
            elif attempt.kind == BY_HAND:
                self.after_export_by_hand(attempt, run)
            else:
                self.after_backup(attempt, run, result)
            run.wait_until_alone()
            left = machine.leftovers()
            assert not left, f"left behind: {left}"
        except AssertionError as error:
            raise AssertionError(f"{attempt}: {run.point}: {error}") from error
        if not run.point.killed:
            return None
        return run.point.program if attempt.of_child else "module"

    def after_backup(self, attempt: Attempt, run: Run, result: Result) -> None:
        machine, point = self.machine, f"p{attempt.number}"
        assert machine is not None
        frozen = machine.content()
        new = set(machine.visible_points()) - set(machine.points)
        assert new <= {point}, f"strange points are visible: {new}"
        if new:
            # It was committed before the kill: then it is whole.
            machine.points[point] = frozen
            self.check_point(point)
        if not result.was_killed:
            # The module lived on, so it has cleaned up itself.
            assert bool(new) == (result.error is None), f"point: {new}, error: {result.error}"
            run.wait_until_alone()
            left = machine.leftovers()
            assert not left, f"left behind by a module that lived on: {left}"
        what_follows = attempt.number % 4
        if what_follows:
            run.wait_until_alone()
        if what_follows == 1 and not new:
            self.retry_on_the_same_snapshot(point, frozen)
        if what_follows == 2:
            self.kill_the_rerun(attempt)
        if point not in machine.points:
            # What is written now must not get into a point together with what was read before.
            machine.scribble(1000000 + attempt.number)
        self.back_up(point)
        self.check_point(point)

    def retry_on_the_same_snapshot(self, point: str, frozen: Dict[int, bytes]) -> None:
        """As a user would who goes on with vadp_disk_export: what was finished may be kept, for it is the same."""
        machine = self.machine
        assert machine is not None
        ours = [item["moid"] for item in machine.state["snapshots"] if item["name"] == f"openvadp {point}"]
        if not ours:
            return
        machine.scribble(len(machine.points))
        run = self.server.start(machine.job, "export", machine.tmpdir, point=point, snapshot_moid=ours[0])
        result = run.result()
        assert result.error is None, f"the export from the same snapshot failed: {result.error}"
        run.wait_until_alone()
        machine.points[point] = frozen
        self.check_point(point)

    def kill_the_rerun(self, attempt: Attempt) -> None:
        """Killed again, in the middle of the recovery or later."""
        machine = self.machine
        assert machine is not None
        point = f"p{attempt.number}"
        at = random.Random(attempt.number).randrange(1, 250)
        run = self.server.start(machine.job, "back_up", machine.tmpdir, kill_at=at, point=point, force=True)
        run.result()
        run.wait_until_alone()
        if point in machine.visible_points() and point not in machine.points:
            machine.points[point] = machine.content()

    def after_export_by_hand(self, attempt: Attempt, run: Run) -> None:
        """A snapshot of the user's own, and vadp_disk_export alone: again from the same snapshot, or from a new one."""
        machine, point = self.machine, f"p{attempt.number}"
        assert machine is not None
        frozen = machine.foreign[0]
        run.wait_until_alone()
        machine.scribble(2000000 + attempt.number)
        if attempt.number % 3 and point not in machine.visible_points():
            # What was finished from the snapshot before must not get into the point.
            machine.thaw(frozen)
            frozen = machine.freeze()
        again = self.server.start(
            machine.job, "export", machine.tmpdir, point=point, snapshot_moid=frozen.moid, parallel_disks=1
        )
        repeated = again.result()
        assert repeated.error is None, f"the rerun failed: {repeated.error}"
        again.wait_until_alone()
        machine.points[point] = frozen.disks
        self.check_point(point)
        machine.thaw(frozen)
        # In a process with the same TMPDIR.
        recovery = self.server.start(machine.job, "recover", machine.tmpdir)
        assert recovery.result().error is None
        recovery.wait_until_alone()

    def check_point(self, point: str) -> None:
        machine = self.machine
        assert machine is not None
        assert machine.visible_points() == sorted(machine.points)
        verified = verify(machine.job.store, point, "data")
        assert verified["ok"], f"point {point} does not verify: {verified}"
        machine.compare_point(point)

    def after_files(self, attempt: Attempt, run: Run, result: Result) -> None:
        machine = self.machine
        assert machine is not None
        dest = machine.folder / f"dest-{attempt.number}"
        point = sorted(machine.points)[-1]
        expected = {
            f"{machine.name}-hard-disk-{key - 1999}-{key}.raw": data for key, data in machine.points[point].items()
        }

        def check(whole: bool) -> None:
            for name, data in expected.items():
                if whole or (dest / name).exists():
                    same_bytes(dest / name, data, name)

        check(whole=result.was_killed is False and result.error is None)
        if attempt.number % 2:
            run.wait_until_alone()
        again = self.server.start(machine.job, "restore_to_files", machine.tmpdir, point=point, dest=str(dest))
        repeated = again.result()
        assert repeated.error is None, f"the rerun failed: {repeated.error}"
        again.wait_until_alone()
        run.wait_until_alone()
        check(whole=True)
        assert sorted(os.listdir(dest)) == sorted(expected)

    def after_changed_only(self, attempt: Attempt, run: Run) -> None:
        """Killed again now and then; the guest may even have run, or a recovery, before the rerun."""
        machine = self.machine
        assert machine is not None
        point = machine.newest_point
        run.wait_until_alone()
        source = random.Random(attempt.number)
        if attempt.number % 2:
            again = self.server.start(
                machine.job,
                "restore_in_place",
                machine.tmpdir,
                kill_at=source.randrange(1, 250),
                point=point,
                changed_only=True,
            )
            again.result()
            again.wait_until_alone()
        if attempt.number % 3 == 0:
            recovery = self.server.start(machine.job, "recover", machine.tmpdir)
            assert recovery.result().error is None
            recovery.wait_until_alone()
        if attempt.number % 3 == 1 and not machine.state["snapshots"]:
            machine.power("poweredOn")
            key = source.choice(sorted(machine.disks))
            machine.control.call(
                "guest_write", vm=machine.moid, disk=key, offset=512 * source.randrange(64), data=b"x" * 512
            )
            machine.power("poweredOff")
        self.after_in_place(run, point, changed_only=True)

    def after_in_place(self, run: Run, point: str, **options: Any) -> None:
        machine = self.machine
        assert machine is not None
        # A disk has one writer: the next one comes when the first has ended.
        run.wait_until_alone()
        again = self.server.start(machine.job, "restore_in_place", machine.tmpdir, point=point, **options)
        repeated = again.result()
        assert repeated.error is None, f"the rerun failed: {repeated.error}"
        written = repeated.value["changed"]
        again.wait_until_alone()
        machine.disks = {key: bytearray(data) for key, data in machine.points[point].items()}
        machine.compare_with_simulator()
        assert machine.visible_points() == sorted(machine.points)
        left = machine.leftovers()
        assert not left, f"left behind: {left}"
        machine.power("poweredOn")
        # Its tracking lies now: the next point must be a full one.
        machine.scribble(len(machine.points))
        name = f"q{len(machine.points)}"
        self.back_up(name)
        modes = {disk["mode"] for disk in machine.manifest(name)["disks"].values()}
        # Where a kill came too early or too late for the rerun to write, tracking may be right: the bytes tell.
        assert modes == {FULL} or not written, f"after a restore the disks were read as {modes}"
        self.check_point(name)
        again = self.server.start(machine.job, "reset_tracking", machine.tmpdir)
        assert again.result().error is None
        again.wait_until_alone()


def spread(count: int, calls: int, source: random.Random) -> List[int]:
    """*count* numbers of calls, one in each part of the range."""
    return [1 + int((part + source.random()) * calls / count) for part in range(count)]


def attempts(counts: Dict[str, Any]) -> List[Attempt]:
    """All kills, in an order that mixes them."""
    source = random.Random(SEED)
    found: List[Attempt] = []
    for of_child, total in ((False, KILLS), (True, CHILD_KILLS)):
        kinds = [kind for kind, share in SHARES.items() for unused in range(share)]
        chosen = [kinds[int(number * len(kinds) / total)] for number in range(total)]
        for kind in SHARES:
            calls = counts[kind][1] if of_child else counts[kind][0]
            found += [Attempt(0, kind, of_child, at) for at in spread(chosen.count(kind), calls, source)]
    source.shuffle(found)
    for number, attempt in enumerate(found):
        attempt.number = number
    return found


def count_calls(world: World, server: Server) -> Dict[str, Any]:
    """(calls of all, calls of the children) of an undisturbed run of each kind."""
    lane = Lane(world, server)
    counts = {}
    try:
        for number, kind in enumerate(SHARES):
            run = lane.begin(Attempt(1000 + number, kind, False))
            result = run.result()
            assert result.error is None, result.error
            if kind == CHANGED_ONLY:
                as_a_whole = [disk["reason"] for disk in result.value["restored"] if not disk["changed_only"]]
                assert not as_a_whole, as_a_whole
            run.wait_until_alone()
            counts[kind] = (run.point.calls, run.point.child_calls)
            assert lane.machine is not None
            if kind in (FIRST, FULL, INCREMENTAL, BY_HAND):
                lane.machine.points[f"p{1000 + number}"] = lane.machine.content()
            for frozen in list(lane.machine.foreign):
                lane.machine.thaw(frozen)
            if kind == IN_PLACE:
                # Till then no point can be told from now, see CHANGED_ONLY.
                reset = server.start(lane.machine.job, "reset_tracking", lane.machine.tmpdir)
                assert reset.result().error is None
                reset.wait_until_alone()
    finally:
        lane.close()
    return counts


def test_after_a_kill_a_rerun_mends_everything(world: World, server: Server, report: Callable[[str], None]) -> None:
    counts = count_calls(world, server)
    todo = attempts(counts)
    kills, failures, victims = 0, [], Counter()
    mutex = threading.Lock()
    waiting: Iterator[Attempt] = iter(todo)

    def work() -> None:
        nonlocal kills
        victim: Optional[str]
        lane = Lane(world, server)
        try:
            while True:
                with mutex:
                    attempt = next(waiting, None)
                if attempt is None:
                    return
                try:
                    victim = lane.survive(attempt)
                except Exception as error:  # noqa: BLE001  whatever it is, it is reported
                    # The machine is in a state of which nothing is known: the next attempt takes another.
                    victim = "unknown"
                    lane.machine = None
                    with mutex:
                        failures.append(str(error) if isinstance(error, AssertionError) else traceback.format_exc())
                with mutex:
                    kills += victim is not None
                    victims[victim] += 1
        finally:
            lane.close()

    with ThreadPoolExecutor(LANES) as lanes:
        for future in [lanes.submit(work) for unused in range(LANES)]:
            future.result()
    who = ", ".join(f"{times} of {victim}" for victim, times in victims.most_common() if victim)
    spots = ", ".join(f"{kind} {calls[0]}" for kind, calls in counts.items())
    report(f"crash: {kills} kills ({who}), {kills - len(failures)} survived (seed {SEED}; calls of a run: {spots})")
    assert not failures, "\n\n".join(failures)
    assert kills >= 0.9 * len(todo), f"only {kills} of {len(todo)} runs were killed"


def processes_with(text: str) -> List[str]:
    """Command lines of processes in whose environment a text stands."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if text.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def kill_in_a_playbook(world: World, folder: Path, at: int) -> bool:
    """One backup by the role, in which a module is killed, and another one; whether it was killed."""
    machine = world.new_machine()
    machine.scribble(at)
    ansible = Ansible(folder / "ansible")
    variables = Backups(world.simulator, ansible, machine.repository).variables(point="night", name=machine.name)
    environment = {"TMPDIR": str(machine.tmpdir)}
    point = CrashPoint(folder / "shared", kill_at=at)
    preload = {"LD_PRELOAD": str(build_library()), "CRASHPOINT_FILE": str(point.path), "CRASHPOINT_ONLY": "AnsiballZ_"}

    def run(more: Dict[str, str]) -> Outcome:
        more = dict(environment, **more)
        return ansible.run("openvadp.backup.backup", hosts=[machine.name], variables=variables, environment=more)

    outcome = run(preload)
    visible, frozen = machine.visible_points(), machine.content()
    assert visible in ([], ["night"]) and (point.killed or outcome.rc == 0), str(outcome)
    deadline = time.monotonic() + 10
    while processes_with(str(point.path)):
        assert time.monotonic() < deadline, f"10 s after the end: {processes_with(str(point.path))}"
        time.sleep(0.1)
    if not visible:
        machine.scribble(at + 1)
        frozen = machine.content()
    if point.killed and list(machine.store_folder.glob("runs/*.json")):
        # The role cleared up where it could; else nobody knows until the deadline that the run is over.
        variables["vm_backup_force"] = True
    run({}).ok()
    machine.points["night"] = frozen
    machine.compare_point("night")
    verified = verify(machine.job.store, "night", "data")
    assert verified["ok"], verified
    # What a dead module leaves of Ansible is Ansible's own.
    left = [item for item in machine.leftovers() if not item.startswith("temporary ansible")]
    assert not left, f"{point}: left behind: {left}"
    machine.destroy()
    return point.killed


def test_a_module_of_a_playbook_is_killed(world: World, tmp_path: Path, report: Callable[[str], None]) -> None:
    """Through ansible-playbook: the role takes the module's death for a failure, and clears up."""
    kills = 0
    for number, at in enumerate(spread(PLAYBOOK_KILLS, CALLS_OF_A_PLAYBOOK, random.Random(SEED))):
        folder = tmp_path / str(number)
        folder.mkdir()
        kills += kill_in_a_playbook(world, folder, at)
    report(f"crash, through ansible-playbook: {kills} kills, {kills} survived (seed {SEED})")
    assert kills >= 0.9 * PLAYBOOK_KILLS
