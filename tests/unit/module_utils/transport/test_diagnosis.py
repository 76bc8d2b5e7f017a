# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import io
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.transport import vix_errors
from ansible_collections.openvadp.backup.plugins.module_utils.transport.diagnosis import (
    Nic,
    clean,
    diagnose,
    open_log,
    overlaps,
    read_lines,
)
from ansible_collections.openvadp.backup.plugins.modules import vddk_log_diagnosis

ROOT = Path(__file__).resolve().parents[4]
FIELD_REPORT = ROOT / "tests" / "data" / "field-report-nfc.log"


def nic(host: str, device: str, ip: str, *services: str, **more: Any) -> Nic:
    option = {"host": host, "device": device, "ip": ip, "netmask": "255.255.255.0", "services": list(services), **more}
    return Nic.from_option(option)


def findings(text: str, nics: Sequence[Nic] = ()) -> List[Dict[str, Any]]:
    return diagnose(read_lines(io.BytesIO(text.encode())), nics).findings()


def codes(text: str, nics: Sequence[Nic] = ()) -> List[str]:
    return [f"{finding['code']} {finding['certainty']}" for finding in findings(text, nics)]


REPORT = FIELD_REPORT.read_text(encoding="utf-8")
ESX = "esx01.domain.local"
SHARED = (nic(ESX, "vmk0", "192.0.2.11", "management"), nic(ESX, "vmk1", "192.0.2.111", "vSphereBackupNFC"))
APART = (nic(ESX, "vmk0", "192.0.2.11", "management"), nic(ESX, "vmk1", "198.51.100.11", "vSphereBackupNFC"))


# The field report


def test_the_field_report_alone_makes_two_nics_in_one_subnet_likely() -> None:
    found = findings(REPORT)
    assert [(one["code"], one["certainty"]) for one in found] == [
        ("shared_subnet", "likely"),
        ("connection_cut", "possible"),
    ]
    assert any("failed to send open message" in line for line in found[0]["evidence"])
    assert any("NBD_ERR_NETWORK_CONNECT (2338)" in line for line in found[0]["evidence"])
    assert "subnet of its own" in found[0]["remedy"] and "esxi_nics" in found[0]["confirm"]


def test_with_the_hosts_nics_it_is_certain_and_names_them() -> None:
    found = findings(REPORT, SHARED)
    assert (found[0]["code"], found[0]["certainty"]) == ("shared_subnet", "certain")
    assert "vmk0" in found[0]["evidence"][0] and "vmk1" in found[0]["evidence"][0]
    assert "192.0.2.0/24" in found[0]["remedy"]


def test_with_nics_that_lie_apart_it_is_ruled_out() -> None:
    assert codes(REPORT, APART) == ["connection_cut likely"]


def test_nics_of_another_host_say_nothing() -> None:
    others = [nic("esx02.domain.local", one.device, one.address) for one in SHARED]
    assert codes(REPORT, others)[0] == "shared_subnet likely"


@pytest.mark.parametrize("name", ["esx01", "ESX01.Domain.Local", "esx01.domain.local."])
def test_the_hosts_name_may_be_written_otherwise(name: str) -> None:
    shared = [nic(name, one.device, one.address) for one in SHARED]
    assert codes(REPORT, shared)[0] == "shared_subnet certain"


def test_the_host_may_be_named_by_the_address_of_a_nic() -> None:
    text = REPORT.replace("esx01.domain.local", "192.0.2.111")
    assert codes(text, SHARED)[0] == "shared_subnet certain"
    assert codes(REPORT.replace("esx01.domain.local", "203.0.113.1"), SHARED)[0] == "shared_subnet likely"


def test_a_connect_that_times_out_may_be_two_nics_too() -> None:
    text = f"CnxOpenTCPSocket: Timed out connecting to server {ESX}:902: Operation now in progress\n"
    assert codes(text) == ["port_902 certain"]
    # More than one thing is possible then, so none is certain.
    assert codes(text, SHARED) == ["shared_subnet likely", "port_902 likely"]
    refused = f"CnxOpenTCPSocket: Cannot connect to server {ESX}:902: Connection refused\n"
    assert codes(refused, SHARED) == ["port_902 certain"]


