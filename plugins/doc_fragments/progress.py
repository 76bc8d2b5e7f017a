# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  progress_file:
    description:
      - File to which the progress of each disk is appended as JSON lines.
      - The action plugin of this module sets it, and shows the progress on the controller's screen.
    type: path
  lease:
    description:
      - Who waits for this module. It ends when nobody does any longer, and leaves what a failed one leaves.
      - The action plugin of this module sets it. A task with C(async) of its own goes on without a controller.
    type: dict
    suboptions:
      processes:
        description: Processes of this machine that must live, each as V(<pid>:<start time>).
        type: list
        elements: str
        default: []
      file:
        description: A file that must be there.
        type: path
      seconds:
        description: The file must be touched at least so often.
        type: int
"""
