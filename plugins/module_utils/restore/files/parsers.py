# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""dissect's library for btrfs, imported when it is wanted. It needs Python 3.10 or newer."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, List, Tuple, Type

PYTHON = (3, 10)
#: import name -> what to install
PACKAGES = {"dissect.btrfs": "dissect.btrfs"}
_ERRORS = ("dissect.btrfs",)
# What it decompresses with, which says of damaged data what nothing else says.
_ZSTD = ("compression.zstd", "backports.zstd")


def missing() -> List[str]:
    """What must be installed before dissect can be used here; empty if nothing is missing."""
    if sys.version_info < PYTHON:
        return ["Python 3.10 or newer"]
    return [package for name, package in PACKAGES.items() if not _there(name)]


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _import(name: str) -> Any:
    return importlib.import_module(name)


def btrfs() -> Any:
    return _import("dissect.btrfs")


def btrfs_structures() -> Any:
    return _import("dissect.btrfs.c_btrfs").c_btrfs


def btrfs_stream() -> Any:
    return _import("dissect.btrfs.stream")


def errors() -> Tuple[Type[BaseException], ...]:
    """The base classes of what the parsers raise that were imported: each takes a tenth of a second."""
    found = []
    for name in _ZSTD:
        error = getattr(sys.modules.get(name), "ZstdError", None)
        if isinstance(error, type) and issubclass(error, Exception):
            found.append(error)
    for package in _ERRORS:
        for name in (f"{package}.exceptions", f"{package}.exception"):
            error = getattr(sys.modules.get(name), "Error", None)
            if isinstance(error, type) and issubclass(error, Exception):
                found.append(error)
    return tuple(found)
