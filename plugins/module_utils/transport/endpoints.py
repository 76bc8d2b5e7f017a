# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A disk of a VM as an NBD endpoint on a private Unix socket: one nbdkit for each disk."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional, Sequence
from urllib.parse import quote

from ..datapath.processes import Child, RuntimeDir
from ..errors import DataPathError, TransportError, VadpError
from ..libraries import nbd
from .vddk import Vddk, numbers, temporary_folder, thumbprints_to_try, write_config
from .vix_errors import decode_log, last_error_line, may_be_thumbprint

if TYPE_CHECKING:
    from ..vsphere.inventory import VmRef
    from ..vsphere.session import Session

#: VADP facts 24: what VDDK's modes over the LAN can compress with.
WIRE_COMPRESSIONS = ("none", "zlib", "fastlz", "skipz")
LAN_MODES = ("nbdssl", "nbd")
# VADP facts 5: with plugins up to 1.42 each question about the allocation costs about a second, whatever its length.
# NBD takes less than 4 GiB.
_STATUS_BYTES = 3 << 30
_COMPRESSION_FROM_PLUGIN = (1, 24)

_START_TIMEOUT = 60
_STOP_TIMEOUT = 10
_NOTICE_TIMEOUT = 2.0
_NOTICE_POLL_SECONDS = 0.02
# What closing a hot-added disk may take, which vCenter detaches from the proxy meanwhile.
_DETACH_TIMEOUT = 120
# A layer of nbdkit (plugin or filter) begins to open the disk; has it open, or not; begins to close it.
_OPENING = re.compile(r": debug: \S+: open readonly=")
_OPENED = re.compile(r": debug: \S+: open returned handle (0x)?")
_CLOSED = re.compile(r": debug: \S+: close$", re.MULTILINE)
_LOG_TAIL_BYTES = 256 * 1024
_LOG_TAIL_LINES = 20
_ENDING_SECONDS = 0.5
_POLL_MS = 100
# 1 + 2 + 4 + 8 s: as long as a host takes that leaves vCenter's choice, and a cut that heals by itself.
_OPEN_RETRIES = 4

# nbdkit asks for SIGTERM at its parent's death, in place of the SIGKILL that Child asked for, and after a SIGTERM it
# waits for requests that VDDK does not end. So a guard in its process group waits for the end of a pipe that only we
# hold open, and kills the group some seconds later; a line through the pipe says that it is not needed any more. It
# outlives the SIGTERM to its group, from its first moment on: we may die between that and nbdkit's end. $1 is the pipe,
# $2 the seconds.
_GUARDED = (
    'trap "" TERM; (read -r line || { sleep "$2"; kill -s KILL -- "-$$"; })'
    ' <"/proc/self/fd/$1" >/dev/null 2>&1 & trap - TERM; shift 2; exec "$@"'
)
#: So long at most does a server outlive a module that was killed.
GUARD_SECONDS = 3

_numbers = itertools.count(1)


@dataclass
class Endpoint:
    """A disk that is being served.

    :param uri: for libnbd and qemu.
    :param transport: the mode that is really used.
    :param log_path: nbdkit's and VDDK's log, mode 0600, gone with the runtime folder.
    :param size_bytes: the size of the disk as it is served.
    :param method: how the transport is done: ``vddk``, ``proxy_hotadd``, ``folder``, ``export_lease``.
    :param copy_options: how the copier should ask this server: keywords of :func:`..datapath.copier.copy`.
    """

    uri: str
    transport: str
    log_path: Path
    size_bytes: int
    subject: str
    child: Child = field(repr=False)
    method: str = ""
    copy_options: Dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """:raises TransportError: the server died; the reason is read from its log."""
        if not self.child.alive:
            raise _log_error("The server of the disk's data has ended", self.subject, self.log_path)

    def explain(self, error: VadpError) -> VadpError:
        """What VDDK's log says of an I/O error, of which NBD tells nothing but EIO (VADP facts 47).

        :returns: a TransportError where the log has a reason, else *error* itself.
        """
        known = decode_log(_tail(self.log_path)) is not None
        # Its sockets close before it has ended.
        returncode = self.child.returncode if known else self.child.wait(_ENDING_SECONDS)
        if returncode is None and not known:
            return error
        ending = f"signal {-returncode}" if returncode is not None and returncode < 0 else f"status {returncode}"
        better = _log_error(error.what, self.subject, self.log_path, fallback=f"nbdkit ended with {ending}")
        if not known:
            # A server that died of nothing that VDDK knows of may live the next time.
            better.retryable = True
            better.remedy = "Run again; if it happens again, look at the system's log for what ended nbdkit"
        better.details["error"] = error.to_result()
        return better


