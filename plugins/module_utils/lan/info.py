# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What there is: VMkernel NICs of hosts, who carries backup traffic, who shares a subnet, which hosts lack a tag."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..errors import AmbiguousError, NotFoundError, PrivilegeError
from ..libraries import vim
from ..vsphere import datacenters, dvswitch, host_network, host_storage
from ..vsphere.host_network import HostNetwork
from ..vsphere.inventory import readable
from ..vsphere.session import Session
from .subnets import may_share, shared_pairs


def gather(
    session: Session, names: Optional[Sequence[str]], datastore: Optional[str], datacenter: Optional[str]
) -> Dict[str, Any]:
    """The result of ``vmkernel_backup_nic_info``: of the hosts of these names, of a datastore's, or of all."""
    everywhere = datacenters.all_datacenters(session)
    root = datacenters.find_datacenter(session, datacenter).obj if datacenter else None
    hosts = host_network.all_hosts(session, root)
    if datastore is not None:
        moids = _mounted(session, datastore, root)
        hosts = [host for host in hosts if host.moid in moids]
    if names is not None:
        hosts = [host_network.pick(hosts, name) for name in dict.fromkeys(names)]
    hosts = sorted(hosts, key=lambda host: host.name)
    groups = {}
    if any(nic.port_key for host in hosts for nic in host.nics):
        groups = dvswitch.read_port_groups(session)
    warnings: List[str] = []
    clusters = _clusters(session, root)
    homes = datacenters.of_hosts(session, everywhere)
    told = [
        {
            **_host(session, network, warnings),
            "cluster": clusters.get(network.moid),
            "datacenter": datacenters.shown(homes[network.moid], everywhere) if network.moid in homes else None,
        }
        for network in host_network.read(session, hosts, groups)
    ]
    return {
        "changed": False,
        "hosts": told,
        "untagged_hosts": [host["name"] for host in told if not host["tagged"]],
        "warnings": warnings,
    }


def _clusters(session: Session, root: Any) -> Dict[str, str]:
    """Moid of a host -> the name of its cluster, for those that are in one."""
    return {
        host._moId: readable(values["name"] or obj._moId)
        for obj, values in session.find(vim.ClusterComputeResource, ["name", "host"], root)
        for host in values["host"] or ()
    }


def _mounted(session: Session, name: str, root: Any) -> List[str]:
    """Moids of the hosts that see a datastore (VADP facts 19: any of them may serve its disks)."""
    found = [
        (obj, values)
        for obj, values in session.find(vim.Datastore, ["name", "host"], root)
        if name in (values["name"], readable(values["name"] or ""))
    ]
    if not found:
        raise NotFoundError(
            "There is no such datastore",
            subject=f"'{name}'",
            reason="no datastore that this user may see has that name",
            remedy="Check the spelling, and datacenter if it is given",
        )
    if len(found) > 1:
        raise AmbiguousError(
            "More than one datastore fits",
            subject=f"'{name}'",
            reason=", ".join(obj._moId for obj, _values in found),
            remedy="Narrow it by datacenter",
        )
    return [
        mount.key._moId
        for mount in found[0][1]["host"] or ()
        if mount.mountInfo is None or mount.mountInfo.mounted is not False
    ]


def _host(session: Session, host: HostNetwork, warnings: List[str]) -> Dict[str, Any]:
    tagged = [nic.device for nic in host.tagged]
    if not host.connected:
        warnings.append(f"{host} is not connected; what its NICs carry is not known.")
    return {
        "name": host.name,
        "moid": host.moid,
        "connected": host.connected,
        "version": host.version,
        "backup_service": host_network.BACKUP_SERVICE in host.service_types,
        # What a NIC of a host that is away carries is not known, which is not "nothing".
        "nics": [nic.to_dict() if host.connected else {**nic.to_dict(), "services": None} for nic in host.nics],
        "tagged": tagged,
        "shared_subnets": [list(pair) for pair in _shared(session, host, warnings)],
    }


def _shared(session: Session, host: HostNetwork, warnings: List[str]) -> List[Tuple[str, str]]:
    """The pairs of NICs that are in one subnet and must not be."""
    pairs = [pair for pair in shared_pairs(host.nics) if may_share(*pair) is None]
    bound: List[str] = []
    # Who is bound for iSCSI takes calls of its own, and matters only to pairs that are left without backup traffic.
    if host.connected and any(not (first.tagged or second.tagged) for first, second in pairs):
        try:
            bound = host_storage.iscsi_bound(session, host)
        except PrivilegeError:
            warnings.append(
                f"{host}: without the privilege Host.Config.Storage it is not known whether NICs in one subnet are"
                " bound for iSCSI, which would be well."
            )
    return [(first.device, second.device) for first, second in pairs if may_share(first, second, bound) is None]
