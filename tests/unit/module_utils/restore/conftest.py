# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Restores read what exports make: the repositories of the repository's own tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def _neighbour(name: str) -> Any:
    path = Path(__file__).resolve().parents[1] / name / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"restore_tests_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_repository = _neighbour("repository")
_datapath = _neighbour("datapath")
run_dir = _datapath.run_dir
nbdkit = _datapath.nbdkit


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """An empty repository."""
    return _repository.World(tmp_path / "repository")


@pytest.fixture
def flip() -> Any:
    """Flips one bit of a file."""
    return _repository.flip
