"""The same global batches, byte for byte, at any world size and number of workers, also if both change in an epoch."""

import json
from collections import Counter
from math import ceil, floor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmim.data.loader import train_loader
from dsmim.shards.opening import open_shards
from tests.conftest import ROOT, make_shards, run
from tests.data.loading import THREE, SampleTransform, dataset, digests, stream

WORLDS, WORKERS = (1, 2, 4), (0, 2, 4)


@pytest.fixture(scope="module")
def straight(shards):
    """Eight steps of 12 over 53 samples: an epoch ends inside the fifth."""
    return stream(shards, world=1, workers=0, consumed=0, steps=8)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_world_and_worker_count_sees_the_same(shards, straight, world, workers):
    assert stream(shards, world, workers, consumed=0, steps=8) == straight


def test_an_epoch_shows_every_sample_once(straight):
    keys = [key for batch in straight for key in batch[0]]
    assert sorted(keys[:53]) == [f"k{i:05d}" for i in range(53)]
    assert len(set(keys[53:])) == 8 * 12 - 53


@pytest.mark.parametrize("before", [(1, 0), (2, 2), (4, 4)])
@pytest.mark.parametrize("after", [(1, 4), (2, 0), (4, 2)])
def test_both_change_at_a_resume_within_an_epoch(shards, straight, before, after):
    assert stream(shards, *before, 0, 3) + stream(shards, *after, 36, 5) == straight


def test_the_colours_of_deit3_and_repeats_depend_on_no_shape_either(shards):
    options = {"transform": SampleTransform(THREE), "repeats": 3}
    once = stream(shards, world=1, workers=0, consumed=0, steps=5, **options)
    assert stream(shards, world=4, workers=2, consumed=0, steps=5, **options) == once
    assert stream(shards, 2, 2, 0, 2, **options) + stream(shards, 1, 0, 24, 3, accumulation=3, **options) == once


def test_accumulation_changes_nothing(shards, straight):
    assert stream(shards, world=2, workers=0, consumed=0, steps=8, accumulation=3) == straight


def test_more_ranks_than_shards_and_fewer_samples_than_a_batch(tmp_path):
    make_shards(tmp_path, [2, 1])
    once = stream(tmp_path, world=1, workers=0, consumed=0, steps=2)
    assert stream(tmp_path, world=4, workers=2, consumed=0, steps=2) == once
    assert len(once[0][0]) == 12 and set(once[0][0]) == {"k00000", "k00001", "k00002"}


@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    window=st.integers(1, 6),
    per_rank=st.integers(1, 3),
    sessions=st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 3)), min_size=1, max_size=4),
    repeats=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape(tmp_path_factory, counts, window, per_rank, sessions, repeats):
    """Sessions of (world size, steps) one after another, over random shards and batches."""
    folder = tmp_path_factory.mktemp("shape")
    make_shards(folder, counts, side=12)
    batch, total = 4 * per_rank, sum(steps for _, steps in sessions)
    options = {"batch": batch, "window": window, "repeats": repeats}
    straight = stream(folder, 1, 0, 0, total, **options)
    resumed, done = [], 0
    for world, steps in sessions:
        resumed += stream(folder, world, 0, done * batch, steps, **options)
        done += steps
    assert resumed == straight
    seen = Counter(key for step in straight for key in step[0])
    passes = total * batch / (sum(counts) * repeats)
    assert all(floor(passes) * repeats <= seen[f"k{i:05d}"] <= ceil(passes) * repeats for i in range(sum(counts)))


def test_real_processes(shards, tmp_path):
    """Ranks started by torchrun, each with its own loader and workers; the samples of all ranks are joined."""

    def session(world: int, workers: int, consumed: int, steps: int) -> list[str]:
        out = tmp_path / f"{world}-{workers}-{consumed}"
        out.mkdir()
        script = ROOT / "tests/data/loading.py"
        words = ["--nproc-per-node", world, "--master-port", 0, script, shards, out, workers, consumed, steps]
        run("torchrun", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *words)
        ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
        return [sample for step in range(steps) for rank in ranks for sample in rank[step]]

    batches = train_loader(dataset(shards), 0, 8, 12, 1, 1, 0, 0, False)
    straight = [sample for batch in batches for sample in digests(batch)]
    assert len(straight) == 96 and len(set(straight)) == 96  # the second epoch has other augmentations
    assert session(4, 2, 0, 3) + session(2, 4, 36, 5) == straight


def test_the_shards_have_the_sizes_that_the_tests_assume(shards):
    assert [index.samples for index in open_shards(f"{shards}/train-*.tar")] == [17, 3, 13, 11, 9]
