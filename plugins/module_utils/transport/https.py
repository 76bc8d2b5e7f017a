# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks over HTTPS, without VDDK (VADP facts 50, 51): raw files of datastores, and the export lease of a snapshot.

:func:`open_folder` reads the base file of a VM that is off, or of a template, in place: nbdkit's curl plugin asks the
server for ranges of it. ESXi refuses that for a running VM, whatever its snapshots. :func:`open_lease` reads those: a
lease on the snapshot lets the whole disk be downloaded as a stream-optimised VMDK, which qemu-nbd then serves. The
disks of a VM that are downloaded at the same time share one lease, for a VM has one at most.

No secret leaves this process but the session's cookie, which the curl plugin reads from a file of mode 0600.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import http.client
import itertools
import os
import re
import shlex
import ssl
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Tuple
from urllib.parse import urlsplit

from ..datapath import image
from ..errors import (
    ConnectionLostError,
    DataPathError,
    InputError,
    RepositoryError,
    TransportError,
    VadpError,
    VsphereError,
)
from ..libraries import vim
from ..vsphere import faults
from ..vsphere.answers import download
from ..vsphere.datastore_files import folder_url, http_range, http_stream
from ..vsphere.disks import CONTROLLER_CLASSES, Disk
from ..vsphere.session import ConnectFailure, Connection, Session, Tls
from .endpoints import Endpoint, retries_within, serve_nbdkit
from .planner import BY_LEASE
from .vix_errors import last_error_line

if TYPE_CHECKING:
    from ..datapath.processes import RuntimeDir
    from ..repository.runs import Run
    from ..vsphere.inventory import VmRef

TRANSPORT = "https"
FOLDER = "folder"

_SECTOR = 512
_PIECE = 1 << 20
_LOG_TAIL_BYTES = 64 * 1024
_DESCRIPTOR_BYTES = 64 * 1024

# A request costs the server a look at the file and its owner, so fewer and larger ones are better. The plugin does one
# at a time on a connection.
_COPY_OPTIONS = {"request_bytes": 4 << 20, "depth": 4}

# The plugin makes a new request with what the cookie's file holds at most this often.
_COOKIE_SECONDS = 1
_KEEPER_SECONDS = 0.25

_POLL_SECONDS = (0.1, 2.0)
_ATTEMPTS = 4
# A lease lives for 300 s without a sign of life from us.
_PROGRESS_SECONDS = 60

_MAGIC = 0x564D444B
_COMPRESSED_WITH_MARKERS = 0x30000
_FOOTER_MARKER = 3
_AT_END = 0xFFFFFFFFFFFFFFFF

_numbers = itertools.count(1)

Progress = Callable[[int, int], None]


class _HttpsEndpoint(Endpoint):
    """An endpoint whose log knows nothing of VDDK."""

    def check(self) -> None:
        if not self.child.alive:
            reason, remedy, retryable = _reason(self.log_path, f"it ended with status {self.child.returncode}")
            raise TransportError(
                "The server of the disk's data has ended",
                subject=self.subject,
                reason=reason,
                remedy=remedy,
                retryable=retryable,
            )

    def explain(self, error: VadpError) -> VadpError:
        returncode = self.child.returncode
        known = last_error_line(_tail(self.log_path)) is not None
        if returncode is None and not known:
            return error
        reason, remedy, retryable = _reason(self.log_path, f"its server ended with status {returncode}")
        return TransportError(
            error.what,
            subject=self.subject,
            reason=reason,
            remedy=remedy or "Run again; if it happens again, look at the log of the server",
            retryable=retryable or returncode is not None,
            details={"error": error.to_result()},
        )


@contextlib.contextmanager
def as_transport_error(subject: str) -> Iterator[None]:
    """What the server refuses here keeps this transport from a disk, and no other."""
    try:
        yield
    except (VsphereError, InputError) as error:
        raise TransportError(
            error.what,
            subject=subject,
            reason=error.reason or str(error),
            remedy=error.remedy,
            retryable=error.retryable,
            details=error.details,
        ) from error


# /folder


