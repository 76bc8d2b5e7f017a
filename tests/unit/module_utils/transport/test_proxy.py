# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How the hardware's names become UUIDs and addresses to look for; the looking itself has end-to-end tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import proxy
from ansible_collections.openvadp.backup.plugins.module_utils.transport.proxy import ProxyIdentity

UUID = "421a2b3c-4d5e-6f70-8192-a3b4c5d6e7f8"
SWAPPED = "3c2b1a42-5e4d-706f-8192-a3b4c5d6e7f8"
SERIAL = "VMware-42 1a 2b 3c 4d 5e 6f 70-81 92 a3 b4 c5 d6 e7 f8"


class _Nobody:
    """A vCenter in which nothing fits; it notes what was looked for."""

    def __init__(self, is_vcenter: bool = True) -> None:
        self.is_vcenter = is_vcenter
        self.asked: list = []
        self.searched = 0
        self.content = SimpleNamespace(searchIndex=SimpleNamespace(FindAllByUuid=None))

    def call(self, _function: Any, _where: Any, value: str, *_rest: Any, **_words: Any) -> list:
        self.asked.append(value)
        return []

    def find(self, *_args: Any) -> list:
        self.searched += 1
        return []


def _sysfs(folder: Path, **files: str) -> str:
    identity = folder / "class" / "dmi" / "id"
    identity.mkdir(parents=True)
    for name, text in files.items():
        if name == "address":
            card = folder / "class" / "net" / "ens192"
            card.mkdir(parents=True)
            (card / "address").write_text(text + "\n")
        else:
            (identity / name).write_text(text + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("files", "asked", "searched", "words"),
    [
        ({"product_uuid": UUID.upper()}, [UUID, SWAPPED], 0, f"no virtual machine there has the hardware UUID {UUID}"),
        ({"product_uuid": UUID, "product_serial": SERIAL}, [UUID, SWAPPED, UUID], 0, f"or the serial number {UUID}"),
        ({"product_serial": SERIAL}, [UUID], 0, f"serial number {UUID}"),
        ({"product_serial": "EX0042", "sys_vendor": "Example"}, [], 0, "its hardware is of Example, not of VMware"),
        ({"sys_vendor": "VMware, Inc."}, [], 0, "neither its UUID nor its network cards can be read"),
        ({"sys_vendor": "VMware, Inc.", "address": "00:50:56:9A:00:01"}, [], 1, "its network addresses"),
        ({"sys_vendor": "VMware, Inc.", "address": "00:00:00:00:00:00"}, [], 0, "neither its UUID"),
        ({"sys_vendor": "Example", "address": "00:50:56:9a:00:01"}, [], 0, "not of VMware"),
        ({"product_uuid": "Not Settable"}, [], 0, "does not say whose hardware it is"),
    ],
)
def test_what_is_looked_for(tmp_path: Path, files: Dict[str, str], asked: list, searched: int, words: str) -> None:
    session: Any = _Nobody()
    machine, why = ProxyIdentity.find(session, sysfs_dir=_sysfs(tmp_path, **files))
    assert machine is None and words in why
    assert (session.asked, session.searched) == (asked, searched)


def test_what_needs_no_look() -> None:
    session: Any = _Nobody(is_vcenter=False)
    assert ProxyIdentity.find(session, sysfs_dir="/absent") == (
        None,
        "an ESXi host that is logged in to directly can't attach disks to it",
    )
    assert ProxyIdentity.find(_Nobody(), physical=True) == (None, "proxy_physical says so")  # type: ignore[arg-type]
    assert session.asked == []


def test_it_is_named_once() -> None:
    with pytest.raises(InputError, match="proxy_name, proxy_moid"):
        proxy.check_options("proxy01", None, "vm-109", False)
    with pytest.raises(InputError, match="proxy_uuid, proxy_physical"):
        proxy.check_options(None, UUID, None, True)
    proxy.check_options(None, None, None, True)
