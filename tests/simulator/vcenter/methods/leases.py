# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Export leases: ExportSnapshot, ExportVm, HttpNfcLease, and the downloads under ``/nfc`` (VADP facts 51)."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from .. import disks, soap
from ..inventory import VirtualMachine, datastore_of, disks_in, is_rdm
from ..model import Managed
from ..services import DropConnection, as_fault
from . import Context, method
from .snapshots import SnapshotObject

if TYPE_CHECKING:
    from ..server import Handler

PIECE = 1 << 20
# How often a lease looks whether its time or its session is over.
TICK = 0.05
_NUMBERS = itertools.count(1)


class _Device:
    """A file that a lease offers. ``path`` is the disk that it is made of; None for a file that is no disk."""

    def __init__(self, key: str, name: str, path: str | None, local: Path | None = None) -> None:
        self.key = key
        self.name = name
        self.path = path
        self.local = local
        self.lock = threading.Lock()
        self.made: Path | None = None
        self.sha1 = ""


class Lease(Managed):
    """An HttpNfcLease. It belongs to the session that made it, and holds the disks that it reads open."""

    type = vim.HttpNfcLease

    def __init__(self, context: Context, vm: VirtualMachine, config: Any) -> None:
        super().__init__(context.simulator, f"session[{secrets.token_hex(8)}]lease-{next(_NUMBERS)}")
        self.vm = vm
        self.session = context.session
        self.ticket = secrets.token_hex(16)
        self.state = "initializing"
        self.error: Any = None
        self.percent = 0
        self.timeout = self.simulator.settings.lease_timeout
        self.deadline = time.monotonic() + self.timeout
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._openers: list[Any] = []
        self.devices = self._devices(config)

    def _devices(self, config: Any) -> list[_Device]:
        """The last disk first, and files that are no disks before them: whoever goes by the order is wrong."""
        controllers = {device.key: device for device in config.hardware.device}
        found = []
        nvram = disks.nvram_path(self.vm)
        local = self.simulator.storage.local_path(nvram)
        if local.exists():
            found.append(_Device(f"/{self.vm.moid}/nvram", nvram.rsplit("/", 1)[-1], None, local))
        for number, disk in reversed(
            list(enumerate(one for one in disks_in(config.hardware.device) if not is_rdm(one)))
        ):
            controller = controllers[disk.controllerKey]
            kind = type(controller).__name__.rsplit(".", 1)[-1]
            key = f"/{self.vm.moid}/{kind}{controller.busNumber}:{disk.unitNumber}"
            found.append(_Device(key, f"disk-{number}.vmdk", disk.backing.fileName))
        return found

    # its life

    def start(self) -> None:
        """Hold the disks; ready after a moment."""
        try:
            for device in self.devices:
                if device.path is not None:
                    opener = self.simulator.storage.open(device.path, f"lease:{self.moid}", write=False)
                    self._openers.append(opener)
        except Exception:
            self._let_go()
            raise
        self.simulator.leases[self.ticket] = self
        assert self.session is not None
        self.session.objects[self.moid] = self
        threading.Thread(target=self._live, name=self.moid, daemon=True).start()

    def _live(self) -> None:
        time.sleep(self.simulator.settings.task_delay)
        try:
            self.simulator.injector.apply("task", "ExportSnapshot", self.vm.moid)
        except vmodl.MethodFault as fault:
            self.end("error", fault)
            return
        with self._lock:
            if self.state == "initializing":
                self.state = "ready"
                self.deadline = time.monotonic() + self.timeout
        while not self.over.wait(TICK):
            if time.monotonic() > self.deadline:
                self.end("error", vim.fault.Timedout(msg="The lease has timed out."))
            elif self.session is None or not self.session.alive:
                self.end("error", vim.fault.NotAuthenticated(object=self.ref, privilegeId="System.View"))

    def end(self, state: str, error: Any = None) -> None:
        with self._lock:
            if self.over.is_set():
                return
            self.state, self.error = state, error
            self.over.set()
        self._let_go()

    def _let_go(self) -> None:
        self.simulator.leases.pop(self.ticket, None)
        for opener in self._openers:
            opener.close()
        self._openers.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def check(self) -> None:
        """:raises Timedout: it died of its time; :raises InvalidState: it is not ready, or not any more."""
        if self.state == "error":
            raise self.error
        if self.state != "ready":
            raise vim.fault.InvalidState(msg=f"The lease is {self.state}.")

    # properties

    def p_state(self) -> Any:
        return vim.HttpNfcLease.State(self.state)

    def p_error(self) -> Any:
        return self.error

    def p_initializeProgress(self) -> int:
        return 0 if self.state == "initializing" else 100

    def p_transferProgress(self) -> int:
        return self.percent

    def p_mode(self) -> str:
        return "pushOrGet"

    def p_capabilities(self) -> Any:
        return vim.HttpNfcLease.Capabilities(pullModeSupported=False, corsSupported=False)

    def p_info(self) -> Any:
        if self.state != "ready":
            return None
        capacity = sum(
            self.simulator.storage.info(device.path).capacity_bytes
            for device in self.devices
            if device.path is not None
        )
        return vim.HttpNfcLease.Info(
            lease=self.ref,
            entity=self.vm.ref,
            deviceUrl=[self._url(device) for device in self.devices],
            totalDiskCapacityInKB=capacity // 1024,
            leaseTimeout=int(self.timeout),
        )

    def _url(self, device: _Device) -> Any:
        simulator = self.simulator
        host = simulator.settings.lease_host
        host = host if host == "*" else f"{host}:{simulator.port}"
        thumbprint = {
            "sha1": simulator.thumbprints["sha1"],
            "sha256": simulator.thumbprints["sha256"],
            "empty": "",
            "wrong": ":".join(["AA"] * 20),
        }[simulator.settings.lease_thumbprint]
        return vim.HttpNfcLease.DeviceUrl(
            key=device.key,
            importKey=device.key,
            url=f"https://{host}/nfc/{self.ticket}/{device.name}",
            sslThumbprint=thumbprint,
            disk=device.path is not None,
            targetId=device.name,
            datastoreKey=datastore_of(device.path) if device.path is not None else "",
            fileSize=0,
        )

    # bytes

    def file(self, device: _Device) -> Path:
        """The file to send; a disk's is a stream-optimised VMDK of what its chain holds."""
        if device.local is not None:
            return device.local
        with device.lock:
            if device.made is None:
                device.made = self._make(device)
            return device.made

    def _make(self, device: _Device) -> Path:
        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="lease-", dir=self.simulator.state_dir)
            raw, made = Path(self._folder.name) / f"{device.name}.raw", Path(self._folder.name) / device.name
        assert device.path is not None
        store = self.simulator.storage
        capacity = store.info(device.path).capacity_bytes
        with open(raw, "wb") as file:
            for start, length in store.allocated(device.path, 0, capacity, 64 * 1024):
                for at in range(start, min(start + length, capacity), PIECE):
                    file.seek(at)
                    file.write(store.read(device.path, at, min(PIECE, start + length - at, capacity - at)))
            file.truncate(capacity)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
        subprocess.run([*command, str(raw), str(made)], check=True, stdin=subprocess.DEVNULL, capture_output=True)
        raw.unlink()
        digest = hashlib.sha1()
        with open(made, "rb") as file:
            while data := file.read(PIECE):
                digest.update(data)
        device.sha1 = digest.hexdigest()
        return made


