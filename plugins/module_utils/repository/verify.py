# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Proof that what is stored is what was read.

Level ``structure`` reads every file that a point needs and compares its hash with the manifest's, and checks that the
images form the chain that the manifests tell. Level ``data`` also reads each layer through qemu, as a restore would,
and compares it with the hashes that were taken from the bytes of the source.
"""

from __future__ import annotations

import array
import os
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..datapath import files
from ..datapath.hashes import hash_file, read_hashes
from ..datapath.image import chain_files, check, read_header, serve
from ..datapath.processes import RuntimeDir
from ..errors import DamagedError, DataPathError, InputError, RepositoryError
from ..libraries import blake3, nbd
from . import content
from .chain import chain_of
from .store import VmStore
from .stored import header_problem, stored_problem
from .manifest import FULL, disk_of, entry_of

STRUCTURE = "structure"
DATA = "data"
LEVELS = (STRUCTURE, DATA)

#: How many pieces of a layer that differ are told one by one.
SHOWN_PIECES = 5
_READERS = 2
_READ_BYTES = 1 << 20
_COMPRESSED_OR_ZERO = (1 << 62) | 1
_OFFSET_MASK = 0x00FFFFFFFFFFFE00

OnProgress = Callable[[int, int, int], None]


def verify_point(
    store: VmStore, manifest: Dict[str, Any], level: str = STRUCTURE, on_progress: Optional[OnProgress] = None
) -> List[Dict[str, Any]]:
    """Check all disks of a point, with all the layers that each of them stands on.

    Damage is reported, not raised, and does not stop the other checks.

    :param level: structure or data.
    :param on_progress: gets device key, bytes done and bytes in all; what it raises ends the checks.
    :returns: for each disk {key, label, ok, problems [text], layers, bytes_verified, seconds}; ``bytes_verified``
        counts the bytes of files and, at level data, of disks that were compared with a hash.
    """
    if level not in LEVELS:
        raise InputError("Unknown level of verification", subject=repr(level), remedy=f"Use {' or '.join(LEVELS)}")
    points = [other for other in store.points() if other["point"] != manifest["point"]] + [manifest]
    return [_DiskCheck(store, points, manifest["point"], disk, level, on_progress).run() for disk in manifest["disks"]]


def missing_problems(store: VmStore, manifest: Dict[str, Any]) -> List[str]:
    """What is wrong with the files that a point's disks stand on, as far as their sizes tell: none of them is read."""
    points = [other for other in store.points() if other["point"] != manifest["point"]] + [manifest]
    problems = []
    for disk in manifest["disks"]:
        found = _DiskCheck(store, points, manifest["point"], disk, STRUCTURE, None).missing()
        problems += [f"disk {disk['key']}: {problem}" for problem in found]
    return problems


def point_problems(store: VmStore, manifest: Dict[str, Any]) -> List[str]:
    """What is wrong with the parts of a point that belong to no disk: configuration, NVRAM, the VM's facts."""
    problems = []
    files = [("the configuration", store.config_path(manifest["point"]), manifest["configuration"])]
    if manifest["nvram"] is not None:
        files.append(("the NVRAM", store.nvram_path(manifest["point"]), manifest["nvram"]))
    for what, path, stored in files:
        problem = _file_problem(path, stored)
        if problem is not None:
            problems.append(f"{what} {path}: {problem}")
    try:
        if not store.facts:
            problems.append(f"the facts of the VM are missing: {store.path / 'vm.json'}")
    except RepositoryError as error:
        problems.append(str(error))
    return problems


def _file_problem(
    path: Path, stored: Dict[str, Any], on_bytes: Optional[Callable[[int], None]] = None
) -> Optional[str]:
    problem = stored_problem(path, stored)
    if problem is not None:
        return problem
    try:
        found = hash_file(str(path), on_bytes)
    except (DamagedError, DataPathError) as error:
        return error.reason or error.what
    if found != stored["blake3"]:
        return "its content changed since it was written (BLAKE3 differs)"
    return None


class _Link(NamedTuple):
    """One layer of a chain."""

    manifest: Dict[str, Any]
    entry: Dict[str, Any]
    layer: Path
    hashes: Path

    @property
    def point(self) -> str:
        return str(self.manifest["point"])


