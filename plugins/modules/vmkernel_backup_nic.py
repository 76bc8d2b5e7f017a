#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vmkernel_backup_nic
short_description: Make, tag or remove the VMkernel NIC for backup traffic of ESXi hosts
version_added: 0.1.0
description:
  - Brings about that a host has a VMkernel NIC that carries backup traffic (service C(vSphereBackupNFC)), whose address
    vCenter then hands to backup proxies. One host, or many at once.
  - A NIC that is there is taken, by O(device) or by its address. Otherwise a new one is made, with its port group and
    on request its standard switch where they are missing. No other NIC and no other service is touched.
  - A NIC that carries more than backup traffic (management, vMotion, vSAN, storage, any other service) is tagged on
    request, and changed or removed only with O(force=true). The message says what it carries.
  - Two VMkernel NICs of one TCP/IP stack in one subnet are not supported by ESXi, and break backups in ways that
    are hard to find. Such an address is refused before anything is changed.
  - All hosts are looked at before the first is changed. If one of them can't be as described, none is changed.
  - When a step fails, what was made on that host is removed again.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details: The name of a NIC that is not made yet is not known, so it is null. So is the address of DHCP.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  esxi_hostname:
    description:
      - Name of the host, as vCenter's inventory has it.
      - Exactly one of O(esxi_hostname), O(esxi_hostnames) and O(hosts) is required.
    type: str
  esxi_hostnames:
    description: Names of several hosts that get the same options, so with O(dhcp) or O(device).
    type: list
    elements: str
  hosts:
    description:
      - Several hosts, each with options of its own. What an entry does not set is as the module has it.
      - An option of an entry takes the place of what contradicts it. O(hosts[].vswitch) replaces O(dvswitch),
        O(hosts[].dvswitch) replaces O(vswitch) and O(uplinks), O(hosts[].ip_address) and O(hosts[].dhcp) replace each
        other's, and an address with its prefix replaces O(netmask).
    type: list
    elements: dict
    suboptions:
      esxi_hostname:
        description: Name of the host.
        type: str
        required: true
      vswitch:
        description: See O(vswitch).
        type: str
      dvswitch:
        description: See O(dvswitch).
        type: str
      uplinks:
        description: See O(uplinks).
        type: list
        elements: str
      portgroup:
        description: See O(portgroup).
        type: str
      vlan_id:
        description: See O(vlan_id).
        type: int
      ip_address:
        description: See O(ip_address).
        type: str
      netmask:
        description: See O(netmask).
        type: str
      dhcp:
        description: See O(dhcp).
        type: bool
      ipv6_addresses:
        description: See O(ipv6_addresses).
        type: list
        elements: str
      gateway:
        description: See O(gateway).
        type: str
      mtu:
        description: See O(mtu).
        type: int
      device:
        description: See O(device).
        type: str
  state:
    description:
      - V(present) makes or tags the NIC.
      - V(absent) removes the NIC that O(device), O(ip_address), O(ipv6_addresses) or O(portgroup) names. All of these
        that are given must hold, and O(vswitch), O(dvswitch) and O(dhcp) with them. A NIC that has the device or an
        address and not the rest is an error. Port groups and switches stay.
      - The last management NIC is never removed; one that is not tagged, or not for backup traffic alone, only with
        O(force=true).
    type: str
    choices: [present, absent]
    default: present
  vswitch:
    description: Name of the standard switch that the port group is on, or is made on.
    type: str
  dvswitch:
    description:
      - Name of the distributed switch that the port group is on, or is made on. The host must be its member.
      - Where several datacenters have a switch of that name, it is the one that the host is a member of.
    type: str
  uplinks:
    description:
      - Physical NICs with which O(vswitch) is made where it is missing. Without them a missing switch is an error.
      - Those of a switch that is there are not changed.
    type: list
    elements: str
  portgroup:
    description:
      - Name of the port group. It is made where it is missing; on a distributed switch for all hosts at once.
      - A backup NIC that is there on it, and carries nothing else, gets the address that is asked for.
    type: str
  vlan_id:
    description:
      - VLAN of a port group that is made, V(0) to V(4094); V(0) (no VLAN) if not given.
      - The VLAN of a port group that is there is compared and not changed; a difference is a warning.
    type: int
  ip_address:
    description: IPv4 address, with its prefix (V(10.20.30.11/24)) or with O(netmask).
    type: str
  netmask:
    description: IPv4 netmask of O(ip_address).
    type: str
  dhcp:
    description:
      - Whether the address comes from a DHCP server. It is looked at when it has come. If it is in another NIC's
        subnet, what was made is removed again.
    type: bool
    default: false
  ipv6_addresses:
    description: All IPv6 addresses of the NIC beside the link-local one, each with its prefix.
    type: list
    elements: str
  gateway:
    description:
      - IPv4 gateway of this NIC alone. Not needed where proxies are in the NIC's subnet, which is best.
      - An empty string removes it, so that the NIC uses the TCP/IP stack's. If not given, it is left as it is.
    type: str
  mtu:
    description:
      - MTU, V(1280) to V(9190). A new NIC gets 1500 if not given.
      - A switch that is made for the NIC gets it, too. One that is there is not changed; a smaller MTU is a warning.
    type: int
  device:
    description:
      - A VMkernel NIC that is there, such as V(vmk2). It is tagged, and nothing else of it is changed; other options
        that describe it must fit.
    type: str
  tcpip_stack:
    description: TCP/IP stack. Backup traffic can use the default one only; any other is refused.
    type: str
    default: defaultTcpipStack
  allow_shared_subnet:
    description: Whether the NIC may share its subnet with another NIC of the host. It is a warning then.
    type: bool
    default: false
  address_scope:
    description:
      - Where an address may be used once. V(datacenter) is for isolated networks, where hosts of several datacenters
        have the same subnet, and the same addresses in it.
      - An address of a host elsewhere in that scope is refused.
    type: str
    choices: [vcenter, datacenter]
    default: vcenter
  force:
    description:
      - Whether a NIC is changed or removed that is not for backup traffic alone. It is not tagged, or it carries other
        services, is bound to an iSCSI adapter, or reaches an iSCSI target or the server of an NFS datastore.
      - What uses it is a warning then. A NIC that the options do not name is never taken.
    type: bool
    default: false
  timeout:
    description: Seconds to wait for an address of DHCP, and for a task of vCenter.
    type: int
    default: 120
  parallel_hosts:
    description: How many hosts are worked on at a time, V(1) to V(64).
    type: int
    default: 16
