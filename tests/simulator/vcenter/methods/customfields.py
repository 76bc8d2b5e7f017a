# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Custom attributes: the fields that there are, and what stands in them. They are forgotten with the process."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from .. import soap
from ..model import Entity, Managed
from . import Context, find_object, method, service

_FIRST_KEY = 101


@service("CustomFieldsManager")
class CustomFieldsManager(Managed):
    type = vim.CustomFieldsManager

    def p_field(self) -> Any:
        return soap.array(vim.CustomFieldsManager.FieldDef, self.simulator.custom_fields)


@method("CustomFieldsManager", "AddCustomFieldDef", changing=True)
def add_field(context: Context, manager: Managed, name: str, moType: Any, fieldDefPolicy: Any, fieldPolicy: Any) -> Any:
    fields = context.simulator.custom_fields
    if any(one.name == name and one.managedObjectType == moType for one in fields):
        raise vim.fault.DuplicateName(name=name, object=manager.ref)
    field = vim.CustomFieldsManager.FieldDef(
        key=max([_FIRST_KEY, *(one.key + 1 for one in fields)]), name=name, type=str, managedObjectType=moType
    )
    fields.append(field)
    return field


@method("CustomFieldsManager", "RemoveCustomFieldDef", changing=True)
def remove_field(context: Context, manager: Managed, key: int) -> None:
    fields = context.simulator.custom_fields
    if not any(one.key == key for one in fields):
        raise vmodl.fault.InvalidArgument(invalidProperty="key")
    fields[:] = [one for one in fields if one.key != key]
    for entity in context.simulator.inventory.entities.values():
        entity.custom_values.pop(key, None)


def _set(context: Context, entity: Entity, key: int, value: str) -> None:
    context.require("Global.SetCustomField", entity)
    with context.simulator.lock:
        entity.custom_values[key] = value


@method("CustomFieldsManager", "SetField", changing=True, privilege="System.View")
def set_field(context: Context, manager: Managed, entity: Any, key: int, value: str) -> None:
    target: Any = find_object(context, entity._moId, entity._wsdlName)
    if not any(one.key == key for one in target.p_availableField()):
        raise vmodl.fault.InvalidArgument(invalidProperty="key")
    _set(context, target, key, value)


@method("ExtensibleManagedObject", "setCustomValue", changing=True, privilege="System.View")
def set_custom_value(context: Context, entity: Any, key: str, value: str) -> None:
    found = next((one for one in entity.p_availableField() if one.name == key), None)
    if found is None:
        raise vmodl.fault.InvalidArgument(invalidProperty="key")
    _set(context, entity, found.key, value)
