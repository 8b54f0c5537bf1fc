"""A run whose parameter groups changed between two versions of dsmim is resumed by the parameters' names.

DeepSpeed loads the optimizer's state by place: without this, a parameter would go on with another one's moments.
"""

import json
import shutil

import pytest
import torch

from dsmim.checkpoint.reading import locate
from dsmim.checkpoint.zero_shards import ZeroShards
from dsmim.engine.digest import file_entry
from tests.conftest import run, tiny_recipe

FIT = """
import json, sys
import dsmim.tasks.classify
from dsmim.models import foreign
from dsmim.recipe.reading import parse_recipe
from dsmim.train import fit
from pathlib import Path

folder, steps, groups, recipe = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
if groups == "timm":  # the final norm in the group of the last block, the register token with weight decay
    dsmim.tasks.classify.layer_ids = foreign.layer_ids
recipe["optim"]["model_no_decay"] = groups != "timm"
recipe["schedule"] = {"duration": {"steps": steps}}
fit(parse_recipe(recipe, "tiny"), folder, fork=True)
"""


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_moments_stay_with_their_parameters(tmp_path, shards, stage):
    """At a rate of almost 0, the moments after 4 steps do not depend on the groups."""
    vit = {"depth": 2, "embed_dim": 32, "num_heads": 1, "reg_tokens": 1}
    recipe = tiny_recipe(
        shards,
        task={"name": "classify", "num_classes": 3},
        model={"name": "timm:vit_tiny_patch16_224", "img_size": 32, "options": vit},
        optim={"lr": 1e-30, "layer_decay": 0.5},
        engine={"deepspeed": stage},
    )
    text = json.dumps(recipe)
    run("python", "-c", FIT, tmp_path / "resumed", 2, "timm", text)
    if stage == "zero0":
        refuses_to_guess_the_order(tmp_path, text)
    printed = run("python", "-c", FIT, tmp_path / "resumed", 4, "ours", text)
    run("python", "-c", FIT, tmp_path / "whole", 4, "ours", text)
    resumed, whole = (ZeroShards(locate(tmp_path / name)) for name in ("resumed", "whole"))
    orders = [json.loads((locate(tmp_path / name) / "state.json").read_text()) for name in ("resumed", "whole")]
    assert orders[0]["optimizer_parameters"] == orders[1]["optimizer_parameters"]
    old = json.loads((tmp_path / "resumed/checkpoints/step_00000002/state.json").read_text())
    assert old["optimizer_parameters"] != orders[0]["optimizer_parameters"]
    assert "resumed from" in printed.stdout + printed.stderr and resumed.scalars == whole.scalars
    for name in whole.names:
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            found, expected = resumed.tensor(name, key), whole.tensor(name, key)
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-20), (name, key)  # biases begin at 0
    assert resumed.tensor("norm.weight", "exp_avg").any()


def refuses_to_guess_the_order(folder, text: str) -> None:
    """The first versions did not record which moments belong to which parameter at stage 0."""
    shutil.copytree(folder / "resumed", folder / "older")
    checkpoint = locate(folder / "older")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["optimizer_parameters"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = file_entry(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    failed = run("python", "-c", FIT, folder / "older", 4, "ours", text, check=False)
    assert failed.returncode and "does not say which moments belong to which parameter" in failed.stderr
    assert "a network of timm needs optim.model_no_decay=false --fork" in failed.stderr
