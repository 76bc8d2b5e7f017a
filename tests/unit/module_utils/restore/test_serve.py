# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Points are served by real qemu-nbd processes, and read by libnbd."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import nbd
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, DataPathError, InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore import serve
from ansible_collections.openvadp.backup.plugins.module_utils.restore.serve import ServeRequest, serve_point

CLUSTER = 64 << 10
CAPACITY = (2 << 20) + 3 * 512


@pytest.fixture
def disk(world: Any) -> bytes:
    data = bytearray(CAPACITY)
    world.point("p1", CAPACITY, [(0, b"a" * CLUSTER)])
    piece = random.Random(1).randbytes(CLUSTER)
    world.point("p2", CAPACITY, [(CLUSTER, piece)], parent="p1")
    data[:CLUSTER] = b"a" * CLUSTER
    data[CLUSTER : 2 * CLUSTER] = piece
    return bytes(data)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
    yield path
    shutil.rmtree(str(path))


Serve = Callable[..., Dict[str, Any]]


@pytest.fixture
def served(world: Any, short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serves points of the world's VM; nothing is served when the test ends."""
    base = short / "base"
    base.mkdir(mode=0o700)
    real = serve.private_folder
    monkeypatch.setattr(serve, "private_folder", lambda stem, what: real(stem, what, path=base))
    places = []

    def run(check_mode: bool = False, **options: Any) -> Dict[str, Any]:
        fields = {"repository": str(world.repository.path), "vm_uuid": world.store.uuid, "overlay_dir": str(short)}
        request = ServeRequest(**{**fields, **options})
        request.check()
        places.append(request)
        return serve_point(request, check_mode)

    yield run
    for request in places:
        serve_point(ServeRequest(**{**request.__dict__, "state": "absent"}), False)
    assert sorted(path.name for path in base.iterdir() if not path.name.endswith(".lock")) == ["changing"]


def read(uri: str, length: int = CAPACITY) -> bytes:
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    data = bytes(handle.pread(length, 0))
    handle.shutdown()
    return data


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_point_is_served_once_and_ended(served: Serve, short: Path, disk: bytes) -> None:
    assert served(check_mode=True)["changed"]
    first = served()
    assert first["changed"] and first["point"] == "p2" and not first["writable"]
    (one,) = first["disks"]
    assert (one["key"], one["capacity_bytes"]) == (2000, CAPACITY) and read(one["uri"]) == disk
    with pytest.raises(nbd.Error, match="read-only|EPERM|EINVAL|not permitted"):
        handle = nbd.NBD()
        handle.connect_uri(one["uri"])
        handle.pwrite(b"x" * 512, 0)
    again = served()
    assert again["changed"] is False and again["disks"] == first["disks"] and again["ends"] == first["ends"]
    assert 3500 < again["seconds_left"] <= 3600
    with pytest.raises(InputError, match="Something else is served.*point p2"):
        served(point="p1")
    # Elsewhere the other point can be served beside it.
    other = short / "sockets"
    other.mkdir()
    assert read(served(point="p1", socket_dir=str(other))["disks"][0]["uri"], CLUSTER * 2) == disk[:CLUSTER] + bytes(
        CLUSTER
    )
    assert os.stat(str(other / "disk-2000.sock")).st_mode & 0o077 == 0
    ended = served(state="absent", socket_dir=str(other))
    assert ended["changed"] and ended["point"] == "p1" and os.listdir(str(other)) == []
    assert served(state="absent", check_mode=True)["changed"] and served()["changed"] is False
    assert served(state="absent")["changed"] and served(state="absent")["changed"] is False
    with pytest.raises(nbd.Error):
        read(one["uri"])


def test_what_is_written_is_thrown_away(served: Serve, world: Any, short: Path, disk: bytes) -> None:
    layer = world.store.layer_path(2000, "p2")
    before = layer.read_bytes()
    uri = served(writable_overlay=True)["disks"][0]["uri"]
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(b"w" * 1024, 512)
    handle.flush()
    handle.shutdown()
    assert read(uri) == disk[:512] + b"w" * 1024 + disk[1536:]
    # It has no name any more: it can't outlive the server.
    assert [path.name for path in short.iterdir()] == ["base"]
    served(state="absent")
    assert read(served(writable_overlay=True)["disks"][0]["uri"]) == disk and layer.read_bytes() == before


def test_it_ends_by_itself_and_clears_up(served: Serve, short: Path, disk: bytes) -> None:
    sockets = short / "sockets"
    sockets.mkdir()
    # Long enough to become ready on a slow machine.
    uri = served(socket_dir=str(sockets), timeout=8)["disks"][0]["uri"]
    handle = nbd.NBD()
    handle.connect_uri(uri)
    wait_for(lambda: os.listdir(str(sockets)) == [])
    with pytest.raises(nbd.Error):
        handle.pread(512, 0)
    wait_for(lambda: [path for path in (short / "base").iterdir() if path.is_dir()] == [])
    assert served(state="absent", socket_dir=str(sockets))["changed"] is False


def test_a_server_that_was_killed_is_replaced(served: Serve, short: Path, disk: bytes) -> None:
    served(writable_overlay=True)
    (folder,) = [path for path in (short / "base").iterdir() if path.is_dir()]
    os.kill(int((folder / "ready-0").read_text()), signal.SIGKILL)
    wait_for(lambda: not folder.exists() or not serve.is_listening(str(folder / "disk-2000.sock")))
    result = served(writable_overlay=True)
    assert result["changed"] and read(result["disks"][0]["uri"]) == disk
    # The shell above the server: the kernel still tells that somebody serves.
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    assert served(writable_overlay=True)["changed"] is False
    assert served(state="absent")["changed"] and not folder.exists()


KILLED = """
import os, signal, sys
from ansible_collections.openvadp.backup.plugins.module_utils.restore import serve
from pathlib import Path
serve.private_folder = lambda stem, what: Path(sys.argv[3])
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
step = sys.argv[5]
if step == "started":
    serve._wait_until_ready = die
elif step == "recorded":
    serve._script = die
elif step == "made":
    serve.atomic_write = die
where = {"repository": sys.argv[1], "vm_uuid": sys.argv[2], "overlay_dir": sys.argv[4]}
serve.serve_point(serve.ServeRequest(writable_overlay=True, **where), False)
"""


@pytest.mark.parametrize("step", ["made", "recorded", "started"])
def test_a_module_that_was_killed_is_made_good_by_the_next(
    served: Serve, world: Any, short: Path, disk: bytes, step: str
) -> None:
    (short / "base").chmod(0o700)
    arguments = [str(world.repository.path), world.store.uuid, str(short / "base"), str(short), step]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    result = served(writable_overlay=True)
    assert read(result["disks"][0]["uri"]) == disk
    assert served(writable_overlay=True)["changed"] is False
    served(state="absent")
    if step != "made":  # then its folder is not known yet: empty, and nobody's
        assert [path.name for path in short.iterdir()] == ["base"]


def certificates(folder: Path) -> None:
    """A certificate authority, and what it signed for a server and a client."""
    folder.mkdir()

    def run(*argv: str) -> None:
        subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True)

    run(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca-key.pem",
        "-out",
        "ca-cert.pem",
        "-subj",
        "/CN=ca",
    )
    for name, extension in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}-key.pem", "-out", "csr", "-subj", f"/CN={name}")
        (folder / "ext").write_text(extension + "\n")
        signed = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-extfile", "ext"]
        run("x509", "-req", "-in", "csr", *signed, "-out", f"{name}-cert.pem")


