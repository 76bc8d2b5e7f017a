# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import blake3
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import copier
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.copier import copy
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import HashWriter, read_hashes
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import Child, RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20
CLUSTER = 65536
SECTOR = 512
OLD = 0xAA  # what targets hold before a copy


def write_disk(path, segments):
    """A sparse file from (kind, sectors): random data, written zeros, or a hole. Returns its bytes."""
    rng = random.Random(len(segments))
    content = bytearray()
    with open(path, "wb") as stream:
        for kind, sectors in segments:
            data = rng.randbytes(sectors * SECTOR) if kind == "data" else bytes(sectors * SECTOR)
            if kind != "hole":
                stream.seek(len(content))
                stream.write(data)
            content += data
        stream.truncate(len(content))
    return bytes(content)


def random_disk(path, size):
    data = random.Random(1).randbytes(size)
    path.write_bytes(data)
    return data


def old_target(path, size):
    path.write_bytes(bytes([OLD]) * size)
    return path


# Every combination of source and target features, against a model


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Servers that serve the files of a folder by export name, with and without the features that copies can use."""
    folder = tmp_path_factory.mktemp("disks")
    children = []
    with RuntimeDir("farm") as run_dir:

        def start(name, *options):
            socket = os.path.join(run_dir, name)
            argv = ["nbdkit", "-f", "-U", socket, *options, "file", f"dir={folder}"]
            child = Child.start(argv, log_path=socket + ".log", name=name)
            children.append(child)
            child.wait_for_socket(socket, 10)
            return f"nbd+unix:///{{}}?socket={socket}"

        yield (
            folder,
            [start("plain"), start("noextents", "--filter=noextents"), start("single", "--filter=noparallel")],
            [start("target"), start("nozero", "--filter=nozero")],
        )
        for child in children:
            child.stop()


segments = st.lists(st.tuples(st.sampled_from(["data", "zeros", "hole"]), st.integers(1, 400)), min_size=1, max_size=12)
fractions = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 600)), max_size=6)


@settings(max_examples=100)
@given(
    segments=segments,
    fractions=st.none() | fractions,
    align=st.sampled_from([SECTOR, 4096, CLUSTER]),
    request=st.sampled_from([CLUSTER, MIB]),
    zeros=st.sampled_from(["drop", "write"]),
    padded=st.booleans(),
    source=st.integers(0, 2),
    target=st.integers(0, 1),
)
def test_copy_against_a_model(farm, segments, fractions, align, request, zeros, padded, source, target):
    folder, sources, targets = farm
    content = write_disk(folder / "source", segments)
    capacity = len(content)
    limit = capacity + (-capacity % align if padded else 0)
    old_target(folder / "target", limit)
    areas = None
    if fractions is not None:
        areas = Extents.of((int(at * capacity) // SECTOR * SECTOR, sectors * SECTOR) for at, sectors in fractions)
    hashes_path = str(folder / "hashes")
    done = []
    with HashWriter(hashes_path, capacity) as hashes:
        result = copy(
            sources[source].format("source"),
            targets[target].format("target"),
            capacity_bytes=capacity,
            areas=areas,
            hashes=hashes,
            align_bytes=align,
            request_bytes=request,
            zeros=zeros,
            depth=3,
            on_progress=lambda *numbers: done.append(numbers),
        )
    written = (folder / "target").read_bytes()
    assert len(written) == limit
    wanted = (Extents.whole(capacity) if areas is None else areas).clip(capacity).round_out(align, limit)
    position = 0
    for offset, length in wanted:
        assert written[position:offset] == bytes([OLD]) * (offset - position), "touched outside the areas"
        got, expected = written[offset : offset + length], (content + bytes(limit - capacity))[offset : offset + length]
        if zeros == "drop":  # what was dropped is old where the source has zeros
            got = bytes(0 if g == OLD and not e else g for g, e in zip(got, expected)) if got != expected else got
        assert got == expected
        position = offset + length
    assert written[position:] == bytes([OLD]) * (limit - position)

    inside = wanted.clip(capacity)
    covered = []
    for offset, length, digest in read_hashes(hashes_path)[1]:
        covered.append((offset, length))
        assert digest == blake3.blake3(content[offset : offset + length]).hexdigest()
    missing = inside.subtract(Extents.of(covered))
    if areas is not None:
        assert Extents.of(covered) == inside
    for offset, length in missing:
        assert not any(content[offset : offset + length])

    assert done[-1] == (inside.total_bytes, inside.total_bytes)
    assert result.bytes_read <= inside.total_bytes
    if areas is not None:
        assert result.areas == len(wanted)
    # Nothing is counted twice: zeros that a target without zeroing got as data are both.
    both = result.bytes_written + result.bytes_zero
    assert both >= inside.total_bytes
    if targets[target] == targets[0] or zeros == "drop":
        assert both - (limit - capacity) <= inside.total_bytes
    if zeros == "drop" and align == CLUSTER:  # every cluster of zeros was found
        granules = range(0, len(content), CLUSTER)
        data = sum(1 for at in granules if any(content[at : at + CLUSTER]) and wanted.intersect(Extents.of([(at, 1)])))
        assert result.bytes_written <= data * CLUSTER


# What servers see


def requests_of(log_path):
    """(operation, offset, length) of nbdkit's log filter."""
    pattern = re.compile(r" (Read|Write|Zero|Extents|Flush) id=\d+ (?:offset=0x(\w+) count=0x(\w+))?")
    found = []
    with open(log_path) as log:
        for line in log:
            match = pattern.search(line)
            if match:
                found.append((match[1], int(match[2] or "0", 16), int(match[3] or "0", 16)))
    return found


