# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One login to vCenter or an ESXi host, and all that goes through it.

Every read is one ``RetrievePropertiesEx`` with narrow paths: pyVmomi's lazy attributes cost a round trip each and fail
for unset values on some servers. Every call is retried where that is safe, and only there::

    refused as busy (TaskInProgress, InvalidState)       the server did nothing      again, with back-off
    session expired (NotAuthenticated)                   the server did nothing      one new login, then again
    no connection could be made                          nothing was sent            again, with back-off
    connection lost after the request was sent           not known                   again only if idempotent

The first contact and each login are as patient: a server that restarts is waited for, as long as
``reconnect_timeout`` says.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import http.client
import re
import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from http.cookies import SimpleCookie
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

from ..errors import (
    AuthenticationError,
    ConnectionLostError,
    InputError,
    NotFoundError,
    PrivilegeError,
    TaskError,
    VadpError,
    VsphereError,
    check_range,
)
from ..libraries import pyVmomi, vim, vmodl
from ..followed import note_waiting
from ..named import FILE, path_problem
from . import faults
from .answers import BEGIN_SECONDS as ANSWER_TIMEOUT
from .answers import CALL, GREETING, AnswerRefused, Limits, response_class

# Making a connection either works at once or not at all; answers have limits of their own (:mod:`.answers`).
CONNECT_TIMEOUT = 30

# vCenter ends a session after 30 minutes without a call.
KEEP_ALIVE_SECONDS = 300

# vCenter closes idle connections after minutes; one that is taken from the pool must be alive, or a call that may
# not be repeated is lost with it.
POOL_IDLE_SECONDS = 30

BUSY_TIMEOUT = 300
RECONNECT_TIMEOUT = 60

# What makes something new is cancelled when nobody waits for it any more; what takes something away is left to end.
_CANCELLED = ("VirtualMachine.createSnapshot", "Folder.createVm", "ResourcePool.createVm", "VirtualApp.createVm")
CANCEL_SECONDS = 30

# The largest vCenters have some 50,000 machines. A page without an object is odd, and many are a loop.
_MOST_OBJECTS = 1_000_000
_EMPTY_PAGES = 10
# The network of a large host takes some 200 KB, and an answer has a limit.
_PAGE_OBJECTS = 250

_API_PATH = "/sdk"
# Versions for servers that don't list theirs: both are old enough for every supported vSphere.
_OLDEST_VERSIONS = ("vim25/6.7", "vim25/6.5")

# X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_OTHER_NAME = (62, 64)

_LOST = (OSError, http.client.HTTPException, ExpatError)


@dataclass
class Connection:
    """How to reach a server; the options of doc fragment ``connection``."""

    hostname: str
    username: str
    password: str = field(repr=False)
    port: int = 443
    validate_certs: bool = True
    ca_path: Optional[str] = None
    thumbprint: Optional[str] = None
    reconnect_timeout: int = RECONNECT_TIMEOUT
    progress_file: Optional[str] = None

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> Connection:
        """From ``module.params``. :raises InputError: hostname, port or a time can't be used."""
        _check_address(params["hostname"], params["port"])
        check_range("reconnect_timeout", params["reconnect_timeout"], 0, 86400)
        names = [one.name for one in fields(cls)]
        return cls(**{name: params[name] for name in names if name in params})

    @property
    def address(self) -> str:
        return f"{self.hostname}:{self.port}"


def _check_address(hostname: str, port: int) -> None:
    """What the resolver would not answer for but with an exception of its own, or by asking for something else."""
    reason = ""
    if re.search(r"[/@\s\x00-\x1f\x7f]", hostname):
        reason = "it holds '/', '@', white space or a control character"
    try:
        hostname.encode("idna")
    except UnicodeError as error:
        reason = reason or str(error)
    if reason or not hostname:
        raise InputError(
            "The option hostname names no server",
            subject=repr(hostname),
            reason=reason or "it is empty",
            remedy="Give a name or an address alone, without https:// and without a path",
        )
    check_range("port", port, 1, 65535)


def check_timeout(seconds: int) -> int:
    """*seconds* itself, if a task can be waited for so long. InputError otherwise."""
    if seconds < 1:
        raise InputError("The option timeout is out of range", subject=str(seconds), remedy="Give at least 1 second")
    return seconds


