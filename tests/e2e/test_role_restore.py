# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Role vm_restore and playbook restore.yml: what is written is what the disks held at the point."""

from __future__ import annotations

from pathlib import Path

from harness import MIB, Backups, Simulator, file_sha256

KEYS = (2000, 2001)


def test_to_files_in_place_and_as_a_new_machine(own_simulator: Simulator, backups: Backups, tmp_path: Path) -> None:
    """An older point as raw images and the newest in place; a machine that must not be written to is refused."""
    simulator = backups.simulator = own_simulator
    backups.run("app01", point="p1").ok()
    held = {"p1": {key: simulator.disk("app01", key) for key in KEYS}}
    simulator.write("app01", 2000, 0, 7 * MIB, seed=9)
    simulator.control.call("guest_discard", vm="app01", disk=2000, offset=32 * MIB, length=8 * MIB)
    held["p2"] = {key: simulator.disk("app01", key) for key in KEYS}
    backups.run("app01", point="p2").ok()
    simulator.write("app01", 2000, 3 * MIB, seed=10)

    dest = tmp_path / "images"
    dest.mkdir()
    source = {"repository": str(backups.repository), "vm": "app01"}
    outcome = backups.ansible.run("openvadp.backup.restore", variables=dict(source, point="p1", dest=str(dest))).ok()
    assert outcome.changed == 1 and "yes" in outcome.stdout
    images = {disk["key"]: Path(disk["target"]) for disk in outcome.result("vadp_disk_restore")["restored"]}
    assert {key: file_sha256(path) for key, path in images.items()} == held["p1"]
    again = backups.ansible.run("openvadp.backup.restore", variables=dict(source, point="p1", dest=str(dest))).ok()
    assert again.changed == 0

    # The target's disks hold something else where the point has zeros.
    simulator.write("restore01", 2000, 33 * MIB, 60 * MIB, seed=11)
    in_place = {
        **source,
        **simulator.role_variables("vm_restore_"),
        "target": "in_place",
        "vm_restore_name": "restore01",
        "vm_restore_disks": [{"key": key, "target_key": key} for key in KEYS],
    }
    seen = simulator.last_call()
    outcome = backups.ansible.run("openvadp.backup.restore", variables=in_place).failed()
    assert "overwrite" in outcome.result("vadp_disk_restore")["msg"]
    in_place["vm_restore_overwrite"] = True
    backups.ansible.run("openvadp.backup.restore", variables=in_place, arguments=["--check"]).ok()
    running = dict(in_place, vm_restore_name="app01")
    outcome = backups.ansible.run("openvadp.backup.restore", variables=running).failed()
    assert "it is poweredOn: power it off" in outcome.result("vadp_disk_restore")["msg"]
    assert simulator.changing_calls(seen) == []

    outcome = backups.ansible.run("openvadp.backup.restore", variables=in_place).ok()
    assert [disk["transport"] for disk in outcome.result("vadp_disk_restore")["restored"]] == ["nbdssl", "nbdssl"]
    assert {key: simulator.disk("restore01", key) for key in KEYS} == held["p2"]
    assert simulator.snapshots("restore01") == []

    new = {
        **source,
        **simulator.role_variables("vm_restore_"),
        "target": "new_vm",
        "point": "p1",
        "vm_restore_name": "app01-restored",
        "vm_restore_networks": {"VM Network": "Backup Network"},
        "vm_restore_mac_addresses": "new",
        "vm_restore_power_on": True,
    }
    backups.ansible.run("openvadp.backup.restore", variables=new, arguments=["--check"]).ok()
    outcome = backups.ansible.run("openvadp.backup.restore", variables=new).ok()
    assert outcome.changed == 1 and "app01-restored/Hard disk 1" in outcome.stdout
    assert {key: simulator.disk("app01-restored", key) for key in KEYS} == held["p1"]
    assert simulator.vm("app01-restored")["power_state"] == "poweredOn"
    # A second run makes no second machine.
    outcome = backups.ansible.run("openvadp.backup.restore", variables=new).failed()
    assert "a virtual machine of this name already" in outcome.result("vadp_disk_restore")["msg"]
