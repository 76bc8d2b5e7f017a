# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Measure, print a line for each figure, and merge them into build/bench.json."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from typing import Any, Dict, List, Set

from harness import ROOT

from .figures import GROUPS, Figure
from .rig import Rig, say

RESULT = ROOT / "build" / "bench.json"
FOLDER = ROOT / "build" / "bench"
# What a whole run holds at a time for each GiB of data: the disk, full points or raw images, the peer's.
ROOM_FACTOR = 6


def main(names: List[str]) -> int:
    known = [name for _group, figures in GROUPS for name in figures]
    wanted = {name for word in names for name in word.split(",") if name} or set(known)
    if not wanted <= set(known):
        print(f"There is no figure {', '.join(sorted(wanted - set(known)))}; there are:", *known, sep="\n  ")
        return 2
    gib = int(os.environ.get("BENCH_GIB", "4"))
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    free = shutil.disk_usage(FOLDER).free
    if free < (gib * ROOM_FACTOR + 8) << 30:
        print(f"{FOLDER} needs {gib * ROOM_FACTOR + 8} GiB of free space, and has {free >> 30}")
        return 1
    begun = time.monotonic()
    say(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, {gib} GiB of data")
    rig = Rig(FOLDER, gib)
    try:
        for group, figures in GROUPS:
            if wanted & set(figures):
                measure(group(rig, wanted), wanted)
    finally:
        rig.close()
        if os.environ.get("KEEP") != "1":
            shutil.rmtree(FOLDER)
    say(f"done in {time.monotonic() - begun:.0f} s, load {os.getloadavg()[0]:.2f}")
    return 0


def measure(figures: Dict[str, Figure], wanted: Set[str]) -> None:
    """Print and store what was asked for."""
    stored: Dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name, figure in figures.items():
        if name in wanted:
            peer = "none" if figure.peer is None else _text(figure.peer, figure.unit)
            print(f"{name} {figure.ratio:.4g} (ours {_text(figure.ours, figure.unit)}, peer {peer})", flush=True)
            stored[name] = {"ratio": round(figure.ratio, 4), "ours": round(figure.ours, 4), "peer": figure.peer}
            if figure.peer is not None:
                stored[name]["peer"] = round(figure.peer, 4)
    part = RESULT.with_suffix(".part")
    part.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    part.replace(RESULT)


def _text(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if unit in ("calls", "bytes") else f"{value:.3g} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
