# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import ctypes

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath import buffers


@pytest.mark.parametrize("size_bytes", [512, 4096, 65536, (1 << 20) - 512, 1 << 20, 2 << 20])
def test_memory_begins_with_a_cache_line(size_bytes: int) -> None:
    memory = buffers.borrow(size_bytes)
    assert ctypes.addressof(ctypes.c_char.from_buffer(memory.data)) % 64 == 0
    assert len(memory.data) == size_bytes
    assert len(memory.memory) == len(memory.buffer) == size_bytes


def test_memory_is_used_again() -> None:
    one, other = buffers.borrow(4096), buffers.borrow(4096)
    assert one.data is not other.data
    buffers.give_back([one])
    assert buffers.borrow(4096) is one