@contextlib.contextmanager
def open_folder(session: Session, vm: VmRef, disk: Disk, *, run_dir: RuntimeDir, io_timeout: int) -> Iterator[Endpoint]:
    """Serve the base file of a disk, read-only; for VMs that are off and templates, on VMFS and NFS (VADP facts 50).

    The thread that opens an endpoint must live as long as it (see :func:`.endpoints.serve_nbdkit`).

    :param disk: what is read must be this file alone: the disk of a VM without snapshots, or that of its first one.
    :param io_timeout: seconds; bounds the open, a request and all its retries together.
    :raises TransportError: the server does not give the file (it is locked, not there, has another size), ignores
        ranges, or its certificate can't be verified by nbdkit's plugin.
    """
    flat = flat_file(disk.file)
    with as_transport_error(disk.file):
        _check_base(session, vm, disk)
        _probe_ranges(session, vm, disk, flat)
    folder = Path(run_dir.path)
    number = next(_numbers)
    with contextlib.ExitStack() as files:
        cookie = _CookieFile(session, folder / f"cookie-{number}")
        files.callback(cookie.remove)
        certificate = folder / f"server-{number}.pem"
        files.callback(_unlink, certificate)
        authorities = folder / f"authorities-{number}"
        authorities.mkdir(0o700)
        files.callback(authorities.rmdir)
        arguments = [
            "--readonly",
            "-D",
            "nbdkit.backend.datapath=0",
            # The file does not change, so several connections see the same; each has its own to the server.
            *("--filter=multi-conn", "--filter=retry", "--filter=blocksize", "curl"),
            f"url=https://{_authority(session.connection)}{folder_url(flat, vm.datacenter_path)}",
            f"cookie-script=cat {shlex.quote(str(cookie.path))}",
            f"cookie-script-renew={_COOKIE_SECONDS}",
            *_verification(session, certificate, authorities),
            # As all our connections: to the server itself, and nowhere else.
            *("proxy=", "followlocation=false", "protocols=https"),
            f"timeout={max(5, io_timeout // 3)}",
            *("multi-conn-mode=unsafe", "minblock=512", "maxdata=8M"),
            *(f"retries={retries_within(io_timeout)}", "retry-delay=1"),
        ]
        try:
            served = files.enter_context(
                serve_nbdkit(arguments, subject=disk.file, run_dir=run_dir, io_timeout=io_timeout, transport=TRANSPORT)
            )
        except TransportError as error:
            raise _worded(error) from error
        endpoint = _endpoint(served.uri, served.log_path, served.size_bytes, disk, served.child, FOLDER)
        endpoint.copy_options = dict(_COPY_OPTIONS)
        files.enter_context(cookie.kept_fresh(endpoint.log_path))
        yield endpoint


def flat_file(descriptor: str) -> str:
    """The file that holds the bytes of a base disk: ``[ds] vm/vm.vmdk`` -> ``[ds] vm/vm-flat.vmdk``."""
    if not descriptor.endswith(".vmdk"):
        raise TransportError("The disk has no file that can be read", subject=descriptor, reason="it is no .vmdk file")
    return descriptor[: -len(".vmdk")] + "-flat.vmdk"


def _check_base(session: Session, vm: VmRef, disk: Disk) -> None:
    """The descriptor must name no parent: the base of a chain alone is an old state of the disk."""
    with http_stream(session, disk.file, vm.datacenter_path) as response:
        text = response.read(_DESCRIPTOR_BYTES).decode("utf-8", "replace")
    reason = None
    if not text.startswith("# Disk DescriptorFile"):
        reason = "what the server sends for it is not a descriptor of a disk"
    elif re.search(r'^\s*createType\s*=\s*"(?!vmfs"|vmfsThin")', text, re.M):
        kind = re.search(r'^\s*createType\s*=\s*"([^"]*)"', text, re.M)
        reason = f"it is of the type {kind.group(1) if kind else '?'}, not a base disk on VMFS or NFS"
    elif not re.search(r"^\s*parentCID\s*=\s*ffffffff\s*$", text, re.M):
        reason = "it stands on another file, which holds the rest of its data"
    if reason:
        raise TransportError(
            "The disk can't be read as a file of its datastore",
            subject=disk.file,
            reason=reason,
            remedy="Use another transport for this disk",
        )


