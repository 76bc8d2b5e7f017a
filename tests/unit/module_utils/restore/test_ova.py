# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Dict, List
from xml.etree import ElementTree

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError, InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore import ova, to_file
from ansible_collections.openvadp.backup.plugins.module_utils.restore.ovf import PackedDisk, descriptor
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import DiskChoice, RestoreRequest

CLUSTER = 64 << 10
CAPACITY = (3 << 20) + 5 * 512
OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
VMW = "{http://www.vmware.com/schema/ovf}"


def saved(**changes: Any) -> Dict[str, Any]:
    """A configuration as it is saved, with what matters here."""
    kind = "vim.vm.device."
    devices: List[Dict[str, Any]] = [
        {"_type": kind + "VirtualIDEController", "key": 200, "busNumber": 0},
        {
            "_type": kind + "ParaVirtualSCSIController",
            "key": 1000,
            "busNumber": 0,
            "deviceInfo": {"_type": "vim.Description", "label": "SCSI controller 0"},
        },
        {"_type": kind + "VirtualDisk", "key": 2000, "controllerKey": 1000, "unitNumber": 3},
        {
            "_type": kind + "VirtualVmxnet3",
            "key": 4000,
            "backing": {"deviceName": "Büro <1>"},
            "deviceInfo": {"_type": "vim.Description", "label": "Network adapter 1"},
        },
        {"_type": kind + "VirtualE1000", "key": 4001, "backing": {"port": {"portgroupKey": "dvportgroup-7"}}},
        {"_type": kind + "VirtualVmxnet3", "key": 4002, "backing": {"opaqueNetworkId": "5f3c-2"}},
        {"_type": kind + "VirtualVmxnet3", "key": 4003, "backing": {"opaqueNetworkId": "5f3c-9"}},
        {"_type": kind + "VirtualUSB", "key": 8000},
    ]
    hardware = {"numCPU": 4, "numCoresPerSocket": 2, "memoryMB": 3072, "device": devices}
    document = {
        "format": 1,
        "guest_id": "debian12_64Guest",
        "guest_full_name": "Debian GNU/Linux 12 (64-bit)",
        "hardware_version": "vmx-19",
        "firmware": "efi",
        "networks": [
            {"name": "dv-backup", "portgroup_key": "dvportgroup-7"},
            {"name": "segment-1", "type": "OpaqueNetwork", "opaque_network_id": "5f3c-1"},
            {"name": "segment-2", "type": "OpaqueNetwork", "opaque_network_id": "5f3c-2"},
        ],
        "config": {
            "annotation": "first & last\x01",
            "hardware": hardware,
            "bootOptions": {"efiSecureBootEnabled": True},
        },
    }
    document.update(changes)
    return document


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    folder = tmp_path / "dest"
    folder.mkdir()
    return folder


@pytest.fixture
def disk(world: Any) -> bytes:
    """Point p1; the bytes of its one disk, which do not compress."""
    data = bytearray(CAPACITY)
    writes = [(0, random.Random(1).randbytes(9 * CLUSTER)), (3 << 20, b"tail" * 640)]
    for offset, piece in writes:
        data[offset : offset + len(piece)] = piece
    world.config = saved()
    world.point("p1", CAPACITY, writes)
    return bytes(data)


def restore(world: Any, dest: Path, check_mode: bool = False, **options: Any) -> Dict[str, Any]:
    fields: Dict[str, Any] = {"repository": str(world.repository.path), "vm_uuid": world.store.uuid, "dest": str(dest)}
    return to_file.restore_point(RestoreRequest(**{**fields, "format": "ova", **options}), check_mode)


