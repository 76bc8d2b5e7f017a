# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""PropertyCollector: reading many properties of many objects, in pages; and waiting for changes."""

from __future__ import annotations

import secrets
import time
from typing import Any

from pyVmomi import VmomiSupport, vim, vmodl

from .. import soap
from ..model import Managed, property_value
from . import Context, find_object, method, require_readable, service

PC = vmodl.query.PropertyCollector
DEFAULT_WAIT = 1800.0


@service("propertyCollector")
class Collector(Managed):
    type = PC

    def p_filter(self) -> Any:
        return soap.array(PC.Filter)


class State:
    """What a session has going at one collector: its filters, and the version it has seen."""

    def __init__(self) -> None:
        self.filters: list[Filter] = []
        self.version = 0
        self.last: tuple[str, Any] | None = None  # the version an update answered, and that update
        self.pages: dict[str, list[Any]] = {}
        self.cancelled = 0


class Filter(Managed):
    type = PC.Filter

    def __init__(self, context: Context, state: State, spec: Any, partial: bool) -> None:
        super().__init__(context.simulator, _session_moid(context))
        self.state = state
        self.spec = spec
        self.partial = partial
        self.seen: dict[str, dict[str, str]] = {}  # moid -> path -> encoded value
        self.refs: dict[str, Any] = {}

    def p_spec(self) -> Any:
        return self.spec

    def p_partialUpdates(self) -> bool:
        return self.partial

    def update(self, context: Context) -> Any:
        """What has changed since the last call; None if nothing has."""
        objects = []
        found = collect(context, [self.spec])
        for content in found:
            moid = content.obj._moId
            known = self.seen.get(moid)
            now_seen = {item.name: soap.encoded(item.val) for item in content.propSet}
            changes = [
                PC.Change(name=item.name, op="assign", val=item.val)
                for item in content.propSet
                if known is None or known.get(item.name) != now_seen[item.name]
            ]
            for name in known or {}:
                if name not in now_seen:
                    changes.append(PC.Change(name=name, op="remove"))
            if known is None or changes:
                kind = "enter" if known is None else "modify"
                objects.append(
                    PC.ObjectUpdate(kind=kind, obj=content.obj, changeSet=changes, missingSet=content.missingSet)
                )
            self.seen[moid] = now_seen
            self.refs[moid] = content.obj
        for moid in set(self.seen) - {content.obj._moId for content in found}:
            objects.append(PC.ObjectUpdate(kind="leave", obj=self.refs.pop(moid)))
            del self.seen[moid]
        return PC.FilterUpdate(filter=self.ref, objectSet=objects) if objects else None


def _session_moid(context: Context) -> str:
    assert context.session is not None
    return f"session[{context.session.key}]{secrets.token_hex(16)}"


def _state(context: Context, collector: Managed) -> State:
    assert context.session is not None
    key = f"state of {collector.moid}"
    objects: dict[str, Any] = context.session.objects
    return objects.setdefault(key, State())


# --- collecting -----------------------------------------------------------------------------------------------------


