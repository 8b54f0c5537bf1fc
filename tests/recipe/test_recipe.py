"""Recipes: every error at once, with its key and its fix."""

from functools import reduce

import pytest
import yaml

from dsmim.engine.ds_config import load_ds_config, shipped_configs
from dsmim.recipe import Recipe
from dsmim.recipe.errors import RecipeError
from dsmim.recipe.reading import differences, load_recipe, parse_recipe, shipped_recipes
from tests.conftest import tiny_recipe


def problems_of(tree: dict) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree, "test")
    return caught.value.problems


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_published_pretraining_values():
    """arXiv 2206.04664 and the Swin V2 base configuration: lr 4e-4 at batch 2048, 500 k steps, drop at 437.5 k."""
    from dsmim.engine.schedule import resolve_schedule

    recipe = load_recipe("simmim_swinv2_base_192_pretrain")
    rate = resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, 1_281_167)
    assert rate.at(6_250) == pytest.approx(4e-4)
    assert rate.at(0) == pytest.approx(2e-6)
    assert rate.at(437_499) == pytest.approx(4e-4) and rate.at(437_500) == pytest.approx(4e-5)
    assert rate.total == 500_000


def test_published_finetuning_values():
    from dsmim.engine.schedule import resolve_schedule

    recipe = load_recipe("simmim_swinv2_base_224_finetune")
    rate = resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, 1_281_167)
    assert rate.peak == pytest.approx(5e-3) and rate.min_lr == pytest.approx(1e-6)
    assert recipe.optim.layer_decay == 0.75 and recipe.optim.clip_grad == 5.0
    assert rate.total == pytest.approx(62_557, abs=1)


def test_all_problems_at_once_with_the_nearest_key(tmp_path):
    tree = tiny_recipe(tmp_path)
    tree["optim"] = {"lrr": 1e-3, "weight_decay": -1}
    tree["task"]["mask_rato"] = 0.5
    tree["scheduler"] = {}
    found = problems_of(tree)
    assert "optim.lrr: unknown key; did you mean lr?" in found
    assert "optim.lr: missing; give it a value" in found
    assert any(p.startswith("optim.weight_decay: input should be greater than or equal to 0") for p in found)
    assert "task.mask_rato: unknown key; did you mean mask_ratio?" in found
    assert "scheduler: unknown key; did you mean schedule?" in found
    assert len(found) == 5


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schedule", "duration"), {"steps": 5, "epochs": 1}, "schedule.duration: give exactly one of"),
        (("checkpoint", "every"), {"steps": 5, "minutes": 1}, "give exactly one of steps, epochs, samples, minutes"),
        (("checkpoint", "keep_every"), {"minutes": 1}, "checkpoint.keep_every.minutes: unknown key"),
        (("task", "target_window"), 46, "must be odd"),
        (("task", "mask_patch"), 24, "does not divide model.img_size 32"),
        (("task", "name"), "simim", "task.name: 'simim' is unknown; did you mean simmim?"),
        (("task",), {}, "task.name: missing; give it a value"),
        (("batch", "micro_batch"), 3, "batch.global_batch: 8 is not a multiple of batch.micro_batch 3"),
        (("schedule", "name"), "multistep", "schedule: milestones"),
        (("data", "augment"), {"crop_scale": [1.0, 0.5]}, "crop_scale must go from small to large"),
        (("data", "augment"), {"rand_augment": "foo"}, "data.augment.rand_augment: string should match"),
        (("optim", "lr"), float("inf"), "optim.lr: input should be a finite number"),
        (("data", "workers"), "many", "data.workers: input should be a valid integer"),
    ],
)
def test_contradictions_name_the_key(tmp_path, path, value, message):
    tree = tiny_recipe(tmp_path)
    *parents, key = path
    reduce(dict.get, parents, tree)[key] = value
    found = problems_of(tree)
    assert len(found) == 1 and message in found[0], found


def test_key_given_twice_is_an_error(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(RecipeError, match="given twice: name"):
        load_recipe(str(file))


def test_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=f"recipe {file}: 1 problem:\n  not valid YAML"):
        load_recipe(str(file))


def test_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    recipe = load_recipe(str(file), ["optim.lr=2e-3", "data.train=*.tar", "engine.precision=bf16"])
    assert (recipe.optim.lr, recipe.data.train, recipe.engine.precision) == (2e-3, "*.tar", "bf16")
    with pytest.raises(RecipeError, match="not of the form key=value"):
        load_recipe(str(file), ["optim.lr"])
    with pytest.raises(RecipeError, match="is a value, not a section"):
        load_recipe(str(file), ["name.x=1"])


def test_differences_leave_out_what_changes_speed_only(tmp_path):
    old = parse_recipe(tiny_recipe(tmp_path), "old")
    tree = tiny_recipe(tmp_path, log={"every": 7})
    tree["data"]["workers"] = 5
    assert differences(old, parse_recipe(tree, "new")) == []
    tree["optim"]["lr"] = 2e-3
    assert differences(old, parse_recipe(tree, "new")) == ["optim.lr: 0.001 → 0.002"]


def test_duration_units():
    from dsmim.recipe import Duration

    assert Duration(steps=7).in_steps(4, 100) == 7
    assert Duration(epochs=1.5).in_steps(4, 100) == 38  # 150 samples: 37.5 steps, none lost
    assert Duration(samples=9).in_steps(4, 100) == 3
    assert Duration(epochs=0.3).in_steps(3, 10) == 1  # 0.3 * 10 is 3 samples, not a hair more


@pytest.mark.parametrize("name", shipped_configs())
def test_deepspeed_files_take_the_recipe_s_values(name):
    config = load_ds_config(name, {"gradient_clipping": 5.0})
    assert config["gradient_clipping"] == 5.0 and "auto" not in config.values()


def test_deepspeed_file_contradictions(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(
        '{"gradient_cliping": 1.0, "gradient_clipping": 1.0, "bf16": {"enabled": true}, "train_batch_size": 8}'
    )
    with pytest.raises(ValueError) as caught:
        load_ds_config(str(file), {"gradient_clipping": 5.0, "train_batch_size": 8})
    message = str(caught.value)
    assert "gradient_cliping: DeepSpeed reads no such key; did you mean gradient_clipping?" in message
    assert "gradient_clipping: the file says 1.0, the recipe 5.0" in message
    assert "bf16: the recipe sets the precision" in message and "train_batch_size" not in message
