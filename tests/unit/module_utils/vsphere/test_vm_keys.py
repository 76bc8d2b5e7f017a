# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from types import SimpleNamespace

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, PrivilegeError, TaskError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import vm_keys
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.vm_keys import (
    DONE,
    UNKNOWN,
    WRITING,
    ConcurrentChange,
    VmKeys,
    first_part,
    id_key,
    id_value,
    identified,
    mark_key,
    mark_value,
    new_key,
    strip,
)
from pyVmomi import vim

VM = "50000000-aaaa-bbbb-cccc-000000000001"
OTHER = "50000000-aaaa-bbbb-cccc-000000000002"
DISK = "6000C29E-0000-1111-2222-333333333333"
REPOSITORY = "12345678-1234-1234-1234-123456789abc"
RUN = "0123456789abcdef0123456789abcdef"
CONTENT = "fedcba9876543210fedcba9876543210"
CHANGE_ID = "52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63/81"
PART = "52dec0d9b9439d10-61d54c1be97b6563"


def option(key, value):
    return vim.option.OptionValue(key=key, value=value)


def keys(*pairs, vm=VM):
    return VmKeys.of([option("nvram", "app01.nvram"), *(option(key, value) for key, value in pairs)], vm)


def test_names_and_values_are_those_of_the_protocol():
    assert mark_key(DISK) == f"openvadp.mark.{DISK.lower()}"
    assert id_key(REPOSITORY, DISK) == f"openvadp.id.{REPOSITORY}.{DISK.lower()}"
    assert new_key(REPOSITORY.upper()) == f"openvadp.new.{REPOSITORY}"
    assert mark_value(VM.upper(), RUN, WRITING, CHANGE_ID) == f"1:{VM}:{RUN}:writing:{PART}"
    assert mark_value(VM, RUN, DONE, None) == f"1:{VM}:{RUN}:done:-"
    assert id_value(VM, CONTENT) == f"1:{VM}:{CONTENT}"


@pytest.mark.parametrize("bad", ["", "a b", "a.b", "x" * 65, "a=b", "ü", "a\n"])
def test_a_name_that_could_be_another_key_is_refused(bad):
    for make in (mark_key, new_key, lambda text: id_key(text, DISK), lambda text: id_key(REPOSITORY, text)):
        with pytest.raises(InputError):
            make(bad)


def test_a_first_part_that_does_not_fit_is_told_by_its_hash():
    assert first_part(CHANGE_ID) == PART
    assert first_part(None) is first_part("") is first_part("*") is first_part("abc/") is None
    odd = [first_part(text + "/1") for text in ("a:b", "a:c", "ü", "x" * 300, "-", "- ")]
    assert len(set(odd)) == len(odd)
    for part in odd:
        assert part.startswith("sha256-")
        value = mark_value(VM, RUN, WRITING, None)[:-1] + part
        assert len(value) <= 200
        assert keys((mark_key(DISK), value)).mark(DISK).first_part == part


def test_a_mark_is_read_as_it_was_written():
    mark = keys((mark_key(DISK).upper(), mark_value(VM, RUN, WRITING, CHANGE_ID))).mark(DISK)
    assert (mark.state, mark.run_id, mark.first_part, mark.foreign) == (WRITING, RUN, PART, False)
    assert keys().mark(DISK) is None
    assert keys((mark_key(DISK), "")).mark(DISK) is None


def test_marks_are_found_for_the_disks_that_a_machine_has():
    disks = [SimpleNamespace(key=2000 + at, uuid=uuid, change_id=None) for at, uuid in enumerate((DISK, None, DISK))]
    read = keys(
        (mark_key(DISK), mark_value(VM, RUN, DONE, None)),
        (mark_key("key-2001"), mark_value(VM, RUN, WRITING, None)),
        (mark_key(OTHER), mark_value(VM, RUN, WRITING, None)),
    )
    done = vm_keys.Mark(DONE, RUN, None, VM)
    assert read.marks_of(disks) == {2000: done, 2001: vm_keys.Mark(WRITING, RUN, None, VM), 2002: done}


@pytest.mark.parametrize(
    "value",
    [
        "2:a:b:writing:c",
        "1",
        "1:::writing:",
        f"1:{VM}:{RUN}:finished:{PART}",
        f"1:{VM}:{RUN}:writing",
        f"1:{VM}:{RUN}:writing:{PART}:more",
        "rubbish",
    ],
)
def test_a_mark_that_is_not_understood_is_not_absent(value):
    mark = keys((mark_key(DISK), value)).mark(DISK)
    assert mark.state == UNKNOWN
    assert mark.in_force(CHANGE_ID)


def test_two_settings_of_one_name_are_not_understood():
    both = [(mark_key(DISK), mark_value(VM, RUN, DONE, None)), (mark_key(DISK).upper(), "")]
    assert keys(*both).mark(DISK).state == UNKNOWN
    names = [(id_key(REPOSITORY, DISK), id_value(VM, CONTENT)), (id_key(REPOSITORY, DISK).upper(), "x")]
    assert keys(*names).naming(REPOSITORY, DISK) == (UNKNOWN, None)


