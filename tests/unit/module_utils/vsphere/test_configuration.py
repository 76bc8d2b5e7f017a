# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import datetime
import json

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import configuration
from hypothesis import given, settings
from hypothesis import strategies as st
from pyVmomi import SoapAdapter, VmomiSupport, vim

device = vim.vm.device


def xml(value):
    """What the value is on the wire: data objects don't compare, their serialisation does."""
    return SoapAdapter.Serialize(value, version="vim.version.v8_0_2_0")


def complete(value):
    """Give every mandatory property a value, without which nothing goes on the wire."""
    for prop in value._GetPropertyList():
        held = getattr(value, prop.name)
        if held is None and not prop.flags & VmomiSupport.F_OPTIONAL:
            if issubclass(prop.type, VmomiSupport.DataObject):
                held = prop.type()
            elif issubclass(prop.type, VmomiSupport.Enum):
                held = prop.type(next(name for name in vars(prop.type) if not name.startswith("_")))
            elif issubclass(prop.type, datetime.datetime):
                held = datetime.datetime(2026, 11, 22, tzinfo=datetime.timezone.utc)
            else:
                held = prop.type("key-1")
            setattr(value, prop.name, held)
        for item in held if isinstance(held, list) else [held]:
            if isinstance(item, VmomiSupport.DataObject):
                complete(item)
    return value


def round_trip(value):
    return configuration.from_json(json.loads(json.dumps(configuration.to_json(value))))


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
moments = st.datetimes(
    min_value=datetime.datetime(1990, 1, 1),
    max_value=datetime.datetime(2090, 1, 1),
    timezones=st.just(datetime.timezone.utc),
)
anything = st.one_of(
    text,
    st.booleans(),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**63), 2**63 - 1).map(VmomiSupport.long),
    st.integers(-128, 127).map(VmomiSupport.byte),
    st.integers(-(2**15), 2**15 - 1).map(VmomiSupport.short),
    st.floats(allow_nan=False, allow_infinity=False).map(VmomiSupport.double),
    st.binary(max_size=8).map(VmomiSupport.binary),
    moments,
    st.sampled_from(["poweredOn", "suspended"]).map(vim.VirtualMachine.PowerState),
    st.lists(text, min_size=1, max_size=3).map(VmomiSupport.GetVmodlType("string[]")),
    st.just(vim.Datastore("datastore-1")),
    st.builds(vim.KeyValue, key=text, value=text),
)
options = st.builds(vim.option.OptionValue, key=text, value=anything)
backings = st.one_of(
    st.builds(
        device.VirtualDisk.FlatVer2BackingInfo,
        fileName=text,
        diskMode=st.sampled_from(["persistent", "independent_persistent"]),
        thinProvisioned=st.one_of(st.none(), st.booleans()),
        changeId=st.one_of(st.none(), text),
        datastore=st.just(vim.Datastore("datastore-7")),
        parent=st.one_of(
            st.none(), st.builds(device.VirtualDisk.FlatVer2BackingInfo, fileName=text, diskMode=st.just("append"))
        ),
    ),
    st.builds(device.VirtualDisk.SeSparseBackingInfo, fileName=text, diskMode=st.just("persistent")),
)
disks = st.builds(
    device.VirtualDisk,
    key=st.integers(0, 9999),
    capacityInKB=st.integers(0, 2**50).map(VmomiSupport.long),
    capacityInBytes=st.integers(0, 2**60).map(VmomiSupport.long),
    unitNumber=st.one_of(st.none(), st.integers(0, 63)),
    deviceInfo=st.builds(vim.Description, label=text, summary=text),
    backing=backings,
)
controllers = st.builds(
    device.ParaVirtualSCSIController,
    key=st.integers(0, 9999),
    busNumber=st.integers(0, 3),
    device=st.lists(st.integers(0, 9999), max_size=3),
    sharedBus=st.sampled_from(["noSharing", "virtualSharing"]),
)
configs = st.builds(
    vim.vm.ConfigInfo,
    name=text,
    modified=moments,
    changeVersion=text,
    annotation=st.one_of(st.none(), text),
    template=st.booleans(),
    extraConfig=st.lists(options, max_size=4),
    hardware=st.builds(
        vim.vm.VirtualHardware,
        numCPU=st.integers(1, 64),
        memoryMB=st.integers(4, 10**6),
        device=st.lists(st.one_of(disks, controllers), max_size=4),
    ),
    files=st.builds(vim.vm.FileInfo, vmPathName=text),
    createDate=st.one_of(st.none(), moments),
)


@settings(max_examples=150)
@given(configs)
def test_a_configuration_survives_json(config):
    complete(config)
    back = round_trip(config)
    assert xml(back) == xml(config)
    assert configuration.to_json(back) == configuration.to_json(config)


