# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The inventory: folders, datacenters, clusters, hosts, datastores, networks, VMs, and their properties."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyVmomi import VmomiSupport, vim, vmodl

from . import networking, soap, storage, vmspec
from .model import Entity, Kept, SimulatorError, clone, from_json

if TYPE_CHECKING:
    from .simulator import Simulator

GIB = 1 << 30
_DELTA_NUMBER = re.compile(r"-\d{6}$")


def datastore_of(path: str) -> str:
    """``[vmfs01] app01/app01.vmdk`` -> ``vmfs01``."""
    match = re.match(r"\[([^\]]+)\]", path)
    if not match:
        raise vim.fault.InvalidDatastorePath(datastorePath=path)
    return match.group(1)


def folder_of(path: str) -> str:
    """``[vmfs01] app01/app01.vmdk`` -> ``[vmfs01] app01``."""
    return path.rsplit("/", 1)[0] if "/" in path else path.split("]")[0] + "]"


def stem_of(path: str) -> str:
    """A disk's path without extension and delta number: what the next delta's name is made of."""
    return _DELTA_NUMBER.sub("", path[: -len(".vmdk")] if path.endswith(".vmdk") else path)


class Folder(Entity):
    type = vim.Folder

    def p_childEntity(self) -> Any:
        # A machine of a vApp lies in no folder; its vApp does.
        found = [one for one in self.children() if getattr(one, "vapp", None) is None]
        found += [one for one in self.simulator.inventory.all(VirtualApp) if one.folder == self.moid]
        return soap.array(vim.ManagedEntity, [one.ref for one in found])

    def p_childType(self) -> Any:
        return soap.array(str, self.props["childType"])


class Datacenter(Entity):
    type = vim.Datacenter

    def _folder(self, child_type: str) -> Any:
        for child in self.children():
            if child_type in child.props["childType"]:
                return child.ref
        return None

    def p_vmFolder(self) -> Any:
        return self._folder("VirtualMachine")

    def p_hostFolder(self) -> Any:
        return self._folder("ComputeResource")

    def p_datastoreFolder(self) -> Any:
        return self._folder("Datastore")

    def p_networkFolder(self) -> Any:
        return self._folder("Network")

    def p_datastore(self) -> Any:
        return soap.array(vim.Datastore, [one.ref for one in self.simulator.inventory.all(Datastore, self)])

    def p_network(self) -> Any:
        inventory = self.simulator.inventory
        found = inventory.all(Network, self) + inventory.all(networking.DistributedPortgroup, self)
        return soap.array(vim.Network, [one.ref for one in found])

    def p_configuration(self) -> Any:
        return vim.Datacenter.ConfigInfo(defaultHardwareVersionKey="vmx-19")


class Cluster(Entity):
    type = vim.ClusterComputeResource

    def hosts(self) -> "list[Host]":
        return [child for child in self.children() if isinstance(child, Host)]

    def p_host(self) -> Any:
        return soap.array(vim.HostSystem, [host.ref for host in self.hosts()])

    def p_datastore(self) -> Any:
        names = {name for host in self.hosts() for name in host.datastores}
        return soap.array(vim.Datastore, [ds.ref for ds in self.simulator.inventory.all(Datastore) if ds.name in names])

    def p_network(self) -> Any:
        return self.simulator.inventory.datacenter_of(self).p_network()

    def p_resourcePool(self) -> Any:
        return next((child.ref for child in self.children() if isinstance(child, ResourcePool)), None)

    def p_summary(self) -> Any:
        hosts = self.hosts()
        usable = [host for host in hosts if host.connected and not host.in_maintenance]
        return vim.ClusterComputeResource.Summary(
            totalCpu=9600 * len(hosts),
            totalMemory=64 * GIB * len(hosts),
            numCpuCores=4 * len(hosts),
            numCpuThreads=8 * len(hosts),
            effectiveCpu=9600 * len(usable),
            effectiveMemory=65536 * len(usable),
            numHosts=len(hosts),
            numEffectiveHosts=len(usable),
            overallStatus="green",
        )

    def p_configurationEx(self) -> Any:
        return vim.cluster.ConfigInfoEx()


