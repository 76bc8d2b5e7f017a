# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which reader reads which volume. The readers here are made up; the real ones are tried in test_guestfish.py."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DataPathError, InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files import choice
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.appliance import is_internal
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.reader import (
    Entry,
    FileReader,
    Unread,
    unread,
)
from ansible_collections.openvadp.backup.plugins.module_utils.restore.files.request import FilesRequest


def volume(name: str, kind: str, problem: Any = None, label: Any = None) -> Dict[str, Any]:
    readable = problem is None
    return {
        "name": name,
        "disk": 2000,
        "type": kind,
        "label": label,
        "uuid": None,
        "readable": readable,
        "problem": problem,
        "clean": readable,
        "warnings": [],
        "only_by_name": False,
    }


class Reader(FileReader):
    """Has a file in each volume that it can read, and another one that is skipped."""

    absent: List[str] = []
    has: List[Dict[str, Any]] = []

    @classmethod
    def missing(cls) -> List[str]:  # type: ignore[override]
        return cls.absent

    def __init__(
        self, *args: Any, skip: Any = (), on_unchecked: Callable[[], None] = lambda: None, **more: Any
    ) -> None:
        replayable = self.replayable if hasattr(self, "replayable") else []
        super().__init__(*args, **more)
        self.replayable = replayable
        self._skip = skip
        self._on_unchecked = on_unchecked

    def __enter__(self) -> FileReader:
        self._on_unchecked()
        self.volumes = [
            dict(one, reader=self.name if one["readable"] else None, reader_reason=self.reason)
            for one in self.has
            if one["name"] not in self._skip
        ]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        pass

    def walk(self, volumes: Any, patterns: Any, recurse: Any, limit: Any, on_skipped: Any) -> Iterator[Entry]:
        self.matched = {0} if self.name == "dissect" else {1}
        for number in volumes:
            assert self.volumes[number]["readable"]
            on_skipped(number, "/skipped", "why")
            yield Entry(number, f"/of-{self.volumes[number]['name']}", "file", 1, 0)

    def read(self, entry: Entry) -> Any:
        yield f"{self.name} {self.volumes[entry.volume]['name']}".encode()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The two, in the place of the real ones."""

    class Dissect(Reader):
        name = "dissect"
        has = [
            volume("2000p1", "fat", label="EFI"),
            volume("2000p2", "exfat", "not by dissect"),
            volume("2000p3", "swap", "it is swap space"),
            volume("2000p4", "ext4"),
            volume("2000p5", "unknown", "nothing begins there"),
            volume("vg/a", "btrfs", "it can't be read: no"),
        ]

    class Guestfish(Reader):
        name = "guestfish"
        started: List[Any] = []
        has = [
            volume("2000p5", "exotic", label="Odd"),
            volume("vg/a", "btrfs", "nor by Linux"),
            volume("2000p2", "exfat"),
            volume("md127", "xfs"),
        ]

        def __enter__(self) -> FileReader:
            self.started.append([one["name"] for one in Dissect.has if one["name"] not in self._skip])
            return super().__enter__()

    monkeypatch.setattr(choice, "DissectReader", Dissect)
    monkeypatch.setattr(choice, "GuestfishReader", Guestfish)
    return Dissect, Guestfish


def made(**options: Any) -> Any:
    request = FilesRequest(repository="/r", paths=("/x", "/y"), list_only=True, **options)
    checks: List[int] = []
    reader = choice.make_reader(request, [], "/run", None, lambda: checks.append(1))
    return reader, checks


def test_what_dissect_leaves_is_read_by_guestfish_under_the_same_numbers(readers: Any) -> None:
    reader, checks = made()
    assert not checks
    with reader:
        # Swap space and what nobody knows are no reason to start it.
        assert len(readers[1].started) == 1 and checks == [1]
        told = {one["name"]: (one["reader"], one["reader_reason"]) for one in reader.volumes if one["readable"]}
        assert told == {
            "2000p1": ("dissect", "dissect reads it"),
            "2000p2": ("guestfish", "dissect: not by dissect"),
            "2000p4": ("dissect", "dissect reads it"),
            # What Linux makes of several of them has a name that dissect does not know.
            "md127": ("guestfish", "dissect knows no such volume"),
        }
        assert reader.name == "dissect, guestfish"
        assert reader.volumes[5]["problem"] == "it can't be read: no; guestfish: nor by Linux"
        skipped: List[int] = []
        entries = list(
            reader.walk([0, 1, 3, 6], ["/x", "/y"], True, 9, lambda number, path, why: skipped.append(number))
        )
        assert [(entry.volume, entry.path) for entry in entries] == [
            (0, "/of-2000p1"),
            (3, "/of-2000p4"),
            (1, "/of-2000p2"),
            (6, "/of-md127"),
        ]
        assert skipped == [0, 3, 1, 6] and reader.matched == {0, 1}
        assert [list(reader.read(entry)) for entry in entries] == [
            [b"dissect 2000p1"],
            [b"dissect 2000p4"],
            [b"guestfish 2000p2"],
            [b"guestfish md127"],
        ]


@pytest.mark.parametrize(
    ("wanted", "started"),
    [
        (["2000p1", "2000p4"], []),
        (["EFI"], []),
        (["2000p5"], [["2000p5"]]),
        (["2000p1", "2000p2"], [["2000p1", "2000p2"]]),
        # Perhaps the label of one that dissect does not read.
        (["Odd"], [["2000p1", "2000p2", "2000p3", "2000p4", "2000p5", "vg/a"]]),
        (["2000p3"], []),
    ],
)
def test_only_volumes_that_are_wanted_are_a_reason(readers: Any, wanted: List[str], started: List[Any]) -> None:
    reader, checks = made(volumes=wanted)
    with reader:
        assert readers[1].started == started and len(checks) == len(started)


def test_a_log_that_linux_replays_is_a_reason(readers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume is taken over if it comes out in order, and stays where it was with a word about it otherwise."""
    first = [
        dict(volume("2000p1", "xfs"), clean=False, warnings=["its log was not empty"]),
        dict(volume("2000p2", "ext4"), clean=False, warnings=["its journal was not empty"]),
        dict(volume("2000p3", "ntfs"), clean=False, warnings=["only Windows replays that"]),
        dict(volume("2000p4", "btrfs"), clean=False, warnings=["its log was not empty"]),
    ]
    monkeypatch.setattr(readers[0], "has", first)
    monkeypatch.setattr(readers[0], "replayable", [0, 1, 3], raising=False)
    second = [volume("2000p1", "xfs"), dict(volume("2000p2", "ext4"), clean=False, warnings=["it waits for a check"])]
    monkeypatch.setattr(readers[1], "has", [*second, volume("2000p4", "btrfs", "it can't be mounted: no")])
    with made()[0] as reader:
        assert [one["reader"] for one in reader.volumes] == ["guestfish", "dissect", "dissect", "dissect"]
        assert [one["clean"] for one in reader.volumes] == [True, False, False, False]
        assert reader.volumes[0]["reader_reason"] == "dissect: its log was not empty"
        assert reader.volumes[1]["warnings"] == ["its journal was not empty", "guestfish: it waits for a check"]
        assert reader.volumes[3]["warnings"] == ["its log was not empty", "guestfish: it can't be mounted: no"]
    readers[1].started.clear()
    with made(volumes=["2000p3"])[0] as reader:
        assert readers[1].started == []
    readers[1].absent = ["libguestfs"]
    with made()[0] as reader:
        assert [one["reader"] for one in reader.volumes] == ["dissect"] * 4
        assert reader.volumes[0]["warnings"] == ["its log was not empty"]


