"""What benchmarks/readers.py calls equal, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_shards

ROOT = Path(__file__).parent.parent


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Resume a reader in mid-epoch: 2 ranks, then 4 and 1."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from readers_common import Layout, Tars
    from readers_measure import Plan, resume

    make_shards(tmp_path, [17, 3, 13, 11, 20])
    plan = Plan(Layout(2, 0, 16), [Layout(4, 0, 8), Layout(1, 0, 16)], before=3, after=2)
    return lambda reader: resume(reader, Tars(tmp_path), plan)


def test_dsmim_repeats_the_bytes_in_every_layout(measure):
    from readers_random_access import Dsmim

    outcome = measure(Dsmim())
    assert outcome.same == "bytes"
    assert outcome.others == {"4x0": "bytes", "1x0": "bytes"}
    assert outcome.state_bytes < 20  # one integer
    assert not outcome.notes


def test_a_reader_that_starts_again_is_not_equal(measure):
    from readers_random_access import Dsmim

    class Forgetful(Dsmim):
        def open(self, tars, layout, rank, state=None):
            return super().open(tars, layout, rank)

    outcome = measure(Forgetful())
    assert outcome.same is False
    assert set(outcome.others.values()) == {False}
    assert outcome.notes[0] == "2x0: 0 of 2 global batches hold the expected keys"


def test_other_pixels_of_the_same_samples_count_as_keys(measure):
    from readers_random_access import Dsmim

    class Brighter(Dsmim):
        def open(self, tars, layout, rank, state=None):
            stream = super().open(tars, layout, rank, state)
            if layout.ranks == 4:
                step = stream.step
                stream.step = lambda: [(keys, images ^ 1) for keys, images in step()]
            return stream

    assert measure(Brighter()).others == {"4x0": "keys", "1x0": "bytes"}


def test_a_refusal_is_reported_with_its_reason(measure):
    from readers_common import Unsupported
    from readers_random_access import Dsmim

    class Refusing(Dsmim):
        def convert(self, states, layout):
            if layout.ranks == 1:
                raise Unsupported("not to one rank")
            raise KeyError("worker_3")

    outcome = measure(Refusing())
    assert outcome.same == "bytes"
    assert outcome.others == {"4x0": False, "1x0": False}
    assert outcome.notes == ["4x0: refused: KeyError('worker_3')", "1x0: not to one rank"]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from readers_common import missing

    assert missing(("torch", "no-such-reader")) == ["no-such-reader"]
