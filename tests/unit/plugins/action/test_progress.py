# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Progress on the controller's screen: the lines, and the action plugin through ansible-playbook."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.openvadp.backup.plugins.plugin_utils import progress

ROOT = Path(__file__).resolve().parents[4]
MIB = 1024 * 1024


def record(done: int, seconds: float, state: str = "running", label: str = "Hard disk 1", rate: float = 0) -> bytes:
    fields = {"disk": 2000, "label": label, "state": state, "done_bytes": done, "total_bytes": 192 * MIB}
    fields.update(bytes_per_second=rate, seconds=seconds)
    return json.dumps(fields).encode() + b"\n"


def lines_of(*parts: bytes) -> List[str]:
    lines: List[str] = []
    follower = progress.ProgressLines("app01", lines.append)
    for part in parts:
        follower.feed(part)
    return lines


def test_a_line_says_how_far_how_fast_and_how_long() -> None:
    assert lines_of(record(90 * MIB, 1, rate=8.5 * MIB)) == [
        "app01: Hard disk 1: 46 %, 90.0 MiB of 192.0 MiB, 8 MiB/s, 12 s left"
    ]


def test_a_line_says_what_a_disk_waits_for() -> None:
    parts = [record(0, 0.0), record(0, 0.1, state="waiting for a connection to esx01"), record(0, 0.0)]
    assert lines_of(*parts) == [
        "app01: Hard disk 1: 0 %, 0 B of 192.0 MiB",
        "app01: Hard disk 1: waiting for a connection to esx01",
        "app01: Hard disk 1: 0 %, 0 B of 192.0 MiB",
    ]


def test_lines_come_at_the_start_each_minute_or_five_percent_and_at_the_end() -> None:
    one = 192 * MIB // 100 + 1
    parts = [
        record(0, 0.0),
        record(4 * one, 6.0),  # not yet five percent later
        record(6 * one, 6.5),  # five percent later
        record(30 * one, 8.0),  # too soon
        record(31 * one, 12.0),
        record(32 * one, 71.0),  # not yet a minute later
        record(33 * one, 72.5),  # a minute later
        record(192 * MIB, 73.0, state="done", rate=24 * MIB),
    ]
    assert lines_of(*parts) == [
        "app01: Hard disk 1: 0 %, 0 B of 192.0 MiB",
        "app01: Hard disk 1: 6 %, 11.5 MiB of 192.0 MiB",
        "app01: Hard disk 1: 31 %, 59.5 MiB of 192.0 MiB",
        "app01: Hard disk 1: 33 %, 63.4 MiB of 192.0 MiB",
        "app01: Hard disk 1: done, 192.0 MiB in 1 min 13 s, 24 MiB/s",
    ]


