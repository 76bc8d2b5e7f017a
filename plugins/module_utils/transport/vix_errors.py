# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What VDDK's log says, in words: error numbers and the lines that tell more than the number (VADP facts 26, 27, 47).

NBD itself reports nothing but EIO. Only numbers whose meaning is published stand here; any other stays unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Pattern, Tuple


@dataclass(frozen=True)
class Finding:
    """What a log means.

    :param code: the VIX or DiskLib number, or None where the text alone tells.
    :param meaning: what happened, a clause without a full stop.
    :param remedy: what to do about it, or None if that is not known.
    :param evidence: the line of the log it was read from.
    :param retryable: may succeed later without anybody changing anything.
    """

    code: Optional[int]
    meaning: str
    remedy: Optional[str]
    evidence: str
    retryable: bool = False


class _Meaning(NamedTuple):
    text: str
    remedy: Optional[str] = None
    retryable: bool = False


_OPEN_902 = (
    "Open the NFC port (902) from this machine to every ESXi host that sees the datastore, and check that their names"
    " resolve here"
)
_PRIVILEGES = (
    "Grant the user VirtualMachine.Provisioning.DiskRandomRead (for writing DiskRandomAccess) and GetVmFiles on the VM,"
    " and Datastore.Browse and Datastore.FileManagement on its datastores"
)
_SERVER = (
    "Check that this machine reaches the server named in 'hostname' on its port, and its hosts on the NFC port (902)"
)
_MAINTENANCE = "Wait for the host to leave maintenance mode, and run again"

# VADP facts, "VIX error numbers"
_CODES: Dict[int, _Meaning] = {
    1: _Meaning(
        "VDDK failed without saying why (1); a wrong thumbprint does that at the open",
        "Check that the thumbprint is that of the server named in 'hostname'; the log's last lines may say more",
    ),
    2: _Meaning("out of memory (2)", "Copy fewer disks in parallel", True),
    3: _Meaning("VDDK was given an argument it does not accept (3)"),
    4: _Meaning("the disk's file was not found (4)", "Run again: a migration may have moved the disk meanwhile"),
    5: _Meaning("the disk is busy (5)", "Wait until nothing else uses it, and run again", True),
    6: _Meaning("not supported (6)"),
    8: _Meaning("the disk is full (8)", "Free space on the datastore"),
    10: _Meaning("cancelled (10)"),
    11: _Meaning("the file can only be read (11)"),
    12: _Meaning("the file exists already (12)"),
    13: _Meaning("no access to the disk's file (13)", _PRIVILEGES),
    15: _Meaning("the disk's file is locked (15)", "End what else uses it (another backup, a hot-added disk)", True),
    24: _Meaning("a buffer is too small (24)"),
    27: _Meaning("a name is not valid UTF-8 (27)"),
    30: _Meaning("the disk is encrypted and its key was not had (30)", "Grant the user Cryptographer.Access"),
    32: _Meaning("the licence does not allow it (32)", "Free ESXi can't be backed up: license the host"),
    35: _Meaning("the server refused the user name or the password (35)", "Check the credentials"),
    36: _Meaning(
        "the connection to the host was lost (36)", "Check the network to the ESXi hosts, and run again", True
    ),
    2000: _Meaning("not found (2000)"),
    2338: _Meaning(
        "no connection to the ESXi host that serves the disk (2338 NBD_ERR_NETWORK_CONNECT)", _OPEN_902, True
    ),
    3014: _Meaning("the user lacks a privilege on the host (3014)", _PRIVILEGES),
    4000: _Meaning("the VM was not found (4000)"),
    4003: _Meaning("the VM is a template (4003)"),
    13000: _Meaning("a snapshot operation failed (13000)"),
    13006: _Meaning("the user lacks a snapshot privilege (13006)", _PRIVILEGES),
    13010: _Meaning("the snapshot is locked (13010)", None, True),
    13014: _Meaning("the snapshot's disk is locked (13014)", None, True),
    13016: _Meaning("an independent disk is not in the snapshot (13016)"),
    13019: _Meaning("the VM has as many snapshots as it may have (13019)", "Remove or consolidate snapshots"),
    14006: _Meaning("the handshake with the host's disk service failed (14006)", None, True),
    14008: _Meaning("the server was not found (14008)", "Check that the names of vCenter and its hosts resolve here"),
    14009: _Meaning("the ESXi host refused the connection for disk data (14009)", _OPEN_902, True),
    14010: _Meaning("TCP error on the way to the ESXi host (14010)", _OPEN_902, True),
    14011: _Meaning("the connection to the ESXi host was lost (14011)", "Check the network, and run again", True),
    14012: _Meaning("the host's hash file can't be used (14012)"),
    14013: _Meaning("the host's hash file can't be used (14013)"),
    14014: _Meaning("the host is shutting down or entering maintenance mode (14014)", _MAINTENANCE, True),
    14015: _Meaning("the host is not available, as in maintenance mode (14015)", _MAINTENANCE, True),
    16000: _Meaning("the disk is not valid (16000)"),
    16007: _Meaning("beyond the end of the disk (16007)"),
    16008: _Meaning("the chain of delta disks does not fit together (16008)", "Consolidate the VM's disks"),
    16014: _Meaning("the disk is encrypted and its key was not had (16014)", "Grant the user Cryptographer.Access"),
    16053: _Meaning("VDDK could not start one of its parts (16053)"),
    16054: _Meaning("the connection is not valid (16054)", None, True),
    16064: _Meaning(
        "no licence for this feature (16064)",
        "License the host, and grant Global.DisableMethods and Global.EnableMethods at vCenter's level",
    ),
    16067: _Meaning("the capacities of the chain differ (16067)"),
    18000: _Meaning("no connection to the server (18000)", _SERVER, True),
}