notes:
  - Required privileges are C(Host.Config.Network) on the hosts, and for port groups of a distributed switch
    C(DVPortgroup.Create) and C(DVPortgroup.Delete) (it is removed again where no host came to use it).
  - To know whether a NIC is bound to an iSCSI adapter takes C(Host.Config.Storage), on hosts that have one. Without it
    a NIC that is not tagged counts as bound. So does one where the server of an NFS datastore can't be resolved.
  - ESXi knows the service since version 7.0. An older host is reported as failed.
  - The address is looked for in the network first where the machine that runs the module is in that subnet.
    RV(vmkernel_nic.address_check) says whether it was.
seealso:
  - module: openvadp.backup.vmkernel_backup_nic_info
  - module: openvadp.backup.dvswitch_backup_nioc
"""

EXAMPLES = r"""
- name: A NIC in a subnet and VLAN of its own, on a switch with uplinks of its own
  openvadp.backup.vmkernel_backup_nic:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    esxi_hostname: esx01.example.com
    vswitch: vSwitch1
    uplinks: [vmnic2, vmnic3]
    portgroup: Backup
    vlan_id: 120
    ip_address: 10.20.30.11/24
    mtu: 9000

- name: All hosts of a cluster on a distributed switch
  openvadp.backup.vmkernel_backup_nic:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    dvswitch: DSwitch0
    portgroup: Backup
    vlan_id: 120
    hosts:
      - esxi_hostname: esx01.example.com
        ip_address: 10.20.30.11/24
      - esxi_hostname: esx02.example.com
        ip_address: 10.20.30.12/24

- name: Tag a NIC that is there, and nothing else
  openvadp.backup.vmkernel_backup_nic:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    esxi_hostname: esx01.example.com
    device: vmk2

- name: Remove the backup NIC
  openvadp.backup.vmkernel_backup_nic:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    esxi_hostname: esx01.example.com
    portgroup: Backup
    state: absent
