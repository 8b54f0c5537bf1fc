"""LAMB under ZeRO equals a plain loop, also across checkpoints; timm's optimizers resume. lamb_worker.py trains."""

import json
from pathlib import Path

import pytest
import torch

from dsmim.checkpoint.zero_shards import ZeroShards, read_weights
from tests.conftest import ROOT, run
from tests.distributed import lamb_worker
from tests.distributed.lamb_worker import ALL, HALF, NAMES, STAGES


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lamb")
    run("python", lamb_worker.__file__, folder, PYTHONPATH=str(ROOT))
    return folder


def test_it_equals_a_plain_loop(out):
    """On 1, 2 and 3 ranks, with two micro batches and several sub-groups; with the optimizer in host
    memory; resumed, with other stages and numbers of ranks, and forked."""
    rows = [row for row in json.loads((out / "lamb.json").read_text())["cases"] if row["precision"] == "fp32"]
    assert len(rows) == 9 + 8
    assert all(row["error"] <= 1e-5 for row in rows), [row["case"] for row in rows if row["error"] > 1e-5]


def test_in_bf16_it_is_close(out):
    rows = [row for row in json.loads((out / "lamb.json").read_text())["cases"] if row["precision"] == "bf16"]
    assert len(rows) == 1 and all(1e-4 < row["error"] < 0.1 for row in rows), rows


def test_timm_s_own_is_another_optimizer_under_zero(out):
    """The comparison sees it."""
    rows = json.loads((out / "lamb.json").read_text())["naive"]
    assert [row["zero"] for row in rows if row["error"] < 1e-5] == ["0"]
    assert all(row["error"] > 0.05 for row in rows if row["zero"] in ("1", "2", "3")) and len(rows) == 4, rows


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_timm_s_optimizers_resume(out, name, stage):
    """As they were saved bit for bit; at the other stage with every scalar of their state; and the moving average."""
    step = f"checkpoints/step_{ALL:08d}"
    truth, same, other = (out / name / f"{kind}{stage}" / step for kind in ("truth", "same", "other"))
    before = out / name / f"truth{stage}" / f"checkpoints/step_{HALF:08d}"
    for which in ("fp32", "ema"):
        wanted = read_weights(truth, which)
        assert not torch.equal(wanted["first.weight"], read_weights(before, which)["first.weight"])
        assert all(torch.equal(value, wanted[key]) for key, value in read_weights(same, which).items())
        for key, value in read_weights(other, which).items():
            assert torch.allclose(value.float(), wanted[key].float(), atol=2e-6), (which, key)
    assert (ZeroShards(other).scalars == ZeroShards(truth).scalars) and ZeroShards(other).keys == ZeroShards(truth).keys
