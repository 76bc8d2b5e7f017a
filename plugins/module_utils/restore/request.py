# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a restore is asked to do, checked before anything is touched."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional

from ..datapath.image import FORMATS
from ..errors import InputError
from ..repository.lock import LOCK_TIMEOUT, check_lock_timeout
from ..repository.names import check_run_id
from ..transport.request import DEVICE_DIR, SYSFS_DIR, check_transport_numbers, check_transport_options
from ..vsphere.session import Connection

FILE = "file"
IN_PLACE = "in_place"
NEW_VM = "new_vm"
TARGETS = (FILE, IN_PLACE, NEW_VM)
OVA = "ova"
#: What target=file writes: a file a disk, or one for all of them.
FILE_FORMATS = (*FORMATS, OVA)
SAME = "same"
PROVISIONING = (SAME, "thin", "thick", "eager")
REMOVE, KEEP = "remove", "keep"
#: Of the option ``verify``: what was not written is compared too.
FULL_VERIFY = "full"
_TRUE, _FALSE = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "off", "0", "f", "n")
# vCenter's limit.
_NAME_CHARACTERS = 80
VM_OPTIONS = ("name", "uuid", "use_instance_uuid", "moid", "folder", "datacenter")


@dataclass(frozen=True)
class DiskChoice:
    """One disk of the point, and where it goes.

    :param key: its device key in the restore point.
    :param target_key: device key of the disk that is written, if that is another one (in_place).
    :param datastore: the disk that is written must lie there (in_place), or is made there (new_vm).
    :param format: of this disk's image file (file).
    :param provisioning: of the disk that is made (new_vm).
    """

    key: int
    target_key: Optional[int] = None
    datastore: Optional[str] = None
    format: Optional[str] = None
    provisioning: Optional[str] = None


def verify_of(value: Any) -> bool | str:
    """The option ``verify``: false, true or full, also as the strings that a survey or the command line sends.

    :raises InputError: it is none of them.
    """
    text = str(value).strip().lower()
    if text == FULL_VERIFY:
        return FULL_VERIFY
    if text in _TRUE + _FALSE:
        return text in _TRUE
    raise InputError("The option verify has no such value", subject=repr(value), remedy="Use false, true or full")


