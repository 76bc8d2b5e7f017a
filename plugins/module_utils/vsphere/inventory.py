# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Finding one virtual machine, and never the wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..errors import AmbiguousError, NotFoundError, VsphereError
from ..libraries import vim, vmodl
from .session import Session, filter_spec

_VM_PATHS = (
    "name",
    "parent",
    "parentVApp",
    "config.uuid",
    "config.instanceUuid",
    "config.template",
    "config.ftInfo",
    "runtime.connectionState",
)


@dataclass
class VmRef:
    """A virtual machine that was found.

    ``path`` is its place in the inventory (``/DC0/vm/production/app01``), ``datacenter`` the datacenter's name and
    ``datacenter_path`` its path without the leading slash, which ``/folder`` wants as ``dcPath``. ``configured`` says
    whether the server shows its configuration, ``connection`` how the server stands to it.
    """

    obj: Any
    moid: str
    name: str
    path: str
    datacenter: str
    instance_uuid: str
    bios_uuid: str
    datacenter_path: str = ""
    template: bool = False
    datacenter_moid: str = ""
    configured: bool = True
    connection: str = "connected"

    def __str__(self) -> str:
        return f"VM '{self.name}' ({self.moid})"


def readable(name: str) -> str:
    """A name as the vSphere client shows it: the API escapes slash, backslash and percent sign."""
    for escaped, plain in (("%2f", "/"), ("%2F", "/"), ("%5c", "\\"), ("%5C", "\\"), ("%25", "%")):
        name = name.replace(escaped, plain)
    return name


def is_called(name: str, wanted: str) -> bool:
    """Whether a name of the API is the one that is asked for, as the vSphere client shows it or as the API has it."""
    return readable(name) in (wanted, readable(wanted))


def parts_of(path: str) -> List[str]:
    """The names in an inventory path. Those that hold a slash are escaped in it, so none is cut."""
    return [part for part in path.split("/") if part]


