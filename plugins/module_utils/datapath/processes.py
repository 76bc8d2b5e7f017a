# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Child processes: NBD servers that live as long as their user, and tools that run to their end.

Each child runs in a session of its own, reads nothing, inherits no file but those it is given, and is killed by the
kernel when we die (``setpriv --pdeathsig KILL``). Mind that this signal follows the *thread* that started the child: a
child started by a thread that ends is killed at that moment. So the thread that starts a child must outlive it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import DataPathError

PREFIX = "openvadp-"
# The path of a Unix socket has 107 usable bytes; this leaves 47 for the name of the socket.
_PATH_LIMIT = 60
_RUN_ID_CHARACTERS = 24
_POLL_SECONDS = 0.01
# What the logs of a run take at least.
_ROOM_BYTES = 256 * 1024
_TAIL_BYTES = 64 * 1024

# After the death signal is set, a shell makes sure that the parent is still there, then becomes the program.
# No core file: it would hold the password.
_STILL_OURS = 'ulimit -c 0; test "$PPID" = "$1" || exit 125; shift; exec "$@"'

_NO_CORE = 'ulimit -c 0; exec "$@"'

# Program -> the packages that hold it, where none is named like it everywhere.
_PACKAGES = dict.fromkeys(("qemu-img", "qemu-nbd"), "qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, RHEL)")
_PACKAGES.update(setpriv="util-linux", prlimit="util-linux", timeout="coreutils")
_PACKAGES["qemu-system-x86_64"] = "qemu-system-x86 (Debian, Ubuntu) or qemu-system-x86-core (Fedora)"

# Every child of a run carries the run's id in its environment from its start on: by this the kernel itself tells a
# later recovery whose it is (proofs 7).
RUN_VARIABLE = "OPENVADP_RUN_ID"
_carried: Dict[str, str] = {}

# A variable that can carry a password does not go to a child.
_SECRET = re.compile(r"^VMWARE_|PASSW|SECRET|TOKEN|CREDENTIAL", re.IGNORECASE)


@contextlib.contextmanager
def children_of(run_id: str) -> Iterator[None]:
    """Children that are started meanwhile, by whatever thread, are known as those of the run *run_id*."""
    before = _carried.get(RUN_VARIABLE)
    _carried[RUN_VARIABLE] = run_id
    try:
        yield
    finally:
        if before is None:
            _carried.pop(RUN_VARIABLE, None)
        else:
            _carried[RUN_VARIABLE] = before


def run_prefix() -> str:
    """What the names of unfinished files begin with that are made in a run: its id and a dash, or nothing."""
    run_id = _carried.get(RUN_VARIABLE)
    return "" if run_id is None else f"{run_id}-"


class RuntimeDir:
    """A private folder (0700) with a short path for a run's sockets and logs; removed at exit.

    It lies in ``/run/user/<uid>``, ``$TMPDIR`` or ``/tmp``, whichever comes first, can be written, has some room and
    keeps the path below 60 bytes. It is named after the run, and locked while its owner lives: so :meth:`leftovers`
    tells what a crash left, at whatever moment it came.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.path, self._lock = self._make(run_id)

    @staticmethod
    def _bases() -> List[str]:
        bases = [f"/run/user/{os.geteuid()}", os.environ.get("TMPDIR", ""), "/tmp"]
        return [base for base in dict.fromkeys(bases) if os.path.isabs(base)]

    @staticmethod
    def _stem(run_id: str) -> str:
        return PREFIX + re.sub(r"[^A-Za-z0-9]", "", run_id)[:_RUN_ID_CHARACTERS] + "-"

    @classmethod
    def _make(cls, run_id: str) -> Tuple[str, int]:
        stem = cls._stem(run_id)
        reasons = []
        for base in cls._bases():
            if len(os.path.join(base, stem)) + 8 >= _PATH_LIMIT:
                reasons.append(f"{base}: its path is too long")
                continue
            try:
                while True:
                    path = tempfile.mkdtemp(prefix=stem, dir=base)
                    lock = _lock_folder(path)
                    if lock is not None:
                        _require_room(path, lock)
                        return path, lock
                    # Who clears up after a run of this name took it for a leftover before it was locked: again.
            except OSError as error:
                reasons.append(f"{base}: {error.strerror}")
        raise DataPathError(
            "No folder for sockets could be made",
            reason="; ".join(reasons),
            remedy="Make /tmp writable, with some room in it, or set TMPDIR to such a folder with a short path",
        )

    def __enter__(self) -> RuntimeDir:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.remove()

    def __fspath__(self) -> str:
        return self.path

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @classmethod
    def leftovers(cls, run_id: str, remove: bool = False) -> List[str]:
        """Paths of this user's folders of the run *run_id* whose owner is dead.

        :param remove: they are removed.
        """
        name_of_run = re.compile(re.escape(cls._stem(run_id)) + r"[A-Za-z0-9_]+")
        found = []
        for base in cls._bases():
            try:
                names = sorted(os.listdir(base))
            except OSError:
                continue
            for name in names:
                path = os.path.join(base, name)
                lock = _lock_folder(path) if name_of_run.fullmatch(name) else None
                if lock is not None:
                    found.append(path)
                    if remove:
                        shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)
        return found


def _require_room(path: str, lock: int) -> None:
    """Logs and configurations have room in a new folder. :raises OSError: they don't; the folder is gone."""
    try:
        descriptor = os.open("room", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=lock)
        try:
            data = memoryview(bytes(_ROOM_BYTES))
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)
            os.unlink("room", dir_fd=lock)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        raise


