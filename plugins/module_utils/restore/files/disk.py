# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A disk of a restore point as a file to read from, each byte of which is compared with what was read from the VM.

Only what is read is checked: so one file of a large chain comes at once, and still no damaged byte gets out. The
layers' ``.hashes`` say what was read of each of them. Nothing here trusts what is *on* the disk.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from abc import abstractmethod
from collections import OrderedDict
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Sequence, Tuple

from ...datapath.hashes import LINE_LIMIT, hash_file, parse_piece, read_hashes
from ...datapath.files import open_stream
from ...datapath.image import serve
from ...errors import DamagedError, DataPathError, VadpError
from ...libraries import blake3, nbd

# A block of the hashes is read at once: it is the reader's cache and its read-ahead.
_CACHED_BLOCKS = 96
_OFFSET_DIGITS = 19

Piece = Tuple[int, int, str]


class HashFile:
    """The pieces of a layer's ``.hashes``, found without reading all of the file."""

    def __init__(self, path: str, blake3_hex: str) -> None:
        if hash_file(path) != blake3_hex:
            raise DamagedError(
                "A file of hashes is damaged", subject=path, reason="its content changed since it was written"
            )
        header, _pieces = read_hashes(path)
        self.path = path
        self.block_bytes: int = header["block_bytes"]
        self._pieces: Dict[int, List[Piece]] = {}
        with open_stream(path) as stream:
            # mmap keeps a descriptor of its own.
            self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._first = self._data.find(b"\n") + 1

    def block(self, number: int) -> List[Piece]:
        """The pieces in the block of that number, ascending."""
        start, end = number * self.block_bytes, (number + 1) * self.block_bytes
        found = []
        position = self._locate(start)
        while position < len(self._data):
            line_end = self._end_of(position)
            offset, length, digest = parse_piece(self.path, self._data[position:line_end], self.block_bytes)
            if offset >= end:
                break
            found.append((offset, length, digest))
            position = line_end + 1
        return found

    def _end_of(self, begin: int) -> int:
        end = self._data.find(b"\n", begin, begin + LINE_LIMIT)
        if end < 0:
            raise DamagedError("A file of hashes is damaged", subject=self.path, reason="a line has no end")
        return end

    def _locate(self, wanted: int) -> int:
        """Where the first line begins whose offset is not below *wanted*; lines are sorted."""
        low, high = self._first, len(self._data)
        while low < high:
            middle = (low + high) // 2
            begin = self._data.rfind(b"\n", low, middle) + 1 or low
            end = self._end_of(begin)
            # A line is "[offset, ...": the number alone is cheaper than the whole of it.
            number = self._data[begin + 1 : self._data.find(b",", begin, end)]
            if not number.isdigit() or len(number) > _OFFSET_DIGITS:
                raise DamagedError("A file of hashes is damaged", subject=self.path, reason="a piece has no offset")
            if int(number) < wanted:
                low = end + 1
            else:
                high = begin
        return low


class _Server:
    """A layer with all that it stands on, served by qemu-nbd."""

    def __init__(self, stack: contextlib.ExitStack, layer: str, run_dir: str) -> None:
        server = stack.enter_context(serve(layer, run_dir=run_dir, connections=1))
        self.layer = layer
        self._handle = nbd.NBD()
        self._handle.set_uri_allow_local_file(True)
        try:
            self._handle.connect_uri(server.uri)
        except nbd.Error as error:
            raise DataPathError("A layer can't be read", subject=layer, reason=error.string) from None

    def read(self, offset: int, length: int) -> bytes:
        try:
            return bytes(self._handle.pread(length, offset))
        except nbd.Error as error:
            if not self._handle.aio_is_ready():
                raise DataPathError(
                    "The server of a layer ended", subject=self.layer, reason=error.string, retryable=True
                ) from None
            raise _differs("A layer can't be read", self.layer, f"{length} bytes at {offset}: {error.string}") from None


