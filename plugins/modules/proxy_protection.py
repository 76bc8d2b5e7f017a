#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: proxy_protection
short_description: Bring the files that protect LUNs and hot-added disks into force where they are not
version_added: 0.1.0
description:
  - Lets udev, multipathd and the initramfs take their files where they are not known to have them, whether or not a
    file changed in this run. A reload that failed or got lost is made up for by the next run.
  - The initramfs is made again if it is older than its files. What is not on this machine is passed over.
  - Role P(openvadp.backup.backup_proxy#role) writes the files.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  udev_files:
    description: Rules of udev. A path also counts where its file was removed.
    type: list
    elements: path
    default: []
  multipath_files:
    description: Configuration of multipathd.
    type: list
    elements: path
    default: []
  initramfs_files:
    description: Files that the initramfs has copies of.
    type: list
    elements: path
    default: []
  unprotected:
    description: Disks that the rules should have made read-only and that are not. They are reason enough.
    type: list
    elements: str
    default: []
notes:
  - What the services have taken is kept below C(/run/openvadp-backup) until the machine starts again.
  - It runs as root.
seealso:
  - module: openvadp.backup.proxy_lun_guard
"""

EXAMPLES = r"""
- name: The rules are in force
  openvadp.backup.proxy_protection:
    udev_files:
      - /etc/udev/rules.d/59-openvadp-backup-proxy.rules
      - /etc/udev/rules.d/62-openvadp-backup-proxy.rules
  become: true
"""

RETURN = r"""
reasons:
  description: What was not in force; empty if all was.
  returned: success
  type: list
  elements: str
  sample: [udev is not known to have applied its rules]
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.runner import Options, run_module
from ..module_utils.transport.protection import Files, ensure

OPTIONS = Options(
    dict(
        udev_files=dict(type="list", elements="path", default=[]),
        multipath_files=dict(type="list", elements="path", default=[]),
        initramfs_files=dict(type="list", elements="path", default=[]),
        unprotected=dict(type="list", elements="str", default=[]),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    files = Files(params["udev_files"], params["multipath_files"], params["initramfs_files"])
    reasons = ensure(files, params["unprotected"], module.check_mode)
    return {"changed": bool(reasons), "reasons": reasons}


def main() -> None:
    run_module(OPTIONS, body)


if __name__ == "__main__":
    main()
