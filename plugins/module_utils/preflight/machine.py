# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Checks of one virtual machine, on properties that were read already: pure functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set

from ..backup.template import AT_REST, not_at_rest
from ..libraries import vim
from ..vsphere.change_tracking import TRACKING_PATHS, Tracking, state_of
from ..vsphere.disks import Disk, disks_of, vm_obstacles
from ..vsphere.inventory import VmRef, readable
from ..vsphere.snapshots import MAX_CHAIN
from .checks import ERROR, NOT_CHECKED, OK, WARNING, Check
from .plans import DiskOutcome

# What the checks of this file are made of: one read.
VM_PATHS = (
    *TRACKING_PATHS,
    "runtime.connectionState",
    "runtime.host",
    "disabledMethod",
    "datastore",
    "summary.storage.committed",
    "parent",
    "resourcePool",
    "network",
)
# Of other machines on the same datastores.
OTHER_PATHS = ("name", "runtime.powerState", "config.hardware.device")

_MIB = 1 << 20
# A snapshot grows with what is written while it is read; a tenth of the disks is what people plan with.
_SNAPSHOT_SHARE = 0.10
_SNAPSHOT_LEAST = 16 * _MIB


@dataclass
class Store:
    """A datastore. :param hosts: moids of those that have it mounted and accessible."""

    moid: str
    name: str
    free_bytes: Optional[int]
    accessible: bool
    hosts: List[str] = field(default_factory=list)
    vms: List[Any] = field(default_factory=list)


@dataclass
class Machine:
    """A virtual machine with what was read of it."""

    vm: VmRef
    values: Dict[str, Any]
    tracking: Tracking
    disks: List[Disk]
    stores: List[Store] = field(default_factory=list)

    @classmethod
    def of(cls, vm: VmRef, values: Dict[str, Any]) -> Machine:
        tracking = state_of(values)
        return cls(vm, values, tracking, disks_of(tracking.vm_state.devices))

    @property
    def included(self) -> List[Disk]:
        return [disk for disk in self.disks if disk.included]

    def store_named(self, name: str) -> Optional[Store]:
        return next((store for store in self.stores if store.name == name), None)


def checks_of(machine: Machine) -> Iterator[Check]:
    """All checks of this file that need nothing but the machine itself."""
    yield from _machine(machine)
    yield from _skipped_disks(machine)
    yield _change_tracking(machine)
    yield _quiescing(machine)
    yield from _snapshots(machine)
    yield _consolidation(machine)
    yield _storage_vmotion(machine)
    yield from _datastore_space(machine)


def _machine(machine: Machine) -> Iterator[Check]:
    subject = str(machine.vm)
    connection = str(machine.values["runtime.connectionState"])
    state = machine.tracking.vm_state
    wrong = False
    if connection != "connected":
        wrong = True
        yield Check(
            "vm",
            ERROR,
            subject,
            f"vCenter says it is {connection}",
            "Look at the virtual machine and its host in the vSphere client",
        )
    hardware = SimpleNamespace(template=state.template, hardware=SimpleNamespace(device=state.devices))
    for obstacle in vm_obstacles(hardware, snapshot=not state.template):
        wrong = True
        yield Check("vm", ERROR, subject, obstacle, "Change that, or back it up by an agent in the guest")
    for reason in not_at_rest(state) if state.template else ():
        wrong = True
        yield Check("vm", ERROR, subject, f"it is a template, and {reason}", AT_REST)
    if not machine.included:
        wrong = True
        yield Check(
            "vm", ERROR, subject, "it has no disk that a snapshot holds", "There is nothing to back up this way"
        )
    if not wrong:
        kind = "a template" if state.template else state.power_state
        yield Check("vm", OK, subject, f"{kind}, {len(machine.included)} disks can be backed up")


def _skipped_disks(machine: Machine) -> Iterator[Check]:
    for disk in machine.disks:
        if not disk.included:
            yield Check(
                "disk",
                WARNING,
                f"disk '{disk.label}' of {machine.vm}",
                f"is not in the backup: {disk.skip_reason}",
                "Change the disk, or back up what it holds from within the guest",
            )


