# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import random
import stat
import subprocess

import nbd
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError

MIB = 1 << 20
CLUSTER = image.CLUSTER_BYTES


@pytest.fixture
def folder(tmp_path):
    """A folder with a name that qemu's option parser would take apart."""
    path = tmp_path / "a,b=c d"
    path.mkdir()
    return path


def connect(uri):
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


def layer(path, run_dir, capacity, writes=(), backing=None):
    """A finished layer that holds *writes*, (offset, data) in whole clusters."""
    image.create_layer(str(path), capacity, backing=backing)
    with image.serve(str(path), run_dir=run_dir, writable=True, compress=True) as server:
        client = connect(server.uri)
        for offset, data in writes:
            client.pwrite(data, offset)
        client.flush()
        client.shutdown()
    image.shrink_to(str(path), capacity)


def test_a_layer_is_zstd_compressed_and_of_exact_size(folder, run_dir):
    path = folder / "full.qcow2"
    capacity = 3 * CLUSTER + 512
    layer(path, run_dir, capacity, [(0, b"a" * CLUSTER), (3 * CLUSTER, b"z" * 512 + bytes(CLUSTER - 512))])
    facts = image.image_info(str(path))
    assert facts["virtual-size"] == capacity
    assert facts["cluster-size"] == CLUSTER
    assert facts["format-specific"]["data"]["compression-type"] == "zstd"
    assert image.check(str(path))["compressed-clusters"] == 2
    with image.serve(str(path), run_dir=run_dir, connections=1) as server:
        client = connect(server.uri)
        assert client.is_read_only()
        data = b"a" * CLUSTER + bytes(2 * CLUSTER) + b"z" * 512
        assert client.get_size() == capacity and client.pread(capacity, 0) == data
        client.shutdown()
    assert not [name for name in os.listdir(run_dir) if name.endswith(".sock")]


def test_create_refuses_to_overwrite_and_leaves_nothing(folder):
    path = str(folder / "x")
    image.create_layer(path, MIB)
    with pytest.raises(DataPathError, match="File exists"):
        image.create_layer(path, MIB)
    with pytest.raises(DamagedError, match="missing"):
        image.create_layer(str(folder / "y"), MIB, backing="absent")
    with pytest.raises(ValueError, match="bare file name"):
        image.create_layer(str(folder / "y"), MIB, backing="../x")
    with pytest.raises(DataPathError, match="No such file"):
        image.create_layer(str(folder / "absent" / "y"), MIB)
    assert os.listdir(folder) == ["x"]


def test_without_zstd_the_message_says_what_to_install(folder, tmp_path, monkeypatch):
    tool = tmp_path / "qemu-img"
    tool.write_text("#!/bin/sh\necho \"qemu-img: $9: Invalid parameter 'zstd'\" >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataPathError, match="install qemu 5.1 or newer, built with zstd"):
        image.create_layer(str(folder / "x"), MIB)
    assert os.listdir(folder) == []


def test_shrinking_asserts_the_size(folder):
    path = str(folder / "x")
    image.create_layer(path, MIB)
    with pytest.raises(DataPathError, match="1048576 bytes instead of 2097152"):
        image.shrink_to(path, 2 * MIB)


def test_a_chain_is_followed_in_its_folder_only(folder, run_dir):
    for name, backing in (("one", None), ("two", "one"), ("three", "two")):
        layer(folder / name, run_dir, MIB, backing=backing)
    top = str(folder / "three")
    assert [os.path.basename(path) for path in image.chain_files(top)] == ["three", "two", "one"]
    assert [os.path.basename(facts["filename"]) for facts in image.image_info(top, chain=True)] == [
        "three",
        "two",
        "one",
    ]
    (folder / "one").unlink()
    with pytest.raises(DamagedError, match="layer is missing: .*/one"):
        image.convert(top, str(folder / "out"), "raw")


@pytest.mark.parametrize(
    "options,reason",
    [
        (["-b", "/etc/hostname", "-F", "qcow2"], "not in its folder"),
        (["-b", "../secret", "-F", "qcow2"], "not in its folder"),
        (["-b", "nbd://evil/x", "-F", "qcow2"], "not in its folder"),
        (["-b", 'json:{"driver":"raw","file.filename":"secret"}', "-F", "qcow2"], "not in its folder"),
        (["-b", "secret", "-F", "raw"], "does not state its backing file as qcow2"),
        (["-b", "other", "-F", "qcow2"], "circle"),
        (["-o", "data_file=secret"], "keeps its data in another file"),
    ],
)
def test_an_image_that_points_elsewhere_is_not_opened(folder, run_dir, options, reason):
    (folder / "secret").write_bytes(b"root:x:0" * 1000)
    other = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "self", "-F", "qcow2", "other", "1M"]
    subprocess.run(other, check=True, cwd=folder)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", *options, "self", "1M"]
    if "data_file" in options[-1]:
        create.remove("-u")
    subprocess.run(create, check=True, cwd=folder)
    path = str(folder / "self")
    with pytest.raises(DamagedError, match=reason):
        image.convert(path, str(folder / "out"), "raw")
    with pytest.raises(DamagedError, match=reason), image.serve(path, run_dir=run_dir):
        pass
    with pytest.raises(DamagedError, match=reason):
        image.image_info(path, chain=True)
    with pytest.raises(DamagedError, match=reason):
        image.compare(path, path)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("damage", [b"", b"QFI\xfb", b"QFI\xfb\0\0\0\3" + b"\xff" * 200, b"x" * 200])
