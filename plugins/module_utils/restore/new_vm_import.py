# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The disks of a new virtual machine by its import lease: packed one after the other, sent, and read back."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple

from ..datapath import image
from ..datapath.progress import Progress
from ..errors import TransportError, VadpError
from ..repository.names import PART
from ..repository.store import VmStore
from ..repository.runs import Run
from ..transport.https import Lease
from ..transport.import_lease import Upload, import_machine
from ..transport.opener import OpenContext
from ..transport.planner import READ, Plan, ProxyFacts
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.placement import Placement
from ..vsphere.session import Session
from .dest import require_room
from .disk_write import WHOLE, plan_targets, read_back
from .point import Point, PointDisk
from .request import RestoreRequest

_Pairs = List[Tuple[PointDisk, Disk]]


class Import:
    """One machine that comes so."""

    def __init__(
        self,
        session: Session,
        point: Point,
        store: VmStore,
        run: Run,
        intent: int,
        request: RestoreRequest,
        progress: Progress,
    ) -> None:
        self.session = session
        self.point = point
        self.store = store
        self.run = run
        self.intent = intent
        self.request = request
        self.progress = progress
        self._sent: Dict[int, Tuple[int, float]] = {}  # key in the point -> bytes, seconds

    @contextmanager
    def open(self, placement: Placement, spec: Any) -> Iterator[Tuple[VmRef, Lease]]:
        """The machine and the lease that makes it: left without an error it stays, otherwise vSphere removes it.

        :raises VadpError: there is no room to pack a disk; the machine was not made.
        """
        for disk in self.point.disks:
            require_room(str(self.store.work_path), [disk], self.point)
        with import_machine(self.session, placement, spec, io_timeout=self.request.io_timeout) as lease:
            yield find_vm(self.session, moid=lease.entity._moId), lease
            lease.complete()

    def upload(self, lease: Lease, pairs: _Pairs) -> None:
        """All disks, each whole. :raises TransportError: one could not be sent."""
        lease.shares = dict.fromkeys((disk.key for _source, disk in pairs), 0.0)
        for source, disk in pairs:
            begun = time.monotonic()
            self.run.update(self.intent, half_written=[disk.key])
            stage = self.store.work_path / f"restore-{source.key}{PART}{self.run.run_id}"
            try:
                self._pack(source, stage)
                size = self._send(source, disk, stage, lease)
            except VadpError as error:
                name = f"disk '{source.label}'"
                error.subject = f"{name}: {error.subject}" if error.subject else name
                raise
            finally:
                with suppress(FileNotFoundError):
                    stage.unlink()
            self._sent[source.key] = size, time.monotonic() - begun

    def _pack(self, source: PointDisk, stage: Path) -> None:
        report = self.progress.disk(source.key, f"{source.label}, packed", source.capacity_bytes)
        state = "failed"
        try:
            image.convert(source.layer, str(stage), "vmdk_stream", part_id=self.run.run_id, on_progress=report.update)
            state = "done"
        finally:
            report.finish(state)

    def _send(self, source: PointDisk, disk: Disk, stage: Path, lease: Lease) -> int:
        report = self.progress.disk(source.key, source.label, stage.stat().st_size)
        state = "failed"
        try:
            upload = Upload(
                self.session,
                lease,
                disk,
                stage,
                io_timeout=self.request.io_timeout,
                rate_limit=self.request.rate_limit,
                on_progress=lambda done, _total: report.update(done),
            )
            upload.run()
            state = "done"
        finally:
            report.finish(state)
        return upload.size

    def results(
        self,
        vm: VmRef,
        pairs: _Pairs,
        plans: Mapping[int, Plan],
        context: Callable[[ProxyFacts], OpenContext],
        warnings: List[str],
    ) -> List[Dict[str, Any]]:
        """What came where, read back by whatever reads the disks of a machine that is off.

        :param warnings: gets the disks that nothing can read back.
        :raises DataPathError: a disk holds other bytes.
        """
        unread = self._read_back(vm, pairs, context) if self.request.verify else {}
        for key, why in unread.items():
            warnings.append(f"Disk {key} was not read back: {why}")
        entries = []
        for source, disk in pairs:
            chosen = plans[source.key]
            size, seconds = self._sent[source.key]
            entries.append(
                {
                    "key": source.key,
                    "label": source.label,
                    "target": f"{vm.name}/{disk.label}",
                    "format": None,
                    "transport": chosen.chosen,
                    "method": chosen.method,
                    "transport_reasons": chosen.reasons(),
                    "transport_notes": chosen.notes(chosen.chosen),
                    "bytes_read": source.capacity_bytes,
                    "bytes_written": size,
                    "seconds": round(seconds, 3),
                    "verified": True if self.request.verify and source.key not in unread else None,
                    "verification": WHOLE if self.request.verify and source.key not in unread else None,
                    "sampled_percent": None,
                    "changed_only": False,
                    "reason": "its whole content was written",
                }
            )
        return entries

    def _read_back(self, vm: VmRef, pairs: _Pairs, context: Callable[[ProxyFacts], OpenContext]) -> Dict[int, str]:
        """Key of a disk that could not be read -> why."""
        unread = {}
        for source, disk in pairs:
            notes: List[str] = []
            try:
                targets, proxy = plan_targets(self.session, vm, [(source, disk)], self.request, READ)
                notes = [
                    note for item in targets[0].transport.usable() for note in item.notes if note.startswith("not by")
                ]
                read_back(self.point, targets[0], self.store, context(proxy), self.intent, self.request, self.progress)
            except TransportError as error:
                unread[source.key] = "; ".join([*notes, error.what + (f": {error.reason}" if error.reason else "")])
        return unread
