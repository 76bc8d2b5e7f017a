# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A run that has done nothing of what was wanted is no success: its exit code says so, and nothing was touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import pytest
from harness import Backups, Simulator


@pytest.mark.parametrize(
    ("playbook", "arguments", "words"),
    [
        ("backup", ["-e", "vm_backup_hosts=app99"], "No host matches app99"),
        ("backup", ["--limit", "localhost"], "--limit localhost leaves none of the hosts that vms matches"),
        ("backup", ["--tags", "nightly"], "No backup was made."),
        ("backup", ["--skip-tags", "untagged"], "No backup was made."),
        ("preflight", ["-e", "vm_backup_hosts=app99"], "No host matches app99"),
        ("preflight", ["--tags", "nightly"], "Nothing was looked at."),
        ("backup_lan", [], "No host matches backup_proxies"),
        ("backup_proxy", [], "No host matches backup_proxies"),
        ("restore", ["--limit", "app01"], "--limit app01 leaves none of the hosts that localhost matches"),
        ("restore", ["--tags", "x", "-e", "repository=/nowhere", "-e", "vm=a"], "Nothing was restored."),
        (
            "restore_files",
            ["--tags", "x", "-e", "repository=/r", "-e", "vm=a", "-e", "paths=/"],
            "Nothing was restored.",
        ),
        ("verify", ["--tags", "x"], "Nothing was verified."),
    ],
)
def test_a_play_that_does_nothing_fails(backups: Backups, playbook: str, arguments: List[str], words: str) -> None:
    seen = backups.simulator.last_call()
    name = f"openvadp.backup.{playbook}"
    outcome = backups.ansible.run(name, hosts=["app01"], variables=_connection(backups, playbook), arguments=arguments)
    assert outcome.failed() and words in outcome.stdout + outcome.stderr, outcome
    assert backups.simulator.last_call() == seen and _untouched(backups)


def _untouched(backups: Backups) -> bool:
    return [path.name for path in backups.repository.iterdir()] == ["repository.json"]


def _connection(backups: Backups, playbook: str) -> Dict[str, Any]:
    return backups.variables() if playbook in ("backup", "preflight") else {}


@pytest.mark.parametrize(
    ("role", "variables", "words"),
    [
        ("vm_backup", {"vm_backup_exclude_disk": ["2001"]}, "vm_backup_exclude_disk (vm_backup_exclude_disks?)"),
        ("vm_restore", {"vm_restore_chnged_only": True}, "vm_restore_chnged_only (vm_restore_changed_only?)"),
        ("vm_file_restore", {"vm_file_restore_own": 1, "vm_file_restore_paths": "/"}, "vm_file_restore_own"),
        ("backup_proxy", {"backup_proxy_writeable": False}, "backup_proxy_writeable (backup_proxy_writable?)"),
        (
            "backup_lan",
            {"backup_lan_subnet": "192.0.2.0/24", "backup_lan_vlan": 7},
            "backup_lan_vlan (backup_lan_vlan_id?)",
        ),
    ],
)
def test_a_variable_that_no_role_knows_is_refused(
    backups: Backups, role: str, variables: Dict[str, Any], words: str
) -> None:
    seen = backups.simulator.last_call()
    known = {f"{role}_repository": str(backups.repository)} if role.startswith("vm_") else {}
    play = {
        "hosts": "vms",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.include_role": {"name": f"openvadp.backup.{role}"}}],
        "vars": {
            "ansible_connection": "local",
            "ansible_python_interpreter": str(backups.ansible.venv / "bin" / "python"),
        },
    }
    outcome = backups.ansible.run([play], hosts=["app01"], variables={**known, **variables})
    said = outcome.failed().stdout
    assert f"Role {role} does not know these variables" in said and words in said, outcome
    assert backups.simulator.last_call() == seen and _untouched(backups)


