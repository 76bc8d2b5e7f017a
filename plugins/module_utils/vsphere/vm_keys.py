# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The keys that a VM carries for us in ``config.extraConfig`` (VADP facts 53 and 54; proofs 10, 11, 16, 20).

=============================================  =======================================================================
``openvadp.mark.<disk uuid>``                  ``1:<vm uuid>:<run id>:writing|done:<first part of the change ID>``
``openvadp.id.<repository id>.<disk uuid>``    ``1:<vm uuid>:<content id>``
``openvadp.new.<repository id>``               ``<run id>``, of a machine that a restore makes
=============================================  =======================================================================

They are read with the version of the configuration, and written only if that is still the present one: a
compare-and-set. What can't be understood is never taken for "no key".
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from ..errors import ConnectionLostError, InputError, PrivilegeError, TaskError, VsphereError
from ..libraries import vim
from . import faults
from .inventory import VmRef
from .session import Session

FORMAT = "1"
PRIVILEGE = "VirtualMachine.Config.AdvancedConfig"
#: What :func:`read` asks for, for callers that read more with it.
PATHS = ("config.extraConfig", "config.changeVersion", "config.instanceUuid")

#: States of a mark: the disks are being written; they are whole, but the reset of change tracking was not proved.
WRITING, DONE = "writing", "done"
#: A mark in a format that is not ours to read, or advanced settings that could not be read: it may be any of both.
UNKNOWN = "unknown"

_OURS = "openvadp."
_MARK, _ID, _NEW = "openvadp.mark.", "openvadp.id.", "openvadp.new."
_NAME = re.compile(r"[a-z0-9-]+")
_VALUE = re.compile(r"[a-z0-9:.-]{1,200}")
_CONTENT_ID = re.compile(r"[0-9a-f]{32}")
_FIRST_PART = re.compile(r"[a-z0-9.-]{1,96}")
_NO_FIRST_PART = "-"


class ConcurrentChange(VsphereError):
    """The configuration is not the one that was read: read it again, and decide again."""


# Names and values


def is_ours(key: str) -> bool:
    """Whether an advanced setting is one of ours, of whatever version."""
    return key.lower().startswith(_OURS)


def mark_key(disk_uuid: str) -> str:
    """The name of the mark on a disk. :raises InputError: that is not a UUID."""
    return _MARK + _part(disk_uuid, "disk UUID")


def id_key(repository_id: str, disk_uuid: str) -> str:
    """The name of what a repository's newest point of a disk is. :raises InputError: one of both is not a UUID."""
    return f"{_ID}{_part(repository_id, 'repository ID')}.{_part(disk_uuid, 'disk UUID')}"


def new_key(repository_id: str) -> str:
    """The name of what a restore puts on a machine that it makes. :raises InputError: that is not a UUID."""
    return _NEW + _part(repository_id, "repository ID")


def _part(text: str, what: str) -> str:
    lowered = str(text).lower()
    if not _NAME.fullmatch(lowered) or len(lowered) > 64:
        raise InputError(f"A key in the virtual machine can't be named after this {what}", subject=repr(text)[:100])
    return lowered


def first_part(change_id: Optional[str]) -> Optional[str]:
    """What names the tracking in a change ID (VADP facts 4), as it stands in a mark; None where there is none.

    A first part that does not fit into a value is told by its hash: it is only ever compared.
    """
    prefix, slash, number = (change_id or "").rpartition("/")
    if not (slash and prefix and number):
        return None
    text = prefix.replace(" ", "").lower()
    if _FIRST_PART.fullmatch(text) and text != _NO_FIRST_PART:
        return text
    return "sha256-" + hashlib.sha256(prefix.encode()).hexdigest()


def mark_value(vm_instance_uuid: str, run_id: str, state: str, change_id: Optional[str]) -> str:
    """The value of a mark.

    :param state: ``WRITING`` or ``DONE``.
    :param change_id: the disk's present one; None where its tracking is off.
    """
    if state not in (WRITING, DONE):
        raise ValueError(f"a mark is not {state}")
    vm_uuid, run = _part(vm_instance_uuid, "instance UUID"), run_id.lower()
    return _checked(f"{FORMAT}:{vm_uuid}:{run}:{state}:{first_part(change_id) or _NO_FIRST_PART}")


