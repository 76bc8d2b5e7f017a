# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is written into a virtual machine, and whose folder a point belongs into (proofs 16 to 22)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup.naming import (
    Naming,
    is_current_or_ancestor,
    names_elsewhere,
    require_own_folder,
    wanted_keys,
)
from ansible_collections.openvadp.backup.plugins.module_utils.errors import RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.vm_keys import VmKeys, id_key, id_value
from pyVmomi import vim

VM = "500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"
REPOSITORY = "7f6d1c52-3a8e-4a51-9b56-0c1d2e3f4a5b"
DISKS = {2000: "6000C29a-1111-2222-3333-444455556666", 2001: "6000C29a-1111-2222-3333-444455557777"}
A, B = "a" * 32, "b" * 32


def keys(**settings: str) -> VmKeys:
    """:param settings: ``k2000``: the content ID that is named for that disk."""
    options = [vim.option.OptionValue(key="svga.present", value="TRUE")]
    for name, content_id in settings.items():
        key = id_key(REPOSITORY, DISKS[int(name[1:])])
        options.append(vim.option.OptionValue(key=key, value=id_value(VM, content_id)))
    return VmKeys.of(options, VM)


def entry(key: int, content_id: str, parent: Optional[str] = None, areas: int = 1, **more: Any) -> Dict[str, Any]:
    found = {"key": key, "uuid": DISKS[key], "content_id": content_id, "parent_content_id": parent, "areas": areas}
    return {**found, "bytes_read": areas, "named_in_vm": True, **more}


def manifest(*disks: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    return {"repository_id": REPOSITORY, "vm_uuid": VM, "disks": list(disks), **more}


@pytest.mark.parametrize(
    "disks, before, written",
    [
        ([entry(2000, B)], keys(), [2000]),
        ([entry(2000, B, A)], keys(k2000=A), [2000]),
        ([entry(2000, B, A)], keys(k2000=B), []),
        # Nothing changed since the point that is named: no reconfiguration for that.
        ([entry(2000, B, A, 0)], keys(k2000=A), []),
        ([entry(2000, B, A, 0)], keys(), [2000]),
        ([entry(2000, B, A, 0)], keys(k2000="c" * 32), [2000]),
        # A full that found nothing but zeros is no copy of anything.
        ([entry(2000, B, None, 0)], keys(k2000=A), [2000]),
        # One that has to be written takes the others along.
        ([entry(2000, B, A, 0), entry(2001, A)], keys(k2000=A), [2000, 2001]),
        ([entry(2000, B, named_in_vm=False)], keys(), []),
        ([entry(2000, B, uuid=None)], keys(), []),
    ],
)
def test_what_is_written(disks: List[Dict[str, Any]], before: VmKeys, written: List[int]) -> None:
    wanted = {id_key(REPOSITORY, DISKS[key]) for key in written}
    assert set(wanted_keys(manifest(*disks), before)) == wanted


def tree(current: Optional[str]) -> Any:
    """s1 <- s2 <- s3, and s1 <- side."""

    def node(name: str, *children: Any) -> Any:
        snapshot = vim.vm.Snapshot(name)
        made = SimpleNamespace(snapshot=snapshot, name=name, description="", quiesced=False, childSnapshotList=children)
        made.createTime = __import__("datetime").datetime(2026, 11, 22, 8, int(name[1]) if name[1].isdigit() else 9)
        return made

    root = node("s1", node("s2", node("s3")), node("side"))
    return SimpleNamespace(
        rootSnapshotList=[root], currentSnapshot=None if current is None else vim.vm.Snapshot(current)
    )


@pytest.mark.parametrize(
    "current, moid, proved",
    [("s3", "s3", True), ("s3", "s1", True), ("s2", "s3", False), ("side", "s2", False), ("s3", "gone", False),
     (None, "s1", False), ("gone", "s1", False)],
)  # fmt: skip
def test_only_while_the_machine_stands_on_the_snapshot(current: Optional[str], moid: str, proved: bool) -> None:
    assert is_current_or_ancestor(tree(current), moid) is proved
    # A moid may be used again.
    assert is_current_or_ancestor(tree(current), moid, "2026-01-01T00:00:00Z") is False
    assert is_current_or_ancestor(None, moid) is False


HERE, THERE = "server-1", "server-2"


def own(points: List[Dict[str, Any]], server: str, found: VmKeys, uuids: Dict[int, str]) -> None:
    disks: Any = [SimpleNamespace(key=key, uuid=uuid) for key, uuid in uuids.items()]
    store: Any = SimpleNamespace(uuid=VM, repository=SimpleNamespace(id=REPOSITORY))
    vm: Any = SimpleNamespace(name="app02", moid="vm-9", instance_uuid=VM)
    require_own_folder(store, points, vm, Naming(server, found, True), disks)


def test_a_second_server_s_machine_has_to_be_the_same_one() -> None:
    point = manifest(entry(2000, A), server_uuid=HERE, vm_name="app01", vm_moid="vm-1", point="p1")
    other = {2000: "6000C29b-9999-2222-3333-444455556666"}
    own([], THERE, keys(), other)
    own([point], HERE, keys(), other)
    # A replica has the disks of its original, or names a point of it.
    own([point], THERE, keys(), {2003: DISKS[2000].upper()})
    named = VmKeys.of([vim.option.OptionValue(key=id_key(REPOSITORY, other[2000]), value=id_value(VM, A))], VM)
    own([point], THERE, named, other)
    # Where a point of format 1 is from nobody knows.
    own([{**point, "server_uuid": None}], THERE, keys(), other)
    with pytest.raises(RepositoryError, match="'app01' .vm-1. of server server-1.*'app02' .vm-9. of server server-2"):
        own([point], THERE, keys(), other)


def test_names_of_content_that_is_not_here_tell_a_copy() -> None:
    point = manifest(entry(2000, A), entry(2001, B))
    assert names_elsewhere([point], keys(k2000=A, k2001=B), REPOSITORY) == []
    assert names_elsewhere([point], keys(), REPOSITORY) == []
    assert names_elsewhere([point], keys(k2000="c" * 32, k2001=B), REPOSITORY) == [id_key(REPOSITORY, DISKS[2000])]
    assert names_elsewhere([], keys(k2000=A), "00000000-0000-0000-0000-000000000001") == []
