#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vadp_access
short_description: Hold Storage vMotion of a virtual machine off during a backup
version_added: 0.1.0
description:
  - Calls PrepareForAccess, EndAccess or Cleanup of VMware's Virtual Disk Development Kit (VDDK).
  - A virtual machine is prepared before the snapshot of a backup, so that Storage vMotion leaves its disks where they
    are, and that is ended when the snapshot is gone. Role P(openvadp.backup.vm_backup#role) does both by itself, and
    makes up for what a crash left.
  - The library is loaded by a short-lived process of its own, never by the module.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: partial
    details: With O(state=cleaned) it is not known beforehand what would be cleaned up, and nothing is reported.
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  state:
    description:
      - V(prepared) disables Storage vMotion of the virtual machine. Nothing but V(ended) allows it again, so whoever
        prepares must end in every outcome.
      - V(ended) allows it again. It does so also after a crash of whoever has prepared.
      - V(cleaned) removes what HotAdd of VDDK left on this machine when its process was killed, of all virtual
        machines. This comes before the snapshot is removed.
    type: str
    choices: [prepared, ended, cleaned]
    default: prepared
  identity:
    description:
      - Who prepares and ends, 1 to 50 characters. It must be the same for both.
      - Storage vMotion stays disabled as long as any identity has it prepared.
    type: str
    default: openvadp.backup
  vddk_libdir:
    description:
      - Folder of VDDK, the one that holds C(lib64/libvixDiskLib.so.*).
      - If not given, the folder that the nbdkit VDDK plugin was built for is used.
    type: path
notes:
  - It needs a vCenter for O(state=prepared) and O(state=ended); an ESXi host has no Storage vMotion.
  - Required privileges are C(Global.DisableMethods) and C(Global.EnableMethods) at the root of vCenter. Where they are
    missing VDDK says that the host is not licensed for this feature.
seealso:
  - module: openvadp.backup.vm_snapshot
  - module: openvadp.backup.vadp_recover
"""

EXAMPLES = r"""
- name: Hold Storage vMotion off
  openvadp.backup.vadp_access:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    state: prepared
    identity: nightly backup
    vddk_libdir: /opt/vmware-vix-disklib-distrib

- name: Allow it again
  openvadp.backup.vadp_access:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    state: ended
    identity: nightly backup
    vddk_libdir: /opt/vmware-vix-disklib-distrib
"""

RETURN = r"""
identity:
  description: Who prepared or ended.
  returned: success
  type: str
  sample: openvadp.backup
storage_vmotion_disabled:
  description: Whether Storage vMotion of the virtual machine is disabled now (in check mode, would be).
  returned: success
  type: bool
  sample: true
left_over:
  description: What O(state=cleaned) found. For the other states both are 0.
  returned: success
  type: dict
  contains:
    cleaned:
      description: Attachments of killed processes that were removed.
      type: int
      sample: 1
    remaining:
      description: Attachments that could not be removed.
      type: int
      sample: 0
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.backup.access import STATES, AccessRequest, access_vm
from ..module_utils.runner import Options, connection_options, run_module, vm_options
from ..module_utils.transport.access import IDENTITY

OPTIONS = Options(
    dict(
        state=dict(type="str", choices=list(STATES), default="prepared"),
        identity=dict(type="str", default=IDENTITY),
        vddk_libdir=dict(type="path"),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    return access_vm(AccessRequest.from_params(module.params), module.check_mode)


def main() -> None:
    # The records of runs, which the same code keeps, are sealed with blake3.
    run_module(connection_options() + vm_options() + OPTIONS, body, libraries=["pyVmomi", "blake3"])


if __name__ == "__main__":
    main()
