# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The double's modes san and hotadd, behind the real nbdkit vddk plugin, and its Cleanup."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from pyVim.task import WaitForTask
from pyVmomi import vim

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_vixdisklib import Lab, extents, read_all  # noqa: E402

MOIDS = {
    "app01": "vm-101",
    "restore01": "vm-102",
    "shared01": "vm-112",
    "off01": "vm-115",
    "thick01": "vm-116",
    "ide01": "vm-117",
    "crypt01": "vm-118",
    "onvsan01": "vm-119",
    "onvvol01": "vm-120",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("state"), "standard")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(autouse=True)
def as_before(lab: Lab) -> Iterator[None]:
    lab.control.call("nfc", reset_peaks=True)
    yield
    lab.control.call("set_lun", datastore="vmfs01", visible=True)
    lab.control.call("proxy", identity="normal")
    lab.control.call("fill_units", vm="proxy01", leave=None)
    lab.control.call("nfc", clear_faults=True)
    assert lab.control.call("attachments") == []


def opened_at_hosts(lab: Lab) -> int:
    return sum(host["opened"] for host in lab.control.call("nfc")["hosts"].values())


def mode_of(lab: Lab, tmp_path: Path, name: str, transports: str, **options: Any) -> str:
    """The mode that the disk of a VM really gets; the VM's own file, or a snapshot's where the VM runs."""
    vm = lab.vm(name)

    def served(path: str, **more: Any) -> str:
        with lab.serve(tmp_path, path, vm=MOIDS[name], transports=transports, **options, **more) as server:
            server.connect().shutdown()
            return server.text().split("transport mode: ")[1].split("\n")[0]

    if vm.runtime.powerState == "poweredOff":
        disk = next(one for one in vm.config.hardware.device if isinstance(one, vim.vm.device.VirtualDisk))
        return served(disk.backing.fileName)
    with lab.snapshot(name) as (moid, paths):
        return served(next(iter(paths.values())), snapshot=moid)


# --- san ------------------------------------------------------------------------------------------------------------


def test_a_lun_is_read_without_the_hosts(lab: Lab, tmp_path: Path) -> None:
    lab.control.call("guest_write", vm="app01", disk=2000, offset=12345, pattern={"seed": 1, "length": 300_000})
    for name in ("127.0.1.1", "127.0.1.2"):
        lab.control.call("cut_network", host=name)
    try:
        with lab.serve_snapshot(tmp_path, transports="san") as server:
            handle = server.connect()
            held = lab.control.call("read_disk", vm="app01", disk=2000)["sha256"]
            data = read_all(handle)
            assert hashlib.sha256(data).hexdigest() == held
            holes = [(at, length) for at, length, flags in extents(handle) if flags & nbd.STATE_ZERO]
            assert holes and not any(any(data[at : at + length]) for at, length in holes)
            assert lab.control.call("nfc")["local"]["san"]["connections"] == 1
            assert "error:" not in server.text(), "the double found misuse"
            lab.control.call("set_lun", datastore="vmfs01", visible=False)
            with pytest.raises(nbd.Error):
                handle.pread(4096, 0)
            handle.shutdown()
    finally:
        lab.control.call("restore_network")
    text = server.text()
    assert "transport mode: san\n" in text and "Opened 'san://snapshot-" in text and "@127.0.1" not in text
    assert opened_at_hosts(lab) == 0 and lab.control.call("nfc")["disks"] == []


def test_what_has_no_lun_here_goes_on_to_the_next_mode(lab: Lab, tmp_path: Path) -> None:
    lab.control.call("power", vm="shared01", state="poweredOff")
    for name in ("off01", "onvsan01", "onvvol01", "shared01"):
        assert mode_of(lab, tmp_path, name, "san") == "nbdssl", name
        assert mode_of(lab, tmp_path, name, "san:nbd") == "nbd", name
    lab.control.call("power", vm="shared01", state="poweredOn")
    assert mode_of(lab, tmp_path, "app01", "san:nbd") == "san"
    lab.control.call("set_lun", datastore="vmfs01", visible=False)
    assert mode_of(lab, tmp_path, "app01", "san:nbd") == "nbd"


def test_allow_and_deny_lists_of_luns(lab: Lab, tmp_path: Path) -> None:
    folder = Path(lab.facts["device_dir"])
    datastores = {one.name: one for one in lab.vm("proxy01").runtime.host.datastore}
    mine = datastores["vmfs01"].info.vmfs.extent[0].diskName
    device = (folder / mine).resolve()
    lists = {
        f'allowList="{mine}"': "san",
        f'allowList="/dev/null,{folder / mine}"': "san",
        f"allowList={device}": "san",
        'allowList="naa.6000"': "nbd",
        f'denyList="{device}"': "nbd",
        f"blacklist={mine}": "nbd",
        f"denyList={folder / 'other'}": "san",
    }
    for words, mode in lists.items():
        config = f"vixDiskLib.transport.san.{words}\n"
        assert mode_of(lab, tmp_path, "app01", "san:nbd", config=config) == mode, words


