# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which virtual machine of the vCenter this machine is, if it is one (VADP facts 28, 31)."""

from __future__ import annotations

import os
import re
import uuid as uuids
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from ..errors import AmbiguousError, InputError
from ..libraries import vim
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session

_REMEDY = "Name the proxy by proxy_moid, or set proxy_physical if it is not a virtual machine of this vCenter"


class ProxyIdentity:
    """How a machine finds itself in the inventory."""

    @classmethod
    def find(
        cls,
        session: Session,
        *,
        name: Optional[str] = None,
        uuid: Optional[str] = None,
        moid: Optional[str] = None,
        physical: bool = False,
        sysfs_dir: str = "/sys",
    ) -> Tuple[Optional[VmRef], str]:
        """This machine's VM, and in words how it was found or why there is none.

        By the hardware UUID, as it is and byte-swapped, then by the serial number; where only root could read both, by
        the network cards' addresses.

        :param name, uuid, moid: the option that names the VM; then nothing is guessed.
        :param physical: it is none, whatever the hardware says.
        :raises AmbiguousError: two virtual machines fit; names both.
        :raises NotFoundError: the one that was named is not there.
        """
        check_options(name, uuid, moid, physical)
        if physical:
            return None, "proxy_physical says so"
        if name or uuid or moid:
            option = "proxy_name" if name else "proxy_uuid" if uuid else "proxy_moid"
            return find_vm(session, name=name or None, uuid=uuid or None, moid=moid or None), f"named by {option}"
        if not session.is_vcenter:
            return None, "an ESXi host that is logged in to directly can't attach disks to it"
        return _recognise(session, Path(sysfs_dir))


def check_options(name: Optional[str], uuid: Optional[str], moid: Optional[str], physical: bool) -> None:
    """:raises InputError: the options that say what the proxy is contradict each other."""
    given = [f"proxy_{key}" for key, value in (("name", name), ("uuid", uuid), ("moid", moid)) if value]
    given += ["proxy_physical"] if physical else []
    if len(given) > 1:
        raise InputError("The proxy is named twice", subject=", ".join(given), remedy="Give one of these options")


def _recognise(session: Session, sysfs: Path) -> Tuple[Optional[VmRef], str]:
    identity = sysfs / "class" / "dmi" / "id"
    hardware, serial = _read(identity / "product_uuid"), _read(identity / "product_serial")
    known = []
    for what, values in (("hardware UUID", _both_ways(hardware)), ("serial number", _of_serial(serial))):
        if not values:
            continue
        known.append(f"{what} {values[0]}")
        found = [vm for value in values for vm in _by_uuid(session, value)]
        machine = _only(session, found, f"{what} {' or '.join(values)}")
        if machine is not None:
            return machine, f"its {what} is that of '{machine.name}'"
    if known:
        return None, f"no virtual machine there has the {' or the '.join(known)}"
    # The hardware of the whole inventory is read for the addresses: only where there is something to find.
    vendor = _read(identity / "sys_vendor")
    if "vmware" not in vendor.lower():
        maker = (
            f"its hardware is of {vendor}, not of VMware" if vendor else f"{sysfs} does not say whose hardware it is"
        )
        return None, f"{maker}, and its UUID can't be read"
    addresses = _addresses(sysfs)
    if not addresses:
        return None, f"neither its UUID nor its network cards can be read under {sysfs}"
    machine = _only(session, _by_address(session, addresses), f"network address {', '.join(sorted(addresses))}")
    if machine is not None:
        return machine, f"a network card of '{machine.name}' has its address"
    return None, "no virtual machine there has its network addresses (its UUID can be read by root only)"


def _read(path: Path) -> str:
    """A file's text; nothing where it is absent or may not be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _both_ways(text: str) -> List[str]:
    """A hardware UUID as it is, and with its first three fields byte-swapped: firmware differs in this."""
    try:
        value = uuids.UUID(text)
    except ValueError:
        return []
    ways = [str(value), str(uuids.UUID(bytes=value.bytes_le))]
    return ways if ways[0] != ways[1] else ways[:1]


def _of_serial(text: str) -> List[str]:
    """``VMware-42 1a 0b ... -9c ...`` holds the UUID's bytes in their order."""
    match = re.fullmatch(r"VMware-((?:[0-9a-fA-F]{2}[ -]?){16})", text)
    if not match:
        return []
    return [str(uuids.UUID(hex=re.sub(r"[ -]", "", match.group(1))))]


def _by_uuid(session: Session, value: str) -> List[Any]:
    found = session.call(
        session.content.searchIndex.FindAllByUuid,
        None,
        value,
        True,
        False,
        what="The proxy was not looked up",
        subject=f"BIOS UUID '{value}'",
        idempotent=True,
    )
    return list(found or [])


def _addresses(sysfs: Path) -> Set[str]:
    """Addresses of the network cards, lower case; that of the loopback is not an address."""
    folder = sysfs / "class" / "net"
    try:
        names = os.listdir(str(folder))
    except OSError:
        return set()
    found = {_read(folder / name / "address").lower() for name in names}
    pattern = re.compile(r"(?!00:00:00:00:00:00)(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
    return {address for address in found if pattern.fullmatch(address)}


def _by_address(session: Session, addresses: Set[str]) -> List[Any]:
    """Virtual machines with one of these addresses: the hardware of all of them is read for it."""
    found = []
    for machine, values in session.find(vim.VirtualMachine, ["config.hardware.device"]):
        for device in values["config.hardware.device"] or []:
            if (getattr(device, "macAddress", None) or "").lower() in addresses:
                found.append(machine)
                break
    return found


def _only(session: Session, machines: Sequence[Any], how: str) -> Optional[VmRef]:
    """The one VM among *machines*. :raises AmbiguousError: there are two."""
    moids: Dict[str, Any] = {machine._moId: machine for machine in machines}
    if not moids:
        return None
    if len(moids) == 1:
        return find_vm(session, moid=next(iter(moids)))
    found = [find_vm(session, moid=moid) for moid in sorted(moids)]
    raise AmbiguousError(
        "Which virtual machine the proxy is can't be determined",
        subject=how,
        reason=", ".join(f"{vm.path} ({vm.moid})" for vm in found),
        remedy=_REMEDY,
        details={"matches": [{"path": vm.path, "moid": vm.moid} for vm in found]},
    )
