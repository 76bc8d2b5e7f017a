# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""File systems made by their own tools, as an ordinary user could, in disks of restore points."""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import run
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
        Disks=Disks,
    )
