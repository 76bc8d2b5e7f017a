# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Start the simulator: state, ports, one JSON line; SIGTERM ends it."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import vixdisklib

from . import control, nfc
from .server import Server
from .simulator import ADMINISTRATOR, BACKUP_USER, Simulator


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/simulator/run", description="A simulated vCenter with ESXi hosts.")
    parser.add_argument(
        "--state", type=Path, help="folder that keeps everything; without it one that goes with the simulator"
    )
    sets = ("minimal", "standard", "demo")
    parser.add_argument("--vms", choices=sets, default="minimal", help="VMs of a new state folder")
    parser.add_argument("--hosts", type=int, default=0, help="so many more hosts for a new state folder")
    parser.add_argument("--port", type=int, default=0, help="the vCenter port; 0 takes a free one")
    parser.add_argument(
        "--passwords", type=Path, help='file with {"user@vsphere.local": "password"}; random ones by default'
    )
    return parser.parse_args()


def _lock(state: Path) -> None:
    """One simulator for each state folder."""
    state.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another simulator runs on {state}")


def main() -> None:
    arguments = _arguments()
    # The signal itself writes to this pipe. A handler of Python's own would not run while this thread enters a wait.
    stopped, stop = os.pipe()
    os.set_blocking(stop, False)
    signal.set_wakeup_fd(stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    temporary = tempfile.TemporaryDirectory(prefix="simulator-") if arguments.state is None else None
    state = Path(temporary.name if temporary else arguments.state).resolve()
    _lock(state)
    passwords = json.loads(arguments.passwords.read_text()) if arguments.passwords else None
    vddk_libdir = vixdisklib.build()
    simulator = Simulator(state, arguments.vms, passwords, hosts=arguments.hosts)
    control_socket = state / "control"
    simulator.control = control.start(simulator, control_socket)
    simulator.nfc = nfc.start(simulator)
    server = Server(simulator, arguments.port)
    users = simulator.users
    line = {
        "host": simulator.host,
        "port": server.port,
        "username": ADMINISTRATOR,
        "password": users[ADMINISTRATOR].password,
        "backup_username": BACKUP_USER,
        "backup_password": users[BACKUP_USER].password,
        "ca_path": str(simulator.ca_path),
        "vddk_libdir": str(vddk_libdir),
        "device_dir": str(simulator.device_dir),
        "sysfs_dir": str(simulator.sysfs_dir),
        "nfc_port": simulator.nfc.port,
        "control_socket": str(control_socket),
        "state": str(state),
        "pid": os.getpid(),
    }
    print(json.dumps(line), flush=True)
    os.read(stopped, 1)
    server.stop()
    simulator.nfc.stop()
    simulator.control.stop()
    simulator.close()
    if temporary:
        temporary.cleanup()


if __name__ == "__main__":
    main()
