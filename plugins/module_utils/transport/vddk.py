# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VMware's Virtual Disk Development Kit on this machine: where it is, which version, and how it is configured."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from ..datapath.processes import run_tool, tool_result
from ..errors import DataPathError, TransportError
from ..named import FOLDER, path_problem
from .vix_errors import Finding, decode_log, last_error_line

__all__ = [
    "Finding",
    "Vddk",
    "connection_bytes",
    "decode_log",
    "find_library",
    "last_error_line",
    "look_for_library",
    "named_library_error",
    "numbers",
    "plugin_facts",
    "private_folder",
    "temporary_folder",
    "thumbprints_to_try",
    "version_problem",
    "write_config",
]

_PROBE_TIMEOUT = 60
# Two processes that make a folder at the same time see each other's.
_SETTLE_SECONDS = 0.05

# VADP facts 21: 16 x 64 KiB x 4 = 4 MiB a connection; older versions do not know these keys, and take 1 x 64 KiB x 4.
AIO_BUFFER_64K = 16
AIO_BUFFER_COUNT = 4
AIO_FROM_VERSION = (7, 0, 3)
_DEFAULT_CONNECTION_BYTES = 4 * 65536

# VADP facts 36: what the list of LUNs is called.
ALLOW_LIST_FROM_VERSION = 8

# VADP facts 22: milliseconds for the default io_timeout of 180 s; they scale with it.
_TIMEOUTS_MS = {
    "vixDiskLib.nfc.AcceptTimeoutMs": 180000,
    "vixDiskLib.nfc.RequestTimeoutMs": 180000,
    "vixDiskLib.nfc.ReadTimeoutMs": 60000,
    "vixDiskLib.nfc.WriteTimeoutMs": 600000,
}
_DEFAULT_IO_TIMEOUT = 180

# VADP facts 37: a VDDK is for vSphere N-2 to N+1 in this row.
_RELEASES = [(5, 5), (6, 0), (6, 5), (6, 7), (7, 0), (8, 0), (9, 0)]
_VMFS6_FROM_VERSION = (6, 5)

_MACHINES = {3: "x86 (32 bit)", 40: "ARM", 62: "x86-64", 183: "aarch64", 21: "ppc64", 22: "s390", 243: "RISC-V"}
_X86_64 = 62


@dataclass(frozen=True)
class Vddk:
    """A VDDK that nbdkit can load.

    :param libdir: the folder that holds ``lib64/libvixDiskLib.so.*``.
    :param version: the library's version, at least the major one ("8" or "8.0.3").
    :param plugin: version of the nbdkit plugin.
    :param has_nfc_port: the plugin takes ``nfchostport=``.
    """

    libdir: str
    version: str
    plugin: str
    has_nfc_port: bool = True

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def find_library(libdir: Optional[str] = None) -> Vddk:
    """Ask nbdkit's VDDK plugin whether it can load the library (VADP facts 37, 39).

    :param libdir: where VDDK lies; the plugin's own default if None.
    :raises TransportError: nbdkit, its plugin or the library is missing or can't be loaded; says what to install.
    """
    if shutil.which("nbdkit") is None:
        raise TransportError(
            "nbdkit is not installed",
            reason="no program 'nbdkit' in the search path",
            remedy=f"{_install_hint()} The package nbdkit itself is in every distribution",
        )
    plugin = plugin_facts(None)
    where = libdir or plugin.get("vddk_default_libdir", "")
    problem = path_problem(where, FOLDER)
    if problem is not None:
        raise TransportError(
            "VDDK is not there",
            subject=where,
            reason=problem + ("" if libdir else " (it is the plugin's default)"),
            remedy="Unpack VDDK, and name its folder in 'vddk_libdir'",
        )
    facts = plugin_facts(libdir) if libdir else plugin
    if "vddk_library_version" not in facts:
        raise _cannot_load(where)
    return Vddk(
        libdir=where,
        version=_full_version(facts),
        plugin=facts.get("version", "unknown"),
        has_nfc_port=facts.get("vddk_has_nfchostport") == "1",
    )


def look_for_library(libdir: Optional[str] = None) -> Tuple[Optional[Vddk], Optional[str]]:
    """As :func:`find_library`, for the planner: (the library, None) or (None, why there is none)."""
    try:
        return find_library(libdir), None
    except TransportError as error:
        return None, str(error).rstrip(".")