def id_value(vm_instance_uuid: str, content_id: str) -> str:
    """The value that names the content of a disk's newest point."""
    if not _CONTENT_ID.fullmatch(content_id):
        raise ValueError(f"{content_id!r} is not a content ID")
    return _checked(f"{FORMAT}:{_part(vm_instance_uuid, 'instance UUID')}:{content_id}")


def new_value(run_id: str) -> str:
    """The value on a machine that this run makes."""
    return _checked(run_id.lower())


def _checked(value: str) -> str:
    if not _VALUE.fullmatch(value):
        raise ValueError(f"{value!r} can't be a key's value")
    return value


def identified(disks: Iterable[Any]) -> Dict[int, str]:
    """Device key -> UUID in lower case of the disks that a key can be about.

    A disk without a UUID is not among them, nor are several of one UUID: a key would be about any of them.

    :param disks: objects with ``key`` and ``uuid``; all of the virtual machine, or two of one UUID are not seen.
    """
    found = [(disk.key, disk.uuid.lower()) for disk in disks if disk.uuid and _NAME.fullmatch(disk.uuid.lower())]
    often = Counter(uuid for _key, uuid in found)
    return {key: uuid for key, uuid in found if often[uuid] == 1}


def mark_name(disk: Any) -> str:
    """What the mark on a disk is named after: its UUID; where it has none its device key, as long as it stays there.

    Two disks of one UUID have one mark, which is about both.
    """
    uuid = (disk.uuid or "").lower()
    return uuid if _NAME.fullmatch(uuid) and len(uuid) <= 64 else f"key-{disk.key}"


# Reading


@dataclass(frozen=True)
class Mark:
    """What a virtual machine says of a disk that a restore has written, or writes.

    :param state: ``WRITING``, ``DONE``, or ``UNKNOWN``: then nothing else is known.
    :param first_part: as of :func:`first_part`, from before the restore; None where there was none.
    :param foreign: it names another virtual machine: this one is a clone, or got a new instance UUID.
    """

    state: str
    run_id: str = ""
    first_part: Optional[str] = None
    vm_instance_uuid: str = ""
    foreign: bool = False

    def in_force(self, change_id: Optional[str]) -> bool:
        """Whether it is about the disk as it is.

        A clone inherits the key, but has a tracking of its own; a machine of a new instance UUID has the tracking
        that was spoilt.

        :param change_id: the disk's present one.
        """
        if not self.foreign or self.state == UNKNOWN:
            return True
        now = first_part(change_id)
        return now is None or self.first_part is None or now == self.first_part


