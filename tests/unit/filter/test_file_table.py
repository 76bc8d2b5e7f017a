# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

from typing import Any, List

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.filter.file_table import file_table


def test_files_and_what_was_skipped() -> None:
    file = {
        "path": "/a",
        "dest": "/d/a",
        "volume": "2000p1",
        "type": "file",
        "size": 2048,
        "mtime": "T",
        "sha256": "f" * 64,
    }
    folder = {"path": "/b", "dest": None, "volume": "2000p1", "type": "directory", "state": "listed"}
    skipped = [{"path": "/c", "volume": "2000p1", "reason": "it is a socket"}]
    result = {"point": "p1", "files": [dict(file, state="restored"), folder, folder], "skipped_files": skipped}
    lines = file_table([result], most=2)
    assert lines[2].split() == ["p1", "2000p1", "/d/a", "2.0", "KiB", "T", "f" * 12, "restored"]
    assert lines[3].split() == ["p1", "2000p1", "/b/", "-", "-", "-", "listed"]
    assert lines[4:] == ["and 1 more", "skipped: /c on 2000p1: it is a socket"]
    held = dict(file, dest=None, state="listed", points=["p1", "p2", "p3"])
    searched = {
        "files": [held, dict(held, points=["p2"])],
        "skipped_files": [dict(skipped[0], point="p2")],
        "points": [{"point": "p0", "problem": "damaged"}, {"point": "p1", "problem": None}],
    }
    lines = file_table([searched])
    assert lines[2].startswith("p1 .. p3 (3)  2000p1") and lines[3].startswith("p2 ")
    assert lines[4:] == ["skipped: /c on 2000p1 at p2: it is a socket", "not searched: p0: damaged"]
    # The root of a volume, restored into /d.
    (line,) = file_table([{"files": [dict(folder, path="/", dest="/d/")]}])[2:]
    assert line.split()[2] == "/d/"
    with pytest.raises(AnsibleFilterError):
        file_table("nonsense")


@pytest.mark.parametrize(
    ("made", "lines"),
    [
        (0, ["0"]),
        ("\u6587", ['"\u6587"']),
        ({"count": 7}, ['{"count": 7}']),
        (["/a", {"size": 1}, "/b"], ['"/a"', '{"size": 1}', "and 1 more"]),
        (None, []),
    ],
)
def test_what_a_query_made_of_the_list(made: Any, lines: List[str]) -> None:
    assert file_table([{"files": made}], most=2)[2:] == lines