@pytest.mark.parametrize("settings", [None, []])
def test_settings_that_are_not_filled_in_are_not_an_absence(settings):
    read = VmKeys.of(settings, VM)
    assert not read.readable
    assert read.mark(DISK).state == UNKNOWN
    assert read.naming(REPOSITORY, DISK) == (UNKNOWN, None)
    assert read.content_id(REPOSITORY, DISK) is None


def test_a_clones_mark_counts_as_long_as_its_tracking_may_be_the_one_that_was_spoilt():
    def mark(change_id, vm=VM):
        return keys((mark_key(DISK), mark_value(vm, RUN, DONE, change_id))).mark(DISK)

    assert mark(CHANGE_ID).in_force("other/1")
    clone = mark(CHANGE_ID, OTHER)
    assert clone.foreign
    assert not clone.in_force("other/1")
    assert clone.in_force(CHANGE_ID.replace("81", "82"))
    assert clone.in_force(None)
    assert mark(None, OTHER).in_force(CHANGE_ID)
    assert keys((mark_key(DISK), mark_value(VM, RUN, DONE, None)), vm=None).mark(DISK).foreign


def test_content_ids_are_of_a_repository_a_disk_and_a_machine():
    key = id_key(REPOSITORY, DISK)
    assert keys((key, id_value(VM, CONTENT))).content_id(REPOSITORY, DISK) == CONTENT
    assert keys((key, id_value(VM, CONTENT))).naming(REPOSITORY.upper(), DISK) == ("named", CONTENT)
    assert keys((key, id_value(OTHER, CONTENT))).naming(REPOSITORY, DISK) == ("foreign", CONTENT)
    assert keys((key, id_value(OTHER, CONTENT))).content_id(REPOSITORY, DISK) is None
    assert keys((key, f"2:{VM}:{CONTENT}")).naming(REPOSITORY, DISK) == (UNKNOWN, None)
    assert keys((key, f"1:{VM}:{CONTENT[1:]}")).naming(REPOSITORY, DISK) == (UNKNOWN, None)
    assert keys().naming(REPOSITORY, DISK) == ("absent", None)
    assert keys((id_key(OTHER, DISK), id_value(VM, CONTENT))).naming(REPOSITORY, DISK) == ("absent", None)


def test_the_content_ids_of_all_repositories_for_a_disk_are_found():
    other = "6000c29e-9999-1111-2222-333333333333"
    read = keys(
        (id_key(REPOSITORY, DISK), "x"),
        (id_key(OTHER, DISK).upper(), "y"),
        (id_key(REPOSITORY, other), "z"),
        (mark_key(DISK), "m"),
    )
    assert read.id_keys([DISK]) == sorted([id_key(REPOSITORY, DISK), id_key(OTHER, DISK)])
    assert read.id_keys_of(REPOSITORY) == sorted([id_key(REPOSITORY, DISK), id_key(REPOSITORY, other)])
    assert read.id_keys([]) == []


def test_ours_are_stripped_and_nothing_else():
    kept = [option("nvram", "x"), option("guestinfo.openvadp.mark.a", "1"), option("openvadpx", "2")]
    ours = [option("OpenVADP.mark.a", "1"), option("openvadp.new.b", "2"), option("openvadp.later", "3")]
    assert strip(kept + ours) == kept
    assert strip(None) == []


def test_a_disk_without_a_uuid_and_disks_of_one_uuid_are_not_identified():
    def disks(*uuids):
        return [SimpleNamespace(key=2000 + number, uuid=uuid) for number, uuid in enumerate(uuids)]

    assert identified(disks("AA-1", None, "bb-2", "", "aa-1", "c c")) == {2002: "bb-2"}


# Writing


@pytest.fixture
def machine(stub, vm):
    """A machine whose configuration is reconfigured as vSphere does it."""
    state = SimpleNamespace(version=7, settings={"nvram": "x"}, before=None, answers=[], specs=[])

    def options():
        return [option(key, value) for key, value in state.settings.items()]

    properties = {"config__extraConfig": options(), "config__instanceUuid": VM, "config__changeVersion": "7"}
    stub.add(vm.obj, **properties)
    stub.objects["vm-16"][1]["refresh"] = lambda held: held.update(
        {"config.extraConfig": options(), "config.changeVersion": str(state.version)}
    )

    def reconfigure(_obj, spec):
        state.specs.append(spec)
        answer = state.answers.pop(0) if state.answers else None
        if isinstance(answer, Exception) and not getattr(answer, "after", False):
            raise answer
        if callable(answer):
            answer()
        if spec.changeVersion != str(state.version):
            raise vim.fault.ConcurrentAccess()
        state.version += 1
        for item in spec.extraConfig:
            state.settings.pop(item.key, None)
            if item.value:
                state.settings[item.key] = item.value
        if isinstance(answer, Exception):
            raise answer
        return stub.add(vim.Task(f"task-{state.version}", stub), info__state="success")

    stub.methods["ReconfigVM_Task"] = reconfigure
    return state


