# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import sys
import unicodedata
from typing import Any, List

import pytest
from ansible_collections.openvadp.backup.plugins.action import show_lines
from ansible_collections.openvadp.backup.plugins.filter.backup_lan_table import backup_lan_table
from ansible_collections.openvadp.backup.plugins.filter.backup_table import backup_table
from ansible_collections.openvadp.backup.plugins.filter.file_table import file_table
from ansible_collections.openvadp.backup.plugins.filter.preflight_table import preflight_table
from ansible_collections.openvadp.backup.plugins.filter.restore_table import restore_table
from ansible_collections.openvadp.backup.plugins.filter.verify_table import verify_table
from ansible_collections.openvadp.backup.plugins.module_utils.restore.dest import file_name
from ansible_collections.openvadp.backup.plugins.module_utils.shown import LINES, shown, shown_deep
from ansible_collections.openvadp.backup.plugins.plugin_utils import progress

# Control, format (bidirectional ones among them), halves of characters, ends of lines and paragraphs.
DANGEROUS = ("Cc", "Cf", "Cs", "Zl", "Zp")
EVIL = "a\x1b]0;x\x07\x1b[2J\rb\u009b31m\u202ec\u2066\u2028d\x7f\n\ud800\udcff"


def dangerous(text: str) -> List[str]:
    return [hex(ord(letter)) for letter in text if unicodedata.category(letter) in DANGEROUS]


def test_every_dangerous_character_stands_as_an_escape_and_no_other_does() -> None:
    for number in range(sys.maxunicode + 1):
        letter = chr(number)
        if unicodedata.category(letter) in DANGEROUS:
            assert shown(letter).startswith("\\") and shown(letter).isascii()
        elif unicodedata.category(letter)[0] in "LMNPSZ":
            assert shown(letter) == letter
    assert shown("a\nb\tc\r", LINES) == "a\nb\tc\\r"
    assert shown("B\u00fcro\u3000\u5317 1") == "B\u00fcro\u3000\u5317 1"
    assert shown("r\udcff") == "r\\xff"


def test_results_are_safe_all_through() -> None:
    result = shown_deep({EVIL: [EVIL, {"x": (EVIL, 1, None, True, 1.5)}]})
    assert dangerous(repr(result)) == [] and list(result.values())[0][1]["x"][1:] == [1, None, True, 1.5]


@pytest.mark.parametrize(
    "lines",
    [
        backup_table([{"vm": EVIL, "state": "failed", "reason": EVIL, "notes": [EVIL]}]),
        backup_table(
            [
                {
                    "vm": EVIL,
                    "state": "complete",
                    "point": EVIL,
                    "disks": [{"key": 1, "label": EVIL, "mode": EVIL, "reason": EVIL, "transport_notes": [EVIL]}],
                }
            ]
        ),
        file_table(
            [{"files": [{"path": EVIL, "volume": EVIL, "state": EVIL}, EVIL], "skipped_files": [{"path": EVIL}]}]
        ),
        verify_table([{"vm_name": EVIL, "point": EVIL, "ok": False, "problems": [EVIL], "disks": []}]),
        restore_table([{"point": EVIL, "restored": [{"target": EVIL, "verified": True, "reason": EVIL}]}]),
        preflight_table([{"vm": EVIL, "state": "failed", "reason": EVIL}]),
        backup_lan_table([{"proxy": EVIL, "notes": [EVIL], "nics": [], "state": "failed", "reason": EVIL}]),
    ],
)
def test_tables(lines: List[str]) -> None:
    assert any("\\x1b" in line for line in lines) and dangerous("".join(lines)) == []


@pytest.mark.parametrize("module", [show_lines, progress])
def test_lines_on_the_screen(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: List[str] = []
    monkeypatch.setattr(module.display, "display", lambda line, **_options: printed.append(line))
    if module is progress:
        lines = progress.ProgressLines("host1", progress._print)
        lines.feed(b'{"disk":1,"label":"a\\u001b[2J\\u202e","state":"running","done_bytes":1,"total_bytes":2}\n')
    else:
        action = show_lines.ActionModule.__new__(show_lines.ActionModule)
        monkeypatch.setattr(show_lines.ActionBase, "run", lambda *_args: {})
        given = (None, {"lines": [EVIL], "warnings": [EVIL]})
        monkeypatch.setattr(action, "validate_argument_spec", lambda **_spec: given, raising=False)
        printed += action.run()["warnings"]
    assert printed and dangerous("".join(printed)) == []


def test_files_that_are_named_after_a_machine() -> None:
    name = file_name(EVIL + "/..", EVIL, 2000, "raw")
    assert dangerous(name) == [] and "/" not in name and name.endswith("-2000.raw")
