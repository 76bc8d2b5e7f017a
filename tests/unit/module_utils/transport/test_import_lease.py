# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What an upload sends and how it takes the answers; tests/e2e/test_new_vm_https.py has the rest."""

from __future__ import annotations

import http.client
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import import_lease
from ansible_collections.openvadp.backup.plugins.module_utils.transport.import_lease import Upload
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk
from pyVmomi import vim

DISK = Disk(
    2001,
    "Hard disk 2",
    "[vmfs01] a/a_1.vmdk",
    "vmfs01",
    1 << 20,
    None,
    None,
    True,
    None,
    {"type": "pvscsi", "bus": 0},
    1,
)
PACKED = bytes(range(256)) * 4096


class _Plain:
    """A connection as :class:`Tls` makes them, without TLS."""

    def __init__(self, port: int) -> None:
        self._port = port

    def new(self) -> Any:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)


class Server:
    """Takes requests and gives these answers, one after the other; None closes the connection in the middle."""

    def __init__(self, *answers: Any) -> None:
        self.seen: List[Tuple[Dict[str, str], bytes]] = []
        self._answers = list(answers)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _address = self._socket.accept()
            with connection, connection.makefile("rb") as stream:
                first = stream.readline().decode().strip()
                headers = {"": first}
                for line in iter(stream.readline, b"\r\n"):
                    name, _colon, value = line.decode().strip().partition(": ")
                    headers[name] = value
                if answer is None:
                    stream.read(1000)
                    continue
                self.seen.append((headers, stream.read(int(headers["Content-Length"]))))
                connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 4\r\n\r\nfull".encode())

    def close(self) -> None:
        self._thread.join(20)
        self._socket.close()


@pytest.fixture
def pauses() -> List[float]:
    return []


@pytest.fixture
def upload(tmp_path: Path, pauses: List[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    source = tmp_path / "disk.vmdk"
    source.write_bytes(PACKED)
    servers: List[Server] = []

    def make(*answers: Any, **options: Any) -> Tuple[Upload, Server]:
        server = Server(*answers)
        servers.append(server)
        monkeypatch.setattr(import_lease, "tls_for", lambda _session, _address: _Plain(server.port))
        url = vim.HttpNfcLease.DeviceUrl(
            key="/vm-9/ParaVirtualSCSIController0:1", url="https://*/nfc/1/disk-1.vmdk", disk=True, importKey=""
        )
        lease = SimpleNamespace(addresses=[url], shares={}, check=lambda: None)
        session: Any = SimpleNamespace(cookie="vmware_soap_session=1", sleep=pauses.append)
        return Upload(session, lease, DISK, source, io_timeout=20, **options), server  # type: ignore[arg-type]

    yield make
    for server in servers:
        server.close()


def test_what_is_sent(upload: Any) -> None:
    told: List[Tuple[int, int]] = []
    one, server = upload("201 Created", on_progress=lambda done, total: told.append((done, total)))
    one.run()
    headers, body = server.seen[0]
    assert headers[""] == "POST /nfc/1/disk-1.vmdk HTTP/1.1"
    assert headers["Content-Type"] == "application/x-vnd.vmware-streamVmdk" and "Cookie" in headers
    assert body == PACKED and one.size == len(body)


def test_what_passes_by_itself_is_tried_again(upload: Any, pauses: List[float]) -> None:
    one, server = upload(None, "500 Internal Server Error", "200 OK")
    one.run()
    assert [len(body) for _headers, body in server.seen] == [one.size] * 2 and pauses == [1, 2]
    one, server = upload(*["500 Internal Server Error"] * 4)
    with pytest.raises(TransportError, match="HTTP 500 Internal Server Error: full; 4 tries") as caught:
        one.run()
    assert caught.value.retryable and "free space" in str(caught.value.remedy)


def test_what_does_not_pass_is_not(upload: Any, pauses: List[float]) -> None:
    one, _server = upload("404 Not Found")
    with pytest.raises(TransportError, match="HTTP 404"):
        one.run()
    assert pauses == []


def test_a_packed_disk_that_is_gone_is_no_fault_of_the_connection(upload: Any, tmp_path: Path) -> None:
    one, _server = upload(None)
    (tmp_path / "disk.vmdk").unlink()
    with pytest.raises(DataPathError, match="can't be read"):
        one.run()
