# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils import lease
from ansible_collections.openvadp.backup.plugins.module_utils.lease import Lease, identity

# A module at work; "stuck" is one whose clean-up does not end.
WORK = """
import json, os, sys, time
from ansible_collections.openvadp.backup.plugins.module_utils import lease
lease.LOOK_SECONDS, lease.ENDING_SECONDS = 0.05, 0.3
try:
    with lease.ends_in_order(json.loads(sys.argv[1])):
        try:
            print("at work", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
            if sys.argv[2] == "stuck":
                time.sleep(60)
except lease.Ended as end:
    print(end)
"""


def start(option: str, how: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", WORK, option, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    return process


def test_a_process_is_told_from_a_later_one_of_the_same_number() -> None:
    mine = identity(os.getpid())
    assert Lease([mine]).lost() is None
    reason = Lease([mine, f"{os.getpid()}:1"]).lost()
    assert reason is not None and str(os.getpid()) in reason
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie waits for nobody
    assert identity(child.pid) == f"{child.pid}:0"
    child.wait()
    assert identity(child.pid) == f"{child.pid}:0"


def test_a_file_must_be_there_and_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    file = tmp_path / "lease"
    file.touch()
    # The clocks of two machines differ: how old the file looks does not count.
    os.utime(file, (1, 1))
    held = Lease(file=str(file), seconds=10)
    assert held.lost() is None
    for second in range(9, 40, 9):
        clock[0] = 1000.0 + second
        assert held.lost() is None
        os.utime(file, (2 + second, 2 + second))
        assert held.lost() is None
    clock[0] += 11
    assert "10 s" in str(held.lost())
    assert Lease(file=str(file)).lost() is None
    file.unlink()
    assert Lease(file=str(file)).lost() == "the task was given up"


@pytest.mark.parametrize("how", ["", "stuck"])
def test_a_module_whose_lease_ends_cleans_up_and_is_killed_if_it_can_not(tmp_path: Path, how: str) -> None:
    file = tmp_path / "lease"
    file.touch()
    process = start(f'{{"file": "{file}"}}', how)
    begun = time.monotonic()
    file.unlink()
    out, _err = process.communicate(timeout=30)
    assert out.startswith("cleaned up")
    if how:
        assert process.returncode == -signal.SIGKILL and time.monotonic() - begun < 10
    else:
        assert process.returncode == 0 and "the task was given up" in out


def test_sigterm_ends_in_order_and_a_second_one_at_once() -> None:
    process = start("null")
    process.terminate()
    assert "SIGTERM" in process.communicate(timeout=30)[0] and process.returncode == 0
    process = start("null", "stuck")
    process.terminate()
    assert process.stdout is not None and process.stdout.readline() == "cleaned up\n"
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def test_the_signal_is_as_before_afterwards() -> None:
    before: Any = signal.getsignal(signal.SIGTERM)
    with lease.ends_in_order():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
