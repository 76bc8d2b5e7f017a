# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Backup and restore need no device, so they need no root."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator

import pytest
from harness import ROOT, Ansible, Backups, Simulator, file_sha256

USER = "nobody"
KEYS = (2000, 2001)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody can enter; pytest's own are root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-user-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _readable(venv: Path, uid: int, folder: Path) -> Path:
    """The Python environment, or a copy of it where the user can't read it (a home of root's is closed)."""
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    probe = [*user, str(venv / "bin/python"), "-c", "import ansible, pyVmomi, nbd"]
    if subprocess.run(probe, check=False, cwd="/", capture_output=True).returncode == 0:
        return venv
    shutil.copytree(venv, folder / "venv", symlinks=True)
    return folder / "venv"


def _readable_tree(folder: Path) -> Path:
    """A copy of the collection and of the tests' plugins: links lead into folders that may be closed."""
    collection = folder / "tree" / "ansible_collections" / "openvadp" / "backup"
    for name in ("plugins", "roles", "playbooks", "meta"):
        shutil.copytree(ROOT / name, collection / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "galaxy.yml", collection)
    shutil.copytree(Path(__file__).parent / "plugins", folder / "e2e-plugins")
    return folder / "tree"


@pytest.mark.skipif(os.geteuid() != 0, reason="these tests run as an ordinary user already")
def test_backup_and_restore_as_nobody(own_simulator: Simulator, public: Path) -> None:
    uid = pwd.getpwnam(USER).pw_uid
    for name in ("repository", "images"):
        (public / name).mkdir()
        os.chown(public / name, uid, uid)
    shutil.copy(own_simulator.facts["ca_path"], public / "ca.pem")
    shutil.copytree(own_simulator.facts["vddk_libdir"], public / "vddk", symlinks=True)
    for path in [public / "ca.pem", *(public / "vddk").rglob("*")]:
        path.chmod(0o755)
    own_simulator.facts.update(ca_path=str(public / "ca.pem"), vddk_libdir=str(public / "vddk"))

    ansible = Ansible(
        public / "ansible",
        venv=_readable(ROOT / ".venv", uid, public),
        tree=_readable_tree(public),
        plugins=public / "e2e-plugins",
        uid=uid,
    )
    backups = Backups(own_simulator, ansible, public / "repository")
    held = {key: own_simulator.disk("app01", key) for key in KEYS}
    backups.run("app01", point="p1", create=True).ok()
    own_simulator.write("app01", 2000, 0)
    backups.run("app01", point="p2").ok()
    assert backups.manifest("app01", "p2")["disks"][2000]["mode"] == "incremental"
    owners = {path.stat().st_uid for path in backups.repository.rglob("*")}
    assert owners == {uid}

    variables = {"repository": str(backups.repository), "vm": "app01", "point": "p1", "dest": str(public / "images")}
    outcome = ansible.run("openvadp.backup.restore", variables=variables).ok()
    images = {disk["key"]: Path(disk["target"]) for disk in outcome.result("vadp_disk_restore")["restored"]}
    assert {key: file_sha256(path) for key, path in images.items()} == held