def test_which_nics_may_share_a_subnet() -> None:
    def pair(*, first: Sequence[str] = (), second: Sequence[str] = (), **more: Any) -> int:
        return len(
            overlaps(
                [nic("a", "vmk0", "10.0.0.1", *first), nic(more.pop("host", "a"), "vmk1", "10.0.0.2", *second, **more)]
            )
        )

    assert pair() == 1
    assert pair(first=["management"], second=["vmotion"]) == 1
    assert pair(first=["vmotion"], second=["vmotion"]) == 0
    assert pair(first=["vmotion"], second=["vmotion", "vSphereBackupNFC"]) == 1
    assert pair(netstack="vmotion") == 0
    assert pair(host="b") == 0
    assert pair(netmask="255.255.0.0") == 1
    with pytest.raises(InputError, match="vmk1 of a"):
        nic("a", "vmk1", "10.0.0.300")


# Each cause

NBDKIT = "nbdkit: vddk[1]: debug: "
CASES = [
    # the very words of nbdkit 1.32 with VDDK, of VDDK's own file, of a product that puts things in front
    (
        NBDKIT
        + "VixDiskLibVim: Failed to verify SSL certificate: actual thumbprint=B2:31 expected=12:34\n"
        + NBDKIT
        + "VixDiskLib: VixDiskLib_OpenEx: Cannot open disk [a] b.vmdk. Error 1 (Unknown error) at 1175.\n"
        "nbdkit: vddk[1]: error: VixDiskLib_Open: [a] b.vmdk: Unknown error\n",
        ["thumbprint certain"],
    ),
    ("VixDiskLib: VixDiskLib_OpenEx: Cannot open disk x. Error 1 (Unknown error) at 5512.", ["thumbprint possible"]),
    ("2026-11-20 error: VixDiskLib: SSL: certificate has expired", ["thumbprint certain"]),
    (
        "2026-07-20T12:28:41.805Z| host-27| I125: CnxOpenTCPSocket: Timed out connecting to server esx7:902: Operation"
        " now in progress\n2026-07-20T12:28:41.805Z| host-27| W115: [NFC ERROR]NfcNewAuthdConnectionEx: Failed to"
        " connect: Failed to connect to server esx7:902\nDISKLIB-LIB : Failed to open 'x' with flags 0x1e"
        " NBD_ERR_NETWORK_CONNECT (2338).\nVixDiskLib: Cannot open disk. Error 14009 (The server refused"
        " connection) at 5512.",
        ["port_902 certain"],
    ),
    ("CnxOpenTCPSocket: Cannot connect to server 10.0.0.7:902: No route to host", ["port_902 certain"]),
    ("nbdkit: vddk[1]: error: VixDiskLib_Open: [a] b.vmdk: The server refused connection", ["port_902 likely"]),
    (
        "Host address lookup for server esx07.example.com failed: Name or service not known\n"
        "DISKLIB-LIB : Failed to open 'x' NBD_ERR_NETWORK_CONNECT (2338).",
        ["name_resolution certain"],
    ),
    (
        "[NFC ERROR] NfcFssrvrProcessErrorMsg: received NFC error 5 from server: Failed to allocate the requested"
        " 24117248 bytes\nVixDiskLib: VixDiskLib_Read: Error 1 (Unknown error)",
        ["host_memory certain"],
    ),
    ("VixDiskLibVim: Cannot complete login due to an incorrect user name or password.", ["credentials certain"]),
    ("VixDiskLibVim: vim.fault.NotAuthenticated: The session is not authenticated.", ["session_expired certain"]),
    (
        "VixDiskLib: Error 3014 (Insufficient permissions in the host operating system) at 1.",
        ["privileges likely", "credentials possible"],
    ),
    ("VixDiskLibVim: Permission to perform this operation was denied. Error 3014 (x)", ["privileges certain"]),
    (
        "VixDiskLib_Open: [a] b.vmdk: You do not have access rights to this file",
        ["privileges likely", "disk_locked possible", "hotadd_slots possible"],
    ),
    ("Current license or ESXi version prohibits execution of the requested operation", ["licence certain"]),
    (
        "VixDiskLib_PrepareForAccess: Error 16064 (The host is not licensed for this feature) at 1.",
        ["global_privileges likely"],
    ),
    (
        "VixDiskLibVim: The object 'vim.vm.Snapshot:snapshot-47' has already been deleted or not been created",
        ["snapshot_missing certain"],
    ),
    ("VixDiskLib: Cannot open disk. Error 4000 (The virtual machine cannot be found) at 1.", ["vm_missing certain"]),
    ("VixDiskLib_Open: Error 4 (A file was not found)", ["disk_missing likely"]),
    ("VixDiskLib_Open: Error 15 (The file is already in use)", ["disk_locked certain"]),
    ("VixDiskLib_Open: Error 16014 (needs a key)", ["encrypted certain"]),
    ("VixDiskLib_Open: Error 35 (x)", ["encrypted certain"]),
    ("VixDiskLib_Open: Error 2000 (x)", ["invalid_disk_file likely"]),
    ("VixDiskLib: Error 13016 (x)", ["independent_disk certain"]),
    ("VixDiskLib: Error 13003 (x)", ["snapshot_missing certain"]),
    ("VixDiskLib_Open: Error 3 (One of the parameters was invalid)", ["invalid_parameter likely"]),
    ("VixDiskLib_Open: Error 16000 (One of the parameters was invalid)", ["invalid_parameter likely"]),
    ("DISKLIB-LIB : Failed to open 'x' NBD_ERR_DISKLIB", ["host_refused_disk likely"]),
    ("VixDiskLib_QueryAllocatedBlocks: failed, Error 1 (Unknown error)", ["allocation_query likely"]),
    ("backup: VDDK authentication failed", ["credentials likely"]),
    ("VIX error: Error 13019 (too many snapshots)", ["snapshot_limit certain"]),
    ("VixDiskLib: Error 16008 (CID mismatch)", ["broken_chain certain"]),
    ("VixDiskLib_Write: Error 8 (The disk is full)", ["disk_full certain"]),
    ("VixDiskLib: Error 2 (Memory allocation failed)", ["proxy_memory likely"]),
    ("VixDiskLib: VixDiskLib_OpenEx: Cannot use mode san to access [vmfs01] a/a.vmdk", ["lun_access likely"]),
    ("transport::san: Failed to open LUN naa.600a098038303053", ["lun_access likely"]),
    ("HotAdd: Exceeded the maximum number of virtual devices (TooManyDevices)", ["hotadd_slots certain"]),
    ("VixDiskLib: Cannot use mode hotadd to access [vmfs01] a/a.vmdk", ["hotadd_impossible likely"]),
    ("VixDiskLib: Error 14015 (The server is not available)", ["maintenance_mode likely"]),
    ("VixDiskLibVim: the host is entering maintenance mode: cannot open", ["maintenance_mode certain"]),
    (
        "nbdkit: error: libvixDiskLib.so.8: cannot open shared object file: No such file or directory",
        ["vddk_load certain"],
    ),
    ("VixDiskLib_InitEx: Error 16053 (The initialization of a subsystem failed)", ["vddk_load likely"]),
    (
        "[NFC ERROR] NfcNetTcpRead: bRead: -1\nVixDiskLib_Read: Error 14011 (The connection was lost)",
        ["connection_cut likely"],
    ),
    ("VixDiskLib: Error 18000 (Cannot connect to host)", ["server_unreachable likely"]),
]


