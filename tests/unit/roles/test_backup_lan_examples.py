# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The sample inventories of docs/examples can be used as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ansible_collections.openvadp.backup.plugins.module_utils.lan.addresses import backup_lan_hosts

ROOT = Path(__file__).resolve().parents[3]
SPECS = yaml.safe_load((ROOT / "roles/backup_lan/meta/argument_specs.yml").read_text())["argument_specs"]["main"][
    "options"
]
FORTY = [f"esx{number:02d}.example.com" for number in range(1, 41)]


@pytest.mark.parametrize("hosts", [3, 40])
def test_a_sample_inventory(hosts):
    text = (ROOT / f"docs/examples/backup-lan-{hosts}-hosts.yml").read_text()
    group = yaml.safe_load(text)["all"]["children"]["backup_proxies"]
    assert {name for name in group["vars"] if name != "ansible_become"} <= set(SPECS)
    for own in group["hosts"].values():
        assert set(own) <= set(SPECS)
    lan = {name.replace("backup_lan_", ""): value for name, value in group["vars"].items()}
    lan["proxies"] = [own["backup_lan_proxy_address"] for own in group["hosts"].values()]
    facts = [{"name": name, "cluster": "Cluster-A", "nics": []} for name in FORTY]
    planned = backup_lan_hosts(facts, lan)
    assert len(planned) == hosts
    assert [entry["ip_address"] for entry in planned[:2]] == ["10.20.30.11/24", "10.20.30.12/24"]
