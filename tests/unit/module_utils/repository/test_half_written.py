# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which disks of a virtual machine are half written, as the records of all runs tell."""

from __future__ import annotations

from pathlib import Path
from typing import List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.half_written import half_written, stores_of
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore

OWN = "500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"
OTHER = "400c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "repository").mkdir()
    return Repository.open(str(tmp_path / "repository"), create=True)


def _killed(store: VmStore, vm_uuid: str, point: str, keys: List[int]) -> Path:
    """The record that a restore into a machine left."""
    with store.lock(new_run_id(), "test"):
        run = store.create_run(None)
        run.record("restore", vm_uuid=vm_uuid, point=point, point_vm=store.uuid, half_written=keys)
        run.record("process", name="nbdkit", pid=1, start_time=1)
        store.create_run("p9").record("snapshot", name="x", vm_moid="vm-1")
    return run.path


def test_records_of_all_machines_count_and_the_newest_wins(repository: Repository) -> None:
    own, other = repository.vm(OWN), repository.vm(OTHER)
    assert half_written(repository, OWN) == []
    _killed(own, OWN, "p1", [2000])
    _killed(other, OWN.upper(), "p2", [2001])
    _killed(other, OTHER, "p3", [2002])
    _killed(own, OWN, "p4", [])
    assert [(disk["key"], disk["point"], disk["point_vm"]) for disk in half_written(repository, OWN.upper())] == [
        (2000, "p1", OWN),
        (2001, "p2", OTHER),
    ]
    assert [store.uuid for store in stores_of(repository, OWN)] == [OWN, OTHER]
    _killed(other, OWN, "p5", [2000])
    assert [disk["point"] for disk in half_written(repository, OWN)] == ["p5", "p2"]


def test_a_damaged_record_matters_to_its_own_machine_alone(repository: Repository) -> None:
    own, other = repository.vm(OWN), repository.vm(OTHER)
    _killed(own, OWN, "p1", [2000])
    _killed(other, OWN, "p2", [2001]).write_text("{")
    assert [disk["key"] for disk in half_written(repository, OWN)] == [2000]
    with pytest.raises(DamagedError):
        half_written(repository, OTHER)
