#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vm_snapshot
short_description: Make or remove a snapshot of a virtual machine
version_added: 0.1.0
description:
  - Makes a snapshot and returns its disks as a backup needs them, or removes a snapshot and all that is left of it.
  - A removal ends when the snapshot is out of the tree, no consolidation is needed, and no delta file of it is left.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.lock
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details: Neither the moid nor the change ids of a snapshot that is not made yet are known, so they are null.
  diff_mode:
    support: full
  idempotent:
    support: partial
    details: >-
      With O(quiesce=required) a snapshot that was made while the virtual machine was off is refused the next time.
options:
  state:
    description:
      - V(present) makes the snapshot O(snapshot_name) unless there is one of that name. Its other properties are not
        compared.
      - V(absent) removes it. If it is gone but left something behind, that is cleaned up, with O(consolidate=true).
    type: str
    choices: [present, absent]
    default: present
  snapshot_name:
    description:
      - Name of the snapshot. Two snapshots of one name are an error that lists both.
      - Exactly one of O(snapshot_name), O(snapshot_moid) and O(run_id) is required.
    type: str
  snapshot_moid:
    description:
      - Managed object id of the snapshot, which is unique, such as V(snapshot-47).
      - With O(state=present) the snapshot must be there.
    type: str
  repository:
    description: Folder of the repository that O(run_id) was begun in.
    type: path
  run_id:
    description:
      - Id of a run that M(openvadp.backup.vadp_recover) has begun. What it is about stands in the run's record. That is
        which virtual machine, and the name, the description and later on the managed object id of the snapshot.
      - The snapshot is known by that id and by the run's marker in its description, and never by its name. With a
        snapshot of somebody else under the name, it gets another one. For a template nothing is done.
      - The options that name the virtual machine count only where the record is of another server.
    type: str
  description:
    description: Description of the snapshot that is made.
    type: str
  quiesce:
    description:
      - Whether the guest's file systems, and its applications where the guest can, are brought into a consistent state.
      - V(required) fails where that can't be had, before the snapshot if possible. It also fails where the snapshot
        exists and was made without quiescing, even of a virtual machine that was off, because nothing shows that
        afterwards.
      - V(preferred) makes a crash-consistent snapshot instead, with a warning.
      - A virtual machine that is off is consistent by itself.
    type: str
    choices: [required, preferred, never]
    default: preferred
  memory:
    description: Whether the snapshot holds the memory too. A backup does not need it.
    type: bool
    default: false
  remove_children:
    description: Whether the snapshots below this one are removed with it.
    type: bool
    default: false
  consolidate:
    description: Whether delta files are merged when the snapshot goes, and again if that failed.
    type: bool
    default: true
  timeout:
    description:
      - Seconds that making or removing the snapshot may last.
      - If it is not made by then, its task is cancelled, and waited for a little longer. What is still under way then
        is written down in the run's record, where the next recovery looks for it. Without O(run_id) the message says
        so.
    type: int
    default: 3600
notes:
  - Required privileges are C(VirtualMachine.State.CreateSnapshot) and C(VirtualMachine.State.RemoveSnapshot).
seealso:
  - module: openvadp.backup.vm_change_tracking
"""

EXAMPLES = r"""
- name: Make a snapshot for a backup
  openvadp.backup.vm_snapshot:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    snapshot_name: nightly
    quiesce: required
  register: made

- name: Show the disks that it does not hold, and why
  ansible.builtin.debug:
    msg: "{{ item.label }}: {{ item.skip_reason }}"
  loop: "{{ made.disks | rejectattr('included') }}"

- name: Remove that very snapshot, whatever others are named
  openvadp.backup.vm_snapshot:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    snapshot_moid: "{{ made.snapshot.moid }}"
    state: absent
"""

RETURN = r"""
snapshot:
  description: The snapshot that is there, was made, or was removed; null when there was none to remove.
  returned: success
  type: dict
  contains:
    moid:
      description: Managed object ID; null in check mode for a snapshot that would be made.
      type: str
      sample: snapshot-47
    name:
      description: Name.
      type: str
      sample: nightly
    description:
      description: Description.
      type: str
      sample: ''
    created:
      description: When it was made (UTC); null in check mode for a snapshot that would be made.
      type: str
      sample: '2026-11-22T08:42:03Z'
    quiesced:
      description: Whether it was made with the option to quiesce. RV(quiesce) says what came of it.
      type: bool
      sample: true
