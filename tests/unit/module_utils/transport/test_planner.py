# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One row for each thing that speaks for or against a transport, with the words that a user reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport.planner import (
    READ,
    WRITE,
    Candidate,
    DatastoreFacts,
    DiskFacts,
    HostFacts,
    ProxyFacts,
    ProxyVm,
    VmFacts,
    by_import,
    consider,
    plan,
    plan_new_machine,
)
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import Vddk

ALL = ["san", "hotadd", "nbdssl", "nbd", "https"]
LUN = "naa.60003ff44dc75adc8f9f1b2c3d4e5f60"
VDDK = Vddk("/opt/vddk", "8.0.3", "1.42.3")
NO_VDDK = "no libvixDiskLib.so.* in /opt/vddk/lib64"

ESX01, ESX02 = HostFacts("host-10", "esx01"), HostFacts("host-11", "esx02")
VMFS = DatastoreFacts("datastore-12", "vmfs01", "VMFS", (LUN,), False, 6, (ESX01, ESX02))
AWAY = replace(VMFS, hosts=(replace(ESX01, usable=False), replace(ESX02, usable=False)))
MACHINE = VmFacts("vm-101", "app01", "poweredOn", False, False, 1, "datacenter-2", "host-10")
DISK = DiskFacts("Hard disk 1", "[vmfs01] app01/app01.vmdk", 1 << 30, "scsi", thin=False, datastore=VMFS, vm=MACHINE)
PROXY_VM = ProxyVm(
    "vm-109", "proxy01", "datacenter-2", "host-10", frozenset(["datastore-12", "datastore-13"]), False, True, 10, True
)
# Everything is there: each row takes something away.
PROXY = ProxyFacts(
    vddk=VDDK,
    server_version="8.0.3",
    vm=PROXY_VM,
    identity="its hardware UUID is that of 'proxy01'",
    luns={LUN: "/dev/disk/by-id/naa"},
    plugins=frozenset(["vddk", "file", "curl"]),
)


def store(kind: str, **facts: Any) -> DatastoreFacts:
    values: Dict[str, Any] = dict(name=f"{kind.lower()}01", kind=kind, extents=(), vmfs_major=None)
    return replace(VMFS, **{**values, **facts})


def disk(**facts: Any) -> DiskFacts:
    """A disk of a powered-on VM; ``vm_<fact>`` is one of its machine."""
    machine = {name[3:]: value for name, value in facts.items() if name.startswith("vm_")}
    own = {name: value for name, value in facts.items() if not name.startswith("vm_")}
    return replace(DISK, vm=replace(MACHINE, **machine), **own)


def proxy(**facts: Any) -> ProxyFacts:
    machine = {name[3:]: value for name, value in facts.items() if name.startswith("vm_")}
    own = {name: value for name, value in facts.items() if not name.startswith("vm_")}
    return replace(PROXY, **({"vm": replace(PROXY_VM, **machine)} if machine else {}), **own)


def vddk(version: str) -> Vddk:
    return replace(VDDK, version=version)


OFF = dict(vm_power_state="poweredOff", vm_snapshots=0)
NEW = dict(OFF, vm_new=True)


class Case(NamedTuple):
    """A transport, its facts, and the words of the reason against it; or the method that is taken."""

    transport: str
    disk: DiskFacts
    proxy: ProxyFacts
    reason: Optional[str] = None
    method: str = ""
    first: bool = True