class ReadOnly(io.RawIOBase):
    """A file of *size* bytes to read from; :meth:`_at` has the bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._position = 0

    @abstractmethod
    def _at(self, offset: int, length: int) -> bytes:
        """All of the bytes."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: Optional[int] = -1) -> bytes:
        left = max(0, self.size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._at(self._position, wanted) if wanted else b""
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Slice(ReadOnly):
    """A part of another file."""

    def __init__(self, stream: BinaryIO, offset: int, size: int) -> None:
        super().__init__(size)
        self._stream = stream
        self._offset = offset

    def _at(self, offset: int, length: int) -> bytes:
        self._stream.seek(self._offset + offset)
        return self._stream.read(length)


class CheckedDisk(ReadOnly):
    """A disk at a restore point, read-only.

    :param layers: base first, each {"layer": path, "hashes": path, "blake3": of the hashes' file}.
    :param run_dir: folder for sockets. The thread that makes this must be the one that closes it.
    """

    def __init__(self, layers: Sequence[Dict[str, str]], capacity_bytes: int, run_dir: str) -> None:
        super().__init__(capacity_bytes)
        #: The first damage that was met. Who reads through others, which take any error for one of the file system's,
        #: looks here.
        self.damage: Optional[VadpError] = None
        self._layers = list(layers)
        self._run_dir = run_dir
        self._stack = contextlib.ExitStack()
        self._servers: Dict[int, _Server] = {}
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        try:
            self._hashes = [HashFile(layer["hashes"], layer["blake3"]) for layer in self._layers]
            self._block_bytes = max(hashes.block_bytes for hashes in self._hashes)
            if any(self._block_bytes % hashes.block_bytes for hashes in self._hashes):
                raise DamagedError("The layers' hashes are of blocks that don't fit together", subject=self._top)
            self._server(len(self._layers) - 1)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        if not self.closed:
            self._cache.clear()
            self._stack.close()
        super().close()

    @property
    def _top(self) -> str:
        return self._layers[-1]["layer"]

    def _at(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            number, inside = divmod(offset, self._block_bytes)
            part = self._block(number)[inside : inside + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # Checked blocks

    def _block(self, number: int) -> bytes:
        data = self._cache.get(number)
        if data is not None:
            self._cache.move_to_end(number)
            return data
        if self.damage is not None:
            raise self.damage
        offset = number * self._block_bytes
        try:
            data = self._server(len(self._layers) - 1).read(offset, min(self._block_bytes, self.size - offset))
            self._check(number, data)
        except VadpError as error:
            self.damage = error
            raise
        self._cache[number] = data
        if len(self._cache) > _CACHED_BLOCKS:
            self._cache.popitem(last=False)
        return data

    def _check(self, number: int, data: bytes) -> None:
        """*data* is what was read from the VM's disk, as each layer's hashes tell.

        :raises DamagedError: it is not.
        """
        start = number * self._block_bytes
        uncovered = [(start, start + len(data))]
        view = memoryview(data)
        for index in range(len(self._layers) - 1, -1, -1):
            if not uncovered:
                return
            for offset, length, digest in self._pieces(index, number):
                seen = list(_common(uncovered, offset, offset + length))
                if not seen:
                    continue
                if seen == [(offset, offset + length)]:
                    same = blake3.blake3(view[offset - start : offset - start + length]).hexdigest() == digest
                else:
                    # A newer layer replaced a part of it: the hash is of what this layer shows.
                    piece = self._server(index).read(offset, length)
                    same = blake3.blake3(piece).hexdigest() == digest and all(
                        piece[low - offset : high - offset] == data[low - start : high - start] for low, high in seen
                    )
                if not same:
                    raise _differs(
                        "A layer does not hold what was read from the disk",
                        self._layers[index]["layer"],
                        f"{length} bytes at {offset} differ",
                    )
                uncovered = list(_without(uncovered, offset, offset + length))
        # What nobody read was not allocated.
        for low, high in uncovered:
            if data[low - start : high - start].count(0) != high - low:
                raise _differs(
                    "A layer holds what was not read from the disk",
                    self._top,
                    f"bytes between {low} and {high} are not zero, and no hash covers them",
                )

    def _pieces(self, index: int, number: int) -> List[Piece]:
        hashes = self._hashes[index]
        count = self._block_bytes // hashes.block_bytes
        return [piece for part in range(number * count, (number + 1) * count) for piece in hashes.block(part)]

    def _server(self, index: int) -> _Server:
        if index not in self._servers:
            self._servers[index] = _Server(self._stack, self._layers[index]["layer"], self._run_dir)
        return self._servers[index]


def _differs(what: str, layer: str, reason: str) -> DamagedError:
    return DamagedError(
        what,
        subject=layer,
        reason=reason,
        remedy="Restore from another point, and see restore_point_verify",
    )


def _common(ranges: Sequence[Tuple[int, int]], low: int, high: int) -> Iterator[Tuple[int, int]]:
    """The parts of *ranges* between *low* and *high*."""
    for begin, end in ranges:
        if begin < high and low < end:
            yield max(begin, low), min(end, high)


def _without(ranges: Sequence[Tuple[int, int]], low: int, high: int) -> Iterator[Tuple[int, int]]:
    """The parts of *ranges* outside *low* to *high*."""
    for begin, end in ranges:
        if begin < min(end, low):
            yield begin, min(end, low)
        if max(begin, high) < end:
            yield max(begin, high), end


def layers_of(store: Any, points: Sequence[Dict[str, Any]], names: Sequence[str], key: int) -> List[Dict[str, str]]:
    """What :class:`CheckedDisk` takes, of the points whose layers make up a disk, base first."""
    by_name = {manifest["point"]: manifest for manifest in points}
    layers = []
    for name in names:
        entry = next(disk for disk in by_name[name]["disks"] if disk["key"] == key)
        layers.append(
            {
                "layer": os.fspath(store.layer_path(key, name)),
                "hashes": os.fspath(store.hashes_path(key, name)),
                "blake3": entry["hashes"]["blake3"],
            }
        )
    return layers
