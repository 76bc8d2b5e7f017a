# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every way back but the new machine, from a full, an incremental and a differential point of one chain.

All bytes are compared with what the simulator read from the snapshots; qemu-img and libnbd read them here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple
from xml.etree import ElementTree

import nbd
import pytest
from harness import MIB, Simulator, file_sha256, made_repository
from modules import Modules

BOTH = (2000, 2001)
POINTS = ("full", "incremental", "differential")
OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"


@pytest.fixture(scope="module")
def ways(simulator: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Modules:
    """One chain of three points of app01, for all tests of this file."""
    repository = tmp_path_factory.mktemp("ways") / "repository"
    made_repository(repository)
    modules = Modules(simulator, repository)
    modules.track_changes()
    for key in BOTH:
        simulator.write("app01", key, 0, seed=key, length=2 * MIB)
    made: List[Tuple[str, str]] = []
    for number, mode in enumerate(POINTS):
        disks = modules.point(mode, mode=mode)
        made += [(mode, disk["mode"]) for disk in disks.values()]
        for key in BOTH:
            # Over data, and where nothing was; zeros over data.
            simulator.write("app01", key, number * MIB + 512, (5 + number) * MIB, seed=10 + number, length=100000)
            simulator.control.call("guest_discard", vm="app01", disk=key, offset=number * 65536, length=65536)
        # Times of points have seconds.
        created = modules.backups.manifest("app01", mode)["snapshot"]["created"]
        until(lambda before=created: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) > before)
    assert all(wanted == got for wanted, got in made), made
    return modules


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def source(ways: Modules) -> Dict[str, Any]:
    return {"repository": str(ways.repository), "vm_name": "app01"}


def flat(image: Path, kind: str) -> Tuple[int, str]:
    """(size, SHA-256) of what an image holds, by qemu-img."""
    raw = image.with_name("flat")
    subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", str(image), str(raw)], check=True)
    try:
        return file_sha256(raw)
    finally:
        raw.unlink()


@pytest.mark.parametrize("point", POINTS)
def test_images_of_each_format(ways: Modules, tmp_path: Path, point: str) -> None:
    for number, formats in enumerate((("raw", "qcow2"), ("vmdk", "vmdk_stream"))):
        dest = tmp_path / str(number)
        dest.mkdir()
        disks = [{"key": key, "format": name} for key, name in zip(BOTH, formats)]
        result = ways.done("vadp_disk_restore", **source(ways), point=point, dest=str(dest), disks=disks)
        for entry in result["restored"]:
            path, kind = Path(entry["target"]), entry["format"]
            assert entry["verified"] is True and flat(path, kind.split("_")[0]) == ways.held[point][entry["key"]]
            if kind.startswith("vmdk"):
                stream = b'createType="streamOptimized"' in path.read_bytes()[:65536]
                assert stream is (kind == "vmdk_stream")


@pytest.mark.parametrize("point", POINTS)
def test_an_ova_is_what_others_expect(ways: Modules, tmp_path: Path, point: str) -> None:
    options = {**source(ways), "point": point, "dest": str(tmp_path), "format": "ova"}
    assert ways.run("vadp_disk_restore", **options, _ansible_check_mode=True)["changed"] and not os.listdir(tmp_path)
    (path,) = {Path(entry["target"]) for entry in ways.done("vadp_disk_restore", **options)["restored"]}
    assert os.listdir(tmp_path) == ["app01.ova"]
    out = tmp_path / "out"
    out.mkdir()
    with tarfile.open(str(path)) as archive:
        names = archive.getnames()
        for member in archive:
            data = archive.extractfile(member)
            assert data is not None
            (out / member.name).write_bytes(data.read())
    # The descriptor first, then the sums, then the files in the order of the descriptor's references.
    envelope = ElementTree.parse(str(out / "app01.ovf")).getroot()
    files = {str(file.get(OVF + "href")): int(str(file.get(OVF + "size"))) for file in envelope.iter(OVF + "File")}
    assert names == ["app01.ovf", "app01.mf", *files]
    assert files == {name: (out / name).stat().st_size for name in files}
    sums = [f"SHA256({name})= {file_sha256(out / name)[1]}" for name in names if name != "app01.mf"]
    assert (out / "app01.mf").read_text().splitlines() == sums
    capacities = [int(str(disk.get(OVF + "capacity"))) for disk in envelope.iter(OVF + "Disk")]
    assert capacities == [ways.held[point][key][0] for key in BOTH]
    for key in BOTH:
        assert flat(out / f"app01-disk-{key}.vmdk", "vmdk") == ways.held[point][key]
    assert ways.done("vadp_disk_restore", **options)["changed"] is False


