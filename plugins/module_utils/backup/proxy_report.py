# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which disks of others a proxy VM has attached: to be asked before that VM is destroyed.

``Destroy_Task`` deletes the files of all disks that a virtual machine has, those of others too (proofs 9). What counts
is what vCenter shows now; the records of the repository say whose it is, and what may be attached at any moment.
Nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from ..errors import InputError, VadpError
from ..libraries import vim
from ..repository.layout import Repository, is_empty_folder
from ..transport.guest_device import uuid_digits
from ..transport.hotadd_plan import MODES, READ, file_of, reservations_of
from ..vsphere.inventory import VmRef, find_vm, readable
from ..vsphere.session import Connection, Session

OPTIONS = ("proxy_name", "proxy_uuid", "proxy_moid")
_PATHS = ("config.hardware.device", "config.extraConfig", "config.files.vmPathName")

Record = Dict[str, Any]
Owners = Dict[str, Tuple[str, str]]


@dataclass(frozen=True)
class ProxyRequest:
    """The options of ``vadp_recover`` that name a proxy instead of a virtual machine to recover.

    :param proxy: name, uuid or moid -> what it is.
    """

    connection: Connection
    proxy: Mapping[str, Any]
    repository: str

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> Optional[ProxyRequest]:
        """From ``module.params``; None where no proxy is named. :raises InputError: an option does not go with it."""
        proxy = {name[len("proxy_") :]: params[name] for name in OPTIONS if params.get(name)}
        if not proxy:
            return None
        given = [name for name in ("name", "uuid", "moid", "begin", "point", "access", "export") if params.get(name)]
        if given:
            raise InputError(
                "A proxy is only looked at",
                subject=", ".join(given),
                reason="what is attached to it is of all virtual machines",
                remedy="Name either the proxy, or the virtual machine that is to be recovered",
            )
        return cls(Connection.from_params(params), proxy, params["repository"])


def report(request: ProxyRequest) -> Dict[str, Any]:
    """{changed, attached, announced, recovered, run, warnings} of ``vadp_recover``.

    :raises NotFoundError: vCenter has no such proxy.
    """
    records, warnings = _records(request.repository)
    with Session.connect(request.connection) as session:
        proxy = find_vm(session, **request.proxy)
        ours = [record for record in records if record["proxy_moid"] == proxy.moid]
        values = session.read(proxy.obj, *_PATHS)
        devices = list(values["config.hardware.device"] or [])
        owners, vmx = _owners(session, proxy), str(values[_PATHS[2]] or "")
        attached = [_attached(device, ours, owners) for device in devices if _is_foreign(device, vmx, ours, owners)]
    shown = {item["file"] for item in attached}
    announced = [
        {key: record[key] for key in ("file", "disk_uuid", "run_id", "vm_uuid")}
        for record in ours
        if record["file"] not in shown
    ]
    known = {uuid_digits(item["disk_uuid"]) for item in attached + announced}
    for digits, run_id in sorted(reservations_of(values["config.extraConfig"], proxy).items()):
        if digits not in known:
            announced.append({"file": None, "disk_uuid": digits, "run_id": run_id, "vm_uuid": None})
    return {
        "changed": False,
        "attached": attached,
        "announced": announced,
        "recovered": [],
        "run": None,
        "warnings": warnings,
    }


def _records(path: str) -> Tuple[List[Record], List[str]]:
    """What the runs of a repository have recorded as attached, of all virtual machines, and what can't be read."""
    found: List[Record] = []
    warnings: List[str] = []
    stores = [] if is_empty_folder(path) else Repository.open(path).vms()
    for store in stores:
        try:
            runs = store.runs()
        except VadpError as error:
            warnings.append(f"What {store.uuid} has attached is known from vCenter alone: {error}")
            continue
        for run in runs:
            for intent in run.intents("attachment"):
                found.append(
                    {
                        "proxy_moid": str(intent.get("proxy_moid")),
                        "file": str(intent.get("file")),
                        "disk_uuid": intent.get("disk_uuid"),
                        "run_id": run.run_id,
                        "vm_uuid": store.uuid,
                    }
                )
    return found, warnings


def _is_foreign(device: Any, vmx: str, records: List[Record], owners: Owners) -> bool:
    """Whether this disk of the proxy is another machine's, or may be: it is its own only if nothing says otherwise.

    A machine's own disks lie in its folder, or in one of the same name on another datastore.
    """
    file = file_of(device)
    if file is None:
        return False
    temporary = getattr(device.backing, "diskMode", None) == MODES[READ]
    named = any(record["file"] == file for record in records)
    return temporary or named or file.rpartition("/")[0] in owners or _folder(file) != _folder(vmx)


def _folder(path: str) -> str:
    """``app01`` of ``[vmfs01] app01/app01.vmdk``."""
    return path.partition("] ")[2].rpartition("/")[0]


def _owners(session: Session, proxy: VmRef) -> Owners:
    """``[datastore] folder`` -> (name, moid) of the machine that lives there."""
    found = {}
    for obj, values in session.find(vim.VirtualMachine, ("name", "config.files.vmPathName")):
        home = str(values["config.files.vmPathName"] or "").rpartition("/")[0]
        if home and obj._moId != proxy.moid:
            found[home] = (readable(str(values["name"])), obj._moId)
    return found


def _attached(device: Any, records: List[Record], owners: Owners) -> Dict[str, Any]:
    file = str(file_of(device))
    name, moid = owners.get(file.rpartition("/")[0], (None, None))
    record = next(_of_file(records, file), {"run_id": None, "vm_uuid": None})
    return {
        "label": getattr(device.deviceInfo, "label", None) or f"disk {device.key}",
        "device_key": device.key,
        "file": file,
        "disk_uuid": getattr(device.backing, "uuid", None),
        "mode": getattr(device.backing, "diskMode", None) or "",
        "vm_name": name,
        "vm_moid": moid,
        "vm_uuid": record["vm_uuid"],
        "run_id": record["run_id"],
    }


def _of_file(records: List[Record], file: str) -> Iterator[Record]:
    return (record for record in records if record["file"] == file)
