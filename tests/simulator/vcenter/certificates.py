# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A certificate authority of the simulator's own and the server's certificate, made once for each state folder."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

HOSTS = 9  # 127.0.1.1 to 127.0.1.9


@dataclass(frozen=True)
class Material:
    ca_path: Path
    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.key)
        return context

    @property
    def thumbprints(self) -> dict[str, str]:
        der = ssl.PEM_cert_to_DER_cert(self.certificate.read_text())

        def colons(digest: str) -> str:
            return ":".join(digest[index : index + 2] for index in range(0, len(digest), 2)).upper()

        return {"sha1": colons(hashlib.sha1(der).hexdigest()), "sha256": colons(hashlib.sha256(der).hexdigest())}


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr}")


def ensure(folder: Path) -> Material:
    material = Material(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    if material.certificate.exists():
        return material
    folder.mkdir(mode=0o700, exist_ok=True)
    names = ["DNS:localhost", "IP:127.0.0.1", *(f"IP:127.0.1.{number}" for number in range(1, HOSTS + 1))]
    (folder / "server.ext").write_text(
        f"subjectAltName={','.join(names)}\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n"
        "extendedKeyUsage=serverAuth\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
    )
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    _openssl(
        folder,
        *("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "3650"),
        *("-subj", "/CN=OpenVADP simulator CA", "-addext", "basicConstraints=critical,CA:TRUE"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    _openssl(folder, "req", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    _openssl(
        folder,
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "server.new", "-days", "3650", "-extfile", "server.ext"),
    )
    (folder / "server.new").rename(material.certificate)  # last: with it the set is whole
    return material