READING = [
    # SAN
    Case("san", disk(), PROXY, method="vddk"),
    Case("san", disk(thin=True), PROXY, method="vddk"),
    Case("san", disk(chained=True), PROXY, method="vddk"),
    Case("san", disk(), proxy(vm=None), method="vddk"),
    Case("san", disk(), proxy(is_vcenter=False, vm=None), method="vddk"),
    Case("san", disk(), proxy(vddk=None, vddk_problem=NO_VDDK), NO_VDDK),
    Case("san", disk(datastore=store("NFS")), PROXY, "datastore 'nfs01' is NFS, which has no LUN"),
    Case("san", disk(datastore=store("NFS41")), PROXY, "datastore 'nfs4101' is NFS41, which has no LUN"),
    Case("san", disk(datastore=store("vsan")), PROXY, "datastore 'vsan01' is vSAN, which has no LUN"),
    Case("san", disk(datastore=store("VVOL")), PROXY, "is a vVol datastore, whose volumes no proxy can see"),
    Case("san", disk(datastore=store("PMEM")), PROXY, "is PMEM, and only VMFS lies on LUNs"),
    Case("san", disk(datastore=store("VMFS", local=True, extents=("naa.1",))), PROXY, "is local to one ESXi host"),
    Case("san", disk(datastore=store("VMFS")), PROXY, "does not say on which LUN"),
    Case("san", disk(datastore=None), PROXY, "what its datastore lies on is not known"),
    Case("san", disk(), proxy(luns={}), f"this machine does not see LUN {LUN} of datastore 'vmfs01'"),
    Case("san", disk(), proxy(luns={}), "(it is the virtual machine 'proxy01')"),
    Case("san", disk(datastore=replace(VMFS, extents=(LUN, "naa.2"))), PROXY, "does not see LUN naa.2 of"),
    Case("san", disk(), proxy(lun_problems={LUN: "it is mounted on /mnt"}), "not be touched: it is mounted on /mnt"),
    Case("san", disk(), proxy(lun_problems={"naa.2": "it is mounted on /mnt"}), method="vddk"),
    Case("san", disk(encrypted=True), PROXY, "its LUN holds ciphertext"),
    Case("san", disk(vm_encrypted=True), PROXY, "the disk is encrypted"),
    Case("san", disk(), proxy(vddk=vddk("6.0.3"), server_version="6.5.0"), "VMFS-6 needs VDDK 6.5"),
    Case("san", disk(), proxy(vddk=vddk("6.0.3"), server_version=None), "VMFS-6 needs VDDK 6.5"),
    Case(
        "san", disk(datastore=replace(VMFS, vmfs_major=5)), proxy(vddk=vddk("6.0"), server_version="6.5"), method="vddk"
    ),
    Case("san", disk(vm_template=True), PROXY, "'app01' is a template, and VDDK opens no template"),
    Case("san", disk(), proxy(missing_privileges={"vddk": ("a.B",)}), "the user lacks the privilege a.B"),
    # HotAdd
    Case("hotadd", disk(), PROXY, method="vddk"),
    Case("hotadd", disk(thin=True, chained=True), PROXY, method="vddk"),
    Case("hotadd", disk(), proxy(vddk=None, vddk_problem=NO_VDDK), method="proxy_hotadd"),
    Case("hotadd", disk(), proxy(vddk=vddk("6.7"), server_version="9.0"), method="proxy_hotadd"),
    Case("hotadd", disk(), proxy(vddk=None, vddk_problem=NO_VDDK, plugins=frozenset()), "nbdkit's file plugin"),
    Case("hotadd", disk(), proxy(vddk=None, vddk_problem=NO_VDDK, plugins=frozenset()), NO_VDDK),
    Case("hotadd", disk(), proxy(plugins=frozenset()), method="vddk"),
    Case("hotadd", disk(), proxy(is_vcenter=False), "needs vCenter, and this is a direct login to an ESXi host"),
    Case("hotadd", disk(), proxy(vm=None, identity="proxy_physical says so"), "not a virtual machine of this vCenter"),
    Case("hotadd", disk(), proxy(vm=None, identity="proxy_physical says so"), "proxy_physical says so"),
    Case(
        "hotadd", disk(), proxy(vm_datacenter_moid="datacenter-21"), "'proxy01' is in another datacenter than 'app01'"
    ),
    Case("hotadd", disk(), proxy(vm_datastores=frozenset()), "'proxy01' does not see datastore 'vmfs01'"),
    Case(
        "hotadd",
        disk(datastore=store("vsan", moid="datastore-40")),
        PROXY,
        "host of the proxy 'proxy01' does not see datastore 'vsan01' (vSAN)",
    ),
    Case("hotadd", disk(datastore=store("vsan")), PROXY, method="vddk"),
    Case("hotadd", disk(datastore=store("VVOL")), PROXY, method="vddk"),
    Case("hotadd", disk(datastore=store("NFS", moid="datastore-13")), PROXY, method="vddk"),
    Case("hotadd", disk(datastore=store("VMFS", local=True)), PROXY, method="vddk"),
    Case("hotadd", disk(controller="ide"), PROXY, "the disk is on an IDE controller"),
    Case("hotadd", disk(controller="sata"), PROXY, method="vddk"),
    Case("hotadd", disk(controller="nvme"), PROXY, method="vddk"),
    Case("hotadd", disk(encrypted=True), PROXY, "the disk is encrypted, and the proxy 'proxy01' is not"),
    Case("hotadd", disk(encrypted=True), proxy(vm_encrypted=True), method="vddk"),
    Case("hotadd", disk(), proxy(vm_encrypted=True), method="vddk"),
    Case("hotadd", disk(), proxy(vm_enable_uuid=False), "disk.EnableUUID is not set on the proxy 'proxy01'"),
    Case("hotadd", disk(), proxy(vm_free_units=0), method="proxy_hotadd"),
    Case(
        "hotadd", disk(), proxy(vm_free_units=0, vm_can_add_controller=False), "all SCSI units of 'proxy01' are taken"
    ),
    Case("hotadd", disk(), proxy(vm_moid="vm-101"), "it is a disk of the proxy itself"),
    Case("hotadd", disk(vm_template=True), PROXY, "is a template"),
    Case("hotadd", disk(datastore=None), PROXY, "where the disk lies is not known"),
    Case("hotadd", disk(), proxy(missing_privileges={"hotadd": ("x.Y", "a.B")}), "lacks the privileges a.B, x.Y"),
    Case("hotadd", disk(), proxy(missing_privileges={"vddk": ("a.B",)}), method="proxy_hotadd"),
    # Without it a disk's UUID can't be reserved while VDDK attaches it.
    Case("hotadd", disk(), proxy(missing_privileges={"reserving": ("a.B",)}), method="proxy_hotadd"),
    # NBD and NBDSSL
    Case("nbdssl", disk(), PROXY, method="vddk"),
    Case("nbdssl", disk(), proxy(is_vcenter=False, vm=None, luns={}, plugins=frozenset()), method="vddk"),
    Case("nbdssl", disk(encrypted=True, controller="ide", chained=True), PROXY, method="vddk"),
    Case("nbdssl", disk(datastore=store("vsan")), PROXY, method="vddk"),
    Case("nbdssl", disk(datastore=store("VMFS", local=True)), PROXY, method="vddk"),
    Case("nbdssl", disk(), proxy(vddk=None, vddk_problem=NO_VDDK), NO_VDDK),
    Case("nbdssl", disk(), proxy(vddk=None), "VDDK was not looked for"),
    Case("nbdssl", disk(), proxy(vddk=vddk("6.5.4"), server_version="8.0.1"), "VDDK 6.5.4"),
    Case("nbdssl", disk(), proxy(vddk=vddk("9.0.0"), server_version="6.5.0"), "the server is 6.5.0"),
    Case("nbdssl", disk(), proxy(vddk=vddk("7.0.3"), server_version="8.0.3"), method="vddk"),
    Case("nbdssl", disk(), proxy(vddk=vddk("9.0.0"), server_version="7.0.3"), method="vddk"),
    Case("nbdssl", disk(), proxy(vddk=vddk("6.7.0"), server_version="8.0.3"), "VDDK 6.7.0"),
    Case("nbdssl", disk(), proxy(vddk=vddk("8"), server_version="9.0.0"), method="vddk"),
    Case("nbdssl", disk(), proxy(vddk=vddk("8.0"), server_version="10.0.0"), "the server is 10.0.0"),
    Case("nbdssl", disk(), proxy(server_version=None), method="vddk"),
    Case("nbdssl", disk(vm_template=True), PROXY, "VDDK opens no template"),
    # A host may leave maintenance while the open is tried again.
    Case("nbdssl", disk(datastore=AWAY), PROXY, method="vddk"),
    Case("https", disk(datastore=AWAY), PROXY, "no ESXi host with datastore 'vmfs01' can serve now (esx01, esx02"),
    Case("nbdssl", disk(), proxy(missing_privileges={"vddk": ("a.B",)}), "the user lacks the privilege a.B"),
    Case("nbdssl", disk(), proxy(missing_privileges={"nbdssl": ("a.B",)}), "the user lacks the privilege a.B"),
    Case("nbd", disk(), PROXY, method="vddk"),
    Case("nbd", disk(), proxy(vddk=None, vddk_problem=NO_VDDK), NO_VDDK),
    # HTTPS
    Case("https", disk(), PROXY, method="export_lease"),
    Case("https", disk(), proxy(vddk=None, vm=None, plugins=frozenset()), method="export_lease"),
    Case("https", disk(vm_power_state="suspended"), PROXY, method="export_lease"),
    Case("https", disk(vm_power_state="poweredOff"), PROXY, method="folder"),
    Case("https", disk(**OFF), PROXY, method="folder"),
    Case("https", disk(vm_power_state="poweredOff", chained=True), PROXY, method="export_lease"),
    Case("https", disk(datastore=store("NFS"), **OFF), PROXY, method="folder"),
    Case("https", disk(datastore=store("vsan"), **OFF), PROXY, method="export_lease"),
    Case("https", disk(datastore=store("VVOL"), **OFF), PROXY, method="export_lease"),
    Case("https", disk(**OFF), proxy(plugins=frozenset(["file"])), method="export_lease"),
    Case("https", disk(vm_template=True, **OFF), PROXY, method="folder"),
    Case("https", disk(vm_template=True, **OFF), proxy(plugins=frozenset()), "nbdkit's curl plugin is not installed"),
    Case("https", disk(vm_template=True, chained=True, **OFF), PROXY, "its base file is old"),
    Case("https", disk(vm_template=True, datastore=store("vsan"), **OFF), PROXY, "is vsan, where a disk is not a file"),
    Case("https", disk(vm_template=True, datastore=store("vsan"), **OFF), PROXY, "has no snapshot to export"),
    Case("https", disk(encrypted=True), PROXY, "its files are ciphertext"),
    Case("https", disk(), proxy(missing_privileges={"export_lease": ("VApp.Export",)}), "privilege VApp.Export"),
    Case("https", disk(**OFF), proxy(missing_privileges={"export_lease": ("VApp.Export",)}), method="folder"),
    Case("https", replace(DISK, vm=None), PROXY, "whether its virtual machine runs is not known"),
]

