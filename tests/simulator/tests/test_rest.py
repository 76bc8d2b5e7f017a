# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The simulator's REST API: sessions and tags, and what it refuses."""

from __future__ import annotations

import base64
import json
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from client import ControlError  # noqa: E402
from test_api import Started  # noqa: E402

ATTACH = "InventoryService.Tagging.AttachTag"
ASSOCIATION = "/api/cis/tagging/tag-association"


class Rest:
    """Raw HTTP, with the token of a login."""

    def __init__(self, sim: Started) -> None:
        self.sim = sim
        self.token: str | None = None

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        if self.token is not None:
            headers["vmware-api-session-id"] = self.token
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        connection = self.sim.http()
        connection.request(method, path, body=None if body is None else json.dumps(body), headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, json.loads(data) if data else None

    def basic(self, password: str | None = None) -> str:
        """The header of a login."""
        name, right = self.sim.info["backup_username"], self.sim.info["backup_password"]
        return "Basic " + base64.b64encode(f"{name}:{right if password is None else password}".encode()).decode()

    def login(self, password: str | None = None) -> int:
        self.token = None
        status, token = self.ask("POST", "/api/session", Authorization=self.basic(password))
        self.token = token if status == 201 else None
        return status

    def of(self, vm: str) -> list[str]:
        status, ids = self.ask("POST", f"{ASSOCIATION}?action=list-attached-tags", object_id(vm))
        assert status == 200
        return ids


def object_id(moid: str) -> dict[str, Any]:
    return {"object_id": {"id": moid, "type": "VirtualMachine"}}


def attach(tag: str) -> str:
    return f"{ASSOCIATION}/{urllib.parse.quote(tag)}?action=attach"


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("sim") / "state")
    yield started
    started.stop()


@pytest.fixture
def rest(sim):
    one = Rest(sim)
    assert one.login() == 201
    return one


def test_a_session_is_needed_and_ends(sim, rest):
    listing = "/api/cis/tagging/tag"
    assert rest.ask("GET", listing) == (200, [])
    soap = sim.si._stub.cookie.split('"')[1]
    for token in (None, "x", soap):
        other = Rest(sim)
        other.token = token
        status, told = other.ask("GET", listing)
        assert status == 401 and told["error_type"] == "UNAUTHENTICATED"
    # A token is no cookie of the SOAP API.
    connection = sim.http()
    connection.request("GET", "/folder?dcPath=DC0", headers={"Cookie": f'vmware_soap_session="{rest.token}"'})
    assert connection.getresponse().status == 401
    connection.close()
    assert Rest(sim).login("wrong") == 401 and Rest(sim).ask("POST", "/api/session")[0] == 401
    assert rest.ask("DELETE", "/api/session") == (204, None)
    assert rest.ask("GET", listing)[0] == 401
    assert rest.login() == 201
    sim.control.call("expire_sessions")
    assert rest.ask("GET", listing)[0] == 401
    sim.si = sim.connect()


def test_tags_are_listed_read_and_attached(sim, rest):
    seen = len(sim.control.call("calls"))
    moid = sim.vm()._moId
    tag = sim.control.call("make_tag", category="Owner", name="web", description="the web team")
    other = sim.control.call("make_tag", category="Owner", name="db")
    status, read = rest.ask("GET", f"/api/cis/tagging/tag/{urllib.parse.quote(tag)}")
    assert status == 200 and (read["id"], read["name"], read["description"]) == (tag, "web", "the web team")
    status, category = rest.ask("GET", f"/api/cis/tagging/category/{read['category_id']}")
    assert (status, category["name"], category["cardinality"], category["associable_types"]) == (
        200,
        "Owner",
        "MULTIPLE",
        [],
    )
    assert rest.ask("GET", "/api/cis/tagging/category") == (200, [read["category_id"]])
    listing = "/api/cis/tagging/tag?action=list-tags-for-category"
    assert rest.ask("POST", listing, {"category_id": read["category_id"]}) == (200, [tag, other])
    assert rest.of(moid) == []
    for _twice in range(2):
        assert rest.ask("POST", attach(tag), object_id(moid)) == (204, None)
    assert rest.of(moid) == [tag] and sim.control.call("tags", vm="app01") == [["Owner", "web"]]
    logged = [call for call in sim.control.call("calls", since=seen) if call["changing"]]
    assert [(call["method"], call["object"]) for call in logged] == [
        ("POST /api/cis/tagging/tag-association/{id}?action=attach", tag)
    ] * 2
    sim.control.call("remove_tag", category="Owner")
    assert rest.of(moid) == [] and rest.ask("GET", "/api/cis/tagging/category") == (200, [])


def test_what_it_refuses(sim, rest):
    moid = sim.vm()._moId
    tag = sim.control.call("make_tag", category="Site", name="Berlin", cardinality="SINGLE")
    other = sim.control.call("make_tag", category="Site", name="Bonn")
    disk = sim.control.call("make_tag", category="Tier", name="gold", types=["Datastore"])
    listing = f"{ASSOCIATION}?action=list-attached-tags"
    category = "/api/cis/tagging/tag?action=list-tags-for-category"
    for status, method, path, body in (
        (404, "GET", "/api/vcenter/vm", None),
        (404, "GET", "/api/cis/tagging/tag/urn:x", None),
        (404, "GET", "/api/cis/tagging/category/urn:x", None),
        (404, "POST", category, {"category_id": "urn:x"}),
        (400, "POST", category, {"category": "urn:x"}),
        (404, "POST", ASSOCIATION, object_id(moid)),
        (404, "POST", listing, object_id("vm-999")),
        (400, "POST", listing, {"object_id": moid}),
        (400, "POST", listing, {"object_id": {"id": moid}}),
        (400, "POST", listing, {**object_id(moid), "more": 1}),
        (404, "POST", attach("urn:x"), object_id(moid)),
        (400, "POST", attach(tag), object_id("vm-999")),
        (400, "POST", attach(disk), object_id(moid)),
    ):
        found, told = rest.ask(method, path, body)
        assert found == status and told["error_type"], (method, path, body)
    assert rest.ask("POST", listing, object_id(moid), **{"Content-Type": "text/plain"})[0] == 415
    assert rest.ask("POST", attach(tag), object_id(moid))[0] == 204
    status, told = rest.ask("POST", attach(other), object_id(moid))
    assert status == 400 and "SINGLE" in told["messages"][0]["default_message"]
    sim.control.call("set_privileges", username=sim.info["backup_username"], remove=[ATTACH])
    assert rest.ask("POST", attach(tag), object_id(moid))[0] == 403
    sim.control.call("set_privileges", username=sim.info["backup_username"], add=[ATTACH])
    sim.control.call("set_settings", rest_api=False)
    assert rest.ask("GET", "/api/cis/tagging/tag")[0] == 404 and rest.login() == 404
    sim.control.call("set_settings", rest_api=True)
    with pytest.raises(ControlError, match="there is a tag"):
        sim.control.call("make_tag", category="Site", name="Bonn")
