# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The double of libvixDiskLib behind the real nbdkit vddk plugin, against the running simulator."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from pyVim.connect import Disconnect, SmartConnect
from pyVim.task import WaitForTask
from pyVmomi import vim, vmodl

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from client import Control, ControlError  # noqa: E402

CHUNK = 128 * 512
ODD_DISK = 2001  # of app01: no multiple of 64 KiB


class Lab:
    """A running simulator, a pyVmomi session, and nbdkit over its disks."""

    def __init__(self, state: Path, vms: str = "minimal") -> None:
        argv = [HERE / "run", "--state", state, "--vms", vms]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        try:
            self.facts = json.loads(self.process.stdout.readline())
        except ValueError:
            self.process.kill()
            raise
        self.control = Control(self.facts["control_socket"])
        context = ssl.create_default_context(cafile=self.facts["ca_path"])
        certificate = ssl.get_server_certificate((self.facts["host"], self.facts["port"]))
        self.der = ssl.PEM_cert_to_DER_cert(certificate)
        self.session = SmartConnect(
            host=self.facts["host"],
            port=self.facts["port"],
            user=self.facts["username"],
            pwd=self.facts["password"],
            sslContext=context,
        )

    def thumbprint(self, algorithm: str = "sha1") -> str:
        digits = hashlib.new(algorithm, self.der).hexdigest().upper()
        return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            Disconnect(self.session)
        self.control.close()
        self.process.terminate()
        assert self.process.wait(30) == 0

    def vm(self, name: str) -> Any:
        root = self.session.content.rootFolder
        view = self.session.content.viewManager.CreateContainerView(root, [vim.VirtualMachine], True)
        return next(vm for vm in view.view if vm.name == name)

    @contextlib.contextmanager
    def snapshot(self, name: str) -> Iterator[tuple[str, dict[int, str]]]:
        """-> (moid, device key -> path) of a new snapshot."""
        vm = self.vm(name)
        made = WaitForTask(vm.CreateSnapshot_Task(name="test", description="", memory=False, quiesce=False))
        snapshot = vm.snapshot.currentSnapshot if made == "success" else None
        try:
            disks = [d for d in snapshot.config.hardware.device if isinstance(d, vim.vm.device.VirtualDisk)]
            yield snapshot._moId, {disk.key: disk.backing.fileName for disk in disks}
        finally:
            with contextlib.suppress(vmodl.fault.ManagedObjectNotFound):  # the test has removed it
                WaitForTask(snapshot.RemoveSnapshot_Task(removeChildren=False, consolidate=True))

    @contextlib.contextmanager
    def serve_snapshot(self, tmp_path: Path, **options: Any) -> Iterator[Server]:
        """The first disk of app01, of a new snapshot."""
        with self.snapshot("app01") as frozen:
            moid, paths = frozen
            with self.serve(tmp_path, paths[2000], snapshot=moid, **options) as server:
                yield server

    @contextlib.contextmanager
    def serve(self, tmp_path: Path, file: str, **options: Any) -> Iterator[Server]:
        server = Server(self, tmp_path, file, **options)
        try:
            yield server
        finally:
            server.stop()


