# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is made of a server's answers. That real transports work with it is for the end-to-end tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import facts
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef
from pyVmomi import vim

LUN = "naa.60003ff44dc75adc9e3e4b7f2a1b0001"
VM = VmRef(vim.VirtualMachine("vm-1"), "vm-1", "app01", "/DC0/vm/app01", "DC0", "i-uuid", "b-uuid")
VM.datacenter_moid = "datacenter-1"
HOST1, HOST2 = vim.HostSystem("host-1"), vim.HostSystem("host-2")
ALL = ["san", "hotadd", "nbdssl", "nbd", "https"]


def content(obj: Any, **properties: Any) -> Any:
    """An ObjectContent; paths are written with ``__`` for the dot."""
    given = [SimpleNamespace(name=path.replace("__", "."), val=value) for path, value in properties.items()]
    return SimpleNamespace(obj=obj, propSet=given)


def mount(host: Any, **info: Any) -> Any:
    return vim.Datastore.HostMount(
        key=host, mountInfo=vim.host.MountInfo(**{"accessMode": "readWrite", "mounted": True, **info})
    )


def vmfs(name: str = "vmfs01", mounts: Sequence[Any] = (), local: Optional[bool] = False, **changed: Any) -> Any:
    extent = vim.host.ScsiDisk.Partition(diskName=LUN, partition=1)
    volume = vim.host.VmfsVolume(name=name, majorVersion=6, extent=[extent], local=local)
    known = {
        "name": name,
        "summary__type": "VMFS",
        "info": vim.host.VmfsDatastoreInfo(name=name, vmfs=volume),
        "host": list(mounts) or [mount(HOST1)],
        **changed,
    }
    return content(vim.Datastore("datastore-1"), **known)


def machine(**changed: Any) -> Any:
    known = {"runtime__powerState": "poweredOn", "runtime__host": HOST1, "config__template": False}
    return content(VM.obj, **{**known, **changed})


class Server:
    """A session that answers reads with what it was given, and counts them."""

    stub = None
    key: Optional[str] = "session-key"

    def __init__(self, *contents: Any, hosts: Optional[Dict[str, Dict[str, Any]]] = None, answer: Any = ()) -> None:
        self.contents = list(contents)
        self.hosts = hosts or {}
        self.answer = answer
        self.reads = 0
        self.asked: List[Any] = []
        self.content = SimpleNamespace(authorizationManager=SimpleNamespace(HasPrivilegeOnEntities=None))

    def retrieve(self, _specs: Any) -> List[Any]:
        self.reads += 1
        return self.contents

    def read_many(self, objs: Sequence[Any], _kind: Any, _paths: Any) -> Dict[str, Dict[str, Any]]:
        self.reads += 1
        usual = {"name": None, "runtime.connectionState": "connected", "runtime.inMaintenanceMode": False}
        return {obj._moId: {**usual, **self.hosts.get(obj._moId, {})} for obj in objs}

    def call(self, _function: Any, entities: Any, _key: str, wanted: List[str], **_words: Any) -> Any:
        self.asked.append(([entity._moId for entity in entities], wanted))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def disk(file: str = "[vmfs01] app01/app01.vmdk", **changed: Any) -> Disk:
    known: Dict[str, Any] = dict(key=2000, label="Hard disk 1", file=file, datastore=file[1:].split("]")[0])
    known.update(capacity_bytes=1 << 30, uuid="u", change_id=None, included=True, skip_reason=None)
    return Disk(**{**known, **changed})


def read(server: Server, *disks: Disk) -> Dict[int, Any]:
    return facts.disk_facts(server, VM, disks or [disk()])  # type: ignore[arg-type]


# The disks


