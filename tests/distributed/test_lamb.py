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


def result(out: Path, name: str, kind: str, step: int = ALL) -> Path:
    return out / name / kind / f"checkpoints/step_{step:08d}"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_timm_s_optimizers_resume(out, name, stage):
    """Bit for bit, and so does the moving average."""
    for which in ("fp32", "ema"):
        wanted = read_weights(result(out, name, f"truth{stage}"), which)
        before = read_weights(result(out, name, f"truth{stage}", HALF), which)
        assert not torch.equal(wanted["first.weight"], before["first.weight"])
        same = read_weights(result(out, name, f"same{stage}"), which)
        assert same.keys() == wanted.keys() and all(torch.equal(value, wanted[key]) for key, value in same.items())


@pytest.mark.parametrize("stage", STAGES)
def test_they_resume_at_another_stage(out, stage):
    """With every number of their state, such as nadam's mu_product."""
    truth, other = (result(out, "nadam", f"{kind}{stage}") for kind in ("truth", "other"))
    for which in ("fp32", "ema"):
        wanted = read_weights(truth, which)
        for key, value in read_weights(other, which).items():
            assert torch.allclose(value.float(), wanted[key].float(), atol=2e-6), (which, key)
    shards = ZeroShards(truth), ZeroShards(other)
    assert shards[0].scalars == shards[1].scalars and shards[0].keys == shards[1].keys
    assert {"step", "mu_product"} == shards[0].scalars["first.weight"].keys()
