# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A server without a network: real vim objects behind pyVmomi's stub interface, and a clock that sleeping moves."""

from __future__ import annotations

import datetime
import shutil
import subprocess

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import VmRef
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from pyVmomi import VmomiSupport, vim, vmodl

Collector = vmodl.query.PropertyCollector


class Clock:
    def __init__(self):
        self.now = 0.0
        self.sleeps = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds


class Stub:
    """Answers managed calls from ``methods`` (wsdl name -> function of (object, *args)) and reads from ``objects``.

    Each call is recorded in ``calls``; a method's answer may be a list, used up one by one, of values and exceptions.
    """

    versionId = "urn:vim25/8.0.3.0"

    def __init__(self):
        self.calls = []
        self.objects = {}
        self.methods = {"Login": lambda *_args: vim.UserSession(), "Logout": lambda *_args: None}
        self.cookie = ""

    def add(self, obj, **properties):
        """Paths are written with ``__`` for the dot."""
        self.objects[obj._moId] = (obj, {path.replace("__", "."): value for path, value in properties.items()})
        return obj

    def names(self):
        return [name for name, _obj, _args in self.calls]

    def DropConnections(self):
        pass

    def InvokeMethod(self, obj, info, args, outerStub=None):
        name = info.wsdlName
        if name in ("RetrievePropertiesEx", "RetrieveServiceContent") and name not in self.methods:
            self.calls.append((name, obj, args))
            return getattr(self, name)(*args)
        self.calls.append((name, obj, args))
        answer = self.methods[name]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer(obj, *args) if callable(answer) else answer

    def RetrieveServiceContent(self):
        return vim.ServiceInstanceContent(
            rootFolder=vim.Folder("group-d1", self),
            propertyCollector=Collector("propertyCollector", self),
            viewManager=vim.view.ViewManager("ViewManager", self),
            searchIndex=vim.SearchIndex("SearchIndex", self),
            sessionManager=vim.SessionManager("SessionManager", self),
            about=vim.AboutInfo(apiType="VirtualCenter", fullName="a vCenter", instanceUuid="vc-uuid"),
        )

    def RetrievePropertiesEx(self, specs, _options):
        found = []
        for spec in specs:
            for start in spec.objectSet:
                steps = {step.name: step for step in start.selectSet}
                seen = set()
                waiting = [(start.obj, start.skip, list(start.selectSet))]
                while waiting:
                    obj, skip, following = waiting.pop(0)
                    if obj._moId in seen:
                        continue
                    seen.add(obj._moId)
                    if obj._moId not in self.objects:
                        raise vmodl.fault.ManagedObjectNotFound(obj=obj, msg="gone")
                    obj, properties = self.objects[obj._moId]
                    if callable(properties.get("refresh")):
                        properties["refresh"](properties)
                    for wanted in spec.propSet:
                        if not skip and isinstance(obj, wanted.type):
                            values = [
                                vmodl.DynamicProperty(name=path, val=typed(properties[path]))
                                for path in wanted.pathSet
                                if properties.get(path) is not None
                            ]
                            found.append(Collector.ObjectContent(obj=obj, propSet=values))
                    for step in following:
                        step = steps.get(step.name, step)
                        if isinstance(obj, step.type) and properties.get(step.path) is not None:
                            target = properties[step.path]
                            for item in target if isinstance(target, list) else [target]:
                                waiting.append((item, step.skip, list(step.selectSet)))
        # What holds nothing is not sent.
        return Collector.RetrieveResult(objects=found) if found else None


def typed(value):
    """A plain list as vSphere sends one where anything is allowed: an array of a type."""
    if not isinstance(value, list) or hasattr(value, "Item"):
        return value
    common = next(base for base in type(value[0]).__mro__ if all(isinstance(item, base) for item in value))
    return VmomiSupport.GetVmodlType(f"{common.__name__}[]")(value)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def session(stub, clock):
    connection = Connection("vcenter.example.com", "backup", "secret")
    with Session(connection, stub, clock=clock, sleep=clock.sleep) as session:
        stub.calls.clear()
        yield session


@pytest.fixture
def vm(stub):
    obj = vim.VirtualMachine("vm-16", stub)
    return VmRef(obj, "vm-16", "app01", "/DC0/vm/app01", "DC0", "5000-instance", "4200-bios", "DC0")


def scsi_controller(key=1000, **properties):
    return vim.vm.device.ParaVirtualSCSIController(
        key=key, busNumber=0, deviceInfo=vim.Description(label="SCSI controller 0"), **properties
    )


def disk(key=2000, file="[vmfs01] app01/app01.vmdk", controller=1000, **backing):
    return vim.vm.device.VirtualDisk(
        key=key,
        controllerKey=controller,
        unitNumber=key - 2000,
        capacityInBytes=8 << 30,
        capacityInKB=8 << 20,
        deviceInfo=vim.Description(label=f"Hard disk {key - 1999}"),
        backing=vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
            **{"fileName": file, "diskMode": "persistent", "uuid": f"6000C29e-{key}", **backing}
        ),
    )


def tree_node(stub, moid, name, description="", children=(), quiesced=False):
    return vim.vm.SnapshotTree(
        snapshot=vim.vm.Snapshot(moid, stub),
        vm=vim.VirtualMachine("vm-16", stub),
        name=name,
        description=description,
        id=1,
        createTime=datetime.datetime(2026, 11, 22, 8, 42, 3, tzinfo=datetime.timezone.utc),
        state="poweredOn",
        quiesced=quiesced,
        childSnapshotList=list(children),
    )


def tree(stub, *roots, current=None):
    """``vm.snapshot``; the current snapshot is the last root unless named."""
    return vim.vm.SnapshotInfo(
        currentSnapshot=vim.vm.Snapshot(current or roots[-1].snapshot._moId, stub), rootSnapshotList=list(roots)
    )


@pytest.fixture
def make():
    """The builders above, for test files."""

    class Builders:
        disk = staticmethod(disk)
        scsi_controller = staticmethod(scsi_controller)
        tree = staticmethod(tree)
        tree_node = staticmethod(tree_node)

    return Builders


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """An authority, and certificates of it: good, other (of another name), expired, old (both)."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "rsa:2048", "-nodes"]
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority"
    )
    for name, alternative, days in (("good", "IP:127.0.0.1", "2"), ("other", "DNS:other.example.com", "2")):
        (folder / f"{name}.ext").write_text(f"subjectAltName={alternative}\n")
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        openssl(*sign, "-out", f"{name}.pem", "-days", days, "-extfile", f"{name}.ext")
    for name, of in (("expired", "good"), ("old", "other")):
        sign = ["x509", "-req", "-in", f"{of}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
        shutil.copy(folder / f"{of}.key", folder / f"{name}.key")
        openssl(*sign, "-out", f"{name}.pem", "-days", "-1", "-extfile", f"{of}.ext")
    return folder
