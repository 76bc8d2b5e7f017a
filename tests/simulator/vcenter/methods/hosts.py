# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Hosts: maintenance mode. Datastores: the browser and the file manager."""

from __future__ import annotations

import fnmatch
from typing import Any

from pyVmomi import vim

from .. import storage
from ..inventory import Host, VirtualMachine, datastore_of
from ..model import Managed
from ..services import Task
from . import Context, find_object, method, service


def _maintenance(context: Context, host: Host, on: bool) -> Any:
    if host.in_maintenance == on:
        raise vim.fault.InvalidState()

    def body(task: Task) -> None:
        if on and any(vm.powered_on and vm.host == host.moid for vm in context.simulator.inventory.all(VirtualMachine)):
            raise vim.fault.InvalidState(msg="Virtual machines run on this host.")
        with context.simulator.lock:
            host.in_maintenance = on
            host.save()

    return context.simulator.tasks.start(context, context.method, host, body)


@method("HostSystem", "EnterMaintenanceMode_Task", changing=True)
def enter_maintenance(
    context: Context, host: Host, timeout: int, evacuatePoweredOffVms: bool | None, maintenanceSpec: Any
) -> Any:
    return _maintenance(context, host, True)


@method("HostSystem", "ExitMaintenanceMode_Task", changing=True)
def exit_maintenance(context: Context, host: Host, timeout: int) -> Any:
    return _maintenance(context, host, False)


Browser = vim.host.DatastoreBrowser


@method("HostDatastoreBrowser", "SearchDatastore_Task", privilege="System.View")
def search_datastore(context: Context, browser: Managed, datastorePath: str, searchSpec: Any) -> Any:
    simulator = context.simulator
    datastore = simulator.inventory.get(browser.moid.removeprefix("datastoreBrowser-"))
    context.require("Datastore.Browse", datastore)
    if datastore_of(datastorePath) != datastore.name:
        raise vim.fault.InvalidDatastorePath(datastorePath=datastorePath)
    patterns = list(searchSpec.matchPattern) if searchSpec is not None and searchSpec.matchPattern else ["*"]

    def body(task: Task) -> Any:
        try:
            files = simulator.storage.list_files(datastorePath)
        except storage.NotFound:
            raise vim.fault.FileNotFound(file=datastorePath) from None
        found = [
            Browser.FileInfo(path=path.rsplit("/", 1)[-1].split("] ")[-1], fileSize=size)
            for path, size in files
            if any(fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        ]
        return Browser.SearchResults(datastore=datastore.ref, folderPath=datastorePath, file=found)

    return simulator.tasks.start(context, context.method, datastore, body)


@service("FileManager")
class FileManager(Managed):
    type = vim.FileManager


def _in_datacenter(context: Context, datacenter: Any, path: str) -> Any:
    if datacenter is None:
        raise vim.fault.InvalidDatastore(name=datastore_of(path))
    return context.simulator.inventory.datastore(
        datastore_of(path),
        find_object(context, datacenter._moId, "Datacenter"),  # type: ignore[arg-type]
    )


@method("FileManager", "MakeDirectory", changing=True, privilege="System.View")
def make_directory(
    context: Context, manager: Managed, name: str, datacenter: Any, createParentDirectories: bool | None
) -> None:
    context.require("Datastore.FileManagement", _in_datacenter(context, datacenter, name))
    folder = context.simulator.storage.local_path(name)
    if folder.exists():
        raise vim.fault.FileAlreadyExists(file=name)
    try:
        folder.mkdir(parents=bool(createParentDirectories))
    except FileNotFoundError:
        raise vim.fault.FileNotFound(file=name) from None


@method("FileManager", "DeleteDatastoreFile_Task", changing=True, privilege="System.View")
def delete_file(context: Context, manager: Managed, name: str, datacenter: Any) -> Any:
    datastore = _in_datacenter(context, datacenter, name)
    context.require("Datastore.FileManagement", datastore)
    simulator = context.simulator

    def body(task: Task) -> None:
        local = simulator.storage.local_path(name)
        if name in simulator.storage.disks():
            simulator.storage.delete_disk(name)
        elif local.is_dir() and not any(local.iterdir()):
            local.rmdir()
        elif local.is_file() and not name.endswith(".vmdk"):
            local.unlink()
        elif local.exists():
            raise vim.fault.CannotDeleteFile(file=name)
        else:
            raise vim.fault.FileNotFound(file=name)

    return simulator.tasks.start(context, context.method, datastore, body)
