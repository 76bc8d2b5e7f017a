# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a backup makes of the marks of restores, once its snapshot is there (proofs 13)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.backup.marks import after_snapshot
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import vm_keys
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.vm_keys import DONE, WRITING, VmKeys
from pyVmomi import vim

VM = "vm-uuid"
DISKS = [
    SimpleNamespace(key=2000, label="Hard disk 1", uuid="disk-1", change_id="52/7"),
    SimpleNamespace(key=2001, label="Hard disk 2", uuid=None, change_id="52/7"),
]


def keys(*marks, vm=VM, raw=()):
    """:param marks: (name of the disk, state). :param raw: (name of the disk, value)."""
    options = [("nvram", "x"), *((vm_keys.mark_key(name), value) for name, value in raw)]
    options += [(vm_keys.mark_key(name), vm_keys.mark_value(vm, "run1", state, "52/1")) for name, state in marks]
    return VmKeys.of([vim.option.OptionValue(key=key, value=value) for key, value in options], VM)


def verdict(read, power="poweredOn", **more):
    return after_snapshot("VM app01", read, DISKS, power, **more)


def test_without_marks_nothing_is_said():
    for power in ("poweredOn", "poweredOff"):
        assert verdict(keys(), power).full == {} and not verdict(keys(), power).warnings


@pytest.mark.parametrize("name", ["disk-1", "key-2001"])
def test_writing_fails_while_the_machine_is_off_and_is_full_when_it_runs(name):
    with pytest.raises(VsphereError, match="at work, or was cut.*run1.*state=reset and force=true"):
        verdict(keys((name, WRITING)), "poweredOff")
    for power, force in (("poweredOn", False), ("suspended", False), ("poweredOff", True)):
        found = verdict(keys((name, WRITING)), power, force=force)
        assert list(found.full) == [2000 if name == "disk-1" else 2001]
        assert "may hold a mixture" in found.warnings[0]


def test_done_is_read_in_full_and_nothing_else():
    found = verdict(keys(("disk-1", DONE)), "poweredOff")
    assert list(found.full) == [2000] and "was not reset" in found.full[2000] and not found.warnings


def test_what_can_not_be_read_is_read_in_full():
    for read in (VmKeys.of(None, VM), keys(raw=[("disk-1", "9:later"), ("key-2001", "9:later")])):
        found = verdict(read, "poweredOff")
        assert set(found.full) == {2000, 2001} and len(found.warnings) == 1


def test_a_clones_inheritance_counts_only_for_the_tracking_that_was_spoilt():
    assert list(verdict(keys(("disk-1", DONE), vm="other")).full) == [2000], "the same first part"
    read = keys(raw=[("disk-1", vm_keys.mark_value("other", "run1", WRITING, "99/1"))])
    assert verdict(read, "poweredOff").full == {}
