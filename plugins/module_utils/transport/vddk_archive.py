# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VDDK out of the archive that its maker gives out: checked, unpacked beside, and renamed into place.

Nothing in the archive is believed: names and links that leave the folder, devices, and bits that make programs run as
somebody else are refused or dropped. The library is found by its name, whatever folders the archive has around it.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Dict, Iterable, Iterator, List, Optional, Set

from ..datapath.image import fsync_dir, fsync_file
from ..errors import InputError
from .vddk import Vddk, find_library, plugin_facts

MARKER = ".openvadp-archive.sha256"

_LIBRARY = re.compile(r"libvixDiskLib\.so\.(\d+)(?:\.\d+)*$")
_COPY_BYTES = 1024 * 1024
# The newest version that nbdkit's plugins before 1.44 look for (VADP facts 37).
_LINK_NAME = "libvixDiskLib.so.8"
_SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64")


@dataclass(frozen=True)
class Installed:
    """What is in place afterwards."""

    changed: bool
    vddk: Optional[Vddk]
    facts: Dict[str, str]


def install(archive: Optional[str], checksum: str, dest: str, *, check_mode: bool = False) -> Installed:
    """The VDDK of *archive* is in *dest*.

    :param archive: path of the tar archive; None is enough where *dest* holds what came out of it already.
    :param checksum: SHA-256 of the archive.
    :raises InputError: the checksum, the archive or the folder make no sense; nothing was touched.
    :raises TransportError: what was unpacked is not a library that nbdkit's plugin can load; *dest* is as it was.
    """
    checksum = checksum.lower()
    if not re.fullmatch(r"[0-9a-f]{64}", checksum):
        raise InputError("The checksum is not a SHA-256", subject=checksum, reason="it is not 64 hexadecimal digits")
    target = Path(dest)
    _check_dest(target)
    if installed_checksum(target) == checksum:
        return Installed(False, find_library(dest), plugin_facts(dest))
    if archive is None:
        raise InputError("VDDK is not there, and no archive is given", subject=dest, remedy="Name its archive")
    with _open(archive, checksum) as tar:
        top = _check_members(archive, tar.getmembers())
        if check_mode:
            return Installed(True, None, {})
        parent = target.parent
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        try:
            made = work / "new"
            made.mkdir(mode=0o755)
            _unpack(tar, top, made)
            _check_links(archive, made)
            _make_lib64(made)
            _link_if_needed(made)
            vddk = find_library(str(made))
            (made / MARKER).write_text(checksum + "\n", encoding="ascii")
            fsync_file(str(made / MARKER))
            fsync_dir(str(made))
            _put_in_place(made, target, work / "old")
            fsync_dir(str(parent))
        finally:
            shutil.rmtree(work)
    return Installed(True, Vddk(dest, vddk.version, vddk.plugin, vddk.has_nfc_port), plugin_facts(dest))


def installed_checksum(dest: Path) -> Optional[str]:
    """SHA-256 of the archive that *dest* was made of; None if it is not a folder of ours."""
    try:
        return (dest / MARKER).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _check_dest(dest: Path) -> None:
    """VDDK brings its own libcrypto and libstdc++: no other program may find them (VADP facts 38)."""
    if not dest.is_absolute() or len(dest.parts) < 3 or ".." in dest.parts:
        raise InputError(
            "VDDK can't be put there", subject=str(dest), reason="it is not an absolute path below a folder"
        )
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise InputError("VDDK can't be put there", subject=str(dest), reason="it is there and no folder")
    if dest.is_dir() and os.listdir(dest) and installed_checksum(dest) is None:
        raise InputError(
            "VDDK can't be put there",
            subject=str(dest),
            reason="the folder was not made by this module, and is not empty",
            remedy="Name another folder, or move this one away",
        )
    for parent in (dest, *dest.parents):
        mode = parent.stat().st_mode if parent.exists() else 0
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise InputError(
                "VDDK can't be put there",
                subject=str(dest),
                reason=f"everybody on this machine may write {parent}, and so change the libraries that are loaded",
                remedy="Name another folder, or take that right away (chmod o-w)",
            )
    folders = {os.path.realpath(folder) for folder in _library_path()}
    for folder in (dest, dest / "lib64"):
        if os.path.realpath(folder) in folders:
            raise InputError(
                "VDDK can't be put there",
                subject=str(dest),
                reason=f"{folder} is on this system's library path, and VDDK brings its own libcrypto and libstdc++",
                remedy="Name another folder, and take it out of /etc/ld.so.conf.d",
            )


def _library_path() -> Iterable[str]:
    yield from _SYSTEM_FOLDERS
    files = [Path("/etc/ld.so.conf"), *sorted(Path("/etc/ld.so.conf.d").glob("*.conf"))]
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        yield from (line.strip() for line in lines if line.strip().startswith("/"))


