# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The tables that end a preflight: how each disk would be read, and all that is not as it should be."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from ..plugin_utils.tables import NONE, Notes, Row, disk_name, fold, format_bytes, render, require_results

DOCUMENTATION = r"""
name: preflight_table
short_description: What module vadp_preflight found as tables for people
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Renders results of M(openvadp.backup.vadp_preflight). One line a disk says how it would be read; why not otherwise
    stands below. Then comes each check that is not as it should be, with its remedy, the errors first.
  - What several machines have in common, such as a host's closed port, is said once.
options:
  _input:
    description: Results of M(openvadp.backup.vadp_preflight), in the order of the table.
    type: list
    elements: dict
    required: true
extends_documentation_fragment:
  - openvadp.backup.table
"""

EXAMPLES = r"""
- name: Show what was found
  openvadp.backup.show_lines:
    lines: "{{ [preflight] | openvadp.backup.preflight_table }}"
"""

RETURN = r"""
_value:
  description: The tables' lines, without line ends.
  type: list
  elements: str
"""

_HEADINGS = ["VM", "ready", "disk", "size", "transport"]
_RIGHT = {"size"}
_ORDER = ("error", "warning", "not_checked")

Finding = Tuple[str, str, str, str, str]


def _disk_row(vm: Mapping[str, Any], disk: Mapping[str, Any], notes: Notes) -> Row:
    row = [str(vm.get("vm") or NONE), "yes" if vm.get("ready") else "NO", disk_name(disk)]
    row.append(format_bytes(disk.get("capacity_bytes")))
    if not disk.get("included", True):
        return row + ["not in the backup" + notes.mark(disk.get("skip_reason"))]
    reasons = []
    for candidate in disk.get("candidates") or []:
        if candidate.get("transport") == disk.get("transport"):
            break
        if candidate.get("reasons"):
            reasons.append(f"{candidate['transport']}: {'; '.join(candidate['reasons'])}")
    transport = str(disk.get("transport") or "NONE")
    if disk.get("method") and disk["method"] != "vddk":
        transport += f" ({disk['method']})"
    return row + [transport + notes.mark(" | ".join(reasons))]


def _findings(results: Sequence[Mapping[str, Any]]) -> List[Finding]:
    """Each once, the errors first, else in their order."""
    found: Dict[Finding, None] = {}
    for result in results:
        own = [check for vm in result.get("vms") or [] for check in vm.get("checks") or []]
        for check in list(result.get("checks") or []) + own:
            keys = ("severity", "code", "subject", "evidence", "remedy")
            finding: Finding = tuple(str(check.get(key) or "") for key in keys)  # type: ignore[assignment]
            if finding[0] in _ORDER:
                found[finding] = None
    return sorted(found, key=lambda finding: _ORDER.index(finding[0]))


def preflight_table(results: Sequence[Mapping[str, Any]], width: int = 140) -> List[str]:
    """The lines of both tables.

    :param results: of module vadp_preflight; one that failed has ``msg`` and, from playbook preflight.yml, ``vm``.
    :param width: columns for the text below the tables.
    """
    require_results(results, "preflight_table", "module vadp_preflight returned")
    notes = Notes()
    rows: List[Row] = []
    for result in results:
        if "vms" not in result:
            reason = str(result.get("msg") or "no reason was recorded")
            rows.append([str(result.get("vm") or NONE), "NO", NONE, NONE, "FAILED" + notes.mark(reason)])
        for vm in result.get("vms") or []:
            disks = vm.get("disks") or []
            rows += [_disk_row(vm, disk, notes) for disk in disks]
            if not disks:
                rows.append([str(vm.get("vm") or NONE), "yes" if vm.get("ready") else "NO", NONE, NONE, NONE])
    lines = render(_HEADINGS, _RIGHT, rows) + notes.lines(width)
    findings = _findings(results)
    if not findings:
        return lines + ["", "Nothing else was found that should be otherwise."]
    lines.append("")
    for severity, code, subject, evidence, remedy in findings:
        lines += fold(f"{severity.upper().replace('_', ' ')} {code}, {subject}: {evidence}", width)
        if remedy:
            lines += fold(remedy, width, "  -> ", "     ")
    return lines


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"preflight_table": preflight_table}
