# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Role backup_proxy on a fresh Debian 13: made by debootstrap, entered by chroot, with everything installed in earnest.

It takes minutes and a mirror, so `make soak` alone runs it (SOAK_DEBIAN13=1). The tools that read the files of the
protection are Debian 13's: udevadm verify and lvmconfig.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "nbdkit-plugin-vddk"
RULES = "/etc/udev/rules.d"
ANSIBLE = "ansible-core==2.19.*"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def run(*argv: Any, **options: Any) -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, f"{argv}: {done.stdout[-6000:]}"
    return done.stdout


def mirror() -> str:
    """The mirror that this machine uses."""
    for path in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"):
        if os.path.exists(path):
            found = re.search(r"^(?:URIs:|deb(?: \[.*\])?) *(\S+)", Path(path).read_text(), re.MULTILINE)
            if found:
                return found.group(1)
    return "http://deb.debian.org/debian"


class Debian13:
    """A Debian 13 below a folder, which has this machine's devices and kernel."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "trixie"
        run("apt-get", "-q", "download", "debootstrap", cwd=folder)
        run("dpkg", "-x", next(folder.glob("debootstrap_*.deb")), folder / "tool")
        run(
            *("unshare", "--mount", folder / "tool/usr/sbin/debootstrap", "--variant=minbase"),
            *("--include=python3,python3-venv,ca-certificates", "trixie", self.root, mirror()),
            env={**os.environ, "DEBOOTSTRAP_DIR": str(folder / "tool/usr/share/debootstrap")},
        )
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        # A machine behind a proxy that has certificates of its own trusts them in here, too.
        shutil.copy(CERTIFICATES, str(self.root) + CERTIFICATES)

    def run(self, *argv: Any, **options: Any) -> str:
        """A command in there; mounts are of a namespace of its own, so nothing stays mounted."""
        mounts = f"cd {self.root}; mount -t proc proc proc; mount --rbind /dev dev; mount --rbind /sys sys"
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            "PIP_CERT": CERTIFICATES,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_COLLECTIONS_PATH": "/collections",
        }
        environment.update({name: os.environ[name] for name in ("http_proxy", "https_proxy") if name in os.environ})
        script = f'{mounts}; exec chroot {self.root} "$@"'
        return run(
            *("unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", script, "sh"),
            *argv,
            env=environment,
            **options,
        )


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian13]:
    folder = tmp_path_factory.mktemp("debian13")
    machine = Debian13(folder)
    run(ROOT / "tests/tools/stage.sh", machine.root / "collections")
    machine.run("python3", "-m", "venv", "/opt/ansible")
    machine.run("/opt/ansible/bin/pip", "install", "-q", ANSIBLE)
    yield machine
    shutil.rmtree(folder)


def playbook(debian: Debian13, variables: Dict[str, Any], *arguments: str) -> str:
    (debian.root / "root/variables.json").write_text(json.dumps(variables))
    command: List[str] = ["/opt/ansible/bin/ansible-playbook", "-i", "localhost,", "-c", "local", *arguments]
    command += ["-e", "@/root/variables.json", "-e", "ansible_python_interpreter=/usr/bin/python3"]
    return debian.run(*command, "openvadp.backup.backup_proxy")


def changed(text: str) -> int:
    found = re.search(r"changed=(\d+) ", text)
    assert found and "failed=0" in text, text[-6000:]
    return int(found.group(1))


def test_a_fresh_debian_13_becomes_a_proxy(debian: Debian13, report: Callable[[str], None]) -> None:
    archive = debian.root / "root/VMware-vix-disklib-8.0.3.x86_64.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        library = "vmware-vix-disklib-distrib/lib64/libvixDiskLib.so.8"
        tar.add(ROOT / "build/vddk/lib64/libvixDiskLib.so.8", library)
    variables = {
        "backup_proxy_hosts": "localhost",
        "backup_proxy_vddk_archive": f"/root/{archive.name}",
        "backup_proxy_vddk_checksum": hashlib.sha256(archive.read_bytes()).hexdigest(),
    }
    before = sorted(str(path) for path in (debian.root / "etc").rglob("*"))
    assert changed(playbook(debian, variables, "--check")) > 0
    assert sorted(str(path) for path in (debian.root / "etc").rglob("*")) == before

    output = playbook(debian, variables)
    assert changed(output) > 0 and "VDDK 8 in /opt/vmware-vix-disklib-distrib, 23 functions" in output
    assert "installed" in debian.run("dpkg-query", "-W", "-f", "${Status}", PLUGIN)
    source = (debian.root / "etc/apt/sources.list.d/openvadp-backup-proxy.sources").read_text()
    assert f"URIs: {mirror()}" in source and "Components: contrib" in source
    debian.run("/opt/openvadp-backup/python/bin/python", "-c", "import nbd, pyVmomi, jmespath, blake3")
    assert changed(playbook(debian, variables)) == 0

    # LVM comes later, and without a question; then its filter is written. What Debian's own tools make of the files:
    debian.run("apt-get", "-q", "install", "-y", "--no-install-recommends", "udev", "lvm2")
    assert changed(playbook(debian, variables)) >= 1
    rules = [f"{RULES}/{number}-openvadp-backup-proxy.rules" for number in (59, 62)]
    verified = debian.run("udevadm", "verify", *rules)
    filters = debian.run("lvm", "lvmconfig", "devices/global_filter")
    # A list of one is printed without its brackets.
    assert filters.strip() == 'global_filter="r|.*|"'
    report(f"debian 13: {output.count('changed: ')} changes, then none; {verified.strip().splitlines()[-1]}")