@pytest.mark.parametrize(
    ("text", "expected"), CASES, ids=[case[1][0].split()[0] + str(i) for i, case in enumerate(CASES)]
)
@pytest.mark.parametrize("prefix", ["", "2026-11-20T01:02:03.456Z [4711:7] <16> bkp: "])
def test_each_cause(text: str, expected: List[str], prefix: str) -> None:
    log = "".join(f"{prefix}{line}\r\n" for line in text.splitlines())
    assert codes(log) == expected
    for finding in findings(log):
        assert set(finding) == {"code", "meaning", "certainty", "evidence", "remedy", "confirm"}
        assert finding["evidence"] and finding["remedy"] and finding["confirm"]
        assert all(any(part in line for line in log.splitlines()) for part in finding["evidence"])


def test_every_cause_of_the_table_has_a_case() -> None:
    covered = {expected.split()[0] for _text, wanted in CASES for expected in wanted}
    assert set(vix_errors.CAUSES) == covered | {"shared_subnet", "mode_replaced"}


def test_every_row_of_the_tables_names_a_cause_that_exists() -> None:
    rows = list(vix_errors._CODES.values()) + [row[2] for row in vix_errors._TEXTS]
    assert {row.cause for row in rows} <= set(vix_errors.CAUSES) | {vix_errors.UNKNOWN}
    assert {row.certainty for row in rows} <= {"certain", "likely", "possible"}


