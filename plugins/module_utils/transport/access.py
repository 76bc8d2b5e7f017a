# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VDDK's access calls: while a virtual machine is prepared, Storage vMotion leaves its disks where they are.

PrepareForAccess comes before the snapshot, EndAccess when it is gone, also alone after a crash; without it Storage
vMotion stays disabled for that machine (VADP facts 43). Cleanup removes what HotAdd of a process that was killed left
(VADP facts 30). The library never comes into this process, which has ``ssl`` (VADP facts 38): each call is made by a
process of its own, which dies with this one.
"""

from __future__ import annotations

import inspect
import json
import os
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional

from ..datapath.processes import Child
from ..errors import InputError, TransportError
from ..named import FOLDER, path_problem
from . import access_process
from .vddk import Vddk, temporary_folder, thumbprints_to_try, write_config
from .vix_errors import Finding, decode_log, explain_code, may_be_thumbprint

if TYPE_CHECKING:
    from ..vsphere.inventory import VmRef
    from ..vsphere.session import Session

#: Who prepared it, where nobody says.
IDENTITY = "openvadp.backup"
IDENTITY_LIMIT = 50

CALL_SECONDS = 300.0
_IO_TIMEOUT = 180
# What fits into a pipe that nobody reads yet.
_REQUEST_LIMIT = 32768

_WHAT = {
    "prepare": "Storage vMotion can't be held off",
    "end": "Storage vMotion can't be allowed again",
    "cleanup": "What VDDK left can't be cleaned up",
}
# VADP facts 48
_PRIVILEGES = "Grant the user Global.DisableMethods and Global.EnableMethods at the root of vCenter"


@dataclass(frozen=True)
class AccessResult:
    """What a clean-up did; of the other calls both are 0.

    :param cleaned, remaining: attachments of killed processes that it removed, and that it could not.
    """

    cleaned: int = 0
    remaining: int = 0


def check_identity(identity: str) -> str:
    """*identity* itself. :raises InputError: it is none (VADP facts 43)."""
    if not 0 < len(identity.encode("utf-8")) <= IDENTITY_LIMIT or not identity.isprintable():
        raise InputError(
            "The option identity can't be used",
            subject=repr(identity),
            remedy=f"Give 1 to {IDENTITY_LIMIT} printable characters",
        )
    return identity


def run_access(
    operation: str,
    session: Session,
    vm: Optional[VmRef],
    vddk: Vddk,
    identity: str = IDENTITY,
    *,
    nfc_port: int = 902,
    timeout: float = CALL_SECONDS,
) -> AccessResult:
    """Make one of the calls. The thread that calls must live as long as that lasts.

    :param operation: prepare, end or cleanup.
    :param vm: the virtual machine; a clean-up needs none.
    :param identity: who prepares and ends; both must say the same.
    :param timeout: seconds; then the process is killed.
    :raises TransportError: the call failed. ``details.code`` is VDDK's number, where it came so far.
    """
    check_identity(identity)
    if operation != "cleanup" and not session.is_vcenter:
        raise TransportError(
            _WHAT[operation],
            subject=str(vm),
            reason="the server is an ESXi host, and only a vCenter moves disks",
        )
    first: Optional[TransportError] = None
    for thumbprint in thumbprints_to_try(session.thumbprints):
        try:
            return _call(operation, session, vm, vddk, identity, nfc_port, timeout, thumbprint)
        except TransportError as error:
            if not may_be_thumbprint(error.details.get("cause", "")):
                raise
            first = first or error
    if first is None:
        raise RuntimeError("there is no thumbprint to try")
    raise first


def _call(
    operation: str,
    session: Session,
    vm: Optional[VmRef],
    vddk: Vddk,
    identity: str,
    nfc_port: int,
    timeout: float,
    thumbprint: str,
) -> AccessResult:
    connection = session.connection
    config = _memory_file("vddk.conf")
    log = _memory_file("vddk.log")
    try:
        write_config(_path(config), vddk=vddk, io_timeout=_IO_TIMEOUT, tmp_folder=temporary_folder())
        request = {
            "library": _library(vddk),
            "libdir": vddk.libdir,
            "config": _path(config),
            "operation": operation,
            "identity": identity,
            "vm": vm.moid if vm is not None else "",
            "server": connection.hostname,
            "port": connection.port,
            "nfc_port": nfc_port,
            "thumbprint": thumbprint,
            "user": connection.username,
            "password": connection.password,
        }
        subject = str(vm) if vm is not None else "this machine"
        answer = _ask(request, config, log, f"{_WHAT[operation]}: VDDK", timeout)
        text = Path(_path(log)).read_text(encoding="utf-8", errors="replace")
    finally:
        os.close(config)
        os.close(log)
    if answer is not None and answer.get("code") == 0:
        return AccessResult(answer["cleaned"], answer["remaining"])
    raise _failure(operation, subject, answer, text, timeout)


def _ask(request: Dict[str, Any], config: int, log: int, name: str, timeout: float) -> Optional[Dict[str, Any]]:
    """The process's answer; None if it ended, or was ended, without one."""
    data = json.dumps(request).encode()
    if len(data) > _REQUEST_LIMIT:
        raise TransportError("The access call can't be made", reason="user name or password are too long")
    request_end, our_end = os.pipe()
    answer_end, result_end = os.pipe()
    try:
        try:
            os.write(our_end, data)
        finally:
            os.close(our_end)
        child = Child.start(
            # The library's folder is for Python alone: what starts it keeps the system's libraries.
            ["env", f"LD_LIBRARY_PATH={os.path.join(request['libdir'], 'lib64')}", sys.executable, "-I", "-S", "-c"]
            + [inspect.getsource(access_process), str(request_end), str(result_end)],
            log_path=_path(log),
            name=name,
            pass_fds=(request_end, result_end, config),
        )
        os.close(result_end)
        result_end = -1
        try:
            return _answer(answer_end, time.monotonic() + timeout)
        finally:
            child.stop(1.0)
    finally:
        for descriptor in (request_end, answer_end, result_end):
            if descriptor >= 0:
                os.close(descriptor)


