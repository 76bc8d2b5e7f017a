# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Any file of a repository may be anything: another type, another size, other content.

Whatever reads a repository ends within 10 s, with what it is there for or with a VadpError that can be printed; and it
touches nothing outside: no file beside the repository changes, a restore leaves nothing but images that hold the
point's bytes, and who only reads changes nothing in the repository either.

Most cases go through the functions that the modules call; of so many one goes through the module itself, or through a
backup, a recovery or a restore against the simulator.

SOAK_FUZZ: how many cases (40). SOAK_SEED: which (1). SOAK_FUZZ_ONLY: the number of one case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import hash_file
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import journal, manifest, trust
from ansible_collections.openvadp.backup.plugins.module_utils.repository.half_written import half_written
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.report import describe_points, verify
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import Run, new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.shapes import to_json
from ansible_collections.openvadp.backup.plugins.module_utils.restore import serve, to_file
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.request import FilesRequest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.run import restore_files
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest
from ansible_collections.openvadp.backup.plugins.module_utils.shown import shown_deep
from world import Machine, World

CASES = int(os.environ.get("SOAK_FUZZ", "40"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
ONLY = os.environ.get("SOAK_FUZZ_ONLY")

#: The promise. What has to wait for others on a busy machine is tried once more, with more time: a hang has no end.
LIMIT_SECONDS = 10.0
BUSY_SECONDS = 60.0
LIMIT_BYTES = 1 << 30
RUN_ID = "0123456789abcdef0123456789abcdef"

# Of so many cases one is tried by what takes longer.
SHARES = {"structure": 3, "data": 12, "restore": 8, "serve": 40, "files": 25, "module": 30, "simulator": 50}


class Hung(BaseException):
    """No VadpError, and nothing that is handled anywhere."""


@contextlib.contextmanager
def ends_in_time(seconds: float) -> Iterator[None]:
    def hung(*_args: Any) -> None:
        raise Hung(f"it did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, hung)
    faulthandler.dump_traceback_later(seconds + BUSY_SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


# What happens to a repository


def odd_value(source: random.Random) -> Any:
    """Something that no document expects, or nearly what it does."""
    return source.choice(
        [
            None, True, False, 0, -1, 1, 511, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -1.5, 1e300,
            "", "x", "\0", "../../../etc/passwd", "/etc/passwd", "json:{}", "nbd:localhost:1", "p1", "monday", "latest",
            "x" * 100_000, "\x1b[2J\u202e", "9" * 40, "2026-11-22T08:42:03Z", "2026-13-99T99:99:99Z", "\ud800",
            [], {}, [[]], [None], {"": None}, [1] * 1000, {"key": 2000}, "0" * 64, "f" * 64,
        ]
    )  # fmt: skip


def change_value(document: Any, source: random.Random) -> Any:
    """The document with one of its values, names or elements changed."""
    if source.random() < 0.2 or not isinstance(document, (dict, list)) or not document:
        return odd_value(source)
    if isinstance(document, list):
        index = source.randrange(len(document))
        how = source.randrange(4)
        if how == 0:
            return document[:index] + document[index + 1 :]
        if how == 1:
            return document + [document[index]]
        return [change_value(item, source) if number == index else item for number, item in enumerate(document)]
    name = source.choice(sorted(document))
    how = source.randrange(6)
    if how == 0:
        return {key: item for key, item in document.items() if key != name}
    if how == 1:
        return dict(document, **{str(odd_value(source))[:50]: odd_value(source)})
    return dict(document, **{name: change_value(document[name], source)})


def sealed(document: Any, source: random.Random) -> bytes:
    """As a program writes it that knows the format and means harm: with the right hash."""
    if isinstance(document, dict) and "manifest_blake3" in document and source.random() < 0.7:
        with contextlib.suppress(ValueError, TypeError):
            document["manifest_blake3"] = manifest._hash(document)
    try:
        return to_json(document)
    except (ValueError, TypeError):
        return json.dumps(document).encode("ascii")


def change_content(path: Path, source: random.Random) -> str:
    data = bytearray(path.read_bytes())
    how = source.choice(["document", "document", "document", "bytes", "text", "nested", "digits", "header", "lines"])
    if how == "document" and path.suffix in (".json",):
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):  # it was changed before
            document = None
        for _count in range(source.choice([1, 1, 1, 2, 5])):
            document = change_value(document, source)
        path.write_bytes(sealed(document, source))
    elif how == "header" and data[:4] == b"QFI\xfb":
        offset = source.choice([4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104, 112, 120])
        value = source.choice([0, 1, 2, 3, 8, 104, 2**16, 2**31, 2**32 - 1, len(data), 2**62, 2**63, 2**64 - 1])
        width = source.choice([4, 8])
        data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, "big")
        path.write_bytes(data)
    elif how == "lines" and b"\n" in data:
        lines = bytes(data).split(b"\n")
        index = source.randrange(len(lines))
        with contextlib.suppress(ValueError, RecursionError):
            lines[index] = json.dumps(change_value(json.loads(lines[index]), source)).encode("ascii")
        path.write_bytes(b"\n".join(lines))
    elif how == "text":
        path.write_bytes(source.choice([b"", b"\n", b"null", b"[]", b"{}", b"\xff\xfe", b'"\\ud800"', b"NaN", b"1"]))
    elif how == "nested":
        path.write_bytes(source.choice([b"[", b'{"a":']) * 200_000)
    elif how == "digits":
        path.write_bytes(b'{"format": ' + b"9" * 2_000_000 + b"}")
    else:
        for _count in range(source.choice([1, 1, 8, 64])):
            if data:
                data[source.randrange(len(data))] = source.randrange(256)
        path.write_bytes(data)
    return how


def change_size(path: Path, source: random.Random) -> str:
    size = path.stat().st_size
    wanted = source.choice([0, 1, size // 2, max(0, size - 1), size + 1, 2 * size, 1 << 30, 6 << 30, 1 << 40])
    os.truncate(path, wanted)
    return f"{wanted} bytes"


def change_type(path: Path, outside: Path, source: random.Random) -> str:
    how = source.choice(
        ["absent", "pipe", "socket", "folder", "link", "link in", "link dead", "link self", "zero", "full", "tty",
         "writable", "unreadable", "hard link", "empty"]
    )  # fmt: skip
    if how in ("writable", "unreadable"):
        path.chmod(0o666 if how == "writable" else 0)
        return how
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        bind(path)
    elif how == "folder":
        path.mkdir()
        (path / path.name).touch()
    elif how == "link":
        path.symlink_to(source.choice([outside / "secret", outside, Path("/etc/passwd"), Path("/proc/self/mem")]))
    elif how == "link in" and others:
        path.symlink_to(source.choice(others).name)
    elif how == "link dead":
        path.symlink_to(outside / "made by a link")
    elif how == "link self":
        path.symlink_to(path.name)
    elif how in ("zero", "full", "tty"):
        path.symlink_to(f"/dev/{how}")
    elif how == "hard link" and others:
        os.link(source.choice(others), path)
    elif how == "empty":
        path.touch()
    return how


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(path.parent)
            with contextlib.suppress(OSError):  # a name may be too long for a socket's
                sock.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


def change_folder(repository: Path, outside: Path, source: random.Random) -> str:
    folders = sorted(path for path in repository.rglob("*") if path.is_dir() and not path.is_symlink())
    if not folders:
        return "nothing is left"
    folder = source.choice(folders)
    how = source.choice(["absent", "file", "pipe", "link", "link in", "writable", "names", "names", "names"])
    if how == "names":
        for _count in range(source.choice([1, 3, 200])):
            name = source.choice(
                [b"\xff\xfe.json", b"a\nb.json", b"x" * 250 + b".json", b"zz.json", b"-rf", b"zz.qcow2", b"zz.hashes",
                 RUN_ID.encode() + b".json", b"disk-99", b"disk-2000.json", b"4064b84d-3f5f-5e5c-9ef7-716ddba78eb4",
                 b"x.part-1", b"lock", b"latest.json", b"%d.json" % source.randrange(1000)]
            )  # fmt: skip
            path = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))
            if not os.path.lexists(path):
                make = source.choice([Path.touch, Path.mkdir, os.mkfifo, lambda at: at.write_bytes(b"{}")])
                make(path)
        return f"{how} in {folder.name}"
    if how == "writable":
        folder.chmod(0o777)
        return f"{how} {folder.name}"
    away = outside / "moved"
    shutil.copytree(folder, away, symlinks=True, ignore=lambda at, names: [n for n in names if odd(Path(at) / n)])
    shutil.rmtree(folder)
    if how == "file":
        folder.touch()
    elif how == "pipe":
        os.mkfifo(folder)
    elif how == "link":
        folder.symlink_to(away)
    elif how == "link in":
        folder.symlink_to(repository if source.random() < 0.5 else Path(folder.name))
    return f"{how} {folder.name}"


def odd(path: Path) -> bool:
    """Whether a copy of it would hang, or fill the disk."""
    status = path.lstat()
    return not stat.S_ISDIR(status.st_mode) and not (stat.S_ISREG(status.st_mode) and status.st_size < 1 << 28)


def mutate(repository: Path, outside: Path, source: random.Random) -> List[str]:
    done = []
    for _count in range(source.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in repository.rglob("*") if path.is_file() and not path.is_symlink())
        # As many of each kind: there are more layers than trust.json.
        kinds = sorted({(path.parent.name, path.suffix) for path in files})
        if not kinds or source.random() < 0.12:
            with contextlib.suppress(FileExistsError):
                done.append(change_folder(repository, outside, source))
            continue
        # Few read what a boot has shown.
        kind = source.choice([kind for kind in kinds if kind[0] != "boots" or source.random() < 0.2] or kinds)
        path = source.choice([path for path in files if (path.parent.name, path.suffix) == kind])
        how = source.choice(["content", "content", "content", "type", "size"])
        with contextlib.suppress(PermissionError):
            if how == "content" and path.stat().st_size < 64 << 20:
                said = change_content(path, source)
            elif how == "size":
                said = change_size(path, source)
            else:
                said = change_type(path, outside, source)
            done.append(f"{path.relative_to(repository)}: {how}: {said}")
    if source.random() < 0.3 and register(repository):
        done.append("and all is registered again")
    return done


def register(repository: Path) -> bool:
    """The manifests tell the files as they are now: of somebody who knows the format and means harm."""
    changed = False
    for path in sorted(repository.glob("vms/*/points/*.json")):
        # What can't be registered stays as it is.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, VadpError):
            if path.stat().st_size > 1 << 20 or not stat.S_ISREG(path.lstat().st_mode):
                continue
            document = json.loads(path.read_bytes())
            store = path.parent.parent
            entries = [(store / "configs", document["configuration"]), (store / "configs", document["nvram"])]
            for disk in document["disks"]:
                entries += [(store / f"disk-{disk['key']}", disk[name]) for name in ("layer", "hashes")]
            for folder, entry in entries:
                file = folder / entry["file"]
                if stat.S_ISREG(file.lstat().st_mode) and file.stat().st_size < 64 << 20:
                    entry.update(size_bytes=file.stat().st_size, blake3=hash_file(str(file)))
            document["manifest_blake3"] = manifest._hash(document)
            path.write_bytes(to_json(document))
            changed = True
    return changed


# What reads it


class Reader:
    """All that reads a repository, for one case."""

    def __init__(self, machine: Machine, repository: Path, dest: Path, folder: Path, source: random.Random) -> None:
        self.machine = machine
        self.repository = repository
        self.dest = dest
        self.folder = folder
        self.source = source
        self.point = source.choice([*machine.points, "latest"])

    @property
    def where(self) -> Dict[str, Any]:
        return {"repository": str(self.repository), "vm_uuid": self.machine.uuid}

    def store(self) -> Any:
        return Repository.open(str(self.repository)).vm(self.machine.uuid)

    # Quick ones

    def info(self) -> Any:
        return describe_points(Repository.open(str(self.repository)), manifests=True)

    def by_name(self) -> Any:
        return Repository.open(str(self.repository)).find_vm(vm_name=self.machine.name).shown

    def chain(self) -> Any:
        return list(self.store().chain_facts().problems.values())

    def runs(self) -> Any:
        return [run.intents() for run in self.store().runs()]

    def half_written(self) -> Any:
        return half_written(Repository.open(str(self.repository)), self.machine.uuid)

    def marks(self) -> Any:
        return trust.marks(self.store())

    def journal(self) -> Any:
        of = journal_of(self.machine)
        found = journal.read(Run(self.store().path / "runs" / f"{RUN_ID}.json", {"run_id": RUN_ID}), of)
        return None if found is None else len(found)

    def leftovers(self) -> Any:
        store = self.store()
        return [str(path) for path in store.part_files() + store.boot_part_files() + store.uncommitted_files()]

    def lock(self) -> Any:
        with self.store().lock(new_run_id(), "test"):
            return None

    # Slower ones

    def structure(self) -> Any:
        return verify(self.store(), self.point, "structure")

    def data(self) -> Any:
        return verify(self.store(), self.point, "data")

    def restore(self) -> Any:
        image_format = self.source.choice(["raw", "raw", "qcow2", "vmdk", "ova"])
        request = RestoreRequest(**self.where, point=self.point, dest=str(self.dest), format=image_format)
        return to_file.restore_point(request, check_mode=self.source.random() < 0.3)

    def serve(self) -> Any:
        sockets = self.folder / "sockets"
        sockets.mkdir()
        request = serve.ServeRequest(**self.where, point=self.point, socket_dir=str(sockets), timeout=20)
        try:
            return serve.serve_point(request, False)
        finally:
            serve.serve_point(replace(request, state=serve.ABSENT), False)
            shutil.rmtree(sockets)

    def files(self) -> Any:
        request = FilesRequest(
            str(self.repository), ("/**",), self.machine.uuid, point=self.point, list_only=True, reader="dissect"
        )
        return restore_files(request, check_mode=True)

    def module(self) -> Any:
        """A module as Ansible runs it: a result in one line of JSON, and no traceback."""
        name, options = self.source.choice(
            [
                ("restore_point_info", {"manifests": True}),
                ("restore_point_verify", {"point": self.point}),
                ("vadp_disk_restore", {"target": "file", "dest": str(self.dest), "point": self.point}),
                ("vadp_file_restore", {"paths": ["/**"], "list": True, "point": self.point}),
            ]
        )
        code = (
            "import json, sys\n"
            "from ansible.module_utils.testing import patch_module_args\n"
            "import importlib\n"
            "module = importlib.import_module('ansible_collections.openvadp.backup.plugins.modules.' + sys.argv[1])\n"
            "with patch_module_args(json.loads(sys.argv[2])):\n    module.main()\n"
        )
        command = [sys.executable, "-c", code, name, json.dumps({**self.where, **options})]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if "Traceback" in done.stderr or not done.stdout.strip().startswith("{"):
            raise AssertionError(f"{name}: {done.stdout[-300:]} {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def simulator(self) -> Any:
        """Those that need a vCenter: a backup, a restore, a recovery."""
        job = replace(self.machine.job, repository=str(self.repository))
        what = self.source.choice(["back_up", "restore_in_place", "recover"])
        if what == "restore_in_place":
            return job.restore_in_place(self.point, verify=False)
        if what == "recover":
            return job.recover()
        return job.back_up(f"fuzz-{self.source.randrange(10**9)}")


QUICK = ["info", "by_name", "chain", "runs", "half_written", "marks", "journal", "leftovers", "lock"]
#: Those that may write to the repository.
WRITING = ("lock", "simulator")


def journal_of(machine: Machine) -> journal.JournalOf:
    known = machine.manifest("monday")
    disk = known["disks"][2000]
    capacity = disk["capacity_bytes"]
    return journal.JournalOf(machine.uuid, 2000, disk["uuid"], capacity, "monday", known["manifest_blake3"])


@pytest.fixture(scope="module")
def machine(world: World) -> Iterator[Machine]:
    """A machine with three points, a mark, a run that is not over with its journal, and evidence of a boot."""
    made = world.new_machine()
    for number, (point, mode) in enumerate(
        [("sunday", "full"), ("monday", "incremental"), ("tuesday", "differential")]
    ):
        made.scribble(number, areas=4)
        made.job.back_up(point, mode)
        made.points[point] = made.content()
    store = made.job.store
    with store.lock(RUN_ID, "test"):
        trust.mark(store, 2000, "for a test", uuid=None, change_id="52 de c0/1")
        run = store.create_run(None, made.moid, made.name, RUN_ID)
        run.record("restore", vm_uuid=made.uuid, point="monday", half_written=[2000])
        (store.path / "runs" / f"{RUN_ID}.2000.journal").write_bytes(b'{"format": 1}\n[0,512]\n{"blake3": ""}\n')
    with store.boot_lock(RUN_ID):
        store.keep_evidence("monday", b"\x89PNG", b"login:")
    made.power("poweredOff")
    yield made  # it goes with its world


def tree(folder: Path) -> Dict[str, Tuple[Any, ...]]:
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (
            status.st_mode,
            status.st_ino,
            status.st_size if not path.is_dir() else 0,
            status.st_mtime_ns,
        )
    return found


class Case:
    """One case: a copy of the repository, what was done to it, and what became of everything that reads it."""

    def __init__(self, number: int, machine: Machine, folder: Path) -> None:
        self.number = number
        self.machine = machine
        self.folder = folder
        self.source = random.Random(f"{SEED}/{number}")
        self.outcomes: List[str] = []

    def run(self) -> List[str]:
        """What is wrong."""
        repository, outside, dest = (self.folder / name for name in ("r", "outside", "dest"))
        shutil.copytree(self.machine.repository, repository)
        outside.mkdir()
        dest.mkdir()
        (outside / "secret").write_bytes(b"secret")
        done = mutate(repository, outside, self.source)
        reader = Reader(self.machine, repository, dest, self.folder, self.source)
        names = list(QUICK) + [name for name, share in SHARES.items() if self.number % share == 0]
        wrong = []
        for name in names:
            problem = self.read(reader, name, repository, outside, dest)
            if problem is not None:
                wrong.append(f"case {self.number} ({'; '.join(done)}): {name}: {problem}")
        return wrong

    def read(self, reader: Reader, name: str, repository: Path, outside: Path, dest: Path) -> Optional[str]:
        before, inside = tree(outside), tree(repository)
        state = reader.source.getstate()
        result, problem = self.call(getattr(reader, name))
        if problem is not None and "did not end within" in problem:
            reader.source.setstate(state)
            result, problem = self.call(getattr(reader, name), BUSY_SECONDS)
        if problem is not None:
            return problem
        if tree(outside) != before:
            return f"it touched what lies outside: {sorted(tree(outside).items() ^ before.items())}"
        if name not in WRITING and tree(repository) != inside:
            return f"it changed the repository: {sorted(tree(repository).items() ^ inside.items())[:4]}"
        return self.check_dest(dest, result)

    def call(self, function: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> Tuple[Any, Optional[str]]:
        try:
            with ends_in_time(seconds):
                result = function()
            self.outcomes.append("done")
        except VadpError as error:
            result = [str(error), error.to_result()]
            self.outcomes.append("refused")
        except (Exception, Hung) as error:  # noqa: BLE001  whatever it is, it is reported
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            at = "" if where is None else f" at {where.tb_frame.f_code.co_filename}:{where.tb_lineno}"
            return None, f"{type(error).__name__}: {str(error)[:1500]}{at}"
        try:
            text = json.dumps(shown_deep(result), ensure_ascii=False, default=str)
            text.encode("utf-8")
        except ValueError as error:
            return None, f"the result can't be determined: {error}"
        if re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text):
            return None, f"the result would move the cursor: {text[:300]!r}"
        return result, None

    def check_dest(self, dest: Path, result: Any) -> Optional[str]:
        """Images, for their owner alone, or nothing."""
        targets = set()
        if isinstance(result, dict):
            targets = {os.path.basename(str(entry["target"])) for entry in result.get("restored", ())}
        for path in dest.iterdir():
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
                return f"it left {path.name}, mode {status.st_mode:o}"
            if targets and path.name not in targets:
                return f"it left {path.name}, not one of {targets}"
            path.unlink()
        return None


@pytest.mark.timeout(0)
def test_whatever_lies_in_a_repository(machine: Machine, report: Callable[[str], None], tmp_path: Path) -> None:
    numbers = [int(ONLY)] if ONLY else range(CASES)
    wrong: List[str] = []
    outcomes: List[str] = []
    begun = time.monotonic()
    for number in numbers:
        folder = machine.folder / "case"
        folder.mkdir()
        case = Case(number, machine, folder)
        try:
            found = case.run()
        except Exception as error:  # noqa: BLE001  of the fuzzer itself
            found = [f"case {number}: {type(error).__name__} in the test: {error}"]
        finally:
            outcomes += case.outcomes
            subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(folder)
        for problem in found:
            print(problem, flush=True)
        wrong += found
        if len(wrong) > 20:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("done", "refused"))
    seconds = time.monotonic() - begun
    report(f"fuzz: {len(list(numbers))} cases, {counts}, peak {peak >> 20} MiB, {seconds:.0f} s (seed {SEED})")
    assert not wrong, "\n".join(wrong)
    assert peak < LIMIT_BYTES
    # Neither is everything refused, nor nothing.
    assert ONLY or (outcomes.count("done") > len(outcomes) // 5 and outcomes.count("refused") > len(outcomes) // 20)