class ResourcePool(Entity):
    type = vim.ResourcePool

    def p_owner(self) -> Any:
        owner = self.simulator.inventory.get(self.parent)
        while not isinstance(owner, Cluster):
            owner = self.simulator.inventory.get(owner.parent)
        return owner.ref

    @property
    def vapp(self) -> "VirtualApp | None":
        """The vApp that this pool is, or that it lies in."""
        chain = [self, *self.simulator.inventory.ancestors(self)]
        return next((one for one in chain if isinstance(one, VirtualApp)), None)

    def p_resourcePool(self) -> Any:
        return soap.array(vim.ResourcePool, [child.ref for child in self.children()])

    def p_vm(self) -> Any:
        machines = self.simulator.inventory.all(VirtualMachine)
        return soap.array(vim.VirtualMachine, [vm.ref for vm in machines if vm.pool == self.moid])

    def p_summary(self) -> Any:
        return vim.ResourcePool.Summary(name=self.name)

    def p_runtime(self) -> Any:
        return vim.ResourcePool.RuntimeInfo(overallStatus="green")


class VirtualApp(ResourcePool):
    """A vApp: a resource pool that lies in a folder of machines, or in another vApp. Its machines lie in no folder."""

    type = vim.VirtualApp
    KEPT = ("folder",)
    folder: str = ""

    @property
    def machines_folder(self) -> Folder:
        """Where the outermost vApp lies: whose name space and permissions its machines have."""
        above = self.simulator.inventory.get(self.parent)
        return self.simulator.inventory.get(self.folder) if self.folder else above.vapp.machines_folder

    def p_parentFolder(self) -> Any:
        return self.simulator.inventory.get(self.folder).ref if self.folder else None

    def p_parentVApp(self) -> Any:
        above = self.simulator.inventory.get(self.parent).vapp if not self.folder else None
        return above.ref if above is not None else None


class Host(Entity):
    """An ESXi host. ``datastores`` are the names of those it has mounted."""

    type = vim.HostSystem
    KEPT = (
        "datastores",
        "connected",
        "in_maintenance",
        "uuid",
        "version",
        "network",
        "services",
        "leases",
        "iscsi_nics",
        "iscsi_targets",
    )
    datastores: list[str]
    connected: bool = True
    in_maintenance: bool = False
    uuid: str = ""
    version: str = "8.0.3"
    network: Any = None  # of networking.py; None until somebody asks
    services: dict[str, list[str]]  # service type -> the VMkernel NICs that carry it
    leases: dict[str, Any]  # of VMkernel NICs that use DHCP
    iscsi_nics: list[str]  # bound to the software iSCSI adapter
    iscsi_targets: list[str]  # addresses of its static targets

    def __init__(self, simulator: "Simulator", moid: str, name: str, parent: str | None) -> None:
        super().__init__(simulator, moid, name, parent)
        self.services, self.leases, self.iscsi_nics, self.iscsi_targets = {}, {}, [], []

    def p_runtime(self) -> Any:
        return vim.host.RuntimeInfo(
            connectionState="connected" if self.connected else "notResponding",
            powerState="poweredOn" if self.connected else "unknown",
            inMaintenanceMode=self.in_maintenance,
            bootTime=self.simulator.start_time,
        )

    def p_datastore(self) -> Any:
        machines = [ds.ref for ds in self.simulator.inventory.all(Datastore) if ds.name in self.datastores]
        return soap.array(vim.Datastore, machines)

    def p_network(self) -> Any:
        return self.simulator.inventory.datacenter_of(self).p_network()

    def p_vm(self) -> Any:
        machines = self.simulator.inventory.all(VirtualMachine)
        return soap.array(vim.VirtualMachine, [vm.ref for vm in machines if vm.host == self.moid])

    def p_config(self) -> Any:
        storage_device = vim.host.StorageDeviceInfo(
            hostBusAdapter=[self._iscsi_adapter()] if self.iscsi_nics or self.iscsi_targets else []
        )
        mounts = [
            vim.host.FileSystemMountInfo(
                volume=one.nas(), mountInfo=vim.host.MountInfo(path=f"/vmfs/volumes/{one.uuid}", accessMode="readWrite")
            )
            for one in self.simulator.inventory.all(Datastore)
            if one.kind == "NFS" and one.name in self.datastores
        ]
        return vim.host.ConfigInfo(
            host=self.ref,
            product=self.p_summary().config.product,
            network=networking.seen(self),
            storageDevice=storage_device,
            fileSystemVolume=vim.host.FileSystemVolumeInfo(volumeTypeList=["VMFS", "NFS"], mountInfo=mounts),
            virtualNicManagerInfo=vim.host.VirtualNicManagerInfo(netConfig=networking.net_configs(self)),
        )

    def _iscsi_adapter(self) -> Any:
        adapter = vim.host.InternetScsiHba(device="vmhba64", bus=64, status="online", model="iSCSI Software Adapter")
        adapter.isSoftwareBased, adapter.networkBindingSupport = True, "optional"
        Target = vim.host.InternetScsiHba.StaticTarget
        adapter.configuredStaticTarget = [
            Target(address=address, port=3260, iScsiName=f"iqn.2001-04.com.example:{address}")
            for address in self.iscsi_targets
        ]
        return adapter

    def p_summary(self) -> Any:
        about = vim.AboutInfo(
            name="VMware ESXi",
            fullName=f"VMware ESXi {self.version} build-24022510",
            vendor="VMware, Inc.",
            version=self.version,
            build="24022510",
            osType="vmnix-x86",
            productLineId="embeddedEsx",
            apiType="HostAgent",
            apiVersion=f"{self.version}.0",
        )
        hardware = vim.host.Summary.HardwareSummary(
            vendor="OpenVADP", model="Simulator", uuid=self.uuid, memorySize=64 * GIB, cpuModel="Simulated CPU"
        )
        hardware.cpuMhz, hardware.numCpuPkgs, hardware.numCpuCores, hardware.numCpuThreads = 2400, 1, 4, 8
        hardware.numNics, hardware.numHBAs = 1, 1
        return vim.host.Summary(
            host=self.ref,
            hardware=hardware,
            runtime=self.p_runtime(),
            config=vim.host.Summary.ConfigSummary(name=self.name, port=443, product=about, vmotionEnabled=True),
            overallStatus="green",
        )

    def p_capability(self) -> Any:
        return vim.host.Capability()

    def p_hardware(self) -> Any:
        return vim.host.HardwareInfo(
            systemInfo=vim.host.SystemInfo(vendor="OpenVADP", model="Simulator", uuid=self.uuid),
            memorySize=64 * GIB,
        )

    def p_configManager(self) -> Any:
        number = self.moid.rsplit("-", 1)[-1]
        return vim.host.ConfigManager(
            networkSystem=vim.host.NetworkSystem(f"networkSystem-{number}"),
            virtualNicManager=vim.host.VirtualNicManager(f"virtualNicManager-{number}"),
            iscsiManager=vim.host.IscsiManager(f"iscsiManager-{number}"),
        )


