# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The process that reads a disk's file systems: it writes nothing, has bounds, and can be killed at any time.

It takes requests as JSON lines and answers with frames (see :mod:`.frames`):

- ``open``: {disks: [{key, label, capacity_bytes, layers}], run_dir} -> {volumes}
- ``walk``: {volumes, patterns, recurse, limit} -> an object for each file, then {end}
- ``read``: {id} of a file that was walked -> data and holes, then {end}

An answer may be {error} instead: a ``VadpError`` as ``to_result`` tells it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    FrozenSet,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    cast,
)

from ...errors import DataPathError, VadpError
from ...transport.disk_format import Partition
from . import lvm
from .disk import CheckedDisk, Slice
from .filesystem import DIRECTORY, FILE, LINK, OTHER, FileSystem, Info, broken, linux_reads
from .filesystems import Contained, guess, open_file_system, type_of
from .frames import DATA, encode, encode_hole, encode_json
from .names import bad_name
from .places import member_of, not_a_volume
from .patterns import Patterns, State, is_literal, parts_of
from .tables import Table, read_table

MEMORY_BYTES = 3 << 29
_RECURSION = 3000
_MOST_LINKS = 40
_MOST_DEPTH = 250
_VISITED_TIMES = 50
_TELL_SECONDS = 1.0
# What a sparse file may claim to be, of the disk's size.
_SPARSE_TIMES = 64


class Volume(NamedTuple):
    """A part of a disk, and what is on it."""

    facts: Dict[str, Any]
    system: Optional[FileSystem]


class Part(NamedTuple):
    """A part of a disk, with what it is called."""

    name: str
    key: int
    stream: BinaryIO
    size: int


def problem_of(error: BaseException) -> str:
    """What a parser stumbled over, in a line."""
    if isinstance(error, RecursionError):
        return "its structures go in a circle"
    if isinstance(error, MemoryError):
        return "it would need more memory than it may have"
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


