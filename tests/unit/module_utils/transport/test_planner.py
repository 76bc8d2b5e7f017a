# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError, TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport.planner import (
    READ,
    WRITE,
    DiskFacts,
    ProxyFacts,
    plan,
)
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vddk import Vddk

ALL = ["san", "hotadd", "nbdssl", "nbd", "https"]
DISK = DiskFacts("Hard disk 1", "[vmfs01] app01/app01.vmdk")
VDDK = Vddk("/opt/vddk", "8.0.3", "1.42.3")


@pytest.mark.parametrize("direction", [READ, WRITE])
@pytest.mark.parametrize("is_vcenter", [True, False])
def test_the_first_usable_one_is_taken_and_the_others_are_explained(direction: str, is_vcenter: bool) -> None:
    found = plan(DISK, ProxyFacts(VDDK, None, is_vcenter), ALL, direction, False)
    assert found.chosen == "nbdssl"
    assert [candidate.usable for candidate in found.candidates] == [False, False, True, True, False]
    reasons = found.reasons()
    assert [reason.split(":")[0] for reason in reasons] == ["san", "hotadd"]
    assert ("ESXi" in reasons[1]) == (not is_vcenter)


def test_the_order_of_the_list_decides() -> None:
    assert plan(DISK, ProxyFacts(VDDK), ["nbd", "nbdssl"], READ, False).chosen == "nbd"


def test_without_vddk_every_reason_is_told() -> None:
    with pytest.raises(TransportError) as caught:
        plan(DISK, ProxyFacts(None, "no libvixDiskLib.so.* in /opt/vddk/lib64"), ALL, READ, False)
    text = str(caught.value)
    assert "Hard disk 1" in text
    assert text.count("no libvixDiskLib.so.* in /opt/vddk/lib64") == 1
    assert all(name in text for name in ALL)
    assert [item["usable"] for item in caught.value.details["candidates"]] == [False] * 5


def test_a_required_transport_is_the_first_one_or_an_error() -> None:
    assert plan(DISK, ProxyFacts(VDDK), ["nbdssl", "nbd"], READ, True).chosen == "nbdssl"
    with pytest.raises(TransportError) as caught:
        plan(DISK, ProxyFacts(VDDK), ALL, READ, True)
    assert "san" in str(caught.value)
    assert "Put nbdssl first" in str(caught.value)


@pytest.mark.parametrize("transports", [[], ["nbd", "nbd"], ["file"]])
def test_lists_that_make_no_sense_are_refused(transports: list) -> None:
    with pytest.raises(InputError):
        plan(DISK, ProxyFacts(VDDK), transports, READ, False)
