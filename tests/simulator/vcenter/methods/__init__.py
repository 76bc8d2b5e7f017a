# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The API's methods, by managed object type and WSDL name; and what happens around each call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyVmomi import VmomiSupport, vim, vmodl

from .. import soap
from ..model import Managed, property_value
from ..services import DropConnection, Session, User, as_fault

if TYPE_CHECKING:
    from ..simulator import Simulator

MODULES = (
    "authorization",
    "changetracking",
    "collector",
    "customfields",
    "dvswitches",
    "environment",
    "events",
    "folders",
    "hosts",
    "leases",
    "machines",
    "networks",
    "pools",
    "reconfigure",
    "search",
    "session",
    "snapshots",
    "tasks",
    "views",
)


@dataclass
class Context:
    """Who calls, and how the answer is to look."""

    simulator: "Simulator"
    session: Session | None
    address: str
    agent: str
    version: str
    method: Any = None  # pyVmomi's description of the method
    new_cookie: str | None = None  # set by a log-in
    end_cookie: bool = False  # set by a log-out

    @property
    def user(self) -> User:
        assert self.session is not None
        return self.session.user

    def require(self, privilege: str, obj: Any) -> None:
        """:raises NotAuthenticated: nobody is logged in. :raises NoPermission: the user lacks the privilege."""
        if privilege == "System.Anonymous":
            return
        ref = obj.ref if isinstance(obj, Managed) else obj
        if self.session is None or not self.session.alive:
            raise vim.fault.NotAuthenticated(object=ref, privilegeId=privilege)
        if not self.user.may(privilege):
            missing = vim.fault.NoPermission.EntityPrivileges(entity=ref, privilegeIds=[privilege])
            raise vim.fault.NoPermission(
                object=ref,
                privilegeId=privilege,
                missingPrivileges=[missing],
                msg=f"Permission to perform this operation was denied. Required privilege '{privilege}' on managed "
                f"object with id '{ref._moId}'.",
            )


@dataclass(frozen=True)
class _Method:
    function: Callable[..., Any]
    changing: bool
    privilege: str | None


_METHODS: dict[tuple[str, str], _Method] = {}
_SERVICES: dict[str, Callable[["Simulator"], Managed]] = {}
_PARTS: dict[str, Callable[["Simulator", str], Managed]] = {}


