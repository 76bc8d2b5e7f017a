# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the end-to-end tests can't make happen: limits, a missing firmware, and what a guest does by itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.files import nameless
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.image import create_overlay
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot import run
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.machine import BootDisk, design
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.run import BootRequest, command_line


def test_a_guest_can_not_write_more_than_it_may(tmp_path: Path) -> None:
    descriptor = nameless(str(tmp_path), "x-")
    try:
        assert list(tmp_path.iterdir()) == []
        create_overlay(f"/proc/{os.getpid()}/fd/{descriptor}", 64 << 20)
        options = f"driver=qcow2,file.driver=file,file.filename=/proc/self/fd/{descriptor}"
        machine = design({}, [BootDisk(2000, "one", options)], memory_mb=128, cpus=1)
        request = BootRequest(repository="/r", boot_overlay_limit=16)
        command = [*command_line("qemu-system-x86_64", machine, "tcg", request, str(tmp_path)), "-qmp", "stdio"]
        # Who writes is the monitor, not a guest: there must be no drive that holds the image.
        drive = next(at for at, word in enumerate(command) if word.startswith("ide-hd,"))
        del command[drive - 1 : drive + 1]

        def write(size: int) -> str:
            io = {"command-line": f'qemu-io disk2000 "write -P 1 0 {size}M"'}
            told: List[Any] = [{"execute": "qmp_capabilities"}, {"execute": "human-monitor-command", "arguments": io}]
            text = "".join(json.dumps(line) + "\n" for line in [*told, {"execute": "quit"}])
            return subprocess.run(
                command, input=text, text=True, capture_output=True, timeout=120, pass_fds=[descriptor], check=True
            ).stdout

        assert "write failed" not in write(8)
        assert "write failed: File too large" in write(32)
        assert os.fstat(descriptor).st_size <= 16 << 20
    finally:
        os.close(descriptor)


def test_a_firmware_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    code.write_bytes(b"code")
    variables.write_bytes(b"variables")
    monkeypatch.setattr(run, "FIRMWARES", (("/nowhere", "/nowhere"), (str(code), str(variables))))
    folder = tmp_path / "run"
    folder.mkdir()
    found = run._efi_firmware(str(folder))
    assert found == (str(code), str(folder / "variables.fd"))
    assert (folder / "variables.fd").read_bytes() == b"variables"
    code.unlink()
    with pytest.raises(DataPathError, match=r"not installed: OVMF.*package ovmf \(Debian, Ubuntu\) or edk2-ovmf"):
        run._efi_firmware(str(folder))


def guest(events: List[str], is_open: bool = True) -> run._Guest:
    """A guest as its failures see it: what qemu has told, and consoles that have said nothing."""

    class Quiet:
        class failures:
            found = None

    class Qmp:
        def __init__(self) -> None:
            self.events, self.open = events, is_open

    class Child:
        returncode = 3

        def wait(self, timeout: float) -> int:
            return 3

        def log_tail(self, lines: int) -> str:
            return ""

    parts: Any = (Child(), Qmp(), Quiet(), Quiet())
    return run._Guest(*parts, None, BootRequest(repository="/r"), "/picture")


def test_what_qemu_tells_of_a_guest() -> None:
    one = guest(["RTC_CHANGE", "RESET", "RESET"])
    assert one._failure() == "" and one._resets == 2 and one._failure() == ""
    assert guest(["GUEST_PANICKED"])._failure() == "its kernel panicked"
    assert guest(["SHUTDOWN"])._failure() == "it switched itself off"
    assert guest(["BLOCK_IO_ERROR"])._failure().startswith("a disk failed: it wrote more than boot_overlay_limit (8192")
    assert guest([], is_open=False)._failure().startswith("qemu ended: status 3")


def test_what_is_asked_for() -> None:
    def request(**options: Any) -> BootRequest:
        return BootRequest(repository="/r", **options)

    assert request().steady_seconds == 30
    assert request(boot_pattern="x").steady_seconds is None and request(boot_agent=True).steady_seconds is None
    assert request(boot_pattern="x", boot_screen_seconds=5).steady_seconds == 5
