#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: proxy_lun_guard
short_description: Refuse to go on when a backup proxy's own system touches the LUNs of VMFS datastores
version_added: 0.1.0
description:
  - A proxy that reads disks over a SAN sees the LUNs of the ESXi hosts' datastores. If its own operating system mounts,
    assembles or formats one, every virtual machine on it is lost.
  - This module looks at all disks of the machine. It fails if one that carries VMFS, or that O(luns) names, is mounted,
    used as swap space, held by LVM, device-mapper or software RAID, or carries a file system, a partition or a
    partition table that no ESXi host put there.
  - It writes nothing, and opens nothing for writing. It runs as root, because other users can't read disks.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.attributes
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
  luns:
    description:
      - LUNs that hold a VMFS datastore, by names of the datastore's extents (C(naa.600...)) or by paths of devices.
      - A LUN that still carries VMFS is found without being named. One that was formatted is known by its name only.
      - A name that this machine doesn't see is passed over; a path must exist.
    type: list
    elements: str
    default: []
  fail_on_problems:
    description: Whether the module fails if a LUN is touched. If not, it only reports.
    type: bool
    default: true
  device_dir:
    description: Folder of the links that name disks by their identity.
    type: path
    default: /dev/disk/by-id
  sysfs_dir:
    description: Where the kernel describes the devices.
    type: path
    default: /sys
requirements:
  - blkid (package util-linux)
notes:
  - Role P(openvadp.backup.backup_proxy#role) protects the LUNs and hot-added disks of a proxy.
"""

EXAMPLES = r"""
- name: Make sure that this proxy leaves the LUNs alone
  openvadp.backup.proxy_lun_guard:
    luns:
      - naa.600a098038314648593f517773636465
  become: true

- name: Only look
  openvadp.backup.proxy_lun_guard:
    fail_on_problems: false
  become: true
  register: looked

- name: Show what is wrong
  ansible.builtin.debug:
    var: looked.problems
"""

RETURN = r"""
disks:
  description: All disks of this machine.
  returned: always
  type: list
  elements: dict
  contains:
    device:
      description: Path of the device.
      type: str
      sample: /dev/sdb
    names:
      description: What it is called in O(device_dir).
      type: list
      elements: str
      sample: [scsi-3600a098038314648593f517773636465, wwn-0x600a098038314648593f517773636465]
    wwid:
      description: Its world-wide name as the kernel has it; null if the disk has none.
      type: str
      sample: naa.600a098038314648593f517773636465
    virtual:
      description: Whether VMware emulates it, so that it is a disk of this virtual machine.
      type: bool
      sample: false
    lun:
      description: Whether it carries VMFS, or O(luns) names it.
      type: bool
      sample: true
    read_only:
      description: Whether the kernel refuses writing to it; null if the kernel doesn't know it.
      type: bool
      sample: true
    in_use:
      description: What this machine uses it for.
      type: list
      elements: str
      sample: []
    problems:
      description: Why it must not be touched; always empty for a disk that is not a LUN.
      type: list
      elements: str
      sample: [partition sdb1 is mounted at /mnt]
problems:
  description: All problems of all LUNs, each with the device it is about.
  returned: always
  type: list
  elements: str
  sample: ['/dev/sdb: partition sdb1 is mounted at /mnt']
physical_volumes:
  description: The LVM physical volumes of the volume groups that are active on this machine.
  returned: always
  type: list
  elements: dict
  contains:
    device:
      description: Path of the device.
      type: str
      sample: /dev/sda3
    uuid:
      description: UUID of the physical volume.
      type: str
      sample: 3FTtzn-2mKk-AvYz-qwcW-Zk0x-1dXa-8mPqRs
    group:
      description: Name of the volume group.
      type: str
      sample: debian-vg
arrays:
  description: The software RAID arrays that run on this machine.
  returned: always
  type: list
  elements: str
  sample: [md0]
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.errors import TransportError
from ..module_utils.runner import Options, run_module
from ..module_utils.transport.disks_here import arrays_here, disks_here, own_volumes

OPTIONS = Options(
    dict(
        luns=dict(type="list", elements="str", default=[]),
        fail_on_problems=dict(type="bool", default=True),
        device_dir=dict(type="path", default="/dev/disk/by-id"),
        sysfs_dir=dict(type="path", default="/sys"),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    disks = disks_here(params["luns"], device_dir=params["device_dir"], sysfs_dir=params["sysfs_dir"])
    result: Dict[str, Any] = {
        "changed": False,
        "disks": [disk.to_result() for disk in disks],
        "problems": [f"{disk.device}: {problem}" for disk in disks for problem in disk.problems],
        "physical_volumes": own_volumes(sysfs_dir=params["sysfs_dir"]),
        "arrays": arrays_here(params["sysfs_dir"]),
    }
    if result["problems"] and params["fail_on_problems"]:
        error = TransportError(
            "This machine's own system touches the LUNs of VMFS datastores",
            reason="; ".join(result["problems"]),
            remedy="Unmount and release them at once, do not write to them, and check the datastores on an ESXi host",
        )
        module.fail_json(msg=str(error), error=error.to_result(), **result)
    return result


def main() -> None:
    run_module(OPTIONS, body)


if __name__ == "__main__":
    main()