class Datastore(Entity):
    type = vim.Datastore
    KEPT = ("kind", "capacity_bytes", "uuid", "local", "server")
    kind: str = "VMFS"
    capacity_bytes: int = 100 * GIB
    uuid: str = ""
    local: bool = False
    server: str = "nas"  # of NFS

    def used_bytes(self) -> int:
        folder = self.simulator.storage.local_path(f"[{self.name}]")
        total = 0
        # Files and folders come and go meanwhile: os.walk passes over a folder that is gone, as Path.rglob does not.
        for parent, _folders, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(os.path.join(parent, name)).st_blocks * 512
        return total

    def free_bytes(self) -> int:
        if self.simulator.storage.is_full(self.name):
            return 0
        return max(0, self.capacity_bytes - self.used_bytes())

    def hosts(self) -> list[Host]:
        return [host for host in self.simulator.inventory.all(Host) if self.name in host.datastores]

    @property
    def lun(self) -> str:
        """The canonical name of a VMFS datastore's extent."""
        return "mpx.vmhba0:C0:T0:L0" if self.local else f"naa.60003ff{self.uuid.replace('-', '')[7:]}"

    def _url(self) -> str:
        return f"ds:///vmfs/volumes/{self.uuid}/"

    def p_summary(self) -> Any:
        hosts = self.hosts()
        return vim.Datastore.Summary(
            datastore=self.ref,
            name=self.name,
            url=self._url(),
            capacity=self.capacity_bytes,
            freeSpace=self.free_bytes(),
            uncommitted=0,
            accessible=any(host.connected for host in hosts),
            multipleHostAccess=len(hosts) > 1,
            type=self.kind,
            maintenanceMode="normal",
        )

    def nas(self) -> Any:
        return vim.host.NasVolume(
            type="NFS", name=self.name, capacity=self.capacity_bytes, remoteHost=self.server, remotePath=f"/{self.name}"
        )

    def p_info(self) -> Any:
        common = {
            "name": self.name,
            "url": self._url(),
            "freeSpace": self.free_bytes(),
            "maxFileSize": 62 << 40,
            "timestamp": self.simulator.start_time,
        }
        if self.kind == "NFS":
            return vim.host.NasDatastoreInfo(nas=self.nas(), **common)
        if self.kind == "vsan":
            return vim.host.VsanDatastoreInfo(membershipUuid=self.uuid, **common)
        if self.kind == "VVOL":
            container = vim.host.VvolVolume(type="VVOL", name=self.name, capacity=self.capacity_bytes, scId=self.uuid)
            return vim.host.VvolDatastoreInfo(vvolDS=container, **common)
        extent = vim.host.ScsiDisk.Partition(diskName=self.lun, partition=1)
        vmfs = vim.host.VmfsVolume(
            type="VMFS",
            name=self.name,
            capacity=self.capacity_bytes,
            blockSizeMb=1,
            majorVersion=6,
            version="6.82",
            uuid=self.uuid,
            extent=[extent],
            vmfsUpgradable=False,
            local=self.local,
        )
        return vim.host.VmfsDatastoreInfo(vmfs=vmfs, **common)

    def p_host(self) -> Any:
        mounts = [
            vim.Datastore.HostMount(
                key=host.ref,
                mountInfo=vim.host.MountInfo(
                    path=f"/vmfs/volumes/{self.uuid}", accessMode="readWrite", mounted=True, accessible=host.connected
                ),
            )
            for host in self.hosts()
        ]
        return soap.array(vim.Datastore.HostMount, mounts)

    def p_vm(self) -> Any:
        machines = [
            vm.ref
            for vm in self.simulator.inventory.all(VirtualMachine)
            if self.name in {datastore_of(path) for path in vm.all_paths()}
        ]
        return soap.array(vim.VirtualMachine, machines)

    def p_browser(self) -> Any:
        return vim.host.DatastoreBrowser(f"datastoreBrowser-{self.moid}")

    def p_capability(self) -> Any:
        return vim.Datastore.Capability(
            directoryHierarchySupported=True,
            rawDiskMappingsSupported=self.kind == "VMFS",
            perFileThinProvisioningSupported=True,
        )


