# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Hosts: maintenance mode. Datastores: the browser and the file manager."""

from __future__ import annotations

import fnmatch
import os
from datetime import datetime, timezone
from typing import Any

from pyVmomi import vim

from .. import soap, storage
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
# Extension -> what is found, and what asks for it.
_KINDS = {
    ".vmx": (Browser.VmConfigInfo, Browser.VmConfigQuery),
    ".nvram": (Browser.VmNvramInfo, Browser.VmNvramQuery),
    ".vmsn": (Browser.VmSnapshotInfo, Browser.VmSnapshotQuery),
    ".log": (Browser.VmLogInfo, Browser.VmLogQuery),
    ".iso": (Browser.IsoImageInfo, Browser.IsoImageQuery),
    ".flp": (Browser.FloppyImageInfo, Browser.FloppyImageQuery),
}


class _Search:
    """One search: which entries of a folder are wanted, and what is told of them."""

    def __init__(self, simulator: Any, datastore: Any, spec: Any) -> None:
        self.simulator = simulator
        self.datastore = datastore
        spec = spec if spec is not None else Browser.SearchSpec()
        self.queries = list(spec.query or [])
        self.details = spec.details or Browser.FileInfo.Details()
        self.patterns = list(spec.matchPattern or []) or ["*"]
        self.any_case = bool(spec.searchCaseInsensitive)
        self.folders_first = bool(spec.sortFoldersFirst)

    def results(self, path: str) -> Any:
        try:
            files = [one for one, _size in self.simulator.storage.list_files(path)]
            folders = self.simulator.storage.list_folders(path)
        except storage.NotFound:
            raise vim.fault.FileNotFound(file=path) from None
        order = folders + files if self.folders_first else sorted(folders + files)
        found = [self._entry(one, one in folders) for one in order]
        return Browser.SearchResults(
            datastore=self.datastore.ref, folderPath=path, file=[one for one in found if one is not None]
        )

    def below(self, path: str) -> list[Any]:
        found = [self.results(path)]
        for folder in self.simulator.storage.list_folders(path):
            found += self.below(folder)
        return found

    def _entry(self, path: str, is_folder: bool) -> Any:
        name = path.split("] ", 1)[-1].rsplit("/", 1)[-1]
        if not any(self._fits(name, pattern) for pattern in self.patterns):
            return None
        kind, query = self._kind(path, name, is_folder)
        asked = next((one for one in self.queries if query is not None and isinstance(one, query)), None)
        if self.queries and asked is None:
            return None
        # Without its type being asked for, a file is just a file.
        entry = (kind if asked is not None or self.details.fileType else Browser.FileInfo)(path=name)
        status = self.simulator.storage.local_path(path).stat()
        if self.details.fileSize:
            entry.fileSize = status.st_size
        if self.details.modification:
            entry.modification = datetime.fromtimestamp(status.st_mtime, timezone.utc)
        if self.details.fileOwner:
            entry.owner = "root"
        if isinstance(entry, Browser.VmDiskInfo) and asked is not None and asked.details is not None:
            self._describe_disk(entry, path, asked.details)
        return entry

    def _fits(self, name: str, pattern: str) -> bool:
        if self.any_case:
            name, pattern = name.lower(), pattern.lower()
        return fnmatch.fnmatchcase(name, pattern)

    def _kind(self, path: str, name: str, is_folder: bool) -> tuple[Any, Any]:
        if is_folder:
            return Browser.FolderInfo, Browser.FolderQuery
        if path in self.simulator.storage.disks():
            return Browser.VmDiskInfo, Browser.VmDiskQuery
        return _KINDS.get(os.path.splitext(name)[1], (Browser.FileInfo, None))

    def _describe_disk(self, entry: Any, path: str, details: Any) -> None:
        disk = self.simulator.storage.info(path)
        if details.diskType:
            entry.diskType = vim.vm.device.VirtualDisk.FlatVer2BackingInfo
        if details.capacityKb:
            entry.capacityKb = disk.capacity_bytes // 1024
        if details.hardwareVersion:
            entry.hardwareVersion = 19
        if details.diskExtents:
            entry.diskExtents = [f"{path[: -len('.vmdk')]}-flat.vmdk"]
        if details.thin:
            entry.thin = disk.thin


def _search(context: Context, browser: Managed, path: str, spec: Any, deep: bool) -> Any:
    simulator = context.simulator
    datastore = simulator.inventory.get(browser.moid.removeprefix("datastoreBrowser-"))
    context.require("Datastore.Browse", datastore)
    if datastore_of(path) != datastore.name:
        raise vim.fault.InvalidDatastorePath(datastorePath=path)
    search = _Search(simulator, datastore, spec)

    def body(task: Task) -> Any:
        return soap.array(Browser.SearchResults, search.below(path)) if deep else search.results(path)

    return simulator.tasks.start(context, context.method, datastore, body)


@method("HostDatastoreBrowser", "SearchDatastore_Task", privilege="System.View")
def search_datastore(context: Context, browser: Managed, datastorePath: str, searchSpec: Any) -> Any:
    return _search(context, browser, datastorePath, searchSpec, deep=False)


@method("HostDatastoreBrowser", "SearchDatastoreSubFolders_Task", privilege="System.View")
def search_subfolders(context: Context, browser: Managed, datastorePath: str, searchSpec: Any) -> Any:
    return _search(context, browser, datastorePath, searchSpec, deep=True)


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
