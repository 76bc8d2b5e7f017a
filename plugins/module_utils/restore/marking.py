# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mark in a virtual machine around the writes of a restore in place, and its change tracking (proofs 11 and 12).

Whatever is written to a disk from outside spoils its change tracking without a sign, for every repository and every
product (VADP facts 12). So the disks are marked in the virtual machine itself and the content IDs of all repositories
go, tracking is off while they are written, and starts again before the mark is taken away. A kill at any moment leaves
the mark.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Set

from ..errors import AuthenticationError, ConnectionLostError, PrivilegeError, VadpError, VsphereError
from ..repository.runs import Run
from ..vsphere import change_tracking, vm_keys
from ..vsphere.change_tracking import TRACKING_PATHS, Tracking
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import list_snapshots, remove_snapshot
from ..vsphere.vm_keys import DONE, WRITING, ConcurrentChange, VmKeys, first_part, mark_key, mark_name, mark_value

_FORCE = "vm_change_tracking with state=reset and force=true"


@dataclass
class Marking:
    """The marks of one restore. Made by :meth:`look`, before anything is compared.

    :param disks: those that are written, as they were at the look.
    :param look_again: looks whether the disks can be written (still). :raises VsphereError: they can't.
    :param seen: what it returned at last.
    :param is_over: whether the run of that ID, whose mark is there, is proved to be over.
    :param mandatory: nothing else reports this restore, so that it is refused without the mark.
    :param warnings: what did not go as it should, once the disks were written.
    :param written: a disk may hold other bytes than before; set by whoever writes.
    :param remains: marks of this restore are in the virtual machine.
    """

    session: Session
    vm: VmRef
    run: Run
    disks: List[Disk]
    look_again: Callable[[], Any]
    is_over: Callable[[str], bool]
    force: bool
    mandatory: bool
    tracking: Tracking
    keys: VmKeys
    version: str
    warnings: List[str] = field(default_factory=list)
    begun: bool = False
    marked: bool = False
    stopped: bool = False
    written: bool = False
    remains: bool = False
    seen: Any = None

    @classmethod
    def look(cls, session: Session, vm: VmRef, run: Run, disks: List[Disk], **more: Any) -> Marking:
        """The virtual machine as it is: what is compared from now on belongs to this version of its configuration."""
        values = session.read(vm.obj, *TRACKING_PATHS, *vm_keys.PATHS)
        keys, version = vm_keys.of_values(values)
        tracking = change_tracking.state_of(values)
        return cls(session, vm, run, disks, tracking=tracking, keys=keys, version=version, **more)

    # Before the first write

    def begin(self) -> None:
        """Mark the disks, look again, and stop change tracking. Once; later calls do nothing.

        :raises ConcurrentChange: something changed the virtual machine since the look. Nothing was written.
        :raises VsphereError: neither the mark nor unset change IDs could be proved, or another restore is at work.
        """
        if self.begun:
            return
        check_marks(self.vm, self.disks, self.keys, self.run.run_id, self.is_over, self.force)
        self._mark()
        self.begun = True
        try:
            self.look_again()
            self._stop_tracking()
            # The stun cycle's snapshot must be gone.
            self.seen = self.look_again()
        except VadpError as error:
            self.undo(error)
            raise

    def _mark(self) -> None:
        names = {mark_name(disk) for disk in self.disks}
        changes = dict.fromkeys(self.keys.id_keys(names), "")
        for disk in self.disks:
            value = mark_value(self.keys.vm_instance_uuid, self.run.run_id, WRITING, disk.change_id)
            changes[mark_key(mark_name(disk))] = value
        # A try before this one, by another transport, may have had no answer.
        before = self.remains
        try:
            # Set before the call: what became of one without an answer is not known.
            self.remains = True
            vm_keys.write(
                self.session,
                self.vm,
                changes,
                self.version,
                what="The disks were not marked in the virtual machine, and nothing was written",
            )
            self.marked = True
        except ConcurrentChange:
            self.remains = before
            raise
        except PrivilegeError as error:
            self.remains = before
            if self.mandatory:
                error.remedy = (
                    f"Give the user's role {vm_keys.PRIVILEGE}: without a record in the repository the mark is what"
                    " keeps later backups from believing the disks' change tracking"
                )
                raise
            self.warnings.append(
                f"The disks of {self.vm} were written without a mark in the virtual machine, because the user lacks the"
                f" privilege {vm_keys.PRIVILEGE}. Other repositories learn of this restore only by the reset of change"
                " tracking"
            )
        except VadpError:
            # It may have been carried out anyway; only its absence proves that nothing remains.
            with suppress(VadpError):
                keys, _version = vm_keys.read(self.session, self.vm)
                self.remains = any(self._is_mine(keys, disk) for disk in self.disks)
            raise

    def _stop_tracking(self) -> None:
        after = self.tracking
        try:
            if self.tracking.enabled:
                self.stopped = True
                after = self._apply(self.tracking, ["disable", "stun"])
            else:
                after = change_tracking.state(self.session, self.vm)
        except (AuthenticationError, ConnectionLostError):
            raise
        except VsphereError as error:
            if not self.marked:
                error.remedy = _proof_missing(error.remedy)
                raise
            self.warnings.append(f"Change tracking was not stopped before the disks were written: {error}")
            after = change_tracking.state(self.session, self.vm)
        held = [disk.label for disk in self._ours(after) if disk.change_id is not None]
        if held and not self.marked:
            raise VsphereError(
                "Nothing was written, because nothing would record it",
                subject=str(self.vm),
                reason=f"the disks could not be marked, and {', '.join(held)} still have change IDs",
                remedy=_proof_missing(None),
            )

    def _ours(self, tracking: Tracking) -> List[Disk]:
        keys = {disk.key for disk in self.disks}
        return [disk for disk in tracking.disks if disk.key in keys]

    def _apply(self, tracking: Tracking, steps: List[str]) -> Tracking:
        """Steps of change tracking. A crash leaves the snapshot of a stun cycle, so it stands in the record first."""
        intent = self.run.record("snapshot", name="openvadp change tracking", vm_moid=self.vm.moid)
        description = change_tracking.stun_description(
            repository_id=str(self.run.data["repository_id"]), run_id=self.run.run_id
        )
        try:
            after = change_tracking.apply(self.session, self.vm, tracking, steps, description=description)
        except VsphereError:
            # What brought us here is what must be told; what can't be removed now stays in the record.
            with suppress(VadpError):
                self._remove_snapshots()
                self.run.done(intent)
            raise
        self.run.done(intent)
        return after

    def _remove_snapshots(self) -> None:
        for snapshot in list_snapshots(self.session, self.vm):
            if (snapshot.marker or {}).get("run_id") == self.run.run_id:
                remove_snapshot(self.session, self.vm, snapshot)

    def undo(self, error: VadpError) -> None:
        """Nothing was written: tracking goes on, again, and the marks go. What remains is reported with the error."""
        if not self.begun:
            return
        try:
            if self.stopped:
                tracking = change_tracking.state(self.session, self.vm)
                if not tracking.enabled:
                    self._apply(tracking, ["enable", "stun"])
            if self.marked:
                self._settle({disk.key for disk in self.disks})
            self.begun = self.remains = False
        except VadpError as left:
            told = f"The marks of this restore may remain ({left.what}): run it again, or {_FORCE}"
            error.remedy = f"{error.remedy.rstrip('. ')}. {told}" if error.remedy else told

    # After the last write

    def finish(self) -> None:
        """Prove that nobody else wrote meanwhile, restart tracking, and take the marks away.

        What fails after that proof is a warning: the disks hold the point.

        :raises VsphereError: a mark of this restore is gone, or is another's by now.
        """
        if not self.begun:
            return
        if self.marked:
            self._prove_marks()
        proved: Set[int] = set()
        try:
            proved = self._start_tracking()
        except VsphereError as error:
            self.warnings.append(
                f"The disks of {self.vm} hold the point, but their change tracking was not started again: {error}"
            )
        if not self.marked:
            return
        try:
            self._settle(proved)
            self.remains = False
        except VsphereError as error:
            self.warnings.append(self._stays(error))
        left = [disk.label for disk in self.disks if disk.key not in proved]
        if left and not self.remains:
            self.warnings.append(
                f"The marks on {', '.join(left)} of {self.vm} stay, as done: no change ID proves that their change"
                " tracking restarted. The next backup resets it first, or reads them in full"
            )

    def _stays(self, error: VadpError) -> str:
        return (
            f"The disks of {self.vm} hold the point, but the marks of this restore were not removed ({error}). Use"
            f" {_FORCE}: until then backups are full, and refused while the machine is off"
        )

    def _prove_marks(self) -> None:
        keys, _version = vm_keys.read(self.session, self.vm)
        gone = [disk.label for disk in self.disks if not self._is_mine(keys, disk)]
        if gone:
            raise VsphereError(
                "The disks can't be relied on",
                subject=str(self.vm),
                reason=f"the mark of this restore on {', '.join(gone)} was taken away or replaced while they were"
                " written: another restore, or somebody, was at work on the same disks",
                remedy="See that nothing else writes to the disks, and run the restore again",
            )

    def _is_mine(self, keys: VmKeys, disk: Disk) -> bool:
        mark = keys.mark(mark_name(disk))
        return mark is not None and (mark.state, mark.run_id) == (WRITING, self.run.run_id.lower())

    def _start_tracking(self) -> Set[int]:
        """-> the device keys of the disks whose tracking, if there is any, is proved to have begun after the writes."""
        now = change_tracking.state(self.session, self.vm)
        running = now.enabled or any(disk.change_id for disk in self._ours(now))
        if not self.tracking.enabled:
            if running:
                self.warnings.append(f"Somebody switched change tracking of {self.vm} on while its disks were written")
                return set()
            return {disk.key for disk in self.disks}
        # Where it could not be stopped, or somebody started it meanwhile, it has seen a part of the writes.
        after = self._apply(now, (["disable", "stun"] if running else []) + ["enable", "stun"])
        old: Dict[int, Set[Any]] = {disk.key: {None, first_part(disk.change_id)} for disk in self.disks}
        for disk in now.disks:
            old.get(disk.key, set()).add(first_part(disk.change_id))
        return {disk.key for disk in self._ours(after) if first_part(disk.change_id) not in old[disk.key]}

    def _settle(self, proved: Set[int]) -> None:
        """The marks of this restore go, or wait as done for a proof. Those of others are not touched."""
        waiting = {mark_name(disk) for disk in self.disks if disk.key not in proved}

        def decide(keys: VmKeys) -> Dict[str, str]:
            changes = {}
            for disk in self.disks:
                if self._is_mine(keys, disk):
                    name = mark_name(disk)
                    done = mark_value(keys.vm_instance_uuid, self.run.run_id, DONE, disk.change_id)
                    changes[mark_key(name)] = done if name in waiting else ""
            return changes

        what = "The marks of the restore were not removed"
        vm_keys.update(self.session, self.vm, decide, what=what, sleep=self.session.sleep)


