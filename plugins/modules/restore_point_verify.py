#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: restore_point_verify
short_description: Prove that a restore point holds what was read
version_added: 0.1.0
description:
  - Checks a restore point with all the layers that it stands on, and with O(level=boot) that it boots.
  - It needs no vCenter, and changes neither the point nor a virtual machine. Exactly one of O(vm_uuid) and O(vm_name)
    is required.
  - One damaged file does not stop the other checks. All that is wrong is reported.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.repository
  - openvadp.backup.repository_vm
  - openvadp.backup.repository_vm.point
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: This module changes nothing, so it does the same in check mode. With O(level=boot) the point is checked,
      and RV(boot) says what would be booted.
  diff_mode:
    support: N/A
    details: This module changes nothing.
  idempotent:
    support: full
    details: With O(level=boot) each run boots the point again, and replaces the screenshot and the log of the last one.
      They are no part of the point, so that is not a change.
options:
  run_id:
    description:
      - Id of the run that made the point, in place of O(vm_uuid) or O(vm_name), and O(point).
      - Exactly one of O(run_id), O(vm_uuid) and O(vm_name) is required.
    type: str
  level:
    description:
      - V(structure) compares each file with its hash, which finds every changed bit, and checks that the images are
        sound and form the chain that the manifests describe.
      - V(data) also reads each layer as a restore does, and compares it with the hashes that were taken from what the
        disk held. It also finds what was written wrongly in the first place.
      - V(boot) does what V(structure) does, and then boots the point in qemu, with all its disks, on this machine. The
        guest has no network, and writes to overlays that are thrown away. A screenshot and what it said on its serial
        console are kept in the repository, see RV(boot.screenshot) and RV(boot.serial_log).
    type: str
    choices: [structure, data, boot]
    default: structure
  fail_on_damage:
    description:
      - Whether damage, or a point that does not boot, makes the task fail. With V(false) it is only reported by RV(ok).
    type: bool
    default: true
  boot_pattern:
    description:
      - Regular expression of Python. A guest has booted when it is found on the first serial console, such as
        V(login:). The guest must be set up to use that console.
      - If more than one of O(boot_pattern), O(boot_agent) and O(boot_screen_seconds) is given, one of them is enough.
    type: str
  boot_agent:
    description: Whether a guest has booted when qemu's guest agent in it answers. VMware Tools don't.
    type: bool
    default: false
  boot_screen_seconds:
    description:
      - A guest has booted when its screen has not been blank and has stayed the same for so many seconds, except a
        cursor. This is a weaker proof than the others, for a guest that hangs with a message shows the same.
      - If it is not given, and neither are O(boot_pattern) and O(boot_agent), it is 30.
    type: int
  boot_timeout:
    description: Seconds within which a guest must have booted.
    type: int
    default: 600
  boot_memory:
    description: MiB of memory that a guest gets at most. One that had less gets what it had.
    type: int
    default: 2048
  boot_cpus:
    description: Processors that a guest gets at most.
    type: int
    default: 2
  boot_accelerator:
    description:
      - V(kvm) uses hardware virtualisation, V(tcg) software, which is many times slower and works everywhere.
      - V(auto) uses KVM if a small guest really runs with it, and says in RV(boot.accelerator_reason) why, or why not.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  boot_overlay_dir:
    description: Folder for what a guest writes. The files there have no names.
    type: path
    default: /var/tmp
  boot_overlay_limit:
    description: MiB that a guest may write to a disk. The disk fails, and so does the proof, if it writes more.
    type: int
    default: 8192
requirements:
  - blake3
  - libnbd's Python binding
  - qemu-img and qemu-nbd
  - qemu-system-x86_64 and prlimit for O(level=boot), and OVMF if the virtual machine has EFI firmware
notes:
  - With O(level=boot) points of one virtual machine are booted one at a time. Backups go on meanwhile.
  - Screenshot and log lie in the repository. Where that is read-only, or in a place that it does not list, they lie in
    C(/var/lib/openvadp/<repository id>) on the machine that runs the module.
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

- name: Prove that the newest point boots
  openvadp.backup.restore_point_verify:
    repository: /backup/vms
    vm_name: app01
    level: boot
    boot_pattern: 'login:'

- name: Say what is damaged
  ansible.builtin.debug:
    msg: "{{ verified.problems + verified.disks | map(attribute='problems') | flatten }}"
  when: not verified.ok
