# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Starts modules, each in a process of its own, without the half second that the imports take.

A process that has imported what modules need forks for each of them. Requests and answers are JSON lines:
``{"module", "arguments": file, "environment": {}, "out": file, "err": file}`` is answered by ``{"pid"}``, and
``{"pid"}`` by ``{"status"}``: the exit code, negative for a signal, null as long as it runs.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
from typing import Any, Dict, Optional

MODULES = "ansible_collections.openvadp.backup.plugins.modules."


def start(request: Dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
        sys.argv = [request["module"], request["arguments"]]
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        runpy.run_module(MODULES + request["module"], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  it must not come back to the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(pid: int) -> Optional[int]:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def warm_up() -> None:
    import ansible.module_utils.basic  # noqa: F401, PLC0415
    import ansible_collections.openvadp.backup.plugins.module_utils.backup.recover  # noqa: F401
    import ansible_collections.openvadp.backup.plugins.module_utils.repository.verify  # noqa: F401
    import ansible_collections.openvadp.backup.plugins.module_utils.restore.in_place  # noqa: F401
    import ansible_collections.openvadp.backup.plugins.module_utils.runner  # noqa: F401


def main() -> None:
    warm_up()
    for line in sys.stdin:
        request: Dict[str, Any] = json.loads(line)
        answer = {"status": status_of(request["pid"])} if "pid" in request else {"pid": start(request)}
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
