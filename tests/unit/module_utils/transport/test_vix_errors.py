# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import Optional

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.transport.vix_errors import decode_log, last_error_line


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        (
            "nbdkit: vddk[1]: debug: VixDiskLib: VixDiskLib_OpenEx: Cannot open disk [a] b.vmdk."
            " Error 13 (You do not have access rights to this file) at 5512.",
            13,
            "DiskRandomRead",
        ),
        (
            "nbdkit: vddk[1]: error: [NFC ERROR] NfcNewAuthdConnectionEx: Failed to connect to peer\n"
            "nbdkit: vddk[1]: debug: DISKLIB-LIB: Failed: DiskLib error 2338: NBD_ERR_NETWORK_CONNECT\n"
            "nbdkit: vddk[1]: debug: VixDiskLib_OpenEx: Cannot open disk. Error 14009 (The server refused connection)",
            14009,
            "902",
        ),
        ("debug: NBD_ERR_NETWORK_CONNECT (2338) failed", 2338, "902"),
        ("error: Host address lookup for server esx07 failed: Name or service not known", 2338, "resolve"),
        (
            "debug: VixDiskLibVim: Failed to verify SSL certificate: actual thumbprint=B2:31 expected=12\n"
            "error: VixDiskLib_OpenEx: Cannot open disk x. Error 1 (Unknown error) at 1",
            1,
            "thumbprint",
        ),
        ("nbdkit: vddk[1]: error: VixDiskLib_Open: failed. Error 1 (Unknown error)", 1, "thumbprint"),
        (
            "error: Current license or ESXi version prohibits execution of the requested operation",
            None,
            "Free ESXi",
        ),
        (
            "[NFC ERROR] NfcFssrvrProcess: received NFC error 5 from server: Failed to allocate the requested 9 B",
            None,
            "fewer disks",
        ),
        ("error: Error 4294967331 (x)", 35, "Cryptographer.Access"),
        ("error: VixDiskLib_ConnectEx: Insufficient permissions in the host operating system", 3014, "GetVmFiles"),
        ("error: VixDiskLib_ConnectEx: One of the parameters was invalid", 16000, "thumbprint"),
        ("error: Cannot open disk. Error 1 (Unknown error) (DiskLib error 290: NBD_ERR_GENERIC)", 290, "hostd.log"),
        ("error: VixDiskLibVim: Cannot complete login due to an incorrect user name or password.", None, "password"),
    ],
)
def test_known_errors_have_a_meaning_and_a_remedy(text: str, code: Optional[int], word: str) -> None:
    finding = decode_log(text)
    assert finding is not None
    assert finding.code == code
    assert finding.remedy is not None and word in finding.remedy
    assert finding.evidence in text


def test_unknown_numbers_stay_unknown() -> None:
    finding = decode_log("nbdkit: vddk[1]: error: VixDiskLib_Open: Error 2339 (something)")
    assert finding is not None
    assert (finding.code, finding.remedy) == (2339, None)
    assert "no published meaning" in finding.meaning


def test_a_quiet_log_has_no_finding() -> None:
    assert (
        decode_log("nbdkit: debug: using thread model: parallel\nnbdkit: vddk[1]: debug: transport mode: nbdssl")
        is None
    )
    assert decode_log("") is None


def test_the_newest_error_wins() -> None:
    finding = decode_log("error: Error 14014 (shutdown)\nerror: Error 4000 (VM not found)")
    assert finding is not None and finding.code == 4000


def test_what_a_new_connection_healed_does_not_count() -> None:
    healed = "error: Cannot connect to server esx01:902\ndebug: transport mode: nbdssl\n"
    finding = decode_log(healed + "error: VixDiskLib_Read: Error 13 (no access)")
    assert finding is not None and finding.code == 13
    finding = decode_log(healed)
    assert finding is not None and finding.code == 2338


def test_the_last_line_that_nbdkit_calls_an_error() -> None:
    text = "nbdkit: vddk[1]: error: one\nnbdkit: debug: two\nnbdkit: error: three\nnbdkit: debug: four"
    assert last_error_line(text) == "three"
    assert last_error_line("nbdkit: debug: fine") is None
