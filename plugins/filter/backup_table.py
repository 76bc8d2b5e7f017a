# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The table that ends a backup: one line a disk, the reasons below it."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence

from ansible.errors import AnsibleFilterError

from ..plugin_utils.tables import NONE, Notes, Row, disk_name, fold, format_bytes, format_speed, render, require_results

DOCUMENTATION = r"""
name: backup_table
short_description: Backups of many virtual machines as a table for people
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Renders the facts C(vm_backup_result) that role P(openvadp.backup.vm_backup#role) leaves for each virtual machine.
  - Each disk is one line. Why a disk was read as it was, by this transport and by none before it, and why a virtual
    machine failed, stands below the table, and so does what could not be cleaned up. Virtual machines that failed come
    first, and the last line is the total.
options:
  _input:
    description: Results of role P(openvadp.backup.vm_backup#role), in the order of the table, but for failures.
    type: list
    elements: dict
    required: true
extends_documentation_fragment:
  - openvadp.backup.table
"""

EXAMPLES = r"""
- name: Show what was backed up
  openvadp.backup.show_lines:
    lines: "{{ ansible_play_hosts_all | map('extract', hostvars, 'vm_backup_result') | openvadp.backup.backup_table }}"
"""

RETURN = r"""
_value:
  description: The table's lines, without line ends.
  type: list
  elements: str
"""

_HEADINGS = ["VM", "point", "disk", "mode", "transport", "read", "stored", "MiB/s", "changed", "verified"]
_RIGHT = {"read", "stored", "MiB/s", "changed"}


def format_change_rate(disk: Mapping[str, Any]) -> str:
    """What part of the disk an incremental or differential had to read. A full has no change rate."""
    capacity = disk.get("capacity_bytes")
    if disk.get("mode") not in ("incremental", "differential") or not capacity or disk.get("bytes_read") is None:
        return NONE
    return f"{100.0 * disk['bytes_read'] / capacity:.1f} %"


def _names(result: Mapping[str, Any], disk: Mapping[str, Any]) -> Row:
    return [str(result.get("vm") or NONE), str(result.get("point") or NONE), disk_name(disk)]


def _disk_row(result: Mapping[str, Any], disk: Mapping[str, Any], notes: Notes) -> Row:
    if disk.get("skipped"):
        return _plain_row(result, disk, "skipped" + notes.mark(disk.get("skip_reason")))
    reasons = "; ".join([*(disk.get("transport_reasons") or []), *(disk.get("transport_notes") or [])])
    return [
        *_names(result, disk),
        f"{disk.get('mode') or NONE}{notes.mark(disk.get('reason'))}",
        f"{_transport(disk)}{notes.mark(reasons)}",
        format_bytes(disk.get("bytes_read")),
        format_bytes(disk.get("bytes_stored")),
        format_speed(disk.get("bytes_read"), disk.get("seconds")),
        format_change_rate(disk),
        str(disk.get("verified") or result.get("verified") or "no"),
    ]


def _transport(disk: Mapping[str, Any]) -> str:
    """The transport, and how it did it where that was not VDDK."""
    method = disk.get("method")
    return str(disk.get("transport") or NONE) + (f" ({method})" if method not in (None, "", "vddk") else "")


def _plain_row(result: Mapping[str, Any], disk: Mapping[str, Any], word: str) -> Row:
    row = _names(result, disk) + [word]
    return row + [NONE] * (len(_HEADINGS) - len(row))


_STATES = {
    "complete": [],
    "unchanged": ["the point was complete already"],
    "planned": ["check mode, nothing was touched"],
    "failed": [],
}


_NUMBERS = ("capacity_bytes", "bytes_read", "bytes_stored", "seconds")


def _readable(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result without the words that Ansible puts in place of numbers which are like the password."""
    disks = []
    for disk in result.get("disks") or []:
        strange = [name for name in _NUMBERS if isinstance(disk.get(name), str)]
        disks.append({**disk, **dict.fromkeys(strange)} if strange else disk)
    return {**result, "disks": disks}


def backup_table(results: Sequence[Mapping[str, Any]], width: int = 140) -> List[str]:
    """The lines of the table.

    :param results: ``vm_backup_result`` of each VM: ``vm``, ``state`` (complete, unchanged, planned, failed),
        ``point``, ``reason``, ``notes``, ``left``, ``verified``, and ``disks`` as module vadp_disk_export returns them.
    :param width: columns for the text below the table.
    """
    require_results(results, "backup_table", "role vm_backup leaves in vm_backup_result")
    results = [_readable(result) for result in results]
    notes = Notes()
    rows: List[Row] = []
    below: List[str] = []
    for result in _failures_first(results):
        state = str(result.get("state"))
        disks = result.get("disks") or []
        if state == "failed":
            reason = result.get("reason") or "no reason was recorded"
            rows.append(_plain_row(result, {}, "FAILED" + notes.mark(reason)))
        elif not disks:
            rows.append(_plain_row(result, {}, NONE))
        else:
            rows += [_disk_row(result, disk, notes) for disk in disks]
        said = _STATES[state] + [str(note) for note in result.get("notes") or []]
        if state != "failed":
            said += [f"NOT CLEANED UP: {text}" for text in result.get("left") or []]
        if said:
            text = f"{result.get('vm')}: {'; '.join(said)}"
            below += fold(text, width)
    return render(_HEADINGS, _RIGHT, [*rows, _total_row(results)]) + notes.lines(width) + below


def _failures_first(results: Sequence[Mapping[str, Any]]) -> List[Mapping[str, Any]]:
    for result in results:
        if str(result.get("state")) not in _STATES:
            raise AnsibleFilterError(
                f"backup_table knows the states {', '.join(_STATES)}; got {str(result.get('state'))!r}."
            )
    return sorted(results, key=lambda result: str(result.get("state")) != "failed")


def _total_row(results: Sequence[Mapping[str, Any]]) -> Row:
    """What was read and stored of all, and how many virtual machines failed. A point that was there counts nothing."""
    read = stored = 0
    for result in results:
        if result.get("state") == "complete":
            for disk in result.get("disks") or []:
                read += disk.get("bytes_read") or 0
                stored += disk.get("bytes_stored") or 0
    failed = sum(result.get("state") == "failed" for result in results)
    row = [
        "total",
        f"{len(results)} VM{'' if len(results) == 1 else 's'}",
        NONE,
        f"{failed} FAILED" if failed else "none failed",
        NONE,
    ]
    row += [format_bytes(read), format_bytes(stored)]
    return row + [NONE] * (len(_HEADINGS) - len(row))


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"backup_table": backup_table}