def test_only_thick_disks_are_written_over_san(lab: Lab, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(1 << 20)
    for name, mode in (("restore01", "nbdssl"), ("thick01", "san")):
        path = f"[vmfs01] {name}/{name}.vmdk"
        with lab.serve(tmp_path, path, vm=MOIDS[name], writable=True, transports="san") as server:
            handle = server.connect()
            handle.pwrite(data, 4096)
            handle.flush()
            handle.shutdown()
        assert f"transport mode: {mode}\n" in server.text()
        assert lab.control.read(name, 2000, 4096, len(data)) == data


# --- hotadd ---------------------------------------------------------------------------------------------------------


def test_hotadd_attaches_and_detaches_by_itself(lab: Lab, tmp_path: Path) -> None:
    before = len(lab.control.call("calls"))
    user = {"user": lab.facts["backup_username"], "password": lab.facts["backup_password"]}
    vm = lab.vm("app01")
    with lab.snapshot("app01") as (moid, paths):
        lab.control.call("guest_write", vm="app01", disk=2000, offset=0, pattern={"seed": 4, "length": 100_000})
        held = lab.control.call("read_disk", vm="app01", disk=2000, snapshot=moid)["sha256"]
        with lab.serve(tmp_path, paths[2000], snapshot=moid, transports="hotadd", **user) as server:
            handle = server.connect()
            (attached,) = lab.control.call("attachments")
            assert (attached["path"], attached["vddk_vm"]) == (paths[2000], "vm-101")
            assert attached["mode"] == "independent_nonpersistent"
            data = read_all(handle)
            assert hashlib.sha256(data).hexdigest() == held
            assert any(flags & nbd.STATE_ZERO for _at, _length, flags in extents(handle))
            handle.shutdown()
        assert lab.control.call("attachments") == []
        assert not list(Path(lab.facts["device_dir"]).glob("wwn-*"))
    text = server.text()
    assert "transport mode: hotadd\n" in text and f"Opened '{attached['device']}'" in text
    assert "error:" not in text, "the double found misuse"
    calls = [one for one in lab.control.call("calls", since=before) if one["method"] == "ReconfigVM_Task"]
    assert [(one["user"], one["object"], one["changing"]) for one in calls] == [(user["user"], "vm-109", True)] * 2
    assert opened_at_hosts(lab) == 0
    assert not vm.runtime.consolidationNeeded


def test_hotadd_that_cannot_be(lab: Lab, tmp_path: Path) -> None:
    assert mode_of(lab, tmp_path, "off01", "hotadd:nbd") == "hotadd"
    assert mode_of(lab, tmp_path, "onvvol01", "hotadd:nbd") == "hotadd"
    for name in ("ide01", "crypt01", "onvsan01"):
        assert mode_of(lab, tmp_path, name, "hotadd:nbd") == "nbd", name
    lab.control.call("proxy", identity="none")
    assert mode_of(lab, tmp_path, "app01", "hotadd") == "nbdssl"
    lab.control.call("proxy", identity="mac_only")
    assert mode_of(lab, tmp_path, "app01", "hotadd") == "hotadd"
    lab.control.call("fill_units", vm="proxy01", leave=0, controllers=1)
    assert mode_of(lab, tmp_path, "app01", "hotadd:nbd") == "nbd"
    lab.control.call("fill_units", vm="proxy01", leave=None)
    user = {"user": lab.facts["backup_username"], "password": lab.facts["backup_password"]}
    lost = "VirtualMachine.Config.AddExistingDisk"
    lab.control.call("set_privileges", username=user["user"], remove=[lost])
    try:
        assert mode_of(lab, tmp_path, "app01", "hotadd:nbd", **user) == "nbd"
    finally:
        lab.control.call("set_privileges", username=user["user"], add=[lost])
    edge = "[vmfs11] edge01/edge01.vmdk"
    for transports, mode in (("hotadd:nbd", "nbd"), ("san", "san")):  # in the other datacenter
        with lab.serve(tmp_path, edge, vm="vm-114", transports=transports) as server:
            server.connect().shutdown()
        assert f"transport mode: {mode}\n" in server.text()


def test_writing_by_hotadd(lab: Lab, tmp_path: Path) -> None:
    data = random.Random(6).randbytes(3 << 20)
    path = "[vmfs01] restore01/restore01.vmdk"
    with lab.serve(tmp_path, path, vm="vm-102", writable=True, transports="hotadd") as server:
        handle = server.connect()
        assert lab.control.call("attachments")[0]["mode"] == "persistent"
        for at in range(0, len(data), 1 << 20):
            handle.pwrite(data[at : at + (1 << 20)], at + 512)
        handle.flush()
        assert bytes(handle.pread(len(data), 512)) == data
        handle.shutdown()
    assert "transport mode: hotadd\n" in server.text()
    assert lab.control.read("restore01", 2000, 512, len(data)) == data


CLEANUP = textwrap.dedent(
    """
    import ctypes, json, sys

    facts = json.loads(sys.argv[1])
    lib = ctypes.CDLL(facts["vddk_libdir"] + "/lib64/libvixDiskLib.so.8")
    P, Q, I = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    lib.VixDiskLib_AllocateConnectParams.restype = P
    lib.VixDiskLib_InitEx.argtypes = (I, I, P, P, P, ctypes.c_char_p, ctypes.c_char_p)
    lib.VixDiskLib_Cleanup.argtypes = (P, P, P)
    lib.VixDiskLib_Cleanup.restype = lib.VixDiskLib_InitEx.restype = Q

    class Params(ctypes.Structure):
        _fields_ = [("vmxSpec", ctypes.c_char_p), ("serverName", ctypes.c_char_p), ("thumbPrint", ctypes.c_char_p),
                    ("r1", ctypes.c_long), ("credType", ctypes.c_int), ("userName", ctypes.c_char_p),
                    ("password", ctypes.c_char_p), ("r2", P), ("port", I), ("nfcHostPort", I), ("r3", P * 6),
                    ("specType", ctypes.c_int)]

    LOG = ctypes.CFUNCTYPE(None, ctypes.c_char_p, P)(lambda *unused: None)
    assert lib.VixDiskLib_InitEx(8, 0, LOG, LOG, LOG, None, facts["config"].encode()) == 0
    raw = lib.VixDiskLib_AllocateConnectParams()
    params = Params.from_address(raw)
    params.vmxSpec = facts["vmx"].encode() if facts["vmx"] else None
    params.serverName, params.thumbPrint, params.credType = facts["host"].encode(), facts["thumbprint"].encode(), 1
    params.userName, params.password = facts["username"].encode(), facts["password"].encode()
    params.port = facts["port"]
    cleaned, remaining = I(7), I(7)
    assert lib.VixDiskLib_Cleanup(raw, ctypes.byref(cleaned), ctypes.byref(remaining)) == 0
    print(cleaned.value, remaining.value)
    """
)


@pytest.mark.parametrize("reset", [False, True])
def test_what_a_killed_process_left_is_cleaned_up(lab: Lab, tmp_path: Path, reset: bool) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "other").mkdir()

    def cleanup(vmx: str | None, folder: str) -> str:
        (tmp_path / "cleanup.conf").write_text(f'tmpDirectory="{tmp_path / folder}"\n')
        facts = {**lab.facts, "thumbprint": lab.thumbprint(), "config": str(tmp_path / "cleanup.conf"), "vmx": vmx}
        argv = [sys.executable, "-c", CLEANUP, json.dumps(facts)]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    vm = lab.vm("app01")
    config = f'tmpDirectory="{tmp_path / "tmp"}"\n'
    with lab.snapshot("app01") as (moid, paths):
        held = lab.control.call("read_disk", vm="app01", disk=2001, snapshot=moid)["sha256"]
        server = lab.serve(tmp_path, paths[2001], snapshot=moid, transports="hotadd", config=config)
        with server as running:
            handle = running.connect()
            assert hashlib.sha256(read_all(handle)).hexdigest() == held
            assert cleanup(None, "tmp") == "0 1", "a living process keeps what it has"
            running.process.kill()
            running.process.wait()
        if reset:
            lab.control.call("crash_proxy")
        deadline = time.monotonic() + 60
        while lab.control.call("nfc")["local"]["hotadd"]["connections"]:
            assert time.monotonic() < deadline
        assert [one["path"] for one in lab.control.call("attachments")] == [paths[2001]]
        with pytest.raises(vim.fault.FileLocked):
            WaitForTask(vm.snapshot.currentSnapshot.RemoveSnapshot_Task(removeChildren=False, consolidate=True))
        assert cleanup(None, "other") == "0 0", "another tmpDirectory finds nothing"
        assert cleanup("moref=vm-102", "tmp") == "0 0"
        assert cleanup("moref=vm-101", "tmp") == "1 0"
        assert lab.control.call("attachments") == []
        WaitForTask(vm.ConsolidateVMDisks_Task())
        assert not vm.runtime.consolidationNeeded
