# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.backup_lan_table import FilterModule, backup_lan_table


def nic(host, **fields):
    return {
        "host": host,
        "device": "vmk2",
        "ip": "10.20.30.11",
        "mtu": 9000,
        "portgroup": "Backup",
        "changed": True,
        "failed": False,
        "msg": "",
        **fields,
    }


def target(host, **fields):
    return {
        "host": host,
        "address": "10.20.30.11",
        "reached": True,
        "source_address": "10.20.30.5",
        "mtu": {"asked": 9000, "ok": True, "reason": ""},
        "cause": "ok",
        "reason": "",
        "remedy": "",
        **fields,
    }


def result(**fields):
    return {"proxy": "proxy01", "state": "proven", "hosts": [], "targets": [], **fields}


def test_a_line_for_each_host_and_what_is_wrong_below():
    lines = backup_lan_table(
        [
            result(
                state="failed",
                hosts=[nic("esx01"), nic("esx02", changed=False), nic("esx03"), nic("esx04"), nic("esx05")],
                targets=[
                    target("esx01"),
                    target("esx02", reached=False, cause="timeout", reason="no answer", remedy="Look at the VLAN"),
                    target(
                        "esx03",
                        cause="mtu_path",
                        reason="lost on the way",
                        remedy="Set it",
                        mtu={"asked": 9000, "ok": False, "reason": "lost on the way"},
                    ),
                    target("esx04", mtu={"asked": 9000, "ok": None, "reason": "not checked, no echo"}),
                    target("esx05", cause="wrong_interface", reason="leaves by eth0", remedy="A route"),
                ],
                interface={"name": "ens224", "address": "10.20.30.5/24", "file": "/etc/x.network", "changed": True},
                dvswitch="DSwitch0",
                pool={"level": "low", "shares": 25, "limit": -1, "reservation": 0},
                notes=["a note"],
                reason="Not proven: esx02, esx03.",
            )
        ]
    )
    assert lines == [
        "host   NIC   address       MTU  port group  state      reached from  MTU proved",
        "-----  ----  -----------  ----  ----------  ---------  ------------  ----------",
        "esx01  vmk2  10.20.30.11  9000  Backup      changed    10.20.30.5    9000",
        "esx02  vmk2  10.20.30.11  9000  Backup      unchanged  NO [1]        -",
        "esx03  vmk2  10.20.30.11  9000  Backup      changed    10.20.30.5    NO [2]",
        "esx04  vmk2  10.20.30.11  9000  Backup      changed    10.20.30.5    ? [3]",
        "esx05  vmk2  10.20.30.11  9000  Backup      changed    NO [4]        9000",
        "[1] no answer. Look at the VLAN.",
        "[2] lost on the way. Set it.",
        "[3] not checked, no echo",
        "[4] leaves by eth0. A route.",
        "proxy01: ens224 with 10.20.30.5/24 in /etc/x.network, changed",
        "proxy01: DSwitch0: backup traffic has 25 shares (low), no limit, 0 Mbit/s reserved",
        "proxy01: a note",
        "proxy01: FAILED: Not proven: esx02, esx03.",
    ]


def test_states():
    planned = backup_lan_table([result(state="planned", hosts=[nic("esx01", device=None)])])
    assert planned[2].split() == ["esx01", "-", "10.20.30.11", "9000", "Backup", "planned", "-", "-"]
    assert planned[3] == "proxy01: check mode, nothing was touched or proved"
    configured = backup_lan_table([result(state="configured", hosts=[nic("esx01")])])
    assert configured[-1] == "proxy01: not proved, as backup_lan_probe is false"
    failed = {"host": "esx01", "changed": False, "failed": True, "msg": "It is not connected."}
    lines = backup_lan_table([result(state="failed", hosts=[failed], reason="One host failed.")])
    assert lines[2].split() == ["esx01", "-", "-", "-", "-", "FAILED", "[1]", "-", "-"]
    assert lines[3:] == ["[1] It is not connected.", "proxy01: FAILED: One host failed."]
    assert backup_lan_table([result(state="failed", reason="")]) == ["proxy01: FAILED: no reason was recorded"]
    # A second proxy has a proof of its own.
    assert len(backup_lan_table([result(hosts=[nic("esx01")], targets=[target("esx01")])] * 2)) == 4


@pytest.mark.parametrize("bad", ["text", {"state": "proven"}, [1], [{"state": "well"}]])
def test_anything_else_is_refused(bad):
    with pytest.raises(AnsibleFilterError):
        FilterModule().filters()["backup_lan_table"](bad)
