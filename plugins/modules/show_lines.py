# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: show_lines
short_description: Print lines on the controller's screen
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Prints text for people as it is, without the quotes and escapes of M(ansible.builtin.debug). Only control and
    bidirectional characters stand as escapes, so that a name can't move the cursor.
  - It runs on the controller and needs no connection.
options:
  lines:
    description: What to print.
    type: list
    elements: str
    default: []
  warnings:
    description: What to warn of, as modules do.
    type: list
    elements: str
    default: []
extends_documentation_fragment:
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: Lines are printed in check mode too.
  diff_mode:
    support: none
  idempotent:
    support: full
seealso:
  - plugin: openvadp.backup.backup_table
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Show what was backed up
  openvadp.backup.show_lines:
    lines: "{{ [hostvars['app01'].vm_backup_result] | openvadp.backup.backup_table }}"
"""

RETURN = r"""#"""
