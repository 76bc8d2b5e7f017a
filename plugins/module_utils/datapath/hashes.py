# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ``.hashes`` file beside a layer: what was read from the disk, as BLAKE3 sums of pieces.

JSON lines: a header ``{"format": 1, "algorithm": "blake3", "block_bytes": ..., "capacity_bytes": ...,
"content_id": ...}``, then ``[offset, length, hex]``, sorted, not overlapping, no piece crossing a multiple of
``block_bytes``. The content ID (proofs 15) is absent in files of points of format 1.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import io
import json
import os
import re
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, cast

from ..errors import DamagedError, DataPathError
from ..libraries import blake3
from . import files
from .buffers import aligned

FORMAT = 1
ALGORITHM = "blake3"

# Big-endian, so that sorting the packed bytes sorts by offset.
_RECORD = struct.Struct(">QI32s")
# Pieces kept in memory before they go to a temporary file, sorted: some 5 MB.
_SPILL_RECORDS = 65536
_READ_RECORDS = 4096
_FILE_CHUNK = 1 << 20
# Two threads are worth their while with pieces of this size; more would wait for the reading.
_HASH_CHUNK = 2 << 20
_HASH_THREADS = 2
_HEX = re.compile(r"[0-9a-f]{64}")
LINE_LIMIT = 4096
_LARGEST = {"block_bytes": 64 << 20, "capacity_bytes": (1 << 63) - 1}
_DAMAGED = "A file of hashes is damaged"

Piece = Tuple[int, int, str]


class HashWriter:
    """Collects the sums of what is read, in any order, and writes the file on :meth:`close`.

    Its memory does not grow with the disk: sorted runs go to an unnamed temporary file in the same folder. Nothing
    has a name before the file is complete. Used by one thread. As a context manager it closes on success and discards
    on an error.
    """

    def __init__(
        self, path: str, capacity_bytes: int, block_bytes: int = 1 << 20, content_id: Optional[str] = None
    ) -> None:
        self.path = path
        self.capacity_bytes = capacity_bytes
        self.block_bytes = block_bytes
        self.content_id = content_id
        self._records: List[bytes] = []
        self._spill: Optional[BinaryIO] = None
        self._runs: List[Tuple[int, int]] = []
        self._zeros = bytes(block_bytes)
        self._zero_digest = functools.lru_cache(maxsize=256)(self._hash_zeros)

    def __enter__(self) -> HashWriter:
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _hash_zeros(self, length: int) -> bytes:
        return blake3.blake3(memoryview(self._zeros)[:length]).digest()

    def add(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """The disk holds *data* (bytes) at *offset*."""
        view = memoryview(data)
        position = 0
        for piece_offset, length in self._cut(offset, len(view)):
            digest = blake3.blake3(view[position : position + length]).digest()
            self._append(piece_offset, length, digest)
            position += length

    def add_zeros(self, offset: int, length: int) -> None:
        """The disk holds *length* zeros at *offset*."""
        for piece_offset, piece_length in self._cut(offset, length):
            self._append(piece_offset, piece_length, self._zero_digest(piece_length))

    def _cut(self, offset: int, length: int) -> Iterator[Tuple[int, int]]:
        end = offset + length
        if offset < 0 or end > self.capacity_bytes:
            raise ValueError(f"{length} bytes at {offset} are not inside {self.capacity_bytes} bytes")
        while offset < end:
            cut = min(end, offset - offset % self.block_bytes + self.block_bytes)
            yield offset, cut - offset
            offset = cut

    def _append(self, offset: int, length: int, digest: bytes) -> None:
        self._records.append(_RECORD.pack(offset, length, digest))
        if len(self._records) >= _SPILL_RECORDS:
            self._spill_records()

    def _spill_records(self) -> None:
        with self._errors():
            if self._spill is None:
                folder, name = os.path.split(os.path.abspath(self.path))
                # Where a file can't be without a name, it has one for a moment: of an unfinished file, if we are.
                self._spill = tempfile.TemporaryFile(prefix=name + "-", dir=folder)  # noqa: SIM115 - discard() closes it
            self._records.sort()
            self._runs.append((self._spill.tell(), len(self._records)))
            self._spill.write(b"".join(self._records))
        self._records = []

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataPathError("The hashes can't be written", subject=self.path, reason=error.strerror) from error

    @staticmethod
    def _run(spill: BinaryIO, start: int, count: int) -> Iterator[bytes]:
        """One sorted run, read in steps; several are read in turn, so each step seeks."""
        while count:
            step = min(count, _READ_RECORDS)
            spill.seek(start)
            data = spill.read(step * _RECORD.size)
            for position in range(0, len(data), _RECORD.size):
                yield data[position : position + _RECORD.size]
            start += len(data)
            count -= step

    def close(self) -> None:
        """Write the file, sorted, and return when it is on the disk. Its folder is not synced.

        :raises DataPathError: the file can't be written; nothing of it stays.
        :raises ValueError: pieces overlap.
        """
        try:
            with self._errors():
                self._write()
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            raise
        finally:
            self.discard()

    def _write(self) -> None:
        self._records.sort()
        runs: List[Iterable[bytes]] = [self._records]
        if self._spill is not None:
            self._spill.flush()
            runs += [self._run(self._spill, start, count) for start, count in self._runs]
        header: Dict[str, Any] = {
            "format": FORMAT,
            "algorithm": ALGORITHM,
            "block_bytes": self.block_bytes,
            "capacity_bytes": self.capacity_bytes,
        }
        if self.content_id is not None:
            header["content_id"] = self.content_id
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, files.PRIVATE)
        with open(descriptor, "w", encoding="ascii", buffering=_FILE_CHUNK) as stream:
            stream.write(json.dumps(header) + "\n")
            last_end = 0
            for record in heapq.merge(*runs):
                offset, length, digest = _RECORD.unpack(record)
                if offset < last_end:
                    raise ValueError(f"two pieces overlap at {offset}")
                last_end = offset + length
                stream.write(f'[{offset}, {length}, "{digest.hex()}"]\n')
            stream.flush()
            os.fsync(stream.fileno())

    def discard(self) -> None:
        """Forget everything; nothing is written."""
        self._records = []
        self._runs = []
        if self._spill is not None:
            self._spill.close()
            self._spill = None