def test_a_disk_of_a_tebibyte_gets_some_two_hundred_lines() -> None:
    tebibyte, seconds = 1 << 40, 10_486  # 100 MiB a second
    records = [
        json.dumps(
            dict(disk=2000, label="Hard disk 1", state="running", done_bytes=tebibyte * at // seconds)
            | dict(total_bytes=tebibyte, bytes_per_second=100 * MIB, seconds=float(at))
        ).encode()
        + b"\n"
        for at in range(0, seconds, 2)
    ]
    assert 150 < len(lines_of(*records)) < 200


def test_a_line_cut_anywhere_and_foreign_text_do_no_harm() -> None:
    data = record(0, 0.0) + b"not json\n[1]\n{}\n" + record(MIB, 1.0, state="done")
    expected = lines_of(data)
    assert len(expected) == 2
    for cut in range(len(data)):
        assert lines_of(data[:cut], data[cut:])[-1] == expected[-1]


def test_disks_do_not_hide_each_other() -> None:
    lines = lines_of(record(0, 0.0) + record(0, 0.0, label="Hard disk 2") + record(MIB, 0.1))
    assert [line.split(":")[1].strip() for line in lines] == ["Hard disk 2", "Hard disk 1"]


def test_a_poll_finds_new_bytes_whatever_the_terminal_made_of_the_line_ends(tmp_path: Path) -> None:
    path, results = tmp_path / "progress", tmp_path / "j1.2"
    path.write_bytes(b"old\n" + bytes(range(256)) * 700)
    results.write_text('{"started": 1, "finished": 0, "ansible_job_id": "j1.2"}')
    lease = tmp_path / "lease"
    lease.touch()
    os.utime(lease, (1, 1))
    job = progress.Job("j1.2", str(results), str(path), 4, str(lease))

    def poll() -> Any:
        text = subprocess.run(["sh", "-c", job.poll_command()], check=True, capture_output=True, text=True).stdout
        return job.parse("Welcome!\r\n" + text.replace("\n", "\r\n"))

    assert poll() == (bytes(range(256)) * 700, True)
    assert lease.stat().st_mtime > 1
    lease.unlink()
    assert poll() == (b"", True)
    results.write_text('{"changed": true, "invocation": {"started": 1}}')
    assert poll() == (b"", False)
    assert not lease.exists(), "a lease that was given up does not come back"
    with pytest.raises(progress.LostJob):
        job.parse("Connection closed")


# Through ansible-playbook: the action plugin of the collection beside a module that takes its time.

MODULE = """
import json, os, signal, time
from ansible.module_utils.basic import AnsibleModule
from ansible_collections.openvadp.backup.plugins.module_utils.lease import Ended, ends_in_order

module = AnsibleModule(
    dict(progress_file=dict(type="path"), seconds=dict(type="float", default=0), password=dict(no_log=True),
         act=dict(default="end"), lease=dict(type="dict")),
    supports_check_mode=True,
)
path = module.params["progress_file"]
start = time.monotonic()
mode = path and os.path.exists(path) and os.stat(path).st_mode & 0o777 == 0o600
folder_mode = path and os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
total = 192 * 1024 * 1024

def note(state, part):
    if path is None:
        return
    seconds = time.monotonic() - start
    fields = dict(disk=2000, label="Hard disk 1", state=state, done_bytes=int(total * part), total_bytes=total)
    fields.update(bytes_per_second=total * part / max(seconds, 0.001), seconds=seconds)
    with open(path, "a") as handle:
        handle.write(json.dumps(fields) + "\\n")

def work():
    note("running", 0)
    while time.monotonic() - start < module.params["seconds"]:
        time.sleep(0.2)
        note("running", min(1.0, (time.monotonic() - start) / module.params["seconds"]))
    if module.params["act"] == "silent":
        time.sleep(4)
    if module.params["act"] == "kill_all":
        os.killpg(0, signal.SIGKILL)
    if module.params["act"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if module.params["act"] == "fail":
        module.fail_json(msg="it broke", error={"kind": "DataPathError", "details": {"started": 1}})
    note("done", 1)

try:
    with ends_in_order(module.params["lease"]):
        work()
except Ended as end:
    module.fail_json(msg=str(end))
module.exit_json(changed=not module.check_mode, file=path, private=mode, private_folder=folder_mode,
                 diff=dict(before="a", after="b"), started_at="x")
"""


class Controller:
    def __init__(self, folder: Path, ansible_playbook: str = "") -> None:
        self.folder = folder
        self.program = ansible_playbook or str(Path(sys.executable).parent / "ansible-playbook")
        plugins = folder / "ansible_collections" / "openvadp" / "backup" / "plugins"
        for name in ("action", "plugin_utils", "module_utils"):
            shutil.copytree(ROOT / "plugins" / name, plugins / name)
        (plugins / "modules").mkdir()
        self.cache = folder / "cache"
        self.cache.mkdir()
        (plugins / "modules" / "vadp_disk_export.py").write_text(MODULE)
        (folder / "ansible.cfg").write_text(
            f"[defaults]\nlocal_tmp={folder}/local\nremote_tmp={folder}/remote\nasync_dir={folder}/async\n"
            f"collections_path={folder}\nlocalhost_warning=false\n"
        )

    def play(self, arguments: Dict[str, Any], task: Any = None, variables: Any = None, *options: str) -> Any:
        steps = [
            {
                "openvadp.backup.vadp_disk_export": arguments,
                "register": "outcome",
                "ignore_errors": True,
                **(task or {}),
            },
            {
                "copy": {"content": "{{ outcome | to_json }}", "dest": f"{self.folder}/outcome"},
                "check_mode": False,
                "delegate_to": "localhost",
                "vars": {"ansible_connection": "local", "ansible_become": False},
            },
        ]
        play = [{"hosts": "all", "gather_facts": False, "tasks": steps}]
        (self.folder / "play.json").write_text(json.dumps(play))
        hosts = {
            "app01": {"ansible_python_interpreter": sys.executable, **(variables or {"ansible_connection": "local"})}
        }
        (self.folder / "inventory.json").write_text(json.dumps({"all": {"hosts": hosts}}))
        command = [self.program, "-i", f"{self.folder}/inventory.json", f"{self.folder}/play.json", *options]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ANSIBLE_", "PYTHONPATH"))}
        environment["ANSIBLE_CONFIG"] = f"{self.folder}/ansible.cfg"
        # What is the same in each run is made once.
        environment.update(PYTHONPATH=str(ROOT / "tests/e2e/startup"), E2E_CACHE=str(self.cache))
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=120, env=environment, cwd=self.folder
        )
        assert run.returncode == 0, run.stdout + run.stderr
        outcome = json.loads((self.folder / "outcome").read_text())
        lines = [line for line in run.stdout.splitlines() if line.startswith("app01: Hard disk 1: ")]
        return outcome, lines, run.stdout + run.stderr

    def leftovers(self) -> List[str]:
        """Files of Ansible's and ours that should be gone: progress folders, jobs, payloads."""
        return [
            str(path)
            for name in ("local", "remote", "async")
            for path in (self.folder / name).rglob("*")
            if path.is_file()
        ]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    return Controller(tmp_path_factory.mktemp("controller"))


