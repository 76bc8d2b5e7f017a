# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The oldest and the newest ansible-core as the controller; all other tests run on the one in between."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import ROOT, Ansible, Backups, Simulator, file_sha256

CONTROLLERS = ROOT / "build" / "controllers"


@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_back_up_and_restore(name: str, simulator: Simulator, repository: Path, tmp_path: Path) -> None:
    controller = CONTROLLERS / name
    if not (controller / "bin" / "ansible-playbook").exists():
        pytest.skip(f"there is no {controller}: run tests/setup.sh tests, with a Python that this ansible-core wants")
    backups = Backups(simulator, Ansible(tmp_path / "ansible", controller=controller), repository)
    held = simulator.disk("copy01", 2000)
    # The connection comes from the action group, the rest from variables.
    variables = backups.variables(point="p1", verify="structure")
    for option in simulator.connection:
        del variables["vm_backup_" + option]
    play = {
        "hosts": "vms",
        "gather_facts": False,
        "module_defaults": {"group/openvadp.backup.vadp": simulator.connection},
        "tasks": [{"name": "Back up", "ansible.builtin.include_role": {"name": "openvadp.backup.vm_backup"}}],
    }
    backups.ansible.run([play], hosts=["copy01"], variables=variables, arguments=["--check"]).ok()
    assert os.listdir(repository) == ["repository.json"]
    backups.ansible.run([play], hosts=["copy01"], variables=variables).ok()
    outcome = backups.run("copy01", "nobody01", point="p1").failed()
    assert outcome.stats["copy01"]["changed"] == 0 and outcome.stats["nobody01"]["failures"] == 1
    table = outcome.stdout.split("PLAY [Show what was backed up]")[1]
    assert "copy01    p1     2000 Hard disk 1" in table and "FAILED" in table

    images = tmp_path / "images"
    images.mkdir()
    restore = {"repository": str(repository), "vm": "copy01", "dest": str(images)}
    outcome = backups.ansible.run("openvadp.backup.restore", variables=restore).ok()
    assert [file_sha256(path) for path in images.iterdir()] == [held]
