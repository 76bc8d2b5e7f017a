# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One export in a process of its own: {request, connection} on stdin, {peak_mib, seconds, disks} on stdout."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from ansible_collections.openvadp.backup.plugins.module_utils.backup.export import export_point
from ansible_collections.openvadp.backup.plugins.module_utils.backup.request import ExportRequest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection


def peak_mib() -> float:
    """The largest resident set of this process. (``ru_maxrss`` would begin with that of the parent.)"""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def main() -> None:
    options = json.load(sys.stdin)
    request = ExportRequest(connection=Connection(**options["connection"]), **options["request"])
    begun = time.monotonic()
    result = export_point(request, check_mode=False)
    seconds = time.monotonic() - begun
    names = ("mode", "reason", "areas", "bytes_read", "bytes_stored", "seconds")
    disks = [{name: disk[name] for name in names} for disk in result["disks"] if not disk["skipped"]]
    print(json.dumps({"peak_mib": peak_mib(), "seconds": seconds, "disks": disks}))


if __name__ == "__main__":
    main()
