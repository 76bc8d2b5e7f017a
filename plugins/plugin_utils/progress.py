# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Progress of long-running modules on the controller's screen.

A module can't send anything before it ends. So the module appends JSON lines to a progress file, and the action plugin,
which runs on the controller, reads that file meanwhile and prints a line now and then:

* Module and controller on one machine, as one user: a thread follows the file.
* Everything else (SSH, ``become``, containers): the module runs as an asynchronous job. Each poll is one short command
  that fetches what is new in the file and whether the job still runs, so no channel is silent for long: firewalls and
  SSH servers cut silent ones, and a synchronous module with them.

Nobody ends a module whose controller died, so the plugin gives it a lease (see ``module_utils/lease.py``): the process
ids of ansible-playbook and of the plugin on this machine; else a file that each poll touches, and that goes with the
task. A plugin that outlives its ansible-playbook ends the job.
"""

from __future__ import annotations

import base64
import binascii
import json
import multiprocessing
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

from ansible import constants as C
from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ..module_utils.lease import identity
from ..module_utils.shown import shown

display = Display()

FOLLOW_SECONDS = 0.5
POLL_SECONDS = 1.0
#: A line for a disk appears when a minute has passed since its last one, or this much of the disk, but no sooner than
#: some seconds: a disk of 1 TiB gets some hundred lines, one of some seconds a few.
LINE_SECONDS = 60.0
LINE_PERCENT = 5.0
LEAST_SECONDS = 5.0
#: At most this much of the progress file a poll: more is old news, and comes with the next poll.
POLL_BYTES = 256 * 1024
#: The longest a module may run as a job; Ansible wants a limit.
JOB_SECONDS = 30 * 24 * 3600
#: How long the connection to a job's machine may be away before the task is given up.
LOST_SECONDS = 120.0
#: A job ends when it was not polled for so long: later than the task would have been given up here.
LEASE_SECONDS = int(LOST_SECONDS) + 60
#: After this long without news from a job, its process is looked for.
QUIET_SECONDS = 30.0

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(count: float) -> str:
    """``201326592`` -> ``192.0 MiB``."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 else f"{count:.1f} {UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """``12`` -> ``12 s``, ``125`` -> ``2 min 5 s``, ``7300`` -> ``2 h 1 min``."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def line_text(host: str, record: Dict[str, Any]) -> str:
    """The line for one record of a progress file, without a newline."""
    done, total = int(record["done_bytes"]), int(record["total_bytes"])
    rate = float(record.get("bytes_per_second") or 0)
    seconds = float(record.get("seconds") or 0)
    percent = 100 if total <= 0 else min(100, done * 100 // total)
    head = f"{host}: {record['label']}:"
    state = str(record.get("state"))
    speed = f", {rate / 1024 / 1024:.0f} MiB/s" if rate >= 1024 * 1024 else ""
    if state.startswith("waiting "):
        return f"{head} {state}"
    if state != "running":
        return f"{head} {state}, {size_text(done)} in {duration_text(seconds)}{speed}"
    left = f", {duration_text((total - done) / rate)} left" if rate > 0 and total > done else ""
    return f"{head} {percent} %, {size_text(done)} of {size_text(total)}{speed}{left}"


class ProgressLines:
    """Turns the bytes of a progress file, as they come, into lines worth a place on the screen.

    :param host: the host's name in the inventory, printed first.
    :param emit: takes one line.
    """

    def __init__(self, host: str, emit: Callable[[str], None]) -> None:
        self._host = host
        self._emit = emit
        self._rest = b""
        self._shown: Dict[Tuple[str, str], Tuple[float, float]] = {}

    def feed(self, data: bytes) -> None:
        """Take what is new in the file; of several records of one disk in one state only the last counts."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        latest: Dict[Tuple[str, str, str], Dict[str, Any]] = {}
        for line in lines:
            record = _record(line)
            if record is not None:
                # A later record goes to the end, so that states of a disk stay in their order.
                place = (str(record["disk"]), str(record["label"]), str(record["state"]))
                latest.pop(place, None)
                latest[place] = record
        for record in latest.values():
            self._consider(record)

    def _consider(self, record: Dict[str, Any]) -> None:
        place = (str(record["disk"]), str(record["label"]))
        seconds = float(record.get("seconds") or 0)
        percent = 100.0 * record["done_bytes"] / max(1, record["total_bytes"])
        if record["state"] == "running":
            if place in self._shown:
                shown_seconds, shown_percent = self._shown[place]
                passed = seconds - shown_seconds
                if passed < LINE_SECONDS and (percent - shown_percent < LINE_PERCENT or passed < LEAST_SECONDS):
                    return
            self._shown[place] = (seconds, percent)
        else:
            self._shown.pop(place, None)
        self._emit(line_text(self._host, record))


def _record(line: bytes) -> Optional[Dict[str, Any]]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"disk", "label", "state"} <= set(record):
        return None
    for key in ("done_bytes", "total_bytes"):
        if not isinstance(record.get(key), (int, float)):
            return None
    return record


