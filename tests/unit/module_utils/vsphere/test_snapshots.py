# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Snapshots and change tracking against a virtual machine that is a few lines of state behind real vim types."""

from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    AmbiguousError,
    NotFoundError,
    TaskError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import change_tracking, snapshots, vm_keys
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.snapshot_state import Wanted, ensure
from pyVmomi import vim, vmodl

CHANGING = {
    "CreateSnapshot_Task",
    "CreateSnapshotEx_Task",
    "RemoveSnapshot_Task",
    "ConsolidateVMDisks_Task",
    "ReconfigVM_Task",
    "RefreshStorageInfo",
}


class Machine:
    """One VM with one disk. ``faults`` are used up by tasks: (wsdl name -> list of faults or None)."""

    def __init__(self, stub, vm, make):
        self.stub, self.obj, self.make = stub, vm.obj, make
        self.nodes = []
        self.faults = {}
        self.power, self.tools = "poweredOn", "guestToolsRunning"
        self.devices = [make.scsi_controller(), make.disk()]
        self.leaf = 0
        self.orphans = 0
        self.consolidation_needed = False
        self.tracking, self.active, self.generation = False, False, 0
        self.supported = True
        self.ignores_quiesce = False
        self.task_number = 0
        self.recent = []
        self.settings, self.version = {"nvram": "app01.nvram"}, 1
        stub.add(self.obj, refresh=self.refresh)
        stub.methods["RefreshStorageInfo"] = None
        for name in CHANGING - {"RefreshStorageInfo"}:
            stub.methods[name] = getattr(self, name)

    def refresh(self, values):
        chain = [f"app01/app01{suffix}.vmdk" for suffix in self.suffixes()]
        files, links = [], []
        for number, name in enumerate(chain):
            files.append(vim.vm.FileLayoutEx.FileInfo(key=number, name=f"[a] {name}", type="diskDescriptor", size=1))
            links.append(vim.vm.FileLayoutEx.DiskUnit(fileKey=[number]))
        self.devices[1].backing.changeId = f"52 {self.generation}/1" if self.active else None
        values.update(
            {
                "snapshot": self.make.tree(self.stub, *self.nodes) if self.nodes else None,
                "recentTask": list(self.recent) or None,
                "runtime.powerState": self.power,
                "runtime.consolidationNeeded": self.consolidation_needed,
                "guest.toolsRunningStatus": self.tools,
                "config.template": False,
                "config.extraConfig": [
                    vim.option.OptionValue(key=key, value=value) for key, value in self.settings.items()
                ],
                "config.changeVersion": str(self.version),
                "config.instanceUuid": "5000-instance",
                "config.hardware.device": self.devices,
                "config.changeTrackingEnabled": self.tracking,
                "capability.changeTrackingSupported": self.supported,
                "layoutEx.file": files,
                "layoutEx.disk": [vim.vm.FileLayoutEx.DiskLayout(key=2000, chain=links)],
            }
        )

    def suffixes(self):
        return ["", *(f"-{number:06d}" for number in range(1, len(self.nodes) + self.orphans + 1))]

    def task(self, name, action, fails_after=False):
        """*action* happens unless a fault is waiting; with ``fails_after`` it happens although the task fails."""
        self.task_number += 1
        task = vim.Task(f"task-{self.task_number}", self.stub)
        waiting = self.faults.get(name) or [None]
        fault = waiting.pop(0)
        result = None
        if isinstance(fault, ConnectionError):
            action()
            self.recent.append(task)
        elif fault is None or fails_after:
            result = action()
        state = "success" if fault is None or isinstance(fault, ConnectionError) else "error"
        error = None if state == "success" else fault
        self.stub.add(
            task,
            info__state=state,
            info__result=result,
            info__error=error,
            info__descriptionId="VirtualMachine.createSnapshot",
        )
        if isinstance(fault, ConnectionError):
            raise fault
        return task

    def CreateSnapshot_Task(self, _vm, name, description, _memory, quiesce, wsdl="CreateSnapshot_Task"):
        def action():
            moid = f"snapshot-{len(self.stub.objects)}"
            node = self.make.tree_node(self.stub, moid, name, description, quiesced=quiesce)
            self.nodes.append(node)
            self.stub.add(node.snapshot, config__hardware__device=self.devices)
            if self.tracking != self.active:
                self.generation += self.tracking
            self.active = self.tracking
            return node.snapshot

        return self.task(wsdl, action)

    def CreateSnapshotEx_Task(self, vm, name, description, memory, spec):
        assert isinstance(spec, vim.vm.GuestQuiesceSpec)
        return self.CreateSnapshot_Task(
            vm, name, description, memory, not self.ignores_quiesce, "CreateSnapshotEx_Task"
        )

    def RemoveSnapshot_Task(self, snapshot, _children, _consolidate):
        if not any(node.snapshot._moId == snapshot._moId for node in self.nodes):
            raise vmodl.fault.ManagedObjectNotFound(obj=snapshot)
        half = bool(self.faults.get("half"))

        def action():
            self.nodes = [node for node in self.nodes if node.snapshot._moId != snapshot._moId]
            if half:
                self.orphans += 1
                self.consolidation_needed = self.faults["half"].pop() == "flagged"

        return self.task("RemoveSnapshot_Task", action, fails_after=half)

    def ConsolidateVMDisks_Task(self, _vm):
        def action():
            self.orphans, self.consolidation_needed = 0, False

        return self.task("ConsolidateVMDisks_Task", action)

    def ReconfigVM_Task(self, _vm, spec):
        def action():
            self.version += 1
            for option in spec.extraConfig:
                self.settings[option.key] = option.value
            self.settings = {key: value for key, value in self.settings.items() if value}
            if spec.changeTrackingEnabled is None:
                return
            self.tracking = spec.changeTrackingEnabled
            if self.power == "poweredOff":
                self.active, self.generation = self.tracking, self.generation + self.tracking

        return self.task("ReconfigVM_Task", action)

    def changing_calls(self):
        return [name for name in self.stub.names() if name in CHANGING]


