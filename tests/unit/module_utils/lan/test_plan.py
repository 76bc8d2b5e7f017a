# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ipaddress
import itertools

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.lan.plan import World, make_plan
from ansible_collections.openvadp.backup.plugins.module_utils.lan.request import HostRequest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.dvswitch import DvPortGroup, DvSwitch
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.host_network import (
    HostNetwork,
    Nic,
    PortGroup,
    Switch,
)
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.host_storage import HostStorage

BACKUP = "vSphereBackupNFC"


def nic(device, address, portgroup="Management Network", services=(), **more):
    one = ipaddress.IPv4Interface(address)
    place = {"switch": "vSwitch0", "vlan_id": 0, **more}
    return Nic(device, portgroup, ip=str(one.ip), netmask=str(one.netmask), services=services, **place)


MANAGEMENT = nic("vmk0", "192.168.1.11/24", services=("management", "vmotion"))
OLD_BACKUP = nic("vmk1", "10.0.0.5/24", "Backup", (BACKUP,))


def host(*nics, **more):
    facts = {
        "switches": [Switch("vSwitch0", 1500, ("vmnic0",)), Switch("DSwitch0", 1600, ("vmnic2",), "dvs-uuid")],
        "port_groups": [PortGroup("Management Network", "vSwitch0"), PortGroup("Backup", "vSwitch0", 7)],
        "uplinks": ["vmnic0", "vmnic1", "vmnic2"],
        "service_types": ("management", "vmotion", BACKUP),
        "version": "8.0.3",
        **more,
    }
    return HostNetwork(None, "host-10", "esx01", nics=[MANAGEMENT, *nics], **facts)


def host_of(*nics):
    """A host with these NICs only."""
    made = host()
    made.nics = list(nics)
    return made


def asked(**options):
    address = options.pop("address", None)
    gateway = options.pop("gateway", None)
    return HostRequest(
        "esx01",
        address=ipaddress.IPv4Interface(address) if address else None,
        gateway=ipaddress.IPv4Address(gateway) if gateway else None,
        **options,
    )


def switch(moid, name, uuid):
    return DvSwitch(None, moid, name, uuid, "8.0.3", True, "version3", [])


def world():
    made = World()
    made.dv_switches["DSwitch0"] = [switch("dvs-19", "DSwitch0", "elsewhere"), switch("dvs-17", "DSwitch0", "dvs-uuid")]
    made.dv_switches["Other"] = [switch("dvs-18", "Other", "other-uuid")]
    made.beside = lambda one: {"taken": "the network 'taken' (network-9)"} if one.moid == "dvs-17" else {}
    for key, name, uplink in (("pg-1", "dvb", False), ("pg-2", "up", True)):
        made.dv_port_groups[key] = DvPortGroup(None, key, name, "dvs-17", "DSwitch0", 12, uplink)
    made.add_host(HostNetwork(None, "host-11", "esx02", nics=[nic("vmk3", "10.0.0.9/24")]))
    return made


def plan(*nics, request, **more):
    return make_plan(host(*nics, **more), request, world())


def kinds(made):
    return [step.kind for step in made.steps]


def test_a_new_nic_on_what_is_there():
    made = plan(request=asked(portgroup="Backup", address="10.0.0.5/24"))
    assert kinds(made) == ["add_nic", "select"]
    assert made.expected.device == "vmk1" and made.expected.vlan_id == 7 and made.warnings == []


def test_everything_that_is_missing_is_made_in_order():
    request = asked(vswitch="vSwitch1", uplinks=("vmnic1",), portgroup="B", vlan_id=9, address="10.0.0.5/24", mtu=9000)
    made = plan(request=request)
    assert kinds(made) == ["add_switch", "add_port_group", "add_nic", "select"]
    assert made.steps[0].switch == Switch("vSwitch1", 9000, ("vmnic1",)) and made.warnings == []


def test_a_nic_that_is_right_needs_nothing():
    made = plan(OLD_BACKUP, request=asked(portgroup="Backup", address="10.0.0.5/24"))
    assert kinds(made) == [] and made.before == made.after


def test_tagging_is_one_step():
    made = plan(request=asked(device="vmk0"))
    assert kinds(made) == ["select"]
    assert made.expected.services == ("management", "vmotion", BACKUP)


def test_the_nic_of_an_address_is_taken():
    made = plan(nic("vmk2", "10.0.0.5/24", "Backup"), request=asked(address="10.0.0.5/24"))
    assert kinds(made) == ["select"] and made.nic.device == "vmk2"


