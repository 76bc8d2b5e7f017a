#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: backup_lan_vddk_probe
short_description: Prove by an open through VDDK that vCenter hands out a host's backup NIC
version_added: 0.1.0
description:
  - Runs on the backup proxy. It opens a disk of a virtual machine through VDDK, for reading and by C(nbdssl), and looks
    in VDDK's log for the address that vCenter handed out for the ESXi host.
  - This is what M(openvadp.backup.backup_lan_probe) can't show, as a host greets on each of its VMkernel NICs, tagged
    for backup or not.
  - The virtual machine must be off and without snapshots, or a template. Its own host then serves the disk, so one
    virtual machine proves one host.
  - An address that is not the backup NIC's does not fail the module; use RV(proven).
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.lan_targets
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details: Does the same, as nothing is changed.
  diff_mode:
    support: N/A
    details: Nothing is changed.
  idempotent:
    support: full
options:
  vddk_libdir:
    description:
      - Folder of VDDK, which holds C(lib64/libvixDiskLib.so).
      - If not given, the folder that nbdkit's plugin has built in.
    type: path
  timeout:
    description: Seconds that the open may take, V(5) to V(600).
    type: int
    default: 60
notes:
  - Required privileges are C(VirtualMachine.Provisioning.DiskRandomRead) and C(VirtualMachine.Provisioning.GetVmFiles).
seealso:
  - module: openvadp.backup.backup_lan_probe
  - module: openvadp.backup.vmkernel_backup_nic_info
"""

EXAMPLES = r"""
- name: Does vCenter hand out the backup NIC of esx01?
  openvadp.backup.backup_lan_vddk_probe:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: template-on-esx01
    targets:
      - host: esx01.example.com
        address: 10.20.30.11
  register: proof

- name: It does
  ansible.builtin.assert:
    that: proof.proven
    fail_msg: "{{ proof.reason }}"
"""

RETURN = r"""
proven:
  description: Whether the address that vCenter handed out is the one of the host's backup NIC.
  returned: success
  type: bool
  sample: true
host:
  description: The ESXi host that served the disk.
  returned: success
  type: str
  sample: esx01.example.com
address:
  description: The address in VDDK's log; null if the disk was not opened.
  returned: success
  type: str
  sample: 10.20.30.11
expected:
  description: The addresses that the targets have for this host.
  returned: success
  type: list
  elements: str
  sample: [10.20.30.11]
label:
  description: The disk that was opened.
  returned: success
  type: str
  sample: Hard disk 1
file:
  description: Its file.
  returned: success
  type: str
  sample: '[datastore1] template-on-esx01/template-on-esx01.vmdk'
reason:
  description: Why it is not proven.
  returned: success
  type: str
  sample: ''
remedy:
  description: What to do about it.
  returned: success
  type: str
  sample: ''
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.errors import check_range
from ..module_utils.lan.probe import targets_from
from ..module_utils.lan.vddk_probe import prove
from ..module_utils.runner import Options, connection_options, lan_target_options, run_module, vm_options
from ..module_utils.transport.vddk import find_library
from ..module_utils.vsphere.inventory import find_vm, vm_selection
from ..module_utils.vsphere.session import Connection, Session

OPTIONS = Options(
    dict(
        vddk_libdir=dict(type="path"),
        timeout=dict(type="int", default=60),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    targets = targets_from(params["targets"])
    check_range("nfc_port", params["nfc_port"], 1, 65535)
    check_range("timeout", params["timeout"], 5, 600)
    vddk = find_library(params["vddk_libdir"])
    with Session.connect(Connection.from_params(params)) as session:
        vm = find_vm(session, **vm_selection(params))
        found = prove(session, vm, targets, vddk, nfc_port=params["nfc_port"], io_timeout=params["timeout"])
    return {"changed": False, **found}


def main() -> None:
    run_module(connection_options() + vm_options() + lan_target_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
