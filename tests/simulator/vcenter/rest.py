# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vCenter's REST API: ``/api`` (7.0 U2 and newer) with sessions and tags; ``/rest`` (older) with sessions.

What ``/rest`` answers stands in a field ``value``, and each success is 200.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .inventory import VirtualMachine
from .model import now
from .services import AuthenticationFailed, DropConnection, Session
from .tags import NotEligible, Tag

if TYPE_CHECKING:
    from .server import Handler

TOKEN = "vmware-api-session-id"
ROOTS = ("/api/", "/rest/")
REST_SESSION = "/rest/com/vmware/cis/session"
TAGGING = "/api/cis/tagging"
ATTACH = "InventoryService.Tagging.AttachTag"
ATTACHABLE = "InventoryService.Tagging.ObjectAttachable"


class _Refused(Exception):
    def __init__(self, status: int, kind: str, text: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.kind = kind


class _Call:
    """One request, and what the call log says of it."""

    def __init__(self, handler: "Handler", body: bytes) -> None:
        self.handler = handler
        self.simulator = handler.simulator
        url = urllib.parse.urlsplit(handler.path)
        self.path = urllib.parse.unquote(url.path)
        self.query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        self.body = body
        self.old = self.path.startswith("/rest/")
        self.session: Session | None = None
        self.object: str | None = None
        self.changing = False

    def fields(self, *names: str) -> list[Any]:
        """The values of a JSON body that has these fields and no others."""
        if (self.handler.headers.get("Content-Type") or "").split(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "INVALID_ARGUMENT", "Content-Type is not application/json")
        try:
            given = json.loads(self.body.decode())
        except ValueError:
            raise _Refused(400, "INVALID_ARGUMENT", "the body is no JSON") from None
        if not isinstance(given, dict) or set(given) != set(names):
            raise _Refused(400, "INVALID_ARGUMENT", f"the body has not the fields {', '.join(names)}")
        return [given[name] for name in names]

    def machine(self, status: int) -> VirtualMachine:
        """The VM of a body's ``object_id``. :param status: of the answer if there is no such VM."""
        (given,) = self.fields("object_id")
        if (
            not isinstance(given, dict)
            or set(given) != {"id", "type"}
            or not all(isinstance(value, str) for value in given.values())
        ):
            raise _Refused(400, "INVALID_ARGUMENT", "object_id has an id and a type")
        self.object = self.object or given["id"]
        found = self.simulator.inventory.entities.get(given["id"])
        if given["type"] != "VirtualMachine" or not isinstance(found, VirtualMachine):
            kind = "NOT_FOUND" if status == 404 else "INVALID_ARGUMENT"
            raise _Refused(status, kind, f"there is no {given['type']} {given['id']}")
        return found

    def tag(self, tag_id: str) -> Tag:
        self.object = tag_id
        if tag_id not in self.simulator.tags.tags:
            raise _Refused(404, "NOT_FOUND", f"there is no tag {tag_id}")
        return self.simulator.tags.tags[tag_id]


def _login(call: _Call) -> Any:
    header = call.handler.headers.get("Authorization") or ""
    try:
        scheme, _unused, given = header.partition(" ")
        name, _unused, password = base64.b64decode(given, validate=True).decode().partition(":")
        if scheme.lower() != "basic":
            raise AuthenticationFailed("no basic authentication")
        handler = call.handler
        agent = handler.headers.get("User-Agent") or ""
        call.session = call.simulator.sessions.login(name, password, handler.client_address[0], agent, rest=True)
    except (AuthenticationFailed, binascii.Error, UnicodeDecodeError):
        raise _Refused(401, "UNAUTHENTICATED", "Authentication required.") from None
    return call.session.cookie


def _logout(call: _Call) -> Any:
    assert call.session is not None
    call.simulator.sessions.end(call.session)


def _who(call: _Call) -> Any:
    session = call.session
    assert session is not None
    times = {"created_time": session.login_time.isoformat(), "last_accessed_time": now().isoformat()}
    return {"user": session.user.name, **times}


def _categories(call: _Call) -> Any:
    return list(call.simulator.tags.categories)


def _category(call: _Call, category_id: str) -> Any:
    call.object = category_id
    if category_id not in call.simulator.tags.categories:
        raise _Refused(404, "NOT_FOUND", f"there is no category {category_id}")
    return call.simulator.tags.categories[category_id].info()


def _tags(call: _Call) -> Any:
    return list(call.simulator.tags.tags)


def _tag(call: _Call, tag_id: str) -> Any:
    return call.tag(tag_id).info()


def _tags_of_category(call: _Call) -> Any:
    (category_id,) = call.fields("category_id")
    _category(call, str(category_id))
    return [tag.id for tag in call.simulator.tags.tags.values() if tag.category.id == category_id]


def _attached(call: _Call) -> Any:
    return [tag.id for tag in call.simulator.tags.of(call.machine(404))]


def _attach(call: _Call, tag_id: str) -> Any:
    tag = call.tag(tag_id)
    vm = call.machine(400)
    assert call.session is not None
    for privilege in (ATTACH, ATTACHABLE):
        if not call.session.user.may(privilege):
            raise _Refused(403, "UNAUTHORIZED", f"Unable to authorize user: {privilege}")
    call.simulator.tags.attach(tag, vm)
    call.changing = True


# (method, path, action) -> what does it, and the status of its answer
_ROUTES: list[tuple[str, str, str | None, Callable[..., Any], int]] = [
    ("POST", "/api/session", None, _login, 201),
    ("GET", "/api/session", None, _who, 200),
    ("DELETE", "/api/session", None, _logout, 204),
    ("POST", REST_SESSION, None, _login, 200),
    ("GET", REST_SESSION, None, _who, 200),
    ("POST", REST_SESSION, "get", _who, 200),
    ("DELETE", REST_SESSION, None, _logout, 200),
    ("GET", f"{TAGGING}/category", None, _categories, 200),
    ("GET", f"{TAGGING}/category/{{id}}", None, _category, 200),
    ("GET", f"{TAGGING}/tag", None, _tags, 200),
    ("POST", f"{TAGGING}/tag", "list-tags-for-category", _tags_of_category, 200),
    ("GET", f"{TAGGING}/tag/{{id}}", None, _tag, 200),
    ("POST", f"{TAGGING}/tag-association", "list-attached-tags", _attached, 200),
    ("POST", f"{TAGGING}/tag-association/{{id}}", "attach", _attach, 204),
]


def _route(call: _Call) -> tuple[str, Callable[..., Any], int, list[str]]:
    """The call's name in the log, what does it, its status, and the ids in its path."""
    # "/rest" tells the one from a field of the body by a tilde.
    action = call.query.get("~action" if call.old else "action", [None])[0]
    for method, path, wanted, function, status in _ROUTES:
        match = re.fullmatch(path.replace("{id}", "([^/]+)"), call.path)
        if match and method == call.handler.command and wanted == action:
            name = f"{method} {path}" + (f"?action={wanted}" if wanted else "")
            return name, function, status, list(match.groups())
    raise _Refused(404, "NOT_FOUND", f"there is no {call.handler.command} {call.path}")


def serve(handler: "Handler", body: bytes) -> None:
    call = _Call(handler, body)
    name, fault = f"{handler.command} {call.path}", None
    status, answer = 200, b""
    try:
        if not call.old and not call.simulator.settings.rest_api:
            raise _Refused(404, "NOT_FOUND")
        name, function, status, ids = _route(call)
        answer_is_lost = call.simulator.injector.apply("call", name, ids[0] if ids else None)
        if function is not _login:
            call.session = call.simulator.sessions.of_cookie(handler.headers.get(TOKEN), rest=True)
            if call.session is None:
                raise _Refused(401, "UNAUTHENTICATED", "Authentication required.")
        with call.simulator.lock:
            result = function(call, *ids)
        if answer_is_lost:
            raise DropConnection
        if call.old:
            result = {} if result is None else {"value": result}
        answer = b"" if status == 204 else json.dumps(result).encode()
    except (_Refused, NotEligible) as refused:
        kind = refused.kind if isinstance(refused, _Refused) else "INVALID_ARGUMENT"
        status = refused.status if isinstance(refused, _Refused) else 400
        fault = str(status)
        messages = [{"id": "simulator", "default_message": str(refused), "args": []}] if str(refused) else []
        error: dict[str, Any] = {"error_type": kind, "messages": messages}
        if call.old:
            names = {"NOT_FOUND": "not_found", "UNAUTHENTICATED": "unauthenticated", "UNAUTHORIZED": "unauthorized"}
            old_kind = f"com.vmware.vapi.std.errors.{names.get(kind, 'invalid_argument')}"
            error = {"type": old_kind, "value": {"messages": messages}}
        answer = json.dumps(error).encode()
    except DropConnection:
        fault = "drop"
        handler.close_connection = True
        raise
    except Exception as error:
        if not hasattr(error, "_wsdlName"):
            raise
        fault = error._wsdlName
        status = {"NoPermission": 403, "NotAuthenticated": 401}.get(fault, 500)
        answer = json.dumps({"error_type": "ERROR", "messages": []}).encode()
    finally:
        user = call.session.user.name if call.session is not None else None
        call.simulator.record_call(user, name, call.object, call.changing, fault)
    handler.answer(status, answer, "application/json")