def named_library_error(libdir: str, problem: Optional[str]) -> TransportError:
    """That the user names a VDDK that can't be used. :param problem: of :func:`look_for_library`."""
    return TransportError(
        "The VDDK that is named can't be used",
        subject=libdir,
        reason=problem,
        remedy="Correct 'vddk_libdir', or leave it out to do without VDDK: disks are then read by slower ways",
    )


def thumbprints_to_try(thumbprints: Mapping[str, str]) -> List[str]:
    """The forms of a server's thumbprint for VDDK, the one that every known version takes first (VADP facts 40).

    :param thumbprints: ``sha1`` and ``sha256`` of the certificate of the server named in ``server=``.
    """
    return [thumbprints["sha1"], thumbprints["sha256"]]


def version_problem(vddk_version: str, server_version: str, vmfs_major: Optional[int] = None) -> Optional[str]:
    """Why this VDDK is not for this server, as a clause; None if it is (VADP facts 36, 37).

    :param vddk_version: as :class:`Vddk` has it; where only the major version is known, the best is thought of it.
    :param server_version: of vCenter or ESXi ("8.0.3").
    :param vmfs_major: of the datastore, for SAN.
    """
    vddk, server = numbers(vddk_version), numbers(server_version)
    if not vddk or not server:
        return None
    newest = vddk if len(vddk) > 1 else (vddk[0], 99)
    if vmfs_major is not None and vmfs_major >= 6 and newest < _VMFS6_FROM_VERSION:
        return f"VMFS-6 needs VDDK 6.5 or newer, and this is VDDK {vddk_version}"
    oldest = vddk if len(vddk) > 1 else (vddk[0], 0)
    low, high = max(0, _release(oldest) - 2), _release(newest) + 1
    if low <= _release(server) <= high:
        return None
    return (
        f"VDDK {vddk_version} is for vSphere {_release_name(low)} to {_release_name(high)},"
        f" and the server is {server_version}"
    )


def _release(version: Tuple[int, ...]) -> int:
    """The place of a version in the row of vSphere's releases; those to come are taken for x.0."""
    known = max((index for index, first in enumerate(_RELEASES) if first <= version), default=0)
    return known + max(0, version[0] - _RELEASES[-1][0])


def _release_name(place: int) -> str:
    last = len(_RELEASES) - 1
    major, minor = _RELEASES[place] if place <= last else (_RELEASES[-1][0] + place - last, 0)
    return f"{major}.{minor}"


def write_config(
    path: str | Path,
    *,
    vddk: Vddk,
    io_timeout: int,
    tmp_folder: str | Path,
    san_devices: Sequence[str] = (),
) -> None:
    """Write VDDK's configuration file (VADP facts 21, 22, 36, 44).

    :param io_timeout: seconds; the time-outs of VDDK scale with it.
    :param tmp_folder: fixed for this machine and user, or a clean-up after a crash finds nothing.
    :param san_devices: the only devices that mode san may open; of no meaning for the other modes.
    """
    scale = io_timeout / _DEFAULT_IO_TIMEOUT
    lines = [f'tmpDirectory="{tmp_folder}"']
    lines += [f"{key}={max(1000, round(value * scale))}" for key, value in sorted(_TIMEOUTS_MS.items())]
    lines += ["vixDiskLib.nfc.LogLevel=2", "vixDiskLib.transport.LogLevel=3"]
    if _has_aio(vddk):
        lines.append(f"vixDiskLib.nfcAio.Session.BufSizeIn64KB={AIO_BUFFER_64K}")
        lines.append(f"vixDiskLib.nfcAio.Session.BufCount={AIO_BUFFER_COUNT}")
    if san_devices:
        option = "allowList" if vddk.major >= ALLOW_LIST_FROM_VERSION else "whitelist"
        lines.append(f'vixDiskLib.transport.san.{option}="{",".join(san_devices)}"')
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise TransportError(
            "VDDK's configuration can't be written",
            subject=str(path),
            reason=error.strerror,
            remedy="Make room there, or set TMPDIR to another folder with a short path",
        ) from error


