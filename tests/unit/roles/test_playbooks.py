# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the keywords of a play decide for the hosts that its roles hand tasks on to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

PLAYBOOKS = sorted((Path(__file__).resolve().parents[3] / "playbooks").glob("*.yml"))


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.stem)
def test_the_work_is_done_on_the_proxy_that_is_named(playbook: Path) -> None:
    """``connection: local`` of a play holds for delegated tasks too: a proxy's work was done on the controller."""
    plays = yaml.safe_load(playbook.read_text(encoding="utf-8"))
    assert plays and not any("connection" in play for play in plays)
