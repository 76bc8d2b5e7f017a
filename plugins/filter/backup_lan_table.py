# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The table that ends playbook backup_lan.yml: one line a host and proxy, the reasons below it."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence

from ansible.errors import AnsibleFilterError

from ..plugin_utils.tables import NONE, Notes, Row, fold, render, require_results

DOCUMENTATION = r"""
name: backup_lan_table
short_description: A backup LAN and its proof as a table for people
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Renders the facts C(backup_lan_result) that role P(openvadp.backup.backup_lan#role) leaves for each proxy.
  - Each host is one line. What was not proved, why, and what to do about it, stands below the table.
options:
  _input:
    description: Results of role P(openvadp.backup.backup_lan#role), in the order of the table.
    type: list
    elements: dict
    required: true
extends_documentation_fragment:
  - openvadp.backup.table
"""

EXAMPLES = r"""
- name: Show the backup LAN
  openvadp.backup.show_lines:
    lines: "{{ [backup_lan_result] | openvadp.backup.backup_lan_table }}"
"""

RETURN = r"""
_value:
  description: The table's lines, without line ends.
  type: list
  elements: str
"""

_HEADINGS = ["host", "NIC", "address", "MTU", "port group", "state", "reached from", "MTU proved"]
_STATES = ("proven", "configured", "planned", "failed")


def _state(nic: Mapping[str, Any], result: Mapping[str, Any], notes: Notes) -> str:
    if nic.get("failed"):
        return "FAILED" + notes.mark(nic.get("msg") or "no reason was recorded")
    if not nic.get("changed"):
        return "unchanged"
    return "planned" if result.get("state") == "planned" else "changed"


def _reached(result: Mapping[str, Any], target: Mapping[str, Any], notes: Notes) -> str:
    if not target:
        return NONE
    words = str(target.get("source_address") or result.get("proxy") or "yes")
    bad = not target.get("reached") or target.get("cause") == "wrong_interface"
    return "NO" + notes.mark(_why(target)) if bad else words


def _mtu(target: Mapping[str, Any], notes: Notes) -> str:
    mtu = target.get("mtu") or {}
    if not target.get("reached") or mtu.get("asked") is None:
        return NONE
    if mtu.get("ok"):
        return str(mtu["asked"])
    if mtu.get("ok") is None:
        return "?" + notes.mark(mtu.get("reason"))
    return "NO" + notes.mark(_why(target) if str(target.get("cause")).startswith("mtu_") else mtu.get("reason"))


def _why(target: Mapping[str, Any]) -> str:
    return ". ".join(text.rstrip(". ") for text in (target.get("reason"), target.get("remedy")) if text) + "."


def _row(result: Mapping[str, Any], nic: Mapping[str, Any], target: Mapping[str, Any], notes: Notes) -> Row:
    def said(name: str) -> str:
        return NONE if nic.get(name) is None else str(nic[name])

    return [
        str(nic.get("host") or target.get("host") or NONE),
        said("device"),
        str(nic.get("ip") or target.get("address") or NONE),
        said("mtu"),
        said("portgroup"),
        _state(nic, result, notes) if nic else NONE,
        _reached(result, target, notes),
        _mtu(target, notes),
    ]


def _rows(result: Mapping[str, Any], notes: Notes) -> List[Row]:
    targets = {target.get("host"): target for target in result.get("targets") or []}
    nics = {nic.get("host"): nic for nic in result.get("hosts") or []}
    return [_row(result, nics.get(host, {}), targets.get(host, {}), notes) for host in {**nics, **targets}]


def _below(result: Mapping[str, Any]) -> List[str]:
    said: List[str] = []
    interface = result.get("interface") or {}
    if interface.get("name"):
        what = "changed" if interface.get("changed") else "unchanged"
        said.append(f"{interface['name']} with {interface.get('address')} in {interface.get('file')}, {what}")
    pool = result.get("pool") or {}
    if pool:
        limit = pool.get("limit")
        said.append(
            f"{result.get('dvswitch')}: backup traffic has {pool.get('shares')} shares ({pool.get('level')}), "
            f"{'no limit' if limit in (None, -1) else f'a limit of {limit} Mbit/s'}, "
            f"{pool.get('reservation') or 0} Mbit/s reserved"
        )
    for item in result.get("opens") or []:
        shown = f"vCenter hands out {item.get('address')}, as an open through VDDK shows"
        said.append(f"{item.get('host')}: {shown if item.get('proven') else _why(item)}")
    if result.get("state") == "planned":
        said.append("check mode, nothing was touched or proved")
    if result.get("state") == "configured":
        said.append("not proved, as backup_lan_probe is false")
    said += [str(note) for note in result.get("notes") or []]
    if result.get("state") == "failed":
        said.append(f"FAILED: {result.get('reason') or 'no reason was recorded'}")
    return said


def backup_lan_table(results: Sequence[Mapping[str, Any]], width: int = 140) -> List[str]:
    """The lines of the table.

    :param results: ``backup_lan_result`` of each proxy: ``proxy``, ``state`` (proven, configured, planned, failed),
        ``hosts`` (of vmkernel_backup_nic), ``targets`` (of backup_lan_probe),
        ``opens`` (of backup_lan_vddk_probe), ``interface``, ``pool``, ``notes``,
        ``reason``.
    :param width: columns for the text below the table.
    """
    require_results(results, "backup_lan_table", "role backup_lan leaves in backup_lan_result")
    notes = Notes()
    rows: List[Row] = []
    below: List[str] = []
    for result in results:
        state = str(result.get("state"))
        if state not in _STATES:
            raise AnsibleFilterError(f"backup_lan_table knows the states {', '.join(_STATES)}; got {state!r}.")
        rows += _rows(result, notes)
        for said in _below(result):
            below += fold(f"{result.get('proxy')}: {said}", width)
    return (render(_HEADINGS, {"MTU"}, rows) if rows else []) + notes.lines(width) + below


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"backup_lan_table": backup_lan_table}