@pytest.fixture
def machine(session, stub, vm, make):
    return Machine(stub, vm, make)


def wanted(present=True, name="nightly", **options):
    values = {
        "moid": None,
        "description": "",
        "quiesce": "preferred",
        "memory": False,
        "remove_children": False,
        "consolidate": True,
        "timeout": 600,
    }
    return Wanted(present=present, name=name, **{**values, **options})


# The module's two states


def test_present_is_made_once(session, vm, machine):
    first = ensure(session, vm, wanted(), check_mode=False)
    assert first["changed"] and first["snapshot"]["quiesced"]
    assert first["quiesce"] == {"requested": "preferred", "achieved": "quiesced", "reason": None}
    assert [disk["key"] for disk in first["disks"]] == [2000]
    machine.stub.calls.clear()
    second = ensure(session, vm, wanted(), check_mode=False)
    assert not second["changed"] and second["snapshot"] == first["snapshot"] and second["disks"] == first["disks"]
    assert not machine.changing_calls()


@pytest.mark.parametrize("check_mode", [False, True])
def test_required_takes_no_existing_snapshot_that_was_not_quiesced(session, vm, machine, make, stub, check_mode):
    """By its name or by its moid. Nothing says afterwards that the machine was off."""
    machine.nodes = [
        make.tree_node(stub, "snapshot-1", "nightly", quiesced=False),
        make.tree_node(stub, "snapshot-2", "weekly", quiesced=True),
    ]
    for node in machine.nodes:
        stub.add(node.snapshot, config__hardware__device=machine.devices)
    for named in (wanted(quiesce="required"), wanted(name=None, moid="snapshot-1", quiesce="required")):
        with pytest.raises(VsphereError, match="was not quiesced.*snapshot-1.*another name"):
            ensure(session, vm, named, check_mode)
    for good in (wanted(name="weekly", quiesce="required"), wanted(), wanted(quiesce="never")):
        assert not ensure(session, vm, good, check_mode)["changed"]
    assert ensure(session, vm, wanted(), check_mode)["quiesce"]["achieved"] == "crash-consistent"
    assert not machine.changing_calls()


