# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whose a process is: real processes, and what the kernel says of them."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Iterator

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import proof
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import (
    RUN_VARIABLE,
    Child,
    children_of,
    run_tool,
    start_time,
)

RUN = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    with children_of(RUN):
        started = Child.start(["sleep", "60"], log_path=str(tmp_path / "log"), name="sleep")
    # setpriv and sh are on their way to the program.
    deadline = time.monotonic() + 10
    while b"sleep" not in Path(f"/proc/{started.pid}/cmdline").read_bytes().split(b"\0")[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield started
    started.stop()


def test_a_child_of_the_run_is_ended(child: Child) -> None:
    with proof.OurProcess(child.pid, child.start_time, RUN) as ours:
        assert not ours.ended(0)
        assert ours.end(5, 5)
    assert child.wait(5) == -15


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    with children_of(RUN):
        stubborn = Child.start(
            ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"],
            log_path=str(tmp_path / "log"),
            name="sh",
        )
    while "ready" not in stubborn.log_tail():
        time.sleep(0.01)
    with proof.OurProcess(stubborn.pid, stubborn.start_time, RUN) as ours:
        assert ours.end(0.2, 5)
    assert stubborn.wait(5) == -9


def test_what_a_record_claims_proves_nothing(child: Child) -> None:
    with pytest.raises(proof.NotProved, match="not started by that run"):
        proof.OurProcess(child.pid, child.start_time, OTHER)
    with pytest.raises(ProcessLookupError):
        proof.OurProcess(child.pid, child.start_time - 1, RUN)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            with pytest.raises(proof.NotProved, match="not started by that run"):
                proof.OurProcess(stranger.pid, start_time(stranger.pid) or 0, RUN)
            assert stranger.poll() is None
        finally:
            stranger.kill()
    with pytest.raises(ProcessLookupError):
        proof.OurProcess(stranger.pid, 1, RUN)
    assert child.alive


def test_only_children_of_a_run_carry_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    # What our own caller has set says nothing of our children.
    monkeypatch.setenv(RUN_VARIABLE, OTHER)
    script = ["sh", "-c", f"echo ${RUN_VARIABLE}"]
    assert run_tool(script, what="failed").strip() == ""
    with children_of(RUN):
        assert run_tool(script, what="failed").strip() == RUN
        with children_of(OTHER):
            assert run_tool(script, what="failed").strip() == OTHER
        assert run_tool(script, what="failed").strip() == RUN
    assert run_tool(script, what="failed").strip() == ""


def test_only_its_own_boot_and_namespace_can_say_that_a_process_is_dead() -> None:
    here = (proof.boot_id(), proof.pid_namespace())
    alive = (os.getpid(), start_time(os.getpid()))
    assert not proof.owner_is_dead(*here, *alive)
    assert proof.owner_is_dead(*here, alive[0], (alive[1] or 0) + 1)
    with subprocess.Popen(["true"]) as gone:
        pass
    assert proof.owner_is_dead(*here, gone.pid, 5)
    assert not proof.owner_is_dead("00000000-0000-0000-0000-000000000000", here[1], gone.pid, 5)
    assert not proof.owner_is_dead(here[0], "pid:[1]", gone.pid, 5)
    assert not proof.owner_is_dead(*here, gone.pid, None)
