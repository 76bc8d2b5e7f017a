# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Machines, each a network namespace of its own, joined by veth pairs. Nothing of this reaches the real network."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Dict, List, Optional

from harness import ROOT

_AUTHD = """
import socket, sys, threading
banner, where = sys.argv[1].encode(), [word.rpartition(":") for word in sys.argv[2:]]
def serve(listener):
    while True:
        sock, _address = listener.accept()
        if banner:
            sock.sendall(banner + b"\\r\\n")
            sock.close()
        else:
            kept.append(sock)
kept = []
for address, _colon, port in where:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, int(port)))
    listener.listen(64)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""

_MODULE = """
import json, sys
from ansible.module_utils import basic
basic._ANSIBLE_ARGS = sys.stdin.buffer.read()
basic._ANSIBLE_PROFILE = "legacy"
from ansible_collections.openvadp.backup.plugins.modules.backup_lan_probe import main
main()
"""

GREETING = "220 VMware Authentication Daemon Version 1.10: SSL Required, ServerDaemonProtocol:SOAP"


class Forbidden(Exception):
    """This machine does not let us make network namespaces."""


class Machine:
    """A network namespace; a process of ours keeps it, and it goes with that process."""

    def __init__(self, enter: List[str], make: List[str]) -> None:
        # A pipe ends the keeper also when the tests are killed.
        self._keeper = subprocess.Popen(
            [*enter, *make, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._keeper.stdout is not None and self._keeper.stderr is not None
        if self._keeper.stdout.readline().strip() != "ready":
            self._keeper.wait(10)
            raise Forbidden(self._keeper.stderr.read().strip() or "no reason was given")
        self.pid = self._keeper.pid
        self.enter = ["nsenter", "-t", str(self.pid), "-n"]
        self._started: List[subprocess.Popen[str]] = []

    def run(self, *command: str, check: bool = True, text: Optional[str] = None) -> str:
        done = subprocess.run(
            [*self.enter, *command], input=text, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def ip(self, words: str) -> None:
        self.run("ip", *words.split())

    def sysctl(self, name: str, value: str) -> None:
        self.run("sh", "-c", f"echo '{value}' >/proc/sys/net/{name}")

    def authd(self, *where: str, banner: str = GREETING) -> None:
        """Start what greets on each ``address:port``; with an empty banner it says nothing."""
        process = subprocess.Popen(
            [*self.enter, str(ROOT / ".venv/bin/python"), "-c", _AUTHD, banner, *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"

    def probe(self, *addresses: str, prefix: Any = (), **options: Any) -> Dict[str, Any]:
        """Module backup_lan_probe on this machine: its result by address.

        :param prefix: a command that runs the module, such as one that takes rights away.
        """
        targets = [{"host": f"host {address}", "address": address} for address in addresses]
        command = [*self.enter, *prefix, str(ROOT / ".venv/bin/python"), "-c", _MODULE]
        done = subprocess.run(
            command,
            input=json.dumps({"ANSIBLE_MODULE_ARGS": {"targets": targets, **options}}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT / "build/tree")},
        )
        result = json.loads(done.stdout) if done.stdout.strip().startswith("{") else {}
        assert result and not result.get("failed"), f"{done.stdout}\n{done.stderr}"
        assert result["proven"] == all(one["proven"] for one in result["targets"])
        return {one["address"]: one for one in result["targets"]}

    def stop(self) -> None:
        for process in [*self._started, self._keeper]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.wait(30)
            process.stdout.close()
        assert self._keeper.stderr is not None
        self._keeper.stderr.close()


class Network:
    """Machines by name, and the wires between them. As root, or as an ordinary user in a user namespace.

    :raises Forbidden: this machine does not allow it.
    """

    def __init__(self) -> None:
        self.machines: Dict[str, Machine] = {}
        self._enter: List[str] = []
        root = os.geteuid() == 0
        self._make = ["unshare", "-n"] if root else ["unshare", "-Urn"]
        self._user = [] if root else ["-U", "--preserve-credentials"]
        self._wires = 0
        try:
            first = self.machine("first")
            if not root:
                # All others are made by the first one's root, or no wire could be laid between them.
                self._enter = ["nsenter", "-t", str(first.pid), *self._user]
                self._make = ["unshare", "-n"]
            first.run("ip", "link", "add", "name", "trial", "type", "veth")
        except AssertionError as error:
            self.stop()
            raise Forbidden(" ".join(str(error).split())) from error
        except Forbidden:
            self.stop()
            raise

    def machine(self, name: str) -> Machine:
        made = Machine(self._enter, self._make)
        made.enter += self._user
        self.machines[name] = made
        made.ip("link set lo up")
        return made

    def wire(self, one: Machine, one_name: str, other: Machine, other_name: str) -> None:
        """A veth pair: an interface on each side, up."""
        self._wires += 1
        near, far = f"near{self._wires}", f"far{self._wires}"
        first = self.machines["first"]
        first.ip(f"link add name {near} type veth peer name {far}")
        for machine, given, name in ((one, near, one_name), (other, far, other_name)):
            first.ip(f"link set {given} netns {machine.pid} name {name}")
            machine.ip(f"link set {name} up")

    def stop(self) -> None:
        for machine in reversed(list(self.machines.values())):
            machine.stop()
