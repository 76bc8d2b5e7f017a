# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What this machine reaches: names of hosts, their ports, what greets there, and how long a certificate is valid."""

from __future__ import annotations

import datetime
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

# A host in the same building answers within milliseconds; whoever needs longer is filtered.
LONGEST_WAIT = 10
_PROBES_AT_A_TIME = 16
_GREETING_BYTES = 512
_GREETING = "220 "


@dataclass
class Reached:
    """How one host is reached.

    :param addresses: what its name resolves to.
    :param name_problem: why it does not resolve, else None.
    :param nfc_problem: why its NFC port is of no use, else None.
    :param greeting: what the NFC port says.
    :param api_problem: why port 443 is not reached, else None.
    """

    name: str
    addresses: List[str] = field(default_factory=list)
    name_problem: Optional[str] = None
    nfc_problem: Optional[str] = None
    greeting: str = ""
    api_problem: Optional[str] = None


def probe_hosts(names: Iterable[str], nfc_port: int, api_port: int, timeout: float) -> Dict[str, Reached]:
    """Look at all hosts at the same time; each port is waited for *timeout* seconds at most."""
    wanted = sorted(set(names))
    wait = min(timeout, LONGEST_WAIT)
    with ThreadPoolExecutor(max_workers=_PROBES_AT_A_TIME) as pool:
        found = pool.map(lambda name: probe_host(name, nfc_port, api_port, wait), wanted)
        return dict(zip(wanted, found))


def probe_host(name: str, nfc_port: int, api_port: int, timeout: float) -> Reached:
    reached = Reached(name)
    try:
        infos = socket.getaddrinfo(name, nfc_port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reached.name_problem = getattr(error, "strerror", None) or str(error)
        return reached
    reached.addresses = sorted({str(info[4][0]) for info in infos})
    reached.nfc_problem, reached.greeting = _greeting(name, nfc_port, timeout)
    reached.api_problem = _connect(name, api_port, timeout)
    return reached


def _greeting(name: str, port: int, timeout: float) -> Tuple[Optional[str], str]:
    """authd's greeting, in plain text before TLS (VADP facts 19)."""
    deadline = time.monotonic() + timeout
    try:
        with socket.create_connection((name, port), timeout=timeout) as sock:
            said = b""
            while b"\n" not in said and len(said) < _GREETING_BYTES:
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                piece = sock.recv(_GREETING_BYTES)
                if not piece:
                    break
                said += piece
    except socket.timeout:
        return f"no greeting within {timeout:g} s", ""
    except OSError as error:
        return error.strerror or str(error), ""
    text = "".join(char for char in said.decode("utf-8", errors="replace") if char.isprintable()).strip()
    if not text.startswith(_GREETING):
        if not said:
            return "it closes the connection at once", ""
        return f"what answers there is no ESXi host: {text[:80] or 'binary data'!r}", ""
    return None, text


def _connect(name: str, port: int, timeout: float) -> Optional[str]:
    try:
        socket.create_connection((name, port), timeout=timeout).close()
    except socket.timeout:
        return f"no answer within {timeout:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return None


# Certificates


def certificate_validity(der: bytes) -> Tuple[datetime.datetime, datetime.datetime]:
    """(not before, not after) of an X.509 certificate, in UTC. Works for one that was not verified, which Python's ssl
    does not decode.

    :raises ValueError: it is none.
    """
    certificate = _Der(der).inside(0x30)
    signed = certificate.inside(0x30)
    signed.skip_if(0xA0)  # version
    for _unused in range(3):  # serial number, algorithm, issuer
        signed.skip()
    validity = signed.inside(0x30)
    return validity.time(), validity.time()


class _Der:
    """Reads one level of DER, element by element."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _element(self) -> Tuple[int, bytes]:
        data, at = self._data, self._at
        if len(data) < at + 2:
            raise ValueError("the certificate is cut")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            length = int.from_bytes(data[at : at + count], "big")
            at += count
        if len(data) < at + length:
            raise ValueError("the certificate is cut")
        self._at = at + length
        return tag, data[at : at + length]

    def inside(self, tag: int) -> _Der:
        found, content = self._element()
        if found != tag:
            raise ValueError("it is not a certificate")
        return _Der(content)

    def skip(self) -> None:
        self._element()

    def skip_if(self, tag: int) -> None:
        if self._data[self._at : self._at + 1] == bytes([tag]):
            self._element()

    def time(self) -> datetime.datetime:
        tag, content = self._element()
        text = content.decode("ascii")
        if tag == 0x17:  # UTCTime: two digits of the year
            text = ("19" if int(text[:2]) >= 50 else "20") + text
        elif tag != 0x18:
            raise ValueError("it is not a certificate")
        moment = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ")
        return moment.replace(tzinfo=datetime.timezone.utc)


def words_of(addresses: Sequence[str]) -> str:
    return ", ".join(addresses) or "no address"
