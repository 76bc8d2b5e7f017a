# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Import all modules and module_utils of the collection, as on a host that has none of the libraries.

usage: import_all.py LINT COLLECTION, as lint.sh prepares them
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

ABSENT = ("pyVmomi", "pyVim", "nbd", "blake3", "jmespath", "requests", "dissect")


class Absent(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


lint, collection = (Path(argument).resolve() for argument in sys.argv[1:])
sys.meta_path.insert(0, Absent())
sys.path[:0] = [str(lint), str(lint / "ansible")]
count = 0
for folder in ("modules", "module_utils"):
    for file in sorted((collection / "plugins" / folder).rglob("*.py")):
        name = ".".join(file.relative_to(lint).with_suffix("").parts)
        importlib.import_module(name[: -len(".__init__")] if name.endswith(".__init__") else name)
        count += 1
if count < 100:
    sys.exit(f"only {count} were found")