def _change_tracking(machine: Machine) -> Check:
    code, subject, tracking = "change_tracking", str(machine.vm), machine.tracking
    foreign = ", ".join(f"'{item.name}' ({item.moid})" for item in tracking.snapshots)
    if tracking.template:
        return Check(code, WARNING, subject, "a template has none: each backup is a full one")
    if not tracking.supported:
        return Check(
            code,
            WARNING,
            subject,
            "its virtual hardware does not support it: each backup is a full one",
            "Upgrade the virtual hardware to version 7 or later",
        )
    if not tracking.enabled and foreign:
        return Check(
            code,
            WARNING,
            subject,
            f"it is off, and can't be switched on while there are snapshots ({foreign}): each backup is a full one",
            "Remove these snapshots",
        )
    if not tracking.enabled:
        return Check(code, OK, subject, "it is off; the first backup switches it on")
    if foreign:
        return Check(
            code,
            WARNING,
            subject,
            f"it is on over snapshots of others ({foreign}): unless it was on before they were made, it misses changes",
            "Remove these snapshots, then vm_change_tracking with state=reset",
        )
    if not tracking.effective:
        return Check(
            code,
            WARNING,
            subject,
            "it is on and not effective yet: the next backup is a full one",
            "Nothing: the snapshot of the next backup makes it effective",
        )
    return Check(code, OK, subject, "it is on and effective")


def _quiescing(machine: Machine) -> Check:
    code, subject, state = "quiescing", str(machine.vm), machine.tracking.vm_state
    if state.power_state == "poweredOff":
        return Check(code, OK, subject, "the virtual machine is off: its disks are consistent by themselves")
    if state.power_state != "poweredOn":
        return Check(
            code, WARNING, subject, "the virtual machine is suspended: its guest can't be quiesced", "Resume it"
        )
    if not state.tools_running:
        return Check(
            code,
            WARNING,
            subject,
            "VMware Tools don't run in the guest: backups are crash-consistent, and quiesce: required fails",
            "Install and start VMware Tools in the guest",
        )
    return Check(code, OK, subject, "VMware Tools run in the guest")


def _snapshots(machine: Machine) -> Iterator[Check]:
    code, subject, state = "snapshots", str(machine.vm), machine.tracking.vm_state
    if state.current_depth >= MAX_CHAIN:
        yield Check(
            code,
            ERROR,
            subject,
            f"it stands on {state.current_depth} snapshots, and {MAX_CHAIN} is the limit: no further one is possible",
            "Remove snapshots that are not needed",
        )
    ours = [item for item in state.snapshots if item.marker is not None]
    foreign = [item for item in state.snapshots if item.marker is None]
    if ours:
        listed = ", ".join(f"'{item.name}' ({item.moid}) of {item.created}" for item in ours)
        yield Check(
            code,
            WARNING,
            subject,
            f"snapshots of ours are there, of a backup that runs or that crashed: {listed}",
            "The next backup of the same repository removes what crashed; vadp_recover does it at once",
        )
    if foreign:
        listed = ", ".join(f"'{item.name}' ({item.moid}) of {item.created}" for item in foreign)
        yield Check(
            code,
            WARNING,
            subject,
            f"snapshots of others are there: {listed}. The next backup after one of them is a full one unless nobody"
            " went back to it, and the machine's disks grow beside it",
            "Remove those that are not needed",
        )
    if not state.snapshots:
        yield Check(code, OK, subject, "there are none")


def _consolidation(machine: Machine) -> Check:
    subject = str(machine.vm)
    if machine.tracking.vm_state.consolidation_needed:
        return Check(
            "consolidation",
            WARNING,
            subject,
            "a snapshot was removed and its files are still there (consolidation needed)",
            "Detach its disks wherever they are attached (check leftovers), and consolidate them in the vSphere client",
        )
    return Check("consolidation", OK, subject, "not needed")


def _storage_vmotion(machine: Machine) -> Check:
    """PrepareForAccess without its end leaves it disabled (VADP facts 43)."""
    subject = str(machine.vm)
    if "RelocateVM_Task" in (machine.values["disabledMethod"] or ()):
        return Check(
            "storage_vmotion",
            WARNING,
            subject,
            "Storage vMotion is disabled for it: a backup runs, or one crashed between PrepareForAccess and EndAccess",
            "If none runs: vadp_access with state=ended and the identity that was used",
        )
    return Check("storage_vmotion", OK, subject, "Storage vMotion is allowed")


