# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Advanced settings that a VM carries (VADP facts 53 to 55): who may write them, and what takes them along or back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pyVmomi import vim

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from copies import replica, rollback  # noqa: E402
from test_api import Started, app, disks, done, remove, sim, snapshot  # noqa: E402, F401  fixtures


def settings(vm):
    return {option.key: option.value for option in vm.config.extraConfig}


def write(vm, version=None, **options):
    spec = vim.vm.ConfigSpec(changeVersion=version)
    spec.extraConfig = [vim.option.OptionValue(key=key.replace("__", "."), value=text) for key, text in options.items()]
    done(vm.ReconfigVM_Task(spec))


def test_settings_are_written_on_a_running_vm_over_snapshots_and_an_empty_value_removes(sim, app):  # noqa: F811
    first = snapshot(app)
    write(app, openvadp__mark__a="1", openvadp__id__b="2")
    assert app.runtime.powerState == "poweredOn"
    assert settings(app)["openvadp.mark.a"] == "1"
    second = snapshot(app, "two")
    write(app, OPENVADP__mark__a="", openvadp__id__b="3")
    held = settings(app)
    assert held["openvadp.id.b"] == "3"
    assert not [key for key in held if key.lower() == "openvadp.mark.a"]
    assert "openvadp.mark.a" not in settings(first)
    assert settings(second)["openvadp.mark.a"] == "1"
    done(second.RevertToSnapshot_Task())
    assert settings(app)["openvadp.mark.a"] == "1"
    assert settings(app)["openvadp.id.b"] == "2"
    write(app, openvadp__mark__a="", openvadp__id__b="")


def test_a_change_version_is_a_condition_even_for_one_that_was_sent_earlier(sim, app):  # noqa: F811
    seen = app.config.changeVersion
    write(app, seen, openvadp__mark__a="1")
    assert app.config.changeVersion != seen
    with pytest.raises(vim.fault.ConcurrentAccess):
        write(app, seen, openvadp__mark__a="2")
    # Both are accepted while the first has not been carried out yet; the second one fails then.
    sim.control.call("set_settings", task_delay=0.5)
    now = app.config.changeVersion
    specs = [
        vim.vm.ConfigSpec(changeVersion=now, extraConfig=[vim.option.OptionValue(key="openvadp.mark.a", value=text)])
        for text in ("3", "4")
    ]
    outcomes = []
    for spec in specs:
        try:
            outcomes.append(app.ReconfigVM_Task(spec))
        except (vim.fault.ConcurrentAccess, vim.fault.TaskInProgress) as fault:
            outcomes.append(fault)
    done(outcomes[0])
    sim.control.call("set_settings", task_delay=0.02)
    if isinstance(outcomes[1], vim.Task):
        with pytest.raises((vim.fault.ConcurrentAccess, vim.fault.TaskInProgress)):
            done(outcomes[1])
    assert settings(app)["openvadp.mark.a"] == "3"
    write(app, openvadp__mark__a="")


def test_settings_need_their_privilege(sim, app):  # noqa: F811
    name = "VirtualMachine.Config.AdvancedConfig"
    user = sim.info["backup_username"]
    sim.control.call("set_privileges", username=user, remove=[name])
    try:
        with pytest.raises(vim.fault.NoPermission) as refused:
            write(sim.vm("app01", sim.backup_user()), openvadp__mark__a="1")
        assert refused.value.privilegeId == name
    finally:
        sim.control.call("set_privileges", username=user, add=[name])


def test_a_snapshot_can_be_asked_that_does_not_fill_them_in(sim, app):  # noqa: F811
    write(app, openvadp__mark__a="1")
    made = snapshot(app)
    assert settings(made)["openvadp.mark.a"] == "1"
    sim.control.call("set_settings", snapshot_settings=False)
    assert not made.config.extraConfig
    sim.control.call("set_settings", snapshot_settings=True)
    write(app, openvadp__mark__a="")
    remove(made)


def test_a_clone_inherits_settings_and_has_disks_and_an_identity_of_its_own(sim, app):  # noqa: F811
    write(app, openvadp__mark__a="1")
    kept = sim.control.call("clone_vm", vm="app01", name="kept", disk_uuids="keep")
    sim.control.call("clone_vm", vm="app01", name="other")
    clones = {name: sim.vm(name) for name in ("kept", "other")}
    assert clones["kept"]._moId == kept
    uuids = {key: disk.backing.uuid for key, disk in disks(app.config).items()}
    for name, vm in clones.items():
        assert settings(vm)["openvadp.mark.a"] == "1"
        assert vm.config.instanceUuid != app.config.instanceUuid
        assert not vm.config.changeTrackingEnabled
        same = {key: disk.backing.uuid for key, disk in disks(vm.config).items()} == uuids
        assert same == (name == "kept")
        for key in uuids:
            facts = [sim.control.call("read_disk", vm=each, disk=key)["sha256"] for each in ("app01", name)]
            assert facts[0] == facts[1]
        done(vm.PowerOn())
        done(vm.PowerOff())
        done(vm.Destroy_Task())
    write(app, openvadp__mark__a="")


def test_a_host_that_is_logged_in_to_directly_has_no_instance_uuid(sim, app):  # noqa: F811
    assert sim.connect().content.about.instanceUuid
    sim.control.call("set_settings", esxi=True)
    try:
        content = sim.connect().content
        assert (content.about.apiType, content.about.instanceUuid) == ("HostAgent", None)
        assert content.dvSwitchManager is None
    finally:
        sim.control.call("set_settings", esxi=False)


def test_replicas_and_rollbacks(tmp_path):
    first = Started(tmp_path / "state")
    identity = first.si.content.about.instanceUuid
    vm = first.vm("restore01")
    write(vm, openvadp__mark__a="1")
    first.control.call("guest_write", vm="restore01", disk=2000, pattern={"seed": 1, "length": 65536})
    before = first.control.call("read_disk", vm="restore01", disk=2000)["sha256"]
    first.stop()
    replica(tmp_path / "state", tmp_path / "same")
    replica(tmp_path / "state", tmp_path / "other", same_vcenter=False)
    for name in ("same", "other"):
        copy = Started(tmp_path / name)
        assert (copy.si.content.about.instanceUuid == identity) == (name == "same")
        assert settings(copy.vm("restore01"))["openvadp.mark.a"] == "1"
        assert copy.control.call("read_disk", vm="restore01", disk=2000)["sha256"] == before
        copy.stop()
    for configuration, expected in ((False, "2"), (True, "1")):
        now = Started(tmp_path / "state")
        assert now.si.content.about.instanceUuid == identity
        write(now.vm("restore01"), openvadp__mark__a="2")
        version = now.vm("restore01").config.changeVersion
        now.control.call("guest_write", vm="restore01", disk=2000, pattern={"seed": 2, "length": 65536})
        now.stop()
        rollback(tmp_path / "state", tmp_path / "same", configuration=configuration)
        now = Started(tmp_path / "state")
        assert settings(now.vm("restore01"))["openvadp.mark.a"] == expected
        assert (now.vm("restore01").config.changeVersion == version) != configuration
        assert now.control.call("read_disk", vm="restore01", disk=2000)["sha256"] == before
        now.stop()
