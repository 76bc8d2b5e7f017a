# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How many disks are open on one ESXi host, kept by all processes of a user on this machine (VADP facts 19, 20).

An ESXi host serves a limited number of disks, in a limited memory, however many backups ask for them. Which host serves
a disk shows only when it is open, so until then the disk counts for every host of its datastore. Who comes first is
served first: nobody overtakes somebody who waits for a host that both may need, so nobody waits for ever.

The state is one file in a private folder, under the folder's lock. Whoever waits looks again and again whether its turn
has come: nobody needs to wake it up, so nothing hangs if somebody dies. An entry counts as long as its process lives,
and then as long as the server that this process started may outlive it. File and folder go with the last entry.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from ..datapath.processes import start_time
from ..errors import DataPathError, InputError, TransportError
from .endpoints import GUARD_SECONDS, Endpoint
from .opened import Place, last_place
from .vddk import Vddk, connection_bytes, private_folder

if TYPE_CHECKING:
    from ..vsphere.session import Session

#: VADP facts 20: disks at one time, and memory for them where nobody has said how much a host has.
HOST_DISKS = 50
HOST_MEMORY_BYTES = 48 << 20

#: A day: whoever holds a connection copies a disk, which may be large.
WAIT_SECONDS = 86400.0

_LOOK_SECONDS = 0.25
_FOLLOW_SECONDS = 1.0
_OUTLIVES_SECONDS = GUARD_SECONDS + 1.0
_FILE = "budget.json"

