# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""``/folder``: files of datastores over HTTPS (VADP facts 50)."""

from __future__ import annotations

import base64
import binascii
import os
import re
import urllib.parse
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import storage
from .inventory import Datacenter, Datastore, VirtualMachine, datastore_of, disks_in
from .services import AuthenticationFailed, DropConnection, User

if TYPE_CHECKING:
    from .server import Handler

CHUNK = 1 << 20


class _Refused(Exception):
    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


def _user(handler: "Handler") -> User:
    session = handler.session()
    if session is not None:
        return session.user
    header = handler.headers.get("Authorization") or ""
    if header.lower().startswith("basic "):
        try:
            name, _unused, password = base64.b64decode(header[6:], validate=True).decode().partition(":")
            return handler.simulator.authenticate(name, password)
        except (AuthenticationFailed, binascii.Error, UnicodeDecodeError):
            pass
    raise _Refused(401, "401 Unauthorized\n", {"WWW-Authenticate": 'Basic realm="VMware HTTP server"'})


def _target(handler: "Handler", privilege: str) -> tuple[User, str]:
    """Who asks, and for which datastore path."""
    user = _user(handler)
    url = urllib.parse.urlsplit(handler.path)
    query = urllib.parse.parse_qs(url.query)
    simulator = handler.simulator
    if "dcPath" not in query:
        raise _Refused(404, "404 Not Found: dcPath is missing\n")
    name = query["dcPath"][0].strip("/")
    datacenter = next((one for one in simulator.inventory.all(Datacenter) if one.name == name), None)
    if datacenter is None:
        raise _Refused(404, f"404 Not Found: no datacenter {name}\n")
    if "dsName" not in query:
        names = "".join(f"<li>{escape(one.name)}</li>" for one in simulator.inventory.all(Datastore, datacenter))
        raise _Refused(200, f"<html><ul>{names}</ul></html>\n")
    wanted = query["dsName"][0]
    if not any(one.name == wanted for one in simulator.inventory.all(Datastore, datacenter)):
        raise _Refused(404, f"404 Not Found: no datastore {wanted}\n")
    if not user.may(privilege):
        raise _Refused(403, f"403 Forbidden: {privilege}\n")
    relative = urllib.parse.unquote(url.path[len("/folder") :]).strip("/")
    if ".." in relative.split("/"):
        raise _Refused(400, "400 Bad Request\n")
    return user, f"[{wanted}] {relative}"


def _is_extent(path: str) -> bool:
    return bool(re.search(r"-(flat|delta)\.vmdk$", path))


def _owner(handler: "Handler", path: str) -> VirtualMachine | None:
    """The VM that a raw extent belongs to, by its current disks or those of its snapshots."""
    descriptor = re.sub(r"-(flat|delta)\.vmdk$", ".vmdk", path)
    with handler.simulator.lock:
        for vm in handler.simulator.inventory.all(VirtualMachine):
            configs = [vm.config, *(snapshot.config for snapshot in vm.snapshots)]
            for config in configs:
                for disk in disks_in(config.hardware.device):
                    if descriptor in vm.chain(disk.backing.fileName):
                        return vm
    return None


def _refuse_running(handler: "Handler", path: str) -> None:
    """Raw extents of a running VM can't be had, snapshot or not."""
    if not _is_extent(path):
        return
    vm = _owner(handler, path)
    if vm is not None and vm.powered_on:
        raise _Refused(500, f"500 Internal Server Error: {path} is locked by {vm.name}\n")


def _log(handler: "Handler", user: User | None, path: str, changing: bool, fault: str | None) -> None:
    handler.simulator.record_call(user.name if user else None, f"{handler.command} /folder", path, changing, fault)


