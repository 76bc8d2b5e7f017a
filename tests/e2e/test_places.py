# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A repository that is not where it was: unmounted, or copied in the middle of a backup or restore; or of format 1."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from harness import MIB, Backups, file_sha256
from modules import Modules

STATE = Path("/var/lib/openvadp")
OLD = Path(__file__).parents[1] / "data" / "repository-format-1.tar.xz"
# Of the disks of app01 at the points of that repository, as the simulator told when it was made.
OLD_DISKS = {
    "full": "ec0ec66afa003fe34a67451496746c5afe33de3e09d198d9b94201bc88e9b369",
    "incremental": "27bb076371d8c815fa429037f8448b8fe2c23358e5a3142e5937ac7ee1cb6048",
}


@pytest.fixture
def no_state() -> Iterator[List[Path]]:
    """Repositories whose records on this machine are removed at the end."""
    if os.geteuid() != 0:
        pytest.skip("/var/lib is root's")
    repositories: List[Path] = []
    identities: List[str] = []
    yield repositories
    for path in repositories:
        identities.append(json.loads((path / "repository.json").read_text())["id"])
    for identity in identities:
        shutil.rmtree(STATE / identity, ignore_errors=True)


def files(folder: Path) -> Dict[str, Any]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other(modules: Modules, repository: Path) -> Modules:
    """The same machine's backups with another repository."""
    found = Modules(modules.simulator, repository, modules.vm)
    found.held = dict(modules.held)
    return found


def machines(modules: Modules) -> List[str]:
    return sorted(vm["name"] for vm in modules.simulator.control.call("state")["vms"].values())


def test_the_role_makes_no_repository_of_an_unmounted_folder(backups: Backups, tmp_path: Path) -> None:
    """Nothing is touched, by the role neither; what is said names the variable."""
    mounted = backups.repository.rename(tmp_path / "mounted")
    backups.repository.mkdir()
    seen = backups.simulator.last_call()
    outcome = backups.run("app01").failed()
    assert "it is empty" in outcome.stdout and "vm_backup_create" in outcome.stdout
    assert list(backups.repository.iterdir()) == [] and backups.simulator.changing_calls(seen) == []
    # A copy is none either, whatever is said of it but one of three words.
    shutil.rmtree(backups.repository)
    shutil.copytree(mounted, backups.repository)
    document = json.loads((backups.repository / "repository.json").read_text())
    document["places"][0]["path"] = "/mounted"
    (backups.repository / "repository.json").write_text(json.dumps(document))
    refused = backups.run("app01", create=True).failed()
    assert "in another place" in refused.stdout and "vm_backup_adopt" in refused.stdout
    backups.run("app01", adopt="copy", point="one").ok()
    assert backups.points("app01") == ["one"]
    assert backups.manifest("app01", "one")["repository_id"] not in (document["id"], "")


