# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The storage against a model: a disk is a bytearray, a snapshot a copy of it, tracking a set of blocks."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vcenter import storage as storage_module  # noqa: E402
from vcenter.storage import CBT_BLOCK, Storage  # noqa: E402

DATASTORES = {"vmfs01": {"type": "VMFS"}, "nfs01": {"type": "NFS"}}
BASE = "[vmfs01] app/app.vmdk"
BLOCK = CBT_BLOCK
# seven blocks and a bit: the last grain is a partial one
CAPACITY = 7 * BLOCK + 5 * 512


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    made = Storage(tmp_path, DATASTORES)
    made.create_disk(BASE, CAPACITY)
    yield made
    made.close()


def delta(number: int) -> str:
    return f"[vmfs01] app/app-{number:06d}.vmdk"


class StorageMachine(RuleBasedStateMachine):
    """One VM's disk: guest writes, snapshots, removals, reverts, growth, restarts; all bytes and areas compared."""

    snapshots = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.storage = Storage(self.folder, DATASTORES)
        self.storage.create_disk(BASE, CAPACITY)
        self.bytes = bytearray(CAPACITY)
        self.leaf = BASE
        self.count = 0
        self.chain = [BASE]  # base first, the leaf last
        self.frozen: dict[str, tuple[str, bytes, str, int]] = {}  # moid -> path, bytes, change id, marks so far
        self.marks: list[set[int]] = [set()]  # blocks changed, a set for each time between marks
        self.storage.enable_tracking(BASE)

    def teardown(self) -> None:
        self.storage.close()
        shutil.rmtree(self.folder)

    def touched(self, offset: int, length: int) -> None:
        if length:
            self.marks[-1].update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    @rule(data=st.data(), seed=st.integers(0, 1000))
    def write(self, data: st.DataObject, seed: int) -> None:
        offset, length = self.range_of(data)
        content = random.Random(seed).randbytes(length)
        self.storage.write(self.leaf, offset, content)
        self.bytes[offset : offset + length] = content
        self.touched(offset, length)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        offset, length = self.range_of(data)
        self.storage.discard(self.leaf, offset, length)
        self.bytes[offset : offset + length] = bytes(length)
        self.touched(offset, length)

    def range_of(self, data: st.DataObject) -> tuple[int, int]:
        edges = [0, 1, 512, BLOCK - 1, BLOCK, 2 * BLOCK, 3 * BLOCK - 512, len(self.bytes) - 1, len(self.bytes)]
        places = st.one_of(st.sampled_from(edges), st.integers(0, len(self.bytes)))
        one, other = data.draw(places), data.draw(places)
        return min(one, other), abs(one - other)

    @rule(target=snapshots)
    def snapshot(self) -> str:
        self.count += 1
        moid, child = f"snapshot-{self.count}", delta(self.count)
        with self.storage.stun():
            change_id = self.storage.mark_snapshot(self.leaf, moid)
            self.storage.snapshot_disk(self.leaf, child)
        self.frozen[moid] = (self.leaf, bytes(self.bytes), change_id, len(self.marks))
        self.marks.append(set())
        for earlier in self.frozen:
            self.compare_areas(earlier, moid)
        self.leaf = child
        self.chain.append(child)
        return moid

    @rule(moid=consumes(snapshots))
    def remove(self, moid: str) -> None:
        """The delta over the snapshot goes into it."""
        path = self.frozen.pop(moid)[0]
        child = self.chain[self.chain.index(path) + 1]
        self.storage.consolidate(child)
        self.storage.release_snapshot(path, moid)
        self.chain.remove(child)
        self.leaf = self.chain[-1]
        for other, (where, *rest) in list(self.frozen.items()):
            if where == child:  # the next snapshot's disk is now called as this one's was
                self.frozen[other] = (path, *rest)
        with pytest.raises(storage_module.UnknownChangeId):
            self.storage.changed_areas(self.leaf, moid, "52/1")

    @precondition(lambda self: len(self.chain) == 1)
    @rule(blocks=st.integers(0, 2), sectors=st.integers(0, 127))
    def grow(self, blocks: int, sectors: int) -> None:
        old, new = len(self.bytes), min(len(self.bytes) + blocks * BLOCK + sectors * 512, 16 * BLOCK)
        self.storage.grow_disk(self.leaf, max(old, new))
        self.bytes.extend(bytes(max(0, new - old)))
        self.touched(old, max(0, new - old))

    @rule()
    def restart(self) -> None:
        self.storage.close()
        self.storage = Storage(self.folder, DATASTORES)

    @precondition(lambda self: len(self.chain) == 1)
    @rule()
    def reset(self) -> None:
        old = self.storage.current_change_id(self.leaf)
        self.storage.reset_tracking(self.leaf)
        assert self.storage.current_change_id(self.leaf).rpartition("/")[0] != old.rpartition("/")[0]
        self.marks = [set()]

    @rule(first=snapshots, second=snapshots)
    def query(self, first: str, second: str) -> None:
        self.compare_areas(first, second)

    def compare_areas(self, first: str, second: str) -> None:
        _path, _content, change_id, since = self.frozen[first]
        path, content, _unused, until = self.frozen[second]
        if until < since:
            with pytest.raises(storage_module.UnknownChangeId):
                self.storage.changed_areas(path, second, change_id)
            return
        areas = self.storage.changed_areas(path, second, change_id)
        expected = set().union(*self.marks[since:until])
        found = {block for offset, length in areas for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))}
        assert found == expected
        assert all(offset % BLOCK == 0 and length > 0 for offset, length in areas)
        assert all(offset + length <= len(content) for offset, length in areas)
        assert all(one[0] + one[1] < two[0] for one, two in zip(areas, areas[1:]))

    @invariant()
    def bytes_are_right(self) -> None:
        assert self.storage.read(self.leaf, 0, len(self.bytes)) == self.bytes
        for path, content, _unused, _unused in self.frozen.values():
            assert self.storage.read(path, 0, len(content)) == content

    @invariant()
    def what_is_not_allocated_is_zero(self) -> None:
        areas = self.storage.allocated(self.leaf, 0, len(self.bytes), BLOCK)
        rest = bytearray(self.bytes)
        for offset, length in areas:
            assert offset % BLOCK == 0
            rest[offset : offset + length] = bytes(length)
        assert not any(rest)


StorageMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=20, suppress_health_check=list(HealthCheck)
)
TestStorageMachine = StorageMachine.TestCase


def test_a_discard_hides_what_the_parent_holds(storage: Storage) -> None:
    storage.write(BASE, 0, b"x" * CAPACITY)
    storage.snapshot_disk(BASE, delta(1))
    storage.discard(delta(1), 100, 3 * BLOCK)
    assert storage.read(delta(1), 0, CAPACITY) == b"x" * 100 + bytes(3 * BLOCK) + b"x" * (CAPACITY - 3 * BLOCK - 100)
    assert storage.read(BASE, 0, CAPACITY) == b"x" * CAPACITY


def test_what_is_in_use_is_locked(storage: Storage) -> None:
    storage.snapshot_disk(BASE, delta(1))
    with storage.open(delta(1), "nfc:vm-1", write=False):
        assert storage.info(BASE).openers == ("nfc:vm-1",)
        for work in (lambda: storage.consolidate(delta(1)), lambda: storage.delete_disk(delta(1))):
            with pytest.raises(storage_module.Locked):
                work()
    with storage.open(delta(1), "one", write=True), pytest.raises(storage_module.Locked, match="one"):
        storage.open(delta(1), "two", write=True)
    with pytest.raises(storage_module.NotALeaf):
        storage.open(BASE, "three", write=True)
    with pytest.raises(storage_module.Locked):
        storage.delete_disk(BASE)
    storage.consolidate(delta(1))
    storage.delete_disk(BASE)
    assert not storage.exists(BASE)
    assert storage.list_files("[vmfs01] app") == []


def test_a_parent_with_children_is_not_written(storage: Storage) -> None:
    storage.snapshot_disk(BASE, delta(1))
    for work in (lambda: storage.write(BASE, 0, b"x"), lambda: storage.discard(BASE, 0, 1)):
        with pytest.raises(storage_module.NotALeaf):
            work()
    with pytest.raises(storage_module.OutOfRange):
        storage.write(delta(1), CAPACITY - 1, b"xx")
    with pytest.raises(storage_module.Exists):
        storage.create_disk(BASE, CAPACITY)


def test_a_revert_keeps_the_prefix_and_misses_areas(storage: Storage) -> None:
    storage.enable_tracking(BASE)
    with storage.stun():
        first = storage.mark_snapshot(BASE, "snapshot-1")
        storage.snapshot_disk(BASE, delta(1))
    storage.write(delta(1), 0, b"x")
    with storage.stun():
        second = storage.mark_snapshot(delta(1), "snapshot-2")
        storage.snapshot_disk(delta(1), delta(2))
    storage.delete_disk(delta(2))
    storage.delete_disk(delta(1))
    storage.snapshot_disk(BASE, delta(3))
    storage.revert_tracking(delta(3), "snapshot-1")
    for number in (3, 4):
        last = storage.mark_snapshot(delta(3), f"snapshot-{number}")
    assert last.rpartition("/")[0] == second.rpartition("/")[0] == first.rpartition("/")[0]
    # the block that went back to its old bytes is in no list: that is what makes a revert dangerous
    assert storage.changed_areas(delta(3), "snapshot-4", second) == []


def test_tracking_begun_over_a_snapshot_or_spoiled_loses_changes(storage: Storage) -> None:
    storage.snapshot_disk(BASE, delta(1))
    storage.enable_tracking(delta(1))
    first = storage.mark_snapshot(delta(1), "snapshot-1")
    storage.write(delta(1), 0, b"x" * CAPACITY)
    storage.mark_snapshot(delta(1), "snapshot-2")
    found = sum(length for _unused, length in storage.changed_areas(delta(1), "snapshot-2", first))
    assert 0 < found < CAPACITY


