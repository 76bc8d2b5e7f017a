# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which reader reads which volume: dissect where it can, and libguestfs what is left.

dissect is there at once and checks each block; libguestfs must boot a virtual machine first. So that is only started
for a volume on which a file system begins that dissect does not read, or fails on, or which is named and unknown, for
one whose log must be replayed, and for files that dissect refuses and Linux is known to read right.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import replace
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Sequence, Set, Tuple, Type, cast

from ...errors import DamagedError, InputError, VadpError
from .filesystem import Piece
from .filesystems import CONTAINERS
from .reader import (
    DiskSource,
    DissectReader,
    Entry,
    FileReader,
    GuestfishReader,
    OnSkipped,
    TooMany,
    Unread,
    unread,
)
from .request import AUTO, DISSECT, GUESTFISH, FilesRequest

# What libguestfs can't read either.
_HOPELESS = ("swap", "empty", "refs", "apfs", *CONTAINERS)
_ZEROS = bytes(1 << 16)


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

    What it leaves are volumes that it does not read, volumes whose log Linux replays, and single files that it refuses
    and that Linux is known to read right. The virtual machine is started once for all of them.

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
        self._second: Optional[FileReader] = None
        #: Why there is no second reader.
        self._why_not = ""

    def _made(self, kind: Any, **options: Any) -> FileReader:
        made: FileReader = kind(self.disks, self.run_dir, self.io_timeout, self.deadline, **options)
        return made

    def __enter__(self) -> FileReader:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self._made(self._kinds[0], reason=self.reason))
            self.volumes = [dict(volume) for volume in first.volumes]
            self._places = [(first, number) for number in range(len(self.volumes))]
            left = left_over(self.volumes, self._request.volumes)
            wanted = self._request.volumes
            replay = [number for number in first.replayable if _is_searched(self.volumes[number], wanted)]
            # Those of the files that are refused later lie in it, too: so it is started with all that is searched.
            self._stack = stack
            if (left or replay) and self._started() is not None:
                self._take(left, replay)
            elif left:
                for number in left:
                    self._cannot(number, self._why_not)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    # The second reader

    def _started(self) -> Optional[FileReader]:
        """The second reader; None if it can't be had."""
        if self._second is None and not self._why_not:
            kind = self._kinds[1]
            if self._request.versions:
                self._why_not = "guestfish may read it, when one point is listed"
            elif kind.missing():
                self._why_not = f"guestfish may read it, but needs {', '.join(kind.missing())}"
            else:
                skip = _not_searched(self.volumes, self._request.volumes)
                try:
                    made = self._made(kind, on_unchecked=self._on_unchecked, skip=skip)
                    self._second = self._stack.enter_context(made)
                except VadpError as error:
                    self._give_up(error)
        return self._second

    def _give_up(self, error: VadpError) -> None:
        """Go on without the second reader. :raises VadpError: time is over, or the point is damaged."""
        if isinstance(error, (DamagedError, TooMany)) or (
            self.deadline is not None and time.monotonic() >= self.deadline
        ):
            raise error
        self._why_not = f"guestfish can't read it: {error}"

    def _take(self, left: Sequence[int], replay: Sequence[int]) -> None:
        second = cast(FileReader, self._second)
        found = {volume["name"]: number for number, volume in enumerate(second.volumes)}
        for number in (*left, *replay):
            volume = self.volumes[number]
            inner = found.get(volume["name"])
            if inner is None:
                self._cannot(number, "guestfish finds no file system there")
            elif not second.volumes[inner]["readable"]:
                self._cannot(number, f"guestfish: {second.volumes[inner]['problem']}")
            elif volume["readable"] and not second.volumes[inner]["clean"]:
                self._cannot(number, f"guestfish: {'; '.join(second.volumes[inner]['warnings'])}")
            else:
                reason = f"dissect: {volume['problem'] or '; '.join(volume['warnings'])}"
                self.volumes[number] = dict(second.volumes[inner], disk=volume["disk"], reader_reason=reason)
                self._places[number] = (second, inner)
        known = {volume["name"] for volume in self.volumes}
        for inner, volume in enumerate(second.volumes):
            # What Linux makes of the parts that are here: arrays, dynamic disks, file systems' roots.
            if volume["name"] not in known:
                why = "dissect knows no such volume" if volume["readable"] else None
                self.volumes.append(dict(volume, reader_reason=why))
                self._places.append((second, inner))
        self._name_readers()

    def _name_readers(self) -> None:
        readers = {volume["reader"] for volume in self.volumes if volume["readable"]}
        self.name = ", ".join(sorted(readers)) or self.name

    def _cannot(self, number: int, why: str) -> None:
        volume = self.volumes[number]
        if volume["readable"]:
            volume["warnings"] = [*volume["warnings"], why]
        else:
            volume["problem"] = f"{volume['problem']}; {why}"

    # Files

    def walk(
        self, volumes: Sequence[int], patterns: Sequence[str], recurse: bool, limit: int, on_skipped: OnSkipped
    ) -> Iterator[Entry]:
        matched: Set[int] = set()
        refused: Dict[int, Dict[str, str]] = {}
        told: Set[Tuple[int, str]] = set()
        for reader in dict.fromkeys(self._places[number][0] for number in volumes):
            outer = {self._places[number][1]: number for number in volumes if self._places[number][0] is reader}

            def skipped(
                volume: int, path: str, reason: str, outer: Dict[int, int] = outer, reader: FileReader = reader
            ) -> None:
                if (volume, path) in reader.askable and reader is not self._second:
                    refused.setdefault(outer[volume], {})[path] = reason
                else:
                    on_skipped(outer[volume], path, reason)

            for entry in reader.walk(sorted(outer), patterns, recurse, limit, skipped):
                told.add((outer[entry.volume], entry.path))
                yield self._outer(entry, reader, outer[entry.volume])
            matched |= reader.matched
        for number, paths in refused.items():
            fallback = _Refused(number, paths, {path for volume, path in told if volume == number}, on_skipped)
            yield from self._walk_refused(fallback, patterns, recurse, limit, matched)
        self.matched = matched

    @staticmethod
    def _outer(entry: Entry, reader: FileReader, number: int) -> Entry:
        return replace(entry, volume=number, handle=(reader, entry.volume, entry.handle))

    def _walk_refused(
        self, refused: _Refused, patterns: Sequence[str], recurse: bool, limit: int, matched: Set[int]
    ) -> Iterator[Entry]:
        """What libguestfs shows of the files that dissect refused, and below directories that it refused."""
        try:
            inner, why = self._inner(refused.volume)
            if inner is not None:
                second = cast(FileReader, self._second)
                for entry in second.walk([inner], patterns, recurse, limit, refused.skipped_there):
                    if refused.is_new(entry.path):
                        yield self._outer(entry, second, refused.volume)
                matched |= second.matched
                why = "guestfish finds no such file"
        except VadpError as error:
            self._give_up(error)
            why = self._why_not
        refused.tell_the_rest(why)

    def _inner(self, number: int) -> Tuple[Optional[int], str]:
        """The number that a volume has at the second reader, or why there is none."""
        second = self._started()
        if second is None or self._why_not:
            return None, self._why_not
        for inner, volume in enumerate(second.volumes):
            if volume["name"] == self.volumes[number]["name"]:
                if volume["readable"]:
                    return inner, ""
                return None, f"guestfish: {volume['problem']}"
        return None, "guestfish finds no file system there"

    def read(self, entry: Entry) -> Generator[Piece, None, None]:
        reader, inner, handle = entry.handle
        heard = _Heard()
        try:
            with contextlib.closing(reader.read(replace(entry, volume=inner, handle=handle))) as pieces:
                for piece in pieces:
                    heard.add(piece)
                    yield piece
            return
        except Unread as error:
            if not error.askable or reader is self._second:
                raise
            refusal = error
        except VadpError as error:
            if reader is not self._second or self._places[entry.volume][0] is reader:
                raise
            # The others of its volume are still there, by dissect.
            self._give_up(error)
            raise unread(entry, self._why_not) from None
        other = self._again(entry, str(refusal.reason))
        try:
            with contextlib.closing(cast(FileReader, self._second).read(other)) as pieces:
                yield from heard.rest_of(pieces, entry)
        except Unread as error:
            raise unread(entry, f"{refusal.reason}; guestfish: {error.reason}") from None
        except VadpError as error:
            self._give_up(error)
            raise unread(entry, f"{refusal.reason}; {self._why_not}") from None

    def _again(self, entry: Entry, refusal: str) -> Entry:
        """The same file at the second reader. :raises Unread: it can't be had there either."""
        try:
            inner, why = self._inner(entry.volume)
            if inner is not None:
                why = "guestfish finds no such file"
                reasons: List[str] = []
                pattern = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in entry.path)
                second = cast(FileReader, self._second)
                walk = second.walk([inner], [pattern], False, 1, lambda dummy, path, reason: reasons.append(reason))
                found = [one for one in walk if one.path == entry.path and one.kind == entry.kind]
                if found and found[0].size == entry.size:
                    return found[0]
                why = f"guestfish: {reasons[0]}" if reasons else why
        except VadpError as error:
            self._give_up(error)
            why = self._why_not
        raise unread(entry, f"{refusal}; {why}")


