# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Pages of the docs that repeat a table of the code say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.preflight.checks import CHECKS
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vix_errors import CAUSES, UNKNOWN_CAUSE
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import privileges

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PREFLIGHT = ROOT / "plugins" / "module_utils" / "preflight"


def rows(page: str, *headings: str) -> List[List[str]]:
    """The cells of the table with these headings."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| {' | '.join(headings)} |") + 2
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_every_cause_of_the_diagnosis_stands_in_the_page() -> None:
    expected = [
        [f"`{cause.code}`", cause.meaning, cause.remedy, cause.confirm] for cause in [*CAUSES.values(), UNKNOWN_CAUSE]
    ]
    assert rows("troubleshooting.md", "code", "means", "remedy", "confirmed by") == expected


def test_every_check_of_the_preflight_stands_in_the_page() -> None:
    expected = [[f"`{code}`", words] for code, words in CHECKS.items()]
    assert rows("troubleshooting.md", "check", "looks at") == expected


def test_the_preflight_has_no_other_checks() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PREFLIGHT.glob("*.py"))
    made = set(re.findall(r'(?:Check\(\s*|_from_error\(|\bcode(?:, \w+(?:, \w+)?)? = )"(\w+)"', text))
    assert made == set(CHECKS)


def test_what_is_to_confirm_a_cause_are_checks_that_exist() -> None:
    for cause in CAUSES.values():
        for listed in re.findall(r"vadp_preflight, checks? ([a-z_, ]+?)(?:,? while|$|;)", cause.confirm):
            named = set(re.findall(r"[a-z_]+", listed)) - {"and"}
            assert named and named <= set(CHECKS), cause


def test_every_privilege_stands_in_the_page() -> None:
    page = "ports-and-privileges.md"
    expected = [[f"`{one.name}`", one.on, ", ".join(one.tasks), one.purpose] for one in privileges.PRIVILEGES]
    assert rows(page, "privilege", "on", "tasks", "to") == expected
    assert rows(page, "task", "is") == [[name, words] for name, words in privileges.TASKS.items()]


@pytest.mark.parametrize("name", sorted(privileges.ROLES))
def test_the_roles_hold_what_their_tasks_need(name: str) -> None:
    role = json.loads((DOCS / "roles" / f"{name}.json").read_text(encoding="utf-8"))
    assert role == {"name": name, "privileges": privileges.role(name)}
    assert f"roles/{name}.json" in (DOCS / "ports-and-privileges.md").read_text(encoding="utf-8")


def test_the_table_of_privileges_is_sound() -> None:
    places = [(one.name, one.on) for one in privileges.PRIVILEGES]
    assert len(places) == len(set(places))
    used = {task for one in privileges.PRIVILEGES for task in one.tasks}
    assert used == set(privileges.TASKS)
    assert {task for tasks in privileges.OF_TRANSPORT.values() for task in tasks} <= used
    assert set(privileges.role("openvadp-backup")) < set(privileges.role("openvadp-restore"))
    assert "VirtualMachine.Provisioning.DiskRandomAccess" not in privileges.role("openvadp-backup")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _hash, anchor = target.partition("#")
        there = page if not path else (page.parent / path)
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {target}"