def test_several_causes_are_ranked() -> None:
    text = (
        "VixDiskLib_Open: Error 1 (Unknown error)\n"
        + "nbdkit: debug: quiet\n" * 50
        + "VixDiskLib: Error 14015 (The server is not available)\n"
        + "Host address lookup for server esx07 failed: Name or service not known\n"
    )
    assert codes(text) == ["name_resolution certain", "maintenance_mode likely", "thumbprint possible"]


def test_a_vague_number_goes_to_the_line_nearby_that_names_the_cause() -> None:
    text = "error: Host address lookup for server esx07 failed\n{gap}error: VixDiskLib_Open: Error 14009 (refused)\n"
    assert codes(text.format(gap="")) == ["name_resolution certain"]
    assert codes(text.format(gap="debug\n" * 100)) == ["name_resolution certain", "port_902 likely"]


# Logs that others have left

LOGS = ROOT / "tests" / "data" / "vddk-logs"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hotadd_slots_8021", ["hotadd_slots certain"]),
        # An older VDDK has no words for it: the number alone has several causes.
        ("hotadd_slots_old", ["privileges likely", "disk_locked possible", "hotadd_slots possible"]),
        ("vcenter_unreachable", ["server_unreachable certain"]),
        ("libssl3", ["vddk_load certain"]),
        ("vix3014", ["privileges likely", "credentials possible"]),
        ("invalid_param", ["invalid_parameter likely"]),
        ("nbd_err_generic", ["host_refused_disk likely"]),
        ("nbd_err_disklib", ["allocation_query likely"]),
        ("independent", ["independent_disk likely"]),
        ("nfcip_2338", ["port_902 certain"]),
        ("opened_nfcip", []),
        ("opened_fastlz", ["mode_replaced likely"]),
    ],
)
def test_logs_of_others(name: str, expected: List[str]) -> None:
    text = (LOGS / f"{name}.log").read_text(encoding="utf-8")
    assert codes(text) == expected
    finding = vix_errors.decode_log(text)
    benign = ("libdiskLibPlugin", "DictionaryLoad", "preferences", "DDB value", "IO filter")
    assert not any(word in line for one in findings(text) for line in one["evidence"] for word in benign)
    assert finding is None or not any(word in finding.evidence for word in benign)


BENIGN = (LOGS / "vcenter_unreachable.log").read_text(encoding="utf-8").splitlines()[:6]


def test_what_vddk_can_do_without_is_no_finding() -> None:
    assert "libdiskLibPlugin.so: cannot open shared object" in BENIGN[0]
    assert codes("\n".join(BENIGN)) == []
    assert vix_errors.decode_log("\n".join(BENIGN)) is None


