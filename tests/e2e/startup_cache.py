# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where tests and demo keep what is the same in all runs on one state of the collection; see startup/sitecustomize.py.

As a program it prints that folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


@functools.lru_cache(maxsize=None)
def folder() -> Path:
    """The folder of this state; it is there."""
    digest = hashlib.sha256()
    pinned = [_ROOT / "requirements-dev.txt", _ROOT / "tests" / "setup.sh"]
    for path in [*pinned, *sorted((_ROOT / "plugins").rglob("*.py"))]:
        digest.update(b"%s\0%d\0" % (os.fsencode(path.relative_to(_ROOT)), path.stat().st_size) + path.read_bytes())
    made = _ROOT / "build" / "e2e-cache" / digest.hexdigest()
    made.mkdir(parents=True, exist_ok=True)
    return made


if __name__ == "__main__":
    print(folder())