def test_a_disk_with_its_datastore_and_machine() -> None:
    hosts = {"host-1": {"name": "esx%2f01"}, "host-2": {"name": "esx02", "runtime.inMaintenanceMode": True}}
    server = Server(machine(config__template=True), vmfs(mounts=[mount(HOST1), mount(HOST2)]), hosts=hosts)
    found = read(server, disk(thin=True, chained=True, controller={"type": "pvscsi", "key": 1000, "bus": 0}))[2000]
    assert server.reads == 2
    assert (found.controller, found.thin, found.chained, found.capacity_bytes) == ("scsi", True, True, 1 << 30)
    store = found.datastore
    assert (store.moid, store.name, store.kind, store.vmfs_major) == ("datastore-1", "vmfs01", "VMFS", 6)
    assert (store.extents, store.local) == ((LUN,), False)
    assert [(host.moid, host.name, host.usable) for host in store.hosts] == [
        ("host-1", "esx/01", True),
        ("host-2", "esx02", False),
    ]
    vm = found.vm
    assert (vm.moid, vm.datacenter_moid, vm.host_moid, vm.power_state) == (
        "vm-1",
        "datacenter-1",
        "host-1",
        "poweredOn",
    )
    assert (vm.template, vm.encrypted, vm.snapshots) == (True, False, 0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ide", "ide"), ("sata", "sata"), ("nvme", "nvme"), ("lsilogic-sas", "scsi"), ("VirtualNewController", "scsi")],
)
def test_kinds_of_controllers(kind: str, expected: str) -> None:
    assert read(Server(machine(), vmfs()), disk(controller={"type": kind}))[2000].controller == expected
    assert read(Server(machine(), vmfs()), disk())[2000].controller == "scsi"


@pytest.mark.parametrize(
    ("local", "shared", "expected"),
    [(True, True, True), (False, False, False), (None, False, True), (None, True, False), (None, None, False)],
)
def test_whether_a_datastore_is_local(local: Optional[bool], shared: Optional[bool], expected: bool) -> None:
    """By the volume's own word; where it says nothing, by how many hosts can see it."""
    changed = {} if shared is None else {"summary__multipleHostAccess": shared}
    assert read(Server(machine(), vmfs(local=local, **changed)))[2000].datastore.local is expected


def test_only_mounts_that_work_count() -> None:
    dead = [mount(HOST1, accessible=False), mount(HOST2, mounted=False)]
    assert read(Server(machine(), vmfs(mounts=dead)))[2000].datastore.hosts == ()
    # A server that does not say so means that they do.
    silent = vim.Datastore.HostMount(key=HOST2, mountInfo=vim.host.MountInfo(accessMode="readWrite"))
    assert [host.moid for host in read(Server(machine(), vmfs(mounts=[silent])))[2000].datastore.hosts] == ["host-2"]


def test_a_datastore_without_extents_and_a_disk_on_none() -> None:
    nfs = vmfs("nfs01", summary__type="NFS", info=vim.host.NasDatastoreInfo(name="nfs01"))
    found = read(Server(machine(), nfs), disk("[nfs01] a/a.vmdk"), disk("[gone] a/b.vmdk", key=2001))
    assert (found[2000].datastore.kind, found[2000].datastore.extents) == ("NFS", ())
    assert found[2001].datastore is None and found[2001].vm is found[2000].vm


# This machine


def proxy(**changed: Any) -> Any:
    """What :func:`facts._proxy_vm` makes of a machine on host-1."""
    ref = VmRef(vim.VirtualMachine("vm-9"), "vm-9", "proxy01", "/DC0/vm/proxy01", "DC0", "i", "b")
    own = content(ref.obj, runtime__host=HOST1, **changed)
    host = content(HOST1, datastore=[vim.Datastore("datastore-1"), vim.Datastore("datastore-2")])
    server: Any = Server(own, host)
    found = facts._proxy_vm(server, ref)
    assert server.reads == 1 and found.ref is ref
    return found


def test_the_proxy_and_what_its_host_sees() -> None:
    controller = vim.vm.device.ParaVirtualSCSIController(key=1000, busNumber=0, scsiCtlrUnitNumber=7)
    found = proxy(config__hardware__device=[controller])
    assert (found.moid, found.host_moid, found.encrypted) == ("vm-9", "host-1", False)
    assert found.datastores == {"datastore-1", "datastore-2"}
    assert found.free_units > 0 and found.can_add_controller
    assert proxy(config__keyId=vim.encryption.CryptoKeyId(keyId="k")).encrypted


@pytest.mark.parametrize(
    ("flag", "options", "expected"),
    [
        (True, {}, True),
        (None, {"disk.EnableUUID": "TRUE"}, True),
        (False, {"disk.enableuuid": "1"}, True),
        (False, {"disk.EnableUUID": "FALSE"}, False),
        (None, {"other": "TRUE"}, False),
    ],
)
def test_whether_it_shows_uuids(flag: Optional[bool], options: Dict[str, str], expected: bool) -> None:
    flags = vim.vm.FlagInfo(diskUuidEnabled=flag)
    extra = [vim.option.OptionValue(key=key, value=value) for key, value in options.items()]
    assert proxy(config__flags=flags, config__extraConfig=extra).enable_uuid is expected


