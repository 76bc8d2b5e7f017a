# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A new virtual machine with its disks by an import lease: transport https, without VDDK (VADP facts 51).

vSphere makes the machine, and the lease tells where each disk is to be sent, as a stream-optimised VMDK. Until it is
completed the machine can't be started or removed, and where it is aborted, or nobody gives a sign of life, vSphere
takes the machine away again.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional
from urllib.parse import urlsplit

from ..errors import DataPathError, TransportError
from ..libraries import vim
from ..vsphere.session import ConnectFailure, Session, Tls
from .https import Lease, address_of, as_transport_error, cookie_for, request_path, tls_for

if TYPE_CHECKING:
    from ..vsphere.disks import Disk
    from ..vsphere.placement import Placement

IMPORT_LEASE = "import_lease"

_PIECE = 256 << 10
_ATTEMPTS = 4

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def import_machine(session: Session, placement: Placement, spec: Any, *, io_timeout: int) -> Iterator[Lease]:
    """Have the machine made; :meth:`.https.Lease.complete` keeps it. It is ``entity`` of the lease.

    :param spec: a ``vim.vm.ConfigSpec``.
    :raises VsphereError: it was not made, and nothing of it is there.
    """
    wanted = vim.vm.VmImportSpec(configSpec=spec)

    def start() -> Any:
        return placement.pool.ImportVApp(wanted, None if placement.in_vapp else placement.folder, placement.host)

    subject = f"'{spec.name}' in {placement.folder_path}"
    lease = Lease(session, "import", "The new virtual machine was not made", subject, start, io_timeout)
    try:
        lease.open()
        yield lease
    except BaseException:
        lease.failed = True
        raise
    finally:
        lease.close()


class _CutError(Exception):
    """The upload broke off: it starts over."""


class Upload:
    """One disk of a lease, from a file that holds it as a stream-optimised VMDK.

    :param rate_limit: bytes a second.
    :param on_progress: gets the bytes that were sent and those of the file.
    """

    def __init__(
        self,
        session: Session,
        lease: Lease,
        disk: Disk,
        source: Path,
        *,
        io_timeout: int,
        rate_limit: Optional[int] = None,
        on_progress: Optional[Progress] = None,
    ) -> None:
        self._session = session
        self._lease = lease
        self._disk = disk
        self._source = source
        self._io_timeout = io_timeout
        self._rate_limit = rate_limit
        self._on_progress = on_progress
        self._address = address_of(lease.addresses, disk)
        self.size = source.stat().st_size

    def run(self) -> None:
        """:raises TransportError: it failed again and again, or for good."""
        with as_transport_error(self._disk.file):
            self._try()

    def _try(self) -> None:
        tls = tls_for(self._session, self._address)
        for attempt in range(1, _ATTEMPTS + 1):
            self._lease.check()
            try:
                self._once(tls)
                return
            except _CutError as cut:
                self._lease.check()
                if attempt == _ATTEMPTS:
                    raise TransportError(
                        "The disk was not uploaded",
                        subject=self._disk.file,
                        reason=f"{cut}; {attempt} tries",
                        remedy="Check the network between this machine and the server, and the datastore's free space",
                        retryable=True,
                    ) from cut
            self._session.sleep(2 ** (attempt - 1))

    def _once(self, tls: Tls) -> None:
        url = urlsplit(self._address.url)
        connection = tls.new()
        try:
            connection.connect()
            connection.sock.settimeout(self._io_timeout)
            connection.putrequest("POST", request_path(url))
            headers = {
                **cookie_for(self._session, url),
                "Content-Type": "application/x-vnd.vmware-streamVmdk",
                "Content-Length": str(self.size),
            }
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            self._send(connection)
            self._answered(connection.getresponse())
        except ConnectFailure as failure:
            raise _CutError(str(failure.error.reason or failure.error)) from failure
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(f"the connection was lost: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _send(self, connection: http.client.HTTPSConnection) -> None:
        begun = told = time.monotonic()
        done = 0
        for piece in self._pieces():
            connection.send(piece)
            done += len(piece)
            self._lease.check()
            self._lease.shares[self._disk.key] = done / self.size
            now = time.monotonic()
            if self._on_progress is not None and now - told >= 0.5:
                told = now
                self._on_progress(done, self.size)
            if self._rate_limit:
                time.sleep(max(0.0, begun + done / self._rate_limit - now))

    def _pieces(self) -> Iterator[bytes]:
        try:
            stream = self._source.open("rb")
        except OSError as error:
            raise self._unreadable(error) from error
        with stream:
            while True:
                try:
                    piece = stream.read(_PIECE)
                except OSError as error:
                    raise self._unreadable(error) from error
                if not piece:
                    break
                yield piece

    def _unreadable(self, error: OSError) -> DataPathError:
        return DataPathError("A packed disk can't be read", subject=str(self._source), reason=error.strerror)

    def _answered(self, response: http.client.HTTPResponse) -> None:
        words = response.read(2000).decode("utf-8", "replace").strip()
        if response.status in (200, 201, 204):
            return
        reason = f"HTTP {response.status} {response.reason}{': ' * bool(words)}{words}"
        if response.status >= 500:
            raise _CutError(reason)
        raise TransportError(
            "The disk was not uploaded",
            subject=self._disk.file,
            reason=reason,
            remedy="Look whether the lease was aborted in the vSphere client, then run again",
            retryable=True,
        )
