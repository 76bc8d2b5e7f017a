# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A list from a list or from text."""

from __future__ import annotations

from typing import Any, Callable, Dict

from ..plugin_utils.typed import to_list

DOCUMENTATION = r"""
name: to_list
short_description: A list from a list or from text
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Surveys, environment variables and C(-e name=value) send text. This filter reads a list from the JSON or YAML
    text of one, and from words between commas or on lines of their own. Empty text is an empty list.
options:
  _input:
    description: The value.
    type: raw
    required: true
"""

EXAMPLES = r"""
- name: Say it
  ansible.builtin.debug:
    msg: "{{ 'hotadd, nbdssl' | openvadp.backup.to_list }}"
"""

RETURN = r"""
_value:
  description: The value as a list.
  type: list
"""


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"to_list": to_list}
