# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The budget of connections to each ESXi host: the rule as a function, the file with processes that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import start_time
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, InputError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import budget
from ansible_collections.openvadp.backup.plugins.module_utils.transport.budget import Entry, admissible, slot
from ansible_collections.openvadp.backup.plugins.module_utils.transport.opened import Place
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20
HOSTS = ("esx01", "esx02", "esx03")
LONG = 60

# The rule


def waiting(name: str, *hosts: str, memory: int = 4 * MIB, limit: Optional[int] = None, server: str = "vc") -> Entry:
    return Entry(name, server, hosts, memory, limit)


def open_disk(name: str, *hosts: str, memory: int = 4 * MIB, limit: Optional[int] = None) -> Entry:
    return replace(waiting(name, *hosts, memory=memory, limit=limit), admitted=True)


def opened(count: int, *hosts: str, memory: int = 4 * MIB) -> List[Entry]:
    return [open_disk(f"open-{'-'.join(hosts)}-{number}", *hosts, memory=memory) for number in range(count)]


@pytest.mark.parametrize(
    ("memory", "limit", "room"),
    [
        (4 * MIB, None, 12),  # 48 MiB
        (256 << 10, None, 50),
        (4 * MIB, 8, 8),
        (4 * MIB, 100, 12),
        (64 * MIB, None, 1),  # more than a host has: one at a time
    ],
)
def test_a_host_has_room_for(memory: int, limit: Optional[int], room: int) -> None:
    entries = [waiting(str(number), "esx01", memory=memory, limit=limit) for number in range(100)]
    assert admissible(entries) == {str(number) for number in range(room)}


def test_a_disk_whose_host_is_not_known_counts_for_all() -> None:
    entries = [*opened(6, *HOSTS[:2]), *opened(6, "esx01"), waiting("one", "esx01"), waiting("two", "esx02")]
    assert admissible(entries) == {"two"}
    assert budget.blocking(entries, entries[-2]) == ["esx01"]


def test_hosts_of_another_server_are_others() -> None:
    assert admissible([*opened(12, "esx01"), waiting("same", "esx01"), waiting("other", "esx01", server="vc2")]) == {
        "other"
    }


def test_nobody_overtakes_who_waits_for_a_host_that_both_may_need() -> None:
    entries = [*opened(12, "esx01"), waiting("first", "esx01", "esx02"), waiting("second", "esx02")]
    assert admissible(entries) == set()
    assert budget.blocking(entries, entries[-1]) == ["esx02"]
    assert admissible([*entries, waiting("third", "esx03")]) == {"third"}
    assert admissible(entries[1:]) == {"first", "second"}


def test_a_smaller_limit_counts_for_who_has_it() -> None:
    entries = [*opened(4, "esx01"), waiting("small", "esx01", limit=4)]
    assert admissible(entries) == set()
    assert admissible([*opened(4, "esx01"), waiting("large", "esx01")]) == {"large"}
    # Whoever asks first: the later one would be too many for it.
    assert admissible([waiting("small", "esx01", limit=1), waiting("large", "esx01")]) == {"small"}
    assert admissible([waiting("small", "esx01", limit=2), waiting("large", "esx01")]) == {"small", "large"}


class _World:
    """A model: disks come, are admitted as the rule says, learn their host, and go."""

    def __init__(self) -> None:
        self.entries: List[Entry] = []
        self.count = 0
        self.admitted: List[str] = []

    def step(self, what: str, hosts: List[str], memory: int, limit: Optional[int], pick: int) -> None:
        held = [index for index, entry in enumerate(self.entries) if entry.admitted]
        if what == "come":
            self.count += 1
            self.entries.append(waiting(str(self.count), *hosts, memory=memory, limit=limit))
        elif what == "ask" and self.entries:
            # Any of them asks, as it happens to wake up.
            index = pick % len(self.entries)
            entry = self.entries[index]
            if entry.id in admissible(self.entries):
                self.entries[index] = replace(entry, admitted=True)
                self.check_admission(index)
        elif what == "narrow" and held:
            index = held[pick % len(held)]
            chosen = self.entries[index].hosts
            self.entries[index] = replace(self.entries[index], hosts=(chosen[pick % len(chosen)],))
        elif what in ("go", "die") and self.entries:
            del self.entries[pick % len(self.entries)]

    def check_admission(self, index: int) -> None:
        """Who was just let in fits, and left nobody behind who came before and may need one of its hosts."""
        entry = self.entries[index]
        for host in entry.hosts:
            there = [other for other in self.entries if other.admitted and host in other.hosts]
            if len(there) > 1:
                assert len(there) <= min(50, entry.limit or 50)
                assert sum(other.memory_bytes for other in there) <= 48 * MIB
        could = admissible(self.entries)
        for other in self.entries[:index]:
            if not other.admitted and set(other.hosts) & set(entry.hosts):
                assert other.id in could, "it was overtaken"

    def drain(self) -> None:
        """Everybody who is there gets its turn if only those that are admitted go."""
        while self.entries:
            allowed = admissible(self.entries)
            held = [entry for entry in self.entries if entry.admitted]
            assert allowed or held, "nobody gets on"
            self.entries = [
                replace(entry, admitted=True) if entry.id in allowed else entry
                for entry in self.entries
                if not entry.admitted
            ]


