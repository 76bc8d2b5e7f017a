# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""VDDK out of archives of its makers' layouts, loaded by the real nbdkit; and archives that must not be unpacked."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import vddk_archive
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk_archive import MARKER, functions, install

ROOT = Path(__file__).resolve().parents[4]
TOP = "vmware-vix-disklib-distrib"
Member = Tuple[str, Dict[str, Any], bytes]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The test double of libvixDiskLib."""
    out = tmp_path_factory.mktemp("double")
    make = ["make", "-s", "-C", str(ROOT / "tests/simulator/vixdisklib"), f"OUT={out}"]
    subprocess.run(make, check=True, timeout=120)
    return (out / "lib64" / "libvixDiskLib.so.8").read_bytes()


def file(name: str, data: bytes = b"x", mode: int = 0o644) -> Member:
    return name, {"mode": mode}, data


def link(name: str, aim: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    return name, {"type": kind, "linkname": aim}, b""


def archive(path: Path, members: List[Member], compression: str = "gz") -> Tuple[str, str]:
    """(path, SHA-256) of a tar archive with just these members."""
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, fields, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def vmware(library: bytes, version: str = "8.0.3", top: str = TOP, lib: str = "lib64") -> List[Member]:
    """The layout of VMware's archives."""
    major = version.split(".")[0]
    return [
        (top, {"type": tarfile.DIRTYPE, "mode": 0o700}, b""),
        file(f"{top}/{lib}/libvixDiskLib.so.{version}", library, 0o4755),
        link(f"{top}/{lib}/libvixDiskLib.so.{major}", f"libvixDiskLib.so.{version}"),
        link(f"{top}/{lib}/libvixDiskLib.so", f"libvixDiskLib.so.{major}"),
        file(f"{top}/doc/README", b"read me\n", 0o600),
        link(f"{top}/bin64/README", "../doc/README"),
        link(f"{top}/doc/COPY", f"{top}/doc/README", tarfile.LNKTYPE),
    ]


def tree(folder: Path) -> Dict[str, Any]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("version", ["6.7.3", "7.0.3.2", "8.0.3"])
@pytest.mark.parametrize("compression", ["gz", "xz", ""])
def test_what_vmware_ships(tmp_path: Path, library: bytes, version: str, compression: str) -> None:
    path, checksum = archive(tmp_path / "vddk.tar", vmware(library, version), compression)
    dest = tmp_path / "opt" / "vddk"
    before = os.umask(0o077)
    try:
        done = install(path, checksum.upper(), str(dest))
    finally:
        os.umask(before)
    assert done.changed and done.vddk is not None and done.vddk.version == version
    assert done.vddk.libdir == str(dest)
    assert "VixDiskLib_QueryAllocatedBlocks" in functions(done.facts)
    real = dest / "lib64" / f"libvixDiskLib.so.{version}"
    assert real.stat().st_mode & 0o7777 == 0o755  # no set-user-ID bit
    assert (dest / "doc/README").stat().st_mode & 0o777 == 0o644 and dest.stat().st_mode & 0o777 == 0o755
    assert (dest / "doc/COPY").read_bytes() == b"read me\n"
    assert [path.name for path in dest.parent.iterdir()] == ["vddk"]
    # Again: nothing changes, and the archive is not needed any more.
    inode = real.stat().st_ino
    again = install(None, checksum, str(dest))
    assert not again.changed and again.vddk is not None and again.vddk.version == version
    assert real.stat().st_ino == inode


def test_version_9_gets_a_relative_link(tmp_path: Path, library: bytes) -> None:
    path, checksum = archive(tmp_path / "vddk.tar.gz", vmware(library, "9.0.0.0"))
    done = install(path, checksum, str(tmp_path / "vddk"))
    name = os.readlink(tmp_path / "vddk/lib64/libvixDiskLib.so.8")
    assert name in ("libvixDiskLib.so.9", "libvixDiskLib.so.9.0.0.0")
    assert done.vddk is not None and done.vddk.version == "9.0.0.0"


@pytest.mark.parametrize(("top", "lib"), [("openvddk-1.0/usr", "lib64"), ("openvddk", "lib"), (".", "lib64")])
def test_other_layouts(tmp_path: Path, library: bytes, top: str, lib: str) -> None:
    members = [member for member in vmware(library, "8.0.3", top, lib) if member[0] != "."]
    path, checksum = archive(tmp_path / "openvddk.tar.gz", members)
    done = install(path, checksum, str(tmp_path / "vddk"))
    assert done.vddk is not None and done.vddk.version == "8.0.3"


