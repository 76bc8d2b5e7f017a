# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a log of VDDK, nbdkit or a backup product means: causes, ranked, each with how certain it is and its evidence.

Any size and any bytes: lines are read one by one, and of each cause only a few are kept. The words are those of
:mod:`vix_errors`; what only several lines together say is worked out here.
"""

from __future__ import annotations

import codecs
import ipaddress
import os
import re
import stat
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, BinaryIO, Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from ..errors import InputError
from .opened import opened_in, places_in
from .vix_errors import CAUSES, CERTAIN, LIKELY, POSSIBLE, UNKNOWN, UNKNOWN_CAUSE, Cause, Sign, is_trouble, signs_of

_CHUNK_BYTES = 256 * 1024
_SAMPLE_BYTES = 4096
# A line that goes on for longer is cut into pieces: a file without line ends must not fill the memory.
_LINE_CHARS = 4 * 1024
_LOOKED_AT_CHARS = 2000
_EVIDENCE_CHARS = 400
_EVIDENCE_FIRST = 3
_EVIDENCE_LAST = 2
# A vague number is explained by what was said so many lines before it at most: one failed open logs some twenty.
_NEARBY_LINES = 40
_HOSTS = 1000

_RANK = {CERTAIN: 0, LIKELY: 1, POSSIBLE: 2}
_DEFAULT_STACK = "defaultTcpipStack"
# VMkernel NICs of these services may lie in one subnet among themselves (VADP facts 26).
_MAY_OVERLAP = (frozenset({"vmotion"}), frozenset({"iscsi"}), frozenset({"nsx"}))

_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True)
class Nic:
    """A VMkernel NIC of an ESXi host, as the option ``esxi_nics`` gives it."""

    host: str
    device: str
    network: Any
    address: str
    portgroup: str = ""
    services: FrozenSet[str] = frozenset()
    stack: str = _DEFAULT_STACK

    @classmethod
    def from_option(cls, option: Mapping[str, Any]) -> Nic:
        """:raises InputError: address or netmask make no network."""
        try:
            interface = ipaddress.ip_interface(f"{option['ip']}/{option['netmask']}")
        except ValueError as error:
            raise InputError(
                "A VMkernel NIC's address can't be used",
                subject=f"{option['device']} of {option['host']}",
                reason=str(error),
                remedy="Give ip and netmask as 192.0.2.10 and 255.255.255.0, or the prefix's length as netmask",
            ) from error
        return cls(
            host=option["host"],
            device=option["device"],
            network=interface.network,
            address=str(interface.ip),
            portgroup=option.get("portgroup") or "",
            services=frozenset(option.get("services") or ()),
            stack=option.get("netstack") or _DEFAULT_STACK,
        )

    def __str__(self) -> str:
        services = ", ".join(sorted(self.services)) or "no service"
        where = f" on {self.portgroup}" if self.portgroup else ""
        return f"{self.host}: {self.device} {self.address}/{self.network.prefixlen}{where} ({services})"


def overlaps(nics: Sequence[Nic]) -> List[Tuple[Nic, Nic]]:
    """Pairs of one host and TCP/IP stack in one subnet, but those that may be so among themselves (VADP facts 26)."""
    return [
        (one, other)
        for one, other in combinations(nics, 2)
        if _same_name(one.host, other.host)
        and one.stack == other.stack
        and one.device != other.device
        and one.network.version == other.network.version
        and one.network.overlaps(other.network)
        and not any(_only(kind, one) and _only(kind, other) for kind in _MAY_OVERLAP)
    ]


def _only(kind: FrozenSet[str], nic: Nic) -> bool:
    return bool(nic.services) and {service.lower() for service in nic.services} <= kind


def _same_name(one: str, other: str) -> bool:
    """Names of hosts, one of them perhaps without its domain. Addresses are compared whole."""
    one, other = one.lower().rstrip("."), other.lower().rstrip(".")
    if one == other:
        return True
    if _is_address(one) or _is_address(other) or ("." in one) == ("." in other):
        return False
    return one.split(".")[0] == other.split(".")[0]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# Secrets

_SECRET_WORD = r"(?:pass(?:word|wd|phrase)?|pwd|secret|cookie|token|session_?(?:id|key)|authorization|ticket|api_?key)"
_SECRETS = [
    # nbdkit's debug output of its parameters: the value is the rest of the line.
    (re.compile(r"(config key=\s*(?:password|cookie|thumbprint_secret)\s*,\s*value=).*", re.I), r"\1***"),
    (re.compile(r"((?:set-)?cookie\s*:\s*|authorization\s*:\s*).*", re.I), r"\1***"),
    (re.compile(r"(vmware_soap_session\s*=\s*)(\"[^\"]*\"?|[^\s;,]+)", re.I), r"\1***"),
    (re.compile(rf"(<[\w:.-]*{_SECRET_WORD}[^>]*>)[^<]*", re.I), r"\1***"),
    (
        re.compile(
            rf"({_SECRET_WORD}[\w.-]*[\"']?\s*(?:=|:|=>)\s*)(\"(?:[^\"\\]|\\.)*\"?|'(?:[^'\\]|\\.)*'?|[^\s,;&\"']+)",
            re.I,
        ),
        r"\1***",
    ),
    (re.compile(rf"(--?\w*{_SECRET_WORD}\w*\s+)(\"[^\"]*\"?|'[^']*'?|\S+)", re.I), r"\1***"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@]+:)[^\s/]+(@)", re.I), r"\1***\2"),
    # The ticket of an NFC connection behind the file's URL: "...vmdk@esx01:902!52 f4 6e 13 ...".
    (re.compile(r"(:\d+!)[0-9a-f]{2}(?:[ -][0-9a-f]{2}){3,}", re.I), r"\1***"),
    (re.compile(r"\b(Basic|Bearer)\s+[A-Za-z0-9+/=._~-]{8,}", re.I), r"\1 ***"),
]


def without_secrets(line: str) -> str:
    """A line of a log without the values of passwords, cookies, session ids, tickets."""
    for pattern, replacement in _SECRETS:
        line = pattern.sub(replacement, line)
    return line


def clean(line: str) -> str:
    """A line as it may be shown: no secrets, no control characters, not too long."""
    text = "".join(char if char.isprintable() else " " for char in without_secrets(line[:_LOOKED_AT_CHARS]))
    text = " ".join(text.split())
    return text if len(text) <= _EVIDENCE_CHARS else text[: _EVIDENCE_CHARS - 4] + " ..."


# Reading


def read_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a log, of bounded length each, in UTF-8 or UTF-16 with or without a mark; what is neither does no
    harm."""
    first = b""
    while len(first) < _SAMPLE_BYTES:
        data = stream.read(_CHUNK_BYTES)
        if not data:
            break
        first += data
    encoding, skip = _encoding(first)
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    data = first[skip:]
    rest = ""
    while data:
        text = rest + decoder.decode(data)
        lines = re.split("\r\n|\n|\r", text)
        # The last piece may go on, and a CR may be half of a line end.
        rest = lines.pop()
        if text.endswith("\r"):
            rest = lines.pop() + "\r"
        for line in lines:
            yield from _pieces(line)
        while len(rest) > _LINE_CHARS:
            yield rest[:_LINE_CHARS]
            rest = rest[_LINE_CHARS:]
        data = stream.read(_CHUNK_BYTES)
    rest = (rest + decoder.decode(b"", final=True)).rstrip("\r")
    if rest:
        yield rest


