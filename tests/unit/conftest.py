# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import List

import pytest

# A file is one worker's work: the long ones go first, or the others wait for the last of them at the end.
LONG = ("test_progress", "test_backup_proxy", "test_budget", "test_disk_copy")


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