@pytest.mark.parametrize("point", POINTS)
def test_another_machines_disks_and_san_says_why_not(ways: Modules, point: str) -> None:
    call = ways.simulator.control.call
    call("power", vm="restore01", state="poweredOff")
    for key in BOTH:
        ways.simulator.write("restore01", key, 0, 9 * MIB, seed=77, length=MIB)
    options = ways.export_options(name="restore01", transports=["hotadd", "san", "nbdssl"])
    disks = [{"key": key, "target_key": key} for key in BOTH]
    restore = {"vm_name": "app01", "point": point, "target": "in_place", "overwrite": True, "disks": disks}
    result = ways.done("vadp_disk_restore", **options, **restore)
    assert {key: ways.simulator.disk("restore01", key) for key in BOTH} == ways.held[point]
    for entry in result["restored"]:
        hotadd, san = entry["transport_reasons"]
        assert entry["transport"] == "nbdssl" and hotadd.startswith("hotadd: ") and san.startswith("san: "), entry
        assert "restores go over the LAN" in san, san


def test_the_playbook_takes_a_time(ways: Modules, tmp_path: Path) -> None:
    created = {point: ways.backups.manifest("app01", point)["snapshot"]["created"] for point in POINTS}
    variables = {"repository": str(ways.repository), "vm": "app01", "dest": str(tmp_path)}
    wanted = {created["incremental"]: "full", "before " + created["differential"]: "incremental"}
    for number, (moment, point) in enumerate(wanted.items()):
        dest = tmp_path / str(number)
        dest.mkdir()
        outcome = ways.backups.ansible.run(
            "openvadp.backup.restore", variables={**variables, "point": moment, "dest": str(dest)}
        )
        result = outcome.ok().result("vadp_disk_restore")
        assert result["point"] == point
        held = {entry["key"]: file_sha256(Path(entry["target"])) for entry in result["restored"]}
        assert held == ways.held[point]
    too_old = ways.run("vadp_disk_restore", **source(ways), dest=str(tmp_path), point="before " + created["full"])
    assert too_old["failed"] and "no restore point that old" in too_old["msg"]
    later = ways.run("restore_point_serve", **source(ways), point="2999-01-01T00:00Z", _ansible_check_mode=True)
    assert later["point"] == "differential" and later["changed"]


