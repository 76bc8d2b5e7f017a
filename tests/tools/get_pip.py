# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Stands in for the get-pip.py that ansible-test downloads, from Python's own ensurepip: no download, same result."""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> int:
    environment = {name: value for name, value in os.environ.items() if name != "GET_PIP"}
    subprocess.run([sys.executable, "-m", "ensurepip", "--default-pip"], env=environment, check=True)
    wanted = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
    if not any(not word.startswith("-") for word in wanted):
        return 0
    return subprocess.run([sys.executable, "-m", "pip", "install", *wanted], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
