# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What clients of others rely on, and this collection does not: they found the simulator wrong in it."""

from __future__ import annotations

import ast
import sys
import urllib.parse
from pathlib import Path

import pytest
from pyVmomi import VmomiSupport, vim, vmodl

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from test_api import MIB, PC, Started, done, ready  # noqa: E402
from test_rest import Rest  # noqa: E402

Browser = vim.host.DatastoreBrowser
Devices = vim.vm.device
EVERYTHING = Browser.FileInfo.Details(fileType=True, fileSize=True, modification=True, fileOwner=True)
METHODS = Path(__file__).resolve().parents[1] / "vcenter" / "methods"


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("sim") / "state")
    yield started
    started.stop()


# --- virtual machines -----------------------------------------------------------------------------------------------


def test_controllers_list_their_devices(sim):
    vm = sim.vm("restore01")

    def attached(config):
        devices = config.hardware.device
        for one in devices:
            if isinstance(one, Devices.VirtualController):
                assert list(one.device) == [other.key for other in devices if other.controllerKey == one.key]
        return next(list(one.device) for one in devices if isinstance(one, Devices.VirtualSCSIController))

    before = attached(vm.config)
    assert set(before) == {2000, 2001}
    backing = Devices.VirtualDisk.FlatVer2BackingInfo(fileName="[vmfs01]", diskMode="persistent", thinProvisioned=True)
    disk = Devices.VirtualDisk(key=-1, controllerKey=1000, unitNumber=5, capacityInBytes=MIB, backing=backing)
    add = Devices.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk)
    done(vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[add])))
    snapshot = done(vm.CreateSnapshot_Task(name="one", description="", memory=False, quiesce=False))
    assert attached(vm.config) == attached(snapshot.config) == [*before, 2005]
    done(snapshot.RemoveSnapshot_Task(removeChildren=False))
    disk = next(one for one in vm.config.hardware.device if one.key == 2005)
    remove = Devices.VirtualDeviceSpec(operation="remove", fileOperation="destroy", device=disk)
    done(vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[remove])))
    assert attached(vm.config) == before


def test_allocations_and_the_video_card_are_those_of_a_real_machine(sim):
    config = sim.vm().config
    for allocation in (config.cpuAllocation, config.memoryAllocation):
        assert (allocation.reservation, allocation.limit, allocation.expandableReservation) == (0, -1, False)
        assert allocation.shares.level == "normal"
    assert config.cpuAllocation.shares.shares == 1000 * config.hardware.numCPU
    assert config.memoryAllocation.shares.shares == 10 * config.hardware.memoryMB
    by_kind = {type(device): device for device in config.hardware.device}
    video = by_kind[Devices.VirtualVideoCard]
    assert (video.enable3DSupport, video.use3dRenderer, video.graphicsMemorySizeInKB) == (False, "automatic", 262144)
    assert by_kind[Devices.VirtualDisk].storageIOAllocation.limit == -1
    assert by_kind[Devices.VirtualVmxnet3].resourceAllocation.share.level == "normal"


# --- the property collector -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["config.hardware.device[2000].macAddress", "config.hardware.device[9].backing.changeId", "guest.net"]
)
def test_what_another_kind_would_have_is_unset(sim, path):
    spec = PC.FilterSpec(
        propSet=[PC.PropertySpec(type=vim.VirtualMachine, pathSet=["name", path])],
        objectSet=[PC.ObjectSpec(obj=sim.vm())],
    )
    (content,) = sim.si.content.propertyCollector.RetrieveContents([spec])
    assert [prop.name for prop in content.propSet if prop.val not in (None, [])] == ["name"]


@pytest.mark.parametrize("path", ["config.nonsense", "config.hardware.device[2000].nonsense", "nonsense"])
def test_what_no_kind_has_is_invalid(sim, path):
    spec = PC.FilterSpec(
        propSet=[PC.PropertySpec(type=vim.VirtualMachine, pathSet=[path])], objectSet=[PC.ObjectSpec(obj=sim.vm())]
    )
    with pytest.raises(vmodl.query.InvalidProperty):
        sim.si.content.propertyCollector.RetrieveContents([spec])


# --- faults ---------------------------------------------------------------------------------------------------------


def registered(function):
    """(type, method) for which a function is registered."""
    for one in function.decorator_list:
        if isinstance(one, ast.Call) and getattr(one.func, "id", "") == "method":
            names = [argument.value for argument in one.args]
            yield from ((names[0], name) for name in names[1:])


def raised(function, functions, seen):
    """Names of the faults that a function raises, and the functions of its file that it calls."""
    if function.name in seen:
        return
    seen.add(function.name)
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            words = ast.unparse(node.exc.func)
            if words.startswith("vim.fault."):
                yield words[len("vim.fault.") :], node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            yield from raised(functions[node.func.id], functions, seen)


def test_methods_raise_no_fault_that_they_do_not_declare():
    wrong, looked_at = [], 0
    for path in sorted(METHODS.glob("*.py")):
        functions = {one.name: one for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.FunctionDef)}
        for function in functions.values():
            for kind, name in registered(function):
                owner = VmomiSupport.GetWsdlType("urn:vim25", kind)
                info = next((one for one in infos(owner) if one.wsdlName == name), None)
                assert info is not None, (kind, name)
                looked_at += 1
                declared = tuple(VmomiSupport.GetVmodlType(fault) for fault in info.faults) + (vmodl.RuntimeFault,)
                wrong += [
                    f"{kind}.{name} raises {fault}: {path.name}:{line}"
                    for fault, line in raised(function, functions, set())
                    if not issubclass(getattr(vim.fault, fault.split(".")[0]), declared)
                ]
    assert looked_at > 90 and wrong == []