# What the user may do


def granted(moid: str, *lacking: str) -> Any:
    names = sorted({*facts._WRITING, *facts._ATTACHING, *facts._EXPORTING})
    manager = vim.AuthorizationManager
    return vim.AuthorizationManager.EntityPrivilege(
        entity=vim.VirtualMachine(moid),
        privAvailability=[manager.PrivilegeAvailability(privId=name, isGranted=name not in lacking) for name in names],
    )


def missing(server: Server, transports: Sequence[str], machine: Any = None, direction: str = "read") -> Dict[str, Any]:
    return facts._missing_privileges(server, VM, machine, transports, direction)  # type: ignore[arg-type]


def test_privileges_are_asked_for_where_they_are_needed() -> None:
    server = Server(answer=[granted("vm-1", "VApp.Export"), granted("vm-9", "VirtualMachine.Config.RemoveDisk")])
    assert missing(server, ALL, proxy()) == {
        "export_lease": ("VApp.Export",),
        "hotadd": ("VirtualMachine.Config.RemoveDisk",),
    }
    assert server.asked[0][0] == ["vm-1", "vm-9"]
    # What is lacking on the machine does not count on the proxy, nor what no listed transport needs.
    server = Server(answer=[granted("vm-1", *facts._ATTACHING, "VApp.Export"), granted("vm-9", *facts._READING)])
    assert missing(server, ["hotadd", "nbd"], proxy()) == {}
    server = Server(answer=[granted("vm-1", "VirtualMachine.Provisioning.DiskRandomAccess")])
    assert missing(server, ["nbd"]) == {}
    assert missing(server, ["nbd"], direction="write") == {"vddk": ("VirtualMachine.Provisioning.DiskRandomAccess",)}
    assert server.asked[-1] == (["vm-1"], sorted(facts._WRITING))


def test_the_privilege_of_an_import_is_asked_on_the_resource_pool() -> None:
    manager = vim.AuthorizationManager
    denied = manager.PrivilegeAvailability(privId="VApp.Import", isGranted=False)
    answer = manager.EntityPrivilege(entity=vim.ResourcePool("resgroup-1"), privAvailability=[denied])
    server, pool = Server(answer=[granted("vm-1"), answer]), vim.ResourcePool("resgroup-1")
    asked = facts._missing_privileges(server, VM, None, ["https"], "write", pool)  # type: ignore[arg-type]
    assert asked == {"import_lease": ("VApp.Import",)}
    assert server.asked == [(["vm-1", "resgroup-1"], ["VApp.Import"])]


def test_without_an_answer_nothing_is_missing() -> None:
    assert missing(Server(answer=VsphereError("no")), ALL) == {}
    direct = Server(answer=[granted("vm-1", *facts._READING)])
    direct.key = None
    assert missing(direct, ALL) == {} and direct.asked == []


# LUNs


def test_luns_of_these_disks_alone_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: List[str] = []

    def problems(device: str, **_options: Any) -> List[str]:
        looked.append(device)
        return ["it is mounted on /mnt", "it is used as swap"]

    monkeypatch.setattr(facts, "device_problems", problems)
    disks = read(Server(machine(), vmfs()))
    luns = {LUN: "/dev/sdb", "naa.2": "/dev/sdc"}
    assert facts._lun_problems(disks.values(), luns, "/sys") == {LUN: "it is mounted on /mnt; it is used as swap"}
    assert looked == ["/dev/sdb"]
    local = read(Server(machine(), vmfs(local=True)))
    assert facts._lun_problems(local.values(), luns, "/sys") == {} and looked == ["/dev/sdb"]


def test_plugins_are_asked_for_where_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a nbdkit that has but one plugin."""
    program = tmp_path / "nbdkit"
    program.write_text('#!/bin/sh\n[ "$1" = curl ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert facts._plugins(ALL, has_vddk=True) == {"vddk", "curl"}
    assert facts._plugins(["nbdssl"], has_vddk=False) == frozenset()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert facts._plugins(ALL, has_vddk=False) == frozenset()