@settings(max_examples=200)
@given(options)
def test_what_anything_holds_keeps_its_type(option):
    back = round_trip(option).value
    assert type(back) is type(option.value)
    if not isinstance(back, VmomiSupport.DataObject):
        assert back == option.value


def test_unknown_type_and_format_say_what_to_do():
    with pytest.raises(InputError, match="pyVmomi"):
        configuration.from_json({"_type": "vim.vm.OfTheFuture"})
    with pytest.raises(InputError, match="format 9"):
        configuration.restore_config({"format": 9})


def test_our_keys_are_not_restored():
    options = [
        vim.option.OptionValue(key=key, value="1")
        for key in ("nvram", "openvadp.mark.a", "OpenVADP.id.b.c", "guestinfo.openvadp.x")
    ]
    saved = {"format": 1, "config": configuration.to_json(vim.vm.ConfigInfo(extraConfig=options))}
    restored = configuration.restore_config(saved)
    assert [option.key for option in restored.extraConfig] == ["nvram", "guestinfo.openvadp.x"]


def test_save_names_what_surrounds_the_machine(session, stub, vm, make):
    host = vim.HostSystem("host-1", stub)
    cluster = stub.add(vim.ClusterComputeResource("domain-c1", stub), name="cluster1")
    stub.add(host, name="esx01", parent=cluster)
    root_pool = stub.add(vim.ResourcePool("resgroup-1", stub), name="Resources", parent=cluster)
    pool = stub.add(vim.ResourcePool("resgroup-2", stub), name="prod", parent=root_pool)
    switch = stub.add(vim.dvs.VmwareDistributedVirtualSwitch("dvs-1", stub), name="dvs", uuid="50 2f")
    plain = stub.add(vim.Network("network-1", stub), name="VM Network")
    group = stub.add(
        vim.dvs.DistributedVirtualPortgroup("dvportgroup-1", stub),
        name="backup",
        key="dvportgroup-1",
        config__distributedVirtualSwitch=switch,
    )
    opaque = stub.add(
        vim.OpaqueNetwork("network-o2", stub),
        name="segment",
        summary=vim.OpaqueNetwork.Summary(
            name="segment", opaqueNetworkId="5f3c", opaqueNetworkType="nsx.LogicalSwitch"
        ),
    )
    datastore = stub.add(
        vim.Datastore("datastore-1", stub), name="vmfs01", summary__type="VMFS", summary__url="ds:///vmfs/1/"
    )
    config = vim.vm.ConfigInfo(
        name="app01",
        modified=datetime.datetime(2026, 11, 22, tzinfo=datetime.timezone.utc),
        guestId="debian12_64Guest",
        guestFullName="Debian 12",
        version="vmx-19",
        firmware="efi",
        files=vim.vm.FileInfo(vmPathName="[vmfs01] app01/app01.vmx"),
        hardware=vim.vm.VirtualHardware(device=[make.scsi_controller(), make.disk()]),
    )
    stub.add(vim.vm.Snapshot("snapshot-1", stub), config=complete(config))
    file_kind = vim.vm.FileLayoutEx.FileInfo
    stub.add(
        vm.obj,
        name="app01",
        runtime__host=host,
        runtime__powerState="poweredOn",
        resourcePool=pool,
        network=[plain, group, opaque],
        datastore=[datastore],
        layoutEx__file=[file_kind(key=0, name="[vmfs01] app01/app01.nvram", type="nvram", size=8684)],
    )

    class Taken:
        obj = vim.vm.Snapshot("snapshot-1", stub)

    saved = json.loads(json.dumps(configuration.save(session, vm, Taken())))
    assert stub.names() == ["RetrievePropertiesEx"] * 3
    assert (saved["host"], saved["cluster"], saved["resource_pool"]) == ("esx01", "cluster1", "Resources/prod")
    assert [network["switch"] for network in saved["networks"]] == [None, {"name": "dvs", "uuid": "50 2f"}, None]
    assert [network["opaque_network_id"] for network in saved["networks"]] == [None, None, "5f3c"]
    assert saved["networks"][1]["portgroup_key"] == "dvportgroup-1"
    assert saved["datastores"][0]["name"] == "vmfs01"
    assert saved["files"] == [{"name": "[vmfs01] app01/app01.nvram", "type": "nvram", "size_bytes": 8684}]
    assert saved["vm"]["folder"] == "/DC0/vm" and saved["firmware"] == "efi"
    assert xml(configuration.restore_config(saved)) == xml(config)


def test_a_never_started_machine_has_no_nvram(session, stub, vm):
    assert configuration.nvram(session, vm, [{"name": "[a] a.vmx", "type": "config", "size_bytes": 1}]) is None
