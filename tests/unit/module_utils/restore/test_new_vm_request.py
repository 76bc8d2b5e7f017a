# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import DiskChoice, RestoreRequest


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"target": "file", "dest": "/d", "power_on": True}, "is for target=new_vm: power_on"),
        ({"target": "file", "dest": "/d", "networks": {"a": "b"}}, "is for target=new_vm: networks"),
        ({"target": "in_place", "disks": [DiskChoice(1, provisioning="thin")]}, "provisioning of a disk"),
        ({"target": "new_vm", "dest": "/d"}, "option dest is for target=file"),
        ({"target": "new_vm", "vm": {"uuid": "x"}}, "target=new_vm makes one"),
        ({"target": "new_vm", "vm": {"name": "n" * 81}}, "it has 81 characters"),
        ({"target": "new_vm", "vm": {"name": ""}}, "it has 0 characters"),
        ({"target": "new_vm", "disks": [DiskChoice(1, target_key=2)]}, "not for target=new_vm"),
        ({"target": "new_vm", "transports": []}, "No transport is allowed"),
    ],
)
def test_options_that_make_no_sense(options, word):
    with pytest.raises(InputError) as caught:
        RestoreRequest(repository="/r", vm_name="app01", **options).check()
    assert word in str(caught.value)


def test_a_new_machine_needs_no_consent():
    RestoreRequest(repository="/r", vm_name="app01", target="new_vm", vm={"name": "copy"}, power_on=True).check()
