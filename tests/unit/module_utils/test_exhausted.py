# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A machine that has no more of something, and paths that are no text: errors that say so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils import exhausted
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, VadpError

ROOT = Path(exhausted.__file__).parents[5]
BEGIN = (
    "import contextlib, json, os, resource, signal, sys, threading\n"
    "from ansible.module_utils.testing import patch_module_args\n"
    "from ansible_collections.openvadp.backup.plugins.module_utils.runner import Options, run_module\n"
    "from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "options = Options(dict(path=dict(type='path'), names=dict(type='list', elements='str')))\n"
)


def run(body: str, limits: str = "", **options: Any) -> Dict[str, Any]:
    """What a module says whose work is *body*, under *limits*."""
    code = (
        BEGIN
        + f"def body(module):\n    {limits}\n    {body}\n"
        + f"with patch_module_args(json.loads({json.dumps(options)!r})):\n    run_module(options, body)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().startswith("{"), done.stderr
    result: Dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("body", "limits", "message"),
    [
        (
            "[threading.Thread(target=threading.Event().wait, daemon=True).start() for _n in range(4000)]",
            "resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))",
            "No thread could be started.*ulimit -v",
        ),
        (
            "bytes(4 << 30)",
            "resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))",
            "not enough memory.*ulimit -v",
        ),
        (
            "with contextlib.ExitStack() as stack:\n        while True: stack.enter_context(open('/dev/null'))",
            "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))",
            "open files.*ulimit -n",
        ),
        ("open('/dev/full', 'w', 1).write('x\\n')", "", "No space left"),
        (
            "RuntimeDir('x')",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))",
            "No folder for sockets.*File too large.*some room",
        ),
    ],
)
def test_what_is_exhausted_is_said(body: str, limits: str, message: str) -> None:
    import re

    result = run(body, limits)
    assert result["failed"] and re.search(message, result["msg"]), result
    assert result["error"]["remedy"]


def test_no_defect_is_told_as_something_else() -> None:
    for error in (RuntimeError("no"), OSError(errno.EBADF, "bad"), ValueError("x")):
        with pytest.raises(type(error)), exhausted.told_as_errors():
            raise error
    with pytest.raises(InputError), exhausted.told_as_errors():
        raise InputError("x")
    with pytest.raises(VadpError, match="/x/y: Input/output error"), exhausted.told_as_errors():
        raise OSError(errno.EIO, "Input/output error", "/x/y")


def test_a_full_folder_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ansible_collections.openvadp.backup.plugins.module_utils.datapath import processes

    full = tmp_path / "full"
    other = tmp_path / "other"
    for folder in (full, other):
        folder.mkdir()
    real = os.write
    monkeypatch.setattr(processes, "_PATH_LIMIT", 500)
    monkeypatch.setattr(processes.RuntimeDir, "_bases", staticmethod(lambda: [str(full), str(other)]))

    def write(descriptor: int, data: Any) -> int:
        if str(full) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(processes.os, "write", write)
    with processes.RuntimeDir("run") as made:
        assert os.path.dirname(made.path) == str(other) and os.listdir(made.path) == []
    assert os.listdir(full) == os.listdir(other) == []


@pytest.mark.parametrize("options", [{"path": "/r\udcff\udcfe"}, {"names": ["x", "\udcff"]}])
def test_a_path_that_is_no_text_is_refused(options: Dict[str, Any]) -> None:
    result = run("return dict(changed=False)", **options)
    assert result["failed"] and "not UTF-8" in result["msg"] and "\\xff" in result["msg"], result