WRITING = [
    Case("san", disk(**OFF), PROXY, method="vddk"),
    Case("san", disk(**OFF), PROXY, "restores go over the LAN", first=False),
    Case("san", disk(thin=True, **OFF), PROXY, "only thick disks are written over SAN, and the disk is thin"),
    Case("san", disk(thin=None, **OFF), PROXY, "whether the disk is thin is not known"),
    Case("san", disk(vm_power_state="poweredOff"), PROXY, "the disk has a snapshot chain"),
    Case("san", disk(vm_snapshots=0), PROXY, "'app01' is poweredOn, and only a powered-off"),
    Case("hotadd", disk(**OFF), PROXY, method="vddk"),
    Case("hotadd", disk(thin=True, **OFF), PROXY, method="vddk"),
    Case("hotadd", disk(**OFF), proxy(vddk=None, vddk_problem=NO_VDDK), method="proxy_hotadd"),
    Case("hotadd", disk(vm_snapshots=0), PROXY, "only a powered-off virtual machine is written"),
    Case("hotadd", disk(vm_power_state="poweredOff"), PROXY, "only a disk without one is written"),
    Case("hotadd", disk(chained=True, **OFF), PROXY, "only a disk without one is written"),
    Case("hotadd", disk(chained=True, linked=True, **OFF), PROXY, method="vddk"),
    Case(
        "hotadd",
        disk(chained=True, linked=True, vm_power_state="poweredOff"),
        PROXY,
        "only a disk without one is written",
    ),
    Case("nbdssl", disk(chained=True, linked=True, **OFF), PROXY, method="vddk"),
    Case("san", disk(chained=True, linked=True, **OFF), PROXY, "a linked clone, which VMware does not let SAN write"),
    Case("nbdssl", disk(thin=True, **OFF), PROXY, method="vddk"),
    Case("nbdssl", disk(vm_snapshots=0), PROXY, "only a powered-off virtual machine is written"),
    Case("nbd", disk(**OFF), PROXY, method="vddk"),
    Case("https", disk(**OFF), PROXY, "existing disks are not written by HTTPS"),
    Case("https", replace(DISK, vm=None), PROXY, "existing disks are not written by HTTPS"),
    # A machine that is about to be made.
    Case("https", disk(**NEW), PROXY, method="import_lease"),
    Case("https", disk(**NEW), proxy(vddk=None, vm=None, plugins=frozenset()), method="import_lease"),
    Case("https", disk(datastore=store("vsan"), **NEW), PROXY, method="import_lease"),
    Case("https", disk(thin=False, controller="ide", **NEW), PROXY, method="import_lease"),
    Case("https", disk(**NEW), proxy(is_vcenter=False), method="import_lease"),
    Case("https", disk(datastore=AWAY, **NEW), PROXY, "no ESXi host with datastore 'vmfs01' can serve now"),
    Case("https", disk(**NEW), proxy(missing_privileges={"import_lease": ("VApp.Import",)}), "privilege VApp.Import"),
    Case("https", disk(**NEW), proxy(missing_privileges={"export_lease": ("VApp.Export",)}), method="import_lease"),
    Case("nbdssl", disk(**NEW), PROXY, method="vddk"),
    Case("hotadd", disk(**NEW), PROXY, method="vddk"),
]