def read_hashes(path: str) -> Tuple[Dict[str, Any], Iterator[Piece]]:
    """The header of a ``.hashes`` file and an iterator of (offset, length, hex), ascending, read as a stream.

    :raises DamagedError: now or while iterating: not such a file, or pieces that are unsorted, overlap, lie outside
        the capacity or are larger than a block.
    """
    header, stream = _open(path)
    # The iterator closes it.
    return header, _read_pieces(path, stream, header["block_bytes"], header["capacity_bytes"])


def read_content_id(path: str) -> Optional[str]:
    """The content ID in the header of a ``.hashes`` file; None in one of format 1 of the repository.

    :raises DamagedError: there is no such file, or its header is none.
    """
    header, stream = _open(path)
    stream.close()
    found = header.get("content_id")
    if found is not None and not isinstance(found, str):
        raise _damaged(path, 1, "content_id is not text")
    return found


def _open(path: str) -> Tuple[Dict[str, Any], io.TextIOWrapper]:
    """The header, and the open file behind it."""
    try:
        stream = io.TextIOWrapper(files.open_stream(path, what=_DAMAGED), encoding="utf-8", errors="replace")
    except OSError as error:
        raise DamagedError("A file of hashes can't be read", subject=path, reason=error.strerror) from error
    try:
        header = _parse(path, 1, stream.readline(LINE_LIMIT))
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("algorithm") != ALGORITHM:
            raise _damaged(path, 1, f"its header is not of format {FORMAT}, {ALGORITHM}")
        for name in ("block_bytes", "capacity_bytes"):
            if not _is_count(header.get(name)) or not 0 < header[name] <= _LARGEST[name]:
                raise _damaged(path, 1, f"{name} is not a size")
    except BaseException:
        stream.close()
        raise
    return header, stream