class Agent:
    """What the process keeps between requests."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._disks: Dict[int, CheckedDisk] = {}
        self._volumes: List[Volume] = []
        self._files: List[Tuple[FileSystem, Any, Info]] = []
        self._told = 0.0

    def serve(self, requests: Iterator[bytes]) -> None:
        """Answer until there are no more requests."""
        calls: Dict[str, Callable[..., None]] = {"open": self.open, "walk": self.walk, "read": self.read}
        try:
            for line in requests:
                request = json.loads(line)
                try:
                    self._answer(calls[request.pop("op")], request)
                except VadpError as error:
                    self._say(error=error.to_result())
        finally:
            for disk in self._disks.values():
                disk.close()

    def _answer(self, call: Callable[..., None], request: Dict[str, Any]) -> None:
        try:
            call(**request)
        except broken() as error:
            # Whatever a disk holds, it is told. What nobody thought of has no place of its own.
            self._raise_damage()
            raise DataPathError("The file systems can't be read", reason=problem_of(error)) from None
        self._raise_damage()

    def _send(self, frame: bytes) -> None:
        view = memoryview(frame)
        while view:
            view = view[os.write(self._out, view) :]

    def _say(self, **document: Any) -> None:
        self._told = time.monotonic()
        self._send(encode_json(document))

    def _raise_damage(self) -> None:
        for disk in self._disks.values():
            if disk.damage is not None:
                raise disk.damage

    # open

    def open(self, disks: Sequence[Dict[str, Any]], run_dir: str) -> None:
        """Find the volumes of the disks, and what is on them."""
        parts: List[Part] = []
        physical: List[Part] = []
        for entry in disks:
            disk = CheckedDisk(entry["layers"], entry["capacity_bytes"], run_dir)
            self._disks[entry["key"]] = disk
            try:
                found = self._parts(disk, entry["key"])
            except broken() as error:
                whole = Part(str(entry["key"]), entry["key"], cast(BinaryIO, disk), disk.size)
                self._unreadable(whole, "unknown", f"it can't be read: {problem_of(error)}")
                found = []
            for part in found:
                (physical if self._is_physical_volume(part) else parts).append(part)
            self._raise_damage()
        parts += self._logical(physical)
        self._raise_damage()
        for part in parts:
            self._volumes += self._with_others(part, self._volume(part))
            self._raise_damage()
        self._say(volumes=[volume.facts for volume in self._volumes])

    def _parts(self, disk: CheckedDisk, key: int) -> List[Part]:
        """The partitions of a disk, or the whole of it, that may be volumes. The others are told."""
        stream = cast(BinaryIO, disk)
        whole = Part(str(key), key, stream, disk.size)
        table = read_table(stream, disk.size) or Table([], None, [])
        entries = table.entries
        member = member_of(stream, disk.size)
        # What lies at the end of the last partition lies at the end of the disk, too.
        inside = member is not None and any(
            entry.offset <= member.place < entry.offset + entry.length for entry in entries
        )
        if member is not None and not inside:
            for part in [self._partition(whole, entry) for entry in entries] or [whole]:
                self._unreadable(part, member.kind, member.why if part is whole else f"the disk: {member.why}")
            return []
        if table.problem is not None:
            self._unreadable(whole, "unknown", table.problem)
            return []
        for number, why in table.lost:
            self._unreadable(whole._replace(name=f"{whole.name}p{number}", size=0), "unknown", why)
        if not entries:
            return [] if table.lost else [whole]
        return [part for part in (self._checked(whole, entry) for entry in entries) if part is not None]

    @staticmethod
    def _partition(whole: Part, entry: Partition) -> Part:
        length = max(0, min(entry.length, whole.size - entry.offset))
        stream = cast(BinaryIO, Slice(whole.stream, entry.offset, length))
        return Part(f"{whole.name}p{entry.number}", whole.key, stream, length)

    def _checked(self, whole: Part, entry: Partition) -> Optional[Part]:
        """A partition; None if it is no volume of its own, which is told."""
        part = self._partition(whole, entry)
        if not part.size:
            self._unreadable(part, "unknown", "it lies outside the disk")
            return None
        strange = not_a_volume(entry)
        if strange is not None:
            self._unreadable(part, *strange)
            return None
        try:
            member = member_of(part.stream, part.size)
        except broken() as error:
            self._unreadable(part, "unknown", f"it can't be read: {problem_of(error)}")
            return None
        if member is not None:
            self._unreadable(part, member.kind, member.why)
            return None
        return part

    @staticmethod
    def _is_physical_volume(part: Part) -> bool:
        try:
            return lvm.is_physical_volume(part.stream)
        except broken():
            return False

    def _logical(self, parts: Sequence[Part]) -> List[Part]:
        """The logical volumes of all physical ones. What can't be read is told."""
        physical: List[lvm.PhysicalVolume] = []
        for part in parts:
            try:
                one = lvm.read_physical_volume(part.key, part.name, part.stream, part.size)
                lvm.group_of(one)
            except broken() as error:
                self._unreadable(part, "lvm", problem_of(error))
            else:
                physical.append(one)
        for one, why in lvm.lost(physical):
            self._unreadable(Part(one.name, one.key, one.stream, one.size), "lvm", why)
        found = []
        for group in lvm.find_volumes(physical):
            if group.problem and not group.volumes:
                self._unreadable(Part(group.name, group.key, lvm.NOTHING, 0), "lvm", group.problem)
            for volume in group.volumes:
                part = Part(f"{group.name}/{volume.name}", volume.key, volume.stream or lvm.NOTHING, volume.size)
                if volume.problem is None:
                    found.append(part)
                else:
                    self._unreadable(part, "lvm", volume.problem)
        return found

    def _unreadable(self, part: Part, kind: str, why: str) -> None:
        self._volumes.append(Volume(self._facts(part, kind, problem=why), None))

    @staticmethod
    def _facts(part: Part, kind: str, **more: Any) -> Dict[str, Any]:
        facts = {
            "name": part.name,
            "disk": part.key,
            "size": part.size,
            "type": kind,
            "label": None,
            "uuid": None,
            "readable": False,
            "problem": None,
            "clean": None,
            "replayable": False,
            "warnings": [],
            "only_by_name": False,
        }
        facts.update(more)
        return facts

    def _with_others(self, part: Part, volume: Volume) -> Iterator[Volume]:
        """The volume, and what else of its file system has a root of its own."""
        yield volume
        if volume.system is None:
            return
        try:
            # They are not looked at: what is broken there must not keep anybody from the volume itself.
            others = volume.system.others()
        except broken() as error:
            volume.facts["warnings"].append(f"what lies beside its root can't be read: {problem_of(error)}")
            return
        for name, system in others.items():
            other = part._replace(name=f"{part.name}/{name}")
            yield Volume(
                self._facts(other, system.name, readable=True, only_by_name=True, **self._state(system)), system
            )

    def _volume(self, part: Part) -> Volume:
        kind = "unknown"
        try:
            # The type is known before anything is made of it: what this reader can't read, the other may.
            kind = type_of(part.stream) or kind
            system = open_file_system(part.stream, part.size)
            if system is None:
                known = guess(part.stream)
                return Volume(self._facts(part, known["type"], problem=known["why"]), None)
            system.info(system.root())
        except Contained as error:
            return Volume(self._facts(part, error.kind, problem=str(error)), None)
        except broken() as error:
            return Volume(self._facts(part, kind, problem=f"it can't be read: {problem_of(error)}"), None)
        facts = self._facts(part, kind, label=system.label, uuid=system.uuid, readable=True, **self._state(system))
        return Volume(facts, system)

    @staticmethod
    def _state(system: FileSystem) -> Dict[str, Any]:
        """What is told of a file system's state."""
        clean = system.unclean is None
        return {"clean": clean, "replayable": not clean and system.linux_replays, "warnings": system.mind()}

    # walk

    def walk(self, volumes: Sequence[int], patterns: Sequence[str], recurse: bool, limit: int) -> None:
        """Tell the files that patterns select: in a tree, a directory comes before what is in it."""
        ended = None
        matched: Set[int] = set()
        for number in volumes:
            system = self._volumes[number].system
            if system is not None:
                walk = _Walk(self, number, system, recurse, limit)
                walk.run([parts_of(pattern) for pattern in patterns])
                ended = ended or walk.ended
                matched |= walk.matched
            self._raise_damage()
        self._say(end=True, limit=ended, matched=sorted(matched))

    def found(self, volume: int, system: FileSystem, path: str, node: Any, info: Info) -> None:
        """Tell a file that was found."""
        entry: Dict[str, Any] = {
            "volume": volume,
            "path": path,
            "kind": info.kind,
            "size": info.size,
            "mtime_ns": info.mtime_ns,
            "mode": info.mode,
            "uid": info.uid,
            "gid": info.gid,
        }
        if info.kind == LINK:
            entry["target"] = system.link(node)
        elif info.kind == FILE:
            entry["id"] = len(self._files)
            self._files.append((system, node, info))
        self._say(file=entry)

    @property
    def found_files(self) -> int:
        return len(self._files)

    def skipped(self, volume: int, path: str, reason: str, askable: bool = False) -> None:
        """Tell a file that can't be had.

        :param askable: whether libguestfs may read it.
        """
        self._say(skipped={"volume": volume, "path": path, "reason": reason, "askable": askable})

    def alive(self) -> None:
        """Tell that the work goes on, now and then."""
        if time.monotonic() - self._told > _TELL_SECONDS:
            self._say(alive=True)

    # read

    def read(self, id: int) -> None:
        """Send what a file holds. What can't be read ends with {problem} instead of {end}."""
        system, node, info = self._files[id]
        sent = 0
        try:
            for piece in system.read(node):
                sent += piece if isinstance(piece, int) else len(piece)
                if sent > info.size:
                    raise ValueError("it is longer than its inode says")
                self._send(encode_hole(piece) if isinstance(piece, int) else encode(DATA, piece))
            if sent != info.size:
                raise ValueError(f"{info.size - sent} bytes are missing at its end")
        except broken() as error:
            self._raise_damage()
            self._say(problem=f"it can't be read: {problem_of(error)}", askable=linux_reads(system, error))
            return
        self._say(end=True)


