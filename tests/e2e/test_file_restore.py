# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vadp_file_restore and playbook restore_files.yml, on points that were backed up from the simulator."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

from harness import SIMULATOR
from modules import Modules

sys.path.insert(0, str(SIMULATOR))

from vcenter.images import known_files  # noqa: E402


def _options(modules: Modules) -> Dict[str, Any]:
    return {"repository": str(modules.repository), "vm_name": modules.vm, "disks": [2000]}


def test_the_guests_files_come_out_of_a_chain(modules: Modules, tmp_path: Path) -> None:
    modules.track_changes()
    modules.point("p1")
    for number in range(2, 4):
        # Elsewhere on the disk than its files.
        modules.simulator.write(modules.vm, 2000, (20 + number) << 20, seed=number)
        modules.point(f"p{number}", mode="incremental")
    dest = tmp_path / "files"
    dest.mkdir()
    options = dict(_options(modules), paths=["/**"])
    listed = modules.done("vadp_file_restore", **options, list=True, query="[?type=='file'].path")
    kind = next(volume["type"] for volume in listed["volumes"] if volume["readable"])
    known = known_files(kind)
    assert set(known) <= {path.lstrip("/") for path in listed["files"]}
    assert modules.done("vadp_file_restore", **options, dest=str(dest), _ansible_check_mode=True)["changed"]
    assert list(dest.iterdir()) == []
    result = modules.done("vadp_file_restore", **options, dest=str(dest))
    assert result["changed"] and result["point"] == "p3"
    sums = {file["path"].lstrip("/"): file["sha256"] for file in result["files"] if file["type"] == "file"}
    for name, content in known.items():
        assert (dest / name).read_bytes() == content
        assert sums[name] == hashlib.sha256(content).hexdigest()
    assert not modules.done("vadp_file_restore", **options, dest=str(dest))["changed"]
    _through_the_playbook(modules, tmp_path, {path: sums[path] for path in known})


def _through_the_playbook(modules: Modules, tmp_path: Path, sums: Dict[str, str]) -> None:
    ansible = modules.backups.ansible
    dest = tmp_path / "by-playbook"
    dest.mkdir()
    variables = {"repository": str(modules.repository), "vm": modules.vm, "vm_file_restore_disks": [2000]}
    paths = [f"/{path}" for path in sorted(sums)]
    outcome = ansible.run("openvadp.backup.restore_files", variables=dict(variables, paths=paths, versions=True)).ok()
    found = {file["path"]: file["points"] for file in outcome.result("vadp_file_restore")["files"]}
    assert {path: points for path, points in found.items() if path in paths} == dict.fromkeys(paths, ["p1", "p2", "p3"])
    assert outcome.changed == 0 and "p1 .. p3 (3)" in outcome.stdout
    outcome = ansible.run("openvadp.backup.restore_files", variables=dict(variables, paths=paths, dest=str(dest))).ok()
    assert outcome.changed == 1 and str(dest) + paths[0] in outcome.stdout
    assert {path: hashlib.sha256((dest / path).read_bytes()).hexdigest() for path in sums} == sums
    missing = modules.run("vadp_file_restore", **_options(modules), paths=["/missing"], dest=str(dest))
    assert "There is no such file: /missing in restore point p3" in missing["msg"]
    _with_a_pipe(modules, tmp_path, variables)


def _with_a_pipe(modules: Modules, tmp_path: Path, variables: Dict[str, Any]) -> None:
    """What could not be restored is told; the task has changed something, and was not skipped."""
    tree, disk, dest = tmp_path / "tree", tmp_path / "disk", tmp_path / "beside-a-pipe"
    tree.mkdir()
    dest.mkdir()
    (tree / "file").write_text("kept", encoding="ascii")
    os.mkfifo(tree / "pipe")
    with disk.open("wb") as image:
        image.truncate(4 << 20)
    tools = dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin:/sbin")
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(disk)], check=True, env=tools)
    modules.simulator.control.call("guest_write", vm=modules.vm, disk=2001, offsets=[0], data=disk.read_bytes())
    modules.point("p4", mode="incremental")
    options = dict(variables, vm_file_restore_disks=[2001], paths="/", dest=str(dest))
    outcome = modules.backups.ansible.run("openvadp.backup.restore_files", variables=options).ok()
    assert outcome.changed == 1 and "skipped: /pipe on 2001: it is a named pipe" in outcome.stdout
    assert (dest / "file").read_text(encoding="ascii") == "kept" and not (dest / "pipe").exists()