class Tree(Reader):
    """Has these files: path -> content, an error that is told in its place, or one after some of it."""

    files: Dict[str, Any] = {}
    askable_paths: Sequence[str] = ()
    started = 0

    def __enter__(self) -> FileReader:
        type(self).started += 1
        return super().__enter__()

    def walk(self, volumes: Any, patterns: Any, recurse: Any, limit: Any, on_skipped: Any) -> Iterator[Entry]:
        self.matched = {0}
        for number in volumes:
            for path, content in self.files.items():
                if patterns[0] not in ("/**", path.replace("[", "[[]")):
                    continue
                if path in self.askable_paths:
                    self.askable.add((number, path))
                if content is None:
                    yield Entry(number, path, "directory", 0, 0)
                elif isinstance(content, str):
                    on_skipped(number, path, content)
                else:
                    size = sum(len(one) for one in content if isinstance(one, bytes))
                    yield Entry(number, path, "file", max(size, 6), 0, handle=path)

    def read(self, entry: Entry) -> Any:
        for piece in self.files[entry.handle]:
            if isinstance(piece, str):
                raise unread(entry, piece, entry.path in self.askable_paths)
            yield piece


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> Any:
    class First(Tree):
        name = "dissect"
        has = [volume("2000p1", "xfs"), volume("2000p2", "xfs")]
        files = {
            "/": None,
            "/plain": [b"plain!"],
            "/key": "it is encrypted",
            "/told": "it has too many extents",
            "/gone": "it has too many extents",
            "/dir": None,
            "/part": [b"abc", "an extent is damaged"],
            "/other": [b"abc", "an extent is damaged"],
            "/odd[1]": ["an extent is damaged"],
            "/never": [b"ab", "it is encrypted"],
        }
        askable_paths = ("/told", "/gone", "/dir", "/part", "/other", "/odd[1]")

        def walk(self, *args: Any) -> Iterator[Entry]:
            for entry in super().walk(*args):
                yield entry
                if entry.path == "/dir":
                    args[-1](entry.volume, "/dir", "the directory can't be read: damaged")

    class Second(Tree):
        name = "guestfish"
        has = [volume("2000p1", "xfs"), volume("2000p2", "xfs")]
        files = {
            "/": None,
            "/plain": [b"other!"],
            "/key": [b"cipher"],
            "/told": [b"told!!"],
            "/dir": None,
            "/dir/inside": [b"inside"],
            "/part": [b"abcdef"],
            "/other": [b"abXdef"],
            "/odd[1]": [b"oddodd"],
            "/never": [b"abcdef"],
        }

    monkeypatch.setattr(choice, "DissectReader", First)
    monkeypatch.setattr(choice, "GuestfishReader", Second)
    return First, Second