@dataclass(frozen=True)
class VmKeys:
    """Our keys as a list of advanced settings holds them.

    :param raw: name in lower case -> value.
    :param readable: the list was there. A real machine always has settings: none at all means that they were not
        filled in, or may not be read.
    """

    raw: Mapping[str, str]
    vm_instance_uuid: str
    readable: bool = True
    _twice: Tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, extra_config: Optional[Sequence[Any]], vm_instance_uuid: Optional[str]) -> VmKeys:
        """The keys in ``config.extraConfig`` of a virtual machine or of a snapshot."""
        raw: Dict[str, str] = {}
        twice = []
        for option in extra_config or ():
            key = str(option.key).lower()
            if not is_ours(key):
                continue
            value = "" if option.value is None else str(option.value)
            if raw.setdefault(key, value) != value:
                twice.append(key)
        return cls(raw, (vm_instance_uuid or "").lower(), bool(extra_config), tuple(twice))

    def mark(self, disk_uuid: str) -> Optional[Mark]:
        """The mark on a disk; None where there is none, and the settings could be read."""
        key = mark_key(disk_uuid)
        if not self.readable or key in self._twice:
            return Mark(UNKNOWN)
        value = self.raw.get(key, "")
        return _mark_of(value, self.vm_instance_uuid) if value else None

    def marks_of(self, disks: Iterable[Any]) -> Dict[int, Mark]:
        """Device key -> the mark on that disk, where it has one that is in force.

        :param disks: objects with ``key``, ``uuid`` and the present ``change_id``.
        """
        found = {}
        for disk in disks:
            mark = self.mark(mark_name(disk))
            if mark is not None and mark.in_force(disk.change_id):
                found[disk.key] = mark
        return found

    def content_id(self, repository_id: str, disk_uuid: str) -> Optional[str]:
        """The content ID that this virtual machine names for a disk, in a repository.

        None where it names none, where the name is a clone's inheritance, is in another format, or was not readable:
        in none of these cases does a point fit (see :meth:`naming`).
        """
        state, content_id = self.naming(repository_id, disk_uuid)
        return content_id if state == "named" else None

    def naming(self, repository_id: str, disk_uuid: str) -> Tuple[str, Optional[str]]:
        """(state, content ID): ``named``; ``absent``; ``foreign``, of another instance UUID; ``unknown`` (None): the
        settings can't be read, or the value is in another format."""
        key = id_key(repository_id, disk_uuid)
        if not self.readable or key in self._twice:
            return UNKNOWN, None
        value = self.raw.get(key, "")
        if not value:
            return "absent", None
        parts = value.split(":")
        if (
            len(parts) != 3
            or parts[0] != FORMAT
            or not _NAME.fullmatch(parts[1])
            or not _CONTENT_ID.fullmatch(parts[2])
        ):
            return UNKNOWN, None
        return ("named" if self._is_own(parts[1]) else "foreign"), parts[2]

    def id_keys(self, disk_uuids: Iterable[str]) -> List[str]:
        """The names of the content IDs of all repositories for these disks, whatever their values."""
        wanted = {uuid.lower() for uuid in disk_uuids}
        return sorted(key for key in self.raw if key.startswith(_ID) and key.rpartition(".")[2] in wanted)

    def id_keys_of(self, repository_id: str) -> List[str]:
        """The names of one repository's content IDs for all disks."""
        prefix = f"{_ID}{_part(repository_id, 'repository ID')}."
        return sorted(key for key in self.raw if key.startswith(prefix))

    def _is_own(self, vm_uuid: str) -> bool:
        return bool(self.vm_instance_uuid) and vm_uuid == self.vm_instance_uuid


def _mark_of(value: str, vm_instance_uuid: str) -> Mark:
    parts = value.split(":")
    if len(parts) != 5 or parts[0] != FORMAT or parts[3] not in (WRITING, DONE) or not all(parts):
        return Mark(UNKNOWN)
    return Mark(
        state=parts[3],
        run_id=parts[2],
        first_part=None if parts[4] == _NO_FIRST_PART else parts[4],
        vm_instance_uuid=parts[1],
        foreign=not vm_instance_uuid or parts[1] != vm_instance_uuid,
    )


def strip(extra_config: Optional[Iterable[Any]]) -> List[Any]:
    """Advanced settings without ours: a saved configuration must not bring back what was true of another machine."""
    return [option for option in extra_config or () if not is_ours(str(option.key))]


def of_values(values: Mapping[str, Any]) -> Tuple[VmKeys, str]:
    """:func:`read` of properties that were read already; they hold at least ``PATHS``."""
    keys = VmKeys.of(values["config.extraConfig"], values["config.instanceUuid"])
    return keys, str(values["config.changeVersion"] or "")


def read(session: Session, vm: VmRef) -> Tuple[VmKeys, str]:
    """A virtual machine's keys, and the version of the configuration that they stand in; one call."""
    return of_values(session.read(vm.obj, *PATHS))


# Writing


def write(
    session: Session,
    vm: VmRef,
    changes: Mapping[str, str],
    change_version: str,
    *,
    what: str = "The keys were not written into the virtual machine",
    timeout: float = 600,
) -> str:
    """Set or, with an empty value, remove keys in one reconfiguration, and read them back.

    :param change_version: of the configuration that was read; nothing is written if it is another one by now.
    :returns: the version that the configuration has now.
    :raises ConcurrentChange: the configuration is another one by now: read it again and decide again.
    :raises PrivilegeError: the user lacks ``VirtualMachine.Config.AdvancedConfig``.
    :raises VsphereError: it failed, or the keys are not what was written.
    """
    for key, value in changes.items():
        if not is_ours(key) or key != key.lower() or (value and not _VALUE.fullmatch(value)):
            raise ValueError(f"{key}={value!r} is not ours to write")
    if not change_version:
        # Without it the server would not compare anything.
        raise VsphereError(what, subject=str(vm), reason="the server reports no version of its configuration")
    options = [vim.option.OptionValue(key=key, value=value) for key, value in sorted(changes.items())]
    spec = vim.vm.ConfigSpec(changeVersion=change_version, extraConfig=options)

    def written() -> Optional[str]:
        keys, version = read(session, vm)
        holds = keys.readable and all(keys.raw.get(key, "") == value for key, value in changes.items())
        return version if holds else None

    try:
        compare_and_set(session, vm, spec, what=what, timeout=timeout, done=lambda: written() is not None)
    except PrivilegeError as error:
        if PRIVILEGE not in (error.reason or ""):
            error.reason = f"the user lacks the privilege {PRIVILEGE}"
        raise
    version = written()
    if version is None:
        raise ConcurrentChange(
            what,
            subject=str(vm),
            reason="the task succeeded, but the keys are not what was written: something else changes them",
            remedy="See what else writes the virtual machine's advanced settings, then run again",
            retryable=True,
        )
    return version


