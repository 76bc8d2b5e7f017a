# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a running vCenter keeps in memory: users, sessions, tasks, events, the log of calls, injected faults."""

from __future__ import annotations

import copy
import hmac
import itertools
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pyVmomi import VmomiSupport, vim, vmodl

from . import soap
from .model import Managed, SimulatorError, now
from .storage import Locked, NoSpace, StorageError

if TYPE_CHECKING:
    from .simulator import Simulator

# What every user may do; the rest is VADP facts 48.
SYSTEM_PRIVILEGES = frozenset({"System.Anonymous", "System.View", "System.Read"})
BACKUP_PRIVILEGES = frozenset(
    {
        "VirtualMachine.Provisioning.DiskRandomRead",
        "VirtualMachine.Provisioning.DiskRandomAccess",
        "VirtualMachine.Provisioning.GetVmFiles",
        "VirtualMachine.State.CreateSnapshot",
        "VirtualMachine.State.RemoveSnapshot",
        "VirtualMachine.Config.ChangeTracking",
        "VirtualMachine.Config.AddExistingDisk",
        "VirtualMachine.Config.AddNewDisk",
        "VirtualMachine.Config.RemoveDisk",
        "VirtualMachine.Config.Settings",
        "VirtualMachine.Config.Resource",
        "VirtualMachine.Config.AddRemoveDevice",
        "VirtualMachine.Config.AdvancedConfig",
        "VirtualMachine.Config.EditDevice",
        "VirtualMachine.Interact.PowerOn",
        "VirtualMachine.Inventory.Create",
        "VirtualMachine.Inventory.Unregister",
        "Datastore.Browse",
        "Datastore.FileManagement",
        "Datastore.AllocateSpace",
        "Global.DisableMethods",
        "Global.EnableMethods",
        "Global.SetCustomField",
        "VApp.Export",
        "VApp.Import",
        "Resource.AssignVMToPool",
        "InventoryService.Tagging.AttachTag",
        "InventoryService.Tagging.ObjectAttachable",
        "Network.Assign",
        "Host.Config.Network",
        "DVSwitch.Modify",
        "DVPortgroup.Create",
        "DVPortgroup.Modify",
        "DVPortgroup.Delete",
        "Cryptographer.Access",
        "Cryptographer.AddDisk",
    }
)


class AuthenticationFailed(SimulatorError):
    """Unknown user or wrong password."""


class PrivilegeMissing(SimulatorError):
    """The user may not do this."""

    def __init__(self, user: str, privilege: str) -> None:
        super().__init__(f"{user} lacks the privilege {privilege}")
        self.privilege = privilege


class DropConnection(Exception):
    """The injected fault that is no fault: the connection ends without an answer."""


@dataclass
class User:
    name: str
    password: str
    privileges: set[str]
    all: bool = False  # the administrator

    def may(self, privilege: str) -> bool:
        if privilege in SYSTEM_PRIVILEGES:
            return True
        if self.all:
            return f"-{privilege}" not in self.privileges
        return privilege in self.privileges


