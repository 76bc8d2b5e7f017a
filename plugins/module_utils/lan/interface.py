# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The proxy's own interface to the backup LAN: whether what its file says is in force, and bringing it into force.

What counts is the interface as the kernel has it. A file that was written does not prove it: a reload may get lost.
"""

from __future__ import annotations

import ipaddress
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from ..datapath.in_force import DIRECTORY, Taken
from ..datapath.processes import run_tool
from ..errors import DataPathError, InputError
from . import routes
from .addresses import parse_subnet
from .subnets import parse_gateway, parse_ipv4

CONNECTION = "openvadp-backup-lan"
_PAUSE = 0.2
_SYSFS = Path("/sys/class/net")


@dataclass(frozen=True)
class Wanted:
    """``destination`` is a subnet that is reached through ``gateway``."""

    path: str
    manager: str
    interface: str
    address: ipaddress.IPv4Interface
    mtu: int
    destination: Optional[ipaddress.IPv4Network] = None
    gateway: Optional[ipaddress.IPv4Address] = None
    apply: bool = True
    timeout: float = 15

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> Wanted:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        if not re.fullmatch(r"[^/\s]{1,15}", params["interface"]) or params["interface"] in (".", ".."):
            raise InputError(
                "The option interface can't be used",
                subject=repr(params["interface"]),
                remedy="Give the name of an interface, such as ens224",
            )
        routed = params["gateway"] is not None
        return cls(
            path=params["path"],
            manager=params["manager"],
            interface=params["interface"],
            address=parse_ipv4(params["address"]),
            mtu=params["mtu"],
            destination=parse_subnet(params["destination"]) if routed else None,
            gateway=parse_gateway(params["gateway"]) if routed else None,
            apply=params["apply"],
            timeout=params["timeout"],
        )


def ensure(wanted: Wanted, check_mode: bool, directory: str = DIRECTORY) -> Dict[str, Any]:
    """Bring a file into force where it is not. -> the module's result

    :raises DataPathError: the manager refuses it, or the interface does not become as described.
    """
    taken = Taken("interface", [wanted.path], directory)
    missing = differences(wanted)
    reasons = list(missing or ())
    if not taken.current():
        reasons.insert(0, f"{wanted.manager} is not known to have read {wanted.path}")
    result = {"changed": False, "in_force": missing == [] and not reasons, "reasons": reasons}
    if missing is None:
        result["in_force"] = None
    if not reasons or not wanted.apply:
        return result
    result["changed"] = True
    if check_mode:
        return result
    for command in _commands(wanted):
        run_tool(command, what="The interface was not configured", subject=wanted.interface, timeout=60)
    _await(wanted)
    taken.keep()
    result["in_force"] = None if differences(wanted) is None else True
    return result


def differences(wanted: Wanted) -> Optional[List[str]]:
    """In what the interface is not as described, in words. None: it is not there, or can't be looked at."""
    name = wanted.interface
    try:
        addresses = routes.addresses_of(name)
        mtu = int((_SYSFS / name / "mtu").read_text())
    except (OSError, ValueError):
        return None
    found = []
    if wanted.address not in addresses:
        have = ", ".join(str(one) for one in addresses) or "none"
        found.append(f"{name} has the address {have}, not {wanted.address}")
    if mtu != wanted.mtu:
        found.append(f"{name} has an MTU of {mtu}, not {wanted.mtu}")
    if wanted.destination is not None:
        way = routes.way_to(wanted.destination.network_address + 1)
        if way is None or way[1] != wanted.gateway:
            found.append(f"packets to {wanted.destination} don't go to {wanted.gateway}")
    return found


def _commands(wanted: Wanted) -> List[List[str]]:
    if wanted.manager == "NetworkManager":
        return [["nmcli", "connection", "reload"], ["nmcli", "connection", "up", CONNECTION]]
    return [["networkctl", "reload"], ["networkctl", "reconfigure", wanted.interface]]


def _await(wanted: Wanted) -> None:
    """Until the interface is as described, if it is there. :raises DataPathError: it is not in time."""
    deadline = time.monotonic() + wanted.timeout
    left = differences(wanted)
    while left and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        left = differences(wanted)
    if left:
        look = "nmcli device show" if wanted.manager == "NetworkManager" else "networkctl status"
        raise DataPathError(
            "The interface is not as its file says",
            subject=wanted.interface,
            reason=f"{wanted.manager} was told to read {wanted.path}, and {'; '.join(left)}",
            remedy=f"See with '{look} {wanted.interface}' which file or connection it uses, and whether it has a link",
        )
