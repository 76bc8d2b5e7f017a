# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One packet of an exact size, which must not be cut up on the way, and whether it comes back (ICMP echo).

There are three ways, and which of them works depends on the machine: a datagram socket where ``ping_group_range``
allows it, a raw one with the right for it, and the program ``ping``, which brings that right along.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Callable, Optional, Tuple

from ..datapath.processes import tool_result
from ..errors import VadpError

# Of Linux; not all of them are in Python's module.
_IP_MTU_DISCOVER, _IP_RECVERR = 10, 11
_IPV6_MTU_DISCOVER, _IPV6_RECVERR = 23, 25
# Never cut up, and not held back by what the kernel believes of the way.
_PROBE = 3

_HEADERS = {4: 20 + 8, 6: 40 + 8}
_REQUESTS = {4: (8, 0), 6: (128, 129)}

CAME_BACK = "came back"
SILENT = "silent"
LOCAL = "local"  # larger than this machine's interface lets through
ON_THE_WAY = "on the way"  # a router says that its next piece of the way is too narrow
REFUSED = "refused"  # somebody says that there is no way


@dataclass(frozen=True)
class Echo:
    """What became of a packet. ``mtu`` is what the one said who did not let it through, where it did."""

    outcome: str
    mtu: Optional[int] = None
    said_by: Optional[str] = None


class NoEcho(Exception):
    """This process may not send echo requests in any way."""


def send(address: Any, source: Any, size: int, timeout: float) -> Echo:
    """Send one packet of *size* bytes, IP header and all, and wait for it to come back.

    :raises NoEcho: no way to send one.
    """
    sock = _open(address.version)
    if sock is None:
        return by_program(address, source, size, timeout)
    with sock:
        return _by_socket(sock, address, source, size, timeout)


def _open(version: int) -> Optional[socket.socket]:
    family, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        with contextlib.suppress(OSError):
            return socket.socket(family, kind, protocol)
    return None


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _request(version: int, size: int) -> Tuple[bytes, bytes]:
    """(the packet without its IP header, the token by which its answer is known)."""
    token = secrets.token_bytes(16)
    payload = token + bytes(max(0, size - _HEADERS[version] - len(token)))
    kind = _REQUESTS[version][0]
    identity = os.getpid() & 0xFFFF
    # Version 6's checksum counts addresses in, so it is the kernel's to make.
    checksum = _checksum(struct.pack("!BBHHH", kind, 0, 0, identity, 1) + payload) if version == 4 else 0
    return struct.pack("!BBHHH", kind, 0, checksum, identity, 1) + payload, token


def _by_socket(sock: socket.socket, address: Any, source: Any, size: int, timeout: float) -> Echo:
    version = address.version
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    sock.setsockopt(level, _IP_MTU_DISCOVER if version == 4 else _IPV6_MTU_DISCOVER, _PROBE)
    sock.setsockopt(level, _IP_RECVERR if version == 4 else _IPV6_RECVERR, 1)
    packet, token = _request(version, size)
    try:
        if source is not None:
            sock.bind((str(source), 0))
        sock.connect((str(address), 0))
        sock.send(packet)
    except OSError as error:
        return _from_error(sock, error, LOCAL)
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return Echo(SILENT)
        sock.settimeout(left)
        try:
            data = sock.recv(1 << 16)
        except socket.timeout:
            return Echo(SILENT)
        except OSError as error:
            return _from_error(sock, error, ON_THE_WAY)
        # A raw socket shows the IP header, and on this very machine our own request.
        body = data[(data[0] & 0xF) * 4 :] if version == 4 and data and data[0] >> 4 == 4 else data
        if len(body) >= 24 and body[0] == _REQUESTS[version][1] and body[8:24] == token:
            return Echo(CAME_BACK)


def _from_error(sock: socket.socket, error: OSError, too_large: str) -> Echo:
    if error.errno != errno.EMSGSIZE:
        return Echo(REFUSED, said_by=os.strerror(error.errno) if error.errno else str(error))
    mtu, said_by = None, None
    with contextlib.suppress(OSError):
        _data, messages, _flags, _address = sock.recvmsg(1 << 16, 512, socket.MSG_ERRQUEUE)
        for _level, _kind, data in messages:
            if len(data) >= 16:
                # struct sock_extended_err, and the address of who said so behind it
                _errno, origin, _type, _code, _pad, mtu = struct.unpack_from("=IBBBBI", data)
                if origin == 2 and len(data) >= 24:
                    said_by = socket.inet_ntoa(data[20:24])
    return Echo(too_large, mtu or None, said_by)


# --- the program ----------------------------------------------------------------------------------------------------

_LOCAL_WORDS = re.compile(r"message too long,? mtu[=:]? ?(\d+)", re.IGNORECASE)
_ROUTER_WORDS = re.compile(r"From (\S+) .*?(?:frag needed.*?|packet too big.*?)mtu ?= ?(\d+)", re.IGNORECASE)
_REFUSED_WORDS = re.compile(r"(?:destination (?:host|net) \w+|network is unreachable|no route to host)", re.IGNORECASE)


def _run(command: Any, timeout: float) -> Tuple[int, str]:
    result = tool_result(command, what="No echo request could be sent", timeout=timeout, accept=tuple(range(256)))
    return result.returncode, result.stdout + result.stderr


def by_program(
    address: Any, source: Any, size: int, timeout: float, run: Callable[[Any, float], Tuple[int, str]] = _run
) -> Echo:
    """The same by the program ``ping`` of iputils. :raises NoEcho: it is not there, or may not."""
    payload = max(0, size - _HEADERS[address.version])
    seconds = max(1, round(timeout))
    command = ["ping", f"-{address.version}", "-n", "-c", "1", "-M", "do", "-s", str(payload), "-W", str(seconds)]
    command += ["-I", str(source)] if source is not None else []
    try:
        code, text = run([*command, str(address)], seconds + 5)
    except VadpError as error:
        raise NoEcho(str(error)) from error
    found = _LOCAL_WORDS.search(text)
    if found:
        return Echo(LOCAL, int(found.group(1)))
    found = _ROUTER_WORDS.search(text)
    if found:
        return Echo(ON_THE_WAY, int(found.group(2)), found.group(1))
    if code == 0:
        return Echo(CAME_BACK)
    found = _REFUSED_WORDS.search(text)
    if found:
        return Echo(REFUSED, said_by=found.group(0))
    # One who sent and heard nothing prints its statistics and ends with 1; anything else is a ping that could not send.
    if code == 1 and "transmitted" in text:
        return Echo(SILENT)
    raise NoEcho(text.strip().splitlines()[-1] if text.strip() else f"ping ended with {code}")