def test_an_ova_is_whole_in_order_and_holds_the_points_bytes(world: Any, dest: Path, disk: bytes) -> None:
    planned = restore(world, dest, check_mode=True)
    assert planned["changed"] and os.listdir(dest) == []
    result = restore(world, dest)
    path = dest / "app01.ova"
    assert result["changed"] and os.listdir(dest) == ["app01.ova"]
    assert [entry["target"] for entry in result["restored"] + planned["restored"]] == [str(path)] * 2
    assert result["restored"][0]["verified"] is True and result["restored"][0]["format"] == "ova"
    assert "Hard disk 2 (independent disk)" in result["warnings"][0]
    out = dest / "out"
    out.mkdir()
    # By GNU tar and sha256sum, not by code of ours.
    listed = subprocess.run(["tar", "-tf", str(path)], check=True, capture_output=True, text=True).stdout.split()
    assert listed == ["app01.ovf", "app01.mf", "app01-disk-2000.vmdk", "app01.nvram"]
    subprocess.run(["tar", "-xf", str(path), "-C", str(out)], check=True)
    sums = (out / "app01.mf").read_text()
    assert sums.splitlines()[0].startswith("SHA256(app01.ovf)= ")
    as_coreutils = "".join(f"{line[-64:]}  {line[len('SHA256(') : -67]}\n" for line in sums.splitlines())
    subprocess.run(["sha256sum", "-c", "--quiet", "-"], cwd=out, input=as_coreutils, text=True, check=True)
    assert len(sums.splitlines()) == 3 and (out / "app01.nvram").read_bytes() == b"nvram of p1"
    vmdk = out / "app01-disk-2000.vmdk"
    assert b'createType="streamOptimized"' in vmdk.read_bytes()[:65536]
    subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(vmdk), str(out / "flat")], check=True)
    assert (out / "flat").read_bytes() == disk
    envelope = ElementTree.parse(str(out / "app01.ovf")).getroot()
    sizes = {file.get(OVF + "href"): int(str(file.get(OVF + "size"))) for file in envelope.iter(OVF + "File")}
    assert sizes == {name: (out / name).stat().st_size for name in ("app01-disk-2000.vmdk", "app01.nvram")}


def test_a_second_run_changes_nothing_and_a_changed_file_is_replaced_on_request(
    world: Any, dest: Path, disk: bytes
) -> None:
    restore(world, dest)
    path = dest / "app01.ova"
    before = path.stat().st_mtime_ns
    again = restore(world, dest)
    assert again["changed"] is False and again["restored"][0]["verified"] is True
    assert again["diff"]["before"] == again["diff"]["after"] and path.stat().st_mtime_ns == before
    whole = path.read_bytes()
    with tarfile.open(str(path)) as archive:
        within = {member.name: member.offset_data for member in archive}
    changed = {
        name: whole[: offset + 600] + bytes([whole[offset + 600] ^ 1]) + whole[offset + 601 :]
        for name, offset in within.items()
        if name not in ("app01.mf", "app01.nvram")
    }
    changed["cut"] = whole[: len(whole) // 2]
    changed["no archive"] = b"x" * 4096
    for name, content in changed.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match="other content"):
            restore(world, dest)
        assert path.read_bytes() == content, name
    result = restore(world, dest, overwrite=True)
    assert result["changed"] and restore(world, dest)["changed"] is False


