# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What role backup_proxy installs on each distribution, and what its files say: rendered by Ansible, not installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles" / "backup_proxy"

APT = {"nbdkit", "libnbd-bin", "python3-libnbd", "qemu-utils", "python3-venv", "util-linux"}
DNF = {"nbdkit", "nbdkit-curl-plugin", "nbdkit-vddk-plugin", "libnbd", "python3-libnbd", "qemu-img", "python3-pip"}
FETCHED = "out of a newer release's package"

# host: (distribution, version), packages, how nbdkit's VDDK plugin gets there, mdadm's folder
KNOWN: Dict[str, Any] = {
    "debian12": (("Debian", "12"), APT, (FETCHED, "trixie", "contrib"), "/etc/mdadm/mdadm.conf.d"),
    "debian13": (("Debian", "13"), APT, ("nbdkit-plugin-vddk", "trixie", "contrib"), "/etc/mdadm/mdadm.conf.d"),
    "ubuntu24": (("Ubuntu", "24"), APT, (FETCHED, "resolute", "universe"), "/etc/mdadm/mdadm.conf.d"),
    "ubuntu26": (("Ubuntu", "26"), APT, ("nbdkit-plugin-vddk", "resolute", "universe"), "/etc/mdadm/mdadm.conf.d"),
    "rhel9": (("RedHat", "9"), DNF, None, "/etc/mdadm.conf.d"),
    "rhel10": (("RedHat", "10"), DNF, None, "/etc/mdadm.conf.d"),
    "alma9": (("AlmaLinux", "9"), DNF, None, "/etc/mdadm.conf.d"),
    "alma10": (("AlmaLinux", "10"), DNF, None, "/etc/mdadm.conf.d"),
    "rocky9": (("Rocky", "9"), DNF, None, "/etc/mdadm.conf.d"),
    "rocky10": (("Rocky", "10"), DNF, None, "/etc/mdadm.conf.d"),
    "fedora43": (("Fedora", "43"), DNF, None, "/etc/mdadm.conf.d"),
}
UNKNOWN = {
    "debian11": ("Debian", "11"),
    "debian14": ("Debian", "14"),
    "ubuntu22": ("Ubuntu", "22"),
    "rhel8": ("RedHat", "8"),
    "suse": ("SLES", "15"),
}

DEB822 = """Types: deb
# http://snapshot.debian.org/archive/debian/20250520T000000Z
URIs: http://mirror.example.com/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/our-own.gpg
"""
ONE_LINE = (
    "# deb http://no.example.com x main\ndeb [arch=amd64 signed-by=/etc/apt/k.gpg] http://m.example.com/debian x main\n"
)
INLINE_KEY = "URIs: http://mirror.example.com/debian\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n"


def rendered(name: str) -> str:
    return "{{ lookup('ansible.builtin.template', '" + str(ROLE / "templates" / name) + "') }}"


