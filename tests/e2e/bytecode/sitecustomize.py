# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keep the byte code of what Python imports from an archive.

Ansible ships each module as an archive, and Python compiles all of it at each start: half of the processor time of the
end-to-end tests. Python loads this file by itself where its folder is on PYTHONPATH; E2E_BYTECODE names the cache.
What is compiled is what is run: a cached file is found by the hash of the source.
"""

from __future__ import annotations

import _imp
import contextlib
import hashlib
import importlib.util
import marshal
import os
import zipimport

FOLDER = os.environ.get("E2E_BYTECODE")
KEEPS = FOLDER and hasattr(zipimport, "_compile_source") and hasattr(_imp, "_fix_co_filename")


def _cached(path, source):
    digest = hashlib.sha256(importlib.util.MAGIC_NUMBER + source).hexdigest()
    kept = os.path.join(FOLDER, digest)
    try:
        with open(kept, "rb") as file:
            code = marshal.loads(file.read())
    except (OSError, EOFError, ValueError):
        code = _compile(path, source)
        # An ordinary user's test can't write here, and need not.
        with contextlib.suppress(OSError):
            os.makedirs(FOLDER, exist_ok=True)
            with open(f"{kept}.{os.getpid()}", "wb") as file:
                file.write(marshal.dumps(code))
            os.replace(file.name, kept)
        return code
    # Names the archive of this run in tracebacks.
    _imp._fix_co_filename(code, path)
    return code


if KEEPS:
    _compile = zipimport._compile_source
    zipimport._compile_source = _cached
