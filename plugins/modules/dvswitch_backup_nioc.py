#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: dvswitch_backup_nioc
short_description: Set shares, limit and reservation of backup traffic on a distributed switch
version_added: 0.1.0
description:
  - Sets the pool C(backupNfc) of Network I/O Control on a distributed switch, which says how much of each uplink the
    traffic of backup NICs gets. What is not given stays as it is.
  - The pool is there since vSphere 7.0.1, with Network I/O Control version 3. A switch without it is an error.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  dvswitch:
    description: Name of the distributed switch. Two of one name are an error, unless O(datacenter) tells them apart.
    type: str
    required: true
  datacenter:
    description: Name or path of the datacenter that O(dvswitch) is in, for a vCenter that has two of that name.
    type: str
  shares:
    description: V(low), V(normal), V(high), or a number from 1 to 100. It counts only where an uplink is full.
    type: str
  limit:
    description: Mbit/s on each uplink that backup traffic may use at most; V(-1) is no limit.
    type: int
  reservation:
    description: Mbit/s on each uplink that backup traffic gets in every case; not more than O(limit).
    type: int
  timeout:
    description: Seconds that the change may last.
    type: int
    default: 120
notes:
  - Required privilege is C(DVSwitch.Modify).
seealso:
  - module: openvadp.backup.vmkernel_backup_nic
"""

EXAMPLES = r"""
- name: Backups may take 4 Gbit/s of each uplink, and give way to everything else
  openvadp.backup.dvswitch_backup_nioc:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    dvswitch: DSwitch0
    shares: low
    limit: 4000
    reservation: 0
"""

RETURN = r"""
pool:
  description: The pool as it is now, or would be in check mode.
  returned: success
  type: dict
  contains:
    key:
      description: Name of the pool.
      type: str
      sample: backupNfc
    level:
      description: V(low), V(normal), V(high) or V(custom).
      type: str
      sample: low
    shares:
      description: Shares as a number.
      type: int
      sample: 25
    limit:
      description: Limit in Mbit/s; -1 if there is none.
      type: int
      sample: 4000
    reservation:
      description: Reservation in Mbit/s.
      type: int
      sample: 0
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.lan.nioc import Wanted, ensure
from ..module_utils.runner import Options, connection_options, run_module
from ..module_utils.vsphere.session import Connection, Session

OPTIONS = Options(
    dict(
        dvswitch=dict(type="str", required=True),
        datacenter=dict(type="str"),
        shares=dict(type="str"),
        limit=dict(type="int"),
        reservation=dict(type="int"),
        timeout=dict(type="int", default=120),
    ),
    required_one_of=[("shares", "limit", "reservation")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    wanted = Wanted.from_params(module.params)
    with Session.connect(Connection.from_params(module.params)) as session:
        return ensure(session, wanted, module.check_mode)


def main() -> None:
    run_module(connection_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
