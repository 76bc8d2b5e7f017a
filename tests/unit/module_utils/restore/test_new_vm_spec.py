# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A saved configuration becomes the specification of a new machine, and the two are compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore import new_vm_diff, new_vm_spec
from ansible_collections.openvadp.backup.plugins.module_utils.restore.new_vm_spec import NewDisk, Wishes
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.configuration import from_json, to_json
from pyVmomi import vim

ROOT = Path(__file__).resolve().parents[4]
device = vim.vm.device
card = device.VirtualEthernetCard
NETWORKS = [
    {"name": "VM Network", "type": "Network", "portgroup_key": None},
    {"name": "dv-web", "type": "DistributedVirtualPortgroup", "portgroup_key": "dvportgroup-7"},
    {"name": "segment", "type": "OpaqueNetwork", "portgroup_key": None},
]


def described(label):
    return vim.Description(label=label, summary=label)


def disk(key, controller, unit, thin=True):
    backing = device.VirtualDisk.FlatVer2BackingInfo(
        fileName=f"[vmfs01] app01/app01-{key}.vmdk", diskMode="persistent", thinProvisioned=thin, uuid=f"uuid-{key}"
    )
    return device.VirtualDisk(
        key=key,
        controllerKey=controller,
        unitNumber=unit,
        capacityInBytes=1 << 20,
        capacityInKB=1 << 10,
        backing=backing,
        deviceInfo=described(f"Hard disk {key}"),
    )


def defaults():
    return [
        device.VirtualPCIController(key=100, busNumber=0),
        device.VirtualIDEController(key=200, busNumber=0),
        device.VirtualVideoCard(key=500, controllerKey=100, videoRamSizeInKB=8192),
        device.VirtualVMCIDevice(key=12000, controllerKey=100, id=1),
    ]


def config(*devices, **fields):
    return vim.vm.ConfigInfo(
        name="app01",
        uuid="bios",
        instanceUuid="old",
        version="vmx-19",
        guestId="debian12_64Guest",
        firmware="efi",
        template=False,
        hardware=vim.vm.VirtualHardware(
            numCPU=2,
            numCoresPerSocket=1,
            memoryMB=1024,
            device=[
                *defaults(),
                device.ParaVirtualSCSIController(key=1000, busNumber=0, sharedBus="noSharing", device=[2000, 2003]),
                disk(2000, 1000, 0),
                disk(2003, 1000, 3, thin=False),
                *devices,
            ],
        ),
        **fields,
    )


def wishes(**fields):
    disks = {2000: NewDisk("vmfs01", 1 << 20, True), 2003: NewDisk("nfs01", 1 << 20, False, True)}
    networks = {name: card.NetworkBackingInfo(deviceName=name) for name in ("VM Network", "dv-web", "segment")}
    given = {"name": "copy", "instance_uuid": "new", "home": "vmfs01", "disks": disks, "networks": networks}
    return Wishes(**{**given, **fields})


def design(saved, **fields):
    made = new_vm_spec.design(copied(saved), NETWORKS, wishes(**fields))
    return made, {-change.device.key: change for change in made.spec.deviceChange}


def copied(value):
    return from_json(to_json(value))


def test_disks_and_controllers_are_made_in_their_places():
    made, changes = design(config(device.VirtualLsiLogicSASController(key=1001, busNumber=2), disk(2016, 1001, 5)))
    assert list(changes) == [1000, 1001, 2000, 2003]  # controllers first; what every machine has is not added
    assert changes[1001].device.busNumber == 2
    assert (changes[2003].device.controllerKey, changes[2003].device.unitNumber) == (-1000, 3)
    thin, thick = changes[2000], changes[2003]
    assert thin.fileOperation == thick.fileOperation == "create"
    assert (thin.device.backing.fileName, thin.device.backing.thinProvisioned) == ("", True)
    assert (thick.device.backing.fileName, thick.device.backing.eagerlyScrub) == ("[nfs01]", True)
    assert thin.device.backing.uuid is None
    assert made.warnings == ["Hard disk 2016: it is not restored, so the new machine does not have it"]
    assert made.told == {2016}
    spec = made.spec
    assert (spec.name, spec.instanceUuid, spec.uuid, spec.files.vmPathName) == ("copy", "new", "bios", "[vmfs01]")
    assert (spec.version, spec.firmware, spec.numCPUs, spec.memoryMB) == ("vmx-19", "efi", 2, 1024)
    assert spec.changeTrackingEnabled is None


