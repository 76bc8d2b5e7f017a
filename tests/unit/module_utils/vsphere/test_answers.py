# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Servers that answer too much, too slowly, or what was not asked for."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import threading
import time
from typing import Any, Callable, Iterator

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.answers import (
    AnswerRefused,
    Limits,
    download,
    response_class,
)

OK = b"HTTP/1.1 200 OK\r\n"
LIMITS = Limits(bytes=100_000, begin_seconds=0.5, transfer_seconds=0.5)


@contextlib.contextmanager
def served(answer: Callable[[socket.socket], None], limits: Limits = LIMITS) -> Iterator[http.client.HTTPConnection]:
    over = threading.Event()

    def serve() -> None:
        with listener, contextlib.suppress(OSError):
            taken, _address = listener.accept()
            with taken:
                while taken.recv(65536) and not over.is_set():
                    answer(taken)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=20)
        connection.response_class = response_class(limits)
        try:
            yield connection
        finally:
            over.set()
            connection.close()
            listener.close()
            thread.join(20)
            assert not thread.is_alive()


def ask(connection: http.client.HTTPConnection) -> bytes:
    connection.request("GET", "/")
    return connection.getresponse().read()


def endless(piece: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    def answer(taken: socket.socket) -> None:
        while True:
            taken.sendall(piece)
            time.sleep(pause)

    return answer


def after(head: bytes, then: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    def answer(taken: socket.socket) -> None:
        taken.sendall(head)
        then(taken)

    return answer


LONG = OK + b"Content-Length: 9000000000\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda taken: time.sleep(3), "no answer within"),
        (endless(b"x", 0.05), "did not finish"),
        (after(OK, endless(b"X", 0.05)), "did not finish"),
        (after(LONG, endless(b"x", 0.05)), "did not finish"),
        (after(LONG, endless(b"x" * 65536)), "larger than"),
        (after(OK + b"\r\n", endless(b"x" * 65536)), "larger than"),
        (after(OK + b"Transfer-Encoding: chunked\r\n\r\n", endless(b"1\r\nx\r\n", 0.05)), "did not finish"),
        (after(OK + b"Transfer-Encoding: chunked\r\n\r\n", endless(b"1\r\nx\r\n" * 999)), "larger than"),
        (endless(b"HTTP/1.1 100 Continue\r\n\r\n"), "larger than"),
        (endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05), "did not finish"),
        (after(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(99)), lambda _taken: None), "compressed"),
    ],
)
def test_an_answer_has_limits(answer: Any, message: str) -> None:
    # On a busy machine much may come late: only who tests the time has little of it.
    limits = LIMITS._replace(transfer_seconds=60.0) if message == "larger than" else LIMITS
    with served(answer, limits) as connection, pytest.raises(AnswerRefused, match=message):
        ask(connection)


def test_headers_without_an_end_are_refused() -> None:
    with served(after(OK, endless(b"X: y\r\n"))) as connection, pytest.raises(
        (AnswerRefused, http.client.HTTPException)
    ):
        ask(connection)


def test_answers_within_the_limits_come_whole_and_each_has_its_own() -> None:
    body = b"y" * 60_000
    whole = OK + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with served(lambda taken: taken.sendall(whole)) as connection:
        for _again in range(4):
            time.sleep(0.2)
            assert ask(connection) == body


def test_a_slow_connection_may_take_its_time_before_the_first_byte() -> None:
    def answer(taken: socket.socket) -> None:
        time.sleep(1.0)
        taken.sendall(OK + b"Content-Length: 2\r\n\r\nok")

    with served(answer, LIMITS._replace(begin_seconds=5)) as connection:
        assert ask(connection) == b"ok"


def test_a_download_lasts_as_long_as_enough_comes() -> None:
    size = 20 << 16

    def answer(taken: socket.socket) -> None:
        taken.sendall(OK + b"Content-Length: %d\r\n\r\n" % size)
        for _piece in range(20):
            taken.sendall(bytes(1 << 16))
            time.sleep(0.05)

    with served(answer, download(size, 0.6)) as connection:
        assert len(ask(connection)) == size
    with served(after(LONG, endless(b"x", 0.01)), download(size, 0.6)) as connection, pytest.raises(
        AnswerRefused, match="less than"
    ):
        ask(connection)
    with served(after(LONG, endless(bytes(65536))), download(size, 0.6)) as connection, pytest.raises(
        AnswerRefused, match="larger"
    ):
        ask(connection)
