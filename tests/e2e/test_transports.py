# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every transport moves the same bytes, says what it was, and is left for the next one where it does not work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.transport.access import run_access
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import find_library
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from harness import MIB, Ansible, Backups, Simulator
from modules import Modules

ALL = ["san", "hotadd", "nbdssl", "nbd", "https"]
KEYS = (2000, 2001)
# Without a name, it is looked for where the plugin was built for, and that is not here.
NOWHERE = None
DEFAULT = "/vmware-vix-disklib"
# Transport, options, method.
WAYS = [
    ("san", {}, "vddk"),
    ("hotadd", {}, "vddk"),
    ("hotadd", {"vddk_libdir": NOWHERE}, "proxy_hotadd"),
    ("nbdssl", {}, "vddk"),
    ("nbd", {}, "vddk"),
    ("nbd", {"wire_compression": "zlib"}, "vddk"),
    ("https", {"vddk_libdir": NOWHERE}, "export_lease"),
]
OVER_THE_LAN = ("nbdssl", "nbd")


class Proxy(Modules):
    """The modules as they run on proxy01, with its devices."""

    def export_options(self, **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        devices = {"device_dir": facts["device_dir"], "sysfs_dir": facts["sysfs_dir"]}
        return super().export_options(**{**devices, "transports": ALL, **options})

    def restore_options(self, **options: Any) -> Dict[str, Any]:
        return {**self.export_options(vm_name="app01", target="in_place", overwrite=True), **options}

    def control(self, op: str, **fields: Any) -> Any:
        return self.simulator.control.call(op, **fields)

    def attached(self) -> List[Any]:
        """What is attached to proxy01 that is not its own."""
        return [item for item in self.control("attachments") if item]

    def opened(self) -> int:
        """Connections for disk data that any host has seen."""
        return sum(host["opened"] for host in self.control("nfc")["hosts"].values())

    def asked(self) -> int:
        """Questions about allocated blocks so far, to hosts and to what VDDK reads by itself."""
        places = self.control("nfc")
        return sum(place["queries"] for group in ("hosts", "local") for place in places[group].values())

    def plug_in(self) -> None:
        """Everything as it was at the beginning."""
        self.control("set_lun", datastore="vmfs01", visible=True)
        self.control("fill_units", vm="proxy01", leave=None)
        self.control("restore_network")
        self.control("nfc", clear_faults=True, bytes_per_second=None, serve=None, thumbprint="sha1")
        self.control("proxy", identity="normal")


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """Small disks: they are read very often here."""
    running = Simulator(tmp_path_factory.mktemp("simulator") / "state")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def app01(simulator: Simulator, repository: Path) -> Iterator[Proxy]:
    modules = Proxy(simulator, repository)
    yield modules
    modules.plug_in()
    for snapshot in reversed(simulator.snapshots("app01")):
        modules.remove_snapshot(snapshot["moid"])


@pytest.fixture
def snapshot(app01: Proxy) -> str:
    """A snapshot of disks with some data in each."""
    for key in KEYS:
        app01.simulator.write("app01", key, *range(0, 8 * MIB, MIB), 12 * MIB + 512, seed=key, length=200 * 512)
    return app01.snapshot("read by many")


def _used(result: Dict[str, Any]) -> List[Tuple[str, str]]:
    return [(disk["transport"], disk["method"]) for disk in result["disks"]]


@pytest.mark.parametrize(("transport", "options", "method"), WAYS)
def test_each_reads_the_same_bytes(
    app01: Proxy, snapshot: str, transport: str, options: Dict[str, Any], method: str
) -> None:
    before, asked = app01.opened(), app01.asked()
    result = app01.export(snapshot, "one", transports=[transport], require_transport=True, **options)
    assert not result["failed"], result["msg"]
    assert _used(result) == [(transport, method)] * 2
    assert [disk["transport_reasons"] for disk in result["disks"]] == [[], []]
    assert {disk["transport"] for disk in app01.backups.manifest("app01", "one")["disks"].values()} == {transport}
    assert (app01.opened() > before) == (transport in OVER_THE_LAN)
    assert (app01.asked() > asked) == (method == "vddk")
    for key in KEYS:
        assert app01.backups.disk("app01", key, "one") == app01.simulator.disk("app01", key, snapshot)
    assert app01.attached() == []
    app01.verify("one")

    # And what changed since, by the same way.
    app01.remove_snapshot(snapshot)
    app01.track_changes()
    base = app01.snapshot("base")
    assert not app01.export(base, "two", transports=[transport], **options)["failed"]
    app01.remove_snapshot(base)
    app01.simulator.write("app01", 2000, 3 * MIB, seed=77)
    changed = app01.snapshot("changed")
    asked = app01.asked()
    result = app01.export(changed, "three", transports=[transport], **options)
    assert [disk["mode"] for disk in result["disks"]] == ["incremental", "incremental"]
    assert _used(result) == [(transport, method), ("none", None)]
    assert result["disks"][0]["bytes_read"] <= 2 * MIB
    # What change tracking named is read, and nobody is asked what of it is allocated.
    assert app01.asked() == asked
    assert app01.backups.disk("app01", 2000, "three") == app01.simulator.disk("app01", 2000, changed)


def test_a_machine_that_is_off_is_read_as_files(simulator: Simulator, repository: Path) -> None:
    modules = Proxy(simulator, repository, "restore01")
    simulator.write("restore01", 2000, MIB, 40 * MIB, seed=3)
    moid = modules.snapshot("of a machine that is off")
    result = modules.export(moid, "one", transports=["https"], vddk_libdir=NOWHERE)
    assert not result["failed"], result["msg"]
    assert _used(result) == [("https", "folder")] * 2
    for key in KEYS:
        assert modules.backups.disk("restore01", key, "one") == simulator.disk("restore01", key, moid)
    modules.remove_snapshot(moid)


@pytest.mark.parametrize(
    ("transport", "options", "method"),
    [("hotadd", {}, "vddk"), ("hotadd", {"vddk_libdir": NOWHERE}, "proxy_hotadd"), ("nbdssl", {}, "vddk")],
)
def test_each_writes_the_same_bytes(
    app01: Proxy, snapshot: str, transport: str, options: Dict[str, Any], method: str
) -> None:
    simulator = app01.simulator
    assert not app01.export(snapshot, "one", transports=["nbdssl"])["failed"]
    for key in KEYS:
        simulator.write("restore01", key, 0, 5 * MIB, seed=99)
    disks = [{"key": key, "target_key": key} for key in KEYS]
    wanted = app01.restore_options(
        name="restore01", disks=disks, transports=[transport], require_transport=True, **options
    )
    restored = app01.run("vadp_disk_restore", **wanted)
    assert not restored["failed"], restored
    assert [(disk["transport"], disk["method"], disk["verified"]) for disk in restored["restored"]] == [
        (transport, method, True)
    ] * 2
    for key in KEYS:
        assert simulator.disk("restore01", key) == simulator.disk("app01", key, snapshot)
    assert app01.attached() == [] and not list(app01.repository.glob("vms/*/runs/*"))


def _reasons(result: Dict[str, Any]) -> List[str]:
    assert not result["failed"], result["msg"]
    assert [item["transport"] for item in result["disks"]] == [result["disks"][0]["transport"]] * 2
    return list(result["disks"][0]["transport_reasons"])


def test_unplugging_each_in_turn_falls_to_the_next(app01: Proxy, snapshot: str) -> None:
    held = {key: app01.simulator.disk("app01", key, snapshot) for key in KEYS}
    options: Dict[str, Any] = {"io_timeout": 6, "mode": "full"}

    def back_up(point: str, transport: str, method: str, **more: Any) -> List[str]:
        result = app01.export(snapshot, point, **options, **more)
        reasons = _reasons(result)
        assert _used(result) == [(transport, method)] * 2, result
        assert [reason.split(":")[0] for reason in reasons] == ALL[: ALL.index(transport)]
        assert {key: app01.backups.disk("app01", key, point) for key in KEYS} == held
        return reasons

    assert back_up("all", "san", "vddk") == []

    app01.control("set_lun", datastore="vmfs01", visible=False)
    reasons = back_up("no-lun", "hotadd", "vddk")
    assert "this machine does not see LUN naa." in reasons[0]

    # Without VDDK the disk is attached by us, and with neither VDDK nor a place for it there is the export.
    reasons = back_up("no-vddk", "hotadd", "proxy_hotadd", vddk_libdir=NOWHERE)
    assert DEFAULT in reasons[0]
    app01.control("fill_units", vm="proxy01", leave=0)
    reasons = back_up("no-vddk-no-units", "https", "export_lease", vddk_libdir=NOWHERE)
    assert "all SCSI units of 'proxy01' are taken" in reasons[1] and DEFAULT in reasons[2]

    reasons = back_up("no-units", "nbdssl", "vddk")
    assert "all SCSI units of 'proxy01' are taken" in reasons[1]

    app01.control("cut_network")
    reasons = back_up("no-network", "https", "export_lease")
    assert "902" in reasons[2] or "connection" in reasons[2], reasons
    assert reasons[3] == "nbd: not tried: it goes the way of nbdssl, which failed"
    assert app01.attached() == []


@pytest.mark.parametrize(("options", "method"), [({}, "vddk"), ({"vddk_libdir": NOWHERE}, "proxy_hotadd")])
def test_units_that_only_newer_controllers_have_are_room(
    app01: Proxy, snapshot: str, options: Dict[str, Any], method: str
) -> None:
    """Units 0 to 15 of all four controllers are taken; a PVSCSI controller has more (VADP facts 28)."""
    assert app01.control("fill_units", vm="proxy01", leave=2) == {"free": 2, "controllers": 4}
    result = app01.export(snapshot, "one", transports=["hotadd"], **options)
    assert not result["failed"], result["msg"]
    assert _used(result) == [("hotadd", method)] * 2
    for key in KEYS:
        assert app01.backups.disk("app01", key, "one") == app01.simulator.disk("app01", key, snapshot)


def test_the_report_of_a_backup_says_so(simulator: Simulator, ansible: Ansible, repository: Path) -> None:
    """Through playbook backup.yml: the table names the transport, and below it stands why not the others."""
    backups = Backups(simulator, ansible, repository)
    devices = {"device_dir": simulator.facts["device_dir"], "sysfs_dir": simulator.facts["sysfs_dir"]}
    simulator.control.call("set_lun", datastore="vmfs01", visible=False)
    try:
        outcome = backups.run("app01", point="p", mode="full", disks=["2000"], **devices).ok()
    finally:
        simulator.control.call("set_lun", datastore="vmfs01", visible=True)
    line = next(line for line in outcome.stdout.splitlines() if line.startswith("app01  p "))
    assert " hotadd " in line
    assert "san: this machine does not see LUN" in outcome.stdout
    assert backups.disk("app01", 2000, "p") == simulator.disk("app01", 2000)
    assert simulator.snapshots("app01") == []


def test_a_transport_that_breaks_in_the_middle(app01: Proxy, snapshot: str) -> None:
    """What it has read is kept; the next one reads the rest of the same snapshot."""
    faults = {"count": -1, "after": 4, "vix": 14011, "action": "fail", "host": "127.0.1.1"}
    app01.control("nfc", read_faults=faults, serve="127.0.1.1")
    result = app01.export(
        snapshot, "one", transports=["nbdssl", "nbd", "hotadd"], io_timeout=6, disks=["2000"], mode="full"
    )
    assert not result["failed"], result["msg"]
    disk = result["disks"][0]
    assert (disk["transport"], disk["method"]) == ("hotadd", "vddk")
    assert disk["transport_reasons"][0].startswith("nbdssl: it broke after ")
    assert "which were kept" in disk["transport_reasons"][0]
    assert app01.backups.disk("app01", 2000, "one") == app01.simulator.disk("app01", 2000, snapshot)
    app01.verify("one")

    # The required one is not left.
    result = app01.export(snapshot, "two", transports=["nbdssl", "hotadd"], require_transport=True, io_timeout=6)
    assert result["failed"] and "14011" in result["msg"]
    assert app01.backups.points("app01") == ["one"]


def test_a_vddk_that_wants_sha256_gets_it_second(app01: Proxy, snapshot: str) -> None:
    app01.control("nfc", thumbprint="sha256")
    result = app01.export(snapshot, "one", transports=["nbdssl"], disks=["2000"], mode="full")
    assert not result["failed"], result["msg"]
    assert app01.backups.disk("app01", 2000, "one") == app01.simulator.disk("app01", 2000, snapshot)
    with Session.connect(Connection(**app01.simulator.connection)) as session:
        vm = find_vm(session, name="app01")
        for operation in ("prepare", "end"):
            assert run_access(operation, session, vm, find_library(app01.simulator.facts["vddk_libdir"])) is not None


def test_a_mode_that_vddk_replaced_silently_is_not_taken_for_it(app01: Proxy, snapshot: str, tmp_path: Path) -> None:
    """The planner sees a LUN that VDDK does not: its open falls back to nbdssl, and so the next transport is tried."""
    devices = tmp_path / "devices"
    devices.mkdir()
    for link in Path(app01.simulator.facts["device_dir"]).iterdir():
        (devices / link.name).symlink_to(link.resolve())
    app01.control("set_lun", datastore="vmfs01", visible=False)
    lun = next(path for path in devices.iterdir() if path.name.startswith("naa."))
    lun.unlink()
    (tmp_path / "lun").write_bytes(bytes(MIB))
    lun.symlink_to(tmp_path / "lun")
    options: Dict[str, Any] = {"device_dir": str(devices), "disks": ["2000"], "mode": "full"}
    result = app01.export(snapshot, "one", transports=["san", "nbd"], **options)
    assert not result["failed"], result["msg"]
    assert result["disks"][0]["transport"] == "nbd"
    assert (
        "VDDK does not use the transport that was asked for: it uses nbdssl"
        in (result["disks"][0]["transport_reasons"][0])
    )
    result = app01.export(snapshot, "two", transports=["san", "nbd"], require_transport=True, **options)
    assert result["failed"] and "it uses nbdssl, allowed is san" in result["msg"]


@pytest.mark.parametrize("identity", ["normal", "swapped", "serial_only", "mac_only"])
def test_the_proxy_knows_itself(app01: Proxy, snapshot: str, identity: str) -> None:
    app01.control("proxy", identity=identity)
    result = app01.export(snapshot, "one", transports=["hotadd"], disks=["2001"], vddk_libdir=NOWHERE)
    assert not result["failed"] and _used(result)[0] == ("hotadd", "proxy_hotadd"), result


def test_a_proxy_outside_and_one_that_is_not_clear(app01: Proxy, snapshot: str) -> None:
    hotadd: Dict[str, Any] = {"transports": ["hotadd"], "disks": ["2001"], "vddk_libdir": NOWHERE}
    app01.control("proxy", identity="none")
    result = app01.export(snapshot, "one", **hotadd)
    assert result["failed"] and "this machine is not a virtual machine of this vCenter" in result["msg"]
    assert "no virtual machine there has the hardware UUID" in result["msg"]
    named = app01.export(snapshot, "one", proxy_name="proxy01", **hotadd)
    assert not named["failed"], named

    app01.control("proxy", identity="ambiguous")
    result = app01.export(snapshot, "two", **hotadd)
    assert result["failed"] and result["error"]["kind"] == "AmbiguousError"
    assert len(result["error"]["details"]["matches"]) == 2 and "proxy_moid" in result["msg"]
    app01.control("proxy", identity="normal")
    result = app01.export(snapshot, "two", proxy_physical=True, **hotadd)
    assert result["failed"] and "proxy_physical says so" in result["msg"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transports": ["san:nbdssl"]}, "san:nbdssl"),
        ({"transports": ["floppy"]}, "floppy"),
        ({"transports": ["nbd", "nbd"]}, "listed twice"),
        ({"transports": []}, "No transport is allowed"),
        ({"device_dir": "/nonexistent/by-id"}, "device_dir names no folder"),
        ({"device_dir": "/etc/passwd"}, "device_dir names no folder"),
        ({"sysfs_dir": "/nonexistent/sys"}, "sysfs_dir names no folder"),
        ({"nfc_port": 0}, "nfc_port is out of range"),
        ({"nfc_port": 70000}, "nfc_port is out of range"),
        ({"nfc_host_limit": 0}, "nfc_host_limit is out of range"),
        ({"wire_compression": "bzip2"}, "bzip2"),
        ({"proxy_name": "proxy01", "proxy_moid": "vm-109"}, "proxy is named twice"),
        ({"proxy_physical": True, "proxy_uuid": "x"}, "proxy is named twice"),
    ],
)
@pytest.mark.parametrize("module", ["vadp_disk_export", "vadp_disk_restore"])
def test_what_makes_no_sense_is_refused_first(app01: Proxy, module: str, options: Dict[str, Any], words: str) -> None:
    seen = app01.simulator.last_call()
    wanted = app01.export_options(snapshot_name="any", **options)
    if module == "vadp_disk_restore":
        del wanted["snapshot_name"]
        wanted.update(vm_name="app01", target="in_place", overwrite=True)
    result = app01.run(module, **wanted)
    assert result["failed"] and words in result["msg"], result
    assert app01.control("calls", since=seen) == []
    assert os.listdir(app01.repository) == ["repository.json"]


def test_a_thumbprint_that_is_none_is_refused_first(app01: Proxy) -> None:
    seen = app01.simulator.last_call()
    result = app01.export("snapshot-1", "one", thumbprint="AA:BB")
    assert result["failed"] and "The thumbprint can't be used" in result["msg"]
    assert app01.control("calls", since=seen) == [] and os.listdir(app01.repository) == ["repository.json"]