@contextlib.contextmanager
def open_vddk(
    session: Session,
    vm: VmRef,
    *,
    file: str,
    snapshot_moid: Optional[str],
    transports: Sequence[str],
    writable: bool,
    vddk: Vddk,
    nfc_port: int,
    run_dir: RuntimeDir,
    io_timeout: int,
    san_devices: Sequence[str] = (),
    wire_compression: str = "none",
    allocation: bool = False,
) -> Iterator[Endpoint]:
    """Serve one disk through VDDK; the disk is opened once before this returns, so that errors surface here.

    The thread that opens an endpoint must live as long as it (see :func:`serve_nbdkit`). Open a disk only when its
    copy begins (VADP facts 22).

    :param file: the datastore path, verbatim: with a snapshot that of the snapshot's own configuration, for writing
        that of the VM's current leaf (VADP facts 14, 40).
    :param snapshot_moid: the snapshot that is read; None for a VM without snapshots.
    :param transports: the modes that are allowed, the preferred one first.
    :param io_timeout: seconds; bounds the open, a request and all its retries together.
    :param san_devices: the devices that mode san may open.
    :param wire_compression: of what crosses the LAN, see :data:`WIRE_COMPRESSIONS`; other modes don't know it.
    :param allocation: the disk is asked for what is allocated, a second a question (VADP facts 5); else all is data.
    :raises TransportError: the disk can't be opened (thumbprint, port 902, credentials, licence, ...), or VDDK uses
        a mode that is not in *transports* (VADP facts 42).
    """
    folder = Path(run_dir.path)
    config = folder / f"vddk-{next(_numbers)}.conf"
    write_config(config, vddk=vddk, io_timeout=io_timeout, tmp_folder=temporary_folder(), san_devices=san_devices)
    connection = session.connection
    secrets = {"password": connection.password}

    def serve(thumbprint: str) -> ContextManager[Endpoint]:
        argv = vddk_argv(
            config=config,
            server=connection.hostname,
            port=connection.port,
            user=connection.username,
            thumbprint=thumbprint,
            vm_moid=vm.moid,
            file=file,
            snapshot_moid=snapshot_moid,
            transports=transports,
            writable=writable,
            vddk=vddk,
            nfc_port=nfc_port,
            io_timeout=io_timeout,
            wire_compression=wire_compression,
            allocation=allocation,
        )
        return serve_nbdkit(argv, subject=file, run_dir=run_dir, io_timeout=io_timeout, secrets=secrets)

    try:
        with contextlib.ExitStack() as stack:
            endpoint = _open_with_either(stack, serve, thumbprints_to_try(session.thumbprints))
            mode = mode_used(_read(endpoint.log_path))
            if mode not in transports:
                raise TransportError(
                    "VDDK does not use the transport that was asked for",
                    subject=file,
                    reason=f"it uses {mode or 'one that its log does not name'}, allowed is {', '.join(transports)}",
                    remedy="Allow that transport, or make the other one work on this machine",
                )
            endpoint.transport, endpoint.method = str(mode), "vddk"
            endpoint.copy_options = {"status_bytes": _STATUS_BYTES}
            yield endpoint
    finally:
        config.unlink()


def _open_with_either(
    stack: contextlib.ExitStack, serve: Callable[[str], ContextManager[Endpoint]], thumbprints: Sequence[str]
) -> Endpoint:
    """The endpoint by the first thumbprint that VDDK takes; where it takes none, the error of the first."""
    first: Optional[TransportError] = None
    for thumbprint in thumbprints:
        try:
            return stack.enter_context(serve(thumbprint))
        except TransportError as error:
            finding = error.details.get("finding")
            if finding is None or not may_be_thumbprint(finding["cause"]):
                raise
            first = first or error
    if first is None:
        raise RuntimeError("there is no thumbprint to try")
    raise first


