# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Images with what mkfs' tools offer, filled by Linux or by the tools: what comes out is what they show, or is refused.

A few kinds here; `make soak` makes SOAK_IMAGES of them, with options that SOAK_SEED chooses, and shows some of them to
libguestfs, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystem import broken
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.filesystems import open_file_system

IMAGES = int(os.environ.get("SOAK_IMAGES", "0"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
MIB = 1 << 20

#: What is known of a file: kind, size, SHA-256 or target, mode, owners, time.
Facts = Tuple[Any, ...]


class Kind(NamedTuple):
    """How an image is made, and how it is filled."""

    name: str
    size: int
    make: List[str]
    mount: Optional[List[str]] = None
    small: Dict[str, str] = {}
    owners: bool = True
    ignores_case: bool = False


def chosen(dice: random.Random, options: Sequence[str], share: float = 0.5) -> List[str]:
    return [option for option in options if dice.random() < share]


def ext(dice: random.Random) -> Kind:
    base = dice.choice(["ext2", "ext3", "ext4", "ext4", "ext4", "ext4"])
    block = dice.choice(["1024", "2048", "4096", "4096"])
    features = ["sparse_super", "large_file", "dir_index", "ext_attr", "filetype", "^filetype", "^dir_index"]
    if base == "ext4":
        features += [
            "64bit",
            "^64bit",
            "^extent",
            "flex_bg",
            "^flex_bg",
            "meta_bg,^resize_inode",
            "bigalloc",
            "metadata_csum",
        ]
        features += [
            "^metadata_csum,uninit_bg",
            "inline_data",
            "large_dir",
            "^huge_file",
            "sparse_super2",
            "ea_inode",
            "casefold",
        ]
        features += [
            "encrypt",
            "verity",
            "project",
            "quota",
            "mmp",
            "^has_journal",
            "orphan_file",
            "stable_inodes",
            "dir_nlink",
        ]
        features += ["metadata_csum_seed", "^extra_isize", "fast_commit", "^sparse_super", "^large_file"]
    words = ["mke2fs", "-q", "-F", "-t", base, "-b", block, "-I", dice.choice(["128", "256", "256", "512", "1024"])]
    picked = chosen(dice, features, 0.15)
    if "^extent" in picked:
        picked = [one for one in picked if one != "64bit"] + ["^64bit"]
    if "bigalloc" in picked:
        words += ["-C", str(int(block) * dice.choice([2, 16]))]
    if picked:
        words += ["-O", ",".join(picked)]
    if dice.random() < 0.3:
        words += ["-g", dice.choice(["256", "1024", "2048"])]
    if dice.random() < 0.3:
        words += ["-L", "Label é"]
    return Kind(base, 48 * MIB, [*words, "IMAGE"], ["-t", "ext4"])


def xfs(dice: random.Random) -> Kind:
    four = dice.random() < 0.3
    block = dice.choice(["512", "1024", "2048", "4096", "4096"] if four else ["1024", "2048", "4096", "4096"])
    words = ["mkfs.xfs", "-q", "-f", "-b", f"size={block}", "-m", f"crc={0 if four else 1}"]
    sizes = [str(1 << shift) for shift in range(12, 17) if 1 << shift >= int(block)]
    names = [f"size={dice.choice(sizes)}"]
    least = 256 if four else 512
    inodes = [f"size={dice.choice([one for one in (256, 512, 1024, 2048) if least <= one <= int(block) // 2])}"]
    if four:
        names += chosen(dice, ["ftype=0", "version=ci"], 0.3)
    else:
        meta = [f"{name}={dice.randrange(2)}" for name in ("reflink", "rmapbt", "bigtime")]
        words += ["-m", ",".join([*meta, dice.choice(["finobt=0,inobtcount=0", "inobtcount=0", "inobtcount=1"])])]
        inodes += [f"nrext64={dice.randrange(2)}", f"sparse={dice.randrange(2)}"]
    words += ["-n", ",".join(names), "-i", ",".join(inodes), "-d", f"agcount={dice.choice([1, 2, 4])}"]
    return Kind("xfs", 64 * MIB, [*words, "IMAGE"], ["-t", "xfs"])


def btrfs(dice: random.Random) -> Kind:
    words = ["mkfs.btrfs", "-q", "-f", "--csum", dice.choice(["crc32c", "xxhash", "sha256", "blake2"])]
    features = ["^no-holes", "^extref", "^skinny-metadata"]
    picked = chosen(dice, features, 0.25)
    if picked:
        words += ["-O", ",".join(picked)]
    running = chosen(dice, ["quota", "^free-space-tree"], 0.2)
    if running:
        words += ["-R", ",".join(running)]
    if dice.random() < 0.2:
        words += ["-M", "-n", "4096"]
    else:
        words += ["-n", dice.choice(["4096", "16384", "65536"]), "-m", dice.choice(["single", "dup"])]
        words += ["-d", dice.choice(["single", "dup"])]
    compress = dice.choice(["no", "zlib", "lzo", "zstd", "zstd:9"])
    more = ["compress-force=" + compress] if compress != "no" else chosen(dice, ["nodatacow", "max_inline=0"])
    return Kind("btrfs", 256 * MIB, [*words, "IMAGE"], ["-t", "btrfs", *(["-o", ",".join(more)] if more else [])])


def ntfs(dice: random.Random) -> Kind:
    cluster = dice.choice(["512", "1024", "2048", "4096", "4096", "8192", "65536", "131072"])
    sector = dice.choice(["512", "512", "512", "1024", "4096"])
    cluster = max(cluster, sector, key=int)
    words = ["mkntfs", "-q", "-Q", "-F", "-s", sector, "-c", cluster, "-p", "0", "-H", "255", "-S", "63"]
    compressed = int(cluster) <= 4096 and dice.random() < 0.5
    words += ["-C"] if compressed else []
    words += ["-L", "Daten"] if dice.random() < 0.5 else []
    options = "compression,streams_interface=none" if compressed else "streams_interface=none"
    small = {"compressed": "yes"} if compressed else {}
    return Kind("ntfs", 64 * MIB, [*words, "IMAGE"], ["-t", "ntfs-3g", "-o", options], small, False, True)


def fat(dice: random.Random) -> Kind:
    bits, size, clusters = dice.choice(
        [("12", 3, [1, 2]), ("12", 16, [8, 16, 64]), ("16", 24, [2, 4, 8]), ("16", 64, [4, 16]), ("32", 48, [1])]
    )
    words = ["mkfs.fat", "-F", bits, "-s", str(dice.choice(clusters))]
    # Fewer clusters than others take for FAT32 are what mtools does not fill, and FAT16 needs enough of them.
    sector = "512" if bits == "32" or size == 24 else dice.choice(["512", "512", "1024", "4096"])
    # A root directory that ends within a sector is refused.
    entries = "512" if sector != "512" else dice.choice(["112", "512"])
    words += ["-S", sector, "-f", dice.choice(["1", "2"]), "-r", entries]
    words += ["-R", dice.choice(["2", "8", "32"] if bits == "32" else ["1", "8", "32"])]
    words += ["-n", "DATA"] if dice.random() < 0.5 else []
    return Kind("fat", size * MIB, [*words, "IMAGE"], None, {}, False, True)


MAKERS: Dict[str, Callable[[random.Random], Kind]] = {"ext": ext, "xfs": xfs, "btrfs": btrfs, "ntfs": ntfs, "fat": fat}


class Filler:
    """Files of all the kinds that lie on disks in different ways."""

    def __init__(self, dice: random.Random, top: Path, kind: Kind, few: bool) -> None:
        self.dice = dice
        self.few = few
        self.top = top
        self.plain = kind.name in ("ntfs", "fat")
        self.compressed = bool(kind.small)
        self.kind = kind

    def run(self) -> None:
        steps = [self._sizes, self._names]
        if self.kind.name != "fat":
            steps += [self._holes, self._links, self._fragments, self._many]
        if not self.plain:
            steps.insert(2, self._special)
        for step in steps:
            # It may be full, or have no more room for inodes. What is there counts.
            with contextlib.suppress(OSError):
                step()

    def _bytes(self, length: int) -> bytes:
        if self.dice.random() < 0.5:
            return self.dice.randbytes(length)
        # What can be compressed, and zeros in between.
        pattern = bytes(self.dice.choices(b"abcd \0", k=37))
        return (pattern * (length // 37 + 1))[:length]

    def _sizes(self) -> None:
        folder = self.top / "sizes"
        folder.mkdir()
        most = 200_000 if self.kind.size < 8 * MIB else 700_000
        for size in (
            0,
            1,
            55,
            59,
            60,
            61,
            100,
            156,
            400,
            511,
            512,
            513,
            700,
            4095,
            4096,
            4097,
            65536,
            65537,
            131072,
            most,
        ):
            (folder / f"s{size}").write_bytes(self._bytes(size))

    def _names(self) -> None:
        folder = self.top / "names"
        folder.mkdir()
        names = [
            "two words",
            "日本語.txt",
            "ünï.TXT",
            "UPPER.TXT",
            "lower.ext",
            "Mixed.Case",
            "x" * 200,
            "a.b.c.d",
            "$dollar",
        ]
        if not self.plain:
            names += [
                os.fsdecode(one) for one in (b"two\nlines", b"\x1b[A", b"bytes\xff\xfe", b"*?[x]", b"back\\slash")
            ]
            names += ["y" * 255]
        for name in names:
            # Where names have to be UTF-8, some are refused.
            with contextlib.suppress(OSError):
                (folder / name).write_bytes(os.fsencode(name))
        # Gaps among entries, of which some are filled.
        for number in range(60):
            (folder / f"gone-{number}").write_bytes(b"gone")
        for number in range(0, 60, 3):
            (folder / f"gone-{number}").unlink()
        for number in range(1, 60, 7):
            if (folder / f"gone-{number}").exists():
                (folder / f"gone-{number}").rename(folder / f"a-longer-name-than-before-{number}")

    def _holes(self) -> None:
        folder = self.top / "holes"
        folder.mkdir()
        with (folder / "sparse").open("wb") as file:
            file.write(b"begin")
            file.seek(3 * MIB)
            file.write(self._bytes(9000))
            file.truncate(5 * MIB + 5)
        with (folder / "only").open("wb") as file:
            file.truncate(MIB + 1)
        with (folder / "shrunk").open("wb") as file:
            file.write(self._bytes(300_000))
            file.truncate(70_001)
            file.flush()
            os.fsync(file.fileno())
            file.truncate(200_000)
        with (folder / "rewritten").open("wb") as file:
            file.write(self._bytes(600_000))
            file.flush()
            os.fsync(file.fileno())
            for _number in range(12):
                file.seek(self.dice.randrange(600_000))
                file.write(self._bytes(self.dice.randrange(1, 20_000)))
        if self.plain:
            return
        for name, mode in (("reserved", []), ("kept", ["-n"]), ("punched", ["-p"]), ("zeroed", ["-z"])):
            path = folder / name
            path.write_bytes(self._bytes(400_000))
            subprocess.run(["sync", str(path)], check=True)
            begin, length = self.dice.randrange(0, 300_000), self.dice.randrange(1, 300_000)
            words = ["fallocate", *mode, "-o", str(begin), "-l", str(length), str(path)]
            subprocess.run(words, check=False, capture_output=True)
        with (folder / "prepared").open("wb") as file:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, 500_000)
            file.seek(120_000)
            file.write(self._bytes(50_000))

    def _links(self) -> None:
        folder = self.top / "links"
        folder.mkdir()
        (folder / "file").write_text("linked")
        if self.plain:
            os.link(folder / "file", folder / "hard")
            return
        os.link(folder / "file", folder / "hard")
        for length in (1, 20, 55, 59, 60, 61, 100, 150, 300, 900, 1000, 1023):
            # Some file systems take shorter ones only.
            with contextlib.suppress(OSError):
                os.symlink("t" * length, folder / f"l{length}")

    def _many(self) -> None:
        counts = [3, self.dice.choice([40, 300]), self.dice.choice([900, 2500])]
        for count in (3, 300) if self.few else counts:
            folder = self.top / f"many{count}"
            folder.mkdir()
            for number in range(count):
                name = f"file-{number:05}-{'n' * self.dice.randrange(60)}"
                (folder / name).write_bytes(b"%d" % number if number % 50 == 0 else b"")
            for path in list(folder.iterdir())[:: self.dice.choice([3, 7])]:
                path.unlink()
            for number in range(10):
                (folder / f"later-{number}").mkdir()

    def _special(self) -> None:
        folder = self.top / "special"
        folder.mkdir()
        os.mkfifo(folder / "fifo")
        os.mknod(folder / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(folder / "block", 0o600 | stat.S_IFBLK, os.makedev(7, 200))
        path = folder / "owned"
        path.write_text("owned")
        os.chown(path, 70000, 70001)
        path.chmod(0o4751)
        for name, when in (("old", -1_000_000_000), ("new", 1_900_000_000), ("late", 3_000_000_000)):
            (folder / name).write_text(name)
            os.utime(folder / name, ns=(when * 10**9 + 123456789, when * 10**9 + 123456789))
        with contextlib.suppress(OSError):
            os.setxattr(path, "user.large", bytes(self.dice.randbytes(900)))
        with contextlib.suppress(subprocess.CalledProcessError):
            words = ["cp", "--reflink=always", str(self.top / "sizes" / "s131072"), str(folder / "reflinked")]
            subprocess.run(words, check=True, capture_output=True)
            with (folder / "reflinked").open("r+b") as file:
                file.seek(50_000)
                file.write(self._bytes(5000))

    def _fragments(self) -> None:
        folder = self.top / "fragments"
        folder.mkdir()
        # Two files that grow in turn, and one in the gaps of others.
        with (folder / "a").open("wb") as first, (folder / "b").open("wb") as second:
            for _number in range(self.dice.choice([10, 150])):
                for file in (first, second):
                    file.write(self._bytes(self.dice.randrange(1, 9000)))
                    file.flush()
                    if not self.plain:
                        os.fsync(file.fileno())
        with (folder / "comb").open("wb") as file:
            for number in range(self.dice.choice([20, 700])):
                file.seek(number * 8192)
                file.write(self._bytes(self.dice.choice([100, 4096])))


def truth(top: Path, owners: bool) -> Dict[bytes, Facts]:
    """What there is in a folder, as Linux shows it."""
    found: Dict[bytes, Facts] = {}
    begin = os.fsencode(top)
    for folder, folders, names in os.walk(begin):
        for name in folders + names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            facts: Facts = ("other",)
            if stat.S_ISLNK(status.st_mode):
                facts = ("link", os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                facts = ("directory",)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    facts = ("file", status.st_size, hashlib.sha256(file.read()).hexdigest())
            if owners and facts[0] != "other":
                facts += (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
            found[path[len(begin) :]] = facts
    return found


def read_back(image: Path, owners: bool) -> Tuple[Dict[bytes, Facts], Dict[bytes, str]]:
    """What this reader says that there is, and what it can't read."""
    found: Dict[bytes, Facts] = {}
    refused: Dict[bytes, str] = {}
    with image.open("rb") as volume:
        try:
            system = open_file_system(volume, image.stat().st_size)
            assert system is not None
            todo: List[Tuple[bytes, Any]] = [(b"", system.root())]
        except broken() as error:
            return {}, {b"/": str(error)}
        while todo:
            folder, node = todo.pop()
            entries = system.entries(node)
            while True:
                try:
                    name, child = next(entries)
                except StopIteration:
                    break
                except broken() as error:
                    refused[folder] = str(error)
                    break
                path = folder + b"/" + os.fsencode(name)
                assert path not in found, path
                try:
                    info = system.info(child)
                    facts: Facts = (info.kind,)
                    if info.kind == "link":
                        facts += (os.fsencode(system.link(child)),)
                    elif info.kind == "file":
                        digest, length = hashlib.sha256(), 0
                        for piece in system.read(child):
                            data = bytes(piece) if isinstance(piece, int) else piece
                            digest.update(data)
                            length += len(data)
                        assert length == info.size, path
                        facts += (info.size, digest.hexdigest())
                    elif info.kind == "directory":
                        todo.append((path, child))
                except broken() as error:
                    refused[path] = str(error)
                    continue
                if owners and facts[0] != "other":
                    facts += (info.mode, info.uid, info.gid, info.mtime_ns)
                found[path] = facts
    return found, refused


@contextlib.contextmanager
def mounted(c: Any, image: Path, place: Path, options: Sequence[str]) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    if "ntfs-3g" in options:
        c.tool("ntfs-3g", "-o", options[options.index("-o") + 1], image, place)
    else:
        c.tool("mount", "-o", "loop", *options, image, place)
    try:
        yield place
    finally:
        c.tool("umount", place)


class NotMade(Exception):
    """The tools don't go together with the options, or Linux does not mount it."""


def made(c: Any, folder: Path, kind: Kind, dice: random.Random, few: bool = False) -> Tuple[Path, Dict[bytes, Facts]]:
    """An image that is filled, and what is in there."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(kind.size)
    try:
        c.tool(*[str(image) if word == "IMAGE" else word for word in kind.make])
    except AssertionError as error:
        raise NotMade(str(error)) from None
    if kind.mount is None:
        try:
            return image, filled_by_tools(c, folder, image, kind, dice, few)
        except AssertionError as error:
            raise NotMade(str(error)) from None
    place = folder / "mounted"
    try:
        with mounted(c, image, place, kind.mount):
            pass
    except AssertionError as error:
        return image, filled_by_mkfs(c, folder, image, kind, dice, few, str(error))
    with mounted(c, image, place, kind.mount):
        if kind.small:
            os.setxattr(place, "system.ntfs_attrib_be", (0x800).to_bytes(4, "big"))
        Filler(dice, place, kind, few).run()
        c.tool("sync", "-f", place)
    with mounted(c, image, place, kind.mount):
        return image, truth(place, kind.owners)


def filled_by_mkfs(
    c: Any, folder: Path, image: Path, kind: Kind, dice: random.Random, few: bool, why: str
) -> Dict[bytes, Facts]:
    """What this Linux does not mount, by the program that made it."""
    tree = folder / "tree"
    tree.mkdir()
    Filler(dice, tree, kind, few).run()
    shutil.rmtree(tree / "special", ignore_errors=True)
    if "inline_data" in " ".join(kind.make):
        # mke2fs takes holes at the end of a file for nothing then, as debugfs shows.
        shutil.rmtree(tree / "holes")
    more: List[str] = ["-d", str(tree)]
    if kind.name == "xfs":
        shutil.rmtree(tree / "names", ignore_errors=True)
        shutil.rmtree(tree / "links", ignore_errors=True)
        more = ["-p", str(c.xfs_prototype(tree, folder / "prototype"))]
    elif not kind.name.startswith("ext"):
        raise NotMade(why)
    image.unlink()
    with image.open("wb") as file:
        file.truncate(kind.size)
    try:
        c.tool(*kind.make[:-1], *more, image)
    except AssertionError as error:
        raise NotMade(str(error)) from None
    if not kind.name.startswith("ext"):
        return {path: facts[:3] if facts[0] == "file" else facts[:1] for path, facts in truth(tree, False).items()}
    # It does not keep the times of directories.
    expected = {path: facts[:-1] for path, facts in truth(tree, True).items()}
    expected[b"/lost+found"] = ("made by mkfs",)
    return expected


def filled_by_tools(
    c: Any, folder: Path, image: Path, kind: Kind, dice: random.Random, few: bool
) -> Dict[bytes, Facts]:
    """FAT, by mtools: some files go, and others take their clusters."""
    tree = folder / "tree"
    tree.mkdir()
    Filler(dice, tree, kind, few).run()
    small = folder / "small"
    numbers = range(40)
    for number in numbers:
        small.write_bytes(dice.randbytes(dice.randrange(1, 9000)))
        c.tool("mcopy", "-i", image, small, f"::s{number}")
    for number in numbers[::2]:
        c.tool("mdel", "-i", image, f"::s{number}")
    # mtools puts it into a short name, of a code page that the file system does not tell.
    (tree / "names" / "ünï.TXT").unlink()
    c.tool("mcopy", "-s", "-i", image, tree / "sizes", tree / "names", "::")
    for number in numbers[1::2]:
        c.tool("mdel", "-i", image, f"::s{number}")
    if kind.size < 8 * MIB:
        return truth(tree, False)
    shutil.copytree(tree / "sizes", tree / "again")
    c.tool("mcopy", "-s", "-i", image, tree / "again", "::")
    return truth(tree, False)


def differences(expected: Dict[bytes, Facts], found: Dict[bytes, Facts], refused: Dict[bytes, str]) -> List[str]:
    """What is wrong: neither right nor refused."""
    if b"/" in refused and not found:
        return []
    wrong = []
    for path, facts in expected.items():
        told = any(path == one or path.startswith(one + b"/") for one in refused)
        if path not in found and not told:
            wrong.append(f"{path!r} is missing")
        elif path in found and found[path][: len(facts)] != facts and facts[0] != "made by mkfs":
            wrong.append(f"{path!r}: {found[path]} instead of {facts}")
    wrong += [f"{path!r} is not there" for path in found if path not in expected]
    return wrong


def refusals_of(refused: Dict[bytes, str], kind: Kind) -> List[str]:
    """What should have been read: these tools make nothing that is not known."""
    return sorted({f"{kind.name}: {reason}" for reason in refused.values()})


QUICK = [
    Kind(
        "ext4",
        24 * MIB,
        ["mke2fs", "-q", "-F", "-t", "ext4", "-N", "6000", "-O", "inline_data,bigalloc", "-C", "16384", "IMAGE"],
        ["-t", "ext4"],
    ),
    Kind(
        "ext4",
        24 * MIB,
        [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "1024",
            "-N",
            "6000",
            "-g",
            "256",
            "-O",
            "meta_bg,^resize_inode",
            "IMAGE",
        ],
        ["-t", "ext4"],
    ),
    Kind("xfs", 48 * MIB, ["mkfs.xfs", "-q", "-f", "-b", "size=1024", "-n", "size=16384", "IMAGE"], ["-t", "xfs"]),
    Kind("btrfs", 112 * MIB, ["mkfs.btrfs", "-q", "-f", "IMAGE"], ["-t", "btrfs", "-o", "compress-force=zstd"]),
    Kind(
        "ntfs",
        32 * MIB,
        ["mkntfs", "-q", "-Q", "-F", "-s", "512", "-c", "512", "-p", "0", "-H", "255", "-S", "63", "-C", "IMAGE"],
        ["-t", "ntfs-3g", "-o", "compression"],
        {"compressed": "yes"},
        False,
        True,
    ),
    Kind("fat", 16 * MIB, ["mkfs.fat", "-F", "12", "-s", "16", "-S", "512", "IMAGE"], None, {}, False, True),
]


@pytest.mark.parametrize("number", range(len(QUICK)))
def test_what_was_put_in_comes_out(c: Any, tmp_path: Path, number: int) -> None:
    kind = QUICK[number]
    image, expected = made(c, tmp_path, kind, random.Random(number), few=True)
    found, refused = read_back(image, kind.owners)
    assert len(expected) > 40 and not refused
    assert differences(expected, found, refused) == []


JOURNALS = [
    ["-b", "1024"],
    ["-b", "4096", "-O", "^metadata_csum"],
    ["-b", "4096", "-O", "^64bit,^metadata_csum"],
    ["-t", "ext3", "-b", "2048"],
]


@pytest.mark.parametrize("options", JOURNALS if IMAGES else JOURNALS[:1])
def test_a_journal_that_was_not_empty(c: Any, tmp_path: Path, options: List[str]) -> None:
    """A copy made while Linux had it mounted, as a snapshot is: it comes out as Linux shows it after its replay."""
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.touch()
    os.truncate(image, 48 * MIB)
    c.tool("mke2fs", "-q", "-F", *(() if "-t" in options else ("-t", "ext4")), *options, image)
    kind = Kind("ext4", 48 * MIB, [])
    place = tmp_path / "mounted"
    place.mkdir()
    # Until the next commit nobody would see what comes after it.
    c.tool("mount", "-o", "loop,commit=600", "-t", "ext4", image, place)
    try:
        Filler(random.Random(5), place, kind, True).run()
        (place / "renamed").mkdir()
        c.tool("sync", "-f", place)
        shutil.rmtree(place / "many3")
        for number in range(40):
            (place / "names" / f"new{number}").write_bytes(b"new" * 1000)
            (place / "holes" / "sparse").rename(place / "renamed" / "sparse") if number == 20 else None
        shutil.rmtree(place / "fragments")
        # The data go to their places, the rest into the journal.
        with (place / "sizes" / "s1").open("ab") as file:
            file.write(b"more")
            file.flush()
            os.fsync(file.fileno())
        shutil.copy(image, copy)
    finally:
        c.tool("umount", place)
    found, refused = read_back(copy, True)
    with copy.open("rb") as volume:
        system = open_file_system(volume, copy.stat().st_size)
        assert system is not None and system.unclean is None and system.mind() == []
    before = copy.read_bytes()
    with mounted(c, copy, place, ["-t", "ext4"]):
        expected = truth(place, True)
    assert before != copy.read_bytes() and b"/names/new39" in expected and b"/fragments" not in expected
    assert not refused and differences(expected, found, refused) == []


@pytest.mark.soak
@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_images_by_the_hundred(c: Any, tmp_path: Path, maker: str) -> None:
    count = made_count = 0
    wrong: List[str] = []
    refusals: List[str] = []
    not_made: List[str] = []
    while count < max(1, IMAGES // len(MAKERS)):
        count += 1
        dice = random.Random(f"{SEED} {maker} {count}")
        kind = MAKERS[maker](dice)
        folder = tmp_path / f"{count}"
        folder.mkdir()
        try:
            image, expected = made(c, folder, kind, dice)
        except NotMade as error:
            shutil.rmtree(folder)
            not_made.append(str(error)[:400])
            continue
        made_count += 1
        found, refused = read_back(image, kind.owners)
        told = differences(expected, found, refused)
        wrong += [f"{' '.join(kind.make)} {kind.mount}: {one}" for one in told[:5]]
        refusals += [f"{' '.join(kind.make)}: {one}" for one in refusals_of(refused, kind)]
        shutil.rmtree(folder)
    print(
        json.dumps(
            {"kind": maker, "made": made_count, "of": count, "refusals": refusals, "not made": not_made}, indent=1
        )
    )
    assert wrong == []
    assert made_count >= count // 3


def facts_of(disks: Any, reader: str) -> Tuple[Dict[Tuple[str, str], Facts], Dict[str, str], List[str]]:
    """{volume and path: what is told}, the reasons of what is not, and the volumes that can't be read."""
    # Without KVM, and on a machine that has much to do, it takes minutes.
    options: Dict[str, Any] = {"checksums": True, "limit": 1000000, "io_timeout": 1800}
    result = disks.restore("/**", list_only=True, reader=reader, **options)
    told: Dict[Tuple[str, str], Facts] = {}
    for one in result["files"]:
        facts: Facts = (one["type"],)
        if one["type"] == "file":
            facts += (one["size"], one["sha256"], one["mtime"])
        elif one["type"] == "link":
            facts += (one["target"],)
        told[(one["volume"], one["path"])] = facts + (one["mode"], one["uid"], one["gid"])
    reasons = {f"{one['volume']}{one['path']}": one["reason"] for one in result["skipped_files"]}
    return told, reasons, [one["name"] for one in result["volumes"] if not one["readable"]]


@pytest.mark.soak
def test_both_readers_show_the_same(
    c: Any, disks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lvm_images: List[bytes]
) -> None:
    """A disk of each kind, and two physical volumes with a striped volume, in one virtual machine of libguestfs."""
    environment = c.ROOT / "build" / "appliance" / "environment.json"
    if environment.exists():
        for name, value in json.loads(environment.read_text()).items():
            monkeypatch.setenv(name, value)
    images: List[bytes] = []
    expected: List[Dict[bytes, Facts]] = []
    for number, kind in enumerate(QUICK):
        folder = tmp_path / f"image{number}"
        folder.mkdir()
        image, there = made(c, folder, kind, random.Random(100 + number), few=True)
        images.append(image.read_bytes())
        expected.append(there)
        image.unlink()
    disks.several([*images, *lvm_images])
    ours, our_reasons, our_unread = facts_of(disks, "dissect")
    theirs, their_reasons, their_unread = facts_of(disks, "guestfish")
    assert not our_unread and not their_unread
    assert {place for place, reason in our_reasons.items() if "it is a" not in reason} == set()
    assert set(our_reasons) == set(their_reasons)
    assert set(ours) == set(theirs)
    assert [(place, ours[place], theirs[place]) for place in ours if ours[place] != theirs[place]] == []
    for number, there in enumerate(expected):
        sums = {os.fsdecode(path): facts[2] for path, facts in there.items() if facts[0] == "file"}
        told = {
            path: facts[2]
            for (volume, path), facts in ours.items()
            if volume == f"{2000 + number}" and facts[0] == "file"
        }
        assert sorted(told.values()) == sorted(sums.values())
    assert ours[("vg0/root", "/inside")][1:3] == (7, hashlib.sha256(b"striped").hexdigest())
