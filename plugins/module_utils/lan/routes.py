# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which interface of this machine has an address, and by which one packets to an address leave: the kernel's own word.

Asked through netlink, which needs no right and no program. Where it can't be asked, nothing is known.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any, Dict, Iterator, List, Optional, Tuple

_NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 20, 22, 24, 26
_ERROR, _DONE = 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_ADDRESS, _LOCAL = 1, 2
_DESTINATION, _SOURCE, _INTERFACE, _GATEWAY = 1, 2, 4, 5
_LOCAL_ROUTE = 2

_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_INTERFACE_ADDRESS = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")


def _attribute(kind: int, value: bytes) -> bytes:
    padding = b"\0" * (-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def _attributes(data: bytes) -> Dict[int, bytes]:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def _ask(kind: int, flags: int, body: bytes) -> Iterator[Tuple[int, bytes]]:
    """The kernel's answers, (kind, body) each. :raises OSError: it can't be asked, or has no answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(2)
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 1, 0) + body)
        while True:
            data = sock.recv(1 << 16)
            while len(data) >= _HEADER.size:
                length, answer, _flags, _number, _port = _HEADER.unpack_from(data)
                if answer == _DONE or length < _HEADER.size:
                    return
                if answer == _ERROR:
                    number = -struct.unpack_from("=i", data, _HEADER.size)[0]
                    raise OSError(number, "no answer from the kernel's routing")
                yield answer, data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]
            if not flags & _DUMP:
                return


def _name(index: int) -> Optional[str]:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None


def interface_of(address: Any) -> Optional[str]:
    """The interface that has *address* (of ``ipaddress``); None if none has, or it can't be determined."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        for kind, body in _ask(_GET_ADDRESS, _DUMP, _INTERFACE_ADDRESS.pack(family, 0, 0, 0, 0)):
            if kind != _NEW_ADDRESS:
                continue
            found = _attributes(body[_INTERFACE_ADDRESS.size :])
            if found.get(_LOCAL, found.get(_ADDRESS)) == address.packed:
                return _name(_INTERFACE_ADDRESS.unpack_from(body)[4])
    except OSError:
        return None
    return None


def addresses_of(interface: str) -> List[ipaddress.IPv4Interface]:
    """The IPv4 addresses of an interface, with their subnets. :raises OSError: it is not there, or nothing is known."""
    index = socket.if_nametoindex(interface)
    found = []
    for kind, body in _ask(_GET_ADDRESS, _DUMP, _INTERFACE_ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)):
        if kind == _NEW_ADDRESS:
            _family, prefix, _flags, _scope, own = _INTERFACE_ADDRESS.unpack_from(body)
            values = _attributes(body[_INTERFACE_ADDRESS.size :])
            address = values.get(_LOCAL, values.get(_ADDRESS))
            if own == index and address is not None:
                found.append(ipaddress.IPv4Interface((address, prefix)))
    return found


def leaves_by(address: Any, source: Any = None) -> Optional[str]:
    """The interface by which packets to *address* leave this machine.

    None if *address* is this machine's own, if there is no way, or if it can't be determined.

    :param source: the address that they come from, if it is bound to.
    """
    found = way_to(address, source)
    return found[0] if found is not None else None


def way_to(address: Any, source: Any = None) -> Optional[Tuple[Optional[str], Any]]:
    """(the interface by which packets to *address* leave, the router that they go to or None); None as above."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    bits = address.max_prefixlen
    body = _ROUTE.pack(family, bits, bits if source is not None else 0, 0, 0, 0, 0, 0, 0)
    body += _attribute(_DESTINATION, address.packed)
    if source is not None:
        body += _attribute(_SOURCE, source.packed)
    try:
        for kind, answer in _ask(_GET_ROUTE, 0, body):
            found = _attributes(answer[_ROUTE.size :])
            if kind == _NEW_ROUTE and _INTERFACE in found and _ROUTE.unpack_from(answer)[7] != _LOCAL_ROUTE:
                gateway = ipaddress.ip_address(found[_GATEWAY]) if _GATEWAY in found else None
                return _name(struct.unpack("=I", found[_INTERFACE])[0]), gateway
    except OSError:
        return None
    return None