@pytest.mark.parametrize(("text", "expected"), [case for case in CASES if case[1][0] != "vddk_load certain"])
@pytest.mark.parametrize("before", [False, True])
def test_a_benign_line_never_wins(text: str, expected: List[str], before: bool) -> None:
    quiet = "\n".join(BENIGN)
    assert codes(f"{quiet}\n{text}" if before else f"{text}\n{quiet}") == expected


def test_modes_that_were_not_asked_for_have_no_part_in_a_number() -> None:
    text = (LOGS / "hotadd_slots_old.log").read_text(encoding="utf-8")
    asked = "nbdkit: debug: vddk: config key=transports, value={}\n"
    assert codes(asked.format("nbdssl") + text) == ["privileges likely", "disk_locked possible"]
    assert "hotadd_slots possible" in codes(asked.format("hotadd") + text)


def test_what_went_on_without_it_is_not_why_the_rest_failed() -> None:
    asked = (LOGS / "nbd_err_disklib.log").read_text(encoding="utf-8")
    finding = vix_errors.decode_log(asked + "error: VixDiskLib_Read: Error 14011 (The connection was lost)\n")
    assert finding is not None and finding.code == 14011
    finding = vix_errors.decode_log(asked + "error: VixDiskLib_Read: Error 1 (Unknown error)\n")
    assert finding is not None and finding.code == 1


def test_a_host_with_a_backup_nic_is_one_host_of_two_names() -> None:
    text = REPORT.replace("@esx01.domain.local:902", "@{nfcip:192.0.2.111,hostname:esx01.domain.local}:902")
    assert text != REPORT
    assert codes(text, SHARED)[0] == "shared_subnet certain"
    # Only its address is among those of the NICs that are known: that is the host, by whatever name.
    assert codes(text, [nic("other-name", one.device, one.address) for one in APART]) == [
        "shared_subnet likely",
        "connection_cut possible",
    ]
    by_address = [nic("other-name", "vmk0", "198.51.100.11"), nic("other-name", "vmk1", "192.0.2.111")]
    assert codes(text, by_address) == ["connection_cut likely"]


# Transport modes


@pytest.mark.parametrize(
    ("asked", "used", "expected"),
    [
        ("san", "nbdssl", ["mode_replaced certain"]),
        ("san:hotadd", "nbdssl", ["mode_replaced certain"]),
        ("san:nbdssl", "nbdssl", ["mode_replaced possible"]),
        ("nbdssl:nbd", "nbdssl", []),
        ("file:san:hotadd:nbdssl:nbd", "nbdssl", []),
    ],
)
def test_a_mode_that_was_silently_replaced(asked: str, used: str, expected: List[str]) -> None:
    nbdkit = (
        f"nbdkit: debug: vddk: config key=transports, value={asked}\nnbdkit: vddk[1]: debug: transport mode: {used}\n"
    )
    assert codes(nbdkit) == expected
    product = f"VixDiskLib_ConnectEx: transport modes {asked}.\n"
    for scheme, place in [
        ("vpxa-nfcssl", "e"),
        ("vpxa-nfcssl", "{nfcip:10.0.0.1,hostname:e}"),
        ("ha-nfcssl", "e"),
    ]:
        line = f"DISKLIB-LIB : Opened '{scheme}://[a] b.vmdk@{place}:902' (0x1e)\n"
        assert codes(product + line) == expected
        assert codes(product + line.replace("'", '"')) == expected


# What is not known


def test_unknown_errors_are_called_so() -> None:
    found = findings("12:00 job 7 started\n12:01 ERROR tape robot does not answer\n")
    assert [(one["code"], one["certainty"]) for one in found] == [("unknown", "possible")]
    assert found[0]["evidence"] == ["12:01 ERROR tape robot does not answer"]