def _lock_folder(path: str) -> Optional[int]:
    """The descriptor that holds the lock of a private folder of this user; None if it is no such folder, or locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and (status.st_mode & 0o777) == 0o700:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have been removed before it was locked.
            if os.stat(path).st_ino == status.st_ino:
                return descriptor
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def no_core_files() -> None:
    """Neither this process nor its children leave a core file, should they crash: it would hold passwords."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _environment(extra: Optional[Mapping[str, str]] = None) -> Dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    env.pop(RUN_VARIABLE, None)
    env.update(LANG="C", LC_ALL="C")
    env.update(extra or {})
    env.update(_carried)
    return env


def _spawn(argv: Sequence[str], env: Optional[Mapping[str, str]] = None, **popen: Any) -> subprocess.Popen[bytes]:
    """Start *argv* in a session of its own, bound to the life of this thread."""
    program, setpriv = require_program(argv[0]), require_program("setpriv")
    command = [setpriv, "--pdeathsig", "KILL", "/bin/sh", "-c", _STILL_OURS, "sh", str(os.getpid()), program]
    # run_command is AnsibleModule's, and waits for the end.
    return subprocess.Popen(  # pylint: disable=ansible-bad-function
        command + list(argv[1:]),
        stdin=subprocess.DEVNULL,
        env=_environment(env),
        start_new_session=True,
        close_fds=True,
        **popen,
    )