def _candidate(case: Case, direction: str) -> Candidate:
    listed = [case.transport] if case.first else ["nbd", case.transport]
    return consider(case.disk, case.proxy, listed, direction)[-1]


def _name(case: Case) -> str:
    return f"{case.transport}-{case.reason or case.method}"


@pytest.mark.parametrize(
    ("case", "direction"),
    [(case, READ) for case in READING] + [(case, WRITE) for case in WRITING],
    ids=[_name(case) for case in [*READING, *WRITING]],
)
def test_a_transport_and_what_speaks_against_it(case: Case, direction: str) -> None:
    found = _candidate(case, direction)
    if case.reason is None:
        assert (found.usable, found.reasons, found.method) == (True, [], case.method)
    else:
        assert not found.usable and found.method == ""
        assert case.reason in "; ".join(found.reasons), found.reasons


def test_what_a_transport_costs_is_noted() -> None:
    def notes(transport: str, facts: DiskFacts, machine: ProxyFacts = PROXY) -> str:
        return "; ".join(consider(facts, machine, [transport], READ)[0].notes)

    assert notes("nbdssl", disk()) == notes("san", disk()) == notes("hotadd", disk()) == ""
    assert "plain text" in notes("nbd", disk())
    assert "no ESXi host with datastore 'vmfs01' can serve now" in notes("nbdssl", disk(datastore=AWAY))
    assert "SATA" in notes("hotadd", disk(controller="sata"))
    lease = notes("https", disk())
    assert "can't be migrated or powered on" in lease and "whole disk crosses" in lease
    assert "ESXi gives no file of a running machine" in lease
    assert notes("https", disk(**OFF)) == ""
    nfs = disk(datastore=store("NFS", moid="datastore-13"), vm_host_moid="host-11")
    assert "stand still" in notes("hotadd", nfs)
    assert "stand still" not in notes("hotadd", replace(nfs, vm=replace(MACHINE, host_moid="host-10")))
    without = notes("hotadd", disk(), proxy(vddk=None, vddk_problem=NO_VDDK))
    assert without == f"not by VDDK: {NO_VDDK}"


