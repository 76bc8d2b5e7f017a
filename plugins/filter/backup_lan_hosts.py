# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The address plan of a backup LAN, as role backup_lan gives it to module vmkernel_backup_nic."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence

from ansible.errors import AnsibleFilterError

from ..module_utils.errors import VadpError
from ..module_utils.lan import addresses

DOCUMENTATION = r"""
name: backup_lan_hosts
short_description: Address plan of a backup LAN
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Gives each host an address in the backup subnet, as the option C(hosts) of
    M(openvadp.backup.vmkernel_backup_nic) takes it.
  - A fixed address counts first, then the one that the host's backup NIC has already. All others get the lowest free
    addresses. So a host that is added never moves another one.
  - Never given are the network and broadcast addresses, the gateway, the proxies, what is excluded, and what any other
    VMkernel NIC of the vCenter has. Too few addresses are an error that says how many are missing, and for whom.
options:
  _input:
    description: RV(openvadp.backup.vmkernel_backup_nic_info#module:hosts) of all hosts of the vCenter.
    type: list
    elements: dict
    required: true
  subnet:
    description: The backup subnet with its prefix, IPv4.
    type: str
    required: true
  hosts:
    description: Names of hosts.
    type: list
    elements: str
    default: []
  clusters:
    description: Names of clusters, all hosts of which take part.
    type: list
    elements: str
    default: []
  addresses:
    description: Fixed addresses, by host.
    type: dict
    default: {}
  pool:
    description: Where new addresses come from, such as V(10.20.30.11-10.20.30.60). Empty means the whole subnet.
    type: list
    elements: str
    default: []
  exclude:
    description: Addresses, ranges or subnets that no host gets.
    type: list
    elements: str
    default: []
  gateway:
    description: Address of a router in the subnet.
    type: str
  proxies:
    description: Addresses of proxies.
    type: list
    elements: str
    default: []
  portgroup:
    description: The backup port group. A NIC on it counts as the host's backup NIC even if it has no tag yet.
    type: str
  datacenter:
    description: Datacenter that the hosts are in, as the input names it, where clusters of two have one name.
    type: str
  address_scope:
    description: V(datacenter) leaves aside what hosts of other datacenters have, whose networks are isolated.
    type: str
    choices: [vcenter, datacenter]
    default: vcenter
  host_options:
    description: Options of module M(openvadp.backup.vmkernel_backup_nic) for single hosts, by host.
    type: dict
    default: {}
seealso:
  - module: openvadp.backup.vmkernel_backup_nic
  - module: openvadp.backup.vmkernel_backup_nic_info
"""

EXAMPLES = r"""
- name: Give all hosts of two clusters a backup NIC
  openvadp.backup.vmkernel_backup_nic:
    dvswitch: DSwitch0
    portgroup: Backup
    vlan_id: 120
    hosts: >-
      {{ lan.hosts | openvadp.backup.backup_lan_hosts(subnet='10.20.30.0/24', clusters=['Cluster0', 'Cluster1'],
         pool=['10.20.30.11-10.20.30.60'], portgroup='Backup') }}
"""

RETURN = r"""
_value:
  description: For each host C(esxi_hostname), C(ip_address) with its prefix, and the host's own options.
  type: list
  elements: dict
"""


def backup_lan_hosts(facts: Sequence[Mapping[str, Any]], **lan: Any) -> List[Dict[str, Any]]:
    """The filter; its parameters are those of :func:`addresses.backup_lan_hosts`."""
    known = {
        "subnet",
        "hosts",
        "clusters",
        "addresses",
        "pool",
        "exclude",
        "gateway",
        "proxies",
        "portgroup",
        "host_options",
        "datacenter",
        "address_scope",
    }
    unknown = sorted(set(lan) - known)
    if unknown or "subnet" not in lan:
        raise AnsibleFilterError(
            f"backup_lan_hosts takes {', '.join(sorted(known))}, of which subnet is required"
            + (f"; got {', '.join(unknown)}." if unknown else ".")
        )
    if isinstance(facts, (str, bytes, Mapping)) or not all(isinstance(fact, Mapping) for fact in facts):
        raise AnsibleFilterError("backup_lan_hosts takes the list hosts that vmkernel_backup_nic_info returns.")
    try:
        return addresses.backup_lan_hosts(facts, lan)
    except VadpError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"backup_lan_hosts": backup_lan_hosts}
