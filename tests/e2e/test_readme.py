# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""README's first backup, as it is pasted: from the collection's archive, in the home of a user who has nothing yet."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Dict

import pytest
from harness import ROOT, Simulator, file_sha256

# The machine has the packages; pip has a test of its own, which takes long.
PACKAGES = "apt-get "
ENVIRONMENT = ("/usr/bin/python3 -m venv ", "pip install ")


def pasted() -> str:
    """The commands of the section, in their order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## A first backup against a real vCenter\n")[1].split("\n## ")[0]
    found = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    return "".join(found)


def script(simulator: Simulator, folder: Path, installs: bool) -> str:
    """What is pasted, with what is another one here: vCenter, its ports, folders, and the packages of the machine."""
    facts = simulator.facts
    left_out = (PACKAGES,) if installs else (PACKAGES, *ENVIRONMENT)
    lines = pasted().splitlines(keepends=True)
    assert all(sum(line.startswith(command) for line in lines) == 1 for command in (PACKAGES, *ENVIRONMENT))
    text = "".join(line for line in lines if not line.startswith(left_out))
    replaced = {
        "/opt/openvadp": str(folder / "venv" if installs else ROOT / ".venv"),
        "openvadp-backup-0.1.0.tar.gz": str(next(folder.glob("openvadp-backup-*.tar.gz"))),
        "/backup\n": f"{folder}/backup\n",
        "/etc/ssl/vcenter-ca.pem": facts["ca_path"],
        "/opt/vmware-vix-disklib-distrib": facts["vddk_libdir"],
        "vcenter.example.com": facts["host"],
        "backup@vsphere.local": facts["backup_username"],
        "    db01:\n": "",
        "END\nexport ": f"    vm_backup_nfc_port: {facts['nfc_port']}\nEND\nexport VMWARE_PORT={facts['port']} ",
        "read -rs VMWARE_PASSWORD": f"read -rs VMWARE_PASSWORD <<< '{facts['backup_password']}'",
    }
    for word, other in replaced.items():
        assert word in text, word
        text = text.replace(word, other)
    return "set -e\n" + text


def environment(folder: Path) -> Dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "HOME": str(folder), "ANSIBLE_NOCOLOR": "1"}


INSTALLED = pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(900)], id="installed")


@pytest.mark.parametrize("installs", [pytest.param(False, id="here"), INSTALLED])
def test_the_first_backup_works_as_pasted(own_simulator: Simulator, tmp_path: Path, installs: bool) -> None:
    subprocess.run([str(ROOT / "tests/tools/build.sh"), str(tmp_path)], check=True, capture_output=True)
    outcome = subprocess.run(
        ["bash"],
        input=script(own_simulator, tmp_path, installs),
        env=environment(tmp_path),
        cwd=str(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    said = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, said
    assert "Traceback" not in said
    repository = tmp_path / "backup"
    assert len(list(repository.glob("vms/*/points/*.json"))) == 1
    raw = tmp_path / "disk.raw"
    layer = next(repository.glob("vms/*/disk-2000/*.qcow2"))
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(layer), str(raw)], check=True)
    assert file_sha256(raw) == own_simulator.disk("app01", 2000)
