# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Resource pools and vApps: new machines in a vApp."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from ..inventory import ResourcePool, VirtualApp
from . import Context, folders, method


@method("ResourcePool", "CreateChildVM_Task", changing=True)
def create_child_vm(context: Context, pool: ResourcePool, config: Any, host: Any) -> Any:
    if not isinstance(pool, VirtualApp):
        raise vmodl.fault.NotSupported()
    try:
        make = folders.maker(context, pool.machines_folder, config, pool.ref, host)
    except vim.fault.DuplicateName as fault:  # of what a folder says to the same, this method declares less
        raise vim.fault.InvalidName(name=fault.name) from fault
    except vim.fault.InvalidState as fault:
        raise vmodl.fault.InvalidArgument(invalidProperty="host") from fault
    return context.simulator.tasks.start(context, context.method, pool, lambda task: make().ref)
