# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a preflight is asked to look at, checked before anything is asked of anybody."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional

from ..errors import InputError
from ..transport.request import DEVICE_DIR, SYSFS_DIR, check_transport_options
from ..vsphere.inventory import vm_selection
from ..vsphere.session import Connection


@dataclass(frozen=True)
class PreflightRequest:
    """The options of ``vadp_preflight``.

    :param vm: the options that name one VM, as :func:`..vsphere.inventory.find_vm` takes them; None with *vms*.
    :param vms: names of many.
    :param restores: the targets of restores that should be possible too.
    """

    connection: Connection
    vm: Optional[Mapping[str, Any]] = None
    vms: List[str] = field(default_factory=list)
    repository: Optional[str] = None
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
    io_timeout: int = 180
    restores: List[str] = field(default_factory=list)

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> PreflightRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        names = set(cls.__dataclass_fields__) - {"connection", "vm", "vms"}
        request = cls(
            connection=Connection.from_params(params),
            vm=vm_selection(params) if params["vms"] is None else None,
            vms=list(dict.fromkeys(params["vms"] or [])),
            **{name: params[name] for name in names},
        )
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: an option makes no sense."""
        if self.vm is None and not self.vms:
            raise InputError("No virtual machine is asked for", reason="the list 'vms' is empty")
        check_transport_options(self)
        if self.repository is not None and not os.path.isabs(self.repository):
            raise InputError(
                "The repository's path is not absolute",
                subject=self.repository,
                remedy="Give the whole path, from / on",
            )
