# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vCenter is away for some seconds at any call of a backup or of a restore, made by the roles.

The run is complete; or it has failed, nothing is left but what its record names, and the next run is clean.

SOAK_OUTAGES: at how many calls of each, for each length (4). SOAK_SEED: at which (1).
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
from harness import MIB, Ansible, Backups, Outcome, Simulator
from modules import Modules

OUTAGES = int(os.environ.get("SOAK_OUTAGES", "4"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
# A backup makes some 55 calls: a snapshot, and what is done when the point is stored.
OF_A_BACKUP = [19, 39]
# A restore makes some 50: the task that marks the disks, which is forgotten.
OF_A_RESTORE = [15]
VM, KEYS = "app01", (2000, 2001)


class Site:
    """A machine, its repository, and the roles."""

    def __init__(self, simulator: Simulator, repository: Path, ansible: Ansible) -> None:
        self.simulator = simulator
        self.control = simulator.control.call
        self.modules = Modules(simulator, repository, VM)
        self.backups = Backups(simulator, ansible, repository)
        self.count = 0

    def disks(self) -> Dict[int, Tuple[int, str]]:
        return {key: self.simulator.disk(VM, key) for key in KEYS}

    def change(self) -> None:
        """The machine is written to, so that no two points are the same."""
        self.count += 1
        self.simulator.write(VM, 2000, self.count * MIB, seed=self.count)

    def backup(self) -> Outcome:
        return self.backups.run(VM, point=f"p{self.count}")

    def restore(self, point: str) -> Outcome:
        variables = {
            name.replace("vm_backup_", "vm_restore_"): value for name, value in self.backups.variables().items()
        }
        variables.update(vm_restore_vm_name=VM, vm_restore_point=point, vm_restore_target="in_place")
        variables.update(vm_restore_overwrite=True)
        role = {"ansible.builtin.include_role": {"name": "openvadp.backup.vm_restore"}}
        play = {"hosts": "localhost", "gather_facts": False, "tasks": [role]}
        return self.backups.ansible.run([play], variables=variables)

    def calls(self, since: int) -> int:
        return sum(call["method"] != "VixDiskLib_Open" for call in self.control("calls", since=since))

    def left(self) -> List[Tuple[str, str]]:
        """What is left of runs, apart from their records: as the intent is called, and which."""
        vm = self.simulator.vm(VM)
        left = [("snapshot", str(item["moid"])) for item in vm["snapshots"]]
        left += [("snapshot", "")] * vm["consolidation_needed"] + [("access", "")] * bool(vm["prepared"])
        left += [("attachment", str(item)) for item in self.control("attachments")]
        return left + [("file", str(path)) for path in self.modules.repository.rglob("*.part-*")]

    def records(self) -> List[Dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.modules.repository.glob("vms/*/runs/*.json")]

    def clean(self) -> None:
        assert self.left() == [] and self.records() == []

    def only_what_a_record_names(self) -> None:
        intents = [intent for record in self.records() for intent in record["intents"]]
        # Files that are not finished belong to the point or the restore of a record.
        named = {intent["what"] for intent in intents} | {"file" for _record in self.records()}
        # A snapshot whose making had no answer is known by its marker.
        moids = [intent.get("moid") for intent in intents if intent["what"] == "snapshot"]
        for what, which in self.left():
            known = what in named and (what != "snapshot" or not which or which in moids or None in moids)
            assert known, (what, which, intents)


def _spread(calls: int, count: int, chance: random.Random) -> List[int]:
    """So many numbers of calls, one out of each part of all of them."""
    edges = [1 + calls * number // count for number in range(count + 1)]
    return [chance.randrange(low, max(high, low + 1)) for low, high in zip(edges, edges[1:])]


@pytest.fixture
def site(own_simulator: Simulator, repository: Path, ansible: Ansible) -> Iterator[Site]:
    one = Site(own_simulator, repository, ansible)
    one.modules.track_changes()
    yield one


def _backups(site: Site, seconds: float, count: Optional[int], seed: int) -> List[str]:
    """:param count: of outages; None for a few that are known, without a run that counts calls."""
    chance = random.Random(seed)
    numbers = OF_A_BACKUP
    if count is not None:
        site.change()
        seen = site.simulator.last_call()
        site.backup().ok()
        numbers = _spread(site.calls(seen), count, chance)
    told = []
    for at in numbers:
        site.change()
        held, done = site.disks(), chance.random() < 0.5
        site.control("outage", seconds=seconds, at=at, done=done)
        outcome = site.backup()
        where = f"backup, {seconds} s at call {at}, done: {done}"
        told.append(f"{where}: rc {outcome.rc}, outage {site.control('end_outage') or 'over'}")
        point, result = f"p{site.count}", _result(outcome)
        if outcome.rc == 0:
            assert {key: site.backups.disk(VM, key, point) for key in KEYS} == held, where
            assert result["left"] == [], (where, result["left"])
            site.clean()
            continue
        told[-1] += f": {result.get('reason')}"
        assert point not in site.backups.points(VM), (where, result)
        site.only_what_a_record_names()
        site.change()
        held = site.disks()
        site.backup().ok()
        assert {key: site.backups.disk(VM, key, f"p{site.count}") for key in KEYS} == held, where
        site.clean()
    return told


def _restores(site: Site, seconds: float, count: Optional[int], seed: int) -> List[str]:
    site.change()
    site.modules.point("base")
    point, held = "base", site.disks()
    site.control("power", vm=VM, state="poweredOff")
    chance = random.Random(seed)
    numbers = OF_A_RESTORE
    if count is not None:
        seen = site.simulator.last_call()
        site.change()
        site.restore(point).ok()
        numbers = _spread(site.calls(seen), count, chance)
    told = []
    for at in numbers:
        site.change()
        done = chance.random() < 0.5
        site.control("outage", seconds=seconds, at=at, done=done)
        outcome = site.restore(point)
        where = f"restore, {seconds} s at call {at}, done: {done}"
        told.append(f"{where}: rc {outcome.rc}, outage {site.control('end_outage') or 'over'}")
        if outcome.rc != 0:
            told[-1] += f": {_result(outcome).get('msg')}"
            site.only_what_a_record_names()
            site.restore(point).ok()
        assert site.disks() == held, where
        site.clean()
    return told


def _result(outcome: Outcome) -> Dict[str, Any]:
    """The result of the role."""
    found = outcome.results("set_fact", task="Keep the result for the summary")
    if found:
        return dict(found[-1]["ansible_facts"]["vm_backup_result"])
    failed = [event["result"] for event in outcome.events if event["status"] == "failed"]
    return dict(failed[-1]) if failed else {}


@pytest.mark.parametrize("run", [_backups, _restores], ids=["backup", "restore"])
def test_vcenter_is_away_for_a_second(site: Site, run: Any) -> None:
    print("\n".join(run(site, 1, None, SEED)))


@pytest.mark.soak
@pytest.mark.timeout(OUTAGES * 300 + 300)
@pytest.mark.parametrize("seconds", [6, 20, 59])
@pytest.mark.parametrize("run", [_backups, _restores], ids=["backup", "restore"])
def test_vcenter_is_away(site: Site, run: Any, seconds: int) -> None:
    print("\n".join(run(site, seconds, OUTAGES, SEED + seconds)))