@contextlib.contextmanager
def serve_nbdkit(
    arguments: Sequence[str],
    *,
    subject: str,
    run_dir: RuntimeDir,
    io_timeout: int,
    transport: str = "",
    method: str = "",
    secrets: Optional[Mapping[str, str]] = None,
) -> Iterator[Endpoint]:
    """Run one nbdkit on a private socket; its disk is opened once before this returns, so that errors surface here.

    The thread that opens an endpoint must live as long as it: nbdkit ends with the thread that started it
    (VADP facts 45), and a few seconds after the death of this process at the latest.

    :param arguments: what follows the options that every nbdkit of ours gets: filters, the plugin, its parameters.
    :param subject: the disk, for messages.
    :param transport, method: of the endpoint, where they are known before.
    :param secrets: parameters of the plugin that it takes as ``name=-FD``: they go through pipes, never into an
        argument, an environment or a file (VADP facts 41).
    :raises TransportError: it does not start, or the disk can't be opened; the reason is read from its log.
    """
    name = f"disk-{next(_numbers)}"
    socket, log = Path(run_dir.path) / f"{name}.sock", Path(run_dir.path) / f"{name}.log"
    with contextlib.ExitStack() as handed_over:
        argv = ["nbdkit", "--foreground", "--unix", str(socket), "--verbose", *arguments]
        guard_fd, our_end = os.pipe()
        pass_fds = [guard_fd]
        handed_over.callback(os.close, guard_fd)
        try:
            for parameter, secret in (secrets or {}).items():
                pass_fds.append(_secret_pipe(parameter, secret))
                handed_over.callback(os.close, pass_fds[-1])
                argv.append(f"{parameter}=-{pass_fds[-1]}")
            guarded = ["sh", "-c", _GUARDED, "sh", str(guard_fd), str(GUARD_SECONDS), *argv]
            child = Child.start(guarded, log_path=str(log), name=f"nbdkit of {subject}", pass_fds=pass_fds)
        except BaseException:
            os.close(our_end)
            raise
    try:
        try:
            child.wait_for_socket(str(socket), _START_TIMEOUT)
        except DataPathError as error:
            raise _log_error("The server of the disk's data did not start", subject, log) from error
        size = _first_connection(child, socket, subject, log, io_timeout)
        yield Endpoint(f"nbd+unix:///?socket={quote(str(socket))}", transport, log, size, subject, child, method)
    finally:
        try:
            child.stop(_time_to_end(child, log))
            with contextlib.suppress(BrokenPipeError):  # the guard was killed with its group
                os.write(our_end, b"\n")
        finally:
            os.close(our_end)


def vddk_argv(
    *,
    config: Path,
    server: str,
    port: int,
    user: str,
    thumbprint: str,
    vm_moid: str,
    file: str,
    snapshot_moid: Optional[str],
    transports: Sequence[str],
    writable: bool,
    vddk: Vddk,
    nfc_port: int,
    io_timeout: int,
    wire_compression: str = "none",
    allocation: bool = False,
) -> List[str]:
    """The arguments of an nbdkit for VDDK, but for the password.

    Filters, the client's side first: `retry` reopens the disk after an error (a handle whose connection was cut stays
    dead); `blocksize` keeps requests below what exhausts a host's memory, and on sectors (VADP facts 23);
    `cacheextents` remembers the last answer about the allocation; with `noextents` nobody asks, not even nbdkit, which
    does at each connection (VADP facts 5, 46).
    """
    # A line for each request would fill the disk with log.
    argv = ["-D", "nbdkit.backend.datapath=0", "-D", "vddk.datapath=0"]
    if not writable:
        argv.append("--readonly")
    argv += ["--filter=retry", "--filter=blocksize", f"--filter={'cacheextents' if allocation else 'noextents'}"]
    argv += ["vddk", f"libdir={vddk.libdir}", f"config={config}"]
    argv += [f"server={server}", f"port={port}", f"user={user}", f"thumbprint={thumbprint}"]
    argv += [f"vm=moref={vm_moid}", f"file={file}", f"transports={':'.join(transports)}"]
    if snapshot_moid is not None:
        argv.append(f"snapshot={snapshot_moid}")
    if writable and "hotadd" in transports:
        # What is written must be on the datastore, not in a cache of this machine, when the disk is detached.
        argv.append("unbuffered=true")
    if vddk.has_nfc_port:
        argv.append(f"nfchostport={nfc_port}")
    elif nfc_port != 902:
        raise TransportError(
            "The port of the ESXi hosts can't be chosen",
            reason=f"nbdkit's VDDK plugin {vddk.plugin} has no parameter nfchostport",
            remedy="Leave nfc_port at 902, or install a newer plugin",
        )
    if wire_compression != "none" and set(transports) <= set(LAN_MODES):
        if numbers(vddk.plugin) < _COMPRESSION_FROM_PLUGIN:
            raise TransportError(
                "What crosses the LAN can't be compressed",
                reason=f"nbdkit's VDDK plugin {vddk.plugin} has no parameter compression",
                remedy="Leave wire_compression at none, or install nbdkit 1.24 or newer",
            )
        argv.append(f"compression={wire_compression}")
    return argv + ["minblock=512", "maxdata=2M", f"retries={retries_within(io_timeout)}", "retry-delay=1"]


