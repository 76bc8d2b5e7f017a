# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import random
import time
import tracemalloc

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.extents import Extents
from hypothesis import given
from hypothesis import strategies as st

DISK = 200

# Areas of a tiny disk, in any order, overlapping, empty or not.
areas = st.lists(st.tuples(st.integers(0, DISK), st.integers(0, 40)), max_size=30)


def bytes_of(pairs):
    """The naive model: the set of all bytes that are held."""
    return {byte for offset, length in pairs for byte in range(offset, offset + length)}


def assert_normal(extents):
    """Sorted, disjoint, not adjacent, not empty; the counts are right."""
    end = -1
    for offset, length in extents:
        assert offset > end and length > 0
        end = offset + length
    assert len(extents) == len(list(extents))
    assert bool(extents) == (len(extents) > 0)
    assert extents.total_bytes == len(bytes_of(extents))
    assert extents.end == max(end, 0)


@given(areas, areas)
def test_set_operations_are_those_of_sets(a, b):
    x, y, model_x, model_y = Extents.of(a), Extents.of(b), bytes_of(a), bytes_of(b)
    for result, expected in (
        (x, model_x),
        (x.union(y), model_x | model_y),
        (x.intersect(y), model_x & model_y),
        (x.subtract(y), model_x - model_y),
    ):
        assert_normal(result)
        assert bytes_of(result) == expected
    assert (x == y) == (model_x == model_y)
    assert x != list(x)


@given(areas, st.integers(0, DISK + 50))
def test_clip_and_next_from(a, capacity):
    x, model = Extents.of(a), bytes_of(a)
    clipped = x.clip(capacity)
    assert_normal(clipped)
    assert bytes_of(clipped) == {byte for byte in model if byte < capacity}
    assert x.next_from(capacity) == min((byte for byte in model if byte >= capacity), default=None)


@given(areas, st.integers(1, 64), st.integers(1, DISK + 50))
def test_round_out_covers_whole_clusters_up_to_the_end_of_the_disk(a, granularity, capacity):
    rounded = Extents.of(a).round_out(granularity, capacity)
    expected = set()
    for byte in bytes_of(a):
        if byte < capacity:
            first = byte - byte % granularity
            expected.update(range(first, min(first + granularity, capacity)))
    assert_normal(rounded)
    assert bytes_of(rounded) == expected


@given(areas, st.integers(1, 64))
def test_pieces_are_cut_at_multiples_of_the_disk(a, size):
    x = Extents.of(a)
    pieces = list(x.pieces(size))
    assert pieces == sorted(pieces)
    assert sum(length for _unused, length in pieces) == x.total_bytes
    assert bytes_of(pieces) == bytes_of(x)
    assert all(offset // size == (offset + length - 1) // size for offset, length in pieces)
    # no more cuts than the borders of blocks ask for
    assert len(pieces) == len({(i, byte // size) for i, area in enumerate(x) for byte in bytes_of([area])})


def test_order_across_sort_chunks_does_not_matter():
    pairs = [(i * 3, 2) for i in range(100_000)]
    shuffled = pairs[:]
    random.Random(1).shuffle(shuffled)
    assert Extents.of(iter(shuffled)) == Extents.of(pairs)


@pytest.mark.parametrize("area", [(-1, 5), (5, -1)])
def test_negative_numbers_are_refused(area):
    with pytest.raises(ValueError):
        Extents.of([area])


def test_whole_and_empty():
    assert list(Extents.whole(512)) == [(0, 512)]
    assert not Extents.whole(0)
    assert list(Extents.of()) == []


def test_a_million_areas_fit_in_little_memory_and_time():
    def stream():
        for i in range(1_000_000):
            yield i * 131072, 65536

    started = time.process_time()
    areas = Extents.of(stream())
    seconds = time.process_time() - started
    assert len(areas) == 1_000_000
    # 0.4 s on an idle machine of 2022; what is promised of the whole planning is 5 s.
    assert seconds < 5

    tracemalloc.start()
    try:
        # Tracing makes it slow: a tenth of them, and a tenth of the bound of 40 MiB.
        areas = Extents.of((i * 131072, 65536) for i in range(100_000))
        rounded = areas.clip(1 << 40).round_out(1 << 17, 1 << 40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rounded) == 1
    # the sort's chunk of 32,768 tuples costs the same for any number of areas
    assert peak < (4 << 20) + 32768 * 160


def test_what_lies_close_together_is_joined_and_the_whole_grows_by_no_more_than_the_share():
    areas = Extents.of([(0, 512), (1024, 512), (2048, 4096), (6144 + 512, 4096), (20000, 8), (20009, 8)])
    assert list(areas.joined(8)) == [(0, 512), (1024, 9728), (20000, 17)]
    source = random.Random(5)
    for share in (1, 8):
        areas = Extents.of((source.randrange(1 << 20), source.randrange(1, 4096)) for _number in range(300))
        joined = areas.joined(share)
        assert not areas.subtract(joined)
        assert len(joined) < len(areas) and joined.total_bytes <= areas.total_bytes * (1 + 1 / share)
    assert not Extents.of().joined(8)


@given(areas, st.integers(0, 12), st.integers(1, 30))
def test_a_sample_is_a_part_of_so_many_pieces(a, count, piece):
    x = Extents.of(a)
    sample = x.sample(count, piece, random.Random(7))
    assert_normal(sample)
    assert not sample.subtract(x)
    assert sample == x.sample(count, piece, random.Random(7))
    if x.total_bytes <= count * piece:
        assert sample == x
    else:
        # The last piece is as short as it happens to be.
        assert max(0, (count - 1) * piece + 1) <= sample.total_bytes <= count * piece or not count


def test_a_sample_comes_from_everywhere():
    x = Extents.of((number * 1000, 100) for number in range(10_000))
    sample = x.sample(64, 100, random.Random(7))
    assert len(sample) == 64 and sample.total_bytes == 6400
    quarters = {offset // 2_500_000 for offset, _length in sample}
    assert quarters == {0, 1, 2, 3}
    # Pieces that reach over several areas.
    assert x.sample(2, 1000, random.Random(7)).total_bytes == 2000