class _Refused:
    """The files of a volume that dissect refused.

    :param paths: with the reason.
    :param told: what was told of the volume already.
    """

    def __init__(self, volume: int, paths: Dict[str, str], told: Set[str], on_skipped: OnSkipped) -> None:
        self.volume = volume
        self._left = dict(paths)
        self._paths = paths
        self._told = told
        self._on_skipped = on_skipped

    def _is_one(self, path: str) -> bool:
        steps = path.split("/")
        above = {"/".join(steps[:count]) or "/" for count in range(1, len(steps) + 1)}
        return not above.isdisjoint(self._paths)

    def is_new(self, path: str) -> bool:
        """Whether what the second reader shows was missing."""
        self._left.pop(path, None)
        if path in self._told or not self._is_one(path):
            return False
        self._told.add(path)
        return True

    def skipped_there(self, _volume: int, path: str, reason: str) -> None:
        """What the second reader refuses, too."""
        if self._is_one(path):
            before = self._left.pop(path, None)
            self._on_skipped(self.volume, path, f"{before}; guestfish: {reason}" if before else reason)

    def tell_the_rest(self, why: str) -> None:
        """What the second reader said nothing of."""
        for path, reason in self._left.items():
            self._on_skipped(self.volume, path, f"{reason}; {why}")


