# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Libraries that may be absent where a module is imported, and the one way to miss them aloud.

Modules must import without them (``ansible-doc``, ``ansible-test``), so nothing else imports them at its top level:
code takes them from here (``from ..libraries import nbd``), and a module names those it needs to ``run_module``.
"""

from __future__ import annotations

import importlib
import traceback
from typing import Any, Dict, Tuple

_NAMES = {
    # import name -> (what to install)
    "pyVmomi": "pyvmomi (PyPI)",
    "jmespath": "jmespath (PyPI, or python3-jmespath)",
    "nbd": "libnbd's Python binding (package python3-libnbd; PyPI's 'nbd' is another project)",
    "blake3": "blake3 (PyPI)",
}

_missing: Dict[str, str] = {}


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        _missing[name] = traceback.format_exc()
        return None


pyVmomi: Any = _optional("pyVmomi")
jmespath = _optional("jmespath")
nbd = _optional("nbd")
blake3 = _optional("blake3")

vim: Any = getattr(pyVmomi, "vim", None)
vmodl: Any = getattr(pyVmomi, "vmodl", None)


def first_missing(*names: str) -> Tuple[str, str, str]:
    """The first of the libraries that is absent: (import name, what to install, traceback), or three empty strings."""
    for name in names:
        if name in _missing:
            return name, _NAMES[name], _missing[name]
    return "", "", ""