def contents(reader: Any) -> Dict[str, Any]:
    """What the files of the first volume hold, or why they can't be had."""
    found: Dict[str, Any] = {}

    def skipped(number: int, path: str, why: str) -> None:
        assert number == 0 and path not in found
        found[path] = why

    for entry in list(reader.walk([0], ["/**"], True, 99, skipped)):
        if entry.kind == "file":
            assert entry.path not in found
            try:
                found[entry.path] = b"".join(reader.read(entry))
            except Unread as error:
                found[entry.path] = str(error.reason)
    return found


def test_single_files_that_are_refused_are_read_by_guestfish(trees: Any) -> None:
    """Only those whose reason is on the list, one virtual machine for all, and the bytes of one reader or the other."""
    reader, checks = made()
    with reader:
        assert trees[1].started == 0 and checks == []
        assert contents(reader) == {
            "/plain": b"plain!",
            # guestfish would show something, but is not known to read it right.
            "/key": "it is encrypted",
            "/never": "it is encrypted",
            "/told": b"told!!",
            "/dir/inside": b"inside",
            "/part": b"abcdef",
            "/odd[1]": b"oddodd",
            "/gone": "it has too many extents; guestfish finds no such file",
            "/other": "an extent is damaged; guestfish: it does not begin with what dissect read",
        }
    assert trees[1].started == 1 and checks == [1]


def test_without_guestfish_they_stay_refused(trees: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "/plain": b"plain!",
        "/key": "it is encrypted",
        "/never": "it is encrypted",
        "/dir": "the directory can't be read: damaged; {why}",
        "/told": "it has too many extents; {why}",
        "/gone": "it has too many extents; {why}",
        "/part": "an extent is damaged; {why}",
        "/other": "an extent is damaged; {why}",
        "/odd[1]": "an extent is damaged; {why}",
    }

    def told(why: str) -> Dict[str, Any]:
        return {path: one.format(why=why) if isinstance(one, str) else one for path, one in expected.items()}

    trees[1].absent = ["libguestfs"]
    with made()[0] as reader:
        assert contents(reader) == told("guestfish may read it, but needs libguestfs")
    trees[1].absent = []
    with made(versions=True)[0] as reader:
        assert contents(reader) == told("guestfish may read it, when one point is listed")
    monkeypatch.setattr(trees[1], "has", [volume("2000p1", "xfs", "it can't be mounted")])
    with made()[0] as reader:
        assert contents(reader) == told("guestfish: it can't be mounted")
    monkeypatch.setattr(trees[1], "has", [volume("2000p1", "xfs")])

    def fail(self: Any, *args: Any) -> Any:
        raise DataPathError("The virtual machine has ended")

    monkeypatch.setattr(trees[1], "walk", fail)
    with made()[0] as reader:
        assert contents(reader) == told("guestfish can't read it: The virtual machine has ended.")