class Server:
    """One nbdkit with the vddk plugin."""

    def __init__(
        self,
        lab: Lab,
        tmp_path: Path,
        file: str,
        *,
        vm: str = "vm-101",
        writable: bool = False,
        config: str = "",
        **options: Any,
    ) -> None:
        self.lab = lab
        self.socket = tmp_path / f"nbd-{len(list(tmp_path.iterdir()))}"
        self.log = self.socket.with_suffix(".log")
        facts = lab.facts
        settings = {
            "libdir": facts["vddk_libdir"],
            "server": facts["host"],
            "port": facts["port"],
            "user": facts["username"],
            "vm": f"moref={vm}",
            "file": file,
            "thumbprint": lab.thumbprint(),
            "nfchostport": facts["nfc_port"],
            "transports": "nbdssl:nbd",
            **options,
        }
        password = settings.pop("password", facts["password"])
        if config:
            (tmp_path / "vddk.conf").write_text(config)
            settings["config"] = tmp_path / "vddk.conf"
        reader, writer = os.pipe()
        os.write(writer, password.encode())
        os.close(writer)
        pid_file = self.socket.with_suffix(".pid")  # there when the socket listens
        argv = [
            "nbdkit",
            "-f",
            "-v",
            "-P",
            pid_file,
            "-U",
            self.socket,
            *([] if writable else ["-r"]),
            "vddk",
            f"password=-{reader}",
        ]
        argv += [f"{name}={value}" for name, value in settings.items()]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, pass_fds=[reader])
        os.close(reader)
        deadline = time.monotonic() + 20
        while not pid_file.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def text(self) -> str:
        return self.log.read_text()

    def connect(self) -> nbd.NBD:
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.connect_unix(str(self.socket))
        return handle

    def refuses(self) -> str:
        """The open fails. -> the log."""
        with pytest.raises(nbd.Error):
            self.connect()
        return self.text()

    def connections(self) -> int:
        """How many the plugin holds to the library, after its log."""
        text = self.text()
        return text.count("VixDiskLib_ConnectEx: Establish") - text.count("VixDiskLib_Disconnect: Disconnect.")

    def stop(self) -> None:
        """After SIGTERM nbdkit does not wait for ever for a thread that still closes its disk: so that comes first."""
        try:
            deadline = time.monotonic() + 60
            while self.connections() and self.process.poll() is None:
                assert time.monotonic() < deadline, "the plugin does not close what it opened"
                self.lab.control.call("nfc")
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("state"))
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(autouse=True)
def clean_network(lab: Lab) -> Iterator[None]:
    yield
    lab.control.call("restore_network")
    lab.control.call(
        "nfc",
        clear_faults=True,
        reset_peaks=True,
        max_connections=None,
        memory_bytes=None,
        delay=0,
        bytes_per_second=None,
        serve=None,
        when_full="refuse",
    )


def read_all(handle: nbd.NBD) -> bytes:
    size = handle.get_size()
    return b"".join(bytes(handle.pread(min(1 << 20, size - at), at)) for at in range(0, size, 1 << 20))


