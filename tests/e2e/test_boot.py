# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""restore_point_verify at level boot, and playbook verify.yml: points of a machine that boots, in the real qemu."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from harness import SIMULATOR, Ansible, Simulator, made_repository
from modules import Modules

sys.path.insert(0, str(SIMULATOR))

from vcenter import boot_image, images  # noqa: E402

DISK_BYTES = 192 << 20
SECOND = boot_image.GREETING.replace(b"1", b"2")
_STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
HELLO = b"a boot sector that says this, and nothing more"
# A loop of BIOS' teletype (int 10h) and the first serial port's data register, then hlt for ever.
SECTOR = bytes.fromhex("31c08ed8be1c7c ac84c0740d b40e bb0700 cd10 baf803 ee ebee f4ebfd") + HELLO + b"\0"


class World(Modules):
    """app01, and points: ``first`` and ``second`` boot a kernel, ``sector`` a boot sector, ``broken`` nothing."""

    def __init__(self, simulator: Simulator, repository: Path) -> None:
        super().__init__(simulator, repository)
        self.overlays = repository.parent / "overlays"
        self.overlays.mkdir()
        greeting = images.image("bootable", DISK_BYTES).read_bytes().index(boot_image.GREETING)
        self.track_changes()
        self.point("first")
        self.write(greeting, SECOND)
        self.point("second", mode="incremental", disks=[2000])
        self.write(0, SECTOR.ljust(510, b"\0") + b"\x55\xaa")
        self.point("sector", mode="incremental", disks=[2000])
        self.write(0, bytes(512))
        self.point("broken", mode="incremental", disks=[2000])

    def write(self, offset: int, data: bytes) -> None:
        text = base64.b64encode(data).decode()
        self.simulator.control.call("guest_write", vm=self.vm, disk=2000, offset=offset, data=text)

    def options(self, point: str, **options: Any) -> Dict[str, Any]:
        common = {"repository": str(self.repository), "vm_name": self.vm, "point": point, "level": "boot"}
        return {**common, "boot_accelerator": "tcg", "boot_overlay_dir": str(self.overlays), **options}

    def boot(self, point: str, **options: Any) -> Dict[str, Any]:
        result = self.run("restore_point_verify", **self.options(point, **options))
        assert not result.get("changed") and list(self.overlays.iterdir()) == []
        assert self.guests() == [] and self.folders() == []
        return result

    @property
    def name(self) -> str:
        """How the private folder of a boot of this machine begins."""
        return "openvadp-boot" + self.backups.store(self.vm).name.replace("-", "")[:20]

    def guests(self) -> List[int]:
        command = ["pgrep", "-f", f"qemu-system-x86_64.*/{self.name}"]
        return [int(pid) for pid in subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()]

    def folders(self) -> List[str]:
        bases = {f"/run/user/{os.geteuid()}", os.environ.get("TMPDIR", "/tmp"), "/tmp"}
        found = [name for base in bases if os.path.isdir(base) for name in os.listdir(base)]
        return [name for name in found if name.startswith(self.name)]

    def hashes(self) -> Dict[str, str]:
        """What all files of the repository but the evidence hold."""
        files = [path for path in self.repository.rglob("*") if path.is_file() and "boots" not in path.parts]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "lock"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("boot")
    made_repository(folder / "repository")
    simulator = Simulator(folder / "state", vms="demo")
    try:
        yield World(simulator, folder / "repository")
    finally:
        simulator.stop()


def test_a_chain_of_layers_boots_and_stays_as_it_was(world: World) -> None:
    before = world.hashes()
    # Whatever this machine's KVM is worth: it is found out, and said.
    result = world.boot("second", boot_accelerator="auto", boot_pattern=r"generation \d")
    assert result["ok"] and not result["failed"], result
    boot = result["boot"]
    assert (boot["booted"], boot["by"], boot["firmware"]) == (True, "serial", "bios")
    assert boot["reason"] == "its serial console says 'generation 2'"
    assert (boot["accelerator"], "no KVM" in boot["accelerator_reason"]) in (("kvm", False), ("tcg", True))
    store = world.backups.store(world.vm)
    assert boot["screenshot"] == str(store / "boots" / "second.png")
    picture = Path(boot["screenshot"]).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and min(struct.unpack(">II", picture[16:24])) >= 400
    assert SECOND in Path(boot["serial_log"]).read_bytes()
    for name in ("screenshot", "serial_log"):
        assert os.stat(boot[name]).st_mode & 0o777 == 0o600
    assert world.hashes() == before
    world.verify("second")
    assert sorted(path.name for path in (store / "boots").iterdir()) == ["lock", "second.png", "second.serial.log"]