def _guarded(handler: "Handler", privilege: str, work: Any, changing: bool) -> None:
    user, path = None, handler.path
    try:
        user, path = _target(handler, privilege)
        handler.simulator.injector.apply("call", f"{handler.command} /folder", path)
        work(handler, path)
        _log(handler, user, path, changing, None)
    except _Refused as refused:
        _log(handler, user, path, False, None if refused.status == 200 else str(refused.status))
        if handler.command == "PUT":
            for _unused in handler.chunks():
                pass  # a client that still sends would see a reset connection instead of the answer
        handler.text(refused.status, str(refused), refused.headers)
    except DropConnection:
        handler.close_connection = True
        raise
    except Exception as error:
        if not hasattr(error, "_wsdlName"):
            raise
        _log(handler, user, path, False, error._wsdlName)
        handler.close_connection = True
        handler.text(500, f"500 Internal Server Error: {error._wsdlName}\n")


def serve(handler: "Handler") -> None:
    _guarded(handler, "Datastore.Browse", _get, changing=False)


def store(handler: "Handler") -> None:
    _guarded(handler, "Datastore.FileManagement", _put, changing=True)


def _get(handler: "Handler", path: str) -> None:
    simulator = handler.simulator
    kind = next(one.kind for one in simulator.inventory.all(Datastore) if one.name == datastore_of(path))
    try:
        local = simulator.storage.local_path(path)
    except storage.NotFound:
        raise _Refused(404, "404 Not Found\n") from None
    if local.is_dir():
        names = "".join(
            f'<li><a href="{escape(one.rsplit("/", 1)[-1])}">{escape(one)}</a> {size}</li>'
            for one, size in simulator.storage.list_files(path)
        )
        handler.answer(200, f"<html><ul>{names}</ul></html>\n".encode(), "text/html; charset=utf-8")
        return
    if not local.is_file() or (kind.lower() in ("vsan", "vvol") and _is_extent(path)):
        raise _Refused(404, "404 Not Found\n")
    _refuse_running(handler, path)
    with open(local, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        ranges = simulator.settings.folder_ranges  # some servers ignore them
        start, length, partial = _range(handler.headers.get("Range") if ranges else None, size)
        handler.send_response(206 if partial else 200)
        handler.send_header("Content-Type", "application/octet-stream")
        if ranges:
            handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(length))
        if partial:
            handler.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{size}")
        handler.end_headers()
        if handler.command == "HEAD":
            return
        stream.seek(start)
        if length > 1 and simulator.settings.take("folder_cuts"):
            handler.wfile.write(stream.read(min(length // 2, CHUNK)))
            raise DropConnection
        while length:
            data = stream.read(min(length, CHUNK))
            if not data:
                handler.close_connection = True
                return
            handler.wfile.write(data)
            length -= len(data)


def _range(header: str | None, size: int) -> tuple[int, int, bool]:
    """(start, length, partial) of a Range header; one range only, as the server does it."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d*)-(\d*)\s*", header or "")
    if match is None or match.group(1) == match.group(2) == "":
        return 0, size, False
    first, last = match.groups()
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    if start >= size or end <= start:
        raise _Refused(416, "416 Requested Range Not Satisfiable\n", {"Content-Range": f"bytes */{size}"})
    return start, end - start, True


def _put(handler: "Handler", path: str) -> None:
    simulator = handler.simulator
    _refuse_running(handler, path)
    if path.endswith(".vmdk"):
        raise _Refused(403, "403 Forbidden: disks are made through the API\n")
    try:
        local = simulator.storage.local_path(path)
    except storage.NotFound:
        raise _Refused(404, "404 Not Found\n") from None
    if local.is_dir():
        raise _Refused(400, "400 Bad Request: that is a folder\n")
    try:
        # vCenter makes the folders that are missing.
        local.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise _Refused(400, "400 Bad Request: a file is in the way\n") from None
    existed = local.exists()
    temporary: Path = local.with_name(f".{local.name}.upload")
    try:
        with open(temporary, "wb") as stream:
            for piece in handler.chunks():
                stream.write(piece)
        os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)
    simulator.changed()
    handler.text(200 if existed else 201, "")
