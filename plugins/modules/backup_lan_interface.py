#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: backup_lan_interface
short_description: Bring the file of a backup proxy's interface into force where it is not
version_added: 0.1.0
description:
  - Compares the interface with what its file describes, and lets its manager read the file again where they differ, or
    where the manager is not known to have read it. It then waits until the interface is as described.
  - It does so whether or not the file changed in this run. A reload that failed, was put off or got lost is made up
    for by the next run.
  - Role P(openvadp.backup.backup_lan#role) writes the file.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  path:
    description: The file for systemd-networkd, or for NetworkManager's connection C(openvadp-backup-lan).
    type: path
    required: true
  manager:
    description: What configures the interface.
    type: str
    choices: [systemd-networkd, NetworkManager]
    default: systemd-networkd
  interface:
    description: Name of the interface.
    type: str
    required: true
  address:
    description: Its IPv4 address with the prefix.
    type: str
    required: true
  mtu:
    description: Its MTU.
    type: int
    required: true
  destination:
    description: Subnet that is reached through O(gateway).
    type: str
  gateway:
    description: Router to O(destination).
    type: str
  apply:
    description: Whether the manager is told. If not, the module only looks.
    type: bool
    default: true
  timeout:
    description: Seconds to wait until the interface is as described.
    type: int
    default: 15
notes:
  - What the manager has read is kept below C(/run/openvadp-backup) until the machine starts again.
  - It runs as root.
seealso:
  - module: openvadp.backup.backup_lan_probe
"""

EXAMPLES = r"""
- name: The interface is as its file says
  openvadp.backup.backup_lan_interface:
    path: /etc/systemd/network/10-openvadp-backup-lan.network
    interface: ens224
    address: 10.20.30.5/24
    mtu: 9000
  become: true
"""

RETURN = r"""
in_force:
  description:
    - Whether the file is in force, after this module's work. In check mode and with O(apply=false), whether it is now.
    - Null where the interface is not there, so that it can't be known.
  returned: success
  type: bool
  sample: true
reasons:
  description: Why it was not in force; empty if it was.
  returned: success
  type: list
  elements: str
  sample: ['ens224 has an MTU of 1500, not 9000']
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.lan.interface import Wanted, ensure
from ..module_utils.runner import Options, run_module

OPTIONS = Options(
    dict(
        path=dict(type="path", required=True),
        manager=dict(type="str", choices=["systemd-networkd", "NetworkManager"], default="systemd-networkd"),
        interface=dict(type="str", required=True),
        address=dict(type="str", required=True),
        mtu=dict(type="int", required=True),
        destination=dict(type="str"),
        gateway=dict(type="str"),
        apply=dict(type="bool", default=True),
        timeout=dict(type="int", default=15),
    ),
    required_together=[("destination", "gateway")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    return ensure(Wanted.from_params(module.params), module.check_mode)


def main() -> None:
    run_module(OPTIONS, body)


if __name__ == "__main__":
    main()