def retries_within(io_timeout: int) -> int:
    """How often a request is retried, so that all waits together (1, 2, 4, ... s) take at most half of *io_timeout*."""
    return max(1, int(math.log2(io_timeout / 2 + 1)))


def mode_used(log_text: str) -> Optional[str]:
    """The transport mode that the plugin's debug log names last (VADP facts 42)."""
    found = re.findall(r"debug: transport mode: (\S+)", log_text)
    return found[-1] if found else None


def _first_connection(child: Child, socket: Path, subject: str, log: Path, timeout: int) -> int:
    """Open the disk once and return its size. What may pass by itself is tried again (VADP facts 19).

    With each open vCenter chooses the serving host again: one that enters maintenance mode is not chosen again.
    """
    deadline = time.monotonic() + timeout
    for retry in range(min(_OPEN_RETRIES, retries_within(timeout))):
        try:
            return _open_once(child, socket, subject, log, timeout, deadline)
        except TransportError as error:
            pause = 2**retry
            if not error.retryable or not child.alive or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
    return _open_once(child, socket, subject, log, timeout, deadline)


def _open_once(child: Child, socket: Path, subject: str, log: Path, timeout: int, deadline: float) -> int:
    """Asynchronously, because an open that hangs must not hang us."""
    handle = nbd.NBD()
    try:
        handle.aio_connect_unix(str(socket))
        while not handle.aio_is_ready():
            if handle.aio_is_dead() or handle.aio_is_closed() or not child.alive:
                raise _log_error("The disk can't be opened", subject, log)
            if time.monotonic() > deadline:
                raise _log_error(f"The disk was not opened within {timeout} s", subject, log)
            handle.poll(_POLL_MS)
        size = int(handle.get_size())
        handle.shutdown()
        return size
    except nbd.Error as error:
        raise _log_error("The disk can't be opened", subject, log, fallback=str(error)) from error


def _time_to_end(child: Child, log: Path) -> int:
    """Wait until nbdkit has begun to close what it opened, for a short while at most. Returns the seconds it then gets.

    nbdkit notices in a thread that a client has gone. If SIGTERM overtakes that thread, nbdkit ends without closing,
    and VDDK's HotAdd leaves the disk attached to the proxy. Closing that has begun is finished before nbdkit ends. An
    opening that hangs is not waited for.
    """
    deadline = time.monotonic() + _NOTICE_TIMEOUT
    while child.alive and time.monotonic() < deadline:
        text = _read(log)
        opened = _OPENED.findall(text)
        if len(opened) < len(_OPENING.findall(text)):
            break
        if opened.count("0x") <= len(_CLOSED.findall(text)):
            return _DETACH_TIMEOUT if mode_used(text) == "hotadd" else _STOP_TIMEOUT
        # Its log is all that tells.
        time.sleep(_NOTICE_POLL_SECONDS)
    return _STOP_TIMEOUT


def _log_error(what: str, subject: str, log: Path, fallback: Optional[str] = None) -> TransportError:
    text = _tail(log)
    details: Dict[str, Any] = {"log": text.splitlines()[-_LOG_TAIL_LINES:]}
    finding = decode_log(text)
    if finding is None:
        reason = last_error_line(text) or fallback or "its log gives no reason"
        return TransportError(what, subject=subject, reason=reason, details=details)
    details["finding"] = {
        "code": finding.code,
        "cause": finding.cause,
        "meaning": finding.meaning,
        "evidence": finding.evidence,
    }
    return TransportError(
        what,
        subject=subject,
        reason=finding.meaning,
        remedy=finding.remedy,
        retryable=finding.retryable,
        details=details,
    )


def _secret_pipe(name: str, secret: str) -> int:
    """The read end of a pipe that holds a secret."""
    data = secret.encode("utf-8")
    if b"\n" in data or len(data) > 4096:
        raise TransportError(f"The {name} can't be handed to nbdkit", reason="it has several lines or is too long")
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, data)
    finally:
        os.close(write_end)
    return read_end


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LOG_TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace")