def compare_and_set(
    session: Session,
    vm: VmRef,
    spec: Any,
    *,
    what: str,
    timeout: float = 600,
    done: Optional[Callable[[], bool]] = None,
) -> Any:
    """Carry out a reconfiguration whose ``changeVersion`` is set (VADP facts 54); the task's result.

    A busy machine is waited for. What had no answer, or became a task that a restarted vCenter does not know, is asked
    for again: the server carries it out once at most.

    :param done: whether what was wanted is there, asked after an answer was lost.
    :raises ConcurrentChange: the configuration has another version.
    """
    if not spec.changeVersion:
        raise ValueError("there is nothing to compare with")
    deadline = session.clock() + timeout
    busy_until = min(deadline, session.clock() + session.busy_timeout)
    lost, pause = False, 0.5
    while True:
        concurrent = False
        try:
            task = session.call(_concurrent_as_result(vm.obj.ReconfigVM_Task), spec, what=what, subject=str(vm))
            concurrent = isinstance(task, vim.fault.ConcurrentAccess)
            if not concurrent:
                return session.wait(task, what=what, subject=str(vm), timeout=max(deadline - session.clock(), 0))
        except ConnectionLostError:
            if session.clock() >= deadline:
                raise
            lost = True
        except TaskError as error:
            if error.details.get("timed_out"):
                session.leave(task, what, str(vm))
            concurrent = isinstance(error.fault, vim.fault.ConcurrentAccess)
            forgotten = bool(error.details.get("forgotten")) and session.clock() < deadline
            lost = lost or forgotten
            if not (concurrent or forgotten) and not (faults.is_busy(error.fault) and session.clock() < busy_until):
                raise
        if concurrent:
            if lost and done is not None and done():
                return None
            raise _concurrent(what, vm)
        session.sleep(pause)
        pause = min(pause * 2, 10.0)


def _concurrent_as_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """A session takes this fault for a busy machine and asks again; here it is the answer."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except vim.fault.ConcurrentAccess as fault:
            return fault

    return call


def _concurrent(what: str, vm: VmRef) -> ConcurrentChange:
    return ConcurrentChange(
        what,
        subject=str(vm),
        reason="its configuration was changed by something else since it was read",
        remedy="Run again; if it happens again, see what else changes the virtual machine",
        retryable=True,
    )


def update(
    session: Session,
    vm: VmRef,
    decide: Callable[[VmKeys], Mapping[str, str]],
    *,
    what: str = "The keys were not written into the virtual machine",
    attempts: int = 5,
    sleep: Callable[[float], None] = time.sleep,
) -> Tuple[VmKeys, str]:
    """Read, decide, write, and begin again where the configuration changed in between.

    :param decide: what to write, from the keys as they are; nothing is written where it returns nothing. What it
        raises ends it.
    :returns: keys and version as they are in the end.
    :raises ConcurrentChange: the configuration changed each time.
    """
    for attempt in range(attempts):
        keys, version = read(session, vm)
        changes = {key: value for key, value in decide(keys).items() if keys.raw.get(key, "") != value}
        if not changes:
            return keys, version
        try:
            version = write(session, vm, changes, version, what=what)
        except ConcurrentChange:
            if attempt + 1 == attempts:
                raise
            sleep(min(2.0**attempt, 10.0))
            continue
        raw = {**keys.raw, **changes}
        return VmKeys({key: value for key, value in raw.items() if value}, keys.vm_instance_uuid), version
    raise ValueError("attempts is at least 1")
