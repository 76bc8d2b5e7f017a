# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.saved import read_configuration

GOOD = {
    "format": 1,
    "server": {"name": "vCenter", "instance_uuid": None},
    "vm": {"name": "app01", "folder": "/DC0/vm"},
    "disks": [{"key": 2000, "controller": {"type": "pvscsi"}}],
    "config": {},
}


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(GOOD))
    assert read_configuration(path, list(GOOD)) == GOOD
    with pytest.raises(DamagedError, match="lacks 'more'"):
        read_configuration(path, ["more"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(GOOD)[:-9], "Unterminated|Expecting"),
        ("[" * 100000, "recursion"),
        ("[]", "is not an object"),
        (json.dumps({**GOOD, "vm": {"name": []}}), r"vm\.name is not a string"),
        (json.dumps({**GOOD, "disks": [{"key": 2000}]}), r"disks\[0\] lacks 'controller'"),
        (None, "No such file"),
    ],
)
def test_anything_else_is_damage(tmp_path: Path, text: Any, words: str) -> None:
    """As another writer may have registered it, with the right hash."""
    path = tmp_path / "saved.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DamagedError, match=f"saved configuration.*({words})"):
        read_configuration(path)
