# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Backups of a template: its files by transport https, in full, and only if nobody changed it meanwhile."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from harness import Backups, Simulator, file_sha256
from modules import Modules
from pyVmomi import vim

KEY = 2000
ALWAYS_FULL = "a template has no snapshots, so no change tracking: it is always read in full"


class Template:
    """template01: the modules that back it up, and an administrator who changes it."""

    def __init__(self, simulator: Simulator, repository: Path, session: Session) -> None:
        self.simulator = simulator
        self.repository = repository
        self.modules = Modules(simulator, repository, "template01")
        self.session = session
        self.obj = find_vm(session, name="template01").obj

    def options(self, **options: Any) -> Dict[str, Any]:
        defaults: Dict[str, Any] = dict(self.modules.named, repository=str(self.repository), transports=["https"])
        return dict(defaults, **options)

    def export(self, **options: Any) -> Dict[str, Any]:
        return self.modules.run("vadp_disk_export", **self.options(**options))

    def refused(self, **options: Any) -> Dict[str, Any]:
        """The error of an export that must fail, leave no point and change nothing in vCenter."""
        seen = self.simulator.last_call()
        result = self.export(**options)
        assert result["failed"], result
        assert self.simulator.changing_calls(seen) == [] and list(self.repository.glob("vms/*/points/*")) == []
        error: Dict[str, Any] = result["error"]
        return error

    def held(self) -> Any:
        return self.simulator.disk("template01", KEY)

    # What an administrator does

    def reconfigure(self, **spec: Any) -> None:
        task = self.obj.ReconfigVM_Task(vim.vm.ConfigSpec(**spec))
        self.session.wait(task, what="The template was not changed")

    def to_vm(self) -> None:
        pools = self.session.find(vim.ResourcePool, ["name"])
        self.obj.MarkAsVirtualMachine(pools[0][0], None)

    def to_template(self) -> None:
        self.obj.MarkAsTemplate()


@pytest.fixture
def template(simulator: Simulator, repository: Path) -> Iterator[Template]:
    facts = simulator.facts
    administrator = dict(simulator.connection, username=facts["username"], password=facts["password"])
    with Session.connect(Connection(**administrator)) as session:
        template = Template(simulator, repository, session)
        try:
            yield template
        finally:
            simulator.control.call("set_settings", folder_cuts=0)
            if not session.read(template.obj, "config.template")["config.template"]:
                template.to_template()


def test_bytes_manifest_and_restore(template: Template, tmp_path: Path) -> None:
    seen = template.simulator.last_call()
    planned = template.export(_ansible_check_mode=True, point="one")
    assert planned["changed"] and planned["point"] == {"point": "one"}
    assert os.listdir(template.repository) == ["repository.json"]
    disk = planned["disks"][0]
    assert (disk["mode"], disk["reason"], disk["method"]) == ("full", ALWAYS_FULL, "folder")

    made = template.export(point="one")
    assert made["changed"] and not made["failed"], made
    disk = made["disks"][0]
    assert (disk["mode"], disk["transport"], disk["method"], disk["reason"]) == ("full", "https", "folder", ALWAYS_FULL)
    snapshot = made["point"]["snapshot"]
    assert (snapshot["moid"], snapshot["name"], snapshot["foreign"]) == (None, None, [])
    stored = made["point"]["disks"][0]
    assert (stored["mode"], stored["parent"], stored["change_id"]) == ("full", None, None)
    assert template.modules.backups.disk("template01", KEY, "one") == template.held()
    assert not list(template.repository.glob("vms/*/runs/*"))
    saved = json.loads((template.modules.backups.store("template01") / "configs" / "one.json").read_text("utf-8"))
    assert saved["vm"]["template"] is True

    # The same point again, whatever else is asked for; and another one of the same template.
    for options in ({}, {"mode": "incremental"}, {"snapshot_name": "nightly"}):
        again = template.export(point="one", **options)
        assert not again["changed"] and again["point"] == made["point"]
    second = template.export(point="two", mode="auto")
    assert second["changed"] and second["disks"][0]["mode"] == "full"
    assert template.modules.backups.disk("template01", KEY, "two") == template.held()
    assert template.simulator.changing_calls(seen) == []

    target = tmp_path / "restored"
    target.mkdir()
    uuid = made["point"]["vm_uuid"]
    common = dict(repository=str(template.repository), vm_uuid=uuid)
    restored = template.modules.run("vadp_disk_restore", **common, point="one", target="file", dest=str(target))
    assert not restored["failed"], restored
    assert file_sha256(Path(restored["restored"][0]["target"])) == template.held()
    assert template.modules.run("restore_point_verify", **common, point="one", level="data")["ok"]
    info = template.modules.run("restore_point_info", **common)
    assert [point["point"] for point in info["points"]] == ["one", "two"]