def _pieces(line: str) -> Iterator[str]:
    for start in range(0, max(len(line), 1), _LINE_CHARS):
        yield line[start : start + _LINE_CHARS]


def _encoding(head: bytes) -> Tuple[str, int]:
    """(encoding, length of its mark). Windows products write UTF-16, some without a mark."""
    for bom, name in _BOMS:
        if head.startswith(bom):
            return name, len(bom)
    sample = head[:_SAMPLE_BYTES]
    if len(sample) >= 4:
        half = len(sample) // 2
        if sample[1::2].count(0) > half * 0.7 and sample[0::2].count(0) < half * 0.1:
            return "utf-16-le", 0
        if sample[0::2].count(0) > half * 0.7 and sample[1::2].count(0) < half * 0.1:
            return "utf-16-be", 0
    return "utf-8", 0


def open_log(path: str) -> BinaryIO:
    """A log file. :raises InputError: it can't be read as one."""
    what = "The log can't be read"
    try:
        # A pipe without a writer would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(
            what, subject=path, reason=error.strerror, remedy="Name a log file that this user may read"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(what, subject=path, reason="it is not a file", remedy="Name the log file itself")
    stream = os.fdopen(descriptor, "rb")
    head = stream.read(8)
    stream.seek(0)
    for magic, name in _COMPRESSED:
        if head.startswith(magic):
            stream.close()
            raise InputError(
                what, subject=path, reason=f"it is compressed ({name})", remedy="Unpack it, and name what comes out"
            )
    return stream