def are_called(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """As :func:`is_called`, of each name of a path."""
    return len(names) == len(wanted) and all(map(is_called, names, wanted))


def vm_selection(params: Dict[str, Any]) -> Dict[str, Any]:
    """The keyword arguments of :func:`find_vm` out of ``module.params`` (doc fragment ``vm``)."""
    return {key: params[key] for key in ("name", "uuid", "use_instance_uuid", "moid", "folder", "datacenter")}


def find_vm(
    session: Session,
    *,
    name: Optional[str] = None,
    uuid: Optional[str] = None,
    use_instance_uuid: bool = False,
    moid: Optional[str] = None,
    folder: Optional[str] = None,
    datacenter: Optional[str] = None,
) -> VmRef:
    """The one virtual machine that fits; exactly one of *name*, *uuid* and *moid* is given.

    Secondaries of fault tolerance are not virtual machines of their own and never found (VADP facts 13). Templates
    are, with ``template`` set.

    :raises NotFoundError: none fits; :raises AmbiguousError: several do, with path and moid of each.
    """
    if moid is not None:
        wanted = f"moid '{moid}'"
        candidates = [vim.VirtualMachine(moid, session.stub)]
    elif uuid is not None:
        wanted = f"{'instance' if use_instance_uuid else 'BIOS'} UUID '{uuid}'"
        candidates = list(
            session.call(
                session.content.searchIndex.FindAllByUuid,
                None,
                uuid,
                True,
                use_instance_uuid,
                what="The virtual machine was not looked up",
                subject=wanted,
                idempotent=True,
            )
            or []
        )
    else:
        wanted = f"name '{name}'"
        candidates = _named(session, name or "")
    try:
        found = _describe(session, candidates)
    except VsphereError as error:
        if moid is None or not isinstance(error.fault, vmodl.fault.ManagedObjectNotFound):
            raise
        found = []
    fitting = [vm for vm in found if _is_in(vm, folder, datacenter)]
    if len(fitting) == 1:
        vm = fitting[0]
        _require_identity(vm)
        return vm
    if fitting:
        places = [f"{vm.path} ({vm.moid})" for vm in fitting]
        raise AmbiguousError(
            "More than one virtual machine fits",
            subject=wanted,
            reason=", ".join(places),
            remedy="Name the one that is meant by moid, by instance UUID, or narrow the name by folder or datacenter",
            details={"matches": [{"path": vm.path, "moid": vm.moid} for vm in fitting]},
        )
    limits = [f"{key} '{value}'" for key, value in (("folder", folder), ("datacenter", datacenter)) if value]
    elsewhere = ", ".join(f"{vm.path} ({vm.moid})" for vm in found)
    raise NotFoundError(
        "There is no such virtual machine",
        subject=" in ".join([wanted] + limits),
        reason=f"there is one elsewhere: {elsewhere}"
        if elsewhere
        else "no virtual machine that this user may see fits",
        remedy="Correct folder or datacenter, or leave them out"
        if elsewhere
        else "Check the spelling, and that the user may see it (privilege System.View)",
    )


def _require_identity(vm: VmRef) -> None:
    if not vm.configured:
        raise VsphereError(
            "The virtual machine's configuration is not available",
            subject=str(vm),
            reason=f"vCenter has lost touch with its files or its host: it is {vm.connection}",
            remedy="Look at the virtual machine and its host in the vSphere client",
            retryable=True,
        )
    if not vm.instance_uuid:
        raise VsphereError(
            "The virtual machine has no instance UUID, by which a repository would know it",
            subject=str(vm),
            reason="the server shows its configuration, and config.instanceUuid in it is empty",
            remedy="Give it one while it is off (reconfigure instanceUuid, or set vc.uuid in the advanced settings), or"
            " unregister it and register it again, and vCenter gives it one",
        )


def require_only_one(session: Session, vm: VmRef) -> None:
    """:raises AmbiguousError: another virtual machine of this server has the same instance UUID. Backups know one by
    that alone."""
    wanted = f"instance UUID '{vm.instance_uuid}'"
    candidates = session.call(
        session.content.searchIndex.FindAllByUuid,
        None,
        vm.instance_uuid,
        True,
        True,
        what="The virtual machine was not looked up",
        subject=wanted,
        idempotent=True,
    )
    others = [one for one in candidates or () if one._moId != vm.moid]
    found = _describe(session, others)
    if found:
        listed = "; ".join(f"{one.path} ({one.moid})" for one in [vm, *found])
        raise AmbiguousError(
            "Two virtual machines have one instance UUID, and would share a folder of the repository",
            subject=wanted,
            reason=listed,
            remedy="Give one of them an instance UUID of its own (edit vc.uuid while it is off, or let vCenter do it),"
            " or unregister the one that is not used",
        )


def _named(session: Session, name: str) -> List[Any]:
    """Objects of all virtual machines of a name: one traversal, which reads nothing but names."""
    collector = vmodl.query.PropertyCollector

    def step(kind: Any, path: str, *following: str) -> Any:
        return collector.TraversalSpec(
            name=f"{kind.__name__}.{path}",
            type=kind,
            path=path,
            skip=False,
            selectSet=[collector.SelectionSpec(name=item) for item in following],
        )

    children = f"{vim.Folder.__name__}.childEntity"
    below = (
        children,
        f"{vim.Datacenter.__name__}.vmFolder",
        f"{vim.ResourcePool.__name__}.vm",
        f"{vim.ResourcePool.__name__}.resourcePool",
    )
    traversals = [
        step(vim.Folder, "childEntity", *below),
        step(vim.Datacenter, "vmFolder", children),
        # A folder holds none of them but vApps, which are pools, and hold pools and vApps.
        step(vim.ResourcePool, "vm"),
        step(vim.ResourcePool, "resourcePool", *below[2:]),
    ]
    spec = filter_spec([session.content.rootFolder], {vim.VirtualMachine: ["name"]}, traversals)
    named: Dict[str, Any] = {}
    for content in session.retrieve([spec]):
        for prop in content.propSet:
            if prop.name == "name" and name in (prop.val, readable(prop.val)):
                named[content.obj._moId] = content.obj
    return list(named.values())


def _describe(session: Session, candidates: Sequence[Any]) -> List[VmRef]:
    """What :class:`VmRef` says about each: one call for all of them and their ancestors."""
    if not candidates:
        return []
    collector = vmodl.query.PropertyCollector
    upwards = [
        (vim.VirtualMachine, "parent"),
        (vim.VirtualMachine, "parentVApp"),
        (vim.VirtualApp, "parentFolder"),
        (vim.VirtualApp, "parentVApp"),
        (vim.Folder, "parent"),
        (vim.Datacenter, "parent"),
    ]
    names = [f"{kind.__name__}.{path}" for kind, path in upwards]
    traversals = [
        collector.TraversalSpec(
            name=own_name,
            type=kind,
            path=path,
            skip=False,
            selectSet=[collector.SelectionSpec(name=item) for item in names[2:]],
        )
        for own_name, (kind, path) in zip(names, upwards)
    ]
    properties = {
        vim.VirtualMachine: _VM_PATHS,
        vim.Folder: ["name", "parent"],
        vim.Datacenter: ["name", "parent"],
        vim.VirtualApp: ["name", "parentFolder", "parentVApp"],
    }
    known: Dict[str, Tuple[Any, Dict[str, Any]]] = {}
    for content in session.retrieve([filter_spec(candidates, properties, traversals)]):
        known[content.obj._moId] = (content.obj, {prop.name: prop.val for prop in content.propSet})
    return [
        _reference(obj, props, known)
        for obj, props in (known[candidate._moId] for candidate in candidates if candidate._moId in known)
        if not _is_secondary(props)
    ]


def _is_secondary(props: Dict[str, Any]) -> bool:
    fault_tolerance = props.get("config.ftInfo")
    return fault_tolerance is not None and fault_tolerance.role != 1


def _reference(obj: Any, props: Dict[str, Any], known: Dict[str, Tuple[Any, Dict[str, Any]]]) -> VmRef:
    parts = [props.get("name") or obj._moId]
    datacenter_depth = 0
    datacenter = datacenter_moid = ""
    upper = props.get("parent") or props.get("parentVApp")
    while upper is not None and upper._moId in known:
        above, above_props = known[upper._moId]
        upper = above_props.get("parent") or above_props.get("parentFolder") or above_props.get("parentVApp")
        if upper is None and isinstance(above, vim.Folder):
            break  # the root folder is not a part of a path
        parts.append(above_props.get("name") or above._moId)
        if isinstance(above, vim.Datacenter):
            datacenter = parts[-1]
            datacenter_moid = above._moId
            datacenter_depth = len(parts)
    return VmRef(
        obj=obj,
        moid=obj._moId,
        name=readable(parts[0]),
        path="/" + "/".join(reversed(parts)),
        datacenter=readable(datacenter),
        instance_uuid=props.get("config.instanceUuid") or "",
        bios_uuid=props.get("config.uuid") or "",
        datacenter_path="/".join(reversed(parts[datacenter_depth - 1 :])) if datacenter else "",
        template=bool(props.get("config.template")),
        datacenter_moid=datacenter_moid,
        configured="config.template" in props,
        connection=str(props.get("runtime.connectionState") or "unknown"),
    )


def _is_in(vm: VmRef, folder: Optional[str], datacenter: Optional[str]) -> bool:
    if datacenter and datacenter not in (vm.datacenter, vm.datacenter_path, "/" + vm.datacenter_path):
        return False
    if folder:
        wanted, place = parts_of(folder), parts_of(vm.path)[:-1]
        return are_called(place if folder.startswith("/") else place[-len(wanted) :], wanted)
    return True