@dataclass
class Settings:
    """What a test may turn: seconds, counts, bytes."""

    task_delay: float = 0.02
    session_idle: float = 1800.0
    page_areas: int = 2000
    page_bytes: int | None = None
    dhcp_delay: float | None = 0.3  # until a VMkernel NIC gets its address; None: never
    dhcp_subnet: str = "10.66.0.0/24"
    device_delay: float = 0.0
    # export leases, and /folder (methods/leases.py, folder.py)
    lease_timeout: float = 300.0
    lease_thumbprint: str = "sha1"
    lease_host: str | None = None  # None: the host that has the bytes
    lease_bytes_per_second: float | None = None
    lease_cuts: int = 0
    folder_ranges: bool = True
    folder_cuts: int = 0
    rest_api: bool = True  # False: a vCenter before 7.0 U2
    esxi: bool = False  # True: the service is the one of a host, which a client logs in to directly
    clock_offset: float = 0.0  # seconds that the data centre's clocks are ahead
    snapshot_settings: bool = True  # False: extraConfig is not filled in the configuration of snapshots

    def set(self, values: dict[str, Any]) -> dict[str, Any]:
        known = {one.name for one in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise SimulatorError(f"no such setting: {name} (there are {', '.join(sorted(known))})")
            setattr(self, name, value)
        return {name: getattr(self, name) for name in sorted(known)}

    def take(self, name: str) -> bool:
        """One of what a setting counts, as long as there is any."""
        if not getattr(self, name):
            return False
        setattr(self, name, getattr(self, name) - 1)
        return True


# --- calls ----------------------------------------------------------------------------------------------------------


class CallLog:
    """Every call, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[dict[str, Any]] = []

    def add(
        self,
        user: str | None,
        method: str,
        object: str | None,
        changing: bool,
        fault: str | None,
        reads: list[str] | None = None,
    ) -> None:
        """:param reads: moids of the objects that a call begins to read at."""
        with self._lock:
            self._calls.append(
                {
                    "seq": len(self._calls) + 1,
                    "time": now().isoformat(),
                    "user": user,
                    "method": method,
                    "object": object,
                    "changing": changing,
                    "fault": fault,
                    **({} if reads is None else {"reads": reads}),
                }
            )

    def since(self, seq: int) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._calls[seq:])


def fault_named(name: str) -> Any:
    """A new fault of that name, with or without its package."""
    for package in ("vim.fault", "vmodl.fault", "vmodl.query", "vim", "vmodl"):
        full = name if "." in name else f"{package}.{name}"
        try:
            kind = VmomiSupport.GetVmodlType(full)
        except KeyError:
            continue
        if isinstance(kind, type) and issubclass(kind, vmodl.MethodFault):
            return kind()
    raise SimulatorError(f"no such fault: {name}")


@dataclass
class _Injection:
    id: int
    target: str
    name: str
    fault: str | None
    left: int  # -1: for ever
    delay: float
    object: str | None
    after: int = 0  # so many go well first


class Injector:
    """Faults and delays that a test puts into calls and tasks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._injections: list[_Injection] = []
        self._ids = itertools.count(1)

    def add(
        self,
        target: str,
        name: str,
        fault: str | None,
        count: int,
        delay: float,
        object: str | None,
        after: int = 0,
    ) -> int:
        if target not in ("call", "task"):
            raise SimulatorError("target is call or task")
        if fault is not None and fault not in ("drop", "lost"):
            fault_named(fault)
        if fault is None and not delay:
            raise SimulatorError("neither a fault nor a delay")
        with self._lock:
            one = _Injection(next(self._ids), target, name, fault, count or -1, delay, object, after)
            self._injections.append(one)
            return one.id

    def clear(self) -> None:
        with self._lock:
            self._injections.clear()

    def apply(self, target: str, name: str, object: str | None) -> bool:
        """Sleep, then raise what is injected for this call or task, if anything is.

        :returns: whether the call shall be done and its answer be lost: the fault is ``lost``.
        :raises DropConnection: the fault is ``drop``.
        """
        with self._lock:
            for one in self._injections:
                if one.target == target and one.name == name and one.object in (None, object):
                    if not one.after:
                        break
                    one.after -= 1
            else:
                return False
            if one.left > 0:
                one.left -= 1
                if not one.left:
                    self._injections.remove(one)
        if one.delay:
            time.sleep(one.delay)
        if one.fault == "drop":
            raise DropConnection
        if one.fault == "lost":
            return True
        if one.fault is not None:
            fault = fault_named(one.fault)
            fault.msg = soap.default_message(fault) + " (injected)"
            raise fault
        return False


# --- sessions -------------------------------------------------------------------------------------------------------


class Session:
    def __init__(
        self, key: str, user: User, address: str, agent: str, login_time: datetime, rest: bool = False
    ) -> None:
        self.rest = rest  # of the REST API: its cookie is the token, and no good for anything else
        self.key = key
        self.user = user
        self.address = address
        self.agent = agent
        self.login_time = login_time
        self.last_active = time.monotonic()
        self.alive = True
        self.objects: dict[str, Managed] = {}  # views, collectors, filters: they die with the session
        self.cookie = secrets.token_hex(20)

    def info(self) -> Any:
        return vim.UserSession(
            key=self.key,
            userName=self.user.name,
            fullName=self.user.name,
            loginTime=self.login_time,
            lastActiveTime=now(),
            locale="en",
            messageLocale="en",
            extensionSession=False,
            ipAddress=self.address,
            userAgent=self.agent,
            callCount=0,
        )


class Sessions:
    """Log-ins by their cookie."""

    def __init__(self, simulator: "Simulator") -> None:
        self.simulator = simulator
        self._lock = threading.Lock()
        self._by_cookie: dict[str, Session] = {}

    def login(self, username: str, password: str, address: str, agent: str, rest: bool = False) -> Session:
        """:raises AuthenticationFailed: unknown user or wrong password."""
        user = self.authenticate(username, password)
        session = Session(f"52{secrets.token_hex(15)}", user, address, agent, self.simulator.clock(), rest)
        with self._lock:
            self._by_cookie[session.cookie] = session
        return session

    def authenticate(self, username: str, password: str) -> User:
        name = username.lower()
        if "\\" in name:
            domain, _unused, account = name.partition("\\")
            name = f"{account}@{domain if '.' in domain else domain + '.local'}"
        user = self.simulator.users.get(name)
        if user is None or not hmac.compare_digest(user.password.encode(), password.encode()):
            raise AuthenticationFailed(f"wrong user name or password for {username}")
        return user

    def of_cookie(self, cookie: str | None, rest: bool = False) -> Session | None:
        """The living session of a cookie, which is active by being asked for."""
        with self._lock:
            session = self._by_cookie.get((cookie or "").strip('"'))
            if session is None or session.rest != rest:
                return None
            if time.monotonic() - session.last_active > self.simulator.settings.session_idle:
                self._end(session)
                return None
            session.last_active = time.monotonic()
            return session

    def _end(self, session: Session) -> None:
        session.alive = False
        session.objects.clear()
        self._by_cookie.pop(session.cookie, None)

    def end(self, session: Session) -> None:
        with self._lock:
            self._end(session)
        self.simulator.changed()

    def end_all(self) -> int:
        with self._lock:
            sessions = list(self._by_cookie.values())
            for session in sessions:
                self._end(session)
        self.simulator.changed()
        return len(sessions)

    def all(self) -> list[Session]:
        with self._lock:
            return list(self._by_cookie.values())


# --- tasks ----------------------------------------------------------------------------------------------------------


def _path_in(error: Exception) -> str:
    """The datastore path that a storage error speaks of."""
    match = re.search(r"\[[^\]]+\] [^:]*?\.vmdk", str(error))
    return match.group(0) if match else str(error)


def as_fault(error: Exception) -> Any:
    """What vSphere would answer for something that went wrong inside."""
    if isinstance(error, vmodl.MethodFault):
        return error
    if isinstance(error, Locked):
        return vim.fault.FileLocked(file=_path_in(error), msg=f"Unable to access a file since it is locked: {error}")
    if isinstance(error, NoSpace):
        path = _path_in(error)
        datastore = path[1:].split("]")[0]
        return vim.fault.NoDiskSpace(file=path, datastore=datastore, msg=f"Insufficient disk space: {error}")
    if isinstance(error, StorageError):
        return vim.fault.FileFault(file=_path_in(error), msg=str(error))
    if isinstance(error, SimulatorError):
        return vmodl.fault.SystemError(reason=str(error), msg=str(error))
    traceback.print_exception(error)
    return vmodl.fault.SystemError(reason=repr(error), msg=f"A general system error occurred: {error!r}")


class Task(Managed):
    """A task: queued, running, then success or error. It takes ``settings.task_delay`` seconds at least."""

    type = vim.Task

    def __init__(
        self, simulator: "Simulator", moid: str, method: Any, entity: Any, user: str, cancelable: bool
    ) -> None:
        super().__init__(simulator, moid)
        self.method = method
        self.entity = entity
        self.cancelable = cancelable
        self.cancelled = threading.Event()
        self.done = threading.Event()
        self.info = vim.TaskInfo(
            key=moid,
            task=self.ref,
            descriptionId=f"{VmomiSupport.GetWsdlName(method.type)}.{method.name[0].lower()}{method.name[1:]}",
            entity=entity.ref if entity is not None else None,
            entityName=entity.name if entity is not None else None,
            state="queued",
            cancelled=False,
            cancelable=cancelable,
            reason=vim.TaskReasonUser(userName=user),
            queueTime=now(),
            eventChainId=int(moid.split("-")[-1]),
        )
        object.__setattr__(self.info, "name", method.wsdlName)

    def p_info(self) -> Any:
        return copy.copy(self.info)  # of one moment: the task goes on while the answer is written

    def check_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise vmodl.fault.RequestCanceled()

    def _set(self, **values: Any) -> None:
        with self.simulator.lock:
            for name, value in values.items():
                setattr(self.info, name, value)
        self.simulator.changed()

    def run(self, body: Callable[["Task"], Any], vm: Any) -> None:
        delay = self.simulator.settings.task_delay
        try:
            self.cancelled.wait(delay / 2)
            self._set(state="running", startTime=now(), progress=0)
            self.cancelled.wait(delay / 2)
            self.check_cancelled()
            self.simulator.injector.apply("task", self.method.wsdlName, self.entity.moid if self.entity else None)
            result = body(self)
            final = {"state": "success", "result": result, "progress": None}
        except Exception as error:  # noqa: BLE001  whatever it is becomes the task's fault, as in vSphere
            final = {"state": "error", "error": as_fault(error), "cancelled": self.cancelled.is_set()}
        if vm is not None:
            with self.simulator.lock:
                vm.task = None
        self._set(completeTime=now(), cancelable=False, **final)
        self.done.set()


class Tasks:
    KEEP = 500

    def __init__(self, simulator: "Simulator") -> None:
        self.simulator = simulator
        self.tasks: dict[str, Task] = {}

    def start(
        self,
        context: Any,
        method: Any,
        entity: Any,
        body: Callable[[Task], Any],
        vm: Any = None,
        cancelable: bool = False,
    ) -> Any:
        """Start a task and return its reference.

        :param vm: the VM that is busy until the task ends.
        :raises TaskInProgress: another task has that VM.
        """
        with self.simulator.lock:
            if vm is not None and vm.task is not None:
                raise vim.fault.TaskInProgress(task=vm.task.ref)
            task = Task(self.simulator, self.simulator.new_moid("task"), method, entity, context.user.name, cancelable)
            self.tasks[task.moid] = task
            if vm is not None:
                vm.task = task
            for moid in [moid for moid, one in self.tasks.items() if one.done.is_set()][: -self.KEEP]:
                del self.tasks[moid]
        threading.Thread(target=task.run, args=(body, vm), name=task.moid, daemon=True).start()
        return task.ref

    def of(self, moid: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.entity is not None and task.entity.moid == moid][-5:]

    def forget(self) -> None:
        """vCenter was restarted. What its hosts do for a task goes on."""
        with self.simulator.lock:
            self.tasks.clear()
        self.simulator.changed()

    def running(self) -> list[Task]:
        return [task for task in self.tasks.values() if not task.done.is_set()]

    def wait_all(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        for task in self.running():
            task.done.wait(max(0.0, end - time.monotonic()))


@dataclass
class Events:
    """Events of VMs, oldest first."""

    simulator: "Simulator"
    events: list[Any] = field(default_factory=list)
    keys: Any = field(default_factory=lambda: itertools.count(1))

    def add(self, kind: Any, vm: Any, user: str, text: str, **more: Any) -> None:
        key = next(self.keys)
        event = kind(key=key, chainId=key, createdTime=now(), userName=user, fullFormattedMessage=text, **more)
        event.vm = vim.event.VmEventArgument(name=vm.name, vm=vm.ref)
        self.events.append(event)
