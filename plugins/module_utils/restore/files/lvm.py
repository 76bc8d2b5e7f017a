# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""LVM's volumes, read as its metadata say: linear and striped ones. All others are told with their type.

Physical volumes and groups are what their UUIDs say. Names repeat: on clones, and on machines made of one template.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, cast

from .disk import ReadOnly
from .filesystem import Unreadable, broken, bytes_at

_SECTOR = 512
_LABEL_SECTORS = 4
_LABEL, _LABEL_TYPE = b"LABELONE", b"LVM2 001"
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_AREA_HEADER = 512
_CRC = 0xF597A6CF
_MOST_AREAS = 32
_MOST_METADATA = 64 << 20
_MOST_DEPTH = 16
_IGNORED = 1
_UUID_PARTS = (0, 6, 10, 14, 18, 22, 26, 32)
# What may stand in a volume's status and flags, of what is read here.
_STATUS = {"READ", "WRITE", "VISIBLE", "FIXED_MINOR"}
_FLAGS = {"ACTIVATION_SKIP", "NOAUTOACTIVATE", "NOSCAN"}
_GROUP_STATUS = {"READ", "WRITE", "RESIZEABLE", "RESIZABLE", "CLUSTERED", "SHARED", "EXPORTED"}
_STRIPED = ("striped", "linear")
_TOKENS = re.compile(r'#[^\n]*|"(?:[^"\\]|\\.)*"|[\[\]{}=,]|[^\s\[\]{}=,"#]+')


@dataclass
class PhysicalVolume:
    """A physical volume, as its own label tells it.

    :param text: the metadata of its group; None if they lie on others only.
    """

    key: int
    name: str
    stream: BinaryIO
    size: int
    uuid: str
    text: Optional[str]


@dataclass
class LogicalVolume:
    """A logical volume; *problem* is why it can't be read.

    :param key: of the disk on which it begins.
    """

    name: str
    key: int
    size: int
    stream: Optional[BinaryIO] = None
    problem: Optional[str] = None


@dataclass
class Group:
    """A volume group.

    :param name: as it is told: with the UUID, where another group has the same name.
    :param problem: why none of its volumes can be read.
    """

    uuid: str
    name: str
    key: int
    problem: Optional[str] = None
    volumes: List[LogicalVolume] = field(default_factory=list)


def is_physical_volume(stream: BinaryIO) -> bool:
    """Whether there is a label of LVM's."""
    head = bytes_at(stream, 0, _LABEL_SECTORS * _SECTOR)
    return any(head[at : at + 8] == _LABEL for at in range(0, len(head), _SECTOR))


