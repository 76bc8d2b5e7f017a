# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.progress import Progress
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    DamagedError,
    DataPathError,
    InputError,
    LockedError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository import verify
from ansible_collections.openvadp.backup.plugins.module_utils.restore import point as restored_point
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest

CAPACITY = 13 << 20


@pytest.fixture
def point(world: Any) -> Any:
    """A full point of a disk whose bytes don't compress."""
    world.point("p1", CAPACITY, [(0, random.Random(1).randbytes(CAPACITY))])
    return restored_point.open_point(RestoreRequest(repository=str(world.repository.path), vm_uuid=world.store.uuid))


class Reading:
    """Counts the pieces of files that are read; the first one waits until the work has failed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces = 0
        self.go_on = threading.Event()
        self._real = verify.hash_file
        monkeypatch.setattr(verify, "hash_file", self._hash_file)

    def _hash_file(self, path: str, on_bytes: Any = None) -> str:
        def count(size: int) -> None:
            self.pieces += 1
            assert self.go_on.wait(60)
            on_bytes(size)

        return self._real(path, count)


def fail_beside(point: Any, reading: Reading, error: BaseException) -> None:
    try:
        with restored_point.checked_beside(point, Progress(None)):
            # The check goes on once it has been told to stop, or is waited for.
            threading.Timer(0.3, reading.go_on.set).start()
            raise error
    finally:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("check")]


@pytest.mark.parametrize("error", [InputError("a"), VsphereError("b"), LockedError("c"), KeyboardInterrupt()])
def test_what_can_not_come_of_damage_ends_the_check(
    point: Any, flip: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    flip(point.store.layer_path(2000, "p1"), 1 << 20)
    reading = Reading(monkeypatch)
    with pytest.raises(type(error)) as caught:
        fail_beside(point, reading, error)
    assert caught.value is error and reading.pieces == 1


@pytest.mark.parametrize("damaged", [True, False])
def test_what_may_come_of_damage_waits_for_the_check(
    point: Any, flip: Any, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    if damaged:
        flip(point.store.layer_path(2000, "p1"), 1 << 20)
    reading = Reading(monkeypatch)
    with pytest.raises(DamagedError if damaged else DataPathError) as caught:
        fail_beside(point, reading, DataPathError("It can't be read"))
    assert reading.pieces > 5 and ("BLAKE3 differs" in str(caught.value)) is damaged


@pytest.mark.parametrize("flipped", [None, 1 << 20])
def test_the_check_tells_how_far_it_is_within_a_file(
    point: Any, flip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flipped: Optional[int]
) -> None:
    monkeypatch.setattr(restored_point, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(
        "ansible_collections.openvadp.backup.plugins.module_utils.datapath.progress.INTERVAL_SECONDS", 0
    )
    if flipped is not None:
        flip(point.store.layer_path(2000, "p1"), flipped)
    path = tmp_path / "progress"
    with Progress(str(path)) as progress:
        try:
            restored_point.require_intact(point, progress)
        except DamagedError:
            assert flipped is not None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["done_bytes"] for line in lines}) > 5
    assert all("check of the point" in line["label"] and line["done_bytes"] <= line["total_bytes"] for line in lines)
    last = lines[-1]
    if flipped is None:
        assert last["state"] == "done" and last["done_bytes"] == last["total_bytes"]
    else:
        # What is damaged does not count.
        assert last["state"] == "failed" and last["done_bytes"] < CAPACITY
