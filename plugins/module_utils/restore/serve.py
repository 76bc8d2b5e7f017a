# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point served by NBD for a while, to tools that are not ours, beyond the end of the module.

One qemu-nbd a disk, under a shell that clears up when they have ended; coreutils' timeout ends each. Who serves at a
place holds the lock ``<place>.lock``, by a descriptor that the shell and all its children inherit: as long as one of
them lives, the kernel says so, whatever was killed. What is served stands in ``<place>/serving.json``, written before
the start, so that a rerun finds it: the same and whole, it stays; anything else of it is ended and begun again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import json
import os
import shlex
import shutil
import signal
import stat
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Optional, Sequence
from urllib.parse import quote

from ..datapath.files import nameless
from ..datapath.image import atomic_write, create_overlay, layer_opts, overlay_opts
from ..datapath.processes import is_listening, require_program, start_detached
from ..errors import DamagedError, DataPathError, InputError, check_range
from ..named import FILE, FOLDER, path_problem
from ..repository.layout import Repository
from ..repository.store import VmStore
from ..repository.shapes import format_time, parse_time
from ..repository.verify import missing_problems
from ..transport.vddk import private_folder
from .point import require_disks

PRESENT = "present"
ABSENT = "absent"
STATES = (PRESENT, ABSENT)
CERTIFICATES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")

_READY_SECONDS = 60.0
_END_SECONDS = 10.0
_LOOK_SECONDS = 0.02
_SOCKET_BYTES = 107
_CONNECTIONS = 16
_RECORD = "serving.json"


