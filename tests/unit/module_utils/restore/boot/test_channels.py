# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a guest says, by real sockets: it may say too much, nothing, or nonsense."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.channels import (
    Agent,
    Console,
    Log,
    Qmp,
    Watcher,
    parse,
)

Peer = Callable[[Callable[[Any], None]], str]


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Something that serves one connection in a thread; -> the socket's path."""
    with tempfile.TemporaryDirectory(prefix="boot-", dir="/tmp") as folder:
        threads: List[threading.Thread] = []

        def serve(talk: Callable[[Any], None]) -> str:
            path = str(Path(folder) / f"{len(threads)}.sock")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(1)

            def run() -> None:
                with listener, listener.accept()[0] as connection:
                    talk(connection)

            threads.append(threading.Thread(target=run))
            threads[-1].start()
            return path

        yield serve
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def test_a_log_keeps_its_beginning_and_its_end() -> None:
    log = Log(10)
    log.add(b"abc")
    assert log.content() == b"abc"
    log.add(b"defgh")
    log.add(b"ij")
    assert log.content() == b"abcdefghij"
    for number in range(1000):
        log.add(b"%d" % (number % 10))
    assert log.content() == b"abcde\n[1000 bytes left out]\n56789" and log.total == 1010


@pytest.mark.parametrize("size", [3, 100_000])
def test_a_pattern_is_found_wherever_it_is_cut(size: int) -> None:
    watcher = Watcher(r"^\w+ login:")
    text = b"noise\n" * 5000 + b"\x1b[2J\x1b[0;1mapp01 \x1b[0mlogin: \xff\xfe"
    for start in range(0, len(text), size):
        assert watcher.found is None or start > len(text) - size - 20
        watcher.feed(text[start : start + size])
    assert watcher.found == "app01 login:"
    nothing = Watcher(None)
    nothing.feed(text)
    assert nothing.found is None


def test_a_console_that_floods_and_ends(peer: Peer) -> None:
    console = Console(peer(lambda connection: connection.sendall(b"x" * 3_000_000 + b"\nready\n")), "^ready", "panic")
    while console.open:
        console.read()
    assert console.watcher.found == "ready" and console.failures.found is None
    assert console.log.total == 3_000_007 and len(console.log.content()) < 1_100_000
    console.drain()
    console.close()
    with pytest.raises(DataPathError, match="can't be reached"):
        Console("/nonexistent", None, None)


def test_an_agent_has_to_answer_the_question(peer: Peer) -> None:
    def talk(connection: Any) -> None:
        lines = connection.makefile("rwb", buffering=0)
        for answer in (b"[" * 100_000, b'{"return": 77}', b'{"return": true}', b"\xff\xfenonsense", b'{"error": {}}'):
            lines.write(answer + b"\n")
        first = json.loads(lines.readline())
        assert first["execute"] == "guest-sync"
        second = json.loads(lines.readline())
        lines.write(b"\xff" + json.dumps({"return": second["arguments"]["id"]}).encode() + b"\r\n")

    agent = Agent(peer(talk))
    now = 10.0
    agent.ask(now)
    while not agent.answered:
        agent.ask(now)
        now += 0.1
        agent.read()
        assert agent.open or agent.answered
    assert now > 11
    agent.close()


def test_qmp_answers_and_events(peer: Peer) -> None:
    def talk(connection: Any) -> None:
        lines = connection.makefile("rwb", buffering=0)

        def answer(**fields: Any) -> None:
            lines.write(json.dumps(fields).encode() + b"\n")

        answer(QMP={"version": {}})
        answer(**{"return": {}, "id": json.loads(lines.readline())["id"]})
        asked = json.loads(lines.readline())
        assert asked["arguments"] == {"filename": "/x"}
        answer(event="RESET", data={})
        answer(**{"return": 5, "id": asked["id"] - 1})
        answer(**{"return": 6, "id": asked["id"]})
        answer(error={"desc": "no"}, id=json.loads(lines.readline())["id"])
        lines.readline()

    qmp = Qmp(peer(talk))
    assert qmp.command("screendump", filename="/x") == 6 and qmp.events == ["RESET"]
    with pytest.raises(DataPathError, match="refused a command: cont.*no"):
        qmp.command("cont")
    with pytest.raises(DataPathError, match="does not answer: cont: it has ended"):
        qmp.command("cont")
    assert not qmp.open
    qmp.close()


def test_a_guest_that_waits_for_its_console_does_not_hold_up_qemu(peer: Peer) -> None:
    written = threading.Event()

    def console(connection: Any) -> None:
        # Byte by byte, as a guest does: the socket's buffer is full long before.
        for _number in range(100_000):
            connection.send(b"x")
        written.set()

    def talk(connection: Any) -> None:
        lines = connection.makefile("rwb", buffering=0)
        for number in range(2):
            identity = json.loads(lines.readline())["id"]
            assert number == 0 or written.wait(60)
            lines.write(json.dumps({"return": number, "id": identity}).encode() + b"\n")

    qmp, serial = Qmp(peer(talk)), Console(peer(console), None, None)
    qmp.beside = [serial]
    assert qmp.command("screendump") == 1
    while serial.open:
        qmp.read(1)
    assert serial.log.total == 100_000
    qmp.close()
    serial.close()


def test_json_that_is_none() -> None:
    assert parse(b'{"a": 1}') == {"a": 1}
    assert parse(b"[1]") == parse(b"\xff") == parse(b"") == parse(b"[" * 100_000) == {}
