# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

# It makes a Debian of its own, which takes minutes and a mirror: `make soak` asks for it.
collect_ignore = [] if os.environ.get("SOAK_DEBIAN13") else ["test_debian13.py"]

# The tests import their helpers by name; pytest's importlib mode leaves sys.path alone.
sys.path.insert(0, str(Path(__file__).parent))

from runner import Server  # noqa: E402
from world import World  # noqa: E402


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes a line with counts, which is printed at the very end."""
    return lambda line: record_property("counts", line)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A simulator, in which each test makes machines of its own."""
    made = World()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Server]:
    """Runs of the product that can be killed."""
    folder = world.folder / "runs"
    folder.mkdir()
    started = Server(folder)
    try:
        yield started
    finally:
        started.stop()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for outcome in ("passed", "failed"):
        for result in terminalreporter.stats.get(outcome, []):
            for name, line in result.user_properties:
                if name == "counts":
                    terminalreporter.write_line(line)
