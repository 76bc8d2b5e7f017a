# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is sent to change a NIC: what is the same is left out, and the way back leads to what was."""

from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.lan import apply
from ansible_collections.openvadp.backup.plugins.module_utils.lan.plan import Target
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.host_network import Nic
from hypothesis import given
from hypothesis import strategies as st

STATIC = Nic("vmk1", ip="10.0.0.5", netmask="255.255.255.0", ipv6=("fd00::5/64",), mtu=9000, gateway="10.0.0.1")

ADDRESSES = st.sampled_from([None, "10.0.0.5", "10.0.0.6", "10.1.0.5"])
NICS = st.builds(
    lambda dhcp, ip, ipv6, mtu, gateway: Nic(
        "vmk1",
        dhcp=dhcp,
        ip=None if dhcp else ip,
        netmask=None if dhcp or ip is None else "255.255.255.0",
        ipv6=tuple(ipv6),
        mtu=mtu,
        gateway=gateway,
    ),
    st.booleans(),
    ADDRESSES,
    st.lists(st.sampled_from(["fd00::5/64", "fd00::6/64", "fd01::5/48"]), unique=True, max_size=3),
    st.sampled_from([1280, 1500, 9000]),
    st.sampled_from([None, "10.0.0.1", "10.1.0.1"]),
)


def carried_out(nic, spec):
    """What a host makes of an update: the IPv4 part is replaced, IPv6 addresses are added and removed."""
    dhcp, ip, netmask, ipv6 = nic.dhcp, nic.ip, nic.netmask, list(nic.ipv6)
    if spec.ip is not None:
        dhcp, ip, netmask = spec.ip.dhcp, spec.ip.ipAddress, spec.ip.subnetMask
        assert bool(ip) == bool(netmask) and not (dhcp and ip)
        for one in spec.ip.ipV6Config.ipV6Address if spec.ip.ipV6Config else ():
            text = f"{one.ipAddress}/{one.prefixLength}"
            if one.operation == "add":
                assert text not in ipv6
                ipv6.append(text)
            else:
                ipv6.remove(text)
    gateway = nic.gateway if spec.ipRouteSpec is None else spec.ipRouteSpec.ipRouteConfig.defaultGateway
    return Nic("vmk1", dhcp=dhcp, ip=ip, netmask=netmask, ipv6=tuple(ipv6), mtu=spec.mtu or nic.mtu, gateway=gateway)


def words(nic):
    return nic.dhcp, nic.ip, nic.netmask, set(nic.ipv6), nic.mtu, nic.gateway


@given(NICS, NICS)
def test_the_way_back_leads_to_what_was(now, before):
    back = Target(before.dhcp, before.ip, before.netmask, before.ipv6, before.mtu, before.gateway or "")
    assert words(carried_out(now, apply._update(now, back, whole=True))) == words(before)


@given(NICS)
def test_what_is_the_same_is_not_sent(nic):
    spec = apply._update(nic, Target(nic.dhcp, nic.ip, nic.netmask, nic.ipv6, nic.mtu, nic.gateway))
    assert spec.ip is None and spec.mtu is None and spec.ipRouteSpec is None


@pytest.mark.parametrize(
    "target, changed",
    [
        (Target(ip="10.0.0.6", netmask="255.255.255.0"), {"ip": "10.0.0.6"}),
        (Target(dhcp=True), {"dhcp": True, "ip": None, "netmask": None}),
        (Target(mtu=1500), {"mtu": 1500}),
        (Target(ipv6=()), {"ipv6": ()}),
        (Target(gateway="10.0.0.2"), {"gateway": "10.0.0.2"}),
    ],
)
def test_what_is_not_asked_for_stays(target, changed):
    values = {"dhcp": False, "ip": STATIC.ip, "netmask": STATIC.netmask, "ipv6": STATIC.ipv6}
    wanted = Nic("vmk1", **{**values, "mtu": STATIC.mtu, "gateway": STATIC.gateway, **changed})
    assert words(carried_out(STATIC, apply._update(STATIC, target))) == words(wanted)
