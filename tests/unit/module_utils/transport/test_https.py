# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What transport https decides without a server; tests/e2e/test_https.py has the rest."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import image
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import TransportError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import https
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import Disk
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection
from pyVmomi import vim

CAPACITY = 200 * 1024
SHA1 = ":".join(["AB"] * 20)


def _disk(kind: str = "pvscsi", bus: int = 0, unit: Optional[int] = 1, key: int = 2001) -> Disk:
    controller: Dict[str, Any] = {"type": kind, "key": 1000, "bus": bus}
    return Disk(key, "Hard disk 2", "[vmfs01] a/a_1.vmdk", "vmfs01", CAPACITY, None, None, True, None, controller, unit)


def _address(key: str, disk: Optional[bool] = True, **more: Any) -> Any:
    fields = {"url": f"https://*/nfc/1/{key[-1]}.vmdk", "sslThumbprint": "", "importKey": key, **more}
    return vim.HttpNfcLease.DeviceUrl(key=key, disk=disk, **fields)


def _session(**changes: Any) -> Any:
    connection = Connection("vc.example.com", "backup", "secret", 8443, True, None, None)
    connection = Connection(**{**connection.__dict__, **changes})
    return SimpleNamespace(connection=connection, thumbprints={"sha1": SHA1, "sha256": ":".join(["CD"] * 32)})


# The address of a disk


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("pvscsi", "ParaVirtualSCSIController"),
        ("lsilogic", "VirtualLsiLogicController"),
        ("lsilogic-sas", "VirtualLsiLogicSASController"),
        ("ide", "VirtualIDEController"),
        ("sata", "VirtualAHCIController"),
        ("nvme", "VirtualNVMEController"),
    ],
)
def test_an_address_is_found_by_controller_bus_and_unit(kind: str, name: str) -> None:
    addresses = [
        _address("/vm-1/nvram", disk=False),
        _address(f"/vm-1/{name}1:1"),
        _address(f"/vm-1/{name}0:11"),
        _address(f"/vm-1/{name}0:1", disk=None),
        _address(f"/vm-1/{name}0:0"),
    ]
    assert https.address_of(addresses, _disk(kind)).key == f"/vm-1/{name}0:1"


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        [_address("/vm-1/ParaVirtualSCSIController0:0")],
        [_address("/vm-1/VirtualLsiLogicController0:1")],
        [_address("/vm-1/ParaVirtualSCSIController0:1", disk=False)],
        [_address("/vm-1/ParaVirtualSCSIController0:1"), _address("/vm-2/ParaVirtualSCSIController0:1")],
    ],
)
def test_no_address_or_two_are_refused(addresses: Any) -> None:
    with pytest.raises(TransportError, match="ParaVirtualSCSIController0:1 is wanted"):
        https.address_of(addresses, _disk())


# Who is believed


def _seen(session: Any, address: Any) -> Connection:
    tls = https.tls_for(session, address)
    return tls._connection  # noqa: SLF001


def test_a_thumbprint_in_the_entry_counts() -> None:
    seen = _seen(_session(), _address("a", url="https://esx01:9443/nfc/1/a.vmdk", sslThumbprint=SHA1))
    assert (seen.hostname, seen.port, seen.thumbprint, seen.validate_certs) == ("esx01", 9443, SHA1, False)


