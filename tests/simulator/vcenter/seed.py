# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The inventory of a new state folder. Moids, UUIDs and names are the same each time."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from . import disks, images, networking, proxy, vmspec
from .inventory import Cluster, Datacenter, Datastore, Folder, Host, Network, ResourcePool, VirtualMachine
from .model import SimulatorError

if TYPE_CHECKING:
    from .simulator import Simulator

MIB = 1 << 20
NAMESPACE = uuid.UUID("5b0f6c1e-7a1a-4b6e-9d3c-0d5a0d1b2c3d")

DATASTORES: dict[str, dict[str, Any]] = {
    "vmfs01": {"type": "VMFS", "hosts": ["127.0.1.1", "127.0.1.2"]},
    "nfs01": {"type": "NFS", "hosts": ["127.0.1.1", "127.0.1.2"]},
    "local01": {"type": "VMFS", "hosts": ["127.0.1.1"], "local": True},
    "vsan01": {"type": "vsan", "hosts": ["127.0.1.1", "127.0.1.2"]},
    "vvol01": {"type": "VVOL", "hosts": ["127.0.1.1", "127.0.1.2"]},
    "vmfs11": {"type": "VMFS", "hosts": ["127.0.1.3"]},
}


def stable_uuid(name: str) -> str:
    return str(uuid.uuid5(NAMESPACE, name))


