# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""TaskManager and Task."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from .. import soap
from ..model import Managed
from ..services import Task
from . import Context, method, service


@service("TaskManager")
class TaskManager(Managed):
    type = vim.TaskManager

    def p_recentTask(self) -> Any:
        return soap.array(vim.Task, [task.ref for task in self.simulator.tasks.tasks.values()][-20:])

    def p_description(self) -> Any:
        return vim.TaskDescription()

    def p_maxCollector(self) -> int:
        return 32


@method("Task", "CancelTask")
def cancel(context: Context, task: Task) -> None:
    if task.done.is_set():
        raise vim.fault.InvalidState()
    if not task.cancelable:
        raise vmodl.fault.NotSupported()
    task.cancelled.set()
