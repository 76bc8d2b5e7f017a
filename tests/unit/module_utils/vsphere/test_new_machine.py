# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A machine that a restore made is removed only if it is proved to be just that, and only with its own disks."""

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import NotFoundError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import new_machine
from pyVmomi import vim, vmodl

RUN = "0123456789abcdef0123456789abcdef"
REPOSITORY = "00000000-0000-0000-0000-00000000000a"
MARK = new_machine.new_mark(REPOSITORY, RUN)


def disk(key=2000, **changes):
    fields = {"file": f"[vmfs01] new/new-{key}.vmdk", "uuid": f"6000C29e-{key}", "capacity": 1 << 30, **changes}
    return vim.vm.device.VirtualDisk(
        key=key,
        capacityInBytes=fields["capacity"],
        capacityInKB=fields["capacity"] >> 10,
        backing=vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
            fileName=fields["file"], uuid=fields["uuid"], diskMode="persistent"
        ),
    )


def files(*kinds):
    FileInfo = vim.vm.FileLayoutEx.FileInfo
    return [
        FileInfo(key=number, name=f"[vmfs01] new/new.{kind}", type=kind, size=1) for number, kind in enumerate(kinds)
    ]


class Machine:
    """A machine in vCenter that was made with two disks, as its restore recorded it."""

    def __init__(self, stub, **changes):
        self.stub = stub
        self.obj = vim.VirtualMachine("vm-77", stub)
        self.properties = {
            "name": "new",
            "config__instanceUuid": "5000-new",
            "config__extraConfig": [vim.option.OptionValue(key=MARK[0], value=MARK[1])],
            "config__changeVersion": "7",
            "config__template": False,
            "config__hardware__device": [disk(2000), disk(2001)],
            "runtime__powerState": vim.VirtualMachine.PowerState.poweredOff,
            "layoutEx__file": files("config", "diskDescriptor", "diskExtent", "nvram"),
            **changes,
        }
        stub.add(self.obj, **self.properties)
        self.intent = {
            "what": "restore",
            "target": "new_vm",
            "name": "new",
            "instance_uuid": "5000-new",
            "vm_moid": "vm-77",
            "folder_moid": "group-v3",
            "on_failure": "remove",
            "complete": False,
            "leased": False,
            "made_disks": new_machine.made_disks(
                vim.vm.ConfigInfo(hardware=vim.vm.VirtualHardware(device=[disk(2000), disk(2001)]))
            ),
        }
        stub.methods.update(ReconfigVM_Task=self.reconfigure, UnregisterVM=self.unregister)
        stub.add(vim.Task("task-1", stub), info__state="success")
        self.specs = []

    def reconfigure(self, _obj, spec):
        self.specs.append(spec)
        gone = [change.device.key for change in spec.deviceChange]
        devices = self.stub.objects["vm-77"][1]["config.hardware.device"]
        left = [device for device in devices if device.key not in gone]
        self.stub.add(self.obj, **{**self.properties, "config__hardware__device": left or None})
        return vim.Task("task-1", self.stub)

    def unregister(self, _obj):
        del self.stub.objects["vm-77"]

    def changing(self):
        return [name for name in self.stub.names() if name not in ("RetrievePropertiesEx", "RetrieveServiceContent")]


def test_its_own_disks_go_and_it_is_unregistered(session, stub):
    machine = Machine(stub)
    rest = new_machine.remove_made(session, machine.intent, MARK, "vc-uuid")
    (spec,) = machine.specs
    assert spec.changeVersion == "7" and [change.device.key for change in spec.deviceChange] == [2000, 2001]
    assert {change.fileOperation for change in spec.deviceChange} == {"destroy"}
    assert machine.changing() == ["ReconfigVM_Task", "UnregisterVM"], (
        "never Destroy_Task, which takes whatever is there"
    )
    assert rest == ["[vmfs01] new/new.config", "[vmfs01] new/new.nvram"]


OTHER_MARK = [vim.option.OptionValue(key=MARK[0], value="f" * 32)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtime__powerState": vim.VirtualMachine.PowerState.poweredOn}, "started"),
        ({"runtime__powerState": vim.VirtualMachine.PowerState.suspended}, "started"),
        ({"config__template": True}, "template"),
        ({"snapshot": vim.vm.SnapshotInfo()}, "snapshots"),
        ({"layoutEx__file": files("config", "diskDescriptor", "log")}, "log"),
        ({"layoutEx__file": files("config", "swap")}, "swap"),
        ({"layoutEx__file": files("config", "suspend")}, "suspend"),
        ({"layoutEx__file": files("config", "whatever comes next")}, "whatever comes next"),
        ({"config__extraConfig": None}, "mark"),
        ({"config__extraConfig": OTHER_MARK}, "mark"),
        ({"config__instanceUuid": "5000-other"}, "instance UUID"),
        ({"config__hardware__device": [disk(2000), disk(2001), disk(2002)]}, "disks"),
        ({"config__hardware__device": [disk(2000)]}, "disks"),
        ({"config__hardware__device": [disk(2000), disk(2001, uuid="other")]}, "disks"),
        ({"config__hardware__device": [disk(2000), disk(2001, file="[vmfs01] other/other.vmdk")]}, "disks"),
        ({"config__hardware__device": [disk(2000), disk(2001, capacity=2 << 30)]}, "disks"),
    ],
)
def test_what_is_not_proved_is_left(session, stub, changes, words):
    machine = Machine(stub, **changes)
    with pytest.raises(new_machine.NotOurs, match=words):
        new_machine.remove_made(session, machine.intent, MARK, "vc-uuid")
    assert machine.changing() == []


@pytest.mark.parametrize(
    ("intent", "server"),
    [({"vm_moid": None}, "vc-uuid"), ({}, "other-vc"), ({}, None), ({"made_disks": None}, "vc-uuid")],
)
def test_what_was_not_recorded_of_this_server_is_left(session, stub, intent, server):
    machine = Machine(stub)
    with pytest.raises(new_machine.NotOurs):
        new_machine.remove_made(session, {**machine.intent, **intent}, MARK, server)
    assert machine.changing() == []


def test_what_changes_after_the_look_stops_it(session, stub):
    machine = Machine(stub)
    stub.methods["ReconfigVM_Task"] = [vim.fault.ConcurrentAccess()]
    with pytest.raises(Exception, match="ConcurrentAccess"):
        new_machine.remove_made(session, machine.intent, MARK, "vc-uuid")
    assert "UnregisterVM" not in machine.changing()


def test_a_removal_that_was_cut_is_finished(session, stub):
    machine = Machine(stub, config__hardware__device=None)
    new_machine.remove_made(session, machine.intent, MARK, "vc-uuid")
    assert machine.changing() == ["UnregisterVM"]


def test_one_that_is_gone_is_fine(session, stub):
    machine = Machine(stub)
    del stub.objects["vm-77"]
    with pytest.raises(NotFoundError):
        new_machine.remove_made(session, machine.intent, MARK, "vc-uuid")
    assert new_machine.remove_failed(session, machine.intent, MARK, "vc-uuid") == []
    stub.add(machine.obj, **machine.properties)
    stub.methods["ReconfigVM_Task"] = [vmodl.fault.ManagedObjectNotFound()]
    assert new_machine.remove_failed(session, machine.intent, MARK, "vc-uuid") == []
