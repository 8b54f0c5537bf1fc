"""Recipes that start from another one, what they say about themselves, and what their keys mean."""

from pathlib import Path

import pytest
import yaml

from dsmim.recipe import Recipe
from dsmim.recipe.cost import gpu_hours
from dsmim.recipe.errors import RecipeError, keys_of
from dsmim.recipe.explain import explained
from dsmim.recipe.reading import differences, load_recipe, parse_recipe
from tests.conftest import tiny_recipe


def write(path: Path, tree: dict) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture
def first(tmp_path) -> Path:
    tree = tiny_recipe(tmp_path) | {"about": {"paper": "mine", "expected": {"loss": 0.5}}}
    tree["optim"]["no_decay"] = ["*a", "*b"]
    return Path(write(tmp_path / "first.yaml", tree))


def problems_of(source: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return caught.value.problems


def test_sections_are_merged_and_other_values_replaced(tmp_path, first):
    second = {"base": "../first.yaml", "name": "second", "optim": {"lr": 2e-3}, "schedule": {"duration": {"epochs": 2}}}
    write(tmp_path / "sub/second.yaml", second)
    third = {"base": "sub/second.yaml", "name": "third", "optim": {"no_decay": ["*c"]}, "about": {"model": "nano"}}
    found = load_recipe(write(tmp_path / "third.yaml", third), ["optim.eps=1e-6"])
    tree = tiny_recipe(tmp_path) | {"name": "third", "about": {"model": "nano"}}  # a base describes itself alone
    tree["optim"] |= {"lr": 2e-3, "no_decay": ["*c"], "eps": 1e-6}
    tree["schedule"] |= {"duration": {"epochs": 2}}  # in the place of {steps: 6}
    assert found == parse_recipe(tree, "whole")
    assert "base" not in yaml.safe_load(found.to_yaml())


def test_a_shipped_base_and_another_task(tmp_path):
    tree = {"base": "demo_pretrain", "name": "mine", "task": {"name": "classify", "num_classes": 3}}
    found = load_recipe(write(tmp_path / "r.yaml", tree))
    assert found.task.num_classes == 3 and found.model == load_recipe("demo_pretrain").model
    with pytest.raises(RecipeError, match="name: missing"):
        load_recipe(write(tmp_path / "nameless.yaml", {"base": "demo_pretrain"}))


def test_errors_name_the_file_that_holds_the_key(tmp_path, first):
    tree = yaml.safe_load(first.read_text())
    tree["optim"]["lrr"] = 1
    tree["schedule"]["warmup"] = 5
    write(first, tree)
    own = write(tmp_path / "own.yaml", {"base": "first.yaml", "name": "own", "log": {"evry": 1}})
    found = sorted(problems_of(own))
    assert found == [
        f"log.evry: unknown key; did you mean every? (in {own})",
        f"optim.lrr: unknown key; did you mean lr? (in {first})",
        "schedule.warmup: give a length with its unit: {steps: 5} or {epochs: 5} or {samples: 5} (given: 5) "
        f"(in {first})",
    ]
    assert "lrr" in problems_of(str(first))[0] and "(in " not in problems_of(str(first))[0]  # its header names the file
    told = problems_of(own, "schedule.warmup=7", "optim.lrr=2")
    assert sorted(told)[1:] == [
        "optim.lrr: unknown key; did you mean lr?",
        "schedule.warmup: give a length with its unit: {steps: 7} or {epochs: 7} or {samples: 7} (given: 7)",
    ]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("b.yaml", "a.yaml → .*b.yaml → .*a.yaml: a recipe cannot start from itself"),
        ("a.yaml", "a.yaml → .*a.yaml: a recipe cannot start from itself"),
        ("demo_pretrian", "is no shipped recipe, and .* is no file; did you mean demo_pretrain?"),
        (["a"], r"base: names one recipe, shipped or a file \(given: \['a'\]\)"),
        ("broken.yaml", "recipe .*broken.yaml: 1 problem:\n  not valid YAML"),
    ],
)
def test_bases_that_lead_nowhere(tmp_path, base, message):
    write(tmp_path / "b.yaml", {"base": "a.yaml", "name": "b"})
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "a.yaml", {"base": base, "name": "a"}))


def test_a_base_is_named_by_files_alone(tmp_path, first):
    assert problems_of(str(first), "base=demo_pretrain") == [
        "override 'base=demo_pretrain': only a file names its base; give the recipe to start from in its place"
    ]


def test_what_a_recipe_says_about_itself_is_not_compared(tmp_path, first):
    told = load_recipe(str(first))
    older = told.model_dump(mode="json")
    del older["about"], older["batch"]["max_micro_batch"]  # as an older dsmim stored it
    silent = Recipe.model_validate(older)
    assert silent != told and differences(silent, told) == differences(told, silent) == []
    assert (told.about.result, silent.about.result) == ("loss 0.5", None)
    with pytest.raises(RecipeError, match=r"about\.papr: unknown key; did you mean paper\?"):
        parse_recipe(tiny_recipe(tmp_path) | {"about": {"papr": 1}}, "t")


def test_gpu_hours_of_the_published_pre_training():
    """SwinV2-B: 500,000 steps of 2048 images at 6 × 11.75 · 10⁹ operations, at 125 · 10¹² per second."""
    recipe = load_recipe("simmim_swinv2_base_192_pretrain")
    hours = 5e5 * 2048 * 6 * 11.75e9 / 125e12 / 3600
    assert gpu_hours(recipe, 125) == pytest.approx(hours)
    recomputed = load_recipe("simmim_swinv2_base_192_pretrain", ["model.grad_checkpointing=2"])
    assert gpu_hours(recomputed, 125) == pytest.approx(hours * 3.5 / 3)
    assert gpu_hours(load_recipe("demo_finetune"), 125) is None


def test_every_key_is_explained():
    text = "\n" + explained()
    for key in keys_of(Recipe):
        if not key.endswith((".steps", ".epochs", ".samples", ".minutes")) or key == "about.epochs":
            assert f"\n  {key}: " in text, key
    assert "  optim.lr: number > 0, required\n      Peak learning rate" in text
    assert "batch.micro_batch: whole number ≥ 1 or auto, default auto" in text
    assert "\ntask (name: simmim): Masked image modelling" in text and "\ntask (name: classify): " in text


def test_one_key_or_section_is_explained():
    assert explained("seed").splitlines()[0] == "  seed: whole number ≥ 0, default 0"
    section = explained("data.augment")
    assert "data.augment.hflip: number ≥ 0 and ≤ 1, default 0.5" in section and "data.workers" not in section
    with pytest.raises(ValueError, match=r"--explain optim\.lrr: no such key; did you mean optim\.lr\?"):
        explained("optim.lrr")
