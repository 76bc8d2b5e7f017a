# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Checks of the ESXi hosts that could serve a disk: their state, their names and ports, their VMkernel NICs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set

from ..errors import InputError
from ..transport.diagnosis import Nic, overlaps
from .checks import ERROR, NOT_CHECKED, OK, WARNING, Check
from .network import Reached, words_of
from .plans import DiskOutcome

HOST_PATHS = (
    "name",
    "runtime.connectionState",
    "runtime.inMaintenanceMode",
    "config.network.vnic",
    "config.virtualNicManagerInfo.netConfig",
)
_BY_NFC = ("nbdssl", "nbd")


@dataclass(frozen=True)
class Host:
    """An ESXi host as vCenter shows it.

    :param nics: None where vCenter does not say.
    """

    moid: str
    name: str
    connected: bool
    maintenance: bool
    nics: Optional[List[Nic]] = None

    @property
    def usable(self) -> bool:
        return self.connected and not self.maintenance

    @classmethod
    def of(cls, moid: str, values: Mapping[str, Any]) -> Host:
        name = str(values.get("name") or moid)
        vnics = values.get("config.network.vnic")
        return cls(
            moid=moid,
            name=name,
            connected=values.get("runtime.connectionState") == "connected",
            maintenance=bool(values.get("runtime.inMaintenanceMode")),
            nics=None if vnics is None else nics_of(name, vnics, values.get("config.virtualNicManagerInfo.netConfig")),
        )


def nics_of(host: str, vnics: Sequence[Any], net_config: Optional[Sequence[Any]]) -> List[Nic]:
    """The VMkernel NICs with an IPv4 address, and what each is tagged for."""
    services: Dict[str, Set[str]] = {}
    for one in net_config or ():
        for selected in one.selectedVnic or ():
            for vnic in vnics:
                # "management.key-vim.host.VirtualNic-vmk0"
                if str(selected).rpartition(".key-")[2] == str(vnic.key).rpartition("key-")[2] or selected == vnic.key:
                    services.setdefault(vnic.device, set()).add(one.nicType)
    found = []
    for vnic in vnics:
        ip = vnic.spec.ip
        if ip is None or not ip.ipAddress or not ip.subnetMask:
            continue
        option = {
            "host": host,
            "device": vnic.device,
            "ip": ip.ipAddress,
            "netmask": ip.subnetMask,
            "portgroup": vnic.portgroup or "",
            "services": sorted(services.get(vnic.device, ())),
            "netstack": getattr(vnic.spec, "netStackInstanceKey", None),
        }
        try:
            found.append(Nic.from_option(option))
        except InputError:
            continue  # what is not an address lies in no subnet
    return found


def host_checks(
    hosts: Sequence[Host], reached: Mapping[str, Reached], outcomes: Sequence[DiskOutcome], nfc_port: int, api_port: int
) -> Iterator[Check]:
    """The checks of the hosts that could serve one machine's disks."""
    chosen = {outcome.chosen for outcome in outcomes if outcome.chosen}
    possible = {name for outcome in outcomes for name in outcome.usable()}
    by_nfc = _severity(chosen.intersection(_BY_NFC), possible.intersection(_BY_NFC))
    by_api = WARNING if "https" in chosen else OK
    usable = [host for host in hosts if host.usable]
    if hosts and not usable:
        names = ", ".join(host.name for host in hosts)
        yield Check(
            "host_state",
            ERROR,
            names,
            "no host that sees the disks is connected and out of maintenance mode",
            "Bring one of them back",
        )
    for host in hosts:
        yield from _state(host, bool(usable))
        yield _subnets(host)
        if not host.usable:
            yield Check("host_port", NOT_CHECKED, f"{host.name}:{nfc_port}", "the host serves nothing now")
            continue
        seen = reached.get(host.name)
        if seen is None:
            continue
        yield _name(host, seen, by_nfc)
        if seen.name_problem is None:
            yield _nfc(host, seen, nfc_port, by_nfc)
            yield _api(host, seen, api_port, by_api)


def _severity(chosen: Set[str], possible: Set[str]) -> str:
    """How bad it is when a port is closed that only some transports need."""
    return ERROR if chosen else WARNING if possible else OK


def _unneeded(severity: str, words: str) -> str:
    return f"{words}; no transport of the plan needs it" if severity == OK else words


def _state(host: Host, others: bool) -> Iterator[Check]:
    if not host.connected:
        words = "vCenter has no connection to it"
        yield Check("host_state", WARNING, host.name, words, "Look at the host in the vSphere client")
    elif host.maintenance:
        words = "it is in maintenance mode" + (": other hosts serve the disks" if others else "")
        yield Check("host_state", WARNING, host.name, words, "Wait, or take it out of maintenance mode")
    else:
        yield Check("host_state", OK, host.name, "connected")


def _subnets(host: Host) -> Check:
    """Two VMkernel NICs of one stack in one subnet (VADP facts 26)."""
    code = "host_subnets"
    if host.nics is None:
        return Check(code, NOT_CHECKED, host.name, "vCenter does not report the host's VMkernel NICs")
    pairs = overlaps(host.nics)
    if not pairs:
        return Check(code, OK, host.name, "no two VMkernel NICs lie in one subnet")
    listed = "; ".join(f"{_with_address(one)} and {_with_address(other)}" for one, other in pairs)
    return Check(
        code,
        WARNING,
        host.name,
        f"VMkernel NICs share a subnet: {listed}. The host may answer by the wrong one, and connections break",
        "Give backup traffic a VMkernel NIC in a subnet of its own",
    )


def _with_address(nic: Nic) -> str:
    return f"{nic.device} {nic.address}/{nic.network.prefixlen}"


def _name(host: Host, seen: Reached, severity: str) -> Check:
    if seen.name_problem is None:
        return Check("host_name", OK, host.name, f"resolves to {words_of(seen.addresses)}")
    return Check(
        "host_name",
        severity,
        host.name,
        _unneeded(severity, f"the name does not resolve here: {seen.name_problem}"),
        "Make the names of all hosts that see the datastores resolve on this machine (DNS or /etc/hosts)",
    )


def _nfc(host: Host, seen: Reached, port: int, severity: str) -> Check:
    subject = f"{host.name}:{port}"
    if seen.nfc_problem is None:
        return Check("host_port", OK, subject, f"greets: {seen.greeting}")
    return Check(
        "host_port",
        severity,
        subject,
        _unneeded(severity, f"not usable from here: {seen.nfc_problem}"),
        f"Open TCP port {port} from this machine to each ESXi host that sees the datastores: vCenter takes any of them",
    )


def _api(host: Host, seen: Reached, port: int, severity: str) -> Check:
    subject = f"{host.name}:{port}"
    if seen.api_problem is None:
        return Check("host_api_port", OK, subject, "reached")
    words = f"not reached: {seen.api_problem}"
    if severity == OK:
        return Check("host_api_port", OK, subject, f"{words}; only transport https needs it, and no disk goes by it")
    return Check(
        "host_api_port",
        severity,
        subject,
        f"{words}; export leases (transport https) are downloaded from there unless vCenter serves them itself",
        f"Open TCP port {port} from this machine to the ESXi hosts",
    )
