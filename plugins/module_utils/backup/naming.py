# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The virtual machine itself names the point that its disks had last (proofs 16 to 21).

The name lies where the disk's own configuration lies, so whatever takes the machine back in time (a revert, an array's
rollback) or makes another of it (a replica, a clone) takes the name along. What it says is read with the snapshot that
is backed up, and written after the point is there, while that snapshot still proves what the name says.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ..errors import RepositoryError, VadpError, VsphereError
from ..repository.chain import ABSENT, NAMED, TWICE, UNKNOWN, Names
from ..repository.store import VmStore
from ..repository.manifest import disk_of
from ..repository.shapes import SERVER_PATTERN
from ..vsphere import vm_keys
from ..vsphere.disks import Disk
from ..vsphere.inventory import VmRef
from ..vsphere.session import Session
from ..vsphere.snapshots import snapshots_of
from ..vsphere.vm_keys import ConcurrentChange, VmKeys

_STATES = {"named": NAMED, "absent": ABSENT, "foreign": ABSENT}
_ATTEMPTS = 5
_FOREVER = "Its points are then built upon as long as change tracking alone shows nothing wrong."


@dataclass(frozen=True)
class Naming:
    """What the virtual machine says of itself, and whether it can be told what comes.

    :param keys: as the snapshot holds them, or (*from_vm*) as the machine does, where the snapshot's are not filled.
    :param writes: whether points are named. :param problem: why not, if the user must know.
    """

    server_uuid: str
    keys: VmKeys
    writes: bool
    from_vm: bool = False
    problem: Optional[str] = None

    def names(self, repository_id: Optional[str], disks: Sequence[Disk]) -> Names:
        """For the decision on the chain. :param disks: all of the machine."""
        known = vm_keys.identified(disks)
        states: Dict[int, Tuple[str, Optional[str]]] = {}
        for disk in disks:
            if disk.uuid and disk.key not in known:
                states[disk.key] = (TWICE, None)
            elif disk.uuid and repository_id is not None:
                states[disk.key] = self._state(repository_id, known[disk.key])
        return Names(self.server_uuid, states)

    def _state(self, repository_id: str, disk_uuid: str) -> Tuple[str, Optional[str]]:
        found, content_id = self.keys.naming(repository_id, disk_uuid)
        state = _STATES.get(found, UNKNOWN)
        return state, content_id if state == NAMED else None


def look(session: Session, vm: VmRef, settings: Sequence[Any], wanted: bool) -> Naming:
    """Read what the machine says, and whether its user may write it. Nothing is touched.

    :param settings: the snapshot's advanced settings (:func:`..vsphere.snapshots.snapshot_config`); empty for a
        template, where there is no snapshot yet (check mode), and where they are not filled in.
    :param wanted: whether names are wanted at all.
    :raises VsphereError: the server does not say which one it is.
    """
    server = _server(session)
    if vm.template:
        return Naming(server, VmKeys({}, vm.instance_uuid), False)
    keys = VmKeys.of(settings, vm.instance_uuid)
    from_vm = not keys.readable
    if from_vm:
        keys = vm_keys.read(session, vm)[0]
    problem = _privilege_problem(session, vm) if wanted else None
    return Naming(server, keys, wanted and problem is None, from_vm, problem)


def _server(session: Session) -> str:
    """:raises VsphereError: a point that is nobody's can't be put in order with others (proofs 22)."""
    found = session.server_uuid
    if found is None or not re.fullmatch(SERVER_PATTERN, found):
        raise VsphereError(
            "The server does not say which one it is",
            subject=session.connection.address,
            reason=f"its UUID is {found!r}",
            remedy="See that the user may read the hardware of the host (System.Read), or connect to the vCenter",
        )
    return found


