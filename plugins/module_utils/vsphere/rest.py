# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vCenter's REST API (``/api``, from vCenter 7.0 U2 on), for the little that the SOAP API does not have."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
from contextlib import suppress
from typing import Any, Dict, NamedTuple, Optional

from ..errors import AuthenticationError, NotFoundError, PrivilegeError, VadpError, VsphereError
from .answers import REST, AnswerRefused
from .session import ConnectFailure, Session

# What is asked for here is worth a short wait, and no backup fails for it.
ANSWER_TIMEOUT = 30
TOTAL_SECONDS = 120

_MAX_BYTES = 16 * 1024 * 1024
_SESSION = "/api/session"
_TOKEN = "vmware-api-session-id"


class _Answer(NamedTuple):
    status: int
    body: bytes


class RestSession:
    """A login of its own to the server of a session, over its TLS; a context manager that ends it.

    The login is made with the first call. A call whose connection broke is made once more, so it must do no harm twice.
    Of one thread.

    :param what: what failed if a call fails ("The tags were not read"), with its *subject*.
    """

    def __init__(self, session: Session, what: str, subject: str) -> None:
        self._session = session
        self._what = what
        self._subject = subject
        if session.tls is None:
            raise self.error(VsphereError, "the session has no HTTPS connection of its own")
        self._connection = session.tls.new(REST)
        self._deadline = session.clock() + TOTAL_SECONDS
        self._token: Optional[str] = None
        self._silent = False

    def __enter__(self) -> RestSession:
        return self

    def __exit__(self, *_exc: Any) -> None:
        """Never raises: a login that can't be ended ends by itself."""
        try:
            if self._token is not None and not self._silent:
                with suppress(VadpError):
                    self._send("DELETE", _SESSION, {_TOKEN: self._token})
        finally:
            self._connection.close()

    def get(self, path: str) -> Any:
        """The answer as plain data. :raises VsphereError: it was refused, or there was none."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Dict[str, Any]) -> Any:
        """As :meth:`get`."""
        return self._call("POST", path, json.dumps(body).encode("utf-8"))

    def _call(self, method: str, path: str, body: Optional[bytes]) -> Any:
        answer = None
        if self._token is not None:
            answer = self._send(method, path, {_TOKEN: self._token}, body)
        if answer is None or answer.status == 401:
            # There is no login yet, or it has ended.
            self._token = self._login()
            answer = self._send(method, path, {_TOKEN: self._token}, body)
        return self._content(answer)

    def _login(self) -> str:
        connection = self._session.connection
        given = base64.b64encode(f"{connection.username}:{connection.password}".encode()).decode("ascii")
        answer = self._send("POST", _SESSION, {"Authorization": f"Basic {given}"})
        if answer.status == 404:
            raise self.error(VsphereError, "this vCenter has no REST API below /api, which came with vCenter 7.0 U2")
        token = self._content(answer)
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise self.error(VsphereError, "the login to the REST API gave no session", answer.status)
        return token

    def _send(self, method: str, path: str, headers: Dict[str, str], body: Optional[bytes] = None) -> _Answer:
        if body is not None:
            headers = {**headers, "Content-Type": "application/json"}
        repeated = False
        while True:
            if self._session.clock() > self._deadline:
                self._silent = True
                raise self.error(VsphereError, f"the REST API took more than {TOTAL_SECONDS} s")
            try:
                if self._connection.sock is None:
                    self._connect()
                self._connection.request(method, path, body=body, headers={"Accept": "application/json", **headers})
                response = self._connection.getresponse()
                data = response.read(_MAX_BYTES + 1)
                if len(data) > _MAX_BYTES:
                    self._connection.close()
                    raise self.error(VsphereError, f"the REST API's answer is larger than {_MAX_BYTES} bytes")
                return _Answer(response.status, data)
            except ConnectFailure as failure:
                self._silent = True
                raise self.error(VsphereError, failure.error.reason or failure.error.what) from failure
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                late = isinstance(error, (socket.timeout, TimeoutError))
                refused = isinstance(error, AnswerRefused)
                if late or refused or repeated:
                    self._silent = True
                    reason = "no answer in time" if late else f"the connection was lost ({type(error).__name__})"
                    reason = str(error) if refused else reason
                    raise self.error(VsphereError, f"the REST API: {reason}") from error
                # The server may close a connection that is kept at any time.
                repeated = True

    def _connect(self) -> None:
        self._connection.connect()
        self._connection.sock.settimeout(ANSWER_TIMEOUT)

    def _content(self, answer: _Answer) -> Any:
        status, body = answer
        if status in (200, 201, 204):
            try:
                return json.loads(body.decode("utf-8"), parse_int=_integer) if body else None
            except (ValueError, RecursionError) as error:
                raise self.error(VsphereError, "the REST API's answer is not JSON", status) from error
        kinds = {401: AuthenticationError, 403: PrivilegeError, 404: NotFoundError}
        words = _words(body)
        reason = f"the REST API refused it, HTTP {status}" + (f": {words}" if words else "")
        raise self.error(kinds.get(status, VsphereError), reason, status)

    def error(self, kind: Any, reason: str, status: Optional[int] = None) -> VsphereError:
        """An error of this session, to be raised."""
        error: VsphereError = kind(
            self._what,
            subject=self._subject,
            reason=reason,
            retryable=status is None or status >= 500,
            details={} if status is None else {"http_status": status},
        )
        return error


def _integer(digits: str) -> int:
    # Many digits take hours where Python has no limit of its own.
    if len(digits) > 20:
        raise ValueError("a number is too large")
    return int(digits)


def _words(body: bytes) -> str:
    """vCenter's own, of an error: ``{"error_type": ..., "messages": [{"default_message": ...}]}``."""
    try:
        told = json.loads(body.decode("utf-8"), parse_int=_integer)
        messages = [str(message["default_message"]) for message in told["messages"]] or [str(told["error_type"])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", "; ".join(messages))[:300].rstrip(". ")