def test_what_cant_be_had_of_a_template(template: Template) -> None:
    for mode in ("incremental", "differential"):
        error = template.refused(mode=mode)
        assert error["kind"] == "InputError" and mode in error["what"] and error["reason"] == ALWAYS_FULL
    for named in ({"snapshot_name": "nightly"}, {"snapshot_moid": "snapshot-1"}):
        error = template.refused(**named)
        assert error["kind"] == "InputError" and error["what"] == "A template has no snapshot"
    error = template.refused(transports=["nbdssl", "hotadd"], vddk_libdir=template.simulator.facts["vddk_libdir"])
    assert error["kind"] == "TransportError" and "Add https to 'transports'" in error["remedy"]
    other = template.export(name="app01")
    assert other["failed"] and other["error"]["what"] == "The snapshot is not named"


def test_a_template_with_snapshots_is_refused(template: Template) -> None:
    """Nothing prevents a virtual machine with a snapshot from becoming a template."""
    template.to_vm()
    task = template.obj.CreateSnapshot_Task("before", "", False, False)
    snapshot = template.session.wait(task, what="The snapshot was not made")
    template.to_template()
    try:
        error = template.refused()
        assert error["kind"] == "VsphereError" and "it has snapshots: 'before'" in error["reason"]
        assert "stands on another file" in error["reason"] and "remove its snapshots" in error["remedy"]
    finally:
        template.to_vm()
        template.session.wait(snapshot.RemoveSnapshot_Task(False, True), what="The snapshot was not removed")
        template.to_template()
    assert template.export(point="after")["changed"]


def _wait_for_layer(template: Template, process: Any) -> None:
    """Until the first bytes are on their way."""
    deadline = time.monotonic() + 60
    while not list(template.repository.glob("vms/*/disk-*/*.part-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("change", ["annotation", "converted", "converted and back"])
def test_changed_while_it_is_read(template: Template, change: str) -> None:
    process = template.modules.start("vadp_disk_export", template.options(point="one", rate_limit="16M"))
    _wait_for_layer(template, process)
    if change == "annotation":
        template.reconfigure(annotation=f"changed at {time.monotonic_ns()}")
    else:
        template.to_vm()
        if change == "converted and back":
            template.to_template()
    result = template.modules.result(process)
    assert result["failed"] and result["error"]["what"] == "The template was changed while it was read", result
    expected = "converted to a virtual machine" if change == "converted" else "its configuration changed from"
    assert expected in result["error"]["reason"]
    # What was read is of no use to anybody.
    for left in ("points/*", "disk-*/*", "runs/*"):
        assert not list(template.repository.glob(f"vms/*/{left}")), left

    if change == "converted":
        template.to_template()
    again = template.export(point="one")
    assert again["changed"] and not again["failed"], again
    assert template.modules.backups.disk("template01", KEY, "one") == template.held()
    assert again["disks"][0]["bytes_read"] and again["disks"][0]["method"] == "folder"
    assert not list(template.repository.glob("vms/*/runs/*"))


@pytest.mark.soak
def test_the_role(template: Template, backups: Backups) -> None:
    simulator = template.simulator
    seen = simulator.last_call()
    outcome = backups.run("template01", arguments=["--check"]).ok()
    assert "check mode, nothing was touched" in outcome.stdout and ALWAYS_FULL in outcome.stdout
    assert os.listdir(backups.repository) == ["repository.json"]

    outcome = backups.run("template01", point="one", verify="data").ok()
    assert "a template: read in full" in outcome.stdout
    assert backups.disk("template01", KEY, "one") == template.held()
    assert {disk["mode"] for disk in backups.manifest("template01", "one")["disks"].values()} == {"full"}
    assert not list(backups.repository.glob("vms/*/runs/*"))
    outcome = backups.run("template01", point="one").ok()
    assert outcome.changed == 0 and "the point was complete already" in outcome.stdout
    # Nothing of it changed anything in vCenter: no change tracking, no access calls, no snapshot.
    assert simulator.changing_calls(seen) == []

    outcome = backups.run("template01", mode="incremental").failed()
    assert ALWAYS_FULL in outcome.stdout
    assert backups.points("template01") == ["one"] and not list(backups.repository.glob("vms/*/runs/*"))
