#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vm_change_tracking
short_description: Switch changed block tracking of a virtual machine on or off, or start it again
version_added: 0.1.0
description:
  - Incremental backups need changed block tracking (CBT), which vSphere keeps for each disk.
  - On a running virtual machine a switch takes effect at the next stun. This module causes one by making and removing a
    snapshot (O(activate)).
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
    details: Change IDs that do not exist yet are null.
  diff_mode:
    support: full
  idempotent:
    support: partial
    details: With O(state=reset) each run restarts tracking.
options:
  state:
    description:
      - V(enabled) switches tracking on. That is refused while there are snapshots, because vSphere then gives wrong
        incremental backups without an error.
      - V(disabled) switches it off. Change IDs of earlier backups are then worthless.
      - V(reset) switches it off and on with a stun cycle after each, so that all change IDs start again. It is refused
        while there are snapshots. The next backup of each disk is a full one.
    type: str
    choices: [enabled, disabled, reset]
    default: enabled
  repository:
    description: Folder of the repository that O(run_id) was begun in.
    type: path
  run_id:
    description:
      - Id of a run that M(openvadp.backup.vadp_recover) has begun. The temporary snapshot of a stun cycle carries it,
        so that the recovery of that run removes what a crash leaves. The record of the run names the virtual machine.
    type: str
  activate:
    description:
      - Whether a running virtual machine is stunned for a moment, by a snapshot that is removed at once, so that the
        switch takes effect. Otherwise it does so at the next snapshot, migration or power cycle.
      - V(reset) always does.
    type: bool
    default: true
  timeout:
    description: Seconds that each step may last.
    type: int
    default: 3600
  force:
    description:
      - With O(state=reset), remove the marks of restores in place that were cut, once change tracking has restarted.
        A mark that can't be removed because no change ID proves the reset becomes one that waits for the next reset.
      - Use it only when nothing writes to the disks any longer and their content is as you want it. A restore that was
        cut has left a mixture; running it again is what makes the disks whole.
    type: bool
    default: false
notes:
  - Required privileges are C(VirtualMachine.Config.ChangeTracking), C(VirtualMachine.State.CreateSnapshot) and
    C(VirtualMachine.State.RemoveSnapshot), and C(VirtualMachine.Config.AdvancedConfig) where a restore has left its
    mark.
  - A restore in place marks the disks that it writes in the virtual machine's advanced settings
    (C(openvadp.mark.<disk UUID>)). While such a mark says C(writing), change tracking of a virtual machine that is off
    can be started with O(force=true) alone.
  - A temporary snapshot that a crash left is removed by the next run, whatever O(state) is.
seealso:
  - module: openvadp.backup.vm_snapshot
"""

EXAMPLES = r"""
- name: Track changed blocks from now on
  openvadp.backup.vm_change_tracking:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01

- name: Start again when the change IDs are not to be trusted
  openvadp.backup.vm_change_tracking:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    state: reset

- name: Start again after a restore that was cut and is not repeated
  openvadp.backup.vm_change_tracking:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    state: reset
    force: true
"""

RETURN = r"""
change_tracking:
  description: Change tracking after the run, or as it would be in check mode.
  returned: success
  type: dict
  contains:
    enabled:
      description: Whether it is switched on.
      type: bool
      sample: true
    supported:
      description: Whether the virtual hardware supports it.
      type: bool
      sample: true
    effective:
      description:
        - Whether changes are really tracked, as far as that can be known.
        - It is judged so. Tracking is on, and each disk that a snapshot can hold has a change ID in the virtual
          machine's configuration. A virtual machine that is off with tracking on counts as well, as nothing is written
          before tracking begins.
      type: bool
      sample: true
    disks:
      description: The disks. These change IDs show that tracking works; a backup uses those of its snapshot.
      type: list
      elements: dict
      sample:
        - {key: 2000, label: Hard disk 1, change_id: 52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81}
    marks:
      description:
        - Disks that carry the mark of a restore in place.
        - The state is V(writing) for one that is at work or was cut, V(done) for one after which no reset was proved,
          and V(unknown) for a mark that can't be read.
      type: list
      elements: dict
      sample:
        - {key: 2000, label: Hard disk 1, state: done, run_id: 3f9a2b1c5d6e7f8091a2b3c4d5e6f708}
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.backup.run_steps import ensure_tracking
from ..module_utils.errors import InputError
from ..module_utils.repository.lock import check_lock_timeout
from ..module_utils.runner import Options, connection_options, lock_options, run_module, vm_options
from ..module_utils.vsphere.change_tracking import ensure
from ..module_utils.vsphere.inventory import find_vm, vm_selection
from ..module_utils.vsphere.session import Connection, Session, check_timeout

OPTIONS = Options(
    dict(
        state=dict(type="str", choices=["enabled", "disabled", "reset"], default="enabled"),
        activate=dict(type="bool", default=True),
        repository=dict(type="path"),
        run_id=dict(type="str"),
        timeout=dict(type="int", default=3600),
        force=dict(type="bool", default=False),
    ),
    required_together=[("repository", "run_id")],
)


def body(module: AnsibleModule) -> dict:
    params = module.params
    timeout = check_timeout(params["timeout"])
    if params["force"] and params["state"] != "reset":
        raise InputError("The option force is for state=reset")
    lock_timeout = check_lock_timeout(params["lock_timeout"])
    named, force = vm_selection(params), params["force"]
    wanted = (params["state"], params["activate"], timeout, module.check_mode)
    with Session.connect(Connection.from_params(params)) as session:
        if params["run_id"] is not None:
            repository, run_id = params["repository"], params["run_id"]
            return ensure_tracking(session, repository, run_id, named, *wanted, lock_timeout, force=force)
        return ensure(session, find_vm(session, **named), *wanted, force=force)


def main() -> None:
    run_module(connection_options() + vm_options() + lock_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
