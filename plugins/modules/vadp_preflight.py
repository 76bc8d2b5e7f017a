#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vadp_preflight
short_description: Say whether virtual machines can be backed up from here, how, and why not
version_added: 0.1.0
description:
  - Looks at all that a backup depends on, and changes nothing. For each disk it says by which transport it would be
    read and why not by each of the others. Each check says what was seen and what to do about it.
  - It looks at the server's certificate and clock, the user's privileges, the names and ports of every ESXi host that
    could serve a disk, snapshots, change tracking, VMware Tools, free space, what crashed backups left, and the
    programs on the machine that runs the module (the backup proxy).
  - Name one machine as in the other modules, or many by O(vms).
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.transport
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details: This module changes nothing.
  diff_mode:
    support: N/A
    details: This module changes nothing.
  idempotent:
    support: N/A
    details: This module changes nothing.
options:
  vms:
    description:
      - Names of many virtual machines, instead of O(name), O(uuid) or O(moid) of one.
      - One that is not there does not stop the others; its result says so.
    type: list
    elements: str
  repository:
    description:
      - Folder of the repository on the machine that runs the module. If given, it is looked at, and its free space.
    type: path
  transports:
    description:
      - The transports that may be used, the preferred one first, as they will be given to the backup.
    type: list
    elements: str
    choices: [san, hotadd, nbdssl, nbd, https]
    default: [san, hotadd, nbdssl, nbd, https]
  restores:
    description:
      - Restores that should be possible too. For each the user's privileges are checked; a missing one is an error.
      - V(in_place) writes into the disks of the machine, V(new_vm) makes another one in its folder and resource pool,
        on its datastores and in its networks.
    type: list
    elements: str
    choices: [in_place, new_vm]
    default: []
notes:
  - A host's port is waited for 10 seconds at most, all hosts at the same time.
  - Free space is judged roughly. A datastore should have a tenth of its disks' size free for the snapshot, a repository
    what the machine's disks use, or a tenth of that if it has a point of them.
seealso:
  - module: openvadp.backup.vadp_disk_export
  - module: openvadp.backup.vddk_log_diagnosis
  - plugin: openvadp.backup.preflight_table
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Can this machine be backed up?
  openvadp.backup.vadp_preflight:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    repository: /backup
    vddk_libdir: /opt/vmware-vix-disklib-distrib
  register: preflight

- name: Show all that is not as it should be
  openvadp.backup.show_lines:
    lines: "{{ [preflight] | openvadp.backup.preflight_table }}"

- name: May the user restore it as well?
  openvadp.backup.vadp_preflight:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    restores: [in_place, new_vm]

- name: Many at once, and fail if one can't be
  openvadp.backup.vadp_preflight:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    vms: [app01, app02, db01]
  register: preflight
  failed_when: not preflight.ready
"""

RETURN = r"""
ready:
  description: Whether no check of any machine came to an error.
  returned: success
  type: bool
  sample: true
vms:
  description: The virtual machines, in the order in which they were named.
  returned: success
  type: list
  elements: dict
  contains:
    vm:
      description: Name of the virtual machine.
      type: str
      sample: app01
    moid:
      description: Its managed object id; null if it was not found.
      type: str
      sample: vm-101
    uuid:
      description: Its instance UUID; null if it was not found.
      type: str
      sample: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
    ready:
      description: Whether none of its checks came to an error.
      type: bool
      sample: true
    disks:
      description: Its disks, and how each would be read.
      type: list
      elements: dict
      contains:
        key:
          description: Device key.
          type: int
          sample: 2000
        label:
          description: Name in the vSphere client.
          type: str
          sample: Hard disk 1
        file:
          description: Its file on the datastore, as it is now.
          type: str
          sample: '[vmfs01] app01/app01.vmdk'
        datastore:
          description: The datastore.
          type: str
          sample: vmfs01
        capacity_bytes:
          description: Its size.
          type: int
          sample: 42949672960
        included:
          description: Whether a snapshot holds it, so that it can be backed up.
          type: bool
          sample: true
        skip_reason:
          description: Why not; null if it is included.
          type: str
          sample: null
        transport:
          description: The transport that would be taken; null if none can work.
          type: str
          sample: nbdssl
        method:
          description: How that transport would do it; null where there is only one way.
          type: str
          sample: vddk
        candidates:
          description:
            - Each transport of O(transports), usable or with the reasons why it is not. C(notes) say what it costs.
          type: list
          elements: dict
          sample:
            - transport: san
              usable: false
              reasons: ["this machine does not see LUN naa.600a098038303053 of datastore 'vmfs01'"]
              method: ''
              notes: []
            - transport: nbdssl
              usable: true
              reasons: []
              method: vddk
              notes: []
    checks:
      description: The checks of this machine and of the hosts that could serve its disks.
      type: list
      elements: dict
      contains: &check
        code:
          description: Name of the check. C(docs/troubleshooting.md) lists them.
          type: str
          sample: quiescing
        severity:
          description:
            - V(error), if the backup would fail or be worth nothing.
            - V(warning), if it works, and something is worse than it has to be, or soon will be.
            - V(ok), or V(not_checked) where nobody knows.
          type: str
          sample: warning
        subject:
          description: What was looked at.
          type: str
          sample: VM 'app01' (vm-101)
        evidence:
          description: What was seen.
          type: str
          sample: "VMware Tools don't run in the guest: backups are crash-consistent, and quiesce: required fails"
        remedy:
          description: What to do about it; null where nothing needs to be done.
          type: str
          sample: Install and start VMware Tools in the guest
checks:
  description: The checks of the server, of the machine that runs the module, and of the repository.
  returned: success
  type: list
  elements: dict
  contains: *check
counts:
  description: How many checks came to each severity.
  returned: success
  type: dict
  sample: {ok: 23, warning: 1, error: 0, not_checked: 0}
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.preflight.request import PreflightRequest
from ..module_utils.preflight.run import preflight
from ..module_utils.restore.request import IN_PLACE, NEW_VM
from ..module_utils.runner import Options, connection_options, run_module, transport_options, vm_options

TRANSPORTS = ("san", "hotadd", "nbdssl", "nbd", "https")


def options() -> Options:
    """One machine or many: what :func:`vm_options` demands is widened by ``vms``."""
    restores = dict(type="list", elements="str", choices=[IN_PLACE, NEW_VM], default=[])
    own = Options(dict(vms=dict(type="list", elements="str"), repository=dict(type="path"), restores=restores))
    merged = connection_options() + vm_options() + transport_options(TRANSPORTS) + own
    one_of = ("name", "uuid", "moid", "vms")
    merged.rules["required_one_of"] = [one_of]
    merged.rules["mutually_exclusive"] = [one_of] + [
        rule for rule in merged.rules["mutually_exclusive"] if "name" not in rule
    ]
    return merged


def body(module: AnsibleModule) -> Dict[str, Any]:
    return preflight(PreflightRequest.from_params(module.params))


def main() -> None:
    run_module(options(), body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