def test_the_backup_nic_of_the_port_group_gets_another_address():
    made = plan(OLD_BACKUP, request=asked(portgroup="Backup", address="10.0.0.6/24", mtu=1400))
    assert kinds(made) == ["update_nic"] and made.nic == OLD_BACKUP


def test_device_only_tags():
    with pytest.raises(InputError, match="mtu is 1500, not 9000"):
        plan(OLD_BACKUP, request=asked(device="vmk1", mtu=9000))
    with pytest.raises(InputError, match="vmk0, vmk1"):
        plan(OLD_BACKUP, request=asked(device="vmk7"))


@pytest.mark.parametrize("change", [{"mtu": 9000}, {"gateway": "192.168.1.1"}, {"ipv6": ()}])
def test_a_nic_with_other_services_is_only_changed_by_force(change):
    used = nic("vmk0", "192.168.1.11/24", services=("vmotion",), ipv6=("fd00::1/64",))
    where = {"address": "192.168.1.11/24", **change}
    with pytest.raises(
        InputError, match="not for backup traffic alone and is not changed.*carries vMotion.*device: vmk0"
    ):
        make_plan(host_of(used), asked(**where), world())
    made = make_plan(host_of(used), asked(**where, force=True), world())
    assert kinds(made) == ["update_nic", "select"] and "as force says, although it carries vMotion" in made.warnings[0]


def test_the_last_management_nic_keeps_its_address():
    with pytest.raises(InputError, match="last management NIC keeps its address"):
        moved = nic("vmk0", "192.168.1.11/24", services=("management",), ipv6=("fd00::1/64",))
        request = asked(address="192.168.1.12/24", ipv6=(ipaddress.IPv6Interface("fd00::1/64"),), force=True)
        make_plan(host_of(moved), request, world())


# --- storage


STORAGE_NIC = nic("vmk2", "10.0.0.5/24", "NFS")


@pytest.mark.parametrize(
    "storage, word",
    [
        (HostStorage(bound={"vmk2": "vmhba64"}), "bound to the iSCSI adapter vmhba64"),
        (
            HostStorage(servers=[("NFS datastore 'nfs01'", "10.0.0.200")]),
            "NFS datastore 'nfs01' reaches .* in its subnet",
        ),
        (HostStorage(servers=[("iSCSI adapter vmhba64", "10.0.0.200")]), "iSCSI adapter vmhba64 reaches"),
        (HostStorage(servers=[("NFS datastore 'n'", "10.77.0.2")], gateway="10.0.0.1"), "through the gateway 10.0.0.1"),
        (HostStorage(servers=[("NFS datastore 'n'", "no.such.name.invalid")]), "can't be resolved here"),
        (HostStorage(unknown=["it can't be read"]), "it can't be read"),
    ],
)
@pytest.mark.parametrize(
    "change", [{"mtu": 9000}, {"address": "10.0.0.5/16"}, {"gateway": "10.0.0.1"}, {"present": False}]
)
def test_a_nic_that_carries_storage_is_left_alone(storage, word, change):
    around = world()
    around.storage = lambda _host: storage
    request = {"address": "10.0.0.5/24", **change}
    with pytest.raises(InputError, match=word):
        make_plan(host(STORAGE_NIC), asked(**request), around)
    made = make_plan(host(STORAGE_NIC), asked(**request, force=True), around)
    assert kinds(made)[0] in ("update_nic", "remove_nic") and any("as force says" in text for text in made.warnings)


def test_storage_elsewhere_does_not_matter():
    around = world()
    around.storage = lambda _host: HostStorage(
        bound={"vmk9": "vmhba64"},
        servers=[
            ("NFS datastore 'a'", "10.9.0.1"),
            ("NFS datastore 'b'", "192.168.1.9"),
            ("NFS datastore 'c'", "fd00::9"),
        ],
        gateway="192.168.1.1",
    )
    assert kinds(make_plan(host(STORAGE_NIC), asked(address="10.0.0.5/24", mtu=9000), around)) == [
        "update_nic",
        "select",
    ]


def test_what_is_not_known_of_a_backup_nic_is_a_warning():
    around = world()
    around.storage = lambda _host: HostStorage(servers=[("NFS datastore 'n'", "no.such.name.invalid")])
    made = make_plan(host(OLD_BACKUP), asked(address="10.0.0.5/24", mtu=9000), around)
    assert kinds(made) == ["update_nic"] and "can't be resolved here" in made.warnings[0]