def _read_pieces(path: str, stream: Any, block_bytes: int, capacity_bytes: int) -> Iterator[Piece]:
    with stream:
        last_end = 0
        number = 1
        for line in iter(lambda: stream.readline(LINE_LIMIT), ""):
            number += 1
            piece = _parse(path, number, line)
            if not isinstance(piece, list) or len(piece) != 3:
                raise _damaged(path, number, "it is not [offset, length, hex]")
            offset, length, digest = piece
            if not _is_count(offset) or not _is_count(length) or length == 0:
                raise _damaged(path, number, "offset or length is not a number of bytes")
            if offset < last_end:
                raise _damaged(path, number, "the pieces overlap or are not sorted")
            if offset + length > capacity_bytes:
                raise _damaged(path, number, f"it lies outside the disk's {capacity_bytes} bytes")
            if offset % block_bytes + length > block_bytes:
                raise _damaged(path, number, f"it crosses a border of {block_bytes} bytes")
            if not isinstance(digest, str) or not _HEX.fullmatch(digest):
                raise _damaged(path, number, "its sum is not 64 hexadecimal digits")
            last_end = offset + length
            yield offset, length, digest


def parse_piece(path: str, line: bytes, block_bytes: int) -> Piece:
    """(offset, length, hex) of one line of a file whose header is known. :raises DamagedError: it is none."""
    try:
        offset, length, digest = files.parse(line)
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(_DAMAGED, subject=path, reason="a line is not [offset, length, hex]") from None
    if not _is_count(offset) or not _is_count(length) or not 0 < length <= block_bytes - offset % block_bytes:
        raise DamagedError(_DAMAGED, subject=path, reason="offset or length of a piece is not a number of bytes")
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise DamagedError(_DAMAGED, subject=path, reason="the sum of a piece is not 64 hexadecimal digits")
    return offset, length, digest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse(path: str, number: int, line: str) -> Any:
    if not line.endswith("\n"):
        raise _damaged(path, number, "it is cut off")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise _damaged(path, number, "it is not JSON") from None


def _damaged(path: str, number: int, reason: str) -> DamagedError:
    return DamagedError(_DAMAGED, subject=path, reason=f"line {number}: {reason}")


def hash_file(path: str, on_bytes: Optional[Callable[[int], None]] = None) -> str:
    """BLAKE3 of a whole file, as hex.

    :param on_bytes: called with the size of each piece that was hashed; what it raises ends the reading.
    :raises DamagedError: the file is missing, or not an ordinary file.
    :raises DataPathError: it can't be read.
    """
    hasher = blake3.blake3(max_threads=_HASH_THREADS)
    spare, filled = (memoryview(aligned(_HASH_CHUNK)) for _number in range(2))
    try:
        # The next piece is read while this one is hashed: neither holds the interpreter.
        with files.open_stream(path, buffering=0) as stream, ThreadPoolExecutor(1, "read ahead") as reader:
            read_into = cast(io.FileIO, stream).readinto
            reading = reader.submit(read_into, spare)
            while count := reading.result():
                spare, filled = filled, spare
                reading = reader.submit(read_into, spare)
                hasher.update(filled[:count])
                if on_bytes is not None:
                    on_bytes(count)
        return hasher.hexdigest()
    except FileNotFoundError:
        raise DamagedError("A file is missing", subject=path) from None
    except OSError as error:
        raise DataPathError("A file can't be read", subject=path, reason=error.strerror) from error


def canonical_blake3(obj: Any) -> str:
    """BLAKE3 of plain data as canonical JSON (sorted keys, no spaces, UTF-8), as hex."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return blake3.blake3(text.encode("utf-8")).hexdigest()
