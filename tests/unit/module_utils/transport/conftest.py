# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import struct
import zlib
from typing import Callable

import pytest

MIB = 1024 * 1024
GROUP = "spW6m0-IOKQ-rgOW-EUHy-1lvO-8U9M-hKOIkK"


def _label(group: str = GROUP, name: str = "guestvg", *, wrapped: bool = False, metadata: bool = True) -> bytes:
    """A physical volume as LVM documents it: label in sector 1, metadata area at 4 KiB, a ring of 64 KiB."""
    text = f'{name} {{\nid = "{group}"\nseqno = 1\nphysical_volumes {{\n}}\n}}\n'.encode()
    data = bytearray(MIB)
    areas = struct.pack("<QQQQ", MIB, 0, 0, 0) + (struct.pack("<QQ", 4096, 65536) if metadata else b"") + bytes(16)
    pv = b"p" * 32 + struct.pack("<Q", 64 * MIB) + areas
    data[512 : 512 + 32] = b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001"
    data[544 : 544 + len(pv)] = pv
    checksum = zlib.crc32(bytes(data[532:1024]), 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    data[528:532] = struct.pack("<I", checksum)
    begin = 65536 - 20 if wrapped else 512
    header = struct.pack("<I16sIQQ", 0, b" LVM2 x[5A%r0N*>", 1, 4096, 65536)
    header += struct.pack("<QQII", begin, len(text), 0, 0) + bytes(24)
    data[4096 : 4096 + len(header)] = header
    first = text[: 65536 - begin]
    data[4096 + begin : 4096 + begin + len(first)] = first
    data[4096 + 512 : 4096 + 512 + len(text) - len(first)] = text[len(first) :]
    return bytes(data)


@pytest.fixture
def label_of_lvm() -> Callable[..., bytes]:
    """Makes the bytes of a physical volume, from the UUID and the name of its volume group."""
    return _label