quiesce:
  description: What was asked of the guest, and what it did.
  returned: O(state=present)
  type: dict
  contains:
    requested:
      description: The value of O(quiesce).
      type: str
      sample: preferred
    achieved:
      description: V(quiesced), V(powered-off) (consistent by itself) or V(crash-consistent).
      type: str
      sample: quiesced
    reason:
      description: Why it is not V(quiesced); null if it is.
      type: str
      sample: VMware Tools don't run in the guest
disks:
  description: The disks of the virtual machine as the snapshot knows them; none with O(state=absent).
  returned: success
  type: list
  elements: dict
  contains:
    key:
      description: Device key.
      type: int
      sample: 2000
    label:
      description: Label.
      type: str
      sample: Hard disk 1
    file:
      description: Path of the file that holds the snapshot's data of this disk.
      type: str
      sample: '[vmfs01] app01/app01.vmdk'
    datastore:
      description: Datastore of that file.
      type: str
      sample: vmfs01
    capacity_bytes:
      description: Size.
      type: int
      sample: 8589934592
    uuid:
      description: UUID of the disk, which survives moves and renames.
      type: str
      sample: 6000C29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e
    change_id:
      description: Where the next incremental backup starts; null without change tracking.
      type: str
      sample: 52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81
    included:
      description: Whether the snapshot holds this disk.
      type: bool
      sample: true
    skip_reason:
      description: Why it does not; null if it does.
      type: str
      sample: an independent disk (independent_persistent) is in no snapshot
    controller:
      description: Controller as type, key and bus.
      type: dict
      sample: {type: pvscsi, key: 1000, bus: 0}
    unit:
      description: Unit on the controller.
      type: int
      sample: 0
    thin:
      description: Whether the disk is thin; null where the datastore does not say.
      type: bool
      sample: true
    mode:
      description: Disk mode.
      type: str
      sample: persistent
    encrypted:
      description: Whether the disk is encrypted by vSphere. A backup of it is plain text.
      type: bool
      sample: false
consolidated:
  description: Whether disks had to be consolidated (or would be, in check mode) in a step of their own.
  returned: success
  type: bool
  sample: false
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.backup.run_steps import ensure_snapshot
from ..module_utils.repository.lock import check_lock_timeout
from ..module_utils.runner import Options, connection_options, lock_options, run_module, vm_options
from ..module_utils.vsphere.inventory import find_vm, vm_selection
from ..module_utils.vsphere.session import Connection, Session
from ..module_utils.vsphere.snapshot_state import Wanted, ensure

OPTIONS = Options(
    dict(
        state=dict(type="str", choices=["present", "absent"], default="present"),
        snapshot_name=dict(type="str"),
        snapshot_moid=dict(type="str"),
        repository=dict(type="path"),
        run_id=dict(type="str"),
        description=dict(type="str"),
        quiesce=dict(type="str", choices=["required", "preferred", "never"], default="preferred"),
        memory=dict(type="bool", default=False),
        remove_children=dict(type="bool", default=False),
        consolidate=dict(type="bool", default=True),
        timeout=dict(type="int", default=3600),
    ),
    required_one_of=[("snapshot_name", "snapshot_moid", "run_id")],
    mutually_exclusive=[("snapshot_name", "snapshot_moid", "run_id"), ("description", "run_id")],
    required_together=[("repository", "run_id")],
)


def body(module: AnsibleModule) -> dict:
    wanted = Wanted.from_params(module.params)
    named = vm_selection(module.params)
    lock_timeout = check_lock_timeout(module.params["lock_timeout"])
    with Session.connect(Connection.from_params(module.params)) as session:
        if module.params["run_id"] is not None:
            repository, run_id = module.params["repository"], module.params["run_id"]
            return ensure_snapshot(session, repository, run_id, named, wanted, module.check_mode, lock_timeout)
        vm = find_vm(session, **named)
        return ensure(session, vm, wanted, module.check_mode)


def main() -> None:
    run_module(connection_options() + vm_options() + lock_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