def start_detached(argv: Sequence[str], *, log_path: str, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, in a session of its own; it must see to its own end.

    :param log_path: appended to; made with mode 0600.
    :param pass_fds: file descriptors that it inherits under the same numbers.
    """
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(  # pylint: disable=ansible-bad-function
            ["/bin/sh", "-c", _NO_CORE, "sh", *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(),
            start_new_session=True,
            close_fds=True,
            pass_fds=tuple(pass_fds),
            cwd="/",
        )
    finally:
        os.close(log)


def allow_open_files(count: int) -> Optional[int]:
    """Let what this process starts from now on open *count* files, by its soft limit.

    :returns: the hard limit, where that is too low; else None.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return None
    if hard != resource.RLIM_INFINITY and hard < count:
        return hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    return None


def require_program(name: str) -> str:
    """The path of a program. DataPathError: it is not installed."""
    found = shutil.which(name)
    if found is None:
        raise DataPathError(
            "A program is not installed",
            subject=name,
            reason="it is not in the search path",
            remedy=f"Install the package {_PACKAGES.get(name, name)}",
        )
    return found


def is_listening(path: str) -> bool:
    """Somebody listens on the Unix socket *path* (absolute)."""
    return _listening(path)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended already
        os.killpg(process.pid, number)


class Child:
    """A supervised child process. Its output goes to a log file."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, log_path: str) -> None:
        self._process = process
        self._files: List[str] = []
        self.name = name
        self.log_path = log_path
        self.pid = process.pid
        self.start_time = start_time(process.pid) or 0
        #: The NBD URI that the child serves, once somebody has said so.
        self.uri = ""

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        log_path: str,
        name: str,
        pass_fds: Sequence[int] = (),
        env: Optional[Mapping[str, str]] = None,
    ) -> Child:
        """Start *argv*; the thread that calls must outlive the child (see the module's text).

        :param log_path: appended to; made with mode 0600.
        :param name: what messages call the child ("qemu-nbd of disk 2000").
        :param pass_fds: file descriptors that the child inherits under the same numbers.
        :param env: variables on top of ours; ours go without those that can carry a secret, and with ``LANG=C``.
        :raises DataPathError: the program or ``setpriv`` is not installed.
        """
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = _spawn(argv, env=env, stdout=log, stderr=log, pass_fds=tuple(pass_fds))
        finally:
            os.close(log)
        return cls(process, name, log_path)

    @property
    def alive(self) -> bool:
        """The process has not ended."""
        return self._process.poll() is None

    @property
    def returncode(self) -> Optional[int]:
        """As in :mod:`subprocess`: None while it lives, negative if a signal ended it."""
        return self._process.poll()

    def wait(self, timeout: float) -> Optional[int]:
        """The return code; None if the process has not ended after *timeout* seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def log_tail(self, lines: int = 20) -> str:
        """The log's last *lines* lines."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - _TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def wait_for_socket(self, path: str, timeout: float, ready_file: Optional[str] = None) -> None:
        """Return when the child listens on the Unix socket *path* (absolute).

        No connection is made: servers count their clients. :meth:`stop` removes the socket's file.

        :param timeout: seconds.
        :param ready_file: for a server that listens before it can serve: a file that it writes when it can. Removed
            as well.
        :raises DataPathError: the child ended, or does not listen in time.
        """
        self._files += [path] if ready_file is None else [path, ready_file]
        deadline = time.monotonic() + timeout
        while not (_listening(path) and (ready_file is None or os.path.exists(ready_file))):
            if not self.alive:
                raise DataPathError(
                    "A server ended before it could serve",
                    subject=self.name,
                    reason=self.log_tail() or f"exit status {self.returncode}",
                    details={"log": self.log_path},
                )
            if time.monotonic() > deadline:
                raise DataPathError(
                    "A server does not listen in time",
                    subject=self.name,
                    reason=f"not ready after {timeout:g} s; its log ends with: {self.log_tail() or 'nothing'}",
                    retryable=True,
                    details={"log": self.log_path},
                )
            time.sleep(_POLL_SECONDS)

    def stop(self, timeout: float = 10.0) -> int:
        """End the child: SIGTERM, after *timeout* seconds SIGKILL; no socket file stays. Returns the return code.

        nbdkit goes on after SIGTERM while a client is connected (VADP facts 45): disconnect first.
        """
        if self.alive:
            _signal_group(self._process, signal.SIGTERM)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                _signal_group(self._process, signal.SIGKILL)
        returncode = self._process.wait()
        for path in self._files:
            with contextlib.suppress(FileNotFoundError):  # the server may remove it itself
                os.unlink(path)
        return returncode


def start_time(pid: int) -> Optional[int]:
    """When a process started, in clock ticks since boot; with the pid that names one process of a boot for good.

    None if there is no such process, or only the entry of one that has ended.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            # Behind the name in parentheses, which may hold spaces: the state, and as field 22 the start time.
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _listening(path: str) -> bool:
    """Somebody listens on the Unix socket *path*: the kernel says so, the file alone does not."""
    if not os.path.exists(path):
        return False
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as sockets:
        return listens(sockets, path)


def listens(sockets: Iterable[str], path: str) -> bool:
    """A line of *sockets*, the lines of ``/proc/net/unix``, says that somebody listens on *path* (absolute)."""
    for line in sockets:
        # Num RefCount Protocol Flags Type St Inode Path; flag 0x10000 is "accepts connections". The inode is padded
        # with spaces to five digits: a machine that has just booted has smaller ones.
        fields = line.rstrip("\n").split(None, 7)
        if len(fields) == 8 and fields[7] == path and fields[3] == "00010000":
            return True
    return False


class ToolResult(NamedTuple):
    """How a tool ended."""

    returncode: int
    stdout: str
    stderr: str


def tool_result(
    argv: Sequence[str],
    *,
    what: str,
    subject: Optional[str] = None,
    timeout: Optional[float] = None,
    accept: Tuple[int, ...] = (0,),
    on_output: Optional[Callable[[bytes], None]] = None,
    pass_fds: Sequence[int] = (),
) -> ToolResult:
    """Run a tool to its end. It dies with the calling thread.

    :param what: what fails if the tool does ("The image could not be converted").
    :param subject: the object it works on.
    :param timeout: seconds; then it is killed.
    :param accept: exit statuses that are not failures.
    :param on_output: called with each piece of standard output as it comes; ``stdout`` of the result is then empty.
    :param pass_fds: file descriptors that it inherits under the same numbers.
    :raises DataPathError: with the tool's last words.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    # In memory: a crash must not leave a file.
    with open(os.memfd_create("stderr"), "w+b") as stderr, open(os.memfd_create("stdout"), "w+b") as stdout:
        output = stdout if on_output is None else subprocess.PIPE
        process = _spawn(argv, stdout=output, stderr=stderr, pass_fds=tuple(pass_fds))
        try:
            if on_output is not None and process.stdout is not None:
                for piece in _pieces(process.stdout.fileno(), deadline):
                    on_output(piece)
            process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise DataPathError(
                what, subject=subject, reason=f"{argv[0]} did not end within {timeout:g} s", retryable=True
            ) from None
        finally:
            if process.poll() is None:
                _signal_group(process, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    result = ToolResult(process.returncode, texts[0], texts[1])
    if result.returncode not in accept:
        words = (result.stderr.strip() or result.stdout.strip()).splitlines()[-5:]
        reason = " ".join(words) or _ending(result.returncode)
        raise DataPathError(what, subject=subject, reason=reason, details={"returncode": result.returncode})
    return result


def _pieces(fd: int, deadline: Optional[float]) -> Iterator[bytes]:
    """What comes out of a pipe, until its end or the deadline."""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([fd], [], [], wait)[0]:
            return
        piece = os.read(fd, 4096)
        if not piece:
            return
        yield piece


def _ending(returncode: int) -> str:
    return f"exit status {returncode}" if returncode >= 0 else f"killed by signal {-returncode}"


def run_tool(argv: Sequence[str], *, what: str, subject: Optional[str] = None, timeout: Optional[float] = None) -> str:
    """Run a tool that must succeed and return its standard output. See :func:`tool_result`."""
    return tool_result(argv, what=what, subject=subject, timeout=timeout).stdout