# --- what a held lease keeps the VM from ----------------------------------------------------------------------------


def held(vm: VirtualMachine) -> bool:
    return any(lease.vm is vm for lease in list(vm.simulator.leases.values()))


def refuse_held(vm: VirtualMachine) -> None:
    """:raises MethodDisabled: the VM is being exported."""
    if held(vm):
        raise vim.fault.MethodDisabled(
            source="com.vmware.vim.HttpNfcLease", msg="The method is disabled while the virtual machine is exported."
        )


# --- methods --------------------------------------------------------------------------------------------------------


def _export(context: Context, vm: VirtualMachine, config: Any) -> Any:
    with context.simulator.lock:
        if vm.task is not None:
            raise vim.fault.TaskInProgress(task=vm.task.ref)
        if held(vm):
            raise vim.fault.InvalidState(msg="The virtual machine is being exported already.")
        lease = Lease(context, vm, config)
        lease.start()
    return lease.ref


@method("VirtualMachineSnapshot", "ExportSnapshot", changing=True)
def export_snapshot(context: Context, snapshot: SnapshotObject) -> Any:
    return _export(context, snapshot.of_vm, snapshot.record.config)


@method("VirtualMachine", "ExportVm", changing=True)
def export_vm(context: Context, vm: VirtualMachine) -> Any:
    if vm.power_state != "poweredOff":
        raise vim.fault.InvalidPowerState(requestedState="poweredOff", existingState=vm.power_state)
    return _export(context, vm, vm.config)