class Network(Entity):
    type = vim.Network

    def p_summary(self) -> Any:
        return vim.Network.Summary(network=self.ref, name=self.name, accessible=True)

    def p_host(self) -> Any:
        return soap.array(vim.HostSystem, [host.ref for host in self.simulator.inventory.all(Host)])

    def p_vm(self) -> Any:
        machines = [vm.ref for vm in self.simulator.inventory.all(VirtualMachine) if self.moid in vm.network_moids()]
        return soap.array(vim.VirtualMachine, machines)


# --- virtual machines -----------------------------------------------------------------------------------------------


def disks_in(devices: Any) -> list[Any]:
    return [device for device in devices if isinstance(device, vim.vm.device.VirtualDisk)]


def is_rdm(device: Any) -> bool:
    return isinstance(device.backing, vim.vm.device.VirtualDisk.RawDiskMappingVer1BackingInfo)


def in_snapshots(device: Any) -> bool:
    """Whether a snapshot of its VM holds this disk (VADP facts 13)."""
    if is_rdm(device) and device.backing.compatibilityMode == "physicalMode":
        return False
    return not (device.backing.diskMode or "persistent").startswith("independent")


def is_encrypted(device: Any) -> bool:
    return getattr(device.backing, "keyId", None) is not None


class SnapshotRecord:
    """A snapshot of a VM; its config is what the VM's was, with the paths that it froze."""

    FIELDS = ("moid", "id", "name", "description", "created", "quiesced", "memory", "state", "parent", "config")

    def __init__(self, **fields: Any) -> None:
        self.moid: str = fields["moid"]
        self.id: int = fields["id"]
        self.name: str = fields["name"]
        self.description: str = fields["description"]
        self.created: Any = fields["created"]
        self.quiesced: bool = fields["quiesced"]
        self.memory: bool = fields["memory"]
        self.state: str = fields["state"]
        self.parent: str | None = fields["parent"]
        self.config: Any = fields["config"]

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.FIELDS}