def test_a_copy_that_was_made_in_the_middle_of_a_backup(modules: Modules, tmp_path: Path) -> None:
    """The original's run is at work meanwhile; who uses the copy disturbs neither it nor the machine."""
    simulator = modules.simulator
    modules.point("p1")
    simulator.write("app01", 2000, 8 * MIB, seed=6, length=8 * MIB)
    begun = modules.done("vadp_recover", **modules.named, repository=str(modules.repository), begin=True)["run"]
    moid = modules.snapshot(begun["snapshot_name"], begun["snapshot_description"])
    held = {key: simulator.disk("app01", key, moid) for key in (2000, 2001)}
    simulator.control.call("nfc", bytes_per_second=4 * MIB)
    running = modules.start("vadp_disk_export", modules.export_options(snapshot_moid=moid))
    deadline = time.monotonic() + 60
    while not list(modules.repository.rglob("*.qcow2.part-*")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    copy = tmp_path / "copy"
    shutil.copytree(modules.repository, copy)
    before = files(copy)
    copied = other(modules, copy)
    for begin in (True, False):
        result = copied.run("vadp_recover", **copied.named, repository=str(copy), begin=begin)
        text = json.dumps(result)
        assert result["failed"] == begin and not result.get("changed") and "vm_backup_adopt" in text, result
        assert begin or result["report_only"] is True
    # What was found is told, and not done.
    assert result["recovered"] == [] and begun["snapshot_name"] in text and "was left as it is" in text
    assert [snapshot["moid"] for snapshot in simulator.snapshots("app01")] == [moid] and files(copy) == before
    # What was complete is restored from it.
    (tmp_path / "images").mkdir()
    restored = copied.done(
        "vadp_disk_restore", repository=str(copy), vm_name="app01", target="file", dest=str(tmp_path / "images")
    )["restored"]
    assert {disk["key"]: file_sha256(Path(disk["target"])) for disk in restored} == modules.held["p1"]
    simulator.control.call("nfc", bytes_per_second=None)
    assert not modules.result(running)["failed"]
    modules.held[begun["point"]] = held
    modules.remove_snapshot(moid)
    modules.done("vadp_recover", **modules.named, repository=str(modules.repository), run_id=begun["id"])
    # As a copy of its own it goes on, and leaves the original's run alone.
    adopted = copied.done("vadp_recover", **copied.named, repository=str(copy), adopt="copy")
    assert adopted["changed"] and {item["what"] for item in adopted["recovered"]} <= {"temporary_file"}
    copied.point("p2")
    copied.verify_bytes("p1", "p2")
    modules.verify_bytes()
    modules.clean()


def test_a_copy_that_was_made_in_the_middle_of_a_restore_destroys_nothing(modules: Modules, tmp_path: Path) -> None:
    """The record says that a machine is half restored. That restore has ended meanwhile, and the machine is used."""
    simulator = modules.simulator
    simulator.write("app01", 2000, 0, seed=5, length=8 * MIB)
    modules.point("p1")
    simulator.control.call("nfc", bytes_per_second=6 * MIB)
    options = {**modules.export_options(), "vm_name": "app01", "target": "new_vm", "name": "erp-new"}
    running = modules.start("vadp_disk_restore", options)
    deadline = time.monotonic() + 60
    while "erp-new" not in machines(modules):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    copy = tmp_path / "copy"
    shutil.copytree(modules.repository, copy)
    simulator.control.call("nfc", bytes_per_second=None)
    assert not modules.result(running)["failed"]
    assert list(copy.glob("vms/*/runs/*.json"))
    named = {**simulator.connection, "name": "erp-new"}
    copied = other(modules, copy)
    for options in ({}, {"begin": True}, {"begin": True, "adopt": "copy"}):
        copied.run("vadp_recover", **named, repository=str(copy), **options)
        assert "erp-new" in machines(modules), options
    # Neither does another restore under that name, which the machine has now.
    result = copied.run("vadp_disk_restore", **dict(options_of(copied), name="erp-new"))
    assert result["failed"] and "erp-new" in machines(modules), result


def test_a_restore_from_a_read_only_copy_that_is_killed_is_done_again(
    modules: Modules, tmp_path: Path, no_state: List[Path]
) -> None:
    """Its record lies on this machine, so the next one finds what it left: the machine that was half made."""
    simulator = modules.simulator
    simulator.write("app01", 2000, 0, seed=5, length=8 * MIB)
    modules.point("p1")
    copy = tmp_path / "copy"
    shutil.copytree(modules.repository, copy)
    no_state.append(copy)
    before = files(copy)
    copied = other(modules, copy)
    simulator.control.call("nfc", bytes_per_second=2 * MIB)
    options = dict(options_of(copied), name="erp-new")
    running = copied.start("vadp_disk_restore", options)
    records: List[Path] = []
    deadline = time.monotonic() + 60
    identity = json.loads((copy / "repository.json").read_text())["id"]
    while not any('"made_disks"' in path.read_text() for path in records):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
        records = list((STATE / identity).glob("vms/*/runs/*.json"))
    running.kill()
    simulator.control.call("nfc", bytes_per_second=None)
    assert copied.done("vadp_disk_restore", **options)["changed"]
    assert machines(modules).count("erp-new") == 1 and not list((STATE / identity).glob("vms/*/runs/*.json"))
    held = simulator.disk("erp-new", 2000)
    assert held == modules.held["p1"][2000] and files(copy) == before


def options_of(modules: Modules) -> Dict[str, Any]:
    return {**modules.export_options(), "vm_name": "app01", "target": "new_vm"}


def test_a_repository_of_format_1(modules: Modules, tmp_path: Path, no_state: List[Path]) -> None:
    """Restores of every kind as it is, read-only too; backups once it was adopted, which older code then refuses."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path)
    repository = tmp_path / "format-1"
    no_state.append(repository)
    before = files(repository)
    old = other(modules, repository)
    named = {"repository": str(repository), "vm_name": "app01"}
    points = old.done("restore_point_info", **named)["points"]
    assert [point["point"] for point in points] == ["full", "incremental"]
    assert old.done("restore_point_verify", **named, level="data")["ok"]
    (tmp_path / "images").mkdir()
    old.done("vadp_disk_restore", **named, target="file", dest=str(tmp_path / "images"))
    image = next((tmp_path / "images").glob("*2000*"))
    assert file_sha256(image)[1] == OLD_DISKS["incremental"]
    # In place: what is noted on the way lies on this machine.
    modules.simulator.control.call("power", vm="app01", state="poweredOff")
    restore = {**old.export_options(), "vm_name": "app01", "point": "full", "target": "in_place", "overwrite": True}
    disks = [{"key": 2000, "target_key": 2000}]
    assert old.done("vadp_disk_restore", **restore, disks=disks)["changed"]
    assert modules.simulator.disk("app01", 2000)[1] == OLD_DISKS["full"]
    identity = json.loads((repository / "repository.json").read_text())["id"]
    assert (STATE / identity).exists() and not list((STATE / identity).rglob("runs/*.json"))
    assert (STATE / identity).stat().st_mode & 0o777 == 0o700
    # Neither a backup nor recovery takes the step to format 2 by itself, nor does check mode.
    result = old.run("vadp_recover", **old.named, repository=str(repository), begin=True, create=True)
    assert result["failed"] and "format 1" in result["msg"] and "adopt" in result["msg"], result
    reported = old.done("vadp_recover", **old.named, repository=str(repository))
    assert not reported["changed"] and "adopt" in str(reported["warnings"])
    assert files(repository) == before
    begun = old.done("vadp_recover", **old.named, repository=str(repository), begin=True, adopt="moved")["run"]
    moid = old.snapshot(begun["snapshot_name"], begun["snapshot_description"])
    made = old.done("vadp_disk_export", **old.export_options(snapshot_moid=moid))
    assert {disk["mode"] for disk in made["disks"]} == {"full"}
    old.remove_snapshot(moid)
    old.done("vadp_recover", **old.named, repository=str(repository), run_id=begun["id"])
    assert json.loads((repository / "repository.json").read_text())["format"] == 2
    assert old.done("restore_point_verify", **named, level="data")["ok"]
