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

    # restore_point_info says itself what its point means.
    POINT = r"""
options:
  point:
    description:
      - Which restore point of the virtual machine, by its name, as V(latest), or by a time.
      - V(latest) is the point that was made last, by the number that the repository gave to it, not by a clock. Where a
        server is connected it is the last one of that server. Otherwise, if points of several servers are there, one
        must be named; the same if two points have one number.
      - A time, such as V(2026-11-20T03:00Z), V(2026-11-20T03:00:00Z), V(2026-11-20T04:00+01:00) or V(before
        2026-11-20T03:00Z), is the point whose snapshot was taken last before it, by what the server's clock said then.
        The time zone must be stated. Servers count as for V(latest).
      - If any manifest of the virtual machine is damaged, nobody can tell which point is the latest. One must be
        named then.
    type: str
    default: latest
"""
