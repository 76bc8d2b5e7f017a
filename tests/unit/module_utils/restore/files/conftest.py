# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""File systems made by their own tools, as an ordinary user could, in disks of restore points."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import agent, run
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.disk import ReadOnly
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.frames import FrameReader
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.request import FilesRequest

MIB = 1 << 20
BLOCK = 64 << 10
ROOT = Path(__file__).resolve().parents[5]
#: Names as guests have them: spaces, a line's end, Japanese, an arrow key, bytes that are no UTF-8.
ODD_NAMES = [
    b"two words",
    b"two\nlines",
    "日本語.txt".encode(),
    b"\x1b[A",
    b"bytes\xff\xfe",
    b"-rf",
    b"*?[x]",
    b"back\\slash",
]


def _repository_conftest() -> Any:
    path = Path(__file__).resolve().parents[2] / "repository" / "conftest.py"
    spec = importlib.util.spec_from_file_location("files_tests_repository", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_repository = _repository_conftest()


def tool(*argv: Any, **options: Any) -> str:
    """Run a tool that makes file systems."""
    # Without these mkfs.xfs makes nothing below 300 MiB.
    small = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
    env = {
        **os.environ,
        **small,
        "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
        "MTOOLS_SKIP_CHECK": "1",
    }
    words = [word if isinstance(word, bytes) else os.fsencode(str(word)) for word in argv]
    done = subprocess.run(words, check=False, capture_output=True, env=env, **options)
    assert done.returncode == 0, (argv, done.stderr, done.stdout)
    return done.stdout.decode("utf-8", "replace")


def sums(tree: Path) -> Dict[bytes, str]:
    """{path: SHA-256} of the files of a folder."""
    found = {}
    top = os.fsencode(tree)
    for folder, _folders, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    found[path[len(top) :]] = hashlib.sha256(file.read()).hexdigest()
    return found


class Disks:
    """A repository whose points hold what tests put on a disk."""

    def __init__(self, folder: Path, world: Any = None) -> None:
        self.folder = folder
        self.world = world or _repository.World(folder / "repository")
        self.dest = folder / "dest"
        self.dest.mkdir()

    def image(self, size: int) -> Path:
        path = self.folder / "image"
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def chain(self, image: Path, layers: int = 7, names: Optional[Sequence[str]] = None) -> None:
        """Points p1, p2...: the newest holds the image, of which each of its layers has a part."""
        final = image.read_bytes()
        used = [start for start in range(0, len(final), BLOCK) if final[start : start + BLOCK].count(0) != BLOCK]
        parent = None
        for number in range(layers):
            writes: List[Tuple[int, bytes]] = []
            for index, start in enumerate(used):
                piece = final[start : start + BLOCK]
                if index % layers == number:
                    self._add(writes, start, piece)
                elif number == 0:
                    # Something else, until a later point puts it right.
                    self._add(writes, start, piece[::-1])
            name = names[number] if names else f"p{number + 1}"
            self.world.point(name, len(final), writes, parent=parent)
            parent = name

    def several(self, images: Sequence[bytes], name: str = "p1") -> None:
        """A point with a disk of each image: 2000, 2001 and so on."""
        world = self.world
        key = _repository.KEY
        entries = []
        try:
            with world.store.lock(_repository.new_run_id(), "test"):
                for number, image in enumerate(images):
                    _repository.KEY = 2000 + number
                    writes: List[Tuple[int, bytes]] = []
                    for start in range(0, len(image), BLOCK):
                        piece = image[start : start + BLOCK]
                        if piece.count(0) != len(piece):
                            self._add(writes, start, piece)
                    entry = world.layer(name, len(image), writes)
                    uuid = f"6000C29a-1111-2222-3333-{number:012d}"
                    entries.append(dict(entry, key=2000 + number, label=f"Hard disk {number + 1}", uuid=uuid))
                    entries[-1]["file"] = f"[vmfs01] app01/app01_{number}.vmdk"
                manifest = _repository.manifest_of(name, 1, entries, repository_id=world.repository.id)
                manifest["configuration"] = world.store.write_config(name, world.config)
                world.store.commit_point(manifest)
        finally:
            _repository.KEY = key

    def follow(self, name: str, parent: str, before: bytes, after: bytes) -> None:
        """A point of what changed."""
        writes: List[Tuple[int, bytes]] = []
        for start in range(0, len(after), BLOCK):
            if before[start : start + BLOCK] != after[start : start + BLOCK]:
                self._add(writes, start, after[start : start + BLOCK])
        self.world.point(name, len(after), writes, parent=parent)

    @staticmethod
    def _add(writes: List[Tuple[int, bytes]], start: int, piece: bytes) -> None:
        if writes and writes[-1][0] + len(writes[-1][1]) == start and len(writes[-1][1]) < MIB:
            writes[-1] = (writes[-1][0], writes[-1][1] + piece)
        else:
            writes.append((start, piece))

    def request(self, *paths: str, **options: Any) -> FilesRequest:
        fields: Dict[str, Any] = {"repository": str(self.world.repository.path), "vm_uuid": self.world.store.uuid}
        if not options.get("list_only"):
            fields["dest"] = str(self.dest)
        return FilesRequest(paths=paths, **{**fields, **options})

    def restore(self, *paths: str, check_mode: bool = False, **options: Any) -> Dict[str, Any]:
        return run.restore_files(self.request(*paths, **options), check_mode)

    def list(self, *paths: str, **options: Any) -> Dict[str, Dict[str, Any]]:
        """{path: file} of what is listed."""
        result = self.restore(*paths, list_only=True, **options)
        return {file["path"]: file for file in result["files"]}


class Looked(NamedTuple):
    """What the reader's process says of some disks."""

    volumes: Dict[str, Tuple[str, bool, str]]
    #: volume and path -> what a file holds, or its kind
    files: Dict[Tuple[str, str], Any]
    skipped: Dict[str, str]


class _PlainDisk(ReadOnly):
    """An image in the place of a disk of a restore point."""

    damage = None

    def __init__(self, layers: Sequence[Dict[str, str]], capacity_bytes: int, run_dir: str) -> None:
        super().__init__(capacity_bytes)
        self._file = open(layers[0]["layer"], "rb")  # noqa: SIM115

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        self._file.close()
        super().close()


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Looked]:
    """Let the reader's process look at images, in this process and without a repository: it takes milliseconds."""
    monkeypatch.setattr(agent, "CheckedDisk", _PlainDisk)

    def looked(*images: bytes, keys: Sequence[int] = ()) -> Looked:
        found = Looked({}, {}, {})
        numbers: List[str] = []
        files: List[Tuple[Tuple[str, str], int]] = []
        disks = []
        for number, image in enumerate(images):
            path = tmp_path / f"look-{number}"
            path.write_bytes(image)
            if not keys or 2000 + number in keys:
                disks.append({"key": 2000 + number, "layers": [{"layer": str(path)}], "capacity_bytes": len(image)})
        out = os.memfd_create("frames")
        answers = os.open(f"/proc/self/fd/{out}", os.O_RDONLY)
        reader = FrameReader(answers, 1)

        def asked() -> Iterator[bytes]:
            yield json.dumps({"op": "open", "disks": disks, "run_dir": "/run"}).encode()
            document = reader.next()[1]
            for one in document["volumes"]:
                numbers.append(one["name"])
                assert one["name"] not in found.volumes
                found.volumes[one["name"]] = (one["type"], one["readable"], one["problem"] or "")
            readable = [number for number, one in enumerate(document["volumes"]) if one["readable"]]
            walk = {"op": "walk", "volumes": readable, "patterns": ["/**"], "recurse": True, "limit": 10000}
            yield json.dumps(walk).encode()
            while "end" not in document:
                document = reader.next()[1]
                if "skipped" in document:
                    found.skipped[document["skipped"]["path"]] = document["skipped"]["reason"]
                elif "file" in document:
                    one = document["file"]
                    place = (numbers[one["volume"]], one["path"])
                    found.files[place] = one.get("target", one["kind"])
                    if "id" in one:
                        files.append((place, one["id"]))
            for place, handle in files:
                yield json.dumps({"op": "read", "id": handle}).encode()
                parts = []
                kind, content = reader.next()
                while kind != b"J":
                    parts.append(bytes(content) if kind == b"H" else content)
                    kind, content = reader.next()
                found.files[place] = b"".join(parts)
                if "problem" in content:
                    found.skipped[place[1]] = content["problem"]
                    del found.files[place]

        try:
            agent.Agent(out).serve(asked())
        finally:
            os.close(out)
            os.close(answers)
        return found

    return looked


