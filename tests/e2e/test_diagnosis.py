# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vddk_log_diagnosis on what the real nbdkit and its real VDDK plugin log."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest
from harness import Simulator, made_repository
from modules import Modules


class Logs:
    """Logs of nbdkit -v with the password on its command line, as people run it, and what they mean."""

    def __init__(self, simulator: Simulator, folder: Path, thumbprint: str) -> None:
        self.simulator = simulator
        self.path = folder / "nbdkit.log"
        self.modules = Modules(simulator, folder)
        self.thumbprint = thumbprint

    def make(self, **changed: str) -> None:
        facts = self.simulator.facts
        parameters = {
            "libdir": facts["vddk_libdir"],
            "server": facts["host"],
            "port": str(facts["port"]),
            "user": facts["username"],
            "password": facts["password"],
            "thumbprint": self.thumbprint,
            "vm": "moref=vm-105",
            "file": "[vmfs01] twin/twin.vmdk",
            "transports": "nbdssl",
            "nfchostport": str(facts["nfc_port"]),
            **changed,
        }
        command = ["nbdkit", "--readonly", "--verbose", "--unix", "-", "vddk"]
        command += [f"{name}={value}" for name, value in parameters.items()]
        # What --run started has ended, so nbdkit ends, closed the disk or not: it is given the time.
        closed = f"grep -q ': vddk: close$' {shlex.quote(str(self.path))}"
        command += ["--run", f'nbdinfo --size "$uri" && until {closed}; do sleep 0.05; done']
        with self.path.open("wb") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=120, check=False)

    def diagnosis(self, **options: Any) -> Dict[str, Any]:
        result = self.modules.done("vddk_log_diagnosis", path=str(self.path), **options)
        assert self.simulator.facts["password"] not in json.dumps(result)
        return result

    def codes(self, **options: Any) -> List[str]:
        return [f"{one['code']} {one['certainty']}" for one in self.diagnosis(**options)["findings"]]


@pytest.fixture
def logs(simulator: Simulator, tmp_path: Path) -> Logs:
    command = ["openssl", "x509", "-in", str(simulator.state / "tls" / "server.pem"), "-noout", "-fingerprint", "-sha1"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Logs(simulator, tmp_path, text.strip().partition("=")[2])


def test_a_log_of_what_went_well(logs: Logs) -> None:
    logs.make()
    assert logs.diagnosis()["findings"] == []
    assert logs.simulator.facts["password"] in logs.path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"thumbprint": "AA:" * 19 + "AA"}, "thumbprint certain"),
        ({"password": "another one"}, "credentials certain"),
        ({"vm": "moref=vm-999"}, "vm_missing certain"),
        ({"snapshot": "snapshot-999"}, "snapshot_missing certain"),
        ({"file": "[vmfs01] twin/none.vmdk"}, "disk_missing likely"),
        ({"libdir": "/usr/share"}, "vddk_load certain"),
    ],
)
def test_each_failure(logs: Logs, changed: Dict[str, str], expected: str) -> None:
    logs.make(**changed)
    assert logs.codes() == [expected]


def test_a_mode_that_was_silently_replaced(logs: Logs) -> None:
    logs.simulator.control.call("set_lun", datastore="vmfs01", visible=False)
    try:
        logs.make(transports="san")
    finally:
        logs.simulator.control.call("set_lun", datastore="vmfs01", visible=True)
    assert logs.codes()[0] == "mode_replaced certain"


def test_a_port_that_is_closed(logs: Logs) -> None:
    logs.simulator.control.call("cut_network")
    try:
        logs.make()
    finally:
        logs.simulator.control.call("restore_network")
    assert logs.codes() == ["port_902 certain"]


def test_a_failed_export_says_the_same(simulator: Simulator, tmp_path: Path) -> None:
    """What the module words, and what the diagnosis makes of the log lines that it gives out."""
    repository = tmp_path / "repository"
    made_repository(repository)
    modules = Modules(simulator, repository, vm="win01")
    moid = modules.snapshot("mine")
    simulator.control.call("cut_network")
    try:
        result = modules.export(moid, "p", transports=["nbdssl"], io_timeout=3)
    finally:
        simulator.control.call("restore_network")
        modules.remove_snapshot(moid)
    assert result["failed"] and "902" in result["msg"]
    found = json.dumps(result["error"]["details"])
    log = _log_of(result["error"])
    assert log, found
    findings = modules.done("vddk_log_diagnosis", text="\n".join(log))["findings"]
    assert findings[0]["code"] == "port_902"


def _log_of(value: Any) -> List[str]:
    """The ``log`` of an error's details, however deep."""
    if isinstance(value, dict):
        if isinstance(value.get("log"), list):
            return [str(line) for line in value["log"]]
        return next((found for found in map(_log_of, value.values()) if found), [])
    if isinstance(value, list):
        return next((found for found in map(_log_of, value) if found), [])
    return []