def test_a_gateway_is_removed():
    routed = nic("vmk1", "10.0.0.5/24", "Backup", (BACKUP,), gateway="10.0.0.1")
    made = plan(routed, request=asked(address="10.0.0.5/24", no_gateway=True))
    assert kinds(made) == ["update_nic"] and made.steps[0].target.gateway == "" and made.expected.gateway is None
    assert kinds(plan(OLD_BACKUP, request=asked(address="10.0.0.5/24", no_gateway=True))) == []
    made = plan(request=asked(portgroup="Backup", address="10.0.0.5/24", no_gateway=True))
    assert made.expected.gateway is None and kinds(made) == ["add_nic", "select"]


def test_a_nic_elsewhere_is_not_moved():
    with pytest.raises(InputError, match="portgroup is Backup, not B"):
        plan(OLD_BACKUP, request=asked(vswitch="vSwitch0", portgroup="B", address="10.0.0.5/24"))


def test_another_stack_is_refused():
    other = nic("vmk2", "10.0.0.5/24", "Backup", stack="vmotion")
    with pytest.raises(InputError, match="only the default stack"):
        plan(other, request=asked(device="vmk2"))


@pytest.mark.parametrize("address", ["192.168.1.12/24", "192.168.1.100/25", "192.168.0.1/16", "192.168.1.12/28"])
def test_the_subnet_guard_names_both_and_the_fix(address):
    request = asked(portgroup="Backup", address=address)
    with pytest.raises(InputError) as caught:
        plan(request=request)
    text = str(caught.value)
    assert all(word in text for word in ("the new backup NIC", address, "vmk0", "192.168.1.11/24", "device: vmk0"))
    assert "allow_shared_subnet" in text and "2338" in text


def test_a_shared_subnet_can_be_allowed():
    made = plan(request=asked(portgroup="Backup", address="192.168.1.12/24", allow_shared_subnet=True))
    assert kinds(made) == ["add_nic", "select"] and "vmk0" in made.warnings[0]


def test_tagging_a_nic_in_a_shared_subnet_is_refused_too():
    first, second = nic("vmk1", "10.0.0.5/24", "A", ("vmotion",)), nic("vmk2", "10.0.0.6/24", "B", ("vmotion",))
    with pytest.raises(InputError, match="vmk1 .* and vmk2"):
        plan(first, second, request=asked(device="vmk1"))


def test_nics_that_share_a_subnet_among_themselves_are_not_blamed():
    first, second = nic("vmk1", "10.1.0.5/24", "A", ("vmotion",)), nic("vmk2", "10.1.0.6/24", "B", ("vmotion",))
    made = plan(first, second, request=asked(portgroup="Backup", address="10.0.0.5/24"))
    assert kinds(made) == ["add_nic", "select"] and made.warnings == []


def test_another_stack_may_be_in_the_subnet():
    other = nic("vmk2", "10.0.0.7/24", "A", stack="vmotion")
    assert kinds(plan(other, request=asked(portgroup="Backup", address="10.0.0.5/24"))) == ["add_nic", "select"]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"vswitch": "vSwitch9", "portgroup": "B"}, "There is no such switch"),
        ({"vswitch": "DSwitch0", "portgroup": "B", "uplinks": ("vmnic1",)}, "as dvswitch"),
        ({"vswitch": "vSwitch9", "portgroup": "B", "uplinks": ("vmnic0",)}, "in use elsewhere.*vSwitch0"),
        ({"vswitch": "vSwitch9", "portgroup": "B", "uplinks": ("vmnic2",)}, "in use elsewhere.*DSwitch0"),
        ({"vswitch": "vSwitch9", "portgroup": "B", "uplinks": ("vmnic7",)}, "no such uplink"),
        ({"vswitch": "v" * 33, "portgroup": "B", "uplinks": ("vmnic1",)}, "too long"),
        ({"portgroup": "B"}, "Give vswitch or dvswitch"),
        ({"portgroup": None}, "port group is not named"),
        ({"vswitch": "vSwitch1", "portgroup": "Backup"}, "on another switch"),
        ({"portgroup": "Management Network"}, "has a VMkernel NIC already"),
        ({"dvswitch": "Other", "portgroup": "B"}, "not a member"),
        ({"dvswitch": "DSwitch0", "portgroup": "up"}, "uplinks"),
        ({"dvswitch": "DSwitch0", "portgroup": "taken"}, "the network 'taken' .network-9. has it"),
        ({"portgroup": "Backup", "address": "10.0.0.9/24"}, "vmk3 of host 'esx02'"),
    ],
)
def test_what_is_refused(options, word):
    with pytest.raises(InputError, match=word):
        plan(request=asked(**{"address": "10.0.0.5/24", **options}))


