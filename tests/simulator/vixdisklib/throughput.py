# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How fast the simulator's disks are read through the real nbdkit vddk plugin: a base disk, then chains of deltas.

PYTHONPATH=tests/simulator .venv/bin/python -m vixdisklib.throughput [MiB]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vcenter import control, nfc
from vcenter.server import Server
from vcenter.simulator import ADMINISTRATOR, Simulator

from . import build

MIB = 1 << 20


def measure(simulator: Simulator, port: int, libdir: Path, path: str) -> float:
    """MiB/s of nbdcopy to nothing."""
    reader, writer = os.pipe()
    os.write(writer, simulator.users[ADMINISTRATOR].password.encode())
    os.close(writer)
    argv = ["nbdkit", "-r", "-U", "-", "vddk", f"libdir={libdir}", "server=127.0.0.1", f"port={port}"]
    argv += [f"user={ADMINISTRATOR}", f"password=-{reader}", "vm=moref=vm-101", f"file={path}", "transports=nbdssl"]
    argv += [f"thumbprint={simulator.thumbprints['sha1']}", f"nfchostport={simulator.nfc.port}"]
    argv += ["--run", "nbdcopy --request-size=1048576 $uri null:"]
    begin = time.monotonic()
    subprocess.run(argv, check=True, pass_fds=[reader], timeout=600)
    os.close(reader)
    seconds = time.monotonic() - begin
    return simulator.storage.info(path).capacity_bytes / MIB / seconds


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    libdir = build()
    with tempfile.TemporaryDirectory() as folder:
        simulator = Simulator(Path(folder))
        sockets = control.start(simulator, Path(folder) / "control")
        hosts = nfc.start(simulator)
        server = Server(simulator, 0)
        try:
            # the VM's own disk is replaced by a large one, full of data
            vm = simulator.find_vm("app01")
            simulator.set_power(vm, "poweredOff")
            disk = simulator.vm_disks(vm)[0]
            simulator.grow_disk(vm, disk.key, size * MIB)
            noise = random.Random(1)
            for at in range(size):
                simulator.storage.write(disk.path, at * MIB, noise.randbytes(MIB))
            figures = {"base": measure(simulator, server.port, libdir, disk.path)}
            leaf = disk.path
            for number in range(1, 8):
                child = f"[vmfs01] app01/app01-{number:06d}.vmdk"
                simulator.storage.snapshot_disk(leaf, child)
                leaf = child
                for _unused in range(size // 8):
                    simulator.storage.write(leaf, noise.randrange(size * 16) * 65536, bytes(65536))
            for device in vm.config.hardware.device:
                if device.key == disk.key:
                    device.backing.fileName = leaf
            figures["chain of 8"] = measure(simulator, server.port, libdir, leaf)
        finally:
            server.stop()
            hosts.stop()
            sockets.stop()
            simulator.close()
    print(json.dumps({name: round(value) for name, value in figures.items()}), "MiB/s")


if __name__ == "__main__":
    main()
