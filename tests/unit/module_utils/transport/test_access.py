# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The process that makes an access call, with a small library in place of VDDK; the double has end-to-end tests."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import access, access_process
from ansible_collections.openvadp.backup.plugins.module_utils.transport.access import check_identity, run_access
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import Vddk

PASSWORD = "s3cret/\u00e4"
LONG = 60

LIBRARY = r"""
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef void (*Log) (const char *, va_list);
static Log log_function;
static char params[128];
static void say (const char *format, ...)
{
  va_list list;
  va_start (list, format);
  log_function (format, list);
  va_end (list);
}
uint64_t VixDiskLib_InitEx (uint32_t major, uint32_t minor, Log log, Log warn, Log panic, const char *dir,
                            const char *config)
{
  char line[200] = "";
  FILE *file = fopen (config, "r");
  log_function = log;
  if (file == NULL || fgets (line, sizeof line, file) == NULL) return 4;
  say ("config %s", line);
  return 0;
}
void *VixDiskLib_AllocateConnectParams (void) { return params; }
const char *VixDiskLib_GetErrorText (uint64_t error, const char *locale) { return "the library's words"; }
uint64_t VixDiskLib_PrepareForAccess (void *p, const char *identity)
{
  char **fields = p;
  say ("%s %s %s %d %s %s %u", identity, fields[0], fields[1], *(int *) (params + 32), fields[5], fields[6],
       *(uint32_t *) (params + 64));
  say ("ssl: %s", getenv ("LD_LIBRARY_PATH"));
  if (strcmp (identity, "hang") == 0) { printf ("\n"); pause (); }
  if (strcmp (identity, "crash") == 0) abort ();
  if (strcmp (identity, "refused") == 0) return 0x1234000000000000 | 16064;
  if (strcmp (identity, "unknown") == 0) return 29999;
  if (strcmp (identity, "high") == 0) return 0x1234000000000000;
  return 0;
}
uint64_t VixDiskLib_EndAccess (void *p, const char *identity) { return 0; }
uint64_t VixDiskLib_Cleanup (void *p, uint32_t *cleaned, uint32_t *remaining)
{
  *cleaned = *(char **) p == NULL ? 3 : 0;
  *remaining = 1;
  return 0;
}
"""


@pytest.fixture(scope="module")
def vddk(tmp_path_factory: pytest.TempPathFactory) -> Vddk:
    """A folder with a library of VDDK's interface."""
    folder = tmp_path_factory.mktemp("vddk")
    (folder / "lib64").mkdir()
    (folder / "library.c").write_text(LIBRARY)
    out = folder / "lib64" / "libvixDiskLib.so.8"
    command = ["gcc", "-shared", "-fPIC", "-w", "-o", str(out), str(folder / "library.c")]
    subprocess.run(command, check=True)
    return Vddk(str(folder), "8", "1.42")


@pytest.fixture
def session() -> Any:
    connection = SimpleNamespace(hostname="vc.example.com", port=443, username="backup", password=PASSWORD)
    return SimpleNamespace(connection=connection, is_vcenter=True, thumbprints={"sha1": "AA:BB", "sha256": "CC:DD"})


VM: Any = SimpleNamespace(moid="vm-16")


def failure(session: Any, vddk: Vddk, identity: str, **options: Any) -> TransportError:
    with pytest.raises(TransportError) as caught:
        run_access("prepare", session, VM, vddk, identity, **options)
    assert PASSWORD not in str(caught.value)
    return caught.value


def test_the_structure_is_that_of_the_interface() -> None:
    """VADP facts, the C ABI."""
    params = access_process.ConnectParams
    offsets = {name: getattr(params, name).offset for name, _kind in params._fields_}
    assert {name: offsets[name] for name in ("vmxSpec", "serverName", "thumbPrint", "credType", "userName")} == {
        "vmxSpec": 0,
        "serverName": 8,
        "thumbPrint": 16,
        "credType": 32,
        "userName": 40,
    }
    assert (offsets["password"], offsets["port"], offsets["nfcHostPort"], offsets["specType"]) == (48, 64, 68, 120)
    assert access_process.ctypes.sizeof(params) == 128


