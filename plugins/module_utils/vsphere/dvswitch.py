# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Distributed switches: their port groups, and their pools of Network I/O Control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Set

from ..errors import AmbiguousError, NotFoundError
from ..libraries import vim
from .inventory import readable
from .session import Session

BACKUP_POOL = "backupNfc"

_SWITCH_PATHS = (
    "name",
    "uuid",
    "config.productInfo.version",
    "config.networkResourceManagementEnabled",
    "config.networkResourceControlVersion",
    "config.infrastructureTrafficResourceConfig",
)


@dataclass(frozen=True)
class Pool:
    """A pool of Network I/O Control: ``level`` low, normal, high or custom; Mbit/s, a limit of -1 is none."""

    key: str
    level: str
    shares: int
    limit: int
    reservation: int

    def to_dict(self) -> Dict[str, Any]:
        return {
            "key": self.key,
            "level": self.level,
            "shares": self.shares,
            "limit": self.limit,
            "reservation": self.reservation,
        }


@dataclass
class DvSwitch:
    obj: Any
    moid: str
    name: str
    uuid: str
    version: str
    nioc_enabled: bool
    nioc_version: Optional[str]
    pools: List[Pool]

    def __str__(self) -> str:
        return f"distributed switch '{self.name}' ({self.moid})"


@dataclass(frozen=True)
class DvPortGroup:
    """``vlan_id`` is None where the port group has no single VLAN (a trunk, a private VLAN)."""

    obj: Any
    key: str
    name: str
    switch_moid: str
    switch_name: str
    vlan_id: Optional[int]
    uplink: bool


def find_switches(session: Session, name: str, root: Any = None) -> List[DvSwitch]:
    """All of that name, which is unique in a folder only. :raises NotFoundError: there is none.

    :param root: the datacenter to look in, instead of everywhere.
    """
    found = session.find(vim.DistributedVirtualSwitch, _SWITCH_PATHS, root)
    fitting = [(obj, values) for obj, values in found if name in (values["name"], readable(values["name"] or ""))]
    if fitting:
        return [_switch(obj, values) for obj, values in fitting]
    names = ", ".join(sorted(readable(values["name"] or "") for _obj, values in found))
    raise NotFoundError(
        "There is no such distributed switch",
        subject=f"'{name}'",
        reason=f"there are {names}" if names else "no distributed switch that this user may see",
        remedy="Check the spelling; a standard switch is the option vswitch of module vmkernel_backup_nic",
    )


def find_switch(session: Session, name: str, root: Any = None) -> DvSwitch:
    """The only one. :raises NotFoundError: there is none of that name; :raises AmbiguousError: there are several."""
    fitting = find_switches(session, name, root)
    if len(fitting) == 1:
        return fitting[0]
    raise AmbiguousError(
        "More than one distributed switch fits",
        subject=f"'{name}'",
        reason=", ".join(switch.moid for switch in fitting),
        remedy="Give the datacenter of the one that is meant",
    )


def beside(session: Session, switch: DvSwitch) -> Dict[str, str]:
    """What is in the switch's folder, where a port group's name must be unique: name -> what has it, in words."""
    folder = session.read(switch.obj, "parent")["parent"]
    children = (session.read(folder, "childEntity")["childEntity"] or ()) if folder is not None else ()
    by_type: Dict[Any, List[Any]] = {}
    for obj in children:
        by_type.setdefault(type(obj), []).append(obj)
    found = {}
    for kind, objects in by_type.items():
        names = session.read_many(objects, kind, ["name"])
        for obj in objects:
            name = readable(names[obj._moId]["name"] or "")
            found[name] = f"{_kind(obj)} '{name}' ({obj._moId})"
    return found


def _kind(obj: Any) -> str:
    if isinstance(obj, vim.dvs.DistributedVirtualPortgroup):
        return "the port group of a distributed switch"
    if isinstance(obj, vim.DistributedVirtualSwitch):
        return "the distributed switch"
    return "the folder" if isinstance(obj, vim.Folder) else "the network"