class _Selection:
    """One FilterSpec at work: walks the selections, gathers objects in order."""

    def __init__(self, context: Context, spec: Any) -> None:
        self.context = context
        self.spec = spec
        self.named: dict[str, Any] = {}
        self.found: dict[str, Managed] = {}
        self.walked: set[tuple[str, int]] = set()
        for object_spec in spec.objectSet:
            self._name(object_spec.selectSet)

    def _name(self, selections: Any) -> None:
        for selection in selections:
            if isinstance(selection, PC.TraversalSpec):
                if selection.name:
                    self.named[selection.name] = selection
                self._name(selection.selectSet)

    def run(self) -> list[Managed]:
        for object_spec in self.spec.objectSet:
            try:
                obj = find_object(self.context, object_spec.obj._moId, VmomiSupport.GetWsdlName(type(object_spec.obj)))
            except vmodl.fault.ManagedObjectNotFound:
                if self.spec.reportMissingObjectsInResults:
                    continue
                raise
            if not object_spec.skip:
                self.found.setdefault(obj.moid, obj)
            self._follow(obj, object_spec.selectSet)
        return list(self.found.values())

    def _follow(self, obj: Managed, selections: Any) -> None:
        for selection in selections:
            if not isinstance(selection, PC.TraversalSpec):
                if selection.name not in self.named:
                    raise vmodl.fault.InvalidArgument(invalidProperty="specSet.objectSet.selectSet")
                selection = self.named[selection.name]
            if not issubclass(obj.type, selection.type) or (obj.moid, id(selection)) in self.walked:
                continue
            self.walked.add((obj.moid, id(selection)))
            value = property_value(obj, selection.path)
            for ref in value if isinstance(value, list) else [value] if value is not None else []:
                try:
                    target = find_object(self.context, ref._moId, VmomiSupport.GetWsdlName(type(ref)))
                except vmodl.fault.ManagedObjectNotFound:
                    continue
                if not selection.skip:
                    self.found.setdefault(target.moid, target)
                self._follow(target, selection.selectSet)


def _paths(spec: Any, obj: Managed) -> list[str] | None:
    """The property paths wanted of an object; None if it is not wanted at all."""
    wanted: list[str] = []
    matched = False
    for prop_spec in spec.propSet:
        if not issubclass(obj.type, prop_spec.type):
            continue
        matched = True
        if prop_spec.all:
            wanted += [info.name for info in obj.type._GetPropertyList()]
        wanted += list(prop_spec.pathSet)
    return list(dict.fromkeys(wanted)) if matched else None


def _check_paths(spec: Any) -> None:
    """A path that the spec's type does not have is refused even when no object matches."""
    for prop_spec in spec.propSet:
        for path in prop_spec.pathSet:
            try:
                prop_spec.type._GetPropertyInfo(path.split(".")[0].split("[")[0])
            except AttributeError:
                raise vmodl.query.InvalidProperty(name=path) from None


def collect(context: Context, specs: Any) -> list[Any]:
    """ObjectContent of every object that the filter specs select."""
    contents: list[Any] = []
    with context.simulator.lock:
        for spec in specs:
            _check_paths(spec)
            for obj in _Selection(context, spec).run():
                paths = _paths(spec, obj)
                if paths is None:
                    continue
                require_readable(context, obj, [path.split("[")[0] for path in paths])
                content = PC.ObjectContent(obj=obj.ref)
                for path in paths:
                    value = property_value(obj, path)
                    if value is not None:
                        content.propSet.append(vmodl.DynamicProperty(name=path, val=value))
                contents.append(content)
    return contents


# --- methods --------------------------------------------------------------------------------------------------------


@method("PropertyCollector", "RetrieveProperties")
def retrieve(context: Context, collector: Managed, specSet: Any) -> Any:
    return soap.array(PC.ObjectContent, collect(context, specSet))


@method("PropertyCollector", "RetrievePropertiesEx")
def retrieve_ex(context: Context, collector: Managed, specSet: Any, options: Any) -> Any:
    contents = collect(context, specSet)
    if not contents:
        return None
    limit = options.maxObjects
    if limit is not None and limit <= 0:
        raise vmodl.fault.InvalidArgument(invalidProperty="options.maxObjects")
    return _page(context, collector, contents, limit)


def _page(context: Context, collector: Managed, contents: list[Any], limit: int | None) -> Any:
    result = PC.RetrieveResult(objects=contents[:limit] if limit else contents)
    if limit and len(contents) > limit:
        context.require("System.View", collector)
        result.token = secrets.token_hex(8)
        _state(context, collector).pages[result.token] = [limit, contents[limit:]]
    return result


@method("PropertyCollector", "ContinueRetrievePropertiesEx")
def continue_retrieve(context: Context, collector: Managed, token: str) -> Any:
    page = _state(context, collector).pages.pop(token, None)
    if page is None:
        raise vmodl.fault.InvalidArgument(invalidProperty="token")
    return _page(context, collector, page[1], page[0])


