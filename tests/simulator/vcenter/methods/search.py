# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""SearchIndex."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from .. import soap
from ..inventory import Host, VirtualMachine
from ..model import Entity, Managed
from . import Context, find_object, method, service


@service("SearchIndex")
class SearchIndex(Managed):
    type = vim.SearchIndex


def _child(context: Context, entity: Entity, name: str) -> Entity | None:
    """A child as FindChild sees it: by its name, escaped as in the inventory."""
    for child in entity.children():
        if child.p_name() == name or child.name == name:
            return child
    return None


@method("SearchIndex", "FindChild")
def find_child(context: Context, index: Managed, entity: Any, name: str) -> Any:
    found = _child(context, find_object(context, entity._moId, entity._wsdlName), name)  # type: ignore[arg-type]
    return found.ref if found else None


@method("SearchIndex", "FindByInventoryPath")
def find_by_path(context: Context, index: Managed, inventoryPath: str) -> Any:
    entity: Entity | None = context.simulator.inventory.get("group-d1")
    for part in [part for part in inventoryPath.split("/") if part]:
        entity = _child(context, entity, part) if entity is not None else None
    return entity.ref if entity is not None else None


def _by_uuid(context: Context, datacenter: Any, uuid: str, vm_search: bool, instance: bool | None) -> list[Any]:
    inventory = context.simulator.inventory
    within = find_object(context, datacenter._moId, "Datacenter") if datacenter is not None else None
    wanted = uuid.lower()
    found = []
    if vm_search:
        for vm in inventory.all(VirtualMachine, within):  # type: ignore[arg-type]
            if ((vm.config.instanceUuid if instance else vm.config.uuid) or "").lower() == wanted:
                found.append(vm.ref)
    else:
        found = [host.ref for host in inventory.all(Host, within) if host.uuid == wanted]  # type: ignore[arg-type]
    return found


@method("SearchIndex", "FindByUuid")
def find_by_uuid(
    context: Context, index: Managed, datacenter: Any, uuid: str, vmSearch: bool, instanceUuid: bool | None
) -> Any:
    return next(iter(_by_uuid(context, datacenter, uuid, vmSearch, instanceUuid)), None)


@method("SearchIndex", "FindAllByUuid")
def find_all_by_uuid(
    context: Context, index: Managed, datacenter: Any, uuid: str, vmSearch: bool, instanceUuid: bool | None
) -> Any:
    return soap.array(vim.ManagedEntity, _by_uuid(context, datacenter, uuid, vmSearch, instanceUuid))


@method("SearchIndex", "FindByDatastorePath")
def find_by_datastore_path(context: Context, index: Managed, datacenter: Any, path: str) -> Any:
    within: Any = find_object(context, datacenter._moId, "Datacenter")
    for vm in context.simulator.inventory.all(VirtualMachine, within):
        if vm.config.files.vmPathName == path:
            return vm.ref
    return None


def _by_dns_name(context: Context, datacenter: Any, name: str, vm_search: bool) -> list[Any]:
    inventory = context.simulator.inventory
    within: Any = find_object(context, datacenter._moId, "Datacenter") if datacenter is not None else None
    if not vm_search:
        return [host.ref for host in inventory.all(Host, within) if host.name == name]
    return [
        vm.ref for vm in inventory.all(VirtualMachine, within) if vm.powered_on and vm.tools_running and vm.name == name
    ]


@method("SearchIndex", "FindByDnsName")
def find_by_dns_name(context: Context, index: Managed, datacenter: Any, dnsName: str, vmSearch: bool) -> Any:
    return next(iter(_by_dns_name(context, datacenter, dnsName, vmSearch)), None)


@method("SearchIndex", "FindAllByDnsName")
def find_all_by_dns_name(context: Context, index: Managed, datacenter: Any, dnsName: str, vmSearch: bool) -> Any:
    return soap.array(vim.ManagedEntity, _by_dns_name(context, datacenter, dnsName, vmSearch))


@method("SearchIndex", "FindByIp")
def find_by_ip(context: Context, index: Managed, datacenter: Any, ip: str, vmSearch: bool) -> Any:
    return None if vmSearch else next(iter(_by_dns_name(context, datacenter, ip, False)), None)
