# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import json
import os
import threading

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.progress import Progress
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_rare_and_complete(tmp_path):
    path, clock = tmp_path / "progress", Clock()
    progress = Progress(str(path), clock)
    disk = progress.disk(2000, "Hard disk 1", 1000)
    for step in range(1, 21):
        clock.now = 100 + step / 10
        disk.update(step * 10)
    disk.update(1000)
    disk.finish("done")
    progress.close()
    disk.update(1)
    lines = lines_of(path)
    assert [line["seconds"] for line in lines] == [0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert [line["done_bytes"] for line in lines] == [0, 50, 100, 150, 200, 1000]
    assert [line["state"] for line in lines] == ["running"] * 5 + ["done"]
    assert lines[-1] == {
        "disk": 2000,
        "label": "Hard disk 1",
        "state": "done",
        "done_bytes": 1000,
        "total_bytes": 1000,
        "bytes_per_second": 500,
        "seconds": 2.0,
    }


def test_disks_of_many_threads_share_a_file(tmp_path):
    path = tmp_path / "progress"

    def work(progress, key):
        for _unused in range(200):
            progress.disk(key, "x" * key, 1).finish("done")

    with Progress(str(path)) as progress:
        threads = [threading.Thread(target=work, args=(progress, key)) for key in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = lines_of(path)
    assert len(lines) == 4 * 400
    assert all(line["label"] == "x" * line["disk"] for line in lines)


def test_without_a_path_or_with_a_full_disk_nothing_happens():
    for path in (None, "/dev/full"):
        disk = Progress(path).disk(1, "x", 2)
        disk.update(1)
        disk.finish("done")


def test_time_and_speed_count_from_the_end_of_a_wait(tmp_path):
    path, clock = tmp_path / "progress", Clock()
    with Progress(str(path), clock) as progress:
        disk = progress.disk(2000, "Hard disk 1", 1000)
        disk.wait("waiting for a connection to esx01")
        clock.now += 60
        disk.update(0)
        clock.now += 2
        disk.update(1000)
    lines = lines_of(path)
    assert [line["state"] for line in lines] == ["running", "waiting for a connection to esx01", "running", "running"]
    assert (lines[-1]["seconds"], lines[-1]["bytes_per_second"]) == (2.0, 500)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_nothing_but_a_file_is_written_to(tmp_path, kind):
    """It may lie in /tmp, where another user was first."""
    path, victim = tmp_path / "progress", tmp_path / "victim"
    victim.write_text("kept")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
    with pytest.raises(InputError, match="progress file"):
        Progress(str(path))
    assert victim.read_text() == "kept"
