# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The figures. Each group makes what it needs, so any selection can be measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple
from unittest import mock

from ansible_collections.openvadp.backup.plugins.module_utils.backup import disk_copy
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.image import CLUSTER_BYTES
from ansible_collections.openvadp.backup.plugins.module_utils.transport import opener
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.changed_areas import query_changed_areas
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef, find_vm
from harness import Ansible, Backups
from pyVmomi import vim

from .data import BLOCK, GIB, MIB
from .rig import DISK, SMALL_DISK, TOOLS_PATH, Rig, say, timed

ROUNDS = 3
CHAIN_LAYERS = 10
AREAS = 1_000_000
# A disk for a million areas, of a VM that has an empty one.
LARGE_VM, LARGE_DISK, LARGE_BYTES = "restore01", 2001, 2048 * GIB
# role vm_backup has one disk to back up here: a VM of the simulator with a single, small one.
ONE_DISK_VM = "win01"


class Figure(NamedTuple):
    """A measured figure; without a peer the value stands in ``ratio`` too."""

    ratio: float
    ours: float
    peer: Optional[float]
    unit: str


Figures = Dict[str, Figure]


def compared(ours: Sequence[float], peer: Sequence[float], unit: str = "s") -> Figure:
    """Median against median."""
    one, other = statistics.median(ours), statistics.median(peer)
    return Figure(one / other, one, other, unit)


def alone(value: float, unit: str) -> Figure:
    return Figure(value, value, None, unit)


def _seconds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values) + " s"


Times = Tuple[List[float], List[float]]


def _interleaved(name: str, ours: Callable[[int], None], peer: Callable[[int], None], rounds: int = ROUNDS) -> Times:
    """Seconds of both, in turn; who is first changes."""
    times: Times = ([], [])
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            times[index].append(timed(partial((ours, peer)[index], number)))
    say(f"{name}: ours {_seconds(times[0])}, peer {_seconds(times[1])}")
    return times


# Full and incremental

SLOPE = {"1pct": 0.01, "5pct": 0.05, "20pct": 0.20}


def full_and_incremental(rig: Rig, wanted: Set[str]) -> Figures:
    """Rounds of a full, its peer, and an incremental of each size."""
    repository = rig.repository("repository")
    slopes = {
        name: share
        for name, share in SLOPE.items()
        if {f"incremental_{name}_vs_full", f"incremental_{name}_stored_vs_compressed"} & wanted
    }
    full: List[float] = []
    peer: List[float] = []
    incremental: Dict[str, List[float]] = {name: [] for name in slopes}
    stored: Dict[str, List[float]] = {name: [] for name in slopes}
    compressed: Dict[str, List[float]] = {name: [] for name in slopes}
    for number in range(ROUNDS):
        with rig.snapshot() as snapshot:
            for who in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                if who == "ours":
                    point = f"full-{number}"
                    full.append(timed(partial(rig.export, repository, snapshot, mode="full", point=point)))
                    size = os.stat(rig.layer(repository, point)).st_size
                    say(f"full: {full[-1]:.2f} s, {size / MIB:.0f} MiB stored")
                elif "full_vs_qemu_img_convert" in wanted:
                    dest = rig.folder / "peer.qcow2"
                    peer.append(timed(partial(rig.qemu_img_convert, snapshot, dest)))
                    say(f"qemu-img convert: {peer[-1]:.2f} s, {dest.stat().st_size / MIB:.0f} MiB stored")
                    dest.unlink()
        for name, share in slopes.items():
            changes = rig.change(share)
            with rig.snapshot() as snapshot:
                point = f"{name}-{number}"
                seconds = timed(partial(rig.export, repository, snapshot, mode="incremental", point=point))
            size = os.stat(rig.layer(repository, point)).st_size
            incremental[name].append(seconds)
            stored[name].append(size)
            compressed[name].append(rig.compressed_bytes(changes))
            say(f"incremental, {share:.0%} changed: {seconds:.2f} s, {size / MIB:.0f} MiB stored")
    figures = {f"incremental_{name}_vs_full": compared(values, full) for name, values in incremental.items()}
    figures.update(
        {
            f"incremental_{name}_stored_vs_compressed": compared(stored[name], compressed[name], "bytes")
            for name in slopes
        }
    )
    if peer:
        figures["full_vs_qemu_img_convert"] = compared(full, peer)
    shutil.rmtree(repository)
    return figures


