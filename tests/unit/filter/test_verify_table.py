# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import Any, Dict

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.verify_table import verify_table

DISK: Dict[str, Any] = {
    "key": 2000,
    "label": "Hard disk 1",
    "ok": True,
    "problems": [],
    "layers": 3,
    "bytes_verified": 4 << 20,
    "seconds": 2.0,
}
BOOT: Dict[str, Any] = {
    "booted": True,
    "by": "serial",
    "reason": "its serial console says 'login:'",
    "accelerator": "tcg",
    "accelerator_reason": "no KVM: there is no /dev/kvm",
    "firmware": "bios",
    "memory_mb": 512,
    "disks": [{"key": 2000, "bus": "paravirtual SCSI"}],
    "notes": ["it has 512 MiB of memory, not 4096"],
    "seconds": 3.21,
    "screenshot": "/backup/x.png",
    "serial_log": "/backup/x.serial.log",
}
RESULT: Dict[str, Any] = {"vm_name": "app01", "point": "p1", "level": "boot", "problems": [], "disks": [DISK]}


def test_disks_and_the_boot() -> None:
    lines = verify_table([dict(RESULT, boot=BOOT)])
    assert lines[2].split() == ["app01", "p1", "2000", "Hard", "disk", "1", "boot", "3", "4.0", "MiB", "2.0", "sound"]
    assert lines[3:] == [
        "p1 booted after 3.2 s: its serial console says 'login:'",
        "guest: bios, 512 MiB, 2000 on paravirtual SCSI, by tcg (no KVM: there is no /dev/kvm)",
        "note: it has 512 MiB of memory, not 4096",
        "screenshot: /backup/x.png",
        "serial log: /backup/x.serial.log",
    ]


def test_what_is_wrong() -> None:
    bad = dict(DISK, ok=False, problems=["point p1: p1.qcow2: the file is missing"])
    lines = verify_table([dict(RESULT, level="data", disks=[bad], problems=["the NVRAM is missing"])])
    assert lines[2].endswith("DAMAGED")
    assert lines[3:] == [
        "wrong: 2000 Hard disk 1: point p1: p1.qcow2: the file is missing",
        "wrong: p1: the NVRAM is missing",
    ]
    failed = dict(BOOT, booted=False, by=None, reason="its kernel panicked", screenshot=None, notes=[])
    lines = verify_table([dict(RESULT, boot=failed, problems=["it did not boot: its kernel panicked"])])
    assert lines[3] == "p1 DID NOT BOOT after 3.2 s: its kernel panicked" and len(lines) == 6
    planned = dict(BOOT, booted=None, seconds=0.0, reason="check mode: it would be booted")
    assert "p1 not booted: check mode" in verify_table([dict(RESULT, boot=planned)])[3]
    with pytest.raises(AnsibleFilterError):
        verify_table("nonsense")
