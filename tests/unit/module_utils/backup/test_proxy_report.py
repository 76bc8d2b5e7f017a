# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is told of a proxy's disks before it is destroyed; with a vCenter it is tested end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup import proxy_report
from ansible_collections.openvadp.backup.plugins.module_utils.backup.proxy_report import ProxyRequest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from pyVmomi import vim

VMX = "[vmfs01] proxy01/proxy01.vmx"
UUIDS = ("503f1d2e-3c4b-5a69-7887-96a5b4c3d2e1", "503f1d2e-3c4b-5a69-7887-96a5b4c3d2e2")


def virtual_disk(file: str, mode: str = "persistent") -> Any:
    backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(fileName=file, diskMode=mode)
    return vim.vm.device.VirtualDisk(key=2000, controllerKey=1000, unitNumber=0, backing=backing)


@pytest.mark.parametrize(
    "device, foreign",
    [
        (virtual_disk("[vmfs01] proxy01/proxy01.vmdk"), False),
        (virtual_disk("[nfs01] proxy01/proxy01_1.vmdk"), False),
        (vim.vm.device.VirtualCdrom(key=3000), False),
        (virtual_disk("[vmfs01] app01/app01.vmdk"), True),
        # Of a machine that is in no inventory, in the folder of one with the proxy's name, in the proxy's own.
        (virtual_disk("[vmfs01] gone01/gone01.vmdk"), True),
        (virtual_disk("[vmfs02] proxy01/proxy01.vmdk"), True),
        (virtual_disk("[vmfs01] proxy01/strange.vmdk"), True),
        (virtual_disk("[vmfs01] proxy01/temporary.vmdk", "independent_nonpersistent"), True),
        (virtual_disk("[vmfs01] app01/app01.vmdk-REDO_a03725"), True),
    ],
)
def test_a_disk_is_the_proxys_own_only_if_nothing_says_otherwise(device: Any, foreign: bool) -> None:
    owners = {"[vmfs01] app01": ("app01", "vm-101"), "[vmfs02] proxy01": ("proxy01", "vm-909")}
    records: Any = [{"file": "[vmfs01] proxy01/strange.vmdk"}]
    assert proxy_report._is_foreign(device, VMX, records, owners) is foreign


def test_a_record_that_can_not_be_read_hides_no_other(tmp_path: Path) -> None:
    assert proxy_report._records(str(tmp_path)) == ([], [])
    stores = [Repository.open(str(tmp_path), create=True).vm(uuid) for uuid in UUIDS]
    for store in stores:
        with store.lock("0123456789abcdef0123456789abcdef", "test"):
            run = store.create_run(None, vm_moid="vm-101", vm_name="app01", run_id="0123456789abcdef0123456789abcdef")
            run.record("attachment", proxy_moid="vm-109", file="[vmfs01] app01/app01.vmdk", disk_uuid="x")
    run.path.write_text("{")
    records, warnings = proxy_report._records(str(tmp_path))
    assert [(record["proxy_moid"], record["vm_uuid"]) for record in records] == [("vm-109", UUIDS[0])]
    assert len(warnings) == 1 and UUIDS[1] in warnings[0] and "vCenter alone" in warnings[0]


def test_a_proxy_is_named_alone() -> None:
    params: Dict[str, Any] = dict.fromkeys(("name", "uuid", "moid", "point", "export", *proxy_report.OPTIONS))
    params.update(begin=False, access=False)
    assert ProxyRequest.from_params(params) is None
    for more in ({"name": "app01"}, {"begin": True}, {"access": True}):
        with pytest.raises(InputError, match="only looked at"):
            ProxyRequest.from_params({**params, "proxy_name": "proxy01", **more})