STEPS = st.tuples(
    st.sampled_from(["come", "come", "ask", "ask", "ask", "narrow", "go", "die"]),
    st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3, unique=True),
    st.sampled_from([MIB, 4 * MIB, 16 * MIB, 64 * MIB]),
    st.sampled_from([None, 1, 2, 8]),
    st.integers(0, 1000),
)


@given(st.lists(STEPS, max_size=80))
def test_no_host_is_exceeded_nobody_is_overtaken_and_all_get_their_turn(steps: List[Any]) -> None:
    world = _World()
    for step in steps:
        world.step(*step)
    world.drain()


# The file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the state of a test lies; it is made with the first entry and goes with the last."""
    return tmp_path / "budget"


def take(folder: Path, *hosts: str, limit: int = 2, **options: Any) -> Any:
    return slot(server="vc", hosts=hosts, memory_bytes=4 * MIB, limit=limit, folder=folder, **options)


def entries_of(folder: Path) -> List[Dict[str, Any]]:
    return list(json.loads((folder / "budget.json").read_text(encoding="utf-8"))["entries"])


def test_nothing_is_left_behind(folder: Path) -> None:
    with take(folder, "esx01"), take(folder, "esx01"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [entry["admitted"] for entry in entries_of(folder)] == [True, True]
    assert not folder.exists()


def test_it_lies_where_all_processes_of_the_user_find_it() -> None:
    folder = Path(f"/var/tmp/openvadp-budget-{os.getuid()}")
    with slot(server="test", hosts=["test"], memory_bytes=1):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert "test" in [entry["server"] for entry in entries_of(folder)]


def test_a_folder_of_others_is_not_trusted(folder: Path) -> None:
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(TransportError, match="can't be trusted"), take(folder, "esx01"):
        pass


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"boot_id": "other", "entries": [{}]}', '{"entries": 7}'])
def test_a_file_that_says_nothing_stops_nobody(folder: Path, content: str) -> None:
    folder.mkdir(mode=0o700)
    (folder / "budget.json").write_text(content)
    with take(folder, "esx01"):
        assert len(entries_of(folder)) == 1
    assert not folder.exists()


def test_waiting_ends_in_time_and_says_for_what_it_was(folder: Path) -> None:
    told: List[str] = []
    with take(folder, "esx01", limit=1):
        with pytest.raises(TransportError) as refusal, take(
            folder, "esx01", "esx02", limit=1, wait_timeout=0.3, on_wait=told.append, subject="[ds] x.vmdk"
        ):
            pass
        assert told == ["waiting for a connection to esx01"]
        assert "esx01" in str(refusal.value) and "[ds] x.vmdk" in str(refusal.value) and refusal.value.retryable
        assert len(entries_of(folder)) == 1
    assert not folder.exists()


def test_a_limit_that_makes_no_sense_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="nfc_host_limit"), take(folder, "esx01", limit=0):
        pass
    assert not folder.exists()


def test_waiting_is_cancelled_at_once(folder: Path) -> None:
    cancel = threading.Event()
    with take(folder, "esx01", limit=1):
        began = time.monotonic()
        with pytest.raises(DataPathError, match="another disk failed") as refusal, take(
            folder, "esx01", limit=1, cancel=cancel, on_wait=lambda _reason: cancel.set()
        ):
            pass
        # It says nothing of the source, or another transport would be tried.
        assert "side" not in refusal.value.details
        assert time.monotonic() - began < LONG
    assert not folder.exists()


def test_the_serving_host_frees_the_others(folder: Path) -> None:
    with take(folder, "esx01", "esx02", limit=1) as first:
        first.narrow(Place("10.0.0.7", "10.0.0.7"))  # a name that is not known may be any of them
        assert entries_of(folder)[0]["hosts"] == ["esx01", "esx02"]
        first.narrow(Place("ESX02", "10.9.0.2"))
        with take(folder, "esx01", limit=1):
            assert [entry["hosts"] for entry in entries_of(folder)] == [["esx02"], ["esx01"]]
        first.narrow(Place("esx01", "esx01"))  # opened again, elsewhere
        with take(folder, "esx02", limit=1):
            pass


class _Served:
    """What a slot wants of an endpoint."""

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path


