# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  targets:
    description: The hosts to prove.
    type: list
    elements: dict
    required: true
    suboptions:
      host:
        description: Name of the host as vCenter has it.
        type: str
        required: true
      address:
        description: Address of its backup NIC. Names are not taken, as a name may lead to another NIC.
        type: str
        required: true
  nfc_port:
    description: Port on which ESXi hosts serve disk data (NFC).
    type: int
    default: 902
"""