def extents(handle: nbd.NBD) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of the whole disk."""
    found: list[tuple[int, int, int]] = []
    at, size = 0, handle.get_size()

    def take(_context: str, offset: int, entries: list[int], _error: Any) -> int:
        nonlocal at
        for length, flags in zip(entries[::2], entries[1::2]):
            found.append((offset, length, flags))
            offset += length
        at = offset
        return 0

    while at < size:
        handle.block_status(size - at, at, take)
    return found


@pytest.mark.parametrize("disk", [2000, ODD_DISK])
def test_a_snapshot_reads_as_it_was_through_a_chain(lab: Lab, tmp_path: Path, disk: int) -> None:
    control = lab.control
    control.call("guest_write", vm="app01", disk=disk, offset=12345, pattern={"seed": 1, "length": 300_000})
    size = control.call("read_disk", vm="app01", disk=disk)["capacity_bytes"]
    with lab.snapshot("app01"):
        control.call("guest_write", vm="app01", disk=disk, offset=size - 5000, pattern={"seed": 2, "length": 5000})
        control.call("guest_discard", vm="app01", disk=disk, offset=CHUNK, length=CHUNK)
        with lab.snapshot("app01") as (moid, paths):
            assert "-000001" in paths[disk]
            control.call("guest_write", vm="app01", disk=disk, offset=0, pattern={"seed": 3, "length": size})
            expected = control.call("read_disk", vm="app01", disk=disk, snapshot=moid)["sha256"]
            with lab.serve(tmp_path, paths[disk], snapshot=moid) as server:
                handle = server.connect()
                data = read_all(handle)
                assert hashlib.sha256(data).hexdigest() == expected
                areas = extents(handle)
                assert sum(length for _offset, length, _flags in areas) == size == len(data)
                holes = [(offset, length) for offset, length, flags in areas if flags & nbd.STATE_ZERO]
                assert any(offset <= CHUNK < offset + length for offset, length in holes)
                assert all(not any(data[offset : offset + length]) for offset, length in holes)
                assert data[size - 5000 :] == random.Random(2).randbytes(5000)
                handle.shutdown()
            text = server.text()
    assert f"Opened 'vpxa-nfcssl://{paths[disk]}@127.0.1." in text
    assert "transport mode: nbdssl" in text
    assert lab.facts["password"] not in text
    assert "error:" not in text, "the double found misuse"
    assert lab.control.call("nfc")["disks"] == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"thumbprint": "00:" * 31 + "00"}, ["actual thumbprint=", "Error 1 (Unknown error)"]),
        ({"thumbprint": "00:" * 19 + "00"}, ["actual thumbprint=", "Error 1 (Unknown error)"]),
        ({"password": "not this"}, ["incorrect user name or password", "Error 3014 ("]),
        ({"vm": "vm-999"}, ["Error 4000 ("]),
        ({"snapshot": "snapshot-1"}, ["'vim.vm.Snapshot:snapshot-1' has already been deleted", "Error 1 ("]),
        ({"file": "[vmfs01] app01/nothing.vmdk"}, ["Error 4 ("]),
        ({"file": "[vmfs01] restore01/restore01.vmdk"}, ["Error 13 ("]),
        ({"transports": "pigeon"}, ["Error 16000 (One of the parameters was invalid)"]),
        ({"nfchostport": 1}, ["NfcNewAuthdConnectionEx", "2338", "Error 14009 (", "Connection refused"]),
        ({"port": 1}, ["Error 18000 ("]),
        ({"server": "no-such-host.invalid"}, ["Host address lookup for server no-such-host.invalid failed", "14008"]),
        (
            {"config": "vixDiskLib.nfcAio.Session.BufSizeIn64KB=64\nvixDiskLib.nfcAio.Session.BufCount=8\n"},
            ["Error 16000 ("],
        ),
    ],
)
def test_what_vddk_refuses(lab: Lab, tmp_path: Path, options: dict[str, Any], expected: list[str]) -> None:
    with lab.snapshot("app01") as (moid, paths):
        options = {"file": paths[2000], "snapshot": moid, **options}
        with lab.serve(tmp_path, options.pop("file"), **options) as server:
            text = server.refuses()
    for words in expected:
        assert words in text
    assert lab.facts["password"] not in text
    assert lab.control.call("nfc")["disks"] == []


def test_the_base_gives_old_bytes_and_is_not_the_snapshots(lab: Lab, tmp_path: Path) -> None:
    with lab.snapshot("app01") as (old, base):
        before = lab.control.call("read_disk", vm="app01", disk=2000, snapshot=old)["sha256"]
        lab.control.call("guest_write", vm="app01", disk=2000, offset=0, pattern={"seed": time.time(), "length": 4096})
        with lab.snapshot("app01") as (moid, paths):
            assert base[2000] != paths[2000]
            with lab.serve(tmp_path, base[2000], snapshot=moid) as server:
                assert "Error 13 (" in server.refuses()
            with lab.serve(tmp_path, base[2000]) as server:  # without the snapshot: old bytes, and no warning
                handle = server.connect()
                assert hashlib.sha256(read_all(handle)).hexdigest() == before
                handle.shutdown()
            with lab.serve(tmp_path, paths[2000], snapshot=moid) as server:
                handle = server.connect()
                assert hashlib.sha256(read_all(handle)).hexdigest() != before
                handle.shutdown()


def test_other_modes(lab: Lab, tmp_path: Path) -> None:
    with lab.snapshot("app01") as (moid, paths):
        options = {"snapshot": moid, "thumbprint": lab.thumbprint().lower()}
        for transports, mode in (("nbd", "nbd"), ("file", "nbdssl"), ("file:nbd:nbdssl", "nbd")):
            with lab.serve(tmp_path, paths[2000], transports=transports, **options) as server:
                server.connect().shutdown()
                assert f"transport mode: {mode}\n" in server.text()


def test_the_thumbprint_is_sha1_unless_the_double_is_told_otherwise(lab: Lab, tmp_path: Path) -> None:
    sha256 = lab.thumbprint("sha256").lower()
    with lab.snapshot("app01") as (moid, paths):
        with lab.serve(tmp_path, paths[2000], snapshot=moid, thumbprint=sha256) as server:
            assert "Failed to verify SSL certificate" in server.refuses()
        lab.control.call("nfc", thumbprint="sha256")
        try:
            with lab.serve(tmp_path, paths[2000], snapshot=moid, thumbprint=sha256) as server:
                server.connect().shutdown()
            with lab.serve(tmp_path, paths[2000], snapshot=moid) as server:
                assert "Failed to verify SSL certificate" in server.refuses()
        finally:
            lab.control.call("nfc", thumbprint="sha1")


def test_a_compressed_wire_shows_in_the_opened_disk(lab: Lab, tmp_path: Path) -> None:
    with lab.snapshot("app01") as (moid, paths):
        for compression in ("zlib", "fastlz", "skipz"):
            with lab.serve(tmp_path, paths[2000], snapshot=moid, compression=compression) as server:
                server.connect().shutdown()
                words = f"{compression.upper()}-vpxa-nfc://{paths[2000]}@127.0.1."
                assert f"Opened '{words}" in server.text() and f'Opened "{words}' in server.text()


def test_a_query_of_allocated_blocks_costs_time_and_is_counted(lab: Lab, tmp_path: Path) -> None:
    def queries() -> int:
        return sum(host["queries"] for host in lab.control.call("nfc")["hosts"].values())

    with lab.snapshot("app01") as (moid, paths), lab.serve(tmp_path, paths[2000], snapshot=moid) as server:
        handle = server.connect()
        before = queries()
        lab.control.call("nfc", query_seconds=0.4)
        try:
            began = time.monotonic()
            assert extents(handle)
            spent = time.monotonic() - began
        finally:
            lab.control.call("nfc", query_seconds=0)
        assert queries() > before and spent >= 0.4 * (queries() - before)
        handle.pread(4096, 0)
        counted = queries()
        handle.shutdown()
        assert queries() == counted


def test_writing(lab: Lab, tmp_path: Path) -> None:
    path = "[vmfs01] restore01/restore01.vmdk"
    data = random.Random(5).randbytes(3 << 20)
    with lab.serve(tmp_path, path, vm="vm-102", writable=True) as server:
        handle = server.connect()
        for at in range(0, len(data), 1 << 20):
            handle.pwrite(data[at : at + (1 << 20)], at + 512)
        handle.flush()
        assert bytes(handle.pread(len(data), 512)) == data
        with lab.serve(tmp_path, path, vm="vm-102", writable=True) as second:
            assert "Error 15 (" in second.refuses()
        handle.shutdown()
    assert lab.control.read("restore01", 2000, 512, len(data)) == data
    assert "127.0.1.2" in server.text(), "without a snapshot the VM's own host serves"

    with lab.snapshot("restore01") as (moid, paths):
        for file, options in ((paths[2000], {"snapshot": moid}), (path, {})):
            with lab.serve(tmp_path, file, vm="vm-102", writable=True, **options) as server:
                assert "Error 13 (" in server.refuses()
    with lab.serve(tmp_path, "[vmfs01] app01/app01.vmdk", writable=True) as server:
        assert "Error 13 (" in server.refuses(), "app01 runs"


def test_a_missing_privilege(lab: Lab, tmp_path: Path) -> None:
    user = {"user": lab.facts["backup_username"], "password": lab.facts["backup_password"]}
    privilege = "VirtualMachine.Provisioning.DiskRandomRead"
    with lab.snapshot("app01") as (moid, paths):
        lab.control.call("set_privileges", username=user["user"], remove=[privilege])
        try:
            with lab.serve(tmp_path, paths[2000], snapshot=moid, **user) as server:
                text = server.refuses()
        finally:
            lab.control.call("set_privileges", username=user["user"], add=[privilege])
        assert "Error 3014 (" in text and privilege in text
        with lab.serve(tmp_path, paths[2000], snapshot=moid, **user) as server:
            server.connect().shutdown()


def test_a_cut_network_is_an_error_and_stays_one(lab: Lab, tmp_path: Path) -> None:
    lab.control.call("nfc", serve="127.0.1.2", delay=0.05)
    with lab.serve_snapshot(tmp_path) as server:
        handle = server.connect()
        handle.pread(4096, 0)
        buffers = [nbd.Buffer(1 << 20) for _unused in range(8)]
        cookies = [handle.aio_pread(buffer, at << 20) for at, buffer in enumerate(buffers)]
        lab.control.call("cut_network", host="127.0.1.2")
        failed = 0
        for cookie in cookies:
            while True:
                try:
                    if handle.aio_command_completed(cookie):
                        break
                except nbd.Error as error:
                    assert error.errnum == 5
                    failed += 1
                    break
                handle.poll(-1)
        assert failed > 0
        lab.control.call("restore_network", host="127.0.1.2")
        with pytest.raises(nbd.Error):  # the handle is lost
            handle.pread(4096, 0)
        assert "14011" in server.text() or "The connection was lost" in server.text()
        handle.shutdown()
        lab.control.call("cut_network", host="127.0.1.2", seconds=0.2)
        deadline = time.monotonic() + 20
        while True:  # a new connection of the same nbdkit works again
            try:
                handle = server.connect()
                break
            except nbd.Error:
                assert time.monotonic() < deadline
        handle.pread(4096, 0)
        handle.shutdown()


def test_a_silent_host_is_given_up(lab: Lab, tmp_path: Path) -> None:
    config = "vixDiskLib.nfc.ReadTimeoutMs=700\nvixDiskLib.nfc.RequestTimeoutMs=700\n"
    with lab.serve_snapshot(tmp_path, config=config) as server:
        handle = server.connect()
        handle.pread(4096, 0)
        lab.control.call("cut_network", mode="blackhole")
        with pytest.raises(nbd.Error):
            handle.pread(4096, 0)
        assert "There was an error in communication" in server.text()
        lab.control.call("restore_network")
        handle.shutdown()


def test_reads_that_fail(lab: Lab, tmp_path: Path) -> None:
    with lab.serve_snapshot(tmp_path) as server:
        handle = server.connect()
        lab.control.call("nfc", read_faults={"count": 1, "after": 1, "vix": 2})
        good = handle.pread(4096, 0)
        with pytest.raises(nbd.Error):
            handle.pread(4096, 0)
        assert handle.pread(4096, 0) == good
        assert "received NFC error 5 from server: Failed to allocate the requested 4096 bytes" in server.text()
        lab.control.call("nfc", read_faults={"count": -1, "path": "[vmfs01] other.vmdk"})
        assert handle.pread(4096, 0) == good
        lab.control.call("nfc", query_faults={"count": 1}, open_faults={"count": 1, "vix": 14015})
        assert "Error 14015 (" in server.refuses()
        without = server.connect()
        assert not without.can_meta_context("base:allocation") or extents(without)[0][2] == 0
        assert without.pread(4096, 0) == good
        without.shutdown()
        lab.control.call("nfc", drop=True)
        with pytest.raises(nbd.Error):
            handle.pread(4096, 0)
        handle.shutdown()


def test_two_disks_in_parallel_and_their_count(lab: Lab, tmp_path: Path) -> None:
    lab.control.call("nfc", serve="127.0.1.1", reset_peaks=True)
    results: dict[int, str] = {}
    with lab.snapshot("app01") as (moid, paths), contextlib.ExitStack() as stack:
        servers = {key: stack.enter_context(lab.serve(tmp_path, path, snapshot=moid)) for key, path in paths.items()}
        handles = {key: server.connect() for key, server in servers.items()}

        def work(key: int) -> None:
            results[key] = hashlib.sha256(read_all(handles[key])).hexdigest()

        threads = [threading.Thread(target=work, args=(key,)) for key in handles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for key in paths:
            assert results[key] == lab.control.call("read_disk", vm="app01", disk=key, snapshot=moid)["sha256"]
        status = lab.control.call("nfc", max_connections=2)
        assert status["hosts"]["127.0.1.1"]["connections"] == status["hosts"]["127.0.1.1"]["peak"] == 2
        with lab.serve(tmp_path, paths[2000], snapshot=moid) as third:
            assert "too many NFC connections" in third.refuses()
        lab.control.call("nfc", max_connections=None, memory_bytes=3 * 65536 * 4)
        with lab.serve(tmp_path, paths[2000], snapshot=moid) as third:
            fourth = third.connect()
            with lab.serve(tmp_path, paths[2000], snapshot=moid) as too_much:
                assert "Error 2 (" in too_much.refuses()
            fourth.shutdown()
        for handle in handles.values():
            handle.shutdown()


def test_hosts_that_cannot_serve(lab: Lab, tmp_path: Path) -> None:
    with lab.snapshot("app01") as (moid, paths):
        for name in ("127.0.1.1", "127.0.1.2"):
            lab.control.call("set_host", name=name, maintenance=True)
        try:
            with lab.serve(tmp_path, paths[2000], snapshot=moid) as server:
                assert "Error 14015 (" in server.refuses()
        finally:
            for name in ("127.0.1.1", "127.0.1.2"):
                lab.control.call("set_host", name=name, maintenance=False)


def test_a_disk_in_use_holds_its_delta(lab: Lab, tmp_path: Path) -> None:
    """While a disk of a snapshot is read its delta can't be consolidated; once it is closed, it can at once."""
    vm = lab.vm("app01")
    leaf = next(d.backing for d in vm.config.hardware.device if isinstance(d, vim.vm.device.VirtualDisk))
    with lab.serve_snapshot(tmp_path) as server:
        handle = server.connect()
        assert lab.control.call("nfc")["disks"][0]["path"] == leaf.fileName
        lab.control.call("guest_write", vm="app01", disk=2000, offset=0, pattern={"seed": 9, "length": 4096})
        with contextlib.suppress(vim.fault.FileLocked, vim.fault.GenericVmConfigFault):
            WaitForTask(vm.snapshot.currentSnapshot.RemoveSnapshot_Task(removeChildren=False, consolidate=True))
        assert vm.runtime.consolidationNeeded
        handle.pread(4096, 0)
        handle.shutdown()
        deadline = time.monotonic() + 10
        while lab.control.call("nfc")["disks"]:
            assert time.monotonic() < deadline
        WaitForTask(vm.ConsolidateVMDisks_Task())
        assert not vm.runtime.consolidationNeeded
        leaf = next(d.backing for d in vm.config.hardware.device if isinstance(d, vim.vm.device.VirtualDisk))
        assert leaf.parent is None
        assert lab.control.read("app01", 2000, 0, 4096) == random.Random(9).randbytes(4096)


