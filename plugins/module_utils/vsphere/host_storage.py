# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What of an ESXi host's storage goes over its VMkernel NICs: iSCSI adapters and NFS datastores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from ..errors import PrivilegeError
from ..libraries import vim
from .host_network import HostNetwork
from .inventory import readable
from .session import Session

STORAGE_PRIVILEGE = "Host.Config.Storage"

_PATHS = (
    "config.storageDevice.hostBusAdapter",
    "config.fileSystemVolume.mountInfo",
    "config.network.ipRouteConfig",
    "configManager.iscsiManager",
    "datastore",
)


@dataclass
class HostStorage:
    """``bound`` is device -> the iSCSI adapter that it is bound to.

    ``servers`` are (what it is for, name or address); ``gateway`` is the default TCP/IP stack's, by which servers in no
    NIC's subnet are reached. ``unknown`` says in words what could not be read.
    """

    bound: Dict[str, str] = field(default_factory=dict)
    servers: List[Tuple[str, str]] = field(default_factory=list)
    gateway: Optional[str] = None
    unknown: List[str] = field(default_factory=list)


def read(session: Session, host: HostNetwork) -> HostStorage:
    """All of it, in a few calls."""
    values = session.read(host.obj, *_PATHS)
    storage = HostStorage()
    routes = values["config.network.ipRouteConfig"]
    storage.gateway = (routes.defaultGateway or None) if routes is not None else None
    for adapter in _iscsi_adapters(values["config.storageDevice.hostBusAdapter"]):
        _read_adapter(session, host, adapter, values["configManager.iscsiManager"], storage)
    mounts = values["config.fileSystemVolume.mountInfo"] or ()
    volumes = [one.volume for one in mounts]
    infos = session.read_many(list(values["datastore"] or ()), vim.Datastore, ["info"]).values()
    volumes += [getattr(one["info"], "nas", None) for one in infos]
    for volume in volumes:
        if isinstance(volume, vim.host.NasVolume):
            what = f"NFS datastore '{readable(volume.name)}'"
            names = [*(volume.remoteHostNames or ()), *(volume.remoteHost or "").split(",")]
            storage.servers += [(what, name.strip()) for name in names if name.strip()]
    storage.servers = list(dict.fromkeys(storage.servers))
    return storage


def _iscsi_adapters(adapters: Any) -> List[Any]:
    """Those whose traffic may go over VMkernel NICs: not the ones that have a network port of their own."""
    return [
        one
        for one in adapters or ()
        if isinstance(one, vim.host.InternetScsiHba)
        and (one.isSoftwareBased or one.networkBindingSupport != "notsupported")
    ]


def _read_adapter(session: Session, host: HostNetwork, adapter: Any, manager: Any, storage: HostStorage) -> None:
    try:
        bound = _bound(session, host, adapter, manager)
    except PrivilegeError:
        storage.unknown.append(
            f"the NICs bound to the iSCSI adapter {adapter.device} can't be read without the privilege "
            f"{STORAGE_PRIVILEGE}"
        )
        bound = []
    storage.bound.update(dict.fromkeys(bound, adapter.device))
    if not bound:
        # Without a binding the routing table chooses the NIC.
        targets = [*(adapter.configuredSendTarget or ()), *(adapter.configuredStaticTarget or ())]
        storage.servers += [(f"iSCSI adapter {adapter.device}", target.address) for target in targets]


def _bound(session: Session, host: HostNetwork, adapter: Any, manager: Any) -> List[str]:
    ports = session.call(
        manager.QueryBoundVnics,
        adapter.device,
        what="The NICs bound to an iSCSI adapter were not read",
        subject=f"{adapter.device} of {host}",
        idempotent=True,
    )
    return [port.vnicDevice for port in ports or () if port.vnicDevice]


def iscsi_bound(session: Session, host: HostNetwork) -> List[str]:
    """The VMkernel NICs that are bound to an iSCSI adapter of the host.

    :raises PrivilegeError: the user lacks ``Host.Config.Storage``.
    """
    values = session.read(host.obj, "config.storageDevice.hostBusAdapter", "configManager.iscsiManager")
    bound: List[str] = []
    for adapter in _iscsi_adapters(values["config.storageDevice.hostBusAdapter"]):
        bound.extend(_bound(session, host, adapter, values["configManager.iscsiManager"]))
    return bound