OnWait = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A disk that is open, or waits for that.

    :param server: the vCenter or ESXi host; hosts of the same name under another server are others.
    :param hosts: those that may serve the disk.
    :param memory_bytes: what the disk takes of its host's memory.
    :param limit: disks on one host that whoever opens this one wants at most.
    :param process: (pid, start time) of who has or awaits it.
    :param ended: when that process was seen to have ended, on the clock of this boot.
    """

    id: str
    server: str
    hosts: Tuple[str, ...]
    memory_bytes: int
    limit: Optional[int] = None
    admitted: bool = False
    process: Tuple[int, int] = (0, 0)
    ended: Optional[float] = None


class Slot:
    """The permission to open one disk. Made by :func:`slot`.

    :param hosts: those that may serve the disk.
    """

    def __init__(self, ledger: _Ledger, number: str, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)
        self._ledger = ledger
        self._id = number
        self._over = threading.Event()
        self._follower: Optional[threading.Thread] = None

    def narrow(self, place: Place) -> None:
        """VDDK's log said who serves the disk: it counts for that host alone.

        A name that is not among :attr:`hosts` changes nothing: it may be another name of any of them (VADP facts 25).
        """
        said = [name.lower() for name in place.names]
        known = [name for name in self.hosts if name.lower() in said]
        if known:
            self._ledger.narrow(self._id, tuple(known))

    def opened(self, endpoint: Endpoint) -> None:
        """The disk is served by *endpoint*, from whose log the serving host is learnt while it is read.

        VDDK opens the disk again for each client of the endpoint, and vCenter then chooses the host again: what the log
        says up to now does not count.
        """
        if len(self.hosts) > 1:
            seen = endpoint.log_path.stat().st_size
            arguments = (endpoint.log_path, seen)
            follower = threading.Thread(target=self._follow, args=arguments, name="serving host", daemon=True)
            follower.start()
            self._follower = follower

    def _follow(self, log: Path, seen: int) -> None:
        """Read what is new in the log, as the connection may break and the disk be opened at another host."""
        before = None
        while not self._over.wait(_FOLLOW_SECONDS):
            try:
                with log.open("rb") as stream:
                    stream.seek(seen)
                    text, newline, _rest = stream.read().rpartition(b"\n")
            except OSError:
                continue
            seen += len(text) + len(newline)
            place = last_place(text.decode("utf-8", "replace"))
            if place is not None and place != before:
                self.narrow(place)
                before = place

    def close(self) -> None:
        """The disk is closed; somebody else may open one."""
        self._over.set()
        if self._follower is not None:
            self._follower.join()
        self._ledger.leave(self._id)


def for_disk(
    session: Session,
    hosts: Sequence[str],
    vddk: Vddk,
    limit: Optional[int] = None,
    *,
    subject: str = "",
    wait_timeout: Optional[float] = WAIT_SECONDS,
    cancel: Optional[threading.Event] = None,
    on_wait: Optional[OnWait] = None,
) -> contextlib.AbstractContextManager[Slot]:
    """The slot of a disk that is opened by ``nbd`` or ``nbdssl``; to be held as long as it is open.

    :param hosts: names of the hosts that may serve it: all that see its datastore (with a snapshot), or the VM's own.
    :param limit: option ``nfc_host_limit``.
    :param subject: the disk, for messages.
    """
    return slot(
        server=session.about.instanceUuid or session.connection.hostname,
        hosts=hosts or [session.connection.hostname],
        memory_bytes=connection_bytes(vddk),
        limit=limit,
        wait_timeout=wait_timeout,
        subject=subject,
        cancel=cancel,
        on_wait=on_wait,
    )


@contextlib.contextmanager
def slot(
    *,
    server: str,
    hosts: Sequence[str],
    memory_bytes: int,
    limit: Optional[int] = None,
    wait_timeout: Optional[float] = WAIT_SECONDS,
    folder: Optional[Path] = None,
    subject: str = "",
    cancel: Optional[threading.Event] = None,
    on_wait: Optional[OnWait] = None,
) -> Iterator[Slot]:
    """Wait until one more disk may be opened on every one of *hosts*, and hold that permission.

    :param server: vCenter's instance UUID, or its host name.
    :param hosts: names of all hosts that may serve the disk.
    :param memory_bytes: what the disk takes of the host's memory: buffer size times count.
    :param limit: disks on one host at most, where that is less than the host bears.
    :param wait_timeout: seconds; None: without end.
    :param folder: where the state lies, for those who must not meet others.
    :param cancel: when set, the waiting ends.
    :param on_wait: called with what is waited for ("waiting for a connection to esx01"), each time that it changes.
    :raises TransportError: it took too long.
    :raises DataPathError: it was cancelled.
    """
    if limit is not None and limit < 1:
        raise InputError("The option nfc_host_limit is out of range", subject=str(limit), remedy="Give at least 1")
    entry = Entry(
        id=secrets.token_hex(8),
        server=server,
        hosts=tuple(dict.fromkeys(hosts)),
        memory_bytes=memory_bytes,
        limit=limit,
        process=(os.getpid(), start_time(os.getpid()) or 0),
    )
    ledger = _Ledger(folder)
    held = Slot(ledger, entry.id, entry.hosts)
    try:
        reason = ledger.enter(entry)
        if reason is not None:
            _wait(ledger, entry, reason, wait_timeout, subject, cancel or threading.Event(), on_wait)
        yield held
    finally:
        held.close()


def _wait(
    ledger: _Ledger,
    entry: Entry,
    reason: str,
    timeout: Optional[float],
    subject: str,
    cancel: threading.Event,
    on_wait: Optional[OnWait],
) -> None:
    began, told = time.monotonic(), None
    current: Optional[str] = reason
    while current is not None:
        if current != told and on_wait is not None:
            on_wait(current)
        told = current
        left = _LOOK_SECONDS if timeout is None else min(_LOOK_SECONDS, began + timeout - time.monotonic())
        if left <= 0:
            raise TransportError(
                "No connection to an ESXi host became free in time",
                subject=subject or None,
                reason=f"after {timeout:g} s still {current}",
                remedy="Back up fewer machines at a time, or raise nfc_host_limit if it is below what the hosts bear",
                retryable=True,
            )
        if cancel.wait(left):
            raise DataPathError("The disk was not opened", subject=subject or None, reason="another disk failed")
        current = ledger.ask(entry)


# The rule


def admissible(entries: Sequence[Entry]) -> Set[str]:
    """Ids of those that wait and may open their disk now. A pure function of what the file holds.

    :param entries: who is admitted, and who waits, in the order in which they came.
    """
    use = _Use(entry for entry in entries if entry.admitted)
    taken: Set[Tuple[str, str]] = set()
    found: List[Entry] = []
    for entry in entries:
        if entry.admitted:
            continue
        places = set(_places(entry))
        # A host that somebody waits for is not given to who came later, though there be room for a smaller disk: else
        # those who need a host among several could wait for ever.
        # Nor to one who would be too many for the smaller limit of somebody who may open, and has not done so yet.
        if places & taken or not use.has_room(entry) or not all(use.allows_more(one, places) for one in found):
            taken |= places
        else:
            use.add(entry)
            found.append(entry)
    return {entry.id for entry in found}


def blocking(entries: Sequence[Entry], entry: Entry) -> List[str]:
    """Names of the hosts that *entry* waits for: those that have no room, else those that others wait for before it."""
    use = _Use(other for other in entries if other.admitted)
    full = [host for host in entry.hosts if not use.has_room(replace(entry, hosts=(host,)))]
    return full or list(entry.hosts)


def _limit(entry: Entry) -> int:
    return min(HOST_DISKS, entry.limit or HOST_DISKS)


def _places(entry: Entry) -> List[Tuple[str, str]]:
    return [(entry.server, host) for host in entry.hosts]


class _Use:
    """What is taken of each host."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._disks: Counter[Tuple[str, str]] = Counter()
        self._memory: Counter[Tuple[str, str]] = Counter()
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        for place in _places(entry):
            self._disks[place] += 1
            self._memory[place] += entry.memory_bytes

    def allows_more(self, entry: Entry, places: Set[Tuple[str, str]]) -> bool:
        """Whether *entry*, which is counted already, bears one more disk on each of *places*."""
        return all(self._disks[place] < _limit(entry) for place in _places(entry) if place in places)

    def has_room(self, entry: Entry) -> bool:
        """One disk is always let in: what does not fit in an idle host would wait for ever."""
        return all(
            self._disks[place] == 0
            or (self._disks[place] < _limit(entry) and self._memory[place] + entry.memory_bytes <= HOST_MEMORY_BYTES)
            for place in _places(entry)
        )