def test_check_mode_predicts_and_calls_nothing_that_changes(session, vm, machine):
    machine.stub.calls.clear()
    result = ensure(session, vm, wanted(), check_mode=True)
    assert result["changed"] and result["snapshot"]["moid"] is None and result["snapshot"]["quiesced"]
    assert result["disks"][0]["change_id"] is None and "no snapshot 'nightly'" in result["diff"]["before"]
    ensure(session, vm, wanted(present=False), check_mode=True)
    machine.consolidation_needed = True
    assert ensure(session, vm, wanted(present=False), check_mode=True)["changed"]
    assert not machine.changing_calls()


def test_absent_is_reached_once_and_by_moid_only_that_one_goes(session, vm, machine, make, stub):
    machine.nodes = [make.tree_node(stub, "snapshot-1", "nightly"), make.tree_node(stub, "snapshot-2", "nightly")]
    with pytest.raises(AmbiguousError, match="snapshot-1 .*snapshot-2"):
        ensure(session, vm, wanted(present=False), check_mode=False)
    by_moid = wanted(present=False, name=None, moid="snapshot-2")
    assert ensure(session, vm, by_moid, check_mode=False)["changed"]
    assert [node.snapshot._moId for node in machine.nodes] == ["snapshot-1"]
    assert not ensure(session, vm, by_moid, check_mode=False)["changed"]
    with pytest.raises(NotFoundError):
        ensure(session, vm, wanted(name=None, moid="snapshot-2"), check_mode=False)


def test_absent_consolidates_what_is_left(session, vm, machine):
    machine.orphans, machine.consolidation_needed = 1, True
    result = ensure(session, vm, wanted(present=False), check_mode=False)
    assert result["changed"] and result["consolidated"] and machine.orphans == 0
    machine.consolidation_needed = True
    assert not ensure(session, vm, wanted(present=False, consolidate=False), check_mode=False)["changed"]


# Quiescing


@pytest.mark.parametrize(
    "power, tools, achieved",
    [
        ("poweredOn", "guestToolsNotRunning", "crash-consistent"),
        ("poweredOff", "guestToolsNotRunning", "powered-off"),
        ("suspended", "guestToolsRunning", "crash-consistent"),
        ("poweredOn", "guestToolsExecutingScripts", "quiesced"),
    ],
)
def test_quiesce_by_the_state_of_the_guest(session, vm, machine, power, tools, achieved):
    machine.power, machine.tools = power, tools
    if achieved == "crash-consistent":
        with pytest.raises(VsphereError, match="can't be quiesced"):
            ensure(session, vm, wanted(quiesce="required"), check_mode=False)
        assert not machine.changing_calls()
    result = ensure(session, vm, wanted(), check_mode=False)
    assert result["quiesce"]["achieved"] == achieved
    assert ("warnings" in result) == (achieved == "crash-consistent")
    assert ("CreateSnapshotEx_Task" in machine.stub.names()) == (achieved == "quiesced")


def test_preferred_goes_on_after_a_quiesce_fault_and_required_fails(session, vm, machine):
    machine.faults["CreateSnapshotEx_Task"] = [vim.fault.ApplicationQuiesceFault(msg="VSS failed") for _number in "12"]
    with pytest.raises(TaskError, match="VSS failed"):
        ensure(session, vm, wanted(quiesce="required"), check_mode=False)
    result = ensure(session, vm, wanted(), check_mode=False)
    assert result["quiesce"]["achieved"] == "crash-consistent" and "VSS failed" in result["quiesce"]["reason"]
    assert len(machine.nodes) == 1


def test_a_request_that_the_platform_ignored(session, vm, machine):
    machine.ignores_quiesce = True
    with pytest.raises(VsphereError, match="was not quiesced"):
        ensure(session, vm, wanted(quiesce="required"), check_mode=False)
    assert machine.nodes == []
    assert ensure(session, vm, wanted(), check_mode=False)["quiesce"]["achieved"] == "crash-consistent"


# Creating once