def connection_bytes(vddk: Vddk) -> int:
    """What a connection to an ESXi host takes of that host's memory for disk data (VADP facts 20, 21)."""
    return AIO_BUFFER_64K * 65536 * AIO_BUFFER_COUNT if _has_aio(vddk) else _DEFAULT_CONNECTION_BYTES


def _has_aio(vddk: Vddk) -> bool:
    """Of a version 7 whose rest is not known, the older is meant: its open would fail, or not, with these keys."""
    return numbers(vddk.version) >= AIO_FROM_VERSION


def numbers(version: str) -> Tuple[int, ...]:
    """``8.0.3`` as (8, 0, 3); what follows the numbers does not count."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in found.group(0).split(".")) if found else ()


def temporary_folder(parent: str | Path = "/var/tmp") -> Path:
    """VDDK's ``tmpDirectory``: always the same for one user of this machine, and nobody else's (VADP facts 44).

    :raises TransportError: something of that name is there and is not a folder of this user alone.
    """
    return private_folder("openvadp-vddk", "VDDK's temporary folder", parent=parent)


def private_folder(stem: str, what: str, parent: str | Path = "/var/tmp", path: Optional[Path] = None) -> Path:
    """A folder that is always the same for one user of this machine, and nobody else's; made where it is not there.

    Where another user was first to take its name, it has a random end, and is found again by its owner.

    :param stem: its name begins so, and goes on with the user's number.
    :param what: what messages call it.
    :param path: the folder itself, if it has another name.
    :raises TransportError: something of that name is there and is not a folder of this user alone.
    """
    usual = path or Path(parent) / f"{stem}-{os.getuid()}"
    if path is None and not os.path.lexists(str(usual)):
        # One with a random end stays in use, also when the usual name has become free.
        others = _own_folders(usual)
        if others:
            return others[0]
    while True:
        try:
            usual.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise TransportError(f"{what} can't be made", subject=str(usual), reason=str(error)) from error
        try:
            found = usual.lstat()
            break
        except FileNotFoundError:
            continue  # another process has just removed it
    if _is_private(found):
        return usual
    if path is None and found.st_uid != os.getuid():
        return _other_folder(usual, what)
    raise TransportError(
        f"{what} can't be trusted",
        subject=str(usual),
        reason="it is not a folder that belongs to this user alone",
        remedy="Remove it, and run again",
    )


def _is_private(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _other_folder(usual: Path, what: str) -> Path:
    """Of this user's folders beside *usual* the first; a new one if there is none."""
    made = None
    while True:
        own = _own_folders(usual)
        if own:
            # Of two processes that made one at the same time both go on with the same.
            if made is not None and made != own[0]:
                with contextlib.suppress(OSError):
                    made.rmdir()
            return own[0]
        try:
            # Sorted by time: who comes later finds the earlier one first.
            made = usual.with_name(f"{usual.name}-{time.time_ns():020d}-{secrets.token_hex(4)}")
            made.mkdir(mode=0o700)
            time.sleep(_SETTLE_SECONDS)
        except OSError as error:
            raise TransportError(f"{what} can't be made", subject=str(usual.parent), reason=str(error)) from error


def _own_folders(usual: Path) -> List[Path]:
    found = []
    try:
        names = sorted(os.listdir(str(usual.parent)))
    except OSError:
        return []  # what is wrong is reported where a folder is made
    for name in names:
        path = usual.parent / name
        if name.startswith(f"{usual.name}-"):
            with contextlib.suppress(FileNotFoundError):
                if _is_private(path.lstat()):
                    found.append(path)
    return found


def plugin_facts(libdir: Optional[str]) -> Dict[str, str]:
    """What nbdkit's VDDK plugin says of itself, and of the library in *libdir* if it can load that.

    :raises TransportError: the plugin is not installed or does not answer.
    """
    argv = ["nbdkit", "vddk", "--dump-plugin"]
    if libdir:
        argv.append(f"libdir={libdir}")
    try:
        text = run_tool(argv, what="Asking nbdkit's VDDK plugin", timeout=_PROBE_TIMEOUT)
    except DataPathError as error:
        if "cannot open plugin" in str(error):
            raise TransportError(
                "nbdkit's VDDK plugin is not installed", reason=error.reason, remedy=_install_hint()
            ) from error
        raise TransportError(
            "nbdkit's VDDK plugin does not answer", subject=libdir, reason=error.reason or str(error)
        ) from error
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return dict(pairs)


