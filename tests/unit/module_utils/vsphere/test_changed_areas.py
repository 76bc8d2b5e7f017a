# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import PrivilegeError, VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import changed_areas
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.changed_areas import (
    ChangedAreasUnavailable,
    query_changed_areas,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyVmomi import vim

Info = vim.VirtualMachine.DiskChangeInfo
BLOCK = 65536


def page(start, length, *areas):
    extents = [Info.DiskChangeExtent(start=offset, length=size) for offset, size in areas]
    return Info(startOffset=start, length=length, changedArea=extents)


def query(session, vm, capacity=10 * BLOCK):
    snapshot = vim.vm.Snapshot("snapshot-1", session.stub)
    return list(query_changed_areas(session, vm, snapshot, 2000, capacity, "52 de/7"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=st.sets(st.integers(0, 40)), tail=st.integers(1, BLOCK), page_areas=st.integers(1, 5))
def test_every_area_of_every_page_arrives(session, stub, vm, changed, tail, page_areas):
    """A server with small pages, empty ones among them, and a disk that ends within a block."""
    capacity = 40 * BLOCK + tail

    def answer(_vm, _snapshot, _key, offset, _change_id):
        assert offset < capacity, "asked at the capacity"
        areas = [(block * BLOCK, BLOCK) for block in sorted(changed) if block * BLOCK >= offset][:page_areas]
        end = areas[-1][0] + BLOCK if len(areas) == page_areas else capacity
        if areas and areas[0][0] > offset:
            areas, end = [], areas[0][0]
        return page(offset, min(end, capacity) - offset, *areas)

    stub.methods["QueryChangedDiskAreas"] = answer
    expected = [(block * BLOCK, min(BLOCK, capacity - block * BLOCK)) for block in sorted(changed)]
    assert query(session, vm, capacity) == expected


def test_pages_go_on_from_where_the_last_ended(session, stub, vm):
    stub.methods["QueryChangedDiskAreas"] = [
        page(0, 4 * BLOCK, (0, BLOCK)),
        page(4 * BLOCK, 2 * BLOCK),
        page(6 * BLOCK, 4 * BLOCK, (9 * BLOCK, BLOCK)),
    ]
    assert query(session, vm) == [(0, BLOCK), (9 * BLOCK, BLOCK)]
    assert [args[2] for _name, _obj, args in stub.calls] == [0, 4 * BLOCK, 6 * BLOCK]


@pytest.mark.parametrize(
    "bad, message",
    [
        (page(4 * BLOCK, 0), "no progress"),
        (page(5 * BLOCK, 5 * BLOCK), "answered for offset"),
        (page(0, 10 * BLOCK), "answered for offset"),
        (page(4 * BLOCK, 7 * BLOCK), "past the disk"),
        (page(4 * BLOCK, 6 * BLOCK, (BLOCK, BLOCK)), "outside"),
        (page(4 * BLOCK, 2 * BLOCK, (8 * BLOCK, BLOCK)), "outside"),
        (page(4 * BLOCK, 6 * BLOCK, (5 * BLOCK, 0)), "outside"),
    ],
)
def test_a_contradiction_is_an_error(session, stub, vm, bad, message):
    stub.methods["QueryChangedDiskAreas"] = [page(0, 4 * BLOCK, (0, BLOCK)), bad]
    with pytest.raises(ChangedAreasUnavailable, match=message):
        query(session, vm)


def test_a_fault_is_unavailable_and_never_nothing(session, stub, vm):
    stub.methods["QueryChangedDiskAreas"] = [vim.fault.FileFault(msg="Error caused by file", file="[a] b.vmdk")]
    with pytest.raises(ChangedAreasUnavailable, match="FileFault") as caught:
        query(session, vm)
    assert caught.value.details["fault"] == "vim.fault.FileFault"


def test_privileges_and_lost_connections_are_not_a_reason_for_a_full_backup(session, stub, vm):
    stub.methods["QueryChangedDiskAreas"] = [vim.fault.NoPermission(privilegeId="VirtualMachine.Provisioning.X")]
    with pytest.raises(PrivilegeError):
        query(session, vm)
    stub.methods["QueryChangedDiskAreas"] = [ConnectionResetError("reset") for _number in range(100)]
    with pytest.raises(VsphereError) as caught:
        query(session, vm)
    assert not isinstance(caught.value, ChangedAreasUnavailable)


@pytest.mark.parametrize("kind", ["tiny pages", "no areas", "slow"])
def test_pages_without_an_end_are_no_answer(session, stub, vm, clock, kind):
    """A server that makes a little progress with each page, for ever or nearly so."""
    pages = 0

    def answer(_vm, _snapshot, _key, offset, _change_id):
        nonlocal pages
        pages += 1
        assert pages < 5000, "without an end"
        if kind == "slow":
            clock.now += 500
            return page(offset, 1 << 31)
        return page(offset, 512, *([(offset, 512)] if kind == "tiny pages" else []))

    stub.methods["QueryChangedDiskAreas"] = answer
    with pytest.raises(ChangedAreasUnavailable, match="no end|took more than"):
        query(session, vm, 62 << 40)


def test_more_areas_than_are_worth_it_are_no_answer(session, stub, vm, monkeypatch):
    monkeypatch.setattr(changed_areas, "_MOST_AREAS", 1000)
    stub.methods["QueryChangedDiskAreas"] = lambda _vm, _snapshot, _key, offset, _change_id: page(
        offset, 100 * BLOCK, *[(offset + block * BLOCK, BLOCK) for block in range(0, 100, 2)]
    )
    with pytest.raises(ChangedAreasUnavailable, match="no end"):
        query(session, vm, 10000 * BLOCK)
