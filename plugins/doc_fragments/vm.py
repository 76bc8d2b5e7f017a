# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  name:
    description:
      - Name of the virtual machine. Two machines of one name are an error that lists both.
      - Exactly one of O(name), O(uuid) and O(moid) is required.
    type: str
  uuid:
    description: BIOS UUID of the virtual machine, or its instance UUID with O(use_instance_uuid=true).
    type: str
  use_instance_uuid:
    description: Whether O(uuid) is the instance UUID, which vCenter keeps unique.
    type: bool
    default: false
  moid:
    description: Managed object id of the virtual machine, such as V(vm-16).
    type: str
  folder:
    description:
      - Inventory folder that the virtual machine must lie in, such as V(/DC0/vm/production), or the last parts of it.
      - A slash in a folder's name is written as C(%2f), as vCenter's API shows it.
      - It narrows O(name).
    type: str
  datacenter:
    description: Name of the datacenter that the virtual machine must lie in.
    type: str
"""
