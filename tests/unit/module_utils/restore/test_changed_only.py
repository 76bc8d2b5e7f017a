# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whether a virtual machine stands on a point, so that it can be asked what changed; and the sample (proofs 14)."""

from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.restore.changed_only import (
    Base,
    Changes,
    base_of,
    sample_of,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.vm_keys import VmKeys, id_key
from pyVmomi import vim

REPOSITORY, VM, DISK = "repository-1", "vm-1", "disk-1"


def content(number):
    return f"{number:032x}"


def point(number, parent=None, areas=1, key=2000):
    """A point whose disk has the content ID of that number, on another one."""
    entry = {
        "key": key,
        "uuid": DISK,
        "content_id": content(number),
        "parent_content_id": parent and content(parent),
        "areas": areas,
        "bytes_read": areas,
        "change_id": f"52/{number}",
    }
    return {"point": f"p{number}", "format": 2, "disks": [entry]}


def names(number, vm=VM, text=None):
    value = text or f"1:{vm}:{content(number)}"
    options = [("nvram", "x"), (id_key(REPOSITORY, DISK), value)]
    return VmKeys.of([vim.option.OptionValue(key=key, value=one) for key, one in options], VM)


def base(keys, wanted, points):
    manifest = next(one for one in points if one["point"] == wanted)
    found = base_of(keys, REPOSITORY, manifest, manifest["disks"][0], points)
    return found.manifest["point"] if isinstance(found, Base) else found


def test_the_point_itself_or_one_that_was_built_upon_it():
    points = [point(1), point(2, 1), point(3, 2), point(4)]
    assert [base(names(number), "p2", points) for number in (2, 3)] == ["p2", "p2"]
    # An ancestor of it, or another chain.
    for number in (1, 4):
        assert "is not built upon point p2" in base(names(number), "p2", points)


def test_a_point_on_which_nothing_changed_is_asked_from_the_one_that_is_named():
    points = [point(1), point(2, 1, areas=0), point(3, 2, areas=0), point(4, 3)]
    assert base(names(1), "p3", points) == "p1"
    assert base(names(2), "p3", points) == "p2"
    assert base(names(4), "p3", points) == "p3"
    assert "is not built upon point p4" in base(names(1), "p4", points)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (VmKeys.of(None, VM), "can't be read"),
        (names(0, text="2:x"), "can't be read"),
        (names(2, vm="vm-2"), "cloned from"),
        (VmKeys.of([vim.option.OptionValue(key="nvram", value="x")], VM), "names no restore point"),
        (names(9), "not in this repository"),
    ],
)
def test_what_is_not_named_is_written_as_a_whole(keys, words):
    assert words in base(keys, "p2", [point(1), point(2, 1)])


def test_a_point_without_ids_and_chains_that_go_in_a_circle():
    old = point(2)
    old["format"] = 1
    del old["disks"][0]["content_id"], old["disks"][0]["parent_content_id"]
    assert "no content ID" in base(names(2), "p2", [old])
    circle = [point(1, 2, areas=0), point(2, 1, areas=0), point(3)]
    assert "is not built upon" in base(names(3), "p1", circle)
    assert "is not built upon" in base(names(1), "p3", circle)


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [(32 << 20, 32 << 20), (1 << 30, 64 << 20), (100 << 30, 1 << 30), (62 << 40, 4 << 30)],
)
def test_the_sample_is_all_over_what_nobody_has_seen(capacity, expected):
    seen = Extents.of([(0, 1 << 20)])
    rest = Changes("disk-1", seen).unseen(capacity)
    sample = sample_of(rest, capacity)
    assert sample.intersect(seen).total_bytes == 0
    assert sample.total_bytes == min(expected, rest.total_bytes) - (expected - 65536 * (expected // 65536))
    if capacity > 1 << 30:
        assert sample.end > capacity // 2 and sample != sample_of(rest, capacity)
