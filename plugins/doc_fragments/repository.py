# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  repository:
    description:
      - Folder of the repository on the machine that runs the module (the backup proxy).
      - The folder must exist. An empty one becomes a repository with the first backup that says C(create=true). A
        folder that holds anything else is refused.
    type: path
    required: true
"""
