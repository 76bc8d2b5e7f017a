# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""EventManager: what happened to a VM, as far as a backup needs to know (reverts)."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from .. import soap
from ..model import Managed
from . import Context, method, service


@service("EventManager")
class EventManager(Managed):
    type = vim.event.EventManager

    def p_latestEvent(self) -> Any:
        events = self.simulator.events.events
        return events[-1] if events else None

    def p_maxCollector(self) -> int:
        return 32


@method("EventManager", "QueryEvents")
def query_events(context: Context, manager: Managed, filter: Any, eventViewSpec: Any) -> Any:
    found = []
    for event in context.simulator.events.events:
        if filter.entity is not None and event.vm.vm._moId != filter.entity.entity._moId:
            continue
        times = filter.time
        if times is not None and times.beginTime is not None and event.createdTime < times.beginTime:
            continue
        if times is not None and times.endTime is not None and event.createdTime > times.endTime:
            continue
        wanted = list(filter.eventTypeId)
        if wanted and getattr(event, "eventTypeId", type(event)._wsdlName) not in wanted:
            continue
        found.append(event)
    return soap.array(vim.event.Event, found[-(filter.maxCount or 1000) :])