@dataclass(frozen=True)
class ServeRequest:
    """The options of ``restore_point_serve``."""

    repository: str
    vm_uuid: Optional[str] = None
    vm_name: Optional[str] = None
    point: str = "latest"
    state: str = PRESENT
    disks: Sequence[int] = ()
    socket_dir: Optional[str] = None
    address: Optional[str] = None
    port: int = 10809
    tls_certificates: Optional[str] = None
    tls_verify_client: bool = True
    writable_overlay: bool = False
    overlay_dir: str = "/var/tmp"
    timeout: int = 3600

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> ServeRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        request = cls(**{name: params[name] for name in cls.__dataclass_fields__})
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: an option makes no sense; nothing was touched."""
        check_range("timeout", self.timeout, 1, 30 * 86400)
        for name in ("socket_dir", "tls_certificates", "overlay_dir"):
            path = getattr(self, name)
            if path is not None and not os.path.isabs(path):
                raise InputError(
                    f"The option {name} is not an absolute path", subject=path, remedy="Give the whole path"
                )
        if self.address is None:
            return
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            raise InputError(
                "The option address is not an IP address",
                subject=self.address,
                remedy="Give an address of this machine that the server listens on",
            ) from None
        check_range("port", self.port, 1, 65535)

    @property
    def host(self) -> str:
        """The address as a URI has it."""
        return f"[{self.address}]" if ":" in str(self.address) else str(self.address)


class _Place:
    """Where something is served, and who serves there."""

    def __init__(self, store: VmStore, request: ServeRequest) -> None:
        if request.address is not None:
            name = f"tcp {request.host}:{request.port}"
        elif request.socket_dir is not None:
            name = f"unix {os.path.realpath(request.socket_dir)}"
        else:
            name = f"vm {store.repository.id} {store.uuid}"
        self.base = private_folder("openvadp-serve", "The folder of what is served")
        self.folder = self.base / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        self.sockets = Path(request.socket_dir or self.folder)
        self.lock_path = self.base / f"{self.folder.name}.lock"
        self.pid_path = self.folder / "pid"

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Held by who starts and stops, so that no two do at once."""
        descriptor = os.open(str(self.base / "changing"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def take(self) -> Optional[int]:
        """The lock's descriptor; None: somebody serves here."""
        descriptor = os.open(str(self.lock_path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            return None
        return descriptor

    def served(self) -> bool:
        descriptor = self.take()
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def record(self) -> Optional[Dict[str, Any]]:
        """What is served here, if that can be read."""
        try:
            found = json.loads((self.folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def whole(self, record: Dict[str, Any]) -> bool:
        """Whether each disk of the record is served still, by its server's own number."""
        try:
            group = int(self.pid_path.read_text(encoding="ascii"))
            for number, disk in enumerate(record["disks"]):
                if os.getpgid(int(self.ready_path(number).read_text(encoding="ascii"))) != group:
                    return False
                if disk["socket"] and not is_listening(str(disk["socket"])):
                    return False
        except (OSError, ValueError):
            return False
        return True

    def ready_path(self, number: int) -> Path:
        """Where the server of a disk writes its number when it can serve."""
        return self.folder / f"ready-{number}"

    def end(self) -> None:
        """End who serves here, and clear up behind it.

        :raises DataPathError: it does not end.
        """
        begun = time.monotonic()
        while True:
            descriptor = self.take()
            if descriptor is not None:
                break
            waited = time.monotonic() - begun
            if waited > 2 * _END_SECONDS:
                raise DataPathError(
                    "A server does not end", subject=str(self.folder), remedy="End it by its processes' numbers"
                )
            # The number is written by the server itself; the lock says that its process group is still there.
            with contextlib.suppress(OSError, ValueError):
                group = int(self.pid_path.read_text(encoding="ascii"))
                os.killpg(group, signal.SIGTERM if waited < _END_SECONDS else signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)
        try:
            self._clear()
        finally:
            os.close(descriptor)

    def _clear(self) -> None:
        record = self.record() or {}
        for path in _sockets(record):
            _remove_socket(path)
        shutil.rmtree(str(self.folder), ignore_errors=True)


def _remove_socket(path: str) -> None:
    """Remove a socket that nobody listens on; anything else stays."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not is_listening(path):
            os.unlink(path)


def serve_point(request: ServeRequest, check_mode: bool) -> Dict[str, Any]:
    """See that a point is served, or that nothing is (``state: absent``).

    :returns: {changed, state, point, disks, ends, seconds_left, writable}.
    """
    store = Repository.open(request.repository).find_vm(vm_uuid=request.vm_uuid, vm_name=request.vm_name)
    place = _Place(store, request)
    with place.changing():
        if request.state == ABSENT:
            return _end(place, check_mode)
        return _begin(place, store, request, check_mode)


def _end(place: _Place, check_mode: bool) -> Dict[str, Any]:
    record = place.record()
    there, served = place.folder.exists(), place.served()
    if not check_mode and (served or there):
        place.end()
    return {
        # A server removes its folder last: without one it has ended by itself, though its process may still be seen.
        "changed": served and there,
        "state": ABSENT,
        "point": None if record is None else record.get("point"),
        "disks": [],
        "ends": None,
        "seconds_left": 0,
        "writable": False,
    }


def _begin(place: _Place, store: VmStore, request: ServeRequest, check_mode: bool) -> Dict[str, Any]:
    manifest = store.resolve(request.point)
    disks = _wanted(manifest, request, store)
    _require_there(store, manifest, disks)
    record = place.record()
    if place.served() and record is not None:
        wanted = _identity(store, request, manifest, disks)
        if record.get("identity") == wanted and place.whole(record):
            return _result(record, changed=False)
        if record.get("identity") != wanted:
            raise InputError(
                "Something else is served there",
                subject=f"point {record.get('point')} of VM {record.get('vm_uuid')}, until {record.get('ends')}",
                reason="a user of it may be at work, and what is written to an overlay would be lost",
                remedy="End it with state: absent, or choose another socket_dir or port",
            )
    record = _plan(place, store, request, manifest, disks, _sockets(record))
    if check_mode:
        return _result(record, changed=True)
    place.end()
    _start(place, store, request, record)
    return _result(record, changed=True)


def _wanted(manifest: Dict[str, Any], request: ServeRequest, store: VmStore) -> List[Dict[str, Any]]:
    require_disks(store, manifest, request.disks)
    return [disk for disk in manifest["disks"] if not request.disks or disk["key"] in request.disks]


def _require_there(store: VmStore, manifest: Dict[str, Any], disks: List[Dict[str, Any]]) -> None:
    problems = missing_problems(store, dict(manifest, disks=disks))
    if problems:
        raise DamagedError(
            "The restore point is damaged, and is not served",
            subject=f"{manifest['point']} of {store.shown}",
            reason="; ".join(problem.rstrip(". ") for problem in problems),
            remedy="Use another point, and see restore_point_verify",
        )


def _identity(
    store: VmStore, request: ServeRequest, manifest: Dict[str, Any], disks: List[Dict[str, Any]]
) -> Dict[str, Any]:
    """What must be the same for a server to stay."""
    return {
        "repository": str(store.repository.path),
        "vm_uuid": store.uuid,
        "manifest": manifest["manifest_blake3"],
        "keys": [disk["key"] for disk in disks],
        "writable": request.writable_overlay,
        "tls": request.tls_certificates,
        "tls_verify_client": request.tls_verify_client,
    }


def _sockets(record: Optional[Dict[str, Any]]) -> List[str]:
    return [str(disk["socket"]) for disk in (record or {}).get("disks") or [] if disk.get("socket")]


def _plan(
    place: _Place,
    store: VmStore,
    request: ServeRequest,
    manifest: Dict[str, Any],
    disks: List[Dict[str, Any]],
    ours: List[str],
) -> Dict[str, Any]:
    """What is going to be served, and where; all that can be refused is refused here."""
    for program in ("qemu-nbd", "timeout"):
        require_program(program)
    served = []
    for number, disk in enumerate(disks):
        entry = {name: disk[name] for name in ("key", "label", "capacity_bytes")}
        if request.address is None:
            path = str(place.sockets / f"disk-{disk['key']}.sock")
            entry.update(socket=path, uri="nbd+unix:///?socket=" + quote(path))
        else:
            entry.update(socket=None, uri=f"nbds://{request.host}:{request.port + number}")
        served.append(entry)
    if request.address is None:
        _require_socket_places(request, served, ours)
    else:
        _require_tls(request, len(served))
    problem = path_problem(request.overlay_dir, FOLDER, write=True) if request.writable_overlay else None
    if problem is not None:
        raise InputError(
            "No overlay can be made there",
            subject=request.overlay_dir,
            reason=problem,
            remedy="Name another overlay_dir",
        )
    return {
        "point": manifest["point"],
        "vm_uuid": store.uuid,
        "identity": _identity(store, request, manifest, disks),
        "ends": format_time(datetime.now(timezone.utc) + timedelta(seconds=request.timeout)),
        "writable": request.writable_overlay,
        "disks": served,
    }


def _require_socket_places(request: ServeRequest, served: List[Dict[str, Any]], ours: List[str]) -> None:
    problem = path_problem(request.socket_dir, FOLDER) if request.socket_dir is not None else None
    if problem is not None:
        raise InputError(
            "There is no folder for the sockets", subject=request.socket_dir, reason=problem, remedy="Make it first"
        )
    for disk in served:
        path = str(disk["socket"])
        if len(os.fsencode(path)) > _SOCKET_BYTES:
            raise InputError(
                "The path of a socket is too long",
                subject=path,
                reason=f"{len(os.fsencode(path))} bytes, {_SOCKET_BYTES} are possible",
                remedy="Choose a socket_dir with a shorter path",
            )
        if path in ours or not os.path.lexists(path):
            continue
        if not stat.S_ISSOCK(os.lstat(path).st_mode) or is_listening(path):
            raise InputError(
                "There is something at a socket's place",
                subject=path,
                reason="somebody listens on it" if is_listening(path) else "it is not a socket",
                remedy="Choose another socket_dir",
            )


def _require_tls(request: ServeRequest, count: int) -> None:
    if request.tls_certificates is None:
        raise InputError(
            "A restore point is served over TCP with TLS only",
            subject=f"{request.host}:{request.port}",
            reason="its disks would cross the network in the clear, for everybody",
            remedy="Give tls_certificates, or serve on a Unix socket",
        )
    if request.port + count - 1 > 65535:
        raise InputError("There are not enough ports", subject=f"{count} from {request.port} on")
    problems = {name: path_problem(os.path.join(request.tls_certificates, name), FILE) for name in CERTIFICATES}
    if any(problems.values()):
        raise InputError(
            "The folder of certificates is not complete",
            subject=request.tls_certificates,
            reason="; ".join(f"{name}: {problem}" for name, problem in problems.items() if problem is not None),
            remedy="Put the certificate authority, the server's certificate and its key there, under these names",
        )


def _start(place: _Place, store: VmStore, request: ServeRequest, record: Dict[str, Any]) -> None:
    lock = place.take()
    if lock is None:
        raise DataPathError("Somebody has begun to serve there meanwhile", subject=str(place.folder), retryable=True)
    begun = False
    overlays: List[int] = []
    try:
        place.folder.mkdir(mode=0o700)
        atomic_write(str(place.folder / _RECORD), json.dumps(record), mode=0o600)
        commands = []
        for number, disk in enumerate(record["disks"]):
            overlay = None
            if request.writable_overlay:
                overlay = nameless(request.overlay_dir, "openvadp-serve-")
                overlays.append(overlay)
            command = _command(place, store, request, record, number, overlay)
            commands.append(f"timeout --foreground -k 10 {request.timeout} {shlex.join(command)} &")
            if disk["socket"]:
                _remove_socket(disk["socket"])
        script = _script(place, record, commands)
        os.set_inheritable(lock, True)
        log_path = str(place.folder / "log")
        # Held open: a server that ends at once removes its folder, and what it said must not go with it.
        with open(log_path, "x+", encoding="utf-8", errors="replace") as log:
            server = start_detached(["/bin/sh", "-c", script], log_path=log_path, pass_fds=(lock, *overlays))
            _wait_until_ready(place, server, len(commands), log)
        begun = True
    except OSError as error:
        raise DataPathError("The point can't be served", subject=str(place.folder), reason=error.strerror) from None
    finally:
        # The servers have the overlays open: without names, they vanish with them, however those end.
        for descriptor in (lock, *overlays):
            os.close(descriptor)
        if not begun:
            place.end()


def _command(
    place: _Place,
    store: VmStore,
    request: ServeRequest,
    record: Dict[str, Any],
    number: int,
    overlay: Optional[int],
) -> List[str]:
    disk = record["disks"][number]
    layer = str(store.layer_path(disk["key"], record["point"]))
    command = ["qemu-nbd", "--persistent", f"--shared={_CONNECTIONS}", f"--pid-file={place.ready_path(number)}"]
    command += [f"--description={disk['label']} of restore point {record['point']}"]
    if request.address is None:
        command.append(f"--socket={disk['socket']}")
    else:
        verify = "on" if request.tls_verify_client else "off"
        folder = str(request.tls_certificates).replace(",", ",,")
        command += [f"--bind={request.address}", f"--port={request.port + number}", "--tls-creds=tls0"]
        command += ["--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={folder},verify-peer={verify}"]
    if overlay is not None:
        create_overlay(f"/proc/{os.getpid()}/fd/{overlay}", disk["capacity_bytes"])
        options = overlay_opts(layer, f"/proc/self/fd/{overlay}")
        command += ["--cache=writeback", "--discard=unmap", "--image-opts", options]
    else:
        command += ["--read-only", "--image-opts", layer_opts(layer)]
    return command


def _script(place: _Place, record: Dict[str, Any], commands: List[str]) -> str:
    folder, pid = shlex.quote(str(place.folder)), shlex.quote(str(place.pid_path))
    sockets = [shlex.quote(disk["socket"]) for disk in record["disks"] if disk["socket"]]
    lines = ["umask 077", f"echo $$ >{pid}.new && mv {pid}.new {pid}", *commands, "wait"]
    if sockets:
        lines.append(f"rm -f -- {' '.join(sockets)}")
    return "\n".join([*lines, f"rm -rf -- {folder}"])


def _wait_until_ready(place: _Place, server: Any, count: int, log: IO[str]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not all(place.ready_path(number).exists() for number in range(count)):
        ended = server.poll() is not None
        log.seek(0)
        words = "; ".join(log.read().splitlines()[-5:])
        # One that ends says why; the others would go on.
        if ended or "qemu-nbd: " in words:
            raise DataPathError(
                "The point can't be served", subject=str(place.folder), reason=words or "the server ended at once"
            )
        if time.monotonic() > deadline:
            raise DataPathError(
                "The point is not served in time",
                subject=str(place.folder),
                reason=f"not ready after {_READY_SECONDS:g} s",
                retryable=True,
            )
        time.sleep(_LOOK_SECONDS)


def _result(record: Dict[str, Any], changed: bool) -> Dict[str, Any]:
    left = (parse_time(record["ends"]) - datetime.now(timezone.utc)).total_seconds()
    return {
        "changed": changed,
        "state": PRESENT,
        "point": record["point"],
        "disks": [{name: disk[name] for name in ("key", "label", "capacity_bytes", "uri")} for disk in record["disks"]],
        "ends": record["ends"],
        "seconds_left": max(0, int(left)),
        "writable": record["writable"],
    }
