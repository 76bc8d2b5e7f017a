# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What needs no network of its own; the rest is in tests/e2e/test_lan_probe.py."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import threading

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, InputError
from ansible_collections.openvadp.backup.plugins.module_utils.lan import echo, probe, routes
from ansible_collections.openvadp.backup.plugins.modules import backup_lan_probe

HERE = ipaddress.ip_address("127.0.0.1")


def params(**changed):
    targets = [{"host": "a", "address": "10.20.30.11"}]
    return {"targets": targets, "source_address": None, "mtu": None, "nfc_port": 902, "timeout": 5, **changed}


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"targets": []}, "No host is named"),
        ({"targets": [{"host": "a", "address": "esx01"}]}, "another NIC"),
        ({"source_address": "10.20.30.5/24"}, "not an IP address"),
        ({"source_address": "fd00::1"}, "is IPv6"),
        ({"mtu": 1279}, "1280 to 9190"),
        ({"mtu": 9191}, "1280 to 9190"),
        ({"nfc_port": 0}, "1 to 65535"),
        ({"timeout": 61}, "1 to 60"),
    ],
)
def test_bad_input_is_refused(changed, word):
    with pytest.raises(InputError, match=word):
        probe.ProbeRequest.from_params(params(**changed))


@pytest.mark.parametrize("check", [False, True])
def test_the_module_on_this_machine(capsys, check):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            sock, _address = server.accept()
            with sock:
                sock.sendall(b"220 VMware Authentication Daemon Version 1.10\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        options = {
            "targets": [{"host": "a", "address": "127.0.0.1"}],
            "source_address": "127.0.0.1",
            "nfc_port": server.getsockname()[1],
            "_ansible_check_mode": check,
        }
        with patch_module_args(options), pytest.raises(SystemExit):
            backup_lan_probe.main()
        thread.join()
    result = json.loads(capsys.readouterr().out)
    assert result["proven"] and result["unproven_hosts"] == [] and not result["changed"]
    (target,) = result["targets"]
    assert target["banner"] == "220 VMware Authentication Daemon Version 1.10"
    assert (target["cause"], target["reason"], target["remedy"]) == ("ok", "", "")
    assert target["mtu"] == {"asked": None, "ok": None, "reason": ""}


def test_errors_of_connecting_have_causes():
    request = probe.ProbeRequest((), timeout=5)
    target = probe.Target("a", ipaddress.ip_address("203.0.113.9"))
    found = {
        number: probe._connect_problem(request, target, OSError(number, "words")).cause
        for number in (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPERM, errno.ETIMEDOUT)
    }
    assert list(found.values()) == ["closed", "no_route", "unreachable", "unreachable", "timeout"]


# --- the program ping -----------------------------------------------------------------------------------------------

OTHER = "PING 10.20.30.11 (10.20.30.11) from 10.20.30.5 : 8972(9000) bytes of data.\n"
STATISTICS = "\n--- 10.20.30.11 ping statistics ---\n1 packets transmitted, 0 received, 100% packet loss, time 0ms\n"


@pytest.mark.parametrize(
    "code, text, expected",
    [
        (0, "8980 bytes from 10.20.30.11: icmp_seq=1 ttl=64 time=0.1 ms", echo.Echo(echo.CAME_BACK)),
        (1, "ping: local error: message too long, mtu=1500", echo.Echo(echo.LOCAL, 1500)),
        (1, "ping: local error: message too long, mtu: 1500", echo.Echo(echo.LOCAL, 1500)),
        (
            1,
            "From 10.20.40.1 icmp_seq=1 Frag needed and DF set (mtu = 1500)",
            echo.Echo(echo.ON_THE_WAY, 1500, "10.20.40.1"),
        ),
        (1, "From fd00::1 icmp_seq=1 Packet too big: mtu=1500", echo.Echo(echo.ON_THE_WAY, 1500, "fd00::1")),
        (1, "", echo.Echo(echo.SILENT)),
        (
            1,
            "From 10.20.30.5 icmp_seq=1 Destination Host Unreachable",
            echo.Echo(echo.REFUSED, said_by="Destination Host Unreachable"),
        ),
    ],
)
def test_what_ping_says(code, text, expected):
    seen = []

    def run(command, timeout):
        seen.append(command)
        return code, OTHER + text + STATISTICS

    result = echo.by_program(ipaddress.ip_address("10.20.30.11"), ipaddress.ip_address("10.20.30.5"), 9000, 2.0, run)
    assert result == expected
    assert seen == [
        ["ping", "-4", "-n", "-c", "1", "-M", "do", "-s", "8972", "-W", "2", "-I", "10.20.30.5", "10.20.30.11"]
    ]


@pytest.mark.parametrize(
    "outcome",
    [
        (2, "ping: socket: Operation not permitted"),
        (1, ""),
        DataPathError("No echo request could be sent", reason="ping did not end within 7 s"),
    ],
)
def test_a_ping_that_can_not_ping(outcome):
    def run(command, timeout):
        if isinstance(outcome, tuple):
            return outcome
        raise outcome

    with pytest.raises(echo.NoEcho):
        echo.by_program(HERE, None, 1500, 2.0, run)


def test_the_program_itself(tmp_path, monkeypatch):
    program = tmp_path / "ping"
    program.write_text("#!/bin/sh\necho 1 packets transmitted, 1 received; echo '4 bytes' >&2\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program.chmod(0o755)
    assert echo.by_program(HERE, None, 1500, 2.0) == echo.Echo(echo.CAME_BACK)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(echo.NoEcho, match="not installed"):
        echo.by_program(HERE, None, 1500, 2.0)


def test_without_any_way_the_mtu_stays_open(monkeypatch):
    def none(*_words):
        raise echo.NoEcho("not permitted")

    monkeypatch.setattr(echo, "send", none)
    request = probe.ProbeRequest((), mtu=9000)
    ok, finding = probe._check_mtu(
        request, probe.Target("a", HERE), 9000, None, probe.Answer(probe.Finding(), host_mtu=1500)
    )
    assert ok is None
    assert "iputils-ping" in finding.reason and "MTU of 1500" in finding.reason


def test_a_checksum():
    # RFC 1071's own example
    assert echo._checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


# --- the kernel's own word ------------------------------------------------------------------------------------------


def test_interfaces_of_this_machine():
    assert routes.interface_of(HERE) == "lo"
    assert routes.interface_of(ipaddress.ip_address("203.0.113.9")) is None
    assert routes.leaves_by(HERE) is None
    assert routes._attributes(b"\x02\x00\x01\x00") == {}
