# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the process that reads an image says to the one that writes files: frames in a pipe.

A frame is a letter, a length of four bytes, and so many bytes: ``J`` a JSON object, ``D`` data of a file, ``H`` a hole
(its length as eight bytes). Requests go the other way as JSON lines. The reader is not trusted: its frames have bounds,
and it has to say something from time to time.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import time
from typing import Any, Dict, Optional, Tuple

_HEAD = struct.Struct(">cI")
_HOLE = struct.Struct(">Q")
JSON, DATA, HOLE = b"J", b"D", b"H"
MOST_BYTES = 16 << 20
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


class Silent(Exception):
    """Nothing came in time."""


class Ended(Exception):
    """The other side is gone, or says what no reader says."""


def encode(kind: bytes, payload: bytes) -> bytes:
    """A frame."""
    return _HEAD.pack(kind, len(payload)) + payload


def encode_json(document: Dict[str, Any]) -> bytes:
    """A frame with an object; names that are not Unicode go through as surrogates."""
    return encode(JSON, json.dumps(document).encode("ascii"))


def encode_hole(length: int) -> bytes:
    """A frame for so many zeros."""
    return encode(HOLE, _HOLE.pack(length))


class FrameReader:
    """The frames of a pipe.

    :param descriptor: the pipe's end; it stays the caller's.
    :param timeout: seconds within which each frame must come.
    :param deadline: by the monotonic clock, for all of them.
    """

    def __init__(self, descriptor: int, timeout: float, deadline: Optional[float] = None) -> None:
        self._descriptor = descriptor
        self._timeout = timeout
        self._deadline = deadline

    def next(self) -> Tuple[bytes, Any]:
        """Kind and content: a dictionary, bytes, or the length of a hole.

        :raises Silent: it did not come in time. Ended: there is no more.
        """
        until = time.monotonic() + self._timeout
        if self._deadline is not None:
            until = min(until, self._deadline)
        kind, length = _HEAD.unpack(self._exactly(_HEAD.size, until))
        if kind not in (JSON, DATA, HOLE) or length > MOST_BYTES:
            raise Ended("it said what makes no sense")
        payload = self._exactly(length, until)
        if kind == DATA:
            return kind, payload
        try:
            if kind == HOLE:
                return kind, _HOLE.unpack(payload)[0]
            document = json.loads(payload)
        except (ValueError, struct.error):
            raise Ended("it said what makes no sense") from None
        if not isinstance(document, dict):
            raise Ended("it said what makes no sense")
        return kind, document

    def _exactly(self, count: int, until: float) -> bytes:
        parts = []
        while count:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._descriptor], [], [], left)[0]:
                raise Silent()
            part = os.read(self._descriptor, min(count, _PIPE_BYTES))
            if not part:
                raise Ended("it ended")
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def widen(descriptor: int) -> None:
    """Give a pipe room for a whole frame, where the kernel allows it."""
    try:
        fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        # An ordinary user has only so much of it: a small pipe is slower, nothing else.
        return
