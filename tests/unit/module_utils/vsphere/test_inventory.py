# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    AmbiguousError,
    NotFoundError,
    VsphereError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import find_vm, require_only_one
from pyVmomi import vim


@pytest.fixture
def inventory(session, stub):
    """Two datacenters, one in a folder; app01 twice; a VM in a vApp; a template; an FT pair."""
    root = vim.Folder("group-d1", stub)
    region = vim.Folder("group-d2", stub)
    vapp = vim.VirtualApp("resgroup-v1", stub)
    children = {}

    def datacenter(number, parent):
        folder = vim.Folder(f"group-v{number}", stub)
        here = stub.add(
            vim.Datacenter(f"datacenter-{number}", stub), name=f"DC{number}", parent=parent, vmFolder=folder
        )
        children[number] = []
        stub.add(folder, name="vm", parent=here, childEntity=children[number])
        return here, folder

    first, first_folder = datacenter(0, root)
    second, second_folder = datacenter(1, region)
    stub.add(root, name="Datacenters", childEntity=[first, region])
    stub.add(region, name="Europe", parent=root, childEntity=[second])
    production = vim.Folder("group-v9", stub)
    inside = []
    stub.add(production, name="production", parent=first_folder, childEntity=inside)
    children[0].append(production)

    def machine(number, name, folder, siblings, **properties):
        obj = vim.VirtualMachine(f"vm-{number}", stub)
        configuration = {
            "config__instanceUuid": f"instance-{number}",
            "config__uuid": f"bios-{number}",
            "config__template": False,
        }
        stub.add(obj, name=name, parent=folder, **{**configuration, **properties})
        siblings.append(obj)
        return obj

    machine(1, "app01", production, inside)
    machine(2, "app01", second_folder, children[1])
    machine(3, "a%2fb", first_folder, children[0])
    machine(4, "golden", first_folder, children[0], config__template=True)
    machine(5, "ft", first_folder, children[0], config__ftInfo=vim.vm.FaultTolerancePrimaryConfigInfo(role=1))
    machine(6, "ft", first_folder, children[0], config__ftInfo=vim.vm.FaultToleranceSecondaryConfigInfo(role=2))
    in_vapp = []
    machine(7, "tier1", None, in_vapp, parentVApp=vapp)
    stub.add(vapp, name="shop", parentFolder=first_folder, vm=in_vapp)
    children[0].append(vapp)
    lost = vim.VirtualMachine("vm-8", stub)
    stub.add(lost, name="lost", parent=first_folder, runtime__connectionState="orphaned")
    children[0].append(lost)
    machine(9, "nameless", first_folder, children[0], config__instanceUuid="")
    return stub


def test_name_is_found_in_two_calls_with_its_place(session, inventory):
    vm = find_vm(session, name="app01", datacenter="DC1")
    assert (vm.moid, vm.path, vm.datacenter, vm.datacenter_path) == (
        "vm-2",
        "/Europe/DC1/vm/app01",
        "DC1",
        "Europe/DC1",
    )
    assert (vm.instance_uuid, vm.bios_uuid, vm.template) == ("instance-2", "bios-2", False)
    assert inventory.names() == ["RetrievePropertiesEx"] * 2
    first = inventory.calls[0][2][0][0].propSet
    assert [(spec.type, list(spec.pathSet)) for spec in first] == [(vim.VirtualMachine, ["name"])]


def test_two_of_a_name_are_both_listed(session, inventory):
    with pytest.raises(AmbiguousError) as caught:
        find_vm(session, name="app01")
    for place in ("/DC0/vm/production/app01 (vm-1)", "/Europe/DC1/vm/app01 (vm-2)"):
        assert place in str(caught.value)


@pytest.mark.parametrize("folder", ["/DC0/vm/production", "production", "vm/production/", "/DC0/vm/production/"])
def test_folder_narrows(session, inventory, folder):
    assert find_vm(session, name="app01", folder=folder).moid == "vm-1"


