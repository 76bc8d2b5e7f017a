# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The place where it is measured: a simulated VM with a large disk, exports of it, and the peers at the same endpoint.

What is timed begins with data that is on the disk (``sync``) and ends when the result is: ours by itself, a peer's
file is synced by us within its time. All is read from the page cache where it fits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from administrator import Administrator
from ansible_collections.openvadp.backup.plugins.module_utils.backup.export import export_point
from ansible_collections.openvadp.backup.plugins.module_utils.backup.request import ExportRequest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.restore import in_place
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.request import FilesRequest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.run import (
    open_source,
    opened,
    restore_files,
)
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import DiskChoice, RestoreRequest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.to_file import restore_point
from ansible_collections.openvadp.backup.plugins.module_utils.transport.endpoints import (
    Endpoint,
    open_vddk,
    serve_nbdkit,
)
from ansible_collections.openvadp.backup.plugins.module_utils.transport.https import flat_file
from ansible_collections.openvadp.backup.plugins.module_utils.transport.opener import OpenContext
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import find_library
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import change_tracking, snapshots
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.datastore_files import folder_url
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef, find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from harness import ROOT, Simulator, made_repository

from .data import GIB, MIB, Content

VM = "app01"
DISK = 2001
SMALL_DISK = 2000
# No multiple of a cluster, as real disks are.
_ODD_BYTES = 67 * 512
_TRANSPORT = "nbdssl"
#: Where the tools of file systems are, for an ordinary user too.
TOOLS_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _tools_env() -> Dict[str, str]:
    return dict(os.environ, PATH=TOOLS_PATH)


