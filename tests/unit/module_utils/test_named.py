# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.named import FILE, FOLDER, path_problem

NOBODY = """
import os, sys
os.setgid(65534)
os.setuid(65534)
from ansible_collections.openvadp.backup.plugins.module_utils.named import path_problem
print(path_problem(sys.argv[1], sys.argv[2], write=bool(sys.argv[3])))
"""


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert path_problem(str(tmp_path), FOLDER, write=True) is None
    assert path_problem(str(tmp_path / "file"), FILE) is None
    assert path_problem(str(tmp_path / "file"), FOLDER) == "it is not a folder"
    assert path_problem(str(tmp_path), FILE) == "it is not a file"
    assert path_problem(str(tmp_path / "absent"), FILE) == "there is no such file"
    assert path_problem(str(tmp_path / "absent"), FOLDER) == "there is no such folder"
    assert path_problem("a\0b", FILE) == "embedded null byte"
    (tmp_path / "round").symlink_to("round")
    assert path_problem(str(tmp_path / "round"), FILE) == "Too many levels of symbolic links"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
@pytest.mark.parametrize(
    ("name", "kind", "write", "words"),
    [
        ("closed/file", FILE, "", "may not enter a folder on the way to it"),
        ("secret", FILE, "", "may not read it"),
        ("folder", FOLDER, "", "None"),
        ("folder", FOLDER, "yes", "may not write it"),
    ],
)
def test_no_permission_is_not_absence(tmp_path: Path, name: str, kind: str, write: str, words: str) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o711)
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed" / "file").touch()
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "folder").mkdir(mode=0o755)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(tmp_path / name), kind, write],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert words in done.stdout, done