def test_each_cluster_is_written_once_and_whole_and_requests_are_cut(nbdkit, tmp_path):
    capacity = 9 * MIB + 3 * SECTOR
    random_disk(tmp_path / "disk", capacity)
    with open(tmp_path / "disk", "r+b") as stream:
        stream.seek(5 * CLUSTER)
        stream.write(bytes(CLUSTER + 100))
    limit = capacity + -capacity % CLUSTER
    source = nbdkit("-r", "--filter=log", "file", tmp_path / "disk", f"logfile={tmp_path}/source.log")
    target = nbdkit("--filter=log", "memory", limit, f"logfile={tmp_path}/target.log")
    rng = random.Random(5)
    areas = Extents.of(
        (rng.randrange(capacity // SECTOR) * SECTOR, SECTOR * rng.randrange(1, 300)) for _unused in range(40)
    )
    result = copy(source.uri, target.uri, capacity_bytes=capacity, areas=areas, zeros="write")
    asked = requests_of(tmp_path / "source.log")
    got = requests_of(tmp_path / "target.log")
    assert {name for name, _unused, _unused in got} <= {"Write", "Zero", "Flush"}
    assert [name for name, _unused, _unused in got].count("Flush") == 1 and got[-1][0] == "Flush"
    writes = sorted(request[1:] for request in got[:-1])
    assert all(offset % CLUSTER == 0 and length % CLUSTER == 0 and length <= MIB for offset, length in writes)
    assert all(a[0] + a[1] <= b[0] for a, b in zip(writes, writes[1:])), "a cluster was written twice"
    assert Extents.of(writes) == areas.clip(capacity).round_out(CLUSTER, limit)
    reads = [request[1:] for request in asked if request[0] == "Read"]
    assert all(offset + length <= capacity and length <= MIB for offset, length in reads)
    assert sum(length for _unused, length in reads) == result.bytes_read
    assert [name for name, _unused, _unused in asked].count("Extents") == 1, "one question covers all areas nearby"


def test_a_large_hole_costs_little_and_is_zeroed_in_steps(nbdkit, tmp_path):
    size = 1 << 40
    source = nbdkit("-r", "memory", size)
    target = nbdkit("--filter=log", "memory", size, f"logfile={tmp_path}/target.log")
    started = time.monotonic()
    result = copy(source.uri, target.uri, capacity_bytes=size)
    assert (result.bytes_read, result.bytes_written, result.bytes_zero, result.areas) == (0, 0, size, 0)
    areas = Extents.of([(0, 100 * MIB), (1 << 39, MIB)])
    copy(source.uri, target.uri, capacity_bytes=size, areas=areas, zeros="write")
    zeros = [request for request in requests_of(tmp_path / "target.log") if request[0] == "Zero"]
    assert max(length for _unused, _unused, length in zeros) == 32 * MIB
    assert sum(length for _unused, _unused, length in zeros) == 101 * MIB
    assert time.monotonic() - started < 30


def test_one_connection_where_the_server_offers_no_more(nbdkit, tmp_path):
    random_disk(tmp_path / "disk", 4 * MIB)
    log = tmp_path / "log"
    options = ("--filter=log", "--filter=multi-conn")
    source = nbdkit("-r", *options, "file", tmp_path / "disk", "multi-conn-mode=disable", f"logfile={log}")
    target = nbdkit("memory", 4 * MIB)
    copy(source.uri, target.uri, capacity_bytes=4 * MIB)
    assert log.read_text().count(" Connect ") == 1


def test_a_source_that_fails_to_tell_its_allocation_is_read_as_a_whole(nbdkit, tmp_path):
    content = random_disk(tmp_path / "disk", 2 * MIB)
    source = nbdkit("-r", "--filter=error", "file", tmp_path / "disk", "error-extents-rate=1")
    target = nbdkit("file", old_target(tmp_path / "target", 2 * MIB))
    assert copy(source.uri, target.uri, capacity_bytes=2 * MIB).bytes_read == 2 * MIB
    assert (tmp_path / "target").read_bytes() == content


def test_only_what_is_said_to_be_zeros_is_not_read(nbdkit, tmp_path):
    """A hole may hold anything (a snapshot's hole shows its parent); the zero flag alone is a promise."""
    content = random_disk(tmp_path / "disk", 2 * MIB)
    source = nbdkit(
        "-r",
        "eval",
        f"get_size=echo {2 * MIB}",
        f"pread=dd if={tmp_path}/disk iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
        "can_extents=exit 0",
        f"extents=echo 0 {MIB} hole; echo {MIB} {MIB} zero",
    )
    target = nbdkit("file", old_target(tmp_path / "target", 2 * MIB))
    result = copy(source.uri, target.uri, capacity_bytes=2 * MIB, zeros="write")
    assert (result.bytes_read, result.bytes_zero) == (MIB, MIB)
    assert (tmp_path / "target").read_bytes() == content[:MIB] + bytes(MIB)


def test_the_rate_is_kept_from_the_first_second(nbdkit, tmp_path):
    rate, size = 8 * MIB, 12 * MIB
    random_disk(tmp_path / "disk", size)
    source, target = nbdkit("-r", "file", tmp_path / "disk"), nbdkit("memory", size)
    done = []
    started = time.monotonic()
    copy(
        source.uri,
        target.uri,
        capacity_bytes=size,
        rate_limit=rate,
        on_progress=lambda count, total: done.append((time.monotonic() - started, count)),
    )
    seconds = time.monotonic() - started
    assert seconds > size / rate - 0.5
    assert len(done) >= 3
    for elapsed, count in done:
        assert count <= rate * (elapsed + 0.5)
    assert all(b[1] >= a[1] for a, b in zip(done, done[1:]))


# Failures


class Trigger(HashWriter):
    """Does something when the n-th piece has been read; writes no file."""

    def __init__(self, count, action):
        super().__init__("/nonexistent", 1 << 40)
        self.count = count
        self.action = action

    def add(self, offset, data):
        self.count -= 1
        if self.count == 0:
            self.action()


def failing_copy(source, target, size, **options):
    """The failure, kept while the caller looks at the servers."""
    started = time.monotonic()
    with pytest.raises(DataPathError) as caught:
        copy(source.uri, target.uri, capacity_bytes=size, **options)
    assert time.monotonic() - started < 30
    return caught


def assert_disconnected(*servers):
    """nbdkit ends at once only when nobody is connected and nothing is in flight."""
    for server in servers:
        assert server.stop(timeout=5) == 0


def test_a_read_error_names_side_offset_and_errno(nbdkit, tmp_path):
    random_disk(tmp_path / "disk", 8 * MIB)
    source = nbdkit("-r", "--filter=error", "file", tmp_path / "disk", "error-pread-rate=1")
    target = nbdkit("memory", 8 * MIB)
    caught = failing_copy(source, target, 8 * MIB)
    error = caught.value
    assert re.match(r"Reading from the source failed at byte \d+: Input/output error\.", str(error))
    assert error.details["side"] == "source" and error.details["errno"] == "EIO" and error.details["offset"] % MIB == 0
    assert not error.retryable
    assert_disconnected(source, target)


@pytest.mark.parametrize("operation,doing", [("pwrite", "Writing to"), ("zero", "Writing zeros to")])
def test_a_full_target(nbdkit, tmp_path, operation, doing):
    write_disk(tmp_path / "disk", [("data", 4096), ("hole", 4096)])
    source = nbdkit("-r", "file", tmp_path / "disk")
    target = nbdkit("--filter=error", "memory", 4 * MIB, f"error-{operation}=ENOSPC", f"error-{operation}-rate=1")
    caught = failing_copy(source, target, 4 * MIB, zeros="write")
    assert str(caught.value).startswith(f"{doing} the target failed at byte ")
    assert "No space left on device" in str(caught.value)
    assert_disconnected(source, target)


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_server_that_dies_ends_the_copy(nbdkit, tmp_path, victim):
    size = 64 * MIB
    random_disk(tmp_path / "disk", size)
    servers = {
        "source": nbdkit("-r", "--filter=delay", "file", tmp_path / "disk", "rdelay=20ms"),
        "target": nbdkit("--filter=delay", "memory", size, "wdelay=20ms"),
    }
    kill = Trigger(5, lambda: os.kill(servers[victim].pid, signal.SIGKILL))
    caught = failing_copy(servers["source"], servers["target"], size, hashes=kill)
    assert caught.value.details["side"] == victim
    assert caught.value.retryable
    assert "died" in str(caught.value)


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_server_that_falls_silent_ends_the_copy(nbdkit, tmp_path, victim):
    size = 64 * MIB
    random_disk(tmp_path / "disk", size)
    servers = {"source": nbdkit("-r", "file", tmp_path / "disk"), "target": nbdkit("memory", size)}
    stop = Trigger(5, lambda: os.kill(servers[victim].pid, signal.SIGSTOP))
    try:
        caught = failing_copy(servers["source"], servers["target"], size, hashes=stop, io_timeout=0.5)
    finally:
        os.kill(servers[victim].pid, signal.SIGCONT)
    assert f"Waiting for the {victim} failed: no answer for 0.5 s" in str(caught.value)
    assert caught.value.details == {"side": victim, "errno": "ETIMEDOUT"} and caught.value.retryable
    # nbdkit 1.32 may abort when a client goes in the middle of a read; what it must not do is wait for us.
    assert servers.pop(victim).stop(timeout=5) in (0, -signal.SIGABRT)
    assert_disconnected(*servers.values())


def test_a_server_that_never_greets(nbdkit, tmp_path):
    source, target = nbdkit("-r", "memory", MIB), nbdkit("memory", MIB)
    os.kill(target.pid, signal.SIGSTOP)
    caught = failing_copy(source, target, MIB, io_timeout=0.3)
    os.kill(target.pid, signal.SIGCONT)
    assert caught.value.details["side"] == "target"
    assert_disconnected(source, target)


def test_nobody_there(nbdkit, run_dir):
    source = nbdkit("-r", "memory", MIB)
    with pytest.raises(DataPathError, match="Connecting to the target failed") as caught:
        copy(source.uri, f"nbd+unix:///?socket={run_dir}/absent", capacity_bytes=MIB)
    assert caught.value.details["side"] == "target"
    assert_disconnected(source)


def test_cancel_ends_a_slow_copy_at_once(nbdkit, tmp_path):
    size = 64 * MIB
    random_disk(tmp_path / "disk", size)
    source = nbdkit("-r", "--filter=delay", "file", tmp_path / "disk", "rdelay=1")
    target = nbdkit("memory", size)
    cancel, when = threading.Event(), []

    def act():
        cancel.set()
        when.append(time.monotonic())

    caught = failing_copy(source, target, size, hashes=Trigger(3, act), cancel=cancel, depth=2)
    assert "cancelled" in str(caught.value)
    # The whole copy would take 16 s.
    assert time.monotonic() - when[0] < 8
    assert_disconnected(source, target)


def test_sizes_and_rights_are_checked_first(nbdkit, tmp_path):
    small, large = nbdkit("memory", MIB), nbdkit("memory", 2 * MIB)
    readonly = nbdkit("-r", "memory", 2 * MIB)
    for source, target, words in (
        (small, large, "The source is smaller than the disk: it has 1048576 bytes, the disk 2097152"),
        (large, small, "The target is smaller than the disk"),
        (large, readonly, "The target is served read-only"),
    ):
        with pytest.raises(DataPathError, match=words):
            copy(source.uri, target.uri, capacity_bytes=2 * MIB)
    with pytest.raises(ValueError):
        copy(small.uri, small.uri, capacity_bytes=MIB, zeros="maybe")


def test_an_error_of_ours_closes_everything(nbdkit, tmp_path):
    random_disk(tmp_path / "disk", 8 * MIB)
    source, target = nbdkit("-r", "file", tmp_path / "disk"), nbdkit("memory", 8 * MIB)

    def fail():
        raise OSError("no space for hashes")

    with pytest.raises(OSError, match="no space for hashes") as caught:
        copy(source.uri, target.uri, capacity_bytes=8 * MIB, hashes=Trigger(2, fail))
    assert caught.value
    assert_disconnected(source, target)


def test_memory_is_bounded_by_the_buffers(nbdkit, tmp_path):
    """A slow target must not make the reads pile up."""
    size = 64 * MIB
    random_disk(tmp_path / "disk", size)
    source = nbdkit("-r", "--filter=log", "file", tmp_path / "disk", f"logfile={tmp_path}/log")
    target = nbdkit("--filter=delay", "memory", size, "wdelay=60")
    seen = []

    def look(done, total):
        seen.append([name for name, _unused, _unused in requests_of(tmp_path / "log")].count("Read"))
        if len(seen) == 2:
            cancel.set()

    cancel = threading.Event()
    failing_copy(source, target, size, on_progress=look, cancel=cancel, connections=2, depth=4)
    assert seen[-1] == 8
    os.kill(target.pid, signal.SIGKILL)


def test_memory_is_used_again(nbdkit, tmp_path):
    """Thirty disks of a machine take no more than those that are copied at once."""
    random_disk(tmp_path / "disk", 8 * MIB)
    source = nbdkit("-r", "file", tmp_path / "disk")
    target = nbdkit("memory", 8 * MIB)

    def resident_bytes():
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    copy(source.uri, target.uri, capacity_bytes=8 * MIB)
    before = resident_bytes()
    for _disk in range(30):
        copy(source.uri, target.uri, capacity_bytes=8 * MIB)
    assert resident_bytes() - before < 16 * MIB


def test_several_copies_side_by_side(nbdkit, tmp_path):
    """Copies in threads overlap: four of them with slow servers take little longer than one."""
    size = 32 * MIB
    content = random_disk(tmp_path / "disk", size)
    pairs = []
    for number in range(4):
        source = nbdkit("-r", "--filter=delay", "file", tmp_path / "disk", "rdelay=100ms")
        pairs.append((source, nbdkit("file", old_target(tmp_path / f"target{number}", size))))

    def work(source, target):
        copy(source.uri, target.uri, capacity_bytes=size, connections=1, depth=4)

    started = time.monotonic()
    work(*pairs[0])
    alone = time.monotonic() - started
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = time.monotonic() - started
    assert together < 2.5 * alone
    assert all((tmp_path / f"target{number}").read_bytes() == content for number in range(4))


def test_the_allocation_is_asked_ahead_and_not_kept(nbdkit, tmp_path, monkeypatch):
    """With questions of 1 MiB, a disk of alternating extents is walked in 16 steps and nothing piles up."""
    content = write_disk(tmp_path / "disk", [("data", 24), ("hole", 40)] * 512)
    source = nbdkit("-r", "--filter=log", "file", tmp_path / "disk", f"logfile={tmp_path}/log")
    target = nbdkit("memory", len(content))
    most = []
    add = copier._Allocation._add

    def spy(self, offset, ranges):
        add(self, offset, ranges)
        most.append(len(self.entries))

    monkeypatch.setattr(copier._Allocation, "_add", spy)
    result = copy(source.uri, target.uri, capacity_bytes=len(content), align_bytes=SECTOR, status_bytes=MIB)
    assert result.areas == 512 and result.bytes_read == 512 * 24 * SECTOR
    asked = [request[1:] for request in requests_of(tmp_path / "log") if request[0] == "Extents"]
    assert asked == [(n * MIB, MIB) for n in range(16)]
    assert max(most) <= 3 * 64 + 2


def test_a_source_whose_answers_cost_much_is_asked_seldom(nbdkit, tmp_path):
    """A TiB of holes with data at its ends: as many questions as the length of each says, and the same bytes."""
    size, length = 1 << 40, 3 << 30
    with open(tmp_path / "disk", "wb") as stream:
        stream.truncate(size)
        for at in (0, 700 << 30, size - MIB):
            os.pwrite(stream.fileno(), random.Random(at).randbytes(MIB), at)
    source = nbdkit("-r", "--filter=log", "file", tmp_path / "disk", f"logfile={tmp_path}/log")
    target = nbdkit("memory", size)
    result = copy(source.uri, target.uri, capacity_bytes=size, status_bytes=length)
    assert result.bytes_read == 3 * MIB
    asked = [request[2] for request in requests_of(tmp_path / "log") if request[0] == "Extents"]
    assert 1 < len(asked) <= -(-size // length) <= 512 and max(asked) == length