def test_a_folder_whose_name_holds_a_slash_is_not_two(session, inventory):
    odd, nested, above = (vim.Folder(f"group-v{number}", inventory) for number in (91, 92, 93))
    vm_folder = inventory.objects["vm-3"][1]["parent"]
    children = inventory.objects[vm_folder._moId][1]["childEntity"]
    inventory.add(odd, name="x%2f y", parent=vm_folder, childEntity=[vim.VirtualMachine("vm-11", inventory)])
    inventory.add(above, name="x", parent=vm_folder, childEntity=[nested])
    inventory.add(nested, name=" y", parent=above, childEntity=[vim.VirtualMachine("vm-12", inventory)])
    children.extend([odd, above])
    for number, parent in ((11, odd), (12, nested)):
        values = {"config__uuid": f"bios-{number}", "config__instanceUuid": f"instance-{number}"}
        values["config__template"] = False
        inventory.add(vim.VirtualMachine(f"vm-{number}", inventory), name="same", parent=parent, **values)
    for folder, moid in (("x%2f y", "vm-11"), ("/DC0/vm/x%2f y", "vm-11"), ("x/ y", "vm-12"), (" y", "vm-12")):
        assert find_vm(session, name="same", folder=folder).moid == moid
    with pytest.raises(NotFoundError):
        find_vm(session, name="same", folder="y")


def test_not_here_but_elsewhere(session, inventory):
    with pytest.raises(NotFoundError, match=r"elsewhere: .*/DC0/vm/production/app01"):
        find_vm(session, name="app01", folder="/DC0/vm")
    with pytest.raises(NotFoundError, match="nosuch"):
        find_vm(session, name="nosuch")


def test_escaped_name_vapp_template_and_secondary(session, inventory):
    assert find_vm(session, name="a/b").path == "/DC0/vm/a%2fb"
    assert find_vm(session, name="tier1").path == "/DC0/vm/shop/tier1"
    assert find_vm(session, name="golden").template
    assert find_vm(session, name="ft").moid == "vm-5"


def test_moid_and_uuid(session, inventory):
    assert find_vm(session, moid="vm-1").name == "app01"
    assert inventory.names() == ["RetrievePropertiesEx"]
    with pytest.raises(NotFoundError, match="vm-99"):
        find_vm(session, moid="vm-99")
    inventory.methods["FindAllByUuid"] = lambda _index, datacenter, uuid, vms, instance: (
        [vim.VirtualMachine("vm-2", inventory)] if (uuid, vms, instance) == ("instance-2", True, True) else []
    )
    assert find_vm(session, uuid="instance-2", use_instance_uuid=True).moid == "vm-2"
    with pytest.raises(NotFoundError):
        find_vm(session, uuid="instance-2")


def test_two_machines_of_one_instance_uuid_are_named_both(session, inventory):
    vm = find_vm(session, moid="vm-1")
    found = [1]
    inventory.methods["FindAllByUuid"] = lambda _index, _datacenter, uuid, vms, instance: [
        vim.VirtualMachine(f"vm-{number}", inventory)
        for number in found
        if (uuid, vms, instance) == ("instance-1", True, True)
    ]
    require_only_one(session, vm)
    # The secondary of a fault tolerant pair is no machine of its own.
    found = [1, 6]
    require_only_one(session, vm)
    found = [1, 2]
    with pytest.raises(AmbiguousError, match=r"app01 \(vm-1\); /Europe/DC1/vm/app01 \(vm-2\)"):
        require_only_one(session, vm)


def test_machine_without_configuration_is_an_error(session, inventory):
    with pytest.raises(VsphereError, match="configuration is not available.*it is orphaned"):
        find_vm(session, name="lost")


def test_machine_without_an_instance_uuid_is_another_error(session, inventory):
    with pytest.raises(VsphereError, match="has no instance UUID.*is empty.*vCenter gives it one"):
        find_vm(session, name="nameless")