"""

RETURN = r"""
vmkernel_nic:
  description: The NIC of the one host; its values are null when there is none.
  returned: success, with O(esxi_hostname)
  type: dict
  contains: &nic
    host:
      description: Name of the host.
      type: str
      sample: esx01.example.com
    device:
      description: Name of the NIC; null in check mode when it would be made.
      type: str
      sample: vmk2
    ip:
      description: IPv4 address; null where it has none, or before DHCP has given one.
      type: str
      sample: 10.20.30.11
    netmask:
      description: IPv4 netmask; null without an address.
      type: str
      sample: 255.255.255.0
    dhcp:
      description: Whether the address is DHCP's; null where the NIC does not exist.
      type: bool
      sample: false
    ipv6:
      description: IPv6 addresses with their prefixes, without link-local ones; null where the NIC does not exist.
      type: list
      elements: str
      sample: []
    gateway:
      description: Gateway of this NIC alone; null if it uses the stack's.
      type: str
      sample:
    mtu:
      description: MTU; null where the NIC does not exist.
      type: int
      sample: 9000
    portgroup:
      description: Port group; null where the NIC does not exist.
      type: str
      sample: Backup
    switch:
      description: Switch; null where the NIC does not exist.
      type: str
      sample: vSwitch1
    vlan_id:
      description: VLAN of the port group; null where it has no single one.
      type: int
      sample: 120
    tcpip_stack:
      description: TCP/IP stack; null where the NIC does not exist.
      type: str
      sample: defaultTcpipStack
    services:
      description: The services that the NIC carries.
      type: list
      elements: str
      sample: [vSphereBackupNFC]
    address_check:
      description:
        - V(free) or V(answers) if the address was looked for before it was given, V(not checked) where this machine is
          not in that subnet; null when no address was given.
      type: str
      sample: not checked
    changed:
      description: Whether this host was changed.
      type: bool
      sample: true
    failed:
      description: Whether this host failed.
      type: bool
      sample: false
    msg:
      description: Why it failed.
      type: str
      sample: ''
hosts:
  description:
    - The same for each host, in the order of the options. One that failed has C(host), C(changed), C(failed), C(msg)
      and C(error) only.
  returned: with O(esxi_hostnames) or O(hosts), also when hosts failed
  type: list
  elements: dict
  contains: *nic
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.lan.apply import ensure
from ..module_utils.lan.request import NicRequest
from ..module_utils.runner import Options, connection_options, run_module
from ..module_utils.vsphere.session import Session


def _nic_options() -> Dict[str, Any]:
    return dict(
        vswitch=dict(type="str"),
        dvswitch=dict(type="str"),
        uplinks=dict(type="list", elements="str"),
        portgroup=dict(type="str"),
        vlan_id=dict(type="int"),
        ip_address=dict(type="str"),
        netmask=dict(type="str"),
        ipv6_addresses=dict(type="list", elements="str"),
        gateway=dict(type="str"),
        mtu=dict(type="int"),
        device=dict(type="str"),
    )


OPTIONS = Options(
    dict(
        _nic_options(),
        esxi_hostname=dict(type="str"),
        esxi_hostnames=dict(type="list", elements="str"),
        hosts=dict(
            type="list",
            elements="dict",
            options=dict(_nic_options(), esxi_hostname=dict(type="str", required=True), dhcp=dict(type="bool")),
        ),
        state=dict(type="str", choices=["present", "absent"], default="present"),
        dhcp=dict(type="bool", default=False),
        tcpip_stack=dict(type="str", default="defaultTcpipStack"),
        allow_shared_subnet=dict(type="bool", default=False),
        address_scope=dict(type="str", choices=["vcenter", "datacenter"], default="vcenter"),
        force=dict(type="bool", default=False),
        timeout=dict(type="int", default=120),
        parallel_hosts=dict(type="int", default=16),
    ),
    required_one_of=[("esxi_hostname", "esxi_hostnames", "hosts")],
    mutually_exclusive=[("esxi_hostname", "esxi_hostnames", "hosts")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    request = NicRequest.from_params(module.params)
    with Session.connect(request.connection) as session:
        result = ensure(session, request, module.check_mode)
    if result.get("failed"):
        for warning in result.pop("warnings"):
            module.warn(warning)
        if not module._diff:
            del result["diff"]
        module.fail_json(**result)
    return result


def main() -> None:
    run_module(connection_options() + OPTIONS, body, libraries=["pyVmomi"])


if __name__ == "__main__":
    main()
