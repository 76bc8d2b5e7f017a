# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import sys
from pathlib import Path
from typing import Iterator, List

import pytest

# The tests import their helpers by name; pytest's importlib mode leaves sys.path alone.
sys.path.insert(0, str(Path(__file__).parent))

from administrator import Administrator  # noqa: E402
from harness import Ansible, Backups, Simulator, made_repository  # noqa: E402
from modules import Modules  # noqa: E402

# A file is one worker's work: the long ones go first, or the others wait for the last of them at the end.
LONG = (
    "test_faults",
    "test_role_backup_lan",
    "test_backup_nic",
    "test_transports",
    "test_role_backup",
    "test_full_instead",
    "test_restore",
    "test_proxy_hotadd",
    "test_crash",
    "test_incrementals",
    "test_model",
    "test_changed_only",
    "test_access",
    "test_controllers",
    "test_new_vm",
    "test_ways_back",
    "test_bad_input",
    "test_role_restore",
    "test_boot",
    "test_lan_probe",
    "test_preflight",
    "test_https",
    "test_export",
    "test_safety_point",
    "test_templates",
    "test_ssh_proxy",
    "test_new_vm_https",
)


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator that the tests of one file share; each test takes virtual machines of its own."""
    running = Simulator(tmp_path_factory.mktemp("simulator") / "state", vms="standard")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def own_simulator(tmp_path: Path) -> Iterator[Simulator]:
    """A simulator of one test alone."""
    running = Simulator(tmp_path / "state")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository without a point."""
    return made_repository(tmp_path / "repository")


@pytest.fixture
def ansible(tmp_path: Path) -> Ansible:
    """ansible-playbook with its files in the test's folder."""
    return Ansible(tmp_path / "ansible")


@pytest.fixture
def backups(simulator: Simulator, ansible: Ansible, repository: Path) -> Backups:
    """Backups of the shared simulator's machines through playbook backup.yml."""
    return Backups(simulator, ansible, repository)


@pytest.fixture
def modules(own_simulator: Simulator, repository: Path) -> Modules:
    """The modules on app01 of a simulator of the test's own."""
    return Modules(own_simulator, repository)


@pytest.fixture
def administrator(own_simulator: Simulator) -> Iterator[Administrator]:
    """Who changes app01 behind the backup's back."""
    session = Administrator(own_simulator.facts, "app01")
    try:
        yield session
    finally:
        session.close()