def test_here_the_file_is_private_followed_and_gone(controller: Controller) -> None:
    outcome, lines, _text = controller.play({"seconds": 1.5})
    assert outcome["changed"] is True and outcome["private"] is True and outcome["private_folder"] is True
    assert not os.path.exists(outcome["file"])
    # How far it is at the first look depends on the machine.
    assert re.fullmatch(r"app01: Hard disk 1: \d+ %, .* of 192\.0 MiB.*", lines[0])
    assert lines[-1].startswith("app01: Hard disk 1: done")
    assert len(lines) >= 2
    assert not controller.leftovers()


def test_a_progress_file_of_the_users_is_kept_and_shown(controller: Controller) -> None:
    own = controller.folder / "own"
    own.write_bytes(record(0, 0.0, label="Hard disk 1, yesterday"))
    outcome, lines, _text = controller.play({"progress_file": str(own)})
    assert outcome["file"] == str(own) and own.exists()
    assert lines[-1].startswith("app01: Hard disk 1: done") and not any("yesterday" in line for line in lines)


def test_a_failure_passes_untouched(controller: Controller) -> None:
    for variables in (None, {"ansible_connection": "local", "ansible_become": True, "ansible_become_method": "su"}):
        if variables and os.geteuid() != 0:
            continue
        outcome, lines, _text = controller.play({"act": "fail"}, None, variables)
        assert outcome["failed"] is True and outcome["msg"] == "it broke", outcome
        assert outcome["error"] == {"kind": "DataPathError", "details": {"started": 1}}
        assert lines and "done" not in lines[-1]
        assert not {"ansible_job_id", "finished", "started", "results_file"} & set(outcome)
        assert not controller.leftovers()