def _switch(obj: Any, values: Dict[str, Any]) -> DvSwitch:
    pools = []
    for one in values["config.infrastructureTrafficResourceConfig"] or ():
        info = one.allocationInfo
        shares = info.shares
        pools.append(
            Pool(
                key=one.key,
                level=str(shares.level) if shares is not None else "normal",
                shares=shares.shares if shares is not None else 50,
                limit=-1 if info.limit is None else int(info.limit),
                reservation=int(info.reservation or 0),
            )
        )
    return DvSwitch(
        obj=obj,
        moid=obj._moId,
        name=readable(values["name"] or obj._moId),
        uuid=values["uuid"] or "",
        version=values["config.productInfo.version"] or "",
        nioc_enabled=bool(values["config.networkResourceManagementEnabled"]),
        nioc_version=values["config.networkResourceControlVersion"],
        pools=pools,
    )


def read_port_groups(session: Session) -> Dict[str, DvPortGroup]:
    """All distributed port groups by key."""
    paths = ["name", "key", "config.distributedVirtualSwitch", "config.defaultPortConfig"]
    switches: Dict[str, Any] = {}
    uplinks: Set[str] = set()
    for obj, values in session.find(vim.DistributedVirtualSwitch, ["name", "config.uplinkPortgroup"]):
        switches[obj._moId] = values["name"]
        uplinks.update(group._moId for group in values["config.uplinkPortgroup"] or ())
    groups = {}
    for obj, values in session.find(vim.dvs.DistributedVirtualPortgroup, paths):
        switch = values["config.distributedVirtualSwitch"]
        moid = switch._moId if switch is not None else ""
        key = values["key"] or obj._moId
        groups[key] = DvPortGroup(
            obj=obj,
            key=key,
            name=readable(values["name"] or key),
            switch_moid=moid,
            switch_name=readable(switches.get(moid) or moid),
            vlan_id=_vlan(values["config.defaultPortConfig"]),
            uplink=obj._moId in uplinks,
        )
    return groups


def _vlan(setting: Any) -> Optional[int]:
    vlan = getattr(setting, "vlan", None)
    if isinstance(vlan, vim.dvs.VmwareDistributedVirtualSwitch.VlanIdSpec):
        return int(vlan.vlanId)
    return None


def create_port_group(session: Session, switch: DvSwitch, name: str, vlan_id: int, timeout: float) -> DvPortGroup:
    """Make a port group for VMkernel NICs: early binding, ports as they are needed."""
    kinds = vim.dvs.VmwareDistributedVirtualSwitch
    spec = vim.dvs.DistributedVirtualPortgroup.ConfigSpec(
        name=name,
        type="earlyBinding",
        numPorts=8,
        autoExpand=True,
        description="Backup traffic",
        defaultPortConfig=kinds.VmwarePortConfigPolicy(vlan=kinds.VlanIdSpec(inherited=False, vlanId=vlan_id)),
    )
    made = session.run_task(
        switch.obj.CreateDVPortgroup_Task,
        spec,
        what="The port group was not made",
        subject=f"'{name}' on {switch}",
        timeout=timeout,
    )
    key = session.read(made, "key")["key"] or made._moId
    return DvPortGroup(made, key, name, switch.moid, switch.name, vlan_id, False)


def destroy_port_group(session: Session, group: DvPortGroup, timeout: float) -> None:
    session.run_task(
        group.obj.Destroy_Task,
        what="The port group was not removed",
        subject=f"'{group.name}' of distributed switch '{group.switch_name}'",
        timeout=timeout,
        idempotent=True,
    )


def set_pool(session: Session, switch: DvSwitch, pool: Pool, timeout: float) -> None:
    """Give a pool new values. The switch's version is read again for every try: somebody else may change it, too."""
    kinds = vim.DistributedVirtualSwitch.HostInfrastructureTrafficResource
    wanted = kinds(
        key=pool.key,
        allocationInfo=kinds.ResourceAllocation(
            limit=pool.limit,
            reservation=pool.reservation,
            shares=vim.SharesInfo(level=pool.level, shares=pool.shares),
        ),
    )

    def reconfigure() -> Any:
        version = session.read(switch.obj, "config.configVersion")["config.configVersion"]
        spec = vim.dvs.VmwareDistributedVirtualSwitch.ConfigSpec(
            configVersion=version, infrastructureTrafficResourceConfig=[wanted]
        )
        return switch.obj.ReconfigureDvs_Task(spec)

    session.run_task(
        reconfigure,
        what="The pool was not changed",
        subject=f"{pool.key} of {switch}",
        timeout=timeout,
        idempotent=True,
    )
