# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the planner must know, of vCenter and of this machine: only what the listed transports need, in few calls."""

from __future__ import annotations

import shutil
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from ..datapath.processes import run_tool
from ..errors import DataPathError, VsphereError
from ..libraries import vim, vmodl
from ..vsphere import faults
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef, readable
from ..vsphere.session import Session, filter_spec
from ..vsphere.snapshots import snapshots_of
from .guard import problems as device_problems
from .hotadd_plan import read_pvscsi_units
from .planner import (
    BY_IMPORT,
    BY_LEASE,
    BY_VDDK,
    RESERVING,
    READ,
    DatastoreFacts,
    DiskFacts,
    HostFacts,
    ProxyFacts,
    ProxyVm,
    VmFacts,
)
from .proxy import ProxyIdentity
from .san import visible_luns
from .scsi_units import can_add_controller, free_units
from .vddk import look_for_library, named_library_error

VDDK_TRANSPORTS = ("san", "hotadd", "nbdssl", "nbd")
_PROBE_TIMEOUT = 60

_VM_PATHS = ("runtime.powerState", "runtime.host", "config.template", "config.keyId", "snapshot")
_DATASTORE_PATHS = ("name", "summary.type", "summary.multipleHostAccess", "info", "host")
_HOST_PATHS = ("name", "runtime.connectionState", "runtime.inMaintenanceMode")
_PROXY_PATHS = (
    "runtime.host",
    "config.keyId",
    "config.flags",
    "config.extraConfig",
    "config.hardware.device",
    "config.version",
    "environmentBrowser",
)

# VADP facts 48, as far as they are asked for on the virtual machine itself or on the proxy. Of what is granted on
# datastores and at vCenter's level the operation itself tells.
_READING = ("VirtualMachine.Provisioning.DiskRandomRead", "VirtualMachine.Provisioning.GetVmFiles")
_WRITING = ("VirtualMachine.Provisioning.DiskRandomAccess", *_READING)
# While VDDK attaches a disk, its UUID is reserved in an advanced parameter of the proxy.
_RESERVING = ("VirtualMachine.Config.AdvancedConfig",)
_ATTACHING = ("VirtualMachine.Config.AddExistingDisk", "VirtualMachine.Config.RemoveDisk")
_EXPORTING = ("VApp.Export",)
_IMPORTING = ("VApp.Import",)


# The disks and where they lie


def disk_facts(session: Session, vm: VmRef, disks: Sequence[Disk]) -> Dict[int, DiskFacts]:
    """What the planner must know of disks of one VM, by device key: two calls.

    :param disks: of the snapshot's configuration, or of the VM's.
    """
    values, found = _vm_and_datastores(session, vm)
    stores = _datastores(session, found)
    machine = VmFacts(
        moid=vm.moid,
        name=vm.name,
        power_state=str(values.get("runtime.powerState")),
        template=bool(values.get("config.template")),
        encrypted=values.get("config.keyId") is not None,
        snapshots=len(snapshots_of(values.get("snapshot"))),
        datacenter_moid=vm.datacenter_moid,
        host_moid=_moid(values.get("runtime.host")),
    )
    return {
        disk.key: DiskFacts(
            label=disk.label,
            file=disk.file,
            capacity_bytes=disk.capacity_bytes,
            controller=_controller(disk),
            thin=disk.thin,
            encrypted=disk.encrypted,
            chained=disk.chained,
            linked=disk.linked,
            datastore=stores.get(disk.datastore),
            vm=machine,
        )
        for disk in disks
    }


def datastore_facts(session: Session, datastores: Sequence[Any]) -> Dict[str, DatastoreFacts]:
    """By name, of datastores that a disk is going to be made on: two calls."""
    found = session.read_many(datastores, vim.Datastore, _DATASTORE_PATHS)
    return _datastores(session, [(obj, found[obj._moId]) for obj in datastores])


def _moid(obj: Any) -> Optional[str]:
    return None if obj is None else str(obj._moId)


def _controller(disk: Disk) -> str:
    kind = str(disk.controller.get("type", ""))
    return kind if kind in ("ide", "sata", "nvme") else "scsi"


def _values(content: Any) -> Dict[str, Any]:
    return {prop.name: prop.val for prop in content.propSet}


def _vm_and_datastores(session: Session, vm: VmRef) -> Tuple[Dict[str, Any], List[Tuple[Any, Dict[str, Any]]]]:
    """The VM's properties, and the datastores that it has files on."""
    step = vmodl.query.PropertyCollector.TraversalSpec(type=vim.VirtualMachine, path="datastore", skip=False)
    spec = filter_spec([vm.obj], {vim.VirtualMachine: _VM_PATHS, vim.Datastore: _DATASTORE_PATHS}, [step])
    contents = session.retrieve([spec])
    own = next((_values(content) for content in contents if content.obj._moId == vm.moid), {})
    return own, [(content.obj, _values(content)) for content in contents if content.obj._moId != vm.moid]


