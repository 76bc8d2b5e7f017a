# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ipaddress

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


def asked(**options):
    address = options.pop("address", None)
    gateway = options.pop("gateway", None)
    return HostRequest(
        "esx01",
        address=ipaddress.IPv4Interface(address) if address else None,
        gateway=ipaddress.IPv4Address(gateway) if gateway else None,
        **options,
    )


def world():
    made = World()
    made.dv_switches["DSwitch0"] = DvSwitch(None, "dvs-17", "DSwitch0", "dvs-uuid", "8.0.3", True, "version3", [])
    made.dv_switches["Other"] = DvSwitch(None, "dvs-18", "Other", "other-uuid", "8.0.3", True, "version3", [])
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


def test_a_nic_with_other_services_is_not_changed():
    with pytest.raises(InputError, match="carries other services"):
        plan(request=asked(address="192.168.1.11/24", mtu=9000))


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
        ({"dvswitch": "Other", "portgroup": "B"}, "no member"),
        ({"dvswitch": "DSwitch0", "portgroup": "up"}, "uplinks"),
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
