# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The password, given as a variable, shows up nowhere: not while a backup and a restore run, and not afterwards."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Iterator, Set

from harness import Backups, Simulator


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # gone meanwhile
        return b""


class Watch(threading.Thread):
    """Looks for a secret in the command line and environment of every process, and in files that come and go."""

    def __init__(self, secret: str, folder: Path) -> None:
        super().__init__(daemon=True)
        self.secret = secret.encode()
        self.folder = folder
        self.found: Set[str] = set()
        self.programs: Set[str] = set()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                line = _read(process / "cmdline")
                self.programs.add(os.path.basename(line.split(b"\0")[0].decode(errors="replace")))
                if self.secret in line or self.secret in _read(process / "environ"):
                    self.found.add(line.replace(b"\0", b" ").decode(errors="replace")[:200])
            self.found |= {str(path) for path in files_with(self.secret, self.folder) if not _is_payload(path)}
            self._over.wait(0.02)

    def wait_for(self, count: int) -> None:
        """Until so many places are found."""
        deadline = time.monotonic() + 30
        while len(self.found) < count and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        self._over.set()
        self.join()


def _is_payload(path: Path) -> bool:
    """Ansible's own module payload, as long as its task runs, in a folder for its user alone: the one exception."""
    if "AnsiballZ_" not in path.name and not path.parent.name.startswith("ansible-local-"):
        return False
    try:
        return path.parent.stat().st_mode & 0o077 == 0
    except FileNotFoundError:
        return True


def files_with(secret: bytes, folder: Path) -> Iterator[Path]:
    """Files below a folder that hold the secret as it is."""
    for root, _folders, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            if secret in _read(path):
                yield path


def test_the_watch_sees_what_it_looks_for(tmp_path: Path) -> None:
    watch = Watch("correct horse", tmp_path)
    watch.start()
    (tmp_path / "file").write_text("a correct horse")
    script = "read dummy"
    environment = subprocess.Popen(["sh", "-c", script], env={"P": "correct horse"}, stdin=subprocess.PIPE)
    argument = subprocess.Popen(["sh", "-c", script, "correct horse"], stdin=subprocess.PIPE)
    try:
        watch.wait_for(3)
    finally:
        for process in (environment, argument):
            process.communicate(b"\n")
        watch.stop()
    assert watch.found == {f"sh -c {script} ", f"sh -c {script} correct horse ", str(tmp_path / "file")}


def test_the_password_is_nowhere(simulator: Simulator, backups: Backups, tmp_path: Path, monkeypatch) -> None:
    short = tmp_path / "t"
    short.mkdir()
    # Folders for sockets and logs are made here too, where the watch looks.
    monkeypatch.setenv("TMPDIR", str(short))
    password = simulator.connection["password"]
    simulator.control.call("nfc", bytes_per_second=2 << 20)
    watch = Watch(password, tmp_path)
    # The variables are the test's own file, 0600; it goes as soon as Ansible has read it.
    try:
        running = backups.ansible.start(
            "openvadp.backup.backup", hosts=["db01"], variables=backups.variables(verify="data"), arguments=["-vvv"]
        )
        running.wait_for("PLAY [Back up")
        (running.folder / "variables.json").unlink()
        watch.start()
        outcome = running.wait().ok()
    finally:
        simulator.control.call("nfc", bytes_per_second=None)
        watch.stop()
    assert watch.found == set()
    # It did look while the work was done.
    assert {"nbdkit", "qemu-nbd"} <= watch.programs
    assert outcome.result("vadp_disk_export")["invocation"]["module_args"]["password"] != password
    assert "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in outcome.stdout
    assert password not in outcome.stdout + outcome.stderr
    assert list(files_with(password.encode(), tmp_path)) == []
