# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The shape of an intent: what a run says of a thing that it may leave behind.

Records are hints, and anybody may have written them. What acts on an intent finds here that each field is of its type.
"""

from __future__ import annotations

from typing import Any, Dict

from .shapes import Shape, boolean, integer, list_of, nullable, one_of, record, text, time

_NAME, _MAYBE = text(), nullable(text())
# As somebody else has named it, or as an error says it.
_WORDS = nullable(text(empty=True))
_NUMBER, _NUMBERS = integer(), list_of(integer())
_DISK = record({"key": _NUMBER, "uuid": _MAYBE, "file": _MAYBE, "capacity_bytes": _NUMBER})
_RESTORE: Dict[str, Shape] = {
    "target": _NAME,
    "name": _NAME,
    "instance_uuid": _NAME,
    "folder": _NAME,
    "folder_moid": _NAME,
    "in_vapp": boolean,
    "on_failure": _NAME,
    "complete": boolean,
    "leased": boolean,
    "vm_uuid": _MAYBE,
    "vm_moid": _MAYBE,
    "point": _MAYBE,
    "point_vm": _MAYBE,
    "disks": _NUMBERS,
    "half_written": _NUMBERS,
    "made_disks": nullable(list_of(_DISK)),
}
# As a restore to a new machine calls its target; it needs more to be found.
_NEW_VM = "new_vm"
_NEW_MACHINE = record({name: _RESTORE[name] for name in ("name", "instance_uuid", "folder_moid", "vm_moid")})

#: What each kind has, and may have.
_KINDS: Dict[str, Shape] = {
    "snapshot": record({}, {"name": _WORDS, "moid": _MAYBE, "vm_moid": _MAYBE, "server_uuid": _MAYBE}),
    "process": record({"pid": integer(1), "start_time": _NUMBER}, {"name": _NAME, "told": boolean}),
    "attachment": record(
        {"file": _NAME, "proxy_moid": _NAME},
        {
            "server_uuid": _MAYBE,
            "proxy_uuid": _WORDS,
            "disk_uuid": _MAYBE,
            "vm_moid": _MAYBE,
            "vm_uuid": _WORDS,
            "access": _NAME,
            "method": _NAME,
            "device_key": nullable(_NUMBER),
        },
    ),
    "access": record({"identity": _NAME, "vm_moid": _NAME}, {"problem": _WORDS}),
    "temporary_file": record({}, {"key": _NUMBER, "stage": _NAME, "files": list_of(_NAME), "lease": _MAYBE}),
    "restore": record({}, _RESTORE),
    "task": record({"task": _NAME}, {"failed": _WORDS, "subject": _WORDS, "server_uuid": _MAYBE}),
}
INTENTS = tuple(_KINDS)

#: Of any format.
COMMON = record({"id": integer(1), "what": one_of(*INTENTS), "recorded": time})


def check_intent(value: Any, where: str) -> None:
    """:raises ShapeError: it is not an intent that the collection writes."""
    COMMON(value, where)
    _KINDS[value["what"]](value, where)
    if value["what"] == "restore" and value.get("target") == _NEW_VM:
        _NEW_MACHINE(value, where)