def test_all_keys_of_a_step_are_one_reconfiguration_on_the_version_that_was_read(session, vm, machine):
    machine.settings[id_key(REPOSITORY, DISK)] = "old"
    read, version = vm_keys.read(session, vm)
    assert (version, read.vm_instance_uuid) == ("7", VM)
    changes = {mark_key(DISK): mark_value(VM, RUN, WRITING, None), id_key(REPOSITORY, DISK): ""}
    assert vm_keys.write(session, vm, changes, version) == "8"
    assert len(machine.specs) == 1
    assert machine.settings == {"nvram": "x", mark_key(DISK): mark_value(VM, RUN, WRITING, None)}


def test_another_version_is_told_at_once_and_nothing_is_written(session, vm, machine, clock):
    with pytest.raises(ConcurrentChange):
        vm_keys.write(session, vm, {mark_key(DISK): "1"}, "6")
    assert len(machine.specs) == 1
    assert machine.settings == {"nvram": "x"}
    assert not clock.sleeps


def test_a_task_that_fails_for_another_version_is_not_repeated(session, stub, vm, machine):
    stub.methods["ReconfigVM_Task"] = lambda _obj, spec: stub.add(
        vim.Task("task-1", stub), info__state="error", info__error=vim.fault.ConcurrentAccess()
    )
    with pytest.raises(ConcurrentChange):
        vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7")
    assert stub.names().count("ReconfigVM_Task") == 1


def test_a_busy_machine_is_waited_for(session, vm, machine):
    machine.answers = [vim.fault.TaskInProgress(), vim.fault.TaskInProgress()]
    vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7")
    assert machine.settings[mark_key(DISK)] == "1"


def test_an_answer_that_was_lost_is_asked_for_again_and_counts_once(session, vm, machine):
    lost = ConnectionResetError("reset")
    lost.after = True
    machine.answers = [lost]
    assert vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7") == "8"
    assert len(machine.specs) == 2
    machine.answers = [ConnectionResetError("before it was carried out")]
    assert vm_keys.write(session, vm, {mark_key(DISK): "2"}, "8") == "9"


def test_a_task_that_a_restarted_vcenter_has_forgotten_is_asked_for_again(session, stub, vm, machine):
    reconfigure = stub.methods["ReconfigVM_Task"]

    def forgotten(obj, spec):
        task = reconfigure(obj, spec)
        del stub.objects[task._moId]
        return task

    stub.methods["ReconfigVM_Task"] = forgotten
    assert vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7") == "8"
    assert [spec.changeVersion for spec in machine.specs] == ["7", "7"]


def test_what_can_not_be_read_back_was_not_written(session, stub, vm, machine):
    stub.methods["ReconfigVM_Task"] = lambda _obj, spec: stub.add(vim.Task("task-1", stub), info__state="success")
    with pytest.raises(ConcurrentChange):
        vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7")


def test_a_server_without_versions_is_refused(session, vm, machine):
    with pytest.raises(vm_keys.VsphereError):
        vm_keys.write(session, vm, {mark_key(DISK): "1"}, "")
    assert not machine.specs


def test_the_privilege_is_named_even_where_the_server_does_not(session, vm, machine):
    machine.answers = [vim.fault.NoPermission()]
    with pytest.raises(PrivilegeError) as refused:
        vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7")
    assert "VirtualMachine.Config.AdvancedConfig" in str(refused.value)


@pytest.mark.parametrize("changes", [{"nvram": "1"}, {"openvadp.Mark.a": "1"}, {"openvadp.mark.a": "A b"}])
def test_only_our_keys_and_plain_values_are_written(session, vm, machine, changes):
    with pytest.raises(ValueError):
        vm_keys.write(session, vm, changes, "7")
    assert not machine.specs


def test_an_update_begins_anew_where_the_configuration_changed(session, vm, machine):
    def somebody():
        machine.version += 1
        machine.settings["other"] = "z"

    machine.answers = [somebody]
    seen = []

    def decide(read):
        seen.append(dict(read.raw))
        return {mark_key(DISK): "1", mark_key(OTHER): ""}

    read, version = vm_keys.update(session, vm, decide, sleep=lambda _seconds: None)
    assert len(seen) == 2
    assert (read.raw, version) == ({mark_key(DISK): "1"}, "9")
    assert len(machine.specs[-1].extraConfig) == 1
    # and writes nothing where all is as wanted
    vm_keys.update(session, vm, decide, sleep=lambda _seconds: None)
    assert len(machine.specs) == 2
    machine.answers = [somebody] * 9
    with pytest.raises(ConcurrentChange):
        vm_keys.update(session, vm, lambda _read: {mark_key(DISK): "2"}, attempts=3, sleep=lambda _seconds: None)


def test_a_task_that_fails_otherwise_is_told(session, stub, vm, machine):
    stub.methods["ReconfigVM_Task"] = lambda _obj, spec: stub.add(
        vim.Task("task-1", stub), info__state="error", info__error=vim.fault.InvalidPowerState(msg="no")
    )
    with pytest.raises(TaskError):
        vm_keys.write(session, vm, {mark_key(DISK): "1"}, "7")
