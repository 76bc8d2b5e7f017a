# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""QueryChangedDiskAreas (VADP facts 1 to 9)."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from .. import storage
from ..inventory import VirtualMachine, datastore_of, disks_in
from . import Context, find_object, method

CBT_BLOCK = 64 << 10


def _clip(areas: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    return [
        (max(offset, start), min(offset + length, end) - max(offset, start))
        for offset, length in areas
        if offset < end and offset + length > start
    ]


@method("VirtualMachine", "QueryChangedDiskAreas")
def query_changed_disk_areas(
    context: Context, vm: VirtualMachine, snapshot: Any, deviceKey: int, startOffset: int, changeId: str
) -> Any:
    simulator = context.simulator
    if snapshot is None:
        # Without a snapshot there is nothing frozen that the answer could be about.
        raise vmodl.fault.InvalidArgument(invalidProperty="snapshot")
    found: Any = find_object(context, snapshot._moId, "VirtualMachineSnapshot")
    if found.of_vm is not vm:
        raise vmodl.fault.InvalidArgument(invalidProperty="snapshot")
    device = next((one for one in disks_in(found.record.config.hardware.device) if one.key == deviceKey), None)
    if device is None:
        raise vmodl.fault.InvalidArgument(invalidProperty="deviceKey")
    capacity, path = device.capacityInBytes, device.backing.fileName
    if not 0 <= startOffset < capacity:
        raise vmodl.fault.InvalidArgument(invalidProperty="startOffset")
    try:
        with vm.lock:  # the paths stay meanwhile
            path = device.backing.fileName
            if changeId == "*":
                kind = simulator.inventory.datastore(datastore_of(path), vm).kind
                if kind != "VMFS" or device.backing.changeId is None:
                    raise vim.fault.FileFault(file=path, msg=f"Error caused by file {path}")
                areas = simulator.storage.allocated(path, 0, capacity, CBT_BLOCK)
            else:
                areas = list(simulator.storage.changed_areas(path, snapshot._moId, changeId))
    except storage.StorageError as error:
        raise vim.fault.FileFault(file=path, msg=f"Error caused by file {path}: {error}") from None
    limit = simulator.settings.page_bytes
    end = capacity if limit is None else min(capacity, startOffset + limit)
    page = _clip(areas, startOffset, end)
    if len(page) >= simulator.settings.page_areas:
        # A page that is full ends with its last area, whether more follow or not (VADP facts 1).
        page = page[: simulator.settings.page_areas]
        end = page[-1][0] + page[-1][1]
    return vim.VirtualMachine.DiskChangeInfo(
        startOffset=startOffset,
        length=end - startOffset,
        changedArea=[
            vim.VirtualMachine.DiskChangeInfo.DiskChangeExtent(start=offset, length=length) for offset, length in page
        ],
    )
