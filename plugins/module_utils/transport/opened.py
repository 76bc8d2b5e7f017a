# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who serves a disk, as VDDK's log says it (VADP facts 19).

Four forms are known, each in single or double quotes::

    vpxa-nfcssl://[ds] vm/vm.vmdk@esx01.example.com:902
    vpxa-nfcssl://[ds] vm/vm.vmdk@{nfcip:192.0.2.24,hostname:esx01.example.com}:902     the host has a tagged backup NIC
    FASTLZ-vpxa-nfc://[ds] vm/vm.vmdk@esx01.example.com:902        the wire is compressed, by nbd or nbdssl
    san://snapshot-47[ds] vm/vm.vmdk, hotadd://..., /dev/...                            no host serves it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterator, List, Optional

_MODES = {"nfcssl": "nbdssl", "nfc": "nbd", "san": "san", "hotadd": "hotadd"}
_OPENED = re.compile(r"Opened (?:'(.*)'|\"(.*)\")")
_SCHEME = re.compile(r"(ZLIB-|FASTLZ-|SKIPZ-)?(?:[a-z]+-)?([a-z]+)://")
_PLACE = re.compile(r"@(?:\{([^{}]*)\}|([^@{}\s]+)):(\d+)(?:!.*)?$")
# The same anywhere in a line, behind any file name.
_PLACE_WITHIN = re.compile(r"@(?:\{([^{}]*)\}|(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9][A-Za-z0-9._-]*)):\d+\b")


@dataclass(frozen=True)
class Place:
    """Where a disk is served.

    :param host: the ESXi host, by the name or address under which vCenter knows it.
    :param address: what is connected to: the host's backup NIC where one is tagged, else the same as *host*.
    """

    host: str
    address: str

    @property
    def names(self) -> List[str]:
        """Host and address, each once."""
        return list(dict.fromkeys([self.host, self.address]))


@dataclass(frozen=True)
class Opened:
    """A disk that VDDK has opened.

    :param mode: the transport mode that the file's URL names; "" for one that is not known.
    :param place: None where no host serves it.
    :param compressed: what crosses the wire is compressed.
    """

    mode: str
    place: Optional[Place]
    compressed: bool = False


def opened_in(line: str) -> Optional[Opened]:
    """The disk that a line says was opened; None if it says nothing of the kind."""
    found = _OPENED.search(line)
    if found is None:
        return None
    url = found.group(1) or found.group(2) or ""
    scheme, place = _SCHEME.match(url), _PLACE.search(url)
    return Opened(
        mode=_MODES.get(scheme.group(2), "") if scheme else "",
        place=_place(place.group(1), place.group(2)) if place else None,
        compressed=bool(scheme and scheme.group(1)),
    )


def last_place(log_text: str) -> Optional[Place]:
    """Where the disk that was opened last is served; None where the log names no host."""
    for line in reversed(log_text.splitlines()):
        opened = opened_in(line) if "Opened " in line else None
        if opened is not None and opened.place is not None:
            return opened.place
    return None


def places_in(line: str) -> Iterator[Place]:
    """Every host that a line names behind the file of a disk, whatever was done with it."""
    for found in _PLACE_WITHIN.finditer(line):
        place = _place(found.group(1), found.group(2))
        if place is not None:
            yield place


def _place(fields: Optional[str], name: Optional[str]) -> Optional[Place]:
    """Of ``nfcip:192.0.2.24,hostname:esx01`` in any order, either of which may be missing; or of a plain name."""
    if fields is None:
        plain = (name or "").strip("[]")
        return Place(plain, plain) if plain else None
    pairs = (one.partition(":")[::2] for one in fields.split(","))
    known = {key.strip(): value.strip().strip("[]") for key, value in pairs}
    address = known.get("nfcip") or known.get("hostname") or ""
    return Place(known.get("hostname") or address, address) if address else None
