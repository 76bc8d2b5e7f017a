# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vCenter's tags: kept with each point, given to a new machine; and a vCenter that does not play along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere import rest, tags
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from harness import Simulator, made_repository
from modules import Modules

ATTACHED = "POST /api/cis/tagging/tag-association?action=list-attached-tags"
ATTACH = "POST /api/cis/tagging/tag-association/{id}?action=attach"
CATEGORIES = "GET /api/cis/tagging/category"
LOGIN, LOGOUT = "POST /api/session", "DELETE /api/session"
# One disk of 16 MiB: it is not about the disks here.
SMALL: Dict[str, Any] = {"disks": [{"key": 2001}], "transports": ["nbdssl"]}
DAILY = {"category": "Backup", "name": "daily"}
OPS = {"category": "Owner", "name": "ops/night"}


class Tagged:
    """app01 with two tags, and one point of it."""

    def __init__(self, folder: Path) -> None:
        self.simulator = Simulator(folder / "state")
        repository = folder / "repository"
        made_repository(repository)
        self.modules = Modules(self.simulator, repository)
        self.control = self.simulator.control
        self.control.call("make_tag", category="Backup", name="daily", description="each night", cardinality="SINGLE")
        self.control.call("make_tag", category="Backup", name="weekly")
        self.control.call("make_tag", category="Owner", name="ops/night", types=["VirtualMachine"])
        self.control.call("attach_tag", vm="app01", **DAILY)
        self.control.call("attach_tag", vm="app01", **OPS)
        seen = self.simulator.last_call()
        self.point("tagged")
        self.calls = self.rest_calls(seen)

    def point(self, name: str) -> Dict[str, Any]:
        """What an export of the small disk returns."""
        snapshot = self.modules.snapshot(name)
        options = self.modules.export_options(snapshot_moid=snapshot, point=name, disks=["2001"])
        result = self.modules.done("vadp_disk_export", **options)
        self.modules.remove_snapshot(snapshot)
        return result

    def saved(self, point: str) -> Any:
        (path,) = self.modules.repository.glob(f"vms/*/configs/{point}.json")
        return json.loads(path.read_text(encoding="utf-8"))["tags"]

    def rest_calls(self, since: int) -> List[str]:
        calls = self.control.call("calls", since=since)
        return [call["method"] for call in calls if "/api/" in call["method"]]

    def make(self, name: str, **options: Any) -> Dict[str, Any]:
        facts = self.simulator.facts
        given = {
            **self.simulator.connection,
            "repository": str(self.modules.repository),
            "vm_name": "app01",
            "vddk_libdir": facts["vddk_libdir"],
            "nfc_port": facts["nfc_port"],
            "target": "new_vm",
            "name": name,
            "point": "tagged",
            **SMALL,
            **options,
        }
        return self.modules.done("vadp_disk_restore", **given)

    def of(self, vm: str) -> List[List[str]]:
        found: List[List[str]] = self.control.call("tags", vm=vm)
        return found

    def privileges(self, **change: List[str]) -> None:
        self.control.call("set_privileges", username=self.simulator.facts["backup_username"], **change)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tagged]:
    made = Tagged(tmp_path_factory.mktemp("tags"))
    try:
        yield made
    finally:
        made.simulator.stop()


@pytest.fixture
def session(tagged: Tagged) -> Iterator[Session]:
    with Session.connect(Connection(**tagged.simulator.connection)) as connected:
        yield connected
    tagged.control.call("clear_injections")
    tagged.control.call("set_settings", rest_api=True)


def _warnings(result: Dict[str, Any]) -> List[str]:
    return [one for one in map(str, result["warnings"]) if "tag" in one.lower()]


def test_a_point_keeps_the_tags(tagged: Tagged) -> None:
    """With the calls that it takes, and no login that is left."""
    assert tagged.saved("tagged") == [{**DAILY, "description": "each night"}, {**OPS, "description": ""}]
    assert tagged.calls[:2] == [LOGIN, ATTACHED] and tagged.calls[-1] == LOGOUT
    assert len(tagged.calls) == 3 + 2 + 2 and tagged.control.call("state")["sessions"] == []


