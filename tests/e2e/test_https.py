# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Transport https against the simulator: raw files of its datastores, and the export lease of a snapshot."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import nbd
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.copier import copy
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir, run_tool
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.transport.endpoints import Endpoint
from ansible_collections.openvadp.backup.plugins.module_utils.transport.https import (
    open_folder,
    open_lease,
    recover_leases,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk, disks_of
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef, find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.snapshots import (
    Snapshot,
    create_snapshot,
    remove_snapshot,
    snapshot_disks,
)
from harness import MIB, Simulator, file_sha256
from pyVmomi import vim
from test_secrets import Watch

UUID = "5b0f6c1e-7a1a-4b6e-9d3c-0d5a0d1b2c3d"
IO_TIMEOUT = 60


class Proxy:
    """What the parts of a run have in common, for the tests here."""

    def __init__(self, simulator: Simulator, session: Session, folder: Path) -> None:
        self.simulator = simulator
        self.control = simulator.control
        self.session = session
        self.folder = folder
        self.runs = folder / "runs"
        self.runs.mkdir()
        self.run_dir = RuntimeDir("test-https")

    def vm(self, name: str) -> VmRef:
        return find_vm(self.session, name=name)

    def disk(self, vm: VmRef, key: int) -> Disk:
        """A disk as the VM has it now."""
        devices = self.session.read(vm.obj, "config.hardware.device")["config.hardware.device"]
        return next(disk for disk in disks_of(devices) if disk.key == key)

    @contextlib.contextmanager
    def snapshot(self, vm: VmRef) -> Iterator[Tuple[Snapshot, Dict[int, Disk]]]:
        taken = create_snapshot(self.session, vm, f"test-{time.monotonic_ns()}", quiesce="never").snapshot
        try:
            yield taken, {disk.key: disk for disk in snapshot_disks(self.session, taken)}
        finally:
            remove_snapshot(self.session, vm, taken)

    def run(self) -> Run:
        uuid = "00000000-0000-0000-0000-000000000001"
        fields: Dict[str, Any] = {"repository_id": UUID, "vm_uuid": uuid, "vm_moid": None, "vm_name": None}
        return Run.create(self.runs, new_run_id(), point=None, **fields)

    def bytes_of(self, endpoint: Endpoint) -> Tuple[int, str]:
        """(size, SHA-256) of what an endpoint serves, by plain qemu-img."""
        raw = self.folder / f"raw-{time.monotonic_ns()}"
        run_tool(
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", endpoint.uri, str(raw)], what="The disk was not read"
        )
        try:
            return file_sha256(raw)
        finally:
            raw.unlink()

    def calls(self, since: int, *names: str) -> List[Dict[str, Any]]:
        return [call for call in self.control.call("calls", since=since) if call["method"] in names]

    def folder_bytes(self, vm: VmRef, disk: Disk) -> Tuple[int, str]:
        with open_folder(self.session, vm, disk, run_dir=self.run_dir, io_timeout=IO_TIMEOUT) as endpoint:
            assert (endpoint.transport, endpoint.method) == ("https", "folder")
            return self.bytes_of(endpoint)

    def lease(self, vm: VmRef, snapshot: Snapshot, disk: Disk, run: Run, **options: Any) -> Any:
        stage = self.folder / f"{disk.key}.stage"
        options = {"run": run, "run_dir": self.run_dir, "stage": stage, "io_timeout": IO_TIMEOUT, **options}
        return open_lease(self.session, vm, snapshot.moid, disk, **options)

    def lease_bytes(self, vm: VmRef, snapshot: Snapshot, disk: Disk, **options: Any) -> Tuple[int, str]:
        run = self.run()
        with self.lease(vm, snapshot, disk, run, **options) as endpoint:
            assert (endpoint.transport, endpoint.method) == ("https", "export_lease")
            found = self.bytes_of(endpoint)
        assert run.intents() == []
        return found


@pytest.fixture
def proxy(simulator: Simulator, tmp_path: Path) -> Iterator[Proxy]:
    defaults = {
        "lease_timeout": 300.0,
        "lease_thumbprint": "sha1",
        "lease_host": "*",
        "lease_bytes_per_second": None,
        "lease_cuts": 0,
        "folder_ranges": True,
        "folder_cuts": 0,
    }
    try:
        with Session.connect(Connection(**simulator.connection)) as session:
            proxy = Proxy(simulator, session, tmp_path)
            with proxy.run_dir:
                yield proxy
                left = sorted(path.name for path in Path(proxy.run_dir.path).iterdir())
                # Logs stay as long as the folder; nothing else does.
                assert [name for name in left if not name.endswith(".log")] == []
        assert list(tmp_path.glob("*.stage")) == []
    finally:
        simulator.control.call("set_settings", **defaults)
        simulator.control.call("clear_injections")


# /folder


def test_a_powered_off_vm_is_read_as_a_file(proxy: Proxy) -> None:
    vm = proxy.vm("win01")
    assert proxy.folder_bytes(vm, proxy.disk(vm, 2000)) == proxy.simulator.disk("win01", 2000)


def test_a_template_is_read_as_a_file(proxy: Proxy) -> None:
    vm = proxy.vm("template01")
    assert vm.template
    assert proxy.folder_bytes(vm, proxy.disk(vm, 2000)) == proxy.simulator.disk("template01", 2000)


def test_the_snapshot_of_a_powered_off_vm_is_its_base(proxy: Proxy) -> None:
    vm = proxy.vm("restore01")
    proxy.simulator.write("restore01", 2001, 0, 8 * MIB, seed=7, length=3 * MIB)
    with proxy.snapshot(vm) as (taken, disks):
        frozen = proxy.simulator.disk("restore01", 2001, taken.moid)
        proxy.simulator.write("restore01", 2001, MIB, seed=8)
        assert proxy.folder_bytes(vm, disks[2001]) == frozen
        # What the VM has now stands on that file.
        with pytest.raises(TransportError, match="not a base disk|stands on another file"):
            proxy.folder_bytes(vm, proxy.disk(vm, 2001))


def test_changed_areas_alone_are_read(proxy: Proxy) -> None:
    vm = proxy.vm("win01")
    disk = proxy.disk(vm, 2000)
    areas = Extents.of([(0, 65536), (8 * MIB, 128 * 1024)])
    layer = proxy.folder / "layer.qcow2"
    image.create_layer(str(layer), disk.capacity_bytes)
    with open_folder(proxy.session, vm, disk, run_dir=proxy.run_dir, io_timeout=IO_TIMEOUT) as source, image.serve(
        str(layer), run_dir=proxy.run_dir, writable=True
    ) as target:
        result = copy(source.uri, target.uri, capacity_bytes=disk.capacity_bytes, areas=areas, **source.copy_options)
    assert result.bytes_read == areas.total_bytes


@pytest.mark.parametrize("how", ["thumbprint", "unverified"])
def test_the_certificate_is_pinned_or_left(proxy: Proxy, how: str) -> None:
    thumbprint = proxy.session.thumbprints["sha256"] if how == "thumbprint" else None
    connection = replace(proxy.session.connection, ca_path=None, validate_certs=False, thumbprint=thumbprint)
    with Session.connect(connection) as session:
        proxy.session = session
        vm = proxy.vm("win01")
        assert proxy.folder_bytes(vm, proxy.disk(vm, 2000)) == proxy.simulator.disk("win01", 2000)


def test_the_plugin_trusts_the_pinned_certificate_alone(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = replace(proxy.session.connection, validate_certs=False, thumbprint=proxy.session.thumbprints["sha1"])
    with Session.connect(connection) as session:
        vm = find_vm(session, name="win01")
        proxy.session = session
        disk = proxy.disk(vm, 2000)
        # As if the plugin met another server than we did.
        monkeypatch.setattr(ssl, "DER_cert_to_PEM_cert", lambda _der: _another_certificate(proxy.folder))
        with pytest.raises(TransportError, match="certificate"):
            proxy.folder_bytes(vm, disk)


def _another_certificate(folder: Path) -> str:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(folder / "other.key"), "-out", str(folder / "other.pem"), "-subj", "/CN=127.0.0.1"]
    run_tool([*command, "-addext", "subjectAltName=IP:127.0.0.1"], what="No certificate was made")
    return (folder / "other.pem").read_text(encoding="ascii")


def test_an_unknown_authority_is_refused_by_the_plugin_too(proxy: Proxy) -> None:
    vm = proxy.vm("win01")
    disk = proxy.disk(vm, 2000)
    _another_certificate(proxy.folder)
    proxy.session.connection.ca_path = str(proxy.folder / "other.pem")
    with pytest.raises(TransportError, match="certificate|verif"):
        proxy.folder_bytes(vm, disk)


def test_ignored_ranges_are_refused_at_once(proxy: Proxy) -> None:
    vm = proxy.vm("win01")
    proxy.control.call("set_settings", folder_ranges=False)
    since = proxy.simulator.last_call()
    with pytest.raises(TransportError, match="ignores ranges") as caught:
        proxy.folder_bytes(vm, proxy.disk(vm, 2000))
    assert "Use another transport" in str(caught.value)
    assert len(proxy.calls(since, "GET /folder")) <= 2


def test_a_running_vm_is_refused_with_its_reason(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    with pytest.raises(TransportError, match="that runs"):
        proxy.folder_bytes(vm, proxy.disk(vm, 2000))


def test_a_vm_that_starts_meanwhile_is_told(proxy: Proxy) -> None:
    vm = proxy.vm("copy01")
    disk = proxy.disk(vm, 2000)
    layer = proxy.folder / "layer.qcow2"
    image.create_layer(str(layer), disk.capacity_bytes)
    with open_folder(proxy.session, vm, disk, run_dir=proxy.run_dir, io_timeout=4) as source:
        proxy.control.call("power", vm="copy01", state="poweredOn")
        try:
            with image.serve(str(layer), run_dir=proxy.run_dir, writable=True) as target, pytest.raises(
                DataPathError
            ) as caught:
                copy(source.uri, target.uri, capacity_bytes=disk.capacity_bytes, io_timeout=30)
            error = source.explain(caught.value)
        finally:
            proxy.control.call("power", vm="copy01", state="poweredOff")
    assert isinstance(error, TransportError)
    assert "powered on" in str(error)


def test_cut_connections_and_an_ended_session_are_survived(proxy: Proxy) -> None:
    vm = proxy.vm("win01")
    disk = proxy.disk(vm, 2000)
    with open_folder(proxy.session, vm, disk, run_dir=proxy.run_dir, io_timeout=IO_TIMEOUT) as endpoint:
        logins = proxy.session.logins
        handle = nbd.NBD()
        handle.connect_uri(endpoint.uri)
        proxy.control.call("set_settings", folder_cuts=2)
        proxy.control.call("expire_sessions")
        digest = hashlib.sha256()
        for offset in range(0, disk.capacity_bytes, MIB):
            digest.update(handle.pread(min(MIB, disk.capacity_bytes - offset), offset))
        handle.shutdown()
        assert (disk.capacity_bytes, digest.hexdigest()) == proxy.simulator.disk("win01", 2000)
        assert proxy.control.call("set_settings")["folder_cuts"] == 0
        assert proxy.session.logins == logins + 1


def test_a_proxy_server_of_the_environment_is_left_aside(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    vm = proxy.vm("win01")
    assert proxy.folder_bytes(vm, proxy.disk(vm, 2000)) == proxy.simulator.disk("win01", 2000)


# Export leases


def test_two_disks_of_a_running_vm_share_a_lease(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    with proxy.snapshot(vm) as (taken, disks):
        frozen = {key: proxy.simulator.disk("app01", key, taken.moid) for key in disks}
        proxy.simulator.write("app01", 2000, 0, MIB, seed=3)
        since = proxy.simulator.last_call()
        proxy.control.call("set_settings", lease_bytes_per_second=4 * MIB)
        with ThreadPoolExecutor(2) as pool:
            futures = {key: pool.submit(proxy.lease_bytes, vm, taken, disk) for key, disk in disks.items()}
            assert {key: future.result() for key, future in futures.items()} == frozen
        made = [call["method"] for call in proxy.control.call("calls", since=since)]
        assert made.count("ExportSnapshot") == made.count("HttpNfcLeaseComplete") == 1
        assert "HttpNfcLeaseAbort" not in made


@pytest.mark.parametrize("thumbprint", ["sha256", "empty"])
@pytest.mark.parametrize("host", ["*", "localhost"])
def test_the_hosts_certificate_is_verified(proxy: Proxy, host: str, thumbprint: str) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_host=host, lease_thumbprint=thumbprint)
    with proxy.snapshot(vm) as (taken, disks):
        assert proxy.lease_bytes(vm, taken, disks[2000]) == proxy.simulator.disk("app01", 2000, taken.moid)


def test_another_certificate_is_refused(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_thumbprint="wrong")
    with proxy.snapshot(vm) as (taken, disks):
        since = proxy.simulator.last_call()
        with pytest.raises(TransportError, match="certificate is another one"):
            proxy.lease_bytes(vm, taken, disks[2000])
        assert len(proxy.calls(since, "HttpNfcLeaseAbort")) == 1
        assert proxy.calls(since, "GET /nfc") == []


def test_no_thumbprint_is_no_leave_to_accept_anything(proxy: Proxy) -> None:
    """The session verifies nothing; another host without a thumbprint still needs an authority."""
    connection = replace(proxy.session.connection, ca_path=None, validate_certs=False)
    proxy.control.call("set_settings", lease_host="localhost", lease_thumbprint="empty")
    with Session.connect(connection) as session:
        proxy.session = session
        vm = proxy.vm("app01")
        with proxy.snapshot(vm) as (taken, disks), pytest.raises(TransportError, match="is not trusted"):
            proxy.lease_bytes(vm, taken, disks[2000])


def test_a_cut_download_starts_over(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_cuts=2)
    with proxy.snapshot(vm) as (taken, disks):
        since = proxy.simulator.last_call()
        assert proxy.lease_bytes(vm, taken, disks[2000]) == proxy.simulator.disk("app01", 2000, taken.moid)
        assert [call["fault"] for call in proxy.calls(since, "GET /nfc")] == ["cut", "cut", None]


def test_a_download_is_not_tried_for_ever(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_cuts=100)
    with proxy.snapshot(vm) as (taken, disks):
        since = proxy.simulator.last_call()
        with pytest.raises(TransportError, match="4 tries") as caught:
            proxy.lease_bytes(vm, taken, disks[2000])
        assert caught.value.retryable
        assert len(proxy.calls(since, "GET /nfc")) == 4
        assert len(proxy.calls(since, "HttpNfcLeaseAbort")) == 1


@pytest.mark.soak
def test_a_long_download_keeps_its_lease_alive(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_timeout=2.0, lease_bytes_per_second=512 * 1024)
    told: List[Tuple[int, int]] = []
    with proxy.snapshot(vm) as (taken, disks):
        since = proxy.simulator.last_call()
        found = proxy.lease_bytes(vm, taken, disks[2000], on_progress=lambda *share: told.append(share))
        assert found == proxy.simulator.disk("app01", 2000, taken.moid)
        assert len(proxy.calls(since, "HttpNfcLeaseProgress")) >= 2
        assert len(proxy.calls(since, "HttpNfcLeaseComplete")) == 1
    assert told == sorted(told)
    assert all(done <= total for done, total in told)


def test_a_lease_that_times_out_is_told(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_timeout=2.0, lease_bytes_per_second=64 * 1024)
    proxy.control.call("inject", target="call", name="HttpNfcLeaseProgress", fault="Timedout", count=0)
    with proxy.snapshot(vm) as (taken, disks):
        with pytest.raises(TransportError, match="lease has ended") as caught:
            proxy.lease_bytes(vm, taken, disks[2000])
        assert caught.value.retryable
        # Another one serves.
        proxy.control.call("clear_injections")
        proxy.control.call("set_settings", lease_timeout=300.0, lease_bytes_per_second=None)
        assert proxy.lease_bytes(vm, taken, disks[2000]) == proxy.simulator.disk("app01", 2000, taken.moid)


def test_a_snapshot_that_can_not_be_exported_says_why(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    with proxy.snapshot(vm) as (taken, disks):
        proxy.control.call("inject", target="task", name="ExportSnapshot", fault="FileLocked")
        with pytest.raises(TransportError, match="FileLocked"):
            proxy.lease_bytes(vm, taken, disks[2000])
        user = proxy.session.connection.username
        proxy.control.call("set_privileges", username=user, remove=["VApp.Export"])
        try:
            with pytest.raises(TransportError, match="VApp.Export"):
                proxy.lease_bytes(vm, taken, disks[2000])
        finally:
            proxy.control.call("set_privileges", username=user, add=["VApp.Export"])


def test_a_failed_disk_leaves_the_others_their_lease(proxy: Proxy) -> None:
    vm = proxy.vm("app01")
    proxy.control.call("set_settings", lease_bytes_per_second=2 * MIB)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with proxy.snapshot(vm) as (taken, disks), ThreadPoolExecutor(2) as pool:
        good = pool.submit(proxy.lease_bytes, vm, taken, disks[2000])
        bad = pool.submit(proxy.lease_bytes, vm, taken, disks[2001], on_progress=stop)
        with pytest.raises(KeyboardInterrupt):
            bad.result()
        assert good.result() == proxy.simulator.disk("app01", 2000, taken.moid)


def test_a_held_lease_blocks_the_vm_and_is_recovered(proxy: Proxy) -> None:
    """As a killed run leaves it: a record, and a lease that nobody keeps alive."""
    vm = proxy.vm("restore01")
    proxy.control.call("set_settings", lease_timeout=20.0)
    with proxy.snapshot(vm) as (taken, _disks):
        lease = proxy.session.call(taken.obj.ExportSnapshot, what="No lease")
        power_on = {"username": proxy.session.connection.username, "add": ["VirtualMachine.Interact.PowerOn"]}
        proxy.control.call("set_privileges", **power_on)
        try:
            with pytest.raises(vim.fault.MethodDisabled):
                vm.obj.PowerOnVM_Task(None)
        finally:
            proxy.control.call("set_privileges", username=power_on["username"], remove=power_on["add"])
        run = proxy.run()
        for _time in range(2):
            run.record("temporary_file", key=2000, stage="a.vmdk.part-1", lease=lease._moId)
        found = recover_leases(proxy.session, run, check_mode=True)
        assert found == [{"what": "lease", "id": lease._moId, "action": "would be aborted"}] * 2
        # To another session it does not exist, so that can only wait for its end.
        with Session.connect(proxy.session.connection) as other:
            found = recover_leases(other, run, check_mode=False)
        assert found == [{"what": "lease", "id": lease._moId, "action": "left to its time-out"}] * 2
        assert recover_leases(proxy.session, run, check_mode=False) == []
        run.record("temporary_file", key=2001, stage="b.vmdk.part-1", lease=lease._moId)
        found = recover_leases(proxy.session, run, check_mode=False, vm_moid=vm.moid)
        assert found == [{"what": "lease", "id": lease._moId, "action": "aborted"}]
        run.remove()


# Secrets


def test_cookie_and_password_are_nowhere(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, running = proxy.vm("win01"), proxy.vm("app01")
    cookie = proxy.session.cookie.split('"')[1]
    watches = [Watch(secret, Path(proxy.run_dir.path)) for secret in (cookie, proxy.session.connection.password)]
    for watch in watches:
        watch.start()
    modes = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            for path in Path(proxy.run_dir.path).glob("cookie-*"):
                with contextlib.suppress(FileNotFoundError):
                    modes.add(path.stat().st_mode & 0o777)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        with open_folder(
            proxy.session, vm, proxy.disk(vm, 2000), run_dir=proxy.run_dir, io_timeout=IO_TIMEOUT
        ) as endpoint:
            log = endpoint.log_path
            proxy.bytes_of(endpoint)
        with proxy.snapshot(running) as (taken, disks):
            proxy.lease_bytes(running, taken, disks[2000])
    finally:
        over.set()
        looker.join()
        for watch in watches:
            watch.stop()
    assert modes == {0o600}
    assert {Path(found).name.split("-")[0] for found in watches[0].found} <= {"cookie"}
    assert watches[1].found == set()
    assert "nbdkit" in watches[0].programs
    text = log.read_text(encoding="utf-8")
    assert cookie not in text
    assert proxy.session.connection.password not in text
