#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vmkernel_backup_nic_info
short_description: Tell which VMkernel NICs of ESXi hosts carry backup traffic
version_added: 0.1.0
description:
  - Tells the VMkernel NICs of hosts with their addresses and services, which of them carry backup traffic, and which
    NICs of a host share a subnet and must not.
  - With O(datastore), of all hosts that see the datastore. Any of them may serve the disks of a virtual machine on it,
    so each needs a backup NIC. RV(untagged_hosts) are those that have none.
  - Without O(esxi_hostname), O(esxi_hostnames) and O(datastore), of all hosts.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
    details: Nothing is changed.
  idempotent:
    support: full
options:
  esxi_hostname:
    description: Name of one host, as vCenter's inventory has it.
    type: str
  esxi_hostnames:
    description: Names of several hosts.
    type: list
    elements: str
  datastore:
    description: Name of a datastore, whose hosts are reported. Two of one name are an error.
    type: str
  datacenter:
    description: Name or path of the datacenter that datastore and hosts lie in.
    type: str
notes:
  - NICs that may share a subnet are not in RV(hosts[].shared_subnets). They are those of multi-NIC vMotion, NSX tunnel
    endpoints, and those bound for iSCSI. Whether two are bound for iSCSI takes the privilege C(Host.Config.Storage);
    without it there is a warning.
seealso:
  - module: openvadp.backup.vmkernel_backup_nic
"""

EXAMPLES = r"""
- name: Look at all hosts that may serve the disks of a datastore
  openvadp.backup.vmkernel_backup_nic_info:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    datastore: vmfs01
  register: lan

- name: All of them have a backup NIC
  ansible.builtin.assert:
    that: lan.untagged_hosts | length == 0
    fail_msg: "Without a backup NIC: {{ lan.untagged_hosts | join(', ') }}"
"""

RETURN = r"""
hosts:
  description: The hosts, by name.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the host.
      type: str
      sample: esx01.example.com
    moid:
      description: Managed object id.
      type: str
      sample: host-10
    cluster:
      description: Name of the cluster that the host is in; null if it is in none.
      type: str
      sample: Cluster0
    datacenter:
      description:
        - Name of the datacenter that the host is in, or its path where two have that name. Null if the user may not see
          it.
      type: str
      sample: DC0
    connected:
      description: Whether the host is connected to vCenter. If not, what its NICs carry is not known.
      type: bool
      sample: true
    version:
      description: Version of ESXi.
      type: str
      sample: 8.0.3
    backup_service:
      description: Whether the host knows the service for backup traffic (ESXi 7.0 and newer).
      type: bool
      sample: true
    nics:
      description: The VMkernel NICs.
      type: list
      elements: dict
      contains:
        device:
          description: Name of the NIC.
          type: str
          sample: vmk2
        ip:
          description: IPv4 address; null if it has none.
          type: str
          sample: 10.20.30.11
        netmask:
          description: IPv4 netmask.
          type: str
          sample: 255.255.255.0
        dhcp:
          description: Whether the address is DHCP's.
          type: bool
          sample: false
        ipv6:
          description: IPv6 addresses with their prefixes, without link-local ones.
          type: list
          elements: str
          sample: []
        gateway:
          description: Gateway of this NIC alone; null if it uses the stack's.
          type: str
          sample:
        mtu:
          description: MTU.
          type: int
          sample: 9000
        portgroup:
          description: Port group.
          type: str
          sample: Backup
        switch:
          description: Switch.
          type: str
          sample: vSwitch1
        vlan_id:
          description: VLAN of the port group; null where it has no single one.
          type: int
          sample: 120
        tcpip_stack:
          description: TCP/IP stack.
          type: str
          sample: defaultTcpipStack
        services:
          description: The services that the NIC carries; null where they are not known, as the host is not connected.
          type: list
          elements: str
          sample: [vSphereBackupNFC]
    tagged:
      description: The NICs that carry backup traffic.
      type: list
      elements: str
      sample: [vmk2]
    shared_subnets:
      description: Pairs of NICs of one TCP/IP stack that are in one subnet, and must not be.
      type: list
      elements: list
      sample: []
untagged_hosts:
  description: The hosts among RV(hosts) that have no NIC for backup traffic, and those that are not connected.
  returned: success
  type: list
  elements: str
  sample: [esx02.example.com]
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.lan.info import gather
from ..module_utils.runner import Options, connection_options, run_module
from ..module_utils.vsphere.session import Connection, Session

OPTIONS = Options(
    dict(
        esxi_hostname=dict(type="str"),
        esxi_hostnames=dict(type="list", elements="str"),
        datastore=dict(type="str"),
        datacenter=dict(type="str"),
    ),
    mutually_exclusive=[("esxi_hostname", "esxi_hostnames", "datastore")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    names = [params["esxi_hostname"]] if params["esxi_hostname"] else params["esxi_hostnames"]
    with Session.connect(Connection.from_params(params)) as session:
        return gather(session, names, params["datastore"], params["datacenter"])


def main() -> None:
    run_module(connection_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
