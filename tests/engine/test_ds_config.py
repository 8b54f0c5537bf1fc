"""Values that the recipe writes into the DeepSpeed configuration. tests/recipe/test_recipe.py has contradictions."""

import json

import pytest

from dsmim.engine.ds_config import load_ds_config, owned_keys, shipped_configs, zero_stage
from dsmim.recipe.reading import parse_recipe
from tests.conftest import tiny_recipe


def test_batch_and_clipping_come_from_the_recipe(tmp_path):
    recipe = parse_recipe(tiny_recipe(tmp_path, batch={"global_batch": 24}, optim={"lr": 1e-3, "clip_grad": 3.0}), "t")
    known = owned_keys(recipe, world_size=2, accumulation=3)
    assert known["train_batch_size"] == 24 and known["train_micro_batch_size_per_gpu"] == 4
    assert known["gradient_accumulation_steps"] == 3 and known["gradient_clipping"] == 3.0
    unknown = owned_keys(recipe, world_size=2, accumulation=None)
    assert unknown == {"train_batch_size": 24, "gradient_clipping": 3.0}


def test_no_clipping_is_written_as_0(tmp_path):
    """DeepSpeed's default is 1.0."""
    recipe = parse_recipe(tiny_recipe(tmp_path, optim={"lr": 1e-3, "clip_grad": None}), "t")
    assert owned_keys(recipe, 1, None)["gradient_clipping"] == 0.0


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_files_are_named_after_their_stage(name):
    assert zero_stage(load_ds_config(name, {})) == int(name.removeprefix("zero")[0])


def test_a_file_without_a_stage_means_0(tmp_path):
    file = tmp_path / "empty.json"
    file.write_text("{}")
    assert zero_stage(load_ds_config(str(file), {})) == 0


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.deepspeed: no file 'zero4'; dsmim comes with .*zero3"):
        load_ds_config("zero4", {})
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not valid JSON"):
        load_ds_config(str(file), {})


def test_an_optimizer_that_deepspeed_does_not_know_is_allowed_by_the_recipe(tmp_path):
    """engine/optim.py decides which ones are right."""
    key = "zero_allow_untested_optimizer"
    (file := tmp_path / "zero.json").write_text(json.dumps({key: False}))
    for name, given in (("adamw", False), ("lamb", True), ("timm:lion", True)):
        owned = owned_keys(parse_recipe(tiny_recipe(tmp_path, optim={"lr": 1e-3, "name": name}), "t"), 2, 1)
        assert (owned.get(key) is True) == given
        if given:
            with pytest.raises(ValueError, match=rf"{key}: the file says False, the recipe True"):
                load_ds_config(str(file), owned)
