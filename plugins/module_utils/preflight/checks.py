# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a check comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional

OK = "ok"
WARNING = "warning"
ERROR = "error"
NOT_CHECKED = "not_checked"


# What each check looks at, in the order of ``docs/troubleshooting.md``.
CHECKS: Dict[str, str] = {
    "server": "which server answers",
    "certificate": "how long the server's certificate is valid; a warning 30 days before its end",
    "clock": "whether the server's clock and the proxy's agree, within a minute",
    "programs": "nbdkit, qemu-img, qemu-nbd and the Python libraries on the proxy, with versions",
    "vddk": "VDDK and nbdkit's VDDK plugin, with versions, where a transport may use them",
    "proxy": "which virtual machine of the vCenter the proxy is, where hotadd is listed",
    "repository": "whether the repository can be used and written, and its free space",
    "vm": "whether the machine is there and can have a snapshot (bus sharing, ...), or can be read as a template",
    "disk": "disks that no snapshot holds, which are not in the backup",
    "change_tracking": "whether changed block tracking is on, effective and to be trusted",
    "quiescing": "whether VMware Tools run, so that the guest can be quiesced",
    "snapshots": "snapshots that are there: of others, of backups, and how many more are possible",
    "consolidation": "whether disks need to be consolidated",
    "storage_vmotion": "whether Storage vMotion was left disabled by a backup that crashed",
    "datastore_space": "whether a snapshot has room on the datastores of the disks",
    "transport": "whether each disk can be read at all, and how",
    "leftovers": "disks of the machine that are attached to another one",
    "privileges": "what the user may do on the machine, its datastores, the proxy and at vCenter's level",
    "host_state": "whether the hosts that see the disks are connected and out of maintenance mode",
    "host_subnets": "whether two VMkernel NICs of such a host lie in one subnet",
    "host_name": "whether its name resolves on the proxy",
    "host_port": "whether its NFC port (902) is reached and greets as an ESXi host does",
    "host_api_port": "whether its port 443 is reached, which only transport https may need",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    :param code: the check's name, the same for all that it is done on.
    :param severity: ``error``: the backup fails, or would be worth nothing. ``warning``: it works, and something is
        worse than it has to be or soon will be. ``not_checked``: nobody knows.
    :param subject: what was looked at.
    :param evidence: what was seen.
    :param remedy: what to do about it; None where nothing needs to be done.
    """

    code: str
    severity: str
    subject: str
    evidence: str
    remedy: Optional[str] = None

    def to_result(self) -> Dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity,
            "subject": self.subject,
            "evidence": self.evidence,
            "remedy": self.remedy,
        }


def is_ready(checks: Iterable[Check]) -> bool:
    """Whether a backup can be expected to work."""
    return all(check.severity != ERROR for check in checks)
