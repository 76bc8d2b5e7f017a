# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A role's variables stand in three places: they have to say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROLES = Path(__file__).resolve().parents[3] / "roles"
# Their defaults are templates, which an argument spec can't hold.
TEMPLATED = {"vm_backup_name"}
# The collection's playbooks have these; the roles only know that they are no mistake.
OF_PLAYBOOKS = {"vm_backup_hosts", "backup_proxy_hosts", "backup_lan_proxies"}


@pytest.mark.parametrize("role", sorted(path.name for path in ROLES.iterdir() if path.is_dir()))
def test_specs_defaults_and_readme_agree(role):
    folder = ROLES / role
    specs = yaml.safe_load((folder / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    defaults = yaml.safe_load((folder / "defaults/main.yml").read_text())
    specified = {name: option["default"] for name, option in specs.items() if "default" in option}
    assert {name: value for name, value in defaults.items() if name not in TEMPLATED} == specified
    assert set(defaults) <= set(specs)

    readme = (folder / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == set(specs)

    used = set()
    for path in folder.glob("*/*"):
        if path.parent.name not in ("tasks", "vars", "handlers", "templates"):
            continue
        # A module of that prefix stands there with the collection's name.
        used |= set(re.findall(rf"(?<!_)(?<!openvadp\.backup\.)\b({role}_\w+)", path.read_text()))
    assert used - {f"{role}_result"} - OF_PLAYBOOKS == set(specs)