# The file


class _Ledger:
    """The entries of all processes of this user, in the order in which they came."""

    def __init__(self, folder: Optional[Path] = None) -> None:
        self._folder = folder

    def enter(self, entry: Entry) -> Optional[str]:
        """Add an entry at the end. :returns: None if it is admitted, else what it waits for."""
        with self._locked() as entries:
            entries.append(entry)
            return _ask(entries, entry)

    def ask(self, entry: Entry) -> Optional[str]:
        """Whether the turn of an entry has come, as :meth:`enter`."""
        with self._locked() as entries:
            if all(known.id != entry.id for known in entries):
                # Somebody removed the file. Where the entry stood is not known.
                entries.append(entry)
            return _ask(entries, entry)

    def narrow(self, number: str, hosts: Tuple[str, ...]) -> None:
        """An entry that is there counts for these hosts."""
        with self._locked() as entries:
            entries[:] = [replace(entry, hosts=hosts) if entry.id == number else entry for entry in entries]

    def leave(self, number: str) -> None:
        """Remove an entry, if it is there. What can't be written goes with this process."""
        with contextlib.suppress(TransportError), self._locked() as entries:
            entries[:] = [entry for entry in entries if entry.id != number]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[List[Entry]]:
        """The entries that count, to be changed; what was changed is in the file afterwards.

        :raises TransportError: the folder or the file can't be used.
        """
        folder, lock = self._lock_folder()
        try:
            entries = _load(folder / _FILE)
            before = list(entries)
            entries = _that_count(entries, time.monotonic())
            yield entries
            if entries != before or not entries:
                _store(folder, entries)
        except OSError as error:
            raise TransportError(
                "The connections to the ESXi hosts can't be counted",
                subject=str(folder),
                reason=error.strerror,
                remedy="Make room in that file system, or make the folder writable",
            ) from error
        finally:
            os.close(lock)

    def _lock_folder(self) -> Tuple[Path, int]:
        while True:
            folder = private_folder("openvadp-budget", "The folder of the connections' budget", path=self._folder)
            try:
                lock = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # The last one that left may have removed it before we had the lock.
                if os.stat(str(folder)).st_ino == os.fstat(lock).st_ino:
                    return folder, lock
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _ask(entries: List[Entry], entry: Entry) -> Optional[str]:
    if entry.id in admissible(entries):
        entries[:] = [replace(known, admitted=True) if known.id == entry.id else known for known in entries]
        return None
    return "waiting for a connection to " + " or ".join(blocking(entries, entry))


def _that_count(entries: Sequence[Entry], now: float) -> List[Entry]:
    """Those whose process lives; and, for a while, those of a killed process whose server may live."""
    found = []
    begun = {pid: start_time(pid) for pid in {entry.process[0] for entry in entries}}
    for entry in entries:
        if begun[entry.process[0]] == entry.process[1]:
            found.append(entry)
        elif entry.admitted and entry.ended is None:
            found.append(replace(entry, ended=now))
        elif entry.admitted and entry.ended is not None and now - entry.ended < _OUTLIVES_SECONDS:
            found.append(entry)
    return found


def _load(path: Path) -> List[Entry]:
    """The file's entries; none if it is of another boot, or not ours: it guards a host, and must not stop a backup."""
    try:
        data = json.loads(path.read_bytes())
        if data["boot_id"] != _boot_id():
            return []
        return [_entry(fields) for fields in data["entries"]]
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _entry(fields: Dict[str, Any]) -> Entry:
    pid, started = fields["process"]
    return replace(Entry(**fields), hosts=tuple(fields["hosts"]), process=(int(pid), int(started)))


def _store(folder: Path, entries: List[Entry]) -> None:
    path = folder / _FILE
    if not entries:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with contextlib.suppress(OSError):  # something else lies there
            folder.rmdir()
        return
    # It need not outlive a crash of the machine: its processes don't.
    data = {"boot_id": _boot_id(), "entries": [vars(entry) for entry in entries]}
    fresh = folder / (_FILE + ".new")
    fresh.write_text(json.dumps(data), encoding="utf-8")
    os.replace(str(fresh), str(path))


@functools.lru_cache(maxsize=None)
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
