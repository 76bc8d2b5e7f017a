# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.backup_table import (
    FilterModule,
    backup_table,
    format_change_rate,
)
from ansible_collections.openvadp.backup.plugins.plugin_utils.tables import format_bytes, format_speed

MIB = 1 << 20


def disk(**fields):
    return {
        "key": 2000,
        "label": "Hard disk 1",
        "mode": "full",
        "reason": "there is no earlier point of this disk",
        "transport": "nbdssl",
        "transport_reasons": ["san: planned", "hotadd: planned"],
        "capacity_bytes": 256 * MIB,
        "bytes_read": 64 * MIB,
        "bytes_stored": 21 * MIB,
        "seconds": 2.0,
        **fields,
    }


def test_a_line_for_each_disk_and_each_reason_said_once():
    results = [
        {
            "vm": "app01",
            "state": "complete",
            "point": "p1",
            "verified": "data",
            "disks": [disk(), disk(key=2001, label="Hard disk 2")],
        },
        {
            "vm": "db-with-a-long-name",
            "state": "complete",
            "point": "p1",
            "disks": [disk(mode="incremental", reason=None, bytes_read=32 * MIB)],
        },
    ]
    lines = backup_table(results)
    assert lines[0].split() == [
        "VM",
        "point",
        "disk",
        "mode",
        "transport",
        "read",
        "stored",
        "MiB/s",
        "changed",
        "verified",
    ]
    assert [line.split()[0] for line in lines[2:5]] == ["app01", "app01", "db-with-a-long-name"]
    assert "full [1]" in lines[2] and "nbdssl [2]" in lines[2] and "64.0 MiB" in lines[2] and lines[2].endswith("data")
    assert "incremental " in lines[4] and "12.5 %" in lines[4] and lines[4].endswith("no")
    assert sum("there is no earlier point" in line for line in lines) == 1
    assert sum("san: planned; hotadd: planned" in line for line in lines) == 1
    # The columns stand under their headings.
    assert {line.index("Hard disk") for line in lines[2:5]} == {lines[0].index("disk") + 5}
    assert max(map(len, lines)) <= 140
    assert lines[5].split() == [
        "total",
        "2",
        "VMs",
        "-",
        "none",
        "failed",
        "-",
        "160.0",
        "MiB",
        "63.0",
        "MiB",
        "-",
        "-",
        "-",
    ]


def test_failures_come_first_and_are_counted():
    done = {"vm": "a", "state": "complete", "point": "p1", "disks": [disk()]}
    failed = {"vm": "z", "state": "failed", "reason": "no space"}
    there = {"vm": "b", "state": "unchanged", "point": "p1", "disks": [disk()]}
    lines = backup_table([done, failed, there, dict(failed, vm="c")])
    assert [line.split()[0] for line in lines[2:7]] == ["z", "c", "a", "b", "total"]
    assert lines[6].split()[:6] == ["total", "4", "VMs", "-", "2", "FAILED"]
    # The point that was there already was not read now.
    assert "64.0 MiB" in lines[6]


def test_a_failed_vm_is_named_with_its_reason():
    lines = backup_table(
        [
            {
                "vm": "app02",
                "state": "failed",
                "reason": "No space left. " + "x" * 30 + " word" * 60,
                "notes": ["snapshot-7 is still there"],
            },
            {"vm": "app01", "state": "complete", "point": "p1", "disks": [disk()]},
        ],
        width=120,
    )
    assert lines[2].split()[:5] == ["app02", "-", "-", "FAILED", "[1]"]
    assert any(line.startswith("[1] No space left.") for line in lines)
    assert any(line == "app02: snapshot-7 is still there" for line in lines)
    assert max(map(len, lines)) <= 140


def test_skipped_disks_plans_and_unchanged_points():
    lines = backup_table(
        [
            {
                "vm": "a",
                "state": "planned",
                "disks": [
                    {
                        "key": 2002,
                        "label": "Hard disk 3",
                        "skipped": True,
                        "skip_reason": "independent disks are not in a snapshot",
                    }
                ],
            },
            {
                "vm": "b",
                "state": "unchanged",
                "point": "p9",
                "disks": [disk(mode="differential", bytes_read=0, seconds=0.0)],
            },
        ]
    )
    text = "\n".join(lines)
    assert "2002 Hard disk 3  skipped" in text and "independent disks are not in a snapshot" in text
    assert "a: check mode, nothing was touched" in text
    assert "b: the point was complete already" in text
    assert "0.0 %" in text


@pytest.mark.parametrize("bad", ["text", {"vm": "a"}, [1], [{"vm": "a", "state": "odd"}]])
def test_anything_else_is_refused(bad):
    with pytest.raises(AnsibleFilterError):
        backup_table(bad)


def test_figures():
    assert [format_bytes(n) for n in (None, 0, 1023, 1536, 3 * MIB, 5 << 30, 3 << 40)] == [
        "-", "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB", "3.00 TiB",
    ]  # fmt: skip
    assert format_speed(10 * MIB, 4.0) == "2.5" and format_speed(0, 1.0) == "-" and format_speed(5, 0.0) == "-"
    assert format_change_rate(disk()) == "-"
    assert format_change_rate(disk(mode="incremental", capacity_bytes=100, bytes_read=1)) == "1.0 %"


def test_the_transport_says_how_and_why():
    lease = disk(
        transport="https",
        method="export_lease",
        transport_reasons=["nbdssl: it failed: port 902 is closed"],
        transport_notes=["'app01' can't be migrated meanwhile"],
    )
    lines = backup_table([{"vm": "app01", "state": "complete", "point": "p1", "disks": [lease, disk(method="vddk")]}])
    assert "https (export_lease) [2]" in lines[2] and " nbdssl [3] " in lines[3]
    assert "[2] nbdssl: it failed: port 902 is closed; 'app01' can't be migrated meanwhile" in lines


def test_what_is_left_of_a_complete_backup_stands_below():
    result = {"vm": "app01", "state": "complete", "point": "p1", "disks": [disk()], "left": ["Left behind: a disk."]}
    lines = backup_table([result])
    assert lines[-1] == "app01: NOT CLEANED UP: Left behind: a disk."
    assert not any("FAILED" in line for line in lines)
    # The reason of one that failed holds it already.
    failed = backup_table([{**result, "state": "failed", "reason": "x"}])
    assert not any("NOT CLEANED UP" in line for line in failed)


def test_it_is_registered():
    assert FilterModule().filters() == {"backup_table": backup_table}


def test_numbers_that_ansible_has_taken_for_a_password_are_a_dash() -> None:
    censored = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
    disk = dict(key=2000, label="Hard disk 1", mode="incremental", parent="p0", transport="nbd", reason="")
    disk.update(capacity_bytes=censored, bytes_read=censored, bytes_stored=1024, seconds=censored)
    result = {"vm": "app01", "state": "complete", "point": "p1", "disks": [disk], "notes": [], "reason": ""}
    lines = backup_table([result])
    assert any("1.0 KiB" in line for line in lines) and not any(censored in line for line in lines)