# Diagnosis


class _Evidence:
    """The first few and the last few different lines of a cause."""

    def __init__(self) -> None:
        self.first: List[str] = []
        self.last: List[str] = []
        self._seen: Set[int] = set()

    def add(self, line: str) -> None:
        # The same message at another time, on another thread, for another port is no further evidence.
        key = hash(re.sub(r"\d+", "0", line[:_LOOKED_AT_CHARS]))
        if key in self._seen:
            return
        if len(self._seen) < 1000:
            self._seen.add(key)
        shown = clean(line)
        if len(self.first) < _EVIDENCE_FIRST:
            self.first.append(shown)
        else:
            self.last = (self.last + [shown])[-_EVIDENCE_LAST:]

    @property
    def lines(self) -> List[str]:
        return self.first + self.last


@dataclass
class _Suspicion:
    certainty: str
    evidence: _Evidence = field(default_factory=_Evidence)

    def strengthen(self, certainty: str) -> None:
        if _RANK[certainty] < _RANK[self.certainty]:
            self.certainty = certainty


_CONNECT_TIMED_OUT = re.compile(r"(timed out|no route to host|no answer)", re.I)
_HOST = r"([A-Za-z0-9][A-Za-z0-9._-]*)"
_SERVERS = re.compile(rf"server {_HOST}:\d|lookup for server {_HOST}", re.I)
_REQUESTED = re.compile(r"(?:config key=transports, value=|\btransports=|transport modes?[ :=]+)([a-z]+(?::[a-z]+)*)")
_USED = re.compile(r"debug: transport mode: (\w+)")
_MODES = ("file", "san", "hotadd", "nbdssl", "nbd")


