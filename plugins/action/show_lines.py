# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Text for people on the controller's screen: no quotes; escapes only for what would not stay in its line."""

from __future__ import annotations

from typing import Any, Dict, Optional

from ansible import constants as C
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ..module_utils.shown import shown

display = Display()


class ActionModule(ActionBase):
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: Optional[str] = None, task_vars: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        result = super().run(tmp, task_vars)
        del tmp
        dummy, arguments = self.validate_argument_spec(
            argument_spec={
                "lines": {"type": "list", "elements": "str", "default": []},
                "warnings": {"type": "list", "elements": "str", "default": []},
            }
        )
        # A callback that prints JSON owns stdout; the lines go beside it then.
        callback = str(C.DEFAULT_STDOUT_CALLBACK)  # type: ignore[attr-defined]
        machine_readable = callback.rsplit(".", 1)[-1] in ("json", "jsonl")
        for line in arguments["lines"]:
            display.display(shown(line), stderr=machine_readable)
        if arguments["warnings"]:
            result["warnings"] = [shown(warning) for warning in arguments["warnings"]]
        result["changed"] = False
        return result
