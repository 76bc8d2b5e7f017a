# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""restore_point_info and restore_point_verify, as Ansible calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.modules import restore_point_info, restore_point_verify

from .conftest import KEY, UUID, World, flip

MIB = 1 << 20
Call = Callable[..., Dict[str, Any]]


@pytest.fixture
def call(world: World, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(module: ModuleType, **options: Any) -> Dict[str, Any]:
        with patch_module_args({"repository": str(world.repository.path), **options}), pytest.raises(
            SystemExit
        ) as ended:
            module.main()
        result: Dict[str, Any] = json.loads(capsys.readouterr().out)
        assert ended.value.code == (1 if result.get("failed") else 0)
        assert result.get("changed") is not True
        return result

    return run


@pytest.fixture
def held(world: World) -> World:
    world.point("zulu", MIB, [(0, b"a" * 65536)])
    world.point("alpha", MIB, [(0, b"b" * 512)], parent="zulu")
    with world.store.lock(new_run_id(), "test"):
        world.store.write_facts({"name": "app01"})
    return world


def files(folder: Path) -> List[Any]:
    return sorted(
        (os.path.join(path, name), os.stat(os.path.join(path, name)).st_mtime_ns)
        for path, dummy, names in os.walk(str(folder))
        for name in names
    )


def test_names_in_results_move_no_cursor_and_can_be_given_back(held: World, call: Call) -> None:
    evil = "app\x1b[2J\u202ex"
    with held.store.lock(new_run_id(), "test"):
        held.store.write_facts({"name": evil})
    held.config = {}
    result = call(restore_point_verify, vm_uuid=UUID, point="absent\u202e")
    del result["invocation"]  # what the user wrote
    assert result["failed"] and "\\u202e" in result["msg"] and "\u202e" not in json.dumps(result, ensure_ascii=False)
    unknown = call(restore_point_info, vm_name="other")
    assert "app\\x1b[2J\\u202ex" in unknown["msg"]
    for name in (evil, "app\\x1b[2J\\u202ex"):
        assert [point["point"] for point in call(restore_point_info, vm_name=name)["points"]] == ["zulu", "alpha"]


def test_what_a_run_has_come_to(held: World, call: Call) -> None:
    """From the repository alone: its own point, or the one that was there before; and whether its files are there."""
    run_id = str(held.store.resolve("alpha")["run_id"])
    outcome = call(restore_point_info, run_id=run_id)
    assert outcome["complete"] is True and [point["point"] for point in outcome["points"]] == ["alpha"]
    with held.store.lock(new_run_id(), "test"):
        before = held.store.create_run("alpha", controller=True, complete_before=True)
        begun = held.store.create_run("omega", controller=True)
    outcome = call(restore_point_info, run_id=before.run_id)
    assert outcome["complete"] is True and [point["point"] for point in outcome["points"]] == ["alpha"]
    for other in (begun.run_id, new_run_id()):
        outcome = call(restore_point_info, run_id=other)
        assert outcome["complete"] is False and outcome["points"] == []
    assert call(restore_point_info, run_id="../../x")["failed"]
    held.store.layer_path(KEY, "alpha").unlink()
    for one in (run_id, before.run_id):
        assert call(restore_point_info, run_id=one)["complete"] is False
    flip(held.store.manifest_path("alpha"), 40)
    assert call(restore_point_info, run_id=before.run_id).get("complete") is not True
    assert call(restore_point_info, run_id=run_id).get("complete") is not True


def test_info(held: World, call: Call) -> None:
    points = call(restore_point_info)["points"]
    assert [(point["point"], point["mode"], point["disks"][0]["parent"]) for point in points] == [
        ("zulu", "full", None),
        ("alpha", "incremental", "zulu"),
    ]
    assert points[0]["vm_name"] == "app01" and "manifest" not in points[0]
    whole = call(restore_point_info, vm_uuid=UUID, point="latest", manifests=True)["points"]
    assert [point["manifest"] for point in whole] == [held.store.resolve("alpha")]
    assert call(restore_point_info, query="[?mode == 'full'].point")["points"] == ["zulu"]
    assert call(restore_point_info, vm_name="app01", point="nothing")["points"] == []
    for moment, names in (
        ("2026-11-22T08:44Z", ["zulu"]),
        ("before 2030-01-01T00:00Z", ["alpha"]),
        ("2001-01-01T00:00Z", []),
    ):
        assert [point["point"] for point in call(restore_point_info, point=moment)["points"]] == names
    assert call(restore_point_verify, vm_name="app01", point="2026-11-22T08:44Z")["point"] == "zulu"
    assert "not a time" in call(restore_point_info, point="2026-11-22T08:44")["msg"]
    assert "can't be applied" in call(restore_point_info, query="[?")["msg"]
    assert "no such virtual machine" in call(restore_point_info, vm_name="app02")["msg"]
    assert "can't be the name" in call(restore_point_info, point="../x")["msg"]
    assert "not found" in call(restore_point_info, repository="/nowhere")["msg"]


def test_info_lists_what_is_damaged(held: World, call: Call) -> None:
    flip(held.store.manifest_path("alpha"), 100)
    (held.store.path / "vm.json").unlink()
    points = call(restore_point_info, point="latest")["points"]
    assert [(point["point"], point["damaged"], point["vm_name"]) for point in points] == [
        ("zulu", False, "app01"),
        ("alpha", True, "app01"),
    ]
    assert "manifest of a restore point is damaged" in points[1]["problem"]


@pytest.mark.parametrize("check_mode", [False, True])
def test_verify(held: World, call: Call, check_mode: bool) -> None:
    before = files(held.repository.path)
    result = call(restore_point_verify, vm_name="app01", level="data", _ansible_check_mode=check_mode)
    assert result["ok"] and result["point"] == "alpha" and result["problems"] == []
    assert [(disk["key"], disk["ok"], disk["layers"]) for disk in result["disks"]] == [(KEY, True, 2)]
    assert files(held.repository.path) == before


def test_verify_tells_damage_and_fails_unless_told_not_to(held: World, call: Call) -> None:
    flip(held.store.layer_path(KEY, "zulu"), 70000)
    flip(held.store.nvram_path("alpha"), 0)
    result = call(restore_point_verify, vm_uuid=UUID)
    assert result["failed"] and "Hard disk 1: point zulu: zulu.qcow2: its content changed" in result["msg"]
    assert result["error"]["kind"] == "DamagedError" and not result["ok"] and not result["disks"][0]["ok"]
    assert "the NVRAM" in result["problems"][0]
    told = call(restore_point_verify, vm_uuid=UUID, fail_on_damage=False)
    assert (
        not told.get("failed")
        and told["ok"] is False
        and told["disks"][0]["problems"] == result["disks"][0]["problems"]
    )
    flip(held.store.manifest_path("alpha"), 100)
    told = call(restore_point_verify, vm_uuid=UUID, fail_on_damage=False)
    assert (
        told["ok"] is False
        and "latest restore point can't be determined" in told["problems"][0]
        and told["disks"] == []
    )
    # Neither a missing point nor a missing VM is damage.
    for options in ({"vm_uuid": UUID, "point": "nothing"}, {"vm_name": "app02"}):
        assert call(restore_point_verify, fail_on_damage=False, **options)["failed"]
