# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a new virtual machine goes: folder or vApp, host, resource pool, datastores, networks, all by name.

What is not asked for is as it was, if that is still there. Nothing is changed; all that is missing is reported at once.
A machine of a vApp lies in no folder, and a vApp is a resource pool too: so both options may name it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from ..errors import VsphereError
from ..libraries import vim
from .inventory import are_called, is_called, parts_of, readable
from .session import Session

_Found = Tuple[Any, Dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """What is asked for, and what was: the second of each pair is used where the first is None.

    :param home: datastore of the machine's own files.
    :param datastores: bytes that each datastore must have room for, by name.
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

    :param folder: the folder or the vApp that it lies in.
    :param in_vapp: it is a vApp, which is the pool as well.
    :param datastores: name -> object.
    :param networks: name -> backing of a network card.
    :param warnings: what is not as it was, although nothing else was asked for.
    """

    folder: Any
    folder_path: str
    in_vapp: bool
    datacenter: str
    datacenter_path: str
    datacenter_moid: str
    host: Any
    host_name: str
    pool: Any
    datastores: Dict[str, Any]
    networks: Dict[str, Any]
    warnings: List[str]


@dataclass(frozen=True)
class _Spot:
    """A folder of machines, or a vApp."""

    obj: Any
    path: str

    @property
    def is_vapp(self) -> bool:
        return isinstance(self.obj, vim.VirtualApp)


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


def _fitting(paths: Mapping[str, Any], asked: Optional[str], was: str) -> Dict[str, Any]:
    """Those of the paths that somebody asked for, by a whole path or the end of one; else the one that it was."""
    if asked is None:
        # As the API had it, so nothing else fits.
        return {path: obj for path, obj in paths.items() if path == was}
    wanted = parts_of(asked)
    start = 0 if asked.startswith("/") else -len(wanted)
    return {path: obj for path, obj in paths.items() if wanted and are_called(parts_of(path)[start:], wanted)}


class _Look:
    def __init__(self, session: Session, wanted: Wanted) -> None:
        self.session = session
        self.wanted = wanted
        self.obstacles: List[str] = []
        self.warnings: List[str] = []
        self.folders = {obj._moId: (obj, values) for obj, values in session.find(vim.Folder, ["name", "parent"])}
        self.datacenters = session.find(
            vim.Datacenter, ["name", "parent", "vmFolder", "hostFolder", "datastoreFolder", "networkFolder"]
        )
        self.pools: Dict[str, _Found] = {}

    @cached_property
    def vapps(self) -> Dict[str, _Found]:
        """All vApps; ``parent`` is the vApp or folder above, as for everything that lies in folders."""
        found = self.session.find(vim.VirtualApp, ["name", "parentFolder", "parentVApp"])
        return {
            obj._moId: (obj, {**values, "parent": values["parentVApp"] or values["parentFolder"]})
            for obj, values in found
        }

    def place(self) -> Optional[Placement]:
        datacenter = self._datacenter()
        if datacenter is None:
            return None
        obj, values = datacenter
        spot = self._folder(datacenter)
        datastores = self._datastores(values["datastoreFolder"])
        networks = self._networks(values["networkFolder"])
        compute = self._compute(values["hostFolder"])
        if spot is None or datastores is None or networks is None or compute is None:
            return None
        host = self._host(compute, values["hostFolder"], datastores, networks)
        if host is None:
            return None
        own = [item for item in compute if host[0]._moId in {one._moId for one in item[1]["host"] or ()}]
        pool = self._pool(own, values["hostFolder"])
        if pool is None:
            return None
        fitted = self._fit(spot, pool, own)
        if fitted is None:
            return None
        spot, pool = fitted
        path = self._path(datacenter)
        return Placement(
            folder=spot.obj,
            folder_path=spot.path,
            in_vapp=spot.is_vapp,
            datacenter=readable(str(values["name"])),
            datacenter_path=path.lstrip("/"),
            datacenter_moid=obj._moId,
            host=host[0],
            host_name=readable(str(host[1]["name"])),
            pool=pool,
            datastores={name: found[0] for name, found in datastores.items()},
            networks={name: self._backing(found) for name, found in networks.items()},
            warnings=self.warnings,
        )

    def _path(self, item: _Found) -> str:
        """``/DC0/vm/production``; names stay escaped, as the API has them."""
        parts = [str(item[1]["name"])]
        above = item[1]["parent"]
        known = dict(self.folders)
        if isinstance(item[0], vim.VirtualApp):
            known.update(self.vapps)
        known.update({obj._moId: (obj, values) for obj, values in self.datacenters})
        while above is not None and above._moId in known:
            _obj, values = known[above._moId]
            above = values["parent"]
            if above is not None:  # the root folder is not a part of a path
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

    def _folder(self, datacenter: _Found) -> Optional[_Spot]:
        root = self.folders[datacenter[1]["vmFolder"]._moId]
        folders = self._below(root, self.folders.values())
        asked, was = self.wanted.folder or None, str(self.wanted.was.get("folder") or "")
        found = _fitting(folders, asked, was)
        if not found:
            found = _fitting(self._below(root, self.vapps.values()), asked, was)
        if not found and asked is None and self.wanted.datacenter is not None:
            found = {self._path(root): root[0]}
        if not found and asked is None and self._was_in_vapp():
            above = was.split("/")
            while above and "/".join(above) not in folders:
                above.pop()
            if above:
                path = "/".join(above)
                found = {path: folders[path]}
                self.warnings.append(f"It lay in a vApp that is not there, '{was}', and goes into the folder '{path}'")
        if len(found) == 1:
            path, obj = found.popitem()
            return _Spot(obj, path)
        listed = ", ".join(sorted(found or folders)[:12])
        problem = "more than one folder fits" if found else "there is no folder"
        self.obstacles.append(f"{problem} '{asked or was}' ({listed}): give folder")
        return None

    def _below(self, root: _Found, items: Iterable[_Found]) -> Dict[str, Any]:
        """Path -> object of what lies at or below a folder."""
        top = self._path(root)
        paths = {self._path(item): item[0] for item in items}
        return {path: obj for path, obj in paths.items() if path == top or path.startswith(top + "/")}

    def _was_in_vapp(self) -> bool:
        """As far as the paths show: a vApp is the last part of both."""
        folder, pool = (str(self.wanted.was.get(key) or "").rpartition("/")[2] for key in ("folder", "resource_pool"))
        return bool(folder) and folder == pool

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
        self.pools = {
            obj._moId: (obj, values) for obj, values in self.session.find(vim.ResourcePool, ["name", "parent"], root)
        }
        tops = [values["resourcePool"] for _obj, values in compute if values["resourcePool"] is not None]
        paths: Dict[str, Any] = {}
        for obj, _values in self.pools.values():
            chain = self._chain(obj)
            if chain[-1]._moId in {one._moId for one in tops}:
                names = [str(self.pools[one._moId][1]["name"]) for one in chain]
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
        found = paths.get(str(self.wanted.was.get("resource_pool"))) or (tops[0] if tops else None)
        if found is None:
            self.obstacles.append("the host has no resource pool that this user can see: give resource_pool")
        return found

    def _chain(self, pool: Any) -> List[Any]:
        """A pool and those above it."""
        chain, seen = [pool], {pool._moId}
        while True:
            above = self.pools[chain[-1]._moId][1]["parent"] if chain[-1]._moId in self.pools else None
            if not isinstance(above, vim.ResourcePool) or above._moId not in self.pools or above._moId in seen:
                return chain
            seen.add(above._moId)
            chain.append(self.pools[above._moId][0])

    def _fit(self, spot: _Spot, pool: Any, compute: List[_Found]) -> Optional[Tuple[_Spot, Any]]:
        """Folder and pool that go together. What was asked for counts; a contradiction is an obstacle."""
        asked_folder, asked_pool = self.wanted.folder is not None, self.wanted.resource_pool is not None
        vapp = next((one for one in self._chain(pool) if isinstance(one, vim.VirtualApp)), None)
        if asked_folder and asked_pool and spot.obj._moId != (vapp._moId if vapp is not None else spot.obj._moId):
            self.obstacles.append(
                f"resource pool '{self.wanted.resource_pool}' belongs to a vApp, and what lies there lies in no other"
                " folder: leave out folder or resource_pool"
            )
            return None
        if asked_folder and asked_pool and spot.is_vapp and vapp is None:
            self.obstacles.append(
                f"'{spot.path}' is a vApp, and resource pool '{self.wanted.resource_pool}' is outside of it: leave out"
                " folder or resource_pool"
            )
            return None
        if asked_pool and vapp is not None:
            return self._inside(vapp, pool)
        if not spot.is_vapp:
            if vapp is not None:
                self._warn_outside(self._path(self.vapps[vapp._moId]), spot.path)
            return spot, self._outside(pool)
        if not asked_pool and spot.obj._moId in self.pools and self._is_on(spot.obj, compute):
            return self._inside(spot.obj, pool)
        if asked_folder:
            self.obstacles.append(f"the vApp '{spot.path}' is not on that host or cluster: name another by folder")
            return None
        beside = self._beside(spot)
        return (beside, self._outside(pool)) if beside is not None else None

    def _is_on(self, pool: Any, compute: List[_Found]) -> bool:
        tops = {values["resourcePool"]._moId for _obj, values in compute if values["resourcePool"] is not None}
        return self._chain(pool)[-1]._moId in tops

    def _inside(self, vapp: Any, pool: Any) -> Tuple[_Spot, Any]:
        spot = _Spot(vapp, self._path(self.vapps[vapp._moId]))
        if pool._moId != vapp._moId and vapp._moId in {one._moId for one in self._chain(pool)}:
            name = readable(str(self.pools[pool._moId][1]["name"]))
            self.warnings.append(f"It goes into the vApp '{spot.path}' itself: its pool '{name}' takes no new machine")
        return spot, vapp

    def _outside(self, pool: Any) -> Any:
        """The nearest pool at or above *pool* that is not a part of a vApp."""
        chain = self._chain(pool)
        inside = [number for number, one in enumerate(chain) if isinstance(one, vim.VirtualApp)]
        return chain[inside[-1] + 1] if inside else pool

    def _warn_outside(self, vapp: str, folder: str) -> None:
        self.warnings.append(f"It lay in the vApp '{vapp}', and goes into the folder '{folder}', outside of it")

    def _beside(self, spot: _Spot) -> Optional[_Spot]:
        """The folder that a vApp lies in, directly or within others."""
        above: Any = spot.obj
        while above is not None and above._moId in self.vapps:
            above = self.vapps[above._moId][1]["parent"]
        if above is None or above._moId not in self.folders:
            self.obstacles.append(
                f"the vApp '{spot.path}' can't be used there, and its folder is not seen: give folder"
            )
            return None
        path = self._path(self.folders[above._moId])
        self._warn_outside(spot.path, path)
        return _Spot(above, path)
