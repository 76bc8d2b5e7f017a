# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether an address answers already, as far as this machine can tell: it must be on that segment itself."""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Callable, List, Optional, Tuple

ROUTES = "/proc/net/route"
NEIGHBOURS = "/proc/net/arp"

FREE = "free"
ANSWERS = "answers"
NOT_CHECKED = "not checked"

# The kernel asks three times, a second apart; somebody who is there answers the first.
WAIT_SECONDS = 1.5
_COMPLETE = 0x2
_DISCARD_PORT = 9


def _lines(path: str) -> List[List[str]]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return [line.split() for line in file.read().splitlines()[1:]]
    except OSError:
        return []


def _little_endian(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text), "little")


def on_segment(address: ipaddress.IPv4Address, routes: str = ROUTES) -> bool:
    """Whether this machine has an interface in the subnet of *address*: its best route has no gateway."""
    best: Optional[Tuple[int, bool]] = None
    for words in _lines(routes):
        if len(words) < 8:
            continue
        destination, gateway, mask = (_little_endian(words[index]) for index in (1, 2, 7))
        if int(address) & mask == destination and (best is None or mask > best[0]):
            best = (mask, gateway == 0)
    return best is not None and best[1]


def hardware_address(address: ipaddress.IPv4Address, neighbours: str = NEIGHBOURS) -> Optional[str]:
    """The MAC address that answered for *address*; None if none did."""
    for words in _lines(neighbours):
        if len(words) >= 4 and words[0] == str(address) and int(words[2], 16) & _COMPLETE:
            return words[3]
    return None


def _ask(address: ipaddress.IPv4Address) -> bool:
    """Make the kernel look for *address* on the segment: any packet does. -> whether it is this machine's own"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((str(address), _DISCARD_PORT))
        if sock.getsockname()[0] == str(address):
            return True
        sock.send(b"")
    return False


def check(
    address: ipaddress.IPv4Address,
    ask: Callable[[ipaddress.IPv4Address], bool] = _ask,
    routes: str = ROUTES,
    neighbours: str = NEIGHBOURS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Tuple[str, Optional[str]]:
    """(``free``, ``answers`` or ``not checked``; who answered: a MAC address, or this machine)."""
    if not on_segment(address, routes):
        return NOT_CHECKED, None
    try:
        if ask(address):
            return ANSWERS, "this machine"
    except OSError:
        return NOT_CHECKED, None
    deadline = clock() + WAIT_SECONDS
    while True:
        found = hardware_address(address, neighbours)
        if found is not None:
            return ANSWERS, found
        if clock() >= deadline:
            return FREE, None
        sleep(0.1)
