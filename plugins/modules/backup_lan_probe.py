#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: backup_lan_probe
short_description: Prove from the proxy that the backup NICs of ESXi hosts are reached as they should be
version_added: 0.1.0
description:
  - Runs on the backup proxy and needs no vCenter. For each host it opens a TCP connection to the NFC port of the backup
    NIC's address, from the address of the proxy's backup interface, and reads the greeting of the host's authd.
  - With O(mtu) it sends packets of exactly that size which must not be cut up, and looks whether they come back.
  - What went wrong is told apart, with what to do about it. A target that is not proven does not fail the module; use
    RV(proven).
  - All targets are tried at once.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.lan_targets
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: Does the same, as nothing is changed.
  diff_mode:
    support: N/A
    details: Nothing is changed.
  idempotent:
    support: full
options:
  source_address:
    description:
      - Address of the proxy's backup interface. Connections come from it, and it is checked that they leave by the
        interface that has it.
      - If not given, the kernel chooses.
    type: str
  mtu:
    description: Size in bytes of packets that must get to the hosts and back uncut, V(1280) to V(9190).
    type: int
  timeout:
    description:
      - Seconds to wait for a connection, for the greeting, and for packets of O(mtu), V(1) to V(60).
      - With less than V(4) an address that nobody has looks like one that does not answer.
    type: int
    default: 5
notes:
  - An authd greets on every VMkernel NIC of its host. That vCenter hands out this address is proved by
    M(openvadp.backup.backup_lan_vddk_probe).
  - Packets of O(mtu) are ICMP echo requests. They are sent by a socket where the user may, else by the program C(ping)
    of iputils. Where neither may, RV(targets[].mtu.ok) is null.
seealso:
  - module: openvadp.backup.backup_lan_vddk_probe
  - module: openvadp.backup.vmkernel_backup_nic
  - module: openvadp.backup.vmkernel_backup_nic_info
"""

EXAMPLES = r"""
- name: Are the hosts reached from the backup interface?
  openvadp.backup.backup_lan_probe:
    source_address: 10.20.30.5
    mtu: 9000
    targets:
      - host: esx01.example.com
        address: 10.20.30.11
      - host: esx02.example.com
        address: 10.20.30.12
  register: proof

- name: They are
  ansible.builtin.assert:
    that: proof.proven
    fail_msg: "{{ proof.targets | rejectattr('proven') | map(attribute='reason') | join('; ') }}"
"""

RETURN = r"""
proven:
  description: Whether all targets were reached as they should be. An MTU that could not be checked does not count.
  returned: success
  type: bool
  sample: true
unproven_hosts:
  description: The hosts that were not.
  returned: success
  type: list
  elements: str
  sample: []
targets:
  description: What came of each target, in the order of the option.
  returned: success
  type: list
  elements: dict
  contains:
    host:
      description: Name of the host.
      type: str
      sample: esx01.example.com
    address:
      description: The address that was tried.
      type: str
      sample: 10.20.30.11
    reached:
      description: Whether the port was reached and greets as authd does.
      type: bool
      sample: true
    proven:
      description: Whether it was reached, by the right interface, and the MTU was not found too small.
      type: bool
      sample: true
    source_address:
      description: The address that the connection came from.
      type: str
      sample: 10.20.30.5
    interface:
      description: The interface that packets to the address leave by; null where the kernel does not say.
      type: str
      sample: ens224
    mtu:
      description: What came of the packets of that size.
      type: dict
      contains:
        asked:
          description: The size.
          type: int
          sample: 9000
        ok:
          description: Whether they came back; null if not asked for, or if it could not be determined.
          type: bool
          sample: true
        reason:
          description: Why not.
          type: str
          sample: ''
    banner:
      description: The greeting.
      type: str
      sample: '220 VMware Authentication Daemon Version 1.10: SSL Required, ServerDaemonProtocol:SOAP'
    cause:
      description:
        - V(ok), or what went wrong.
        - V(closed) is a machine that answers and has no such service. V(timeout) is no answer at all, as of a host
          whose answers leave by another NIC in the same subnet. V(unreachable) is an address that nobody has, or that
          a router knows no way to, V(no_route) one that this machine knows no way to.
        - V(silent) and V(not_authd) are services that are not authd. V(wrong_source) is a source address that is not
          this machine's, V(wrong_interface) one that is not on the interface by which packets leave.
        - V(mtu_local) is an interface of this machine that is too narrow, V(mtu_path) anything behind it.
      type: str
      sample: ok
    reason:
      description: What went wrong, in words.
      type: str
      sample: ''
    remedy:
      description: What to do about it.
      type: str
      sample: ''
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.lan.probe import ProbeRequest, probe, unproven
from ..module_utils.runner import Options, lan_target_options, run_module

OPTIONS = Options(
    dict(
        source_address=dict(type="str"),
        mtu=dict(type="int"),
        timeout=dict(type="int", default=5),
    )
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    targets = probe(ProbeRequest.from_params(module.params))
    missing = unproven(targets)
    return {"changed": False, "proven": not missing, "unproven_hosts": missing, "targets": targets}


def main() -> None:
    run_module(lan_target_options() + OPTIONS, body)


if __name__ == "__main__":
    main()
