# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
notes:
  - Print the lines with M(openvadp.backup.show_lines).
options:
  width:
    description: Columns that the text below the table is folded to.
    type: int
    default: 140
seealso:
  - plugin: openvadp.backup.show_lines
    plugin_type: module
"""
