"""The contract "order of samples", as properties over random shapes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmim.data.order import Order, accumulation_steps, rank_positions

counts_of_shards = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@given(counts_of_shards, st.integers(0, 2**40), st.integers(1, 10), st.integers(1, 3), st.integers(0, 3))
@settings(deadline=None)
def test_every_epoch_is_a_single_pass(counts, seed, window, repeats, epoch):
    order = Order(counts, seed, window, repeats)
    n = order.epoch_samples
    draws = [order[position] for position in range(epoch * n, (epoch + 1) * n)]
    assert {draw.epoch for draw in draws} == {epoch}
    everything = Counter((shard, row) for shard, count in enumerate(counts) for row in range(count))
    assert Counter((draw.shard, draw.row) for draw in draws) == Counter({k: v * repeats for k, v in everything.items()})
    assert {(d.sample, d.repeat) for d in draws} == {(s, r) for s in range(sum(counts)) for r in range(repeats)}


@given(counts_of_shards, st.integers(0, 9), st.integers(1, 10), st.lists(st.integers(0, 200), min_size=1, max_size=20))
@settings(deadline=None)
def test_random_access_equals_sequential(counts, seed, window, positions):
    """A resume, a worker and a rank begin in the middle: they must see what an uninterrupted run sees."""
    straight = Order(counts, seed, window)
    sequence = [straight[position] for position in range(201)]
    for position in positions:
        assert Order(counts, seed, window)[position] == sequence[position]


@given(
    st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 50),
    st.integers(1, 8),
)  # fmt: skip
@settings(deadline=None)
def test_global_batches_do_not_depend_on_the_world(per, world, other, consumed, steps):
    """At any world size, also changed during a run, the joined slices of ranks are the same positions in order."""
    batch = per * 12
    begins = range(consumed, consumed + steps * batch, batch)
    seen = [
        [position for begin in begins for rank in range(size) for position in rank_positions(begin, batch, size, rank)]
        for size in (world, other)
    ]
    assert seen[0] == seen[1] == list(range(consumed, consumed + steps * batch))


def test_a_window_reads_only_its_own_shards():
    order = Order([100] * 20, seed=1, window=4)
    for begin in range(0, 2000, 400):
        assert len({order[p].shard for p in range(begin, begin + 400)}) == 4


def test_epochs_seeds_and_windows_differ():
    order = Order([50, 50], seed=0, window=2)
    first, second = ([order[p + e * 100].sample for p in range(100)] for e in (0, 1))
    assert first != second and sorted(first) == sorted(second) == list(range(100))
    assert [Order([50, 50], seed=1, window=2)[p].sample for p in range(100)] != first


def test_the_order_is_a_fixed_function():
    """A change of these numbers breaks every unfinished run."""
    assert [Order([4, 4, 4], seed=7, window=2)[p].sample for p in range(12)] == GOLDEN


GOLDEN = [1, 0, 9, 11, 3, 10, 8, 2, 7, 4, 6, 5]


def test_mixing_is_close_to_uniform():
    """With one window over all shards, a sample's place is uniform: chi-square of 4,000 epochs in 16 bins."""
    places = np.array([[Order([8, 8], seed=s, window=2)[p].sample for p in range(16)].index(3) for s in range(4000)])
    observed = np.bincount(places, minlength=16)
    assert ((observed - 250) ** 2 / 250).sum() < 37.7  # 99.9 % quantile at 15 degrees of freedom


def test_batches_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="100 cannot be shared evenly by 3 ranks"):
        rank_positions(0, 100, 3, 0)
    with pytest.raises(ValueError, match="96 is not a multiple of 2 ranks × micro batch 36"):
        accumulation_steps(96, 36, 2)
    assert accumulation_steps(96, "auto", 2) == 1 and accumulation_steps(96, 12, 2) == 4
