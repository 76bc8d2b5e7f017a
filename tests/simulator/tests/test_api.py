# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The simulator's API side, with unmodified pyVmomi and raw HTTP against a started simulator."""

from __future__ import annotations

import base64
import hashlib
import http.client
import inspect
import json
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from pyVim.connect import Disconnect, SmartConnect
from pyVim.task import WaitForTask
from pyVmomi import SoapStubAdapter, vim, vmodl

SIMULATOR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SIMULATOR))

from client import Control  # noqa: E402
from vcenter import stream_vmdk  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
PC = vmodl.query.PropertyCollector
Disk = vim.vm.device.VirtualDisk


class Started:
    """A running simulator, the control socket, and an administrator's session."""

    def __init__(self, state: Path, vms: str = "minimal") -> None:
        self.state = state
        self.process = subprocess.Popen(
            [SIMULATOR / "run", "--state", str(state), "--vms", vms], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.info = json.loads(self.process.stdout.readline())
        self.control = Control(self.info["control_socket"])
        self.si = self.connect()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.info["ca_path"])

    def connect(self, user: str | None = None, password: str | None = None, **more: object) -> vim.ServiceInstance:
        return SmartConnect(
            host=self.info["host"],
            port=self.info["port"],
            user=user or self.info["username"],
            pwd=password or self.info["password"],
            sslContext=self.context(),
            **more,
        )

    def backup_user(self) -> vim.ServiceInstance:
        return self.connect(self.info["backup_username"], self.info["backup_password"])

    def vm(self, name: str = "app01", si: vim.ServiceInstance | None = None) -> vim.VirtualMachine:
        content = (si or self.si).content
        view = content.viewManager.CreateContainerView(content.rootFolder, [vim.VirtualMachine], True)
        found = next(vm for vm in view.view if vm.name == name)
        view.Destroy()
        return found

    def object(self, kind: type, name: str) -> vim.ManagedEntity:
        content = self.si.content
        view = content.viewManager.CreateContainerView(content.rootFolder, [kind], True)
        found = next(one for one in view.view if one.name == name)
        view.Destroy()
        return found

    def http(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.info["host"], self.info["port"], context=self.context(), timeout=20)

    def until(self, condition: Callable[[], bool]) -> None:
        """Ask the simulator for nothing until the condition holds."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            self.control.call("attachments")

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.control.close()
        self.process.send_signal(number)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("sim") / "state")
    yield started
    started.stop()


@pytest.fixture
def app(sim):
    """app01 as it was at the start, as far as snapshots, tracking and power go."""
    yield sim.vm()
    sim.control.call("clear_injections")
    sim.control.call("set_settings", task_delay=0.02, page_areas=2000, page_bytes=None, session_idle=1800.0)
    try:
        sim.si.content.sessionManager.currentSession  # noqa: B018  it is a call
        vm = sim.vm()
    except vim.fault.NotAuthenticated:
        sim.si = sim.connect()
        vm = sim.vm()
    done(vm.RemoveAllSnapshots_Task())
    if vm.runtime.consolidationNeeded:
        done(vm.ConsolidateVMDisks_Task())
    if vm.runtime.powerState != "poweredOn":
        done(vm.PowerOn())
    tracking(vm, False)


def done(task):
    WaitForTask(task)
    return task.info.result


def disks(config):
    return {one.key: one for one in config.hardware.device if isinstance(one, Disk)}


def snapshot(vm, name="one", memory=False, quiesce=False):
    return done(vm.CreateSnapshot_Task(name=name, description="", memory=memory, quiesce=quiesce))


def remove(snap, **options):
    done(snap.RemoveSnapshot_Task(removeChildren=False, **options))


def tracking(vm, on=True):
    """On (or off), and effective."""
    done(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=on)))
    remove(snapshot(vm, "stun"))


def areas(vm, snap, change_id, key=2000):
    capacity = disks(snap.config)[key].capacityInBytes
    found, offset, pages = [], 0, 0
    while offset < capacity:
        page = vm.QueryChangedDiskAreas(snap, key, offset, change_id)
        assert page.startOffset == offset
        found += [(area.start, area.length) for area in page.changedArea]
        offset += page.length
        pages += 1
    return found, pages


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_certificate_is_verified_by_the_simulators_ca_only(sim):
    with pytest.raises(ssl.SSLCertVerificationError):
        SmartConnect(
            host="127.0.0.1", port=sim.info["port"], user="x", pwd="y", sslContext=ssl.create_default_context()
        )
    for name in ("localhost", "127.0.1.2"):
        with ssl.create_default_context(cafile=sim.info["ca_path"]).wrap_socket(
            __import__("socket").create_connection(("127.0.0.1", sim.info["port"])), server_hostname=name
        ) as verified:
            assert verified.getpeercert()


def test_every_property_of_every_object_can_be_read(sim):
    content = sim.si.content
    view = content.viewManager.CreateContainerView(content.rootFolder, [], True)
    version = sim.si._stub.version
    read = 0
    from pyVmomi.VmomiSupport import IsChildVersion

    for obj in [content.rootFolder, *view.view]:
        for info in type(obj)._GetPropertyList():
            if IsChildVersion(version, info.version):
                getattr(obj, info.name)
                read += 1
    assert read > 500
    assert {vm.name for vm in view.view if isinstance(vm, vim.VirtualMachine)} == {"app01", "restore01", "proxy01"}


def test_every_method_takes_what_its_description_says():
    from vcenter import methods, soap

    methods.load()
    for (kind, name), registered in methods._METHODS.items():
        wanted = [param.name for param in soap._method_info(soap.NAMESPACE, name).params]
        taken = list(inspect.signature(registered.function).parameters)[2:]
        assert taken == wanted, (kind, name)


def test_clients_of_old_versions_are_answered(sim):
    stub = SoapStubAdapter(
        host="127.0.0.1", port=sim.info["port"], version="vim.version.version7", sslContext=sim.context()
    )
    content = vim.ServiceInstance("ServiceInstance", stub).RetrieveContent()
    content.sessionManager.Login(sim.info["username"], sim.info["password"])
    assert content.rootFolder.childEntity[0].name == "DC0"
    content.sessionManager.Logout()


def test_search_index(sim):
    index = sim.si.content.searchIndex
    vm = index.FindByInventoryPath("/DC0/vm/production/app01")
    assert vm.name == "app01"
    assert index.FindByUuid(None, vm.config.uuid, True, False) == vm
    assert index.FindByUuid(None, vm.config.instanceUuid, True, True) == vm
    assert index.FindByUuid(None, vm.config.instanceUuid, True, False) is None
    assert index.FindChild(vm.parent, "app01") == vm
    assert index.FindByInventoryPath("DC0/vm/app01") is None


def test_properties_come_in_pages(sim):
    content = sim.si.content
    view = content.viewManager.CreateContainerView(content.rootFolder, [vim.ManagedEntity], True)
    spec = PC.FilterSpec(
        propSet=[PC.PropertySpec(type=vim.ManagedEntity, pathSet=["name"])],
        objectSet=[
            PC.ObjectSpec(
                obj=view,
                skip=True,
                selectSet=[PC.TraversalSpec(type=vim.view.ContainerView, path="view", skip=False)],
            )
        ],
    )
    whole = content.propertyCollector.RetrieveContents([spec])
    paged, result = [], content.propertyCollector.RetrievePropertiesEx([spec], PC.RetrieveOptions(maxObjects=5))
    while result.token:
        assert len(result.objects) == 5
        paged += result.objects
        result = content.propertyCollector.ContinueRetrievePropertiesEx(result.token)
    paged += result.objects
    assert [one.obj for one in paged] == [one.obj for one in whole]
    assert len(paged) > 15
    spec.propSet[0].pathSet = ["nonsense"]
    with pytest.raises(vmodl.query.InvalidProperty):
        content.propertyCollector.RetrieveContents([spec])


def test_updates_are_waited_for(sim, app):
    pc = sim.si.content.propertyCollector
    spec = PC.FilterSpec(
        propSet=[PC.PropertySpec(type=vim.VirtualMachine, pathSet=["runtime.powerState", "snapshot"])],
        objectSet=[PC.ObjectSpec(obj=app)],
    )
    waited = pc.CreateFilter(spec, True)
    first = pc.WaitForUpdatesEx("", PC.WaitOptions(maxWaitSeconds=5))
    assert first.filterSet[0].objectSet[0].kind == "enter"
    assert pc.WaitForUpdatesEx(first.version, PC.WaitOptions(maxWaitSeconds=0)) is None
    threading.Timer(0.2, lambda: sim.control.call("power", vm="app01", state="poweredOff")).start()
    second = pc.WaitForUpdatesEx(first.version, PC.WaitOptions(maxWaitSeconds=10))
    assert [(one.name, one.val) for one in second.filterSet[0].objectSet[0].changeSet] == [
        ("runtime.powerState", "poweredOff")
    ]
    with pytest.raises(vmodl.query.InvalidCollectorVersion):
        pc.WaitForUpdatesEx("77", PC.WaitOptions(maxWaitSeconds=0))
    waited.Destroy()


ENVELOPE = (
    '<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" xmlns="urn:vim25" '
    'xmlns:XMLSchema-instance="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body>{}</soapenv:Body>'
    "</soapenv:Envelope>"
)


def post(connection, body, cookie=None, chunked=True):
    data = ENVELOPE.format(body).encode()
    headers = {"SOAPAction": "urn:vim25/99.0", "Content-Type": "text/xml"}
    if cookie:
        headers["Cookie"] = cookie
    pieces = [data[at : at + 100] for at in range(0, len(data), 100)] if chunked else data
    connection.request("POST", "/sdk", body=iter(pieces) if chunked else data, headers=headers, encode_chunked=chunked)
    response = connection.getresponse()
    return response.status, response.read().decode(), response.getheader("Set-Cookie")


def test_chunked_requests_and_typed_answers_as_govc_wants_them(sim):
    connection = sim.http()
    login = (
        '<Login><_this type="SessionManager">SessionManager</_this>'
        "<userName>{}</userName><password>{}</password></Login>"
    ).format(sim.info["username"], sim.info["password"])
    status, _unused, cookie = post(connection, login)
    assert status == 200
    retrieve = (
        '<RetrieveProperties><_this type="PropertyCollector">propertyCollector</_this><specSet>'
        "<propSet><type>VirtualMachine</type><pathSet>parent</pathSet><pathSet>datastore</pathSet>"
        "<pathSet>config.hardware.memoryMB</pathSet><pathSet>config.extraConfig</pathSet>"
        "<pathSet>config.cpuFeatureMask</pathSet></propSet>"
        '<objectSet><obj type="VirtualMachine">{}</obj></objectSet></specSet></RetrieveProperties>'
    ).format(sim.vm()._moId)
    status, text, unused = post(connection, retrieve, cookie.split(";")[0])
    assert status == 200
    assert '<val xsi:type="ManagedObjectReference" type="Folder">group-v7</val>' in text
    assert '<val xsi:type="ArrayOfManagedObjectReference"><ManagedObjectReference type="Datastore">' in text
    assert '<val xsi:type="xsd:int">1024</val>' in text
    assert '<val xsi:type="ArrayOfOptionValue"><OptionValue>' in text
    assert '<val xsi:type="ArrayOfHostCpuIdInfo"></val>' in text


def test_what_is_not_understood_is_a_fault_on_a_living_connection(sim):
    connection = sim.http()
    connection.connect()
    sock = connection.sock
    wrong = [
        "<NoSuchMethod><_this type='VirtualMachine'>vm-101</_this></NoSuchMethod>",
        "<PowerOnVM_Task><_this type='VirtualMachine'>vm-101</_this><extra>1</extra></PowerOnVM_Task>",
        "<FindByUuid><_this type='SearchIndex'>SearchIndex</_this><uuid>x</uuid><vmSearch>maybe</vmSearch>"
        "</FindByUuid>",
        "<FindByUuid><_this type='SearchIndex'>SearchIndex</_this></FindByUuid>",
        "<RetrieveServiceContent><_this type='VirtualMachine'>vm-9999</_this></RetrieveServiceContent>",
        "<unclosed>",
    ]
    for body in wrong:
        status, text, unused = post(connection, body)
        assert status == 500
        assert "<faultstring>" in text
    assert connection.sock is sock
    with pytest.raises(vmodl.fault.MethodNotFound):
        sim.vm().AcquireMksTicket()
    with pytest.raises(vmodl.fault.MethodNotFound):
        sim.vm().UpgradeTools_Task()
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        vim.VirtualMachine("vm-9999", sim.si._stub).name  # noqa: B018


# --- sessions and privileges ----------------------------------------------------------------------------------------


def test_sessions(sim, app):
    with pytest.raises(vim.fault.InvalidLogin):
        sim.connect(password="wrong")
    assert sim.si.content.sessionManager.currentSession.userName == sim.info["username"]
    other = sim.connect("VSPHERE.LOCAL\\Administrator")
    vm = sim.vm(si=other)
    Disconnect(other)
    with pytest.raises(vim.fault.NotAuthenticated):
        vm.name  # noqa: B018
    sim.control.call("expire_sessions")
    with pytest.raises(vim.fault.NotAuthenticated):
        app.name  # noqa: B018
    idle = sim.connect()
    sim.control.call("set_settings", session_idle=0.05)
    time.sleep(0.2)
    with pytest.raises(vim.fault.NotAuthenticated):
        idle.content.rootFolder.name  # noqa: B018
    sim.control.call("set_settings", session_idle=1800.0)


@pytest.mark.parametrize("later", [False, True])
def test_an_outage(sim, app, later):
    """Connections are cut and refused, then sessions and tasks are unknown; what the hosts do for a task goes on."""
    control = sim.control.call
    control("inject", target="task", name="CreateSnapshot_Task", delay=0.5)
    seen = control("calls")[-1]["seq"]
    if later:
        control("outage", seconds=1.5, at=2)
    task = app.CreateSnapshot_Task("outage", "", False, False)
    if not later:
        control("outage", seconds=1.5)
    with pytest.raises((OSError, http.client.HTTPException)):
        app.name  # noqa: B018
    assert len(control("calls", since=seen)) == 1 + later, "the call that it began with was done"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((sim.info["host"], sim.info["port"]))
    socket.create_connection(("127.0.1.1", sim.info["port"])).close()
    sim.until(lambda: [one["name"] for one in control("state")["vms"][app._moId]["snapshots"]] == ["outage"])

    def back() -> bool:
        try:
            socket.create_connection((sim.info["host"], sim.info["port"])).close()
        except ConnectionRefusedError:
            return False
        return True

    sim.until(back)
    with pytest.raises(vim.fault.NotAuthenticated):
        app.name  # noqa: B018
    sim.si = sim.connect()
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        vim.Task(task._moId, sim.si._stub).info  # noqa: B018


def test_what_the_backup_user_may(sim, app):
    si = sim.backup_user()
    vm = sim.vm(si=si)
    tracking(vm)
    remove(snapshot(vm))
    with pytest.raises(vim.fault.NoPermission) as error:
        vm.PowerOff()
    assert error.value.privilegeId == "VirtualMachine.Interact.PowerOff"
    assert error.value.object == vm
    with pytest.raises(vim.fault.NoPermission) as error:
        vm.ReconfigVM_Task(vim.vm.ConfigSpec(annotation="x"))
    assert error.value.privilegeId == "VirtualMachine.Config.Annotation"
    lost = "VirtualMachine.State.CreateSnapshot"
    sim.control.call("set_privileges", username=sim.info["backup_username"], remove=[lost])
    with pytest.raises(vim.fault.NoPermission) as error:
        vm.CreateSnapshot_Task("x", "", False, False)
    assert error.value.privilegeId == lost
    authorization = si.content.authorizationManager
    key = si.content.sessionManager.currentSession.key
    granted = authorization.HasPrivilegeOnEntities([vm], key, [lost, "Datastore.Browse"])
    assert [one.isGranted for one in granted[0].privAvailability] == [False, True]
    sim.control.call("set_privileges", username=sim.info["backup_username"], add=[lost])


# --- snapshots and change tracking ----------------------------------------------------------------------------------


def test_snapshot_names_chains_and_consolidation_keep_every_byte(sim, app):
    def write(offset, text):
        sim.control.call("guest_write", vm="app01", disk=2000, offset=offset, data=text)

    write(0, b"before")
    one = snapshot(app, "one")
    write(0, b"second")
    write(10 * MIB, b"in one's delta")
    two = snapshot(app, "two")
    write(0, b"third ")
    base = "[vmfs01] app01/app01.vmdk"
    assert disks(one.config)[2000].backing.fileName == base
    assert disks(two.config)[2000].backing.fileName == "[vmfs01] app01/app01-000001.vmdk"
    now = disks(app.config)[2000].backing
    assert (now.fileName, now.parent.fileName, now.parent.parent.fileName, now.parent.parent.parent) == (
        "[vmfs01] app01/app01-000002.vmdk",
        "[vmfs01] app01/app01-000001.vmdk",
        base,
        None,
    )
    assert app.snapshot.currentSnapshot == two
    assert app.snapshot.rootSnapshotList[0].childSnapshotList[0].snapshot == two
    assert sim.control.read("app01", 2000, 0, 6, one._moId) == b"before"
    remove(one)
    assert disks(two.config)[2000].backing.fileName == base
    assert sim.control.read("app01", 2000, 0, 6, two._moId) == b"second"
    remove(two)
    assert app.snapshot is None
    assert disks(app.config)[2000].backing.fileName == base
    assert sim.control.read("app01", 2000, 0, 6) == b"third "
    assert sim.control.read("app01", 2000, 10 * MIB, 14) == b"in one's delta"
    assert not [one for one in app.layoutEx.file if "-0000" in one.name]
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        one.config  # noqa: B018


def test_change_tracking_needs_a_stun_cycle_and_ids_belong_to_the_snapshot(sim, app):
    done(app.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=True)))
    early = snapshot(app, "early")
    assert disks(early.config)[2000].backing.changeId is None
    with pytest.raises(vim.fault.FileFault):
        app.QueryChangedDiskAreas(early, 2000, 0, "*")
    remove(early)
    one = snapshot(app, "one")
    first = disks(one.config)[2000].backing.changeId
    assert first
    assert disks(app.config)[2000].backing.changeId != first
    remove(one)
    sim.control.call("guest_write", vm="app01", disk=2000, offset=5 * MIB + 3, data=b"x")
    capacity = disks(app.config)[2001].capacityInBytes
    sim.control.call("guest_write", vm="app01", disk=2001, offset=capacity - 512, data=b"y" * 512)
    two = snapshot(app, "two")
    assert areas(app, two, first) == ([(5 * MIB, 64 * KIB)], 1)
    second_disk = disks(two.config)[2001].backing.changeId
    assert areas(app, two, second_disk, 2001)[0] == []
    assert app.QueryChangedDiskAreas(two, 2000, 0, "*").changedArea
    for offset in (capacity, -1):
        with pytest.raises(vmodl.fault.InvalidArgument):
            app.QueryChangedDiskAreas(two, 2001, offset, second_disk)
    with pytest.raises(vmodl.fault.InvalidArgument):
        app.QueryChangedDiskAreas(two, 2005, 0, second_disk)
    for unknown in ("52 00/1", first.rsplit("/", 1)[0] + "/99", "nonsense"):
        with pytest.raises(vim.fault.FileFault):
            app.QueryChangedDiskAreas(two, 2000, 0, unknown)
    sim.control.call("reset_cbt", vm="app01", disk=2000)
    three = snapshot(app, "three")
    with pytest.raises(vim.fault.FileFault):
        app.QueryChangedDiskAreas(three, 2000, 0, first)


def test_areas_come_in_pages_of_2000_at_most(sim, app):
    tracking(app)
    one = snapshot(app, "one")
    change_id = disks(one.config)[2000].backing.changeId
    remove(one)
    sim.control.call("set_settings", page_areas=100)
    blocks = list(range(0, 64 * MIB, 256 * KIB))
    sim.control.call("guest_write", vm="app01", disk=2000, offsets=blocks, data=b"z")
    two = snapshot(app, "two")
    found, pages = areas(app, two, change_id)
    assert found == [(block, 64 * KIB) for block in blocks]
    assert pages == 3
    # A page that is just full: the next one is empty.
    sim.control.call("set_settings", page_areas=len(blocks))
    assert areas(app, two, change_id) == (found, 2)
    sim.control.call("set_settings", page_areas=2000, page_bytes=MIB)
    limited, pages = areas(app, two, change_id)
    assert sum(length for _unused, length in limited) == 64 * KIB * len(blocks)
    assert pages == 64


def test_revert_brings_the_bytes_back_and_misses_areas(sim, app):
    tracking(app)
    sim.control.call("guest_write", vm="app01", disk=2000, offset=0, data=b"old")
    foreign = snapshot(app, "foreign")
    sim.control.call("guest_write", vm="app01", disk=2000, offset=0, data=b"new")
    backup = snapshot(app, "backup")
    change_id = disks(backup.config)[2000].backing.changeId
    remove(backup)
    done(foreign.RevertToSnapshot_Task())
    assert sim.control.read("app01", 2000, 0, 3) == b"old"
    assert app.runtime.powerState == "poweredOff"
    assert app.snapshot.currentSnapshot == foreign
    after = snapshot(app, "after")
    new_id = disks(after.config)[2000].backing.changeId
    assert new_id.rsplit("/", 1)[0] == change_id.rsplit("/", 1)[0]
    try:
        assert areas(app, after, change_id)[0] == []  # block 0 did change
    except vim.fault.FileFault:
        assert int(new_id.rsplit("/", 1)[1]) < int(change_id.rsplit("/", 1)[1])
    spec = vim.event.EventFilterSpec(entity=vim.event.EventFilterSpec.ByEntity(entity=app, recursion="self"))
    events = sim.si.content.eventManager.QueryEvents(spec)
    assert [one.eventTypeId for one in events] == ["com.vmware.vc.vm.VmStateRevertedToSnapshot"]


def test_removal_with_an_open_disk_leaves_the_delta(sim, app):
    proxy = sim.vm("restore01")
    sim.control.call("guest_write", vm="app01", disk=2000, offset=0, data=b"base")
    snap = snapshot(app, "backup")
    sim.control.call("guest_write", vm="app01", disk=2000, offset=0, data=b"leaf")
    done(proxy.PowerOn())
    attached = Disk(
        key=-1,
        controllerKey=1000,
        unitNumber=5,
        backing=Disk.FlatVer2BackingInfo(
            fileName=disks(snap.config)[2000].backing.fileName, diskMode="independent_nonpersistent"
        ),
    )
    change = vim.vm.device.VirtualDeviceSpec(operation="add", device=attached)
    done(proxy.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[change])))
    key = next(one.key for one in disks(proxy.config).values() if one.unitNumber == 5)
    with pytest.raises(vim.fault.FileLocked):
        remove(snap)
    assert app.snapshot is None
    assert app.runtime.consolidationNeeded
    assert any("-000001" in one.name for one in app.layoutEx.file)
    with pytest.raises(vim.fault.FileLocked):
        done(app.ConsolidateVMDisks_Task())
    detach = vim.vm.device.VirtualDeviceSpec(operation="remove", device=disks(proxy.config)[key])
    done(proxy.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[detach])))
    done(app.ConsolidateVMDisks_Task())
    assert not app.runtime.consolidationNeeded
    assert sim.control.read("app01", 2000, 0, 4) == b"leaf"
    assert disks(app.config)[2000].backing.fileName == "[vmfs01] app01/app01.vmdk"
    done(proxy.PowerOff())


def test_quiesce_is_shown_as_asked_even_where_it_was_ignored(sim, app):
    done(app.PowerOff())
    snap = snapshot(app, "quiesced", quiesce=True)
    assert app.snapshot.rootSnapshotList[0].quiesced is True
    assert app.guest.toolsRunningStatus == "guestToolsNotRunning"
    remove(snap)
    spec = vim.vm.WindowsQuiesceSpec(timeout=5)
    done(app.CreateSnapshotEx_Task("ex", "", False, spec))
    assert app.snapshot.rootSnapshotList[0].quiesced is True


def test_a_chain_has_32_snapshots_at_most(sim):
    vm = sim.vm("restore01")
    sim.control.call("set_settings", task_delay=0.0)
    for number in range(32):
        snapshot(vm, f"s{number}")
    with pytest.raises(vim.fault.TooManySnapshotLevels):
        snapshot(vm, "one too many")
    root = vm.rootSnapshot[0]
    done(root.RemoveSnapshot_Task(removeChildren=True))
    assert vm.snapshot is None
    assert not [one for one in vm.layoutEx.file if "-0000" in one.name]
    sim.control.call("set_settings", task_delay=0.02)


# --- tasks and injected faults --------------------------------------------------------------------------------------


def test_tasks(sim, app):
    sim.control.call("set_settings", task_delay=0.6)
    task = app.CreateSnapshot_Task("slow", "", False, False)
    assert task.info.state in ("queued", "running")
    with pytest.raises(vim.fault.TaskInProgress) as error:
        app.CreateSnapshot_Task("too soon", "", False, False)
    assert error.value.task == task
    task.CancelTask()
    with pytest.raises(vmodl.fault.RequestCanceled):
        WaitForTask(task)
    assert task.info.cancelled
    assert app.snapshot is None
    with pytest.raises(vim.fault.InvalidPowerState):
        app.PowerOn()


def test_injected_faults(sim, app):
    sim.control.call("inject", target="call", name="CreateSnapshot_Task", fault="TaskInProgress", count=2)
    for _unused in range(2):
        with pytest.raises(vim.fault.TaskInProgress):
            app.CreateSnapshot_Task("x", "", False, False)
    sim.control.call("inject", target="task", name="CreateSnapshot_Task", fault="ApplicationQuiesceFault")
    with pytest.raises(vim.fault.ApplicationQuiesceFault):
        snapshot(app)
    assert app.snapshot is None
    sim.control.call("inject", target="call", name="CurrentTime", fault="drop")
    with pytest.raises((ConnectionError, http.client.HTTPException, OSError)):
        sim.si.CurrentTime()
    assert sim.si.CurrentTime()
    snapshot(app)


def test_the_call_log_tells_what_changes(sim, app):
    before = len(sim.control.call("calls"))
    remove(snapshot(app))
    app.name  # noqa: B018
    with pytest.raises(vim.fault.InvalidPowerState):
        app.PowerOn()
    calls = sim.control.call("calls", since=before)
    changing = [(one["method"], one["object"], one["fault"]) for one in calls if one["changing"]]
    assert [one[0] for one in changing] == ["CreateSnapshot_Task", "RemoveSnapshot_Task", "PowerOnVM_Task"]
    assert changing[0][1] == app._moId
    assert changing[2][2] == "InvalidPowerState"
    assert {one["user"] for one in calls} == {sim.info["username"]}


# --- reconfiguration and new VMs ------------------------------------------------------------------------------------


def test_disks_are_added_grown_and_removed(sim, app):
    new = Disk(
        key=-7,
        controllerKey=1000,
        unitNumber=3,
        capacityInKB=4096,
        backing=Disk.FlatVer2BackingInfo(fileName="", diskMode="persistent", thinProvisioned=True),
    )
    add = vim.vm.device.VirtualDeviceSpec(operation="add", fileOperation="create", device=new)
    done(app.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[add])))
    mine = next(one for one in disks(app.config).values() if one.unitNumber == 3)
    assert mine.key == 2003
    assert mine.deviceInfo.label == "Hard disk 3"
    with pytest.raises(vim.fault.InvalidDeviceSpec):
        done(app.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[add])))
    mine.capacityInKB, mine.capacityInBytes = 8192, None
    edit = vim.vm.device.VirtualDeviceSpec(operation="edit", device=mine)
    done(app.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[edit])))
    assert disks(app.config)[2003].capacityInBytes == 8 * MIB
    missing = Disk(
        key=-1,
        controllerKey=1000,
        backing=Disk.FlatVer2BackingInfo(fileName="[vmfs01] a/b.vmdk", diskMode="persistent"),
    )
    attach = vim.vm.device.VirtualDeviceSpec(operation="add", device=missing)
    with pytest.raises(vim.fault.FileNotFound):
        done(app.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[attach])))
    with pytest.raises(vim.fault.FileLocked):
        missing.backing.fileName = "[vmfs01] app01/app01.vmdk"
        other = sim.vm("restore01")
        done(other.PowerOn())
        try:
            done(other.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[attach])))
        finally:
            done(other.PowerOff())
    assert len(disks(sim.vm("restore01").config)) == 2
    file = disks(app.config)[2003].backing.fileName
    drop = vim.vm.device.VirtualDeviceSpec(operation="remove", fileOperation="destroy", device=disks(app.config)[2003])
    done(app.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[drop])))
    assert file not in [one.name for one in app.layoutEx.file]
    assert 2003 not in disks(app.config)


def test_a_vm_is_created_and_destroyed(sim):
    content = sim.si.content
    datacenter = content.rootFolder.childEntity[0]
    folder = datacenter.vmFolder.CreateFolder("restored")
    pool = datacenter.hostFolder.childEntity[0].resourcePool
    device = vim.vm.device
    controller = device.ParaVirtualSCSIController(key=-1, busNumber=0, sharedBus="noSharing")
    disk = Disk(
        key=-2,
        controllerKey=-1,
        unitNumber=0,
        capacityInBytes=2 * MIB + 512,
        capacityInKB=0,
        backing=Disk.FlatVer2BackingInfo(fileName="[nfs01]", diskMode="persistent", thinProvisioned=True),
    )
    card = device.VirtualVmxnet3(
        key=-3,
        backing=device.VirtualEthernetCard.NetworkBackingInfo(deviceName="VM Network", network=datacenter.network[0]),
    )
    spec = vim.vm.ConfigSpec(
        name="restored/1",
        guestId="debian12_64Guest",
        firmware="efi",
        files=vim.vm.FileInfo(vmPathName="[vmfs01]"),
        memoryMB=512,
        numCPUs=2,
        extraConfig=[vim.option.OptionValue(key="a", value="b")],
        deviceChange=[
            device.VirtualDeviceSpec(operation="add", device=controller),
            device.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk),
            device.VirtualDeviceSpec(operation="add", device=card),
        ],
    )
    vm = done(folder.CreateVM_Task(spec, pool))
    assert vm.name == "restored%2f1"
    assert content.searchIndex.FindByInventoryPath("DC0/vm/restored/restored%2f1") == vm
    made = disks(vm.config)[2000]
    assert made.capacityInBytes == 2 * MIB + 512
    assert made.backing.fileName == "[nfs01] restored_1/restored_1.vmdk"
    assert (vm.config.hardware.numCPU, vm.config.hardware.memoryMB, vm.config.firmware) == (2, 512, "efi")
    assert not [one for one in vm.layoutEx.file if one.type == "nvram"]
    with pytest.raises(vim.fault.DuplicateName):
        folder.CreateVM_Task(spec, pool)
    done(vm.PowerOn())
    assert [one for one in vm.layoutEx.file if one.type == "nvram"]
    with pytest.raises(vim.fault.InvalidPowerState):
        vm.Destroy_Task()
    done(vm.PowerOff())
    done(vm.Destroy_Task())
    assert not folder.childEntity
    assert not (sim.state / "datastores" / "nfs01" / "restored_1" / "restored_1-flat.vmdk").exists()


def test_new_vms_are_refused_what_vsphere_refuses(sim):
    content = sim.si.content
    datacenter = content.rootFolder.childEntity[0]
    cluster = datacenter.hostFolder.childEntity[0]
    folder, pool = datacenter.vmFolder, cluster.resourcePool
    kinds, card = vim.vm.device, vim.vm.device.VirtualEthernetCard

    def spec(*devices, **fields):
        changes = [kinds.VirtualDeviceSpec(operation="add", device=one) for one in devices]
        files = vim.vm.FileInfo(vmPathName="[vmfs01]")
        return vim.vm.ConfigSpec(name="strict", files=files, deviceChange=changes, **fields)

    def refused(fault, wanted, host=None):
        with pytest.raises(fault):
            done(folder.CreateVM_Task(wanted, pool, host))
        assert not [vm for vm in folder.childEntity if vm.name == "strict"]
        assert not (sim.state / "datastores" / "vmfs01" / "strict").exists()

    refused(vmodl.fault.InvalidArgument, spec(), sim.object(vim.HostSystem, "127.0.1.3"))
    refused(vim.fault.InvalidDeviceSpec, spec(kinds.VirtualKeyboard(key=-1)))
    refused(vim.fault.InvalidDeviceSpec, spec(kinds.VirtualTPM(key=-1)))
    lost = kinds.VirtualVmxnet3(key=-1, backing=card.NetworkBackingInfo(deviceName="nowhere"))
    refused(vim.fault.InvalidDeviceBacking, spec(lost))
    port = vim.dvs.PortConnection(switchUuid="none", portgroupKey="dvportgroup-0")
    refused(
        vim.fault.InvalidDeviceBacking,
        spec(kinds.VirtualVmxnet3(key=-1, backing=card.DistributedVirtualPortBackingInfo(port=port))),
    )
    image = kinds.VirtualCdrom.IsoBackingInfo(fileName="[nfs01] gone.iso")
    refused(vim.fault.FileNotFound, spec(kinds.VirtualCdrom(key=-1, controllerKey=200, unitNumber=0, backing=image)))
    boot = vim.vm.BootOptions(bootOrder=[vim.vm.BootOptions.BootableDiskDevice(deviceKey=2000)])
    refused(vmodl.fault.InvalidArgument, spec(bootOptions=boot))
    disk = kinds.VirtualDisk(
        key=-1, capacityInBytes=MIB, capacityInKB=KIB, backing=Disk.FlatVer2BackingInfo(fileName="[local01]")
    )
    far = spec()
    far.deviceChange = [kinds.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk)]
    refused(vim.fault.InvalidDatastore, far, sim.object(vim.HostSystem, "127.0.1.2"))


def test_addresses_stay_unique_and_slots_come_with_the_first_start(sim):
    folder = sim.vm("app01").parent
    taken = next(one for one in sim.vm("app01").config.hardware.device if hasattr(one, "macAddress")).macAddress
    pool = sim.vm("app01").resourcePool
    backing = vim.vm.device.VirtualEthernetCard.NetworkBackingInfo(deviceName="VM Network")
    cards = [
        vim.vm.device.VirtualVmxnet3(key=-1, addressType="assigned", macAddress=taken, backing=backing),
        vim.vm.device.VirtualVmxnet3(key=-2, addressType="manual", macAddress=taken, backing=backing),
    ]
    changes = [vim.vm.device.VirtualDeviceSpec(operation="add", device=one) for one in cards]
    files = vim.vm.FileInfo(vmPathName="[vmfs01]")
    vm = done(folder.CreateVM_Task(vim.vm.ConfigSpec(name="addresses", files=files, deviceChange=changes), pool))

    def made():
        return [one for one in vm.config.hardware.device if hasattr(one, "macAddress")]

    assert made()[0].macAddress != taken and made()[1].macAddress == taken
    assert [one.slotInfo for one in made()] == [None, None]
    done(vm.PowerOn())
    slots = [one.slotInfo.pciSlotNumber for one in made()]
    assert len(set(slots)) == 2
    done(vm.PowerOff())
    done(vm.Destroy_Task())


def test_storage_vmotion_renames_and_keeps_the_change_id(sim, app):
    vm = sim.vm("restore01")
    done(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=True)))
    before = disks(vm.config)[2000].backing
    target = next(one for one in vm.runtime.host.datastore if one.name == "nfs01")
    done(vm.RelocateVM_Task(vim.vm.RelocateSpec(datastore=target)))
    after = disks(vm.config)[2000].backing
    assert after.fileName == "[nfs01] restore01/restore01.vmdk"
    assert (after.uuid, after.changeId) == (before.uuid, before.changeId)
    assert [one.name for one in vm.datastore] == ["nfs01"]
    back = next(one for one in vm.runtime.host.datastore if one.name == "vmfs01")
    done(vm.RelocateVM_Task(vim.vm.RelocateSpec(datastore=back)))
    done(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeTrackingEnabled=False)))


# --- /folder --------------------------------------------------------------------------------------------------------


def fetch(sim, path, method="GET", headers=None, body=None, query="?dcPath=DC0&dsName=vmfs01", login=True):
    connection = sim.http()
    headers = dict(headers or {})
    if login:
        pair = f"{sim.info['username']}:{sim.info['password']}".encode()
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
    connection.request(method, f"/folder/{urllib.parse.quote(path)}{query}", body=body, headers=headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data, response


def test_folder_serves_files_with_authentication_and_ranges(sim, app):
    status, whole, unused = fetch(sim, "app01/app01.nvram")
    assert (status, whole[:5]) == (200, b"NVRAM")
    assert fetch(sim, "app01/app01.nvram", login=False)[0] == 401
    cookie = {"Cookie": sim.si._stub.cookie}
    assert fetch(sim, "app01/app01.nvram", headers=cookie, login=False)[1] == whole
    for value, expected in (
        ("bytes=0-4", whole[:5]),
        ("bytes=5-", whole[5:]),
        ("bytes=-3", whole[-3:]),
    ):
        status, data, response = fetch(sim, "app01/app01.nvram", headers={"Range": value})
        assert (status, data) == (206, expected)
        assert response.getheader("Content-Range").endswith(f"/{len(whole)}")
    assert fetch(sim, "app01/app01.nvram", headers={"Range": f"bytes={len(whole)}-"})[0] == 416
    status, data, response = fetch(sim, "app01/app01.nvram", "HEAD")
    assert (status, data, response.getheader("Content-Length")) == (200, b"", str(len(whole)))
    for query in ("?dsName=vmfs01", "?dcPath=DC1&dsName=vmfs01", "?dcPath=DC0&dsName=none"):
        assert fetch(sim, "app01/app01.nvram", query=query)[0] == 404
    assert fetch(sim, "../vmfs01/app01/app01.nvram")[0] in (400, 404)
    assert fetch(sim, "app01/none.nvram")[0] == 404


def test_folder_refuses_the_extents_of_a_running_vm(sim, app):
    snap = snapshot(app)
    for extent in ("app01/app01-flat.vmdk", "app01/app01-000001-delta.vmdk"):
        assert fetch(sim, extent, headers={"Range": "bytes=0-511"})[0] == 500
    remove(snap)
    status, data, unused = fetch(sim, "restore01/restore01-flat.vmdk", headers={"Range": "bytes=0-511"})
    assert (status, data) == (206, bytes(512))


def test_folder_takes_files(sim):
    assert fetch(sim, "restore01/upload.nvram", "PUT", body=b"one")[0] == 201
    assert fetch(sim, "restore01/upload.nvram", "PUT", body=iter([b"tw", b"o"]))[0] == 200
    assert fetch(sim, "restore01/upload.nvram")[1] == b"two"
    # vCenter makes the folders that are missing, but none where a file is.
    assert fetch(sim, "new/one/upload.nvram", "PUT", body=b"one")[0] == 201
    assert fetch(sim, "new/one/upload.nvram")[1] == b"one"
    assert fetch(sim, "restore01/upload.nvram/x", "PUT", body=b"one")[0] == 400
    assert fetch(sim, "restore01/upload.nvram", "PUT", body=b"one", login=False)[0] == 401
    calls = [one for one in sim.control.call("calls") if one["method"] == "PUT /folder" and one["changing"]]
    assert len(calls) == 3


# --- the state folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_same_state_goes_on(tmp_path, number):
    sim = Started(tmp_path / "state")
    app = sim.vm()
    tracking(app)
    snap = snapshot(app, "kept")
    change_id = disks(snap.config)[2000].backing.changeId
    sim.control.call("guest_write", vm="app01", disk=2000, offset=MIB, data=b"kept")
    sim.control.call("set_host", name="127.0.1.2", maintenance=True)
    before = sim.info
    sim.stop(number)
    sim = Started(tmp_path / "state")
    try:
        assert sim.info["password"] == before["password"]
        app = sim.vm()
        assert app.snapshot.currentSnapshot.config.hardware.device
        assert app.snapshot.rootSnapshotList[0].name == "kept"
        assert disks(app.snapshot.currentSnapshot.config)[2000].backing.changeId == change_id
        two = snapshot(app, "two")
        assert two._moId != snap._moId
        assert areas(app, two, change_id)[0] == [(MIB, 64 * KIB)]
        assert sim.control.read("app01", 2000, MIB, 4) == b"kept"
        hosts = {one["name"]: one["in_maintenance"] for one in sim.control.call("state")["hosts"]}
        assert hosts == {"127.0.1.1": False, "127.0.1.2": True, "127.0.1.3": False}
        done(app.RemoveAllSnapshots_Task())
        assert disks(app.config)[2000].backing.fileName == "[vmfs01] app01/app01.vmdk"
    finally:
        sim.stop()


def test_the_standard_inventory_is_as_strict_as_it_says(tmp_path):
    sim = Started(tmp_path / "state", "standard")
    try:
        content = sim.si.content
        view = content.viewManager.CreateContainerView(content.rootFolder, [vim.VirtualMachine], True)
        names = [vm.name for vm in view.view]
        assert names.count("twin") == names.count("edge01") == 2
        copies = [sim.vm("copy01"), sim.vm("copy02")]
        assert content.searchIndex.FindAllByUuid(None, copies[0].config.uuid, True, False) == copies
        with pytest.raises(vmodl.fault.NotSupported):
            sim.vm("template01").CreateSnapshot_Task("x", "", False, False)
        with pytest.raises(vim.fault.SnapshotIncompatibleDeviceInVm):
            sim.vm("shared01").CreateSnapshot_Task("x", "", False, False)
        database = sim.vm("db01")
        with pytest.raises(vim.fault.MemorySnapshotOnIndependentDisk):
            database.CreateSnapshot_Task("x", "", True, False)
        snap = snapshot(database)
        assert list(disks(snap.config)) == [2000]
        now = disks(database.config)
        assert now[2000].backing.fileName.endswith("-000001.vmdk")
        assert now[2001].backing.diskMode == "independent_persistent"
        assert now[2002].backing.compatibilityMode == "physicalMode"
        assert not [one for one in sim.vm("new01").layoutEx.file if one.type == "nvram"]
        view = content.viewManager.CreateContainerView(content.rootFolder, [vim.Datastore], True)
        kinds = {one.name: (one.summary.type, type(one.info).__name__.rsplit(".", 1)[-1]) for one in view.view}
        assert kinds["vsan01"] == ("vsan", "VsanDatastoreInfo") and kinds["vvol01"] == ("VVOL", "VvolDatastoreInfo")
        assert kinds["vmfs01"] == ("VMFS", "VmfsDatastoreInfo") and kinds["nfs01"] == ("NFS", "NasDatastoreInfo")
        assert disks(sim.vm("ide01").config)[3000].controllerKey == 200
        assert disks(sim.vm("thick01").config)[2000].backing.thinProvisioned is False
        crypt = sim.vm("crypt01")
        assert crypt.config.keyId.keyId == disks(crypt.config)[2000].backing.keyId.keyId
        off = sim.vm("off01")
        assert (off.runtime.powerState, off.snapshot, off.datastore[0].name) == ("poweredOff", None, "nfs01")

        def refused(name, machine, fault):
            device = Disk(
                key=-1,
                controllerKey=1000,
                backing=Disk.FlatVer2BackingInfo(
                    fileName=next(iter(disks(sim.vm(name).config).values())).backing.fileName,
                    diskMode="independent_nonpersistent",
                ),
            )
            change = vim.vm.device.VirtualDeviceSpec(operation="add", device=device)
            with pytest.raises(fault):
                done(sim.vm(machine).ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[change])))

        refused("onvsan01", "proxy01", vim.fault.InvalidDeviceBacking)
        refused("crypt01", "proxy01", vim.fault.InvalidDeviceBacking)
        refused("shared01", "db01", vim.fault.InaccessibleDatastore)
        refused("crypt01", "db01", vim.fault.InvalidDeviceBacking)
        assert fetch(sim, "onvsan01/onvsan01-flat.vmdk", query="?dcPath=DC0&dsName=vsan01")[0] == 404
        assert fetch(sim, "onvvol01/onvvol01-flat.vmdk", query="?dcPath=DC0&dsName=vvol01")[0] == 404
        status, data, unused = fetch(
            sim, "off01/off01-flat.vmdk", headers={"Range": "bytes=510-511"}, query="?dcPath=DC0&dsName=nfs01"
        )
        assert (status, data) == (206, b"\x55\xaa")
    finally:
        sim.stop()


# --- export leases --------------------------------------------------------------------------------------------------


def ready(lease):
    deadline = time.monotonic() + 20
    while lease.state == "initializing" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lease.state == "ready"
    return lease.info


def named_by(sim, url):
    """A connection to the host that an address names, and the path there."""
    parts = urllib.parse.urlsplit(url)
    return http.client.HTTPSConnection(parts.hostname, parts.port, context=sim.context(), timeout=20), parts.path


def download(sim, url):
    connection, path = named_by(sim, url)
    connection.request("GET", path, headers={"Range": "bytes=0-511"})
    response = connection.getresponse()
    try:
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def test_a_snapshots_lease_gives_what_it_froze(sim, app, tmp_path):
    snap = snapshot(app)
    sim.control.call("guest_write", vm="app01", disk=2000, offset=0, data=b"later" * 100)
    lease = snap.ExportSnapshot()
    info = ready(lease)
    assert [one.disk for one in info.deviceUrl] == [False, True, True]
    assert [one.key.split("/")[-1] for one in info.deviceUrl[1:]] == [
        "ParaVirtualSCSIController0:1",
        "ParaVirtualSCSIController0:0",
    ]
    for key, url in ((2001, info.deviceUrl[1]), (2000, info.deviceUrl[2])):
        status, data, headers = download(sim, url.url)
        assert status == 200 and "Content-Length" not in headers and "Accept-Ranges" not in headers
        vmdk, raw = tmp_path / "a.vmdk", tmp_path / "a.raw"
        vmdk.write_bytes(data)
        assert subprocess.run(["qemu-img", "check", str(vmdk)], capture_output=True, check=False).returncode == 0
        subprocess.run(["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(vmdk), str(raw)], check=True)
        frozen = sim.control.call("read_disk", vm="app01", disk=key, snapshot=snap._moId)
        assert hashlib.sha256(raw.read_bytes()).hexdigest() == frozen["sha256"]
        raw.unlink()
    manifest = {one.key: one for one in lease.HttpNfcLeaseGetManifest()}
    assert manifest[url.key].sha1 == hashlib.sha1(data).hexdigest()
    assert manifest[url.key].size == len(data)
    lease.HttpNfcLeaseComplete()
    assert lease.state == "done"
    assert download(sim, url.url)[0] == 404
    with pytest.raises(vim.fault.InvalidState):
        lease.HttpNfcLeaseComplete()
    remove(snap)


def test_a_held_lease_keeps_the_vm_where_it_is(sim):
    vm = sim.vm("restore01")
    lease = vm.ExportVm()
    ready(lease)
    for work in (
        vm.PowerOnVM_Task,
        vm.Destroy_Task,
        vm.UnregisterVM,
        lambda: vm.RelocateVM_Task(vim.vm.RelocateSpec()),
    ):
        with pytest.raises(vim.fault.MethodDisabled):
            work()
    assert {"PowerOnVM_Task", "MigrateVM_Task"} <= set(vm.disabledMethod)
    with pytest.raises(vim.fault.InvalidState):
        vm.ExportVm()
    lease.HttpNfcLeaseAbort(None)
    assert "MigrateVM_Task" not in vm.disabledMethod
    done(vm.PowerOn())
    try:
        with pytest.raises(vim.fault.InvalidPowerState):
            vm.ExportVm()
    finally:
        done(vm.PowerOff())


def test_a_lease_without_a_sign_of_life_ends(sim):
    vm = sim.vm("restore01")
    snap = snapshot(vm)
    sim.control.call("set_settings", lease_timeout=0.5)
    try:
        lease = snap.ExportSnapshot()
        url = ready(lease).deviceUrl[-1].url
        lease.HttpNfcLeaseProgress(10)
        deadline = time.monotonic() + 20
        while lease.state == "ready" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert isinstance(lease.error, vim.fault.Timedout)
        with pytest.raises(vim.fault.Timedout):
            lease.HttpNfcLeaseProgress(20)
        assert download(sim, url)[0] == 404
    finally:
        sim.control.call("set_settings", lease_timeout=300.0)
        remove(snap)


def test_a_lease_belongs_to_its_session_and_needs_its_privilege(sim):
    snap = snapshot(sim.vm("restore01"))
    lease = snap.ExportSnapshot()
    ready(lease)
    other = sim.backup_user()
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        vim.HttpNfcLease(lease._moId, other._stub).HttpNfcLeaseAbort(None)
    lease.HttpNfcLeaseAbort(None)
    sim.control.call("set_privileges", username=sim.info["backup_username"], remove=["VApp.Export"])
    try:
        with pytest.raises(vim.fault.NoPermission):
            vim.vm.Snapshot(snap._moId, other._stub).ExportSnapshot()
    finally:
        sim.control.call("set_privileges", username=sim.info["backup_username"], add=["VApp.Export"])
        Disconnect(other)
        remove(snap)


# --- import leases --------------------------------------------------------------------------------------------------


def import_spec(name, *sizes, **fields):
    kinds = vim.vm.device
    controller = kinds.ParaVirtualSCSIController(key=-1, busNumber=0, sharedBus="noSharing")
    changes = [kinds.VirtualDeviceSpec(operation="add", device=controller)]
    for number, size in enumerate(sizes):
        disk = kinds.VirtualDisk(
            key=-10 - number,
            controllerKey=-1,
            unitNumber=number,
            capacityInBytes=size,
            capacityInKB=size // KIB,
            backing=Disk.FlatVer2BackingInfo(fileName="", diskMode="persistent", thinProvisioned=True),
        )
        changes.append(kinds.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk))
    files = vim.vm.FileInfo(vmPathName="[vmfs01]")
    return vim.vm.VmImportSpec(configSpec=vim.vm.ConfigSpec(name=name, files=files, deviceChange=changes, **fields))


def stream_of(folder, size, seed):
    raw, vmdk = folder / f"{seed}.raw", folder / f"{seed}.vmdk"
    data = random.Random(seed).randbytes(200 * KIB)
    with open(raw, "wb") as stream:
        stream.truncate(size)
        stream.seek(70 * KIB)
        stream.write(data)
        stream.seek(size - 512)
        stream.write(b"end" + bytes(509))
    disk = raw.read_bytes()
    pieces = stream_vmdk.stream(vmdk.name, size, [(0, size)], lambda at, length: disk[at : at + length])
    return hashlib.sha256(disk).hexdigest(), b"".join(pieces)


def upload(sim, url, data, method="POST", kind="application/x-vnd.vmware-streamVmdk"):
    connection, path = named_by(sim, url)
    connection.request(method, path, body=data, headers={"Content-Type": kind})
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_a_machine_comes_by_an_import_lease(sim, tmp_path):
    beside = sim.vm("app01")
    size = 3 * MIB + 512
    (one, first), (two, second) = stream_of(tmp_path, size, 1), stream_of(tmp_path, 2 * MIB, 2)
    lease = beside.resourcePool.ImportVApp(import_spec("imported", size, 2 * MIB), beside.parent)
    info = ready(lease)
    vm = info.entity
    urls = {address.importKey: address.url for address in info.deviceUrl}
    names = ["/imported/ParaVirtualSCSIController0:0", "/imported/ParaVirtualSCSIController0:1"]
    assert sorted(urls) == names and list(urls) != names  # whoever goes by the order is wrong
    for work in (vm.PowerOnVM_Task, vm.Destroy_Task):
        with pytest.raises(vim.fault.MethodDisabled):
            work()
    assert upload(sim, urls[names[0]], first, method="PUT")[0] == 405
    assert upload(sim, urls[names[0]], first, kind="application/octet-stream")[0] == 415
    assert "no VMDK" in upload(sim, urls[names[0]], bytes(65536))[1]
    assert "the disk has" in upload(sim, urls[names[0]], second)[1]
    assert "ends early" in upload(sim, urls[names[0]], first[: len(first) // 2])[1]
    options = ["-o", "subformat=streamOptimized"]
    bare = tmp_path / "bare.vmdk"
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", *options, str(tmp_path / "1.raw"), str(bare)], check=True)
    assert "in front" in upload(sim, urls[names[0]], bare.read_bytes() + bytes(512))[1]
    assert upload(sim, urls[names[0]], first)[0] == 201
    assert download(sim, urls[names[0]])[0] == 405
    with pytest.raises(vim.fault.InvalidState):
        lease.HttpNfcLeaseComplete()
    assert upload(sim, urls[names[1]], second)[0] == 201
    lease.HttpNfcLeaseComplete()
    assert upload(sim, urls[names[1]], second)[0] == 404
    held = [sim.control.call("read_disk", vm="imported", disk=key)["sha256"] for key in (2000, 2001)]
    assert held == [one, two]
    done(vm.PowerOn())
    done(vm.PowerOff())
    done(vm.Destroy_Task())


def test_an_import_that_does_not_end_well_leaves_nothing(sim):
    beside = sim.vm("app01")
    pool, folder = beside.resourcePool, beside.parent

    def gone(lease, fault):
        deadline = time.monotonic() + 20
        while lease.state != "error" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert isinstance(lease.error, fault), lease.error
        # The machine goes a moment after the lease has said so.
        while [vm for vm in folder.childEntity if vm.name == "imported"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (sim.state / "datastores" / "vmfs01" / "imported").exists()

    lease = pool.ImportVApp(import_spec("imported", MIB), folder)
    ready(lease)
    lease.HttpNfcLeaseAbort(None)
    gone(lease, vmodl.fault.RequestCanceled)
    sim.control.call("set_settings", lease_timeout=0.3)
    try:
        gone(pool.ImportVApp(import_spec("imported", MIB), folder), vim.fault.Timedout)
    finally:
        sim.control.call("set_settings", lease_timeout=300.0)
    boot = vim.vm.BootOptions(bootOrder=[vim.vm.BootOptions.BootableDiskDevice(deviceKey=2000)])
    gone(pool.ImportVApp(import_spec("imported", bootOptions=boot), folder), vmodl.fault.InvalidArgument)
    with pytest.raises(vim.fault.DuplicateName):
        pool.ImportVApp(import_spec("app01", MIB), folder)
    with pytest.raises(vmodl.fault.NotSupported):
        pool.ImportVApp(import_spec("imported", MIB), None)
    user = sim.info["backup_username"]
    sim.control.call("set_privileges", username=user, remove=["VApp.Import"])
    other = sim.backup_user()
    try:
        with pytest.raises(vim.fault.NoPermission):
            vim.ResourcePool(pool._moId, other._stub).ImportVApp(import_spec("imported", MIB), folder)
    finally:
        sim.control.call("set_privileges", username=user, add=["VApp.Import"])
        Disconnect(other)
