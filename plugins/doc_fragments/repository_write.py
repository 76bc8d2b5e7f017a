# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  create:
    description:
      - Whether an empty folder becomes a repository. Set it for the first backup alone. Without it, a repository whose
        file system is not mounted is an error rather than a new repository on the disk below.
      - The folder must lie on a file system that keeps its identity, so not on overlay or tmpfs.
    type: bool
    default: false
  adopt:
    description:
      - What it means that the repository is in another place than those that it lists, or that it has format 1, which
        lists none. Without this option backups refuse it, and recovery only reports; it can be read, verified and
        restored from anyway.
      - With V(moved) it is used here and nowhere else from now on. It keeps its id, and its list of places is replaced.
      - With V(copy) the original is used on elsewhere. This one gets an id of its own, and the records of runs in it
        are discarded; nothing that they name is touched.
      - With V(another_path) it is the same storage by another path, which is added to the list. A place that is
        listed must be mounted on this machine too, as what is written by one path must be read by the other.
      - Where there is nothing to adopt, nothing is done.
      - An older version of the collection neither writes nor recovers in a repository that was adopted.
    type: str
    choices: [moved, copy, another_path]
"""
