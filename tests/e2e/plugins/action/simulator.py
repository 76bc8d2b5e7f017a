# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One op on the simulator's control socket as a task, for end-to-end tests that set the scene within a play."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "simulator"))

from client import Control  # noqa: E402


class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        with Control(os.environ["E2E_CONTROL"]) as control:
            return {"changed": True, "result": control.call(**self._task.args)}
