# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import datetime
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.preflight.network import (
    certificate_validity,
    probe_host,
    probe_hosts,
)

GREETING = b"220 VMware Authentication Daemon Version 1.10: SSL Required, NFCSSL supported/t\r\n"
HERE = "127.0.0.1"


@contextmanager
def server(*pieces: bytes, close: bool = False, address: str = HERE, port: int = 0) -> Iterator[int]:
    """Says *pieces* to whoever connects; closes then, or waits for the end."""
    over = threading.Event()
    with socket.create_server((address, port)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            held: List[socket.socket] = []
            while not over.is_set():
                try:
                    connection, _peer = listener.accept()
                except socket.timeout:
                    continue
                with suppress(OSError):  # who asked may have gone: it had heard enough
                    for piece in pieces:
                        connection.sendall(piece)
                if close:
                    connection.close()
                else:
                    held.append(connection)
            for connection in held:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            thread.join()


def closed_port() -> int:
    with socket.create_server((HERE, 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_host_that_greets() -> None:
    with server(GREETING[:10], GREETING[10:]) as port:
        reached = probe_host(HERE, port, port, 5)
    assert reached.addresses == [HERE]
    assert (reached.name_problem, reached.nfc_problem, reached.api_problem) == (None, None, None)
    assert reached.greeting == GREETING.decode().strip()


@pytest.mark.parametrize(
    ("pieces", "close", "problem"),
    [
        ([], False, "no greeting within"),
        ([b"220 "], False, "no greeting within"),
        ([], True, "closes the connection at once"),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], False, "no ESXi host: 'SSH-2.0"),
        ([b"\x00\x16\x03" * 300], True, "no ESXi host"),
    ],
)
def test_a_port_where_no_host_greets(pieces: List[bytes], close: bool, problem: str) -> None:
    with server(*pieces, close=close) as port:
        reached = probe_host(HERE, port, port, 0.5)
    assert reached.nfc_problem is not None and problem in reached.nfc_problem


def test_a_closed_port_and_a_name_that_nobody_knows() -> None:
    port = closed_port()
    reached = probe_host(HERE, port, port, 5)
    assert "refused" in str(reached.nfc_problem) and "refused" in str(reached.api_problem)
    for name in ("esx01.invalid", "x" * 70 + ".invalid", ""):
        found = probe_hosts([name], port, port, 5)[name]
        assert found.name_problem or found.nfc_problem


def test_hosts_are_probed_at_the_same_time() -> None:
    """One after the other they would take 8 seconds."""
    names = [f"127.0.2.{number}" for number in range(1, 9)]
    with server(address="0.0.0.0") as port:
        before = datetime.datetime.now()
        found = probe_hosts(names, port, port, 1)
        taken = (datetime.datetime.now() - before).total_seconds()
    assert list(found) == names and all(one.nfc_problem for one in found.values())
    assert taken < 6


def certificate(folder: Path, *options: str) -> bytes:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=vcenter/O=Example", *options]
    subprocess.run(command, cwd=str(folder), check=True, capture_output=True)
    return ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text(encoding="utf-8"))


@pytest.mark.parametrize("days", [1, 30, 20000])
def test_how_long_a_certificate_is_valid(tmp_path: Path, days: int) -> None:
    """As openssl says; beyond 2049 the time is written otherwise."""
    der = certificate(tmp_path, "-days", str(days))
    begins, ends = certificate_validity(der)
    dates = subprocess.run(
        ["openssl", "x509", "-in", "cert.pem", "-noout", "-startdate", "-enddate"],
        cwd=str(tmp_path),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for moment, line in zip((begins, ends), dates):
        expected = datetime.datetime.strptime(line.partition("=")[2], "%b %d %H:%M:%S %Y %Z")
        assert moment == expected.replace(tzinfo=datetime.timezone.utc)
    assert (ends - begins).days == days


@pytest.mark.parametrize("cut", [None, 0, 1, 2, 10, 100])
def test_what_is_no_certificate(tmp_path: Path, cut: Optional[int]) -> None:
    der = b"\x02\x01\x05" if cut is None else certificate(tmp_path)[:cut]
    with pytest.raises(ValueError):
        certificate_validity(der)