class VirtualMachine(Entity):
    """A VM.

    ``config`` holds the current configuration; change ids and parents of its disks are put in when it is read.
    ``intent`` says what an operation is about to do to the disks, so that a killed simulator can tidy up.
    """

    type = vim.VirtualMachine
    KEPT = (
        "config",
        "power_state",
        "host",
        "pool",
        "tools_running",
        "snapshot_dicts",
        "current_snapshot",
        "consolidation_needed",
        "access",
        "intent",
        "boot_time",
        "last_snapshot_id",
    )
    config: Any
    power_state: str = "poweredOff"
    host: str = ""
    pool: str | None = None
    tools_running: bool = False
    current_snapshot: str | None = None
    consolidation_needed: bool = False
    access: list[str]  # identities of VDDK's PrepareForAccess
    intent: dict[str, Any] | None = None
    boot_time: Any = None
    last_snapshot_id: int = 0

    def __init__(self, simulator: "Simulator", moid: str, name: str, parent: str | None) -> None:
        super().__init__(simulator, moid, name, parent)
        self.lock = threading.RLock()  # held while disks' leaves move
        self.task: Any = None  # the task that has this VM
        self.snapshots: list[SnapshotRecord] = []
        self.access = []
        self.openers: dict[str, Any] = {}  # disks of other VMs that this running VM holds open

    # what is kept

    @property
    def snapshot_dicts(self) -> list[dict[str, Any]]:
        return [snapshot.as_dict() for snapshot in self.snapshots]

    @snapshot_dicts.setter
    def snapshot_dicts(self, dicts: list[dict[str, Any]]) -> None:
        self.snapshots = [SnapshotRecord(**fields) for fields in dicts]

    # what others ask

    @property
    def vapp(self) -> "VirtualApp | None":
        return self.simulator.inventory.get(self.pool).vapp if self.pool else None

    @property
    def powered_on(self) -> bool:
        return self.power_state == "poweredOn"

    @property
    def is_template(self) -> bool:
        return bool(self.config.template)

    @property
    def host_name(self) -> str:
        return self.simulator.inventory.get(self.host).name

    @property
    def disks(self) -> list[Any]:
        return disks_in(self.config.hardware.device)

    def snapshot(self, moid: str) -> SnapshotRecord:
        for snapshot in self.snapshots:
            if snapshot.moid == moid:
                return snapshot
        raise SimulatorError(f"VM {self.name} has no snapshot {moid}")

    def all_paths(self) -> list[str]:
        """The datastore paths of the VM's files that its configuration names."""
        paths = [self.config.files.vmPathName]
        return paths + [disk.backing.fileName for disk in self.disks]

    def network_moids(self) -> set[str]:
        cards = [one for one in self.config.hardware.device if isinstance(one, vim.vm.device.VirtualEthernetCard)]
        ports = {card.backing.port.portgroupKey for card in cards if getattr(card.backing, "port", None) is not None}
        groups = self.simulator.inventory.all(networking.DistributedPortgroup) if ports else []
        found = {card.backing.network._moId for card in cards if getattr(card.backing, "network", None) is not None}
        return found | {group.moid for group in groups if group.key in ports}

    def chain(self, path: str) -> list[str]:
        """A disk's files, from *path* down to the base.

        A delta that is just being merged is already gone from the storage, and still named by the configuration.
        """
        paths: list[str] = []
        current: str | None = path
        while current is not None:
            try:
                info = self.simulator.storage.info(current)
            except storage.NotFound:
                child, parent = (self.intent or {}).get("merge", (None, None))
                if current != child:
                    break
                current = parent
                continue
            paths.append(current)
            current = info.parent
        return paths

    # properties

    def p_parent(self) -> Any:
        return super().p_parent() if self.vapp is None else None

    def p_parentVApp(self) -> Any:
        return self.vapp.ref if self.vapp is not None else None

    def _with_backings(self, config: Any, current: bool) -> Any:
        """A copy of a configuration whose disks show their parents, and the current change id."""
        config = clone(config)
        vmspec.list_devices(config.hardware.device)
        for disk in disks_in(config.hardware.device):
            if is_rdm(disk):
                continue
            backing = disk.backing
            backing_file = backing.fileName
            chain = self.chain(backing_file)
            backing.fileName = chain[0] if chain else backing_file
            for parent in chain[1:]:
                backing.parent = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
                    fileName=parent,
                    diskMode=disk.backing.diskMode,
                    thinProvisioned=disk.backing.thinProvisioned,
                    uuid=disk.backing.uuid,
                    datastore=disk.backing.datastore,
                    keyId=disk.backing.keyId,
                )
                backing = backing.parent
            if current:
                disk.backing.changeId = self._change_id(backing_file)
        return config

    def _change_id(self, path: str) -> str | None:
        for _unused in range(3):  # the file may be merged between two looks
            with contextlib.suppress(storage.NotFound, IndexError):
                return self.simulator.storage.current_change_id(self.chain(path)[0])
        return None

    def p_config(self) -> Any:
        config = self._with_backings(self.config, current=True)
        config.name = self.p_name()
        return config

    def p_capability(self) -> Any:
        return vim.vm.Capability(
            snapshotOperationsSupported=not self.is_template,
            multipleSnapshotsSupported=True,
            poweredOffSnapshotsSupported=True,
            memorySnapshotsSupported=True,
            revertToSnapshotSupported=True,
            quiescedSnapshotsSupported=True,
            diskSharesSupported=True,
            changeTrackingSupported=self.hardware_version >= 7,
        )

    @property
    def hardware_version(self) -> int:
        return int(self.config.version.rsplit("-", 1)[-1])

    def p_runtime(self) -> Any:
        return vim.vm.RuntimeInfo(
            host=self.simulator.inventory.get(self.host).ref,
            connectionState="connected" if self.simulator.inventory.get(self.host).connected else "disconnected",
            powerState=self.power_state,
            faultToleranceState="notConfigured",
            bootTime=self.boot_time if self.powered_on else None,
            toolsInstallerMounted=False,
            consolidationNeeded=self.consolidation_needed,
            maxCpuUsage=2400,
            maxMemoryUsage=self.config.hardware.memoryMB,
            snapshotInBackground=False,
            numMksConnections=0,
            recordReplayState="inactive",
        )

    def p_guest(self) -> Any:
        running = self.tools_running and self.powered_on
        return vim.vm.GuestInfo(
            toolsStatus="toolsOk" if running else "toolsNotRunning",
            toolsVersionStatus="guestToolsCurrent",
            toolsVersionStatus2="guestToolsCurrent",
            toolsRunningStatus="guestToolsRunning" if running else "guestToolsNotRunning",
            toolsVersion="12352" if running else None,
            guestId=self.config.guestId if running else None,
            guestFullName=self.config.guestFullName if running else None,
            guestFamily="linuxGuest" if running else None,
            hostName=self.name if running else None,
            guestState="running" if running else "notRunning",
            guestOperationsReady=running,
            interactiveGuestOperationsReady=False,
        )

    def p_guestHeartbeatStatus(self) -> str:
        return "green" if self.tools_running and self.powered_on else "gray"

    def p_snapshot(self) -> Any:
        if not self.snapshots:
            return None

        def tree(parent: str | None) -> list[Any]:
            return [
                vim.vm.SnapshotTree(
                    snapshot=vim.vm.Snapshot(one.moid),
                    vm=self.ref,
                    name=one.name,
                    description=one.description,
                    id=one.id,
                    createTime=one.created,
                    state=one.state,
                    quiesced=one.quiesced,
                    replaySupported=False,
                    childSnapshotList=tree(one.moid),
                )
                for one in self.snapshots
                if one.parent == parent
            ]

        current = vim.vm.Snapshot(self.current_snapshot) if self.current_snapshot else None
        return vim.vm.SnapshotInfo(currentSnapshot=current, rootSnapshotList=tree(None))

    def p_rootSnapshot(self) -> Any:
        roots = [vim.vm.Snapshot(one.moid) for one in self.snapshots if one.parent is None]
        return soap.array(vim.vm.Snapshot, roots)

    def p_datastore(self) -> Any:
        names = {datastore_of(path) for path in self.all_paths()}
        inventory = self.simulator.inventory
        datacenter = inventory.datacenter_of(self)
        return soap.array(vim.Datastore, [ds.ref for ds in inventory.all(Datastore, datacenter) if ds.name in names])

    def p_network(self) -> Any:
        inventory = self.simulator.inventory
        return soap.array(vim.Network, [inventory.get(moid).ref for moid in sorted(self.network_moids())])

    def p_resourcePool(self) -> Any:
        return self.simulator.inventory.get(self.pool).ref if self.pool else None

    def p_environmentBrowser(self) -> Any:
        return vim.EnvironmentBrowser(f"envbrowser-{self.moid.split('-')[-1]}")

    def p_summary(self) -> Any:
        config, runtime, guest = self.config, self.p_runtime(), self.p_guest()
        total, unique = self._storage_bytes()
        return vim.vm.Summary(
            vm=self.ref,
            runtime=runtime,
            overallStatus="green",
            guest=vim.vm.Summary.GuestSummary(
                guestId=guest.guestId,
                toolsStatus=guest.toolsStatus,
                toolsVersionStatus2=guest.toolsVersionStatus2,
                toolsRunningStatus=guest.toolsRunningStatus,
                hostName=guest.hostName,
            ),
            config=vim.vm.Summary.ConfigSummary(
                name=self.p_name(),
                template=self.is_template,
                vmPathName=config.files.vmPathName,
                memorySizeMB=config.hardware.memoryMB,
                numCpu=config.hardware.numCPU,
                numEthernetCards=len([d for d in config.hardware.device if _is_card(d)]),
                numVirtualDisks=len(self.disks),
                uuid=config.uuid,
                instanceUuid=config.instanceUuid,
                guestId=config.guestId,
                guestFullName=config.guestFullName,
                annotation=config.annotation,
                hwVersion=config.version,
            ),
            storage=vim.vm.Summary.StorageSummary(
                committed=total, uncommitted=0, unshared=unique, timestamp=self.simulator.start_time
            ),
            quickStats=vim.vm.Summary.QuickStats(),
        )

    def _storage_bytes(self) -> tuple[int, int]:
        total = sum(item.size for item in self.p_layoutEx().file)
        return total, total

    def p_storage(self) -> Any:
        names = sorted({datastore_of(path) for path in self.all_paths()})
        total, unique = self._storage_bytes()
        usage = [
            vim.vm.StorageInfo.UsageOnDatastore(
                datastore=self.simulator.inventory.datastore(name, self).ref,
                committed=total if index == 0 else 0,
                uncommitted=0,
                unshared=unique if index == 0 else 0,
            )
            for index, name in enumerate(names)
        ]
        return vim.vm.StorageInfo(perDatastoreUsage=usage, timestamp=self.simulator.start_time)

    def p_layoutEx(self) -> Any:
        return _FileLayout(self).build()

    def p_layout(self) -> Any:
        disks = [
            vim.vm.FileLayout.DiskLayout(key=disk.key, diskFile=self.chain(disk.backing.fileName)[::-1])
            for disk in self.disks
        ]
        return vim.vm.FileLayout(disk=disks)

    def p_disabledMethod(self) -> Any:
        if self.powered_on:
            names = ["PowerOnVM_Task", "Destroy_Task", "UnregisterVM", "MarkAsTemplate", "UpgradeVM_Task"]
        else:
            names = ["PowerOffVM_Task", "SuspendVM_Task", "ResetVM_Task", "ShutdownGuest", "RebootGuest"]
        if self.is_template:
            names += ["PowerOnVM_Task", "CreateSnapshot_Task", "CreateSnapshotEx_Task", "RevertToCurrentSnapshot_Task"]
        if self.access:
            names.append("RelocateVM_Task")
        if any(lease.vm is self for lease in list(self.simulator.leases.values())):
            names += ["PowerOnVM_Task", "MigrateVM_Task", "RelocateVM_Task", "Destroy_Task", "UnregisterVM"]
        return soap.array(str, names)

    def p_resourceConfig(self) -> Any:
        return vim.ResourceConfigSpec(entity=self.ref)

    def touch(self) -> None:
        """The configuration changed: a new change version, then onto the disk."""
        self.config.modified = self.simulator.clock()
        self.config.changeVersion = self.config.modified.isoformat()
        self.save()