def test_another_version_takes_its_place(tmp_path: Path, library: bytes) -> None:
    dest = tmp_path / "vddk"
    old = archive(tmp_path / "old.tar.gz", [*vmware(library, "7.0.3"), file(f"{TOP}/only-in-7")])
    new = archive(tmp_path / "new.tar.gz", vmware(library, "8.0.3"))
    install(*old, str(dest))
    before = tree(dest)
    assert install(*new, str(dest), check_mode=True).changed
    assert tree(dest) == before
    done = install(*new, str(dest))
    assert done.changed and done.vddk is not None and done.vddk.version == "8.0.3"
    assert not (dest / "only-in-7").exists()
    # One that can't be loaded leaves the one that is there.
    broken = archive(tmp_path / "broken.tar.gz", vmware(b"\x7fELF nonsense", "8.0.4"))
    before = tree(dest)
    with pytest.raises(TransportError):
        install(*broken, str(dest))
    assert tree(dest) == before and sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["vddk"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([file("../evil")], "leaves the folder"),
        ([file(f"{TOP}/lib64/../../../evil")], "leaves the folder"),
        ([file("/etc/evil")], "leaves the folder"),
        ([link(f"{TOP}/lib64/up", "../../../etc")], "outside of the archive"),
        ([link(f"{TOP}/lib64/passwd", "/etc/passwd")], "outside of the archive"),
        ([link(f"{TOP}/lib64/hard", "/etc/passwd", tarfile.LNKTYPE)], "outside of the archive"),
        ([link(f"{TOP}/lib64/hard", "../evil", tarfile.LNKTYPE)], "outside of the archive"),
        ([link(f"{TOP}/here", "lib64"), file(f"{TOP}/here/evil")], "goes through a link"),
        ([file(f"{TOP}/here/evil"), link(f"{TOP}/here", "lib64")], "goes through a link"),
        ([link(f"{TOP}/a/b/top", "../.."), link(f"{TOP}/a/b/out", "top/../../x")], "leads out of"),
        ([file(f"{TOP}/twice"), link(f"{TOP}/twice", "lib64")], "is there twice"),
        ([(f"{TOP}/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b"")], "neither a file"),
        ([(f"{TOP}/pipe", {"type": tarfile.FIFOTYPE}, b"")], "neither a file"),
    ],
)
def test_an_archive_that_would_write_elsewhere(
    tmp_path: Path, library: bytes, members: List[Member], words: str
) -> None:
    path, checksum = archive(tmp_path / "bad.tar.gz", [*vmware(library), *members])
    (tmp_path / "opt").mkdir()
    with pytest.raises(InputError) as caught:
        install(path, checksum, str(tmp_path / "opt" / "vddk"))
    assert words in str(caught.value)
    assert list((tmp_path / "opt").iterdir()) == [] and not (tmp_path / "evil").exists()


def test_archives_that_make_no_sense(tmp_path: Path, library: bytes) -> None:
    dest = str(tmp_path / "opt" / "vddk")
    good, checksum = archive(tmp_path / "good.tar.gz", vmware(library))

    def refused(path: Optional[str], digest: str) -> str:
        with pytest.raises(InputError) as caught:
            install(path, digest, dest)
        assert not (tmp_path / "opt").exists()
        return str(caught.value)

    assert f"its SHA-256 is {checksum}, not {'0' * 64}" in refused(good, "0" * 64)
    assert "not 64 hexadecimal digits" in refused(good, "abc")
    assert "no archive is given" in refused(None, checksum)
    assert "No such file" in refused(str(tmp_path / "absent"), checksum)
    empty = archive(tmp_path / "empty.tar", [file("README")], "")
    assert "not a VDDK for Linux" in refused(*empty)
    text = tmp_path / "page.html"
    text.write_text("<html>log in first</html>")
    assert "can't be unpacked" in refused(str(text), hashlib.sha256(text.read_bytes()).hexdigest())
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(Path(good).read_bytes()[:-2000])
    assert "can't be unpacked" in refused(str(cut), hashlib.sha256(cut.read_bytes()).hexdigest())


def test_folders_that_are_not_ours_or_on_the_library_path(
    tmp_path: Path, library: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = archive(tmp_path / "good.tar.gz", vmware(library))

    def refused(dest: Any) -> str:
        with pytest.raises(InputError) as caught:
            install(*good, str(dest))
        return str(caught.value)

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "lib64").mkdir()
    assert "was not made by this module" in refused(tmp_path / "foreign")
    (tmp_path / "link").symlink_to("foreign")
    assert "no folder" in refused(tmp_path / "link")
    assert "not an absolute path" in refused("vddk")
    assert "not an absolute path" in refused("/vddk")
    assert "library path" in refused("/usr/local") or "not made by this module" in refused("/usr/local")
    monkeypatch.setattr(vddk_archive, "_library_path", lambda: [str(tmp_path / "vddk" / "lib64")])
    assert "its own libcrypto" in refused(tmp_path / "vddk")
    (tmp_path / "empty").mkdir()
    install(*good, str(tmp_path / "empty"))
    assert (tmp_path / "empty" / MARKER).is_file()


def test_what_is_unpacked_is_what_was_verified(tmp_path: Path, library: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write the archive changes it at the worst moment."""
    path, checksum = archive(tmp_path / "vddk.tar", vmware(library))
    other, _sum = archive(tmp_path / "other.tar", [*vmware(library), file(f"{TOP}/evil")])
    real = vddk_archive._copy_verified

    def verified(*arguments: Any) -> None:
        real(*arguments)
        Path(path).write_bytes(Path(other).read_bytes())

    monkeypatch.setattr(vddk_archive, "_copy_verified", verified)
    install(path, checksum, str(tmp_path / "opt" / "vddk"))
    assert not list(tmp_path.glob("opt/vddk/**/evil"))


def test_a_folder_that_everybody_may_write_and_a_pipe_are_refused(tmp_path: Path, library: bytes) -> None:
    path, checksum = archive(tmp_path / "vddk.tar", vmware(library))
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt").chmod(0o777)
    with pytest.raises(InputError, match="everybody"):
        install(path, checksum, str(tmp_path / "opt" / "vddk"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="ordinary"):
        install(str(tmp_path / "pipe"), checksum, str(tmp_path / "vddk"))