class Diagnosis:
    """Takes a log line by line; :meth:`findings` says what it means.

    :param nics: VMkernel NICs of the hosts, where they are known.
    """

    def __init__(self, nics: Sequence[Nic] = ()) -> None:
        self.nics = list(nics)
        self.lines = 0
        self.troubles = 0
        self.hosts: List[str] = []
        self._suspicions: Dict[str, _Suspicion] = {}
        self._unknown = _Evidence()
        self._meanings: List[str] = []
        self._same_host: List[Set[str]] = []
        self._named_at: Dict[str, int] = {}
        self._suspected_at: Dict[str, int] = {}
        self._requested: List[str] = []
        self._requested_line = ""
        self._timed_out = False

    def feed(self, line: str) -> None:
        self.lines += 1
        self._transport(line)
        if not is_trouble(line):
            return
        self.troubles += 1
        self._remember_hosts(line)
        signs = signs_of(line)
        known = False
        for sign in signs:
            if sign.cause == UNKNOWN:
                if sign.meaning not in self._meanings and len(self._meanings) < 10:
                    self._meanings.append(sign.meaning)
                continue
            known = True
            cause = sign.cause
            witness = self._better_witness(sign) if sign.vague else None
            if witness is not None:
                self._suspicions[witness].evidence.add(line)
                continue
            if sign.witness:
                self._named_at[cause] = self.lines
            if sign.certainty != POSSIBLE:
                self._suspected_at[cause] = self.lines
            self._suspect(cause, sign.certainty, line)
            for other in sign.others:
                self._suspect(other, POSSIBLE, line)
            if cause == "port_902" and _CONNECT_TIMED_OUT.search(line):
                self._timed_out = True
        if not known:
            self._unknown.add(line)

    def _suspect(self, cause: str, certainty: str, line: str) -> None:
        suspicion = self._suspicions.setdefault(cause, _Suspicion(certainty))
        suspicion.strengthen(certainty)
        suspicion.evidence.add(line)

    def _better_witness(self, sign: Sign) -> Optional[str]:
        """The cause that a line nearby has named, the newest. What is no more than possible gives way to any other."""
        heard = self._suspected_at if sign.certainty == POSSIBLE else self._named_at
        recent = [(at, cause) for cause, at in heard.items() if self.lines - at <= _NEARBY_LINES]
        return max(recent)[1] if recent else None

    def _remember_hosts(self, line: str) -> None:
        for match in _SERVERS.finditer(line):
            self._remember([match.group(match.lastindex or 0)])
        for place in places_in(line):
            self._remember(place.names)

    def _remember(self, names: Sequence[str]) -> None:
        """Names of one host."""
        new = [name.lower().rstrip(".") for name in names]
        if len(self.hosts) >= _HOSTS:
            return
        self.hosts += [name for name in new if name not in self.hosts]
        known = next((one for one in self._same_host if one & set(new)), None)
        if known is None:
            self._same_host.append(set(new))
        else:
            known.update(new)

    def _transport(self, line: str) -> None:
        """Modes asked for and used, also where nothing went wrong otherwise (VADP facts 42)."""
        if "ransport" not in line and "Opened " not in line:
            return
        asked = _REQUESTED.search(line)
        used = _USED.search(line)
        opened = opened_in(line)
        mode = ""
        if used:
            mode = used.group(1)
        elif opened is not None:
            mode = opened.mode
        elif asked:
            modes = asked.group(1).split(":")
            if all(name in _MODES for name in modes):
                self._requested, self._requested_line = modes, line
            return
        if not mode or not self._requested or mode == self._requested[0] or self._requested[0] == "file":
            return
        # nbdkit's own line is sure; a compressed one was seen to be called nfc with nbdssl as well.
        sure = LIKELY if opened is not None and opened.compressed and not used else CERTAIN
        certainty = POSSIBLE if mode in self._requested else sure
        self._suspect("mode_replaced", certainty, self._requested_line)
        self._suspect("mode_replaced", certainty, line)

    # What it comes to

    def findings(self) -> List[Dict[str, Any]]:
        """[{code, meaning, certainty, evidence, remedy, confirm}], the most certain first."""
        suspicions = {
            cause: replace(suspicion) for cause, suspicion in self._suspicions.items() if not self._ruled_out(cause)
        }
        extra: List[str] = []
        remedies: Dict[str, str] = {}
        self._judge_subnet(suspicions, extra, remedies)
        order = {code: number for number, code in enumerate(CAUSES)}
        ranked = sorted(suspicions.items(), key=lambda item: (_RANK[item[1].certainty], order[item[0]]))
        found = [
            _to_result(
                CAUSES[code],
                suspicion.certainty,
                (extra if code == "shared_subnet" else []) + suspicion.evidence.lines,
                remedies.get(code),
            )
            for code, suspicion in ranked
        ]
        if not found and self.troubles:
            meaning = UNKNOWN_CAUSE.meaning
            if self._meanings:
                meaning = f"no known cause; what the log says is: {'; '.join(self._meanings)}"
            found.append(_to_result(UNKNOWN_CAUSE, POSSIBLE, self._unknown.lines, meaning=meaning))
        return found

    def _ruled_out(self, cause: str) -> bool:
        """Whether the modes that were asked for can't have met a cause that nothing but a vague number names."""
        return (
            cause == "hotadd_slots"
            and self._suspicions[cause].certainty == POSSIBLE
            and bool(self._requested)
            and "hotadd" not in self._requested
        )

    def _judge_subnet(self, suspicions: Dict[str, _Suspicion], extra: List[str], remedies: Dict[str, str]) -> None:
        """Two NICs in one subnet (VADP facts 26): a cut at the open makes them likely, the list of NICs certain."""
        pairs = overlaps(self.nics)
        concerned = [pair for pair in pairs if self._is_named(pair[0])]
        cut_at_open = "shared_subnet" in suspicions
        cut = suspicions.get("connection_cut")
        closed = suspicions.get("port_902")
        if concerned and (cut_at_open or cut or (closed and self._timed_out)):
            certainty = CERTAIN if cut_at_open else LIKELY
            suspicion = suspicions.setdefault("shared_subnet", _Suspicion(certainty))
            suspicion.certainty = certainty
            extra += [f"{one}; {other}" for one, other in concerned]
            one, other = concerned[0]
            remedies["shared_subnet"] = (
                f"{CAUSES['shared_subnet'].remedy}. Here {one.device} and {other.device} of {one.host} lie in"
                f" {one.network}: move the one that carries backup traffic"
            )
            source = cut or closed
            if not cut_at_open and source is not None:
                suspicion.evidence = source.evidence
                # Then it is not the only thing that is possible.
                source.certainty = max(source.certainty, LIKELY, key=_RANK.__getitem__)
        elif cut_at_open and self._all_known():
            # The host's NICs are known, and no two of them share a subnet: something else cut the connection.
            gone = suspicions.pop("shared_subnet")
            if cut is None:
                suspicions["connection_cut"] = _Suspicion(LIKELY, gone.evidence)
            return
        if cut_at_open and cut is not None:
            shared = suspicions["shared_subnet"]
            extra += [line for line in cut.evidence.lines if line not in shared.evidence.lines]
            suspicions["connection_cut"] = _Suspicion(POSSIBLE, cut.evidence)

    def _is_named(self, nic: Nic) -> bool:
        """Whether the log names the NIC's host, by a name or by the address of one of its NICs. Where it names nobody
        all may be meant."""
        if not self.hosts:
            return True
        names = [nic.host] + [other.address for other in self.nics if _same_name(other.host, nic.host)]
        return any(_same_name(name, host) for name in names for host in self.hosts)

    def _all_known(self) -> bool:
        """Whether the NICs of every host that the log names were given."""
        known = [nic.host for nic in self.nics] + [nic.address for nic in self.nics]
        return bool(self.nics and self.hosts) and all(
            any(_same_name(name, host) for name in known for host in names) for names in self._same_host
        )


def _to_result(
    cause: Cause, certainty: str, evidence: List[str], remedy: Optional[str] = None, meaning: Optional[str] = None
) -> Dict[str, Any]:
    return {
        "code": cause.code,
        "meaning": meaning or cause.meaning,
        "certainty": certainty,
        "evidence": evidence,
        "remedy": remedy or cause.remedy,
        "confirm": cause.confirm,
    }


def diagnose(lines: Iterable[str], nics: Sequence[Nic] = ()) -> Diagnosis:
    """Read all *lines*; ask the result for its :meth:`Diagnosis.findings`."""
    diagnosis = Diagnosis(nics)
    for line in lines:
        diagnosis.feed(line)
    return diagnosis
