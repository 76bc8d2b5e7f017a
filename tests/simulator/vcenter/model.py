# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What every managed object of the simulator has: a type, a moid, properties by name; and how it is kept on disk."""

from __future__ import annotations

import base64
import json
import os
import threading
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyVmomi import VmomiSupport, vim, vmodl
from pyVmomi.VmomiSupport import DataObject, ManagedObject, binary

from . import soap

if TYPE_CHECKING:
    from .simulator import Simulator


class SimulatorError(Exception):
    """A test asked for something that makes no sense; the text says what."""


def now() -> datetime:
    return datetime.now(timezone.utc)


# --- property paths -------------------------------------------------------------------------------------------------


def coerce(value: Any, declared: Any) -> Any:
    """A value as it must stand in Any: numbers and lists carry their declared type."""
    if value is None or declared is object:
        return value
    if issubclass(declared, list):
        return value if isinstance(value, VmomiSupport.Array) else soap.array(declared.Item, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return value if value.__class__ is declared else declared(value)


def split_path(path: str) -> list[str]:
    """``a.b["x.y"].c`` into ``a``, ``b["x.y"]``, ``c``."""
    parts, current, depth = [], "", 0
    for ch in path:
        depth += {"[": 1, "]": -1}.get(ch, 0)
        if ch == "." and not depth:
            parts.append(current)
            current = ""
        else:
            current += ch
    return [*parts, current]


def property_value(obj: "Managed", path: str) -> Any:
    """The value at a property path, typed for Any; None when unset, or when only another kind of value would have it.

    :raises InvalidProperty: neither the type nor one that is derived from it has such a property.
    """
    declared: Any = obj.type
    value: Any = obj
    for index, part in enumerate(split_path(path)):
        name, _unused, key = part.partition("[")
        if declared is object and isinstance(value, DataObject):
            declared = type(value)
        try:
            info = (type(value) if isinstance(value, DataObject) else declared)._GetPropertyInfo(name)
        except AttributeError:
            if index and _some_kind_has(declared, name):
                return None
            raise vmodl.query.InvalidProperty(name=path) from None
        declared = info.type
        if value is not None:
            value = value.property(name) if index == 0 else getattr(value, name)
        if key:
            if not issubclass(declared, list):
                raise vmodl.query.InvalidProperty(name=path)
            declared = declared.Item
            wanted = key.rstrip("]").strip('"')
            value = next((item for item in value or () if str(getattr(item, "key", "")) == wanted), None)
    return coerce(value, declared)


def _some_kind_has(declared: Any, name: str) -> bool:
    """Whether a data type that is derived from another has a property."""
    for kind in list(VmomiSupport._dataDefMap):
        found = VmomiSupport.GetVmodlType(kind)
        if issubclass(found, declared) and name in (info.name for info in found._GetPropertyList()):
            return True
    return False


# --- data objects as JSON -------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A vSphere value as plain JSON data; unset fields are left out."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, DataObject):
        result = {"_": VmomiSupport.GetVmodlName(type(value))}
        for info in value._GetPropertyList():
            field = getattr(value, info.name)
            if field is None or (isinstance(field, list) and not field):
                continue
            encoded = to_json(field)
            if info.type is object and isinstance(field, int) and not isinstance(field, bool):
                encoded = {"int": soap._number_name(field), "value": int(field)}
            result[info.name] = encoded
        return result
    if isinstance(value, ManagedObject):
        return {"ref": VmomiSupport.GetWsdlName(type(value)), "moid": value._moId}
    if isinstance(value, datetime):
        return {"time": value.isoformat()}
    if isinstance(value, (binary, bytes)):
        return {"binary": base64.b64encode(value).decode()}
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    raise TypeError(f"can't keep {type(value)}")


def from_json(data: Any) -> Any:
    if isinstance(data, list):
        return [from_json(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "_" in data:
        result = VmomiSupport.GetVmodlType(data["_"])()
        for name, field in data.items():
            if name == "_":
                continue
            value = from_json(field)
            if isinstance(value, list):
                getattr(result, name).extend(value)
            else:
                setattr(result, name, value)
        return result
    if "ref" in data:
        return soap.type_by_name(data["ref"])(data["moid"])
    if "time" in data:
        return datetime.fromisoformat(data["time"])
    if "binary" in data:
        return binary(base64.b64decode(data["binary"]))
    if "int" in data:
        return soap.type_by_name(data["int"])(data["value"])
    return {key: from_json(item) for key, item in data["dict"].items()}


def clone(value: Any) -> Any:
    """A deep copy of a data object, sharing nothing."""
    return from_json(to_json(value))


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
    os.replace(temporary, path)


# --- managed objects ------------------------------------------------------------------------------------------------


class Managed:
    """A managed object.

    A property is a method ``p_<name>`` or else a key of ``props``; anything that neither has is unset.
    """

    type: Any = ManagedObject
    changing_properties = False

    def __init__(self, simulator: "Simulator", moid: str) -> None:
        self.simulator = simulator
        self.moid = moid
        self.props: dict[str, Any] = {}

    @property
    def ref(self) -> Any:
        return self.type(self.moid)

    def property(self, name: str) -> Any:
        getter = getattr(self, f"p_{name}", None)
        if getter is not None:
            return getter()
        return self.props.get(name)


class Entity(Managed):
    """A managed entity of the inventory; kept on disk, one JSON file each.

    ``KEPT`` names the attributes that are kept besides name, parent and props.
    """

    KEPT: tuple[str, ...] = ()

    def __init__(self, simulator: "Simulator", moid: str, name: str, parent: str | None) -> None:
        super().__init__(simulator, moid)
        self.name = name
        self.parent = parent
        self.custom_values: dict[int, str] = {}

    def save(self) -> None:
        """Write this object down and tell whoever waits for updates."""
        self.simulator.inventory.save(self)

    def p_name(self) -> str:
        # A slash, backslash or percent sign in a name is escaped, as vSphere does it.
        return self.name.replace("%", "%25").replace("/", "%2f").replace("\\", "%5c")

    def p_parent(self) -> Any:
        return self.simulator.inventory.get(self.parent).ref if self.parent else None

    def p_overallStatus(self) -> str:
        return "green"

    def p_configStatus(self) -> str:
        return "green"

    def p_configIssue(self) -> Any:
        return soap.array(vim.event.Event)

    def p_effectiveRole(self) -> Any:
        return soap.array(int, [-1])

    def p_permission(self) -> Any:
        return soap.array(vim.AuthorizationManager.Permission)

    def p_disabledMethod(self) -> Any:
        return soap.array(str)

    def p_declaredAlarmState(self) -> Any:
        return soap.array(vim.alarm.AlarmState)

    def p_triggeredAlarmState(self) -> Any:
        return soap.array(vim.alarm.AlarmState)

    def p_alarmActionsEnabled(self) -> bool:
        return True

    def p_tag(self) -> Any:
        return soap.array(vim.Tag)

    def p_value(self) -> Any:
        return self.p_customValue()

    def p_availableField(self) -> Any:
        found = [one for one in self.simulator.custom_fields if one.managedObjectType in (None, self.type)]
        return soap.array(vim.CustomFieldsManager.FieldDef, found)

    def p_customValue(self) -> Any:
        found = [vim.CustomFieldsManager.StringValue(key=key, value=text) for key, text in self.custom_values.items()]
        return soap.array(vim.CustomFieldsManager.Value, found)

    def p_recentTask(self) -> Any:
        return soap.array(vim.Task, [task.ref for task in self.simulator.tasks.of(self.moid)])

    def children(self) -> "list[Entity]":
        return [one for one in self.simulator.inventory.entities.values() if one.parent == self.moid]


class Kept:
    """The folder of JSON files that hold the inventory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, entity: Entity) -> None:
        data = {
            "class": type(entity).__name__,
            "moid": entity.moid,
            "name": entity.name,
            "parent": entity.parent,
            "props": {name: to_json(value) for name, value in entity.props.items()},
            "kept": {name: to_json(getattr(entity, name)) for name in entity.KEPT},
        }
        write_atomically(self.folder / f"{entity.moid}.json", json.dumps(data))

    def remove(self, entity: Entity) -> None:
        with suppress(FileNotFoundError):
            (self.folder / f"{entity.moid}.json").unlink()

    def read_all(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("[!.]*.json"))]