def test_a_machine_without_tags_takes_three_calls(tagged: Tagged, session: Session) -> None:
    seen = tagged.simulator.last_call()
    assert tags.save(session, find_vm(session, name="restore01")) == ([], [])
    assert tagged.rest_calls(seen) == [LOGIN, ATTACHED, LOGOUT]


def test_a_point_that_is_there_asks_for_no_tags(tagged: Tagged) -> None:
    seen = tagged.simulator.last_call()
    options = tagged.modules.export_options(snapshot_name="gone", point="tagged")
    assert tagged.modules.done("vadp_disk_export", **options)["changed"] is False
    assert tagged.rest_calls(seen) == []


def test_a_new_machine_has_the_tags(tagged: Tagged) -> None:
    """Before it is started; check mode and diff tell of them."""
    seen = tagged.simulator.last_call()
    planned = tagged.make("copy", _ansible_check_mode=True, _ansible_diff=True)
    assert planned["tags"] == [DAILY, OPS] and not tagged.simulator.changing_calls(seen)
    (told,) = planned["diff"]["after"].values()
    assert told.endswith(" with the tags Backup/daily, Owner/ops/night")
    result = tagged.make("copy", mac_addresses="new", power_on=True)
    assert result["tags"] == [DAILY, OPS] and _warnings(result) == []
    assert tagged.of("copy") == [["Backup", "daily"], ["Owner", "ops/night"]]
    assert not [one for one in result["differences"] if one["path"].startswith("tags")]
    changing = tagged.simulator.changing_calls(seen)
    assert changing.count(ATTACH) == 2 and changing[-1] == "PowerOnVM_Task"
    plain = tagged.make("plain", tags=False)
    assert plain["tags"] == [] and tagged.of("plain") == [] and _warnings(plain) == []
    explained = {one["path"]: one["reason"] for one in plain["differences"]}
    assert explained["tags[Backup/daily]"] == explained["tags[Owner/ops/night]"] == "no tags were asked for"


def test_what_this_vcenter_does_not_have_is_told(tagged: Tagged, session: Session) -> None:
    """Nothing is made; what is there is attached all the same."""
    vm = find_vm(session, name="restore01")
    wanted = [
        tags.Tag("Backup", "daily"),
        tags.Tag("Backup", "weekly"),
        tags.Tag("Owner", "nobody"),
        tags.Tag("Shelf", "A"),
        tags.Tag("Site", "Berlin"),
    ]
    tagged.control.call("make_tag", category="Shelf", name="A", types=["Datastore"])
    reasons = [
        "a machine can have one tag of the category, and it is 'daily'",
        "vCenter shows no such tag in the category",
        "tags of the category are not for virtual machines in this vCenter",
        "vCenter shows no such category",
    ]
    expected = [f"{tag} was not restored: {reason}" for tag, reason in zip(wanted[1:], reasons)]
    planned = tags.restore(session, wanted, None, "restore02")
    assert planned == ([wanted[0]], expected) and tagged.of("restore01") == []
    assert tags.restore(session, wanted, vm, vm.name) == ([wanted[0]], expected)
    assert tagged.of("restore01") == [["Backup", "daily"]]
    # What only vCenter knows: the machine has another tag of the category meanwhile.
    other = tags.restore(session, [wanted[1]], vm, vm.name)
    assert other.attached == [] and "HTTP 400" in other.warnings[0] and "SINGLE" in other.warnings[0]
    tagged.control.call("remove_tag", category="Shelf")


@pytest.mark.parametrize("privilege", [tags.ATTACH, tags.ATTACHABLE])
def test_a_privilege_is_missing(tagged: Tagged, privilege: str) -> None:
    """The machine is restored, and the warning names what to give."""
    name = f"unprivileged-{privilege.rpartition('.')[2]}"
    tagged.privileges(remove=[privilege])
    result = tagged.make(name)
    tagged.privileges(add=[privilege])
    assert result["tags"] == [] and tagged.of(name) == []
    told = _warnings(result)
    assert len(told) == 2 and all("HTTP 403" in one and privilege in one for one in told)
    explained = {one["path"]: one["reason"] for one in result["differences"]}
    assert explained["tags[Backup/daily]"] == "a warning reports it"