@pytest.mark.parametrize("form", ["esx02", "{nfcip:10.9.0.2,hostname:esx02}"])
@pytest.mark.parametrize("scheme", ["vpxa-nfcssl", "FASTLZ-vpxa-nfc"])
def test_the_serving_host_is_learnt_from_what_comes_into_the_log(
    folder: Path, tmp_path: Path, scheme: str, form: str
) -> None:
    log = tmp_path / "log"
    line = f"nbdkit: debug: DISKLIB-LIB   : Opened '{scheme}://[ds] a/a.vmdk@%s:902' (0x1e): custom.\n"
    log.write_text(line % "esx01")
    with take(folder, "esx01", "esx02") as held:
        held.opened(_Served(log))
        with log.open("a", encoding="utf-8") as stream:
            stream.write(line % form)
        deadline = time.monotonic() + LONG
        while entries_of(folder)[0]["hosts"] != ["esx02"]:
            assert time.monotonic() < deadline, entries_of(folder)
            threading.Event().wait(0.05)
    assert not folder.exists()


HOLDER = """
import sys, threading
from pathlib import Path
from ansible_collections.openvadp.backup.plugins.module_utils.transport.budget import slot
with slot(server="vc", hosts=sys.argv[2].split(","), memory_bytes=4 << 20, limit=int(sys.argv[3]),
          folder=Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.readline()
print("closed", flush=True)
"""


class Holder:
    """A process that opens a disk, and keeps it open until it is told."""

    def __init__(self, folder: Path, hosts: str, limit: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), hosts, str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LONG)


@contextmanager
def holders(folder: Path, count: int, hosts: str = "esx01", limit: int = 1) -> Iterator[List[Holder]]:
    with ExitStack() as stack:
        started = [Holder(folder, hosts, limit) for _number in range(count)]
        for holder in started:
            stack.callback(holder.process.wait, LONG)
            stack.callback(holder.process.kill)
        yield started


def test_what_a_killed_process_held_is_free(folder: Path) -> None:
    with holders(folder, 1) as (one,):
        assert one.line() == "open"
        os.kill(one.process.pid, signal.SIGSTOP)
        with pytest.raises(TransportError), take(folder, "esx01", limit=1, wait_timeout=0.1):
            pass
        one.kill()
        with take(folder, "esx01", limit=1, wait_timeout=LONG):
            assert [entry["process"][0] for entry in entries_of(folder)] == [os.getpid()]
    assert not folder.exists()


def test_a_server_may_outlive_its_module_for_a_while(folder: Path) -> None:
    """Who is killed while it waits leaves nothing; what it held is given away when its server has ended too."""
    gone = (2**22 + 1, 1)  # no such process
    held = replace(open_disk("held", "esx01"), process=gone)
    entries = budget._that_count([held, replace(waiting("waits", "esx01"), process=gone)], 100.0)
    assert entries == [replace(held, ended=100.0)]
    assert budget._that_count(entries, 103.0) == entries
    assert budget._that_count(entries, 105.0) == []


def test_a_pid_that_is_used_again_is_another_process(folder: Path) -> None:
    with take(folder, "esx01", limit=1):
        data = json.loads((folder / "budget.json").read_text(encoding="utf-8"))
        data["entries"][0]["process"] = [os.getpid(), (start_time(os.getpid()) or 0) - 1]
        (folder / "budget.json").write_text(json.dumps(data), encoding="utf-8")
        with take(folder, "esx01", limit=1, wait_timeout=LONG):
            assert len(entries_of(folder)) == 1


def test_many_processes_some_of_them_killed(folder: Path) -> None:
    """Never more than the limit at a time, and all that live get their turn."""
    limit, count = 3, 12
    doomed = set(random.Random(1).sample(range(count), 4))
    with holders(folder, count, limit=limit) as started:
        done, lines = set(), {number: threading.Event() for number in range(count)}
        for number, holder in enumerate(started):
            threading.Thread(target=lambda h=holder, n=number: h.line() == "open" and lines[n].set()).start()
        deadline = time.monotonic() + LONG
        while len(done) < count:
            assert time.monotonic() < deadline, sorted(done)
            if folder.exists():
                with budget._Ledger(folder)._locked() as entries:
                    counts = Counter(entry.admitted for entry in entries)
                assert counts[True] <= limit, counts
            for number, event in lines.items():
                if number not in done and event.is_set():
                    if number in doomed:
                        started[number].kill()
                    else:
                        started[number].tell()
                        assert started[number].process.wait(LONG) == 0
                    done.add(number)
            threading.Event().wait(0.02)
    with take(folder, "esx01", limit=1, wait_timeout=LONG):
        assert len(entries_of(folder)) == 1
    assert not folder.exists()
