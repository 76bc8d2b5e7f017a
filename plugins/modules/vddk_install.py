#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vddk_install
short_description: Unpack VDDK on a backup proxy
version_added: 0.1.0
description:
  - Unpacks VMware's Virtual Disk Development Kit 6.7 to 9, or a library with the same interface such as OpenVDDK, from
    the archive that its maker gives out. The archive itself is not part of this collection.
  - The archive's SHA-256 is compared before anything is unpacked. An archive with names or links that leave the folder,
    or with anything but files, folders and links, is refused.
  - It is unpacked beside O(dest), tried with nbdkit's VDDK plugin, and renamed into place. What nbdkit can't load never
    gets there.
  - A library of version 9 gets a link named C(libvixDiskLib.so.8) where the plugin doesn't look for version 9 itself.
  - VDDK brings its own libcrypto and libstdc++, so a folder on the system's library path is refused.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: The archive is checked, but not tried.
  diff_mode:
    support: none
    details: Libraries are binary files.
  idempotent:
    support: full
options:
  archive:
    description:
      - The tar archive, on the machine that the module runs on.
      - It is not needed where O(dest) already holds what came out of it.
    type: path
  checksum:
    description: SHA-256 of the archive, 64 hexadecimal digits.
    type: str
    required: true
  dest:
    description:
      - Folder that holds C(lib64) afterwards, to be named in C(vddk_libdir) of the other modules.
      - It must be absent, empty, or made by this module.
    type: path
    default: /opt/vmware-vix-disklib-distrib
requirements:
  - nbdkit with its VDDK plugin
notes:
  - Role P(openvadp.backup.backup_proxy#role) installs all that a backup proxy needs.
"""

EXAMPLES = r"""
- name: Unpack VDDK
  openvadp.backup.vddk_install:
    archive: /root/VMware-vix-disklib-8.0.3-23950268.x86_64.tar.gz
    checksum: 0f4b8a2c9d3e5f60718293a4b5c6d7e8f90112233445566778899aabbccddeef
  become: true
  register: vddk

- name: Show what it is
  ansible.builtin.debug:
    msg: "VDDK {{ vddk.version }} with {{ vddk.functions | length }} functions"
"""

RETURN = r"""
libdir:
  description: O(dest), for C(vddk_libdir) of the other modules.
  returned: success
  type: str
  sample: /opt/vmware-vix-disklib-distrib
version:
  description: Version of the library that nbdkit loads; null in check mode if it is not in place yet.
  returned: success
  type: str
  sample: 8.0.3
plugin_version:
  description: Version of nbdkit's VDDK plugin; null in check mode if the library is not in place yet.
  returned: success
  type: str
  sample: 1.42.3
functions:
  description: Functions of the library that the plugin found.
  returned: success
  type: list
  elements: str
  sample: [VixDiskLib_AllocateConnectParams, VixDiskLib_Close, VixDiskLib_ConnectEx]
transport_modes:
  description: Transport modes that the library lists.
  returned: success
  type: list
  elements: str
  sample: [file, san, hotadd, nbdssl, nbd]
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.runner import Options, run_module
from ..module_utils.transport.vddk_archive import functions, install

OPTIONS = Options(
    dict(
        archive=dict(type="path"),
        checksum=dict(type="str", required=True),
        dest=dict(type="path", default="/opt/vmware-vix-disklib-distrib"),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    done = install(params["archive"], params["checksum"], params["dest"], check_mode=module.check_mode)
    modes = done.facts.get("vddk_transport_modes", "")
    return {
        "changed": done.changed,
        "libdir": params["dest"],
        "version": done.vddk.version if done.vddk else None,
        "plugin_version": done.vddk.plugin if done.vddk else None,
        "functions": functions(done.facts),
        "transport_modes": modes.split(":") if modes else [],
    }


def main() -> None:
    run_module(OPTIONS, body)


if __name__ == "__main__":
    main()