def _probe_ranges(session: Session, vm: VmRef, disk: Disk, flat: str) -> None:
    """Ask for the last sector: a server that ignores ranges would send the whole file for each request."""
    what = "The disk can't be read as a file of its datastore"
    try:
        answer = http_range(session, flat, vm.datacenter_path, disk.capacity_bytes - _SECTOR, _SECTOR)
    except VsphereError as error:
        status = error.details.get("http_status")
        if status in (403, 423, 500):
            error.reason = f"{error.reason}; ESXi refuses the files of a virtual machine that runs"
            error.remedy = "Use another transport, or the virtual machine off; else look at the user's privileges"
        elif status == 404:
            error.reason = f"{error.reason}; vSAN and vVol have no such files"
            error.remedy = "Use another transport for this disk"
        raise
    reason = None
    if answer is None:
        reason = "the server ignores ranges: it sends the whole file for each request"
    elif answer.total_bytes != disk.capacity_bytes:
        reason = f"it has {answer.total_bytes} bytes, the disk {disk.capacity_bytes}"
    elif len(answer.data) != _SECTOR:
        reason = f"the server sent {len(answer.data)} bytes for a range of {_SECTOR}"
    if reason:
        raise TransportError(what, subject=flat, reason=reason, remedy="Use another transport for this disk")


def _authority(connection: Connection) -> str:
    host = f"[{connection.hostname}]" if ":" in connection.hostname else connection.hostname
    return f"{host}:{connection.port}"


def _verification(session: Session, certificate: Path, authorities: Path) -> List[str]:
    """How the plugin verifies the server: as :class:`.session.Tls` does.

    :param certificate: where the server's certificate is written where it is pinned: the plugin then trusts nothing
        else.
    :param authorities: an empty folder, in place of the system's authorities.
    """
    connection = session.connection
    if connection.thumbprint and session.tls is not None:
        certificate.write_text(ssl.DER_cert_to_PEM_cert(session.tls.certificate), encoding="ascii")
        _check_name(connection, certificate)
        return [f"cainfo={certificate}", f"capath={authorities}"]
    if not connection.validate_certs:
        return ["sslverify=false"]
    if connection.ca_path:
        return [f"cainfo={connection.ca_path}", f"capath={authorities}"]
    system = ssl.get_default_verify_paths()
    return [f"cainfo={system.cafile}"] if system.cafile else []


def _check_name(connection: Connection, certificate: Path) -> None:
    """The plugin can pin a certificate, but wants the server's name in it."""
    context = ssl.create_default_context(cafile=str(certificate))
    context.verify_flags |= 0x80000  # X509_V_FLAG_PARTIAL_CHAIN: the certificate itself is the authority
    server = http.client.HTTPSConnection(connection.hostname, connection.port, timeout=30, context=context)
    try:
        server.connect()
    except ssl.SSLCertVerificationError as error:
        raise TransportError(
            "The server's certificate can't be verified by nbdkit's curl plugin",
            subject=connection.address,
            reason=error.verify_message or str(error),
            remedy="Set hostname to a name that is in the certificate, or use another transport",
        ) from error
    except OSError as error:
        raise TransportError(
            "The server can't be reached", subject=connection.address, reason=str(error), retryable=True
        ) from error
    finally:
        server.close()


