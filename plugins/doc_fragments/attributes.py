# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in C(check_mode) and report what would change without changing anything.
  diff_mode:
    description: Returns what has changed, or would change in C(check_mode), when in C(--diff) mode.
  idempotent:
    description: A second run with the same options changes nothing and says so.
"""

    ACTIONGROUP_VADP = r"""
attributes:
  action_group:
    description: Use C(group/openvadp.backup.vadp) in C(module_defaults) to set the connection for all modules at once.
    support: full
    membership:
      - openvadp.backup.vadp
"""