def _privilege_problem(session: Session, vm: VmRef) -> Optional[str]:
    try:
        answer = session.call(
            session.content.authorizationManager.HasPrivilegeOnEntities,
            [vm.obj],
            session.key,
            [vm_keys.PRIVILEGE],
            what="The user's privileges were not read",
            idempotent=True,
        )
    except VsphereError as error:
        return f"The restore point will not be named in the VM: {error} {_FOREVER}"
    granted = {one.privId for item in answer or () for one in item.privAvailability if one.isGranted}
    if vm_keys.PRIVILEGE in granted:
        return None
    return (
        f"The restore point will not be named in the VM: the user lacks the privilege {vm_keys.PRIVILEGE} on {vm}."
        f" {_FOREVER} A rollback by the storage array, or a replica in another vCenter, is not noticed."
    )


def require_same_keys(session: Session, vm: VmRef, naming: Naming, repository_id: str, disks: Sequence[Disk]) -> None:
    """Before the commit, where the snapshot's settings were not filled: what the decisions stand on still holds
    (proofs 20).

    :raises VsphereError: the names of these disks are other ones by now.
    """
    if not naming.from_vm or vm.template:
        return
    now = vm_keys.read(session, vm)[0]
    uuids = vm_keys.identified(disks).values()
    if any(now.naming(repository_id, uuid) != naming.keys.naming(repository_id, uuid) for uuid in uuids):
        raise VsphereError(
            "The virtual machine's names of its points changed while it was read",
            subject=str(vm),
            reason="another run, a restore or a revert was at work meanwhile",
            remedy="Run again",
        )


def is_current_or_ancestor(info: Any, moid: Optional[str], created: Optional[str] = None) -> bool:
    """Whether what the machine runs on stands on a snapshot: it was not reverted to before that since. Pure.

    :param info: ``vm.snapshot``. :param created: the snapshot's creation time; a moid may be used again.
    """
    known = {snapshot.moid: snapshot for snapshot in snapshots_of(info)}
    if moid not in known or created not in (None, known[moid].created):
        return False
    at = info.currentSnapshot._moId if info is not None and info.currentSnapshot is not None else None
    seen = set()
    while at in known and at not in seen:
        if at == moid:
            return True
        seen.add(at)
        at = known[at].parent_moid
    return False


def wanted_keys(manifest: Dict[str, Any], keys: VmKeys) -> Dict[str, str]:
    """What the machine has to say once the point is there. Pure.

    Nothing where nothing changed on any disk since the point that it names: that one is as good a parent, and a
    reconfiguration costs the machine an event (proofs 21).
    """
    repository_id, changes, needed = manifest["repository_id"], {}, False
    for disk in manifest["disks"]:
        if not disk["named_in_vm"] or not disk["uuid"]:
            continue
        key = vm_keys.id_key(repository_id, disk["uuid"])
        value = vm_keys.id_value(manifest["vm_uuid"], disk["content_id"])
        if keys.raw.get(key) == value:
            continue
        changes[key] = value
        unchanged = disk["parent_content_id"] is not None and not disk["areas"] and not disk["bytes_read"]
        if not unchanged or keys.naming(repository_id, disk["uuid"]) != ("named", disk["parent_content_id"]):
            needed = True
    return changes if needed else {}


def write_names(
    session: Session, vm: VmRef, manifest: Dict[str, Any], sleep: Callable[[float], None] = time.sleep
) -> Tuple[bool, Optional[str]]:
    """Name a point that is in the repository; its snapshot is still there.

    :returns: whether something was written, and why the point is not named, for people. The point is good either way:
        the next one is a full then.
    """
    if not any(disk["named_in_vm"] for disk in manifest["disks"]):
        return False, None
    snapshot = manifest["snapshot"]
    try:
        for attempt in range(_ATTEMPTS):
            values = session.read(vm.obj, *vm_keys.PATHS, "snapshot")
            keys, version = vm_keys.of_values(values)
            if not keys.readable:
                return False, _unnamed(manifest, "its advanced settings can't be read")
            changes = wanted_keys(manifest, keys)
            if not changes:
                return False, None
            if not is_current_or_ancestor(values["snapshot"], snapshot["moid"], snapshot["created"]):
                return False, _unnamed(
                    manifest, "its snapshot is gone, or the machine was reverted to an earlier one meanwhile"
                )
            try:
                vm_keys.write(session, vm, changes, version, what="The restore point was not named in the VM")
                return True, None
            except ConcurrentChange:
                if attempt + 1 == _ATTEMPTS:
                    raise
                sleep(min(2.0**attempt, 10.0))
    except VadpError as error:
        return False, _unnamed(manifest, str(error).rstrip("."))
    return False, None