"""

RETURN = r"""
ok:
  description: Whether nothing is damaged, and with O(level=boot) the point has booted.
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
  description:
    - What is wrong with the manifest, the configuration, the NVRAM and the facts of the virtual machine, and why it
      did not boot.
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
boot:
  description: What became of the guest; null if the point is damaged, because it is not booted then.
  returned: O(level=boot)
  type: dict
  contains:
    booted:
      description: Whether it has shown that it works; null in check mode.
      type: bool
      sample: true
    by:
      description: What showed it, V(serial), V(agent) or V(screen); null if nothing did.
      type: str
      sample: serial
    reason:
      description: The same in words, or why it did not boot.
      type: str
      sample: its serial console says 'login:'
    accelerator:
      description: V(kvm) or V(tcg).
      type: str
      sample: tcg
    accelerator_reason:
      description: Why that one.
      type: str
      sample: 'no KVM: there is no /dev/kvm'
    firmware:
      description: V(bios) or V(efi), as the virtual machine had it.
      type: str
      sample: bios
    memory_mb:
      description: Its memory in MiB.
      type: int
      sample: 2048
    cpus:
      description: Its processors.
      type: int
      sample: 2
    disks:
      description: The disks in the order in which its firmware looks at them.
      type: list
      elements: dict
      contains:
        key:
          description: Device key.
          type: int
          sample: 2000
        bus:
          description: What it is attached to.
          type: str
          sample: paravirtual SCSI
    notes:
      description: In what the guest's machine differs from the virtual machine, so that it may matter.
      type: list
      elements: str
      sample: [it has 2048 MiB of memory, not 16384]
    resets:
      description: How often the guest restarted itself.
      type: int
      sample: 0
    seconds:
      description: How long it ran.
      type: float
      sample: 14.2
    screenshot:
      description: PNG file of its screen at the end; null if there was no picture.
      type: str
      sample: /backup/vms/vms/500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a/boots/20261122T084203Z.png
    serial_log:
      description: >-
        File with what it said on its serial console, of more than 1 MiB the beginning and the end; null if nothing was
        booted.
      type: str
      sample: /backup/vms/vms/500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a/boots/20261122T084203Z.serial.log
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.repository.layout import Repository
from ..module_utils.repository.report import damage, verify
from ..module_utils.restore.boot.accelerator import ACCELERATORS, AUTO
from ..module_utils.restore.boot.run import BOOT, BootRequest, not_booted, verify_by_boot
from ..module_utils.runner import Options, repository_options, repository_vm_options, run_module

OPTIONS = Options(
    dict(
        run_id=dict(type="str"),
        level=dict(type="str", choices=["structure", "data", "boot"], default="structure"),
        fail_on_damage=dict(type="bool", default=True),
        boot_pattern=dict(type="str"),
        boot_agent=dict(type="bool", default=False),
        boot_screen_seconds=dict(type="int"),
        boot_timeout=dict(type="int", default=600),
        boot_memory=dict(type="int", default=2048),
        boot_cpus=dict(type="int", default=2),
        boot_accelerator=dict(type="str", choices=list(ACCELERATORS), default=AUTO),
        boot_overlay_dir=dict(type="path", default="/var/tmp"),
        boot_overlay_limit=dict(type="int", default=8192),
    ),
    required_one_of=[("vm_uuid", "vm_name", "run_id")],
    mutually_exclusive=[("vm_uuid", "run_id"), ("vm_name", "run_id")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = dict(module.params)
    if params["run_id"] is not None:
        found, manifest = Repository.open(params["repository"]).find_point_of(params["run_id"])
        params.update(vm_uuid=found.uuid, point=manifest["point"])
    request = BootRequest.from_params(params)
    if params["level"] == BOOT:
        result = verify_by_boot(request, module.check_mode)
    else:
        store = Repository.open(params["repository"]).find_vm(vm_uuid=params["vm_uuid"], vm_name=params["vm_name"])
        result = verify(store, params["point"], params["level"])
    if params["fail_on_damage"] and not result["ok"]:
        error = not_booted(result) if result.get("boot") else damage(result)
        module.fail_json(msg=str(error), error=error.to_result(), changed=False, **result)
    return dict(result, changed=False)


def main() -> None:
    run_module(
        repository_options() + repository_vm_options(required=False) + OPTIONS, body, libraries=["blake3", "nbd"]
    )


if __name__ == "__main__":
    main()
