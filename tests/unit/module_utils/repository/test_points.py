# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import (
    DamagedError,
    InputError,
    RepositoryError,
)
from ansible_collections.openvadp.backup.plugins.module_utils.repository.names import (
    check_point_name,
)

from .conftest import World

MIB = 1 << 20


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\n", "a\0", "-a", "x" * 129, "x" * 300, "ä", "a b", "latest", "a.part-b"],
)
def test_point_names_that_may_not_be(name: str, world: World) -> None:
    for use in (check_point_name, world.store.point, world.store.config_path):
        with pytest.raises(InputError):
            use(name)


def test_points_are_ordered_by_their_snapshots(world: World) -> None:
    first = world.point("zulu", MIB, [(0, b"a" * 65536)])
    second = world.point("alpha", MIB, [(65536, b"b" * 65536)], parent="zulu")
    assert [manifest["point"] for manifest in world.store.points()] == ["zulu", "alpha"]
    assert world.store.resolve("latest") == second
    assert world.store.point("zulu") == first and world.store.point("mike") is None
    with pytest.raises(RepositoryError, match="no such restore point.*mike.*alpha, zulu"):
        world.store.resolve("mike")
    assert (os.stat(str(world.store.nvram_path("zulu"))).st_mode & 0o777) == 0o600
    # A damaged manifest might be the latest one: then nobody can tell which is.
    world.store.manifest_path("alpha").write_text("{}")
    assert [manifest["point"] for manifest in world.store.points()] == ["zulu"]
    assert list(world.store.read_points()[1]) == ["alpha"]
    with pytest.raises(DamagedError, match="newest that can be read is zulu"):
        world.store.resolve("latest")


def test_a_time_means_the_newest_point_before_it(world: World) -> None:
    zulu = world.point("zulu", MIB, [(0, b"a" * 65536)])
    alpha = world.point("alpha", MIB, [(65536, b"b" * 65536)], parent="zulu")
    assert (zulu["snapshot"]["created"], alpha["snapshot"]["created"]) == (
        "2026-11-22T08:43:03Z",
        "2026-11-22T08:44:03Z",
    )
    assert world.store.resolve("2030-01-01T00:00Z") == alpha
    assert world.store.resolve("2026-11-22T08:44:04Z") == alpha
    # Strictly before: at that very moment the point is not there yet.
    assert world.store.resolve("before 2026-11-22T08:44:03Z") == zulu
    assert world.store.resolve("2026-11-22T09:44:03+01:00") == zulu
    assert world.store.resolve("2026-11-22T08:43:03.5Z") == zulu
    with pytest.raises(RepositoryError, match="no restore point that old.*the oldest is zulu, of 2026-11-22T08:43:03Z"):
        world.store.resolve("2026-11-22T08:43:03Z")
    # What is damaged might be the one that is meant.
    world.store.manifest_path("alpha").write_text("{}")
    with pytest.raises(DamagedError, match="can't be determined before 2026-11-22T08:44:03Z.*can be read is zulu"):
        world.store.resolve("2026-11-22T08:44:03Z")
