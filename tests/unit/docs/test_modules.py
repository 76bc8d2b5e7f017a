# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the documentation of all modules has in common."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("[a-z]*.py"))
# Ansible takes these for its own: with a list of what it "skipped", a task counts as skipped, and not as changed.
RESERVED = {"ansible_facts", "exception", "failed", "invocation", "rc", "results", "skipped", "unreachable"}


@pytest.mark.parametrize("name", MODULES)
def test_no_result_has_a_name_that_means_something_to_ansible(name: str) -> None:
    module = importlib.import_module(f"ansible_collections.openvadp.backup.plugins.modules.{name}")
    returned = yaml.safe_load(module.RETURN) or {}
    assert not set(returned) & RESERVED


def test_a_state_that_a_message_names_is_one_that_the_module_has() -> None:
    named = set()
    for path in (ROOT / "plugins").rglob("*.py"):
        named |= set(re.findall(r"(\w+) (?:with|and) state(?:: |=)(\w+)", path.read_text()))
    named = {(module, state) for module, state in named if module in MODULES}
    assert ("proxy_hotadd", "detached") in named and ("vm_snapshot", "absent") in named
    for module, state in named:
        imported = importlib.import_module(f"ansible_collections.openvadp.backup.plugins.modules.{module}")
        assert state in yaml.safe_load(imported.DOCUMENTATION)["options"]["state"]["choices"], (module, state)