def full_raw(rig: Rig, _wanted: Set[str]) -> Figures:
    """Not compressed, so that nothing hides what reading, hashing and writing cost."""
    repository, dest = rig.repository("raw"), rig.folder / "peer.qcow2"
    with rig.snapshot() as snapshot:

        def ours(number: int) -> None:
            rig.export(repository, snapshot, mode="full", compression="none", point=f"raw-{number}")

        def peer(_number: int) -> None:
            dest.unlink(missing_ok=True)
            rig.nbdcopy(snapshot, dest)

        times = _interleaved("full_raw", ours, peer)
    shutil.rmtree(repository)
    dest.unlink()
    return {"full_raw_vs_nbdcopy": compared(*times)}


def https(rig: Rig, _wanted: Set[str]) -> Figures:
    """Not compressed, from the datastore's HTTPS access, with the VM off: the whole disk crosses the wire both ways."""
    repository, dest = rig.repository("https"), rig.folder / "peer.raw"
    with rig.powered_off(), rig.snapshot() as snapshot:

        def ours(number: int) -> None:
            options = {"transports": ["https"], "mode": "full", "compression": "none"}
            result = rig.export(repository, snapshot, point=f"https-{number}", **options)
            assert result["disks"][0]["method"] == "folder", result

        def peer(_number: int) -> None:
            dest.unlink(missing_ok=True)
            rig.curl(snapshot, dest)

        times = _interleaved("https", ours, peer)
    shutil.rmtree(repository)
    dest.unlink()
    return {"https_vs_curl": compared(*times)}


def hotadd(rig: Rig, _wanted: Set[str]) -> Figures:
    """Not compressed, from the disk attached to this machine, attaching and detaching included."""
    repository = rig.repository("hotadd")
    with rig.snapshot() as snapshot:

        def export(point: str) -> None:
            options = {"transports": ["hotadd"], "vddk_libdir": None, "mode": "full", "compression": "none"}
            result = rig.export(repository, snapshot, point=point, **options, **rig.proxy_options())
            assert result["disks"][0]["method"] == "proxy_hotadd", result

        def peer(number: int) -> None:
            with mock.patch.object(disk_copy, "open_disk", rig.plain_file):
                export(f"file-{number}")

        times = _interleaved("hotadd", lambda number: export(f"hotadd-{number}"), peer)
    shutil.rmtree(repository)
    return {"hotadd_vs_nbdkit_file": compared(*times)}


# Restore


def restore(rig: Rig, _wanted: Set[str]) -> Figures:
    """A chain of ten layers to a raw image."""
    repository, dest = rig.repository("chain"), rig.empty("restored")
    for number in range(CHAIN_LAYERS):
        if number:
            rig.change(0.01)
        with rig.snapshot() as snapshot:
            rig.export(repository, snapshot, mode="incremental" if number else "full", point=f"p{number}")
    point = f"p{CHAIN_LAYERS - 1}"
    layer = rig.layer(repository, point)
    assert len(image.chain_files(layer)) == CHAIN_LAYERS
    raw = rig.folder / "peer.raw"
    restored: List[Path] = []

    def clear() -> None:
        raw.unlink(missing_ok=True)
        while restored:
            restored.pop().unlink()

    def ours(_number: int) -> None:
        restored.append(rig.restore(repository, point, dest))

    def peer(_number: int) -> None:
        rig.convert_to_raw(layer, raw)

    times: Times = ([], [])
    verify: List[float] = []
    for number in range(ROUNDS):
        clear()
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            # The disk is the limit: what was deleted or written before must not count for the next.
            os.sync()
            times[index].append(timed(partial((ours, peer)[index], number)))
        verify.append(timed(partial(image.compare, layer, str(restored[0]), b_format="raw")))
    say(f"restore: ours {_seconds(times[0])}, peer {_seconds(times[1])}; read again to verify {_seconds(verify)}")
    clear()
    shutil.rmtree(repository)
    shutil.rmtree(dest)
    return {
        "restore_vs_qemu_img_convert": compared(*times),
        "restore_verify_read_seconds": alone(statistics.median(verify), "s"),
    }


# What is written back takes so short that a busy moment shows.
IN_PLACE_ROUNDS = 5