class _DiskCheck:
    """The checks of one disk of a point."""

    def __init__(
        self,
        store: VmStore,
        points: Sequence[Dict[str, Any]],
        point: str,
        disk: Dict[str, Any],
        level: str,
        on_progress: Optional[OnProgress],
    ) -> None:
        self.store = store
        self.points = points
        self.point = point
        self.disk = disk
        self.key: int = disk["key"]
        self.level = level
        self.problems: List[str] = []
        self.verified = 0
        self.total = 0
        self._on_progress = on_progress
        self._mutex = threading.Lock()

    def run(self) -> Dict[str, Any]:
        """The report of this disk."""
        begin = time.monotonic()
        links = self._links()
        self.total = sum(link.entry["layer"]["size_bytes"] + link.entry["hashes"]["size_bytes"] for link in links)
        if self.level == DATA:
            self.total += sum(link.entry["bytes_read"] for link in links)
        for number, link in enumerate(links):
            self._structure(link, links[number - 1] if number else None)
        if self.level == DATA:
            # The folder's name is the same for each verification of a VM, so the next one clears up after a crash.
            name = f"verify-{self.store.uuid}"
            RuntimeDir.leftovers(name, remove=True)
            with RuntimeDir(name) as run_dir:
                for number, link in enumerate(links):
                    self._data(link, links[number - 1] if number else None, run_dir)
        return {
            "key": self.key,
            "label": self.disk["label"],
            "ok": not self.problems,
            "problems": self.problems,
            "layers": len(links),
            "bytes_verified": self.verified,
            "seconds": round(time.monotonic() - begin, 3),
        }

    def missing(self) -> List[str]:
        """What the sizes of the files tell, and whether each layer is the one that the next was made upon."""
        links = self._links()
        for number, link in enumerate(links):
            self._pin(link, links[number - 1] if number else None)
            for path, stored in ((link.layer, link.entry["layer"]), (link.hashes, link.entry["hashes"])):
                problem = stored_problem(path, stored)
                if problem is not None:
                    self._add(link, f"{path.name}: {problem}")
            self._content(link)
        return self.problems

    def _links(self) -> List[_Link]:
        """The layers, base first; where the chain is broken, those above the gap."""
        try:
            names = chain_of(self.points, self.point, self.key)
        except DamagedError as error:
            self.problems.append(str(error))
            names = self._above_the_gap()
        by_name = {manifest["point"]: manifest for manifest in self.points}
        links = []
        for name in names:
            entry = entry_of(by_name[name], self.key)
            layer, hashes = self.store.layer_path(self.key, name), self.store.hashes_path(self.key, name)
            links.append(_Link(by_name[name], entry, layer, hashes))
        return links

    def _above_the_gap(self) -> List[str]:
        by_name = {manifest["point"]: manifest for manifest in self.points}
        names: List[str] = []
        name: Optional[str] = self.point
        while name is not None and name in by_name and name not in names:
            entry = disk_of(by_name[name], self.key)
            if entry is None:
                break
            names.append(name)
            name = entry["parent"]
        return names[::-1]

    def _add(self, link: _Link, problem: str) -> None:
        text = f"point {link.point}: {problem}"
        with self._mutex:
            if text not in self.problems:
                self.problems.append(text)

    def _advance(self, count: int) -> None:
        with self._mutex:
            self.verified += count
            if self._on_progress is not None:
                self._on_progress(self.key, min(self.verified, self.total), self.total)

    def _pin(self, link: _Link, parent: Optional[_Link]) -> None:
        """A parent of the same name need not be the one that the layer was made upon (proofs 15)."""
        problem = None if parent is None else self.store.pin_problem(link.entry, link.manifest, parent.manifest)
        if problem is not None:
            self._add(link, problem)

    def _content(self, link: _Link) -> None:
        if link.hashes.is_file():
            problem = content.stored_id_problem(link.hashes, link.entry)
            if problem is not None:
                self._add(link, problem)

    def _structure(self, link: _Link, parent: Optional[_Link]) -> None:
        self._pin(link, parent)
        self._content(link)
        for path, stored in ((link.layer, link.entry["layer"]), (link.hashes, link.entry["hashes"])):
            before = self.verified
            problem = _file_problem(path, stored, self._advance)
            if problem is not None:
                self._advance(before - self.verified)
                self._add(link, f"{path.name}: {problem}")
        if not link.layer.is_file():
            return
        capacity = self.disk["capacity_bytes"]
        if link.entry["capacity_bytes"] != capacity:
            self._add(link, f"its disk has {link.entry['capacity_bytes']} bytes, that of the point has {capacity}")
        expected = None if link.entry["mode"] == FULL else f"{link.entry['parent']}.qcow2"
        if parent is not None and parent.entry["layer"]["file"] != expected:
            self._add(link, f"its parent is {expected}, not {parent.entry['layer']['file']}")
        try:
            header = read_header(str(link.layer))
            problem = header_problem(header, link.entry["capacity_bytes"], expected)
            if problem is not None:
                self._add(link, f"{link.layer.name}: {problem}")
            # qemu-img opens the backing files too: not before the names are known to stay in the folder.
            chain_files(str(link.layer))
            check(str(link.layer))
        except (DamagedError, DataPathError) as error:
            self._add(link, str(error))

    def _data(self, link: _Link, below: Optional[_Link], run_dir: RuntimeDir) -> None:
        """Each layer is read through its own image: an older layer's piece may be half replaced by a newer one."""
        if not (link.layer.is_file() and link.hashes.is_file()):
            return  # told by the structure's check
        try:
            with serve(str(link.layer), run_dir=str(run_dir.path), connections=_READERS) as server:
                self._compare_pieces(link, server.uri)
                self._check_uncovered(link, server.uri, below, run_dir)
        except (DamagedError, DataPathError) as error:
            self._add(link, str(error))

    def _compare_pieces(self, link: _Link, uri: str) -> None:
        header, pieces = read_hashes(str(link.hashes))
        if header["capacity_bytes"] != link.entry["capacity_bytes"]:
            self._add(link, f"{link.hashes.name} is of a disk of {header['capacity_bytes']} bytes")
        shared = _Shared(pieces)
        bad: List[Tuple[int, str]] = []

        def read() -> None:
            with _Reader(uri) as reader:
                for offset, length, expected in shared:
                    problem = reader.compare(offset, length, expected)
                    if problem is None:
                        self._advance(length)
                    else:
                        bad.append((offset, problem))

        with ThreadPoolExecutor(_READERS) as readers:
            futures = [readers.submit(read) for dummy in range(_READERS)]
        for differing in sorted(bad)[:SHOWN_PIECES]:
            self._add(link, f"{link.layer.name}: {differing[1]}")
        if len(bad) > SHOWN_PIECES:
            self._add(link, f"{link.layer.name}: {len(bad) - SHOWN_PIECES} more pieces differ")
        for future in futures:
            future.result()

    def _check_uncovered(self, link: _Link, uri: str, below: Optional[_Link], run_dir: RuntimeDir) -> None:
        """What a layer stores beyond its hashes was not read from the source: it must show what is below it.

        Below a full layer are zeros. What a layer does not store comes from below without more ado, and the pieces of
        the parent are compared on their own.
        """
        dummy, pieces = read_hashes(str(link.hashes))
        uncovered = _subtract(stored_areas(str(link.layer)), ((piece[0], piece[1]) for piece in pieces))
        first = next(uncovered, None)
        if first is None or (below is None and link.entry["mode"] != FULL):
            return  # without its parent's manifest a layer was told to be broken already
        reported = 0
        with ExitStack() as stack:
            reader = stack.enter_context(_Reader(uri))
            parent = None
            if below is not None:
                server = stack.enter_context(serve(str(below.layer), run_dir=str(run_dir.path)))
                parent = stack.enter_context(_Reader(server.uri))
            for offset, length in chain([first], uncovered):
                if reader.shows(parent, offset, length):
                    continue
                reported += 1
                if reported <= SHOWN_PIECES:
                    self._add(
                        link, f"{link.layer.name}: {length} bytes at {offset} are stored, but no hash covers them"
                    )


