# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``ignore_errors`` of a play passes over no step of a role.

A guard is a task: where its failure is ignored, what it refuses is done. Only the last task may be ignored, which fails
with the reason that stands in the role's result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import pytest
import yaml

ROLES = sorted(path.parent for path in (Path(__file__).resolve().parents[3] / "roles").glob("*/tasks"))
# These decide nothing and change nothing but facts.
HARMLESS = ("ansible.builtin.set_fact", "ansible.builtin.fail")


def _tasks(path: Path) -> List[Dict[str, Any]]:
    return list(yaml.safe_load(path.read_text(encoding="utf-8")) or []) if path.exists() else []


def _decides(task: Dict[str, Any]) -> bool:
    reports = "result.yml" in str(task.get("ansible.builtin.include_tasks"))
    return not reports and not any(name in task for name in HARMLESS)


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_no_step_of_a_role_is_passed_over(role: Path) -> None:
    steps = [task for task in _tasks(role / "tasks" / "main.yml") if _decides(task)]
    assert steps
    for task in steps + _tasks(role / "handlers" / "main.yml"):
        assert task.get("ignore_errors") is False, task["name"]


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_an_unreachable_machine_is_no_success(role: Path) -> None:
    """vm_backup goes on, as its state is made of what is proved at the end, and a snapshot may still be removed."""
    steps = [task for task in _tasks(role / "tasks" / "main.yml") if _decides(task)]
    for task in steps if role.name != "vm_backup" else []:
        assert task.get("ignore_unreachable") is False, task["name"]