def _is_card(device: Any) -> bool:
    return isinstance(device, vim.vm.device.VirtualEthernetCard)


class _FileLayout:
    """Builds ``layoutEx`` out of the files that are really there."""

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm
        self.storage = vm.simulator.storage
        self.files: list[Any] = []
        self.keys: dict[str, int] = {}

    def _add(self, path: str, kind: str) -> int | None:
        if path in self.keys:
            return self.keys[path]
        try:
            status = self.storage.local_path(path).stat()
        except FileNotFoundError:
            return None
        allocated = status.st_blocks * 512
        key = len(self.files)
        self.files.append(
            vim.vm.FileLayoutEx.FileInfo(
                key=key,
                name=path,
                type=kind,
                size=min(allocated, status.st_size) if kind == "diskExtent" else status.st_size,
                uniqueSize=allocated,
                accessible=True,
                backingObjectId="",
            )
        )
        self.keys[path] = key
        return key

    def _disk(self, device_key: int, path: str) -> Any:
        units = []
        for one in self.vm.chain(path)[::-1]:
            stem = one[: -len(".vmdk")]
            is_delta = bool(_DELTA_NUMBER.search(stem))
            found = [
                self._add(one, "diskDescriptor"),
                self._add(f"{stem}{'-delta' if is_delta else '-flat'}.vmdk", "diskExtent"),
            ]
            units.append(vim.vm.FileLayoutEx.DiskUnit(fileKey=[key for key in found if key is not None]))
        return vim.vm.FileLayoutEx.DiskLayout(key=device_key, chain=units)

    def build(self) -> Any:
        vm = self.vm
        vmx = vm.config.files.vmPathName
        folder, stem = folder_of(vmx), vmx[: -len(".vmx")]
        self._add(vmx, "config")
        self._add(f"{stem}.nvram", "nvram")
        self._add(f"{stem}.vmsd", "snapshotList")
        disks = [self._disk(disk.key, disk.backing.fileName) for disk in vm.disks]
        snapshots = []
        for one in vm.snapshots:
            data = self._add(f"{stem}-Snapshot{one.id}.vmsn", "snapshotData")
            memory = self._add(f"{stem}-Snapshot{one.id}.vmem", "snapshotMemory")
            snapshots.append(
                vim.vm.FileLayoutEx.SnapshotLayout(
                    key=vim.vm.Snapshot(one.moid),
                    dataKey=-1 if data is None else data,
                    memoryKey=-1 if memory is None else memory,
                    disk=[
                        self._disk(disk.key, disk.backing.fileName)
                        for disk in disks_in(one.config.hardware.device)
                        if in_snapshots(disk)
                    ],
                )
            )
        self._add(f"{folder}/vmware.log", "log")
        return vim.vm.FileLayoutEx(file=self.files, disk=disks, snapshot=snapshots, timestamp=vm.simulator.clock())


