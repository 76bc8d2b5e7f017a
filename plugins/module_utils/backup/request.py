# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an export is asked to do, checked before anything is touched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional

from ..errors import InputError
from ..repository.chain import MAX_CHAIN, MODES
from ..repository.lock import LOCK_TIMEOUT, check_lock_timeout
from ..repository.names import check_point_name, check_run_id
from ..transport.request import DEVICE_DIR, SYSFS_DIR, check_transport_options
from ..vsphere.inventory import vm_selection
from ..vsphere.session import Connection

COMPRESSIONS = ("zstd", "none")

_RATE = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,9})?)\s*(?P<unit>[KMG]?)(?:i?B)?(?:/s)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_rate(text: Optional[str]) -> Optional[int]:
    """Bytes a second from ``50M`` or ``1048576``; the suffixes K, M, G are binary. None stays None.

    :raises InputError: it is no such number, or less than 1 KiB/s.
    """
    if text is None:
        return None
    match = _RATE.fullmatch(text.strip())
    rate = int(float(match.group("number")) * _UNITS[match.group("unit").upper()]) if match else 0
    if rate < 1024:
        raise InputError(
            "The rate limit makes no sense",
            subject=repr(text),
            remedy="Give bytes a second, at least 1024, with K, M or G if you like: 50M",
        )
    return rate


@dataclass(frozen=True)
class ExportRequest:
    """The options of ``vadp_disk_export``.

    :param vm: the options that name the VM, as :func:`..vsphere.inventory.find_vm` takes them.
    :param snapshot_moid: neither it nor the name is given for a template, which has no snapshots.
    :param run_id: of a run that was begun: it says which snapshot, and which point.
    :param force: other runs that are at work on the VM are treated as over.
    :param rate_limit: bytes a second, for all disks together.
    :param vm_ids: whether the virtual machine names its points.
    """

    connection: Connection
    vm: Mapping[str, Any]
    repository: str
    snapshot_moid: Optional[str] = None
    snapshot_name: Optional[str] = None
    run_id: Optional[str] = None
    force: bool = False
    point: Optional[str] = None
    mode: str = "auto"
    max_chain: int = MAX_CHAIN
    disks: Optional[List[str]] = None
    exclude_disks: List[str] = field(default_factory=list)
    transports: List[str] = field(default_factory=lambda: ["san", "hotadd", "nbdssl", "nbd", "https"])
    require_transport: bool = False
    vddk_libdir: Optional[str] = None
    device_dir: str = DEVICE_DIR
    sysfs_dir: str = SYSFS_DIR
    proxy_name: Optional[str] = None
    proxy_uuid: Optional[str] = None
    proxy_moid: Optional[str] = None
    proxy_physical: bool = False
    nfc_port: int = 902
    nfc_host_limit: Optional[int] = None
    wire_compression: str = "none"
    rate_limit: Optional[int] = None
    compression: str = "zstd"
    io_timeout: int = 180
    parallel_disks: int = 2
    vm_ids: bool = True
    progress_file: Optional[str] = None
    create: bool = False
    adopt: Optional[str] = None
    lock_timeout: int = LOCK_TIMEOUT

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> ExportRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        names = set(cls.__dataclass_fields__) - {"connection", "vm", "rate_limit", "exclude_disks"}
        request = cls(
            connection=Connection.from_params(params),
            vm=vm_selection(params),
            rate_limit=parse_rate(params["rate_limit"]),
            exclude_disks=params["exclude_disks"] or [],
            **{name: params[name] for name in names},
        )
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: an option makes no sense; nothing was touched."""
        if self.point is not None:
            check_point_name(self.point)
        for name, value, choices in (("mode", self.mode, MODES), ("compression", self.compression, COMPRESSIONS)):
            if value not in choices:
                raise InputError(f"The option {name} has no such value", subject=value)
        if self.run_id is not None:
            check_run_id(self.run_id)
        if self.snapshot_moid is not None and self.snapshot_name is not None:
            raise InputError("The snapshot is named twice", remedy="Give either snapshot_moid or snapshot_name")
        if self.disks is not None and not self.disks:
            raise InputError("No disk is asked for", reason="the list 'disks' is empty", remedy="Leave it out for all")
        check_transport_options(self)
        check_lock_timeout(self.lock_timeout)
        if not 1 <= self.parallel_disks <= 16:
            raise InputError(
                "The option parallel_disks is out of range", subject=str(self.parallel_disks), remedy="1 to 16"
            )
        if not 1 <= self.max_chain <= 500:
            raise InputError("The option max_chain is out of range", subject=str(self.max_chain), remedy="1 to 500")
        if not os.path.isabs(self.repository):
            raise InputError(
                "The repository's path is not absolute",
                subject=self.repository,
                remedy="Give the whole path, from / on",
            )