def method(type_name: str, *names: str, changing: bool = False, privilege: str | None = None) -> Callable[..., Any]:
    """Register a function ``f(context, obj, **arguments)`` for WSDL methods of a managed object type.

    :param changing: it alters the inventory or disks; what tests of check mode look at.
    :param privilege: instead of the one in the type metadata.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _METHODS[(type_name, name)] = _Method(function, changing, privilege)
        return function

    return register


def service(moid: str) -> Callable[..., Any]:
    """Register a class of :class:`Managed` as the object of a fixed moid (``SessionManager``, ...)."""

    def register(cls: Any) -> Any:
        _SERVICES[moid] = lambda simulator: cls(simulator, moid)
        return cls

    return register


def part(prefix: str) -> Callable[..., Any]:
    """Register a class of :class:`Managed` for the objects whose moids start so and that belong to another object."""

    def register(cls: Any) -> Any:
        _PARTS[prefix] = cls
        return cls

    return register


def load() -> None:
    for name in MODULES:
        importlib.import_module(f"{__name__}.{name}")


def find_object(context: Context, moid: str, kind: str) -> Managed:
    """The object behind a reference.

    :raises ManagedObjectNotFound: it is not there (any more), or is another session's.
    """
    simulator = context.simulator
    if moid in simulator.inventory.entities:
        return simulator.inventory.entities[moid]
    if moid in _SERVICES:
        return simulator.services.setdefault(moid, _SERVICES[moid](simulator))
    if moid in simulator.tasks.tasks:
        return simulator.tasks.tasks[moid]
    for prefix, make in _PARTS.items():
        if moid.startswith(prefix):
            return make(simulator, moid)
    if moid.startswith("snapshot-"):
        from .snapshots import SnapshotObject

        vm = simulator.inventory.vm_of_snapshot(moid)
        return SnapshotObject(simulator, vm, vm.snapshot(moid))
    session = context.session
    if session is not None and moid in session.objects:
        return session.objects[moid]
    try:
        cls: Any = soap.type_by_name(kind) if kind else vim.ManagedEntity
    except vmodl.fault.InvalidRequest:
        cls = vim.ManagedEntity
    if not issubclass(cls, VmomiSupport.ManagedObject):
        cls = vim.ManagedEntity
    stand_in = _stand_in(simulator, cls, moid)
    if stand_in is not None:
        return stand_in
    if session is None:
        # A view or a filter of a session that is over.
        raise vim.fault.NotAuthenticated(object=cls(moid), privilegeId="System.View")
    raise vmodl.fault.ManagedObjectNotFound(
        obj=cls(moid),
        msg=f"The object '{VmomiSupport.GetVmodlName(cls)}:{moid}' has already been deleted or has not been completely "
        "created",
    )


def _stand_in(simulator: "Simulator", cls: Any, moid: str) -> Managed | None:
    """Objects that only exist to be pointed at: environment browsers, datastore browsers, managers without methods."""
    known = moid.startswith(("envbrowser-", "datastoreBrowser-")) or moid in simulator.content_moids()
    if not known:
        return None
    one = Managed(simulator, moid)
    one.type = cls
    return one


def _registered(obj: Managed, name: str) -> _Method | None:
    for cls in obj.type.__mro__:
        wsdl_name = getattr(cls, "_wsdlName", None)
        if wsdl_name and (wsdl_name, name) in _METHODS:
            return _METHODS[(wsdl_name, name)]
    return None


def call(context: Context, request: soap.Request) -> tuple[Any, Any]:
    """Do one call. -> (result, its declared type)

    :raises vmodl.MethodFault: what goes back to the client. :raises DropConnection: injected.
    """
    simulator = context.simulator
    simulator.current.session = context.session
    registered: _Method | None = None
    error: Exception | None = None
    try:
        obj = find_object(context, request.this_moid, request.this_type)
        answer_is_lost = simulator.injector.apply("call", request.method, request.this_moid)
        if request.method == "Fetch":
            return _fetch(context, obj, request.arguments["prop"])
        registered = _registered(obj, request.method)
        info = request.info
        if info is None or not issubclass(obj.type, info.type) or registered is None:
            context.require("System.View", obj)
            raise vmodl.fault.MethodNotFound(
                receiver=obj.ref,
                method=request.method,
                msg=f"The method '{request.method}' is not found on '{VmomiSupport.GetWsdlName(obj.type)}'.",
            )
        context.method = info
        context.require(registered.privilege or info.privId or "System.View", obj)
        for param in info.params:
            value = request.arguments[param.name]
            if param.privId and isinstance(value, VmomiSupport.ManagedObject):
                context.require(param.privId, value)
        result = registered.function(context, obj, **request.arguments)
        if answer_is_lost:
            raise DropConnection
        return result, info.result
    except vmodl.MethodFault as fault:
        error = fault
        raise
    except Exception as inner:
        error = inner
        raise
    finally:
        user = context.session.user.name if context.session else None
        simulator.log.add(
            user,
            request.method if request.method != "Fetch" else f"Fetch {request.arguments.get('prop')}",
            request.this_moid,
            bool(registered and registered.changing),
            VmomiSupport.GetWsdlName(type(as_fault(error)))
            if isinstance(error, vmodl.MethodFault)
            else error and repr(error),
            _read_at(request),
        )


def _read_at(request: soap.Request) -> list[str] | None:
    if request.method != "RetrievePropertiesEx":
        return None
    return [part.obj._moId for spec in request.arguments.get("specSet") or [] for part in spec.objectSet or []]


def require_readable(context: Context, obj: Managed, paths: list[str]) -> None:
    """Reading needs a log-in, but for the few properties that a client reads before it."""
    roots = {path.split(".")[0] for path in paths}
    if not roots or any(obj.type._GetPropertyInfo(root).privId != "System.Anonymous" for root in roots):
        context.require("System.View", obj)


def _fetch(context: Context, obj: Managed, name: str) -> tuple[Any, Any]:
    """A property as a client reads it that does not use the property collector."""
    try:
        info = obj.type._GetPropertyInfo(name)
    except AttributeError:
        raise vmodl.query.InvalidProperty(name=name) from None
    require_readable(context, obj, [name])
    declared = info.type
    with context.simulator.lock:
        return property_value(obj, name), declared