def infos(owner):
    for kind in owner.__mro__:
        yield from getattr(kind, "_methodInfo", {}).values()


# --- leases ---------------------------------------------------------------------------------------------------------


def test_progress_is_taken_while_a_lease_is_initializing(sim):
    sim.control.call("set_settings", task_delay=1.0)
    try:
        lease = sim.vm("restore01").ExportVm()
        assert lease.state == "initializing"
        lease.HttpNfcLeaseProgress(0)
    finally:
        sim.control.call("set_settings", task_delay=0.02)
    ready(lease)
    lease.HttpNfcLeaseProgress(50)
    lease.HttpNfcLeaseComplete()
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        lease.HttpNfcLeaseProgress(100)


def test_through_vcenter_a_lease_names_the_host(sim):
    """A host that is logged in to directly says "*"."""
    vm = sim.vm("restore01")
    found = []
    for esxi in (False, True):
        sim.control.call("set_settings", esxi=esxi)
        lease = vm.ExportVm()
        found.append({urllib.parse.urlsplit(url.url).hostname for url in ready(lease).deviceUrl})
        lease.HttpNfcLeaseAbort(None)
    sim.control.call("set_settings", esxi=False)
    assert found == [{vm.runtime.host.name}, {"*"}]


# --- datastores -----------------------------------------------------------------------------------------------------


def search(sim, path, deep=False, **spec):
    browser = sim.object(vim.Datastore, "vmfs01").browser
    call = browser.SearchDatastoreSubFolders_Task if deep else browser.SearchDatastore_Task
    return done(call(path, Browser.SearchSpec(**spec)))


def test_a_datastore_is_browsed(sim):
    assert {"app01", "restore01"} <= {one.path for one in search(sim, "[vmfs01]").file}
    plain = {one.path: one for one in search(sim, "[vmfs01] app01").file}
    assert {"app01.vmx", "app01.vmdk", "app01.nvram"} <= set(plain)
    # What was not asked for is not told.
    assert {type(one) for one in plain.values()} == {Browser.FileInfo}
    assert all(one.fileSize is one.modification is one.owner is None for one in plain.values())
    told = {one.path: one for one in search(sim, "[vmfs01] app01", details=EVERYTHING).file}
    assert set(told) == set(plain) and all(one.modification and one.owner for one in told.values())
    assert isinstance(told["app01.vmx"], Browser.VmConfigInfo) and told["app01.nvram"].fileSize > 1000
    assert isinstance(told["app01.vmdk"], Browser.VmDiskInfo) and told["app01.vmdk"].capacityKb is None
    with pytest.raises(vim.fault.FileNotFound):
        search(sim, "[vmfs01] nowhere")


def test_queries_choose_what_is_found(sim):
    folders = search(sim, "[vmfs01]", query=[Browser.FolderQuery()]).file
    assert {type(one) for one in folders} == {Browser.FolderInfo} and "app01" in {one.path for one in folders}
    assert not search(sim, "[vmfs01]", query=[Browser.VmDiskQuery()]).file
    wanted = Browser.VmDiskQuery.Details(capacityKb=True, thin=True, diskType=True, hardwareVersion=True)
    found = search(sim, "[vmfs01] app01", query=[Browser.VmDiskQuery(details=wanted)]).file
    assert [(one.path, one.capacityKb, one.thin) for one in found] == [
        ("app01.vmdk", 64 * 1024, True),
        ("app01_1.vmdk", (16 * MIB + 67 * 512) // 1024, True),
    ]
    both = search(sim, "[vmfs01] app01", query=[Browser.VmConfigQuery(), Browser.VmNvramQuery()]).file
    assert [one.path for one in both] == ["app01.nvram", "app01.vmx"]
    for case, pattern, names in ((False, "APP*.vmx", []), (True, "APP*.vmx", ["app01.vmx"])):
        result = search(sim, "[vmfs01] app01", matchPattern=[pattern], searchCaseInsensitive=case)
        assert [one.path for one in result.file] == names
    below = search(sim, "[vmfs01]", deep=True, matchPattern=["*.vmx"])
    assert {one.folderPath: [file.path for file in one.file] for one in below}["[vmfs01] app01"] == ["app01.vmx"]


# --- REST -----------------------------------------------------------------------------------------------------------


def test_sessions_of_the_older_rest_api_and_of_the_newer_one(sim):
    rest = Rest(sim)
    assert rest.login() == 201
    assert rest.ask("GET", "/api/session")[1]["user"] == sim.info["backup_username"]
    given = rest.basic()
    rest.token = None
    path = "/rest/com/vmware/cis/session"
    status, answer = rest.ask("POST", path, Authorization=given)
    assert status == 200
    rest.token = answer["value"]
    for status, answer in (rest.ask("GET", path), rest.ask("POST", f"{path}?~action=get")):
        assert status == 200 and answer["value"]["user"] == sim.info["backup_username"]
    # The one is as good as the other.
    assert rest.ask("GET", "/api/session")[0] == 200
    assert rest.ask("DELETE", path) == (200, {})
    status, answer = rest.ask("GET", path)
    assert status == 401 and answer["type"] == "com.vmware.vapi.std.errors.unauthenticated"
    assert rest.ask("GET", "/rest/com/vmware/nothing")[0] == 404
