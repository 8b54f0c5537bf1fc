"""The contract "order of samples", as properties over random shapes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from dsmim.data.order import Order, accumulation_steps, rank_positions

counts_of_shards = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@given(counts_of_shards, st.integers(0, 2**40), st.integers(1, 10), st.integers(1, 3), st.integers(0, 3))
@settings(deadline=None)
def test_every_epoch_is_a_single_pass(counts, seed, window, repeats, epoch):
    """With repeats a pass over the data has `repeats` epochs."""
    order = Order(counts, seed, window, repeats)
    n = order.pass_samples
    assert n == repeats * order.epoch_samples == repeats * sum(counts)
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


def test_the_order_of_repeats_is_a_fixed_function_too():
    """A global batch of 8 has 8 entries of the list 1 1 1 0 0 0 9 9 | 9 11 11 11 3 3 3 10 | …: every third from the
    first on, from the second on, from the third on."""
    order = Order([4, 4, 4], seed=7, window=2, repeats=3, global_batch=8)
    assert [(order[p].sample, order[p].repeat) for p in range(16)] == [
        (1, 0), (0, 0), (9, 0), (1, 1), (0, 1), (9, 1), (1, 2), (0, 2),
        (9, 2), (11, 2), (3, 2), (11, 0), (3, 0), (10, 0), (11, 1), (3, 1),
    ]  # fmt: skip
    assert [Order([4, 4, 4], 7, 2, 1, 8)[p].sample for p in range(12)] == GOLDEN  # without repeats nothing changes


@given(counts_of_shards, st.integers(0, 9), st.integers(1, 10), st.integers(2, 5), st.integers(1, 30))
@settings(deadline=None)
def test_a_global_batch_holds_the_next_entries_of_the_list_of_repeats(counts, seed, window, repeats, batch):
    """So none is lost, and none comes twice. The list is that of test_every_epoch_is_a_single_pass."""
    apart, listed = Order(counts, seed, window, repeats, batch), Order(counts, seed, window, repeats)
    for begin in range(0, 6 * batch, batch):
        span = range(begin, begin + batch)
        assert Counter(apart[p] for p in span) == Counter(listed[p] for p in span)


@given(
    counts_of_shards.filter(lambda counts: sum(counts) > 1), st.integers(0, 9), st.integers(1, 10), st.integers(2, 5),
    st.integers(0, 12), st.integers(2, 8),
)  # fmt: skip
@settings(deadline=None)
def test_pairs_and_ranks_get_different_images(counts, seed, window, repeats, more, world):
    """Windows of few samples included. A pair that two passes share may be one image, by chance."""
    batch = 2 * (repeats + more)
    order = Order(counts, seed, window, repeats, batch)
    for position in range(0, 2 * order.pass_samples + 2 * batch, 2):
        one, other = order[position], order[position + 1]
        assert one.sample != other.sample or one.epoch != other.epoch
    if world < repeats:
        return
    order = Order([n + 40 for n in counts], seed, window, repeats, batch := world * 2 * (repeats + 1))
    for begin in range(0, 9 * batch, batch):
        for rank in range(world):
            seen = [(d.epoch, d.sample) for d in (order[p] for p in rank_positions(begin, batch, world, rank))]
            assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("ranks", "per_rank"), [(8, 256), (4, 64), (3, 8)])
def test_a_global_batch_shows_the_images_of_timm_s_repeated_augmentation(ranks, per_rank):
    """How often each image stands in a step: RepeatAugSampler's ranks, joined, against ours."""
    images = 3000
    samplers = [list(RepeatAugSampler(range(images), ranks, rank, num_repeats=3)) for rank in range(ranks)]
    batch = ranks * per_rank
    order = Order([500] * 6, 0, 6, repeats=3, global_batch=batch)
    assert abs(ranks * len(samplers[0]) - order.epoch_samples) < 256  # timm rounds an epoch to a multiple of 256
    for step in range(len(samplers[0]) // per_rank):
        theirs = Counter(i for sampler in samplers for i in sampler[step * per_rank : (step + 1) * per_rank])
        ours = Counter(order[p].sample for p in range(step * batch, (step + 1) * batch))
        assert Counter(theirs.values()) == Counter(ours.values())


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