def test_a_virtual_machine_that_ends_takes_nothing_with_it(trees: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, entry: Entry) -> Any:
        yield b"a"
        raise DataPathError("The virtual machine has ended")

    monkeypatch.setattr(trees[1], "read", fail)
    with made()[0] as reader:
        found = contents(reader)
    assert found["/plain"] == b"plain!" and found["/never"] == "it is encrypted"
    assert found["/told"] == found["/dir/inside"] == "guestfish can't read it: The virtual machine has ended."
    for path in ("/part", "/other", "/odd[1]"):
        assert found[path] == "an extent is damaged; guestfish can't read it: The virtual machine has ended."


def test_one_of_them_alone(readers: Any) -> None:
    with made(reader="dissect")[0] as reader:
        assert reader.name == "dissect" and reader.volumes[0]["reader_reason"] == "reader is dissect"
        assert readers[1].started == []
    reader, checks = made(reader="guestfish")
    with reader:
        assert reader.name == "guestfish" and checks == [1]
    readers[0].absent = ["dissect.btrfs"]
    with made()[0] as reader:
        assert reader.volumes[0]["reader_reason"] == "dissect needs dissect.btrfs"
    with pytest.raises(InputError, match="dissect needs dissect.btrfs"):
        made(reader="dissect")
    with pytest.raises(InputError, match="dissect needs dissect.btrfs$|dissect needs dissect.btrfs. "):
        made(versions=True)


def test_what_lvm_makes_a_volume_of_is_not_a_volume() -> None:
    """Names as libguestfs lists them: an image of a mirror is of type ext4 there, as the mirror is."""
    logical = [b"/dev/vg/mir", b"/dev/vg/lin", b"/dev/my-vg/root"]
    for name in (b"vg-mir_rimage_0", b"vg-mir_rmeta_1", b"vg-lin-real", b"vg-pool_tdata", b"my--vg-root_rimage_0"):
        assert is_internal(b"/dev/mapper/" + name, logical)
    for device in (b"/dev/vg/mir", b"/dev/md0", b"/dev/sda1", b"/dev/mapper/ldm_vol_host-Dg0_Volume1"):
        assert not is_internal(device, logical)


def test_without_guestfish_the_volume_says_what_would_read_it(readers: Any) -> None:
    readers[1].absent = ["libguestfs"]
    with made()[0] as reader:
        assert reader.name == "dissect"
        assert reader.volumes[1]["problem"] == "not by dissect; guestfish may read it, but needs libguestfs"
        assert reader.volumes[2]["problem"] == "it is swap space"
    readers[0].absent = ["dissect.btrfs"]
    with pytest.raises(InputError, match="dissect needs dissect.btrfs; guestfish needs libguestfs"):
        made()


def test_a_guestfish_that_does_not_start_leaves_what_dissect_reads(
    readers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise DataPathError("libguestfs does not start", reason="no kernel")

    monkeypatch.setattr(readers[1], "__enter__", fail)
    with made()[0] as reader:
        assert [one["readable"] for one in reader.volumes] == [True, False, False, True, False, False]
        assert "guestfish can't read it: libguestfs does not start: no kernel" in reader.volumes[1]["problem"]
    with pytest.raises(DataPathError, match="no kernel"), made(reader="guestfish")[0]:
        pass


def test_versions_are_not_searched_by_guestfish(readers: Any) -> None:
    with made(versions=True)[0] as reader:
        assert readers[1].started == []
        assert reader.volumes[1]["problem"] == "not by dissect; guestfish may read it, when one point is listed"
    with pytest.raises(InputError, match="not searched by guestfish"):
        FilesRequest(repository="/r", paths=("/x",), list_only=True, versions=True, reader="guestfish").check()


@pytest.mark.parametrize(
    ("offset", "magic", "kind"),
    [
        (3, b"EXFAT   ", "exfat"),
        (1024, struct.pack("<I", 0xF2F52010), "f2fs"),
        (32769, b"CD001", "iso9660"),
        (32768, b"JFS1", "jfs"),
    ],
)
def test_a_file_system_that_dissect_does_not_read_is_told_by_its_name(
    c: Any, disks: Any, offset: int, magic: bytes, kind: str
) -> None:
    image: Path = disks.image(4 * c.MIB)
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(magic)
    disks.chain(image, 1)
    result = disks.restore("/", list_only=True, reader="dissect")
    assert [(one["type"], one["problem"]) for one in result["volumes"]] == [(kind, f"only libguestfs reads {kind}")]
