# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A caller loops over a role with `item`, in which its variables are evaluated: no role has an `item` of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROLES = Path(__file__).resolve().parents[3] / "roles"
FILES = sorted(path for path in ROLES.glob("*/*/**/*") if path.is_file() and path.parts[-2] != "meta")
BLOCKS = ("block", "rescue", "always")


def tasks_of(entries):
    for task in entries or ():
        yield task
        for name in BLOCKS:
            yield from tasks_of(task.get(name))


def faults(path):
    """What is wrong with the loops of a file."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = [f"{path.name}: {line.strip()}" for line in lines if re.search(r"(?<![\w.-])item(?![\w-])", line)]
    if path.parent.name in ("tasks", "handlers"):
        role = path.parents[1].name
        for task in tasks_of(yaml.safe_load(text)):
            if any(key == "loop" or key.startswith("with_") for key in task):
                name = task.get("loop_control", {}).get("loop_var", "item")
                if not name.startswith(f"__{role}_"):
                    found.append(
                        f"{path.name}: {task['name']}: the loop's variable is {name}, not one of the role's own"
                    )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROLES)))
def test_a_role_has_no_item(path):
    assert faults(path) == []


def test_item_is_found(tmp_path):
    path = tmp_path / "one" / "tasks" / "main.yml"
    path.parent.mkdir(parents=True)
    for loop in ("{'loop': [1]}", "{'with_items': [1]}", "{'loop': [1], 'loop_control': {'loop_var': 'x'}}"):
        path.write_text(yaml.safe_dump([{"block": [{"name": "a", **yaml.safe_load(loop)}]}]))
        assert len(faults(path)) == 1
    path.write_text("- name: a\n  debug: msg={{ item.x }}\n")
    assert len(faults(path)) == 1
