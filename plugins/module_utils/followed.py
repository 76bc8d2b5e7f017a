# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The progress file: JSON lines that somebody else follows while a module runs."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, Dict


def open_to_append(path: str) -> int:
    """A descriptor of the file, which may lie where others can put something in its place. :raises OSError:"""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not an ordinary file", path)
    return descriptor


def as_line(record: Dict[str, Any]) -> bytes:
    return json.dumps(record).encode("utf-8") + b"\n"


def note_waiting(path: str, label: str, state: str) -> None:
    """Append that something is waited for before there is any disk. :raises OSError: the file can't be written.

    :param label: what is waited for, as the line begins. :param state: "waiting for ...".
    """
    descriptor = open_to_append(path)
    try:
        record = {"disk": None, "label": label, "state": state, "done_bytes": 0, "total_bytes": 0}
        os.write(descriptor, as_line(record))
    finally:
        os.close(descriptor)
