# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which files a service has read: kept from a successful reload until the next start of the machine.

A service that read its files when the machine started has read those that were there by then. Of a later file only a
reload that went well says so, and only of that very file: a copy that was put in its place later has not been read.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Optional, Sequence

DIRECTORY = "/run/openvadp-backup"


class Taken:
    """What a service has taken of some files.

    :param name: of the service, for the file in *directory*, which does not survive a restart of the machine.
    :param files: paths; one that is not there counts, too.
    """

    def __init__(self, name: str, files: Sequence[str], directory: str = DIRECTORY) -> None:
        self.files = sorted(files)
        key = hashlib.sha256("\0".join(self.files).encode()).hexdigest()[:16]
        self._path = Path(directory) / f"{name}-{key}"

    def current(self) -> bool:
        """Whether the files are those that were taken."""
        try:
            kept: Optional[str] = self._path.read_text(encoding="ascii")
        except FileNotFoundError:
            kept = None
        if kept is not None:
            return kept == self._words()
        return all(_older_than_start(path) for path in self.files)

    def keep(self) -> None:
        """To be called when the service has taken them. :raises OSError: it can't be kept."""
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        draft.write_text(self._words(), encoding="ascii")
        os.replace(draft, self._path)

    def _words(self) -> str:
        return "".join(f"{_identity(path)}\n" for path in self.files)


def _identity(path: str) -> str:
    """What tells a file from another one in its place, though it have the same bytes."""
    try:
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            digest = hashlib.sha256(stream.read()).hexdigest()
    except FileNotFoundError:
        return "none"
    return f"{digest} {status.st_ino} {status.st_mtime_ns}"


def _older_than_start(path: str) -> bool:
    """Whether a file was there, as it is, when this machine started; one that is not there never was."""
    try:
        changed = os.stat(path).st_ctime
    except FileNotFoundError:
        return True
    with open("/proc/stat", encoding="ascii") as stream:
        started = next((int(line.split()[1]) for line in stream if line.startswith("btime ")), 0)
    return changed < started
