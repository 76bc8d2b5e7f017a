# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The table that ends a restore: one line a disk, the reasons below it."""

from __future__ import annotations

import shlex
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from ..plugin_utils.tables import NONE, Notes, disk_name, fold, format_bytes, format_speed, render, require_results

DOCUMENTATION = r"""
name: restore_table
short_description: Restored disks as a table for people
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Renders what module M(openvadp.backup.vadp_disk_restore) returns, or what role P(openvadp.backup.vm_restore#role)
    leaves in C(vm_restore_result).
  - Each disk is one line. Why it was written, or not, stands below the table, and after a restore with a safety point
    the command that brings back what the disks held before.
options:
  _input:
    description: Results of M(openvadp.backup.vadp_disk_restore), in the order of the table.
    type: list
    elements: dict
    required: true
extends_documentation_fragment:
  - openvadp.backup.table
"""

EXAMPLES = r"""
- name: Show what was restored
  openvadp.backup.show_lines:
    lines: "{{ [vm_restore_result] | openvadp.backup.restore_table }}"
"""

RETURN = r"""
_value:
  description: The table's lines, without line ends.
  type: list
  elements: str
"""

_HEADINGS = ["point", "disk", "target", "transport", "read", "written", "MiB/s", "verified"]
_RIGHT = {"read", "written", "MiB/s"}
_VERIFIED = {True: "yes", False: "no", None: NONE}


def restore_table(results: Sequence[Mapping[str, Any]], width: int = 140) -> List[str]:
    """The lines of the table.

    :param results: what module vadp_disk_restore returned, each with ``point`` and ``restored``; role
        vm_restore adds ``safety_point``.
    :param width: columns for the text below the table.
    """
    require_results(results, "restore_table", "module vadp_disk_restore returned")
    notes = Notes()
    rows = []
    for result in results:
        for disk in result.get("restored") or []:
            # An image file has a format, a disk of a virtual machine has a transport.
            by = disk.get("transport") or f"file ({disk.get('format') or NONE})"
            reasons = "; ".join(disk.get("transport_reasons") or [])
            rows.append(
                [
                    str(result.get("point") or NONE),
                    disk_name(disk),
                    f"{disk.get('target') or NONE}{notes.mark(disk.get('reason'))}",
                    f"{by}{notes.mark(reasons)}",
                    format_bytes(disk.get("bytes_read")),
                    format_bytes(disk.get("bytes_written")),
                    format_speed(disk.get("bytes_read"), disk.get("seconds")),
                    _VERIFIED[disk.get("verified")],
                ]
            )
    below = [line for result in results for line in _way_back(result.get("safety_point"), width)]
    return render(_HEADINGS, _RIGHT, rows) + notes.lines(width) + below


def _way_back(point: Optional[Mapping[str, Any]], width: int) -> List[str]:
    """What a safety point is, and the command that restores it, in one line to copy."""
    if not point:
        return []
    if point.get("state") == "planned":
        return fold(f"Restore point {point['point']} of {point['vm']} would be made first, as the way back.", width)
    # Without the name of a machine to write to it is the one that the point was made of.
    variables = {
        "repository": point["repository"],
        "vm_uuid": point["vm_uuid"],
        "point": point["point"],
        "target": "in_place",
        "vm_restore_overwrite": "true",
    }
    if point.get("proxy") not in (None, "localhost"):
        variables["vm_restore_proxy"] = point["proxy"]
    words = [f"-e {shlex.quote(f'{name}={value}')}" for name, value in variables.items()]
    said = f"Restore point {point['point']} holds what {point['vm']} held before. To go back, power it off and run:"
    return [*fold(said, width), f"  ansible-playbook openvadp.backup.restore {' '.join(words)}"]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"restore_table": restore_table}