class Seeder:
    def __init__(self, simulator: "Simulator") -> None:
        self.simulator = simulator
        self.inventory = simulator.inventory

    def folder(self, moid: str, name: str, parent: str | None, *child_types: str) -> Folder:
        folder = Folder(self.simulator, moid, name, parent)
        folder.props["childType"] = list(child_types)
        self.inventory.add(folder)
        return folder

    def datacenter(self, moid: str, name: str, first: int) -> None:
        self.inventory.add(Datacenter(self.simulator, moid, name, "group-d1"))
        self.folder(f"group-v{first}", "vm", moid, "Folder", "VirtualMachine", "VirtualApp")
        self.folder(f"group-h{first + 1}", "host", moid, "Folder", "ComputeResource")
        self.folder(f"group-s{first + 2}", "datastore", moid, "Folder", "Datastore", "StoragePod")
        self.folder(f"group-n{first + 3}", "network", moid, "Folder", "Network", "DistributedVirtualSwitch")

    def host(self, moid: str, name: str, parent: str) -> Host:
        host = Host(self.simulator, moid, name, parent)
        host.datastores = [one for one, facts in DATASTORES.items() if name in facts["hosts"]]
        host.uuid = stable_uuid(name)
        self.inventory.add(host)
        return host

    def datastore(self, moid: str, name: str, parent: str) -> None:
        datastore = Datastore(self.simulator, moid, name, parent)
        datastore.kind = DATASTORES[name]["type"]
        datastore.local = bool(DATASTORES[name].get("local"))
        datastore.uuid = stable_uuid(name)
        self.inventory.add(datastore)

    def distributed_switch(self, moid: str, name: str, parent: str, members: list[str]) -> None:
        """A switch that has vmnic2 of its members, with the port group of its uplinks and one for VMkernel NICs."""
        switch = networking.DistributedSwitch(self.simulator, moid, name, parent)
        switch.uuid = stable_uuid(name)
        switch.members = {member: ["vmnic2"] for member in members}
        self.inventory.add(switch)
        number = int(moid.rsplit("-", 1)[-1])
        for index, (group_name, uplink) in enumerate(((f"{name}-DVUplinks-{number}", True), ("dv-vmotion", False)), 1):
            key = f"dvportgroup-{number + index}"
            group = networking.DistributedPortgroup(self.simulator, key, group_name, parent)
            group.switch, group.key, group.uplink = moid, key, uplink
            group.setting = networking.vlan_setting(0)
            self.inventory.add(group)

    def infrastructure(self) -> None:
        self.folder("group-d1", "Datacenters", None, "Folder", "Datacenter")
        self.datacenter("datacenter-2", "DC0", 3)
        self.folder("group-v7", "production", "group-v3", "Folder", "VirtualMachine", "VirtualApp")
        self.inventory.add(Cluster(self.simulator, "domain-c8", "Cluster0", "group-h4"))
        self.inventory.add(ResourcePool(self.simulator, "resgroup-9", "Resources", "domain-c8"))
        self.host("host-10", "127.0.1.1", "domain-c8")
        self.host("host-11", "127.0.1.2", "domain-c8")
        self.datastore("datastore-12", "vmfs01", "group-s5")
        self.datastore("datastore-13", "nfs01", "group-s5")
        self.datastore("datastore-14", "local01", "group-s5")
        self.datastore("datastore-17", "vsan01", "group-s5")
        self.datastore("datastore-18", "vvol01", "group-s5")
        self.inventory.add(Network(self.simulator, "network-15", "VM Network", "group-n6"))
        self.inventory.add(Network(self.simulator, "network-16", "Backup Network", "group-n6"))
        self.distributed_switch("dvs-17", "DSwitch0", "group-n6", ["host-10", "host-11"])
        self.datacenter("datacenter-21", "DC1", 22)
        self.folder("group-v26", "production", "group-v22", "Folder", "VirtualMachine", "VirtualApp")
        self.inventory.add(Cluster(self.simulator, "domain-c27", "Cluster1", "group-h23"))
        self.inventory.add(ResourcePool(self.simulator, "resgroup-28", "Resources", "domain-c27"))
        self.host("host-29", "127.0.1.3", "domain-c27")
        self.datastore("datastore-30", "vmfs11", "group-s24")
        self.inventory.add(Network(self.simulator, "network-31", "VM Network", "group-n25"))

    def vm(
        self,
        number: int,
        name: str,
        disk_specs: list[dict[str, Any]],
        *,
        folder: str = "group-v3",
        datastore: str = "vmfs01",
        directory: str | None = None,
        host: str = "host-10",
        pool: str = "resgroup-9",
        network: str = "network-15",
        bios_uuid: str | None = None,
        guest: tuple[str, str] = ("debian12_64Guest", "Debian GNU/Linux 12 (64-bit)"),
        firmware: str = "efi",
        shared_bus: str = "noSharing",
        running: bool = False,
        started: bool = True,
        template: bool = False,
        ide: bool = False,
        encrypted: bool = False,
        extra: dict[str, str] | None = None,
    ) -> VirtualMachine:
        """One VM. A disk is {kind, bytes, mode, rdm, datastore, thin}."""
        vm = VirtualMachine(self.simulator, f"vm-{number}", name, folder)
        vm.host, vm.pool = host, None if template else pool
        directory = directory or name
        config = vmspec.new_config(
            name=name,
            vmx=f"[{datastore}] {directory}/{directory}.vmx",
            instance_uuid=stable_uuid(f"vm-{number} instance"),
            bios_uuid=bios_uuid or stable_uuid(f"vm-{number} bios"),
            guest_id=guest[0],
            guest_name=guest[1],
            firmware=firmware,
        )
        config.template = template
        config.extraConfig.extend(vim.option.OptionValue(key=key, value=text) for key, text in (extra or {}).items())
        if encrypted:
            config.keyId = vmspec.key_id(stable_uuid(f"vm-{number} key"))
        config.flags.diskUuidEnabled = proxy.enable_uuid(config)
        devices = config.hardware.device
        devices.append(vmspec.scsi_controller(1000, 0, shared_bus))
        devices.append(vmspec.network_card(4000, self.inventory.get(network), stable_uuid(f"vm-{number} mac")))
        vm.config = config
        for index, spec in enumerate(disk_specs):
            where = spec.get("datastore", datastore)
            suffix = f"_{index}" if index else ""
            path = f"[{where}] {directory}/{directory}{suffix}.vmdk"
            info = self.simulator.storage.create_disk(
                path,
                spec["bytes"],
                thin=spec.get("thin", True),
                uuid=stable_uuid(f"vm-{number} disk {index}"),
            )
            if spec["kind"] != "empty":
                self.simulator.storage.adopt(path, images.image(spec["kind"], spec["bytes"]))
            disk = vmspec.disk(
                (3000 if ide else 2000) + index,
                200 if ide else 1000,
                index,
                info,
                self.inventory.datastore(where, vm_place(self, folder)).ref,
                mode=spec.get("mode", "persistent"),
                rdm=spec.get("rdm"),
                label=f"Hard disk {index + 1}",
            )
            if encrypted:
                disk.backing.keyId = vmspec.key_id(stable_uuid(f"vm-{number} key"))
            devices.append(disk)
        if started:
            vmspec.assign_slots(devices)
        vm.power_state = "poweredOn" if running else "poweredOff"
        vm.tools_running = running
        vm.boot_time = self.simulator.start_time if running else None
        config.modified = self.simulator.clock()
        config.changeVersion = config.modified.isoformat()
        self.inventory.add(vm)
        disks.write_vmx(vm)
        if started:
            disks.ensure_nvram(vm)
            disks.ensure_log(vm)
        return vm


