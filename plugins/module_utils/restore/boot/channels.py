# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is heard of a guest: its serial console, its agent, qemu itself (QMP). All of it may lie, or say too much."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import time
from abc import ABC, abstractmethod
from typing import Any, Dict, List, Optional

from ...errors import DataPathError

#: Of a serial console that says more, the beginning and the end are kept, half each.
SERIAL_BYTES = 1 << 20
#: A pattern is looked for in so much at a time, with so much of what came before.
_WINDOW_BYTES = 16 << 10
_OVERLAP_BYTES = 4 << 10
_READ_BYTES = 64 << 10
_LINE_BYTES = 1 << 20
_QMP_SECONDS = 30.0
_AGENT_AGAIN_SECONDS = 1.0


def connect(path: str) -> socket.socket:
    """A connection to a Unix socket of qemu's."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise DataPathError("qemu can't be reached", subject=path, reason=error.strerror) from None
    return connection


class Log:
    """The bytes of a console, at most *limit* of them: the first half and the last."""

    def __init__(self, limit: int = SERIAL_BYTES) -> None:
        self.total = 0
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """What has come."""
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[: max(0, room)]
        self._tail += data[max(0, room) :]
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    def content(self) -> bytes:
        """What is kept; where something is missing, a line says so."""
        tail = bytes(self._tail[-self._half :])
        missing = self.total - len(self._head) - len(tail)
        gap = f"\n[{missing} bytes left out]\n".encode("ascii") if missing else b""
        return bytes(self._head) + gap + tail


class Watcher:
    """Looks for a pattern in what comes piece by piece, also across pieces.

    A console's escape sequences are taken out before.
    """

    _ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_]|\][^\x07\x1b]*(?:\x07|\x1b\\))|\r(?=\n)|\0")

    def __init__(self, pattern: Optional[str]) -> None:
        self._pattern = None if pattern is None else re.compile(pattern, re.MULTILINE)
        self._text = b""
        #: What has matched.
        self.found: Optional[str] = None

    def feed(self, data: bytes) -> None:
        """What has come."""
        if self._pattern is None or self.found is not None:
            return
        for start in range(0, len(data), _WINDOW_BYTES - _OVERLAP_BYTES):
            piece = data[start : start + _WINDOW_BYTES - _OVERLAP_BYTES]
            self._text = self._text[-_OVERLAP_BYTES:] + piece
            match = self._pattern.search(self._ESCAPES.sub("", self._text.decode("utf-8", "replace")))
            if match is not None:
                self.found = match.group(0)[:200]
                return


class _Channel(ABC):
    """A socket of the guest's that is read piece by piece, as far as something has come; for ``select``."""

    def __init__(self, path: str) -> None:
        self._socket = connect(path)
        self._socket.setblocking(False)
        self.open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> None:
        """Take in a piece of what has come; who floods a channel does not keep us from looking elsewhere."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._take(data)
        else:
            self.open = False

    @abstractmethod
    def _take(self, data: bytes) -> None:
        """What has come."""

    def close(self) -> None:
        self._socket.close()


class Console(_Channel):
    """A character device of the guest, from which is only read.

    :param pattern: what ``watcher`` looks for.
    :param failures: what ``failures`` looks for.
    """

    def __init__(self, path: str, pattern: Optional[str], failures: Optional[str]) -> None:
        super().__init__(path)
        self.log = Log()
        self.watcher = Watcher(pattern)
        self.failures = Watcher(failures)

    def _take(self, data: bytes) -> None:
        self.log.add(data)
        self.watcher.feed(data)
        self.failures.feed(data)

    def drain(self) -> None:
        """What qemu has sent already, within reason."""
        for _again in range(SERIAL_BYTES // _READ_BYTES):
            if not self.open or not select.select([self], [], [], 0)[0]:
                return
            self.read()


class Agent(_Channel):
    """qemu's guest agent: asked until it answers with the number that it was asked with."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._text = b""
        self._asked = 0.0
        self._number = 0
        #: It has answered.
        self.answered = False

    def ask(self, now: float) -> None:
        """Ask, if the last time is a while ago."""
        if self.answered or not self.open or now - self._asked < _AGENT_AGAIN_SECONDS:
            return
        self._asked = now
        self._number += 1
        request = {"execute": "guest-sync", "arguments": {"id": self._number}}
        # Nobody may listen yet: what does not fit is asked another time.
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps(request).encode("ascii") + b"\n")

    def _take(self, data: bytes) -> None:
        *lines, rest = (self._text + data).split(b"\n")
        self._text = rest[-_OVERLAP_BYTES:]
        for line in lines:
            answer = parse(line.strip(b"\xff \r"))
            number = answer.get("return")
            if isinstance(number, int) and not isinstance(number, bool) and 0 < number <= self._number:
                self.answered = True


def parse(line: bytes) -> Dict[str, Any]:
    """A JSON object; empty if it is none."""
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Qmp:
    """qemu's own control socket.

    ``beside`` are channels that are read while an answer is awaited: qemu stands still while the guest writes to a
    console that nobody reads, and a socket that is written byte by byte is full after some 300 of them.
    """

    def __init__(self, path: str) -> None:
        self._socket = connect(path)
        self._text = b""
        self._number = 0
        #: Names of events that nobody has taken yet, oldest first.
        self.events: List[str] = []
        self.open = True
        self.beside: List[Any] = []
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        """Carry out a command and return its answer. DataPathError: it failed, or qemu does not answer."""
        self._number += 1
        request: Dict[str, Any] = {"execute": name, "id": self._number}
        if arguments:
            request["arguments"] = arguments
        deadline = time.monotonic() + _QMP_SECONDS
        try:
            self._socket.settimeout(_QMP_SECONDS)
            self._socket.sendall(json.dumps(request).encode("ascii") + b"\n")
        except OSError as error:
            raise DataPathError("qemu does not answer", subject=name, reason=str(error)) from None
        while self.open:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for answer in self._receive(left):
                if answer.get("id") != self._number:
                    continue
                if "error" in answer:
                    raise DataPathError("qemu refused a command", subject=name, reason=str(answer["error"])[:500])
                return answer.get("return")
        raise DataPathError(
            "qemu does not answer", subject=name, reason="it has ended" if not self.open else "it hangs"
        )

    def read(self, seconds: float) -> None:
        """Take in what has come without being asked for, here and beside, or comes within that time."""
        self._receive(seconds)

    def _receive(self, timeout: float) -> List[Dict[str, Any]]:
        others = [channel for channel in self.beside if channel.open]
        ready = select.select([self._socket, *others], [], [], timeout)[0]
        for channel in others:
            if channel in ready:
                channel.read()
        if self._socket not in ready:
            return []
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data or len(self._text) > _LINE_BYTES:
            self.open = False
            return []
        *lines, self._text = (self._text + data).split(b"\n")
        answers = []
        for line in lines:
            answer = parse(line)
            if "event" in answer:
                self.events = [*self.events[-100:], str(answer["event"])]
            else:
                answers.append(answer)
        return answers

    def close(self) -> None:
        self._socket.close()