class _Heard:
    """What of a file one reader said before it failed: the other has to say the same."""

    def __init__(self) -> None:
        self.length = 0
        self._digest = hashlib.sha256()

    def add(self, piece: Piece) -> None:
        self._add(self._digest, piece)
        self.length += piece if isinstance(piece, int) else len(piece)

    @staticmethod
    def _add(digest: Any, piece: Piece) -> None:
        left = piece if isinstance(piece, int) else 0
        digest.update(b"" if isinstance(piece, int) else piece)
        while left:
            step = min(left, len(_ZEROS))
            digest.update(_ZEROS[:step])
            left -= step

    def rest_of(self, pieces: Iterator[Piece], entry: Entry) -> Iterator[Piece]:
        """What comes behind it. :raises Unread: it begins otherwise."""
        digest = hashlib.sha256()
        left = self.length
        for piece in pieces:
            length = piece if isinstance(piece, int) else len(piece)
            step = min(left, length)
            if step:
                self._add(digest, step if isinstance(piece, int) else piece[:step])
                left -= step
                if not left and digest.digest() != self._digest.digest():
                    raise unread(entry, "it does not begin with what dissect read")
            if length > step:
                yield length - step if isinstance(piece, int) else piece[step:]


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


def _not_searched(volumes: Sequence[Dict[str, Any]], wanted: Sequence[str]) -> List[str]:
    """The names of the volumes that the second reader need not look at."""
    if any(not any(_is_one_of(volume, [name]) for volume in volumes) for name in wanted):
        # It may be a name that Linux gives.
        return []
    searched = [volume["name"] for volume in volumes if _is_searched(volume, wanted)]
    # What lies beside a root comes with it.
    return [
        volume["name"]
        for volume in volumes
        if not any(name == volume["name"] or name.startswith(f"{volume['name']}/") for name in searched)
    ]


def _is_searched(volume: Dict[str, Any], wanted: Sequence[str]) -> bool:
    return _is_one_of(volume, wanted) if wanted else not volume["only_by_name"]


def _is_one_of(volume: Dict[str, Any], names: Sequence[str]) -> bool:
    uuid = (volume["uuid"] or "").lower()
    return any(name in (volume["name"], volume["label"]) or (uuid and name.lower() == uuid) for name in names)