def test_a_lost_call_that_was_carried_out_is_not_repeated(session, vm, machine):
    machine.faults["CreateSnapshot_Task"] = [ConnectionResetError("reset")]
    marker = snapshots.marker_text("repository", "run", "p1")
    snapshot, _quiesce, _disks = snapshots.create_snapshot(session, vm, "nightly", marker, quiesce="never")
    assert [node.snapshot._moId for node in machine.nodes] == [snapshot.moid]


def test_a_lost_call_is_not_believed_to_have_made_what_has_its_name(session, vm, machine):
    """Somebody else's snapshot of that name may have come at the same moment, and no task says whose it is."""
    machine.faults["CreateSnapshot_Task"] = [ConnectionResetError("reset")]
    with pytest.raises(AmbiguousError, match="not known whose"):
        snapshots.create_snapshot(session, vm, "nightly", quiesce="never")


def test_a_taken_name_is_not_used_again(session, vm, machine, make, stub):
    nodes = [make.tree_node(stub, f"snapshot-{number}", name) for number, name in enumerate(("p1", "p1 (2)"))]
    listed = snapshots.snapshots_of(make.tree(stub, *nodes, current="snapshot-1"))
    assert snapshots.free_name("p1", listed) == "p1 (3)" and snapshots.free_name("p2", listed) == "p2"


def test_a_lost_call_that_was_not_carried_out_is_repeated(session, vm, machine, stub):
    real = stub.methods["CreateSnapshot_Task"]

    def lost_once(*_args):
        stub.methods["CreateSnapshot_Task"] = real
        raise ConnectionResetError("reset")

    stub.methods["CreateSnapshot_Task"] = lost_once
    snapshots.create_snapshot(session, vm, "nightly", quiesce="never")
    assert len(machine.nodes) == 1


def test_limits_and_obstacles_are_met_before_the_call(session, vm, machine, make, stub):
    chain = None
    for number in range(32, 0, -1):
        chain = make.tree_node(stub, f"snapshot-{number}", f"s{number}", children=[chain] if chain else [])
    info = make.tree(stub, chain, current="snapshot-32")
    state = snapshots.vm_state(session, vm)
    listed = snapshots.snapshots_of(info)
    state.current_depth = snapshots._depth(info, listed)
    assert len(listed) == 32 and listed[-1].parent_moid == "snapshot-31"
    with pytest.raises(VsphereError, match="32 is the limit"):
        snapshots.check_can_snapshot(vm, state)
    machine.devices[0].sharedBus = "physicalSharing"
    with pytest.raises(VsphereError, match="shares its bus"):
        ensure(session, vm, wanted(), check_mode=True)


# Removing wholly


@pytest.mark.parametrize("kind", ["flagged", "unflagged"])
def test_a_removal_that_fails_half_way_is_finished(session, vm, machine, kind):
    ensure(session, vm, wanted(), check_mode=False)
    machine.faults.update(half=[kind], RemoveSnapshot_Task=[vim.fault.FileLocked(msg="locked", file="[a] b.vmdk")])
    machine.faults["ConsolidateVMDisks_Task"] = [vim.fault.FileLocked(file="[a] b.vmdk"), None]
    result = ensure(session, vm, wanted(present=False), check_mode=False)
    assert result["consolidated"] and machine.orphans == 0 and machine.nodes == []
    assert machine.stub.names().count("ConsolidateVMDisks_Task") == 2


def test_a_delta_that_stays_is_an_error_with_its_files(session, vm, machine):
    ensure(session, vm, wanted(), check_mode=False)
    machine.faults.update(half=["flagged"], RemoveSnapshot_Task=[vim.fault.FileLocked(file="[a] b.vmdk")])
    machine.faults["ConsolidateVMDisks_Task"] = [vim.fault.FileLocked(file="[a] b.vmdk") for _number in range(20)]
    with pytest.raises(TaskError, match="not consolidated.*FileLocked.*proxy") as caught:
        ensure(session, vm, wanted(present=False), check_mode=False)
    assert caught.value.details["files"] == ["[a] app01/app01-000001.vmdk"]


def test_a_locked_snapshot_is_tried_again(session, vm, machine, clock):
    ensure(session, vm, wanted(), check_mode=False)
    machine.faults["RemoveSnapshot_Task"] = [vim.fault.FileLocked(file="[a] b.vmdk"), None]
    assert ensure(session, vm, wanted(present=False), check_mode=False)["changed"]
    assert 2 in clock.sleeps and machine.nodes == []