def test_a_login_that_has_ended_and_a_connection_that_broke(tagged: Tagged, session: Session) -> None:
    vm = find_vm(session, name="app01")
    expected = [["Backup", "daily"], ["Owner", "ops/night"]]
    for fault in ("vim.fault.NotAuthenticated", "drop", "lost"):
        seen = tagged.simulator.last_call()
        tagged.control.call("inject", target="call", name="GET /api/cis/tagging/tag/{id}", fault=fault)
        assert [list(tag[:2]) for tag in tags.attached_tags(session, vm)] == expected, fault
        assert tagged.rest_calls(seen).count(LOGIN) == (2 if fault.endswith("NotAuthenticated") else 1)


def test_no_backup_fails_for_tags(tagged: Tagged) -> None:
    """An old vCenter; a REST API that breaks. The point is made, and says that it does not tell the tags."""
    for name, reason in (("old", "came with vCenter 7.0 U2"), ("broken", "HTTP 500"), ("refused", "HTTP 403")):
        if name == "old":
            tagged.control.call("set_settings", rest_api=False)
        else:
            fault = "vim.fault.NoPermission" if name == "refused" else "vmodl.fault.SystemError"
            tagged.control.call("inject", target="call", name=ATTACHED, fault=fault)
        result = tagged.point(name)
        tagged.control.call("set_settings", rest_api=True)
        assert tagged.saved(name) is None
        (told,) = result["point"]["warnings"]
        assert told.startswith("The machine's tags are not in the restore point: ") and reason in told
        assert len(_warnings(result)) == 1 and reason in _warnings(result)[0]
    result = tagged.make("untold", point="old")
    assert result["tags"] == [] and "does not report the machine's tags" in _warnings(result)[0]


def test_no_restore_fails_for_tags(tagged: Tagged, session: Session) -> None:
    vm = find_vm(session, name="restore01")
    wanted = [tags.Tag("Backup", "daily"), tags.Tag("Owner", "ops/night")]
    tagged.control.call("set_settings", rest_api=False)
    restored = tags.restore(session, wanted, vm, vm.name)
    assert restored.attached == [] and all("7.0 U2" in one for one in restored.warnings) and len(restored.warnings) == 2
    tagged.control.call("set_settings", rest_api=True)
    # It breaks after the first of them.
    tagged.control.call("inject", target="call", name=ATTACH, fault="vmodl.fault.SystemError", count=0, after=1)
    restored = tags.restore(session, wanted, vm, vm.name)
    assert restored.attached == wanted[:1] and "HTTP 500" in restored.warnings[0] and len(restored.warnings) == 1


def test_a_rest_api_that_is_silent(tagged: Tagged, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, and not to end its login."""
    vm = find_vm(session, name="app01")
    monkeypatch.setattr(rest, "ANSWER_TIMEOUT", 0.2)
    tagged.control.call("inject", target="call", name=ATTACHED, delay=3)
    seen = tagged.simulator.last_call()
    saved = tags.save(session, vm)
    assert saved.tags is None and "no answer in time" in saved.warnings[0]
    assert LOGOUT not in tagged.rest_calls(seen)
    monkeypatch.setattr(rest, "TOTAL_SECONDS", -1)
    assert "took more than" in tags.save(session, vm).warnings[0]


def test_the_password_is_in_no_message(tagged: Tagged, session: Session) -> None:
    """Also where the login itself is refused."""
    vm = find_vm(session, name="app01")
    session.connection.password = "not this one"
    saved = tags.save(session, vm)
    assert saved.tags is None and "HTTP 401" in saved.warnings[0] and "not this one" not in str(saved)


def test_the_certificate_is_verified(tagged: Tagged, session: Session) -> None:
    """The REST API is spoken to over the session's TLS: a pinned thumbprint that is another's ends it."""
    vm = find_vm(session, name="app01")
    assert session.tls is not None
    session.tls._pinned = "00" * 32
    seen = tagged.simulator.last_call()
    assert "thumbprint" in tags.save(session, vm).warnings[0] and tagged.rest_calls(seen) == []