@method("PropertyCollector", "CancelRetrievePropertiesEx")
def cancel_retrieve(context: Context, collector: Managed, token: str) -> None:
    if _state(context, collector).pages.pop(token, None) is None:
        raise vmodl.fault.InvalidArgument(invalidProperty="token")


@method("PropertyCollector", "CreateFilter")
def create_filter(context: Context, collector: Managed, spec: Any, partialUpdates: bool) -> Any:
    assert context.session is not None
    collect(context, [spec])  # a spec that can't be is refused now
    state = _state(context, collector)
    one = Filter(context, state, spec, partialUpdates)
    state.filters.append(one)
    context.session.objects[one.moid] = one
    return one.ref


@method("PropertyFilter", "DestroyPropertyFilter")
def destroy_filter(context: Context, one: Filter) -> None:
    assert context.session is not None
    one.state.filters.remove(one)
    context.session.objects.pop(one.moid, None)


@method("PropertyCollector", "CreatePropertyCollector")
def create_collector(context: Context, collector: Managed) -> Any:
    assert context.session is not None
    one = Collector(context.simulator, _session_moid(context))
    context.session.objects[one.moid] = one
    return one.ref


@method("PropertyCollector", "DestroyPropertyCollector")
def destroy_collector(context: Context, collector: Managed) -> None:
    assert context.session is not None
    for one in _state(context, collector).filters:
        context.session.objects.pop(one.moid, None)
    context.session.objects.pop(f"state of {collector.moid}", None)
    context.session.objects.pop(collector.moid, None)


@method("PropertyCollector", "CancelWaitForUpdates")
def cancel_wait(context: Context, collector: Managed) -> None:
    _state(context, collector).cancelled += 1
    context.simulator.changed()


@method("PropertyCollector", "WaitForUpdatesEx")
def wait_for_updates_ex(context: Context, collector: Managed, version: str | None, options: Any) -> Any:
    seconds = options.maxWaitSeconds if options is not None else None
    return _wait(context, collector, version, None if seconds is None else float(seconds))


@method("PropertyCollector", "WaitForUpdates")
def wait_for_updates(context: Context, collector: Managed, version: str | None) -> Any:
    return _wait(context, collector, version, None)


@method("PropertyCollector", "CheckForUpdates")
def check_for_updates(context: Context, collector: Managed, version: str | None) -> Any:
    return _wait(context, collector, version, 0.0)


def _wait(context: Context, collector: Managed, version: str | None, seconds: float | None) -> Any:
    state = _state(context, collector)
    if version:
        if state.last is not None and version == state.last[0] and version != str(state.version):
            return state.last[1]  # the client has not got our last answer
        if version != str(state.version):
            raise vmodl.query.InvalidCollectorVersion()
    else:
        for one in state.filters:
            one.seen.clear()
    simulator, cancelled = context.simulator, state.cancelled
    deadline = time.monotonic() + (DEFAULT_WAIT if seconds is None else seconds)
    while True:
        generation = simulator.generation
        if context.session is None or not context.session.alive:
            raise vim.fault.NotAuthenticated(object=collector.ref, privilegeId="System.View")
        if state.cancelled != cancelled:
            raise vmodl.fault.RequestCanceled()
        updates = []
        for one in list(state.filters):
            try:
                update = one.update(context)
            except vmodl.fault.ManagedObjectNotFound:
                update = _all_left(one)
            if update is not None:
                updates.append(update)
        if updates:
            state.version += 1
            result = PC.UpdateSet(version=str(state.version), filterSet=updates, truncated=False)
            state.last = (version or "", result)
            return result
        with simulator.change:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if simulator.generation == generation:
                simulator.change.wait(min(left, 5.0))


def _all_left(one: Filter) -> Any:
    """The object that a filter starts at is gone."""
    if not one.refs:
        return None
    objects = [PC.ObjectUpdate(kind="leave", obj=ref) for ref in one.refs.values()]
    one.refs.clear()
    one.seen.clear()
    return PC.FilterUpdate(filter=one.ref, objectSet=objects)