def _datastores(session: Session, found: Sequence[Tuple[Any, Dict[str, Any]]]) -> Dict[str, DatastoreFacts]:
    """By the name that stands in datastore paths."""
    hosts: Dict[str, Any] = {}
    for _obj, values in found:
        hosts.update({mount.key._moId: mount.key for mount in _mounts(values)})
    known = _hosts(session, list(hosts.values()))
    facts = {}
    for obj, values in found:
        info = values.get("info")
        volume = getattr(info, "vmfs", None)
        mounted = tuple(known[mount.key._moId] for mount in _mounts(values) if mount.key._moId in known)
        local = getattr(volume, "local", None)
        name = readable(str(values.get("name") or ""))
        facts[name] = DatastoreFacts(
            moid=obj._moId,
            name=name,
            kind=str(values.get("summary.type") or ""),
            extents=tuple(extent.diskName for extent in getattr(volume, "extent", None) or ()),
            local=bool(local) if local is not None else values.get("summary.multipleHostAccess") is False,
            vmfs_major=getattr(volume, "majorVersion", None),
            hosts=mounted,
        )
    return facts


def _mounts(values: Mapping[str, Any]) -> List[Any]:
    """Mounts that work; a server that does not say so means that they do."""
    return [
        mount
        for mount in values.get("host") or ()
        if mount.mountInfo.accessible is not False and mount.mountInfo.mounted is not False
    ]


def _hosts(session: Session, hosts: Sequence[Any]) -> Dict[str, HostFacts]:
    found = session.read_many(hosts, vim.HostSystem, _HOST_PATHS)
    return {
        moid: HostFacts(
            moid,
            readable(str(values["name"] or moid)),
            values["runtime.connectionState"] == "connected" and not values["runtime.inMaintenanceMode"],
        )
        for moid, values in found.items()
    }


# This machine


def proxy_facts(
    session: Session,
    request: Any,
    vm: VmRef,
    disks: Mapping[int, DiskFacts],
    direction: str = READ,
    pool: Any = None,
    needs_named_library: bool = True,
) -> ProxyFacts:
    """What the planner must know of this machine and of the user.

    :param request: has the options of doc fragment ``transport`` as attributes.
    :param disks: of :func:`disk_facts`; only their LUNs are looked at closely.
    :param pool: the resource pool that a new machine goes into.
    :param needs_named_library: whether a VDDK that is named must be there. Without one, disks are read whole by
        slower ways: nobody who names one means that.
    :raises AmbiguousError: which VM this machine is can't be determined; only where hotadd is listed.
    :raises TransportError: the VDDK that is named can't be used.
    """
    transports = request.transports
    vddk, problem = None, None
    if any(name in transports for name in VDDK_TRANSPORTS):
        vddk, problem = look_for_library(request.vddk_libdir)
        if vddk is None and request.vddk_libdir and needs_named_library:
            raise named_library_error(request.vddk_libdir, problem)
    luns = visible_luns(request.device_dir) if "san" in transports else {}
    machine, identity = None, ""
    if "hotadd" in transports:
        found, identity = ProxyIdentity.find(
            session,
            name=request.proxy_name,
            uuid=request.proxy_uuid,
            moid=request.proxy_moid,
            physical=request.proxy_physical,
            sysfs_dir=request.sysfs_dir,
        )
        machine = None if found is None else _proxy_vm(session, found)
    return ProxyFacts(
        vddk=vddk,
        vddk_problem=problem,
        is_vcenter=session.is_vcenter,
        server_version=session.about.version or None,
        vm=machine,
        identity=identity,
        luns=luns,
        lun_problems=_lun_problems(disks.values(), luns, request.sysfs_dir),
        plugins=_plugins(transports, vddk is not None),
        missing_privileges=_missing_privileges(session, vm, machine, transports, direction, pool),
    )


def _lun_problems(disks: Iterable[DiskFacts], luns: Mapping[str, str], sysfs_dir: str) -> Dict[str, str]:
    """Why nobody should go near a LUN, of those that the disks lie on."""
    extents: Set[str] = set()
    for disk in disks:
        if disk.datastore is not None and disk.datastore.kind == "VMFS" and not disk.datastore.local:
            extents.update(disk.datastore.extents)
    found = {}
    for extent in sorted(extents & set(luns)):
        reasons = device_problems(luns[extent], lun=True, sysfs_dir=sysfs_dir)
        if reasons:
            found[extent] = "; ".join(reasons)
    return found


