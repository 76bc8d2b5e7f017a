# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Proof of a backup LAN, from the proxy: each host's NFC port is reached, greets as authd does, and the MTU holds.

A TCP connection from the backup interface tells more than any look at a configuration: the VLAN, the uplinks, the
switches between and the way *back* are in it. What can go wrong is told apart, because what to do differs.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..errors import InputError, check_range
from . import echo, neighbours, routes

GREETING = "220 VMware Authentication Daemon"
PARALLEL = 64
TRIES = 3
SMALL_BYTES = 64
_GREETING_BYTES = 4096

# Causes, as a program reads them.
OK = "ok"
WRONG_SOURCE = "wrong_source"
WRONG_INTERFACE = "wrong_interface"
NO_ROUTE = "no_route"
UNREACHABLE = "unreachable"
CLOSED = "closed"
TIMEOUT = "timeout"
SILENT = "silent"
NOT_AUTHD = "not_authd"
MTU_LOCAL = "mtu_local"
MTU_PATH = "mtu_path"

_SHARED_SUBNET = (
    "if that host has two VMkernel NICs in this subnet, its answers leave by the other one: "
    "vmkernel_backup_nic_info shows (shared_subnets), and a subnet of its own for the backup NIC fixes it"
)


@dataclass(frozen=True)
class Target:
    """A host, and the address of its backup NIC."""

    host: str
    address: Any


@dataclass(frozen=True)
class ProbeRequest:
    """The options of ``backup_lan_probe``."""

    targets: Tuple[Target, ...]
    source: Any = None
    mtu: Optional[int] = None
    port: int = 902
    timeout: int = 5

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> ProbeRequest:
        """From ``module.params``. :raises InputError: an option makes no sense; nothing was sent."""
        source = _address("source_address", params["source_address"]) if params["source_address"] else None
        targets = targets_from(params["targets"])
        for target in targets:
            if source is not None and source.version != target.address.version:
                raise InputError(
                    "The option source_address can't be used",
                    subject=str(source),
                    reason=f"it is IPv{source.version}, but {target.address} of host '{target.host}' is not",
                    remedy="Probe addresses of one version at a time",
                )
        check_range("mtu", params["mtu"], 1280, 9190)
        check_range("nfc_port", params["nfc_port"], 1, 65535)
        check_range("timeout", params["timeout"], 1, 60)
        return cls(targets, source, params["mtu"], params["nfc_port"], params["timeout"])


def targets_from(entries: Sequence[Dict[str, Any]]) -> Tuple[Target, ...]:
    """The option ``targets``, each with host and address. :raises InputError: one makes no sense, or there is none."""
    if not entries:
        raise InputError("No host is named", remedy="Give at least one target")
    return tuple(Target(entry["host"], _address("targets", entry["address"])) for entry in entries)


