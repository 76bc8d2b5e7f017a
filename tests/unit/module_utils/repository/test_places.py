# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A place is the folder of a file system, by whatever path it is seen; what has none is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Iterator, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.repository import places
from ansible_collections.openvadp.backup.plugins.module_utils.repository.places import Place, UnknownPlace, place_of

Mounts = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounts]:
    """Mount something below the test's folder until its end."""
    with ExitStack() as stack:

        def mount(source: object, name: str, *arguments: str) -> Path:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            done = subprocess.run(["mount", *arguments, str(source), str(folder)], check=False, capture_output=True)
            if done.returncode != 0:
                pytest.skip(f"this machine does not let us mount: {done.stderr.decode()[:200]}")
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False, capture_output=True)
            return folder

        yield mount


def image(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.img"
    with path.open("wb") as file:
        file.truncate(320 << 20)
    try:
        done = subprocess.run([f"mkfs.{kind}", str(path)], check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"mkfs.{kind} is not installed")
    assert done.returncode == 0, done.stderr
    return path


def test_a_place_stays_the_same_by_bind_mounts_and_links(tmp_path: Path, mounted: Mounts) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    place = place_of(str(tmp_path / "real" / "below"))
    bound = mounted(tmp_path / "real", "bound", "--bind")
    assert place_of(str(bound / "below")) == place
    (tmp_path / "link").symlink_to(bound)
    assert place_of(str(tmp_path / "link" / "below")) == place
    assert place_of(str(tmp_path / "real")) != place
    assert {str(bound / "below"), str(tmp_path / "real" / "below")} == set(places.seen_here(place))
    # A folder is no place once it is moved.
    (tmp_path / "real" / "below").rename(tmp_path / "real" / "moved")
    assert not place_of(str(bound / "moved")).is_same(place)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "vfat"])