def _unnamed(manifest: Dict[str, Any], reason: str) -> str:
    return f"Restore point {manifest['point']} is complete, but the VM does not name it: {reason}. The next is a full."


# Whose folder it is


def require_own_folder(
    store: VmStore, points: Sequence[Dict[str, Any]], vm: VmRef, naming: Naming, disks: Sequence[Disk]
) -> None:
    """:raises RepositoryError: the points of this UUID are those of another virtual machine, on another server.

    A replica has the disks of the machine that it was made of, and names its points.
    """
    others = [point for point in points if point.get("server_uuid") not in (None, naming.server_uuid)]
    if not others or any(point.get("server_uuid") == naming.server_uuid for point in points):
        return
    uuids = {disk.uuid.lower() for disk in disks if disk.uuid}
    stored = [disk for point in others for disk in point["disks"]]
    if any(disk["uuid"] and disk["uuid"].lower() in uuids for disk in stored):
        return
    ids = {disk["content_id"] for disk in stored}
    if any(naming.keys.naming(store.repository.id, uuid)[1] in ids for uuid in uuids):
        return
    other = others[-1]
    raise RepositoryError(
        "Two virtual machines have one instance UUID, and would share a folder of the repository",
        subject=store.uuid,
        reason=f"'{other['vm_name']}' ({other['vm_moid']}) of server {other['server_uuid']} has points here, and none"
        f" of its disks is one of '{vm.name}' ({vm.moid}) of server {naming.server_uuid}",
        remedy="Give one of them an instance UUID of its own, or back it up into another repository",
    )


def require_own_point(store: VmStore, manifest: Dict[str, Any], server_uuid: Optional[str]) -> None:
    """A point that is there already is not a backup of a replica, or of the original, on another server.

    :raises RepositoryError: the point of that name was made from another server.
    """
    made_from = manifest.get("server_uuid")
    if made_from not in (None, server_uuid):
        raise RepositoryError(
            "The restore point's name is taken, and nothing was backed up",
            subject=f"{manifest['point']} of {store.shown}",
            reason=f"it was made from server {made_from}, and {server_uuid} is connected",
            remedy="Give the point another name, one that says which site it is of",
        )


def names_elsewhere(points: Sequence[Dict[str, Any]], keys: VmKeys, repository_id: str) -> List[str]:
    """Keys by which the machine names content of this repository that is not here: it is a copy of another one, or lost
    points (proofs 3). Then its records are no ground to remove anything. Pure."""
    here = {disk.get("content_id") for point in points for disk in point["disks"]}
    found = []
    for key in keys.id_keys_of(repository_id):
        state, content_id = keys.naming(repository_id, key.rpartition(".")[2])
        if state == "named" and content_id not in here:
            found.append(key)
    return found


# Retired repositories


def forget_repository(session: Session, vm: VmRef, repository_id: str, check_mode: bool) -> List[str]:
    """Remove what a machine says of the points of one repository; never a mark of a restore (proofs 21).

    :returns: the names of the keys, those that would be removed in check mode.
    """
    removed: List[str] = []

    def decide(keys: VmKeys) -> Mapping[str, str]:
        if not keys.readable:
            raise VsphereError(
                "The keys in the virtual machine can't be read",
                subject=str(vm),
                remedy="See that the user may read its configuration (System.Read)",
            )
        removed[:] = keys.id_keys_of(repository_id)
        return {} if check_mode else dict.fromkeys(removed, "")

    vm_keys.update(session, vm, decide, what="The keys of the repository were not removed")
    return removed


def pin(points: Sequence[Dict[str, Any]], parent: Optional[str], key: int) -> Tuple[Optional[str], Optional[str]]:
    """(content ID, hash) of the layer that a disk's next one stands on."""
    manifest = next((point for point in points if point["point"] == parent), None)
    entry = None if manifest is None else disk_of(manifest, key)
    return (None, None) if entry is None else (entry.get("content_id"), entry["layer"]["blake3"])