def _answer(descriptor: int, deadline: float) -> Optional[Dict[str, Any]]:
    data = b""
    while not data.endswith(b"\n"):
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        piece = os.read(descriptor, 4096)
        if not piece:
            return None
        data += piece
    answer: Dict[str, Any] = json.loads(data)
    return answer


def _failure(
    operation: str, subject: str, answer: Optional[Dict[str, Any]], log: str, timeout: float
) -> TransportError:
    details: Dict[str, Any] = {"log": log.splitlines()[-20:]}
    if answer is None or "failure" in answer:
        last = log.strip().splitlines()[-1:]
        reason = answer["failure"] if answer else f"VDDK gave no answer within {timeout:g} s, or ended"
        return TransportError(
            _WHAT[operation],
            subject=subject,
            reason=": ".join([reason, *last]),
            retryable=answer is None,
            details=details,
        )
    code = int(answer["code"])
    finding: Optional[Finding] = decode_log(log)
    if finding is None or finding.code not in (None, code):
        finding = explain_code(code, answer["text"])
    details.update(code=code, cause=finding.cause)
    return TransportError(
        _WHAT[operation],
        subject=subject,
        reason=finding.meaning,
        remedy=_PRIVILEGES if finding.cause == "privileges" and operation != "cleanup" else finding.remedy,
        retryable=finding.retryable,
        details=details,
    )


def _library(vddk: Vddk) -> str:
    """The library's file: VDDK 9 lies beside the link named ``.so.8`` that nbdkit needs (VADP facts 37)."""
    folder = Path(vddk.libdir) / "lib64"
    named = folder / f"libvixDiskLib.so.{vddk.major}"
    found = [named] if named.exists() else sorted(folder.glob("libvixDiskLib.so.*"))
    if not found:
        raise TransportError(
            "VDDK is not there",
            subject=str(folder),
            reason=path_problem(str(folder), FOLDER) or "no libvixDiskLib.so.* in it",
            remedy="Name the folder that holds lib64 in 'vddk_libdir'",
        )
    return str(found[0])


def _memory_file(name: str) -> int:
    """A file that no crash can leave behind."""
    return os.memfd_create(name)


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"