def read_physical_volume(key: int, name: str, stream: BinaryIO, size: int) -> PhysicalVolume:
    """:raises Unreadable: its label or metadata make no sense."""
    head = bytes_at(stream, 0, _LABEL_SECTORS * _SECTOR)
    for number in range(len(head) // _SECTOR):
        label = head[number * _SECTOR : (number + 1) * _SECTOR]
        if label[:8] != _LABEL:
            continue
        own, crc, begin = struct.unpack_from("<QII", label, 8)
        if own != number or label[24:32] != _LABEL_TYPE or _checksum(label[20:]) != crc or begin > _SECTOR - 40:
            raise Unreadable("its label (LVM) is damaged")
        texts = []
        for area, length in _areas(label, begin):
            text = _text_of(stream, area, length)
            if text is not None:
                texts.append(text)
        newest = max(texts, key=lambda text: int(_section(text).get("seqno", -1)), default=None)
        return PhysicalVolume(key, name, stream, size, label[begin : begin + 32].decode("ascii", "replace"), newest)
    raise Unreadable("it has no label")


def find_volumes(physical: Sequence[PhysicalVolume]) -> List[Group]:
    """The groups of all physical volumes, with their logical ones."""
    newest: Dict[str, Dict[str, Any]] = {}
    problems: Dict[str, str] = {}
    keys: Dict[str, int] = {}
    for one in physical:
        if one.text is None:
            continue
        group = _section(one.text)
        identity = _plain(str(group["id"]))
        keys.setdefault(identity, one.key)
        known = newest.setdefault(identity, group)
        if int(group["seqno"]) > int(known["seqno"]):
            newest[identity] = group
        elif int(group["seqno"]) == int(known["seqno"]) and _content(group) != _content(known):
            problems[identity] = "its disks do not agree on it: one is a copy, or of another time"
    found = [
        _group(group, identity, keys[identity], problems.get(identity), physical) for identity, group in newest.items()
    ]
    names = [made.name for made in found]
    for made in found:
        if names.count(made.name) > 1:
            made.name = f"{made.name}:{_dashed(made.uuid)}"
    return sorted(found, key=lambda made: made.name)


def lost(physical: Sequence[PhysicalVolume]) -> Iterator[Tuple[PhysicalVolume, str]]:
    """Physical volumes that no group here counts among its own, and why."""
    members: Dict[str, Tuple[int, Set[str]]] = {}
    for one in physical:
        if one.text is not None:
            group = _section(one.text)
            identity = _plain(str(group["id"]))
            number = int(group["seqno"])
            if number >= members.get(identity, (-1, set()))[0]:
                uuids = {_plain(str(part["id"])) for part in _sections(group, "physical_volumes").values()}
                members[identity] = (number, uuids)
    counted = {identity for dummy, uuids in members.values() for identity in uuids}
    for one in physical:
        if one.uuid not in counted:
            why = "it belongs to no volume group" if one.text is None else "its volume group no longer counts it"
            yield one, why


def doubled(physical: Sequence[PhysicalVolume]) -> Dict[str, List[PhysicalVolume]]:
    """The physical volumes that are there more than once, by their UUID."""
    found: Dict[str, List[PhysicalVolume]] = {}
    for one in physical:
        found.setdefault(one.uuid, []).append(one)
    return {identity: those for identity, those in found.items() if len(those) > 1}


def group_of(one: PhysicalVolume) -> Optional[Tuple[str, str]]:
    """(UUID, name) of the group that a physical volume belongs to, as it says itself."""
    if one.text is None:
        return None
    group = _section(one.text)
    return _plain(str(group["id"])), str(group[_NAME])


# Of one group


def _group(
    group: Dict[str, Any], identity: str, key: int, problem: Optional[str], physical: Sequence[PhysicalVolume]
) -> Group:
    made = Group(identity, str(group[_NAME]), key, problem)
    try:
        strange = set(_words(group, "status")) - _GROUP_STATUS
        if strange:
            made.problem = f"it is in a state that this reader does not know: {', '.join(sorted(strange))}"
        parts = _parts_of(group, physical)
        places = _Places(parts, int(group["extent_size"]) * _SECTOR)
        volumes = _sections(group, "logical_volumes")
        stores, merging = _snapshots(volumes)
        for name, volume in volumes.items():
            segments = [one for one in volume.values() if isinstance(one, dict)]
            if any(one.get("type") == "snapshot" for one in segments):
                continue
            # A snapshot has the name of its store, which LVM hides.
            if "VISIBLE" not in _words(volume, "status") and name not in stores:
                continue
            made.volumes.append(_volume(name, volume, segments, places, made, (stores, merging)))
    except broken() as error:
        made.problem = made.problem or f"its metadata make no sense: {error}"
    return made


def _parts_of(group: Dict[str, Any], physical: Sequence[PhysicalVolume]) -> Dict[str, _Part]:
    parts = {}
    for name, entry in _sections(group, "physical_volumes").items():
        identity = _plain(str(entry["id"]))
        those = [one for one in physical if one.uuid == identity]
        problem = None
        if not those:
            problem = f"its physical volume {_dashed(identity)} is on none of the disks"
        elif len(those) > 1:
            names = ", ".join(one.name for one in those)
            problem = (
                f"its physical volume {_dashed(identity)} is there {len(those)} times: {names}; one is a copy of the"
                " other: name one of the disks in 'disks'"
            )
        elif "MISSING" in _words(entry, "flags"):
            problem = f"its physical volume {_dashed(identity)} was missing when the group changed"
        begin, count = int(entry["pe_start"]) * _SECTOR, int(entry["pe_count"])
        parts[name] = _Part(those[0] if those else None, begin, count, problem)
    return parts


class _Part(NamedTuple):
    """A physical volume in its group."""

    volume: Optional[PhysicalVolume]
    begin: int
    extents: int
    problem: Optional[str]


class _Places(NamedTuple):
    parts: Dict[str, _Part]
    extent_bytes: int


def _snapshots(volumes: Dict[str, Dict[str, Any]]) -> Tuple[Dict[str, str], Set[str]]:
    """{store of a snapshot: its origin}, and the origins that a snapshot is being merged into."""
    stores: Dict[str, str] = {}
    merging = set()
    for volume in volumes.values():
        for segment in volume.values():
            if isinstance(segment, dict) and segment.get("type") == "snapshot":
                origin = str(segment.get("origin"))
                if "merging_store" in segment:
                    merging.add(origin)
                stores[str(segment.get("cow_store") or segment.get("merging_store"))] = origin
    return stores, merging


def _volume(
    name: str,
    volume: Dict[str, Any],
    segments: List[Dict[str, Any]],
    places: _Places,
    group: Group,
    snapshots: Tuple[Dict[str, str], Set[str]],
) -> LogicalVolume:
    made = LogicalVolume(name, group.key, 0)
    try:
        made.size = sum(int(one["extent_count"]) for one in segments) * places.extent_bytes
        if group.problem:
            raise Unreadable(group.problem)
        strange = (set(_words(volume, "status")) - _STATUS) | (set(_words(volume, "flags")) - _FLAGS)
        if strange:
            raise Unreadable(f"it is in a state that this reader does not know: {', '.join(sorted(strange))}")
        stores, merging = snapshots
        if name in stores:
            raise Unreadable(f"it is a snapshot, of {stores[name]}")
        if name in merging:
            raise Unreadable("a snapshot is being merged into it")
        pieces = [piece for one in segments for piece in _pieces(one, places)]
        pieces.sort(key=lambda piece: piece.begin)
        if int(volume["segment_count"]) != len(segments) or not _are_gapless(pieces, made.size):
            raise Unreadable("its segments do not fit together")
        made.key = pieces[0].parts[0][0].key
        made.stream = cast(BinaryIO, _Logical(pieces, made.size))
    except broken() as error:
        made.problem = str(error)
    return made


class _Piece(NamedTuple):
    """A segment: *parts* are physical volumes and where it begins there, between which stripes take turns."""

    begin: int
    size: int
    stripe: int
    parts: List[Tuple[PhysicalVolume, int]]


def _pieces(segment: Dict[str, Any], places: _Places) -> Iterator[_Piece]:
    kind = str(segment.get("type"))
    if kind not in _STRIPED:
        raise Unreadable(f"its segments are of type {kind}")
    known = {"start_extent", "extent_count", "type", "stripe_count", "stripe_size", "stripes", "tags"}
    strange = set(segment) - known
    if strange:
        raise Unreadable(f"its segments have what this reader does not know: {', '.join(sorted(strange))}")
    extent = places.extent_bytes
    begin, size = int(segment["start_extent"]) * extent, int(segment["extent_count"]) * extent
    words = list(segment["stripes"])
    count = int(segment["stripe_count"])
    if count < 1 or len(words) != 2 * count:
        raise Unreadable("its segments make no sense")
    stripe = int(segment["stripe_size"]) * _SECTOR if count > 1 else size
    if size % count or stripe < 1 or (count > 1 and stripe & (stripe - 1)):
        raise Unreadable("its segments make no sense")
    parts = []
    for name, first in zip(words[::2], words[1::2]):
        part = places.parts.get(str(name))
        if part is None:
            raise Unreadable(f"it lies on {name}, which is no physical volume")
        if part.problem is not None or part.volume is None:
            raise Unreadable(part.problem or "a part of it is missing")
        offset = part.begin + int(first) * extent
        each = size // count
        if int(first) < 0 or int(first) * extent + each > part.extents * extent or offset + each > part.volume.size:
            raise Unreadable("it lies outside its physical volume")
        parts.append((part.volume, offset))
    yield _Piece(begin, size, stripe, parts)


def _are_gapless(pieces: Sequence[_Piece], size: int) -> bool:
    at = 0
    for piece in pieces:
        if piece.begin != at:
            return False
        at += piece.size
    return bool(pieces) and at == size


class _Logical(ReadOnly):
    """The bytes of a logical volume."""

    def __init__(self, pieces: Sequence[_Piece], size: int) -> None:
        super().__init__(size)
        self._pieces = pieces

    def _at(self, offset: int, length: int) -> bytes:
        found = []
        for piece in self._pieces:
            inside = offset - piece.begin
            while length and 0 <= inside < piece.size:
                row, rest = divmod(inside, piece.stripe * len(piece.parts))
                number, within = divmod(rest, piece.stripe)
                volume, begin = piece.parts[number]
                step = min(length, piece.stripe - within, piece.size - inside)
                data = bytes_at(volume.stream, begin + row * piece.stripe + within, step)
                if len(data) != step:
                    raise EOFError("a physical volume ends before its logical volume does")
                found.append(data)
                inside += step
                offset += step
                length -= step
        return b"".join(found)


# What lies on a physical volume


def _areas(label: bytes, begin: int) -> Iterator[Tuple[int, int]]:
    """The metadata areas: the second of two lists, each ended by a pair of zeros."""
    at = begin + 40
    lists = 0
    for _number in range(_MOST_AREAS):
        if at + 16 > len(label):
            return
        offset, length = struct.unpack_from("<QQ", label, at)
        at += 16
        if not offset and not length:
            lists += 1
            if lists == 2:
                return
        elif lists == 1:
            yield offset, length


def _text_of(stream: BinaryIO, area: int, length: int) -> Optional[str]:
    """The metadata in an area; None if there are none. :raises Unreadable: they are damaged."""
    header = bytes_at(stream, area, _AREA_HEADER)
    if len(header) < _AREA_HEADER or header[4:20] != _AREA_MAGIC or _checksum(header[4:]) != _first_word(header):
        raise Unreadable("its metadata (LVM) are damaged")
    (size,) = struct.unpack_from("<Q", header, 32)
    begin, count, crc, flags = struct.unpack_from("<QQII", header, 40)
    if not count or flags & _IGNORED:
        return None
    if size != length or not _AREA_HEADER <= begin < size or count > min(size - _AREA_HEADER, _MOST_METADATA):
        raise Unreadable("its metadata (LVM) are damaged")
    text = bytes_at(stream, area + begin, min(count, size - begin))
    text += bytes_at(stream, area + _AREA_HEADER, count - len(text)) if len(text) < count else b""
    if _checksum(text) != crc:
        raise Unreadable("its metadata (LVM) are damaged")
    return text.rstrip(b"\0").decode("utf-8", "replace")


def _first_word(data: bytes) -> int:
    return int(struct.unpack_from("<I", data)[0])


def _checksum(data: bytes) -> int:
    return zlib.crc32(data, _CRC ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


# Its text

_NAME = "\0name"


def _section(text: str) -> Dict[str, Any]:
    """The section of the group, with its name."""
    tokens = [token for token in _TOKENS.findall(text) if not token.startswith("#")]
    document, dummy = _parsed(tokens, 0, 0)
    for name, value in document.items():
        if isinstance(value, dict):
            return dict(value, **{_NAME: name})
    raise Unreadable("its metadata (LVM) make no sense")


def _parsed(tokens: List[str], position: int, depth: int) -> Tuple[Dict[str, Any], int]:
    found: Dict[str, Any] = {}
    if depth > _MOST_DEPTH:
        raise Unreadable("its metadata (LVM) make no sense")
    while position < len(tokens) and tokens[position] != "}":
        name, what = tokens[position], tokens[position + 1]
        if name in found:
            raise Unreadable("its metadata (LVM) make no sense")
        if what == "{":
            found[name], position = _parsed(tokens, position + 2, depth + 1)
            if tokens[position] != "}":
                raise Unreadable("its metadata (LVM) make no sense")
            position += 1
        elif what == "=":
            found[name], position = _parsed_value(tokens, position + 2)
        else:
            raise Unreadable("its metadata (LVM) make no sense")
    return found, position


def _parsed_value(tokens: List[str], position: int) -> Tuple[Any, int]:
    if tokens[position] != "[":
        return _scalar(tokens[position]), position + 1
    values = []
    position += 1
    while tokens[position] != "]":
        if tokens[position] != ",":
            values.append(_scalar(tokens[position]))
        position += 1
    return values, position + 1


def _scalar(token: str) -> Any:
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return int(token) if re.fullmatch(r"-?\d+", token) else token


def _sections(group: Dict[str, Any], name: str) -> Dict[str, Dict[str, Any]]:
    found = group.get(name, {})
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


def _words(section: Dict[str, Any], name: str) -> List[str]:
    value = section.get(name, [])
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


def _content(group: Dict[str, Any]) -> str:
    return repr(group)


def _plain(text: str) -> str:
    return text.replace("-", "")


def _dashed(text: str) -> str:
    return "-".join(text[begin:end] for begin, end in zip(_UUID_PARTS, _UUID_PARTS[1:]))


#: What an unreadable volume is read from.
NOTHING = io.BytesIO()