def vm_place(seeder: Seeder, folder: str) -> Any:
    return seeder.inventory.get(folder)


# 100 MiB and 33.5 KiB: no multiple of 64 KiB
ODD_BYTES = 100 * MIB + 67 * 512


def seed(simulator: "Simulator", vms: str) -> None:
    seeder = Seeder(simulator)
    seeder.infrastructure()
    if vms == "minimal":
        _pair(seeder, 64 * MIB, "empty", 16 * MIB + 67 * 512)
        _proxy(seeder, MIB)
    elif vms == "standard":
        _standard(seeder)
    elif vms == "demo":
        _pair(seeder, 192 * MIB, "xfs", 320 * MIB + 67 * 512, bootable=True)
        _proxy(seeder, 16 * MIB)
    else:
        raise ValueError(f"--vms is minimal, standard or demo, not {vms}")


def _pair(seeder: Seeder, first: int, second_kind: str, second: int, bootable: bool = False) -> None:
    """app01, and restore01 with empty disks of the same sizes."""
    seeder.vm(
        101,
        "app01",
        [{"kind": "bootable" if bootable else "ext4", "bytes": first}, {"kind": second_kind, "bytes": second}],
        folder="group-v7",
        firmware="bios" if bootable else "efi",
        running=True,
    )
    seeder.vm(102, "restore01", [{"kind": "empty", "bytes": first}, {"kind": "empty", "bytes": second}], host="host-11")


def _proxy(seeder: Seeder, size: int) -> None:
    """The machine that backups run on: a VM with a PVSCSI controller that sees its disks' UUIDs."""
    seeder.vm(109, proxy.PROXY, [{"kind": "empty", "bytes": size}], running=True, extra={"disk.EnableUUID": "TRUE"})


def _standard(seeder: Seeder) -> None:
    _pair(seeder, 192 * MIB, "xfs", 320 * MIB + 67 * 512)
    seeder.vm(
        103,
        "win01",
        [{"kind": "ntfs", "bytes": 64 * MIB}],
        guest=("windows2019srvNext_64Guest", "Microsoft Windows Server 2022 (64-bit)"),
    )
    seeder.vm(
        104,
        "db01",
        [
            {"kind": "ext4", "bytes": 64 * MIB},
            {"kind": "empty", "bytes": 16 * MIB, "mode": "independent_persistent"},
            {"kind": "empty", "bytes": 16 * MIB, "rdm": "physicalMode", "datastore": "vmfs01"},
        ],
        datastore="nfs01",
        host="host-11",
        running=True,
    )
    seeder.vm(105, "twin", [{"kind": "empty", "bytes": 16 * MIB}])
    seeder.vm(106, "twin", [{"kind": "empty", "bytes": 16 * MIB}], folder="group-v7", directory="twin_1")
    double = stable_uuid("duplicate bios")
    seeder.vm(107, "copy01", [{"kind": "empty", "bytes": 16 * MIB}], bios_uuid=double)
    seeder.vm(108, "copy02", [{"kind": "empty", "bytes": 16 * MIB}], bios_uuid=double)
    _proxy(seeder, 16 * MIB)
    seeder.vm(110, "template01", [{"kind": "ext4", "bytes": 64 * MIB}], template=True, started=False)
    seeder.vm(111, "new01", [{"kind": "empty", "bytes": 16 * MIB}], started=False)
    seeder.vm(
        112,
        "shared01",
        [{"kind": "empty", "bytes": 16 * MIB}],
        shared_bus="virtualSharing",
        datastore="local01",
        running=True,
    )
    seeder.vm(113, "edge01", [{"kind": "empty", "bytes": 16 * MIB}])
    seeder.vm(
        114,
        "edge01",
        [{"kind": "empty", "bytes": 16 * MIB}],
        folder="group-v22",
        datastore="vmfs11",
        host="host-29",
        pool="resgroup-28",
        network="network-31",
    )
    seeder.vm(115, "off01", [{"kind": "ext4", "bytes": 64 * MIB}], datastore="nfs01")
    seeder.vm(116, "thick01", [{"kind": "ext4", "bytes": 64 * MIB, "thin": False}])
    seeder.vm(117, "ide01", [{"kind": "ext4", "bytes": 64 * MIB}], ide=True, firmware="bios")
    seeder.vm(118, "crypt01", [{"kind": "ext4", "bytes": 64 * MIB}], encrypted=True, running=True)
    seeder.vm(119, "onvsan01", [{"kind": "ext4", "bytes": 64 * MIB}], datastore="vsan01", running=True)
    seeder.vm(120, "onvvol01", [{"kind": "ext4", "bytes": 64 * MIB}], datastore="vvol01", host="host-11")