def restore_in_place(rig: Rig, _wanted: Set[str]) -> Figures:
    """One per cent of the data changed since the point: what changed is written back, then the whole disk."""
    repository = rig.repository("in_place")
    times: Times = ([], [])

    def write_back(point: str, changed_only: bool, most: int) -> None:
        disk = rig.restore_in_place(repository, point, changed_only=changed_only)
        assert disk["changed_only"] is changed_only and disk["bytes_written"] <= most, disk
        say(f"restore in place: {disk['bytes_written'] / MIB:.0f} MiB written; {disk['reason']}")

    for number in range(IN_PLACE_ROUNDS):
        point = f"p{number}"
        rig.reset_tracking()
        with rig.snapshot() as snapshot:
            rig.export(repository, snapshot, mode="full", point=point)
        changed = sum(len(data) * len(offsets) for data, offsets in rig.change(0.01).items())
        with rig.powered_off():
            times[0].append(timed(partial(write_back, point, True, int(1.2 * changed))))
            times[1].append(timed(partial(write_back, point, False, rig.capacity_bytes)))
    say(f"in place: what changed {_seconds(times[0])}, whole {_seconds(times[1])}")
    shutil.rmtree(repository)
    return {"in_place_changed_1pct_vs_full_restore": compared(*times)}


# Files

FILE_BYTES = 200 * MIB
FILE_DISK_BYTES = 320 * MIB
FILE_LAYERS = 7
# An appliance that boots without KVM takes its time.
GUESTFISH_SECONDS = 900
FILE_FIGURES = [
    "file_restore_first_byte_seconds",
    "file_restore_mib_per_second",
    "file_restore_vs_guestfish",
    "file_restore_first_byte_vs_guestfish",
    "file_restore_vs_debugfs",
    "file_restore_first_byte_vs_debugfs",
]


def files(rig: Rig, wanted: Set[str]) -> Figures:
    """A file of 200 MB on ext4, each seventh MiB of which lies in another layer of the chain.

    Ours is checked with the hashes of the backup. guestfish reads the chain, debugfs a raw image that qemu-img makes of
    it first; neither checks anything.
    """
    repository = rig.repository("files")
    layer, request = rig.file_points(repository, FILE_BYTES, FILE_DISK_BYTES, FILE_LAYERS)
    assert len(image.chain_files(layer)) == FILE_LAYERS
    ours = FileTimes(*rig.timed_files(request, ROUNDS))
    say(f"files: first byte {_seconds(ours.first)}, restored in {_seconds(ours.whole)}")
    figures = {
        "file_restore_first_byte_seconds": alone(statistics.median(ours.first), "s"),
        "file_restore_mib_per_second": alone(FILE_BYTES / MIB / statistics.median(ours.whole), "MiB/s"),
    }
    peers: Dict[str, Callable[[], Tuple[float, float]]] = {
        "guestfish": partial(rig.guestfish, layer, GUESTFISH_SECONDS),
        "debugfs": partial(rig.debugfs, layer),
    }
    for name, run in peers.items():
        if not {f"file_restore_vs_{name}", f"file_restore_first_byte_vs_{name}"} & wanted:
            continue
        if shutil.which(name, path=TOOLS_PATH) is None:
            say(f"files: {name} is not installed, so there is no figure")
            continue
        first, whole = run()
        say(f"files: {name}: first byte {first:.2f} s, all of it {whole:.2f} s")
        figures[f"file_restore_first_byte_vs_{name}"] = compared(ours.first, [first])
        figures[f"file_restore_vs_{name}"] = compared(ours.whole, [whole])
    shutil.rmtree(repository)
    return figures


class FileTimes(NamedTuple):
    """Seconds to the first byte of a file, and to a restored file, of each round."""

    first: List[float]
    whole: List[float]


# Thirty disks

# Of three machines, four disks of each at once: twelve are as many as one host bears.
BUDGET_VMS = ("restore01", "copy01", "copy02")
BUDGET_DISKS_EACH, BUDGET_AT_ONCE = 10, 4
BUDGET_BYTES = 32 * MIB
BUDGET_ROUNDS = 9


class _NoSlot:
    """What a disk holds where nobody counts."""

    def opened(self, _endpoint: Any) -> None:
        pass