def test_a_linked_clone_has_its_own_tracking(storage: Storage) -> None:
    storage.enable_tracking(BASE)
    clone = "[nfs01] clone/clone.vmdk"
    info = storage.snapshot_disk(BASE, clone, uuid="6000C290-0000-0000-0000-000000000001")
    assert info.uuid.startswith("6000C290")
    assert storage.tracking(clone) is None
    storage.enable_tracking(clone)
    assert storage.tracking(clone) != storage.tracking(BASE)


def test_a_disk_moves_with_its_children(storage: Storage, tmp_path: Path) -> None:
    storage.enable_tracking(BASE)
    storage.write(BASE, 5, b"hello")
    storage.snapshot_disk(BASE, delta(1))
    moved = "[nfs01] there/app.vmdk"
    storage.rename_disk(BASE, moved)
    storage.rename_disk(delta(1), "[nfs01] there/app-000001.vmdk")
    storage.close()
    again = Storage(tmp_path, DATASTORES)
    assert again.chain("[nfs01] there/app-000001.vmdk") == ["[nfs01] there/app-000001.vmdk", moved]
    assert again.read("[nfs01] there/app-000001.vmdk", 5, 5) == b"hello"
    assert again.tracking(moved) is not None
    again.close()


def test_paths_do_not_leave_the_datastore(storage: Storage) -> None:
    for path in ("[vmfs01] ../../etc/passwd", "[other] a.vmdk", "app.vmdk", "[vmfs01] app/.app.json"):
        with pytest.raises(storage_module.NotFound):
            storage.local_path(path)
        assert not storage.exists(path)


def test_a_full_datastore(storage: Storage) -> None:
    storage.set_full("vmfs01", True)
    with pytest.raises(storage_module.NoSpace):
        storage.snapshot_disk(BASE, delta(1))
    with pytest.raises(storage_module.NoSpace):
        storage.write(BASE, 0, b"x")
    storage.set_full("vmfs01", False)
    storage.write(BASE, 0, b"x")


def test_snapshots_while_a_guest_writes(storage: Storage) -> None:
    """Each snapshot of two disks is of one moment: the second disk is never ahead of the first."""
    other = "[vmfs01] app/other.vmdk"
    storage.create_disk(other, CAPACITY)
    leaves = [BASE, other]
    done = threading.Event()

    def guest() -> None:
        number = 0
        while not done.is_set():
            number += 1
            for index in (0, 1):
                while True:
                    try:
                        storage.write(leaves[index], BLOCK - 4, number.to_bytes(8, "little"))
                        break
                    except storage_module.NotALeaf:  # looked up before the snapshot, written after it
                        continue

    thread = threading.Thread(target=guest)
    thread.start()
    try:
        for number in range(1, 30):
            with storage.stun():
                parents = list(leaves)
                for index, name in ((0, "app"), (1, "other")):
                    child = f"[vmfs01] app/{name}-{number:06d}.vmdk"
                    storage.snapshot_disk(leaves[index], child)
                    leaves[index] = child
            one, two = (int.from_bytes(storage.read(path, BLOCK - 4, 8), "little") for path in parents)
            assert one - two in (0, 1)
    finally:
        done.set()
        thread.join()


def _write_until_killed(folder: str, connection: multiprocessing.connection.Connection) -> None:
    storage = Storage(Path(folder), DATASTORES)
    for number in range(1_000_000):
        storage.write(delta(1), number * 7919 * 512 % (CAPACITY - 512), number.to_bytes(4, "little") * 128)
        if number == 50:
            connection.send("go")


def test_a_kill_loses_no_change(tmp_path: Path) -> None:
    """What was written up to kill -9 is there, and tracking knows all of it."""
    storage = Storage(tmp_path, DATASTORES)
    storage.create_disk(BASE, CAPACITY)
    storage.enable_tracking(BASE)
    with storage.stun():
        first = storage.mark_snapshot(BASE, "snapshot-1")
        storage.snapshot_disk(BASE, delta(1))
    storage.close()
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_write_until_killed, args=(str(tmp_path), theirs))
    process.start()
    assert mine.recv() == "go"
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    storage = Storage(tmp_path, DATASTORES)
    assert storage.tracking(delta(1)) is not None
    storage.mark_snapshot(delta(1), "snapshot-2")
    areas = storage.changed_areas(delta(1), "snapshot-2", first)
    rest = bytearray(storage.read(delta(1), 0, CAPACITY))
    assert any(rest)
    for offset, length in areas:
        rest[offset : offset + length] = bytes(length)
    assert not any(rest)
    storage.close()


def test_a_consolidation_that_was_killed_is_finished(storage: Storage, tmp_path: Path) -> None:
    storage.write(BASE, 0, b"a" * 10)
    storage.snapshot_disk(BASE, delta(1))
    storage.write(delta(1), 0, b"b" * 10)
    storage.snapshot_disk(delta(1), delta(2))
    # as after a kill between the merge and the removal of the delta
    child = storage._disks[delta(1)]
    storage._merge(child, child.parent)
    child.merged = True
    storage._save(child)
    storage.close()
    again = Storage(tmp_path, DATASTORES)
    assert again.chain(delta(2)) == [delta(2), BASE]
    assert again.read(delta(2), 0, 10) == b"b" * 10
    assert not again.exists(delta(1))
    again.close()