def test_orphaned_deltas_of_chains(make):
    def orphans(names, depth):
        files = [vim.vm.FileLayoutEx.FileInfo(key=key, name=name) for key, name in enumerate(names)]
        links = [vim.vm.FileLayoutEx.DiskUnit(fileKey=[key]) for key in range(len(names))]
        return snapshots.orphaned_deltas(files, [vim.vm.FileLayoutEx.DiskLayout(key=2000, chain=links)], depth)

    assert orphans(["[a] vm/vm.vmdk"], 0) == []
    assert orphans(["[a] vm/vm.vmdk", "[a] vm/vm-000001.vmdk"], 1) == []
    assert orphans(["[a] vm/vm.vmdk", "[a] vm/vm-000001.vmdk"], 0) == ["[a] vm/vm-000001.vmdk"]
    assert orphans(["[a] base/base.vmdk", "[a] clone/clone-000001.vmdk"], 0) == []


def test_marker():
    text = snapshots.marker_text("repo", "run", "point")
    assert snapshots.parse_marker(text) == {
        "by": "openvadp.backup",
        "repository_id": "repo",
        "run_id": "run",
        "point": "point",
    }
    for other in (None, "", "by hand", "[]", '{"by": "somebody"}'):
        assert snapshots.parse_marker(other) is None


# Change tracking


def tracking(session, vm, state="enabled", activate=True, check_mode=False):
    return change_tracking.ensure(session, vm, state, activate, 600, check_mode)


def test_enable_activates_once(session, vm, machine):
    predicted = tracking(session, vm, check_mode=True)
    assert predicted["changed"] and predicted["change_tracking"]["effective"] and not machine.changing_calls()
    first = tracking(session, vm)
    assert first["changed"] and first["change_tracking"]["effective"] and machine.nodes == []
    assert first["change_tracking"]["disks"] == [{"key": 2000, "label": "Hard disk 1", "change_id": "52 1/1"}]
    second = tracking(session, vm)
    assert not second["changed"] and second["change_tracking"] == first["change_tracking"]


def test_without_activation_it_is_not_effective_and_the_next_run_makes_it_so(session, vm, machine):
    first = tracking(session, vm, activate=False)
    assert first["change_tracking"]["enabled"] and not first["change_tracking"]["effective"] and first["warnings"]
    assert tracking(session, vm)["change_tracking"]["effective"]


def test_a_machine_that_is_off_needs_no_stun(session, vm, machine):
    machine.power = "poweredOff"
    assert tracking(session, vm)["change_tracking"]["effective"]
    assert machine.changing_calls() == ["ReconfigVM_Task"]


@pytest.mark.parametrize("state", ["enabled", "reset"])
def test_snapshots_are_in_the_way_and_listed(session, vm, machine, make, stub, state):
    machine.nodes = [make.tree_node(stub, "snapshot-9", "by hand")]
    with pytest.raises(VsphereError, match="'by hand' .snapshot-9"):
        tracking(session, vm, state)
    assert not machine.changing_calls()


def test_already_on_over_a_foreign_snapshot_is_a_warning(session, vm, machine, make, stub):
    machine.tracking = machine.active = True
    machine.nodes = [make.tree_node(stub, "snapshot-9", "by hand")]
    result = tracking(session, vm)
    assert not result["changed"] and "reset" in result["warnings"][0]


def test_reset_gives_new_change_ids_or_fails(session, vm, machine, stub):
    tracking(session, vm)
    result = tracking(session, vm, "reset")
    assert result["changed"] and result["change_tracking"]["disks"][0]["change_id"] == "52 2/1"
    real = stub.methods["CreateSnapshot_Task"]

    def stuck(*args):
        machine.active = machine.tracking
        return real(*args)

    stub.methods["CreateSnapshot_Task"] = stuck
    with pytest.raises(VsphereError, match="was not reset.*Hard disk 1"):
        tracking(session, vm, "reset")