def _address(option: str, text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise InputError(
            f"The option {option} can't be used",
            subject=repr(text),
            reason="it is not an IP address",
            remedy="Give the address itself, such as 10.20.30.11: a name may lead to another NIC of the host",
        ) from error


@dataclass(frozen=True)
class Finding:
    """What came of a target: a cause, why, and what to do."""

    cause: str = OK
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of connecting: the greeting, or why there is none; ``host_mtu`` is what the handshake told."""

    finding: Finding
    banner: Optional[str] = None
    source: Optional[str] = None
    host_mtu: Optional[int] = None


def probe(request: ProbeRequest) -> List[Dict[str, Any]]:
    """Try all targets at once. -> what came of each, in their order."""
    with ThreadPoolExecutor(min(PARALLEL, len(request.targets))) as pool:
        return list(pool.map(lambda target: _probe(request, target), request.targets))


def _probe(request: ProbeRequest, target: Target) -> Dict[str, Any]:
    interface = routes.leaves_by(target.address, request.source)
    answer = _connect(request, target)
    finding = answer.finding
    reached = finding.cause == OK
    mtu: Dict[str, Any] = {"asked": request.mtu, "ok": None, "reason": ""}
    if request.mtu is not None:
        if reached:
            mtu["ok"], problem = _check_mtu(request, target, request.mtu, interface, answer)
            mtu["reason"] = problem.reason
            if mtu["ok"] is False:
                finding = problem
        else:
            mtu["reason"] = "not checked, as the port was not reached"
    if reached:
        finding = _check_interface(request, target, interface) or finding
    return {
        "host": target.host,
        "address": str(target.address),
        "reached": reached,
        "proven": finding.cause == OK and mtu["ok"] is not False,
        "source_address": answer.source or (str(request.source) if request.source else None),
        "interface": interface,
        "mtu": mtu,
        "banner": answer.banner,
        "cause": finding.cause,
        "reason": finding.reason,
        "remedy": finding.remedy,
    }


def _check_interface(request: ProbeRequest, target: Target, leaves: Optional[str]) -> Optional[Finding]:
    """A source address alone does not choose the interface: the route does."""
    if request.source is None or leaves is None:
        return None
    own = routes.interface_of(request.source)
    if own is None or own == leaves:
        return None
    return Finding(
        WRONG_INTERFACE,
        f"packets to {target.address} leave by {leaves}, while {request.source} belongs to {own}",
        f"Give {own} an address in the subnet of {target.address}, or a static route to it",
    )


# --- the port -------------------------------------------------------------------------------------------------------


def _connect(request: ProbeRequest, target: Target) -> Answer:
    family = socket.AF_INET if target.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(request.timeout)
        if request.source is not None:
            try:
                sock.bind((str(request.source), 0))
            except OSError as error:
                return Answer(_source_problem(request, error))
        try:
            sock.connect((str(target.address), request.port))
        except OSError as error:
            return Answer(_connect_problem(request, target, error))
        source = str(sock.getsockname()[0])
        host_mtu = _told_mtu(sock, target.address.version)
        finding, banner = _greeting(sock, request, target)
        return Answer(finding, banner, source, host_mtu)


def _source_problem(request: ProbeRequest, error: OSError) -> Finding:
    if error.errno == errno.EADDRNOTAVAIL:
        return Finding(
            WRONG_SOURCE,
            f"the source address {request.source} is not an address of this machine",
            "Give the address of the proxy's backup interface, and look whether that interface is configured and up",
        )
    return Finding(
        WRONG_SOURCE, f"the source address {request.source} can't be used: {_words(error)}", "Give another address"
    )


def _words(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _connect_problem(request: ProbeRequest, target: Target, error: OSError) -> Finding:
    where = f"{target.address} port {request.port}"
    if isinstance(error, socket.timeout) or error.errno == errno.ETIMEDOUT:
        return _timeout(request, target, where)
    if error.errno in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Finding(
            CLOSED,
            f"{target.address} answers, but its port {request.port} is closed",
            "Check that the address is the host's and not another machine's, and the port",
        )
    if error.errno == errno.ENETUNREACH:
        return Finding(
            NO_ROUTE,
            f"this machine has no route to {target.address}",
            "Give the proxy an interface in that subnet, or a static route to it",
        )
    if error.errno == errno.EHOSTUNREACH:
        return _unreachable(target)
    if error.errno in (errno.EACCES, errno.EPERM):
        return Finding(
            UNREACHABLE,
            f"this machine itself does not let packets to {where} out: {_words(error)}",
            "Look at its firewall and at its routes of type prohibit",
        )
    return Finding(UNREACHABLE, f"{where}: {_words(error)}", "Look at the proxy's interface and routes")


def _on_segment(address: Any) -> bool:
    return address.version == 4 and neighbours.on_segment(address)


def _timeout(request: ProbeRequest, target: Target, where: str) -> Finding:
    reason = f"no answer from {where} within {request.timeout} s"
    mac = neighbours.hardware_address(target.address) if _on_segment(target.address) else None
    if mac is not None:
        # Who answers for the address on the segment, and stays silent on TCP: the answer takes another way.
        return Finding(
            TIMEOUT,
            f"{reason}, though {mac} answers for the address on this segment (ARP)",
            f"Look where the host's answers go: {_SHARED_SUBNET}. Else a firewall drops them",
        )
    return Finding(
        TIMEOUT,
        reason,
        f"Check VLAN, port group and uplinks, and firewalls between; or {_SHARED_SUBNET}",
    )


def _unreachable(target: Target) -> Finding:
    if _on_segment(target.address):
        return Finding(
            UNREACHABLE,
            f"nobody on this segment answers for {target.address} (ARP)",
            "Check that the proxy's interface is in the VLAN of the hosts' port group, and that the host has that NIC",
        )
    return Finding(
        UNREACHABLE,
        f"a router says that {target.address} can't be reached",
        "Check the routes between the proxy and the host; best, put the proxy into the hosts' backup subnet",
    )


def _told_mtu(sock: socket.socket, version: int) -> Optional[int]:
    """The MTU behind the segment size that the connection came to: the smaller of both ends', as Linux has it."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    except (OSError, AttributeError):
        return None
    if len(info) < 20:
        return None
    timestamps = 12 if info[5] & 1 else 0
    return int(struct.unpack_from("=I", info, 16)[0]) + timestamps + (40 if version == 4 else 60)


def _greeting(sock: socket.socket, request: ProbeRequest, target: Target) -> Tuple[Finding, Optional[str]]:
    data = b""
    lost = ""
    while b"\n" not in data and len(data) < _GREETING_BYTES:
        try:
            more = sock.recv(_GREETING_BYTES - len(data))
        except socket.timeout:
            lost = f"said nothing within {request.timeout} s"
            break
        except OSError as error:
            lost = f"broke the connection: {_words(error)}"
            break
        if not more:
            lost = "closed the connection"
            break
        data += more
    banner = data.decode("utf-8", errors="replace").split("\n")[0].strip() if data else None
    if banner is not None and banner.startswith(GREETING):
        return Finding(), banner
    where = f"{target.address} port {request.port}"
    if banner is None:
        return Finding(
            SILENT,
            f"{where} took the connection and {lost or 'said nothing'}",
            "Look at the host: its authd may be overloaded, or a device between answers in its place",
        ), None
    return Finding(
        NOT_AUTHD,
        f"{where} is not the NFC service of an ESXi host: it greets with {banner[:60]!r}",
        "Check that the address is the host's and not another machine's, and the port",
    ), banner


# --- the MTU --------------------------------------------------------------------------------------------------------


def _interface_mtu(name: Optional[str]) -> Optional[int]:
    if name is None:
        return None
    with contextlib.suppress(OSError, ValueError), open(f"/sys/class/net/{name}/mtu", encoding="ascii") as file:
        return int(file.read())
    return None


def _check_mtu(
    request: ProbeRequest, target: Target, asked: int, interface: Optional[str], answer: Answer
) -> Tuple[Optional[bool], Finding]:
    """(holds, does not, or can't be determined; why)."""
    own = _interface_mtu(interface)
    if own is not None and own < asked:
        return False, _too_small_here(interface, own, asked)
    seconds = max(1.0, request.timeout / TRIES)
    try:
        large = _tries(request, target, asked, seconds)
        if large.outcome == echo.CAME_BACK:
            return True, Finding()
        if large.outcome == echo.LOCAL and own is None:
            return False, _too_small_here(interface, large.mtu, asked)
        if large.outcome in (echo.LOCAL, echo.ON_THE_WAY):
            # The interface is wide enough: the kernel remembers what a router said before.
            return False, _lost(asked, _by_router(large), answer)
        small = _tries(request, target, SMALL_BYTES, seconds)
    except echo.NoEcho as error:
        return None, Finding(
            reason=f"not checked, as this user can't send echo requests ({error}); the program ping "
            f"(package iputils-ping) makes it possible{_told(asked, answer)}"
        )
    if small.outcome == echo.CAME_BACK:
        return False, _lost(asked, "small packets come back", answer)
    return None, Finding(
        reason=f"not checked, as {target.address} answers no echo requests, small ones neither{_told(asked, answer)}"
    )


def _tries(request: ProbeRequest, target: Target, size: int, seconds: float) -> echo.Echo:
    """The same a few times: a single packet may be lost for no reason."""
    for _unused in range(TRIES):
        result = echo.send(target.address, request.source, size, seconds)
        if result.outcome != echo.SILENT:
            break
    return result


def _too_small_here(interface: Optional[str], mtu: Optional[int], asked: int) -> Finding:
    name = interface or "this machine's interface"
    return Finding(
        MTU_LOCAL,
        f"local MTU too small: {name} has {mtu or 'less'}, {asked} was asked for",
        f"Set the MTU of {name} to {asked}, and that of what it is on (bond, bridge, the VM's port group and switch)",
    )


def _by_router(result: echo.Echo) -> str:
    said = f"{result.said_by} lets only" if result.said_by else "a router lets only"
    return f"{said} {result.mtu} bytes through" if result.mtu else "a router lets only smaller ones through"


def _told(asked: int, answer: Answer) -> str:
    if answer.host_mtu is None or answer.host_mtu >= asked:
        return ""
    return f"; the TCP handshake came to segments for an MTU of {answer.host_mtu}"


def _lost(asked: int, how: str, answer: Answer) -> Finding:
    return Finding(
        MTU_PATH,
        f"packets of {asked} bytes are lost on the way, {how}{_told(asked, answer)}",
        f"Set an MTU of {asked} on the host's NIC and its virtual switch, and on every physical switch between",
    )


def unproven(results: Sequence[Dict[str, Any]]) -> List[str]:
    """The hosts of which something was not as it should be."""
    return [result["host"] for result in results if not result["proven"]]