def test_tcp_is_for_clients_with_a_certificate(served: Serve, short: Path, disk: bytes) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options: Dict[str, Any] = {"address": "127.0.0.1", "port": port}
    with pytest.raises(InputError, match="with TLS only"):
        served(**options)
    folder = short / "tls"
    certificates(folder)
    (short / "ca").mkdir()
    with pytest.raises(
        InputError, match="ca-cert.pem: there is no such file; server-cert.pem: there is.*server-key.pem: there is"
    ):
        served(**options, tls_certificates=str(short / "ca"))
    shutil.copy(str(folder / "ca-cert.pem"), str(short / "ca"))
    options["tls_certificates"] = str(folder)
    result = served(**options)
    uri = result["disks"][0]["uri"]
    assert uri == f"nbds://127.0.0.1:{port}"
    assert read(f"{uri}?tls-certificates={folder}") == disk
    for refused in (uri.replace("nbds", "nbd"), f"{uri}?tls-certificates={short}/ca"):
        with pytest.raises(nbd.Error):
            read(refused)
    assert served(**options)["changed"] is False
    # The port is taken: said in the server's own words, and nothing is left.
    with pytest.raises(InputError, match="Something else"):
        served(**options, writable_overlay=True)
    with pytest.raises(DataPathError, match="Address already in use"):
        served(**{**options, "address": "0.0.0.0"})
    served(state="absent", **options)


def test_what_can_not_be_served_is_refused(served: Serve, world: Any, short: Path, disk: bytes) -> None:
    refused: Dict[str, Dict[str, Any]] = {
        "holds no such disk.*2001": {"disks": [2001]},
        "no folder for the sockets": {"socket_dir": str(short / "absent")},
        "too long": {"socket_dir": str(short / ("x" * 100))},
        "timeout is out of range": {"timeout": 0},
        "not an IP address": {"address": "localhost"},
        "not an absolute path": {"socket_dir": "here"},
        "No overlay can be made": {"writable_overlay": True, "overlay_dir": str(short / "absent")},
        "not a socket": {"socket_dir": str(short / "file")},
    }
    (short / ("x" * 100)).mkdir()
    (short / "file").mkdir()
    (short / "file" / "disk-2000.sock").write_text("")
    for words, options in refused.items():
        with pytest.raises(InputError, match=words):
            served(**options)
    (short / "file" / "disk-2000.sock").unlink()
    world.store.layer_path(2000, "p1").unlink()
    with pytest.raises(DamagedError, match="p1.qcow2: the file is missing"):
        served()