class Served:
    """restore_point_serve on app01's points, and what an NBD client reads there."""

    def __init__(self, ways: Modules, folder: Path) -> None:
        self.ways = ways
        self.folder = folder
        self.options = {**source(ways), "overlay_dir": str(folder)}

    def run(self, **options: Any) -> Dict[str, Any]:
        return self.ways.run("restore_point_serve", **{**self.options, **options})

    def done(self, **options: Any) -> Dict[str, Any]:
        result = self.run(**options)
        assert not result["failed"], result
        return result

    def holds(self, result: Dict[str, Any], suffix: str = "") -> None:
        """Each disk that is served has the bytes of the point."""
        for disk in result["disks"]:
            with client(disk["uri"] + suffix) as handle:
                size = handle.get_size()
                digest = hashlib.sha256()
                for offset in range(0, size, MIB):
                    digest.update(handle.pread(min(MIB, size - offset), offset))
            assert (size, digest.hexdigest()) == self.ways.held[result["point"]][disk["key"]]

    def processes(self) -> List[int]:
        """The servers of this repository."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = path.read_bytes()
                if b"qemu-nbd" in command and os.fsencode(self.ways.repository) in command:
                    found.append(int(path.parent.name))
        return found

    def nothing_left(self) -> None:
        until(lambda: not self.processes())
        assert not [path for path in self.folder.rglob("*") if "tls" not in path.parts and not path.is_dir()]
        assert not list(self.folder.glob("openvadp-serve-*"))


@contextlib.contextmanager
def client(uri: str) -> Iterator[Any]:
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


@pytest.fixture
def served(ways: Modules) -> Iterator[Served]:
    # Paths of sockets are short.
    folder = Path(tempfile.mkdtemp(prefix="ways-", dir="/tmp"))
    serving = Served(ways, folder)
    yield serving
    serving.done(state="absent")
    for pid in serving.processes():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(str(folder))


def test_a_point_is_served_on_a_unix_socket(served: Served) -> None:
    assert served.done(_ansible_check_mode=True)["changed"] and not served.processes()
    for point in POINTS:
        result = served.done(point=point)
        assert result["changed"] and not result["writable"]
        served.holds(result)
        if point == POINTS[-1]:
            again = served.done(point=point)
            assert again["changed"] is False and again["disks"] == result["disks"]
            with client(result["disks"][0]["uri"]) as handle, pytest.raises(nbd.Error):
                handle.pwrite(b"x" * 512, 0)
        else:
            assert served.done(state="absent")["changed"]
    assert served.done(state="absent", _ansible_check_mode=True)["changed"] and served.processes()
    assert served.done(state="absent")["changed"] and served.done(state="absent")["changed"] is False
    served.nothing_left()


def test_what_clients_write_is_thrown_away_and_a_kill_is_made_good(served: Served) -> None:
    before = served.ways.tree()
    result = served.done(writable_overlay=True)
    for disk in result["disks"]:
        with client(disk["uri"]) as handle:
            handle.pwrite(b"w" * 4096, MIB)
            handle.flush()
        with client(disk["uri"]) as handle:
            assert handle.pread(4096, MIB) == b"w" * 4096
    # kill -9 to the servers and the shell above them, which can clear up nothing.
    place = Path(str(result["disks"][0]["uri"]).partition("socket=")[2]).parent
    os.killpg(int((place / "pid").read_text()), signal.SIGKILL)
    until(lambda: not served.processes())
    assert place.exists()
    anew = served.done(writable_overlay=True)
    assert anew["changed"] and len(served.processes()) >= len(BOTH)
    served.holds(anew)
    assert served.done(state="absent")["changed"] and not place.exists()
    served.nothing_left()
    assert served.ways.tree() == before
    served.ways.verify_bytes("differential")


def test_the_time_limit_ends_it(served: Served) -> None:
    sockets = served.folder / "sockets"
    sockets.mkdir()
    # Long enough to become ready on a slow machine.
    result = served.done(socket_dir=str(sockets), writable_overlay=True, timeout=8)
    with client(result["disks"][0]["uri"]) as handle:
        handle.pwrite(b"w" * 512, 0)
        until(lambda: not served.processes() and not os.listdir(sockets))
        with pytest.raises(nbd.Error):
            handle.pread(512, 0)
    served.nothing_left()
    assert served.done(state="absent", socket_dir=str(sockets))["changed"] is False


def test_tcp_is_for_clients_with_a_certificate(served: Served) -> None:
    tls = served.folder / "tls"
    certificates(tls)
    stranger = served.folder / "stranger" / "tls"
    stranger.mkdir(parents=True)
    shutil.copy(str(tls / "ca-cert.pem"), str(stranger))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"address": "127.0.0.1", "port": port, "disks": [2001], "point": "incremental"}
    plain = served.run(**options)
    assert plain["failed"] and "with TLS only" in plain["msg"]
    options["tls_certificates"] = str(tls)
    result = served.done(**options)
    try:
        (disk,) = result["disks"]
        served.holds(result, suffix=f"?tls-certificates={tls}")
        for refused in (disk["uri"].replace("nbds", "nbd"), f"{disk['uri']}?tls-certificates={stranger}"):
            with pytest.raises(nbd.Error), client(refused) as handle:
                handle.pread(512, 0)
        assert served.done(**options)["changed"] is False
    finally:
        assert served.done(state="absent", **options)["changed"]
    served.nothing_left()


def certificates(folder: Path) -> None:
    """A certificate authority, and what it signed for a server and a client."""
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=ca")
    for name, extension in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        openssl("req", *key, "-keyout", f"{name}-key.pem", "-out", "csr", "-subj", f"/CN={name}")
        (folder / "ext").write_text(extension + "\n")
        signed = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "ext"]
        openssl("x509", "-req", "-in", "csr", *signed, "-out", f"{name}-cert.pem")


def test_only_what_changed_comes_back(ways: Modules) -> None:
    """From the full and the incremental point; the differential one is in test_changed_only.py. It leaves app01 off."""
    ways.simulator.control.call("power", vm="app01", state="poweredOff")
    options = {
        **ways.export_options(),
        "vm_name": "app01",
        "target": "in_place",
        "overwrite": True,
        "changed_only": True,
    }
    for key, point in zip(BOTH, ("full", "incremental")):
        (entry,) = ways.done("vadp_disk_restore", **options, point=point, disks=[{"key": key}])["restored"]
        size, _digest = ways.held[point][key]
        assert entry["verified"]
        if key == BOTH[0]:
            assert entry["changed_only"] and 0 < entry["bytes_written"] < size // 4, entry
        else:
            # The first restore has started the tracking of the whole machine anew.
            assert not entry["changed_only"] and entry["bytes_written"] == size, entry
        assert ways.simulator.disk("app01", key) == ways.held[point][key]
    ways.clean()