def test_damaged_headers(folder, damage):
    (folder / "x").write_bytes(damage)
    with pytest.raises(DamagedError):
        image.chain_files(str(folder / "x"))


def test_check_finds_damage(folder, run_dir):
    path = folder / "x"
    layer(path, run_dir, MIB, [(0, random.Random(1).randbytes(CLUSTER))])
    assert image.check(str(path))["check-errors"] == 0
    with open(path, "r+b") as stream:  # the refcounts of the first clusters
        stream.seek(2 * CLUSTER)
        stream.write(bytes(16))
    with pytest.raises(DamagedError, match="corrupt|damaged"):
        image.check(str(path))


def test_compare_tells_bytes_and_sizes_apart(folder, run_dir):
    data = random.Random(1).randbytes(CLUSTER)
    a, b, longer, raw = (str(folder / name) for name in ("a", "b", "longer", "raw"))
    layer(a, run_dir, MIB, [(0, data)])
    layer(b, run_dir, MIB, [(0, data[:-1] + b"x")])
    layer(longer, run_dir, MIB + 512, [(0, data)])
    with open(raw, "wb") as stream:
        stream.write(data + bytes(MIB - CLUSTER))
    assert image.compare(a, a)
    assert not image.compare(a, b)
    assert not image.compare(a, longer)
    assert image.compare(a, raw, b_format="raw")
    with pytest.raises(DataPathError):
        image.compare(a, str(folder / "absent"), b_format="raw")


@pytest.mark.parametrize("format", image.FORMATS)
def test_convert_flattens_a_chain_into_a_whole_file(folder, run_dir, format):
    data = random.Random(1).randbytes(4 * CLUSTER)
    layer(folder / "base", run_dir, MIB, [(0, data)])
    layer(folder / "top", run_dir, MIB, [(CLUSTER, bytes(CLUSTER))], backing="base")
    dest, progress = folder / f"out.{format}", []
    dest.write_text("old")
    image.convert(str(folder / "top"), str(dest), format, part_id="r1", on_progress=lambda *done: progress.append(done))
    expected = data[:CLUSTER] + bytes(CLUSTER) + data[2 * CLUSTER :] + bytes(MIB - 4 * CLUSTER)
    (folder / "expected").write_bytes(expected)
    assert image.compare(str(folder / "expected"), str(dest), a_format="raw", b_format=format)
    assert progress[-1] == (MIB, MIB)
    assert sorted(os.listdir(folder)) == ["base", "expected", f"out.{format}", "top"]


def add_unknown_feature(path):
    """Set an incompatible feature's bit that no qemu knows."""
    with open(path, "r+b") as stream:
        stream.seek(72)
        stream.write(b"\x80")


def test_a_failed_convert_leaves_the_old_file_and_no_part(folder, run_dir):
    layer(folder / "x", run_dir, MIB)
    add_unknown_feature(folder / "x")
    (folder / "out").write_text("old")
    with pytest.raises(DataPathError, match="could not be written"):
        image.convert(str(folder / "x"), str(folder / "out"), "raw")
    with pytest.raises(DataPathError, match="could not be written"):
        image.convert(str(folder / "x"), str(folder / "absent" / "out"), "raw")
    assert (folder / "out").read_text() == "old"
    assert sorted(os.listdir(folder)) == ["out", "x"]


def test_a_writable_image_is_locked_against_others(folder, run_dir):
    path = str(folder / "x")
    image.create_layer(path, MIB)
    with image.serve(path, run_dir=run_dir, writable=True), pytest.raises(DataPathError, match="lock"):
        image.image_info(path)
    image.image_info(path)


def test_what_can_not_be_served_is_reported(folder, run_dir):
    path = folder / "x"
    layer(path, run_dir, MIB)
    add_unknown_feature(path)
    with pytest.raises(DataPathError, match="ended before it could serve: qemu-nbd of x: .*feature"), image.serve(
        str(path), run_dir=run_dir
    ):
        pass


def test_a_writer_that_was_killed_is_an_error(folder, run_dir):
    path = str(folder / "x")
    image.create_layer(path, MIB)
    with pytest.raises(DataPathError, match="not closed properly"), image.serve(
        path, run_dir=run_dir, writable=True
    ) as server:
        os.kill(server.pid, 9)
        server._process.wait()
    # an error of the body is not hidden
    with pytest.raises(KeyError), image.serve(path, run_dir=run_dir, writable=True) as server:
        os.kill(server.pid, 9)
        raise KeyError


def test_atomic_write(folder):
    path = folder / "x"
    image.atomic_write(str(path), "ü", mode=0o600)
    assert path.read_bytes() == "ü".encode() and stat.S_IMODE(path.stat().st_mode) == 0o600
    image.atomic_write(str(path), b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == 0o644
    os.mkdir(folder / "d")
    with pytest.raises(OSError):
        image.atomic_write(str(folder / "d"), b"")
    assert sorted(os.listdir(folder)) == ["d", "x"]


def test_a_layer_that_qemu_img_has_removed_itself_hides_no_reason(folder, monkeypatch):
    """As it does where the disk is full."""

    def full(argv, **_options):
        os.unlink(argv[-2])
        raise DataPathError("A layer can't be made", reason="No space left on device")

    monkeypatch.setattr(image, "run_tool", full)
    with pytest.raises(DataPathError, match="No space left"):
        image.create_layer(str(folder / "x"), 1 << 20)
