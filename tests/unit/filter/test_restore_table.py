# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import shlex

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.restore_table import FilterModule, restore_table

MIB = 1 << 20


def test_image_files_and_disks_of_a_machine():
    disk = {
        "key": 2000,
        "label": "Hard disk 1",
        "target": "/restore/app01.raw",
        "format": "raw",
        "transport": None,
        "transport_reasons": [],
        "bytes_read": 64 * MIB,
        "bytes_written": 3 * MIB,
        "seconds": 2.0,
        "verified": True,
        "reason": "it was not there",
    }
    reached = {"target": "restore01: Hard disk 1", "transport": "nbdssl", "transport_reasons": ["hotadd: planned"]}
    results = [
        {"point": "p1", "restored": [disk]},
        {"point": "p2", "restored": [{**disk, **reached, "verified": None, "reason": None}]},
    ]
    lines = restore_table(results)
    assert lines[0].split() == ["point", "disk", "target", "transport", "read", "written", "MiB/s", "verified"]
    assert "/restore/app01.raw [1]" in lines[2] and "file (raw)" in lines[2] and lines[2].endswith("  yes")
    assert "32.0" in lines[2].split()
    assert "restore01: Hard disk 1 " in lines[3] and "nbdssl [2]" in lines[3] and lines[3].endswith("  -")
    assert lines[4:] == ["[1] it was not there", "[2] hotadd: planned"]


def test_the_way_back_stands_in_one_line_below():
    point = {"point": "old", "state": "complete", "vm": "my app", "vm_uuid": "u-1", "repository": "/a b", "proxy": "p1"}
    *_table, said, command = restore_table([{"point": "p1", "restored": [], "safety_point": point}], width=60)
    assert said.strip().endswith("run:")
    words = ["repository=/a b", "vm_uuid=u-1", "point=old", "target=in_place", "vm_restore_overwrite=true"]
    expected = [word for each in [*words, "vm_restore_proxy=p1"] for word in ("-e", each)]
    assert command.startswith("  ansible-playbook openvadp.backup.restore -e 'repository=/a b' -e ")
    assert shlex.split(command)[2:] == expected
    planned = {**point, "state": "planned"}
    assert restore_table([{"restored": [], "safety_point": planned}])[-1] == (
        "Restore point old of my app would be made first, as the way back."
    )
    assert len(restore_table([{"restored": [], "safety_point": None}])) == 2


@pytest.mark.parametrize("bad", ["text", {"point": "p"}, [1]])
def test_anything_else_is_refused(bad):
    with pytest.raises(AnsibleFilterError):
        restore_table(bad)


def test_it_is_registered():
    assert FilterModule().filters() == {"restore_table": restore_table}