def test_a_local_file_system_is_known_by_its_uuid(kind: str, tmp_path: Path, mounted: Mounts) -> None:
    path = image(tmp_path, kind)
    told = subprocess.run(["blkid", "-p", "-o", "value", "-s", "UUID", str(path)], check=True, capture_output=True)
    wanted = told.stdout.decode().strip().lower()
    folder = mounted(path, "one", "-o", "loop")
    (folder / "repository").mkdir()
    place = place_of(str(folder / "repository"))
    assert (place.kind, place.path) == ("local", "/repository")
    assert place.identity.split("/")[0] == wanted
    # Over a restart of the machine, or on another one: mounted again, elsewhere.
    subprocess.run(["umount", str(folder)], check=True)
    again = mounted(path, "two", "-o", "loop")
    assert place_of(str(again / "repository")) == place
    mounted("tmpfs", "one", "-t", "tmpfs")
    # What lies below is no part of it.
    with pytest.raises(UnknownPlace, match="on tmpfs"):
        place_of(str(folder))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_each_way_to_the_uuid_tells_the_same(
    kind: str, tmp_path: Path, mounted: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 6.9 do not know the general request; which one runs must not make another place of it."""
    folder = mounted(image(tmp_path, kind), "one", "-o", "loop")
    place = place_of(str(folder))
    monkeypatch.setattr(places, "_FS_IOC_GETFSUUID", 0)
    assert place_of(str(folder)) == place
    if kind != "btrfs":
        monkeypatch.setattr(places, "_uuid_by_ioctl", lambda mount, descriptor: None)
        assert place_of(str(folder)) == place  # by blkid: root may read the device


def test_the_number_of_ext4_stands_for_its_uuid(
    tmp_path: Path, mounted: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container of an older kernel nothing but statfs tells."""
    folder = mounted(image(tmp_path, "ext4"), "one", "-o", "loop")
    place = place_of(str(folder))
    for name in ("_uuid_by_ioctl", "_uuid_by_udev", "_uuid_by_blkid"):
        monkeypatch.setattr(places, name, lambda *arguments: None)
    number = place_of(str(folder))
    assert number.identity.startswith("fsid-") and number.is_same(place) and place.is_same(number)
    other = Place("local", str(uuid.uuid4()), place.path)
    assert not number.is_same(other) and not other.is_same(number)
    assert not Place("local", "fsid-x", "/").is_same(Place("local", "fsid-y", "/"))


def test_a_snapshot_of_btrfs_is_another_place(tmp_path: Path, mounted: Mounts) -> None:
    """Also where it takes the name of what it was made of."""
    folder = mounted(image(tmp_path, "btrfs"), "one", "-o", "loop")
    subprocess.run(["btrfs", "-q", "subvolume", "create", str(folder / "backup")], check=True)
    place = place_of(str(folder / "backup"))
    subprocess.run(["btrfs", "-q", "subvolume", "snapshot", folder / "backup", folder / "kept"], check=True)
    assert not place_of(str(folder / "kept")).is_same(place)
    (folder / "backup").rename(folder / "old")
    (folder / "kept").rename(folder / "backup")
    rolled_back = place_of(str(folder / "backup"))
    assert rolled_back.path == place.path and not rolled_back.is_same(place)


OVERLAY = "lowerdir={0}/l,upperdir={0}/u,workdir={0}/w"


@pytest.mark.parametrize("kind, options", [("tmpfs", ""), ("overlay", OVERLAY)])
def test_what_keeps_nothing_is_no_place(kind: str, options: str, tmp_path: Path, mounted: Mounts) -> None:
    base = mounted("tmpfs", "base", "-t", "tmpfs")
    for name in "luw":
        (base / name).mkdir()
    folder = mounted(kind, kind, "-t", kind, *(["-o", options.format(base)] if options else []))
    with pytest.raises(UnknownPlace, match=f"it is on {kind}"):
        place_of(str(folder))
    with pytest.raises(UnknownPlace, match="proc is not known to have an identity"):
        place_of("/proc/self")


LINES = r"""
29 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
40 29 0:50 / /backup rw,relatime shared:5 - nfs4 NAS01.example.com:/export/vms rw,vers=4.2,local_lock=none
41 29 0:50 /proxy\0401 /bound rw,relatime - nfs4 NAS01.example.com:/export/vms rw,vers=4.2,local_lock=none
42 29 0:51 / /old rw - nfs [2001:db8::1]:/export/ rw,vers=3,nolock,local_lock=all
43 29 0:52 / /smb rw - cifs //Server/Backup rw,vers=3.1.1,nobrl
44 29 0:53 / /flock rw - nfs nas:/e rw,vers=3,local_lock=flock
45 29 0:54 / /gfs rw - gfs2 /dev/vg/backup rw,lockproto=lock_nolock
46 29 0:55 / /sshfs rw - fuse.sshfs Me@Host:/srv rw
47 29 0:56 / /whole rw - nfs4 nas:/ rw,local_lock=none
"""


def test_mounts_are_read_as_the_kernel_writes_them() -> None:
    found = {mount.point: mount for mount in places.mounts(LINES)}
    assert found["/bound"].root == "/proxy 1"
    shares = {point: places._share(found[point].source) for point in ("/backup", "/old", "/smb", "/sshfs", "/whole")}
    assert shares == {
        "/backup": "nas01.example.com:/export/vms",
        "/old": "[2001:db8::1]:/export",
        "/smb": "//server/Backup",
        "/sshfs": "me@host:/srv",
        "/whole": "nas:/",
    }
    assert places._path_inside(found["/bound"], "/bound/vms/a", "") == "/proxy 1/vms/a"
    assert places._path_inside(found["/backup"], "/backup", "") == "/"
    with pytest.raises(UnknownPlace, match="not above it"):
        places._path_inside(found["/bound"], "/backup/x", "")


@pytest.mark.parametrize(
    "point, words",
    [
        ("/", None),
        ("/backup", None),
        ("/old", "local_lock=all"),
        ("/smb", "nobrl"),
        ("/flock", "local_lock=flock"),
        ("/gfs", "lock_nolock"),
        ("/sshfs", "no locks of other machines"),
    ],
)
def test_mounts_that_keep_locks_to_this_machine_are_known(point: str, words: Optional[str]) -> None:
    mount = next(mount for mount in places.mounts(LINES) if mount.point == point)
    assert (mount.local_locks is None) == (words is None) and (words or "") in (mount.local_locks or "")


def test_machines_are_compared_by_what_both_notes_know() -> None:
    assert places.is_other_machine("dmi:a id:b", "dmi:a id:c") is False  # rebuilt on the same hardware
    assert places.is_other_machine("dmi:a id:b", "dmi:c id:b") is True  # a clone that kept its machine ID
    assert places.is_other_machine("dmi:a id:b", "id:b") is False  # a user who can't read the DMI
    assert places.is_other_machine("id:a", "id:b") is True
    for one, other in (("", ""), ("dmi:a", "id:b"), ("", "id:b")):
        assert places.is_other_machine(one, other) is None
    assert places.is_other_machine(places.this_machine(), places.this_machine()) in (False, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="drops from root to an ordinary user")
def test_an_ordinary_user_sees_the_same_place() -> None:
    # Not in the folder of tests, which other runs of them close to others.
    folder = tempfile.mkdtemp(dir="/var/tmp")
    try:
        os.chmod(folder, 0o755)
        place = place_of(folder)
        program = (
            "import os, sys\n"
            "from ansible_collections.openvadp.backup.plugins.module_utils.repository.places import Place, place_of\n"
            "os.setgroups([]); os.setuid(65534)\n"
            "print(place_of(sys.argv[1]).is_same(Place(*sys.argv[2:])))\n"
        )
        command = [sys.executable, "-c", program, folder, place.kind, place.identity, place.path]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "True"
    finally:
        os.rmdir(folder)
