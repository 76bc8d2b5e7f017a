# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The control socket's client, for tests and for the shell.

    python tests/simulator/client.py SOCKET guest_write vm=app01 disk=2000 'pattern={"seed": 1, "length": 512}'

A field's value is JSON, or else a string. The result is printed as JSON; an error goes to stderr, exit code 1.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any


class ControlError(Exception):
    """The simulator refused; the message has its words."""


class Control:
    """A connection to the control socket. Not for several threads at once."""

    def __init__(self, socket_path: str | os.PathLike[str], timeout: float | None = 600) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        path = Path(socket_path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # a socket's path may have 107 bytes only; this one always fits
            self._socket.connect(f"/proc/self/fd/{folder}/{path.name}")
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(folder)
        self._lines = self._socket.makefile("rb")

    def call(self, op: str, **fields: Any) -> Any:
        """Do one op and return its result. Bytes among the fields are sent as base64.

        :raises ControlError: the simulator refused. :raises ConnectionError: it is gone.
        """
        request = {"op": op}
        for name, value in fields.items():
            request[name] = base64.b64encode(value).decode() if isinstance(value, (bytes, bytearray)) else value
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the simulator ended the connection")
        answer = json.loads(line)
        if not answer["ok"]:
            raise ControlError(f"{op}: {answer['error']}")
        return answer["result"]

    def read(self, vm: str, disk: int | str, offset: int, length: int, snapshot: str | None = None) -> bytes:
        """Bytes of a VM's disk, or of what a snapshot froze."""
        result = self.call("read_disk", vm=vm, disk=disk, snapshot=snapshot, offset=offset, length=length)
        return base64.b64decode(result["data"])

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def main(argv: list[str]) -> int:
    if len(argv) < 2 or any("=" not in word for word in argv[2:]):
        print("usage: client.py SOCKET OP [field=value ...]", file=sys.stderr)
        return 2
    fields: dict[str, Any] = {}
    for word in argv[2:]:
        name, _unused, value = word.partition("=")
        fields[name] = value
        with contextlib.suppress(ValueError):
            fields[name] = json.loads(value)
    try:
        with Control(argv[0]) as control:
            result = control.call(argv[1], **fields)
    except (ControlError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
