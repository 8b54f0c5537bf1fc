"""The moving average of the weights, measured while a run goes on. ema_worker.py trains, the tests read its files."""

import json
import math
from pathlib import Path

import pytest
import torch

from dsmim.checkpoint.zero_shards import read_weights
from tests.conftest import ROOT, two_ranks
from tests.distributed import ema_worker
from tests.distributed.runs import metrics


@pytest.fixture(scope="module")
def out(tmp_path_factory, shards) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    two_ranks(ema_worker.__file__, folder, shards, PYTHONPATH=str(ROOT))
    return folder


@pytest.mark.parametrize("stage", ema_worker.STAGES)
def test_a_run_is_the_same_whether_its_average_is_measured_or_not(out, stage):
    measured, plain = (out / f"{stage}-{name}" for name in ("with", "without"))
    for which in ("fp32", "ema"):
        one, other = (read_weights(run / "checkpoints/step_00000004", which) for run in (measured, plain))
        assert one.keys() == other.keys() and len(one) > 100
        for name, value in one.items():
            assert value.numpy().tobytes() == other[name].numpy().tobytes(), (which, name)
    lines = [{key: value for key, value in line.items() if "ema" not in key} for line in metrics(measured)]
    assert lines == metrics(plain) and len(lines) == 4 + 2


@pytest.mark.parametrize("stage", ema_worker.STAGES)
def test_the_figures_of_the_average_are_those_of_the_checkpoint_s(out, stage):
    measured = [line for line in metrics(out / f"{stage}-with") if "val_loss" in line]
    figures = json.loads((out / f"{stage}-figures.json").read_text())
    assert measured[-1]["val_ema_loss"] == pytest.approx(figures["loss"], rel=1e-6)
    assert measured[-1]["val_ema_accuracy"] == figures["accuracy"]
    assert all(line["val_ema_loss"] != line["val_loss"] for line in measured)
    assert not measured[-1].keys() & {"val_ema_samples", "val_ema_undecodable"}
    best = max(measured, key=lambda line: line["val_ema_accuracy"])  # the first of equal ones
    assert (out / f"{stage}-with/checkpoints/best").read_text() == f"step_{best['step']:08d}"


def test_the_run_trained_with_bce(out):
    """Its first loss is that of an untrained network: ln(2), not ln(3)."""
    first = next(line["loss"] for line in metrics(out / "zero0-with") if "loss" in line)
    assert first == pytest.approx(math.log(2), abs=0.15)


def test_a_warm_average_follows_the_weights_closely_at_first(out):
    """Its first decays are 0, 0.37, 0.52 and 0.60, far below optim.ema_decay."""
    from timm.utils import ModelEmaV3

    from dsmim.engine.ema import decay_at

    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.9999, use_warmup=True)
    for step in (*range(12), 999, 31_621, 999_999, 2_000_000):
        assert decay_at(step, 0.9999, True) == pytest.approx(theirs.get_decay(step + 1), abs=1e-12), step
        assert decay_at(step, 0.9999, False) == 0.9999
    assert decay_at(0, 0.9999, True) == 0
