# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Variables that look as if a role took them, and that it does not know: a default counts in place of each."""

from __future__ import annotations

DOCUMENTATION = r"""
name: unknown_variables
short_description: Variables with the prefix of a role that the role does not know
version_added: 0.1.0
author: openvadp maintainers (@openvadp)
description:
  - Compares the names of all variables that begin with the role's name with the role's argument specs. Ansible
    itself looks at those that it knows only, so one that is misspelt is passed over and a default counts in its
    place.
options:
  _terms:
    description: The role's folder, as the magic variable C(role_path) has it.
    type: list
    elements: path
    required: true
  also:
    description: Names that are known besides those of the argument specs.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Refuse variables that the role does not know
  ansible.builtin.assert:
    that: unknown == ''
    fail_msg: "The role does not know these variables: {{ unknown }}."
  vars:
    unknown: "{{ lookup('openvadp.backup.unknown_variables', role_path) }}"
"""

RETURN = r"""
_raw:
  description: Each variable that is not known, with the one that it resembles.
  type: list
  elements: str
"""

import difflib
import os
from typing import Any, Iterable, List, Mapping, Optional

import yaml
from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase


class LookupModule(LookupBase):
    def run(self, terms: List[Any], variables: Optional[Mapping[str, Any]] = None, **kwargs: Any) -> List[str]:
        self.set_options(var_options=variables, direct=kwargs)
        found: List[str] = []
        for folder in terms:
            role = os.path.basename(str(folder).rstrip("/"))
            known = {*_specified(str(folder)), f"{role}_result", *self.get_option("also")}
            found += unknown(role, known, variables or {})
        return found


def unknown(role: str, known: Iterable[str], variables: Iterable[str]) -> List[str]:
    """What begins with the name of *role* and is not among *known*, sorted, with what it resembles."""
    strange = sorted(name for name in variables if name.startswith(f"{role}_") and name not in set(known))
    return [name + _resembling(name, sorted(known)) for name in strange]


def _resembling(name: str, known: List[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.8)
    return f" ({close[0]}?)" if close else ""


def _specified(folder: str) -> List[str]:
    path = os.path.join(folder, "meta", "argument_specs.yml")
    try:
        with open(path, encoding="utf-8") as text:
            specs = yaml.safe_load(text)["argument_specs"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise AnsibleError(f"The argument specs of a role can't be read: {path}: {error}") from None
    return [name for entry in specs.values() for name in entry.get("options") or {}]
