# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The steps of roles vm_backup and vm_restore, by the functions that the modules call; each step logs in by itself."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, Optional

from ansible_collections.openvadp.backup.plugins.module_utils.backup import run_steps
from ansible_collections.openvadp.backup.plugins.module_utils.backup.export import export_point
from ansible_collections.openvadp.backup.plugins.module_utils.backup.recover import RecoverRequest, recover_vm
from ansible_collections.openvadp.backup.plugins.module_utils.backup.request import ExportRequest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore
from ansible_collections.openvadp.backup.plugins.module_utils.restore import in_place, to_file
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import change_tracking, snapshot_state
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session

_TIMEOUT = 60


def _sleep_briefly(seconds: float) -> None:
    time.sleep(seconds / 20)


# The simulator does in milliseconds what a vCenter does in seconds: the pauses between two looks at a task shrink, too.
Session.connect.__func__.__defaults__ = (time.monotonic, _sleep_briefly)  # type: ignore[attr-defined]


@dataclass
class Job:
    """A virtual machine, how to reach it, and the repository of its backups; plain data, so that it can be sent."""

    connection: Dict[str, Any]
    vddk_libdir: str
    nfc_port: int
    moid: str
    uuid: str
    repository: str

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)

    def connect(self) -> Session:
        return Session.connect(Connection(**self.connection))

    @property
    def vm(self) -> Dict[str, Any]:
        return dict(dict.fromkeys(("name", "uuid", "folder", "datacenter")), moid=self.moid, use_instance_uuid=False)

    @property
    def store(self) -> VmStore:
        """What the repository holds of the machine."""
        return Repository.open(self.repository).vm(self.uuid)

    # The steps of role vm_backup

    def recover(self, begin: bool = False, point: Optional[str] = None, **options: Any) -> Dict[str, Any]:
        request = RecoverRequest(Connection(**self.connection), self.vm, self.repository, begin, point, **options)
        return recover_vm(request, check_mode=False)

    def track(self, run_id: str) -> None:
        """Change tracking on, where it can be; the role goes on with full backups where it can't."""
        with self.connect() as session:
            try:
                run_steps.ensure_tracking(
                    session, self.repository, run_id, self.vm, "enabled", True, _TIMEOUT, check_mode=False
                )
            except VadpError:
                return

    def reset_tracking(self) -> None:
        with self.connect() as session:
            change_tracking.ensure(session, find_vm(session, **self.vm), "reset", True, _TIMEOUT, False)

    def snapshot(self, present: bool, run_id: Optional[str] = None, **named: Any) -> Dict[str, Any]:
        """A snapshot is there (*named* by name and description, or a run's own), or is not (*named* by moid)."""
        wanted = dict(name=None, moid=None, description="")
        wanted.update(named)
        options = dict(quiesce="never", memory=False, remove_children=False, consolidate=True, timeout=_TIMEOUT)
        with self.connect() as session:
            vm = find_vm(session, **self.vm)
            asked = snapshot_state.Wanted(present=present, **wanted, **options)
            if run_id is not None:
                return run_steps.ensure_snapshot(session, self.repository, run_id, self.vm, asked, False)
            return snapshot_state.ensure(session, vm, asked, False)

    def export(self, point: str, snapshot_moid: Optional[str], mode: str = "auto", **options: Any) -> Dict[str, Any]:
        request = ExportRequest(
            connection=Connection(**self.connection),
            vm=self.vm,
            repository=self.repository,
            snapshot_moid=snapshot_moid,
            point=point,
            mode=mode,
            transports=["nbdssl"],
            vddk_libdir=self.vddk_libdir,
            nfc_port=self.nfc_port,
            io_timeout=_TIMEOUT,
            **options,
        )
        return export_point(request, check_mode=False)

    def back_up(
        self,
        point: str,
        mode: str = "auto",
        while_frozen: Optional[Callable[[], None]] = None,
        force: bool = False,
    ) -> Optional[Dict[str, Any]]:
        """All of role vm_backup: the manifest, or None if the point was complete.

        :param force: after a kill that nobody but the test knows of.
        :param while_frozen: called between the snapshot and the export.
        """
        run_id = new_run_id()
        run = self.recover(begin=True, point=point, run_id=run_id, force=force)["run"]
        if run["complete"]:
            self.recover(run_id=run_id)
            return None
        try:
            self.track(run_id)
            self.snapshot(True, run_id=run_id)
            if while_frozen is not None:
                while_frozen()
            return dict(self.export(point, None, mode, run_id=run_id)["point"])
        finally:
            try:
                self.snapshot(False, run_id=run_id)
            finally:
                self.recover(run_id=run_id)

    # Role vm_restore

    def restore_to_files(self, point: str, dest: str, **options: Any) -> Dict[str, Any]:
        """Image files of the disks at a point."""
        request = RestoreRequest(
            repository=self.repository, vm_uuid=self.uuid, point=point, target="file", dest=dest, **options
        )
        return to_file.restore_point(request, check_mode=False)

    def restore_in_place(self, point: str, **options: Any) -> Dict[str, Any]:
        """The machine's own disks hold a point again."""
        request = RestoreRequest(
            repository=self.repository,
            vm_uuid=self.uuid,
            point=point,
            target="in_place",
            overwrite=True,
            connection=Connection(**self.connection),
            vm=self.vm,
            transports=["nbdssl"],
            vddk_libdir=self.vddk_libdir,
            nfc_port=self.nfc_port,
            io_timeout=_TIMEOUT,
            **options,
        )
        return in_place.restore_point(request, check_mode=False)
