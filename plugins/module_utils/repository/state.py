# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where this machine keeps lock, record and journal of a restore whose repository can't or must not be written.

That is so for a repository that is mounted read-only, that has format 1, or that lies in a place which it does not
list: after a disaster it is read there anyway (proofs 4).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Optional

from ..errors import RepositoryError

STATE_DIR = "/var/lib/openvadp"


def folder_of(repository_id: str) -> Path:
    """The folder, whether it is there or not. *repository_id* is a UUID."""
    return Path(STATE_DIR) / repository_id


def existing(repository_id: str) -> Optional[Path]:
    """The folder, if this user has one. What another user could have written there is not ours."""
    folder = folder_of(repository_id)
    return folder if os.path.isdir(str(folder)) and _problem(folder) is None else None


def make(repository_id: str) -> Path:
    """Create the folder (mode 0700), unless it is there.

    :raises RepositoryError: this user may not, or another user may write to it.
    """
    folder = folder_of(repository_id)
    try:
        for path, mode in ((folder.parent, 0o755), (folder, 0o700)):
            try:
                os.mkdir(str(path), mode)
            except FileExistsError:
                continue
    except OSError as error:
        raise _refused(folder, error.strerror) from None
    problem = _problem(folder)
    if problem is not None:
        raise _refused(folder, problem)
    return folder


def _problem(folder: Path) -> Optional[str]:
    for path, owners in ((folder.parent, (0, os.geteuid())), (folder, (os.geteuid(),))):
        try:
            status = os.lstat(str(path))
        except OSError as error:
            return f"{path}: {error.strerror}"
        if not stat.S_ISDIR(status.st_mode):
            return f"{path} is not a folder"
        if status.st_uid not in owners:
            return f"{path} belongs to user {status.st_uid}"
        if status.st_mode & 0o022:
            return f"{path} can be written by others"
    return None


def _refused(folder: Path, reason: Optional[str]) -> RepositoryError:
    return RepositoryError(
        "There is no place for the lock and the record of this restore",
        subject=str(folder),
        reason=reason,
        remedy=f"The repository is not written, so they lie on this machine: run as root, or make the folder for that"
        f" user: install -d -m 0700 -o {os.geteuid()} {folder}",
    )