def test_the_order_of_the_list_decides() -> None:
    assert plan(DISK, PROXY, ALL, READ, False).chosen == "san"
    found = plan(DISK, PROXY, ["https", "nbd", "san"], READ, False)
    assert (found.chosen, found.method) == ("https", "export_lease")
    assert [candidate.transport for candidate in found.usable()] == ["https", "nbd", "san"]


def test_those_that_are_passed_over_or_fail_are_told_in_the_order_of_the_list() -> None:
    found = plan(disk(datastore=store("NFS", moid="datastore-13")), PROXY, ALL, READ, False)
    assert found.chosen == "hotadd"
    assert found.reasons() == ["san: datastore 'nfs01' is NFS, which has no LUN"]
    failed = {"hotadd": "it failed: no unit", "nbdssl": "it broke"}
    assert found.reasons("nbd", failed) == [*found.reasons(), "hotadd: it failed: no unit", "nbdssl: it broke"]


def test_without_anything_every_reason_is_told() -> None:
    nothing = ProxyFacts(None, NO_VDDK)
    with pytest.raises(TransportError) as caught:
        plan(DiskFacts("Hard disk 1", "[vmfs01] a/a.vmdk"), nothing, ALL, READ, False)
    text = str(caught.value)
    assert "Hard disk 1" in text and NO_VDDK in text and "nbdssl, nbd:" in text
    assert all(name in text for name in ALL)
    assert [item["usable"] for item in caught.value.details["candidates"]] == [False] * 5