def _full_version(facts: Mapping[str, str]) -> str:
    """The version of the file that is loaded: a library 9 hides behind a link named ``.so.8`` (VADP facts 37)."""
    real = os.path.realpath(facts.get("vddk_dll", ""))
    match = re.search(r"libvixDiskLib\.so\.(\d+(?:\.\d+)*)$", real)
    return match.group(1) if match else facts["vddk_library_version"]


def _cannot_load(libdir: str) -> TransportError:
    """Why a folder that exists gives no library."""
    folder = Path(libdir) / "lib64"
    libraries = sorted(folder.glob("libvixDiskLib.so.*"))
    if not libraries:
        found = sorted(path for path in Path(libdir).glob("libvixDiskLib.so*"))
        return TransportError(
            "VDDK is not there",
            subject=libdir,
            reason=f"no libvixDiskLib.so.* in {folder}" + (", but in the folder itself" if found else ""),
            remedy="Name the folder that holds lib64 in 'vddk_libdir'",
        )
    foreign = _foreign_machine(libraries[-1])
    if foreign:
        return TransportError(
            "VDDK can't be loaded", subject=str(libraries[-1]), reason=foreign, remedy="Unpack the Linux x86-64 VDDK"
        )
    names = [path.name for path in libraries]
    if all(re.search(r"\.so\.(9|\d\d)", name) for name in names):
        return TransportError(
            "VDDK can't be loaded",
            subject=libdir,
            reason=f"this nbdkit plugin looks for versions 6 to 8, and there is {', '.join(names)}",
            remedy=f"Make a relative link: ln -s {names[-1]} {folder}/libvixDiskLib.so.8",
        )
    return TransportError(
        "VDDK can't be loaded",
        subject=libdir,
        reason=_load_failure(libdir),
        remedy="Check that the whole VDDK was unpacked and that its files can be read by this user",
    )


def _foreign_machine(library: Path) -> Optional[str]:
    """Why *library* is not a library for this kind of machine, from its ELF header; None if it is one."""
    try:
        with library.open("rb") as stream:
            header = stream.read(20)
    except OSError as error:
        return error.strerror
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return "it is not a Linux shared library"
    machine = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])[0]
    if machine != _X86_64 or header[4] != 2:
        return f"it is built for {_MACHINES.get(machine, f'machine type {machine}')}, and VDDK works on x86-64 only"
    return None


def _load_failure(libdir: str) -> str:
    """The loader's own words, by starting the plugin on a file that does not exist."""
    argv = ["nbdkit", "-r", "vddk", f"libdir={libdir}", "file=/nonexistent", "--run", "true"]
    result = tool_result(argv, what="Loading VDDK", timeout=_PROBE_TIMEOUT, accept=(0, 1))
    lines = [line.split("error:", 1)[1].strip() for line in result.stderr.splitlines() if "error:" in line]
    return lines[0] if lines else "nbdkit does not say why"


def _install_hint(os_release: str | Path = "/etc/os-release") -> str:
    """What to install on this distribution (VADP facts 39)."""
    facts = _os_release(os_release)
    family: List[str] = [facts.get("ID", "")] + facts.get("ID_LIKE", "").split()
    if facts.get("ID") == "debian" and facts.get("VERSION_ID", "").split(".")[0] == "12":
        return (
            "Debian 12 has no package of the plugin: install nbdkit, and nbdkit-plugin-vddk of Debian 13 (contrib),"
            " which works with Debian 12's nbdkit."
        )
    if "ubuntu" in family:
        return "Install the package nbdkit-plugin-vddk (Ubuntu 25.04 or newer)."
    if "debian" in family:
        return "Install the package nbdkit-plugin-vddk (Debian 13 or newer, section contrib)."
    if "fedora" in family or "rhel" in family:
        return "Install the package nbdkit-vddk-plugin."
    return (
        "Install nbdkit's VDDK plugin: nbdkit-vddk-plugin on Fedora and RHEL, nbdkit-plugin-vddk on Debian 13 (contrib)"
        " and Ubuntu 25.04."
    )


def _os_release(path: str | Path) -> Dict[str, str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip("\"'") for key, value in pairs}