def test_check_mode_takes_no_detour(controller: Controller) -> None:
    outcome, lines, _text = controller.play({"seconds": 1.5}, None, None, "--check", "--diff")
    assert outcome["changed"] is False and outcome["file"] is None and outcome["diff"] and not lines


def test_the_users_own_async_is_left_alone(controller: Controller) -> None:
    outcome, lines, _text = controller.play({"seconds": 0.5}, {"async": 60, "poll": 1})
    assert outcome["changed"] is True and outcome["file"] is None and not lines
    assert outcome["finished"] and outcome["ansible_job_id"]


def test_no_password_in_the_most_talkative_output(controller: Controller) -> None:
    for variables in (None, {"ansible_connection": "local", "ansible_become": True, "ansible_become_method": "su"}):
        if variables and os.geteuid() != 0:
            continue
        _outcome, _lines, text = controller.play({"password": "S3cret-w0rd"}, None, variables, "-vvv")
        assert "S3cret-w0rd" not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_gets_a_job_that_is_polled(controller: Controller) -> None:
    become = {"ansible_connection": "local", "ansible_become": True, "ansible_become_method": "su"}
    outcome, lines, _text = controller.play({"seconds": 2.5}, {"diff": True}, become)
    assert outcome["changed"] is True and outcome["private"] is False and outcome["private_folder"] is True
    assert outcome["started_at"] == "x" and outcome["diff"]
    assert not {"ansible_job_id", "finished", "started", "results_file", "stdout", "stderr"} & set(outcome)
    assert not os.path.exists(os.path.dirname(outcome["file"]))
    # The first look may come before anything was read: then it has no rate to show yet.
    assert any(re.search(r" %, .* of 192.0 MiB", line) for line in lines)
    assert lines[-1].startswith("app01: Hard disk 1: done")
    assert not controller.leftovers()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_job_that_vanishes_is_noticed_and_a_silent_one_is_waited_for(controller: Controller) -> None:
    quiet = controller.folder / "ansible_collections/openvadp/backup/plugins/plugin_utils/progress.py"
    text = quiet.read_text()
    quiet.write_text(text.replace("QUIET_SECONDS = 30.0", "QUIET_SECONDS = 0.1"))
    become = {"ansible_connection": "local", "ansible_become": True, "ansible_become_method": "su"}
    try:
        silent, _lines, _text = controller.play({"act": "silent"}, None, become)
        # With Ansible's wrapper, and without it, as by a kernel that is out of memory.
        killed = [controller.play({"act": act, "seconds": 3}, None, become)[0] for act in ("kill_all", "kill")]
    finally:
        quiet.write_text(text)
    assert silent["changed"] and not silent["failed"], silent
    for outcome in killed:
        assert outcome["failed"] and "its process was killed" in outcome["msg"], outcome
    assert not controller.leftovers()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_task_that_is_given_up_ends_its_job(controller: Controller) -> None:
    become = {"ansible_connection": "local", "ansible_become": True, "ansible_become_method": "su"}
    own = controller.folder / "given-up"
    outcome, _lines, _text = controller.play({"seconds": 60, "progress_file": str(own)}, {"timeout": 10}, become)
    assert outcome["failed"] and '"done"' not in own.read_text()
    # Ansible puts the module into the group that is told to end only after it has started; else its lease ends it.
    deadline = time.monotonic() + 10
    while _modules_of(controller):
        assert time.monotonic() < deadline, "the module goes on"
        time.sleep(0.1)
    size = own.stat().st_size
    assert size > 0 and '"done"' not in own.read_text()
    assert not controller.leftovers()


def _modules_of(controller: Controller) -> List[str]:
    """Processes of the module; Ansible's supervisor sleeps for some seconds before it sees that its job is over."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        module = len(words) > 1 and words[1].endswith(b"AnsiballZ_vadp_disk_export.py")
        if module and os.fsencode(controller.folder) in words[1]:
            found.append(path.parent.name)
    return found
