# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Progress of each disk, as JSON lines in a file that somebody else follows.

``{"disk", "label", "state", "done_bytes", "total_bytes", "bytes_per_second", "seconds"}``; ``state`` is "running", or
"waiting for ..." with what is waited for, until the disk's last line. Each line is appended whole, by one write.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Callable, Optional

from ..errors import InputError
from ..followed import as_line, open_to_append

INTERVAL_SECONDS = 0.5


class Progress:
    """The file of one run; with *path* None nothing is written. Disks may report from threads of their own.

    :raises InputError: the file can't be written.
    """

    def __init__(self, path: Optional[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._file: Optional[int] = None
        if path is not None:
            try:
                self._file = open_to_append(path)
            except OSError as error:
                raise InputError(
                    "The progress file can't be written",
                    subject=path,
                    reason=error.strerror,
                    remedy="Name a file in a folder that is there and can be written, or leave progress_file out",
                ) from None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def close(self) -> None:
        """No line is written from now on."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def disk(self, key: int, label: str, total_bytes: int) -> DiskProgress:
        """Begin a disk; its first line says that it runs."""
        return DiskProgress(self, self._clock, key, label, total_bytes)

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                os.write(self._file, line)
            except OSError:
                # Nobody's backup fails because nobody can watch it (a full disk, a follower's file that is gone).
                os.close(self._file)
                self._file = None


class DiskProgress:
    """One disk of a :class:`Progress`."""

    def __init__(self, progress: Progress, clock: Callable[[], float], key: int, label: str, total_bytes: int) -> None:
        self._progress = progress
        self._clock = clock
        self._key = key
        self._label = label
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._started = clock()
        self._last = float("-inf")
        self._waits = False
        self._write("running")

    def update(self, done_bytes: int, total_bytes: Optional[int] = None) -> None:
        """So much is done; a line is written at most every 0.5 s. *total_bytes* replaces what was known."""
        self._done_bytes = done_bytes
        if self._waits:
            self._started, self._waits = self._clock(), False
        if total_bytes is not None:
            self._total_bytes = total_bytes
        if self._clock() - self._last >= INTERVAL_SECONDS:
            self._write("running")

    def wait(self, state: str) -> None:
        """The disk waits, as *state* says ("waiting for ..."); time and speed count from the end of that."""
        self._waits = True
        self._write(state)

    def finish(self, state: str) -> None:
        """The disk's last line, with its final *state* ("done", "failed", ...)."""
        self._write(state)

    def _write(self, state: str) -> None:
        self._last = self._clock()
        seconds = self._last - self._started
        line = {
            "disk": self._key,
            "label": self._label,
            "state": state,
            "done_bytes": self._done_bytes,
            "total_bytes": self._total_bytes,
            "bytes_per_second": int(self._done_bytes / seconds) if seconds > 0 else 0,
            "seconds": round(seconds, 3),
        }
        self._progress._write(as_line(line))
