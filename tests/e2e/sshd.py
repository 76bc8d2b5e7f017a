# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""An SSH server of our own on a loopback port, for tests whose proxy is a remote host.

It runs as the user who starts it, lets only that user in, and only with a key made for it. The server program is the
one that ``tests/setup.sh`` unpacks below ``build/openssh`` (installing it would start a public server on the machine).
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Iterable, List, Optional, Type

UNPACKED = Path(__file__).resolve().parents[2] / "build" / "openssh"


def _program() -> Optional[Path]:
    for candidate in (UNPACKED / "usr" / "sbin" / "sshd", Path("/usr/sbin/sshd")):
        if candidate.exists():
            return candidate
    return None


def available() -> bool:
    """Whether there is a server program to start."""
    return _program() is not None and shutil.which("ssh") is not None


class Sshd:
    """Context manager: a running server.

    :param folder: an empty folder for keys, configuration and log; mode 0700.
    :param options: further lines for ``sshd_config``, such as ``ChannelTimeout session:*=5s``, which cuts a session
        that is silent for five seconds, as firewalls do.
    """

    def __init__(self, folder: Path, options: Iterable[str] = ()) -> None:
        self.folder = Path(folder)
        self.options = list(options)
        self.port = 0
        self._process: Optional["subprocess.Popen[bytes]"] = None

    def __enter__(self) -> "Sshd":
        program = _program()
        if program is None:
            raise RuntimeError(f"no sshd below {UNPACKED}: run tests/setup.sh tests")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        for _attempt in range(5):
            self.port = _free_port()
            if self._start(program):
                break
        else:
            raise RuntimeError(f"sshd did not start:\n{self.log}")
        host_key = (self.folder / "host_key.pub").read_text().split()
        known = f"[127.0.0.1]:{self.port} {host_key[0]} {host_key[1]}\n"
        (self.folder / "known_hosts").write_text(known)
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        # The connection that Ansible keeps open for later tasks would live on for a minute.
        exit_master = ["ssh", "-F", "none", "-O", "exit", "-o", f"ControlPath={self.folder}/c", "127.0.0.1"]
        subprocess.run(exit_master, check=False, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _start(self, program: Path) -> bool:
        config = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.folder}/host_key",
            f"AuthorizedKeysFile {self.folder}/authorized_keys",
            f"AllowUsers {getpass.getuser()}",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            "StrictModes no",
            "PidFile none",
            *self.options,
        ]
        (self.folder / "sshd_config").write_text("\n".join(config) + "\n")
        libraries = ":".join(str(path) for path in (UNPACKED / "usr" / "lib").glob("*-linux-gnu*"))
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        command = [str(program), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        if os.geteuid() == 0:
            command = self._with_separation_user(command)
        with open(self.folder / "sshd.log", "ab") as log:
            self._process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                    return probe.recv(4) == b"SSH-"
            except OSError:
                time.sleep(0.05)
        return False

    def _with_separation_user(self, command: List[str]) -> List[str]:
        """As root, sshd insists on a user named sshd. Without one, it sees one in its own mount namespace."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        users = Path("/etc/passwd").read_text()
        if "\nsshd:" in users:
            return command
        passwd = self.folder / "passwd"
        passwd.write_text(users.rstrip("\n") + "\nsshd:x:65534:65534::/run/sshd:/usr/sbin/nologin\n")
        passwd.chmod(0o644)
        # What other tests have mounted just now would stay mounted here, and be found, as long as this server runs.
        drop = r"sed -n 's|^/dev/loop[0-9]* \([^ ]*\) .*|\1|p' /proc/self/mounts | xargs -r umount --lazy"
        script = drop + ' && mount --bind "$0" /etc/passwd && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(passwd), *command]

    @property
    def log(self) -> str:
        """What the server has written so far."""
        path = self.folder / "sshd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def inventory_variables(self) -> Dict[str, Any]:
        """Variables that make a host of an inventory this server."""
        return {
            "ansible_connection": "ssh",
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": str(self.folder / "user_key"),
            "ansible_ssh_use_tty": False,
            "ansible_ssh_transfer_method": "piped",
            "ansible_ssh_args": f"-F none -o ControlMaster=auto -o ControlPersist=60s -o ControlPath={self.folder}/c",
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.folder}/known_hosts -o StrictHostKeyChecking=yes"
            " -o IdentitiesOnly=yes",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