@dataclass(frozen=True)
class RestoreRequest:
    """The options of ``vadp_disk_restore``.

    :param vm: the options that name the VM to write to, as :func:`..vsphere.inventory.find_vm` takes them.
    :param rate_limit: bytes a second, for in_place and new_vm.
    :param force: other runs that are at work on the VM are treated as over, and marks of restores count for nothing.
    :param safety_run_id: nothing is overwritten unless this run has made a point of the VM, for in_place.
    :param cluster: this and what follows is of the new machine, for new_vm.
    """

    repository: str
    vm_uuid: Optional[str] = None
    vm_name: Optional[str] = None
    point: str = "latest"
    target: str = FILE
    dest: Optional[str] = None
    format: str = "raw"
    disks: List[DiskChoice] = field(default_factory=list)
    overwrite: bool = False
    changed_only: bool = False
    force: bool = False
    safety_run_id: Optional[str] = None
    verify: bool | str = True
    progress_file: Optional[str] = None
    lock_timeout: int = LOCK_TIMEOUT
    connection: Optional[Connection] = None
    vm: Mapping[str, Any] = field(default_factory=dict)
    transports: List[str] = field(default_factory=lambda: ["hotadd", "nbdssl", "nbd", "https"])
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
    rate_limit: Optional[int] = None
    cluster: Optional[str] = None
    esxi_hostname: Optional[str] = None
    resource_pool: Optional[str] = None
    datastore: Optional[str] = None
    networks: Mapping[str, str] = field(default_factory=dict)
    provisioning: str = SAME
    mac_addresses: str = "keep"
    bios_uuid: str = "keep"
    vtpm: str = "refuse"
    tags: bool = True
    power_on: bool = False
    allow_duplicate_name: bool = False
    on_failure: str = REMOVE

    @classmethod
    def from_params(cls, params: Dict[str, Any], rate_limit: Optional[int]) -> RestoreRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        names = set(cls.__dataclass_fields__) - {"connection", "vm", "disks", "rate_limit", "networks", "verify"}
        request = cls(
            connection=Connection.from_params(params) if params["target"] in (IN_PLACE, NEW_VM) else None,
            vm={name: params[name] for name in VM_OPTIONS},
            disks=[DiskChoice(**choice) for choice in params["disks"] or []],
            rate_limit=rate_limit,
            networks={str(name): str(other) for name, other in (params["networks"] or {}).items()},
            verify=verify_of(params["verify"]),
            **{name: params[name] for name in names},
        )
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: an option makes no sense; nothing was touched."""
        if self.target not in TARGETS:
            raise InputError("The option target has no such value", subject=self.target)
        if not os.path.isabs(self.repository):
            raise InputError(
                "The repository's path is not absolute",
                subject=self.repository,
                remedy="Give the whole path, from / on",
            )
        check_transport_numbers(self)
        check_lock_timeout(self.lock_timeout)
        keys = [choice.key for choice in self.disks]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise InputError(
                "A disk is listed twice in disks", subject=", ".join(map(str, twice)), remedy="Name each disk once"
            )
        if self.safety_run_id is not None:
            check_run_id(self.safety_run_id)
            if self.target != IN_PLACE:
                raise InputError("The option safety_run_id is for target=in_place")
        if self.changed_only and self.target != IN_PLACE:
            raise InputError("The option changed_only is for target=in_place")
        if self.force and self.target == FILE:
            raise InputError("The option force is for target=in_place and target=new_vm")
        if self.target != NEW_VM:
            self._check_not_new()
        if self.target == FILE:
            self._check_file()
        elif self.target == IN_PLACE:
            self._check_in_place()
        else:
            self._check_new_vm()

    def _check_not_new(self) -> None:
        """What describes a new machine means nothing for another target, and is not a typing error to pass over."""
        plain = RestoreRequest(repository=self.repository)
        names = (
            "cluster",
            "esxi_hostname",
            "resource_pool",
            "datastore",
            "networks",
            "provisioning",
            "mac_addresses",
            "bios_uuid",
            "vtpm",
            "tags",
            "power_on",
            "allow_duplicate_name",
            "on_failure",
        )
        given = [name for name in names if getattr(self, name) != getattr(plain, name)]
        given += ["provisioning of a disk" for choice in self.disks if choice.provisioning is not None][:1]
        if given:
            raise InputError("An option is for target=new_vm", subject=", ".join(given))

    def _check_file(self) -> None:
        if self.dest is not None and not os.path.isabs(self.dest):
            raise InputError(
                "The folder for the image files is not an absolute path",
                subject=self.dest,
                remedy="Give the whole path, from / on",
            )
        if any(self.vm.get(name) for name in ("name", "uuid", "moid")):
            raise InputError(
                "The options name, uuid and moid name the virtual machine to write to, and target=file writes to none",
                remedy="Name the virtual machine whose restore point is meant by vm_uuid or vm_name, or use"
                " target=in_place",
            )
        for choice in self.disks:
            if choice.target_key is not None or choice.datastore is not None:
                raise InputError(
                    "The options target_key and datastore of a disk are for target=in_place", f"disk {choice.key}"
                )
            if choice.format is not None and self.format == OVA:
                raise InputError(
                    "An OVA holds all its disks in one format",
                    f"disk {choice.key}",
                    remedy="Leave out the disk's format",
                )
            if choice.format not in (None, *FORMATS):
                raise InputError("An image file can't have this format", subject=str(choice.format))
        if self.format not in FILE_FORMATS:
            raise InputError("An image file can't have this format", subject=self.format)
        if self.rate_limit is not None:
            raise InputError("The option rate_limit is for target=in_place")

    def _check_in_place(self) -> None:
        check_transport_options(self)
        if self.dest is not None:
            raise InputError("The option dest is for target=file", subject=self.dest)
        targets = [choice.key if choice.target_key is None else choice.target_key for choice in self.disks]
        twice = sorted({key for key in targets if targets.count(key) > 1})
        if twice:
            raise InputError(
                "Two disks of the point can't go into one disk",
                subject=", ".join(map(str, twice)),
                remedy="Give each another target_key",
            )
        for choice in self.disks:
            if choice.format is not None:
                raise InputError("The option format of a disk is for target=file", f"disk {choice.key}")
        if not self.overwrite:
            raise InputError(
                "A restore in place replaces all that the disks hold, and overwrite is false",
                remedy="Set overwrite: true if their present content may go",
            )

    def _check_new_vm(self) -> None:
        check_transport_options(self)
        if self.dest is not None:
            raise InputError("The option dest is for target=file", subject=self.dest)
        if self.vm.get("uuid") or self.vm.get("moid"):
            raise InputError(
                "The options uuid and moid name a virtual machine that exists, and target=new_vm makes one",
                remedy="Name the new machine by name, or use target=in_place",
            )
        name = self.vm.get("name")
        if name is not None and not 0 < len(name) <= _NAME_CHARACTERS:
            raise InputError(
                "A virtual machine can't have this name",
                subject=repr(name)[:200],
                reason=f"it has {len(name)} characters, and 1 to {_NAME_CHARACTERS} are possible",
            )
        for choice in self.disks:
            if choice.format is not None or choice.target_key is not None:
                raise InputError(
                    "The options format and target_key of a disk are not for target=new_vm", f"disk {choice.key}"
                )
