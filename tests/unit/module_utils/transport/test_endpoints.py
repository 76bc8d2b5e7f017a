# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import Child, RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.libraries import nbd
from ansible_collections.openvadp.backup.plugins.module_utils.transport import endpoints
from ansible_collections.openvadp.backup.plugins.module_utils.transport.endpoints import (
    mode_used,
    retries_within,
    vddk_argv,
)
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import Vddk


def _argv(**changes: Any) -> List[str]:
    options: Dict[str, Any] = dict(
        config=Path("/run/x.conf"),
        server="vc.example.com",
        port=443,
        user="VSPHERE.LOCAL\\backup",
        thumbprint="AA:BB",
        vm_moid="vm-16",
        file="[vmfs01] app 01/app=01-000002.vmdk",
        snapshot_moid="snapshot-47",
        transports=["nbdssl"],
        writable=False,
        vddk=Vddk("/opt/vddk", "8.0.3", "1.42.3"),
        nfc_port=902,
        io_timeout=180,
    )
    options.update(changes)
    return vddk_argv(**options)


def test_reading_names_the_snapshot_and_is_read_only() -> None:
    argv = _argv()
    assert "--readonly" in argv
    for word in (
        "vm=moref=vm-16",
        "snapshot=snapshot-47",
        "file=[vmfs01] app 01/app=01-000002.vmdk",
        "transports=nbdssl",
        "nfchostport=902",
        "minblock=512",
        "maxdata=2M",
    ):
        assert word in argv
    # The client meets the filters in this order: a retry repeats what blocksize has cut.
    filters = [word for word in argv if word.startswith("--filter=") or word == "vddk"]
    assert filters == ["--filter=retry", "--filter=blocksize", "--filter=noextents", "vddk"]


def test_who_asks_for_the_allocation_gets_the_last_answer_again() -> None:
    filters = [word for word in _argv(allocation=True) if word.startswith("--filter=") or word == "vddk"]
    assert filters == ["--filter=retry", "--filter=blocksize", "--filter=cacheextents", "vddk"]


def test_writing_names_no_snapshot() -> None:
    argv = _argv(writable=True, snapshot_moid=None)
    assert "--readonly" not in argv and "--filter=cacheextents" not in argv
    assert not [word for word in argv if word.startswith("snapshot=")]


@pytest.mark.parametrize(
    ("transports", "writable", "expected"),
    [(["hotadd"], True, 1), (["hotadd"], False, 0), (["nbdssl"], True, 0), (["san"], True, 0)],
)
def test_what_hotadd_writes_is_not_buffered(transports: List[str], writable: bool, expected: int) -> None:
    argv = _argv(transports=transports, writable=writable, snapshot_moid=None)
    assert argv.count("unbuffered=true") == expected


def _refusal(cause: str) -> TransportError:
    return TransportError("no", details={"finding": {"code": 1, "cause": cause}})


@pytest.mark.parametrize(
    ("answers", "tried", "outcome"),
    [
        ({}, ["one"], "one"),
        ({"one": "thumbprint"}, ["one", "two"], "two"),
        ({"one": "invalid_parameter"}, ["one", "two"], "two"),
        ({"one": "port_902"}, ["one"], "port_902"),
        # Neither: what was said to the form that every known VDDK takes is the better reason ...
        ({"one": "thumbprint", "two": "invalid_parameter"}, ["one", "two"], "thumbprint"),
        # ... unless the other one was taken, and something else failed.
        ({"one": "thumbprint", "two": "privileges"}, ["one", "two"], "privileges"),
    ],
)
def test_the_second_form_of_a_thumbprint_is_tried(answers: Dict[str, str], tried: List[str], outcome: str) -> None:
    seen: List[str] = []

    @contextlib.contextmanager
    def serve(thumbprint: str) -> Iterator[Any]:
        seen.append(thumbprint)
        if thumbprint in answers:
            raise _refusal(answers[thumbprint])
        yield thumbprint

    with contextlib.ExitStack() as stack:
        try:
            found: Any = endpoints._open_with_either(stack, serve, ["one", "two"])
        except TransportError as error:
            found = error.details["finding"]["cause"]
    assert (seen, found) == (tried, outcome)


def test_an_old_plugin_knows_no_other_port() -> None:
    old = Vddk("/opt/vddk", "7", "1.20", has_nfc_port=False)
    assert not [word for word in _argv(vddk=old) if word.startswith("nfchostport")]
    with pytest.raises(TransportError):
        _argv(vddk=old, nfc_port=1902)


@pytest.mark.parametrize("io_timeout", [1, 2, 5, 10, 60, 180, 3600])
def test_a_failing_request_is_retried_but_not_beyond_the_time_out(io_timeout: int) -> None:
    retries = retries_within(io_timeout)
    assert retries >= 1
    waits = sum(2**number for number in range(retries))
    assert waits <= max(1, io_timeout / 2)


def test_the_mode_is_the_one_that_the_log_names_last() -> None:
    assert (
        mode_used("nbdkit: vddk[1]: debug: transport mode: san\nnbdkit: vddk[2]: debug: transport mode: nbdssl\n")
        == "nbdssl"
    )
    assert mode_used("nbdkit: debug: nothing") is None


@pytest.mark.parametrize(
    ("transports", "compression", "argument"),
    [
        (["nbdssl"], "fastlz", ["compression=fastlz"]),
        (["nbd"], "zlib", ["compression=zlib"]),
        (["nbdssl", "nbd"], "skipz", ["compression=skipz"]),
        (["nbdssl"], "none", []),
        (["san"], "zlib", []),
        (["hotadd"], "zlib", []),
    ],
)
def test_what_crosses_the_lan_is_compressed(transports: List[str], compression: str, argument: List[str]) -> None:
    argv = _argv(transports=transports, wire_compression=compression)
    assert [word for word in argv if word.startswith("compression=")] == argument


