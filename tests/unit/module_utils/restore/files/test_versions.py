# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""When did this file change, and which points hold which version."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, InputError, RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import versions
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.request import FilesRequest
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.run import Source
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.versions import list_versions


class Guest:
    """A guest whose files change from point to point."""

    def __init__(self, c: Any, disks: Any, tree: Path) -> None:
        self.c, self.disks, self.tree = c, disks, tree
        self.last = b""
        self.points: List[str] = []

    def put(self, name: str, content: str, mtime: int) -> None:
        (self.tree / "etc" / name).write_text(content)
        os.utime(self.tree / "etc" / name, (mtime, mtime))

    def point(self, name: str) -> None:
        image = self.disks.image(8 * self.c.MIB)
        self.c.tool("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-U", "clear", "-d", self.tree, image)
        content = image.read_bytes()
        if self.points:
            self.disks.follow(name, self.points[-1], self.last, content)
        else:
            self.disks.chain(image, 1, names=[name])
        self.last = content
        self.points.append(name)

    def unchanged(self, name: str) -> None:
        """A point for which nothing was read."""
        world = self.disks.world
        with world.store.lock("20261122T084203Z-abcd", "test"):
            disk = world.layer(name, len(self.last), [], parent=self.points[-1])
            world.commit(name, dict(disk, areas=0, bytes_read=0))
        self.points.append(name)

    def versions(self, *paths: str, **options: Any) -> Dict[str, Any]:
        return list_versions(self.disks.request(*paths, list_only=True, versions=True, **options))


@pytest.fixture
def guest(c: Any, disks: Any, tree: Path) -> Guest:
    for name in ("big", "sparse"):
        (tree / name).unlink()
    return Guest(c, disks, tree)


def told(result: Dict[str, Any], path: str) -> List[Tuple[Any, ...]]:
    return [
        (file["size"], file["points"], file["absent_from"], file["unknown_in"])
        for file in result["files"]
        if file["path"] == path
    ]


def test_versions_and_where_they_are(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.put("fstab", "one", 1000)
    guest.point("p1")
    guest.unchanged("p2")
    guest.put("fstab", "other", 2000)
    guest.put("new", "new", 2000)
    guest.point("p3")
    guest.put("fstab", "one", 1000)
    (guest.tree / "etc" / "new").unlink()
    guest.point("p4")
    looked = []
    real = versions._look
    monkeypatch.setattr(versions, "_look", lambda *args: looked.append(args[1].manifest["point"]) or real(*args))
    result = guest.versions("/etc/fstab", "/etc/n*", "/nothing")
    # What a point without any change holds is known.
    assert looked == ["p1", "p3", "p4"]
    assert told(result, "/etc/fstab") == [(3, ["p1", "p2", "p4"], [], []), (5, ["p3"], [], [])]
    assert told(result, "/etc/new") == [(3, ["p3"], ["p1", "p2", "p4"], [])]
    assert (result["files"][0]["first_point"], result["files"][0]["last_point"]) == ("p1", "p4")
    assert result["files"][0]["mtime"] == "1970-01-01T00:16:40Z"
    assert [point["problem"] for point in result["points"]] == [None] * 4
    assert (result["point"], result["changed"], result["warnings"]) == ("p4", False, [])
    with pytest.raises(DataPathError, match="Too many files"):
        guest.versions("/**", limit=2)


def test_the_time_is_that_of_all_points_together(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.put("fstab", "one", 1000)
    guest.point("p1")
    guest.put("fstab", "two", 2000)
    guest.point("p2")
    clock = itertools.count(0, 30)
    looked = []

    def late(_request: FilesRequest, source: Source, _deadline: float) -> Any:
        looked.append(source.manifest["point"])
        raise DataPathError("The files were not read in time")

    monkeypatch.setattr(versions, "_look", late)
    monkeypatch.setattr(versions, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(DataPathError, match="were not read in time"):
        guest.versions("/etc/fstab", timeout=20)
    assert looked == ["p1"]


def test_a_change_that_only_the_content_shows(guest: Guest) -> None:
    guest.put("fstab", "one", 1000)
    guest.point("p1")
    guest.put("fstab", "two", 1000)
    guest.point("p2")
    assert told(guest.versions("/etc/fstab"), "/etc/fstab") == [(3, ["p1", "p2"], [], [])]
    result = guest.versions("/etc/fstab", checksums=True)
    assert told(result, "/etc/fstab") == [(3, ["p1"], [], []), (3, ["p2"], [], [])]
    assert len({file["sha256"] for file in result["files"]}) == 2


def test_points_that_can_not_be_searched(guest: Guest) -> None:
    guest.put("fstab", "one", 1000)
    guest.point("p1")
    guest.put("fstab", "longer", 2000)
    guest.point("p2")
    store = guest.disks.world.store
    store.manifest_path("p2").write_text("{")
    result = guest.versions("/etc/fstab")
    assert told(result, "/etc/fstab") == [(3, ["p1"], [], ["p2"])]
    assert [(point["point"], point["problem"] is None) for point in result["points"]] == [("p2", False), ("p1", True)]
    assert "Point p2 was not searched" in result["warnings"][0]
    with pytest.raises(InputError, match="no such volume"):
        guest.versions("/etc/fstab", volumes=["other"])
    store.layer_path(2000, "p1").unlink()
    with pytest.raises(RepositoryError, match="The restore point is damaged"):
        guest.versions("/etc/fstab")


def test_what_is_skipped_is_not_absent(guest: Guest) -> None:
    guest.put("fstab", "one", 1000)
    guest.point("p1")
    look = versions._Look(searched={"2000"}, skipped={("2000", "/etc"), ("2000", "/srv/x")})
    assert [look.knows(("2000", path)) for path in ("/etc", "/etc/fstab", "/etcetera", "/srv", "/srv/x/y")] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert not look.knows(("2001", "/home"))
    with pytest.raises(InputError, match="can only be listed"):
        guest.disks.request("/etc/fstab", versions=True).check()


def test_a_virtual_machine_without_points(guest: Guest) -> None:
    with pytest.raises(RepositoryError):
        guest.versions("/etc/fstab")
