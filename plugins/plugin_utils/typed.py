# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Values of variables that came as text, as surveys, environment variables and ``-e name=value`` send them.

Text that can't be read as the type that is wanted is refused: never guessed, since ``not 'false'`` is false.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping

import yaml
from ansible.errors import AnsibleFilterError
from ansible.module_utils.parsing.convert_bool import boolean


def to_boolean(value: Any) -> bool:
    """True or false from a boolean, or from a word that Ansible takes for one (yes, no, on, off, 1, 0, true, false).

    :raises AnsibleFilterError: it is neither.
    """
    try:
        return bool(boolean(value.strip() if isinstance(value, str) else value))
    except (TypeError, AttributeError):
        raise AnsibleFilterError(f"{value!r} is neither true nor false; write true or false.") from None


def to_list(value: Any) -> List[Any]:
    """A list from a list, from the JSON or YAML text of one, or from words between commas or on lines of their own.

    :returns: empty for None and empty text.
    :raises AnsibleFilterError: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return _list_of_text(value.strip())
    if isinstance(value, (bytes, Mapping, bool)) or not hasattr(value, "__iter__"):
        if isinstance(value, int) and not isinstance(value, bool):
            return [value]
        raise AnsibleFilterError(f"{value!r} is not a list.")
    return list(value)


def _list_of_text(text: str) -> List[Any]:
    if text.startswith("["):
        found = _parsed(text, "a list")
        if not isinstance(found, list):
            raise AnsibleFilterError(f"{text!r} is not a list.")
        return found
    return [word for word in (part.strip() for line in text.splitlines() for part in line.split(",")) if word]


def to_dictionary(value: Any) -> Dict[Any, Any]:
    """A dictionary from a dictionary, or from the JSON or YAML text of one.

    :returns: empty for None and empty text.
    :raises AnsibleFilterError: it is something else.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        value = _parsed(value, "a dictionary")
    if not isinstance(value, Mapping):
        raise AnsibleFilterError(f"{value!r} is not a dictionary.")
    return dict(value)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AnsibleFilterError(f"{text!r} is not {what}: {' '.join(str(error).split())}.") from None
