# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Machines of vApps and of resource pools, restored as new ones to where they were."""

from __future__ import annotations

from typing import Any, Dict, Iterator

import pytest
from harness import Simulator, made_repository
from modules import Modules

# One disk of 16 MiB.
SMALL: Dict[str, Any] = {"disks": [{"key": 2001}]}


class Vapps:
    """app01 in the vApp Inner, which lies in the vApp Shop, in the folder production; db01 in a resource pool."""

    def __init__(self, folder: Any) -> None:
        self.simulator = Simulator(folder / "state")
        self.call = self.simulator.control.call
        self.call("make_vapp", name="Shop")
        self.call("make_vapp", name="Inner", parent="Shop")
        self.call("move_vm", vm="app01", pool="Inner")
        self.modules = Modules(self.simulator, made_repository(folder / "repository"))
        self.modules.track_changes()
        self.modules.point("p1")

    def restore(self, name: str, check: bool = False, **options: Any) -> Dict[str, Any]:
        wanted = {**self.modules.export_options(point="p1", vm_name="app01", target="new_vm"), **SMALL, **options}
        return self.modules.run("vadp_disk_restore", **{**wanted, "name": name, "_ansible_check_mode": check})


@pytest.fixture(scope="module")
def vapps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vapps]:
    made = Vapps(tmp_path_factory.mktemp("vapps"))
    try:
        yield made
    finally:
        made.simulator.stop()


@pytest.mark.parametrize("transport", ["nbdssl", "https"])
def test_a_machine_of_a_vapp_comes_back_into_it(vapps: Vapps, transport: str) -> None:
    """By CreateChildVM_Task, and by an import lease without a folder."""
    name = f"again-{transport}"
    planned = vapps.restore(name, check=True, transports=[transport])
    result = vapps.restore(name, transports=[transport])
    assert not result["failed"], result
    assert planned["vm"]["path"] == result["vm"]["path"] == f"/DC0/vm/production/Shop/Inner/{name}"
    assert vapps.simulator.vm(name)["pool"] == "Inner"
    assert vapps.simulator.disk(name, 2001) == vapps.modules.held["p1"][2001]
    assert "vApp" not in str(result["warnings"])


@pytest.mark.parametrize(
    ("options", "path", "warned"),
    [
        ({"folder": "/DC0/vm/production"}, "/DC0/vm/production", True),
        ({"folder": "/DC0/vm/production", "resource_pool": "Resources"}, "/DC0/vm/production", False),
        ({"resource_pool": "Resources"}, "/DC0/vm/production", True),
        ({"folder": "Shop"}, "/DC0/vm/production/Shop", False),
        ({"resource_pool": "Resources/Shop"}, "/DC0/vm/production/Shop", False),
        ({"folder": "Shop/Inner", "resource_pool": "Inner"}, "/DC0/vm/production/Shop/Inner", False),
    ],
)
def test_what_is_asked_for_counts(vapps: Vapps, options: Dict[str, Any], path: str, warned: bool) -> None:
    result = vapps.restore("asked", check=True, **options)
    assert not result["failed"], result
    assert result["vm"]["path"] == f"{path}/asked"
    assert ("outside of it" in str(result["warnings"])) is warned


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"folder": "/DC0/vm/production", "resource_pool": "Inner"}, "belongs to a vApp"),
        ({"folder": "Shop", "resource_pool": "Inner"}, "belongs to a vApp"),
        ({"folder": "Shop", "resource_pool": "Resources"}, "is a vApp"),
        ({"folder": "Nowhere"}, "there is no folder 'Nowhere'"),
    ],
)
def test_a_contradiction_touches_nothing(vapps: Vapps, options: Dict[str, Any], word: str) -> None:
    at = vapps.simulator.last_call()
    result = vapps.restore("refused", **options)
    assert result["failed"] and word in result["msg"], result
    assert not vapps.simulator.changing_calls(at)


def test_a_vapp_that_is_gone(vapps: Vapps) -> None:
    """The machine goes beside it, with a warning; and so it does out of a pool within a vApp."""
    vapps.call("make_pool", name="Fast", parent="Inner")
    vapps.call("move_vm", vm="app01", pool="Fast")
    vapps.modules.point("p2")
    result = vapps.restore("pooled", check=True, point="p2")
    assert result["vm"]["path"] == "/DC0/vm/production/Shop/Inner/pooled"
    assert "its pool 'Fast' takes no new machine" in str(result["warnings"])
    vapps.call("remove_pool", name="Fast")
    vapps.call("remove_pool", name="Inner")
    result = vapps.restore("beside")
    assert not result["failed"], result
    assert result["vm"]["path"] == "/DC0/vm/production/beside"
    assert "a vApp that is not there" in str(result["warnings"])
    assert vapps.simulator.disk("beside", 2001) == vapps.modules.held["p1"][2001]