def test_a_guest_agent_answers(world: World) -> None:
    # With both disks of the machine.
    boot = world.boot("first", boot_agent=True)["boot"]
    assert (boot["booted"], boot["by"]) == (True, "agent") and [disk["key"] for disk in boot["disks"]] == [2000, 2001]
    assert boot_image.GREETING in Path(boot["serial_log"]).read_bytes()


def test_a_screen_that_stays_proves_it_and_silence_does_not(world: World) -> None:
    boot = world.boot("sector", boot_screen_seconds=1)["boot"]
    assert (boot["booted"], boot["by"], boot["reason"]) == (True, "screen", "its screen has shown the same for 1 s")
    assert Path(boot["serial_log"]).read_bytes() == HELLO
    assert Path(boot["screenshot"]).stat().st_size > 1000
    # The evidence is that of the last boot.
    result = world.boot("sector", boot_pattern="login:", boot_timeout=2)
    assert result["failed"] and result["error"]["kind"] == "BootError"
    for words in ("did not boot: sector of VM app01", "within 2 s", "'login:' on its serial console", "sector.png"):
        assert words in result["msg"]
    assert 2 <= result["boot"]["seconds"] < 60 and result["boot"]["booted"] is False
    assert Path(result["boot"]["screenshot"]).is_file()


def test_a_point_that_does_not_boot_says_why(world: World) -> None:
    result = world.boot("broken", fail_on_damage=False)
    assert not result["failed"] and result["ok"] is False and all(disk["ok"] for disk in result["disks"])
    assert result["problems"] == ["it did not boot: it says 'No bootable device'"]
    assert result["boot"]["seconds"] < 60 and Path(result["boot"]["screenshot"]).is_file()
    assert world.boot("broken", fail_on_damage=False, _ansible_check_mode=True)["boot"]["booted"] is None


def test_a_damaged_point_is_not_booted(world: World, tmp_path: Path) -> None:
    layer = world.backups.layer(world.vm, 2000, "broken")
    moved = layer.rename(tmp_path / layer.name)
    try:
        result = world.boot("broken")
        assert result["failed"] and result["boot"] is None and "the file is missing" in result["msg"]
    finally:
        moved.rename(layer)


def test_nothing_outlives_a_module_that_is_killed(world: World) -> None:
    for clean_up in ("the next run", "vadp_recover"):
        process = world.start("restore_point_verify", world.options("sector", boot_pattern="login:"))
        deadline = time.monotonic() + 60
        while not world.guests():
            assert process.poll() is None and time.monotonic() < deadline
        second = world.run("restore_point_verify", **world.options("sector", boot_pattern="login:"))
        assert second["failed"] and second["error"]["kind"] == "LockedError"
        process.kill()
        while world.guests():
            assert time.monotonic() < deadline
        assert list(world.overlays.iterdir()) == [] and len(world.folders()) == 1
        part = world.backups.store(world.vm) / "boots" / "sector.png.part-0123456789ab"
        part.write_bytes(b"")
        if clean_up == "vadp_recover":
            result = world.done("vadp_recover", **world.named, repository=str(world.repository))
            found = [item for item in result["recovered"] if item["what"] == "temporary_file"]
            assert len(found) == 2 and found[1]["id"] == str(part)
        else:
            assert world.boot("sector", boot_screen_seconds=1)["ok"]
        assert world.folders() == [] and not part.exists()
    world.clean()


