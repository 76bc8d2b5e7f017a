# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  vm_uuid:
    description: Instance UUID of the virtual machine, under which the repository keeps it.
    type: str
  vm_name:
    description:
      - Name that the virtual machine had when it was last backed up.
      - Two machines of one name are an error that lists both.
    type: str
"""
