# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hosts of a play, if there are any: a play without hosts ends well and has done nothing."""

from __future__ import annotations

DOCUMENTATION = r"""
name: matched_hosts
short_description: A host pattern, if it matches a host
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Returns the pattern as it is. If it matches no host of the inventory, or none that C(--limit) leaves, it fails.
    Ansible itself ends such a play with exit code 0, and a backup that was never made looks as one that was.
  - Used as C(hosts) of a play.
options:
  _terms:
    description: Host patterns, each as C(hosts) of a play takes it.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Back up virtual machines
  hosts: "{{ lookup('openvadp.backup.matched_hosts', 'vms') }}"
  gather_facts: false
  tasks:
    - name: Back up
      ansible.builtin.include_role:
        name: openvadp.backup.vm_backup
"""

RETURN = r"""
_raw:
  description: The patterns.
  type: list
  elements: str
"""

from typing import Any, List, Mapping, Optional

from ansible import context
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.lookup import LookupBase


class LookupModule(LookupBase):
    def run(self, terms: List[Any], variables: Optional[Mapping[str, Any]] = None, **kwargs: Any) -> List[str]:
        self.set_options(var_options=variables, direct=kwargs)
        if context.CLIARGS.get("syntax"):
            return terms
        inventory = self._inventory((variables or {}).get("groups") or {})
        limit = context.CLIARGS.get("subset")
        for pattern in terms:
            hosts = {host.name for host in inventory.list_hosts(pattern)}
            if not hosts:
                raise AnsibleError(
                    f"No host matches {_shown(pattern)}, so nothing was done. See the "
                    "inventory (-i), the names of its groups, and the variable that names other hosts"
                )
            if limit and not hosts & {host.name for host in inventory.list_hosts(_limit_hosts(limit))}:
                raise AnsibleError(
                    f"--limit {_shown(limit)} leaves none of the hosts that {_shown(pattern)} matches, so "
                    "nothing was done"
                )
        return terms

    def _inventory(self, groups: Mapping[str, Any]) -> InventoryManager:
        """Of groups and hosts as they are now: earlier plays may have added some."""
        inventory = InventoryManager(DataLoader(), parse=False)
        for group, hosts in groups.items():
            inventory.add_group(group)
            for host in hosts:
                inventory.add_host(host, group=group)
        return inventory


def _limit_hosts(limit: str) -> List[str]:
    """The patterns of ``--limit``, which may name a file of them by an @."""
    found: List[str] = []
    for part in limit.split(","):
        if part.startswith("@"):
            with open(part[1:], encoding="utf-8") as lines:
                found += [line.strip() for line in lines if line.strip()]
        else:
            found.append(part)
    return found


def _shown(pattern: Any) -> str:
    return ",".join(pattern) if isinstance(pattern, (list, tuple)) else str(pattern)