def test_a_number_with_a_meaning_and_no_cause_is_told() -> None:
    found = findings("VixDiskLib_Open: Error 5 (This function cannot be performed)\n")
    assert found[0]["code"] == "unknown" and "busy with another function" in found[0]["meaning"]


def test_numbers_of_others_are_not_vddks() -> None:
    assert codes("backup: error 5: Access is denied\nrobot: Error 13 in drive 2\n") == ["unknown possible"]
    assert codes("VixDiskLib: Error 2339 (something)\n") == ["unknown possible"]
    assert codes("nbdkit: error: Error 007 (octal?)\n") == ["unknown possible"]


@pytest.mark.parametrize(
    "line",
    [
        "nbdkit: debug: VDDK call: VixDiskLib_InitEx (6, 5, &debug_fn, &error_fn, &error_fn, /opt/vddk, NULL)",
        "nbdkit: debug: TLS disabled: could not load TLS certificates",
        "nbdkit: vddk[1]: debug: transport mode: nbdssl",
        "job ended with 0 errors",
        "finished without errors",
        "[NFC DEBUG] NfcClose: NFC_SUCCESS",
        "host esx01 exited maintenance mode",
        "failover cluster is healthy",
        "",
    ],
)
def test_a_log_without_errors_has_no_findings(line: str) -> None:
    assert findings(line + "\n") == []


def test_an_empty_log() -> None:
    assert findings("") == []


# Bytes

