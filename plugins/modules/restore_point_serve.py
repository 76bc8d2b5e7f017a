#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: restore_point_serve
short_description: Serve the disks of a restore point by NBD for a while
version_added: 0.1.0
description:
  - Other tools can look into a restore point, or copy from it, without a restore. Each disk is served as an NBD export,
    on Unix sockets or by TCP with TLS.
  - What is served can only be read, or with O(writable_overlay=true) goes to a file of its own that is thrown away. The
    restore point never changes.
  - The servers go on after the module has ended, for O(timeout) seconds or until O(state=absent), and clear up behind
    themselves. They are processes of the user who runs the module, on the machine that holds the repository.
  - There is one place for each virtual machine, folder of sockets, or address and port. The same point is served once
    at one place, however often the module runs; a rerun does not prolong it. If something else is served there, the
    module fails.
  - Only the presence and sizes of the point's files are checked. M(openvadp.backup.restore_point_verify) reads them.
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
  diff_mode:
    support: N/A
    details: There is nothing to compare.
  idempotent:
    support: full
options:
  state:
    description:
      - V(present) serves the point.
      - V(absent) ends what is served at the place, whatever point it is. What was written to overlays is gone.
    type: str
    choices: [present, absent]
    default: present
  disks:
    description: Device keys of the disks that are served. If not given, or empty, all of the point are.
    type: list
    elements: int
    default: []
  socket_dir:
    description:
      - Folder for the Unix sockets, C(disk-<device key>.sock) for each disk. It must exist.
      - If neither it nor O(address) is given, a private folder of this user is used, one for each virtual machine.
    type: path
  address:
    description: IP address that the servers listen on. O(tls_certificates) is then required.
    type: str
  port:
    description: Port of the first disk, with O(address). Each further disk takes the next.
    type: int
    default: 10809
  tls_certificates:
    description:
      - Folder with C(ca-cert.pem), C(server-cert.pem) and C(server-key.pem), the names that QEMU and libnbd use.
    type: path
  tls_verify_client:
    description:
      - Whether clients need a certificate that C(ca-cert.pem) has signed. Without it, everybody who can reach the port
        can read the disks.
    type: bool
    default: true
  writable_overlay:
    description: Whether clients may write. What they write is thrown away when the servers end.
    type: bool
    default: false
  overlay_dir:
    description: Folder for what is written, with O(writable_overlay=true). It can grow to the size of the disks.
    type: path
    default: /var/tmp
  timeout:
    description: How many seconds the point is served, 30 days at most. Clients that are connected then are cut off.
    type: int
    default: 3600
requirements:
  - blake3
  - qemu-nbd and qemu-img
seealso:
  - module: openvadp.backup.restore_point_verify
  - module: openvadp.backup.vadp_disk_restore
"""

EXAMPLES = r"""
- name: Serve the newest point of a machine to the tools of this proxy, for an hour
  openvadp.backup.restore_point_serve:
    repository: /backup/vms
    vm_name: app01
  register: served

- name: Show the first disk's partitions
  ansible.builtin.command:
    argv: [nbdinfo, --map, "{{ served.disks[0].uri }}"]
  changed_when: false

- name: Stop
  openvadp.backup.restore_point_serve:
    repository: /backup/vms
    vm_name: app01
    state: absent

- name: Serve a point of Friday to another machine, which may write without changing the point
  openvadp.backup.restore_point_serve:
    repository: /backup/vms
    vm_name: app01
    point: 2026-11-20T18:00Z
    address: 192.0.2.10
    tls_certificates: /etc/openvadp/tls
    writable_overlay: true
    timeout: 14400
"""

RETURN = r"""
state:
  description: The value of O(state).
  returned: success
  type: str
  sample: present
point:
  description: Name of the point; with O(state=absent) of that which was served, or null.
  returned: success
  type: str
  sample: 20261122T084203Z
disks:
  description: The disks that are served.
  returned: success
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
    capacity_bytes:
      description: Its size.
      type: int
      sample: 8589934592
    uri:
      description: NBD URI to connect to. With TLS, clients name their own certificates.
      type: str
      sample: nbd+unix:///?socket=/var/tmp/openvadp-serve-0/1f0c9a3b5d7e/disk-2000.sock
ends:
  description: When the servers end by themselves; null with O(state=absent).
  returned: success
  type: str
  sample: '2026-11-22T09:42:03Z'
seconds_left:
  description: How many seconds that is from now.
  returned: success
  type: int
  sample: 3599
writable:
  description: Whether clients may write to an overlay.
  returned: success
  type: bool
  sample: false
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.restore.serve import STATES, ServeRequest, serve_point
from ..module_utils.runner import Options, repository_options, repository_vm_options, run_module

OPTIONS = Options(
    dict(
        state=dict(type="str", choices=list(STATES), default="present"),
        disks=dict(type="list", elements="int", default=[]),
        socket_dir=dict(type="path"),
        address=dict(type="str"),
        port=dict(type="int", default=10809),
        tls_certificates=dict(type="path"),
        tls_verify_client=dict(type="bool", default=True),
        writable_overlay=dict(type="bool", default=False),
        overlay_dir=dict(type="path", default="/var/tmp"),
        timeout=dict(type="int", default=3600),
    ),
    mutually_exclusive=[("socket_dir", "address")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    return serve_point(ServeRequest.from_params(module.params), module.check_mode)


def main() -> None:
    run_module(repository_options() + repository_vm_options() + OPTIONS, body, libraries=["blake3"])


if __name__ == "__main__":
    main()
