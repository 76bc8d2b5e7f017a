# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Export and import leases: ExportSnapshot, ExportVm, ImportVApp, HttpNfcLease, and what goes through ``/nfc``
(VADP facts 51)."""

from __future__ import annotations

import hashlib
import itertools
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from .. import disks, soap, storage, stream_vmdk
from ..inventory import VirtualApp, VirtualMachine, datastore_of, disks_in, is_rdm
from ..model import Managed
from ..services import DropConnection, as_fault
from . import Context, find_object, method
from .snapshots import SnapshotObject

if TYPE_CHECKING:
    from ..server import Handler

# Where a download breaks off that is to be cut.
CUT_AFTER = 256 * 1024
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
        self.import_key: str | None = None
        self.uploaded = False
        self.sha1 = ""  # of the last whole download
        self.size = 0


class Lease(Managed):
    """An HttpNfcLease. It belongs to the session that made it, and holds the disks that it reads open."""

    type = vim.HttpNfcLease

    writes = False

    def __init__(self, context: Context, vm: VirtualMachine | None, config: Any) -> None:
        super().__init__(context.simulator, f"session[{secrets.token_hex(8)}]lease-{next(_NUMBERS)}")
        self.vm: Any = vm
        self.session = context.session
        self.ticket = secrets.token_hex(16)
        self.state = "initializing"
        self.error: Any = None
        self.percent = 0
        self.timeout = self.simulator.settings.lease_timeout
        self.deadline = time.monotonic() + self.timeout
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._openers: list[Any] = []
        self.devices = self._devices(config) if vm is not None else []

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
        self._hold()
        self.simulator.leases[self.ticket] = self
        assert self.session is not None
        self.session.objects[self.moid] = self
        threading.Thread(target=self._live, name=self.moid, daemon=True).start()

    def _hold(self) -> None:
        try:
            for device in self.devices:
                if device.path is not None:
                    opener = self.simulator.storage.open(device.path, f"lease:{self.moid}", write=self.writes)
                    self._openers.append(opener)
        except Exception:
            self._let_go()
            raise

    def _prepare(self) -> None:
        """What has to be done before it is ready. :raises vmodl.MethodFault:"""
        self.simulator.injector.apply("task", "ExportSnapshot", self.vm.moid)

    def _live(self) -> None:
        time.sleep(self.simulator.settings.task_delay)
        try:
            self._prepare()
        except Exception as error:  # noqa: BLE001  a task's failure is its answer
            self.end("error", as_fault(error))
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

    def may_complete(self) -> bool:
        return True

    def _let_go(self) -> None:
        self.simulator.leases.pop(self.ticket, None)
        for opener in self._openers:
            opener.close()
        self._openers.clear()

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
        # A host that is logged in to directly says "*"; vCenter names the host that has the bytes.
        host = simulator.settings.lease_host or ("*" if simulator.settings.esxi else self._host())
        host = host if host == "*" else f"{host}:{simulator.port}"
        thumbprint = {
            "sha1": simulator.thumbprints["sha1"],
            "sha256": simulator.thumbprints["sha256"],
            "empty": "",
            "wrong": ":".join(["AA"] * 20),
        }[simulator.settings.lease_thumbprint]
        return vim.HttpNfcLease.DeviceUrl(
            key=device.key,
            importKey=device.import_key or device.key,
            url=f"https://{host}/nfc/{self.ticket}/{device.name}",
            sslThumbprint=thumbprint,
            disk=device.path is not None,
            targetId=device.name,
            datastoreKey=datastore_of(device.path) if device.path is not None else "",
            fileSize=0,
        )

    def _host(self) -> str:
        name = str(self.simulator.inventory.get(self.vm.host).name)
        return name if name in self.simulator.web_hosts else self.simulator.host

    # bytes

    def content(self, device: _Device) -> Iterator[bytes]:
        """The bytes to send; a disk's are a stream-optimised VMDK of what its chain holds."""
        if device.path is None:
            assert device.local is not None
            yield device.local.read_bytes()
            return
        store, path = self.simulator.storage, device.path
        capacity = store.info(path).capacity_bytes
        data = store.allocated(path, 0, capacity, 64 * 1024)
        digest, size = hashlib.sha1(), 0
        for piece in stream_vmdk.stream(device.name, capacity, data, lambda at, length: store.read(path, at, length)):
            digest.update(piece)
            size += len(piece)
            yield piece
        device.sha1, device.size = digest.hexdigest(), size


