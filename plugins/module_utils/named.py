# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Paths that a user named: why they can't be used, in words that tell "not there" from "no permission"."""

from __future__ import annotations

import getpass
import os
import stat
from typing import Optional

FILE, FOLDER = "file", "folder"


def path_problem(path: str, kind: str, *, write: bool = False) -> Optional[str]:
    """Why *path* is not a file or folder that this user can read; None: it is.

    :param kind: :data:`FILE` or :data:`FOLDER`.
    :param write: whether it must be writable instead.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return f"there is no such {kind}"
    except PermissionError:
        return f"permission denied: {_user()} may not enter a folder on the way to it"
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    if not (stat.S_ISDIR(mode) if kind == FOLDER else stat.S_ISREG(mode)):
        return f"it is not a {kind}"
    if not os.access(path, (os.W_OK if write else os.R_OK) | (os.X_OK if kind == FOLDER else 0)):
        return f"permission denied: {_user()} may not {'write' if write else 'read'} it"
    return None


def _user() -> str:
    try:
        return f"user {getpass.getuser()}"
    except (KeyError, OSError, ImportError):
        return f"user {os.geteuid()}"
