# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The control socket: what a guest, an administrator, a cut cable or a clock would do to the simulated data centre.

One JSON object a line, ``{"op": ..., fields}``; the answer is ``{"ok": true, "result": ...}`` or
``{"ok": false, "error": "..."}``. The ops and their fields are listed in tests/simulator/README.md.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import random
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyVmomi import vim, vmodl

from .cloning import clone_vm, linked_clone
from .methods.reconfigure import set_extra_config
from .model import SimulatorError
from .places import Places
from .proxy import fill_units
from .storage import StorageError

PIECE = 1 << 20
LARGEST_ANSWER = 16 << 20


class ControlServer:
    """Made by :func:`start`."""

    def __init__(self, simulator: Any, path: Path) -> None:
        self._simulator = simulator
        self._path = Path(path)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ops: dict[str, Callable[..., Any]] = {
            "guest_write": self._guest_write,
            "guest_discard": self._guest_discard,
            "read_disk": self._read_disk,
            "set_full": self._set_full,
            "spoil_tracking": self._spoil_tracking,
            "cut_network": self._cut_network,
            "restore_network": self._restore_network,
            "nfc": self._nfc,
            "grow_disk": self._grow_disk,
            "reset_cbt": self._reset_cbt,
            "power": self._power,
            "set_tools": self._set_tools,
            "set_host": simulator.set_host,
            "set_nfs_server": simulator.set_nfs_server,
            "add_hosts": simulator.add_hosts,
            "add_dvswitch": simulator.add_dvswitch,
            "set_dvswitch": simulator.set_dvswitch,
            "networks": simulator.networks,
            "set_privileges": simulator.set_privileges,
            "set_settings": simulator.set_settings,
            "expire_sessions": simulator.expire_sessions,
            "outage": self._outage,
            "end_outage": self._end_outage,
            "inject": simulator.inject,
            "clear_injections": simulator.clear_injections,
            "calls": simulator.calls,
            "state": simulator.state,
            "set_lun": simulator.proxy.set_lun,
            "proxy": simulator.proxy.set_identity,
            "fill_units": self._fill_units,
            "set_disk_uuid": self._set_disk_uuid,
            "clone_vm": self._clone_vm,
            "linked_clone": self._linked_clone,
            "set_extra_config": self._set_extra_config,
            "attachments": simulator.proxy.attachments,
            "make_tag": simulator.tags.make,
            "remove_tag": simulator.tags.remove,
            "attach_tag": simulator.tags.attach_by_name,
            "tags": simulator.tags.of_vm,
            "crash_proxy": simulator.proxy.crash,
            **Places(simulator).ops(),
        }

    def start(self) -> None:
        """Bind the socket, for its owner only, and serve it. A socket that a killed simulator left is replaced."""
        if self._path.exists() and stat.S_ISSOCK(self._path.lstat().st_mode):
            self._path.unlink()
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchmod(self._listener.fileno(), 0o600)  # Linux gives the file the mode of the unbound socket
            # a socket's path may have 107 bytes only; this one always fits
            self._listener.bind(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)
        os.chmod(self._path, 0o600)
        self._listener.listen(16)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def stop(self) -> None:
        """End the socket and its connections."""
        with self._lock:
            connections = list(self._connections)
        for sock in [self._listener, *connections]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="control", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock.makefile("rb") as lines:
                for line in lines:
                    sock.sendall(json.dumps(self.answer(line), default=str).encode() + b"\n")
        except OSError:
            pass  # the client is gone
        finally:
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    def answer(self, line: bytes | str) -> dict[str, Any]:
        """The answer to one request."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is a JSON object")
            op = request.pop("op", None)
            if op not in self._ops:
                raise ValueError(f"there is no op {op!r}; there are {', '.join(sorted(self._ops))}")
            return {"ok": True, "result": self._ops[op](**request)}
        except (SimulatorError, StorageError, ValueError, TypeError, KeyError, binascii.Error) as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}
        except vmodl.MethodFault as fault:
            return {"ok": False, "error": f"{type(fault).__name__}: {fault.msg}"}

    # as the guest

    @contextlib.contextmanager
    def _leaf(self, vm: str, disk: int | str) -> Iterator[str]:
        machine = self._simulator.find_vm(vm)
        with self._simulator.vm_lock(machine):
            yield self._simulator.disk_path(machine, disk)

    def _guest_write(
        self,
        vm: str,
        disk: int | str,
        offset: int = 0,
        data: str | None = None,
        pattern: dict[str, Any] | None = None,
        offsets: list[int] | None = None,
    ) -> dict[str, Any]:
        if (data is None) == (pattern is None):
            raise ValueError("guest_write wants either data (base64) or pattern {seed, length}")
        content = None if data is None else base64.b64decode(data, validate=True)
        length = int(pattern["length"]) if content is None else len(content)
        places = [offset] if offsets is None else offsets
        with self._leaf(vm, disk) as path:
            for place in places:
                for at, piece in _pieces(content, pattern):
                    self._simulator.storage.write(path, place + at, piece)
        return {"path": path, "written": length * len(places)}

    def _guest_discard(self, vm: str, disk: int | str, offset: int, length: int) -> dict[str, Any]:
        with self._leaf(vm, disk) as path:
            self._simulator.storage.discard(path, offset, length)
        return {"path": path, "discarded": length}

    def _read_disk(
        self,
        vm: str,
        disk: int | str,
        snapshot: str | None = None,
        offset: int = 0,
        length: int | None = None,
        to: str | None = None,
    ) -> dict[str, Any]:
        storage = self._simulator.storage
        machine = self._simulator.find_vm(vm)
        with self._simulator.vm_lock(machine):
            path = self._simulator.disk_path(machine, disk, snapshot)
            capacity = storage.info(path).capacity_bytes
            result = {"path": path, "capacity_bytes": capacity}
            if length is not None and to is None:
                if length > LARGEST_ANSWER:
                    raise ValueError(f"at most {LARGEST_ANSWER} bytes at once; give `to` a file's name for more")
                return {**result, "data": base64.b64encode(storage.read(path, offset, length)).decode()}
            end = capacity if length is None else offset + length
            digest = hashlib.sha256()
            with open(to, "wb") if to is not None else contextlib.nullcontext() as file:
                for at in range(offset, end, PIECE):
                    piece = storage.read(path, at, min(PIECE, end - at))
                    digest.update(piece)
                    if file is not None:
                        file.write(piece)
        return {**result, "sha256": digest.hexdigest()}

    def _outage(self, seconds: float, at: int = 0, done: bool = True) -> None:
        self._simulator.server.outage(seconds, at, done)

    def _end_outage(self) -> Any:
        return self._simulator.server.end_outage()

    # as the hardware

    def _set_full(self, datastore: str, full: bool = True) -> None:
        if datastore not in self._simulator.storage.datastores:
            raise ValueError(f"there is no datastore {datastore!r}")
        self._simulator.storage.set_full(datastore, full)

    def _spoil_tracking(self, vm: str, disk: int | str) -> None:
        with self._leaf(vm, disk) as path:
            self._simulator.storage.spoil_tracking(path)

    def _cut_network(
        self, host: str | None = None, seconds: float | None = None, mode: str = "refuse"
    ) -> dict[str, Any]:
        return {"hosts": self._simulator.nfc.cut_network(host, seconds, mode)}

    def _restore_network(self, host: str | None = None) -> dict[str, Any]:
        return {"hosts": self._simulator.nfc.restore_network(host)}

    def _nfc(self, **fields: Any) -> dict[str, Any]:
        service = self._simulator.nfc
        if fields.pop("clear_faults", False):
            service.clear_faults()
        if fields.pop("reset_peaks", False):
            service.reset_peaks()
        faults = {kind: fields.pop(f"{kind}_faults", None) for kind in ("read", "write", "query", "open")}
        dropped = fields.pop("drop", None)
        service.configure(**fields)
        for kind, fault in faults.items():
            if fault is not None:
                service.fail(kind, **fault)
        status = service.status()
        if dropped is not None:
            status["dropped"] = service.drop_connections(None if dropped is True else dropped)
        return status

    # as the administrator

    def _grow_disk(self, vm: str, disk: int | str, capacity_bytes: int) -> None:
        self._simulator.grow_disk(self._simulator.find_vm(vm), disk, capacity_bytes)

    def _reset_cbt(self, vm: str, disk: int | str) -> None:
        self._simulator.reset_cbt(self._simulator.find_vm(vm), disk)

    def _power(self, vm: str, state: str) -> None:
        self._simulator.set_power(self._simulator.find_vm(vm), state)

    def _set_tools(self, vm: str, running: bool) -> None:
        self._simulator.set_tools(self._simulator.find_vm(vm), running)

    def _set_disk_uuid(self, vm: str, disk: int, uuid: str) -> None:
        """Another file with the same UUID, as clones made in the vSphere client and copies of an array have."""
        machine, storage = self._simulator.find_vm(vm), self._simulator.storage
        with machine.lock, self._simulator.lock:
            for one in machine.disks:
                if one.key == int(disk):
                    one.backing.uuid = uuid
                    storage.set_uuid(one.backing.fileName, uuid)
            machine.touch()

    def _clone_vm(self, vm: str, name: str, disk_uuids: str = "new", running: bool = False) -> str:
        return clone_vm(self._simulator, vm, name, disk_uuids, running)

    def _linked_clone(self, vm: str, snapshot: str, name: str, running: bool = False) -> str:
        return linked_clone(self._simulator, vm, snapshot, name, running)

    def _set_extra_config(self, vm: str, settings: dict[str, str]) -> dict[str, str]:
        """As somebody in the vSphere client; an empty value takes a setting away. -> all settings"""
        machine = self._simulator.find_vm(vm)
        with machine.lock, self._simulator.lock:
            options = [vim.option.OptionValue(key=key, value=value) for key, value in settings.items()]
            set_extra_config(machine.config, options)
            if settings:
                machine.touch()
            return {option.key: option.value for option in machine.config.extraConfig}

    def _fill_units(self, vm: str, leave: int | None = None, controllers: int = 4) -> dict[str, int]:
        return fill_units(self._simulator.find_vm(vm), leave, controllers)


def _pieces(content: bytes | None, pattern: dict[str, Any] | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of what a guest writes; a pattern is ``random.Random(seed).randbytes(length)``."""
    if content is not None:
        yield 0, content
        return
    assert pattern is not None
    source, length = random.Random(pattern["seed"]), int(pattern["length"])
    for at in range(0, length, PIECE):
        yield at, source.randbytes(min(PIECE, length - at))


def start(simulator: Any, path: Path) -> ControlServer:
    """Serve the control socket at ``path``; the server has ``stop()``, and becomes ``simulator.control``."""
    server = ControlServer(simulator, path)
    server.start()
    simulator.control = server
    return server
