# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from datetime import datetime, timezone

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    InputError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.names import (
    check_point_name,
    moment_of,
    new_point_name,
)


@pytest.mark.parametrize("name", ["a", "20261122T084203Z-2", "A.b_c+d-e", "x" * 128, "a..b"])
def test_point_names_that_may_be(name: str) -> None:
    assert check_point_name(name) == name


def test_new_point_names_do_not_collide() -> None:
    now = datetime(2026, 11, 22, 8, 42, 3, 999999, tzinfo=timezone.utc)
    assert new_point_name([], now) == "20261122T084203Z"
    assert new_point_name(["20261122T084203Z", "20261122T084203Z-2"], now) == "20261122T084203Z-3"


@pytest.mark.parametrize(
    "point, hour, minute, second, micro",
    [
        ("2026-11-20T03:00Z", 3, 0, 0, 0),
        ("2026-11-20T03:00:00Z", 3, 0, 0, 0),
        ("before 2026-11-20T03:00Z", 3, 0, 0, 0),
        ("2026-11-20t03:04:05.25z", 3, 4, 5, 250000),
        ("2026-11-20T04:30+01:30", 3, 0, 0, 0),
        # What YAML makes of a time that is not quoted, as Python writes it and as JSON does.
        ("2026-11-20 03:00:00+00:00", 3, 0, 0, 0),
        ("2026-11-20T03:00:00.500000+00:00", 3, 0, 0, 500000),
    ],
)
def test_times_that_choose_a_point(point: str, hour: int, minute: int, second: int, micro: int) -> None:
    assert moment_of(point) == datetime(2026, 11, 20, hour, minute, second, micro, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "point, words",
    [
        ("2026-11-20T03:00", "no zone"),
        ("before 2026-11-20", "no zone"),
        ("before sunday", "another form"),
        ("2026-11-31T03:00Z", "day"),
        ("2026-11-20T25:00Z", "does not match|hour"),
        ("0001-01-01T00:00+12:00", "out of range"),
        ("03:00Z", "another form"),
        ("2026-11-20T03:00Z or so", "another form"),
    ],
)
def test_times_that_are_none(point: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        moment_of(point)


def test_what_is_no_time_is_a_name() -> None:
    assert [moment_of(name) for name in ("latest", "20261122T084203Z", "2026-11-20", "before")] == [None] * 4
