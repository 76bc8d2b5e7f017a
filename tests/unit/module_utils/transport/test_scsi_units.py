# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import Any, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.transport.scsi_units import (
    MAX_CONTROLLERS,
    SAFE_UNITS,
    can_add_controller,
    free_units,
    place,
    pvscsi_units,
)
from hypothesis import given
from hypothesis import strategies as st
from pyVmomi import vim

device = vim.vm.device
PVSCSI, LSI = device.ParaVirtualSCSIController, device.VirtualLsiLogicController


def controller(kind: Any, bus: int, **properties: Any) -> Any:
    return kind(**{"key": 1000 + bus, "busNumber": bus, "sharedBus": "noSharing", "hotAddRemove": True, **properties})


def disks(controller_key: int, units: Any) -> List[Any]:
    return [device.VirtualDisk(key=5000 + unit, controllerKey=controller_key, unitNumber=unit) for unit in units]


# A proxy: for each controller its kind, the unit that is its own, and the units that are taken.
controllers = st.lists(
    st.tuples(st.sampled_from([PVSCSI, LSI]), st.sampled_from([None, 7]), st.sets(st.integers(0, 63))), max_size=4
)


def hardware(described: List[Tuple[Any, Any, Any]]) -> List[Any]:
    found: List[Any] = [device.VirtualIDEController(key=200, busNumber=0)]
    for bus, (kind, own, taken) in enumerate(described):
        found.append(controller(kind, bus, scsiCtlrUnitNumber=own))
        found += disks(1000 + bus, sorted(taken - {7}))
    return found


@given(controllers, st.integers(0, 300), st.sampled_from([15, 16, 64]))
def test_every_place_is_free_there_and_given_once(described: Any, count: int, units: int) -> None:
    devices = hardware(described)
    taken = {(one.controllerKey, one.unitNumber) for one in devices}
    kinds = {one.key: type(one) for one in devices}
    placement = place(devices, count, units)
    limits = {
        1000 + bus: max(16, units) if kind is PVSCSI else 16 for bus, (kind, _own, _taken) in enumerate(described)
    }
    room = sum(
        limit - 1 - len(taken_here - {7} - set(range(limit, 64)))
        for (_k, _o, taken_here), limit in zip((one for one in described), limits.values())
    )
    buses = MAX_CONTROLLERS - len(described)
    assert free_units(devices, units) == room
    assert can_add_controller(devices) == (buses > 0)
    assert (placement is None) == (count > room + buses * (max(16, units) - 1))
    if placement is None:
        return
    assert len(placement.slots) == len(set(placement.slots)) == count
    assert not taken & {tuple(slot) for slot in placement.slots}
    added = {one.key: one.bus for one in placement.controllers}
    # A controller is added only when all that are there are full, and no more of them than are needed.
    assert bool(added) == (count > room) and all(
        any(slot.controller_key == key for slot in placement.slots) for key in added
    )
    assert not set(added.values()) & set(range(len(described)))
    for key, unit in placement.slots:
        assert unit != 7
        assert key in added if key < 0 else key in kinds
        assert unit < limits.get(key, max(16, units))


def test_pvscsi_is_preferred_and_then_any_other_controller_that_is_there() -> None:
    devices = [controller(LSI, 0), controller(PVSCSI, 1), *disks(1001, [0, 1, *range(3, 16)])]
    placement = place(devices, 2)
    assert placement is not None and placement.controllers == []
    assert placement.slots == [(1001, 2), (1000, 0)]
    # What only newer PVSCSI controllers have comes last of what is there.
    wide = place(devices, 17, 64)
    assert wide is not None and wide.controllers == [] and wide.slots[-1] == (1001, 16)


@pytest.mark.parametrize("properties", [{"sharedBus": "virtualSharing"}, {"hotAddRemove": False}])
def test_a_controller_that_takes_no_disk_now_is_passed_over(properties: Any) -> None:
    placement = place([controller(PVSCSI, 0, **properties)], 1)
    assert placement is not None
    assert placement.controllers == [(-1, 1)] and placement.slots == [(-1, 0)]


def test_limits_are_read_from_the_configuration_options() -> None:
    def option(kind: Any, most: int) -> Any:
        return kind(numSCSIDisks=vim.option.IntOption(min=0, max=most, defaultValue=0))

    def options(*found: Any) -> Any:
        return vim.vm.ConfigOption(hardwareOptions=vim.vm.VirtualHardwareOption(virtualDeviceOption=list(found)))

    wide = option(device.ParaVirtualSCSIControllerOption, 63)
    lsi = option(device.VirtualLsiLogicControllerOption, 32)
    assert pvscsi_units(options(lsi, wide)) == 64
    assert pvscsi_units(options(lsi)) == pvscsi_units(None) == SAFE_UNITS
    # "Fifteen disks" means the units 0 to 15 without the controller's own.
    assert pvscsi_units(options(option(device.ParaVirtualSCSIControllerOption, 15))) == SAFE_UNITS
