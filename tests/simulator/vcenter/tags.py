# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tags, their categories, and the virtual machines that have them. They are forgotten with the process."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .inventory import VirtualMachine
from .model import SimulatorError

if TYPE_CHECKING:
    from .simulator import Simulator

CARDINALITIES = ("SINGLE", "MULTIPLE")


class NotEligible(SimulatorError):
    """The tag can't be attached to this object."""


@dataclass
class Category:
    name: str
    cardinality: str
    types: list[str]
    id: str = field(default_factory=lambda: f"urn:vmomi:InventoryServiceCategory:{uuid.uuid4()}:GLOBAL")

    def info(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "description": "",
            "cardinality": self.cardinality,
            "associable_types": self.types,
            "used_by": [],
        }


@dataclass
class Tag:
    category: Category
    name: str
    description: str
    vms: list[str] = field(default_factory=list)  # moids of those that have it
    id: str = field(default_factory=lambda: f"urn:vmomi:InventoryServiceTag:{uuid.uuid4()}:GLOBAL")

    def info(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "category_id": self.category.id,
            "name": self.name,
            "description": self.description,
            "used_by": [],
        }


class Tags:
    """What there is, by ids; the simulator's lock guards it."""

    def __init__(self, simulator: "Simulator") -> None:
        self.simulator = simulator
        self.categories: dict[str, Category] = {}
        self.tags: dict[str, Tag] = {}

    def of(self, vm: VirtualMachine) -> list[Tag]:
        return [tag for tag in self.tags.values() if vm.moid in tag.vms]

    def attach(self, tag: Tag, vm: VirtualMachine) -> None:
        """:raises NotEligible: its category is for other objects, or the machine has one of the category's tags."""
        if vm.moid in tag.vms:
            return
        if tag.category.types and "VirtualMachine" not in tag.category.types:
            raise NotEligible(f"tags of {tag.category.name} are not for VirtualMachine")
        if tag.category.cardinality == "SINGLE" and any(one.category is tag.category for one in self.of(vm)):
            raise NotEligible(f"{vm.name} has a tag of {tag.category.name}, which is of cardinality SINGLE")
        tag.vms.append(vm.moid)

    # the control socket's ops

    def make(
        self,
        category: str,
        name: str,
        description: str = "",
        cardinality: str = "MULTIPLE",
        types: Sequence[str] = (),
    ) -> str:
        """A tag, and its category if there is none of that name; its id."""
        if cardinality not in CARDINALITIES:
            raise SimulatorError(f"cardinality is {' or '.join(CARDINALITIES)}")
        with self.simulator.lock:
            if self._named(category, name):
                raise SimulatorError(f"there is a tag {category}/{name}")
            kind = next((one for one in self.categories.values() if one.name == category), None)
            if kind is None:
                kind = Category(category, cardinality, list(types))
                self.categories[kind.id] = kind
            tag = Tag(kind, name, description)
            self.tags[tag.id] = tag
            return tag.id

    def remove(self, category: str, name: str | None = None) -> None:
        """A tag, or a category with all its tags."""
        with self.simulator.lock:
            for tag in self._named(category, name):
                del self.tags[tag.id]
            if name is None:
                for kind in [one for one in self.categories.values() if one.name == category]:
                    del self.categories[kind.id]

    def attach_by_name(self, vm: str, category: str, name: str) -> None:
        found = self._named(category, name)
        if not found:
            raise SimulatorError(f"there is no tag {category}/{name}")
        machine = self.simulator.find_vm(vm)
        with self.simulator.lock:
            self.attach(found[0], machine)

    def of_vm(self, vm: str) -> list[list[str]]:
        """[category, name] of each tag that a machine has, sorted."""
        machine = self.simulator.find_vm(vm)
        with self.simulator.lock:
            return sorted([tag.category.name, tag.name] for tag in self.of(machine))

    def _named(self, category: str, name: str | None) -> list[Tag]:
        return [tag for tag in self.tags.values() if tag.category.name == category and name in (None, tag.name)]