def test_cards_keep_address_and_slot_and_go_to_their_networks():
    slot = device.VirtualDevice.PciBusSlotInfo(pciSlotNumber=192)
    port = vim.dvs.PortConnection(switchUuid="s", portgroupKey="dvportgroup-7", portKey="12")
    saved = config(
        device.VirtualVmxnet3(
            key=4000,
            controllerKey=100,
            addressType="assigned",
            macAddress="00:50:56:00:00:01",
            slotInfo=slot,
            backing=card.NetworkBackingInfo(deviceName="VM Network"),
            connectable=device.VirtualDevice.ConnectInfo(startConnected=False, connected=True, status="ok"),
        ),
        device.VirtualE1000(
            key=4001, addressType="manual", macAddress="m", backing=card.DistributedVirtualPortBackingInfo(port=port)
        ),
        device.VirtualVmxnet3(key=4002, backing=card.OpaqueNetworkBackingInfo(opaqueNetworkId="x-1")),
    )
    names = [new_vm_spec.network_of(one, NETWORKS) for one in new_vm_spec.cards_of(saved)]
    assert names == ["VM Network", "dv-web", "segment"]
    # By its id where that was saved, however many there are; a point that does not tell it may have one alone.
    known = [{"name": f"segment-{one}", "type": "OpaqueNetwork", "opaque_network_id": f"x-{one}"} for one in (0, 1)]
    last = new_vm_spec.cards_of(saved)[-1]
    assert new_vm_spec.network_of(last, [*NETWORKS, *known]) == "segment-1"
    assert new_vm_spec.network_of(last, known[:1]) == new_vm_spec.network_of(last, NETWORKS + NETWORKS) == "x-1"
    _made, changes = design(saved)
    first = changes[4000].device
    assert (first.macAddress, first.slotInfo.pciSlotNumber) == ("00:50:56:00:00:01", 192)
    assert (first.connectable.connected, first.connectable.status) == (False, None)
    assert changes[4001].device.backing.deviceName == "dv-web"
    _made, changes = design(saved, mac_addresses="new", bios_uuid="new")
    assert [changes[key].device.macAddress for key in (4000, 4001)] == [None, None]
    assert changes[4001].device.addressType == "assigned" and _made.spec.uuid is None


def test_odd_devices_are_left_away_with_a_warning():
    iso = device.VirtualCdrom.IsoBackingInfo
    saved = config(
        device.VirtualUSBXHCIController(key=14000, busNumber=0),
        device.VirtualUSB(key=14001, deviceInfo=described("Stick")),
        device.VirtualPCIPassthrough(key=13000, deviceInfo=described("GPU")),
        device.VirtualSerialPort(key=9000, deviceInfo=described("Serial")),
        device.VirtualSriovEthernetCard(key=4000, deviceInfo=described("SR-IOV")),
        device.VirtualCdrom(key=3000, controllerKey=200, unitNumber=0, backing=iso(fileName="[nfs01] gone.iso")),
        device.VirtualCdrom(key=3001, controllerKey=200, unitNumber=1, backing=iso(fileName="[nfs01] here.iso")),
        device.VirtualCdrom(key=3002, backing=device.VirtualCdrom.AtapiBackingInfo(deviceName="/dev/cdrom")),
        device.VirtualFloppy(key=8000, backing=device.VirtualFloppy.RemoteDeviceBackingInfo(deviceName="")),
    )
    made, changes = design(saved, missing_files=["[nfs01] gone.iso"])
    assert set(changes) == {1000, 2000, 2003, 3000, 3001, 3002, 8000, 14000}
    told = "\n".join(made.warnings)
    for word in ("Stick", "GPU", "Serial", "SR-IOV", "gone.iso is not there", "drive of the host"):
        assert word in told
    assert isinstance(changes[3000].device.backing, device.VirtualCdrom.RemotePassthroughBackingInfo)
    assert changes[3001].device.backing.fileName == "[nfs01] here.iso"
    assert changes[3001].device.controllerKey == 200
    assert made.told == {14001, 13000, 9000, 4000, 3000, 3002}
    assert new_vm_spec.image_files_of(saved) == ["[nfs01] gone.iso", "[nfs01] here.iso"]


def test_a_virtual_tpm_is_refused_or_dropped():
    saved = config(
        device.VirtualTPM(key=11000, deviceInfo=described("TPM")), keyId=vim.encryption.CryptoKeyId(keyId="k")
    )
    with pytest.raises(InputError, match="set vtpm to drop"):
        design(saved)
    made, changes = design(saved, vtpm="drop")
    assert 11000 not in changes and len(made.warnings) == 2
    assert "TPM: its content is in no backup" in made.warnings[0] and "was encrypted" in made.warnings[1]


