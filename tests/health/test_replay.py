"""Replay bundles: a real micro batch comes back bit for bit, and a disk that fails does not end the run."""

import json
import math
import os
import sys

import pytest
import torch

from dsmim.cluster.placement import detect
from dsmim.data.loader import train_loader
from dsmim.data.order import stream_key
from dsmim.engine.runtime import Runtime
from dsmim.health import replay
from dsmim.recipe.reading import parse_recipe
from dsmim.session import training_data
from dsmim.tasks import build_task
from tests.conftest import run, tiny_recipe

CLASSIFY = {"name": "classify", "num_classes": 3, "mixup": 0.8, "cutmix": 1.0}


@pytest.fixture
def alone():
    """A process group of one."""
    import torch.distributed as dist

    place = detect({})
    store = dist.TCPStore("127.0.0.1", place.master_port, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Runtime(place, torch.device("cpu"))
    dist.destroy_process_group()


def losses(recipe, task, batches) -> list[torch.Tensor]:
    """Return the losses as the training loop computes them."""
    list(task.fill())
    torch.manual_seed(stream_key(recipe.seed, "model", 3, 0))
    return [task.training_loss(task.model.train(), batch | {"step": 3}) for batch in batches]


@pytest.mark.parametrize("task", [None, CLASSIFY])
def test_a_batch_comes_back_and_gives_the_same_loss(tmp_path, shards, alone, task):
    recipe = parse_recipe(tiny_recipe(shards, **({"task": task} if task else {})), "tiny")
    torch.manual_seed(0)
    task = build_task(recipe)
    data = training_data(recipe, task, alone)
    batches = list(train_loader(data, 24, 1, 8, 2, 1, 0, workers=0, pin=False))
    batches[0]["undecodable"] = ["train-000.tar: k3\udcff.png cannot be decoded"]
    info = {"seed": 0, "world_size": 2, "own_loss": math.nan, "recipe": recipe.model_dump(mode="json")}
    bundle = replay.write(tmp_path / "replay", 3, 1, batches, info)
    assert bundle == tmp_path / "replay/step_00000003"
    assert sorted(path.name for path in bundle.iterdir()) == ["rank_1.json", "rank_1.safetensors"]
    again, info = replay.read(bundle, 1)
    assert len(again) == len(batches) == 2
    for one, other in zip(batches, again, strict=True):
        assert one.keys() == other.keys() and {"image", "key", "position"} < one.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]) and value.dtype == other[name].dtype
                assert value.stride() == other[name].stride()
            else:
                assert value == other[name]
    assert (info["step"], info["rank"], info["world_size"]) == (3, 1, 2) and math.isnan(info["own_loss"])
    assert parse_recipe(info["recipe"], "replay") == recipe
    first = losses(recipe, task, batches)
    torch.manual_seed(0)
    second = losses(recipe, build_task(recipe), again)
    assert [x.item() for x in first] == [x.item() for x in second] and all(x.isfinite() for x in first)


def batch(value: float = 1.0) -> dict:
    return {"image": torch.full((2, 3, 4, 4), value), "key": ["a", "b"]}


def test_three_steps_are_kept_and_a_repeated_one_is_replaced(tmp_path):
    for step in (1, 5, 9):
        assert replay.write(tmp_path, step, 0, [batch()], {}) == tmp_path / f"step_{step:08d}"
    refused = replay.write(tmp_path, 11, 0, [batch()], {})
    assert refused == f"no replay bundle of step 11: {tmp_path} has 3 already"
    assert not (tmp_path / "step_00000011").exists()
    assert replay.write(tmp_path, 5, 0, [batch(2.0)], {}) == tmp_path / "step_00000005"  # a resumed run met it again
    assert replay.read(tmp_path / "step_00000005", 0)[0][0]["image"].max() == 2
    assert replay.write(tmp_path, 9, 7, [batch()], {}) == tmp_path / "step_00000009"  # another rank's
    with pytest.raises(ValueError, match="holds no replay of rank 3"):
        replay.read(tmp_path / "step_00000009", 3)
    (tmp_path / "step_00000009/rank_7.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="holds no replay of rank 7"):
        replay.read(tmp_path / "step_00000009", 7)


FULL = """
import resource, sys, torch
from pathlib import Path
from dsmim.health import replay
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
print(replay.write(Path(sys.argv[1]), 4, 0, [{"image": torch.zeros(100_000), "key": ["a"]}], {}))
"""


def test_a_full_disk_is_reported_and_nothing_is_left_behind(tmp_path):
    text = run(sys.executable, "-c", FULL, tmp_path).stdout
    assert text.startswith(f"no replay bundle of step 4: {tmp_path}/step_00000004 cannot be written (File too large)")
    assert list((tmp_path / "step_00000004").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in replay.write(tmp_path / "file", 4, 0, [batch()], {})


def test_values_that_json_does_not_have_are_written_as_text(tmp_path):
    bundle = replay.write(tmp_path, 1, 0, [batch()], {"newest_checkpoint": tmp_path, "grad_norm": math.inf})
    written = json.loads((bundle / "rank_0.json").read_text())
    assert (written["grad_norm"], written["grad_norm_state"]) == (None, "inf")
    info = replay.read(bundle, 0)[1]
    assert info["newest_checkpoint"] == os.fspath(tmp_path) and info["grad_norm"] == math.inf
