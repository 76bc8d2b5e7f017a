# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What Ansible makes anew in each playbook is made once for all tests: half of their processor time.

- It ships each module as an archive, which Python compiles at each start. The byte code is kept, found by the hash of
  the source.
- It builds these archives in a temporary folder. Runs of one Ansible on one state of the collection share it.

Python loads this file by itself where its folder is on PYTHONPATH; E2E_CACHE names the folder for both.
"""

from __future__ import annotations

import _imp
import hashlib
import importlib.util
import marshal
import os
import sys
import tempfile
import zipimport

CACHE = os.environ.get("E2E_CACHE", "")


def _compile_source(path, source):
    digest = hashlib.sha256(importlib.util.MAGIC_NUMBER + source).hexdigest()
    kept = os.path.join(CACHE, digest)
    try:
        with open(kept, "rb") as file:
            code = marshal.loads(file.read())
    except (OSError, EOFError, ValueError):
        code = _compile(path, source)
        with open(f"{kept}.{os.getpid()}", "wb") as file:
            file.write(marshal.dumps(code))
        os.replace(file.name, kept)
        return code
    # Tracebacks name the archive of this run.
    _imp._fix_co_filename(code, path)
    return code


def _mkdtemp(suffix=None, prefix=None, dir=None):
    made = _make(suffix, prefix, dir)
    if prefix and prefix.startswith("ansible-local-"):
        archives = os.path.join(CACHE, "archives-" + hashlib.sha256(sys.prefix.encode()).hexdigest())
        os.makedirs(archives, exist_ok=True)
        os.symlink(archives, os.path.join(made, "ansiballz_cache"))
    return made


# An ordinary user's test can't write there, and goes without.
if os.access(CACHE, os.W_OK):
    if hasattr(zipimport, "_compile_source") and hasattr(_imp, "_fix_co_filename"):
        _compile = zipimport._compile_source
        zipimport._compile_source = _compile_source
    _make = tempfile.mkdtemp
    tempfile.mkdtemp = _mkdtemp