class ImportLease(Lease):
    """The lease of a machine that is being made. What does not come to its end leaves nothing."""

    writes = True

    def __init__(self, context: Context, make: Any) -> None:
        super().__init__(context, None, None)
        self._make = make

    def _prepare(self) -> None:
        self.simulator.injector.apply("task", "ImportVApp", self.moid)
        self.vm = self._make()
        self.devices = [one for one in self._devices(self.vm.config) if one.path is not None]
        for device in self.devices:
            device.import_key = f"/{self.vm.name}/{device.key.split('/')[-1]}"
        self._hold()

    def may_complete(self) -> bool:
        return all(device.uploaded for device in self.devices)

    def end(self, state: str, error: Any = None) -> None:
        was_over = self.over.is_set()
        super().end(state, error)
        if state == "error" and not was_over and self.vm is not None:
            from .machines import delete_files

            with self.vm.lock:
                delete_files(self.vm)
                self.simulator.inventory.remove(self.vm)

    def take(self, device: _Device, pieces: Any) -> None:
        """A disk's content. :raises stream_vmdk.BadStream: :raises storage.StorageError:"""
        assert device.path is not None
        store = self.simulator.storage
        for offset, data in stream_vmdk.grains(pieces, store.info(device.path).capacity_bytes):
            if self.over.is_set():
                raise DropConnection
            if data.count(0) != len(data):
                store.write(device.path, offset, data)
        device.uploaded = True


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


@method("ResourcePool", "ImportVApp", changing=True)
def import_vapp(context: Context, pool: Any, spec: Any, folder: Any, host: Any) -> Any:
    from . import folders

    if not isinstance(spec, vim.vm.VmImportSpec):
        raise vmodl.fault.NotSupported()
    if isinstance(pool, VirtualApp):
        if folder is not None:
            raise vmodl.fault.InvalidArgument(invalidProperty="folder")
        target: Any = pool.machines_folder
    else:
        if folder is None:
            raise vmodl.fault.NotSupported()
        folders.outside_of_vapps(context, pool.ref)
        target = find_object(context, folder._moId, "Folder")
    context.require("VirtualMachine.Inventory.Create", target)
    make = folders.maker(context, target, spec.configSpec, pool.ref, host)
    lease = ImportLease(context, make)
    lease.start()
    return lease.ref


@method("HttpNfcLease", "HttpNfcLeaseProgress")
def progress(context: Context, lease: Lease, percent: int) -> None:
    """Taken while it is initializing, too. Of faults the method has none but Timedout; a lease that is over is gone."""
    if lease.state == "error" and isinstance(lease.error, (vim.fault.Timedout, vim.fault.NotAuthenticated)):
        raise lease.error
    if lease.state not in ("initializing", "ready"):
        raise vmodl.fault.ManagedObjectNotFound(obj=lease.ref, msg=f"The lease is {lease.state}.")
    lease.percent = percent
    lease.deadline = time.monotonic() + lease.timeout


@method("HttpNfcLease", "HttpNfcLeaseComplete")
def complete(context: Context, lease: Lease) -> None:
    lease.check()
    if not lease.may_complete():
        raise vim.fault.InvalidState(msg="Not all disks were uploaded.")
    lease.end("done")


@method("HttpNfcLease", "HttpNfcLeaseAbort")
def abort(context: Context, lease: Lease, fault: Any) -> None:
    if lease.state == "done":
        raise vim.fault.InvalidState(msg="The lease is done.")
    lease.end("error", fault or vmodl.fault.RequestCanceled(msg="The lease was aborted."))


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
                size=device.size,
                disk=True,
                capacity=lease.simulator.storage.info(device.path).capacity_bytes,
            )
            for device in lease.devices
            if device.sha1 and device.path is not None
        ],
    )


# --- /nfc -----------------------------------------------------------------------------------------------------------


