# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A dictionary from a dictionary or from text."""

from __future__ import annotations

from typing import Any, Callable, Dict

from ..plugin_utils.typed import to_dictionary

DOCUMENTATION = r"""
name: to_dictionary
short_description: A dictionary from a dictionary or from text
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Surveys, environment variables and C(-e name=value) send text. This filter reads a dictionary from the JSON or
    YAML text of one. Empty text is an empty dictionary.
options:
  _input:
    description: The value.
    type: raw
    required: true
"""

EXAMPLES = r"""
- name: Say it
  ansible.builtin.debug:
    msg: "{{ '{\"VM Network\": \"restore\"}' | openvadp.backup.to_dictionary }}"
"""

RETURN = r"""
_value:
  description: The value as a dictionary.
  type: dict
"""


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"to_dictionary": to_dictionary}