@pytest.fixture(scope="module")
def playbook(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """One run of a play with a host for each distribution: {host: what the role chose there}."""
    folder = tmp_path_factory.mktemp("playbook")
    hosts = {name: row[0] for name, row in KNOWN.items()}
    hosts.update(UNKNOWN)
    facts = {
        name: {
            "ansible_connection": "local",
            "faked": {
                "ansible_distribution": pair[0],
                "ansible_distribution_major_version": pair[1],
                "ansible_distribution_release": "resolute" if pair == ("Ubuntu", "26") else "other",
                "ansible_architecture": "x86_64",
            },
        }
        for name, pair in hosts.items()
    }
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    looked = {"disks": [], "physical_volumes": [{"uuid": "AAAAAA-BBBB"}, {"uuid": "CCCCCC-DDDD"}], "arrays": []}
    own = {"lun": False, "virtual": True, "in_use": ["it is mounted at /"], "wwid": "naa.6000c29a"}
    disks = [own, dict(own, wwid="naa.6000c29b", in_use=[]), dict(own, wwid=None), dict(own, lun=True, wwid="naa.600a")]
    looked["disks"] = [dict(disk, device=f"/dev/sd{letter}") for disk, letter in zip(disks, "abcd")]
    variables = {
        **defaults,
        "backup_proxy_san_luns": ["NAA.600A098038314648593F517773636465"],
        "__backup_proxy_looked": looked,
    }
    sources = {"deb822": DEB822, "one_line": ONE_LINE, "inline_key": INLINE_KEY, "nothing": ""}
    pick = {
        "packages": "{{ __backup_proxy_packages }}",
        "plugin": "{{ __backup_proxy_plugin_package | default(none) }}",
        "suite": "{{ __backup_proxy_plugin_suite | default(none) }}",
        "component": "{{ __backup_proxy_plugin_component | default(none) }}",
        "mdadm": "{{ __backup_proxy_mdadm_dir }}",
    }
    fakes = {name: "{{ faked." + name + " }}" for name in facts["debian12"]["faked"]}
    distribution = {"name": "openvadp.backup.backup_proxy", "tasks_from": "distribution.yml", "public": True}
    on_one: list = [
        {
            "name": "Render",
            "ansible.builtin.set_fact": {
                "rendered": {name: rendered(name) for name in ("decide.rules.j2", "lvm.conf.j2", "apt.sources.j2")},
                "own": "{{ __backup_proxy_own }}",
                "nameless": "{{ __backup_proxy_nameless }}",
            },
            "vars": {
                **variables,
                "__backup_proxy_source_files": {"results": [{}, {"content": "{{ deb822 | b64encode }}"}]},
                "deb822": DEB822,
            },
        },
        {
            "name": "Render for writing",
            "ansible.builtin.set_fact": {"writable": rendered("decide.rules.j2")},
            "vars": {**variables, "backup_proxy_writable": True, "backup_proxy_hotadd": False},
        },
    ]
    # As a survey, or -e name=value, sends them.
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in defaults.items()}
    templates = ("decide.rules.j2", "lvm.conf.j2")
    on_one.append(
        {
            "name": "Render from text",
            "ansible.builtin.set_fact": {"of_text": {name: rendered(name) for name in templates}},
            "vars": {
                **variables,
                **text,
                "backup_proxy_writable": "false",
                "backup_proxy_san_luns": "NAA.600A098038314648593F517773636465,",
            },
        }
    )
    on_one += [
        {
            "name": "Read sources",
            "ansible.builtin.set_fact": {name: "{{ [__backup_proxy_mirror, __backup_proxy_key] }}"},
            "vars": {"__backup_proxy_source_files": {"results": [{"content": "{{ text | b64encode }}"}]}, "text": text},
        }
        for name, text in sources.items()
    ]
    result = folder / "result.json"
    keys = ["rendered", "own", "nameless", "writable", "of_text", *sources]
    on_one.append(
        {
            "name": "Write all down",
            "ansible.builtin.copy": {
                "content": "{{ {'picked': picks, 'one': one} | to_json }}",
                "dest": str(result),
                "mode": "0600",
            },
            "vars": {
                "names": "{{ hostvars | dict2items | selectattr('value.picked', 'defined') | map(attribute='key') }}",
                "picks": "{{ dict(names | zip(names | map('extract', hostvars, 'picked'))) }}",
                "one": {key: "{{ " + key + " }}" for key in keys},
            },
        }
    )
    plays = [
        {
            "hosts": "all",
            "gather_facts": False,
            "tasks": [
                {"name": "Be another distribution", "ansible.builtin.set_fact": {**fakes, "cacheable": True}},
                {"name": "Ask the role", "ansible.builtin.include_role": distribution},
                {"name": "Keep its choice", "ansible.builtin.set_fact": {"picked": pick}},
            ],
        },
        {
            "hosts": "debian12",
            "gather_facts": False,
            "tasks": [{"name": "Ask the role", "ansible.builtin.include_role": distribution}, *on_one],
        },
    ]
    (folder / "playbook.json").write_text(json.dumps(plays))
    (folder / "inventory.json").write_text(json.dumps({"all": {"hosts": facts}}))
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "ansible-playbook"),
            *("-i", str(folder / "inventory.json"), str(folder / "playbook.json")),
            *("-e", f"ansible_python_interpreter={sys.executable}"),
        ],
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "build/tree"),
            "ANSIBLE_LOCAL_TEMP": str(folder / "tmp"),
            "ANSIBLE_REMOTE_TEMP": str(folder / "tmp"),
            "ANSIBLE_NOCOLOR": "1",
        },
        check=False,  # the hosts that are refused
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.exists(), done.stdout[-6000:] + done.stderr[-2000:]
    return dict(json.loads(result.read_text()), stdout=done.stdout)