class _Walk:
    """One way through one file system."""

    def __init__(self, agent: Agent, volume: int, system: FileSystem, recurse: bool, limit: int) -> None:
        self._agent = agent
        self._volume = volume
        self._system = system
        self._recurse = recurse
        self._limit = limit
        self._found = 0
        self._visited = 0
        self._links = 0
        self._told: Set[str] = set()
        #: The patterns that select something, by their numbers.
        self.matched: Set[int] = set()
        #: Why it ended before its end.
        self.ended: Optional[str] = None

    def run(self, patterns: List[List[str]]) -> None:
        todo = list(enumerate(patterns))
        while todo and self.ended is None:
            origins = [origin for origin, dummy in todo]
            matcher = Patterns([parts for dummy, parts in todo], self._system.ignores_case)
            start = matcher.start()
            follow: List[Tuple[int, List[str]]] = []
            try:
                root = self._system.root()
                seen = {self._identity(root)}
            except broken() as error:
                self._failed("/", f"it can't be read: {problem_of(error)}", error)
                return
            if start.selected:
                self._match(start.selected, origins)
                self._tell("/", root)
            everything = bool(start.selected) and self._recurse
            self._directory(matcher, origins, root, start.below, everything, seen, follow)
            self._links += 1
            if follow and self._links > _MOST_LINKS:
                self._agent.skipped(self._volume, "/" + "/".join(follow[0][1]), "too many symbolic links")
                return
            todo = follow

    def _match(self, selected: FrozenSet[int], origins: List[int]) -> None:
        self.matched.update(origins[number] for number in selected)

    def _identity(self, node: Any) -> Any:
        return self._system.info(node).inode

    def _directory(
        self,
        matcher: Patterns,
        origins: List[int],
        top: Any,
        top_states: FrozenSet[State],
        top_all: bool,
        seen: Set[Any],
        follow: List[Tuple[int, List[str]]],
    ) -> None:
        """Depth first, without recursion: a tree may be as deep as its author liked."""
        stack = [("", self._entries(top, ""), top_states, top_all)]
        while stack:
            path, entries, states, everything = stack[-1]
            try:
                name, node = next(entries)
            except StopIteration:
                stack.pop()
                continue
            self._visited += 1
            self._agent.alive()
            if self._found > self._limit or self._visited > self._limit * _VISITED_TIMES:
                self.ended = f"more than {self._limit} files"
                return
            step = matcher.step(states, name)
            selected = everything or bool(step.selected)
            if not selected and not step.below:
                continue
            child = f"{path}/{name}"
            reason = bad_name(name, child)
            if reason is not None:
                self._agent.skipped(self._volume, child, reason)
                continue
            try:
                info = self._system.info(node)
                if info.kind == LINK and not selected:
                    follow += self._followed(matcher, origins, step.literal, path, node)
                    continue
            except broken() as error:
                self._failed(child, f"it can't be read: {problem_of(error)}", error)
                continue
            self._match(step.selected, origins)
            if selected and not self._tell(child, node, info):
                continue
            below = everything or (bool(step.selected) and self._recurse)
            if info.kind != DIRECTORY or not (below or step.below):
                continue
            if info.inode in seen:
                self._agent.skipped(self._volume, child, "the directory is there twice: the file system is damaged")
            elif len(stack) >= _MOST_DEPTH:
                self._agent.skipped(self._volume, child, f"it lies more than {_MOST_DEPTH} directories deep")
            else:
                seen.add(info.inode)
                stack.append((child, self._entries(node, child), step.below, below))

    def _failed(self, path: str, reason: str, error: BaseException) -> None:
        self._agent.skipped(self._volume, path, reason, linux_reads(self._system, error))

    def _entries(self, node: Any, path: str) -> Iterator[Tuple[str, Any]]:
        try:
            yield from self._system.entries(node)
        except broken() as error:
            self._failed(path or "/", f"the directory can't be read: {problem_of(error)}", error)

    def _tell(self, path: str, node: Any, info: Optional[Info] = None) -> bool:
        if path in self._told:
            return True
        self._told.add(path)
        try:
            info = info or self._system.info(node)
            if info.kind == OTHER:
                self._agent.skipped(self._volume, path, f"it is {info.what}")
                return False
            if info.size > self._system.size * _SPARSE_TIMES:
                self._agent.skipped(self._volume, path, f"it claims to have {info.size} bytes")
                return False
            self._agent.found(self._volume, self._system, path, node, info)
            self._found += 1
        except broken() as error:
            self._failed(path, f"it can't be read: {problem_of(error)}", error)
            return False
        return True

    def _followed(
        self, matcher: Patterns, origins: List[int], states: FrozenSet[State], path: str, node: Any
    ) -> List[Tuple[int, List[str]]]:
        """The patterns that a symbolic link makes of those which name it and go on behind it."""
        made = []
        for state in states:
            rest = matcher.rest(state)
            if not rest:
                continue
            target = self._system.link(node)
            steps = [] if target.startswith("/") else [part for part in path.split("/") if part]
            for part in target.split("/"):
                if part == "..":
                    steps = steps[:-1]
                elif part not in ("", "."):
                    steps.append(part)
            # A link's name is a name, whatever is in it.
            parts = [part if is_literal(part) else _escaped(part) for part in steps]
            made.append((origins[state[0]], parts + rest))
        return made


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def main(request_fd: int, frame_fd: int) -> None:
    """Serve until the requests end. Who started this made sure that it dies with him."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(_RECURSION)
    with os.fdopen(request_fd, "rb") as requests:
        Agent(frame_fd).serve(requests)