def check_marks(
    vm: VmRef, disks: List[Disk], keys: VmKeys, run_id: str, is_over: Callable[[str], bool], force: bool
) -> None:
    """:raises VsphereError: another restore writes to one of the disks, or was cut and may go on."""
    if not keys.readable:
        raise VsphereError(
            "Nothing was written, because the marks in the virtual machine can't be read",
            subject=str(vm),
            reason="vCenter shows no advanced settings of it",
            remedy="Give the user's role System.Read on the virtual machine, and run again",
        )
    others = {
        disk.label: mark
        for disk in disks
        for mark in [keys.marks_of([disk]).get(disk.key)]
        if mark is not None and mark.state != DONE and mark.run_id != run_id.lower()
    }
    held = {label: mark for label, mark in others.items() if not (mark.run_id and is_over(mark.run_id))}
    if held and not force:
        runs = ", ".join(sorted({mark.run_id or "unknown" for mark in held.values()}))
        raise VsphereError(
            "Another restore may be at work on the same disks, and nothing was written",
            subject=str(vm),
            reason=f"{', '.join(held)} carry the mark of run {runs}, which this repository does not know to be over",
            remedy="Wait for it. If it was cut, run again with force=true, which writes these disks again",
            details={"runs": sorted({mark.run_id for mark in held.values()})},
        )


def _proof_missing(remedy: Any) -> str:
    told = (
        f"Give the user's role {vm_keys.PRIVILEGE}, or VirtualMachine.Config.ChangeTracking and"
        " VirtualMachine.State.CreateSnapshot and RemoveSnapshot"
    )
    return f"{remedy.rstrip('. ')}. {told}" if remedy else told