LINES = ["first", "Error 14009 (The server refused connection) VixDiskLib", "ümlaut, 漢字", "", "last"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_line_ends_and_encodings(newline: str, encoding: str) -> None:
    text = newline.join(LINES)
    assert list(read_lines(io.BytesIO(text.encode(encoding)))) == LINES
    assert codes(text) == ["port_902 likely"]


class Trickle(io.RawIOBase):
    """Gives few bytes at a time, so that characters and line ends are cut."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, _size: int = -1) -> bytes:
        piece, self.data = self.data[:3], self.data[3:]
        return piece


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_line_ends_and_characters_that_lie_on_a_border(encoding: str) -> None:
    assert list(read_lines(Trickle("\r\n".join(LINES).encode(encoding)))) == LINES  # type: ignore[arg-type]


def test_binary_junk_does_no_harm() -> None:
    random.seed(7)
    junk = random.randbytes(300_000)
    good = b"\nVixDiskLib: Error 14015 (The server is not available)\n"
    diagnosis = diagnose(read_lines(io.BytesIO(junk + good + junk + b"\x00" * 100_000)))
    found = {one["code"]: one for one in diagnosis.findings()}
    assert "maintenance_mode" in found
    assert all(line.isprintable() for one in found.values() for line in one["evidence"])


class Endless(io.RawIOBase):
    """A log of *size* bytes that is not in memory."""

    def __init__(self, block: bytes, count: int) -> None:
        self.block, self.count = block, count

    def read(self, _size: int = -1) -> bytes:
        self.count -= 1
        return self.block if self.count >= 0 else b""


@pytest.mark.parametrize(
    "block",
    [b"VixDiskLib: Error 14009 (The server refused connection) at 17\n" * 200, b"x" * 131072],
    ids=["lines", "one endless line"],
)
def test_a_huge_log_takes_little_memory(block: bytes) -> None:
    tracemalloc.start()
    try:
        diagnosis = diagnose(read_lines(Endless(block, 100)))  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert diagnosis.lines > 1000
    assert peak < 8 << 20


def test_evidence_is_short_and_of_different_lines() -> None:
    text = "".join(f"{i} VixDiskLib: Error 14009 (refused) at {i}\n" for i in range(2000))
    text += "".join(f"VixDiskLib: {'x' * i} Error 14009 (refused)\n" for i in range(1, 900))
    evidence = findings(text)[0]["evidence"]
    assert len(evidence) == 5 and all(len(line) <= 400 for line in evidence)


# Secrets


@pytest.mark.parametrize(
    "line",
    [
        "nbdkit: debug: vddk: config key=password, value=S3CRET word",
        "nbdkit: debug: vddk: config key=cookie, value=vmware_soap_session=S3CRET",
        "error: connect server=vc user=backup password=S3CRET transports=nbd",
        'error: {"username": "backup", "password": "S3CRET", "port": 443}',
        "error: 'passwd': 'S3CRET'",
        'error: Cookie: vmware_soap_session="S3CRET"; Path=/',
        "error: GET /sdk Authorization: Basic S3CRETS3CRET==",
        "error: Bearer S3CRETS3CRETS3CRET",
        "error: <password>S3CRET</password>",
        "error: <ns1:password xsi:type='xsd:string'>S3CRET</ns1:password>",
        "error: https://backup:S3CRET@vcenter/sdk refused",
        "error: vddk-tool --password S3CRET --host esx01",
        "error: sessionId=S3CRET",
        "error: VMWARE_PASSWORD=S3CRET",
        "error: session_key: S3CRET, other",
        "error: vpxa-nfc://[a] b.vmdk@esx01:902!53 33 43 52 45 54 00 11-22 33",
    ],
)
def test_secrets_are_not_repeated(line: str) -> None:
    shown = clean(line)
    assert "S3CRET" not in shown and "53 33 43" not in shown
    assert "***" in shown
    for finding in findings(line.replace("debug", "error") + " VixDiskLib Error 14009\n"):
        assert "S3CRET" not in json.dumps(finding)


def test_words_around_secrets_stay() -> None:
    line = "VixDiskLibVim: Cannot complete login due to an incorrect user name or password."
    assert clean(line) == line
    assert clean("error: user=backup password=x transports=nbd") == "error: user=backup password=*** transports=nbd"


# The module


def call(capsys: pytest.CaptureFixture[str], **options: Any) -> Dict[str, Any]:
    with patch_module_args(options), pytest.raises(SystemExit):
        vddk_log_diagnosis.main()
    result: Dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("check", [False, True])
def test_the_module(capsys: pytest.CaptureFixture[str], check: bool) -> None:
    nics = [
        {"host": "esx01", "device": "vmk0", "ip": "192.0.2.11", "netmask": "255.255.255.0"},
        {"host": "esx01", "device": "vmk1", "ip": "192.0.2.12", "netmask": "24", "services": ["vSphereBackupNFC"]},
    ]
    result = call(capsys, path=str(FIELD_REPORT), esxi_nics=nics, _ansible_check_mode=check)
    assert not result["changed"] and (result["lines"], result["error_lines"]) == (10, 9)
    assert result["findings"][0]["code"] == "shared_subnet"
    assert result["findings"][0]["certainty"] == "certain"


def test_a_text_comes_back_as_evidence_only(capsys: pytest.CaptureFixture[str]) -> None:
    line = "VixDiskLib: Error 14015 (The server is not available)"
    assert call(capsys, text=line)["findings"][0]["evidence"] == [line]
    result = call(capsys, text=f"password=S3CRET\n{line}\n")
    assert "S3CRET" not in json.dumps(result)
    assert result["findings"][0]["evidence"] == [line]


def test_what_is_no_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="No such file"):
        open_log(str(tmp_path / "none"))
    with pytest.raises(InputError, match="not a file"):
        open_log(str(tmp_path))
    os.mkfifo(str(tmp_path / "pipe"))
    with pytest.raises(InputError, match="not a file"):
        open_log(str(tmp_path / "pipe"))
    (tmp_path / "log.gz").write_bytes(b"\x1f\x8b\x08\x00rest")
    with pytest.raises(InputError, match="compressed"):
        open_log(str(tmp_path / "log.gz"))
    assert "one of" in call(capsys)["msg"]
    assert "mutually exclusive" in call(capsys, path="/a", text="b")["msg"]
    bad = [{"host": "a", "device": "vmk0", "ip": "not an address", "netmask": "24"}]
    assert "vmk0 of a" in call(capsys, text="x", esxi_nics=bad)["msg"]
