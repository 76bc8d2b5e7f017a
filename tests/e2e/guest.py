# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A guest that writes at random: ``guest.py SOCKET VM SEED [DISK...]``, for a task of a playbook.

Prints, as JSON, what the disks hold afterwards: {device key: [capacity in bytes, SHA-256]}.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulator"))

from client import Control  # noqa: E402

SECTOR = 512
LONGEST = 1024  # sectors


def disks_of(control: Control, vm: str) -> Dict[int, int]:
    """{device key: capacity in bytes}"""
    machines = control.call("state")["vms"].values()
    return {disk["key"]: disk["capacity_bytes"] for one in machines if one["name"] == vm for disk in one["disks"]}


def scribble(control: Control, vm: str, key: int, capacity: int, seed: int) -> None:
    """Some writes, writes of zeros and discards at any sector. The same seed does the same."""
    dice = random.Random(f"{seed} {key}")
    for _number in range(dice.randint(4, 12)):
        sectors = capacity // SECTOR
        start = dice.randrange(sectors)
        where: Dict[str, Any] = dict(vm=vm, disk=key, offset=start * SECTOR)
        length = min(dice.randint(1, LONGEST), sectors - start) * SECTOR
        kind = dice.choice(("data", "data", "data", "zeros", "discard"))
        if kind == "data":
            control.call("guest_write", **where, pattern={"seed": dice.random(), "length": length})
        elif kind == "zeros":
            control.call("guest_write", **where, data=bytes(length))
        else:
            control.call("guest_discard", **where, length=length)


def held(control: Control, vm: str, key: int) -> Tuple[int, str]:
    found = control.call("read_disk", vm=vm, disk=key)
    return found["capacity_bytes"], found["sha256"]


def main(argv: List[str]) -> None:
    socket, vm, seed, *keys = argv
    with Control(socket) as control:
        disks = disks_of(control, vm)
        for key in map(int, keys):
            scribble(control, vm, key, disks[key], int(seed))
        print(json.dumps({key: held(control, vm, key) for key in disks}))


if __name__ == "__main__":
    main(sys.argv[1:])
