# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The vCenter port: HTTPS with SOAP and ``/folder``; other first bytes go to the VDDK double's protocol."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import threading
import traceback
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from . import folder, methods, nfc, rest, soap
from .methods import leases
from .model import SimulatorError
from .services import DropConnection, Session, as_fault

if TYPE_CHECKING:
    from .simulator import Simulator

COOKIE = "vmware_soap_session"
MAX_BODY = 64 << 20
TLS_HANDSHAKE = b"\x16"


def _listen(addresses: list[str], port: int) -> list[socket.socket]:
    """vCenter's port on its own address and on those of the hosts, whose leases name them."""
    for _attempt in range(20):
        made: list[socket.socket] = []
        try:
            for address in addresses:
                made.append(
                    socket.create_server((address, port or (made[0].getsockname()[1] if made else 0)), backlog=128)
                )
            return made
        except OSError:
            for one in made:
                one.close()
            if port:
                raise
    raise OSError(f"no port is free on {', '.join(addresses)}")


@dataclass
class _Outage:
    seconds: float
    calls: int
    done: bool


class Server:
    """Accepts connections until :meth:`stop`."""

    def __init__(self, simulator: "Simulator", port: int = 0) -> None:
        methods.load()
        self.simulator = simulator
        simulator.server = self
        self.socket, *self._at_hosts = _listen([simulator.host, *(host.name for host in simulator.hosts())], port)
        self.port = simulator.port = self.socket.getsockname()[1]
        simulator.web_hosts = {one.getsockname()[0] for one in self._at_hosts}
        self._connections: set[socket.socket] = set()
        self._to_vcenter: set[ssl.SSLSocket] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._out = False
        self._next_outage: _Outage | None = None
        for one in (self.socket, *self._at_hosts):
            self._listen_to(one)

    def _listen_to(self, listener: socket.socket) -> None:
        threading.Thread(target=self._accept_at, args=(listener,), name="vcenter", daemon=True).start()

    def _accept_at(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return
            at_vcenter = listener not in self._at_hosts
            threading.Thread(target=self._serve, args=(connection, address, at_vcenter), daemon=True).start()

    def _serve(self, connection: socket.socket, address: Any, at_vcenter: bool) -> None:
        with self._lock:
            if self._stopping:
                connection.close()
                return
            self._connections.add(connection)
        current: socket.socket = connection
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(30)
            first = connection.recv(1, socket.MSG_PEEK)
            connection.settimeout(None)
            if not first:
                return
            if first != TLS_HANDSHAKE:
                nfc.serve_plain(self.simulator, connection, address)
                return
            connection.settimeout(30)
            current = secured = self.simulator.ssl_context.wrap_socket(connection, server_side=True)
            current.settimeout(600)
            with self._lock:
                if at_vcenter and self._out:
                    return
                if at_vcenter:
                    self._to_vcenter.add(secured)
            Handler(current, address, self)
        except (OSError, ssl.SSLError, DropConnection):
            pass  # the client went away, or does not trust us: its own affair
        except Exception:  # noqa: BLE001  a defect ends its connection, not the simulator
            traceback.print_exc()
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._to_vcenter.discard(current)  # type: ignore[arg-type]
            with contextlib.suppress(OSError):
                current.shutdown(socket.SHUT_RDWR)
            current.close()

    # outages

    def outage(self, seconds: float, at: int = 0, done: bool = True) -> None:
        """vCenter restarts: its port refuses, connections are cut, sessions and tasks are forgotten. Hosts go on.

        :param at: it begins with the at-th call from now (0: at once), which is not answered.
        :param done: that call is done before.
        """
        with self._lock:
            if self._out or self._next_outage is not None:
                raise SimulatorError("there is an outage already")
            if at:
                self._next_outage = _Outage(float(seconds), at, done)
                return
        self._go(float(seconds))

    def end_outage(self) -> str | None:
        """-> announced or begun: what was ended"""
        with self._lock:
            planned, self._next_outage = self._next_outage, None
        if planned is not None:
            return "announced"
        return "begun" if self._come_back() else None

    def outage_at_this_call(self) -> "_Outage | None":
        """The outage that begins with the call that is being done."""
        with self._lock:
            planned = self._next_outage
            if planned is None:
                return None
            planned.calls -= 1
            if planned.calls:
                return None
            self._next_outage = None
            return planned

    def _go(self, seconds: float) -> None:
        with self._lock:
            if self._stopping or self._out:
                return
            self._out = True
            cut = list(self._to_vcenter)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for connection in cut:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.simulator.sessions.end_all()
        self.simulator.tasks.forget()
        self._timer = threading.Timer(seconds, self._come_back)
        self._timer.daemon = True
        self._timer.start()

    def _come_back(self) -> bool:
        with self._lock:
            if self._stopping or not self._out:
                return False
            self._timer.cancel()
            self.socket = socket.create_server((self.simulator.host, self.port), backlog=128)
            self._out = False
        self._listen_to(self.socket)
        return True

    def begin(self, outage: "_Outage") -> None:
        """Begin an outage that was announced. The call that it begins with is not answered."""
        self._go(outage.seconds)
        raise DropConnection

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            open_connections = list(self._connections)
        for one in (self.socket, *self._at_hosts):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for connection in open_connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "VMware"
    sys_version = ""
    wbufsize = 1 << 16
    server: Any

    @property
    def simulator(self) -> "Simulator":
        return self.server.simulator

    def log_message(self, format: str, *args: Any) -> None:
        """The call log is the record; standard error stays for defects."""

    # the parts of a request

    def cookie(self) -> str | None:
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return None
        return cookies[COOKIE].value if COOKIE in cookies else None

    def session(self) -> Session | None:
        return self.simulator.sessions.of_cookie(self.cookie())

    def chunks(self) -> Any:
        """The body, piece by piece, with a length or chunked."""
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            while True:
                size = int(self.rfile.readline(1024).split(b";")[0].strip() or b"0", 16)
                if size == 0:
                    while self.rfile.readline(65537).strip():
                        pass
                    return
                yield from self._exactly(size)
                self.rfile.readline(16)
        else:
            length = self.headers.get("Content-Length") or "0"
            if not length.isdecimal():
                raise ConnectionResetError(f"no length: {length}")
            yield from self._exactly(int(length))

    def _exactly(self, size: int) -> Any:
        while size:
            data = self.rfile.read(min(size, 1 << 20))
            if not data:
                raise ConnectionResetError("the body ended early")
            size -= len(data)
            yield data

    def answer(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def text(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.answer(status, text.encode(), "text/plain; charset=utf-8", headers)

    # requests

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/sdk/vimServiceVersions.xml":
            self.answer(200, soap.service_versions(), "text/xml; charset=utf-8")
        elif path.startswith("/folder"):
            folder.serve(self)
        elif path.startswith("/nfc/"):
            leases.serve(self)
        elif path.startswith(rest.ROOTS):
            rest.serve(self, b"")
        elif path == "/":
            self.text(200, "A simulated vCenter of openvadp.backup.\n")
        else:
            self.text(404, f"404 Not Found: {path}\n")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        if self.path.startswith("/folder"):
            folder.store(self)
        elif self.path.startswith("/nfc/"):
            leases.receive(self)
        else:
            self.close_connection = True
            self.text(404, "404 Not Found\n")

    def do_DELETE(self) -> None:
        if self.path.startswith(rest.ROOTS):
            rest.serve(self, b"".join(self.chunks()))
        else:
            self.close_connection = True
            self.text(404, "404 Not Found\n")

    def do_POST(self) -> None:
        if self.path.startswith("/nfc/"):
            leases.receive(self)
            return
        body = b""
        for piece in self.chunks():
            body += piece
            if len(body) > MAX_BODY:
                self.close_connection = True
                self.text(413, "413 Request Entity Too Large\n")
                return
        if self.path.startswith(rest.ROOTS):
            rest.serve(self, body)
            return
        if not self.path.split("?")[0].rstrip("/").startswith("/sdk"):
            self.text(404, "404 Not Found\n")
            return
        if (self.headers.get("Content-Encoding") or "").lower() == "gzip":
            body = gzip.decompress(body)
        self._soap(body)

    def _soap(self, body: bytes) -> None:
        version = soap.version_of(self.headers.get("SOAPAction") or "")
        context = methods.Context(
            self.simulator, self.session(), self.client_address[0], self.headers.get("User-Agent") or "", version
        )
        status = 200
        try:
            request = soap.decode_request(body)
            outage = self.server.outage_at_this_call()
            if outage is not None and not outage.done:
                self.server.begin(outage)
            try:
                result, declared = methods.call(context, request)
            finally:
                if outage is not None:
                    self.server.begin(outage)
            with self.simulator.lock:  # nobody changes what is being written down
                answer = soap.encode_response(request.method, result, declared, version)
        except DropConnection:
            self.close_connection = True
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets a fault
            status, answer = 500, soap.encode_fault(as_fault(error), version)
        headers = {"Cache-Control": "no-cache"}
        if context.new_cookie:
            headers["Set-Cookie"] = f'{COOKIE}="{context.new_cookie}"; Path=/; HttpOnly; Secure; SameSite=Lax'
        if context.end_cookie:
            headers["Set-Cookie"] = f'{COOKIE}=""; Path=/; Max-Age=0; HttpOnly; Secure'
        self.answer(status, answer, "text/xml; charset=utf-8", headers)

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError, ssl.SSLError, BrokenPipeError):
            self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()
