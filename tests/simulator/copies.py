# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a storage array does to a data centre, done to the state folder of a simulator that is stopped."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any, Dict


def replica(state: Path, to: Path, same_vcenter: bool = True) -> None:
    """A copy of the whole data centre: a test of disaster recovery, or a vCenter that was restored.

    :param same_vcenter: the copy keeps ``about.instanceUuid`` (VADP facts 55); else another vCenter registered the VMs.
    """
    shutil.copytree(state, to, symlinks=True, ignore=shutil.ignore_patterns("control", "lock"))
    if not same_vcenter:
        path = to / "vcenter.json"
        meta = json.loads(path.read_text())
        meta["instance_uuid"] = str(uuid.uuid4())
        path.write_text(json.dumps(meta))


def rollback(state: Path, earlier: Path, configuration: bool = True) -> None:
    """Bring back what an array's snapshot of the datastores, made by :func:`replica`, holds. The VMs are off.

    :param configuration: the datastores hold the VMs' .vmx files. If not, what those say of a VM itself stays as it is:
        its advanced settings and the version of its configuration.
    """
    now = {} if configuration else _configurations(state)
    for name in ("datastores", "tracking", "inventory"):
        shutil.rmtree(state / name)
        shutil.copytree(earlier / name, state / name, symlinks=True)
    for path, config in now.items():
        if path.exists():
            data = json.loads(path.read_text())
            data["kept"]["config"].update(config)
            path.write_text(json.dumps(data))


def _configurations(state: Path) -> Dict[Path, Dict[str, Any]]:
    found = {}
    for path in (state / "inventory").glob("[!.]*.json"):
        data = json.loads(path.read_text())
        if data["class"] == "VirtualMachine":
            config = data["kept"]["config"]
            names = ("extraConfig", "changeVersion", "modified")
            found[path] = {name: config[name] for name in names if name in config}
    return found