CLASSES = {
    cls.__name__: cls
    for cls in (
        Folder,
        Datacenter,
        Cluster,
        ResourcePool,
        VirtualApp,
        Host,
        Datastore,
        Network,
        VirtualMachine,
        networking.DistributedSwitch,
        networking.DistributedPortgroup,
    )
}


class Inventory:
    """All entities by moid, in the order of their making; saved one by one."""

    def __init__(self, simulator: "Simulator", kept: Kept) -> None:
        self.simulator = simulator
        self.kept = kept
        self.entities: dict[str, Entity] = {}

    def load(self) -> None:
        loaded = []
        for data in self.kept.read_all():
            entity = CLASSES[data["class"]](self.simulator, data["moid"], data["name"], data["parent"])
            entity.props = {name: from_json(value) for name, value in data["props"].items()}
            for name, value in data["kept"].items():
                setattr(entity, name, from_json(value))
            loaded.append(entity)
        for entity in sorted(loaded, key=lambda one: int(re.sub(r"\D", "", one.moid))):
            self.entities[entity.moid] = entity

    def add(self, entity: Entity) -> Entity:
        self.entities[entity.moid] = entity
        self.save(entity)
        return entity

    def save(self, entity: Entity) -> None:
        if entity.moid in self.entities:
            self.kept.write(entity)
        self.simulator.changed()

    def remove(self, entity: Entity) -> None:
        self.kept.remove(entity)
        self.entities.pop(entity.moid, None)
        self.simulator.changed()

    def get(self, moid: str | None) -> Any:
        return self.entities[moid or ""]

    def all(self, cls: Any, datacenter: Entity | None = None) -> list[Any]:
        found = [one for one in self.entities.values() if isinstance(one, cls)]
        if datacenter is not None:
            found = [one for one in found if self.datacenter_of(one) is datacenter]
        return found

    def ancestors(self, entity: Entity) -> Iterator[Entity]:
        while entity.parent:
            entity = self.get(entity.parent)
            yield entity

    def datacenter_of(self, entity: Entity) -> Any:
        if isinstance(entity, Datacenter):
            return entity
        return next((one for one in self.ancestors(entity) if isinstance(one, Datacenter)), None)

    def datastore(self, name: str, beside: Entity) -> Datastore:
        """The datastore of that name in the datacenter of *beside*."""
        for one in self.all(Datastore, self.datacenter_of(beside)):
            if one.name == name:
                return one
        raise vim.fault.InvalidDatastorePath(datastorePath=f"[{name}]", name=name)

    def is_encrypted(self, path: str) -> bool:
        """Whether a disk file belongs to an encrypted disk of any VM."""
        with self.simulator.lock:
            return any(
                path in vm.chain(disk.backing.fileName)
                for vm in self.all(VirtualMachine)
                for disk in vm.disks
                if is_encrypted(disk)
            )

    def vm_of_snapshot(self, moid: str) -> VirtualMachine:
        for vm in self.all(VirtualMachine):
            if any(snapshot.moid == moid for snapshot in vm.snapshots):
                return vm
        raise vmodl.fault.ManagedObjectNotFound(obj=vim.vm.Snapshot(moid))

    def path_of(self, entity: Entity) -> str:
        """The inventory path, without the root folder."""
        names = [entity.p_name(), *(one.p_name() for one in self.ancestors(entity))]
        return "/".join(reversed(names[:-1]))


long = VmomiSupport.long
