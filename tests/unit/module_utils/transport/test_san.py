# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.transport.san import allow_list, visible_luns
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import Vddk, write_config

ID = "600a098038303053453f463045727654"


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (f"scsi-3{ID}", f"naa.{ID}"),
        (f"wwn-0x{ID}", f"naa.{ID}"),
        (f"naa.{ID}", f"naa.{ID}"),
        (f"wwn-0x{ID.upper()}", f"naa.{ID}"),
        (f"dm-uuid-mpath-3{ID}", f"naa.{ID}"),
        ("scsi-35000c500a0b1c2d3", "naa.5000c500a0b1c2d3"),
        ("nvme-eui.00a0750125d1b2c3", "eui.00a0750125d1b2c3"),
        (f"scsi-3{ID}-part1", None),
        (f"wwn-0x{ID}-part2", None),
        ("ata-QEMU_HARDDISK_QM00001", None),
        ("scsi-0QEMU_QEMU_HARDDISK_drive-scsi0", None),
        (f"scsi-3{ID[:-1]}", None),
        ("dm-name-mpatha", None),
    ],
)
def test_links_name_luns(tmp_path: Path, link: str, name: str) -> None:
    (tmp_path / "sdb").write_bytes(b"")
    devices = tmp_path / "by-id"
    devices.mkdir()
    (devices / link).symlink_to("../sdb")
    assert visible_luns(str(devices)) == ({name: str(devices / link)} if name else {})


def test_a_multipath_device_stands_for_its_paths(tmp_path: Path) -> None:
    for name in ("sdb", "dm-0"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f"scsi-3{ID}").symlink_to("sdb")
    (tmp_path / f"wwn-0x{ID}").symlink_to("sdb")
    (tmp_path / f"dm-uuid-mpath-3{ID}").symlink_to("dm-0")
    (tmp_path / "wwn-0x5000c500a0b1c2d3").symlink_to("gone")
    luns = visible_luns(str(tmp_path))
    assert luns == {f"naa.{ID}": str(tmp_path / f"dm-uuid-mpath-3{ID}")}
    assert allow_list([f"naa.{ID}", "naa.unseen"], luns) == [str(tmp_path / "dm-0")]


def test_no_folder_no_lun(tmp_path: Path) -> None:
    assert visible_luns(str(tmp_path / "absent")) == {}


@pytest.mark.parametrize(("version", "option"), [("8.0.3", "allowList"), ("9.0", "allowList"), ("7.0.3", "whitelist")])
def test_vddk_is_told_which_luns_it_may_open(tmp_path: Path, version: str, option: str) -> None:
    path = tmp_path / "vddk.conf"
    write_config(
        path, vddk=Vddk("/", version, "1"), io_timeout=180, tmp_folder="/x", san_devices=["/dev/dm-0", "/dev/sdb"]
    )
    lists = [line for line in path.read_text().splitlines() if "transport.san" in line]
    assert lists == [f'vixDiskLib.transport.san.{option}="/dev/dm-0,/dev/sdb"']
    write_config(path, vddk=Vddk("/", version, "1"), io_timeout=180, tmp_folder="/x")
    assert "transport.san" not in path.read_text()