def test_an_old_plugin_does_not_compress() -> None:
    with pytest.raises(TransportError, match="wire_compression"):
        _argv(vddk=Vddk("/opt/vddk", "7", "1.22.1"), wire_compression="zlib")


def test_a_secret_goes_through_a_pipe(tmp_path: Path) -> None:
    """nbdkit's data plugin takes no secret; its refusal quotes the argument that it got."""
    secret = 'p\u00e4ss w"rd'
    descriptor = endpoints._secret_pipe("password", secret)
    with os.fdopen(descriptor, "rb") as stream:
        assert stream.read() == secret.encode()
    with pytest.raises(TransportError):
        endpoints._secret_pipe("password", "two\nlines")
    before = set(os.listdir("/proc/self/fd"))
    with RuntimeDir("secret") as run_dir, pytest.raises(TransportError) as refusal, endpoints.serve_nbdkit(
        ["memory", "1M"], subject="disk", run_dir=run_dir, io_timeout=10, secrets={"password": secret}
    ):
        pass
    assert "password" in str(refusal.value) and secret not in str(refusal.value)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_served_disk_is_open_and_gone_afterwards(tmp_path: Path) -> None:
    with RuntimeDir("served") as run_dir:
        with endpoints.serve_nbdkit(
            ["memory", "1M"], subject="disk", run_dir=run_dir, io_timeout=10, transport="hotadd"
        ) as endpoint:
            assert (endpoint.size_bytes, endpoint.transport) == (1 << 20, "hotadd")
            endpoint.check()
            child = endpoint.child
        assert not child.alive
        assert not list(Path(run_dir.path).glob("*.sock"))


@pytest.mark.parametrize("filters", [[], ["--filter=retry", "--filter=blocksize"]])
def test_a_server_that_is_slow_to_notice_closes_the_disk_all_the_same(filters: List[str]) -> None:
    """nbdkit ends without closing when SIGTERM comes before it has seen that the client is gone."""
    with RuntimeDir("slow") as run_dir:
        with endpoints.serve_nbdkit(
            [*filters, "memory", "1M"], subject="disk", run_dir=run_dir, io_timeout=10
        ) as endpoint:
            handle = nbd.NBD()
            handle.connect_uri(endpoint.uri)
            os.kill(endpoint.child.pid, signal.SIGSTOP)
            handle.aio_disconnect()  # shutdown() waits for the server
            waking = threading.Timer(0.3, os.kill, (endpoint.child.pid, signal.SIGCONT))
            waking.start()
        waking.join()
        layers = ["memory", *(word.partition("=")[2] for word in filters)]
        lines = endpoint.log_path.read_text().splitlines()
        for layer in layers:
            closed = [line for line in lines if line.endswith(f" {layer}: close")]
            assert len(closed) == 2, layer  # the first opening, and this one


def test_a_client_that_stays_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_NOTICE_TIMEOUT", 0.2)
    monkeypatch.setattr(endpoints, "_STOP_TIMEOUT", 1)
    handle = nbd.NBD()
    with RuntimeDir("held") as run_dir:
        with endpoints.serve_nbdkit(["memory", "1M"], subject="disk", run_dir=run_dir, io_timeout=10) as endpoint:
            handle.connect_uri(endpoint.uri)
            begin = time.monotonic()
        assert time.monotonic() - begin < endpoints._DETACH_TIMEOUT / 4
        assert not endpoint.child.alive


def test_an_opening_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_STOP_TIMEOUT", 1)
    plugin = tmp_path / "plugin.sh"
    plugin.write_text('#!/bin/sh\ncase "$1" in open) sleep 600 ;; *) exit 2 ;; esac\n', encoding="utf-8")
    plugin.chmod(0o700)
    begin = time.monotonic()
    with RuntimeDir("hang") as run_dir, pytest.raises(
        TransportError, match="not opened within 1 s"
    ), endpoints.serve_nbdkit(["sh", str(plugin)], subject="disk", run_dir=run_dir, io_timeout=1):
        pass
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("needed", [True, False])
def test_the_guard_ends_a_server_that_ignores_sigterm(tmp_path: Path, needed: bool) -> None:
    """What is left when we die, perhaps in the middle of stopping it: a server that waits for its storage has to go.

    A guard that is not needed any more ends, and kills nobody.
    """
    guard_fd, our_end = os.pipe()
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
    guarded = ["sh", "-c", endpoints._GUARDED, "sh", str(guard_fd), "0", *stubborn]
    child = Child.start(guarded, log_path=str(tmp_path / "log"), name="stubborn", pass_fds=(guard_fd,))
    os.close(guard_fd)
    while not child.log_tail():
        assert child.alive
    members = _group(child.pid)
    assert len(members) >= 2
    os.killpg(child.pid, signal.SIGTERM)
    if not needed:
        os.write(our_end, b"\n")
    os.close(our_end)
    if needed:
        assert child._process.wait(20) == -signal.SIGKILL
    else:
        deadline = time.monotonic() + 20
        while len(_group(child.pid) & members) > 1:
            assert time.monotonic() < deadline
        assert child.alive
        os.killpg(child.pid, signal.SIGKILL)


def _group(leader: int) -> Set[int]:
    """The processes of a group, but for the sleeps that come and go."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().split("(", 1)[1].rsplit(") ", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields.split()[2]) == leader and name != "sleep":
            found.add(int(stat.parent.name))
    return found