def add_hosts(simulator: "Simulator", count: int, dvswitch: str | None = None) -> list[str]:
    """More hosts, in a cluster of their own in DC0, without datastores. -> their names

    :param dvswitch: a distributed switch that they become members of, with vmnic2.
    """
    seeder = Seeder(simulator)
    inventory = simulator.inventory
    clusters = {one.name: one for one in inventory.all(Cluster)}
    if "Cluster2" not in clusters:
        moid = simulator.new_moid("domain-c")
        clusters["Cluster2"] = Cluster(simulator, moid, "Cluster2", "group-h4")
        inventory.add(clusters["Cluster2"])
        inventory.add(ResourcePool(simulator, simulator.new_moid("resgroup"), "Resources", moid))
    known = len(clusters["Cluster2"].hosts())
    names = []
    for index in range(known, known + count):
        name = f"127.0.{2 + index // 250}.{index % 250 + 1}"
        host = seeder.host(simulator.new_moid("host"), name, clusters["Cluster2"].moid)
        names.append(host.name)
        for switch in inventory.all(networking.DistributedSwitch):
            if switch.name == dvswitch:
                switch.members[host.moid] = ["vmnic2"]
    for switch in inventory.all(networking.DistributedSwitch):
        switch.save()
    return names


def add_dvswitch(simulator: "Simulator", name: str, datacenter: str, hosts: Sequence[str]) -> str:
    """A distributed switch, also of a name that another one has in another datacenter. -> its moid

    :param hosts: names of those that become members, with vmnic3.
    """
    inventory = simulator.inventory
    place = next((one for one in inventory.all(Datacenter) if one.name == datacenter), None)
    members = [one for one in inventory.all(Host) if one.name in hosts]
    if place is None or len(members) < len(hosts):
        raise SimulatorError(f"there is no datacenter {datacenter}, or not all of the hosts {', '.join(hosts)}")
    if any(inventory.datacenter_of(one) is not place for one in members):
        raise SimulatorError("members of a distributed switch are hosts of its datacenter")
    moid = simulator.new_moid("dvs")
    switch = networking.DistributedSwitch(simulator, moid, name, place.p_networkFolder()._moId)
    if any(one.name == name and one.parent == switch.parent for one in inventory.entities.values()):
        raise SimulatorError(f"the name {name} is taken there")
    switch.uuid = stable_uuid(moid)
    switch.members = {one.moid: ["vmnic3"] for one in members}
    inventory.add(switch)
    group = networking.DistributedPortgroup(simulator, f"dvportgroup-{moid}", f"{name}-DVUplinks-{moid}", switch.parent)
    group.switch, group.key, group.uplink = moid, group.moid, True
    group.setting = networking.vlan_setting(0)
    inventory.add(group)
    return moid
