# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The network side of the VDDK double: its entry on the vCenter port, and the simulated hosts' NFC port.

The vCenter port (``serve_plain``) speaks JSON lines: ``hello`` gives the certificate's thumbprints, ``login`` checks
the user, ``open`` checks what vCenter checks, takes the lock and answers with the serving host and a ticket;
``prepare`` and ``end`` are VDDK's access calls. An answer is ``{"ok": true, ...}`` or ``{"ok": false, "vix": number}``;
``log`` holds lines for the library's log.

The NFC port greets in plain text as the real one does. The double sends ``NFC <ticket> <mode> <buffer bytes>``, gets
``200 ...`` or ``5xx <vix number> ...`` (a disk by san or hotadd is had so from the vCenter port: no host has a part in
it), and then there are requests and replies, little-endian::

    request  u32 magic, u16 type, u16 0, u64 id, u64 offset, u64 length, u64 chunk      (a write's data follows)
    reply    u32 magic, u32 vix number, u64 id, u64 length                              (length bytes follow)
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import storage as storage_module
from .advanced import AdvancedModes, CannotAttach
from .inventory import disks_in
from .model import SimulatorError
from .networking import backup_addresses
from .proxy import Node

GREETING = (
    b"220 VMware Authentication Daemon Version 1.10: SSL Required, ServerDaemonProtocol:SOAP, "
    b"MKSDisplayProtocol:VNC , VMXARGS supported, NFCSSL supported/t\r\n"
)
MAGIC = 0x3143464E
REQUEST = struct.Struct("<IHHQQQQ")
REPLY = struct.Struct("<IIQQ")
READ, WRITE, ALLOCATED, FLUSH, CLOSE = 1, 2, 3, 4, 5
_KINDS = {READ: "read", WRITE: "write", ALLOCATED: "query"}
LARGEST_REQUEST = 64 << 20
TICKET_SECONDS = 60.0

VIX_FAIL = 1
VIX_OUT_OF_MEMORY = 2
VIX_INVALID_ARG = 3
VIX_FILE_NOT_FOUND = 4
VIX_NOT_SUPPORTED = 6
VIX_DISK_FULL = 8
VIX_FILE_READ_ONLY = 11
VIX_FILE_ACCESS_ERROR = 13
VIX_FILE_ALREADY_LOCKED = 15
VIX_HOST_USER_PERMISSIONS = 3014
VIX_VM_NOT_FOUND = 4000
VIX_NETWORK_CONN_REFUSED = 14009
VIX_SERVER_NOT_AVAILABLE = 14015
VIX_INVALID = 16000
VIX_OUTOFRANGE = 16007
VIX_NOLICENSE = 16064

MODES = ("file", "san", "hotadd", "nbdssl", "nbd")


class Refused(Exception):
    """A call of the double that fails, with its VIX number."""

    def __init__(self, vix: int, *log: str) -> None:
        super().__init__(log[-1] if log else str(vix))
        self.vix = vix
        self.log = list(log)


@dataclass
class Grant:
    """An opened disk whose NFC connection has not come yet, or is there."""

    ticket: str
    host: str
    path: str
    vm: str
    write: bool
    capacity: int
    opener: storage_module.Opener | None
    expires: float
    taken: bool = False
    memory: int = 0
    machine: Any = None  # the VM whose disk it is
    user: Any = None
    node: Node | None = None  # by hotadd: the device here
    device: Path | None = None  # what is read: it was looked for by the disk's UUID


@dataclass
class Fault:
    """Requests that go wrong. ``count`` < 0: for ever. ``after``: so many go well first."""

    kind: str  # "read", "write", "query" (of allocated blocks) or "open"
    count: int
    after: int = 0
    vix: int = VIX_FAIL
    action: str = "fail"  # or "drop": the connection is cut instead
    host: str | None = None
    path: str | None = None

    def hits(self, kind: str, host: str, path: str) -> bool:
        if kind != self.kind or self.count == 0 or self.host not in (None, host) or self.path not in (None, path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.count > 0:
            self.count -= 1
        return True


@dataclass
class HostPort:
    """The NFC port of one simulated host."""

    name: str
    listener: socket.socket | None = None
    # Addresses of its other VMkernel NICs, where they are loopback ones: authd listens on all of them.
    addresses: set[str] = field(default_factory=set)
    others: dict[str, socket.socket] = field(default_factory=dict)
    connections: set[socket.socket] = field(default_factory=set)
    disks: int = 0
    peak: int = 0
    opened: int = 0
    refused: int = 0
    memory: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    queries: int = 0
    cut: str | None = None  # "refuse" or "blackhole"
    restore: threading.Timer | None = None


class NfcService:
    """Made by :func:`start`. All methods are thread-safe."""

    def __init__(self, simulator: Any) -> None:
        self.simulator = simulator
        self.port = 0
        self._lock = threading.Condition()
        self._hosts: dict[str, HostPort] = {}
        self._local = {name: HostPort(name) for name in ("san", "hotadd")}  # what the machine reads by itself
        self.advanced = AdvancedModes(simulator)
        self._grants: dict[str, Grant] = {}
        self._entries: set[socket.socket] = set()
        self._faults: list[Fault] = []
        self._stopped = False
        self._next_host = 0
        self.max_connections: int | None = None
        self.memory_bytes: int | None = None
        self.max_request_bytes: int | None = None
        self.when_full = "refuse"
        self.delay = 0.0
        self.bytes_per_second: float | None = None
        # What QueryAllocatedBlocks costs, whatever its length; a real host was seen to take a second (VADP facts 5).
        self.query_seconds = 0.0
        self.thumbprint = "sha1"  # what VDDK takes; or "sha256"
        self.serve: str | None = None

    # the port

    def start(self) -> None:
        """Bind one free port on every simulated host's address.

        :raises OSError: no port is free on all of them.
        """
        names = [host.name for host in self.simulator.hosts()]
        for _unused in range(50):
            listeners: list[socket.socket] = []
            port = 0
            try:
                for name in names:
                    listeners.append(self._listen(name, port))
                    port = listeners[0].getsockname()[1]
            except OSError:
                for listener in listeners:
                    listener.close()
                continue
            self.port = port
            break
        else:
            raise OSError(f"no port is free on all of {', '.join(names)}")
        for name, listener in zip(names, listeners):
            self._hosts[name] = HostPort(name, listener)
            threading.Thread(target=self._accept, args=(name, listener), name=f"nfc {name}", daemon=True).start()
        for host in self.simulator.hosts():
            self.follow(host)

    def follow(self, host: Any) -> None:
        """The host's VMkernel NICs have changed: its authd listens on the addresses that they have now."""
        vnics = host.network.vnic if host.network is not None else ()
        addresses = {vnic.spec.ip.ipAddress for vnic in vnics if vnic.spec.ip is not None and vnic.spec.ip.ipAddress}
        with self._lock:
            item = self._hosts.get(host.name)
            if item is not None:
                item.addresses = {one for one in addresses if one.startswith("127.") and one != item.name}
                self._listen_on_others(item)

    def _listen_on_others(self, item: HostPort) -> None:
        for address in set(item.others) - item.addresses:
            listener = item.others.pop(address)
            _shut(listener)
            listener.close()
        if self._stopped or item.cut == "refuse":
            return
        for address in item.addresses - set(item.others):
            with contextlib.suppress(OSError):  # somebody else's port, or an address that is not of this machine
                item.others[address] = self._listen(address, self.port)
                threading.Thread(target=self._accept, args=(item.name, item.others[address]), daemon=True).start()

    @staticmethod
    def _listen(name: str, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((name, port))
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        return listener

    def stop(self) -> None:
        """End listeners and connections."""
        with self._lock:
            self._stopped = True
            hosts = list(self._hosts.values())
            sockets = [sock for host in hosts for sock in host.connections] + list(self._entries)
            listeners = [host.listener for host in hosts if host.listener is not None]
            listeners += [listener for host in hosts for listener in host.others.values()]
            for host in hosts:
                host.listener = None
                host.others.clear()
                if host.restore is not None:
                    host.restore.cancel()
            self._lock.notify_all()
        for sock in [*listeners, *sockets]:
            _shut(sock)
        for listener in listeners:
            listener.close()

    def _accept(self, name: str, listener: socket.socket) -> None:
        while True:
            try:
                sock, _address = listener.accept()
            except OSError:
                return
            with self._lock:
                host = self._hosts[name]
                if listener is not host.listener and listener not in host.others.values():
                    sock.close()
                    return
                host.connections.add(sock)
            threading.Thread(target=self._serve_host, args=(host, sock), name=f"nfc {name}", daemon=True).start()

    def _serve_host(self, host: HostPort, sock: socket.socket) -> None:
        grant = None
        try:
            if host.cut == "blackhole":
                self._wait_out(host)
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(GREETING)
            line = _read_line(sock, 4096)
            if line is None:
                return
            grant = self._redeem(host, line)
            sock.sendall(b"200 NFC session ready\r\n")
            self._serve_disk(host, sock, grant)
        except Refused as refusal:
            with self._lock:
                host.refused += 1
            with contextlib.suppress(OSError):
                sock.sendall(f"503 {refusal.vix} {refusal}\r\n".encode())
        except (OSError, ValueError):
            pass  # the connection is gone
        finally:
            if grant is not None:
                self._release(host, grant, closed=False)
            with self._lock:
                host.connections.discard(sock)
            sock.close()

    def _release(self, host: HostPort, grant: Grant, closed: bool) -> None:
        """The disk is closed: its lock is free, and its place at the host. Once is enough, twice does no harm.

        :param closed: as it ought to be; a disk by hotadd of a process that just ended stays attached.
        """
        if grant.opener is not None:
            grant.opener.close()
        with self._lock:
            known = self._grants.pop(grant.ticket, None) is not None
            if known:
                host.disks -= 1
                host.memory -= grant.memory
                self._lock.notify_all()
        if known and grant.node is not None:
            if closed:
                with contextlib.suppress(CannotAttach):
                    self.advanced.detach(grant.user, grant.node)
            else:
                self.advanced.abandon(grant.node)

    def serve_local(self, sock: socket.socket, line: str) -> None:
        """A disk by san or hotadd: the words of the NFC port, and no host has a part in it."""
        words = line.split(" ")
        host = self._local.get(words[2]) if len(words) == 4 else None
        grant = None
        try:
            if host is None:
                raise Refused(VIX_INVALID_ARG, "neither san nor hotadd")
            with self._lock:
                host.connections.add(sock)
            grant = self._redeem(host, line)
            sock.sendall(b"200 ready\r\n")
            self._serve_disk(host, sock, grant)
        except Refused as refusal:
            sock.sendall(f"503 {refusal.vix} {refusal}\r\n".encode())
        finally:
            if host is not None:
                if grant is not None:
                    self._release(host, grant, closed=False)
                with self._lock:
                    host.connections.discard(sock)
                    self._lock.notify_all()

    def reset_machine(self) -> None:
        """The machine that reads by san and hotadd is reset: its processes are gone."""
        with self._lock:
            doomed = [sock for host in self._local.values() for sock in host.connections]
        for sock in doomed:
            _shut(sock)
        with self._lock:
            self._lock.wait_for(lambda: not any(host.connections for host in self._local.values()), 10)

    def _wait_out(self, host: HostPort) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._stopped or host.cut != "blackhole")

    def _redeem(self, host: HostPort, line: str) -> Grant:
        words = line.split(" ")
        if len(words) != 4 or words[0] != "NFC" or not words[3].isdecimal():
            raise Refused(VIX_INVALID_ARG, "login with USER/PASS required")
        memory = int(words[3])
        with self._lock:
            grant = self._grants.get(words[1])
            if grant is None or grant.taken or grant.host != host.name or grant.expires < time.monotonic():
                raise Refused(VIX_HOST_USER_PERMISSIONS, "the ticket is not known")

            def room() -> bool:
                if host.name in self._local:
                    return True
                return (self.max_connections is None or host.disks < self.max_connections) and (
                    self.memory_bytes is None or host.memory + memory <= self.memory_bytes
                )

            if not room():
                if self.when_full == "queue":
                    self._lock.wait_for(lambda: self._stopped or room())
                elif self.max_connections is not None and host.disks >= self.max_connections:
                    raise Refused(VIX_NETWORK_CONN_REFUSED, "too many NFC connections to this host")
                else:
                    raise Refused(VIX_OUT_OF_MEMORY, f"NFC error 5: Failed to allocate the requested {memory} bytes")
            grant.taken, grant.memory = True, memory
            host.disks += 1
            host.opened += 1
            host.peak = max(host.peak, host.disks)
            host.memory += memory
        return grant

    def _serve_disk(self, host: HostPort, sock: socket.socket, grant: Grant) -> None:
        header = bytearray(REQUEST.size)
        buffer = bytearray(1 << 20)
        spoiled = False
        while _read_exactly(sock, memoryview(header)):
            magic, kind, _unused, number, offset, length, chunk = REQUEST.unpack(header)
            if magic != MAGIC or (kind != ALLOCATED and length > LARGEST_REQUEST):
                return
            if kind in (READ, WRITE) and len(buffer) < length:
                buffer = bytearray(length)
            view = memoryview(buffer)[:length] if kind in (READ, WRITE) else memoryview(b"")
            if kind == WRITE and not _read_exactly(sock, view):
                return
            self._wait_out(host)
            self._pause(length if kind in (READ, WRITE) else 0)
            vix, answer = 0, memoryview(b"")
            try:
                self.fail_as_told(_KINDS.get(kind, ""), host.name, grant.path)
                if host.name == "san" and kind in (READ, WRITE):
                    self._check_lun(grant)
                if grant.node is not None and kind in (READ, WRITE):
                    answer = self._transfer(host, grant, kind, offset, view)
                elif kind == READ:
                    if self.max_request_bytes is not None and length > self.max_request_bytes:
                        raise Refused(VIX_OUT_OF_MEMORY, f"NFC error 5: {length} bytes")
                    self.simulator.storage.read_into(grant.path, offset, view)
                    answer = view
                    host.bytes_read += length
                elif kind == WRITE:
                    if not grant.write:
                        raise Refused(VIX_FILE_READ_ONLY)
                    if not spoiled:
                        self.simulator.storage.spoil_tracking(grant.path)
                        spoiled = True
                    self.simulator.storage.write(grant.path, offset, view)
                    host.bytes_written += length
                elif kind == ALLOCATED:
                    host.queries += 1
                    time.sleep(self.query_seconds)
                    areas = self.simulator.storage.allocated(grant.path, offset, length, max(chunk, 512))
                    answer = memoryview(b"".join(struct.pack("<QQ", *area) for area in areas))
                elif kind == CLOSE:
                    # before the answer: whoever has closed finds the disk unlocked
                    self._release(host, grant, closed=True)
                elif kind != FLUSH:
                    raise Refused(VIX_NOT_SUPPORTED)
            except Refused as refusal:
                vix = refusal.vix
            except storage_module.StorageError as error:
                vix = _vix_of(error)
            _send(sock, REPLY.pack(MAGIC, vix, number, len(answer)), answer)

    def _check_lun(self, grant: Grant) -> None:
        if not self.advanced.lun_is_visible(grant.machine, grant.path):
            raise Refused(VIX_FAIL)

    def _transfer(self, host: HostPort, grant: Grant, kind: int, offset: int, view: memoryview) -> memoryview:
        """Read or write an attached disk through its device. -> what was read."""
        assert grant.node is not None and grant.device is not None
        if offset + len(view) > grant.capacity:
            raise Refused(VIX_OUTOFRANGE)
        if kind == WRITE and not grant.write:
            raise Refused(VIX_FILE_READ_ONLY)
        try:
            with open(grant.device, "rb" if kind == READ else "r+b", buffering=0) as device:
                device.seek(offset)
                if kind == WRITE:
                    device.write(view)
                    host.bytes_written += len(view)
                    return memoryview(b"")
                if device.readinto(view) != len(view):
                    raise Refused(VIX_FAIL)
        except OSError:
            raise Refused(VIX_FAIL) from None
        host.bytes_read += len(view)
        return view

    def _pause(self, length: int) -> None:
        seconds = self.delay + (length / self.bytes_per_second if self.bytes_per_second else 0.0)
        if seconds > 0:
            time.sleep(seconds)

    def fail_as_told(self, kind: str, host: str, path: str) -> None:
        """:raises Refused: a fault was set for such a request. :raises OSError: it is to cut the connection."""
        with self._lock:
            hit = next((fault for fault in self._faults if fault.hits(kind, host, path)), None)
            self._faults = [fault for fault in self._faults if fault.count != 0]
        if hit is None:
            return
        if hit.action == "drop":
            raise OSError("dropped as told")
        raise Refused(hit.vix)

    # what a test does to it

    def cut_network(self, host: str | None = None, seconds: float | None = None, mode: str = "refuse") -> list[str]:
        """Close the connections of a host (None: of all) and refuse or swallow new ones.

        :param seconds: restored by itself after that; None: by :meth:`restore_network`. :returns: the hosts' names.
        """
        if mode not in ("refuse", "blackhole"):
            raise SimulatorError(f"mode is refuse or blackhole, not {mode!r}")
        doomed: list[socket.socket] = []
        with self._lock:
            hosts = self._named(host)
            for item in hosts:
                if item.restore is not None:
                    item.restore.cancel()
                    item.restore = None
                item.cut = mode
                if mode == "refuse":
                    doomed += item.connections
                    if item.listener is not None:
                        doomed.append(item.listener)
                        item.listener = None
                    doomed += item.others.values()
                    item.others.clear()
                if seconds is not None:
                    item.restore = threading.Timer(seconds, self.restore_network, [item.name])
                    item.restore.daemon = True
                    item.restore.start()
        for sock in doomed:
            _reset(sock)
        return [item.name for item in hosts]

    def restore_network(self, host: str | None = None) -> list[str]:
        """The host can be reached again. What was cut stays cut: a client has to connect anew."""
        with self._lock:
            hosts = self._named(host)
            for item in hosts:
                if item.restore is not None:
                    item.restore.cancel()
                    item.restore = None
                item.cut = None
                if item.listener is None and not self._stopped:
                    item.listener = self._listen(item.name, self.port)
                    threading.Thread(target=self._accept, args=(item.name, item.listener), daemon=True).start()
                self._listen_on_others(item)
            self._lock.notify_all()
        return [item.name for item in hosts]

    def drop_connections(self, host: str | None = None) -> int:
        """Cut what is connected now; new connections are welcome. -> how many."""
        with self._lock:
            doomed = [sock for item in self._named(host) for sock in item.connections]
        for sock in doomed:
            _reset(sock)
        return len(doomed)

    def fail(self, kind: str, count: int, **fields: Any) -> None:
        """The next ``count`` requests of a kind fail (-1: for ever); fields as of :class:`Fault`."""
        with self._lock:
            self._faults.append(Fault(kind, count, **fields))

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def configure(self, **fields: Any) -> None:
        """Settings by name, as in the set below; a limit of None is none."""
        known = {
            "max_connections",
            "memory_bytes",
            "max_request_bytes",
            "when_full",
            "delay",
            "bytes_per_second",
            "query_seconds",
            "thumbprint",
            "serve",
        }
        unknown = set(fields) - known
        if unknown:
            raise SimulatorError(f"nfc has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        if fields.get("when_full", "refuse") not in ("refuse", "queue"):
            raise SimulatorError("when_full is refuse or queue")
        if fields.get("thumbprint", "sha1") not in ("sha1", "sha256"):
            raise SimulatorError("thumbprint is sha1 or sha256")
        with self._lock:
            if fields.get("serve") is not None:
                self._named(fields["serve"])
            for name, value in fields.items():
                setattr(self, name, value)
            self._lock.notify_all()

    def status(self) -> dict[str, Any]:
        """Connections and limits, for the control socket."""
        with self._lock:
            return {
                "port": self.port,
                "max_connections": self.max_connections,
                "memory_bytes": self.memory_bytes,
                "max_request_bytes": self.max_request_bytes,
                "when_full": self.when_full,
                "delay": self.delay,
                "bytes_per_second": self.bytes_per_second,
                "query_seconds": self.query_seconds,
                "thumbprint": self.thumbprint,
                "serve": self.serve,
                "faults": [vars(fault).copy() for fault in self._faults],
                "hosts": {host.name: _figures(host) for host in self._hosts.values()},
                "local": {host.name: _figures(host) for host in self._local.values()},
                "disks": [
                    {"host": grant.host, "vm": grant.vm, "path": grant.path, "write": grant.write}
                    for grant in self._grants.values()
                ],
            }

    def reset_peaks(self) -> None:
        with self._lock:
            for host in [*self._hosts.values(), *self._local.values()]:
                host.peak, host.opened, host.refused, host.queries = host.disks, 0, 0, 0

    def _named(self, host: str | None) -> list[HostPort]:
        if host is None:
            return list(self._hosts.values())
        if host not in self._hosts:
            raise SimulatorError(f"there is no host {host!r}, only {', '.join(self._hosts)}")
        return [self._hosts[host]]

    # the entry on the vCenter port

    def serve_entry(self, sock: socket.socket) -> None:
        """Serve a connection of the double to the vCenter port up to its end, and close it."""
        with self._lock:
            if self._stopped:
                sock.close()
                return
            self._entries.add(sock)
        entry = _Entry(self)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (line := _read_line(sock, 1 << 16)) is not None:
                if line.startswith("NFC "):
                    self.serve_local(sock, line)
                    return
                sock.sendall(json.dumps(entry.answer(line), ensure_ascii=False).encode() + b"\n")
        except (OSError, ValueError):
            pass  # the connection is gone
        finally:
            entry.close()
            with self._lock:
                self._entries.discard(sock)
            sock.close()

    def choose_host(self, vm: Any, datastore: str, snapshot: str | None) -> Any:
        """The serving host: for a snapshot any that sees the datastore, else the VM's own (VADP facts 19)."""
        try:
            if snapshot is None:
                host = self.simulator.serving_host_for(datastore, vm)
            else:
                able = self.simulator.hosts_of(datastore)
                wanted = [host for host in able if host.name == self.serve]
                host = wanted[0] if wanted else self.simulator.serving_host_for(datastore)
        except SimulatorError as error:
            raise Refused(
                VIX_SERVER_NOT_AVAILABLE, f"VixDiskLibVim: no host can serve [{datastore}]: {error}"
            ) from None
        if host.in_maintenance or not host.connected:
            raise Refused(
                VIX_SERVER_NOT_AVAILABLE, f"VixDiskLibVim: host {host.name} is in maintenance mode or not connected."
            )
        return host

    def handed_out(self, name: str) -> str:
        """Where a client is told to connect: to the host's NIC that is tagged for backup, if any (VADP facts 25).

        Here only one that can be reached: in a test, an address of the loopback range.
        """
        with self._lock:
            reached = set(self._hosts[name].others) if name in self._hosts else set()
        tagged = [one for host in self.simulator.hosts() if host.name == name for one in backup_addresses(host)]
        return next((one for one in tagged if one in reached), name)

    def add_grant(self, grant: Grant) -> None:
        with self._lock:
            self._grants[grant.ticket] = grant

    def drop_grant(self, ticket: str) -> None:
        """The double's entry is over: a ticket that nobody took is void, and its lock is free."""
        with self._lock:
            grant = self._grants.get(ticket)
            if grant is None or grant.taken:
                return
            del self._grants[ticket]
        if grant.opener is not None:
            grant.opener.close()
        if grant.node is not None:
            self.advanced.abandon(grant.node)


class _Entry:
    """One connection of the double to the vCenter port."""

    def __init__(self, service: NfcService) -> None:
        self._service = service
        self._simulator = service.simulator
        self._user: Any = None
        self._tickets: list[str] = []

    def close(self) -> None:
        for ticket in self._tickets:
            self._service.drop_grant(ticket)

    def answer(self, line: str) -> dict[str, Any]:
        try:
            request = json.loads(line)
            operation = {
                "hello": self._hello,
                "login": self._login,
                "open": self._open,
                "prepare": self._prepare,
                "end": self._end,
                "cleanup": self._cleanup,
            }.get(request.get("op"))
            if operation is None:
                raise Refused(VIX_NOT_SUPPORTED)
            if self._user is None and request["op"] not in ("hello", "login"):
                raise Refused(VIX_HOST_USER_PERMISSIONS, "VixDiskLibVim: not logged in")
            return {"ok": True, **operation(request)}
        except Refused as refusal:
            if self._user is not None and request["op"] == "open":
                moid = str(request["vmx"]).partition("=")[2]
                self._simulator.record_call(self._user.name, "VixDiskLib_Open", moid, fault=f"VIX {refusal.vix}")
            return {"ok": False, "vix": refusal.vix, "log": refusal.log}

    def _hello(self, request: dict[str, Any]) -> dict[str, Any]:
        """The thumbprint in the form that this VDDK compares: SHA-1 for every version (VADP facts 40)."""
        form = self._service.thumbprint
        return {form: self._simulator.thumbprints[form]}

    def _login(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._user = self._simulator.authenticate(request["user"], request["password"])
        except SimulatorError:
            raise Refused(
                VIX_HOST_USER_PERMISSIONS,
                "VixDiskLibVim: Login failure. Callback error 12.",
                "VixDiskLibVim: Cannot complete login due to an incorrect user name or password.",
            ) from None
        return {}

    def _vm(self, spec: str) -> Any:
        kind, _unused, moid = spec.partition("=")
        try:
            vm = self._simulator.find_vm(moid) if kind == "moref" and moid else None
        except SimulatorError:
            vm = None
        if vm is None or vm.moid != moid:
            raise Refused(
                VIX_VM_NOT_FOUND,
                f"VixDiskLibVim: Failed to find the VM {spec}. The object has been deleted or not created.",
            )
        return vm

    def _require(self, privilege: str, vix: int) -> None:
        try:
            self._simulator.require(self._user, privilege)
        except SimulatorError:
            raise Refused(
                vix, f"VixDiskLibVim: Permission to perform this operation was denied: {privilege}."
            ) from None

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        service, simulator, path = self._service, self._simulator, request["path"]
        write, snapshot = not request["read_only"], request["snapshot"] or None
        vm = self._vm(request["vmx"])
        privilege = "DiskRandomAccess" if write else "DiskRandomRead"
        self._require(f"VirtualMachine.Provisioning.{privilege}", VIX_HOST_USER_PERMISSIONS)
        if vm.config.keyId is not None:
            self._require("Cryptographer.Access", VIX_HOST_USER_PERMISSIONS)
        try:
            with simulator.vm_lock(vm):
                self._check_path(vm, path, snapshot, write)
            mode, node, log = self._choose_mode(vm, request)
            with simulator.vm_lock(vm):
                if mode not in ("san", "hotadd"):
                    self._check_path(vm, path, snapshot, write)
                    name = service.choose_host(vm, storage_module.Storage.split_path(path)[0], snapshot).name
                else:
                    name = mode
                if mode != "hotadd":
                    service.fail_as_told("open", name, path)
                ticket = secrets.token_hex(16)
                info = simulator.storage.info(path)
                links = len(simulator.storage.chain(path))
                opener = None if node is not None else simulator.storage.open(path, f"nfc:{vm.moid}", write)
        except storage_module.StorageError as error:
            raise Refused(_vix_of(error), f"VixDiskLibVim: {error}") from None
        expires = time.monotonic() + TICKET_SECONDS
        grant = Grant(ticket, name, path, vm.moid, write, info.capacity_bytes, opener, expires)
        grant.machine, grant.user, grant.node = vm, self._user, node
        grant.device = None if node is None else simulator.proxy.found_by_uuid(node)
        service.add_grant(grant)
        self._tickets.append(ticket)
        simulator.record_call(self._user.name, "VixDiskLib_Open", vm.moid, changing=write)
        digits = info.uuid.replace("-", "").lower()
        uuid = " ".join(digits[at : at + 2] for at in range(0, len(digits), 2))
        return {
            "host": service.handed_out(name),
            "name": name,
            "device": str(grant.device) if node is not None else "",
            "ide": int(self._on_ide(vm, path, snapshot)),
            "ticket": ticket,
            "mode": mode,
            "sectors": info.capacity_bytes // 512,
            "links": links,
            "parent": info.parent or "",
            "uuid": f"{uuid[:23]}-{uuid[24:]}",
            "log": log,
        }

    def _choose_mode(self, vm: Any, request: dict[str, Any]) -> tuple[str, Node | None, list[str]]:
        """The first mode of the list that can be had; silently nbdssl if none can (VADP facts 42).

        -> (mode, the device of a disk by hotadd, lines for the log)
        """
        path, transports, snapshot = request["path"], request["transports"], request["snapshot"] or None
        write, advanced = not request["read_only"], self._service.advanced
        wanted = [mode for mode in transports.split(":") if mode]
        unknown = [mode for mode in wanted if mode not in MODES]
        if unknown:
            raise Refused(VIX_INVALID, f"VixDiskLib: transport modes {transports}: {unknown[0]} is not known.")
        log = []
        for mode in wanted or ["san", "hotadd", "nbdssl"]:
            if mode in ("nbdssl", "nbd"):
                return mode, None, log
            problem: str | None = "the disk is not a local file"
            if mode == "san":
                problem = advanced.san_problem(vm, path, write, request.get("allow", ""), request.get("deny", ""))
                if problem is None:
                    return mode, None, log
            elif mode == "hotadd":
                problem = advanced.hotadd_problem(vm, path, snapshot)
                if problem is None:
                    self._service.fail_as_told("open", mode, path)
                    try:
                        node = advanced.attach(self._user, vm, path, write, request.get("tmp", ""))
                    except CannotAttach as error:
                        problem = str(error)
                    else:
                        return mode, node, log
            log.append(
                f"VixDiskLib: VixDiskLib_OpenEx: Mode {mode} cannot be used for this disk ({problem}). "
                "Trying the next one."
            )
        return "nbdssl", None, log

    def _on_ide(self, vm: Any, path: str, snapshot: str | None) -> bool:
        config = vm.snapshot(snapshot).config if snapshot else vm.config
        keys = {one.controllerKey for one in disks_in(config.hardware.device) if one.backing.fileName == path}
        return bool(keys & {200, 201})

    def _check_path(self, vm: Any, path: str, snapshot: str | None, write: bool) -> None:
        """Only what vCenter gives out: the snapshot's own files verbatim, else the VM's (VADP facts 14, 40)."""
        simulator = self._simulator
        snapshots = [item["moid"] for item in simulator.snapshots(vm)]
        if not simulator.storage.exists(path):
            raise Refused(VIX_FILE_NOT_FOUND, f"VixDiskLibVim: Failed to find {path}.")
        if snapshot is not None:
            if snapshot not in snapshots:
                raise Refused(
                    VIX_FAIL,
                    f"VixDiskLibVim: The object 'vim.vm.Snapshot:{snapshot}' has already been deleted or has not been"
                    " completely created.",
                )
            if write:
                raise Refused(VIX_FILE_ACCESS_ERROR, f"VixDiskLibVim: {path} belongs to a snapshot: read-only.")
            disks = simulator.vm_disks(vm, snapshot)
            allowed = {disk.path for disk in disks}
        else:
            disks = simulator.vm_disks(vm)
            leaves = {disk.path for disk in disks}
            allowed = {member for leaf in leaves for member in simulator.storage.chain(leaf)}
            if path in leaves and vm.power_state != "poweredOff":
                raise Refused(VIX_FILE_ACCESS_ERROR, f"VixDiskLibVim: {path} is locked: {vm.moid} is running.")
            if write and (snapshots or path not in leaves):
                raise Refused(
                    VIX_FILE_ACCESS_ERROR,
                    f"VixDiskLibVim: {path} can't be written: {vm.moid} has snapshots, or it is no leaf.",
                )
        if path not in allowed:
            raise Refused(VIX_FILE_ACCESS_ERROR, f"VixDiskLibVim: {path} is not a disk of {vm.moid} {snapshot or ''}.")
        if any(disk.path == path and (disk.rdm == "physicalMode" or _independent(disk)) for disk in disks) and snapshot:
            where = next(_address(disk) for disk in disks if disk.path == path)
            raise Refused(
                VIX_FAIL,
                f"GetFileName: Cannot create disk spec for disk {where}. Error occurred when obtaining the file name"
                f" for {where}.",
            )

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._access(request, "Global.DisableMethods", self._simulator.prepare_access)

    def _end(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._access(request, "Global.EnableMethods", self._simulator.end_access)

    def _cleanup(self, request: dict[str, Any]) -> dict[str, Any]:
        vm = self._vm(request["vmx"]) if request["vmx"] else None
        cleaned, remaining = self._service.advanced.cleanup(self._user, vm, request["tmp"])
        return {"cleaned": cleaned, "remaining": remaining}

    def _access(self, request: dict[str, Any], privilege: str, call: Any) -> dict[str, Any]:
        if not 0 < len(request["identity"]) <= 50:
            raise Refused(VIX_INVALID_ARG, "VixDiskLibVim: the identity has 1 to 50 characters.")
        vm = self._vm(request["vmx"])
        # without the privilege the answer is that the host is not licensed for it (VADP facts 48)
        self._require(privilege, VIX_NOLICENSE)
        try:
            call(self._user.name, vm, request["identity"])
        except SimulatorError as error:
            raise Refused(VIX_FAIL, f"VixDiskLibVim: {error}") from None
        return {}


def _independent(disk: Any) -> bool:
    return str(disk.mode or "").startswith("independent")


def _address(disk: Any) -> str:
    """As the log of VDDK names a disk; the simulator's keys are 2000 + 16 x bus + unit."""
    return f"scsi{(disk.key - 2000) // 16}:{(disk.key - 2000) % 16}"


def _figures(host: HostPort) -> dict[str, Any]:
    return {
        "connections": host.disks,
        "peak": host.peak,
        "opened": host.opened,
        "refused": host.refused,
        "memory_bytes": host.memory,
        "bytes_read": host.bytes_read,
        "bytes_written": host.bytes_written,
        "queries": host.queries,
        "cut": host.cut,
    }


def _vix_of(error: storage_module.StorageError) -> int:
    for kind, vix in (
        (storage_module.NotFound, VIX_FILE_NOT_FOUND),
        (storage_module.Locked, VIX_FILE_ALREADY_LOCKED),
        (storage_module.NoSpace, VIX_DISK_FULL),
        (storage_module.OutOfRange, VIX_OUTOFRANGE),
        (storage_module.NotALeaf, VIX_FILE_ACCESS_ERROR),
    ):
        if isinstance(error, kind):
            return vix
    return VIX_FAIL


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _reset(sock: socket.socket) -> None:
    """Cut a connection: its thread wakes up, the peer gets a reset when that thread closes it. A listener is closed."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        sock.shutdown(socket.SHUT_RDWR)
        if listening:
            sock.close()


def _read_line(sock: socket.socket, limit: int) -> str | None:
    """One line without its end; None at the end of the connection. Nothing behind the line is taken."""
    line = bytearray()
    while not line.endswith(b"\n"):
        # peek, so that binary data behind the line stays in the socket
        data = sock.recv(4096, socket.MSG_PEEK)
        if not data:
            return None
        end = data.find(b"\n")
        line += sock.recv(len(data) if end < 0 else end + 1)
        if len(line) > limit:
            raise ValueError("a line that does not end")
    return line.decode().rstrip("\r\n")


def _read_exactly(sock: socket.socket, view: memoryview) -> bool:
    while len(view):
        count = sock.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def _send(sock: socket.socket, header: bytes, data: memoryview) -> None:
    sent = sock.sendmsg([header, data]) if len(data) else sock.send(header)
    if sent < len(header):
        sock.sendall(header[sent:])
        sent = len(header)
    if sent - len(header) < len(data):
        sock.sendall(data[sent - len(header) :])


def start(simulator: Any) -> NfcService:
    """Start the hosts' NFC ports; the service has ``port`` and ``stop()``, and becomes ``simulator.nfc``."""
    service = NfcService(simulator)
    service.start()
    simulator.nfc = service
    return service


def serve_plain(simulator: Any, sock: socket.socket, address: Any) -> None:
    """Serve a connection to the vCenter port that is not TLS, up to its end; closes the socket."""
    service = getattr(simulator, "nfc", None)
    if service is None:
        sock.close()
        return
    service.serve_entry(sock)
