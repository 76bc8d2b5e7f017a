# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Stands in for the get-pip.py that ansible-test downloads for each of its environments: they share one pip.

It is installed once, beside them, and found by a .pth file: installing it a dozen times takes a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    root = Path(os.environ["GET_PIP"]).resolve().parents[2]
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")]
    wanted += [name for name in ("setuptools", "wheel") if f"--no-{name}" not in sys.argv]
    packages = root / "build" / "ansible-test" / "_".join(wanted)
    if not packages.is_dir():
        environment = {name: value for name, value in os.environ.items() if name != "GET_PIP"}
        made = packages.with_suffix(".new")
        command = [root / ".venv" / "bin" / "python", "-m", "pip", "install", "-q", "--target", made, *wanted]
        subprocess.run(command, env=environment, check=True)
        made.rename(packages)
    (Path(sysconfig.get_path("purelib")) / "shared_pip.pth").write_text(f"{packages}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
