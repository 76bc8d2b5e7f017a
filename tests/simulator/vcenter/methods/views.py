# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""ViewManager, container views, list views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyVmomi import vim, vmodl

from .. import soap
from ..inventory import Cluster, Datacenter, Host, ResourcePool
from ..model import Entity, Managed, property_value
from . import Context, find_object, method, service
from .collector import _session_moid


@service("ViewManager")
class ViewManager(Managed):
    type = vim.view.ViewManager

    def p_viewList(self) -> Any:
        return soap.array(vim.view.View)


def _contained(entity: Entity) -> list[Any]:
    """What a container view sees directly below an entity."""
    paths: tuple[str, ...] = ()
    if isinstance(entity, Datacenter):
        paths = ("vmFolder", "hostFolder", "datastoreFolder", "networkFolder")
    elif isinstance(entity, Cluster):
        paths = ("host", "resourcePool")
    elif isinstance(entity, ResourcePool):
        paths = ("resourcePool", "vm")
    elif isinstance(entity, Host):
        paths = ("vm",)
    elif entity.type is vim.Folder:
        paths = ("childEntity",)
    refs: list[Any] = []
    for path in paths:
        value = property_value(entity, path)
        refs += value if isinstance(value, list) else [] if value is None else [value]
    return refs


class ContainerView(Managed):
    type = vim.view.ContainerView

    def __init__(self, context: Context, container: Entity, types: list[Any], recursive: bool) -> None:
        super().__init__(context.simulator, _session_moid(context))
        self.container = container
        self.types = types
        self.recursive = recursive

    def p_container(self) -> Any:
        return self.container.ref

    def p_type(self) -> Any:
        return soap.array(type, self.types)

    def p_recursive(self) -> bool:
        return self.recursive

    def _walk(self, entity: Entity, seen: set[str]) -> Iterator[Any]:
        for ref in _contained(entity):
            if ref._moId in seen:
                continue
            seen.add(ref._moId)
            if not self.types or any(issubclass(type(ref), wanted) for wanted in self.types):
                yield ref
            if self.recursive:
                yield from self._walk(self.simulator.inventory.get(ref._moId), seen)

    def p_view(self) -> Any:
        return soap.array(vim.ManagedEntity, list(self._walk(self.container, set())))


class ListView(Managed):
    type = vim.view.ListView

    def __init__(self, context: Context, refs: list[Any]) -> None:
        super().__init__(context.simulator, _session_moid(context))
        self.refs = refs

    def p_view(self) -> Any:
        return soap.array(vim.ManagedEntity, self.refs)


def _keep(context: Context, view: Managed) -> Any:
    assert context.session is not None
    context.session.objects[view.moid] = view
    return view.ref


@method("ViewManager", "CreateContainerView")
def create_container_view(context: Context, manager: Managed, container: Any, type: Any, recursive: bool) -> Any:
    entity = find_object(context, container._moId, container._wsdlName)
    if not isinstance(entity, Entity):
        raise vmodl.fault.InvalidArgument(invalidProperty="container")
    return _keep(context, ContainerView(context, entity, list(type), recursive))


@method("ViewManager", "CreateListView")
def create_list_view(context: Context, manager: Managed, obj: Any) -> Any:
    return _keep(context, ListView(context, list(obj)))


@method("ListView", "ModifyListView")
def modify_list_view(context: Context, view: ListView, add: Any, remove: Any) -> Any:
    gone = {ref._moId for ref in remove}
    view.refs = [ref for ref in view.refs if ref._moId not in gone]
    view.refs += [ref for ref in add if ref._moId not in {one._moId for one in view.refs}]
    context.simulator.changed()
    return soap.array(vim.ManagedEntity)


@method("ListView", "ResetListView")
def reset_list_view(context: Context, view: ListView, obj: Any) -> Any:
    view.refs = list(obj)
    context.simulator.changed()
    return soap.array(vim.ManagedEntity)


@method("View", "DestroyView")
def destroy_view(context: Context, view: Managed) -> None:
    assert context.session is not None
    context.session.objects.pop(view.moid, None)
