# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.errors import RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import journal
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id

VM = "5001a2b3-0000-4000-8000-000000000001"
OF = journal.JournalOf(VM, 2000, "6000C29f", 1 << 30, "one", "0" * 64)
AREAS = Extents.of([(0, 512), (65536, 131072), ((1 << 30) - 512, 512)])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    yield Run.create(tmp_path, new_run_id(), repository_id=VM, vm_uuid=VM, vm_moid="vm-16", vm_name="app01", point=None)


def _file(run: Run) -> Path:
    (path,) = run.path.parent.glob("*.journal")
    return path


def test_what_was_kept_is_read_again_and_goes_with_the_run(run: Run) -> None:
    assert journal.read(run, OF) is None
    for areas in (Extents.of(), AREAS):
        journal.write(run, OF, areas)
        assert journal.read(run, OF) == areas
    journal.write(run, replace(OF, key=2001), Extents.of([(0, 1)]))
    assert journal.read(run, OF) == AREAS
    run.remove()
    assert list(run.path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "other", [{"disk_uuid": "6000C29e"}, {"point": "two"}, {"manifest_blake3": "1" * 64}, {"capacity_bytes": 1 << 31}]
)
def test_a_journal_of_something_else_is_none(run: Run, other: Any) -> None:
    journal.write(run, OF, AREAS)
    assert journal.read(run, replace(OF, **other)) is None


def test_a_journal_with_one_bit_changed_or_cut_anywhere_is_none(run: Run) -> None:
    journal.write(run, OF, AREAS)
    path = _file(run)
    content = path.read_bytes()
    for at in range(len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert journal.read(run, OF) is None, at
    for length in range(len(content) - 1):
        path.write_bytes(content[:length])
        assert journal.read(run, OF) is None, length


def test_a_journal_that_has_no_room_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "path", run.path.parent / "gone" / run.path.name)
    with pytest.raises(RepositoryError, match="nothing was written to the disk"):
        journal.write(run, OF, AREAS)