def test_a_certificate_in_the_entry_counts(certificates: Path) -> None:
    pem = (certificates / "good.pem").read_text()
    seen = _seen(_session(), _address("a", sslThumbprint=SHA1, sslCertificate=pem))
    der = ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN") :])
    assert seen.thumbprint == hashlib.sha256(der).hexdigest()
    with pytest.raises(TransportError, match="can't be read"):
        https.tls_for(_session(), _address("a", sslCertificate="no certificate"))


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", "good.key", "-out", "good.pem", "-subj", "/CN=esx01"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_a_pinned_certificate_must_carry_the_servers_name(tmp_path: Path) -> None:
    """nbdkit's plugin checks the name too, so it is told before it starts."""
    for name, alternative in (("good", "IP:127.0.0.1"), ("other", "DNS:other.example.com")):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        command += ["-addext", f"subjectAltName={alternative}"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve(listener: socket.socket = listener, context: ssl.SSLContext = context) -> None:
                with contextlib.suppress(OSError):
                    context.wrap_socket(listener.accept()[0], server_side=True).close()

            server = threading.Thread(target=serve)
            server.start()
            connection = Connection("127.0.0.1", "backup", "secret", listener.getsockname()[1])
            try:
                if name == "good":
                    https._check_name(connection, tmp_path / "good.pem")  # noqa: SLF001
                else:
                    with pytest.raises(TransportError, match="can't be verified by nbdkit"):
                        https._check_name(connection, tmp_path / "other.pem")  # noqa: SLF001
            finally:
                server.join()


def test_an_empty_thumbprint_means_an_authority() -> None:
    address = _address("a", url="https://esx01/nfc/1/a.vmdk")
    for options in ({}, {"validate_certs": False}, {"validate_certs": False, "thumbprint": SHA1}):
        seen = _seen(_session(**options), address)
        assert (seen.hostname, seen.port, seen.validate_certs, seen.thumbprint) == ("esx01", 443, True, None)


def test_the_server_itself_is_verified_as_ever() -> None:
    address = _address("a")
    seen = _seen(_session(), address)
    assert (seen.hostname, seen.port, seen.validate_certs) == ("vc.example.com", 8443, True)
    assert _seen(_session(validate_certs=False, thumbprint=SHA1), address).thumbprint == SHA1
    # Where nothing is verified it must at least be the server that gave the address.
    session = _session(validate_certs=False)
    assert _seen(session, address).thumbprint == session.thumbprints["sha256"]


@pytest.mark.parametrize(
    "url", ["http://*/nfc/1/a.vmdk", "https:///nfc", "https://esx01:99999/nfc", "file:///etc/passwd"]
)
def test_an_address_that_makes_no_sense_is_refused(url: str) -> None:
    with pytest.raises(TransportError, match="not HTTPS"):
        https.tls_for(_session(), _address("a", url=url))


# What comes


def _stream(path: Path, **changes: Any) -> Path:
    """An empty stream-optimised VMDK with its tables at the end."""
    values = {"magic": 0x564D444B, "capacity": CAPACITY, "flags": 0x30001, "text": 'createType="streamOptimized"'}
    values.update(changes)

    def header(directory: int) -> bytes:
        fields = (values["magic"], 3, values["flags"], values["capacity"] // 512, 128, 1, 20, 512, 0, directory, 128)
        return (struct.pack("<IIIQQQQIQQQ", *fields) + b"\0\n \r\n\1\0").ljust(512, b"\0")

    def marker(kind: int, sectors: int) -> bytes:
        return struct.pack("<QII", sectors, 0, kind).ljust(512, b"\0")

    text = f'# Disk DescriptorFile\nparentCID=ffffffff\n{values["text"]}\nRW {CAPACITY // 512} SPARSE "a"\n'
    front = (header(0xFFFFFFFFFFFFFFFF) + text.encode()).ljust(128 * 512, b"\0")
    directory = marker(2, 1) + bytes(512)
    path.write_bytes(front + directory + marker(3, 1) + header(129) + marker(0, 0))
    return path


def test_a_whole_stream_is_taken_and_served(tmp_path: Path) -> None:
    path = _stream(tmp_path / "a.vmdk")
    https.check_stream(path, CAPACITY)
    with RuntimeDir("unit-https") as run_dir, image.serve(str(path), run_dir=run_dir, format="vmdk") as child:
        done = subprocess.run(["nbdinfo", "--size", child.uri], check=True, capture_output=True, text=True)
    assert int(done.stdout) == CAPACITY


def test_a_stream_with_its_tables_in_front_is_taken(tmp_path: Path) -> None:
    raw, path = tmp_path / "a.raw", tmp_path / "a.vmdk"
    raw.write_bytes(b"x" * CAPACITY)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(path)]
    subprocess.run(command, check=True)
    https.check_stream(path, CAPACITY)


@pytest.mark.parametrize("cut", [1, 512, 1024, 1536, 60000])
def test_a_stream_that_ends_early_is_no_stream(tmp_path: Path, cut: int) -> None:
    path = _stream(tmp_path / "a.vmdk")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(https._CutError):  # noqa: SLF001
        https.check_stream(path, CAPACITY)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": 0x564D4457}, "not a VMDK"),
        ({"flags": 3}, "not a stream-optimised"),
        ({"text": 'createType="monolithicFlat"'}, "not a stream-optimised"),
        ({"text": 'createType="streamOptimized"\nparentFileNameHint="/etc/passwd"'}, "another file"),
        ({"capacity": CAPACITY + 512}, "bytes, the snapshot says"),
        ({"capacity": 0}, "bytes, the snapshot says"),
    ],
)
def test_what_is_something_else_is_never_opened(tmp_path: Path, changes: Dict[str, Any], words: str) -> None:
    with pytest.raises(TransportError, match=words):
        https.check_stream(_stream(tmp_path / "a.vmdk", **changes), CAPACITY)


# Files


def test_the_file_of_a_base_disk() -> None:
    assert https.flat_file("[ds 1] a/a_1.vmdk") == "[ds 1] a/a_1-flat.vmdk"
    with pytest.raises(TransportError):
        https.flat_file("[ds 1] a/a.raw")


@pytest.mark.parametrize(
    ("line", "words", "retryable"),
    [
        ("pread: curl_easy_perform: HTTP: The requested URL returned error: 401", "does not accept the login", True),
        ("pread: HTTP response code said error: The requested URL returned error: 403 Forbidden", "refuses", False),
        ("pread: HTTP response code said error: The requested URL returned error: 500", "powered on", True),
        ("pread: Timeout was reached: Operation timed out", "timed out", True),
        ("problem: SSL peer certificate or SSH remote key was not OK: verification failed", "certificate", False),
    ],
)
def test_the_plugins_errors_in_words(line: str, words: str, retryable: bool) -> None:
    reason, _remedy, again = https._words(f"nbdkit: curl[1]: error: {line}", "nothing")  # noqa: SLF001
    assert words in reason
    assert again is retryable
