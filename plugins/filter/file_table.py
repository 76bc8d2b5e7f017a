# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The table that ends a restore of files: one line a file, what was skipped below it."""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from ..module_utils.shown import shown as printable
from ..plugin_utils.tables import NONE, fold, format_bytes, render, require_results

DOCUMENTATION = r"""
name: file_table
short_description: Restored files as a table for people
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Renders what module M(openvadp.backup.vadp_file_restore) returns, or what role
    P(openvadp.backup.vm_file_restore#role) leaves in C(vm_file_restore_result).
  - Each file is one line; with option C(versions) each version of one, with the points that hold it.
  - What was skipped stands below the table, and so does what option C(query) made of the list, as JSON, where that is
    no file.
options:
  _input:
    description: Results of M(openvadp.backup.vadp_file_restore), in the order of the table.
    type: list
    elements: dict
    required: true
  most:
    description: Most files that are shown of each result; the others are counted.
    type: int
    default: 40
extends_documentation_fragment:
  - openvadp.backup.table
"""

EXAMPLES = r"""
- name: Show what was restored
  openvadp.backup.show_lines:
    lines: "{{ [vm_file_restore_result] | openvadp.backup.file_table }}"
"""

RETURN = r"""
_value:
  description: The table's lines, without line ends.
  type: list
  elements: str
"""

_HEADINGS = ["point", "volume", "file", "size", "changed", "sha256", "state"]
_SHOWN_DIGITS = 12


def file_table(results: Sequence[Mapping[str, Any]], most: int = 40, width: int = 140) -> List[str]:
    """The lines of the table.

    :param results: what module vadp_file_restore returned, each with ``point``, ``files`` and ``skipped_files``.
    :param most: files shown of each.
    :param width: columns for the text below the table.
    """
    require_results(results, "file_table", "module vadp_file_restore returned")
    rows = []
    below: List[str] = []
    for result in results:
        files, others = _told(result.get("files"))
        for file in files[:most]:
            rows.append(
                [
                    _points(result, file),
                    str(file.get("volume") or NONE),
                    _path(file),
                    format_bytes(file.get("size")) if file.get("type") == "file" else NONE,
                    str(file.get("mtime") or NONE),
                    str(file.get("sha256") or NONE)[:_SHOWN_DIGITS],
                    str(file.get("state") or NONE),
                ]
            )
        below += [printable(json.dumps(one, ensure_ascii=False)) for one in others[:most]]
        more = sum(max(0, len(shown) - most) for shown in (files, others))
        if more:
            below.append(f"and {more} more")
        for skipped in (result.get("skipped_files") or [])[:most]:
            place = f"{skipped.get('volume')}" + (f" at {skipped['point']}" if skipped.get("point") else "")
            below += fold(f"skipped: {skipped.get('path')} on {place}: {skipped.get('reason')}", width)
        for one in result.get("points") or []:
            if one.get("problem"):
                below += fold(f"not searched: {one.get('point')}: {one['problem']}", width)
    return render(_HEADINGS, {"size"}, rows) + below


def _told(found: Any) -> Tuple[List[Mapping[str, Any]], List[Any]]:
    """Files, and what else a query made of them: anything."""
    if found is None:
        return [], []
    files: List[Mapping[str, Any]] = []
    others: List[Any] = []
    for one in found if isinstance(found, list) else [found]:
        (files if isinstance(one, Mapping) and "path" in one else others).append(one)
    return files, others


def _path(file: Mapping[str, Any]) -> str:
    path = str(file.get("dest") or file["path"])
    return path.rstrip("/") + "/" if file.get("type") == "directory" else path


def _points(result: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    """The point of a file, or the first and last that hold a version; how many if others lie between."""
    held = file.get("points")
    if not held:
        return str(result.get("point") or NONE)
    if len(held) == 1:
        return str(held[0])
    return f"{held[0]} .. {held[-1]} ({len(held)})"


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"file_table": file_table}
