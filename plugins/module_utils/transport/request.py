# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The options of doc fragment ``transport``, checked before anything is touched.

A request that carries them is any object with attributes of their names.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import InputError, check_range
from ..named import FOLDER, path_problem
from .endpoints import WIRE_COMPRESSIONS
from .planner import check_transports
from .proxy import check_options

DEVICE_DIR = "/dev/disk/by-id"
SYSFS_DIR = "/sys"


def check_transport_options(request: Any) -> None:
    """:raises InputError: an option makes no sense."""
    check_transports(request.transports)
    check_transport_numbers(request)
    check_options(request.proxy_name, request.proxy_uuid, request.proxy_moid, request.proxy_physical)
    if request.wire_compression not in WIRE_COMPRESSIONS:
        raise InputError("The option wire_compression has no such value", subject=request.wire_compression)
    for option, path, default in (
        ("device_dir", request.device_dir, DEVICE_DIR),
        ("sysfs_dir", request.sysfs_dir, SYSFS_DIR),
    ):
        # A machine without disks has no /dev/disk/by-id; what somebody wrote must be there.
        problem = "it is not an absolute path" if not os.path.isabs(path) else None
        if path != default:
            problem = problem or path_problem(path, FOLDER)
        if problem is not None:
            raise InputError(
                f"The option {option} names no folder",
                subject=path,
                reason=problem,
                remedy=f"Leave it out for {default}",
            )


def check_transport_numbers(request: Any) -> None:
    """:raises InputError: a port, a time or a limit is out of range."""
    check_range("io_timeout", request.io_timeout, 1, 86400)
    check_range("nfc_port", request.nfc_port, 1, 65535)
    check_range("nfc_host_limit", request.nfc_host_limit, 1, 50)
