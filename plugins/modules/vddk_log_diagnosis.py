#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vddk_log_diagnosis
short_description: Say what a log of VDDK, nbdkit or a backup product means
version_added: 0.1.0
description:
  - Reads a log and answers with what may be wrong, the most certain first. Each finding carries the lines it was read
    from, what to do, and which check would confirm it.
  - It knows the messages of VDDK and of NFC, the protocol of transports nbd and nbdssl, with whatever timestamps and
    prefixes a product puts before them.
  - What it does not know it calls V(unknown). A log without errors has no findings.
  - It needs no vCenter. The log can be of any size, in UTF-8 or UTF-16, and damaged. Passwords, cookies and session ids
    in it are not repeated.
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
  path:
    description:
      - The log file, on the machine that runs the module. It must not be compressed.
      - Exactly one of O(path) and O(text) is required.
    type: path
  text:
    description: The log itself.
    type: str
  esxi_nics:
    description:
      - VMkernel NICs of the ESXi hosts, as far as they are known.
      - Two NICs of one host in one subnet are only likely by the log alone. With this list they are certain, or ruled
        out.
    type: list
    elements: dict
    default: []
    suboptions:
      host:
        description: Name of the host, as the log names it.
        type: str
        required: true
      device:
        description: The NIC, such as V(vmk1).
        type: str
        required: true
      ip:
        description: Its address.
        type: str
        required: true
      netmask:
        description: Its netmask, or the length of its prefix.
        type: str
        required: true
      portgroup:
        description: Name of its port group.
        type: str
      services:
        description: Services that the NIC is tagged for, such as V(management), V(vmotion) and V(vSphereBackupNFC).
        type: list
        elements: str
        default: []
      netstack:
        description: Its TCP/IP stack. NICs of different stacks may lie in one subnet.
        type: str
        default: defaultTcpipStack
seealso:
  - module: openvadp.backup.vadp_preflight
"""

EXAMPLES = r"""
- name: What does this log say?
  openvadp.backup.vddk_log_diagnosis:
    path: /var/log/backup/vddk.log
  register: diagnosis

- name: Show it
  ansible.builtin.debug:
    msg: "{{ item.certainty }}: {{ item.meaning }}. {{ item.remedy }}"
  loop: "{{ diagnosis.findings }}"
  loop_control:
    label: "{{ item.code }}"

- name: The same with the host's VMkernel NICs
  openvadp.backup.vddk_log_diagnosis:
    text: "{{ lookup('ansible.builtin.file', 'vddk.log') }}"
    esxi_nics:
      - host: esx01.example.com
        device: vmk0
        ip: 192.0.2.11
        netmask: 255.255.255.0
        portgroup: Management Network
        services: [management]
      - host: esx01.example.com
        device: vmk1
        ip: 192.0.2.111
        netmask: 255.255.255.0
        portgroup: Backup
        services: [vSphereBackupNFC]
"""

RETURN = r"""
findings:
  description:
    - What may be wrong, the most certain first; empty if the log has no errors.
    - C(docs/troubleshooting.md) lists all of them.
  returned: success
  type: list
  elements: dict
  contains:
    code:
      description: Short name of the cause, or V(unknown).
      type: str
      sample: shared_subnet
    meaning:
      description: What that is.
      type: str
      sample: two VMkernel NICs of the ESXi host lie in one subnet, so its answers may leave by the wrong one
    certainty:
      description: V(certain), V(likely) or V(possible).
      type: str
      sample: likely
    evidence:
      description: The first and last lines that say so, cleaned of secrets.
      type: list
      elements: str
      sample: ['[NFC ERROR] NfcFssrvrClientOpen: failed to send open message']
    remedy:
      description: What to do about it.
      type: str
      sample: Give the host's backup traffic a VMkernel NIC in a subnet of its own
    confirm:
      description: The check that would confirm it.
      type: str
      sample: vadp_preflight, check host_port
lines:
  description: How many lines were read.
  returned: success
  type: int
  sample: 10
error_lines:
  description: How many of them report something that went wrong.
  returned: success
  type: int
  sample: 9
"""

import io
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.runner import Options, run_module
from ..module_utils.transport.diagnosis import Nic, diagnose, open_log, read_lines

OPTIONS = Options(
    dict(
        path=dict(type="path"),
        text=dict(type="str", no_log=True),
        esxi_nics=dict(
            type="list",
            elements="dict",
            default=[],
            options=dict(
                host=dict(type="str", required=True),
                device=dict(type="str", required=True),
                ip=dict(type="str", required=True),
                netmask=dict(type="str", required=True),
                portgroup=dict(type="str"),
                services=dict(type="list", elements="str", default=[]),
                netstack=dict(type="str", default="defaultTcpipStack"),
            ),
        ),
    ),
    required_one_of=[("path", "text")],
    mutually_exclusive=[("path", "text")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    nics = [Nic.from_option(option) for option in params["esxi_nics"]]
    if params["text"] is None:
        stream = open_log(params["path"])
    else:
        stream = io.BytesIO(params["text"].encode("utf-8", errors="replace"))
        # The log must not come back as an option's value, but lines of it are to come back as evidence.
        module.no_log_values.discard(params["text"])
        params["text"] = f"{len(params['text'])} characters"
    with stream:
        diagnosis = diagnose(read_lines(stream), nics)
    return {
        "changed": False,
        "findings": diagnosis.findings(),
        "lines": diagnosis.lines,
        "error_lines": diagnosis.troubles,
    }


def main() -> None:
    run_module(OPTIONS, body)


if __name__ == "__main__":
    main()
