# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup.request import ExportRequest, parse_rate
from ansible_collections.openvadp.backup.plugins.module_utils.backup.selection import select_disks
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection


@pytest.mark.parametrize(
    ("text", "rate"),
    [(None, None), ("50M", 50 << 20), ("1048576", 1 << 20), ("1.5 GiB/s", 3 << 29), ("64k", 65536), ("2MB", 2 << 20)],
)
def test_rates(text: Optional[str], rate: Optional[int]) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-5M", "0", "100", "50T", "5 M M"])
def test_rates_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError):
        parse_rate(text)


def _request(**changes: Any) -> ExportRequest:
    options: Dict[str, Any] = dict(
        connection=Connection("vc", "user", "secret"),
        vm={"name": "app01"},
        repository="/backup",
        snapshot_name="nightly",
    )
    options.update(changes)
    return ExportRequest(**options)


@pytest.mark.parametrize(
    "changes",
    [
        {"point": "../x"},
        {"point": "a" * 300},
        {"point": "latest"},
        {"transports": []},
        {"mode": "weekly"},
        {"compression": "lzma"},
        {"snapshot_moid": "snapshot-1"},
        {"disks": []},
        {"parallel_disks": 0},
        {"io_timeout": 0},
        {"nfc_port": 70000},
        {"repository": "relative"},
    ],
)
def test_options_that_make_no_sense(changes: Dict[str, Any]) -> None:
    _request().check()
    with pytest.raises(InputError):
        _request(**changes).check()


def _disks() -> List[Disk]:
    def disk(key: int, label: str, reason: Optional[str] = None) -> Disk:
        return Disk(key, label, f"[d] vm/{key}.vmdk", "d", 1 << 30, f"uuid-{key}", None, reason is None, reason)

    return [disk(2000, "Hard disk 1"), disk(2001, "Hard disk 2"), disk(2002, "Hard disk 3", "independent")]


def test_all_that_a_snapshot_holds_are_taken() -> None:
    selection = select_disks(_disks(), None, [])
    assert [disk.key for disk in selection.disks] == [2000, 2001]
    assert selection.skipped == [{"key": 2002, "label": "Hard disk 3", "reason": "independent"}]


def test_disks_are_named_by_key_or_label() -> None:
    assert [disk.key for disk in select_disks(_disks(), ["2001"], []).disks] == [2001]
    assert [disk.key for disk in select_disks(_disks(), ["Hard disk 2", "2000"], []).disks] == [2000, 2001]
    selection = select_disks(_disks(), None, ["Hard disk 1"])
    assert [disk.key for disk in selection.disks] == [2001]
    assert selection.skipped[0]["reason"] == "named in exclude_disks"


@pytest.mark.parametrize(
    ("wanted", "excluded", "word"),
    [
        (["Hard disk 9"], [], "'Hard disk 1' (2000)"),
        (None, ["2009"], "exclude_disks"),
        (["2002"], [], "independent"),
        (None, ["2000", "2001"], "No disk"),
    ],
)
def test_selections_that_make_no_sense(wanted: Optional[List[str]], excluded: List[str], word: str) -> None:
    with pytest.raises(InputError) as caught:
        select_disks(_disks(), wanted, excluded)
    assert word in str(caught.value)
