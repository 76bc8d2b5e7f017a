# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import disks_of, vm_obstacles
from pyVmomi import vim

device = vim.vm.device


def test_a_disk_is_read_verbatim(make):
    found = disks_of(
        [
            make.scsi_controller(),
            make.disk(file="[ds 1] app01/app01-000002.vmdk", changeId="52 de c0/81", thinProvisioned=True),
        ]
    )
    assert [item.to_dict() for item in found] == [
        {
            "key": 2000,
            "label": "Hard disk 1",
            "file": "[ds 1] app01/app01-000002.vmdk",
            "datastore": "ds 1",
            "capacity_bytes": 8 << 30,
            "uuid": "6000C29e-2000",
            "change_id": "52 de c0/81",
            "included": True,
            "skip_reason": None,
            "controller": {"type": "pvscsi", "key": 1000, "bus": 0},
            "unit": 0,
            "thin": True,
            "mode": "persistent",
            "encrypted": False,
        }
    ]


@pytest.mark.parametrize(
    "kind, expected",
    [
        (device.VirtualLsiLogicController, "lsilogic"),
        (device.VirtualLsiLogicSASController, "lsilogic-sas"),
        (device.VirtualIDEController, "ide"),
        (device.VirtualAHCIController, "sata"),
        (device.VirtualNVMEController, "nvme"),
    ],
)
def test_controllers(make, kind, expected):
    found = disks_of([kind(key=1000, busNumber=1), make.disk()])
    assert found[0].controller == {"type": expected, "key": 1000, "bus": 1}


def test_capacity_falls_back_to_kilobytes(make):
    old = make.disk()
    old.capacityInBytes = None
    old.capacityInKB = 3
    assert disks_of([old])[0].capacity_bytes == 3072


def rdm(mode):
    return device.VirtualDisk.RawDiskMappingVer1BackingInfo(
        fileName="[a] b.vmdk", compatibilityMode=mode, diskMode="persistent", uuid="u"
    )


def test_what_no_snapshot_holds(make):
    devices = [
        make.disk(2000, diskMode="independent_persistent"),
        make.disk(2001, diskMode="independent_nonpersistent"),
        make.disk(2002),
        make.disk(2003),
        make.disk(2004, keyId=vim.encryption.CryptoKeyId(keyId="k")),
    ]
    devices[2].backing = rdm("physicalMode")
    devices[3].backing = rdm("virtualMode")
    found = disks_of(devices)
    assert [item.included for item in found] == [False, False, False, True, True]
    assert "independent_persistent" in found[0].skip_reason
    assert "physical" in found[2].skip_reason
    assert found[4].encrypted and not found[3].encrypted


def config(devices, template=False):
    return vim.vm.ConfigInfo(template=template, hardware=vim.vm.VirtualHardware(device=devices))


def test_an_ordinary_machine_has_no_obstacle(make):
    plain = [make.scsi_controller(sharedBus="noSharing"), make.disk(), device.VirtualNVMEController(key=31000)]
    assert vm_obstacles(config(plain)) == []


def test_obstacles(make):
    assert "template" in vm_obstacles(config([], template=True))[0]
    assert "physicalSharing" in vm_obstacles(config([make.scsi_controller(sharedBus="physicalSharing")]))[0]
    nvme = device.VirtualNVMEController(key=31000, sharedBus="physicalSharing")
    assert "shares its bus" in vm_obstacles(config([nvme]))[0]
    passthrough = device.VirtualPCIPassthrough(
        key=13000, backing=device.VirtualPCIPassthrough.DeviceBackingInfo(id="0")
    )
    assert "passthrough" in vm_obstacles(config([passthrough]))[0]
    shared = make.disk(sharing="sharingMultiWriter")
    assert "multi-writer" in vm_obstacles(config([shared]))[0]
    shared.backing.diskMode = "independent_persistent"
    assert vm_obstacles(config([shared])) == []


def test_what_excludes_snapshots_is_none_of_a_template(make):
    passthrough = device.VirtualPCIPassthrough(
        key=13000, backing=device.VirtualPCIPassthrough.DeviceBackingInfo(id="0")
    )
    assert vm_obstacles(config([passthrough, make.disk()], template=True), snapshot=False) == []
    bus = make.scsi_controller(sharedBus="physicalSharing")
    assert "physicalSharing" in vm_obstacles(config([bus], template=True), snapshot=False)[0]
