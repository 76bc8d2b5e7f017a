# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The probe's guest is booted by the real qemu; what it says decides."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot import accelerator
from ansible_collections.openvadp.backup.plugins.module_utils.restore.boot.accelerator import (
    Probe,
    guest,
    judge,
    obstacle,
    probe_arguments,
)

QEMU = "qemu-system-x86_64"


def test_the_probes_guest_answers_where_there_is_a_processor(tmp_path: Path) -> None:
    path = tmp_path / "probe,1.img"
    path.write_bytes(guest())
    assert len(guest()) == 512
    done = subprocess.run([QEMU, *probe_arguments("tcg", str(path))], timeout=120, check=False, capture_output=True)
    assert judge(done.returncode, 5, "") is None, done.stderr
    path.write_bytes(bytes(512))


def test_what_the_probe_says_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(None, 5, "") == "a small guest did not answer within 5 s"
    assert judge(1, 5, "no kvm") == "a small guest ended with status 1: no kvm" and judge(0, 5, "") is not None
    assert obstacle(str(tmp_path / "kvm")) == f"there is no {tmp_path}/kvm"
    device = tmp_path / "device"
    device.touch()
    assert obstacle(str(device)) is None
    for wanted, words in (("tcg", "boot_accelerator says so"), ("auto", "no KVM: there is no /x")):
        monkeypatch.setattr(accelerator, "obstacle", lambda: "there is no /x")
        probe = Probe(wanted, QEMU, str(tmp_path))
        probe.start()
        assert probe.result() == ("tcg", words)
    probe = Probe("kvm", QEMU, str(tmp_path))
    probe.start()
    with pytest.raises(InputError, match="KVM does not work here.*there is no /x"):
        probe.result()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 33", ("kvm", "a small guest has answered")),
        ("echo no permission >&2; exit 1", ("tcg", "no KVM: a small guest ended with status 1: no permission")),
        ("trap '' TERM; sleep 600", ("tcg", "no KVM: a small guest did not answer within 0.3 s")),
    ],
)
def test_a_guest_that_hangs_does_not_hang_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: object
) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(accelerator, "obstacle", lambda: None)
    monkeypatch.setattr(accelerator, "PROBE_SECONDS", 0.3 if "sleep" in script else 60.0)
    probe = Probe("auto", str(program), str(tmp_path))
    probe.start()
    assert probe.result() == expected
    probe.stop()
