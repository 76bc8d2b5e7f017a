#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: proxy_hotadd
short_description: Attach disks of a virtual machine to the backup proxy, or detach them
version_added: 0.1.0
description:
  - Attaches the disks of a snapshot to the virtual machine that the module runs on, the backup proxy, and finds their
    block devices there. So they can be read without VDDK, while the virtual machine that they are of runs.
  - Detaches them again. The files are never touched by that. Detach disks before their snapshot is removed.
  - Devices are found by the UUID of the disk, never by their order, and asked themselves what they are.
  - A disk is not attached while another one of the same UUID is, as clones made in the vSphere client have it; this
    module does not wait for that one.
  - M(openvadp.backup.vadp_disk_export) and M(openvadp.backup.vadp_disk_restore) attach disks by themselves where the
    transport is V(hotadd). This module is for those who read disks by other means.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details: Whether each disk can be attached is found out, and where it would go. Its device is not known then.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  state:
    description:
      - V(attached) attaches the disks that are not attached yet. One that is attached in another way than O(access)
        asks for is an error.
      - V(detached) detaches those that are attached, in whatever way.
    type: str
    choices: [attached, detached]
    default: attached
  snapshot_moid:
    description:
      - Managed object id of the snapshot whose disks they are, such as V(snapshot-47).
      - Without it, they are the present disks of the virtual machine, which must be off. With O(state=detached), all
        disks of the virtual machine, those of its snapshots as well.
      - With O(state=detached) and a snapshot that is gone, all disks of the virtual machine are looked for.
    type: str
  access:
    description:
      - V(read) attaches disks so that whatever is written to them is thrown away when they are detached.
      - V(write) attaches them so that it arrives. That is only done for the present disks of a virtual machine that is
        off and has no snapshots. Change tracking does not notice what is written, so reset it afterwards
        (M(openvadp.backup.vm_change_tracking)).
    type: str
    choices: [read, write]
    default: read
  disks:
    description: Device keys or labels of the disks. If not given, all that a snapshot can hold.
    type: list
    elements: str
  proxy_name:
    description:
      - Name of the virtual machine that this runs on. It is found by its hardware UUID, its serial number or its
        network addresses if none of O(proxy_name), O(proxy_uuid) and O(proxy_moid) is given.
    type: str
  proxy_uuid:
    description: BIOS UUID of the virtual machine that this runs on.
    type: str
  proxy_moid:
    description: Managed object id of the virtual machine that this runs on, such as V(vm-109).
    type: str
  device_dir:
    description: Folder in which the disks of this machine have links by their ids.
    type: path
    default: /dev/disk/by-id
  sysfs_dir:
    description: Where sysfs is mounted. Through it the devices of detached disks are deleted, which only root may do.
    type: path
    default: /sys
notes:
  - The proxy is a virtual machine of the same datacenter, on a host that sees the datastore of the disks. Its setting
    C(disk.EnableUUID) must be V(TRUE) when it is started. IDE disks can't be attached, encrypted ones only to an
    encrypted proxy.
  - A free unit of the proxy's SCSI controllers is taken, of a PVSCSI controller if there is one. A PVSCSI controller is
    added where all are taken, and stays.
  - Disks that the proxy's own system would touch (mount, activate as LVM) are detached again, and the module fails.
  - Required privileges on the proxy are C(VirtualMachine.Config.AddExistingDisk), C(VirtualMachine.Config.RemoveDisk),
    C(VirtualMachine.Config.AddRemoveDevice) (to add a controller), C(VirtualMachine.Config.Resource) and
    C(VirtualMachine.Config.Settings).
seealso:
  - module: openvadp.backup.vm_snapshot
  - module: openvadp.backup.vadp_recover
"""

EXAMPLES = r"""
- name: Attach the disks of a snapshot to this machine
  openvadp.backup.proxy_hotadd:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    snapshot_moid: snapshot-47
  register: added

- name: Look at their partitions
  ansible.builtin.command: "blkid -p {{ item.device }}"
  loop: "{{ added.attachments }}"
  changed_when: false

- name: Detach all disks of the virtual machine
  openvadp.backup.proxy_hotadd:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    state: detached
"""

RETURN = r"""
attachments:
  description:
    - With O(state=attached) the disks that are attached now (in check mode, would be).
    - With O(state=detached) those that were detached (would be).
  returned: success
  type: list
  elements: dict
  contains:
    key:
      description: Device key of the disk on its virtual machine; 0 if that has the disk no more.
      type: int
      sample: 2000
    label:
      description: Label of the disk on its virtual machine.
      type: str
      sample: Hard disk 1
    disk_uuid:
      description: UUID of the disk.
      type: str
      sample: 6000C29e-8a1f-2c9b-6d0e-3f5a7b9c1d2e
    controller:
      description: Device key of the proxy's controller; null in check mode for one that would be added.
      type: int
      sample: 1000
    unit:
      description: Unit on that controller.
      type: int
      sample: 1
    device:
      description: Link of the block device; null in check mode, and for a detached disk that had none here.
      type: str
      sample: /dev/disk/by-id/wwn-0x6000c29e8a1f2c9b6d0e3f5a7b9c1d2e
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.backup.hotadd_state import Wanted, ensure
from ..module_utils.runner import Options, connection_options, run_module, vm_options
from ..module_utils.transport.proxy import ProxyIdentity
from ..module_utils.vsphere.inventory import find_vm, vm_selection
from ..module_utils.vsphere.session import Connection, Session

OPTIONS = Options(
    dict(
        state=dict(type="str", choices=["attached", "detached"], default="attached"),
        snapshot_moid=dict(type="str"),
        access=dict(type="str", choices=["read", "write"], default="read"),
        disks=dict(type="list", elements="str"),
        proxy_name=dict(type="str"),
        proxy_uuid=dict(type="str"),
        proxy_moid=dict(type="str"),
        device_dir=dict(type="path", default="/dev/disk/by-id"),
        sysfs_dir=dict(type="path", default="/sys"),
    ),
    mutually_exclusive=[("proxy_name", "proxy_uuid", "proxy_moid")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    wanted = Wanted.from_params(params)
    with Session.connect(Connection.from_params(params)) as session:
        vm = find_vm(session, **vm_selection(params))
        proxy, how = ProxyIdentity.find(
            session,
            name=params["proxy_name"],
            uuid=params["proxy_uuid"],
            moid=params["proxy_moid"],
            physical=False,
            sysfs_dir=params["sysfs_dir"],
        )
        return ensure(session, vm, proxy, how, wanted, module.check_mode)


def main() -> None:
    run_module(connection_options() + vm_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