def test_a_role_refuses_where_errors_are_ignored_too(backups: Backups, simulator: Simulator) -> None:
    """A guard is a task, and ``ignore_errors`` of a play passes tasks over that fail."""
    seen = simulator.last_call()
    tell = {"name": "told", "ansible.builtin.debug": {"var": "results"}, "vars": {"results": "{{ vm_backup_result }}"}}
    play = {
        "hosts": "vms",
        "gather_facts": False,
        "ignore_errors": True,
        "tasks": [{"ansible.builtin.include_role": {"name": "openvadp.backup.vm_backup"}}, tell],
    }
    variables = backups.variables(exclude_disk=["2001"])
    told = backups.ansible.run([play], hosts=["app01"], variables=variables).result("debug", task="told")["results"]
    assert told["state"] == "failed" and "vm_backup_exclude_disk (vm_backup_exclude_disks?)" in told["reason"], told
    assert simulator.last_call() == seen and _untouched(backups)


def test_a_library_that_is_named_and_absent_is_an_error(backups: Backups, simulator: Simulator) -> None:
    """Otherwise whole disks would be downloaded each night, by a way that nobody chose."""
    seen = simulator.last_call()
    outcome = backups.run("app01", vddk_libdir="/nonexistent/vddk")
    assert "The VDDK that is named can't be used: /nonexistent/vddk" in outcome.failed().stdout, outcome
    assert simulator.changing_calls(seen) == [] and _untouched(backups)
    assert simulator.snapshots("app01") == []


def test_every_variable_works_as_text(backups: Backups, simulator: Simulator, tmp_path: Path) -> None:
    """As a survey, or -e name=value, sends each: what is off stays off, and a list is a list."""
    text = {
        "vm_backup_transports": "nbdssl, https",
        "vm_backup_disks": '["2000"]',
        "vm_backup_exclude_disks": "",
        "vm_backup_change_tracking": "no",
        "vm_backup_reset_tracking": "n",
        "vm_backup_access": "false",
        "vm_backup_require_transport": "off",
        "vm_backup_use_instance_uuid": "False",
        "vm_backup_proxy_physical": "true",
        "vm_backup_io_timeout": "60",
        "vm_backup_parallel_disks": "1",
        "vm_backup_snapshot_removal_retries": "2",
        "vm_backup_verify": "structure",
    }
    variables = {name: str(value) for name, value in backups.variables().items()}
    seen = simulator.last_call()
    outcome = backups.ansible.run("openvadp.backup.backup", hosts=["app01"], variables={**variables, **text}).ok()
    point = backups.points("app01")[0]
    assert set(backups.manifest("app01", point)["disks"]) == {2000}
    # One names the point in the machine.
    assert simulator.changing_calls(seen).count("ReconfigVM_Task") == 1, "change tracking was not asked for"
    assert "nbdssl" in outcome.stdout

    restored = tmp_path / "restored"
    restored.mkdir()
    options = {"repository": str(backups.repository), "vm": "app01", "dest": str(restored)}
    options.update(
        vm_restore_disks='[{"key": 2000, "format": "qcow2"}]', vm_restore_verify="yes", vm_restore_overwrite="no"
    )
    backups.ansible.run("openvadp.backup.restore", variables=options).ok()
    assert [path.suffix for path in restored.iterdir()] == [".qcow2"]


def test_become_of_the_user_one_already_is(backups: Backups) -> None:
    """A job's folder is where the job says: ``~`` is another one where HOME is not that of the passwd file."""
    options = {"repository": str(backups.repository), "vm_name": "nobody", "dest": str(backups.repository.parent)}
    task = {"name": "restored", "openvadp.backup.vadp_disk_restore": options, "become": True}
    outcome = backups.ansible.run([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}])
    assert "holds no such virtual machine: nobody" in outcome.result("vadp_disk_restore")["msg"], outcome
    assert not list(backups.ansible.folder.rglob(".ansible_async/*"))
