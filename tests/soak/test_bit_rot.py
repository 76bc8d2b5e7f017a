# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One bit flips anywhere in a repository of real points.

restore_point_verify finds it in every layer, file of hashes, manifest, configuration and NVRAM, in each point that
needs the file, and in no other; and a restore from a point whose disks are damaged refuses before it writes.
``vm.json``, ``repository.json`` and ``trust.json`` have no hash: a flip there is refused, or leaves a document that its
schema allows.

SOAK_FLIPS: how many (40). SOAK_SEED: where (1).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Set, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import trust
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.report import verify
from ansible_collections.openvadp.backup.plugins.module_utils.restore import to_file
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest
from jsonschema import Draft202012Validator
from world import Machine, World

FLIPS = int(os.environ.get("SOAK_FLIPS", "40"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
LANES = max(2, os.cpu_count() or 1)
# Level data reads everything once more: for one flip of so many.
DATA_SHARE = 5
# And a restore into the machine is tried for one of so many.
IN_PLACE_SHARE = 7

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"
CHAIN = [("sunday", "full"), ("monday", "incremental"), ("tuesday", "incremental"), ("wednesday", "differential")]
# What a restore reads. The configuration and the NVRAM matter to who builds the machine again.
FOR_RESTORE = ("layer", "hashes", "manifest")


@dataclass(frozen=True)
class Flip:
    """One bit of one file. ``needed_by``: the points that the damage concerns."""

    number: int
    kind: str
    path: str
    bit: int
    needed_by: Tuple[str, ...]

    def apply(self, repository: Path) -> None:
        """Flip it; a second time it is undone."""
        with (repository / self.path).open("r+b") as file:
            file.seek(self.bit // 8)
            byte = file.read(1)[0]
            file.seek(self.bit // 8)
            file.write(bytes([byte ^ (1 << self.bit % 8)]))

    def __str__(self) -> str:
        return f"flip {self.number}: bit {self.bit} of {self.path}"


@pytest.fixture(scope="module")
def machine(world: World) -> Iterator[Machine]:
    """A machine with a full, two incrementals, and a differential upon the full."""
    made = world.new_machine()
    for number, (point, mode) in enumerate(CHAIN):
        made.scribble(number, areas=6)
        made.job.back_up(point, mode)
        made.points[point] = made.content()
        for disk in made.manifest(point)["disks"].values():
            assert disk["mode"] == mode
        made.compare_point(point)
    made.scribble(99)
    made.power("poweredOff")
    yield made
    made.destroy()


def chains(machine: Machine) -> Dict[str, Set[str]]:
    """The points that each point's disks stand on, itself among them."""
    parents = {point: machine.manifest(point)["disks"][2000]["parent"] for point in machine.points}
    found = {}
    for point in parents:
        found[point], above = {point}, parents[point]
        while above is not None:
            found[point].add(above)
            above = parents[above]
    return found


def flips(machine: Machine, count: int) -> List[Flip]:
    """*count* flips: as many of each kind of file, then of any of its files, then of any of its bits."""
    stands_on = chains(machine)
    files: Dict[str, List[Tuple[Path, Tuple[str, ...]]]] = {}
    for point in machine.points:
        needed = tuple(sorted(other for other, chain in stands_on.items() if point in chain))
        for key in machine.disks:
            folder = machine.store_folder / f"disk-{key}"
            files.setdefault("layer", []).append((folder / f"{point}.qcow2", needed))
            files.setdefault("hashes", []).append((folder / f"{point}.hashes", needed))
        files.setdefault("manifest", []).append((machine.store_folder / "points" / f"{point}.json", needed))
        configs = machine.store_folder / "configs"
        files.setdefault("configuration", []).append((configs / f"{point}.json", (point,)))
        files.setdefault("nvram", []).append((configs / f"{point}.nvram", (point,)))
    source = random.Random(SEED)
    kinds = ["layer", "layer", "hashes", "hashes", "manifest", "manifest", "configuration", "nvram"]
    found = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        path, needed = source.choice(files[kind])
        bit = source.randrange(path.stat().st_size * 8)
        found.append(Flip(number, kind, str(path.relative_to(machine.repository)), bit, needed))
    return found


def check(flip: Flip, machine: Machine, repository: Path, dest: Path) -> None:
    """:raises AssertionError: the damage is not found, or not refused, or found where there is none."""
    source = random.Random(flip.number)
    point = source.choice(flip.needed_by)
    level = "data" if flip.number % DATA_SHARE == 0 else "structure"
    store = Repository.open(str(repository)).vm(machine.uuid)
    flip.apply(repository)
    try:
        result = verify(store, point, level)
        assert not result["ok"], f"{flip}: not found at level {level} of point {point}"
        others = sorted(set(machine.points) - set(flip.needed_by))
        if others:
            other = source.choice(others)
            result = verify(store, other, "structure")
            assert result["ok"], f"{flip}: point {other} does not need it, yet {result}"
        if flip.kind in FOR_RESTORE:
            request = RestoreRequest(repository=str(repository), vm_uuid=machine.uuid, point=point, dest=str(dest))
            with pytest.raises(DamagedError):
                to_file.restore_point(request, check_mode=False)
            assert not os.listdir(dest), f"{flip}: the restore wrote {os.listdir(dest)}"
        if flip.kind in FOR_RESTORE and flip.number % IN_PLACE_SHARE == 0:
            with pytest.raises(DamagedError):
                replace(machine.job, repository=str(repository)).restore_in_place(point)
    finally:
        flip.apply(repository)


def test_every_flipped_bit_is_found(machine: Machine, report: Callable[[str], None]) -> None:
    waiting = iter(flips(machine, FLIPS))
    found, failures = [], []

    def work(lane: int) -> None:
        repository, dest = machine.folder / f"copy-{lane}", machine.folder / f"dest-{lane}"
        shutil.copytree(machine.repository, repository)
        dest.mkdir()
        for flip in waiting:
            try:
                check(flip, machine, repository, dest)
                found.append(flip)
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  whatever it is, it is reported
                failures.append(f"{flip}, {flip.kind}: {type(error).__name__}: {error}")
                for path in dest.iterdir():
                    path.unlink()
        # The copy is as good as it was.
        assert all(verify(Repository.open(str(repository)).vm(machine.uuid), p, "data")["ok"] for p in machine.points)

    with ThreadPoolExecutor(LANES) as lanes:
        for future in [lanes.submit(work, lane) for lane in range(LANES)]:
            future.result()
    machine.compare_with_simulator()
    report(f"bit rot: {FLIPS} flips, {len(found)} found (seed {SEED})")
    assert not failures, "\n".join(failures)
    assert len(found) == FLIPS


def test_what_has_no_hash_is_checked_by_its_schema(machine: Machine, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(machine.repository, repository)
    folder = f"vms/{machine.uuid}"
    store = Repository.open(str(repository), adopt="moved").vm(machine.uuid)
    with store.lock("0123456789abcdef0123456789abcdef", "test"):
        trust.mark(store, 2000, "for a test", uuid=None, change_id="52 de c0/1")
    readers: Dict[str, Callable[[], object]] = {
        "repository.json": lambda: Repository.open(str(repository)),
        f"{folder}/vm.json": lambda: Repository.open(str(repository)).vm(machine.uuid).facts,
        f"{folder}/trust.json": lambda: trust.marks(Repository.open(str(repository)).vm(machine.uuid)),
    }
    source = random.Random(SEED)
    refused = 0
    for name, read in readers.items():
        path = repository / name
        known = json.loads(path.read_bytes())
        schema = json.loads((SCHEMAS / f"{Path(name).stem}-{known['format']}.json").read_text(encoding="utf-8"))
        assert Draft202012Validator(schema).is_valid(known)
        for number in range(FLIPS):
            flip = Flip(number, name, name, source.randrange(path.stat().st_size * 8), ())
            flip.apply(repository)
            try:
                read()
            except RepositoryError:
                refused += 1
            else:
                document = json.loads(path.read_bytes().decode("utf-8"))
                assert Draft202012Validator(schema).is_valid(document), f"{flip} was read: {document}"
            flip.apply(repository)
    assert refused > FLIPS