def normal_thumbprint(text: str) -> str:
    """A SHA-1 or SHA-256 thumbprint as lower-case hexadecimal without colons (VADP facts 40). :raises InputError:"""
    digits = text.replace(":", "").replace(" ", "").lower()
    if len(digits) not in (40, 64) or any(digit not in "0123456789abcdef" for digit in digits):
        raise InputError(
            "The thumbprint can't be used",
            subject=text,
            reason="it must be 20 (SHA-1) or 32 (SHA-256) bytes in hexadecimal",
            remedy="Take it from the server's certificate: openssl x509 -noout -fingerprint -sha256",
        )
    return digits


def colons(digest: str) -> str:
    """Hexadecimal as thumbprints are written: ``AA:BB:...``."""
    upper = digest.upper()
    return ":".join(upper[start : start + 2] for start in range(0, len(upper), 2))


class ConnectFailure(OSError):
    """No connection was made, so nothing was sent. ``error`` is what to report to the user."""

    def __init__(self, error: VsphereError) -> None:
        super().__init__(str(error))
        self.error = error


class Tls:
    """Makes connections to one server and verifies each of them the same way, whatever is sent over it.

    With ``validate_certs`` the certificate must come from a trusted authority and carry the server's name. A given
    thumbprint must match in every case.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pinned = normal_thumbprint(connection.thumbprint) if connection.thumbprint else None
        self._certificate = b""
        problem = path_problem(connection.ca_path, FILE) if connection.ca_path else None
        if problem is not None:
            raise InputError(
                "The file of ca_path can't be read",
                subject=connection.ca_path,
                reason=problem,
                remedy="Give a file with the authorities' certificates, or leave ca_path out for the system's",
            )
        try:
            self.context = ssl.create_default_context(cafile=connection.ca_path)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                "The file of ca_path can't be read",
                subject=connection.ca_path,
                reason=str(error),
                remedy="It must hold certificates in PEM form",
            ) from error
        if not connection.validate_certs:
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE

    @property
    def certificate(self) -> bytes:
        """The certificate (DER) that the last connection was verified with."""
        return self._certificate

    @property
    def thumbprints(self) -> Dict[str, str]:
        """``sha1`` and ``sha256`` of the certificate that the last connection was verified with."""
        return {
            "sha1": colons(hashlib.sha1(self._certificate).hexdigest()),
            "sha256": colons(hashlib.sha256(self._certificate).hexdigest()),
        }

    def new(self, limits: Limits = CALL, **_unused: Any) -> _VerifiedConnection:
        """A connection that is not open yet. Takes, and ignores, what pyVmomi hands to a connection class.

        :param limits: of each answer.
        """
        return _VerifiedConnection(self, self._connection, limits)

    def problem_beside_the_name(self, error: ssl.SSLCertVerificationError) -> Optional[ssl.SSLCertVerificationError]:
        """What is wrong with a certificate besides its name, which is looked at first: asked by another handshake."""
        if error.verify_code not in _OTHER_NAME:
            return None
        context = ssl.create_default_context(cafile=self._connection.ca_path)
        context.check_hostname = False
        address = (self._connection.hostname, self._connection.port)
        try:
            with socket.create_connection(address, CONNECT_TIMEOUT) as raw:
                context.wrap_socket(raw, server_hostname=self._connection.hostname).close()
        except ssl.SSLCertVerificationError as other:
            return other
        except OSError:
            return None  # the name alone is known to be wrong
        return None

    def accept(self, sock: ssl.SSLSocket) -> None:
        """Check the pinned thumbprint and remember the certificate of a connection that was just made."""
        certificate = sock.getpeercert(binary_form=True) or b""
        if self._pinned:
            algorithm = hashlib.sha1 if len(self._pinned) == 40 else hashlib.sha256
            found = algorithm(certificate).hexdigest()
            if not hmac.compare_digest(found, self._pinned):
                raise AuthenticationError(
                    "The server's certificate is another one",
                    subject=self._connection.address,
                    reason=f"its thumbprint is {colons(found)}, not {colons(self._pinned)}",
                    remedy="Find out why it changed; if it was renewed, set the new thumbprint",
                )
        self._certificate = certificate


class _VerifiedConnection(http.client.HTTPSConnection):
    """An HTTPS connection. Making it raises :class:`ConnectFailure` or :class:`AuthenticationError`."""

    def __init__(self, tls: Tls, connection: Connection, limits: Limits) -> None:
        super().__init__(connection.hostname, connection.port, timeout=CONNECT_TIMEOUT, context=tls.context)
        self.response_class = response_class(limits)  # type: ignore[assignment]
        self._tls = tls
        self._address = connection

    def connect(self) -> None:
        try:
            super().connect()
            self._tls.accept(self.sock)
            self.sock.settimeout(ANSWER_TIMEOUT)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise _certificate_error(self._address, error, self._tls.problem_beside_the_name(error)) from error
        except OSError as error:
            self.close()
            raise ConnectFailure(_network_error(self._address, error)) from error
        except VadpError:
            self.close()
            raise


def _certificate_error(
    connection: Connection, error: ssl.SSLCertVerificationError, beside: Optional[ssl.SSLCertVerificationError]
) -> AuthenticationError:
    """:param beside: what is wrong besides the name."""
    what = "The server's certificate is not trusted"
    remedy = "Set ca_path to the file with the authority's certificate (vCenter offers it at /certs/download.zip)"
    reason = error.verify_message or str(error)
    if beside is not None:
        reason = f"{beside.verify_message or beside}; besides, {reason}"
        error = beside
    if error.verify_code in _OTHER_NAME:
        what = "The server's certificate carries another name"
        remedy = "Set hostname to a name that is in the certificate"
    elif error.verify_code in (9, 10):  # not yet valid, has expired
        what = "The server's certificate is out of its time"
        remedy = "Renew the certificate of the server, or set this machine's clock"
    return AuthenticationError(what, subject=connection.address, reason=reason, remedy=remedy)


def _network_error(connection: Connection, error: OSError) -> VsphereError:
    what = "The server can't be reached"
    reason = error.strerror or str(error)
    remedy = "Check the network between this machine and the server"
    # What is spelt wrongly does not pass.
    passes = True
    if isinstance(error, socket.gaierror):
        passes = error.errno == socket.EAI_AGAIN
        remedy = "Check hostname and the name servers of this machine"
        reason = f"the name can't be resolved: {reason}"
    elif isinstance(error, ConnectionRefusedError):
        remedy = "Check port, and that the server's services run"
    elif isinstance(error, (socket.timeout, TimeoutError)):
        reason = "no answer in time"
        remedy = "Check hostname, and that no firewall drops packets between this machine and the server"
    elif isinstance(error, ssl.SSLError):
        remedy = "Check port: what answers there may not speak TLS"
        passes = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
    return VsphereError(what, subject=connection.address, reason=reason, remedy=remedy, retryable=passes)


class _Patience:
    """Waits for a server that can't be reached, from the first failure on as long as ``reconnect_timeout`` says."""

    def __init__(self, connection: Connection, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._connection = connection
        self._clock = clock
        self._sleep = sleep

    def through(self, function: Callable[[], Any]) -> Any:
        """What *function* returns once it succeeds. :raises VsphereError: what does not pass, or lasts too long."""
        lost_at: Optional[float] = None
        pauses = _pauses()
        while True:
            try:
                return function()
            except VsphereError as error:
                now = self._clock()
                if lost_at is None:
                    lost_at = now
                    self._tell(error)
                if not error.retryable or now - lost_at >= self._connection.reconnect_timeout:
                    raise
            self._sleep(next(pauses))

    def _tell(self, error: VsphereError) -> None:
        if self._connection.progress_file is not None and error.retryable:
            # Nobody's backup fails because nobody can watch it.
            with suppress(OSError):
                note_waiting(
                    self._connection.progress_file,
                    self._connection.address,
                    f"waiting for the server ({error.reason}), {self._connection.reconnect_timeout} s at most",
                )


class Session:
    """One login; a context manager that logs out at its end. Usable from several threads.

    ``connection``, ``content`` (``vim.ServiceInstanceContent``), ``about``, ``stub``, ``clock``, ``sleep`` are public;
    ``key`` names the login to vCenter's own calls about sessions, ``login_time`` says when it was.

    :param stub: a pyVmomi stub adapter that is not logged in.
    """

    def __init__(
        self,
        connection: Connection,
        stub: Any,
        tls: Optional[Tls] = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.connection = connection
        self.stub = stub
        self.tls = tls
        self.clock = clock
        self.sleep = sleep
        self.busy_timeout = BUSY_TIMEOUT
        self.reconnect_timeout = connection.reconnect_timeout
        self._login_lock = threading.Lock()
        self._logins = 0
        self.key: Optional[str] = None
        #: (the server's time, this machine's before and after it) at the last login, if the server tells.
        self.login_time: Optional[Tuple[datetime, datetime, datetime]] = None
        self._server_uuid: Optional[str] = None
        self.on_unfinished: Optional[Callable[[Dict[str, Any]], None]] = None
        self._last_call = clock()
        self._closing = threading.Event()
        self._keep_alive: Optional[threading.Thread] = None
        self.service = vim.ServiceInstance("ServiceInstance", stub)
        self.content = self._contact(self.service.RetrieveContent)
        self.about = self.content.about
        self._contact(self._login)

    @classmethod
    def connect(
        cls,
        connection: Connection,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Session:
        """Log in. :raises AuthenticationError: certificate, user or password; :raises VsphereError: not reached, for
        longer than ``reconnect_timeout``."""
        tls = Tls(connection)
        patience = _Patience(connection, clock, sleep)
        stub = _stub_class()(
            host=connection.hostname,
            port=connection.port,
            path=_API_PATH,
            version=patience.through(lambda: _negotiate_version(connection, tls)),
            sslContext=tls.context,
            connectionPoolTimeout=POOL_IDLE_SECONDS,
            acceptCompressedResponses=False,
        )
        stub.scheme = tls.new
        session = cls(connection, stub, tls, clock, sleep)
        session._keep_alive = threading.Thread(
            target=session._keep_session_alive, name="vsphere-keep-alive", daemon=True
        )
        session._keep_alive.start()
        return session

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Log out. Never raises: a session that can't be ended ends by itself."""
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            self.content.sessionManager.Logout()
        except (vmodl.MethodFault, VadpError) + _LOST:
            return
        finally:
            self.stub.DropConnections()

    @property
    def is_vcenter(self) -> bool:
        return self.about.apiType == "VirtualCenter"

    @property
    def server_uuid(self) -> Optional[str]:
        """What the managed object ids of this server are unique to: a vCenter's instance UUID, a host's hardware UUID.

        None where the server does not say.
        """
        if self._server_uuid is None:
            if self.is_vcenter:
                found = self.about.instanceUuid
            else:
                hosts = self.find(vim.HostSystem, ["hardware.systemInfo.uuid"])
                found = hosts[0][1]["hardware.systemInfo.uuid"] if len(hosts) == 1 else None
            self._server_uuid = str(found).lower() if found else None
        return self._server_uuid

    @property
    def thumbprints(self) -> Dict[str, str]:
        """``{"sha1": "AA:BB:...", "sha256": ...}`` of the certificate that the connections were verified with."""
        return self.tls.thumbprints if self.tls else {}

    @property
    def cookie(self) -> str:
        """The session's cookie as a request's ``Cookie`` header, for ``/folder``."""
        morsel = SimpleCookie(self.stub.cookie).get("vmware_soap_session")
        return f'vmware_soap_session="{morsel.value}"' if morsel else ""

    # Logins

    def _contact(self, function: Callable[[], Any]) -> Any:
        """Run one of the calls of a login, which can't be retried by another login."""
        patience = _Patience(self.connection, self.clock, self.sleep)
        return patience.through(lambda: self._contact_once(function))

    def _contact_once(self, function: Callable[[], Any]) -> Any:
        what = "The login failed"
        subject = f"{self.connection.username} at {self.connection.address}"
        try:
            return function()
        except vmodl.MethodFault as fault:
            raise faults.to_error(fault, what, subject) from fault
        except ConnectFailure as failure:
            raise failure.error from failure
        except _LOST as error:
            raise VsphereError(
                what,
                subject=subject,
                reason=_words(error),
                remedy="Check that the services of the server run (it may be starting), and that port is its API's",
                retryable=not isinstance(error, AnswerRefused),
            ) from error

    def _login(self) -> None:
        before = datetime.now(timezone.utc)
        session = self.content.sessionManager.Login(self.connection.username, self.connection.password, None)
        self.key = getattr(session, "key", None)
        theirs = getattr(session, "loginTime", None)
        self.login_time = (theirs, before, datetime.now(timezone.utc)) if theirs is not None else None
        self._logins += 1

    def renew_login(self, seen: int) -> None:
        """Log in again, unless another thread has done so since login number *seen*."""
        with self._login_lock:
            if self._logins == seen:
                self.stub.cookie = ""
                self._contact(self._login)

    @property
    def logins(self) -> int:
        """How often this session has logged in so far; see :meth:`renew_login`."""
        return self._logins

    def _keep_session_alive(self) -> None:
        while not self._closing.wait(KEEP_ALIVE_SECONDS):
            if self.clock() - self._last_call >= KEEP_ALIVE_SECONDS:
                try:
                    self.call(self.service.CurrentTime, what="The session was not kept alive", idempotent=True)
                except VsphereError:
                    # Nobody waits for this call. The next real one meets the same trouble and reports it.
                    continue

    # Calls

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        what: str,
        subject: Optional[str] = None,
        idempotent: bool = False,
    ) -> Any:
        """Call a managed method (``vm.CreateSnapshot_Task``) and return its result.

        :param what: what failed if it fails ("The snapshot was not created").
        :param idempotent: calling it twice does no harm, so a call whose connection broke is repeated.
        :raises VsphereError: or one of its kinds for a fault; :class:`ConnectionLostError` if it is not known whether
            a call that is not idempotent was carried out.
        """
        started = self.clock()
        lost_at: Optional[float] = None
        pauses = _pauses()
        renewed = False
        while True:
            seen = self._logins
            try:
                result = function(*args)
                self._last_call = self.clock()
                return result
            except vmodl.MethodFault as fault:
                if faults.is_not_authenticated(fault) and not renewed:
                    renewed = True
                    self.renew_login(seen)
                elif _may_repeat(fault, args) and self.clock() - started < self.busy_timeout:
                    self.sleep(next(pauses))
                else:
                    raise faults.to_error(fault, what, subject) from fault
            except _LOST as error:
                nothing_sent = isinstance(error, ConnectFailure)
                if idempotent and isinstance(error, AnswerRefused):
                    # It would answer the same again.
                    raise self._lost(VsphereError, what, subject, error) from error
                if not (nothing_sent or idempotent):
                    raise self._lost(ConnectionLostError, what, subject, error) from error
                now = self.clock()
                lost_at = now if lost_at is None else lost_at
                if now - lost_at >= self.reconnect_timeout:
                    raise self._lost(VsphereError, what, subject, error) from error
                self.sleep(next(pauses))

    def _lost(self, kind: Any, what: str, subject: Optional[str], error: BaseException) -> VsphereError:
        lost: VsphereError = kind(
            what,
            subject=subject,
            reason=f"the connection to {self.connection.address} was lost: {_words(error)}",
            remedy="Check the network and the services of the server, then run again",
            retryable=True,
        )
        return lost

    # Reads

    def read(self, obj: Any, *paths: str) -> Dict[str, Any]:
        """Properties of one object in one call: path -> value, ``None`` where it is unset.

        :raises NotFoundError: the object is gone; :raises PrivilegeError: a property may not be read.
        """
        return self.read_many([obj], type(obj), paths)[obj._moId]

    def read_each(self, *wanted: Tuple[Any, Sequence[str]]) -> List[Dict[str, Any]]:
        """Properties of several objects of any types in one call: (object, paths), ... -> path -> value for each.

        :raises NotFoundError: one of them is gone.
        """
        contents = self.retrieve([filter_spec([obj], {type(obj): paths}) for obj, paths in wanted])
        found = _all_of([obj for obj, _paths in wanted], contents)
        return [_values(found[obj._moId], paths, strict=True) for obj, paths in wanted]

    def read_many(self, objs: Sequence[Any], kind: Any, paths: Sequence[str]) -> Dict[str, Dict[str, Any]]:
        """Properties of several objects of one type in one call: moid -> (path -> value or ``None``).

        :raises NotFoundError: one of them is gone.
        """
        if not objs:
            return {}
        found = _all_of(objs, self.retrieve([filter_spec(objs, {kind: paths})]))
        return {moid: _values(content, paths, strict=True) for moid, content in found.items()}

    def find(self, kind: Any, paths: Sequence[str], root: Any = None) -> List[Tuple[Any, Dict[str, Any]]]:
        """All objects of a type below *root* (the whole inventory): [(object, path -> value or ``None``)]."""

        def look() -> List[Any]:
            # A view is its session's, so all of this is repeated after a new login.
            view = self.content.viewManager.CreateContainerView(root or self.content.rootFolder, [kind], True)
            members = vmodl.query.PropertyCollector.TraversalSpec(type=type(view), path="view", skip=False)
            try:
                found = self._all_pages([filter_spec([view], {kind: paths}, [members], skip=True)])
                view.DestroyView()
            except vmodl.fault.ManagedObjectNotFound as fault:
                if getattr(fault.obj, "_moId", None) != view._moId:
                    raise
                # Another thread has logged in again.
                raise vim.fault.NotAuthenticated() from fault
            return found

        contents: List[Any] = self.call(look, what="The inventory was not read", idempotent=True)
        return [(content.obj, _values(content, paths, strict=False)) for content in contents]

    def retrieve(self, specs: Sequence[Any], what: str = "The inventory was not read") -> List[Any]:
        """All pages of ``RetrievePropertiesEx`` for filter specs (see :func:`filter_spec`): [ObjectContent]."""
        # A page token does not survive a new login, so a retry starts with the first page.
        contents: List[Any] = self.call(lambda: self._all_pages(specs), what=what, idempotent=True)
        return contents

    def _all_pages(self, specs: Sequence[Any]) -> List[Any]:
        """What :meth:`retrieve` calls, without its patience."""
        collector = self.content.propertyCollector
        options = vmodl.query.PropertyCollector.RetrieveOptions(maxObjects=_PAGE_OBJECTS)
        page = collector.RetrievePropertiesEx(list(specs), options)
        found: List[Any] = []
        empty = 0
        while page is not None:
            found.extend(page.objects)
            empty += not page.objects
            if empty > _EMPTY_PAGES or len(found) > _MOST_OBJECTS:
                raise AnswerRefused(f"the pages have no end ({len(found)} objects, {empty} pages without any)")
            page = collector.ContinueRetrievePropertiesEx(page.token) if page.token else None
        for content in found:
            for missing in content.missingSet:
                if faults.is_not_authenticated(missing.fault):
                    raise missing.fault
        return found

    # Tasks

    def wait(self, task: Any, *, what: str, subject: Optional[str] = None, timeout: float = 3600) -> Any:
        """Wait for a task and return its result.

        :raises TaskError: it failed (with ``fault``), or did not end within *timeout* seconds.
        """
        deadline = self.clock() + timeout
        pause = 0.1
        while True:
            # Nothing is done at once: the first look comes after a moment. A short task is seen to end soon, a long
            # one costs few calls.
            self.sleep(min(pause, max(deadline - self.clock(), 0)))
            pause = min(pause * 1.5, 5.0)
            try:
                info = self.read(task, "info.state", "info.result", "info.error")
            except VsphereError as error:
                if isinstance(error.fault, vmodl.fault.ManagedObjectNotFound):
                    raise TaskError(
                        what,
                        subject=subject,
                        reason=f"vCenter no longer knows the task {task._moId} (it may have been restarted)",
                        remedy="Look at the object in the vSphere client, then run again",
                        retryable=True,
                        details={"task": task._moId, "forgotten": True},
                    ) from error
                raise
            state = info["info.state"]
            if state == "success":
                return info["info.result"]
            if state == "error":
                fault = info["info.error"]
                if fault is None:
                    raise TaskError(what, subject=subject, reason="the task failed without saying why")
                raise faults.to_error(fault, what, subject, kind=TaskError)
            if self.clock() >= deadline:
                raise TaskError(
                    what,
                    subject=subject,
                    reason=f"the task {task._moId} did not end within {timeout:g} s",
                    remedy="It goes on in vCenter; wait for it there, or set a longer timeout",
                    retryable=True,
                    details={"task": task._moId, "timed_out": True},
                )

    def run_task(
        self,
        function: Callable[..., Any],
        *args: Any,
        what: str,
        subject: Optional[str] = None,
        timeout: float = 3600,
        idempotent: bool = False,
    ) -> Any:
        """Start a task, wait for it, and start it again where it failed because the object was busy (VADP facts 17).

        A task that was sent is not undone by our going away. What is not known to have ended when this leaves, by an
        error or an interrupt, is told to ``on_unfinished`` (:meth:`remembering`).

        :raises TaskError: it failed, or did not end in time: then what makes something new was cancelled, and the
            error tells what is still under way.
        """
        deadline = self.clock() + timeout
        busy_until = min(deadline, self.clock() + self.busy_timeout)
        pauses = _pauses()
        while True:
            task = self.call(function, *args, what=what, subject=subject, idempotent=idempotent)
            open_ended = True
            try:
                result = self.wait(task, what=what, subject=subject, timeout=max(deadline - self.clock(), 0))
                open_ended = False
                return result
            except TaskError as error:
                open_ended = False
                if error.details.get("timed_out"):
                    open_ended = not self._gave_up(task, error)
                    raise
                if not (_may_repeat(error.fault, args) and self.clock() < busy_until):
                    raise
            finally:
                if open_ended:
                    self.leave(task, what, subject)
            self.sleep(next(pauses))

    def _gave_up(self, task: Any, error: TaskError) -> bool:
        """Cancel a task that nobody waits for any more, if it makes something. :returns: whether it has ended."""
        try:
            info = self.read(task, "info.descriptionId", "info.cancelable")
            if info["info.descriptionId"] in _CANCELLED and info["info.cancelable"]:
                self.call(task.CancelTask, what="The task was not cancelled", subject=task._moId, idempotent=True)
            state = self.wait_for_end(task, CANCEL_SECONDS if info["info.descriptionId"] in _CANCELLED else 0)
        except VsphereError:
            state = "unknown"
        if state in ("error", "success", "gone"):
            error.details["ended"] = state
            came = "it was done after all" if state == "success" else "it has ended without success now"
            error.remedy = f"{came[0].upper()}{came[1:]}; set a longer timeout"
            return True
        error.remedy = (
            f"{task._moId} is still under way, and the next vadp_recover of this virtual machine looks for what comes"
            " of it"
            if self.on_unfinished is not None
            else f"{task._moId} is still under way in vCenter, and what comes of it stays: wait for its end there, then"
            " look at the object"
        ) + ". A longer timeout may help"
        return False

    def wait_for_end(self, task: Any, seconds: float) -> str:
        """A task's state when it has ended, or after so many seconds: success, error, running, queued; gone where the
        server knows it no longer."""
        until = self.clock() + seconds
        while True:
            try:
                state = str(self.read(task, "info.state")["info.state"])
            except NotFoundError:
                return "gone"
            except VsphereError as error:
                if isinstance(error.fault, vmodl.fault.ManagedObjectNotFound):
                    return "gone"
                raise
            if state in ("success", "error") or self.clock() >= until:
                return state
            self.sleep(1)

    def leave(self, task: Any, what: str, subject: Optional[str]) -> None:
        """Tell of a task that nobody waits for any more, and that may go on."""
        if self.on_unfinished is not None:
            self.on_unfinished(
                {"task": task._moId, "failed": what, "subject": subject, "server_uuid": self.server_uuid}
            )

    @contextmanager
    def remembering(self, on_unfinished: Callable[[Dict[str, Any]], None]) -> Iterator[None]:
        """Meanwhile tasks that are left while they may go on are told to *on_unfinished*.

        :param on_unfinished: gets {task, failed, subject, server_uuid}: the task's managed object id, what failed if
            it did not succeed, on which object.
        """
        before, self.on_unfinished = self.on_unfinished, on_unfinished
        try:
            yield
        finally:
            self.on_unfinished = before


def _may_repeat(fault: Any, args: Sequence[Any]) -> bool:
    """Whether a busy object is all that was in the way. Who asks for a change of just one version of the configuration
    must look again when there is another one (VADP facts 54)."""
    if isinstance(fault, vim.fault.ConcurrentAccess) and any(getattr(arg, "changeVersion", None) for arg in args):
        return False
    return faults.is_busy(fault)


@functools.lru_cache(maxsize=None)
def _stub_class() -> Any:
    """pyVmomi's adapter; what it stumbles over in an answer is the answer's fault, and no defect of ours."""

    class Stub(pyVmomi.SoapStubAdapter):
        def InvokeMethod(self, mo: Any, info: Any, args: Any, outerStub: Any = None) -> Any:
            # What can't be sent fails here: that one is ours.
            self.SerializeRequest(mo, info, args)
            try:
                return super().InvokeMethod(mo, info, args, outerStub)
            except (vmodl.MethodFault, VadpError) + _LOST:
                raise
            except Exception as error:
                words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise AnswerRefused(f"the answer is not understood ({words})") from error

    return Stub


def _pauses() -> Any:
    """0.5, 1, 2, ... 30 seconds."""
    pause = 0.5
    while True:
        yield pause
        pause = min(pause * 2, 30.0)


def _words(error: BaseException) -> str:
    if isinstance(error, ConnectFailure):
        return error.error.reason or str(error.error)
    if isinstance(error, (socket.timeout, TimeoutError)):
        return "no answer in time"
    if isinstance(error, AnswerRefused):
        return str(error)
    return f"{error} ({type(error).__name__})"


def filter_spec(
    objs: Sequence[Any], properties: Dict[Any, Sequence[str]], traversals: Sequence[Any] = (), skip: bool = False
) -> Any:
    """A filter spec over *objs* and what *traversals* lead to.

    :param properties: managed type -> paths.
    :param skip: leave *objs* themselves out.
    """
    collector = vmodl.query.PropertyCollector
    return collector.FilterSpec(
        objectSet=[collector.ObjectSpec(obj=obj, skip=skip, selectSet=list(traversals)) for obj in objs],
        propSet=[
            collector.PropertySpec(type=kind, pathSet=list(paths), all=False) for kind, paths in properties.items()
        ],
    )


def _all_of(objs: Sequence[Any], contents: Sequence[Any]) -> Dict[str, Any]:
    """What was answered, by moid. A server leaves out what it does not have, or has as another type."""
    found = {content.obj._moId: content for content in contents}
    gone = [obj._moId for obj in objs if obj._moId not in found]
    if gone:
        raise NotFoundError(
            "An object of the inventory is gone",
            subject=", ".join(gone[:5]),
            reason="the server does not answer for it",
            remedy="Run again",
        )
    return found


def _values(content: Any, paths: Sequence[str], strict: bool) -> Dict[str, Any]:
    values: Dict[str, Any] = dict.fromkeys(paths)
    values.update((prop.name, prop.val) for prop in content.propSet)
    if strict:
        for missing in content.missingSet:
            error = faults.to_error(missing.fault, f"The property {missing.path} can't be read", content.obj._moId)
            if isinstance(error, PrivilegeError) and not error.details["privileges"]:
                error.reason = "the user lacks the privilege System.Read"
            raise error
    return values


def _negotiate_version(connection: Connection, tls: Tls) -> str:
    """The newest API version that the server lists and pyVmomi knows, as pyVmomi names it."""
    what = "The server does not answer as a vSphere API"
    remedy = "Check hostname and port; a vCenter that is starting answers after some minutes"
    server = tls.new(GREETING)
    try:
        server.request("GET", f"{_API_PATH}/vimServiceVersions.xml")
        response = server.getresponse()
        body = response.read()
    except ConnectFailure as failure:
        raise failure.error from failure
    except (OSError, http.client.HTTPException) as error:
        raise VsphereError(
            what, subject=connection.address, reason=_words(error), remedy=remedy, retryable=True
        ) from error
    finally:
        server.close()
    listed: List[str] = []
    if response.status == 200:
        try:
            if b"<!DOCTYPE" in body:
                # Old parsers make any number of bytes of a few entities.
                raise ElementTree.ParseError("it defines entities")
            root = ElementTree.fromstring(body)
        except ElementTree.ParseError as error:
            raise VsphereError(what, subject=connection.address, reason=str(error), remedy=remedy) from error
        for namespace in root.findall("namespace"):
            if namespace.findtext("name") == "urn:vim25":
                listed.append(f"vim25/{namespace.findtext('version')}")
                listed.extend(f"vim25/{prior.text}" for prior in namespace.findall("priorVersions/version"))
    elif response.status != 404:
        raise VsphereError(
            what,
            subject=connection.address,
            reason=f"HTTP {response.status} {response.reason}",
            remedy=remedy,
            retryable=response.status >= 500,
        )
    for name in listed + list(_OLDEST_VERSIONS):
        if name in pyVmomi.VmomiSupport.versionMap:
            version: str = pyVmomi.VmomiSupport.versionMap[name]
            return version
    raise VsphereError(
        what, subject=connection.address, reason="pyVmomi knows none of its versions", remedy="Update pyVmomi"
    )