def test_a_port_group_of_a_distributed_switch_is_made_for_all():
    made = plan(request=asked(dvswitch="DSwitch0", portgroup="new", vlan_id=3, address="10.0.0.5/24"))
    assert made.made_port_group == "new" and kinds(made) == ["add_nic", "select"]
    made = plan(request=asked(dvswitch="DSwitch0", portgroup="dvb", address="10.0.0.5/24"))
    assert made.made_port_group is None and made.dv_port_group.key == "pg-1"


def test_of_two_distributed_switches_it_is_the_hosts():
    made = plan(request=asked(dvswitch="DSwitch0", portgroup="new", address="10.0.0.5/24"))
    assert made.dv_switch.moid == "dvs-17"
    both = [Switch("DSwitch0", 1500, (), "dvs-uuid"), Switch("DSwitch0", 1500, (), "elsewhere")]
    with pytest.raises(InputError, match="a member of two"):
        plan(request=asked(dvswitch="DSwitch0", portgroup="new", address="10.0.0.5/24"), switches=both)


def test_an_address_may_be_used_in_another_datacenter():
    around = world()
    request = asked(portgroup="Backup", address="10.0.0.9/24")
    around.datacenters = {"host-10": "datacenter-2", "host-11": "datacenter-2"}
    with pytest.raises(InputError, match="vmk3 of host 'esx02'"):
        make_plan(host(), request, around)
    around.datacenters["host-11"] = "datacenter-21"
    assert kinds(make_plan(host(), request, around)) == ["add_nic", "select"]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"mtu": 9000}, "MTU 9000 exceeds 1500"),
        ({"vlan_id": 8}, "has VLAN 7, not 8"),
        ({"gateway": "10.0.1.1"}, "outside 10.0.0.0/24"),
        ({"vswitch": "vSwitch0", "uplinks": ("vmnic1",)}, "uplinks of 'vSwitch0' are vmnic0"),
    ],
)
def test_what_is_warned_of(options, word):
    made = plan(request=asked(portgroup="Backup", address="10.0.0.5/24", **options))
    assert [word in text for text in made.warnings] == [True]


def test_a_second_backup_nic_is_warned_of():
    made = plan(OLD_BACKUP, request=asked(vswitch="vSwitch0", portgroup="B", address="10.5.0.6/24"))
    assert "vmk1" in made.warnings[0]


def test_dhcp_is_waited_for_and_then_tagged():
    assert kinds(plan(request=asked(portgroup="Backup", dhcp=True))) == ["add_nic", "await_lease", "select"]


def test_a_dhcp_nic_that_was_left_untagged_is_taken():
    left = Nic("vmk1", "Backup", "vSwitch0", vlan_id=7, dhcp=True, ip="10.0.0.5", netmask="255.255.255.0")
    assert kinds(plan(left, request=asked(portgroup="Backup", dhcp=True))) == ["select"]


def test_an_old_host_is_told():
    with pytest.raises(VsphereError, match=r"ESXi 6\.7\.0.*7\.0"):
        plan(request=asked(device="vmk0"), service_types=("management",), version="6.7.0")


def test_a_host_that_does_not_answer_is_told():
    with pytest.raises(VsphereError, match="not connected"):
        plan(request=asked(device="vmk0"), connected=False)


# --- absent


def test_the_backup_nic_goes():
    for name in ({"device": "vmk1"}, {"portgroup": "Backup"}, {"address": "10.0.0.5/24"}):
        assert kinds(plan(OLD_BACKUP, request=asked(present=False, **name))) == ["remove_nic"]


