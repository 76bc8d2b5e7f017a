# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The table that ends a verification: one line a disk, below it what is wrong, and how the point booted."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence

from ..plugin_utils.tables import NONE, disk_name, fold, format_bytes, format_speed, render, require_results

DOCUMENTATION = r"""
name: verify_table
short_description: Verified restore points as a table for people
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Renders what module M(openvadp.backup.restore_point_verify) returns.
  - Each disk is one line. What is wrong stands below the table, and with level V(boot) how the point booted, with the
    paths of the screenshot and of the log.
options:
  _input:
    description: Results of M(openvadp.backup.restore_point_verify), in the order of the table.
    type: list
    elements: dict
    required: true
extends_documentation_fragment:
  - openvadp.backup.table
"""

EXAMPLES = r"""
- name: Show what was verified
  openvadp.backup.show_lines:
    lines: "{{ [verified] | openvadp.backup.verify_table }}"
"""

RETURN = r"""
_value:
  description: The table's lines, without line ends.
  type: list
  elements: str
"""

_HEADINGS = ["VM", "point", "disk", "level", "layers", "verified", "MiB/s", "state"]
_RIGHT = {"layers", "verified", "MiB/s"}
_BOOTED = {True: "booted", False: "DID NOT BOOT", None: "not booted"}


def verify_table(results: Sequence[Mapping[str, Any]], width: int = 140) -> List[str]:
    """The lines of the table.

    :param results: what module restore_point_verify returned.
    :param width: columns for the text below the table.
    """
    require_results(results, "verify_table", "module restore_point_verify returned")
    rows = []
    below: List[str] = []
    for result in results:
        name = str(result.get("vm_name") or result.get("vm_uuid") or NONE)
        point = str(result.get("point") or NONE)
        for disk in result.get("disks") or []:
            rows.append(
                [
                    name,
                    point,
                    disk_name(disk),
                    str(result.get("level") or NONE),
                    str(disk.get("layers", NONE)),
                    format_bytes(disk.get("bytes_verified")),
                    format_speed(disk.get("bytes_verified"), disk.get("seconds")),
                    "sound" if disk.get("ok") else "DAMAGED",
                ]
            )
            for problem in disk.get("problems") or []:
                below += fold(f"wrong: {disk_name(disk)}: {problem}", width)
        boot = result.get("boot")
        for problem in result.get("problems") or []:
            # How it did not boot is shown below.
            if not (isinstance(boot, Mapping) and problem.startswith("it did not boot")):
                below += fold(f"wrong: {point}: {problem}", width)
        if isinstance(boot, Mapping):
            below += _boot_lines(boot, point, width)
    return render(_HEADINGS, _RIGHT, rows) + below


def _boot_lines(boot: Mapping[str, Any], point: str, width: int) -> List[str]:
    """How a point booted."""
    seconds = f" after {boot['seconds']:.1f} s" if boot.get("seconds") else ""
    lines = fold(f"{point} {_BOOTED[boot.get('booted')]}{seconds}: {boot.get('reason')}", width)
    buses = ", ".join(f"{disk.get('key')} on {disk.get('bus')}" for disk in boot.get("disks") or [])
    by = f"{boot.get('accelerator')} ({boot.get('accelerator_reason')})"
    lines += fold(f"guest: {boot.get('firmware')}, {boot.get('memory_mb')} MiB, {buses}, by {by}", width)
    for note in boot.get("notes") or []:
        lines += fold(f"note: {note}", width)
    # Paths are not folded: they are there to be copied.
    for what, key in (("screenshot", "screenshot"), ("serial log", "serial_log")):
        if boot.get(key):
            lines.append(f"{what}: {boot[key]}")
    return lines


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"verify_table": verify_table}