class Follower:
    """Context manager: a thread that reads a growing local file from *offset* on, and once more at the end.

    :param take: is called with each new part, in the thread.
    """

    def __init__(self, path: str, offset: int, take: Callable[[bytes], None]) -> None:
        self._path = path
        self._offset = offset
        self._take = take
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="vadp-progress", daemon=True)
        self.error: Optional[OSError] = None

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        over = False
        while not over and self.error is None:
            over = self._stop.wait(FOLLOW_SECONDS)
            self._read()

    def _read(self) -> None:
        try:
            with open(self._path, "rb") as handle:
                handle.seek(self._offset)
                data = handle.read()
        except FileNotFoundError:
            # The module has not come to it yet.
            return
        except OSError as error:
            self.error = error
            return
        if data:
            self._offset += len(data)
            self._take(data)


class ProgressAction(ActionBase):
    """Base of the action plugins of modules with an option ``progress_file``: runs the module, shows its progress."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp: Any = None, task_vars: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Run the module of the task's name and return its result as it is."""
        super().run(None, task_vars)
        variables = task_vars or {}
        if self._task.async_val:
            # The user polls, so nothing is to be done here that would hold the task.
            return dict(self._execute_module(task_vars=variables, wrap_async=True))
        if self._task.check_mode:
            return dict(self._execute_module(task_vars=variables))
        lines = ProgressLines(str(variables.get("inventory_hostname") or "localhost"), _print)
        if self._connection.transport == "local" and not self._runs_as_another():
            return self._run_here(lines, variables)
        return self._run_remotely(lines, variables)

    def _runs_as_another(self) -> bool:
        return self._connection.become is not None

    def _arguments(self, progress_file: str, lease: Dict[str, Any]) -> Dict[str, Any]:
        return {**self._task.args, "progress_file": progress_file, "lease": lease}

    # Here: a thread follows the file.

    def _run_here(self, lines: ProgressLines, variables: Dict[str, Any]) -> Dict[str, Any]:
        own = self._task.args.get("progress_file")
        folder = tempfile.mkdtemp(prefix="vadp-progress-", dir=C.DEFAULT_LOCAL_TMP)  # type: ignore[attr-defined]
        lease: Dict[str, Any] = {"processes": _waiting(), "file": os.path.join(folder, "lease")}
        _touch(lease["file"])
        if own:
            path = os.path.expanduser(os.path.expandvars(str(own)))
            offset = os.path.getsize(path) if os.path.exists(path) else 0
        else:
            path, offset = os.path.join(folder, "progress"), 0
            _touch(path)
        follower = Follower(path, offset, lines.feed)
        try:
            with follower:
                result = dict(self._execute_module(module_args=self._arguments(path, lease), task_vars=variables))
            _check_parent()
            return result
        finally:
            if follower.error is not None:
                display.warning(f"The progress is not shown: {path} can't be read: {follower.error.strerror}")
            # A task that is given up ends the module by this.
            shutil.rmtree(folder)

    # On another machine, or as another user: a job that is polled.

    def _run_remotely(self, lines: ProgressLines, variables: Dict[str, Any]) -> Dict[str, Any]:
        own = self._task.args.get("progress_file")
        folder = self._remote_folder()
        lease: Dict[str, Any] = {"file": f"{folder}/lease", "seconds": LEASE_SECONDS}
        if own:
            path = str(self._remote_expand_user(str(own)))
            size = self._shell_words(f"wc -c < {shlex.quote(path)} 2>/dev/null || echo 0")
            offset = int(size) if size.isdigit() else 0
        else:
            path, offset = f"{folder}/progress", 0
        payload = self._connection._shell.tmpdir or self._make_tmp_path()
        try:
            started = self._start_job(self._arguments(path, lease), variables)
            if "ansible_job_id" not in started or "results_file" not in started:
                return started
            job = Job(str(started["ansible_job_id"]), str(started["results_file"]), path, offset, lease["file"])
            try:
                return self._wait_for_job(job, lines, variables)
            except BaseException:
                # The task is over for the user (interrupted, timed out): so is the job, as without the detour.
                self._end_job(job)
                raise
        finally:
            self._try_command(f"rm -rf {shlex.quote(folder)}")
            self._remove_payload(payload)

    def _remote_folder(self) -> str:
        make = 'mktemp -d "${TMPDIR:-/tmp}/vadp-progress-XXXXXXXX"'
        words = self._shell_words(f'umask 077; made=$({make}) && touch "$made/lease" && echo "$made"')
        if not re.fullmatch(r"/\S*/vadp-progress-\w+", words):
            raise AnsibleActionFail(
                f"No folder for the progress could be made on the proxy: mktemp -d said {words!r}. "
                "Give the module a progress_file of your own."
            )
        return words

    def _remove_payload(self, folder: str) -> None:
        """The module with its options (the password too). The job's supervisor removes it some seconds too late."""
        if C.DEFAULT_KEEP_REMOTE_FILES:  # type: ignore[attr-defined]
            return
        try:
            self._remove_tmp_path(folder, force=True)
        except AnsibleConnectionFailure as error:
            display.warning(f"The proxy was not reached for removing {folder}: {error}")

    def _start_job(self, arguments: Dict[str, Any], variables: Dict[str, Any]) -> Dict[str, Any]:
        # A job's limit is the task's "async", which belongs to the user: borrowed for this one call.
        self._task.async_val = JOB_SECONDS
        try:
            return dict(self._execute_module(module_args=arguments, task_vars=variables, wrap_async=True))
        finally:
            self._task.async_val = 0

    def _wait_for_job(self, job: Job, lines: ProgressLines, variables: Dict[str, Any]) -> Dict[str, Any]:
        reached = heard = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            _check_parent()
            try:
                data, running = job.parse(self._words(job.poll_command()))
            except (AnsibleConnectionFailure, LostJob) as error:
                if time.monotonic() - reached > LOST_SECONDS:
                    raise
                display.vvv(shown(f"The job on the proxy was not reached, trying again: {error}"))
                self._reset_connection()
                continue
            reached = time.monotonic()
            lines.feed(data)
            if data:
                heard = reached
            if len(data) >= POLL_BYTES:
                continue
            if not running:
                result = self._job_result(job, variables)
                if result is not None:
                    return result
            elif reached - heard > QUIET_SECONDS:
                heard = reached
                # An answer that was lost on the way says nothing.
                if self._shell_words(job.processes_command()) == SCANNED:
                    # It may have ended between the two commands.
                    data, running = job.parse(self._words(job.poll_command()))
                    lines.feed(data)
                    if running:
                        self._forget_job(job, variables)
                        return dict(KILLED)

    def _job_result(self, job: Job, variables: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """The module's own result, or None if it isn't there yet."""
        status = self._async_status(job, "status", variables)
        if not status.get("finished"):
            return None
        self._forget_job(job, variables)
        if status.get("failed") and "cmd" in status and not str(status.get("data", "-")).strip():
            # Ansible's wrapper outlived the module and found no word of it: its own traceback helps nobody.
            return dict(KILLED)
        result = {key: value for key, value in status.items() if key not in JOB_KEYS}
        for stream in ("stdout", "stderr"):
            if not result.get(stream):
                result.pop(stream, None)
                result.pop(f"{stream}_lines", None)
        return result

    def _forget_job(self, job: Job, variables: Dict[str, Any]) -> None:
        self._async_status(job, "cleanup", variables)

    def _async_status(self, job: Job, mode: str, variables: Dict[str, Any]) -> Dict[str, Any]:
        # Not by the action of that name: it works the folder out once more, by another user's home perhaps.
        where = {"jid": job.job_id, "mode": mode, "_async_dir": os.path.dirname(job.results_file)}
        module = "ansible.legacy.async_status"
        try:
            return dict(self._execute_module(module_name=module, module_args=where, task_vars=variables))
        finally:
            self.cleanup()

    def _end_job(self, job: Job) -> None:
        for pid in self._try_command(job.processes_command()).split():
            if pid.isdigit():
                # The wrapper makes the module and itself a process group; its supervisor ends by itself then.
                self._try_command(f"kill -s TERM -- -{pid} 2>/dev/null")
        self._try_command(f"rm -f {shlex.quote(job.results_file)}")

    # Commands on the proxy, as the user the module runs as.

    def _words(self, command: str) -> str:
        return str(self._low_level_execute_command(command, sudoable=True).get("stdout") or "")

    def _shell_words(self, command: str) -> str:
        """What a command prints, between marks: login messages and terminals add to it."""
        text = self._words(f"printf 'vadp<'; {{ {command}; }}; printf '>vadp'")
        found = re.search(r"vadp<(.*?)>vadp", text, re.DOTALL)
        return found.group(1).strip() if found else ""

    def _try_command(self, command: str) -> str:
        """For clean-up on the way out of an error, which must not take that error's place."""
        try:
            return self._shell_words(command)
        except AnsibleConnectionFailure as error:
            display.vvv(shown(f"The proxy was not reached for cleaning up: {error}"))
            return ""

    def _reset_connection(self) -> None:
        reset = getattr(self._connection, "reset", None)
        if reset is not None:
            try:
                reset()
            except AnsibleConnectionFailure as error:
                display.vvv(shown(f"The connection was not reset: {error}"))


#: Ends the list of a job's processes.
SCANNED = "scanned"

#: The result of a job whose module left none.
KILLED: Dict[str, Any] = {
    "failed": True,
    "changed": True,
    "msg": "The module ended on the proxy without a result: its process was killed, or the machine was restarted. "
    "Run the task again; what was left behind is cleaned up then.",
}

#: What Ansible's job bookkeeping adds to a module's result.
JOB_KEYS = ("started", "finished", "ansible_job_id", "results_file", "erased")


class LostJob(Exception):
    """A poll came back without an answer."""


class Job:
    """A module that runs as Ansible's asynchronous job, with a progress file: the commands to follow it."""

    def __init__(self, job_id: str, results_file: str, progress_file: str, offset: int, lease_file: str) -> None:
        self.job_id = job_id
        self.lease_file = lease_file
        self.results_file = results_file
        self.progress_file = progress_file
        self.offset = offset

    def poll_command(self) -> str:
        """One command for all: what is new in the progress file, and whether the job still runs; it renews the lease.

        Base64 because terminals change line ends. As long as the module runs, the results file begins with "started".
        """
        return (
            f"touch -c {shlex.quote(self.lease_file)} 2>/dev/null; printf 'vadp<'; "
            f"tail -c +{self.offset + 1} {shlex.quote(self.progress_file)} 2>/dev/null "
            f"| head -c {POLL_BYTES} | base64; "
            f"if grep -q '^{{\"started\"' {shlex.quote(self.results_file)} 2>/dev/null; "
            "then printf '>running'; else printf '>over'; fi"
        )

    def parse(self, text: str) -> Tuple[bytes, bool]:
        """(what is new, whether the job still runs); moves the offset on. Raises LostJob if that is no answer."""
        found = re.search(r"vadp<([A-Za-z0-9+/=\s]*)>(running|over)", text)
        if not found:
            raise LostJob(text.strip()[-200:])
        try:
            data = base64.b64decode("".join(found.group(1).split()), validate=True)
        except binascii.Error as error:
            raise LostJob(str(error)) from error
        self.offset += len(data)
        return data, found.group(2) == "running"

    def processes_command(self) -> str:
        """Prints the ids of the job's processes, Ansible's wrapper, and at the end ``SCANNED``.

        The bracket keeps the command from finding itself.
        """
        name = self.job_id.split(".")[0]
        return (
            "for f in /proc/[0-9]*/cmdline; do "
            f"tr '\\000' ' ' 2>/dev/null < $f | grep -q '[a]sync_wrapper.* {name} ' && "
            f"p=${{f%/cmdline}} && echo ${{p#/proc/}}; done 2>/dev/null; echo {SCANNED}"
        )


def _touch(path: str) -> None:
    """Make an empty file that only we can read."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _waiting() -> List[str]:
    """The processes that wait for a module here: this one, and the ansible-playbook whose worker it is."""
    parent = multiprocessing.parent_process()
    return [identity(os.getpid())] + ([identity(parent.pid)] if parent is not None and parent.pid else [])


def _check_parent() -> None:
    """:raises AnsibleActionFail: the ansible-playbook whose worker this is was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        raise AnsibleActionFail("ansible-playbook has ended; nobody waits for this task any more.")


def _print(line: str) -> None:
    # A callback that prints JSON owns stdout; the lines go beside it then.
    callback = str(C.DEFAULT_STDOUT_CALLBACK)  # type: ignore[attr-defined]
    display.display(shown(line), stderr=callback.rsplit(".", 1)[-1] in ("json", "jsonl"))


__all__: List[str] = [
    "Follower",
    "Job",
    "LostJob",
    "ProgressAction",
    "ProgressLines",
    "duration_text",
    "line_text",
    "size_text",
]
