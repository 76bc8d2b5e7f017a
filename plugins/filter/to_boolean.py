# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A boolean from a boolean or from text."""

from __future__ import annotations

from typing import Any, Callable, Dict

from ..plugin_utils.typed import to_boolean

DOCUMENTATION = r"""
name: to_boolean
short_description: A boolean from a boolean or from text
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Surveys, environment variables and C(-e name=value) send text, and every text that is not empty counts as true
    in a condition, V(false) too. This filter reads what Ansible takes for a boolean and refuses everything else.
options:
  _input:
    description: The value.
    type: raw
    required: true
"""

EXAMPLES = r"""
- name: Say it
  ansible.builtin.debug:
    msg: "{{ 'no' | openvadp.backup.to_boolean }}"
"""

RETURN = r"""
_value:
  description: The value as a boolean.
  type: bool
"""


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"to_boolean": to_boolean}
