# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Against a real HTTPS server; only the vSphere session behind the cookie is a stand-in."""

from __future__ import annotations

import http.server
import io
import ssl
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    AuthenticationError,
    NotFoundError,
    PrivilegeError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import datastore_files
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session, Tls

COOKIE = 'vmware_soap_session="fresh"'


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def key(self):
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        return query["dcPath"][0], query["dsName"][0], unquote(parts.path)[len("/folder/") :]

    def answer(self, status, body=b"", declared=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if declared is None else declared))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self):
        status = self.server.statuses.pop(0) if self.server.statuses else None
        if self.headers.get("Cookie") != COOKIE:
            status = 401
        if status == "cut":
            self.answer(200, b"half", declared=8)
            self.close_connection = True
        elif status is not None:
            self.answer(status)
        return status is not None

    def do_GET(self):
        if not self.refused():
            data = self.server.files.get(self.key())
            wanted = self.headers.get("Range") if self.server.ranges else None
            if data is None:
                self.answer(404)
            elif wanted is None:
                self.answer(200, data)
            else:
                first, last = (int(text) for text in wanted[len("bytes=") :].split("-"))
                part = data[first : last + 1]
                self.send_response(206 if part else 416)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
                self.end_headers()
                self.wfile.write(part)

    do_HEAD = do_GET

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.refused():
            self.server.files[self.key()] = data
            self.answer(201)

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "good.pem", certificates / "good.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.files, server.statuses, server.ranges = {}, [], True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def files(server, stub, clock, certificates):
    """A session whose logins give the cookie that the server wants."""

    def login(*_args):
        stub.cookie = COOKIE

    stub.methods["Login"] = login
    port = server.server_address[1]
    connection = Connection("127.0.0.1", "user", "secret", port=port, ca_path=str(certificates / "ca.pem"))
    return Session(connection, stub, Tls(connection), clock, clock.sleep)


PATH = "[ds 1+2] a b/ü&c?.nvram"
KEY = ("Europe/DC%2f1", "ds 1+2", "a b/ü&c?.nvram")


@pytest.mark.parametrize("name", [" leading/ leading.nvram", "trailing /trailing.nvram ", "[x] y/z.nvram"])
def test_spaces_and_brackets_of_a_name_are_kept(server, files, name):
    datastore_files.http_put(files, f"[ds] {name}", "DC", b"bytes")
    assert server.files == {("DC", "ds", name): b"bytes"}
    assert datastore_files.http_get(files, f"[ds] {name}", "DC") == b"bytes"


def test_names_arrive_as_they_are(server, files):
    datastore_files.http_put(files, PATH, "Europe/DC%2f1", b"bytes")
    assert server.files == {KEY: b"bytes"}
    assert datastore_files.http_get(files, PATH, "Europe/DC%2f1") == b"bytes"
    assert datastore_files.http_size(files, PATH, "Europe/DC%2f1") == 5
    with datastore_files.http_stream(files, PATH, "Europe/DC%2f1") as stream:
        assert (stream.length, stream.read(2), stream.read()) == (5, b"by", b"tes")


def test_an_expired_login_is_renewed_and_the_whole_file_sent_again(server, files, stub):
    stub.cookie = 'vmware_soap_session="old"'
    datastore_files.http_put(files, PATH, "DC", io.BytesIO(b"x" * 100_000))
    assert list(server.files.values()) == [b"x" * 100_000]
    assert files.logins == 2


def test_a_cut_answer_is_read_again_and_never_returned(server, files):
    server.files[("DC", "ds 1+2", "a b/ü&c?.nvram")] = b"all of it"
    server.statuses = ["cut", "cut"]
    assert datastore_files.http_get(files, PATH, "DC") == b"all of it"


@pytest.mark.parametrize(
    "status, kind, message",
    [(404, NotFoundError, "404"), (403, PrivilegeError, r"Datastore\.Browse"), (500, VsphereError, "500")],
)
def test_refusals(server, files, status, kind, message):
    server.statuses = [status]
    with pytest.raises(kind, match=message):
        datastore_files.http_get(files, PATH, "DC")


def test_the_certificate_is_verified_here_too(server, stub, clock):
    stub.methods["Login"] = None
    connection = Connection("127.0.0.1", "user", "secret", port=server.server_address[1])
    session = Session(connection, stub, Tls(connection), clock, clock.sleep)
    with pytest.raises(AuthenticationError, match="not trusted"):
        datastore_files.http_get(session, PATH, "DC")


def test_a_part_of_a_file(server, files):
    server.files["DC0", "vmfs01", "app01/app01.vmx"] = b"0123456789"
    assert datastore_files.http_range(files, "[vmfs01] app01/app01.vmx", "DC0", 8, 2) == (b"89", 10)
    with pytest.raises(VsphereError, match="HTTP 416"):
        datastore_files.http_range(files, "[vmfs01] app01/app01.vmx", "DC0", 10, 2)
    server.ranges = False
    assert datastore_files.http_range(files, "[vmfs01] app01/app01.vmx", "DC0", 8, 2) is None
