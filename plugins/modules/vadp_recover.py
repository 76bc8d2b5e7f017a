#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vadp_recover
short_description: Remove what crashed backups left of a virtual machine
version_added: 0.1.0
description:
  - Removes what earlier runs of this repository left of a virtual machine. These are, in this order, processes on this
    machine, disks that are still attached to a proxy, snapshots (with what their removal may have left), prepared
    access (see M(openvadp.backup.vadp_access)), the virtual machine itself where a restore was making it and did not
    finish, and temporary files, also of a M(openvadp.backup.restore_point_verify) that was killed while it
    booted a point.
  - What others made is never touched. The records of runs say where to look, and no more, for they may be copied or
    written by anybody. A process is ended if the kernel says that the run has started it. A snapshot is removed if its
    description names this repository and a run that is recorded here. A virtual machine is removed if it carries the
    mark of that restore, was never started, and has just the disks that it was made with. A warning reports what can't
    be proved, together with the command that removes it.
  - A run that is at work is not disturbed, and the module fails. It is at work until its deadline, which each module of
    it renews every minute, or until its process is known to be dead. So a run that was killed in the middle of a play
    is over after ten minutes at most, or with O(force=true).
  - Where the repository is in a place that it does not list, what is found is only reported, with a warning that names
    O(adopt), and no run is begun. Its records may be those of the original.
  - With O(begin=true) it then begins a run, in which other modules follow. With O(run_id) alone it ends that run.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.repository
  - openvadp.backup.repository_write
  - openvadp.backup.lock
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details: Lists what would be removed. As no lock is taken, that may belong to a run that is still at work.
  diff_mode:
    support: none
  idempotent:
    support: partial
    details: With O(begin=true) each call begins another run, unless the point exists.