def test_what_helps_a_template() -> None:
    """Another transport than https never does."""
    template = disk(vm_template=True, **OFF)
    for transports, changed, remedy in (
        (["nbdssl", "hotadd"], {}, "Add https to 'transports': only that reads a template"),
        (["san", "https"], {"plugins": frozenset()}, "Make https work, which alone reads a template"),
    ):
        with pytest.raises(TransportError) as caught:
            plan(template, proxy(**changed), transports, READ, False)
        assert str(caught.value.remedy).startswith(remedy)
    with pytest.raises(TransportError) as caught:
        plan(template, PROXY, ["nbdssl", "https"], READ, True)
    assert str(caught.value.remedy).startswith("Put https first")


def test_an_import_lease_brings_all_disks_of_a_new_machine_or_none() -> None:
    """Beside a disk that only https can write, the others come that way too, and say why."""
    only_https = proxy(vddk=None, vddk_problem=NO_VDDK)
    transports = ["hotadd", "nbdssl", "https"]
    plans = {
        2000: plan(disk(**NEW), only_https, transports, WRITE, False),
        3000: plan(disk(controller="ide", **NEW), only_https, transports, WRITE, False),
    }
    labels = {2000: "Hard disk 1", 3000: "Hard disk 2"}
    assert [one.method for one in plans.values()] == ["proxy_hotadd", "import_lease"]
    together = plan_new_machine(plans, labels)
    assert {(one.chosen, one.method) for one in together.values()} == {("https", "import_lease")}
    assert "hotadd: disk 'Hard disk 2' can only be written by https" in together[2000].reasons()[0]
    assert [item.transport for item in together[2000].usable()] == ["https"]
    assert "waits in a file" in "".join(together[3000].notes("https"))
    # All by one transport, or all by https: nothing changes.
    for key in plans:
        assert plan_new_machine({key: plans[key]}, labels) == {key: plans[key]}
    without = plan(disk(**NEW), only_https, ["hotadd"], WRITE, False)
    with pytest.raises(TransportError, match="can't be written by one transport"):
        plan_new_machine({2000: without, 3000: plans[3000]}, labels)


def test_https_after_the_others_have_failed() -> None:
    failed = by_import({2000: plan(disk(**NEW), PROXY, ["nbdssl", "https"], WRITE, False)}, "it failed: cut")
    assert failed is not None and failed[2000].reasons() == ["nbdssl: it failed: cut"]
    assert by_import({2000: plan(disk(**NEW), PROXY, ["nbdssl"], WRITE, False)}, "it failed") is None
    assert by_import({2000: plan(disk(**NEW), PROXY, ["nbdssl", "https"], WRITE, True)}, "it failed") is None


def test_a_required_transport_is_the_first_one_or_an_error() -> None:
    required = plan(DISK, PROXY, ["nbdssl", "nbd"], READ, True)
    assert required.chosen == "nbdssl" and [item.transport for item in required.usable()] == ["nbdssl"]
    with pytest.raises(TransportError) as caught:
        plan(DISK, proxy(luns={}), ALL, READ, True)
    assert "san" in str(caught.value) and "does not see LUN" in str(caught.value)
    assert "Put hotadd first" in str(caught.value)


@pytest.mark.parametrize("transports", [[], ["nbd", "nbd"], ["file"], ["nbdssl:nbd"]])
def test_lists_that_make_no_sense_are_refused(transports: List[str]) -> None:
    with pytest.raises(InputError):
        plan(DISK, PROXY, transports, READ, False)


def test_there_are_enough_of_them() -> None:
    assert len(READING) + len(WRITING) >= 60
    assert {case.transport for case in WRITING} == {case.transport for case in READING} == set(ALL)