class _Shared:
    """An iterator that several threads draw from. If it fails, one gets the error and it ends for the others."""

    def __init__(self, items: Iterator[Tuple[int, int, str]]) -> None:
        self._items = items
        self._mutex = threading.Lock()

    def __iter__(self) -> Iterator[Tuple[int, int, str]]:
        while True:
            with self._mutex:
                item = next(self._items, None)
            if item is None:
                return
            yield item


class _Reader:
    """A connection to an NBD server, for reading."""

    def __init__(self, uri: str) -> None:
        self._handle = nbd.NBD()
        self._handle.set_uri_allow_local_file(True)
        try:
            self._handle.connect_uri(uri)
        except nbd.Error as error:
            raise DataPathError("A layer can't be read", subject=uri, reason=error.string) from None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        try:
            self._handle.shutdown()
        except nbd.Error:
            return  # the server has gone: nothing is left to disconnect from

    def _read(self, offset: int, length: int) -> Tuple[bytes, Optional[str]]:
        try:
            return self._handle.pread(length, offset), None
        except nbd.Error as error:
            if not self._handle.aio_is_ready():
                raise DataPathError("The server of a layer ended", reason=error.string, retryable=True) from None
            return b"", f"{length} bytes at {offset} can't be read ({error.string})"

    def compare(self, offset: int, length: int, expected: str) -> Optional[str]:
        """Why a piece is not what was read from the source; None if it is."""
        data, problem = self._read(offset, length)
        if problem is None and blake3.blake3(data).hexdigest() != expected:
            return f"{length} bytes at {offset} are not what was read from the disk"
        return problem

    def shows(self, other: Optional[_Reader], offset: int, length: int) -> bool:
        """Whether an area reads as it does elsewhere, or as zeros; one that can't be read does not."""
        while length:
            step = min(length, _READ_BYTES)
            data, problem = self._read(offset, step)
            expected, other_problem = (bytes(step), None) if other is None else other._read(offset, step)
            if problem is not None or other_problem is not None or data != expected:
                return False
            offset += step
            length -= step
        return True


