# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a repository holds of one VM, as it is read: paths, facts and points. None of it needs a lock."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Container, Dict, List, Optional, Sequence, Tuple

from ..datapath.image import read_header
from ..errors import DamagedError, DataPathError, RepositoryError
from . import content, sequence, state, trust
from . import manifest as manifests
from .chain import StoreFacts
from .documents import FACTS_FORMAT, check_facts, names_in, read_json
from .names import LATEST, PART, POINT, check_key, check_point_name, check_uuid, moment_of
from .sequence import newest_before
from .shapes import format_time, parse_time
from .stored import header_problem, stored_problem

if TYPE_CHECKING:
    from .layout import Repository

_NEW_FACTS = "Name the VM by vm_uuid; its next backup writes the file again"


class VmPoints:
    """What a repository holds of one VM: its paths, facts and points, and whether its records may be acted upon."""

    def __init__(self, repository: Repository, uuid: str) -> None:
        self.repository = repository
        self.uuid = check_uuid(uuid)
        self.doubts: List[str] = []

    # Paths. None of them creates anything.

    def _inside(self, *parts: str) -> Path:
        return self.repository.inside("vms", self.uuid, *parts)

    def _work(self, *parts: str) -> Path:
        """Of lock, records, marks and evidence: here, or on this machine where the repository is not written."""
        if self.repository.may_write:
            return self._inside(*parts)
        return self.repository.work_path.joinpath("vms", self.uuid, *parts)

    def _kept_here(self) -> Optional[Path]:
        """What restores from this repository left on this machine while it could not be written, or was elsewhere."""
        folder = state.existing(self.repository.id)
        return None if folder is None else folder / "vms" / self.uuid

    @property
    def path(self) -> Path:
        """The VM's folder."""
        return self._inside()

    @property
    def work_path(self) -> Path:
        """The folder of lock, records and temporary files of a run; the lock's holder finds it made."""
        return self._work()

    @property
    def is_known(self) -> bool:
        """Whether there is anything of this VM, in the repository or of a restore from it on this machine."""
        return os.path.isdir(str(self.path)) or os.path.isdir(str(self.work_path))

    # Doubts (proofs 3)

    @property
    def report_only(self) -> bool:
        """Whether what runs left is reported and not removed: the place is not listed, or see :meth:`doubt`."""
        return self.repository.report_only or bool(self.doubts)

    def doubt(self, reason: str) -> None:
        """Note why this may be a copy, or was rolled back: the VM names what is not here. Recovery only reports."""
        self.doubts.append(reason)

    def disk_folder(self, key: int) -> Path:
        """The folder of a disk's layers."""
        return self._inside(f"disk-{check_key(key)}")

    def layer_path(self, key: int, point: str) -> Path:
        """The qcow2 layer of a disk at a point."""
        return self._inside(f"disk-{check_key(key)}", f"{check_point_name(point)}.qcow2")

    def hashes_path(self, key: int, point: str) -> Path:
        """The hashes of what was read of a disk at a point."""
        return self._inside(f"disk-{check_key(key)}", f"{check_point_name(point)}.hashes")

    def config_path(self, point: str) -> Path:
        """The VM's configuration at a point."""
        return self._inside("configs", f"{check_point_name(point)}.json")

    def nvram_path(self, point: str) -> Path:
        """The VM's NVRAM at a point; there need not be one."""
        return self._inside("configs", f"{check_point_name(point)}.nvram")

    def manifest_path(self, point: str) -> Path:
        """The manifest of a point; it exists if the point does."""
        return self._inside("points", f"{check_point_name(point)}.json")

    def screenshot_path(self, point: str) -> Path:
        """The guest's screen when the point was booted last; there need not be any."""
        return self._work("boots", f"{check_point_name(point)}.png")

    def serial_log_path(self, point: str) -> Path:
        """What the guest said on its serial console when the point was booted last; there need not be any."""
        return self._work("boots", f"{check_point_name(point)}.serial.log")

    @property
    def boot_name(self) -> str:
        """What the folder of sockets is called when a point of this VM is booted: always the same."""
        return f"boot-{self.uuid}"

    @property
    def trust_path(self) -> Path:
        """The marks of disks whose change tracking must not be believed; there need not be any."""
        return self._work("trust.json")

    @property
    def trust_paths(self) -> List[Path]:
        """All files of such marks: the repository's, and what restores noted on this machine."""
        here = self._kept_here()
        return [self._inside("trust.json")] + ([] if here is None else [here / "trust.json"])

    # The VM's facts.

    @property
    def facts(self) -> Dict[str, Any]:
        """vm.json: {format, vm_uuid, name, path, moid, bios_uuid, updated, and since format 2 sequence and
        format1_sequences}; empty if nothing was written yet."""
        path = self._inside("vm.json")
        try:
            facts = read_json(path, "The facts of a virtual machine are damaged", check_facts, _NEW_FACTS, FACTS_FORMAT)
        except FileNotFoundError:
            return {}
        if facts["vm_uuid"] != self.uuid:
            raise DamagedError(
                "The facts of a virtual machine are damaged",
                subject=str(path),
                reason=f"they are of {facts['vm_uuid']}",
                remedy=_NEW_FACTS,
            )
        return facts

    @property
    def name(self) -> Optional[str]:
        """The VM's name when it was last backed up."""
        return self.facts.get("name")

    # The order of the points (proofs 22).

    def _counter(self) -> Tuple[int, Dict[str, int]]:
        """The last number that was given, and those of points of format 1, as far as they were given."""
        try:
            facts = self.facts
        except DamagedError:
            # What was counted shows in manifests and runs too.
            return 0, {}
        return facts.get("sequence", 0), dict(facts.get("format1_sequences", {}))

    def pins_path(self, point: str) -> Path:
        """What a point of format 1 stands on, written down later; it need not be there."""
        return self._inside("points", f"{check_point_name(point)}.pins")

    def pin_problem(self, disk: Dict[str, Any], manifest: Dict[str, Any], parent: Dict[str, Any]) -> Optional[str]:
        """Why a disk of a point does not stand on what it was made upon; None if nothing shows that.

        :param disk: its entry; *parent*: the manifest of its parent, which holds the disk.
        """
        old_pin = None
        if manifest["format"] == manifests.FORMAT_WITHOUT_IDS:
            try:
                old_pin = content.read_pins(self.pins_path(manifest["point"]), manifest).get(str(disk["key"]))
            except DamagedError as error:
                return str(error).rstrip(".")
        return content.pin_problem(disk, manifests.entry_of(parent, disk["key"]), old_pin)

    def sequences(self, readable: Sequence[Dict[str, Any]]) -> Dict[str, int]:
        """{point: number}; of points of format 1 the one that they have, or would get now.

        :param readable: of :meth:`read_points`, all of them.
        """
        numbers = sequence.number_old(readable, self._counter()[1])
        return {**numbers, **{one["point"]: one["sequence"] for one in readable if "sequence" in one}}

    # Points.

    def point_names(self) -> List[str]:
        """The names of all points, sorted; damaged ones too."""
        names = names_in(self._inside("points"))
        stems = [name[: -len(".json")] for name in names if name.endswith(".json")]
        return sorted(stem for stem in stems if POINT.fullmatch(stem) and stem != LATEST and PART not in stem)

    def read_points(self) -> Tuple[List[Dict[str, Any]], Dict[str, RepositoryError]]:
        """The manifests that can be read, oldest first, and why others can't, by point name.

        Oldest first goes by the numbers that the repository gave, neither by a clock nor by the name.
        """
        readable: List[Dict[str, Any]] = []
        problems: Dict[str, RepositoryError] = {}
        for name in self.point_names():
            try:
                readable.append(manifests.load(self.manifest_path(name), self.uuid))
            except FileNotFoundError:
                continue  # removed since it was listed
            except RepositoryError as error:
                problems[name] = error
        known = {} if all("sequence" in manifest for manifest in readable) else self._counter()[1]
        return sequence.in_order(readable, sequence.number_old(readable, known)), problems

    def points(self) -> List[Dict[str, Any]]:
        """The manifests of all points that can be read, oldest first.

        A damaged one is left out: the others can still be restored and built upon. :meth:`read_points` reports it.
        """
        return self.read_points()[0]

    def point(self, name: str) -> Optional[Dict[str, Any]]:
        """The manifest of a point, None if there is no such point. DamagedError: it is there, but damaged."""
        try:
            return manifests.load(self.manifest_path(name), self.uuid)
        except FileNotFoundError:
            return None

    def resolve(self, point: str, server_uuid: Optional[str] = None) -> Dict[str, Any]:
        """The manifest of a point that must exist.

        :param point: its name, ``latest``, or a time (:func:`moment_of`): the point whose snapshot was taken last
            before it, by the server's clock.
        :param server_uuid: the server that is connected (:attr:`..vsphere.session.Session.server_uuid`); None: none.
            The latest point is meant to be one of it.
        :raises RepositoryError: there is none, or the latest one can't be determined: points of several servers, or
            two of one number. DamagedError: it is damaged, or (without a name) another that may be newer is.
        :raises InputError: it is not a time.
        """
        moment = moment_of(point)
        if point != LATEST and moment is None:
            found = self.point(point)
            if found is None:
                names = [manifest["point"] for manifest in self.points()]
                raise RepositoryError(
                    "There is no such restore point",
                    subject=f"{point} of {self.shown}",
                    reason=f"the newest are {', '.join(reversed(names[-5:]))}" if names else "the VM has none",
                    remedy="See restore_point_info",
                )
            return found
        readable, problems = self.read_points()
        untold = "The latest restore point can't be determined" + (
            "" if moment is None else f" before {format_time(moment)}"
        )
        if problems:
            newest = newest_before(sequence.of_server(readable, server_uuid) or [], moment)
            shown = None if newest is None else newest["point"]
            raise DamagedError(
                untold,
                subject=self.shown,
                reason="; ".join(str(error).rstrip(".") for error in problems.values()),
                remedy="Name the point" + (f": the newest that can be read is {shown}" if shown else ""),
            )
        newest = newest_before(self.comparable(readable, untold, server_uuid), moment)
        if newest is not None:
            return newest
        if not readable:
            raise RepositoryError(
                "There is no restore point", subject=self.shown, remedy="Make one with vadp_disk_export"
            )
        oldest = newest_before(readable, None) if moment is None else min(readable, key=_snapshot_time)
        raise RepositoryError(
            "There is no restore point that old",
            subject=f"{point} of {self.shown}",
            reason=f"the oldest is {oldest['point']}, of {oldest['snapshot']['created']}" if oldest else None,
            remedy="See restore_point_info",
        )

    def comparable(
        self, readable: List[Dict[str, Any]], untold: str, server_uuid: Optional[str] = None
    ) -> List[Dict[str, Any]]:
        """Those of the points, oldest first, among which the newest is the one that is meant.

        :param untold: the message if it can't be determined.
        :raises RepositoryError: two have one number; or several servers occur, and none is connected that has points.
        """
        for number, names in sequence.shared_numbers(readable).items():
            raise RepositoryError(
                untold,
                subject=self.shown,
                reason=f"points {' and '.join(names)} have the same number, {number}: folders of several repositories"
                " were put together here",
                remedy="Name the point; and take apart what was put together, so that the order is known again",
            )
        found = sequence.of_server(readable, server_uuid)
        if found is None:
            newest = [f"{one['point']} of server {server}" for server, one in sequence.servers_of(readable).items()]
            raise RepositoryError(
                untold,
                subject=self.shown,
                reason=f"points of several servers are here, and none of them is connected; the newest are"
                f" {', '.join(newest)}",
                remedy="Name the point",
            )
        return found

    @property
    def shown(self) -> str:
        """The VM as messages name it; it never fails."""
        try:
            name = self.name
        except RepositoryError:
            name = None
        return f"VM '{name}' ({self.uuid})" if name else f"VM {self.uuid}"

    def chain_facts(self, keys: Optional[Container[int]] = None) -> StoreFacts:
        """What :func:`.chain.decide` must know besides the manifests: which stored layers can't be built upon, and the
        marks.

        It looks at sizes, headers, pins and content IDs only; restore_point_verify reads all.

        :param keys: device keys of the disks in question; all without it.
        """
        problems: Dict[Tuple[str, int], str] = {}
        points = self.points()
        by_name = {manifest["point"]: manifest for manifest in points}
        for manifest in points:
            for disk in manifest["disks"]:
                if keys is not None and disk["key"] not in keys:
                    continue
                parent = by_name.get(disk["parent"])
                problem = self._layer_problem(manifest, disk, parent)
                if problem is not None:
                    problems[(manifest["point"], disk["key"])] = problem
        return StoreFacts(problems, trust.marks(self))

    def _layer_problem(
        self, manifest: Dict[str, Any], disk: Dict[str, Any], parent: Optional[Dict[str, Any]]
    ) -> Optional[str]:
        """Why a stored layer is not the one of the manifest, or does not stand on the one that it was made upon."""
        point = manifest["point"]
        path = self.layer_path(disk["key"], point)
        problem = stored_problem(path, disk["layer"])
        if problem is not None:
            return problem
        expected = None
        if disk["parent"] is not None:
            entry = None if parent is None else manifests.disk_of(parent, disk["key"])
            if parent is None or entry is None:
                return f"its parent {disk['parent']} is missing or does not hold disk {disk['key']}"
            if entry["capacity_bytes"] != disk["capacity_bytes"]:
                return (
                    f"its parent {disk['parent']} has {entry['capacity_bytes']} bytes, it has {disk['capacity_bytes']}"
                )
            problem = self.pin_problem(disk, manifest, parent)
            if problem is not None:
                return problem
            expected = str(entry["layer"]["file"])
        problem = content.stored_id_problem(self.hashes_path(disk["key"], point), disk)
        if problem is not None:
            return problem
        try:
            return header_problem(read_header(str(path)), disk["capacity_bytes"], expected)
        except (DamagedError, DataPathError) as error:
            return error.reason or error.what

    def stored_problems(self, manifest: Dict[str, Any]) -> List[str]:
        """What is wrong with a point's files, as far as sizes and headers tell; restore_point_verify reads all."""
        point, found = str(manifest["point"]), []
        stored = [(self.config_path(point), manifest["configuration"])]
        if manifest["nvram"] is not None:
            stored.append((self.nvram_path(point), manifest["nvram"]))
        for disk in manifest["disks"]:
            parent = None if disk["parent"] is None else self.point(disk["parent"])
            problem = self._layer_problem(manifest, disk, parent)
            if problem is not None:
                found.append(f"{self.layer_path(disk['key'], point)}: {problem}")
            stored.append((self.hashes_path(disk["key"], point), disk["hashes"]))
        for path, entry in stored:
            problem = stored_problem(path, entry)
            if problem is not None:
                found.append(f"{path}: {problem}")
        return found

    def point_of(self, run_id: str) -> Optional[Dict[str, Any]]:
        """The manifest of the point that a run has made; None if it made none."""
        return next((manifest for manifest in self.points() if manifest["run_id"] == run_id), None)


def _snapshot_time(manifest: Dict[str, Any]) -> datetime:
    return parse_time(manifest["snapshot"]["created"])