def _plugins(transports: Sequence[str], has_vddk: bool) -> FrozenSet[str]:
    """The plugins of nbdkit that are here, of those that the transports may use."""
    wanted = [plugin for name, plugin in (("hotadd", "file"), ("https", "curl")) if name in transports]
    found = {"vddk"} if has_vddk else set()
    if shutil.which("nbdkit") is not None:
        found.update(plugin for plugin in wanted if _has_plugin(plugin))
    return frozenset(found)


def _has_plugin(name: str) -> bool:
    try:
        run_tool(["nbdkit", name, "--dump-plugin"], what=f"Asking nbdkit's {name} plugin", timeout=_PROBE_TIMEOUT)
    except DataPathError:
        return False
    return True


def _proxy_vm(session: Session, vm: VmRef) -> ProxyVm:
    """This machine's virtual hardware and what its host sees: one call, and one more if all units seem to be taken."""
    step = vmodl.query.PropertyCollector.TraversalSpec(type=vim.VirtualMachine, path="runtime.host", skip=False)
    spec = filter_spec([vm.obj], {vim.VirtualMachine: _PROXY_PATHS, vim.HostSystem: ["datastore"]}, [step])
    found = {content.obj._moId: _values(content) for content in session.retrieve([spec])}
    own = found.get(vm.moid, {})
    host_moid = _moid(own.get("runtime.host"))
    seen = found.get(host_moid or "", {}).get("datastore") or ()
    devices = list(own.get("config.hardware.device") or ())
    free, extensible = free_units(devices), can_add_controller(devices)
    browser = own.get("environmentBrowser")
    if not free and not extensible and browser is not None:
        free = free_units(devices, read_pvscsi_units(session, vm, browser, own.get("config.version")))
    return ProxyVm(
        moid=vm.moid,
        name=vm.name,
        datacenter_moid=vm.datacenter_moid,
        host_moid=host_moid,
        datastores=frozenset(datastore._moId for datastore in seen),
        encrypted=own.get("config.keyId") is not None,
        enable_uuid=_shows_uuids(own),
        free_units=free,
        can_add_controller=extensible,
        ref=vm,
    )


def _shows_uuids(values: Mapping[str, Any]) -> bool:
    flags = values.get("config.flags")
    if getattr(flags, "diskUuidEnabled", None):
        return True
    for option in values.get("config.extraConfig") or ():
        if option.key.lower() == "disk.enableuuid":
            return str(option.value).lower() in ("true", "1")
    return False


def _missing_privileges(
    session: Session,
    vm: VmRef,
    machine: Optional[ProxyVm],
    transports: Sequence[str],
    direction: str,
    pool: Any = None,
) -> Dict[str, Tuple[str, ...]]:
    """What the user lacks, by transport or method: one call. Nothing where the server does not say."""
    using_vddk = _READING if direction == READ else _WRITING
    on_vm: Dict[str, Tuple[str, ...]] = {}
    if any(name in transports for name in VDDK_TRANSPORTS):
        on_vm[BY_VDDK] = using_vddk
    if "https" in transports and direction == READ:
        on_vm[BY_LEASE] = _EXPORTING
    on_proxy = {"hotadd": _ATTACHING, RESERVING: _RESERVING} if machine is not None else {}
    on_pool = {BY_IMPORT: _IMPORTING} if "https" in transports and pool is not None else {}
    if session.key is None or not (on_vm or on_proxy or on_pool):
        return {}
    entities = [vm.obj]
    if machine is not None and machine.moid != vm.moid:
        entities.append(vim.VirtualMachine(machine.moid, session.stub))
    if on_pool:
        entities.append(pool)
    asked = ((vm.moid, on_vm), ("" if machine is None else machine.moid, on_proxy), (faults.moid_of(pool), on_pool))
    wanted = sorted({name for _moid_, groups in asked for names in groups.values() for name in names})
    try:
        answer = session.call(
            session.content.authorizationManager.HasPrivilegeOnEntities,
            entities,
            session.key,
            wanted,
            what="The user's privileges were not read",
            subject=str(vm),
            idempotent=True,
        )
    except VsphereError:
        # It is asked to say beforehand what would fail; without an answer it fails when it is done.
        return {}
    lacking = {
        item.entity._moId: {one.privId for one in item.privAvailability if not one.isGranted} for item in answer or ()
    }
    missing: Dict[str, Tuple[str, ...]] = {}
    for moid, groups in asked:
        for name, privileges in groups.items():
            absent = tuple(sorted(lacking.get(moid, set()) & set(privileges)))
            if absent:
                missing[name] = absent
    return missing
