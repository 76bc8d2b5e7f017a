# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a new virtual machine goes: folder, host, resource pool, datastores, networks, all by name.

What is not asked for is as it was, if that is still there. Nothing is changed; all that is missing is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from ..errors import VsphereError
from ..libraries import vim
from .inventory import are_called, is_called, parts_of, readable
from .session import Session

_Found = Tuple[Any, Dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """What is asked for, and what was: the second of each pair is used where the first is None.

    :param home: datastore of the machine's own files.
    :param datastores: bytes that each datastore has to have room for, by name.
    :param networks: names of networks.
    """

    datacenter: Optional[str]
    folder: Optional[str]
    cluster: Optional[str]
    host: Optional[str]
    resource_pool: Optional[str]
    home: str
    datastores: Mapping[str, int]
    networks: Sequence[str]
    was: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Where it goes.

    :param datastores: name -> object.
    :param networks: name -> backing of a network card.
    """

    folder: Any
    folder_path: str
    datacenter: str
    datacenter_path: str
    datacenter_moid: str
    host: Any
    host_name: str
    pool: Any
    datastores: Dict[str, Any]
    networks: Dict[str, Any]


def place(session: Session, wanted: Wanted, subject: str) -> Placement:
    """Find everything. :raises VsphereError: with all that is missing, and what there is instead."""
    look = _Look(session, wanted)
    placement = look.place()
    if placement is None or look.obstacles:
        raise VsphereError(
            "The new virtual machine has no place, and nothing was touched",
            subject=subject,
            reason="; ".join(look.obstacles),
            remedy="Name another place by folder, datacenter, cluster, esxi_hostname, resource_pool, datastore and"
            " networks",
            details={"obstacles": look.obstacles},
        )
    return placement


def _named(items: Sequence[_Found], name: str) -> List[_Found]:
    return [item for item in items if is_called(str(item[1]["name"]), name)]


def _names(items: Sequence[_Found]) -> str:
    names = sorted({readable(str(values["name"])) for _obj, values in items})
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


class _Look:
    def __init__(self, session: Session, wanted: Wanted) -> None:
        self.session = session
        self.wanted = wanted
        self.obstacles: List[str] = []
        self.folders = {obj._moId: (obj, values) for obj, values in session.find(vim.Folder, ["name", "parent"])}
        self.datacenters = session.find(
            vim.Datacenter, ["name", "parent", "vmFolder", "hostFolder", "datastoreFolder", "networkFolder"]
        )

    def place(self) -> Optional[Placement]:
        datacenter = self._datacenter()
        if datacenter is None:
            return None
        obj, values = datacenter
        folder = self._folder(datacenter)
        datastores = self._datastores(values["datastoreFolder"])
        networks = self._networks(values["networkFolder"])
        compute = self._compute(values["hostFolder"])
        if folder is None or datastores is None or networks is None or compute is None:
            return None
        host = self._host(compute, values["hostFolder"], datastores, networks)
        if host is None:
            return None
        own = [item for item in compute if host[0]._moId in {one._moId for one in item[1]["host"] or ()}]
        pool = self._pool(own, values["hostFolder"])
        if pool is None:
            return None
        path = self._path(datacenter)
        return Placement(
            folder=folder[0],
            folder_path=folder[1],
            datacenter=readable(str(values["name"])),
            datacenter_path=path.lstrip("/"),
            datacenter_moid=obj._moId,
            host=host[0],
            host_name=readable(str(host[1]["name"])),
            pool=pool,
            datastores={name: found[0] for name, found in datastores.items()},
            networks={name: self._backing(found) for name, found in networks.items()},
        )

    def _path(self, item: _Found) -> str:
        """``/DC0/vm/production``; names stay escaped, as the API has them."""
        parts = [str(item[1]["name"])]
        above = item[1]["parent"]
        known = dict(self.folders)
        known.update({obj._moId: (obj, values) for obj, values in self.datacenters})
        while above is not None and above._moId in known:
            _obj, values = known[above._moId]
            above = values["parent"]
            if above is not None:  # the root folder is no part of a path
                parts.append(str(values["name"]))
        return "/" + "/".join(reversed(parts))

    def _datacenter(self) -> Optional[_Found]:
        asked, was = self.wanted.datacenter, self.wanted.was
        if asked is None and self.wanted.folder is not None and self.wanted.folder.startswith("/"):
            inside = [item for item in self.datacenters if self._holds(item, self.wanted.folder)]
            if len(inside) == 1:
                return inside[0]
        name = asked or was.get("datacenter_path") or was.get("datacenter")
        if asked is None and was.get("datacenter_path"):
            # As the API had it, so nothing else fits.
            found = [item for item in self.datacenters if self._path(item) == f"/{name}"]
        else:
            found = [item for item in self.datacenters if name is not None and self._is_datacenter(item, name)]
        if len(found) == 1:
            return found[0]
        if not found and asked is None and len(self.datacenters) == 1:
            return self.datacenters[0]
        problem = "there are several datacenters" if found else "there is no datacenter"
        self.obstacles.append(f"{problem} '{name}' (there is {_names(self.datacenters)}): give datacenter")
        return None

    def _is_datacenter(self, item: _Found, name: str) -> bool:
        return is_called(str(item[1]["name"]), name) or are_called(parts_of(self._path(item)), parts_of(name))

    def _holds(self, datacenter: _Found, path: str) -> bool:
        """Whether a path that somebody gave lies in a datacenter."""
        above = parts_of(self._path(datacenter))
        return are_called(above, parts_of(path)[: len(above)])

    def _folder(self, datacenter: _Found) -> Optional[Tuple[Any, str]]:
        root = self.folders[datacenter[1]["vmFolder"]._moId]
        top = self._path(root)
        paths: Dict[str, Any] = {}
        for item in self.folders.values():
            path = self._path(item)
            if path == top or path.startswith(top + "/"):
                paths[path] = item[0]
        asked, name = self.wanted.folder or None, self.wanted.was.get("folder")
        if asked is None:
            if name not in paths and name is not None and self.wanted.datacenter is not None:
                name = top
            # As the API had it, so nothing else fits.
            found = [path for path in paths if path == name]
        else:
            name, wanted = asked, parts_of(asked)
            found = [
                path
                for path in paths
                if wanted
                and are_called(parts_of(path) if asked.startswith("/") else parts_of(path)[-len(wanted) :], wanted)
            ]
        if len(found) == 1:
            return paths[found[0]], found[0]
        listed = ", ".join(sorted(found or paths)[:12])
        problem = "more than one folder fits" if found else "there is no folder"
        self.obstacles.append(f"{problem} '{name}' ({listed}): give folder")
        return None

    def _datastores(self, root: Any) -> Optional[Dict[str, _Found]]:
        paths = ["name", "summary.accessible", "summary.freeSpace", "summary.maintenanceMode", "host"]
        known = self.session.find(vim.Datastore, paths, root)
        found: Dict[str, _Found] = {}
        before = len(self.obstacles)
        for name in sorted({self.wanted.home, *self.wanted.datastores}):
            fitting = _named(known, name)
            if len(fitting) != 1:
                self.obstacles.append(
                    f"there is no datastore '{name}' (there is {_names(known)}): give datastore, of all or of a disk"
                )
                continue
            found[name] = fitting[0]
            values = fitting[0][1]
            if values["summary.accessible"] is False:
                self.obstacles.append(f"datastore '{name}' is not accessible")
            if (values["summary.maintenanceMode"] or "normal") != "normal":
                self.obstacles.append(f"datastore '{name}' is in maintenance mode")
            needed, free = self.wanted.datastores.get(name, 0), int(values["summary.freeSpace"] or 0)
            if needed >= free:
                self.obstacles.append(f"datastore '{name}' has {free} bytes free, and the disks need {needed}")
        return found if len(self.obstacles) == before else None

    def _networks(self, root: Any) -> Optional[Dict[str, _Found]]:
        if not self.wanted.networks:
            return {}
        known = self.session.find(vim.Network, ["name", "host"], root)
        found: Dict[str, _Found] = {}
        for name in sorted(set(self.wanted.networks)):
            fitting = _named(known, name)
            if len(fitting) == 1:
                found[name] = fitting[0]
                continue
            problem = f"there are {len(fitting)} networks" if fitting else "there is no network"
            self.obstacles.append(f"{problem} '{name}' (there is {_names(known)}): map it to another by networks")
        return found if len(found) == len(set(self.wanted.networks)) else None

    def _backing(self, network: _Found) -> Any:
        """What connects a card to a network."""
        obj, values = network
        card = vim.vm.device.VirtualEthernetCard
        if isinstance(obj, vim.dvs.DistributedVirtualPortgroup):
            group = self.session.read(obj, "key", "config.distributedVirtualSwitch")
            uuid = self.session.read(group["config.distributedVirtualSwitch"], "uuid")["uuid"]
            port = vim.dvs.PortConnection(switchUuid=uuid, portgroupKey=group["key"])
            return card.DistributedVirtualPortBackingInfo(port=port)
        if isinstance(obj, vim.OpaqueNetwork):
            summary = self.session.read(obj, "summary")["summary"]
            return card.OpaqueNetworkBackingInfo(
                opaqueNetworkId=summary.opaqueNetworkId, opaqueNetworkType=summary.opaqueNetworkType
            )
        return card.NetworkBackingInfo(deviceName=str(values["name"]), network=obj)

    def _compute(self, root: Any) -> Optional[List[_Found]]:
        """The clusters, or hosts outside of one, that are possible: one, if a name tells."""
        known = self.session.find(vim.ComputeResource, ["name", "host", "resourcePool"], root)
        if self.wanted.cluster is not None:
            fitting = _named(known, self.wanted.cluster)
            if len(fitting) != 1:
                self.obstacles.append(f"there is no cluster '{self.wanted.cluster}' (there is {_names(known)})")
                return None
            return fitting
        was = self.wanted.was.get("cluster")
        if self.wanted.host is None and was is not None and _named(known, was):
            return _named(known, was)
        if not known:
            self.obstacles.append("the datacenter has no hosts")
            return None
        return known

    def _host(
        self,
        compute: List[_Found],
        root: Any,
        datastores: Mapping[str, _Found],
        networks: Mapping[str, _Found],
    ) -> Optional[_Found]:
        paths = ["name", "runtime.connectionState", "runtime.inMaintenanceMode"]
        possible = {host._moId for _obj, values in compute for host in values["host"] or ()}
        known = [item for item in self.session.find(vim.HostSystem, paths, root) if item[0]._moId in possible]
        asked = self.wanted.host
        if asked is not None:
            known = _named(known, asked)
            if not known:
                self.obstacles.append(f"there is no host '{asked}' in the datacenter or cluster")
                return None
        else:
            was = self.wanted.was.get("host")
            known.sort(key=lambda item: (readable(str(item[1]["name"])) != was, str(item[1]["name"])))
        problems = []
        for item in known:
            problem = self._host_problem(item, datastores, networks)
            if problem is None:
                return item
            problems.append(f"{readable(str(item[1]['name']))} {problem}")
        self.obstacles.append(f"no host can take it: {'; '.join(problems[:12])}" if problems else "there is no host")
        return None

    @staticmethod
    def _host_problem(host: _Found, datastores: Mapping[str, _Found], networks: Mapping[str, _Found]) -> Optional[str]:
        obj, values = host
        if values["runtime.connectionState"] != "connected":
            return f"is {values['runtime.connectionState']}"
        if values["runtime.inMaintenanceMode"]:
            return "is in maintenance mode"
        for name, (_obj, facts) in datastores.items():
            mounts = [mount for mount in facts["host"] or () if mount.key._moId == obj._moId]
            if not mounts or mounts[0].mountInfo.accessible is False or mounts[0].mountInfo.mounted is False:
                return f"does not see datastore '{name}'"
            if mounts[0].mountInfo.accessMode == "readOnly":
                return f"may only read datastore '{name}'"
        for name, (_obj, facts) in networks.items():
            if facts["host"] is not None and obj._moId not in {one._moId for one in facts["host"]}:
                return f"has no network '{name}'"
        return None

    def _pool(self, compute: List[_Found], root: Any) -> Optional[Any]:
        """A pool by its name or by its path from the root pool on; the root pool, if nothing else is known."""
        pools = {
            obj._moId: (obj, values) for obj, values in self.session.find(vim.ResourcePool, ["name", "parent"], root)
        }
        tops = [values["resourcePool"] for _obj, values in compute if values["resourcePool"] is not None]
        paths: Dict[str, Any] = {}
        for obj, values in pools.values():
            names, above, seen = [str(values["name"])], values["parent"], {obj._moId}
            top = obj
            while isinstance(above, vim.ResourcePool) and above._moId in pools and above._moId not in seen:
                seen.add(above._moId)
                top = pools[above._moId][0]
                names.append(str(pools[above._moId][1]["name"]))
                above = pools[above._moId][1]["parent"]
            if top._moId in {one._moId for one in tops}:
                paths["/".join(reversed(names))] = obj
        asked = self.wanted.resource_pool
        if asked is not None:
            wanted = parts_of(asked)
            fitting: Set[str] = {
                path for path in paths if are_called(parts_of(path), wanted) or is_called(parts_of(path)[-1], asked)
            }
            if len(fitting) == 1:
                return paths[fitting.pop()]
            problem = "more than one resource pool fits" if fitting else "there is no resource pool"
            self.obstacles.append(f"{problem} '{asked}' (there is {', '.join(sorted(paths)) or 'none'})")
            return None
        # As the API had it, so nothing else fits.
        was = str(self.wanted.was.get("resource_pool"))
        return paths.get(was) or (tops[0] if tops else None)