def test_what_can_not_be_booted_is_refused(world: World) -> None:
    refused: Dict[str, Dict[str, Any]] = {
        "not a regular expression": {"boot_pattern": "("},
        "proves nothing": {"boot_pattern": ".*"},
        "boot_timeout is out of range": {"boot_timeout": 0},
        "boot_memory is out of range": {"boot_memory": 1},
        "No overlay can be made there": {"boot_overlay_dir": "/nonexistent"},
    }
    before = world.tree()
    for words, options in refused.items():
        result = world.boot("sector", **options)
        assert result["failed"] and words in result["msg"], result
    assert world.tree() == before


def test_the_playbook(world: World, ansible: Ansible) -> None:
    variables = {"repository": str(world.repository), "vm": "app01", "boot_accelerator": "tcg", "level": "boot"}
    variables["boot_overlay_dir"] = str(world.overlays)
    outcome = ansible.run(
        "openvadp.backup.verify", variables=dict(variables, point="sector", boot_screen_seconds=1)
    ).ok()
    assert outcome.changed == 0
    for words in ("sector booted after", "sound", "boots/sector.png", "boots/sector.serial.log"):
        assert words in outcome.stdout
    outcome = ansible.run("openvadp.backup.verify", variables=dict(variables, point="latest")).failed()
    assert "broken DID NOT BOOT" in outcome.stdout and "No bootable device" in str(outcome)


# EFI


def _efi_program(folder: Path) -> Path:
    """Kernel, command line and initial file system as one program for EFI."""
    parts = {
        ".cmdline": (folder / "cmdline", 0x30000),
        ".linux": (boot_image.PARTS / "vmlinuz", 0x2000000),
        ".initrd": (folder / "initrd", 0x3000000),
    }
    parts[".cmdline"][0].write_text("console=ttyS0 quiet nokaslr mitigations=off nosmp")
    parts[".initrd"][0].write_bytes(boot_image.initial_files(boot_image.GREETING))
    program = folder / "program.efi"
    command = ["objcopy"]
    for name, (path, address) in parts.items():
        command += ["--add-section", f"{name}={path}", "--change-section-vma", f"{name}={address:#x}"]
    subprocess.run([*command, str(_STUB), str(program)], check=True)
    return program


def _efi_disk(folder: Path, capacity_bytes: int) -> Path:
    """A disk whose one partition, FAT, holds the program that EFI starts where it knows of nothing else."""
    disk, start, sectors = folder / "efi.raw", 2048, capacity_bytes // 512 - 2048
    with disk.open("wb") as file:
        file.truncate(capacity_bytes)
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0xEF, b"\xfe\xff\xff", start, sectors))
        file.seek(510)
        file.write(b"\x55\xaa")
    at = f"{disk}@@{start * 512}"
    subprocess.run(["mformat", "-i", at, "-T", str(sectors), "-h", "64", "-s", "32", "::"], check=True)
    subprocess.run(["mmd", "-i", at, "::EFI", "::EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", at, str(_efi_program(folder)), "::EFI/BOOT/BOOTX64.EFI"], check=True)
    return disk


@pytest.mark.soak
def test_a_machine_with_efi_boots(own_simulator: Simulator, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    made_repository(repository)
    modules = Modules(own_simulator, repository)
    disk = _efi_disk(tmp_path, own_simulator.vm("app01")["disks"][0]["capacity_bytes"])
    with disk.open("rb") as file:
        for offset in range(0, disk.stat().st_size, 1 << 20):
            piece = file.read(1 << 20)
            if any(piece):
                text = base64.b64encode(piece).decode()
                own_simulator.control.call("guest_write", vm="app01", disk=2000, offset=offset, data=text)
    modules.track_changes()
    modules.point("one")
    result = modules.run(
        "restore_point_verify",
        repository=str(repository),
        vm_name="app01",
        level="boot",
        boot_pattern=r"generation \d",
        boot_timeout=300,
    )
    assert result["ok"], result
    boot = result["boot"]
    assert (boot["firmware"], boot["booted"], boot["by"]) == ("efi", True, "serial")
    assert {disk["bus"] for disk in boot["disks"]} == {"SATA (AHCI)"} and any(
        "no driver" in note for note in boot["notes"]
    )
    assert boot_image.GREETING in Path(boot["serial_log"]).read_bytes()
