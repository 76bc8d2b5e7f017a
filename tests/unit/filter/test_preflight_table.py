# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import Any, Dict, List

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.preflight_table import FilterModule, preflight_table


def check(code: str, severity: str, subject: str = "esx01:902", **more: Any) -> Dict[str, Any]:
    return {"code": code, "severity": severity, "subject": subject, "evidence": "seen", "remedy": None, **more}


def disk(**fields: Any) -> Dict[str, Any]:
    candidates = [
        {"transport": "san", "usable": False, "reasons": ["no LUN"]},
        {"transport": "nbdssl", "usable": True, "reasons": []},
        {"transport": "https", "usable": False, "reasons": ["it is encrypted"]},
    ]
    known = {"key": 2000, "label": "Hard disk 1", "capacity_bytes": 1 << 30, "included": True, "transport": "nbdssl"}
    return {**known, "method": "vddk", "candidates": candidates, **fields}


def result(*checks: Dict[str, Any], name: str = "app01", disks: Any = None, **more: Any) -> Dict[str, Any]:
    vm = {"vm": name, "ready": True, "disks": [disk()] if disks is None else disks, "checks": list(checks)}
    return {"ready": True, "vms": [vm], "checks": [], **more}


def test_a_line_for_each_disk_and_why_not_otherwise() -> None:
    lines = preflight_table(
        [result(), result(name="db01", disks=[disk(), disk(transport="hotadd", method="proxy_hotadd")])]
    )
    assert lines[0].split() == ["VM", "ready", "disk", "size", "transport"]
    assert lines[2].split() == ["app01", "yes", "2000", "Hard", "disk", "1", "1.0", "GiB", "nbdssl", "[1]"]
    assert lines[4].endswith("hotadd (proxy_hotadd) [2]")
    assert lines[5] == "[1] san: no LUN"
    assert lines[-1] == "Nothing else was found that should be otherwise."


def test_disks_that_are_not_read() -> None:
    skipped = disk(included=False, skip_reason="independent", transport=None, candidates=[])
    lines = preflight_table([result(disks=[skipped, disk(transport=None)])])
    assert "not in the backup [1]" in lines[2] and "NONE [2]" in lines[3]
    assert lines[5] == "[2] san: no LUN | https: it is encrypted"


def test_findings_are_said_once_and_the_errors_first() -> None:
    closed = check("host_port", "error", remedy="Open it")
    results = [
        result(check("quiescing", "warning", "VM 'app01'"), closed, check("vm", "ok")),
        result(closed, check("leftovers", "not_checked", "VM 'db01'"), name="db01"),
    ]
    lines = preflight_table(results)
    text = lines[lines.index("") + 1 :]
    assert text == [
        "ERROR host_port, esx01:902: seen",
        "  -> Open it",
        "WARNING quiescing, VM 'app01': seen",
        "NOT CHECKED leftovers, VM 'db01': seen",
    ]


def test_a_preflight_that_failed() -> None:
    lines = preflight_table([{"vm": "nobody01", "msg": "There is no such virtual machine."}, result(disks=[])])
    assert lines[2].split() == ["nobody01", "NO", "-", "-", "FAILED", "[1]"]
    assert lines[3].split() == ["app01", "yes", "-", "-", "-"]
    assert lines[4] == "[1] There is no such virtual machine."


def test_long_texts_are_folded() -> None:
    lines: List[str] = preflight_table(
        [result(check("vm", "error", remedy="word " * 60, evidence="word " * 60))], width=60
    )
    assert all(len(line) <= 60 for line in lines)


def test_what_is_no_result() -> None:
    assert FilterModule().filters() == {"preflight_table": preflight_table}
    for wrong in ("text", {"vms": []}, [1]):
        with pytest.raises(AnsibleFilterError):
            preflight_table(wrong)  # type: ignore[arg-type]