def say(text: str) -> None:
    """What goes on, beside the figures."""
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of *work*, which begins when nothing is left to write."""
    os.sync()
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def _track(session: Session, vm: VmRef, wanted: str) -> None:
    change_tracking.ensure(session, vm, wanted, activate=True, timeout=3600, check_mode=False)


class Rig:
    """A running simulator, its VM with *gib* GiB of data on a disk of twice the size, and a folder for what is made."""

    def __init__(self, folder: Path, gib: int) -> None:
        self.folder = folder
        self.simulator = Simulator(folder / "vcenter", vms="standard")
        self._stack = contextlib.ExitStack()
        self._stack.callback(self.simulator.stop)
        try:
            self._prepare(gib)
        except BaseException:
            self.close()
            raise

    def _prepare(self, gib: int) -> None:
        self.capacity_bytes = 2 * gib * GIB + _ODD_BYTES
        self.connection = Connection(**self.simulator.connection)
        self.vddk = find_library(self.simulator.facts["vddk_libdir"])
        self.simulator.control.call("grow_disk", vm=VM, disk=DISK, capacity_bytes=self.capacity_bytes)
        os.truncate(self.extent, 0)
        os.truncate(self.extent, self.capacity_bytes)
        self.content = Content()
        begun = time.monotonic()
        self.blocks = self.content.fill(self.extent, self.capacity_bytes, gib * GIB)
        os.sync()
        say(f"disk of {self.capacity_bytes} bytes with {gib} GiB of data: {time.monotonic() - begun:.1f} s")
        self.session = self._stack.enter_context(Session.connect(self.connection))
        self.vm = find_vm(self.session, name=VM)
        _track(self.session, self.vm, "enabled")

    def close(self) -> None:
        """End the simulator."""
        self._stack.close()

    @property
    def extent(self) -> Path:
        """The file of the large disk on its datastore."""
        return self.folder / "vcenter" / "datastores" / "vmfs01" / VM / f"{VM}_1-flat.vmdk"

    # The VM

    @contextlib.contextmanager
    def snapshot(self, vm: Optional[VmRef] = None) -> Iterator[snapshots.Snapshot]:
        """A snapshot of a VM as it is now, gone afterwards."""
        vm = vm or self.vm
        taken = snapshots.create_snapshot(self.session, vm, f"bench-{time.monotonic_ns()}", quiesce="never").snapshot
        try:
            yield taken
        finally:
            snapshots.remove_snapshot(self.session, vm, taken)

    def change(self, share: float) -> Dict[bytes, List[int]]:
        """The guest writes to a share of its data. :returns: what it wrote, and where."""
        changes = self.content.changes(self.blocks, share)
        for data, offsets in changes.items():
            self.simulator.control.call("guest_write", vm=VM, disk=DISK, offsets=offsets, data=data)
        return changes

    def large_disk(self, name: str, key: int, capacity_bytes: int) -> VmRef:
        """Make an empty disk of another VM a large one, with change tracking on."""
        self.simulator.control.call("grow_disk", vm=name, disk=key, capacity_bytes=capacity_bytes)
        vm = find_vm(self.session, name=name)
        _track(self.session, vm, "enabled")
        return vm

    def allocation_queries(self) -> int:
        """Questions about allocated blocks that VDDK has asked so far."""
        places = self.simulator.control.call("nfc")
        return sum(place["queries"] for group in ("hosts", "local") for place in places[group].values())

    def small_disks(self, name: str, count: int, data_bytes: int) -> List[int]:
        """Give a VM more disks, with so many bytes on each. :returns: their device keys."""
        administrator = Administrator(self.simulator.facts, name)
        try:
            units = [unit for unit in range(4, 16) if unit != 7][:count]
            keys = [administrator.add_disk(unit, 2 * data_bytes) for unit in units]
        finally:
            administrator.close()
        for key in keys:
            self.simulator.write(name, key, 0, seed=key, length=data_bytes)
        return keys

    def change_everywhere(self, name: str, key: int, count: int, stride: int) -> None:
        """The guest writes a sector at each of *count* places, and gives most of the space back.

        So there are that many changed areas and little to read.
        """
        data, places = os.urandom(512), [number * stride for number in range(count)]
        path = self.simulator.control.call("guest_write", vm=name, disk=key, offsets=places, data=data)["path"]
        folder, file = path[1:].replace("]", "/", 1).split("/ ", 1)
        extent = self.folder / "vcenter" / "datastores" / folder / file.replace(".vmdk", "-flat.vmdk")
        kept = places[count // 10]
        length = str(extent.stat().st_size - kept)
        subprocess.run(
            ["fallocate", "--punch-hole", "--offset", str(kept), "--length", length, str(extent)], check=True
        )

    # Ours

    def options(self, repository: Path, snapshot: snapshots.Snapshot, **options: Any) -> Dict[str, Any]:
        """An export of the large disk, as keywords of ExportRequest but the connection."""
        return {
            "vm": {"name": VM},
            "repository": str(repository),
            "snapshot_moid": snapshot.moid,
            "disks": [str(DISK)],
            "transports": [_TRANSPORT],
            "vddk_libdir": self.vddk.libdir,
            "nfc_port": self.simulator.facts["nfc_port"],
            **options,
        }

    def export(self, repository: Path, snapshot: snapshots.Snapshot, **options: Any) -> Dict[str, Any]:
        """Make a restore point. :returns: the export's result."""
        options = self.options(repository, snapshot, **options)
        return export_point(ExportRequest(connection=self.connection, **options), check_mode=False)

    def proxy_options(self) -> Dict[str, Any]:
        """This machine as the simulator's proxy VM."""
        return {name: self.simulator.facts[name] for name in ("device_dir", "sysfs_dir")}

    def export_apart(self, repository: Path, snapshot: snapshots.Snapshot, **options: Any) -> Dict[str, Any]:
        """The same in a process of its own; see :mod:`.child`."""
        request = {"connection": asdict(self.connection), "request": self.options(repository, snapshot, **options)}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.child"],
            check=False,
            input=json.dumps(request),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the export in a process of its own failed:\n{done.stderr[-4000:]}")
        return dict(json.loads(done.stdout))

    def repository(self, name: str) -> Path:
        """A new repository."""
        return made_repository(self.empty(name))

    def empty(self, name: str) -> Path:
        """An empty folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def layer(self, repository: Path, point: str, key: int = DISK) -> str:
        store = Repository.open(str(repository)).find_vm(vm_name=VM)
        return str(store.layer_path(key, point))

    def restore(self, repository: Path, point: str, dest: Path) -> Path:
        """Restore the large disk to a raw image, without the read afterwards. :returns: the image."""
        request = RestoreRequest(
            repository=str(repository),
            vm_name=VM,
            point=point,
            dest=str(dest),
            disks=[DiskChoice(DISK)],
            verify=False,
        )
        return Path(restore_point(request, check_mode=False)["restored"][0]["target"])

    def restore_in_place(self, repository: Path, point: str, **options: Any) -> Dict[str, Any]:
        """Write a point back into the large disk and read back what was written. :returns: what is told of the disk."""
        request = RestoreRequest(
            repository=str(repository),
            vm_name=VM,
            point=point,
            target="in_place",
            overwrite=True,
            disks=[DiskChoice(DISK)],
            connection=self.connection,
            vm={"name": VM},
            transports=[_TRANSPORT],
            vddk_libdir=self.vddk.libdir,
            nfc_port=self.simulator.facts["nfc_port"],
            **options,
        )
        return dict(in_place.restore_point(request, check_mode=False)["restored"][0])

    def reset_tracking(self) -> None:
        """What a restore wrote is no longer held against the disk once a full point follows."""
        _track(self.session, self.vm, "reset")

    # Files

    def file_points(self, repository: Path, file_bytes: int, disk_bytes: int, layers: int) -> Tuple[str, FilesRequest]:
        """Points of a disk with a large file in ext4. :returns: the newest layer, and the request for the file."""
        raw, tree = self.folder / "files.raw", self.empty("files-tree")
        with (tree / "big").open("wb") as file:
            for _number in range(file_bytes // MIB):
                file.write(self.content.piece(MIB))
        raw.touch()
        os.truncate(raw, disk_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(raw)], check=True, env=_tools_env())
        self.file_sha256 = hashlib.sha256((tree / "big").read_bytes()).hexdigest()
        shutil.rmtree(tree)
        administrator = Administrator(self.simulator.facts, VM)
        try:
            key = administrator.add_disk(4, disk_bytes)
        finally:
            administrator.close()
        # The tracking of a new disk begins with the next snapshot.
        with self.snapshot():
            pass
        content = raw.read_bytes()
        raw.unlink()
        pieces = [at for at in range(0, len(content), MIB) if content[at : at + MIB].strip(b"\0")]
        for number in range(layers):
            for at in pieces[number::layers] if number else pieces:
                data = content[at : at + MIB]
                self.simulator.control.call("guest_write", vm=VM, disk=key, offsets=[at], data=data)
            with self.snapshot() as snapshot:
                mode = "incremental" if number else "full"
                self.export(repository, snapshot, mode=mode, point=f"p{number}", disks=[str(key)])
        request = FilesRequest(
            repository=str(repository), vm_name=VM, disks=[key], paths=("/big",), dest=str(self.folder / "files-dest")
        )
        return self.layer(repository, f"p{layers - 1}", key), request

    def timed_files(self, request: FilesRequest, rounds: int) -> Tuple[List[float], List[float]]:
        """Seconds to the first byte of a file, and to the file in its place, of each round."""
        times: Tuple[List[float], List[float]] = ([], [])
        for _round in range(rounds):
            times[0].append(timed(partial(self._first_byte, request)))
            self.empty("files-dest")
            times[1].append(timed(partial(self._restore_file, request)))
        shutil.rmtree(self.folder / "files-dest")
        return times

    @staticmethod
    def _first_byte(request: FilesRequest) -> None:
        with opened(request, open_source(request, request.point)) as selection:
            (entry,) = selection.entries
            with contextlib.closing(selection.reader.read(entry)) as pieces:
                assert next(pieces)

    def _restore_file(self, request: FilesRequest) -> None:
        (file,) = restore_files(request, check_mode=False)["files"]
        assert file["sha256"] == self.file_sha256

    # Peers

    def guestfish(self, layer: str, timeout: int) -> Tuple[float, float]:
        """Seconds to the first byte of the file and to all of it, by an appliance without KVM."""
        env = dict(_tools_env(), LIBGUESTFS_BACKEND="direct", LIBGUESTFS_BACKEND_SETTINGS="force_tcg")
        # The kernel of tests/setup.sh, where this machine has none.
        environment = ROOT / "build" / "appliance" / "environment.json"
        if environment.exists():
            env.update(json.loads(environment.read_text()))
        dest = self.folder / "peer-file"
        command = ["guestfish", "--ro", "--format=qcow2", "-a", layer, "-m", "/dev/sda:/", "download", "/big"]
        first = self._first_byte_of([*command, "/dev/stdout"], env)
        whole = timed(partial(self._peer_file, [*command, str(dest)], dest, env, timeout))
        return first, whole

    def debugfs(self, layer: str) -> Tuple[float, float]:
        """The same by debugfs, of a raw image that qemu-img made of the chain."""
        raw, dest = self.folder / "peer.raw", self.folder / "peer-file"
        convert = timed(partial(self.convert_to_raw, layer, raw))
        first = self._first_byte_of(["debugfs", "-R", "cat /big", str(raw)], _tools_env())
        command = ["debugfs", "-R", f"dump /big {dest}", str(raw)]
        whole = timed(partial(self._peer_file, command, dest, _tools_env(), None))
        raw.unlink()
        return convert + first, convert + whole

    @staticmethod
    def _first_byte_of(command: List[str], env: Dict[str, str]) -> float:
        begun = time.monotonic()
        options: Dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": env}
        with subprocess.Popen(command, **options) as process:
            assert process.stdout is not None
            got = process.stdout.read(1)
            seconds = time.monotonic() - begun
            # Killed, guestfish leaves its sockets and overlays in /tmp.
            with open(os.devnull, "wb") as nowhere:
                shutil.copyfileobj(process.stdout, nowhere)
        assert got, command
        return seconds

    def _peer_file(self, command: List[str], dest: Path, env: Dict[str, str], timeout: Optional[int]) -> None:
        subprocess.run(command, check=True, env=env, stderr=subprocess.DEVNULL, timeout=timeout)
        image.fsync_file(str(dest))
        assert hashlib.sha256(dest.read_bytes()).hexdigest() == self.file_sha256
        dest.unlink()

    @contextlib.contextmanager
    def _endpoint(self, snapshot: snapshots.Snapshot) -> Iterator[Tuple[Endpoint, RuntimeDir]]:
        (disk,) = (disk for disk in snapshots.snapshot_disks(self.session, snapshot) if disk.key == DISK)
        with RuntimeDir("bench-peer") as run_dir, open_vddk(
            self.session,
            self.vm,
            file=disk.file,
            snapshot_moid=snapshot.moid,
            transports=[_TRANSPORT],
            writable=False,
            vddk=self.vddk,
            nfc_port=self.simulator.facts["nfc_port"],
            run_dir=run_dir,
            io_timeout=180,
            allocation=True,
        ) as endpoint:
            yield endpoint, run_dir

    @contextlib.contextmanager
    def plain_file(self, context: OpenContext, *_disk: Any, **_options: Any) -> Iterator[Endpoint]:
        """In the place of :func:`open_disk`: the file of the large disk, which the snapshot froze."""
        with serve_nbdkit(
            ["--readonly", "file", str(self.extent)],
            subject=str(self.extent),
            run_dir=context.run_dir,
            io_timeout=context.io_timeout,
            transport="hotadd",
        ) as endpoint:
            endpoint.method = "proxy_hotadd"
            yield endpoint

    def qemu_img_convert(self, snapshot: snapshots.Snapshot, dest: Path) -> None:
        """A compressed qcow2 of the snapshot's disk by qemu-img, from an endpoint as ours is."""
        options = ["-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", "-m", "16", "-W"]
        with self._endpoint(snapshot) as (endpoint, _run_dir):
            subprocess.run(["qemu-img", "convert", *options, endpoint.uri, str(dest)], check=True)
        image.fsync_file(str(dest))

    def nbdcopy(self, snapshot: snapshots.Snapshot, dest: Path) -> None:
        """A qcow2, not compressed, of the snapshot's disk by nbdcopy, from an endpoint and to a server as ours are."""
        image.create_layer(str(dest), self.capacity_bytes)
        with self._endpoint(snapshot) as served:
            endpoint, run_dir = served
            with image.serve(str(dest), run_dir=run_dir, writable=True, connections=4) as target:
                command = ["nbdcopy", "--flush", "--destination-is-zero", endpoint.uri, target.uri]
                subprocess.run(command, check=True)
        image.fsync_file(str(dest))

    def curl(self, snapshot: snapshots.Snapshot, dest: Path) -> None:
        """The base file of the snapshot's disk, downloaded as a whole by curl."""
        (disk,) = (disk for disk in snapshots.snapshot_disks(self.session, snapshot) if disk.key == DISK)
        connection = self.connection
        url = f"https://{connection.address}{folder_url(flat_file(disk.file), self.vm.datacenter_path)}"
        # The cookie is no argument here either.
        cookie = self.session.cookie.replace('"', '\\"')
        options = f'url = "{url}"\ncookie = "{cookie}"\ncacert = "{connection.ca_path}"\noutput = "{dest}"\n'
        command = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "--config", "-"]
        subprocess.run(command, input=options, text=True, check=True)
        image.fsync_file(str(dest))

    @contextlib.contextmanager
    def powered_off(self) -> Iterator[None]:
        """Meanwhile the VM is off, so that the server gives the files of its disks."""
        self.simulator.control.call("power", vm=VM, state="poweredOff")
        try:
            yield
        finally:
            self.simulator.control.call("power", vm=VM, state="poweredOn")

    @staticmethod
    def convert_to_raw(layer: str, dest: Path) -> None:
        """A raw image of a chain of layers by qemu-img."""
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-m", "16", "-W", layer, str(dest)]
        subprocess.run(command, check=True)
        image.fsync_file(str(dest))

    def compressed_bytes(self, changes: Dict[bytes, List[int]]) -> int:
        """What the changed clusters take when qemu compresses them, without the tables of the image."""
        raw, packed = self.folder / "changed.raw", self.folder / "changed.qcow2"
        with raw.open("wb") as file:
            for data, offsets in changes.items():
                for _offset in offsets:
                    file.write(data)
        size = raw.stat().st_size
        options = ["-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"]
        subprocess.run(["qemu-img", "convert", "-c", *options, str(raw), str(packed)], check=True)
        stored = packed.stat().st_size
        raw.write_bytes(b"")
        os.truncate(raw, size)
        subprocess.run(["qemu-img", "convert", "-c", *options, str(raw), str(packed)], check=True)
        tables = packed.stat().st_size + -(-size // (512 << 20)) * image.CLUSTER_BYTES
        raw.unlink()
        packed.unlink()
        return stored - tables
