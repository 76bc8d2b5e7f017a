# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  lock_timeout:
    description:
      - Seconds to wait for the lock of the virtual machine, which somebody else may hold for a moment, such as a second
        run that looks whether it may begin.
      - Where another run is at work on the virtual machine, it is not waited for, and the module fails at once.
    type: int
    default: 60
"""
