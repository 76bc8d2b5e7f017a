# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.transport.opened import (
    Opened,
    Place,
    last_place,
    opened_in,
    places_in,
)

LOGS = Path(__file__).resolve().parents[4] / "tests" / "data" / "vddk-logs"
LINE = "nbdkit: vddk[1]: debug: DISKLIB-LINK  : Opened '%s' (0x1e): custom, 131072 sectors / 64 MB.\n"


@pytest.mark.parametrize(
    ("url", "mode", "place"),
    [
        ("vpxa-nfcssl://[NFS01] a/a.vmdk@esx01.domain.local:902", "nbdssl", ("esx01.domain.local",) * 2),
        ("vpxa-nfc://[ds 1] it's@home/a.vmdk@10.0.0.7:902", "nbd", ("10.0.0.7",) * 2),
        ("ha-nfcssl://[ds] a/a.vmdk@[fe80::1]:902", "nbdssl", ("fe80::1",) * 2),
        ("vpxa-nfcssl://[ds] a/a.vmdk@{nfcip:192.0.2.24,hostname:esx01}:902", "nbdssl", ("esx01", "192.0.2.24")),
        ("vpxa-nfc://[ds] a@{b}:1/a.vmdk@{hostname:esx01,nfcip:fe80::2}:902", "nbd", ("esx01", "fe80::2")),
        ("vpxa-nfcssl://[ds] a/a.vmdk@{nfcip:[fe80::2],hostname:esx01}:902", "nbdssl", ("esx01", "fe80::2")),
        ("vpxa-nfcssl://[ds] a/a.vmdk@{nfcip:192.0.2.24}:902", "nbdssl", ("192.0.2.24",) * 2),
        ("vpxa-nfcssl://[ds] a/a.vmdk@{hostname:esx01}:902", "nbdssl", ("esx01",) * 2),
        ("FASTLZ-vpxa-nfc://[ds] a/a.vmdk@esx15.test.lan:902", "nbd", ("esx15.test.lan",) * 2),
        ("ZLIB-vpxa-nfcssl://[ds] a/a.vmdk@{nfcip:10.0.0.1,hostname:e}:902", "nbdssl", ("e", "10.0.0.1")),
        ("vpxa-nfcssl://[ds] a/a.vmdk@esx01:902!52 29 44 87", "nbdssl", ("esx01",) * 2),
        ("vpxa-nfcssl://[ds] a/a.vmdk@{}:902", "nbdssl", None),
        ("san://snapshot-47[ds] a@b:1/a.vmdk", "san", None),
        ("hotadd://[ds] a/a.vmdk", "hotadd", None),
        ("/dev/sdb", "", None),
    ],
)
@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_forms_of_an_opened_disk(url: str, mode: str, place: Optional[Tuple[str, str]], quote: str) -> None:
    line = LINE.replace("'", quote) % url
    compressed = url.startswith(("FASTLZ-", "ZLIB-"))
    assert opened_in(line) == Opened(mode, Place(*place) if place else None, compressed)
    assert last_place(line + "more\n") == (Place(*place) if place else None)


def test_the_serving_host_is_the_one_that_the_log_names_last() -> None:
    first, second = (LINE % f"vpxa-nfcssl://[ds] a/a.vmdk@{host}:902" for host in ("esx01", "esx02"))
    assert last_place(first + second + "quiet\n") == Place("esx02", "esx02")
    assert last_place(first + second + LINE % "san://[ds] a.vmdk") == Place("esx02", "esx02")


def test_a_log_without_an_opened_disk_names_no_serving_host() -> None:
    assert last_place("VixDiskLib: VixDiskLib_OpenEx: Open a disk: [ds] a/a.vmdk@b, flags 0x4.\n") is None
    assert last_place("") is None


@pytest.mark.parametrize(
    ("name", "mode", "place"),
    [
        ("opened_nfcip", "nbdssl", Place("esx0d.nested.lab", "192.0.2.24")),
        ("opened_fastlz", "nbd", Place("esx15.test.lan", "esx15.test.lan")),
    ],
)
def test_logs_of_others(name: str, mode: str, place: Place) -> None:
    text = (LOGS / f"{name}.log").read_text(encoding="utf-8")
    assert last_place(text) == place
    found = {one for one in map(opened_in, text.splitlines()) if one is not None}
    assert found == {Opened(mode, place, "FASTLZ" in text)}


def test_a_host_that_is_named_where_nothing_was_opened() -> None:
    failed = 'DISKLIB-LINK  : "vpxa-nfc://[N] a.vmdk@{nfcip:192.0.2.219,hostname:esx1}:902" : failed to open'
    assert list(places_in(failed)) == [Place("esx1", "192.0.2.219")]
    assert list(places_in("mail@example.com, [ds] a@b/c.vmdk")) == []
