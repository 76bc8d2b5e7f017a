# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import os

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import Child, RuntimeDir


@pytest.fixture
def run_dir():
    with RuntimeDir("unittest") as folder:
        yield folder.path


@pytest.fixture
def nbdkit(run_dir):
    """Starts real nbdkit servers: nbdkit("file", path) -> Child with .uri; all end with the test."""
    children = []

    def start(*argv):
        name = f"server{len(children)}"
        socket = os.path.join(run_dir, name + ".sock")
        command = ["nbdkit", "--foreground", "--unix", socket, *map(str, argv)]
        child = Child.start(command, log_path=os.path.join(run_dir, name + ".log"), name=name)
        children.append(child)
        child.wait_for_socket(socket, timeout=10)
        child.uri = f"nbd+unix:///?socket={socket}"
        return child

    yield start
    for child in children:
        child.stop(timeout=1)