def budget(rig: Rig, _wanted: Set[str]) -> Figures:
    """Thirty disks of three machines in one repository, with and without counting the connections to their hosts."""
    repository = rig.repository("budget")
    keys = {name: rig.small_disks(name, BUDGET_DISKS_EACH, BUDGET_BYTES) for name in BUDGET_VMS}
    with contextlib.ExitStack() as stack:
        taken = {name: stack.enter_context(rig.snapshot(find_vm(rig.session, name=name))) for name in BUDGET_VMS}

        def export(point: str, name: str) -> None:
            disks = [str(key) for key in keys[name]]
            options = {"vm": {"name": name}, "disks": disks, "parallel_disks": BUDGET_AT_ONCE, "compression": "none"}
            rig.export(repository, taken[name], mode="full", point=point, **options)

        def thirty(point: str) -> None:
            with ThreadPoolExecutor(len(BUDGET_VMS)) as pool:
                list(pool.map(partial(export, point), BUDGET_VMS))

        def ours(number: int) -> None:
            thirty(f"counted-{number}")

        def peer(number: int) -> None:
            with mock.patch.object(opener.budget, "for_disk", lambda *_args, **_options: nullcontext(_NoSlot())):
                thirty(f"free-{number}")

        times = _interleaved("nbd_budget", ours, peer, BUDGET_ROUNDS)
    shutil.rmtree(repository)
    return {"nbd_budget_overhead": compared(*times)}


# Memory and planning


class _Pages:
    """Answers to QueryChangedDiskAreas as pyVmomi gives them, made beforehand: what is timed is ours alone."""

    def __init__(self, areas: int, page_areas: int = 2000) -> None:
        info, extent = vim.VirtualMachine.DiskChangeInfo, vim.VirtualMachine.DiskChangeInfo.DiskChangeExtent
        self.capacity_bytes = areas * 2 * BLOCK
        self._pages = [
            info(
                startOffset=first * 2 * BLOCK,
                length=page_areas * 2 * BLOCK,
                changedArea=[
                    extent(start=number * 2 * BLOCK, length=BLOCK) for number in range(first, first + page_areas)
                ],
            )
            for first in range(0, areas, page_areas)
        ]
        self.obj = vim.VirtualMachine("vm-1")

    def call(self, *_args: Any, **_options: Any) -> Any:
        return self._pages.pop(0)


def planning(_rig: Rig, _wanted: Set[str]) -> Figures:
    """From the pages of an answer to the pieces that are copied, a million of them."""
    times = []
    for _round in range(ROUNDS):
        pages: Any = _Pages(AREAS)
        begun = time.monotonic()
        found = query_changed_areas(pages, pages, None, DISK, pages.capacity_bytes, "52 de/1")
        areas = Extents.of(found).round_out(CLUSTER_BYTES, pages.capacity_bytes)
        count = sum(1 for _piece in areas.pieces(MIB))
        times.append(time.monotonic() - begun)
        assert len(areas) == count == AREAS
    say(f"planning {AREAS} areas: {_seconds(times)}")
    return {"plan_1m_areas_seconds": alone(statistics.median(times), "s")}


