# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import processes
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import (
    Child,
    RuntimeDir,
    listens,
    run_tool,
    tool_result,
)
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError


def wait_until(condition, timeout=10):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("inode", ["  317", "12345", "4026531840"])
def test_who_listens_is_told_whatever_the_inode(inode):
    # The kernel pads it to five digits; a machine that has just booted has smaller ones.
    header = "Num       RefCount Protocol Flags    Type St Inode Path\n"
    line = "0000000000000000: 00000002 00000000 {} 0001 01 {} {}\n"
    accepts, connected = "00010000", "00000000"
    table = [header, line.format(connected, inode, "/x/a b"), line.format(accepts, inode, "/x/a  c ")]
    assert listens(table, "/x/a  c ")
    assert not listens(table, "/x/a b")
    assert not listens(table, "/x/a  c")


def start(run_dir, *argv, **options):
    return Child.start(list(argv), log_path=os.path.join(run_dir, "child.log"), name="the child", **options)


@pytest.mark.parametrize("how", ["child", "detached", "module"])
def test_a_crash_leaves_no_core_file(tmp_path, how):
    """Whoever starts us may allow them without a limit: core files hold the password."""
    ways = {
        "child": "child = processes.Child.start(['sleep', '30'], log_path=sys.argv[1], name='x')",
        "detached": "child = processes.start_detached(['/bin/sleep', '30'], log_path=sys.argv[1])",
        "module": "processes.no_core_files(); child = subprocess.Popen(['sleep', '30'])",
    }
    code = (
        "import resource, subprocess, sys, time\n"
        "from ansible_collections.openvadp.backup.plugins.module_utils.datapath import processes\n"
        f"{ways[how]}\n"
        "name = f'/proc/{child.pid}/'\n"
        "while 'sleep' not in open(name + 'comm').read(): time.sleep(0.01)\n"
        "print([line for line in open(name + 'limits') if 'core' in line][0].split()[4])\n"
        "import os, signal; os.kill(child.pid, signal.SIGKILL)\n"
    )
    command = ["prlimit", "--core=unlimited", sys.executable, "-c", code, str(tmp_path / "log")]
    root = str(Path(processes.__file__).parents[6])
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_runtime_dir_is_private_short_and_goes_away(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", "/" + "long" * 30)
    with RuntimeDir("0f" * 30) as folder:
        assert len(folder.path) < 60
        assert os.stat(folder.path).st_mode & 0o777 == 0o700
        assert os.path.basename(folder.path).startswith("openvadp-0f0f")
        open(os.path.join(folder, "x"), "w").close()
    assert not os.path.exists(folder.path)


def test_leftovers_are_those_of_the_run_whose_owner_is_dead():
    code = (
        "import os, sys; from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import *;"
        "r = RuntimeDir('crashed run'); print(r.path, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path = owner.stdout.readline().strip()
    try:
        assert RuntimeDir.leftovers("crashed run") == []
        owner.kill()
        owner.communicate()
        assert RuntimeDir.leftovers("another run") == []
        # Whatever was in it, or not yet, or no longer: a crash may come at any moment.
        assert os.listdir(path) == [] and RuntimeDir.leftovers("crashed run") == [path]
        with RuntimeDir("crashed run") as living:
            assert RuntimeDir.leftovers("crashed run", remove=True) == [path]
            assert os.path.isdir(living.path) and not os.path.exists(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
    assert RuntimeDir.leftovers("crashed run") == []


def test_child_gets_nothing_it_was_not_given(run_dir, monkeypatch):
    monkeypatch.setenv("VMWARE_PASSWORD", "geheim")
    monkeypatch.setenv("OPENVADP_API_TOKEN", "geheim")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    read_end, write_end = os.pipe()
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    child = start(
        run_dir,
        "sh",
        "-c",
        f"env; ls -l /proc/self/fd; echo given >/proc/self/fd/{write_end}; echo fehler >&2",
        pass_fds=[write_end],
        env={"EXTRA": "1"},
    )
    os.close(write_end)
    try:
        with os.fdopen(read_end) as pipe:
            assert pipe.read() == "given\n"
        wait_until(lambda: not child.alive)
        log = child.log_tail(1000)
        assert "geheim" not in log
        assert "\nLANG=C\n" in log and "EXTRA=1" in log and "fehler" in log
        descriptors = {line.split()[8]: line.split()[10] for line in log.splitlines() if " -> " in line}
        assert descriptors.pop("0") == "/dev/null"
        assert set(descriptors) <= {"1", "2", str(write_end), "3"} and str(other) not in descriptors
        assert child.returncode == 0
        assert os.stat(child.log_path).st_mode & 0o777 == 0o600
    finally:
        os.close(other)


def test_child_has_its_own_session_and_a_start_time(run_dir):
    child = start(run_dir, "sleep", "60")
    assert child.alive and os.getsid(child.pid) == child.pid
    with open(f"/proc/{child.pid}/stat") as stat:
        assert child.start_time == int(stat.read().rpartition(")")[2].split()[19])
    assert child.stop(timeout=10) == -signal.SIGTERM
    assert not child.alive and child.stop() == -signal.SIGTERM


def test_child_dies_with_a_killed_parent(run_dir):
    code = (
        "import sys; from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import *;"
        f"c = Child.start(['sleep', '60'], log_path={run_dir!r} + '/c.log', name='c'); print(c.pid, flush=True);"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_running(pid))


def test_child_dies_with_the_thread_that_started_it(run_dir):
    children = []

    def work():
        child = start(run_dir, "sh", "-c", "echo ready; sleep 60")
        children.append(child)
        wait_until(lambda: child.log_tail() == "ready")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    wait_until(lambda: not children[0].alive)
    assert children[0].returncode == -signal.SIGKILL


def test_a_server_that_dies_is_reported_with_its_last_words(run_dir):
    child = start(run_dir, "sh", "-c", "echo first; echo no such disk >&2; exit 3")
    with pytest.raises(DataPathError) as caught:
        child.wait_for_socket(os.path.join(run_dir, "s"), timeout=30)
    assert "the child" in str(caught.value) and "no such disk" in str(caught.value)
    assert child.log_tail(1) == "no such disk"


def test_a_socket_file_alone_is_no_server(run_dir):
    path = os.path.join(run_dir, "s")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(path)
    child = start(run_dir, "sleep", "60")
    with pytest.raises(DataPathError) as caught:
        child.wait_for_socket(path, timeout=0.1)
    assert caught.value.retryable
    bound.listen()
    child.wait_for_socket(path, timeout=5)
    child.stop()
    assert not os.path.exists(path)
    bound.close()


def test_stop_kills_what_does_not_end(run_dir):
    """nbdkit can outlive SIGTERM while a client is connected (VADP facts 45)."""
    child = start(run_dir, "sh", "-c", "trap '' TERM; echo ready; sleep 60 & echo $!; while :; do wait; done")
    wait_until(lambda: len(child.log_tail().split()) == 2)
    assert child.stop(timeout=0.2) == -signal.SIGKILL
    grandchild = int(child.log_tail().split()[1])
    wait_until(lambda: not is_running(grandchild))


def test_a_missing_program_is_named(run_dir):
    with pytest.raises(DataPathError, match="not installed: no-such-program"):
        start(run_dir, "no-such-program")


def test_run_tool_returns_output_or_raises_with_the_last_words():
    assert run_tool(["echo", "hello"], what="It failed") == "hello\n"
    with pytest.raises(DataPathError) as caught:
        run_tool(["sh", "-c", "echo out; echo cause >&2; exit 4"], what="It failed", subject="disk 1")
    assert str(caught.value) == "It failed: disk 1: cause."
    assert caught.value.details == {"returncode": 4}
    assert tool_result(["sh", "-c", "exit 4"], what="It failed", accept=(0, 4)).returncode == 4
    pieces = []
    tool_result(["sh", "-c", "echo a; echo b"], what="It failed", on_output=pieces.append)
    assert b"".join(pieces) == b"a\nb\n"


@pytest.mark.parametrize("on_output", [None, print])
def test_run_tool_kills_what_takes_too_long(on_output):
    started = time.monotonic()
    with pytest.raises(DataPathError, match="did not end within 0.2 s"):
        tool_result(["sleep", "60"], what="It failed", timeout=0.2, on_output=on_output)
    assert time.monotonic() - started < 10
