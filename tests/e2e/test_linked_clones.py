# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Linked clones: machines whose disks stand upon a snapshot of another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import pytest
from harness import MIB, Simulator, made_repository
from modules import Modules

KEYS = (2000, 2001)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """clone1 of app01, backed up as p1, then changed, and off."""
    folder: Path = tmp_path_factory.mktemp("linked")
    simulator = Simulator(folder / "state")
    repository = made_repository(folder / "repository")
    gold = Modules(simulator, repository).snapshot("gold")
    simulator.control.call("linked_clone", vm="app01", snapshot=gold, name="clone1", running=True)
    modules = Modules(simulator, repository, "clone1")
    modules.track_changes()
    for key in KEYS:
        simulator.write("clone1", key, 8 * MIB, seed=key, length=MIB)
    modules.point("p1")
    modules.gold = gold  # type: ignore[attr-defined]
    yield modules
    simulator.stop()


def _restore(clone: Any, **options: Any) -> Dict[str, Any]:
    facts = clone.simulator.facts
    where = {"device_dir": facts["device_dir"], "sysfs_dir": facts["sysfs_dir"]}
    wanted = clone.export_options(vm_name="clone1", target="in_place", overwrite=True, point="p1", **where, **options)
    result: Dict[str, Any] = clone.run("vadp_disk_restore", **wanted)
    return result


@pytest.mark.parametrize("transports", [["nbdssl"], ["hotadd"]])
def test_the_leaf_is_restored_and_the_parent_stays(clone: Any, transports: Any) -> None:
    simulator = clone.simulator
    base = {key: simulator.disk("app01", key, clone.gold) for key in KEYS}
    simulator.control.call("power", vm="clone1", state="poweredOn")
    for key in KEYS:
        simulator.write("clone1", key, 9 * MIB, seed=key, length=MIB)
    simulator.control.call("power", vm="clone1", state="poweredOff")
    result = _restore(clone, transports=transports)
    assert not result["failed"], result
    assert {key: simulator.disk("clone1", key) for key in KEYS} == clone.held["p1"]
    assert {key: simulator.disk("app01", key, clone.gold) for key in KEYS} == base
    chains = {disk["key"]: disk["chain"] for disk in simulator.vm("clone1")["disks"]}
    assert all("clone1/" in chains[key][0] and "app01/" in chains[key][1] for key in KEYS), chains
    simulator.control.call("power", vm="clone1", state="poweredOn")
    assert {disk["mode"] for disk in clone.point(f"after-{transports[0]}").values()} == {"full"}
    simulator.control.call("power", vm="clone1", state="poweredOff")


def test_san_and_snapshots_are_refused_with_the_reason(clone: Any) -> None:
    refused = _restore(clone, transports=["san"])
    assert refused["failed"] and "is a linked clone, which VMware does not let SAN write" in refused["msg"], refused
    moid = clone.snapshot("mine")
    refused = _restore(clone, transports=["nbdssl"])
    assert refused["failed"] and "snapshot" in refused["msg"], refused
    clone.remove_snapshot(moid)