options:
  repository:
    description:
      - Folder of the repository on the machine that runs the module (the backup proxy).
      - The folder must exist. An empty one becomes a repository with the first export. A folder that holds
        anything else is refused.
      - Required unless O(forget_repository) is given.
    type: path
    required: false
  forget_repository:
    description:
      - Id of a repository that is retired. What the virtual machine says of that repository's points (the keys
        C(openvadp.id.<repository id>.<disk uuid>) among its advanced settings) is removed, and nothing else is done.
      - A mark of a restore (C(openvadp.mark.<disk uuid>)) is never removed by this.
      - If the repository is used again after all, its next backup of the virtual machine is a full one.
    type: str
  begin:
    description: Whether a run is begun, as role P(openvadp.backup.vm_backup#role) does.
    type: bool
    default: false
  point:
    description:
      - Name of the restore point that the run is to make, with O(begin=true). If it exists, no run is begun.
      - If not given, one that is made of the time.
    type: str
  run_id:
    description:
      - With O(begin=true), the id of the run that is begun, 32 random hexadecimal digits. The controller chooses it,
        and gives it to the modules that follow. Then there is a record of the run also where the point exists already.
      - Otherwise the run that is ended. What it left is removed, and that of no other run, and RV(run) says what it has
        come to. Where the module fails, the run is over all the same, and the next recovery removes what it left.
      - Without a record of it here (the folder was restored from a copy, say), a snapshot of the virtual machine that
        carries the marker of this repository and this run is removed. It is for you to know that the run is over.
    type: str
  force:
    description:
      - Whether runs that are at work are treated as over. What they left is removed, though they may go on and fail.
        Warnings say which runs these were.
      - With O(run_id), what that run may have left on a machine that is gone is forgotten, too.
    type: bool
    default: false
  access:
    description:
      - Whether Storage vMotion of the virtual machine is held off for the run that is begun, with O(begin=true). The
        next recovery allows it again, when the run's snapshot is gone.
      - Where that can't be had (no VDDK, an ESXi host, a missing privilege) RV(run.access) says why, and the run is
        begun anyway.
    type: bool
    default: false
  export:
    description:
      - Options with which M(openvadp.backup.vadp_disk_export) is to be called in the run that is begun, with
        O(begin=true). They are checked before anything is touched, rather than when there is a snapshot already.
      - They mean what they mean there.
      - Whether O(export) is given or not, a virtual machine that can't be backed up, or of which no disk would be, is
        refused before anything is touched, unless the point exists.
    type: dict
    suboptions:
      disks:
        description: Device keys or labels of the disks that are read.
        type: list
        elements: str
      exclude_disks:
        description: Device keys or labels of disks that are not.
        type: list
        elements: str
      transports:
        description: The transports that may be used.
        type: list
        elements: str
      proxy_name:
        description: Name of the proxy's virtual machine.
        type: str
      proxy_uuid:
        description: Its BIOS or instance UUID.
        type: str
      proxy_moid:
        description: Its managed object id.
        type: str
      proxy_physical:
        description: Whether the proxy is not a virtual machine of this vCenter.
        type: bool
      nfc_port:
        description: Port of the ESXi hosts.
        type: int
      nfc_host_limit:
        description: How many connections one ESXi host gets at most.
        type: int
      io_timeout:
        description: Seconds without an answer.
        type: int
      rate_limit:
        description: Bytes a second.
        type: str
      parallel_disks:
        description: How many disks are read at a time.
        type: int
      max_chain:
        description: How many layers a chain may have.
        type: int
  vddk_libdir:
    description:
      - Folder of VDDK, the one that holds C(lib64/libvixDiskLib.so.*). It is needed to end what was prepared with it,
        and to detach what it has attached.
      - If not given, the folder that the nbdkit VDDK plugin was built for is used.
    type: path
  proxy_name:
    description:
      - Name of a proxy's virtual machine. Then nothing is recovered; the module reports, in RV(attached) and
        RV(announced), which disks of other virtual machines vCenter shows attached to it, and which the records of this
        repository say may be attached to it at any moment, over all virtual machines of the repository.
      - Ask this before a proxy is destroyed, from a playbook that destroys it too. Destroying a virtual machine deletes
        the files of all its disks, those of others that are attached to it included.
      - Instead of O(name), O(uuid) and O(moid).
    type: str
  proxy_uuid:
    description: BIOS UUID of such a proxy, see O(proxy_name).
    type: str
  proxy_moid:
    description: Managed object id of such a proxy, see O(proxy_name).
    type: str
  device_dir:
    description:
      - Folder in which the disks that are attached to this machine have links by their ids.
      - Disks of a run that ran on another machine are detached from that one, but the devices there stay until they are
        deleted or that machine is restarted.
    type: path
    default: /dev/disk/by-id
  sysfs_dir:
    description: Where sysfs is mounted. Through it the devices of detached disks are deleted, which only root may do.
    type: path
    default: /sys
notes:
  - A virtual machine that is no longer in vCenter is looked for in the repository alone, if it is named by O(uuid) with
    O(use_instance_uuid=true).
seealso:
  - module: openvadp.backup.vadp_disk_export
  - module: openvadp.backup.vm_snapshot
"""

EXAMPLES = r"""
- name: Leave nothing of crashed runs
  openvadp.backup.vadp_recover:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    repository: /backup

- name: A repository was given up
  openvadp.backup.vadp_recover:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    forget_repository: 7f6d1c52-3a8e-4a51-9b56-0c1d2e3f4a5b

- name: Clean up, and begin a run
  openvadp.backup.vadp_recover:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    repository: /backup
    begin: true
  register: begun

- name: Look whether a proxy has disks of others attached
  openvadp.backup.vadp_recover:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    proxy_name: proxy01
    repository: /backup
  register: proxy
  until: proxy is not failed and not proxy.attached and not proxy.announced
  retries: 60
  delay: 60

- name: Destroy the proxy, now that nothing is attached
  community.vmware.vmware_guest:
    hostname: vcenter.example.com
    username: admin@vsphere.local
    password: "{{ admin_password }}"
    name: proxy01
    state: absent
    force: true

- name: End that run
  openvadp.backup.vadp_recover:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    repository: /backup
    run_id: "{{ begun.run.id }}"
"""

RETURN = r"""
forgotten:
  description: The keys that were removed from the virtual machine (in check mode, would be).
  returned: with O(forget_repository)
  type: list
  elements: str
  sample:
    - openvadp.id.7f6d1c52-3a8e-4a51-9b56-0c1d2e3f4a5b.6000c29a-1111-2222-3333-444455556666
attached:
  description:
    - Disks that vCenter shows attached to the proxy and that are not its own, with O(proxy_name) and its like.
    - A disk counts as the proxy's own if it lies in a folder with the name of the proxy's, is not attached
      nonpersistently, and no record of the repository names it.
  returned: when a proxy is named
  type: list
  elements: dict
  contains:
    label:
      description: Label of the disk on the proxy.
      type: str
      sample: Hard disk 2
    device_key:
      description: Its device key there.
      type: int
      sample: 2001
    file:
      description: Its file.
      type: str
      sample: '[vmfs01] app01/app01.vmdk'
    disk_uuid:
      description: Its UUID; null where vCenter knows none.
      type: str
      sample: 6000C29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e
    mode:
      description: How it is attached.
      type: str
      sample: independent_nonpersistent
    vm_name:
      description: Name of the virtual machine that lives in the file's folder; null where none does.
      type: str
      sample: app01
    vm_moid:
      description: Its managed object id.
      type: str
      sample: vm-101
    vm_uuid:
      description: Instance UUID of the virtual machine in whose records the disk stands; null where it is in none.
      type: str
      sample: 503f1d2e-3c4b-5a69-7887-96a5b4c3d2e1
    run_id:
      description: The run that attached it, as recorded; null where no record of this repository names it.
      type: str
      sample: 4f1c9a7be2d80356a1b2c3d4e5f60718
announced:
  description:
    - Disks that a run of this repository has recorded for the proxy but vCenter does not show, and UUIDs of disks that
      a run has reserved on the proxy for VDDK. A run that works may attach them at any moment; of one that was cut,
      M(openvadp.backup.vadp_recover) for its virtual machine removes the record.
  returned: when a proxy is named
  type: list
  elements: dict
  contains:
    file:
      description: The file; null where only a UUID is known.
      type: str
      sample: '[vmfs01] app01/app01.vmdk'
    disk_uuid:
      description: The disk's UUID.
      type: str
      sample: 6000C29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e
    run_id:
      description: The run.
      type: str
      sample: 4f1c9a7be2d80356a1b2c3d4e5f60718
    vm_uuid:
      description: Instance UUID of the virtual machine; null where only the proxy names it.
      type: str
      sample: 503f1d2e-3c4b-5a69-7887-96a5b4c3d2e1
recovered:
  description: What was found and removed (in check mode, would be), in that order. The run begun does not count.
  returned: success
  type: list
  elements: dict
  contains:
    what:
      description: V(process), V(attachment), V(lease), V(snapshot), V(access), V(new_vm) or V(temporary_file).
      type: str
      sample: snapshot
    id:
      description: >-
        Process id, file and proxy of an attachment, managed object id, path, name of a machine, or the identity of
        prepared access.
      type: str
      sample: snapshot-47
    action:
      description: What was done.
      type: str
      sample: removed
report_only:
  description:
    - Whether what was found is only reported, as the repository is in a place that it does not list, or as the virtual
      machine shows that it is a copy or was rolled back. A warning says why.
  returned: success
  type: bool
  sample: false
run:
  description: The run that was begun, or ended; null without O(begin=true) and O(run_id).
  returned: success
  type: dict
  contains:
    id:
      description: Id of the run.
      type: str
      sample: 3f9a2b1c7d5e4a0b9a3c2f1e0d9c8b7a
    repository_id:
      description: Id of the repository; empty in check mode if it does not exist yet.
      type: str
      sample: 7f6d1c52-3a8e-4a51-9b56-0c1d2e3f4a5b
    vm_moid:
      description: Managed object id of the virtual machine, by which the steps that follow find it at once.
      type: str
      sample: vm-101
    template:
      description: Whether it is a template, which is read without a snapshot.
      type: bool
      sample: false
    point:
      description: Name of the restore point; null for a run that makes none, as a restore.
      type: str
      sample: 20261122T084203Z
    complete:
      description:
        - With O(begin=true), whether the point exists, so that there is nothing to do.
        - Of a run that is ended, whether a point of it (or the one that was there before) is in the repository with all
          its files.
      type: bool
      sample: false
    snapshot_gone:
      description: >-
        Of a run that is ended, whether vCenter shows neither a snapshot of it nor disks that need consolidation; null
        with O(begin=true).
      type: bool
      sample: true
    snapshot_name:
      description: Name for the run's snapshot.
      type: str
      sample: openvadp 20261122T084203Z
    snapshot_description:
      description: Description for the run's snapshot, by which it is known as this run's.
      type: str
      sample: '{"by": "openvadp.backup", "point": "20261122T084203Z", "repository_id": "...", "run_id": "..."}'
    access:
      description:
        - Whether Storage vMotion is held off.
        - Null without O(access=true), for a template, and where no run was begun.
      type: dict
      contains:
        prepared:
          description: Whether it is.
          type: bool
          sample: true
        reason:
          description: Why it is not; null if it is.
          type: str
          sample: the server is an ESXi host, and only a vCenter moves disks
    not_trusted:
      description:
        - Disks whose change tracking can't be believed, because a restore has written them or because it was turned on
          over a snapshot. They are read in full until M(openvadp.backup.vm_change_tracking) with C(state=reset) has
          started it again, and a full point was made then.
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
        since:
          description: Since when, in UTC; null where the virtual machine says it, whose mark has no time.
          type: str
          sample: '2026-11-22T08:42:03Z'
        reason:
          description: Why.
          type: str
          sample: the disk was restored from point 20261122T084203Z
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.backup.proxy_report import ProxyRequest, report
from ..module_utils.backup.recover import RecoverRequest, forget_repository, recover_vm
from ..module_utils.runner import (
    Options,
    connection_options,
    lock_options,
    repository_options,
    repository_write_options,
    run_module,
    vm_options,
)

EXPORT = dict(
    disks=dict(type="list", elements="str"),
    exclude_disks=dict(type="list", elements="str"),
    transports=dict(type="list", elements="str"),
    proxy_name=dict(type="str"),
    proxy_uuid=dict(type="str"),
    proxy_moid=dict(type="str"),
    proxy_physical=dict(type="bool"),
    nfc_port=dict(type="int"),
    nfc_host_limit=dict(type="int"),
    io_timeout=dict(type="int"),
    rate_limit=dict(type="str"),
    parallel_disks=dict(type="int"),
    max_chain=dict(type="int"),
)
OPTIONS = Options(
    dict(
        repository=dict(type="path"),
        forget_repository=dict(type="str"),
        begin=dict(type="bool", default=False),
        point=dict(type="str"),
        run_id=dict(type="str"),
        force=dict(type="bool", default=False),
        access=dict(type="bool", default=False),
        export=dict(type="dict", options=EXPORT),
        proxy_name=dict(type="str"),
        proxy_uuid=dict(type="str"),
        proxy_moid=dict(type="str"),
        vddk_libdir=dict(type="path"),
        device_dir=dict(type="path", default="/dev/disk/by-id"),
        sysfs_dir=dict(type="path", default="/sys"),
    ),
    required_one_of=[
        ("repository", "forget_repository"),
        ("name", "uuid", "moid", "proxy_name", "proxy_uuid", "proxy_moid"),
    ],
    mutually_exclusive=[("name", "uuid", "moid", "proxy_name", "proxy_uuid", "proxy_moid")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    if module.params["forget_repository"] is not None:
        return forget_repository(module.params, module.check_mode)
    proxy = ProxyRequest.from_params(module.params)
    if proxy is not None:
        return report(proxy)
    return recover_vm(RecoverRequest.from_params(module.params), module.check_mode)


def main() -> None:
    # A proxy may be named instead of a virtual machine.
    options = connection_options() + Options(vm_options().argument_spec)
    options += repository_options() + repository_write_options() + lock_options() + OPTIONS
    run_module(options, body, libraries=["pyVmomi", "blake3"])


if __name__ == "__main__":
    main()