@pytest.fixture
def lvm_images(tmp_path: Path) -> List[bytes]:
    """Two physical volumes by LVM's own tools, with a striped volume whose file system has a file "inside"."""
    paths = [tmp_path / "pv0", tmp_path / "pv1"]
    devices: List[str] = []
    config = "devices { use_devicesfile=0 obtain_device_list_from_udev=0 global_filter=%s }"
    config += " activation { udev_sync=0 udev_rules=0 }"
    os.environ["LVM_SYSTEM_DIR"] = str(tmp_path / "lvm")

    def lvm(command: str, *arguments: Any) -> str:
        allowed = json.dumps([f"a|^({'|'.join(devices)})$|", "r|.*|"])
        return tool(ROOT / "build/lvm2/lvm", command, "--config", config % allowed, *arguments)

    try:
        for path in paths:
            path.touch()
            os.truncate(path, 24 * MIB)
            devices.append(tool("losetup", "-f", "--show", path).strip())
        lvm("pvcreate", *devices)
        lvm("vgcreate", "vg0", *devices)
        striped = ["-an", "-Zn", "-Wn", "--driverloaded", "n", "-y", "-i", "2", "-I", "64k", "-L", "16m", "-n", "root"]
        lvm("lvcreate", *striped, "vg0")
        columns = "pv_name,lv_name,pvseg_start,pvseg_size,pe_start,vg_extent_size"
        told = lvm("pvs", "--noheadings", "--units", "b", "--nosuffix", "--segments", "-o", columns)
    finally:
        del os.environ["LVM_SYSTEM_DIR"]
        for device in devices:
            tool("losetup", "-d", device)
    tree = tmp_path / "lvm-tree"
    tree.mkdir()
    (tree / "inside").write_text("striped")
    system = tmp_path / "lvm-system"
    system.touch()
    os.truncate(system, 16 * MIB)
    tool("mkfs.ext4", "-q", "-F", "-d", tree, system)
    content = system.read_bytes()
    images = [bytearray(path.read_bytes()) for path in paths]
    for line in told.splitlines():
        fields = line.split()
        if len(fields) == 6 and fields[1] == "root":
            number = devices.index(fields[0])
            start, dummy, first, extent = map(int, fields[2:])
            half = b"".join(content[at : at + BLOCK] for at in range(number * BLOCK, len(content), 2 * BLOCK))
            begin = first + start * extent
            images[number][begin : begin + len(half)] = half
    return [bytes(image) for image in images]


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with files that a file system may hold: small, fragmented, sparse, deep."""
    return make_tree(tmp_path / "tree")


def make_tree(top: Path) -> Path:
    """The content of fixture ``tree``."""
    (top / "etc" / "deep" / "er").mkdir(parents=True)
    (top / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (top / "etc" / "empty").touch()
    (top / "etc" / "deep" / "er" / "file").write_bytes(b"deep")
    (top / "big").write_bytes(random.Random(1).randbytes(2 * MIB + 777))
    with (top / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(3 * MIB)
        file.write(b"middle")
        file.truncate(9 * MIB + 5)
    return top


def put_odd_names(tree: Path) -> None:
    """Files with the names that are hard."""
    for number, name in enumerate(ODD_NAMES):
        Path(os.fsdecode(os.fsencode(tree) + b"/etc/" + name)).write_bytes(b"odd %d" % number)


def put_subvolumes(disks: Disks) -> None:
    """Points of a disk with btrfs; tests/data/btrfs-subvolumes.sh made it, and says what Linux shows there."""
    image = disks.folder / "image"
    image.write_bytes(lzma.decompress((ROOT / "tests" / "data" / "btrfs-subvolumes.xz").read_bytes()))
    disks.chain(image, layers=2)


def xfs_prototype(tree: Path, path: Path, files: str = "---644 0 0") -> Path:
    """What mkfs.xfs fills a file system from.

    :param files: mode, owner and group of each file.
    """
    lines = ["/", "0 0", "d--755 0 0"]

    def describe(folder: Path) -> None:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                lines.append(f"{entry.name} d--755 0 0")
                describe(entry)
            else:
                lines.append(f"{entry.name} {files} {entry}")
        lines.append("$")

    describe(tree)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def c() -> Any:
    """What this file has, for tests that can't import it."""
    return SimpleNamespace(
        MIB=MIB,
        ROOT=ROOT,
        ODD_NAMES=ODD_NAMES,
        tool=tool,
        sums=sums,
        put_odd_names=put_odd_names,
        put_subvolumes=put_subvolumes,
        make_tree=make_tree,
        xfs_prototype=xfs_prototype,
        Disks=Disks,
        PlainDisk=_PlainDisk,
    )