def test_settings_of_one_host_or_one_run_stay_behind():
    settings = {
        "nvram": False,
        "scsi0:0.ctkEnabled": False,
        "sched.swap.derivedName": False,
        "vmware.tools.internalversion": False,
        "migrate.hostLog": False,
        "uuid.location": False,
        "ethernet0.pciSlotNumber": True,
        "scsi0.pciSlotNumber": True,
        "disk.EnableUUID": True,
        "guestinfo.role": True,
        "svga.present": True,
    }
    options = [vim.option.OptionValue(key=key, value="1") for key in settings]
    made, _changes = design(
        config(extraConfig=options, flags=vim.vm.FlagInfo(diskUuidEnabled=True, snapshotLocked=True))
    )
    assert [option.key for option in made.spec.extraConfig] == [key for key, kept in settings.items() if kept]
    assert (made.spec.flags.diskUuidEnabled, made.spec.flags.snapshotLocked) == (True, None)


def test_the_boot_order_and_the_video_card_wait_for_the_keys():
    boot = vim.vm.BootOptions
    order = [boot.BootableDiskDevice(deviceKey=2003), boot.BootableCdromDevice(), boot.BootableDiskDevice(deviceKey=9)]
    saved = config(bootOptions=boot(bootDelay=5, bootOrder=order))
    saved.hardware.device[2].videoRamSizeInKB = 16384
    made, _changes = design(saved)
    assert made.spec.bootOptions.bootDelay == 5 and not made.spec.bootOptions.bootOrder
    new = config()
    for one in new.hardware.device:
        if one.key == 2003:
            one.key = 2103
    spec = new_vm_spec.finish_spec(saved, new)
    assert [getattr(entry, "deviceKey", None) for entry in spec.bootOptions.bootOrder] == [2103, None]
    assert [(change.operation, change.device.videoRamSizeInKB) for change in spec.deviceChange] == [("edit", 16384)]
    assert new_vm_spec.finish_spec(config(), config()) is None


def test_products_and_processor_masks_come_back():
    product = vim.vApp.ProductInfo(key=1, name="appliance")
    saved = config(
        vAppConfig=vim.vApp.VmConfigInfo(product=[product], installBootRequired=False),
        cpuFeatureMask=[vim.host.CpuIdInfo(level=1, ecx="----")],
    )
    made, _changes = design(saved)
    assert made.spec.vAppConfig.product[0].info.name == "appliance"
    assert (made.spec.cpuFeatureMask[0].operation, made.spec.cpuFeatureMask[0].info.level) == ("add", 1)


def test_only_what_must_differ_differs():
    saved = config(annotation="mine", extraConfig=[vim.option.OptionValue(key="nvram", value="app01.nvram")])
    made = copied(saved)
    made.name, made.instanceUuid, made.extraConfig = "copy", "new", []
    for one in made.hardware.device:
        if isinstance(one, device.VirtualDisk):
            one.key += 10
            one.backing.uuid = f"other-{one.key}"
    found = new_vm_diff.differences(saved, made, {"name"})
    assert {one.path for one in found} == {
        "name",
        "instanceUuid",
        "extraConfig[nvram]",
        *(f"hardware.device[{key}].{name}" for key in (2000, 2003) for name in ("key", "backing.uuid")),
    }
    assert all(one.reason for one in found)
    assert [one.path for one in new_vm_diff.differences(saved, made, set()) if one.reason is None] == ["name"]


@pytest.mark.parametrize(
    "path", ["annotation", "hardware.memoryMB", "uuid", "hardware.device[4000].slotInfo.pciSlotNumber"]
)
def test_anything_else_is_told(path):
    saved = config(
        device.VirtualVmxnet3(
            key=4000, macAddress="m", slotInfo=device.VirtualDevice.PciBusSlotInfo(pciSlotNumber=192)
        ),
        annotation="mine",
    )
    made = copied(saved)
    made.annotation, made.hardware.memoryMB, made.uuid = "other", 1, "other"
    made.hardware.device[-1].slotInfo.pciSlotNumber = 160
    found = {one.path: one for one in new_vm_diff.differences(saved, made, set())}
    assert found[path].reason is None and "unexpected" in str(found[path])


def test_what_a_warning_told_of_is_explained():
    saved = config(device.VirtualSerialPort(key=9000, yieldOnPoll=True))
    found = new_vm_diff.differences(saved, config(), set(), {9000})
    assert found and {one.reason for one in found} == {"a warning reports it", "the server numbers devices"}


def test_the_page_has_the_written_list():
    page = (ROOT / "docs" / "restore.md").read_text(encoding="utf-8")
    table = page.split("| field | why | only with |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row[0].startswith("---")]
    assert [row[1] for row in rows] == [rule.why for rule in new_vm_diff.MUST_DIFFER]
    for row, rule in zip(rows, new_vm_diff.MUST_DIFFER):
        named = set(re.findall(r"[A-Za-z]{3,}", row[0])) - {"device"}
        assert named <= set(re.findall(r"[A-Za-z]+", rule.pattern)) | {"backing"}, row
        assert bool(row[2]) == (rule.only is not None)
    settings = page.split("| setting | why |")[1]
    assert all(f"| {why} |" in settings for _pattern, why in new_vm_spec.LEFT_SETTINGS)
