# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How much of an answer is taken from a server, and how slowly it may come.

A server that is broken, or none of vSphere's, may answer without an end, or a byte a second. All that is read from a
connection goes through here, status line and headers too: before the login as after it, whatever is asked for.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
from typing import Any, Callable, NamedTuple, Optional

# Waiting for the first byte may last (a changed-area query of a large disk, a vCenter under load); once it has come,
# the rest is there within seconds.
BEGIN_SECONDS = 600.0
TRANSFER_SECONDS = 120.0

_MIB = 1 << 20
# Transfers of disks: so much must come within the time that a single byte may take.
_LEAST_BYTES = 64 << 10


class AnswerRefused(OSError):
    """An answer that is taken no further: too large, too slow, or of a kind that was not asked for.

    As with a connection that was lost: whether the call was carried out is not known.
    """


class Limits(NamedTuple):
    """What an answer may be.

    :param bytes: with its headers.
    :param begin_seconds: until its first byte.
    :param transfer_seconds: from its first byte to its last. None: as long as it likes, but for
    :param stall_seconds: within which 64 KiB must come, if *transfer_seconds* is None.
    """

    bytes: int = 64 * _MIB
    begin_seconds: float = BEGIN_SECONDS
    transfer_seconds: Optional[float] = TRANSFER_SECONDS
    stall_seconds: float = 180.0


#: Calls of the API, and files that are read into memory.
CALL = Limits()
#: What a server says of itself before the login.
GREETING = Limits(bytes=_MIB, begin_seconds=30.0, transfer_seconds=30.0)
#: The REST API, for the little that is asked there.
REST = Limits(bytes=17 * _MIB, begin_seconds=30.0, transfer_seconds=30.0)


def download(at_most: int, stall_seconds: float) -> Limits:
    """A disk: *at_most* bytes, of which 64 KiB come within *stall_seconds*."""
    return Limits(at_most + _MIB, stall_seconds, None, stall_seconds)


def response_class(limits: Limits, clock: Callable[[], float] = time.monotonic) -> Callable[..., Any]:
    """For ``http.client.HTTPConnection.response_class``."""
    return functools.partial(_Response, limits, clock)


class _Response(http.client.HTTPResponse):
    """A response that raises :class:`AnswerRefused` where it goes beyond its limits."""

    def __init__(self, limits: Limits, clock: Callable[[], float], sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Bounded(sock, limits, clock))

    def begin(self) -> None:
        super().begin()
        encoding = self.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("", "identity"):
            # Compressed, a few megabytes become any number of them.
            raise AnswerRefused(f"the answer comes compressed ({encoding[:20]}), which was not asked for")


class _Bounded(io.RawIOBase):
    """What comes from a socket, within limits."""

    def __init__(self, sock: Any, limits: Limits, clock: Callable[[], float]) -> None:
        super().__init__()
        # It keeps the socket open for as long as it is itself.
        self._raw = sock.makefile("rb", buffering=0)
        self._sock = sock
        self._limits = limits
        self._clock = clock
        self._count = 0
        self._since = clock()
        self._window = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        usual = self._sock.gettimeout()
        left = self._left()
        if left <= 0:
            raise self._slow()
        try:
            self._sock.settimeout(left if usual is None else min(left, usual))
            count = self._raw.readinto(buffer) or 0
        except (socket.timeout, TimeoutError):
            if usual is not None and usual < left:
                raise
            raise self._slow() from None
        finally:
            if self._sock.fileno() >= 0:
                self._sock.settimeout(usual)
        self._take(count)
        return count

    def _left(self) -> float:
        """Seconds until the limit that counts now."""
        if self._count == 0:
            limit = self._limits.begin_seconds
        elif self._limits.transfer_seconds is not None:
            limit = self._limits.transfer_seconds
        else:
            limit = self._limits.stall_seconds
        return self._since + limit - self._clock()

    def _take(self, count: int) -> None:
        if self._count == 0:
            self._since = self._clock()
        self._count += count
        if self._count > self._limits.bytes:
            raise AnswerRefused(f"the answer is larger than {self._limits.bytes} bytes")
        if self._limits.transfer_seconds is None:
            self._window += count
            if self._window >= _LEAST_BYTES:
                self._window, self._since = 0, self._clock()

    def _slow(self) -> AnswerRefused:
        if self._count == 0:
            return AnswerRefused(f"no answer within {self._limits.begin_seconds:g} s")
        if self._limits.transfer_seconds is not None:
            return AnswerRefused(f"the answer did not finish within {self._limits.transfer_seconds:g} s")
        return AnswerRefused(f"less than {_LEAST_BYTES} bytes came within {self._limits.stall_seconds:g} s")
