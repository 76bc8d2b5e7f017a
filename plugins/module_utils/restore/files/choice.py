# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which reader reads which volume: dissect where it can, and libguestfs what is left.

dissect is there at once and checks each block; libguestfs has to boot a virtual machine first. So that is only started
for a volume on which a file system begins that dissect does not read, or fails on, or which is named and unknown.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Sequence, Tuple, Type

from ...errors import InputError, VadpError
from .filesystem import Piece
from .reader import DiskSource, DissectReader, Entry, FileReader, GuestfishReader, OnSkipped
from .request import AUTO, DISSECT, GUESTFISH, FilesRequest

# What libguestfs can't read either.
_HOPELESS = ("swap", "empty", "luks", "bitlocker", "refs", "apfs")


def require_reader(request: FilesRequest) -> str:
    """DISSECT or GUESTFISH, the one that reads first.

    :raises InputError: what is asked for is not installed, or nothing is.
    """
    kinds: List[Type[FileReader]] = []
    if request.reader != GUESTFISH:
        kinds.append(DissectReader)
    if request.reader != DISSECT and not request.versions:
        kinds.append(GuestfishReader)
    missing = {kind.name: kind.missing() for kind in kinds}
    for kind in kinds:
        if not missing[kind.name]:
            return kind.name
    raise InputError(
        "Files can't be read out of images here",
        reason="; ".join(f"{name} needs {', '.join(packages)}" for name, packages in missing.items()),
        remedy="Install them on the backup proxy; role backup_proxy does, where its Python is new enough",
        details={"missing": missing},
    )


def make_reader(
    request: FilesRequest,
    disks: Sequence[DiskSource],
    run_dir: str,
    deadline: Optional[float],
    on_unchecked: Callable[[], None],
) -> FileReader:
    """The reader that the request asks for.

    :param on_unchecked: called before something is read that is not compared with the hashes of the backup.
    :raises InputError: as :func:`require_reader`.
    """
    first = require_reader(request)
    common: Tuple[Any, ...] = (disks, run_dir, float(request.io_timeout), deadline)
    reason = f"reader is {request.reader}"
    if first == GUESTFISH:
        if request.reader == AUTO:
            reason = f"dissect needs {', '.join(DissectReader.missing())}"
        return GuestfishReader(*common, on_unchecked=on_unchecked, reason=reason)
    if request.reader == DISSECT:
        return DissectReader(*common, reason=reason)
    return CombinedReader(
        *common,
        reason="dissect reads it",
        request=request,
        on_unchecked=on_unchecked,
        kinds=(DissectReader, GuestfishReader),
    )


class CombinedReader(FileReader):
    """dissect, and libguestfs for what it leaves. The volumes have the numbers that dissect gives them.

    :param kinds: the two readers.
    """

    name = DISSECT

    def __init__(
        self, *args: Any, request: FilesRequest, on_unchecked: Callable[[], None], kinds: Sequence[Any], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._request = request
        self._on_unchecked = on_unchecked
        self._kinds = kinds
        self._stack = contextlib.ExitStack()
        # Of each volume: its reader, and its number there.
        self._places: List[Tuple[FileReader, int]] = []

    def _made(self, kind: Any, **options: Any) -> FileReader:
        made: FileReader = kind(self.disks, self.run_dir, self.io_timeout, self.deadline, **options)
        return made

    def __enter__(self) -> FileReader:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self._made(self._kinds[0], reason=self.reason))
            self.volumes = [dict(volume) for volume in first.volumes]
            self._places = [(first, number) for number in range(len(self.volumes))]
            left = left_over(self.volumes, self._request.volumes)
            if left:
                self._read_the_rest(stack, left)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def _read_the_rest(self, stack: contextlib.ExitStack, left: List[int]) -> None:
        kind = self._kinds[1]
        if self._request.versions:
            why = "guestfish may read it, when one point is listed"
        elif kind.missing():
            why = f"guestfish may read it, but needs {', '.join(kind.missing())}"
        else:
            skip = [volume["name"] for number, volume in enumerate(self.volumes) if number not in left]
            try:
                second = stack.enter_context(self._made(kind, on_unchecked=self._on_unchecked, skip=skip))
            except VadpError as error:
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise
                why = f"guestfish can't read it: {error}"
            else:
                self._take(second, left)
                return
        for number in left:
            self._cannot(number, why)

    def _take(self, second: FileReader, left: List[int]) -> None:
        found = {volume["name"]: number for number, volume in enumerate(second.volumes)}
        for number in left:
            volume = self.volumes[number]
            inner = found.get(volume["name"])
            if inner is None:
                self._cannot(number, "guestfish finds no file system there")
            elif not second.volumes[inner]["readable"]:
                self._cannot(number, f"guestfish: {second.volumes[inner]['problem']}")
            else:
                reason = f"dissect: {volume['problem']}"
                self.volumes[number] = dict(second.volumes[inner], disk=volume["disk"], reader_reason=reason)
                self._places[number] = (second, inner)
        known = {volume["name"] for volume in self.volumes}
        for inner, volume in enumerate(second.volumes):
            # What Linux makes of the parts that are here: arrays, dynamic disks, file systems' roots.
            if volume["name"] not in known:
                why = "dissect knows no such volume" if volume["readable"] else None
                self.volumes.append(dict(volume, reader_reason=why))
                self._places.append((second, inner))
        readers = {volume["reader"] for volume in self.volumes if volume["readable"]}
        self.name = ", ".join(sorted(readers)) or self.name

    def _cannot(self, number: int, why: str) -> None:
        self.volumes[number]["problem"] = f"{self.volumes[number]['problem']}; {why}"

    def walk(
        self, volumes: Sequence[int], patterns: Sequence[str], recurse: bool, limit: int, on_skipped: OnSkipped
    ) -> Iterator[Entry]:
        matched = set()
        for reader in dict.fromkeys(self._places[number][0] for number in volumes):
            outer = {self._places[number][1]: number for number in volumes if self._places[number][0] is reader}

            def skipped(volume: int, path: str, reason: str, outer: Dict[int, int] = outer) -> None:
                on_skipped(outer[volume], path, reason)

            for entry in reader.walk(sorted(outer), patterns, recurse, limit, skipped):
                yield replace(entry, volume=outer[entry.volume])
            matched |= reader.matched
        self.matched = matched

    def read(self, entry: Entry) -> Generator[Piece, None, None]:
        reader, number = self._places[entry.volume]
        return reader.read(replace(entry, volume=number))


def left_over(volumes: Sequence[Dict[str, Any]], wanted: Sequence[str]) -> List[int]:
    """The numbers of the volumes that the second reader is started for.

    :param wanted: names, labels or UUIDs of the volumes that are to be searched; empty means all.
    """
    unread = [number for number, volume in enumerate(volumes) if not volume["readable"]]
    if not wanted:
        return [number for number in unread if volumes[number]["type"] not in (*_HOPELESS, "unknown")]
    named = {number for number, volume in enumerate(volumes) if _is_one_of(volume, wanted)}
    known = {name for name in wanted if any(_is_one_of(volume, [name]) for volume in volumes)}
    # Whoever does not read a file system does not know its label.
    candidates = unread if known != set(wanted) else [number for number in unread if number in named]
    return [number for number in candidates if volumes[number]["type"] not in _HOPELESS]


def _is_one_of(volume: Dict[str, Any], names: Sequence[str]) -> bool:
    uuid = (volume["uuid"] or "").lower()
    return any(name in (volume["name"], volume["label"]) or (uuid and name.lower() == uuid) for name in names)
