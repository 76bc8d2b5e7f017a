# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Booleans, lists and dictionaries out of text. The documentation of each filter is in the .yml file of its name."""

from __future__ import annotations

from typing import Any, Callable, Dict

from ..plugin_utils.typed import to_boolean, to_dictionary, to_list


class FilterModule:
    """The filters of this file."""

    def filters(self) -> Dict[str, Callable[..., Any]]:
        return {"to_boolean": to_boolean, "to_dictionary": to_dictionary, "to_list": to_list}