@pytest.mark.parametrize("host", sorted(KNOWN))
def test_packages(playbook: Dict[str, Any], host: str) -> None:
    _pair, packages, plugin, mdadm = KNOWN[host]
    picked = playbook["picked"][host]
    assert set(picked["packages"]) - {"util-linux"} == packages - {"util-linux"}
    if plugin is None:
        assert (picked["plugin"], picked["suite"]) == (None, None)
    else:
        assert (picked["plugin"] or FETCHED, picked["suite"], picked["component"]) == plugin
    assert picked["mdadm"] == mdadm


@pytest.mark.parametrize("host", sorted(UNKNOWN))
def test_what_nobody_has_looked_at_is_refused(playbook: Dict[str, Any], host: str) -> None:
    assert host not in playbook["picked"]
    assert re.search(rf'^\[ERROR\].*|fatal: \[{host}\].*"The role does not know', playbook["stdout"], re.MULTILINE)


def test_requirements_are_those_of_the_collection() -> None:
    """The role, an execution environment and pip get the same; those of another licence only where they are wanted."""
    needed, of_files, of_environment = (
        [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
        for path in ("requirements.txt", "requirements-files.txt", "meta/ee-requirements.txt")
    )
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    assert variables["__backup_proxy_requirements"] == needed and not any("dissect" in line for line in needed)
    assert variables["__backup_proxy_file_requirements"] == of_files
    assert of_environment == needed + of_files
    assert yaml.safe_load((ROLE / "defaults/main.yml").read_text())["backup_proxy_file_restore"] is False


def test_own_disks(playbook: Dict[str, Any]) -> None:
    """Those in use that are no LUN; an unused one is taken for a hot-added one, a nameless one is a reason to stop."""
    assert playbook["one"]["own"] == ["naa.6000c29a"]
    assert playbook["one"]["nameless"] == ["/dev/sdc"]


def test_rules(playbook: Dict[str, Any]) -> None:
    rules = playbook["one"]["rendered"]["decide.rules.j2"]
    lines = [line for line in rules.splitlines() if line and not line.startswith("#")]
    own = lines.index('ATTRS{wwid}=="naa.6000c29a", GOTO="openvadp_end"')
    foreign = [number for number, line in enumerate(lines) if "OPENVADP_FOREIGN}=" in line]
    read_only = lines.index('PROGRAM="/usr/sbin/blockdev --setro $devnode"')
    assert own < foreign[0] < read_only < lines.index('LABEL="openvadp_end"') == len(lines) - 1
    assert 'ATTRS{wwid}=="naa.600a098038314648593f517773636465", ENV{OPENVADP_FOREIGN}="lun"' in lines
    assert 'ENV{ID_PART_ENTRY_TYPE}=="0xfb|aa31e02a-400f-11db-9590-000c2911d1b8", ENV{OPENVADP_FOREIGN}="vmfs"' in lines
    writable = playbook["one"]["writable"]
    assert "--setro" not in writable and "VMware" not in writable and 'UDISKS_IGNORE}="1"' in writable


def test_text_means_what_it_says(playbook: Dict[str, Any]) -> None:
    """The text "false" took the write protection of LUNs away."""
    of_text = playbook["one"]["of_text"]
    assert "--setro" in of_text["decide.rules.j2"]
    assert of_text == {name: playbook["one"]["rendered"][name] for name in of_text}


def test_the_filter_of_lvm_accepts_the_volumes_in_use(playbook: Dict[str, Any]) -> None:
    lines = [line.strip() for line in playbook["one"]["rendered"]["lvm.conf.j2"].splitlines()]
    assert lines[lines.index("global_filter = [") + 1 : lines.index("]")] == [
        '"a|^/dev/disk/by-id/lvm-pv-uuid-AAAAAA-BBBB$|",',
        '"a|^/dev/disk/by-id/lvm-pv-uuid-CCCCCC-DDDD$|",',
        '"r|.*|"',
    ]


def test_the_mirror_and_the_key_are_taken_over(playbook: Dict[str, Any]) -> None:
    one = playbook["one"]
    assert one["deb822"] == ["http://mirror.example.com/debian", "/usr/share/keyrings/our-own.gpg"]
    assert one["one_line"] == ["http://m.example.com/debian", "/etc/apt/k.gpg"]
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert one["inline_key"] == ["http://mirror.example.com/debian", key]
    assert one["nothing"] == ["http://deb.debian.org/debian", key]
    source = one["rendered"]["apt.sources.j2"]
    assert "URIs: http://mirror.example.com/debian\nSuites: trixie\nComponents: contrib\n" in source
    assert "Signed-By: /usr/share/keyrings/our-own.gpg" in source