# Lines that say more than a number, the most telling first.
_TEXTS: List[Tuple[Pattern[str], Optional[int], _Meaning]] = [
    (
        re.compile(r"(Failed to verify SSL certificate|thumbprint.*(mismatch|expected)|expected.*thumbprint)", re.I),
        1,
        _Meaning(
            "the server's certificate has another thumbprint than the one given",
            "Leave 'thumbprint' out so that it is worked out, or correct it",
        ),
    ),
    (
        re.compile(r"Current license or ESXi version prohibits", re.I),
        None,
        _Meaning("the host's licence does not allow backups", "Free ESXi can't be backed up: license the host"),
    ),
    (
        re.compile(r"host is not licensed for this feature", re.I),
        16064,
        _Meaning(
            "the server says the host is not licensed for this feature",
            "Grant Global.DisableMethods and Global.EnableMethods at vCenter's level, or license the host",
        ),
    ),
    (
        re.compile(r"(incorrect user ?name or password|InvalidLogin|Cannot complete login)", re.I),
        35,
        _CODES[35],
    ),
    (
        re.compile(r"Host address lookup for server \S+ failed", re.I),
        2338,
        _Meaning(
            "the name of the ESXi host that serves the disk does not resolve on this machine",
            "Make the names of all hosts that see the datastore resolve here (DNS or /etc/hosts)",
        ),
    ),
    (
        re.compile(r"(Failed to allocate the requested|NFC error 5\b)", re.I),
        None,
        _Meaning(
            "the ESXi host is out of memory for disk data (NFC error 5)",
            "Copy fewer disks of that host at a time",
            True,
        ),
    ),
    (
        re.compile(r"(Timed out connecting to server|Cannot connect to server|Failed to connect to server)", re.I),
        2338,
        _Meaning("no connection to the ESXi host that serves the disk", _OPEN_902, True),
    ),
]

_NUMBERS = re.compile(
    r"(?:DiskLib error |\bErr(?:or)?(?: code)?[:=]? ?|\bVIX(?:_E\w*)?[ :=]+|\((?:VIX )?)(0x[0-9a-fA-F]+|\d{1,20})\b"
)
_OPENED = "debug: transport mode: "
_ERROR_LINE = re.compile(r"(\berror\b|\bfail|\[NFC ERROR\]|\bcannot\b)", re.I)


def decode_log(text: str) -> Optional[Finding]:
    """What the newest error in *text* means; None when the log has no error that this table knows or can quote.

    A line that names the cause wins over a number; the number of the operation wins over VIX 1, which says nothing.
    What lies before the last successful open was healed by it, and counts only if nothing else is found.
    """
    return _decode(text.rpartition(_OPENED)[2]) or _decode(text)


def _decode(text: str) -> Optional[Finding]:
    lines = [line for line in text.splitlines() if _ERROR_LINE.search(line)]
    for pattern, code, meaning in _TEXTS:
        for line in reversed(lines):
            if pattern.search(line):
                return _finding(code, meaning, line)
    unknown: Optional[Finding] = None
    vague: Optional[Finding] = None
    for line in reversed(lines):
        for match in _NUMBERS.finditer(line):
            code = int(match.group(1), 0) & 0xFFFF
            if code == 1:
                vague = vague or _finding(1, _CODES[1], line)
            elif code in _CODES:
                return _finding(code, _CODES[code], line)
            elif code and unknown is None:
                unknown = Finding(code, f"error {code}, which has no published meaning", None, _clean(line))
    return vague or unknown


def explain_code(code: int, text: str = "") -> Finding:
    """What a number that a call returned means.

    :param text: the library's own words, for a number that stands in no published table.
    """
    meaning = _CODES.get(code)
    if meaning is None:
        words = f" ({text})" if text else ""
        return Finding(code, f"error {code}, which has no published meaning{words}", None, text)
    return _finding(code, meaning, text)


def last_error_line(text: str) -> Optional[str]:
    """The newest line that nbdkit itself marks as an error, without its prefix."""
    for line in reversed(text.splitlines()):
        match = re.search(r"nbdkit: (?:\S+ )?error: (.*)", line)
        if match:
            return match.group(1).strip()
    return None


def _finding(code: Optional[int], meaning: _Meaning, line: str) -> Finding:
    return Finding(code, meaning.text, meaning.remedy, _clean(line), meaning.retryable)


def _clean(line: str) -> str:
    return line.strip()[:500]
