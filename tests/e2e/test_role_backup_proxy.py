# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Role backup_proxy on this very machine: packages and VDDK in earnest, the files of its protection below a folder."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from harness import ROOT, Ansible, Outcome

PLAYBOOK = "openvadp.backup.backup_proxy"
# Each run of the role is some thirty modules.
pytestmark = pytest.mark.timeout(1500)

LUN = "naa.600a098038314648593f517773636465"
OWN = "naa.6000c29a1b2c3d4e5f60718293a4b5c6"
RULES = "etc/udev/rules.d/59-openvadp-backup-proxy.rules"
FILES = [
    "etc/lvm/lvmlocal.conf",
    "etc/mdadm/mdadm.conf.d/openvadp-backup-proxy.conf",
    "etc/multipath/conf.d/openvadp-backup-proxy.conf",
    RULES,
    "etc/udev/rules.d/62-openvadp-backup-proxy.rules",
]


@pytest.fixture(scope="module")
def python_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python environment, which takes longest: the tests share it."""
    return tmp_path_factory.mktemp("python") / "environment"


def pack(path: Path, version: str) -> Tuple[str, str]:
    """(path, SHA-256) of an archive in the layout of VMware's, with the test double as the library."""
    major = version.split(".")[0]
    lib64 = "vmware-vix-disklib-distrib/lib64"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(ROOT / "build/vddk/lib64/libvixDiskLib.so.8", f"{lib64}/libvixDiskLib.so.{version}")
        for name, aim in ((f"libvixDiskLib.so.{major}", version), ("libvixDiskLib.so", major)):
            link = tarfile.TarInfo(f"{lib64}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, f"libvixDiskLib.so.{aim}"
            tar.addfile(link)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


class Proxy:
    """This machine as a proxy, with all that the role writes below one folder."""

    def __init__(self, folder: Path, ansible: Ansible, python_dir: Path) -> None:
        self.ansible = ansible
        self.root = folder / "root"
        self.vddk = folder / "opt" / "vddk"
        self.sysfs = folder / "sys"
        self.links = folder / "by-id"
        self.links.mkdir()
        (self.sysfs / "class/block").mkdir(parents=True)
        self.variables: Dict[str, Any] = {
            "backup_proxy_hosts": "localhost",
            "backup_proxy_root": str(self.root),
            "backup_proxy_python_dir": str(python_dir),
            "backup_proxy_vddk_dir": str(self.vddk),
            "backup_proxy_device_dir": str(self.links),
            "backup_proxy_sysfs_dir": str(self.sysfs),
        }

    def disk(self, name: str, **files: str) -> None:
        """A disk of the machine's own /sys: that of its root folder, so that it is in use."""
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        number = next(fields[2] for fields in mounts if fields[4] == "/")
        folder = self.sysfs / "class/block" / name
        for path, text in {"dev": number, "ro": "0", **files}.items():
            file = folder / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    def run(self, *arguments: str, **options: Any) -> Outcome:
        variables = {**self.variables, **{f"backup_proxy_{name}": value for name, value in options.items()}}
        return self.ansible.start(PLAYBOOK, variables=variables, arguments=arguments).wait(900)

    def files(self) -> List[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def text(self, name: str) -> str:
        return (self.root / name).read_text()


@pytest.fixture
def proxy(tmp_path: Path, ansible: Ansible, python_dir: Path) -> Proxy:
    return Proxy(tmp_path, ansible, python_dir)


def refusal(outcome: Outcome) -> str:
    failed = [event["result"] for event in outcome.failed().events if event["status"] == "failed"]
    return str(failed[-1]["msg"])


def result(outcome: Outcome) -> Dict[str, Any]:
    facts = outcome.ok().result("set_fact", task="Keep the result")["ansible_facts"]
    return dict(facts["backup_proxy_result"])


@pytest.mark.soak
def test_from_nothing_to_a_proxy(proxy: Proxy, tmp_path: Path) -> None:
    """Announced in check mode, done, found done."""
    path, checksum = pack(tmp_path / "VMware-vix-disklib-8.0.3.x86_64.tar.gz", "8.0.3")
    vddk = {"vddk_archive": path, "vddk_checksum": checksum}
    python = Path(proxy.variables["backup_proxy_python_dir"])

    assert proxy.run("--check", **vddk).ok().changed >= 5
    assert not proxy.root.exists() and not proxy.vddk.exists() and not python.exists()

    outcome = proxy.run(**vddk)
    found = result(outcome)
    assert found["vddk"]["version"] == "8.0.3" and found["vddk"]["libdir"] == str(proxy.vddk)
    assert "VixDiskLib_QueryAllocatedBlocks" in found["vddk"]["functions"]
    assert found["vddk"]["transport_modes"] == ["file", "san", "hotadd", "nbdssl", "nbd"]
    assert "VDDK 8.0.3 in" in outcome.stdout
    assert proxy.files() == sorted(FILES[1:])  # LVM is not installed there
    subprocess.run([found["python"], "-c", "import nbd, pyVmomi, jmespath, blake3"], check=True)
    assert [path.name for path in proxy.vddk.parent.iterdir()] == ["vddk"]

    Path(path).unlink()  # what is in place needs no archive any more
    assert proxy.run(**vddk).ok().changed == 0


@pytest.mark.soak
def test_another_archive(proxy: Proxy, tmp_path: Path) -> None:
    """One that is not the expected one is refused; a newer VDDK takes the place of the older."""
    path, checksum = pack(tmp_path / "VMware-vix-disklib-8.0.3.x86_64.tar.gz", "8.0.3")
    assert f"its SHA-256 is {checksum}" in refusal(proxy.run(vddk_archive=path, vddk_checksum="0" * 64))
    assert not proxy.root.exists() and not proxy.vddk.exists()
    quick = {"install_packages": False}
    proxy.run(vddk_archive=path, vddk_checksum=checksum, **quick).ok()

    newer, checksum = pack(tmp_path / "VMware-vix-disklib-9.0.0.tar.gz", "9.0.0.0")
    vddk = {"vddk_archive": newer, "vddk_checksum": checksum, "vddk_archive_on_proxy": True}
    assert result(proxy.run(**vddk, **quick))["vddk"]["version"] == "9.0.0.0"
    assert os.readlink(proxy.vddk / "lib64/libvixDiskLib.so.8").startswith("libvixDiskLib.so.9")


@pytest.mark.soak
def test_the_machines_own_disks_and_luns(proxy: Proxy) -> None:
    """The disks in use are its own; without a name they can't be told from hot-added ones."""
    proxy.disk("sda", device__vendor="VMware  ", device__model="Virtual disk")
    quick = {"install_packages": False, "san_luns": [LUN], "lvm_accept": ["^/dev/disk/by-id/wwn-0x6000c29"]}
    assert "disk.EnableUUID" in refusal(proxy.run(**quick))
    assert not proxy.root.exists()

    # Software RAID: no assembly but of named arrays would leave this one behind at the next start.
    proxy.disk("sda", device__wwid=OWN)
    proxy.disk("md0", md__level="raid1")
    assert "mdadm --detail --scan" in refusal(proxy.run(**quick))
    assert not proxy.root.exists()
    for name in ("mdadm", "lvm"):
        (proxy.root / "etc" / name).mkdir(parents=True)
    (proxy.root / "etc/lvm/lvm.conf").touch()
    (proxy.root / "etc/mdadm/mdadm.conf").write_text("ARRAY /dev/md0 UUID=3aaa0122:29827cfa:5331ad66:ca767371\n")

    found = result(proxy.run(**quick, own_disks=["naa.6000c290000000000000000000000002"]))
    assert found["own_disks"] == ["naa.6000c290000000000000000000000002", OWN]
    rules = proxy.text(RULES)
    assert f'ATTRS{{wwid}}=="{OWN}", GOTO="openvadp_end"\n' in rules
    assert f'ATTRS{{wwid}}=="{LUN}", ENV{{OPENVADP_FOREIGN}}="lun"\n' in rules
    assert '"VMware*"' in rules and "--setro" in rules
    for name in (RULES, FILES[-1]):
        check_rules(proxy.text(name))
    lvm = subprocess.run(
        [str(ROOT / "build/lvm2/lvm"), "lvmconfig", "devices/global_filter"],
        env={**os.environ, "LVM_SYSTEM_DIR": str(proxy.root / "etc/lvm")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert lvm.stdout.strip() == r'global_filter=["a|^/dev/disk/by-id/wwn-0x6000c29|","r|.*|"]'
    assert re.search(r"^AUTO -all$", proxy.text(FILES[1]), re.MULTILINE)
    assert "find_multipaths yes" in proxy.text(FILES[2])

    # An administrator's own lines stay when the protection is taken away.
    with (proxy.root / FILES[0]).open("a") as stream:
        stream.write('local {\n    system_id = "proxy"\n}\n')
    outcome = proxy.run(install_packages=False, san=False, hotadd=False).ok()
    assert outcome.changed == 2 and proxy.files() == ["etc/lvm/lvm.conf", FILES[0], "etc/mdadm/mdadm.conf"]
    assert "global_filter" not in proxy.text(FILES[0]) and "system_id" in proxy.text(FILES[0])


def check_rules(text: str) -> None:
    """Each line is a list of keys with operators and quoted values, and each GOTO has its label further down."""
    key = r'[A-Z_]+(\{[\w.]+\})?(==|!=|=|\+=|:=)"[^"]*"'
    waiting = set()
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        assert re.fullmatch(rf"{key}(, {key})*", line), line
        waiting |= set(re.findall(r'GOTO="(\w+)"', line))
        waiting -= set(re.findall(r'LABEL="(\w+)"', line))
    assert not waiting


@pytest.fixture
def mounted_lun(tmp_path: Path) -> Iterator[Tuple[str, Path]]:
    """A LUN that this machine has formatted and mounted: (device, mount point)."""
    image = tmp_path / "lun"
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    device = subprocess.run(
        ["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    place = tmp_path / "mnt"
    place.mkdir()
    try:
        subprocess.run(["mount", "-o", "ro", device, str(place)], check=True)
        yield device, place
    finally:
        subprocess.run(["umount", str(place)], check=False)
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_lun_that_is_mounted_or_formatted(proxy: Proxy, mounted_lun: Tuple[str, Path]) -> None:
    """The role refuses to go on, and so does the module; what it finds is told device by device."""
    device, place = mounted_lun
    (proxy.links / f"wwn-0x{LUN[4:]}").symlink_to(device)
    message = refusal(proxy.run(install_packages=False, san_luns=[LUN]))
    assert f"{device}: it is mounted at {place}" in message and "signature of ext4" in message
    assert not proxy.root.exists()

    options = {"luns": [LUN], "device_dir": str(proxy.links)}
    looked = proxy.ansible.module("proxy_lun_guard", dict(options, fail_on_problems=False))
    assert not looked["failed"] and not looked["changed"]
    assert looked["problems"] == [f"{device}: it is mounted at {place}", f"{device}: it carries a signature of ext4"]
    assert [disk["lun"] for disk in looked["disks"] if disk["device"] == device] == [True]

    subprocess.run(["umount", str(place)], check=True)
    still = proxy.ansible.module("proxy_lun_guard", options)
    assert still["failed"] and still["error"]["kind"] == "TransportError"
    assert "signature of ext4" in still["msg"] and "mounted at" not in still["msg"]
    subprocess.run(["mount", "-o", "ro", device, str(place)], check=True)


@pytest.mark.soak
def test_the_plugin_out_of_a_newer_release(ansible: Ansible, tmp_path: Path) -> None:
    """From the mirror that this machine uses, where the package can't be installed; nothing else is left."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    nbdkit = tmp_path / "bin" / "nbdkit"
    nbdkit.parent.mkdir()
    nbdkit.write_text(
        f'#!/bin/sh\n[ "$1" != --dump-config ] || exec echo plugindir={plugins}\nexec /usr/bin/nbdkit "$@"\n'
    )
    nbdkit.chmod(0o755)
    role = "openvadp.backup.backup_proxy"
    tasks = [
        {
            "name": "Look",
            "ansible.builtin.include_role": {"name": role, "tasks_from": "distribution.yml", "public": True},
        },
        {
            "name": "Fetch",
            "ansible.builtin.include_role": {"name": role, "tasks_from": "plugin.yml"},
            "vars": {"__backup_proxy_plugin_package": ""},
        },
    ]
    path = f"{nbdkit.parent}:{os.environ['PATH']}"
    work = tmp_path / "tmp"
    work.mkdir()
    environment = {"PATH": path, "TMPDIR": str(work)}
    play = [{"hosts": "localhost", "gather_facts": False, "environment": environment, "tasks": tasks}]
    ansible.start(play).wait(900).ok()
    assert [file.name for file in plugins.iterdir()] == ["nbdkit-vddk-plugin.so"]
    told = subprocess.run(
        ["nbdkit", str(plugins / "nbdkit-vddk-plugin.so"), "--dump-plugin", f"libdir={ROOT}/build/vddk"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "vddk_library_version=8" in told.stdout
    assert not list(work.glob("*.backup-proxy"))