@method("HttpNfcLease", "HttpNfcLeaseProgress")
def progress(context: Context, lease: Lease, percent: int) -> None:
    lease.check()
    lease.percent = percent
    lease.deadline = time.monotonic() + lease.timeout


@method("HttpNfcLease", "HttpNfcLeaseComplete")
def complete(context: Context, lease: Lease) -> None:
    lease.check()
    lease.end("done")


@method("HttpNfcLease", "HttpNfcLeaseAbort")
def abort(context: Context, lease: Lease, fault: Any) -> None:
    if lease.state == "done":
        raise vim.fault.InvalidState(msg="The lease is done.")
    lease.end("error", fault or vim.fault.RequestCanceled(msg="The lease was aborted."))


@method("HttpNfcLease", "HttpNfcLeaseGetManifest")
def manifest(context: Context, lease: Lease) -> Any:
    lease.check()
    entry = vim.HttpNfcLease.ManifestEntry
    return soap.array(
        entry,
        [
            entry(
                key=device.key,
                sha1=device.sha1,
                checksum=device.sha1,
                checksumType="sha1",
                size=device.made.stat().st_size,
                disk=True,
                capacity=lease.simulator.storage.info(device.path).capacity_bytes,
            )
            for device in lease.devices
            if device.made is not None and device.path is not None
        ],
    )


# --- /nfc -----------------------------------------------------------------------------------------------------------


def serve(handler: "Handler") -> None:
    """A download: no ranges, no length, cut where a test says so. The ticket in the URL is all that it takes."""
    simulator = handler.simulator
    match = re.fullmatch(r"/nfc/([0-9a-f]+)/([^/?]+)", handler.path.split("?")[0])
    lease = simulator.leases.get(match.group(1)) if match else None
    device = next((one for one in lease.devices if match and one.name == match.group(2)), None) if lease else None
    name = f"{handler.command} /nfc"
    if lease is None or device is None or lease.state != "ready":
        simulator.record_call(None, name, None, fault="404")
        handler.text(404, "404 Not Found\n")
        return
    assert lease.session is not None
    user = lease.session.user.name
    try:
        simulator.injector.apply("call", name, device.key)
    except DropConnection:
        simulator.record_call(user, name, device.key, fault="drop")
        handler.close_connection = True
        raise
    except vmodl.MethodFault as fault:
        simulator.record_call(user, name, device.key, fault=type(as_fault(fault)).__name__)
        handler.text(500, "500 Internal Server Error\n")
        return
    path = lease.file(device)
    cut = path.stat().st_size // 2 if simulator.settings.take("lease_cuts") else None
    simulator.record_call(user, name, device.key, fault="cut" if cut is not None else None)
    handler.send_response(200)
    handler.send_header("Content-Type", "application/x-vnd.vmware-streamVmdk" if device.path else "application/nvram")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    if handler.command != "HEAD":
        _send(handler, lease, path, cut)


def _send(handler: "Handler", lease: Lease, path: Path, cut: int | None) -> None:
    sent = 0
    begun = time.monotonic()
    with open(path, "rb") as stream:
        while data := os.read(stream.fileno(), 64 * 1024):
            speed = lease.simulator.settings.lease_bytes_per_second
            while speed and sent / speed > time.monotonic() - begun and not lease.over.wait(TICK):
                pass
            if lease.over.is_set() or (cut is not None and sent >= cut):
                handler.close_connection = True
                raise DropConnection
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            sent += len(data)
    handler.wfile.write(b"0\r\n\r\n")