def stored_areas(path: str) -> Iterator[Tuple[int, int]]:
    """The (offset, length) of a disk that a qcow2 layer itself stores (data or zeros), ascending, not its backing file.

    From the image's own tables, one at a time: the memory does not grow with the disk.

    :raises DamagedError: the tables make no sense.
    """
    capacity = read_header(path).capacity_bytes
    with files.open_stream(path) as image:
        head = image.read(104)
        try:
            (cluster_bits,) = struct.unpack_from(">I", head, 20)
            l1_size, l1_offset = struct.unpack_from(">IQ", head, 36)
            (incompatible,) = struct.unpack_from(">Q", head, 72)
        except struct.error:
            raise DamagedError("A layer's header is damaged", subject=path) from None
        if not 9 <= cluster_bits <= 21 or incompatible & (1 << 4):
            raise DamagedError("A layer's header is damaged", subject=path, reason="unexpected kind of clusters")
        cluster = 1 << cluster_bits
        per_table = cluster // 8
        if l1_size * per_table * cluster < capacity or l1_size > (capacity // cluster // per_table + 1) * 2 + 64:
            raise DamagedError("A layer's tables are damaged", subject=path, reason=f"{l1_size} entries")
        start = end = 0
        for number, l1_entry in enumerate(_table(image, l1_offset, l1_size, path)):
            l2_offset = l1_entry & _OFFSET_MASK
            if not l2_offset:
                continue
            base = number * per_table * cluster
            for index, entry in enumerate(_table(image, l2_offset, per_table, path)):
                if not entry & (_OFFSET_MASK | _COMPRESSED_OR_ZERO):
                    continue
                offset = base + index * cluster
                if offset >= capacity:
                    break
                if offset != end:
                    if end > start:
                        yield start, end - start
                    start = offset
                end = min(offset + cluster, capacity)
        if end > start:
            yield start, end - start


def _table(image: Any, offset: int, count: int, path: str) -> array.array[int]:
    # A size of the image's own making is not worth its memory.
    fits = offset + count * 8 <= os.fstat(image.fileno()).st_size
    data = os.pread(image.fileno(), count * 8, offset) if fits else b""
    if len(data) != count * 8:
        raise DamagedError("A layer's tables are damaged", subject=path, reason="a table lies outside the file")
    entries = array.array("Q", data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def _subtract(areas: Iterator[Tuple[int, int]], covered: Iterator[Tuple[int, int]]) -> Iterator[Tuple[int, int]]:
    """The parts of *areas* outside *covered*; both ascending and disjoint, read as streams."""
    piece = next(covered, None)
    for offset, length in areas:
        end = offset + length
        while offset < end:
            while piece is not None and piece[0] + piece[1] <= offset:
                piece = next(covered, None)
            if piece is None or piece[0] >= end:
                yield offset, end - offset
                break
            if piece[0] > offset:
                yield offset, piece[0] - offset
            offset = piece[0] + piece[1]
