# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A guest that writes at random."""

from __future__ import annotations

import random
from typing import Any, Dict

from client import Control

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
