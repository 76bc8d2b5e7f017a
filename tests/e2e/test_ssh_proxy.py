# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A proxy that is reached by SSH, through a server that cuts silent channels as firewalls do."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
import sshd
from harness import Ansible, Simulator, file_sha256

pytestmark = pytest.mark.skipif(not sshd.available(), reason="no SSH server: run tests/setup.sh tests")

SILENCE = 5


@pytest.fixture
def proxy(tmp_path: Path, ansible: Ansible) -> Iterator[Dict[str, Any]]:
    """Inventory variables of a remote host: this machine, by SSH."""
    with sshd.Sshd(tmp_path / "sshd", [f"ChannelTimeout session:*={SILENCE}s"]) as server:
        yield {
            **server.inventory_variables(),
            "ansible_python_interpreter": str(ansible.venv / "bin" / "python"),
            "ansible_async_dir": str(ansible.folder / "async"),
        }


def test_a_long_export_shows_its_progress_and_survives(
    own_simulator: Simulator, ansible: Ansible, repository: Path, proxy: Dict[str, Any], tmp_path: Path
) -> None:
    facts, control = own_simulator.facts, own_simulator.control
    # As much data as lasts long enough at the limit below.
    control.call("guest_write", vm="app01", disk=2000, offset=0, pattern={"seed": 1, "length": 48 << 20})
    options = {**own_simulator.connection, "name": "app01"}
    common = {"repository": str(repository), "vddk_libdir": facts["vddk_libdir"], "nfc_port": facts["nfc_port"]}
    export = {**options, **common, "snapshot_name": "backup", "rate_limit": "3M", "disks": ["2000"]}
    dest = tmp_path / "dest"
    dest.mkdir()
    tasks = [
        {"openvadp.backup.vm_snapshot": {**options, "snapshot_name": "backup"}},
        {"openvadp.backup.vadp_disk_export": export},
        {"openvadp.backup.vadp_disk_restore": {"repository": str(repository), "vm_name": "app01", "dest": str(dest)}},
        # The same proxy, without what this is about: nothing is said for too long.
        {"ansible.builtin.command": f"sleep {2 * SILENCE}", "ignore_unreachable": True, "register": "silent"},
        {"ansible.builtin.assert": {"that": "silent is unreachable"}, "delegate_to": "localhost"},
    ]
    play = [{"hosts": "vms", "gather_facts": False, "tasks": tasks}]
    begun = time.monotonic()
    outcome = ansible.run(play, hosts=["app01"], host_variables={"app01": proxy}, arguments=["-vvv"])
    assert time.monotonic() - begun > 15
    outcome.ok()
    assert facts["password"] not in outcome.stdout + outcome.stderr

    result = outcome.result("vadp_disk_export")
    assert result["changed"] and result["disks"][0]["seconds"] >= 15
    assert not {"ansible_job_id", "finished", "started", "results_file"} & set(result)
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("app01: Hard disk 1: ")]
    percents = [int(found.group(1)) for line in lines for found in re.finditer(r": (\d+) %, ", line)]
    # A line comes at most every five seconds, and the export takes some fifteen.
    assert len(set(percents)) >= 2 and percents[0] < max(percents), lines
    assert any(re.search(r"MiB/s, \d+ s left$", line) for line in lines), lines
    assert any(": done, " in line for line in lines), lines

    image = Path(outcome.result("vadp_disk_restore")["restored"][0]["target"])
    assert file_sha256(image)[1] == control.call("read_disk", vm="app01", disk=2000)["sha256"]
    # Nothing of the detour is left: payloads, job files, folders of progress files.
    folders = set(re.findall(r"/[\w/.-]+/vadp-progress-\w{8}\b", outcome.stdout))
    assert len(folders) >= 2 and not any(Path(folder).exists() for folder in folders)
    left = [path for name in ("tmp", "async") for path in (ansible.folder / name).rglob("*") if path.is_file()]
    # Those of the task that was cut off are Ansible's own affair.
    assert not [path for path in left if "command" not in path.name]
