# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What keeps a template from being read, and what shows that it was changed meanwhile."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any, Dict, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup import template
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    InputError,
    NotFoundError,
    PrivilegeError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import disks_of
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.snapshots import vm_state_of
from pyVmomi import vim

UTC = datetime.timezone.utc
NOW = datetime.datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
VM = VmRef(vim.VirtualMachine("vm-1"), "vm-1", "golden", "/DC0/vm/golden", "DC0", "i-uuid", "b-uuid", True)
Backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo
PCI = vim.vm.device.VirtualPCIPassthrough


def disk(**backing: Any) -> Any:
    given = {"fileName": "[vmfs01] golden/golden.vmdk", "diskMode": "persistent", "changeId": "52 de/1", **backing}
    return vim.vm.device.VirtualDisk(
        key=2000,
        controllerKey=1000,
        unitNumber=0,
        capacityInBytes=1 << 30,
        deviceInfo=vim.Description(label="Hard disk 1", summary=""),
        backing=Backing(**given),
    )


def values(**changed: Any) -> Dict[str, Any]:
    known: Dict[str, Any] = {
        "snapshot": None,
        "recentTask": None,
        "runtime.powerState": "poweredOff",
        "runtime.consolidationNeeded": False,
        "guest.toolsRunningStatus": None,
        "config.template": True,
        "config.hardware.device": [disk()],
        "config.changeVersion": "7",
        "config.modified": NOW,
    }
    known.update({path.replace("__", "."): value for path, value in changed.items()})
    return known


def snapshot(name: str) -> Any:
    node = vim.vm.SnapshotTree(snapshot=vim.vm.Snapshot("snapshot-1"), name=name, description="", createTime=NOW)
    return vim.vm.SnapshotInfo(currentSnapshot=node.snapshot, rootSnapshotList=[node])


class Server:
    """A session that answers with properties, or fails."""

    service = SimpleNamespace(CurrentTime=None)

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def call(self, _function: Any, **_words: Any) -> Any:
        return NOW

    def read(self, _obj: Any, *paths: str) -> Dict[str, Any]:
        if isinstance(self._answer, Exception):
            raise self._answer
        return {path: self._answer[path] for path in paths}


def changes_since(answer: Any) -> Optional[VsphereError]:
    before, _state = template.look(Server(values()), VM)  # type: ignore[arg-type]
    return template.changes_since(Server(answer), VM, before)  # type: ignore[arg-type]


def test_the_same_as_before() -> None:
    assert changes_since(values()) is None
    # What the server did besides is nothing of the template's.
    assert changes_since(values(recentTask=[vim.Task("task-1")])) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config__template": False, "config__changeVersion": "8"}, "it was converted to a virtual machine"),
        ({"config__changeVersion": "8"}, "its configuration changed from 7 to 8"),
        ({"config__modified": NOW.replace(hour=9)}, "last change changed from 2026-11-22T08:00:00Z to 2026-11-22T09"),
        ({"config__modified": None}, "to 1970-01-01T00:00:00Z"),
        ({"runtime__powerState": "poweredOn"}, "its power state changed from poweredOff to poweredOn"),
        ({"snapshot": snapshot("s")}, "its snapshots changed from none to snapshot-1"),
        ({"config__hardware__device": []}, "files changed from [vmfs01] golden/golden.vmdk to none"),
        (NotFoundError("The virtual machine was not read"), "it is gone"),
    ],
)
def test_changed_meanwhile(changed: Any, words: str) -> None:
    error = changes_since(changed if isinstance(changed, Exception) else values(**changed))
    assert error is not None and error.retryable
    assert error.what == "The template was changed while it was read" and words in str(error.reason)


def test_what_cant_be_known_is_no_change() -> None:
    with pytest.raises(PrivilegeError):
        changes_since(PrivilegeError("The property can't be read"))


def test_a_template_at_rest() -> None:
    passthrough = PCI(key=13000, backing=PCI.DeviceBackingInfo(id="0"))
    independent = disk(diskMode="independent_persistent", parent=Backing(fileName="[vmfs01] golden/base.vmdk"))
    for devices in ([disk()], [disk(), passthrough], [independent]):
        state = vm_state_of(values(config__hardware__device=devices))
        assert template.not_at_rest(state) == []
        template.check_can_be_read(VM, state)


@pytest.mark.parametrize(
    ("changed", "words", "remedy"),
    [
        ({"snapshot": snapshot("before")}, "it has snapshots: 'before' (snapshot-1)", "remove its snapshots"),
        ({"runtime__consolidationNeeded": True}, "consolidation needed", "consolidate its disks"),
        (
            {"config__hardware__device": [disk(parent=Backing(fileName="[vmfs01] golden/base.vmdk"))]},
            "disk 'Hard disk 1' stands on another file",
            "of a linked clone make a full one",
        ),
        ({"runtime__powerState": "suspended"}, "it is suspended", "convert it back"),
        ({"config__hardware__device": [disk(sharing="sharingMultiWriter")]}, "written by several", None),
        ({"config__template": False}, "it was converted to a virtual machine just now", None),
    ],
)
def test_a_template_that_cant_be_read(changed: Dict[str, Any], words: str, remedy: Optional[str]) -> None:
    with pytest.raises(VsphereError) as caught:
        template.check_can_be_read(VM, vm_state_of(values(**changed)))
    assert words in str(caught.value.reason)
    assert caught.value.remedy is None if remedy is None else remedy in str(caught.value.remedy)


def test_what_is_asked_for() -> None:
    template.check_request(VM, "auto", None)
    template.check_request(VM, "full", None)
    for mode in ("incremental", "differential"):
        with pytest.raises(InputError, match=mode) as caught:
            template.check_request(VM, mode, None)
        assert caught.value.reason == template.ALWAYS_FULL
    with pytest.raises(InputError, match="snapshot-7"):
        template.check_request(VM, "auto", "snapshot-7")


def test_change_ids_of_a_former_life_are_left_out() -> None:
    assert [one.change_id for one in template.without_tracking(disks_of([disk()]))] == [None]