def memory(rig: Rig, _wanted: Set[str]) -> Figures:
    """The largest resident set of an export's process: of much data, of a huge disk, of a million changed areas."""
    repository = rig.repository("memory")
    peaks: List[float] = []

    def export(what: str, machine: Optional[VmRef] = None, **options: Any) -> None:
        with rig.snapshot(machine) as snapshot:
            result = rig.export_apart(repository, snapshot, **options)
        disk = result["disks"][0]
        peaks.append(result["peak_mib"])
        say(
            f"memory, {what}: {result['peak_mib']:.0f} MiB; {disk['mode']}, {disk['areas']} areas,"
            f" {disk['bytes_read'] / GIB:.2f} GiB read in {result['seconds']:.1f} s"
        )

    export("full", mode="full")
    rig.change(0.20)
    export("20 % changed", mode="incremental")
    large = rig.large_disk(LARGE_VM, LARGE_DISK, LARGE_BYTES)
    options = {"vm": {"name": LARGE_VM}, "disks": [str(LARGE_DISK)]}
    export("2 TiB, nearly empty", large, mode="full", **options)
    rig.change_everywhere(LARGE_VM, LARGE_DISK, AREAS, LARGE_BYTES // AREAS // BLOCK * BLOCK)
    export("2 TiB, a million areas", large, mode="incremental", **options)
    shutil.rmtree(repository)
    return {"export_rss_mib": alone(max(peaks), "MiB")}


# Calls


def calls(rig: Rig, wanted: Set[str]) -> Figures:
    """Calls to vCenter, all of them: log-ins, reads, files and what VDDK asks for included."""
    figures: Figures = {}
    control = rig.simulator.control
    if "api_calls_noop_export" in wanted:
        repository = rig.repository("calls")
        with rig.snapshot() as snapshot:
            rig.export(repository, snapshot, mode="full", point="there", disks=[str(SMALL_DISK)])
            before = rig.simulator.last_call()
            result = rig.export(repository, snapshot, point="there", disks=[str(SMALL_DISK)])
            made = control.call("calls", since=before)
        assert not result["changed"]
        figures["api_calls_noop_export"] = alone(_told("export of a point that exists", made), "calls")
    if {"api_calls_full_backup", "ansible_playbook_start_seconds"} & wanted:
        control.call("power", vm=ONE_DISK_VM, state="poweredOn")
        ansible = Ansible(rig.folder / "ansible")
        backups = Backups(rig.simulator, ansible, rig.repository("role"))
        before = rig.simulator.last_call()
        backups.run(ONE_DISK_VM, point="first", transports=["nbdssl"]).ok()
        made = control.call("calls", since=before)
        figures["api_calls_full_backup"] = alone(_told("role vm_backup, the first backup of a VM", made), "calls")
        play = [{"hosts": "localhost", "gather_facts": False, "tasks": [{"ansible.builtin.ping": {}}]}]
        starts = [timed(lambda: ansible.run(play).ok()) for _round in range(ROUNDS)]
        figures["ansible_playbook_start_seconds"] = alone(statistics.median(starts), "s")
    return figures


# A disk that is nearly empty, as large as the figure's unit.
ALLOCATION_BYTES = 1024 * GIB


def allocation(rig: Rig, _wanted: Set[str]) -> Figures:
    """Questions to VDDK about allocated blocks: of a full of a TiB, and of an incremental. Each may cost a second."""
    repository = rig.repository("allocation")
    machine = rig.large_disk(LARGE_VM, LARGE_DISK, ALLOCATION_BYTES)
    control = rig.simulator.control
    counts: List[int] = []
    for point, mode in (("full", "full"), ("changed", "incremental")):
        control.call("guest_write", vm=LARGE_VM, disk=LARGE_DISK, offsets=[0, 700 * GIB], data=os.urandom(MIB))
        with rig.snapshot(machine) as snapshot:
            before = rig.allocation_queries()
            begun = time.monotonic()
            result = rig.export(
                repository, snapshot, vm={"name": LARGE_VM}, disks=[str(LARGE_DISK)], point=point, mode=mode
            )
            counts.append(rig.allocation_queries() - before)
            seconds = time.monotonic() - begun
        assert result["disks"][0]["mode"] == mode and result["disks"][0]["bytes_read"] >= MIB, result
        say(f"allocated blocks: {counts[-1]} questions by {result['disks'][0]['mode']}, {seconds:.1f} s")
    shutil.rmtree(repository)
    return {
        "allocation_queries_per_tib": alone(counts[0] * 1024 * GIB / ALLOCATION_BYTES, "calls"),
        "allocation_queries_incremental": alone(counts[1], "calls"),
    }


def _told(what: str, made: List[Dict[str, Any]]) -> int:
    counts = Counter(call["method"] for call in made)
    say(f"{what}: " + ", ".join(f"{count} {method}" for method, count in counts.most_common()))
    return len(made)


#: Each group with the figures that it measures, in the order of a whole run: the short ones first.
GROUPS: List[Tuple[Callable[[Rig, Set[str]], Figures], List[str]]] = [
    (planning, ["plan_1m_areas_seconds"]),
    (allocation, ["allocation_queries_per_tib", "allocation_queries_incremental"]),
    (calls, ["api_calls_noop_export", "api_calls_full_backup", "ansible_playbook_start_seconds"]),
    (
        full_and_incremental,
        ["full_vs_qemu_img_convert"]
        + [f"incremental_{name}_vs_full" for name in SLOPE]
        + [f"incremental_{name}_stored_vs_compressed" for name in SLOPE],
    ),
    (budget, ["nbd_budget_overhead"]),
    (full_raw, ["full_raw_vs_nbdcopy"]),
    (hotadd, ["hotadd_vs_nbdkit_file"]),
    (https, ["https_vs_curl"]),
    (restore, ["restore_vs_qemu_img_convert", "restore_verify_read_seconds"]),
    (files, FILE_FIGURES),
    (restore_in_place, ["in_place_changed_1pct_vs_full_restore"]),
    (memory, ["export_rss_mib"]),
]