class _CookieFile:
    """The session's cookie in a file that the plugin reads, and that follows each new login."""

    def __init__(self, session: Session, path: Path) -> None:
        self.path = path
        self._session = session
        self._written = ""
        self._over = threading.Event()
        self._write()

    def _write(self) -> None:
        cookie = self._session.cookie
        if cookie in ("", self._written):
            return  # in the middle of a login there is none
        part = self.path.with_suffix(".part")
        _unlink(part)
        descriptor = os.open(str(part), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(cookie + "\n")
        os.replace(str(part), str(self.path))
        self._written = cookie

    @contextlib.contextmanager
    def kept_fresh(self, log: Path) -> Iterator[None]:
        """Meanwhile a login that has ended is renewed: the plugin's log tells, and its next try finds the new cookie.

        The session keeps itself alive; this is for one that was ended by the server.
        """
        keeper = threading.Thread(target=self._keep, args=(log,), name="https-cookie", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            self._over.set()
            keeper.join()

    def _keep(self, log: Path) -> None:
        seen = 0
        while not self._over.wait(_KEEPER_SECONDS):
            with log.open("rb") as stream:
                stream.seek(seen)
                lines, newline, _rest = stream.read().rpartition(b"\n")
            seen += len(lines) + len(newline)
            if b"returned error: 401" in lines:
                # The plugin was refused: any call finds out whether the session has ended, and logs in again. Where
                # that fails, the copy fails for the same reason and tells it.
                with contextlib.suppress(VsphereError):
                    self._session.call(
                        self._session.service.CurrentTime, what="The login was not renewed", idempotent=True
                    )
            self._write()

    def remove(self) -> None:
        _unlink(self.path)


def _worded(error: TransportError) -> TransportError:
    """The failure of a start in the plugin's words: VDDK's numbers mean nothing here."""
    text = "\n".join(error.details.get("log", []))
    reason, remedy, retryable = _words(text, error.reason or "its log gives no reason")
    details = {"log": error.details.get("log", [])}
    return TransportError(error.what, error.subject, reason, remedy, retryable, details)


def _reason(log: Path, fallback: str) -> Tuple[str, Optional[str], bool]:
    return _words(_tail(log), fallback)


def _words(text: str, fallback: str) -> Tuple[str, Optional[str], bool]:
    """(reason, remedy, worth another try) of the newest error in a log of the plugin."""
    line = last_error_line(text)
    if line is None:
        return fallback, None, False
    status = re.search(r"returned error: (\d{3})", line)
    if status is None:
        timed_out = re.search(r"timed? ?out|connect|recv|reset|closed", line, re.I) is not None
        remedy = "Check the network between this machine and the server" if timed_out else None
        return line, remedy, timed_out
    number = int(status.group(1))
    meaning = {
        401: ("the server does not accept the login any more", "Look at the user's rights and the session limits"),
        403: ("the server refuses the file: it is in use, or a privilege is missing", None),
        404: ("the file is not there any more", "Look whether the virtual machine was moved, then run again"),
    }.get(number, ("the server refuses the file: perhaps the virtual machine was powered on", None))
    return f"HTTP {number}: {meaning[0]}", meaning[1], number == 401 or number >= 500


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LOG_TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace")


def _endpoint(uri: str, log: Path, size_bytes: int, disk: Disk, child: Any, method: str) -> Endpoint:
    return _HttpsEndpoint(uri, TRANSPORT, log, size_bytes, disk.file, child, method=method)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


# Export leases


@contextlib.contextmanager
def open_lease(
    session: Session,
    vm: VmRef,
    snapshot_moid: str,
    disk: Disk,
    *,
    run: Run,
    run_dir: RuntimeDir,
    stage: Path,
    io_timeout: int,
    on_progress: Optional[Progress] = None,
) -> Iterator[Endpoint]:
    """Download a snapshot's disk by an export lease, and serve it, read-only (VADP facts 51).

    The lease lasts as long as the downloads: before this yields the disk's own is over. Meanwhile the VM can't be
    migrated or powered on. The thread that opens an endpoint must live as long as it.

    :param stage: where the stream-optimised VMDK goes: mode 0600, recorded first, gone at the end in every outcome.
    :param io_timeout: seconds without any answer.
    :param on_progress: gets the bytes that have come and those that are expected, as the server tells or at most; an
        exception from it ends the download.
    :raises TransportError: no lease, no address for the disk in it, the lease ended, the certificate of the host is
        another one, or the download failed again and again.
    """
    intent = run.record("temporary_file", key=disk.key, stage=str(stage), lease=vm.moid)
    try:
        with as_transport_error(disk.file):
            with _shared_lease(session, vm, snapshot_moid, io_timeout) as lease:
                run.update(intent, lease=lease.moid)
                _Download(session, lease, disk, stage, io_timeout, on_progress).run()
            run.update(intent, lease=None)
        with image.serve(str(stage), run_dir=run_dir, format="vmdk", connections=4) as child:
            yield _endpoint(child.uri, Path(child.log_path), disk.capacity_bytes, disk, child, BY_LEASE)
    except BaseException:
        # The failure that brought us here is the one to report; what can't be removed now stays in the run's record.
        with contextlib.suppress(OSError, RepositoryError):
            _unlink(stage)
            run.done(intent)
        raise
    _unlink(stage)
    run.done(intent)


def recover_leases(
    session: Session, run: Run, *, check_mode: bool, vm_moid: Optional[str] = None
) -> List[Dict[str, str]]:
    """End the leases of a crashed run that may still hold the VM; before its snapshots are removed.

    A lease belongs to the session that made it. Where the server gives it to us, and says that it holds just that VM,
    it is aborted. Else it ends by itself when nobody has called for its time-out (300 s): what it holds up until then
    is tried again for as long.

    :param run: its managed object ids are of this server.
    :param vm_moid: the VM that the run is of; if not given, as its record says.
    :returns: what was found: [{what, id, action}].
    """
    found = []
    for intent in run.intents("temporary_file"):
        lease = intent.get("lease")
        if not lease:
            continue
        if check_mode:
            action = "would be aborted"
        else:
            action = _abort_foreign(session, str(lease), vm_moid or run.data["vm_moid"])
            run.update(intent["id"], lease=None)
        found.append({"what": "lease", "id": str(lease), "action": action})
    return found


def _abort_foreign(session: Session, moid: str, vm_moid: Optional[str]) -> str:
    try:
        lease = vim.HttpNfcLease(moid, session.stub)
        info = session.read(lease, "info")["info"]
        if info is None or info.entity is None or info.entity._moId != vm_moid:
            return "left to its time-out"
        _end_lease(session, lease, well=False)
    except VsphereError:
        return "left to its time-out"
    return "aborted"


def _end_lease(session: Session, lease: Any, well: bool) -> None:
    """Complete or abort a lease that is alive."""
    state = session.read(lease, "state")["state"]

    def end() -> None:
        # "In the wrong state" means here that it has just ended, and not that another try would help.
        with contextlib.suppress(vim.fault.InvalidState):
            if well and state == "ready":
                lease.HttpNfcLeaseComplete()
            else:
                lease.HttpNfcLeaseAbort(None)

    if state in ("ready", "initializing"):
        session.call(end, what="The export lease was not ended", subject=lease._moId)


class Lease:
    """A lease and how many transfers need it.

    :param kind: export or import, for messages.
    :param what: what was not done if it can't be had.
    :param start: the call that makes it.
    """

    def __init__(
        self, session: Session, kind: str, what: str, subject: str, start: Callable[[], Any], timeout: int
    ) -> None:
        self.users = 0
        self.failed = False
        self.addresses: List[Any] = []
        self.shares: Dict[int, float] = {}
        self.entity: Any = None
        self._session = session
        self._kind = kind
        self._what = what
        self._subject = subject
        self._start = start
        self._timeout = timeout
        self._lock = threading.Lock()
        self._lease: Any = None
        self._problem: Optional[VadpError] = None
        self._over = threading.Event()
        self._keeper: Optional[threading.Thread] = None

    @property
    def moid(self) -> str:
        return str(self._lease._moId)

    @property
    def broken(self) -> bool:
        return self._problem is not None

    def check(self) -> None:
        """:raises TransportError: the lease has ended."""
        if self._problem is not None:
            raise TransportError(
                f"The {self._kind} lease has ended before everything was transferred",
                subject=self._subject,
                reason=self._problem.reason or str(self._problem),
                remedy="Run again",
                retryable=True,
            )

    def open(self) -> None:
        """Make it and wait until it is ready; the first who comes does it, the others wait."""
        with self._lock:
            self.check()
            if self._keeper is not None:
                return
            self._lease = self._session.call(self._start, what=self._what, subject=self._subject)
            try:
                info = self._wait(self._what)
            except BaseException:
                # Who waits for this lease tries for one of its own, which the server gives only when this is over.
                self._end(well=False)
                raise
            self.addresses = list(info.deviceUrl)
            self.entity = info.entity
            # Two calls may be lost before the server loses its patience.
            pause = min(_PROGRESS_SECONDS, info.leaseTimeout / 4)
            self._keeper = threading.Thread(target=self._keep, args=(pause,), name="nfc-lease", daemon=True)
            self._keeper.start()

    def _wait(self, what: str) -> Any:
        deadline = self._session.clock() + max(self._timeout, 60)
        pause = _POLL_SECONDS[0]
        while True:
            seen = self._session.read(self._lease, "state", "error", "info")
            if seen["state"] == "ready" and seen["info"] is not None:
                return seen["info"]
            if seen["state"] in ("error", "done"):
                if seen["error"] is not None:
                    raise faults.to_error(seen["error"], what, self._subject)
                raise VsphereError(what, subject=self._subject, reason=f"the lease is {seen['state']}", retryable=True)
            if self._session.clock() > deadline:
                raise VsphereError(
                    what, subject=self._subject, reason="the lease does not become ready in time", retryable=True
                )
            self._session.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])

    def _keep(self, pause: float) -> None:
        while not self._over.wait(pause):
            shares = list(self.shares.values())
            percent = min(99, int(100 * sum(shares) / len(shares))) if shares else 0
            try:
                self._session.call(
                    self._lease.HttpNfcLeaseProgress,
                    percent,
                    what=f"The {self._kind} lease was not kept alive",
                    subject=self._subject,
                    idempotent=True,
                )
            except VsphereError as error:
                self._problem = error
                return

    def complete(self) -> None:
        """All is transferred: the machine is there for good. :raises VsphereError: it is not."""
        self._over.set()
        if self._keeper is not None:
            self._keeper.join()
        lease, what = self._lease, f"The {self._kind} lease was not completed"

        def is_done() -> bool:
            return str(self._session.read(lease, "state")["state"]) == "done"

        def end() -> None:
            try:
                lease.HttpNfcLeaseComplete()
            except vim.fault.InvalidState as fault:
                # It has ended already: well, or not; another try would not help.
                if not is_done():
                    raise VsphereError(what, subject=self._subject, reason=faults.fault_text(fault)) from fault

        try:
            self._session.call(end, what=what, subject=self._subject)
        except ConnectionLostError:
            if not is_done():
                raise
        self._lease = None

    def close(self) -> None:
        """Complete it, or abort it where a download failed. Never raises: a lease that is left ends by itself."""
        self._over.set()
        if self._keeper is not None:
            self._keeper.join()
        self._end(well=not self.failed)

    def _end(self, well: bool) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(VsphereError):
                _end_lease(self._session, lease, well)


