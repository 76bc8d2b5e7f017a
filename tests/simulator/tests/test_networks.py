# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hosts' networks and the distributed switches, with unmodified pyVmomi against a started simulator."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyVim.connect import Disconnect, SmartConnect
from pyVim.task import WaitForTask
from pyVmomi import vim, vmodl

SIMULATOR = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SIMULATOR))

from client import Control, ControlError  # noqa: E402

BACKUP = "vSphereBackupNFC"
Dvs = vim.dvs.VmwareDistributedVirtualSwitch
Pool = vim.DistributedVirtualSwitch.HostInfrastructureTrafficResource
Portgroup = vim.dvs.DistributedVirtualPortgroup


class Started:
    """A running simulator with an administrator's session."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [SIMULATOR / "run", "--state", str(self.state), "--hosts", "1"], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.info = json.loads(self.process.stdout.readline())
        self.control = Control(self.info["control_socket"])
        self.si = SmartConnect(
            host=self.info["host"],
            port=self.info["port"],
            user=self.info["username"],
            pwd=self.info["password"],
            sslContext=ssl.create_default_context(cafile=self.info["ca_path"]),
        )

    def stop(self) -> None:
        Disconnect(self.si)
        self.control.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def host(self, name: str) -> vim.HostSystem:
        return self.si.content.searchIndex.FindByDnsName(None, name, False)

    def switch(self) -> vim.DistributedVirtualSwitch:
        return next(
            one
            for one in self.si.content.rootFolder.childEntity[0].networkFolder.childEntity
            if isinstance(one, vim.DistributedVirtualSwitch)
        )


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("sim") / "state")
    yield started
    started.stop()


@pytest.fixture
def host(sim):
    """A new host, which is a member of DSwitch0."""
    return sim.host(sim.control.call("add_hosts", count=1, dvswitch="DSwitch0")[0])


@pytest.fixture
def network(host):
    return host.configManager.networkSystem


@pytest.fixture
def manager(host):
    return host.configManager.virtualNicManager


def switch_spec(*uplinks, mtu=None):
    return vim.host.VirtualSwitch.Specification(
        numPorts=128, mtu=mtu, bridge=vim.host.VirtualSwitch.BondBridge(nicDevice=list(uplinks))
    )


def group_spec(name, vlan=0, switch="vSwitch0"):
    return vim.host.PortGroup.Specification(name=name, vlanId=vlan, vswitchName=switch, policy=vim.host.NetworkPolicy())


def nic_spec(address="10.0.0.5", mask="255.255.255.0", **more):
    return vim.host.VirtualNic.Specification(
        ip=vim.host.IpConfig(dhcp=False, ipAddress=address, subnetMask=mask), **more
    )


def dhcp_spec(**more):
    return vim.host.VirtualNic.Specification(ip=vim.host.IpConfig(dhcp=True), **more)


def selected(host, service):
    for config in host.config.virtualNicManagerInfo.netConfig:
        if config.nicType == service:
            devices = {nic.key: nic.device for nic in config.candidateVnic}
            return [devices[key] for key in config.selectedVnic]
    return None


def test_what_a_new_host_has(sim):
    for name in ("127.0.1.1", "127.0.1.3", "127.0.2.1"):
        config = sim.host(name).config
        assert [(nic.device, nic.spec.ip.ipAddress) for nic in config.network.vnic] == [("vmk0", name)]
        assert [one.name for one in config.network.vswitch] == ["vSwitch0"]
        assert [one.device for one in config.network.pnic] == ["vmnic0", "vmnic1", "vmnic2", "vmnic3"]
        assert selected(sim.host(name), "management") == ["vmk0"] and selected(sim.host(name), BACKUP) == []
    assert [one.dvsName for one in sim.host("127.0.1.1").config.network.proxySwitch] == ["DSwitch0"]
    assert not sim.host("127.0.1.3").config.network.proxySwitch


def test_switch_group_nic_and_service(sim, host, network, manager):
    network.AddVirtualSwitch("vSwitch1", switch_spec("vmnic1", mtu=9000))
    network.AddPortGroup(group_spec("Backup", 12, "vSwitch1"))
    assert network.AddVirtualNic("Backup", nic_spec(mtu=9000)) == "vmk1"
    manager.SelectVnicForNicType(BACKUP, "vmk1")
    query = manager.QueryNetConfig(BACKUP)
    assert [key.rsplit("-", 1)[-1] for key in query.selectedVnic] == ["vmk1"]
    assert host.config.network.vnic[1].spec.netStackInstanceKey == "defaultTcpipStack"
    # what is in use can't go; the other way round all of it can
    for refused in (lambda: network.RemovePortGroup("Backup"), lambda: network.RemoveVirtualSwitch("vSwitch1")):
        with pytest.raises(vim.fault.ResourceInUse):
            refused()
    network.RemoveVirtualNic("vmk1")
    assert selected(host, BACKUP) == []
    network.RemovePortGroup("Backup")
    network.RemoveVirtualSwitch("vSwitch1")
    assert network.networkInfo.vswitch[0].name == "vSwitch0" and len(network.networkInfo.vswitch) == 1


@pytest.mark.parametrize(
    ("fault", "action"),
    [
        (vim.fault.AlreadyExists, lambda n: n.AddVirtualSwitch("vSwitch0", switch_spec("vmnic1"))),
        (vim.fault.AlreadyExists, lambda n: n.AddVirtualSwitch("DSwitch0", switch_spec("vmnic1"))),
        (vim.fault.ResourceInUse, lambda n: n.AddVirtualSwitch("v1", switch_spec("vmnic0"))),
        (vim.fault.ResourceInUse, lambda n: n.AddVirtualSwitch("v1", switch_spec("vmnic2"))),
        (vim.fault.NotFound, lambda n: n.AddVirtualSwitch("v1", switch_spec("vmnic9"))),
        (vmodl.fault.InvalidArgument, lambda n: n.AddVirtualSwitch("v" * 33, switch_spec("vmnic1"))),
        (vmodl.fault.InvalidArgument, lambda n: n.AddVirtualSwitch("v1", switch_spec("vmnic1", mtu=1279))),
        (vim.fault.NotFound, lambda n: n.RemoveVirtualSwitch("v1")),
        (vim.fault.NotFound, lambda n: n.UpdateVirtualSwitch("v1", switch_spec("vmnic1"))),
        (vim.fault.AlreadyExists, lambda n: n.AddPortGroup(group_spec("VM Network"))),
        (vim.fault.NotFound, lambda n: n.AddPortGroup(group_spec("B", 0, "v1"))),
        (vmodl.fault.InvalidArgument, lambda n: n.AddPortGroup(group_spec("B", 4096))),
        (vim.fault.NotFound, lambda n: n.RemovePortGroup("B")),
        (vim.fault.NotFound, lambda n: n.UpdatePortGroup("B", group_spec("B"))),
        (vim.fault.AlreadyExists, lambda n: n.UpdatePortGroup("VM Network", group_spec("Backup Network"))),
        (vim.fault.HostConfigFault, lambda n: n.UpdatePortGroup("Management Network", group_spec("M"))),
        (vim.fault.NotFound, lambda n: n.AddVirtualNic("B", nic_spec())),
        (vim.fault.AlreadyExists, lambda n: n.AddVirtualNic("Management Network", nic_spec())),
        (vmodl.fault.InvalidArgument, lambda n: n.AddVirtualNic("VM Network", nic_spec("10.0.0.0"))),
        (vmodl.fault.InvalidArgument, lambda n: n.AddVirtualNic("VM Network", nic_spec("10.0.0.255"))),
        (vmodl.fault.InvalidArgument, lambda n: n.AddVirtualNic("VM Network", nic_spec("10.0.0"))),
        (vmodl.fault.InvalidArgument, lambda n: n.AddVirtualNic("VM Network", nic_spec(mtu=9191))),
        (vim.fault.NotFound, lambda n: n.AddVirtualNic("VM Network", nic_spec(netStackInstanceKey="other"))),
        (
            vim.fault.NotFound,
            lambda n: n.AddVirtualNic(
                "",
                nic_spec(distributedVirtualPort=vim.dvs.PortConnection(switchUuid="x", portgroupKey="dvportgroup-19")),
            ),
        ),
        (vim.fault.NotFound, lambda n: n.UpdateVirtualNic("vmk7", nic_spec())),
        (vim.fault.NotFound, lambda n: n.RemoveVirtualNic("vmk7")),
        (vim.fault.HostConfigFault, lambda n: n.RemoveVirtualNic("vmk0")),
    ],
)
def test_what_a_host_refuses(sim, host, network, fault, action):
    before = sim.control.call("networks", host=host.name)["hosts"]
    with pytest.raises(fault):
        action(network)
    assert sim.control.call("networks", host=host.name)["hosts"] == before


def test_an_address_stands_once_on_a_host(host, network):
    with pytest.raises(vim.fault.HostConfigFault, match="in use"):
        network.AddVirtualNic("VM Network", nic_spec(host.name, "255.0.0.0"))


def test_services_and_stacks(host, network, manager):
    network.AddVirtualNic("VM Network", nic_spec(netStackInstanceKey="vmotion"))
    with pytest.raises(vmodl.fault.InvalidArgument):
        manager.SelectVnicForNicType(BACKUP, "vmk1")
    with pytest.raises(vmodl.fault.InvalidArgument):
        manager.SelectVnicForNicType(BACKUP, "vmk9")
    with pytest.raises(vmodl.fault.InvalidArgument):
        manager.SelectVnicForNicType("backup", "vmk0")
    with pytest.raises(vmodl.fault.InvalidArgument):
        manager.DeselectVnicForNicType(BACKUP, "vmk0")
    with pytest.raises(vim.fault.HostConfigFault):
        manager.DeselectVnicForNicType("management", "vmk0")
    manager.SelectVnicForNicType(BACKUP, "vmk0")
    assert selected(host, "management") == ["vmk0"] == selected(host, BACKUP)
    manager.DeselectVnicForNicType(BACKUP, "vmk0")
    assert selected(host, "management") == ["vmk0"] and selected(host, BACKUP) == []


def test_an_update_replaces_the_ip_and_leaves_the_rest(host, network):
    v6 = vim.host.IpConfig.IpV6Address
    config = vim.host.IpConfig.IpV6AddressConfiguration
    spec = nic_spec(mtu=9000)
    spec.ip.ipV6Config = config(ipV6Address=[v6(ipAddress="fd00::5", prefixLength=64, operation="add")])
    network.AddVirtualNic("VM Network", spec)
    network.UpdateVirtualNic("vmk1", nic_spec("10.0.0.6"))
    after = host.config.network.vnic[1].spec
    assert (after.ip.ipAddress, after.mtu) == ("10.0.0.6", 9000)
    assert [one.ipAddress for one in after.ip.ipV6Config.ipV6Address if one.origin == "manual"] == ["fd00::5"]
    change = nic_spec("10.0.0.6")
    change.ip.ipV6Config = config(ipV6Address=[v6(ipAddress="fd00::5", prefixLength=64, operation="remove")])
    network.UpdateVirtualNic("vmk1", change)
    with pytest.raises(vim.fault.NotFound):
        network.UpdateVirtualNic("vmk1", change)


def test_dhcp_gives_an_address_later(sim, host, network):
    sim.control.call("set_settings", dhcp_delay=None)
    network.AddVirtualNic("VM Network", dhcp_spec())
    assert host.config.network.vnic[1].spec.ip.ipAddress.startswith("169.254.")
    network.RemoveVirtualNic("vmk1")
    sim.control.call("set_settings", dhcp_delay=0.2, dhcp_subnet="10.99.0.0/24")
    network.AddVirtualNic("VM Network", dhcp_spec())
    deadline = time.monotonic() + 30
    while not host.config.network.vnic[1].spec.ip.ipAddress.startswith("10.99.0."):
        assert time.monotonic() < deadline
    assert host.config.network.vnic[1].spec.ip.subnetMask == "255.255.255.0"


def test_an_old_esxi_has_no_such_service(sim, host, manager):
    sim.control.call("set_host", name=host.name, version="6.7.0")
    assert host.config.product.version == "6.7.0" and selected(host, BACKUP) is None
    for refused in (lambda: manager.QueryNetConfig(BACKUP), lambda: manager.SelectVnicForNicType(BACKUP, "vmk0")):
        with pytest.raises(vmodl.fault.InvalidArgument):
            refused()


def test_a_host_that_is_away_and_a_user_without_the_privilege(sim, host, network):
    sim.control.call("set_host", name=host.name, connected=False)
    with pytest.raises(vmodl.fault.HostNotConnected):
        network.AddPortGroup(group_spec("B"))
    sim.control.call("set_host", name=host.name, connected=True)
    sim.control.call("set_privileges", username=sim.info["username"], remove=["Host.Config.Network"])
    with pytest.raises(vim.fault.NoPermission):
        network.AddPortGroup(group_spec("B"))
    sim.control.call("set_privileges", username=sim.info["username"], add=["Host.Config.Network"])


def test_an_answer_can_be_lost(sim, host, network):
    sim.control.call("inject", target="call", name="AddPortGroup", fault="lost", after=1)
    network.AddPortGroup(group_spec("first"))
    with pytest.raises(Exception, match=r"closed|reset|EOF|Remote"):
        network.AddPortGroup(group_spec("second"))
    names = [one.spec.name for one in host.config.network.portgroup]
    assert "first" in names and "second" in names


# --- distributed switches -------------------------------------------------------------------------------------------


def dv_spec(name, vlan=0):
    setting = Dvs.VmwarePortConfigPolicy(vlan=Dvs.VlanIdSpec(vlanId=vlan, inherited=False))
    return Portgroup.ConfigSpec(name=name, type="earlyBinding", numPorts=8, defaultPortConfig=setting)


def done(task):
    WaitForTask(task)
    return task.info.result


def test_a_distributed_port_group_and_a_nic_on_it(sim, host, network):
    switch = sim.switch()
    made = done(switch.CreateDVPortgroup_Task(dv_spec("dv-backup", 9)))
    assert made.config.defaultPortConfig.vlan.vlanId == 9 and made.config.key in {one.key for one in switch.portgroup}
    with pytest.raises(vim.fault.DuplicateName):
        done(switch.CreateDVPortgroup_Task(dv_spec("dv-backup")))
    with pytest.raises(vmodl.fault.InvalidArgument):
        done(switch.CreateDVPortgroup_Task(dv_spec("dv-other", 4095)))
    port = vim.dvs.PortConnection(switchUuid=switch.uuid, portgroupKey=made.key)
    assert network.AddVirtualNic("", nic_spec("10.3.0.5", distributedVirtualPort=port)) == "vmk1"
    with pytest.raises(vim.fault.ResourceInUse):
        done(made.Destroy_Task())
    stranger = sim.host("127.0.1.3").configManager.networkSystem
    with pytest.raises(vim.fault.NotFound):
        stranger.AddVirtualNic("", nic_spec("10.3.0.6", distributedVirtualPort=port))
    network.RemoveVirtualNic("vmk1")
    done(made.Destroy_Task())
    with pytest.raises(vmodl.fault.ManagedObjectNotFound):
        made.name  # noqa: B018  it is a call


def pool(**values):
    return Dvs.ConfigSpec(
        infrastructureTrafficResourceConfig=[Pool(key="backupNfc", allocationInfo=Pool.ResourceAllocation(**values))]
    )


def test_the_pool_of_backup_traffic(sim):
    switch = sim.switch()
    spec = pool(limit=1000, reservation=10)
    spec.configVersion = switch.config.configVersion
    done(switch.ReconfigureDvs_Task(spec))
    found = next(one for one in switch.config.infrastructureTrafficResourceConfig if one.key == "backupNfc")
    assert (found.allocationInfo.limit, found.allocationInfo.reservation) == (1000, 10)
    assert found.allocationInfo.shares.shares == 50
    with pytest.raises(vim.fault.ConcurrentAccess):
        switch.ReconfigureDvs_Task(spec)  # that version is over
    spec = pool(reservation=2000)
    spec.configVersion = switch.config.configVersion
    with pytest.raises(vmodl.fault.InvalidArgument):
        done(switch.ReconfigureDvs_Task(spec))
    sim.control.call("set_dvswitch", name="DSwitch0", nioc_version="version2")
    spec = pool(limit=10)
    spec.configVersion = switch.config.configVersion
    with pytest.raises(vim.fault.DvsFault):
        done(switch.ReconfigureDvs_Task(spec))
    sim.control.call("set_dvswitch", name="DSwitch0", nioc_version="version3")


def test_members_and_their_uplinks(sim):
    switch, host = sim.switch(), sim.host("127.0.1.3")
    change = vim.dvs.HostMember.ConfigSpec(operation="add", host=host)

    def reconfigure(*uplinks):
        specs = [vim.dvs.HostMember.PnicSpec(pnicDevice=device) for device in uplinks]
        change.backing = vim.dvs.HostMember.PnicBacking(pnicSpec=specs)
        done(switch.ReconfigureDvs_Task(Dvs.ConfigSpec(configVersion=switch.config.configVersion, host=[change])))

    with pytest.raises(vim.fault.ResourceInUse):
        reconfigure("vmnic0")
    with pytest.raises(vim.fault.NotFound):
        reconfigure("vmnic9")
    reconfigure("vmnic3")
    assert [one.dvsName for one in host.config.network.proxySwitch] == ["DSwitch0"]
    with pytest.raises(vim.fault.AlreadyExists):
        reconfigure("vmnic3")
    change.operation = "remove"
    reconfigure()
    assert not host.config.network.proxySwitch


def test_storage_goes_over_vmkernel_nics(sim):
    """Bound NICs and targets of iSCSI, and the servers of NFS datastores, where the API has them."""
    (name,) = sim.control.call("add_hosts", count=1)
    host = sim.host(name)
    assert not host.config.storageDevice.hostBusAdapter and not host.config.fileSystemVolume.mountInfo
    sim.control.call("set_host", name=name, iscsi_targets=["10.0.0.9"], datastores=["vmfs01", "nfs01"])
    sim.control.call("set_nfs_server", datastore="nfs01", server="10.0.1.9")
    (adapter,) = host.config.storageDevice.hostBusAdapter
    assert [one.address for one in adapter.configuredStaticTarget] == ["10.0.0.9"]
    manager = host.configManager.iscsiManager
    assert not manager.QueryBoundVnics(adapter.device)
    (mount,) = host.config.fileSystemVolume.mountInfo
    assert (mount.volume.name, mount.volume.remoteHost) == ("nfs01", "10.0.1.9")
    assert {one.info.nas.remoteHost for one in host.datastore if one.name == "nfs01"} == {"10.0.1.9"}
    sim.control.call("set_host", name=name, iscsi_nics=["vmk0"])
    assert [one.vnicDevice for one in manager.QueryBoundVnics(adapter.device)] == ["vmk0"]
    with pytest.raises(vim.fault.NotFound):
        manager.QueryBoundVnics("vmhba65")


def test_a_second_switch_of_a_name_is_in_another_datacenter(sim):
    (name,) = sim.control.call("add_hosts", count=1)
    moid = sim.control.call("add_dvswitch", name="Twin", datacenter="DC0", hosts=[name])
    other = sim.control.call("add_dvswitch", name="Twin", datacenter="DC1")
    first, second = (vim.dvs.VmwareDistributedVirtualSwitch(one, sim.si._stub) for one in (moid, other))
    assert first.name == second.name == "Twin" and first.uuid != second.uuid and first.parent != second.parent
    (proxy,) = sim.host(name).config.network.proxySwitch
    assert (proxy.dvsName, proxy.dvsUuid) == ("Twin", first.uuid)
    assert not second.summary.hostMember
    # A name is unique in the folder, whatever has it there.
    for taken in ("VM Network", "Twin"):
        with pytest.raises(vim.fault.DuplicateName):
            done(first.CreateDVPortgroup_Task(dv_spec(taken, 9)))
    done(second.CreateDVPortgroup_Task(dv_spec("Backup Network", 9)))


def test_control_refuses_what_is_not_there(sim):
    for op, fields in (
        ("set_dvswitch", {"name": "DSwitch9", "nioc": False}),
        ("set_dvswitch", {"name": "DSwitch0", "colour": "red"}),
        ("set_host", {"name": "esx99", "version": "7.0.0"}),
        ("add_dvswitch", {"name": "DSwitch0", "datacenter": "DC0"}),
        ("add_dvswitch", {"name": "DSwitch7", "datacenter": "DC1", "hosts": ["127.0.1.1"]}),
        ("set_nfs_server", {"datastore": "vmfs01", "server": "10.0.0.1"}),
    ):
        with pytest.raises(ControlError):
            sim.control.call(op, **fields)


def test_everything_survives_a_restart(tmp_path):
    sim = Started(tmp_path / "state")
    try:
        host = sim.host("127.0.1.1")
        network, manager = host.configManager.networkSystem, host.configManager.virtualNicManager
        network.AddVirtualSwitch("vSwitch1", switch_spec("vmnic1"))
        network.AddPortGroup(group_spec("Backup", 12, "vSwitch1"))
        network.AddVirtualNic("Backup", dhcp_spec(mtu=1400))
        manager.SelectVnicForNicType(BACKUP, "vmk1")
        done(sim.switch().CreateDVPortgroup_Task(dv_spec("dv-backup", 9)))
        names = sim.control.call("add_hosts", count=2)
        before = sim.control.call("networks")
        sim.stop()
        sim.start()
        assert sim.control.call("networks") == before
        assert names == ["127.0.2.2", "127.0.2.3"]
        assert selected(sim.host("127.0.1.1"), BACKUP) == ["vmk1"]
    finally:
        sim.stop()
