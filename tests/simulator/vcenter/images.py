# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Contents for the seeded disks: partition tables, file systems and known files, made once and kept in a cache.

No kind needs root: file systems are made inside a raw image, files come in by ``mkfs.ext4 -d``, ``ntfscp``, an XFS
prototype file, or (FAT) by writing the directory entries. What can be fixed is: UUIDs, labels, times, contents.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import boot_image
from .storage import Storage

MIB = 1 << 20
SECTOR = 512
SMALLEST_BYTES = 32 * MIB
_EPOCH = 1_700_000_000
_PROJECT_CACHE = Path(__file__).resolve().parents[3] / "build" / "images"


class ImageError(Exception):
    """An image can't be made; the message has the tool's words."""


def _run(argv: list[str], **options: object) -> str:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "E2FSPROGS_FAKE_TIME": str(_EPOCH),
        # what lets mkfs.xfs make file systems below 300 MiB, for tests like these
        "TEST_DIR": "1",
        "TEST_DEV": "1",
        "QA_CHECK_FS": "1",
        # the boot partition need not fit any drive's geometry; its times are fixed
        "MTOOLS_SKIP_CHECK": "1",
        "SOURCE_DATE_EPOCH": str(_EPOCH),
    }
    try:
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300, env=environment, **options)
    except FileNotFoundError:
        raise ImageError(f"{argv[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise ImageError(f"{argv[0]} failed: {error.stderr.strip() or error.stdout.strip()}") from error
    return done.stdout


def _random_bytes(seed: str, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def _files(kind: str) -> dict[str, bytes]:
    """path -> content; NTFS and FAT hold them flat (their tools make no folders)."""
    words = f"The quick brown fox, on {kind}.\n"
    if kind == "fat":
        return {
            "README.TXT": words.encode(),
            "EMPTY.DAT": b"",
            "DATA.BIN": _random_bytes("fat", 900_001),
        }
    if kind == "ntfs":
        return {
            "readme.txt": words.encode(),
            "umlaut-ä.txt": "Grüße aus dem Dateisystem\n".encode(),
            "database.mdf": _random_bytes("ntfs", 3 * MIB + 77),
            "log.ldf": (words * 20000).encode(),
        }
    return {
        "etc/hostname": f"{kind}-guest\n".encode(),
        "etc/fstab": b"UUID=0 / auto defaults 0 1\n",
        "home/user/notes.txt": words.encode(),
        "home/user/empty": b"",
        "srv/data/big.bin": _random_bytes(kind, 3 * MIB + 123),
        "var/log/messages": (words * 20000).encode(),
    }


def _put_tree(kind: str, folder: Path) -> None:
    for name, content in _files(kind).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for entry in sorted(folder.rglob("*"), reverse=True):
        entry.chmod(0o755 if entry.is_dir() else 0o644)
        os.utime(entry, (_EPOCH, _EPOCH))


def _partition(image: Path, label: str, kind: str) -> tuple[int, int]:
    """One partition over the whole image. -> its (offset, length) in bytes."""
    if label == "gpt":
        script = "label: gpt\nlabel-id: 5F0B7A3C-0000-4000-8000-000000000001\n"
        script += f"start=2048, type={kind}, uuid=5F0B7A3C-0000-4000-8000-000000000002, name=data\n"
    else:
        script = f"label: dos\nlabel-id: 0x5f0b7a3c\nstart=2048, type={kind}\n"
    _run(["sfdisk", "-q", str(image)], input=script)
    part = json.loads(_run(["sfdisk", "-J", str(image)]))["partitiontable"]["partitions"][0]
    return part["start"] * SECTOR, part["size"] * SECTOR


def _insert(part: Path, image: Path, offset: int) -> None:
    """Put a file system's image at its place in the disk's, holes left out."""
    with open(part, "rb") as source, open(image, "r+b") as target:
        while data := source.read(MIB):
            if data.strip(b"\0"):
                os.pwrite(target.fileno(), data, offset)
            offset += len(data)


def _make_ext4(image: Path, scratch: Path) -> None:
    offset, length = _partition(image, "gpt", "linux")
    _put_ext4(image, scratch, offset, length)


def _make_bootable(image: Path, scratch: Path) -> None:
    """As ext4, behind a partition that a BIOS boots from."""
    boot_image.make(image, scratch, _run)
    _put_ext4(image, scratch, boot_image.DATA_AT, image.stat().st_size - boot_image.DATA_AT)


def _put_ext4(image: Path, scratch: Path, offset: int, length: int) -> None:
    tree = scratch / "tree"
    tree.mkdir()
    _put_tree("ext4", tree)
    identity = "5f0b7a3c-0000-4000-8000-000000000004"
    extended = f"offset={offset},root_owner=0:0,hash_seed={identity},lazy_itable_init=1"
    _run(
        ["mkfs.ext4", "-q", "-F", "-L", "data", "-U", identity, "-E", extended, "-d", str(tree)]
        + [str(image), f"{length // 1024}k"]
    )


def _make_xfs(image: Path, scratch: Path) -> None:
    tree = scratch / "tree"
    tree.mkdir()
    _put_tree("xfs", tree)
    lines = ["/", "0 0", "d--755 0 0"]

    def describe(folder: Path) -> None:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                lines.append(f"{entry.name} d--755 0 0")
                describe(entry)
            else:
                lines.append(f"{entry.name} ---644 0 0 {entry}")
        lines.append("$")

    describe(tree)
    prototype = scratch / "prototype"
    prototype.write_text("\n".join([*lines, "$"]) + "\n")
    _run(
        ["mkfs.xfs", "-q", "-L", "data", "-m", "uuid=5f0b7a3c-0000-4000-8000-000000000005"]
        + ["-p", str(prototype), str(image)]
    )


def _make_ntfs(image: Path, scratch: Path) -> None:
    offset, length = _partition(image, "gpt", "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7")
    part = scratch / "part"
    with open(part, "wb") as file:
        file.truncate(length)
    argv = ["mkntfs", "-q", "-Q", "-F", "-s", "512", "-p", str(offset // SECTOR), "-H", "255", "-S", "63", "-L", "data"]
    _run([*argv, str(part)])
    for name, content in _files("ntfs").items():
        source = scratch / "file"
        source.write_bytes(content)
        _run(["ntfscp", "-q", "-f", str(part), str(source), name])
    _insert(part, image, offset)


def _make_fat(image: Path, scratch: Path) -> None:
    offset, length = _partition(image, "dos", "6")
    part = scratch / "part"
    with open(part, "wb") as file:
        file.truncate(length)
    _run(["mkfs.fat", "-F", "16", "-i", "5f0b7a3c", "-n", "DATA", "--invariant", str(part)])
    with open(part, "r+b") as file:
        _fill_fat16(file.fileno(), _files("fat"))
    _insert(part, image, offset)


def _fill_fat16(fd: int, files: dict[str, bytes]) -> None:
    """Put files (8.3 names) into the root folder of an empty FAT16."""
    boot = os.pread(fd, 64, 0)
    (sector_bytes, per_cluster, reserved, tables, entries) = struct.unpack_from("<HBHBH", boot, 11)
    (table_sectors,) = struct.unpack_from("<H", boot, 22)
    cluster_bytes = sector_bytes * per_cluster
    root_at = (reserved + tables * table_sectors) * sector_bytes
    data_at = root_at + entries * 32
    table = bytearray(os.pread(fd, table_sectors * sector_bytes, reserved * sector_bytes))
    root = bytearray(os.pread(fd, entries * 32, root_at))
    slot = next(number for number in range(entries) if root[number * 32] == 0)
    cluster = 2
    for name, content in files.items():
        count = -(-len(content) // cluster_bytes)
        for number in range(cluster, cluster + count):
            following = number + 1 if number + 1 < cluster + count else 0xFFFF
            struct.pack_into("<H", table, number * 2, following)
        os.pwrite(fd, content, data_at + (cluster - 2) * cluster_bytes)
        stem, _unused, extension = name.partition(".")
        entry = f"{stem:8}{extension:3}".encode() + b"\x20" + bytes(14)
        root[slot * 32 : slot * 32 + 32] = entry + struct.pack("<HI", cluster if count else 0, len(content))
        slot, cluster = slot + 1, cluster + count
    os.pwrite(fd, root, root_at)
    for number in range(tables):
        os.pwrite(fd, table, (reserved + number * table_sectors) * sector_bytes)


def _make_empty(image: Path, scratch: Path) -> None:
    """Nothing at all."""


def _make_random(image: Path, allocated_bytes: int) -> None:
    """Pieces of 1 MiB spread evenly; each 4 KiB half noise, half pattern: they compress to a half."""
    pieces = max(1, allocated_bytes // MIB)
    total = image.stat().st_size // MIB
    noise = random.Random(f"{image.stat().st_size} {allocated_bytes}")
    with open(image, "r+b") as file:
        for number in range(pieces):
            data = bytearray(MIB)
            half = noise.randbytes(MIB // 2)
            for block in range(256):
                data[block * 4096 : block * 4096 + 2048] = half[block * 2048 : block * 2048 + 2048]
                data[block * 4096 + 2048 : block * 4096 + 4096] = bytes([number % 255 + 1]) * 2048
            os.pwrite(file.fileno(), data, number * total // pieces * MIB)


_MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "ext4": _make_ext4,
    "bootable": _make_bootable,
    "xfs": _make_xfs,
    "ntfs": _make_ntfs,
    "fat": _make_fat,
    "empty": _make_empty,
}


def kinds() -> list[str]:
    """The kinds of contents; besides them ``random:<n>M`` and ``random:<n>%`` (how much of the disk is allocated)."""
    return sorted(_MAKERS)


def known_files(kind: str) -> dict[str, bytes]:
    """What lies in a kind's file system: path -> content."""
    if kind == "bootable":
        return _files("ext4")
    return _files(kind) if kind in _MAKERS and kind != "empty" else {}


def _cache_folder() -> Path:
    folder = _PROJECT_CACHE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # another user's project: this one's cache goes elsewhere
    folder = Path(tempfile.gettempdir()) / f"openvadp-images-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ImageError(f"{folder} belongs to somebody else")
    return folder


def image(kind: str, capacity_bytes: int) -> Path:
    """A raw sparse image of that kind and size, from the cache. It is not to be changed: :func:`install` copies it.

    :raises ImageError: an unknown kind, a size below 32 MiB for a file system, a tool that is missing or fails.
    """
    share = re.fullmatch(r"random:(\d+)(M|%)", kind)
    if kind not in _MAKERS and share is None:
        raise ImageError(f"there is no kind {kind!r} of image, only {', '.join(kinds())}, random:<n>M, random:<n>%")
    if kind in _MAKERS and kind != "empty" and capacity_bytes < SMALLEST_BYTES:
        raise ImageError(f"{kind} wants at least {SMALLEST_BYTES} bytes, not {capacity_bytes}")
    sources = b"".join(Path(source).read_bytes() for source in (__file__, boot_image.__file__))
    version = hashlib.sha256(sources).hexdigest()[:8]
    name = f"{re.sub('[:%]', '-', kind)}-{capacity_bytes}-{version}.raw"
    for result in (_PROJECT_CACHE / name, (folder := _cache_folder()) / name):
        if result.exists():
            return result
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if result.exists():
            return result
        for old in folder.glob("*.raw"):
            if not old.stem.endswith(version):
                old.unlink()
        scratch = Path(tempfile.mkdtemp(dir=folder))
        try:
            made = scratch / "image"
            with open(made, "wb") as file:
                file.truncate(capacity_bytes)
            if share is None:
                _MAKERS[kind](made, scratch)
            else:
                amount = int(share.group(1))
                allocated = amount * MIB if share.group(2) == "M" else capacity_bytes * amount // 100
                if allocated > capacity_bytes:
                    raise ImageError(f"{kind} does not fit into {capacity_bytes} bytes")
                _make_random(made, allocated)
            if made.stat().st_size != capacity_bytes:
                raise ImageError(f"making {kind} changed the image's size")
            os.rename(made, result)
        finally:
            shutil.rmtree(scratch)
    return result


def install(storage: Storage, path: str, kind: str, capacity_bytes: int, *, thin: bool = True) -> None:
    """A new disk with that content."""
    storage.create_disk(path, capacity_bytes, thin=thin)
    storage.adopt(path, image(kind, capacity_bytes))