def test_the_descriptor_says_what_the_machine_was() -> None:
    disks = [PackedDisk(2000, "Hard disk 1", "a.vmdk", 4711, 1 << 30)]
    text = descriptor(saved(), "app <01>", disks)
    envelope = ElementTree.fromstring(text)
    system = envelope.find(OVF + "VirtualSystem")
    assert system is not None and system.get(OVF + "id") == "app <01>"
    assert [section.tag.rpartition("}")[2] for section in envelope] == [
        "References",
        "DiskSection",
        "NetworkSection",
        "VirtualSystem",
    ]
    items = {}
    for item in system.iter(OVF + "Item"):
        found = {element.tag.rpartition("}")[2]: element.text for element in item}
        own = [element.tag.rpartition("}")[2] for element in item if element.tag.startswith(RASD)]
        assert own == sorted(own), own
        items[found["InstanceID"]] = found
    types = ("3", "4", "6", "10", "17")
    by_type = {kind: [item for item in items.values() if item["ResourceType"] == kind] for kind in types}
    assert by_type["3"][0]["VirtualQuantity"] == "4" and by_type["3"][0]["CoresPerSocket"] == "2"
    assert by_type["4"][0]["VirtualQuantity"] == "3072"
    # Of the controllers that which a disk is attached to, and nothing that an OVF can't carry.
    assert len(items) == 8 and by_type["6"][0]["ResourceSubType"] == "VirtualSCSI"
    disk = by_type["17"][0]
    assert (disk["Parent"], disk["AddressOnParent"]) == (by_type["6"][0]["InstanceID"], "3")
    assert disk["HostResource"] == "ovf:/disk/vmdisk-2000"
    assert [(item["Connection"], item["ResourceSubType"]) for item in by_type["10"]] == [
        ("Büro <1>", "VmxNet3"),
        ("dv-backup", "E1000"),
        ("segment-2", "VmxNet3"),
        ("5f3c-9", "VmxNet3"),
    ]
    networks = [network.get(OVF + "name") for network in envelope.iter(OVF + "Network")]
    assert networks == ["Büro <1>", "dv-backup", "segment-2", "5f3c-9"]
    settings = {entry.get(VMW + "key"): entry.get(VMW + "value") for entry in system.iter(VMW + "Config")}
    assert settings == {"firmware": "efi", "bootOptions.efiSecureBootEnabled": "true"}
    operating = system.find(OVF + "OperatingSystemSection")
    assert operating is not None and operating.attrib == {OVF + "id": "101", VMW + "osType": "debian12_64Guest"}
    assert "first &amp; last?" in text


def test_too_little_was_saved(world: Any, dest: Path) -> None:
    disks = [PackedDisk(2004, "Hard disk 5", "a.vmdk", 4711, 1 << 30)]
    with pytest.raises(InputError, match="which controller.*disk 2004"):
        descriptor(saved(), "app01", disks)
    world.point("p1", CAPACITY, [(0, b"a" * 512)])
    with pytest.raises(InputError, match="not enough for an OVF descriptor"):
        restore(world, dest)
    assert os.listdir(dest) == []


def test_damage_and_choices_are_refused_before_anything_is_written(
    world: Any, dest: Path, disk: bytes, flip: Any
) -> None:
    with pytest.raises(InputError, match="one format"):
        restore(world, dest, disks=[DiskChoice(2000, format="raw")])
    flip(world.store.config_path("p1"), 20)
    with pytest.raises(DamagedError, match="configuration.*BLAKE3 differs"):
        restore(world, dest)
    flip(world.store.config_path("p1"), 20)
    flip(world.store.layer_path(2000, "p1"), 300000)
    with pytest.raises(DamagedError, match="nothing was written"):
        restore(world, dest)
    assert os.listdir(dest) == []


def test_what_can_not_be_written_leaves_nothing(
    world: Any, dest: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_args: Any, **_options: Any) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(ova.image, "compare", compare)
        with pytest.raises(DataPathError, match="differ when read back"):
            restore(world, dest)
    assert os.listdir(dest) == []


def test_an_ova_is_its_owners_alone_and_a_pipe_at_its_place_is_refused(world: Any, dest: Path, disk: bytes) -> None:
    before = os.umask(0)
    try:
        restore(world, dest)
    finally:
        os.umask(before)
    path = dest / "app01.ova"
    with tarfile.open(str(path)) as archive:
        assert {member.mode for member in archive} == {0o600}
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not an ordinary file"):
        restore(world, dest, overwrite=True)


def test_what_a_killed_restore_left_goes_with_the_next(world: Any, dest: Path, disk: bytes) -> None:
    program = (
        "import os, sys\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.restore import ova, to_file\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "to_file.restore_point(RestoreRequest(repository=sys.argv[1], vm_uuid=sys.argv[2], dest=sys.argv[3],"
        " format='ova'), False)\n"
    )
    arguments = [str(world.repository.path), world.store.uuid, str(dest)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=False)
    left = sorted(os.listdir(dest))
    assert done.returncode == -9 and len(left) == 1 and not (dest / "app01.ova").exists()
    restore(world, dest)
    assert os.listdir(dest) == ["app01.ova"]