def test_the_process_has_no_ssl(vddk: Vddk) -> None:
    script = inspect.getsource(access_process).replace('if __name__ == "__main__":', "if False:")
    script += "\nprint([name for name in ('ssl', '_ssl', 'hashlib', 'site') if name in sys.modules])\n"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_call_that_succeeds(vddk: Vddk, session: Any) -> None:
    before = set(os.listdir("/proc/self/fd"))
    assert run_access("prepare", session, VM, vddk, "me") == access.AccessResult(0, 0)
    assert run_access("end", session, VM, vddk, "me") == access.AccessResult(0, 0)
    assert run_access("cleanup", session, None, vddk) == access.AccessResult(3, 1)
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_the_library_gets_and_logs(vddk: Vddk, session: Any) -> None:
    """The log says what it was given; a test's password is in it, a real library's log has none."""
    session.connection.password = "open"
    with pytest.raises(TransportError) as caught:
        run_access("prepare", session, VM, vddk, "unknown")
    log = caught.value.details["log"]
    assert 'config tmpDirectory="/var/tmp/openvadp-vddk' in log[0]
    assert log[1] == "unknown moref=vm-16 vc.example.com 1 backup open 443"
    assert log[2] == f"ssl: {vddk.libdir}/lib64"


@pytest.mark.parametrize(
    ("identity", "code", "words"),
    [
        ("refused", 16064, "Global.DisableMethods"),
        ("unknown", 29999, "the library's words"),
        ("high", 1, "without saying why"),
    ],
)
def test_a_refusal_is_explained(vddk: Vddk, session: Any, identity: str, code: int, words: str) -> None:
    error = failure(session, vddk, identity)
    assert error.details["code"] == code and words in str(error), error


def test_a_library_that_crashes_or_hangs_harms_nobody(vddk: Vddk, session: Any) -> None:
    assert "no answer" in str(failure(session, vddk, "crash"))
    began = time.monotonic()
    error = failure(session, vddk, "hang", timeout=1)
    assert "within 1 s" in str(error) and error.retryable and "code" not in error.details
    assert time.monotonic() - began < LONG


def test_a_library_that_is_none(tmp_path: Path, session: Any) -> None:
    (tmp_path / "lib64").mkdir()
    library = Vddk(str(tmp_path), "8", "1.42")
    assert "no libvixDiskLib.so.*" in str(failure(session, library, "me"))
    (tmp_path / "lib64" / "libvixDiskLib.so.7").write_text("text")
    assert "libvixDiskLib.so.7" in str(failure(session, library, "me"))


def test_an_esxi_host_moves_nothing(vddk: Vddk, session: Any) -> None:
    session.is_vcenter = False
    assert "ESXi host" in str(failure(session, vddk, "me"))


@pytest.mark.parametrize("identity", ["", "x" * 51, "\u00e4" * 26, "a\nb"])
def test_an_identity_that_is_none(identity: str) -> None:
    with pytest.raises(InputError):
        check_identity(identity)
    assert check_identity("x" * 50) == "x" * 50


PARENT = """
import sys
from types import SimpleNamespace as N
from ansible_collections.openvadp.backup.plugins.module_utils.transport.access import run_access
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import Vddk
connection = N(hostname="vc", port=443, username="u", password=sys.stdin.readline())
session = N(connection=connection, is_vcenter=True, thumbprints={"sha1": "AA", "sha256": "BB"})
run_access("prepare", session, N(moid="vm-16"), Vddk(sys.argv[1], "8", "1"), "hang")
"""


def _children(pid: int) -> List[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_process_dies_with_ours_and_shows_no_password(vddk: Vddk) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, vddk.libdir], stdin=subprocess.PIPE, text=True)
    try:
        assert parent.stdin is not None
        parent.stdin.write("hidden0ne")
        parent.stdin.close()
        deadline = time.monotonic() + LONG
        shown: Dict[int, str] = {}
        while not shown:
            assert parent.poll() is None and time.monotonic() < deadline
            for child in _children(parent.pid):
                text = Path(f"/proc/{child}/cmdline").read_text() + Path(f"/proc/{child}/environ").read_text()
                if "access_process" in text or "VixDiskLib" in text:
                    shown[child] = text
            threading.Event().wait(0.02)
        assert all("hidden0ne" not in text for text in shown.values())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(LONG)
        while any(Path(f"/proc/{child}/cmdline").exists() and _alive(child) for child in shown):
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)
    finally:
        parent.kill()
        parent.wait(LONG)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
