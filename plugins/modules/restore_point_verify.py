#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: restore_point_verify
short_description: Prove that a restore point holds what was read
version_added: 0.1.0
description:
  - Checks a restore point with all the layers that it stands on.
  - It needs no vCenter, takes no lock and changes nothing. Exactly one of O(vm_uuid) and O(vm_name) is required.
  - One damaged file does not stop the other checks. All that is wrong is told.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.repository
  - openvadp.backup.repository_vm
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: This module changes nothing, so it does the same in check mode.
  diff_mode:
    support: N/A
    details: This module changes nothing.
  idempotent:
    support: full
options:
  level:
    description:
      - V(structure) compares each file with its hash, which finds every changed bit, and checks that the images are
        sound and form the chain that the manifests tell.
      - V(data) also reads each layer as a restore does, and compares it with the hashes that were taken from what the
        disk held. It also finds what was written wrongly in the first place.
    type: str
    choices: [structure, data]
    default: structure
  fail_on_damage:
    description: Whether damage makes the task fail. With V(false) it is only told by RV(ok).
    type: bool
    default: true
requirements:
  - blake3
  - libnbd's Python binding
  - qemu-img and qemu-nbd
seealso:
  - module: openvadp.backup.restore_point_info
"""

EXAMPLES = r"""
- name: Check the newest point of a virtual machine
  openvadp.backup.restore_point_verify:
    repository: /backup/vms
    vm_name: app01

- name: Compare all that a point holds with what was read
  openvadp.backup.restore_point_verify:
    repository: /backup/vms
    vm_uuid: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
    point: 20261122T084203Z
    level: data

- name: Look without failing
  openvadp.backup.restore_point_verify:
    repository: /backup/vms
    vm_name: app01
    fail_on_damage: false
  register: verified

- name: Say what is damaged
  ansible.builtin.debug:
    msg: "{{ verified.problems + verified.disks | map(attribute='problems') | flatten }}"
  when: not verified.ok
"""

RETURN = r"""
ok:
  description: Whether nothing is damaged.
  returned: success, and when it fails because of damage
  type: bool
  sample: true
vm_uuid:
  description: Instance UUID of the virtual machine.
  returned: success, and when it fails because of damage
  type: str
  sample: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
vm_name:
  description: Its name when the point was made; null if the manifest is damaged.
  returned: success, and when it fails because of damage
  type: str
  sample: app01
point:
  description: Name of the point.
  returned: success, and when it fails because of damage
  type: str
  sample: 20261122T084203Z
level:
  description: The value of O(level).
  returned: success, and when it fails because of damage
  type: str
  sample: structure
problems:
  description: What is wrong with the manifest, the configuration, the NVRAM and the facts of the virtual machine.
  returned: success, and when it fails because of damage
  type: list
  elements: str
  sample: []
disks:
  description: The result for each disk; empty if the manifest is damaged.
  returned: success, and when it fails because of damage
  type: list
  elements: dict
  contains:
    key:
      description: Device key.
      type: int
      sample: 2000
    label:
      description: Label of the disk.
      type: str
      sample: Hard disk 1
    ok:
      description: Whether nothing is damaged.
      type: bool
      sample: false
    problems:
      description: What is wrong, each with the point whose layer it is in.
      type: list
      elements: str
      sample: ['point sunday: sunday.qcow2: its content changed since it was written (BLAKE3 differs)']
    layers:
      description: Number of layers that the disk stands on at this point.
      type: int
      sample: 7
    bytes_verified:
      description: Bytes of files, and at O(level=data) of the disk, that were found as they were written.
      type: int
      sample: 4187593113
    seconds:
      description: How long it took.
      type: float
      sample: 3.4
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.repository.layout import Repository
from ..module_utils.repository.report import damage, verify
from ..module_utils.runner import Options, repository_options, repository_vm_options, run_module

OPTIONS = Options(
    dict(
        level=dict(type="str", choices=["structure", "data"], default="structure"),
        fail_on_damage=dict(type="bool", default=True),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    store = Repository.open(params["repository"]).find_vm(vm_uuid=params["vm_uuid"], vm_name=params["vm_name"])
    result = verify(store, params["point"], params["level"])
    if params["fail_on_damage"] and not result["ok"]:
        error = damage(result)
        module.fail_json(msg=str(error), error=error.to_result(), changed=False, **result)
    return dict(result, changed=False)


def main() -> None:
    run_module(repository_options() + repository_vm_options() + OPTIONS, body, libraries=["blake3", "nbd"])


if __name__ == "__main__":
    main()
