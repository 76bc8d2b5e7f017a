# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Files on datastores through ``/folder`` of vCenter or ESXi (VADP facts 50), with a session's login and TLS."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
from typing import IO, Dict, Iterator, NamedTuple, Optional
from urllib.parse import quote

from ..errors import NotFoundError, PrivilegeError, VsphereError
from ..libraries import vim
from .disks import split_datastore_path
from .session import Session

# What is read into memory at once: configuration files and NVRAM are below 1 MiB.
MAX_BYTES = 64 * 1024 * 1024


def folder_url(path: str, datacenter: str) -> str:
    """The request path of a datastore path such as ``[vmfs01] app01/app01.vmx``.

    :param datacenter: its inventory path (``VmRef.datacenter_path``); vCenter demands it.
    """
    datastore, inside = split_datastore_path(path)
    query = f"dcPath={quote(datacenter, safe='')}&dsName={quote(datastore, safe='')}"
    return f"/folder/{quote(inside, safe='/')}?{query}"


def http_size(session: Session, path: str, datacenter: str) -> int:
    """The size of a file in bytes. :raises NotFoundError:"""
    with _request(session, "HEAD", path, datacenter) as response:
        return int(response.headers["Content-Length"])


@contextlib.contextmanager
def http_stream(session: Session, path: str, datacenter: str) -> Iterator[http.client.HTTPResponse]:
    """A file's contents as a response to ``read(n)`` from; its ``length`` is the size. :raises NotFoundError:"""
    with _request(session, "GET", path, datacenter) as response:
        yield response


def http_get(session: Session, path: str, datacenter: str) -> bytes:
    """The whole of a small file. :raises NotFoundError: :raises VsphereError: larger than ``MAX_BYTES``, cut short."""

    def get() -> bytes:
        with _request(session, "GET", path, datacenter) as response:
            data = response.read(MAX_BYTES + 1)
            if response.length and len(data) <= MAX_BYTES:
                raise http.client.IncompleteRead(data, response.length)
            return data

    what = "The file was not read"
    data: bytes = session.call(get, what=what, subject=path, idempotent=True)
    if len(data) > MAX_BYTES:
        raise VsphereError(what, subject=path, reason=f"it is larger than {MAX_BYTES} bytes")
    return data


class RangeAnswer(NamedTuple):
    """A part of a file, and the size of the whole."""

    data: bytes
    total_bytes: int


def http_range(session: Session, path: str, datacenter: str, offset: int, length: int) -> Optional[RangeAnswer]:
    """A part of a file; None where the server ignores ranges. :raises NotFoundError: :raises VsphereError:"""
    headers = {"Range": f"bytes={offset}-{offset + length - 1}"}

    def get() -> Optional[RangeAnswer]:
        with _request(session, "GET", path, datacenter, headers=headers) as response:
            if response.status != 206:
                return None
            stated = re.match(r"bytes (\d+)-(\d+)/(\d+)$", response.headers.get("Content-Range", ""))
            if stated is None or int(stated.group(1)) != offset:
                return None
            return RangeAnswer(response.read(length + 1), int(stated.group(3)))

    answer: Optional[RangeAnswer] = session.call(get, what="The file was not read", subject=path, idempotent=True)
    return answer


def http_put(session: Session, path: str, datacenter: str, source: bytes | IO[bytes]) -> None:
    """Write a file, an existing one included.

    :param source: bytes, or a seekable binary file, which is sent from its start to its end.
    """
    body: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else source
    with _request(session, "PUT", path, datacenter, body):
        return


@contextlib.contextmanager
def _request(
    session: Session,
    method: str,
    path: str,
    datacenter: str,
    body: Optional[IO[bytes]] = None,
    headers: Optional[Dict[str, str]] = None,
) -> Iterator[http.client.HTTPResponse]:
    what = "The file was not written" if method == "PUT" else "The file was not read"

    def send() -> http.client.HTTPResponse:
        # A connection of its own: a download may last, and pyVmomi's are for short calls.
        sent = dict(headers or {}, Cookie=session.cookie)
        if body is not None:
            size = body.seek(0, io.SEEK_END)
            sent.update({"Content-Length": str(size), "Content-Type": "application/octet-stream"})
            body.seek(0)
        connection.close()
        connection.request(method, folder_url(path, datacenter), body=body, headers=sent)
        response = connection.getresponse()
        if response.status == 401:
            # The login has ended; `call` renews it and comes back.
            raise vim.fault.NotAuthenticated()
        return response

    if session.tls is None:
        raise VsphereError(what, subject=path, reason="the session has no HTTPS connection of its own")
    connection = session.tls.new()
    try:
        response = session.call(send, what=what, subject=path, idempotent=True)
        if response.status == 404:
            raise NotFoundError(
                "There is no such file",
                subject=path,
                reason=f"datacenter {datacenter}: HTTP 404",
                details={"http_status": 404},
            )
        if response.status == 403:
            privilege = "Datastore.FileManagement" if method == "PUT" else "Datastore.Browse"
            raise PrivilegeError(
                what,
                subject=path,
                reason=f"HTTP 403; the user may lack the privilege {privilege}",
                remedy="Give the user's role that privilege on the datastore",
                details={"privileges": {privilege: ""}, "http_status": 403},
            )
        if response.status not in (200, 201, 204, 206):
            raise VsphereError(
                what,
                subject=path,
                reason=f"HTTP {response.status} {response.reason}",
                remedy="Look at the free space and the state of the datastore" if method == "PUT" else None,
                retryable=response.status >= 500,
                details={"http_status": response.status},
            )
        yield response
    finally:
        connection.close()