def test_disable_and_unsupported(session, vm, machine):
    tracking(session, vm)
    assert tracking(session, vm, "disabled")["change_tracking"]["enabled"] is False
    assert not tracking(session, vm, "disabled")["changed"]
    machine.supported = False
    with pytest.raises(VsphereError, match="version 7"):
        tracking(session, vm)


def test_a_temporary_snapshot_left_by_a_crash_goes(session, vm, machine, make, stub):
    machine.tracking = machine.active = True
    machine.nodes = [make.tree_node(stub, "snapshot-9", "tmp", change_tracking.stun_description())]
    assert tracking(session, vm)["changed"] and machine.nodes == []


# Change tracking, and the marks of restores


def marked(machine, state, change_id="52 9/1", vm_uuid="5000-instance"):
    """The mark on the machine's disk."""
    key = vm_keys.mark_key(machine.devices[1].backing.uuid)
    machine.settings[key] = vm_keys.mark_value(vm_uuid, "run1", state, change_id)
    return key


def test_tracking_does_not_start_while_a_restore_may_write(session, vm, machine):
    machine.power = "poweredOff"
    key = marked(machine, vm_keys.WRITING)
    for state in ("enabled", "reset"):
        with pytest.raises(VsphereError, match="a restore .run run1. is writing to 'Hard disk 1', or was cut"):
            tracking(session, vm, state)
    assert not machine.changing_calls() and machine.settings[key].split(":")[3] == "writing"
    # What nobody can read may be that too.
    machine.settings[key] = "2:something"
    with pytest.raises(VsphereError, match="may be at work"):
        tracking(session, vm)
    # Off is never in the way, and a clone's tracking is its own.
    marked(machine, vm_keys.WRITING, vm_uuid="6000-other")
    machine.tracking = machine.active = True
    assert tracking(session, vm, "disabled")["changed"]


def test_a_reset_takes_away_what_waits_for_it_and_force_the_rest(session, vm, machine):
    key = marked(machine, vm_keys.DONE)
    result = tracking(session, vm, "reset")
    assert key not in machine.settings and result["change_tracking"]["marks"] == []
    # A running machine has its disks for itself: the restore was cut. Only force says that its content is wanted.
    marked(machine, vm_keys.WRITING)
    result = tracking(session, vm, "reset")
    assert result["change_tracking"]["marks"] == [
        {"key": 2000, "label": "Hard disk 1", "state": "writing", "run_id": "run1"}
    ]
    assert "was cut" in result["warnings"][0] and key in machine.settings
    assert "warnings" not in change_tracking.ensure(session, vm, "reset", True, 600, False, force=True)
    assert key not in machine.settings
    machine.settings[key] = "2:something"
    assert tracking(session, vm, "reset")["warnings"] and key in machine.settings
    change_tracking.ensure(session, vm, "reset", True, 600, False, force=True)
    assert key not in machine.settings


def test_without_a_change_id_nothing_proves_a_reset(session, vm, machine, stub):
    machine.power = "poweredOff"
    real = stub.methods["ReconfigVM_Task"]

    def without_ids(obj, spec):
        task = real(obj, spec)
        machine.active = False
        return task

    stub.methods["ReconfigVM_Task"] = without_ids
    stub.methods["CreateSnapshot_Task"] = _keeps_inactive(machine, stub.methods["CreateSnapshot_Task"])
    key = marked(machine, vm_keys.WRITING)
    result = change_tracking.ensure(session, vm, "reset", True, 600, False, force=True)
    assert machine.settings[key].split(":")[3] == "done"
    assert result["change_tracking"]["marks"][0]["state"] == "done" and "no change ID proves" in result["warnings"][0]
    assert tracking(session, vm, "reset")["warnings"] and machine.settings[key].split(":")[3] == "done"


def _keeps_inactive(machine, real):
    def create(*args):
        task = real(*args)
        machine.active = False
        return task

    return create


def test_check_mode_touches_no_mark(session, vm, machine):
    key = marked(machine, vm_keys.DONE)
    result = tracking(session, vm, "reset", check_mode=True)
    assert key in machine.settings and result["change_tracking"]["marks"][0]["state"] == "done"
    assert not machine.changing_calls()