def _copy_verified(archive: str, checksum: str, copy: IO[bytes]) -> None:
    """What is unpacked is what was verified, whoever may write the archive."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(archive, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError("The archive can't be read", subject=archive, reason="it is not an ordinary file")
            for piece in iter(lambda: stream.read(_COPY_BYTES), b""):
                digest.update(piece)
                copy.write(piece)
    except OSError as error:
        raise InputError("The archive can't be read", subject=str(archive), reason=error.strerror) from error
    if digest.hexdigest() != checksum:
        raise InputError(
            "The archive is not the one that was meant",
            subject=str(archive),
            reason=f"its SHA-256 is {digest.hexdigest()}, not {checksum}",
            remedy="Compare both with what the maker publishes; download the archive again",
        )


@contextmanager
def _open(archive: str, checksum: str) -> Iterator[tarfile.TarFile]:
    try:
        with tempfile.TemporaryFile() as copy:
            _copy_verified(archive, checksum, copy)
            copy.seek(0)
            with tarfile.open(fileobj=copy, mode="r:*") as tar:
                yield tar
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            "The archive can't be unpacked",
            subject=archive,
            reason=" ".join(str(error).split()),
            remedy="Give a tar archive as its maker offers it, and see that the disk has room",
        ) from error


def _check_members(archive: str, members: List[tarfile.TarInfo]) -> str:
    """Refuse what must not be unpacked.

    :returns: the folder in the archive that holds the library's folder ("." if that is the archive itself).
    """

    def refuse(member: tarfile.TarInfo, why: str) -> InputError:
        return InputError("The archive is refused", subject=archive, reason=f"{member.name!r} {why}")

    folders: Set[str] = set()
    seen: Set[str] = set()
    links = {_normal(member.name) for member in members if member.issym()}
    for member in members:
        name = _normal(member.name)
        if name is None:
            raise refuse(member, "leaves the folder that it is unpacked into")
        if any(part in links for part in _parents(name)):
            raise refuse(member, "goes through a link of the archive")
        if name in seen and not member.isdir():
            raise refuse(member, "is there twice")
        seen.add(name)
        if member.issym() or member.islnk():
            start = posixpath.dirname(name) if member.issym() else ""
            aim = None if member.linkname.startswith("/") else _normal(posixpath.join(start, member.linkname))
            if aim is None:
                raise refuse(member, f"is a link to {member.linkname!r}, outside of the archive")
        elif not (member.isreg() or member.isdir()):
            raise refuse(member, "is neither a file, a folder nor a link")
        if _LIBRARY.match(posixpath.basename(name)):
            folders.add(posixpath.dirname(name))
    if not folders:
        raise InputError(
            "The archive is refused",
            subject=archive,
            reason="it holds no libvixDiskLib.so.*, so it is not a VDDK for Linux",
        )
    best = sorted(folders, key=lambda folder: (posixpath.basename(folder) != "lib64", len(folder), folder))[0]
    return posixpath.dirname(best) or "."


def _normal(name: str) -> Optional[str]:
    """The name within the archive; None if it leads out of it."""
    if name.startswith("/"):
        return None
    normal = posixpath.normpath(name)
    return None if normal == ".." or normal.startswith("../") else normal


def _parents(name: str) -> Iterable[str]:
    while posixpath.dirname(name):
        name = posixpath.dirname(name)
        yield name


def _unpack(tar: tarfile.TarFile, top: str, into: Path) -> None:
    """Everything below *top*, by our own hands: old versions of tarfile have no filter for what is dangerous."""
    for member in tar.getmembers():
        name = posixpath.relpath(_normal(member.name) or ".", top)
        if name == "." or name.startswith("../") or name == "..":
            continue
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.isdir():
            path.mkdir(exist_ok=True)
        elif member.issym():
            path.symlink_to(member.linkname)
        else:
            # A hard link is unpacked as the file it names.
            source = tar.extractfile(member)
            if source is None:
                raise InputError("The archive is refused", reason=f"{member.name!r} has no content")
            with source, path.open("wb") as stream:
                shutil.copyfileobj(source, stream, _COPY_BYTES)
                stream.flush()
                os.fsync(stream.fileno())
            path.chmod(0o755 if member.mode & 0o111 else 0o644)
    for folder in [into, *(path for path in into.rglob("*") if path.is_dir() and not path.is_symlink())]:
        folder.chmod(0o755)


def _check_links(archive: str, folder: Path) -> None:
    """Links through links: where they lead is seen only when all are there."""
    root = os.path.realpath(folder) + os.sep
    for path in folder.rglob("*"):
        if path.is_symlink() and not (os.path.realpath(path) + os.sep).startswith(root):
            raise InputError(
                "The archive is refused", subject=archive, reason=f"link {path.name!r} leads out of what is unpacked"
            )


def _put_in_place(made: Path, target: Path, old: Path) -> None:
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise


def _make_lib64(folder: Path) -> None:
    """nbdkit's plugin looks in ``lib64``; other makers call that folder otherwise."""
    if (folder / "lib64").exists():
        return
    found = sorted(path.parent for path in folder.glob("*/libvixDiskLib.so.*"))
    if found:
        (folder / "lib64").symlink_to(found[0].name)


def _link_if_needed(folder: Path) -> None:
    """A library 9 that the plugin does not look for gets a relative link of a name that it does (VADP facts 37)."""
    if "vddk_library_version" in plugin_facts(str(folder)):
        return
    lib64 = folder / "lib64"
    versions = sorted(
        (
            (int(match.group(1)), path.name)
            for path in lib64.iterdir()
            for match in [_LIBRARY.match(path.name)]
            if match
        ),
        key=lambda item: (-item[0], len(item[1])),
    )
    if versions and versions[0][0] > 8 and not os.path.lexists(lib64 / _LINK_NAME):
        (lib64 / _LINK_NAME).symlink_to(versions[0][1])


def functions(facts: Dict[str, str]) -> List[str]:
    """The functions that the library has, as nbdkit's plugin lists them."""
    return sorted(name for name, value in facts.items() if name.startswith("VixDiskLib_") and value == "1")