def _datastore_space(machine: Machine) -> Iterator[Check]:
    code = "datastore_space"
    for name in sorted({disk.datastore for disk in machine.included}):
        subject = f"datastore {name}"
        store = machine.store_named(readable(name))
        if store is None or store.free_bytes is None:
            yield Check(code, NOT_CHECKED, subject, "vCenter does not report how much is free")
            continue
        if not store.accessible:
            yield Check(code, ERROR, subject, "vCenter says it is not accessible", "Look at it in the vSphere client")
            continue
        capacity = sum(disk.capacity_bytes for disk in machine.included if disk.datastore == name)
        wanted = max(int(capacity * _SNAPSHOT_SHARE), _SNAPSHOT_LEAST)
        free = f"{size(store.free_bytes)} are free, and the disks there have {size(capacity)}"
        if machine.tracking.template:
            yield Check(code, OK, subject, f"{free}; a template needs no room for a snapshot")
        elif store.free_bytes < max(_SNAPSHOT_LEAST, wanted // 10):
            yield Check(code, ERROR, subject, f"{free}: there is no room for a snapshot", "Free space on the datastore")
        elif store.free_bytes < wanted:
            yield Check(
                code,
                WARNING,
                subject,
                f"{free}: a snapshot that grows to a tenth of them would fill it",
                "Free space on the datastore, or back up when little is written",
            )
        else:
            yield Check(code, OK, subject, free)


def transport_checks(machine: Machine, outcomes: Sequence[DiskOutcome]) -> Iterator[Check]:
    """Whether each disk can be moved at all, and why not better."""
    for outcome in outcomes:
        if not outcome.disk.included:
            continue
        subject = f"disk '{outcome.disk.label}' of {machine.vm}"
        if outcome.problem is not None:
            reason = outcome.problem.reason or outcome.problem.what
            yield Check("transport", ERROR, subject, f"no transport can read it: {reason}", outcome.problem.remedy)
            continue
        words = f"it is read by {outcome.chosen}"
        if outcome.method:
            words += f" ({outcome.method})"
        yield Check("transport", OK, subject, words)


def leftovers(machine: Machine, others: Optional[Mapping[str, Mapping[str, Any]]], unread: int = 0) -> Iterator[Check]:
    """Disks of this machine that are attached to another one (VADP facts 30).

    A linked clone may stand on a file of this machine: there it is a parent. A disk that was hot-added is the
    file itself, or a redo log that stands directly on it.

    :param others: moid -> OTHER_PATHS of the machines on the same datastores; None where they could not be read.
    :param unread: how many of them could not be read.
    """
    code, subject = "leftovers", str(machine.vm)
    if others is None:
        yield Check(code, NOT_CHECKED, subject, "the other virtual machines on its datastores could not be read")
        return
    own = {name for device in machine.tracking.vm_state.devices for name in _chain(device)}
    found = False
    for moid, values in others.items():
        if moid == machine.vm.moid:
            continue
        labels = [label for label, files in _attached(values) if files & own]
        if labels:
            found = True
            running = values.get("runtime.powerState") == "poweredOn"
            yield Check(
                code,
                ERROR if running else WARNING,
                subject,
                f"its disks are attached to VM '{readable(str(values.get('name')))}' ({moid}) as {', '.join(labels)}:"
                " the snapshot can't be removed while that is so",
                "If no backup runs there, detach them without deleting their files: proxy_hotadd with state=detached,"
                " or vadp_recover",
            )
    if not found:
        note = f"; {unread} machines could not be read" if unread else ""
        yield Check(code, OK, subject, f"no other virtual machine on its datastores holds its disks{note}")


def _chain(device: Any) -> Iterator[str]:
    backing = getattr(device, "backing", None) if isinstance(device, vim.vm.device.VirtualDisk) else None
    while backing is not None:
        name = getattr(backing, "fileName", None)
        if name:
            yield name
        backing = getattr(backing, "parent", None)


def _attached(values: Mapping[str, Any]) -> Iterator[Any]:
    """(label, files that count) of each disk of another machine."""
    for device in values.get("config.hardware.device") or ():
        files: List[str] = list(_chain(device))
        if not files:
            continue
        mode = getattr(device.backing, "diskMode", "") or ""
        counted: Set[str] = set(files if mode == "independent_nonpersistent" else files[:1])
        yield getattr(device.deviceInfo, "label", None) or f"disk {device.key}", counted


def size(count: int) -> str:
    """A size as people read it."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
