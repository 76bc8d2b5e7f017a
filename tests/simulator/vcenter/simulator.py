# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The one object that everything hangs on: state folder, inventory, storage, sessions; and what a test may do to it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pyVmomi import vim

from . import certificates, disks, networking, seed
from .inventory import Datastore, Host, Inventory, VirtualMachine, disks_in, is_rdm
from .model import Kept, Managed, SimulatorError, now, to_json, write_atomically
from .networking import DistributedSwitch
from .proxy import ProxyMachine
from .services import (
    BACKUP_PRIVILEGES,
    AuthenticationFailed,
    CallLog,
    Events,
    Injector,
    PrivilegeMissing,
    Sessions,
    Settings,
    Tasks,
    User,
)
from .storage import Storage
from .tags import Tags

__all__ = ["AuthenticationFailed", "Disk", "PrivilegeMissing", "Simulator", "SimulatorError"]

ADMINISTRATOR = "administrator@vsphere.local"
BACKUP_USER = "backup@vsphere.local"
FORMAT = 1


@dataclass(frozen=True)
class Disk:
    """A disk as a VM's or a snapshot's configuration has it."""

    key: int
    label: str
    path: str
    capacity_bytes: int
    uuid: str
    mode: str
    rdm: str | None


class Simulator:
    """A vCenter.

    :param state_dir: where everything is kept; an empty or absent folder is seeded.
    :param vms: which machines a new state gets, ``minimal``, ``standard`` or ``demo``.
    :param hosts: so many more hosts for a new state.
    :param passwords: by user name; a user not named gets a random one, once for each state folder.
    """

    def __init__(
        self, state_dir: Path, vms: str = "minimal", passwords: dict[str, str] | None = None, hosts: int = 0
    ) -> None:
        self.state_dir = Path(state_dir).resolve()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.start_time = now()
        self.lock = threading.RLock()  # inventory, sessions' objects, tasks' infos
        self.change = threading.Condition()  # something that a filter may watch has changed
        self.generation = 0
        self.current = threading.local()  # .session: whose call this thread answers
        self.host = "127.0.0.1"
        self.server: Any = None  # set by the server itself
        self.web_hosts: set[str] = set()  # names of the hosts at which the server listens too
        self.port = 0
        self.nfc: Any = None
        self.control: Any = None
        self.settings = Settings()
        self.log = CallLog()
        self.injector = Injector()
        self.sessions = Sessions(self)
        self.tasks = Tasks(self)
        self.events = Events(self)
        self.leases: dict[str, Any] = {}  # leases that are held, by their ticket
        self.custom_fields: list[Any] = []  # until it is stopped
        self.tags = Tags(self)
        self.services: dict[str, Managed] = {}  # the objects of fixed moids, once somebody has asked
        self.proxy = ProxyMachine(self)
        self.device_dir, self.sysfs_dir = self.proxy.device_dir, self.proxy.sysfs_dir
        self._last_time = self.start_time
        self._meta_path = self.state_dir / "vcenter.json"

        material = certificates.ensure(self.state_dir / "tls")
        self.ca_path = material.ca_path
        self.ssl_context = material.server_context()
        self.thumbprints = material.thumbprints

        inventory_dir = self.state_dir / "inventory"
        fresh = not self._meta_path.exists()
        if fresh:
            # A start that was killed while it seeded left a half inventory: away with it.
            for leftover in ("inventory", "datastores", "tracking"):
                shutil.rmtree(self.state_dir / leftover, ignore_errors=True)
        inventory_dir.mkdir(exist_ok=True)
        self.inventory = Inventory(self, Kept(inventory_dir))
        self._counter = 1000
        self.users = {
            ADMINISTRATOR: User(ADMINISTRATOR, "", set(), all=True),
            BACKUP_USER: User(BACKUP_USER, "", set(BACKUP_PRIVILEGES)),
        }
        # No two servers have the same: a client may keep something for each.
        self.instance_uuid = seed.stable_uuid(f"vcenter {self.state_dir.resolve()}")
        self.storage = Storage(self.state_dir, seed.DATASTORES)
        if fresh:
            for user in self.users.values():
                user.password = (passwords or {}).get(user.name) or secrets.token_urlsafe(12)
            seed.seed(self, vms)
            if hosts:
                seed.add_hosts(self, hosts)
            self._save_meta()
        else:
            self._load_meta(passwords or {})
            self.inventory.load()
            self.storage_check()
        self.proxy.start()

    # what is kept besides the inventory

    def _save_meta(self) -> None:
        users = {
            user.name: {"password": user.password, "privileges": sorted(user.privileges)}
            for user in self.users.values()
        }
        meta = {
            "format": FORMAT,
            "counter": self._counter,
            "users": users,
            "instance_uuid": self.instance_uuid,
        }
        write_atomically(self._meta_path, json.dumps(meta), 0o600)

    def _load_meta(self, passwords: dict[str, str]) -> None:
        meta = json.loads(self._meta_path.read_text())
        if meta["format"] != FORMAT:
            raise SimulatorError(f"{self.state_dir} was made by another version of the simulator")
        self._counter = meta["counter"]
        # A copy of the state folder is a replica, with this vCenter's identity (copies.py gives it another).
        self.instance_uuid = meta["instance_uuid"]
        for name, kept in meta["users"].items():
            self.users[name].password = passwords.get(name) or kept["password"]
            self.users[name].privileges = set(kept["privileges"])

    def storage_check(self) -> None:
        """After a start: finish or undo what a killed simulator was about to do, and lock what runs again."""
        for vm in self.inventory.all(VirtualMachine):
            disks.recover(vm)
        for vm in self.inventory.all(VirtualMachine):
            if vm.powered_on:
                with contextlib.suppress(vim.fault.FileLocked):
                    disks.lock_foreign_disks(vm)

    def close(self) -> None:
        self.sessions.end_all()
        self.tasks.wait_all(5.0)
        self.storage.close()

    # small services

    def clock(self) -> datetime:
        """The time as this data centre has it, never twice the same."""
        with self.lock:
            self._last_time = max(now(), self._last_time + timedelta(microseconds=1))
            return self._last_time + timedelta(seconds=self.settings.clock_offset)

    def changed(self) -> None:
        """Wake whoever waits for updates."""
        with self.change:
            self.generation += 1
            self.change.notify_all()

    def content_moids(self) -> set[str]:
        """The moids that the service content names."""
        from .methods.session import CONTENT

        return set(CONTENT.values())

    def new_moid(self, kind: str) -> str:
        """A moid that never was; after a restart numbers go on a step further."""
        with self.lock:
            self._counter += 1
            if kind != "task":
                self._save_meta()
            return f"{kind}-{self._counter}"

    # look-ups

    def find_vm(self, name_or_moid: str) -> VirtualMachine:
        with self.lock:
            machines = self.inventory.all(VirtualMachine)
            found = [vm for vm in machines if vm.moid == name_or_moid] or [
                vm for vm in machines if vm.name == name_or_moid
            ]
        if len(found) != 1:
            raise SimulatorError(f"{len(found)} VMs are named {name_or_moid}")
        return found[0]

    def vm_disks(self, vm: VirtualMachine, snapshot: str | None = None) -> list[Disk]:
        with self.lock:
            config = vm.snapshot(snapshot).config if snapshot else vm.config
            return [
                Disk(
                    key=disk.key,
                    label=disk.deviceInfo.label,
                    path=disk.backing.fileName,
                    capacity_bytes=disk.capacityInBytes,
                    uuid=disk.backing.uuid,
                    mode=disk.backing.diskMode,
                    rdm=disk.backing.compatibilityMode if is_rdm(disk) else None,
                )
                for disk in disks_in(config.hardware.device)
            ]

    def _disk(self, vm: VirtualMachine, disk: int | str, snapshot: str | None = None) -> Disk:
        for one in self.vm_disks(vm, snapshot):
            if disk in (one.key, one.label) or (isinstance(disk, str) and disk == str(one.key)):
                return one
        raise SimulatorError(f"VM {vm.name} has no disk {disk}" + (f" in {snapshot}" if snapshot else ""))

    def disk_path(self, vm: VirtualMachine, disk: int | str, snapshot: str | None = None) -> str:
        return self._disk(vm, disk, snapshot).path

    def snapshots(self, vm: VirtualMachine) -> list[dict[str, Any]]:
        with self.lock:
            return [
                {"moid": one.moid, "name": one.name, "parent": one.parent, "quiesced": one.quiesced}
                for one in vm.snapshots
            ]

    @contextlib.contextmanager
    def vm_lock(self, vm: VirtualMachine) -> Iterator[None]:
        """While it is held the VM's disks keep their paths."""
        with vm.lock:
            yield

    def hosts(self) -> list[Host]:
        with self.lock:
            return self.inventory.all(Host)

    def hosts_of(self, datastore_name: str) -> list[Host]:
        return [
            host
            for host in self.hosts()
            if datastore_name in host.datastores and host.connected and not host.in_maintenance
        ]

    def serving_host_for(self, datastore_name: str, vm: VirtualMachine | None = None) -> Host:
        """Who serves a disk's data: without a snapshot the VM's own host, else any that can (VADP facts 19)."""
        usable = self.hosts_of(datastore_name)
        if vm is not None:
            usable = [host for host in usable if host.moid == vm.host]
        if not usable:
            raise SimulatorError(f"no host can serve datastore {datastore_name}")
        return random.choice(usable)

    # who may

    def authenticate(self, username: str, password: str) -> User:
        return self.sessions.authenticate(username, password)

    def require(self, user: User, privilege: str) -> None:
        if not user.may(privilege):
            raise PrivilegeMissing(user.name, privilege)

    # what a test does to it

    def reset_cbt(self, vm: VirtualMachine, disk: int | str) -> None:
        with vm.lock:
            self.storage.reset_tracking(self.disk_path(vm, disk))
        self.changed()

    def grow_disk(self, vm: VirtualMachine, disk: int | str, capacity_bytes: int) -> None:
        with vm.lock:
            disks.grow(vm, self._disk(vm, disk).key, capacity_bytes)

    def set_host(
        self,
        name: str,
        maintenance: bool | None = None,
        connected: bool | None = None,
        version: str | None = None,
        iscsi_nics: Sequence[str] | None = None,
        iscsi_targets: Sequence[str] | None = None,
        datastores: Sequence[str] | None = None,
    ) -> None:
        host = next((one for one in self.hosts() if name in (one.name, one.moid)), None)
        if host is None:
            raise SimulatorError(f"there is no host {name}")
        with self.lock:
            host.in_maintenance = host.in_maintenance if maintenance is None else bool(maintenance)
            host.connected = host.connected if connected is None else bool(connected)
            host.version = host.version if version is None else version
            host.iscsi_nics = host.iscsi_nics if iscsi_nics is None else list(iscsi_nics)
            host.iscsi_targets = host.iscsi_targets if iscsi_targets is None else list(iscsi_targets)
            host.datastores = host.datastores if datastores is None else list(datastores)
            host.save()

    def set_nfs_server(self, datastore: str, server: str) -> None:
        """The server that an NFS datastore is mounted from, by name or address."""
        with self.lock:
            found = next((one for one in self.inventory.all(Datastore) if one.name == datastore), None)
            if found is None or found.kind != "NFS":
                raise SimulatorError(f"there is no NFS datastore {datastore}")
            found.server = server
            found.save()

    def add_hosts(self, count: int, dvswitch: str | None = None) -> list[str]:
        with self.lock:
            return seed.add_hosts(self, count, dvswitch)

    def add_dvswitch(self, name: str, datacenter: str, hosts: Sequence[str] = ()) -> str:
        """A distributed switch in a datacenter's network folder; *hosts* become members with vmnic3. -> its moid"""
        with self.lock:
            return seed.add_dvswitch(self, name, datacenter, hosts)

    def set_dvswitch(self, name: str, **values: Any) -> None:
        """Change a distributed switch: ``nioc``, ``nioc_version``, ``mtu``, ``version``, ``pools`` (keys)."""
        with self.lock:
            found = [one for one in self.inventory.all(DistributedSwitch) if one.name == name]
            if len(found) != 1:
                raise SimulatorError(f"{len(found)} distributed switches are named {name}")
            for key, value in values.items():
                if key not in ("nioc", "nioc_version", "mtu", "version", "pools"):
                    raise SimulatorError(f"a distributed switch has no {key}")
                setattr(found[0], key, [networking.pool(one) for one in value] if key == "pools" else value)
            found[0].config_version += 1
            found[0].save()

    def networks(self, host: str | None = None) -> dict[str, Any]:
        """The hosts' networks in plain data, to compare before and after; and the distributed switches."""
        with self.lock:
            hosts = [one for one in self.hosts() if host in (None, one.name)]
            switches = self.inventory.all(DistributedSwitch)
            names = [one.name for one in switches]
            return {
                "hosts": {
                    one.name: {"network": to_json(networking.ensure(one)), "services": one.services} for one in hosts
                },
                "switches": {
                    one.name if names.count(one.name) == 1 else f"{one.name} ({one.moid})": {
                        "portgroups": sorted(group.name for group in one.portgroups()),
                        "pools": {pool.key: to_json(pool.allocationInfo) for pool in one.pools},
                        "config_version": one.config_version,
                    }
                    for one in switches
                },
            }

    def set_power(self, vm: VirtualMachine, state: str) -> None:
        if state not in ("poweredOn", "poweredOff"):
            raise SimulatorError("state is poweredOn or poweredOff")
        with vm.lock:
            if vm.power_state != state:
                disks.power(vm, state)

    def set_privileges(self, username: str, add: Sequence[str] = (), remove: Sequence[str] = ()) -> list[str]:
        if username not in self.users:
            raise SimulatorError(f"there is no user {username}")
        user = self.users[username]
        if user.all:  # of an administrator what is missing is kept
            user.privileges |= {f"-{name}" for name in remove}
            user.privileges -= {f"-{name}" for name in add}
        else:
            user.privileges |= set(add)
            user.privileges -= set(remove)
        self._save_meta()
        return sorted(user.privileges)

    def set_settings(self, **settings: Any) -> dict[str, Any]:
        return self.settings.set(settings)

    def set_tools(self, vm: VirtualMachine, running: bool) -> None:
        with self.lock:
            vm.tools_running = bool(running)
            vm.save()

    def expire_sessions(self) -> int:
        return self.sessions.end_all()

    def inject(
        self,
        target: str,
        name: str,
        fault: str | None = None,
        count: int = 1,
        delay: float = 0.0,
        object: str | None = None,
        after: int = 0,
    ) -> int:
        return self.injector.add(target, name, fault, count, delay, object, after)

    def clear_injections(self) -> None:
        self.injector.clear()

    def calls(self, since: int = 0) -> list[dict[str, Any]]:
        return self.log.since(since)

    def state(self) -> dict[str, Any]:
        with self.lock:
            machines = {}
            for vm in self.inventory.all(VirtualMachine):
                machines[vm.moid] = {
                    "name": vm.name,
                    "path": self.inventory.path_of(vm),
                    "power_state": vm.power_state,
                    "host": vm.host_name,
                    "pool": self.inventory.get(vm.pool).name if vm.pool else None,
                    "instance_uuid": vm.config.instanceUuid,
                    "bios_uuid": vm.config.uuid,
                    "change_tracking": bool(vm.config.changeTrackingEnabled),
                    "consolidation_needed": vm.consolidation_needed,
                    "prepared": list(vm.access),
                    "template": vm.is_template,
                    "extra_config": {option.key: option.value for option in vm.config.extraConfig},
                    "change_version": vm.config.changeVersion,
                    "snapshots": self.snapshots(vm),
                    "disks": [
                        {
                            "key": disk.key,
                            "label": disk.label,
                            "path": disk.path,
                            "chain": vm.chain(disk.path),
                            "capacity_bytes": disk.capacity_bytes,
                            "uuid": disk.uuid,
                            "mode": disk.mode,
                        }
                        for disk in self.vm_disks(vm)
                    ],
                }
            return {
                "instance_uuid": self.instance_uuid,
                "hosts": [
                    {"name": host.name, "connected": host.connected, "in_maintenance": host.in_maintenance}
                    for host in self.hosts()
                ],
                "datastores": [{"name": one.name, "type": one.kind} for one in self.inventory.all(Datastore)],
                "vms": machines,
                "sessions": [{"user": one.user.name, "key": one.key} for one in self.sessions.all()],
                "tasks": [{"moid": one.moid, "method": one.method.wsdlName} for one in self.tasks.running()],
            }

    # VDDK's access calls

    def prepare_access(self, username: str, vm: VirtualMachine, identity: str) -> None:
        self.require(self.users[username], "Global.DisableMethods")
        if not identity or len(identity) > 50:
            raise SimulatorError("an identity has 1 to 50 characters")
        with self.lock:
            if identity not in vm.access:
                vm.access.append(identity)
                vm.save()

    def end_access(self, username: str, vm: VirtualMachine, identity: str) -> None:
        self.require(self.users[username], "Global.EnableMethods")
        with self.lock:
            if identity in vm.access:
                vm.access.remove(identity)
                vm.save()

    def prepared(self, vm: VirtualMachine) -> list[str]:
        return list(vm.access)

    def record_call(
        self, username: str | None, method: str, object: str | None, changing: bool = False, fault: str | None = None
    ) -> None:
        self.log.add(username, method, object, changing, fault)


def natural(text: str) -> list[Any]:
    """A sort key by which vm-9 comes before vm-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