# vmk1 on Backup with 10.0.0.5 and fd00::5; vmk2 on the distributed port group dvb with 10.0.9.5.
TWO = (
    nic("vmk1", "10.0.0.5/24", "Backup", (BACKUP,), ipv6=("fd00::5/64",)),
    nic("vmk2", "10.0.9.5/24", "dvb", (BACKUP,), switch="DSwitch0", port_key="pg-1"),
)
SELECTORS = {
    "device": ("vmk1", "vmk2", "vmk7"),
    "address": ("10.0.0.5/24", "10.0.9.5/24", "10.0.0.7/24"),
    "ipv6": ((ipaddress.IPv6Interface("fd00::5/64"),), None, (ipaddress.IPv6Interface("fd00::7/64"),)),
    "portgroup": ("Backup", "dvb", "Management Network"),
    "place": ({"vswitch": "vSwitch0"}, {"dvswitch": "DSwitch0"}, {"vswitch": "vSwitch9"}),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("names", [one for size in (1, 2, 3) for one in itertools.combinations(SELECTORS, size)])
def test_only_the_nic_that_all_selectors_name_goes(names, force):
    """Each selector says vmk1, vmk2 or neither: a NIC goes only where all of them say it."""
    if not {"device", "address", "ipv6", "portgroup"} & set(names):
        return
    for choice in itertools.product(range(3), repeat=len(names)):
        options = {}
        for name, which in zip(names, choice):
            value = SELECTORS[name][which]
            options.update(value if name == "place" else {name: value})
        if options.get("ipv6", ()) is None:
            continue
        try:
            made = plan(*TWO, request=asked(present=False, force=force, **options))
        except InputError as error:
            assert len(set(choice)) > 1 or choice[0] == 2, (options, str(error))
            continue
        gone = [step.nic.device for step in made.steps if step.kind == "remove_nic"]
        assert gone == ([f"vmk{choice[0] + 1}"] if len(set(choice)) == 1 and choice[0] < 2 else []), options


def test_a_nic_that_is_named_wrongly_is_told():
    with pytest.raises(InputError, match="another one than described.*ip_address is 10.0.0.5/24, not 10.0.0.5/16"):
        plan(*TWO, request=asked(present=False, address="10.0.0.5/16"))
    with pytest.raises(InputError, match="vswitch is vSwitch0, not vSwitch1"):
        plan(*TWO, request=asked(present=False, portgroup="Backup", vswitch="vSwitch1"))
    assert kinds(plan(*TWO, request=asked(present=False, address="10.0.0.5/31", any_netmask=True))) == ["remove_nic"]


def test_not_ours_is_not_absent():
    for services in ((), (BACKUP, "vmotion")):
        other = nic("vmk1", "10.0.0.5/24", "Backup", services)
        request = {"present": False, "portgroup": "Backup"}
        with pytest.raises(InputError, match="not for backup traffic alone and is not removed"):
            plan(other, request=asked(**request))
        assert kinds(plan(other, request=asked(**request, force=True))) == ["remove_nic"]


def test_of_several_on_a_port_group_ours_goes():
    place = {"switch": "DSwitch0", "port_key": "pg-1"}
    ours = nic("vmk1", "10.0.0.5/24", "dvb", (BACKUP,), **place)
    others = [nic(f"vmk{n}", f"10.0.{n}.5/24", "dvb", **place) for n in (2, 3)]
    made = plan(ours, *others, request=asked(present=False, portgroup="dvb", force=True))
    assert [step.nic.device for step in made.steps] == ["vmk1"]
    with pytest.raises(InputError, match="More than one"):
        plan(*others, request=asked(present=False, portgroup="dvb", force=True))


def test_nothing_to_remove():
    for name in ({"device": "vmk7"}, {"portgroup": "Backup"}, {"address": "10.0.0.5/24"}):
        assert kinds(plan(request=asked(present=False, **name))) == []


@pytest.mark.parametrize("force", [True, False])
def test_the_last_management_nic_stays(force):
    with pytest.raises(InputError, match="last management"):
        plan(request=asked(present=False, device="vmk0", force=force))


@pytest.mark.parametrize(
    "services, stack, word",
    [
        ((BACKUP, "vmotion"), "defaultTcpipStack", "carries vMotion"),
        ((), "defaultTcpipStack", "not tagged"),
        ((BACKUP,), "vmotion", "stack vmotion"),
    ],
)
def test_other_services_need_force(services, stack, word):
    other = nic("vmk2", "10.0.0.5/24", "X", services, stack=stack)
    with pytest.raises(InputError, match=word):
        plan(other, request=asked(present=False, device="vmk2"))
    assert kinds(plan(other, request=asked(present=False, device="vmk2", force=True))) == ["remove_nic"]


def test_the_mtu_of_a_distributed_switch_is_the_hosts():
    made = plan(request=asked(dvswitch="DSwitch0", portgroup="dvb", address="10.0.0.5/24", mtu=1600))
    assert made.warnings == []
    made = plan(request=asked(dvswitch="DSwitch0", portgroup="dvb", address="10.0.0.5/24", mtu=1601))
    assert "exceeds 1600, that of switch 'DSwitch0'" in made.warnings[0]