def test_the_shell_client(lab: Lab) -> None:
    argv = [sys.executable, HERE / "client.py", lab.facts["control_socket"]]
    done = subprocess.run(
        [*argv, "guest_write", "vm=app01", "disk=Hard disk 1", 'pattern={"seed": 1, "length": 512}'],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert json.loads(done.stdout)["written"] == 512
    done = subprocess.run([*argv, "guest_write", "vm=nobody"], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1 and "guest_write" in done.stderr
    assert os.stat(lab.facts["control_socket"]).st_mode & 0o777 == 0o600
    with pytest.raises(ControlError, match="there is no op"):
        lab.control.call("dance")


MISUSE = textwrap.dedent(
    """
    import ctypes, json, sys, threading

    facts = json.loads(sys.stdin.readline())
    lib = ctypes.CDLL(facts["vddk_libdir"] + "/lib64/libvixDiskLib.so.8")
    P, Q, I = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    lib.VixDiskLib_AllocateConnectParams.restype = P
    for name, types in {
        "InitEx": (I, I, P, P, P, ctypes.c_char_p, ctypes.c_char_p),
        "ConnectEx": (P, ctypes.c_char, ctypes.c_char_p, ctypes.c_char_p, P),
        "Open": (P, ctypes.c_char_p, I, P),
        "Close": (P,), "Disconnect": (P,), "Wait": (P,), "Flush": (P,), "FreeConnectParams": (P,),
        "Read": (P, Q, Q, P), "Write": (P, Q, Q, P),
        "QueryAllocatedBlocks": (P, Q, Q, Q, P),
        "PrepareForAccess": (P, ctypes.c_char_p), "EndAccess": (P, ctypes.c_char_p), "Cleanup": (P, P, P),
    }.items():
        function = getattr(lib, "VixDiskLib_" + name)
        function.argtypes, function.restype = types, Q
    call = lambda name, *args: getattr(lib, "VixDiskLib_" + name)(*args) & 0xffff
    check = lambda got, wanted: got == wanted or sys.exit(f"line {sys._getframe(1).f_lineno}: {got}, not {wanted}")

    class Params(ctypes.Structure):
        _fields_ = [("vmxSpec", ctypes.c_char_p), ("serverName", ctypes.c_char_p), ("thumbPrint", ctypes.c_char_p),
                    ("r1", ctypes.c_long), ("credType", ctypes.c_int), ("userName", ctypes.c_char_p),
                    ("password", ctypes.c_char_p), ("r2", P), ("port", I), ("nfcHostPort", I), ("r3", P * 6),
                    ("specType", ctypes.c_int)]

    LOG = ctypes.CFUNCTYPE(None, ctypes.c_char_p, P)(lambda *unused: None)
    check(call("InitEx", 3, 0, LOG, LOG, LOG, None, None), 3)
    check(call("InitEx", 8, 0, LOG, LOG, LOG, None, b"/does/not/exist"), 4)
    check(call("InitEx", 8, 0, LOG, LOG, LOG, None, None), 0)
    check(call("InitEx", 8, 0, LOG, LOG, LOG, None, None), 1)
    raw = lib.VixDiskLib_AllocateConnectParams()
    params = Params.from_address(raw)
    params.vmxSpec, params.serverName = b"moref=vm-102", facts["host"].encode()
    params.thumbPrint, params.credType = facts["thumbprint"].encode(), 1
    params.userName, params.password = facts["username"].encode(), facts["password"].encode()
    params.port, params.nfcHostPort = facts["port"], facts["nfc_port"]
    connection, handle, blocks = P(), P(), P()
    check(call("ConnectEx", ctypes.byref(Params()), b"\\x01", None, None, ctypes.byref(connection)), 3)
    check(call("ConnectEx", raw, b"\\x01", None, None, ctypes.byref(connection)), 0)
    path = b"[vmfs01] restore01/restore01.vmdk"
    check(call("Open", raw, path, 4, ctypes.byref(handle)), 16054)
    check(call("Open", connection, path, 0, ctypes.byref(handle)), 11)
    check(call("Open", connection, path, 4 | 16 | 32, ctypes.byref(handle)), 3)
    check(call("Open", connection, path, 4, ctypes.byref(handle)), 0)
    check(call("Disconnect", connection), 5)
    data = ctypes.create_string_buffer(1 << 20)
    check(call("Read", handle, 0, 2048, data), 0)
    check(call("Write", handle, 0, 1, data), 11)
    check(call("Read", handle, 131072, 1, data), 16007)
    check(call("Read", handle, 0, 0, data), 3)
    check(call("QueryAllocatedBlocks", handle, 0, 128, 64, ctypes.byref(blocks)), 3)
    check(call("QueryAllocatedBlocks", handle, 1, 128, 128, ctypes.byref(blocks)), 3)
    check(call("QueryAllocatedBlocks", handle, 131072, 128, 128, ctypes.byref(blocks)), 16007)

    # two synchronous reads at once: exactly one is told that the handle is busy (the simulator answers slowly here)
    print("slow", flush=True)
    sys.stdin.readline()
    results = []
    other = ctypes.create_string_buffer(512)
    thread = threading.Thread(target=lambda: results.append(call("Read", handle, 0, 1, other)))
    thread.start()
    results.append(call("Read", handle, 0, 1, data))
    thread.join()
    check(sorted(results), [0, 5])
    # an open that overlaps another one
    results = []
    handles = [P(), P()]
    threads = [threading.Thread(target=lambda h=h: results.append(call("Open", connection, path, 4, ctypes.byref(h))))
               for h in handles]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if sorted(results) == [0, 5]:
        [check(call("Close", h), 0) for h in handles if h.value]
    else:  # the first was over before the second began
        check(results, [0, 0])
        [check(call("Close", h), 0) for h in handles]

    check(call("Close", handle), 0)
    check(call("Close", handle), 3)
    check(call("Read", handle, 0, 1, data), 3)
    check(call("Wait", handle), 3)
    check(call("Disconnect", connection), 0)
    check(call("Disconnect", connection), 16054)

    cleaned, remaining = I(7), I(7)
    check(call("PrepareForAccess", raw, b"x" * 51), 3)
    check(call("PrepareForAccess", raw, b"tests"), 0)
    print("prepared", flush=True)
    sys.stdin.readline()
    check(call("EndAccess", raw, b"tests"), 0)
    check(call("Cleanup", raw, ctypes.byref(cleaned), ctypes.byref(remaining)), 0)
    check((cleaned.value, remaining.value), (0, 0))
    lib.VixDiskLib_FreeConnectParams(raw)
    lib.VixDiskLib_Exit()
    """
)


def test_misuse_of_the_interface_is_refused(lab: Lab) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MISUSE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def tell(line: str) -> None:
        process.stdin.write(line + "\n")
        process.stdin.flush()

    try:
        tell(json.dumps({**lab.facts, "thumbprint": lab.thumbprint()}))
        assert process.stdout.readline() == "slow\n", process.stderr.read()
        lab.control.call("nfc", delay=0.3)
        tell("go")
        assert process.stdout.readline() == "prepared\n", process.stderr.read()
        assert "RelocateVM_Task" in lab.vm("restore01").disabledMethod
        assert lab.control.call("state")["vms"]["vm-102"]["prepared"] == ["tests"]
        tell("go")
        assert process.wait(30) == 0, process.stderr.read()
        assert "RelocateVM_Task" not in lab.vm("restore01").disabledMethod
    finally:
        process.kill()
        process.wait()