def _named(handler: "Handler") -> tuple[Any, Any]:
    """The lease and the device that a request is about; (None, None) without. The ticket is all that it takes."""
    simulator = handler.simulator
    match = re.fullmatch(r"/nfc/([0-9a-f]+)/([^/?]+)", handler.path.split("?")[0])
    lease = simulator.leases.get(match.group(1)) if match else None
    device = next((one for one in lease.devices if match and one.name == match.group(2)), None) if lease else None
    name = f"{handler.command} /nfc"
    if lease is None or device is None or lease.state != "ready":
        simulator.record_call(None, name, None, fault="404")
        _refuse(handler, 404, "404 Not Found\n")
        return None, None
    assert lease.session is not None
    try:
        simulator.injector.apply("call", name, device.key)
    except DropConnection:
        simulator.record_call(lease.session.user.name, name, device.key, fault="drop")
        handler.close_connection = True
        raise
    except vmodl.MethodFault as fault:
        simulator.record_call(lease.session.user.name, name, device.key, fault=type(as_fault(fault)).__name__)
        _refuse(handler, 500, "500 Internal Server Error\n")
        return None, None
    return lease, device


def _refuse(handler: "Handler", status: int, text: str, body: Any = None) -> None:
    """:param body: what has not come yet of it."""
    handler.close_connection = True
    for _unused in body if body is not None else handler.chunks():
        pass  # a client that still sends would see a reset connection instead of the answer
    handler.text(status, text)


def receive(handler: "Handler") -> None:
    """An upload: a POST of a stream-optimised VMDK, and nothing else; cut where a test says so."""
    lease, device = _named(handler)
    if lease is None:
        return
    simulator, name, user = handler.simulator, f"{handler.command} /nfc", lease.session.user.name
    refused, body = None, handler.chunks()
    if not isinstance(lease, ImportLease):
        refused = (405, "an export lease takes nothing")
    elif handler.command != "POST":
        refused = (405, "disks are sent by POST")
    elif handler.headers.get("Content-Type") != "application/x-vnd.vmware-streamVmdk":
        refused = (415, f"{handler.headers.get('Content-Type')} is no content type of a disk")
    elif "Content-Length" not in handler.headers and "Transfer-Encoding" not in handler.headers:
        refused = (411, "neither a length nor chunks")
    if refused is None:
        cut = simulator.settings.take("lease_cuts")
        try:
            lease.take(device, _arriving(handler, lease, body, cut))
        except (stream_vmdk.BadStream, storage.StorageError) as error:
            refused = (500, f"{type(error).__name__}: {error}")
    if refused is not None:
        simulator.record_call(user, name, device.key, fault=str(refused[0]))
        _refuse(handler, refused[0], f"{refused[1]}\n", body)
        return
    simulator.record_call(user, name, device.key)
    handler.text(201, "")


def _arriving(handler: "Handler", lease: Lease, body: Iterator[bytes], cut: bool) -> Iterator[bytes]:
    begun, came = time.monotonic(), 0
    for piece in body:
        for start in range(0, len(piece), CUT_AFTER):
            part = piece[start : start + CUT_AFTER]
            came += len(part)
            speed = lease.simulator.settings.lease_bytes_per_second
            while speed and came / speed > time.monotonic() - begun and not lease.over.wait(TICK):
                pass
            if lease.over.is_set() or (cut and came > CUT_AFTER):
                handler.close_connection = True
                raise DropConnection
            yield part


def serve(handler: "Handler") -> None:
    """A download: no ranges, no length, cut where a test says so."""
    lease, device = _named(handler)
    if lease is None:
        return
    simulator, name, user = handler.simulator, f"{handler.command} /nfc", lease.session.user.name
    if isinstance(lease, ImportLease):
        simulator.record_call(user, name, device.key, fault="405")
        handler.text(405, "an import lease gives nothing\n")
        return
    cut = simulator.settings.take("lease_cuts")
    simulator.record_call(user, name, device.key, fault="cut" if cut else None)
    handler.send_response(200)
    handler.send_header("Content-Type", "application/x-vnd.vmware-streamVmdk" if device.path else "application/nvram")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    if handler.command != "HEAD":
        _send(handler, lease, device, cut)


def _send(handler: "Handler", lease: Lease, device: _Device, cut: bool) -> None:
    sent = 0
    begun = time.monotonic()
    for data in lease.content(device):
        while not lease.over.is_set():
            speed = lease.simulator.settings.lease_bytes_per_second
            if not speed or sent / speed <= time.monotonic() - begun:
                break
            lease.over.wait(TICK)
        if lease.over.is_set() or (cut and sent >= CUT_AFTER):
            raise DropConnection
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        sent += len(data)
    handler.wfile.write(b"0\r\n\r\n")