_leases: Dict[Tuple[int, str, str], Lease] = {}
_leases_lock = threading.Lock()


@contextlib.contextmanager
def _shared_lease(session: Session, vm: VmRef, snapshot_moid: str, timeout: int) -> Iterator[Lease]:
    """The one lease of a snapshot as long as anybody downloads: the first opens it, the last ends it."""
    key = (id(session), vm.moid, snapshot_moid)
    with _leases_lock:
        lease = _leases.get(key)
        if lease is None or lease.broken:
            snapshot = vim.vm.Snapshot(snapshot_moid, session.stub)
            what = "The snapshot was not opened for export"
            lease = Lease(session, "export", what, str(vm), snapshot.ExportSnapshot, timeout)
            _leases[key] = lease
        lease.users += 1
    try:
        lease.open()
        yield lease
    except BaseException:
        lease.failed = True
        raise
    finally:
        with _leases_lock:
            lease.users -= 1
            last = lease.users == 0
            if last and _leases.get(key) is lease:
                del _leases[key]
        if last:
            lease.close()


class _CutError(Exception):
    """The download ended early, or what came is not whole: it starts over."""


class _Download:
    """One disk of a lease into its stage file."""

    def __init__(
        self,
        session: Session,
        lease: Lease,
        disk: Disk,
        stage: Path,
        io_timeout: int,
        on_progress: Optional[Progress],
    ) -> None:
        self._session = session
        self._lease = lease
        self._disk = disk
        self._stage = stage
        self._io_timeout = io_timeout
        self._on_progress = on_progress
        self._address = address_of(lease.addresses, disk)

    def run(self) -> None:
        """:raises TransportError: it failed again and again, or for good."""
        tls = tls_for(self._session, self._address)
        for attempt in range(1, _ATTEMPTS + 1):
            self._lease.check()
            try:
                self._once(tls)
                check_stream(self._stage, self._disk.capacity_bytes)
                return
            except _CutError as cut:
                self._lease.check()
                if attempt == _ATTEMPTS:
                    raise TransportError(
                        "The disk was not downloaded",
                        subject=self._disk.file,
                        reason=f"{cut}; {attempt} tries",
                        remedy="Check the network between this machine and the server",
                        retryable=True,
                    ) from cut
            self._session.sleep(2 ** (attempt - 1))

    def _once(self, tls: Tls) -> None:
        url = urlsplit(self._address.url)
        connection = tls.new(download(self._at_most, self._io_timeout))
        try:
            connection.connect()
            connection.sock.settimeout(self._io_timeout)
            connection.request("GET", request_path(url), headers=cookie_for(self._session, url))
            response = connection.getresponse()
            if response.status != 200:
                self._refused(response)
            self._receive(response)
        except ConnectFailure as failure:
            raise _CutError(str(failure.error.reason or failure.error)) from failure
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(f"the connection was lost: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _refused(self, response: http.client.HTTPResponse) -> None:
        reason = f"HTTP {response.status} {response.reason}"
        if response.status >= 500:
            raise _CutError(reason)
        raise TransportError(
            "The disk was not downloaded",
            subject=self._disk.file,
            reason=reason,
            remedy="Look whether the lease was aborted in the vSphere client, then run again",
            retryable=True,
        )

    @property
    def _at_most(self) -> int:
        """What a stream of the disk can take: its data do not compress at all, and tables and markers."""
        return self._disk.capacity_bytes + self._disk.capacity_bytes // 32 + (64 << 20)

    def _receive(self, response: http.client.HTTPResponse) -> None:
        length = response.length
        expected = length or int(self._address.fileSize or 0) or self._disk.capacity_bytes
        done, told = 0, 0.0
        with self._writing():
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(str(self._stage), flags, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            while True:
                data = response.read(_PIECE)
                if not data:
                    break
                with self._writing():
                    stream.write(data)
                done += len(data)
                self._lease.check()
                self._lease.shares[self._disk.key] = done / max(expected, done)
                if self._on_progress is not None and time.monotonic() - told >= 0.5:
                    told = time.monotonic()
                    self._on_progress(done, max(expected, done))
        if length is not None and done != length:
            raise _CutError(f"{done} of {length} bytes came")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A failure of our own disk is none of the connection."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DataPathError(
                "The download could not be stored",
                subject=str(self._stage),
                reason=error.strerror,
                remedy="Make room in the repository: the whole disk passes through there" if full else None,
            ) from error


def request_path(url: Any) -> str:
    """What to ask the server for; *url* is split."""
    return str(url.path) + (f"?{url.query}" if url.query else "")


def cookie_for(session: Session, url: Any) -> Dict[str, str]:
    """The ticket is in the address. The session's cookie is the server's own, and for nobody else."""
    return {"Cookie": session.cookie} if url.hostname == "*" else {}


def address_of(addresses: List[Any], disk: Disk) -> Any:
    """The entry of a lease for a disk: by controller, bus and unit, never by its place (VADP facts 51).

    :raises TransportError: there is none, or more than one.
    """
    controller = CONTROLLER_CLASSES.get(disk.controller.get("type", ""), disk.controller.get("type", ""))
    wanted = f"{controller}{disk.controller.get('bus')}:{disk.unit}"
    disks = [one for one in addresses if one.disk is not False]
    found = [one for one in disks if wanted in ((one.key or "").split("/")[-1], (one.importKey or "").split("/")[-1])]
    if len(found) != 1:
        known = ", ".join(str(one.key) for one in disks) or "no disk"
        raise TransportError(
            "The lease has no address for the disk",
            subject=disk.file,
            reason=f"{wanted} is wanted, it lists {known}",
            remedy="Use another transport for this disk",
        )
    return found[0]


def tls_for(session: Session, address: Any) -> Tls:
    """How the host of an address is reached and verified: by what the entry says of its certificate, else by CA.

    An entry that says nothing is no leave to accept anything (VADP facts 51). For the server itself then holds what
    holds for all connections to it, and where nothing is verified there, the certificate must be the same one.

    :raises TransportError: the address or what it says of the certificate makes no sense.
    """
    connection = session.connection
    url = urlsplit(address.url)
    own = url.hostname == "*"
    try:
        port = connection.port if own else url.port or 443
    except ValueError:
        port = 0
    if url.scheme != "https" or not url.hostname or not port:
        raise TransportError("The lease's address can't be used", subject=address.key, reason="it is not HTTPS")
    host = connection.hostname if own else url.hostname
    pinned = _pinned(address)
    if pinned is None and own and not connection.validate_certs and not connection.thumbprint:
        pinned = session.thumbprints["sha256"]
    if pinned is not None:
        return Tls(replace(connection, hostname=host, port=port, validate_certs=False, thumbprint=pinned))
    if own and connection.thumbprint:
        return Tls(connection)
    return Tls(replace(connection, hostname=host, port=port, validate_certs=True, thumbprint=None))


def _pinned(address: Any) -> Optional[str]:
    """The thumbprint that the entry names, or that of the certificate in it."""
    text = (getattr(address, "sslCertificate", None) or "").strip()
    if not text:
        return address.sslThumbprint or None
    try:
        if text.startswith("-----BEGIN"):
            der = ssl.PEM_cert_to_DER_cert(text)
        else:
            der = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise TransportError(
            "The certificate in the lease can't be read", subject=address.key, reason=str(error)
        ) from error
    return hashlib.sha256(der).hexdigest()


def check_stream(path: Path, capacity_bytes: int) -> None:
    """A stream-optimised VMDK is whole, of the right size, and names no other file, which qemu would open.

    :raises _CutError: it ends early. :raises TransportError: it is something else.
    """
    header = struct.Struct("<IIIQQQQIQQQ")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 4 * _SECTOR:
            raise _CutError(f"{size} bytes came")
        fields = header.unpack(stream.read(header.size))
        magic, version, flags, capacity, _grain, offset, length = fields[:7]
        directory = fields[9]
        stream.seek(offset * _SECTOR if offset * _SECTOR < size else 0)
        descriptor = stream.read(min(length * _SECTOR, _DESCRIPTOR_BYTES)).split(b"\0")[0].decode("utf-8", "replace")
        stream.seek(size - 3 * _SECTOR)
        marker, footer, end = (stream.read(_SECTOR) for _unused in range(3))
    reason = None
    if magic != _MAGIC or version not in (1, 2, 3):
        reason = "it is not a VMDK"
    elif flags & _COMPRESSED_WITH_MARKERS != _COMPRESSED_WITH_MARKERS or '"streamOptimized"' not in descriptor:
        reason = "it is not a stream-optimised VMDK"
    elif "parentFileNameHint" in descriptor or not re.search(r"^parentCID\s*=\s*ffffffff", descriptor, re.M | re.I):
        reason = "it stands on another file"
    elif capacity * _SECTOR != capacity_bytes:
        reason = f"its disk has {capacity * _SECTOR} bytes, the snapshot says {capacity_bytes}"
    if reason:
        raise TransportError(
            "What the export lease gives can't be used",
            subject=str(path),
            reason=reason,
            remedy="Use another transport for this disk",
        )
    if directory != _AT_END:
        return  # the tables are in front; what they speak of is missed when it is read
    whole = struct.unpack_from("<QII", marker)[2] == _FOOTER_MARKER
    if not whole or struct.unpack_from("<I", footer)[0] != _MAGIC or any(end):
        raise _CutError(f"its end is missing; {size} bytes came")
